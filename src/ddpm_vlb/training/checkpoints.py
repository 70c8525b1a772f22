"""Checkpoints that are whole or not there.

All processes write into a hidden folder; the main one then adds checkpoint.json, with the size and the CRC-32 of every
file, brings everything to the disk and renames the folder. Whatever is killed, `latest` finds the last one that was
finished.
"""

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from torch.distributed.checkpoint.api import CheckpointException
from tqdm.auto import tqdm

from ddpm_vlb.runtime.files import crc32, hidden, read_json, remove, to_disk, write_json
from ddpm_vlb.runtime.stopping import end, lost_contact

MANIFEST = "checkpoint.json"
RUN_FILE = ".run.json"
# What checkpoints from before there was such an option do not say.
EARLIER = {"--path": "ddpm", "--freeze_mean": False}
KEYS = {"step", "run", "fixed", "free", "files"}
_PREFIX = "checkpoint-"
_KINDS = ("checkpoint", "superseded", "diverged")
_BEGUN = ".begun"
_LEFT = (f".{_PREFIX}*", ".pipeline-*", ".superseded-*.removed", ".diverged-*.removed")


class Progress:
    """The optimizer steps done, the seconds spent on them, and the skipped ones; kept in checkpoints."""

    def __init__(self) -> None:
        self.step, self.seconds = 0, 0.0
        self.skipped = self.skipped_in_a_row = 0

    def state_dict(self) -> dict[str, float]:
        """For a checkpoint."""
        return dict(vars(self))

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """From a checkpoint."""
        vars(self).update(state_dict)


class Checkpoints:
    """The checkpoints of a run, in its output folder.

    Args:
        accelerator: of the run.
        folder: the output folder, one and the same for all processes.
        limit: how many are kept; None keeps all.
        fixed: options that a resumed run must share, by name.
        free: options that may differ, which is then said.
        prepare: what the state needs of all processes, called before any of them writes.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        folder: Path,
        limit: int | None,
        fixed: dict[str, Any],
        free: dict[str, Any],
        prepare: Callable[[], object] | None = None,
    ):
        self.accelerator, self.folder, self.limit, self.prepare = accelerator, folder, limit, prepare
        self.fixed, self.free = json.loads(json.dumps(fixed)), json.loads(json.dumps(free))
        self.run = ""
        self._unproven = True
        self._loading = ""

    def begin(self, name: str | None) -> None:
        """Load a checkpoint, or begin a new run; `latest` with none there begins anew, as in diffusers' scripts.

        Args:
            name: a checkpoint's folder name, `latest`, or None for a new run.

        Raises:
            SystemExit: the checkpoint is not there, not whole, or of a run that this one cannot continue.
        """
        found = self._agreed(lambda: self._find(name), f"--resume_from_checkpoint {name}")
        if found is None:
            self.run = self._agreed(self._begin_anew)
            if name is not None:
                self.accelerator.print(f"No checkpoint in {self.folder}: starting anew.")
            return
        path, manifest = self.folder / found[0], found[1]
        self.run = manifest["run"]
        self.accelerator.print(f"Resuming from {path}.")
        for key, value in self.free.items():
            if key in manifest["free"] and manifest["free"][key] != value:
                self.accelerator.print(f"  --{key} was {manifest['free'][key]} and is now {value}.")
        self._loading = path.name
        what = f"--resume_from_checkpoint {name}: {path} cannot be loaded"
        self._together(lambda: self.accelerator.load_state(str(path)), what)
        self._loading = ""
        # Accelerate counts micro batches, of which this run's steps may have another number.
        self.accelerator.step = manifest["step"] * self.accelerator.gradient_accumulation_steps
        # Those of the branch that a run leaves by going back to an earlier one.
        self._agreed(lambda: self._rename_from(manifest["step"] + 1, "superseded"))
        self._agreed(self._adopt)

    def save(self, step: int) -> None:
        """Save the training state from all processes.

        Args:
            step: optimizer steps done.

        Raises:
            SystemExit: it could not be written; the earlier checkpoints are as they were.
        """
        path = self.folder / f"{_PREFIX}{step}"
        aside, what = hidden(path, "writing"), f"{path} could not be written"

        def make_room() -> str:
            aside.mkdir()
            (aside / _BEGUN).touch()
            return aside.name

        def complete() -> None:
            try:
                self._complete(aside, path, step)
            except FileNotFoundError as error:
                raise OSError(
                    "another run has begun in --output_dir and removed it; give each run a folder of its own"
                ) from error

        try:
            aside = aside.with_name(self._agreed(make_room, what))  # the main process's, for all
            if self.prepare is not None:
                self.prepare()  # not amid the writing: where that fails, the others would wait for this process
            self._together(lambda: self.accelerator.save_state(str(aside)), what)
            self._agreed(complete, what)
            self._unproven = True
        except (SystemExit, RuntimeError) as failure:  # of them PyTorch's, that another process is gone
            alone = isinstance(failure, SystemExit) and failure.__cause__ is not None
            if not alone or self.accelerator.num_processes == 1:  # else the others are writing there still
                shutil.rmtree(aside, ignore_errors=True)
            if not isinstance(failure, SystemExit):
                raise
            message = f"{failure.code}. {self.advice()}."
            if alone:
                raise SystemExit(message) from failure
            end(self.accelerator, message)

    def proven(self) -> None:
        """Remove the oldest beyond the limit; called when the newest has shown to be good, by a finite loss."""
        if self._unproven and self.limit is not None and self.accelerator.is_main_process:
            for old in self.own()[: -self.limit]:
                try:
                    remove(old)
                except OSError as error:  # a checkpoint too many ends no run
                    tqdm.write(f"{old} could not be removed: {error}")
        self._unproven = False

    def set_aside(self, step: int) -> str:
        """Rename the checkpoints from a step on: no step after it was finite, and `latest` shall take an earlier one.

        Args:
            step: the first of them.

        Returns:
            What was done, as a sentence; "" where there were none. On all processes, all of which must call it.
        """
        said = ""
        if self.accelerator.is_main_process:
            try:
                renamed = self._rename_from(step, "diverged")
                said = f"Renamed, since no step after was finite: {', '.join(renamed)}. " if renamed else ""
            except OSError as error:
                said = f"Checkpoints from step {step} on are bad, but could not be renamed: {error}. "
        return broadcast_object_list([said])[0]

    def own(self) -> list[Path]:
        """The finished checkpoints of this run, oldest first."""
        return [path for path, manifest in _finished(self.folder) if manifest.get("run") == self.run]

    def others(self) -> list[Path]:
        """The finished checkpoints of other runs in the folder, those among them that were put aside."""
        manifests = [(path, read_json(path / MANIFEST)) for kind in _KINDS for path in self.folder.glob(f"{kind}-*")]
        return [path for path, manifest in manifests if manifest.keys() >= KEYS and manifest["run"] != self.run]

    def advice(self) -> str:
        """What to do after a fault."""
        if self._loading:
            return f"{self._loading} was being loaded"
        own = self.own()
        if not own:
            return "There is no checkpoint to go on from"
        return f"The last checkpoint, {own[-1].name}, is whole: go on with --resume_from_checkpoint latest"

    def _find(self, name: str | None) -> tuple[str, dict[str, Any]] | None:
        """The checkpoint to load and what it says of itself; once it is there, leftovers are removed.

        A command that is refused removes nothing: it may be a mistake, and another run may write there.
        """
        found = self._look_for(name)
        for pattern in _LEFT:  # by a run that was killed
            for left in self.folder.glob(pattern):
                with contextlib.suppress(OSError):
                    remove(left)
        return found

    def _look_for(self, name: str | None) -> tuple[str, dict[str, Any]] | None:
        if name is None:
            return None
        finished = _finished(self.folder)
        if name == "latest":
            run = read_json(self.folder / RUN_FILE).get("run")
            finished = [(path, manifest) for path, manifest in finished if run in (None, manifest.get("run"))]
            if not finished:
                return None
            path, manifest = finished[-1]
        else:
            path = self.folder / Path(name).name
            if not path.is_dir():
                there = ", ".join(own.name for own, _ in finished) or "no checkpoint"
                raise ValueError(f"there is no {path}, but {there}: give a name checkpoint-STEP, or latest")
            manifest = dict(finished).get(path, {})
        self._check(path, manifest)
        return path.name, manifest

    def _check(self, path: Path, manifest: dict[str, Any]) -> None:
        if not manifest:
            raise ValueError(f"{path} has no readable {MANIFEST}: it was not finished, or another version wrote it")
        for file, (size, checksum) in manifest["files"].items():
            at = path / file
            found = at.stat().st_size if at.is_file() else None
            if found != size:
                raise ValueError(
                    f"{at} is damaged: it had {size} bytes and "
                    f"{'is missing' if found is None else f'has {found}'}. Remove {path.name} to go on from the one "
                    "before"
                )
            if crc32(at) != checksum:
                raise ValueError(
                    f"{at} is damaged: its checksum differs. Remove {path.name} to go on from the one before"
                )
        for key, value in self.fixed.items():
            before = manifest["fixed"].get(key, EARLIER.get(key))
            if isinstance(before, dict) and isinstance(value, dict):  # say what differs, not all
                differing = [name for name in before | value if before.get(name) != value.get(name)]
                before, value = ({name: side.get(name) for name in differing} for side in (before, value))
            if before != value:
                raise ValueError(f"{path} is of a run with {key} {before}, but this one has {value}")

    def _begin_anew(self) -> str:
        self.run = uuid.uuid4().hex
        others = [path.name for path, _ in _finished(self.folder)]
        if others:
            print(f"{self.folder} holds {', '.join(others)} of an earlier run, which `latest` will not take any more.")
        self._adopt()
        return self.run

    def _rename_from(self, step: int, kind: str) -> list[str]:
        renamed = []
        for path in self.own():
            if _step(path) >= step:
                aside = self.folder / f"{kind}-{_step(path)}"
                if aside.exists():
                    remove(aside)
                os.replace(path, aside)
                renamed.append(f"{path.name} to {aside.name}")
        return renamed

    def _adopt(self) -> None:
        write_json({"run": self.run}, self.folder / RUN_FILE)

    def _complete(self, aside: Path, path: Path, step: int) -> None:
        """Write the manifest, bring all to the disk and rename."""
        (aside / _BEGUN).unlink()  # not there where another process has removed the folder and this one made it anew
        files = {file.relative_to(aside).as_posix(): file for file in sorted(aside.rglob("*")) if file.is_file()}
        manifest = {
            "step": step,
            "run": self.run,
            "fixed": self.fixed,
            "free": self.free,
            "files": {name: [file.stat().st_size, crc32(file)] for name, file in files.items()},
        }
        write_json(manifest, aside / MANIFEST)
        for entry in (*aside.rglob("*"), aside):
            to_disk(entry)
        replaced = hidden(path, "replaced")
        if path.exists():  # of an earlier run
            os.replace(path, replaced)
        os.replace(aside, path)
        to_disk(self.folder)
        shutil.rmtree(replaced, ignore_errors=True)

    def _agreed(self, action: Any, what: str = "--output_dir") -> Any:
        """What the action returns on the main process, on all of them; its fault ends them all."""
        outcome: list[Any] = [None, None]
        if self.accelerator.is_main_process:
            try:
                outcome[0] = action()
            except (OSError, ValueError) as error:
                outcome[1] = f"{what}: {error}"
        outcome = broadcast_object_list(outcome)
        if outcome[1] is not None:
            end(self.accelerator, outcome[1])
        return outcome[0]

    def _together(self, action: Callable[[], object], what: str) -> None:
        """Act on all processes; the fault of one ends them all."""
        error = None
        try:
            action()
        except CheckpointException as failure:  # no Exception, and the same on all processes
            error = _named(failure)
        except Exception as failure:  # whatever torch, safetensors, pickle or the system raise
            if lost_contact(failure):
                raise
            error = _named(failure)
            if self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
                # The others may be in a collective, and will notice that this process is gone.
                raise SystemExit(f"{what}: {error}") from failure
        self._raise_any(error, what)

    def _raise_any(self, error: str | None, what: str) -> None:
        """End all processes if one of them failed."""
        errors = [failure for failure in gather_object([error]) if failure is not None]
        if errors:
            end(self.accelerator, f"{what}: {errors[0]}")


def _named(error: BaseException) -> str:
    """An error in one line; of a collective's, whose text is the tracebacks of all processes, the first one's."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


def _step(path: Path) -> int:
    return int(path.name.removeprefix(_PREFIX))


def _finished(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Checkpoints with a manifest, and that, by their steps."""
    found = [path for path in folder.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdigit()]
    manifests = [(path, read_json(path / MANIFEST)) for path in sorted(found, key=_step)]
    return [(path, manifest) for path, manifest in manifests if KEYS <= manifest.keys()]
