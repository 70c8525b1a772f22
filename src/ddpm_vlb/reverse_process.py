r"""The reverse process p: what the network says about x_{t-1}, as a distribution.

The network's mean output o is epsilon, x_0 or v; each is an affine map of x_0 given x_t:

1. x_0_hat = a_t x_t + b_t o :  epsilon: a = 1/sqrt(abar), b = -sqrt(1/abar - 1);  sample: a = 0, b = 1;
   v_prediction: a = sqrt(abar), b = -sqrt(1 - abar)
2. p(x_{t-1} | x_t) = N(c0 x_0_hat + ct x_t, sigma_t^2), the posterior q(x_{t-1} | x_t, x_0) with x_0_hat for x_0
3. log sigma_t^2 = log betatilde_t + u :  fixed_small: u = 0;  fixed_large: u = log beta_t/betatilde_t;
   learned_range: u = (v + 1)/2 log beta_t/betatilde_t;  learned: log sigma_t^2 = v, the variance output itself

Sources: Ho et al. 2020, eq. 7 and 11; Nichol & Dhariwal 2021, eq. 15 (learned_range); Salimans & Ho 2022, appendix D
(v_prediction); Saharia et al. 2022, section 2.3 (dynamic thresholding).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .distributions import DiagonalGaussian, promote_half
from .forward_process import Diffused, ForwardProcess, gather

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range")


class Prediction(NamedTuple):
    """p(x_{t-1} | x_t), and the network's estimate of the data x_0 (B, C, *) behind its mean."""

    p: DiagonalGaussian
    x_0: Tensor


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
            as fixed_small does), "learned" (the second half of the output
            channels is log sigma^2) or "learned_range" (it is v, interpolating between the logarithms of the two
            fixed ones; -1 is betatilde_t, 1 is beta_t). Stock's "fixed_small_log" and "fixed_large_log" mean the same
            as the names without `_log`.
        clip_sample: clamp x_0_hat to +- `clip_sample_range`. Training losses never clip.
        levels: number of levels of the data on [-1, 1] (256 for 8-bit images); None for continuous data, whose first
            step is then scored by its density.
        clip_sample_range: the clamp, positive.
        thresholding: clamp each image at a quantile of |x_0_hat| and rescale it to +- 1, instead of clipping.
        dynamic_thresholding_ratio: that quantile, in [0, 1].
        sample_max_value: the largest value at which thresholding clamps, positive.

    Raises:
        ValueError: an unknown name, an impossible number, or epsilon-prediction on a chain with zero-terminal SNR.

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
    _table: Tensor = field(init=False, repr=False)
    _rows: dict[tuple[int, torch.dtype], Coefficients] = field(init=False, repr=False, default_factory=dict)

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
        object.__setattr__(self, "_table", torch.stack(self._columns(), dim=1))

    def _columns(self) -> list[Tensor]:
        """One table for each field of `Coefficients`, from the forward process's finished tables."""
        q = self.forward
        zero, one = torch.zeros_like(q.betas), torch.ones_like(q.betas)
        x_0 = {
            "epsilon": (q.sqrt_recip_alphas_cumprod, -q.sqrt_recipm1_alphas_cumprod),
            "sample": (zero, one),
            "v_prediction": (q.sqrt_alphas_cumprod, -q.sqrt_one_minus_alphas_cumprod),
        }[self.prediction_type]
        small, span = q.posterior_log_variance, q.log_variance_range
        # The first step of fixed_large borrows the second's betatilde as fixed_small does, which is u = 0.
        large = torch.cat([zero[:1], span[1:]])
        variance = {
            "fixed_small": (small, zero, zero),
            "fixed_large": (small + large, large, zero),
            "learned": (zero, -small, one),
            "learned_range": (small + 0.5 * span, 0.5 * span, 0.5 * span),
        }[self.variance_type.removesuffix("_log")]
        return [*x_0, q.posterior_mean_coef_x_0, q.posterior_mean_coef_x_t, small, *variance]

    @property
    def learns_variance(self) -> bool:
        """Whether the network must put out 2 C channels: the mean half and the variance half."""
        return self.variance_type in ("learned", "learned_range")

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "ReverseProcess":
        """The same process on the tables of `forward.to(device, dtype)`; arguments and errors as there."""
        return replace(self, forward=self.forward.to(device, dtype))

    def respace(self, indices: Sequence[int] | Tensor) -> "ReverseProcess":
        """The reverse process of the shorter chain `forward.respace(indices)`; arguments and errors as there."""
        return replace(self, forward=self.forward.respace(indices))

    def coefficients(self, t: Tensor | int, x_t: Tensor) -> Coefficients:
        """The coefficients at the steps `t`, in one look-up.

        Args:
            t: chain indices (B,), or one Python int for the whole batch.
            x_t: the tensor (B, C, *) that they are for.

        Raises:
            TypeError, IndexError: as `gather`.
        """
        if isinstance(t, int):
            key = t, x_t.dtype
            if not 0 <= t < len(self.forward):
                raise IndexError(f"`t` must lie in 0 .. {len(self.forward) - 1}, but got {t}.")
            if key not in self._rows:  # a sampler comes back to the same few steps: eight views each time are slow
                with torch.inference_mode(False):
                    row = self._table[t].to(torch.promote_types(x_t.dtype, torch.float32))
                    self._rows[key] = Coefficients(*row.unbind())
            return self._rows[key]
        return Coefficients(*gather(self._table, t, x_t).unbind(t.ndim))

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
        channels, learned = x_t.shape[1], self.learns_variance
        expected = 2 * channels if learned else channels
        shape = model_output.shape
        if shape[1] != expected or shape[0] != x_t.shape[0] or shape[2:] != x_t.shape[2:]:
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
        mean_output, variance_output = self.split(model_output, x_t)
        x_t = promote_half(x_t)
        c = self.coefficients(t, x_t)
        x_0 = self.predict_x_0(mean_output, x_t, c)
        mean = torch.addcmul(c.x_t_to_mean * x_t, x_0, c.x_0_to_mean)
        if variance_output is None:
            return Prediction(DiagonalGaussian(mean, c.log_variance_offset.expand_as(mean)), x_0)
        log_variance = torch.addcmul(c.log_variance_offset, variance_output, c.variance_slope)
        return Prediction(DiagonalGaussian(mean, log_variance), x_0)

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
