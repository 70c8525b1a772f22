"""The chain that is trained, of betas or of a Gaussian path, and which of its steps t are trained on."""

import argparse
import math
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers import EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from ddpm_vlb import (
    DDPMVLBScheduler,
    GaussianPath,
    ImportanceTimesteps,
    LossSecondMomentTimesteps,
    LowDiscrepancyTimesteps,
    ReverseProcess,
    UniformTimesteps,
    beta_start_for_levels,
    covariance_eigenvalues,
    path_chain,
    sigma_probabilities,
    simple_weights,
    spaced_ratios,
)
from ddpm_vlb.runtime.image_sets import Images
from ddpm_vlb.runtime.launching import main_first

HIGHEST_RATIO = 100.0
UNIFORM_SHARE = 0.1  # of a sampler's draws, which bounds its weights by 10
TimestepSampler = UniformTimesteps | ImportanceTimesteps | LossSecondMomentTimesteps


def build_scheduler(args: argparse.Namespace, levels: int) -> DDPMVLBScheduler:
    """The chain of betas to train; its first noise matches the bin width of data with few levels."""
    few = min(args.ddpm_beta_end, max(1e-4, beta_start_for_levels(levels, beta_end=args.ddpm_beta_end)))
    beta_start = args.ddpm_beta_start or few
    return DDPMVLBScheduler(
        num_train_timesteps=args.ddpm_num_steps,
        beta_schedule=args.ddpm_beta_schedule,
        beta_start=beta_start,
        beta_end=args.ddpm_beta_end,
        rescale_betas_zero_snr=args.rescale_betas_zero_snr,
        prediction_type=args.prediction_type,
        variance_type=args.variance_type,
        timestep_spacing=args.timestep_spacing,
        levels=levels,
    )


def build_path(
    args: argparse.Namespace, levels: int, sigma_data: float | None
) -> tuple[DDPMVLBScheduler, SchedulerMixin | None]:
    """The chain of --path, and the scheduler that stock samples its network with, where that is another.

    Args:
        args: the options.
        levels: of the data, which the first noise of the chain fits.
        sigma_data: EDM's, as of `measured_sigma_data`.
    """
    if args.path == "ddpm":
        return build_scheduler(args, levels), None
    ratios = spaced_ratios(None, HIGHEST_RATIO, args.ddpm_num_steps, levels)
    stock: Any = FlowMatchEulerDiscreteScheduler()
    if args.path == "edm":  # below the chain's first noise the network is not trained
        stock = EDMEulerScheduler(sigma_min=float(ratios[0]), sigma_data=sigma_data)
    return path_chain(stock, levels, ratios, args.variance_type, timestep_spacing=args.timestep_spacing), stock


def measured_sigma_data(args: argparse.Namespace, train: Images, accelerator: Accelerator) -> float | None:
    """The root mean square of training images about 0, of two digits; None where --path is not edm.

    It scales EDM's input and output: by that of the data both have the variance 1 that they are meant to have.
    """
    if args.path != "edm":
        return None
    mean_square = _of_the_main_process(accelerator, lambda: _some(train).double().square().mean().item())
    return float(f"{math.sqrt(mean_square):.2g}")


def _some(train: Images) -> Tensor:
    return torch.cat(list(train.batches(256, limit=2048)))


def _of_the_main_process(accelerator: Accelerator, make: Callable[[], Any]) -> Any:
    """What one process has measured, for all: another machine's rounding would part them."""

    def measured() -> Any:
        return make() if accelerator.is_main_process else None

    return broadcast_object_list([main_first(accelerator, measured, "train", ValueError, OSError)])[0]


def chain_network(path: GaussianPath | None, network: torch.nn.Module, device: torch.device) -> Callable[..., Tensor]:
    """A network as the chain calls one, (x_t, timesteps, **conditioning) to its output.

    Args:
        path: of the network; None for a chain of betas.
        network: a diffusers model, prepared or not.
        device: of the run.
    """
    if path is not None:
        return path.network(network).prepare(device)  # a compiled call makes no tables
    return lambda x_t, timesteps, **conditioning: network(x_t, timesteps, **conditioning).sample


def drawn_sigmas(args: argparse.Namespace, path: GaussianPath) -> Tensor:
    """p_t of the levels of a path in its L_simple, (T,), as the field draws them."""
    return sigma_probabilities(path, "log_normal" if args.path == "edm" else args.sigma_sampling)


def weights_of_simple(args: argparse.Namespace, path: GaussianPath | None, reverse: ReverseProcess) -> Tensor:
    """The weight of L_simple at each step under uniform t, (T,) float32 beside the chain; 1 on a chain of betas."""
    if path is None:
        return torch.ones(len(reverse.forward), device=reverse.forward.betas.device)
    return simple_weights(path, drawn_sigmas(args, path)).to(reverse.forward.betas)


def build_sampler(
    args: argparse.Namespace,
    reverse: ReverseProcess,
    path: GaussianPath | None,
    train: Images,
    accelerator: Accelerator,
) -> TimestepSampler:
    """The timestep sampler of --timestep_sampler; it draws the whole global batch, on every process alike."""
    steps = len(reverse.forward)
    if args.timestep_sampler == "gaussian":
        eigenvalues = _of_the_main_process(accelerator, lambda: covariance_eigenvalues(_some(train)))
        alphas_cumprod = reverse.forward.log_alphas_cumprod.exp()
        return ImportanceTimesteps.from_gaussian_model(
            alphas_cumprod, eigenvalues, UNIFORM_SHARE, decoder_by_snr=path is not None
        )
    if args.timestep_sampler == "sigma":
        assert path is not None  # else the parser has refused it
        share = UNIFORM_SHARE if args.objective == "hybrid" else 0.0  # L_vlb is also of steps that are hardly drawn
        return ImportanceTimesteps((1 - share) * drawn_sigmas(args, path) + share / steps)
    kinds = {
        "uniform": UniformTimesteps,
        "low_discrepancy": LowDiscrepancyTimesteps,
        "loss_second_moment": LossSecondMomentTimesteps,
    }
    return kinds[args.timestep_sampler](steps)
