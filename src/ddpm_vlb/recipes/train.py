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
    Sent,
    Statistics,
    batches,
    compiled,
    gradient_norm,
    lacks_validation,
    next_batch,
    saves,
    skip,
    take_if_finite,
    told_labels,
    validates,
    weighted_sum,
)
from ddpm_vlb.training.run import Run

LOGGING_STEPS = 10


def random_flip(x_0: Tensor, mirrored: Tensor) -> Tensor:
    """Mirror those images of (B, C, H, W) left to right for which `mirrored` (B,) is true."""
    return torch.where(mirrored.to(x_0.device)[:, None, None, None], x_0.flip(-1), x_0)


def draw(run: Run) -> Drawn:
    """Chain indices t, their weights, which images are mirrored, and what is told of their classes; each (G,)."""
    count = run.batches.global_batch_size
    generator = torch.Generator().manual_seed(seed_of(run.args.seed, run.progress.step))
    t, weights = run.sampler.sample(count, generator=generator)
    mirrored = torch.rand(count, generator=generator) < (0.5 if run.args.random_flip else 0)
    return Drawn(t, weights, mirrored, told_labels(run, generator)).pinned(run.accelerator.device)


def loss_terms(run: Run, output: Tensor, diffused: Diffused) -> Tensor:
    """The terms of --objective, (B, terms), in the order of `run.term_weights`: their names and weights in the loss.

    A term of your own gets its name and weight there before the first step (`run.term_weights["mine"] = 0.1` at the
    beginning of `train`) and its values here; the logs then have it too.
    """
    values = []
    for name in run.term_weights:
        if name == "simple":
            mean_half = output[:, : diffused.x_t.shape[1]]
            loss = simple_loss(run.of_the_mean, mean_half, diffused, run.args.snr_gamma)
            values.append(run.simple_weights[diffused.t] * loss)  # 1, but in the terms of another --path
        elif name == "vlb":
            frozen = run.args.objective == "hybrid" or run.args.freeze_mean
            values.append(vlb_loss(run.reverse, output, diffused, freeze_mean=frozen))
    return torch.stack(values, dim=1)


def call(run: Run, x_t: Tensor, diffused: Diffused, labels: Tensor | None = None) -> Tensor:
    """The network's call and the terms of its loss, (B, terms): one graph under --compile."""
    told = {} if labels is None else {"class_labels": labels}
    return loss_terms(run, run.network(x_t, run.reverse.forward.timesteps[diffused.t], **told), diffused)


def train_batch(run: Run, x_0: Tensor, micro_step: int, drawn: Drawn) -> Tensor:
    """Forward and backward of one micro batch; returns the values of the loss's terms, (B, terms)."""
    device, rows = run.accelerator.device, run.batches.rows(micro_step)
    x_0 = x_0.to(device, non_blocking=True)
    t, weights, mirrored, labels = drawn.part(rows, device)
    if run.args.random_flip:
        x_0 = random_flip(x_0, mirrored)
    diffused = run.reverse.forward.diffuse(x_0, t, run.noise.draw(x_0, run.progress.step, rows))
    if run.has_dropout:  # which draws from the global generator
        torch.manual_seed(seed_of(run.args.seed, run.progress.step, "dropout", rows.start))
    order = torch.channels_last if run.args.channels_last else torch.preserve_format
    terms = compiled(run, call)(run, diffused.x_t.to(run.input_dtype, memory_format=order), diffused, labels)
    run.accelerator.backward((weights * weighted_sum(run, terms)).mean())
    return terms.detach()


def update(run: Run, sent: Sent, statistics: Statistics) -> None:
    """Take the step and move the average; where it is not finite, both stay as they are."""
    on_device = run.skips_on_device
    if on_device:
        take_if_finite(run, sent)
    elif sent.read().finite:
        run.optimizer.step()
    elif run.accelerator.scaler is not None:
        run.accelerator.scaler.update()  # it has seen in the clipping whether its scale is too large
    run.optimizer.zero_grad()
    run.lr_scheduler.step()
    settle(run, statistics)  # while the device is busy; the average's decay follows the number of steps taken
    if run.ema is None:
        return
    if on_device:
        run.ema.follow(run.unet.parameters(), sent.taken)
    elif sent.read().finite:
        run.ema.step(run.unet.parameters())


def settle(run: Run, statistics: Statistics) -> None:
    """Read the step that was launched last, if it is not read yet, and draw the conclusions."""
    sent, statistics.pending = statistics.pending, None
    if sent is None:
        return
    shared = sent.read()
    if shared.finite:
        run.progress.skipped_in_a_row = 0
        if isinstance(run.sampler, LossSecondMomentTimesteps):
            run.sampler.update(sent.drawn.t, weighted_sum(run, shared.values))
        run.checkpoints.proven()
    else:
        if run.ema is not None and run.skips_on_device:
            run.ema.not_taken()
        skip(run, sent, shared)
    statistics.add(sent, shared)


def step(run: Run, source: Iterator[Tensor], statistics: Statistics) -> None:
    """One optimizer step: the micro batches and the update; it is read with the next one, or now where that must be.

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
    sent = Sent(run, drawn, parts, gradient_norm(run))
    update(run, sent, statistics)
    now = run.reads_at_once or saves(run, sent.step) or validates(run, sent.step)
    if now:
        sent.read()
    sent.seconds, sent.waited = time.perf_counter() - started, waited
    run.progress.step += 1
    run.progress.seconds += sent.seconds
    statistics.pending = sent
    if now:
        settle(run, statistics)


def train(run: Run, validate: Callable[[Run], object]) -> bool:
    """Train to the last step; False if the run was asked to stop before, and has saved its state.

    Args:
        run: the run.
        validate: called every --validation_steps, before the step is saved; False says that it was asked to stop.
    """
    accelerator, progress = run.accelerator, run.progress
    if lacks_validation(run) and validate(run) is False:
        return False
    source, statistics = batches(run), Statistics(run)
    with tqdm(
        total=run.max_steps, initial=progress.step, desc="Training", disable=not accelerator.is_local_main_process
    ) as bar:
        while progress.step < run.max_steps:
            step(run, source, statistics)
            bar.update()
            stop = statistics.stop or (accelerator.num_processes == 1 and run.stop.asked())
            if stop:
                settle(run, statistics)
            if statistics.images and (statistics.step % LOGGING_STEPS == 0 or progress.step == run.max_steps or stop):
                numbers = statistics.take()
                bar.set_postfix({name: f"{numbers[name]:.3g}" for name in ("loss", "lr") if name in numbers})
                accelerator.log(numbers, step=statistics.step)
            if validates(run, progress.step) and not stop:
                stop = validate(run) is False
            if stop or saves(run, progress.step):
                run.checkpoints.save(progress.step)
            if stop:
                return False
    return True


if __name__ == "__main__":
    from ddpm_vlb.commands.train import main

    main(loop=train)
