r"""The reverse process p: what the network says about x_{t-1}, as a distribution.

The network's mean output o is epsilon, x_0 or v; each is an affine map of x_0 given x_t:

1. x_0_hat = a_t x_t + b_t o :  epsilon: a = 1/sqrt(abar), b = -sqrt(1/abar - 1);  sample: a = 0, b = 1;
   v_prediction: a = sqrt(abar), b = -sqrt(1 - abar)
2. p(x_{t-1} | x_t) = N(c0 x_0_hat + ct x_t, sigma_t^2), the posterior q(x_{t-1} | x_t, x_0) with x_0_hat for x_0
3. log sigma_t^2 = log betatilde_t + u :  fixed_small: u = 0;  fixed_large: u = log beta_t/betatilde_t;
   learned_range: u = (v + 1)/2 log beta_t/betatilde_t;  learned: log sigma_t^2 = v, the variance output itself
4. where the expected squared error m_t of x_0_hat is known, over all dimensions or of each, the optimal variance is
   sigma_t^2 = betatilde_t + c0^2 m_t
5. with DDIM's eta < 1, c0, ct and betatilde_t are those of its posterior

Sources: Ho et al. 2020, eq. 7 and 11; Nichol & Dhariwal 2021, eq. 15 (learned_range); Salimans & Ho 2022, appendix D
(v_prediction); Saharia et al. 2022, section 2.3 (dynamic thresholding); Bao et al. 2022a (Analytic-DPM), theorem 1,
and 2022b, section 4 (equation 4); Song et al. 2021 (DDIM), eq. 7.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .distributions import DiagonalGaussian, ordinary_tensors, promote_half
from .forward_process import Diffused, ForwardProcess, gather
from .reverse_tables import Coefficients, mean_tables, small_table, variance_tables, with_decoder

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
"""What the mean half of a network's output can be."""
VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range")
"""Where log sigma^2 comes from; `_log` changes nothing."""


class Prediction(NamedTuple):
    """p(x_{t-1} | x_t), and the network's estimate of the data x_0 (B, C, *) behind its mean."""

    p: DiagonalGaussian
    x_0: Tensor


# float32 tells no more levels of [-1, 1] apart.
MAX_LEVELS = 2**24
# Below it 1 / sqrt(alphas_cumprod) is infinite in float32.
MIN_LOG_SIGNAL = -176.0


@dataclass(frozen=True, eq=False)
class ReverseProcess:
    """The reverse process p of a chain: turns a network's output into p(x_{t-1} | x_t).

    Args:
        forward: the process q to reverse; its tables give p's.
        prediction_type: what the mean output means, "epsilon", "sample" (x_0) or "v_prediction".
        variance_type: "fixed_small" (betatilde_t), "fixed_large" (beta_t; the first step takes the second's betatilde,
            as fixed_small does), "learned" (the second half of the output channels is log sigma^2) or "learned_range"
            (it is v, interpolating between the logarithms of the two fixed ones; -1 is betatilde_t, 1 is beta_t).
            Stock's "fixed_small_log" and "fixed_large_log" mean the same as the names without `_log`.
        clip_sample: clamp x_0_hat to +- `clip_sample_range`. Training losses never clip.
        levels: number of levels of the data on [-1, 1] (256 for 8-bit images); None for continuous data, whose first
            step is then scored by its density.
        clip_sample_range: the clamp, positive.
        thresholding: clamp each image at a quantile of |x_0_hat| and rescale it to +- 1, instead of clipping.
        dynamic_thresholding_ratio: that quantile, in [0, 1].
        sample_max_value: the largest value at which thresholding clamps, positive.
        x_0_mse: m_t of equation 4 at each step, positive, (T,) or, for each dimension, (T, C, *). Its variance takes
            the place of `variance_type`'s, which then only says what the output's channels are. At the first step,
            where betatilde_t is 0, it is m_t.
        eta: of DDIM, in [0, 1]; below 1 a fixed or learned variance is DDIM's eta^2 betatilde_t. 0 draws no noise, and
            has no bound.
        decoder_log_variance: log sigma^2 of the first step in place of the above, a number or (C, *).
        decoder_slope: the variance output times this is added to it.

    Raises:
        ValueError: an unknown name, an impossible number, a wrong shape, or epsilon-prediction on a chain with
            zero-terminal SNR.

    Source: the module's list.
    """

    forward: ForwardProcess
    prediction_type: str = "epsilon"
    variance_type: str = "fixed_small"
    clip_sample: bool = True
    levels: int | None = 256
    clip_sample_range: float = 1.0
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    x_0_mse: Tensor | None = None
    eta: float = 1.0
    decoder_log_variance: float | Tensor | None = None
    decoder_slope: float = 0.0
    _table: Tensor = field(init=False, repr=False)
    _log_variance: Tensor | None = field(init=False, repr=False, default=None)
    _rows: dict[tuple[int, torch.dtype], Coefficients] = field(init=False, repr=False, default_factory=dict)

    @ordinary_tensors()
    def __post_init__(self) -> None:
        for name, choices in (("prediction_type", PREDICTION_TYPES), ("variance_type", VARIANCE_TYPES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {list(choices)}, but got {getattr(self, name)!r:.80}.")
        if self.levels is not None and (type(self.levels) is not int or not 2 <= self.levels <= MAX_LEVELS):
            raise ValueError(
                f"`levels` must be an integer of at least 2, or None for continuous data, and at most {MAX_LEVELS}, "
                f"but got {self.levels!r:.80}."
            )
        if self.clip_sample and not self.clip_sample_range > 0:
            raise ValueError(f"`clip_sample_range` must be positive, but got {self.clip_sample_range!r:.80}.")
        if self.thresholding and not (0 <= self.dynamic_thresholding_ratio <= 1 and self.sample_max_value > 0):
            raise ValueError(
                "`dynamic_thresholding_ratio` must lie in [0, 1] and `sample_max_value` be positive, but got "
                f"{self.dynamic_thresholding_ratio!r} and {self.sample_max_value!r}."
            )
        if self.prediction_type == "epsilon" and bool(self.forward.log_alphas_cumprod[-1] < MIN_LOG_SIGNAL):
            raise ValueError(
                "`prediction_type='epsilon'` cannot work with zero-terminal SNR: at the last step x_t is the noise "
                "itself and says nothing of x_0. Use `prediction_type='v_prediction'` or 'sample'."
            )
        if not 0 <= self.eta <= 1:
            raise ValueError(f"`eta` must lie in [0, 1], from DDIM to DDPM, but got {self.eta!r:.80}.")
        self._check_variances()
        means = mean_tables(self.forward, self.prediction_type, self.eta)
        small = small_table(self.forward, self.eta)
        log_variance, ratio, slope = variance_tables(self.forward, self.variance_type, self.x_0_mse, self.eta)
        if self.decoder_log_variance is not None:
            log_variance = with_decoder(log_variance, self.decoder_log_variance)
            slope = torch.cat([torch.full_like(slope[:1], self.decoder_slope), slope[1:]])
        if log_variance.ndim > 1:  # the table's rows are scalars
            object.__setattr__(self, "_log_variance", log_variance)
            log_variance = torch.zeros_like(slope)
        object.__setattr__(self, "_table", torch.stack([*means, small, log_variance, ratio, slope], dim=1))

    def _check_variances(self) -> None:
        steps, m = len(self.forward), self.x_0_mse
        if m is not None:
            if not isinstance(m, Tensor) or m.ndim == 0 or len(m) != steps or not m.is_floating_point():
                raise ValueError(
                    f"`x_0_mse` must be a floating point tensor with a row for each of the {steps} steps, (T,) or "
                    f"(T, C, *), but got {tuple(m.shape) if isinstance(m, Tensor) else m!r:.80}."
                )
            good = (m.isfinite() & (m > 0)).reshape(steps, -1).all(1)
            if not bool(good.all()):
                raise ValueError(
                    f"`x_0_mse` must be positive and finite, but is not at step {int(good.int().argmin())}."
                )
        first = self.decoder_log_variance
        if first is not None and not bool(torch.as_tensor(first).isfinite().all()):
            raise ValueError("`decoder_log_variance` must be finite, but is not.")

    @property
    def learns_variance(self) -> bool:
        """Whether the network must put out 2 C channels: the mean half and the variance half."""
        return self.variance_type in ("learned", "learned_range")

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "ReverseProcess":
        """The same process on the tables of `forward.to(device, dtype)`; arguments and errors as there."""
        return replace(self, forward=self.forward.to(device, dtype))

    @ordinary_tensors()
    def respace(self, indices: Sequence[int] | Tensor, decoder_shift: float | None = None) -> "ReverseProcess":
        """The reverse process of the shorter chain `forward.respace(indices)`.

        Args:
            indices: the chain indices to keep, as there.
            decoder_shift: give the first step the log variance that this chain has there, plus this, instead of the
                shorter chain's own.

        Raises:
            ValueError: as `forward.respace`.
        """
        forward = self.forward.respace(indices)
        chosen = torch.as_tensor(indices, device="cpu")
        m = None if self.x_0_mse is None else self.x_0_mse[chosen.to(self.x_0_mse.device)]
        first, slope = self.decoder_log_variance, self.decoder_slope
        if decoder_shift is not None:
            row = Coefficients(*self._table[int(chosen[0])].unbind())
            own = row.log_variance_offset if self._log_variance is None else self._log_variance[int(chosen[0])]
            first, slope = own.cpu().double() + decoder_shift, float(row.variance_slope)
        elif int(chosen[0]) > 0:
            first, slope = _same_kind(first, self.forward, forward), 0.0
        return replace(self, forward=forward, x_0_mse=m, decoder_log_variance=first, decoder_slope=slope)

    def coefficients(self, t: Tensor | int, x_t: Tensor) -> Coefficients:
        """The coefficients at the steps `t`, in one look-up.

        Args:
            t: chain indices (B,), or one Python int for the whole batch.
            x_t: the tensor (B, C, *) that they are for.

        Raises:
            TypeError, IndexError: as `gather`.
        """
        if isinstance(t, int):
            known = self._rows.get((t, x_t.dtype))
            if known is not None:  # a sampler comes back to the same few steps: eight views each time are slow
                return known
            if not 0 <= t < len(self.forward):
                raise IndexError(f"`t` must lie in 0 .. {len(self.forward) - 1}, but got {t}.")
            with torch.inference_mode(False):
                row = self._table[t].to(torch.promote_types(x_t.dtype, torch.float32))
                made = self._rows[t, x_t.dtype] = self._with_dimensions(Coefficients(*row.unbind()), t, x_t)
            return made
        return self._with_dimensions(Coefficients(*gather(self._table, t, x_t).unbind(t.ndim)), t, x_t)

    def _with_dimensions(self, c: Coefficients, t: Tensor | int, x_t: Tensor) -> Coefficients:
        """The coefficients with what differs between dimensions."""
        if self._log_variance is None:
            return c
        if x_t.shape[1:] != self._log_variance.shape[1:]:
            raise ValueError(
                f"The variances of this process are for data of shape {tuple(self._log_variance.shape[1:])}, but got "
                f"{tuple(x_t.shape[1:])}."
            )
        steps = t if isinstance(t, int) else t.to(self._log_variance.device)
        log_variance = self._log_variance[steps].to(c.posterior_log_variance.dtype)
        return c._replace(log_variance_offset=log_variance, ratio_offset=log_variance - c.posterior_log_variance)

    def split(self, model_output: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor | None]:
        """Split the network's output into its mean half and, where it has one, its variance half, in float32 or more.

        Args:
            model_output: (B, C, *), or (B, 2 C, *) with a learned variance.
            x_t: the network's input (B, C, *).

        Raises:
            TypeError: `model_output` is no tensor (a diffusers model's output without `.sample`).
            ValueError: the output has the wrong number of channels for `variance_type`, or another shape than `x_t`.
        """
        if not isinstance(model_output, Tensor):
            raise TypeError(
                f"`model_output` must be a tensor, but got {type(model_output).__name__}. For a diffusers model pass "
                "`unet(x_t, timesteps).sample`."
            )
        shape, (batch, channels, *others), learned = model_output.shape, x_t.shape, self.learns_variance
        expected = 2 * channels if learned else channels
        if shape != (batch, expected, *others):
            raise ValueError(
                f"`variance_type={self.variance_type!r}` expects a model with {expected} output channels, "
                f"{'twice ' if learned else ''}the {channels} of `x_t` {tuple(x_t.shape)}, but got an output of shape "
                f"{tuple(model_output.shape)}. Build it with `out_channels={expected}`, or choose a "
                f"{'fixed' if learned else 'learned'} variance."
            )
        model_output = promote_half(model_output)
        if not learned:
            return model_output, None
        mean_output, variance_output = model_output.chunk(2, dim=1)
        return mean_output, variance_output

    def predict_x_0(self, mean_output: Tensor, x_t: Tensor, c: Coefficients) -> Tensor:
        """x_0_hat of equation 1, clipped or thresholded as configured.

        Args:
            mean_output: the mean half of the network's output (B, C, *).
            x_t: the network's input (B, C, *).
            c: the coefficients of the steps.
        """
        x_0 = torch.addcmul(c.x_t_to_x_0 * x_t, mean_output, c.output_to_x_0)
        if self.thresholding:
            s = torch.quantile(x_0.detach().flatten(1).abs(), self.dynamic_thresholding_ratio, dim=1)
            s = s.clamp(1.0, self.sample_max_value).reshape(-1, *[1] * (x_0.ndim - 1))
            return torch.clamp(x_0, -s, s) / s
        if self.clip_sample:
            return x_0.clamp_(-self.clip_sample_range, self.clip_sample_range)
        return x_0

    def __call__(self, model_output: Tensor, x_t: Tensor, t: Tensor | int) -> Prediction:
        """p(x_{t-1} | x_t) and x_0_hat from the network's output at (x_t, t).

        Args:
            model_output: (B, C, *), or (B, 2 C, *) with a learned variance.
            x_t: the network's input (B, C, *).
            t: chain indices (B,), or one Python int for the whole batch, 0 .. T - 1.

        Raises:
            ValueError: the output has the wrong number of channels for `variance_type`.
            TypeError: `t` is not of an integer dtype.
        """
        return self.predict(model_output, x_t, self.coefficients(t, x_t))

    def predict(self, model_output: Tensor, x_t: Tensor, c: Coefficients) -> Prediction:
        """The same from the coefficients of the steps.

        Args:
            model_output: (B, C, *), or (B, 2 C, *) with a learned variance.
            x_t: the network's input (B, C, *).
            c: as of `coefficients`.

        Raises:
            ValueError: the output has the wrong number of channels for `variance_type`.
        """
        mean_output, variance_output = self.split(model_output, x_t)
        mean, x_0 = self.predict_mean(mean_output, promote_half(x_t), c)
        log_variance = c.log_variance(variance_output)
        return Prediction(DiagonalGaussian(mean, log_variance.expand_as(mean)), x_0)

    def predict_mean(self, mean_output: Tensor, x_t: Tensor, c: Coefficients) -> tuple[Tensor, Tensor]:
        """The mean of p, of which nothing else is kept, and x_0_hat.

        Args:
            mean_output: as of `predict_x_0`.
            x_t: likewise.
            c: likewise.
        """
        x_0 = self.predict_x_0(mean_output, x_t, c)
        return (c.x_0_to_mean * x_0).addcmul_(x_t, c.x_t_to_mean), x_0

    def target(self, diffused: Diffused) -> Tensor:
        """What the mean output should be: the noise, the data x_0, or v = sqrt(abar) noise - sqrt(1 - abar) x_0.

        Args:
            diffused: the noised data.

        Source: Ho et al. 2020, eq. 14; Salimans & Ho 2022, appendix D.
        """
        if self.prediction_type == "epsilon":
            return diffused.noise
        if self.prediction_type == "sample":
            return diffused.x_0
        signal = gather(self.forward.sqrt_alphas_cumprod, diffused.t, diffused.x_t)
        sigma = gather(self.forward.sqrt_one_minus_alphas_cumprod, diffused.t, diffused.x_t)
        return signal * diffused.noise - sigma * diffused.x_0


def _same_kind(first: float | Tensor | None, old: ForwardProcess, new: ForwardProcess) -> float | None:
    """The decoder's own log variance where a chain begins later: log r_1^2 alone has a counterpart there."""
    was, log_r = (float(torch.expm1(-chain.log_alphas_cumprod[0]).log()) for chain in (old, new))
    return log_r if isinstance(first, float) and math.isclose(first, was) and math.isfinite(log_r) else None
