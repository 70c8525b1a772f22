"""Getting a tensor to a device without making the host wait for it."""

import torch
from torch import Tensor


def send(x: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on a device; from the CPU to a GPU without a wait, through pinned memory where it is CUDA's.

    Args:
        x: any tensor.
        device: where it shall go; on the way back to the CPU the values are waited for.
    """
    device = torch.device(device)
    if device.type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()
    # MPS may read the memory of a copy that does not block after it was given back.
    return x.to(device, non_blocking=device.type not in ("cpu", "mps"))
