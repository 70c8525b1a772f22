r"""Bits/dim: the whole bound of a batch, and an unbiased estimate for a data set, with standard errors.

1. exact in t: L_T + sum_t L_t with one noise draw for each step (T network calls for each image)
2. importance estimate: for each image R replicates of M steps drawn systematically from p_t; a replicate is
   L_T + mean_m L_{t_m} / p_{t_m}. t = 0 is drawn like any other step.
3. noise standard error: from the spread between the replicates of an image. Image standard error: from the spread
   between images, less the part that noise explains. The two are independent; their squares add.

Every image draws from a generator seeded by (seed, its position), so its value does not depend on the batch size.

Sources: Ho et al. 2020, eq. 5; Nichol & Dhariwal 2021, section 3.3; Owen 2013, "Monte Carlo theory", chapter 9.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .losses import nats_to_bits_per_dim, prior_kl, vlb_term
from .reverse_process import ReverseProcess
from .timestep_samplers import ImportanceTimesteps

Model = Callable[[Tensor, Tensor], Any]
"""The network: called with (x_t, timesteps); returns a tensor, or an object with the tensor in `.sample`."""


class VLBTerms(NamedTuple):
    """The bound of each image: prior L_T (B,) and terms by chain index (B, T) in nats, their sum bits_per_dim (B,)."""

    prior: Tensor
    terms: Tensor
    bits_per_dim: Tensor


@dataclass(frozen=True, eq=False)
class VLBEstimate:
    """An estimate of the bound over a data set, in bits/dim (of density, where the decoder is continuous).

    Args:
        bits_per_dim: the estimate, the mean over images.
        noise_se: its standard error from the draws of t and noise.
        image_se: its standard error from the choice of images.
        prior: the part of L_T.
        kl: the part of the L_t, t > 0.
        decoder: the part of L_0.
        per_image: each image's estimate, in the order of the data, (N,).
        network_calls_per_image: R x M.
        term_mean: mean L_t at each chain index, NaN where none was drawn, (T,).
        term_se: its standard error from t, noise and images, NaN where fewer than two images were drawn, (T,).
    """

    bits_per_dim: float
    noise_se: float
    image_se: float
    prior: float
    kl: float
    decoder: float
    per_image: Tensor = field(repr=False)
    network_calls_per_image: int
    term_mean: Tensor = field(repr=False)
    term_se: Tensor = field(repr=False)

    @property
    def num_images(self) -> int:
        """Number of images scored."""
        return len(self.per_image)


def check_data(x_0: Tensor, levels: int | None) -> None:
    """Refuse data that the decoder would score wrongly. Nothing is rounded or clipped into place.

    Args:
        x_0: data (B, C, *).
        levels: number of levels on [-1, 1]; None for continuous data, of which only finite values are asked.

    Raises:
        ValueError: no images, values that are NaN, infinite or outside [-1, 1], or off the levels by over 1e-5 of the
            range.
    """
    if not x_0.is_floating_point():
        raise ValueError(f"`x_0` must be a floating point tensor scaled to [-1, 1], but got {x_0.dtype}.")
    if x_0.numel() == 0:
        raise ValueError(f"`x_0` holds no images: its shape is {tuple(x_0.shape)}.")
    if not bool(x_0.isfinite().all()):
        raise ValueError("`x_0` holds NaN or infinite values.")
    if levels is None:
        return
    tolerance = 2e-5
    low, high = float(x_0.min()), float(x_0.max())
    if low < -1 - tolerance or high > 1 + tolerance:
        raise ValueError(
            f"`x_0` must lie in [-1, 1], but reaches from {low:.6g} to {high:.6g}. Scale it: "
            f"`x_0 = image * 2 / {levels - 1} - 1` for integer levels 0 .. {levels - 1}."
        )
    k = (x_0.double() + 1) * ((levels - 1) / 2)
    off = float((k - k.round()).abs().max()) * 2 / (levels - 1)
    if off > tolerance:
        raise ValueError(
            f"`x_0` must lie on the {levels} levels -1 + 2 k / {levels - 1}, but a value is {off:.3g} away from the "
            f"nearest. Was it resized, augmented or normalised after it was quantised? Quantise it again, or set "
            "`levels` to what the data has (None for continuous data)."
        )


def model_output(model: Model, x_t: Tensor, timesteps: Tensor) -> Tensor:
    """Call the network and take the tensor out of what it returns.

    Args:
        model: the network.
        x_t: its input (B, C, *).
        timesteps: what it is told, (B,): `forward.timesteps[t]`.
    """
    output = model(x_t, timesteps)
    return output if isinstance(output, Tensor) else output.sample


@torch.no_grad()
def _terms(model: Model, reverse: ReverseProcess, x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Terms of the bound in nats for a stream of (image, t) pairs, after a check that the network kept its senses."""
    diffused = reverse.forward.diffuse(x_0, t, noise)
    output = model_output(model, diffused.x_t, reverse.forward.timesteps[t])
    terms = vlb_term(reverse, output, diffused)
    if not bool(terms.isfinite().all()):
        step = int(t[~terms.isfinite()][0])
        cause = "the model's output" if not bool(output.isfinite().all()) else "the term of the bound"
        raise FloatingPointError(
            f"NaN or infinity in {cause} at chain index t={step} (timestep {int(reverse.forward.timesteps[step])})."
        )
    return terms


def _chunk_size(x_0: Tensor, values_per_call: int) -> int:
    return max(1, values_per_call // x_0[0].numel())


def evaluate_vlb(
    model: Model,
    reverse: ReverseProcess,
    x_0: Tensor,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    values_per_call: int = 65536,
) -> VLBTerms:
    """The whole bound of a batch, every term computed once: T network calls for each image.

    Args:
        model: the network, called as model(x_t, timesteps); returns a tensor or an object with `.sample`.
        reverse: p; decides on clipping and the decoder.
        x_0: data (B, C, *) in [-1, 1] on its levels, on the device of the network and of `reverse`.
        noise: epsilon for each chain index, (T, B, C, *); drawn when None.
        generator: source of the noise when it is drawn.
        values_per_call: (image, t) pairs are stacked up to this many values for each network call.

    Raises:
        ValueError: data outside [-1, 1], off its levels or not finite; an output with the wrong channels.
        FloatingPointError: NaN or infinity from the network, with the timestep.

    Source: Ho et al. 2020, eq. 5.
    """
    check_data(x_0, reverse.levels)
    steps, batch = len(reverse.forward), len(x_0)
    chunk = _chunk_size(x_0, values_per_call)
    columns = []
    for start in range(0, steps * batch, chunk):
        pair = torch.arange(start, min(start + chunk, steps * batch), device=x_0.device)
        t, image = pair // batch, pair % batch
        if noise is None:
            source = generator.device if generator is not None else x_0.device
            epsilon = torch.randn((len(pair), *x_0.shape[1:]), generator=generator, device=source, dtype=x_0.dtype)
        else:
            epsilon = noise[t.to(noise.device), image.to(noise.device)]
        columns.append(_terms(model, reverse, x_0[image], t, epsilon.to(x_0.device)))
    terms = torch.cat(columns).reshape(steps, batch).T
    prior = prior_kl(reverse, x_0)
    return VLBTerms(prior, terms, nats_to_bits_per_dim(prior + terms.sum(1), x_0[0].numel()))


def _image_generator(seed: int, position: int) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/{position}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def pilot_probabilities(
    model: Model,
    reverse: ReverseProcess,
    x_0: Tensor,
    num_calls: int = 1024,
    seed: int = 0,
    uniform_fraction: float = 0.05,
    values_per_call: int = 65536,
) -> Tensor:
    """Probabilities p_t for the importance estimate from a small run on *other* images (the training set's).

    p_t is proportional to the root mean square of L_t at some 64 steps, interpolated between them. Any p_t gives an
    unbiased estimate; a good one gives a precise one.

    Args:
        model: the network, as in `evaluate_vlb`.
        reverse: p.
        x_0: pilot images (B, C, *), not those to be scored.
        num_calls: network calls to spend, at least 1; every step probed takes one or more.
        seed: of the pilot's noise.
        uniform_fraction: share of p_t that is uniform, in (0, 1].
        values_per_call: as in `evaluate_vlb`.

    Raises:
        ValueError: an impossible number, or as `evaluate_vlb`.
        FloatingPointError: as `evaluate_vlb`.
    """
    check_data(x_0, reverse.levels)
    if not 0 < uniform_fraction <= 1:
        raise ValueError(f"`uniform_fraction` must lie in (0, 1], but got {uniform_fraction!r}.")
    if num_calls < 1:
        raise ValueError(f"`num_calls` must be at least 1, but got {num_calls!r}.")
    steps = len(reverse.forward)
    knots = torch.cat([torch.zeros(1), torch.logspace(0, math.log10(max(steps - 1, 1)), 63)]).round().long().unique()
    knots = knots[knots < steps]
    each = max(1, num_calls // len(knots))
    generator = _image_generator(seed, -1)
    t = knots.repeat_interleave(each)
    image = torch.arange(len(t)) % len(x_0)
    values = []
    for part in torch.arange(len(t)).split(_chunk_size(x_0, values_per_call)):
        epsilon = torch.randn((len(part), *x_0.shape[1:]), generator=generator)
        inputs = (x_0[image[part].to(x_0.device)], t[part].to(x_0.device), epsilon.to(x_0))
        values.append(_terms(model, reverse, *inputs).double().cpu())
    root = torch.cat(values).reshape(len(knots), each).square().mean(1).sqrt().clamp(min=1e-12).log()
    # Linear in log L against log(t + 1), in which the curve is close to straight.
    position, grid = (knots + 1.0).log().double(), (torch.arange(steps) + 1.0).log().double()
    right = torch.searchsorted(position, grid).clamp(1, max(len(knots) - 1, 1)).clamp(max=len(knots) - 1)
    left = (right - 1).clamp(min=0)
    span = (position[right] - position[left]).clamp(min=1e-12)
    rms = torch.lerp(root[left], root[right], ((grid - position[left]) / span).clamp(0, 1)).exp()
    return (1 - uniform_fraction) * rms / rms.sum() + uniform_fraction / steps


def estimate_vlb(
    model: Model,
    reverse: ReverseProcess,
    batches: Iterable[Tensor],
    probabilities: Tensor | None = None,
    calls_per_image: int = 64,
    num_replicates: int = 4,
    seed: int = 0,
    device: torch.device | str | None = None,
    values_per_call: int = 65536,
    on_images: Callable[[int], object] | None = None,
) -> VLBEstimate:
    """Unbiased estimate of the bound over a data set, in bits/dim, with standard errors.

    Args:
        model: the network, called as model(x_t, timesteps); returns a tensor or an object with `.sample`.
        reverse: p; decides on clipping and the decoder.
        batches: batches of x_0 (B, C, *) in [-1, 1] on its levels; each image exactly once.
        probabilities: p_t, (T,), from `pilot_probabilities`; None draws t evenly, which is unbiased but far noisier.
        calls_per_image: K = R x M network calls for each image, a multiple of `num_replicates`.
        num_replicates: R, at least 2: the spread between replicates gives the noise standard error.
        seed: with an image's position it determines its draws.
        device: where to score; the device of `reverse` when None.
        values_per_call: (image, t) pairs are stacked up to this many values for each network call.
        on_images: called with the number of images just scored, for a progress bar.

    Raises:
        ValueError: no images, or one bare tensor; data outside [-1, 1], off its levels or not finite; impossible
            numbers.
        FloatingPointError: NaN or infinity from the network, with the timestep.

    Source: the module's list.
    """
    if num_replicates < 2 or calls_per_image < num_replicates or calls_per_image % num_replicates:
        raise ValueError(
            "`num_replicates` must be at least 2 and `calls_per_image` a multiple of it, but got "
            f"{num_replicates!r} and {calls_per_image!r}."
        )
    if isinstance(batches, Tensor):
        raise ValueError("`batches` must be batches of images, not one tensor: pass `[x_0]`, or `x_0.split(64)`.")
    steps = len(reverse.forward)
    sampler = ImportanceTimesteps(torch.ones(steps) if probabilities is None else probabilities)
    if sampler.num_timesteps != steps:
        raise ValueError(f"`probabilities` must have {steps} entries, one for each step, not {sampler.num_timesteps}.")
    device = device if device is not None else reverse.forward.betas.device
    draws = calls_per_image // num_replicates
    rows: list[Tensor] = []  # for each image: replicates of the KL part, of the decoder part, and the prior
    curve = torch.zeros(6, steps, dtype=torch.float64)
    position, dims = 0, 0
    for x_0 in _groups(batches, reverse.levels, values_per_call):
        dims = x_0[0].numel()
        t, generators = _draw(sampler, x_0, num_replicates, draws, seed, position)
        terms = _stream(model, reverse, x_0, t, generators, device, values_per_call)
        prior = prior_kl(reverse, x_0.to(device)).double().cpu()
        weighted = terms / sampler.probabilities[t] / draws
        first = (t == 0).double()
        replicates = (weighted * (1 - first)).sum(2), (weighted * first).sum(2)
        rows.append(torch.cat([replicates[0], replicates[1], prior[:, None]], dim=1))
        curve += _curve_sums(t.flatten(1), terms.flatten(1), steps)
        position += len(x_0)
        if on_images is not None:
            on_images(len(x_0))
    if not rows:
        raise ValueError("`batches` holds no images: there is nothing to score.")
    unit = 1 / (dims * math.log(2))
    return _summary(torch.cat(rows) * unit, curve, unit, num_replicates, calls_per_image)


def _groups(batches: Iterable[Tensor], levels: int | None, values_per_call: int) -> Iterator[Tensor]:
    """The checked images in groups of which one network call could take all."""
    for batch in batches:
        check_data(batch, levels)
        yield from batch.split(_chunk_size(batch, values_per_call))


def _draw(
    sampler: ImportanceTimesteps, x_0: Tensor, replicates: int, draws: int, seed: int, position: int
) -> tuple[Tensor, list[torch.Generator]]:
    """Chain indices (B, R, M), and each image's generator to draw its noise from."""
    generators = [_image_generator(seed, position + i) for i in range(len(x_0))]
    t = [torch.stack([sampler.sample(draws, generator=g)[0] for _ in range(replicates)]) for g in generators]
    return torch.stack(t), generators


def _stream(
    model: Model,
    reverse: ReverseProcess,
    x_0: Tensor,
    t: Tensor,
    generators: list[torch.Generator],
    device: torch.device | str,
    values_per_call: int,
) -> Tensor:
    """Terms (B, R, M) in nats, float64, of all (image, t) pairs, chunked by size whatever the image they belong to."""
    flat, each = t.flatten(), t[0].numel()
    terms = []
    for part in torch.arange(len(flat)).split(_chunk_size(x_0, values_per_call)):
        image = part // each
        # One draw for each pair: a larger torch.randn is not the smaller ones in a row, so chunks would matter.
        noise = torch.stack([torch.randn(x_0.shape[1:], generator=generators[i]) for i in image.tolist()])
        inputs = (x_0[image].to(device), flat[part].to(device), noise.to(x_0.dtype).to(device))
        terms.append(_terms(model, reverse, *inputs).double().cpu())
    return torch.cat(terms).reshape(t.shape)


def _curve_sums(t: Tensor, terms: Tensor, steps: int) -> Tensor:
    """Sums over images of C, S, C^2, C S, S^2 and [C > 0] at each step, C draws of an image there with the sum S."""
    count = torch.zeros(len(t), steps, dtype=torch.float64).scatter_add_(1, t, torch.ones_like(terms))
    total = torch.zeros(len(t), steps, dtype=torch.float64).scatter_add_(1, t, terms)
    each = (count, total, count.square(), count * total, total.square(), (count > 0).double())
    return torch.stack([values.sum(0) for values in each])


def _curve(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Mean L_t and its standard error; the draws of one image share x_0, so images are the independent units."""
    count, total, count_2, cross, total_2, images = sums
    mean = total / count
    residual = (total_2 - 2 * mean * cross + mean.square() * count_2).clamp(min=0)  # sum of (S - mean C)^2
    return mean, torch.where(images > 1, (residual * images / (images - 1)).sqrt() / count, torch.nan)


def _summary(rows: Tensor, curve: Tensor, unit: float, replicates: int, calls: int) -> VLBEstimate:
    """Means and standard errors from per-image replicates (N, 2 R + 1), in bits/dim."""
    kl, decoder, prior = rows[:, :replicates], rows[:, replicates:-1], rows[:, -1]
    totals = kl + decoder + prior[:, None]
    per_image, images = totals.mean(1), len(rows)
    noise_variance = totals.var(1).mean() / replicates  # of one image's estimate
    spread = per_image.var() - noise_variance if images > 1 else torch.tensor(float("nan"))
    term_mean, term_se = _curve(curve)
    return VLBEstimate(
        bits_per_dim=float(per_image.mean()),
        noise_se=float((noise_variance / images).sqrt()),
        image_se=float((spread.clamp(min=0) / images).sqrt()),
        prior=float(prior.mean()),
        kl=float(kl.mean()),
        decoder=float(decoder.mean()),
        per_image=per_image,
        network_calls_per_image=calls,
        term_mean=term_mean * unit,
        term_se=term_se * unit,
    )
