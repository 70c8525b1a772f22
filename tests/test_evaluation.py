"""Evaluation: the whole bound of a batch by hand and in closed form, and what every evaluation refuses."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from analytic import SHAPE, PosteriorMean, T, expected_prior, expected_terms, images, oracle, process

from ddpm_vlb import (
    VLBEstimator,
    check_data,
    collect_statistics,
    estimate_vlb,
    evaluate_vlb,
    fit_pilot,
    make_betas,
    nats_to_bits_per_dim,
    prior_kl,
    vlb_term,
)

# Every way in to the network's scores: the same data, outputs and arguments are refused by each.
ENTRANCES = {
    "evaluate": evaluate_vlb,
    "estimate": lambda model, reverse, x_0: estimate_vlb(model, reverse, [x_0]),
    "full": lambda model, reverse, x_0: estimate_vlb(model, reverse, [x_0], estimator="full"),
    "pilot": fit_pilot,
}
each_entrance = pytest.mark.parametrize("call", ENTRANCES.values(), ids=ENTRANCES)


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
    np.testing.assert_allclose(result.prior.numpy(), expected_prior(x_0), rtol=1e-10)
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
    assert max(sizes) == 6 * 16 and len(sizes) == math.ceil(5 * T / 6) and sum(sizes) == 5 * T * 16


def test_evaluate_draws_from_its_generator():
    """Without given noise, equal generators give equal bounds, others different ones."""
    reverse = process()
    model, x_0 = PosteriorMean(reverse.forward), images(2)
    first, again, other = (
        evaluate_vlb(model, reverse, x_0, generator=torch.Generator().manual_seed(s)).terms for s in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("factor", [1.0, 0.8])
def test_evaluate_averages_to_the_closed_form(factor):
    """Over 400 independent noises each term's mean is its closed form within 4.5 standard errors (2 x 12 of them)."""
    reverse = process()
    model, x_0 = PosteriorMean(reverse.forward, factor), images(2)
    generator = torch.Generator().manual_seed(3)
    terms = torch.stack([evaluate_vlb(model, reverse, x_0, generator=generator).terms for _ in range(400)])
    error = (terms.mean(0) - torch.from_numpy(expected_terms(x_0, factor=factor))).abs()
    assert (error < 4.5 * terms.std(0) / 20).all()


def test_evaluate_averages_to_the_closed_form_on_levels():
    """The decoder's mean over 2000 noises is the Gauss-Hermite integral of the bin's log mass, within 4 std errors."""
    reverse = process(17, betas=make_betas("linear", 2, 0.05, 0.5))
    x_0 = images(1, levels=17)
    model, many = PosteriorMean(reverse.forward), x_0.expand(2000, *SHAPE)
    decoder = evaluate_vlb(model, reverse, many, generator=torch.Generator().manual_seed(4)).terms[:, 0]
    exact = float(expected_terms(x_0, 17, make_betas("linear", 2, 0.05, 0.5))[0, 0])
    assert abs(float(decoder.mean()) - exact) < 4 * float(decoder.std()) / 2000**0.5


@pytest.mark.parametrize(
    "wrapping", [lambda output: SimpleNamespace(sample=output), lambda output: (output,), lambda output: (output, 3)]
)
def test_evaluate_accepts_what_diffusers_networks_return(wrapping):
    """An object with `.sample` counts as the tensor in it, and so does a tuple that begins with it."""
    reverse = process()
    model, x_0 = PosteriorMean(reverse.forward), images(2)
    noise = torch.randn(T, *x_0.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    wrapped = evaluate_vlb(lambda x, t: wrapping(model(x, t)), reverse, x_0, noise=noise)
    assert torch.equal(wrapped.terms, evaluate_vlb(model, reverse, x_0, noise=noise).terms)


@each_entrance
@pytest.mark.parametrize("output", [(), (None,), [torch.zeros(2)], {"out": 1}, None, torch.distributions.Normal(0, 1)])
def test_an_output_without_a_tensor_is_refused(call, output):
    """In one line, which says what came."""
    with pytest.raises(TypeError, match=f"^`model` must return a tensor.* returned a {type(output).__name__}: wrap"):
        call(lambda x, t: output, process(), images(2))


@each_entrance
def test_respaced_chain_tells_the_network_the_original_timesteps(call):
    """On a respaced chain the network is told the training timesteps kept, every one of them, not 0 .. K - 1."""
    kept = [1, 4, 5, 9, T - 1]
    reverse = process().respace(kept)
    model = PosteriorMean(reverse.forward)
    call(model, reverse, images(8))
    assert sorted(set(model.told)) == kept


@each_entrance
def test_evaluation_builds_no_graph(call):
    """Scoring a network with parameters keeps no gradients."""
    layer = torch.nn.Conv2d(1, 1, 1).double()
    outputs = []

    def model(x_t, timesteps):
        outputs.append(layer(x_t))
        return outputs[-1]

    call(model, process(), images(2))
    assert not any(output.requires_grad for output in outputs)
    result = evaluate_vlb(lambda x, t: layer(x), process(), images(2))
    assert not result.bits_per_dim.requires_grad


# --- conditioning


@pytest.mark.parametrize("values_per_call", [1, 7 * 16, 65536])
def test_every_pair_gets_its_image_s_label(values_per_call):
    """A network that knows the answer from the label makes every KL exactly 0; shifted labels do not."""
    reverse, x_0 = process(17), images(5, levels=17)
    labels = torch.arange(5)
    right = evaluate_vlb(
        oracle(x_0), reverse, x_0, conditioning={"class_labels": labels}, values_per_call=values_per_call
    )
    assert (right.terms[:, 1:] == 0).all() and (right.terms[:, 0] > 0).all()
    wrong = evaluate_vlb(oracle(x_0), reverse, x_0, conditioning={"class_labels": labels.roll(1)})
    assert (wrong.terms[:, 1:] > 0).all()


def test_conditioning_of_any_kind_reaches_the_network():
    """Several arguments, of any dtype and shape, arrive by name with one row for each pair."""
    seen = []

    def model(x_t, timesteps, class_labels, embedding):
        assert class_labels.dtype == torch.int32 and embedding.dtype == torch.float16
        assert embedding.shape == (len(x_t), 2, 3)
        assert (embedding[:, 0, 0].int() == 10 * class_labels).all()
        seen.extend(zip(class_labels.tolist(), timesteps.tolist()))
        return torch.zeros_like(x_t)

    labels = torch.tensor([4, 2, 9], dtype=torch.int32)
    embedding = (10 * labels).half().reshape(3, 1, 1).repeat(1, 2, 3)
    evaluate_vlb(model, process(), images(3), conditioning={"class_labels": labels, "embedding": embedding})
    assert sorted(seen) == sorted((label, t) for label in (4, 2, 9) for t in range(T))


CONDITIONED = {
    "evaluate": lambda model, reverse, x_0, told: evaluate_vlb(model, reverse, x_0, conditioning=told),
    "estimate": lambda model, reverse, x_0, told: estimate_vlb(model, reverse, [(x_0, told)]),
    "score": lambda model, reverse, x_0, told: VLBEstimator(model, reverse, torch.ones(T)).score(
        x_0, range(len(x_0)), told
    ),
    "pilot": lambda model, reverse, x_0, told: fit_pilot(model, reverse, x_0, conditioning=told),
}


@pytest.mark.parametrize("rows", [torch.arange(2), torch.arange(4), torch.tensor(1), [0, 1, 2]], ids=str)
@pytest.mark.parametrize("call", CONDITIONED.values(), ids=CONDITIONED)
def test_conditioning_with_the_wrong_rows_is_refused(call, rows):
    """A value without one row for each image is refused by its name before the network is called."""

    def model(x_t, timesteps, class_labels):
        raise AssertionError("the network was called")

    with pytest.raises(ValueError, match=r"conditioning\['class_labels'\].*3 images"):
        call(model, process(), images(3), {"class_labels": rows})


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


@each_entrance
def test_every_entrance_checks_the_data(call):
    """Every function refuses data off its grid before it calls the network."""
    reverse = process(17)

    def model(x_t, timesteps):
        raise AssertionError("the network was called")

    with pytest.raises(ValueError, match="17 levels"):
        call(model, reverse, images(2))


# --- errors


@each_entrance
def test_nan_from_the_network_names_the_timestep(call):
    """A NaN from the network raises with the chain index and the timestep that it was told (here of 3 kept steps)."""
    reverse = process().respace([2, 7, T - 1])

    def model(x_t, timesteps):
        at_seven = (timesteps == 7).reshape(-1, 1, 1, 1)
        return torch.where(at_seven, torch.nan, torch.zeros_like(x_t))

    with pytest.raises(FloatingPointError, match=r"model's output.*t=1 \(timestep 7\), image [01]\."):
        call(model, reverse, images(8)[:2])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("call", CONDITIONED.values(), ids=CONDITIONED)
def test_a_bad_output_names_the_image(call, bad):
    """NaN or infinity for one image alone is blamed on it by its position."""
    x_0 = images(5)

    def model(x_t, timesteps, class_labels):
        return torch.where((class_labels == 103).reshape(-1, 1, 1, 1), bad, torch.zeros_like(x_t))

    with pytest.raises(FloatingPointError, match="model's output.*image 3\\."):
        call(model, process(), x_0, {"class_labels": torch.arange(100, 105)})


@each_entrance
def test_an_infinite_output_does_not_hide_behind_the_clip(call):
    """The clip of x_0_hat would turn an infinite output into a finite term: it raises all the same."""
    reverse = process(17, clip_sample=True)
    with pytest.raises(FloatingPointError, match="model's output"):
        call(lambda x_t, timesteps: torch.full_like(x_t, torch.inf), reverse, images(2, levels=17))


@each_entrance
def test_infinite_term_is_not_averaged_in(call):
    """A finite output whose term overflows raises too, and does not blame the output."""
    reverse = process(variance_type="learned", dtype=torch.float32)

    def model(x_t, timesteps):
        return torch.cat([torch.zeros_like(x_t), torch.full_like(x_t, -1e4)], dim=1)

    with pytest.raises(FloatingPointError, match="term of the bound"):
        call(model, reverse, images(2, dtype=torch.float32))


@each_entrance
def test_a_batch_without_images_is_refused(call):
    """A batch of zero images raises a ValueError like other unusable data."""
    reverse = process()
    with pytest.raises(ValueError):
        call(PosteriorMean(reverse.forward), reverse, images(2)[:0])


@each_entrance
def test_wrong_channels_are_refused(call):
    """A network with C channels under a learned variance is refused by every entrance."""
    reverse = process(variance_type="learned_range")
    with pytest.raises(ValueError, match="out_channels=2"):
        call(PosteriorMean(reverse.forward), reverse, images(2))


def test_noise_of_the_wrong_shape_is_refused():
    """Given noise must hold one draw for each step and image."""
    reverse = process()
    x_0 = images(2)
    for shape in ((T - 1, *x_0.shape), (T, 1, *SHAPE), (T, *x_0.shape[:2], 2, 4)):
        with pytest.raises((ValueError, IndexError)):
            evaluate_vlb(PosteriorMean(reverse.forward), reverse, x_0, noise=torch.zeros(shape, dtype=torch.float64))


class Labels(torch.nn.Identity):
    """As a DiT's, which forgets a share of the labels in training."""

    def __init__(self):
        super().__init__()
        self.dropout_prob = 0.1


LAYERS = {
    "dropout": torch.nn.Dropout(0.1),
    "batch norm": torch.nn.BatchNorm2d(1),
    "labels": Labels(),
    "none": torch.nn.Dropout(0.0),
}
SCORERS = ENTRANCES | {
    "few steps": lambda model, reverse, x_0: collect_statistics(model, reverse, x_0, torch.arange(2)),
}


class Layered(torch.nn.Module):
    """A network with a layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x_t, timesteps):
        return self.layer(x_t)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("scorer", SCORERS)
def test_a_network_in_training_mode_is_not_scored(scorer, layer):
    """Dropout and batch norm make another network of it; one without them is the same in both modes."""
    reverse = process(betas=torch.tensor([0.1, 0.2]), dtype=torch.float32)
    model, x_0 = Layered(copy.deepcopy(LAYERS[layer])), torch.rand(2, 1, 4, 4)
    SCORERS[scorer](model.eval(), reverse, x_0)
    if layer == "none":
        SCORERS[scorer](model.train(), reverse, x_0)
        return
    with pytest.raises(ValueError, match=r"'layer' is in training mode: call `model.eval\(\)`"):
        SCORERS[scorer](model.train(), reverse, x_0)


@pytest.mark.parametrize("levels", [2, 17, 256, 65536])
def test_half_a_bin_off_is_seen_for_any_number_of_levels(levels):
    """Values on the levels pass in float32 too; a quarter of a bin off them they do not."""
    on = torch.arange(levels).double().reshape(1, 1, -1, 1) * 2 / (levels - 1) - 1
    check_data(on, levels)
    check_data(on.float(), levels)
    with pytest.raises(ValueError, match="must lie on the"):
        check_data((on + 0.5 / (levels - 1))[:, :, :-1], levels)
