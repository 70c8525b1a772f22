r"""Noise schedules beta_1 .. beta_T by name, in float64.

1. linear: beta_t evenly spaced from beta_start to beta_end (Ho et al. 2020, section 4)
2. scaled_linear: sqrt(beta_t) evenly spaced (Rombach et al. 2022)
3. squaredcos_cap_v2: alphabar(u) = cos^2((u + 0.008) / 1.008 * pi / 2), beta_t <= 0.999 (Nichol & Dhariwal 2021)
4. sigmoid: beta_t a logistic curve over (-6, 6) between beta_start and beta_end (Xu et al. 2022, GeoDiff)
5. laplace: the log SNR follows a Laplace distribution (Hang et al. 2024), in the form that diffusers gives it

The names and formulas are those of diffusers' `DDPMScheduler`; float64 keeps the digits that its float32 tables lose.
"""

import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real

import torch
from torch import Tensor

MAX_BETA = 0.999
# A bound on what a configuration from elsewhere can make us allocate; no published chain comes near it.
MAX_STEPS = 100_000
# Noise that no floating point data can show; below 1e-300 the tables would hold infinities and NaN.
MIN_BETA = 1e-20


def _cosine_alpha_bar(u: float) -> float:
    return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2


def _laplace_alpha_bar(u: float) -> float:
    log_snr = -0.5 * math.copysign(1, 0.5 - u) * math.log(1 - 2 * abs(0.5 - u) + 1e-6)
    # The square root is diffusers' (a variance would do without it); kept, because checkpoints are trained with it.
    return math.sqrt(1 / (1 + math.exp(-log_snr)))


def _betas_for_alpha_bar(alpha_bar: Callable[[float], float], num_train_timesteps: int) -> Tensor:
    curve = [alpha_bar(i / num_train_timesteps) for i in range(num_train_timesteps + 1)]
    return torch.tensor(
        [min(1 - b / a, MAX_BETA) for a, b in zip(curve, curve[1:])], dtype=torch.float64, device="cpu"
    )


def _linear(num: int, start: float, end: float) -> Tensor:
    return torch.linspace(start, end, num, dtype=torch.float64, device="cpu")


_SCHEDULES: dict[str, Callable[[int, float, float], Tensor]] = {
    "linear": _linear,
    "scaled_linear": lambda num, start, end: _linear(num, start**0.5, end**0.5).square(),
    "squaredcos_cap_v2": lambda num, start, end: _betas_for_alpha_bar(_cosine_alpha_bar, num),
    "sigmoid": lambda num, start, end: torch.sigmoid(_linear(num, -6.0, 6.0)) * (end - start) + start,
    "laplace": lambda num, start, end: _betas_for_alpha_bar(_laplace_alpha_bar, num),
}

BETA_SCHEDULES = tuple(_SCHEDULES)
"""The schedules of betas that have a name."""


def make_betas(
    beta_schedule: str = "linear", num_train_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
) -> Tensor:
    """The betas of a named schedule, a float64 tensor of shape (T,).

    Args:
        beta_schedule: one of "linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace".
        num_train_timesteps: T, the number of steps, 1 .. 100 000.
        beta_start: beta_1, in (0, 1]; not used by "squaredcos_cap_v2" and "laplace".
        beta_end: beta_T, in (0, 1]; not used by these two either.

    Raises:
        ValueError: unknown schedule, T outside 1 .. 100 000, or betas that leave (0, 1].

    Source: see the module's list.
    """
    if beta_schedule not in BETA_SCHEDULES:
        raise ValueError(f"`beta_schedule` must be one of {list(BETA_SCHEDULES)}, but got {beta_schedule!r:.80}.")
    whole = isinstance(num_train_timesteps, Integral) and not isinstance(num_train_timesteps, bool)
    if not whole or num_train_timesteps < 1:
        raise ValueError(
            f"`num_train_timesteps` must be an integer of at least 1, but got {num_train_timesteps!r:.80}."
        )
    if num_train_timesteps > MAX_STEPS:
        raise ValueError(f"`num_train_timesteps` must be at most {MAX_STEPS}, but got {num_train_timesteps}.")
    for name, value in (("beta_start", beta_start), ("beta_end", beta_end)):
        if not isinstance(value, Real) or not 0 < value <= 1:
            raise ValueError(f"`{name}` must lie in (0, 1], but got {value!r:.80}.")
    return check_betas(_SCHEDULES[beta_schedule](int(num_train_timesteps), float(beta_start), float(beta_end)))


def check_betas(betas: Sequence[float] | Tensor) -> Tensor:
    """Return `betas` as a float64 tensor of shape (T,) after checking that they make a diffusion.

    Args:
        betas: beta_1 .. beta_T, each in (0, 1], T <= 100 000; a beta of 1 (zero-terminal SNR) only as the last.

    Raises:
        ValueError: not one-dimensional, empty, too long, no numbers, not finite, outside (0, 1], or a beta of 1 before
            the last step.
    """
    try:
        betas = torch.as_tensor(betas, dtype=torch.float64, device="cpu").detach().clone()
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"`betas` must be a list of numbers in (0, 1], but it cannot be read: {error}.") from error
    if betas.ndim != 1 or len(betas) == 0:
        raise ValueError(f"`betas` must be a non-empty list of numbers, but got the shape {tuple(betas.shape)}.")
    if len(betas) > MAX_STEPS:
        raise ValueError(f"`betas` must be at most {MAX_STEPS} numbers, but there are {len(betas)}.")
    bad = ~((betas >= MIN_BETA) & (betas <= 1))
    if bad.any():
        t = int(bad.nonzero()[0])
        raise ValueError(f"`betas` must lie in (0, 1], but betas[{t}] is {float(betas[t])} (at least {MIN_BETA}).")
    if (betas[:-1] == 1).any():
        t = int((betas[:-1] == 1).nonzero()[0])
        raise ValueError(
            f"Only the last of `betas` may be 1 (zero-terminal SNR), but betas[{t}] of {len(betas)} is 1: "
            "nothing of the data would be left for the steps after it. Cut the schedule off there."
        )
    return betas


def rescale_betas_zero_snr(betas: Sequence[float] | Tensor) -> Tensor:
    """Rescale `betas` so that the last step holds no signal at all (zero-terminal SNR), in float64.

    Args:
        betas: beta_1 .. beta_T, each in (0, 1], at least two.

    Raises:
        ValueError: `betas` are no valid schedule, or there is only one.

    Source: Lin et al. 2024, "Common Diffusion Noise Schedules and Sample Steps are Flawed", algorithm 1.
    """
    betas = check_betas(betas)
    if len(betas) < 2:
        raise ValueError("`rescale_betas_zero_snr` needs a schedule of at least 2 steps, but got 1.")
    root = torch.cumprod(1 - betas, 0).sqrt()
    alphas_cumprod = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))).square()
    previous = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
    return check_betas(1 - alphas_cumprod / previous)


def beta_start_for_levels(levels: int, sigma_in_bins: float = 0.4, beta_end: float = 0.02) -> float:
    """The beta_1 whose noise matches the bin width of data with few levels: sigma_1 = `sigma_in_bins` bins.

    The standard beta_1 = 1e-4 (sigma_1 = 0.01) was chosen for 256 levels. On coarser data most of the chain would
    undo noise that rounding to the nearest level undoes for nothing. Up to 6 levels that noise is more than a step of
    the usual schedule adds at its end: `beta_end` itself is returned then, which makes the schedule constant.

    Args:
        levels: number of levels of the data on [-1, 1], at least 2; a bin is 2 / (levels - 1) wide.
        sigma_in_bins: sigma_1 in units of the bin width, positive.
        beta_end: beta_T of the schedule, in (0, 1], which beta_1 does not exceed.

    Raises:
        ValueError: `levels` below 2, or a sigma_1 or `beta_end` outside (0, 1].

    Source: measured in this project; benchmarks/README.md has the figures.
    """
    if isinstance(levels, bool) or not isinstance(levels, Integral) or levels < 2:
        raise ValueError(f"`levels` must be an integer of at least 2, but got {levels!r}.")
    if not isinstance(beta_end, Real) or not 0 < beta_end <= 1:
        raise ValueError(f"`beta_end` must lie in (0, 1], but got {beta_end!r:.80}.")
    sigma = sigma_in_bins * 2 / (int(levels) - 1)
    if not 0 < sigma <= 1:
        raise ValueError(
            f"`sigma_in_bins` must give a first noise level in (0, 1], but {sigma_in_bins!r} bins of "
            f"2/{levels - 1} are {sigma}."
        )
    return float(min(sigma**2, beta_end))
