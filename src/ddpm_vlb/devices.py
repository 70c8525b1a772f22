"""Getting a tensor to a device without making the host wait for it."""

from collections.abc import Callable

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


def read_later(tensor: Tensor) -> Callable[[], Tensor]:
    """Begin to copy a tensor to the CPU; the result waits for what has come.

    Args:
        tensor: on any device; not to be written into before it is read.
    """
    if tensor.device.type != "cuda":
        return tensor.cpu
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    come = torch.cuda.Event()
    come.record()

    def read() -> Tensor:
        come.synchronize()
        return host

    return read
