"""The images that `ddpm-vlb evaluate` scores, in the order of the data set, and others of the same kind for its pilot.

Beside image files these may be arrays (C, H, W): integers are levels; floats are x_0 itself, already on its levels
in [-1, 1], or continuous (latents).
"""

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import Any

import datasets
from torch import Tensor

from ddpm_vlb import pilot_positions
from ddpm_vlb.runtime.class_labels import check_labels, columns_with_labels
from ddpm_vlb.runtime.image_data import data_name, from_record, load_digits_splits, load_splits, make_splits
from ddpm_vlb.runtime.image_sets import Arrays, Images, Layout, encoded_images, holds_arrays, layout_of, read_column
from ddpm_vlb.runtime.stored_images import decode_image

RESERVED_SHARE = 10  # of a data set of one split every tenth image goes to the pilot, at most 1024


TAKES = "the model takes"


@dataclass(frozen=True)
class NetworkShape:
    """What a checkpoint can score: channels, size, levels (None: continuous) and number of classes (None: none)."""

    channels: int
    size: tuple[int, ...] | None
    levels: int | None
    classes: int | None


@dataclass(frozen=True)
class ScoringData:
    """The images to score, other images for the pilot, the levels of both, and what finds them again."""

    scored: "Arrays | Images"
    other: "Arrays | Images"
    levels: int | None
    record: dict[str, Any]

    @property
    def name(self) -> str:
        """Which images these are, in words."""
        return data_name(self.record)

    def batch(self, images: "Arrays | Images", indices: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """Images x_0 and the network's further arguments for them."""
        return images.batch(indices)


def load_scoring_data(
    network: NetworkShape,
    split: str = "test",
    record: dict[str, Any] | None = None,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    resolution: int | None = None,
    num_images: int | None = None,
    cache_dir: str | None = None,
    levels_given: bool = False,
    check: bool = True,
    pilot: bool = True,
) -> ScoringData:
    """Load the split to score, and other images.

    Args:
        network: what the checkpoint takes. Its 256 levels, the default where a stock checkpoint says nothing, give way
            to the digits' own 17.
        split: a split of the data set; with a `record`, "train", "validation" or "test" as `ddpm-vlb train` made them.
        record: a data.json, read when no data set is named; else the digits.
        dataset_name: a Hub name, a local folder or a data file.
        dataset_config_name: its configuration, if it has several.
        image_column: the column of images or arrays; None: the record's, else "image".
        label_column: the column of class labels, for a class-conditional network; None: the record's, else "label".
        resolution: resize and crop images to this square size.
        num_images: score only the first so many.
        cache_dir: where `datasets` keeps its files.
        levels_given: the network's levels were asked for, and the digits keep them.
        check: read all images, to refuse what cannot be scored and fingerprint the rest; one process is enough.
        pilot: take other images for it; without one nothing is kept back, and they are the split's own.

    Raises:
        ValueError: an unknown split or column, no images, or images that the checkpoint does not take.
        FileNotFoundError, ConnectionError: the data set is not there, or cannot be reached.
    """
    recorded = record if dataset_name is None else None
    _check_effect(recorded, dataset_name, dataset_config_name, image_column, resolution)
    source = recorded or {"dataset_name": dataset_name, "dataset_config_name": dataset_config_name}
    named = {name: source.get(name) for name in ("dataset_name", "dataset_config_name", "train_data_dir")}
    digits = named["dataset_name"] is None and named["train_data_dir"] is None
    if recorded is not None:
        from_record(recorded, cache_dir)  # only to make sure that the data is still the same
        image_column, resolution = recorded["image_column"], recorded["resolution"]
    image_column = image_column or "image"
    if network.classes is None and label_column is not None:
        raise ValueError(f"`--label_column {label_column}` has no effect: no labels are taken here.")
    parts = load_digits_splits() if digits else load_splits(**named, cache_dir=cache_dir)
    parts = dict(parts) if isinstance(parts, datasets.DatasetDict) else {"train": parts}
    kept_back_from = None
    if recorded is not None or (digits and split == "validation"):
        if split in ("test", "validation") and split not in parts and source.get("test_split") is None:
            kept_back_from = source.get("train_split", "train")
        chosen = [source.get("train_split", "train"), source.get("test_split")]
        made = make_splits(datasets.DatasetDict(parts), image_column, *chosen)
        parts = dict(zip(("train", "validation", "test"), made))
    scored, other, other_name = _scored_and_other(parts, split, pilot)
    total = len(scored) if num_images is None else min(num_images, len(scored))
    scored = scored.select(range(total))
    if digits and network.levels == 256 and not levels_given:
        network = dataclasses.replace(network, levels=17)
    columns = [image_column]
    if network.classes is not None:
        label_column = label_column or (recorded or {}).get("label_column") or "label"
        columns = columns_with_labels(scored, image_column, label_column)
    channels = (recorded or {}).get("channels")
    to_score = _as_images(scored, columns, network, resolution, channels)
    # Of the pilot's split only the images that it takes, spread over it.
    other = other.select(pilot_positions(len(other), to_score[0].numel()))
    images = [to_score, _as_images(other, columns, network, resolution, channels)]
    if network.classes is not None:
        for part in images:
            check_labels(part.data[columns[1]], columns[1], network.classes)
    record = {
        **named,
        "image_column": image_column,
        "label_column": columns[1] if network.classes is not None else None,
        "resolution": resolution,
        "split": split,
        "kept_back_from": kept_back_from,
        "levels": network.levels,
        "num_images": total,
        "fingerprint": _checked(images[0], columns[1:]) if check else None,
        "pilot_split": other_name,
        "num_pilot_images": len(images[1]),
        "pilot_fingerprint": _checked(images[1], columns[1:]) if check and pilot else None,
    }
    return ScoringData(images[0], images[1], network.levels, record)


def load_image_files(
    network: NetworkShape, paths: list[str], labels: list[int] | None, resolution: int | None = None
) -> ScoringData:
    """Image files as the network takes them, without others for a pilot.

    Args:
        network: what the checkpoint takes.
        paths: of the files, in their order.
        labels: class labels of the images, for a class-conditional network.
        resolution: resize and crop images to this square size.

    Raises:
        ValueError: an image or a label that the checkpoint does not take.
    """
    columns = {"image": paths} if labels is None else {"image": paths, "label": labels}
    data = datasets.Dataset.from_dict(columns)
    if labels is not None:
        check_labels(labels, "label", network.classes or 0)
    images = _as_images(data, list(columns), network, resolution, None)
    return ScoringData(images, images, network.levels, {})


def _check_effect(
    recorded: dict[str, Any] | None, name: str | None, config: str | None, column: str | None, resolution: int | None
) -> None:
    """Refuse options that would be passed over."""
    if config is not None and name is None:
        raise ValueError(f"`--dataset_config_name {config}` has no effect without `--dataset_name`.")
    if recorded is None:
        return
    for option, value in {"image_column": column, "resolution": resolution}.items():
        if value is not None and value != recorded[option]:
            raise ValueError(
                f"`--{option} {value}` has no effect: the model's data.json says {recorded[option]}. Leave it out, or "
                "name the data with `--dataset_name`."
            )


def _checked(images: "Arrays | Images", label_columns: list[str]) -> str:
    """A hash over all images and labels, once each has been found fit to be scored."""
    digest = hashlib.sha256(str(len(images)).encode())
    for batch in images.batches(64):
        digest.update(images.raw(batch).tobytes())
    for column in label_columns:
        digest.update(str(images.data[column][:]).encode())
    return digest.hexdigest()[:32]


def _scored_and_other(parts: Any, split: str, pilot: bool) -> tuple[datasets.Dataset, datasets.Dataset, str | None]:
    """The split, and another one for the pilot; where there is only one, the pilot's images are not scored."""
    if split not in parts:
        raise ValueError(
            f"The data set has no split {split!r}; it has {sorted(parts)}. Choose one with `--split`; of a data set "
            "with a single split some images are kept back for the pilot."
        )
    if len(parts[split]) == 0:
        raise ValueError(f"The split {split!r} holds no images.")
    if not pilot:
        return parts[split], parts[split], None
    others = [name for name in ("train", "validation", "test", *parts) if name in parts and name != split]
    found = next((name for name in others if len(parts[name]) >= 2), None)
    if found is not None:
        return parts[split], parts[found], found
    total = len(parts[split])
    if total < 4:
        raise ValueError(f"The data set's only split has {total} images: too few to score some and keep others back.")
    kept_back = range(0, total, max(RESERVED_SHARE, -(-total // 1024)) if total >= 2 * RESERVED_SHARE else 2)
    scored = sorted(set(range(total)) - set(kept_back))
    return parts[split].select(scored), parts[split].select(kept_back), f"{split} (kept back)"


def _as_images(
    data: datasets.Dataset, columns: list[str], network: NetworkShape, resolution: int | None, trained: int | None
) -> "Arrays | Images":
    """The columns as the network takes them; `trained` channels are what training took these images for."""
    if holds_arrays(data, columns[0]):
        if network.size is None:
            raise ValueError(f"Column {columns[0]!r} holds arrays, but the model's config has no `sample_size`.")
        if resolution is not None:
            raise ValueError(f"`--resolution` resizes images, but column {columns[0]!r} holds arrays.")
        return read_column(data, columns, Layout(network.channels, network.size, network.levels), False, TAKES)
    if network.size is not None and len(network.size) != 2:
        raise ValueError(
            f"Column {columns[0]!r} holds images, but the model takes arrays of shape "
            f"{(network.channels, *network.size)}, channels first. Name their column with `--image_column`."
        )
    first = decode_image(encoded_images(data, columns)[0][columns[0]], 0)
    # Grey files among those in colour have equal channels there, as in training; so have grey images in colour files.
    layout = layout_of(data, columns[0], resolution, network.levels or first.levels, None)
    if network.channels not in (layout.channels, first.k.shape[2], trained):
        kind = "grey (1 channel)" if layout.channels == 1 else "in colour (3 channels)"
        raise ValueError(f"The images are {kind}, but the model takes {network.channels} channel(s).")
    size = network.size or (first.k.shape[0], first.k.shape[1])
    if resolution is not None and (resolution, resolution) != size:
        raise ValueError(f"`--resolution {resolution}` is not the size that the model takes, {size[1]} x {size[0]}.")
    # A continuous checkpoint takes the levels of a file as they are.
    levels = network.levels if network.levels is not None else max(256, first.levels)
    return read_column(data, columns, Layout(network.channels, size, levels), resolution is not None, TAKES)
