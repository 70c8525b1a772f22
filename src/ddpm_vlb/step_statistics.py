r"""What a network's outputs at some steps say of every transition between steps, estimated from images.

One output at (x_t, t) prices all s < t: L(t, s) depends on s only through r = SNR_s - SNR_t and D (equation 1 of
`optimal_paths`). The expectations of a learned variance are kept as functions of D at Chebyshev nodes, F(D) = E[u +
expm1(-u)] and G(D) = E[err^2 exp(-u)] with u = (v + 1)/2 D; those of fixed and optimal variances need m alone.
Between the steps that were visited m and G are interpolated in their logarithm, the rest linearly.

The images are dealt to two halves, so that an optimal variance can be priced on images that it was not made from. The
errors of each pixel are drawn towards the mean of all, by the weight that prices the other half best: a pixel that
never varied in n images may do so in the next.

A decoder is a mean over dimensions that are independent given x_t. Of each image a few are kept, drawn at random, so
that many images can speak at little memory.

Sources: Watson et al. 2021, section 3; Bao et al. 2022a, section 4 (Monte Carlo estimate of the optimal variance).
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .distributions import DiagonalGaussian
from .evaluation import Conditioning, Model, check_conditioning, check_data, image_generator, model_output, rows_of
from .forward_process import ForwardProcess, posterior_coefficients
from .optimal_paths import Chebyshev, Transitions, analytic_costs, earlier, fixed_costs, priced, transitions
from .respacing import SquaredErrors, interpolate_log
from .reverse_process import ReverseProcess

RANGE_NODES, GAP_NODES = 24, 48
MIN_IMAGES, FEW_IMAGES = 32, 256  # for the variances of each pixel: refused below, warned of below
_PSEUDO_IMAGES = (*(2.0**k for k in range(-3, 12)), math.inf)
_SEARCH = 3.0  # nats of log variance around the mean squared error in which a decoder's variance is searched
_TINY = 1e-12  # an error of exactly 0 has no logarithm


class StepCosts(NamedTuple):
    """Nats per dimension, of each transition (T, T) and of the decoder at each step (T,); its `decoder_shift` (T,).

    And the decoder's cost where its variance is made from the other half of the images, (T,).
    """

    transitions: Tensor
    decoder: Tensor
    shift: Tensor
    crossfitted_decoder: Tensor


@dataclass(frozen=True, eq=False)
class StepStatistics:
    """Sums over images at N steps of the training chain; make it with `collect_statistics`, add up with `merge`.

    Args:
        knots: chain indices, (N,), ascending.
        images: number of images in each half, (2,).
        squared: sums of the squared error of x_0_hat, (2, N, C, *), float64.
        learned: sums of what a learned variance needs, each averaged over dimensions, (N, .), float64: F and G at the
            nodes for "learned_range"; v, exp(-v) and err^2 exp(-v) for "learned"; nothing otherwise.
        samples: x_0, x_0_hat and v (or nothing) at the kept dimensions of the images, for the decoder, (., M, N).
        dims: which dimensions these are, (M,).
        halves: whose half, (M,).

    Raises:
        ValueError: `merge` of statistics of other steps, or one half is empty where it is asked for.
    """

    knots: Tensor
    images: Tensor
    squared: Tensor
    learned: Tensor
    samples: Tensor
    dims: Tensor
    halves: Tensor

    def merge(self, other: "StepStatistics") -> "StepStatistics":
        """The statistics of both's images.

        Args:
            other: of other images at the same steps.
        """
        if not torch.equal(self.knots, other.knots):
            raise ValueError("`other` has the statistics of other steps: collect both at the same `knots`.")
        return StepStatistics(
            self.knots,
            self.images + other.images,
            self.squared + other.squared,
            self.learned + other.learned,
            torch.cat([self.samples, other.samples], dim=1),
            torch.cat([self.dims, other.dims]),
            torch.cat([self.halves, other.halves]),
        )

    def mse(self, half: int | None = None) -> Tensor:
        """m of each dimension at the knots, (N, C, *).

        Args:
            half: of one half of the images; None for all.
        """
        images = int(self.images.sum() if half is None else self.images[half])
        if images == 0:
            raise ValueError(
                "One half of the images is empty: give `positions` of which some are even and some are odd."
            )
        return ((self.squared.sum(0) if half is None else self.squared[half]) / images).clamp(min=_TINY)

    def curve(self, half: int | None = None) -> Tensor:
        """m over all dimensions at the knots, (N,).

        Args:
            half: of one half of the images; None for all.
        """
        return self.mse(half).flatten(1).mean(1)

    def shrunk(self, pseudo_images: float, half: int | None = None) -> Tensor:
        """m of each dimension, drawn towards that of all, (N, C, *).

        Args:
            pseudo_images: weight of the mean, in images.
            half: of one half of the images; None for all.
        """
        m = self.mse(half)
        images = float(self.images.sum() if half is None else self.images[half])
        weight = 1.0 if pseudo_images == math.inf else pseudo_images / (pseudo_images + images)
        return torch.lerp(m, self.curve(half).reshape(-1, *[1] * (m.ndim - 1)).expand_as(m), weight)

    @functools.cached_property
    def pseudo_images(self) -> float:
        """The weight that prices each half of the images best by the other half's errors, where r m is about 1."""
        gap = (1 / self.curve()).reshape(-1, *[1] * (self.squared.ndim - 2))

        def cost(weight: float) -> float:
            fitted = [self.shrunk(weight, half) for half in (0, 1)]
            return float(sum(priced(gap, fitted[half], self.mse(1 - half)).mean() for half in (0, 1)))

        return min(_PSEUDO_IMAGES, key=cost)

    def errors(self, forward: ForwardProcess, per_pixel: bool = True) -> SquaredErrors:
        """What a checkpoint stores for its optimal variances.

        Args:
            forward: the training chain.
            per_pixel: those of each dimension too.

        Raises:
            ValueError: too few images for the variances of each pixel.
        """
        images = int(self.images.sum())
        if per_pixel and images < MIN_IMAGES:
            raise ValueError(f"The variances of each pixel need at least {MIN_IMAGES} images, but there are {images}.")
        pixels = self.shrunk(self.pseudo_images).float() if per_pixel else None
        return SquaredErrors(forward.timesteps.cpu()[self.knots], self.curve(), pixels)


def spread_knots(forward: ForwardProcess, number: int) -> Tensor:
    """Steps that cover a chain evenly in t and in its log SNR alike, both ends among them; (N,) chain indices.

    Args:
        forward: the chain.
        number: how many, at least 2; fewer where the chain is shorter.

    Raises:
        ValueError: fewer than 2.
    """
    total = len(forward)
    if number < 2:
        raise ValueError(f"`number` must be at least 2, one for each end of the chain, but got {number}.")
    if total <= number:
        return torch.arange(total)
    root = forward.log_alphas_cumprod.cpu()
    log_snr = (root - torch.log(-torch.expm1(root))).clamp(min=-30)
    t = torch.linspace(0, 1, total, dtype=torch.float64)
    measure = t + (log_snr[0] - log_snr) / (log_snr[0] - log_snr[-1])
    wanted = torch.linspace(0, float(measure[-1]), number, dtype=torch.float64)
    return torch.searchsorted(measure, wanted).clamp(max=total - 1).unique()


@torch.no_grad()
def collect_statistics(
    model: Model,
    reverse: ReverseProcess,
    x_0: Tensor,
    knots: Tensor,
    positions: Sequence[int] | None = None,
    seed: int = 0,
    conditioning: Conditioning | None = None,
    decoder_dims: int = 64,
    values_per_call: int = 65536,
    noise: Tensor | None = None,
) -> StepStatistics:
    """The statistics of a batch: one network call for each image and knot.

    Args:
        model: the network, called as model(x_t, timesteps, **conditioning).
        reverse: p of the training chain, with the network's own variance; decides on clipping.
        x_0: images (B, C, *) in [-1, 1] on the levels.
        knots: chain indices to visit, (N,).
        positions: the images' positions in their data, which say their half and, with `seed`, their noise; 0 .. B - 1
            when None.
        seed: of the noise.
        conditioning: further arguments of the network by name, each a tensor of B rows.
        decoder_dims: keep so many dimensions of each image for the decoder, at most all.
        values_per_call: (image, t) pairs are stacked up to this many values for each network call.
        noise: epsilon, (N, B, C, *), in place of drawn noise.

    Raises:
        ValueError: data outside [-1, 1], off its levels or not finite; an output with the wrong channels.
        FloatingPointError: NaN or infinity from the network, with the timestep and the image.
    """
    check_data(x_0, reverse.levels)
    check_conditioning(conditioning, len(x_0))
    places = torch.arange(len(x_0)) if positions is None else torch.as_tensor(positions)
    generators = [image_generator(seed, int(place)) for place in places]
    dims = torch.stack([_some_of(x_0[0].numel(), decoder_dims, generator) for generator in generators])
    device, number = reverse.forward.betas.device, len(knots)
    nodes = _range_nodes(reverse.forward).nodes
    squared = torch.zeros((2, number, *x_0.shape[1:]), dtype=torch.float64)
    learned, samples = [], []
    for part in torch.arange(len(x_0) * number).split(max(1, values_per_call // x_0[0].numel())):
        image, knot = part // number, part % number
        if noise is None:
            epsilon = torch.stack([torch.randn(x_0.shape[1:], generator=generators[i]) for i in image.tolist()])
        else:
            epsilon = noise[knot, image]
        t = knots[knot].to(device)
        diffused = reverse.forward.diffuse(x_0[image].to(device), t, epsilon.to(device, x_0.dtype))
        told = {name: rows.to(device) for name, rows in rows_of(conditioning, image).items()}
        output = model_output(model, diffused.x_t, reverse.forward.timesteps[t], told)
        mean_output, v = reverse.split(output, diffused.x_t)
        _check_finite(output, t, places[image])
        x_0_hat = reverse.predict_x_0(mean_output, diffused.x_t, reverse.coefficients(t, diffused.x_t))
        error = (diffused.x_0 - x_0_hat).double() if device.type != "mps" else diffused.x_0 - x_0_hat
        square = error.square()
        squared.index_put_((places[image] % 2, knot), square.cpu().double(), accumulate=True)
        learned.append(_learned(reverse.variance_type, v, square, nodes))
        kept = [
            value.flatten(1).gather(1, dims[image].to(device))
            for value in (diffused.x_0, x_0_hat, v)
            if value is not None
        ]
        samples.append(torch.stack(kept).float().cpu())
    each = (len(x_0), number)
    rows = torch.cat(learned).unflatten(0, each).sum(0)
    few = torch.cat(samples, dim=1).unflatten(1, each).transpose(2, 3).flatten(1, 2)
    halves = (places % 2)[:, None].expand_as(dims).flatten()
    return StepStatistics(knots, torch.bincount(places % 2, minlength=2), squared, rows, few, dims.flatten(), halves)


def _some_of(total: int, number: int, generator: torch.Generator) -> Tensor:
    """Different numbers below a total, all of them where that is asked for, (min(number, total),)."""
    if number >= total:
        return torch.arange(total)
    return torch.randperm(total, generator=generator)[:number]


def _check_finite(output: Tensor, t: Tensor, places: Tensor) -> None:
    bad = ~output.isfinite().flatten(1).all(1).cpu()
    if bool(bad.any()):
        pair = int(bad.nonzero()[0])
        raise FloatingPointError(
            f"NaN or infinity in the model's output at chain index t={int(t[pair])}, image {int(places[pair])}."
        )


def _range_nodes(forward: ForwardProcess) -> Chebyshev:
    noise = -torch.expm1(forward.log_alphas_cumprod.cpu())
    return Chebyshev.between(0.0, float((noise[-1] / noise[0]).log()), RANGE_NODES)


def _learned(variance_type: str, v: Tensor | None, square: Tensor, nodes: Tensor) -> Tensor:
    """What a learned variance needs of each pair, averaged over dimensions, (P, .), float64 on the CPU."""
    if v is None:
        return torch.zeros(len(square), 0, dtype=torch.float64)
    v = v.to(square.dtype)
    if variance_type == "learned":
        parts = [v, torch.exp(-v), square * torch.exp(-v)]
    else:
        us = [(v + 1) / 2 * float(node) for node in nodes]
        parts = [u + torch.expm1(-u) for u in us] + [square * torch.exp(-u) for u in us]
    return torch.stack([part.flatten(1).mean(1) for part in parts], dim=1).cpu().double()


def _linear(knots: Tensor, values: Tensor, total: int) -> Tensor:
    """Rows at every step of a chain, linear between knots (N, .), (T, .)."""
    at = torch.arange(total)
    upper = torch.searchsorted(knots, at).clamp(max=len(knots) - 1)
    lower = (upper - 1).clamp(min=0)
    gap = (knots[upper] - knots[lower]).clamp(min=1)
    fraction = torch.where(upper > lower, (at - knots[lower]) / gap, 1.0).double().clamp(0, 1)
    return torch.lerp(values[lower], values[upper], fraction.reshape(-1, *[1] * (values.ndim - 1)))


def step_costs(statistics: StepStatistics, reverse: ReverseProcess, variance: str) -> StepCosts:
    """The cost of every transition and decoder with one kind of variance.

    Args:
        statistics: of the network.
        reverse: p of the training chain, as they were made with.
        variance: "network" (what `reverse.variance_type` says), "analytic" or "per_pixel".
    """
    knots, total = statistics.knots, len(reverse.forward)
    pairs, every = transitions(reverse.forward), torch.arange(total)
    curve = interpolate_log(knots, statistics.curve(), every)
    if variance == "analytic":
        table = analytic_costs(pairs, curve)
    elif variance == "per_pixel":
        table = _per_pixel_costs(pairs, statistics, total)
    elif reverse.learns_variance:
        table = _learned_costs(pairs, statistics, reverse)
    else:
        table = fixed_costs(pairs, curve, reverse.variance_type.startswith("fixed_large"))
    shift = _decoder_shift(statistics, reverse, variance)
    decoder, crossfitted = (
        _linear(knots, _decoder_cost(statistics, reverse, base, shift), total)
        for base in (_decoder_base(statistics, reverse, variance, crossfitted=own) for own in (False, True))
    )
    every_shift = _linear(knots, shift, total)
    if variance == "network" and len(knots) > 1:  # the first knot's was not searched
        every_shift[1 : int(knots[1])] = shift[1]
    return StepCosts(table, decoder, every_shift, crossfitted)


def _per_pixel_costs(pairs: Transitions, statistics: StepStatistics, total: int) -> Tensor:
    below = earlier(total)
    log_gap = pairs.snr_gap.clamp(min=1e-300).log()
    inside = log_gap[below] if bool(below.any()) else log_gap
    gaps = Chebyshev.between(float(inside.min()), float(inside.max()), GAP_NODES)
    m, fitted = statistics.mse().flatten(1), statistics.shrunk(statistics.pseudo_images).flatten(1)
    values = torch.stack([priced(gap, fitted, m).mean(1) for gap in gaps.nodes.exp()], dim=1)
    return gaps.rows_at(interpolate_log(statistics.knots, values, torch.arange(total)).log(), log_gap).exp()


def _learned_costs(pairs: Transitions, statistics: StepStatistics, reverse: ReverseProcess) -> Tensor:
    knots, total = statistics.knots, len(reverse.forward)
    means = statistics.learned / statistics.images.sum()
    every = torch.arange(total)
    if reverse.variance_type == "learned":
        v = _linear(knots, means[:, 0], total)[:, None]
        precision, weighted = (interpolate_log(knots, means[:, i], every)[:, None] for i in (1, 2))
        root = reverse.forward.log_alphas_cumprod.cpu()
        small = torch.where(earlier(total), posterior_coefficients(root[:, None], root[None, :]).variance, 1.0)
        return 0.5 * (v - small.log() - 1 + small * (precision + pairs.snr_gap * weighted))
    nodes = _range_nodes(reverse.forward)
    shape = nodes.rows_at(_linear(knots, means[:, :RANGE_NODES], total), pairs.log_range)
    logs = interpolate_log(knots, means[:, RANGE_NODES:].clamp(min=_TINY), every).log()
    return 0.5 * (shape + pairs.snr_gap * nodes.rows_at(logs, pairs.log_range).exp())


def _decoder_base(
    statistics: StepStatistics, reverse: ReverseProcess, variance: str, crossfitted: bool = False
) -> Tensor:
    """The log variances of the samples' decoders before the shift, (M, N).

    Crossfitted, optimal ones are made from the errors of the other half of the images.
    """
    samples, dims = statistics.samples, statistics.dims
    if variance == "network":
        rows = torch.stack([_first_row(reverse, int(t)) for t in statistics.knots])
        base = rows[:, 0].expand(samples.shape[1], -1)
        return (base + rows[:, 1] * samples[2] if len(samples) == 3 else base).float()

    def logs(half: int | None) -> Tensor:
        if variance == "analytic":
            return statistics.curve(half).log().expand(len(dims), -1)
        return statistics.shrunk(statistics.pseudo_images, half).flatten(1).log().T[dims]

    if not crossfitted:
        return logs(None).float()
    return torch.where(statistics.halves[:, None] == 0, logs(1), logs(0)).float()


def _decoder_cost(statistics: StepStatistics, reverse: ReverseProcess, base: Tensor, shift: Tensor) -> Tensor:
    """Nats per dimension of the decoder at each knot, (N,), at a shift (N,) of its log variances."""
    x_0, x_0_hat = statistics.samples[:2]
    p = DiagonalGaussian(x_0_hat, base + shift.to(base))
    log_prob = p.log_prob(x_0) if reverse.levels is None else p.discretized_log_prob(x_0, reverse.levels)
    return -log_prob.double().mean(0)


def _decoder_shift(statistics: StepStatistics, reverse: ReverseProcess, variance: str) -> Tensor:
    """The shift of the decoder's log variance with the lowest cost at each knot, (N,)."""
    x_0, x_0_hat = statistics.samples[:2]
    base = _decoder_base(statistics, reverse, variance)
    seen = (x_0 - x_0_hat).double().square().mean(0).clamp(min=_TINY).log()
    centre = seen - base.double().mean(0)
    shift = _golden_section(
        lambda at: _decoder_cost(statistics, reverse, base, at), centre - _SEARCH, centre + _SEARCH
    )
    if variance == "network" and int(statistics.knots[0]) == 0:
        shift[0] = 0.0  # the training chain's own decoder
    return shift


def _first_row(reverse: ReverseProcess, t: int) -> Tensor:
    """Offset and slope of the training chain's log variance at a step."""
    c = reverse.coefficients(t, torch.empty(0))
    return torch.stack([c.log_variance_offset, c.variance_slope]).cpu()


def _golden_section(cost: Callable[[Tensor], Tensor], low: Tensor, high: Tensor, steps: int = 12) -> Tensor:
    """The minima of N unimodal functions at once, (N,)."""
    ratio = (5**0.5 - 1) / 2
    inner = [high - ratio * (high - low), low + ratio * (high - low)]
    values = [cost(point) for point in inner]
    for _ in range(steps):
        left = values[0] < values[1]
        low, high = torch.where(left, low, inner[0]), torch.where(left, inner[1], high)
        new = torch.where(left, high - ratio * (high - low), low + ratio * (high - low))
        at_new = cost(new)
        inner = [torch.where(left, new, inner[1]), torch.where(left, inner[0], new)]
        values = [torch.where(left, at_new, values[1]), torch.where(left, values[0], at_new)]
    return (low + high) / 2


def crossfitted_cost(
    statistics: StepStatistics, reverse: ReverseProcess, variance: str, path: Sequence[int], costs: StepCosts
) -> float:
    """A path with an optimal variance, priced on the half of the images that it was not made from.

    Nats per dimension, decoder and transitions, without the prior.

    Args:
        statistics: of the network.
        reverse: p of the training chain.
        variance: "analytic" or "per_pixel".
        path: chain indices, ascending.
        costs: of this variance.
    """
    knots, indices = statistics.knots, torch.as_tensor(path)
    total = float(costs.crossfitted_decoder[indices[0]])
    gaps = transitions(reverse.forward.respace(path)).snr_gap.diagonal(-1)
    for half in (0, 1) if len(gaps) else ():
        if variance == "analytic":
            fitted = statistics.curve(half).reshape(-1, *[1] * (statistics.squared.ndim - 2))
        else:
            fitted = statistics.shrunk(statistics.pseudo_images, half)
        rows = (interpolate_log(knots, own, indices[1:]).flatten(1) for own in (statistics.mse(1 - half), fitted))
        m, made = rows
        total += float(priced(gaps[:, None], made, m).mean(1).sum()) / 2
    return total
