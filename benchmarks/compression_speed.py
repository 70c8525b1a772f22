"""Where the codec's time goes, beside codecs that anyone has, and its entropy coder beside a library's.

    python benchmarks/compression_speed.py [--model runs/digits]

Digits of 8x8 by the model, on its 20 steps, and images of 32x32 in colour with 256 levels by an untrained U-Net with
attention. JPEG XL is measured where `imagecodecs` is installed, the library's coder where `constriction` is.
"""

import argparse
import importlib
import io
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import UNet2DModel
from environment import describe

from ddpm_vlb import BitsBackCodec, DDPMVLBPipeline, DDPMVLBScheduler
from ddpm_vlb.integer_gaussians import OCTAVE, PLACES, TOTAL, Bins, rounded
from ddpm_vlb.rans import Stack, WideStack
from ddpm_vlb.runtime.image_data import load_image_data

SYMBOLS = 2**16


class Timed:
    """A network that counts the CPU seconds in it."""

    def __init__(self, model: Any):
        self.model, self.seconds = model, 0.0

    def __call__(self, *given: Any, **told: Any) -> Any:
        """What the network gives."""
        started = time.process_time()
        try:
            return self.model(*given, **told)
        finally:
            self.seconds += time.process_time() - started


def coded(what: str, codec: BitsBackCodec, x_0: torch.Tensor, lanes: int) -> None:
    """A row: CPU seconds to encode and to decode, those of the network, images a second."""
    if len(x_0) <= 2 * lanes:
        return  # all of them are seeds, coded without the network
    model = codec.coder.model
    codec.compress(x_0[: lanes + 2], lanes=lanes, verify=False)  # what is made once
    codec.coder.model = timed = Timed(model)
    times, inside = [time.process_time()], []
    data = codec.compress(x_0, lanes=lanes, verify=False)
    times, inside = [*times, time.process_time()], [timed.seconds]
    if not torch.equal(codec.decompress(data).x_0.mul(255).round(), x_0.mul(255).round()):
        raise AssertionError("not what was encoded")
    times, inside = [*times, time.process_time()], [*inside, timed.seconds - inside[0]]
    codec.coder.model = model
    encoding, decoding = (b - a for a, b in zip(times, times[1:]))
    shares = [whole / own - 1 for whole, own in zip((encoding, decoding), inside)]
    print(
        f"| {what} | {lanes} | {encoding:.1f}, {decoding:.1f} | {inside[0]:.1f}, {inside[1]:.1f} | "
        f"{shares[0]:.0%}, {shares[1]:.0%} | {len(x_0) / encoding:.1f}, {len(x_0) / decoding:.1f} |",
        flush=True,
    )


def pictures(count: int) -> torch.Tensor:
    """Smooth colour images of 32x32 with 256 levels."""
    rng = torch.Generator().manual_seed(0)
    coarse = torch.randn(count, 3, 5, 5, generator=rng)
    smooth = torch.nn.functional.interpolate(coarse, size=32, mode="bicubic") / 2
    return (smooth.clamp(-1, 1) * 127.5 + 127.5).round() * (2 / 255) - 1


def large_codec(steps: int) -> BitsBackCodec:
    """Of an untrained U-Net of 2.8 M parameters with attention at 16x16."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=6,
        block_out_channels=(32, 64, 128),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    ).eval()
    scheduler = DDPMVLBScheduler(variance_type="learned_range", levels=256)
    return BitsBackCodec(unet, scheduler.reverse_process(num_inference_steps=steps))


def written(kind: str, **options: Any) -> Callable[[np.ndarray], int]:
    """Writes an image file in memory."""

    def write(image: np.ndarray) -> int:
        file = io.BytesIO()
        PIL.Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, kind, **options)
        return file.tell()

    return write


def others(x_0: torch.Tensor) -> None:
    """Images a second of other codecs, a file for each image."""
    images = np.moveaxis(((x_0 + 1) * 127.5).round().byte().numpy(), 1, -1)
    codecs = {"PNG": written("PNG", optimize=True), "WebP": written("WEBP", lossless=True)}
    try:
        jpegxl = importlib.import_module("imagecodecs").jpegxl_encode
        codecs["JPEG XL, effort 7"] = lambda image: len(jpegxl(image, lossless=True, effort=7))
    except ImportError:
        print("JPEG XL: imagecodecs is not installed")
    for name, encode in codecs.items():
        encode(images[0])
        started = time.process_time()
        size = sum(map(encode, images))
        seconds = time.process_time() - started
        print(f"| {name} | {len(images) / seconds:.0f} | {8 * size / images.size:.2f} |")


def entropy_coders(count: int) -> None:
    """Nanoseconds a symbol, and bits beyond the information, of this stack's two kinds and constriction's."""
    rng = np.random.default_rng(0)
    mean, log2_sigma = rng.uniform(-20, 20, count), rng.uniform(0, 3, count)
    bins, own = Bins(-60, 60), rounded(mean, log2_sigma)
    j = np.clip(np.rint(rng.normal(mean, 2**log2_sigma)), -60, 60).astype(np.int64)
    counts = bins.counts_below(j + 1, own.m, own.s) - bins.counts_below(j, own.m, own.s)
    information = -np.log2(counts / TOTAL).sum()

    def row(name: str, push: Callable[[], Any], bits: Callable[[], float], pop: Callable[[], np.ndarray]) -> None:
        times = [time.process_time()]
        push()
        times.append(time.process_time())
        excess = bits() / information - 1
        restored = pop()
        times.append(time.process_time())
        if not (restored == j).all():
            raise AssertionError(f"{name}: not what was pushed")
        pushed, popped = (1e9 * (b - a) / count for a, b in zip(times, times[1:]))
        print(f"| {name} | {pushed:.0f} | {popped:.0f} | {excess:+.3%} |")

    for name, stack in (
        ("one state", Stack(lambda n: n * 2654435761 % 2**32)),
        ("42 states (1024 dimensions)", WideStack(lambda n: n * 2654435761 % 2**32, 42)),
        ("1024 states", WideStack(lambda n: n * 2654435761 % 2**32, 1024)),
    ):
        stack.push(bins, j[:9], own.m[:9], own.s[:9])  # tables are made once
        stack.pop(bins, own.m[:9], own.s[:9])
        row(name, partial(stack.push, bins, j, own.m, own.s), stack.bits, partial(stack.pop, bins, own.m, own.s))
    try:
        stream = importlib.import_module("constriction").stream
    except ImportError:
        print("constriction is not installed")
        return
    coder, family = stream.stack.AnsCoder(), stream.model.QuantizedGaussian(-60, 60)
    sigma, symbols = 2.0 ** (own.s / OCTAVE), j.astype(np.int32)
    told = own.m / PLACES * sigma, sigma
    row(
        "constriction, which rounds in floating point",
        partial(coder.encode_reverse, symbols, family, *told),
        coder.num_valid_bits,
        partial(coder.decode, family, *told),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/digits", help="A folder.")
    parser.add_argument("--images", type=int, nargs=2, default=[297, 32], help="Digits, and colour images.")
    parser.add_argument("--steps", type=int, default=20, help="K.")
    parser.add_argument("--symbols", type=int, default=SYMBOLS, help="For the entropy coders.")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    pipeline = DDPMVLBPipeline.from_pretrained(args.model)
    test = load_image_data().test
    digits, colour = torch.stack([test[i] for i in range(args.images[0])]), pictures(args.images[1])
    codec = BitsBackCodec(pipeline.network, pipeline.scheduler.reverse_process(num_inference_steps=args.steps))
    large = large_codec(args.steps)
    print(describe() + "\n")
    print(
        "| images | lanes | CPU s to encode, decode | of them the network | coder beside it | images a second |\n"
        "| --- | --- | --- | --- | --- | --- |"
    )
    for lanes in (1, 4, 16):
        coded(f"{len(digits)} digits, 8x8", codec, digits, lanes)
    for lanes in (1, 4):
        coded(f"{len(colour)} of 3x32x32", large, colour, lanes)
    for name, x_0 in (("8x8", digits), ("3x32x32", colour)):
        print(f"\n| of {name} | images a second | bits/dim, files of one image |\n| --- | --- | --- |")
        others(x_0)
    print("\n| entropy coder | push, ns a symbol | pop | bits beyond the information |\n| --- | --- | --- | --- |")
    entropy_coders(args.symbols)


if __name__ == "__main__":
    main()
