"""What of a run is uploaded: the pipeline, its card, pictures, metrics and options, without this machine's paths."""

import argparse
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ddpm_vlb import DDPMVLBPipeline, forget_origin, model_card, write_code
from ddpm_vlb.runtime.files import write_json

PICTURES = ("samples.png", "vlb_terms.png")
OPTIONS_FILE = "training_options.json"
PATHS = ("output_dir", "train_data_dir", "cache_dir", "config", "logging_dir")


def without_folders(content: Any) -> Any:
    """The same content with this machine's paths cut to their last part, which is nobody's business on the Hub.

    Args:
        content: what JSON can hold.
    """
    if isinstance(content, Mapping):
        return {key: _cut(value) if key in PATHS else without_folders(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [without_folders(value) for value in content]
    if isinstance(content, str) and content:
        parts = content.count("/") + content.count("\\")
        local = content.startswith(("/", "~", "./", "../")) or "\\" in content or ":" in content.split("/")[0]
        # A name of the Hub has one slash at most; what is there as a file is no such name.
        if local or (parts == 1 and os.path.exists(content)) or (parts > 1 and "\n" not in content):
            return _cut(content)
    return content


def _cut(content: Any) -> Any:
    if not isinstance(content, str) or not content:
        return content
    last = content.rstrip("/\\").replace("\\", "/").rpartition("/")[2]
    return f"./{last}"


def describe_folder(
    pipeline: DDPMVLBPipeline,
    folder: Path,
    repo_id: str,
    metrics: dict[str, Any],
    args: argparse.Namespace,
    evaluations: Sequence[Mapping[str, Any]] = (),
    status: str | None = None,
) -> None:
    """Write what goes with a saved pipeline: metrics, training options and the card, in what may be published of them.

    Args:
        pipeline: that was saved.
        folder: where it was saved, and where the pictures lie.
        repo_id: of the repository.
        metrics: `ddpm-vlb train`'s.
        args: the options --hub_license and --hub_include_code.
        evaluations: `ddpm-vlb evaluate`'s metrics.
        status: a sentence on top of the card.
    """
    metrics, evaluations = without_folders(metrics), without_folders(evaluations)
    if metrics:
        write_json(metrics, folder / "metrics.json")
    # Also the mark by which a repository is known as one that a run may write to.
    write_json(metrics.get("options", {}), folder / OPTIONS_FILE)
    if "data" in metrics:
        write_json(metrics["data"], folder / "data.json")
    pictures = [name for name in PICTURES if (folder / name).exists()]
    card = model_card(
        pipeline,
        repo_id,
        training=metrics,
        evaluations=evaluations,
        pictures=pictures,
        license=args.hub_license,
        includes_code=bool(args.hub_include_code),
        status=status,
    )
    card.save(folder / "README.md")


def stage_result(
    result: Path,
    repo_id: str,
    metrics: dict[str, Any],
    args: argparse.Namespace,
    evaluations: Sequence[Mapping[str, Any]] = (),
) -> Callable[[Path], None]:
    """What writes a finished run into a folder as it is to be uploaded.

    Args:
        result: `ddpm-vlb train`'s output folder, or any saved pipeline.
        repo_id: of the repository.
        metrics: its metrics.json, or nothing.
        args: the options --hub_license and --hub_include_code.
        evaluations: `ddpm-vlb evaluate`'s metrics.
    """

    def make(folder: Path) -> None:
        pipeline = DDPMVLBPipeline.from_pretrained(result)
        for part in ("unet", "scheduler", *(["chain"] if (result / "chain").is_dir() else [])):
            shutil.copytree(result / part, folder / part)
        shutil.copyfile(result / "model_index.json", folder / "model_index.json")
        if args.hub_include_code:
            write_code(folder)
        forget_origin(folder)
        for name in PICTURES:
            if (result / name).exists():
                shutil.copyfile(result / name, folder / name)
        describe_folder(pipeline, folder, repo_id, metrics, args, evaluations)

    return make
