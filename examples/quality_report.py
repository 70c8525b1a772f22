"""The table and the picture of sample_quality.py."""

import math
from pathlib import Path
from typing import Any

import matplotlib
from feature_distances import MMD_SCALE

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def plot(content: dict[str, Any], path: Path) -> None:
    """Write both distances against the number of steps, with bars of one standard error, and the baseline's band."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    for axis, key, label in zip(axes, ("fd", "mmd"), ("Frechet distance", f"{MMD_SCALE:.0f} MMD$^2$")):
        floor, error = content["baseline"][key], content["baseline"][f"{key}_se"]
        axis.axhline(floor, color="gray", linestyle=":", label=f"{content['baseline']['split']} images")
        axis.axhspan(floor - error, floor + error, color="gray", alpha=0.2)
        for label in dict.fromkeys(map(_label, content["results"])):
            rows = [row for row in content["results"] if _label(row) == label]
            steps, means, errors = ([row[name] for row in rows] for name in ("steps", key, f"{key}_se"))
            axis.errorbar(steps, means, errors, marker="o", capsize=3, label=f"samples, {label}")
        axis.set(xscale="log", xlabel="steps", ylabel=label)
        axis.set_xticks(sorted({row["steps"] for row in content["results"]}))
        axis.get_xaxis().set_major_formatter("{x:.0f}")
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def report(content: dict[str, Any], folder: Path) -> None:
    """Print the table."""
    first = content["baseline"]
    training = content["feature_model"].get("training")
    if training is not None:
        print(f"\nFeature model: a small ViT, which names {training['test_accuracy']:.1%} of other images rightly.")
    print(f"\n{'steps':>8}  {'path':<20} {'FD':>10} {'+-':>8} {'1000 MMD^2':>12} {'+-':>8}")
    for row in content["results"]:
        print(f"{row['steps']:>8}  {_label(row):<20} {_numbers(row)}")
    print(f"{first['split'] + ' images':>30}{_numbers(first)}")
    samples, split = content["results"][0]["num_samples"], content["data"]["split"]
    against = f"against {first['num_images']} {split} images"
    print(f"{samples} samples and {first['num_samples']} {first['split']} images, {against}.")
    if samples != first["num_samples"]:
        print("The FD's excess falls with the number of images: with unequal numbers the baseline is no floor for it.")
    print(f"sample_quality.json, sample_quality.png and samples-*.png are in {folder}.")


def _numbers(row: dict[str, Any]) -> str:
    digits = max(0, 2 - math.floor(math.log10(max(row["fd"], 1e-9))))
    return f"{row['fd']:>10.{digits}f} {row['fd_se']:>8.{digits}f} {row['mmd']:>12.2f} {row['mmd_se']:>8.2f}"


def _label(row: dict[str, Any]) -> str:
    return row["spacing"] if row["variance"] == "stored" else f"{row['spacing']}, {row['variance']}"
