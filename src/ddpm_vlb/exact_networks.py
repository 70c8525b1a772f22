"""A network whose output is nearly the same on every machine: float64, diffusers' embedding of timesteps included.

Sums are taken in another order by other processors, batch sizes and numbers of threads. In float64 that moves a mean
by far less than the billionth of a step that the codec guards (bits_back), in float32 by more.
"""

import copy
import hashlib
import math
from dataclasses import replace

import torch
from diffusers.models.activations import FP32SiLU
from diffusers.models.embeddings import GaussianFourierProjection, Timesteps
from diffusers.models.normalization import FP32LayerNorm, RMSNorm
from torch import Tensor, nn

from .checks import Model
from .forward_process import ForwardProcess
from .path_networks import PathNetwork
from .reverse_process import ReverseProcess

_COARSE = (FP32LayerNorm, FP32SiLU, RMSNorm)
_WRAPPERS = (torch._dynamo.OptimizedModule, nn.DataParallel, nn.parallel.DistributedDataParallel)


class Float64Timesteps(nn.Module):
    """Diffusers' sinusoidal embedding of timesteps, in float64.

    Args:
        own: diffusers' module.

    Source: Vaswani et al. 2017, section 3.5.
    """

    def __init__(self, own: Timesteps):
        super().__init__()
        self.own = own

    def forward(self, timesteps: Tensor) -> Tensor:
        """The embedding (B, channels).

        Args:
            timesteps: (B,).
        """
        own, half = self.own, self.own.num_channels // 2
        places = torch.arange(half, dtype=torch.float64, device=timesteps.device) / (half - own.downscale_freq_shift)
        angles = own.scale * timesteps[:, None].double() * torch.exp(-math.log(10000) * places)
        first, second = (angles.cos(), angles.sin()) if own.flip_sin_to_cos else (angles.sin(), angles.cos())
        return nn.functional.pad(torch.cat([first, second], dim=-1), (0, own.num_channels % 2))


class Float64Input(nn.Module):
    """A module whose argument is cast to float64: diffusers' Fourier features take the logarithm of integers.

    Args:
        own: the module.
    """

    def __init__(self, own: nn.Module):
        super().__init__()
        self.own = own

    def forward(self, x: Tensor) -> Tensor:
        """What the module gives.

        Args:
            x: its argument.
        """
        return self.own(x.double())


def exact_network(model: Model, dtype: torch.dtype = torch.float64) -> Model:
    """A copy of a network in float64; what is no module, a function, is taken as it is.

    Args:
        model: the network.
        dtype: torch.float32 leaves it in that precision.

    Raises:
        ValueError: a layer of it computes in float32 whatever it is given.
    """
    if not isinstance(model, nn.Module):
        return model
    coarse = [type(layer).__name__ for layer in model.modules() if isinstance(layer, _COARSE)]
    if coarse and dtype == torch.float64:
        raise ValueError(
            f"`model` must compute in float64, but its {coarse[0]} does not: give `dtype=torch.float32`, for files "
            "that only this machine with these settings will read."
        )
    exact = nn.Module.to(copy.deepcopy(_plain(model)), dtype)  # diffusers' own warns
    if dtype == torch.float64:
        for layer in list(exact.modules()):
            for name, child in layer.named_children():
                if isinstance(child, Timesteps):
                    setattr(layer, name, Float64Timesteps(child))
                elif isinstance(child, GaussianFourierProjection):
                    setattr(layer, name, Float64Input(child))
            for upcast in ("upcast_softmax", "upcast_attention"):  # to float32
                if upcast in vars(layer):  # not in its configuration, of which diffusers warns
                    setattr(layer, upcast, False)
    return exact.eval().requires_grad_(False)


def exact_process(reverse: ReverseProcess) -> ReverseProcess:
    """The process with float64 tables, made of its root: a cast of float32 ones would be another process.

    Args:
        reverse: p, in any precision.
    """
    forward, device = reverse.forward, reverse.forward.timesteps.device
    root = forward.log_alphas_cumprod.cpu().double()
    betas = -torch.expm1(torch.diff(root, prepend=root.new_zeros(1)))
    return replace(reverse, forward=ForwardProcess._from_root(forward.timesteps.cpu(), root, betas).to(device))


def fingerprint(model: Model) -> bytes:
    """A hash of a network's weights, 32 bytes, the same for every precision that holds them; zeros for a function.

    Args:
        model: the network.
    """
    if not isinstance(model, nn.Module):
        return bytes(32)
    digest = hashlib.sha256()
    for name, value in sorted(_plain(model).state_dict().items()):
        own = value.detach().cpu()
        own = own.double() if own.is_floating_point() else own.long()
        digest.update(f"{name} {tuple(own.shape)} ".encode() + own.contiguous().numpy().tobytes())
    if isinstance(model, PathNetwork):
        digest.update(model._float64.float().numpy().tobytes())
    return digest.digest()


def _plain(model: nn.Module) -> nn.Module:
    """What `torch.compile` or data parallelism is around."""
    while isinstance(model, _WRAPPERS):
        model = getattr(model, "_orig_mod", None) or model.module
    return model
