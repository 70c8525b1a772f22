"""What the losses cost beside a small U-Net's forward and backward pass: medians of interleaved runs.

python benchmarks/loss_overhead.py

"no decoder" is a batch without the first step (98 % of batches of 16 under uniform t); "decoder" has it in one row.
"""

import statistics
import time
from collections.abc import Callable

import torch
from diffusers import UNet2DModel
from environment import describe

from ddpm_vlb import DDPMVLBScheduler, hybrid_loss, simple_loss, vlb_loss

BATCH, ROUNDS, PASSES = (16, 3, 32, 32), 200, 24


def small_unet(widths: tuple[int, ...]) -> UNet2DModel:
    depth = len(widths)
    return UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=6,
        block_out_channels=widths,
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D",) * depth,
        up_block_types=("UpBlock2D",) * depth,
        add_attention=False,
    )


def seconds(function: Callable[[], torch.Tensor]) -> float:
    started = time.perf_counter()
    function().backward()
    return time.perf_counter() - started


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(describe())
    reverse = DDPMVLBScheduler(variance_type="learned_range").reverse_process()
    x_0 = (torch.randint(256, BATCH) / 127.5 - 1).float()
    steps = {"no decoder": torch.linspace(1, 999, BATCH[0]).long(), "decoder": torch.linspace(0, 999, BATCH[0]).long()}
    noised = {name: reverse.forward.diffuse(x_0, t, torch.randn(BATCH)) for name, t in steps.items()}
    output = torch.randn(BATCH[0], 6, *BATCH[2:])
    losses = {"simple": simple_loss, "hybrid": hybrid_loss, "vlb": vlb_loss}
    runs: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "mse": lambda leaf: torch.nn.functional.mse_loss(leaf[:, :3], x_0)
    }
    for batch, diffused in noised.items():
        for name, loss in losses.items():
            runs[f"{name}, {batch}"] = lambda leaf, loss=loss, diffused=diffused: loss(reverse, leaf, diffused).mean()
    unets = {widths: small_unet(widths) for widths in ((32, 64), (64, 128))}
    times: dict[str, list[float]] = {name: [] for name in runs}
    passes: dict[tuple[int, ...], list[float]] = {widths: [] for widths in unets}
    for i in range(ROUNDS):
        for name, run in runs.items():
            leaf = output.clone().requires_grad_()
            times[name].append(seconds(lambda run=run, leaf=leaf: run(leaf)))
        if i % (ROUNDS // PASSES) == 0:
            for widths, unet in unets.items():
                passes[widths].append(seconds(lambda unet=unet: unet(x_0, steps["decoder"]).sample.square().mean()))
    whole = {widths: statistics.median(values) for widths, values in passes.items()}
    names = [
        f"{w}, {sum(p.numel() for p in unets[w].parameters()) / 1e6:.1f} M, {whole[w] * 1e3:.0f} ms" for w in unets
    ]
    print(f"Batch {BATCH}; U-Nets by widths, parameters and median forward and backward time.\n")
    print(f"| loss, forward and backward | median, us | over plain MSE: {' | '.join(names)} |")
    print("| --- | --- |" + " --- |" * len(unets))
    plain = statistics.median(times["mse"])
    for name, values in times.items():
        median = statistics.median(values)
        shares = " | ".join(f"{(median - plain) / whole[widths]:.2%}" for widths in unets)
        print(f"| {name} | {median * 1e6:.0f} | {shares} |")


if __name__ == "__main__":
    main()
