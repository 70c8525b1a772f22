"""Runs that go on from a checkpoint: exactly, with other options, in a folder of several runs."""

import functools
import re
import shutil

import numpy as np
import pytest
from reliability_support import (
    EVERY,
    HARD,
    KILLED,
    RESUME,
    STEPS,
    after_step,
    alike,
    check_same,
    complained,
    content,
    die,
    far,
    names,
    ran,
)
from sklearn.datasets import load_digits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_support import write_data

from ddpm_vlb.runtime.image_data import load_image_data

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
def test_a_killed_run_goes_on_exactly(tmp_path, few, straight, options):
    """30 steps are 13, SIGKILL, and the rest from checkpoint-10: weights, average, optimizer, history."""
    if options:
        straight = tmp_path / "straight"
        ran(straight, EVERY, options, *few)
    options = EVERY, options, *few
    ran(tmp_path / "killed", *options, RESUME, hooks=[functools.partial(after_step, 13, die)], code=KILLED)
    assert names(tmp_path / "killed") == {"checkpoint-5", "checkpoint-10"}
    resumed = ran(tmp_path / "killed", *options, RESUME)
    assert f"Resuming from {tmp_path / 'killed' / 'checkpoint-10'}" in resumed.out
    for step in (15, STEPS):
        check_same(*(folder / f"checkpoint-{step}" for folder in (straight, tmp_path / "killed")))


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
    assert (
        "checkpoint-30 has all of --max_train_steps 7 (or --num_epochs): give more to train on. It is scored"
        in process.out
    )


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
