"""Configurations of schedulers and pipelines: reading those that come from anybody, and what of ours is saved.

A configuration of another class is taken over by what defines the chain; anything that Python would let pass, or fail
on somewhere deep, is refused here. So is an index of a pipeline that asks for code or names no DDPM.
"""

import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import pipelines
from diffusers.configuration_utils import ConfigMixin

from .described_chains import check_described
from .respacing import TIMESTEP_SPACINGS, VARIANCES
from .schedules import check_betas

# Keys that stock schedulers do not know are written only where they differ from these defaults.
OWN_DEFAULTS: dict[str, Any] = {
    "levels": 256,
    "reverse_variance": "network",
    "few_steps_file": None,
    "decoder_log_variance": None,
}
# Arguments that older files have in the configuration; they are kept in a file of their own (see few_step_store).
FEW_STEPS = ("optimal_paths", "x_0_mse")
# 100 000 betas take 3 MB.
_MAX_BYTES = 8_000_000
# The largest that a float32 tensor can be clamped to.
_MAX_NUMBER = torch.finfo(torch.float32).max


def _is_number(value: Any) -> bool:
    real: Any = value  # numpy's scalars among them
    return isinstance(value, Real) and not isinstance(value, bool) and bool(abs(real) <= _MAX_NUMBER)


_TYPES: dict[str, tuple[Callable[[Any], bool], tuple[str, ...]]] = {
    "True or False": (
        lambda value: isinstance(value, bool),
        ("clip_sample", "thresholding", "rescale_betas_zero_snr"),
    ),
    "a finite number": (
        _is_number,
        ("dynamic_thresholding_ratio", "clip_sample_range", "sample_max_value"),
    ),
    "an integer": (
        lambda value: isinstance(value, Integral) and not isinstance(value, bool),
        ("steps_offset",),
    ),
}
_BETAS = {
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"),
    "rescale_betas_zero_snr",
}
# What the network was trained with must survive a change of class even where it equals a default.
MODEL_DEFINING = _BETAS | {"variance_type", "prediction_type"}
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)


def read_config(json_file: str | os.PathLike[str], dduf_entries: Any = None) -> dict[str, Any]:
    """A configuration file of a scheduler or a pipeline, which may come from anybody.

    Args:
        json_file: its path.
        dduf_entries: what diffusers before 0.42 passes for a file in a DDUF archive, which is left to it.

    Raises:
        ValueError: larger than any configuration of ours can be, not JSON, or not an object.
    """
    if dduf_entries is not None:
        return ConfigMixin._dict_from_json_file(json_file, dduf_entries=dduf_entries)
    path = Path(json_file)
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"{path.name} must be at most {_MAX_BYTES} bytes, but has {path.stat().st_size}.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} must be JSON, but cannot be read: {error}.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path.name} must hold a JSON object, but holds {type(config).__name__}.")
    return config


def taken_over(config: dict[str, Any], given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `from_config` takes of any scheduler's configuration, and the arguments that go with it.

    What defines the chain is taken from the other class even where it is at its defaults.

    Args:
        config: of a scheduler, ours or a stock one.
        given: values in place of the configuration's.

    Raises:
        ValueError: a configuration that describes no chain of betas, whatever is given, or that names what no
            configuration may.
    """
    unset = config.get("_use_default_values", ())
    if not isinstance(unset, (list, tuple)) or {"self", "cls"} & config.keys():
        raise ValueError("`_use_default_values` must be a list, and no key `self` or `cls`.")
    check_described(config)
    named = {key: config[key] for key in MODEL_DEFINING if config.get(key) is not None}
    # The DPM-Solvers and SA-Solver save `variance_type: null`.
    kept = {k: v for k, v in config.items() if k not in MODEL_DEFINING or v is not None}
    if drops_decoder(config, given):
        kept.pop("decoder_log_variance")
    return kept, named | given


def drops_decoder(config: Mapping[str, Any], given: Mapping[str, Any]) -> bool:
    """Whether `decoder_log_variance` is another chain's, or takes a learned variance's place, once values change.

    Args:
        config: of a scheduler.
        given: values in place of the configuration's.
    """
    if config.get("decoder_log_variance") is None or "decoder_log_variance" in given:
        return False
    before: Any = config
    changed = {name for name, value in given.items() if not np.array_equal(value, before.get(name))}
    learned = "variance_type" in changed and str(given["variance_type"]).startswith("learned")
    return learned or bool(changed & _BETAS)


def check_values(config: Mapping[str, Any]) -> None:
    """Refuse values of a scheduler's configuration that Python would let pass, or fail on somewhere deep.

    Args:
        config: of ours, whole but for `OWN_DEFAULTS`.

    Raises:
        ValueError: a value of the wrong type, or an unknown name.
    """
    for kind, (accepts, names) in _TYPES.items():
        for name in names:
            if not accepts(config[name]):
                raise ValueError(f"`{name}` must be {kind}, but got {config[name]!r:.80}.")
    whole = {**OWN_DEFAULTS, **config}
    first = whole["decoder_log_variance"]
    if first is not None and not _is_number(first):
        raise ValueError(f"`decoder_log_variance` must be a finite number, or None, but got {first!r:.80}.")
    for name, choices in (("timestep_spacing", TIMESTEP_SPACINGS), ("reverse_variance", VARIANCES)):
        if whole[name] not in choices:
            raise ValueError(f"`{name}` must be one of {list(choices)}, but got {whole[name]!r:.80}.")


def normalized(config: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a scheduler's configuration that must be saved otherwise than they were given.

    Args:
        config: of ours.

    Raises:
        ValueError: `trained_betas` that are no schedule.
    """
    scalars = (np.generic, torch.Tensor)
    updates: dict[str, Any] = {k: v.item() for k, v in config.items() if isinstance(v, scalars) and v.ndim == 0}
    if config["trained_betas"] is not None:
        # A list could be changed where nobody would see it.
        updates["trained_betas"] = tuple(check_betas(config["trained_betas"]).tolist())
        # Stock takes T from the betas' number too; a config that contradicts itself would break its spacings.
        if len(updates["trained_betas"]) != updates.get("num_train_timesteps", config["num_train_timesteps"]):
            updates["num_train_timesteps"] = len(updates["trained_betas"])
    if config["variance_type"] == "fixed_large_log":  # a name under which stock computes NaN
        updates["variance_type"] = "fixed_large"
    return updates


def portable_values(values: dict[str, Any]) -> dict[str, Any]:
    """A whole configuration of ours as it is kept, so that stock takes it without a word (see docs/notation.md).

    diffusers lists the values left at their defaults, which other classes made from this configuration drop.
    Model-defining keys must not be on that list: another class may have other defaults. Keys of our own are left out
    of the configuration where they are at theirs.

    Args:
        values: by name, and the list `_use_default_values`.
    """
    kept = {k: v for k, v in values.items() if k not in FEW_STEPS and (k not in OWN_DEFAULTS or v != OWN_DEFAULTS[k])}
    unset = set(kept.pop("_use_default_values", ())) - MODEL_DEFINING - set(OWN_DEFAULTS) - set(FEW_STEPS)
    return kept | {"_use_default_values": sorted(unset)} if unset else kept


def network_parts(index: dict[str, Any]) -> tuple[str, str]:
    """The names of the network and the scheduler in a model_index.json: a DiT's network is its transformer.

    Args:
        index: its content.
    """
    return ("transformer" if "unet" not in index and "transformer" in index else "unet"), "scheduler"


def check_index(index: dict[str, Any]) -> None:
    """Refuse a model_index.json that is no DDPM's, or that names components by anything but identifiers.

    diffusers makes paths of these names.

    Args:
        index: its content.

    Raises:
        ValueError: such an index.
    """
    needed = network_parts(index)
    missing = sorted(set(needed) - set(index))
    if missing:
        raise ValueError(f"model_index.json must name the components 'unet' and 'scheduler', but lacks {missing}.")
    for name, entry in index.items():
        if name.startswith("_"):
            continue
        pair = isinstance(entry, (list, tuple)) and len(entry) == 2 and all(isinstance(e, str) for e in entry)
        if name in needed and not pair:
            raise ValueError(f"model_index.json must give `{name}` as [library, class], but gives {entry!r:.80}.")
        names = [name, *entry] if pair else [name]
        bad = [own for own in names if not _IDENTIFIER.fullmatch(own)]
        if bad:
            raise ValueError(f"model_index.json must name components by identifiers, but holds {bad[0]!r:.80}.")
        # A DiT's autoencoder is left aside: what is scored and sampled are its latents.
        if pair and name not in (*needed, *(["vae"] if "transformer" in needed else [])):
            raise ValueError(
                f"model_index.json must name 'unet' and 'scheduler' only, but names {name!r:.80} too, as another kind "
                "of pipeline. Load its parts, and make a DDPMVLBPipeline of its network and scheduler."
            )


def check_no_code(index: dict[str, Any], folder: Path) -> None:
    """Refuse an index that asks for code; older versions of diffusers run what a folder has without being told to.

    Args:
        index: the content of model_index.json, as `check_index` accepts it.
        folder: where it lies, if it is a folder.

    Raises:
        ValueError: such an index.
    """
    wanted = [index["_class_name"]] if isinstance(index.get("_class_name"), (list, tuple)) else []
    for name in network_parts(index):
        library = index[name][0]
        known = library in ("diffusers", "transformers") or library in sys.modules or hasattr(pipelines, library)
        if not known or (folder / name / f"{library}.py").exists():
            wanted.append(index[name])
    if wanted:
        raise ValueError(
            f"model_index.json asks for {wanted[0]!r:.80}, which is code of the repository or a module that was not "
            "imported. Read the code first; `trust_remote_code=True` then runs it."
        )
