"""The terms of the bound and the training losses against the formulas in numpy, and what training relies on."""

import dataclasses
import math
from dataclasses import replace

import mpmath
import numpy as np
import pytest
import reference
import torch

from ddpm_vlb import (
    DDPMVLBScheduler,
    Diffused,
    ForwardProcess,
    ReverseProcess,
    evaluate_vlb,
    hybrid_loss,
    losses,
    make_betas,
    nats_to_bits_per_dim,
    prior_kl,
    rescale_betas_zero_snr,
    simple_loss,
    vlb_loss,
    vlb_term,
)

BETAS = reference.linear_betas(40, 0.002, 0.2)
TAB = reference.tables(BETAS)
PREDICTIONS = ("epsilon", "sample", "v_prediction")
VARIANCES = ("fixed_small", "fixed_large", "learned", "learned_range")
LEARNED = ("learned", "learned_range")
STEPS = (0, 0, 1, 2, 20, 39)
SHAPE = (len(STEPS), 2, 2, 2)


def randn(*shape, seed=0, dtype=torch.float64):
    """Seeded normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def levels_of(shape, levels=256, seed=3, dtype=torch.float64):
    """Data on the levels, both ends included."""
    k = torch.randint(0, levels, shape, generator=torch.Generator().manual_seed(seed))
    k.flatten()[0], k.flatten()[-1] = 0, levels - 1
    k[:, 0].flatten()[0] = levels - 1
    return (2 * k.to(torch.float64) / (levels - 1) - 1).to(dtype)


def process(prediction="epsilon", variance="learned_range", dtype=torch.float64, **options):
    """p of the test's chain."""
    return ReverseProcess(ForwardProcess.from_betas(BETAS).to(dtype=dtype), prediction, variance, **options)


def batch(p, dtype=torch.float64, scale=1.0):
    """A batch with two decoder steps and a network's output for it: the target with an error, then the variance."""
    x_0 = levels_of(SHAPE, p.levels or 256, dtype=dtype)
    diffused = p.forward.diffuse(x_0, torch.tensor(STEPS), randn(*SHAPE, dtype=dtype))
    output = p.target(diffused) + scale * randn(*SHAPE, seed=1, dtype=dtype)
    if p.learns_variance:
        v = randn(*SHAPE, seed=2, dtype=dtype)
        output = torch.cat([output, v - 4 if p.variance_type == "learned" else v], dim=1)
    return output, diffused


def arrays(diffused):
    """x_0, x_t, t and noise in numpy."""
    return tuple(x.numpy() for x in diffused)


def close(actual, expected, rtol=1e-9, atol=0.0):
    """A relative error of at most 1e-9."""
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=rtol, atol=atol)


def mean_half_loss(p, output, diffused, **options):
    """L_simple of the mean half, which `simple_loss` takes of a process that learns its variance in no other way."""
    if p.learns_variance:
        p, output = replace(p, variance_type="fixed_small"), output[:, : diffused.x_t.shape[1]]
    return simple_loss(p, output, diffused, **options)


def gradient(loss, output, *args, **kwargs):
    """The gradient of the summed loss by the network's output."""
    output = output.detach().clone().requires_grad_()
    values = loss(output, *args, **kwargs)
    return torch.autograd.grad(values.sum(), output)[0]


@pytest.mark.parametrize("levels", [256, 17, None])
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_vlb_term(prediction, variance, clip, levels):
    """L_{t-1} is the KL of two Gaussians, L_0 an exact log mass or density; clipped as configured (DDPM eq. 5)."""
    p = process(prediction, variance, clip_sample=clip is not None, levels=levels)
    output, diffused = batch(p)
    x_0, x_t, t, _ = arrays(diffused)
    expected = reference.vlb_term(TAB, prediction, variance, output.numpy(), x_0, x_t, t, clip, levels)
    close(vlb_term(p, output, diffused), expected)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_training_losses(prediction, variance, clip):
    """L_simple, L_vlb (T times the term, in bits/dim) and L_hybrid, never clipped (iDDPM eq. 16)."""
    p = process(prediction, variance, clip_sample=clip)
    output, diffused = batch(p)
    x_0, x_t, t, noise = arrays(diffused)
    simple = reference.simple_loss(TAB, prediction, variance, output.numpy(), x_0, t, noise)
    vlb = reference.vlb_loss(TAB, prediction, variance, output.numpy(), x_0, x_t, t)
    close(mean_half_loss(p, output, diffused), simple)
    close(vlb_loss(p, output, diffused), vlb)
    if p.learns_variance:
        close(hybrid_loss(p, output, diffused), simple + 0.001 * vlb)
        close(hybrid_loss(p, output, diffused, vlb_weight=0.3), simple + 0.3 * vlb)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_training_is_unclipped_and_the_bound_clips(prediction):
    """Clipping or thresholding x_0_hat changes the evaluated term where x_0_hat leaves [-1, 1], but no loss."""
    free = process(prediction, clip_sample=False)
    output, diffused = batch(free, scale=100.0)
    assert bool((free(output, diffused.x_t, diffused.t).x_0.abs().flatten(1).amax(1) > 1).all())
    for options in ({"clip_sample": True}, {"clip_sample": True, "clip_sample_range": 0.5}, {"thresholding": True}):
        p = process(prediction, **options)
        for loss in (mean_half_loss, vlb_loss, hybrid_loss):
            assert torch.equal(loss(p, output, diffused), loss(free, output, diffused))
        assert bool((vlb_term(p, output, diffused) != vlb_term(free, output, diffused)).all())


def test_term_of_a_clipped_and_a_thresholded_process():
    """The evaluated term is the KL to, or the log mass of, the very p that the reverse process gives."""
    thresholds = {"thresholding": True, "sample_max_value": 2.0}
    for options in ({"clip_sample": True}, thresholds, thresholds | {"clip_sample": False}, {"clip_sample": False}):
        p = process(**options)
        output, diffused = batch(p)
        reversed_p = p(output, diffused.x_t, diffused.t).p
        kl = p.forward.q_posterior(diffused.x_0, diffused.x_t, diffused.t).kl(reversed_p)
        decoder = -reversed_p.discretized_log_prob(diffused.x_0)
        expected = torch.where((diffused.t == 0)[:, None], decoder.flatten(1), kl.flatten(1)).sum(1)
        close(vlb_term(p, output, diffused), expected)


@pytest.mark.parametrize("gamma", [5.0, 0.7])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_weights(prediction, gamma):
    """min-SNR weighting puts min(SNR, gamma) on the squared error of x_0, for each prediction (Hang et al. eq. 8)."""
    p = process(prediction)
    output, diffused = batch(p)
    weight = reference.min_snr_weight(TAB, prediction, diffused.t.numpy(), gamma)
    plain = mean_half_loss(p, output, diffused).numpy()
    close(mean_half_loss(p, output, diffused, snr_gamma=gamma), plain * weight)
    close(
        hybrid_loss(p, output, diffused, snr_gamma=gamma),
        plain * weight + 0.001 * vlb_loss(p, output, diffused).numpy(),
    )
    x_0_hat = process(prediction, clip_sample=False)(output, diffused.x_t, diffused.t).x_0
    snr = torch.from_numpy(TAB.abar / (1 - TAB.abar))[diffused.t]
    on_x_0 = (diffused.x_0 - x_0_hat).square().flatten(1).mean(1) * snr.clamp(max=gamma)
    close(mean_half_loss(p, output, diffused, snr_gamma=gamma), on_x_0, rtol=1e-8)


@pytest.mark.parametrize("prediction", ["sample", "v_prediction"])
def test_min_snr_with_zero_terminal_snr(prediction):
    """Where no signal is left the SNR is zero, and so is the weight."""
    q = ForwardProcess.from_betas(rescale_betas_zero_snr(make_betas("linear", 20)))
    p = ReverseProcess(q, prediction)
    diffused = q.diffuse(levels_of((2, 3)), torch.tensor([3, 19]), randn(2, 3))
    loss = mean_half_loss(p, randn(2, 3, seed=1), diffused, snr_gamma=5.0)
    assert float(loss[0]) > 0 and float(loss[1]) == 0


@pytest.mark.parametrize("variance", LEARNED)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_hybrid_gradient(prediction, variance):
    """L_simple alone trains the mean half, exactly, and 0.001 L_vlb alone the variance half (iDDPM section 3.1)."""
    p = process(prediction, variance)
    output, diffused = batch(p)
    hybrid = gradient(lambda o: hybrid_loss(p, o, diffused), output)
    simple = gradient(lambda o: mean_half_loss(p, o, diffused), output)
    vlb = gradient(lambda o: vlb_loss(p, o, diffused), output)
    assert torch.equal(hybrid[:, :2], simple[:, :2])
    assert torch.equal(simple[:, 2:], torch.zeros_like(simple[:, 2:]))
    torch.testing.assert_close(hybrid[:, 2:], 0.001 * vlb[:, 2:], rtol=1e-12, atol=0)
    assert bool((vlb != 0).all())
    frozen = gradient(lambda o: vlb_loss(p, o, diffused, freeze_mean=True), output)
    assert torch.equal(frozen[:, 2:], vlb[:, 2:]) and torch.equal(frozen[:, :2], torch.zeros_like(frozen[:, :2]))
    assert torch.equal(vlb_loss(p, output, diffused, freeze_mean=True), vlb_loss(p, output, diffused))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_outputs(dtype, autocast):
    """Outputs in half precision give float32 losses, those of the promoted outputs, also inside autocast."""
    p = process(dtype=torch.float32)
    output, diffused = batch(p, torch.float32)
    output = output.to(dtype)
    for loss in (vlb_term, vlb_loss, mean_half_loss, hybrid_loss):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            values = loss(p, output, diffused)
        assert values.dtype == torch.float32
        assert torch.equal(values, loss(p, output.float(), diffused))
        assert gradient(lambda o, loss=loss: loss(p, o, diffused), output).dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        assert prior_kl(p, diffused.x_0.to(dtype)).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loss", [vlb_loss, hybrid_loss])
def test_half_precision_images_are_taken(dtype, loss):
    """`diffuse` makes float32 of levels that half precision has moved; they are levels still, other values are not."""
    p = DDPMVLBScheduler(variance_type="learned_range").reverse_process()
    x_0 = (torch.arange(256).reshape(4, 1, 8, 8) / 127.5 - 1).to(dtype)
    for shift, taken in ((0, True), (0.3 / 127.5, False)):
        p = dataclasses.replace(p)  # whose first batch is looked at
        diffused = p.forward.diffuse(
            (x_0.float() + shift).clamp(-1, 1), torch.tensor([0, 1, 500, 999]), randn(4, 1, 8, 8)
        )
        if taken:
            assert loss(p, torch.zeros(4, 2, 8, 8), diffused).isfinite().all()
        else:
            with pytest.raises(ValueError, match="must lie on the 256 levels"):
                loss(p, torch.zeros(4, 2, 8, 8), diffused)


def test_half_precision_batch():
    """A `Diffused` in half precision, made by hand, is promoted as well."""
    p = process(dtype=torch.float32)
    output, diffused = batch(p, torch.float32)
    half = Diffused(*(x.bfloat16() if x.is_floating_point() else x for x in diffused))
    promoted = Diffused(*(x.float() if x.is_floating_point() else x for x in half))
    for loss in (vlb_term, vlb_loss, mean_half_loss, hybrid_loss):
        values = loss(p, output, half)
        assert values.dtype == torch.float32 and torch.equal(values, loss(p, output, promoted))


@pytest.mark.parametrize("tables", [torch.float32, torch.float64], ids=str)
def test_float64_is_kept(tables):
    """float64 data and outputs give float64 losses, whatever the dtype of the tables."""
    p = process(dtype=tables)
    output, diffused = batch(p)
    for loss in (vlb_term, vlb_loss, mean_half_loss, hybrid_loss):
        assert loss(p, output, diffused).dtype == torch.float64
    assert prior_kl(p, diffused.x_0).dtype == torch.float64


@pytest.mark.parametrize("loss", [vlb_term, vlb_loss, hybrid_loss])
def test_float32_agrees_with_float64(loss):
    """The same batch in float32 gives each image's loss to 2e-5 relative, near and far from a good model."""
    for scale in (1e-3, 1.0):
        output, diffused = batch(process(), scale=scale)
        single = Diffused(*(x.float() if x.is_floating_point() else x for x in diffused))
        # Both see the same rounded numbers, so only the arithmetic differs.
        double = Diffused(*(x.double() if x.is_floating_point() else x for x in single))
        exact = loss(process(), output.float().double(), double)
        close(loss(process(dtype=torch.float32), output.float(), single).double(), exact, rtol=2e-5)


@pytest.mark.parametrize("loss", [vlb_term, vlb_loss, hybrid_loss])
def test_decoder_is_computed_for_decoder_steps_only(loss, monkeypatch):
    """The decoder sees the rows with t = 0 and no other, and is not called for a batch without one."""
    rows, decoder = [], losses.log_bin_mass

    def spy(x, *others):
        rows.append(x)
        return decoder(x, *others)

    monkeypatch.setattr(losses, "log_bin_mass", spy)
    p = process()
    output, diffused = batch(p)
    loss(p, output, diffused)
    assert len(rows) == 1 and torch.equal(rows[0], diffused.x_0[:2])
    rows.clear()
    loss(p, output[2:], Diffused(*(x[2:] for x in diffused)))
    assert not rows
    continuous = process(levels=None)
    loss(continuous, output, diffused)
    assert not rows


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("variance", VARIANCES)
def test_terms_without_gradients_are_those_of_training(variance, prediction):
    """Scoring takes the decoder's rows and the others apart; each row's term is the one that training sees."""
    for options in ({"clip_sample": False}, {"clip_sample": True, "levels": 17}, {"levels": None}):
        p = process(prediction, variance, **options)
        output, diffused = batch(p)
        for rows in (slice(None), slice(0, 2), slice(2, None)):
            part = Diffused(*(x[rows] for x in diffused))
            expected = vlb_term(p, output[rows].requires_grad_(), part).detach()
            with torch.no_grad():
                close(vlb_term(p, output[rows].detach(), part), expected, rtol=1e-13)


def test_terms_do_not_depend_on_the_batch():
    """Bit for bit, so that a score does not depend on how images are spread over network calls."""
    p = process(dtype=torch.float32)
    output, diffused = batch(p, dtype=torch.float32)
    with torch.no_grad():
        whole = vlb_term(p, output, diffused)
        for i in range(len(STEPS)):
            row = slice(i, i + 1)
            assert torch.equal(vlb_term(p, output[row], Diffused(*(x[row] for x in diffused))), whole[row])


@pytest.mark.parametrize("variance", VARIANCES)
def test_continuous_decoder(variance):
    """levels=None scores the first step by the density of p at x_0, for data anywhere on the line."""
    p = process("sample", variance, clip_sample=False, levels=None)
    x_0, t = 3 * randn(4, 2, 3), torch.zeros(4, dtype=torch.int64)
    diffused = p.forward.diffuse(x_0, t, randn(4, 2, 3, seed=1))
    output = randn(4, 2 * (1 + p.learns_variance), 3, seed=2)
    distribution = p(output, diffused.x_t, t).p
    expected = -torch.distributions.Normal(distribution.mean, (0.5 * distribution.log_variance).exp()).log_prob(x_0)
    close(vlb_term(p, output, diffused), expected.flatten(1).sum(1))
    close(vlb_loss(p, output, diffused), 40 * expected.flatten(1).mean(1) / math.log(2))


def extreme_batch(variance, dtype):
    """A good mean with log variances of -80 to 80, or interpolations far beyond [-1, 1], for each step."""
    p = process(variance=variance, dtype=dtype)
    _, diffused = batch(p, dtype)
    outputs = torch.tensor([-80.0, -30.0, 0.0, 80.0] if variance == "learned" else [-100.0, -10.0, 10.0, 100.0])
    rows = [Diffused(*(x.repeat_interleave(len(outputs), 0) for x in diffused))]
    shape = rows[0].x_0.shape
    v = outputs.repeat(len(STEPS)).reshape(-1, 1, 1, 1).expand(shape).to(dtype)
    return p, torch.cat([p.target(rows[0]) + 0.01 * randn(*shape, seed=1, dtype=dtype), v], dim=1), rows[0]


@pytest.mark.parametrize(
    ("mode", "dtype"), [("eager", torch.float32), ("eager", torch.float64), ("compiled", torch.float32)], ids=str
)
@pytest.mark.parametrize("variance", LEARNED)
def test_extreme_variances(variance, dtype, mode):
    """Losses and gradients stay finite for absurd variance outputs: no unused branch leaks its NaN or infinity."""
    p, output, diffused = extreme_batch(variance, dtype)
    for loss in (vlb_loss, hybrid_loss):
        torch.compiler.reset()
        function = loss if mode == "eager" else torch.compile(loss, fullgraph=True, backend="aot_eager")
        values = function(p, output.requires_grad_(), diffused)
        (grad,) = torch.autograd.grad(values.sum(), output)
        assert bool(values.isfinite().all()) and bool(grad.isfinite().all())
        expected = loss(process(variance=variance), *_in_double(output.detach(), diffused))
        # A mass that is all but one leaves a loss too small for float32.
        atol = torch.finfo(dtype).tiny
        close(values.detach().double(), expected, rtol=1e-4 if dtype == torch.float32 else 1e-9, atol=atol)


def _in_double(output, diffused):
    return output.double(), Diffused(*(x.double() if x.is_floating_point() else x for x in diffused))


@pytest.mark.parametrize("levels", [256, None])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_gradient_by_finite_differences(prediction, variance, levels):
    """The gradient of L_vlb and of the clipped term is that of their values, at t = 0 and t > 0 (float64)."""
    p = process(prediction, variance, levels=levels, clip_sample=False)
    x_0, t = levels_of((3, 1, 3), levels or 17), torch.tensor([0, 1, 30])
    diffused = p.forward.diffuse(x_0, t, randn(3, 1, 3))
    output = p.target(diffused) + 0.3 * randn(3, 1, 3, seed=1)
    if p.learns_variance:
        v = 0.5 * randn(3, 1, 3, seed=2)
        output = torch.cat([output, v - 4 if variance == "learned" else v], dim=1)
    output.requires_grad_()
    assert torch.autograd.gradcheck(lambda o: vlb_loss(p, o, diffused), (output,), rtol=1e-4)
    assert torch.autograd.gradcheck(lambda o: vlb_term(p, o, diffused), (output,), rtol=1e-4)


def compiled_agrees(loss, variance, backend):
    """A compiled loss has one graph, and the values and gradients of the eager one."""
    p = process(variance=variance, dtype=torch.float32)
    output, diffused = batch(p, torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    values = compiled(p, output, diffused).detach()
    torch.testing.assert_close(values, loss(p, output, diffused), rtol=1e-5, atol=0)
    actual = gradient(lambda o: compiled(p, o, diffused), output)
    expected = gradient(lambda o: loss(p, o, diffused), output)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("loss", [vlb_term, vlb_loss, simple_loss, hybrid_loss])
def test_losses_are_one_graph(loss):
    """Each loss is captured in one graph without a break, with the eager values and gradients (1e-5)."""
    compiled_agrees(loss, "fixed_small" if loss is simple_loss else "learned_range", "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "variance"),
    [
        *[(loss, "learned_range") for loss in (vlb_term, vlb_loss, hybrid_loss)],
        *[(loss, "fixed_small") for loss in (vlb_loss, simple_loss)],
    ],
)
def test_losses_compile(loss, variance):
    """Each loss compiles to machine code, in one graph, with the eager values and gradients (1e-5)."""
    compiled_agrees(loss, variance, "inductor")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "betas",
    [BETAS, make_betas("linear", 1000).numpy(), make_betas("squaredcos_cap_v2", 1000).numpy(), [0.3]],
    ids=["linear-40", "linear-1000", "cosine-1000", "one-step"],
)
def test_prior_kl(betas, dtype):
    """L_T keeps its relative precision (float32 1e-5, float64 1e-9) when x_T is noise but for 1e-9, against mpmath."""
    p = ReverseProcess(ForwardProcess.from_betas(betas).to(dtype=dtype))
    x_0 = levels_of((3, 2, 4), dtype=dtype)
    with mpmath.workdps(40):
        abar = mpmath.fprod(1 - mpmath.mpf(float(beta)) for beta in betas)
        exact = []
        for image in x_0:
            squares = mpmath.fsum(mpmath.mpf(float(x)) ** 2 for x in image.flatten())
            exact.append(float((abar * squares - image.numel() * (abar + mpmath.log1p(-abar))) / 2))
    close(prior_kl(p, x_0).double(), exact, rtol=1e-5 if dtype == torch.float32 else 1e-9)


def network(variance):
    """A closed-form network that depends on the timestep it is told."""

    def model(x_t, timesteps):
        u = (timesteps.double() / 40).reshape(-1, *[1] * (x_t.ndim - 1))
        v = torch.tanh(0.8 * x_t - u)
        halves = {"learned": [2 * v - 4], "learned_range": [v]}.get(variance, [])
        return torch.cat([torch.tanh(0.9 * x_t + 0.3 * u), *halves], dim=1)

    return model


@pytest.mark.parametrize("levels", [17, None])
@pytest.mark.parametrize("indices", [None, [0, 2, 3, 20, 39], [39]], ids=["chain", "respaced", "one-step"])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_whole_bound(prediction, variance, indices, levels):
    """L_T + sum_t L_t over a chain, or a respaced one whose network is told original timesteps (DDPM eq. 5)."""
    p, told = process(prediction, variance, levels=levels), list(range(40)) if indices is None else indices
    p = p if indices is None else p.respace(indices)
    x_0, noise, model = levels_of((2, 1, 3), 17), randn(len(told), 2, 1, 3), network(variance)
    actual = evaluate_vlb(model, p, x_0, noise=noise)
    prior, terms = reference.bound(
        reference.tables(reference.respaced_betas(BETAS, told)),
        prediction,
        variance,
        lambda x, t: model(torch.from_numpy(x), torch.from_numpy(t)).numpy(),
        x_0.numpy(),
        noise.numpy(),
        timesteps=told,
        clip=1.0,
        levels=levels,
    )
    close(actual.prior, prior)
    close(actual.terms, terms)
    close(actual.bits_per_dim, reference.bits_per_dim(prior + terms.sum(1), x_0.numpy()))


@pytest.mark.parametrize("variance", VARIANCES)
def test_losses_add_up_to_the_bound(variance):
    """The mean over t of L_vlb plus the prior is the bound in bits/dim, term by term the evaluated (unclipped) one."""
    p, x_0, noise = process(variance=variance, clip_sample=False), levels_of((2, 1, 3)), randn(40, 2, 1, 3)
    model = network(variance)
    whole = evaluate_vlb(model, p, x_0, noise=noise)
    losses = []
    for step in range(40):
        diffused = p.forward.diffuse(x_0, torch.full((2,), step), noise[step])
        output = model(diffused.x_t, p.forward.timesteps[diffused.t])
        losses.append(vlb_loss(p, output, diffused))
        close(vlb_term(p, output, diffused), whole.terms[:, step])
    prior = nats_to_bits_per_dim(prior_kl(p, x_0), 3)
    close(torch.stack(losses).mean(0) + prior, whole.bits_per_dim)


def test_nats_to_bits_per_dim():
    """D ln 2 nats are one bit for each of D dimensions."""
    assert nats_to_bits_per_dim(torch.tensor(12 * math.log(2), dtype=torch.float64), 12) == pytest.approx(1, rel=1e-15)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_hybrid_loss_needs_a_variance_to_train(variance):
    """`hybrid_loss` with a fixed variance is refused, with what to use instead."""
    p = process(variance=variance)
    output, diffused = batch(p)
    with pytest.raises(ValueError, match=f"'{variance}'` has none to train.*learned_range.*simple_loss"):
        hybrid_loss(p, output, diffused)


@pytest.mark.parametrize("loss", [vlb_term, vlb_loss, hybrid_loss])
def test_wrong_channels(loss):
    """Every loss refuses an output without the variance half, and names `out_channels`."""
    p = process()
    output, diffused = batch(p)
    with pytest.raises(ValueError, match="out_channels=4"):
        loss(p, output[:, :2], diffused)


@pytest.mark.parametrize("gamma", [0.0, -1.0, float("nan")])
def test_impossible_gamma(gamma):
    """A min-SNR gamma that is not positive is refused with its value."""
    p = process()
    output, diffused = batch(p)
    for loss in (mean_half_loss, hybrid_loss):
        with pytest.raises(ValueError, match=f"`snr_gamma` must be positive.*{gamma}"):
            loss(p, output, diffused, snr_gamma=gamma)


def test_an_overflow_at_the_first_step_stays_out_of_the_gradient():
    """At t = 0 the decoder is the loss: where the unused KL overflows, the gradient stays finite."""
    forward = ForwardProcess.from_betas(torch.linspace(1e-4, 0.02, 10)).to(dtype=torch.float32)
    reverse = ReverseProcess(forward, "epsilon", "learned", levels=17)
    x_0 = torch.full((1, 1, 4, 4), 0.5)
    diffused = forward.diffuse(x_0, torch.tensor([0]), torch.zeros_like(x_0))
    output = torch.cat([torch.zeros_like(x_0), torch.full_like(x_0, -120.0)], dim=1).requires_grad_()
    loss = vlb_loss(reverse, output, diffused)
    loss.sum().backward()
    assert loss.isfinite().all() and output.grad.isfinite().all()


@pytest.mark.parametrize("field", ["x_0", "x_t", "noise", "t"])
def test_diffused_of_other_shapes_is_refused(field):
    """What does not match is refused; broadcasting it would give plausible numbers."""
    forward = ForwardProcess.from_betas(torch.linspace(1e-4, 0.02, 10))
    reverse = ReverseProcess(forward, levels=None)
    x_0 = torch.zeros(3, 1, 4, 4, dtype=torch.float64)
    diffused = forward.diffuse(x_0, torch.tensor([1, 2, 3]), torch.ones_like(x_0))
    for loss in (simple_loss, vlb_loss, vlb_term):
        wrong = diffused._replace(**{field: getattr(diffused, field)[:1]})
        with pytest.raises(ValueError):
            loss(reverse, torch.zeros_like(x_0), wrong)


@pytest.mark.parametrize("variance", LEARNED)
def test_simple_loss_does_not_leave_a_variance_untrained(variance):
    """L_simple alone would leave half of the output as it was made: refused, with the loss that trains it."""
    p = process(variance=variance)
    with pytest.raises(ValueError, match=f"untrained.*'{variance}'.*hybrid_loss.*fixed_small"):
        simple_loss(p, *batch(p))


UNSCALED = {
    "0 .. 255": lambda k: k,
    "0 .. 1": lambda k: k / 255,
    "resized": lambda k: (k[..., :-1] + k[..., 1:]) / 255 - 1 + 1e-3,
    "of other levels": lambda k: (k // 16) * 2 / 16 - 1,
}


@pytest.mark.parametrize("loss", [vlb_term, vlb_loss, hybrid_loss])
@pytest.mark.parametrize("kind", UNSCALED)
def test_data_that_is_not_on_the_levels_is_refused(kind, loss):
    """A loss of images on [0, 1] looks like one: the first batch of a process is looked at, and a later one is not."""
    p = process()
    k = torch.arange(256.0, dtype=torch.float64).reshape(8, 2, 4, 4)
    diffused = p.forward.diffuse(UNSCALED[kind](k), torch.arange(8), torch.zeros_like(UNSCALED[kind](k)))
    output = torch.zeros_like(diffused.x_t).repeat(1, 2, 1, 1)
    with pytest.raises(ValueError, match=r"`x_0` must lie (in \[-1, 1\]|on the 256 levels)"):
        loss(p, output, diffused)
    loss(p, *batch(p))
    assert bool(loss(p, output, diffused).isfinite().all())


def test_simple_loss_asks_for_the_range_alone():
    """L_simple has no decoder: resized images are trained on, those of 0 .. 255 are not; latents have no range."""
    pixels = randn(2, 1, 3).abs().clamp(max=1)
    for scale, levels, refused in ((1, 256, False), (255, 256, True), (255, None, False)):
        p = process(variance="fixed_small", levels=levels)
        diffused = p.forward.diffuse(pixels * scale, torch.tensor([0, 1]), randn(2, 1, 3))
        if refused:
            with pytest.raises(ValueError, match=r"`x_0` must lie in \[-1, 1\]"):
                simple_loss(p, torch.zeros(2, 1, 3), diffused)
        else:
            assert bool(simple_loss(p, torch.zeros(2, 1, 3), diffused).isfinite().all())
