"""The cases of tests/golden: their processes, inputs and networks."""

import functools
from pathlib import Path

import numpy as np
import torch

from ddpm_vlb import ForwardProcess, ReverseProcess, make_betas

GOLDEN = Path(__file__).parent / "golden"
STEPS = {"linear50": 50, "linear1000": 1000, "cosine1000": 1000}
PREDICTION = {"EPSILON": "epsilon", "START_X": "sample"}
VARIANCE = {v.upper(): v for v in ("fixed_small", "fixed_large", "learned", "learned_range")}
LOOPS = [
    key.removeprefix("loop.").removesuffix(".total_bpd_exact")
    for key in np.load(GOLDEN / "exact_decoder_f64.npz")
    if key.endswith("total_bpd_exact")
]


@functools.cache
def golden(name):
    """The arrays of one file."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


@functools.cache
def forward(schedule):
    """q of a named schedule."""
    name, steps = ("linear", STEPS[schedule]) if "linear" in schedule else ("squaredcos_cap_v2", STEPS[schedule])
    return ForwardProcess.from_betas(make_betas(name, steps, 0.1 / steps, 20 / steps))


def inputs(name):
    """One of the shared inputs, as a tensor."""
    return torch.from_numpy(golden("inputs")[name])


def reverse(schedule, mean, variance, clip, indices=None):
    """p of a case, on the original chain or a respaced one."""
    q = forward(schedule) if indices is None else forward(schedule).respace(indices)
    return ReverseProcess(q, PREDICTION[mean], VARIANCE[variance], clip_sample=clip == "clip1")


def closed_form(schedule, model, variance):
    """The closed-form network of the golden runs, which is told timesteps of the original chain."""
    steps, abar = STEPS[schedule], forward(schedule).alphas_cumprod

    def network(x, timesteps):
        u = (timesteps.double() / steps).reshape(-1, 1, 1, 1)
        if model == "toy":
            mean_output = 1.2 * torch.tanh(1.3 * x + 0.7 * u)
        else:
            a = abar[timesteps].reshape(-1, 1, 1, 1)
            mean_output = (1 - a).sqrt() / (0.35 * a + 1 - a) * (x - 0.1 * a.sqrt())
        v = torch.tanh(0.8 * x - 1.1 * u)
        halves = {"LEARNED": [2 * v - 6], "LEARNED_RANGE": [v]}.get(variance, [])
        return torch.cat([mean_output, *halves], dim=1)

    return network
