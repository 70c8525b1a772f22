"""The estimate of a data set's bound: unbiased whatever the pilot, with errors that hold, the same however it is run.

The network of most tests is linear, so that every expectation has a closed form (analytic.py).
"""

import math
import os
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from analytic import (
    BETAS,
    PosteriorMean,
    T,
    expected_bits,
    expected_prior,
    expected_terms,
    images,
    population_bits,
    process,
)
from estimates import FACTOR, UNIT, fitted_pilot, setting
from scipy.stats import chi2
from torch import Tensor

from ddpm_vlb import (
    GaussianModel,
    Pilot,
    VLBEstimate,
    VLBEstimator,
    VLBScores,
    enough_replicates,
    estimate_from_scores,
    estimate_vlb,
    fit_pilot,
    make_betas,
)

DECREASING = 1 / (1 + torch.arange(T).double())


def bad_pilot(levels: int | None = None) -> Pilot:
    """Probabilities off by factors up to 20 either way, slopes of the wrong sign and thrice too steep."""
    good = fitted_pilot(levels)
    wrong = torch.tensor([20.0, 1 / 20, 3, 1 / 3, 1, 5, 1 / 5, 2, 1 / 2, 10, 1 / 10, 1], dtype=torch.float64)
    return replace(
        good,
        probabilities=good.probabilities / wrong,
        control=replace(good.control, slopes=-3 * good.control.slopes),
    )


def stationary_pilot(levels: int | None = None) -> Pilot:
    """The model of the data in a Fourier basis, as it is made for large images."""
    good = fitted_pilot(levels)
    gaussian = GaussianModel.fit(images(30, levels=levels, seed=2), max_dims=1)
    return replace(good, control=replace(good.control, gaussian=gaussian))


PILOTS = {
    "even": lambda levels: torch.ones(T),
    "tensor": lambda levels: DECREASING,
    "fitted": fitted_pilot,
    "stationary": stationary_pilot,
    "bad": bad_pilot,
}


# --- the estimate is unbiased


@pytest.mark.parametrize("levels", [pytest.param(None, marks=pytest.mark.slow), 17])
@pytest.mark.parametrize("name", PILOTS)
def test_estimate_is_unbiased(name, levels):
    """For any p_t and C_t the mean over 300 seeds is the bound's closed-form expectation, within 4 standard errors.

    The seeds are independent draws of t and noise with a variance: 4 standard errors fail one time in 16,000. The
    parts t > 0 and t = 0 are unbiased each, and so is every image's value.
    """
    reverse, model = setting(levels)
    x_0, pilot = images(3, levels=levels), PILOTS[name](levels)
    results = [estimate_vlb(model, reverse, [x_0], pilot, calls_per_image=8, seed=seed) for seed in range(300)]
    terms = expected_terms(x_0, levels, factor=FACTOR) * UNIT
    exact = {
        "bits_per_dim": expected_bits(x_0, levels, factor=FACTOR).mean(),
        "kl": terms[:, 1:].sum(1).mean(),
        "decoder": terms[:, 0].mean(),
    }
    for part, expected in exact.items():
        values = np.array([getattr(result, part) for result in results])
        assert abs(values.mean() - expected) < 4 * values.std(ddof=1) / 300**0.5, part
    per_image = torch.stack([result.per_image for result in results])
    error = (per_image.mean(0) - torch.from_numpy(expected_bits(x_0, levels, factor=FACTOR))).abs()
    assert (error < 4 * per_image.std(0) / 300**0.5).all()


@pytest.mark.parametrize("levels", [None, 17])
def test_each_image_is_unbiased(levels):
    """An image far from the data has its own bound, within 4 standard errors, which are small enough to tell.

    The network is the posterior mean and the pilot fits it, so that most of an image's value is what the control
    variate knows of it: a hundredth of that is over 8 standard errors, for images darker and brighter than the data.
    """
    reverse = process(levels)
    model = PosteriorMean(reverse.forward, 1.0)
    pilot = fit_pilot(model, reverse, images(400, levels=levels, seed=1))
    x_0 = torch.stack([torch.full((1, 4, 4), value, dtype=torch.float64) for value in (0.0, 0.5, 1.0)])
    draws = [estimate_vlb(model, reverse, [x_0], pilot, 96, num_replicates=6, seed=seed) for seed in range(300)]
    per_image = torch.stack([draw.per_image for draw in draws])
    error = per_image.std(0) / 300**0.5
    assert ((per_image.mean(0) - torch.from_numpy(expected_bits(x_0, levels))).abs() < 4 * error).all()
    known = pilot.control.total(pilot.control.prepare(x_0))[0].sum(1) * UNIT
    assert (0.01 * known.abs() / error)[2] > 8
    # Each image's own standard error is that of its draws: 300 variances of 5 degrees of freedom each, to 4 times
    # sqrt(2 / 1500) = 15 %, and as much for the draws' own.
    own = torch.stack([draw.per_image_se for draw in draws]).square().mean(0)
    torch.testing.assert_close(own, per_image.var(0), rtol=0.5, atol=0)


def test_without_a_pilot_one_is_fitted():
    """The default is that of a pilot of the scored images with draws of its own; they are all that it looks at."""
    reverse, model = setting(17)
    x_0 = images(40, levels=17)
    default = estimate_vlb(model, reverse, x_0.split(15), seed=3)
    by_hand = estimate_vlb(model, reverse, x_0.split(15), fit_pilot(model, reverse, x_0, seed=3), seed=3)
    assert torch.equal(default.per_image, by_hand.per_image) and default.noise_se == by_hand.noise_se


@pytest.mark.parametrize("count, calls, enough", [(1, 2, 6), (1, 5, 6), (2, 3, 4), (4, 2, 3)])
def test_calls_that_give_no_error_are_refused(count, calls, enough):
    """With few degrees of freedom the error is far too small too often; the number that serves is named, and taken."""
    reverse, model = setting(17)
    x_0 = images(count, levels=17)
    with pytest.raises(ValueError, match=f"`calls_per_image` {calls} .* error of {count} image.*at least {enough}"):
        estimate_vlb(model, reverse, [x_0], calls_per_image=calls)
    assert estimate_vlb(model, reverse, [x_0], calls_per_image=enough).noise_se > 0


def test_a_pilot_of_the_scored_images_leaves_the_estimate_unbiased():
    """Over 60 seeds, each with a pilot of its own, the mean is the exact bound within 4 standard errors."""
    reverse, model = setting()
    x_0 = images(3)
    values = np.array([estimate_vlb(model, reverse, [x_0], seed=seed).bits_per_dim for seed in range(60)])
    assert abs(values.mean() - expected_bits(x_0, factor=FACTOR).mean()) < 4 * values.std(ddof=1) / 60**0.5


@pytest.mark.parametrize("number", [1, 2, 5])
def test_the_error_of_a_handful_of_images_holds(number):
    """With its default replicates an estimate lies beyond 2 of its errors about one time in 17.

    That is a t distribution of 20 degrees of freedom, of 5.9 %; of 300 estimates 3.4 standard errors above are 32.
    """
    reverse, model = setting(17)
    x_0, pilot = images(number, levels=17), fitted_pilot(17)
    exact = expected_bits(x_0, 17, factor=FACTOR).mean()
    draws = [estimate_vlb(model, reverse, [x_0], pilot, seed=seed) for seed in range(300)]
    assert sum(abs(draw.bits_per_dim - exact) > 2 * draw.noise_se for draw in draws) <= 32


def test_an_estimator_needs_a_pilot():
    """Nothing says where to spend the calls: even draws are taken where they are asked for, not by default."""
    reverse, model = setting()
    with pytest.raises(ValueError, match=r"`pilot = fit_pilot\(model, reverse, x_0\)`"):
        VLBEstimator(model, reverse)
    assert VLBEstimator(model, reverse, estimator="full").calls_per_image == T


def test_it_says_what_it_is():
    """An estimate prints as the number with its two errors."""
    reverse, model = setting()
    said = str(estimate_vlb(model, reverse, [images(3)], fitted_pilot()))
    assert re.fullmatch(r"\d\.\d{3} \+- \d\.\d{3} \(noise\) \+- \d\.\d{3} \(images\) bits/dim, 3 images", said)


def test_a_bad_pilot_is_noisier():
    """The bad pilot of the test above is bad: its noise variance is over 20 times that of the fitted one."""
    reverse, model = setting()
    good, bad = (estimate_vlb(model, reverse, [images(200)], pilot) for pilot in (fitted_pilot(), bad_pilot()))
    assert bad.noise_se**2 > 20 * good.noise_se**2


@pytest.mark.parametrize("levels", [None, 17])
@pytest.mark.parametrize(("factor", "reduction"), [(1.0, 5), (FACTOR, 3)])
def test_control_variate_reduces_the_variance(factor, reduction, levels):
    """Control variate and p_t together leave a third of the noise variance that p_t alone leaves, or less.

    With the posterior mean, whose L_t is the first feature of C_t but for the pilot's errors, it is a fifth. 300
    images in two replicates give each variance to 4 sqrt(2 / 300) = 33 % at 4 standard errors, which is in the factor.
    """
    reverse = process(levels)
    model = PosteriorMean(reverse.forward, factor)
    x_0, pilot_images = images(300, levels=levels), images(400, levels=levels, seed=1)
    with_it, without = (
        estimate_vlb(model, reverse, [x_0], fit_pilot(model, reverse, pilot_images, control_variate=use))
        for use in (True, False)
    )
    assert with_it.noise_se**2 < without.noise_se**2 / reduction


# --- the errors hold

Replicates = tuple[list[VLBEstimate], float]


@pytest.fixture(scope="module", params=["tensor", "fitted", "full"])
def replicates(request) -> Replicates:
    """200 estimates of one data set that differ in the seed only, and the number that they estimate."""
    full = request.param == "full"
    reverse, model = setting()
    x_0 = images(64 if full else 16)
    pilot = None if full else PILOTS[request.param](None)
    options = {"estimator": "full"} if full else {"calls_per_image": 16, "num_replicates": 4}
    results = [estimate_vlb(model, reverse, [x_0], pilot, seed=seed, **options) for seed in range(200)]
    return results, float(expected_bits(x_0, factor=FACTOR).mean())


def test_noise_standard_error_is_calibrated(replicates):
    """The mean of the reported variances is the variance of the estimates.

    (n - 1) s^2 / sigma^2 of 200 near-Gaussian estimates follows chi-square with 199 degrees of freedom; its 0.05 % and
    99.95 % points over 199 are 0.70 and 1.37. The mean of 200 reported variances of 48 degrees each adds 1.4 %.
    """
    results, _ = replicates
    observed = np.var([r.bits_per_dim for r in results], ddof=1)
    reported = np.mean([r.noise_se**2 for r in results])
    low, high = chi2.ppf([0.0005, 0.9995], 199) / 199
    assert 0.98 * low < observed / reported < 1.02 * high


def test_noise_interval_covers_the_bound(replicates):
    """Of 200 intervals +- 1.96 noise_se between 90 % and 99 % hold the closed-form expectation.

    95 % nominal, 94 % with the 48 (or 64) degrees of freedom; the standard error of a share of 200 is 1.6 %.
    """
    results, exact = replicates
    inside = np.mean([abs(r.bits_per_dim - exact) < 1.96 * r.noise_se for r in results])
    assert 0.90 <= inside <= 0.99


def test_term_means_are_the_terms(replicates):
    """Pooled over the seeds term_mean is E[L_t] and term_se its error: no z-score of the 12 exceeds 4.

    200 draws give a standard deviation to 5 %. term_se counts the images' spread too, which repeated estimates of one
    data set do not show: they may vary less than it, and not more. Estimates in which one image alone was drawn at a
    step, where it is NaN, are left out there, and so are steps with few others.
    """
    results, _ = replicates
    exact = expected_terms(images(results[0].num_images), factor=FACTOR).mean(0) * UNIT
    means = np.stack([r.term_mean.numpy() for r in results])
    z = (np.nanmean(means, 0) - exact) / (np.nanstd(means, 0, ddof=1) / np.sqrt(np.isfinite(means).sum(0)))
    assert np.abs(z).max() < 4
    errors = np.stack([r.term_se.numpy() for r in results])
    means[np.isnan(errors)] = np.nan
    often = np.isfinite(means).sum(0) > 100
    assert often.sum() >= 9
    assert (np.nanstd(means, 0, ddof=1) < 1.25 * np.sqrt(np.nanmean(errors**2, 0)))[often].all()


@pytest.mark.parametrize("levels", [None, 17])
@pytest.mark.parametrize("estimator", ["importance", "full"])
def test_total_interval_covers_the_population(estimator, levels):
    """Noise and image error together cover the mean over the population in 90 % to 99 % of 200 fresh data sets.

    The images of each data set are new draws; their population's mean bound is known in closed form. 95 % nominal,
    94 % with 39 degrees of freedom; the standard error of a share of 200 is 1.6 %.
    """
    reverse, model = setting(levels)
    exact, pilot = population_bits(levels, factor=FACTOR), fitted_pilot(levels)
    data = images(200 * 40, levels=levels, seed=7).split(40)
    inside, shares = [], []
    for seed, x_0 in enumerate(data):
        result = estimate_vlb(model, reverse, [x_0], pilot, calls_per_image=8, seed=seed, estimator=estimator)
        total = math.hypot(result.noise_se, result.image_se)
        inside.append(abs(result.bits_per_dim - exact) < 1.96 * total)
        shares.append(result.noise_se**2 / total**2)
    assert 0.90 <= np.mean(inside) <= 0.99
    assert 0.02 < np.mean(shares) < 0.98  # both errors have a part in it


def test_image_standard_error_is_that_of_the_exact_bounds():
    """image_se estimates the spread of the images' exact bounds / sqrt(N), free of the noise's part.

    Over 100 seeds the mean of image_se^2 is within 4 of its standard errors of the exact variance / N. The images
    differ in contrast, by more than their noise, so that the cut at zero plays no part.
    """
    reverse, model = setting()
    x_0 = images(16) * torch.linspace(0, 1.5, 16, dtype=torch.float64).reshape(16, 1, 1, 1)
    exact = expected_bits(x_0, factor=FACTOR)
    results = [
        estimate_vlb(model, reverse, [x_0], DECREASING, calls_per_image=16, num_replicates=4, seed=seed)
        for seed in range(100)
    ]
    squares = np.array([r.image_se**2 for r in results])
    assert squares.min() > 0
    assert abs(squares.mean() - exact.var(ddof=1) / 16) < 4 * squares.std(ddof=1) / 10
    # Without the subtraction the noise would be counted: that must be visible at this precision.
    assert np.mean([r.noise_se**2 for r in results]) > 4 * squares.std(ddof=1) / 10


# --- the parts of the result


@pytest.mark.parametrize("estimator", ["importance", "full"])
@pytest.mark.parametrize("levels", [None, 17])
def test_parts_sum_to_the_estimate(levels, estimator):
    """prior + kl + decoder = bits_per_dim = mean of per_image; the prior is exact; the calls are counted."""
    reverse, model = setting(levels)
    x_0, pilot = images(6, levels=levels), fitted_pilot(levels)
    result = estimate_vlb(
        model, reverse, x_0.split(4), pilot, calls_per_image=24, num_replicates=3, estimator=estimator
    )
    assert result.prior + result.kl + result.decoder == pytest.approx(result.bits_per_dim, rel=1e-12)
    assert result.bits_per_dim == pytest.approx(float(result.per_image.mean()), rel=1e-12)
    assert result.prior == pytest.approx(expected_prior(x_0).mean() * UNIT, rel=1e-10)
    assert result.num_images == 6 and result.also == ()
    assert result.nats_per_dim == pytest.approx(result.bits_per_dim * math.log(2), rel=1e-12)
    # The full loop visits its first images twice, for their noise.
    calls, made = (24, 6 * 24) if estimator == "importance" else (T, 2 * 6 * T)
    assert result.network_calls_per_image == calls and len(model.told) == made
    assert result.term_mean.shape == result.term_se.shape == (T,)


def test_default_number_of_replicates():
    """Without a number of replicates there are the fewest, one for every 16 calls, that divide the calls."""
    reverse, model = setting()
    numbers = {
        calls: VLBEstimator(model, reverse, torch.ones(T), calls).num_replicates
        for calls in (2, 7, 9, 20, 32, 64, 100)
    }
    assert numbers == {2: 2, 7: 7, 9: 3, 20: 2, 32: 2, 64: 4, 100: 5}
    assert VLBEstimator(model, reverse, torch.ones(T)).calls_per_image == 20


def test_one_image_has_no_image_error():
    """With one image the noise error is there, and the image error is NaN rather than zero."""
    reverse, model = setting()
    for estimator in ("importance", "full"):
        result = estimate_vlb(model, reverse, [images(1)], calls_per_image=8, estimator=estimator)
        assert result.noise_se > 0 and math.isnan(result.image_se)


@pytest.mark.parametrize("estimator", ["importance", "full"])
def test_one_step_chain(estimator):
    """T = 1: the bound is prior + decoder, there is no kl part."""
    reverse, model = setting(17, betas=torch.tensor([0.3]))
    pilot = fit_pilot(model, reverse, images(60, levels=17, seed=1))
    result = estimate_vlb(
        model, reverse, [images(40, levels=17)], pilot, calls_per_image=4, num_replicates=2, estimator=estimator
    )
    assert result.kl == 0 and result.decoder > 0 and result.term_mean.shape == (1,)
    exact = expected_bits(images(40, levels=17), 17, torch.tensor([0.3]), FACTOR).mean()
    assert abs(result.bits_per_dim - exact) < 4 * result.noise_se


def test_per_image_values_keep_the_order():
    """per_image follows the order of the data: it correlates with the exact bounds as their noise allows."""
    reverse, model = setting()
    x_0 = images(6) * torch.tensor([0.1, 1.0, 0.3, 0.8, 0.0, 0.5], dtype=torch.float64).reshape(6, 1, 1, 1)
    result = estimate_vlb(model, reverse, x_0.split(4), calls_per_image=1200)
    assert np.corrcoef(result.per_image.numpy(), expected_bits(x_0, factor=FACTOR))[0, 1] > 0.99


def test_progress_is_reported():
    """on_images gets counts that sum to the number of images."""
    seen: list[int] = []
    reverse, model = setting()
    estimate_vlb(model, reverse, images(7).split(3), calls_per_image=4, on_images=seen.append, values_per_call=32)
    assert sum(seen) == 7 and all(count > 0 for count in seen)


# --- the draws


def run(x_0: list[Tensor] | tuple[Tensor, ...], **options) -> VLBEstimate:
    """An estimate of batches with the pilot of their shape."""
    reverse, model = setting()
    pilot = fit_pilot(model, reverse, images(30, tuple(x_0[0].shape[1:]), seed=1), num_calls=256)
    return estimate_vlb(model, reverse, x_0, pilot, **({"calls_per_image": 8} | options))


@pytest.mark.parametrize("estimator", ["importance", "full"])
@pytest.mark.parametrize("pairs_per_call", [3, 1000])
@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 3, 3), (2, 2), (3, 7, 7)])
def test_per_image_values_do_not_depend_on_the_batches(shape, pairs_per_call, estimator):
    """An image's value depends on the seed and its position only, not on the batch or network call it travels in."""
    x_0 = images(7, shape)
    options = {"values_per_call": pairs_per_call * x_0[0].numel(), "estimator": estimator}
    whole = run([x_0], **options)
    for size in (1, 3):
        parts = run(x_0.split(size), **options)
        torch.testing.assert_close(parts.per_image, whole.per_image, rtol=1e-10, atol=1e-10)
        assert parts.noise_se == pytest.approx(whole.noise_se, rel=1e-9)


@pytest.mark.parametrize("estimator", ["importance", "full"])
@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 3, 3), (2, 2), (3, 7, 7)])
def test_per_image_values_do_not_depend_on_the_call_size(shape, estimator):
    """How many values go into a network call changes no image's draws."""
    whole, parts = (run([images(5, shape)], estimator=estimator, values_per_call=values) for values in (65536, 1))
    torch.testing.assert_close(parts.per_image, whole.per_image, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("estimator", ["importance", "full"])
def test_images_scored_apart_give_the_same_estimate(estimator):
    """An estimator that scores images by their positions, in any order and split, gives what estimate_vlb gives."""
    reverse, model = setting(17)
    x_0 = images(9, levels=17)
    scorer = VLBEstimator(model, reverse, fitted_pilot(17), 8, enough_replicates(8, 9), seed=3, estimator=estimator)
    whole = estimate_vlb(model, reverse, [x_0], scorer.pilot, calls_per_image=8, seed=3, estimator=estimator)
    order = [8, 0, 5, 2, 7, 1, 6, 4, 3]
    parts = [scorer.score(x_0[part], part)[0] for part in (order[:4], order[4:5], order[5:])]
    second = []
    if estimator == "full":
        second = [VLBScores.merge([scorer.score(x_0[part], part, sweep=1)[0] for part in (order[3:], order[:3])])]
    result = estimate_from_scores([VLBScores.merge(parts)], second)
    torch.testing.assert_close(result.per_image, whole.per_image, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(result.term_mean, whole.term_mean, rtol=1e-12, atol=1e-12, equal_nan=True)
    assert result.noise_se == pytest.approx(whole.noise_se, rel=1e-9)
    assert result.image_se == pytest.approx(whole.image_se, rel=1e-9)


def test_calls_hold_as_many_values_as_allowed():
    """No network call gets more than `values_per_call` values, and no more calls are made than those need."""
    reverse, sizes = process(), []

    def model(x_t, timesteps):
        sizes.append(x_t.numel())
        return torch.zeros_like(x_t)

    estimate_vlb(model, reverse, [images(5)], torch.ones(T), calls_per_image=8, values_per_call=100)
    assert max(sizes) == 6 * 16 and len(sizes) == math.ceil(5 * 8 / 6) and sum(sizes) == 5 * 8 * 16


@pytest.mark.parametrize("calls_per_image", [2, 8, 20, 64, 100])
@pytest.mark.parametrize("dims", [16, 768, 3072, 70000])
def test_units_of_images_fill_network_calls(dims, calls_per_image):
    """A unit is the fewest images whose pairs fill whole network calls to nine tenths."""
    reverse, model = setting()
    scorer = VLBEstimator(model, reverse, torch.ones(T), calls_per_image)
    pairs = max(1, 65536 // dims)

    def filled(images_):
        needed = images_ * calls_per_image
        return needed / (math.ceil(needed / pairs) * pairs) >= 0.9

    unit = scorer.images_per_unit(torch.zeros(1, 1, dims))
    assert filled(unit) and not any(filled(fewer) for fewer in range(1, unit))


@pytest.mark.parametrize("estimator", ["importance", "full"])
def test_seed_decides_the_draws(estimator):
    """The same seed gives the same estimate, another seed another, whatever torch's global state."""
    first = run([images(3)], seed=5, estimator=estimator)
    torch.manual_seed(123)
    again = run([images(3)], seed=5, estimator=estimator)
    other = run([images(3)], seed=6, estimator=estimator)
    assert torch.equal(first.per_image, again.per_image) and first.noise_se == again.noise_se
    assert not (first.per_image == other.per_image).any()


@pytest.mark.parametrize("estimator", ["importance", "full"])
def test_images_get_different_draws(estimator):
    """Two equal images at different positions have independent draws."""
    per_image = run([images(1).repeat(2, 1, 1, 1)], estimator=estimator).per_image
    assert per_image[0] != per_image[1]


# --- further reverse processes

OTHERS = {
    "clipped": {"clip_sample": True},
    "fixed_large": {"variance_type": "fixed_large"},
    "density": {"levels": None},
}


@pytest.mark.parametrize("estimator", ["importance", "full"])
@pytest.mark.parametrize("name", PILOTS)
def test_also_equals_separate_runs(name, estimator):
    """A further process's estimate is, in every number, that of a run of its own with the same seed and pilot."""
    reverse, model = setting(17)
    x_0, pilot = images(7, levels=17), PILOTS[name](17)
    others = [replace(reverse, **change) for change in OTHERS.values()]
    options = {"pilot": pilot, "seed": 3, "estimator": estimator, "num_replicates": 2}
    result = estimate_vlb(model, reverse, x_0.split(3), also=others, **options)
    calls = len(model.told)
    assert len(result.also) == 3 and calls == 7 * (20 if estimator == "importance" else 2 * T)
    for mine, process_ in zip((result, *result.also), (reverse, *others)):
        alone = estimate_vlb(model, process_, x_0.split(3), **options)
        assert torch.equal(mine.per_image, alone.per_image) and mine.also in (result.also, ())
        for number in ("bits_per_dim", "noise_se", "image_se", "prior", "kl", "decoder"):
            assert getattr(mine, number) == getattr(alone, number)
        torch.testing.assert_close(mine.term_mean, alone.term_mean, rtol=0, atol=0, equal_nan=True)
    assert len({result.bits_per_dim, *(other.bits_per_dim for other in result.also)}) == 4


def test_also_uses_the_slopes_of_its_own():
    """A pilot that was fitted to several processes serves each with its slopes, as in a run of its own."""
    reverse, model = setting(17)
    other = replace(reverse, variance_type="fixed_large")
    pilot = fit_pilot(model, reverse, images(100, levels=17, seed=1), also=[other])
    x_0 = images(7, levels=17)
    result = estimate_vlb(model, reverse, [x_0], pilot, also=[other])
    own = replace(pilot, control=replace(pilot.control, slopes=pilot.control.slopes[1:]))
    alone = estimate_vlb(model, other, [x_0], own)
    assert torch.equal(result.also[0].per_image, alone.per_image) and result.also[0].noise_se == alone.noise_se
    assert result.also[0].noise_se != estimate_vlb(model, other, [x_0], pilot).noise_se


def test_processes_of_another_chain_are_refused():
    """One network output serves them all, so that they must be of one chain: the same steps, told alike."""
    reverse, model = setting()
    others = (
        reverse.respace([0, 5, T - 1]),
        process(betas=make_betas("squaredcos_cap_v2", T)),
        process(betas=BETAS[:5]),
    )
    for other in others:
        with pytest.raises(ValueError, match="same chain"):
            estimate_vlb(model, reverse, [images(2)], also=[reverse, other])


# --- memory

MEMORY = """
import os, sys, torch
from ddpm_vlb import ForwardProcess, ReverseProcess, VLBEstimator, estimate_vlb, fit_pilot, make_betas

torch.set_num_threads(1)

def process(steps):
    q = ForwardProcess.from_betas(make_betas("linear", steps, 0.1 / steps, 20 / steps))
    return ReverseProcess(q, "sample", clip_sample=False, levels=None).to(dtype=torch.float32)

def stream(n):
    generator = torch.Generator().manual_seed(0)
    for _ in range(n // 10):
        yield torch.rand(10, 3, 32, 32, generator=generator) * 2 - 1

def model(x_t, timesteps):
    return x_t

def many_images(n):
    estimate_vlb(model, process(2000), stream(n), torch.ones(2000), calls_per_image=2, values_per_call=2 * 3072)

def many_steps(steps):
    pilot = fit_pilot(model, process(steps), next(stream(10)), num_calls=256)
    assert pilot.control is not None
    estimate_vlb(model, process(steps), stream(600), pilot, calls_per_image=2, values_per_call=2 * 3072)

def full_loop(steps):
    VLBEstimator(model, process(steps), estimator="full").score(next(stream(10)), range(10))

def peak():  # getrusage would begin with the peak of the process that started this one
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

cases = {"images": (many_images, 200, 2000), "steps": (many_steps, 1000, 6000), "full": (full_loop, 250, 1250)}
for name, (run, small, large) in cases.items():
    if os.fork() == 0:  # a process, and a peak, of its own, which needs not import anything again
        run(small)
        before = peak()
        run(large)
        after = peak()
        block = torch.ones(32, 2**20)
        print(name, after - before, peak() - after, flush=True)
        os._exit(0)
    if os.wait()[1] != 0:
        sys.exit(f"{name} has failed")
"""


@pytest.fixture(scope="module")
def peaks():
    """By how much each kind of growth raised the peak of its process, and by how much a block on top did."""
    # glibc gives freed blocks of this size back at once; else the peak would tell of its holes.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True, env=environment)
    return {name: (int(grown), int(seen)) for name, grown, seen in map(str.split, done.stdout.splitlines())}


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize("growth", ["images", "steps", "full"])
def test_memory_does_not_grow(growth, peaks):
    """The peak rises by less than 32 MiB from 200 images to 2000, and on a chain five or six times as long.

    What may grow: the rows of scores, 40 bytes for each of 1800 images; the tables of the control variate with their
    64 groups and some sums of the curve, 4 kB for each of 5000 steps. What may not: a curve kept for each of 1800 more
    images (172 MB), or of 600 images for 5000 more steps (144 MB); the noise of 10 images at 1000 more steps (123 MB).
    Memory that lay free below the peak hides growth: that it is less than 32 MiB shows in a block of 128 MiB on top.
    """
    grown, seen = peaks[growth]
    assert grown < 32 * 2**20
    assert seen > 96 * 2**20
