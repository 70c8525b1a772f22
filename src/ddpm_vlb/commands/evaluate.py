"""Bits/dim of a diffusers DDPM checkpoint, with error bars, at a fiftieth of the full loop's cost.

    accelerate launch examples/evaluate.py --model runs/digits
    accelerate launch examples/evaluate.py --model google/ddpm-cifar10-32 --dataset_name cifar10 --image_column img
    accelerate launch examples/evaluate.py --model runs/digits --tolerance 0.002
    accelerate launch examples/evaluate.py --model runs/digits --estimator full --num_images 96

Any DDPMPipeline with a DDPMScheduler will do, ours or stock, from a folder or the Hub. Writes metrics.json,
vlb_terms.png (L_t against t) and per_image.png to --output_dir. Started again it goes on where it was stopped.
"""

import argparse
import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import math
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list
from image_data import HUB_HINT, named_data
from launching import main_first, prepare_output_dir
from reporting import describe, plot_per_image, plot_vlb_terms, score, write_json
from scoring import PartialScores, fingerprint_of, run_sweep, shared
from scoring_data import NetworkShape, ScoringData, load_scoring_data
from stopping import leave
from torch import Tensor
from train_options import HelpFormatter, not_negative_int, positive_float, positive_int

from ddpm_vlb import (
    DDPMVLBPipeline,
    DDPMVLBScheduler,
    Pilot,
    ReverseProcess,
    VLBEstimate,
    VLBEstimator,
    VLBScores,
    estimate_from_scores,
    fit_pilot,
)
from ddpm_vlb.estimation import ESTIMATORS, SECOND_DRAWS
from ddpm_vlb.respacing import ALL_SPACINGS
from ddpm_vlb.scores import Scores

RECORD = """
    dataset_name dataset_config_name train_data_dir image_column train_split test_split resolution test_fingerprint
    num_images
""".split()
MIN_DEGREES = 20  # of freedom of the noise standard error
PICTURES = ("vlb_terms.png", "per_image.png")
FORMAT = 4  # of partial results; raise it when their meaning changes


def _levels(text: str) -> int | None:
    if text.lower() == "none":
        return None
    value = int(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"must be at least 2, or none for continuous data, but got {text}")
    return value


def add_data_options(data: Any) -> None:
    """Options that say which images to score.

    Args:
        data: a group of a parser's arguments.
    """
    data.add_argument(
        "--dataset_name", help="Hub name, local folder or file; default: the model's data.json, else the digits."
    )
    data.add_argument("--dataset_config_name", help="Configuration of the data set, if it has several.")
    data.add_argument("--split", default="test", help="Split to score.")
    data.add_argument("--image_column", default="image", help="Column of images, or of arrays (C, H, W).")
    data.add_argument("--label_column", help="Column of class labels for a class-conditional network; default: label.")
    data.add_argument("--resolution", type=positive_int, help="Resize and crop images to this size.")
    data.add_argument("--num_images", type=positive_int, help="Score only the first so many; default: all.")
    data.add_argument(
        "--levels",
        type=_levels,
        default=argparse.SUPPRESS,
        help="Levels of the data on [-1, 1], or none for continuous; default: what the checkpoint says.",
    )


def build_parser() -> argparse.ArgumentParser:
    """The options and their help texts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    switch = argparse.BooleanOptionalAction
    parser.add_argument("--model", required=True, help="Pipeline to score: a folder or a Hub name.")
    parser.add_argument("--revision", help="Its branch, tag or commit on the Hub.")
    parser.add_argument("--output_dir", help="Folder for the results; default: evaluation/ in the model's.")
    parser.add_argument("--cache_dir", help="Where downloads are kept.")

    add_data_options(parser.add_argument_group("data"))

    estimator = parser.add_argument_group("estimator")
    estimator.add_argument("--estimator", choices=ESTIMATORS, default="importance", help="full: T calls an image.")
    estimator.add_argument("--calls_per_image", type=int, default=20, help="Network calls for each image, at least 2.")
    estimator.add_argument("--tolerance", type=positive_float, help="Go on until the noise SE is below this.")
    estimator.add_argument("--pilot_calls", type=positive_int, default=1024, help="Network calls of the pilot.")
    estimator.add_argument("--control_variate", action=switch, default=True, help="Subtract what is known of L_t.")
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
        "--clip_sample", action=switch, help="Which number comes first (both are printed); default: the checkpoint's."
    )

    machine = parser.add_argument_group("machine")
    machine.add_argument("--eval_batch_size", type=positive_int, help="(image, t) pairs in a network call.")
    machine.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), help="Default: accelerate's setting.")
    machine.add_argument("--cpu", action=switch, default=False, help="Use the CPU even if there is a GPU.")
    return parser


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the options."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.calls_per_image < 2:
        parser.error(f"--calls_per_image {args.calls_per_image} must be at least 2: one call has no error bar")
    if args.num_inference_steps is not None and args.timesteps is not None:
        parser.error("pass only one of --num_inference_steps and --timesteps")
    if args.timestep_spacing is not None and args.num_inference_steps is None:
        parser.error("--timestep_spacing needs --num_inference_steps")
    if args.tolerance is not None and args.estimator == "full":
        parser.error("--tolerance is for --estimator importance: the full loop has a fixed number of calls")
    return args


def load_pipeline(args: argparse.Namespace) -> DDPMVLBPipeline:
    """The checkpoint as a pipeline of ours."""
    folder = Path(args.model)
    if not folder.is_dir() and (args.model.count("/") != 1 or args.model.startswith((".", "/", "~"))):
        raise FileNotFoundError(f"--model {args.model}: there is no such folder, and it is no Hub name (user/name).")
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"--model {args.model}: the folder holds no pipeline (no model_index.json).")
    try:
        pipeline = DDPMVLBPipeline.from_pretrained(args.model, revision=args.revision, cache_dir=args.cache_dir)
    except Exception as error:  # the Hub client, diffusers and safetensors raise whatever they like
        hint = "" if folder.is_dir() else f" {HUB_HINT}"
        raise ValueError(f"--model {args.model} cannot be loaded: {error}{hint}") from error
    if not isinstance(pipeline.scheduler, DDPMVLBScheduler):
        raise ValueError(
            f"--model {args.model} has a {type(pipeline.scheduler).__name__}, whose chain has no variational bound. "
            "Replace it, `DDPMVLBScheduler.from_config(pipeline.scheduler.config)`, and save the pipeline again."
        )
    return pipeline


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


def network_shape(pipeline: DDPMVLBPipeline, args: argparse.Namespace) -> NetworkShape:
    """What the checkpoint says of its data."""
    config = pipeline.unet.config
    size = config.get("sample_size")
    size = (size, size) if isinstance(size, int) else None if size is None else tuple(size)
    levels = stated = pipeline.scheduler.config.get("levels", 256)
    if "levels" in args and stated != 256 and args.levels != stated:
        raise ValueError(f"--levels {args.levels} contradicts the checkpoint, whose scheduler says `levels` {stated}.")
    if "levels" in args:
        levels = args.levels
    return NetworkShape(config.in_channels, size, levels, pipeline.num_classes)


def read_record(path: Path) -> dict[str, Any] | None:
    """The data.json beside a model, if there is one."""
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text())
        missing = [name for name in RECORD if name not in record]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if missing:
        raise ValueError(f"{path} is no record of train.py: it lacks {missing}. Name the data with `--dataset_name`.")
    return record


def load_data(args: argparse.Namespace, network: NetworkShape, check: bool) -> ScoringData:
    """The images to score, and others for the pilot; all of them checked, if asked for."""
    record = Path(args.model) / "data.json"
    with named_data(args.dataset_name or f"of {record}"):
        return load_scoring_data(
            network,
            args.split,
            read_record(record),
            args.dataset_name,
            args.dataset_config_name,
            args.image_column,
            args.label_column,
            args.resolution,
            args.num_images,
            args.cache_dir,
            "levels" in args,
            check,
        )


class Checkpoint:
    """A checkpoint, held-out images, and how the network is called; loaded by all processes.

    Args:
        args: of the script.
        accelerator: of the run.
        script: named before messages.
    """

    def __init__(self, args: argparse.Namespace, accelerator: Accelerator, script: str):
        self.args, self.accelerator = args, accelerator

        def load() -> tuple[DDPMVLBPipeline, ScoringData]:
            pipeline = load_pipeline(args)
            return pipeline, load_data(args, network_shape(pipeline, args), accelerator.is_main_process)

        self.pipeline, data = main_first(accelerator, load, script, ValueError, OSError)
        record = broadcast_object_list([data.record])[0]  # with the main process's fingerprints
        self.data: ScoringData = dataclasses.replace(data, record=record)
        self.unet = self.pipeline.unet.to(accelerator.device).eval()
        self.weights = fingerprint_of(self.unet)
        self.dims = self.batch([0])[0].numel()
        self.discrete = self.data.levels is not None
        self.unit = "bits/dim" if self.discrete else "nats/dim of density"

    def model(self, x_t: Tensor, timesteps: Tensor, **conditioning: Tensor) -> Tensor:
        """The network, under the run's mixed precision."""
        with self.accelerator.autocast():
            return self.unet(x_t.to(self.unet.dtype), timesteps, **conditioning).sample.float()

    def batch(self, positions: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """Images to score."""
        return self.data.batch(self.data.scored, positions)

    @property
    def values_per_call(self) -> int:
        """Values in a network call: as many as keep the device busy, or as asked for."""
        if self.args.eval_batch_size is not None:
            return self.args.eval_batch_size * self.dims
        return 2**16 if self.accelerator.device.type == "cpu" else 2**20

    def key(self, processes: Sequence[ReverseProcess], **more: Any) -> str:
        """A hash over everything that the scores of some processes depend on."""
        content = {
            "format": [FORMAT, importlib.metadata.version("ddpm-vlb")],
            "weights": self.weights,
            "network": {k: v for k, v in json.loads(self.unet.to_json_string()).items() if not k.startswith("_")},
            "data": self.data.record,
            "mixed_precision": self.accelerator.mixed_precision,
            "values_per_call": self.values_per_call,
            "processes": [described(process) for process in processes],
            **more,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def described(reverse: ReverseProcess) -> list[Any]:
    """All that tells one reverse process from another."""
    m, first = reverse.x_0_mse, reverse.decoder_log_variance
    return [
        reverse.prediction_type,
        reverse.variance_type,
        reverse.clip_sample,
        reverse.thresholding,
        reverse.clip_sample_range,
        reverse.dynamic_thresholding_ratio,
        reverse.sample_max_value,
        reverse.levels,
        reverse.forward.timesteps.tolist(),
        reverse.forward.betas.tolist(),
        None if m is None else hashlib.sha256(m.double().cpu().numpy().tobytes()).hexdigest(),
        None if first is None else torch.as_tensor(first).tolist(),
        reverse.decoder_slope,
    ]


class Evaluation(Checkpoint):
    """What the parts of an evaluation share."""

    def __init__(self, args: argparse.Namespace, accelerator: Accelerator):
        super().__init__(args, accelerator, "evaluate.py")
        reverse = chain(args, self.pipeline.scheduler, accelerator.device)
        reverse = dataclasses.replace(reverse, levels=self.data.levels)
        clipped = reverse.clip_sample or reverse.thresholding
        first = clipped if args.clip_sample is None else args.clip_sample
        both = [_with_clipping(reverse, first), _with_clipping(reverse, not first)]
        self.reverse, self.clips = both[0], first
        # Unless a checkpoint of continuous data says so itself, clipping its values to [-1, 1] is nonsense.
        self.also = both[1:] if self.discrete or clipped else []
        options = "estimator calls_per_image tolerance pilot_calls control_variate seed".split()
        self.run_key = self.key(both, options={name: getattr(args, name) for name in options})
        self.folder = Path(args.output_dir) if args.output_dir else default_folder(args.model)

    def pilot(self, store: PartialScores) -> Pilot | None:
        """The pilot, or None for the full loop, which needs none."""
        if self.args.estimator == "full":
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
            estimator=self.args.estimator,
            also=self.also,
            values_per_call=self.values_per_call,
        )

    def sweep(self, scorer: VLBEstimator, positions: Sequence[int], sweep: int, store: PartialScores, what: str):
        """Score the images at `positions`."""
        unit = 1 / math.log(2) if self.discrete else 1.0
        return run_sweep(self.accelerator, scorer, self.batch, positions, sweep, store, what, unit)


def _with_clipping(reverse: ReverseProcess, clip: bool) -> ReverseProcess:
    if not clip:
        return dataclasses.replace(reverse, clip_sample=False, thresholding=False)
    return reverse if reverse.thresholding else dataclasses.replace(reverse, clip_sample=True)


def enough_replicates(calls: int, images: int) -> int | None:
    """Replicates that give the noise SE some 20 degrees of freedom, which few images alone do not; None for many."""
    if images >= MIN_DEGREES:
        return None
    divisors = [r for r in range(2, calls + 1) if calls % r == 0]
    return next((r for r in divisors if images * (r - 1) >= MIN_DEGREES), divisors[-1])


def default_folder(model: str) -> Path:
    """The folder of a model's evaluation."""
    return Path(model) / "evaluation" if Path(model).is_dir() else Path("runs") / model.replace("/", "--")


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
        missing = max(2.0, total * (1.05 * (noise_se / tolerance) ** 2 - 1))
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
    scores, second = full(run, store) if args.estimator == "full" else importance(run, pilot, store)
    estimate = estimate_from_scores(scores, second)
    by_clipping = zip(("clipped", "unclipped") if run.clips else ("unclipped", "clipped"), (estimate, *estimate.also))
    scale = 1.0 if run.discrete else math.log(2)
    packages = ("ddpm-vlb", "torch", "diffusers", "accelerate", "datasets")
    metrics = {
        **score(estimate, run.discrete),
        "unit": run.unit,
        "clip_sample": run.clips,
        "by_clipping": {name: score(own, run.discrete) for name, own in by_clipping},
        "estimator": args.estimator,
        "tolerance": args.tolerance,
        "pilot_calls": 0 if pilot is None else pilot.num_calls,
        "second_draw_calls": len(second[0]) * second[0].calls if second else 0,
        "control_variate": pilot is not None and pilot.control is not None,
        "seed": args.seed,
        "timesteps": run.reverse.forward.timesteps.tolist(),
        "l_t": {
            "mean": _json_list(estimate.term_mean * scale),
            "se": _json_list(estimate.term_se * scale),
        },
        "per_image": (estimate.per_image * scale).tolist(),
        "per_image_other_clipping": [(own.per_image * scale).tolist() for own in estimate.also],
        "model": {
            "name_or_path": args.model,
            "revision": args.revision,
            "weights_sha256": run.weights,
            "scheduler": json.loads(run.pipeline.scheduler.to_json_string()),
            "levels": run.data.levels,
        },
        "data": run.data.record,
        "options": {name: value for name, value in vars(args).items() if name != "output_dir"},
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "device": str(run.accelerator.device),
        "num_processes": run.accelerator.num_processes,
        "seconds": time.perf_counter() - started,
        "key": run.run_key,
    }
    return estimate, metrics


def _json_list(values: Tensor) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.tolist()]


def finished(folder: Path, key: str) -> dict[str, Any] | None:
    """The metrics of an earlier run of exactly this evaluation, or None."""
    path = folder / "metrics.json"
    if not all((folder / name).is_file() for name in PICTURES):
        return None
    try:
        metrics = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return metrics if isinstance(metrics, dict) and metrics.get("key") == key else None


def report(metrics: dict[str, Any], folder: Path) -> None:
    """Print the result."""
    names = ("clipped", "unclipped") if metrics["clip_sample"] else ("unclipped", "clipped")
    first, other = metrics["by_clipping"][names[0]], metrics["by_clipping"].get(names[1])
    unit, steps = metrics["unit"], len(metrics["timesteps"])
    print(f"\n{describe(first, unit)}")
    print(f"  = L_T {first['prior']:.4f} + sum L_t {first['kl']:.4f} + L_0 {first['decoder']:.4f}, x_0_hat {names[0]}")
    if other is not None:
        print(f"  {names[1]}: {describe(other, unit)}")
    calls = f"{metrics['network_calls_per_image']} network calls each"
    extra = metrics["pilot_calls"] or metrics["second_draw_calls"]
    levels = f"{metrics['data']['levels']} levels" if metrics["data"]["levels"] else "continuous"
    what = "the pilot's" if metrics["pilot_calls"] else "for the error bar"
    images = f"{metrics['num_images']} images of {metrics['data']['split']!r} ({levels})"
    print(f"{images}, {steps} steps, {calls} (+ {extra} {what}).")
    if not metrics["data"]["levels"]:
        print("Continuous data: a density, which depends on the scale of the data and is no code length of images.")
    print(f"metrics.json, vlb_terms.png and per_image.png are in {folder}.")


def main(argv: Sequence[str] | None = None) -> dict[str, Any] | None:
    """Score a checkpoint. Returns the metrics (on the main process)."""
    args = parse_args(argv)
    # Processes wait for the main one's pilot and for the slowest one's images, which may take hours.
    patience = InitProcessGroupKwargs(timeout=datetime.timedelta(days=7))
    accelerator = Accelerator(cpu=args.cpu, mixed_precision=args.mixed_precision, kwargs_handlers=[patience])
    run = Evaluation(args, accelerator)
    folder = run.folder
    prepare_output_dir(folder)
    known = broadcast_object_list([finished(folder, run.run_key) if accelerator.is_main_process else None])[0]
    if known is not None:
        if accelerator.is_main_process:
            print(f"{folder / 'metrics.json'} already holds this evaluation: nothing to do.")
            report(known, folder)
        leave(accelerator)
        return known if accelerator.is_main_process else None
    if accelerator.is_main_process and (folder / "metrics.json").is_file():
        print(f"{folder} holds another evaluation, which this one replaces; --output_dir keeps them apart.")
    if accelerator.is_main_process and args.num_images and len(run.data.scored) < args.num_images:
        print(f"The split {args.split!r} has only {len(run.data.scored)} images to score.")
    store = PartialScores(folder / f"partial-{run.run_key[:16]}", accelerator.print, run.run_key)
    estimate, metrics = evaluate(run, store)
    if accelerator.is_main_process:
        plot_vlb_terms(estimate, folder / "vlb_terms.png", unit=run.unit)
        plot_per_image(estimate, folder / "per_image.png", unit=run.unit)
        write_json(metrics, folder / "metrics.json")
        report(metrics, folder)
    accelerator.wait_for_everyone()
    if accelerator.is_local_main_process:
        shutil.rmtree(store.folder, ignore_errors=True)
    leave(accelerator)
    return metrics if accelerator.is_main_process else None


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, FloatingPointError) as problem:
        sys.exit(f"evaluate.py: {problem}")
