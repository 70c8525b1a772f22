"""The bound as bytes: net rates beside the bound of the same images, and whole files beside other codecs.

    python benchmarks/compression.py [--model runs/digits] [--steps 5 10 20 50] [--calls 100]

The model is what `ddpm-vlb train` leaves, with the paths of these steps that `ddpm-vlb optimize-timesteps` stores in
it; the images are the digits' test split. A net rate is the mean over many orders of the images, each of which draws
other latents; every first file is decoded and compared. Seconds are those of compression_speed.py.
"""

import argparse
from collections.abc import Sequence

import numpy as np
import torch
from environment import describe

from ddpm_vlb import BitsBackCodec, DDPMVLBPipeline, evaluate_vlb
from ddpm_vlb.runtime.common_codecs import sizes
from ddpm_vlb.runtime.image_data import load_image_data


def checked(codec: BitsBackCodec, x_0: torch.Tensor, lanes: int | None = 1) -> bytes:
    """A file that was decoded and compared."""
    data = codec.compress(x_0, lanes=lanes, verify=False)
    if not torch.equal(codec.decompress(data).x_0, x_0):
        raise AssertionError("not what was encoded")
    return data


def net_rates(codec: BitsBackCodec, x_0: torch.Tensor, repeats: int) -> np.ndarray:
    """Net bits/dim of each image, the mean over orders of the images; NaN for one that was a seed in all of them."""
    total, times = np.zeros(len(x_0)), np.zeros(len(x_0))
    for seed in range(repeats):
        order = torch.randperm(len(x_0), generator=torch.Generator().manual_seed(seed))
        net: dict[int, float] = {}
        codec.compress(x_0[order], lanes=len(x_0) // 16 or 1, verify=False, bits=net.__setitem__)
        own = order[list(net)].numpy()
        total[own] += list(net.values())
        times[own] += 1
    return total / np.where(times > 0, times, np.nan) / x_0[0].numel()


def bounds(codec: BitsBackCodec, x_0: torch.Tensor, repeats: int) -> np.ndarray:
    """The bound of each image in bits/dim by the codec's own network, the mean over draws."""
    draws = []
    for seed in range(repeats):
        generator = torch.Generator().manual_seed(1000 + seed)
        draws += [evaluate_vlb(codec.coder.model, codec.coder.reverse, x_0.double(), generator=generator).bits_per_dim]
    return torch.stack(draws).mean(0).numpy()


def rates(pipeline: DDPMVLBPipeline, x_0: torch.Tensor, steps: Sequence[int], calls: int) -> None:
    """Net rates beside the bound, paired: the error is that of both means, over latents and images."""
    print("| K | variance | bound, bits/dim | net, less the bound of the same images | file of all, one lane |")
    print("| --- | --- | --- | --- | --- |")
    for count in steps:
        codec = BitsBackCodec(pipeline.network, pipeline.scheduler.reverse_process(num_inference_steps=count))
        bound = bounds(codec, x_0, -(-calls // count))
        gaps = net_rates(codec, x_0, -(-calls // count)) - bound
        gaps = gaps[~np.isnan(gaps)]
        size = len(checked(codec, x_0))
        above = 8 * size / x_0.numel() / bound.mean() - 1
        stored = pipeline.scheduler.optimal_paths.get(count)
        print(
            f"| {count} | {'not stored' if stored is None else stored.variance} | {bound.mean():.3f} | "
            f"{gaps.mean():+.4f} +- {gaps.std(ddof=1) / len(gaps) ** 0.5:.4f} | {size} bytes, {above:+.1%} |",
            flush=True,
        )


def files(pipeline: DDPMVLBPipeline, x_0: torch.Tensor, numbers: Sequence[int], count: int) -> None:
    """Whole files of the first images, beside others."""
    codec = BitsBackCodec(pipeline.network, pipeline.scheduler.reverse_process(num_inference_steps=count))
    levels = codec.coder.reverse.levels or 0
    rows: dict[str, list[int]] = {}
    for number in numbers:
        k = codec.levels_of(x_0[:number])
        for lanes in (1, 4):
            file = checked(codec, x_0[:number], lanes)
            rows.setdefault(f"this, K = {count}, {lanes} lane{'s' * (lanes > 1)}", []).append(len(file))
        rows.setdefault("histogram for each position, known beforehand", []).append(histogram(k, levels))
        for name, size in sizes(k, levels).items():
            rows.setdefault(name, []).append(size)
    print(f"\n| bytes of images | {' | '.join(map(str, numbers))} |\n| --- |{' --- |' * len(numbers)}")
    for name, own in rows.items():
        print(f"| {name} | {' | '.join(map(str, own))} |")


def histogram(k: np.ndarray, levels: int) -> int:
    """Bytes of images by how often each level occurs at each position of all training images."""
    train = load_image_data().train
    x_0 = torch.stack([train[i] for i in range(len(train))]).flatten(1)
    seen = ((x_0 + 1) * ((levels - 1) / 2)).round().long().numpy()
    every = np.arange(seen.shape[1])
    counts = np.full((seen.shape[1], levels), 0.5)
    for image in seen:
        counts[every, image] += 1
    probabilities = counts / counts.sum(1, keepdims=True)
    return int(-np.log2(probabilities[every, k.reshape(len(k), -1)]).sum() / 8)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/digits", help="A folder.")
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[5, 10, 20, 50], help="K; whole files take 20, or else the first."
    )
    parser.add_argument("--calls", type=int, default=100, help="For each image and K, for the net rate and the bound.")
    parser.add_argument("--images", type=int, nargs="+", default=[1, 10, 100, 297], help="Of the test split.")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    pipeline = DDPMVLBPipeline.from_pretrained(args.model)
    test = load_image_data().test
    x_0 = torch.stack([test[i] for i in range(min(len(test), max(args.images)))])
    print(describe() + "\n")
    rates(pipeline, x_0, args.steps, args.calls)
    files(pipeline, x_0, args.images, 20 if 20 in args.steps else args.steps[0])


if __name__ == "__main__":
    main()
