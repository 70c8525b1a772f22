"""From a fixed variance to a learned one: the bound of a stock checkpoint before and after, and its samples.

python benchmarks/widening.py

A `DDPMPipeline` of the 8x8 digits is trained with nothing but diffusers, by the mean squared error on stock's own
schedule. Its network is saved once as fixed_small and once as fixed_large, which differ in nothing that is trained.
Each is widened, and trained by `ddpm-vlb train --pretrained`: with its mean frozen, and by L_hybrid. The bound is that
of the 297 test images, of the process that stock samples, clipped, with 20 network calls for each image: of all 1000
steps, and of stock's 10. All share the seed; the pilot is each network's own. `s` is the CPU time of a training, its
picture included. The best variance is the optimal one of Bao et al. 2022, from the errors of 128 training images: one
number for each step, where the learned ones differ between pixels and images.
"""

import argparse
import contextlib
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from environment import describe
from sklearn.datasets import load_digits
from torch import Tensor
from tqdm.auto import tqdm

from ddpm_vlb import (
    DDPMVLBPipeline,
    DDPMVLBScheduler,
    VLBEstimate,
    collect_statistics,
    estimate_vlb,
    fit_pilot,
    spread_knots,
    with_learned_range,
)
from ddpm_vlb.commands import train

IMAGES, KNOTS = 128, 100  # of the best variance
KINDS = {"fixed_small": "betatilde_t", "fixed_large": "beta_t"}
WAYS = {"mean frozen": ["--freeze_mean"], "L_hybrid": []}


def train_stock(images: Tensor, steps: int) -> UNet2DModel:
    blocks = dict(
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, block_out_channels=(32, 64)
    )
    unet = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=8, **blocks)
    scheduler, optimizer = DDPMScheduler(), torch.optim.AdamW(unet.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    for batch in tqdm(torch.randint(len(images), (steps, 64)), desc="Stock's training"):
        noise, timesteps = torch.randn(64, 1, 8, 8), torch.randint(1000, (64,))
        noisy = scheduler.add_noise(images[batch], noise, timesteps)
        torch.nn.functional.mse_loss(unet(noisy, timesteps).sample, noise).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return unet.eval()


def scores(folder: Path, known: Tensor, test: Tensor, optimal: bool) -> list[VLBEstimate]:
    """The bounds of the processes that stock samples from a folder in all steps and in 10."""
    pipeline = DDPMVLBPipeline.from_pretrained(folder)
    scheduler = DDPMVLBScheduler.from_config(pipeline.scheduler.config, levels=17)
    whole = scheduler.reverse_process()
    processes = [whole, scheduler.reverse_process(num_inference_steps=10)]
    if optimal:
        statistics = collect_statistics(pipeline.unet, whole, known[:IMAGES], spread_knots(whole.forward, KNOTS))
        errors = statistics.errors(whole.forward, per_pixel=False)
        processes = [replace(own, x_0_mse=errors.at(own.forward.timesteps, "analytic")) for own in processes]
    return [
        estimate_vlb(pipeline.unet, own, test.split(100), fit_pilot(pipeline.unet, own, known)) for own in processes
    ]


def samples(folder: Path, steps: int) -> Tensor:
    """Images by stock's own pipeline."""
    pipeline = DDPMPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return torch.tensor(pipeline(8, generator, steps, output_type="np", return_dict=False)[0])


def row(name: str, folder: Path, known: Tensor, test: Tensor, seconds: str = "", optimal: bool = False) -> None:
    told = [f"{own.bits_per_dim:.3f} +- {own.noise_se:.3f}" for own in scores(folder, known, test, optimal)]
    print(f"| {name} | {told[0]} | {told[1]} | {seconds} |", flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stock_steps", type=int, default=500, help="Of stock's training.")
    parser.add_argument("--steps", type=int, default=400, help="Of each training after it.")
    parser.add_argument("--images", type=int, default=297, help="Test images.")
    parser.add_argument("--sampled_steps", type=int, default=250, help="Of the samples that are compared.")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(describe(), flush=True)
    images = torch.tensor(load_digits().images[:, None] / 8 - 1, dtype=torch.float32)
    known, test = images[:1500], images[1500:][: args.images]
    unet = train_stock(known, args.stock_steps)
    options = f"--cpu --logger none --max_train_steps {args.steps} --validation_steps {args.steps} --num_test_images 0"
    options += " --checkpointing_steps 0 --eval_batch_size 1 --ddpm_num_inference_steps 2"
    for kind, meaning in KINDS.items():
        with tempfile.TemporaryDirectory() as temporary:
            stock, wide = Path(temporary, "stock"), Path(temporary, "wide")
            pipeline = DDPMPipeline(unet, DDPMScheduler(variance_type=kind))
            pipeline.save_pretrained(stock)
            DDPMVLBPipeline(*with_learned_range(unet, pipeline.scheduler)).save_pretrained(wide)
            print(f"\n## {kind}, {meaning}\n\n| network | all 1000 steps | 10 steps | s |\n| --- | --- | --- | --- |")
            row("stock's", stock, known, test)
            row("the same, the best variance of each step", stock, known, test, optimal=True)
            row("widened", wide, known, test)
            for way, more in WAYS.items():
                folder, started = Path(temporary, way.replace(" ", "-")), time.process_time()
                with contextlib.redirect_stdout(sys.stderr):
                    train.main([*options.split(), *more, "--pretrained", str(stock), "--output_dir", str(folder)])
                row(way, folder, known, test, f"{time.process_time() - started:.0f}")
            gap = (samples(stock, args.sampled_steps) - samples(wide, args.sampled_steps)).abs().max()
            print(f"\nStock samples the widened network as its own: at most {gap:.1e} apart.", flush=True)


if __name__ == "__main__":
    main()
