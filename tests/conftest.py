"""What all tests share: importable example scripts, and one thread."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

# The tensors here are too small for more threads to help, and sums must not depend on the machine's number of cores.
torch.set_num_threads(1)
