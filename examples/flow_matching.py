"""Train a flow-matching network on digits with plain diffusers and accelerate; then its bound and its best ten steps.

    python examples/flow_matching.py

The training knows nothing of likelihood. It prints the test bits/dim of the whole chain and of ten steps, even ones
beside the best, with their two standard errors. runs/flow-example is a folder that stock diffusers loads, and
flow_matching.png has two rows each from ten steps: stock's own, stock's on the best levels, ours with its variance.
"""

from typing import Any

import torch
from accelerate import Accelerator
from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DModel
from diffusers.utils import make_image_grid, pt_to_pil
from sklearn.datasets import load_digits
from torch import Tensor

from ddpm_vlb import (
    DDPMVLBPipeline,
    StoredPath,
    VLBEstimate,
    collect_statistics,
    estimate_vlb,
    fit_pilot,
    optimal_paths,
    path_chain,
    spread_knots,
    step_costs,
)


def train_network(unet: UNet2DModel, scheduler: FlowMatchEulerDiscreteScheduler, images: Tensor, steps: int) -> None:
    """The squared error of noise - x_0 at sigmas drawn evenly."""
    accelerator, optimizer = Accelerator(cpu=True), torch.optim.AdamW(unet.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    unet, optimizer, schedule = accelerator.prepare(unet, optimizer, schedule)
    for x_0 in images[torch.randint(len(images), (steps, 64))]:
        noise, index = torch.randn_like(x_0), torch.randint(len(scheduler.timesteps), (len(x_0),))
        sigma = scheduler.sigmas[index].reshape(-1, 1, 1, 1)
        output = unet((1 - sigma) * x_0 + sigma * noise, scheduler.timesteps[index]).sample
        accelerator.backward(torch.nn.functional.mse_loss(output, noise - x_0))
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


@torch.no_grad()
def sample(unet: UNet2DModel, scheduler: FlowMatchEulerDiscreteScheduler, noise: Tensor, **levels) -> Tensor:
    """Stock's own loop, on levels of ours or of its own."""
    scheduler.set_timesteps(**levels)
    for timestep in scheduler.timesteps:
        noise = scheduler.step(unet(noise, timestep).sample, timestep, noise).prev_sample
    return noise


def store_best(pipeline: DDPMVLBPipeline, images: Tensor, steps: int) -> list[int]:
    """Find the best levels for a number of steps, and the optimal variances, and store both."""
    reverse = pipeline.chain.reverse_process()
    statistics = collect_statistics(pipeline.network, reverse, images, spread_knots(reverse.forward, 100))
    costs = step_costs(statistics, reverse, "per_pixel")
    indices = optimal_paths(costs.transitions, costs.decoder, steps).indices(steps)
    best = StoredPath(tuple(indices[::-1]), "per_pixel", float(costs.shift[indices[0]]))
    pipeline.chain.store_few_steps([best], statistics.errors(reverse.forward), reverse_variance="analytic")
    return indices


def main(steps: int = 600, num_test: int = 297, num_fit: int = 256, folder: str = "runs/flow-example"):
    """Train, find the best ten steps, score on the first `num_test` test images, save, sample."""
    torch.manual_seed(0)
    images = torch.tensor(load_digits().images[:, None] / 8 - 1, dtype=torch.float32)
    train, test = images[:1500], images[1500:][:num_test]
    blocks = dict(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, layers_per_block=1)
    sizes = dict(sample_size=8, in_channels=1, out_channels=1, block_out_channels=(32, 64), norm_num_groups=8)
    unet, scheduler = UNet2DModel(**sizes, **blocks), FlowMatchEulerDiscreteScheduler()
    train_network(unet, scheduler, train, steps)
    pipeline: Any = DDPMVLBPipeline(unet.eval(), scheduler)
    pipeline.chain = path_chain(scheduler, levels=17)  # 1000 levels even in log SNR, from 0.4 bins on
    indices = store_best(pipeline, train[:num_fit], 10)
    ten: dict[str, Any] = {"num_inference_steps": 10}
    chains = {"1000 steps": {}, "10 even steps": {**ten, "timestep_spacing": "linspace"}, "the best 10": ten}
    scores: dict[str, VLBEstimate] = {}
    for name, options in chains.items():
        p = pipeline.chain.reverse_process(**options)
        scores[name] = estimate_vlb(pipeline.network, p, test.split(64), fit_pilot(pipeline.network, p, train))
        print(f"{name}: {scores[name]}")
    pipeline.save_pretrained(folder)
    noise, levels = torch.randn(20, 1, 8, 8), dict(sigmas=pipeline.path.sigmas(indices))
    stock = [sample(unet, scheduler, noise, **own) for own in (ten, levels)]
    pipeline.set_progress_bar_config(disable=True)
    pictures = pt_to_pil(torch.cat(stock)) + pipeline(20, **ten).images
    make_image_grid([picture.resize((32, 32), resample=0) for picture in pictures], 6, 10).save("flow_matching.png")
    return scores


if __name__ == "__main__":
    main()
