"""The posterior over classes: on Gaussian data with the exact network of each class its bounds have a closed form."""

import numpy as np
import pytest
import torch
from analytic import BETAS, SHAPE, PosteriorMean, T, expected_terms, images, process
from networks import tiny_dit, tiny_unet

from ddpm_vlb import Pilot, VLBEstimator, class_posterior, fit_class_pilot, fit_pilot, make_betas

MEANS = 0.25 * torch.randn(6, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class ExactNetworks:
    """Posterior means of the data N(mean_c, 0.3); told the class, or its mean."""

    def __init__(self, reverse):
        self.base, self.root = PosteriorMean(reverse.forward), reverse.forward.alphas_cumprod.sqrt()

    def __call__(self, x_t, timesteps, class_labels=None, mean=None):
        mean = MEANS[class_labels] if mean is None else mean
        return mean + self.base(x_t - self.root[timesteps].reshape(-1, 1, 1, 1) * mean, timesteps)


def setting(number: int, count: int, seed: int = 0, betas: torch.Tensor = BETAS):
    """p, the networks, images of the classes in turn, and the bounds of each class less the prior term, (B, C)."""
    reverse = process(betas=betas)
    x_0 = images(count, seed=seed) * 0.8 + MEANS[torch.arange(count) % number]
    bounds = np.stack([expected_terms(x_0 - mean, betas=betas).sum(1) for mean in MEANS[:number]], axis=1)
    return reverse, ExactNetworks(reverse), x_0, torch.from_numpy(bounds)


@pytest.fixture(scope="module")
def pilot():
    """p_t for these classes."""
    reverse, model, x_0, _ = setting(6, 200, seed=1)
    return fit_class_pilot(model, reverse, x_0, range(6))


# --- what it estimates


def test_differences_of_bounds_are_unbiased_and_their_errors_hold(pilot):
    """Of two classes log p_0 - log p_1 is the difference of their bounds, its error the sum of theirs.

    500 images of 16 draws: z is Student's t of 15 degrees of freedom, of mean square 15 / 13 and within 1.96 in 93.1 %
    of cases; the limits are 4 standard errors away.
    """
    reverse, model, x_0, bounds = setting(2, 500)
    found = class_posterior(model, reverse, x_0, [0, 1], 32, pilot=pilot)
    assert torch.equal(found.draws, torch.full((500, 2), 16))
    gap = found.log_probabilities[:, 0] - found.log_probabilities[:, 1]
    z = (gap - bounds[:, 1] + bounds[:, 0]) / found.log_probabilities_se.sum(1)
    assert abs(z.mean()) < 4 * (15 / 13 / 500) ** 0.5
    assert abs(z.square().mean() - 15 / 13) < 4 * (3.39 / 500) ** 0.5  # 3.39 the variance of its square
    assert abs((z.abs() < 1.96).double().mean() - 0.931) < 4 * (0.931 * 0.069 / 500) ** 0.5


def test_the_posterior_is_that_of_the_closed_form(pilot):
    """With many draws every log probability of six classes is the closed form's, within five of its errors."""
    reverse, model, x_0, bounds = setting(6, 60)
    found = class_posterior(model, reverse, x_0, range(6), 6 * 200, pilot=pilot, halving=False)
    z = (found.log_probabilities - (-bounds).log_softmax(1)) / found.log_probabilities_se
    assert z.abs().max() < 5 and 0.7 < z.square().mean() < 1.3
    assert torch.allclose(found.log_probabilities.exp().sum(1), torch.ones(60).double())


def test_a_network_that_does_not_look_at_the_class_leaves_the_prior():
    """Draws are shared: where classes do not differ their differences are 0 exactly, and so are the errors."""
    reverse, model, x_0, _ = setting(3, 5)
    prior = torch.tensor([0.5, 1.5, 2.0]).double()

    def blind(x_t, timesteps, class_labels):
        return model.base(x_t, timesteps)

    found = class_posterior(blind, reverse, x_0, [4, 0, 7], prior=prior, pilot=Pilot(torch.ones(T)))
    assert torch.allclose(found.log_probabilities, (prior / 4).log().expand(5, -1), rtol=0, atol=1e-12)
    assert torch.all(found.log_probabilities_se == 0)


def test_a_prior_adds_its_logarithm(pilot):
    """At the same draws the posterior with a prior is the other one times it, normalised."""
    reverse, model, x_0, _ = setting(3, 20)
    prior = torch.tensor([0.2, 0.3, 0.5]).double()
    plain, given = (
        class_posterior(model, reverse, x_0, range(3), 24, own, pilot, halving=False) for own in (None, prior)
    )
    expected = (plain.log_probabilities + prior.log()).log_softmax(1)
    assert torch.allclose(given.log_probabilities, expected, rtol=0, atol=1e-10)


def test_classes_may_be_conditionings(pilot):
    """Rows of the network's further arguments in place of labels give the same numbers."""
    reverse, model, x_0, _ = setting(6, 10)
    labels, rows = (class_posterior(model, reverse, x_0, own, pilot=pilot) for own in (range(6), {"mean": MEANS}))
    assert torch.equal(labels.log_probabilities, rows.log_probabilities)
    assert torch.equal(labels.log_probabilities_se, rows.log_probabilities_se)


# --- what it costs


def variance(reverse, model, x_0, pilot) -> float:
    """Mean over images of the variance of the difference of two bounds at 16 draws, as estimated."""
    found = class_posterior(model, reverse, x_0, [0, 1], 32, pilot=pilot)
    return float(found.log_probabilities_se.sum(1).square().mean())


@pytest.mark.parametrize(
    "betas, apart, usual", [(BETAS, 15, 0.95), (make_betas("linear", 100, 0.001, 0.15), 200, 1.8)]
)
def test_shared_draws_at_the_right_t_are_worth_many_calls(betas, apart, usual):
    """The variance of the difference of two classes' bounds, at 16 draws of each, over that of other ways to draw.

    On a chain that begins far below the classes' distance bounds estimated apart have over 200 times more, shared
    draws at the p_t of L_t about twice as much; on one that does not 15 times, and as much.
    """
    reverse, model, x_0, _ = setting(2, 200, betas=betas)
    others = setting(2, 200, seed=1, betas=betas)[2]
    labels = {"class_labels": torch.arange(200) % 2}
    of_the_terms = fit_pilot(model, reverse, others, conditioning=labels, control_variate=False)
    ours = variance(reverse, model, x_0, fit_class_pilot(model, reverse, others, [0, 1]))
    scorers = [VLBEstimator(model, reverse, of_the_terms, 16, 16, seed=seed) for seed in range(2)]
    told = [{"class_labels": torch.full((200,), label)} for label in range(2)]
    scores = [own.score(x_0, range(200), label)[0] for own, label in zip(scorers, told, strict=True)]
    assert sum(float(own.noise_variance.mean()) for own in scores) > apart * ours
    assert variance(reverse, model, x_0, of_the_terms) > usual * ours


def test_halving_keeps_the_best_class_and_saves_calls(pilot):
    """Of 300 images the class of the lowest bound is in the last round, at 88 calls in place of 144, for 96 %.

    For 99 % where it leads by the 3 nats that make a probability of 95 %.
    """
    reverse, model, x_0, bounds = setting(6, 300)
    found = class_posterior(model, reverse, x_0, range(6), 88, pilot=pilot)
    kept = (found.draws.gather(1, bounds.argmin(1)[:, None]) == 24)[:, 0].double()
    lead = bounds.sort(1).values.diff(dim=1)[:, 0]
    assert kept.mean() > 0.96 and kept[lead > 3].mean() > 0.99 and (lead > 3).sum() > 100
    assert found.draws.sort(1).values[0].tolist() == [8, 8, 8, 16, 24, 24] and found.calls.unique().tolist() == [88]
    everything = class_posterior(model, reverse, x_0[:1], range(6), 144, pilot=pilot, halving=False)
    assert everything.draws.unique().tolist() == [24]


@pytest.mark.parametrize("halving", [True, False])
@pytest.mark.parametrize("number", [2, 3, 5, 6])
def test_the_budget_is_kept(number, halving, pilot):
    """No image takes more calls than it may, whatever the number; what is left would not make another draw."""
    reverse, model, x_0, _ = setting(number, 2)
    least = 2 * sum({2: [2], 3: [3, 2], 5: [5, 3, 2], 6: [6, 3, 2]}[number] if halving else [number])
    for calls in range(least, least + 9):
        model.base.told.clear()
        found = class_posterior(model, reverse, x_0, range(number), calls, pilot=pilot, halving=halving)
        assert len(model.base.told) == found.calls.sum() and found.draws.min() >= 2
        assert calls - (1 if halving else number - 1) <= found.calls.min() <= found.calls.max() <= calls
    with pytest.raises(ValueError, match=rf"`calls_per_image` must be at least {least} .*got {least - 1}"):
        class_posterior(model, reverse, x_0, range(number), least - 1, pilot=pilot, halving=halving)


def test_an_image_has_one_posterior_in_any_batch(pilot):
    """Its draws depend on the seed and on itself: neither its neighbours nor the size of network calls enter."""
    reverse, model, x_0, _ = setting(6, 9)
    whole = class_posterior(model, reverse, x_0, range(6), pilot=pilot)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    parts = [
        class_posterior(model, reverse, part, range(6), pilot=pilot, values_per_call=size)
        for part, size in zip(x_0[order].split(4), (1, 16 * 7, 2**16), strict=True)
    ]
    for name in ("log_probabilities", "log_probabilities_se", "draws"):
        again = torch.cat([getattr(part, name) for part in parts])
        assert torch.allclose(again, getattr(whole, name)[order], rtol=1e-9, atol=1e-9)
    other = class_posterior(model, reverse, x_0, range(6), pilot=pilot, seed=1)
    assert not torch.allclose(other.log_probabilities, whole.log_probabilities)


def test_draws_stay_what_they_are():
    """Published figures are those of the draws: whoever changes these measures them anew, and this value with them."""
    reverse, model, x_0, _ = setting(3, 1)
    found = class_posterior(model, reverse, x_0, range(3), 20, pilot=Pilot(torch.ones(T)))
    expected = torch.tensor([[-17.166680394, -10.682381387]], dtype=torch.float64)
    torch.testing.assert_close(found.log_probabilities[:, 1:], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_labels_may_be_of_any_integers(dtype):
    """An embedding takes int64 and nothing narrower."""
    x_0, reverse = torch.zeros(1, 1, 8, 8), process(17, torch.float32, variance_type="learned_range")
    labels, flat = torch.tensor([0, 2]), Pilot(torch.ones(T))
    whole, narrow, named = (
        class_posterior(tiny_unet(classes=3), reverse, x_0, own, 8, pilot=flat).log_probabilities
        for own in (labels, labels.to(dtype), {"class_labels": labels.to(dtype)})
    )
    assert torch.equal(narrow, whole) and torch.equal(named, whole)


def test_without_a_pilot_one_is_fitted_to_the_images():
    """By some 1000 calls, which are told beside the images'."""
    reverse, model, x_0, _ = setting(3, 30)
    found = class_posterior(model, reverse, x_0, range(3))
    assert 900 < found.pilot.num_calls <= 1024
    assert len(model.base.told) == found.calls.sum() + found.pilot.num_calls


# --- what is refused


@pytest.mark.parametrize(
    "classes, network, message",
    [
        ([0, 3], 3, r"must lie in 0 .. 2, which this network has, but got \[0, 3\]"),
        ([-1, 1], 3, r"must lie in 0 .. 2"),
        ([0, 1], None, "this network is unconditional"),
        ([0, 1, 0], 3, "must differ, but number 2 is number 0 again"),
        ([1], 3, r"at least 2 integer labels.*\[1\]"),
        ([], 3, "at least 2 integer labels"),
        ([0.5, 1.5], 3, "at least 2 integer labels"),
        (torch.tensor([False, True]), 3, "at least 2 integer labels"),
        (None, 3, "at least 2 integer labels.*None"),
        ({0, 1}, 3, "at least 2 integer labels"),
        (["cat", "dog"], 3, "at least 2 integer labels.*cat"),
        ({"class_labels": torch.tensor([0, 5])}, 3, "must lie in 0 .. 2"),
        ({"a": torch.zeros(3, 2)}, None, "number 1 is number 0 again"),
        ({"a": torch.eye(3), "b": torch.zeros(2)}, None, "one row for each of 3 classes, not the shape"),
        ({}, 3, "at least 2 integer labels"),
    ],
    ids=str,
)
def test_classes_that_cannot_be_told_apart_are_refused(classes, network, message):
    """Unknown, repeated, too few or none at all: in one line, before a call."""
    x_0, reverse = torch.zeros(1, 1, 8, 8), process(17, torch.float32, variance_type="learned_range")
    for function in (class_posterior, fit_class_pilot):
        with pytest.raises(ValueError, match=message) as raised:
            function(tiny_unet(classes=network), reverse, x_0, classes)
        assert "\n" not in str(raised.value)


def test_the_labels_of_a_transformer_are_counted_with_its_own_for_no_class():
    """A DiT of three classes has the labels 0 to 3."""
    x_0, reverse = torch.zeros(1, 2, 8, 8), process(17, torch.float32, variance_type="learned_range")
    with pytest.raises(ValueError, match="must lie in 0 .. 3"):
        class_posterior(tiny_dit(classes=3), reverse, x_0, [0, 4])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"guidance_scale": 3.0}, "`guidance_scale` must be 1, but got 3.0.*told each class"),
        ({"prior": [0.5]}, "`prior` must be 3 positive"),
        ({"prior": [0.5, 0.5, 0.0]}, "`prior` must be 3 positive"),
        ({"calls_per_image": 80.0}, "`calls_per_image` must be an integer, or None, but got 80.0"),
        ({"calls_per_image": True}, "`calls_per_image` must be an integer"),
        ({"pilot": torch.ones(T)}, "`pilot` must come from `fit_class_pilot`, but got a Tensor"),
        ({"pilot": Pilot(torch.ones(T + 1))}, f"`pilot` must have {T} probabilities"),
        ({"x_0": torch.full((1, *SHAPE), 0.3)}, "must lie on the 17 levels"),
        ({"x_0": torch.zeros(0, *SHAPE)}, "holds no images"),
    ],
    ids=str,
)
def test_impossible_arguments_are_refused(options, message):
    """Each in one line."""
    given = {"x_0": torch.zeros(1, *SHAPE)} | options
    with pytest.raises(ValueError, match=message) as raised:
        class_posterior(ExactNetworks(process()), process(17), classes=range(3), **given)
    assert "\n" not in str(raised.value)


def test_a_pilot_probes_every_step():
    """Fewer calls than that are refused, with the number that does."""
    reverse, model, x_0, _ = setting(6, 4)
    with pytest.raises(ValueError, match=rf"`num_calls` must be at least {4 * T}, but got {4 * T - 1}"):
        fit_class_pilot(model, reverse, x_0, range(6), num_calls=4 * T - 1)
    assert fit_class_pilot(model, reverse, x_0, range(6), num_calls=4 * T).num_calls == 4 * T
    with pytest.raises(ValueError, match="uniform_fraction"):
        fit_class_pilot(model, reverse, x_0, range(6), uniform_fraction=0)
