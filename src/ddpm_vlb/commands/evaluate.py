"""Bits/dim of a diffusers DDPM checkpoint, with error bars, at a fiftieth of the full loop's cost.

    ddpm-vlb evaluate --model runs/digits
    ddpm-vlb evaluate --model google/ddpm-cifar10-32 --dataset_name cifar10 --image_column img
    ddpm-vlb evaluate --model runs/digits --tolerance 0.002
    ddpm-vlb evaluate --model runs/digits --estimator full --num_images 96
    ddpm-vlb evaluate --model my/flow --ratios 0.01 80 --ode

Any DDPMPipeline with a DDPMScheduler will do, ours or stock, from a folder or the Hub, and so will a network of flow
matching or EDM with its own scheduler, which is scored on a chain of --ratios. Writes metrics.json, vlb_terms.png (L_t
against t) and per_image.png to --output_dir. Started again it goes on where it was stopped.
"""

import argparse
import dataclasses
import json
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from ddpm_vlb import (
    ALL_SPACINGS,
    ESTIMATORS,
    SECOND_DRAWS,
    DDPMVLBScheduler,
    Pilot,
    ReverseProcess,
    VLBEstimate,
    VLBEstimator,
    VLBScores,
    enough_replicates,
    estimate_from_scores,
    fit_pilot,
)
from ddpm_vlb.commands.options import (
    LARGEST,
    SWITCH,
    Parser,
    add_machine_options,
    add_model_options,
    add_scored_options,
    at_least_two,
    multiple_of_four,
    not_negative_int,
    positive_float,
    positive_int,
)
from ddpm_vlb.runtime.files import read_json, write_json
from ddpm_vlb.runtime.launching import patient_accelerator, prepare_output_dir
from ddpm_vlb.runtime.reporting import plot_per_image, plot_vlb_terms, provenance
from ddpm_vlb.runtime.stopping import leave, refused
from ddpm_vlb.scoring.checkpoint import Checkpoint, default_folder
from ddpm_vlb.scoring.ode import CheckpointODE, has_ode, with_ode
from ddpm_vlb.scoring.report import both_clippings, clips, entry, finished, path_taken, report
from ddpm_vlb.scoring.sweep import PartialScores, Scores, run_sweep, shared

PILOT_OPTIONS = "pilot_calls control_variate"


def build_parser() -> Parser:
    """The options and their help texts."""
    parser = Parser("evaluate", __doc__)
    add_model_options(parser, "score", "Folder for the results; default: evaluation/ in the model's.")
    add_scored_options(parser)

    estimator = parser.add_argument_group("estimator")
    estimator.add_argument("--estimator", choices=ESTIMATORS, default="importance", help="full: T calls an image.")
    estimator.add_argument(
        "--calls_per_image", type=at_least_two, default=20, help="Network calls for each image, at least 2."
    )
    estimator.add_argument("--tolerance", type=positive_float, help="Go on until the noise SE is below this.")
    estimator.add_argument("--pilot_calls", type=positive_int, default=1024, help="Network calls of the pilot.")
    estimator.add_argument("--control_variate", action=SWITCH, default=True, help="Subtract what is known of L_t.")
    ode = "Score the probability-flow ODE too, by so many network calls an image, 64 if not said."
    estimator.add_argument("--ode", type=multiple_of_four, nargs="?", const=64, metavar="CALLS", help=ode)
    estimator.add_argument("--seed", type=not_negative_int, default=0, help="Of t and noise.")

    chain = parser.add_argument_group("chain")
    chain.add_argument("--num_inference_steps", type=positive_int, help="Score the chain of so many steps.")
    chain.add_argument("--timesteps", type=not_negative_int, nargs="+", help="Score the chain of these timesteps.")
    chain.add_argument(
        "--timestep_spacing",
        choices=ALL_SPACINGS,
        help="Of --num_inference_steps; default: the stored path of so many steps, else the checkpoint's spacing.",
    )
    chain.add_argument(
        "--clip_sample", action=SWITCH, help="Which number comes first (both are printed); default: the checkpoint's."
    )

    add_machine_options(parser)
    return parser


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the options."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.num_inference_steps is not None and args.timesteps is not None:
        parser.error("pass only one of --num_inference_steps and --timesteps")
    idle = {
        "timestep_spacing, without --num_inference_steps": args.num_inference_steps is None,
        f"calls_per_image tolerance {PILOT_OPTIONS}, with --estimator full": args.estimator == "full",
    }
    idle["ode, beside fewer steps, it is of the whole path"] = bool(args.num_inference_steps or args.timesteps)
    parser.refuse_idle(args, idle)
    return args


def chain(args: argparse.Namespace, scheduler: DDPMVLBScheduler, device: torch.device) -> ReverseProcess:
    """The reverse process of the chain to score, the training chain unless another is asked for."""
    steps = args.timesteps
    if steps is not None and (len(set(steps)) < len(steps) or max(steps) >= len(scheduler)):
        raise ValueError(f"--timesteps must be different steps in 0 .. {len(scheduler) - 1}: {steps}.")
    return scheduler.reverse_process(
        device,
        timesteps=steps,
        num_inference_steps=args.num_inference_steps,
        timestep_spacing=args.timestep_spacing,
    )


class Evaluation(Checkpoint):
    """What the parts of an evaluation share."""

    def __init__(self, args: argparse.Namespace, accelerator: Accelerator):
        super().__init__(args, accelerator, "evaluate")
        reverse = chain(args, self.pipeline.chain, accelerator.device)
        reverse = dataclasses.replace(reverse, levels=self.data.levels)
        # Where every step can be taken, none is drawn.
        self.estimator = args.estimator
        if args.calls_per_image >= len(reverse.forward) and args.tolerance is None:
            self.estimator = "full"
            build_parser().refuse_idle(
                args, {f"{PILOT_OPTIONS}, where all {len(reverse.forward)} steps are taken": True}
            )
        both = both_clippings(reverse, args.clip_sample)
        self.reverse, self.clips = both[0], clips(both[0])
        # Unless a checkpoint of continuous data says so itself, clipping its values to [-1, 1] is nonsense.
        self.also = list(both[1:]) if self.discrete or clips(reverse) else []
        options = ["seed"] if self.estimator == "full" else f"seed calls_per_image tolerance {PILOT_OPTIONS}".split()
        told = {"estimator": self.estimator, **{name: getattr(args, name) for name in options}}
        self.ode = None if args.ode is None else CheckpointODE.of(self, self.reverse, args.ode)
        self.run_key = self.key(both, options=told)
        self.partial = f"partial-{self.run_key[:16]}"
        self.asked_folder = Path(args.output_dir) if args.output_dir else default_folder(args.model)
        self.folder = self._own_folder()

    def _own_folder(self) -> Path:
        """The folder asked for, or where it holds another evaluation, one of this evaluation's own beside it."""
        folder = self.asked_folder
        found = [read_json(path) for path in folder.glob("metrics.json")]  # empty where it is broken
        keys = {own.get("key", "") for own in found if own}
        begun = {path.name for path in folder.glob("partial-*")}
        other = {key for key in keys if isinstance(key, str)} - {self.run_key} or begun - {self.partial}
        own = folder.with_name(f"{folder.name}-{self.run_key[:8]}") if other else folder
        return broadcast_object_list([own if self.accelerator.is_main_process else None])[0]

    def path(self) -> str | None:
        """By name, the path that --num_inference_steps takes."""
        steps = self.args.num_inference_steps
        return None if steps is None else path_taken(self.pipeline.chain, steps, self.args.timestep_spacing)

    def pilot(self, store: PartialScores) -> Pilot | None:
        """The pilot, or None for the full loop, which needs none."""
        if self.estimator == "full":
            return None

        def make() -> Pilot:
            saved = store.load_pilot()
            if saved is not None:
                return saved
            x_0, conditioning = self.data.batch(self.data.other, list(range(len(self.data.other))))
            try:
                pilot = fit_pilot(
                    self.model,
                    self.reverse,
                    x_0,
                    self.args.pilot_calls,
                    self.args.seed,
                    control_variate=self.args.control_variate,
                    conditioning=conditioning,
                    also=self.also,
                    values_per_call=self.values_per_call,
                )
            except FloatingPointError as error:
                raise FloatingPointError(
                    f"The pilot, on images of {self.data.record['pilot_split']!r}: {error}"
                ) from error
            store.save_pilot(pilot)
            return pilot

        return shared(self.accelerator, make)

    def scorer(self, pilot: Pilot | None, calls: int) -> VLBEstimator:
        """How to score, with so many calls for each image."""
        return VLBEstimator(
            self.model,
            self.reverse,
            pilot,
            calls,
            enough_replicates(calls, len(self.data.scored)),
            seed=self.args.seed,
            estimator=self.estimator,
            also=self.also,
            values_per_call=self.values_per_call,
        )

    def sweep(self, scorer: VLBEstimator, positions: Sequence[int], sweep: int, store: PartialScores, what: str):
        """Score the images at `positions`."""
        unit = 1 / math.log(2) if self.discrete else 1.0
        return run_sweep(self.accelerator, scorer, self.batch, positions, sweep, store, what, unit)


def importance(run: Evaluation, pilot: Pilot | None, store: PartialScores) -> tuple[Scores, Scores]:
    """Sweeps over all images until the noise standard error is below the tolerance; one, where there is none."""
    positions, tolerance = range(len(run.data.scored)), run.args.tolerance
    calls, sweeps = run.args.calls_per_image, list[Scores]()
    while True:
        number = len(sweeps)
        what = "Scoring" if number == 0 else f"Scoring, sweep {number + 1} of {calls} calls"
        sweeps.append(run.sweep(run.scorer(pilot, calls), positions, number, store, what))
        combined = tuple(VLBScores.combine(own) for own in zip(*sweeps))
        if tolerance is None:
            return combined, ()
        estimate = combined[0].estimate()
        noise_se = estimate.noise_se if run.discrete else estimate.noise_se * math.log(2)
        if noise_se < tolerance:
            return combined, ()
        # The error falls with the root of the calls; a twentieth more makes another sweep unlikely.
        total = estimate.network_calls_per_image
        ratio = noise_se / tolerance
        missing = max(2.0, total * (1.05 * ratio * ratio - 1))
        if not missing < LARGEST:
            raise ValueError(
                f"--tolerance {tolerance} is out of reach: the noise SE is {noise_se} after {total} calls."
            )
        calls = 2 * math.ceil(missing / 2)
        dear = (
            ", more than the full loop's: stop, and ask for less" if total + calls > len(run.reverse.forward) else ""
        )
        run.accelerator.print(f"Noise SE {noise_se:.4f} after {total} calls for each image: {calls} more{dear}.")


def full(run: Evaluation, store: PartialScores) -> tuple[Scores, Scores]:
    """The loop over all steps, and a second draw on some images, spread over the data."""
    total = len(run.data.scored)
    again = min(total, SECOND_DRAWS)
    scorer = run.scorer(None, run.args.calls_per_image)
    scores = run.sweep(scorer, range(total), 0, store, "Scoring, full loop")
    chosen = [i * total // again for i in range(again)]
    return scores, run.sweep(scorer, chosen, 1, store, "Second draw, for the error bar")


def evaluate(run: Evaluation, store: PartialScores) -> tuple[VLBEstimate, dict[str, Any]]:
    """The estimates and the content of metrics.json."""
    args, started = run.args, time.perf_counter()
    pilot = run.pilot(store)
    scores, second = full(run, store) if run.estimator == "full" else importance(run, pilot, store)
    estimate = estimate_from_scores(scores, second)
    scale = 1.0 if run.discrete else math.log(2)
    metrics = {
        **entry(estimate, run.clips, run.discrete),
        "unit": run.unit,
        "estimator": run.estimator,
        "tolerance": args.tolerance,
        "pilot_calls": 0 if pilot is None else pilot.num_calls,
        "second_draw_calls": len(second[0]) * second[0].calls if second else 0,
        "control_variate": pilot is not None and pilot.control is not None,
        "seed": args.seed,
        "timesteps": run.reverse.forward.timesteps.tolist(),
        "path": run.path(),
        "l_t": {
            "mean": _json_list(estimate.term_mean * scale),
            "se": _json_list(estimate.term_se * scale),
        },
        "ode": None,
        "per_image": (estimate.per_image * scale).tolist(),
        "per_image_other_clipping": [(own.per_image * scale).tolist() for own in estimate.also],
        "model": {
            **run.told,
            "scheduler": json.loads(run.pipeline.scheduler.to_json_string()),
            "levels": run.data.levels,
        },
        "data": run.data.record,
        **provenance(run.accelerator, args),
        "seconds": time.perf_counter() - started,
        "key": run.run_key,
    }
    return estimate, metrics


def _json_list(values: Tensor) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.tolist()]


def bound(run: Evaluation) -> dict[str, Any]:
    """Score the bound and write it; returns the content of metrics.json."""
    accelerator, folder = run.accelerator, run.folder
    store = PartialScores(folder / run.partial, accelerator.print, run.run_key)
    estimate, metrics = evaluate(run, store)
    if accelerator.is_main_process:
        plot_vlb_terms(estimate, folder / "vlb_terms.png", unit=run.unit)
        plot_per_image(estimate, folder / "per_image.png", unit=run.unit)
        write_json(metrics, folder / "metrics.json")
    accelerator.wait_for_everyone()
    if accelerator.is_local_main_process:
        shutil.rmtree(store.folder, ignore_errors=True)
    return metrics


@refused("evaluate")
def main(argv: Sequence[str] | None = None) -> dict[str, Any] | None:
    """Score a checkpoint. Returns the metrics (on the main process)."""
    args = parse_args(argv)
    accelerator = patient_accelerator(args)
    run = Evaluation(args, accelerator)
    folder = run.folder
    prepare_output_dir(folder)
    known = broadcast_object_list([finished(folder, run.run_key) if accelerator.is_main_process else None])[0]
    if known is not None:
        whole = has_ode(known, args.ode)
        what = "evaluation: nothing to do" if whole else "bound: only the ODE is scored"
        accelerator.print(f"{folder / 'metrics.json'} already holds this {what}.")
    elif accelerator.is_main_process:
        if folder != run.asked_folder:
            print(f"{run.asked_folder} holds another evaluation: this one goes to {folder}.")
        if args.num_images and len(run.data.scored) < args.num_images:
            print(f"The split {args.split!r} has only {len(run.data.scored)} images to score.")
    metrics = bound(run) if known is None else known
    if run.ode is not None and not has_ode(metrics, args.ode):
        metrics = with_ode(run, run.ode, metrics)
        if accelerator.is_main_process:
            write_json(metrics, folder / "metrics.json")
    if accelerator.is_main_process:
        report(metrics, folder)
    accelerator.wait_for_everyone()
    leave(accelerator)
    return metrics if accelerator.is_main_process else None


if __name__ == "__main__":
    main()
