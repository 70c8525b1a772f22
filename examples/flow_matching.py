"""Train a flow-matching network on digits with plain diffusers and accelerate; then its bound and its best ten steps.

    python examples/flow_matching.py

The training knows nothing of likelihood. What is printed is the bits/dim of the whole chain with its error bars, and
those of ten steps, even ones beside the best. flow_matching.png has samples by stock's scheduler: two rows on the best
ten levels, two on ten of its own.
"""

import dataclasses
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DModel
from diffusers.utils import make_image_grid, pt_to_pil
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

from ddpm_vlb import (
    GaussianPath,
    ReverseProcess,
    SquaredErrors,
    VLBEstimate,
    collect_statistics,
    estimate_vlb,
    fit_pilot,
    optimal_paths,
    spaced_ratios,
    spread_knots,
    step_costs,
)


def train_network(unet: UNet2DModel, scheduler: FlowMatchEulerDiscreteScheduler, images: Tensor, steps: int) -> None:
    """The squared error of noise - x_0 at sigmas drawn evenly."""
    accelerator, optimizer = Accelerator(cpu=True), torch.optim.AdamW(unet.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    drawn = RandomSampler(images, replacement=True, num_samples=64 * steps)
    loader = DataLoader(images, batch_size=64, sampler=drawn)
    unet, optimizer, schedule, loader = accelerator.prepare(unet, optimizer, schedule, loader)
    for x_0 in loader:
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


def shortened(chain: ReverseProcess, indices: Sequence[int], errors: SquaredErrors, variance: str) -> ReverseProcess:
    """The chain of some of the levels, with the variance that is optimal for the network's errors."""
    p = dataclasses.replace(chain, decoder_log_variance=None).respace(indices)
    return dataclasses.replace(p, x_0_mse=errors.at(p.forward.timesteps, variance))


def main(steps: int = 600, num_test: int = 297, num_fit: int = 256) -> dict[str, VLBEstimate]:
    """Train, score the whole chain and ten steps on the first `num_test` test images, sample."""
    torch.manual_seed(0)
    images = torch.tensor(load_digits().images[:, None] / 8 - 1, dtype=torch.float32)
    train, test = images[:1500], images[1500:][:num_test]
    blocks = dict(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, layers_per_block=1)
    sizes = dict(sample_size=8, in_channels=1, out_channels=1, block_out_channels=(32, 64), norm_num_groups=8)
    unet, scheduler = UNet2DModel(**sizes, **blocks), FlowMatchEulerDiscreteScheduler()
    train_network(unet, scheduler, train, steps)

    # A chain on the network's path: 1000 levels even in log SNR, from noise that fits the data's 17 levels on.
    path = GaussianPath.from_config(scheduler, spaced_ratios(None, 100.0, 1000, levels=17))
    network, chain = path.network(unet.eval()), path.reverse_process(levels=17)
    statistics = collect_statistics(network, chain, train[:num_fit], spread_knots(chain.forward, 100))
    errors, costs = statistics.errors(chain.forward), step_costs(statistics, chain, "per_pixel")
    best = optimal_paths(costs.transitions, costs.decoder, 10).indices(10)
    processes = {
        "1000 steps": shortened(chain, range(1000), errors, "analytic"),
        "10 even steps": shortened(chain, range(0, 1000, 111), errors, "analytic"),
        "the best 10": shortened(chain, best, errors, "per_pixel").respace(range(10), float(costs.shift[best[0]])),
    }
    scores = {}
    for name, p in processes.items():
        score = scores[name] = estimate_vlb(network, p, test.split(64), fit_pilot(network, p, train))
        print(f"{name}: {score.bits_per_dim:.3f} +- {score.noise_se:.3f} (noise) +- {score.image_se:.3f} (images)")
    noise, levels = torch.randn(20, 1, 8, 8), (dict(sigmas=path.sigmas(best)), dict(num_inference_steps=10))
    pictures = pt_to_pil(torch.cat([sample(unet, scheduler, noise, **own) for own in levels]))
    make_image_grid([picture.resize((32, 32), resample=0) for picture in pictures], 4, 10).save("flow_matching.png")
    return scores


if __name__ == "__main__":
    main()
