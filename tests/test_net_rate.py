"""The net rate is the bound: the expectation of what an image adds to a stack, by adding up all latents there are.

An image of one pixel has a few hundred latents a step, so that nothing is drawn here. Its network is linear, and its
bound known (analytic).
"""

from dataclasses import replace

import numpy as np
import pytest
from analytic import BETAS, VARIANCE, PosteriorMean, population_bits, process
from scipy.special import ndtr

from ddpm_vlb import make_betas
from ddpm_vlb.bits_back import ChainCoder
from ddpm_vlb.integer_gaussians import OCTAVE, TOTAL

CHAINS = {2: BETAS[:2], 12: BETAS, 50: make_betas("linear", 50, 0.02, 0.2)}


def pixels(numbers):
    """Each as an image."""
    return np.asarray(numbers).reshape(-1, 1, 1, 1)


def masses(bins, own):
    """Of all bins, a row for each Gaussian."""
    edges = np.arange(bins.low, bins.high + 2)
    return np.diff(bins.counts_below(edges, own.m.reshape(-1, 1), own.s.reshape(-1, 1))) / TOTAL


def net_bits(coder):
    """Bits that an image of each level adds, in expectation over its latents."""
    levels = coder.reverse.levels
    before, reached, bits = np.arange(levels), np.eye(levels), np.zeros(levels)
    for t in range(len(coder.grids)):
        q = masses(*coder.drawn_from(t, pixels(before)))
        latents = np.arange(coder.grids.bins(t).low, coder.grids.bins(t).high + 1)
        p = masses(*coder.pushed_with(t, pixels(latents), {}))
        bits += reached @ (q * np.log2(q / p.T)).sum(1)
        reached, before = reached @ q, latents
    return bits - reached @ np.log2(masses(*coder.prior((1, 1, 1, 1)))[0])


def gap(steps, levels, finer=0):
    """Bits that an image of the data costs beyond its bound, on a grid finer by so many octaves."""
    reverse = process(levels, betas=CHAINS[steps])
    coder = ChainCoder(PosteriorMean(reverse.forward), reverse)
    coder.grids = replace(coder.grids, spacing=tuple(own - finer * OCTAVE for own in coder.grids.spacing))
    values = np.linspace(-1, 1, levels)
    edges = np.concatenate([[-np.inf], (values[1:] + values[:-1]) / 2, [np.inf]])
    return np.diff(ndtr(edges / VARIANCE**0.5)) @ net_bits(coder) - population_bits(levels, CHAINS[steps])


@pytest.mark.parametrize("steps", CHAINS)
@pytest.mark.parametrize("levels", [17, 256])
def test_net_bits_are_the_bound(steps, levels):
    """To 0.005 bits/dim on a fine grid, so that no rounding costs more; and the codec's own grid does not add to it.

    It takes from it where the network errs, as one of fixed variance does: bins as wide as sigma make p wider.
    """
    assert abs(gap(steps, levels, finer=2)) < 0.005
    assert -0.025 < gap(steps, levels) < 0.003
