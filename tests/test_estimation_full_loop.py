"""The full loop as an estimator: the bound itself, as a hand loop, an independent code and `evaluate_vlb` have it."""

import math

import golden_cases
import numpy as np
import pytest
import reference
import torch
from analytic import BETAS, T, images, process
from estimates import UNIT, setting
from torch import Tensor

from ddpm_vlb import (
    ForwardProcess,
    ReverseProcess,
    VLBEstimator,
    VLBScores,
    estimate_vlb,
    evaluate_vlb,
    prior_kl,
    vlb_term,
)
from ddpm_vlb.evaluation import image_generator


class Listener:
    """A network that remembers its inputs by (label, timestep)."""

    def __init__(self, model):
        self.model, self.heard = model, {}

    def __call__(self, x_t: Tensor, timesteps: Tensor, class_labels: Tensor) -> Tensor:
        for x, timestep, label in zip(x_t, timesteps.tolist(), class_labels.tolist()):
            assert (label, timestep) not in self.heard, "a pair was scored twice"
            self.heard[label, timestep] = x
        return self.model(x_t, timesteps)

    def noise(self, q: ForwardProcess, x_0: Tensor) -> Tensor:
        """The noise (T, B, C, *) that made x_t, which was drawn in float32."""
        heard = [[self.heard[label, timestep] for label in range(len(x_0))] for timestep in q.timesteps.tolist()]
        shape = -1, *[1] * x_0.ndim
        signal, sigma = q.sqrt_alphas_cumprod.reshape(shape), q.sqrt_one_minus_alphas_cumprod.reshape(shape)
        return ((torch.stack([torch.stack(row) for row in heard]) - signal * x_0) / sigma).float().double()


def full_loop(model, reverse: ReverseProcess, x_0: Tensor) -> tuple[VLBScores, Tensor]:
    """Scores of every step, and the noise that they were made with."""
    listener = Listener(model)
    scorer = VLBEstimator(listener, reverse, estimator="full", values_per_call=7 * x_0[0].numel())
    scores = scorer.score(x_0, range(len(x_0)), {"class_labels": torch.arange(len(x_0))})[0]
    return scores, listener.noise(reverse.forward, x_0)


@pytest.mark.parametrize("levels", [None, 17])
@pytest.mark.parametrize("clip", [False, True])
def test_full_loop_equals_a_hand_loop(levels, clip):
    """The prior plus one vlb_term for each step, with noise from the image's own generator, step after step."""
    reverse, model = setting(levels, clip_sample=clip)
    x_0, seed = images(3, levels=levels), 4
    total = prior_kl(reverse, x_0).clone()
    for position in range(3):
        generator = image_generator(seed, position)
        for step in range(T):
            noise = torch.randn(x_0.shape[1:], generator=generator)[None].double()
            diffused = reverse.forward.diffuse(x_0[position : position + 1], torch.tensor([step]), noise)
            total[position] += vlb_term(reverse, model(diffused.x_t, diffused.t), diffused)[0]
    result = estimate_vlb(model, reverse, x_0.split(2), seed=seed, estimator="full")
    torch.testing.assert_close(result.per_image, total * UNIT, rtol=1e-12, atol=0)


def toy(x_t: np.ndarray, timesteps: np.ndarray, learns_variance: bool) -> np.ndarray:
    """A smooth function of x_t and the timestep."""
    u = timesteps.reshape(-1, *[1] * (x_t.ndim - 1)) / T
    mean = 1.2 * np.tanh(1.3 * x_t + 0.7 * u)
    return np.concatenate([mean, np.tanh(0.8 * x_t - 1.1 * u)], axis=1) if learns_variance else mean


@pytest.mark.parametrize("kept", [None, [1, 4, 5, 9, 11]], ids=["whole", "respaced"])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("levels", [256, 17, None])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned", "learned_range"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_full_loop_is_the_independent_bound(prediction, variance, levels, clip, kept):
    """For the noise it drew the full loop gives the bound of reference.py, which shares no code with it, to 1e-9."""
    learns = variance in ("learned", "learned_range")
    reverse = process(levels, prediction_type=prediction, variance_type=variance, clip_sample=clip)
    reverse = reverse if kept is None else reverse.respace(kept)
    x_0 = images(2, (2, 2, 2), levels)
    scores, noise = full_loop(
        lambda x_t, timesteps: torch.from_numpy(toy(x_t.numpy(), timesteps.numpy(), learns)), reverse, x_0
    )
    betas = BETAS.numpy() if kept is None else reference.respaced_betas(BETAS.numpy(), kept)
    prior, terms = reference.bound(
        reference.tables(betas),
        prediction,
        variance,
        lambda x_t, timesteps: toy(x_t, timesteps, learns),
        x_0.numpy(),
        noise.numpy(),
        kept,
        1.0 if clip else None,
        levels,
    )
    np.testing.assert_allclose(scores.prior, prior, rtol=1e-9)
    np.testing.assert_allclose(scores.kl, terms[:, 1:].sum(1), rtol=1e-9)
    np.testing.assert_allclose(scores.decoder, terms[:, 0], rtol=1e-9)
    estimate = scores.estimate()
    np.testing.assert_allclose(estimate.term_mean, terms.mean(0) / 8 / np.log(2), rtol=1e-9)
    np.testing.assert_allclose(estimate.per_image, (prior + terms.sum(1)) / 8 / np.log(2), rtol=1e-9)


@pytest.mark.parametrize("case", [case for case in golden_cases.LOOPS if case.startswith("linear50.")])
def test_full_loop_is_evaluate_vlb(case):
    """On the networks and chains of the golden numbers, which hold evaluate_vlb, both give the same for one noise."""
    schedule, model, mean, variance, clip = case.split(".")
    reverse, x_0 = golden_cases.reverse(schedule, mean, variance, clip), golden_cases.inputs("x0")
    network = golden_cases.closed_form(schedule, model, variance)
    scores, noise = full_loop(network, reverse, x_0)
    expected = evaluate_vlb(network, reverse, x_0, noise=noise)
    torch.testing.assert_close(scores.prior, expected.prior, rtol=1e-12, atol=0)
    torch.testing.assert_close(scores.decoder, expected.terms[:, 0], rtol=1e-10, atol=0)
    torch.testing.assert_close(scores.kl, expected.terms[:, 1:].sum(1), rtol=1e-10, atol=0)
    torch.testing.assert_close(scores.estimate().per_image, expected.bits_per_dim, rtol=1e-10, atol=0)


def test_full_loop_takes_its_noise_from_64_images():
    """Of 70 images the first 64 are drawn twice, in another sweep; the value of none is changed by that."""
    reverse, model = setting()
    x_0 = images(70)
    result = estimate_vlb(model, reverse, x_0.split(33), estimator="full")
    assert len(model.told) == (70 + 64) * T
    scorer = VLBEstimator(model, reverse, estimator="full")
    first, second = (scorer.score(x_0, range(70), sweep=sweep)[0] for sweep in (0, 1))
    torch.testing.assert_close(result.per_image, first.estimate().per_image, rtol=1e-12, atol=0)
    gap = (first.kl + first.decoder - second.kl - second.decoder)[:64] * UNIT
    assert result.noise_se == pytest.approx(math.sqrt(float(gap.square().mean()) / 2 / 70), rel=1e-12)
