"""Train a class-conditional network with label dropout, score it with and without labels, and sample it with guidance.

    python examples/class_conditional.py

prints the test bits/dim given the labels and where none is told, which is worse because a tenth of the images is all
that teaches it; and the first with the cost of the label, which bounds -log p(x) too. It writes class_conditional.png:
a column for each digit, two rows of plain samples above two of guided ones.
"""

import math

import torch
from diffusers import DiffusionPipeline, UNet2DModel
from diffusers.utils import make_image_grid
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

from ddpm_vlb import (
    DDPMVLBPipeline,
    DDPMVLBScheduler,
    ImportanceTimesteps,
    ReverseProcess,
    VLBEstimate,
    beta_start_for_levels,
    covariance_eigenvalues,
    estimate_vlb,
    fit_pilot,
    vlb_loss,
)

NO_CLASS = 10  # the label after the ten digits: what the pipeline takes for "no class" too


def make_unet() -> UNet2DModel:
    """A small U-Net with a mean and a variance output and eleven labels."""
    blocks = dict(
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, block_out_channels=(32, 64)
    )
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=2,
        num_class_embeds=NO_CLASS + 1,
        layers_per_block=1,
        norm_num_groups=8,
        **blocks,
    )


def train_network(unet: UNet2DModel, reverse: ReverseProcess, images: Tensor, labels: Tensor, steps: int) -> None:
    """Minimise the bound given the label; a tenth of the labels are dropped, so that the network knows p(x) too."""
    timesteps = ImportanceTimesteps.from_gaussian_model(reverse.forward.alphas_cumprod, covariance_eigenvalues(images))
    optimizer = torch.optim.AdamW(unet.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=8e-3, total_steps=steps)
    for _ in range(steps):
        batch = torch.randint(len(images), (64,))
        x_0, told = images[batch], torch.where(torch.rand(64) < 0.1, NO_CLASS, labels[batch])
        t, weights = timesteps.sample(64)
        diffused = reverse.forward.diffuse(x_0, t, torch.randn_like(x_0))
        output = unet(diffused.x_t, reverse.forward.timesteps[t], class_labels=told).sample
        (weights * vlb_loss(reverse, output, diffused)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def sample_grid(pipeline: DiffusionPipeline, scales: tuple[float, ...], steps: int) -> Image.Image:
    """Two rows of the ten digits for each guidance scale, from the same noise."""
    pipeline.set_progress_bar_config(disable=True)
    digits, images = torch.arange(10).repeat(2), []
    for scale in scales:
        same = torch.Generator().manual_seed(0)
        images += pipeline(20, digits, guidance_scale=scale, num_inference_steps=steps, generator=same).images
    images = [image.resize((32, 32), Image.Resampling.NEAREST) for image in images]
    return make_image_grid(images, rows=2 * len(scales), cols=10)


def main(steps: int = 500, num_test: int = 297, sampling_steps: int = 100) -> list[VLBEstimate]:
    """Train, score the first `num_test` test images with their labels and without, sample."""
    torch.manual_seed(0)
    images = torch.tensor(load_digits().images[:, None] / 8 - 1, dtype=torch.float32)
    labels = torch.tensor(load_digits().target)
    train, test = slice(1500), slice(1500, 1500 + num_test)
    scheduler = DDPMVLBScheduler(beta_start=beta_start_for_levels(17), variance_type="learned_range", levels=17)
    unet, reverse = make_unet(), scheduler.reverse_process()
    train_network(unet, reverse, images[train], labels[train], steps)
    pilot = fit_pilot(unet.eval(), reverse, images[train], conditioning={"class_labels": labels[train]})
    scores = []
    for told in (labels[test], torch.full_like(labels[test], NO_CLASS)):
        score = estimate_vlb(unet, reverse, [(images[test], {"class_labels": told})], pilot)
        print(f"{score.bits_per_dim:.3f} +- {score.noise_se:.3f} (noise) +- {score.image_se:.3f} (images) bits/dim")
        scores.append(score)
    print(f"The first, and the label's own log2(10) bits: {scores[0].bits_per_dim + math.log2(10) / 64:.3f} bits/dim")
    sample_grid(DDPMVLBPipeline(unet, scheduler), (1.0, 3.0), sampling_steps).save("class_conditional.png")
    return scores


if __name__ == "__main__":
    main()
