"""Files and folders that are whole or not there, whatever is killed."""

import contextlib
import json
import os
import shutil
import uuid
import zlib
from pathlib import Path
from typing import Any

# Where what was measured of a pipeline lies in its folder: of `ddpm-vlb evaluate` and `sample-quality`.
MEASURED_FOLDERS = ("evaluation", "evaluation-????????", "sample_quality")


def write_json(content: dict[str, Any], path: Path) -> None:
    """Write JSON, whole."""
    write_whole((json.dumps(content, indent=2, allow_nan=False) + "\n").encode(), path)


def write_whole(content: bytes, path: Path) -> None:
    """Write a file aside, bring it to the disk and rename it, so that nothing ever leaves half a file."""
    aside = path.with_name(path.name + ".partial")
    aside.write_bytes(content)
    to_disk(aside)
    os.replace(aside, path)
    to_disk(path.parent)


def to_disk(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    if os.name == "nt" and path.is_dir():  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's content; nothing where it is not there or not whole."""
    with contextlib.suppress(OSError, ValueError):
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else {}
    return {}


def hidden(path: Path, why: str) -> Path:
    """A name beside a path that nothing has, nor another process on the same folder will take."""
    return path.with_name(f".{path.name.lstrip('.')}.{uuid.uuid4().hex[:8]}.{why}")


def remove(path: Path) -> None:
    """Remove a folder that may be in use, so that it is whole or gone for whoever writes or reads it."""
    gone = path
    if not path.name.endswith(".removed"):  # else a removal that was cut short
        gone = hidden(path, "removed")
        os.replace(path, gone)
    shutil.rmtree(gone, ignore_errors=True)


def crc32(path: Path) -> int:
    """The checksum of a file of any size."""
    value = 0
    with open(path, "rb") as file:
        while chunk := file.read(2**22):
            value = zlib.crc32(chunk, value)
    return value
