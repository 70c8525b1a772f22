"""Image files by their names, with the class labels beside them, and images as PNG files again.

Labels stand in metadata.jsonl or metadata.csv, with `file_name` and `label`, as `datasets` takes them in a folder.
"""

import collections
import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

import numpy as np
import PIL.Image

METADATA = "metadata.jsonl"
_ALSO = "metadata.csv"


class ImageFiles(NamedTuple):
    """Files, what they are called, and what else lies in their folders."""

    paths: list[str]
    names: list[str]
    left_out: list[str]


def find_images(given: Sequence[Path]) -> ImageFiles:
    """The image files among some paths: of a folder all that lie below it, in the order of their names.

    Args:
        given: files and folders.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no images, or two of one name.
    """
    kinds = set(PIL.Image.registered_extensions())  # which asks all plugins
    found, others = list[tuple[str, str]](), list[str]()
    for path in given:
        if path.is_dir():
            inside = sorted((file.relative_to(path).as_posix(), str(file)) for file in _visible(path))
            found += [own for own in inside if Path(own[0]).suffix.lower() in kinds]
            others += [name for name, _ in inside if Path(name).suffix.lower() not in kinds]
        elif path.is_file():
            found.append((path.name, str(path)))
        else:
            raise FileNotFoundError(f"{path}: there is no such file or folder.")
    names = [name for name, _ in found]
    twice = [name for name, number in collections.Counter(names).items() if number > 1]
    if twice:
        raise ValueError(f"Two images are called {twice[0]!r}: give the folder above them, or other names.")
    if not names:
        raise ValueError(f"There are no images in {', '.join(map(str, given))}.")
    left_out = [name for name in others if name not in (METADATA, _ALSO)]
    return ImageFiles([path for _, path in found], names, left_out)


def _visible(folder: Path) -> list[Path]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def read_labels(given: Sequence[Path], names: Sequence[str], column: str) -> list[int]:
    """Class labels of the images of a folder.

    Args:
        given: that folder.
        names: of its images.
        column: where the labels are.

    Raises:
        ValueError: no file of labels, or none for an image.
    """
    files = [path / name for path in given for name in (METADATA, _ALSO) if (path / name).is_file()]
    if len(given) > 1 or not files:
        raise ValueError(
            f"The network is class-conditional, but there are no labels: give one folder with a {METADATA} of lines "
            f'{{"file_name": "a.png", "{column}": 0}}, or name the data with `--dataset_name`.'
        )
    rows = {str(row.get("file_name")): row.get(column) for row in metadata_rows(files[0])}
    missing = [name for name in names if rows.get(name) is None]
    if missing:
        raise ValueError(f"{files[0]} has no {column!r} of image {missing[0]!r}.")
    try:
        return [int(str(rows[name])) for name in names]
    except ValueError as error:
        raise ValueError(f"{files[0]}: labels must be integers in {column!r}: {error}.") from error


def metadata_rows(path: Path) -> list[dict[str, Any]]:
    """What is told of the images of a folder.

    Args:
        path: its metadata.jsonl or metadata.csv.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file)) if path.name == _ALSO else [json.loads(line) for line in file]
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} cannot be read: its lines are no objects.")
    return rows


def check_png(shape: Sequence[int], levels: int) -> None:
    """Refuse images that a PNG file cannot hold.

    Args:
        shape: of one, (C, *).
        levels: of each value.

    Raises:
        ValueError: such images.
    """
    if len(shape) != 3 or shape[0] not in (1, 3) or levels > (2**16 if shape[0] == 1 else 256):
        raise ValueError(
            f"Images of shape {tuple(shape)} in {levels} levels are no PNG files, which are grey or of three colours "
            "in up to 256 levels, grey ones in up to 65536. `ddpm_vlb.compress` takes any tensor."
        )


def as_png(k: np.ndarray, levels: int) -> PIL.Image.Image:
    """An image of which a PNG file holds the levels as they are.

    Args:
        k: levels (C, H, W).
        levels: how many there are.
    """
    pixels = k[0] if len(k) == 1 else k.transpose(1, 2, 0)
    kind = bool if (levels, len(k)) == (2, 1) else np.uint8 if levels <= 256 else np.uint16
    return PIL.Image.fromarray(np.ascontiguousarray(pixels.astype(kind)))


def png_names(names: Sequence[str]) -> list[str]:
    """What files are called that hold the images as PNG; .jpg and the like are replaced where one name is left by it.

    Args:
        names: of the images.

    Raises:
        ValueError: a name that leads out of a folder, or two that are the same.
    """
    for name in names:
        parts = PurePosixPath(name).parts
        rooted = name.startswith("/") or PureWindowsPath(name).drive or "\\" in name or "\0" in name
        if rooted or not parts or ".." in parts:
            raise ValueError(f"An image is called {name!r}, which is no name of a file in a folder.")
    short = [PurePosixPath(name).with_suffix(".png").as_posix() for name in names]
    number = collections.Counter(short)
    own = [new if number[new] == 1 or new == name else f"{name}.png" for name, new in zip(names, short)]
    twice = [name for name, count in collections.Counter(own).items() if count > 1]
    if twice:
        raise ValueError(f"Two images would be called {twice[0]!r}.")
    return own


def move_into(stage: Path, folder: Path) -> None:
    """Bring finished files to their folder, which may hold others: each is whole or not there.

    Args:
        stage: where they lie, on the same disk.
        folder: where they shall lie.
    """
    if not folder.exists():
        os.replace(stage, folder)
        return
    for path in sorted(path for path in stage.rglob("*") if path.is_file()):
        target = folder / path.relative_to(stage)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
