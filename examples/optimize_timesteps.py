r"""Find the best few steps and variances of a trained checkpoint, and store them in it.

    accelerate launch examples/optimize_timesteps.py --model runs/digits --steps 5 10 25 50
    accelerate launch examples/optimize_timesteps.py --model google/ddpm-cifar10-32 --dataset_name cifar10 \
        --image_column img --steps 10 25 --output_dir runs/cifar10-few

Images of the training split say what each step between any two timesteps would cost; dynamic programming finds the
cheapest chains of K steps; held-out images and fresh noise score these and the usual ones, by the network itself.
Afterwards `DDPMVLBPipeline.from_pretrained(...)(num_inference_steps=10)` samples, and `evaluate.py
--num_inference_steps 10` scores, the stored chain; stock diffusers loads and samples the checkpoint as before. Writes
few_steps.json and few_steps.png beside it.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object
from evaluate import add_data_options, load_data, load_pipeline, network_shape
from few_steps import (
    Candidate,
    chosen,
    even_candidates,
    optimal_candidates,
    plot,
    print_table,
    respaced,
    variances_for,
)
from launching import main_first, prepare_output_dir
from reporting import score, write_json
from scoring import fingerprint_of, run_sweep, shared, units
from scoring_data import ScoringData
from stopping import leave
from torch import Tensor
from tqdm.auto import tqdm
from train_options import HelpFormatter, not_negative_int, positive_int

from ddpm_vlb import (
    DDPMVLBPipeline,
    ReverseProcess,
    SquaredErrors,
    StepStatistics,
    StoredPath,
    VLBEstimator,
    collect_statistics,
    estimate_from_scores,
    fit_pilot,
    spread_knots,
)
from ddpm_vlb.estimation import SECOND_DRAWS
from ddpm_vlb.respacing import VARIANCES
from ddpm_vlb.step_statistics import FEW_IMAGES, MIN_IMAGES

DECODER_VALUES = 2**21  # kept of all knots together
COPIED = ("data.json", "metrics.json", "samples.png", "vlb_terms.png", "README.md")


def build_parser() -> argparse.ArgumentParser:
    """The options and their help texts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.add_argument("--model", required=True, help="Pipeline to optimize: a folder or a Hub name.")
    parser.add_argument("--revision", help="Its branch, tag or commit on the Hub.")
    parser.add_argument("--steps", type=positive_int, nargs="+", required=True, help="Numbers of steps K.")
    parser.add_argument("--output_dir", help="Write the whole pipeline here and leave --model as it is.")
    parser.add_argument("--cache_dir", help="Where downloads are kept.")
    parser.add_argument(
        "--variance",
        choices=("auto", *VARIANCES),
        default="auto",
        help="Of the stored paths: the network's own, an optimal one, or for each K what costs least.",
    )
    parser.add_argument(
        "--reverse_variance",
        choices=VARIANCES,
        default="network",
        help="Store this one for all other chains too, the whole one among them.",
    )
    data = parser.add_argument_group("data")
    add_data_options(data)
    estimate = parser.add_argument_group("estimate")
    estimate.add_argument("--num_fit_images", type=positive_int, default=1024, help="Training images, at most 2048.")
    estimate.add_argument("--num_knots", type=positive_int, default=100, help="Timesteps to visit with each.")
    estimate.add_argument("--seed", type=not_negative_int, default=0, help="Of the noise.")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--eval_batch_size", type=positive_int, help="(image, t) pairs in a network call.")
    machine.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), help="Default: accelerate's setting.")
    machine.add_argument(
        "--cpu", action=argparse.BooleanOptionalAction, default=False, help="Use the CPU even if there is a GPU."
    )
    return parser


class Optimization:
    """What the parts of an optimization share."""

    def __init__(self, args: argparse.Namespace, accelerator: Accelerator):
        self.args, self.accelerator = args, accelerator

        def load() -> tuple[DDPMVLBPipeline, ScoringData]:
            check_output(args)
            pipeline = load_pipeline(args)
            return pipeline, load_data(args, network_shape(pipeline, args), accelerator.is_main_process)

        self.pipeline, data = main_first(accelerator, load, "optimize_timesteps.py", ValueError, OSError)
        self.data: ScoringData = dataclasses.replace(data, record=broadcast_object_list([data.record])[0])
        self.unet = self.pipeline.unet.to(accelerator.device).eval()
        scheduler = self.pipeline.scheduler
        scheduler.store_few_steps()  # what an earlier run has stored is replaced
        too_many = [steps for steps in args.steps if steps > len(scheduler)]
        if too_many:
            raise ValueError(f"--steps {too_many[0]} must lie in 1 .. {len(scheduler)}, the length of the chain.")
        self.training = dataclasses.replace(scheduler.reverse_process(dtype=torch.float64), levels=self.data.levels)
        self.discrete = self.data.levels is not None
        self.unit = "bits/dim" if self.discrete else "nats/dim of density"
        self.dims = self.batch([0])[0].numel()
        self.variances = variances_for(self.training)
        self.fitted = self._fitted()

    def _fitted(self) -> list[int]:
        """Positions of the training images that are used; those of each pixel need enough of them."""
        total = len(self.data.other)
        count = min(self.args.num_fit_images, total)
        if count < MIN_IMAGES:
            if "per_pixel" in (self.args.variance, self.args.reverse_variance):
                raise ValueError(
                    f"The variances of each pixel need at least {MIN_IMAGES} training images, but there are {count}: "
                    "give more images (--num_fit_images), or --variance analytic."
                )
            self.variances.remove("per_pixel")
            self.accelerator.print(f"Only {count} training images: no variances of each pixel below {MIN_IMAGES}.")
        elif count < FEW_IMAGES:
            self.accelerator.print(
                f"Only {count} training images: the variances of each pixel are rough below {FEW_IMAGES}."
            )
        return [i * total // count for i in range(count)]

    def model(self, x_t: Tensor, timesteps: Tensor, **conditioning: Tensor) -> Tensor:
        """The network, under the run's mixed precision."""
        with self.accelerator.autocast():
            return self.unet(x_t.to(self.unet.dtype), timesteps, **conditioning).sample.float()

    def batch(self, positions: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """Held-out images."""
        return self.data.batch(self.data.scored, positions)

    @property
    def values_per_call(self) -> int:
        """Values in a network call."""
        if self.args.eval_batch_size is not None:
            return self.args.eval_batch_size * self.dims
        return 2**16 if self.accelerator.device.type == "cpu" else 2**20

    def on_device(self, process: ReverseProcess) -> ReverseProcess:
        """A process as the network's outputs need it."""
        return process.to(self.accelerator.device, torch.float32)


def collect(run: Optimization) -> StepStatistics:
    """The statistics of the training images, on all processes together."""
    accelerator = run.accelerator
    reverse, knots = run.on_device(run.training), spread_knots(run.training.forward, run.args.num_knots)
    decoder_images = max(8, DECODER_VALUES // (len(knots) * run.dims))
    size = max(1, run.values_per_call // (run.dims * len(knots)))
    groups = list(units(range(len(run.fitted)), size))
    mine = groups[accelerator.process_index :: accelerator.num_processes]
    own: StepStatistics | None = None
    with tqdm(
        total=sum(map(len, mine)),
        desc="Cost table",
        unit="image",
        disable=not accelerator.is_main_process,
        leave=False,
    ) as bar:
        for group in mine:
            x_0, conditioning = run.data.batch(run.data.other, [run.fitted[i] for i in group])
            statistics = collect_statistics(
                run.model, reverse, x_0, knots, group, run.args.seed, conditioning, decoder_images, run.values_per_call
            )
            own = statistics if own is None else own.merge(statistics)
            bar.update(len(group))
    parts = gather_object([own] if own is not None else [])
    total = parts[0]
    for part in parts[1:]:
        total = total.merge(part)
    return total


def same_chains(candidates: list[Candidate]) -> list[list[Candidate]]:
    """The candidates that one network output can score together."""
    groups: dict[tuple[int, ...], list[Candidate]] = {}
    for own in candidates:
        groups.setdefault(own.timesteps, []).append(own)
    return list(groups.values())


def price(run: Optimization, candidates: list[Candidate]) -> list[dict[str, Any]]:
    """Score chains on the held-out images: every step once, and some images twice for the noise's error."""
    accelerator, total = run.accelerator, len(run.data.scored)
    again = [i * total // min(total, SECOND_DRAWS) for i in range(min(total, SECOND_DRAWS))]
    groups, rows = same_chains(candidates), dict[int, dict[str, Any]]()
    with tqdm(
        total=sum(len(group[0].timesteps) for group in groups),
        desc="Held-out images",
        unit="step",
        leave=False,
        disable=not accelerator.is_main_process,
    ) as bar:
        for group in groups:
            first, *others = (run.on_device(own.process) for own in group)
            scorer = VLBEstimator(
                run.model,
                first,
                seed=run.args.seed + 1,
                estimator="full",
                also=others,
                values_per_call=run.values_per_call,
            )
            steps = f"{len(group[0].timesteps)} steps"
            scores = run_sweep(accelerator, scorer, run.batch, range(total), 0, description=steps)
            second = run_sweep(accelerator, scorer, run.batch, again, 1, description=f"{steps}, second draw")
            estimate = estimate_from_scores(scores, second)
            for own, result in zip(group, (estimate, *estimate.also)):
                rows[id(own)] = row(run, own, score(result, run.discrete))
            bar.update(len(group[0].timesteps))
    return [rows[id(own)] for own in candidates]


def row(run: Optimization, own: Candidate, numbers: dict[str, Any]) -> dict[str, Any]:
    """An entry of few_steps.json."""
    network = run.training.variance_type.removesuffix("_log")
    return {
        "num_inference_steps": len(own.timesteps),
        "path": own.path,
        "variance": network if own.variance == "network" else own.variance,
        "timesteps": list(own.timesteps),
        "decoder_shift": None if own.stored is None else own.stored.decoder_shift,
        "expected": None if own.expected is None else own.expected * (1 / math.log(2) if run.discrete else 1.0),
        **numbers,
        "stored": False,
    }


def price_all_steps(run: Optimization, errors: SquaredErrors) -> list[dict[str, Any]]:
    """Score the training chain with every variance, by importance sampling of t."""
    every = list(range(len(run.training.forward)))
    candidates = [Candidate("all", v, respaced(run.training, every, v, errors)) for v in run.variances]
    first, *others = (run.on_device(own.process) for own in candidates)
    x_0, conditioning = run.data.batch(run.data.other, list(range(len(run.data.other))))

    def pilot():
        return fit_pilot(
            run.model,
            first,
            x_0,
            seed=run.args.seed,
            conditioning=conditioning,
            also=others,
            values_per_call=run.values_per_call,
        )

    scorer = VLBEstimator(
        run.model,
        first,
        shared(run.accelerator, pilot),
        seed=run.args.seed + 1,
        also=others,
        values_per_call=run.values_per_call,
    )
    scores = run_sweep(run.accelerator, scorer, run.batch, range(len(run.data.scored)), description="All steps")
    estimate = estimate_from_scores(scores)
    return [row(run, own, score(result, run.discrete)) for own, result in zip(candidates, (estimate, *estimate.also))]


def optimize(run: Optimization) -> tuple[dict[str, Any], list[StoredPath], SquaredErrors]:
    """The content of few_steps.json, and what is to be stored."""
    args, steps = run.args, sorted(set(run.args.steps))
    statistics = collect(run)
    errors = statistics.errors(run.training.forward, "per_pixel" in run.variances)
    offset = run.pipeline.scheduler.config.steps_offset
    candidates = optimal_candidates(run.training, statistics, steps, run.variances, errors)
    paths = [chosen([own for own in candidates if len(own.timesteps) == number], args.variance) for number in steps]
    for number in steps:
        candidates += even_candidates(run.training, number, offset, run.variances, errors)
    rows = price(run, candidates)
    for own, entry in zip(candidates, rows):
        entry["stored"] = own.stored in paths
    order = ["leading", "linspace", "trailing", "quadratic", "optimal"]
    rows.sort(key=lambda entry: (entry["num_inference_steps"], order.index(entry["path"])))
    packages = ("ddpm-vlb", "torch", "diffusers", "accelerate", "datasets")
    result = {
        "rows": rows,
        "all_steps": price_all_steps(run, errors),
        "unit": run.unit,
        "clip_sample": run.training.clip_sample or run.training.thresholding,
        "num_fit_images": len(run.fitted),
        "fit_split": run.data.record["pilot_split"],
        "knots": statistics.knots.tolist(),
        "pseudo_images": statistics.pseudo_images() if "per_pixel" in run.variances else None,
        "seed": args.seed,
        "model": {"name_or_path": args.model, "revision": args.revision, "weights_sha256": fingerprint_of(run.unet)},
        "data": run.data.record,
        "options": {name: value for name, value in vars(args).items() if name != "output_dir"},
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "device": str(run.accelerator.device),
        "num_processes": run.accelerator.num_processes,
    }
    return result, paths, errors


def store_in_place(pipeline: DDPMVLBPipeline, folder: Path) -> None:
    """Replace a folder's scheduler configuration; what was there holds until the one rename that changes it."""
    place = folder / "scheduler"
    with tempfile.TemporaryDirectory(prefix=".scheduler-", dir=folder) as aside:
        made = Path(aside, "made")
        pipeline.scheduler.save_pretrained(made)
        for file in sorted(made.glob("*.safetensors")):  # named by its content
            os.replace(file, place / file.name)
        kept = {file.name for file in place.glob("*.safetensors")} & {str(pipeline.scheduler.errors_file)}
        os.replace(made / "scheduler_config.json", place / "scheduler_config.json")
    for file in place.glob("x_0_mse-*.safetensors"):
        if file.name not in kept:
            file.unlink()


def store(run: Optimization, result: dict[str, Any], paths: list[StoredPath], errors: SquaredErrors) -> Path:
    """Write the checkpoint, the numbers and the picture."""
    args, pipeline = run.args, run.pipeline
    pipeline.scheduler.store_few_steps(paths, errors, args.reverse_variance)
    source = Path(args.model)
    folder = source if args.output_dir is None else Path(args.output_dir)
    if args.output_dir is None:
        store_in_place(pipeline, folder)
        write_results(run, result, folder)
        return folder
    with tempfile.TemporaryDirectory(prefix=".few_steps-", dir=folder.parent) as aside:
        made = Path(aside, "made")
        pipeline.to("cpu").save_pretrained(made)
        for name in COPIED:
            if (source / name).is_file():
                shutil.copyfile(source / name, made / name)
        write_results(run, result, made)
        if folder.exists():  # empty, or of an earlier run
            os.replace(folder, Path(aside, "before"))
        os.replace(made, folder)
    return folder


def write_results(run: Optimization, result: dict[str, Any], folder: Path) -> None:
    """Write few_steps.json and few_steps.png."""
    plot([*result["rows"], *result["all_steps"]], folder / "few_steps.png", run.unit)
    write_json(result, folder / "few_steps.json")


def check_output(args: argparse.Namespace) -> None:
    """Refuse what could not be written at the end."""
    if args.output_dir is None:
        if not Path(args.model).is_dir():
            raise ValueError(f"--model {args.model} is on the Hub: say with --output_dir where the pipeline shall go.")
        prepare_output_dir(Path(args.model))
        return
    folder = Path(args.output_dir)
    if Path(args.model).is_dir() and folder.resolve() == Path(args.model).resolve():
        raise ValueError("--output_dir is --model: leave it out to update the model in place.")
    if folder.exists() and (
        not folder.is_dir() or (any(folder.iterdir()) and not (folder / "few_steps.json").is_file())
    ):
        raise ValueError(f"--output_dir {folder} holds something else already: give a folder that is not there.")
    prepare_output_dir(folder.resolve().parent)


def report(run: Optimization, result: dict[str, Any], folder: Path) -> None:
    """Print the table and what was stored."""
    print_table(result["all_steps"], run.unit)
    print_table(result["rows"], run.unit)
    images = result["data"]["num_images"]
    print(
        f"\n{images} held-out images, every step a network call; paths and variances from {len(run.fitted)} images of"
    )
    print(f"{result['fit_split']!r}. What is stored (*) is in {folder}, with few_steps.json and few_steps.png.")


def main(argv: Sequence[str] | None = None) -> dict[str, Any] | None:
    """Optimize a checkpoint. Returns the content of few_steps.json (on the main process)."""
    args = build_parser().parse_args(argv)
    # Processes wait for the slowest one's images, which may take hours.
    patience = InitProcessGroupKwargs(timeout=datetime.timedelta(days=7))
    accelerator = Accelerator(cpu=args.cpu, mixed_precision=args.mixed_precision, kwargs_handlers=[patience])
    run = Optimization(args, accelerator)
    result, paths, errors = optimize(run)
    if accelerator.is_main_process:
        report(run, result, store(run, result, paths, errors))
    accelerator.wait_for_everyone()
    leave(accelerator)
    return result if accelerator.is_main_process else None


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, FloatingPointError) as problem:
        sys.exit(f"optimize_timesteps.py: {problem}")
