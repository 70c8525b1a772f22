"""The cost of every transition against the reverse process itself, and the dynamic programme against brute force."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_vlb import ForwardProcess, ReverseProcess, make_betas, optimal_paths, vlb_term
from ddpm_vlb.optimal_paths import Chebyshev, analytic_costs, fixed_costs, priced, transitions

BETAS = make_betas("linear", 12, 0.05, 0.5)
FORWARD = ForwardProcess.from_betas(BETAS)
PAIRS = transitions(FORWARD)
BELOW = [(t, s) for t in range(12) for s in range(t)]
MSE = torch.linspace(0.02, 0.8, 12, dtype=torch.float64)


def term(t: int, s: int, mse: float, **options) -> float:
    """KL(q(x_s | x_t, x_0) || p(x_s | x_t)) of one value whose squared error is `mse`, by the chain s, t itself."""
    p = ReverseProcess(FORWARD, "sample", clip_sample=False, **options).respace([s, t])
    x_0, error = torch.zeros(1, 1, 1, dtype=torch.float64), mse**0.5
    noise = torch.randn(1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(t))
    diffused = p.forward.diffuse(x_0, torch.tensor([1]), noise)
    return float(vlb_term(replace(p, levels=None), torch.full_like(x_0, error), diffused))


@pytest.mark.parametrize("t, s", BELOW)
@pytest.mark.parametrize("large", [False, True])
def test_fixed_costs_are_the_reverse_process_s(t, s, large):
    """L(t, s) of both fixed variances is the KL of the two-step chain (s, t), for every pair of steps."""
    expected = term(t, s, float(MSE[t]), variance_type="fixed_large" if large else "fixed_small")
    assert float(fixed_costs(PAIRS, MSE, large)[t, s]) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("t, s", BELOW)
def test_analytic_costs_are_the_reverse_process_s(t, s):
    """The same at the optimal variance betatilde + c0^2 m, which `x_0_mse` gives."""
    expected = term(t, s, float(MSE[t]), x_0_mse=MSE)
    assert float(analytic_costs(PAIRS, MSE)[t, s]) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("t, s", BELOW)
def test_costs_of_other_errors(t, s):
    """`priced` is the KL where the variance was made from errors that are not the data's."""
    fitted = 2.5 * MSE.flip(0)
    expected = term(t, s, float(MSE[t]), x_0_mse=fitted)
    assert float(priced(PAIRS.snr_gap[t, s], fitted[t], MSE[t])) == pytest.approx(expected, rel=1e-10)


@given(st.floats(1e-6, 1e6), st.floats(1e-6, 1e3), st.floats(0.01, 100))
def test_the_optimal_variance_is_optimal(gap, mse, factor):
    """No other error makes a cheaper variance than the data's own."""
    gap, mse = torch.tensor(gap, dtype=torch.float64), torch.tensor(mse, dtype=torch.float64)
    best = float(priced(gap, mse, mse))
    assert best == pytest.approx(0.5 * float(torch.log1p(gap * mse)), rel=1e-12)
    assert float(priced(gap, factor * mse, mse)) >= best * (1 - 1e-12)


def brute_force(costs: torch.Tensor, first: torch.Tensor, steps: int) -> tuple[float, list[int]]:
    """The cheapest of all paths of so many steps."""
    last = len(first) - 1
    every = ([*path, last] for path in itertools.combinations(range(last), steps - 1))
    return min((float(first[p[0]] + sum(costs[t, s] for s, t in zip(p, p[1:]))), p) for p in every)


@pytest.mark.parametrize("total", range(1, 13))
def test_dynamic_programming_is_brute_force(total):
    """Cost and path equal the cheapest of all paths, for every T up to 12 and every K."""
    generator = torch.Generator().manual_seed(total)
    costs = torch.rand(total, total, generator=generator, dtype=torch.float64)
    first = torch.rand(total, generator=generator, dtype=torch.float64)
    found = optimal_paths(costs, first, total)
    for steps in range(1, total + 1):
        cost, path = brute_force(costs, first, steps)
        assert found.indices(steps) == path
        assert float(found.costs[steps - 1]) == pytest.approx(cost, rel=1e-12)


@settings(max_examples=50)
@given(st.integers(2, 10), st.integers(0, 2**31))
def test_the_cost_of_a_path_is_the_sum_of_its_parts(total, seed):
    """What is reported for K steps is what its traced path costs; it starts anywhere and ends at the last step."""
    generator = torch.Generator().manual_seed(seed)
    costs, first = torch.rand(2, total, total, generator=generator, dtype=torch.float64).unbind()
    first = first[0]
    found = optimal_paths(costs, first, total)
    for steps in range(1, total + 1):
        path = found.indices(steps)
        assert len(path) == steps and path[-1] == total - 1 and sorted(set(path)) == path
        own = first[path[0]] + costs[path[1:], path[:-1]].sum()
        assert float(found.costs[steps - 1]) == pytest.approx(float(own), rel=1e-12)


@settings(max_examples=50)
@given(st.integers(0, 2**31))
def test_more_steps_cost_no_more(seed):
    """With betatilde and errors that grow with t a step in between never costs anything: m_u <= m_t for u < t."""
    generator = torch.Generator().manual_seed(seed)
    mse = torch.rand(12, generator=generator, dtype=torch.float64).cumsum(0)
    # A decoder that gets no dearer by starting earlier, as one more step at the front must not cost either.
    costs = fixed_costs(PAIRS, mse)
    found = optimal_paths(costs, torch.zeros(12, dtype=torch.float64) + costs[:, 0] * (torch.arange(12) > 0), 12)
    assert bool((found.costs[1:] <= found.costs[:-1] + 1e-12).all())


@pytest.mark.parametrize("total, most", [(1000, 100), (4000, 4)])
def test_long_chains(total, most):
    """Paths of every number of steps on chains of usual length; benchmarks/optimal_paths.py has time and memory."""
    forward = ForwardProcess.from_betas(make_betas("squaredcos_cap_v2", total))
    mse = torch.linspace(0.001, 0.9, total, dtype=torch.float64)
    found = optimal_paths(analytic_costs(transitions(forward), mse), 1 + mse, most)
    for steps in (1, 2, most):
        path = found.indices(steps)
        assert len(set(path)) == steps and path[-1] == total - 1


def test_zero_terminal_snr_has_finite_costs():
    """The last step of a chain without any signal left costs no NaN."""
    betas = BETAS.clone()
    betas[-1] = 1.0
    costs = analytic_costs(transitions(ForwardProcess.from_betas(betas)), MSE)
    assert bool(costs.isfinite().all())


@pytest.mark.parametrize("number", [24, 48])
def test_chebyshev_rows(number):
    """Smooth rows at their own points, to the accuracy that the costs need; the nodes give back the values."""
    nodes = Chebyshev.between(0.0, 9.0, number)
    rows = torch.rand(5, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 0.5
    at = torch.rand(5, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 9
    torch.testing.assert_close(nodes.rows_at((rows * nodes.nodes).exp(), at).log(), rows * at, rtol=0, atol=1e-7)
    values = torch.rand(5, number, dtype=torch.float64)
    torch.testing.assert_close(nodes.rows_at(values, nodes.nodes.expand(5, -1)), values)


@pytest.mark.parametrize("steps", [0, 13, 2.0, True, None])
def test_a_number_of_steps_that_no_path_has_is_refused(steps):
    """K outside 1 .. T, or no integer."""
    with pytest.raises(ValueError, match="`max_steps` must be an integer in 1 .. 12"):
        optimal_paths(analytic_costs(PAIRS, MSE), MSE, steps)


def test_bad_costs_are_refused():
    """NaN where a path could go, naming the steps; elsewhere it is not read."""
    costs = analytic_costs(PAIRS, MSE)
    costs[3, 5] = float("nan")
    optimal_paths(costs, MSE, 4)
    costs[5, 3] = float("nan")
    with pytest.raises(ValueError, match="from t=5 to s=3"):
        optimal_paths(costs, MSE, 4)
    with pytest.raises(ValueError, match="`first` must be finite, but at t=2"):
        optimal_paths(analytic_costs(PAIRS, MSE), MSE.clone().index_fill_(0, torch.tensor(2), torch.inf), 4)
    with pytest.raises(ValueError, match=r"are \(12, 12\) and \(11,\)"):
        optimal_paths(analytic_costs(PAIRS, MSE), MSE[1:], 4)


def test_a_respaced_chain_has_the_same_costs():
    """The costs read noise levels only: those of a respaced chain are the sub-table."""
    indices = [0, 3, 7, 11]
    short = transitions(FORWARD.respace(indices))
    torch.testing.assert_close(short.snr_gap.tril(-1), PAIRS.snr_gap[indices][:, indices].tril(-1))
