"""The table and the picture of `ddpm-vlb sample-quality`."""

import math
from pathlib import Path
from typing import Any

from ddpm_vlb.quality.distances import MMD_SCALE
from ddpm_vlb.runtime.figures import Figure, save
from ddpm_vlb.runtime.image_data import data_name

STYLES = ("solid", "dashed", "dashdot", "dotted")


def plot(content: dict[str, Any], path: Path) -> None:
    """Write both distances against the number of steps, with bars of one standard error, and the baseline's band."""
    results = content["results"]
    spacings, variances = (list(dict.fromkeys(row[name] for row in results)) for name in ("spacing", "variance"))
    figure = Figure(figsize=(13, 4.5))
    axes = figure.subplots(1, 2)
    for axis, key, unit in zip(axes, ("fd", "mmd"), ("Frechet distance", f"{MMD_SCALE:.0f} MMD$^2$")):
        floor, error = content["baseline"][key], content["baseline"][f"{key}_se"]
        axis.axhline(floor, color="gray", linestyle=":", label=f"{content['baseline']['split']} images")
        axis.axhspan(floor - error, floor + error, color="gray", alpha=0.2)
        for spacing, variance in dict.fromkeys((row["spacing"], row["variance"]) for row in results):
            rows = [row for row in results if (row["spacing"], row["variance"]) == (spacing, variance)]
            steps, means, errors = ([row[name] for row in rows] for name in ("steps", key, f"{key}_se"))
            axis.errorbar(
                steps,
                means,
                errors,
                color=f"C{spacings.index(spacing)}",
                linestyle=STYLES[variances.index(variance)],
                marker="o",
                markersize=4,
                capsize=3,
                label=_label(rows[0]),
            )
        axis.set(xscale="log", xlabel="steps", ylabel=unit)
        axis.set_xticks(sorted({row["steps"] for row in results}))
        axis.get_xaxis().set_major_formatter("{x:.0f}")
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, fontsize=9, loc="center right")
    save(figure, path, right=0.83)


def report(content: dict[str, Any], folder: Path) -> None:
    """Print the table."""
    first = content["baseline"]
    training = content["feature_model"].get("training")
    if training is not None:
        print(f"\nFeature model: a small ViT, which names {training['test_accuracy']:.1%} of other images rightly.")
    print(f"\n{'steps':>8}  {'path':<30} {'FD':>10} {'+-':>8} {'1000 MMD^2':>12} {'+-':>8}")
    for row in content["results"]:
        print(f"{row['steps']:>8}  {_path(row):<30} {_numbers(row)}")
    print(f"{first['split'] + ' images':>40}{_numbers(first)}")
    samples = content["results"][0]["num_samples"]
    against = f"against {first['num_images']} images of {data_name(content['data'])}"
    print(f"{samples} samples and {first['num_samples']} {first['split']} images, {against}.")
    if samples != first["num_samples"]:
        print("The FD's excess falls with the number of images: with unequal numbers the baseline is no floor for it.")
    print(f"sample_quality.json, sample_quality.png and samples-*.png are in {folder}.")


def _numbers(row: dict[str, Any]) -> str:
    digits = max(0, 2 - math.floor(math.log10(max(row["fd"], 1e-9))))
    return f"{row['fd']:>10.{digits}f} {row['fd_se']:>8.{digits}f} {row['mmd']:>12.2f} {row['mmd_se']:>8.2f}"


def _path(row: dict[str, Any]) -> str:
    """Its label, and by name what the default is for its number of steps."""
    return f"{_label(row)} ({row['path']})" if row["spacing"] == "default" else _label(row)


def _label(row: dict[str, Any]) -> str:
    return row["spacing"] if row["variance"] == "stored" else f"{row['spacing']}, {row['variance']}"
