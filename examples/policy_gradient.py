"""Tune a network for a reward by a clipped policy gradient, and see what the reward costs in bits/dim.

    python examples/policy_gradient.py [SEED]

The reward of a sample of scikit-learn's digits is the probability that a linear classifier gives to its being a 3. Ten
steps of the sampler are the policy: those that led to threes are made more probable (DDPO, with PPO's clipped ratio),
and the exact KL of each holds them to the network that was. policy_gradient.png shows samples and the reward's rise.
"""

import copy
import sys
from collections.abc import Callable

import torch
from diffusers import DiffusionPipeline, UNet2DModel
from PIL import Image, ImageDraw
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from ddpm_vlb import (
    DDPMVLBPipeline,
    DDPMVLBScheduler,
    ImportanceTimesteps,
    ReverseProcess,
    Trajectory,
    VLBEstimate,
    beta_start_for_levels,
    covariance_eigenvalues,
    estimate_vlb,
    fit_pilot,
    step_kl,
    vlb_loss,
)

DIGIT, CLIP, KL_WEIGHT = 3, 0.2, 0.2
WALK = dict(num_inference_steps=10, timestep_spacing="quadratic", output_type="latent", return_trajectory=True)
Reward = Callable[[Tensor], Tensor]
Measured = tuple[float, float]  # a mean and its standard error


def make_unet() -> UNet2DModel:
    """A small U-Net with a mean and a variance output."""
    blocks = dict(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, norm_num_groups=8)
    channels = dict(in_channels=1, out_channels=2, block_out_channels=(32, 64), layers_per_block=1)
    return UNet2DModel(sample_size=8, **blocks, **channels)


def train_network(unet: UNet2DModel, reverse: ReverseProcess, images: Tensor, steps: int) -> None:
    """Minimise the bound."""
    timesteps = ImportanceTimesteps.from_gaussian_model(reverse.forward.alphas_cumprod, covariance_eigenvalues(images))
    optimizer = torch.optim.AdamW(unet.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=8e-3, total_steps=steps)
    for batch in torch.randint(len(images), (steps, 64)):
        t, weights = timesteps.sample(64)
        diffused = reverse.forward.diffuse(images[batch], t, torch.randn(64, 1, 8, 8))
        output = unet(diffused.x_t, reverse.forward.timesteps[t]).sample
        (weights * vlb_loss(reverse, output, diffused)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def make_reward(images: Tensor, labels: Tensor) -> Reward:
    """The probability of `DIGIT` under a linear classifier; a reward needs no gradients."""
    classifier = LogisticRegression(C=0.1, max_iter=1000).fit(images.flatten(1).numpy(), labels.numpy())
    return lambda x: torch.from_numpy(classifier.predict_proba(x.flatten(1).numpy())).float()[:, DIGIT]


def mean_and_error(values: Tensor) -> Measured:
    """The mean and its standard error."""
    return float(values.mean()), float(values.std() / len(values) ** 0.5)


def outputs(walk: Trajectory, k: int, unet: nn.Module, reference: nn.Module) -> tuple[Tensor, Tensor]:
    """What the two networks say at the walk's step k."""
    x_t, told = walk.states[:, k], walk.timesteps[k].expand(len(walk.states))
    return unet(x_t, told).sample, reference(x_t, told).sample


def surrogate(walk: Trajectory, k: int, output: Tensor, was: Tensor, advantage: Tensor) -> Tensor:
    """What falls as step k of the samples of large advantage gets more probable, near the reference."""
    ratio = walk.log_ratio(walk.reverse, output, k).exp()
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
    return (KL_WEIGHT * step_kl(walk.reverse, output, was, walk.states[:, k], walk.t(k)) - gain).mean()


def tune(pipeline: DiffusionPipeline, reference: nn.Module, reward: Reward, rounds: int, batch: int) -> list[Measured]:
    """Raise the reward of samples; returns it round by round, as it was before each."""
    unet, curve, optimizer = pipeline.unet, [], torch.optim.AdamW(pipeline.unet.parameters(), 3e-4)
    for _ in range(rounds):
        images, walk = pipeline(batch, **WALK).to_tuple()
        curve.append(mean_and_error(rewards := reward(images)))
        advantage = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        for k in torch.randperm(len(walk) - 1).tolist():  # the last step draws nothing
            surrogate(walk, k, *outputs(walk, k, unet, reference), advantage).backward()
            nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return curve


@torch.no_grad()
def measure(pipeline: DiffusionPipeline, reference: nn.Module, reward: Reward, number: int) -> tuple[Tensor, str]:
    """Samples, and their reward and divergence from the reference's walks in words."""
    (images, walk), kl = pipeline(number, **WALK).to_tuple(), torch.zeros(number)
    for k in range(len(walk) - 1):
        kl += step_kl(walk.reverse, *outputs(walk, k, pipeline.unet, reference), walk.states[:, k], walk.t(k))
    (mean, error), (nats, of_nats) = mean_and_error(reward(images)), mean_and_error(kl)
    return images, f"reward {mean:.3f} +- {error:.3f}, KL {nats:.2f} +- {of_nats:.2f} nats"


def draw_picture(grids: list[Tensor], curve: list[Measured]) -> Image.Image:
    """64 samples before and after, and between them the reward with two standard errors."""
    picture = Image.new("L", (720, 240), 255)
    for left, samples in zip((0, 480), grids):
        tiles = nn.functional.pad(samples[:64, 0].add(1).mul(127.5).clamp(0, 255), (1, 1, 1, 1)).reshape(8, 8, 10, 10)
        grid = Image.fromarray(tiles.transpose(1, 2).reshape(80, 80).byte().numpy())
        picture.paste(grid.resize((240, 240), Image.Resampling.NEAREST), (left, 0))
    pen = ImageDraw.Draw(picture)
    points = [(252 + 216 * i / len(curve), 230 - 220 * mean) for i, (mean, _) in enumerate(curve)]
    for (x, y), (_, error) in zip(points, curve):
        pen.line((x, y - 440 * error, x, y + 440 * error), 160)
    pen.line(points, 0, 2)
    return picture


def main(seed: int = 0, steps: int = 500, rounds: int = 16, batch: int = 64, num_test: int = 297) -> list[VLBEstimate]:
    """Train, tune, score the first `num_test` test images before and after, sample."""
    torch.manual_seed(seed)
    data = load_digits()
    images, labels = torch.tensor(data.images[:, None] / 8 - 1, dtype=torch.float32), torch.tensor(data.target)
    train, test = images[:1500], images[1500:][:num_test]
    scheduler = DDPMVLBScheduler(beta_start=beta_start_for_levels(17), variance_type="learned_range", levels=17)
    unet, reverse = make_unet(), scheduler.reverse_process()
    train_network(unet, reverse, train, steps)
    reward, pipeline = make_reward(train, labels[:1500]), DDPMVLBPipeline(unet.eval(), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    untuned, samples, scores = copy.deepcopy(unet).requires_grad_(False), dict[str, Tensor](), list[VLBEstimate]()
    for name in ("before", "after"):
        curve = tune(pipeline, untuned, reward, rounds, batch) if scores else []
        samples[name], said = measure(pipeline, untuned, reward, 4 * batch)
        scores.append(score := estimate_vlb(unet, reverse, test.split(64), fit_pilot(unet, reverse, train)))
        print(f"{name}: {said}, {score.bits_per_dim:.3f} +- {score.noise_se:.3f} bits/dim of the test images")
    draw_picture(list(samples.values()), curve).save("policy_gradient.png")
    return scores


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
