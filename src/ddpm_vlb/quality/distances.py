"""How far two sets of features are apart, with errors: Frechet distance and kernel distance.

(1)  FD = |m_x - m_y|^2 + tr(S_x + S_y - 2 (S_x S_y)^(1/2)), m and S the means and covariances of the two sets
(2)  MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y), k(x, y) = exp(-|x - y|^2 / (2 sigma^2)), x and x' independent

FD takes the features for Gaussian, and its estimate from n features is too large by a term of order 1/n. The estimate
of MMD^2 is unbiased: it is negative as often as not where the two sets come from one distribution.

Sources: Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium" (1);
Gretton et al. 2012, "A Kernel Two-Sample Test", eq. 3, and section 8 for the median as sigma (2); Jayasumana et al.
2024, "Rethinking FID" (CMMD: sigma = 10 on CLIP's normalised embeddings, and 1000 MMD^2 as the number to print; its
own code pairs each feature with itself too, and is biased).
"""

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import pdist
from sklearn.metrics.pairwise import rbf_kernel

Floats = NDArray[np.float64]
MMD_SCALE = 1000.0
BLOCK = 1024  # rows of a kernel matrix that are held at a time


def frechet_distance(x: Floats, y: Floats, x_counts: Floats | None = None, y_counts: Floats | None = None) -> float:
    """Equation 1 with the unbiased covariances.

    With S_x = A^T A and S_y = B^T B the trace of (S_x S_y)^(1/2) is the sum of the singular values of A B^T, which
    needs no matrix root and no full rank.

    Args:
        x: (N, D), features, N at least 2.
        y: (M, D), those of the other set.
        x_counts: (N,), how often each one counts; once when None.
        y_counts: (M,), the same for y.

    Source: Heusel et al. 2017.
    """
    mean_x, root_x = _gaussian(x, x_counts)
    mean_y, root_y = _gaussian(y, y_counts)
    overlap = np.linalg.svd(root_x @ root_y.T, compute_uv=False).sum()
    gap = mean_x - mean_y
    return float(gap @ gap + (root_x**2).sum() + (root_y**2).sum() - 2 * overlap)


def _gaussian(x: Floats, counts: Floats | None) -> tuple[Floats, Floats]:
    """The mean of features, and a root A (min(N, D), D) of their covariance A^T A."""
    counts = np.ones(len(x)) if counts is None else counts
    total = counts.sum()
    mean = counts @ x / total
    root = np.sqrt(counts / (total - 1))[:, None] * (x - mean)
    return mean, np.asarray(np.linalg.qr(root, mode="r")) if len(x) > x.shape[1] else root


def kernel_distance(
    x: Floats, y: Floats, sigma: float, x_counts: Floats | None = None, y_counts: Floats | None = None
) -> Floats:
    """The unbiased estimate of equation 2, times 1000.

    A feature is never paired with itself, however often it counts: a bootstrap sample's copies are no new pairs.

    Args:
        x: (N, D), features, N at least 2.
        y: (M, D), those of the other set.
        sigma: bandwidth of the kernel, positive.
        x_counts: (R, N), how often each one counts in each of R samples; once, in one sample, when None.
        y_counts: (R, M), the same for y.

    Returns:
        (R,), an estimate for each sample.

    Source: Gretton et al. 2012, eq. 3.
    """
    v = np.ones((1, len(x))) if x_counts is None else x_counts
    w = np.ones((1, len(y))) if y_counts is None else y_counts
    within = _within(x, v, sigma) + _within(y, w, sigma)
    across = _summed(x, y, v, w, sigma) / (v.sum(1) * w.sum(1))
    return MMD_SCALE * (within - 2 * across)


def _within(x: Floats, counts: Floats, sigma: float) -> Floats:
    """Mean of the kernel over pairs of two different features."""
    itself = (counts**2).sum(1)  # k(x, x) = 1
    return (_summed(x, x, counts, counts, sigma) - itself) / (counts.sum(1) ** 2 - itself)


def _summed(x: Floats, y: Floats, v: Floats, w: Floats, sigma: float) -> Floats:
    """sum_ij v_i k(x_i, y_j) w_j for each row of v and w."""
    total = np.zeros(len(v))
    for start in range(0, len(x), BLOCK):
        rows = slice(start, start + BLOCK)
        total += ((v[:, rows] @ rbf_kernel(x[rows], y, gamma=0.5 / sigma**2)) * w).sum(1)
    return total


def median_distance(x: Floats) -> float:
    """The median distance between features, at most 1000 of them: sigma where nothing better is known.

    Args:
        x: (N, D), features, N at least 2.

    Raises:
        ValueError: most of them are the same.

    Source: Gretton et al. 2012, section 8.
    """
    median = float(np.median(pdist(x[:1000])))
    if not median > 0:
        raise ValueError("Most features of the test images are equal: the feature model tells nothing apart.")
    return median


def compare(x: Floats, y: Floats, sigma: float, num_bootstrap: int, seed: int) -> dict[str, float | int]:
    """Both distances, with the standard deviations over resampled features of both sets as standard errors.

    `fd_bias` is the mean of the resampled FDs less the FD, the bootstrap's estimate of how much too large the FD is.
    Where the sets come from one distribution the resampled MMDs spread more than the MMD does, up to 3^(1/2) times.

    Args:
        x: (N, D), features of samples, N at least 2.
        y: (M, D), features of images.
        sigma: bandwidth of the kernel, positive.
        num_bootstrap: how often to resample, at least 2.
        seed: of the resampling.

    Source: Efron & Tibshirani 1993, "An Introduction to the Bootstrap", chapters 6 and 10.
    """
    rng = np.random.default_rng(seed)
    v, w = (rng.multinomial(len(z), np.full(len(z), 1 / len(z)), num_bootstrap).astype(np.float64) for z in (x, y))
    fd, mmd = frechet_distance(x, y), float(kernel_distance(x, y, sigma)[0])
    fds = np.array([frechet_distance(x, y, *counts) for counts in zip(v, w)])
    return {
        "fd": fd,
        "fd_se": float(fds.std(ddof=1)),
        "fd_bias": float(fds.mean() - fd),
        "mmd": mmd,
        "mmd_se": float(kernel_distance(x, y, sigma, v, w).std(ddof=1)),
        "num_samples": len(x),
        "num_images": len(y),
    }
