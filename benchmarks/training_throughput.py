"""Images per second of `ddpm-vlb train`'s loop with the hybrid loss, beside diffusers' unconditional training loop.

python benchmarks/training_throughput.py

The other loop does what diffusers' train_unconditional.py does with the same network, batch, data and average: a
shuffled data loader prepared by Accelerate, `add_noise`, the mean squared error, clipping, AdamW, the learning rate's
schedule, EMA, and the loss read after every step; once as it is there, and once with the fused AdamW and the `foreach`
average that `ddpm-vlb train` takes. The loops take turns in blocks of steps in one process. Then the command itself,
launched with one and with two processes of one thread each: the same global batch.
"""

import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from environment import describe
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parents[1]
from ddpm_vlb.commands.train_options import parse_args
from ddpm_vlb.recipes.train import step
from ddpm_vlb.runtime.image_data import load_image_data
from ddpm_vlb.runtime.launching import make_accelerator
from ddpm_vlb.training.loop import Statistics, batches
from ddpm_vlb.training.run import Run

BLOCK, BLOCKS, BATCH = 10, 40, 64
HYBRID = ["--objective", "hybrid", "--logger", "none", "--cpu", "--max_train_steps", "100000"]


def stock_loop(run: Run, workers: int, fused: bool) -> Iterator[None]:
    """Diffusers' loop, a step at a time."""
    accelerator, unet = run.accelerator, UNet2DModel.from_config(run.network_config)
    noise_scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    optimizer = torch.optim.AdamW(
        unet.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=1e-6, eps=1e-8, fused=fused
    )
    loader = torch.utils.data.DataLoader(
        run.data.train, BATCH, shuffle=True, drop_last=True, num_workers=workers, collate_fn=torch.stack
    )
    lr_scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=100, num_training_steps=100000)
    unet, optimizer, loader, lr_scheduler = accelerator.prepare(unet, optimizer, loader, lr_scheduler)
    ema = EMAModel(unet.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75, foreach=fused)
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


def our_loop(run: Run, waits: list[float]) -> Iterator[None]:
    """The recipe's loop, a step at a time, with what it tells the tracker."""
    source, told = batches(run), Statistics(run)
    while True:
        step(run, source, told)
        if run.progress.step % BLOCK == 0:
            waits.append(told.take()["data_wait_fraction"])
        yield


def compare(workers: int) -> None:
    """Print the loops' rates, the ratios in blocks side by side, and how long ours waits for data."""
    with tempfile.TemporaryDirectory() as folder:
        args = parse_args([*HYBRID, "--dataloader_num_workers", str(workers), "--output_dir", folder])
        accelerator = make_accelerator(args, Path(folder))
        torch.manual_seed(0)
        run, waits = Run(args, accelerator, load_image_data(), Path(folder)), list[float]()
        loops = {"ours": our_loop(run, waits)}
        loops |= {name: stock_loop(run, workers, name == "fused") for name in ("as it is", "fused")}
        seconds: dict[str, list[float]] = {name: [] for name in loops}
        order = list(loops)
        for block in range(BLOCKS + 1):
            random.Random(block).shuffle(order)
            for name in order:
                started = time.perf_counter()
                for _ in range(BLOCK):
                    next(loops[name])
                if block:  # the first warms up
                    seconds[name].append(time.perf_counter() - started)
    cells = [f"{BLOCK * BATCH / statistics.median(seconds['ours']):.0f}"]
    for name in ("as it is", "fused"):
        ratios = [stock / ours for stock, ours in zip(seconds[name], seconds["ours"])]
        error = 1.25 * statistics.stdev(ratios) / len(ratios) ** 0.5  # of the median of normal draws
        rate = BLOCK * BATCH / statistics.median(seconds[name])
        cells.append(f"{rate:.0f} | {statistics.median(ratios):.3f} +- {error:.3f}")
    print(f"| {workers} | {' | '.join(cells)} | {statistics.median(waits[1:]):.1%} |", flush=True)


def launched(processes: int) -> None:
    """Print the steps per second of `ddpm-vlb train` itself, the median over its logged intervals."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    several = f"--multi_gpu --num_processes 2 --num_machines 1 --main_process_port {port}" if processes == 2 else ""
    with tempfile.TemporaryDirectory() as folder:
        command = f"-m accelerate.commands.launch {several} --mixed_precision no --dynamo_backend no "
        command += "-m ddpm_vlb.commands.train "
        command += "--objective hybrid --max_train_steps 120 --validation_steps 1000 --checkpointing_steps 0 "
        command += f"--train_batch_size {BATCH // processes} --output_dir {folder} --num_test_images 4 "
        command += "--eval_batch_size 1 --ddpm_num_inference_steps 2"
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        subprocess.run(
            [sys.executable, *command.split()], cwd=ROOT, env=environment, check=True, capture_output=True, timeout=900
        )
        events = EventAccumulator(str(Path(folder) / "logs" / "train")).Reload()
        rates = [event.value / BATCH for event in events.Scalars("images_per_second")][2:]
    print(f"| {processes} | {statistics.median(rates):.2f} | {min(rates):.2f} to {max(rates):.2f} |", flush=True)


def main() -> None:
    """Print the tables."""
    torch.set_num_threads(1)
    print(describe())
    print(f"\nDigits, batches of {BATCH}, the default network; images/s, medians of {BLOCKS} blocks.\n")
    print("| workers | ours | diffusers' | ratio | diffusers', fused | ratio | ours waits for data |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for workers in (0, 1):
        compare(workers)
    print("\n| processes, one thread each | steps/s at a global batch of 64 | range |")
    print("| --- | --- | --- |")
    for processes in (1, 2):
        launched(processes)


if __name__ == "__main__":
    main()
