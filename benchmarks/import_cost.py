"""Time of `import ddpm_vlb` against that of diffusers' pipeline and network: whole processes, interleaved.

python benchmarks/import_cost.py
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

import torch
from environment import describe

STOCK = "from diffusers import DDPMPipeline, UNet2DModel"
PROGRAMS = ("import torch", STOCK, "import ddpm_vlb")


def seconds(program: str) -> float:
    """Wall-clock time of a process of its own, interpreter included."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="processes for each row")
    rounds = parser.parse_args().rounds
    times: dict[str, list[float]] = {program: [] for program in PROGRAMS}
    for turn in range(rounds + 1):
        for program in PROGRAMS:
            taken = seconds(program)
            if turn:  # the first round warms the disk's cache
                times[program].append(taken)
    torch.set_num_threads(1)
    print(describe() + "\n")
    print("| process | median, s | interquartile range | minus stock in the same round, s | interquartile range |")
    print("| --- | --- | --- | --- | --- |")
    for program, taken in times.items():
        low, _, high = statistics.quantiles(taken, n=4)
        row = f"| `{program}` | {statistics.median(taken):.2f} | {low:.2f} to {high:.2f} |"
        if program == STOCK:
            print(row, "| |")
        else:
            low, middle, high = statistics.quantiles([ours - stock for ours, stock in zip(taken, times[STOCK])], n=4)
            print(row, f"{middle:+.2f} | {low:+.2f} to {high:+.2f} |")


if __name__ == "__main__":
    main()
