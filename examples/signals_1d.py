"""Train a plain convolutional network on one-dimensional signals, score it in bits/dim, and sample it step by step.

    python examples/signals_1d.py

The signals (B, 1, 64) are plucked strings, two decaying sines and a little noise, in 256 levels. It prints the test
bits/dim with its two standard errors, what a Gaussian takes, and what no model can save, the noise; and how loud the
samples are beside the data. It writes them, (32, 1, 64), to signals_1d.pt.
"""

import math

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from ddpm_vlb import (
    DDPMVLBScheduler,
    ImportanceTimesteps,
    ReverseProcess,
    VLBEstimate,
    covariance_eigenvalues,
    estimate_vlb,
    fit_pilot,
    vlb_loss,
)

BIN, NOISE = 2 / 255, 0.01  # the gap between two levels, the noise's standard deviation


class ConvNet(nn.Module):
    """Residual dilated convolutions, each told the timestep; twice the channels come out: mean and variance."""

    def __init__(self, channels: int = 1, width: int = 64, dilations: tuple[int, ...] = (1, 2, 4, 8, 16, 32)):
        super().__init__()
        self.first, self.last = nn.Conv1d(channels, width, 1), nn.Conv1d(width, 2 * channels, 1)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width * len(dilations)))
        self.convolutions = nn.ModuleList(nn.Conv1d(width, width, 3, padding=d, dilation=d) for d in dilations)

    def forward(self, x_t: Tensor, timesteps: Tensor) -> Tensor:
        """Outputs (B, 2 C, L) for noisy signals (B, C, L) and timesteps (B,)."""
        h = self.first(x_t)
        told = self.time(get_timestep_embedding(timesteps, h.shape[1]))[:, :, None]
        for convolution, shift in zip(self.convolutions, told.chunk(len(self.convolutions), dim=1)):
            h = h + convolution(nn.functional.silu(nn.functional.group_norm(h, 8) + shift))
        return self.last(h)


def plucked_strings(count: int) -> Tensor:
    """Signals (count, 1, 64) on 256 levels of [-1, 1]: a tone of random pitch with its octave, decaying."""
    pitch, phase, decay = torch.rand(3, count, 1)
    time = torch.arange(64) / 64
    angle = 2 * math.pi * ((3 + 5 * pitch) * time + phase)
    waves = (0.6 * angle.sin() + 0.3 * (2 * angle).sin()) * (-3 * decay * time).exp() + NOISE * torch.randn(count, 64)
    return ((waves.clamp(-1, 1) + 1) / BIN).round()[:, None] * BIN - 1


def train_network(network: nn.Module, reverse: ReverseProcess, data: Tensor, steps: int) -> None:
    """Minimise the bound."""
    timesteps = ImportanceTimesteps.from_gaussian_model(reverse.forward.alphas_cumprod, covariance_eigenvalues(data))
    optimizer = torch.optim.AdamW(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    for batch in torch.randint(len(data), (steps, 64)):
        t, weights = timesteps.sample(64)
        diffused = reverse.forward.diffuse(data[batch], t, torch.randn(64, *data.shape[1:]))
        output = network(diffused.x_t, reverse.forward.timesteps[t])
        (weights * vlb_loss(reverse, output, diffused)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


@torch.no_grad()
def sample(network: nn.Module, scheduler: DDPMVLBScheduler, x_t: Tensor, steps: int) -> Tensor:
    """The loop of every diffusers pipeline; DDPMVLBPipeline itself is for images."""
    scheduler.set_timesteps(steps)
    for timestep in scheduler.timesteps:
        x_t = scheduler.step(network(x_t, timestep.expand(len(x_t))), timestep, x_t, return_dict=False)[0]
    return x_t


def main(steps: int = 1000, num_test: int = 256, sampling_steps: int = 100) -> VLBEstimate:
    """Train, score `num_test` signals, sample."""
    torch.manual_seed(0)
    train, test = plucked_strings(4096), plucked_strings(num_test)
    scheduler = DDPMVLBScheduler(variance_type="learned_range", prediction_type="v_prediction")
    network, reverse = ConvNet(), scheduler.reverse_process()
    train_network(network, reverse, train, steps)
    score = estimate_vlb(network.eval(), reverse, test.split(64), fit_pilot(network, reverse, train))
    print(f"{score.bits_per_dim:.3f} +- {score.noise_se:.3f} (noise) +- {score.image_se:.3f} (signals) bits/dim")
    gaussian = torch.distributions.MultivariateNormal(train.mean(0)[0], train[:, 0].T.cov())
    bits = -gaussian.log_prob(test[:, 0]).mean() / 64 / math.log(2) - math.log2(BIN)
    print(f"a Gaussian: {bits:.3f}, the noise alone: {math.log2(NOISE / BIN * math.sqrt(2 * math.pi * math.e)):.3f}")
    samples = sample(network, scheduler, torch.randn(32, 1, 64), sampling_steps)
    print(f"standard deviation of the samples: {samples.std():.3f}, of the data: {train.std():.3f}")
    torch.save(samples, "signals_1d.pt")
    return score


if __name__ == "__main__":
    main()
