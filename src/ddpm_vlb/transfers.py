"""Copies between the host and the device that nobody waits for."""

from collections.abc import Callable

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device, while the host goes on.

    Args:
        tensor: on any device.
        device: where it shall be.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # pageable memory would be waited for
    # MPS reads what it was not told to wait for too late.
    return tensor.to(device, non_blocking=device.type != "mps")


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
