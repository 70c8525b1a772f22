"""What `ddpm-vlb evaluate` refuses: in one line, before any scoring."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import safetensors.torch
import torch
from scoring_support import (
    FEW,
    ROOT,
    changed_model,
    launcher,
    options_for,
    positions_in,
    refusal_of,
    write_arrays,
    write_images,
    write_splits,
)


@pytest.fixture
def refused(monkeypatch, tmp_path, models, sets, calls):
    """Run the script with bad input: it must say so in one line, with no network call and no result."""

    def refuse(model, data, pattern, options=""):
        data = sets[data].options if data in sets else data
        output = () if "--output_dir" in options else ("--output_dir", tmp_path / "run")
        where = ("--model", models.get(model, model), *data, *output)
        message = refusal_of(monkeypatch, "evaluate.py", *where, *FEW, *options.split())
        assert isinstance(message, str) and message.startswith("ddpm-vlb evaluate: ") and "\n" not in message.strip()
        assert re.search(pattern, message), message
        assert calls == [] and not (tmp_path / "run" / "metrics.json").exists()

    return refuse


@pytest.mark.parametrize(
    "last, value, pattern",
    [(5, 0.06, "256 levels.*levels"), (5, 1.5, r"\[-1, 1\].*1\.5"), (5, np.nan, "NaN"), (600, 0.06, "256 levels")],
)
def test_data_off_its_levels_is_refused(refused, tmp_path, value, pattern, last):
    """One value of the last image, normalised or resized after it was quantised: before any scoring, with the fix."""
    arrays = np.ones((last + 1, 1, 8, 8), np.float32)
    arrays[last, 0, 1, 1] = value
    folder = write_arrays(tmp_path / "set", {"train": arrays[:5], "test": arrays})
    refused("small", options_for(tmp_path, folder), pattern)


def test_normalised_data_is_refused(refused, tmp_path):
    """Of the pilot and of the scores."""
    arrays = np.random.default_rng(0).uniform(-1, 1, (12, 1, 8, 8)).astype(np.float32)
    folder = write_arrays(tmp_path / "set", {"train": arrays, "test": arrays})
    refused("small", options_for(tmp_path, folder), "256 levels.*normalised.*levels")


def test_too_many_levels_are_refused(refused, tmp_path):
    """8-bit images for a checkpoint of 17 levels, with the fix; one bright image among many is enough."""
    images = [PIL.Image.new("L", (8, 8))] * 600 + [PIL.Image.new("L", (8, 8), 255)]
    content = {"train": {"image": images[:5]}, "test": {"image": images}}
    folder = write_splits(tmp_path / "set", content, image=datasets.Image())
    refused("few levels", options_for(tmp_path, folder), r"level 255, above 16.*requantise")


@pytest.mark.parametrize(
    "model, data, options, pattern",
    [
        ("colour", "grey", "", r"grey \(1 channel\), but the model takes 3"),
        ("small", "colour", "", r"in colour \(3 channels\), but the model takes 1"),
        ("latents", "grey", "", "1 channel.*takes 4"),
        ("small", "latents", "", r"shape \(4, 4, 4\), but the model takes \(1, 8, 8\)"),
        ("small", "grey", "--resolution 9", r"--resolution 9.* 8 x 8"),
        ("small", "grey", "--split dev", r"no split 'dev'; it has \['test', 'train'\]"),
        ("small", "grey", "--image_column img", r"no column 'img'; it has \['image'\]"),
        ("classes", "grey", "", r"no column 'label'; it has \['image'\].*--label_column"),
        ("classes", "labelled", "--label_column kind", r"no column 'kind'.*--label_column"),
        ("small", "grey", "--num_inference_steps 21", r"num_inference_steps.* 1 \.\. 20.* 21"),
        ("small", "grey", "--timesteps 3 20", r"--timesteps .*0 \.\. 19.*20"),
        ("small", "grey", "--timesteps 3 3", r"--timesteps .*different"),
        ("ddim", "grey", "", "DDIMScheduler.*DDPMVLBScheduler"),
        ("nowhere", "grey", "", "--model nowhere: there is no such folder"),
        ("./no/where", "grey", "", "--model ./no/where: there is no such folder"),
        ("small", ("--dataset_name", "./no/where"), "", "--dataset_name ./no/where cannot be loaded"),
    ],
)
def test_what_does_not_fit_is_refused(refused, model, data, options, pattern):
    """In one line with the reason, before any scoring."""
    refused(model, data, pattern, options)


@pytest.mark.parametrize("bad", [-1, 5])
def test_labels_out_of_range_are_refused(refused, tmp_path, bad):
    """With the label, the image and the classes."""
    labels = {"train": [0, 1, 2], "test": [0, 1, bad]}
    folder, _ = write_images(tmp_path / "set", {"train": 3, "test": 3}, labels=labels)
    refused("classes", options_for(tmp_path, folder), rf"Label {bad} of image number 2 .*0 \.\. 4")


def test_images_of_another_size_are_refused(refused, tmp_path):
    """One among many is enough: with its number, both sizes and the option that resizes."""
    images = [PIL.Image.new("L", (8, 8))] * 600 + [PIL.Image.new("L", (9, 7))]
    content = {"train": {"image": images[:5]}, "test": {"image": images}}
    folder = write_splits(tmp_path / "set", content, image=datasets.Image())
    refused("small", options_for(tmp_path, folder), r"number 600 is 9 x 7, .* 8 x 8.*--resolution")


@pytest.mark.parametrize("content", ["", "PAR1 and no more", "{}"])
def test_an_unreadable_data_file_is_refused(refused, tmp_path, content):
    """With its name."""
    (tmp_path / "images.parquet").write_text(content)
    refused("small", options_for(tmp_path, str(tmp_path / "images.parquet")), r"images\.parquet")


def test_an_unreadable_image_is_refused(refused, tmp_path):
    """With its name."""
    for split in ("train", "test"):
        (tmp_path / "set" / split).mkdir(parents=True)
        for i in range(4):
            PIL.Image.new("L", (8, 8), i).save(tmp_path / "set" / split / f"{i}.png")
    (tmp_path / "set" / "test" / "2.png").write_bytes(b"not a picture")
    refused("small", options_for(tmp_path, str(tmp_path / "set")), r"2\.png' cannot be read")


@pytest.mark.parametrize(
    "file, content",
    [
        ("model_index.json", None),
        ("model_index.json", "{"),
        ("unet/config.json", "{"),
        ("unet/diffusion_pytorch_model.safetensors", ""),
        ("unet/diffusion_pytorch_model.safetensors", "half"),
        ("scheduler/scheduler_config.json", None),
        ("data.json", "{"),
        ("data.json", '{"dataset_name": null}'),
    ],
)
def test_a_broken_checkpoint_is_refused(refused, models, tmp_path, file, content):
    """A folder without a pipeline, or with torn files: with the option and the folder."""
    folder = shutil.copytree(models["small"], tmp_path / "broken")
    whole = (folder / file).read_bytes() if (folder / file).exists() else b""
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(whole[: len(whole) // 2] if content == "half" else content.encode())
    refused(folder, (), re.escape(str(folder)))


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_an_output_folder_that_cannot_be_made_is_refused(refused, tmp_path, name):
    """With the option and the path, before any scoring; a file in the way stops even root."""
    (tmp_path / "file").write_text("mine")
    refused("small", "grey", rf"--output_dir .*{name} cannot be written", f"--output_dir {tmp_path / name}")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no folder here that even root cannot write to")
def test_an_output_folder_that_cannot_be_written_is_refused(refused):
    """One that is there, but takes no files, is refused before any scoring too."""
    refused("small", "grey", "--output_dir /proc cannot be written", "--output_dir /proc")


def nan_for_image(position, models, tmp_path):
    """The options for a network that answers NaN for one image, whose class no other has."""
    model = shutil.copytree(models["classes"], tmp_path / "model")
    path = model / "unet" / "diffusion_pytorch_model.safetensors"
    weights = safetensors.torch.load_file(path)
    weights["class_embedding.weight"][3] = torch.nan
    safetensors.torch.save_file(weights, path, {"format": "pt"})
    labels = {"train": [0, 1, 2, 4], "test": [0, 1, 2, 4, 0, 1, 2]}
    labels["test"][position] = 3
    folder, _ = write_images(tmp_path / "set", {"train": 4, "test": 7}, labels=labels)
    return ["--model", model, *options_for(tmp_path, folder), "--output_dir", tmp_path / "run", *FEW]


def test_nan_from_the_network_stops_the_run(monkeypatch, models, tmp_path):
    """It names the timestep and the image; there is no result, and the next start stops at the same place."""
    options = nan_for_image(5, models, tmp_path)
    for _ in range(2):
        message = refusal_of(monkeypatch, "evaluate.py", *options)
        assert re.fullmatch(r"ddpm-vlb evaluate: NaN or infinity in .*\(timestep \d+\), image 5\.", message)
        assert not (tmp_path / "run" / "metrics.json").exists()
    assert positions_in(tmp_path / "run") == [0, 1, 2, 3]


@pytest.mark.slow
def test_two_processes_without_data(models, tmp_path):
    """One message, and both end."""
    options = ["--model", str(models["small"]), "--dataset_name", str(tmp_path / "nothing")]
    command = [*launcher(2), str(ROOT / "examples" / "evaluate.py"), *options, "--output_dir", str(tmp_path / "run")]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Connection closed" not in done.stderr
    assert done.stderr.count("ddpm-vlb evaluate: --dataset_name ") == 1 and 'evaluate.py", line' not in done.stderr


@pytest.mark.slow
def test_nan_on_one_of_two_processes_stops_both(models, tmp_path):
    """None waits for the other; the message is on standard error, and the launch fails."""
    options = nan_for_image(5, models, tmp_path)
    for size in (16, 8):  # in the third unit of two images, the first process's; in the sixth of one, the second's
        more = ("--eval_batch_size", size)
        command = [*launcher(2), str(ROOT / "examples" / "evaluate.py"), *map(str, (*options, *more))]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode != 0 and not (tmp_path / "run" / "metrics.json").exists()
        assert re.search(r"ddpm-vlb evaluate: NaN or infinity in .*\(timestep \d+\), image 5\.", done.stderr)


def test_nan_in_the_pilot_stops_the_run(monkeypatch, models, sets, tmp_path):
    """It names the timestep and says that the image is one of the pilot's."""

    def spoil(folder):
        path = folder / "unet" / "diffusion_pytorch_model.safetensors"
        weights = safetensors.torch.load_file(path)
        weights["conv_out.bias"][0] = torch.nan
        safetensors.torch.save_file(weights, path, {"format": "pt"})

    model = changed_model(models, tmp_path, spoil)
    options = ("--model", model, *sets["grey"].options, "--output_dir", tmp_path / "run", *FEW)
    message = refusal_of(monkeypatch, "evaluate.py", *options)
    assert re.search(r"NaN or infinity in .*\(timestep \d+\).*pilot.* image \d+|pilot.*timestep \d+", message)
    assert not (tmp_path / "run" / "metrics.json").exists()


PATIENTLY = f"""
import runpy, sys, time
time.sleep = lambda seconds: None  # the Hub's client waits half a minute before it gives up

def script(*options):
    sys.argv = ["evaluate.py", "--cpu", *options]
    runpy.run_path({str(ROOT / "examples" / "evaluate.py")!r}, run_name="__main__")

model, output = sys.argv[1:]
try:
    script("--model", "some/thing", "--output_dir", output)
except SystemExit as stop:
    print(stop.code)
script("--model", model, "--dataset_name", "some/thing", "--output_dir", output)
"""


@pytest.mark.slow
def test_a_hub_that_cannot_be_reached(models, tmp_path):
    """For the model and for the data: one line with the option, the name and what to look at, and exit code 1."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-c", PATIENTLY, str(models["small"]), str(tmp_path / "run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    (model,), data = done.stdout.splitlines(), done.stderr.strip().splitlines()[-1]
    for name, message in (("--model", model), ("--dataset_name", data)):
        assert (
            message.startswith(f"ddpm-vlb evaluate: {name} some/thing cannot be loaded") and "HF_ENDPOINT" in message
        )
    assert not (tmp_path / "run").exists()
