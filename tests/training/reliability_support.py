"""What the tests of runs that are killed, stopped, short of disk, or meet a bad batch share.

Real processes, killed by real signals. They are forked from a server that has imported everything, which saves each
the seconds that the imports take; the slow tests start the command itself.
"""

import contextlib
import functools
import multiprocessing
import os
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
from sklearn.datasets import load_digits
from test_train import TINY, reset_accelerate

from ddpm_vlb.commands import train
from ddpm_vlb.recipes import train as recipe

ROOT = Path(__file__).parents[2]
KILLED = -signal.SIGKILL
STEPS = 30
EVERY = "--checkpointing_steps 5"
RESUME = "--resume_from_checkpoint latest"
# The options that make a resumed run hardest to repeat; T = 2, so that the sampler's history fills up before step 13.
HARD = "--dropout 0.3 --random_flip --timestep_sampler loss_second_moment --ddpm_num_steps 2 "
HARD += "--ddpm_num_inference_steps 2"
LAUNCH = "-m accelerate.commands.launch --num_machines 1 --mixed_precision no --dynamo_backend no".split()

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
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
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
    add = recipe.Statistics.add

    def then(self, *args):
        add(self, *args)
        if self.run.progress.step == step:
            action(self.run)

    recipe.Statistics.add = then


def within_step(step, action):
    """A hook: act amid a step."""
    train_batch = recipe.train_batch

    def acting(run, *args):
        if run.progress.step + 1 == step:
            action(run)
        return train_batch(run, *args)

    recipe.train_batch = acting


def before(name, action):
    """A hook: act before a function of train.py is called."""
    function = getattr(train, name)

    def acting(run, *args, **kwargs):
        action(run)
        return function(run, *args, **kwargs)

    setattr(train, name, acting)


def bad_images(steps, micro_step=0):
    """A hook: all NaN, in one micro batch of the steps."""
    train_batch = recipe.train_batch

    def broken(run, x_0, micro, drawn):
        if run.progress.step + 1 in steps and micro == micro_step:
            x_0 = torch.full_like(x_0, torch.nan)
        return train_batch(run, x_0, micro, drawn)

    recipe.train_batch = broken


def bad_loss(step, t):
    """A hook: the loss of the images at t is infinite in a step; for t = None it is finite, but its slope is not."""
    loss_terms = recipe.loss_terms

    def broken(run, output, diffused):
        terms = loss_terms(run, output, diffused)
        if run.progress.step + 1 != step:
            return terms
        sums = output.flatten(1).sum(1)
        steep = (sums - sums.detach()).sqrt()
        extra = steep if t is None else torch.where(diffused.t == t, torch.inf, 0.0)
        return terms + extra[:, None]

    recipe.loss_terms = broken


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
        patch.setattr(train, "train_and_finish", lambda run, loop: runs.append(run))
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
