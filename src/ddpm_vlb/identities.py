"""What scores are of, so that a difference of two that say nothing together is refused.

1. two bounds of the same images at the same levels are upper bounds on the same negative log-likelihoods, or on two
   networks': their difference has a meaning whatever the chains, the variances and the networks are
2. of one chain the draws of t and noise can be the same, and must be: their noise cancels. Of two it cannot, and the
   spread of the images' differences has it
3. a loss is averaged over the t of its chain, on the scale of what the network predicts: only the same loss of the
   same chain and prediction type compares
"""

import functools
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import Conditioning
from .evaluation import Loss, digest
from .reverse_process import ReverseProcess


class Identity(NamedTuple):
    """What scores are compared by; the fields are those of `VLBScores`."""

    positions: Tensor
    images: Tensor
    draws: Tensor
    chain: int
    levels: int
    loss: str


def quantities(reverse: ReverseProcess, also: Sequence[ReverseProcess | Loss]) -> list[tuple[int, int, str]]:
    """The digest of the chain, the levels and the loss's name, of the bound and of each of `also`.

    Args:
        reverse: p.
        also: further reverse processes of its chain, and losses.
    """
    chain = digest(reverse.forward.log_alphas_cumprod)  # which lies on the CPU: no wait for a device
    quantities = [(chain, reverse.levels or 0, "")]
    for own in also:
        if isinstance(own, ReverseProcess):
            quantities.append((chain, own.levels or 0, ""))
        else:
            quantities.append((chain, reverse.levels or 0, f"{loss_name(own)} ({reverse.prediction_type})"))
    return quantities


def loss_name(loss: Any) -> str:
    """A loss's name: a function's, with what `functools.partial` fixed of it; all lambdas are alike.

    Args:
        loss: of `also`.
    """
    if isinstance(loss, functools.partial):
        given = [*map(_said, loss.args), *(f"{name}={_said(value)}" for name, value in loss.keywords.items())]
        return f"{loss_name(loss.func)}({', '.join(given)})"
    return getattr(loss, "__name__", type(loss).__name__)


def settings(reverse: ReverseProcess, conditioning: Conditioning | None) -> dict[str, str]:
    """What else a bound depends on, in words by name: how p is made of an output, and what the network is told.

    Args:
        reverse: p, whose chain and levels an `Identity` has.
        conditioning: further arguments of the network.
    """
    names = [own.name for own in fields(reverse) if own.init and own.name not in ("forward", "levels")]
    values: dict[str, Any] = {name: getattr(reverse, name) for name in names}
    values |= {f"conditioning[{name!r}]": rows for name, rows in sorted((conditioning or {}).items())}
    return {name: _said(_in_one_type(value)) for name, value in values.items()}


def _in_one_type(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _said(value: Any) -> str:
    """A fixed argument, the same in another process; of what has no values to tell, its class."""
    if isinstance(value, Tensor):
        return f"tensor {_short(value)}"
    if hasattr(value, "tolist") and not isinstance(value, type):  # numpy's, printed otherwise by its versions
        value, array = value.tolist(), value
        return f"{type(array).__name__} {_short(_said(value))}" if isinstance(value, list) else _said(value)
    if isinstance(value, dict):
        return f"{{{', '.join(sorted(f'{_said(key)}: {_said(own)}' for key, own in value.items()))}}}"
    if isinstance(value, list | tuple):
        inner = ", ".join(map(_said, value))
        return f"[{inner}]" if isinstance(value, list) else f"({inner})"
    return repr(value) if isinstance(value, str | int | float | complex | None) else loss_name(value)


def _short(content: str | Tensor) -> str:
    return f"{digest(content) % 2**32:08x}"


def image_digests(x_0: Tensor, levels: int | None) -> Tensor:
    """64 bits of each image's shape and of its levels, or, of continuous data, its values in float32; (B,), int64.

    Args:
        x_0: data (B, C, *), of any type.
        levels: number of levels on [-1, 1]; None for continuous data.
    """
    values = x_0.detach().cpu().double()
    values = values.float() if levels is None else ((values + 1) * ((levels - 1) / 2)).round()
    return torch.tensor([digest(own) for own in values], dtype=torch.int64)


def unpaired(a: Identity, b: Identity) -> str | None:
    """What two identities lack to be compared, and what to do; None where they lack nothing.

    Args:
        a: of the first.
        b: of the second.

    Source: the module's list.
    """
    if a.loss != b.loss:
        first, second = (own.loss or "the bound" for own in (a, b))
        return f"one quantity, but are of {first} and {second}: subtract bounds from bounds, and a loss from itself"
    if a.levels != b.levels:
        first, second = (str(own.levels or None) for own in (a, b))
        return f"the same `levels`, whose bins have the likelihood, but have {first} and {second}: score both with one"
    if a.loss and a.chain != b.chain:
        return "the same chain, over whose t a loss is averaged, but theirs differ: compare their bounds, `also[0]`"
    if not torch.equal(a.images, b.images):
        return (
            f"the same images in the same order, but theirs differ ({len(a.images)} and {len(b.images)} images): "
            "score both on the same"
        )
    return _other_draws(a, b) if a.chain == b.chain else None


def _other_draws(a: Identity, b: Identity) -> str | None:
    if not torch.equal(a.positions, b.positions):
        return "the same positions of the images, which decide their draws, but theirs differ: count both alike"
    remedies = {
        "seed": "give both the same `seed`, and as many sweeps",
        "draws": "give both the same `estimator`, `calls_per_image` and `num_replicates`",
        "pilot": "fit one and give it to both, `pilot=pilot`",
    }
    for i, (name, remedy) in enumerate(remedies.items()):
        if not torch.equal(a.draws[:, i], b.draws[:, i]):
            return f"the same {name}, but theirs differ: {remedy}"
    return None
