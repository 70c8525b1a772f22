"""MNIST in an hour of one core: a network trained, scored, given its best few steps, and set beside other codes.

    python benchmarks/mnist.py run runs/mnist/seed0 --mnist PATH
    python benchmarks/mnist.py run runs/mnist/seed1 --mnist PATH --seed 1
    python benchmarks/mnist.py report runs/mnist/seed0 runs/mnist/seed1 --mnist PATH

PATH is a folder as the Hub's ylecun/mnist. `run` hands options that it does not know to `ddpm-vlb train`, behind its
own; started again it goes on where it was stopped. `report` writes its part of results/mnist.md, with the
first run's samples as docs/mnist.png.
"""

import argparse
import contextlib
import importlib
import io
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment import describe
from PIL import Image

from ddpm_vlb.commands import evaluate, optimize_timesteps, train
from ddpm_vlb.runtime.common_codecs import mosaic
from ddpm_vlb.runtime.files import read_json, write_json
from ddpm_vlb.runtime.image_data import load_image_data
from ddpm_vlb.runtime.reporting import baselines, integer_levels

RESULTS = Path(__file__).parent / "results"
PICTURE = Path(__file__).parents[1] / "docs" / "mnist.png"
HEADING = "\n## What it comes to\n"
TRAIN = """--path flow --block_out_channels 32 32 64 --train_batch_size 32 --max_train_steps 10000
    --checkpointing_steps 250 --checkpoints_total_limit 2 --resume_from_checkpoint latest
    --validation_steps 2500 --num_test_images 0 --logger none"""
SCORE = "--calls_per_image 4"  # of all 10,000 images, whose spread is the larger error
FEW = "--steps 5 10 25 --num_images 256 --num_fit_images 512"
PUBLISHED = (
    ("Residual Flow", 0.970, "Chen et al. 2019, table 1"),
    ("FFJORD", 0.99, "Grathwohl et al. 2019, table 2"),
    ("Glow", 1.05, "Kingma & Dhariwal 2018, as Grathwohl et al. give it"),
    ("Bit-Swap, a codec, net", 1.29, "Kingma, Abbeel & Ho 2019; 1.27 in another version of their table"),
)


def measured(folder: Path, name: str, main: Callable[[list[str]], Any], options: list[str]) -> None:
    """Run a command; its CPU seconds are added to those in cpu_seconds.json."""
    started = time.process_time()
    main(["--cpu", *options])
    kept = read_json(folder / "cpu_seconds.json")
    write_json({**kept, name: kept.get(name, 0.0) + time.process_time() - started}, folder / "cpu_seconds.json")


def run(folder: Path, mnist: str, further: list[str]) -> None:
    """Train, score and optimize, as far as it is not done yet."""
    model = ["--model", str(folder)]
    if not (folder / "metrics.json").exists():
        own = ["--dataset_name", mnist, "--output_dir", str(folder), *TRAIN.split(), *further]
        measured(folder, "train", train.main, own)
        if not (folder / "metrics.json").exists():
            raise SystemExit("It was stopped: start it again.")
    measured(folder, "score", evaluate.main, [*model, *SCORE.split()])
    if not (folder / "few_steps.json").exists():
        measured(folder, "few", optimize_timesteps.main, [*model, *FEW.split()])


def file_bits(images: np.ndarray, **options: Any) -> float:
    """Bits/dim of image files, one an image (N, H, W), with all that they say of themselves."""
    total = 0
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image).save(file, **options)
        total += file.tell()
    return 8 * total / images.size


def codes(mnist: str) -> dict[str, float]:
    """Bits/dim of the test images by codes that anyone has."""
    data = load_image_data(mnist)
    images = integer_levels(data.test)[:, 0]
    found = baselines(data.train, data.test, limit=len(data.train))
    bits = {
        "uniform": found["uniform"],
        "PNG, a file for each image": file_bits(images, format="PNG", optimize=True),
        "WebP, lossless, a file for each image": file_bits(
            images, format="WEBP", lossless=True, method=6, quality=100
        ),
        "PNG, all images in one file": file_bits(images.reshape(1, -1, images.shape[-1]), format="PNG", optimize=True),
        "a histogram for each position": found["histogram_per_position"],
        "lzma, all images at once": found["lzma"],
    }
    with contextlib.suppress(ImportError):
        jpegxl = importlib.import_module("imagecodecs").jpegxl_encode
        for name, own in (("a file for each image", images), ("all images in one file", [mosaic(images[..., None])])):
            sizes = [len(jpegxl(image, lossless=True, effort=9)) for image in own]
            bits[f"JPEG XL, {name}"] = 8 * sum(sizes) / images.size
    return bits


def scored(folder: Path) -> dict[str, Any]:
    """What was measured of a run: its training, its bound and its few steps."""
    names = {"train": "metrics", "score": "evaluation/metrics", "few": "few_steps", "cpu": "cpu_seconds"}
    return {name: json.loads((folder / f"{file}.json").read_text("utf-8")) for name, file in names.items()}


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table of Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def bound(score: dict[str, Any]) -> str:
    """Bits/dim with both errors."""
    return f"{score['bits_per_dim']:.4f} +- {score['noise_se']:.4f} +- {score['image_se']:.4f}"


def of_runs(runs: dict[str, dict[str, Any]]) -> list[str]:
    """A row for each run, and how the others differ from the first on the same images."""
    rows = []
    for name, own in runs.items():
        trained, both = own["train"]["train"], own["score"]["by_clipping"]
        minutes = f"{own['cpu']['train'] / 60:.0f}"
        rows.append([name, str(trained["steps"]), minutes, bound(both["clipped"]), bound(both["unclipped"])])
    head = ["run", "steps", "CPU minutes to train", "clipped, bits/dim +- noise +- images", "unclipped"]
    (first, base), *others = runs.items()
    gaps = [(name, np.subtract(own["score"]["per_image"], base["score"]["per_image"])) for name, own in others]
    return [table(head, rows)] + [
        f"{name} less {first}, paired: {gap.mean():+.4f} +- {gap.std(ddof=1) / len(gap) ** 0.5:.4f} bits/dim."
        for name, gap in gaps
    ]


def of_few_steps(runs: dict[str, dict[str, Any]]) -> str:
    """A row for each number of steps, path and variance."""

    def cells(own: dict[str, Any]) -> dict[tuple[int, str, str], str]:
        rows = [*own["few"]["rows"], *own["few"]["all_steps"]]
        stars = [" *" if entry["stored"] else "" for entry in rows]
        keys = [(entry["num_inference_steps"], entry["path"], entry["variance"]) for entry in rows]
        return {key: bound(entry) + star for key, entry, star in zip(keys, rows, stars)}

    columns = [cells(own) for own in runs.values()]
    rows = [[*map(str, key), *(column.get(key, "") for column in columns)] for key in columns[0]]
    return table(["steps", "path", "variance", *runs], rows)


def of_codes(runs: dict[str, dict[str, Any]], found: dict[str, float]) -> str:
    """All by their bits/dim, the runs among them."""
    here = [*found.items(), *((f"**{name}**", own["score"]["bits_per_dim"]) for name, own in runs.items())]
    rows = [*((value, name, "here") for name, value in here), *((value, name, by) for name, value, by in PUBLISHED)]
    return table(["code or model", "test bits/dim", "by"], [[name, f"{v:.3f}", by] for v, name, by in sorted(rows)])


def report(folders: list[Path], mnist: str) -> str:
    """The part of results/mnist.md that tells of the runs."""
    runs = {folder.name: scored(folder) for folder in folders}
    first = next(iter(runs.values()))
    score, few = first["score"], first["few"]["data"]["num_images"]
    about = f"{score['num_images']} test images, {score['network_calls_per_image']} network calls each. {describe()}."
    told = f"Few steps, on {few} test images, bits/dim +- noise +- images; * is stored:"
    parts = (about, *of_runs(runs), told, of_few_steps(runs), "Beside it:", of_codes(runs, codes(mnist)))
    return "\n\n".join(parts) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("folders", type=Path, nargs="+", help="Of the runs; `run` takes one.")
    parser.add_argument("--mnist", default="ylecun/mnist", metavar="PATH", help="Folder or Hub name of the images.")
    args, further = parser.parse_known_args(argv)
    torch.set_num_threads(1)
    if args.what == "run":
        if len(args.folders) > 1:
            parser.error(f"run takes one folder, but got {len(args.folders)}")
        run(args.folders[0], args.mnist, further)
        return
    if further:
        parser.error(f"report takes no {' '.join(further)}")
    text = report(args.folders, args.mnist)
    page = RESULTS / "mnist.md"
    page.write_text(page.read_text("utf-8").split(HEADING)[0] + HEADING + "\n" + text, "utf-8")
    shutil.copy(args.folders[0] / "samples.png", PICTURE)
    print(text)


if __name__ == "__main__":
    main()
