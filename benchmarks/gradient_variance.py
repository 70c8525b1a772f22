"""Variance of the gradient of L_vlb under each timestep sampler, on a trained digits model.

ddpm-vlb train && python benchmarks/gradient_variance.py --model runs/digits

The figure is the trace of the gradient's covariance over batches of fresh images, t and noise, relative to uniform t;
the standard error is a jackknife over the batches.
"""

import argparse

import torch
from environment import describe
from tqdm.auto import tqdm

from ddpm_vlb import (
    DDPMVLBPipeline,
    ImportanceTimesteps,
    LossSecondMomentTimesteps,
    LowDiscrepancyTimesteps,
    UniformTimesteps,
    covariance_eigenvalues,
    vlb_loss,
)
from ddpm_vlb.runtime.image_data import load_image_data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="runs/digits")
    parser.add_argument("--batches", type=int, default=100)
    parser.add_argument("--batch_size", type=int, default=64)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(describe() + "\n")
    pipeline = DDPMVLBPipeline.from_pretrained(args.model)
    unet, reverse = pipeline.unet, pipeline.scheduler.reverse_process()
    images = torch.cat(list(load_image_data().train.batches(256)))
    steps = len(reverse.forward)

    def losses(t: torch.Tensor) -> torch.Tensor:
        x_0 = images[torch.randint(len(images), (len(t),))]
        diffused = reverse.forward.diffuse(x_0, t, torch.randn_like(x_0))
        return vlb_loss(reverse, unet(diffused.x_t, reverse.forward.timesteps[t]).sample, diffused)

    warm = LossSecondMomentTimesteps(steps)
    with torch.no_grad():
        for t in tqdm(torch.arange(steps).repeat(10).split(500), desc="Filling the loss history"):
            warm.update(t, losses(t))
    samplers = {
        "uniform": UniformTimesteps(steps),
        "low-discrepancy": LowDiscrepancyTimesteps(steps),
        "loss second moment (iDDPM), warmed up": warm,
        "Gaussian data model": ImportanceTimesteps.from_gaussian_model(
            reverse.forward.alphas_cumprod, covariance_eigenvalues(images)
        ),
    }
    squares: dict[str, torch.Tensor] = {}
    for name, sampler in samplers.items():
        gradients = []
        for _ in tqdm(range(args.batches), desc=name):
            t, weights = sampler.sample(args.batch_size)
            gradient = torch.autograd.grad((weights * losses(t)).mean(), list(unet.parameters()))
            gradients.append(torch.cat([g.flatten() for g in gradient]))
        stacked = torch.stack(gradients)
        squares[name] = (stacked - stacked.mean(0)).square().sum(1)  # their mean is the trace, up to (n - 1) / n
    print("| sampler | trace of the gradient's covariance, uniform = 1 | times smaller |")
    print("| --- | --- | --- |")
    base, n = squares["uniform"].sum(), args.batches
    for name, square in squares.items():
        ratio = square.sum() / base
        leave_one = (square.sum() - square) / (base - squares["uniform"])
        error = ((n - 1) / n * (leave_one - leave_one.mean()).square().sum()).sqrt()
        print(f"| {name} | {ratio:.4f} +- {error:.4f} | {1 / ratio:.1f} |")


if __name__ == "__main__":
    main()
