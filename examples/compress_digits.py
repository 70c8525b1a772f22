"""Compress the digits' test images without loss by a checkpoint, and see how long the file is.

    python examples/digits.py
    python examples/compress_digits.py

The first trains the checkpoint. The second finds its best twenty steps, codes the images along them, prints the bytes
beside the bound and beside codecs that anyone has, decodes the file, and compares every pixel.
"""

import io
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits

from ddpm_vlb import (
    BitsBackCodec,
    DDPMVLBPipeline,
    StoredPath,
    collect_statistics,
    estimate_vlb,
    optimal_paths,
    spread_knots,
    step_costs,
)


def store_best(pipeline: Any, images: torch.Tensor, steps: int) -> None:
    """Keep the path of so many steps on which the bound is least in the checkpoint's scheduler."""
    reverse = pipeline.scheduler.reverse_process()
    statistics = collect_statistics(pipeline.unet, reverse, images, spread_knots(reverse.forward, 100))
    costs = step_costs(statistics, reverse, "network")
    indices = optimal_paths(costs.transitions, costs.decoder, steps).indices(steps)
    best = StoredPath(tuple(indices[::-1]), "network", float(costs.shift[indices[0]]))
    pipeline.scheduler.store_few_steps([best])


def others(levels: torch.Tensor) -> dict[str, int]:
    """Bytes of the images (B, 1, 8, 8) in codecs that anyone has: all of them in one PNG, and in xz."""
    k, file = levels.byte().numpy(), io.BytesIO()
    Image.fromarray(np.hstack(list(k[:, 0]))).save(file, "PNG", optimize=True)
    packed = lzma.compress(k.tobytes(), preset=9 | lzma.PRESET_EXTREME)
    return {"raw": k.nbytes, "one PNG": file.tell(), "xz": len(packed)}


def main(folder: str = "runs/digits-example", num_test: int = 297, num_fit: int = 256, steps: int = 20) -> int:
    """Find the path, compress, compare, decompress; returns the bytes."""
    if not Path(folder).is_dir():
        raise SystemExit(f"{folder} is not there: run `python examples/digits.py` first.")
    pipeline: Any = DDPMVLBPipeline.from_pretrained(folder)
    levels = torch.tensor(load_digits().images[:, None], dtype=torch.float32)
    train, test = (levels / 8 - 1).split(1500)
    test = test[:num_test]
    store_best(pipeline, train[:num_fit], steps)
    reverse = pipeline.scheduler.reverse_process(num_inference_steps=steps)
    codec = BitsBackCodec(pipeline.unet, reverse)
    data = codec.compress(test, verify=False)
    bound = estimate_vlb(pipeline.unet, reverse, test.split(64), estimator="full").bits_per_dim
    rate = 8 * len(data) / test.numel()
    print(f"{len(test)} images: {len(data)} bytes, {rate:.3f} bits/dim where the bound says {bound:.3f}")
    print(*(f"{name}: {size}" for name, size in others(levels[1500:][:num_test]).items()), sep=", ")
    assert torch.equal(codec.decompress(data).x_0, test)
    print("Every pixel came back.")
    return len(data)


if __name__ == "__main__":
    main()
