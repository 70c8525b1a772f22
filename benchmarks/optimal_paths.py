"""Time and memory of the cost table of all transitions and the dynamic programme over it, for long chains.

python benchmarks/optimal_paths.py
"""

import resource
import time

import torch

from ddpm_vlb import ForwardProcess, make_betas, optimal_paths
from ddpm_vlb.optimal_paths import analytic_costs, transitions


def main() -> None:
    """Measure, from the shortest chain on: the peak memory is that of the process so far."""
    torch.set_num_threads(1)
    print(f"{'T':>6} {'K':>5} {'seconds':>9} {'peak, GB':>9}   (one thread; torch alone: {peak():.2f} GB)")
    for total, most in ((1000, 100), (1000, 1000), (4000, 100)):
        started = time.perf_counter()
        forward = ForwardProcess.from_betas(make_betas("squaredcos_cap_v2", total))
        mse = torch.linspace(0.001, 0.9, total, dtype=torch.float64)
        optimal_paths(analytic_costs(transitions(forward), mse), 1 + mse, most)
        print(f"{total:6} {most:5} {time.perf_counter() - started:9.2f} {peak():9.2f}")


def peak() -> float:
    """Peak memory of the process in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    main()
