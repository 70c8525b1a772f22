"""Image data for the commands: scikit-learn's digits by default, or whatever `datasets` can read.

Levels, not pixels: an image is x_0 = 2 k / (levels - 1) - 1 with integer k, so that bits/dim are those of the data as
it is stored. The split into training, validation and test images depends on the data alone, never on a seed;
it is written beside a trained pipeline as data.json, and `from_record` gives every later command the same images.
"""

import contextlib
import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import pyarrow

from ddpm_vlb.runtime.class_labels import columns_with_labels, trained_classes
from ddpm_vlb.runtime.image_sets import Images, layout_of, read_column

HUB_HINT = "Is the name right, can the Hub be reached (HF_ENDPOINT), and may you read it (HF_TOKEN)?"
TRAINING_IMAGES = 2  # at least, which have a variance
SPLIT_SEED = 0  # of the permutation that makes a missing split; a part of the format, like a file name
DIGITS_TEST_IMAGES = 297
_FILE_KINDS = {".parquet": "parquet", ".arrow": "arrow", ".json": "json", ".jsonl": "json", ".csv": "csv"}


@dataclass(frozen=True)
class ImageData:
    """The three splits, what they have in common, and the record that finds them again."""

    train: Images
    validation: Images
    test: Images
    size: tuple[int, ...]
    channels: int
    levels: int
    record: dict[str, Any]

    @property
    def classes(self) -> int | None:
        """The number of classes that the labels name; None where no label column was asked for."""
        return self.record.get("num_classes")

    @functools.cached_property
    def train_fingerprint(self) -> str:
        """Of the first training images, which are decoded for it once."""
        return fingerprint(self.train)


@contextlib.contextmanager
def named_data(name: str) -> Iterator[None]:
    """Name the data in faults of the Hub or its files; the system's, of a full disk, say, stay as they are."""
    try:
        yield
    except (OSError, pyarrow.ArrowException) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        said = " ".join(str(error).split()).rstrip(".")
        raise ValueError(f"--dataset_name {name} cannot be loaded: {said}. {HUB_HINT}") from error


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
        raise ValueError(f"`--dataset_name` {dataset_name!r} names no data set.")
    if dataset_name is not None and Path(dataset_name).is_file():
        kind = _FILE_KINDS.get(Path(dataset_name).suffix)
        if dataset_config_name is not None:
            raise ValueError(
                f"`--dataset_config_name` {dataset_config_name!r} has no effect: `--dataset_name` {dataset_name!r} is "
                "a file."
            )
        if kind is None:
            raise ValueError(f"`--dataset_name` {dataset_name!r} is a file, but none of {sorted(_FILE_KINDS)}.")
        return _load_dataset(kind, data_files=dataset_name, cache_dir=cache_dir)
    if dataset_name is not None:
        return _load_dataset(dataset_name, name=dataset_config_name, cache_dir=cache_dir)
    if not Path(str(train_data_dir)).is_dir():
        raise FileNotFoundError(f"`--train_data_dir` {train_data_dir!r} is not a folder.")
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
        raise ValueError(
            f"`--test_split` and `--train_split` are both {test_split!r}: trained images must not be scored."
        )
    if test_split is None:
        test_split = next((s for s in ("test", "validation") if s in splits and s != train_split), None)
    validated = "validation" in splits and "validation" not in (train_split, test_split)
    needed = TRAINING_IMAGES + (test_split is None) + (not validated)
    if len(train) < needed:
        raise ValueError(
            f"The data set has {len(train)} images in {train_split!r}, but needs {needed}: {TRAINING_IMAGES} to train "
            "on, and one each for the splits that it lacks."
        )
    if test_split is not None and len(_pick(splits, test_split)) == 0:
        raise ValueError(f"The split {test_split!r} is empty: there is nothing to score.")
    if test_split is None:
        parts = train.train_test_split(test_size=max(1, min(10_000, len(train) // 10)), seed=SPLIT_SEED)
        train, test = parts["train"], parts["test"]
    else:
        test = _pick(splits, test_split)
    if validated:
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
    levels: int | None = None,
    channels: int | None = None,
    label_column: str | None = None,
) -> ImageData:
    """Load a data set of images and split it.

    Args:
        dataset_name: a Hub name, a local folder or a data file; None (and no `train_data_dir`) for the digits.
        dataset_config_name: its configuration, if it has several.
        train_data_dir: a folder of image files.
        image_column: the column that holds the images, or arrays (C, H, W).
        train_split: name of the training split.
        test_split: name of the test split; None takes "test", else "validation", else a tenth of the training split.
        resolution: resize and crop the images to this square size; None keeps their own.
        cache_dir: where `datasets` keeps its files.
        levels: number of levels 0 .. levels - 1 of what is stored; None takes what files and arrays say.
        channels: 1 (grey) or 3 (colour); None looks at the first images.
        label_column: the column of the images' class labels; None: a network is told none.

    Raises:
        ValueError: no images, an unknown split or column, an image that cannot be read, or labels that are no class.
        FileNotFoundError: the data set is not there.
    """
    digits = dataset_name is None and train_data_dir is None
    if digits:
        splits = load_digits_splits()
    else:
        splits = load_splits(dataset_name, dataset_config_name, train_data_dir, cache_dir)
    train, validation, test, test_split = make_splits(splits, image_column, train_split, test_split)
    layout = layout_of(train, image_column, resolution, levels or (17 if digits else None), channels)
    resize = resolution is not None
    columns, labelled = [image_column], {}
    if label_column is not None:
        for part in (train, validation, test):
            columns = columns_with_labels(part, image_column, label_column)
        others = {"validation": validation, "test": test}
        labelled = {"label_column": label_column, "num_classes": trained_classes(train, others, label_column)}
    parts = [read_column(part, columns, layout, resize) for part in (train, validation, test)]
    record = {
        "dataset_name": dataset_name,
        "dataset_config_name": dataset_config_name,
        "train_data_dir": train_data_dir,
        "image_column": image_column,
        **labelled,
        "train_split": train_split,
        "test_split": test_split,
        "resolution": resolution,
        "size": list(layout.size),
        "channels": layout.channels,
        "levels": layout.levels,
        "split_seed": SPLIT_SEED,
        "num_images": {"train": len(train), "validation": len(validation), "test": len(test)},
        "test_fingerprint": fingerprint(parts[2]),
    }
    assert layout.levels is not None
    return ImageData(parts[0], parts[1], parts[2], layout.size, layout.channels, layout.levels, record)


def from_record(record: dict[str, Any], cache_dir: str | None = None) -> ImageData:
    """Load the data of a saved data.json again, and make sure that the test images are the same.

    Args:
        record: what `load_image_data` recorded.
        cache_dir: where `datasets` keeps its files.

    Raises:
        ValueError: the data has changed since.
    """
    names = "dataset_name dataset_config_name train_data_dir image_column train_split test_split resolution".split()
    # A split that was made is made again; it has no name in the data set.
    given = {name: record[name] for name in names}
    given |= {name: record.get(name) for name in ("levels", "channels", "label_column")}
    data = load_image_data(**given, cache_dir=cache_dir)
    if data.record["test_fingerprint"] != record["test_fingerprint"]:
        raise ValueError(
            "The test images are not those that the pipeline was trained beside: the data set has changed since "
            f"({data.record['num_images']} images, were {record['num_images']})."
        )
    return data


def data_name(record: dict[str, Any]) -> str:
    """Which images a number is of, in words.

    Args:
        record: of `load_image_data`, or of an evaluation.
    """
    name, folder = record.get("dataset_name"), record.get("train_data_dir")
    what = name or (f"the folder {folder}" if folder else "scikit-learn's digits")
    config = record.get("dataset_config_name")
    split = record.get("split") or record.get("test_split")
    whole = record.get("kept_back_from") or (None if split else record["train_split"])
    part = f"images kept back from split {whole!r}" if whole else f"split {split!r}"
    return f"{what}{f' ({config})' if config else ''}, {part}"


def fingerprint(images: Images, limit: int = 512) -> str:
    """A hash over the number of images, all their labels, and the levels of the first `limit` of them."""
    digest = hashlib.sha256(str(len(images)).encode())
    if images.label_column is not None:
        digest.update(images.labels().numpy().tobytes())
    for batch in images.batches(64, limit):
        digest.update(images.raw(batch).tobytes())
    return digest.hexdigest()[:32]
