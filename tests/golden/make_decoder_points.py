"""Writes decoder_points.npz: exact log masses of a Gaussian's bins, and their gradients, at 10,000 points a regime.

Run as `python tests/golden/make_decoder_points.py`; it takes half a minute. Every input is exact in float32, so one
set serves both dtypes: `x` is the float32 nearest to the level -1 + 2 k / (levels - 1), and the bin reaches
1 / (levels - 1) to both sides of that very number, open below for k = 0 and above for the last level.
"""

from pathlib import Path

import mpmath
import numpy as np

POINTS = 10_000
DIGITS = 50
REGIMES = ("near", "tails", "narrow", "coarse", "edges")


def _standard_scores(rng, low, high):
    """Signed numbers with magnitudes log-uniform in [low, high]."""
    return rng.choice([-1.0, 1.0], POINTS) * np.exp(rng.uniform(np.log(low), np.log(high), POINTS))


def _mixed_scores(rng):
    """Half uniform in [-5, 5], half far out."""
    return np.where(rng.random(POINTS) < 0.5, rng.uniform(-5, 5, POINTS), _standard_scores(rng, 5, 1e5))


def inputs(regime):
    """Levels, level numbers k, means and log variances of a regime's points."""
    rng = np.random.default_rng([20240607, REGIMES.index(regime)])
    sigma = np.exp(rng.uniform(np.log(1e-5), np.log(100), POINTS))
    levels = np.full(POINTS, 256)
    k = rng.integers(1, 255, POINTS)
    offset = np.zeros(POINTS)  # of the point that the scores are measured from, in bin widths from the level
    if regime == "near":
        z = rng.uniform(-5, 5, POINTS)
    elif regime == "tails":
        z = _standard_scores(rng, 5, 1e5)
    elif regime == "narrow":
        levels = np.full(POINTS, 65536)
        k = rng.integers(1, 65535, POINTS)
        z = _mixed_scores(rng)
    elif regime == "coarse":
        levels = rng.choice([2, 17], POINTS)
        k = rng.integers(0, levels)
        z = _mixed_scores(rng)
        offset = rng.choice([-0.5, 0.0, 0.5], POINTS)
    else:
        levels = rng.choice([17, 256, 65536], POINTS)
        k = rng.choice([0, 1, -2, -1], POINTS) % levels
        z = _mixed_scores(rng)
        offset = rng.choice([-0.5, 0.0, 0.5], POINTS)
    mean = level(k, levels) + offset * 2 / (levels - 1) + z * sigma
    return levels, k, mean.astype(np.float32), (2 * np.log(sigma)).astype(np.float32)


def level(k, levels):
    """The value of level k, rounded to float32."""
    return (-1 + 2 * k / (levels - 1)).astype(np.float32).astype(np.float64)


def exact(x, mean, log_variance, k, levels):
    """log P, d log P / d mean and d log P / d log_variance at one point, by complementary error functions."""
    half = mpmath.mpf(1) / (int(levels) - 1)
    x, mean, log_variance = (mpmath.mpf(float(value)) for value in (x, mean, log_variance))
    sigma = mpmath.exp(log_variance / 2)
    low = -mpmath.inf if k == 0 else (x - half - mean) / sigma
    high = mpmath.inf if k == levels - 1 else (x + half - mean) / sigma
    if low + high < 0:  # by symmetry; the tail that both ends lie in must be the small one
        tails = mpmath.erfc(-high / mpmath.sqrt(2)) - mpmath.erfc(-low / mpmath.sqrt(2))
    else:
        tails = mpmath.erfc(low / mpmath.sqrt(2)) - mpmath.erfc(high / mpmath.sqrt(2))
    mass = tails / 2
    density_low, density_high = (0 if mpmath.isinf(z) else mpmath.npdf(z) for z in (low, high))
    moment_low, moment_high = (0 if mpmath.isinf(z) else z * mpmath.npdf(z) for z in (low, high))
    by_mean = (density_low - density_high) / (sigma * mass)
    by_log_variance = (moment_low - moment_high) / (2 * mass)
    return float(mpmath.log(mass)), float(by_mean), float(by_log_variance)


def main():
    """Write the file beside this script."""
    arrays = {}
    with mpmath.workdps(DIGITS):
        for regime in REGIMES:
            levels, k, mean, log_variance = inputs(regime)
            rows = [exact(*row) for row in zip(level(k, levels), mean, log_variance, k, levels, strict=True)]
            log_mass, by_mean, by_log_variance = np.array(rows).T
            arrays[f"{regime}.levels"] = levels.astype(np.uint32)
            arrays[f"{regime}.k"] = k.astype(np.uint16)
            arrays[f"{regime}.mean"] = mean
            arrays[f"{regime}.log_variance"] = log_variance
            arrays[f"{regime}.exact"] = log_mass
            arrays[f"{regime}.exact_grad_mean"] = by_mean.astype(np.float32)
            arrays[f"{regime}.exact_grad_log_variance"] = by_log_variance.astype(np.float32)
    np.savez_compressed(Path(__file__).with_name("decoder_points.npz"), **arrays)


if __name__ == "__main__":
    main()
