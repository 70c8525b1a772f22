r"""The mass of a Gaussian in the bin around a level of discrete data, as a logarithm with exact slopes.

With the distance z of the level from the mean and the half width d of its bin, both in units of sqrt(2) sigma, by
symmetry z >= 0:

1. log P = log (erf(z + d) - erf(z - d)) / 2; the outer two bins are open, 1 standing for the first erf
2. d log P / dz = eta e, with eta = exp(-(z - d)^2) / (sqrt(pi) P) and e = expm1(-4 z d), or -1 for an open bin
3. d log P / d log sigma^2 = -(eta e (z - d) + 2 d eta (1 + e)) / 2

P has three forms (docs/theory.md, section 6): a narrow bin's by quadrature, where the difference would cancel; the
tail's with erfcx, where both terms would vanish; one minus what lies outside for a wide bin around the mean.
Source: Ho et al. 2020, "Denoising Diffusion Probabilistic Models", eq. 13.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

# 1 / sigma is kept within it, lest a product of 0 and infinity arise.
_RANGE = 1e-30, 1e30
_NARROW = 0.5 * math.sqrt(0.5)
# Gauss-Legendre rules on [-1, 1], folded onto their positive nodes; (node, weight) with weights that sum to 1.
_LEGENDRE_4 = ((0.3399810435848563, 0.6521451548625461), (0.8611363115940526, 0.3478548451374538))
_LEGENDRE_6 = (
    (0.2386191860831969, 0.4679139345726910),
    (0.6612093864662645, 0.3607615730481386),
    (0.9324695142031521, 0.1713244923791704),
)


def log_bin_mass(
    x: Tensor, difference: Tensor, log_variance: Tensor, half_bin: float, rounding: Tensor | None = None
) -> Tensor:
    """Log mass of N(x - difference, exp(log_variance)) in the bin around each level, in nats per element.

    Its derivative is known to the first order only: a second one raises.

    Args:
        x: data on levels in [-1, 1], of which the outer two have open bins.
        difference: x - mean, broadcastable to `x` and `x` to it.
        log_variance: log sigma^2, likewise.
        half_bin: h, half the distance of two levels.
        rounding: what `difference` lacks of the exact one, of its shape.

    Source: Ho et al. 2020, eq. 13, with the exact Gaussian CDF.
    """
    x, difference, log_variance = torch.broadcast_tensors(x, difference, log_variance)
    if _in_full(difference, log_variance):
        return _LogBinMass.apply(x, difference, log_variance, half_bin, rounding)[0]
    return _values(x, difference, log_variance, half_bin, rounding)


def _in_full(*inputs: Tensor) -> bool:
    """Whether slopes are asked for, or finding the bins that need a form would be waited for, or cannot be done."""
    if torch.compiler.is_compiling() or any(x.device.type != "cpu" or x.requires_grad for x in inputs):
        return True
    return torch._C._are_functorch_transforms_active()  # within vmap; torch's public names do not tell


class _LogBinMass(torch.autograd.Function):
    """Equation 1 and its slopes in one pass: the parts of the value are those of the slopes."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, difference: Tensor, log_variance: Tensor, half_bin: float, rounding: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        log_inv_sigma = -0.5 * log_variance
        inv_sigma = torch.exp(log_inv_sigma).clamp(*_RANGE)
        bins = _place(x, difference, inv_sigma, half_bin, rounding)
        z, d, zd = bins.z, bins.d, bins.zd
        narrow = (d < _NARROW) & (zd < 1)
        log_mass, integral = _by_density(z, d, zd, log_inv_sigma, half_bin)
        density = _Form(log_mass, torch.exp(zd - d.square()), inv_sigma * integral)
        wide = _by_edges(bins)
        log_mass, over, under = (torch.where(narrow, a, b) for a, b in zip(density, wide, strict=True))
        eta = over / (math.sqrt(math.pi) * under)
        slope = eta * bins.e
        by_log_variance = torch.addcmul(slope * bins.near, d, eta + slope, value=2) * -0.5
        return log_mass, slope * bins.scale * bins.sign, by_log_variance

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output[1:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, *to_slopes: Tensor | None) -> tuple[Tensor | None, ...]:
        if not torch.compiler.is_compiling() and any(further is not None for further in to_slopes):
            raise NotImplementedError(
                "The discretized log likelihood has first derivatives only, but a second was asked for. Do without "
                "`create_graph=True`, or score the density with `levels=None`."
            )
        if gradient is None:
            return None, None, None, None, None
        by_difference, by_log_variance = ctx.saved_tensors
        to_difference = gradient * by_difference if ctx.needs_input_grad[1] else None
        to_log_variance = gradient * by_log_variance if ctx.needs_input_grad[2] else None
        return None, to_difference, to_log_variance, None, None


class _Form(NamedTuple):
    """A form of the mass: its logarithm, and sqrt(pi) eta as a fraction; anything, NaN too, where another holds."""

    log_mass: Tensor
    over: Tensor
    under: Tensor


class _Bins(NamedTuple):
    """The bins in units of sqrt(2) sigma = 1 / scale, mirrored by `sign`: equations 1 to 3; `zd` is 2 z d."""

    sign: Tensor
    scale: Tensor
    z: Tensor
    d: Tensor
    near: Tensor
    zd: Tensor
    e: Tensor


def _place(x: Tensor, difference: Tensor, inv_sigma: Tensor, half_bin: float, rounding: Tensor | None) -> _Bins:
    edge = x.abs() > 1 - half_bin
    # Outwards: an inner bin's centre lies on the positive side of the mean, an open bin on that of its one edge.
    sign = torch.where(edge, x, difference).sign()
    outward = sign * difference
    scale = math.sqrt(0.5) * inv_sigma
    z, d = outward * scale, half_bin * scale
    near = _to_edge(outward, half_bin, None if rounding is None else sign * rounding) * scale
    zd = (2 * d * z).masked_fill(edge, math.inf)
    return _Bins(sign, scale, z, d, near, zd, torch.expm1(-2 * zd))


def _values(x: Tensor, difference: Tensor, log_variance: Tensor, half_bin: float, rounding: Tensor | None) -> Tensor:
    """Equation 1 alone: the forms of wide bins, which cost most, only where they hold."""
    shape, rounding = x.shape, None if rounding is None else rounding.flatten()
    x, difference, log_inv_sigma = x.flatten(), difference.flatten(), -0.5 * log_variance.flatten()
    inv_sigma = torch.exp(log_inv_sigma).clamp_(*_RANGE)
    z, d = (math.sqrt(0.5) * difference).mul_(inv_sigma), (math.sqrt(0.5) * half_bin) * inv_sigma
    zd = (2 * d).mul_(z)
    narrow = (d < _NARROW).logical_and_(zd.abs() < 1).logical_and_(x.abs() <= 1 - half_bin)
    log_mass, _ = _by_density(z, d, zd, log_inv_sigma, half_bin)
    wide = narrow.logical_not_().nonzero()[:, 0]
    if len(wide):
        x, difference, inv_sigma = (own.index_select(0, wide) for own in (x, difference, inv_sigma))
        rounding = None if rounding is None else rounding.index_select(0, wide)
        bins = _place(x, difference, inv_sigma, half_bin, rounding)
        log_mass.index_copy_(0, wide, _by_edges(bins).log_mass)
    return log_mass.reshape(shape)


def _by_density(z: Tensor, d: Tensor, zd: Tensor, log_inv_sigma: Tensor, half_bin: float) -> tuple[Tensor, Tensor]:
    """Log of P = exp(-z^2) / sigma times the integral over the bin of the density's ratio to that at its centre.

    And that integral. The sign of z does not matter.
    """
    dd, integral = d.square(), torch.zeros_like(z)
    for node, weight in _LEGENDRE_6 if z.dtype == torch.float64 else _LEGENDRE_4:
        weight *= 2 * half_bin / math.sqrt(2 * math.pi)
        integral = torch.addcmul(integral, torch.exp(-(node**2) * dd), torch.cosh(node * zd), value=weight)
    return torch.log(integral) + torch.addcmul(log_inv_sigma, z, z, value=-1), integral


def _by_edges(bins: _Bins) -> _Form:
    """P of a bin with a near and a far edge: the tail's form where it begins beyond the mean, else the body's.

    exp(near^2) times the mass beyond an edge is erfcx(near) / 2 for the near one, and (1 + e) erfcx(far) / 2 for the
    far one, which both forms need.
    """
    near = bins.near
    beyond = torch.special.erfcx((bins.z + bins.d).abs())
    beyond = torch.addcmul(beyond, beyond, bins.e)
    tail = near >= 0
    half = 0.5 * torch.add(torch.special.erfcx(near.abs()), torch.where(tail, -beyond, beyond))
    exponent = -near.square()
    density = torch.exp(exponent)
    outside = density * half
    log_mass = torch.where(tail, torch.log(half) + exponent, torch.log1p(-outside))
    return _Form(log_mass, density.masked_fill(tail, 1.0), torch.where(tail, half, 1 - outside))


def _to_edge(outward: Tensor, half_bin: float, rounding: Tensor | None) -> Tensor:
    """outward - half_bin, near an edge a small difference of large numbers, to be divided by a tiny sigma."""
    high = _round_to_24_bits(half_bin)
    if rounding is None:
        return (outward - high) - (half_bin - high)
    return (outward - high) + (rounding - (half_bin - high))


def _round_to_24_bits(a: float) -> float:
    """The part of `a` that float32 holds exactly (Veltkamp's splitting)."""
    c = a * (2**29 + 1)
    return c - (c - a)
