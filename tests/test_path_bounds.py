"""What the library says of one network is the same on every path, and exact where the network is."""

import math

import pytest
import torch
from path_networks import KINDS, rewritten

from ddpm_vlb import (
    collect_statistics,
    estimate_vlb,
    evaluate_vlb,
    fit_pilot,
    ode_log_prob,
    optimal_paths,
    spaced_ratios,
    spread_knots,
    step_costs,
)

SHAPE = (1, 2, 2)
RATIOS = spaced_ratios(0.05, 60.0, 40)
# Of the data, by dimension.
VARIANCE = torch.tensor([0.01, 0.1, 0.4, 1.5], dtype=torch.float64).reshape(SHAPE)


def posterior(r):
    """Gain and variance of x_0 given the VP variable, for data of `VARIANCE`."""
    r = r.reshape(-1, 1, 1, 1)
    signal, noise = 1 / (1 + r**2), r**2 / (1 + r**2)
    total = signal * VARIANCE + noise
    return signal.sqrt() * VARIANCE / total, VARIANCE * noise / total


def exact(x, log_r):
    """The epsilon that is the mean given x."""
    r = log_r.exp().reshape(-1, 1, 1, 1)
    n = (1 + r**2).sqrt()
    return (n * x - posterior(r)[0] * x) / r


def data(n: int, seed: int = 0):
    noise = torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return noise * VARIANCE.sqrt()


@pytest.mark.parametrize("kind", ["epsilon", *KINDS])
def test_the_exact_network_s_bound_is_the_negative_log_likelihood(kind):
    """With the posterior's variances p is the true reverse process: exact, but for the start from N(0, I).

    Every term is quadratic in the noise of each dimension, so that the mean over noise 1 and -1 is the expectation.
    """
    path, model = rewritten(kind, exact, RATIOS)
    reverse = path.reverse_process(x_0_mse=posterior(path.ratios)[1])
    x_0 = data(20)
    ones = torch.ones(len(RATIOS), *x_0.shape, dtype=torch.float64)
    bits = [evaluate_vlb(path.network(model), reverse, x_0, sign * ones).bits_per_dim for sign in (1, -1)]
    nll = -torch.distributions.Normal(0.0, VARIANCE.sqrt()).log_prob(x_0)
    noise = RATIOS[-1] ** 2 / (1 + RATIOS[-1] ** 2)
    total = (1 - noise) * VARIANCE + noise
    start = 0.5 * (((1 - noise) * x_0.square() + noise) * (1 - 1 / total) - total.log())
    expected = (nll + start).flatten(1).mean(1) / math.log(2)
    torch.testing.assert_close((bits[0] + bits[1]) / 2, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_one_network_has_one_estimate_on_every_path(kind):
    """The same pilot, draws and scores, to the rounding of float64."""
    estimates = []
    for own in ("epsilon", kind):
        path, model = rewritten(own, exact, RATIOS)
        network, reverse = path.network(model), path.reverse_process()
        pilot = fit_pilot(network, reverse, data(24, 5), 80)
        estimates.append(estimate_vlb(network, reverse, [data(8)], pilot=pilot, calls_per_image=8))
    torch.testing.assert_close(estimates[1].per_image, estimates[0].per_image, rtol=1e-6, atol=1e-6)
    assert estimates[1].noise_se == pytest.approx(estimates[0].noise_se, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_one_network_has_one_best_path_and_one_best_variance(kind):
    x_0, found = data(40, 3), []
    for own in ("epsilon", kind):
        path, model = rewritten(own, exact, RATIOS)
        reverse = path.reverse_process()
        knots = spread_knots(reverse.forward, 12)
        statistics = collect_statistics(path.network(model), reverse, x_0, knots)
        costs = step_costs(statistics, reverse, "per_pixel")
        found.append((statistics.errors(reverse.forward), optimal_paths(costs.transitions, costs.decoder, 10)))
    (errors, paths), (own_errors, own_paths) = found
    torch.testing.assert_close(own_errors.mean, errors.mean, rtol=1e-9, atol=0)
    torch.testing.assert_close(own_paths.costs, paths.costs, rtol=1e-6, atol=1e-6)
    assert own_paths.indices(10) == paths.indices(10)


@pytest.mark.parametrize("kind", KINDS)
def test_one_network_has_one_ode_on_every_path(kind):
    ratios, found = spaced_ratios(0.05, 60.0, 9), []
    for own in ("epsilon", kind):
        path, model = rewritten(own, exact, ratios)
        generator = torch.Generator().manual_seed(0)
        found.append(ode_log_prob(path.network(model), path.reverse_process(), data(3), generator))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["flow", "edm"])
def test_the_exact_network_s_ode_has_the_density_of_the_first_variable(kind):
    """In the mean over images to 1e-4 bits/dim, by 128 calls."""
    ratios = spaced_ratios(0.05, 60.0, 65)
    path, model = rewritten(kind, exact, ratios)
    noise = float(ratios[0] ** 2 / (1 + ratios[0] ** 2))
    total = (1 - noise) * VARIANCE + noise
    x_1 = data(20) * (total / VARIANCE).sqrt()
    log_prob = ode_log_prob(path.network(model), path.reverse_process(), x_1, probes=None)[0]
    expected = torch.distributions.Normal(0.0, total.sqrt()).log_prob(x_1).flatten(1).sum(1)
    assert abs(float((log_prob - expected).mean())) / 4 / math.log(2) < 1e-4
