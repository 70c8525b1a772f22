"""Where `ddpm-vlb optimize-timesteps` writes: into the checkpoint, by one rename, or a whole pipeline elsewhere."""

import argparse
import contextlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from ddpm_vlb import STORED_FILES, DDPMVLBPipeline
from ddpm_vlb.few_steps.report import plot
from ddpm_vlb.runtime.files import MEASURED_FOLDERS, to_disk, write_json
from ddpm_vlb.runtime.launching import check_output_dir, refuse_to_replace

MEASURED = ("metrics.json", "samples.png", "vlb_terms.png", "README.md")  # with the network's own variance
WRITTEN = {"model_index.json", "unet", "scheduler", "chain", "data.json", "few_steps.json", "few_steps.png", *MEASURED}
PARTIAL = ".few_steps-"  # what a run leaves that is killed


def check_output(args: argparse.Namespace) -> None:
    """Refuse what could not be written at the end."""
    if args.output_dir is None:
        if not Path(args.model).is_dir():
            raise ValueError(
                f"--model {args.model} is no folder. If it is a Hub name, say with --output_dir where the pipeline "
                "shall go."
            )
        check_output_dir(Path(args.model))
        return
    folder = Path(args.output_dir)
    if Path(args.model).is_dir() and folder.resolve() == Path(args.model).resolve():
        raise ValueError("--output_dir is --model: leave it out to update the model in place.")
    # What an earlier run of the command wrote may be replaced, and nothing else.
    found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    measured = {path.name for pattern in MEASURED_FOLDERS for path in folder.glob(pattern)}
    found = [name for name in found if not name.startswith(PARTIAL)]
    foreign = [name for name in found if name not in WRITTEN | measured or "few_steps.json" not in found]
    if folder.is_file() or foreign:
        what = foreign[0] if foreign else "a file"
        raise ValueError(f"--output_dir {folder} holds something else already ({what}): give one that is not there.")
    refuse_to_replace(folder, args.overwrite_output_dir, "another")
    check_output_dir(folder)


def store_in_place(pipeline: DDPMVLBPipeline, folder: Path) -> None:
    """Replace a folder's configuration of the chain; what was there holds until the one rename that changes it."""
    place = folder / ("scheduler" if pipeline.path is None else "chain")
    place.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".scheduler-", dir=folder) as aside:
        made = Path(aside, "made")
        pipeline.chain.save_pretrained(made)
        for file in made.iterdir():
            to_disk(file)
        stored = [file for pattern in STORED_FILES for file in made.glob(pattern)]
        for file in stored:  # named by their content
            os.replace(file, place / file.name)
        to_disk(place)
        os.replace(made / "scheduler_config.json", place / "scheduler_config.json")
        to_disk(place)
    for stale in [file for pattern in STORED_FILES for file in place.glob(pattern)]:
        if stale.name not in {file.name for file in stored}:
            stale.unlink()


def move_into(made: Path, folder: Path, aside: Path) -> None:
    """Move a pipeline's files into a folder, in place of those of an earlier run.

    The index goes first and comes last: in between there is no pipeline, rather than parts of two.
    """
    for file in made.rglob("*"):
        to_disk(file)
    aside.mkdir()
    olds = [path for path in folder.iterdir() if not path.name.startswith(PARTIAL)]
    for old in sorted(olds, key=lambda path: path.name != "model_index.json"):
        os.replace(old, aside / old.name)
    for new in sorted(made.iterdir(), key=lambda path: path.name == "model_index.json"):
        os.replace(new, folder / new.name)
    to_disk(folder)


def store(args: argparse.Namespace, pipeline: DDPMVLBPipeline, result: dict[str, Any]) -> Path:
    """Write the checkpoint, whose scheduler has all that is to be stored, the numbers and the picture.

    Args:
        args: of `ddpm-vlb optimize-timesteps`.
        pipeline: the checkpoint.
        result: the content of few_steps.json.
    """
    source = Path(args.model)
    if args.output_dir is None:
        store_in_place(pipeline, source)
        write_results(result, source)
        if args.reverse_variance != "network" and (source / "metrics.json").is_file():
            print(
                f"{source / 'metrics.json'} is of the network's own variance: `ddpm-vlb evaluate` scores the new one."
            )
        return source
    folder = Path(args.output_dir)
    # In the folder itself, which may be a mount point.
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".few_steps-", dir=folder) as aside:
        made = Path(aside, "made")
        pipeline.to("cpu").save_pretrained(made)
        kept = ("data.json", *(MEASURED if args.reverse_variance == "network" else ()))
        for name in kept:
            if (source / name).is_file():
                shutil.copyfile(source / name, made / name)
        if not source.is_dir():  # its license is in the card
            with contextlib.suppress(EntryNotFoundError):
                card = hf_hub_download(args.model, "README.md", revision=args.revision, cache_dir=args.cache_dir)
                shutil.copyfile(card, made / "README.md")
        write_results(result, made)
        move_into(made, folder, Path(aside, "before"))
    return folder


def write_results(result: dict[str, Any], folder: Path) -> None:
    """Write few_steps.json and few_steps.png."""
    plot([*result["rows"], *result["all_steps"]], folder / "few_steps.png", result["unit"])
    write_json(result, folder / "few_steps.json")
