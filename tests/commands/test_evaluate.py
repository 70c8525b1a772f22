"""examples/ddpm-vlb evaluate: what it promises on the command line, in its files, and when things go wrong.

The checkpoints are saved by plain diffusers, the data sets by `datasets`; a chain of 20 steps is scored with networks
that have learned nothing, which is as good a test of the arithmetic as any.
"""

import contextlib
import io
import json
import math
import os
import re
import runpy
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
import psutil
import pytest
import reference
import safetensors.torch
import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from hub_server import HubServer
from test_data import write_arrays, write_images, write_splits, x_0_of

from ddpm_vlb import (
    DDPMVLBPipeline,
    DDPMVLBScheduler,
    ForwardProcess,
    ReverseProcess,
    VLBEstimator,
    estimate_vlb,
    fit_pilot,
)
from ddpm_vlb.commands import evaluate
from ddpm_vlb.evaluation import image_generator
from ddpm_vlb.runtime import reporting
from ddpm_vlb.runtime.image_data import load_image_data
from ddpm_vlb.scoring.checkpoint import fingerprint_of
from ddpm_vlb.scoring.sweep import pilot_positions

ROOT = Path(__file__).parents[2]
T, BETAS = 20, {"beta_start": 0.002, "beta_end": 0.3}
TRAIN, TEST = 40, 23  # images; units of 2 leave one over
BITS = 1 / math.log(2)
# 8 calls for each image and 16 pairs in a network call: units of two images.
FEW = "--pilot_calls 230 --calls_per_image 8 --eval_batch_size 16".split()
NUMBERS = """
    bits_per_dim noise_se image_se prior kl decoder num_images network_calls_per_image by_clipping per_image
    per_image_other_clipping pilot_calls second_draw_calls control_variate timesteps clip_sample seed data
""".split()
PARTS = "partial-*/[0-9]*.npz"  # the part files of a run
SCORE = re.compile(r"-?\d+\.\d{3} \+- \d+\.\d{3} \(noise\) \+- (?:n/a|\d+\.\d{3}) \(images\) bits/dim")


def reset_accelerate():
    """Accelerate keeps its settings for the whole process; each run here brings its own."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def fresh_accelerate():
    reset_accelerate()
    yield
    reset_accelerate()


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Leave out the pictures, which take longer than the scoring."""
    for name in ("plot_vlb_terms", "plot_per_image"):
        monkeypatch.setattr(evaluate, name, lambda *args, **options: None)


def network(channels=1, out_channels=1, size=8, **options):
    """A tiny network that has learned nothing."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    widths = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4, "add_attention": False}
    return UNet2DModel(size, channels, out_channels, **blocks, **widths, **options)


def stock(folder, *sizes, **options):
    """Save a checkpoint with plain diffusers; returns its folder."""
    scheduler = DDPMScheduler(num_train_timesteps=T, **BETAS, **options)
    DDPMPipeline(network(*sizes), scheduler).save_pretrained(folder)
    return folder


def ours(folder, unet, **options):
    """Save a checkpoint that stock has no name for."""
    scheduler = DDPMVLBScheduler(num_train_timesteps=T, **BETAS, **options)
    DDPMVLBPipeline(unet, scheduler).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluate")


@pytest.fixture(scope="module")
def models(home):
    """Checkpoints by what is special about them."""
    folder = home / "models"
    unconditional = {
        "small": stock(folder / "small"),
        "large": stock(folder / "large", variance_type="fixed_large", clip_sample=False),
        "range": stock(folder / "range", 1, 2, variance_type="learned_range"),
        "colour": stock(folder / "colour", 3, 6, variance_type="learned_range"),
    }
    DDIMPipeline(network(), DDIMScheduler(num_train_timesteps=T)).save_pretrained(folder / "ddim")
    return {
        **unconditional,
        "ddim": folder / "ddim",
        "classes": ours(folder / "classes", network(1, 1, num_class_embeds=5)),
        "latents": ours(folder / "latents", network(4, 4, 4), levels=None, clip_sample=False),
        "few levels": ours(folder / "few", network(), levels=17),
    }


@pytest.fixture(scope="module")
def sets(home):
    """Data sets by name: the options that name them, and the images by split as x_0."""
    found = {}

    def add(name, folder, x_0, *options):
        names = ("--dataset_name", folder, "--cache_dir", str(home / "cache"), *options)
        found[name] = SimpleNamespace(options=names, folder=folder, **x_0)

    counts = {"train": TRAIN, "test": TEST}
    for name, shape in (("grey", (8, 8)), ("colour", (8, 8, 3))):
        folder, levels = write_images(home / name, counts, shape)
        add(name, folder, {split: x_0_of(own) for split, own in levels.items()})
    labels = {split: np.random.default_rng(7).integers(0, 5, count).tolist() for split, count in counts.items()}
    folder, levels = write_images(home / "labelled", counts, labels=labels)
    add("labelled", folder, {**{split: x_0_of(own) for split, own in levels.items()}, "labels": labels})
    arrays = np.random.default_rng(1).standard_normal((TRAIN + TEST, 4, 4, 4)).astype(np.float32)
    latents = {"train": arrays[:TRAIN], "test": arrays[TRAIN:]}
    folder = write_arrays(home / "latents", latents, "latent")
    x_0 = {split: torch.from_numpy(own) for split, own in latents.items()}
    add("latents", folder, x_0, "--image_column", "latent")
    return found


def run(*options):
    """Evaluate in this process, on the CPU; returns the metrics."""
    reset_accelerate()
    return evaluate.main(["--cpu", *map(str, options)])


@pytest.fixture
def score(models, sets, tmp_path):
    """Evaluate a checkpoint on a data set with few calls, into the test's own folder `run`."""

    def scored(model="small", data="grey", options="", *more):
        where = ("--model", models.get(model, model), *sets[data].options, "--output_dir", tmp_path / "run")
        return run(*where, *FEW, *options.split(), *more)

    return scored


@pytest.fixture(scope="module")
def base(home, models, sets):
    """A finished run with pictures: its folder, its metrics and what it printed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        where = ("--model", models["small"], *sets["grey"].options, "--output_dir", home / "base")
        metrics = run(*where, *FEW, "--seed", 3)
    return home / "base", metrics, out.getvalue()


@pytest.fixture(scope="module")
def straight(home, models, sets):
    """The metrics of the run that other runs are stopped in."""
    return run("--model", models["small"], *sets["grey"].options, "--output_dir", home / "straight", *FEW)


@pytest.fixture
def calls(monkeypatch):
    """What the network was called with: x_t, the timesteps and the class labels of each row."""
    rows, forward = [], UNet2DModel.forward

    def record(self, sample, timestep, class_labels=None, **options):
        labels = [None] * len(sample) if class_labels is None else class_labels.tolist()
        rows.extend(zip(sample, timestep.tolist(), labels, strict=True))
        return forward(self, sample, timestep, class_labels, **options)

    monkeypatch.setattr(UNet2DModel, "forward", record)
    return rows


@pytest.fixture
def scored(monkeypatch):
    """The images that were scored: (sweep, position, x_0)."""
    images, original = [], VLBEstimator.score

    def record(self, x_0, positions, conditioning=None, sweep=0):
        images.extend((sweep, position, image) for position, image in zip(positions, x_0, strict=True))
        return original(self, x_0, positions, conditioning, sweep)

    monkeypatch.setattr(VLBEstimator, "score", record)
    return images


@pytest.fixture
def pilots(monkeypatch, calls):
    """The pilots that were run: their images, and their rows of `calls`."""
    runs, original = [], evaluate.fit_pilot

    def record(model, reverse, x_0, *args, **options):
        before = len(calls)
        pilot = original(model, reverse, x_0, *args, **options)
        runs.append((x_0, range(before, len(calls))))
        return pilot

    monkeypatch.setattr(evaluate, "fit_pilot", record)
    return runs


def same_numbers(a, b):
    """Bit for bit, but for the order in which the L_t curve was summed."""
    for name in ("mean", "se"):
        first, second = ([math.inf if value is None else value for value in m["l_t"][name]] for m in (a, b))
        assert first == pytest.approx(second, rel=1e-9, abs=1e-12)
    return all(a[name] == b[name] for name in NUMBERS)


def strict_json(path):
    """Its content, if it is JSON as the standard has it."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


# By hand


def by_hand(model, levels=256, clip=None, timesteps=None):
    """The network of a checkpoint and its reverse process, put together without evaluate.py and our loader."""
    unet = UNet2DModel.from_pretrained(model, subfolder="unet").eval()
    config = json.loads((model / "scheduler" / "scheduler_config.json").read_text())
    forward = ForwardProcess.from_betas(torch.linspace(*BETAS.values(), T, dtype=torch.float64))
    reverse = ReverseProcess(
        forward,
        variance_type=config["variance_type"],
        clip_sample=config["clip_sample"] if clip is None else clip,
        levels=levels,
    )
    reverse = reverse if timesteps is None else reverse.respace(timesteps)
    return unet, reverse.to(dtype=torch.float32)


def estimate_by_hand(model, data, levels=256, timesteps=None, seed=0, conditioning=None, both=True):
    """`estimate_vlb` with evaluate.py's numbers of calls, on both clippings."""
    unet, reverse = by_hand(model, levels, timesteps=timesteps)
    also = [by_hand(model, levels, not reverse.clip_sample, timesteps)[1]] if both else []
    told = {
        split: {} if conditioning is None else {"class_labels": conditioning[split]} for split in ("train", "test")
    }
    pilot = fit_pilot(unet, reverse, data.train, 230, seed, conditioning=told["train"], also=also)
    return estimate_vlb(unet, reverse, [(data.test, told["test"])], pilot, 8, seed=seed, also=also)


def full_by_hand(model, x_0, levels=256, clip=None, timesteps=None, seed=0, sweep=0):
    """The whole bound of each image in nats by plain numpy in float64 (reference.py), prior and terms."""
    unet, reverse = by_hand(model, levels, clip)
    betas = reference.linear_betas(T, *BETAS.values())
    tab = reference.tables(betas if timesteps is None else reference.respaced_betas(betas, timesteps))
    generators = [image_generator(seed, position, sweep) for position in range(len(x_0))]
    draws = [[torch.randn(x_0.shape[1:], generator=g) for _ in tab.betas] for g in generators]
    noise = torch.stack([torch.stack(own) for own in draws]).transpose(0, 1).double().numpy()

    def called(x_t, told):
        with torch.no_grad():
            return unet(torch.from_numpy(x_t).float(), torch.from_numpy(told)).sample.double().numpy()

    clamp = 1.0 if reverse.clip_sample else None
    arguments = ("epsilon", reverse.variance_type, called, x_0.double().numpy(), noise)
    return reference.bound(tab, *arguments, timesteps, clamp, levels)


# Options


def test_every_option_has_a_help_text():
    """And the help renders, with all of them in it."""
    parser = evaluate.build_parser()
    page = parser.format_help()
    for action in parser._actions:
        assert action.help and action.help.strip(), action.option_strings
        assert action.option_strings[0] in page


def test_the_command_line_of_the_contract():
    """All options have their names, and those that may be left out their defaults."""
    options = (
        "--model M --dataset_name D --split S --num_images 7 --estimator full --calls_per_image 9 --seed 5 "
        "--output_dir O"
    )
    args = evaluate.parse_args(options.split())
    assert (args.model, args.dataset_name, args.split, args.num_images) == ("M", "D", "S", 7)
    assert (args.estimator, args.calls_per_image, args.seed, args.output_dir) == ("full", 9, 5, "O")
    args = evaluate.parse_args("--model M --tolerance 0.002".split())
    assert (args.dataset_name, args.split, args.num_images, args.tolerance) == (None, "test", None, 0.002)
    assert (args.estimator, args.calls_per_image, args.seed, args.output_dir) == ("importance", 20, 0, None)


BAD = """
    --calls_per_image 1
    --calls_per_image 0
    --calls_per_image 2.5
    --num_images 0
    --tolerance 0
    --tolerance -0.1
    --tolerance nan
    --tolerance 0.1 --estimator full
    --seed -1
    --estimator exact
    --pilot_calls 0
    --eval_batch_size 0
    --resolution 0
    --levels 1
    --levels many
    --num_inference_steps 0
    --num_inference_steps 5 --timesteps 1 2
    --timesteps -1
    --timesteps
    --timestep_spacing trailing
    --timestep_spacing even --num_inference_steps 5
    --mixed_precision fp8
    --calls 8
"""


@pytest.mark.parametrize("options", [line.strip() for line in BAD.strip().splitlines()])
def test_bad_options_are_refused(tmp_path, capsys, options):
    """Exit code 2 and the option's name, before anything is loaded or written."""
    with pytest.raises(SystemExit) as stop:
        run("--model", tmp_path / "no", "--output_dir", tmp_path / "run", *options.split())
    message = capsys.readouterr().err.partition("error: ")[2]
    assert stop.value.code == 2 and re.search(rf"{options.split()[0]}\b", message)
    assert "\n" not in message.strip() and not (tmp_path / "run").exists()


def test_a_model_must_be_named(capsys):
    """There is no default."""
    with pytest.raises(SystemExit) as stop:
        run()
    assert stop.value.code == 2 and "--model" in capsys.readouterr().err


# What a run leaves behind


def test_metrics(base, models):
    """metrics.json holds the bound, its errors and parts, each image's, L_t, and how they came about."""
    folder, metrics, _ = base
    assert strict_json(folder / "metrics.json") == metrics
    numbers = [metrics[name] for name in ("bits_per_dim", "noise_se", "image_se", "prior", "kl", "decoder")]
    assert all(math.isfinite(number) for number in numbers)
    assert metrics["noise_se"] > 0 and metrics["image_se"] >= 0 and metrics["prior"] > 0 and metrics["decoder"] > 0
    assert metrics["prior"] + metrics["kl"] + metrics["decoder"] == pytest.approx(metrics["bits_per_dim"], rel=1e-12)
    assert np.mean(metrics["per_image"]) == pytest.approx(metrics["bits_per_dim"], rel=1e-12)
    assert len(metrics["per_image"]) == metrics["num_images"] == TEST
    assert len(metrics["l_t"]["mean"]) == len(metrics["l_t"]["se"]) == T
    assert metrics["timesteps"] == list(range(T)) and metrics["clip_sample"] is True and metrics["seed"] == 3
    assert metrics["network_calls_per_image"] == 8 and 0 < metrics["pilot_calls"] <= 230
    assert metrics["model"]["name_or_path"] == str(models["small"]) and metrics["unit"] == "bits/dim"
    assert metrics["versions"]["torch"] == torch.__version__ and metrics["device"] == "cpu"
    assert not list(folder.glob("partial-*")) and not list(folder.rglob("*.writing"))


def test_the_terms_are_the_mean_over_the_images(score, models, sets):
    """Of the full loop, L_t is the mean of all images at every step, and its error that of a mean."""
    metrics = score("small", "grey", "--estimator full --num_images 6")
    terms = full_by_hand(models["small"], sets["grey"].test[:6])[1] * BITS / 64
    assert metrics["l_t"]["mean"] == pytest.approx(terms.mean(0), rel=1e-4)
    assert metrics["l_t"]["se"] == pytest.approx(terms.std(0, ddof=1) / 6**0.5, rel=1e-3)


def test_one_image(score, tmp_path):
    """Has no image error: null, not NaN; steps that were not drawn have no L_t."""
    metrics = score("small", "grey", "--num_images 1")
    assert strict_json(tmp_path / "run" / "metrics.json") == metrics
    assert metrics["image_se"] is None and metrics["num_images"] == 1 and metrics["noise_se"] > 0
    assert None in metrics["l_t"]["mean"] and set(metrics["l_t"]["se"]) == {None}


def test_per_image_is_in_the_order_of_the_data(base, models, sets):
    """Each image scored alone, at its position, comes to its value."""
    _, metrics, _ = base
    unet, reverse = by_hand(models["small"])
    also = [by_hand(models["small"], clip=False)[1]]
    pilot = fit_pilot(unet, reverse, sets["grey"].train, 230, 3, also=also)
    scorer = VLBEstimator(unet, reverse, pilot, 8, seed=3, also=also)
    for position in (0, 1, 11, TEST - 1):
        alone = [s.estimate() for s in scorer.score(sets["grey"].test[[position]], [position])]
        assert metrics["per_image"][position] == pytest.approx(alone[0].bits_per_dim, rel=1e-5)
        assert metrics["per_image_other_clipping"][0][position] == pytest.approx(alone[1].bits_per_dim, rel=1e-5)


def test_the_digits_are_the_default(models, tmp_path):
    """Without a data set's name the embedded digits are scored, on their 17 levels."""
    options = ("--estimator", "full", "--num_images", 4, "--output_dir", tmp_path)
    metrics = run("--model", models["small"], *options)
    assert metrics["data"]["dataset_name"] is None and metrics["model"]["levels"] == 17
    prior, terms = full_by_hand(models["small"], next(load_image_data().test.batches(4)), 17)
    assert metrics["per_image"] == pytest.approx((prior + terms.sum(1)) * BITS / 64, rel=1e-4)


def test_the_default_folder_is_the_model_s(models, tmp_path, monkeypatch):
    """evaluation/ in it, beside nothing that the training left; for a model of the Hub it is runs/."""
    model = shutil.copytree(models["small"], tmp_path / "model")
    run("--model", model, *FEW, "--num_images", 2)
    assert (model / "evaluation" / "metrics.json").is_file() and not (model / "metrics.json").exists()
    monkeypatch.chdir(tmp_path)
    assert evaluate.default_folder("user/name") == Path("runs/user--name")


def test_network_calls_are_counted(score, calls, pilots):
    """Those on the scored images, for each of them, and the pilot's, which are other images'."""
    metrics = score()
    ((_, rows),) = pilots
    assert len(rows) == metrics["pilot_calls"] and metrics["second_draw_calls"] == 0
    assert len(calls) - len(rows) == TEST * metrics["network_calls_per_image"] == TEST * 8


def test_both_clippings_come_from_the_same_calls(score, base):
    """Either may come first: the checkpoint's, or as asked for; the numbers are the same."""
    _, metrics, _ = base
    other = score("small", "grey", "--no-clip_sample --seed 3")
    assert metrics["clip_sample"] is True and other["clip_sample"] is False
    assert metrics["bits_per_dim"] != pytest.approx(other["bits_per_dim"], rel=1e-3)
    assert metrics["by_clipping"]["unclipped"]["bits_per_dim"] == pytest.approx(other["bits_per_dim"], rel=1e-9)
    for name in ("clipped", "unclipped"):
        for key, value in metrics["by_clipping"][name].items():
            assert value == pytest.approx(other["by_clipping"][name][key], rel=1e-9)
    assert metrics["per_image"] == pytest.approx(other["per_image_other_clipping"][0], rel=1e-9)


def test_the_report_is_printed(base):
    """The bound with both errors first, its three parts, the other clipping, and the calls that it took."""
    folder, metrics, out = base
    lines = out.strip().splitlines()
    assert SCORE.fullmatch(lines[0]) and lines[0] == reporting.describe(metrics)
    parts = [metrics[name] for name in ("prior", "kl", "decoder")]
    assert "L_T {:.4f} + sum L_t {:.4f} + L_0 {:.4f}".format(*parts) in lines[1] and "x_0_hat clipped" in lines[1]
    (other,) = [line for line in lines if line.strip().startswith("unclipped:")]
    assert SCORE.search(other)[0] == reporting.describe(metrics["by_clipping"]["unclipped"])
    calls = f"8 network calls each (+ {metrics['pilot_calls']} the pilot's)"
    assert f"{TEST} images of 'test' (256 levels), {T} steps, {calls}" in out
    assert str(folder) in out


@pytest.mark.parametrize("name", ["vlb_terms.png", "per_image.png"])
def test_pictures_are_drawn(base, name):
    """Each opens, and both its halves show something."""
    picture = PIL.Image.open(base[0] / name)
    picture.load()
    levels = np.asarray(picture.convert("L"))
    assert min(levels.shape) >= 300
    for half in np.array_split(levels, 2, axis=1):
        # A blank half would be white all over.
        assert (half < 190).mean() > 0.005 and (half > 200).any()


def test_the_pictures_show_the_estimate(score, monkeypatch):
    """The curve ends in the bound; the histogram holds every image."""
    figures = []
    monkeypatch.setattr(reporting, "_save", lambda figure, path, **options: figures.append(figure))
    for name in ("plot_vlb_terms", "plot_per_image"):
        monkeypatch.setattr(evaluate, name, getattr(reporting, name))
    metrics = score("small", "grey", "--estimator full --num_images 6")
    curve, histogram = figures
    assert curve.axes[1].lines[0].get_ydata()[-1] == pytest.approx(metrics["bits_per_dim"], rel=1e-6)
    assert sum(patch.get_height() for patch in histogram.axes[0].patches) == 6


# Stock checkpoints


@pytest.mark.parametrize(
    "model, data", [("small", "grey"), ("large", "grey"), ("range", "grey"), ("colour", "colour")], ids=str
)
def test_stock_checkpoints(score, models, sets, model, data):
    """Saved by plain diffusers, they are scored as `estimate_vlb` does it with what stock loads."""
    assert json.loads((models[model] / "model_index.json").read_text())["_class_name"] == "DDPMPipeline"
    metrics, hand = score(model, data), estimate_by_hand(models[model], sets[data])
    assert metrics["clip_sample"] is (model != "large")
    assert metrics["per_image"] == pytest.approx(hand.per_image.tolist(), rel=1e-5)
    assert metrics["per_image_other_clipping"][0] == pytest.approx(hand.also[0].per_image.tolist(), rel=1e-5)
    for name in ("bits_per_dim", "noise_se", "image_se", "prior", "kl", "decoder"):
        assert metrics[name] == pytest.approx(getattr(hand, name), rel=1e-5, abs=1e-7)
    stock_unet = DDPMPipeline.from_pretrained(models[model]).unet
    assert fingerprint_of(stock_unet) == metrics["model"]["weights_sha256"]


@pytest.mark.parametrize(
    "model, data", [("small", "grey"), ("large", "grey"), ("range", "grey"), ("colour", "colour")], ids=str
)
def test_the_full_loop_is_the_bound(score, calls, models, sets, model, data):
    """T calls for each image, and each image's value is that of plain numpy in float64 with the same noise."""
    metrics = score(model, data, "--estimator full --num_images 3")
    assert metrics["network_calls_per_image"] == T and metrics["pilot_calls"] == 0
    assert metrics["second_draw_calls"] == 3 * T and len(calls) == 6 * T
    x_0 = sets[data].test[:3]
    dims = x_0[0].numel()
    for clip, name in (
        (metrics["clip_sample"], "per_image"),
        (not metrics["clip_sample"], "per_image_other_clipping"),
    ):
        prior, terms = full_by_hand(models[model], x_0, clip=clip)
        found = metrics[name] if name == "per_image" else metrics[name][0]
        assert found == pytest.approx((prior + terms.sum(1)) * BITS / dims, rel=1e-4)


def test_the_full_loop_s_error_is_that_of_a_second_draw(score, models, sets):
    """Half the mean squared gap between two draws of an image is its noise variance; the mean has 1/N of it."""
    metrics = score("small", "grey", "--estimator full --num_images 4")
    first, second = (full_by_hand(models["small"], sets["grey"].test[:4], sweep=sweep)[1].sum(1) for sweep in (0, 1))
    variance = np.mean((first - second) ** 2 / 2) * (BITS / 64) ** 2
    assert metrics["noise_se"] == pytest.approx((variance / 4) ** 0.5, rel=1e-3)


def test_64_images_are_drawn_twice(models, tmp_path, home, calls, scored):
    """Spread over the data, not its first ones; of fewer images all are."""
    folder, _ = write_images(tmp_path / "set", {"train": 5, "test": 130})
    options = ("--dataset_name", folder, "--cache_dir", tmp_path / "cache", "--output_dir", tmp_path / "run")
    metrics = run("--model", models["small"], *options, "--estimator", "full", "--timesteps", 0, 9, 19)
    assert metrics["network_calls_per_image"] == 3 and metrics["second_draw_calls"] == 64 * 3
    assert len(calls) == (130 + 64) * 3
    assert [position for sweep, position, _ in scored if sweep == 0] == list(range(130))
    twice = [position for sweep, position, _ in scored if sweep == 1]
    assert len(set(twice)) == 64 and twice == sorted(twice)
    assert np.diff([0, *twice, 130]).max() <= 4


# Shorter chains


CHAINS = {
    "--num_inference_steps 5": ("leading", 5),
    "--num_inference_steps 5 --timestep_spacing leading": ("leading", 5),
    "--num_inference_steps 6 --timestep_spacing linspace": ("linspace", 6),
    "--num_inference_steps 3 --timestep_spacing trailing": ("trailing", 3),
    "--num_inference_steps 20": ("leading", 20),
    "--timesteps 17 3 9": [3, 9, 17],
    "--timesteps 7": [7],
}


@pytest.mark.parametrize("options", CHAINS)
def test_shorter_chains(score, calls, models, sets, options):
    """Exactly the chain that stock would sample is scored: its timesteps are told, and the bound is that of the chain.

    The bound of the respaced chain is that of plain numpy.
    """
    steps = CHAINS[options]
    if isinstance(steps, tuple):
        scheduler = DDPMScheduler(num_train_timesteps=T, timestep_spacing=steps[0])
        scheduler.set_timesteps(steps[1])
        steps = scheduler.timesteps.tolist()[::-1]
    metrics = score("small", "grey", f"{options} --estimator full --num_images 2")
    assert metrics["timesteps"] == steps and len(metrics["l_t"]["mean"]) == len(steps)
    assert sorted({told for _, told, _ in calls}) == steps
    assert metrics["network_calls_per_image"] == len(steps)
    prior, terms = full_by_hand(models["small"], sets["grey"].test[:2], timesteps=steps)
    assert metrics["per_image"] == pytest.approx((prior + terms.sum(1)) * BITS / 64, rel=1e-4)


def test_a_shorter_chain_with_few_calls(score, calls, models, sets):
    """The pilot and the scores are of that chain: as by hand with `reverse_process(timesteps=...)`."""
    steps = [1, 4, 9, 12, 19]
    metrics = score("range", "grey", "--timesteps 19 12 9 4 1")
    assert {told for _, told, _ in calls} == set(steps) and metrics["timesteps"] == steps
    reverse = DDPMVLBPipeline.from_pretrained(models["range"]).scheduler.reverse_process(timesteps=steps)
    hand = estimate_by_hand(models["range"], sets["grey"], timesteps=steps)
    assert torch.equal(reverse.forward.betas, by_hand(models["range"], timesteps=steps)[1].forward.betas)
    assert metrics["per_image"] == pytest.approx(hand.per_image.tolist(), rel=1e-5)


# Class-conditional networks


def nearest(x_t, images):
    """The image of which x_t of an early step is a noisy version."""
    return int((images - x_t).flatten(1).square().sum(1).argmin())


def test_labels_reach_their_images(score, calls, pilots, sets):
    """Whatever the step and the batch, each row of the network's input comes with its own image's label."""
    score("classes", "labelled")
    ((_, pilot_rows),) = pilots
    data, early = sets["labelled"], 0
    for i, (x_t, told, label) in enumerate(calls):
        split = "train" if i in pilot_rows else "test"
        assert label is not None
        if told < 5:
            early += 1
            assert label == data.labels[split][nearest(x_t, getattr(data, split))]
    assert early > 100


def test_labels_matter(score, models, sets, tmp_path):
    """A class-conditional network is scored as by hand, and with other labels it scores otherwise."""
    labels = {split: torch.tensor(own) for split, own in sets["labelled"].labels.items()}
    metrics = score("classes", "labelled")
    hand = estimate_by_hand(models["classes"], sets["labelled"], conditioning=labels)
    assert metrics["per_image"] == pytest.approx(hand.per_image.tolist(), rel=1e-5)
    assert metrics["data"]["label_column"] == "label"
    permuted = {"train": labels["train"].tolist(), "test": labels["test"].flip(0).tolist()}
    folder, _ = write_images(tmp_path / "set", {"train": TRAIN, "test": TEST}, labels=permuted)
    options = ("--dataset_name", folder, "--cache_dir", tmp_path / "cache", "--output_dir", tmp_path / "other")
    other = run("--model", models["classes"], *options, *FEW)
    changed = [a != b for a, b in zip(permuted["test"], labels["test"].tolist())]
    assert any(changed) and not all(changed)
    for a, b, differs in zip(metrics["per_image"], other["per_image"], changed):
        assert (a != pytest.approx(b, rel=1e-6)) == differs


def test_changed_labels_are_scored_anew(models, tmp_path, calls):
    """In the same files under the same name: neither the result nor partial results of the old labels are reused."""
    labels = {"train": [0, 1, 2, 3], "test": [3, 1, 4, 0]}
    counts = {"train": 4, "test": 4}
    results = []
    for own in (labels, {**labels, "test": [0, 4, 1, 3]}):
        folder, _ = write_images(tmp_path / "set", counts, labels=own)
        options = ("--dataset_name", folder, "--cache_dir", tmp_path / "cache", "--output_dir", tmp_path / "run")
        calls.clear()
        results.append(run("--model", models["classes"], *options, *FEW))
        assert calls
    assert results[0]["bits_per_dim"] != results[1]["bits_per_dim"]


# Continuous data


def test_latents_are_scored_in_nats(score, models, sets, tmp_path, capsys, monkeypatch):
    """A density has no bits: `bits_per_dim` is null, the value is nats_per_dim, and nothing it shows says bits."""
    figures = []
    monkeypatch.setattr(reporting, "_save", lambda figure, path, **options: figures.append(figure))
    for name in ("plot_vlb_terms", "plot_per_image"):
        monkeypatch.setattr(evaluate, name, getattr(reporting, name))
    metrics = score("latents", "latents")
    out, err = capsys.readouterr()
    assert "bits" not in out + err and "nats" in out.strip().splitlines()[0]
    assert out.strip().startswith(f"{metrics['nats_per_dim']:.3f} +- {metrics['noise_se']:.3f} (noise)")
    assert metrics["bits_per_dim"] is None and metrics["unit"].startswith("nats")
    for figure in figures:
        texts = [text for axis in figure.axes for text in (axis.get_xlabel(), axis.get_ylabel())]
        texts += [text.get_text() for axis in figure.axes for text in axis.texts]
        assert not any("bit" in text for text in texts) and any("nats" in text for text in texts)
    hand = estimate_by_hand(models["latents"], sets["latents"], None, both=False)
    assert metrics["nats_per_dim"] == pytest.approx(hand.nats_per_dim, rel=1e-5)
    assert metrics["per_image"] == pytest.approx((hand.per_image / BITS).tolist(), rel=1e-5)
    for name in ("noise_se", "image_se", "prior", "kl", "decoder"):
        assert metrics[name] == pytest.approx(getattr(hand, name) / BITS, rel=1e-5, abs=1e-7)
    assert list(metrics["by_clipping"]) == ["unclipped"] and metrics["per_image_other_clipping"] == []
    assert strict_json(tmp_path / "run" / "metrics.json") == metrics


def test_the_density_of_latents(score, models, sets):
    """The full loop's is that of plain numpy, L_0 a Gaussian's density."""
    metrics = score("latents", "latents", "--estimator full --num_images 3")
    prior, terms = full_by_hand(models["latents"], sets["latents"].test[:3], None)
    assert metrics["per_image"] == pytest.approx((prior + terms.sum(1)) / 64, rel=1e-4)
    assert metrics["decoder"] == pytest.approx(terms[:, 0].mean() / 64, rel=1e-4)


def test_a_stock_checkpoint_of_latents(tmp_path, sets):
    """Its config cannot say that its data is continuous: --levels none does."""
    model = stock(tmp_path / "model", 4, 4, 4, clip_sample=False)
    options = ("--model", model, *sets["latents"].options, *FEW, "--output_dir", tmp_path / "run")
    with pytest.raises(SystemExit, match="levels"):
        run(*options)
    metrics = run(*options, "--levels", "none")
    hand = estimate_by_hand(model, sets["latents"], None, both=False)
    assert metrics["nats_per_dim"] == pytest.approx(hand.nats_per_dim, rel=1e-5) and metrics["bits_per_dim"] is None


def test_levels_that_were_asked_for_are_kept(models, tmp_path):
    """Those of the digits are 17 unless --levels says otherwise; a number that was given is never changed silently."""
    options = ("--model", models["small"], "--num_images", 2, *FEW, "--output_dir", tmp_path)
    assert run(*options, "--levels", 33)["model"]["levels"] == 33
    assert run(*options, "--levels", 256)["model"]["levels"] == 256


# The pilot's images


def rows_in(images, whole):
    """The rows of `whole` that `images` are, each of which must be one."""
    return [int(((whole - image).abs() < 1e-6).flatten(1).all(1).nonzero()) for image in images]


@pytest.mark.parametrize("split, other", [("test", "train"), ("train", "test")])
def test_the_pilot_uses_another_split(score, pilots, scored, sets, split, other):
    """All the images of the split are scored once, and the pilot has seen none of them."""
    score("small", "grey", f"--split {split}")
    data = sets["grey"]
    ((pilot_images, _),) = pilots
    assert len(rows_in(pilot_images, getattr(data, other))) == len(getattr(data, other))
    assert rows_in([image for _, _, image in scored], getattr(data, split)) == list(range(len(getattr(data, split))))


def test_of_a_single_split_the_pilot_s_images_are_not_scored(models, tmp_path, pilots, scored):
    """They are kept back, and `num_images` counts the others."""
    folder, levels = write_images(tmp_path / "set", {"test": 30})
    options = ("--dataset_name", folder, "--cache_dir", tmp_path / "cache", "--output_dir", tmp_path / "run")
    metrics = run("--model", models["small"], *options, *FEW)
    ((pilot_images, _),) = pilots
    whole = x_0_of(levels["test"])
    seen, kept = rows_in([image for _, _, image in scored], whole), rows_in(pilot_images, whole)
    assert metrics["num_images"] == len(metrics["per_image"]) == len(seen) == 27
    assert sorted(seen + kept) == list(range(30)) and seen == sorted(seen)


def test_pilot_images_are_chosen_from_all(models, tmp_path, pilots):
    """As many as `pilot_positions` says, spread over the split."""
    rng = np.random.default_rng(0)
    levels = {"train": rng.integers(0, 256, (2100, 8, 8)), "test": rng.integers(0, 256, (3, 8, 8))}
    folder = write_arrays(tmp_path / "set", levels)
    options = ("--dataset_name", folder, "--cache_dir", tmp_path / "cache", "--output_dir", tmp_path / "run")
    run("--model", models["small"], *options, *FEW)
    expected = x_0_of(levels["train"])[pilot_positions(2100, 64)]
    assert len(expected) == 2048 and torch.allclose(pilots[0][0], expected, atol=2e-7)


# The tolerance


def test_the_tolerance_is_reached(score, straight, models, sets, capsys):
    """Sweeps go on until the noise error is below it, and count by their calls."""
    tolerance = 0.5 * straight["noise_se"]
    metrics = score("small", "grey", "--tolerance", tolerance)
    assert metrics["noise_se"] < tolerance and metrics["tolerance"] == tolerance
    more = [int(calls) for calls in re.findall(r"calls for each image: (\d+) more[,.]", capsys.readouterr().out)]
    assert more and metrics["network_calls_per_image"] == 8 + sum(more) < 80
    unet, reverse = by_hand(models["small"])
    also = [by_hand(models["small"], clip=False)[1]]
    pilot = fit_pilot(unet, reverse, sets["grey"].train, 230, 0, also=also)
    total, variance = 0.0, 0.0
    for sweep, calls in enumerate([8, *more]):
        scores = VLBEstimator(unet, reverse, pilot, calls, also=also).score(sets["grey"].test, range(TEST), {}, sweep)
        share = calls / metrics["network_calls_per_image"]
        total = total + share * (scores[0].kl + scores[0].decoder)
        variance = variance + share**2 * scores[0].noise_variance
    values = (total + scores[0].prior) * BITS / 64
    assert metrics["per_image"] == pytest.approx(values.tolist(), rel=1e-5)
    assert metrics["noise_se"] == pytest.approx(float(variance.mean() / TEST) ** 0.5 * BITS / 64, rel=1e-4)


def test_a_loose_tolerance_takes_one_sweep(score, straight, scored):
    """Nothing is scored twice when it is reached at once."""
    metrics = score("small", "grey", "--tolerance", 2 * straight["noise_se"])
    assert metrics["per_image"] == straight["per_image"] and len(scored) == TEST


def test_the_tolerance_of_latents_is_in_nats(score):
    """As the errors that are reported."""
    first = score("latents", "latents")
    assert score("latents", "latents", "--tolerance", 1.2 * first["noise_se"])["network_calls_per_image"] == 8
    metrics = score("latents", "latents", "--tolerance", 0.7 * first["noise_se"])
    assert metrics["noise_se"] < 0.7 * first["noise_se"]


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
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 12 + 2)  # the first sweep has 12 units of two images
        score(*options)
    assert positions_in(tmp_path / "run", 0) == list(range(TEST))
    finished = positions_in(tmp_path / "run", 1)
    assert 0 < len(finished) < TEST
    del scored[:]
    assert same_numbers(score(*options), whole)
    assert [position for sweep, position, _ in scored if sweep == 1] == sorted(set(range(TEST)) - set(finished))
    assert 0 not in [sweep for sweep, _, _ in scored]


# Stopped and started again


SLOWLY = """
import sys, time
from ddpm_vlb.commands import evaluate
from ddpm_vlb import VLBEstimator

score = VLBEstimator.score

def slowly(*args, **options):
    time.sleep(0.3)
    return score(*args, **options)

VLBEstimator.score = slowly
evaluate.main(sys.argv[1:])
"""


def positions_in(folder, sweep=0):
    """The images in the part files of a run's sweep, by the files' own content."""
    files = [np.load(path) for path in sorted(folder.glob(PARTS))]
    return sorted(int(position) for file in files if file["sweep"] == sweep for position in file["0.positions"])


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


@pytest.fixture(scope="module")
def killed(home, models, sets):
    """What a run leaves that was killed after its first part file, and what its standard error said until then."""
    folder = home / "killed"
    options = ("--cpu", "--model", models["small"], *sets["grey"].options, "--output_dir", folder, *FEW)
    command = [sys.executable, "-c", SLOWLY, *map(str, options)]
    kill_after_a_part(command, folder, home / "killed.txt")
    assert not (folder / "metrics.json").exists() and 0 < len(positions_in(folder)) < TEST
    return folder, (home / "killed.txt").read_text()


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
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 2)
        run(*where, "--calls_per_image", 6)
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


def changed_model(models, tmp_path, change):
    """A copy of a checkpoint with a change in its folder."""
    folder = shutil.copytree(models["small"], tmp_path / "changed")
    change(folder)
    return folder


def nudge_a_weight(folder):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = safetensors.torch.load_file(path)
    weights["conv_out.bias"][0] += 1e-3
    safetensors.torch.save_file(weights, path, {"format": "pt"})


def edit_config(part, **changes):
    """Change a saved configuration."""

    def change(folder):
        path = folder / part
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


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
    --timesteps 0 3 7 12 19
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


# Several processes


def launcher(processes):
    """`accelerate launch` on so many CPU processes; `--cpu --num_processes 2` would start one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    several = f"--multi_gpu --main_process_port {port}" if processes > 1 else ""
    arguments = f"--num_processes {processes} --num_machines 1 --mixed_precision no --dynamo_backend no {several}"
    return [sys.executable, "-m", "accelerate.commands.launch", *arguments.split()]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_several_processes(models, sets, straight, tmp_path, processes):
    """Each image once, with the values of one process, though none of the numbers divides the images."""
    options = ("--model", models["small"], *sets["grey"].options, "--output_dir", tmp_path / "run", *FEW)
    command = [*launcher(processes), str(ROOT / "examples" / "evaluate.py"), *map(str, options)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = strict_json(tmp_path / "run" / "metrics.json")
    assert metrics["num_processes"] == processes and metrics["num_images"] == TEST
    assert metrics["per_image"] == straight["per_image"]
    assert metrics["bits_per_dim"] == pytest.approx(straight["bits_per_dim"], abs=1e-6)
    assert same_numbers(metrics, straight)
    assert len(SCORE.findall(done.stdout)) == 2 and done.stdout.count("metrics.json") == 1
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "metrics.json",
        "per_image.png",
        "vlb_terms.png",
    ]


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


# What is refused


def script(monkeypatch, *options):
    """Run the script as a command in this process; returns what it says when it refuses."""
    reset_accelerate()
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--cpu", *map(str, options)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "examples" / "evaluate.py"), run_name="__main__")
    return stop.value.code  # text is printed to standard error, and the exit code is 1


@pytest.fixture
def refused(monkeypatch, tmp_path, models, sets, calls):
    """Run the script with bad input: it must say so in one line, with no network call and no result."""

    def refuse(model, data, pattern, options=""):
        data = sets[data].options if data in sets else data
        output = () if "--output_dir" in options else ("--output_dir", tmp_path / "run")
        message = script(monkeypatch, "--model", models.get(model, model), *data, *output, *FEW, *options.split())
        assert isinstance(message, str) and message.startswith("ddpm-vlb evaluate: ") and "\n" not in message.strip()
        assert re.search(pattern, message), message
        assert calls == [] and not (tmp_path / "run" / "metrics.json").exists()

    return refuse


def options_for(tmp_path, folder):
    return "--dataset_name", folder, "--cache_dir", str(tmp_path / "cache")


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
        message = script(monkeypatch, *options)
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
    options = nan_for_image(5, models, tmp_path)  # the third unit of two images, the first process's
    for option in (options, [*options, "--eval_batch_size", "8"]):  # the sixth unit of one, the second process's
        command = [*launcher(2), str(ROOT / "examples" / "evaluate.py"), *map(str, option)]
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
    message = script(monkeypatch, *options)
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
def test_a_model_and_a_data_set_on_the_hub(models, sets, tmp_path):
    """By their names, over the network, with the real client: the numbers of the same files in folders."""
    upload = """
import sys
from huggingface_hub import HfApi
api = HfApi()
for kind, folder in zip(("model", "dataset"), sys.argv[1:]):
    api.create_repo("tester/" + kind, repo_type=kind)
    api.upload_folder(repo_id="tester/" + kind, folder_path=folder, repo_type=kind)
"""
    local = dict(zip(sets["grey"].options[::2], sets["grey"].options[1::2]))
    folders = [str(models["small"]), str(local["--dataset_name"])]
    with HubServer() as server:
        environment = server.environment(tmp_path / "home", OMP_NUM_THREADS="1")
        subprocess.run([sys.executable, "-c", upload, *folders], env=environment, check=True, timeout=120)
        for name, model, data in (("hub", "tester/model", "tester/dataset"), ("folder", *folders)):
            options = ["--model", model, "--dataset_name", data, *FEW, "--output_dir", str(tmp_path / name)]
            command = [sys.executable, str(ROOT / "examples" / "evaluate.py"), *options]
            subprocess.run(command, env=environment, cwd=tmp_path, check=True, timeout=120, capture_output=True)
    hub, folder = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("hub", "folder"))
    assert hub["per_image"] == folder["per_image"] and hub["data"]["fingerprint"] == folder["data"]["fingerprint"]


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
