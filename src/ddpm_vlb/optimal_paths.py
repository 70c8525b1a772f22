r"""The few-step chain with the lowest bound, by dynamic programming over the steps of the training chain.

The bound of the chain t_1 < .. < t_K = T - 1 is the prior, the decoder at t_1 and a KL L(t, s) for each pair of
neighbours. With r = SNR_s - SNR_t, which is c0^2 / betatilde, D = log (1 - abar_t) / (1 - abar_s), which is log
beta_{t|s} / betatilde, and m the expected squared error of x_0_hat(x_t), per dimension:

1. L(t, s) = 1/2 E[u + expm1(-u) + r m exp(-u)], u = log sigma^2 / betatilde:  fixed_small: u = 0;  fixed_large: u = D;
   learned_range: u = (v + 1)/2 D
2. at the optimal variance betatilde + c0^2 m it is 1/2 log(1 + r m), and for each dimension 1/2 mean_i log(1 + r m_i)
3. C[1, t] = decoder(t), C[k, t] = min_s C[k - 1, s] + L(t, s); a path is traced back from C[K, T - 1]

Sources: Watson et al. 2021, "Learning to Efficiently Sample from Diffusion Probabilistic Models", eq. 17, algorithms 1
and 2 (whose trace as printed starts from K; it must start from T); Bao et al. 2022a, theorem 1 and section 4.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .forward_process import ForwardProcess


class Transitions(NamedTuple):
    """r and D of equation 1 for every pair of steps, (T, T) at [t, s], float64; 1 where s >= t."""

    snr_gap: Tensor
    log_range: Tensor


class Paths(NamedTuple):
    """The best paths of 1 .. K steps: their costs (K,), and where each came from (K, T)."""

    costs: Tensor
    previous: Tensor

    def indices(self, steps: int) -> list[int]:
        """The chain indices of the best path of so many steps, ascending.

        Args:
            steps: 1 .. K.
        """
        path = [self.previous.shape[1] - 1]
        for k in reversed(range(1, steps)):
            path.append(int(self.previous[k, path[-1]]))
        return path[::-1]


def earlier(total: int) -> Tensor:
    """Whether s is before t, (T, T) at [t, s].

    Args:
        total: T.
    """
    return torch.ones(total, total, dtype=torch.bool).tril(-1)


def transitions(forward: ForwardProcess) -> Transitions:
    """r and D between any two steps of a chain.

    Args:
        forward: the chain.
    """
    root = forward.log_alphas_cumprod.cpu()
    log_abar, noise = root, -torch.expm1(root)
    beta = -torch.expm1(log_abar[:, None] - log_abar[None, :])
    snr_gap = log_abar.exp()[None, :] * beta / (noise[:, None] * noise[None, :])
    log_range = noise.log()[:, None] - noise.log()[None, :]
    below = earlier(len(root))
    return Transitions(torch.where(below, snr_gap, 1.0), torch.where(below, log_range, 1.0))


def fixed_costs(pairs: Transitions, mse: Tensor, large: bool = False) -> Tensor:
    """L(t, s) of the fixed variances, in nats per dimension, (T, T).

    Args:
        pairs: of the chain.
        mse: m_t, (T,).
        large: fixed_large in place of fixed_small.
    """
    error = pairs.snr_gap * mse[:, None]
    if not large:
        return 0.5 * error
    u = pairs.log_range
    return 0.5 * (u + torch.expm1(-u) + error * torch.exp(-u))


def analytic_costs(pairs: Transitions, mse: Tensor) -> Tensor:
    """L(t, s) at the optimal variance of all dimensions, in nats per dimension, (T, T); equation 2.

    Args:
        pairs: of the chain.
        mse: m_t, (T,).
    """
    return 0.5 * torch.log1p(pairs.snr_gap * mse[:, None])


def priced(snr_gap: Tensor, fitted: Tensor, mse: Tensor) -> Tensor:
    """L at the variance that is optimal for other errors than the data's, in nats, elementwise.

    Args:
        snr_gap: r.
        fitted: the errors that the variance was made from.
        mse: the data's, m.

    Source: equation 1 with u = log(1 + r fitted).
    """
    return 0.5 * (torch.log1p(snr_gap * fitted) + snr_gap * (mse - fitted) / (1 + snr_gap * fitted))


class Chebyshev(NamedTuple):
    """Nodes of polynomial interpolation on [low, high], ascending (N,)."""

    low: float
    high: float
    nodes: Tensor

    @classmethod
    def between(cls, low: float, high: float, number: int) -> "Chebyshev":
        """Make the nodes.

        Args:
            low: one end.
            high: the other, above it.
            number: N, at least 1.
        """
        x = torch.cos(math.pi * (torch.arange(number, dtype=torch.float64) + 0.5) / number).flip(0)
        return cls(low, high, low + (high - low) * (x + 1) / 2)

    def rows_at(self, values: Tensor, at: Tensor) -> Tensor:
        """Each row's polynomial at its own points, (T, S).

        Args:
            values: of T functions at the nodes, (T, N).
            at: the points, (T, S).
        """
        number = len(self.nodes)
        angle = math.pi * (torch.arange(number, dtype=torch.float64) + 0.5) / number
        basis = torch.cos(torch.arange(number, dtype=torch.float64)[:, None] * angle)
        coefficients = (2 / number) * values.flip(1) @ basis.T
        coefficients[:, 0] *= 0.5
        x = (2 * (at - self.low) / max(self.high - self.low, 1e-300) - 1).clamp(-1, 1)
        after, last = torch.zeros_like(x), torch.zeros_like(x)  # Clenshaw's recurrence
        for k in reversed(range(1, number)):
            after, last = 2 * x * after - last + coefficients[:, k, None], after
        return x * after - last + coefficients[:, 0, None]


def optimal_paths(costs: Tensor, first: Tensor, max_steps: int) -> Paths:
    """The paths of 1 .. `max_steps` steps with the lowest cost that end at the last step; equation 3.

    Args:
        costs: L(t, s) at [t, s] for s < t, (T, T); the rest is not read.
        first: the decoder's cost at each step, (T,).
        max_steps: K, 1 .. T.

    Raises:
        ValueError: wrong shapes, K outside 1 .. T, or costs that are not finite, with the steps.
    """
    total = len(first)
    if costs.shape != (total, total) or first.ndim != 1:
        raise ValueError(
            f"`costs` must be (T, T) and `first` (T,), but are {tuple(costs.shape)} and {tuple(first.shape)}."
        )
    if isinstance(max_steps, bool) or not isinstance(max_steps, int) or not 1 <= max_steps <= total:
        raise ValueError(
            f"`max_steps` must be an integer in 1 .. {total}, the length of the chain, but got {max_steps!r}."
        )
    below = earlier(total)
    bad = (~costs.isfinite() & below).nonzero()
    if len(bad):
        raise ValueError(f"`costs` must be finite, but from t={int(bad[0, 0])} to s={int(bad[0, 1])} it is not.")
    if not bool(first.isfinite().all()):
        raise ValueError(f"`first` must be finite, but at t={int((~first.isfinite()).nonzero()[0])} it is not.")
    table = torch.where(below, costs, math.inf)
    # One buffer: a new table for each step, freed between what is kept, can leave the heap full of holes.
    extended = torch.empty_like(table)
    best, reached, previous = first, [first[-1]], [torch.zeros(total, dtype=torch.int64)]
    for _ in range(1, max_steps):
        best, came_from = torch.add(table, best, out=extended).min(1)
        reached.append(best[-1])
        previous.append(came_from)
    return Paths(torch.stack(reached), torch.stack(previous))
