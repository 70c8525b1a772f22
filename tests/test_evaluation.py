"""Evaluation: the whole bound by hand, and the unbiasedness and error bars of its estimate.

The model in most tests is the posterior mean of Gaussian data, for which every term has a known expectation: linear in
x_t, so that x_0 - x_0_hat = (1 - k sqrt(abar)) x_0 - k sqrt(1 - abar) epsilon.
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpm_vlb import (
    ForwardProcess,
    ReverseProcess,
    VLBEstimate,
    check_data,
    estimate_vlb,
    evaluate_vlb,
    make_betas,
    nats_to_bits_per_dim,
    pilot_probabilities,
    prior_kl,
    vlb_term,
)

T = 12
SHAPE = (1, 4, 4)
VARIANCE = 0.3
BETAS = make_betas("linear", T, 0.05, 0.5)


class PosteriorMean:
    """x_0_hat = k_t x_t; remembers which timesteps it was told."""

    def __init__(self, forward: ForwardProcess):
        abar = forward.alphas_cumprod.double()
        self.gain = (abar.sqrt() * VARIANCE / (abar * VARIANCE + 1 - abar)).tolist()
        self.by_timestep = dict(zip(forward.timesteps.tolist(), self.gain, strict=True))
        self.told: list[int] = []

    def __call__(self, x_t: Tensor, timesteps: Tensor) -> Tensor:
        self.told += timesteps.tolist()
        gain = torch.tensor([self.by_timestep[t] for t in timesteps.tolist()], dtype=x_t.dtype)
        return gain.reshape(-1, *[1] * (x_t.ndim - 1)) * x_t


def process(levels: int | None = None, dtype: torch.dtype = torch.float64, betas=BETAS, **options) -> ReverseProcess:
    options = {"prediction_type": "sample", "clip_sample": False} | options
    return ReverseProcess(ForwardProcess.from_betas(betas), levels=levels, **options).to(dtype=dtype)


def images(n: int, shape=SHAPE, levels: int | None = None, seed: int = 0, dtype=torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(n, *shape, generator=generator, dtype=torch.float64) * VARIANCE**0.5).clamp(-1, 1)
    return (x if levels is None else ((x + 1) / 2 * (levels - 1)).round() * 2 / (levels - 1) - 1).to(dtype)


def expected_terms(x_0: Tensor) -> np.ndarray:
    """E[L_t | x_0] (B, T) in nats for the continuous decoder, in closed form by numpy float64."""
    betas = BETAS.numpy()
    abar = np.cumprod(1 - betas)
    previous = np.concatenate([[1.0], abar[:-1]])
    posterior = betas * (1 - previous) / (1 - abar)
    gain = np.sqrt(abar) * VARIANCE / (abar * VARIANCE + 1 - abar)
    x = x_0.flatten(1).double().numpy()[:, None, :]
    bias = (1 - gain * np.sqrt(abar))[None, :, None] * x
    gap = (bias**2 + (gain**2 * (1 - abar))[None, :, None]).sum(2)
    with np.errstate(divide="ignore"):
        scale = (previous / (1 - previous) - abar / (1 - abar)) / 2
    terms = scale * gap
    decoder_variance = posterior[1]  # the first step borrows the second's
    dims = x.shape[2]
    terms[:, 0] = 0.5 * (gap[:, 0] / decoder_variance + dims * np.log(2 * np.pi * decoder_variance))
    return terms


def expected_decoder_on_levels(x_0: Tensor, levels: int) -> np.ndarray:
    """E[-log mass of the bin | x_0] (B,) in nats: 64-node Gauss-Hermite over the noise of each pixel."""
    from scipy.special import log_ndtr, ndtr

    betas = BETAS.numpy()
    abar = np.cumprod(1 - betas)
    sigma = math.sqrt(betas[1] * (1 - abar[0]) / (1 - abar[1]))
    gain = math.sqrt(abar[0]) * VARIANCE / (abar[0] * VARIANCE + 1 - abar[0])
    nodes, weights = np.polynomial.hermite_e.hermegauss(64)
    x = x_0.flatten(1).double().numpy()[..., None]
    mean = gain * (math.sqrt(abar[0]) * x + math.sqrt(1 - abar[0]) * nodes)
    half = 1 / (levels - 1)
    upper, lower = (x + half - mean) / sigma, (x - half - mean) / sigma
    inner = np.log(ndtr(np.where(lower > 0, -lower, upper)) - ndtr(np.where(lower > 0, -upper, lower)))
    log_mass = np.where(x > 1 - half, log_ndtr(-lower), np.where(x < half - 1, log_ndtr(upper), inner))
    return -(log_mass @ weights / weights.sum()).sum(1)


# --- evaluate_vlb


@pytest.mark.parametrize("levels", [None, 17])
@pytest.mark.parametrize("clip", [False, True])
def test_evaluate_equals_a_hand_loop(levels, clip):
    """The bound is the prior plus one vlb_term for each step, with the noise of that step."""
    reverse = process(levels, clip_sample=clip)
    model, x_0 = PosteriorMean(reverse.forward), images(3, levels=levels)
    noise = torch.randn(T, *x_0.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    terms = torch.empty(3, T, dtype=torch.float64)
    for step in range(T):
        t = torch.full((3,), step)
        diffused = reverse.forward.diffuse(x_0, t, noise[step])
        terms[:, step] = vlb_term(reverse, model(diffused.x_t, t), diffused)
    result = evaluate_vlb(model, reverse, x_0, noise=noise)
    torch.testing.assert_close(result.terms, terms, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(result.prior, prior_kl(reverse, x_0), rtol=1e-12, atol=0)
    total = nats_to_bits_per_dim(result.prior + result.terms.sum(1), 16)
    torch.testing.assert_close(result.bits_per_dim, total, rtol=1e-12, atol=0)


@pytest.mark.parametrize("values_per_call", [1, 48, 100, 10**6])
def test_evaluate_is_independent_of_the_call_size(values_per_call):
    """With the noise given, how many values go into a network call changes the rounding only."""
    reverse = process(17, torch.float32)
    model, x_0 = PosteriorMean(reverse.forward), images(3, levels=17, dtype=torch.float32)
    noise = torch.randn(T, *x_0.shape, generator=torch.Generator().manual_seed(2))
    reference = evaluate_vlb(model, reverse, x_0, noise=noise)
    result = evaluate_vlb(model, reverse, x_0, noise=noise, values_per_call=values_per_call)
    torch.testing.assert_close(result.terms, reference.terms, rtol=1e-5, atol=1e-5)


def test_calls_hold_as_many_values_as_allowed():
    """No network call gets more than `values_per_call` values, and no more calls are made than those need."""
    reverse, sizes = process(), []

    def model(x_t, timesteps):
        sizes.append(x_t.numel())
        return torch.zeros_like(x_t)

    evaluate_vlb(model, reverse, images(5), values_per_call=100)
    estimate_vlb(model, reverse, [images(5)], calls_per_image=8, values_per_call=100)
    assert max(sizes) == 6 * 16 and len(sizes) == math.ceil(5 * T / 6) + math.ceil(5 * 8 / 6)


def test_evaluate_draws_from_its_generator():
    """Without given noise, equal generators give equal bounds, others different ones."""
    reverse = process()
    model, x_0 = PosteriorMean(reverse.forward), images(2)
    first, again, other = (
        evaluate_vlb(model, reverse, x_0, generator=torch.Generator().manual_seed(s)).terms for s in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_evaluate_averages_to_the_closed_form():
    """Over 400 independent noises each term's mean is its closed form within 4.5 standard errors (2 x 12 of them)."""
    reverse = process()
    model, x_0 = PosteriorMean(reverse.forward), images(2)
    generator = torch.Generator().manual_seed(3)
    terms = torch.stack([evaluate_vlb(model, reverse, x_0, generator=generator).terms for _ in range(400)])
    error = (terms.mean(0) - torch.from_numpy(expected_terms(x_0))).abs()
    assert (error < 4.5 * terms.std(0) / 20).all()


def test_evaluate_accepts_the_output_object_of_a_network():
    """An object with `.sample` counts as the tensor in it."""
    reverse = process()
    model, x_0 = PosteriorMean(reverse.forward), images(2)
    noise = torch.randn(T, *x_0.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    wrapped = evaluate_vlb(lambda x, t: SimpleNamespace(sample=model(x, t)), reverse, x_0, noise=noise)
    assert torch.equal(wrapped.terms, evaluate_vlb(model, reverse, x_0, noise=noise).terms)


@pytest.mark.parametrize("call", ["evaluate", "estimate", "pilot"])
def test_respaced_chain_tells_the_network_the_original_timesteps(call):
    """On a respaced chain the network is told the training timesteps kept, every one of them, not 0 .. K - 1."""
    kept = [1, 4, 5, 9, T - 1]
    reverse = process().respace(kept)
    model = PosteriorMean(reverse.forward)
    if call == "evaluate":
        evaluate_vlb(model, reverse, images(2))
    elif call == "estimate":
        estimate_vlb(model, reverse, [images(2)], calls_per_image=40)
    else:
        pilot_probabilities(model, reverse, images(2))
    assert sorted(set(model.told)) == kept


def test_evaluation_builds_no_graph():
    """Scoring a network with parameters keeps no gradients."""
    layer = torch.nn.Conv2d(1, 1, 1).double()
    result = evaluate_vlb(lambda x, t: layer(x), process(), images(2))
    assert not result.bits_per_dim.requires_grad


# --- estimate_vlb


PROBABILITIES = {
    "uniform": None,
    "decreasing": 1 / (1 + torch.arange(T).double()),
    # The first step, nearly all of the bound, is drawn one time in 120.
    "bad": torch.cat([torch.tensor([0.1]), torch.ones(T - 1)]).double(),
}


@pytest.mark.parametrize("levels", [None, 17])
@pytest.mark.parametrize("name", PROBABILITIES)
def test_estimate_is_unbiased(name, levels):
    """For any p_t the mean over 300 seeds is the bound's closed-form expectation, within 4 standard errors.

    The seeds are independent draws of t and noise with a variance: 4 standard errors fail one time in 16,000.
    """
    reverse = process(levels)
    model, x_0 = PosteriorMean(reverse.forward), images(3, levels=levels)
    terms = expected_terms(x_0)
    if levels is not None:
        terms[:, 0] = expected_decoder_on_levels(x_0, levels)
    unit = 1 / (16 * math.log(2))
    exact = (terms.sum(1) + prior_kl(reverse, x_0).numpy()) * unit
    estimates = torch.stack(
        [
            estimate_vlb(model, reverse, [x_0], PROBABILITIES[name], calls_per_image=8, seed=seed).per_image
            for seed in range(300)
        ]
    )
    error = estimates.mean(1).mean() - exact.mean()
    assert abs(float(error)) < 4 * float(estimates.mean(1).std()) / 300**0.5


@pytest.fixture(scope="module")
def replicates() -> list[VLBEstimate]:
    """200 estimates of one data set that differ in the seed only."""
    reverse = process()
    model, x_0 = PosteriorMean(reverse.forward), images(16)
    p = 1 / (1 + torch.arange(T).double())
    return [estimate_vlb(model, reverse, [x_0], p, calls_per_image=16, seed=seed) for seed in range(200)]


def test_noise_standard_error_is_calibrated(replicates):
    """The mean of the reported variances is the variance of the estimates.

    (n - 1) s^2 / sigma^2 of 200 near-Gaussian estimates follows chi-square with 199 degrees of freedom; its 0.05 % and
    99.95 % points over 199 are 0.70 and 1.37. The mean of 200 reported variances of 48 degrees each adds 1.4 %.
    """
    from scipy.stats import chi2

    observed = np.var([r.bits_per_dim for r in replicates], ddof=1)
    reported = np.mean([r.noise_se**2 for r in replicates])
    low, high = chi2.ppf([0.0005, 0.9995], 199) / 199
    assert 0.98 * low < observed / reported < 1.02 * high


def test_noise_interval_covers_the_bound(replicates):
    """Of 200 intervals +- 1.96 noise_se between 90 % and 99 % hold the closed-form expectation."""
    reverse, x_0 = process(), images(16)
    exact = float((expected_terms(x_0).sum(1) + prior_kl(reverse, x_0).numpy()).mean() / 16 / math.log(2))
    inside = np.mean([abs(r.bits_per_dim - exact) < 1.96 * r.noise_se for r in replicates])
    assert 0.90 <= inside <= 0.99


def test_image_standard_error_is_that_of_the_exact_bounds():
    """image_se estimates the spread of the images' exact bounds / sqrt(N), free of the noise's part.

    Over 100 seeds the mean of image_se^2 is within 4 of its standard errors of the exact variance / N. The images
    differ in contrast, by more than their noise, so that the cut at zero plays no part.
    """
    reverse = process()
    x_0 = images(16) * torch.linspace(0, 1.5, 16, dtype=torch.float64).reshape(16, 1, 1, 1)
    exact = (expected_terms(x_0).sum(1) + prior_kl(reverse, x_0).numpy()) / 16 / math.log(2)
    model, p = PosteriorMean(reverse.forward), 1 / (1 + torch.arange(T).double())
    results = [estimate_vlb(model, reverse, [x_0], p, calls_per_image=16, seed=seed) for seed in range(100)]
    squares = np.array([r.image_se**2 for r in results])
    assert squares.min() > 0
    assert abs(squares.mean() - exact.var(ddof=1) / 16) < 4 * squares.std(ddof=1) / 10
    # Without the subtraction the noise would be counted: that must be visible at this precision.
    assert np.mean([r.noise_se**2 for r in results]) > 4 * squares.std(ddof=1) / 10


def test_term_means_are_the_terms(replicates):
    """Pooled over the seeds term_mean is E[L_t] and term_se its error: no z-score of the 12 exceeds 4."""
    exact = expected_terms(images(16)).mean(0) / 16 / math.log(2)
    means = np.stack([r.term_mean.numpy() for r in replicates])
    z = (np.nanmean(means, 0) - exact) / (np.nanstd(means, 0, ddof=1) / np.sqrt(np.isfinite(means).sum(0)))
    assert np.abs(z).max() < 4
    reported = np.sqrt(np.nanmean(np.stack([r.term_se.numpy() for r in replicates]) ** 2, 0))
    # 200 draws give a standard deviation to 5 %; images are repeated within an estimate, which term_se leaves out.
    assert (np.nanstd(means, 0, ddof=1) < 1.25 * reported).all()


@pytest.mark.parametrize("levels", [None, 17])
def test_parts_sum_to_the_estimate(levels):
    """prior + kl + decoder = bits_per_dim = mean of per_image; the prior is exact; the calls are counted."""
    reverse = process(levels)
    model, x_0 = PosteriorMean(reverse.forward), images(6, levels=levels)
    result = estimate_vlb(model, reverse, x_0.split(4), calls_per_image=24, num_replicates=3)
    assert result.prior + result.kl + result.decoder == pytest.approx(result.bits_per_dim, rel=1e-12)
    assert result.bits_per_dim == pytest.approx(float(result.per_image.mean()), rel=1e-12)
    unit = 1 / (16 * math.log(2))
    assert result.prior == pytest.approx(float(prior_kl(reverse, x_0).mean()) * unit, rel=1e-12)
    assert result.num_images == 6 and result.network_calls_per_image == 24
    assert len(model.told) == 6 * 24
    assert result.term_mean.shape == result.term_se.shape == (T,)


@pytest.mark.parametrize("pairs_per_call", [3, 1000])
@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 3, 3), (2, 2), (3, 7, 7)])
def test_per_image_values_do_not_depend_on_the_batches(shape, pairs_per_call):
    """An image's value depends on the seed and its position only, not on the batch or network call it travels in."""
    reverse = process()
    model, x_0 = PosteriorMean(reverse.forward), images(7, shape)
    values_per_call = pairs_per_call * x_0[0].numel()
    whole = estimate_vlb(model, reverse, [x_0], calls_per_image=8, values_per_call=values_per_call)
    for size in (1, 3):
        parts = estimate_vlb(model, reverse, x_0.split(size), calls_per_image=8, values_per_call=values_per_call)
        torch.testing.assert_close(parts.per_image, whole.per_image, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 3, 3), (2, 2), (3, 7, 7)])
def test_per_image_values_do_not_depend_on_the_call_size(shape):
    """How many values go into a network call changes no image's draws."""
    reverse = process()
    model, x_0 = PosteriorMean(reverse.forward), images(5, shape)
    whole = estimate_vlb(model, reverse, [x_0], calls_per_image=8)
    parts = estimate_vlb(model, reverse, [x_0], calls_per_image=8, values_per_call=1)
    torch.testing.assert_close(parts.per_image, whole.per_image, rtol=1e-10, atol=1e-10)


def test_per_image_values_keep_the_order():
    """per_image follows the order of the data: it correlates with the exact bounds as their noise allows."""
    reverse = process()
    x_0 = images(6) * torch.tensor([0.1, 1.0, 0.3, 0.8, 0.0, 0.5], dtype=torch.float64).reshape(6, 1, 1, 1)
    model = PosteriorMean(reverse.forward)
    result = estimate_vlb(model, reverse, x_0.split(4), calls_per_image=1200)
    exact = (expected_terms(x_0).sum(1) + prior_kl(reverse, x_0).numpy()) / 16 / math.log(2)
    assert np.corrcoef(result.per_image.numpy(), exact)[0, 1] > 0.99


def test_seed_decides_the_draws():
    """The same seed gives the same estimate, another seed another, whatever torch's global state."""
    reverse = process()
    model, x_0 = PosteriorMean(reverse.forward), images(3)
    first = estimate_vlb(model, reverse, [x_0], calls_per_image=8, seed=5)
    torch.manual_seed(123)
    again = estimate_vlb(model, reverse, [x_0], calls_per_image=8, seed=5)
    other = estimate_vlb(model, reverse, [x_0], calls_per_image=8, seed=6)
    assert torch.equal(first.per_image, again.per_image) and not torch.equal(first.per_image, other.per_image)


def test_images_get_different_draws():
    """Two equal images at different positions have independent draws."""
    reverse = process()
    x_0 = images(1).repeat(2, 1, 1, 1)
    per_image = estimate_vlb(PosteriorMean(reverse.forward), reverse, [x_0], calls_per_image=8).per_image
    assert per_image[0] != per_image[1]


def test_one_image_has_no_image_error():
    """With one image the noise error is there, and the image error is NaN rather than zero."""
    reverse = process()
    result = estimate_vlb(PosteriorMean(reverse.forward), reverse, [images(1)], calls_per_image=8)
    assert result.noise_se > 0 and math.isnan(result.image_se)


def test_one_step_chain():
    """T = 1: the bound is prior + decoder, there is no kl part."""
    reverse = process(17, betas=[0.3])
    result = estimate_vlb(PosteriorMean(reverse.forward), reverse, [images(4, levels=17)], calls_per_image=4)
    assert result.kl == 0 and result.decoder > 0
    assert math.isfinite(result.bits_per_dim) and result.term_mean.shape == (1,)


def test_progress_is_reported():
    """on_images gets counts that sum to the number of images."""
    seen: list[int] = []
    reverse = process()
    estimate_vlb(
        PosteriorMean(reverse.forward),
        reverse,
        images(7).split(3),
        calls_per_image=4,
        on_images=seen.append,
        values_per_call=32,
    )
    assert sum(seen) == 7 and all(count > 0 for count in seen)


# --- pilot_probabilities


@pytest.mark.parametrize("steps", [1, 2, 3, 64, 1000])
def test_pilot_probabilities_are_a_distribution(steps):
    """On chains of any length p_t is positive, at least its uniform share, and sums to 1."""
    reverse = process(betas=make_betas("linear", steps))
    p = pilot_probabilities(PosteriorMean(reverse.forward), reverse, images(3), num_calls=256, uniform_fraction=0.1)
    assert p.shape == (steps,) and float(p.sum()) == pytest.approx(1, abs=1e-12)
    assert float(p.min()) >= 0.1 / steps
    estimate_vlb(PosteriorMean(reverse.forward), reverse, [images(2)], p, calls_per_image=4)


def test_pilot_follows_the_terms():
    """With all steps probed p_t is (1 - u) rms_t / sum + u / T of the terms; 200 probes each give the rms to 10 %."""
    reverse = process()
    x_0 = images(400)
    p = pilot_probabilities(PosteriorMean(reverse.forward), reverse, x_0, num_calls=400 * T, uniform_fraction=0.05)
    generator = torch.Generator().manual_seed(9)
    terms = evaluate_vlb(PosteriorMean(reverse.forward), reverse, x_0, generator=generator).terms
    rms = terms.square().mean(0).sqrt()
    torch.testing.assert_close(p, 0.95 * rms / rms.sum() + 0.05 / T, rtol=0.1, atol=0)


def test_pilot_probabilities_reduce_the_noise():
    """The estimate with the pilot's p_t has less than half the noise variance of the even draws."""
    reverse = process(betas=make_betas("linear", 200))
    model, x_0 = PosteriorMean(reverse.forward), images(50)
    p = pilot_probabilities(model, reverse, images(20, seed=1))
    even = estimate_vlb(model, reverse, [x_0], calls_per_image=16)
    good = estimate_vlb(model, reverse, [x_0], p, calls_per_image=16)
    assert good.noise_se**2 < 0.5 * even.noise_se**2


def test_pilot_is_reproducible():
    """The pilot's seed decides its draws."""
    reverse = process()
    first, again, other = (
        pilot_probabilities(PosteriorMean(reverse.forward), reverse, images(3), num_calls=64, seed=s)
        for s in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("fraction", [0.0, -0.5, 2.0, float("nan")])
def test_pilot_refuses_an_impossible_uniform_share(fraction):
    """A share of uniform draws outside its documented (0, 1] is refused, not turned into negative probabilities."""
    reverse = process()
    with pytest.raises(ValueError, match="uniform_fraction"):
        pilot_probabilities(PosteriorMean(reverse.forward), reverse, images(2), uniform_fraction=fraction)


# --- check_data


def test_eight_bit_images_are_on_the_grid():
    """All 256 levels pass in float32 and float64 however they were scaled, and so do 17 and 2 levels."""
    k = torch.arange(256).reshape(1, 1, 16, 16)
    for x_0 in (
        k.float() / 255 * 2 - 1,
        k.float() * (2 / 255) - 1,
        k.float() / 127.5 - 1,
        (k.float() / 255 - 0.5) / 0.5,
        k.double() / 255 * 2 - 1,
        k.to(torch.uint8).numpy().astype(np.float32) / 255 * 2 - 1,
    ):
        check_data(torch.as_tensor(x_0), 256)
    check_data(torch.arange(17).reshape(1, 1, 1, 17) / 8.0 - 1, 17)
    check_data(torch.tensor([[-1.0, 1.0]]), 2)


def test_data_off_the_grid_is_refused():
    """Resized, flipped-sign-free, rescaled and half-precision images are refused with the distance to the grid."""
    k = torch.randint(0, 256, (2, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    x_0 = k.float() / 255 * 2 - 1
    resized = torch.nn.functional.interpolate(x_0, size=(12, 12), mode="bilinear", antialias=True)
    for bad in (resized, x_0 * 0.99, x_0.half(), x_0.bfloat16(), k.float() / 256 * 2 - 1):
        with pytest.raises(ValueError, match="256 levels"):
            check_data(bad, 256)
    with pytest.raises(ValueError, match="17 levels"):
        check_data(x_0, 17)


def test_one_pixel_off_the_grid_is_enough():
    """The worst pixel decides: one off by 1e-5 of the range's 2 passes, one off by 3e-5 does not."""
    x_0 = torch.zeros(1, 1, 4, 4, dtype=torch.float64) + 1 / 255
    x_0[0, 0, 2, 2] += 1e-5
    check_data(x_0, 256)
    x_0[0, 0, 2, 2] += 2e-5
    with pytest.raises(ValueError, match="levels"):
        check_data(x_0, 256)


@pytest.mark.parametrize("levels", [256, None])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_data_that_is_not_finite_is_refused(bad, levels):
    """NaN and infinity are refused, for continuous data too."""
    x_0 = torch.zeros(1, 1, 2, 2)
    x_0[0, 0, 0, 1] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        check_data(x_0, levels)


def test_data_out_of_range_is_refused():
    """Values beyond [-1, 1] (0 .. 255, or 0 .. 2) are refused with their range; continuous data has none."""
    for bad in (torch.full((1, 1, 2, 2), 255.0), torch.full((1, 1, 2, 2), -1.01)):
        with pytest.raises(ValueError, match=r"\[-1, 1\]"):
            check_data(bad, 256)
        check_data(bad, None)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_integer_data_is_refused(dtype):
    """Unscaled integer images are refused by their dtype."""
    with pytest.raises(ValueError, match="floating point"):
        check_data(torch.ones(1, 1, 2, 2, dtype=dtype), 256)


@pytest.mark.parametrize("call", [evaluate_vlb, lambda m, r, x: estimate_vlb(m, r, [x]), pilot_probabilities])
def test_every_entrance_checks_the_data(call):
    """All three functions refuse data off its grid before they call the network."""
    reverse = process(17)

    def model(x_t, timesteps):
        raise AssertionError("the network was called")

    with pytest.raises(ValueError, match="17 levels"):
        call(model, reverse, images(2))


# --- errors


@pytest.mark.parametrize("call", [evaluate_vlb, lambda m, r, x: estimate_vlb(m, r, [x]), pilot_probabilities])
def test_nan_from_the_network_names_the_timestep(call):
    """A NaN from the network raises with the chain index and the timestep that it was told (here of 3 kept steps)."""
    reverse = process().respace([2, 7, T - 1])

    def model(x_t, timesteps):
        at_seven = (timesteps == 7).reshape(-1, 1, 1, 1)
        return torch.where(at_seven, torch.nan, torch.zeros_like(x_t))

    with pytest.raises(FloatingPointError, match=r"model's output.*t=1 \(timestep 7\)"):
        call(model, reverse, images(2))


def test_infinite_term_is_not_averaged_in():
    """A finite output whose term overflows raises too, and does not blame the output."""
    reverse = process(variance_type="learned", dtype=torch.float32)

    def model(x_t, timesteps):
        return torch.cat([torch.zeros_like(x_t), torch.full_like(x_t, -1e4)], dim=1)

    with pytest.raises(FloatingPointError, match="term of the bound"):
        evaluate_vlb(model, reverse, images(2, dtype=torch.float32))


@pytest.mark.parametrize("batches", [[], iter(())])
def test_empty_data_is_refused(batches):
    """No batches at all raise instead of giving NaN."""
    reverse = process()
    with pytest.raises(ValueError, match="no images"):
        estimate_vlb(PosteriorMean(reverse.forward), reverse, batches)


@pytest.mark.parametrize("call", [evaluate_vlb, lambda m, r, x: estimate_vlb(m, r, [x]), pilot_probabilities])
def test_a_batch_without_images_is_refused(call):
    """A batch of zero images raises a ValueError like other unusable data."""
    reverse = process()
    with pytest.raises(ValueError):
        call(PosteriorMean(reverse.forward), reverse, images(2)[:0])


@pytest.mark.parametrize(("calls", "replicates_"), [(64, 1), (64, 0), (3, 4), (10, 4), (0, 2), (-8, 4)])
def test_impossible_numbers_are_refused(calls, replicates_):
    """Fewer than two replicates, or calls that do not divide among them, are refused."""
    reverse = process()
    with pytest.raises(ValueError, match="num_replicates"):
        estimate_vlb(
            PosteriorMean(reverse.forward), reverse, [images(2)], calls_per_image=calls, num_replicates=replicates_
        )


def test_probabilities_must_fit_the_chain():
    """Probabilities of another length, or with a zero, are refused."""
    reverse = process()
    with pytest.raises(ValueError, match=f"{T} entries"):
        estimate_vlb(PosteriorMean(reverse.forward), reverse, [images(2)], torch.ones(T + 1))
    with pytest.raises(ValueError, match="positive finite"):
        estimate_vlb(PosteriorMean(reverse.forward), reverse, [images(2)], torch.arange(T).double())


def test_wrong_channels_are_refused():
    """A network with C channels under a learned variance is refused by every entrance."""
    reverse = process(variance_type="learned_range")
    with pytest.raises(ValueError, match="out_channels=2"):
        evaluate_vlb(PosteriorMean(reverse.forward), reverse, images(2))
    with pytest.raises(ValueError, match="out_channels=2"):
        estimate_vlb(PosteriorMean(reverse.forward), reverse, [images(2)])


def test_noise_of_the_wrong_shape_is_refused():
    """Given noise must hold one draw for each step and image."""
    reverse = process()
    x_0 = images(2)
    for shape in ((T - 1, *x_0.shape), (T, 1, *SHAPE), (T, *x_0.shape[:2], 2, 4)):
        with pytest.raises((ValueError, IndexError)):
            evaluate_vlb(PosteriorMean(reverse.forward), reverse, x_0, noise=torch.zeros(shape, dtype=torch.float64))


def test_a_bare_tensor_is_not_taken_for_batches():
    """A tensor is iterable, but over images, whose channels would pass for images."""
    reverse = ReverseProcess(ForwardProcess.from_betas([0.1, 0.2]), levels=None)
    with pytest.raises(ValueError, match="batches"):
        estimate_vlb(lambda x_t, timesteps: x_t, reverse, torch.zeros(4, 1, 4, 4))
