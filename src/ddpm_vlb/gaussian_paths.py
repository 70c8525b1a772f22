r"""Any Gaussian path x = a x_0 + s eps as a VP chain: flow matching, EDM and their kin seen by `ReverseProcess`.

1. with n = sqrt(a^2 + s^2), x' = x / n is the VP variable: sqrt(abar) = a / n, sqrt(1 - abar) = s / n
2. the network o is told a time, sees scale x, and means x_0_hat = skip x + out o
3. so v' = [(a/n - skip n) x' - out o] / (s/n) is a v-prediction of the VP chain

| path | a, s | told | scale | x_0_hat |
| --- | --- | --- | --- | --- |
| flow | 1 - sigma, sigma | N sigma | 1 | x - sigma o |
| EDM | 1, sigma | log(sigma) / 4 | 1 / sqrt(sigma^2 + sd^2) | sd^2 x / (sigma^2 + sd^2) +- sigma sd scale o |
| DDPM | sqrt(abar), sqrt(1 - abar) | t, fractional between the steps | 1 | as of the prediction type |

The chain is ours to choose, on whatever grid the network was trained or is sampled: its bound depends on the ratios
r = s / a, of which the first has to fit the data's levels.

Sources: Kingma et al. 2021, section 4 (paths of one SNR are one model); Lipman et al. 2023; Karras et al. 2022, table
1; Salimans & Ho 2022, appendix D.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checks import Model
from .distributions import ordinary_tensors
from .forward_process import ForwardProcess
from .path_configurations import read_path
from .path_networks import PathNetwork
from .reverse_process import PREDICTION_TYPES, ReverseProcess
from .schedules import MAX_STEPS

SIGMA_IN_BINS = 0.4
"""The first noise level of a chain for discrete data, in units of the bin width."""
Levels = Sequence[float] | Tensor


def spaced_ratios(low: float | None, high: float, steps: int, levels: int | None = None) -> Tensor:
    """Rising noise-to-signal ratios r = s / a, even in log SNR: float64 (T,).

    Args:
        low: r of the first step, positive; None takes 0.4 bins of data with `levels`.
        high: r of the last, above `low` and finite; at 100 the prior term is next to nothing.
        steps: T, at least 1; odd for the ODE. One step stands at `high`.
        levels: number of levels of the data on [-1, 1], for `low=None`.

    Raises:
        ValueError: numbers that give no rising ratios.

    Source: Kingma et al. 2021, section 5.1 (log SNR as time); 0.4 bins: benchmarks/README.md.
    """
    if low is None:
        if type(levels) is not int or levels < 2:
            raise ValueError(f"`low=None` needs `levels`, an integer of at least 2, but got {levels!r:.80}.")
        low = SIGMA_IN_BINS * 2 / (levels - 1)
    if type(steps) is not int or not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"`steps` must be an integer in 1 .. {MAX_STEPS}, but got {steps!r:.80}.")
    if not 0 < low < high < math.inf:
        raise ValueError(f"`low` and `high` must rise within (0, inf), but got {low!r:.80} and {high!r:.80}.")
    start = math.log(low) if steps > 1 else math.log(high)
    return torch.linspace(start, math.log(high), steps, dtype=torch.float64, device="cpu").exp()


@dataclass(frozen=True, eq=False)
class GaussianPath:
    """The levels of a chain on a Gaussian path, and how its network speaks: float64 tables (T,), noise rising.

    Make it with `flow`, `edm`, `ddpm` or `from_config`; for another kind of network, fill the tables in.

    Args:
        signal: a >= 0, the coefficient of x_0; 0 at the last level at most.
        sigma: s > 0, that of the noise.
        timesteps: the times that the network is told.
        scale: what the network's input is multiplied by.
        skip: of x in x_0_hat.
        out: of the network's output in x_0_hat.

    Raises:
        ValueError: tables of different lengths, not finite, or whose noise does not rise.

    Source: the module's list.
    """

    signal: Tensor
    sigma: Tensor
    timesteps: Tensor
    scale: Tensor
    skip: Tensor
    out: Tensor

    @ordinary_tensors()
    def __post_init__(self) -> None:
        length = len(self.sigma)
        for name in ("signal", "sigma", "timesteps", "scale", "skip", "out"):
            table = torch.as_tensor(getattr(self, name), dtype=torch.float64, device="cpu").detach()
            if table.shape != (length,) or not 1 <= length <= MAX_STEPS or not bool(table.isfinite().all()):
                raise ValueError(f"`{name}` must hold {length} finite numbers, one a level, but does not.")
            object.__setattr__(self, name, table)
        if not bool((self.signal >= 0).all() and (self.sigma > 0).all()):
            raise ValueError("`signal` must not be negative and `sigma` must be positive at every level.")
        _check_rising("sigma", self.ratios)

    @property
    def ratios(self) -> Tensor:
        """r = s / a, (T,); infinite where there is no signal."""
        return self.sigma / self.signal

    def __len__(self) -> int:
        return len(self.sigma)

    @classmethod
    @ordinary_tensors()
    def flow(cls, sigmas: Levels, num_train_timesteps: int = 1000) -> "GaussianPath":
        """The path of flow matching, x = (1 - sigma) x_0 + sigma eps, with a network for eps - x_0.

        Args:
            sigmas: rising in (0, 1], r / (1 + r).
            num_train_timesteps: N; the network is told N sigma.

        Raises:
            ValueError: sigmas outside their range or not rising.

        Source: Lipman et al. 2023, eq. 23; diffusers' `FlowMatchEulerDiscreteScheduler`.
        """
        sigma = _read("sigmas", sigmas, 1.0)
        one = torch.ones_like(sigma)
        return cls(1 - sigma, sigma, num_train_timesteps * sigma, one, one, -sigma)

    @classmethod
    @ordinary_tensors()
    def edm(cls, sigmas: Levels, sigma_data: float = 0.5, prediction_type: str = "epsilon") -> "GaussianPath":
        """The path of EDM, x = x_0 + sigma eps, with its preconditioned network.

        Args:
            sigmas: rising in (0, inf), r itself.
            sigma_data: sd of the preconditioning, positive.
            prediction_type: sign of the output in x_0_hat: "epsilon" +, "v_prediction" -.

        Raises:
            ValueError: sigmas outside their range or not rising, an unknown prediction type.

        Source: Karras et al. 2022, table 1.
        """
        signs = {"epsilon": 1.0, "v_prediction": -1.0}
        if prediction_type not in signs:
            raise ValueError(f"`prediction_type` must be one of {list(signs)}, but got {prediction_type!r:.80}.")
        if not 0 < sigma_data < math.inf:
            raise ValueError(f"`sigma_data` must be positive, but got {sigma_data!r:.80}.")
        sigma = _read("sigmas", sigmas)
        scale = (sigma.square() + sigma_data**2).rsqrt()
        out = signs[prediction_type] * sigma * sigma_data * scale
        return cls(torch.ones_like(sigma), sigma, sigma.log() / 4, scale, (sigma_data * scale).square(), out)

    @classmethod
    @ordinary_tensors()
    def ddpm(cls, alphas_cumprod: Levels, ratios: Levels, prediction_type: str = "epsilon") -> "GaussianPath":
        """The path of a chain of betas, also between its steps, where the network is told a fractional time.

        Args:
            alphas_cumprod: alphabar of the trained chain, (N,).
            ratios: r = sqrt(1/abar - 1), rising within the chain's, to its rounding; between, t is linear in log r.
            prediction_type: what the mean output means, "epsilon", "sample" or "v_prediction".

        Raises:
            ValueError: ratios outside the trained chain's or not rising, an unknown prediction type.

        Source: Karras et al. 2022, appendix C.3.4 (fractional times).
        """
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"`prediction_type` must be one of {list(PREDICTION_TYPES)}, but got {prediction_type!r:.80}."
            )
        ratios = _read("ratios", ratios)
        abar = torch.as_tensor(alphas_cumprod, dtype=torch.float64, device="cpu").detach()
        known = (1 / abar - 1).sqrt()
        known = known[known.isfinite()]
        if not bool(((abar >= 0) & (abar < 1)).all()) or not bool((known.diff() > 0).all()):
            raise ValueError("`alphas_cumprod` must fall within [0, 1), but does not.")
        slack = 1e-9 + _rounding(alphas_cumprod) * torch.arange(1, len(known) + 1) / (2 - 2 * abar[: len(known)])
        if bool((ratios[0] < known[0] * (1 - slack[0])) | (ratios[-1] > known[-1] * (1 + slack[-1]))):
            raise ValueError(
                f"`ratios` must lie within those of the chain, {float(known[0]):.6g} to {float(known[-1]):.6g}, but "
                f"reach from {float(ratios[0]):.6g} to {float(ratios[-1]):.6g}: the network knows no other noise."
            )
        n = (1 + ratios.square()).sqrt()
        a, s, one = 1 / n, ratios / n, torch.ones_like(n)
        skip, out = {
            "epsilon": (1 / a, -s / a),
            "sample": (0 * one, one),
            "v_prediction": (a, -s),
        }[prediction_type]
        return cls(a, s, _interpolate(ratios.log(), known.log()), one, skip, out)

    @classmethod
    @ordinary_tensors()
    def from_config(cls, config: Any, ratios: Levels | None = None) -> "GaussianPath":
        """The path of a stock scheduler of flow matching or of the EDM family.

        Args:
            config: the scheduler, or its configuration with its `_class_name`, as a file holds it.
            ratios: r = s / a of the chain, rising, from `spaced_ratios`; None takes stock's own grid, whose first
                levels are mostly far below what the data's levels can show.

        Raises:
            ValueError: an unknown class, a chain of betas, `invert_sigmas`, dynamic shifting without `ratios`.

        Source: docs/schedulers.md has the table.
        """
        kind, sigmas, options = read_path(config)
        if ratios is not None:
            r = _read("ratios", ratios, math.inf)
            sigmas = torch.where(r.isinf(), 1.0, r / (1 + r)) if kind == "flow" else r
        if sigmas is None:
            raise ValueError(
                "`use_dynamic_shifting` makes the grid from an image's size: pass `ratios=spaced_ratios(...)`."
            )
        if kind == "flow":
            return cls.flow(sigmas, **options)
        path = cls.edm(sigmas, **options)
        if kind == "edm":
            return path
        told = path.sigma.atan() * (2 / math.pi)
        return cls(path.signal, path.sigma, told, path.scale, path.skip, path.out)

    @ordinary_tensors()
    def reverse_process(self, levels: int | None = None, **options: Any) -> ReverseProcess:
        """p of the VP chain on these levels, for `network(model)`.

        Its `forward.timesteps` are the chain indices. A fixed variance takes log r_1^2 for the decoder step, which a
        second step's betatilde would misjudge on a fine grid.

        Args:
            levels: number of levels of the data on [-1, 1]; None for continuous data, which nothing clips by itself.
            options: further arguments of `ReverseProcess`, but `forward` and `prediction_type`.

        Raises:
            ValueError: as `ReverseProcess`.
        """
        r = self.ratios
        log_abar = -torch.log1p(r.square())
        previous = torch.cat([log_abar.new_zeros(1), log_abar[:-1]])
        betas = -torch.expm1(log_abar - previous)
        forward = ForwardProcess._from_root(torch.arange(len(r)), log_abar, betas)
        options = {"clip_sample": levels is not None, **options}
        reverse = ReverseProcess(forward, "v_prediction", levels=levels, **options)
        fixed = not reverse.learns_variance and reverse.x_0_mse is None and bool(r[0].isfinite())
        if not fixed or reverse.decoder_log_variance is not None:
            return reverse
        options["decoder_log_variance"] = 2 * math.log(r[0])
        return ReverseProcess(forward, "v_prediction", levels=levels, **options)

    def network(self, model: Model) -> PathNetwork:
        """The path's network as a v-prediction of the VP chain.

        Args:
            model: called as model(scaled x, told time, **conditioning), a module or a function; returns a tensor or an
                object with `.sample`, with a variance half or without.
        """
        n = (self.signal.square() + self.sigma.square()).sqrt()
        noise = self.sigma / n
        of_x, of_output = (self.signal / n - self.skip * n) / noise, -self.out / noise
        return PathNetwork(torch.stack([self.scale * n, self.timesteps, of_x, of_output], dim=1), model)

    def sigmas(self, indices: Sequence[int] | Tensor, shift: float = 1.0) -> list[float]:
        """The sigmas of some levels as `set_timesteps(sigmas=)` of stock's scheduler wants them: falling.

        Args:
            indices: chain indices, as of an optimal path.
            shift: of the flow's scheduler, positive, which shifts what it is given: it is taken off here.

        Raises:
            ValueError: a `shift` that is not positive, or of a path that is no flow.
            IndexError: an index outside the chain.
        """
        chosen = torch.as_tensor(indices, device="cpu")
        if bool(((chosen < 0) | (chosen >= len(self))).any()):
            raise IndexError(f"`indices` must lie in 0 .. {len(self) - 1}, but got {chosen.tolist()[:20]}.")
        if not 0 < shift < math.inf:
            raise ValueError(f"`shift` must be positive, but got {shift!r:.80}.")
        if shift != 1 and not torch.allclose(
            self.signal + self.sigma, torch.ones_like(self.sigma), rtol=0, atol=1e-12
        ):
            raise ValueError(f"`shift` is of flow matching alone: this path takes 1, but got {shift!r:.80}.")
        sigma = self.sigma[chosen].sort(descending=True).values
        return (sigma / (shift - (shift - 1) * sigma)).tolist()


def _read(name: str, values: Levels, high: float | None = None) -> Tensor:
    """Levels as float64, in (0, high], or (0, inf) when None."""
    try:
        levels = torch.as_tensor(values, dtype=torch.float64, device="cpu").detach().clone()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"`{name}` must be a list of numbers, but it cannot be read: {error}.") from error
    if levels.ndim != 1 or not 1 <= len(levels) <= MAX_STEPS:
        raise ValueError(f"`{name}` must be a list of 1 to {MAX_STEPS} numbers, but got {tuple(levels.shape)}.")
    inside = (levels > 0) & (levels.isfinite() if high is None else levels <= high)
    if not bool(inside.all()):
        at = int((~inside).nonzero()[0])
        raise ValueError(
            f"`{name}` must lie in {'(0, inf)' if high is None else f'(0, {high:g}]'}, but {name}[{at}] is "
            f"{float(levels[at])}."
        )
    _check_rising(name, levels)
    return levels


def _check_rising(name: str, levels: Tensor) -> None:
    falling = levels[1:] <= levels[:-1]
    if bool(falling.any()):
        at = int(falling.nonzero()[0]) + 1
        raise ValueError(
            f"`{name}` must rise from the data to the noise, but level {at} is not above the one before it. Stock "
            "stores them falling: `sigmas.flip(0)`, without the final 0."
        )


def _rounding(values: Levels) -> float:
    """The relative error of a factor in these products; 0 of plain numbers, which have all their digits."""
    return torch.finfo(values.dtype).eps if isinstance(values, Tensor) and values.is_floating_point() else 0.0


def _interpolate(x: Tensor, known: Tensor) -> Tensor:
    """The fractional position of each x among rising values."""
    if len(known) == 1:
        return torch.zeros_like(x)
    right = torch.searchsorted(known, x).clamp(1, len(known) - 1)
    low, high = known[right - 1], known[right]
    return (right - 1 + (x - low) / (high - low)).clamp(0, len(known) - 1)
