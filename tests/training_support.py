"""What the tests of training share: a tiny network's options, runs of it, and what a run leaves behind."""

import json
import math
import subprocess
import sys

import datasets
import numpy as np
import PIL.Image
import pytest
import safetensors.torch
import torch
from processes import ROOT, environment, free_port, reset_accelerate

from ddpm_vlb.commands import train
from ddpm_vlb.recipes import train as recipe
from ddpm_vlb.training import pictures as training_pictures

SIZE, CALLS = "--block_out_channels 8 8 --norm_num_groups 4".split(), "--calls_per_image 8".split()
REST = (
    "--train_batch_size 8 --ddpm_num_steps 20 --lr_warmup_steps 0 --num_test_images 8 --eval_batch_size 4 "
    "--ddpm_num_inference_steps 4"
).split()
TINY = [*SIZE, *REST, *CALLS]
SCORES = {"bits_per_dim", "noise_se", "image_se", "prior", "kl", "decoder", "num_images", "network_calls_per_image"}

# Runs in this process


def tiny(folder, options="", *more, pictures=False):
    """Train a tiny network for a few steps on the CPU; returns the metrics. Pictures take longer than its training."""
    reset_accelerate()
    with pytest.MonkeyPatch.context() as patch:
        for name in () if pictures else ("plot_samples", "plot_vlb_terms"):
            patch.setattr(training_pictures, name, lambda *args: None)
        # Without effect, and refused, beside a network's own config or chain, or where nothing is scored.
        pretrained = "--pretrained" in [*options.split(), *more]
        size = [] if "--model_config_name_or_path" in options or pretrained else SIZE
        rest = [own for own in REST if not (pretrained and own in ("--ddpm_num_steps", "20"))]
        calls = [] if "--num_test_images 0" in options else CALLS
        return train.main(
            [*size, *rest, *calls, "--cpu", "--output_dir", str(folder), *options.split(), *map(str, more)]
        )


class Reached(Exception):
    """Raised in place of what comes after the part of a run that a test is about."""


def until_training(*args):
    """`tiny` that stops, with `Reached`, where training would begin."""

    def reached(run, validate):
        raise Reached

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "train", reached)
        return tiny(*args)


def only_train(*args):
    """`tiny` that saves the network and returns the `Run`, without scores and pictures."""

    def save(run):
        train.save_pipeline(run, run.averaged_network())
        raise Reached(run)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Reached) as end:
        patch.setattr(train, "finish", save)
        tiny(*args)
    return end.value.args[0]


# What a run leaves behind


def weights(folder):
    return safetensors.torch.load_file(str(folder / "unet" / "diffusion_pytorch_model.safetensors"))


def checkpoint_weights(folder, step):
    return safetensors.torch.load_file(str(folder / f"checkpoint-{step}" / "model.safetensors"))


def same_weights(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def difference(a, b):
    """The largest relative difference of a tensor, in the 2-norm."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).norm() / a[name].norm()) for name in a)


def check_metrics(metrics, folder):
    """What every metrics.json promises."""
    test = metrics["test"]
    assert SCORES <= test.keys() and all(math.isfinite(test[name]) for name in SCORES)
    assert test["prior"] + test["kl"] + test["decoder"] == pytest.approx(test["bits_per_dim"], abs=1e-9)
    assert (test["num_images"], test["network_calls_per_image"], test["clip_sample"]) == (8, 8, True)
    assert test["by_clipping"].keys() == {"clipped", "unclipped"}
    assert {name: test[name] for name in SCORES} == test["by_clipping"]["clipped"]
    assert test["noise_se"] > 0 and test["image_se"] >= 0 and test["decoder"] >= 0
    assert metrics["baselines"].keys() == {"uniform", "histogram_per_position", "lzma"}
    assert all(math.isfinite(value) and value > 0 for value in metrics["baselines"].values())
    assert metrics["train"]["seconds"] > 0
    assert json.loads((folder / "metrics.json").read_text()) == metrics


# Data


def write_data(folder, arrays, labels=None):
    """A parquet data set of grey images, with labels if there are some."""
    content, features = (
        {"image": [PIL.Image.fromarray(array.astype(np.uint8)) for array in arrays]},
        datasets.Features(),
    )
    features["image"] = datasets.Image()
    if labels is not None:
        content["label"], features["label"] = labels, datasets.Value("int64")
    folder.mkdir(parents=True)
    datasets.Dataset.from_dict(content, features=features).to_parquet(str(folder / "train-00000-of-00001.parquet"))
    return folder


# Commands


def launch(arguments, script_options, code=0, script="examples/train.py", **more):
    """Run a script under `accelerate launch`; returns what it printed, or its errors where it shall fail."""
    command = [sys.executable, "-m", "accelerate.commands.launch", *arguments, script, *script_options]
    done = subprocess.run(command, cwd=ROOT, env=environment(**more), capture_output=True, text=True, timeout=1800)
    assert done.returncode == code, done.stderr[-5000:]
    return done.stderr if code else done.stdout


def launch_two(folder, options, code=0, **more):
    """Train on two CPU processes; `--cpu --num_processes 2` would start one."""
    arguments = (
        "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no "
        f"--main_process_port {free_port()}"
    )
    script_options = [*TINY, "--output_dir", str(folder), *options.split()]
    return launch(arguments.split(), script_options, code, ACCELERATE_USE_CPU="true", **more)
