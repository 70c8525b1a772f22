"""What a run leaves behind beside the pipeline: baselines, pictures and metrics.json."""

import json
import lzma
import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from image_data import Images
from torch import Tensor

from ddpm_vlb import VLBEstimate

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def integer_levels(images: Images, limit: int | None = None) -> np.ndarray:
    """The images as integer levels (N, C, H, W)."""
    batches = [((x_0 + 1) * ((images.levels - 1) / 2)).round() for x_0 in images.batches(256, limit)]
    return torch.cat(batches).to(torch.uint8).numpy()


def baselines(train: Images, test: Images, limit: int = 10_000) -> dict[str, float]:
    """Bits/dim of codes that anyone has: uniform, a histogram for each position, and lzma.

    The histogram is fitted on training images (Jeffreys' prior, so that no level has probability 0) and scored on test
    images; lzma compresses the test images' bytes, with the container's few bytes counted.

    Args:
        train: images to fit on, at most `limit` of them.
        test: images to score, at most `limit` of them.
        limit: keeps the memory bounded.
    """
    fitted, scored = integer_levels(train, limit), integer_levels(test, limit)
    levels = train.levels
    counts = np.stack([(fitted == level).sum(0) for level in range(levels)])
    probabilities = (counts + 0.5) / (len(fitted) + 0.5 * levels)
    mass = np.take_along_axis(probabilities, scored.reshape(len(scored), *counts.shape[1:]).astype(np.int64), axis=0)
    return {
        "uniform": math.log2(levels),
        "histogram_per_position": float(-np.log2(mass).mean()),
        "lzma": 8 * len(lzma.compress(scored.tobytes(), preset=9 | lzma.PRESET_EXTREME)) / scored.size,
    }


def _grid(images: Tensor, columns: int) -> np.ndarray:
    """Images (N, C, H, W) in [0, 1] as one picture (H', W', C), a pixel of white between them."""
    images = torch.nn.functional.pad(images, (0, 1, 0, 1), value=1.0)
    rows = [torch.cat(list(row), dim=-1) for row in images.split(columns) if len(row) == columns]
    return torch.cat(rows, dim=-2).permute(1, 2, 0).numpy()


def plot_samples(generated: Tensor, real: Tensor, path: Path) -> None:
    """Write generated images beside real ones.

    Args:
        generated: (N, C, H, W) in [0, 1].
        real: as many real images.
        path: the PNG file to write.
    """
    columns = max(1, math.isqrt(len(generated)))
    figure, axes = plt.subplots(1, 2, figsize=(10, 5.4))
    for axis, images, title in zip(axes, (generated, real), ("generated", "real (test images)")):
        axis.imshow(_grid(images.cpu(), columns).squeeze(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axis.set_title(title)
        axis.axis("off")
    _save(figure, path)


def plot_vlb_terms(estimate: VLBEstimate, path: Path, bins: int = 40) -> None:
    """Write L_t against t, log-log, with the cumulative bound.

    Args:
        estimate: of the test images.
        path: the PNG file to write.
        bins: the drawn steps are averaged in this many geometric bins.
    """
    terms, errors = estimate.term_mean.numpy(), estimate.term_se.numpy()
    steps = len(terms)
    edges = np.unique(np.geomspace(1, steps + 1, bins + 1).astype(int))
    centres, means, bands, total = [], [], [], []
    running = estimate.prior
    for low, high in zip(edges[:-1] - 1, edges[1:] - 1):
        drawn = np.isfinite(terms[low:high])
        if not drawn.any():
            continue
        mean = terms[low:high][drawn].mean()
        running += mean * (high - low)
        centres.append(math.sqrt((low + 1) * high))
        means.append(mean)
        bands.append(math.sqrt(np.nansum(errors[low:high][drawn] ** 2)) / drawn.sum())
        total.append(running)
    figure, axis = plt.subplots(figsize=(8, 5))
    axis.errorbar(centres, means, yerr=bands, fmt="o-", markersize=3, capsize=2, label="L_t (mean of the bin, +- SE)")
    axis.set(xscale="log", yscale="log", xlabel="t (1 is the decoder's step)", ylabel="L_t, bits/dim for each step")
    axis.grid(alpha=0.3)
    right = axis.twinx()
    right.plot(centres, total, color="tab:red", label="L_T + cumulative sum of L_t")
    right.axhline(estimate.bits_per_dim, color="tab:red", linestyle=":", label=f"estimate {estimate.bits_per_dim:.3f}")
    right.set(ylabel="bits/dim", ylim=(0, None))
    handles = [*axis.get_legend_handles_labels()[0], *right.get_legend_handles_labels()[0]]
    figure.legend(handles=handles, loc="upper center", ncols=3, frameon=False)
    _save(figure, path, top=0.94)


def _save(figure: Any, path: Path, top: float = 1.0) -> None:
    figure.tight_layout(rect=(0, 0, 1, top))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def score(estimate: VLBEstimate) -> dict[str, float | int | None]:
    """The numbers of an estimate, under the names of metrics.json."""
    names = "bits_per_dim noise_se image_se prior kl decoder num_images network_calls_per_image"
    values = {name: getattr(estimate, name) for name in names.split()}
    return {name: None if math.isnan(value) else value for name, value in values.items()}  # JSON has no NaN


def write_json(content: dict[str, Any], path: Path) -> None:
    """Write JSON aside and rename it, so that a reader never sees half a file."""
    aside = path.with_name(path.name + ".partial")
    aside.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    aside.replace(path)
