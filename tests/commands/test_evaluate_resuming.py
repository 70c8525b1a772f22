"""`ddpm-vlb evaluate` killed or stopped, and started again."""

import functools
import io
import itertools
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import safetensors.torch
from scoring_support import (
    FEW,
    PARTS,
    SCORE,
    TEST,
    TRAIN,
    changed_model,
    edit_config,
    launcher,
    positions_in,
    run_evaluate,
    same_numbers,
    strict_json,
)

from ddpm_vlb import VLBEstimator
from ddpm_vlb.commands import evaluate
from ddpm_vlb.runtime import reporting
from ddpm_vlb.scoring import sweep


def stop_after(monkeypatch, number):
    """Let scoring be stopped, as by Ctrl-C, once so many units are finished."""
    finished, original = [], VLBEstimator.score

    def record(self, *args):
        if len(finished) == number:
            raise KeyboardInterrupt
        finished.append(args)
        return original(self, *args)

    monkeypatch.setattr(VLBEstimator, "score", record)


def test_a_stopped_tolerance_run_goes_on(score, straight, tmp_path, monkeypatch, scored):
    """Stopped in its second sweep, it scores the rest of that sweep and ends in the same number."""
    options = ("small", "grey", "--tolerance", 0.5 * straight["noise_se"])
    whole = score(*options)
    shutil.rmtree(tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        stop_after(patch, 6 + 2)  # the first sweep has 6 units of four images
        score(*options)
    assert positions_in(tmp_path / "run", 0) == list(range(TEST))
    finished = positions_in(tmp_path / "run", 1)
    assert 0 < len(finished) < TEST
    del scored[:]
    assert same_numbers(score(*options), whole)
    assert [position for sweep, position, _ in scored if sweep == 1] == sorted(set(range(TEST)) - set(finished))
    assert 0 not in [sweep for sweep, _, _ in scored]


def evaluate_and_die(options, folder, log):
    """Evaluate, in a process of its own, until a part file is there; then die as no handler can prevent."""
    ticks, score = itertools.count(0, 0.8), VLBEstimator.score

    def score_or_die(*args):
        if list(folder.glob(PARTS)):
            os.kill(os.getpid(), signal.SIGKILL)
        return score(*args)

    with pytest.MonkeyPatch.context() as patch, open(log, "w", buffering=1) as stderr:
        patch.setattr(sys, "stderr", stderr)
        patch.setattr(VLBEstimator, "score", score_or_die)
        patch.setattr(sweep, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
        patch.setattr(sweep, "tqdm", functools.partial(sweep.tqdm, mininterval=0))
        run_evaluate(*options)


@pytest.fixture(scope="module")
def killed(home, models, sets):
    """What a run leaves that was killed after its first part file, and what its standard error said until then."""
    folder, log = home / "killed", home / "killed.txt"
    options = ("--model", models["small"], *sets["grey"].options, "--output_dir", folder, *FEW)
    process = multiprocessing.get_context("fork").Process(target=evaluate_and_die, args=(options, folder, log))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert not (folder / "metrics.json").exists() and 0 < len(positions_in(folder)) < TEST
    return folder, log.read_text()


@pytest.fixture
def resumed(killed, tmp_path):
    """A copy of the killed run's folder, in which `score` goes on."""
    return shutil.copytree(killed[0], tmp_path / "run")


def test_a_killed_run_goes_on(score, resumed, straight, scored, pilots, tmp_path):
    """To the same number as one that was not, bit for bit, without scoring a finished image or the pilot again."""
    finished = positions_in(resumed)
    metrics = score()
    assert same_numbers(metrics, straight) and pilots == []
    assert [position for _, position, _ in scored] == sorted(set(range(TEST)) - set(finished))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.json"]


def test_a_torn_temporary_file_is_ignored(score, resumed, straight, scored, capsys):
    """Killed while it wrote a part, or the pilot: nothing is said, and nothing scored again."""
    finished = positions_in(resumed)
    (part,) = resumed.glob(PARTS)
    for name in (".000-000000010-0123abcd.writing", ".pilot.writing"):
        (part.parent / name).write_bytes(part.read_bytes()[:100])
    assert same_numbers(score(), straight) and len(scored) == TEST - len(finished)
    assert "cannot be read" not in capsys.readouterr().out


def foreign():
    file = io.BytesIO()
    np.savez(file, weights=np.ones(3))
    return file.getvalue()


def flipped(whole, index):
    return whole[:index] + bytes([whole[index] ^ 0xFF]) + whole[index + 1 :]


CORRUPT = {
    "a flipped number": lambda whole: flipped(whole, whole.index(b"0.kl.npy") + 128 + 2),
    "a flipped flag": lambda whole: flipped(whole, whole.index(b"PK\x01\x02") + 8),
    "truncated": lambda whole: whole[: len(whole) // 2],
    "empty": lambda whole: b"",
    "foreign": lambda whole: foreign(),
}


@pytest.mark.parametrize("kind", CORRUPT)
def test_corrupt_partial_results_are_set_aside(score, resumed, straight, scored, capsys, kind):
    """With a message that names the file, and the result is right: its images are scored again."""
    (part,) = resumed.glob(PARTS)
    part.write_bytes(CORRUPT[kind](part.read_bytes()))
    assert same_numbers(score(), straight) and len(scored) == TEST
    out = capsys.readouterr().out
    assert part.name in out and ".corrupt" in out and SCORE.search(out)


def test_a_part_of_another_run_is_set_aside(score, resumed, straight, scored, models, sets, tmp_path, monkeypatch):
    """A part file that is whole, but of other scores, is as foreign as any other file."""
    where = ("--model", models["small"], *sets["grey"].options, "--output_dir", tmp_path / "other", *FEW)
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        stop_after(patch, 2)
        run_evaluate(*where, "--calls_per_image", 6)
    (part,) = resumed.glob(PARTS)
    (strange,) = (tmp_path / "other").glob(PARTS)
    shutil.copy(strange, part)
    del scored[:]
    assert same_numbers(score(), straight) and len(scored) == TEST


@pytest.mark.parametrize("kind", ["truncated", "empty", "foreign"])
def test_a_corrupt_pilot_is_run_again(score, resumed, straight, pilots, capsys, kind):
    """It comes out the same, so that the finished images remain good."""
    (saved,) = resumed.glob("partial-*/pilot.*")
    saved.write_bytes(CORRUPT[kind](saved.read_bytes()))
    assert same_numbers(score(), straight) and len(pilots) == 1
    assert saved.name in capsys.readouterr().out


def nudge_a_weight(folder):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = safetensors.torch.load_file(path)
    weights["conv_out.bias"][0] += 1e-3
    safetensors.torch.save_file(weights, path, {"format": "pt"})


NETWORK, SCHEDULER = "unet/config.json", "scheduler/scheduler_config.json"


CHANGES = {
    "weights": nudge_a_weight,
    "network config": edit_config(NETWORK, flip_sin_to_cos=False),
    "betas": edit_config(SCHEDULER, beta_end=0.31),
    "variance": edit_config(SCHEDULER, variance_type="fixed_large"),
    "prediction": edit_config(SCHEDULER, prediction_type="sample"),
    "clip range": edit_config(SCHEDULER, clip_sample_range=2.0),
}


OPTIONS = """
    --seed 1
    --calls_per_image 6
    --num_images 21
    --pilot_calls 100
    --no-control_variate
    --no-clip_sample
    --split train
    --estimator full
    --levels 511
    --timesteps 0 1 3 5 7 9 12 15 17 19
    --eval_batch_size 8
    --mixed_precision bf16
    --tolerance 100
"""


@pytest.mark.parametrize("options", [line.strip() for line in OPTIONS.strip().splitlines()])
def test_other_options_reuse_nothing(score, base, resumed, scored, pilots, options):
    """Neither the parts of a killed run nor the result of a finished one: everything is scored."""
    shutil.copy(base[0] / "metrics.json", resumed)
    score("small", "grey", options)
    images = 21 if "num_images" in options else TRAIN if "train" in options else TEST
    assert len([position for sweep, position, _ in scored if sweep == 0]) == images
    assert len(pilots) == ("full" not in options)


@pytest.mark.parametrize("change", CHANGES)
def test_another_checkpoint_reuses_nothing(score, base, resumed, scored, pilots, models, tmp_path, change):
    """One weight is enough, and so is anything that makes another network or process of the same weights."""
    shutil.copy(base[0] / "metrics.json", resumed)
    score(changed_model(models, tmp_path, CHANGES[change]))
    assert len(scored) == TEST and len(pilots) == 1


def test_accelerate_s_mixed_precision_reuses_nothing(score, straight, resumed, scored, monkeypatch):
    """Where the option leaves the precision to accelerate, accelerate's setting is part of the run."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    metrics = score()
    assert len(scored) == TEST and metrics["bits_per_dim"] != straight["bits_per_dim"]


def test_a_finished_run_is_not_repeated(score, straight, home, tmp_path, calls, capsys, monkeypatch):
    """The same command again makes no network call, leaves the result alone, prints it again and ends as any run."""
    left, leave = [], evaluate.leave
    monkeypatch.setattr(evaluate, "leave", lambda accelerator: (left.append(1), leave(accelerator)))
    folder = shutil.copytree(home / "straight", tmp_path / "run")
    before = (folder / "metrics.json").read_bytes()
    metrics = score()
    assert metrics == straight and calls == [] and (folder / "metrics.json").read_bytes() == before and left == [1]
    out = capsys.readouterr().out
    assert reporting.describe(straight) in out and "nothing to do" in out


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b'{"key": 3}', b"\xff\xfe"])
def test_a_broken_metrics_file_is_written_anew(score, straight, tmp_path, content):
    """It is no finished run."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.json").write_bytes(content)
    assert same_numbers(score(), straight)
    assert same_numbers(strict_json(tmp_path / "run" / "metrics.json"), straight)


def test_the_progress_bar_shows_the_estimate(killed, straight):
    """On standard error: the images done, the time left, and the estimate of these images with its error."""
    bar = r"Scoring: +\d+%\|.*\| (\d+)/23 \[\d\d:\d\d<\d\d:\d\d, .*, (-?\d+\.\d{3}) \+- (\d+\.\d{3})\]"
    shown = re.findall(bar, killed[1].replace("\r", "\n"))
    assert shown
    for done, estimate, error in shown:
        values = straight["per_image"][: int(done)]
        assert float(estimate) == pytest.approx(np.mean(values), abs=6e-4)
        assert float(error) == pytest.approx(np.std(values, ddof=1) / len(values) ** 0.5, abs=6e-4)


SLOWLY = """
import sys, time
from ddpm_vlb.commands import evaluate
from ddpm_vlb import VLBEstimator

score = VLBEstimator.score

def slowly(*args, **options):
    time.sleep(1.1)  # a part is written after a second
    return score(*args, **options)

VLBEstimator.score = slowly
evaluate.main(sys.argv[1:])
"""


def kill_after_a_part(command, folder, stderr, **environment):
    """Run a command and kill it, and what it started, without warning when a first part file is there."""
    with open(stderr, "wb") as log:
        process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, stderr=log)
        try:
            started = time.monotonic()
            while not list(folder.glob(PARTS)):
                assert process.poll() is None and time.monotonic() - started < 300, stderr.read_text()[-3000:]
                time.sleep(0.01)
        finally:
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            for member in family:
                member.kill()
            process.wait()
            psutil.wait_procs(family, timeout=30)


@pytest.mark.slow
def test_killed_on_two_processes_and_resumed_on_one(models, sets, score, scored, straight, tmp_path):
    """The parts of both serve, whoever goes on."""
    (tmp_path / "slowly.py").write_text(SLOWLY)
    options = ("--model", models["small"], *sets["grey"].options, "--output_dir", tmp_path / "run", *FEW)
    command = [*launcher(2), str(tmp_path / "slowly.py"), *map(str, options)]
    kill_after_a_part(command, tmp_path / "run", tmp_path / "stderr.txt", ACCELERATE_USE_CPU="true")
    finished = positions_in(tmp_path / "run")
    assert 0 < len(finished) < TEST
    assert same_numbers(score(), straight)
    assert [position for _, position, _ in scored] == sorted(set(range(TEST)) - set(finished))
    assert "process 1 of 2" in (tmp_path / "stderr.txt").read_text()
