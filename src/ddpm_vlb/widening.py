"""A learned variance for a network that was trained without one: twice its output channels, and nothing else moved.

1. log sigma_t^2 = v' log beta_t + (1 - v') log betatilde_t,  v' = (v + 1) / 2
2. v = -1 is fixed_small, v = +1 is fixed_large

The last convolution gets a variance half of zero weights and of the bias v, so that the network puts out the same v
for every x_t and t until it is trained. Source: Nichol & Dhariwal 2021, eq. 15.
"""

import copy
from typing import Any

import torch
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import nn

from .scheduling_ddpm_vlb import DDPMVLBScheduler

_OUTPUTS = {"fixed_small": -1.0, "fixed_large": 1.0}


def with_learned_range(unet: Any, scheduler: SchedulerMixin) -> tuple[Any, DDPMVLBScheduler]:
    """A copy of a fixed-variance network with a variance half, and its scheduler with `variance_type="learned_range"`.

    Stock's DDPMPipeline and ours sample the two as they sampled the old ones, and each term of the bound is the old
    one but for fixed_large's first, t = 0: there learned_range goes up to beta_1, where fixed_large borrows
    betatilde_2. What the scheduler stores for few steps, found for the old variances, is left out.

    Args:
        unet: a `UNet2DModel`, `UNet2DConditionModel` or another network that ends in the convolution `conv_out`, with
            C output channels, as many as it takes. It stays as it is.
        scheduler: its stock `DDPMScheduler` or `DDPMVLBScheduler`, with a fixed `variance_type`.

    Raises:
        ValueError: another scheduler, a variance that is learned or optimal, or a network that has other channels or
            changes the output of `conv_out`.
    """
    value, channels = _variance_output(scheduler), _mean_channels(unet)
    wide = copy.deepcopy(unet)
    conv = wide.conv_out
    weight, bias = conv.weight.detach(), conv.bias.detach()
    conv.weight = nn.Parameter(torch.cat([weight, torch.zeros_like(weight)]))
    conv.bias = nn.Parameter(torch.cat([bias, torch.full_like(bias, value)]))
    conv.out_channels = 2 * channels
    wide.register_to_config(out_channels=2 * channels)
    config = {key: own for key, own in scheduler.config.items() if key != "few_steps_file"}
    return wide, DDPMVLBScheduler.from_config(config, variance_type="learned_range")


def _variance_output(scheduler: SchedulerMixin) -> float:
    """The v of the variance that a scheduler fixes."""
    if not isinstance(scheduler, (DDPMScheduler, DDPMVLBScheduler)):
        raise ValueError(
            f"`scheduler` must be a DDPMScheduler with a fixed variance, but is a {type(scheduler).__name__}. Of a "
            "chain of betas make one, `DDPMScheduler.from_config(scheduler.config)`."
        )
    variance_type = scheduler.config.variance_type
    if str(variance_type).startswith("learned"):
        raise ValueError(
            f"`scheduler` must have a fixed `variance_type`, but has {variance_type!r}: its network learns the "
            "variance already. Train it as it is."
        )
    if scheduler.config.get("reverse_variance", "network") != "network":
        raise ValueError(
            f"`scheduler` must take its variance from `variance_type`, but its `reverse_variance` is "
            f"{scheduler.config.reverse_variance!r}. Remove what is stored, `scheduler.store_few_steps()`."
        )
    return _OUTPUTS[DDPMVLBScheduler.from_config(scheduler.config).config.variance_type.removesuffix("_log")]


def _mean_channels(unet: Any) -> int:
    """C, of a network whose output is that of `conv_out`."""
    conv, name, config = getattr(unet, "conv_out", None), type(unet).__name__, getattr(unet, "config", {})
    if not isinstance(conv, nn.Conv2d) or conv.bias is None:
        raise ValueError(
            f"`unet` must end in a convolution `conv_out` with a bias, as UNet2DModel, but {name} has none."
        )
    if "in_channels" not in config:
        raise ValueError(f"`unet` must tell `in_channels` in its `config`, as UNet2DModel, but {name} does not.")
    inputs, outputs = config["in_channels"], conv.out_channels
    if outputs == 2 * inputs:
        raise ValueError(
            f"`unet` must have {inputs} output channels, as many as it takes, but has {outputs}: a variance half is "
            "there already. If it was trained, `DDPMVLBScheduler.from_config(config, variance_type='learned_range')`."
        )
    if outputs != inputs:
        raise ValueError(f"`unet` must have {inputs} output channels, as many as it takes, but has {outputs}.")
    blocks = [block for block in config.get("up_block_types", ()) if "Skip" in block]
    if blocks or config.get("time_embedding_type") == "fourier":
        what = f"adds those of {blocks[0]} to" if blocks else "divides by t"
        raise ValueError(f"`unet` must put out what `conv_out` does, but {name} {what} it: train one without.")
    return int(outputs)
