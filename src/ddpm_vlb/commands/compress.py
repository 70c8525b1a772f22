"""Compress images without loss, with a checkpoint, to about as many bits as its bound says.

    ddpm-vlb compress images/ images.dvlb --model runs/pictures
    ddpm-vlb compress digits.dvlb --model runs/digits
    ddpm-vlb compress train.dvlb --model runs/digits --dataset_name my/set --split train

IMAGES are files and folders; without any it is a split of a data set, as for `ddpm-vlb evaluate`. To read OUT again,
`ddpm-vlb decompress` needs the same checkpoint. Pixels and class labels come back exactly, and names but for their
suffix; image files are encoded again, as PNG: how a file was compressed, its metadata and transparency are not kept.
The network is called once for each step and image, in float64, to encode and to decode, and once more for the bound
that the file is compared with, where PNG needs none.
"""

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm_vlb import DDPMVLBScheduler, VLBEstimate
from ddpm_vlb.commands.options import SWITCH, Parser, add_model_options, add_scored_options, positive_int
from ddpm_vlb.runtime.common_codecs import sizes
from ddpm_vlb.runtime.files import write_whole
from ddpm_vlb.runtime.image_sets import as_stored
from ddpm_vlb.runtime.reporting import plot_net_bits
from ddpm_vlb.runtime.stopping import refused
from ddpm_vlb.scoring.checkpoint import load_data, network_shape
from ddpm_vlb.scoring.codec import (
    bound_of,
    codec_device,
    codec_pipeline,
    codec_process,
    coding,
    make_codec,
)
from ddpm_vlb.scoring.data import NetworkShape, ScoringData, load_image_files
from ddpm_vlb.scoring.image_files import check_png, find_images, png_names, read_labels
from ddpm_vlb.scoring.report import path_taken


def build_parser() -> Parser:
    """The options and their help texts."""
    parser = Parser("compress", __doc__)
    parser.add_argument("images", type=Path, nargs="*", metavar="IMAGES", help="Files and folders.")
    parser.add_argument("out", type=Path, metavar="OUT", help="File to write.")
    add_model_options(parser, "compress with")
    add_scored_options(parser, "compress")
    coder = parser.add_argument_group("coder")
    steps = "Network calls for each image: the stored path of so many steps, else even ones; default: 20."
    coder.add_argument("--num_inference_steps", type=positive_int, help=steps)
    coder.add_argument(
        "--lanes",
        type=positive_int,
        help="Images in a network call; default: so many that they cost a hundredth, at most 16.",
    )
    coder.add_argument(
        "--dtype",
        choices=("float64", "float32"),
        default="float64",
        help="float32 is faster, and read again on this very machine with these settings alone.",
    )
    coder.add_argument("--verify", action=SWITCH, default=True, help="Decode what was encoded before it is written.")
    coder.add_argument("--plot", type=Path, help="PNG file for a picture of each image's bits against its bound.")
    coder.add_argument("--overwrite", action=SWITCH, default=False, help="Replace OUT.")
    coder.add_argument("--cpu", action=SWITCH, default=False, help="Use the CPU even if there is a GPU.")
    return parser


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the options."""
    parser = build_parser()
    args = parser.parse_args(argv)
    of_sets = "dataset_name dataset_config_name split image_column"
    if args.plot is not None and not args.plot.absolute().parent.is_dir():
        parser.error(f"--plot {args.plot}: there is no such folder")
    if args.plot is not None and args.plot.suffix.lower() != ".png":
        parser.error(f"--plot {args.plot}: give a name that ends in .png")
    parser.refuse_idle(args, {f"{of_sets}, beside IMAGES": bool(args.images)})
    return args


def check_out(out: Path, overwrite: bool) -> None:
    """Refuse a file that cannot be written, or is another's, before hours are spent.

    Args:
        out: of OUT.
        overwrite: --overwrite was given.

    Raises:
        ValueError: it is there, or a folder.
        OSError: its folder cannot be written.
    """
    if out.is_dir():
        raise ValueError(f"OUT {out} is a folder: give the file to write behind the images.")
    if out.exists() and not overwrite:
        raise ValueError(f"{out} is there already: give another name, or --overwrite.")
    if out.exists() and out.read_bytes()[:4] not in (b"DVLB", b""):
        raise ValueError(f"{out} is no compressed file, and is not replaced by one: give another name.")
    if not os.access(out.absolute().parent, os.W_OK):
        raise OSError(f"{out} cannot be written: its folder is not there, or may not be written.")


def load(args: argparse.Namespace, network: NetworkShape) -> tuple[ScoringData, list[str] | None, str]:
    """The images, their names where they have any, and which they are, in words."""
    if not args.images:
        data = load_data(args, network, True, pilot=False)
        return data, None, data.name
    files = find_images(args.images)
    paths, names = files.paths[: args.num_images], files.names[: args.num_images]
    png_names(names)
    if network.classes is None and args.label_column is not None:
        raise ValueError(f"--label_column {args.label_column} has no effect: no labels are taken here.")
    labels = None if network.classes is None else read_labels(args.images, names, args.label_column or "label")
    if files.left_out:
        print(f"Left out, as no images: {', '.join(files.left_out[:5])}{', ..' * (len(files.left_out) > 5)}.")
    return load_image_files(network, paths, labels, args.resolution), names, ", ".join(map(str, args.images[:3]))


def describe_steps(scheduler: DDPMVLBScheduler, steps: int, model: str) -> str:
    """The chain that codes the images in words, and how it gets better."""
    path = path_taken(scheduler, steps, None)
    every = " ".join(map(str, sorted({*scheduler.optimal_paths, steps})))  # of which a run replaces all
    advice = f" (`ddpm-vlb optimize-timesteps --model {model} --steps {every}` finds better ones)"
    return f"{steps} steps, {path}" + (advice if path.startswith("spacing") and steps < len(scheduler) else "")


def report_net(net: dict[int, float], bound: VLBEstimate, plot: Path | None) -> dict[str, float]:
    """Print the net bits/dim of the images that the chain coded, and how far from their bounds they are; draw them."""
    if len(net) < 2:
        print("  too few images beside the seeds for a net rate or a picture")
        return {}
    bits = torch.tensor(list(net.values()), dtype=torch.float64)
    gap = bits - bound.per_image[list(net)].double()
    mean, error = float(gap.mean()), float(gap.std()) / len(gap) ** 0.5
    print(f"  net, without the seeds: {bits.mean():.3f} bits/dim, {mean:+.3f} +- {error:.3f} from their bound")
    if plot is not None:
        plot_net_bits(net, bound, plot)
    return {"net_bits_per_dim": float(bits.mean()), "from_bound": mean, "from_bound_se": error}


def compared(own: int, other: int) -> str:
    """How a size is to another's, in words."""
    return f"{1 - own / other:.1%} saved" if own < other else f"this is {own / other:.2g} times as large"


def report(
    content: bytes, x_0: Tensor, bound: VLBEstimate, others: dict[str, int], what: str, seconds: float
) -> dict[str, Any]:
    """Print how long the file is, beside the bound and what other codecs make of the images; returns the numbers."""
    dims = x_0.numel()
    bits_per_dim = 8 * len(content) / dims
    above = bits_per_dim / bound.bits_per_dim - 1
    noise = f" +- {bound.noise_se:.3f} (noise)" if bound.noise_se > 0 else ""
    print(f"{len(x_0)} images of {what}: {len(content)} bytes, {bits_per_dim:.3f} bits/dim")
    print(f"  {abs(above):.1%} {'above' if above >= 0 else 'below'} the bound of {bound.bits_per_dim:.3f}{noise}")
    for name, size in others.items():
        print(f"  {name}: {size} bytes, {8 * size / dims:.3f} bits/dim, {compared(len(content), size)}")
    print(f"  {len(x_0) / seconds:.2f} images/s, {seconds:.1f} s")
    return {
        "bytes": len(content),
        "images": len(x_0),
        "bits_per_dim": bits_per_dim,
        "bound": bound.bits_per_dim,
        "bound_noise_se": bound.noise_se,
        "others": others,
        "seconds": seconds,
    }


@refused("compress")
def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Compress images. Returns bytes, the bound and what other codecs make of them."""
    args = parse_args(argv)
    check_out(args.out, args.overwrite)
    device = codec_device(args)
    pipeline = codec_pipeline(args, device)
    data, names, what = load(args, network_shape(pipeline, args))
    reverse = codec_process(pipeline, args, data.levels, args.num_inference_steps)
    codec = make_codec(pipeline, reverse, args.dtype)
    x_0, conditioning = data.batch(data.scored, list(range(len(data.scored))))
    assert reverse.levels is not None
    check_png(x_0.shape[1:], reverse.levels)
    net: dict[int, float] = {}
    started = time.perf_counter()
    what_is_done = "Compressing and decoding again" if args.verify else "Compressing"
    with coding(what_is_done, len(x_0) * (1 + args.verify)) as progress:
        content = codec.compress(x_0, conditioning, names, args.lanes, args.verify, progress, net.__setitem__)
    seconds = time.perf_counter() - started
    write_whole(content, args.out)
    bound = bound_of(pipeline, reverse, x_0, conditioning)
    others = sizes(as_stored(x_0, reverse.levels), reverse.levels)
    numbers = report(content, x_0, bound, others, what, seconds)
    numbers |= report_net({image: bits / x_0[0].numel() for image, bits in net.items()}, bound, args.plot)
    print(f"  {describe_steps(pipeline.chain, len(reverse.forward), args.model)}")
    where = ", on this machine with these settings" if args.dtype == "float32" else ""
    print(f"Wrote {args.out}. It is read with --model {args.model} alone{where}: `ddpm-vlb decompress`.")
    return numbers


if __name__ == "__main__":
    main()
