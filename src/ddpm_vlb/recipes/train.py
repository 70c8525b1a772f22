"""The training loop, to run as it is or to change; `ddpm-vlb cp train my_train.py` makes a copy that is yours.

    accelerate launch my_train.py --help
    accelerate launch my_train.py --dataset_name ylecun/mnist --output_dir runs/mnist

A step draws t, diffuses, calls the network, takes the loss, steps, averages. Around it the package reads the options,
the data and checkpoints (`run`, see `ddpm_vlb.training.run.Run`), and scores and saves what was trained. This is the
very loop of `ddpm-vlb train`.
"""

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ddpm_vlb import Diffused, LossSecondMomentTimesteps, simple_loss, vlb_loss
from ddpm_vlb.training.global_batches import seed_of
from ddpm_vlb.training.loop import (
    Drawn,
    Shared,
    Statistics,
    batches,
    gradient_norm,
    next_batch,
    share,
    skip,
    weighted_sum,
)
from ddpm_vlb.training.run import Run

LOGGING_STEPS = 10


def random_flip(x_0: Tensor, mirrored: Tensor) -> Tensor:
    """Mirror those images of (B, C, H, W) left to right for which `mirrored` (B,) is true."""
    return torch.where(mirrored.to(x_0.device)[:, None, None, None], x_0.flip(-1), x_0)


def draw(run: Run) -> Drawn:
    """Chain indices t, their weights, and which images are mirrored; each (G,)."""
    count = run.batches.global_batch_size
    generator = torch.Generator().manual_seed(seed_of(run.args.seed, run.progress.step))
    t, weights = run.sampler.sample(count, generator=generator)
    mirrored = torch.rand(count, generator=generator) < (0.5 if run.args.random_flip else 0)
    return Drawn(t, weights, mirrored)


def loss_terms(run: Run, output: Tensor, diffused: Diffused) -> Tensor:
    """The terms of --objective, (B, terms), in the order of `run.term_weights`: their names and weights in the loss.

    A term of your own gets its name and weight there before the first step (`run.term_weights["mine"] = 0.1` at the
    beginning of `train`) and its values here; the logs then have it too.
    """
    values = []
    for name in run.term_weights:
        if name == "simple":
            mean_half = output[:, : diffused.x_t.shape[1]]
            values.append(simple_loss(run.of_the_mean, mean_half, diffused, run.args.snr_gamma))
        elif name == "vlb":
            frozen = run.args.objective == "hybrid"
            values.append(vlb_loss(run.reverse, output, diffused, freeze_mean=frozen))
    return torch.stack(values, dim=1)


def train_batch(run: Run, x_0: Tensor, micro_step: int, drawn: Drawn) -> Tensor:
    """Forward and backward of one micro batch; returns the values of the loss's terms, (B, terms)."""
    device, rows = run.accelerator.device, run.batches.rows(micro_step)
    x_0 = x_0.to(device, non_blocking=True)
    t, weights, mirrored = (value[rows].to(device, non_blocking=True) for value in drawn)
    if run.args.random_flip:
        x_0 = random_flip(x_0, mirrored)
    diffused = run.reverse.forward.diffuse(x_0, t, run.noise.draw(x_0, run.progress.step, rows))
    if run.has_dropout:  # which draws from the global generator
        torch.manual_seed(seed_of(run.args.seed, run.progress.step, "dropout", rows.start))
    x_t = diffused.x_t.to(run.input_dtype, memory_format=run.memory_format)
    output = run.unet(x_t, run.reverse.forward.timesteps[t]).sample
    terms = loss_terms(run, output, diffused)
    run.accelerator.backward((weights * weighted_sum(run, terms)).mean())
    return terms.detach()


def update(run: Run, drawn: Drawn, shared: Shared) -> None:
    """Take the step and move the average, or skip it where it is not finite."""
    if shared.finite:
        run.optimizer.step()
    elif run.accelerator.scaler is not None:
        run.accelerator.scaler.update()  # it has seen in the clipping whether its scale is too large
    run.optimizer.zero_grad()
    run.lr_scheduler.step()
    if not shared.finite:
        return skip(run, drawn, shared)
    run.progress.skipped_in_a_row = 0
    if isinstance(run.sampler, LossSecondMomentTimesteps):
        run.sampler.update(drawn.t, weighted_sum(run, shared.values))
    if run.ema is not None:
        run.ema.step(run.unet.parameters())
    run.checkpoints.proven()


def step(run: Run, source: Iterator[Tensor], statistics: Statistics) -> Shared:
    """One optimizer step: the micro batches, the update, and what the tracker is told of it later.

    Args:
        run: the run.
        source: of micro batches.
        statistics: that take it in.
    """
    started, waited, parts = time.perf_counter(), 0.0, []
    drawn = draw(run)
    for micro_step in range(run.args.gradient_accumulation_steps):
        asked = time.perf_counter()
        x_0 = next_batch(run, source)
        waited += time.perf_counter() - asked
        with run.accelerator.accumulate(run.unet):
            parts.append(train_batch(run, x_0, micro_step, drawn))
    shared = share(run, parts, gradient_norm(run))
    update(run, drawn, shared)
    seconds = time.perf_counter() - started
    run.progress.step += 1
    run.progress.seconds += seconds
    statistics.add(drawn, shared, seconds, waited)
    return shared


def train(run: Run, validate: Callable[[Run], object]) -> bool:
    """Train to the last step; False if the run was asked to stop before, and has saved its state.

    Args:
        run: the run.
        validate: called every --validation_steps.
    """
    args, accelerator, progress = run.args, run.accelerator, run.progress
    source, statistics, every = batches(run), Statistics(run), run.args.checkpointing_steps
    with tqdm(
        total=run.max_steps, initial=progress.step, desc="Training", disable=not accelerator.is_local_main_process
    ) as bar:
        while progress.step < run.max_steps:
            shared = step(run, source, statistics)
            bar.update()
            last = progress.step == run.max_steps
            if progress.step % LOGGING_STEPS == 0 or last or shared.stop:
                numbers = statistics.take()
                bar.set_postfix({name: f"{numbers[name]:.3g}" for name in ("loss", "lr") if name in numbers})
                accelerator.log(numbers, step=progress.step)
            if shared.stop or last or (every and progress.step % every == 0):
                run.checkpoints.save(progress.step)
            if shared.stop:
                return False
            if progress.step % args.validation_steps == 0 and not last:
                validate(run)
    return True


if __name__ == "__main__":
    from ddpm_vlb.commands.train import main

    main(loop=train)
