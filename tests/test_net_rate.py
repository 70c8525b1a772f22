"""The net rate is the bound: the expectation of what an image adds to a stack, by adding up all latents there are.

An image of one pixel has a few hundred latents a step, so that nothing is drawn here. Its network is linear, and its
bound known (analytic).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from analytic import BETAS, VARIANCE, PosteriorMean, population_bits, process
from scipy.special import ndtr

from ddpm_vlb import make_betas
from ddpm_vlb.bits_back import ChainCoder
from ddpm_vlb.integer_gaussians import OCTAVE, TOTAL, exact_power

CHAINS = {2: BETAS[:2], 12: BETAS, 50: make_betas("linear", 50, 0.02, 0.2)}


def pixels(numbers):
    """Each as an image."""
    return np.asarray(numbers).reshape(-1, 1, 1, 1)


@dataclass(frozen=True)
class Masses:
    """The masses of bins that the coder works with, a row for each Gaussian."""

    coder: ChainCoder

    def q(self, t, before):
        """Of x_t, for each x_{t-1}."""
        return self._masses(*self.coder.drawn_from(t, pixels(before)))

    def p(self, t, latents):
        """Of x_{t-1}, for each x_t."""
        return self._masses(*self.coder.pushed_with(t, pixels(latents), {}))

    def prior(self):
        """Of x_K."""
        return self._masses(*self.coder.prior((1, 1, 1, 1)))[0]

    @staticmethod
    def _masses(bins, own):
        edges = np.arange(bins.low, bins.high + 2)
        return np.diff(bins.counts_below(edges, own.m.reshape(-1, 1), own.s.reshape(-1, 1))) / TOTAL


class Unrounded(Masses):
    """The same of Gaussians that were not rounded, by scipy."""

    def q(self, t, before):
        """As there."""
        forward = self.coder.reverse.forward
        log_abar = forward.log_alphas_cumprod.numpy()
        log_alpha = log_abar[t] - (log_abar[t - 1] if t else 0.0)
        value = self.coder.grids.values(t - 1, before) if t else before * (2 / (self.coder.reverse.levels - 1)) - 1
        return self._of(value * np.exp(log_alpha / 2), np.sqrt(-np.expm1(log_alpha)), t)

    def p(self, t, latents):
        """As there."""
        x_t = torch.from_numpy(pixels(self.coder.grids.values(t, latents)))
        timesteps = self.coder.reverse.forward.timesteps[t].expand(len(x_t))
        p = self.coder.reverse(self.coder.model(x_t, timesteps), x_t, t).p
        return self._of(p.mean.numpy().ravel(), (0.5 * p.log_variance).exp().numpy().ravel(), t - 1)

    def prior(self):
        """As there."""
        return self._of(np.zeros(1), np.ones(1), len(self.coder.grids) - 1)[0]

    def _of(self, mean, sigma, t):
        grids, pixel = self.coder.grids, self.coder.pixels
        bins, unit = (
            (grids.bins(t), exact_power(grids.spacing[t])) if t >= 0 else (pixel, 2 / (pixel.high - pixel.low))
        )
        edges = (np.arange(bins.low, bins.high + 2) - 0.5) * unit - (t < 0)
        z = (edges - mean[:, None]) / (sigma[:, None] if np.ndim(sigma) else sigma)
        z[:, 0], z[:, -1] = -np.inf, np.inf
        low, high = z[:, :-1], z[:, 1:]
        masses = np.where(low > 0, ndtr(-low) - ndtr(-high), ndtr(high) - ndtr(low))
        return np.maximum(masses, 1e-300)


class OfThirtyTwo(Unrounded):
    """With deviations rounded to a 32nd of an octave, as the format's first version did."""

    def _of(self, mean, sigma, t):
        return super()._of(mean, 2 ** (np.round(32 * np.log2(sigma)) / 32), t)


def net_bits(masses):
    """Bits that an image of each level adds, in expectation over its latents."""
    coder = masses.coder
    before = np.arange(coder.reverse.levels)
    reached, bits = np.eye(len(before)), np.zeros(len(before))
    for t in range(len(coder.grids)):
        q = masses.q(t, before)
        latents = np.arange(coder.grids.bins(t).low, coder.grids.bins(t).high + 1)
        bits += reached @ (q * np.log2(q / masses.p(t, latents).T)).sum(1)
        reached, before = reached @ q, latents
    return bits - reached @ np.log2(masses.prior())


def mean_net_bits(steps, levels, kind: Callable = Masses, finer=0, **options):
    """The mean over the data, on a grid finer by so many octaves."""
    reverse = process(levels, betas=CHAINS[steps], **options)
    coder = ChainCoder(PosteriorMean(reverse.forward), reverse)
    coder.grids = replace(coder.grids, spacing=tuple(own - finer * OCTAVE for own in coder.grids.spacing))
    values = np.linspace(-1, 1, levels)
    edges = np.concatenate([[-np.inf], (values[1:] + values[:-1]) / 2, [np.inf]])
    return np.diff(ndtr(edges / VARIANCE**0.5)) @ net_bits(kind(coder))


@pytest.mark.parametrize("steps", CHAINS)
@pytest.mark.parametrize("levels", [17, 256])
def test_net_bits_are_the_bound(steps, levels):
    """In the limit: what is left on fine grids falls with the square of their step."""
    gaps = [
        mean_net_bits(steps, levels, Unrounded, finer) - population_bits(levels, CHAINS[steps]) for finer in (3, 4)
    ]
    assert abs(gaps[0]) < 0.0005 and abs(gaps[1]) < 0.3 * abs(gaps[0])


@pytest.mark.parametrize("steps", CHAINS)
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_rounding_costs_next_to_nothing(steps, variance_type):
    """On the codec's own grid, of right variances and of wrong ones: less than 0.003 bits/dim either way."""
    rounded, own = (mean_net_bits(steps, 17, kind, variance_type=variance_type) for kind in (Masses, Unrounded))
    assert abs(rounded - own) < 0.003


@pytest.mark.parametrize("steps", CHAINS)
def test_the_codec_s_own_grid_costs_nothing_here(steps):
    """Bins as wide as sigma are another model than the bound's: here one that is a little better."""
    assert -0.025 < mean_net_bits(steps, 17) - population_bits(17, CHAINS[steps]) < 0.003


def test_a_32nd_of_an_octave_is_too_coarse():
    """It costs up to 0.035 bits/dim in the example, ten times what a 256th may."""
    costs = [mean_net_bits(steps, 17, OfThirtyTwo) - mean_net_bits(steps, 17, Unrounded) for steps in CHAINS]
    assert max(costs) == pytest.approx(0.0345, abs=0.0005)
