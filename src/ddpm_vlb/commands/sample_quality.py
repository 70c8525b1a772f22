r"""How good a DDPM's samples are in few steps: distances between features of samples and of test images.

    ddpm-vlb sample-quality --model runs/digits --steps 5 10 25 50
    ddpm-vlb sample-quality --model runs/digits --timestep_spacing leading trailing
    ddpm-vlb sample-quality --model me/cifar --dataset_name cifar10 --image_column img \
        --feature_model facebook/dinov2-base

For each number of steps and spacing: the Frechet distance and the kernel distance of quality/distances.py, with
bootstrap errors, beside those of as many training images, which no sampler beats but by chance or by copying. The
features are those of any vision model of `transformers`; without --feature_model a small ViT is trained on the labels
of the training images and kept in feature_model/. Writes sample_quality.json, sample_quality.png and a picture
samples-STEPS-SPACING.png of each set to --output_dir.

Sources: Heusel et al. 2017 (FID); Stein et al. 2023 (with DINOv2); Jayasumana et al. 2024 (CMMD: a kernel, and CLIP).
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from ddpm_vlb import ALL_SPACINGS, VARIANCES, StoredPath, check_data, image_generator
from ddpm_vlb.commands.options import (
    SWITCH,
    Parser,
    add_data_options,
    add_model_options,
    at_least_two,
    not_negative_int,
    positive_int,
)
from ddpm_vlb.quality.distances import MMD_SCALE, compare, median_distance
from ddpm_vlb.quality.features import ENOUGH, FeatureModel, small_model
from ddpm_vlb.quality.report import plot, report
from ddpm_vlb.runtime.files import write_json
from ddpm_vlb.runtime.launching import main_first, patient_accelerator, prepare_output_dir
from ddpm_vlb.runtime.reporting import plot_samples, provenance
from ddpm_vlb.runtime.stopping import leave, refused
from ddpm_vlb.scoring.checkpoint import (
    default_folder,
    fingerprint_of,
    load_data,
    load_pipeline,
    network_shape,
    settle_chain,
)
from ddpm_vlb.scoring.report import path_taken

SPACINGS = ("default", *ALL_SPACINGS)
DATA = ("dataset_name", "dataset_config_name", "train_data_dir", "split", "levels")
MAX_SAMPLES, MAX_LABELS, SHOWN = 1000, 10_000, 64


def build_parser() -> argparse.ArgumentParser:
    """The options and their help texts."""
    parser = Parser("sample-quality", __doc__)
    add_model_options(parser, "sample", "Folder for the results; default: sample_quality/ in the model's.")
    add_data_options(parser, "compare with")

    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--steps", type=positive_int, nargs="+", default=[5, 10, 25, 50], help="Numbers of steps K.")
    sampling.add_argument(
        "--timestep_spacing", choices=SPACINGS, nargs="+", default=["default"], help="default: the checkpoint's own."
    )
    sampling.add_argument(
        "--variance",
        choices=("stored", *VARIANCES),
        nargs="+",
        default=["stored"],
        help="stored: what the checkpoint says; the others of every chain (`ddpm-vlb optimize-timesteps` makes them).",
    )
    sampling.add_argument(
        "--num_samples", type=at_least_two, help=f"default: as many as images to compare with, at most {MAX_SAMPLES}."
    )
    sampling.add_argument("--eval_batch_size", type=positive_int, default=64, help="Images sampled at once.")
    sampling.add_argument("--seed", type=not_negative_int, default=0, help="Of the samples and the bootstrap.")

    distances = parser.add_argument_group("distances")
    distances.add_argument("--feature_model", help="Vision model, a folder or a Hub name; default: a small ViT.")
    distances.add_argument("--num_bootstrap", type=at_least_two, default=200, help="Resampled sets for the errors.")

    parser.add_argument("--cpu", action=SWITCH, default=False, help="Use the CPU in any case.")
    return parser


@dataclass(frozen=True)
class Part:
    """Images of a split as uint8 (N, C, H, W), labels (N,) or none (0,), the split's size, and the images' levels."""

    images: Tensor
    labels: Tensor
    total: int
    levels: int
    record: dict[str, Any]


def to_bytes(x_0: Tensor, levels: int) -> Tensor:
    """Images (N, C, H, W) on [-1, 1] as uint8, as a file would hold them; each value on the nearest of the levels."""
    k = ((x_0 + 1) * ((levels - 1) / 2)).round()
    return (k * (255 / (levels - 1))).round().clamp(0, 255).to(torch.uint8)


def load_part(args: argparse.Namespace, pipeline: Any, split: str, labelled: bool, count: int) -> Part:
    """At most so many images of a split, in an order that depends on their number alone.

    Raises:
        ValueError: not the images that the network makes, or no labels.
    """
    network = network_shape(pipeline, args)
    size = network.size or (0, 0)
    if network.levels is None or network.channels not in (1, 3) or len(size) != 2:
        raise ValueError(
            f"--model {args.model} makes arrays of {network.channels} channel(s), {network.levels or 'no'} levels and "
            f"{len(size)} dimension(s): features are taken of grey or colour images only."
        )
    if network.size is None:
        raise ValueError(f"--model {args.model}: its network's config has no `sample_size`, the size of the samples.")
    if labelled and network.classes is None:
        network = replace(network, classes=MAX_LABELS)
    told = {"split": split, "num_images": None, "label_column": args.label_column if labelled else None}
    own = argparse.Namespace(**{**vars(args), **told})
    try:
        data = load_data(own, network if labelled else replace(network, classes=None), check=False)
    except ValueError as error:
        if args.feature_model is not None or "--label_column" not in str(error):
            raise
        column = args.label_column or "label"
        raise ValueError(
            f"The small feature model is trained on labels, but the data set has no column {column!r}. Name their "
            "column with `--label_column`, or a trained model with `--feature_model`."
        ) from error
    chosen = np.random.default_rng(0).permutation(len(data.scored))[:count].tolist()
    levels, images, labels = data.levels or 256, list[Tensor](), [torch.zeros(0)]
    for start in range(0, len(chosen), 256):
        x_0, conditioning = data.batch(data.scored, chosen[start : start + 256])
        check_data(x_0, levels)
        images.append(to_bytes(x_0, levels))
        labels += [conditioning["class_labels"]] if labelled else []
    return Part(torch.cat(images), torch.cat(labels[1:] or labels), len(data.scored), levels, data.record)


class Comparison:
    """What the parts of a comparison share."""

    def __init__(self, args: argparse.Namespace, accelerator: Accelerator, folder: Path):
        self.args, self.accelerator, self.folder = args, accelerator, folder
        self.walked: list[int] = []
        main_first(accelerator, self._load, "sample-quality", ValueError, OSError)
        self.pipeline.to(accelerator.device)
        self.pipeline.set_progress_bar_config(disable=True)

    def _load(self) -> None:
        """The pipeline, the images and the feature model."""
        args, small = self.args, self.args.feature_model is None
        self.pipeline: Any = load_pipeline(args)
        self._check_steps()
        scheduler = self.pipeline.chain
        self.stored = scheduler.optimal_paths, scheduler.errors, scheduler.config.get("reverse_variance", "network")
        for variance in dict.fromkeys(args.variance):  # refused now, not after hours of samples
            self.take_variance(variance)
            for spacing, steps in itertools.product(args.timestep_spacing, args.steps):
                scheduler.set_timesteps(steps, timestep_spacing=None if spacing == "default" else spacing)
        labelled = small or self.pipeline.num_classes is not None
        if args.label_column is not None and not labelled:
            raise ValueError(f"--label_column {args.label_column} has no effect: nothing here takes labels.")
        limit = args.num_samples or MAX_SAMPLES
        scored = load_part(args, self.pipeline, args.split, labelled, max(limit, ENOUGH) if small else limit)
        self.path = settle_chain(self.pipeline, args, scored.levels)
        self.test = replace(scored, images=scored.images[:limit], labels=scored.labels[:limit])
        if len(self.test.images) < 2:
            raise ValueError(f"The split {args.split!r} has one image: the distances need two at least.")
        self.num_samples = args.num_samples or len(self.test.images)
        count = max(self.num_samples, ENOUGH) if small else self.num_samples
        self.other = load_part(args, self.pipeline, "train" if args.split != "train" else "test", small, count)
        prepare_output_dir(self.folder)
        self.training = self._small_model(scored) if small else {}
        name = str(self.folder / "feature_model") if small else args.feature_model
        self.features = FeatureModel(name, self.accelerator.device, args.cache_dir)

    def _check_steps(self) -> None:
        total = len(self.pipeline.chain)
        if max(self.args.steps) > total:
            raise ValueError(f"--steps {max(self.args.steps)} is more than the chain has: they must be 1 .. {total}.")

    def take_variance(self, variance: str) -> None:
        """Let every chain have this variance, and the optimal paths be those that were found for it."""
        scheduler, (paths, errors, reverse_variance) = self.pipeline.chain, self.stored
        if variance == "stored":
            scheduler.store_few_steps(list(paths.values()), errors, reverse_variance)
            return
        name = scheduler.config.variance_type.removesuffix("_log") if variance == "network" else variance
        found = [StoredPath(steps, variance, shift) for own, steps, shift in self._optimal_paths() if own == name]
        scheduler.store_few_steps(found, errors, variance)

    def _optimal_paths(self) -> list[tuple[str, tuple[int, ...], float]]:
        """Variance, timesteps and decoder shift of the optimal paths, from the few_steps.json of these weights."""
        path = Path(self.args.model) / "few_steps.json"
        if not path.is_file():
            return []
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            rows, weights = content["rows"], content["model"]["weights_sha256"]
            optimal = [
                (row["variance"], tuple(row["timesteps"]), row["decoder_shift"])
                for row in rows
                if row["path"] == "optimal"
            ]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no file of `ddpm-vlb optimize-timesteps`: {error!r}.") from error
        if weights != fingerprint_of(self.pipeline.unet):
            raise ValueError(f"{path} is of other weights. Run `ddpm-vlb optimize-timesteps` again, or remove it.")
        return optimal

    def _small_model(self, scored: Part) -> dict[str, Any]:
        """Train it, on the main process alone, or find it; not on fewer images where few samples are asked for."""
        if not self.accelerator.is_main_process:
            return {}
        train, test = (self.other, scored) if self.args.split != "train" else (scored, self.other)
        return small_model(self.folder / "feature_model", (train.images, train.labels), (test.images, test.labels))

    def sample(self, steps: int, spacing: str, positions: list[int]) -> Tensor:
        """Samples, uint8: the draws of each depend on its position alone, its class is that of a test image."""
        options: dict[str, Any] = {} if spacing == "default" else {"timestep_spacing": spacing}
        if self.pipeline.num_classes is not None:
            options["class_labels"] = self.test.labels[[i % len(self.test.labels) for i in positions]]
        generators = [image_generator(self.args.seed, position) for position in positions]
        output = self.pipeline(
            len(positions), generator=generators, num_inference_steps=steps, output_type="pt", **options
        )
        self.walked = self.pipeline.chain.timesteps.tolist()
        return to_bytes(output.images.cpu() * 2 - 1, self.test.levels)

    def collect(self, images: Callable[[list[int]], Tensor], number: int, what: str) -> tuple[np.ndarray, Tensor]:
        """The features of so many images, made or read by all processes together, and the first few images."""
        size = self.args.eval_batch_size
        starts = range(0, number, size)[self.accelerator.process_index :: self.accelerator.num_processes]
        own = []
        for start in tqdm(starts, desc=what, disable=not self.accelerator.is_local_main_process):
            batch = images(list(range(start, min(start + size, number))))
            own.append((start, self.features(batch).numpy(), batch[: max(0, SHOWN - start)]))
        parts = sorted(gather_object(own), key=lambda part: part[0])
        return np.concatenate([part[1] for part in parts]), torch.cat([part[2] for part in parts])

    def record(self, num_features: int) -> dict[str, Any]:
        """What sample_quality.json says of the models, the data and the run."""
        args, other = self.args, self.other.record["split"]
        return {
            "feature_model": {
                "name_or_path": self.features.name,
                "class": type(self.features.model).__name__,
                "weights_sha256": fingerprint_of(self.features.model),
                "num_features": num_features,
                **({"training": self.training} if self.training else {}),
            },
            "num_bootstrap": args.num_bootstrap,
            "seed": args.seed,
            "model": {
                "name_or_path": args.model,
                "revision": args.revision,
                "weights_sha256": fingerprint_of(self.pipeline.unet),
                "timestep_spacing": self.pipeline.chain.config.timestep_spacing,
                "gaussian_path": self.path,
            },
            "data": {
                **{name: self.test.record[name] for name in DATA},
                "num_images": {args.split: self.test.total, other: self.other.total},
            },
            **provenance(self.accelerator, args, "transformers"),
        }


def measure(run: Comparison) -> dict[str, Any]:
    """All distances, as the content of sample_quality.json; the grids are written on the way."""
    args, started = run.args, time.perf_counter()
    y, shown = run.collect(lambda i: run.test.images[i], len(run.test.images), f"Images of {args.split!r}")
    number = min(run.num_samples, len(run.other.images))
    other = run.other.record["split"]
    x, _ = run.collect(lambda i: run.other.images[i], number, f"Images of {other!r}")
    sigma = run.features.sigma or median_distance(y)
    if min(run.num_samples, number, len(y)) <= y.shape[1]:
        run.accelerator.print(
            f"{min(run.num_samples, number, len(y))} images are too few for the covariance of {y.shape[1]} features: "
            "the Frechet distance is far too large. Read it beside the baseline, or take the kernel distance."
        )

    def distances(x: np.ndarray) -> dict[str, float | int]:
        return compare(x, y, sigma, args.num_bootstrap, args.seed) if run.accelerator.is_main_process else {}

    baseline, results = {"split": other, **distances(x)}, []
    chains = itertools.product(dict.fromkeys(args.variance), dict.fromkeys(args.timestep_spacing))
    for variance, spacing in chains:
        run.take_variance(variance)
        label = spacing if variance == "stored" else f"{spacing}-{variance}"
        for steps in sorted(set(args.steps)):
            x, made = run.collect(
                lambda positions: run.sample(steps, spacing, positions),  # noqa: B023
                run.num_samples,
                f"{steps} steps, {label}",
            )
            chain = {"steps": steps, "spacing": spacing, "variance": variance, "timesteps": run.walked}
            chain["path"] = path_taken(run.pipeline.chain, steps, None if spacing == "default" else spacing)
            results.append({**chain, **distances(x)})
            if run.accelerator.is_main_process:
                few = min(len(made), len(shown))
                plot_samples(made[:few] / 255, shown[:few] / 255, run.folder / f"samples-{steps}-{label}.png")
    kernel = {"name": "gaussian", "sigma": sigma, "scale": MMD_SCALE, "median": run.features.sigma is None}
    content = {"baseline": baseline, "results": results, "kernel": kernel}
    return {**content, **run.record(y.shape[1]), "seconds": time.perf_counter() - started}


@refused("sample-quality")
def main(argv: Sequence[str] | None = None) -> dict[str, Any] | None:
    """Compare a checkpoint's samples. Returns the content of sample_quality.json (on the main process)."""
    args = build_parser().parse_args(argv)
    accelerator = patient_accelerator(args)
    near = Path(args.model) if Path(args.model).is_dir() else default_folder(args.model)
    folder = Path(args.output_dir) if args.output_dir else near / "sample_quality"
    content = measure(Comparison(args, accelerator, folder))
    if accelerator.is_main_process:
        write_json(content, folder / "sample_quality.json")
        plot(content, folder / "sample_quality.png")
        report(content, folder)
    leave(accelerator)
    return content if accelerator.is_main_process else None


if __name__ == "__main__":
    main()
