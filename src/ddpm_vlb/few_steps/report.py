"""The table and the picture of `ddpm-vlb optimize-timesteps`, and what its rows differ by."""

import math
from pathlib import Path
from typing import Any

from ddpm_vlb.runtime.figures import Figure, save
from ddpm_vlb.runtime.image_data import data_name

Lines = dict[tuple[str, str], list[dict[str, Any]]]
"""Rows of few_steps.json by path and variance."""
Looks = dict[tuple[str, str], dict[str, Any]]
"""How each of them is drawn."""


def compare(rows: list[dict[str, Any]]) -> None:
    """Add to each row what it costs more than the stored chain, and one variance of each pixel more than one of all.

    The images and their noise are the same, so that the error of a difference is less than the rows' own.
    """

    def difference(own: dict[str, Any], other: dict[str, Any]) -> dict[str, float | None]:
        gaps = own["per_image"] - other["per_image"]
        error = float(gaps.std() / len(gaps) ** 0.5) if len(gaps) > 1 else None
        return {"difference": float(gaps.mean()), "se": error}

    for own in rows:
        alike = [other for other in rows if other["num_inference_steps"] == own["num_inference_steps"]]
        own["against_stored"] = next((difference(own, other) for other in alike if other["stored"]), None)
        scalar = [other for other in alike if other["path"] == own["path"] and other["variance"] == "analytic"]
        own["against_analytic"] = difference(own, scalar[0]) if own["variance"] == "per_pixel" else None
    for own in rows:
        del own["per_image"]


def print_differences(rows: list[dict[str, Any]], unit: str) -> None:
    """Print what the best usual path costs more than the stored one, and a variance of each pixel more than of all."""
    print(f"\nDifferences on the same images and noise, {unit}:")
    for number in sorted({row["num_inference_steps"] for row in rows}):
        own = [row for row in rows if row["num_inference_steps"] == number]
        usual = [row for row in own if row["path"] != "optimal" and row["variance"] == rows[0]["variance"]]
        best = min(usual, key=lambda row: row["against_stored"]["difference"])
        told = [(f"{best['path']}, {best['variance']}, against the stored chain", best["against_stored"])]
        pixels = [row for row in own if row["path"] == "optimal" and row["variance"] == "per_pixel"]
        told += [("optimal, per_pixel against analytic", row["against_analytic"]) for row in pixels]
        for what, gap in told:
            error = "n/a" if gap["se"] is None else f"{gap['se']:.4f}"
            print(f"{number:5}  {what:50} {gap['difference']:+.4f} +- {error}")


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


def report(result: dict[str, Any], folder: Path) -> None:
    """Print the table and what was stored.

    Args:
        result: the content of few_steps.json.
        folder: where it lies.
    """
    print_table(result["all_steps"], result["unit"])
    print_table(result["rows"], result["unit"])
    print_differences(result["rows"], result["unit"])
    images, fitted = f"{result['data']['num_images']} images of {data_name(result['data'])}", result["num_fit_images"]
    print(f"\n{images}, every step a network call; paths and variances from {fitted} images of")
    print(f"{result['fit_split']!r}. What is stored (*) is in {folder}, with few_steps.json and few_steps.png.")
    for line in worse_than_others(result["rows"], result["unit"]):
        print(line)


def worse_than_others(rows: list[dict[str, Any]], unit: str) -> list[str]:
    """A line for each stored chain that costs more than another one, by more than two errors of the difference.

    Args:
        rows: of few_steps.json.
        unit: of the numbers.
    """
    lines = []
    for stored in (row for row in rows if row["stored"]):
        number = stored["num_inference_steps"]
        others = [row for row in rows if row["num_inference_steps"] == number and row["against_stored"]["se"]]
        best = min(others, key=lambda row: row["against_stored"]["difference"], default=stored)
        gap = best["against_stored"]
        if gap["se"] and gap["difference"] < -2 * gap["se"]:
            lines.append(
                f"{number} steps: the stored chain ({stored['path']}, {stored['variance']}) costs "
                f"{-gap['difference']:.4f} +- {gap['se']:.4f} {unit} more than {best['path']}, {best['variance']}: "
                "give more images (--num_fit_images), or choose the --variance."
            )
    return lines


def plot(rows: list[dict[str, Any]], path: Path, unit: str) -> None:
    """Draw bits/dim against the number of steps, a line for each path and variance; of one number side by side.

    Args:
        rows: of few_steps.json.
        path: the PNG file to write.
        unit: of the numbers.
    """
    figure = Figure(figsize=(13, 6.5))
    axes = figure.subplots(1, 2, sharey=True)
    value = "bits_per_dim" if rows[0]["bits_per_dim"] is not None else "nats_per_dim"
    whole = {row["variance"]: row for row in rows if row["path"] == "all"}
    few = [row for row in rows if row["path"] != "all"]
    variances = list(dict.fromkeys(row["variance"] for row in few))
    paths = list(dict.fromkeys(row["path"] for row in few))
    styles = dict(zip(paths, ("dotted", "dashed", "dashdot", (0, (1, 2)), "solid")))
    low = min(row[value] for row in rows)
    axes[0].set_ylim(low - 0.1, min(max(row[value] for row in rows) + 0.2, low + 3))  # shared
    panels = (
        (axes[0], lambda row: row["variance"] == variances[0]),
        (axes[1], lambda row: row["path"] in ("linspace", "optimal")),
    )
    draw = _side_by_side if len({row["num_inference_steps"] for row in few}) == 1 else _against_steps
    for axis, shown in panels:
        lines: Lines = {}
        for row in filter(shown, few):
            lines.setdefault((row["path"], row["variance"]), []).append(row)
        looks = {
            (name, variance): {
                "color": f"C{variances.index(variance) if axis is axes[1] else paths.index(name)}",
                "linestyle": styles[name],
            }
            for name, variance in lines
        }
        draw(axis, lines, looks, value)
        for variance, row in whole.items():
            if any(own[1] == variance for own in lines):
                axis.axhline(row[value], color=f"C{variances.index(variance)}", linewidth=0.7)
        axis.grid(alpha=0.3)
    axes[0].set(ylabel=f"{unit}, held-out images", title=f"paths, with the variance {variances[0]!r}")
    axes[1].set(title="variances; thin lines: all steps of the training chain")
    save(figure, path)


def _bars(rows: list[dict[str, Any]]) -> list[float]:
    return [math.hypot(row["noise_se"] or 0.0, row["image_se"] or 0.0) for row in rows]


def _against_steps(axis: Any, lines: Lines, looks: Looks, value: str) -> None:
    """Lines over the numbers of steps, told by the legend."""
    for line, own in lines.items():
        own = sorted(own, key=lambda row: row["num_inference_steps"])
        steps, values = zip(*((row["num_inference_steps"], row[value]) for row in own))
        axis.errorbar(steps, values, _bars(own), marker="o", markersize=4, label=", ".join(line), **looks[line])
    numbers = sorted({row["num_inference_steps"] for own in lines.values() for row in own})
    axis.set(xscale="log", xlabel="steps K")
    axis.set_xticks(numbers, labels=map(str, numbers), minor=False)
    axis.set_xticks([], minor=True)
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.1), "ncols": 3, "frameon": False}
    axis.legend(fontsize=8, handlelength=3.5, **below)


def _side_by_side(axis: Any, lines: Lines, looks: Looks, value: str) -> None:
    """A place for each of what would be one above another, with its name and its number."""
    top = axis.get_ylim()[1]
    for place, (line, own) in enumerate(lines.items()):
        found, bars = own[0][value], _bars(own)
        axis.errorbar(place, found, bars, marker="o", markersize=4, color=looks[line]["color"])
        told, end = f"{found:.3f}{', above' if found > top else ''}", found + bars[0]
        where = {"xy": (place, min(end, top)), "xytext": (0, 4 if end < top else -12), "textcoords": "offset points"}
        axis.annotate(told, ha="center", fontsize=8, **where)
    names = [", ".join(line) for line in lines]
    axis.set_xticks(range(len(lines)), labels=names, rotation=30, ha="right", rotation_mode="anchor", fontsize=8)
    axis.set(xlabel=f"K = {own[0]['num_inference_steps']} steps", xlim=(-0.7, len(lines) - 0.3))
