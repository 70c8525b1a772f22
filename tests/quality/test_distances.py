"""The distances against closed forms, term by term, and over many draws."""

import numpy as np
import pytest
from scipy.linalg import sqrtm
from scipy.spatial.distance import pdist

from ddpm_vlb.quality.distances import compare, frechet_distance, kernel_distance, median_distance


def moments(count, mean, covariance, seed=0):
    """Random features with exactly this sample mean and unbiased sample covariance."""
    x = np.random.default_rng(seed).standard_normal((count, len(mean)))
    x -= x.mean(0)
    white = x @ np.linalg.inv(np.linalg.cholesky(np.atleast_2d(np.cov(x, rowvar=False)))).T
    return white @ np.linalg.cholesky(covariance).T + mean


def covariance(dims, seed):
    a = np.random.default_rng(seed).standard_normal((dims, dims))
    return a @ a.T + 0.1 * np.eye(dims)


def gaussian_fd(mean_x, cov_x, mean_y, cov_y):
    """The closed form, with scipy's matrix root."""
    return ((mean_x - mean_y) ** 2).sum() + np.trace(cov_x + cov_y - 2 * sqrtm(cov_x @ cov_y).real)


@pytest.mark.parametrize("dims, counts", [(1, (5, 9)), (4, (50, 30)), (4, (5, 400)), (7, (8, 9))])
def test_frechet_distance_of_gaussians(dims, counts):
    """Whose means and covariances are known, of any shape: the covariances do not commute."""
    means = np.linspace(-1, 1, dims), np.linspace(2, 0.5, dims)
    covariances = covariance(dims, 1), covariance(dims, 2)
    x, y = (moments(*own) for own in zip(counts, means, covariances))
    expected = gaussian_fd(means[0], covariances[0], means[1], covariances[1])
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(y, x) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("count, dims", [(30, 4), (4, 30)])
def test_frechet_distance_of_a_set_to_itself_is_zero(count, dims):
    """In another order too, and with more features than images; moved by one, it is the square of the way."""
    x = np.random.default_rng(0).standard_normal((count, dims))
    assert frechet_distance(x, x[::-1]) == pytest.approx(0, abs=1e-11)
    assert frechet_distance(x, x + 1) == pytest.approx(dims, rel=1e-12)


def test_a_count_is_a_repetition():
    """For the Frechet distance; the kernel distance does not pair a feature with its own copies."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((9, 3)), rng.standard_normal((7, 3)) + 1
    v, w = (rng.multinomial(len(z), np.full(len(z), 1 / len(z))).astype(float) for z in (x, y))
    assert 0 in v and v.max() > 1
    copies = [np.repeat(z, counts.astype(int), 0) for z, counts in ((x, v), (y, w))]
    assert frechet_distance(x, y, v, w) == pytest.approx(frechet_distance(*copies), rel=1e-10)
    expected = double_sum(x, y, 1.5, v, w)
    assert kernel_distance(x, y, 1.5, v[None], w[None]) == pytest.approx([expected], rel=1e-10)


def double_sum(x, y, sigma, v, w):
    """1000 MMD^2 term by term."""

    def mean(a, b, s, t, same):
        pairs = [(i, j) for i in range(len(a)) for j in range(len(b)) if not (same and i == j)]
        k = [np.exp(-((a[i] - b[j]) ** 2).sum() / (2 * sigma**2)) for i, j in pairs]
        return np.average(k, weights=[s[i] * t[j] for i, j in pairs])

    return 1000 * (mean(x, x, v, v, True) + mean(y, y, w, w, True) - 2 * mean(x, y, v, w, False))


def test_kernel_distance_is_the_double_sum(monkeypatch):
    """In one block or in several."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((11, 3)), rng.standard_normal((8, 3)) + 0.5
    expected = pytest.approx([double_sum(x, y, 0.8, np.ones(11), np.ones(8))], rel=1e-10)
    assert kernel_distance(x, y, 0.8) == expected
    monkeypatch.setattr("ddpm_vlb.quality.distances.BLOCK", 3)
    assert kernel_distance(x, y, 0.8) == expected


@pytest.mark.parametrize("shift", [0.0, 0.7])
def test_kernel_distance_is_unbiased(shift):
    """Its mean over 400 pairs of small sets is the closed form, zero without a shift, within 4 standard errors."""
    rng, sigma, dims = np.random.default_rng(0), 1.2, 3
    values = np.array(
        [
            kernel_distance(rng.standard_normal((6, dims)), rng.standard_normal((5, dims)) + shift, sigma)[0]
            for _ in range(400)
        ]
    )
    width = sigma**2 + 2  # E k of two standard normals whose means are `shift` apart in each dimension
    apart = 1 - np.exp(-dims * shift**2 / (2 * width))
    expected = 1000 * 2 * (sigma**2 / width) ** (dims / 2) * apart
    assert abs(values.mean() - expected) < 4 * values.std() / len(values) ** 0.5
    # Pairs of a feature with itself would shift the mean by far more than that.
    assert 1000 * (1 - (sigma**2 / width) ** (dims / 2)) * (1 / 6 + 1 / 5) > 25 * values.std() / len(values) ** 0.5


@pytest.mark.parametrize("shift, mmd_ratio", [(1.0, (0.8, 1.25)), (0.0, (1.3, 2.2))])
def test_bootstrap_errors(shift, mmd_ratio):
    """The spread of the distances over 150 fresh pairs of sets; that of MMD is 3^(1/2) too large without a shift."""
    rng = np.random.default_rng(0)
    draws = [
        compare(rng.standard_normal((60, 4)), rng.standard_normal((80, 4)) + shift, 2.0, 50, seed)
        for seed in range(150)
    ]
    values = {name: np.array([draw[name] for draw in draws]) for name in draws[0]}
    fd = values["fd_se"].mean() / values["fd"].std()
    assert (0.8 < fd < 1.25) if shift else (0.8 < fd < 2)
    assert mmd_ratio[0] < values["mmd_se"].mean() / values["mmd"].std() < mmd_ratio[1]
    # The FD is too large, and by what the bootstrap says.
    bias = values["fd"].mean() - 4 * shift**2
    assert bias > 0 and values["fd_bias"].mean() == pytest.approx(bias, rel=0.5)


def test_compare_depends_on_its_seed_alone():
    """The distances not even on that."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((9, 2)), rng.standard_normal((8, 2))
    first, again, other = (compare(x, y, 1.0, 10, seed) for seed in (0, 0, 1))
    assert first == again and first["fd_se"] != other["fd_se"] and first["fd"] == other["fd"]
    assert (first["num_samples"], first["num_images"]) == (9, 8)


def test_median_distance():
    """Of all pairs; features that are all the same are refused."""
    x = np.random.default_rng(0).standard_normal((20, 3))
    assert median_distance(x) == np.median(pdist(x))
    with pytest.raises(ValueError, match="equal"):
        median_distance(np.ones((20, 3)))
