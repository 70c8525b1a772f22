"""Which steps of the training chain a shorter chain visits, and with what variances; what of it a checkpoint stores.

Sources: Lin et al. 2024, "Common Diffusion Noise Schedules and Sample Steps are Flawed", table 2 (stock's three
spacings, under the names that diffusers gives them); Song et al. 2021 (DDIM), appendix D.2 (quadratic); Watson et al.
2021 (stored paths); Bao et al. 2022 (stored errors).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor


def _leading(num: int, total: int) -> list[int]:
    return [i * (total // num) for i in range(num)]


# The next two round half-way cases as stock's numpy does, down to the order of its floating point operations.
def _linspace(num: int, total: int) -> list[int]:
    stride = (total - 1) / max(num - 1, 1)
    return [round(i * stride) for i in range(num)]


def _trailing(num: int, total: int) -> list[int]:
    stride = (total - total / num) - total
    return [round(total + i * stride) - 1 for i in reversed(range(num))]


def _quadratic(num: int, total: int) -> list[int]:
    steps: list[int] = []
    for i in range(num):
        step = round((total - 1) * (i / max(num - 1, 1)) ** 2) if num > 1 else total - 1
        steps.append(max(step, steps[-1] + 1) if steps else step)
    return steps


_SPACINGS: dict[str, Callable[[int, int], list[int]]] = {
    "leading": _leading,
    "linspace": _linspace,
    "trailing": _trailing,
    "quadratic": _quadratic,
}

TIMESTEP_SPACINGS = ("leading", "linspace", "trailing")
"""Those that stock schedulers know too, and that a configuration may name."""
ALL_SPACINGS = (*_SPACINGS, "optimal")
"""Those that can be asked for; "optimal" is the stored path."""
VARIANCES = ("network", "analytic", "per_pixel")
"""sigma^2 as `variance_type` says, or optimal in closed form, over all dimensions or for each."""


def spaced_timesteps(
    timestep_spacing: str, num_inference_steps: int, num_train_timesteps: int, steps_offset: int = 0
) -> list[int]:
    """The training timesteps that a chain of `num_inference_steps` visits, descending, as diffusers has them.

    Args:
        timestep_spacing: "leading" (from 0 in whole strides; leaves the last steps out), "linspace" (both ends),
            "trailing" (from T - 1 in strides) or "quadratic" (both ends, denser near the data; DDIM's code leaves the
            last fifth out, which would cost the bound its prior).
        num_inference_steps: K, 1 .. T.
        num_train_timesteps: T.
        steps_offset: added to every step of the "leading" spacing, but where all T are visited.

    Raises:
        ValueError: unknown spacing, K outside 1 .. T, or an offset that pushes a step out of the chain.
    """
    if timestep_spacing not in _SPACINGS:
        raise ValueError(f"`timestep_spacing` must be one of {list(_SPACINGS)}, but got {timestep_spacing!r}.")
    whole = isinstance(num_inference_steps, Integral) and not isinstance(num_inference_steps, bool)
    if not whole or not 1 <= num_inference_steps <= num_train_timesteps:
        raise ValueError(
            f"`num_inference_steps` must be an integer in 1 .. {num_train_timesteps}, the length of the training "
            f"chain, but got {num_inference_steps!r}."
        )
    steps = _SPACINGS[timestep_spacing](int(num_inference_steps), num_train_timesteps)
    if timestep_spacing == "leading" and len(steps) < num_train_timesteps:  # the whole chain has no room for an offset
        steps = [step + steps_offset for step in steps]
    if steps[0] < 0 or steps[-1] >= num_train_timesteps:
        raise ValueError(
            f"`steps_offset={steps_offset}` pushes the steps out of the chain of {num_train_timesteps}: with "
            f"{num_inference_steps} steps they would reach from {steps[0]} to {steps[-1]}."
        )
    return steps[::-1]


@dataclass(frozen=True)
class StoredPath:
    """A chain of few steps that was found to be good for a network, as its scheduler's configuration stores it.

    Args:
        timesteps: the training timesteps to visit, strictly descending.
        variance: "network", "analytic" or "per_pixel".
        decoder_shift: the first step's log variance is that of the training chain at its timestep plus this; for
            "analytic" and "per_pixel" log m_t plus this.

    Raises:
        ValueError: an unknown variance, timesteps that are not strictly descending, or a shift that is no number.
    """

    timesteps: tuple[int, ...]
    variance: str = "network"
    decoder_shift: float = 0.0

    def __post_init__(self) -> None:
        steps, shift = self.timesteps, self.decoder_shift
        whole = isinstance(steps, Sequence) and all(isinstance(t, Integral) and type(t) is not bool for t in steps)
        if not whole or not steps or any(b >= a for a, b in zip(steps, steps[1:])):
            raise ValueError(f"A path's `timesteps` must be strictly descending integers, but are {steps!r:.80}.")
        if steps[-1] < 0:
            raise ValueError(f"A path's `timesteps` must not go below 0, but end at {steps[-1]}.")
        if self.variance not in VARIANCES:
            raise ValueError(f"A path's `variance` must be one of {list(VARIANCES)}, but is {self.variance!r:.80}.")
        if isinstance(shift, bool) or not isinstance(shift, Real) or not abs(shift) < 1e3:
            raise ValueError(f"A path's `decoder_shift` must be a number below 1000, but is {shift!r:.80}.")
        object.__setattr__(self, "timesteps", tuple(int(t) for t in steps))
        object.__setattr__(self, "decoder_shift", float(shift))

    def to_config(self) -> dict[str, Any]:
        """For a configuration."""
        return {"timesteps": list(self.timesteps), "variance": self.variance, "decoder_shift": self.decoder_shift}


@dataclass(frozen=True, eq=False)
class SquaredErrors:
    """m_t, the expected squared error of a network's x_0_hat, at some timesteps; between them its logarithm is linear.

    Args:
        timesteps: (N,) int64, strictly ascending.
        mean: over all dimensions, (N,), positive.
        per_pixel: of each dimension, (N, C, *), positive; None where it is not known.

    Raises:
        ValueError: wrong shapes, timesteps that are not strictly ascending, or errors that are not positive.
    """

    timesteps: Tensor
    mean: Tensor
    per_pixel: Tensor | None = None

    def __post_init__(self) -> None:
        steps = self.timesteps
        if steps.ndim != 1 or len(steps) == 0 or int(steps[0]) < 0 or bool((steps[1:] <= steps[:-1]).any()):
            raise ValueError("`x_0_mse` must be known at strictly ascending timesteps from 0 on.")
        for name in ("mean", "per_pixel"):
            m = getattr(self, name)
            if m is None:
                continue
            if len(m) != len(steps) or (m.ndim == 1) != (name == "mean") or not m.is_floating_point():
                raise ValueError(
                    f"`x_0_mse`'s {name!r} must have a row for each of its {len(steps)} timesteps, but has the shape "
                    f"{tuple(m.shape)}."
                )
            if not bool((m.isfinite() & (m > 0)).all()):
                raise ValueError(f"`x_0_mse`'s {name!r} must be positive and finite.")

    def at(self, timesteps: Sequence[int] | Tensor, variance: str) -> Tensor:
        """m at some timesteps, float64: (K,) for "analytic", (K, C, *) for "per_pixel".

        Args:
            timesteps: (K,); outside the known ones the nearest's value holds.
            variance: which.

        Raises:
            ValueError: an unknown name, or `per_pixel` is not known.
        """
        if variance not in VARIANCES[1:]:
            raise ValueError(f"`variance` must be one of {list(VARIANCES[1:])}, but got {variance!r:.80}.")
        m = self.mean if variance == "analytic" else self.per_pixel
        if m is None:
            raise ValueError("`variance='per_pixel'` needs the errors of each pixel, which are not known.")
        return interpolate_log(self.timesteps, m, torch.as_tensor(timesteps))


def interpolate_log(knots: Tensor, values: Tensor, at: Tensor) -> Tensor:
    """Positive values between knots, their logarithm linear and constant beyond the ends; float64 on the CPU.

    Args:
        knots: (N,), strictly ascending.
        values: (N, *), positive.
        at: where, (K,).
    """
    knots, at = knots.cpu().double(), at.cpu().double().clamp(float(knots[0]), float(knots[-1]))
    upper = torch.searchsorted(knots, at).clamp(max=len(knots) - 1)
    lower = (upper - 1).clamp(min=0)
    gap = knots[upper] - knots[lower]
    fraction = torch.where(gap > 0, (at - knots[lower]) / gap.clamp(min=1), 1.0)
    logs = values.cpu()
    low, high = logs[lower].double().log(), logs[upper].double().log()
    return torch.lerp(low, high, fraction.reshape(-1, *[1] * (values.ndim - 1))).exp()
