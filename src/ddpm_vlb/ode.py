r"""The likelihood of the probability-flow ODE, which carries data to noise and back without drawing any.

With x_t = cos(phi) x_0 + sin(phi) epsilon, tan(phi) = sqrt(1 - abar) / sqrt(abar), u = log tan(phi), and x_0_hat from
the network's mean output o, never clipped:

1. dx/du = cos(phi) (cos(phi) x - x_0_hat) = A x + B o :  epsilon: A = -sin^2, B = sin;  v_prediction: A = 0,
   B = sin cos;  sample: A = cos^2, B = -cos
2. log p(x_1) = log N(x_T; 0, I) + integral from u_1 to u_T of div(dx/du) du
3. div(dx/du) = D A + B E[z . (do/dx) z], the signs z = +-1 drawn afresh at every stage
4. -log P(x_0) <= E_q(x_1 | x_0) [log q(x_1 | x_0) - log p(x_1) - log p(x_0 | x_1)]

The classical fourth-order Runge-Kutta method takes the chain's levels in pairs: the ends of its steps and their
middles, so that the chain must be even in u. Too few levels give an invalid number: no bound holds for an integral
that is wrong. The tighter, importance-weighted bound of several draws of x_1 is not to be had from this: the noise of
equation 3 makes exp(log p) too large on average.

Sources: Song et al. 2021 (score SDE), section 4.3 and appendix D; Grathwohl et al. 2019 (FFJORD), section 3.1;
Hutchinson 1990; Salimans & Ho 2022, appendix D (phi).
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import Batch, Conditioning, Model, check_conditioning, check_model, check_values, checked_batches
from .devices import read_later, send
from .distributions import LOG_2PI, promote_half
from .evaluation import image_generator, model_output, one_behind, rows_of, values_in_a_call
from .forward_process import Diffused
from .losses import nats_to_bits_per_dim, vlb_term
from .reverse_process import ReverseProcess
from .scores import standard_errors

_EVEN = 1e-6  # of the levels' distance


class _Levels(NamedTuple):
    """The distance of neighbours in u, and A and B of equation 1 at each level, (T,); float64 on the CPU."""

    distance: float
    of_x: Tensor
    of_output: Tensor

    @property
    def stages(self) -> list[int]:
        """The chain index of each network call: four a step."""
        return [t for first in range(0, len(self.of_x) - 1, 2) for t in (first, first + 1, first + 1, first + 2)]

    @property
    def weights(self) -> Tensor:
        """What each stage's derivative weighs in an integral over u."""
        return torch.tensor([1.0, 2.0, 2.0, 1.0]).double().repeat(len(self.of_x) // 2) * (self.distance / 3)


class _Walk(NamedTuple):
    """What S stages leave: x_T, the network's first output, the outputs' sums (S, B) and z . (do/dx) z (S, Z, B)."""

    x_T: Tensor
    first: Tensor
    sums: Tensor
    traces: Tensor


def ode_log_prob(
    model: Model,
    reverse: ReverseProcess,
    x_1: Tensor,
    generator: torch.Generator | None = None,
    probes: int | None = 2,
    conditioning: Conditioning | None = None,
) -> Tensor:
    """Log density of the chain's first noised variable under the ODE, by 2 (T - 1) network calls.

    Args:
        model: the network, called as model(x_t, timesteps, **conditioning); returns a tensor or an object with
            `.sample`, differentiable in x_t. No gradient reaches its parameters.
        reverse: p, of an odd number of steps that are even in log tan(phi); what its output means and its chain are
            all that counts, not its clipping nor its variance.
        x_1: noised data (B, C, *) at chain index 0; it goes where `reverse` lives.
        generator: source of the signs; the default generator when None.
        probes: number of independent estimates of the divergence, each one more backward pass through every call;
            None computes it exactly, by as many as x_1 has dimensions.
        conditioning: further arguments of the network by name, each a tensor of B rows (`class_labels`).

    Returns:
        nats, (probes, B), or (1, B) where the divergence is exact: float64 on the CPU.

    Raises:
        ValueError: a chain of an even number of steps, uneven in log tan(phi) or with an infinite one; `probes` below
            1; no images, or values that are not finite; a network in training mode, of the wrong channels, or that
            gives no gradient.
        FloatingPointError: NaN or infinity from the network, with the timestep and the image.

    Source: equations 2 and 3.
    """
    check_model(model)
    check_values("x_1", x_1)
    check_conditioning(conditioning, len(x_1))
    _check_probes(probes)
    source = x_1.device if generator is None else generator.device
    draw = None if probes is None else lambda: _bits((probes, *x_1.shape), generator, source)
    told = {name: send(rows, reverse.forward.betas.device) for name, rows in (conditioning or {}).items()}
    x_1 = send(x_1.detach(), reverse.forward.betas.device)
    return _launch(model, reverse, x_1, draw, told, range(len(x_1)))()


@dataclass(frozen=True, eq=False)
class ODEEstimate:
    """The likelihood of the ODE over a data set, in bits/dim (of density, where the decoder is continuous).

    The squares of the two errors add. An image has one draw of x_1, which cannot be told from the choice of images.

    Args:
        bits_per_dim: the estimate, the mean over images.
        probe_se: its standard error from the signs of the divergence alone, these images and their x_1 being given: 0
            where the divergence is exact, NaN for one probe, whose noise is then in `image_se`.
        image_se: its standard error from the choice of images and the draw of their x_1, NaN for one image; 0 where
            the signs explain all of the images' spread.
        per_image: each image's estimate, in the order of the data, (N,).
        network_calls_per_image: calls that each image's estimate took, each with as many backward passes as probes.
    """

    bits_per_dim: float
    probe_se: float
    image_se: float
    per_image: Tensor = field(repr=False)
    network_calls_per_image: int

    def __str__(self) -> str:
        return (
            f"{self.bits_per_dim:.3f} +- {self.probe_se:.3f} (probes) +- {self.image_se:.3f} (images) bits/dim, "
            f"{len(self.per_image)} images"
        )


def estimate_ode(
    model: Model,
    reverse: ReverseProcess,
    batches: Iterable[Batch],
    probes: int | None = 2,
    seed: int = 0,
    values_per_call: int | None = None,
) -> ODEEstimate:
    """The bound of a data set with the ODE's density in the place of L_T and all L_t but the decoder's.

    Args:
        model: as in `ode_log_prob`.
        reverse: p, on the device to score on; decides on the chain and the decoder, which may clip: the ODE does not.
        batches: batches of x_0 (B, C, *) in [-1, 1] on its levels, each image exactly once; or pairs of such a batch
            and a dict of the network's further arguments, `(x_0, {"class_labels": labels})`.
        probes: as in `ode_log_prob`; at least 2 for a `probe_se`.
        seed: with an image's position it determines its draws.
        values_per_call: images are stacked up to this many values for each network call; None takes 2^14 on the CPU
            and 2^18 elsewhere.

    Raises:
        ValueError: no images, or one bare tensor; data outside [-1, 1] or off its levels; as `ode_log_prob`.
        FloatingPointError: NaN or infinity from the network, with the timestep and the image.

    Source: equation 4.
    """
    check_model(model)
    _check_probes(probes)
    steps, device = len(reverse.forward), reverse.forward.betas.device
    # A quarter of what a call without gradients takes: its activations are kept for the divergence.
    size = values_in_a_call(None, device) // 4 if values_per_call is None else values_per_call

    def launched() -> Iterator[Callable[[], Tensor]]:
        position = 0
        for x_0, conditioning in checked_batches(batches, reverse.levels):
            for index in torch.arange(len(x_0)).split(max(1, size // x_0[0].numel())):
                told = rows_of(conditioning, index)
                positions = range(position, position := position + len(index))
                yield _launch_bits(model, reverse, x_0[index.to(x_0.device)], positions, seed, probes, told)

    values = list(one_behind(launched()))
    if not values:
        raise ValueError("`batches` holds no images: there is nothing to score.")
    bits = torch.cat(values, dim=1)
    per_image, several = bits.mean(0), len(bits) > 1
    probe_se, image_se = standard_errors(
        per_image, bits.var(0) / len(bits) if several else torch.zeros_like(per_image)
    )
    return ODEEstimate(
        bits_per_dim=float(per_image.mean()),
        probe_se=probe_se if several or probes is None else math.nan,
        image_se=image_se,
        per_image=per_image,
        network_calls_per_image=2 * (steps - 1),
    )


def _check_probes(probes: int | None) -> None:
    if probes is not None and (type(probes) is not int or probes < 1):
        raise ValueError(
            f"`probes` must be an integer of at least 1, or None for the exact divergence, but got {probes!r}."
        )


def _bits(shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device | str = "cpu") -> Tensor:
    """Signs as 0 and 1, a byte each on their way to the device."""
    return torch.randint(0, 2, shape, generator=generator, device=device, dtype=torch.int8)


def _launch_bits(
    model: Model,
    reverse: ReverseProcess,
    x_0: Tensor,
    positions: range,
    seed: int,
    probes: int | None,
    conditioning: dict[str, Tensor],
) -> Callable[[], Tensor]:
    """Begin to compute equation 4, one draw of x_1 for each image; what waits for it is in bits/dim, (probes, B)."""
    forward, device, dims = reverse.forward, reverse.forward.betas.device, x_0[0].numel()
    generators = [image_generator(seed, position) for position in positions]
    noise = torch.stack([torch.randn(x_0.shape[1:], generator=g) for g in generators]).to(x_0.dtype)
    log_variance = math.log(-math.expm1(float(forward.log_alphas_cumprod[0])))
    log_q = -0.5 * (noise.double().square().flatten(1).sum(1) + dims * (LOG_2PI + log_variance))
    each = None if probes is None else (probes, *x_0.shape[1:])
    draw = None if each is None else lambda: torch.stack([_bits(each, g) for g in generators], dim=1)
    first = torch.zeros(len(x_0), dtype=torch.int64)
    diffused = forward.diffuse(*(send(own, device) for own in (x_0.detach(), first, noise)))
    told = {name: send(rows, device) for name, rows in conditioning.items()}
    read = _launch(model, reverse, diffused.x_t, draw, told, positions, diffused)
    return lambda: nats_to_bits_per_dim(log_q - read(), dims)


def _launch(
    model: Model,
    reverse: ReverseProcess,
    x_1: Tensor,
    draw: Callable[[], Tensor] | None,
    conditioning: dict[str, Tensor],
    images: range,
    decoded: Diffused | None = None,
) -> Callable[[], Tensor]:
    """Begin to compute log p(x_1), and where the data is given log p(x_1) + log p(x_0 | x_1); as `launch_terms`.

    `draw` makes the signs of a stage, (probes, B, C, *) of 0 and 1; without it the divergence is exact.
    """
    levels, dims, batch = _levels(reverse), x_1[0].numel(), len(x_1)
    walk = _walk(model, reverse, levels, x_1, draw, conditioning)
    ends = -0.5 * walk.x_T.square().flatten(1).sum(1)
    if decoded is not None:
        ends = ends - vlb_term(reverse, walk.first, decoded)
    come = read_later(torch.cat([ends[None], walk.sums, walk.traces.flatten(0, 1)]))

    def read() -> Tensor:
        stages = len(levels.stages)
        ends, sums, traces = come().double().tensor_split([1, 1 + stages])
        traces = traces.reshape(stages, -1, batch)
        _check_finite(reverse, levels, sums, traces, images)
        if draw is None:
            traces = traces.sum(1, keepdim=True)
        of_x, of_output = (table[levels.stages, None, None] for table in (levels.of_x, levels.of_output))
        divergence = dims * of_x + of_output * traces
        log_prob = ends - 0.5 * dims * LOG_2PI + torch.tensordot(levels.weights, divergence, 1)
        if not bool(log_prob.isfinite().all()):
            image = images[int((~log_prob.isfinite()).nonzero()[0, 1])]
            raise FloatingPointError(f"NaN or infinity in the log density, image {image}.")
        return log_prob

    return read


def _walk(
    model: Model,
    reverse: ReverseProcess,
    levels: _Levels,
    x: Tensor,
    draw: Callable[[], Tensor] | None,
    conditioning: dict[str, Tensor],
) -> _Walk:
    """The Runge-Kutta steps from x_1 to x_T. Nothing waits for the device."""
    outputs: list[Tensor] = []
    sums, traces = [], []
    of_x, of_output, half = levels.of_x.tolist(), levels.of_output.tolist(), levels.distance

    def slope(t: int, x: Tensor) -> Tensor:
        """dx/du at a stage, noting what the divergence needs."""
        x = x.detach().requires_grad_()
        output = model_output(model, x, reverse.forward.timesteps[t].repeat(len(x)), conditioning)
        mean_output, _ = reverse.split(output, x)
        vectors = _unit_vectors(mean_output) if draw is None else 2 * send(draw(), x.device).to(mean_output.dtype) - 1
        traces.append(_traces(mean_output, x, vectors))
        sums.append(output.detach().flatten(1).sum(1, dtype=x.dtype))
        if not outputs:
            outputs.append(output.detach())
        return of_x[t] * x.detach() + of_output[t] * mean_output.detach()

    with torch.inference_mode(False), torch.enable_grad():
        x = promote_half(x).clone()  # a tensor of inference mode has no gradients
        conditioning = {name: rows.clone() for name, rows in conditioning.items()}
        for t in range(0, len(of_x) - 1, 2):
            at_start = slope(t, x)
            at_middle = slope(t + 1, x + half * at_start)
            again = slope(t + 1, x + half * at_middle)
            at_end = slope(t + 2, x + 2 * half * again)
            x = x + (half / 3) * (at_start + 2 * (at_middle + again) + at_end)
    return _Walk(x, outputs[0], torch.stack(sums), torch.stack(traces))


def _traces(output: Tensor, x: Tensor, vectors: Tensor) -> Tensor:
    """z . (d output / dx) z of each image for each of the vectors z (Z, B, C, *), (Z, B)."""
    traces = []
    for i, z in enumerate(vectors):
        gradient = None
        if output.requires_grad:
            more = i < len(vectors) - 1
            (gradient,) = torch.autograd.grad(output, x, z, retain_graph=more, allow_unused=True)
        if gradient is None:
            raise ValueError(
                "`model` must be differentiable in `x_t`, as the ODE needs the divergence, but its output carries no "
                "gradient. Call the network itself, without `torch.no_grad` or `detach` around it."
            )
        traces.append((gradient * z).flatten(1).sum(1))
    return torch.stack(traces)


def _unit_vectors(like: Tensor) -> Tensor:
    """Each dimension's unit vector for every image of (B, C, *), (D, B, C, *)."""
    each = torch.eye(like[0].numel(), dtype=like.dtype, device=like.device)
    return each.reshape(-1, 1, *like.shape[1:]).expand(-1, *like.shape)


def _levels(reverse: ReverseProcess) -> _Levels:
    """The chain's levels, looked at: an odd number, even in u, and finite."""
    root = reverse.forward.log_alphas_cumprod
    cos2, sin2 = root.exp(), -torch.expm1(root)
    u = 0.5 * (sin2.log() - root)
    fix = "Make such a chain with `GaussianPath` and `spaced_ratios`."
    if not bool(u.isfinite().all()):
        raise ValueError(
            "`reverse` must end in a chain index with some signal left, but its last one is noise alone "
            f"(alphas_cumprod = 0, sigma = 1), where the ODE has no finite log ratio. {fix}"
        )
    if len(u) < 3 or len(u) % 2 == 0:
        raise ValueError(f"`reverse` must have an odd number of steps, at least 3, but has {len(u)}. {fix}")
    distances = u.diff()
    distance, off = float(distances.mean()), float((distances / distances.mean() - 1).abs().max())
    if off > _EVEN:
        raise ValueError(
            "`reverse` must have levels that are even in log(sqrt(1 - alphas_cumprod) / sqrt(alphas_cumprod)), but "
            f"their distances differ from the mean by up to {off:.2g} of it. {fix}"
        )
    of_x, of_output = {
        "epsilon": (-sin2, sin2.sqrt()),
        "sample": (cos2, -cos2.sqrt()),
        "v_prediction": (torch.zeros_like(u), (sin2 * cos2).sqrt()),
    }[reverse.prediction_type]
    return _Levels(distance, of_x, of_output)


def _check_finite(reverse: ReverseProcess, levels: _Levels, sums: Tensor, traces: Tensor, images: range) -> None:
    bad = ~torch.cat([sums[:, None], traces], dim=1).isfinite()
    if bool(bad.any()):
        stage, row, image = bad.nonzero()[0].tolist()
        step, cause = levels.stages[stage], "the model's output" if row == 0 else "the divergence"
        raise FloatingPointError(
            f"NaN or infinity in {cause} at chain index t={step} (timestep {int(reverse.forward.timesteps[step])}), "
            f"image {images[image]}."
        )
