"""The Gaussian model of the data: its covariance in both bases, and the error of its linear (Wiener) denoiser.

Two covariances are made here by numpy in pixel space: the sample's, and the sample's averaged over all cyclic shifts
of the image, which is the covariance of the stationary model. The denoiser is the matrix K = sqrt(a) S (a S + (1 - a)
I)^-1 of either.
"""

import inspect

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpm_vlb import GaussianModel, covariance_eigenvalues

SHAPES = [(1, 9), (3, 5), (1, 4, 6), (3, 4, 3), (2, 2, 3, 2)]
KINDS = {"dense": 2048, "stationary": 1}
each_kind = pytest.mark.parametrize("kind", KINDS)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def data(n: int, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Skewed, correlated data whose positions and channels differ, with a mean."""
    white = torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mixed = (white + 0.8 * white.roll(1, -1) + 0.5 * white.flip(1)).exp()
    return 0.2 * mixed * torch.linspace(0.2, 1.5, white[0].numel(), dtype=torch.float64).reshape(shape) - 0.3


def fitted(kind: str, shape: tuple[int, ...], n: int = 40) -> tuple[GaussianModel, np.ndarray, np.ndarray]:
    """A model, and by numpy the mean (D,) and the covariance (D, D) that it should have."""
    x_0 = data(n, shape)
    pixels = x_0.numpy()
    if kind == "dense":
        covariance = np.cov(pixels.reshape(n, -1), rowvar=False)
    else:
        centred, axes = pixels - pixels.mean(0), tuple(range(2, pixels.ndim))
        shifts = [np.roll(centred, shift, axes) for shift in np.ndindex(*shape[1:])]
        covariance = np.mean([s.reshape(n, -1).T @ s.reshape(n, -1) / (n - 1) for s in shifts], axis=0)
    return GaussianModel.fit(x_0, KINDS[kind]), pixels.mean(0).ravel(), covariance


def per_coefficient(model: GaussianModel, values: Tensor) -> Tensor:
    """One value for each coefficient from one for each dimension: half of a real image's spectrum, in two parts."""
    if not model.stationary:
        return values
    *others, last = model.mean.shape[1:]
    grid = values.reshape(*others, last, len(model.mean))[..., : last // 2 + 1, :]
    return grid.movedim(-1, 0).flatten().repeat_interleave(2)


def probe(n: int, shape: tuple[int, ...], seed: int = 1) -> Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@each_shape
@each_kind
def test_covariance_is_numpy_s(kind, shape):
    """Mean and covariance are numpy's: the coefficients of the unit vectors, weighted by the eigenvalues, give it."""
    model, mean, covariance = fitted(kind, shape)
    assert model.stationary == (kind == "stationary")
    np.testing.assert_allclose(model.mean.flatten(), mean, rtol=1e-12, atol=1e-14)
    unit = torch.eye(len(mean), dtype=torch.float64).reshape(-1, *shape)
    rows = model.coefficients(unit).numpy()
    weights = per_coefficient(model, model.eigenvalues).numpy()
    np.testing.assert_allclose(rows * weights @ rows.T, covariance, rtol=1e-9, atol=1e-11 * np.trace(covariance))
    np.testing.assert_allclose(
        np.sort(model.eigenvalues), np.linalg.eigvalsh(covariance), rtol=1e-9, atol=1e-11 * np.trace(covariance)
    )


@each_shape
@each_kind
def test_coefficients_are_an_isometry(kind, shape):
    """Inner products of images are those of their coefficients: the basis is orthonormal, whatever the data."""
    model, *_ = fitted(kind, shape)
    x = probe(6, shape)
    z = model.coefficients(x)
    assert z.dtype == torch.float64 and z.shape == (6, len(per_coefficient(model, model.eigenvalues)))
    torch.testing.assert_close(z @ z.T, x.flatten(1) @ x.flatten(1).T, rtol=1e-12, atol=1e-11)
    torch.testing.assert_close(model.coefficients(2 * x[:1] - x[1:2]), 2 * z[:1] - z[1:2], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("abar", [0.9999, 0.7, 0.02])
@each_shape
@each_kind
def test_wiener_error_is_that_of_pixel_space(kind, shape, abar):
    """Equations 2 and 3: the error from coefficients is |x_0 - x_0_hat|^2 of the denoiser made as a matrix."""
    model, mean, covariance = fitted(kind, shape)
    x_0, noise = probe(5, shape, 2), probe(5, shape, 3)
    kernel = np.sqrt(abar) * covariance @ np.linalg.inv(abar * covariance + (1 - abar) * np.eye(len(mean)))
    x, e = (values.flatten(1).numpy() for values in (x_0, noise))
    x_t = np.sqrt(abar) * x + np.sqrt(1 - abar) * e
    x_0_hat = mean + (x_t - np.sqrt(abar) * mean) @ kernel.T
    lam = per_coefficient(model, model.eigenvalues)
    gain = abar**0.5 * lam / (abar * lam + 1 - abar)
    z, e = model.coefficients(x_0 - model.mean), model.coefficients(noise)
    error = ((1 - gain * abar**0.5) * z - gain * (1 - abar) ** 0.5 * e).square().sum(1)
    np.testing.assert_allclose(error, ((x - x_0_hat) ** 2).sum(1), rtol=1e-9)


@pytest.mark.parametrize("abar", [0.8, 0.3])
@each_shape
@each_kind
def test_expected_wiener_error(kind, shape, abar):
    """Equation 4 is the mean of the error over epsilon for any x_0, here one that is far from the data.

    The mean over 4000 draws of the error in pixel space is within 4 standard errors of it.
    """
    model, mean, covariance = fitted(kind, shape)
    x_0 = 2 * probe(1, shape, 4) + 0.5
    noise = probe(4000, shape, 5).flatten(1).numpy()
    kernel = np.sqrt(abar) * covariance @ np.linalg.inv(abar * covariance + (1 - abar) * np.eye(len(mean)))
    centred = x_0.flatten().numpy() - mean
    residual = centred - (np.sqrt(abar) * centred + np.sqrt(1 - abar) * noise) @ kernel.T
    errors = (residual**2).sum(1)
    lam = model.eigenvalues
    gain = abar**0.5 * lam / (abar * lam + 1 - abar)
    energy = model.coefficients(x_0 - model.mean)[0].square()
    of_x_0 = float((per_coefficient(model, (1 - gain * abar**0.5).square()) * energy).sum())
    of_noise = float((gain.square() * (1 - abar)).sum())
    standard_error = errors.std(ddof=1) / 4000**0.5
    assert abs(errors.mean() - (of_x_0 + of_noise)) < 4 * standard_error
    # Neither part of it would be missed at this precision.
    assert min(of_x_0, of_noise) > 8 * standard_error


@each_kind
def test_shrinkage_keeps_the_total_variance(kind):
    """Eigenvalues move towards their mean by one share, equation 23 of Chen et al. in numpy; basis and mean stay."""
    model = GaussianModel.fit(data(9, (2, 3, 3)), KINDS[kind])
    lam = model.eigenvalues.numpy()
    dims, shares = 18, []
    for examples in (2, 60, 5000):
        shrunk = model.shrunk(examples)
        rho = ((1 - 2 / dims) * (lam**2).sum() + lam.sum() ** 2) / (
            (examples + 1 - 2 / dims) * ((lam**2).sum() - lam.sum() ** 2 / dims)
        )
        shares.append(min(rho, 1))
        np.testing.assert_allclose(shrunk.eigenvalues, lam + shares[-1] * (lam.mean() - lam), rtol=1e-12, atol=1e-15)
        assert float(shrunk.eigenvalues.sum()) == pytest.approx(lam.sum(), rel=1e-12)
        assert torch.equal(shrunk.basis, model.basis) and torch.equal(shrunk.mean, model.mean)
    assert 1 >= shares[0] > shares[1] > shares[2] > 0 and shares[2] < 0.01


def test_shrinkage_comes_closer_to_the_covariance():
    """From 20 draws of 40 correlated values the shrunk covariance has less than half the sample's squared error.

    The theorem (Chen et al.) is that the share nearly minimises it on average; here the mean of 50 data sets is taken.
    """
    lam = torch.logspace(0, -1, 40, dtype=torch.float64)
    errors = torch.zeros(2, dtype=torch.float64)
    for seed in range(50):
        model = GaussianModel.fit(probe(20, (1, 40), seed) * lam.sqrt())
        for i, estimate in enumerate((model, model.shrunk(20))):
            errors[i] += (estimate.basis * estimate.eigenvalues @ estimate.basis.T - lam.diag()).square().sum()
    assert errors[1] < 0.5 * errors[0]


def test_equal_eigenvalues_are_not_shrunk():
    """A covariance that is its mean already stays as it is, without a division by its zero spread."""
    for value in (0.0, 0.3):
        model = GaussianModel(torch.zeros(1, 3), torch.full((3,), value, dtype=torch.float64), torch.eye(3))
        torch.testing.assert_close(model.shrunk(5).eigenvalues, model.eigenvalues, rtol=1e-12, atol=0)


@pytest.mark.parametrize("shape", [*SHAPES, (1, 16, 16)], ids=str)
@each_kind
def test_groups_keep_the_total_variance(kind, shape):
    """Rounded eigenvalues have the same sum, each within the grid's ratio of its own, in at most 64 groups of D."""
    model = GaussianModel.fit(data(40, shape), KINDS[kind])
    values, group, dims = model.grouped()
    assert float(dims.sum()) == model.mean.numel() and len(values) == len(dims) <= 64 and (dims > 0).all()
    assert float((values * dims).sum()) == pytest.approx(float(model.eigenvalues.sum()), rel=1e-12)
    assert group.shape == model.coefficients(probe(1, shape))[0].shape
    unit = torch.eye(model.mean.numel(), dtype=torch.float64).reshape(-1, *shape)
    energy = model.coefficients(unit).square().sum(0)  # E e^2 of each coefficient
    torch.testing.assert_close(torch.zeros_like(dims).index_add(0, group, energy), dims)
    own, rounded = per_coefficient(model, model.eigenvalues), values[group]
    # 64 values over six decades: neighbours differ by the factor 1e6^(1/63), and a group spans no more.
    large = own > 1.2e-6 * own.max()
    assert ((rounded / own)[large].log().abs() <= np.log(1e6) / 63 * (1 + 1e-9)).all()
    assert (rounded[~large] <= 1.3e-6 * own.max()).all()


def test_equal_eigenvalues_are_one_group():
    """White data's exact model has one eigenvalue; a covariance without any variance has one, too: 0."""
    for value in (0.3, 0.0):
        white = GaussianModel(torch.zeros(1, 3), torch.full((3,), value, dtype=torch.float64), torch.eye(3))
        values, group, dims = white.grouped()
        assert values.tolist() == [value] and group.tolist() == [0, 0, 0] and dims.tolist() == [3]


@each_kind
def test_fit_is_the_same_in_float32(kind):
    """The model of float32 images is made in float64, so that it equals the model of the same values in float64."""
    x_0 = data(30, (2, 4, 4)).float()
    single, double = GaussianModel.fit(x_0, KINDS[kind]), GaussianModel.fit(x_0.double(), KINDS[kind])
    assert torch.equal(single.eigenvalues, double.eigenvalues) and single.eigenvalues.dtype == torch.float64
    assert torch.equal(covariance_eigenvalues(x_0, KINDS[kind]), single.eigenvalues)


def test_many_dimensions_are_taken_for_stationary():
    """Up to `max_dims`, 2048 unless told otherwise, the covariance is the sample's; above, D coefficients, not D^2."""
    assert not GaussianModel.fit(data(3, (2, 5)), max_dims=10).stationary
    assert GaussianModel.fit(data(3, (2, 5)), max_dims=9).stationary
    model = GaussianModel.fit(data(3, (1, 2049)))
    assert model.stationary and model.eigenvalues.shape == (2049,) and model.basis.numel() == 2049
    assert inspect.signature(GaussianModel.fit).parameters["max_dims"].default == 2048


def test_table_rows_without_positions_are_fitted():
    """Data (N, C) has one position: both models are the sample's covariance."""
    x_0 = data(30, (6,))
    expected = np.linalg.eigvalsh(np.cov(x_0.numpy(), rowvar=False))
    for max_dims in KINDS.values():
        model = GaussianModel.fit(x_0, max_dims)
        np.testing.assert_allclose(np.sort(model.eigenvalues), expected, rtol=1e-9, atol=1e-12)
        z = model.coefficients(x_0)
        torch.testing.assert_close(z.square().sum(1), x_0.square().sum(1))


@pytest.mark.parametrize("bad", [torch.zeros(1, 1, 2, 2), torch.full((3, 1, 2, 2), float("nan"))], ids=["one", "nan"])
def test_unusable_data_is_refused(bad):
    """One example has no covariance, and NaN would spread to all of it."""
    with pytest.raises(ValueError, match="at least 2 finite"):
        GaussianModel.fit(bad)
