"""Sections of gpu.py: how fast `ddpm-vlb train` and scoring are, how busy the device is, and MNIST in minutes."""

import contextlib
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import torch
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor

from ddpm_vlb import DDPMVLBScheduler, estimate_vlb, fit_pilot
from ddpm_vlb.commands import train
from ddpm_vlb.recipes import train as recipe
from ddpm_vlb.training.run import Run

# google/ddpm-cifar10-32's, with a learned variance.
CIFAR10 = {
    "_class_name": "UNet2DModel",
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 6,
    "block_out_channels": [128, 256, 256, 256],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "norm_eps": 1e-6,
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
}
TINY = CIFAR10 | {
    "sample_size": 8,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
}


@dataclass(frozen=True)
class Settings:
    """What the sections are told.

    Args:
        smoke: all of it tiny, on the CPU.
        folder: for files, which is removed at the end.
        mnist: folder of MNIST, or None.
        mnist_seconds: to train on it.
    """

    smoke: bool
    folder: Path
    mnist: str | None
    mnist_seconds: float

    @property
    def device(self) -> torch.device:
        """Where the sections run."""
        return torch.device("cpu" if self.smoke else "cuda")

    @property
    def batch(self) -> int:
        """Images of a training step."""
        return 2 if self.smoke else 128

    @property
    def network(self) -> dict[str, Any]:
        """The configuration of the network."""
        return TINY if self.smoke else CIFAR10


@dataclass(frozen=True)
class Variant:
    """One way to train.

    Args:
        name: in the report.
        options: of `ddpm-vlb train`.
        tf32: let matrix products and convolutions take TF32.
        block: steps between two looks at the clock.
    """

    name: str
    options: tuple[str, ...]
    tf32: bool = True
    block: int = 20


BF16 = ("--mixed_precision", "bf16")
VARIANTS = (
    Variant("fp32", ("--mixed_precision", "no"), tf32=False, block=8),
    Variant("TF32", ("--mixed_precision", "no")),
    Variant("bf16", BF16),
    Variant("bf16, channels_last", (*BF16, "--channels_last")),
    Variant("bf16, compile", (*BF16, "--compile")),
)


class Done(Exception):
    """A training loop that has seen enough, with what it found."""


def random_images(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """x_0 of 256 levels."""
    return torch.randint(256, shape, generator=generator) / 127.5 - 1


def describe_device(settings: Settings) -> dict[str, Any]:
    """The device's name and memory; writes the images and the configuration that the other sections read."""
    write_images(settings)
    device = settings.device
    if device.type == "cpu":
        return {"rows": [{"device": "CPU"}]}
    torch.ones(1, device=device).item()
    own = torch.cuda.get_device_properties(device)
    row = {"device": own.name, "memory, GB": own.total_memory / 1e9, "capability": f"{own.major}.{own.minor}"}
    return {"rows": [row | {"CUDA": torch.version.cuda, "cuDNN": str(torch.backends.cudnn.version())}]}


def write_images(settings: Settings) -> None:
    """Smooth colour images as PNG bytes, as data sets hold them."""
    side, count = settings.network["sample_size"], 64 if settings.smoke else 8192
    coarse = np.random.default_rng(0).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    images = [PIL.Image.fromarray(pixels).resize((side, side), PIL.Image.Resampling.BILINEAR) for pixels in coarse]
    columns = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": images}, features=columns).to_parquet(settings.folder / "images.parquet")
    (settings.folder / "network").mkdir(exist_ok=True)
    (settings.folder / "network" / "config.json").write_text(json.dumps(settings.network), encoding="utf-8")


def train_options(settings: Settings, name: str, *more: str) -> list[str]:
    """The options of `ddpm-vlb train` on these images with this network."""
    told = {
        "dataset_name": settings.folder / "images.parquet",
        "cache_dir": settings.folder / "cache",
        "model_config_name_or_path": settings.folder / "network",
        "output_dir": settings.folder / name.replace(" ", "_"),
        "train_batch_size": settings.batch,
        "dataloader_num_workers": 0 if settings.smoke else workers(),
        "objective": "hybrid",
        "learning_rate": 2e-4,
        "max_train_steps": 1_000_000,
        "checkpointing_steps": 0,
        "num_test_images": 0,
        "logger": "none",
    }
    given = [text for option, value in told.items() for text in (f"--{option}", str(value))]
    return [*given, *(["--cpu"] if settings.smoke else []), *more]


def workers() -> int:
    """Processes that decode images, on a GPU."""
    return min(4, os.cpu_count() or 1)


def clock(device: torch.device) -> float:
    """Seconds, once the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextlib.contextmanager
def peak_memory(device: torch.device, found: list[float | None]) -> Iterator[None]:
    """Append the most memory that tensors took meanwhile, in GB; None on a CPU."""
    if device.type != "cuda":
        yield
        found.append(None)
        return
    torch.cuda.reset_peak_memory_stats(device)
    yield
    clock(device)
    found.append(torch.cuda.max_memory_allocated(device) / 1e9)


def union_seconds(events: list[dict[str, Any]]) -> float:
    """Seconds in which a device works, of a trace's events: those of its kernels and copies, overlaps once."""
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e.get("ph") == "X" and e.get("cat") in kinds)
    busy, until = 0.0, float("-inf")
    for start, end in spans:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return busy / 1e6


@contextlib.contextmanager
def busy_seconds(settings: Settings, found: list[float]) -> Iterator[None]:
    """Append the seconds in which the device worked meanwhile; nothing on a CPU, or where no kernel can be seen."""
    if settings.device.type != "cuda":
        yield
        return
    trace = settings.folder / "trace.json"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        yield
        clock(settings.device)
    profiler.export_chrome_trace(str(trace))
    seconds = union_seconds(json.loads(trace.read_text(encoding="utf-8"))["traceEvents"])
    if seconds > 0:
        found.append(seconds)


def stock_loop(run: Run) -> Iterator[None]:
    """Diffusers' unconditional training loop, a step at a time, on our run's network, data and precision."""
    accelerator, unet = run.accelerator, UNet2DModel.from_config(run.network_config)
    if run.args.channels_last:
        unet = unet.to(memory_format=torch.channels_last)
    noise_scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-4, betas=(0.9, 0.99), weight_decay=1e-6, eps=1e-8)
    loader = torch.utils.data.DataLoader(
        run.data.train,
        run.args.train_batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=run.args.dataloader_num_workers,
        persistent_workers=run.args.dataloader_num_workers > 0,
        collate_fn=torch.stack,
    )
    lr_scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=100, num_training_steps=1_000_000)
    unet, optimizer, loader, lr_scheduler = accelerator.prepare(unet, optimizer, loader, lr_scheduler)
    ema = EMAModel(unet.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    ema.to(accelerator.device)
    while True:
        for clean in loader:
            noise = torch.randn(clean.shape, device=clean.device)
            t = torch.randint(0, 1000, (len(clean),), device=clean.device)
            noisy = noise_scheduler.add_noise(clean, noise, t)
            with accelerator.accumulate(unet):
                predicted = unet(noisy, t).sample[:, : clean.shape[1]]
                loss = torch.nn.functional.mse_loss(predicted.float(), noise.float())
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(unet.parameters(), 10.0)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            ema.step(unet.parameters())
            loss.detach().item()
            yield


def measure(run: Run, settings: Settings, block: int) -> Iterator[None]:
    """Our loop makes a block of steps at each `yield`; between them diffusers' makes as many. Returns the row."""
    device, peaks, busy = settings.device, list[float | None](), list[float]()
    enough, rounds = (0.0, 2) if settings.smoke else (6.0, 3)
    times: dict[str, list[float]] = {"ours": [], "diffusers": []}
    with peak_memory(device, peaks):
        yield  # the first block, before this, has warmed up
    held = torch.cuda.memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0
    stock = None if run.args.compile else stock_loop(run)

    def advance() -> None:
        if stock is not None:
            for _ in range(block):
                next(stock)

    advance()
    with peak_memory(device, peaks):
        advance()
    until = time.perf_counter() + enough
    while len(times["ours"]) < rounds or time.perf_counter() < until:
        started = clock(device)
        yield
        between = clock(device)
        times["ours"].append(between - started)
        advance()
        times["diffusers"].append(clock(device) - between)
    with busy_seconds(settings, busy):
        yield
    with busy_seconds(settings, busy):
        advance()
    medians = [statistics.median(own) for own in times.values()]
    shares = [seconds / median for seconds, median in zip(busy, medians)]
    images = block * run.args.train_batch_size
    raw: dict[str, Any] = {"ours, images/s": images / medians[0]}
    raw |= {"quartiles": quartiles([images / own for own in times["ours"]])}
    raw |= {"device busy": shares[0] if shares else None, "peak, GB": peaks[0]}
    if stock is not None:
        ratios = [theirs / ours for ours, theirs in zip(*times.values())]
        raw |= {"diffusers', images/s": images / medians[1], "ratio": statistics.median(ratios)}
        raw |= {"quartiles of the ratio": quartiles(ratios), "its device busy": shares[1] if len(shares) > 1 else None}
        raw |= {"its peak, GB": None if peaks[1] is None else peaks[1] - held}
    return raw


def quartiles(values: list[float]) -> list[float]:
    """The first and the third."""
    return statistics.quantiles(values, n=4, method="inclusive")[::2]


def training(settings: Settings, variant: Variant) -> dict[str, Any]:
    """Images/s of `ddpm-vlb train` beside diffusers' loop, in blocks that take turns."""
    block = 2 if settings.smoke else variant.block
    if settings.smoke and "--compile" in variant.options:
        return {"skipped": "--smoke compiles nothing, which takes a minute."}

    def loop(run: Run, validate: object) -> bool:
        set_tf32(variant.tf32)
        measuring = measure(run, settings, block)

        def at_block(run: Run) -> None:
            try:
                next(measuring)
            except StopIteration as end:
                raise Done(end.value) from None

        return recipe.train(run, at_block)

    options = train_options(settings, variant.name, *variant.options, "--validation_steps", str(block))
    try:
        train.main(options, loop=loop)
    except Done as done:
        return {"rows": [{"precision": variant.name, **done.args[0]}]}
    raise RuntimeError("the training loop ended before it was measured")


def set_tf32(allowed: bool) -> None:
    """Let matrix products and convolutions in float32 take TF32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def scoring(settings: Settings) -> dict[str, Any]:
    """Pairs (image, t) a second that `estimate_vlb` scores, beside those that the network alone makes, in bf16."""
    device = settings.device
    unet = UNet2DModel.from_config(settings.network).to(device).eval().requires_grad_(False)
    reverse, sizes = DDPMVLBScheduler(variance_type="learned_range").reverse_process(device), set[int]()

    def model(x_t: Tensor, timesteps: Tensor) -> Tensor:
        sizes.add(len(x_t))
        with torch.autocast(device.type, torch.bfloat16):
            return unet(x_t, timesteps).sample.float()

    images, side = (8, 8) if settings.smoke else (256, 32)
    x_0 = random_images((images, 3, side, side), torch.Generator().manual_seed(0))
    pilot = fit_pilot(model, reverse, x_0, num_calls=256)
    rows = []
    for name, options in (("the default", {}), ("2^20 values", {"values_per_call": 2**20})):
        sizes.clear()

        def score(options: dict[str, int] = options) -> float:
            started = clock(device)
            estimate_vlb(model, reverse, x_0.split(64), pilot, **options)
            return clock(device) - started

        score()
        pairs, busy, peaks = max(sizes), list[float](), list[float | None]()
        with peak_memory(device, peaks):
            rates = [20 * images / score() for _ in range(2 if settings.smoke else 3)]
        with busy_seconds(settings, busy):
            score()
        bare, rate = bare_forward(model, pairs, side, device, settings.smoke), statistics.median(rates)
        row = {
            "network calls of": name,
            "pairs a call": pairs,
            "scoring, pairs/s": rate,
            "quartiles": quartiles(rates),
        }
        row |= {"network alone, pairs/s": bare, "ratio": rate / bare}
        row |= {"device busy": busy[0] * rate / (20 * images) if busy else None, "peak, GB": peaks[0]}
        rows.append(row)
    return {"rows": rows}


def bare_forward(model: Callable[..., Tensor], pairs: int, side: int, device: torch.device, smoke: bool) -> float:
    """Pairs a second of the network alone, by calls of so many; the median of three."""
    x_t, t = torch.randn(pairs, 3, side, side, device=device), torch.arange(pairs, device=device) % 1000
    calls, rates = 1 if smoke else max(2, 2**13 // pairs), []
    with torch.no_grad():
        for _ in range(4):  # the first warms up
            started = clock(device)
            for _ in range(calls):
                model(x_t, t)
            rates.append(calls * pairs / (clock(device) - started))
    return statistics.median(rates[1:])


def mnist(settings: Settings) -> dict[str, Any]:
    """Test bits/dim of MNIST after so many seconds of training, at a learning rate that stays as it is."""
    if settings.mnist is None:
        return {"skipped": "no --mnist PATH was given."}

    def loop(run: Run, validate: object) -> bool:
        set_tf32(True)
        until = time.perf_counter() + settings.mnist_seconds

        def at_validation(run: Run) -> None:
            if time.perf_counter() > until:
                run.max_steps = run.progress.step + 1

        return recipe.train(run, at_validation)

    told = ["--dataset_name", settings.mnist, "--cache_dir", str(settings.folder / "cache"), "--logger", "none"]
    told += ["--output_dir", str(settings.folder / "mnist"), "--lr_scheduler", "constant_with_warmup"]
    told += f"--max_train_steps {10**7} --checkpointing_steps 0 --ddpm_num_inference_steps 25".split()
    if settings.smoke:
        told += "--cpu --block_out_channels 8 --norm_num_groups 4 --train_batch_size 8 --validation_steps 1".split()
        told += "--num_test_images 4 --calls_per_image 4 --eval_batch_size 1".split()
    else:
        told += "--block_out_channels 64 128 128 --layers_per_block 2 --learning_rate 5e-4".split()
        told += "--train_batch_size 128 --validation_steps 50 --eval_batch_size 16".split()
        told += ["--dataloader_num_workers", str(workers())]
    metrics = train.main(told, loop=loop)
    assert metrics is not None
    test, trained = metrics["test"], metrics["train"]
    row = {"steps": trained["steps"], "seconds": trained["seconds"], "test bits/dim": test["bits_per_dim"]}
    row |= {"+- noise": test["noise_se"], "+- images": test["image_se"], "test images": test["num_images"]}
    return {"rows": [row]}
