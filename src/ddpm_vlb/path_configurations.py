"""Which Gaussian path a stock scheduler of flow matching or of the EDM family walks, read from its configuration.

Shifts, Karras' spacing and their like choose a grid of noise levels, not the path: the network does not know of them.

Sources: Lipman et al. 2023 (flow matching); Karras et al. 2022, table 1 (EDM); diffusers' classes of these names.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .schedules import MAX_STEPS, make_betas, rescale_betas_zero_snr

FLOW_SCHEDULERS = (
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
)
"""Stock's schedulers of flow matching alone."""
FLOW_SIGMA_SCHEDULERS = (
    "UniPCMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "SASolverScheduler",
)
"""Those that walk betas, or a flow where `use_flow_sigmas` says so."""
_KARRAS = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "sigma_schedule": "karras"}
_EDM_DEFAULTS: dict[str, dict[str, Any]] = {
    "EDMEulerScheduler": {**_KARRAS, "prediction_type": "epsilon"},
    "EDMDPMSolverMultistepScheduler": {**_KARRAS, "prediction_type": "epsilon"},
    "CosineDPMSolverMultistepScheduler": {
        "sigma_min": 0.3,
        "sigma_max": 500.0,
        "sigma_data": 1.0,
        "sigma_schedule": "exponential",
        "prediction_type": "v_prediction",
    },
}
EDM_SCHEDULERS = (*_EDM_DEFAULTS, "EulerDiscreteScheduler")
"""Those of networks in terms of sigma; Euler's is one with continuous times and v-prediction."""
DISTILLED_SCHEDULERS = ("LCMScheduler", "TCDScheduler", "FlowMatchLCMScheduler")
"""Their networks jump to the data: a score says what they are as a denoiser, which they were not trained to be."""


class StockPath(NamedTuple):
    """What a configuration describes: the kind of path, and the sigmas of stock's own grid, rising, if it has one."""

    kind: str
    sigmas: Tensor | None
    options: dict[str, Any]


def is_path(config: Any) -> bool:
    """Whether a scheduler is of a class and configuration that walk a path in sigma, readable or not.

    Args:
        config: as of `read_path`.
    """
    name, config = _named_or_none(config)
    if name in FLOW_SIGMA_SCHEDULERS:
        return bool(config.get("use_flow_sigmas"))
    return name in (*FLOW_SCHEDULERS, *_EDM_DEFAULTS) or (name == "EulerDiscreteScheduler" and _is_continuous(config))


def readable(config: Any) -> bool:
    """Whether `read_path` reads a scheduler.

    Args:
        config: as of `read_path`.
    """
    try:
        read_path(config)
    except ValueError:
        return False
    return True


def lacks_flow_sigmas(config: Any) -> bool:
    """Whether a network of a flow has a scheduler that walks one, but was not told to.

    Args:
        config: as of `read_path`.
    """
    name, config = _named_or_none(config)
    off = name in FLOW_SIGMA_SCHEDULERS and not config.get("use_flow_sigmas")
    return off and config.get("prediction_type") == "flow_prediction"


def read_path(config: Any) -> StockPath:
    """The path of a stock scheduler.

    Args:
        config: the scheduler, or its configuration with its `_class_name`, as a file holds it.

    Raises:
        ValueError: another class, or a configuration that does not describe one path.
    """
    name, config = _named(config)
    if name in FLOW_SCHEDULERS:
        return _flow(name, config, "shift")
    if name in FLOW_SIGMA_SCHEDULERS and config.get("use_flow_sigmas"):
        kind = config.get("prediction_type", "epsilon")
        if kind != "flow_prediction":
            raise ValueError(
                f"`prediction_type` of a {name} with `use_flow_sigmas` must be 'flow_prediction' to be read as flow "
                f"matching, but got {kind!r:.80}. If the network predicts the flow, set it."
            )
        return _flow(name, config, "flow_shift")
    if name in _EDM_DEFAULTS:
        return _edm(name, {**_EDM_DEFAULTS[name], **config})
    if name == "EulerDiscreteScheduler" and _is_continuous(config):
        return StockPath("edm", _euler_sigmas(config), {"sigma_data": 1.0, "prediction_type": "v_prediction"})
    raise ValueError(_unknown(name, config))


def _named(config: Any) -> tuple[str, Mapping[str, Any]]:
    """The class and its configuration, values left out or None at their defaults."""
    name = None
    if not isinstance(config, Mapping) and isinstance(getattr(config, "config", None), Mapping):
        name, config = type(config).__name__, config.config
    if not isinstance(config, Mapping):
        raise ValueError(f"`config` must be a scheduler or its configuration, but got {type(config).__name__}.")
    name = name or config.get("_class_name")
    if not isinstance(name, str):
        raise ValueError(
            "`config` must say its `_class_name`, as a file does and a configuration in memory does not: pass the "
            "scheduler itself."
        )
    return name, {key: value for key, value in config.items() if value is not None}


def _named_or_none(config: Any) -> tuple[str | None, Mapping[str, Any]]:
    """The same, of what has no class None and nothing."""
    try:
        return _named(config)
    except ValueError:
        return None, {}


def _is_continuous(config: Mapping[str, Any]) -> bool:
    return config.get("timestep_type") == "continuous" and config.get("prediction_type") == "v_prediction"


def _unknown(name: str, config: Mapping[str, Any]) -> str:
    if lacks_flow_sigmas({**config, "_class_name": name}):
        return (
            f"`config` of {name} has `prediction_type='flow_prediction'`, of a network of flow matching, on the noise "
            "levels of betas: set `use_flow_sigmas=True`."
        )
    if any(key in config for key in ("beta_schedule", "trained_betas")):
        return (
            f"`config` of {name} describes a chain of betas, not a path in sigma: take "
            "`DDPMVLBScheduler.from_config(config)`, or `GaussianPath.ddpm(alphas_cumprod, ratios, prediction_type)`."
        )
    known = [*FLOW_SCHEDULERS, *EDM_SCHEDULERS, *FLOW_SIGMA_SCHEDULERS]
    return f"`config` must be of one of {known}, but got {name!r:.80}: its path is not known, and none is guessed."


def _steps(config: Mapping[str, Any]) -> int:
    steps = config.get("num_train_timesteps", 1000)
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"`num_train_timesteps` must be an integer in 1 .. {MAX_STEPS}, but got {steps!r:.80}.")
    return steps


def _positive(config: Mapping[str, Any], key: str, default: float) -> float:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"`{key}` must be a positive number, but got {value!r:.80}.")
    return float(value)


def _flow(name: str, config: Mapping[str, Any], shift_key: str) -> StockPath:
    if config.get("invert_sigmas"):
        raise ValueError(
            "`invert_sigmas` tells the network 1 - sigma and walks from data to noise, which no flow's bound does: "
            "build `GaussianPath.flow(sigmas)` and call the network as it was trained, in a function."
        )
    steps, shift = _steps(config), _positive(config, shift_key, 1.0)
    options = {"num_train_timesteps": steps}
    if config.get("use_dynamic_shifting"):
        return StockPath("flow", None, options)
    even = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    if name == "UniPCMultistepScheduler":
        even = 1 / steps + (1 - 1 / steps) * even
    elif name in FLOW_SIGMA_SCHEDULERS:
        even = (1 - 1 / steps) * even
    return StockPath("flow", shift * even / (1 + (shift - 1) * even), options)


def _edm(name: str, config: Mapping[str, Any]) -> StockPath:
    low, high = _positive(config, "sigma_min", 0.002), _positive(config, "sigma_max", 80.0)
    steps = _steps(config) + (name == "EDMEulerScheduler")  # which has one level more before `set_timesteps`
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    schedule = config["sigma_schedule"]
    if schedule == "karras":
        sigmas = _karras(low, high, ramp, _positive(config, "rho", 7.0))
    elif schedule == "exponential":
        sigmas = torch.exp(math.log(low) + ramp * math.log(high / low))
    else:
        raise ValueError(f"`sigma_schedule` must be 'karras' or 'exponential', but got {schedule!r:.80}.")
    options = {"sigma_data": _positive(config, "sigma_data", 0.5), "prediction_type": config["prediction_type"]}
    return StockPath("cosine" if name.startswith("Cosine") else "edm", sigmas, options)


def _karras(low: float, high: float, ramp: Tensor, rho: float) -> Tensor:
    """Karras et al. 2022, eq. 5, rising."""
    return (low ** (1 / rho) + ramp * (high ** (1 / rho) - low ** (1 / rho))) ** rho


def _euler_sigmas(config: Mapping[str, Any]) -> Tensor:
    """Karras' grid where Euler walks it, or else that of its betas."""
    steps = _steps(config)
    if config.get("use_karras_sigmas") and "sigma_min" in config and "sigma_max" in config:
        low, high = _positive(config, "sigma_min", 0.002), _positive(config, "sigma_max", 700.0)
        return _karras(low, high, torch.linspace(0, 1, steps, dtype=torch.float64), 7.0)
    betas = config.get("trained_betas")
    if betas is None:
        start, end = _positive(config, "beta_start", 0.0001), _positive(config, "beta_end", 0.02)
        betas = make_betas(config.get("beta_schedule", "linear"), steps, start, end)
    if config.get("rescale_betas_zero_snr"):
        betas = rescale_betas_zero_snr(betas)
    log_abar = torch.log1p(-torch.as_tensor(betas, dtype=torch.float64)).cumsum(0)
    if config.get("rescale_betas_zero_snr"):
        log_abar[-1] = math.log(2**-24)  # stock's stand-in for an infinite sigma
    return torch.expm1(-log_abar).sqrt()
