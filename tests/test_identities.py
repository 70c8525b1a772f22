"""What scores are of: which differences have a meaning, and which are refused."""

import functools

import numpy as np
import pytest
import torch
from analytic import BETAS, PosteriorMean, expected_bits, images, process
from estimates import fitted_pilot

from ddpm_vlb import ReverseProcess, VLBEstimator, estimate_vlb, fit_pilot, make_betas, simple_loss
from ddpm_vlb.identities import image_digests, loss_name

FEWER = make_betas("linear", 6, 0.1, 0.7)
PILOT = fitted_pilot()


def estimate(reverse: ReverseProcess, betas=BETAS, pilot=None, also=(), **options):
    """Of 30 images."""
    model = PosteriorMean(process(betas=betas).forward, 0.8)
    return estimate_vlb(model, reverse, [images(30, levels=reverse.levels)], pilot, 8, also=also, **options)


@pytest.mark.parametrize("levels", [17, 256, 65536, None])
def test_an_image_is_known_by_its_pixels(levels):
    """In float32 as in float64, computed in either; and by its shape, which a row of the same numbers lacks."""
    k = torch.randint(0, levels or 256, (5, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    k[0] = 0
    made = k.double() * (2 / ((levels or 256) - 1)) - 1
    known = image_digests(made, levels)
    assert len(known.unique()) == 5 and torch.equal(image_digests(made.float(), levels), known)
    if levels is not None:
        assert torch.equal(image_digests(k.float() * (2 / (levels - 1)) - 1, levels), known)
        assert torch.equal(image_digests(made - 1e-7, levels), known)  # nor by the sign of a zero
    assert not (image_digests(made.reshape(5, 1, 2, 8), levels) == known).any()


def test_bounds_of_two_chains_are_subtracted():
    """Both are of the same images' likelihood: the gap is the closed form's, within 4 of its errors.

    No draws are common: neither the steps' number nor the pilot is. The images' spread has all of the noise.
    """
    long, short = estimate(process()), estimate(process(betas=FEWER), FEWER, seed=1)
    gap, x_0 = short - long, images(30)
    exact = (expected_bits(x_0, betas=FEWER, factor=0.8) - expected_bits(x_0, factor=0.8)).mean()
    assert 0 < gap.se and abs(gap.bits_per_dim - exact) < 4 * gap.se < abs(exact)


def test_two_variances_of_one_chain_are_subtracted():
    """With common draws, and so by a small error; the same chain in another precision is the same."""
    small = estimate(process(), pilot=PILOT)
    large = estimate(process(variance_type="fixed_large"), pilot=PILOT)
    assert 0 < (large - small).se < 0.5 * small.noise_se * 2**0.5
    moved = VLBEstimator(lambda *given: None, process(dtype=torch.float32), PILOT).identities(images(3), range(3))
    assert moved[0].chain == small.identity.chain


def scaled(weight, reverse, output, diffused):
    """A loss with something to fix."""
    return weight * simple_loss(reverse, output, diffused)


LOSSES = {
    "one quantity, but are of simple_loss": functools.partial(scaled, 2.0),
    r"and scaled\(3.0\)": functools.partial(scaled, 3.0),
    r"and scaled\(tensor": functools.partial(scaled, torch.ones(())),
}


@pytest.mark.parametrize("said", LOSSES)
def test_different_losses_are_not_subtracted(said):
    """Nor one with other values of what is fixed."""
    first = simple_loss if "simple_loss" in said else functools.partial(scaled, 2.0)
    mine, its = (estimate(process(), pilot=PILOT, also=[loss]).also[0] for loss in (first, LOSSES[said]))
    assert (mine - mine).bits_per_dim == 0
    with pytest.raises(ValueError, match=said):
        mine - its


@pytest.mark.parametrize(
    "other, said",
    [({"betas": FEWER}, "the same chain"), ({"prediction_type": "v_prediction"}, r"\(sample\) and .*\(v_predict")],
    ids=["chain", "prediction"],
)
def test_a_loss_on_another_scale_is_not_subtracted(other, said):
    """A mean over the t of another chain, or of what another network predicts; their bounds are compared."""
    betas = other.get("betas", BETAS)
    mine, its = (
        estimate(process(**own), own.get("betas", BETAS), also=[simple_loss], pilot=torch.ones(len(own_betas)))
        for own, own_betas in (({}, BETAS), (other, betas))
    )
    with pytest.raises(ValueError, match=said):
        mine.also[0] - its.also[0]
    assert (mine - its).se > 0


def test_likelihoods_of_other_bins_are_not_subtracted():
    """The images that two numbers of levels share have other bins in each; a density has none."""
    x_0 = images(30, levels=3)
    model = PosteriorMean(process().forward, 0.8)
    made = [estimate_vlb(model, process(levels), [x_0], PILOT, 8) for levels in (3, 5, None)]
    for other, said in ((1, "3 and 5"), (2, "3 and None")):
        with pytest.raises(ValueError, match=f"the same `levels`.*{said}"):
            made[0] - made[other]


def test_losses_have_names():
    """Those of functions, with what is fixed; the same in every process."""

    class Loss:
        def __call__(self, *given):
            """Nothing."""

    assert loss_name(Loss()) == "Loss" and loss_name(lambda: None) == "<lambda>"
    assert loss_name(functools.partial(simple_loss, snr_gamma=5)) == "simple_loss(snr_gamma=5)"
    assert loss_name(functools.partial(scaled, simple_loss)) == "scaled(simple_loss)"
    given = ["a", None, True], (torch.float32, np.float64(2)), {"b": Loss(), "a": np.int64(3)}, object(), np.float32
    said = "['a', None, True], (dtype, 2.0), {'a': 3, 'b': Loss}, object, float32"
    assert loss_name(functools.partial(scaled, *given)) == f"scaled({said})"


TABLES = {
    "array": lambda at: np.eye(60) * at,
    "in a list": lambda at: [0, torch.eye(60) * at],
    "in a dict": lambda at: {"table": (np.eye(60, dtype=np.float32) * at,)},
    "objects": lambda at: np.array([None, at], dtype=object),
}


@pytest.mark.parametrize("made", TABLES.values(), ids=TABLES)
def test_fixed_tables_are_known_by_their_values(made):
    """However long and wherever they lie: two that differ are two losses, in a short name."""
    first, again, other = (loss_name(functools.partial(scaled, made(at))) for at in (2, 2, 3))
    assert first == again != other and len(first) < 60


def test_a_pilot_of_its_own_is_no_hindrance_to_another_chain():
    """The full loop of one chain, and draws of another."""
    own = fit_pilot(PosteriorMean(process(betas=FEWER).forward, 0.8), process(betas=FEWER), images(40, seed=1))
    full = estimate(process(), pilot=None, estimator="full")
    assert (estimate(process(betas=FEWER), FEWER, own) - full).se > 0
    with pytest.raises(ValueError, match="same draws"):
        full - estimate(process(), pilot=PILOT)
