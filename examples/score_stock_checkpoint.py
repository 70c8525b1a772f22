"""Score a stock DDPMPipeline, which knows nothing of likelihood, in bits/dim: the whole chain and shorter ones.

    python examples/score_stock_checkpoint.py [--model FOLDER]

FOLDER holds a DDPMPipeline of 8x8 digits; without one a small one is trained as diffusers' own script trains it, with
the mean squared error, and saved by DDPMPipeline. It prints the test bits/dim of 1000, 100 and 25 steps with their two
standard errors. The variances are fixed and the noise was chosen for 256 levels, so expect a bound that is not low.
"""

import argparse
import tempfile

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from sklearn.datasets import load_digits
from torch import Tensor

from ddpm_vlb import DDPMVLBPipeline, DDPMVLBScheduler, VLBEstimate, estimate_vlb, fit_pilot


def train_stock(images: Tensor, folder: str, steps: int) -> None:
    """Train and save a DDPMPipeline with nothing but diffusers."""
    blocks = dict(
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, block_out_channels=(32, 64)
    )
    unet = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=8, **blocks)
    scheduler = DDPMScheduler()
    optimizer = torch.optim.AdamW(unet.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    for batch in torch.randint(len(images), (steps, 32)):
        noise, timesteps = torch.randn(32, 1, 8, 8), torch.randint(1000, (32,))
        noisy = scheduler.add_noise(images[batch], noise, timesteps)
        torch.nn.functional.mse_loss(unet(noisy, timesteps).sample, noise).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    DDPMPipeline(unet, scheduler).save_pretrained(folder)


def score(pipeline: DDPMVLBPipeline, train: Tensor, test: Tensor, num_inference_steps: int) -> VLBEstimate:
    """Bits/dim of the test images under the chain that sampling with so many steps walks."""
    # A stock configuration does not say that the data has 17 levels.
    scheduler = DDPMVLBScheduler.from_config(pipeline.scheduler.config, levels=17)
    reverse = scheduler.reverse_process(num_inference_steps=num_inference_steps)
    pilot = fit_pilot(pipeline.unet, reverse, train)  # each chain has its bound in other places
    return estimate_vlb(pipeline.unet, reverse, test.split(64), pilot)


def main(folder: str | None = None, steps: int = 300, num_test: int = 297) -> dict[int, VLBEstimate]:
    """Train and save a stock pipeline where no folder is given, load it as ours, score it."""
    torch.manual_seed(0)
    images = torch.tensor(load_digits().images[:, None] / 8 - 1, dtype=torch.float32)
    train, test = images[:1500], images[1500:][:num_test]
    with tempfile.TemporaryDirectory() as temporary:
        if folder is None:
            train_stock(train, temporary, steps)
        pipeline = DDPMVLBPipeline.from_pretrained(folder or temporary)
    scores = {}
    for num in (1000, 100, 25):
        scores[num] = found = score(pipeline, train, test, num)
        errors = f"+- {found.noise_se:.3f} (noise) +- {found.image_se:.3f} (images)"
        print(f"{num} steps: {found.bits_per_dim:.3f} {errors} bits/dim")
    return scores


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="The pipeline's folder; default: train one.")
    main(parser.parse_args().model)
