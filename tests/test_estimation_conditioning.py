"""Estimates of class-conditional networks, and what is refused before a network is called."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from analytic import PosteriorMean, T, expected_bits, images, oracle, process
from estimates import FACTOR, fitted_pilot, setting

from ddpm_vlb import ForwardProcess, ReverseProcess, VLBEstimator, estimate_vlb, fit_pilot

# --- conditioning


@pytest.mark.parametrize("values_per_call", [1, 7 * 16, 65536])
@pytest.mark.parametrize("estimator", ["importance", "full"])
def test_every_pair_gets_its_image_s_label(estimator, values_per_call):
    """A network that knows the answer from the label makes every KL exactly 0; shifted labels do not.

    Its decoder depends on no noise, so that the second draw of the full loop, if it has the right labels, finds none.
    """
    reverse, x_0 = process(17), images(10, levels=17)
    labels = torch.arange(10)

    def scored(labels):
        batches = [(part, {"class_labels": rows}) for part, rows in zip(x_0.split(4), labels.split(4))]
        return estimate_vlb(oracle(x_0), reverse, batches, estimator=estimator, values_per_call=values_per_call)

    right, wrong = scored(labels), scored(labels.roll(1))
    assert right.kl == 0 and wrong.kl > 0.1
    if estimator == "full":
        assert right.noise_se == 0 and right.image_se > 0


def test_conditioning_may_come_in_a_list():
    """A DataLoader makes lists of pairs: they count as pairs, and batches with and without labels as batches."""
    reverse, x_0 = process(17), images(4, levels=17)

    class Items(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, i):
            return x_0[i], {"class_labels": i}

    loader = torch.utils.data.DataLoader(Items(), batch_size=3)
    assert estimate_vlb(oracle(x_0), reverse, loader).kl == 0


def test_a_class_conditional_network_is_scored_by_its_labels():
    """Two classes, of one network each: the bound with labels is that of each class under its own network.

    The networks are linear with factors of 1 and 0.8, the second for one image in six; the estimate is within 4 noise
    errors of the closed form, and further from what it would be with the labels exchanged.
    """
    reverse, x_0 = process(), images(60)
    factors = torch.tensor([1.0, FACTOR]).double()
    labels = (torch.arange(60) % 6 == 0).long()
    base = PosteriorMean(reverse.forward)

    def model(x_t, timesteps, class_labels):
        return factors[class_labels].reshape(-1, 1, 1, 1) * base(x_t, timesteps)

    told = {"class_labels": labels}
    pilot = fit_pilot(model, reverse, images(100, seed=1), conditioning={"class_labels": torch.arange(100) % 2})
    result = estimate_vlb(model, reverse, [(x_0, told)], pilot, calls_per_image=32)
    one, two = (expected_bits(x_0, factor=float(factor)) for factor in factors)
    assert abs(result.bits_per_dim - np.where(labels == 0, one, two).mean()) < 4 * result.noise_se
    assert abs(result.bits_per_dim - np.where(labels == 0, two, one).mean()) > 4 * result.noise_se


# --- errors


@pytest.mark.parametrize("estimator", ["importance", "full"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_output_names_the_step_and_the_position_in_the_data(bad, estimator):
    """The image is named by its place among all images, not in its batch or network call."""
    reverse, x_0 = process(), images(11)

    def model(x_t, timesteps, class_labels):
        wrong = (class_labels == 8) & (timesteps == 4)
        return torch.where(wrong.reshape(-1, 1, 1, 1), bad, torch.zeros_like(x_t))

    batches = [(part, {"class_labels": rows}) for part, rows in zip(x_0.split(3), torch.arange(11).split(3))]
    with pytest.raises(FloatingPointError, match=r"model's output.*t=4 \(timestep 4\), image 8\."):
        estimate_vlb(model, reverse, batches, calls_per_image=96, estimator=estimator)
    scorer = VLBEstimator(model, reverse, torch.ones(T), 96, estimator=estimator)
    with pytest.raises(FloatingPointError, match=r"t=4 \(timestep 4\), image 1234\."):
        scorer.score(x_0[8:9], [1234], {"class_labels": torch.tensor([8])})


@pytest.mark.parametrize("batches", [[], iter(())])
def test_empty_data_is_refused(batches):
    """No batches at all raise instead of giving NaN."""
    reverse, model = setting()
    with pytest.raises(ValueError, match="no images"):
        estimate_vlb(model, reverse, batches)


@pytest.mark.parametrize(
    ("calls", "number"), [(64, 1), (64, 0), (64, -2), (3, 4), (10, 4), (0, 2), (-8, 4), (1, None), (0, None)]
)
def test_impossible_numbers_are_refused(calls, number):
    """Fewer than two replicates, or calls that do not divide among them, are refused."""
    reverse, model = setting()
    with pytest.raises(ValueError, match="num_replicates"):
        estimate_vlb(model, reverse, [images(2)], calls_per_image=calls, num_replicates=number)


def test_unknown_estimators_are_refused():
    """An unknown name is answered with the list of those there are."""
    reverse, model = setting()
    with pytest.raises(ValueError, match=r"\['importance', 'full'\].*'ful'"):
        estimate_vlb(model, reverse, [images(2)], estimator="ful")


def test_the_pilot_must_fit_the_chain():
    """Probabilities or a control variate of another length, or a probability of zero, are refused."""
    reverse, model = setting()
    for pilot in (torch.ones(T + 1), fit_pilot(model, reverse.respace([0, 5, T - 1]), images(9))):
        with pytest.raises(ValueError, match=f"{T} probabilities"):
            estimate_vlb(model, reverse, [images(2)], pilot)
    with pytest.raises(ValueError, match="positive finite"):
        estimate_vlb(model, reverse, [images(2)], torch.arange(T).double())
    other = replace(fit_pilot(model, reverse.respace([0, 5, T - 1]), images(9)), probabilities=torch.ones(T))
    with pytest.raises(ValueError, match="control variate of 3 steps"):
        estimate_vlb(model, reverse, [images(2)], other)


def test_a_bare_tensor_is_not_taken_for_batches():
    """A tensor is iterable, but over images, whose channels would pass for images."""
    reverse = ReverseProcess(ForwardProcess.from_betas([0.1, 0.2]), levels=None)
    with pytest.raises(ValueError, match="batches"):
        estimate_vlb(lambda x_t, timesteps: x_t, reverse, torch.zeros(4, 1, 4, 4))


def test_bare_labels_are_not_taken_for_conditioning():
    """A pair of images and labels lacks the argument's name: the error says how to give it."""
    reverse, model = setting()
    with pytest.raises(ValueError, match="class_labels"):
        estimate_vlb(model, reverse, [(images(2), torch.arange(2))])


@pytest.mark.parametrize("positions", [[0], [0, 1], [0, 1, 2, 3], [0, 1, 1]], ids=str)
@pytest.mark.parametrize("pilot", [None, "fitted"])
def test_positions_must_be_one_for_each_image(positions, pilot):
    """Too few positions would be broadcast, and two equal ones are one image twice."""
    reverse, model = setting()
    scorer = VLBEstimator(model, reverse, fitted_pilot() if pilot else torch.ones(T))
    with pytest.raises(ValueError, match="positions"):
        scorer.score(images(3), positions)
