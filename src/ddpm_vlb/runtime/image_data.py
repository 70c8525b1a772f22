"""Image data for the commands: scikit-learn's digits by default, or whatever `datasets` can read.

Levels, not pixels: an image is x_0 = 2 k / (levels - 1) - 1 with integer k, so that bits/dim are those of the data as
it is stored. The split into training, validation and test images depends on the data alone, never on a seed;
it is written beside a trained pipeline as data.json, and `from_record` gives every later command the same images.
"""

import contextlib
import functools
import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import PIL.ImageOps
import pyarrow
import torch
from torch import Tensor

HUB_HINT = "Is the name right, can the Hub be reached (HF_ENDPOINT), and may you read it (HF_TOKEN)?"
SPLIT_SEED = 0  # of the permutation that makes a missing split; a part of the format, like a file name
DIGITS_TEST_IMAGES = 297
GREY_MODES = ("1", "L")
_FILE_KINDS = {".parquet": "parquet", ".arrow": "arrow", ".json": "json", ".jsonl": "json", ".csv": "csv"}


class Images(torch.utils.data.Dataset):
    """Images of one split as x_0 tensors (C, H, W), decoded when they are asked for.

    Args:
        data: a dataset whose `column` holds encoded images.
        column: name of the image column.
        size: height and width to which images are resized and cropped, or which they must have.
        channels: 1 (grey) or 3 (colour).
        levels: number of levels of the stored values, 0 .. levels - 1.
        resize: resize and crop images of another size; otherwise they are refused.
        standard: what size and mode must agree with, for error messages.
    """

    def __init__(
        self,
        data: Any,
        column: str,
        size: tuple[int, int],
        channels: int,
        levels: int,
        resize: bool,
        standard: str = "the first one is",
    ):
        self.data, self.column, self.size, self.channels, self.levels = data, column, size, channels, levels
        self.resize, self.standard = resize, standard

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Tensor:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        encoded = self.data[indices][self.column]
        return [self._x_0(image, index) for image, index in zip(encoded, indices)]

    def _x_0(self, encoded: dict[str, Any], index: int) -> Tensor:
        image = decode_image(encoded, index)
        if self.channels == 1 and image.mode not in GREY_MODES:
            raise ValueError(
                f"Image {_image_name(encoded, index)} is in colour (mode {image.mode}), but {self.standard} grey: "
                "its colour would be lost. Store all images in one mode."
            )
        image = image.convert("L" if self.channels == 1 else "RGB")
        if image.size != self.size[::-1]:
            if not self.resize:
                raise ValueError(
                    f"Image {_image_name(encoded, index)} is {image.width} x {image.height}, but {self.standard} "
                    f"{self.size[1]} x {self.size[0]}. Pass `--resolution` to resize all images to one size."
                )
            image = _resize_and_crop(image, self.size)
        k = np.asarray(image, dtype=np.int64).reshape(*self.size, self.channels)
        if k.max() >= self.levels:
            raise ValueError(
                f"Image {_image_name(encoded, index)} has the level {k.max()}, above {self.levels - 1}. "
                f"The data has more levels than the {self.levels} that the checkpoint scores: requantise it, or take "
                "a checkpoint of its levels."
            )
        return torch.from_numpy(np.ascontiguousarray(k.transpose(2, 0, 1))).float() * (2 / (self.levels - 1)) - 1

    def raw(self, x_0: Tensor) -> np.ndarray:
        """A batch of this data as it is stored: integer levels."""
        return ((x_0 + 1) * ((self.levels - 1) / 2)).round().to(torch.uint8).numpy()

    def batches(self, batch_size: int, limit: int | None = None) -> Iterator[Tensor]:
        """Batches in the order of the data, each image exactly once, at most `limit` of them."""
        total = len(self) if limit is None else min(limit, len(self))
        for start in range(0, total, batch_size):
            yield torch.stack(self.__getitems__(list(range(start, min(start + batch_size, total)))))


@dataclass(frozen=True)
class ImageData:
    """The three splits, what they have in common, and the record that finds them again."""

    train: Images
    validation: Images
    test: Images
    size: tuple[int, int]
    channels: int
    levels: int
    record: dict[str, Any]

    @functools.cached_property
    def train_fingerprint(self) -> str:
        """Of the first training images, which are decoded for it once."""
        return fingerprint(self.train)


@contextlib.contextmanager
def named_data(name: str) -> Iterator[None]:
    """Name the data in faults of the Hub or its files; the system's, of a full disk, say, stay as they are."""
    try:
        yield
    except (OSError, pyarrow.ArrowInvalid) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        said = " ".join(str(error).split()).rstrip(".")
        raise ValueError(f"--dataset_name {name} cannot be loaded: {said}. {HUB_HINT}") from error


def decode_image(encoded: dict[str, Any] | None, index: int) -> PIL.Image.Image:
    """Decode one image; an unreadable one is named."""
    if encoded is None:
        raise ValueError(f"Image number {index} is missing: its row is null.")
    try:
        source = io.BytesIO(encoded["bytes"]) if encoded["bytes"] is not None else encoded["path"]
        image = PIL.Image.open(source)
        image.load()
    except Exception as error:
        raise ValueError(f"Image {_image_name(encoded, index)} cannot be read: {error}") from error
    if image.mode.startswith(("I", "F")):
        raise ValueError(
            f"Image {_image_name(encoded, index)} has the mode {image.mode}, of more than 8 bits: cutting it to 256 "
            "levels would score other data than what is stored. Convert the images to 8 bits first."
        )
    return PIL.ImageOps.exif_transpose(image)


def _image_name(encoded: dict[str, Any], index: int) -> str:
    return f"{encoded['path']!r}" if encoded.get("path") else f"number {index}"


def _resize_and_crop(image: PIL.Image.Image, size: tuple[int, int]) -> PIL.Image.Image:
    """Scale to cover `size`, then cut out the centre; levels stay 8-bit."""
    height, width = size
    scale = max(height / image.height, width / image.width)
    scaled = image.resize(
        (max(width, round(image.width * scale)), max(height, round(image.height * scale))),
        PIL.Image.Resampling.BILINEAR,
    )
    left, top = (scaled.width - width) // 2, (scaled.height - height) // 2
    return scaled.crop((left, top, left + width, top + height))


def load_digits_splits() -> datasets.DatasetDict:
    """Scikit-learn's digits as images of 17 levels with their labels, split into train and test."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = [PIL.Image.fromarray(image.astype(np.uint8)) for image in digits.images]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    data = datasets.Dataset.from_dict({"image": images, "label": digits.target}, features=features)
    return data.train_test_split(test_size=DIGITS_TEST_IMAGES, seed=SPLIT_SEED)


def load_splits(
    dataset_name: str | None, dataset_config_name: str | None, train_data_dir: str | None, cache_dir: str | None
):
    """The data set's own splits, from a Hub name, a folder or a file, or from a folder of image files."""
    if dataset_name is not None and not dataset_name.strip("/"):
        raise ValueError(f"`dataset_name` {dataset_name!r} names no data set.")
    if dataset_name is not None and Path(dataset_name).is_file():
        kind = _FILE_KINDS.get(Path(dataset_name).suffix)
        if kind is None:
            raise ValueError(f"`dataset_name` {dataset_name!r} is a file, but none of {sorted(_FILE_KINDS)}.")
        return _load_dataset(kind, data_files=dataset_name, cache_dir=cache_dir)
    if dataset_name is not None:
        return _load_dataset(dataset_name, name=dataset_config_name, cache_dir=cache_dir)
    if not Path(str(train_data_dir)).is_dir():
        raise FileNotFoundError(f"`train_data_dir` {train_data_dir!r} is not a folder.")
    return _load_dataset("imagefolder", data_dir=train_data_dir, cache_dir=cache_dir)


def _load_dataset(path: str, **options: Any) -> Any:
    """What `datasets` loads; its faults as the system's or as values that can be mended."""
    try:
        return datasets.load_dataset(path, **options)
    except (OSError, ValueError):
        raise
    except Exception as error:  # its own, YAML's, pandas' and whatever else a file's content leads to
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and cause.errno is not None:  # a full disk, say
            raise cause from error
        raise OSError(f"{type(cause).__name__}: {cause}") from error


def _pick(splits: datasets.DatasetDict, name: str) -> datasets.Dataset:
    if name not in splits:
        raise ValueError(f"The data set has no split {name!r}; it has {sorted(splits)}.")
    return splits[name]


def encoded_images(data: datasets.Dataset, columns: list[str]) -> datasets.Dataset:
    """The columns, the first of which holds images, left encoded: decoding is ours, so that a bad file is named."""
    try:
        return data.select_columns(columns).cast_column(columns[0], datasets.Image(decode=False))
    except Exception as error:
        raise ValueError(f"Column {columns[0]!r} does not hold images: {data.features[columns[0]]}.") from error


def make_splits(
    splits: Any, image_column: str, train_split: str = "train", test_split: str | None = None
) -> tuple[datasets.Dataset, datasets.Dataset, datasets.Dataset, str | None]:
    """The training, validation and test parts of a data set, and the name of the last, None where it had to be made.

    Args:
        splits: the data set's own splits.
        image_column: the column that holds the images.
        train_split: name of the training split.
        test_split: name of the test split; None takes "test", else "validation", else a tenth of the training split.

    Raises:
        ValueError: no images, or an unknown split or column.
    """
    if not isinstance(splits, datasets.DatasetDict):
        splits = datasets.DatasetDict({train_split: splits})
    train = _pick(splits, train_split)
    if image_column not in train.column_names:
        raise ValueError(f"The data set has no column {image_column!r}; it has {train.column_names}.")
    if test_split == train_split:
        raise ValueError(f"`test_split` and `train_split` are both {test_split!r}: trained images must not be scored.")
    if test_split is None:
        test_split = next((s for s in ("test", "validation") if s in splits and s != train_split), None)
    if len(train) < 3 or (test_split is not None and len(_pick(splits, test_split)) == 0):
        raise ValueError(f"The data set is empty: {len(train)} training images are too few to train and test on.")
    if test_split is None:
        parts = train.train_test_split(test_size=max(1, min(10_000, len(train) // 10)), seed=SPLIT_SEED)
        train, test = parts["train"], parts["test"]
    else:
        test = _pick(splits, test_split)
    if "validation" in splits and "validation" not in (train_split, test_split):
        validation = splits["validation"]
    else:
        parts = train.train_test_split(test_size=max(1, min(1024, len(train) // 20)), seed=SPLIT_SEED)
        train, validation = parts["train"], parts["test"]
    return train, validation, test, test_split


def load_image_data(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_data_dir: str | None = None,
    image_column: str = "image",
    train_split: str = "train",
    test_split: str | None = None,
    resolution: int | None = None,
    cache_dir: str | None = None,
) -> ImageData:
    """Load a data set of images and split it.

    Args:
        dataset_name: a Hub name, a local folder or a data file; None (and no `train_data_dir`) for the digits.
        dataset_config_name: its configuration, if it has several.
        train_data_dir: a folder of image files.
        image_column: the column that holds the images.
        train_split: name of the training split.
        test_split: name of the test split; None takes "test", else "validation", else a tenth of the training split.
        resolution: resize and crop the images to this square size; None keeps their own.
        cache_dir: where `datasets` keeps its files.

    Raises:
        ValueError: no images, an unknown split or column, or an image that cannot be read.
        FileNotFoundError: the data set is not there.
    """
    digits = dataset_name is None and train_data_dir is None
    if digits:
        splits = load_digits_splits()
    else:
        splits = load_splits(dataset_name, dataset_config_name, train_data_dir, cache_dir)
    train, validation, test, test_split = make_splits(splits, image_column, train_split, test_split)
    train, validation, test = (encoded_images(part, [image_column]) for part in (train, validation, test))
    first = decode_image(train[0][image_column], 0)
    channels = 1 if first.mode in GREY_MODES else 3
    size = (resolution, resolution) if resolution is not None else (first.height, first.width)
    levels = 17 if digits else 256
    parts = [
        Images(part, image_column, size, channels, levels, resolution is not None)
        for part in (train, validation, test)
    ]
    record = {
        "dataset_name": dataset_name,
        "dataset_config_name": dataset_config_name,
        "train_data_dir": train_data_dir,
        "image_column": image_column,
        "train_split": train_split,
        "test_split": test_split,
        "resolution": resolution,
        "size": list(size),
        "channels": channels,
        "levels": levels,
        "split_seed": SPLIT_SEED,
        "num_images": {"train": len(train), "validation": len(validation), "test": len(test)},
        "test_fingerprint": fingerprint(parts[2]),
    }
    return ImageData(parts[0], parts[1], parts[2], size, channels, levels, record)


def from_record(record: dict[str, Any], cache_dir: str | None = None) -> ImageData:
    """Load the data of a saved data.json again, and make sure that the test images are the same.

    Args:
        record: what `load_image_data` recorded.
        cache_dir: where `datasets` keeps its files.

    Raises:
        ValueError: the data has changed since.
    """
    names = "dataset_name dataset_config_name train_data_dir image_column train_split test_split resolution".split()
    given = {name: record[name] for name in names}
    # A split that was made is made again; it has no name in the data set.
    data = load_image_data(**given, cache_dir=cache_dir)
    if data.record["test_fingerprint"] != record["test_fingerprint"]:
        raise ValueError(
            "The test images are not those that the pipeline was trained beside: the data set has changed since "
            f"({data.record['num_images']} images, were {record['num_images']})."
        )
    return data


def fingerprint(images: Images, limit: int = 512) -> str:
    """A hash over the number of images and the levels of the first `limit` of them."""
    digest = hashlib.sha256(str(len(images)).encode())
    for batch in images.batches(64, limit):
        digest.update(images.raw(batch).tobytes())
    return digest.hexdigest()[:32]
