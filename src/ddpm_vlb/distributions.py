r"""Diagonal Gaussians, the only distributions that a DDPM needs, in nats per element.

With z = (x - mu) / sigma and bins of half width h around the levels of the data:

1. log N(x; mu, sigma^2) = -(z^2 + log sigma^2 + log 2 pi) / 2
2. KL(N(mu_1, s_1^2) || N(mu_2, s_2^2)) = (u + expm1(-u) + ((mu_1 - mu_2) / s_1)^2 exp(-u)) / 2, u = log s_2^2 / s_1^2
3. log P(x) = log[Phi((x + h - mu) / sigma) - Phi((x - h - mu) / sigma)], the first and the last bin open outwards

Sources: Ho et al. 2020, "Denoising Diffusion Probabilistic Models", eq. 13 (3); Kingma & Welling 2014, appendix B (2).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .bin_mass import log_bin_mass

LOG_2PI = math.log(2 * math.pi)


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """What is kept is made here: on the CPU and fit for gradients, whatever mode or default device the caller set."""
    with torch.inference_mode(False), torch.device("cpu"):
        yield


def promote_half(x: Tensor) -> Tensor:
    """Return `x` in float32 if it is in half precision or integer, and untouched in float32 and float64."""
    if x.dtype in (torch.float32, torch.float64):
        return x
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _GaussianKL(torch.autograd.Function):
    """The KL of equation 2 from (d, u), with its exact derivatives: half of autograd's work, and no series in it.

    dKL/dd = d exp(-u), dKL/du = -(expm1(-u) + d^2 exp(-u)) / 2. Written in place: memory is what the loss costs.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(d: Tensor, u: Tensor) -> Tensor:
        # u + expm1(-u) is u^2 / 2 near 0, where the sum has no digits left: there it is summed as a series in w = -u.
        near, w = u.abs() < 0.1, -u
        far = torch.expm1(w).add_(u)
        slope = torch.exp(w).mul_(d)
        last = 10 if u.dtype == torch.float64 else 6
        series = w * (1 / math.factorial(last))
        for n in range(last - 1, 2, -1):
            series.add_(1 / math.factorial(n)).mul_(w)
        series.add_(0.5).mul_(w).mul_(w)
        return torch.where(near, series, far).addcmul_(d, slope).mul_(0.5)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        d, u = ctx.saved_tensors
        slope = torch.exp(-u) * d
        to_d = gradient * slope if ctx.needs_input_grad[0] else None
        to_u = gradient * torch.addcmul(torch.expm1(-u), d, slope) * -0.5 if ctx.needs_input_grad[1] else None
        return to_d, to_u


def gaussian_kl(scaled_difference: Tensor, log_variance_ratio: Tensor) -> Tensor:
    """KL divergence between two diagonal Gaussians N(mu_1, s_1^2), N(mu_2, s_2^2), in nats per element.

    Taking differences instead of the parameters lets a caller who knows them exactly (the posterior and the reverse
    process share the term in x_t and the posterior variance) keep the digits that subtracting would lose.

    Args:
        scaled_difference: (mu_1 - mu_2) / s_1, any shape.
        log_variance_ratio: u = log s_2^2 / s_1^2, broadcastable to it.

    Source: equation 2 above; Kingma & Welling 2014, appendix B, has it for a standard normal second argument.
    """
    d, u = torch.broadcast_tensors(scaled_difference, log_variance_ratio)
    return _GaussianKL.apply(d, u) if d.requires_grad or u.requires_grad else _GaussianKL.forward(d, u)


def _exact_difference(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a - b as a rounded difference and its rounding error (Knuth's two-sum); the error carries no gradient."""
    difference = a - b
    a, b, s = a.detach(), b.detach(), difference.detach()
    v = s - a
    return difference, (a - (s - v)) - (b + v)


def _inverse_sigma(log_variance: Tensor) -> Tensor:
    """1 / sigma, the largest number that there is where sigma is too small for it: a distance of 0 stays 0 sigmas.

    Args:
        log_variance: log sigma^2, in float32 or float64.
    """
    least = -1.99 * math.log(torch.finfo(log_variance.dtype).max)
    return torch.exp(-0.5 * log_variance.clamp(min=least))


@dataclass(frozen=True, eq=False)
class DiagonalGaussian:
    """A Gaussian with diagonal covariance, N(mean, exp(log_variance)).

    Args:
        mean: mu, any shape (B, C, *); half precision becomes float32.
        log_variance: log sigma^2, broadcastable to `mean`.
    """

    mean: Tensor
    log_variance: Tensor

    def __post_init__(self) -> None:
        for name in ("mean", "log_variance"):
            value = getattr(self, name)
            if value.dtype not in (torch.float32, torch.float64):
                object.__setattr__(self, name, promote_half(value))

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density at `x`, in nats per element (equation 1).

        Args:
            x: the point, broadcastable to `mean`.
        """
        z = (x - self.mean) * _inverse_sigma(self.log_variance)
        return -0.5 * (z.square() + self.log_variance + LOG_2PI)

    def kl(self, other: "DiagonalGaussian") -> Tensor:
        """KL(self || other), in nats per element (equation 2); precise down to identical distributions.

        Args:
            other: the second argument of the divergence.
        """
        z = (self.mean - other.mean) * _inverse_sigma(other.log_variance)
        log_ratio = other.log_variance - self.log_variance
        return gaussian_kl(torch.zeros_like(log_ratio), log_ratio) + 0.5 * z.square()

    def sample(self, noise: Tensor) -> Tensor:
        """The sample mean + sigma * noise.

        Args:
            noise: epsilon ~ N(0, I), the shape of `mean`.
        """
        return torch.addcmul(self.mean, (0.5 * self.log_variance).exp_(), noise)

    def discretized_log_prob(self, x: Tensor, levels: int = 256) -> Tensor:
        """Exact log mass of the bin around each level of discrete data, in nats per element (equation 3).

        The levels are -1 + 2 k / (levels - 1), k = 0 .. levels - 1; each bin reaches half way to its neighbours, the
        outer two to infinity, so the masses of all levels sum to one. Values and gradients hold from sigma = 1e-5 to
        100 and for |x - mean| / sigma up to 1e5, in float32 and float64.

        Args:
            x: data on the levels, in [-1, 1], broadcastable to `mean`.
            levels: number of levels of the data, at least 2 (256 for 8-bit images).

        Raises:
            ValueError: `levels` is not an integer of at least 2.

        Source: Ho et al. 2020, eq. 13, with the exact Gaussian CDF.
        """
        if isinstance(levels, bool) or not isinstance(levels, int) or levels < 2:
            raise ValueError(
                f"`levels` must be an integer of at least 2, the number of values that the data can take, but got "
                f"{levels!r}. For data without levels use `log_prob`, the density."
            )
        difference, rounding = _exact_difference(x, self.mean)
        return log_bin_mass(x, difference, self.log_variance, 1.0 / (levels - 1), rounding)
