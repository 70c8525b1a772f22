"""Networks of flow matching and EDM, trained on digits as diffusers' own scripts do, under our bound.

    python benchmarks/gaussian_paths.py --folder runs/gaussian_paths

Networks of three seeds, each by 1000 steps of batch 64: "flow" and "edm" know nothing of likelihood, "flow vlb" is a
flow's network trained by L_vlb on its chain, "ddpm" what `ddpm-vlb train` makes. They stay in the folder, so that
another run scores them without training again.
"""

import argparse
import dataclasses
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import EDMEulerScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from environment import describe
from torch import Tensor

from ddpm_vlb import (
    DDPMVLBScheduler,
    GaussianPath,
    ImportanceTimesteps,
    PathNetwork,
    ReverseProcess,
    SquaredErrors,
    StepStatistics,
    VLBEstimate,
    collect_statistics,
    covariance_eigenvalues,
    estimate_ode,
    estimate_vlb,
    fit_pilot,
    spaced_ratios,
    spaced_timesteps,
    spread_knots,
    vlb_loss,
)
from ddpm_vlb.few_steps.candidates import optimal_candidates, respaced
from ddpm_vlb.runtime.image_data import load_image_data

LEVELS = 17
KINDS = ("flow", "edm", "flow vlb", "ddpm")
FEW = (10, 25, 100)
Network = UNet2DModel | PathNetwork
Scheduler = FlowMatchEulerDiscreteScheduler | EDMEulerScheduler | DDPMVLBScheduler


def make_unet(kind: str) -> UNet2DModel:
    """The digits' network; where L_vlb trains it, with a learned variance."""
    blocks = dict(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, layers_per_block=1)
    sizes = dict(sample_size=8, in_channels=1, block_out_channels=(32, 64), norm_num_groups=8, add_attention=False)
    return UNet2DModel(**sizes, **blocks, out_channels=1 if kind in ("flow", "edm") else 2)


def chain_of(kind: str, scheduler: Scheduler) -> tuple[ReverseProcess, GaussianPath | None]:
    """The chain that a network is scored on, of a path even in log SNR from 0.4 bins on, and the path."""
    if isinstance(scheduler, DDPMVLBScheduler):
        return dataclasses.replace(scheduler.reverse_process(), clip_sample=False), None
    path = GaussianPath.from_config(scheduler, spaced_ratios(None, 100.0, 1000, LEVELS))
    variance = "learned_range" if kind == "flow vlb" else "fixed_small"
    return path.reverse_process(LEVELS, variance_type=variance, clip_sample=False), path


def flow_loss(unet: UNet2DModel, scheduler: FlowMatchEulerDiscreteScheduler, x_0: Tensor) -> Tensor:
    """The squared error of eps - x_0 at sigmas drawn evenly."""
    index, noise = torch.randint(len(scheduler.timesteps), (len(x_0),)), torch.randn_like(x_0)
    sigma = scheduler.sigmas[index].reshape(-1, 1, 1, 1)
    output = unet((1 - sigma) * x_0 + sigma * noise, scheduler.timesteps[index]).sample
    return (output - (noise - x_0)).square().mean()


def edm_loss(unet: UNet2DModel, scheduler: EDMEulerScheduler, x_0: Tensor) -> Tensor:
    """The weighted squared error of the denoised image at log-normal sigmas."""
    sigma, sd = (1.2 * torch.randn(len(x_0), 1, 1, 1) - 1.2).exp(), scheduler.config.sigma_data
    x = x_0 + sigma * torch.randn_like(x_0)
    output = unet(scheduler.precondition_inputs(x, sigma), sigma.flatten().log() / 4).sample
    weight = (sigma.square() + sd**2) / (sigma * sd).square()
    return (weight * (scheduler.precondition_outputs(x, output, sigma) - x_0).square()).mean()


def path_loss(images: Tensor) -> Callable[[UNet2DModel, Scheduler, Tensor], Tensor]:
    """L_vlb of a flow's network on its chain, t drawn where a Gaussian model of the images expects it."""
    reverse, path = chain_of("flow vlb", FlowMatchEulerDiscreteScheduler())
    timesteps = ImportanceTimesteps.from_gaussian_model(
        reverse.forward.alphas_cumprod, covariance_eigenvalues(images), decoder_by_snr=True
    )

    def loss(unet: UNet2DModel, scheduler: Scheduler, x_0: Tensor) -> Tensor:
        t, weights = timesteps.sample(len(x_0))
        diffused = reverse.forward.diffuse(x_0, t, torch.randn_like(x_0))
        return (weights * vlb_loss(reverse, path.network(unet)(diffused.x_t, t), diffused)).mean()

    return loss


def train(kind: str, seed: int, images: Tensor, scheduler: Scheduler, steps: int) -> UNet2DModel:
    """A network as diffusers' own scripts train one: AdamW, warm-up and cosine, an average of the weights."""
    torch.manual_seed(seed)
    started, unet = time.process_time(), make_unet(kind)
    loss_of = {"flow": flow_loss, "edm": edm_loss}.get(kind) or path_loss(images)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=1e-6)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=100, num_training_steps=steps)
    ema = EMAModel(unet.parameters(), use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    for _ in range(steps):
        loss_of(unet, scheduler, images[torch.randint(len(images), (64,))]).backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 10.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        ema.step(unet.parameters())
    ema.copy_to(unet.parameters())
    print(f"{kind}, seed {seed}: trained in {time.process_time() - started:.0f} CPU seconds", flush=True)
    return unet


def network_of(kind: str, seed: int, images: Tensor, steps: int, folder: Path) -> tuple[UNet2DModel, Scheduler]:
    """A trained network and its scheduler, from the folder where it is there."""
    if kind == "ddpm":
        if not folder.exists():
            command = f"{sys.executable} -m ddpm_vlb.commands.train --cpu --seed {seed} --max_train_steps {steps}"
            subprocess.run([*command.split(), "--output_dir", str(folder)], check=True)
        return UNet2DModel.from_pretrained(folder / "unet").eval(), DDPMVLBScheduler.from_pretrained(
            folder / "scheduler"
        )
    scheduler: Scheduler = FlowMatchEulerDiscreteScheduler()
    if kind == "edm":
        scheduler = EDMEulerScheduler(sigma_data=float(images.square().mean().sqrt()))
    if not folder.exists():
        train(kind, seed, images, scheduler, steps).save_pretrained(folder)
    return UNet2DModel.from_pretrained(folder).eval(), scheduler


def with_errors(process: ReverseProcess, errors: SquaredErrors) -> ReverseProcess:
    """A chain of all steps with its analytic variance, the decoder's too."""
    rows = errors.at(process.forward.timesteps, "analytic")
    return dataclasses.replace(process, x_0_mse=rows, decoder_log_variance=None)


class Scorer:
    """Every number of one network; pilots and errors are fitted to `train`, and `test` is scored."""

    def __init__(self, kind: str, unet: UNet2DModel, scheduler: Scheduler, train: Tensor, test: Tensor):
        self.kind, self.unet, self.scheduler, self.train, self.test = kind, unet, scheduler, train, test
        self.reverse, path = chain_of(kind, scheduler)
        self.network = unet if path is None else path.network(unet)
        self.learns = self.reverse.learns_variance
        self.rows: dict[str, float] = {}

    def bound(self, process: ReverseProcess, network: Network, images: Tensor, seed: int = 0) -> VLBEstimate:
        """Bits/dim: the full loop of few steps, else 20 calls for each image."""
        process, short = process.to(dtype=torch.float32), len(process.forward) <= 25
        pilot = None if short else fit_pilot(network, process, self.train)
        kind = "full" if short else "importance"
        return estimate_vlb(network, process, [images], pilot, seed=seed, estimator=kind)

    def statistics(self, process: ReverseProcess, network: Network, images: int) -> StepStatistics:
        """Of the network's errors on training images."""
        knots = spread_knots(process.forward, 100)
        return collect_statistics(network, process.to(dtype=torch.float32), self.train[:images], knots)

    def score(self) -> dict[str, float]:
        """The rows of the table."""
        whole, whole_clipped = self.reverse, dataclasses.replace(self.reverse, clip_sample=True)
        if not self.learns:
            self.stock_grid()
            whole = with_errors(whole, self.statistics(whole, self.network, 256).errors(whole.forward, False))
            whole_clipped = self.few_steps(whole_clipped)
        self.rows["1000 steps"] = self.bound(whole, self.network, self.test).bits_per_dim
        self.rows["1000 steps, clipped"] = self.bound(whole_clipped, self.network, self.test).bits_per_dim
        repeats = [self.bound(whole, self.network, self.test[:96], seed).noise_se for seed in range(5)]
        self.rows["noise SE, 96 images, 20 calls each"] = (sum(se**2 for se in repeats) / 5) ** 0.5
        self.ode(whole)
        return self.rows

    def stock_grid(self) -> None:
        """The bound on the levels that stock itself trains or samples on."""
        path = GaussianPath.from_config(self.scheduler)
        network, process = path.network(self.unet), path.reverse_process(LEVELS, clip_sample=False)
        errors = self.statistics(process, network, 64).errors(process.forward, False)
        self.rows["stock's own grid"] = self.bound(with_errors(process, errors), network, self.test).bits_per_dim

    def few_steps(self, clipped: ReverseProcess) -> ReverseProcess:
        """The bounds of few steps; returns the whole chain with its analytic variance."""
        statistics = self.statistics(clipped, self.network, 1024)
        errors = statistics.errors(clipped.forward)
        best = optimal_candidates(clipped, statistics, list(FEW), ["per_pixel"], errors)
        for number, candidate in zip(FEW, best):
            steps = spaced_timesteps("linspace", number, len(clipped.forward))[::-1]
            even = respaced(clipped, steps, "analytic", errors)
            for name, process in (("optimal, per pixel", candidate.process), ("even, analytic", even)):
                self.rows[f"{number} steps, {name}"] = self.bound(process, self.network, self.test).bits_per_dim
        return with_errors(clipped, errors)

    def ode(self, whole: ReverseProcess) -> None:
        """The likelihood of the ODE, with the decoder of the whole chain, by 64 calls and by too few."""
        root, decoder = whole.forward.log_alphas_cumprod, whole.coefficients(0, torch.empty(0, dtype=torch.float64))
        for calls in (64, 8):
            ratios = spaced_ratios(math.sqrt(math.expm1(-root[0])), 100.0, calls // 2 + 1)
            if self.kind == "ddpm":
                path = GaussianPath.ddpm(root.exp(), ratios)
            else:
                path = GaussianPath.from_config(self.scheduler, ratios)
            process = path.reverse_process(
                LEVELS,
                variance_type=whole.variance_type,
                clip_sample=False,
                decoder_log_variance=float(decoder.log_variance_offset),
                decoder_slope=float(decoder.variance_slope),
            ).to(dtype=torch.float32)
            estimate = estimate_ode(path.network(self.unet), process, [self.test])
            name = f"ODE, {calls} calls"
            self.rows |= {name: estimate.bits_per_dim, f"{name}, probe SE": estimate.probe_se}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/gaussian_paths"), help="Of the trained networks.")
    parser.add_argument("--steps", type=int, default=1000, help="Of training.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(describe())
    data = load_image_data()
    images, test = (torch.cat(list(part.batches(256))) for part in (data.train, data.test))
    for kind in args.kinds:
        rows = []
        for seed in args.seeds:
            folder = args.folder / f"{kind.replace(' ', '-')}-{seed}"
            unet, scheduler = network_of(kind, seed, images, args.steps, folder)
            rows.append(Scorer(kind, unet, scheduler, images, test).score())
        print(f"\n| {kind}: bits/dim | mean | SD | seeds |\n| --- | --- | --- | --- |")
        for name in rows[0]:
            values = torch.tensor([row[name] for row in rows])
            each = ", ".join(f"{float(value):.4f}" for value in values)
            print(f"| {name} | {float(values.mean()):.4f} | {float(values.std()):.4f} | {each} |", flush=True)


if __name__ == "__main__":
    main()
