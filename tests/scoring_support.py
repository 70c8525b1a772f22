"""What tests of scoring share: tiny checkpoints, data sets of few images, the bound by hand, and the command itself.

The checkpoints are saved by plain diffusers, the data sets by `datasets`; networks that have learned nothing on a
chain of 20 steps are as good a test of the arithmetic as any.
"""

import json
import math
import re
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import PIL.Image
import pytest
import reference
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from processes import free_port, reset_accelerate

from ddpm_vlb import DDPMVLBPipeline, DDPMVLBScheduler, ForwardProcess, ReverseProcess, estimate_vlb, fit_pilot
from ddpm_vlb.commands import evaluate
from ddpm_vlb.evaluation import image_generator

ROOT = Path(__file__).parents[1]
T, BETAS = 20, {"beta_start": 0.002, "beta_end": 0.3}
TRAIN, TEST = 40, 23  # images; units of four leave three over
BITS = 1 / math.log(2)
# 8 calls for each image and 32 pairs in a network call: units of four images.
FEW = "--pilot_calls 230 --calls_per_image 8 --eval_batch_size 32".split()
NUMBERS = """
    bits_per_dim noise_se image_se prior kl decoder num_images network_calls_per_image by_clipping per_image
    per_image_other_clipping pilot_calls second_draw_calls control_variate timesteps clip_sample seed data
""".split()
PARTS = "partial-*/[0-9]*.npz"  # the part files of a run
SCORE = re.compile(r"-?\d+\.\d{3} \+- \d+\.\d{3} \(noise\) \+- (?:n/a|\d+\.\d{3}) \(images\) bits/dim")


# Checkpoints


def network(channels=1, out_channels=1, size=8, **options):
    """A tiny network that has learned nothing."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    widths = {"block_out_channels": (4,), "layers_per_block": 1, "norm_num_groups": 2, "add_attention": False}
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


def save_models(folder):
    """Save checkpoints; returns their folders by what is special about them."""
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


# Data sets


def write_splits(folder, columns, **features):
    """Write parquet files in the layout of the Hub, {split: {column: values}}; returns the folder's name."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "data").mkdir(parents=True)
    for split, content in columns.items():
        data = datasets.Dataset.from_dict(content, features=datasets.Features(features))
        data.to_parquet(str(folder / "data" / f"{split}-00000-of-00001.parquet"))
    return str(folder)


def write_images(folder, counts, shape=(8, 8), levels=256, labels=None, seed=0):
    """Random image files by split, and labels if there are any; returns the folder's name and the levels by split."""
    rng = np.random.default_rng(seed)
    arrays = {split: rng.integers(0, levels, (count, *shape), dtype=np.uint8) for split, count in counts.items()}
    content = {split: {"image": [PIL.Image.fromarray(k) for k in own]} for split, own in arrays.items()}
    features = {"image": datasets.Image()}
    if labels is not None:
        features["label"] = datasets.Value("int64")
        for split, own in content.items():
            own["label"] = labels[split]
    return write_splits(folder, content, **features), arrays


def write_arrays(folder, arrays, column="image", feature=None):
    """Arrays (N, *) by split, as arrays; returns the folder's name."""
    first = next(iter(arrays.values()))
    if feature is None:
        kind = {2: datasets.Array2D, 3: datasets.Array3D}[first.ndim - 1]
        feature = kind(first.shape[1:], str(first.dtype))
    return write_splits(folder, {split: {column: list(own)} for split, own in arrays.items()}, **{column: feature})


def x_0_of(levels, number=256):
    """What the network should see of integer levels (N, H, W) or (N, H, W, C)."""
    k = levels[:, None] if levels.ndim == 3 else levels.transpose(0, 3, 1, 2)
    return torch.from_numpy(k.astype(np.float64) * 2 / (number - 1) - 1).float()


def options_for(home, folder):
    """The options that name a data set, and where `datasets` may keep its files."""
    return "--dataset_name", folder, "--cache_dir", str(home / "cache")


def save_sets(home):
    """Write data sets; returns by name the options that name them, and the images by split as x_0."""
    found = {}

    def add(name, folder, x_0, *more):
        found[name] = SimpleNamespace(options=(*options_for(home, folder), *more), folder=folder, **x_0)

    counts = {"train": TRAIN, "test": TEST}
    few = {"train": 5, "test": 1}
    for name, own, shape in (("grey", counts, (8, 8)), ("colour", counts, (8, 8, 3)), ("one", few, (8, 8))):
        folder, levels = write_images(home / name, own, shape)
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


# The command


def run_evaluate(*options):
    """Evaluate in this process, on the CPU; returns the metrics."""
    reset_accelerate()
    return evaluate.main(["--cpu", *map(str, options)])


def refusal_of(monkeypatch, script, *options):
    """Run a script of examples/ in this process; returns what it says when it refuses."""
    reset_accelerate()
    monkeypatch.setattr(sys, "argv", [script, "--cpu", *map(str, options)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "examples" / script), run_name="__main__")
    return stop.value.code  # text is printed to standard error, and the exit code is 1


def strict_json(path):
    """Its content, if it is JSON as the standard has it."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def launcher(processes):
    """`accelerate launch` on so many CPU processes; `--cpu --num_processes 2` would start one."""
    several = f"--multi_gpu --main_process_port {free_port()}" if processes > 1 else ""
    arguments = f"--num_processes {processes} --num_machines 1 --mixed_precision no --dynamo_backend no {several}"
    return [sys.executable, "-m", "accelerate.commands.launch", *arguments.split()]


def positions_in(folder, sweep=0):
    """The images in the part files of a run's sweep, by the files' own content."""
    files = [np.load(path) for path in sorted(folder.glob(PARTS))]
    return sorted(int(position) for file in files if file["sweep"] == sweep for position in file["0.positions"])


def same_numbers(a, b):
    """Bit for bit, but for the order in which the L_t curve was summed."""
    for name in ("mean", "se"):
        first, second = ([math.inf if value is None else value for value in m["l_t"][name]] for m in (a, b))
        assert first == pytest.approx(second, rel=1e-9, abs=1e-12)
    return all(a[name] == b[name] for name in NUMBERS)


def changed_model(models, tmp_path, change):
    """A copy of a checkpoint with a change in its folder."""
    folder = shutil.copytree(models["small"], tmp_path / "changed")
    change(folder)
    return folder


def edit_config(part, **changes):
    """Change a saved configuration."""

    def change(folder):
        path = folder / part
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


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
