"""The bound as bytes: net rates beside the bound of the same images, whole files beside other codecs, and seconds.

python benchmarks/compression.py [--model runs/digits] [--steps 5 10 20 50]

The model is what `ddpm-vlb train` leaves, with the paths of these steps that `ddpm-vlb optimize-timesteps` stores in
it; the images are the digits' test split. Every file is decoded and compared.
"""

import argparse
import time
from collections.abc import Sequence

import numpy as np
import torch
from environment import describe

from ddpm_vlb import BitsBackCodec, DDPMVLBPipeline, evaluate_vlb
from ddpm_vlb.runtime.common_codecs import sizes
from ddpm_vlb.runtime.image_data import load_image_data

BOUNDS = 16  # draws of the bound, the mean of which is compared


def coded(codec: BitsBackCodec, x_0: torch.Tensor, lanes: int | None) -> tuple[bytes, dict[int, float], list[float]]:
    """A file, the net bits of each image but the seeds, and the CPU seconds to make it and to read it."""
    net: dict[int, float] = {}
    times = [time.process_time()]
    data = codec.compress(x_0, lanes=lanes, verify=False, bits=net.__setitem__)
    times.append(time.process_time())
    if not torch.equal(codec.decompress(data).x_0, x_0):
        raise AssertionError("not what was encoded")
    times.append(time.process_time())
    return data, net, [b - a for a, b in zip(times, times[1:])]


def rates(pipeline: DDPMVLBPipeline, x_0: torch.Tensor, steps: Sequence[int]) -> None:
    """Net rates beside the bound, paired."""
    dims = x_0[0].numel()
    print("| K | variance | bound, bits/dim | net bits/dim, less the bound of the same images | file | CPU s |")
    print("| --- | --- | --- | --- | --- | --- |")
    for count in steps:
        reverse = pipeline.scheduler.reverse_process(dtype=torch.float64, num_inference_steps=count)
        codec = BitsBackCodec(pipeline.network, reverse)
        data, net, (encoding, decoding) = coded(codec, x_0, 1)
        bound = torch.stack([one_bound(codec, x_0, seed) for seed in range(1, BOUNDS + 1)]).mean(0).numpy()
        own = np.array(list(net))
        difference = np.array(list(net.values())) / dims - bound[own]
        gap = f"{difference.mean():+.4f} +- {difference.std(ddof=1) / len(own) ** 0.5:.4f}"
        whole = 8 * len(data) / x_0.numel()
        stored = pipeline.scheduler.optimal_paths.get(count)
        kind = "not stored" if stored is None else stored.variance
        above = f"{len(data)} bytes, {whole / bound.mean() - 1:+.1%}"
        print(
            f"| {count} | {kind} | {bound.mean():.3f} | {gap} | {above} | {encoding:.0f}, {decoding:.0f} |", flush=True
        )


def one_bound(codec: BitsBackCodec, x_0: torch.Tensor, seed: int) -> torch.Tensor:
    """A draw of the bound of each image, by the codec's own network."""
    generator = torch.Generator().manual_seed(seed)
    return evaluate_vlb(codec.coder.model, codec.coder.reverse, x_0.double(), generator=generator).bits_per_dim


def files(pipeline: DDPMVLBPipeline, x_0: torch.Tensor, numbers: Sequence[int], count: int) -> None:
    """Whole files of the first images, beside others."""
    codec = BitsBackCodec(pipeline.network, pipeline.scheduler.reverse_process(num_inference_steps=count))
    levels = codec.coder.reverse.levels or 0
    rows: dict[str, list[int]] = {}
    for number in numbers:
        k = codec.levels_of(x_0[:number])
        for lanes in (1, 4):
            rows.setdefault(f"this, K = {count}, {lanes} lane(s)", []).append(
                len(coded(codec, x_0[:number], lanes)[0])
            )
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
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 20, 50], help="K.")
    parser.add_argument("--images", type=int, nargs="+", default=[1, 10, 100, 297], help="Of the test split.")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    pipeline = DDPMVLBPipeline.from_pretrained(args.model)
    test = load_image_data().test
    x_0 = torch.stack([test[i] for i in range(min(len(test), max(args.images)))])
    print(describe() + "\n")
    rates(pipeline, x_0, args.steps)
    files(pipeline, x_0, args.images, 20)


if __name__ == "__main__":
    main()
