"""A network for which every term of the bound has a known expectation, for the tests of the evaluation.

Its estimate of x_0 is linear in x_t, x_0_hat = g x_t, so that x_0 - x_0_hat = b x_0 - s epsilon with b = 1 - g
sqrt(abar), s = g sqrt(1 - abar). Given x_0 the squared error is a sum of squared Gaussians: its mean is b^2 |x_0|^2 +
D s^2 and its variance 4 b^2 s^2 |x_0|^2 + 2 D s^4. With a factor of 1 the network is the posterior mean of Gaussian
data; with another it is wrong, as networks are.
"""

import math

import numpy as np
import torch
from scipy.special import log_ndtr, ndtr
from torch import Tensor

from ddpm_vlb import ForwardProcess, ReverseProcess, make_betas

T = 12
SHAPE = (1, 4, 4)
VARIANCE = 0.3
BETAS = make_betas("linear", T, 0.05, 0.5)


def gains(betas: Tensor, factor: float = 1.0) -> np.ndarray:
    """g_t, (T,)."""
    abar = np.cumprod(1 - betas.double().numpy())
    return factor * np.sqrt(abar) * VARIANCE / (abar * VARIANCE + 1 - abar)


class PosteriorMean:
    """x_0_hat = g_t x_t; remembers which timesteps it was told."""

    def __init__(self, forward: ForwardProcess, factor: float = 1.0):
        self.timesteps = forward.timesteps
        self.gain = torch.from_numpy(gains(forward.betas, factor))
        self.told: list[int] = []

    def __call__(self, x_t: Tensor, timesteps: Tensor) -> Tensor:
        self.told += timesteps.tolist()
        t = torch.searchsorted(self.timesteps, timesteps.contiguous())
        assert torch.equal(self.timesteps[t], timesteps), "told a timestep that is not of the chain"
        return self.gain[t].to(x_t.dtype).reshape(-1, *[1] * (x_t.ndim - 1)) * x_t


def process(levels: int | None = None, dtype: torch.dtype = torch.float64, betas=BETAS, **options) -> ReverseProcess:
    """p that takes the network's output for x_0 and does not clip it, unless told otherwise."""
    options = {"prediction_type": "sample", "clip_sample": False} | options
    return ReverseProcess(ForwardProcess.from_betas(betas), levels=levels, **options).to(dtype=dtype)


def images(n: int, shape=SHAPE, levels: int | None = None, seed: int = 0, dtype=torch.float64) -> Tensor:
    """Gaussian data of variance `VARIANCE`, clamped to [-1, 1], on its levels."""
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(n, *shape, generator=generator, dtype=torch.float64) * VARIANCE**0.5).clamp(-1, 1)
    return (x if levels is None else ((x + 1) / 2 * (levels - 1)).round() * 2 / (levels - 1) - 1).to(dtype)


def expected_moments(x_0: Tensor, betas: Tensor = BETAS, factor: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """E[L_t | x_0] and E[L_t^2 | x_0], (B, T), in nats, for the continuous decoder and fixed_small variances."""
    betas, gain = betas.double().numpy(), gains(betas, factor)
    abar = np.cumprod(1 - betas)
    previous = np.concatenate([[1.0], abar[:-1]])
    energy = x_0.flatten(1).double().square().sum(1).numpy()[:, None]
    dims = x_0[0].numel()
    b, s = 1 - gain * np.sqrt(abar), gain * np.sqrt(1 - abar)
    error = b**2 * energy + dims * s**2
    error_variance = 4 * b**2 * s**2 * energy + 2 * dims * s**4
    snr = abar / (1 - abar)
    # The first step has a density for its term, and the second's posterior variance (a lonely step its beta).
    posterior = betas * (1 - previous) / (1 - abar)
    decoder_variance = posterior[1] if len(betas) > 1 else betas[0]
    scale = np.concatenate([[0.5 / decoder_variance], (snr[:-1] - snr[1:]) / 2])
    mean = scale * error
    mean[:, 0] += 0.5 * dims * np.log(2 * np.pi * decoder_variance)
    return mean, mean**2 + scale**2 * error_variance


def expected_decoder_on_levels(x_0: Tensor, levels: int, betas: Tensor = BETAS, factor: float = 1.0) -> np.ndarray:
    """E[-log mass of the bin | x_0] (B,) in nats: 64-node Gauss-Hermite over the noise of each pixel."""
    gain, betas = gains(betas, factor)[0], betas.double().numpy()
    abar = np.cumprod(1 - betas)
    # The first step borrows the second's posterior variance; a lonely one takes its beta.
    sigma = math.sqrt(betas[1] * (1 - abar[0]) / (1 - abar[1]) if len(betas) > 1 else betas[0])
    nodes, weights = np.polynomial.hermite_e.hermegauss(64)
    x = x_0.flatten(1).double().numpy()[..., None]
    mean = gain * (math.sqrt(abar[0]) * x + math.sqrt(1 - abar[0]) * nodes)
    half = 1 / (levels - 1)
    upper, lower = (x + half - mean) / sigma, (x - half - mean) / sigma
    inner = np.log(ndtr(np.where(lower > 0, -lower, upper)) - ndtr(np.where(lower > 0, -upper, lower)))
    log_mass = np.where(x > 1 - half, log_ndtr(-lower), np.where(x < half - 1, log_ndtr(upper), inner))
    return -(log_mass @ weights / weights.sum()).sum(1)


def expected_terms(x_0: Tensor, levels: int | None = None, betas: Tensor = BETAS, factor: float = 1.0) -> np.ndarray:
    """E[L_t | x_0] (B, T) in nats, by numpy in float64."""
    terms = expected_moments(x_0, betas, factor)[0]
    if levels is not None:
        terms[:, 0] = expected_decoder_on_levels(x_0, levels, betas, factor)
    return terms


def expected_prior(x_0: Tensor, betas: Tensor = BETAS) -> np.ndarray:
    """L_T (B,) in nats: the textbook KL of N(sqrt(abar) x_0, 1 - abar) from N(0, 1)."""
    abar = np.prod(1 - betas.double().numpy())
    x = x_0.flatten(1).double().numpy()
    return 0.5 * (abar * x**2 - abar - np.log1p(-abar)).sum(1)


def expected_bits(x_0: Tensor, levels: int | None = None, betas: Tensor = BETAS, factor: float = 1.0) -> np.ndarray:
    """The expected bound of each image, (B,), in bits/dim."""
    nats = expected_terms(x_0, levels, betas, factor).sum(1) + expected_prior(x_0, betas)
    return nats / x_0[0].numel() / math.log(2)


def population_bits(levels: int | None = None, betas: Tensor = BETAS, factor: float = 1.0) -> float:
    """The mean of `expected_bits` over all that `images` draws from, in closed form.

    Every part of the bound is a sum over the values of an image, so that constant images stand for single values. On
    levels they are weighted by the mass of their bins; without, only the mean square of the clamped Gaussian enters.
    """
    sigma = VARIANCE**0.5
    if levels is None:
        density = math.exp(-0.5 / VARIANCE) / math.sqrt(2 * math.pi)
        square = VARIANCE * (2 * ndtr(1 / sigma) - 1) - 2 * sigma * density + 2 * ndtr(-1 / sigma)
        return float(expected_bits(torch.full((1, *SHAPE), square**0.5, dtype=torch.float64), None, betas, factor)[0])
    values = np.linspace(-1, 1, levels)
    edges = np.concatenate([[-np.inf], (values[1:] + values[:-1]) / 2, [np.inf]])
    constant = torch.from_numpy(values).reshape(-1, *[1] * len(SHAPE)).expand(-1, *SHAPE)
    return float(np.diff(ndtr(edges / sigma)) @ expected_bits(constant, levels, betas, factor))


def oracle(x_0: Tensor):
    """A network that is told the image's number as its label and knows the answer: E = x_0 exactly, every KL is 0.

    A pair (image, t) that got another image's label has a positive term.
    """

    def network(x_t: Tensor, timesteps: Tensor, class_labels: Tensor) -> Tensor:
        assert class_labels.shape == timesteps.shape == x_t.shape[:1]
        return x_0[class_labels].to(x_t.dtype)

    return network
