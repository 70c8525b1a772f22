"""What the losses cost beside a small U-Net's forward and backward pass: medians of interleaved runs.

python benchmarks/loss_overhead.py
"""

import statistics
import time

import torch
from diffusers import UNet2DModel
from environment import describe

from ddpm_vlb import DDPMVLBScheduler, hybrid_loss, simple_loss, vlb_loss

BATCH, ROUNDS = (16, 3, 32, 32), 400


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(describe())
    unet = UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=6,
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        add_attention=False,
    )
    reverse = DDPMVLBScheduler(variance_type="learned_range").reverse_process()
    x_0 = (torch.randint(256, BATCH) / 127.5 - 1).float()
    t = torch.linspace(0, 999, BATCH[0]).long()  # one row in sixteen is the decoder's
    diffused = reverse.forward.diffuse(x_0, t, torch.randn(BATCH))

    def network() -> float:
        started = time.perf_counter()
        unet(diffused.x_t, t).sample.square().mean().backward()
        return time.perf_counter() - started

    output = unet(diffused.x_t, t).sample.detach()

    losses = {"simple": simple_loss, "vlb": vlb_loss, "hybrid": hybrid_loss}

    def loss(kind: str) -> float:
        leaf = output.clone().requires_grad_()
        started = time.perf_counter()
        if kind == "mse":
            value = torch.nn.functional.mse_loss(leaf[:, :3], diffused.noise)
        else:
            value = losses[kind](reverse, leaf, diffused).mean()
        value.backward()
        return time.perf_counter() - started

    kinds = ("mse", "simple", "hybrid", "vlb")
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    passes = [network() for _ in range(30)]
    for _ in range(ROUNDS):
        for kind in kinds:
            times[kind].append(loss(kind))
    passes += [network() for _ in range(30)]
    whole = statistics.median(passes)
    print(f"U-Net of {sum(p.numel() for p in unet.parameters()) / 1e6:.2f} M parameters, batch {BATCH}: ", end="")
    print(f"forward and backward {whole * 1e3:.1f} ms (median of {len(passes)})")
    print("| loss, forward and backward | median, us | more than plain MSE, of the network's time |")
    print("| --- | --- | --- |")
    plain = statistics.median(times["mse"])
    for kind in kinds:
        median = statistics.median(times[kind])
        print(f"| {kind} | {median * 1e6:.0f} | {(median - plain) / whole:.2%} |")


if __name__ == "__main__":
    main()
