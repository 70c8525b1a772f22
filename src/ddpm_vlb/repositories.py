"""Repositories of pipelines, in folders and on the Hub: reading one commit, and what is written beside weights."""

import contextlib
import functools
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
from diffusers import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import logging
from huggingface_hub import HfApi, ModelCard, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

logger = logging.get_logger(DiffusionPipeline.__module__)
HUB_OPTIONS = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision")
_OF_WEIGHTS = (
    *("dtype", "torch_dtype", "variant", "use_safetensors", "device_map", "max_memory", "low_cpu_mem_usage"),
    *("offload_folder", "offload_state_dict", "disable_mmap"),
)
_PARTS = ("unet", "transformer", "scheduler")
# What a repository carries so that diffusers runs our pipeline where the package is not installed; a name from each.
_CODE = {
    "bin_mass": "log_bin_mass",
    "distributions": "DiagonalGaussian",
    "schedules": "make_betas",
    "forward_process": "ForwardProcess",
    "reverse_tables": "Coefficients",
    "reverse_process": "ReverseProcess",
    "step_log_probs": "step_log_prob",
    "checks": "check_model",
    "path_configurations": "read_path",
    "path_networks": "PathNetwork",
    "gaussian_paths": "GaussianPath",
    "respacing": "spaced_timesteps",
    "described_chains": "check_described",
    "configurations": "read_config",
    "few_step_store": "FewStepStore",
    "chains": "Chains",
    "devices": "send",
    "walk": "Walk",
    "configured_scheduler": "ConfiguredScheduler",
    "scheduling_ddpm_vlb": "DDPMVLBScheduler",
    "path_checkpoints": "path_chain",
    "sample_shapes": "sample_shape",
    "card_results": "check_metrics",
    "model_card": "model_card",
    "repositories": "write_code",
    "guidance": "Guidance",
    "finite_samples": "FiniteSamples",
    "swapped_schedulers": "takes_variance",
    "recorded_trajectories": "Recorder",
    "pipeline_ddpm_vlb": "DDPMVLBPipeline",
}
CODE_FILES = ("pipeline.py", *(f"{name}.py" for name in _CODE))
"""What `write_code` writes."""
# diffusers copies from a folder only what this one file imports itself, so it imports them all.
_PIPELINE_FILE = """\
# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: F401
# DDPMVLBPipeline for `DiffusionPipeline.from_pretrained(..., custom_pipeline=..., trust_remote_code=True)`.
# The modules beside this file are those of the package ddpm-vlb.

"""
# diffusers reads a repository's module once for each chain of imports that leads to it, hundreds where 20 would do. It
# looks for `from .name`; Python takes a blank behind the dot.
_SIBLING = re.compile(r"^from \.(?=\w)", re.MULTILINE)


def local_folder(name: str | os.PathLike[str], subfolder: str, where: dict[str, Any]) -> Path:
    """A folder of a repository on this machine, downloaded where the repository is on the Hub.

    Args:
        name: a folder, or the name of a Hub repository.
        subfolder: of it.
        where: arguments of `snapshot_download`.

    Raises:
        OSError: what the Hub answers.
    """
    if not os.path.isdir(name):
        options = {key: value for key, value in where.items() if key != "proxies"}
        name = snapshot_download(str(name), allow_patterns=f"{subfolder}/*", **options)
    return Path(name, subfolder)


def read_index(
    load_config: Callable[..., Any], name: str | os.PathLike[str], where: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The content of model_index.json, and where to read all other files of the same commit.

    Args:
        load_config: of a pipeline's class.
        name: a folder, or the name of a Hub repository.
        where: arguments of `from_pretrained`.

    Raises:
        OSError, ValueError: as `load_config`.
    """
    try:
        index, commit = load_config(name, return_commit_hash=True, **where)
    except OSError as error:
        # diffusers takes "not in the cache, and no connection" for "not in the repository".
        if isinstance(error.__context__, LocalEntryNotFoundError):
            raise OSError(
                f"{name} is not in the cache, and the Hub was not asked or not reached: {error.__context__}"
            ) from error
        raise
    # All files of one commit, whatever is pushed meanwhile.
    return index, where if commit is None else where | {"revision": commit}


def load_part(load: Callable[..., Any], name: str | os.PathLike[str], part: str, where: dict[str, Any]) -> Any:
    """A part of a pipeline, from the folder of its name or, as in repositories of 2022, from the root.

    Args:
        load: of the part's class, `from_pretrained`.
        name: a folder, or the name of a Hub repository.
        part: its name in model_index.json.
        where: arguments of `from_pretrained`.

    Raises:
        OSError, ValueError: as `load`.
    """
    loaded = _loaded(load, name, part, where)
    # As diffusers' loader says of each component that it reads itself.
    logger.info(f"Loaded {part} as {type(loaded).__name__} from {name}.")
    return loaded


def _loaded(load: Callable[..., Any], name: str | os.PathLike[str], part: str, where: dict[str, Any]) -> Any:
    if os.path.isdir(name):
        folder = Path(name, part)
        return load(folder if folder.is_dir() else name, **where)
    try:
        return load(name, subfolder=part, **where)
    except OSError as error:
        if not isinstance(error.__context__, EntryNotFoundError):
            raise
        try:
            return load(name, **where)
        except OSError:
            raise error from None


def load_parts(
    name: str | os.PathLike[str], index: dict[str, Any], where: dict[str, Any], given: dict[str, Any]
) -> tuple[Any, Any]:
    """The transformer and the scheduler of a pipeline of more parts, and nothing else of it.

    Args:
        name: a folder, or the name of a Hub repository.
        index: the content of its model_index.json.
        where: arguments of `from_pretrained`.
        given: to `DDPMVLBPipeline.from_pretrained`: what is of the weights is passed on, a network (`unet` or
            `transformer`) and a scheduler are taken.

    Raises:
        OSError, ValueError: as `load_part`; a class that is none of diffusers' for its part; anything else given.
    """
    parts = {"transformer" if part == "unet" else part: own for part, own in given.items() if part in _PARTS}
    unknown = sorted(set(given) - {*_PARTS, *_OF_WEIGHTS, *HUB_OPTIONS, "trust_remote_code"})
    if unknown or {"unet", "transformer"} <= given.keys():
        raise ValueError(
            f"`from_pretrained` of a pipeline with a transformer takes it or `unet`, `scheduler`, {list(_OF_WEIGHTS)} "
            f"and the Hub's options, but got {unknown or ['unet', 'transformer']}: leave them out."
        )
    of_weights = {key: given[key] for key in _OF_WEIGHTS if key in given}
    kinds: Any = (("transformer", ModelMixin, of_weights), ("scheduler", SchedulerMixin, {}))
    for part, base, options in kinds:
        if part not in parts:
            load = functools.partial(_stock_class(part, index[part], base).from_pretrained, **options)
            parts[part] = load_part(load, name, part, where)
    return parts["transformer"], parts["scheduler"]


def _stock_class(part: str, entry: tuple[str, str], base: type) -> Any:
    cls = getattr(diffusers, entry[1], None) if entry[0] == "diffusers" else None
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise ValueError(f"model_index.json must give `{part}` as a class of diffusers, but gives {entry!r:.80}.")
    return cls


@contextlib.contextmanager
def weights_of(name: str | os.PathLike[str], use_safetensors: bool) -> Iterator[None]:
    """Say the way to weights that are pickles only, where only safetensors are taken.

    Args:
        name: a folder, or the name of a Hub repository.
        use_safetensors: take nothing else.

    Raises:
        OSError: no weights, with the way.
    """
    try:
        yield
    except OSError as error:
        if not use_safetensors or "safetensors" not in str(error):
            raise
        raise OSError(
            f"{name} lacks weights in safetensors: {' '.join(str(error).split())[:300]} If it has pickles (.bin), "
            "which run code when they are read, and you trust them, convert them: `DDPMVLBPipeline.from_pretrained("
            f"{str(name)!r}, use_safetensors=False).save_pretrained(folder)`."
        ) from error


def write_code(folder: Path) -> None:
    """Write this package's modules, and the pipeline.py that diffusers looks for, into a folder.

    Args:
        folder: where model_index.json lies; made if it is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in _CODE:
        source = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
        (folder / f"{name}.py").write_text(_SIBLING.sub("from . ", source), encoding="utf-8")
    imports = "\n".join(f"from .{name} import {public}" for name, public in _CODE.items())
    (folder / "pipeline.py").write_text(f"{_PIPELINE_FILE}{imports}\n", encoding="utf-8")


def forget_origin(folder: Path) -> None:
    """Take diffusers' note of where a pipeline was loaded from, a path of this machine, out of its saved files.

    Args:
        folder: where model_index.json lies.
    """
    for file in (folder / "model_index.json", *folder.glob("*/config.json"), *folder.glob("*/*_config.json")):
        config = json.loads(file.read_text(encoding="utf-8"))
        if config.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_card(
    folder: Path, api: HfApi, repo_id: str, card: ModelCard | None, default: Callable[[], ModelCard]
) -> None:
    """Write a card into a folder that is about to be uploaded, unless the repository shall keep its own.

    Args:
        folder: where model_index.json lies.
        api: of the Hub.
        repo_id: the repository.
        card: None keeps the repository's own.
        default: makes one where there is none.
    """
    if card is None and api.file_exists(repo_id, "README.md"):
        logger.warning(f"{repo_id} keeps its model card. If it describes other weights, pass `card=`.")
        return
    (default() if card is None else card).save(folder / "README.md")
