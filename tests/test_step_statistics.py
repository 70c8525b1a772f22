"""Cost tables of real outputs against the bound itself, and optimal variances against closed forms."""

import math

import analytic
import pytest
import torch

from ddpm_vlb import (
    DiagonalGaussian,
    ForwardProcess,
    ReverseProcess,
    collect_statistics,
    evaluate_vlb,
    make_betas,
    optimal_paths,
    spread_knots,
    step_costs,
    vlb_term,
)
from ddpm_vlb.respacing import VARIANCES
from ddpm_vlb.step_statistics import MIN_IMAGES
from ddpm_vlb.transition_costs import crossfitted_cost

T = analytic.T
EVERY = torch.arange(T)
LEVELS = 17


def network(reverse: ReverseProcess, channels: int = 1):
    """x_0_hat = g_t x_t with a factor that is wrong, and a variance half that depends on both."""
    mean = analytic.PosteriorMean(reverse.forward, 0.8)

    def call(x_t, timesteps):
        out = mean(x_t, timesteps)
        if not reverse.learns_variance:
            return out
        scale = -3.0 if reverse.variance_type == "learned" else 0.0
        v = scale + torch.tanh(3 * x_t) + 0.05 * timesteps.reshape(-1, *[1] * (x_t.ndim - 1)).to(x_t)
        return torch.cat([out, v], dim=1)

    return call


def gathered(variance_type="fixed_small", images=40, levels=LEVELS, knots=EVERY, **options):
    """p, network, data, noise and statistics of a small chain."""
    reverse = analytic.process(levels, variance_type=variance_type, **options)
    model, x_0 = network(reverse), analytic.images(images, levels=levels)
    noise = torch.randn(T, *x_0.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    statistics = collect_statistics(model, reverse, x_0, knots, noise=noise[knots], decoder_dims=16)
    return reverse, model, x_0, noise, statistics


def bound(reverse, model, x_0, noise, indices, **options) -> torch.Tensor:
    """The mean terms of a respaced chain with the same noise at each step, nats per dimension, (K,)."""
    p = reverse.respace(indices, options.pop("shift", None))
    terms = evaluate_vlb(model, p, x_0, noise[indices]).terms
    return terms.mean(0) / x_0[0].numel()


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned", "learned_range"])
def test_the_table_is_the_bound(variance_type, clip):
    """Every L(t, s) equals the term of the chain (s, t) scored by `evaluate_vlb` on the same images and noise."""
    reverse, model, x_0, noise, statistics = gathered(variance_type, images=6, clip_sample=clip)
    costs = step_costs(statistics, reverse, "network").transitions
    for t in range(1, T):
        for s in range(t):
            expected = float(bound(reverse, model, x_0, noise, [s, t])[1])
            assert float(costs[t, s]) == pytest.approx(expected, rel=1e-7), (t, s)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned", "learned_range"])
def test_all_steps_are_the_full_bound(variance_type):
    """K = T: the path visits every step, and its cost is the training chain's bound, decoder and all."""
    reverse, model, x_0, noise, statistics = gathered(variance_type, images=6)
    costs = step_costs(statistics, reverse, "network")
    found = optimal_paths(costs.transitions, costs.decoder, T)
    assert found.indices(T) == list(range(T)) and float(costs.shift[0]) == 0.0
    expected = float(bound(reverse, model, x_0, noise, list(range(T))).sum())
    # The decoder's samples are kept in float32.
    assert float(found.costs[-1]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("variance_type", ["fixed_small", "learned_range"])
def test_every_path_costs_what_it_scores(variance_type, variance):
    """The reported cost of each K is the bound of exactly the chain that would be stored, on the same images."""
    reverse, model, x_0, noise, statistics = gathered(variance_type)
    costs = step_costs(statistics, reverse, variance)
    found = optimal_paths(costs.transitions, costs.decoder, T)
    errors = statistics.errors(reverse.forward)
    for steps in (1, 2, 3, 5, 8):
        indices = found.indices(steps)
        shift = float(costs.shift[indices[0]])
        p = reverse.respace(indices, shift)
        if variance != "network":
            p = reverse.respace(indices)
            p = ReverseProcess(p.forward, "sample", variance_type, False, LEVELS, x_0_mse=errors.at(indices, variance))
            p = p.respace(range(steps), shift)
        scored = evaluate_vlb(model, p, x_0, noise[indices]).terms.sum(1).mean() / x_0[0].numel()
        assert float(found.costs[steps - 1]) == pytest.approx(float(scored), rel=2e-5), steps


def test_per_pixel_is_never_worse_in_sample():
    """Each pixel's own error, drawn towards the mean or not, prices the images that it came from no dearer."""
    reverse, *_, statistics = gathered()
    scalar, pixels = (step_costs(statistics, reverse, kind).transitions for kind in ("analytic", "per_pixel"))
    below = torch.ones(T, T, dtype=torch.bool).tril(-1)
    assert bool((pixels[below] <= scalar[below] + 1e-12).all())
    assert bool((pixels[below] < scalar[below] - 1e-6).any())


@pytest.mark.parametrize("betas", [analytic.BETAS, make_betas("squaredcos_cap_v2", T)], ids=["linear", "cosine"])
@pytest.mark.parametrize("indices", [list(range(T)), [0, 4, 5, 11], [3, 11], [11]])
def test_the_optimal_variance_is_the_posterior_s(betas, indices):
    """On Gaussian data with the exact mean, betatilde + c0^2 m is the variance of q(x_s | x_t), known in closed form.

    The other way to it, Bao et al. 2022a, theorem 1, from E|epsilon_hat|^2, agrees.
    """
    forward = ForwardProcess.from_betas(betas).respace(indices)
    abar, lam = forward.alphas_cumprod, analytic.VARIANCE
    previous = torch.cat([abar.new_ones(1), abar[:-1]])
    m = lam * (1 - abar) / (abar * lam + 1 - abar)
    p = ReverseProcess(forward, "sample", x_0_mse=m, clip_sample=False)
    got = p.coefficients(torch.arange(len(indices)), torch.empty(0, 1, dtype=torch.float64)).log_variance_offset.exp()
    var_s, var_t = previous * lam + 1 - previous, abar * lam + 1 - abar
    covariance = (abar / previous).sqrt() * var_s
    torch.testing.assert_close(got.flatten(), var_s - covariance.square() / var_t, rtol=1e-9, atol=1e-12)
    square = (1 - abar) / var_t  # E epsilon_hat^2, of the exact epsilon_hat
    alpha, small = abar / previous, forward.posterior_variance
    by_epsilon = small + (((1 - abar) / alpha).sqrt() - (1 - previous - small).clamp(min=0).sqrt()).square() * (
        1 - square
    )
    torch.testing.assert_close(got.flatten(), by_epsilon, rtol=1e-8, atol=1e-12)


def test_errors_converge_to_the_closed_form():
    """m of 4000 images lies within 4 standard errors of the Gaussian model's, at every step (a mean of squares)."""
    reverse = analytic.process(None)
    x_0 = torch.randn(4000, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x_0 = (x_0 * 0.05).clamp(-1, 1)  # never clamped: 20 standard deviations
    gain = 0.5

    def model(x_t, timesteps):
        return gain * x_t

    statistics = collect_statistics(model, reverse, x_0, EVERY, decoder_dims=4)
    abar = reverse.forward.alphas_cumprod
    expected = (1 - gain * abar.sqrt()).square() * 0.05**2 + gain**2 * (1 - abar)
    standard_error = expected * math.sqrt(2 / x_0.numel())
    assert bool(((statistics.curve() - expected).abs() < 4 * standard_error).all())


def test_the_decoder_s_variance_is_searched():
    """No shift within 2 of the one that was found is cheaper, for any step and kind of variance."""
    reverse, model, x_0, noise, statistics = gathered()
    costs = step_costs(statistics, reverse, "network")
    for t in range(1, T):

        def cost(shift, t=t):
            return float(bound(reverse, model, x_0, noise, [t], shift=shift)[0])

        best = cost(float(costs.shift[t]))
        assert float(costs.decoder[t]) == pytest.approx(best, rel=1e-5)
        assert best <= min(cost(float(costs.shift[t]) + d) for d in (-2, -0.5, -0.1, 0.1, 0.5, 2)) + 1e-6


def model_x_0(model, reverse, x_0, noise, t):
    """The network's x_0_hat at one step."""
    diffused = reverse.forward.diffuse(x_0, torch.full((len(x_0),), t), noise)
    return model(diffused.x_t, diffused.t)


def test_crossfitting_prices_the_other_half():
    """Each half's errors, priced on the other, by the reverse process itself."""
    reverse, model, x_0, noise, statistics = gathered()
    path, halves = [1, 4, 11], (slice(0, None, 2), slice(1, None, 2))
    costs, total = step_costs(statistics, reverse, "analytic"), 0.0
    for half in (0, 1):
        fitted = statistics.curve(half)[path]
        p = ReverseProcess(reverse.forward.respace(path), "sample", clip_sample=False, levels=LEVELS, x_0_mse=fitted)
        others = halves[1 - half]
        terms = evaluate_vlb(model, p, x_0[others], noise[path][:, others]).terms[:, 1:]
        total += float(terms.sum(1).mean()) / x_0[0].numel() / 2
        m = statistics.curve(half)[1] * costs.shift[1].exp()
        p = DiagonalGaussian(model_x_0(model, reverse, x_0[others], noise[1][others], 1), m.log())
        total -= float(p.discretized_log_prob(x_0[others], LEVELS).mean()) / 2
    assert crossfitted_cost(statistics, reverse, "analytic", path, costs) == pytest.approx(total, rel=1e-5)
    own = step_costs(statistics, reverse, "per_pixel")
    in_sample = float(own.transitions[4, 1] + own.transitions[11, 4] + own.decoder[1])
    assert crossfitted_cost(statistics, reverse, "per_pixel", path, own) > in_sample


def test_parts_add_up():
    """The statistics of all images are those of their parts, whatever the size of the network's calls."""
    reverse, model = analytic.process(LEVELS, variance_type="learned_range"), None
    model, x_0 = network(reverse), analytic.images(10, levels=LEVELS)
    whole = collect_statistics(model, reverse, x_0, EVERY, seed=5, decoder_dims=4)
    parts = [
        collect_statistics(model, reverse, x_0[own], EVERY, own, 5, decoder_dims=4, values_per_call=50)
        for own in ([0, 1, 2], [3, 4, 5, 6, 7, 8], [9])
    ]
    merged = parts[0].merge(parts[1]).merge(parts[2])
    assert merged.images.tolist() == whole.images.tolist() == [5, 5]
    for name in ("squared", "learned", "samples", "dims", "halves"):
        torch.testing.assert_close(getattr(merged, name), getattr(whole, name), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("total, number", [(1000, 100), (1000, 2), (12, 100), (4000, 100)])
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_knots_cover_the_chain(schedule, total, number):
    """Both ends, ascending, no more than asked for, and no gap in t of more than a few times the even one."""
    knots = spread_knots(ForwardProcess.from_betas(make_betas(schedule, total)), number)
    assert int(knots[0]) == 0 and int(knots[-1]) == total - 1 and len(knots) <= number
    gaps = knots.diff()
    assert int(gaps.min()) > 0 and int(gaps.max()) <= 2 * (total - 1) / (min(number, total) - 1) + 1


def test_knots_are_enough():
    """The table from 12 of 60 steps is within 2 % of the one from all, at every transition of optimal paths."""
    betas = make_betas("linear", 60, 0.005, 0.2)
    reverse = analytic.process(LEVELS, betas=betas)
    model, x_0 = analytic.PosteriorMean(reverse.forward, 0.8), analytic.images(60, levels=LEVELS)
    tables = [
        step_costs(collect_statistics(model, reverse, x_0, knots), reverse, "analytic")
        for knots in (torch.arange(60), spread_knots(reverse.forward, 12))
    ]
    path = optimal_paths(tables[1].transitions, tables[1].decoder, 10).indices(10)
    costs = [float(table.transitions[path[1:], path[:-1]].sum() + table.decoder[path[0]]) for table in tables]
    assert costs[1] == pytest.approx(costs[0], rel=0.02)


@pytest.mark.parametrize("same", [True, False])
def test_the_weight_of_the_mean(same):
    """Pixels that have one error in truth are drawn to their mean altogether; very unequal ones hardly."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.ones(1, 8, 8) if same else torch.logspace(-2, 1, 64).reshape(1, 8, 8)
    reverse = analytic.process(None, dtype=torch.float64)
    x_0 = (0.02 * scale * torch.randn(200, 1, 8, 8, generator=generator)).double().clamp(-1, 1)
    statistics = collect_statistics(lambda x_t, t: torch.zeros_like(x_t), reverse, x_0, EVERY)
    weight = statistics.pseudo_images
    assert weight >= 500 if same else weight <= 8
    shrunk, mean = statistics.shrunk(weight).flatten(1), statistics.curve()[:, None]
    spread = ((shrunk - mean).abs() / mean).max()
    assert spread < 0.3 if same else spread > 3


def test_a_few_dimensions_speak_for_all():
    """The decoder's cost from 3 of 16 dimensions of each image is within 4 SE of that from all, at every step."""
    reverse, model = analytic.process(LEVELS), None
    model, x_0 = network(reverse), analytic.images(400, levels=LEVELS)
    few, whole = (
        step_costs(collect_statistics(model, reverse, x_0, EVERY, decoder_dims=dims), reverse, "analytic")
        for dims in (3, 16)
    )
    # Of -log p, which spreads by less than 2 nats; the shift is searched in each.
    assert bool(((few.decoder - whole.decoder).abs() < 4 * 2 / math.sqrt(400 * 3)).all())
    assert not torch.equal(few.decoder, whole.decoder)


def test_bad_input():
    """Too few images for each pixel, data off its levels, and a network that puts out NaN."""
    reverse, model, x_0, noise, statistics = gathered(images=MIN_IMAGES - 1)
    with pytest.raises(ValueError, match=f"at least {MIN_IMAGES} images, but there are {MIN_IMAGES - 1}"):
        statistics.errors(reverse.forward)
    assert statistics.errors(reverse.forward, per_pixel=False).per_pixel is None
    with pytest.raises(ValueError, match="One half of the images is empty"):
        step_costs(collect_statistics(model, reverse, x_0[:4], EVERY, [0, 2, 4, 6]), reverse, "per_pixel")
    with pytest.raises(ValueError, match="the statistics of other steps"):
        statistics.merge(collect_statistics(model, reverse, x_0[:4], EVERY[1:]))
    with pytest.raises(ValueError, match="`number` must be at least 2"):
        spread_knots(reverse.forward, 1)
    with pytest.raises(ValueError, match="levels"):
        collect_statistics(model, reverse, x_0 + 0.01, EVERY)
    with pytest.raises(FloatingPointError, match="index t=3, image 7"):
        collect_statistics(
            lambda x_t, t: torch.where((t == 3).reshape(-1, 1, 1, 1), torch.nan, x_t), reverse, x_0[:1], EVERY, [7]
        )


def test_a_term_by_hand():
    """One image, one step: m is its mean squared error, and vlb_term at that variance is 1/2 log(1 + r m)."""
    reverse, model, x_0, noise, statistics = gathered(images=2, levels=None)
    diffused = reverse.forward.diffuse(x_0, torch.tensor([5, 5]), noise[5])
    error = (x_0 - model(diffused.x_t, diffused.t)).square()
    torch.testing.assert_close(statistics.mse()[5], error.mean(0))
    p = ReverseProcess(reverse.forward, "sample", clip_sample=False, levels=None, x_0_mse=statistics.curve())
    got = vlb_term(p, model(diffused.x_t, diffused.t), diffused).mean() / x_0[0].numel()
    snr = p.forward.alphas_cumprod / (1 - p.forward.alphas_cumprod)
    assert float(got) == pytest.approx(0.5 * math.log1p(float((snr[4] - snr[5]) * error.mean())), rel=1e-10)
