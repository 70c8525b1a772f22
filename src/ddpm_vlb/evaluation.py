r"""The whole bound of a batch, term by term, and what every evaluation shares: its draws and network calls.

-log p(x_0) <= L_T + sum_t L_t, with one noise draw for each step: T network calls for each image. `estimate_vlb` has
the estimate for a data set, which takes far fewer.

Source: Ho et al. 2020, eq. 5.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .checks import Conditioning, Model, check_conditioning, check_data, check_model, output_tensor
from .devices import read_later, send
from .forward_process import Diffused
from .losses import nats_to_bits_per_dim, prior_kl, vlb_term
from .reverse_process import ReverseProcess

Loss = Callable[[ReverseProcess, Tensor, Diffused], Tensor]
"""A training loss: loss(reverse, model_output, diffused) returns one value for each image, as `simple_loss` does."""
FEWEST_DEGREES = 5  # with one, a third of the errors is beyond two of itself
MIN_DEGREES = 20  # of freedom of the noise standard error; with so many, one error in 17 is beyond two of it
CPU_VALUES, DEVICE_VALUES = 2**16, 2**20  # in a network call: what keeps a cache warm, and a device busy


class VLBTerms(NamedTuple):
    """The bound of each image: prior L_T (B,) and terms by chain index (B, T) in nats, their sum bits_per_dim (B,)."""

    prior: Tensor
    terms: Tensor
    bits_per_dim: Tensor


def image_generator(seed: int, position: int, sweep: int = 0) -> torch.Generator:
    """The source of an image's draws, which depends on nothing but these three.

    Args:
        seed: of the evaluation.
        position: of the image in the data.
        sweep: number of the pass over the data.
    """
    key = f"{seed}/{position}" if sweep == 0 else f"{seed}/{position}/{sweep}"
    digest = hashlib.blake2b(key.encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def digest(*content: str | Tensor) -> int:
    """64 bits that tell contents apart, an int64; of numbers their shape and their values, whatever their type.

    Args:
        content: texts and tensors.
    """
    bits = hashlib.blake2b(digest_size=8)
    for own in content:
        if isinstance(own, str):
            bits.update(own.encode())
        else:
            values = own.detach().cpu().to(torch.promote_types(own.dtype, torch.float64)).contiguous() + 0.0  # no -0
            bits.update(str(tuple(values.shape)).encode())
            bits.update(values.flatten().view(torch.uint8).numpy().data)
    return int.from_bytes(bits.digest(), "little", signed=True)


def model_output(model: Model, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning | None = None) -> Tensor:
    """Call the network and take the tensor out of what it returns.

    Args:
        model: the network; a module gets its input in its own dtype.
        x_t: its input (B, C, *).
        timesteps: what it is told, (B,): `forward.timesteps[t]`.
        conditioning: its further arguments.

    Raises:
        TypeError: it returns no tensor.
    """
    weight = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    if weight is not None and weight.is_floating_point():
        x_t = x_t.to(weight.dtype)
    return output_tensor(model(x_t, timesteps, **(conditioning or {})))


def rows_of(conditioning: Conditioning | None, index: Tensor) -> dict[str, Tensor]:
    """The conditioning of the images `index`.

    Args:
        conditioning: tensors with one row for each image, or None.
        index: which images, (P,).
    """
    return {name: rows[index.to(rows.device)] for name, rows in (conditioning or {}).items()}


def values_in_a_call(values_per_call: int | None, device: torch.device) -> int:
    """How many values a network call takes.

    Args:
        values_per_call: as asked for; None goes by the device alone and measures nothing, lest what a run gives
            depend on its timing.
        device: of the network.
    """
    if values_per_call is not None:
        return values_per_call
    return CPU_VALUES if device.type == "cpu" else DEVICE_VALUES


@torch.no_grad()
def launch_terms(
    model: Model,
    reverses: Sequence[ReverseProcess | Loss],
    x_0: Tensor,
    t: Tensor,
    noise: Tensor,
    conditioning: Conditioning | None = None,
    image: Tensor | None = None,
) -> Callable[[], Tensor]:
    """Begin to compute terms of the bound in nats for (image, t) pairs; the device works while the host goes on.

    Args:
        model: the network, as in `evaluate_vlb`.
        reverses: reverse processes of one chain, all scored from one network output, the first of them no loss; or
            losses, of which a T-th is the term.
        x_0: the pairs' data (P, C, *); it goes where `reverses` live.
        t: their chain indices (P,).
        noise: their epsilon (P, C, *).
        conditioning: as in `evaluate_vlb`, P rows.
        image: the images' numbers for error messages, (P,).

    Returns:
        What waits for the terms: float64 on the CPU, one row for each of `reverses`, (V, P). It raises
        FloatingPointError: NaN or infinity, with the timestep and the image.
    """
    reverse, *others = reverses
    assert isinstance(reverse, ReverseProcess)
    forward = reverse.forward
    device = forward.betas.device
    diffused = forward.diffuse(*(send(own, device) for own in (x_0, t, noise)))
    told = {name: send(rows, device) for name, rows in (conditioning or {}).items()}
    output = model_output(model, diffused.x_t, forward.timesteps[diffused.t], told)
    first = vlb_term(reverse, output, diffused)
    terms = torch.stack([first, *(_further_term(own, reverse, output, diffused).to(first) for own in others)])
    # The output is looked at too: clipping would make an infinite one look harmless.
    whole = output.flatten(1).sum(1, dtype=terms.dtype)
    come = read_later(torch.cat([terms, whole[None]]))

    def read() -> Tensor:
        values = come().double()
        bad = ~values.isfinite()
        if bool(bad.any()):
            pair = int(bad.any(0).nonzero()[0])
            step, name = int(t[pair]), "" if image is None else f", image {int(image[pair])}"
            cause = "the model's output" if bool(bad[-1, pair]) else "the term of the bound"
            raise FloatingPointError(
                f"NaN or infinity in {cause} at chain index t={step} (timestep {int(forward.timesteps[step])}){name}."
            )
        return values[:-1]

    return read


def _further_term(own: ReverseProcess | Loss, reverse: ReverseProcess, output: Tensor, diffused: Diffused) -> Tensor:
    """The bound's term of another process, or a loss's part of its mean over the chain, (P,)."""
    if isinstance(own, ReverseProcess):
        return vlb_term(own, output, diffused)
    values = own(reverse, output, diffused)
    if not isinstance(values, Tensor) or values.shape != diffused.t.shape:
        came = f"the shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(
            f"A loss must return one value for each of {len(diffused.t)} images, but returned {came}: leave out the "
            "mean over the batch, as `simple_loss` does."
        )
    return values / len(reverse.forward)


def one_behind(launched: Iterable[Callable[[], Tensor]]) -> Iterator[Tensor]:
    """The terms of each network call, waited for once the next one is launched.

    Args:
        launched: what `launch_terms` returns, call by call.
    """
    last = None
    for read in launched:
        if last is not None:
            yield last()
        last = read
    if last is not None:
        yield last()


def evaluate_vlb(
    model: Model,
    reverse: ReverseProcess,
    x_0: Tensor,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    values_per_call: int | None = None,
    conditioning: Conditioning | None = None,
) -> VLBTerms:
    """The whole bound of a batch, every term computed once: T network calls for each image.

    Args:
        model: the network, called as model(x_t, timesteps, **conditioning); returns a tensor, an object with
            `.sample`, or a tuple that begins with the tensor.
        reverse: p; decides on clipping and the decoder.
        x_0: data (B, C, *) in [-1, 1] on its levels; it goes where `reverse` lives.
        noise: epsilon for each chain index, (T, B, C, *); drawn when None.
        generator: source of the noise when it is drawn.
        values_per_call: (image, t) pairs are stacked up to this many values for each network call; None takes 2^16 on
            the CPU and 2^20 elsewhere.
        conditioning: further arguments of the network by name, each a tensor of B rows (`class_labels`).

    Raises:
        ValueError: data outside [-1, 1], off its levels or not finite; a network in training mode; an output with the
            wrong channels.
        FloatingPointError: NaN or infinity from the network, with the timestep and the image.

    Source: Ho et al. 2020, eq. 5.
    """
    check_model(model)
    check_data(x_0, reverse.levels)
    check_conditioning(conditioning, len(x_0))
    steps, batch, device = len(reverse.forward), len(x_0), reverse.forward.betas.device
    chunk = max(1, values_in_a_call(values_per_call, device) // x_0[0].numel())

    def calls() -> Iterator[Callable[[], Tensor]]:
        for start in range(0, steps * batch, chunk):
            pair = torch.arange(start, min(start + chunk, steps * batch), device=x_0.device)
            t, image = pair // batch, pair % batch
            if noise is None:
                source = generator.device if generator is not None else x_0.device
                epsilon = torch.randn((len(pair), *x_0.shape[1:]), generator=generator, device=source, dtype=x_0.dtype)
            else:
                epsilon = noise[t.to(noise.device), image.to(noise.device)]
            told = rows_of(conditioning, image)
            yield launch_terms(model, (reverse,), x_0[image], t, epsilon, told, image)

    terms = torch.cat([own[0] for own in one_behind(calls())]).reshape(steps, batch).T
    terms = terms.to(torch.promote_types(x_0.dtype, torch.float32)).to(x_0.device)
    prior = prior_kl(reverse, send(x_0, device)).to(x_0.device)
    return VLBTerms(prior, terms, nats_to_bits_per_dim(prior + terms.sum(1), x_0[0].numel()))


def enough_replicates(calls: int, images: int) -> int | None:
    """Replicates that give the noise SE some 20 degrees of freedom, which few images alone do not; None for many.

    Args:
        calls: network calls for each image, at least 2.
        images: how many are scored.

    Raises:
        ValueError: fewer than 5 degrees in any case, with which the error would be far too small too often.
    """
    if images >= MIN_DEGREES:
        return None
    if images * (calls - 1) < FEWEST_DEGREES:
        raise ValueError(
            f"`calls_per_image` {calls} is too few for the error of {images} image(s): take at least "
            f"{1 + -(-FEWEST_DEGREES // images)}, or score more images."
        )
    divisors = [r for r in range(2, calls + 1) if calls % r == 0]
    return next((r for r in divisors if images * (r - 1) >= MIN_DEGREES), divisors[-1])


def fitting_replicates(calls: int) -> int:
    """The most replicates of at least 16 calls each that divide `calls`, or else the fewest, at least 2."""
    divisors = [r for r in range(2, max(calls, 0) + 1) if calls % r == 0]
    long = [r for r in divisors if calls // r >= 16]
    return max(long) if long else min(divisors, default=2)
