"""Time and memory of the cost table of all transitions and the dynamic programme over it, for long chains.

    python benchmarks/optimal_paths.py

The network is none: what is measured begins with its outputs' statistics, of 64 images of 8x8 at 100 timesteps.
"""

import resource
import subprocess
import sys
import time

import torch

from ddpm_vlb import DDPMVLBScheduler, collect_statistics, optimal_paths, spread_knots, step_costs


def peak() -> float:
    """Peak memory of the process in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def measure(total: int, most: int, variance: str) -> None:
    """Print one row."""
    scheduler = DDPMVLBScheduler(num_train_timesteps=total, variance_type="learned_range", levels=17)
    reverse = scheduler.reverse_process(dtype=torch.float64)
    x_0 = torch.randint(17, (64, 1, 8, 8), generator=torch.Generator().manual_seed(0)).double() / 8 - 1
    knots = spread_knots(reverse.forward, 100)
    statistics = collect_statistics(lambda x_t, t: torch.cat([x_t, x_t], 1), reverse, x_0, knots)
    before, started = peak(), time.perf_counter()
    costs = step_costs(statistics, reverse, variance)
    table = time.perf_counter() - started
    optimal_paths(costs.transitions, costs.decoder, most)
    paths = time.perf_counter() - started - table
    print(f"{total:6} {most:5} {variance:10} {table:8.2f} {paths:8.2f} {before:14.2f} {peak():10.2f}", flush=True)


def main() -> None:
    """Measure one row, or each in a process of its own, whose peak memory is then its own."""
    torch.set_num_threads(1)
    if len(sys.argv) == 4:
        measure(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
        return
    print("     T     K variance   table, s paths, s  GB before  peak, GB   (one thread)", flush=True)
    for total, most in ((1000, 100), (1000, 1000), (4000, 100)):
        for variance in ("network", "analytic", "per_pixel"):
            subprocess.run([sys.executable, __file__, str(total), str(most), variance], check=True)


if __name__ == "__main__":
    main()
