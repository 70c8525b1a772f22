r"""The cost of every transition and decoder of a chain, priced by the statistics of a network's outputs.

A transition is priced by equations 1 and 2 of `optimal_paths` with the expectations of `step_statistics`: between the
steps that were visited m and G are interpolated in their logarithm, the rest linearly. For each step the variance of a
decoder there is searched.

Sources: Watson et al. 2021, section 3; Bao et al. 2022a, section 4.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .distributions import DiagonalGaussian
from .forward_process import posterior_coefficients
from .optimal_paths import Chebyshev, Transitions, analytic_costs, earlier, fixed_costs, priced, transitions
from .respacing import interpolate_log
from .reverse_process import ReverseProcess
from .step_statistics import RANGE_NODES, TINY, StepStatistics, range_nodes

_GAP_NODES = 48
_SEARCH = 3.0  # nats of log variance around the mean squared error in which a decoder's variance is searched


class StepCosts(NamedTuple):
    """Nats per dimension, of each transition (T, T) and of the decoder at each step (T,); its `decoder_shift` (T,).

    And the decoder's cost where its variance is made from the other half of the images, (T,).
    """

    transitions: Tensor
    decoder: Tensor
    shift: Tensor
    crossfitted_decoder: Tensor


def _linear(knots: Tensor, values: Tensor, total: int) -> Tensor:
    """Rows at every step of a chain, linear between knots (N, .), (T, .)."""
    at = torch.arange(total)
    upper = torch.searchsorted(knots, at).clamp(max=len(knots) - 1)
    lower = (upper - 1).clamp(min=0)
    gap = (knots[upper] - knots[lower]).clamp(min=1)
    fraction = torch.where(upper > lower, (at - knots[lower]) / gap, 1.0).double().clamp(0, 1)
    return torch.lerp(values[lower], values[upper], fraction.reshape(-1, *[1] * (values.ndim - 1)))


def step_costs(statistics: StepStatistics, reverse: ReverseProcess, variance: str) -> StepCosts:
    """The cost of every transition and decoder with one kind of variance.

    Args:
        statistics: of the network.
        reverse: p of the training chain, as they were made with.
        variance: "network" (what `reverse.variance_type` says), "analytic" or "per_pixel".
    """
    knots, total = statistics.knots, len(reverse.forward)
    pairs, every = transitions(reverse.forward), torch.arange(total)
    curve = interpolate_log(knots, statistics.curve(), every)
    if variance == "analytic":
        table = analytic_costs(pairs, curve)
    elif variance == "per_pixel":
        table = _per_pixel_costs(pairs, statistics, total)
    elif reverse.learns_variance:
        table = _learned_costs(pairs, statistics, reverse)
    else:
        table = fixed_costs(pairs, curve, reverse.variance_type.startswith("fixed_large"))
    shift = _decoder_shift(statistics, reverse, variance)
    decoder, crossfitted = (
        _linear(knots, _decoder_cost(statistics, reverse, base, shift), total)
        for base in (_decoder_base(statistics, reverse, variance, crossfitted=own) for own in (False, True))
    )
    every_shift = _linear(knots, shift, total)
    if variance == "network" and len(knots) > 1:  # the first knot's was not searched
        every_shift[1 : int(knots[1])] = shift[1]
    return StepCosts(table, decoder, every_shift, crossfitted)


def _per_pixel_costs(pairs: Transitions, statistics: StepStatistics, total: int) -> Tensor:
    below = earlier(total)
    log_gap = pairs.snr_gap.clamp(min=1e-300).log()
    inside = log_gap[below] if bool(below.any()) else log_gap
    gaps = Chebyshev.between(float(inside.min()), float(inside.max()), _GAP_NODES)
    m, fitted = statistics.mse().flatten(1), statistics.shrunk(statistics.pseudo_images).flatten(1)
    values = torch.stack([priced(gap, fitted, m).mean(1) for gap in gaps.nodes.exp()], dim=1)
    return gaps.rows_at(interpolate_log(statistics.knots, values, torch.arange(total)).log(), log_gap).exp()


def _learned_costs(pairs: Transitions, statistics: StepStatistics, reverse: ReverseProcess) -> Tensor:
    knots, total = statistics.knots, len(reverse.forward)
    means = statistics.learned / statistics.images.sum()
    every = torch.arange(total)
    if reverse.variance_type == "learned":
        v = _linear(knots, means[:, 0], total)[:, None]
        precision, weighted = (interpolate_log(knots, means[:, i], every)[:, None] for i in (1, 2))
        root = reverse.forward.log_alphas_cumprod.cpu()
        small = torch.where(earlier(total), posterior_coefficients(root[:, None], root[None, :]).variance, 1.0)
        return 0.5 * (v - small.log() - 1 + small * (precision + pairs.snr_gap * weighted))
    nodes = range_nodes(reverse.forward)
    shape = nodes.rows_at(_linear(knots, means[:, :RANGE_NODES], total), pairs.log_range)
    logs = interpolate_log(knots, means[:, RANGE_NODES:].clamp(min=TINY), every).log()
    return 0.5 * (shape + pairs.snr_gap * nodes.rows_at(logs, pairs.log_range).exp())


def _decoder_base(
    statistics: StepStatistics, reverse: ReverseProcess, variance: str, crossfitted: bool = False
) -> Tensor:
    """The log variances of the samples' decoders before the shift, (M, N).

    Crossfitted, optimal ones are made from the errors of the other half of the images.
    """
    samples, dims = statistics.samples, statistics.dims
    if variance == "network":
        rows = torch.stack([_first_row(reverse, int(t)) for t in statistics.knots])
        base = rows[:, 0].expand(samples.shape[1], -1)
        return (base + rows[:, 1] * samples[2] if len(samples) == 3 else base).float()

    def logs(half: int | None) -> Tensor:
        if variance == "analytic":
            return statistics.curve(half).log().expand(len(dims), -1)
        return statistics.shrunk(statistics.pseudo_images, half).flatten(1).log().T[dims]

    if not crossfitted:
        return logs(None).float()
    return torch.where(statistics.halves[:, None] == 0, logs(1), logs(0)).float()


def _decoder_cost(statistics: StepStatistics, reverse: ReverseProcess, base: Tensor, shift: Tensor) -> Tensor:
    """Nats per dimension of the decoder at each knot, (N,), at a shift (N,) of its log variances."""
    x_0, x_0_hat = statistics.samples[:2]
    p = DiagonalGaussian(x_0_hat, base + shift.to(base))
    log_prob = p.log_prob(x_0) if reverse.levels is None else p.discretized_log_prob(x_0, reverse.levels)
    return -log_prob.double().mean(0)


def _decoder_shift(statistics: StepStatistics, reverse: ReverseProcess, variance: str) -> Tensor:
    """The shift of the decoder's log variance with the lowest cost at each knot, (N,)."""
    x_0, x_0_hat = statistics.samples[:2]
    base = _decoder_base(statistics, reverse, variance)
    seen = (x_0 - x_0_hat).double().square().mean(0).clamp(min=TINY).log()
    centre = seen - base.double().mean(0)
    shift = _golden_section(
        lambda at: _decoder_cost(statistics, reverse, base, at), centre - _SEARCH, centre + _SEARCH
    )
    if variance == "network" and int(statistics.knots[0]) == 0:
        shift[0] = 0.0  # the training chain's own decoder
    return shift


def _first_row(reverse: ReverseProcess, t: int) -> Tensor:
    """Offset and slope of the training chain's log variance at a step."""
    c = reverse.coefficients(t, torch.empty(0))
    return torch.stack([c.log_variance_offset, c.variance_slope]).cpu()


def _golden_section(cost: Callable[[Tensor], Tensor], low: Tensor, high: Tensor, steps: int = 12) -> Tensor:
    """The minima of N unimodal functions at once, (N,)."""
    ratio = (5**0.5 - 1) / 2
    inner = [high - ratio * (high - low), low + ratio * (high - low)]
    values = [cost(point) for point in inner]
    for _ in range(steps):
        left = values[0] < values[1]
        low, high = torch.where(left, low, inner[0]), torch.where(left, inner[1], high)
        new = torch.where(left, high - ratio * (high - low), low + ratio * (high - low))
        at_new = cost(new)
        inner = [torch.where(left, new, inner[1]), torch.where(left, inner[0], new)]
        values = [torch.where(left, at_new, values[1]), torch.where(left, values[0], at_new)]
    return (low + high) / 2


def crossfitted_cost(
    statistics: StepStatistics, reverse: ReverseProcess, variance: str, path: Sequence[int], costs: StepCosts
) -> float:
    """A path with an optimal variance, priced on the half of the images that it was not made from.

    Nats per dimension, decoder and transitions, without the prior.

    Args:
        statistics: of the network.
        reverse: p of the training chain.
        variance: "analytic" or "per_pixel".
        path: chain indices, ascending.
        costs: of this variance.
    """
    knots, indices = statistics.knots, torch.as_tensor(path)
    total = float(costs.crossfitted_decoder[indices[0]])
    gaps = transitions(reverse.forward.respace(path)).snr_gap.diagonal(-1)
    for half in (0, 1) if len(gaps) else ():
        if variance == "analytic":
            fitted = statistics.curve(half).reshape(-1, *[1] * (statistics.squared.ndim - 2))
        else:
            fitted = statistics.shrunk(statistics.pseudo_images, half)
        rows = (interpolate_log(knots, own, indices[1:]).flatten(1) for own in (statistics.mse(1 - half), fitted))
        m, made = rows
        total += float(priced(gaps[:, None], made, m).mean(1).sum()) / 2
    return total
