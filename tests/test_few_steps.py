"""Optimal variances and stored paths through the reverse process, the scheduler, the pipeline and saved files."""

import dataclasses
import json
import logging

import analytic
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline
from networks import one_block_unet
from safetensors.torch import load_file, save_file

from ddpm_vlb import (
    DDPMVLBPipeline,
    DDPMVLBScheduler,
    ForwardProcess,
    ReverseProcess,
    SquaredErrors,
    StoredPath,
    hybrid_loss,
    make_betas,
    spaced_timesteps,
    vlb_loss,
    vlb_term,
)
from ddpm_vlb.respacing import ALL_SPACINGS, interpolate_log

T = 20
BETAS = make_betas("linear", T, 0.01, 0.3)
SHAPE = (2, 1, 4, 4)
VARIANCE_TYPES = ("fixed_small", "fixed_large", "learned", "learned_range")
PATHS = [StoredPath((19, 8, 2), "network", 0.7), StoredPath((19, 12, 6, 1, 0), "per_pixel", -0.2)]


def randn(seed: int, *shape, dtype=torch.float64) -> torch.Tensor:
    """Seeded normal numbers."""
    return torch.randn(*(shape or SHAPE), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def errors(per_pixel: bool = True) -> SquaredErrors:
    """Errors at some timesteps of the chain."""
    steps = torch.tensor([0, 3, 10, 19])
    mean = torch.tensor([0.001, 0.01, 0.1, 0.8], dtype=torch.float64)
    pixels = mean[:, None, None, None] * (0.5 + torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(0)))
    return SquaredErrors(steps, mean, pixels.float() if per_pixel else None)


def scheduler(**options) -> DDPMVLBScheduler:
    """A scheduler of the test's chain."""
    defaults = {"num_train_timesteps": T, "beta_start": 0.01, "beta_end": 0.3, "variance_type": "learned_range"}
    return DDPMVLBScheduler(**(defaults | options))


def stored(**options) -> DDPMVLBScheduler:
    """One with paths and errors."""
    own = scheduler(**options)
    own.store_few_steps(PATHS, errors())
    return own


# ---- optimal variances in p


@pytest.mark.parametrize("per_pixel", [False, True])
@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
@pytest.mark.parametrize("single", [False, True], ids=["batch of t", "one t"])
def test_the_optimal_variance_takes_the_place_of_the_type_s(variance_type, per_pixel, single):
    """sigma^2 = betatilde + c0^2 m at every step for every type, whose variance output is left aside; means stay."""
    q = ForwardProcess.from_betas(BETAS).respace([0, 4, 9, 19])
    m = errors().at(q.timesteps, "per_pixel" if per_pixel else "analytic")
    plain = ReverseProcess(q, variance_type=variance_type)
    p = ReverseProcess(q, variance_type=variance_type, x_0_mse=m)
    channels = 2 if "learned" in variance_type else 1
    for t in range(4):
        x_t, output = randn(t), randn(5, 2, channels, 4, 4)
        index = t if single else torch.full((2,), t)
        expected = q.posterior_variance[t] + q.posterior_mean_coef_x_0[t] ** 2 * m[t]
        got, own = p(output, x_t, index), plain(output, x_t, index)
        torch.testing.assert_close(got.p.log_variance.exp(), expected.expand(SHAPE), rtol=1e-12, atol=0)
        assert torch.equal(got.p.mean, own.p.mean)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 2e-5)])
@pytest.mark.parametrize("variance", ["analytic", "per_pixel"])
def test_its_terms_are_kl_and_decoder(variance, dtype, tolerance):
    """vlb_term is KL(q || p) and -log p of the distributions themselves, with variances of each pixel too."""
    q = ForwardProcess.from_betas(BETAS)
    p = ReverseProcess(q, x_0_mse=errors().at(q.timesteps, variance), levels=17).to(dtype=dtype)
    x_0 = analytic.images(T, (1, 4, 4), 17, dtype=dtype)
    diffused = p.forward.diffuse(x_0, torch.arange(T), randn(1, T, 1, 4, 4, dtype=dtype))
    output = randn(2, T, 1, 4, 4, dtype=dtype)
    prediction = p(output, diffused.x_t, diffused.t).p
    kl = p.forward.q_posterior(x_0, diffused.x_t, diffused.t).kl(prediction).flatten(1).sum(1)
    decoder = -prediction.discretized_log_prob(x_0, 17).flatten(1).sum(1)
    expected = torch.where(diffused.t == 0, decoder, kl)
    torch.testing.assert_close(vlb_term(p, output, diffused), expected, rtol=tolerance, atol=tolerance)


def test_respacing_keeps_the_errors_of_its_steps():
    """m depends on t alone: the variances of a respaced chain are made from the same m and its own posterior."""
    q = ForwardProcess.from_betas(BETAS)
    m = errors().at(q.timesteps, "per_pixel")
    indices = [2, 7, 19]
    short = ReverseProcess(q, x_0_mse=m).respace(indices)
    again = ReverseProcess(q.respace(indices), x_0_mse=m[indices])
    for t in range(3):
        x_t, output = randn(t), randn(t + 9)
        torch.testing.assert_close(short(output, x_t, t).p.log_variance, again(output, x_t, t).p.log_variance)


@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
@pytest.mark.parametrize("first, shift", [(0, 0.0), (0, 0.3), (3, -1.2)])
def test_a_shifted_decoder_is_the_training_chain_s(variance_type, first, shift):
    """With `decoder_shift` the first step has the log variance of the long chain there plus it; others their own."""
    q = ForwardProcess.from_betas(BETAS)
    long = ReverseProcess(q, variance_type=variance_type)
    indices = [first, 9, 19]
    own, short = long.respace(indices), long.respace(indices, shift)
    x_t, output = randn(0), randn(1, 2, 2 if "learned" in variance_type else 1, 4, 4)
    expected = long(output, x_t, first).p.log_variance + shift
    torch.testing.assert_close(short(output, x_t, 0).p.log_variance, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(short(output, x_t, torch.zeros(2).long()).p.log_variance, expected)
    for t in (1, 2):
        assert torch.equal(short(output, x_t, t).p.log_variance, own(output, x_t, t).p.log_variance)
    assert torch.equal(
        short.to(dtype=torch.float64)(output, x_t, 0).p.log_variance, short(output, x_t, 0).p.log_variance
    )


@pytest.mark.parametrize("levels", [None, 17])
def test_gradients_are_finite(levels):
    """Training through a process with variances of each pixel, the decoder's step among the batch."""
    q = ForwardProcess.from_betas(BETAS)
    m = errors().at(q.timesteps, "per_pixel")
    p = ReverseProcess(q, x_0_mse=m, levels=levels, clip_sample=False).respace(range(T), 0.1)
    x_0 = analytic.images(T, (1, 4, 4), 17)
    diffused = p.forward.diffuse(x_0, torch.arange(T), randn(1, T, 1, 4, 4))
    output = randn(2, T, 1, 4, 4).requires_grad_()
    vlb_term(p, output, diffused).sum().backward()
    assert bool(output.grad.isfinite().all()) and bool((output.grad.flatten(1).abs().sum(1) > 0).all())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"x_0_mse": torch.ones(T - 1)}, "a row for each of the 20 steps"),
        ({"x_0_mse": torch.ones(T).long()}, "floating point"),
        ({"x_0_mse": 0.5}, "`x_0_mse` must be a floating point tensor"),
        ({"x_0_mse": torch.ones(T).index_fill(0, torch.tensor(3), 0.0)}, "positive and finite, but is not at step 3"),
        ({"x_0_mse": torch.ones(T, 2).index_fill(0, torch.tensor(4), torch.nan)}, "is not at step 4"),
        ({"decoder_log_variance": float("nan")}, "`decoder_log_variance` must be finite"),
        ({"eta": 1.5}, r"`eta` must lie in \[0, 1\]"),
        ({"eta": -0.1}, r"`eta` must lie in \[0, 1\]"),
        ({"eta": float("nan")}, r"`eta` must lie in \[0, 1\]"),
    ],
)
def test_impossible_variances_are_refused(options, message):
    """Wrong shapes, values that are no squares, an eta outside its range."""
    with pytest.raises(ValueError, match=message):
        ReverseProcess(ForwardProcess.from_betas(BETAS), **options)


def test_variances_of_another_shape_are_refused():
    """Those of each pixel fit one size of data."""
    q = ForwardProcess.from_betas(BETAS)
    p = ReverseProcess(q, x_0_mse=errors().at(q.timesteps, "per_pixel"))
    with pytest.raises(ValueError, match=r"for data of shape \(1, 4, 4\), but got \(1, 5, 5\)"):
        p(randn(0, 2, 1, 5, 5), randn(1, 2, 1, 5, 5), 3)


# ---- DDIM


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("spacing, steps", [("leading", 5), ("trailing", 4)])
def test_ddim_is_stock_s(spacing, steps, eta, prediction_type):
    """Every step with eta equals DDIMScheduler's on the same chain, network and noise, to its float32 tables."""
    options = {"num_train_timesteps": T, "beta_start": 0.01, "beta_end": 0.3, "prediction_type": prediction_type}
    options |= {"clip_sample": True, "timestep_spacing": spacing}
    stock, ours = DDIMScheduler(**options), DDPMVLBScheduler(**options)
    stock.set_timesteps(steps)
    ours.set_timesteps(steps, eta=eta)
    assert ours.timesteps.tolist() == stock.timesteps.tolist()
    x = randn(0, dtype=torch.float32)
    for i, t in enumerate(stock.timesteps.tolist()):
        output = randn(i + 1, dtype=torch.float32)
        generators = [torch.Generator().manual_seed(9) for _ in range(2)]
        clipped = {"use_clipped_model_output": True}  # theirs leaves epsilon as it was where x_0 was clipped
        expected = stock.step(output, t, x, eta=eta, generator=generators[0], **clipped)
        if i == steps - 1 and eta > 0:  # where DDIM would draw noise that the last step must not have
            expected = stock.step(output, t, x, eta=0, **clipped)
        got = ours.step(output, t, x, generator=generators[1])
        torch.testing.assert_close(got.pred_original_sample, expected.pred_original_sample, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got.prev_sample, expected.prev_sample, rtol=1e-4, atol=1e-5)
        x = got.prev_sample


@pytest.mark.parametrize("variance", ["analytic", "per_pixel"])
@pytest.mark.parametrize("eta", [0.2, 0.9])
def test_ddim_takes_the_optimal_variance(eta, variance):
    """sigma^2 = eta^2 betatilde + (its coefficient of x_0_hat)^2 m, and no noise at all for eta = 0."""
    q = ForwardProcess.from_betas(BETAS).respace([0, 6, 19])
    m = errors().at(q.timesteps, variance)
    p = ReverseProcess(q, x_0_mse=m, eta=eta)
    abar = q.alphas_cumprod
    for t in (1, 2):
        small = eta**2 * q.posterior_variance[t]
        c_t = ((1 - abar[t - 1] - small) / (1 - abar[t])).sqrt()
        expected = small + (abar[t - 1].sqrt() - abar[t].sqrt() * c_t) ** 2 * m[t]
        got = p(randn(0), randn(1), t).p.log_variance.exp()
        torch.testing.assert_close(got, expected.expand(SHAPE), rtol=1e-9, atol=0)
    still = ReverseProcess(q, x_0_mse=m, eta=0.0)(randn(0), randn(1), 2).p
    assert torch.equal(still.sample(randn(3)), still.mean)


def test_the_bound_of_ddim():
    """The term is the KL from DDIM's own posterior, and eta = 0, which has none, is refused."""
    q = ForwardProcess.from_betas(BETAS)
    p = ReverseProcess(q, eta=0.5, x_0_mse=errors().at(q.timesteps, "analytic"), levels=None)
    x_0, noise = randn(0, 3, 1, 4, 4), randn(1, 3, 1, 4, 4)
    diffused = q.diffuse(x_0, torch.tensor([4, 9, 19]), noise)
    output = randn(2, 3, 1, 4, 4)
    prediction = p(output, diffused.x_t, diffused.t).p
    c = p.coefficients(diffused.t, x_0)
    mean = c.x_0_to_mean * x_0 + c.x_t_to_mean * diffused.x_t
    log_ratio = prediction.log_variance - c.posterior_log_variance
    gap = (mean - prediction.mean).square() / c.posterior_log_variance.exp()
    expected = 0.5 * (log_ratio - 1 + (1 + gap) * torch.exp(-log_ratio))
    unclipped = ReverseProcess(q, eta=0.5, x_0_mse=p.x_0_mse, levels=None, clip_sample=True)
    torch.testing.assert_close(vlb_term(unclipped, output, diffused), expected.flatten(1).sum(1), rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="`eta=0` draws no noise"):
        vlb_term(ReverseProcess(q, eta=0.0, levels=None), output, diffused)


@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
def test_eta_1_changes_nothing(variance_type):
    """The default is DDPM, to the bit."""
    own, again = scheduler(variance_type=variance_type), scheduler(variance_type=variance_type)
    own.set_timesteps(5)
    again.set_timesteps(5, eta=1.0)
    output = randn(1, 2, 2 if "learned" in variance_type else 1, 4, 4, dtype=torch.float32)
    for t in own.timesteps:
        one, other = (
            each.step(output, t, randn(0, dtype=torch.float32), generator=torch.Generator().manual_seed(3)).prev_sample
            for each in (own, again)
        )
        assert torch.equal(one, other)


# ---- spacings and stored paths in the scheduler


@pytest.mark.parametrize("total", [1, 2, 5, 50, 1000])
def test_quadratic_spacing(total):
    """Strictly descending over the whole chain for every K, both ends, and squares where they are apart."""
    for steps in {1, 2, min(7, total), total // 2 or 1, total} - {0}:
        if steps > total:
            continue
        got = spaced_timesteps("quadratic", steps, total)
        assert len(got) == steps and got[0] == total - 1 and sorted(set(got), reverse=True) == got
        assert steps == 1 or got[-1] == 0
    assert spaced_timesteps("quadratic", 5, 1000) == [999, 562, 250, 62, 0]


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing", "quadratic"])
def test_any_spacing_on_request(spacing):
    """`timestep_spacing` is that of the steps, also where a path is stored; without it the stored one is taken."""
    own = stored()
    own.set_timesteps(5, timestep_spacing=spacing)
    assert own.timesteps.tolist() == spaced_timesteps(spacing, 5, T)
    for options in ({}, {"timestep_spacing": "optimal"}):
        own.set_timesteps(5, **options)
        assert own.timesteps.tolist() == [19, 12, 6, 1, 0]
    own.set_timesteps(4)
    assert own.timesteps.tolist() == spaced_timesteps("leading", 4, T)
    own.set_timesteps(timesteps=[17, 3])
    assert own.timesteps.tolist() == [17, 3]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.variance)
def test_step_and_reverse_process_walk_the_stored_chain(path):
    """Both give the p of the path: its variance, and the decoder that it carries."""
    own, q = stored(), ForwardProcess.from_betas(BETAS)
    indices = sorted(path.timesteps)
    long = ReverseProcess(q, variance_type="learned_range")
    if path.variance == "network":
        expected = long.respace(indices, path.decoder_shift)
    else:
        m = errors().at(indices, path.variance)
        expected = ReverseProcess(q.respace(indices), "epsilon", "learned_range", x_0_mse=m)
        expected = expected.respace(range(len(indices)), path.decoder_shift)
    process = own.reverse_process(dtype=torch.float64, num_inference_steps=len(indices))
    own.set_timesteps(len(indices))
    for k, t in enumerate(indices):
        x_t, output = randn(k), randn(k + 7, 2, 2, 4, 4)
        right = expected(output, x_t, k).p
        got = process(output, x_t, k).p
        torch.testing.assert_close(got.mean, right.mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(got.log_variance, right.log_variance, rtol=1e-12, atol=1e-12)
        drawn = own.step(output, t, x_t, generator=torch.Generator().manual_seed(1)).prev_sample
        noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        torch.testing.assert_close(drawn, right.mean if k == 0 else right.sample(noise), rtol=1e-9, atol=1e-9)


def test_the_same_steps_by_hand_are_a_chain_of_their_own():
    """A hand-made path keeps the respaced chain's decoder, as the golden numbers have it, even where one is stored."""
    own = stored()
    by_hand = own.reverse_process(dtype=torch.float64, timesteps=PATHS[0].timesteps)
    plain = scheduler().reverse_process(dtype=torch.float64, timesteps=PATHS[0].timesteps)
    kept = own.reverse_process(dtype=torch.float64, num_inference_steps=3)
    output, x_t = randn(1, 2, 2, 4, 4), randn(0)
    assert torch.equal(by_hand(output, x_t, 0).p.log_variance, plain(output, x_t, 0).p.log_variance)
    assert not torch.equal(kept(output, x_t, 0).p.log_variance, plain(output, x_t, 0).p.log_variance)


@pytest.mark.parametrize("variance", ["analytic", "per_pixel"])
def test_a_reverse_variance_is_that_of_every_chain(variance):
    """The whole chain before and after `set_timesteps`, and even spacings; not stored paths of another variance."""
    own = scheduler()
    own.store_few_steps(PATHS, errors(), variance)
    output, x_t = randn(1, 2, 2, 4, 4), randn(0)
    q = ForwardProcess.from_betas(BETAS)
    m = errors().at(q.timesteps, variance)

    def expected(q, m, k):
        return (q.posterior_variance[k] + q.posterior_mean_coef_x_0[k] ** 2 * m[k]).log().expand(SHAPE)

    whole = own.reverse_process(dtype=torch.float64)
    torch.testing.assert_close(whole(output, x_t, 7).p.log_variance, expected(q, m, 7))
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for _ in range(2):  # as it was made, and after the timesteps are set
        step = own.step(output, 7, x_t, generator=torch.Generator().manual_seed(1)).prev_sample
        right = whole(output, x_t, 7).p.mean + (0.5 * expected(q, m, 7)).exp() * noise
        torch.testing.assert_close(step, right, rtol=1e-9, atol=1e-9)
        own.set_timesteps(T)
    even = own.reverse_process(dtype=torch.float64, num_inference_steps=3, timestep_spacing="linspace")
    short = q.respace(even.forward.timesteps)
    rows = m[even.forward.timesteps]
    torch.testing.assert_close(even(output, x_t, 1).p.log_variance, expected(short, rows, 1))
    assert own.reverse_process(num_inference_steps=3).x_0_mse is None


def test_batched_timesteps_of_a_stored_chain():
    """A timestep for each sample gives what one at a time does, with variances of each pixel."""
    own = stored()
    own.set_timesteps(5)
    t, output = torch.tensor([12, 0]), randn(1, 2, 2, 4, 4)
    got = own.step(output, t, randn(0), generator=torch.Generator().manual_seed(2)).prev_sample
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    process = own.reverse_process(dtype=torch.float64, num_inference_steps=5)
    for i, k in enumerate((3, 0)):
        p = process(output[i : i + 1], randn(0)[i : i + 1], k).p
        right = p.mean if k == 0 else p.sample(noise[i : i + 1])
        torch.testing.assert_close(got[i : i + 1], right, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"num_inference_steps": 4, "timestep_spacing": "optimal"},
            r"No path of 4 steps is stored; there are \[3, 5\]",
        ),
        ({"num_inference_steps": 4, "timestep_spacing": "uniform"}, "must be one of"),
        ({"num_inference_steps": 0}, "`num_inference_steps` must be an integer in 1 .. 20"),
        ({"num_inference_steps": 21}, "`num_inference_steps` must be an integer in 1 .. 20"),
        ({"num_inference_steps": True}, "`num_inference_steps` must be an integer"),
        ({"timesteps": [5, 5]}, "descending order"),
        ({"timesteps": [3, 9]}, "descending order"),
        ({"timesteps": [20, 3]}, "must start before 20"),
        ({"timesteps": [3, -1]}, "not go below 0"),
        ({"timesteps": []}, "at least one step"),
        ({"timesteps": [5.5, 2]}, "must be integers"),
        ({"timesteps": [5, 2], "timestep_spacing": "leading"}, "`timestep_spacing` is for `num_inference_steps`"),
        ({"timesteps": [5, 2], "num_inference_steps": 2}, "exactly one of"),
        ({"num_inference_steps": 5, "eta": 2.0}, r"`eta` must lie in \[0, 1\]"),
    ],
)
def test_impossible_timesteps_are_refused(options, message):
    """With what was expected and what came; the chain stays as it was."""
    own = stored()
    own.set_timesteps(5)
    with pytest.raises(ValueError, match=message):
        own.set_timesteps(**options)
    assert own.timesteps.tolist() == [19, 12, 6, 1, 0] and own.num_inference_steps == 5


# ---- what is stored


def entry(**changes) -> list[dict]:
    """A configuration's paths, with something wrong in it."""
    return [{"timesteps": [19, 8, 2], "variance": "network", "decoder_shift": 0.0} | changes]


def mse(**changes) -> dict:
    """A configuration's errors, with something wrong in them."""
    return {"timesteps": [0, 19], "mean": [0.1, 0.5], "per_pixel_file": None} | changes


@pytest.mark.parametrize(
    "options, message",
    [
        ({"optimal_paths": entry(timesteps=[18, 8, 2])}, "starts at timestep 18, but this chain's last is 19"),
        ({"optimal_paths": entry(timesteps=[19, 8, 8])}, "strictly descending"),
        ({"optimal_paths": entry(timesteps=[19, 8, -2])}, "must not go below 0"),
        ({"optimal_paths": entry(timesteps=[19.0, 8, 2])}, "strictly descending integers"),
        ({"optimal_paths": entry(timesteps=[])}, "strictly descending integers"),
        ({"optimal_paths": entry(timesteps="19")}, "strictly descending integers"),
        ({"optimal_paths": entry(variance="best")}, "`variance` must be one of"),
        ({"optimal_paths": entry(decoder_shift=float("inf"))}, "`decoder_shift` must be a number"),
        ({"optimal_paths": entry(decoder_shift=None)}, "`decoder_shift` must be a number"),
        ({"optimal_paths": [{"timesteps": [19]}]}, "must have `timesteps`, `variance` and `decoder_shift`"),
        ({"optimal_paths": [7]}, "must have `timesteps`, `variance` and `decoder_shift`"),
        ({"optimal_paths": {"3": [19, 8, 2]}}, "must be a list of paths"),
        ({"optimal_paths": entry() * 2}, "two paths of 3 steps"),
        ({"x_0_mse": mse(timesteps=[0, 20])}, "from timestep 0 to 20, but this chain from 0 to 19"),
        ({"x_0_mse": mse(timesteps=[0, 18])}, "from timestep 0 to 18, but this chain from 0 to 19"),
        ({"x_0_mse": mse(timesteps=[1, 19])}, "from timestep 1 to 19, but this chain from 0 to 19"),
        ({"x_0_mse": mse(mean=[10**400, 1])}, "`mean` one of numbers"),
        ({"x_0_mse": mse(mean=[0.1])}, "a row for each of its 2 timesteps"),
        ({"x_0_mse": mse(mean=[0.1, -0.5])}, "positive and finite"),
        ({"x_0_mse": mse(mean=[0.1, float("nan")])}, "`mean` one of numbers"),
        ({"x_0_mse": mse(timesteps=[19, 0])}, "strictly ascending"),
        ({"x_0_mse": mse(timesteps=[])}, "strictly ascending"),
        ({"x_0_mse": mse(timesteps=[0, 10**30])}, "must be a list of integers"),
        ({"x_0_mse": mse(mean=["a", "b"])}, "must be a list of integers and `mean` one of numbers"),
        ({"x_0_mse": mse(per_pixel_file="../../secret.safetensors")}, "must be named x_0_mse"),
        ({"x_0_mse": mse(per_pixel_file=3)}, "must be named x_0_mse"),
        ({"x_0_mse": {"mean": []}}, "must have `timesteps`, `mean` and `per_pixel_file`"),
        ({"x_0_mse": 0.5}, "must have `timesteps`, `mean` and `per_pixel_file`"),
        ({"reverse_variance": "best"}, "`reverse_variance` must be one of"),
        ({"timestep_spacing": "quadratic"}, "`timestep_spacing` must be one of"),
        ({"timestep_spacing": "optimal"}, "`timestep_spacing` must be one of"),
    ],
)
def test_a_bad_configuration_is_refused(options, message):
    """Whoever wrote it: clear errors for paths and errors of another chain, or none at all."""
    with pytest.raises(ValueError, match=message):
        scheduler(**options)


def test_what_needs_errors_asks_for_them():
    """Optimal variances without the errors that they come from: when stored, and when used."""
    own = scheduler()
    with pytest.raises(ValueError, match="'per_pixel' needs `x_0_mse`"):
        own.store_few_steps(PATHS)
    with pytest.raises(ValueError, match="needs the errors of each pixel"):
        own.store_few_steps(PATHS, errors(per_pixel=False))
    with pytest.raises(ValueError, match="starts at timestep 15"):
        own.store_few_steps([StoredPath((15, 3))])
    assert own.optimal_paths == {} and "optimal_paths" not in own.config  # nothing is half stored
    with pytest.raises(ValueError, match="'analytic' needs `x_0_mse`"):
        scheduler(reverse_variance="analytic").set_timesteps(5)
    from_config = DDPMVLBScheduler.from_config(stored().config)
    with pytest.raises(ValueError, match="from_pretrained"):
        from_config.set_timesteps(5)
    from_config.set_timesteps(3, timestep_spacing="linspace")  # the network's variance needs nothing


def test_storing_again_replaces():
    """What was stored before is gone, and nothing stored is a configuration as it was without."""
    own = stored()
    own.store_few_steps(PATHS[:1])
    assert list(own.optimal_paths) == [3] and own.errors is None
    own.store_few_steps()
    assert dict(own.config) == dict(scheduler().config)


@pytest.mark.parametrize("steps", [[0], [3, 11], [0, 4, 19]])
def test_interpolation(steps):
    """Exact at the knots, log-linear between them, constant beyond."""
    values = torch.rand(len(steps), 2, dtype=torch.float64) + 0.1
    knots = torch.tensor(steps)
    torch.testing.assert_close(interpolate_log(knots, values, knots), values)
    every = interpolate_log(knots, values, torch.arange(T))
    torch.testing.assert_close(every[0], values[0])
    torch.testing.assert_close(every[-1], values[-1])
    for (low, high), (a, b) in zip(zip(steps, steps[1:]), zip(values, values[1:])):
        middle = (low + high) // 2
        expected = a.log() + (middle - low) / (high - low) * (b.log() - a.log())
        torch.testing.assert_close(every[middle], expected.exp())


# ---- saved files


def save(folder, **options):
    """A saved pipeline with paths and errors."""
    own = stored(**options)
    DDPMVLBPipeline(one_block_unet(), own).save_pretrained(folder)
    return own


def test_a_saved_pipeline_gives_back_all(tmp_path):
    """Paths, errors and variances of each pixel, bit for bit; and the same images."""
    own = save(tmp_path)
    pipeline = DDPMVLBPipeline.from_pretrained(tmp_path)
    assert pipeline.scheduler.optimal_paths == own.optimal_paths == {len(p.timesteps): p for p in PATHS}
    assert torch.equal(pipeline.scheduler.errors.per_pixel, own.errors.per_pixel)
    assert torch.equal(pipeline.scheduler.errors.mean, own.errors.mean)
    one, other = (
        each(2, num_inference_steps=5, generator=torch.Generator().manual_seed(0), output_type="pt").images
        for each in (pipeline, DDPMVLBPipeline(one_block_unet(), own))
    )
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    again = tmp_path / "again"
    pipeline.save_pretrained(again)
    assert (again / "scheduler" / own.errors_file).read_bytes() == (
        tmp_path / "scheduler" / own.errors_file
    ).read_bytes()
    alone = DDPMVLBScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert torch.equal(alone.errors.per_pixel, own.errors.per_pixel)


@pytest.mark.parametrize("reverse_variance", ["network", "per_pixel"])
def test_stock_loads_and_samples_it(tmp_path, reverse_variance):
    """Plain diffusers samples the same files as if nothing had been stored: same steps, same images."""
    own = scheduler()
    DDPMVLBPipeline(one_block_unet(), own).save_pretrained(tmp_path / "plain")
    own.store_few_steps(PATHS, errors(), reverse_variance)
    DDPMVLBPipeline(one_block_unet(), own).save_pretrained(tmp_path / "few")
    images = []
    for name in ("plain", "few"):
        stock = DiffusionPipeline.from_pretrained(tmp_path / name)
        assert type(stock) is DDPMPipeline and type(stock.scheduler) is DDPMScheduler
        generator = torch.Generator().manual_seed(0)
        images.append(torch.from_numpy(stock(2, generator, num_inference_steps=5, output_type="np").images))
    assert torch.equal(*images)


@pytest.mark.parametrize("eta", [None, 0.0, 0.5])
@pytest.mark.parametrize("spacing", [None, *ALL_SPACINGS])
def test_the_pipeline_takes_spacing_and_eta(tmp_path, spacing, eta):
    """Both reach the scheduler; images are those of its own loop."""
    own = stored()
    pipeline = DDPMVLBPipeline(one_block_unet(), own)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    got = pipeline(
        2, generator=generator, num_inference_steps=5, timestep_spacing=spacing, eta=eta, output_type="latent"
    ).images
    walked = stored()
    walked.set_timesteps(5, timestep_spacing=spacing, eta=1.0 if eta is None else eta)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 1, 4, 4, generator=generator)
    for t in walked.timesteps:
        with torch.no_grad():
            output = pipeline.unet(x, t.expand(2)).sample
        x = walked.step(output, t, x, generator=generator).prev_sample
    torch.testing.assert_close(got, x, rtol=0, atol=1e-6)


def test_other_schedulers_in_the_pipeline():
    """A swapped-in DDIMScheduler takes eta in its step; its spacing is its configuration's; others have no eta."""
    pipeline = DDPMVLBPipeline(one_block_unet(), DDIMScheduler.from_config(stored().config))
    pipeline.set_progress_bar_config(disable=True)
    images = [
        pipeline(
            1, generator=torch.Generator().manual_seed(0), num_inference_steps=4, eta=eta, output_type="pt"
        ).images
        for eta in (0.0, 1.0)
    ]
    assert not torch.equal(*images)
    with pytest.raises(ValueError, match="DDIMScheduler takes no `timestep_spacing`"):
        pipeline(1, num_inference_steps=4, timestep_spacing="optimal")
    from diffusers import DPMSolverMultistepScheduler

    pipeline = DDPMVLBPipeline(one_block_unet(), DPMSolverMultistepScheduler.from_config(stored().config))
    with pytest.raises(ValueError, match="takes no `eta`"):
        pipeline(1, num_inference_steps=4, eta=0.5)


def test_a_missing_file_is_said_when_loaded_and_when_needed(tmp_path, caplog):
    """Without it the rest works: a warning, and an error that names the file where its variances are asked for."""
    own = save(tmp_path)
    (tmp_path / "scheduler" / own.errors_file).unlink()
    with caplog.at_level(logging.WARNING):
        logging.getLogger("diffusers").propagate = True
        pipeline = DDPMVLBPipeline.from_pretrained(tmp_path)
    assert f"{own.errors_file} is missing" in caplog.text
    pipeline(1, num_inference_steps=3)
    with pytest.raises(ValueError, match=own.errors_file):
        pipeline(1, num_inference_steps=5)


@pytest.mark.parametrize("damage", ["cut", "rows", "scalar", "half", "names", "other"])
def test_a_file_that_does_not_fit_is_refused(tmp_path, damage):
    """Cut off, with other rows, types or names than the configuration says, or with another content than its name."""
    own = save(tmp_path)
    file = tmp_path / "scheduler" / own.errors_file
    pixels = load_file(file)["x_0_mse"]
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-20])
    else:
        content = {
            "rows": {"x_0_mse": pixels[:2].contiguous()},
            "scalar": {"x_0_mse": torch.tensor(1.0)},
            "half": {"x_0_mse": pixels.half()},
            "names": {"x_0_mse": pixels, "more": torch.ones(1)},
            "other": {"x_0_mse": pixels * 2},
        }[damage]
        save_file(content, file)
    messages = {"cut": "is damaged", "other": "its name is not that of its content"}
    with pytest.raises(ValueError, match=messages.get(damage, "must hold a float32 tensor `x_0_mse` with a row for")):
        DDPMVLBPipeline.from_pretrained(tmp_path)


def test_what_cannot_be_saved_is_said(tmp_path, caplog):
    """A scheduler from a configuration alone has no file to save; one that is saved twice leaves one file."""
    own = stored()
    logging.getLogger("diffusers").propagate = True
    with caplog.at_level(logging.WARNING):
        DDPMVLBScheduler.from_config(own.config).save_pretrained(tmp_path)
    assert f"{own.config.few_steps_file} is not saved" in caplog.text
    for factor in (1, 2):
        own.store_few_steps(PATHS, SquaredErrors(errors().timesteps, errors().mean, errors().per_pixel * factor))
        own.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == [own.errors_file]
    assert [path.name for path in tmp_path.glob("few_steps-*")] == [own.config.few_steps_file]


def test_pixels_of_another_size_are_refused():
    """When the pipeline is made, naming both shapes."""
    own = scheduler()
    own.store_few_steps(PATHS, SquaredErrors(errors().timesteps, errors().mean, torch.ones(4, 1, 6, 6)))
    with pytest.raises(ValueError, match=r"shape \(1, 6, 6\), but the network makes \(1, 4, 4\)"):
        DDPMVLBPipeline(one_block_unet(), own)


@pytest.mark.parametrize("steps", [np.int64(5), np.int32(5)])
def test_numbers_of_other_kinds(steps):
    """A number of steps and a path's numbers may be numpy's."""
    own = scheduler()
    path = StoredPath([np.int64(19), 12, 6, 1, 0], "network", np.float32(0.5))
    own.store_few_steps([path])
    own.set_timesteps(steps)
    assert own.timesteps.tolist() == [19, 12, 6, 1, 0] and path == StoredPath((19, 12, 6, 1, 0), "network", 0.5)
    json.loads(own.to_json_string())


@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
def test_training_with_an_optimal_variance_is_refused(variance_type):
    """It would leave the network's own variance untrained, without a word."""
    own = scheduler(variance_type=variance_type)
    own.store_few_steps([], errors(), "analytic")
    reverse = own.reverse_process()
    diffused = reverse.forward.diffuse(torch.ones(2, 1, 4, 4), torch.tensor([3, 9]), torch.randn(2, 1, 4, 4))
    output = torch.randn(2, 2, 4, 4)
    for loss in (vlb_loss, hybrid_loss):
        with pytest.raises(ValueError, match="would not be trained"):
            loss(reverse, output, diffused)
        loss(dataclasses.replace(reverse, x_0_mse=None), output, diffused)


def test_a_plain_configuration_has_no_new_keys(tmp_path):
    """What is not stored is not written: stock takes the file without a word."""
    scheduler().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert not {"optimal_paths", "x_0_mse", "reverse_variance"} & set(saved)
    assert list(tmp_path.iterdir()) == [tmp_path / "scheduler_config.json"]
