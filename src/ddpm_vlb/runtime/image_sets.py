"""A column of a data set as tensors x_0: image files in any form that `datasets` takes, or arrays (C, H, W).

All commands read a column here, so that what one trains on another scores.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import PIL.Image
import torch
from torch import Tensor

from ddpm_vlb import check_data
from ddpm_vlb.runtime.stored_images import decode_image, image_name

FIRST_IMAGES = 64  # that say whether a data set is grey, and how many levels it has
_LEVELS = {"bool": 2, "uint8": 256, "uint16": 65536}  # of arrays


@dataclass(frozen=True)
class Layout:
    """What images have in common.

    Args:
        channels: 1 or 3.
        size: (height, width).
        levels: 0 .. levels - 1 are stored; None: continuous arrays.
        found: the files that were looked at said so, and one that can hold more contradicts them.
        asked: the channels were.
    """

    channels: int
    size: tuple[int, ...]
    levels: int | None
    found: bool = False
    asked: bool = False


def as_stored(x_0: Tensor, levels: int) -> np.ndarray:
    """Images on [-1, 1] as integer levels, of the smallest type that holds them.

    Args:
        x_0: images (B, C, H, W).
        levels: number of levels.
    """
    return ((x_0 + 1) * ((levels - 1) / 2)).round().numpy().astype(np.min_scalar_type(levels - 1))


class Images(torch.utils.data.Dataset):
    """Images of one split as x_0 tensors (C, H, W), decoded when they are asked for.

    Args:
        data: a dataset whose `column` holds encoded images.
        column: name of the image column.
        layout: of all images.
        resize: resize and crop images of another size; otherwise they are refused.
        standard: what size and mode must agree with, for error messages.

    `label_column` is where `data` has their class labels, None where a network is told none.
    """

    label_column: str | None = None

    def __init__(self, data: Any, column: str, layout: Layout, resize: bool, standard: str = "the first one is"):
        self.data, self.column, self.resize, self.standard = data, column, resize, standard
        self.channels, self.size, self.levels = layout.channels, layout.size, layout.levels or 256
        self.found, self.asked = layout.found, layout.asked

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Tensor:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        return [self._x_0(image, index) for image, index in zip(_rows(self.data, self.column, indices), indices)]

    def _x_0(self, encoded: dict[str, Any], index: int) -> Tensor:
        stored, name = decode_image(encoded, index), image_name(encoded, index)
        if self.channels == 1 and not stored.grey:
            standard = "`--channels 1` asks for" if self.asked else self.standard
            raise ValueError(
                f"Image {name} is in colour, but {standard} grey: its colour would be lost. Train on colour with "
                "`--channels 3`, or store all images in one mode."
            )
        if self.found and stored.levels > self.levels:  # where the levels are given, files may have room for more
            raise ValueError(
                f"Image {name} can hold {stored.levels} levels, but the first images have {self.levels}: say how many "
                f"there are with `--levels`; with {stored.levels} those of fewer are spread over them."
            )
        k = stored.at_levels(self.levels, name)
        k = k[..., :1] if self.channels == 1 else np.broadcast_to(k, (*k.shape[:2], self.channels))
        if k.shape[:2] != self.size:
            if not self.resize:
                raise ValueError(
                    f"Image {name} is {k.shape[1]} x {k.shape[0]}, but {self.standard} {self.size[1]} x "
                    f"{self.size[0]}. Pass `--resolution` to resize all images to one size."
                )
            k = _resize_and_crop(k, self.size)
        if k.max() >= self.levels:
            raise ValueError(
                f"Image {name} has the level {k.max()}, above {self.levels - 1}. The data has more levels than the "
                f"{self.levels} of `--levels`, of its first images or of the checkpoint: requantise it, or train with "
                "more levels."
            )
        return torch.from_numpy(np.array(k.transpose(2, 0, 1), order="C")).float() * (2 / (self.levels - 1)) - 1

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """Some images x_0 (B, C, *), and by name what else the network is told: `class_labels` (B,), or nothing."""
        x_0 = torch.stack(self.__getitems__(list(indices)))
        return x_0, {} if self.label_column is None else {"class_labels": self.labels(indices)}

    def labels(self, indices: Sequence[int] | None = None) -> Tensor:
        """The class labels of some images, or of all, (B,) int64; only where there is a `label_column`."""
        column = self.data.select_columns([self.label_column])
        rows = column[:] if indices is None else column[list(indices)]
        return torch.tensor(rows[self.label_column], dtype=torch.int64)

    def raw(self, x_0: Tensor) -> np.ndarray:
        """A batch of this data as it is stored: integer levels."""
        return as_stored(x_0, self.levels)

    def batches(self, batch_size: int, limit: int | None = None) -> Iterator[Tensor]:
        """Batches in the order of the data, each image exactly once, at most `limit` of them."""
        total = len(self) if limit is None else min(limit, len(self))
        for start in range(0, total, batch_size):
            yield torch.stack(self.__getitems__(list(range(start, min(start + batch_size, total)))))


class Arrays(Images):
    """Images or latents that are stored as arrays (C, *), or (*) for one channel.

    Integers are levels; floats are x_0 itself, on its levels in [-1, 1], or continuous.

    Args:
        data: a dataset whose `column` holds the arrays.
        column: its name.
        shape: the shape (C, *) that each must have.
        levels: number of levels; None for continuous data, which must be floats.
        standard: what the shape must agree with, for error messages.
    """

    def __init__(
        self, data: Any, column: str, shape: tuple[int, ...], levels: int | None, standard: str = "the model takes"
    ):
        self.data, self.column, self.shape, self.array_levels, self.standard = data, column, shape, levels, standard
        if levels is not None:
            self.levels = levels

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        arrays = _rows(self.data.with_format("numpy", columns=[self.column]), self.column, indices)
        return [self._tensor(array, index) for array, index in zip(arrays, indices)]

    def _tensor(self, given: Any, index: int) -> Tensor:
        if given is None:
            raise ValueError(f"Array number {index} of column {self.column!r} is missing: its row is null.")
        array = np.asarray(given)
        if array.dtype == object or array.shape not in (self.shape, self.shape[1:] if self.shape[0] == 1 else ()):
            raise ValueError(
                f"Array number {index} of column {self.column!r} has the shape {array.shape}, but {self.standard} "
                f"{self.shape}, channels first."
            )
        array = array.reshape(self.shape)
        if np.issubdtype(array.dtype, np.floating):
            return self._checked(torch.from_numpy(array.astype(np.float32)), index)
        if self.array_levels is None:
            raise ValueError(
                f"Column {self.column!r} holds integers, but the checkpoint scores continuous data (`levels` is "
                "None). Give it floating point values, or `--levels`."
            )
        if array.min() < 0 or array.max() >= self.array_levels:
            raise ValueError(
                f"Array number {index} of column {self.column!r} has levels from {array.min()} to {array.max()}, "
                f"outside 0 .. {self.array_levels - 1}. Shift the data to begin at 0, and give as many `--levels` as "
                "it has."
            )
        return torch.from_numpy(array.astype(np.int64)).float() * (2 / (self.array_levels - 1)) - 1

    def _checked(self, x_0: Tensor, index: int) -> Tensor:
        try:
            check_data(x_0[None], self.array_levels)
        except ValueError as error:
            raise ValueError(f"Array number {index} of column {self.column!r}: {error}") from error
        return x_0

    def raw(self, x_0: Tensor) -> np.ndarray:
        """A batch of this data as the network sees it."""
        return x_0.numpy()


def _rows(data: Any, column: str, indices: list[int]) -> Any:
    """Rows of a column; what the file's content leads to is told as a value, the system's faults stay as they are."""
    try:
        return data[indices][column]
    except Exception as error:
        if isinstance(error, IndexError) or (isinstance(error, OSError) and error.errno is not None):
            raise
        raise ValueError(
            f"Rows {indices[0]} to {indices[-1]} of column {column!r} cannot be read: {type(error).__name__}: {error}"
        ) from error


def _resize_and_crop(k: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Scale to cover `size`, then cut out the centre; levels stay levels."""
    if k.shape[2] > 1:  # Pillow has no colour of more than 8 bits
        return np.concatenate([_resize_and_crop(channel, size) for channel in np.split(k, k.shape[2], axis=2)], axis=2)
    height, width = size
    image = PIL.Image.fromarray(np.ascontiguousarray(k[..., 0]))
    scale = max(height / image.height, width / image.width)
    scaled = image.resize(
        (max(width, round(image.width * scale)), max(height, round(image.height * scale))),
        PIL.Image.Resampling.BILINEAR,
    )
    left, top = (scaled.width - width) // 2, (scaled.height - height) // 2
    return np.asarray(scaled.crop((left, top, left + width, top + height))).reshape(height, width, -1)


def holds_arrays(data: datasets.Dataset, column: str) -> bool:
    """Whether a column holds arrays of numbers, not images or their paths.

    Raises:
        ValueError: there is no such column.
    """
    if column not in data.column_names:
        raise ValueError(f"The data set has no column {column!r}; it has {data.column_names}.")
    feature = data.features[column]
    return isinstance(feature, list) or hasattr(feature, "feature") or type(feature).__name__.startswith("Array")


def encoded_images(data: datasets.Dataset, columns: list[str]) -> datasets.Dataset:
    """The columns, the first of which holds images, left encoded: decoding is ours, so that a bad file is named."""
    try:
        selected, stored = data.select_columns(columns), str(getattr(data.features[columns[0]], "dtype", ""))
        # pandas 3 makes large strings of a CSV file's, and datasets 4.0 reads no images from those.
        if stored in {"large_string", "large_binary"}:
            selected = selected.cast_column(columns[0], datasets.Value(stored.removeprefix("large_")))
        return selected.cast_column(columns[0], datasets.Image(decode=False))
    except Exception as error:
        raise ValueError(f"Column {columns[0]!r} does not hold images: {data.features[columns[0]]}.") from error


def layout_of(
    data: datasets.Dataset, column: str, resolution: int | None, levels: int | None, channels: int | None
) -> Layout:
    """What some images of a data set, spread over it, have in common.

    Args:
        data: the images to train on.
        column: where they are.
        resolution: the side of what they are resized to; None keeps their own.
        levels: what is known already; None asks the files, or the arrays' type.
        channels: likewise.

    Raises:
        ValueError: an image that cannot be read, or one that does not say how many levels it has.
    """
    if holds_arrays(data, column):
        return _layout_of_arrays(data, column, resolution, levels, channels)
    count = min(FIRST_IMAGES, len(data))
    looked_at = [i * len(data) // count for i in range(count)]  # a folder's first files may be alike
    encoded = _rows(encoded_images(data, [column]), column, looked_at)
    first = decode_image(encoded[0], 0)
    size = (resolution, resolution) if resolution is not None else (first.k.shape[0], first.k.shape[1])
    found, asked = levels is None, channels is not None
    if levels is None or channels is None:
        images = [first, *(decode_image(own, i) for own, i in zip(encoded[1:], looked_at[1:]))]
        channels = channels or (1 if all(own.grey for own in images) else 3)
        levels = levels or _common_levels([own.levels for own in images], encoded)
    return Layout(channels, size, levels, found, asked)


def _common_levels(levels: list[int], encoded: list[Any]) -> int:
    """The most that an image has; 16 bits may hold fewer than they could, and say nothing of it."""
    most = max(levels)
    if most == 2**16:
        index = levels.index(most)
        raise ValueError(
            f"Image {image_name(encoded[index], index)} has 16 bits, which do not say how many levels are used: give "
            "`--levels 65536`, or 4096 for numbers of 12 bits."
        )
    return most


def _layout_of_arrays(
    data: datasets.Dataset, column: str, resolution: int | None, levels: int | None, asked: int | None
) -> Layout:
    """What the first array says, and the column's type."""
    if resolution is not None:
        raise ValueError(f"`--resolution` resizes images, but column {column!r} holds arrays.")
    shape = np.asarray(_rows(data.with_format("numpy", columns=[column]), column, [0])[0]).shape
    channels, *size = shape if len(shape) == 3 else (1, *shape)
    if len(size) != 2 or channels not in (1, 3):
        raise ValueError(
            f"Column {column!r} holds arrays of the shape {shape}, but images have (H, W) or (C, H, W) with 1 or 3 "
            "channels first."
        )
    if asked not in (None, channels):
        raise ValueError(f"`--channels {asked}` contradicts column {column!r}, whose arrays have {channels}.")
    kind = data.features[column]
    while isinstance(kind, list) or hasattr(kind, "feature"):
        kind = kind[0] if isinstance(kind, list) else kind.feature
    levels = levels or _LEVELS.get(kind.dtype)
    if levels is None:
        raise ValueError(f"Column {column!r} holds {kind.dtype}, which does not say how many levels: give `--levels`.")
    return Layout(channels, (size[0], size[1]), levels)


def read_column(
    data: datasets.Dataset, columns: list[str], layout: Layout, resize: bool, standard: str = "the first one is"
) -> "Arrays | Images":
    """The first of the columns as images x_0, whatever it holds, and a second as their labels.

    Args:
        data: of one split.
        columns: that of images or arrays, and that of labels if there is one.
        layout: of the images.
        resize: as of `Images`.
        standard: as of `Images`.

    Raises:
        ValueError: the column holds neither.
    """
    if holds_arrays(data, columns[0]):
        shape = (layout.channels, *layout.size)
        images: Images = Arrays(data.select_columns(columns), columns[0], shape, layout.levels, standard)
    else:
        images = Images(encoded_images(data, columns), columns[0], layout, resize, standard)
    images.label_column = next(iter(columns[1:]), None)
    return images
