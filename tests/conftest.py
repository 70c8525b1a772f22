"""What all tests share: one thread."""

import torch

# The tensors here are too small for more threads to help, and sums must not depend on the machine's number of cores.
torch.set_num_threads(1)
