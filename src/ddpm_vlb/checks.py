"""What every loss and every evaluation asks of its input, before a number is made of it that looks plausible."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .reverse_process import ReverseProcess

Model = Callable[..., Any]
"""The network: model(x_t, timesteps, **conditioning) returns a tensor, an object with the tensor in `.sample`, or a
tuple that begins with it, as diffusers' models do with `return_dict=False`."""

Conditioning = Mapping[str, Tensor]
"""Further arguments of the network by name, each with one row for each image: `{"class_labels": labels}`."""

Batch = Tensor | tuple[Tensor, Conditioning]
"""Images x_0 (B, C, *), or images and the network's further arguments for them."""

Told = tuple[Tensor, dict[str, Tensor]]
"""Images and the network's further arguments for them, which may be none."""

# What layers that draw in training mode call their share: torch's dropouts, attention, a DiT's labels.
_SHARES = ("p", "dropout", "dropout_p", "dropout_prob", "drop_prob", "class_dropout_prob")
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def output_tensor(output: Any) -> Tensor:
    """The tensor in what a network returned.

    Args:
        output: of a `Model`.

    Raises:
        TypeError: there is none.
    """
    found = getattr(output, "sample", output)
    if isinstance(found, tuple) and found:
        found = found[0]
    if not isinstance(found, Tensor):
        raise TypeError(
            "`model` must return a tensor, an object with one in `.sample`, or a tuple that begins with one, "
            f"but returned a {type(output).__name__}: wrap it in a function that returns the tensor."
        )
    return found


def check_model(model: Model) -> None:
    """Refuse a network in training mode, whose dropout or batch norm would make its score another network's.

    Args:
        model: the network; of a function around one nothing is known.

    Raises:
        ValueError: a layer that draws, or that mixes the images of a batch.
    """
    for name, layer in model.named_modules() if isinstance(model, nn.Module) else ():
        shares = (vars(layer).get(share, 0) for share in _SHARES)
        draws = any(isinstance(share, (int, float)) and share > 0 for share in shares)
        if layer.training and (draws or isinstance(layer, _BATCH_NORMS)):
            raise ValueError(
                f"`model` must be in evaluation mode to be scored, but its {type(layer).__name__} {name!r} is in "
                "training mode: call `model.eval()`, and `model.train()` when you go on."
            )


def check_data(x_0: Tensor, levels: int | None) -> None:
    """Refuse data that the decoder would score wrongly. Nothing is rounded or clipped into place.

    Args:
        x_0: data (B, C, *).
        levels: number of levels on [-1, 1]; None for continuous data, of which only finite values are asked.

    Raises:
        ValueError: no images, values that are NaN, infinite or outside [-1, 1], or off the levels by over 1e-5 of the
            range.
    """
    check_values("x_0", x_0)
    if levels is not None:
        _check_levels(x_0, levels, _tolerance(levels))


def check_values(name: str, x: Tensor) -> None:
    """Refuse what is no batch of numbers.

    Args:
        name: of the argument, for the message.
        x: images or noised images (B, C, *).

    Raises:
        ValueError: no images, integers, or values that are NaN or infinite.
    """
    if not x.is_floating_point():
        raise ValueError(f"`{name}` must be a floating point tensor scaled to [-1, 1], but got {x.dtype}.")
    if x.numel() == 0:
        raise ValueError(f"`{name}` holds no images: its shape is {tuple(x.shape)}.")
    if not bool(x.isfinite().all()):
        raise ValueError(f"`{name}` holds NaN or infinite values.")


def check_trained(x_0: Tensor, levels: int | None, on_levels: bool) -> None:
    """Refuse what no chain is trained on: images that are not scaled, or scaled to [0, 1].

    Half precision moves a value off its level by its rounding, which is let pass.

    Args:
        x_0: data (B, C, *).
        levels: number of levels on [-1, 1]; None for continuous data, of which nothing is known.
        on_levels: the loss has a decoder, which asks for more than the range.

    Raises:
        ValueError: values outside [-1, 1], or off the levels.
    """
    if levels is not None and x_0.numel():
        x_0 = x_0.detach()
        exact = on_levels and any(_is_rounded(x_0, levels, dtype) for dtype in (torch.bfloat16, torch.float16))
        _check_levels(x_0, levels, _tolerance(levels), on_levels and not exact)


def _is_rounded(x_0: Tensor, levels: int, dtype: torch.dtype) -> bool:
    """Whether all values are levels as a narrower type holds them, `diffuse` having made float32 of it again."""
    nearest = ((x_0.cpu().double() + 1) * ((levels - 1) / 2)).round() * (2 / (levels - 1)) - 1
    return bool((nearest.to(dtype) == x_0.cpu()).all())


def _tolerance(levels: int) -> float:
    """How far off its level a value may be: 1e-5 of the range, and a twentieth of a bin where there are many."""
    return min(2e-5, 0.1 / (levels - 1))


def _check_levels(x_0: Tensor, levels: int, tolerance: float, on_levels: bool = True) -> None:
    low, high = float(x_0.min()), float(x_0.max())
    if low < -1 - tolerance or high > 1 + tolerance:
        raise ValueError(
            f"`x_0` must lie in [-1, 1], but reaches from {low:.6g} to {high:.6g}. Scale it: "
            f"`x_0 = image * 2 / {levels - 1} - 1` for integer levels 0 .. {levels - 1}."
        )
    k = (x_0.cpu().double() + 1) * ((levels - 1) / 2)
    off = float((k - k.round()).abs().max()) * 2 / (levels - 1)
    if on_levels and off > tolerance:
        raise ValueError(
            f"`x_0` must lie on the {levels} levels -1 + 2 k / {levels - 1}, but a value is {off:.3g} away from the "
            f"nearest. Was it resized, augmented or normalised after it was quantised? Quantise it again, or set "
            "`levels` to what the data has (None for continuous data)."
        )


def check_conditioning(conditioning: Conditioning | None, num_images: int) -> None:
    """Refuse conditioning that does not have one row for each image.

    Args:
        conditioning: tensors by argument name, or None.
        num_images: B.

    Raises:
        ValueError: a value that is no tensor of B rows.
    """
    if conditioning is not None and not isinstance(conditioning, Mapping):
        raise ValueError(
            '`conditioning` must be a dict of the network\'s further arguments, `{"class_labels": labels}`, but got '
            f"{type(conditioning).__name__}."
        )
    for name, rows in (conditioning or {}).items():
        if not isinstance(rows, Tensor) or rows.ndim == 0 or len(rows) != num_images:
            got = f"the shape {tuple(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
            raise ValueError(f"`conditioning[{name!r}]` must have one row for each of {num_images} images, not {got}.")


def checked_batches(batches: Iterable[Batch], levels: int | None) -> Iterator[Told]:
    """The batches as pairs, each looked at before a network call is spent on it.

    Args:
        batches: of images, or of pairs of images and conditioning.
        levels: as in `check_data`.

    Raises:
        ValueError: one bare tensor, or as `check_data` and `check_conditioning`.
    """
    if isinstance(batches, Tensor):
        raise ValueError("`batches` must be batches of images, not one tensor: pass `[x_0]`, or `x_0.split(64)`.")
    for batch in batches:
        x_0, conditioning = (batch, None) if isinstance(batch, Tensor) else batch
        check_data(x_0, levels)
        check_conditioning(conditioning, len(x_0))
        yield x_0, dict(conditioning or {})


def check_same_chain(reverse: ReverseProcess, also: Sequence[Any]) -> None:
    """Refuse reverse processes of another chain.

    Args:
        reverse: one of the chain.
        also: the others; losses among them are of every chain.

    Raises:
        ValueError: other timesteps or another schedule.
    """
    others = [own for own in also if isinstance(own, ReverseProcess)]
    for name in ("timesteps", "log_alphas_cumprod") if others else ():
        table = getattr(reverse.forward, name).cpu()
        if any(not torch.equal(getattr(other.forward, name).cpu(), table) for other in others):
            raise ValueError(
                "`also` must hold reverse processes of the same chain: one network output serves them all."
            )
