"""Checkpoints of flow matching, EDM and their kin: stock's network and scheduler, and beside them a chain of ours.

The network is a v-prediction of a VP chain (see gaussian_paths). What there is to choose of it, the ratios, the levels
of the data, the variance, and few steps, is a `DDPMVLBScheduler` of its own, in the folder `chain/`.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import logging
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor

from .few_step_store import STORED_FILES
from .gaussian_paths import GaussianPath, spaced_ratios
from .path_configurations import is_path, read_path
from .scheduling_ddpm_vlb import DDPMVLBScheduler

logger = logging.get_logger(DiffusionPipeline.__module__)
CHAIN_FOLDER = "chain"
CHAIN_STEPS, CHAIN_HIGH = 1000, 100.0
_CONFIG = "scheduler_config.json"
_KINDS = {"flow": "flow matching", "edm": "EDM", "cosine": "EDM, told (2/pi) atan sigma"}
# Stock's classes that honour `set_timesteps(sigmas=)`, with the key of the shift that they apply to them.
_SHIFTS = {
    "FlowMatchEulerDiscreteScheduler": "shift",
    "UniPCMultistepScheduler": "flow_shift",
    "EulerDiscreteScheduler": None,
}
# What makes another grid of sigmas that are given.
_REMADE = ("use_dynamic_shifting", "shift_terminal", "use_exponential_sigmas", "use_beta_sigmas", "use_karras_sigmas")


def path_chain(
    scheduler: SchedulerMixin,
    levels: int | None = 256,
    ratios: Tensor | None = None,
    variance_type: str = "fixed_small",
    **options: Any,
) -> DDPMVLBScheduler:
    """The chain of a Gaussian path's network: the levels that it is scored on and sampled by.

    Args:
        scheduler: stock's, of flow matching or of the EDM family.
        levels: number of levels of the data on [-1, 1]; None for continuous data, which nothing clips unless told.
        ratios: r = s / a, rising, (T,); None takes 1000, even in log SNR, from 0.4 bins of the data, or from the
            lowest of stock's own grid where it is continuous, to 100.
        variance_type: as of `DDPMVLBScheduler`. A fixed one takes log r_1^2 for the decoder, of the first level
            that is visited.
        options: further configuration of `DDPMVLBScheduler`. A `decoder_log_variance` of yours is of the first level
            alone: of fewer steps that begin later, the decoder has the variance type's own.

    Raises:
        ValueError: a scheduler of no Gaussian path, or as `GaussianPath.from_config` and `DDPMVLBScheduler`.

    Source: docs/schedulers.md.
    """
    if ratios is None:
        low = _lowest(scheduler) if levels is None else None
        ratios = spaced_ratios(low, CHAIN_HIGH, CHAIN_STEPS, levels)
    forward = GaussianPath.from_config(scheduler, ratios).reverse_process(levels).forward
    first = None if variance_type.startswith("learned") else 2 * math.log(float(ratios[0]))
    return DDPMVLBScheduler(
        **{
            "trained_betas": forward.betas.tolist(),
            "prediction_type": "v_prediction",
            "variance_type": variance_type,
            "levels": levels,
            "clip_sample": levels is not None,
            "timestep_spacing": "linspace",  # from the last level, whose noise is the prior, to the first
            "decoder_log_variance": first,
            **options,
        }
    )


def default_chain(scheduler: SchedulerMixin, network: Any) -> DDPMVLBScheduler:
    """The chain of a checkpoint that has none.

    Args:
        scheduler: stock's.
        network: whose output has a variance half, or not; a transformer is one of latents, which nothing clips.
    """
    channels, out = network.config.get("in_channels"), network.config.get("out_channels")
    learned = channels is not None and out == 2 * channels
    levels = 256 if network.config.get("patch_size") is None else None
    return path_chain(scheduler, levels, variance_type="learned_range" if learned else "fixed_small")


def _lowest(scheduler: SchedulerMixin) -> float:
    """The lowest ratio of stock's own grid."""
    kind, sigmas, options = read_path(scheduler)
    low = 1 / options["num_train_timesteps"] if sigmas is None else float(sigmas[0])
    return low / (1 - low) if kind == "flow" else low


def path_of(scheduler: SchedulerMixin, chain: DDPMVLBScheduler) -> GaussianPath:
    """The path of a stock scheduler on the levels of a chain.

    Args:
        scheduler: stock's.
        chain: ours.

    Raises:
        ValueError: as `GaussianPath.from_config`.
    """
    return GaussianPath.from_config(scheduler, ratios_of(chain))


def ratios_of(chain: DDPMVLBScheduler) -> Tensor:
    """r = s / a of a chain's levels, float64 (T,).

    Args:
        chain: ours.
    """
    log_abar = chain.reverse_process(dtype=torch.float64).forward.log_alphas_cumprod
    return torch.expm1(-log_abar).sqrt()


def check_chain(scheduler: SchedulerMixin, chain: Any) -> None:
    """Refuse what is no chain of a path's network.

    Args:
        scheduler: stock's.
        chain: what is to be its chain.

    Raises:
        ValueError: another class or prediction type, or levels that the path does not have.
    """
    if not isinstance(chain, DDPMVLBScheduler):
        raise ValueError(
            f"`chain` must be a DDPMVLBScheduler, as `path_chain` makes one, but is a {type(chain).__name__}."
        )
    if chain.config.prediction_type != "v_prediction":
        raise ValueError(
            f"`chain` must have prediction_type='v_prediction', which every path's network is on its chain, but has "
            f"{chain.config.prediction_type!r}: make it with `path_chain`."
        )
    path_of(scheduler, chain)


def without_path(scheduler: SchedulerMixin, chain: DDPMVLBScheduler | None) -> SchedulerMixin:
    """A scheduler of betas, which is its own chain, unless the network is a path's.

    Args:
        scheduler: of the pipeline.
        chain: of the path whose scheduler it had before; None where there was none.

    Raises:
        ValueError: the network's chain is a path's.
    """
    if chain is None:
        return scheduler
    raise ValueError(
        f"`scheduler`, a {type(scheduler).__name__}, walks betas, but the network is that of a Gaussian path, whose "
        "chain this pipeline holds: put the path's scheduler back, or make a new pipeline of the network."
    )


def load_chain(name: str | os.PathLike[str], where: dict[str, Any]) -> DDPMVLBScheduler | None:
    """The chain beside a pipeline's files; None where there is none.

    Args:
        name: a folder, or the name of a Hub repository.
        where: arguments of `from_pretrained`.

    Raises:
        OSError, ValueError: as `DDPMVLBScheduler.from_pretrained`.
    """
    if os.path.isdir(name) and not Path(name, CHAIN_FOLDER, _CONFIG).is_file():
        return None
    try:
        return DDPMVLBScheduler.from_pretrained(name, subfolder=CHAIN_FOLDER, **where)
    except OSError as error:
        cause = error.__context__
        if not isinstance(cause, EntryNotFoundError):
            raise
        if isinstance(cause, LocalEntryNotFoundError) and not _known_absent(str(name), where):
            logger.warning(
                f"{name}: whether it has a {CHAIN_FOLDER}/ is not in the cache, and the Hub was not asked or not "
                "reached. It is scored and sampled by the default chain."
            )
        return None


def chain_with(pipeline: Any) -> DDPMVLBScheduler | None:
    """The chain that goes with a pipeline, set or beside the files that it was loaded from; None where there is none.

    The Hub is not asked.

    Args:
        pipeline: ours or a stock one.

    Raises:
        OSError, ValueError: as `load_chain`.
    """
    if hasattr(pipeline, "_chain"):
        return pipeline._chain
    name = pipeline.config.get("_name_or_path")
    try:
        return None if name is None else load_chain(name, {"local_files_only": True})
    except OSError as error:
        if not isinstance(error.__context__, HFValidationError):
            raise
        logger.warning(f"{name} is gone, and whether it had a {CHAIN_FOLDER}/: the default chain is taken.")
        return None


def _known_absent(name: str, where: dict[str, Any]) -> bool:
    file = f"{CHAIN_FOLDER}/{_CONFIG}"
    found = try_to_load_from_cache(name, file, where.get("cache_dir"), where.get("revision"))
    return found is not None and not isinstance(found, str)  # the cache's mark of a file that does not exist


def save_chain(chain: DDPMVLBScheduler | None, folder: Path) -> None:
    """Write a chain beside a pipeline's files, in place of an earlier one.

    Args:
        chain: None leaves none there.
        folder: where model_index.json lies.
    """
    if chain is None:
        for stale in [file for pattern in (_CONFIG, *STORED_FILES) for file in (folder / CHAIN_FOLDER).glob(pattern)]:
            stale.unlink()
    else:
        chain.save_pretrained(folder / CHAIN_FOLDER)


def describe_path(pipeline: Any) -> dict[str, Any] | None:
    """What metrics.json and the card say of a network's path; None for a chain of betas.

    Args:
        pipeline: a `DDPMVLBPipeline`.

    Returns:
        `kind`, the class `scheduler`, `ratios` (the first and the last r of `pipeline.chain`, None where that is
        infinite), its number of `steps`, and whether it was `stored` in the checkpoint, or set.
    """
    if not is_path(pipeline.scheduler):
        return None
    ratios = ratios_of(pipeline.chain)
    return {
        "kind": _KINDS[read_path(pipeline.scheduler).kind],
        "scheduler": type(pipeline.scheduler).__name__,
        "ratios": [r if math.isfinite(r) else None for r in (float(ratios[0]), float(ratios[-1]))],
        "steps": len(ratios),
        "stored": pipeline._chain is not None,
    }


def stock_sigmas(pipeline: Any, timesteps: Sequence[int]) -> list[float] | None:
    """The sigmas by which stock's scheduler visits some steps of the chain, for its `set_timesteps(sigmas=)`.

    Args:
        pipeline: a `DDPMVLBPipeline`.
        timesteps: of its chain.

    Returns:
        falling, for Euler with the 0 that it wants at the end (UniPC wants a numpy array of them); None where stock's
        class takes none, or makes others of them, so that only `DDPMVLBPipeline` samples these steps.
    """
    config, name = pipeline.scheduler.config, type(pipeline.scheduler).__name__
    if name not in _SHIFTS or not is_path(pipeline.scheduler):
        return None
    key = _SHIFTS[name]
    if key is not None and any(config.get(own) for own in _REMADE):  # Euler leaves what it is given as it is
        return None
    sigmas = pipeline.path.sigmas(timesteps, 1.0 if key is None else float(config.get(key) or 1.0))
    return [*sigmas, 0.0] if name == "EulerDiscreteScheduler" else sigmas
