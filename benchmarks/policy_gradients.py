"""Whether a step's log-probability is that of what the sampler draws, and how many digits a ratio keeps.

python benchmarks/policy_gradients.py
python benchmarks/policy_gradients.py digits    (the last table alone, 10 s)

Three tables. Ratios: walks of ten steps by a small network of random weights, and the probability of each under other
weights over its own, which must average to one. Widths: samples of the exact network of N(0, 0.3), whose standard
deviation over the data's must be one, and the mean -log p of the steps beside their Gaussians' entropy. Digits: two
outputs that differ by 1e-3 at 3x256x256, and how far float32 is from float64.
"""

import copy
import math
import sys
from typing import Any

import torch
from diffusers import UNet2DModel
from environment import describe
from torch import Tensor, nn
from tqdm.auto import tqdm

from ddpm_vlb import (
    DDPMVLBPipeline,
    DDPMVLBScheduler,
    SquaredErrors,
    Trajectory,
    beta_start_for_levels,
    step_log_prob,
    step_log_ratio,
)

VARIANCE = 0.3
COSINE = dict(num_train_timesteps=4000, beta_schedule="squaredcos_cap_v2")
# Of the digits, with the steps to look at; a step clips x_0_hat but where it is said not to.
CHAINS = {
    "learned_range": ({"variance_type": "learned_range"}, (1, 10, 100, 500, 999)),
    "learned_range, unclipped": ({"variance_type": "learned_range", "clip_sample": False}, (1, 10, 100, 500, 999)),
    "fixed_small, unclipped": ({"variance_type": "fixed_small", "clip_sample": False}, (1, 10)),
    "cosine T = 4000": ({"variance_type": "learned_range", **COSINE}, (1,)),
    "cosine T = 4000, unclipped": ({"variance_type": "learned_range", "clip_sample": False, **COSINE}, (1, 3999)),
    "cosine T = 4000, thresholded": ({"variance_type": "learned_range", "thresholding": True, **COSINE}, (1,)),
}


def policies(change: float = 0.01) -> tuple[DDPMVLBPipeline, nn.Module]:
    """A sampler of 8x8 images, and its network with weights that have changed by a part of their size."""
    blocks = dict(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, norm_num_groups=8)
    channels = dict(in_channels=1, out_channels=2, block_out_channels=(8, 16), layers_per_block=1)
    unet = UNet2DModel(sample_size=8, add_attention=False, **blocks, **channels).eval()
    other = copy.deepcopy(unet)
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1 + change * torch.randn_like(weight))
    scheduler = DDPMVLBScheduler(beta_start=beta_start_for_levels(17), variance_type="learned_range", levels=17)
    pipeline = DDPMVLBPipeline(unet, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, other


@torch.no_grad()
def log_ratios(walk: Trajectory, network: nn.Module) -> Tensor:
    """Of each step that draws, (B, K - 1)."""
    ratios = []
    for k in range(len(walk) - 1):
        output = network(walk.states[:, k], walk.timesteps[k].expand(len(walk.states))).sample
        ratios.append(walk.log_ratio(walk.reverse, output, k))
    return torch.stack(ratios, dim=1).double()


def ratios(rows: int) -> dict[str, tuple[float, float, float]]:
    """Mean of p'/p, its standard error and the standard deviation, of two steps and of the walk."""
    (pipeline, other), found = policies(), []
    steps = dict(num_inference_steps=10, timestep_spacing="quadratic", output_type="latent", return_trajectory=True)
    for part in tqdm(torch.arange(rows).split(1000), desc="Walks"):
        found.append(log_ratios(pipeline(len(part), **steps).trajectory, other))
    every = torch.cat(found)
    values = {"the first step": every[:, 0], "the ninth": every[:, -1], "the walk": every.sum(1)}
    spread = {name: (value.exp().mean(), value.exp().std()) for name, value in values.items()}
    return {name: (float(mean), float(sd) / rows**0.5, float(sd)) for name, (mean, sd) in spread.items()}


def width(steps: int, variance_type: str, optimal: bool, rows: int) -> tuple[float, float, float, float]:
    """The samples' standard deviation over the data's, mean -log p less entropy in nats/dim, each with its error."""
    scheduler = DDPMVLBScheduler(
        variance_type=variance_type,
        prediction_type="sample",
        clip_sample=False,
        levels=None,
        timestep_spacing="linspace",
    )
    abar = scheduler.reverse_process(dtype=torch.float64).forward.alphas_cumprod
    gain = VARIANCE * abar.sqrt() / (abar * VARIANCE + 1 - abar)
    if optimal:
        errors = SquaredErrors(torch.arange(1000), gain * (1 - abar) / abar.sqrt())
        scheduler.store_few_steps(errors=errors, reverse_variance="analytic")
    scheduler.set_timesteps(steps)
    reverse, x, excess = scheduler.reverse_process(num_inference_steps=steps), torch.randn(rows, 1, 8, 8), 0.0
    for k, timestep in enumerate(scheduler.timesteps.tolist()):
        output = float(gain[timestep]) * x
        result = scheduler.step(output, timestep, x)
        if k < steps - 1:
            log_prob = step_log_prob(reverse, output, x, steps - 1 - k, result.prev_sample)
            entropy = 0.5 * (1 + math.log(2 * math.pi) + float(result.distribution.log_variance.mean()))
            excess -= float(log_prob.double().mean()) / 64 + entropy
        x = result.prev_sample
    error = (0.5 / x.numel()) ** 0.5
    return float(x.double().std()) / VARIANCE**0.5, error, excess / (steps - 1), error / (steps - 1) ** 0.5


def digits(t: int, side: int, settings: dict[str, Any]) -> tuple[float, float, float]:
    """log p, and the largest error of four ratios: of two log-probabilities' difference, and of `step_log_ratio`."""
    scheduler, shape = DDPMVLBScheduler(**settings), (4, 3, side, side)
    single, double = (scheduler.reverse_process(dtype=dtype) for dtype in (torch.float32, torch.float64))
    abar, noise = single.forward.alphas_cumprod[t], torch.randn(shape)
    x_t = abar.sqrt() * torch.randn(shape).clamp(-1, 1) + (1 - abar).sqrt() * noise
    old = torch.cat([noise + 0.3 * torch.randn(shape), 0.3 * torch.randn(shape)], dim=1)
    old = old if single.learns_variance else old[:, :3]
    new = old + 1e-3 * torch.randn(old.shape)
    x_s = single(old, x_t, t).p.sample(torch.randn(shape))
    exact = step_log_ratio(double, new.double(), old.double(), x_t.double(), t, x_s.double())
    new_log_prob, old_log_prob = (step_log_prob(single, output, x_t, t, x_s) for output in (new, old))
    found = (new_log_prob - old_log_prob, step_log_ratio(single, new, old, x_t, t, x_s))
    return float(old_log_prob.mean()), *(float((own.double() - exact).abs().max()) for own in found)


def main(rows: int = 20000, side: int = 256) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(describe() + "\n\n## Ratios\n\n| p'/p of | mean | its standard deviation |\n| --- | --- | --- |")
    for name, (mean, error, sd) in ratios(rows).items():
        print(f"| {name} | {mean:.4f} +- {error:.4f} | {sd:.2f} |")
    print(
        "\n## Widths\n\n| steps | variance | SD of samples / data | -log p less entropy, nats/dim |\n"
        + "| --- " * 4
        + "|"
    )
    kinds = {
        "optimal": ("fixed_small", True),
        "fixed_small": ("fixed_small", False),
        "fixed_large": ("fixed_large", False),
    }
    for steps in (5, 10, 25):
        for name, kind in kinds.items():
            sd, error, excess, of_excess = width(steps, *kind, rows)
            print(f"| {steps} | {name} | {sd:.4f} +- {error:.4f} | {excess:+.5f} +- {of_excess:.5f} |")
    print_digits(side)


def print_digits(side: int = 256) -> None:
    print("\n## Digits\n\n| chain | t | log p | error of a difference | error of `step_log_ratio` |")
    print("| --- " * 5 + "|")
    for name, (settings, steps) in CHAINS.items():
        for t in steps:
            torch.manual_seed(0)
            log_prob, subtracted, own = digits(t, side, settings)
            print(f"| {name} | {t} | {log_prob:.0f} | {subtracted:.0e} | {own:.0e} |")


if __name__ == "__main__":
    print_digits() if sys.argv[1:] == ["digits"] else main()
