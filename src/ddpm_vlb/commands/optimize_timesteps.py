r"""Find the best few steps and variances of a trained checkpoint, and store them in it.

    ddpm-vlb optimize-timesteps --model runs/digits --steps 5 10 25 50
    ddpm-vlb optimize-timesteps --model google/ddpm-cifar10-32 --dataset_name cifar10 \
        --image_column img --steps 10 25 --output_dir runs/cifar10-few

Images of the training split say what each step between any two timesteps would cost; dynamic programming finds the
cheapest chains of K steps; held-out images and fresh noise score these and the usual ones, by the network itself.
Afterwards `DDPMVLBPipeline.from_pretrained(...)(num_inference_steps=10)` samples, and `ddpm-vlb evaluate
--num_inference_steps 10` scores, the stored chain; stock diffusers loads and samples the checkpoint as before. Writes
few_steps.json and few_steps.png beside it.
"""

import argparse
import dataclasses
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from tqdm.auto import tqdm

from ddpm_vlb import (
    ALL_SPACINGS,
    FEW_IMAGES,
    MIN_IMAGES,
    SECOND_DRAWS,
    VARIANCES,
    Pilot,
    ReverseProcess,
    SquaredErrors,
    StepStatistics,
    StoredPath,
    VLBEstimate,
    VLBEstimator,
    collect_statistics,
    estimate_from_scores,
    fit_pilot,
    spaced_timesteps,
    spread_knots,
    stock_sigmas,
)
from ddpm_vlb.commands.options import (
    Parser,
    add_machine_options,
    add_model_options,
    add_overwrite_option,
    add_scored_options,
    at_least_two,
    not_negative_int,
    positive_int,
)
from ddpm_vlb.few_steps.candidates import (
    Candidate,
    calls_ahead,
    chosen,
    even_candidates,
    optimal_candidates,
    respaced,
    same_chains,
    variances_for,
)
from ddpm_vlb.few_steps.files import PARTIAL, check_output, store
from ddpm_vlb.few_steps.report import compare, report
from ddpm_vlb.runtime.launching import main_first, patient_accelerator
from ddpm_vlb.runtime.reporting import provenance, score
from ddpm_vlb.runtime.stopping import leave, refused
from ddpm_vlb.scoring.checkpoint import Checkpoint
from ddpm_vlb.scoring.sweep import PartialScores, run_sweep, shared, units

DECODER_VALUES = 2**20  # kept of all knots together
PIXEL_VALUES = 2**26  # of the variances of each pixel of all steps together


def build_parser() -> argparse.ArgumentParser:
    """The options and their help texts."""
    parser = Parser("optimize-timesteps", __doc__)
    add_model_options(parser, "optimize", "Write the whole pipeline here and leave --model as it is.")
    add_overwrite_option(parser)
    parser.add_argument("--steps", type=positive_int, nargs="+", required=True, help="Numbers of steps K.")
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
    add_scored_options(parser)
    estimate = parser.add_argument_group("estimate")
    estimate.add_argument("--num_fit_images", type=positive_int, default=1024, help="Training images, at most 2048.")
    estimate.add_argument(
        "--num_knots", type=at_least_two, default=100, help="Timesteps to visit with each, at least 2."
    )
    estimate.add_argument("--seed", type=not_negative_int, default=0, help="Of the noise.")
    add_machine_options(parser)
    return parser


class Optimization(Checkpoint):
    """What the parts of an optimization share."""

    def __init__(self, args: argparse.Namespace, accelerator: Accelerator):
        main_first(accelerator, lambda: check_output(args), "optimize-timesteps", ValueError, OSError)
        super().__init__(args, accelerator, "optimize-timesteps")
        scheduler = self.pipeline.chain
        if scheduler.optimal_paths and args.output_dir is None:
            accelerator.print(f"Replaces stored steps {[*scheduler.optimal_paths]}: files coded by them need a copy.")
        scheduler.store_few_steps()
        for steps in args.steps:
            if steps > len(scheduler):
                raise ValueError(f"--steps {steps} must lie in 1 .. {len(scheduler)}, the length of the chain.")
            spaced_timesteps("leading", steps, len(scheduler), scheduler.config.steps_offset)
        fit_split = self.data.record["pilot_split"]
        if fit_split in ("validation", "test"):
            raise ValueError(
                f"--split {args.split} leaves only {fit_split!r} to find paths and variances on. They are found on "
                "training images: score a split that was held out."
            )
        self.training = dataclasses.replace(scheduler.reverse_process(dtype=torch.float64), levels=self.data.levels)
        self.partial = Path(args.output_dir or args.model) / f"{PARTIAL}scores"
        self.variances = variances_for(self.training, self.pipeline.path is not None)
        self.fitted = self._fitted()

    def _fitted(self) -> list[int]:
        """Positions of the training images that are used; those of each pixel need enough of them."""
        total = len(self.data.other)
        count = min(self.args.num_fit_images, total)
        if count < self.args.num_fit_images:
            self.accelerator.print(
                f"{self.data.record['pilot_split']!r}: {count} images, not {self.args.num_fit_images}."
            )
        if count < MIN_IMAGES:
            if "per_pixel" in (self.args.variance, self.args.reverse_variance):
                raise ValueError(
                    f"The variances of each pixel need at least {MIN_IMAGES} training images, but there are {count}: "
                    "give more images (--num_fit_images), or --variance analytic."
                )
            self.variances.remove("per_pixel")
            self.accelerator.print(f"Only {count} training images: no variances of each pixel below {MIN_IMAGES}.")
        elif count < FEW_IMAGES:
            self.accelerator.print(f"Only {count} training images: rough variances of each pixel below {FEW_IMAGES}.")
        return [i * total // count for i in range(count)]

    @property
    def unit_of_a_nat(self) -> float:
        """What nats are multiplied by."""
        return 1 / math.log(2) if self.discrete else 1.0

    def scorer(self, first: ReverseProcess, others: list[ReverseProcess], **options: Any) -> VLBEstimator:
        """How held-out images are scored: with noise of their own."""
        options |= {"seed": self.args.seed + 1, "also": others, "values_per_call": self.values_per_call}
        return VLBEstimator(self.model, first, **options)

    def store(self, processes: list[ReverseProcess]) -> PartialScores:
        """Where the scores of a chain are kept until the end, for a run that is started again."""
        key = self.key(processes, seed=self.args.seed)
        return PartialScores(self.partial / key[:16], self.accelerator.print, key)

    def on_device(self, process: ReverseProcess) -> ReverseProcess:
        """A process as the network's outputs need it."""
        return process.to(self.accelerator.device, torch.float32)


def collect(run: Optimization) -> StepStatistics:
    """The statistics of the training images, on all processes together."""
    accelerator = run.accelerator
    reverse, knots = run.on_device(run.training), spread_knots(run.training.forward, run.args.num_knots)
    decoder_dims = max(1, DECODER_VALUES // (len(knots) * len(run.fitted)))
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
                run.model, reverse, x_0, knots, group, run.args.seed, conditioning, decoder_dims, run.values_per_call
            )
            own = statistics if own is None else own.merge(statistics)
            bar.update(len(group))
    parts = gather_object([own] if own is not None else [])
    total: StepStatistics = parts[0]
    for part in parts[1:]:
        total = total.merge(part)
    return total


def price(run: Optimization, candidates: list[Candidate]) -> list[dict[str, Any]]:
    """Score chains on the held-out images: every step once, and some images twice for the noise's error."""
    accelerator, total, unit = run.accelerator, len(run.data.scored), run.unit_of_a_nat
    again = [i * total // min(total, SECOND_DRAWS) for i in range(min(total, SECOND_DRAWS))]
    groups, rows = same_chains(candidates), dict[int, dict[str, Any]]()
    hidden, steps = not accelerator.is_main_process, sum(len(group[0].timesteps) for group in groups)
    with tqdm(total=steps, desc="Held-out images", unit="step", leave=False, disable=hidden) as bar:
        for group in groups:
            processes = [run.on_device(own.process) for own in group]
            scorer = run.scorer(processes[0], processes[1:], estimator="full")
            store = run.store(processes)
            what = f"{len(group[0].timesteps)} steps"
            scores = run_sweep(accelerator, scorer, run.batch, range(total), 0, store, what, unit)
            second = run_sweep(accelerator, scorer, run.batch, again, 1, store, f"{what}, second draw", unit)
            estimate = estimate_from_scores(scores, second)
            for own, result in zip(group, (estimate, *estimate.also)):
                rows[id(own)] = row(run, own, result)
            bar.update(len(group[0].timesteps))
    return [rows[id(own)] for own in candidates]


def row(run: Optimization, own: Candidate, estimate: VLBEstimate) -> dict[str, Any]:
    """An entry of few_steps.json, and the images' bounds."""
    return {
        "num_inference_steps": len(own.timesteps),
        "path": own.path,
        "variance": run.training.variance_type.removesuffix("_log") if own.variance == "network" else own.variance,
        "timesteps": list(own.timesteps),
        "decoder_shift": None if own.stored is None else own.stored.decoder_shift,
        "expected": None if own.expected is None else own.expected * run.unit_of_a_nat,
        **score(estimate, run.discrete),
        "sigmas": None if own.path == "all" else stock_sigmas(run.pipeline, own.timesteps),
        "stored": False,
        "per_image": estimate.per_image * (1.0 if run.discrete else math.log(2)),
    }


def price_all_steps(run: Optimization, errors: SquaredErrors) -> list[dict[str, Any]]:
    """Score the training chain with every variance, by importance sampling of t."""
    every = list(range(len(run.training.forward)))
    variances = list(run.variances)
    if len(every) * run.dims > PIXEL_VALUES and "per_pixel" in variances:
        variances.remove("per_pixel")
        run.accelerator.print("The variances of each pixel of all steps do not fit: that row is left out.")
    candidates = [Candidate("all", v, respaced(run.training, every, v, errors)) for v in variances]
    first, *others = (run.on_device(own.process) for own in candidates)
    x_0, conditioning = run.data.batch(run.data.other, list(range(len(run.data.other))))

    def pilot() -> Pilot:
        return fit_pilot(
            run.model,
            first,
            x_0,
            seed=run.args.seed,
            conditioning=conditioning,
            also=others,
            values_per_call=run.values_per_call,
        )

    scorer = run.scorer(first, others, pilot=shared(run.accelerator, pilot))
    positions, unit = range(len(run.data.scored)), run.unit_of_a_nat
    scores = run_sweep(run.accelerator, scorer, run.batch, positions, description="All steps", report_unit=unit)
    estimate = estimate_from_scores(scores)
    return [row(run, own, result) for own, result in zip(candidates, (estimate, *estimate.also))]


class Found(NamedTuple):
    """What the training images say: the chains to score, the paths to store, and what is told of the estimate."""

    candidates: list[Candidate]
    paths: list[StoredPath]
    errors: SquaredErrors
    knots: list[int]
    pseudo_images: float | None


def find(run: Optimization) -> Found:
    """The chains to score; alike on all processes, which must score the same ones."""
    args, steps = run.args, sorted(set(run.args.steps))
    statistics = collect(run)
    if not run.accelerator.is_main_process:
        return broadcast_object_list([None])[0]
    pixels = "per_pixel" in run.variances
    errors = statistics.errors(run.training.forward, pixels)
    offset = run.pipeline.chain.config.steps_offset
    candidates = optimal_candidates(run.training, statistics, steps, run.variances, errors)
    paths = [chosen([own for own in candidates if len(own.timesteps) == number], args.variance) for number in steps]
    for number in steps:
        candidates += even_candidates(run.training, number, offset, run.variances, errors)
    weight = statistics.pseudo_images if pixels else None
    return broadcast_object_list([Found(candidates, paths, errors, statistics.knots.tolist(), weight)])[0]


def optimize(run: Optimization) -> tuple[dict[str, Any], Found]:
    """The content of few_steps.json, and what is to be stored."""
    total, started = len(run.data.scored), time.perf_counter()
    table = len(run.fitted) * len(spread_knots(run.training.forward, run.args.num_knots))
    scores = calls_ahead(sorted(set(run.args.steps)), len(run.variances), total + min(total, SECOND_DRAWS))
    run.accelerator.print(f"{table} network calls for the cost table, and at most {scores} for the chains' scores.")
    found = find(run)
    minutes = (time.perf_counter() - started) / table * scores / 60
    run.accelerator.print(f"The scores take at most some {minutes:.1f} minutes.")
    rows = price(run, found.candidates)
    for own, entry in zip(found.candidates, rows):
        entry["stored"] = own.stored in found.paths
    compare(rows)
    rows.sort(key=lambda entry: (entry["num_inference_steps"], ALL_SPACINGS.index(entry["path"])))
    whole = price_all_steps(run, found.errors)
    for entry in whole:
        del entry["per_image"]
    result = {
        "rows": rows,
        "all_steps": whole,
        "unit": run.unit,
        "clip_sample": run.training.clip_sample or run.training.thresholding,
        "num_fit_images": len(run.fitted),
        "fit_split": run.data.record["pilot_split"],
        "knots": found.knots,
        "pseudo_images": None if (weight := found.pseudo_images) is None or math.isinf(weight) else weight,
        "seed": run.args.seed,
        "model": run.told,
        "data": run.data.record,
        **provenance(run.accelerator, run.args),
    }
    return result, found


@refused("optimize-timesteps")
def main(argv: Sequence[str] | None = None) -> dict[str, Any] | None:
    """Optimize a checkpoint. Returns the content of few_steps.json (on the main process)."""
    args = build_parser().parse_args(argv)
    accelerator = patient_accelerator(args)
    run = Optimization(args, accelerator)
    result, found = optimize(run)
    if accelerator.is_main_process:
        run.pipeline.chain.store_few_steps(found.paths, found.errors, args.reverse_variance)
        report(result, store(args, run.pipeline, result))
    accelerator.wait_for_everyone()
    if accelerator.is_local_main_process:
        for left in run.partial.parent.glob(f"{PARTIAL}*"):
            shutil.rmtree(left, ignore_errors=True)
    leave(accelerator)
    return result if accelerator.is_main_process else None


if __name__ == "__main__":
    main()
