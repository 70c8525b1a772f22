"""The benchmarks: each runs, tiny, on the CPU, and that of a person with a GPU tells what is wrong."""

import itertools
import json
import os
import re
import sys
import time
from functools import partial
from pathlib import Path

import pretend_device
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import class_posterior as posterior_benchmark
import compression
import compression_speed
import gpu
import gpu_checks
import gpu_speed
import mnist as hour
import policy_gradients
import text_to_image
import tiny_pipelines
import validation as checkpoints
import widening
from networks import scheduler, tiny_unet
from processes import fresh_accelerate  # noqa: F401

from ddpm_vlb import DDPMVLBPipeline, DDPMVLBScheduler

CHECKS = gpu_checks.losses, gpu_checks.steps


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    """A folder as the Hub's, of small digits."""
    import datasets
    import PIL.Image
    from sklearn.datasets import load_digits

    folder, images = tmp_path_factory.mktemp("mnist"), (load_digits().images[:40] * 15).astype("uint8")
    columns = datasets.Features({"image": datasets.Image()})
    for split, part in (("train", images[:30]), ("test", images[30:])):
        data = datasets.Dataset.from_dict({"image": list(map(PIL.Image.fromarray, part))}, features=columns)
        data.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


def test_smoke(mnist, capsys):
    """Every section runs on the CPU, or says in a line that it needs CUDA, and all is well."""
    assert gpu.main(["--smoke", "--mnist", str(mnist), "--mnist_seconds", "0"]) == 0
    said = capsys.readouterr().out
    assert [line[3:] for line in said.splitlines() if line.startswith("## ")] == list(gpu.ABOUT)
    assert "failed" not in said and said.count("| yes |") > 30
    assert sum(line.startswith("skipped: the regions ran") for line in said.splitlines()) == 1
    *plain, compiled = (variant.name for variant in gpu_speed.VARIANTS)
    assert all(f"\n| {name} | " in said for name in plain) and f"{compiled}: skipped: " in said
    assert "| test bits/dim | +- noise | +- images | test images |" in said


@pytest.mark.slow
def test_an_hour_of_mnist(mnist, tmp_path, monkeypatch):
    """A tiny run is trained, scored and optimized once, and its report replaces that part of the page."""
    tiny = "--block_out_channels 8 --norm_num_groups 4 --train_batch_size 4 --max_train_steps 2 --ddpm_num_steps 8"
    told = f"{tiny} --ddpm_num_inference_steps 2 --eval_batch_size 4"
    monkeypatch.setattr(hour, "FEW", "--steps 2 --num_images 4 --num_fit_images 16 --num_knots 4")
    monkeypatch.setattr(hour, "RESULTS", tmp_path)
    monkeypatch.setattr(hour, "PICTURE", tmp_path / "mnist.png")
    (tmp_path / "mnist.md").write_text(f"The choice.\n{hour.HEADING}\nWhat was before.\n")
    run, told = tmp_path / "seed0", ["--mnist", str(mnist), *told.split()]

    def read(name):
        return json.loads((run / name).read_text())

    hour.main(["run", str(run), *told])
    spent = read("cpu_seconds.json")
    hour.main(["run", str(run), *told])
    assert read("cpu_seconds.json")["train"] == spent["train"] > 0
    hour.main(["report", str(run), *told[:2]])
    page, bound = (tmp_path / "mnist.md").read_text(), read("evaluation/metrics.json")["bits_per_dim"]
    assert page.startswith(f"The choice.\n{hour.HEADING}\n10 test images, 4 network calls each")
    assert "before" not in page and f"| **seed0** | {bound:.3f} | here |" in page and "| 2 | optimal | " in page
    assert (tmp_path / "mnist.png").read_bytes() == (run / "samples.png").read_bytes()


def raises(settings):
    raise ValueError("no such thing")


def sleeps(settings):
    time.sleep(60)


def dies(settings):
    print("the last words")
    os._exit(3)


def test_a_section_that_fails_is_told_and_the_others_go_on(monkeypatch, capsys):
    """An exception, a process that hangs and one that dies; the exit code says so."""
    faults = {
        "Correctness": raises,
        "Waits": sleeps,
        "Scoring": dies,
        "MNIST": lambda settings: {"rows": [{"a": 1.5}]},
    }
    told = [
        gpu.Section(heading, "", function, 0.5 if function is sleeps else 30) for heading, function in faults.items()
    ]
    monkeypatch.setattr(gpu, "sections", lambda settings: told)
    assert gpu.main(["--smoke"]) == 1
    said = capsys.readouterr().out
    assert "failed: ValueError: no such thing" in said and "failed: it took more than its 0.5 s." in said
    assert "failed: its process ended without a result. the last words" in said and "| 1.5 |" in said


def test_a_value_beyond_its_limit_is_found(monkeypatch):
    """One part in 10^5 more than the CPU's is beyond the limit of a loss, and the whole is not well."""
    factor = itertools.cycle([1.0, 1.00001])
    monkeypatch.setattr(gpu_checks, "samplers", lambda device: {})
    monkeypatch.setattr(gpu_checks, "steps", lambda dtype, device: {})
    monkeypatch.setattr(gpu_checks, "estimates", lambda settings, dtype: {"ok": True})
    monkeypatch.setattr(
        gpu_checks, "losses", lambda dtype, device: {"a loss": (torch.ones(3) * next(factor), gpu_checks.LOSS)}
    )
    result = gpu_checks.correctness(gpu_speed.Settings(True, Path(), None, 0.0))
    assert [row["ok"] for row in result["rows"]] == [False] * 3 + [True] * 3
    assert [row["error"] for row in result["rows"][:3]] == pytest.approx([1e-5] * 3, rel=0.02)
    assert not gpu.all_well([result]) and gpu.all_well([{"rows": result["rows"][3:]}])


def test_an_error_is_relative_to_its_image():
    """Each row by its own largest value; NaN on the device is infinitely wrong."""
    cpu = torch.tensor([[1.0, 100.0], [0.01, 0.02]])
    assert gpu_checks.worst(cpu + 0.01, cpu) == pytest.approx(0.5, rel=1e-4)
    assert gpu_checks.worst(torch.tensor([[1.0, torch.nan]]), cpu[:1]) == float("inf")


def test_time_in_which_a_device_works_is_that_of_a_union():
    """Kernels that overlap count once, and what is no work of the device does not."""
    spans = [("kernel", 0, 4), ("gpu_memcpy", 2, 4), ("kernel", 3, 1), ("gpu_memset", 10, 5), ("cpu_op", 100, 50)]
    events = [{"ph": "X", "cat": cat, "ts": start, "dur": length} for cat, start, length in spans]
    assert gpu_speed.union_seconds([*events, {"ph": "M"}]) == pytest.approx(11e-6)


@pytest.mark.parametrize("check", [gpu_checks.samplers, *(partial(f, torch.float32) for f in CHECKS)])
def test_the_checks_are_made_on_the_device(check):
    """On a pretend one too, where tensors of two devices in one operation are refused; its values are the CPU's."""
    expected = check(torch.device("cpu"))
    with pretend_device.PretendDevice():
        found = check(pretend_device.DEVICE)
        for what, (value, limit) in found.items():
            assert value.device == pretend_device.DEVICE
            assert gpu_checks.worst(value, expected[what][0]) <= limit


def test_no_step_waits_where_it_must_not(monkeypatch):
    """Waits are forbidden from each step's begin to its end, and a pretend device sees none in between."""
    seen = []
    monkeypatch.setattr(gpu_speed.Settings, "device", pretend_device.DEVICE)
    with pretend_device.PretendDevice() as device:
        monkeypatch.setattr(gpu_checks, "told", lambda settings, mode: seen.append((mode, list(device.waits))))
        for kind in ("int", "one", "batch"):
            gpu_checks.step_loop(gpu_speed.Settings(True, Path(), None, 0.0), kind)
    assert [mode for mode, _ in seen] == ["error", "default"] * 12
    assert all(before == after for (_, before), (_, after) in zip(seen[::2], seen[1::2]))


def test_policy_gradients_smoke(capsys):
    """Its tables, tiny: ratios and the optimal widths are one within four errors, the small variance's far below."""
    policy_gradients.main(rows=200, side=8)
    said = capsys.readouterr().out
    assert re.findall("^## (.*)", said, re.MULTILINE) == ["Ratios", "Widths", "Digits"]
    ones = re.findall(r"^\| (?:the [a-z ]+|\d+ \| optimal) \| ([\d.]+) \+- ([\d.]+) \|", said, re.MULTILINE)
    assert len(ones) == 6 and all(abs(float(mean) - 1) < 4 * float(error) for mean, error in ones)
    narrow = re.findall(r"\| fixed_small \| ([\d.]+) ", said)
    assert len(narrow) == 3 and max(map(float, narrow)) < 0.9


def test_a_widened_network_is_measured(monkeypatch, capsys):
    """It scores and is sampled as the one that it was made of, and then it is trained."""
    monkeypatch.setattr(widening, "KINDS", {"fixed_small": "betatilde_t"})
    monkeypatch.setattr(widening, "WAYS", {"mean frozen": ["--freeze_mean"]})
    monkeypatch.setattr(widening, "IMAGES", 2)
    monkeypatch.setattr(widening, "KNOTS", 4)
    monkeypatch.setattr(widening, "fit_pilot", partial(widening.fit_pilot, num_calls=128))
    widening.main("--stock_steps 2 --steps 2 --images 2 --sampled_steps 4".split())
    said = capsys.readouterr().out
    rows = [line.split(" | ") for line in said.splitlines() if " +- " in line]
    assert [name for name, *_ in rows] == [
        "| stock's",
        "| the same, the best variance of each step",
        "| widened",
        "| mean frozen",
    ]
    assert rows[0][1:3] == rows[2][1:3] != rows[3][1:3]
    assert float(said.split("at most ")[1].split()[0]) < 1e-6


def test_class_posterior_runs(tmp_path, capsys, monkeypatch):
    """The benchmark of the classes, tiny: every row of its tables, for two networks that are there."""
    for name, calls in (("fit_pilot", 64), ("fit_class_pilot", 128)):
        monkeypatch.setattr(posterior_benchmark, name, partial(getattr(posterior_benchmark, name), num_calls=calls))
    for name, classes in (("classes", 11), ("digits", None)):
        tiny = tiny_unet(classes=classes), scheduler(levels=17, num_train_timesteps=20, beta_end=0.4)
        DDPMVLBPipeline(*tiny).save_pretrained(tmp_path / name)
    folders = "--model", str(tmp_path / "classes"), "--unconditional", str(tmp_path / "digits")
    posterior_benchmark.main([*folders, "--images", "3", "--calls", "20", "40", "--seeds", "2"])
    said = capsys.readouterr().out
    rows = [line.split(" | ")[1] for line in said.splitlines() if line.startswith(("| shared", "| draws"))]
    assert rows == ["40", "20", "40", "20", "40", "40", "20", "40"]
    accuracy, low, high = re.search(r"`class_posterior`\) \| 40 \| (\S+) \+- \S+ \| (\S+) to (\S+) \|", said).groups()
    assert float(accuracy) == pytest.approx((float(low) + float(high)) / 2, abs=0.11) and "| of 2 seeds |" in said
    assert "## Calibration at 40 calls" in said and said.count("+-") > 14
    assert "| the label for no class | " in said and "| nothing: a network trained without labels | " in said


def test_a_fine_tune_is_told_by_its_benchmark(monkeypatch, capsys):
    """Tiny, by what the full loop says within four errors; what nothing changed does not differ at all."""
    monkeypatch.setitem(tiny_pipelines.BETAS, "num_train_timesteps", 20)
    monkeypatch.setattr(text_to_image, "fine_tune", partial(tiny_pipelines.fine_tune, steps=10))
    monkeypatch.setattr(text_to_image, "CALLS", (8,))
    monkeypatch.setattr(text_to_image, "CHANGES", {0.0: 1, 1e-2: 1})
    text_to_image.main(images=8, seeds=1)
    said = capsys.readouterr().out
    rows = [line.strip("| ").split(" | ") for line in said.splitlines() if re.match(r"\| \d", line)]
    base, tuned, true = (float(cell.split(" ")[0]) for cell in rows[0][1:4])
    off = float(rows[0][4].split(", ")[2])
    assert true == pytest.approx(tuned - base, abs=0.002) and true < 0 and abs(off) < 4
    assert "\nmy/tuned: " in said and "\ndifference: " in said
    assert rows[1] == "0 0 0 1 0 0 0".split() and rows[2][0] == "0.01" and 0 < float(rows[2][6]) < 0.1


def test_checkpoints_are_ordered_by_their_benchmark(monkeypatch, capsys):
    """Tiny: in every table numbers, the bound's estimates near the truth; by two errors more equals end a run."""
    options = dict(num_train_timesteps=20, beta_end=0.4, variance_type="learned_range", levels=17)
    tiny = checkpoints.Network(16, 1), DDPMVLBScheduler(**options).reverse_process()
    monkeypatch.setattr(checkpoints, "build", lambda: tiny)
    monkeypatch.setattr(checkpoints, "CHECKPOINTS", 3)
    monkeypatch.setattr(checkpoints, "SIMULATED", ((10, 8, 0.0),))
    checkpoints.main("--steps 30 --images 8 --seeds 2 --replicates 2 --runs 20".split())
    said = capsys.readouterr().out
    rows = [line.strip("| ").split(" | ") for line in said.splitlines() if line.startswith("| ")]
    headings = ["Training", "Fine-tune on 64 images", "Coverage of the", "False stops, 20"]
    assert re.findall(r"^## (.*?)(?: paired.*| simulated.*)?$", said, re.MULTILINE) == headings and "nan" not in said
    bounds = [row for row in rows if row[0] == "`Validation`, the bound"]
    assert [row[1:3] for row in bounds] == [["1.000 (1.000)", "0.0 %"]] * 2
    for _, truth, mean, _, error, _ in [row for row in rows if "+-" in row[1]]:
        assert 0 < abs(float(truth.split()[0]) - float(mean.split()[0])) < 4 * float(error)
    shares = [[float(cell.split()[0]) for cell in row[4:]] for row in rows if row[1:4] == ["10", "8", "0.0"]]
    assert 0 <= shares[0][1] <= shares[0][0] < shares[1][0] and said.count("seed by seed: 0, 0.") == 2


def test_compression_and_its_speed_run(tmp_path, capsys):
    """Their tables, of few images and steps; where there is no JPEG XL, they say so."""
    folder = str(tmp_path)
    DDPMVLBPipeline(tiny_unet(), DDPMVLBScheduler(variance_type="learned_range", levels=17)).save_pretrained(folder)
    compression.main(["--model", folder, "--steps", "2", "--calls", "4", "--images", "1", "5"])
    compression_speed.main(["--model", folder, "--images", "3", "3", "--steps", "1", "--symbols", "500"])
    said = capsys.readouterr().out
    assert "| 2 | not stored |" in said and "| this, K = 2, 4 lanes |" in said and "| 3 digits, 8x8 | 1 |" in said
    assert "| 3 of 3x32x32 | 1 |" in said and "| one state |" in said and "| constriction" in said
