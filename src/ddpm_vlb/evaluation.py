r"""The whole bound of a batch, term by term, and what every evaluation shares: its draws and network calls.

-log p(x_0) <= L_T + sum_t L_t, with one noise draw for each step: T network calls for each image. `estimate_vlb` has
the estimate for a data set, which takes far fewer.

Source: Ho et al. 2020, eq. 5.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import Conditioning, Model, check_conditioning, check_data, check_model
from .losses import nats_to_bits_per_dim, prior_kl, vlb_term
from .reverse_process import ReverseProcess


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


def model_output(model: Model, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning | None = None) -> Tensor:
    """Call the network and take the tensor out of what it returns.

    Args:
        model: the network.
        x_t: its input (B, C, *).
        timesteps: what it is told, (B,): `forward.timesteps[t]`.
        conditioning: its further arguments.
    """
    output = model(x_t, timesteps, **(conditioning or {}))
    return output if isinstance(output, Tensor) else output.sample


def rows_of(conditioning: Conditioning | None, index: Tensor) -> dict[str, Tensor]:
    """The conditioning of the images `index`.

    Args:
        conditioning: tensors with one row for each image, or None.
        index: which images, (P,).
    """
    return {name: rows[index.to(rows.device)] for name, rows in (conditioning or {}).items()}


@torch.no_grad()
def bound_terms(
    model: Model,
    reverses: Sequence[ReverseProcess],
    x_0: Tensor,
    t: Tensor,
    noise: Tensor,
    conditioning: Conditioning | None = None,
    image: Tensor | None = None,
) -> Tensor:
    """Terms of the bound in nats for (image, t) pairs, float64 on the CPU, one row for each of `reverses`, (V, P).

    Args:
        model: the network, as in `evaluate_vlb`.
        reverses: reverse processes of one chain, all scored from one network output.
        x_0: the pairs' data (P, C, *); it goes where `reverses` live.
        t: their chain indices (P,).
        noise: their epsilon (P, C, *).
        conditioning: as in `evaluate_vlb`, P rows.
        image: the images' numbers for error messages, (P,).

    Raises:
        FloatingPointError: NaN or infinity, with the timestep and the image.
    """
    forward = reverses[0].forward
    device = forward.betas.device
    diffused = forward.diffuse(x_0.to(device), t.to(device), noise.to(device))
    told = {name: rows.to(device) for name, rows in (conditioning or {}).items()}
    output = model_output(model, diffused.x_t, forward.timesteps[diffused.t], told)
    terms = torch.stack([vlb_term(reverse, output, diffused) for reverse in reverses]).cpu().double()
    # The output is checked too: clipping would make an infinite one look harmless.
    bad_output = ~output.isfinite().flatten(1).all(1).cpu()
    bad = bad_output | ~terms.isfinite().all(0)
    if bool(bad.any()):
        pair = int(bad.nonzero()[0])
        step, name = int(t[pair]), "" if image is None else f", image {int(image[pair])}"
        cause = "the model's output" if bool(bad_output[pair]) else "the term of the bound"
        raise FloatingPointError(
            f"NaN or infinity in {cause} at chain index t={step} (timestep {int(forward.timesteps[step])}){name}."
        )
    return terms


def evaluate_vlb(
    model: Model,
    reverse: ReverseProcess,
    x_0: Tensor,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    values_per_call: int = 65536,
    conditioning: Conditioning | None = None,
) -> VLBTerms:
    """The whole bound of a batch, every term computed once: T network calls for each image.

    Args:
        model: the network, called as model(x_t, timesteps, **conditioning); returns a tensor or an object with
            `.sample`.
        reverse: p; decides on clipping and the decoder.
        x_0: data (B, C, *) in [-1, 1] on its levels, on the device of the network and of `reverse`.
        noise: epsilon for each chain index, (T, B, C, *); drawn when None.
        generator: source of the noise when it is drawn.
        values_per_call: (image, t) pairs are stacked up to this many values for each network call.
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
    steps, batch = len(reverse.forward), len(x_0)
    chunk = max(1, values_per_call // x_0[0].numel())
    columns = []
    for start in range(0, steps * batch, chunk):
        pair = torch.arange(start, min(start + chunk, steps * batch), device=x_0.device)
        t, image = pair // batch, pair % batch
        if noise is None:
            source = generator.device if generator is not None else x_0.device
            epsilon = torch.randn((len(pair), *x_0.shape[1:]), generator=generator, device=source, dtype=x_0.dtype)
        else:
            epsilon = noise[t.to(noise.device), image.to(noise.device)]
        told = rows_of(conditioning, image)
        columns.append(bound_terms(model, (reverse,), x_0[image], t, epsilon.to(x_0.device), told, image)[0])
    terms = torch.cat(columns).reshape(steps, batch).T.to(x_0.device, torch.promote_types(x_0.dtype, torch.float32))
    prior = prior_kl(reverse, x_0)
    return VLBTerms(prior, terms, nats_to_bits_per_dim(prior + terms.sum(1), x_0[0].numel()))
