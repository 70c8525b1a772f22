"""The shape of a network's samples, as its configuration states it, and what they are given out as."""

from numbers import Integral
from typing import Any

import numpy as np
import PIL.Image
from diffusers import UNet1DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def sample_shape(network: Any) -> tuple[int, ...] | None:
    """The shape (C, *) of one sample; None where the configuration does not state it.

    An integer `sample_size` n is (n, n), and (n,) for a `UNet1DModel`.

    Args:
        network: with a config of `in_channels` and `sample_size`.

    Raises:
        ValueError: a `sample_size` that is no size.
    """
    size, channels = network.config.get("sample_size"), network.config.get("in_channels")
    if size is None or channels is None:
        return None
    if _is_count(size):
        size = (size,) if isinstance(network, UNet1DModel) else (size, size)
    if not (isinstance(size, (list, tuple)) and size and all(_is_count(own) and own > 0 for own in size)):
        raise ValueError(
            f"The network's `sample_size` must be a positive integer or a list of them, one for each dimension, but "
            f"is {size!r:.80}."
        )
    return (channels, *(int(own) for own in size))


def _is_count(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def needed_shape(network: Any) -> tuple[int, ...]:
    """The shape (C, *) of one sample, where samples are to be made.

    Args:
        network: as of `sample_shape`.

    Raises:
        ValueError: no `sample_size`, or one that is no size.
    """
    shape = sample_shape(network)
    if shape is None:
        raise ValueError(
            "The network's config has no `sample_size`, the size of its samples. State it: "
            "`pipeline.unet.register_to_config(sample_size=32)`, or (32, 48) for another height than width."
        )
    return shape


def is_image(shape: tuple[int, ...] | None) -> bool:
    """Whether samples of this shape are images (C, H, W) of grey or colour, as PIL has them.

    Args:
        shape: (C, *), or None where it is not known.
    """
    return shape is not None and len(shape) == 3 and shape[0] in (1, 3)


def check_output_type(output_type: str, shape: tuple[int, ...]) -> None:
    """Refuse an output type that samples of a shape do not have.

    Args:
        output_type: one of `OUTPUT_TYPES`.
        shape: (C, *).

    Raises:
        ValueError: an unknown type, or "pil" for what is no image.
    """
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"`output_type` must be one of {list(OUTPUT_TYPES)}, but got {output_type!r}.")
    if output_type == "pil" and not is_image(shape):
        what = f"of {shape[0]} channels" if len(shape) == 3 else f"of shape {shape}"
        raise ValueError(f"PIL has no images {what}: use `output_type='np'`, 'pt' or 'latent'.")


def given_out(x_0: Tensor, output_type: str) -> list[PIL.Image.Image] | np.ndarray | Tensor:
    """Samples as the output type has them.

    Args:
        x_0: (B, C, *) in [-1, 1].
        output_type: as `check_output_type` accepts it.
    """
    if output_type == "latent":
        return x_0
    x_0 = (x_0.float() / 2 + 0.5).clamp(0, 1)
    if output_type == "pt":
        return x_0
    array = x_0.cpu().movedim(1, -1).numpy()
    return DiffusionPipeline.numpy_to_pil(array) if output_type == "pil" else array
