"""`ddpm-vlb train`: around the loop of the recipe, validation, the final score, and what is saved and uploaded."""

import argparse
import contextlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed
from diffusers import UNet2DModel
from torch import Tensor
from tqdm.auto import tqdm

from ddpm_vlb import DDPMVLBPipeline, VLBEstimate, enough_replicates
from ddpm_vlb.commands.train_options import build_parser, parse_args  # noqa: F401
from ddpm_vlb.recipes import train as recipe
from ddpm_vlb.runtime.files import MEASURED_FOLDERS, read_json, to_disk, write_json
from ddpm_vlb.runtime.image_data import ImageData, data_name, load_image_data, named_data
from ddpm_vlb.runtime.launching import (
    check_output_dir,
    check_shared,
    main_first,
    make_accelerator,
    prepare_output_dir,
    refuse_to_replace,
)
from ddpm_vlb.runtime.publisher import open_publisher, repair_command
from ddpm_vlb.runtime.reporting import baselines
from ddpm_vlb.runtime.staging import describe_folder, stage_result
from ddpm_vlb.runtime.stopping import MENDABLE, clear_faults, leave, refused
from ddpm_vlb.scoring.checkpoint import fingerprint_of
from ddpm_vlb.scoring.report import bound_lines, clips, entry, in_one_line
from ddpm_vlb.scoring.sweep import Stopped
from ddpm_vlb.training.pictures import drawn_steps, pictures, sample
from ddpm_vlb.training.run import Run
from ddpm_vlb.training.scores import USUAL_CALLS, FinalScores, network_to_keep, score_validation, to_score

Loop = Callable[[Run, Callable[[Run], object]], bool]
STORED_LATER = ("few_steps_file", "reverse_variance")  # by `ddpm-vlb optimize-timesteps`
# What a pipeline's folder holds, also of other commands, that belongs to that pipeline alone.
MEASURED = (
    *("metrics.json", "samples.png", "vlb_terms.png", "data.json", "few_steps.json", "few_steps.png", "chain"),
    *MEASURED_FOLDERS,
)


def validate(run: Run) -> bool:
    """Validation bits/dim, scored on all processes, and a grid of samples, to the tracker; False if asked to stop."""
    network = run.averaged_network()
    try:
        estimate = score_validation(run, network)
    except Stopped:
        return False  # on all processes
    with contextlib.suppress(Stopped):  # of which the training loop hears with the next step, on all processes
        if run.accelerator.is_main_process:
            tell(run, network, estimate, sample(run, network, 16, drawn_steps(run)))
    run.accelerator.wait_for_everyone()
    return True


def tell(run: Run, network: UNet2DModel, estimate: VLBEstimate, images: Tensor) -> None:
    """Print and log a validation, and offer it for upload."""
    step = run.progress.step
    said = f"validation {in_one_line(entry(estimate, clips(run.reverse)))}"
    beside, numbers = run.validations.beside_the_best(step)
    tqdm.write(f"step {step}: {said}{beside}")
    logged = {"validation_bits_per_dim": estimate.bits_per_dim, "validation_se": total_se(estimate), **numbers}
    run.accelerator.log(logged, step)
    for tracker in run.accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_images("samples", images.numpy(), step)
    if run.publisher is not None:
        run.publisher.offer(lambda folder: snapshot(run, network, folder, estimate, images), f"Step {step}: {said}")


def snapshot(run: Run, network: UNet2DModel, folder: Path, estimate: VLBEstimate, images: Tensor) -> None:
    """Write the pipeline as it is now, as it is to be uploaded."""
    assert run.publisher is not None
    pipeline = run.pipeline(network)
    pipeline.save_pretrained(folder, include_code=run.args.hub_include_code)
    pictures(run, estimate, images, run.data.validation, folder)
    metrics = {
        "validation": entry(estimate, clips(run.reverse)),
        "samples": {"num_inference_steps": drawn_steps(run), "seed": run.args.seed},
        **run.record(),
    }
    status = f"Training is not finished: this is step {run.progress.step} of {run.max_steps}."
    describe_folder(pipeline, folder, run.publisher.repo_id, metrics, run.args, status=status)


def total_se(estimate: VLBEstimate) -> float:
    """Noise and image standard errors together."""
    return math.hypot(estimate.noise_se, estimate.image_se)


def save_pipeline(run: Run, network: UNet2DModel) -> None:
    """Write the pipeline beside its place, bring it to the disk and move it there.

    An earlier one's model_index.json goes first, then what was measured of it and the checkpoints of its run, and the
    new one's comes last: in between there is no pipeline, rather than parts of two.
    """
    index = "model_index.json"
    with tempfile.TemporaryDirectory(prefix=".pipeline-", dir=run.folder) as aside:
        new, old = Path(aside) / "new", Path(aside) / "old"
        run.pipeline(network).save_pretrained(new)
        for entry in (*new.rglob("*"), new):
            to_disk(entry)
        old.mkdir()
        parts = [part.name for part in new.iterdir() if part.name != index]
        earlier = run.checkpoints.others() if (run.folder / index).exists() else []
        measured = [path for pattern in MEASURED for path in run.folder.glob(pattern)]
        for path in (run.folder / index, *measured, *earlier, *(run.folder / name for name in parts)):
            if path.exists():
                os.replace(path, old / path.name)
        to_disk(run.folder)
        for name in parts:
            os.replace(new / name, run.folder / name)
        to_disk(run.folder)
        os.replace(new / index, run.folder / index)
        to_disk(run.folder)


def finish(run: Run) -> dict[str, Any] | None:
    """Save the pipeline, score the test images, draw the pictures; metrics.json comes last.

    All processes score; the main one does the rest and returns the metrics. Raises `Stopped` if asked to stop.
    """
    args, data, folder, accelerator = run.args, run.data, run.folder, run.accelerator
    network = network_to_keep(run)
    kept: dict[str, Any] = {}
    if accelerator.is_main_process:
        if is_saved(run, network):  # a run that was resumed after its end: what was measured of it is still true
            kept = read_json(folder / "metrics.json") or {}
        else:
            save_pipeline(run, network)
        write_json(data.record, folder / "data.json")
    positions = to_score(len(data.test), args.num_test_images, args.calls_per_image)
    scores = FinalScores(run, network, positions) if positions else None
    estimate = None if scores is None else scores.estimate()
    run.checkpoints.proven()
    accelerator.wait_for_everyone()
    leave(accelerator)  # what follows would run into the other processes' time limit
    if not accelerator.is_main_process:
        return None
    images, steps = args.eval_batch_size, args.ddpm_num_inference_steps
    print(f"Sampling {images} images in {steps} steps: --eval_batch_size and --ddpm_num_inference_steps take fewer.")
    generated = sample(run, network, images, steps)
    pictures(run, estimate, generated, data.test, folder)
    metrics = {"samples": {"num_inference_steps": steps, "seed": args.seed}, **run.record(ended=True)}
    if scores is None or estimate is None:
        metrics = {**{name: kept[name] for name in ("test", "baselines") if name in kept}, **metrics}
    else:
        test_entry = {**entry(estimate, clips(run.reverse)), "seed": args.seed}
        metrics = {"test": test_entry, "baselines": baselines(data.train, scores.images), **metrics}
    write_json(metrics, folder / "metrics.json")
    if scores is not None:
        scores.forget()
    return metrics


def is_saved(run: Run, network: UNet2DModel) -> bool:
    """Whether the run's folder holds this very pipeline, but for what was stored in it since.

    Args:
        run: the run.
        network: as it is to be saved.
    """
    if not (run.folder / "model_index.json").is_file():
        return False
    try:
        saved = DDPMVLBPipeline.from_pretrained(run.folder)
    except Exception:  # another kind of pipeline, or none that can be read, is not this one
        return False
    before, now = ([_kept(own.scheduler), _kept(own.chain)] for own in (saved, run.pipeline(network)))
    return before == now and fingerprint_of(saved.unet) == fingerprint_of(network)


def _kept(scheduler: Any) -> dict[str, Any]:
    """What a configuration says but for what is stored in it later."""
    return {k: v for k, v in scheduler.config.items() if k[0] != "_" and k not in STORED_LATER}


def report(metrics: dict[str, Any], folder: Path) -> None:
    """Print the result beside the baselines."""
    test = metrics.get("test")
    if test is None:
        print("\nNo test images were scored: `ddpm-vlb evaluate` does it.")
    else:
        given = ", given their labels" if "label_column" in metrics["data"] else ""
        calls = f"{test['network_calls_per_image']} network calls each"
        print(f"\nTest bits/dim{given} ({test['num_images']} images, {calls}):")
        print("\n".join(bound_lines(test)))
        print("Beside it, codes that anyone has:")
        for name, value in metrics["baselines"].items():
            print(f"  {name:22} {value:.3f}")
    print(f"Data: {data_name(metrics['data'])}.")
    print(f"Trained {metrics['train']['steps']} steps in {metrics['train']['seconds']:.0f} s.")
    drawn = "samples.png" if test is None else "samples.png, vlb_terms.png"
    print(f"Wrote the pipeline, {drawn} and metrics.json to {folder}.")


def publish(run: Run) -> None:
    """Upload the result; it is safe in the output folder whatever happens."""
    args, publisher = run.args, run.publisher
    if publisher is None:
        return
    metrics = json.loads((run.folder / "metrics.json").read_text(encoding="utf-8"))
    make = stage_result(run.folder, publisher.repo_id, metrics, args)
    message = f"Step {run.progress.step}, the last: the result"
    if publisher.finish(make, message, f"step-{run.progress.step}") is None:
        print(f"NOT UPLOADED. The result is whole in {run.folder}. To upload it:")
        print(f"  {repair_command(args, publisher.repo_id)}")


def train_and_finish(run: Run, loop: Loop) -> dict[str, Any] | None:
    """Train, score and save; None on the other processes, and where the run was asked to stop."""
    args, accelerator = run.args, run.accelerator
    with run.stop, clear_faults(run.folder, run.checkpoints.advice):
        run.checkpoints.begin(args.resume_from_checkpoint)
        run.take_options()
        if run.progress.step >= run.max_steps:
            accelerator.print(
                f"checkpoint-{run.progress.step} has all of --max_train_steps {run.max_steps} (or --num_epochs): give "
                "more to train on. It is scored as it is."
            )
        # What the folder holds of later steps is of a run that was killed, or of an earlier one.
        purge = {"tensorboard": {"purge_step": run.progress.step + 1}}
        options = {k: v if isinstance(v, (int, float)) else str(v) for k, v in vars(args).items()}
        with refused("train", (OSError, ImportError, ValueError)):
            main_first(
                accelerator,
                lambda: accelerator.init_trackers("train", config=options, init_kwargs=purge),
                "train",
                *(OSError, ImportError, ValueError),
            )
        accelerator.print(
            f"{run.batches.global_batch_size} images a step: {accelerator.num_processes} process(es) x "
            f"{args.gradient_accumulation_steps} x {args.train_batch_size}."
        )
        try:
            if loop(run, validate):
                return finish(run)
        except Stopped:
            pass  # while scoring: the last step is in a checkpoint already
        accelerator.print(f"Stopped at step {run.progress.step} by {run.stop.reason or 'another process'}.")
        accelerator.print(f"{run.checkpoints.advice()}.")
        leave(accelerator)
    return None


def load_data(args: argparse.Namespace) -> ImageData:
    """The data of the options."""
    with contextlib.nullcontext() if args.dataset_name is None else named_data(args.dataset_name):
        data = load_image_data(
            args.dataset_name,
            args.dataset_config_name,
            args.train_data_dir,
            args.image_column,
            args.train_split,
            args.test_split,
            args.resolution,
            args.cache_dir,
            args.levels,
            args.channels,
            args.label_column if args.class_conditional else None,
        )
        _ = data.train_fingerprint  # now, while a fault of one process ends all
        scored = to_score(len(data.test), args.num_test_images, args.calls_per_image)
        if scored:  # refused before the training, not after it
            enough_replicates(args.calls_per_image or USUAL_CALLS, len(scored))
    return data


def main(argv: Sequence[str] | None = None, loop: Loop | None = None) -> dict[str, Any] | None:
    """Train, score and save. Returns the metrics (on the main process, of a run that came to its end).

    Args:
        argv: the options; those of the command line when None.
        loop: called with the run and a function that validates it, for all steps that are left; False says that it was
            asked to stop, and has saved its state. The recipe's own when None.
    """
    args = parse_args(argv)
    folder = Path(args.output_dir)
    mendable = refused("train", (*MENDABLE, ImportError))
    with mendable, clear_faults(folder, lambda: "Nothing has been trained yet"):
        resumes = args.resume_from_checkpoint is not None and any(folder.glob("checkpoint-*"))
        refuse_to_replace(
            folder,
            args.overwrite_output_dir or resumes,
            "another, or --resume_from_checkpoint latest to go on from its last checkpoint",
        )
        check_output_dir(folder)
        accelerator = make_accelerator(args, folder)
        set_seed(args.seed)
        data = main_first(accelerator, lambda: load_data(args), "train", ValueError, OSError)
        run = Run(args, accelerator, data, folder)
        prepare_output_dir(folder)
        check_shared(accelerator, folder)
    run.publisher = open_publisher(accelerator, args)
    metrics = None
    try:
        metrics = train_and_finish(run, loop or recipe.train)
    finally:
        if metrics is None and run.publisher is not None:
            run.publisher.close()
    if metrics is not None:
        report(metrics, folder)
        publish(run)
    return metrics


if __name__ == "__main__":
    main()
