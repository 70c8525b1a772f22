r"""Bits-back coding with the chain: what the bound says, as bits on a stack.

To send x_0 whose latents x_1 .. x_K the receiver does not know, the sender draws them with bits that are on the stack
already, by popping, and pushes what the receiver needs to find them again; the receiver, who can work out the draws'
distributions then, pushes the bits back. In the order of the forward chain (papers' indices)

1. pop x_1 ~ q(x_1 | x_0), push x_0 with p(x_0 | x_1), pop x_2 ~ q(x_2 | x_1), push x_1 with p(x_1 | x_2) .., push x_K
2. net bits = E[log2 q(x_1:K | x_0) - log2 p(x_0:K)], the bound, and no more than one step's draw is ever borrowed

Latents lie on grids whose step is the smaller of the widths of q(x_t | x_{t-1}) and q(x_t | x_{t+1}, x_0): finer ones
borrow more bits and save none. What is drawn from is made of integers before use (integer_gaussians), so that the
receiver's network may differ in its last digits.

Sources: Townsend, Bird & Barber 2019 (BB-ANS); Kingma, Abbeel & Ho 2019 (Bit-Swap), algorithm 1, for the order.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from .checks import Model
from .evaluation import model_output
from .integer_gaussians import OCTAVE, PRECISION, Bins, Integers, Rounded, exact_power, rounded
from .rans import Stack
from .reverse_process import ReverseProcess

Told = dict[str, torch.Tensor]
Whitening = Callable[[int], Integers]
_REACH = 10  # the latents' grids end there; their standard deviation is at most 1
_SHARE = 32  # binary digits of a transition's share of x_{t-1}


@dataclass(frozen=True)
class Grids:
    """What the coder needs of q, as integers: at step t = 0 .. K - 1 the grid of its latent, and how it is drawn."""

    spacing: tuple[int, ...]  # log2 of the grid's step in 256ths
    share: tuple[int, ...]  # 2^32 sqrt(alphabar_t / alphabar_{t-1})
    width: tuple[int, ...]  # log2 sigma of q(x_t | x_{t-1}) in 256ths

    @classmethod
    def of(cls, reverse: ReverseProcess) -> "Grids":
        """Those of a chain.

        Args:
            reverse: the process p, with K steps.
        """
        log_abar = reverse.forward.log_alphas_cumprod.cpu().double()
        log_alpha = torch.diff(log_abar, prepend=log_abar.new_zeros(1))
        forward = 0.5 * torch.log2(-torch.expm1(log_alpha))
        log_r = torch.log2(-torch.expm1(log_abar))
        posterior = torch.zeros_like(forward)  # the prior at the end
        posterior[:-1] = forward[1:] + 0.5 * (log_r[:-1] - log_r[1:])
        spacing = torch.floor(OCTAVE * torch.minimum(forward, posterior) + 1e-6)  # round numbers are common
        share = torch.round(2.0**_SHARE * (0.5 * log_alpha).exp())
        width = torch.round(OCTAVE * forward)
        return cls(*(tuple(int(value) for value in own.tolist()) for own in (spacing, share, width)))

    def __len__(self) -> int:
        return len(self.spacing)

    def bins(self, t: int) -> Bins:
        """The latent's numbers.

        Args:
            t: its step.
        """
        most = math.ceil(_REACH / exact_power(self.spacing[t]))
        return Bins(-most, most)

    def values(self, t: int, j: Integers) -> NDArray[np.float64]:
        """The latent itself.

        Args:
            t: its step.
            j: its numbers.
        """
        return np.multiply(j, exact_power(self.spacing[t]), dtype=np.float64)


class ChainCoder:
    """Codes single images, or as many side by side as there are stacks, with the chain.

    Args:
        model: the network, called as model(x_t, timesteps, **conditioning).
        reverse: p in float64, with the levels of the data.
        dtype: of the network.
    """

    def __init__(self, model: Model, reverse: ReverseProcess, dtype: torch.dtype = torch.float64):
        self.model, self.reverse, self.dtype = model, reverse, dtype
        self.grids = Grids.of(reverse)
        self.pixels = Bins(0, (reverse.levels or 2) - 1)
        self.margin = 0.5

    def digest(self, shape: Sequence[int]) -> bytes:
        """A hash of all that the coder is made of, but the network; 32 bytes.

        Args:
            shape: of one image, (C, *).
        """
        reverse, steps = self.reverse, self.reverse.forward.timesteps.tolist()
        clipping = reverse.clip_sample and reverse.clip_sample_range, reverse.thresholding
        told = tuple(shape), self.grids, steps, clipping, reverse.prediction_type, reverse.levels
        digest = hashlib.sha256(repr(told).encode())
        for t in range(len(self.grids)):
            for own in reverse.coefficients(t, torch.zeros(1, dtype=torch.float64).expand(1, *shape)):
                digest.update(own.float().cpu().numpy().tobytes())  # their last digits may differ between machines
        return digest.digest()

    def drawn_from(self, t: int, before: Integers) -> tuple[Bins, Rounded]:
        """q(x_t | x_{t-1}) on the grid of x_t: its bins, and its Gaussians in their units.

        Args:
            t: the step.
            before: numbers of x_{t-1}, or at t = 0 levels of x_0, (B, C, *).
        """
        grids, levels = self.grids, self.reverse.levels or 0
        value = grids.values(t - 1, before) if t else np.multiply(before, 2 / (levels - 1), dtype=np.float64) - 1
        mean = value * (grids.share[t] / 2.0**_SHARE) / exact_power(grids.spacing[t])
        width = np.full(mean.shape, (grids.width[t] - grids.spacing[t]) / OCTAVE)
        return grids.bins(t), rounded(mean, width)

    @torch.no_grad()
    def pushed_with(self, t: int, j: Integers, told: Told, beside: int = 0) -> tuple[Bins, Rounded]:
        """p(x_{t-1} | x_t) on the grid of x_{t-1}, or at t = 0 on the levels; one call of the network.

        Args:
            t: the step.
            j: numbers of x_t, (B, C, *).
            told: the network's further arguments, of B rows.
            beside: so many rows more in the call, to see whether the answer depends on them.
        """
        device = self.reverse.forward.timesteps.device
        x_t = torch.from_numpy(self.grids.values(t, j)).to(device)
        rows = [*range(len(x_t)), *[0] * beside]
        timesteps = self.reverse.forward.timesteps[t].expand(len(rows))
        output = model_output(
            self.model, x_t[rows].to(self.dtype), timesteps, {name: own[rows] for name, own in told.items()}
        )
        if output.dtype != self.dtype:
            raise ValueError(
                f"`model` must compute in {self.dtype}, but gives {output.dtype}: pass the module itself, which is "
                "copied in that precision, and no function around one that is not."
            )
        p = self.reverse(output[: len(x_t)].double(), x_t, t).p
        mean, log2_sigma = p.mean.cpu().numpy(), p.log_variance.cpu().numpy() * (0.5 / math.log(2))
        if t == 0:
            unit = 2 / (self.pixels.high - self.pixels.low)
            bins, own = self.pixels, rounded((mean + 1) / unit, log2_sigma - math.log2(unit))
        else:
            spacing = self.grids.spacing[t - 1]
            bins, own = self.grids.bins(t - 1), rounded(mean / exact_power(spacing), log2_sigma - spacing / OCTAVE)
        self.margin = min(self.margin, own.margin)
        return bins, own

    def prior(self, shape: Sequence[int]) -> tuple[Bins, Rounded]:
        """N(0, I) on the last grid.

        Args:
            shape: (B, C, *).
        """
        spacing = self.grids.spacing[-1]
        zero = np.zeros(shape)
        return self.grids.bins(len(self.grids) - 1), rounded(zero, zero - spacing / OCTAVE)

    def encode(self, stacks: Sequence[Stack], k: Integers, told: Told, whites: Whitening) -> None:
        """Push images, one on each stack.

        Args:
            stacks: B.
            k: the images' levels, (B, C, *).
            told: the network's further arguments for them.
            whites: for each step, numbers of 28 bits, (B, C, *).
        """
        before = k
        for t in range(len(self.grids)):
            bins, q = self.drawn_from(t, before)
            j = _pop(stacks, bins, q, whites(t))
            bins, p = self.pushed_with(t, j, told)
            _push(stacks, bins, p, before)
            before = j
        bins, prior = self.prior(before.shape)
        _push(stacks, bins, prior, before)

    def decode(
        self, stacks: Sequence[Stack], shape: Sequence[int], told: Told, whites: Whitening, beside: int = 0
    ) -> Integers:
        """Take the images' levels back, (B, C, *).

        Args:
            stacks: B.
            shape: of one image, (C, *).
            told: of `encode`.
            whites: of `encode`.
            beside: as of `pushed_with`.
        """
        j = _pop(stacks, *self.prior((len(stacks), *shape)))
        for t in reversed(range(len(self.grids))):
            before = _pop(stacks, *self.pushed_with(t, j, told, beside))
            bins, q = self.drawn_from(t, before)
            _push(stacks, bins, q, j, whites(t))
            j = before
        return j


def whitening(key: int, images: Sequence[int], shape: Sequence[int]) -> Whitening:
    """Numbers that differ between the images of a chunk and their steps.

    Args:
        key: of the chunk.
        images: their numbers.
        shape: of one, (C, *).
    """

    def whites(t: int) -> Integers:
        raw = [np.random.Philox(key=[key, image << 20 | t]).random_raw(math.prod(shape)) for image in images]
        return (np.stack(raw).reshape(-1, *shape) >> np.uint64(64 - PRECISION)).astype(np.int64)

    return whites


def supply(lane: int) -> Callable[[int], int]:
    """The words that a stack begins with, by their number; the same for every chunk.

    Args:
        lane: number of the stack.
    """
    # Told its type: a list of so large a number and a small one is floating point to numpy.
    return lambda n: int(np.random.Philox(key=np.array([2**63, lane << 40 | n], dtype=np.uint64)).random_raw()) >> 32


def _pop(stacks: Sequence[Stack], bins: Bins, own: Rounded, whites: Integers | None = None) -> Integers:
    """A symbol of each dimension from each image's stack."""
    mixed = [None] * len(stacks) if whites is None else whites
    return np.stack([stack.pop(bins, *given) for stack, *given in zip(stacks, own.m, own.s, mixed)])


def _push(stacks: Sequence[Stack], bins: Bins, own: Rounded, j: Integers, whites: Integers | None = None) -> None:
    mixed = [None] * len(stacks) if whites is None else whites
    for stack, *given in zip(stacks, j, own.m, own.s, mixed):
        stack.push(bins, *given)
