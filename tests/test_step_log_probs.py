"""The log-probability of a step is that of the sampler's own Gaussian, exact on policy, with the right gradients."""

import dataclasses
import functools
import math

import pytest
import torch
from networks import seeded

from ddpm_vlb import DDPMVLBScheduler, SquaredErrors, StoredPath, step_kl, step_log_prob, step_log_ratio

SHAPE = (2, 4, 4)
KINDS = ("fixed_small", "fixed_large", "learned", "learned_range", "analytic", "per_pixel", "eta", "zero_snr")


def process(kind: str = "learned_range", steps: int | None = 6, dtype: torch.dtype = torch.float64):
    """p of a short chain, its optimal variances stored with a path."""
    stored = kind in ("analytic", "per_pixel")
    variance = kind if "fixed" in kind or kind == "learned" else "learned_range"
    zero = dict(rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing")
    scheduler = DDPMVLBScheduler(40, variance_type=variance, **(zero if kind == "zero_snr" else {}))
    if stored:
        pixels = torch.rand(40, *SHAPE, generator=seeded(4), dtype=torch.float64) + 0.1
        errors = SquaredErrors(torch.arange(40), pixels.flatten(1).mean(1), pixels)
        scheduler.store_few_steps([StoredPath((39, 30, 20, 9, 4, 1), kind, 0.3)], errors)
    reverse = scheduler.reverse_process(dtype=dtype, num_inference_steps=steps)
    return dataclasses.replace(reverse, eta=0.5) if kind == "eta" else reverse


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def outputs(reverse, rows: int, seed: int = 1) -> torch.Tensor:
    return 0.5 * randn(rows, SHAPE[0] * (1 + reverse.learns_variance), *SHAPE[1:], seed=seed)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_density_of_what_is_drawn(kind):
    """A step x_s = mu + sigma noise has the density of its noise over sigma^D, at every step that draws, summed."""
    reverse = process(kind)
    t = torch.tensor([1, 2, 3, 4, 5])
    x_t, noise, output = randn(5, *SHAPE), randn(5, *SHAPE, seed=2), outputs(reverse, 5)
    p, _ = reverse(output, x_t, t)
    of_noise = torch.distributions.Normal(0.0, 1.0).log_prob(noise) - p.log_variance / 2
    found = step_log_prob(reverse, output, x_t, t, p.mean + noise * torch.exp(p.log_variance / 2))
    torch.testing.assert_close(found, of_noise.sum((1, 2, 3)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_the_divergence_is_the_expected_log_ratio(kind):
    """KL = E log p / p' by quadrature that is exact for a Gaussian: the noise at +1 and -1 in each dimension."""
    reverse, t, x_t = process(kind), torch.tensor([1, 2, 3, 4, 5]), randn(5, *SHAPE)
    own, other = (outputs(reverse, 5, seed) for seed in (1, 3))
    p, _ = reverse(own, x_t, t)
    ratios = []
    for sign in (1, -1):
        x_s = p.mean + sign * torch.exp(p.log_variance / 2)
        ratios.append(step_log_prob(reverse, own, x_t, t, x_s) - step_log_prob(reverse, other, x_t, t, x_s))
    found = step_kl(reverse, own, other, x_t, t)
    torch.testing.assert_close(found, sum(ratios) / 2, rtol=1e-9, atol=1e-9)
    assert bool((found > 0).all()) and not bool(step_kl(reverse, own, own, x_t, t).any())


def test_a_small_divergence_keeps_its_digits():
    """Of a change of 1e-4 of the output float32 tells as much as float64."""
    x_t, output = randn(5, *SHAPE), outputs(process(), 5)
    x_t, own = x_t.float().double(), output.float().double()
    other, t = (own * 1.0001).float().double(), torch.tensor([1, 2, 3, 4, 5])
    exact = step_kl(process(), own, other, x_t, t)
    single = step_kl(process(dtype=torch.float32), own.float(), other.float(), x_t.float(), t)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=1e-2, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_log_ratio_is_the_difference_of_two_log_probabilities(kind):
    """And bit for bit 0 of the same output, with the gradient of the log-probability."""
    reverse, t = process(kind), torch.tensor([1, 2, 3, 4, 5])
    x_t, x_s = randn(5, *SHAPE), randn(5, *SHAPE, seed=2)
    own, old = (outputs(reverse, 5, seed).requires_grad_() for seed in (1, 3))
    one, other = (step_log_prob(reverse, output, x_t, t, x_s) for output in (own, old))
    torch.testing.assert_close(step_log_ratio(reverse, own, old, x_t, t, x_s), one - other, rtol=1e-9, atol=1e-9)
    on_policy = step_log_ratio(reverse, own, own.detach().clone(), x_t, t, x_s)
    assert torch.equal(on_policy, torch.zeros(5).double())
    gradients = (torch.autograd.grad(value.sum(), own)[0] for value in (on_policy, one))
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("t", "kind", "clip"),
    [
        (1, "learned_range", True),
        (500, "learned_range", True),
        (1, "learned_range", False),
        (1, "fixed_small", False),
    ],
)
def test_the_log_ratio_of_many_dimensions_keeps_its_digits(t, kind, clip):
    """At 3x260x260 within 1e-4 nats of float64's, where log-probabilities of 2e5 to 6e5 nats differ by more."""
    shape, scheduler = (1, 3, 260, 260), DDPMVLBScheduler(variance_type=kind, clip_sample=clip)
    single, double = (scheduler.reverse_process(dtype=dtype) for dtype in (torch.float32, torch.float64))
    noise, change = randn(*shape), 1e-3 * randn(1, 6, 260, 260, seed=1)
    abar = double.forward.alphas_cumprod[t]
    x_t = (abar.sqrt() * randn(*shape, seed=2).clamp(-1, 1) + (1 - abar).sqrt() * noise).float()
    old = torch.cat([noise + 0.3 * randn(*shape, seed=3), 0.3 * randn(*shape, seed=4)], dim=1).float()
    old, change = (x if single.learns_variance else x[:, :3] for x in (old, change))
    new, x_s = (old + change).float(), single(old, x_t, t).p.sample(randn(*shape, seed=5).float())
    exact = step_log_ratio(double, new.double(), old.double(), x_t.double(), t, x_s.double())
    of_sums = [step_log_prob(double, output.double(), x_t.double(), t, x_s.double()) for output in (new, old)]
    torch.testing.assert_close(exact, of_sums[0] - of_sums[1], rtol=0, atol=1e-7)
    found = step_log_ratio(single, new, old, x_t, t, x_s)
    assert found.dtype == torch.float32 and exact.abs() > 5e-3
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-4)


@pytest.mark.parametrize("old", [-5.0, -190.0, -300.0])
def test_the_log_ratio_of_a_vanishing_variance_is_not_nan(old):
    """Log-probabilities of -inf leave a ratio that is very low, and 0 on policy."""
    reverse, (x_t, x_s) = process("learned", dtype=torch.float32), (randn(3, *SHAPE, seed=s).float() for s in (0, 2))
    mean = outputs(reverse, 3).float()[:, : SHAPE[0]]
    before, now = (torch.cat([mean, torch.full_like(mean, size)], dim=1) for size in (old, old - 185))
    now.requires_grad_()
    assert bool((step_log_prob(reverse, now, x_t, 2, x_s) == -torch.inf).all())
    found = step_log_ratio(reverse, now, before, x_t, 2, x_s)
    assert bool((found < -1e30).all())
    if old == -5:  # what one would train from
        assert bool(torch.autograd.grad(found.sum(), now)[0].isfinite().all())
    assert not bool(step_log_ratio(reverse, before, before, x_t, 2, x_s).any())


@pytest.mark.parametrize("size", [-178.0, -300.0, -1e4])
def test_a_vanishing_variance_has_its_density_at_the_mean(size):
    """-log sigma^2 / 2 and the constant, where 1 / sigma is no float32; with its gradients."""
    reverse, x_t = process("learned", dtype=torch.float32), randn(3, *SHAPE).float()
    mean = outputs(reverse, 3).float()[:, : SHAPE[0]]
    output = torch.cat([mean, torch.full_like(mean, size)], dim=1).requires_grad_()
    x_s = reverse(output, x_t, torch.full((3,), 2))[0].mean.detach()
    found = step_log_prob(reverse, output, x_t, 2, x_s)
    density = -0.5 * mean[0].numel() * (size + math.log(2 * math.pi))
    assert found.tolist() == pytest.approx([density] * 3, rel=1e-6)
    of_mean, of_variance = torch.autograd.grad(found.sum(), output)[0].chunk(2, 1)
    assert not bool(of_mean.any()) and bool((of_variance == -0.5).all())


def test_the_divergence_of_a_vanishing_variance_is_that_of_float64():
    """From a policy that has collapsed it is some 90 nats a dimension; from its reference, whatever there is."""
    reverse, exact, x_t = process("learned", dtype=torch.float32), process("learned"), randn(3, *SHAPE).float()
    means = outputs(exact, 3).float()
    own, other = (torch.cat([x, torch.full_like(x, size)], 1) for x, size in zip(means.chunk(2, 1), (-190.0, -5.0)))
    found = step_kl(reverse, own, other, x_t, 2)
    expected = step_kl(exact, own.double(), other.double(), x_t.double(), 2)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    assert bool((step_kl(reverse, other, own, x_t, 2) > 1e30).all())


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("kind", ["learned_range", "learned", "per_pixel", "eta"])
def test_gradients_are_finite_differences(kind, clip):
    """Of the log-probability, and of both outputs of its ratio and divergence."""
    reverse = dataclasses.replace(process(kind), clip_sample=clip)
    t, x_t, x_s = torch.tensor([5, 1]), randn(2, *SHAPE), randn(2, *SHAPE, seed=2)
    own, other = (outputs(reverse, 2, seed).requires_grad_() for seed in (1, 3))
    assert torch.autograd.gradcheck(lambda o: step_log_prob(reverse, o, x_t, t, x_s), own, fast_mode=True)
    assert torch.autograd.gradcheck(lambda a, b: step_kl(reverse, a, b, x_t, t), (own, other), fast_mode=True)
    ratio = functools.partial(step_log_ratio, reverse, x_t=x_t, t=t, x_s=x_s)
    assert torch.autograd.gradcheck(ratio, (own, other), fast_mode=True)


def test_ratios_average_to_one():
    """E_p[p' / p] = 1 for other weights p', from draws of p, within 3 standard errors that are small."""
    reverse, rows = process(dtype=torch.float32), 8000
    x_t = randn(1, *SHAPE).float().expand(rows, -1, -1, -1)
    own, change = (outputs(reverse, 1, seed).float().expand(rows, -1, -1, -1) for seed in (1, 2))
    for t, size in ((1, 0.03), (5, 0.3)):
        other = own + size * change
        x_s = reverse(own, x_t, t).p.sample(randn(rows, *SHAPE, seed=t).float())
        ratio = step_log_ratio(reverse, other, own, x_t, t, x_s).double().exp()
        error = float(ratio.std()) / rows**0.5
        assert ratio.std() > 0.2 and error < 0.02
        assert abs(float(ratio.mean()) - 1) < 3 * error


def gaussian_walk(reverse_variance: str, variance: float = 0.3):
    """Samples of the exact network of N(0, `variance`) in ten steps, and the mean log-probability of each step."""
    scheduler = DDPMVLBScheduler(prediction_type="sample", clip_sample=False, levels=None, timestep_spacing="linspace")
    abar = scheduler.reverse_process(dtype=torch.float64).forward.alphas_cumprod
    gain = variance * abar.sqrt() / (abar * variance + 1 - abar)
    scheduler.store_few_steps(
        errors=SquaredErrors(torch.arange(1000), gain * (1 - abar) / abar.sqrt()), reverse_variance=reverse_variance
    )
    scheduler.set_timesteps(10)
    reverse, generator = scheduler.reverse_process(num_inference_steps=10), seeded()
    x, log_probs, variances = torch.randn(500, 1, 16, 32, generator=generator), [], []
    for k, timestep in enumerate(scheduler.timesteps.tolist()):
        output = float(gain[timestep]) * x
        drawn = scheduler.step(output, timestep, x, generator=generator).prev_sample
        if k < 9:
            log_probs.append(step_log_prob(reverse, output, x, 9 - k, drawn).mean() / drawn[0].numel())
            variances.append(reverse(output[:1], x[:1], 9 - k).p.log_variance.mean())
        x = drawn
    return float(x.std()) / variance**0.5, torch.stack(log_probs), torch.stack(variances)


def test_log_probabilities_are_of_the_right_density():
    """With the optimal variance ten steps give Gaussian data its width; each step's -log p averages its entropy."""
    width, log_probs, log_variances = gaussian_walk("analytic")
    assert width == pytest.approx(1, abs=0.005)
    entropy = 0.5 * (1 + math.log(2 * math.pi) + log_variances)
    error = (0.5 / 256000) ** 0.5  # of the mean of half a squared normal
    torch.testing.assert_close(-log_probs, entropy, rtol=0, atol=3.5 * error)


def test_the_small_variance_is_not_the_data_s():
    """The samples are too narrow by a third: what the optimal variance mends."""
    width, *_ = gaussian_walk("network")
    assert width < 0.72


def test_half_precision_is_promoted():
    reverse = process(dtype=torch.float32)
    x_t, x_s, output = (x.bfloat16() for x in (randn(3, *SHAPE), randn(3, *SHAPE, seed=2), outputs(reverse, 3)))
    found = step_log_prob(reverse, output, x_t, 2, x_s)
    assert found.dtype == torch.float32
    assert torch.equal(found, step_log_prob(reverse, output.float(), x_t.float(), 2, x_s.float()))


@pytest.mark.parametrize("kind", ["fixed_small", "per_pixel"])
def test_a_variance_half_without_use_is_left_aside(kind):
    """Of a network with 2 C outputs under a fixed variance, as the scheduler samples it; one of 3 C is refused."""
    reverse = dataclasses.replace(process(kind), variance_type="fixed_small")
    x_t, x_s = randn(3, *SHAPE), randn(3, *SHAPE, seed=2)
    own, old = (randn(3, 2 * SHAPE[0], *SHAPE[1:], seed=seed) for seed in (1, 3))
    mean, old_mean = (output[:, : SHAPE[0]] for output in (own, old))
    for whole, part in (
        (step_log_prob(reverse, own, x_t, 2, x_s), step_log_prob(reverse, mean, x_t, 2, x_s)),
        (step_kl(reverse, own, old, x_t, 2), step_kl(reverse, mean, old_mean, x_t, 2)),
        (step_log_ratio(reverse, own, old, x_t, 2, x_s), step_log_ratio(reverse, mean, old_mean, x_t, 2, x_s)),
    ):
        assert torch.equal(whole, part)
    with pytest.raises(ValueError, match="2 output channels"):
        step_log_prob(reverse, torch.cat([own, mean], dim=1), x_t, 2, x_s)


def test_one_index_serves_a_batch():
    reverse = process()
    x_t, x_s, output = randn(3, *SHAPE), randn(3, *SHAPE, seed=2), outputs(reverse, 3)
    expected = step_log_prob(reverse, output, x_t, torch.tensor([2, 2, 2]), x_s)
    for t in (2, torch.tensor(2), torch.tensor([2])):
        assert torch.equal(step_log_prob(reverse, output, x_t, t, x_s), expected)


REFUSED = {
    "the last step": (lambda r, x: step_log_prob(r, x, x[:, :2], 0, x[:, :2]), ValueError, "draws nothing"),
    "a row at the last step": (
        lambda r, x: step_log_prob(r, x, x[:, :2], torch.tensor([3, 0]), x[:, :2]),
        ValueError,
        "draws nothing",
    ),
    "its ratio": (lambda r, x: step_log_ratio(r, x, x, x[:, :2], 0, x[:, :2]), ValueError, "draws nothing"),
    "a ratio of other states": (lambda r, x: step_log_ratio(r, x, x, x[:, :2], 3, x[:1, :2]), ValueError, "`x_s`"),
    "its divergence": (lambda r, x: step_kl(r, x, x, x[:, :2], 0), ValueError, "draws nothing"),
    "no noise": (
        lambda r, x: step_log_prob(dataclasses.replace(r, eta=0.0), x, x[:, :2], 3, x[:, :2]),
        ValueError,
        "`eta=0` draws no noise",
    ),
    "states of other steps": (lambda r, x: step_log_prob(r, x, x[:, :2], 3, x[:1, :2]), ValueError, "`x_s`"),
    "indices of other rows": (
        lambda r, x: step_log_prob(r, x, x[:, :2], torch.tensor([3, 2, 1]), x[:, :2]),
        ValueError,
        "each of the 2 rows",
    ),
    "a step outside": (lambda r, x: step_log_prob(r, x, x[:, :2], 6, x[:, :2]), IndexError, "0 .. 5"),
    "no index": (lambda r, x: step_log_prob(r, x, x[:, :2], 1.5, x[:, :2]), TypeError, "integer"),
    "the network's timestep": (lambda r, x: step_log_prob(r, x, x[:, :2], 39, x[:, :2]), IndexError, "0 .. 5"),
    "channels": (lambda r, x: step_log_prob(r, x[:, :2], x[:, :2], 3, x[:, :2]), ValueError, "4 output channels"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refusals_say_what_to_do(what):
    call, kind, message = REFUSED[what]
    with pytest.raises(kind, match=message) as error:
        call(process(), outputs(process(), 2))
    assert "\n" not in str(error.value)


def test_zero_terminal_snr_is_refused_or_finite():
    """The network of epsilon is refused with the reason; for v the step from pure noise is as good as any."""
    with pytest.raises(ValueError, match="zero-terminal SNR"):
        dataclasses.replace(process("zero_snr"), prediction_type="epsilon")
    reverse = process("zero_snr")
    assert float(reverse.forward.alphas_cumprod[5]) == 0
    x = randn(2, *SHAPE)
    assert step_log_prob(reverse, outputs(reverse, 2), x, 5, x).isfinite().all()
