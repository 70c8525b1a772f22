"""Checkpoints that are cut short at any point of their writing, left over, unfinished, or damaged."""

import functools
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from reliability_support import (
    EVERY,
    KILLED,
    RESUME,
    after_step,
    check_same,
    complained,
    copy,
    die,
    names,
    ran,
)

from ddpm_vlb.recipes import train as recipe
from ddpm_vlb.runtime.stopping import clear_faults
from ddpm_vlb.training.checkpoints import Checkpoints

# Killed while a checkpoint is written

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = {"os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate", "shutil.rmtree"}


def on_changes(notice):
    """Call `notice` before each change of the file system that Python makes, and each fsync; it cannot be undone."""

    def audited(event, args):
        if event in CHANGES or (event == "open" and isinstance(args[2], int) and args[2] & WRITES):
            notice(event, *map(str, args[:2]))

    fsync = os.fsync

    def noticed(descriptor):
        notice("fsync", os.readlink(f"/proc/self/fd/{descriptor}"), "")
        fsync(descriptor)

    os.fsync = noticed
    sys.addaudithook(audited)


class Deaths:
    """A hook: fork at a checkpoint, for each change of the file system and several file sizes, and die there.

    Each fork works on its own copy of the output folder, which lies afterwards in `states` as the death left it.
    """

    def __init__(self, step, states, every):
        self.step, self.states, self.every = step, states, every

    def __call__(self):
        save = Checkpoints.save

        def dying(checkpoints, step):
            if step == self.step:
                self.states.mkdir(exist_ok=True)
                write = functools.partial(save, checkpoints, step)
                changes = self.die(checkpoints, write, "none", None)
                for change in range(0, changes, self.every):
                    self.die(checkpoints, write, f"change-{change}", change)
                for size in (0, 100, 5_000, 50_000, 90_000, 150_000)[:: self.every]:
                    self.die(checkpoints, write, f"size-{size}", None, size)
                os._exit(0)
            save(checkpoints, step)

        Checkpoints.save = dying

    def die(self, checkpoints, write, name, change, size=None):
        """Fork and write; returns the number of changes that were seen."""
        folder, seen = self.states / name, self.states / f".{name}"
        state = random.getstate()  # Python seeds anew in a fork
        pid = os.fork()
        if pid:
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            assert status == (0 if change is size is None else KILLED if size is None else -signal.SIGXFSZ), status
            return len(seen.read_text().splitlines()) if change is None and size is None else 0
        try:
            random.setstate(state)
            checkpoints.folder = shutil.copytree(checkpoints.folder, folder)
            count, log = 0, os.open(seen, os.O_WRONLY | os.O_CREAT)

            def notice(*what):
                nonlocal count
                if count == change:
                    die(None)
                count += 1
                os.write(log, (" ".join(what) + "\n").encode())

            if size is None:
                on_changes(notice)
            else:
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            write()
            checkpoints.proven()
            os._exit(0)
        finally:
            os._exit(1)


def dead(folder, few, every, *hooks):
    """The states in which the deaths at checkpoint-10 leave the folder, by name."""
    process = ran(
        folder / "run", EVERY, "--checkpoints_total_limit 1", *few, hooks=[*hooks, Deaths(10, folder, every)]
    )
    assert "Traceback" not in process.err, process.err
    return {state.name: state for state in sorted(folder.glob("[!.]*")) if state.name != "run"}


def check_states(states, straight, begin):
    """`latest` is whole in each, and nothing is left of what was not finished; returns the steps that were found."""
    found = {}
    for name, state in states.items():
        found[name] = begin(state).progress.step
        own = state / f"checkpoint-{found[name]}"
        check_same(own, straight / own.name)
        assert begin(state).checkpoints.own()[-1] == own, name
        assert not names(state, ".checkpoint-*"), name
    assert found["none"] == 10 and set(found.values()) == {5, 10}
    return found


@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_while_a_checkpoint_is_written(tmp_path, straight, few, begin, every):
    """At any change of the file system, or amid a file: the run goes on from a whole one, to the same weights.

    The old one is only removed when the new one is there.
    """
    states = dead(tmp_path, few, every)
    found = check_states(states, straight, begin)
    assert sum(name.startswith("size") for name in found) >= 1
    for name in ("change-0", "size-0", max(states)):
        run = begin(states[name])
        assert recipe.train(run, None)
        check_same(states[name] / "checkpoint-30", straight / "checkpoint-30")


@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_while_a_checkpoint_of_an_earlier_run_is_replaced(tmp_path, straight, few, begin, every):
    """Also between the two renames."""
    ran(tmp_path / "other" / "run", "--checkpointing_steps 10 --max_train_steps 10 --seed 1", *few)
    other = tmp_path / "other" / "run" / "checkpoint-10"
    states = dead(tmp_path / "states", few, every, functools.partial(after_step, 9, functools.partial(copy, other)))
    changes = [line for line in (tmp_path / "states" / ".none").read_text().splitlines() if "os.rename" in line]
    targets = [line.split("/")[-1] for line in changes]
    assert re.fullmatch(r"\.checkpoint-10\.\w+\.replaced", targets[1]) and targets[2] == "checkpoint-10"
    check_states(states, straight, begin)


def test_a_power_cut_finds_a_whole_checkpoint(tmp_path, few):
    """All files are on the disk before the folder has its name, and the name is before an older one is removed."""
    dead(tmp_path, few, 1000)
    seen = [line.split() for line in (tmp_path / ".none").read_text().splitlines()]
    last = {Path(path).name: i for i, (event, path, *_) in enumerate(seen) if event == "fsync"}
    renamed = next(i for i, line in enumerate(seen) if line[-1].endswith("/checkpoint-10"))
    removed = next(i for i, line in enumerate(seen) if re.search(r"/\.checkpoint-5\.\w+\.removed$", line[-1]))
    held = {path.name for path in (tmp_path / "none" / "checkpoint-10").iterdir()}
    held |= {name for name in last if re.fullmatch(r"\.checkpoint-10\.\w+\.writing", name)}
    assert len(held) == 9
    assert held <= last.keys() and all(last[name] < renamed for name in held)
    written = max(i for i, line in enumerate(seen) if line[0] == "os.rename" and line[-1].endswith("checkpoint.json"))
    assert written < last["checkpoint.json"]
    assert renamed < last["none"] < removed  # "none" is the output folder


OTHER_RUN = "another run has begun in --output_dir and removed it; give each run a folder of its own"


def test_a_run_that_begins_while_another_saves(finished, begin, monkeypatch):
    """As a requeued job may: it removes what is not finished, and however slowly, the other never takes the rest."""
    run = begin(finished, "checkpoint-5")
    complete = run.checkpoints._complete

    def remove_one_file(path, **options):
        (path / "optimizer.bin").unlink(missing_ok=True)

    def interrupted(aside, *more):
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "rmtree", remove_one_file)
            run.checkpoints._find(None)
        complete(aside, *more)

    monkeypatch.setattr(run.checkpoints, "_complete", interrupted)
    with pytest.raises(SystemExit, match=f"checkpoint-10 could not be written: {OTHER_RUN}.*checkpoint-5, is whole"):
        run.checkpoints.save(10)
    assert begin(finished).progress.step == 5 and not names(finished, ".checkpoint-*")


def test_a_folder_that_was_made_anew_is_no_checkpoint(finished, begin, monkeypatch):
    """Parts of Accelerate make the folder again, where another process has removed it."""
    run = begin(finished, "checkpoint-5")
    complete = run.checkpoints._complete

    def made_anew(aside, *more):
        run.checkpoints._find(None)
        aside.mkdir()
        complete(aside, *more)

    monkeypatch.setattr(run.checkpoints, "_complete", made_anew)
    with pytest.raises(SystemExit, match=f"checkpoint-10 could not be written: {OTHER_RUN}.*checkpoint-5, is whole"):
        run.checkpoints.save(10)


LEFT = [f".checkpoint-5.0123abcd.{why}" for why in ("writing", "replaced", "removed")]
LEFT += [".checkpoint-10.writing", ".pipeline-abc", ".diverged-5.0123abcd.removed", ".superseded-5.0123abcd.removed"]


def leave_behind(folder, *more):
    for name in (*LEFT, *more):
        (folder / name).mkdir()
        (folder / name / "left").touch()


def test_leftovers_are_removed(finished, begin):
    """What is hidden but not of this program stays."""
    leave_behind(finished, ".notes.removed", ".mine")
    begin(finished)
    hidden = names(finished, ".*")
    assert hidden >= {".notes.removed", ".mine"} and not hidden & {*LEFT} and not names(finished, ".*.*.removed")


def test_leftovers_stand_in_no_way(finished, begin, monkeypatch):
    """Folders that cannot be emptied, as on NFS while a file is open."""
    leave_behind(finished, "diverged-25")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path, **options: None)
        run = begin(finished)
        patch.setattr(run.checkpoints, "limit", 5)
        run.checkpoints.save(30)
        run.checkpoints.proven()
        assert names(finished) == {f"checkpoint-{step}" for step in (10, 15, 20, 25, 30)}
        run.checkpoints.set_aside(25)
        assert len(names(finished, ".*.removed")) >= len(LEFT)
    assert names(finished) == {f"checkpoint-{step}" for step in (10, 15, 20)}
    assert names(finished, "diverged-*") == {"diverged-25", "diverged-30"}
    begin(finished)
    assert names(finished, ".*") == {".run.json"}


@pytest.mark.parametrize("name", ["checkpoint-7", "latest"])
def test_a_command_that_is_refused_removes_nothing(finished, begin, name):
    """Least of all what a run that is alive is writing."""
    leave_behind(finished)
    (finished / "checkpoint-30" / "optimizer.bin").unlink()
    before = names(finished, "*")
    with pytest.raises(SystemExit, match="there is no|is damaged"):
        begin(finished, name)
    assert names(finished, "*") == before


def test_a_fault_while_loading_is_told(finished, begin, monkeypatch):
    """Without the advice to go on from what could not be loaded."""
    run = begin(finished)
    monkeypatch.setattr(run.checkpoints, "_loading", "")

    def gone(path):
        raise RuntimeError("[../third_party/gloo/transport/tcp/pair.cc:534] Connection closed by peer")

    monkeypatch.setattr(run.accelerator, "load_state", gone)
    with pytest.raises(SystemExit, match=r"Another process .* says why\. checkpoint-30 was being loaded\. \("):
        with clear_faults(finished, run.checkpoints.advice):
            run.checkpoints.begin("latest")


def test_a_checkpoint_that_cannot_be_removed(finished, begin, monkeypatch, capsys):
    """One too many is told, and ends no run."""
    if os.geteuid() != 0 or subprocess.run(["mount", "--bind", *[finished / "checkpoint-5"] * 2]).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        run = begin(finished)
        monkeypatch.setattr(run.checkpoints, "limit", 4)
        run.checkpoints._unproven = True
        run.checkpoints.proven()
    finally:
        subprocess.run(["umount", finished / "checkpoint-5"], check=True)
    assert names(finished) == {f"checkpoint-{step}" for step in (5, 15, 20, 25, 30)}
    assert "checkpoint-5 could not be removed" in capsys.readouterr().out


# Incomplete and damaged checkpoints


@pytest.mark.parametrize("manifest", [None, "", "{", "[]", '{"step": 30'])
def test_an_unfinished_checkpoint_is_never_chosen(finished, begin, manifest):
    """Without its manifest, or with part of it: `latest` takes the one before, and by name it is refused."""
    path = finished / "checkpoint-30" / "checkpoint.json"
    path.unlink() if manifest is None else path.write_text(manifest)
    assert begin(finished).progress.step == 25
    with pytest.raises(SystemExit, match=r"checkpoint-30 has no readable checkpoint.json"):
        begin(finished, "checkpoint-30")


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "longer"])
def test_a_damaged_file_is_named(finished, straight, begin, damage):
    """Of any file; what is advised then works, and the other checkpoints are as they were."""
    for path in sorted((finished / "checkpoint-30").iterdir()):
        whole = path.read_bytes()
        if path.name == "checkpoint.json":
            continue
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
        path.write_bytes({"cut": whole[:middle], "flipped": flipped, "gone": b"", "longer": whole + b"0"}[damage])
        if damage == "gone":
            path.unlink()
        for name in ("latest", "checkpoint-30"):
            with pytest.raises(SystemExit, match=rf"{path.name} is damaged: .*Remove checkpoint-30 to go on") as stop:
                begin(finished, name)
            assert isinstance(stop.value.code, str)  # Python's exit code 1
        path.write_bytes(whole)
    check_same(finished / "checkpoint-25", straight / "checkpoint-25")
    assert begin(finished, "checkpoint-25").progress.step == 25
    assert (finished / "superseded-30").is_dir()
    assert begin(finished).progress.step == 25


def test_a_damaged_checkpoint_ends_the_command(finished, few):
    """One line on stderr, exit code 1."""
    path = finished / "checkpoint-30" / "optimizer.bin"
    path.write_bytes(path.read_bytes()[:-1])
    process = ran(finished, EVERY, RESUME, *few, code=1)
    assert re.search(r"optimizer\.bin is damaged: it had \d+ bytes and has \d+", complained(process))
