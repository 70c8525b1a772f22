"""The pilot run and its control variate: expectations in closed form, and probabilities that follow the terms."""

import io
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from analytic import BETAS, SHAPE, PosteriorMean, T, expected_bits, expected_moments, images, oracle, process
from torch import Tensor

from ddpm_vlb import (
    ControlVariate,
    ForwardProcess,
    GaussianModel,
    Pilot,
    estimate_vlb,
    evaluate_vlb,
    fit_pilot,
    make_betas,
    pilot_positions,
)

KINDS = {"dense": 2048, "stationary": 1}
each_kind = pytest.mark.parametrize("kind", KINDS)
each_shape = pytest.mark.parametrize("shape", [(1, 4, 4), (3, 2, 3), (2, 7)], ids=str)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def correlated(n: int, shape=SHAPE, levels: int | None = None, seed: int = 0) -> Tensor:
    """Images whose neighbours are alike and whose contrast grows from top to bottom; some values reach +-1."""
    x = images(n, shape, seed=seed) * torch.linspace(0.3, 2.5, math.prod(shape)).reshape(shape)
    x = (0.1 + x + 0.6 * x.roll(1, -1)).clamp(-1, 1)
    return x if levels is None else ((x + 1) / 2 * (levels - 1)).round() * 2 / (levels - 1) - 1


def control_variate(kind: str = "dense", shape=SHAPE, levels: int | None = 17, slopes=None) -> ControlVariate:
    """One with arbitrary scales and slopes: what holds of it must not depend on how they were found."""
    gaussian = GaussianModel.fit(correlated(60, shape, levels, seed=1), KINDS[kind])
    abar = process().forward.alphas_cumprod
    if slopes is None:  # of two reverse processes
        slopes = torch.randn(2, T, 2, generator=seeded(2), dtype=torch.float64)
    return ControlVariate(gaussian, abar, levels, torch.linspace(0.5, 3, T, dtype=torch.float64), slopes)


def every_pair(n: int) -> tuple[Tensor, Tensor]:
    """Image and step of all n x T pairs."""
    return torch.arange(n).repeat_interleave(T), torch.arange(T).repeat(n)


# --- the control variate


@each_shape
@each_kind
@pytest.mark.parametrize("levels", [None, 17])
def test_control_variate_is_equation_2(kind, shape, levels):
    """C_t = s (|x_0 - x_0_hat|^2 / m - 1) + r (|epsilon|^2 - d) / sqrt(2 d) of the denoiser as a matrix of pixels.

    Each reverse process has slopes s and r of its own. The denoiser's eigenvalues are the rounded ones of `grouped`; d
    counts the values inside the outer levels.
    """
    control = control_variate(kind, shape, levels)
    x_0, (image, t) = correlated(4, shape, levels), every_pair(4)
    noise = torch.randn(len(t), *shape, generator=seeded(3), dtype=torch.float64)
    deviation, expected = control.at(control.prepare(x_0), image, t, noise)

    values, group, _ = control.gaussian.grouped()
    dims = math.prod(shape)
    basis = control.gaussian.coefficients(torch.eye(dims).reshape(-1, *shape)).numpy()
    covariance = basis * values[group].numpy() @ basis.T
    x, mean = x_0.flatten(1).numpy(), control.gaussian.mean.flatten().numpy()
    for pair, e in enumerate(noise.flatten(1).numpy()):
        step, own = int(t[pair]), x[image[pair]]
        abar, (s, r) = float(control.alphas_cumprod[step]), control.slopes[:, step].T.numpy()
        kernel = np.sqrt(abar) * covariance @ np.linalg.inv(abar * covariance + (1 - abar) * np.eye(dims))
        x_t = np.sqrt(abar) * own + np.sqrt(1 - abar) * e
        x_0_hat = mean + kernel @ (x_t - np.sqrt(abar) * mean)
        inner = np.abs(own) < (np.inf if levels is None else 1 - 1e-9)
        d = inner.sum()
        value = s * (((own - x_0_hat) ** 2).sum() / float(control.scale[step]) - 1)
        value += r * ((e[inner] ** 2).sum() - d) / math.sqrt(2 * d)
        np.testing.assert_allclose((deviation + expected)[:, pair], value, rtol=1e-9, atol=1e-9)


@each_shape
@each_kind
def test_deviation_has_mean_zero_given_the_image(kind, shape):
    """E[C_t - E[C_t | x_0] | x_0] = 0 at every step and for any x_0, also one unlike the model's data.

    4000 draws of epsilon for each of 3 images at 12 steps, and two sets of slopes: no mean is further from 0 than 4 of
    its standard errors.
    """
    control = control_variate(kind, shape)
    x_0 = torch.cat([correlated(2, shape, 17), torch.ones(1, *shape, dtype=torch.float64)])
    prepared, (image, t) = control.prepare(x_0), every_pair(3)
    draws, expectations = [], []
    generator = seeded(4)
    for _ in range(4000):
        noise = torch.randn(len(t), *shape, generator=generator, dtype=torch.float64)
        deviation, expected = control.at(prepared, image, t, noise)
        draws.append(deviation)
        expectations.append(expected)
    draws = torch.stack(draws)
    assert (draws.mean(0).abs() < 4 * draws.std(0) / 4000**0.5).all() and (draws.std(0) > 0).all()
    assert all(torch.equal(expected, expectations[0]) for expected in expectations)
    # The expectation that was taken off is no small thing at this precision.
    assert (expectations[0].abs() > 10 * draws.std(0) / 4000**0.5).float().mean() > 0.5


@pytest.mark.parametrize("levels", [None, 17])
@each_shape
@each_kind
def test_total_is_the_sum_of_the_expectations(kind, shape, levels):
    """`total` is the sum over t > 0, and the value at t = 0, of what `at` expects, to 1e-9."""
    control = control_variate(kind, shape, levels)
    prepared, (image, t) = control.prepare(correlated(5, shape, levels)), every_pair(5)
    noise = torch.randn(len(t), *shape, generator=seeded(5), dtype=torch.float64)
    expected = control.at(prepared, image, t, noise)[1].reshape(2, 5, T)
    total = control.total(prepared)
    assert total.shape == (2, 5, 2)
    torch.testing.assert_close(total[:, :, 0], expected[:, :, 1:].sum(2), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(total[:, :, 1], expected[:, :, 0], rtol=1e-9, atol=1e-9)


NOISE_ONLY = torch.tensor([0.0, 1.0]).double().expand(1, T, 2)


def deviations(control: ControlVariate, x_0: Tensor, noise: Tensor) -> Tensor:
    """C_t - E[C_t | x_0] of one image at the first step for several draws."""
    many = torch.zeros(len(noise), dtype=torch.int64)
    return control.at(control.prepare(x_0), many, many, noise)[0][0]


@pytest.mark.parametrize("levels", [3, 17, 256])
def test_only_the_outer_levels_are_masked(levels):
    """The noise of a value at level 0 or levels - 1 leaves the energy alone, that of any other level does not."""
    control = control_variate(levels=levels, slopes=NOISE_ONLY)
    k = torch.tensor([0, levels - 1, 1, levels - 2, *[levels // 2] * 12])
    x_0 = (k.double() * 2 / (levels - 1) - 1).reshape(1, *SHAPE)
    noise = torch.ones(17, 16, dtype=torch.float64)
    noise[torch.arange(16), torch.arange(16)] = 2.0
    values = deviations(control, x_0.float(), noise.reshape(17, *SHAPE))  # float32 puts levels beside their values
    moved = (values - values[-1])[:16] / (3 / math.sqrt(2 * 14))  # 2^2 - 1^2, over sqrt(2 d)
    torch.testing.assert_close(moved, (k % (levels - 1) != 0).double(), rtol=1e-12, atol=1e-12)


def test_continuous_data_has_no_outer_levels():
    """Without levels the noise of every value counts, whatever the value."""
    control = control_variate(levels=None, slopes=NOISE_ONLY)
    x_0 = torch.tensor([-1.0, 1.0, -7.0, 7.0] * 4, dtype=torch.float64).reshape(1, *SHAPE)
    noise = torch.randn(3, *SHAPE, generator=seeded(6), dtype=torch.float64)
    expected = (noise.square().flatten(1).sum(1) - 16) / 32**0.5
    torch.testing.assert_close(deviations(control, x_0, noise), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("levels", [2, 17])
def test_an_image_of_outer_levels_has_no_energy(levels):
    """Where no value is inside the energy is 0, not 0 / 0."""
    control = control_variate(levels=levels, slopes=NOISE_ONLY)
    noise = torch.randn(3, *SHAPE, generator=seeded(7), dtype=torch.float64)
    assert (deviations(control, torch.ones(1, *SHAPE), noise) == 0).all()


def test_energy_has_unit_variance():
    """(|epsilon|^2 - d) / sqrt(2 d) has variance 1: its kurtosis excess is 12 / d, so 20,000 draws give it to 2 %."""
    control = control_variate(slopes=NOISE_ONLY)
    x_0 = torch.zeros(1, *SHAPE)
    x_0[0, 0, 0, :3] = 1.0
    noise = torch.randn(20000, *SHAPE, generator=seeded(8), dtype=torch.float64)
    tolerance = 4 * math.sqrt((2 + 12 / 13) / 20000)
    assert float(deviations(control, x_0, noise).var()) == pytest.approx(1, abs=tolerance)


# --- fit_pilot: the probabilities

CHAINS = {
    "one": torch.tensor([0.3], dtype=torch.float64),
    "two": make_betas("linear", 2, 0.05, 0.5),
    "three": make_betas("linear", 3, 0.05, 0.5),
    "twelve": BETAS,
    "sixty-four": make_betas("linear", 64, 0.01, 0.1),
    "four thousand": make_betas("linear", 4000, 2e-4, 0.005),
}
each_chain = pytest.mark.parametrize("betas", CHAINS.values(), ids=CHAINS)


@pytest.mark.parametrize("control_variate", [True, False])
@each_chain
def test_probabilities_are_a_distribution(betas, control_variate):
    """On chains of any length p_t is positive, at least its uniform share, and sums to 1."""
    reverse, steps = process(betas=betas), len(betas)
    model = PosteriorMean(reverse.forward)
    pilot = fit_pilot(model, reverse, images(30), num_calls=512, uniform_fraction=0.1, control_variate=control_variate)
    p = pilot.probabilities
    assert p.shape == (steps,) and p.dtype == torch.float64 and float(p.sum()) == pytest.approx(1, abs=1e-12)
    assert float(p.min()) >= 0.1 / steps
    assert (pilot.control is not None) == control_variate
    uniform = fit_pilot(model, reverse, images(3), num_calls=512, uniform_fraction=1.0).probabilities
    torch.testing.assert_close(uniform, torch.full((steps,), 1 / steps, dtype=torch.float64))


@pytest.mark.parametrize("levels", [None, 17])
@each_chain
def test_pilot_serves_an_estimate_on_any_chain(betas, levels):
    """With its pilot the estimate of 100 images is the closed form within 4 noise errors, on chains of any length.

    200 replicates stand behind the error: its own deviation is 7 %.
    """
    reverse = process(levels, betas=betas)
    model, x_0 = PosteriorMean(reverse.forward), images(100, levels=levels)
    pilot = fit_pilot(model, reverse, images(200, levels=levels, seed=1))
    result = estimate_vlb(model, reverse, [x_0], pilot)
    assert abs(result.bits_per_dim - expected_bits(x_0, levels, betas).mean()) < 4 * result.noise_se
    assert 0 < result.noise_se < 0.1


@pytest.mark.parametrize("factor", [1.0, 0.8])
@each_chain
def test_probabilities_follow_the_terms(betas, factor):
    """p_t is as good as the root mean square of L_t: the second moment of L_t / p_t is within 4 % of its least.

    By Cauchy-Schwarz sum_t E[L_t^2] / p_t >= (sum_t rms_t)^2, with equality for p_t proportional to rms_t, both in
    closed form here. Where p_t is off by a factor e^d the excess is the mean of d^2 under p: 4 % allow a root mean
    square of d = 0.2, two bandwidths of the smoothing in curves that are close to straight.
    """
    reverse, x_0 = process(betas=betas), images(400)
    model = PosteriorMean(reverse.forward, factor)
    p = fit_pilot(model, reverse, x_0, num_calls=4000, uniform_fraction=1e-3, control_variate=False).probabilities
    square = torch.from_numpy(expected_moments(x_0, betas, factor)[1].mean(0))
    least = square.sqrt().sum() ** 2
    assert 1 - 1e-9 < float((square / p).sum() / least) < 1.04
    # Even draws would not pass but on the shortest chains.
    assert float((square * len(p)).sum() / least) > 1.04 or len(p) == 1


def test_probabilities_follow_the_jumps_of_an_uneven_chain():
    """A chain of hand-picked steps jumps from 264 to 600, and that step holds far more than its neighbours.

    The bound of the test above, and no step has less than half of its share: a step between two probes too.
    """
    whole = ForwardProcess.from_betas(make_betas("linear", 1000))
    betas = whole.respace([*range(265), *range(600, 635)]).betas
    reverse, x_0 = process(betas=betas), images(400)
    p = fit_pilot(PosteriorMean(reverse.forward), reverse, x_0, control_variate=False).probabilities
    rms = torch.from_numpy(expected_moments(x_0, betas)[1].mean(0)).sqrt()
    assert rms[265] > 5 * rms[264] and rms[265] > 5 * rms[266]
    assert float((rms**2 / p).sum() / rms.sum() ** 2) < 1.04
    assert float((p * rms.sum() / rms).min()) > 0.5


def test_the_decoder_s_probability_is_its_own():
    """t = 0 is not smoothed with the others: p_0 / sum_t p_t rms_t is that of the moments, to 4 standard errors.

    The mean square over n = 1060 calls has a relative error of sqrt(E[L^4] / E[L^2]^2 - 1) / sqrt(n), taken from 2000
    draws of evaluate_vlb; its root has half of it. The sum over the other steps, smoothed, is given 5 %.
    """
    reverse, x_0 = process(), images(400)
    model = PosteriorMean(reverse.forward)
    pilot = fit_pilot(model, reverse, x_0, num_calls=4000, uniform_fraction=1e-3, control_variate=False)
    rms = torch.from_numpy(expected_moments(x_0)[1].mean(0)).sqrt()
    draws = evaluate_vlb(model, reverse, images(2000, seed=5), generator=seeded(9)).terms[:, 0]
    error = 0.5 * float((draws**4).mean() / (draws**2).mean() ** 2 - 1) ** 0.5 / 1060**0.5
    p = pilot.probabilities
    assert abs(float((p[0] / p[1:].sum()) / (rms[0] / rms[1:].sum()) - 1)) < 4 * error + 0.05


def test_probabilities_reduce_the_noise():
    """The estimate with the pilot's p_t has less than half the noise variance of the even draws."""
    reverse = process(betas=make_betas("linear", 200))
    model, x_0 = PosteriorMean(reverse.forward), images(50)
    p = fit_pilot(model, reverse, images(20, seed=1), control_variate=False)
    even = estimate_vlb(model, reverse, [x_0], torch.ones(200), calls_per_image=16)
    good = estimate_vlb(model, reverse, [x_0], p, calls_per_image=16)
    assert good.noise_se**2 < 0.5 * even.noise_se**2


def test_pilot_works_on_a_respaced_chain():
    """On a respaced chain p_t has one entry for each step kept, and the network is told the original timesteps."""
    kept = [0, 3, 4, 8, T - 1]
    reverse = process(17).respace(kept)
    model = PosteriorMean(reverse.forward)
    pilot = fit_pilot(model, reverse, images(50, levels=17))
    assert pilot.probabilities.shape == (5,) and sorted(set(model.told)) == kept
    x_0 = images(50, levels=17, seed=1)
    result = estimate_vlb(model, reverse, [x_0], pilot)
    exact = expected_bits(x_0, 17, reverse.forward.betas).mean()
    assert abs(result.bits_per_dim - exact) < 4 * result.noise_se


# --- fit_pilot: what it spends, and on what


@pytest.mark.parametrize("num_calls", [1, 5, 12, 13, 100, 128, 500, 1024])
@pytest.mark.parametrize("steps", [1, 12, 1000])
def test_calls_are_counted_and_kept(steps, num_calls):
    """The calls made are those reported, and at most those allowed, but for one at each step probed.

    What is left over is less than one more call for each share of the steps probed, of which there are at most 67.
    """
    reverse = process(betas=make_betas("linear", steps, 0.01, 0.1))
    model = PosteriorMean(reverse.forward)
    pilot = fit_pilot(model, reverse, images(3), num_calls=num_calls)
    probed = len(set(model.told))
    assert pilot.num_calls == len(model.told) <= max(num_calls, probed)
    assert probed <= 64 and pilot.num_calls > num_calls - (probed + 3)
    assert {0, steps - 1} <= set(model.told)
    assert (pilot.control is not None) == (pilot.num_calls >= 128)


def test_one_image_gives_no_control_variate():
    """One image has no covariance: there are probabilities, and no control variate."""
    reverse = process()
    model = PosteriorMean(reverse.forward)
    pilot = fit_pilot(model, reverse, images(1))
    assert pilot.control is None and float(pilot.probabilities.sum()) == pytest.approx(1)
    assert fit_pilot(model, reverse, images(2)).control is not None
    assert fit_pilot(model, reverse, images(2), control_variate=False).control is None


@pytest.mark.parametrize("levels", [None, 256])
@pytest.mark.parametrize("n", [2, 3, 7, 11])
def test_identical_images_give_no_control_variate(n, levels):
    """Without variance in the pilot there is no model of the data, however the mean of equal numbers is rounded."""
    reverse = process(levels)
    model = PosteriorMean(reverse.forward)
    for value in (-1.0, 77 * 2 / 255 - 1, 0.6):
        same = torch.full((n, *SHAPE), value, dtype=torch.float64)
        assert fit_pilot(model, reverse, same, num_calls=256).control is None
    pattern = images(1, levels=levels).repeat(n, 1, 1, 1)
    pilot = fit_pilot(model, reverse, pattern, num_calls=256)
    assert pilot.control is None
    x_0 = images(40, levels=levels, seed=1)
    result = estimate_vlb(model, reverse, [x_0], pilot)
    assert abs(result.bits_per_dim - expected_bits(x_0, levels).mean()) < 4 * result.noise_se


def test_the_call_size_is_kept():
    """No network call of the pilot gets more values than allowed."""
    sizes = []

    def model(x_t, timesteps):
        sizes.append(x_t.numel())
        return torch.zeros_like(x_t)

    pilot = fit_pilot(model, process(), images(5), num_calls=200, values_per_call=100)
    assert max(sizes) == 96 and sum(sizes) == 16 * pilot.num_calls and len(sizes) == math.ceil(pilot.num_calls / 6)


def test_the_seed_decides_the_pilot():
    """Equal seeds give equal pilots whatever torch's global state, and others do not."""
    reverse = process()
    model = PosteriorMean(reverse.forward)
    states = []
    for seed in (1, 1, 2):
        states.append(fit_pilot(model, reverse, images(30), num_calls=256, seed=seed).state_dict())
        torch.manual_seed(123)
    first, again, other = states
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["probabilities"], other["probabilities"])
    assert not torch.equal(first["slopes"], other["slopes"])


def test_every_image_is_used_before_one_is_used_twice():
    """The calls go round the images in random order: with as many calls as images each is seen once."""
    reverse, seen = process(), []

    def model(x_t, timesteps, class_labels):
        seen.extend(class_labels.tolist())
        return torch.zeros_like(x_t)

    pilot = fit_pilot(model, reverse, images(50), num_calls=150, conditioning={"class_labels": torch.arange(50)})
    assert pilot.num_calls == 150 and sorted(seen) == sorted(list(range(50)) * 3)
    assert seen[:50] != list(range(50)) and sorted(seen[:50]) == list(range(50))


@pytest.mark.parametrize("control_variate", [True, False])
def test_further_processes_get_slopes_and_a_share_each(control_variate):
    """A pilot for several processes is made of what one for each would find in the same draws, p_t in equal parts."""
    reverse = process(17)
    processes = reverse, replace(reverse, clip_sample=True), replace(reverse, variance_type="fixed_large")
    model, x_0 = PosteriorMean(reverse.forward), images(60, levels=17)
    options = {"num_calls": 512, "control_variate": control_variate}
    together = fit_pilot(model, processes[0], x_0, also=processes[1:], **options)
    calls = len(model.told)
    assert together.num_calls == calls
    alone = [fit_pilot(model, process, x_0, **options) for process in processes]
    share = torch.stack([pilot.probabilities for pilot in alone]).mean(0)
    torch.testing.assert_close(together.probabilities, share, rtol=1e-10, atol=0)
    if not control_variate:
        assert together.control is None
        return
    slopes = torch.cat([pilot.control.slopes for pilot in alone])
    assert slopes.shape == (3, T, 2) and not torch.equal(slopes[0], slopes[2])
    torch.testing.assert_close(together.control.slopes, slopes, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(together.control.scale, alone[0].control.scale, rtol=1e-12, atol=0)


@pytest.mark.parametrize("values_per_call", [1, 7 * 16, 65536])
def test_conditioning_reaches_the_right_image(values_per_call):
    """A network that knows the answer from the label has no KL: all of p_t but the uniform share is at the decoder."""
    reverse, x_0 = process(17), images(9, levels=17)
    options = {"uniform_fraction": 0.12, "control_variate": False, "values_per_call": values_per_call}
    labels = torch.arange(9)
    p = fit_pilot(oracle(x_0), reverse, x_0, conditioning={"class_labels": labels}, **options).probabilities
    torch.testing.assert_close(p[1:], torch.full((T - 1,), 0.01, dtype=torch.float64), rtol=1e-6, atol=0)
    wrong = fit_pilot(oracle(x_0), reverse, x_0, conditioning={"class_labels": labels.roll(1)}, **options)
    assert float(wrong.probabilities[1:].min()) > 0.0101


# --- state


def test_saved_pilots_give_the_same_estimate():
    """A pilot that went through a file, as plain tensors, gives the same estimate to the last bit."""
    reverse = process(17)
    model, x_0 = PosteriorMean(reverse.forward), images(6, levels=17)
    for num_calls, has_control in ((512, True), (64, False)):
        pilot = fit_pilot(model, reverse, images(50, levels=17, seed=1), num_calls=num_calls)
        assert (pilot.control is not None) == has_control
        file = io.BytesIO()
        torch.save(pilot.state_dict(), file)
        file.seek(0)
        loaded = Pilot.from_state_dict(torch.load(file, weights_only=True))
        assert loaded.num_calls == pilot.num_calls and (loaded.control is not None) == has_control
        mine, its = (estimate_vlb(model, reverse, [x_0], p) for p in (pilot, loaded))
        assert torch.equal(mine.per_image, its.per_image) and mine.noise_se == its.noise_se


@pytest.mark.parametrize("levels", [None, 2, 17])
@each_kind
def test_state_of_every_kind_of_control_variate(kind, levels):
    """Dense or stationary, with levels or without: the state holds all that the values of C_t depend on."""
    control = control_variate(kind, levels=levels)
    pilot = Pilot(torch.ones(T), control, 7)
    loaded = Pilot.from_state_dict(pilot.state_dict())
    assert loaded.control.levels == levels and loaded.control.gaussian.stationary == (kind == "stationary")
    x_0, (image, t) = correlated(3, levels=levels), every_pair(3)
    noise = torch.randn(len(t), *SHAPE, generator=seeded(10))
    mine, its = (c.at(c.prepare(x_0), image, t, noise) for c in (control, loaded.control))
    assert torch.equal(mine[0], its[0]) and torch.equal(mine[1], its[1])


# --- errors


@pytest.mark.parametrize("fraction", [0.0, -0.5, 2.0, float("nan")])
def test_an_impossible_uniform_share_is_refused(fraction):
    """A share of uniform draws outside its documented (0, 1] is refused, not turned into negative probabilities."""
    reverse = process()
    with pytest.raises(ValueError, match="uniform_fraction"):
        fit_pilot(PosteriorMean(reverse.forward), reverse, images(2), uniform_fraction=fraction)


@pytest.mark.parametrize("num_calls", [0, -1])
def test_no_calls_are_refused(num_calls):
    """A pilot without a network call knows nothing."""
    reverse = process()
    with pytest.raises(ValueError, match="num_calls"):
        fit_pilot(PosteriorMean(reverse.forward), reverse, images(2), num_calls=num_calls)


def test_processes_of_another_chain_are_refused():
    """One network output serves them all, so that they must be of one chain: the same steps, told alike."""
    reverse = process()
    others = (
        reverse.respace([0, 5, T - 1]),
        process(betas=make_betas("squaredcos_cap_v2", T)),
        process(betas=BETAS[:5]),
    )
    for other in others:
        with pytest.raises(ValueError, match="same chain"):
            fit_pilot(PosteriorMean(reverse.forward), reverse, images(5), also=[other])


def test_nan_names_the_step_and_the_pilot_s_image():
    """A NaN at one step of one image is blamed on both."""

    def model(x_t, timesteps, class_labels):
        bad = (class_labels == 3) & (timesteps == 7)
        return torch.where(bad.reshape(-1, 1, 1, 1), torch.nan, torch.zeros_like(x_t))

    reverse = process().respace([2, 7, T - 1])
    with pytest.raises(FloatingPointError, match=r"model's output.*t=1 \(timestep 7\), image 3\."):
        fit_pilot(model, reverse, images(5), conditioning={"class_labels": torch.arange(5)})


@pytest.mark.parametrize("total", [1, 5, 64, 65, 1000, 2048, 2049, 60_000])
@pytest.mark.parametrize("dims", [1, 64, 3072, 3 * 256 * 256, 3 * 1024 * 1024])
def test_pilot_positions(total, dims):
    """Different ones in order, spread evenly: 2048, fewer where they are large, but 64, and no more than there are."""
    positions = pilot_positions(total, dims)
    assert len(positions) == min(total, 2048, max(64, 2**25 // dims))
    assert positions[0] == 0 and positions[-1] < total
    gaps = np.diff([*positions, total])
    assert gaps.min() >= 1 and gaps.max() - gaps.min() <= 1
