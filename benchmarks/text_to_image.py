"""A fine-tune told from its base: examples/text_to_image_validation.py on two tiny pipelines, against the full loop.

python benchmarks/text_to_image.py

A pipeline of random weights and its fine-tune on 12 captioned pictures are compared by the example on 24 others. The
truth is every term of both bounds, twice, with the same noise for both; its error is that of the draws. A seed draws
the latents too, and has its own truth; `off` is the distance from it in standard errors of both. Then the base is
compared by 8 calls with itself after random changes of all weights, of a size in parts of each tensor's root mean
square. A verdict is false where the truth is not beyond two of its errors on the same side.
"""

import argparse
import io
import math
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from unittest import mock

import datasets
import torch
from environment import describe
from tiny_pipelines import build, changed, draw_pictures, fine_tune
from torch import Tensor, nn

from ddpm_vlb import Validation, VLBDifference, VLBEstimator

sys.path.append(str(Path(__file__).parents[1] / "examples"))

import text_to_image_validation as example

CALLS, CHANGES, TRAINED, NAT = (2, 4, 8, 16), {0.0: 1, 1e-4: 12, 1e-2: 12}, 12, math.log(2)


def make(home: str, images: int) -> tuple[argparse.Namespace, tuple[list, list]]:
    """The example's options, a base and its fine-tune being saved, and the captioned pictures that are scored."""
    base, tuned, pictures = (f"{home}/{name}" for name in ("base", "tuned", "captioned"))
    pipe = build(Path(home, "words"))
    pipe.save_pretrained(base)
    draw_pictures(Path(pictures), images + TRAINED)
    x_0, captions = example.load_captioned(pictures, "train", "image", "text", images + TRAINED)
    x, embeds = example.encode_images(pipe, x_0, None, 1), example.encode_captions(pipe, captions)
    fine_tune(pipe, x[images:], embeds[images:])
    pipe.save_pretrained(tuned)
    told = ["--model", base, "--compare", tuned, "--images", pictures, "--num_images", str(images)]
    return example.parse_args(told), (x_0[:images], captions[:images])


def compare(args: argparse.Namespace, calls: int) -> tuple[VLBDifference, str]:
    """The example's difference, and what it printed."""
    args.calls_per_image = calls
    with redirect_stdout(io.StringIO()) as said:
        difference = example.compare(args)
    return difference, said.getvalue()


def full_loop(validation: Validation, unet: nn.Module) -> Tensor:
    """Each image's bound in nats/dim, two draws of all its terms, (2, N)."""
    scorer, x_0 = VLBEstimator(unet, validation.reverse, estimator="full"), validation.images
    sweeps = [scorer.score(x_0, range(len(x_0)), validation.conditioning, sweep) for sweep in (0, 1)]
    return NAT * torch.stack([own[0].estimate().per_image for own in sweeps])


def mean(draws: Tensor) -> tuple[float, float]:
    """Over images, and its error from the two draws."""
    return float(draws.mean()), float((draws.var(0).mean() / draws.numel()).sqrt())


def print_seed(args: argparse.Namespace, pipes: list, data: tuple[list, list]) -> None:
    """The full loop's bounds, and the example's difference by calls for each image."""
    base, tuned = (full_loop(example.validation_of(pipe, *data, args), pipe.unet) for pipe in pipes)
    true, error = mean(tuned - base)
    cells = ["{:.3f} +- {:.3f}".format(*mean(own)) for own in (base, tuned, tuned - base)]
    for calls in CALLS:
        found, _ = compare(args, calls)
        gap, se = NAT * found.bits_per_dim, NAT * found.se
        cells.append(f"{gap:.2f} +- {se:.2f}, {gap / se:.1f}, {(gap - true) / math.hypot(se, error):+.1f}")
    print(f"| {args.seed} | {' | '.join(cells)} |", flush=True)


def print_change(ours: Validation, unet: nn.Module, true: Tensor, size: float, changes: int) -> None:
    """How many verdicts there are on the base beside itself, changed, and how many of them are false."""
    counts, largest = dict.fromkeys(("better", "worse", "cannot be told", "the truth tells", "false"), 0), 0.0
    for seed in range(changes):
        other = changed(unet, size, seed)
        found, (gap, error) = ours(other) - ours.history["base"], mean(full_loop(ours, other) - true)
        side = "cannot be told" if abs(gap) <= 2 * error else "better" if gap < 0 else "worse"
        counts[found.verdict] += 1
        counts["the truth tells"] += side != "cannot be told"
        counts["false"] += found.verdict not in ("cannot be told", side)
        largest = max(largest, NAT * abs(found.bits_per_dim))
    print(f"| {size:g} | {' | '.join(map(str, counts.values()))} | {largest:.2g} |", flush=True)


def main(images: int = 24, seeds: int = 5) -> None:
    torch.set_num_threads(1)
    print(f"{describe()}\n\n| seed | base, nats/dim | fine-tune | difference |", end=" ")
    print(" | ".join(f"{calls} calls: difference, z, off" for calls in CALLS), f"|\n{'| --- ' * (4 + len(CALLS))}|")
    with tempfile.TemporaryDirectory() as home, mock.patch.object(datasets.config, "HF_DATASETS_CACHE", home):
        args, data = make(home, images)
        pipes = [example.load_pipeline(name) for name in (args.model, args.compare)]
        for args.seed in range(seeds):
            print_seed(args, pipes, data)
        args.seed = 0
        print(f"\n```\n{compare(args, 8)[1].replace(home, 'my')}```\n\n| change | better | worse |", end=" ")
        print(f"cannot be told | the truth tells | false | largest difference |\n{'| --- ' * 7}|")
        ours, unet = example.validation_of(pipes[0], *data, args), pipes[0].unet
        ours(unet, "base")
        true = full_loop(ours, unet)
        for size, changes in CHANGES.items():
            print_change(ours, unet, true, size, changes)


if __name__ == "__main__":
    main()
