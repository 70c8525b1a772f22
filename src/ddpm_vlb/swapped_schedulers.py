"""Any scheduler of diffusers in our pipeline: what its `set_timesteps` and `step` take, and what stock samples."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DDPMParallelScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, UnCLIPScheduler
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import logging

from .path_configurations import readable
from .scheduling_ddpm_vlb import DDPMVLBScheduler

logger = logging.get_logger(DiffusionPipeline.__module__)
# The schedulers whose `step` takes the variance half of the channels; all others get the mean half only.
_TAKES_VARIANCE = (DDPMVLBScheduler, DDPMScheduler, DDPMParallelScheduler, UnCLIPScheduler)


def takes_variance(scheduler: SchedulerMixin) -> bool:
    """Whether its `step` takes the variance half of the network's output.

    Args:
        scheduler: any.
    """
    learned = str(scheduler.config.get("variance_type", "")).startswith("learned")
    return learned and isinstance(scheduler, _TAKES_VARIANCE)


def is_portable(pipeline: Any) -> bool:
    """Whether stock's DDPMPipeline samples a pipeline's network and scheduler rightly, and is what we save it as.

    Args:
        pipeline: ours.
    """
    scheduler, config, shape = pipeline.scheduler, pipeline.unet.config, pipeline.sample_shape
    flow = type(scheduler) is FlowMatchEulerDiscreteScheduler
    if flow and (scheduler.config.use_dynamic_shifting or not readable(scheduler)):
        return False
    if not flow and type(scheduler) not in (DDPMVLBScheduler, DDPMScheduler):
        return False
    if config.get("class_embed_type") is not None or pipeline.num_classes is not None:
        return False
    if shape is None or len(shape) != 3:  # stock's makes images (H, W)
        return False
    chain = pipeline.chain
    if float(chain.alphas_cumprod[-1]) == 0 and chain.config.prediction_type == "epsilon":
        return False
    variance_type = chain.config.variance_type
    learned = variance_type == "learned_range" and not flow
    return variance_type != "learned" and (
        config.get("out_channels") == config.get("in_channels") * (2 if learned else 1)
    )


@contextmanager
def mean_half_whole(scheduler: SchedulerMixin) -> Iterator[None]:
    """Hide a learned variance type where it has no use: the DPM-Solvers then cut their input to 3 channels.

    Args:
        scheduler: any.
    """
    variance_type = scheduler.config.get("variance_type")
    hide = str(variance_type).startswith("learned") and not isinstance(scheduler, _TAKES_VARIANCE)
    if hide:
        scheduler.register_to_config(variance_type=None)
    try:
        yield
    finally:
        if hide:
            scheduler.register_to_config(variance_type=variance_type)


def set_timesteps(
    scheduler: SchedulerMixin,
    num_inference_steps: int | None,
    timesteps: Sequence[int] | None,
    timestep_spacing: str | None,
    eta: float | None,
    device: torch.device,
) -> None:
    """Choose the steps to visit, or all of them.

    Args:
        scheduler: any.
        num_inference_steps: K; the whole training chain when neither this nor `timesteps` is given.
        timesteps: the steps to visit.
        timestep_spacing: of K steps; for ours alone.
        eta: of DDIM; None is 1.
        device: where the timesteps shall live.

    Raises:
        ValueError: both, or what this scheduler does not take.
    """
    if num_inference_steps is not None and timesteps is not None:
        raise ValueError("Pass only one of `num_inference_steps` and `timesteps`.")
    options: dict[str, Any] = {}
    if isinstance(scheduler, DDPMVLBScheduler):
        options = {"timestep_spacing": timestep_spacing, "eta": 1.0 if eta is None else eta}
    elif timestep_spacing is not None:
        raise ValueError(f"{type(scheduler).__name__} takes no `timestep_spacing` here: it is in its configuration.")
    if timesteps is None:
        num = scheduler.config.num_train_timesteps if num_inference_steps is None else num_inference_steps
        scheduler.set_timesteps(num, device=device, **options)
    elif "timesteps" in inspect.signature(scheduler.set_timesteps).parameters:
        scheduler.set_timesteps(timesteps=list(timesteps), device=device, **options)
    else:
        raise ValueError(f"{type(scheduler).__name__} takes no `timesteps`: pass `num_inference_steps`.")


def step_options(scheduler: SchedulerMixin, generator: Any, eta: float | None) -> dict[str, Any]:
    """The arguments of `step` that not every scheduler takes.

    Args:
        scheduler: any, its timesteps set.
        generator: source of the noise.
        eta: of DDIM, if it is asked for.

    Raises:
        ValueError: `eta`, where the scheduler does not take it.
    """
    accepts = inspect.signature(scheduler.step).parameters
    options: dict[str, Any] = {"generator": generator} if "generator" in accepts else {}
    if eta is not None and not isinstance(scheduler, DDPMVLBScheduler):
        if "eta" not in accepts:
            raise ValueError(f"{type(scheduler).__name__} takes no `eta`: leave it out.")
        options["eta"] = eta
    if "prev_timestep" in accepts:  # UnCLIP takes t - 1 unless told
        options["prev_timestep"] = None
    return options


def warn_of_another_chain(scheduler: SchedulerMixin) -> None:
    """Warn of a scheduler that does not know of a configuration's zero-terminal SNR.

    Args:
        scheduler: any.
    """
    if scheduler.config.get("rescale_betas_zero_snr") and scheduler.alphas_cumprod[-1] > 1e-6:
        logger.warning(
            f"{type(scheduler).__name__} does not know `rescale_betas_zero_snr` and samples another chain "
            "than this network was trained on. Take one that does, such as DDIMScheduler."
        )


def not_finite(scheduler: SchedulerMixin, num_steps: int) -> str:
    """What to say of samples with NaN or infinity where the network's outputs were finite.

    Args:
        scheduler: any.
        num_steps: of the walk.
    """
    said = f"{type(scheduler).__name__} or a callback gave values that are not finite in {num_steps} steps."
    if isinstance(scheduler, DDPMVLBScheduler):
        return f"{said} The network's outputs were finite: are they of the size of its `prediction_type`?"
    return f"{said} Multistep solvers need fewer steps than the chain has: pass a smaller `num_inference_steps`."
