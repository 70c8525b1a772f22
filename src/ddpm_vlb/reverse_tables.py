"""The tables of a reverse process: the coefficients of its means and log variances at every step.

The equations are those of reverse_process, which has their sources.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .devices import send
from .forward_process import ForwardProcess, Posterior, posterior_coefficients


class Coefficients(NamedTuple):
    """The coefficients of equations 1 to 3 at some steps, shaped to multiply x_t.

    With the variance output v (0 if there is none), log sigma_t^2 = log_variance_offset + variance_slope v and
    u = ratio_offset + variance_slope v.
    """

    x_t_to_x_0: Tensor
    output_to_x_0: Tensor
    x_0_to_mean: Tensor
    x_t_to_mean: Tensor
    posterior_log_variance: Tensor
    log_variance_offset: Tensor
    ratio_offset: Tensor
    variance_slope: Tensor

    def log_variance(self, variance_output: Tensor | None) -> Tensor:
        """log sigma_t^2, which may be written into where there is a variance output.

        Args:
            variance_output: the variance half of the network's output, if there is one.
        """
        if variance_output is None:
            return self.log_variance_offset
        # In two passes: a single one over one tensor and two numbers is slow on the CPU.
        return (variance_output * self.variance_slope).add_(self.log_variance_offset)


def mean_tables(q: ForwardProcess, prediction_type: str, eta: float) -> list[Tensor]:
    """The first four tables of `Coefficients`, from the forward process's finished ones.

    Args:
        q: the process to reverse.
        prediction_type: what the mean output means.
        eta: of DDIM, in [0, 1].
    """
    zero, one = torch.zeros_like(q.betas), torch.ones_like(q.betas)
    x_0 = {
        "epsilon": (q.sqrt_recip_alphas_cumprod, -q.sqrt_recipm1_alphas_cumprod),
        "sample": (zero, one),
        "v_prediction": (q.sqrt_alphas_cumprod, -q.sqrt_one_minus_alphas_cumprod),
    }[prediction_type]
    if eta < 1:
        posterior = _posterior(q, eta)
        return [*x_0, _cast(posterior.x_0, q.betas), _cast(posterior.x_t, q.betas)]
    return [*x_0, q.posterior_mean_coef_x_0, q.posterior_mean_coef_x_t]


def small_table(q: ForwardProcess, eta: float) -> Tensor:
    """log betatilde_t, of DDIM's posterior with its eta; the first step's stays the borrowed one.

    Args:
        q: the process to reverse.
        eta: of DDIM, in [0, 1].
    """
    small = q.posterior_log_variance
    if eta == 1:
        return small
    scaled = small + (2 * math.log(eta) if eta > 0 else -math.inf)
    return torch.cat([small[:1], scaled[1:]])


def variance_tables(
    q: ForwardProcess, variance_type: str, x_0_mse: Tensor | None, eta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """log sigma^2 and u at v = 0, and their slope in v; log sigma^2 is (T, C, *) where the errors are.

    Args:
        q: the process to reverse.
        variance_type: where log sigma^2 comes from.
        x_0_mse: m_t of equation 4, in its place.
        eta: of DDIM, in [0, 1].
    """
    zero, one, small = torch.zeros_like(q.betas), torch.ones_like(q.betas), small_table(q, eta)
    if x_0_mse is not None and eta > 0:
        posterior, m = _posterior(q, eta), x_0_mse.cpu().double()
        beside = (-1, *[1] * (m.ndim - 1))
        log_variance = (posterior.variance.reshape(beside) + posterior.x_0.square().reshape(beside) * m).log()
        log_variance = _cast(log_variance, q.betas)
        return log_variance, zero if m.ndim > 1 else log_variance - small, zero
    span = q.log_variance_range
    # The first step of fixed_large borrows the second's betatilde as fixed_small does, which is u = 0.
    large = torch.cat([zero[:1], span[1:]])
    log_variance, ratio, slope = {
        "fixed_small": (small, zero, zero),
        "fixed_large": (small + large, large, zero),
        "learned": (zero, -small, one),
        "learned_range": (small + 0.5 * span, 0.5 * span, 0.5 * span),
    }[variance_type.removesuffix("_log")]
    if eta == 1:
        return log_variance, ratio, slope
    return torch.cat([log_variance[:1], small[1:]]), zero, torch.cat([slope[:1], zero[1:]])


def with_decoder(log_variance: Tensor, decoder: float | Tensor) -> Tensor:
    """The log variances with the decoder's own in the first step.

    Args:
        log_variance: of the steps, (T,) or (T, C, *).
        decoder: of the first, a number or (C, *).
    """
    first = _cast(torch.as_tensor(decoder), log_variance)
    if first.ndim and log_variance.ndim == 1:
        log_variance = log_variance.reshape(-1, *[1] * first.ndim).expand(-1, *first.shape)
    return torch.cat([first.expand(log_variance.shape[1:])[None], log_variance[1:]])


def _posterior(q: ForwardProcess, eta: float) -> Posterior:
    """Equation 3 of the forward process with DDIM's eta, in float64 from the root."""
    root = q.log_alphas_cumprod.cpu()
    return posterior_coefficients(root, torch.cat([root.new_zeros(1), root[:-1]]), eta)


def _cast(value: Tensor, like: Tensor) -> Tensor:
    """The value in the other's precision, cast before it is moved: MPS has no float64."""
    return send(value.to(like.dtype), like.device)
