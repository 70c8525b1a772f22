"""Estimates that are subtracted, and validations that decide: closed forms, what is refused, what is kept."""

import functools
import io
import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch
from analytic import BETAS, PosteriorMean, T, expected_bits, gains, images, population_bits, process
from estimates import FACTOR, fitted_pilot, setting
from torch import Tensor, nn

from ddpm_vlb import (
    Pilot,
    Validation,
    VLBEstimator,
    VLBScores,
    estimate_from_scores,
    fit_pilot,
    merge_scores,
    simple_loss,
)
from ddpm_vlb.validation import evaluating

COUNT = 12
PILOT = fitted_pilot()


def network(factor: float = FACTOR) -> PosteriorMean:
    return PosteriorMean(process().forward, factor)


def scores(factor: float = FACTOR, pilot=PILOT, offset: int = 0, x_0=None, sweep: int = 0, **options) -> VLBScores:
    """Of some images, by 8 calls each."""
    x_0 = images(COUNT) if x_0 is None else x_0
    scorer = VLBEstimator(network(factor), process(), pilot, 8, **options)
    return scorer.score(x_0, range(offset, offset + len(x_0)), sweep=sweep)[0]


def validation(count: int = COUNT, **options) -> Validation:
    return Validation(images(count), process(), **{"pilot": PILOT, **options})


# --- differences


def test_a_difference_is_made_image_by_image():
    """Its mean and error are those of the images' differences, by numpy; turned round, it is the negative."""
    first, second = scores().estimate(), scores(0.95).estimate()
    gap, back = first - second, second - first
    rows = (first.per_image - second.per_image).numpy()
    assert gap.bits_per_dim == pytest.approx(first.bits_per_dim - second.bits_per_dim, abs=1e-12)
    assert gap.se == pytest.approx(rows.std(ddof=1) / COUNT**0.5, rel=1e-12)
    assert (back.bits_per_dim, back.se) == (-gap.bits_per_dim, gap.se) and torch.equal(back.per_image, -gap.per_image)


def test_the_noise_is_common_and_cancels():
    """Of two networks that are alike the paired error is under a tenth of the two errors' root of squares."""
    first, second = scores().estimate(), scores(FACTOR * 1.01).estimate()
    apart = math.hypot(*(math.hypot(own.noise_se, own.image_se) for own in (first, second)))
    assert 0 < (first - second).se < apart / 10


@pytest.mark.parametrize(
    "factors, said", [((0.95, 0.5), "better"), ((0.5, 0.95), "worse"), ((0.8, 0.8), "cannot be told")]
)
def test_verdicts(factors, said):
    """Student's probability decides; a network is not told from itself, whose difference and error are 0."""
    gap = scores(factors[0]).estimate() - scores(factors[1]).estimate()
    assert gap.verdict == said and str(gap).endswith(f"bits/dim: {said}")
    beyond = abs(gap.bits_per_dim) > scipy.stats.t.ppf(0.975, COUNT - 1) * gap.se
    assert beyond == (gap.p_value < 0.05) == (said != "cannot be told")
    assert factors[0] != factors[1] or (gap.bits_per_dim, gap.se) == (0, 0)


def test_two_digits_of_the_error_are_printed():
    """However small it is."""
    gap = scores().estimate() - scores(0.95).estimate()
    assert str(replace(gap, bits_per_dim=-0.0123456, se=0.000345)) == "-0.01235 +- 0.00034 bits/dim: better"


def test_one_image_has_no_paired_error():
    """It is NaN, without a warning, and tells nothing."""
    gap = scores(x_0=images(1)).estimate() - scores(0.5, x_0=images(1)).estimate()
    assert math.isnan(gap.se) and gap.verdict == "cannot be told"


OTHERS = {
    "same images": lambda: scores(x_0=images(COUNT, seed=1)),
    "same order": lambda: scores(x_0=images(COUNT).flip(0)),
    "5 images": lambda: scores(x_0=images(5)),
    "same positions": lambda: scores(offset=1),
    "same `seed`": lambda: scores(seed=1),
    "as many sweeps": lambda: scores(sweep=1),
    "`calls_per_image`": lambda: replace(scores(), draws=scores(num_replicates=4).draws),
    "`num_replicates`": lambda: scores(num_replicates=4),
    "`estimator`": lambda: scores(estimator="full"),
    "same pilot": lambda: scores(pilot=PILOT.probabilities),
    "pilot=pilot": lambda: scores(pilot=replace(PILOT, control=replace(PILOT.control, scale=2 * PILOT.control.scale))),
    "of the bound and simple_loss": lambda: replace(scores(), loss="simple_loss (sample)"),
    "same `levels`": lambda: replace(scores(), levels=17),
}


@pytest.mark.parametrize("said", OTHERS)
def test_what_is_not_paired_is_refused(said):
    """Other images, another order, place, seed, number of draws or pilot: in one line, with what to do."""
    with pytest.raises(ValueError, match=rf"^`first - second` must be .*{said}") as refusal:
        scores().estimate() - OTHERS[said]().estimate()
    assert "\n" not in str(refusal.value)


def test_an_estimate_made_by_hand_is_refused():
    """Nothing is known of its images."""
    with pytest.raises(ValueError, match="made by hand"):
        scores().estimate() - replace(scores().estimate(), identity=None)


def test_a_pilot_is_known_by_its_values():
    """Saved and loaded, or in other units, it is the same, as its images are in float32 or float64."""
    loaded = Pilot.from_state_dict(PILOT.state_dict())
    assert loaded.digest == PILOT.digest == replace(PILOT, probabilities=4 * PILOT.probabilities, num_calls=7).digest
    x_0 = images(COUNT, dtype=torch.float32)
    assert torch.equal(scores(x_0=x_0).images, scores(x_0=x_0.double()).images)


def test_full_loops_need_no_common_pilot():
    """They draw from none: the same seed is enough."""
    gap = scores(pilot=None, estimator="full").estimate() - scores(0.5, estimator="full").estimate()
    assert gap.verdict == "better"


def test_identity_survives():
    """Merging in any order, and saving, keep what a difference asks for; so does combining, with its sweeps."""
    order, whole = torch.randperm(COUNT, generator=torch.Generator().manual_seed(0)), scores().estimate()
    scorer, x_0 = VLBEstimator(network(), process(), PILOT, 8), images(COUNT)
    parts = [scorer.score(x_0[own], own.tolist())[0] for own in order.split(5)]
    merged = VLBScores.merge([VLBScores.from_state_dict(part.state_dict()) for part in parts])
    assert (merged.estimate() - whole).bits_per_dim == pytest.approx(0, abs=1e-12)
    both = VLBScores.combine([merged, scores(sweep=1)]).estimate()
    assert (both - VLBScores.combine([scores(), scores(sweep=1)]).estimate()).se == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="as many sweeps"):
        both - whole


def test_coverage():
    """The paired 95 % interval holds the population's difference, in closed form, in 95 % of 120 sets of 30 images.

    An image's draws depend on its position, so that the sets of one data set are independent; 2.045 is Student's for
    29 degrees, and four binomial errors are 8 %.
    """
    true = population_bits(factor=0.8) - population_bits(factor=0.95)
    ours = Validation(images(3600), process(), 4, pilot=PILOT)
    gaps = (ours(network(0.8)) - ours(network(0.95))).per_image.reshape(120, 30)
    held = (gaps.mean(1) - true).abs() < 2.045 * gaps.std(1) / 30**0.5
    assert 0.87 <= float(held.double().mean()) < 1


# --- validation


def test_a_validation_is_the_estimate_of_its_images():
    """As the estimator gives it, also from parts that several processes score."""
    ours = validation(seed=3)
    estimate = ours(network(), "whole")
    scorer = VLBEstimator(network(), process(), PILOT, 8, ours.num_replicates, seed=3)
    assert torch.equal(estimate.per_image, scorer.score(ours.images, range(COUNT))[0].estimate().per_image)
    parts = [ours.score(network(), range(rank, COUNT, 3)) for rank in range(3)]
    assert (ours.add(merge_scores(parts)) - estimate).bits_per_dim == pytest.approx(0, abs=1e-12)


def test_history_and_best():
    """Estimates have their labels, or numbers; the best is the lowest, the first of equals."""
    ours = validation()
    assert ours.best is None and len(ours) == COUNT
    for label, factor in ((100, 0.5), (200, 0.95), (300, 0.95), (None, 0.7), ("last", 0.8)):
        ours(network(factor), label)
    assert list(ours.history) == [100, 200, 300, 3, "last"] and ours.best == 200
    assert (ours.history[200] - ours.history[100]).verdict == "better"
    assert (ours.history[300] - ours.history[200]).verdict == "cannot be told"


def test_a_pilot_is_fitted_once_and_kept():
    """At the first call, to its network; the next calls make no more calls than they are for."""
    ours, model = validation(pilot=None), network()
    ours(model)
    pilot, model.told = ours.pilot, []
    ours(model)
    assert ours.pilot is pilot and len(model.told) == 8 * COUNT
    reverse, own = setting()
    assert pilot.digest == fit_pilot(own, reverse, images(COUNT)).digest


def test_saved_and_loaded_it_goes_on():
    """Through a file of plain tensors: the same pilot, history and best, and estimates that can be compared."""
    ours, file = validation(pilot=None), io.BytesIO()
    ours(network(0.7), 1), ours(network(0.9), "b")
    torch.save(ours.state_dict(), file)
    file.seek(0)
    again = validation(pilot=None)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert (again.best, again.pilot.digest, list(again.history)) == ("b", ours.pilot.digest, [1, "b"])
    assert torch.equal((again(network(0.9)) - again.history["b"]).per_image, torch.zeros(COUNT).double())
    empty = validation(pilot=None)
    empty.load_state_dict(validation(pilot=None).state_dict())
    assert empty.pilot is None and empty.history == {}


OTHER_VALIDATIONS = {
    "same seed": {"seed": 1},
    "same images": {"count": COUNT + 1},
    "same draws": {"calls_per_image": 4},
    "same chain": {"reverse": process(betas=BETAS * 0.9)},
    "same `term`": {"term": simple_loss},
    "same `levels`": {"reverse": replace(process(), levels=2**16)},
}


OTHER_SETTINGS = {
    "variance_type": {"variance_type": "fixed_large"},
    "prediction_type": {"prediction_type": "v_prediction"},
    "eta": {"eta": 0.5},
    "clip_sample": {"clip_sample": True},
    "clip_sample_range": {"clip_sample_range": 2.0},
    "thresholding": {"thresholding": True},
    "sample_max_value": {"sample_max_value": 3.0},
    "dynamic_thresholding_ratio": {"dynamic_thresholding_ratio": 0.5},
    "x_0_mse": {"x_0_mse": torch.full((T,), 0.1)},
    "decoder_log_variance": {"decoder_log_variance": -2.0},
    "decoder_slope": {"decoder_slope": 0.5},
}


def conditioned(told: Tensor | None, **options) -> Validation:
    """By labels, None for no labels."""
    return validation(conditioning=None if told is None else {"class_labels": told}, **options)


def refused(state: dict, again: Validation) -> str:
    """The one line, of which nothing is kept."""
    with pytest.raises(ValueError) as refusal:
        again.load_state_dict(state)
    assert "\n" not in str(refusal.value) and not again.history and again.pilot is PILOT
    return str(refusal.value)


@pytest.mark.parametrize("name", OTHER_SETTINGS)
def test_a_state_of_other_settings_is_refused(name):
    """Whose difference would be taken for the networks'; estimates of both, on purpose, are subtracted."""
    ours = validation()
    estimate = ours(network())
    again = Validation(images(COUNT), replace(process(), **OTHER_SETTINGS[name]), pilot=PILOT)
    assert f"must be of a validation with the same `{name}`, but theirs are" in refused(ours.state_dict(), again)
    assert math.isfinite((again(network()) - estimate).bits_per_dim)


@pytest.mark.parametrize(
    "own, other",
    [(torch.zeros(COUNT), torch.ones(COUNT)), (None, torch.zeros(COUNT)), (torch.zeros(COUNT), None)],
    ids=["other", "none in the state", "none here"],
)
def test_a_state_of_other_conditioning_is_refused(own, other):
    """As one of other images is."""

    def told(x_t, timesteps, class_labels=None):
        return network()(x_t, timesteps)

    ours = conditioned(own)
    ours(told)
    said = refused(ours.state_dict(), conditioned(other))
    assert "the same `conditioning['class_labels']`, but theirs are" in said
    same = conditioned(None if own is None else own.double())
    same.load_state_dict(ours.state_dict())
    assert list(same.history) == [0]


def test_settings_are_the_same_in_another_precision():
    """As the chain is, and 1 is 1.0."""
    made = {"x_0_mse": torch.linspace(0.1, 0.2, T).double(), "decoder_log_variance": -2}
    ours = Validation(images(COUNT), replace(process(), **made), pilot=PILOT)
    ours(network())
    made |= {"x_0_mse": made["x_0_mse"].float(), "decoder_log_variance": -2.0}
    again = Validation(images(COUNT), replace(process(), **made), pilot=PILOT)
    again.load_state_dict(ours.state_dict())
    assert list(again.history) == [0]


def test_a_state_without_settings_is_refused():
    """Of an earlier version; one without a history says nothing that could be wrong."""
    ours = validation()
    empty = ours.state_dict()
    ours(network())
    state = ours.state_dict()
    del state["settings"], empty["settings"]
    assert "is of an earlier version" in refused(state, validation())
    validation(pilot=None).load_state_dict(empty)


@pytest.mark.parametrize("said", OTHER_VALIDATIONS)
def test_a_state_of_another_validation_is_refused(said):
    """At once, in one line, and nothing of it is kept; and so are its scores."""
    x_0 = (images(COUNT + 1) * 2**15).round() / 2**15 * 2**16 / (2**16 - 1)
    x_0 = ((x_0.clamp(-1, 1) + 1) * ((2**16 - 1) / 2)).round() * (2 / (2**16 - 1)) - 1
    made = {"reverse": process(), "pilot": PILOT, "count": COUNT}
    ours, again = (
        Validation(x_0[: own.pop("count")], **own) for own in ({**made}, {**made, **OTHER_VALIDATIONS[said]})
    )
    ours(network(), "kept")
    for give in (lambda: again.load_state_dict(ours.state_dict()), lambda: again.add(ours._scores["kept"])):
        with pytest.raises(ValueError, match=f"^`.*` must be of .*({said}|all 13 images)") as refusal:
            give()
        assert "\n" not in str(refusal.value) and not again.history and again.pilot is PILOT


def test_scores_of_some_images_are_no_validation():
    """They would be compared with those of all."""
    ours = validation()
    with pytest.raises(ValueError, match="all 12 images, but are of 3"):
        ours.add(ours.score(network(), [0, 1, 2]))


@pytest.mark.parametrize(
    "options, said",
    [
        ({"calls_per_image": 1, "count": 3}, "calls_per_image"),
        ({"conditioning": {"class_labels": torch.zeros(3)}}, "one row for each of 12"),
    ],
)
def test_impossible_validations_are_refused_at_once(options, said):
    """Before a network is trained for them."""
    with pytest.raises(ValueError, match=said):
        validation(**options)


class Dropping(nn.Module):
    """Linear, with a dropout and a layer that someone has frozen."""

    def __init__(self):
        super().__init__()
        self.weight, self.dropout, self.frozen = nn.Parameter(torch.tensor(0.3)), nn.Dropout(0.5), nn.BatchNorm2d(1)
        self.frozen.eval()

    def forward(self, x_t, timesteps):
        assert not self.training and not torch.is_grad_enabled()
        return self.frozen(self.dropout(x_t * self.weight))


def test_the_network_is_left_as_it_was():
    """Each layer's mode, the gradients and the global random state; the dropout is off while it is scored."""
    model = Dropping().double()
    ours, state = Validation(images(COUNT), process(), pilot=None), torch.get_rng_state()
    first = ours(model)
    assert model.training and model.dropout.training and not model.frozen.training
    assert torch.equal(torch.get_rng_state(), state) and model.weight.grad is None
    assert (ours(model.eval()) - first).se == 0 and not model.training


def test_a_failed_validation_leaves_the_network_as_it_was():
    """In training mode, where NaN ends the validation."""
    model = Dropping().double()
    model.weight.data.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="NaN"):
        validation()(model)
    assert model.training


class Merging(nn.Linear):
    """A layer whose `train` acts: as LoRA's, its weight holds an update while it is scored."""

    merged = False

    def train(self, mode: bool = True):
        if mode == self.merged:  # out of the weight for training, into it for scoring
            self.weight.data += -1.0 if mode else 1.0
            self.merged = not mode
        return super().train(mode)


def test_layers_go_back_to_their_modes_by_themselves():
    """One that merges on eval is merged while it is scored, and unmerged after; one that is frozen stays merged."""
    model = nn.Sequential(Merging(2, 2), nn.Sequential(Merging(2, 2), Merging(2, 2)))
    nn.init.zeros_(model[0].weight), nn.init.zeros_(model[1][0].weight), nn.init.zeros_(model[1][1].weight)
    model[1][1].eval()
    layers = model[0], model[1][0], model[1][1]
    with evaluating(model):
        assert [float(own.weight.detach().mean()) for own in layers] == [1, 1, 1]
    assert [float(own.weight.detach().mean()) for own in layers] == [0, 0, 1]
    assert [own.training for own in (model, model[1], *layers)] == [True, True, True, True, False]


def test_a_layer_of_two_keeps_its_mode():
    """Whichever of the two is restored last."""
    shared = nn.Dropout()
    model = nn.ModuleList([nn.Sequential(shared), nn.Sequential(shared).eval()])
    shared.train()
    with evaluating(model):
        assert not any(own.training for own in model.modules())
    assert [own.training for own in (model, *model, shared)] == [True, True, False, True]


def test_a_pilot_of_probabilities_is_saved():
    """As any other."""
    ours, again = validation(pilot=PILOT.probabilities), validation(pilot=None)
    ours(network(), 1)
    again.load_state_dict(ours.state_dict())
    assert (again(network()) - again.history[1]).se == 0
    again.pilot = 2 * PILOT.probabilities  # later too
    assert again.pilot.digest == Pilot.from_state_dict(again.state_dict()["pilot"]).digest == ours.pilot.digest


def test_a_label_is_a_plain_number():
    """Of numpy's numbers too, with which a file of plain tensors would not load."""
    ours, file = validation(), io.BytesIO()
    ours(network(), np.int64(7))
    torch.save(ours.state_dict(), file)
    file.seek(0)
    assert list(torch.load(file, weights_only=True)["history"]) == [7] and ours.best == 7


def test_more_processes_than_images():
    """Those that have none send nothing, and the others' scores are those of all."""
    ours = validation(3, calls_per_image=8)
    parts = [ours.score(network(), range(rank, 3, 5)) for rank in range(5)]
    assert [len(own) for own in parts] == [1, 1, 1, 0, 0]
    assert (ours.add(merge_scores(parts)) - ours(network())).se == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="all 3 images, but are of 0"):
        ours.add(())
    with pytest.raises(ValueError, match="no images were scored"):
        merge_scores([(), ()])


# --- losses


def expected_loss(x_0, weights=1.0) -> np.ndarray:
    """The mean over t of the weighted E|x_0 - x_0_hat|^2 / D, of each image; analytic.py has the algebra."""
    gain, abar = gains(BETAS, FACTOR), np.cumprod(1 - BETAS.double().numpy())
    square = x_0.flatten(1).square().mean(1).numpy()[:, None]
    return (weights * ((1 - gain * np.sqrt(abar)) ** 2 * square + gain**2 * (1 - abar))).mean(1)


SNR = np.cumprod(1 - BETAS.double().numpy()) / (1 - np.cumprod(1 - BETAS.double().numpy()))
LOSSES = {
    "simple": (simple_loss, 1.0),
    "min-SNR": (functools.partial(simple_loss, snr_gamma=0.5), np.minimum(SNR, 0.5)),
    "a table": (lambda reverse, output, diffused: diffused.t * simple_loss(reverse, output, diffused), np.arange(T)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_its_mean_over_t(name):
    """In closed form, within 4 of its standard errors, which are right; beside it stands the bound of the same calls.

    The variance of 500 values of kurtosis up to 10 is known to 4 * sqrt(9 / 500), half of itself.
    """
    loss, weights = LOSSES[name]
    pilot = fit_pilot(network(), process(), images(100, seed=1), 512, also=[loss])
    ours = validation(500, pilot=pilot, term=loss)
    estimate = ours(network())
    expected = expected_loss(ours.images, weights), expected_bits(ours.images, factor=FACTOR)
    for own, exact in zip((estimate, *estimate.also), expected, strict=True):
        error = own.per_image - torch.from_numpy(exact)
        assert abs(float(error.mean())) < 4 * own.noise_se < 0.1 * abs(own.bits_per_dim)
        assert 0.5 < 500 * own.noise_se**2 / float(error.var()) < 1.5


def test_a_loss_decides_by_its_own_numbers():
    """The best is the lowest loss; differences and prints are in its unit, the loss at each t in the curve."""
    ours = validation(term=lambda reverse, output, diffused: -simple_loss(reverse, output, diffused))
    for factor in (0.95, 0.5):
        ours(network(factor), factor)
    assert ours.best == 0.5 and ours.history[0.5].prior == 0
    gap = ours.history[0.5] - ours.history[0.95]
    assert str(gap).endswith("of <lambda> (sample): better") and "<lambda> (sample), 12" in str(ours.history[0.5])
    with pytest.raises(ValueError, match="must be of a bound"):
        _ = ours.history[0.5].nats_per_dim
    assert (gap.verdict, (ours.history[0.5].also[0] - ours.history[0.95].also[0]).verdict) == ("better", "worse")
    x_0 = ours.images
    full = VLBEstimator(network(), process(), estimator="full", also=[lambda r, o, d: d.t.double()])
    curve = estimate_from_scores(full.score(x_0, range(COUNT))).also[0].term_mean
    torch.testing.assert_close(curve, torch.arange(T).double())


def test_a_loss_that_the_pilot_does_not_know_is_unbiased():
    """No slope of the bound's is taken for it; the mean of 500 images is within 4 of its own errors."""
    ours = validation(500, term=simple_loss)
    error = ours(network()).per_image - torch.from_numpy(expected_loss(ours.images))
    assert abs(float(error.mean())) < 4 * float(error.std()) / 500**0.5


@pytest.mark.parametrize("made", [lambda loss: loss.mean(), lambda loss: loss.mean().item()], ids=["mean", "number"])
def test_a_loss_of_the_whole_batch_is_refused(made):
    """It would be every image's."""
    with pytest.raises(ValueError, match="one value for each of"):
        validation(term=lambda *given: made(simple_loss(*given)))(network())


def test_no_estimate_is_overwritten_without_its_label():
    ours = validation(8)
    for label in (1, None, 1):
        ours(network(), label)
    assert list(ours.history) == [2, 1]  # in the order of time
