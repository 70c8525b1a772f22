"""Runs that are killed, stopped, short of disk, or meet a bad batch: what is left, and how a resumed run goes on.

Real processes, killed by real signals. They are forked from a server that has imported everything, which saves each
the seconds that the imports take; the slow tests start the command itself.
"""

import contextlib
import functools
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import safetensors.torch
import torch
import train
import training_loop
from checkpoints import Checkpoints
from image_data import load_image_data
from sklearn.datasets import load_digits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_train import TINY, free_port, launch_two, reset_accelerate

ROOT = Path(__file__).parents[1]
KILLED = -signal.SIGKILL
STEPS = 30
EVERY = "--checkpointing_steps 5"
RESUME = "--resume_from_checkpoint latest"
# The options that make a resumed run hardest to repeat; T = 2, so that the sampler's history fills up before step 13.
HARD = "--dropout 0.3 --random_flip --timestep_sampler loss_second_moment --ddpm_num_steps 2 "
HARD += "--ddpm_num_inference_steps 2"

# Processes


def _child(out, err, argv, hooks, whole):
    """What a forked process does: train.py's main, with its own process group, its output in files."""
    os.setpgid(0, 0)
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout.reconfigure(line_buffering=True)
    torch.set_num_threads(1)
    if not whole:
        train.finish = lambda run: None
    for hook in hooks:
        hook()
    train.main(argv)


@functools.cache
def _server():
    """The server to fork from; it must find the modules that it imports first."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    paths = [str(Path(__file__).parent), str(ROOT / "examples"), os.environ.get("PYTHONPATH", "")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
        multiprocessing.forkserver.ensure_running()
    return context


class Training:
    """A training process, which hooks make fail; without scores and pictures unless it shall be whole."""

    def __init__(self, folder, options, *hooks, whole=False):
        self.folder = folder
        self._logs = tempfile.TemporaryDirectory()
        self._out, self._err = Path(self._logs.name) / "out", Path(self._logs.name) / "err"
        for path in (self._out, self._err):
            path.touch()
        argv = [*TINY, "--cpu", "--logger", "none", "--max_train_steps", str(STEPS), "--output_dir", str(folder)]
        argv += [str(part) for option in options for part in (option.split() if type(option) is str else [option])]
        self._process = _server().Process(target=_child, args=(self._out, self._err, argv, hooks, whole))
        self._process.start()

    @property
    def out(self):
        return self._out.read_text()

    @property
    def err(self):
        return self._err.read_text()

    def end(self, seconds=120):
        """Wait for its end; returns the exit code, that of the signal, negative, where one killed it."""
        self._process.join(seconds)
        if self._process.exitcode is None:
            self._process.kill()
            raise AssertionError(f"still running:\n{self.out}\n{self.err[-3000:]}")
        return self._process.exitcode


def ran(folder, *options, hooks=(), code=0, whole=False):
    """A training process that has ended as expected."""
    process = Training(folder, options, *hooks, whole=whole)
    assert process.end() == code, process.out + process.err[-3000:]
    return process


def complained(process):
    """The one line on stderr with which a process ended, after the progress bar; there is no traceback."""
    assert "Traceback" not in process.err
    return re.split(r"[\r\n]", process.err.strip())[-1]


def names(folder, pattern="checkpoint-*"):
    return {path.name for path in folder.glob(pattern)}


# Hooks


def die(run):
    os.kill(os.getpid(), signal.SIGKILL)


def send(run, number=signal.SIGTERM, to_group=False):
    os.kill(0 if to_group else os.getpid(), number)


def interrupt_twice(run, seconds):
    """Two Ctrl-C within one step."""
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(seconds)
    os.kill(os.getpid(), signal.SIGINT)


def poison(run, value):
    with torch.no_grad():
        next(run.unet.parameters()).fill_(value)


def copy(source, run):
    """Leave a checkpoint of another run in the way."""
    shutil.copytree(source, run.folder / source.name)


def delete(run, files):
    for file in files:
        file.unlink()


def cut(run, files):
    for file in files:
        file.write_bytes(file.read_bytes()[:60])


def read_only(run, folder):
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)


def fill(run, folder):
    """Leave no room on the disk."""
    with contextlib.suppress(OSError), open(folder / "filler", "wb", buffering=0) as file:
        while True:
            file.write(b"\0" * 4096)


def small_files(run, size):
    """Let the system refuse to write a file beyond a size, as a full disk would."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def after_step(step, action):
    """A hook: act when a step is done, before its checkpoint."""
    add = training_loop.Statistics.add

    def then(self, *args):
        add(self, *args)
        if self.run.progress.step == step:
            action(self.run)

    training_loop.Statistics.add = then


def within_step(step, action):
    """A hook: act amid a step."""
    train_batch = training_loop.train_batch

    def acting(run, *args):
        if run.progress.step + 1 == step:
            action(run)
        return train_batch(run, *args)

    training_loop.train_batch = acting


def before(name, action):
    """A hook: act before a function of train.py is called."""
    function = getattr(train, name)

    def acting(run, *args, **kwargs):
        action(run)
        return function(run, *args, **kwargs)

    setattr(train, name, acting)


def bad_images(steps, micro_step=0):
    """A hook: all NaN, in one micro batch of the steps."""
    train_batch = training_loop.train_batch

    def broken(run, x_0, micro, drawn):
        if run.progress.step + 1 in steps and micro == micro_step:
            x_0 = torch.full_like(x_0, torch.nan)
        return train_batch(run, x_0, micro, drawn)

    training_loop.train_batch = broken


def bad_loss(step, t):
    """A hook: the loss of the images at t is infinite in a step; for t = None it is finite, but its slope is not."""
    loss_terms = training_loop.loss_terms

    def broken(run, output, diffused):
        terms = loss_terms(run, output, diffused)
        if run.progress.step + 1 != step:
            return terms
        sums = output.flatten(1).sum(1)
        steep = (sums - sums.detach()).sqrt()
        extra = steep if t is None else torch.where(diffused.t == t, torch.inf, 0.0)
        return terms + extra[:, None]

    training_loop.loss_terms = broken


# Checkpoints' contents


def content(path):
    """What a checkpoint holds, without what differs between any two runs."""
    parts = {}
    for file in sorted(path.iterdir()):
        if file.suffix == ".safetensors":
            parts[file.name] = safetensors.torch.load_file(file)
        elif file.name != "checkpoint.json":
            parts[file.name] = torch.load(file, weights_only=False)
    parts["custom_checkpoint_0.pkl"].pop("seconds")
    return parts


def alike(a, b):
    """Whether two nested values are the same, bit for bit."""
    if isinstance(a, torch.Tensor | np.ndarray):
        return type(a) is type(b) and np.array_equal(np.asarray(a), np.asarray(b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(alike, a, b))
    return a == b


def check_same(a, b):
    """Two checkpoints hold the same; the part that does not is named."""
    first, second = content(a), content(b)
    assert first.keys() == second.keys()
    assert [name for name in first if not alike(first[name], second[name])] == []


def tensors_of(value):
    """All tensors in a nested value."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors_of(part)


def progress(path):
    return content(path)["custom_checkpoint_0.pkl"]


def far(a, b):
    """The largest distance of two checkpoints' weights, relative to each tensor's norm."""
    first, second = (content(path)["model.safetensors"] for path in (a, b))
    return max(float((first[name] - second[name]).norm() / first[name].norm()) for name in first)


# Data


def write_data(folder, arrays):
    """A parquet data set of grey images."""
    features = datasets.Features({"image": datasets.Image()})
    images = [PIL.Image.fromarray(array.astype(np.uint8)) for array in arrays]
    folder.mkdir(parents=True)
    datasets.Dataset.from_dict({"image": images}, features=features).to_parquet(
        str(folder / "train-00000-of-00001.parquet")
    )
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of image files, and where `datasets` may keep its own."""
    folder = tmp_path_factory.mktemp("pictures")
    for i, image in enumerate(load_digits().images[:120] * 15):
        PIL.Image.fromarray(image.astype(np.uint8)).save(folder / f"{i:03d}.png")
    return folder


@pytest.fixture
def own_pictures(pictures, tmp_path):
    """A copy that a test may spoil, and the options for it; the sampler must not look at the images beforehand."""
    folder = shutil.copytree(pictures, tmp_path / "pictures")
    options = f"{EVERY} --timestep_sampler uniform --train_data_dir", folder, "--cache_dir", tmp_path / "cache"
    return folder, options


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """The options for a data set of 154, 8 and 18 images."""
    folder = tmp_path_factory.mktemp("few")
    write_data(folder / "data", load_digits().images[:180] * 15)
    return "--dataset_name", folder / "data", "--cache_dir", folder / "cache"


@pytest.fixture(scope="module")
def straight(tmp_path_factory, few):
    """A run that nothing happened to, with all its checkpoints."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    ran(folder, EVERY, *few)
    return folder


@pytest.fixture
def finished(straight, tmp_path):
    """A copy of its folder that a test may spoil."""
    return shutil.copytree(straight, tmp_path / "run")


@pytest.fixture(scope="module")
def run(tmp_path_factory, few):
    """A `Run` in this process, whose checkpoints and training a test may call."""
    runs = []
    reset_accelerate()
    options = map(str, few)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_and_finish", runs.append)
        folder = str(tmp_path_factory.mktemp("own"))
        fixed = f"--cpu --logger none {EVERY} --max_train_steps {STEPS}".split()
        train.main([*TINY, *fixed, "--output_dir", folder, *options])
    yield runs[0]
    reset_accelerate()


@pytest.fixture
def begin(run):
    """Load a checkpoint of a folder into the run; returns the run."""

    def begun(folder, name="latest"):
        run.checkpoints.folder = folder
        run.checkpoints.begin(name)
        return run

    return begun


# Resuming


@pytest.mark.parametrize(
    "options",
    [
        "",
        HARD,
        pytest.param(f"{HARD} --gradient_accumulation_steps 2", marks=pytest.mark.slow),
        pytest.param(f"{HARD} --no-use_ema", marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_goes_on_exactly(tmp_path, few, options):
    """30 steps are 13, SIGKILL, and the rest from checkpoint-10: weights, average, optimizer, history."""
    options = f"{EVERY} --max_train_steps {STEPS} {options}", *few
    ran(tmp_path / "straight", *options)
    ran(tmp_path / "killed", *options, RESUME, hooks=[functools.partial(after_step, 13, die)], code=KILLED)
    assert names(tmp_path / "killed") == {"checkpoint-5", "checkpoint-10"}
    resumed = ran(tmp_path / "killed", *options, RESUME)
    assert f"Resuming from {tmp_path / 'killed' / 'checkpoint-10'}" in resumed.out
    for step in (15, STEPS):
        check_same(*(tmp_path / name / f"checkpoint-{step}" for name in ("straight", "killed")))


def test_a_run_that_is_killed_again_and_again_goes_on_exactly(tmp_path, few, straight):
    """The same command line every time, killed at steps 3, 8, 9 and 21."""
    for step in (3, 8, 9, 21):
        ran(tmp_path, EVERY, RESUME, *few, hooks=[functools.partial(after_step, step, die)], code=KILLED)
    ran(tmp_path, EVERY, RESUME, *few)
    check_same(tmp_path / "checkpoint-30", straight / "checkpoint-30")


def test_the_comparison_sees_a_difference(straight):
    """Of neighbouring checkpoints every part that changes with a step is told apart."""
    first, second = (content(straight / f"checkpoint-{step}") for step in (25, 30))
    assert {name for name in first if not alike(first[name], second[name])} >= {
        "model.safetensors",
        "optimizer.bin",
        "scheduler.bin",
        "custom_checkpoint_0.pkl",
        "custom_checkpoint_1.pkl",
    }


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
        assert training_loop.train(run, None)
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
    assert len(held) == 8
    assert held <= last.keys() and all(last[name] < renamed for name in held)
    written = max(i for i, line in enumerate(seen) if line[0] == "os.rename" and line[-1].endswith("checkpoint.json"))
    assert written < last["checkpoint.json"]
    assert renamed < last["none"] < removed  # "none" is the output folder


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
    with pytest.raises(SystemExit, match="checkpoint-10 could not be written.*checkpoint-5, is whole"):
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
    with pytest.raises(SystemExit, match="checkpoint-10 could not be written.*checkpoint-5, is whole"):
        run.checkpoints.save(10)


def test_leftovers_stand_in_no_way(finished, begin, monkeypatch):
    """Folders that cannot be emptied, as on NFS while a file is open, under the names that are wanted next."""
    run = begin(finished)
    for name in (".checkpoint-5.removed", ".checkpoint-30.replaced", ".checkpoint-30.writing", "diverged-25"):
        (finished / name).mkdir()
        (finished / name / "left").touch()
    monkeypatch.setattr(shutil, "rmtree", lambda path, **options: None)
    monkeypatch.setattr(run.checkpoints, "limit", 5)
    run.checkpoints.save(30)
    run.checkpoints.proven()
    assert names(finished) == {f"checkpoint-{step}" for step in (10, 15, 20, 25, 30)}
    run.checkpoints.set_aside(25)
    assert names(finished) == {f"checkpoint-{step}" for step in (10, 15, 20)}
    assert names(finished, "diverged-*") == {"diverged-25", "diverged-30"}


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


# Divergence


@pytest.mark.parametrize("value", [1e30, float("nan")])
def test_the_last_good_checkpoint_is_kept(tmp_path, few, straight, value):
    """With a limit of 1: weights that broke just before they were saved do not push out the ones before."""
    options = f"{EVERY} --checkpoints_total_limit 1 --max_skipped_steps 3", *few
    hook = functools.partial(after_step, 10, functools.partial(poison, value=value))
    process = ran(tmp_path, *options, hooks=[hook], code=1)
    said = complained(process)
    assert re.search(
        r"Step 13 is not finite: L_t \(KL\) at t=\[\d.*diverged: 3 in a row\. "
        r"Renamed, .*: checkpoint-10 to diverged-10\. "
        "The last checkpoint, checkpoint-5, is whole",
        said,
    )
    assert process.out.count("It is skipped: number") == 2
    assert names(tmp_path) == {"checkpoint-5"} and names(tmp_path, "diverged-*") == {"diverged-10"}
    check_same(tmp_path / "checkpoint-5", straight / "checkpoint-5")
    ran(tmp_path, *options, RESUME)
    check_same(tmp_path / "checkpoint-30", straight / "checkpoint-30")


BAD = {
    "images": (functools.partial(bad_images, (4,)), r"L_t \(KL\) at t=\[\d+.*the gradient's norm"),
    "KL": (functools.partial(bad_loss, 4, 1), r"L_t \(KL\) at t=\[1\]"),
    "decoder": (functools.partial(bad_loss, 4, 0), r"L_0 \(decoder\) at t=\[0\]"),
    "gradient": (functools.partial(bad_loss, 4, None), r"(?<=finite: )the gradient's norm\."),
    "simple": (functools.partial(bad_loss, 4, 1), r"L_simple at t=\[1\]"),
    "accumulated": (functools.partial(bad_images, (4,), 1), r"L_t \(KL\) at t=\[\d+"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_step_is_skipped(tmp_path, few, kind):
    """It is named and counted, and changes nothing: not the weights, the average, the moments, the history."""
    hook, said = BAD[kind]
    options = "--checkpointing_steps 1 --max_train_steps 6 --logger tensorboard --ddpm_num_steps 2"
    options += " --ddpm_num_inference_steps 2 --timestep_sampler loss_second_moment --train_batch_size 16"
    options += {"simple": " --objective simple", "accumulated": " --gradient_accumulation_steps 2"}.get(kind, "")
    process = ran(tmp_path, *few, options, hooks=[hook])
    assert re.search(rf"Step 4 is not finite: .*{said}", process.out) and process.out.count("It is skipped") == 1
    before, after, last = (content(tmp_path / f"checkpoint-{step}") for step in (3, 4, 6))
    for part in ("model.safetensors", "custom_checkpoint_1.pkl", "optimizer.bin"):
        if part == "optimizer.bin":  # its learning rate is the schedule's
            before[part], after[part] = before[part]["state"], after[part]["state"]
        assert alike(before[part], after[part]), part
    assert not alike(after["model.safetensors"], last["model.safetensors"])
    assert all(tensor.isfinite().all() for part in last.values() for tensor in tensors_of(part))
    done = last["custom_checkpoint_0.pkl"]
    assert (done["step"], done["skipped"], done["skipped_in_a_row"]) == (6, 1, 0)
    events = EventAccumulator(str(tmp_path / "logs" / "train")).Reload()
    assert [event.value for event in events.Scalars("skipped_steps")] == [1]


# Going on with other options


@pytest.mark.parametrize(
    "layout", ["4 2", *(pytest.param(layout, marks=pytest.mark.slow) for layout in ("2 4", "1 8"))]
)
def test_another_layout_of_the_same_global_batch_goes_on(tmp_path, few, layout):
    """The weights agree to 1e-5 of each tensor's norm, with the default warm-up."""
    ran(tmp_path / "a", f"{EVERY} --lr_warmup_steps 100", *few)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    images, accumulation = layout.split()
    options = f"{EVERY} --lr_warmup_steps 100 --train_batch_size {images} --gradient_accumulation_steps {accumulation}"
    shutil.rmtree(tmp_path / "b" / "checkpoint-30")
    ran(tmp_path / "b", options, "--resume_from_checkpoint checkpoint-15", *few)
    assert far(tmp_path / "a" / "checkpoint-30", tmp_path / "b" / "checkpoint-30") < 1e-5


@pytest.mark.parametrize(
    "options, said",
    [
        ("--train_batch_size 4", r"global batch \(.*\) of 8, but this one has 4"),
        ("--seed 1", "--seed 0, but this one has 1"),
        ("--ddpm_num_steps 10", "--ddpm_num_steps 20, but this one has 10"),
        ("--timestep_sampler uniform", "--timestep_sampler gaussian, but this one has uniform"),
        ("--no-use_ema", "--use_ema True, but this one has False"),
        ("--block_out_channels 8 16", r"the network \{'block_out_channels': \[8, 8\]\}, but this one has .*\[8, 16\]"),
        ("--prediction_type sample", "--prediction_type epsilon, but this one has sample"),
        ("--ddpm_beta_end 0.03", "--ddpm_beta_end 0.02, but this one has 0.03"),
        ("fewer", "training images .*'train': 154.*but this one has .*'train': 120"),
        ("others", "training images .*fingerprint.*but this one has .*fingerprint"),
        ("other training images", "training images .*but this one has"),
    ],
)
def test_another_run_is_refused(finished, tmp_path, few, options, said):
    """With both values, in one line, and nothing in the folder changes."""
    images = load_digits().images[:180] * 15
    changed = {"fewer": images[:140], "others": 255 - images, "other training images": images.copy()}
    if options in changed:
        if options == "other training images":
            # A training image, as the splits are functions of the number of images alone.
            marked = load_image_data_positions(few)
            changed[options][marked] = 255 - changed[options][marked]
        folder = write_data(tmp_path / "data", changed[options])
        options = ("--dataset_name", folder, "--cache_dir", tmp_path / "cache")
    else:
        options = (*few, options)
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    process = ran(finished, EVERY, RESUME, *options, code=1)
    assert re.search(said, complained(process))
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")}.items() >= before.items()


def load_image_data_positions(few):
    """The position in the stored data of the first training image."""
    data = load_image_data(str(few[1]), cache_dir=str(few[3]))
    first = data.train.raw(data.train[0])[0]
    stored = (load_digits().images[:180] * 15).astype(np.uint8)
    return int((stored == first).all((1, 2)).argmax())


def test_another_learning_rate_is_taken(finished, few):
    """It is said, and it is the one that the steps take: constant, at the last step, the new one."""
    options = "--lr_scheduler constant --learning_rate 1e-3 --resume_from_checkpoint checkpoint-25"
    process = ran(finished, EVERY, options, *few)
    assert "--learning_rate was 0.002 and is now 0.001" in process.out
    group = content(finished / "checkpoint-30")["optimizer.bin"]["param_groups"][0]
    assert group["lr"] == pytest.approx(1e-3)


def test_a_checkpoint_behind_the_last_step_is_told(finished, few):
    """It is scored as it is."""
    process = ran(finished, EVERY, RESUME, "--max_train_steps 7", *few)
    assert "Step 30 is not before the last one, 7: nothing is trained, and the checkpoint is scored" in process.out


# Several runs in one folder


def test_latest_is_of_the_last_run(finished, straight, few):
    """A new run in an old one's folder: until it has saved, `latest` finds nothing, then only its own."""
    began = ran(finished, EVERY, *few, "--seed 1", hooks=[functools.partial(after_step, 3, die)], code=KILLED)
    assert "checkpoint-30 of an earlier run" in began.out
    again = ran(finished, EVERY, RESUME, *few, "--seed 1", hooks=[functools.partial(after_step, 7, die)], code=KILLED)
    assert "starting anew" in again.out
    process = ran(finished, EVERY, RESUME, *few, "--seed 1 --max_train_steps 6")
    assert "Resuming from" in process.out and "checkpoint-5." in process.out
    check_same(finished / "checkpoint-30", straight / "checkpoint-30")


def test_an_earlier_run_can_be_taken_up_by_name(finished, few, begin):
    """And `latest` is that run's from then on."""
    ran(finished, EVERY, *few, hooks=[functools.partial(after_step, 3, die)], code=KILLED)
    assert begin(finished, "checkpoint-20").progress.step == 20
    assert begin(finished).progress.step == 20


# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("options", ["--dataloader_num_workers 0", "--dataloader_num_workers 1"])
def test_a_signal_saves_the_step(tmp_path, few, straight, number, options):
    """To the whole process group, amid step 13: exit code 0, and the rest from checkpoint-13 on, bit for bit."""
    hook = functools.partial(within_step, 13, functools.partial(send, number=number, to_group=True))
    process = ran(tmp_path, EVERY, options, *few, hooks=[hook])
    assert f"Stopped at step 13 by {number.name}." in process.out and "Traceback" not in process.err
    assert "The last checkpoint, checkpoint-13, is whole: go on with --resume_from_checkpoint latest." in process.out
    ran(tmp_path, EVERY, options, RESUME, *few)
    check_same(tmp_path / "checkpoint-30", straight / "checkpoint-30")


@pytest.mark.parametrize("where", ["evaluate", "sample"])
def test_a_signal_during_the_validation(tmp_path, few, straight, where):
    """It ends, and the next step saves."""
    hook = functools.partial(before, where, send)
    process = ran(tmp_path, EVERY, "--validation_steps 7", *few, hooks=[hook])
    assert "Stopped at step 8 by SIGTERM." in process.out and "Traceback" not in process.err
    ran(tmp_path, EVERY, RESUME, *few)
    check_same(tmp_path / "checkpoint-30", straight / "checkpoint-30")


@pytest.mark.parametrize("options", ["", "--checkpointing_steps 0"])
@pytest.mark.parametrize("where", ["evaluate", "sample"])
def test_a_signal_during_the_end(tmp_path, few, where, options):
    """Exit code 0 without metrics.json; the resumed run only scores and samples, however rarely it saves."""
    hook = functools.partial(before, where, send)
    process = ran(tmp_path, EVERY, options, *few, hooks=[hook], whole=True)
    assert "Stopped at step 30 by SIGTERM." in process.out and not (tmp_path / "metrics.json").exists()
    assert "checkpoint-30, is whole" in process.out
    again = ran(tmp_path, EVERY, RESUME, *few, whole=True)
    assert json.loads((tmp_path / "metrics.json").read_text())["train"]["steps"] == STEPS
    assert "checkpoint-30." in again.out and "Test bits/dim" in again.out
    assert f"Step 30 is not before the last one, {STEPS}: nothing is trained, and the checkpoint is" in again.out


@pytest.mark.parametrize("seconds, at_once", [(2.2, True), (0.3, False)])
def test_a_second_interrupt(tmp_path, few, at_once, seconds):
    """After two seconds it interrupts at once; before, a launcher has only passed on the first."""
    hook = functools.partial(within_step, 3, functools.partial(interrupt_twice, seconds=seconds))
    process = Training(tmp_path, [EVERY, *few], hook)
    assert process.end() == int(at_once)  # multiprocessing's code for an exception
    assert ("KeyboardInterrupt" in process.err) == at_once
    assert names(tmp_path) == (set() if at_once else {"checkpoint-3"})


# Faults of the disk and of the data


@pytest.fixture
def disk(tmp_path):
    """A small file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder]).returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("logger", ["none", "tensorboard"])
def test_a_full_disk(disk, few, straight, logger):
    """The checkpoint that fails is named and leaves nothing; with room again, the run goes on from the one before."""
    hook = functools.partial(after_step, 7, functools.partial(fill, folder=disk))
    process = ran(disk / "run", EVERY, *few, "--logger", logger, hooks=[hook], code=1)
    assert re.search(r"checkpoint-10 could not be written.*checkpoint-5, is whole", complained(process))
    assert names(disk / "run") == {"checkpoint-5"} and not names(disk / "run", ".checkpoint-*")
    (disk / "filler").unlink()
    ran(disk / "run", "--checkpointing_steps 20 --checkpoints_total_limit 1", RESUME, *few)
    check_same(disk / "run" / "checkpoint-30", straight / "checkpoint-30")


@pytest.mark.parametrize("size", [1000, 90_000, 150_000])
def test_a_file_that_the_system_refuses(tmp_path, few, size):
    """As on a full disk, for every user: amid the progress, the average, the moments."""
    hook = functools.partial(after_step, 7, functools.partial(small_files, size=size))
    process = ran(tmp_path / "run", EVERY, *few, hooks=[hook], code=1)
    assert "checkpoint-10 could not be written" in process.err and "checkpoint-5, is whole" in process.err
    assert names(tmp_path / "run") == {"checkpoint-5"} and not names(tmp_path / "run", ".checkpoint-*")


def test_a_full_disk_at_the_end(disk, few):
    """The pipeline cannot be written: one line, and the checkpoint is whole."""
    hook = functools.partial(before, "save_pipeline", functools.partial(fill, folder=disk))
    process = ran(
        disk / "run", "--checkpointing_steps 20 --max_train_steps 20", *few, hooks=[hook], code=1, whole=True
    )
    assert re.search(r"cannot be written.*checkpoint-20, is whole", complained(process))


def test_a_read_only_disk(disk, few):
    """While it trains, and at the start."""
    hook = functools.partial(after_step, 7, functools.partial(read_only, folder=disk))
    process = ran(disk / "run", EVERY, *few, hooks=[hook], code=1)
    assert re.search(r"checkpoint-10 could not be written.*Read-only.*checkpoint-5, is whole", complained(process))
    again = ran(disk / "run", EVERY, RESUME, *few, code=1)
    assert re.search(r"--output_dir .* cannot be written: .*Read-only", complained(again))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("how", ["corrupt", "gone"])
def test_an_image_that_cannot_be_read(tmp_path, own_pictures, how, workers):
    """Found while it trains: it is named in one line, and the last checkpoint loads once it is mended."""
    folder, options = own_pictures
    images = sorted(folder.iterdir())
    positions = [i for i in range(2, 120) if i % 40 == 3]
    kept = {images[i]: images[i].read_bytes() for i in positions}
    data = load_image_data(train_data_dir=str(folder), cache_dir=str(tmp_path / "cache"))
    trained = {Path(data.train.data[i]["image"]["path"]).name for i in range(len(data.train))}
    spoilt = [image for image in kept if image.name in trained]
    assert spoilt
    hook = functools.partial(after_step, 6, functools.partial(delete if how == "gone" else cut, files=spoilt))
    more = f"--dataloader_num_workers {workers} --checkpointing_steps 2"
    process = ran(tmp_path / "run", *options, more, hooks=[hook], code=1)
    said = complained(process)
    assert re.search(r"Step \d+: the training data cannot be read. Image .*\.png' cannot be read", said)
    assert re.search(r"The last checkpoint, checkpoint-\d+, is whole", said)
    for image, whole in kept.items():
        image.write_bytes(whole)
    again = ran(tmp_path / "run", *options, more, RESUME)
    assert "Resuming from" in again.out


@pytest.mark.parametrize("kind", ["train_data_dir", "dataset_name"])
def test_a_data_set_that_is_gone(tmp_path, own_pictures, kind):
    """At a resume: one line with its name."""
    folder, options = own_pictures
    options = [f"{EVERY} --max_train_steps 5 --timestep_sampler uniform --{kind}", *options[1:]]
    ran(tmp_path / "run", *options)
    shutil.rmtree(folder)
    process = ran(tmp_path / "run", *options, RESUME, code=1)
    assert str(folder) in complained(process)
    assert names(tmp_path / "run") == {"checkpoint-5"}


# TensorBoard


@pytest.mark.parametrize(
    "step", [pytest.param(14, marks=pytest.mark.slow), 19, pytest.param(22, marks=pytest.mark.slow)]
)
def test_the_log_of_a_killed_run_has_each_step_once(tmp_path, few, step):
    """Killed and resumed, it has a straight run's steps, and its loss where no mean is cut by the resume."""
    options = "--logger tensorboard", *few, EVERY
    logger = "--logger tensorboard"
    ran(tmp_path / "straight", *options, logger)
    ran(tmp_path / "killed", *options, logger, hooks=[functools.partial(after_step, step, die)], code=KILLED)
    ran(tmp_path / "killed", *options, logger, RESUME)
    logs = []
    for name in ("straight", "killed"):
        events = EventAccumulator(str(tmp_path / name / "logs" / "train")).Reload()
        logs.append([(event.step, event.value) for event in events.Scalars("loss")])
    assert [step for step, _ in logs[0]] == [10, 20, 30]
    assert [step for step, _ in logs[1]] == [10, 20, 30]
    assert logs[1][-1] == logs[0][-1]


# Commands


def environment(**more):
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def arguments(folder, *options):
    texts = [str(part) for option in options for part in (option.split() if type(option) is str else [option])]
    return [*TINY, "--logger", "none", "--output_dir", str(folder), *texts]


def wait_for(condition, seconds=120):
    """Poll."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


@contextlib.contextmanager
def command(log, start, *script, **more):
    """A process group that a test may signal, and that is gone afterwards."""
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [sys.executable, *start, "examples/train.py", *script],
            cwd=ROOT,
            env=environment(**more),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def gone(group):
    """Whether no process of a group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


LONG = "--cpu --max_train_steps 100000 --checkpointing_steps 20 --checkpoints_total_limit 2"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_the_command_is_stopped(tmp_path, few, number):
    """`python examples/train.py`: by a signal from outside, at any time; the next command goes on."""
    folder, log = tmp_path / "run", tmp_path / "log"
    with command(log, [], *arguments(folder, LONG, *few)) as process:
        wait_for(lambda: (folder / "checkpoint-20").exists())
        process.send_signal(number)
        assert process.wait(60) == (KILLED if number == signal.SIGKILL else 0), log.read_text()[-3000:]
    with command(log, [], *arguments(folder, LONG, RESUME, *few)) as process:
        wait_for(lambda: "Resuming from" in log.read_text())


LAUNCH = "-m accelerate.commands.launch --num_machines 1 --mixed_precision no --dynamo_backend no".split()


@pytest.mark.slow
def test_the_launcher_alone_is_killed(tmp_path, few):
    """The process that it started notices, saves and ends."""
    folder, log = tmp_path / "run", tmp_path / "log"
    start = [*LAUNCH, "--num_processes", "1", "--cpu"]
    with command(log, start, *arguments(folder, LONG, *few)) as process:
        wait_for(lambda: (folder / "checkpoint-20").exists())
        process.terminate()
        process.wait(60)
        wait_for(lambda: gone(process.pid), 60)
    assert "by the end of `accelerate launch`" in log.read_text()
    with command(log, [], *arguments(folder, LONG, RESUME, *few)):
        wait_for(lambda: "Resuming from" in log.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(12))  # an exit that may hang does not hang every time
def test_one_of_two_processes_is_stopped(tmp_path, few, attempt):
    """Both end, after the same step, with a checkpoint, and within the time that saving takes."""
    port = free_port()
    folder, log = tmp_path / "run", tmp_path / "log"
    start = [*LAUNCH, *f"--multi_gpu --num_processes 2 --main_process_port {port}".split()]
    options = arguments(folder, LONG.replace("--cpu ", ""), *few)
    with command(log, start, *options, ACCELERATE_USE_CPU="true") as process:
        wait_for(lambda: (folder / "checkpoint-20").exists())
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        ranks = [
            pid for pid in children if "examples/train.py" in Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        ]
        assert len(ranks) == 2
        os.kill(int(ranks[1]), signal.SIGTERM)
        assert process.wait(25) == 0, log.read_text()[-3000:]
    said = re.search(r"Stopped at step (\d+) by (SIGTERM|another process)", log.read_text())
    assert (folder / f"checkpoint-{said[1]}" / "random_states_1.pkl").exists()


@pytest.mark.slow
def test_two_processes_go_on(tmp_path, few):
    """From checkpoint-10 on, the weights agree to 1e-6 of each tensor's norm with those of an uninterrupted run."""
    options = " ".join(map(str, [f"--max_train_steps {STEPS} {EVERY} --logger none", *few]))
    launch_two(tmp_path, options)
    shutil.move(tmp_path / "checkpoint-30", tmp_path / "straight")
    launch_two(tmp_path, f"{options} --resume_from_checkpoint checkpoint-10")
    assert far(tmp_path / "straight", tmp_path / "checkpoint-30") < 1e-6
