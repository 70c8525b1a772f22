r"""What a network's outputs at some steps say of every transition between steps, estimated from images.

One output at (x_t, t) serves all s < t: what a transition costs depends on s only through r = SNR_s - SNR_t and D
(equation 1 of `optimal_paths`). The expectations of a learned variance are kept as functions of D at Chebyshev nodes,
F(D) = E[u + expm1(-u)] and G(D) = E[err^2 exp(-u)] with u = (v + 1)/2 D; those of fixed and optimal variances need m
alone. `transition_costs` prices them.

The images are dealt to two halves, so that an optimal variance can be priced on images that it was not made from. The
errors of each pixel are drawn towards the mean of all, by the weight that prices the other half best: a pixel that
never varied in n images may do so in the next.

A decoder is a mean over dimensions that are independent given x_t. Of each image a few are kept, drawn at random, so
that many images can speak at little memory.

Sources: Watson et al. 2021, section 3; Bao et al. 2022a, section 4 (Monte Carlo estimate of the optimal variance).
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import Conditioning, Model, check_conditioning, check_data, check_model
from .devices import read_later, send
from .evaluation import image_generator, model_output, one_behind, rows_of, values_in_a_call
from .forward_process import Diffused, ForwardProcess
from .optimal_paths import Chebyshev, priced
from .respacing import SquaredErrors
from .reverse_process import ReverseProcess

RANGE_NODES = 24
MIN_IMAGES = 32
"""The fewest images that variances of each pixel are made from."""
FEW_IMAGES = 256
"""Below this number they are rough."""
_PSEUDO_IMAGES = (*(2.0**k for k in range(-3, 12)), math.inf)
TINY = 1e-12  # an error of exactly 0 has no logarithm


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
        return ((self.squared.sum(0) if half is None else self.squared[half]) / images).clamp(min=TINY)

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
    values_per_call: int | None = None,
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
        values_per_call: as in `evaluate_vlb`.
        noise: epsilon, (N, B, C, *), in place of drawn noise.

    Raises:
        ValueError: data outside [-1, 1], off its levels or not finite; a network in training mode; an output with the
            wrong channels.
        FloatingPointError: NaN or infinity from the network, with the timestep and the image.
    """
    check_model(model)
    check_data(x_0, reverse.levels)
    check_conditioning(conditioning, len(x_0))
    places = torch.arange(len(x_0)) if positions is None else torch.as_tensor(positions)
    generators = [image_generator(seed, int(place)) for place in places]
    dims = torch.stack([_some_of(x_0[0].numel(), decoder_dims, generator) for generator in generators])
    device, number = reverse.forward.betas.device, len(knots)
    nodes = range_nodes(reverse.forward).nodes
    pairs = torch.arange(len(x_0) * number)
    parts = pairs.split(max(1, values_in_a_call(values_per_call, device) // x_0[0].numel()))

    def calls() -> Iterator[Callable[[], Tensor]]:
        for part in parts:
            image, knot = part // number, part % number
            if noise is None:
                epsilon = torch.stack([torch.randn(x_0.shape[1:], generator=generators[i]) for i in image.tolist()])
            else:
                epsilon = noise[knot, image]
            t, told = send(knots[knot], device), rows_of(conditioning, image)
            diffused = reverse.forward.diffuse(send(x_0[image], device), t, send(epsilon.to(x_0.dtype), device))
            told = {name: send(rows, device) for name, rows in told.items()}
            output = model_output(model, diffused.x_t, reverse.forward.timesteps[t], told)
            yield read_later(_of_pairs(reverse, output, diffused, send(dims[image], device), nodes))

    squared = torch.zeros((2, number, *x_0.shape[1:]), dtype=torch.float64)
    of_dims = dims.shape[1] * (3 if reverse.learns_variance else 2)
    learned, samples = [], []
    for part, values in zip(parts, one_behind(calls())):
        image, knot = part // number, part % number
        _check_finite(values[:, 0], knots[knot], places[image])
        square, kept, rows = values[:, 1:].double().tensor_split((x_0[0].numel(), x_0[0].numel() + of_dims), dim=1)
        squared.index_put_((places[image] % 2, knot), square.unflatten(1, x_0.shape[1:]), accumulate=True)
        learned.append(rows)
        samples.append(kept)
    each = (len(x_0), number)
    rows = torch.cat(learned).unflatten(0, each).sum(0)
    few = torch.cat(samples).float().unflatten(1, (-1, dims.shape[1])).movedim(1, 0).unflatten(1, each)
    few = few.transpose(2, 3).flatten(1, 2)
    halves = (places % 2)[:, None].expand_as(dims).flatten()
    return StepStatistics(knots, torch.bincount(places % 2, minlength=2), squared, rows, few, dims.flatten(), halves)


def _of_pairs(reverse: ReverseProcess, output: Tensor, diffused: Diffused, dims: Tensor, nodes: Tensor) -> Tensor:
    """What is needed of each pair in one tensor, (P, .): the output's sum, squared errors, values at `dims`."""
    mean_output, v = reverse.split(output, diffused.x_t)
    whole = output.flatten(1).sum(1, keepdim=True, dtype=diffused.x_0.dtype)  # finite where all is
    x_0_hat = reverse.predict_x_0(mean_output, diffused.x_t, reverse.coefficients(diffused.t, diffused.x_t))
    square = (diffused.x_0 - x_0_hat).square()
    kept = [own.flatten(1).gather(1, dims) for own in (diffused.x_0, x_0_hat, v) if own is not None]
    parts = [whole.to(square.dtype), square.flatten(1), *kept, _learned(reverse.variance_type, v, square, nodes)]
    return torch.cat(parts, dim=1)


def _some_of(total: int, number: int, generator: torch.Generator) -> Tensor:
    """Different numbers below a total, all of them where that is asked for, (min(number, total),)."""
    if number >= total:
        return torch.arange(total)
    return torch.randperm(total, generator=generator)[:number]


def _check_finite(whole: Tensor, t: Tensor, places: Tensor) -> None:
    bad = ~whole.isfinite()
    if bool(bad.any()):
        pair = int(bad.nonzero()[0])
        raise FloatingPointError(
            f"NaN or infinity in the model's output at chain index t={int(t[pair])}, image {int(places[pair])}."
        )


def range_nodes(forward: ForwardProcess) -> Chebyshev:
    """Where the expectations of a learned variance are kept, as functions of D.

    Args:
        forward: the training chain.
    """
    noise = -torch.expm1(forward.log_alphas_cumprod.cpu())
    return Chebyshev.between(0.0, float((noise[-1] / noise[0]).log()), RANGE_NODES)


def _learned(variance_type: str, v: Tensor | None, square: Tensor, nodes: Tensor) -> Tensor:
    """What a learned variance needs of each pair, averaged over dimensions, (P, .)."""
    if v is None:
        return square.new_zeros(len(square), 0)
    if variance_type == "learned":
        parts = [v, torch.exp(-v), square * torch.exp(-v)]
    else:
        us = [(v + 1) / 2 * float(node) for node in nodes]
        parts = [u + torch.expm1(-u) for u in us] + [square * torch.exp(-u) for u in us]
    return torch.stack([part.flatten(1).mean(1) for part in parts], dim=1)
