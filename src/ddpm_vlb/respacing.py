"""Which steps of the training chain a shorter chain visits.

Sources: Lin et al. 2024, "Common Diffusion Noise Schedules and Sample Steps are Flawed", table 2 (the three spacings,
under the names that diffusers gives them).
"""

from collections.abc import Callable
from numbers import Integral


def _leading(num: int, total: int) -> list[int]:
    return [i * (total // num) for i in range(num)]


# The next two round half-way cases as stock's numpy does, down to the order of its floating point operations.
def _linspace(num: int, total: int) -> list[int]:
    stride = (total - 1) / max(num - 1, 1)
    return [round(i * stride) for i in range(num)]


def _trailing(num: int, total: int) -> list[int]:
    stride = (total - total / num) - total
    return [round(total + i * stride) - 1 for i in reversed(range(num))]


_SPACINGS: dict[str, Callable[[int, int], list[int]]] = {
    "leading": _leading,
    "linspace": _linspace,
    "trailing": _trailing,
}

TIMESTEP_SPACINGS = tuple(_SPACINGS)


def spaced_timesteps(
    timestep_spacing: str, num_inference_steps: int, num_train_timesteps: int, steps_offset: int = 0
) -> list[int]:
    """The training timesteps that a chain of `num_inference_steps` visits, descending, as diffusers has them.

    Args:
        timestep_spacing: "leading" (from 0 in whole strides; leaves the last steps out), "linspace" (both ends) or
            "trailing" (from T - 1 in strides).
        num_inference_steps: K, 1 .. T.
        num_train_timesteps: T.
        steps_offset: added to every step of the "leading" spacing.

    Raises:
        ValueError: unknown spacing, K outside 1 .. T, or an offset that pushes a step out of the chain.
    """
    if timestep_spacing not in _SPACINGS:
        raise ValueError(f"`timestep_spacing` must be one of {list(TIMESTEP_SPACINGS)}, but got {timestep_spacing!r}.")
    whole = isinstance(num_inference_steps, Integral) and not isinstance(num_inference_steps, bool)
    if not whole or not 1 <= num_inference_steps <= num_train_timesteps:
        raise ValueError(
            f"`num_inference_steps` must be an integer in 1 .. {num_train_timesteps}, the length of the training "
            f"chain, but got {num_inference_steps!r}."
        )
    steps = _SPACINGS[timestep_spacing](int(num_inference_steps), num_train_timesteps)
    if timestep_spacing == "leading":
        steps = [step + steps_offset for step in steps]
    if steps[0] < 0 or steps[-1] >= num_train_timesteps:
        raise ValueError(
            f"`steps_offset={steps_offset}` pushes the steps out of the chain of {num_train_timesteps}: with "
            f"{num_inference_steps} steps they would reach from {steps[0]} to {steps[-1]}."
        )
    return steps[::-1]
