"""A checkpoint of fixed variance as the beginning of a run: its network with a variance half, and its chain."""

import argparse
from typing import Any

from diffusers import UNet2DModel

from ddpm_vlb import DDPMVLBScheduler, with_learned_range
from ddpm_vlb.runtime.image_data import ImageData
from ddpm_vlb.scoring.checkpoint import read_pipeline

# Options of the chain, and where a scheduler's configuration has them.
TAKEN = {
    "ddpm_num_steps": "num_train_timesteps",
    "ddpm_beta_schedule": "beta_schedule",
    "ddpm_beta_start": "beta_start",
    "ddpm_beta_end": "beta_end",
    "rescale_betas_zero_snr": "rescale_betas_zero_snr",
    "prediction_type": "prediction_type",
    "timestep_spacing": "timestep_spacing",
}


def pretrained_parts(args: argparse.Namespace, data: ImageData) -> tuple[DDPMVLBScheduler, UNet2DModel]:
    """The chain and the network of --pretrained; the options that they decide are set to what they say.

    Args:
        args: the options.
        data: the images.

    Raises:
        ValueError, OSError: a checkpoint that cannot be loaded, has no fixed variance, or is of other images.
    """
    named = f"--pretrained {args.pretrained}"
    where = argparse.Namespace(model=args.pretrained, revision=args.revision, cache_dir=args.cache_dir)
    pipeline = read_pipeline(where, "--pretrained")
    if not isinstance(pipeline.unet, UNet2DModel):
        raise ValueError(f"{named} has a {type(pipeline.unet).__name__}, but `ddpm-vlb train` trains a UNet2DModel.")
    try:
        unet, scheduler = with_learned_range(pipeline.unet.float(), pipeline.scheduler)
    except ValueError as error:
        raise ValueError(f"{named} gains no variance: {error}") from error
    _check_images(pipeline, data, named)
    scheduler = DDPMVLBScheduler.from_config(scheduler.config, levels=_levels(scheduler, data, named))
    _take(args, scheduler.config, named)
    unet.train()
    if args.freeze_mean:  # of the last convolution the mean's rows get no gradient, as L_vlb leaves the mean out
        unet.requires_grad_(False)
        unet.conv_out.requires_grad_(True)
    return scheduler, unet


def _check_images(pipeline: Any, data: ImageData, named: str) -> None:
    """Refuse a network of classes, or of other images than the data's."""
    if pipeline.num_classes is not None or pipeline.unet.config.class_embed_type is not None:
        raise ValueError(f"{named} takes classes, but `--pretrained` trains without labels: give one that takes none.")
    shape, own = pipeline.sample_shape, (data.channels, *data.size)
    if shape is None:
        shape = (pipeline.unet.config.in_channels, *data.size)
    if shape != own:
        raise ValueError(
            f"{named} is of images (C, H, W) {shape}, but the data's are {own}: give a fitting --resolution and "
            "--channels, or other data."
        )


def _levels(scheduler: DDPMVLBScheduler, data: ImageData, named: str) -> int:
    """Of the data; a checkpoint that says 256 may be stock's, which cannot say another number."""
    if scheduler.levels not in (256, data.levels):
        raise ValueError(f"{named} is of {scheduler.levels} levels, but the data has {data.levels}: see --levels.")
    return data.levels


def _take(args: argparse.Namespace, config: Any, named: str) -> None:
    """Set the options to what the checkpoint decides."""
    for option, name in TAKEN.items():
        setattr(args, option, config[name])
    if config["trained_betas"] is not None:
        args.ddpm_beta_schedule, args.ddpm_beta_start, args.ddpm_beta_end = "trained_betas", None, None
    if args.ddpm_num_inference_steps is None:
        args.ddpm_num_inference_steps = min(250, args.ddpm_num_steps)
    if args.ddpm_num_inference_steps > args.ddpm_num_steps:
        raise ValueError(
            f"--ddpm_num_inference_steps {args.ddpm_num_inference_steps} is more than the {args.ddpm_num_steps} steps "
            f"of {named}."
        )
