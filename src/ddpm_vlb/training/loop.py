"""Parts of the training loop: what processes share of a step, what is logged of it, and when it is not finite.

A step is launched without a wait for the device; the host reads its values while the device computes the next one.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from accelerate.utils import DistributedType
from torch import Tensor
from tqdm.auto import tqdm

from ddpm_vlb.runtime.stopping import end
from ddpm_vlb.training.average import full, is_sharded
from ddpm_vlb.training.run import Run

QUARTILES = 4
Function = TypeVar("Function", bound=Callable[..., Any])
_compile: Any = functools.cache(torch.compile)


def weighted_sum(run: Run, terms: Tensor) -> Tensor:
    """The loss (B,) of its terms (B, terms)."""
    parts = [weight * values for weight, values in zip(run.term_weights.values(), terms.unbind(1), strict=True)]
    return torch.stack(parts).sum(0)


class Drawn(NamedTuple):
    """What an optimizer step draws for its global batch of G images, alike on all processes."""

    t: Tensor
    weights: Tensor
    mirrored: Tensor
    labels: Tensor | None = None

    def moved(self, move: Callable[[Tensor], Tensor]) -> "Drawn":
        """The same of tensors that were moved."""
        labels = None if self.labels is None else move(self.labels)
        return Drawn(move(self.t), move(self.weights), move(self.mirrored), labels)

    def pinned(self, device: torch.device) -> "Drawn":
        """In memory from which a copy to the device does not make the host wait."""
        return self.moved(Tensor.pin_memory) if device.type == "cuda" else self

    def part(self, rows: slice, device: torch.device) -> "Drawn":
        """That of some images, on its way to the device."""
        return self.moved(lambda value: value[rows].to(device, non_blocking=True))


def told_labels(run: Run, generator: torch.Generator) -> Tensor | None:
    """The classes of the step's images (G,), which --label_dropout replaces by none at random; None without classes.

    Args:
        run: the run.
        generator: of the step.
    """
    if run.labels is None:
        return None
    labels = run.labels[run.batches.images(run.progress.step)]
    dropped = torch.rand(len(labels), generator=generator) < run.args.label_dropout
    return labels.masked_fill(dropped, run.null_label)


class Shared(NamedTuple):
    """What the host reads of a step: the terms' values (G, terms), the gradient's norm, and whether to stop."""

    values: Tensor
    norm: float
    stop: bool

    @property
    def finite(self) -> bool:
        """Whether the step may be taken."""
        return math.isfinite(self.norm) and bool(self.values.isfinite().all())


class Sent:
    """A step's values on their way to the host: nothing waits for them before `read`.

    Args:
        run: the run.
        drawn: what the step has drawn.
        parts: values of the loss's terms in each micro batch of this process, (B, terms).
        norm: of the gradient.
    """

    def __init__(self, run: Run, drawn: Drawn, parts: list[Tensor], norm: Tensor):
        self.drawn, self.step = drawn, run.progress.step + 1
        self.lr, self.seconds, self.waited = run.lr_scheduler.get_last_lr()[0], 0.0, 0.0
        values = torch.cat(parts)
        own = torch.stack([full(norm).detach().to(values), values.new_full((), float(run.stop.asked()))])
        gathered = run.accelerator.gather(torch.cat([values.flatten(), own])[None])
        self.taken = gathered[:, :-1].isfinite().all().to(values)  # 1 or 0, on the device, alike on all processes
        self._in_order, self._shape = run.batches.in_order, values.shape
        self._shared: Shared | None = None
        self._arrived = torch.cuda.Event() if gathered.device.type == "cuda" else None
        self._gathered = gathered.to("cpu", non_blocking=run.skips_on_device)  # CUDA's into pinned memory then
        if self._arrived is not None:
            self._arrived.record()

    def read(self) -> Shared:
        """What has come; waits for the device until it has."""
        if self._shared is None:
            if self._arrived is not None:
                self._arrived.synchronize()
            gathered = self._gathered.double()
            values = self._in_order(gathered[:, :-2].unflatten(1, self._shape))
            self._shared = Shared(values, float(gathered[:, -2].max()), bool(gathered[:, -1].any()))
        return self._shared


def take_if_finite(run: Run, sent: Sent) -> None:
    """The optimizer's step; where the loss or its gradient is not finite, the device leaves everything as it is."""

    def combine(optimizer: Any, *args: Any) -> None:
        found = getattr(optimizer, "found_inf", None)  # a gradient scaler's
        optimizer.found_inf = 1 - sent.taken if found is None else torch.maximum(found, 1 - sent.taken)

    hook = run.optimizer.optimizer.register_step_pre_hook(combine)
    run.optimizer.step()
    hook.remove()
    vars(run.optimizer.optimizer).pop("found_inf", None)


def compiled(run: Run, function: Function) -> Function:
    """A function of the run under --compile, if its network is not sharded: such a one is compiled by itself."""
    return _compile(function) if run.args.compile and not is_sharded(run.accelerator) else function


def gradient_norm(run: Run) -> Tensor:
    """Clip the gradient of all processes; returns its norm before that, infinite where it is none."""
    norm = run.accelerator.clip_grad_norm_(run.unet.parameters(), run.args.max_grad_norm)
    if run.accelerator.distributed_type != DistributedType.DEEPSPEED:
        return norm
    # DeepSpeed clips by itself; up to 0.15 it tells the norm of the step before where it skips one.
    norm = run.unet.get_global_grad_norm() or 0.0
    return torch.as_tensor(math.inf if run.optimizer.step_was_skipped else norm)


def skip(run: Run, sent: Sent, shared: Shared) -> None:
    """Tell which step was not taken and why; ends the run after --max_skipped_steps in a row."""
    progress, accelerator = run.progress, run.accelerator
    progress.skipped += 1
    progress.skipped_in_a_row += 1
    first = sent.step - progress.skipped_in_a_row
    said = f"Step {sent.step} is not finite: {offenders(run, sent.drawn, shared)}."
    # DeepSpeed has by now taken the step, or skipped it for its gradient.
    taken = accelerator.distributed_type == DistributedType.DEEPSPEED and not run.optimizer.step_was_skipped
    limit = 1 if taken else run.args.max_skipped_steps
    if progress.skipped_in_a_row < limit:
        if accelerator.is_main_process:
            tqdm.write(f"{said} It is skipped: number {progress.skipped_in_a_row} in a row, of at most {limit}.")
        return
    renamed = run.checkpoints.set_aside(first)
    end(
        accelerator,
        f"{said} The run has diverged: {progress.skipped_in_a_row} in a row. {renamed}{run.checkpoints.advice()}. "
        "A smaller --learning_rate may help.",
    )


def offenders(run: Run, drawn: Drawn, shared: Shared) -> str:
    """Which terms are not finite, and at which chain indices t."""
    found = []
    for (name, _), values in zip(run.term_weights.items(), shared.values.unbind(1)):
        parts = {"L_t (KL)": drawn.t > 0, "L_0 (decoder)": drawn.t == 0}
        if name != "vlb":
            parts = {f"L_{name}": drawn.t >= 0}
        for part, own in parts.items():
            t = sorted(set(drawn.t[own & ~values.isfinite()].tolist()))
            if t:
                found.append(f"{part} at t={t[:8]}{f' and {len(t) - 8} more' if len(t) > 8 else ''}")
    if not math.isfinite(shared.norm):
        found.append("the gradient's norm")
    return ", ".join(found)


class Statistics:
    """What the tracker is told: means of the loss and its terms since the last time, also by quartile of t; speed.

    `pending` is the step that was launched last, until it is read; `step` the last one that was; `stop`, whether the
    processes agreed in it to stop.
    """

    def __init__(self, run: Run):
        self.run = run
        self.pending: Sent | None = None
        self.step, self.stop = run.progress.step, False
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self.values: list[Tensor] = []
        self.drawn: list[Drawn] = []
        self.images = 0
        self.seconds = self.waited = 0.0

    def add(self, sent: Sent, shared: Shared) -> None:
        """Take in a step that was read, and how long it took and waited for data."""
        self.images += len(sent.drawn.t)
        if shared.finite:
            self.values.append(shared.values)
            self.drawn.append(sent.drawn)
        self.seconds, self.waited = self.seconds + sent.seconds, self.waited + sent.waited
        self.step, self.stop, self.norm, self.lr = sent.step, shared.stop, shared.norm, sent.lr

    def take(self) -> dict[str, float]:
        """The numbers since the last time, those that are finite; of the losses, those of steps that were taken."""
        run = self.run
        numbers = self._losses() if self.values else {}
        numbers |= {
            "grad_norm": self.norm,
            "lr": self.lr,
            "images_per_second": self.images / self.seconds,
            "data_wait_fraction": self.waited / self.seconds,
            "skipped_steps": run.progress.skipped,
        }
        self.clear()
        return {name: number for name, number in numbers.items() if math.isfinite(number)}

    def _losses(self) -> dict[str, float]:
        run = self.run
        values = torch.cat(self.values)
        t, weights = (torch.cat([getattr(drawn, name) for drawn in self.drawn]) for name in ("t", "weights"))
        named = {"loss": weighted_sum(run, values)}
        named |= {f"loss_{name}": values[:, i] for i, name in enumerate(run.term_weights)}
        numbers = {name: float((weights * value).mean()) for name, value in named.items()}
        if "vlb" in run.term_weights:
            decoder = float((weights * (t == 0) * named["loss_vlb"]).mean())
            numbers |= {"loss_decoder": decoder, "loss_kl": numbers["loss_vlb"] - decoder}
        quartile = t * QUARTILES // len(run.reverse.forward)
        for name, value in named.items():
            for q in range(QUARTILES):
                numbers[f"{name}_q{q}"] = float(value[quartile == q].mean())  # NaN where none was drawn
        return numbers


def next_batch(run: Run, source: Iterator[Tensor]) -> Tensor:
    """The next micro batch; a fault of the data ends the run with its name."""
    try:
        return next(source)
    except Exception as error:  # whatever the files, the decoders and the workers raise
        # A worker's exception comes as the text of its traceback, the name and the message last.
        said = ([line for line in str(error).splitlines() if line.strip()] or [type(error).__name__])[-1]
        said = said.strip().removeprefix("ValueError: ").rstrip(".")
        raise SystemExit(
            f"Step {run.progress.step + 1}: the training data cannot be read. {said}. {run.checkpoints.advice()}."
        ) from error


def batches(run: Run) -> Iterator[Tensor]:
    """This process's micro batches from the run's next step on."""
    run.batches.first_step = run.progress.step
    return iter(run.loader)


def saves(run: Run, step: int) -> bool:
    """Whether a checkpoint follows a step."""
    every = run.args.checkpointing_steps
    return step == run.max_steps or bool(every and step % every == 0)


def validates(run: Run, step: int) -> bool:
    """Whether a validation follows a step."""
    return step % run.args.validation_steps == 0 and step != run.max_steps


def lacks_validation(run: Run) -> bool:
    """Whether the run goes on from a step whose validation it was stopped in, or before."""
    step = run.progress.step
    return step > 0 and validates(run, step) and step not in run.validations.so_far.history
