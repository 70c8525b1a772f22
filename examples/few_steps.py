"""The chains of few steps that optimize_timesteps.py compares, what is stored of them, and their table and picture."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch

from ddpm_vlb import (
    ReverseProcess,
    SquaredErrors,
    StepStatistics,
    StoredPath,
    optimal_paths,
    spaced_timesteps,
    step_costs,
)
from ddpm_vlb.respacing import VARIANCES
from ddpm_vlb.step_statistics import crossfitted_cost

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FIXED = ("fixed_small", "fixed_large")
EVEN = ("leading", "linspace", "trailing", "quadratic")


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


def variances_for(reverse: ReverseProcess) -> list[str]:
    """The variances that are compared for a network."""
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
    p = dataclasses.replace(p, x_0_mse=errors.at(p.forward.timesteps, variance))
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
                cost = crossfitted_cost(statistics, own, variance, indices)
                expected = cost + float(costs.decoder[indices[0]])
            found.append(Candidate("optimal", variance, process, stored, expected))
    return found


def chosen(candidates: list[Candidate], variance: str) -> StoredPath:
    """The path to store: of the variance that is asked for, or of the one with the lowest expected cost.

    Args:
        candidates: of one number of steps.
        variance: "auto", "network", "analytic" or "per_pixel".
    """
    eligible = [own for own in candidates if own.stored is not None and variance in ("auto", own.variance)]
    best = min(eligible, key=lambda own: math.inf if own.expected is None else own.expected)
    assert best.stored is not None
    return best.stored


def print_table(rows: list[dict[str, Any]], unit: str) -> None:
    """Print the chains' scores, a line each; a star marks what is stored."""
    print(f"\n{'steps':>5}  {'path':10} {'variance':14} {unit} +- noise +- images")
    for row in rows:
        value = row["bits_per_dim"] if row["bits_per_dim"] is not None else row["nats_per_dim"]
        errors = " ".join(
            "+-   n/a" if row[name] is None else f"+- {row[name]:.4f}" for name in ("noise_se", "image_se")
        )
        star = " *" if row["stored"] else ""
        print(f"{row['num_inference_steps']:5}  {row['path']:10} {row['variance']:14} {value:8.4f} {errors}{star}")


def plot(rows: list[dict[str, Any]], path: Path, unit: str) -> None:
    """Draw bits/dim against the number of steps, a line for each path and variance.

    Args:
        rows: of few_steps.json.
        path: the PNG file to write.
        unit: of the numbers.
    """
    figure, axes = plt.subplots(1, 2, figsize=(13, 5.5), sharey=True)
    value = "bits_per_dim" if rows[0]["bits_per_dim"] is not None else "nats_per_dim"
    whole = {row["variance"]: row for row in rows if row["path"] == "all"}
    few = [row for row in rows if row["path"] != "all"]
    variances = list(dict.fromkeys(row["variance"] for row in few))
    colours = {name: f"C{i}" for i, name in enumerate(variances)}
    paths = list(dict.fromkeys(row["path"] for row in few))
    styles = dict(zip(paths, ("dotted", "dashed", "dashdot", (0, (1, 2)), "solid")))
    panels = (
        (axes[0], lambda row: row["variance"] == variances[0]),
        (axes[1], lambda row: row["path"] in ("linspace", "optimal")),
    )
    for axis, shown in panels:
        lines: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for row in filter(shown, few):
            lines.setdefault((row["path"], row["variance"]), []).append(row)
        for (name, variance), own in lines.items():
            own = sorted(own, key=lambda row: row["num_inference_steps"])
            bars = [math.hypot(row["noise_se"] or 0.0, row["image_se"] or 0.0) for row in own]
            axis.errorbar(
                [row["num_inference_steps"] for row in own],
                [row[value] for row in own],
                bars,
                color=colours[variance],
                linestyle=styles[name],
                marker="o",
                markersize=4,
                label=f"{name}, {variance}",
            )
        for variance, row in whole.items():
            if any(own[1] == variance for own in lines):
                axis.axhline(row[value], color=colours[variance], linewidth=0.7)
        axis.set(xscale="log", xlabel="steps K")
        numbers = sorted({row["num_inference_steps"] for row in few})
        axis.set_xticks(numbers, labels=map(str, numbers), minor=False)
        axis.set_xticks([], minor=True)
        low = min(row[value] for row in rows)
        axis.set_ylim(low - 0.1, min(max(row[value] for row in rows) + 0.2, low + 3))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes[0].set(ylabel=f"{unit}, held-out images", title=f"paths, with the variance {variances[0]!r}")
    axes[1].set(title="variances; thin lines: all steps of the training chain")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
