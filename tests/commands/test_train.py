import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import PIL.Image
import pytest
import safetensors.torch
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from hub_server import HubServer
from sklearn.datasets import load_digits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ddpm_vlb import DDPMVLBPipeline, VLBEstimate, estimate_vlb, fit_pilot
from ddpm_vlb.commands import train
from ddpm_vlb.commands.train_options import build_parser, parse_args
from ddpm_vlb.recipes import train as recipe
from ddpm_vlb.runtime import reporting
from ddpm_vlb.runtime.image_data import from_record, load_image_data
from ddpm_vlb.runtime.reporting import baselines
from ddpm_vlb.scoring.sweep import pilot_positions
from ddpm_vlb.training import run as training_run
from ddpm_vlb.training.global_batches import GlobalBatches

ROOT = Path(__file__).parents[2]
TINY = (
    "--block_out_channels 8 8 --norm_num_groups 4 --train_batch_size 8 --ddpm_num_steps 20 --lr_warmup_steps 0 "
    "--calls_per_image 8 --num_test_images 8 --eval_batch_size 4 --ddpm_num_inference_steps 4"
).split()
SCORES = {"bits_per_dim", "noise_se", "image_se", "prior", "kl", "decoder", "num_images", "network_calls_per_image"}
SHARED_WITH_DIFFUSERS = """
    dataset_name dataset_config_name model_config_name_or_path train_data_dir output_dir cache_dir resolution
    random_flip train_batch_size eval_batch_size dataloader_num_workers num_epochs gradient_accumulation_steps
    learning_rate lr_scheduler lr_warmup_steps adam_beta1 adam_beta2 adam_weight_decay adam_epsilon use_ema
    ema_inv_gamma ema_power ema_max_decay logger logging_dir mixed_precision prediction_type ddpm_num_steps
    ddpm_num_inference_steps ddpm_beta_schedule checkpointing_steps checkpoints_total_limit resume_from_checkpoint
""".split()
ALSO_IN_DIFFUSERS_OTHER_SCRIPTS = "max_train_steps seed snr_gamma max_grad_norm image_column validation_steps".split()


def reset_accelerate():
    """Accelerate keeps its settings for the whole process; each run here brings its own."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def fresh_accelerate():
    reset_accelerate()
    yield
    reset_accelerate()


def tiny(folder, options="", *more):
    """Train a tiny network for a few steps on the CPU; returns the metrics."""
    reset_accelerate()
    return train.main([*TINY, "--cpu", "--output_dir", str(folder), *options.split(), *map(str, more)])


def weights(folder):
    return safetensors.torch.load_file(str(folder / "unet" / "diffusion_pytorch_model.safetensors"))


def checkpoint_weights(folder, step):
    return safetensors.torch.load_file(str(folder / f"checkpoint-{step}" / "model.safetensors"))


def same_weights(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def check_metrics(metrics, folder):
    """What every metrics.json promises."""
    test = metrics["test"]
    assert SCORES <= test.keys() and all(math.isfinite(test[name]) for name in SCORES)
    assert test["prior"] + test["kl"] + test["decoder"] == pytest.approx(test["bits_per_dim"], abs=1e-9)
    assert (test["num_images"], test["network_calls_per_image"], test["clip_sample"]) == (8, 8, False)
    assert test["noise_se"] > 0 and test["image_se"] >= 0 and test["decoder"] >= 0
    assert metrics["baselines"].keys() == {"uniform", "histogram_per_position", "lzma"}
    assert all(math.isfinite(value) and value > 0 for value in metrics["baselines"].values())
    assert metrics["train"]["seconds"] > 0
    assert json.loads((folder / "metrics.json").read_text()) == metrics


def write_images(folder, count, sizes, mode):
    """Random images of the given sizes (height, width) in turn."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    bands = {"L": (), "RGB": (3,)}[mode]
    for i in range(count):
        levels = rng.integers(0, 256, (*sizes[i % len(sizes)], *bands), dtype=np.uint8)
        PIL.Image.fromarray(levels).save(folder / f"{i:03d}.png")
    return folder


def scalars(folder):
    """The last value of each scalar in a run's logs, and the tags of its images."""
    events = EventAccumulator(str(folder / "logs" / "train")).Reload()
    tags = events.Tags()
    return {tag: events.Scalars(tag)[-1] for tag in tags["scalars"]}, tags["images"]


class Reached(Exception):
    """Raised in place of what comes after the part of a run that a test is about."""


@pytest.fixture
def until_training(monkeypatch):
    """`tiny` that stops, with `Reached`, where training would begin."""

    def reached(run, validate):
        raise Reached

    monkeypatch.setattr(recipe, "train", reached)
    return tiny


@pytest.fixture
def only_train(monkeypatch):
    """`tiny` that saves the network and returns the `Run`, without scores and pictures."""

    def save(run):
        train.save_pipeline(run, run.averaged_network())
        raise Reached(run)

    def shortened(*args):
        with monkeypatch.context() as patch, pytest.raises(Reached) as end:
            patch.setattr(train, "finish", save)
            tiny(*args)
        return end.value.args[0]

    return shortened


@pytest.fixture
def no_pictures(monkeypatch):
    """Leave out the pictures, which take longer than a tiny network's training."""
    for name in ("plot_samples", "plot_vlb_terms"):
        monkeypatch.setattr(train, name, lambda *args: None)


@pytest.fixture
def train_batches(monkeypatch):
    """What `train_batch` was called with: (the step, x_0, the micro step) of each call."""
    calls, train_batch = [], recipe.train_batch

    def record(run, x_0, micro_step, drawn):
        calls.append((run.progress.step, x_0, micro_step))
        return train_batch(run, x_0, micro_step, drawn)

    monkeypatch.setattr(recipe, "train_batch", record)
    return calls


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """The options for a data set of 154, 8 and 18 images, to save the digits' loading time."""
    folder = tmp_path_factory.mktemp("few")
    features = datasets.Features({"image": datasets.Image()})
    images = [PIL.Image.fromarray((image * 15).astype(np.uint8)) for image in load_digits().images[:180]]
    data = datasets.Dataset.from_dict({"image": images}, features=features)
    (folder / "data").mkdir()
    data.to_parquet(str(folder / "data" / "train-00000-of-00001.parquet"))
    return "--dataset_name", str(folder / "data"), "--cache_dir", str(folder / "cache"), "--logger", "none"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder in which a run on the digits, with validation, has finished, and its metrics."""
    folder = tmp_path_factory.mktemp("base") / "run"
    return folder, tiny(folder, "--max_train_steps 3 --validation_steps 2 --seed 5")


@pytest.fixture(scope="module")
def few_base(tmp_path_factory, few):
    """The same on few images, without validation."""
    folder = tmp_path_factory.mktemp("few_base") / "run"
    return folder, tiny(folder, "--max_train_steps 3", *few)


# Options


def test_every_option_has_a_help_text():
    """And the help renders, with all of them in it."""
    parser = build_parser()
    page = parser.format_help()
    for action in parser._actions:
        assert action.help and action.help.strip(), action.option_strings
        assert action.option_strings[0] in page
    assert "8x8 digits" in page


@pytest.mark.parametrize("name", SHARED_WITH_DIFFUSERS + ALSO_IN_DIFFUSERS_OTHER_SCRIPTS)
def test_options_are_named_as_in_diffusers(name):
    """Where diffusers' scripts have a feature too, they and we call it the same."""
    assert f"--{name}" in build_parser()._option_string_actions


def test_defaults_of_the_objectives():
    """Each objective brings the variance and the sampler that it needs; given ones stay."""
    chosen = {
        objective: (args.variance_type, args.timestep_sampler)
        for objective in ("vlb", "hybrid", "simple")
        for args in [parse_args(["--objective", objective])]
    }
    assert chosen == {
        "vlb": ("learned_range", "gaussian"),
        "hybrid": ("learned_range", "low_discrepancy"),
        "simple": ("fixed_small", "low_discrepancy"),
    }
    args = parse_args("--variance_type fixed_large --timestep_sampler uniform".split())
    assert (args.variance_type, args.timestep_sampler) == ("fixed_large", "uniform")


@pytest.mark.parametrize("calls", [1, 2, 3, 6, 8, 63, 64])
def test_network_calls_come_in_replicates(calls, capsys):
    """--calls_per_image is taken as it is where it makes two replicates or more, and refused otherwise."""
    if calls >= 2:
        assert parse_args(["--calls_per_image", str(calls)]).calls_per_image == calls
        return
    with pytest.raises(SystemExit):
        parse_args(["--calls_per_image", str(calls)])
    assert "--calls_per_image" in capsys.readouterr().err


def test_more_sampled_steps_than_the_chain_has_are_refused(capsys):
    """A number that was given is never changed silently; the default fits itself to the chain."""
    assert parse_args(["--ddpm_num_steps", "20"]).ddpm_num_inference_steps == 20
    with pytest.raises(SystemExit):
        parse_args("--ddpm_num_steps 20 --ddpm_num_inference_steps 21".split())
    assert "--ddpm_num_inference_steps 21" in capsys.readouterr().err


BAD = """
    --max_train_steps 0
    --max_train_steps -5
    --max_train_steps 2.5
    --num_epochs 0
    --train_batch_size 0
    --eval_batch_size 0
    --gradient_accumulation_steps 0
    --learning_rate -1e-3
    --learning_rate 0
    --learning_rate nan
    --learning_rate fast
    --lr_warmup_steps -1
    --max_grad_norm 0
    --adam_beta1 1.5
    --ema_max_decay 2
    --dropout -0.1
    --dropout 1.5
    --vlb_weight -1
    --snr_gamma 0 --objective simple
    --seed -1
    --ddpm_num_steps 0
    --ddpm_beta_start 0
    --ddpm_num_inference_steps 0
    --calls_per_image 0
    --num_test_images 0
    --validation_steps 0
    --checkpointing_steps -1
    --checkpoints_total_limit 0
    --resolution 0
    --dataloader_num_workers -1
    --block_out_channels 8 0
    --block_out_channels
    --attention_levels -1
    --norm_num_groups 0
    --layers_per_block 0
    --objective elbo
    --timestep_sampler importance
    --variance_type learnt
    --prediction_type eps
    --ddpm_beta_schedule cosine
    --timestep_spacing even
    --lr_scheduler cos
    --mixed_precision fp8
    --logger mlflow
    --variance_type learned_range --objective simple
    --variance_type learned --objective simple
    --variance_type fixed_small --objective hybrid
    --variance_type fixed_large_log --objective hybrid
    --rescale_betas_zero_snr
    --rescale_betas_zero_snr --prediction_type epsilon
    --snr_gamma 5 --objective vlb
    --train_data_dir a --dataset_name b
    --num_epochs 1 --max_train_steps 1
    --batch_size 8
    --max_train_step 8
"""


@pytest.mark.parametrize("options", [line.strip() for line in BAD.strip().splitlines()])
def test_bad_options_are_refused(tmp_path, capsys, options):
    """Exit code 2 and the option's name, before a folder is made or data is read."""
    with pytest.raises(SystemExit) as stop:
        train.main(["--output_dir", str(tmp_path / "run"), *options.split()])
    message = capsys.readouterr().err.partition("error: ")[2]  # the usage before it names every option
    assert stop.value.code == 2
    assert re.search(rf"{options.split()[0]}\b", message)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", ["objective", "variance_type", "prediction_type", "lr_scheduler", "logger"])
def test_unknown_names_list_the_choices(capsys, option):
    """The message says what there is to choose from."""
    with pytest.raises(SystemExit):
        parse_args([f"--{option}", "nonsense"])
    message = capsys.readouterr().err.partition("error: ")[2]
    choices = build_parser()._option_string_actions[f"--{option}"].choices
    assert all(choice in message for choice in choices)


@pytest.mark.parametrize(
    "options, message",
    [
        ("--norm_num_groups 3", "--norm_num_groups 3 must divide"),
        ("--attention_levels 2", "--attention_levels 2 is not below the 2 levels"),
        ("--resolution 7", r"sides that 2 divides, but they are \(7, 7\).*--resolution"),
        ("--ddpm_beta_end 2", "`beta_end` must lie in"),
        ("--test_split dev", "no split 'dev'"),
        ("--image_column img", "no column 'img'"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, until_training, few, options, message):
    """What only the data or the network shows is refused before training too, with the fix."""
    with pytest.raises(SystemExit, match=message):
        until_training(tmp_path / "run", options, *few)


def test_an_unknown_data_set_of_the_hub_is_refused(tmp_path, until_training, monkeypatch):
    """In one line."""
    with HubServer() as server:
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", server.endpoint)
        with pytest.raises(SystemExit) as refusal:
            until_training(tmp_path, "--dataset_name nobody/nothing", "--cache_dir", tmp_path / "cache")
    assert refusal.value.code.startswith("ddpm-vlb train: --dataset_name nobody/nothing cannot be loaded: ")
    assert "\n" not in refusal.value.code and "HF_ENDPOINT" in refusal.value.code
    assert any("nobody/nothing" in request.path for request in server.requests)


@pytest.mark.parametrize("name", build_parser()._option_string_actions["--lr_scheduler"].choices)
def test_every_learning_rate_schedule_can_be_made(tmp_path, until_training, few, name):
    """No choice is offered that cannot work."""
    with pytest.raises(Reached):
        until_training(tmp_path / "run", "--max_train_steps 4 --lr_scheduler", name, *few)


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_an_output_folder_that_cannot_be_written_is_refused(tmp_path, until_training, name):
    """Before training, with the option and the path; a file in the way stops even root."""
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SystemExit, match=rf"--output_dir .*{name} cannot be written"):
        until_training(tmp_path / name)
    assert (tmp_path / "file").read_text() == "mine"


# --config


def config(tmp_path, content, *argv, name="options.yaml"):
    """Parse a config file's content, and the command line after it."""
    text = content if isinstance(content, str) else yaml.safe_dump(content)
    (tmp_path / name).write_text(text)
    return parse_args(["--config", str(tmp_path / name), *argv])


def test_config_gives_every_type(tmp_path):
    """Numbers (YAML reads 1e-3 as text), lists, switches both ways, names, and null for a default."""
    args = config(
        tmp_path,
        "learning_rate: 1e-3\nmax_train_steps: 7\nblock_out_channels: [16, 8]\nattention_levels: []\n"
        "use_ema: false\nrandom_flip: true\nobjective: hybrid\noutput_dir: a b\nresolution: null\n",
    )
    assert args.learning_rate == 0.001 and isinstance(args.learning_rate, float)
    assert args.max_train_steps == 7 and args.block_out_channels == [16, 8] and args.attention_levels == []
    assert args.use_ema is False and args.random_flip is True
    assert (args.objective, args.output_dir, args.resolution) == ("hybrid", "a b", None)
    assert args.train_batch_size == parse_args([]).train_batch_size


def test_config_may_be_json(tmp_path):
    """As the help says."""
    args = config(tmp_path, json.dumps({"learning_rate": 1e-3, "use_ema": False, "logger": "none"}), name="a.json")
    assert (args.learning_rate, args.use_ema, args.logger) == (1e-3, False, "none")


def test_the_command_line_overrides_the_config(tmp_path):
    """Wherever --config stands on it."""
    content = {"learning_rate": 1e-3, "block_out_channels": [16, 8], "use_ema": False, "seed": 5}
    options = "--learning_rate 5e-4 --use_ema --block_out_channels 4".split()
    args = config(tmp_path, content, *options)
    assert (args.learning_rate, args.block_out_channels, args.use_ema, args.seed) == (5e-4, [4], True, 5)
    args = parse_args([*options, f"--config={tmp_path / 'options.yaml'}"])
    assert (args.learning_rate, args.block_out_channels, args.use_ema, args.seed) == (5e-4, [4], True, 5)


@pytest.mark.parametrize(
    "content, message",
    [
        ("batch_size: 8", "--batch_size"),
        ("max_train_step: 8", "--max_train_step"),
        ("no-use_ema: 1", "--no-use_ema"),
        ("max_train_steps: 2.5", "--max_train_steps"),
        ("max_train_steps: ten", "--max_train_steps"),
        ("max_train_steps: 0", "--max_train_steps"),
        ("learning_rate: fast", "--learning_rate"),
        ("learning_rate: -1e-3", "--learning_rate"),
        ("block_out_channels: [8, wide]", "--block_out_channels"),
        ("seed: true", "--seed"),
        ("use_ema: 3", "use_ema"),
        ("objective: elbo", "--objective"),
        ("objective: simple\nvariance_type: learned", "--variance_type"),
        ("[1, 2]", "options by name, but holds list"),
        ("", "options by name, but holds NoneType"),
        ("a: [1", "cannot be read"),
    ],
)
def test_a_bad_config_is_refused(tmp_path, capsys, content, message):
    """Names, types, ranges, choices and combinations are checked as on the command line."""
    with pytest.raises(SystemExit) as stop:
        config(tmp_path, content)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.partition("error: ")[2]


def test_a_missing_config_is_named(tmp_path, capsys):
    """With its path."""
    with pytest.raises(SystemExit) as stop:
        parse_args(["--config", str(tmp_path / "missing.yaml")])
    assert stop.value.code == 2
    assert "missing.yaml cannot be read" in capsys.readouterr().err


def test_config_understands_a_plain_no(tmp_path):
    """`mixed_precision: no` is one of its choices, though YAML makes a boolean of the word."""
    assert config(tmp_path, "mixed_precision: no").mixed_precision == "no"


def test_saved_options_are_a_config(base, tmp_path):
    """The options in metrics.json, given back as --config, are the options of the run."""
    _, metrics = base
    saved = metrics["options"]
    again = vars(config(tmp_path, json.dumps(saved), name="options.json"))
    assert {name for name in saved if again[name] != saved[name]} == {"config"}


# What a run leaves behind


def test_metrics(base):
    """metrics.json holds the score with its parts and errors, the baselines, and how it came about."""
    folder, metrics = base
    check_metrics(metrics, folder)
    assert metrics["train"]["steps"] == 3 and metrics["train"]["device"] == "cpu"
    assert metrics["versions"]["torch"] == torch.__version__
    assert not list(folder.rglob("*.partial")) and not list(folder.rglob(".write_test"))


def test_the_report_is_printed(tmp_path, capsys, few):
    """The score with both errors, its parts, and every baseline."""
    metrics = tiny(tmp_path, "--max_train_steps 1", *few)
    out = capsys.readouterr().out
    test = metrics["test"]
    images = f"{test['image_se']:.3f}" if test["image_se"] else "n/a"
    assert f"{test['bits_per_dim']:.3f} +- {test['noise_se']:.3f} (noise) +- {images} (images) bits/dim" in out
    assert f"prior {test['prior']:.4f} + KL {test['kl']:.4f} + decoder {test['decoder']:.4f}" in out
    assert all(f"{name:22} {value:.3f}" in out for name, value in metrics["baselines"].items())


@pytest.mark.parametrize("name", ["samples.png", "vlb_terms.png"])
def test_pictures_are_drawn(base, name):
    """Each opens, and both its halves show something."""
    picture = PIL.Image.open(base[0] / name)
    picture.load()
    levels = np.asarray(picture.convert("L"))
    assert min(levels.shape) >= 300
    for half in np.array_split(levels, 2, axis=1):
        # A blank half would be white all over.
        assert (half < 128).mean() > 0.002 and (half > 200).any()


def test_the_curve_of_the_terms(tmp_path, monkeypatch):
    """It draws each bin's mean term in its place, and the sum that ends in the bound; undrawn steps are left out."""
    figures = []
    monkeypatch.setattr(reporting, "_save", lambda figure, path, **options: figures.append(figure))
    terms = torch.linspace(0.5, 0.1, 100, dtype=torch.float64)
    total = float(0.25 + terms.sum())
    estimate = VLBEstimate(total, 0.1, 0.1, 0.25, 1.0, 1.0, torch.ones(2), 8, terms, torch.full((100,), 0.01))
    reporting.plot_vlb_terms(estimate, tmp_path / "a.png")
    left, right = figures[0].axes
    x, y = (np.array(values, dtype=float) for values in left.lines[0].get_data())
    assert len(x) > 20 and (x[0], y[0]) == (1, 0.5)
    # The terms are linear in t; the geometric centre of a bin lies less than 0.2 steps below its middle.
    assert np.interp(x, np.arange(1, 101), terms) == pytest.approx(y, abs=0.2 * 0.4 / 99)
    summed = np.array(right.lines[0].get_ydata(), dtype=float)
    assert summed[-1] == pytest.approx(total) and (np.diff(summed) > 0).all()
    terms[1] = torch.nan
    reporting.plot_vlb_terms(estimate, tmp_path / "b.png")
    assert len(figures[1].axes[0].lines[0].get_data()[0]) == len(x) - 1


def test_samples_are_a_grid(tmp_path, monkeypatch):
    """Square, row by row, with a white pixel between images, the generated ones beside as many real ones."""
    figures = []
    monkeypatch.setattr(reporting, "_save", lambda figure, path, **options: figures.append(figure))
    generated, real = torch.rand(2, 10, 3, 4, 5)
    reporting.plot_samples(generated, real, tmp_path / "a.png")
    for axis, images in zip(figures[0].axes, (generated, real)):
        grid = axis.images[0].get_array()
        assert grid.shape == (3 * 5, 3 * 6, 3)
        assert np.array_equal(grid[5:9, 12:17], images[5].permute(1, 2, 0))
        assert (grid[4::5] == 1).all() and (grid[:, 5::6] == 1).all()


def test_data_record(base):
    """data.json finds the same test images again."""
    folder, metrics = base
    record = json.loads((folder / "data.json").read_text())
    assert record == metrics["data"]
    assert from_record(record).record == record


def test_tensorboard_logs(base):
    """Losses by term and quartile of t, gradient norm, learning rate, speed, validation scores, a grid of samples."""
    values, images = scalars(base[0])
    names = {"loss", "grad_norm", "lr", "validation_bits_per_dim", "validation_se"}
    names |= {"loss_vlb", "loss_kl", "loss_decoder", "loss_q0", "loss_vlb_q0", "images_per_second", "skipped_steps"}
    assert values["skipped_steps"].value == 0 and values["images_per_second"].value > 0
    assert 0 <= values["data_wait_fraction"].value < 1
    assert values["loss_kl"].value + values["loss_decoder"].value == pytest.approx(values["loss"].value, rel=1e-5)
    assert names <= values.keys() and all(math.isfinite(values[name].value) for name in names)
    assert values["loss"].step == 3 and values["validation_se"].step == 2
    assert values["grad_norm"].value > 0 and values["validation_se"].value > 0
    assert any(tag.startswith("samples") for tag in images)


@pytest.mark.parametrize("weights", [{"simple": 1.0, "vlb": 0.1}, {"vlb": 1.0}, {"simple": 1.0}])
def test_what_the_tracker_is_told(weights):
    """Means under the importance weights, conditional means by quartile of t, and the rates, of all steps since."""
    numbers = torch.Generator().manual_seed(0)
    forward = range(8)
    run = SimpleNamespace(
        term_weights=weights,
        reverse=SimpleNamespace(forward=forward),
        lr_scheduler=SimpleNamespace(get_last_lr=lambda: [0.5]),
        progress=SimpleNamespace(skipped=2),
    )
    statistics = recipe.Statistics(run)
    t = torch.tensor([[0, 0, 1, 2], [7, 6, 3, 0]])  # none in the third quartile
    draws, values = torch.rand(2, 4, generator=numbers), torch.rand(2, 4, len(weights), generator=numbers).double()
    for i in range(2):
        drawn = recipe.Drawn(t[i], draws[i], t[i] > 9)
        statistics.add(drawn, recipe.Shared(values[i], 3.0 + i, False), seconds=2.0, waited=0.5)
    told = statistics.take()
    flat, w, v = t.flatten(), draws.flatten().double(), values.reshape(8, -1)
    columns = {f"loss_{name}": v[:, i] for i, name in enumerate(weights)}
    columns["loss"] = sum(weight * columns[f"loss_{name}"] for name, weight in weights.items())
    expected = {name: float((w * column).sum() / 8) for name, column in columns.items()}
    for q, rows in {0: flat <= 1, 1: (flat == 2) | (flat == 3), 3: flat >= 6}.items():
        expected |= {f"{name}_q{q}": float(column[rows].sum() / rows.sum()) for name, column in columns.items()}
    if "vlb" in weights:
        expected["loss_decoder"] = float((w * columns["loss_vlb"])[flat == 0].sum() / 8)
        expected["loss_kl"] = float((w * columns["loss_vlb"])[flat > 0].sum() / 8)
    expected |= {"grad_norm": 4.0, "lr": 0.5, "images_per_second": 2.0, "data_wait_fraction": 0.25, "skipped_steps": 2}
    assert told == pytest.approx(expected)
    assert statistics.values == [] and statistics.seconds == 0


def test_no_logs_without_a_tracker(few_base):
    """--logger none leaves no log folder."""
    folder, metrics = few_base
    assert metrics["options"]["logger"] == "none"
    assert not (folder / "logs").exists()


@pytest.mark.parametrize("loader, kind", [(DiffusionPipeline, DDPMPipeline), (DDPMVLBPipeline, DDPMVLBPipeline)])
def test_the_pipeline_loads_and_samples(base, loader, kind):
    """Stock's loader makes a stock pipeline of it, ours one of ours; both hold the trained weights and sample."""
    folder, _ = base
    pipeline = loader.from_pretrained(folder)
    assert type(pipeline) is kind
    assert isinstance(pipeline.scheduler, DDPMScheduler) == (kind is DDPMPipeline)
    assert same_weights(pipeline.unet.state_dict(), weights(folder))
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        batch_size=2, num_inference_steps=3, output_type="np", generator=torch.Generator().manual_seed(0)
    ).images
    assert images.shape == (2, 8, 8, 1)
    assert 0 <= images.min() < images.max() <= 1


def test_the_saved_pipeline_has_the_saved_score(base):
    """Scored again from what was saved, with the same seed, it comes to the number in metrics.json."""
    folder, metrics = base
    data = from_record(json.loads((folder / "data.json").read_text()))
    pipeline = DDPMVLBPipeline.from_pretrained(folder)
    reverse = dataclasses.replace(pipeline.scheduler.reverse_process(), clip_sample=False)
    train_images = torch.stack(data.train.__getitems__(pilot_positions(len(data.train), 64)))
    estimate = estimate_vlb(
        pipeline.unet.eval(),
        reverse,
        [next(data.test.batches(8))],
        fit_pilot(pipeline.unet, reverse, train_images, seed=5),
        calls_per_image=8,
        seed=5,
    )
    for name in ("bits_per_dim", "noise_se", "prior", "kl", "decoder"):
        assert getattr(estimate, name) == pytest.approx(metrics["test"][name], rel=1e-4)


def test_the_score_does_not_depend_on_the_batch_size(few_base, tmp_path, few):
    """--eval_batch_size changes how images are grouped for the network, and how many are sampled."""
    metrics = tiny(tmp_path, "--max_train_steps 3 --eval_batch_size 3", *few)
    for name in ("bits_per_dim", "noise_se", "image_se", "prior", "kl", "decoder"):
        assert metrics["test"][name] == pytest.approx(few_base[1]["test"][name], rel=1e-4)


# Training


OBJECTIVES = {
    "simple": ["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"],
    "hybrid": ["learned_range", "learned", "learned_range", "learned"],
    "vlb": ["fixed_small", "fixed_large", "learned", "learned_range"],
}
SAMPLERS = ("uniform", "low_discrepancy", "loss_second_moment", "gaussian")
PREDICTIONS = ("epsilon", "sample", "v_prediction")


@pytest.mark.parametrize(
    "objective, sampler, prediction, variance",
    [
        (objective, sampler, PREDICTIONS[(i + j) % 3], variances[j])
        for i, (objective, variances) in enumerate(OBJECTIVES.items())
        for j, sampler in enumerate(SAMPLERS)
    ],
)
def test_objectives_samplers_and_predictions(tmp_path, few, no_pictures, objective, sampler, prediction, variance):
    """They train, score, and are saved under diffusers' names."""
    metrics = tiny(
        tmp_path,
        f"--max_train_steps 2 --objective {objective} --timestep_sampler {sampler} "
        f"--prediction_type {prediction} --variance_type {variance}",
        *few,
    )
    check_metrics(metrics, tmp_path)
    config = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
    assert config["prediction_type"] == prediction
    assert config["variance_type"] == ("fixed_large" if variance == "fixed_large_log" else variance)
    assert DDPMVLBPipeline.from_pretrained(tmp_path).unet.config.out_channels == 1 + variance.startswith("learned")
    # Stock knows `learned`, but samples it wrongly.
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == ("DDPMVLBPipeline" if variance == "learned" else "DDPMPipeline")


@pytest.mark.parametrize(
    "options",
    [
        "--ddpm_num_steps 1 --ddpm_num_inference_steps 1",
        "--rescale_betas_zero_snr --prediction_type v_prediction",
        "--objective simple --snr_gamma 5",
        "--ddpm_beta_schedule squaredcos_cap_v2 --ddpm_num_steps 100",
        "--attention_levels 1 --dropout 0.1 --layers_per_block 2",
        "--timestep_spacing trailing",
        "--dataloader_num_workers 1",
        "--train_batch_size 2000",
    ],
)
def test_other_options_train(tmp_path, few, options):
    """Edge cases of the chain, the network and the loader."""
    check_metrics(tiny(tmp_path, f"--max_train_steps 2 {options}", *few), tmp_path)


@pytest.mark.parametrize("objective", ["vlb", "hybrid", "simple"])
def test_training_lowers_the_bound(tmp_path, few, no_pictures, objective):
    """A hundred steps are worth far more than the standard errors of the two scores."""
    options = f"--objective {objective} --lr_scheduler constant --num_test_images 18"
    before = tiny(tmp_path / "a", f"{options} --max_train_steps 1", *few)["test"]
    after = tiny(tmp_path / "b", f"{options} --max_train_steps 100", *few)["test"]
    errors = math.hypot(*(score[name] for score in (before, after) for name in ("noise_se", "image_se")))
    assert before["bits_per_dim"] - after["bits_per_dim"] > 5 * errors


def test_every_batch_has_noise_of_its_own(tmp_path, few, only_train, monkeypatch):
    """Standard normal, another draw for each step, micro step and process; t is drawn anew as well."""
    drawn = []
    vlb_loss = recipe.vlb_loss

    def record(reverse, model_output, diffused, **options):
        drawn.append(diffused)
        return vlb_loss(reverse, model_output, diffused, **options)

    monkeypatch.setattr(recipe, "vlb_loss", record)
    run = only_train(tmp_path, "--max_train_steps 4 --gradient_accumulation_steps 2 --train_batch_size 32", *few)
    images = next(run.data.train.batches(32))
    run.batches = GlobalBatches(154, 32, 1, 0, 2, 0)
    global_draw = recipe.draw(run)
    for rank in (0, 1):
        run.batches.rank = rank
        recipe.train_batch(run, images, 0, global_draw)
    assert len(drawn) == 10
    noise = torch.stack([diffused.noise.flatten() for diffused in drawn])
    # Independent normal draws correlate by 1/sqrt(n): six of these standard errors are never reached.
    assert (torch.corrcoef(noise) - torch.eye(10)).abs().max() < 6 / noise.shape[1] ** 0.5
    assert abs(noise.mean()) < 5 / noise.numel() ** 0.5
    assert abs(noise.var() - 1) < 5 * (2 / noise.numel()) ** 0.5
    assert len({tuple(diffused.t.tolist()) for diffused in drawn}) == 10


def test_validation_leaves_training_alone(tmp_path, few, only_train):
    """Scores and samples on the way change nothing: the same weights come out, bit for bit."""
    for name, steps in (("often", 1), ("never", 100)):
        only_train(tmp_path / name, "--max_train_steps 4 --dropout 0.3 --validation_steps", steps, *few)
    assert same_weights(weights(tmp_path / "often"), weights(tmp_path / "never"))


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_step_is_one_update_of_all_its_batches(tmp_path, few, only_train, train_batches, accumulation):
    """The learning rate's warm-up and the progress count updates, each made of that many batches."""
    options = "--max_train_steps 5 --learning_rate 1e-3 --lr_scheduler constant_with_warmup --lr_warmup_steps 10"
    run = only_train(tmp_path, options, *few, "--gradient_accumulation_steps", accumulation)
    assert run.progress.step == 5
    expected = [(step, micro_step) for step in range(5) for micro_step in range(accumulation)]
    assert [(step, micro_step) for step, _, micro_step in train_batches] == expected
    assert run.lr_scheduler.get_last_lr() == pytest.approx([5e-4])


@pytest.mark.parametrize("accumulation, steps", [(1, 14), (2, 7)])
def test_epochs(tmp_path, few, only_train, train_batches, accumulation, steps):
    """An epoch shows every image once, in an order of its own."""
    options = "--num_epochs 2 --train_batch_size 22 --gradient_accumulation_steps"
    run = only_train(tmp_path, options, accumulation, *few)
    assert run.progress.step == steps and len(train_batches) == 14
    images = [x_0 for _, batch, _ in train_batches for x_0 in batch.flatten(1).tolist()]
    first, second = images[:154], images[154:]
    stored = torch.cat(list(run.data.train.batches(64))).flatten(1).tolist()
    assert sorted(first) == sorted(second) == sorted(stored)
    assert first != second and first != stored


def test_the_average_is_what_is_saved(tmp_path, few, only_train):
    """With --use_ema that is s <- d s + (1 - d) w with d = 1 - (1 + k)^-0.75, over the weights w of all steps."""
    only_train(tmp_path, "--max_train_steps 4 --checkpointing_steps 1 --lr_scheduler constant", *few)
    last = checkpoint_weights(tmp_path, 4)
    average = checkpoint_weights(tmp_path, 1)  # before the second step nothing of the past is kept
    for k in (1, 2, 3):
        decay = 1 - (1 + k) ** -0.75
        current = checkpoint_weights(tmp_path, k + 1)
        average = {name: decay * average[name] + (1 - decay) * current[name] for name in average}
    saved = weights(tmp_path)
    for name in saved:
        torch.testing.assert_close(saved[name], average[name], rtol=1e-5, atol=1e-6)
    assert not same_weights(saved, last)


def test_without_an_average_the_last_weights_are_saved(tmp_path, few):
    """--no-use_ema saves, and scores, what the optimizer left."""
    options = "--max_train_steps 4 --checkpointing_steps 4 --lr_scheduler constant --no-use_ema"
    check_metrics(tiny(tmp_path, options, *few), tmp_path)
    assert same_weights(weights(tmp_path), checkpoint_weights(tmp_path, 4))


def test_without_an_average_none_is_held(tmp_path, few, only_train):
    """Nor a copy of the weights in its place."""
    assert only_train(tmp_path, "--max_train_steps 1 --no-use_ema", *few).ema is None


def die_after(count):
    """End this process instead of a further change of a name."""
    replace, left = os.replace, iter(range(count))
    os.replace = lambda *args: replace(*args) if next(left, None) is not None else os._exit(0)


def test_a_killed_save_leaves_no_half_of_two_pipelines(tmp_path, few, only_train):
    """Killed at any change of names, the folder holds the old one, the new one, or none that loads.

    What was measured of the old one is gone before the new one can be loaded.
    """
    measured = {"metrics.json", "samples.png", "vlb_terms.png", "data.json", "few_steps.json", "few_steps.png"}
    run = only_train(tmp_path / "run", "--max_train_steps 1", *few)
    network = run.averaged_network()
    with torch.no_grad():
        next(network.parameters()).add_(1)
    spacing = run.scheduler.config.timestep_spacing
    run.scheduler.register_to_config(timestep_spacing="trailing")  # a part that differs too
    for name in measured:
        (tmp_path / "run" / name).write_text("{}")
    found = set()
    for count in range(20):
        run.folder = shutil.copytree(tmp_path / "run", tmp_path / f"{count}")
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException):
                die_after(count)
                train.save_pipeline(run, network)
            os._exit(1)
        ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if not (run.folder / "model_index.json").exists():
            found.add("none")
            with pytest.raises(OSError):
                DDPMVLBPipeline.from_pretrained(run.folder)
            continue
        loaded = DDPMVLBPipeline.from_pretrained(run.folder)
        parts = same_weights(loaded.unet.state_dict(), network.state_dict()), loaded.scheduler.config.timestep_spacing
        assert parts in ((False, spacing), (True, "trailing"))
        left = {path.name for path in run.folder.iterdir()} & measured
        assert left == (set() if parts[0] else measured)
        found.add("new" if parts[0] else "old")
        if ended:
            break
    assert found == {"old", "none", "new"} and not list(run.folder.glob(".pipeline-*"))


def test_a_power_cut_finds_a_whole_pipeline(tmp_path, few, only_train, monkeypatch):
    """All files are on the disk before they have their names, and those before model_index.json has its own."""
    done, fsync, replace = [], os.fsync, os.replace

    def synced(descriptor):
        done.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def replaced(source, target):
        done.append(("replace", Path(target).name))
        replace(source, target)

    run = only_train(tmp_path, "--max_train_steps 1", *few)
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    train.save_pipeline(run, run.averaged_network())
    first = next(i for i, (event, _) in enumerate(done) if event == "replace")
    written = {path.name for name in ("unet", "scheduler") for path in (tmp_path / name).iterdir()}
    assert {name for _, name in done[:first]} == {*written, "model_index.json", "unet", "scheduler", "new"}
    assert done[-2:] == [("replace", "model_index.json"), ("fsync", tmp_path.name)]
    assert done[-3] == ("fsync", tmp_path.name) and done.count(("fsync", tmp_path.name)) == 3
    moves = [i for i, change in enumerate(done) if change in (("replace", "unet"), ("replace", "scheduler"))]
    assert done[min(moves[2:]) - 1] == ("fsync", tmp_path.name)


def test_bf16(few_base, tmp_path, few):
    """Mixed precision reaches the network; weights, losses and files stay in float32."""
    metrics = tiny(tmp_path, "--max_train_steps 3 --mixed_precision bf16", *few)
    check_metrics(metrics, tmp_path)
    half = weights(tmp_path)
    assert {tensor.dtype for tensor in half.values()} == {torch.float32}
    assert not same_weights(half, weights(few_base[0]))


def is_channels_last(tensor):
    """None where the shape fits either order."""
    if tensor.shape[1] == 1 or tensor.shape[2:].numel() == 1:
        return None
    return tensor.is_contiguous(memory_format=torch.channels_last)


def test_channels_last(tmp_path, few, only_train):
    """All that is convolved while it trains, and the weights; the result is nearly the same, and it is saved plain."""
    options = "--max_train_steps 3 --checkpointing_steps 3 --lr_warmup_steps 100 --block_out_channels 8 16"
    seen = {True: 0, False: 0, None: 0}

    def look(module, inputs, output):
        if type(module) is torch.nn.Conv2d:
            if module.kernel_size == (1, 1):  # a shortcut, whose input diffusers makes contiguous
                inputs = ()
            for tensor in (*inputs, module.weight, output):
                seen[is_channels_last(tensor)] += 1

    only_train(tmp_path / "plain", options, *few)
    hook = torch.nn.modules.module.register_module_forward_hook(look)
    try:
        run = only_train(tmp_path / "last", f"{options} --channels_last", *few)
    finally:
        hook.remove()
    assert seen[True] > 3 * 50 and seen[False] == 0
    moments = [state["exp_avg"] for state in run.optimizer.state.values()]
    assert {is_channels_last(value) for value in moments if value.dim() == 4} == {True, None}
    plain, last = weights(tmp_path / "plain"), weights(tmp_path / "last")
    far = max(float((last[name] - plain[name]).norm() / plain[name].norm()) for name in plain)
    assert far < 1e-5
    own = run.averaged_network().state_dict()
    saved = DDPMVLBPipeline.from_pretrained(tmp_path / "last").unet.state_dict()
    assert all(value.is_contiguous() and torch.equal(value, own[name]) for name, value in saved.items())


def test_colour_images_that_are_not_square(tmp_path):
    """A folder of 8 x 12 colour pictures: 256 levels, six output channels, stock samples of the same shape."""
    pictures = write_images(tmp_path / "pictures", 24, [(8, 12)], "RGB")
    options = ("--max_train_steps 2 --logger none --train_data_dir", pictures, "--cache_dir", tmp_path / "cache")
    metrics = tiny(tmp_path / "run", *options, "--num_test_images", 2, "--random_flip")
    assert metrics["baselines"]["uniform"] == 8
    assert metrics["data"]["num_images"] == {"train": 21, "validation": 1, "test": 2}
    assert math.isfinite(metrics["test"]["bits_per_dim"])
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "run")
    assert type(pipeline) is DDPMPipeline
    assert (pipeline.unet.config.in_channels, pipeline.unet.config.out_channels) == (3, 6)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(batch_size=1, num_inference_steps=2).images[0].size == (12, 8)
    assert PIL.Image.open(tmp_path / "run" / "samples.png").size[0] > 300


def test_images_of_any_size_with_a_resolution(tmp_path):
    """Grey pictures of several sizes, resized; the record brings them back."""
    pictures = write_images(tmp_path / "pictures", 90, [(9, 13), (8, 8), (20, 11)], "L")
    options = ("--resolution 8 --max_train_steps 2 --logger none --train_data_dir", pictures)
    metrics = tiny(tmp_path / "run", *options, "--cache_dir", tmp_path / "cache")
    check_metrics(metrics, tmp_path / "run")
    assert metrics["data"]["size"] == [8, 8] and metrics["data"]["channels"] == 1
    assert from_record(metrics["data"], str(tmp_path / "cache")).record == metrics["data"]


def test_a_network_from_its_config(tmp_path):
    """--model_config_name_or_path takes a saved UNet2DModel config; one with the wrong channels is refused."""
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (12,)}
    for out_channels in (1, 2):
        unet = UNet2DModel(8, 1, out_channels, norm_num_groups=4, layers_per_block=1, add_attention=False, **blocks)
        unet.save_config(tmp_path / f"unet{out_channels}")
    options = ("--max_train_steps 1 --logger none --model_config_name_or_path", tmp_path / "unet2")
    tiny(tmp_path / "run", *options)
    assert DDPMVLBPipeline.from_pretrained(tmp_path / "run").unet.config.block_out_channels == [12]
    with pytest.raises(SystemExit, match="1 input and 1 output channels, but this data.* need 1 and 2"):
        tiny(tmp_path / "other", *options[:1], tmp_path / "unet1")


def test_the_same_seed_gives_the_same_run(few_base, tmp_path, few):
    """Bit for bit, weights and scores."""
    folder, metrics = few_base
    again = tiny(tmp_path, "--max_train_steps 3", *few)
    assert again["test"] == metrics["test"]
    assert same_weights(weights(tmp_path), weights(folder))


def test_another_seed_gives_another_run(few_base, tmp_path, few):
    """On the same images."""
    folder, metrics = few_base
    other = tiny(tmp_path, "--max_train_steps 3 --seed 1", *few)
    assert other["test"]["bits_per_dim"] != metrics["test"]["bits_per_dim"]
    assert not same_weights(weights(tmp_path), weights(folder))
    assert other["data"] == metrics["data"]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, few, capsys):
    """After so many steps in a row, with their t and terms, and without a score."""
    with pytest.raises(SystemExit, match=r"Step 5 is not finite: .* at t=\[\d+.*diverged: 3 in a row.*no checkpoint"):
        tiny(tmp_path, "--max_train_steps 9 --learning_rate 1e20 --lr_warmup_steps 1 --max_skipped_steps 3", *few)
    assert capsys.readouterr().out.count("It is skipped") == 2
    assert not (tmp_path / "metrics.json").exists()


def test_a_network_that_breaks_in_its_last_step_is_not_scored(tmp_path, few):
    """The evaluation names t, and there is no metrics.json."""
    with pytest.raises(SystemExit, match=r"at chain index t=\d+"):
        tiny(tmp_path, "--max_train_steps 1 --learning_rate 1e20 --lr_scheduler constant", *few)
    assert not (tmp_path / "metrics.json").exists()


def test_a_loss_that_is_not_finite_is_skipped_with_a_gradient_scaler(tmp_path, few, only_train, monkeypatch):
    """Also where the gradient is finite, which alone is what the scaler looks at: weights and average stay."""
    accelerator_of, loss_terms, update = train.make_accelerator, recipe.loss_terms, recipe.update
    moved = []

    def scaled(*args):
        accelerator = accelerator_of(*args)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        # As under fp16, which needs a GPU.
        accelerator.unscale_gradients = lambda: accelerator.scaler.unscale_(accelerator._optimizers[0].optimizer)
        return accelerator

    def broken(run, output, diffused):
        bad = torch.inf if run.progress.step == 2 else 0.0
        return loss_terms(run, output, diffused) + bad

    def watched(run, drawn, shared):
        before = [value.detach().clone() for value in (*run.unet.parameters(), *run.ema.shadow_params)]
        update(run, drawn, shared)
        after = (*run.unet.parameters(), *run.ema.shadow_params)
        assert math.isfinite(shared.norm)
        moved.append(any(not torch.equal(a, b) for a, b in zip(before, after)))

    monkeypatch.setattr(train, "make_accelerator", scaled)
    monkeypatch.setattr(recipe, "loss_terms", broken)
    monkeypatch.setattr(recipe, "update", watched)
    run = only_train(tmp_path, "--max_train_steps 5 --lr_scheduler constant", *few)
    assert moved == [True, True, False, True, True] and run.progress.skipped == 1


def test_the_average_of_half_precision_weights_moves(tmp_path, few, only_train, monkeypatch):
    """It is in float32 also where the weights are not, as under DeepSpeed: a bf16 one would stand still."""
    build = training_run.build_unet
    monkeypatch.setattr(training_run, "build_unet", lambda *args: build(*args).to(torch.bfloat16))
    run = only_train(tmp_path, "--max_train_steps 1", *few)
    assert {value.dtype for value in run.ema.shadow_params} == {torch.float32}
    assert {value.dtype for value in weights(tmp_path).values()} == {torch.float32}
    run.ema.get_decay = lambda step: 0.9999
    before = [value.clone() for value in run.ema.shadow_params]
    moved = [parameter.detach() + 1 for parameter in run.unet.parameters()]
    for value in moved:
        value.requires_grad_()
    run.ema.step(moved)
    assert all((after > value).any() for after, value in zip(run.ema.shadow_params, before))


# Checkpoints


def test_three_steps_and_three_are_six(tmp_path, few, no_pictures, only_train):
    """Stopped after step 3 and resumed, a run has the weights and the score of one that was not, bit for bit."""
    straight = tiny(tmp_path / "straight", "--lr_scheduler constant --max_train_steps 6", *few)
    only_train(tmp_path / "resumed", "--lr_scheduler constant --max_train_steps 3 --checkpointing_steps 3", *few)
    assert not same_weights(weights(tmp_path / "resumed"), weights(tmp_path / "straight"))
    options = "--lr_scheduler constant --max_train_steps 6 --resume_from_checkpoint latest"
    resumed = tiny(tmp_path / "resumed", options, *few)
    assert same_weights(weights(tmp_path / "resumed"), weights(tmp_path / "straight"))
    assert resumed["test"] == straight["test"]


@pytest.mark.parametrize(
    "options",
    [
        "",
        "--no-use_ema",
        "--validation_steps 4",
        "--gradient_accumulation_steps 2",
        "--timestep_sampler loss_second_moment --ddpm_num_steps 2 --ddpm_num_inference_steps 2",
        "--train_batch_size 35",  # four steps an epoch: the checkpoint lies within the second
        "--train_batch_size 22 --gradient_accumulation_steps 2",  # four too, the last of a single batch
        "--train_batch_size 22 --gradient_accumulation_steps 3",  # three, the last of a single batch
        "--random_flip",
        "--dropout 0.3",
    ],
)
def test_a_resumed_run_repeats_the_rest(tmp_path, few, only_train, train_batches, options):
    """From a checkpoint on, a second run ends in the same weights, bit for bit, without doing the first part again."""
    options = f"--max_train_steps 8 --checkpointing_steps 6 {options}"
    only_train(tmp_path, options, *few)
    straight = weights(tmp_path)
    train_batches.clear()
    only_train(tmp_path, f"{options} --resume_from_checkpoint checkpoint-6", *few)
    assert {step for step, _, _ in train_batches} == {6, 7}
    assert same_weights(weights(tmp_path), straight)


def test_the_importance_sampler_learns_its_probabilities(tmp_path, few, only_train):
    """Its history fills up in training and comes back with a checkpoint: the test above would not see it unused."""
    options = "--timestep_sampler loss_second_moment --ddpm_num_steps 2 --ddpm_num_inference_steps 2"
    options += " --max_train_steps 6 --checkpointing_steps 6"
    run = only_train(tmp_path, options, *few)
    assert not torch.allclose(run.sampler.probabilities, torch.full((2,), 0.5, dtype=torch.float64))
    again = only_train(tmp_path, f"{options} --resume_from_checkpoint latest", *few)
    assert torch.equal(again.sampler.probabilities, run.sampler.probabilities)


def test_latest_without_a_checkpoint_starts_anew(few_base, tmp_path, few, only_train, capsys):
    """As in diffusers' scripts: the same command line serves the first start and every restart."""
    only_train(tmp_path, "--max_train_steps 3 --resume_from_checkpoint latest", *few)
    assert "starting anew" in capsys.readouterr().out
    assert same_weights(weights(tmp_path), weights(few_base[0]))


def test_a_missing_checkpoint_is_refused(tmp_path, until_training, few):
    """With its path, before training."""
    with pytest.raises(SystemExit, match=r"--resume_from_checkpoint checkpoint-9: there is no .*checkpoint-9"):
        until_training(tmp_path, "--resume_from_checkpoint checkpoint-9", *few)


def test_the_newest_checkpoints_are_kept(tmp_path, few, only_train):
    """--checkpoints_total_limit removes the oldest."""
    options = "--max_train_steps 5 --checkpointing_steps 1 --checkpoints_total_limit 2 --no-use_ema"
    tiny(tmp_path, options, *few)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-5"]
    assert same_weights(weights(tmp_path), checkpoint_weights(tmp_path, 5))


def test_going_back_leaves_the_later_checkpoints_aside(tmp_path, few, only_train, capsys):
    """Taken up by name, an earlier checkpoint begins a branch: `latest` and the limit know of no later ones."""
    only_train(tmp_path, "--max_train_steps 12 --checkpointing_steps 4", *few)
    options = "--max_train_steps 8 --checkpointing_steps 3 --checkpoints_total_limit 1"
    only_train(tmp_path, f"{options} --resume_from_checkpoint checkpoint-4 --learning_rate 1e-3", *few)
    assert {path.name for path in tmp_path.glob("superseded-*")} == {"superseded-8", "superseded-12"}
    assert "checkpoint-8" in {path.name for path in tmp_path.glob("checkpoint-*")}
    capsys.readouterr()
    only_train(tmp_path, f"{options} --resume_from_checkpoint latest --learning_rate 1e-3", *few)
    assert f"Resuming from {tmp_path / 'checkpoint-8'}." in capsys.readouterr().out


def test_the_seconds_of_a_resumed_run_count_from_its_start(tmp_path, few, no_pictures):
    """metrics.json says how long its steps took, all of them: a finished run resumed has not taken 0 s."""
    options = "--max_train_steps 3 --checkpointing_steps 3"
    first = tiny(tmp_path, options, *few)
    again = tiny(tmp_path, f"{options} --resume_from_checkpoint latest", *few)
    assert again["train"]["steps"] == 3
    assert again["train"]["seconds"] >= 0.5 * first["train"]["seconds"] > 0


# Flips


def test_random_flip_only_mirrors(tmp_path, few, only_train):
    """Those images are mirrored left to right that are drawn to be, half of them (to 5 standard errors)."""
    x_0 = torch.randn(6, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    mirrored = torch.tensor([True, False, True, True, False, False])
    flipped = recipe.random_flip(x_0, mirrored)
    assert torch.equal(flipped[mirrored], x_0[mirrored].flip(-1)) and torch.equal(flipped[~mirrored], x_0[~mirrored])
    run = only_train(tmp_path, "--max_train_steps 1 --random_flip --train_batch_size 1000", *few)
    assert abs(recipe.draw(run).mirrored.double().mean() - 0.5) < 5 * 0.5 / 1000**0.5


# Baselines


class Levels:
    """Images with the given integer levels (N, C, H, W)."""

    def __init__(self, levels, number):
        self.array, self.levels = torch.as_tensor(levels), number

    def batches(self, batch_size, limit=None):
        """As `Images.batches`."""
        return (self.array[:limit].float() * (2 / (self.levels - 1)) - 1).split(batch_size)


def test_the_digits_baselines():
    """Uniform is log2 17; the histogram agrees with one written from its definition; lzma needs bits, but fewer."""
    data = load_image_data()
    result = baselines(data.train, data.test)
    assert result["uniform"] == math.log2(17)
    fitted, scored = (
        np.stack([np.rint((x_0.double().numpy() + 1) * 8).astype(int).ravel() for x_0 in part])
        for part in (data.train, data.test)
    )
    bits = 0.0
    for position in range(64):
        counts = np.bincount(fitted[:, position], minlength=17) + 0.5
        bits -= np.log2(counts / counts.sum())[scored[:, position]].sum()
    assert result["histogram_per_position"] == pytest.approx(bits / scored.size, rel=1e-12)
    assert 0 < result["lzma"] < math.log2(17)


def test_baselines_are_of_the_scored_images():
    """With --num_test_images they are those of these images, as the bound beside them is."""
    data = load_image_data()
    few, whole = baselines(data.train, data.test, num_test_images=8), baselines(data.train, data.test)
    assert few["histogram_per_position"] != whole["histogram_per_position"] and few["lzma"] > whole["lzma"]
    assert few["uniform"] == whole["uniform"]


def test_baselines_of_constant_images():
    """The histogram has Jeffreys' prior: a level seen N times of N costs log2 (N + L/2) / (N + 1/2), another more."""
    train_images = Levels(np.full((100, 3, 4, 4), 7), 256)
    seen = baselines(train_images, Levels(np.full((20, 3, 4, 4), 7), 256))
    other = baselines(train_images, Levels(np.full((20, 3, 4, 4), 9), 256))
    assert seen["histogram_per_position"] == pytest.approx(math.log2(228 / 100.5))
    assert other["histogram_per_position"] == pytest.approx(math.log2(228 / 0.5))
    assert 0 < seen["lzma"] < 1


def test_baselines_of_noise():
    """Uniform noise compresses to no less than its entropy, and a histogram fitted on little data costs more."""
    rng = np.random.default_rng(0)
    noise = [Levels(rng.integers(0, 256, (50, 1, 16, 16)), 256) for _ in range(2)]
    result = baselines(*noise)
    assert result["uniform"] == 8 and result["lzma"] >= 8 and result["histogram_per_position"] > 8


def test_baselines_are_those_of_the_stored_images(few_base, tmp_path, few):
    """--random_flip is for training: the histogram is fitted on images as they are."""
    metrics = tiny(tmp_path, "--max_train_steps 1 --random_flip", *few)
    assert metrics["baselines"] == few_base[1]["baselines"]


def test_json_is_never_half_written(tmp_path):
    """A failed write leaves the file that was there."""
    path = tmp_path / "a.json"
    reporting.write_json({"a": 1}, path)
    with pytest.raises(TypeError):
        reporting.write_json({"a": object()}, path)
    assert json.loads(path.read_text()) == {"a": 1}


def test_json_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """And its name is before the writing returns."""
    done, fsync, replace = [], os.fsync, os.replace

    def synced(descriptor):
        done.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def replaced(source, target):
        done.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    reporting.write_json({"a": 1}, tmp_path / "a.json")
    assert done == [str(tmp_path / "a.json.partial"), "replace", str(tmp_path)]


def test_training_images_are_looked_at_where_data_is_loaded(monkeypatch):
    """Where a fault of one process ends all; later, all would look at them, and each meet it on its own."""
    data = train.load_data(parse_args([]))
    monkeypatch.setattr(type(data.train), "__getitems__", lambda *args: pytest.fail("decoded again"))
    assert len(data.train_fingerprint) == 32 and data.train_fingerprint != data.record["test_fingerprint"]


# As commands


def launch(arguments, script_options, code=0, script="examples/train.py", **environment):
    """Run a script under `accelerate launch`; returns what it printed, or its errors where it shall fail."""
    command = [sys.executable, "-m", "accelerate.commands.launch", *arguments, script, *script_options]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == code, done.stderr[-5000:]
    return done.stderr if code else done.stdout


def free_port():
    """One that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def launch_two(folder, options, code=0, **environment):
    """Train on two CPU processes; `--cpu --num_processes 2` would start one."""
    port = free_port()
    arguments = (
        "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no "
        f"--main_process_port {port}"
    )
    script_options = [*TINY, "--output_dir", str(folder), *options.split()]
    environment = {**environment, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return launch(arguments.split(), script_options, code, **environment)


@pytest.mark.slow
def test_two_processes(tmp_path):
    """They finish together, with one report, one score, and a learning rate that counts updates, not processes."""
    options = "--max_train_steps 4 --checkpointing_steps 2 --validation_steps 2 --lr_scheduler constant_with_warmup"
    out = launch_two(tmp_path, f"{options} --lr_warmup_steps 8 --learning_rate 1e-3")
    assert out.count("Test bits/dim") == 1
    assert [path.parent for path in tmp_path.rglob("metrics.json")] == [tmp_path]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    check_metrics(metrics, tmp_path)
    assert metrics["train"]["steps"] == 4
    assert scalars(tmp_path)[0]["lr"].value == pytest.approx(5e-4)
    assert {path.name for path in (tmp_path / "checkpoint-4").glob("random_states_*")} == {
        "random_states_0.pkl",
        "random_states_1.pkl",
    }
    assert not same_weights(checkpoint_weights(tmp_path, 2), checkpoint_weights(tmp_path, 4))


@pytest.mark.slow
def test_two_processes_resume(tmp_path):
    """From a checkpoint in the second epoch on, they end in the same weights, bit for bit."""
    options = "--max_train_steps 6 --checkpointing_steps 4 --train_batch_size 300 --logger none"
    launch_two(tmp_path, options)
    straight = weights(tmp_path)
    assert "Resuming" in launch_two(tmp_path, f"{options} --resume_from_checkpoint latest")
    assert same_weights(weights(tmp_path), straight)


ROUNDS = """
import sys
import torch
from accelerate import PartialState
from ddpm_vlb.commands import train
from ddpm_vlb.training import run as training_run
eigenvalues, finish = training_run.covariance_eigenvalues, train.finish

def rounded(x_0):
    return eigenvalues(x_0) * (1 + PartialState().process_index)

def shown(run):
    torch.save(run.sampler.probabilities, run.folder / f"probabilities-{PartialState().process_index}")

training_run.covariance_eigenvalues, train.finish = rounded, shown
train.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_two_processes_draw_from_the_same_probabilities(tmp_path, few):
    """Also where their machines round differently; here, one would find twice the variances."""
    (tmp_path / "rounds.py").write_text(ROUNDS)
    options = "--max_train_steps 2 --timestep_sampler gaussian"
    launch_two(tmp_path / "run", " ".join([options, *few]), script=str(tmp_path / "rounds.py"))
    assert torch.equal(*(torch.load(tmp_path / "run" / f"probabilities-{rank}") for rank in (0, 1)))


@pytest.mark.slow
def test_two_processes_without_data(tmp_path):
    """They end alike, soon, with one message."""
    started = time.monotonic()
    errors = launch_two(tmp_path / "run", f"--train_data_dir {tmp_path / 'nothing'}", code=1)
    assert time.monotonic() - started < 60
    assert errors.count(f"ddpm-vlb train: `train_data_dir` '{tmp_path / 'nothing'}' is not a folder.") == 1
    assert "Another process" not in errors and 'train.py", line' not in errors


@pytest.mark.slow
def test_two_processes_that_may_not_publish(tmp_path):
    """The main one tells it, and nobody else."""
    with HubServer() as server:
        environment = server.environment(tmp_path / "home", HF_TOKEN="hf_wrong")
        options = "--max_train_steps 2 --push_to_hub --hub_model_id tester/model"
        errors = launch_two(tmp_path / "run", options, code=1, **environment)
    assert errors.count("--hub_model_id tester/model: ") == 1 and 'train.py", line' not in errors


@pytest.mark.slow
def test_the_default_command_learns_the_digits(tmp_path):
    """`accelerate launch examples/train.py`: at most 1.95 test bits/dim, unclipped, all test images scored."""
    launch([], ["--output_dir", str(tmp_path)])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["test"]["num_images"] == 297 and metrics["test"]["clip_sample"] is False
    assert metrics["test"]["bits_per_dim"] <= 1.95
