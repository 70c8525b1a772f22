"""Gaussian data of correlated dimensions and the network that is exact for it, on chains even in log tan(phi).

With covariance S the noised variable is N(0, V_t), V_t = abar S + (1 - abar) I, and E[x_0 | x_t] = sqrt(abar) S
V_t^-1 x_t. All of the ODE has a closed form: dx/du = F_t x with F_t = abar (I - S V_t^-1), the flow from x_1 to x_T is
V_T^1/2 V_1^-1/2 and the divergence integrates to half the log ratio of the determinants.
"""

import math

import torch
from torch import Tensor

from ddpm_vlb import ForwardProcess, ReverseProcess

SHAPE = (2, 2, 1)
COVARIANCE = 0.3 * 0.9 ** (torch.arange(4).double()[:, None] - torch.arange(4)).abs()


def even_chain(low: float, high: float, steps: int, levels: int | None = None, **options) -> ReverseProcess:
    """p of a chain whose ratios sqrt(1 - abar) / sqrt(abar) are spaced evenly in their logarithm, in float64."""
    ratios = torch.logspace(math.log10(low), math.log10(high), steps, dtype=torch.float64)
    log_abar = -torch.log1p(ratios.square())
    betas = -torch.expm1(torch.cat([log_abar[:1], log_abar.diff()]))
    options = {"prediction_type": "v_prediction", "clip_sample": False} | options
    return ReverseProcess(ForwardProcess.from_betas(betas), levels=levels, **options)


def noised(reverse: ReverseProcess, covariance: Tensor = COVARIANCE) -> Tensor:
    """V_t at each level, (T, D, D)."""
    abar = reverse.forward.alphas_cumprod[:, None, None]
    return abar * covariance + (1 - abar) * torch.eye(len(covariance))


def slopes(reverse: ReverseProcess, covariance: Tensor = COVARIANCE) -> Tensor:
    """F_t at each level, (T, D, D)."""
    wiener = torch.linalg.solve(noised(reverse, covariance), covariance)
    return reverse.forward.alphas_cumprod[:, None, None] * (torch.eye(len(covariance)) - wiener)


class ExactNetwork:
    """What the chain's prediction type asks for, given E[x_0 | x_t]; counts the rows that it is called with."""

    def __init__(self, reverse: ReverseProcess, covariance: Tensor = COVARIANCE):
        abar = reverse.forward.alphas_cumprod[:, None, None]
        signal, sigma, one = abar.sqrt(), (1 - abar).sqrt(), torch.eye(len(covariance)).double()
        x_0 = signal * torch.linalg.solve(noised(reverse, covariance), covariance)
        self.matrices = {
            "epsilon": (one - signal * x_0) / sigma,
            "sample": x_0,
            "v_prediction": (signal * one - x_0) / sigma,
        }[reverse.prediction_type]
        self.rows = 0

    def __call__(self, x_t: Tensor, timesteps: Tensor) -> Tensor:
        self.rows += len(x_t)
        matrices = self.matrices[timesteps].to(x_t.dtype)
        return torch.einsum("bij,bj->bi", matrices, x_t.flatten(1)).reshape(x_t.shape)


def normal(number: int, covariance: Tensor, seed: int = 0, shape=SHAPE) -> Tensor:
    """Draws from N(0, covariance) (B, C, *), float64."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(number, len(covariance), generator=generator, dtype=torch.float64)
    return (draws @ torch.linalg.cholesky(covariance).T).reshape(-1, *shape)


def log_normal(x: Tensor, covariance: Tensor) -> Tensor:
    """log N(x; 0, covariance) of each image in nats, (B,)."""
    zero = torch.zeros(len(covariance), dtype=torch.float64)
    return torch.distributions.MultivariateNormal(zero, covariance).log_prob(x.flatten(1).double())


def runge_kutta_weights(reverse: ReverseProcess) -> tuple[Tensor, Tensor]:
    """The chain index of each stage and what it weighs in an integral over u, (S,)."""
    steps = len(reverse.forward)
    abar = reverse.forward.alphas_cumprod
    u = 0.5 * ((1 - abar) / abar).log()
    stages, weights = [], []
    for start in range(0, steps - 2, 2):
        stages += [start, start + 1, start + 1, start + 2]
        weights += [w * float(u[start + 2] - u[start]) / 6 for w in (1, 2, 2, 1)]
    return torch.tensor(stages), torch.tensor(weights, dtype=torch.float64)
