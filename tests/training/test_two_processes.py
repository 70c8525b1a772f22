"""Two processes that are killed or stopped, and go on: they end as two that nothing happened to.

Real processes over Gloo. By default they are forked, as in test_resuming.py; the slow tests start `accelerate
launch`, of this file, which then is examples/train.py with a step to wait in.
"""

import contextlib
import functools
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from processes import PYTHONPATH, ROOT, as_rank, environment, free_port, wait_for
from reliability_support import (
    HARD,
    LAUNCH,
    RESUME,
    Training,
    alike,
    arguments,
    check_same,
    content,
    names,
    send,
    within_step,
)
from training_support import checkpoint_weights, same_weights

from ddpm_vlb.commands import train
from ddpm_vlb.runtime.stopping import leave
from ddpm_vlb.training import scores as training_scores

STEPS = 20
# With a history of losses that is full before step 13, and dropout, which each process draws for itself.
OPTIONS = f"--checkpointing_steps 5 --max_train_steps {STEPS} {HARD}"
HALT = 13
BOTH = {"random_states_0.pkl", "random_states_1.pkl"}

# What processes do


def only_leave(run):
    """In place of the scores; without it Gloo's threads may abort the process at its exit."""
    leave(run.accelerator)


def told(rank, port):
    """A hook: what a launcher would tell a process."""
    train.finish = only_leave
    as_rank(rank, port)


def halt(run):
    """Say so and wait for a signal."""
    say_halted(run.accelerator, run.folder)
    signal.pause()


def say_halted(accelerator, folder):
    (folder / f".halted-{accelerator.process_index}-{os.getpid()}").touch()


def halt_in_save(number):
    """A hook: halt where a checkpoint's files are to be written."""
    save_state, calls = Accelerator.save_state, []

    def halting(self, folder):
        calls.append(folder)
        if len(calls) == number:
            say_halted(self, Path(folder).parent)
            signal.pause()
        return save_state(self, folder)

    Accelerator.save_state = halting


def halted(folder, count=2):
    """The ids of the processes, in the order of their ranks, once so many have halted."""
    wait_for(lambda: len(names(folder, ".halted-*")) == count)
    return [int(name.rpartition("-")[2]) for name in sorted(names(folder, ".halted-*"))]


# Two processes


def started(folder, *options, hooks=((), ())):
    """Two forked ones, each with hooks of its own."""
    port = free_port()
    return [Training(folder, [*options], functools.partial(told, rank, port), *own) for rank, own in enumerate(hooks)]


def ran(folder, *options, hooks=((), ())):
    """Both have ended well; returns what the main one printed."""
    processes = started(folder, *options, hooks=hooks)
    for process in processes:
        assert process.end() == 0, process.out + process.err[-3000:]
    return processes[0].out


def kill(processes):
    for process in processes:
        process.kill()
    assert [process.end() for process in processes] == [-signal.SIGKILL] * 2


def check_both(path, straight):
    """The same in every file, of both processes, bit for bit."""
    assert BOTH <= names(path, "*")
    assert not alike(*(content(straight)[name] for name in sorted(BOTH)))
    check_same(path, straight)


@pytest.fixture(scope="module")
def straight(tmp_path_factory, few):
    """Two processes that nothing happened to."""
    folder = tmp_path_factory.mktemp("two")
    ran(folder, OPTIONS, *few)
    return folder


def test_two_killed_processes_go_on_exactly(tmp_path, few, straight):
    """SIGKILL to both amid step 13: weights, average, optimizer, schedule, history, progress at 15 and 20."""
    assert len(names(straight / f"checkpoint-{STEPS}", "custom_checkpoint_*.pkl")) == 4
    hook = functools.partial(within_step, HALT, halt)
    processes = started(tmp_path, OPTIONS, *few, hooks=([hook], [hook]))
    halted(tmp_path)
    kill(processes)
    assert names(tmp_path) == {"checkpoint-5", "checkpoint-10"}
    assert f"Resuming from {tmp_path / 'checkpoint-10'}." in ran(tmp_path, OPTIONS, RESUME, *few)
    for step in (15, STEPS):
        check_both(tmp_path / f"checkpoint-{step}", straight / f"checkpoint-{step}")


def test_two_processes_of_which_one_is_stopped_go_on_exactly(tmp_path, few, straight):
    """SIGTERM to the second alone amid step 13: both exit with 0 after it, and go on from there."""
    said = ran(tmp_path, OPTIONS, *few, hooks=((), [functools.partial(within_step, HALT, send)]))
    assert "Stopped at step 13 by another process." in said
    assert names(tmp_path) == {"checkpoint-5", "checkpoint-10", "checkpoint-13"}
    assert f"Resuming from {tmp_path / 'checkpoint-13'}." in ran(tmp_path, OPTIONS, RESUME, *few)
    check_both(tmp_path / f"checkpoint-{STEPS}", straight / f"checkpoint-{STEPS}")


@pytest.mark.slow
@pytest.mark.parametrize("late", [0, 1])
def test_two_are_killed_while_a_checkpoint_is_written(tmp_path, few, straight, late):
    """One has written its files of checkpoint-10, the other has not: the one before is taken."""
    hooks = [(), ()]
    hooks[late] = [functools.partial(halt_in_save, 2)]
    processes = started(tmp_path, OPTIONS, *few, hooks=hooks)
    halted(tmp_path, 1)
    wait_for(lambda: list(tmp_path.glob(f".checkpoint-10.*.writing/random_states_{1 - late}.pkl")))
    kill(processes)
    assert names(tmp_path) == {"checkpoint-5"}
    assert f"Resuming from {tmp_path / 'checkpoint-5'}." in ran(tmp_path, OPTIONS, RESUME, *few)
    assert not names(tmp_path, ".checkpoint-*")
    check_both(tmp_path / f"checkpoint-{STEPS}", straight / f"checkpoint-{STEPS}")


def offset_scores(offsets):
    """A hook: nats that are added to the scores of a step's validation."""
    own = training_scores.Scoring.sweep

    def sweep(self, *args, **options):
        offset = offsets[self.run.progress.step]
        return tuple(replace(part, kl=part.kl + offset) for part in own(self, *args, **options))

    training_scores.Scoring.sweep = sweep


def keep_and_leave():
    """A hook: in place of the final scores, the network that is kept, as each process has it."""

    def finish(run):
        network = training_scores.network_to_keep(run).state_dict()
        torch.save(
            (run.record(ended=True)["train"]["kept_step"], network), run.folder / f"{run.accelerator.process_index}.pt"
        )
        leave(run.accelerator)

    train.finish = finish


@pytest.mark.slow
def test_two_processes_keep_one_best_network(tmp_path, few):
    """--patience on two, the second of which has no validation images to score: they end and keep alike."""
    hooks = [functools.partial(offset_scores, {2: 0, 4: -5, 6: 50, 8: 60}), keep_and_leave]
    options = "--max_train_steps 20 --validation_steps 2 --checkpointing_steps 2 --validation_calls 4 --no-use_ema"
    said = ran(tmp_path, f"{options} --patience 2", *few, hooks=(hooks, hooks))
    assert "--patience 2: so many validations in a row, up to step 8" in said and "step 4 is kept" in said
    for rank in range(2):
        step, network = torch.load(tmp_path / f"{rank}.pt")
        assert step == 4 and same_weights(network, checkpoint_weights(tmp_path, 4))


# With the launcher


def work(ranks, argv):
    """Run train.py up to its scores; processes of these ranks wait in a step."""
    torch.set_num_threads(1)
    train.finish = only_leave
    if os.environ["RANK"] in ranks:
        within_step(HALT, halt)
    train.main(argv)


@contextlib.contextmanager
def launched(folder, *options, halting=""):
    """`accelerate launch`, the ids of its processes that wait in a step, and the log; all are gone afterwards."""
    log, waiting = folder.with_suffix(".log"), []
    start = [*LAUNCH, *f"--multi_gpu --num_processes 2 --main_process_port {free_port()}".split()]
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [sys.executable, *start, __file__, halting or "none", *arguments(folder, *options)],
            cwd=ROOT,
            env=environment(ACCELERATE_USE_CPU="true", PYTHONPATH=PYTHONPATH),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        if halting:
            waiting += halted(folder, len(halting))
        yield process, waiting, log
    finally:
        for pid in (process.pid, *waiting):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def launched_to_the_end(folder, *options):
    with launched(folder, *options) as (process, _, log):
        assert process.wait(200) == 0, log.read_text()[-3000:]
        return log.read_text()


MORE = ("", "--gradient_accumulation_steps 2", "--no-use_ema", "--dataloader_num_workers 1 --lr_scheduler linear")


@pytest.mark.slow
@pytest.mark.parametrize("more", MORE)
def test_a_killed_launch_goes_on_exactly(tmp_path, few, more):
    """SIGKILL to the launcher and both processes amid step 13."""
    options = f"{OPTIONS} {more}", *few
    launched_to_the_end(tmp_path / "straight", *options)
    with launched(tmp_path / "killed", *options, halting="01") as (process, waiting, _):
        for pid in (process.pid, *waiting):
            os.kill(pid, signal.SIGKILL)
        assert process.wait(30) == -signal.SIGKILL
    assert names(tmp_path / "killed") == {"checkpoint-5", "checkpoint-10"}
    assert f"Resuming from {tmp_path / 'killed' / 'checkpoint-10'}." in launched_to_the_end(
        tmp_path / "killed", RESUME, *options
    )
    for step in (15, STEPS):
        check_both(*(tmp_path / name / f"checkpoint-{step}" for name in ("killed", "straight")))


@pytest.mark.slow
@pytest.mark.parametrize("halting", ["0", "1", "01"])
def test_a_stopped_launch_goes_on_exactly(tmp_path, few, straight, halting):
    """SIGTERM amid step 13, to one process or to the launcher, which then exits with 1: all is saved either way."""
    to_launcher = halting == "01"
    with launched(tmp_path / "run", OPTIONS, *few, halting=halting) as (process, waiting, log):
        os.kill(process.pid if to_launcher else waiting[0], signal.SIGTERM)
        assert process.wait(60) == int(to_launcher), log.read_text()[-3000:]
    assert "Stopped at step 13 by" in log.read_text()
    assert names(tmp_path / "run") == {"checkpoint-5", "checkpoint-10", "checkpoint-13"}
    assert "checkpoint-13." in launched_to_the_end(tmp_path / "run", RESUME, OPTIONS, *few)
    check_both(tmp_path / "run" / f"checkpoint-{STEPS}", straight / f"checkpoint-{STEPS}")


if __name__ == "__main__":
    work(sys.argv[1], sys.argv[2:])
