"""Runs that are stopped by a signal, or whose launcher is gone."""

import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ROOT, environment, free_port, wait_for
from reliability_support import (
    EVERY,
    KILLED,
    LAUNCH,
    RESUME,
    Training,
    arguments,
    before,
    check_same,
    interrupt_twice,
    names,
    ran,
    send,
    within_step,
)

# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    "options", ["--dataloader_num_workers 0", pytest.param("--dataloader_num_workers 1", marks=pytest.mark.slow)]
)
def test_a_signal_saves_the_step(tmp_path, few, straight, number, options):
    """To the whole process group, amid step 13: exit code 0, and the rest from checkpoint-13 on, bit for bit."""
    hook = functools.partial(within_step, 13, functools.partial(send, number=number, to_group=True))
    process = ran(tmp_path, EVERY, options, *few, hooks=[hook])
    assert f"Stopped at step 13 by {number.name}." in process.out and "Traceback" not in process.err
    assert "The last checkpoint, checkpoint-13, is whole: go on with --resume_from_checkpoint latest." in process.out
    ran(tmp_path, EVERY, options, RESUME, *few)
    check_same(tmp_path / "checkpoint-30", straight / "checkpoint-30")


@pytest.mark.parametrize("where, step", [("score_validation", 7), ("sample", 8)])
def test_a_signal_during_the_validation(tmp_path, few, straight, where, step):
    """It ends; its step is saved, to be validated later, or the next one where only the pictures are missing."""
    hook = functools.partial(before, where, send)
    process = ran(tmp_path, EVERY, "--validation_steps 7", *few, hooks=[hook])
    assert f"Stopped at step {step} by SIGTERM." in process.out and "Traceback" not in process.err
    ran(tmp_path, EVERY, RESUME, *few)
    pilot = "custom_checkpoint_2.pkl"  # of the validations, of which the other run had none
    check_same(tmp_path / "checkpoint-30", straight / "checkpoint-30", but=[pilot])


@pytest.mark.parametrize("options", ["", "--checkpointing_steps 0"])
@pytest.mark.parametrize("where", ["FinalScores", "sample"])
def test_a_signal_during_the_end(tmp_path, few, where, options):
    """Exit code 0 without metrics.json; the resumed run only scores and samples, however rarely it saves."""
    hook, steps = functools.partial(before, where, send), "--max_train_steps 10"
    process = ran(tmp_path, EVERY, options, steps, *few, hooks=[hook], whole=True)
    assert "Stopped at step 10 by SIGTERM." in process.out and not (tmp_path / "metrics.json").exists()
    assert "checkpoint-10, is whole" in process.out
    again = ran(tmp_path, EVERY, RESUME, steps, *few, whole=True)
    assert json.loads((tmp_path / "metrics.json").read_text())["train"]["steps"] == 10
    assert "checkpoint-10." in again.out and "Test bits/dim" in again.out
    assert "checkpoint-10 has all of --max_train_steps 10 (or --num_epochs): give more to train on." in again.out


@pytest.mark.parametrize("seconds, at_once", [(2.2, True), (0.3, False)])
def test_a_second_interrupt(tmp_path, few, at_once, seconds):
    """After two seconds it interrupts at once; before, a launcher has only passed on the first."""
    hook = functools.partial(within_step, 3, functools.partial(interrupt_twice, seconds=seconds))
    process = Training(tmp_path, [EVERY, *few], hook)
    assert process.end() == int(at_once)  # multiprocessing's code for an exception
    assert ("KeyboardInterrupt" in process.err) == at_once
    assert names(tmp_path) == (set() if at_once else {"checkpoint-3"})


# Commands


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
