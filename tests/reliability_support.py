"""What the tests of runs that are killed, stopped, short of disk, or meet a bad batch share.

Real processes, killed by real signals. They are forked from the one of the tests, which saves each the seconds that
the imports take; the slow tests start the command itself.
"""

import contextlib
import os
import re
import resource
import shutil
import signal
import subprocess
import time

import numpy as np
import safetensors.torch
import torch
from processes import Forked
from training_support import TINY

from ddpm_vlb.commands import train
from ddpm_vlb.recipes import train as recipe

KILLED = -signal.SIGKILL
STEPS = 30
EVERY = "--checkpointing_steps 5"
RESUME = "--resume_from_checkpoint latest"
# The options that make a resumed run hardest to repeat: all that draws, and T = 2, so that the sampler's history fills
# up before step 13.
HARD = "--dropout 0.3 --random_flip --timestep_sampler loss_second_moment --ddpm_num_steps 2 "
HARD += "--ddpm_num_inference_steps 2 --class_conditional --label_dropout 0.3"
LAUNCH = "-m accelerate.commands.launch --num_machines 1 --mixed_precision no --dynamo_backend no".split()

# Processes


class Training(Forked):
    """A training process, which hooks make fail; without pictures, and without scores unless it shall be whole."""

    def __init__(self, folder, options, *hooks, whole=False):
        argv = [*TINY, "--cpu", "--logger", "none", "--max_train_steps", str(STEPS), "--output_dir", str(folder)]
        super().__init__(_train, [*argv, *_words(options)], hooks, whole)


def _train(argv, hooks, whole):
    train.pictures = lambda *args: None
    if not whole:
        train.finish = lambda run: None
    for hook in hooks:
        hook()
    train.main(argv)


def _words(options):
    """Those of the texts, and paths as they are."""
    return [str(part) for option in options for part in (option.split() if type(option) is str else [option])]


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
    os.truncate(2, 0)  # the log is such a file too, longer the slower the machine is
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


def check_same(a, b, but=()):
    """Two checkpoints hold the same, but for some files; the part that does not is named."""
    first, second = content(a), content(b)
    assert first.keys() == second.keys()
    assert [name for name in first if name not in but and not alike(first[name], second[name])] == []


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


# Commands


def arguments(folder, *options):
    return [*TINY, "--logger", "none", "--output_dir", str(folder), *_words(options)]
