"""Tiny networks with random weights, and pipelines of them."""

import numpy as np
import torch
from diffusers import DiTTransformer2DModel, UNet2DModel

from ddpm_vlb import DDPMVLBPipeline, DDPMVLBScheduler


def tiny_unet(channels: int = 1, out: int | None = None, size=8, classes: int | None = None, seed: int = 0):
    """A U-Net of two blocks; with a variance half unless told."""
    torch.manual_seed(seed)
    return UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=2 * channels if out is None else out,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        layers_per_block=1,
        num_class_embeds=classes,
    ).eval()


def attentive(channels: int = 1, size: int = 8, **options):
    """A U-Net with attention, and a variance half."""
    torch.manual_seed(0)
    return UNet2DModel(
        **{
            "sample_size": size,
            "in_channels": channels,
            "out_channels": 2 * channels,
            "block_out_channels": (8, 16),
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "norm_num_groups": 4,
            "attention_head_dim": 4,
            "layers_per_block": 1,
        }
        | options
    ).eval()


def one_block_unet(channels: int = 1, learned: bool = True) -> UNet2DModel:
    """A U-Net of one block for images of 4x4, without attention."""
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=4,
        in_channels=channels,
        out_channels=channels * (1 + learned),
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        norm_num_groups=4,
        add_attention=False,
    ).eval()


def tiny_dit(channels: int = 2, classes: int = 3, seed: int = 0):
    """A class-conditional transformer with a variance half."""
    torch.manual_seed(seed)
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=channels,
        out_channels=2 * channels,
        num_layers=1,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=classes,
        norm_num_groups=4,
    )
    return model.eval()


def scheduler(variance_type: str = "learned_range", **config) -> DDPMVLBScheduler:
    """One for the networks' variance half."""
    return DDPMVLBScheduler(variance_type=variance_type, **config)


def quiet(pipe):
    """Without a progress bar."""
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pipeline(unet=None, **config) -> DDPMVLBPipeline:
    """A network and a scheduler of this configuration."""
    return quiet(DDPMVLBPipeline(tiny_unet() if unet is None else unet, scheduler(**config)))


def seeded(seed: int = 0) -> torch.Generator:
    """A generator."""
    return torch.Generator().manual_seed(seed)


def sample(pipe, seed: int = 0, steps: int = 4, **arguments) -> torch.Tensor:
    """Images in few steps, as tensors."""
    arguments = {"output_type": "pt", "num_inference_steps": steps, "generator": seeded(seed)} | arguments
    images = pipe(**arguments).images
    if arguments["output_type"] == "pt" and isinstance(images, np.ndarray):  # stock's pipeline before diffusers 0.41
        return torch.from_numpy(images).permute(0, 3, 1, 2)
    return images


def spy_on_step(pipe, monkeypatch) -> list[dict]:
    """Record what the scheduler's step is given."""
    calls: list[dict] = []
    step = pipe.scheduler.step

    def spied(model_output, timestep, image, **options):
        calls.append({"output": model_output, "timestep": timestep, "image": image})
        return step(model_output, timestep, image, **options)

    # The pipeline looks at the signature of `step` to learn its options.
    spied.__wrapped__ = step
    monkeypatch.setattr(pipe.scheduler, "step", spied)
    return calls
