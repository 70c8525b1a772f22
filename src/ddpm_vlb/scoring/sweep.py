"""Scoring a split on any number of processes: each image once, in pieces that survive a crash.

Images are taken in units that fill a network call, aligned to their positions, so that a unit's numbers are the same
whoever scores it and whenever. Finished units are kept as immutable part files; a later run reads them and scores
what is missing.
"""

import contextlib
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from tqdm.auto import tqdm

from ddpm_vlb import Pilot, VLBEstimator, VLBScores, compacted, merge_scores

Scores = tuple[VLBScores, ...]
"""Of the same images, one for each reverse process."""
Batch = Callable[[list[int]], tuple[Tensor, dict[str, Tensor]]]
"""Images by their positions, and the network's further arguments for them."""


class Stopped(Exception):
    """The run was asked to stop while it scored or sampled."""


class PartialScores:
    """The part files of a run, in a folder of its own.

    Args:
        folder: where they lie; made when the first is written.
        report: told of a file that cannot be read.
        key: of the run; files of another one are foreign.
    """

    def __init__(self, folder: Path, report: Callable[[str], object] = print, key: str = ""):
        self.folder, self.report, self.key = folder, report, key

    def load(self) -> dict[str, tuple[int, Scores]]:
        """The sweep and the scores of every part file by its name; a corrupt one is moved aside and reported."""
        parts = {}
        for path in sorted(self.folder.glob("[0-9]*.npz")):
            try:
                parts[path.name] = self._read(path)
            except Exception as error:  # whatever a torn archive makes zipfile and numpy raise
                aside = path.with_suffix(".corrupt")
                with contextlib.suppress(FileNotFoundError):  # another node may have moved it already
                    path.replace(aside)
                self.report(f"Partial results {path} cannot be read ({error}): moved to {aside.name}, scoring anew.")
        return parts

    def _write(self, name: str, content: dict[str, Any]) -> None:
        """Write aside and rename, so that a file is whole or not there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        aside = self.folder / f".{name}.writing"
        with open(aside, "wb") as file:
            np.savez(file, allow_pickle=False, run=np.array(self.key), **content)
        os.replace(aside, self.folder / name)

    def _content(self, path: Path) -> dict[str, Tensor]:
        with np.load(path, allow_pickle=False) as file:
            if str(file["run"]) != self.key:
                raise ValueError("it belongs to another run")
            return {name: torch.from_numpy(file[name]) for name in file.files if name != "run"}

    def _read(self, path: Path) -> tuple[int, Scores]:
        content = self._content(path)
        count = int(content.pop("count"))
        sweep = int(content.pop("sweep"))
        states = [
            {name.split(".")[1]: value for name, value in content.items() if name.startswith(f"{i}.")}
            for i in range(count)
        ]
        return sweep, tuple(VLBScores.from_state_dict(state) for state in states)

    def save(self, sweep: int, scores: Scores) -> None:
        """Write a part file."""
        content = {f"{i}.{k}": v.numpy() for i, own in enumerate(scores) for k, v in own.state_dict().items()}
        name = f"{sweep:03d}-{int(scores[0].positions[0]):09d}-{uuid.uuid4().hex[:8]}"
        self._write(f"{name}.npz", {"sweep": np.int64(sweep), "count": np.int64(len(scores)), **content})

    def load_pilot(self) -> Pilot | None:
        """The pilot of an earlier run, or None."""
        path = self.folder / "pilot.npz"
        if not path.exists():
            return None
        try:
            return Pilot.from_state_dict(self._content(path))
        except Exception as error:  # as for the parts
            path.replace(path.with_suffix(".corrupt"))
            self.report(f"The saved pilot {path} cannot be read ({error}): moved aside, running it anew.")
            return None

    def save_pilot(self, pilot: Pilot) -> None:
        """Keep the pilot: a later run must draw as this one does."""
        self._write("pilot.npz", {name: value.cpu().numpy() for name, value in pilot.state_dict().items()})


class Saver:
    """Writes parts often enough that a crash costs little, and seldom enough that they stay few."""

    def __init__(self, store: PartialScores | None, sweep: int):
        self.store, self.sweep = store, sweep
        self.pending: list[Scores] = []
        self.started = self.saved = time.monotonic()

    def add(self, scores: Scores) -> None:
        """Keep scores, and write them when a second or a fiftieth of the time so far has passed."""
        self.pending = compacted([*self.pending, scores])
        now = time.monotonic()
        if now - self.saved > max(1.0, 0.02 * (now - self.started)):
            self.flush()

    def flush(self) -> None:
        """Write what is not written yet."""
        if self.store is not None and self.pending:
            self.store.save(self.sweep, merge_scores(self.pending))
        self.pending, self.saved = [], time.monotonic()


class RunningEstimate:
    """The estimate so far, and its standard error from noise and images together."""

    def __init__(self, report_unit: float):
        self.unit, self.count, self.sum, self.square = report_unit, 0, 0.0, 0.0

    def add(self, scores: VLBScores) -> None:
        """Take in further images."""
        values = (scores.kl + scores.decoder + scores.prior) * self.unit / scores.dims
        self.count, self.sum = self.count + len(values), self.sum + float(values.sum())
        self.square += float(values.square().sum())

    def __str__(self) -> str:
        mean = self.sum / max(1, self.count)
        if self.count < 2:
            return f"{mean:.3f}"
        variance = max(0.0, self.square - self.count * mean**2) / (self.count - 1)
        return f"{mean:.3f} +- {(variance / self.count) ** 0.5:.3f}"


def units(positions: Sequence[int], size: int) -> Iterator[list[int]]:
    """The positions in groups that do not depend on which positions are asked for."""
    group: list[int] = []
    for position in positions:
        if group and position // size != group[0] // size:
            yield group
            group = []
        group.append(position)
    if group:
        yield group


def run_sweep(
    accelerator: Accelerator,
    scorer: VLBEstimator,
    batch: Batch,
    positions: Sequence[int],
    sweep: int = 0,
    store: PartialScores | None = None,
    description: str = "Scoring",
    report_unit: float = 1.0,
    stop: Callable[[], bool] = lambda: False,
) -> Scores:
    """Score the images at `positions` on all processes together; every process returns all the scores.

    Args:
        accelerator: the processes.
        scorer: how to score.
        batch: images by their positions.
        positions: which images, ascending.
        sweep: number of the pass.
        store: where partial results are kept and looked for; None keeps none.
        description: of the progress bar.
        report_unit: what turns nats per dimension into the unit that the bar shows.
        stop: asked before each group of images; true on one process ends them all.

    Raises:
        Stopped: `stop` said so.
    """
    world, rank = accelerator.num_processes, accelerator.process_index
    own = store.load() if store is not None and accelerator.is_local_main_process else {}
    found = {name: part for files in gather_object([own]) for name, part in files.items()}
    earlier, done = list[Scores](), set[int]()
    for name in sorted(found):
        number, scores = found[name]
        own_positions = set(scores[0].positions.tolist())
        if number == sweep and not own_positions & done:  # two runs may have been started in one folder
            earlier.append(scores)
            done |= own_positions
    todo = [position for position in positions if position not in done]
    size = scorer.images_per_unit(batch([positions[0]])[0])
    if done and accelerator.is_main_process:
        print(f"{len(done)} of {len(positions)} images are already scored in {store.folder if store else ''}.")
    mine = [unit for i, unit in enumerate(units(todo, size)) if i % world == rank]
    saver, running, new = Saver(store, sweep), RunningEstimate(report_unit), list[Scores]()
    label = f"{description}, process 1 of {world}" if world > 1 else description
    with tqdm(
        total=sum(map(len, mine)), desc=label, unit="image", disable=not accelerator.is_main_process, leave=False
    ) as bar:
        for scores in earlier:
            running.add(scores[0])
        try:
            for unit in mine:
                if stop():
                    break
                x_0, conditioning = batch(unit)
                scores = scorer.score(x_0, unit, conditioning, sweep)
                new = compacted([*new, scores])
                saver.add(scores)
                running.add(scores[0])
                bar.set_postfix_str(str(running), refresh=False)
                bar.update(len(unit))
        finally:
            saver.flush()
    if any(gather_object([stop()])):
        raise Stopped
    gathered = gather_object([merge_scores(new)] if new else [])
    return merge_scores([*earlier, *gathered])


def shared(accelerator: Accelerator, make: Callable[[], Pilot]) -> Pilot:
    """A pilot made on the main process and handed to all: every process must draw from the same probabilities."""
    state = [make().state_dict() if accelerator.is_main_process else None]
    return Pilot.from_state_dict(broadcast_object_list(state)[0])
