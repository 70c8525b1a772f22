"""The chains of few steps that `ddpm-vlb optimize-timesteps` compares, and which of them are stored."""

import dataclasses
from dataclasses import dataclass

import torch

from ddpm_vlb import (
    ALL_SPACINGS,
    VARIANCES,
    ReverseProcess,
    SquaredErrors,
    StepStatistics,
    StoredPath,
    crossfitted_cost,
    optimal_paths,
    spaced_timesteps,
    step_costs,
)

FIXED = ("fixed_small", "fixed_large")
GAIN = 1e-3  # nats per dimension
EVEN = ALL_SPACINGS[:-1]


@dataclass(frozen=True, eq=False)
class Candidate:
    """A chain to be scored.

    Args:
        path: "leading", "linspace", "trailing", "quadratic" or "optimal".
        variance: "network", "analytic" or "per_pixel", or the name of a fixed variance that is not the network's.
        process: its reverse process.
        stored: how a checkpoint keeps it, where it can.
        expected: its bound without the prior, in nats per dimension, as the cost table has it; where it is not known
            None.
    """

    path: str
    variance: str
    process: ReverseProcess
    stored: StoredPath | None = None
    expected: float | None = None

    @property
    def timesteps(self) -> tuple[int, ...]:
        """The chain's timesteps, descending."""
        return tuple(self.process.forward.timesteps.flip(0).tolist())


def variances_for(reverse: ReverseProcess, of_path: bool = False) -> list[str]:
    """The variances that are compared for a network.

    Args:
        reverse: p of the training chain.
        of_path: it is that of a Gaussian path; its own variance being learned, no decoder fits the fixed ones.
    """
    if of_path and reverse.learns_variance:
        return list(VARIANCES)
    own = reverse.variance_type.removesuffix("_log")
    return [*VARIANCES, *(name for name in FIXED if name != own)]


def with_channels(p: ReverseProcess, variance_type: str) -> ReverseProcess:
    """A process of fixed variance for the output of a network that has channels for a learned one."""
    if p.learns_variance or not variance_type.startswith("learned"):
        return p
    steps = len(p.forward)
    c = p.coefficients(torch.arange(steps), torch.empty(steps, 0, dtype=torch.float64))
    log_variance = c.log_variance_offset.flatten()
    rest = (log_variance.exp() - p.forward.posterior_variance) / c.x_0_to_mean.flatten().square()
    # betatilde + c0^2 m is any variance above betatilde for the right m.
    return dataclasses.replace(
        p,
        variance_type=variance_type,
        x_0_mse=rest.clamp(min=1e-300),
        decoder_log_variance=float(log_variance[0]),
        decoder_slope=0.0,
    )


def respaced(
    training: ReverseProcess, indices: list[int], variance: str, errors: SquaredErrors, shift: float | None = None
) -> ReverseProcess:
    """The chain of some steps (ascending chain indices) with one kind of variance.

    Args:
        training: p of the training chain, with the network's own variance.
        indices: the steps.
        variance: as of `Candidate`.
        errors: what optimal variances come from.
        shift: `decoder_shift` of a stored path; None for another's own decoder.
    """
    if variance in FIXED:
        fixed = dataclasses.replace(training, variance_type=variance)
        return with_channels(fixed.respace(indices, shift), training.variance_type)
    if variance == "network":
        return training.respace(indices, shift)
    p = training.respace(indices)
    p = dataclasses.replace(p, x_0_mse=errors.at(p.forward.timesteps, variance), decoder_log_variance=None)
    return p if shift is None else p.respace(range(len(indices)), shift)


def even_candidates(
    training: ReverseProcess, steps: int, offset: int, variances: list[str], errors: SquaredErrors
) -> list[Candidate]:
    """The chains of the usual spacings, each with every variance."""
    found = []
    for spacing in EVEN:
        indices = spaced_timesteps(spacing, steps, len(training.forward), offset)[::-1]
        found += [Candidate(spacing, v, respaced(training, indices, v, errors)) for v in variances]
    return found


def optimal_candidates(
    training: ReverseProcess, statistics: StepStatistics, steps: list[int], variances: list[str], errors: SquaredErrors
) -> list[Candidate]:
    """The chains with the lowest bound, for every number of steps and variance."""
    found = []
    for variance in variances:
        own = dataclasses.replace(training, variance_type=variance) if variance in FIXED else training
        costs = step_costs(statistics, own, "network" if variance in FIXED else variance)
        paths = optimal_paths(costs.transitions, costs.decoder, max(steps))
        for number in steps:
            indices = paths.indices(number)
            shift = float(costs.shift[indices[0]])
            process = respaced(training, indices, variance, errors, shift)
            stored, expected = None, float(paths.costs[number - 1])
            if variance in VARIANCES:
                stored = StoredPath(tuple(process.forward.timesteps.flip(0).tolist()), variance, shift)
            if variance in VARIANCES[1:]:  # on images that the variances were not made from
                expected = crossfitted_cost(statistics, own, variance, indices, costs)
            found.append(Candidate("optimal", variance, process, stored, expected))
    return found


def chosen(candidates: list[Candidate], variance: str) -> StoredPath:
    """The path to store: of the variance that is asked for, or of the one with the lowest expected cost.

    A simpler one is taken where the gain is within `GAIN`.

    Args:
        candidates: of one number of steps.
        variance: "auto", "network", "analytic" or "per_pixel".
    """
    eligible = [own for own in candidates if own.stored is not None and variance in ("auto", own.variance)]
    eligible.sort(key=lambda own: VARIANCES.index(own.variance))  # from the simplest on
    best = eligible[0]
    for own in eligible[1:]:
        if own.expected is not None and best.expected is not None and own.expected < best.expected - GAIN:
            best = own
    assert best.stored is not None
    return best.stored


def calls_ahead(steps: list[int], variances: int, images: int) -> int:
    """Network calls that the candidates' scores will take, at most: paths may coincide.

    Args:
        steps: numbers of steps.
        variances: how many each chain is scored with; each may have an optimal path of its own.
        images: visits of images, second draws among them.
    """
    return (variances + len(EVEN)) * sum(steps) * images


def same_chains(candidates: list[Candidate]) -> list[list[Candidate]]:
    """The candidates that one network output can score together."""
    groups: dict[tuple[int, ...], list[Candidate]] = {}
    for own in candidates:
        groups.setdefault(own.timesteps, []).append(own)
    return list(groups.values())
