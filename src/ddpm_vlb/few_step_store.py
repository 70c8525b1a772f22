"""What a scheduler's checkpoint stores for few steps: paths, and the errors that optimal variances come from.

Both lie in a JSON file beside the configuration, as `optimal_paths` and `x_0_mse`, and the errors of each pixel in a
file beside that one; each is named by its content, so that a configuration cannot be taken with another's file. What a
configuration itself holds is the name of the first, and in files of older versions the two entries themselves.
"""

import contextlib
import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import logging
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .configurations import FEW_STEPS, read_config
from .respacing import SquaredErrors, StoredPath

logger = logging.get_logger(SchedulerMixin.__module__)  # what `diffusers.utils.logging` sets is ours too
_PIXELS = re.compile(r"x_0_mse-[0-9a-f]{12}\.safetensors")
_NAME = re.compile(r"few_steps-[0-9a-f]{12}\.json")
STORED_FILES = ("few_steps-*.json", "x_0_mse-*.safetensors")
"""Patterns of what lies beside a configuration."""


@dataclass(frozen=True, eq=False)
class FewStepStore:
    """The paths and errors of one chain.

    Args:
        last: the chain's last timestep that can be visited.
        paths: by their number of steps.
        errors: what optimal variances come from, if they are known.
        file: the name of the file with the errors of each pixel; None without one.
        unknown: the name of the file with all of it, where that has not been read.

    Raises:
        ValueError: errors of another chain, or a name that is none of ours.
    """

    last: int
    paths: Mapping[int, StoredPath]
    errors: SquaredErrors | None = None
    file: str | None = None
    unknown: str | None = None

    def __post_init__(self) -> None:
        if self.unknown is not None and not (isinstance(self.unknown, str) and _NAME.fullmatch(self.unknown)):
            raise ValueError(f"`few_steps_file` must be named few_steps-*.json, but is {self.unknown!r:.80}.")
        if self.errors is None:
            return
        steps = self.errors.timesteps
        if (int(steps[0]), int(steps[-1])) != (0, self.last):
            raise ValueError(
                f"`x_0_mse` reaches from timestep {int(steps[0])} to {int(steps[-1])}, but this chain from 0 to "
                f"{self.last}: it was made for another chain. Make it anew with `ddpm-vlb optimize-timesteps`."
            )

    @classmethod
    def from_config(
        cls, optimal_paths: Any, x_0_mse: Any, last: int, few_steps_file: str | None = None
    ) -> "FewStepStore":
        """What a configuration or the file beside it holds, without the errors of each pixel.

        Args:
            optimal_paths: what stands there under this name.
            x_0_mse: likewise.
            last: the chain's last timestep that can be visited.
            few_steps_file: the name that a configuration has in place of the two.

        Raises:
            ValueError: no such entries, or those of another chain.
        """
        known = optimal_paths is not None or x_0_mse is not None
        return cls(last, _paths(optimal_paths, last), *_errors(x_0_mse), None if known else few_steps_file)

    @functools.cached_property
    def content(self) -> str:
        """The file's text; empty where nothing is stored or it is not known."""
        if not self.paths and self.errors is None:
            return ""
        entries = to_config(tuple(self.paths.values()), self.errors)
        if entries["x_0_mse"] is not None:
            entries["x_0_mse"]["per_pixel_file"] = self.file
        return json.dumps(entries, indent=2, sort_keys=True) + "\n"

    @property
    def name(self) -> str | None:
        """The file's name; None where nothing is stored."""
        return _name_of(self.content.encode()) if self.content else self.unknown

    def check_known(self) -> None:
        """Refuse to say what is not known.

        Raises:
            ValueError: the file has not been read.
        """
        if self.unknown is not None:
            raise ValueError(
                f"The stored paths and variances are unknown here: they lie in {self.unknown} beside the scheduler's "
                "configuration, and this scheduler was made from the configuration alone, or the file was missing. "
                "Load it with `DDPMVLBScheduler.from_pretrained` or `DDPMVLBPipeline.from_pretrained`, or name a "
                "usual `timestep_spacing`."
            )

    def rows(self, variance: str, timesteps: Sequence[int] | Tensor) -> Tensor | None:
        """The errors at some timesteps that an optimal variance comes from; None for the network's own.

        Args:
            variance: "network", "analytic" or "per_pixel".
            timesteps: (K,).

        Raises:
            ValueError: the errors are not there.
        """
        if variance == "network":
            return None
        self.check_known()
        if self.errors is None:
            raise ValueError(
                f"The variance {variance!r} needs `x_0_mse`, which this configuration does not have. "
                "`ddpm-vlb optimize-timesteps` makes it."
            )
        if variance == "per_pixel" and self.errors.per_pixel is None:
            raise ValueError(
                "The variance 'per_pixel' needs the errors of each pixel, from the file "
                f"{self.file or 'x_0_mse-*.safetensors'} beside the scheduler's configuration: it is missing, "
                "or the scheduler was made from a configuration alone. Load it with `DDPMVLBScheduler.from_pretrained`"
                " or `DDPMVLBPipeline.from_pretrained`, or take another `timestep_spacing`."
            )
        return self.errors.at(timesteps, variance)

    def save(self, folder: Path) -> None:
        """Write the files into a folder, in place of its former ones; warns of what is not known.

        Args:
            folder: where the configuration lies; made if it is not there.
        """
        if self.unknown is not None:
            logger.warning(
                f"{self.unknown} is not saved: this scheduler was made from a configuration alone, or the file was "
                "missing. The paths and variances in it cannot be used until it lies beside the configuration."
            )
            return
        for stale in folder.glob(STORED_FILES[0]):
            if stale.name != self.name:
                stale.unlink()
        if self.name is not None:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / self.name).write_text(self.content, encoding="utf-8")
        self._save_pixels(folder)

    def _save_pixels(self, folder: Path) -> None:
        if self.errors is not None and self.errors.per_pixel is not None:
            assert self.file is not None
            folder.mkdir(parents=True, exist_ok=True)
            for stale in folder.glob("x_0_mse-*.safetensors"):
                stale.unlink()
            save_file({"x_0_mse": self.errors.per_pixel.contiguous()}, folder / self.file)
        elif self.file is not None:
            logger.warning(
                f"{self.file} is not saved: this scheduler was made from a configuration alone, or the file "
                "was missing. The variances of each pixel cannot be used until it lies beside the configuration."
            )

    def with_file(self, root: str, subfolder: str | None, where: dict[str, Any]) -> "FewStepStore":
        """With what lies in the files; without them a scheduler works until it is asked for.

        Args:
            root: a folder, or the name of a Hub repository.
            subfolder: where the configuration lies in it.
            where: arguments of `hf_hub_download`.

        Raises:
            OSError, ValueError: a file that cannot be read, or does not fit the configuration.
        """
        known = self
        if self.unknown is not None:
            path = _fetch(root, subfolder, self.unknown, where, "the stored paths and variances")
            known = self if path is None else self._of(path)
        if known.file is None:
            return known
        path = _fetch(root, subfolder, known.file, where, "the variances of each pixel")
        if path is None:
            return known
        assert known.errors is not None
        try:
            pixels = _read(path, len(known.errors.mean))
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}.") from error
        if _file_of(pixels) != known.file:
            raise ValueError(f"{path} is damaged or another: its name is not that of its content.")
        return replace(known, errors=replace(known.errors, per_pixel=pixels))

    def _of(self, path: Path) -> "FewStepStore":
        """What the JSON file holds, if its content is that of its name."""
        entries = read_config(path)
        if _name_of(path.read_bytes()) != self.unknown:
            raise ValueError(f"{path} is damaged or another: its name is not that of its content.")
        if set(entries) != set(FEW_STEPS):
            raise ValueError(f"{path} must hold {' and '.join(FEW_STEPS)}, but holds {sorted(entries)!r:.80}.")
        return FewStepStore.from_config(entries["optimal_paths"], entries["x_0_mse"], self.last)


def _fetch(root: str, subfolder: str | None, name: str, where: dict[str, Any], what: str) -> Path | None:
    """A file beside a configuration, from a folder or the Hub; None, with a warning, where it is missing."""
    path = Path(root, subfolder or "", name)
    with contextlib.suppress(FileNotFoundError, EntryNotFoundError):
        if not Path(root).is_dir():
            return Path(hf_hub_download(root, name, subfolder=subfolder, **where))
        if path.exists():
            return path
    logger.warning(f"{path} is missing: {what} cannot be used until it is there.")
    return None


def storable(errors: SquaredErrors) -> SquaredErrors:
    """Errors in the precision in which they are stored.

    Args:
        errors: of any.
    """
    pixels = None if errors.per_pixel is None else errors.per_pixel.cpu().float()
    return replace(errors, mean=errors.mean.double(), per_pixel=pixels)


def to_config(paths: Sequence[StoredPath], errors: SquaredErrors | None) -> dict[str, Any]:
    """The entries of the file.

    Args:
        paths: of different numbers of steps.
        errors: as `storable` makes them.
    """
    entry = None
    if errors is not None:
        file = None if errors.per_pixel is None else _file_of(errors.per_pixel)
        entry = {"timesteps": errors.timesteps.tolist(), "mean": errors.mean.tolist(), "per_pixel_file": file}
    ascending = sorted(paths, key=lambda own: len(own.timesteps))
    return {"optimal_paths": [path.to_config() for path in ascending] or None, "x_0_mse": entry}


def check_image_shape(errors: SquaredErrors | None, shape: tuple[int, ...] | None) -> None:
    """Refuse errors of each pixel that are not those of a network's images.

    Args:
        errors: of a scheduler.
        shape: of the network's samples, (C, *); None where it is not known.

    Raises:
        ValueError: images of another shape.
    """
    if errors is None or errors.per_pixel is None or shape is None:
        return
    if tuple(errors.per_pixel.shape[1:]) != shape:
        raise ValueError(
            f"The scheduler's variances of each pixel are for images of shape {tuple(errors.per_pixel.shape[1:])}, "
            f"but the network makes {shape}: they were made for another network. Make them anew with "
            "`ddpm-vlb optimize-timesteps`."
        )


def _paths(entries: Any, last: int) -> dict[int, StoredPath]:
    """The paths of a configuration, by their number of steps."""
    if entries is None:
        return {}
    paths: dict[int, StoredPath] = {}
    if not isinstance(entries, (list, tuple)):
        raise ValueError(f"`optimal_paths` must be a list of paths, but is {entries!r:.80}.")
    for entry in entries:
        if not isinstance(entry, dict) or set(entry) != {"timesteps", "variance", "decoder_shift"}:
            raise ValueError(
                "Each path of `optimal_paths` must have `timesteps`, `variance` and `decoder_shift`, but one is "
                f"{entry!r:.80}."
            )
        steps = entry["timesteps"] if isinstance(entry["timesteps"], (list, tuple)) else ()
        path = StoredPath(tuple(steps), entry["variance"], entry["decoder_shift"])
        if path.timesteps[0] != last:
            raise ValueError(
                f"A path of `optimal_paths` starts at timestep {path.timesteps[0]}, but this chain's last is {last}: "
                "it was made for another chain. Make it anew with `ddpm-vlb optimize-timesteps`."
            )
        if len(path.timesteps) in paths:
            raise ValueError(f"`optimal_paths` holds two paths of {len(path.timesteps)} steps.")
        paths[len(path.timesteps)] = path
    return paths


def _errors(entry: Any) -> tuple[SquaredErrors | None, str | None]:
    """The errors that a configuration holds, and the name of the file with those of each pixel."""
    if entry is None:
        return None, None
    if not isinstance(entry, dict) or set(entry) != {"timesteps", "mean", "per_pixel_file"}:
        raise ValueError(f"`x_0_mse` must have `timesteps`, `mean` and `per_pixel_file`, but is {entry!r:.80}.")
    steps, mean, file = (entry[name] for name in ("timesteps", "mean", "per_pixel_file"))
    if file is not None and not (isinstance(file, str) and _PIXELS.fullmatch(file)):
        raise ValueError(f"`x_0_mse`'s `per_pixel_file` must be named x_0_mse-*.safetensors, but is {file!r:.80}.")
    whole = isinstance(steps, (list, tuple)) and all(type(t) is int and abs(t) < 2**31 for t in steps)
    # A larger integer is no float.
    numbers = isinstance(mean, (list, tuple)) and all(type(m) in (int, float) and abs(m) < 1e300 for m in mean)
    if not whole or not numbers:
        raise ValueError("`x_0_mse`'s `timesteps` must be a list of integers and `mean` one of numbers, all finite.")
    return SquaredErrors(torch.tensor(steps, dtype=torch.int64), torch.tensor(mean, dtype=torch.float64)), file


def _read(path: Path, rows: int) -> Tensor:
    """The errors of each pixel from a file."""
    with safe_open(path, "pt") as file:
        # Before anything is read: who made the file is not known.
        entry = file.get_slice("x_0_mse") if list(file.keys()) == ["x_0_mse"] else None
        shape = [] if entry is None else entry.get_shape()
        if entry is None or entry.get_dtype() != "F32" or len(shape) < 2 or shape[0] != rows:
            raise ValueError(
                f"{path} does not belong to this configuration: it must hold a float32 tensor `x_0_mse` with "
                f"a row for each of its {rows} timesteps."
            )
        return file.get_tensor("x_0_mse")


def _name_of(content: bytes) -> str:
    """The name of the JSON file."""
    return f"few_steps-{hashlib.sha256(content).hexdigest()[:12]}.json"


def _file_of(pixels: Tensor) -> str:
    """The name of the file that holds the errors of each pixel."""
    digest = hashlib.sha256(f"{tuple(pixels.shape)}".encode())
    digest.update(pixels.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return f"x_0_mse-{digest.hexdigest()[:12]}.safetensors"
