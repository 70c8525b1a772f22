"""Scores of images: merged, combined, saved, and the numbers and errors of the estimate that they give."""

import io
import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from analytic import PosteriorMean, T, images, process
from scipy.stats import chi2
from torch import Tensor

from ddpm_vlb import VLBEstimator, VLBScores, estimate_from_scores, fit_pilot
from ddpm_vlb.scores import curve_sums

ROWS = ("positions", "kl", "decoder", "prior", "noise_variance", "images")


def estimator(calls_per_image: int = 8, seed: int = 0, **options) -> VLBEstimator:
    reverse = process()
    model = PosteriorMean(reverse.forward, 0.8)
    pilot = fit_pilot(model, reverse, images(60, seed=1), num_calls=512)
    return VLBEstimator(model, reverse, pilot, calls_per_image, seed=seed, **options)


def scored(positions: list[int], calls_per_image: int = 8, sweep: int = 0, **options) -> VLBScores:
    """Scores of some of 20 images."""
    return estimator(calls_per_image, **options).score(images(20)[positions], positions, sweep=sweep)[0]


def made(n: int, calls: int = 8, seed: int = 0) -> VLBScores:
    """Arbitrary numbers in the place of scores."""
    kl, decoder, prior, variance = torch.rand(4, n, generator=torch.Generator().manual_seed(seed)).double()
    curve = curve_sums(torch.arange(n)[:, None] % T, kl[:, None], T)
    images, draws = torch.arange(n) + 100, torch.tensor([[1, calls, 3]])
    return VLBScores(torch.arange(n), kl, 5 * decoder, 0.1 * prior, variance / 50, curve, 16, calls, images, draws)


def assert_equal(actual: VLBScores, expected: VLBScores, tolerance: float = 0.0) -> None:
    """All fields are equal, the sums of the curve to the rounding of their order."""
    for name in ROWS:
        torch.testing.assert_close(
            getattr(actual, name), getattr(expected, name), rtol=tolerance, atol=tolerance, equal_nan=True
        )
    torch.testing.assert_close(actual.curve, expected.curve, rtol=1e-12, atol=1e-12)
    assert (actual.dims, actual.calls) == (expected.dims, expected.calls)
    assert torch.equal(actual.draws, expected.draws)


# --- merge


@pytest.mark.parametrize("options", [{}, {"estimator": "full"}], ids=["importance", "full"])
@pytest.mark.parametrize("split", [[20], [7, 13], [1] * 20, [3, 10, 7]], ids=str)
def test_merged_parts_are_one_score(split, options):
    """Scores of parts of the data, merged, are those of the whole to 1e-12, whichever way it was split."""
    whole = scored(list(range(20)), **options)
    parts = [scored(part.tolist(), **options) for part in torch.arange(20).split(split)]
    assert_equal(VLBScores.merge(parts), whole, 1e-12)


def test_merging_is_independent_of_the_order():
    """In any order of the parts, in any nesting and with any order of the images in a part the result is the same."""
    whole = scored(list(range(20)))
    shuffled = torch.randperm(20, generator=torch.Generator().manual_seed(1)).tolist()
    a, b, c = (scored(part) for part in (shuffled[:5], shuffled[5:6], shuffled[6:]))
    for parts in ([a, b, c], [c, a, b], [VLBScores.merge([c, b]), a], [b, VLBScores.merge([a, c])]):
        merged = VLBScores.merge(parts)
        assert len(merged) == 20 and merged.positions.tolist() == list(range(20))
        assert_equal(merged, whole, 1e-12)
        assert merged.estimate().bits_per_dim == pytest.approx(whole.estimate().bits_per_dim, rel=1e-14)
    assert VLBScores.merge([c]).positions.tolist() == sorted(shuffled[6:])


def test_merging_leaves_the_parts_alone():
    """The parts can be used again: merging twice gives the same."""
    parts = [scored([4, 0]), scored([2])]
    before = [{name: value.clone() for name, value in part.state_dict().items()} for part in parts]
    assert_equal(VLBScores.merge(parts), VLBScores.merge(parts))
    assert_equal(VLBScores.merge(parts[:1]), VLBScores.merge(parts[:1]))
    for part, state in zip(parts, before):
        assert all(torch.equal(part.state_dict()[name], state[name]) for name in state)


def test_an_image_in_two_parts_is_refused():
    """It would count twice, in one part or across them."""
    with pytest.raises(ValueError, match="two of the scores"):
        VLBScores.merge([scored([0, 1, 2]), scored([5, 2])])


OTHER_RUNS = {
    "calls": lambda: replace(made(3), positions=torch.arange(3, 6), calls=9),
    "size": lambda: replace(made(3), positions=torch.arange(3, 6), dims=17),
    "chain": lambda: replace(made(3), positions=torch.arange(3, 6), curve=torch.zeros(6, T - 1).double()),
    "seed": lambda: replace(made(3), positions=torch.arange(3, 6), draws=torch.tensor([[2, 8, 3]])),
    "other betas": lambda: replace(made(3), positions=torch.arange(3, 6), chain=1),
    "levels": lambda: replace(made(3), positions=torch.arange(3, 6), levels=17),
    "loss": lambda: replace(made(3), positions=torch.arange(3, 6), loss="simple_loss (epsilon)"),
}


@pytest.mark.parametrize("other", OTHER_RUNS.values(), ids=OTHER_RUNS)
def test_scores_of_different_runs_are_not_merged(other):
    """Another number of network calls, image size, chain or seed is another run."""
    with pytest.raises(ValueError, match="other runs"):
        VLBScores.merge([made(3), other()])


@pytest.mark.parametrize("gather", [VLBScores.merge, VLBScores.combine])
def test_nothing_is_refused(gather):
    """Without scores there is no estimate."""
    with pytest.raises(ValueError, match="no "):
        gather([])


# --- combine


def test_combined_sweeps_are_weighted_by_their_calls():
    """kl and decoder are the means by calls, the noise variances add with the squared shares, the calls add up."""
    sweeps = [made(5, calls, seed) for seed, calls in enumerate((8, 24, 16))]
    combined = VLBScores.combine(sweeps)
    shares = np.array([8, 24, 16]) / 48
    for name, weights in (("kl", shares), ("decoder", shares), ("noise_variance", shares**2)):
        expected = sum(w * getattr(sweep, name).numpy() for w, sweep in zip(weights, sweeps))
        np.testing.assert_allclose(getattr(combined, name), expected, rtol=1e-14)
    assert combined.calls == 48 and combined.dims == 16
    assert torch.equal(combined.positions, sweeps[0].positions) and torch.equal(combined.images, sweeps[0].images)
    assert torch.equal(combined.draws, torch.cat([sweep.draws for sweep in sweeps]))
    assert torch.equal(combined.curve, sweeps[1].curve)  # of the sweep with the most calls
    assert_equal(VLBScores.combine(sweeps[:1]), sweeps[0], 1e-15)


def test_combined_noise_variance_is_calibrated():
    """The mean of the combined sweeps' reported variances is the variance of their estimates.

    (n - 1) s^2 / sigma^2 of 200 near-Gaussian estimates follows chi-square; its 0.05 % and 99.95 % points over 199 are
    0.70 and 1.37. The mean of 200 reported variances, of some 20 degrees of freedom each, adds 2 %: 4 of those.
    """
    x_0 = images(16)
    reported, estimates = [], []
    base = estimator()
    for seed in range(200):
        short, long = (replace(base, calls_per_image=calls, num_replicates=2, seed=seed) for calls in (4, 12))
        sweeps = [short.score(x_0, range(16))[0], long.score(x_0, range(16), sweep=1)[0]]
        combined = VLBScores.combine(sweeps).estimate()
        reported.append(combined.noise_se**2)
        estimates.append(combined.bits_per_dim)
    low, high = chi2.ppf([0.0005, 0.9995], 199) / 199
    assert 0.92 * low < np.var(estimates, ddof=1) / np.mean(reported) < 1.08 * high


def test_sweeps_draw_independently():
    """The errors of two sweeps of the same images are uncorrelated: |r| of 1000 images is below 4 / sqrt(1000)."""
    base = estimator(calls_per_image=4)
    same = images(1).expand(1000, -1, -1, -1)
    first, second = (base.score(same, range(1000), sweep=sweep)[0] for sweep in (0, 1))
    r = float(torch.corrcoef(torch.stack([first.kl + first.decoder, second.kl + second.decoder]))[0, 1])
    assert abs(r) < 4 / 1000**0.5
    assert not torch.equal(first.kl, second.kl)


def test_sweeps_over_different_images_are_not_combined():
    """Other images, at their place or another, or another number of them, are no further sweep."""
    others = {"positions": torch.arange(1, 6), "images": torch.arange(5)}
    for other in (made(4), *(replace(made(5), **{name: own}) for name, own in others.items())):
        with pytest.raises(ValueError, match="different images"):
            VLBScores.combine([made(5), other])


@pytest.mark.parametrize("other", [{"loss": "simple_loss (epsilon)"}, {"chain": 1}, {"levels": 17}], ids=str)
def test_sweeps_of_different_things_are_not_combined(other):
    """A bound and a loss, two chains' bounds or those of two numbers of levels have no common mean."""
    with pytest.raises(ValueError, match="differ in image size, chain, levels or loss"):
        VLBScores.combine([made(5), replace(made(5), **other)])


# --- second draws


def test_second_draw_gives_the_variance():
    """Half the squared gap stands for the noise variance of the images drawn twice; the others keep theirs."""
    scores = replace(made(6), noise_variance=torch.full((6,), torch.nan).double())
    again = made(6, seed=5)
    second = replace(again, **{name: getattr(again, name)[torch.tensor([1, 4])] for name in ROWS})
    result = scores.with_second_draw(second)
    gap = (scores.kl + scores.decoder - again.kl - again.decoder)[[1, 4]]
    assert result.noise_variance.isnan().tolist() == [True, False, True, True, False, True]
    torch.testing.assert_close(result.noise_variance[[1, 4]], gap.square() / 2)
    assert torch.equal(result.kl, scores.kl) and torch.equal(result.decoder, scores.decoder)
    unit = 1 / (16 * math.log(2))
    expected = math.sqrt(float(gap.square().mean()) / 2 / 6) * unit
    assert result.estimate().noise_se == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("other", [{"loss": "simple_loss (epsilon)"}, {"images": torch.arange(6)}], ids=str)
def test_a_second_draw_of_something_else_is_refused(other):
    """A loss beside a bound, or other images at the same positions, say nothing of the noise."""
    with pytest.raises(ValueError, match="The second draw"):
        made(6).with_second_draw(replace(made(6, seed=5), **other))


def test_second_draws_are_taken_up_by_the_estimate():
    """`estimate_from_scores` gives each process its own second draw, and keeps the others in `also`."""
    scores, second = [made(4, seed=s) for s in (0, 1)], [made(4, seed=s) for s in (2, 3)]
    result = estimate_from_scores(scores, second)
    mine, its = (own.with_second_draw(again).estimate() for own, again in zip(scores, second))
    assert (result.bits_per_dim, result.noise_se) == (mine.bits_per_dim, mine.noise_se)
    assert len(result.also) == 1 and result.also[0].noise_se == its.noise_se
    assert result.also[0].bits_per_dim == its.bits_per_dim and result.also[0].also == ()


# --- the estimate


def test_estimate_is_made_of_means_and_variances():
    """Every number by numpy from the rows: bits/dim are nats / (D log 2); squared errors are variances of means."""
    scores = made(30)
    result = scores.estimate()
    unit = 1 / (16 * math.log(2))
    kl, decoder, prior, variance = (getattr(scores, name).numpy() for name in ROWS[1:5])
    total = (kl + decoder + prior) * unit
    assert result.bits_per_dim == pytest.approx(total.mean(), rel=1e-12)
    assert result.nats_per_dim == pytest.approx(total.mean() * math.log(2), rel=1e-12)
    for name, rows in (("kl", kl), ("decoder", decoder), ("prior", prior)):
        assert getattr(result, name) == pytest.approx(rows.mean() * unit, rel=1e-12)
    np.testing.assert_allclose(result.per_image, total, rtol=1e-12)
    noise = variance.mean() * unit**2
    assert result.noise_se == pytest.approx(math.sqrt(noise / 30), rel=1e-12)
    assert result.image_se == pytest.approx(math.sqrt((total.var(ddof=1) - noise) / 30), rel=1e-12)
    assert result.num_images == 30 and result.network_calls_per_image == 8


def test_noise_larger_than_the_spread_leaves_no_image_error():
    """Where the noise explains more than the images' spread the image error is 0, not the root of a negative."""
    scores = made(30)
    assert replace(scores, noise_variance=scores.noise_variance + 100).estimate().image_se == 0


def test_one_image_has_no_image_error():
    """With one image the noise error is there, and the image error is NaN rather than zero."""
    result = made(1).estimate()
    assert result.noise_se > 0 and math.isnan(result.image_se)


def test_unknown_noise_stays_unknown():
    """Without a second draw the full loop's errors are NaN, not zero."""
    result = replace(made(5), noise_variance=torch.full((5,), torch.nan).double()).estimate()
    assert math.isnan(result.noise_se) and math.isnan(result.image_se) and math.isfinite(result.bits_per_dim)


def brute_force_curve(t: Tensor, terms: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean of all draws at a step, and its error with images as the units (ratio estimate, Cochran eq. 2.46)."""
    mean, error = np.full(T, np.nan), np.full(T, np.nan)
    for step in range(T):
        drawn = [(terms[i][t[i] == step]).numpy() for i in range(len(t))]
        drawn = [values for values in drawn if len(values)]
        count = sum(len(values) for values in drawn)
        if count:
            mean[step] = sum(values.sum() for values in drawn) / count
        if len(drawn) > 1:
            residual = sum((values.sum() - len(values) * mean[step]) ** 2 for values in drawn)
            error[step] = math.sqrt(residual * len(drawn) / (len(drawn) - 1)) / count
    return mean, error


def test_curve_is_the_mean_of_the_draws():
    """term_mean and term_se are those of the draws by brute force; NaN where none, or one image, was drawn."""
    generator = torch.Generator().manual_seed(3)
    t = torch.randint(0, T - 2, (9, 5), generator=generator)
    t[0, 0] = T - 2  # one image alone; T - 1 is never drawn
    terms = torch.rand(9, 5, generator=generator, dtype=torch.float64) + t
    mean, error = brute_force_curve(t, terms)
    result = replace(made(9), curve=curve_sums(t, terms, T)).estimate()
    unit = 1 / (16 * math.log(2))
    np.testing.assert_allclose(result.term_mean, mean * unit, rtol=1e-12, equal_nan=True)
    np.testing.assert_allclose(result.term_se, error * unit, rtol=1e-9, equal_nan=True)
    assert math.isnan(result.term_mean[T - 1]) and math.isnan(result.term_se[T - 1])
    assert math.isfinite(result.term_mean[T - 2]) and math.isnan(result.term_se[T - 2])
    halves = curve_sums(t[:4], terms[:4], T) + curve_sums(t[4:], terms[4:], T)
    torch.testing.assert_close(halves, curve_sums(t, terms, T), rtol=1e-12, atol=0)


# --- state


@pytest.mark.parametrize("options", [{}, {"estimator": "full"}], ids=["importance", "full"])
def test_saved_scores_are_the_same(options):
    """Scores that went through a file, as plain tensors, are the same in every field, and can be merged on."""
    scores = scored([3, 1, 7], **options)
    file = io.BytesIO()
    torch.save(scores.state_dict(), file)
    file.seek(0)
    loaded = VLBScores.from_state_dict(torch.load(file, weights_only=True))
    for field in fields(VLBScores):
        mine, its = getattr(scores, field.name), getattr(loaded, field.name)
        assert type(mine) is type(its)
        assert mine == its if isinstance(mine, (int, str)) else torch.equal(mine.nan_to_num(-1), its.nan_to_num(-1))
    rest = scored([0, 2], **options)
    assert_equal(VLBScores.merge([loaded, rest]), VLBScores.merge([scores, rest]))


def test_a_state_of_an_earlier_version_is_refused():
    """In one line, which names what it lacks."""
    state = made(3).state_dict()
    for name in ("chain", "levels", "loss"):
        del state[name]
    with pytest.raises(ValueError, match=r"must have \['chain', 'levels', 'loss'\], .* score the images anew\.$"):
        VLBScores.from_state_dict(state)
