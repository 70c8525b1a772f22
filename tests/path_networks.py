"""One network, written as a network of every Gaussian path."""

import math

import torch
from diffusers import CosineDPMSolverMultistepScheduler

from ddpm_vlb import GaussianPath, spaced_ratios

KINDS = ("v", "ve", "flow", "edm", "edm-v", "cosine")


def epsilon(x, t):
    """An epsilon network of the VP chain, told log r."""
    return (x * (0.8 + 0.02 * t.reshape(-1, 1, 1, 1))).tanh()


RATIOS = spaced_ratios(0.05, 60.0, 9)


def rewritten(kind: str, epsilon=epsilon, ratios=RATIOS):
    """The same network, as a network of each path: (path, model).

    Args:
        kind: one of `KINDS`, or "epsilon".
        epsilon: the network of the VP variable and log r.
        ratios: the chain's.
    """

    def vp(x, r):
        r = r.reshape(-1, 1, 1, 1)
        n = (1 + r**2).sqrt()
        e = epsilon(x, r.flatten().log())
        return n, r, e, n * x - r * e  # and x_0_hat

    def flow(x, t):
        r = t / 1000 / (1 - t / 1000)
        n, r, e, x_0 = vp(x * ((1 + r) / (1 + r**2).sqrt()).reshape(-1, 1, 1, 1), r)
        return e - x_0

    def karras(sigma_of, sd, sign):
        def model(seen, t):
            r = sigma_of(t)
            x = seen * (r**2 + sd**2).sqrt().reshape(-1, 1, 1, 1)
            n, r, _, x_0 = vp(x / (1 + r**2).sqrt().reshape(-1, 1, 1, 1), r)
            scale = (r**2 + sd**2).rsqrt()
            return sign * (x_0 - sd**2 * scale**2 * x) / (r * sd * scale)

        return model

    def v(x, t):
        n, r, e, x_0 = vp(x, ratios[t.round().long()])
        return (e - r * x_0) / n

    def ve(x, t):  # told sigma itself, its input not scaled: a path of the user's own
        n, r, e, _ = vp(x / (1 + t**2).sqrt().reshape(-1, 1, 1, 1), t)
        return e

    one = torch.ones_like(ratios)
    abar = 1 / (1 + ratios**2)
    return {
        "epsilon": lambda: (GaussianPath.ddpm(abar, ratios), lambda x, t: epsilon(x, ratios[t.round().long()].log())),
        "v": lambda: (GaussianPath.ddpm(abar, ratios, "v_prediction"), v),
        "ve": lambda: (GaussianPath(one, ratios, ratios, one, one, -ratios), ve),
        "flow": lambda: (GaussianPath.flow(ratios / (1 + ratios)), flow),
        "edm": lambda: (GaussianPath.edm(ratios, 0.5), karras(lambda t: (4 * t).exp(), 0.5, 1)),
        "edm-v": lambda: (
            GaussianPath.edm(ratios, 1.0, "v_prediction"),
            karras(lambda t: (4 * t).exp(), 1.0, -1),
        ),
        "cosine": lambda: (
            GaussianPath.from_config(CosineDPMSolverMultistepScheduler(), ratios),
            karras(lambda t: (t * math.pi / 2).tan(), 1.0, -1),
        ),
    }[kind]()
