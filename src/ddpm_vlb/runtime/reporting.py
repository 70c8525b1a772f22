"""What a run leaves behind beside the pipeline: baselines, pictures and metrics.json."""

import argparse
import importlib.metadata
import lzma
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from ddpm_vlb import VLBEstimate
from ddpm_vlb.runtime.figures import Figure, save
from ddpm_vlb.runtime.image_sets import Images, as_stored

PACKAGES = ("ddpm-vlb", "torch", "diffusers", "accelerate", "datasets")


def integer_levels(images: Images, limit: int | None = None) -> np.ndarray:
    """The images as integer levels (N, C, H, W)."""
    return np.concatenate([as_stored(x_0, images.levels) for x_0 in images.batches(256, limit)])


def baselines(train: Images, test: Images, limit: int = 10_000) -> dict[str, float]:
    """Bits/dim of codes that anyone has: uniform, a histogram for each position, and lzma.

    The histogram is fitted on training images (Jeffreys' prior, so that no level has probability 0) and scored on test
    images; lzma compresses the test images' bytes, with the container's few bytes counted.

    Args:
        train: images to fit on, at most `limit` of them.
        test: images to score, at most `limit` of them.
        limit: keeps the memory bounded.
    """
    fitted = integer_levels(train, limit)
    scored = integer_levels(test, limit)
    levels = train.levels
    bits = 0.0
    for own, values in zip(fitted.reshape(len(fitted), -1).T, scored.reshape(len(scored), -1).T):
        mass = (np.bincount(own, minlength=levels)[values] + 0.5) / (len(fitted) + 0.5 * levels)
        bits -= float(np.log2(mass).sum())
    return {
        "uniform": math.log2(levels),
        "histogram_per_position": bits / scored.size,
        "lzma": 8 * len(lzma.compress(scored.tobytes(), preset=9 | lzma.PRESET_EXTREME)) / scored.size,
    }


def _grid(images: Tensor, columns: int) -> np.ndarray:
    """Images (N, C, H, W) in [0, 1] as one picture (H', W', C), a pixel of white between them."""
    images = torch.nn.functional.pad(images, (0, 1, 0, 1), value=1.0)
    rows = [torch.cat(list(row), dim=-1) for row in images.split(columns) if len(row) == columns]
    return torch.cat(rows, dim=-2).permute(1, 2, 0).numpy()


def plot_samples(generated: Tensor, real: Tensor, path: Path, columns: int | None = None) -> None:
    """Write generated images beside real ones.

    Args:
        generated: (N, C, H, W) in [0, 1].
        real: as many real images.
        path: the PNG file to write.
        columns: images in a row; None makes a square of them.
    """
    columns = columns or max(1, math.isqrt(len(generated)))
    figure = Figure(figsize=(10, 5.4))
    for axis, images, title in zip(figure.subplots(1, 2), (generated, real), ("generated", "real (test images)")):
        axis.imshow(_grid(images.cpu(), columns).squeeze(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axis.set_title(title)
        axis.axis("off")
    save(figure, path)


def _in_unit(unit: str) -> float:
    """What turns an estimate's bits/dim into the unit."""
    return 1.0 if unit == "bits/dim" else math.log(2)


def plot_vlb_terms(estimate: VLBEstimate, path: Path, bins: int = 40, unit: str = "bits/dim") -> None:
    """Write L_t against t, log-log, with bands of one standard error, and the cumulative bound.

    Args:
        estimate: of the test images.
        path: the PNG file to write.
        bins: the drawn steps are averaged in this many geometric bins.
        unit: "bits/dim", or nats for continuous data.
    """
    scale = _in_unit(unit)
    terms, errors = estimate.term_mean.numpy() * scale, estimate.term_se.numpy() * scale
    steps = len(terms)
    edges = np.unique(np.geomspace(1, steps + 1, bins + 1).astype(int))
    centres, means, bands, total = [], [], [], []
    running = estimate.prior * scale
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
    figure = Figure(figsize=(8, 5))
    axis = figure.subplots()
    level, band, bound = np.array(means), np.array(bands), estimate.bits_per_dim * scale
    # A density may make the decoder's term negative, and noise a small one: a logarithm shows neither.
    shown = level > 0
    hidden = "" if shown.all() else f"; {(~shown).sum()} below 0"
    t = np.array(centres)
    axis.plot(t[shown], level[shown], "o-", markersize=3, label=f"L_t (mean of the bin, +- SE{hidden})")
    axis.fill_between(t[shown], (level - band)[shown], (level + band)[shown], alpha=0.3)
    axis.set(xscale="log", yscale="log")
    if shown.any():
        axis.set_ylim(level[shown].min() / 2, level[shown].max() * 2)
    axis.set(xlabel="t (1 is the decoder's step)", ylabel=f"L_t, {unit} for each step")
    axis.grid(alpha=0.3)
    right = axis.twinx()
    right.plot(centres, total, color="tab:red", label="L_T + cumulative sum of L_t")
    right.axhline(bound, color="tab:red", linestyle=":", label=f"estimate {bound:.3f}")
    right.set(ylabel=unit, ylim=(min(0.0, *total), None))
    handles = [*axis.get_legend_handles_labels()[0], *right.get_legend_handles_labels()[0]]
    figure.legend(handles=handles, loc="upper center", ncols=3, frameon=False, fontsize=9)
    save(figure, path, top=0.94)


def plot_per_image(estimate: VLBEstimate, path: Path, unit: str = "bits/dim") -> None:
    """Write a histogram of the images' bounds.

    Args:
        estimate: of the test images.
        path: the PNG file to write.
        unit: as in `plot_vlb_terms`.
    """
    values, mean = estimate.per_image.numpy() * _in_unit(unit), estimate.bits_per_dim * _in_unit(unit)
    figure = Figure(figsize=(8, 4))
    axis = figure.subplots()
    axis.hist(values, bins=min(50, max(5, round(len(values) ** 0.5))), edgecolor="white")
    axis.axvline(mean, color="tab:red", label=f"mean {mean:.3f}")
    noise = estimate.noise_se * len(values) ** 0.5 * _in_unit(unit)
    axis.set(xlabel=f"{unit} of an image (of which noise: +- {noise:.3f})", ylabel="images")
    axis.legend(frameon=False)
    save(figure, path)


def plot_net_bits(net: dict[int, float], estimate: VLBEstimate, path: Path) -> None:
    """Write the bits/dim that each image took in a file against its bound.

    Args:
        net: by the image's number.
        estimate: of all images, on the steps that coded them.
        path: the PNG file to write.
    """
    bound = estimate.per_image.numpy()[list(net)]
    figure = Figure(figsize=(6, 6))
    axis = figure.subplots()
    axis.scatter(bound, list(net.values()), s=8)
    ends = [min(bound.min(), *net.values()), max(bound.max(), *net.values())]
    axis.plot(ends, ends, color="tab:red", label="as many bits as the bound says")
    axis.set(xlabel="bound of an image, bits/dim", ylabel="net bits/dim in the file")
    axis.legend(frameon=False)
    save(figure, path)


def score(estimate: VLBEstimate, discrete: bool = True) -> dict[str, float | int | None]:
    """The numbers of an estimate, under the names of metrics.json.

    Args:
        estimate: of some images.
        discrete: they are in bits/dim; else in nats/dim of density, and there are no bits/dim.
    """
    scale = 1.0 if discrete else math.log(2)
    value = estimate.bits_per_dim * scale
    numbers: dict[str, float | int] = {
        "bits_per_dim" if discrete else "nats_per_dim": value,
        **{name: getattr(estimate, name) * scale for name in ("noise_se", "image_se", "prior", "kl", "decoder")},
        "num_images": estimate.num_images,
        "network_calls_per_image": estimate.network_calls_per_image,
    }
    finite = {name: None if math.isnan(number) else number for name, number in numbers.items()}  # JSON has no NaN
    return finite if discrete else {"bits_per_dim": None, **finite}


def describe(scores: dict[str, Any], unit: str = "bits/dim") -> str:
    """Scores in one line."""
    value = scores["nats_per_dim"] if scores["bits_per_dim"] is None else scores["bits_per_dim"]
    noise, images = (f"{scores[name]:.3f}" if scores[name] else "n/a" for name in ("noise_se", "image_se"))
    return f"{value:.3f} +- {noise} (noise) +- {images} (images) {unit}"


def versions(*more: str) -> dict[str, str]:
    """The versions of the packages that numbers depend on, and of some more."""
    return {name: importlib.metadata.version(name) for name in (*PACKAGES, *more)}


def provenance(accelerator: Accelerator, args: argparse.Namespace, *more: str) -> dict[str, Any]:
    """How a result came about: options, versions, device and number of processes.

    Args:
        accelerator: of the run.
        args: its options.
        more: packages beyond the usual ones.
    """
    return {
        "options": {name: value for name, value in vars(args).items() if name != "output_dir"},
        "versions": versions(*more),
        "device": str(accelerator.device),
        "num_processes": accelerator.num_processes,
    }
