"""Gaussian masses as integers: they are the masses, they add up, nothing has none, and every slot finds its bin."""

import math

import numpy as np
import pytest
from scipy.special import ndtr

from ddpm_vlb.integer_gaussians import LARGEST, OCTAVE, PLACES, SMALLEST, TOTAL, Bins, exact_power, rounded

BINS = [Bins(0, 1), Bins(0, 16), Bins(0, 255), Bins(0, 65535), Bins(-300, 300)]


def gaussians(bins, n=400, seed=0, narrowest=-6.0):
    """Random ones in and beyond the bins, rounded."""
    rng = np.random.default_rng(seed)
    width = math.log2(bins.high - bins.low + 1)
    return rounded(rng.uniform(bins.low - width, bins.high + width, n), rng.uniform(narrowest, width, n))


@pytest.mark.parametrize("s", [SMALLEST, -257, -1, 0, 1, 300, LARGEST])
def test_powers(s):
    """2^(s/256) to nine digits and more; powers of two exactly."""
    assert exact_power(s) == pytest.approx(2 ** (s / OCTAVE), rel=1e-10)
    assert exact_power(s // OCTAVE * OCTAVE) == 2.0 ** (s // OCTAVE)


@pytest.mark.parametrize("bins", BINS)
def test_counts_add_up_and_none_is_zero(bins):
    """Every bin has a count, and all of them have 2^28."""
    own = gaussians(bins, 8)
    j = np.arange(bins.low, bins.high + 2)
    counts = np.stack([bins.counts_below(j, np.full_like(j, m), np.full_like(j, s)) for m, s in zip(own.m, own.s)])
    assert (counts[:, 0] == 0).all() and (counts[:, -1] == TOTAL).all() and (np.diff(counts, axis=1) >= 1).all()


@pytest.mark.parametrize("bins", BINS)
def test_masses_are_the_gaussian_s(bins):
    """Each bin's mass is the rounded Gaussian's own, but for its one count and the straight lines of the table."""
    own = gaussians(bins)
    sigma = 2.0 ** (own.s / OCTAVE)
    j = np.clip(np.rint(own.m / PLACES * sigma), bins.low, bins.high).astype(np.int64)
    mass = (bins.counts_below(j + 1, own.m, own.s) - bins.counts_below(j, own.m, own.s)) / TOTAL
    low, high = ((j + half - own.m / PLACES * sigma) / sigma for half in (-0.5, 0.5))
    exact = ndtr(np.where(j == bins.high, np.inf, high)) - ndtr(np.where(j == bins.low, -np.inf, low))
    shared = 1 - (bins.high - bins.low + 1) / TOTAL
    # A line over a 256th of a sigma bends by at most h^2 / 8 max |phi'| = 4.7e-7; positions are good to 3e-6 of them.
    assert np.abs(mass - (exact * shared + 1 / TOTAL)).max() < 3e-6


@pytest.mark.parametrize("bins", BINS)
def test_every_slot_finds_its_bin(bins):
    """C_j <= slot < C_j+1, for many at once and for one at a time."""
    own = gaussians(bins)
    slots = np.random.default_rng(1).integers(0, TOTAL, len(own.m))
    slots[:2] = 0, TOTAL - 1
    j = bins.find(slots, own.m, own.s)
    below, up_to = bins.counts_below(j, own.m, own.s), bins.counts_below(j + 1, own.m, own.s)
    assert (below <= slots).all() and (slots < up_to).all()
    for row in range(0, len(j), 7):
        found = bins.find_one(int(slots[row]), int(own.m[row]), int(own.s[row]))
        assert found == (j[row], below[row], up_to[row])


def test_rounding_is_to_a_64th_of_sigma_and_a_256th_of_an_octave():
    """Both are as near as that, where they are not beyond all bounds."""
    rng = np.random.default_rng(0)
    mean, log2_sigma = rng.normal(size=500) * 100, rng.uniform(-7, 17, 500)
    own = rounded(mean, log2_sigma)
    sigma = 2.0 ** (own.s / OCTAVE)
    assert np.abs(own.s / OCTAVE - log2_sigma).max() <= 0.5 / OCTAVE + 1e-12
    assert (np.abs(own.m / PLACES * sigma - mean) / sigma).max() <= 0.5 / PLACES + 1e-6


def test_the_margin_is_the_distance_to_another_rounding():
    """A mean just below a boundary has next to none, and one in the middle all of it."""
    for offset, margin in ((0.5 - 1e-6, 1e-6), (0.0, 0.5), (0.25, 0.25)):
        own = rounded(np.array([(3 + offset) / PLACES, 0.0]), np.zeros(2))
        assert own.margin == pytest.approx(margin, abs=1e-9)


@pytest.mark.parametrize("mean, log2_sigma", [(np.nan, 0.0), (np.inf, 0.0), (1e300, -200.0), (0.0, np.nan), (0, 1e9)])
def test_what_no_gaussian_has_is_still_coded(mean, log2_sigma):
    """A network that gives nonsense makes files long, not wrong."""
    bins, own = Bins(0, 16), rounded(np.array([mean]), np.array([log2_sigma]))
    counts = bins.counts_below(np.arange(18), np.full(18, own.m[0]), np.full(18, own.s[0]))
    assert counts[0] == 0 and counts[-1] == TOTAL and (np.diff(counts) >= 1).all()
