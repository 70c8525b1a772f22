"""CPU time of one `scheduler.step` against stock DDPMScheduler's: medians of interleaved runs, on one thread.

python benchmarks/scheduler_step.py
"""

import statistics
import time

import torch
from diffusers import DDPMScheduler
from environment import describe

from ddpm_vlb import DDPMVLBScheduler

SHAPES = ((16, 3, 32, 32), (1, 1, 8, 8))
ROUNDS, CALLS = 60, 100


def main() -> None:
    torch.set_num_threads(1)
    print(describe() + "\n")
    print("| shape | stock, us | ours, us | ratio of medians | interquartile range of the rounds' ratios |")
    print("| --- | --- | --- | --- | --- |")
    for shape in SHAPES:
        times: dict[str, list[float]] = {"stock": [], "ours": []}
        schedulers = {
            "stock": DDPMScheduler(variance_type="learned_range"),
            "ours": DDPMVLBScheduler(variance_type="learned_range"),
        }
        sample = torch.randn(shape)
        output = torch.cat([torch.randn(shape), torch.rand(shape) * 2 - 1], dim=1)
        for scheduler in schedulers.values():
            scheduler.set_timesteps(1000)
        steps = schedulers["ours"].timesteps[:CALLS]
        for _ in range(ROUNDS):
            for name, scheduler in schedulers.items():
                started = time.thread_time()
                for t in steps:
                    scheduler.step(output, t, sample)
                times[name].append((time.thread_time() - started) / CALLS * 1e6)
        stock, ours = (statistics.median(times[name]) for name in ("stock", "ours"))
        quartiles = statistics.quantiles([a / b for a, b in zip(times["stock"], times["ours"])], n=4)
        spread = f"{quartiles[0]:.2f} to {quartiles[2]:.2f}"
        print(f"| {'x'.join(map(str, shape))} | {stock:.0f} | {ours:.0f} | {stock / ours:.2f} | {spread} |")


if __name__ == "__main__":
    main()
