"""Runs examples/train.py several times in one process, without scores and pictures; started by the tests' launches.

accelerate launch tests/training/training_worker.py '["--output_dir a --seed 0", "--output_dir b --seed 1"]'
"""

import json
import sys

import torch
from accelerate.state import AcceleratorState, GradientState

from ddpm_vlb.commands import train


def main():
    """Each run ends with its last checkpoint."""
    torch.set_num_threads(1)
    train.finish = lambda run: None
    for options in json.loads(sys.argv[1]):
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        train.main(options.split())


if __name__ == "__main__":
    main()
