"""Diagonal Gaussians against mpmath, torch.distributions and what must hold of any distribution."""

import functools
import math
from pathlib import Path

import mpmath
import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_vlb import DiagonalGaussian
from ddpm_vlb.distributions import gaussian_kl, promote_half

GOLDEN = Path(__file__).parent / "golden"
REGIMES = ("near", "tails", "narrow", "coarse", "edges")
DTYPES = (torch.float32, torch.float64)
seeded = settings(deadline=None, derandomize=True, max_examples=60)


@pytest.fixture(scope="module")
def points():
    """10,000 points of each regime, with exact log masses and gradients; all inputs are exact in float32."""
    with np.load(GOLDEN / "decoder_points.npz") as file:
        data = dict(file)
    regimes = {}
    for regime in REGIMES:
        arrays = {key.removeprefix(f"{regime}."): data[key] for key in data if key.startswith(f"{regime}.")}
        levels, k = arrays["levels"].astype(np.int64), arrays["k"].astype(np.int64)
        arrays["x"] = (-1 + 2 * k / (levels - 1)).astype(np.float32)
        sigma = np.exp(arrays["log_variance"].astype(np.float64) / 2)
        arrays["z"] = np.abs(arrays["x"].astype(np.float64) - arrays["mean"]) / sigma
        regimes[regime] = arrays
    return regimes


def decoder(arrays, dtype):
    """Log masses and their gradients by mean and by log variance, in the order of the points."""
    values, by_mean, by_log_variance = (np.empty(len(arrays["x"])) for _ in range(3))
    for levels in np.unique(arrays["levels"]):
        rows = arrays["levels"] == levels
        columns = (arrays[name][rows] for name in ("x", "mean", "log_variance"))
        x, mean, log_variance = (torch.tensor(column, dtype=dtype) for column in columns)
        mean.requires_grad_(), log_variance.requires_grad_()
        log_mass = DiagonalGaussian(mean, log_variance).discretized_log_prob(x, int(levels))
        assert log_mass.dtype == dtype
        log_mass.sum().backward()
        values[rows], by_mean[rows], by_log_variance[rows] = log_mass.detach(), mean.grad, log_variance.grad
    return values, by_mean, by_log_variance


def log_masses(arrays, dtype):
    """Log masses where no gradients are asked for."""
    values = np.empty(len(arrays["x"]))
    for levels in np.unique(arrays["levels"]):
        rows = arrays["levels"] == levels
        x, mean, log_variance = (
            torch.tensor(arrays[name][rows], dtype=dtype) for name in ("x", "mean", "log_variance")
        )
        values[rows] = DiagonalGaussian(mean, log_variance).discretized_log_prob(x, int(levels))
    return values


def gaussian(mean, log_variance, dtype=torch.float64):
    """A Gaussian from numbers."""
    return DiagonalGaussian(torch.as_tensor(mean, dtype=dtype), torch.as_tensor(log_variance, dtype=dtype))


def exact_kl(difference, log_variance_1, log_variance_2):
    """KL of two Gaussians to 60 digits, from the very numbers that float holds."""
    with mpmath.workdps(60):
        u = mpmath.mpf(float(log_variance_2)) - mpmath.mpf(float(log_variance_1))
        scaled = mpmath.mpf(float(difference)) ** 2 * mpmath.exp(-mpmath.mpf(float(log_variance_2)))
        return (u - 1 + mpmath.exp(-u) + scaled) / 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("regime", REGIMES)
def test_log_mass_is_exact(points, regime, dtype):
    """DDPM eq. 13 with the exact CDF: to 2e-5 (float64: 1e-10) within 10 sigma, to 1e-5 (1e-10) relative beyond.

    Beyond 10 sigma a wide bin may still hold nearly all the mass: the logarithm is then near 0, and absolute again.
    """
    arrays = points[regime]
    values, _, _ = decoder(arrays, dtype)
    error, near = np.abs(values - arrays["exact"]), arrays["z"] <= 10
    absolute, relative = (2e-5, 1e-5) if dtype == torch.float32 else (1e-10, 1e-10)
    assert near.sum() + (~near).sum() == 10_000
    assert error[near].max(initial=0) <= absolute
    assert (error[~near] <= np.maximum(relative * np.abs(arrays["exact"][~near]), absolute)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("wrt", ["mean", "log_variance"])
def test_gradient_of_log_mass(points, regime, dtype, wrt):
    """Gradients are finite, within 1e-3 (relative, or 1e-2), and nowhere zero where the true one exceeds 1."""
    arrays = points[regime]
    _, by_mean, by_log_variance = decoder(arrays, dtype)
    gradient, exact = by_mean if wrt == "mean" else by_log_variance, arrays[f"exact_grad_{wrt}"].astype(np.float64)
    assert np.isfinite(gradient).all()
    assert (np.abs(gradient - exact) <= np.maximum(1e-3 * np.abs(exact), 1e-2)).all()
    assert (gradient[np.abs(exact) > 1] != 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("regime", REGIMES)
def test_log_mass_without_gradients(points, regime, dtype):
    """What is scored is what was trained: the same values when no slopes are asked for, to the last digits."""
    arrays = points[regime]
    with_slopes, without, rounding = decoder(arrays, dtype)[0], log_masses(arrays, dtype), torch.finfo(dtype).eps
    np.testing.assert_allclose(without, with_slopes, rtol=8 * rounding, atol=8 * rounding)


@pytest.mark.parametrize("regime", REGIMES)
def test_stored_points_are_exact(points, regime):
    """The stored log masses and gradients are what another program gives at 100 digits, at 50 of the points."""
    arrays = points[regime]
    assert len(arrays["x"]) == 10_000
    for i in range(0, 10_000, 200):
        x, mean, log_variance = (mpmath.mpf(float(arrays[name][i])) for name in ("x", "mean", "log_variance"))
        log_mass = functools.partial(reference.log_bin_mass, x, levels=int(arrays["levels"][i]))
        with mpmath.workdps(100):
            exact = log_mass(mean, log_variance)
            by_mean = mpmath.diff(lambda m, v=log_variance: log_mass(m, v), mean)  # noqa: B023
            by_log_variance = mpmath.diff(lambda v, m=mean: log_mass(m, v), log_variance)  # noqa: B023
        # 50 digits of a mass that is all but one leave 1e-50 in its logarithm.
        assert arrays["exact"][i] == pytest.approx(float(exact), rel=1e-14, abs=1e-45)
        assert arrays["exact_grad_mean"][i] == pytest.approx(float(by_mean), rel=1e-6, abs=1e-30)
        assert arrays["exact_grad_log_variance"][i] == pytest.approx(float(by_log_variance), rel=1e-6, abs=1e-30)


@seeded
@given(
    levels=st.one_of(st.integers(2, 20), st.sampled_from([256, 1000, 4096])),
    log_sigma=st.floats(math.log(1e-5), math.log(100)),
    mean=st.floats(-3, 3),
)
def test_masses_sum_to_one(levels, log_sigma, mean):
    """The bins of all levels tile the line: their masses sum to one, whatever the Gaussian."""
    x = torch.linspace(-1, 1, levels, dtype=torch.float64)
    p = gaussian(mean, 2 * log_sigma)
    assert float(p.discretized_log_prob(x, levels).exp().sum()) == pytest.approx(1, abs=1e-10)
    single = DiagonalGaussian(p.mean.float(), p.log_variance.float()).discretized_log_prob(x.float(), levels)
    # Levels that are rounded to float32 shift bin edges by up to 6e-8, which a density of 0.4 / sigma turns into mass.
    assert float(single.double().exp().sum()) == pytest.approx(1, abs=1e-5 + 6e-8 * 0.8 * math.exp(-log_sigma))


@seeded
@given(levels=st.integers(2, 65536), log_sigma=st.floats(-11, 4), mean=st.floats(-1.5, 1.5), pick=st.floats(0, 1))
def test_mirror_image_has_the_same_mass(levels, log_sigma, mean, pick):
    """Reflecting the data and the mean about zero changes nothing: the two outer bins are treated alike."""
    x = torch.tensor(-1 + 2 * round(pick * (levels - 1)) / (levels - 1), dtype=torch.float64)
    p, mirrored = gaussian(mean, 2 * log_sigma), gaussian(-mean, 2 * log_sigma)
    torch.testing.assert_close(
        p.discretized_log_prob(x, levels), mirrored.discretized_log_prob(-x, levels), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_mass_of_narrow_bins_is_the_density(dtype):
    """For bins far narrower than sigma the mass is density times width."""
    x = torch.linspace(-1, 1, 65536, dtype=dtype)[1:-1:97]
    p = gaussian(0.3, 0.0, dtype)
    expected, atol = p.log_prob(x) + math.log(2 / 65535), 1e-5 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(p.discretized_log_prob(x, 65536), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("levels", [1, 0, -3, 2.5, 256.0, True, None, "256"])
def test_impossible_levels(levels):
    """A number of levels below two, or not an integer, is refused with the value and the way out."""
    with pytest.raises(ValueError, match="`levels` must be an integer of at least 2.*log_prob"):
        gaussian(0.0, 0.0).discretized_log_prob(torch.zeros(()), levels)


def test_log_prob_and_kl_against_torch():
    """Densities and divergences equal those of torch.distributions, also when parameters broadcast."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x = draw(4, 3, 5)
    p, q = DiagonalGaussian(draw(4, 3, 5), draw(3, 1)), DiagonalGaussian(draw(4, 3, 5), draw(4, 1, 1))
    torch_p, torch_q = (torch.distributions.Normal(d.mean, (0.5 * d.log_variance).exp()) for d in (p, q))
    torch.testing.assert_close(p.log_prob(x), torch_p.log_prob(x), rtol=1e-12, atol=1e-12)
    expected = torch.distributions.kl_divergence(torch_p, torch_q)
    torch.testing.assert_close(p.kl(q), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("base", [0.0, -9.25, 6.5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kl_is_precise_near_zero(dtype, base):
    """KL(N(m, s^2) || N(m', s'^2)) with gaps of 1e-8 to 10 keeps 1e-5 relative in float32, 1e-12 in float64."""
    sizes = np.concatenate([[0.0], np.logspace(-8, 1, 37)])
    gaps = torch.tensor(np.concatenate([-sizes[::-1], sizes]), dtype=dtype)
    # Around another variance the gaps are those of the rounded log variances, and means are apart in units of sigma.
    log_variance_1 = torch.full((), base, dtype=dtype)
    log_variance_2 = (log_variance_1 + gaps)[:, None].expand(len(gaps), len(gaps))
    difference = (gaps * math.exp(base / 2)).expand(len(gaps), len(gaps))
    other = DiagonalGaussian(torch.zeros((), dtype=dtype), log_variance_2)
    actual = DiagonalGaussian(difference, log_variance_1).kl(other)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    worst = 0.0
    for value, d, v in zip(actual.flatten(), difference.flatten(), log_variance_2.flatten(), strict=True):
        exact = exact_kl(d, base, v)
        if exact == 0:
            assert float(value) == 0
        else:
            worst = max(worst, abs(float((mpmath.mpf(float(value)) - exact) / exact)))
    assert worst <= tolerance


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kl_of_gaps(dtype):
    """`gaussian_kl` is the KL of Gaussians a scaled mean gap and a log variance ratio apart."""
    gaps, ratios = torch.linspace(-3, 3, 13, dtype=dtype), torch.linspace(-4, 4, 17, dtype=dtype)
    gap, u = torch.meshgrid(gaps, ratios, indexing="ij")
    other = torch.distributions.Normal(gap.double(), (0.5 * u.double()).exp())
    expected = torch.distributions.kl_divergence(torch.distributions.Normal(0.0 * gap.double(), 1.0), other)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(gaussian_kl(gap, u).double(), expected, rtol=tolerance, atol=1e-15)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_kl_near_zero(dtype):
    """d KL / du = (1 - e^-u (1 + gap^2)) / 2 and d KL / d gap = gap e^-u, also where the series takes over."""
    u = torch.tensor([-1.0, -0.11, -0.1, -0.09, -1e-3, -1e-6, 0.0, 1e-6, 1e-3, 0.09, 0.1, 0.11, 1.0], dtype=dtype)
    gap = torch.full_like(u, 1e-3).requires_grad_()
    u.requires_grad_()
    gaussian_kl(gap, u).sum().backward()
    ratio = u.detach().double()
    exact = 0.5 * (-torch.expm1(-ratio) - 1e-6 * torch.exp(-ratio))
    tolerance = 2e-5 if dtype == torch.float32 else 1e-10
    torch.testing.assert_close(u.grad.double(), exact, rtol=tolerance, atol=1e-12)
    torch.testing.assert_close(gap.grad.double(), 1e-3 * torch.exp(-ratio), rtol=tolerance, atol=0)


@seeded
@given(
    values=st.tuples(*[st.floats(-10, 10)] * 2, *[st.floats(-40, 40)] * 2),
    dtype=st.sampled_from(DTYPES),
)
def test_kl_is_not_negative(values, dtype):
    """Gibbs' inequality: KL >= 0, and zero of a distribution with itself."""
    mean_1, mean_2, log_variance_1, log_variance_2 = values
    p, q = gaussian(mean_1, log_variance_1, dtype), gaussian(mean_2, log_variance_2, dtype)
    assert float(p.kl(q)) >= 0
    assert float(p.kl(p)) == 0


def test_kl_of_vanishing_variances():
    """0 to itself, where 1 / sigma is no float32, and infinity from another mean."""
    mean, log_variance = torch.zeros(3), torch.tensor([-178.0, -300.0, -1e4])
    p = DiagonalGaussian(mean, log_variance)
    assert not bool(p.kl(p).any())
    assert bool((p.kl(DiagonalGaussian(mean + 1, log_variance)) == torch.inf).all())
    one = DiagonalGaussian(torch.ones(3), torch.zeros(3))
    assert torch.equal(p.kl(one), -0.5 * log_variance)  # (u + expm1(-u) + 1) / 2, whose exp(-u) is 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_kl_is_finite(dtype):
    """Values and gradients are finite for log variances up to +-80, wherever the dtype can hold the true KL."""
    grid = torch.tensor([-80.0, -45.0, -20.0, -1.0, 0.0, 0.5, 20.0, 45.0, 80.0], dtype=dtype)
    gaps = torch.tensor([0.0, 1e-6, 0.3, -2.0, 10.0], dtype=dtype)
    log_variance_1, log_variance_2, difference = (g.flatten() for g in torch.meshgrid(grid, grid, gaps, indexing="ij"))
    exact = [exact_kl(*row) for row in zip(difference, log_variance_1, log_variance_2, strict=True)]
    held = torch.tensor([bool(value < 0.1 * torch.finfo(dtype).max) for value in exact])
    assert held.float().mean() > 0.8
    inputs = [x[held].clone().requires_grad_() for x in (difference, log_variance_1, log_variance_2)]
    kl = DiagonalGaussian(inputs[0], inputs[1]).kl(DiagonalGaussian(torch.zeros((), dtype=dtype), inputs[2]))
    kl.sum().backward()
    expected = np.array([float(value) for value, ok in zip(exact, held, strict=True) if ok])
    rtol = 1e-4 if dtype == torch.float32 else 1e-12  # exp(80) multiplies the rounding of its argument by 80
    np.testing.assert_allclose(kl.detach().double(), expected, rtol=rtol, atol=torch.finfo(dtype).tiny)
    assert all(bool(x.grad.isfinite().all()) for x in inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sample_is_mean_plus_sigma_noise(dtype):
    """A sample is mean + sigma * noise exactly: noise of zero mean and unit square gives the moments exactly."""
    p = gaussian([[0.25, -3.0]], [[math.log(4.0), math.log(0.0625)]], dtype)
    noise = torch.tensor([[1.0, 1.0], [-1.0, -1.0]], dtype=dtype)
    sample = p.sample(noise)
    expected = torch.tensor([[2.25, -2.75], [-1.75, -3.25]], dtype=dtype)
    torch.testing.assert_close(sample, expected, rtol=1e-6 if dtype == torch.float32 else 1e-14, atol=0)
    assert torch.equal(p.sample(torch.zeros_like(noise)), p.mean.expand(2, 2))
    assert sample.dtype == dtype


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.uint8, torch.float32),
    ],
    ids=str,
)
def test_half_precision_is_promoted(given, expected):
    """Half precision and integers become float32; float32 and float64 are returned as they are."""
    x = torch.ones(3, dtype=given)
    promoted = promote_half(x)
    assert promoted.dtype == expected
    assert (promoted is x) == (given == expected)


def test_gradients_by_finite_differences():
    """Every method's gradient is that of its value (float64), in all branches of the decoder."""
    x = torch.tensor([[-1.0, -0.2, 0.2, 1.0, 0.6, 0.6]], dtype=torch.float64)
    mean = torch.tensor([[-0.9, -0.1, 0.19, 0.2, -0.9, 0.61]], dtype=torch.float64, requires_grad=True)
    log_variance = torch.tensor([[-3.0, -1.0, -8.0, -6.0, -3.5, 1.0]], dtype=torch.float64, requires_grad=True)
    other = torch.tensor([[0.3, -0.1, 0.2, 0.5, -1.0, 0.61]], dtype=torch.float64, requires_grad=True)

    def every(m, v, o):
        p = DiagonalGaussian(m, v)
        return p.log_prob(x), p.discretized_log_prob(x, 6), p.kl(DiagonalGaussian(o, 0.5 * v)), p.sample(x)

    assert torch.autograd.gradcheck(every, (mean, log_variance, other))


BINS = torch.linspace(-1, 1, 6, dtype=torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("log_variance", [-400.0, -150.0, 150.0, 400.0])
def test_bins_under_absurd_variances(log_variance, dtype):
    """A mean in its bin: a point has all the mass there, and endless width has density times bin, with its slope."""
    x = BINS.to(dtype)
    mean = (x + 0.01).requires_grad_()
    v = torch.full_like(x, log_variance, requires_grad=True)
    log_mass = DiagonalGaussian(mean, v).discretized_log_prob(x, len(x))
    log_mass.sum().backward()
    inner = slice(1, -1)
    wide = -0.5 * log_variance + math.log(0.4 / math.sqrt(2 * math.pi)) if log_variance > 0 else 0.0
    expected, slope = torch.full_like(x, wide)[inner], -0.5 if log_variance > 0 else 0.0
    torch.testing.assert_close(log_mass.detach()[inner], expected, rtol=1e-6, atol=1e-30)
    torch.testing.assert_close(v.grad[inner], torch.full_like(x, slope)[inner], rtol=1e-6, atol=1e-30)
    outer = torch.stack([log_mass.detach(), mean.grad, v.grad])[:, [0, -1]]
    torch.testing.assert_close(outer[0], torch.full_like(outer[0], -math.log(2) if log_variance > 0 else 0.0))
    assert float(outer[1:].abs().max()) < 1e-20 and float(mean.grad.abs().max()) < 1e-20


def test_gradients_of_each_bin_by_vmap():
    """`torch.func` gives each row the gradient that it has in the batch: per-sample gradients."""
    mean = (BINS + torch.linspace(-0.7, 0.7, 5, dtype=torch.float64)[:, None]).requires_grad_()
    v = torch.linspace(-8, 2, 5, dtype=torch.float64)[:, None].expand_as(mean).clone().requires_grad_()

    def total(mean, v):
        return DiagonalGaussian(mean, v).discretized_log_prob(BINS, 6).sum()

    expected = torch.autograd.grad(total(mean, v), (mean, v))
    for actual, whole in zip(torch.func.vmap(torch.func.grad(total, (0, 1)))(mean, v), expected, strict=True):
        torch.testing.assert_close(actual, whole, rtol=1e-12, atol=1e-12)


def test_values_of_each_bin_by_vmap():
    """Without gradients too, where the batch finds the bins that need a form."""
    mean = BINS + torch.linspace(-0.7, 0.7, 5, dtype=torch.float64)[:, None]
    v = torch.linspace(-8, 2, 5, dtype=torch.float64)[:, None].expand_as(mean)

    def log_mass(mean, v):
        return DiagonalGaussian(mean, v).discretized_log_prob(BINS, 6)

    torch.testing.assert_close(torch.func.vmap(log_mass)(mean, v), log_mass(mean, v), rtol=1e-14, atol=1e-14)


def test_dear_forms_are_computed_where_they_hold(monkeypatch):
    """erfcx, which costs most, only of bins that are wide, far or open; whatever the layout of the data."""
    x = (torch.arange(2 * 3 * 4 * 4) % 250 - 124).reshape(2, 3, 4, 4).mul(2 / 255).sub(1 / 255)
    x = x.to(memory_format=torch.channels_last)
    mean, log_variance = x + 0.003, torch.full((2, 1, 1, 1), -9.0)
    log_variance[1] = -14
    with_slopes = DiagonalGaussian(mean.requires_grad_(), log_variance).discretized_log_prob(x).detach()
    numbers, erfcx = [], torch.special.erfcx
    monkeypatch.setattr(torch.special, "erfcx", lambda x: numbers.append(x.numel()) or erfcx(x))
    log_mass = DiagonalGaussian(mean.detach(), log_variance).discretized_log_prob(x)
    assert numbers == [48, 48]
    torch.testing.assert_close(log_mass, with_slopes, rtol=1e-6, atol=1e-6)
    numbers.clear()
    DiagonalGaussian(mean[:1].detach(), log_variance[:1]).discretized_log_prob(x[:1])
    assert numbers == []


def test_a_second_derivative_of_the_mass_is_refused():
    """Its slopes are closed forms without slopes of their own: zeros in their place would go unnoticed."""
    mean = (BINS + 0.1).requires_grad_()
    log_mass = DiagonalGaussian(mean, torch.zeros_like(BINS)).discretized_log_prob(BINS, 6)
    (slope,) = torch.autograd.grad(log_mass.sum(), mean, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only.*create_graph"):
        (slope.sum() + mean.sum()).backward()
