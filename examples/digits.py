"""Train a network with learned variance on scikit-learn's digits, score it in bits/dim, and save it for diffusers.

    python examples/digits.py

prints the test bits/dim with its two standard errors beside three codes that anyone has, and writes a pipeline that
`diffusers.DiffusionPipeline.from_pretrained` loads to runs/digits-example.
"""

import lzma
import math

import torch
from diffusers import UNet2DModel
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

LEVELS = 17  # the digits hold the integers 0 .. 16


def make_unet() -> UNet2DModel:
    """A small U-Net with twice the output channels: one half for the mean, one for the variance."""
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=2,
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        add_attention=False,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )


def train_network(unet: UNet2DModel, reverse: ReverseProcess, images: Tensor, steps: int) -> None:
    """Minimise the bound, with t drawn where a Gaussian model of the images expects it."""
    timesteps = ImportanceTimesteps.from_gaussian_model(reverse.forward.alphas_cumprod, covariance_eigenvalues(images))
    optimizer = torch.optim.AdamW(unet.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=8e-3, total_steps=steps)
    for step in range(steps):
        x_0 = images[torch.randint(len(images), (64,))]
        t, weights = timesteps.sample(len(x_0))
        diffused = reverse.forward.diffuse(x_0, t, torch.randn_like(x_0))
        output = unet(diffused.x_t, reverse.forward.timesteps[t]).sample
        loss = (weights * vlb_loss(reverse, output, diffused)).mean()  # bits/dim, but for L_T
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}: {loss.item():.2f} bits/dim in this batch")


def baselines(train: Tensor, test: Tensor) -> dict[str, float]:
    """Bits/dim of the test images in a uniform code, in lzma, and by a histogram of each pixel's training values."""
    fitted, scored = (((images + 1) / 2 * (LEVELS - 1)).round().long() for images in (train, test))
    counts = torch.nn.functional.one_hot(fitted, LEVELS).sum(0) + 0.5  # no value is impossible
    mass = (counts / counts.sum(-1, keepdim=True)).expand(len(scored), -1, -1, -1, -1).gather(-1, scored[..., None])
    compressed = lzma.compress(scored.byte().numpy().tobytes(), preset=9 | lzma.PRESET_EXTREME)
    return {
        "uniform": math.log2(LEVELS),
        "lzma": 8 * len(compressed) / scored.numel(),
        "histogram of each pixel": float(-mass.log2().mean()),
    }


def main(steps: int = 500, num_test: int = 297, folder: str = "runs/digits-example") -> VLBEstimate:
    """Train, score the first `num_test` test images, compare, save."""
    torch.manual_seed(0)
    images = torch.tensor(load_digits().images[:, None] / 8 - 1, dtype=torch.float32)  # [-1, 1]
    train, test = images[:1500], images[1500:][:num_test]
    unet = make_unet()
    beta_start = beta_start_for_levels(LEVELS)
    scheduler = DDPMVLBScheduler(beta_start=beta_start, variance_type="learned_range", levels=LEVELS)
    reverse = scheduler.reverse_process()
    train_network(unet, reverse, train, steps)
    pilot = fit_pilot(unet.eval(), reverse, train)  # where the bound is, and so where to spend the network calls
    score = estimate_vlb(unet, reverse, test.split(64), pilot)
    print(f"{score.bits_per_dim:.3f} +- {score.noise_se:.3f} (noise) +- {score.image_se:.3f} (images) bits/dim")
    print(*(f"{name}: {bits:.2f}" for name, bits in baselines(train, test).items()), sep=", ")
    DDPMVLBPipeline(unet, scheduler).save_pretrained(folder)
    return score


if __name__ == "__main__":
    main()
