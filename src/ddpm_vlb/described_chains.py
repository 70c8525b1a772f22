"""Whether a scheduler's configuration describes a chain of betas, and which others are taken.

Flow matching, EDM, consistency models and their like have noise levels of their own. Read as a DDPM's, such a
configuration would give a chain that the network was never trained on, and a number that means nothing. Those of a
known Gaussian path have a chain beside them (see path_checkpoints); the rest is refused.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import diffusers
from diffusers.configuration_utils import FrozenDict
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .path_configurations import is_path, lacks_flow_sigmas, read_path

# The classes whose defaults are ours: a configuration of theirs may leave anything out.
_OUR_DEFAULTS = (None, "DDPMVLBScheduler", "DDPMScheduler", "DDPMParallelScheduler")
# What moves the noise levels away from the betas, or tells the network log sigma in place of t.
_OTHER_LEVELS = {
    "snr_shift_scale": lambda value: value not in (None, 1),
    "use_flow_sigmas": lambda value: value not in (None, False),
    "shift": lambda value: value is not None,
    "timestep_type": lambda value: value == "continuous",
    "prediction_type": lambda value: value in ("flow_prediction", "trigflow"),
}
_SIGMAS = ("sigma_min", "sigma_max")
# A class without betas carries all of these along, stated, when it was made from our configuration: it may come back.
_CHAIN = {"beta_start", "beta_end", "beta_schedule", "trained_betas"}


def check_described(config: Mapping[str, Any]) -> None:
    """Refuse a configuration that describes no chain of betas.

    Args:
        config: of a scheduler, ours or a stock one, from memory or a file.

    Raises:
        ValueError: such a configuration, or one of a class that is no scheduler.
    """
    why = _why_not(config)
    if not why:
        return
    known = (
        "It walks a Gaussian path: `DDPMVLBPipeline(unet, scheduler)` samples its network, `path_chain(scheduler)` "
        "makes the chain that scores it."
        if is_path(config)
        else "Its checkpoint cannot be scored or sampled here."
    )
    if lacks_flow_sigmas(config):
        known = "If it is a network of flow matching, set `use_flow_sigmas=True`."
    raise ValueError(
        f"This scheduler's configuration describes no chain of betas: {why}. {known} If the network is a DDPM all the "
        "same, build `DDPMVLBScheduler(...)` with the betas of its training."
    )


def check_scheduler(scheduler: SchedulerMixin) -> None:
    """Refuse a scheduler that walks neither betas nor a known path, whatever other classes left in its configuration.

    Args:
        scheduler: any of diffusers, or of its kind.

    Raises:
        ValueError: such a scheduler, or one of a path that was made from the configuration of a chain of betas.
    """
    config = {**scheduler.config, "_class_name": type(scheduler).__name__}
    classes: tuple[Any, ...] = type(scheduler).__mro__
    taken = {name for cls in classes for name in inspect.signature(cls.__init__).parameters}
    if is_path(scheduler):
        if "beta_schedule" in config and "beta_schedule" not in taken:
            raise ValueError(
                f"`scheduler`, a {type(scheduler).__name__}, was made from the configuration of a chain of betas, "
                "which it ignores: keep that scheduler, or make this one with the options of the network's training."
            )
        read_path(scheduler)
        return
    check_described({key: value for key, value in config.items() if key not in _CHAIN or key in taken})


def _why_not(config: Mapping[str, Any]) -> str | None:
    """What there is in place of betas; None where there are some."""
    name = config.get("_class_name")
    cls = _stock_class(name)
    if not isinstance(name, str | None) or (cls is not None and not issubclass(cls, SchedulerMixin)):
        return f"its `_class_name` is {name!r:.80}, which is no scheduler"
    unset = config.get("_use_default_values", ())
    whole = all(key in config and key not in unset for key in _CHAIN)
    if cls is not None and not whole and "beta_schedule" not in inspect.signature(cls.__init__).parameters:
        return f"a {name} has noise levels of another kind"
    for key, differs in _OTHER_LEVELS.items():
        if differs(config.get(key)):
            return f"`{key}={config[key]!r:.80}` gives noise levels that are not those of betas"
    if not whole and config.get("sigma_data") is not None:
        return f"`sigma_data={config['sigma_data']!r:.80}` is of a network in terms of sigma"
    if not whole and _leaves_them_out(config):
        return f"it names {sorted(str(key) for key in config if not str(key).startswith('_'))}, but no betas"
    return None


def _stock_class(name: Any) -> Any:
    """The class of diffusers; None for another's, and for a stand-in whose package is not installed."""
    try:
        cls = getattr(diffusers, name, None) if isinstance(name, str) else None
    except Exception:  # a module of diffusers that cannot be imported here
        return None
    return cls if type(cls) is type else None


def _leaves_them_out(config: Mapping[str, Any]) -> bool:
    """Whether betas would have to be made up; a file of a class with our defaults may leave them to us."""
    if isinstance(config, FrozenDict) or "_use_default_values" in config:
        # In memory all of a class's keys are there. IPNDM has `trained_betas` alone, and means something else.
        return config.get("beta_schedule") is None
    ours = config.get("_class_name") in _OUR_DEFAULTS and not any(config.get(key) is not None for key in _SIGMAS)
    return not ours and all(config.get(key) is None for key in ("beta_schedule", "trained_betas"))
