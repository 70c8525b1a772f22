r"""Diagonal Gaussians, the only distributions that a DDPM needs, in nats per element.

With z = (x - mu) / sigma and bins of half width h around the levels of the data:

1. log N(x; mu, sigma^2) = -(z^2 + log sigma^2 + log 2 pi) / 2
2. KL(N(mu_1, s_1^2) || N(mu_2, s_2^2)) = (u + expm1(-u) + ((mu_1 - mu_2) / s_1)^2 exp(-u)) / 2, u = log s_2^2 / s_1^2
3. log P(x) = log[Phi((x + h - mu) / sigma) - Phi((x - h - mu) / sigma)], the first and the last bin open outwards

Sources: Ho et al. 2020, "Denoising Diffusion Probabilistic Models", eq. 13 (3); Kingma & Welling 2014, appendix B (2).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LOG_2PI = math.log(2 * math.pi)

# Gauss-Legendre rules on [-1, 1], folded onto their positive nodes; (node, weight) with weights that sum to 1.
_LEGENDRE_4 = ((0.3399810435848563, 0.6521451548625461), (0.8611363115940526, 0.3478548451374538))
_LEGENDRE_6 = (
    (0.2386191860831969, 0.4679139345726910),
    (0.6612093864662645, 0.3607615730481386),
    (0.9324695142031521, 0.1713244923791704),
)


def promote_half(x: Tensor) -> Tensor:
    """Return `x` in float32 if it is in half precision or integer, and untouched in float32 and float64."""
    if x.dtype in (torch.float32, torch.float64):
        return x
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _u_plus_expm1_minus_u(u: Tensor) -> Tensor:
    """u + exp(-u) - 1 >= 0 with its relative precision kept around u = 0, where it is u^2 / 2."""
    near = u.abs() < 0.1
    last = 10 if u.dtype == torch.float64 else 6
    v = torch.where(near, u, 0.0)  # far values would overflow in the branch that is thrown away
    series = v * (-1 / math.factorial(last)) + 1 / math.factorial(last - 1)
    for n in range(last - 2, 1, -1):
        constant = torch.full((), 1 / math.factorial(n), dtype=u.dtype, device=u.device)
        series = torch.addcmul(constant, v, series, value=-1)
    return torch.where(near, v.square() * series, u + torch.expm1(-u))


class _GaussianKL(torch.autograd.Function):
    """The KL of equation 2 from (d, u), with its exact derivatives: half of autograd's work, and no series in it.

    dKL/dd = d exp(-u), dKL/du = -(expm1(-u) + d^2 exp(-u)) / 2.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(d: Tensor, u: Tensor) -> Tensor:
        return 0.5 * torch.addcmul(_u_plus_expm1_minus_u(u), d.square(), torch.exp(-u))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        d, u = ctx.saved_tensors
        slope = d * torch.exp(-u)
        to_d = gradient * slope if ctx.needs_input_grad[0] else None
        to_u = gradient * -0.5 * torch.addcmul(torch.expm1(-u), d, slope) if ctx.needs_input_grad[1] else None
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
    return _GaussianKL.apply(*torch.broadcast_tensors(scaled_difference, log_variance_ratio))


def _exact_difference(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a - b as a rounded difference and its rounding error (Knuth's two-sum); the error carries no gradient."""
    difference = a - b
    a, b, s = a.detach(), b.detach(), difference.detach()
    v = s - a
    return difference, (a - (s - v)) - (b + v)


def _round_to_24_bits(a: float) -> float:
    """The part of `a` that float32 holds exactly (Veltkamp's splitting)."""
    c = a * (2**29 + 1)
    return c - (c - a)


def _log_bin_mass_by_density(z: Tensor, d: Tensor) -> Tensor:
    """log of the mass of the bin z +- d over 2 d, for narrow bins, by quadrature of the density (two CDFs cancel)."""
    rule = _LEGENDRE_6 if z.dtype == torch.float64 else _LEGENDRE_4
    mean_ratio = torch.zeros_like(z)
    for node, weight in rule:
        mean_ratio = mean_ratio + weight * torch.exp(-0.5 * (node * d).square()) * torch.cosh(node * z * d)
    return torch.log(mean_ratio) - 0.5 * (z.square() + LOG_2PI)


@dataclass(frozen=True, eq=False)
class DiagonalGaussian:
    """A Gaussian with diagonal covariance, N(mean, exp(log_variance)).

    Args:
        mean: mu, any shape (B, C, *).
        log_variance: log sigma^2, broadcastable to `mean`.
    """

    mean: Tensor
    log_variance: Tensor

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density at `x`, in nats per element (equation 1).

        Args:
            x: the point, broadcastable to `mean`.
        """
        z = (x - self.mean) * torch.exp(-0.5 * self.log_variance)
        return -0.5 * (z.square() + self.log_variance + LOG_2PI)

    def kl(self, other: "DiagonalGaussian") -> Tensor:
        """KL(self || other), in nats per element (equation 2); precise down to identical distributions.

        Args:
            other: the second argument of the divergence.
        """
        scaled_difference = (self.mean - other.mean) * torch.exp(-0.5 * self.log_variance)
        return gaussian_kl(scaled_difference, other.log_variance - self.log_variance)

    def sample(self, noise: Tensor) -> Tensor:
        """The sample mean + sigma * noise.

        Args:
            noise: epsilon ~ N(0, I), the shape of `mean`.
        """
        return torch.addcmul(self.mean, torch.exp(0.5 * self.log_variance), noise)

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
        half_bin = 1.0 / (levels - 1)
        difference, rounding = _exact_difference(x, self.mean)
        inv_sigma = torch.exp(-0.5 * self.log_variance)
        first, last = x < half_bin - 1, x > 1 - half_bin
        inner = ~(first | last)
        # How far the bin's centre lies outwards of the mean; for an open bin, how far its one edge does.
        sign = torch.where(first | (inner & (difference < 0)), -1.0, 1.0)
        outward = sign * difference
        # Near an edge this is a small difference of large numbers, to be divided by a sigma that may be tiny.
        high = _round_to_24_bits(half_bin)
        to_edge = (outward - high) + (sign * rounding - (half_bin - high))
        d = half_bin * inv_sigma
        z = outward * inv_sigma
        narrow = inner & (d < 0.5) & (z * d < 1)

        # Each branch sees harmless inputs where another one is taken: an unused inf would make the gradient NaN.
        near = to_edge * inv_sigma * math.sqrt(0.5)
        width = torch.where(inner & ~narrow, 2 * z * d, 0.0)
        far = torch.where(inner & ~narrow, (outward + half_bin) * inv_sigma * math.sqrt(0.5), 0.0)
        tail, body = (near > 0) & ~narrow, (near <= 0) & ~narrow
        by_density = _log_bin_mass_by_density(torch.where(narrow, z, 0.0), torch.where(narrow, d, 0.1))

        t = torch.where(tail, near, 1.0)
        beyond = torch.where(inner, torch.exp(-width) * torch.special.erfcx(far), 0.0)
        by_tail = torch.log(0.5 * (torch.special.erfcx(t) - torch.where(tail, beyond, 0.0))) - t.square()

        b = torch.where(body, -near, 1.0)
        outside = torch.special.erfc(b) + torch.where(inner & body, torch.special.erfc(far), 0.0)
        by_body = torch.log1p(-0.5 * outside)

        log_width = math.log(2 * half_bin) - 0.5 * self.log_variance
        return torch.where(narrow, by_density + log_width, torch.where(tail, by_tail, by_body))
