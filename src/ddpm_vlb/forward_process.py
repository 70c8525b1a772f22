r"""The forward process q, which turns data x_0 into noise over T steps, and its posterior, as distributions.

With alphabar_t = prod_{i<=t} (1 - beta_i), alphabar_0 = 1, and for any two steps s < t alpha_{t|s} = alphabar_t /
alphabar_s, beta_{t|s} = 1 - alpha_{t|s}:

1. q(x_t | x_0) = N(sqrt(alphabar_t) x_0, (1 - alphabar_t) I)
2. q(x_t | x_s) = N(sqrt(alpha_{t|s}) x_s, beta_{t|s} I)
3. q(x_s | x_t, x_0) = N(c0 x_0 + ct x_t, betatilde I), c0 = sqrt(alphabar_s) beta_{t|s} / (1 - alphabar_t),
   ct = sqrt(alpha_{t|s}) (1 - alphabar_s) / (1 - alphabar_t),
   betatilde = beta_{t|s} (1 - alphabar_s) / (1 - alphabar_t)

4. DDIM's posterior, eta in [0, 1]: lambda^2 = eta^2 betatilde, ct = sqrt((1 - alphabar_s - lambda^2) /
   (1 - alphabar_t)), c0 = sqrt(alphabar_s) - sqrt(alphabar_t) ct; the marginals stay, and eta = 1 is equation 3

Sources: Ho et al. 2020 (DDPM), eq. 2, 4, 6, 7; Kingma et al. 2021 (VDM), appendix A, for any s < t; Song et al. 2021
(DDIM), eq. 7 and 16. In code `t` is 0-based: code t = paper t - 1, and code s = -1 stands for the data x_0.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from .devices import send
from .distributions import DiagonalGaussian, ordinary_tensors, promote_half
from .schedules import check_betas


class Diffused(NamedTuple):
    """Data, its noised version and how it was noised: what a loss needs beside the network's output.

    `ForwardProcess.diffuse` makes it. The four belong together, x_t = sqrt(alphabar_t) x_0 + sqrt(1 - alphabar_t)
    noise, which the losses use to compare the output with its target instead of two estimates of x_0.

    x_0: data (B, C, *). x_t: noised data, the network's input. t: chain indices (B,). noise: epsilon (B, C, *).
    """

    x_0: Tensor
    x_t: Tensor
    t: Tensor
    noise: Tensor


def gather(table: Tensor, t: Tensor, x: Tensor) -> Tensor:
    """Look the coefficients of the steps `t` up in `table` and shape them to multiply `x`.

    Args:
        table: one coefficient for each step, (T,), or several, (T, K).
        t: chain indices, (B,) or a single one, of an integer dtype, on any device.
        x: the tensor (B, C, *) that the coefficients are for; gives their dtype (half becomes float32).

    Raises:
        TypeError: `t` is not of an integer dtype (a boolean or uint8 tensor would select, not index).
        IndexError: `t` leaves the chain (checked on the CPU; a GPU would have to wait for the check).
        ValueError: `x` is on another device than `table`.
    """
    if x.device != table.device:
        raise ValueError(
            f"The process must live where the data does, but is on {table.device} and the data on {x.device}. Move "
            f"it: `process.to({str(x.device)!r})`."
        )
    if t.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"`t` must be an integer tensor of chain indices (torch.int64), but got {t.dtype}.")
    check_timesteps(t, len(table))
    values = table[send(t, table.device)].to(torch.promote_types(x.dtype, torch.float32))
    return values.reshape(values.shape + (1,) * (x.ndim - t.ndim))


def check_timesteps(t: Tensor, num_steps: int) -> None:
    """Refuse chain indices outside 0 .. num_steps - 1, where that costs nothing: not on a GPU, not while compiling.

    Args:
        t: chain indices.
        num_steps: T, the length of the chain.

    Raises:
        IndexError: an index is negative (it would silently count from the end) or not below T.
    """
    if torch.compiler.is_compiling() or t.device.type != "cpu" or t.numel() == 0:
        return
    low, high = (int(end) for end in t.aminmax())
    if low < 0 or high >= num_steps:
        raise IndexError(f"`t` must lie in 0 .. {num_steps - 1}, but it reaches from {low} to {high}.")


def timesteps_beside(x: Tensor, t: Tensor, num_steps: int) -> Tensor:
    """`t` on the device of `x`, as diffusers' `add_noise` moves it; checked before, where that costs nothing.

    Args:
        x: data or a table.
        t: chain indices.
        num_steps: T, the length of the chain.

    Raises:
        IndexError: as `check_timesteps`.
    """
    if t.device == x.device:
        return t
    check_timesteps(t, num_steps)
    return send(t, x.device)


def check_floating(x_0: Tensor, noise: Tensor) -> None:
    """Refuse integers, which would be noised as they are, or wrap around.

    Args:
        x_0: data.
        noise: epsilon.

    Raises:
        TypeError: one of them is not of a floating point dtype.
    """
    if not (x_0.is_floating_point() and noise.is_floating_point()):
        raise TypeError(
            f"`x_0` and `noise` must be floating point tensors, but got {x_0.dtype} and {noise.dtype}. Scale integer "
            "levels 0 .. n - 1 to [-1, 1]: `x_0 = image * 2 / (n - 1) - 1`."
        )


class Posterior(NamedTuple):
    """c0, ct and the variance of q(x_s | x_t, x_0), equations 3 and 4."""

    x_0: Tensor
    x_t: Tensor
    variance: Tensor


def posterior_coefficients(log_abar_t: Tensor, log_abar_s: Tensor, eta: float = 1.0) -> Posterior:
    """The coefficients of q(x_s | x_t, x_0) between any two noise levels, in float64.

    Args:
        log_abar_t: log alphabar at t, float64, any shape.
        log_abar_s: log alphabar at s < t, broadcastable to it; 0 is the data.
        eta: DDIM's, in [0, 1].

    Source: Kingma et al. 2021, appendix A.2; Song et al. 2021, eq. 7.
    """
    log_alpha = log_abar_t - log_abar_s
    beta, noise_s, noise_t = (-torch.expm1(value) for value in (log_alpha, log_abar_s, log_abar_t))
    variance = beta * noise_s / noise_t
    root_s = (0.5 * log_abar_s).exp()
    if eta == 1:  # without the differences below
        return Posterior(root_s * beta / noise_t, (0.5 * log_alpha).exp() * noise_s / noise_t, variance)
    variance = eta**2 * variance
    coef_x_t = ((noise_s - variance) / noise_t).sqrt()
    return Posterior(root_s - (0.5 * log_abar_t).exp() * coef_x_t, coef_x_t, variance)


@dataclass(frozen=True, eq=False)
class ForwardProcess:
    """The forward process q of a chain of T steps, as tables and as distributions; make it with `from_betas`.

    Tables have shape (T,). They are made in float64 from log alphabar, and cast only when they are finished.

    Args:
        timesteps: what the network is told at each step, int64. Differs from the chain index after `respace`.
        log_alphas_cumprod: log alphabar_t, always float64 on the CPU: the root from which every other table is made.
        betas: beta_{t|t-1} of this chain.
        alphas_cumprod: alphabar_t.
        sqrt_alphas_cumprod: sqrt(alphabar_t), the mean coefficient of equation 1.
        sqrt_one_minus_alphas_cumprod: sqrt(1 - alphabar_t), its standard deviation.
        log_one_minus_alphas_cumprod: log(1 - alphabar_t), its log variance.
        sqrt_recip_alphas_cumprod: 1 / sqrt(alphabar_t), infinite where alphabar_t = 0.
        sqrt_recipm1_alphas_cumprod: sqrt(1 / alphabar_t - 1), likewise.
        posterior_mean_coef_x_0: c0 of equation 3.
        posterior_mean_coef_x_t: ct of equation 3.
        posterior_variance: betatilde_t; 0 at the first step.
        posterior_log_variance: its logarithm; the first step, where it would be -inf, borrows the second's, and a
            chain of one step takes log beta.
        log_betas: log beta_t.
        log_variance_range: log beta_t - posterior_log_variance, the span of a "learned_range" variance.
    """

    timesteps: Tensor
    log_alphas_cumprod: Tensor
    betas: Tensor
    alphas_cumprod: Tensor
    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor
    log_one_minus_alphas_cumprod: Tensor
    sqrt_recip_alphas_cumprod: Tensor
    sqrt_recipm1_alphas_cumprod: Tensor
    posterior_mean_coef_x_0: Tensor
    posterior_mean_coef_x_t: Tensor
    posterior_variance: Tensor
    posterior_log_variance: Tensor
    log_betas: Tensor
    log_variance_range: Tensor

    @classmethod
    @ordinary_tensors()
    def from_betas(cls, betas: Sequence[float] | Tensor, timesteps: Sequence[int] | Tensor | None = None):
        """Make the process of a schedule, in float64 on the CPU.

        Args:
            betas: beta_1 .. beta_T, each in (0, 1]; a beta of 1 only as the last.
            timesteps: what the network is told at each of the T steps, ascending; 0 .. T - 1 when None.

        Raises:
            ValueError: `betas` are no schedule, or `timesteps` do not match them.

        Source: Ho et al. 2020, eq. 4 and 7.
        """
        betas = check_betas(betas)
        timesteps = torch.arange(len(betas)) if timesteps is None else torch.as_tensor(timesteps, device="cpu")
        if timesteps.shape != betas.shape or timesteps.is_floating_point():
            raise ValueError(
                f"`timesteps` must hold one integer for each of the {len(betas)} betas, but got "
                f"{timesteps.dtype} of shape {tuple(timesteps.shape)}."
            )
        return cls._from_root(timesteps.long(), torch.cumsum(torch.log1p(-betas), 0), betas)

    @classmethod
    def _from_root(cls, timesteps: Tensor, log_abar: Tensor, betas: Tensor) -> "ForwardProcess":
        previous = torch.cat([log_abar.new_zeros(1), log_abar[:-1]])
        noise, previous_noise = 0.0 - torch.expm1(log_abar), 0.0 - torch.expm1(previous)  # 0 - 0 is not -0
        posterior_variance = betas * previous_noise / noise
        borrowed = torch.cat([(posterior_variance[1:2] if len(betas) > 1 else betas), posterior_variance[1:]])
        return cls(
            timesteps=timesteps,
            log_alphas_cumprod=log_abar,
            betas=betas,
            alphas_cumprod=log_abar.exp(),
            sqrt_alphas_cumprod=(0.5 * log_abar).exp(),
            sqrt_one_minus_alphas_cumprod=noise.sqrt(),
            log_one_minus_alphas_cumprod=noise.log(),
            sqrt_recip_alphas_cumprod=(-0.5 * log_abar).exp(),
            sqrt_recipm1_alphas_cumprod=torch.expm1(-log_abar).sqrt(),
            posterior_mean_coef_x_0=(0.5 * previous).exp() * betas / noise,
            posterior_mean_coef_x_t=(1 - betas).sqrt() * previous_noise / noise,
            posterior_variance=posterior_variance,
            posterior_log_variance=borrowed.log(),
            log_betas=betas.log(),
            log_variance_range=(betas / borrowed).log(),
        )

    def __len__(self) -> int:
        return len(self.betas)

    @ordinary_tensors()
    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "ForwardProcess":
        """The same process with its finished tables cast to `dtype`, then moved to `device`.

        Args:
            device: where the tables shall live; None leaves them.
            dtype: torch.float32 or torch.float64; None leaves it.

        Raises:
            ValueError: `dtype` is neither: half precision would lose the first steps' noise altogether.
        """
        if dtype not in (None, torch.float32, torch.float64):
            raise ValueError(f"`dtype` must be torch.float32 or torch.float64, but got {dtype}.")
        tables = {}
        for field in fields(self):
            table = getattr(self, field.name)
            if field.name == "log_alphas_cumprod":  # float64, which MPS has not and a GPU is slow at
                tables[field.name] = table
                continue
            if table.is_floating_point():
                table = table.to(dtype=dtype)
            tables[field.name] = table if device is None else send(table, device)
        return ForwardProcess(**tables)

    @ordinary_tensors()
    def respace(self, indices: Sequence[int] | Tensor) -> "ForwardProcess":
        """The chain that visits only some of this chain's steps, with the same marginals there.

        The network is still told this chain's `timesteps`; the chain index `t` runs from 0 again.

        Args:
            indices: the chain indices to keep, strictly ascending in 0 .. T - 1. Keep T - 1, the last: without it the
                prior term of the bound is paid at a step that still holds signal.

        Raises:
            ValueError: no indices, or not strictly ascending integers in the range.

        Source: Nichol & Dhariwal 2021, section 4.
        """
        chosen = torch.as_tensor(indices, device="cpu")
        if chosen.ndim != 1 or len(chosen) == 0 or chosen.is_floating_point() or chosen.dtype == torch.bool:
            raise ValueError("`indices` must be a non-empty list of integers, the steps of the chain to keep.")
        if chosen[0] < 0 or chosen[-1] >= len(self) or (chosen[1:] <= chosen[:-1]).any():
            raise ValueError(
                f"`indices` must be strictly ascending within 0 .. {len(self) - 1}, but got {chosen.tolist()[:20]}."
            )
        log_abar = self.log_alphas_cumprod[chosen]
        betas = -torch.expm1(log_abar - torch.cat([log_abar.new_zeros(1), log_abar[:-1]]))
        respaced = ForwardProcess._from_root(self.timesteps.cpu()[chosen], log_abar, betas)
        return respaced.to(self.betas.device, self.betas.dtype)

    def q_marginal(self, x_0: Tensor, t: Tensor) -> DiagonalGaussian:
        """q(x_t | x_0), equation 1.

        Args:
            x_0: data (B, C, *).
            t: chain indices (B,), 0 .. T - 1.

        Source: Ho et al. 2020, eq. 4.
        """
        x_0 = promote_half(x_0)
        mean = gather(self.sqrt_alphas_cumprod, t, x_0) * x_0
        return DiagonalGaussian(mean, gather(self.log_one_minus_alphas_cumprod, t, x_0).expand_as(mean))

    def q_transition(self, x_s: Tensor, t: Tensor, s: Tensor | None = None) -> DiagonalGaussian:
        """q(x_t | x_s), equation 2; without `s` the chain's own step q(x_t | x_{t-1}).

        Args:
            x_s: the sample at step s (B, C, *).
            t: chain indices (B,), 0 .. T - 1.
            s: earlier chain indices (B,), -1 .. t - 1, where -1 is the data; None means t - 1.

        Source: Ho et al. 2020, eq. 2; Kingma et al. 2021, appendix A.1.
        """
        x_s = promote_half(x_s)
        log_alpha, log_beta = self._transition(t, s)
        mean = _like(torch.exp(0.5 * log_alpha), x_s) * x_s
        return DiagonalGaussian(mean, _like(log_beta, x_s).expand_as(mean))

    def q_posterior(self, x_0: Tensor, x_t: Tensor, t: Tensor, s: Tensor | None = None) -> DiagonalGaussian:
        """q(x_s | x_t, x_0), equation 3; without `s` the chain's own step q(x_{t-1} | x_t, x_0).

        At the first step the true posterior is the point x_0. Its log variance is then borrowed from the chain's
        second step (without `s`; a chain of one step takes its beta), or taken as log beta_{t|s} (with s = -1).

        Args:
            x_0: data (B, C, *).
            x_t: noised data, same shape.
            t: chain indices (B,), 0 .. T - 1.
            s: earlier chain indices (B,), -1 .. t - 1, where -1 is the data; None means t - 1.

        Source: Ho et al. 2020, eq. 6 and 7; Kingma et al. 2021, appendix A.2.
        """
        x_0, x_t = promote_half(x_0), promote_half(x_t)
        if s is None:
            coef_x_0 = gather(self.posterior_mean_coef_x_0, t, x_t)
            coef_x_t = gather(self.posterior_mean_coef_x_t, t, x_t)
            log_variance = gather(self.posterior_log_variance, t, x_t)
        else:
            _, log_beta = self._transition(t, s)
            posterior = posterior_coefficients(self._log_abar(t), self._log_abar(s))
            coef_x_0, coef_x_t = _like(posterior.x_0, x_t), _like(posterior.x_t, x_t)
            point = posterior.variance == 0
            log_variance = _like(torch.where(point, log_beta, posterior.variance.log()), x_t)
        mean = coef_x_0 * x_0 + coef_x_t * x_t
        return DiagonalGaussian(mean, log_variance.expand_as(mean))

    def diffuse(self, x_0: Tensor, t: Tensor, noise: Tensor) -> Diffused:
        """Noise the data: x_t = sqrt(alphabar_t) x_0 + sqrt(1 - alphabar_t) noise, a sample of equation 1.

        Args:
            x_0: data (B, C, *), images scaled to [-1, 1], not [0, 1] or 0 .. 255; half precision is promoted to
                float32, in which the first steps' noise survives.
            t: chain indices (B,), 0 .. T - 1, of an integer dtype; moved to the device of `x_0`.
            noise: epsilon ~ N(0, I), the shape of `x_0`.

        Raises:
            TypeError: `t` is not of an integer dtype, or `x_0` or `noise` of one.
            IndexError: `t` leaves the chain (checked on the CPU; a GPU would have to wait for the check).
            ValueError: the shapes do not match.

        Source: Ho et al. 2020, eq. 4.
        """
        if noise.shape != x_0.shape or t.shape != x_0.shape[:1]:
            raise ValueError(
                f"`x_0`, `noise` and `t` must have the shapes (B, C, *), (B, C, *) and (B,), but got "
                f"{tuple(x_0.shape)}, {tuple(noise.shape)} and {tuple(t.shape)}."
            )
        check_floating(x_0, noise)
        t = timesteps_beside(x_0, t, len(self))
        x_0, noise = promote_half(x_0), promote_half(noise)
        signal = gather(self.sqrt_alphas_cumprod, t, x_0)
        sigma = gather(self.sqrt_one_minus_alphas_cumprod, t, x_0)
        x_t = torch.addcmul(signal * x_0, sigma, noise)
        return Diffused(x_0, x_t, t, noise)

    def _log_abar(self, t: Tensor) -> Tensor:
        """log alphabar at code steps t >= -1, float64 on the CPU; it waits for a `t` of a GPU."""
        root = self.log_alphas_cumprod
        return torch.cat([root.new_zeros(1), root])[t.to(root.device) + 1]

    def _transition(self, t: Tensor, s: Tensor | None) -> tuple[Tensor, Tensor]:
        """log alpha_{t|s} and log beta_{t|s}, float64."""
        s = t - 1 if s is None else s
        check_timesteps(t, len(self))
        if not torch.compiler.is_compiling() and t.device.type == "cpu" and bool(((s < -1) | (s >= t)).any()):
            raise IndexError(f"`s` must lie in -1 .. t - 1, but got s={s.tolist()} for t={t.tolist()}.")
        log_alpha = self._log_abar(t) - self._log_abar(s)
        return log_alpha, torch.log(-torch.expm1(log_alpha))


def _like(coefficient: Tensor, x: Tensor) -> Tensor:
    """A float64 coefficient (B,) cast once, moved and shaped to multiply `x`."""
    return coefficient.to(x.dtype).to(x.device).reshape(coefficient.shape + (1,) * (x.ndim - coefficient.ndim))
