"""The Accelerator of a training run, and what must hold before it starts."""

import argparse
import datetime
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import (
    DistributedType,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    gather_object,
)

from ddpm_vlb.runtime.stopping import end

T = TypeVar("T")


def prepare_output_dir(folder: Path) -> None:
    """Make the output folder and make sure that it can be written, before hours are spent.

    Args:
        folder: of --output_dir.

    Raises:
        OSError: it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write_test-{uuid.uuid4().hex}"
        probe.write_text("", encoding="utf-8")
        probe.unlink()
    except OSError as error:
        raise OSError(f"--output_dir {folder} cannot be written: {error}") from error


def make_accelerator(args: argparse.Namespace, folder: Path) -> Accelerator:
    """Accelerate as the options and `accelerate launch` say.

    Args:
        args: the run's options.
        folder: the output folder.

    Raises:
        ValueError, ImportError: what was asked for cannot be had here, or needs DeepSpeed or a tracker.
    """
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and os.environ.get("FSDP_VERSION", "1") != "2":
        # Before Accelerate's own settings of FSDP 1, which fail without a GPU.
        raise ValueError(
            "FSDP 1 flattens the parameters, which the average needs one by one: set fsdp_version: 2 (Accelerate 1.6)."
        )
    accelerator = Accelerator(
        cpu=args.cpu,
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=None if args.logger == "none" else args.logger,
        project_config=ProjectConfiguration(str(folder), logging_dir=str(folder / args.logging_dir)),
        dynamo_backend="inductor" if args.compile else None,
        step_scheduler_with_optimizer=False,  # else it steps once for each process
        kwargs_handlers=[InitProcessGroupKwargs(timeout=datetime.timedelta(seconds=args.ddp_timeout))],
    )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("--mixed_precision fp16 needs a GPU: on the CPU choose bf16 or no.")
    check_sharding(accelerator)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        # What Accelerate would take from a prepared data loader, and the engine does by itself.
        accelerator.state.deepspeed_plugin.deepspeed_config.update(
            train_micro_batch_size_per_gpu=args.train_batch_size,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            gradient_clipping=args.max_grad_norm,
        )
    return accelerator


def patient_accelerator(args: argparse.Namespace) -> Accelerator:
    """Of processes that wait for days: for the main one's pilot or bootstrap, and for the slowest one's images.

    Args:
        args: the options --cpu and, where there is one, --mixed_precision.
    """
    patience = InitProcessGroupKwargs(timeout=datetime.timedelta(days=7))
    precision = getattr(args, "mixed_precision", None)
    return Accelerator(cpu=args.cpu, mixed_precision=precision, kwargs_handlers=[patience])


def check_sharding(accelerator: Accelerator) -> None:
    """Refuse what would be something else than what was asked for.

    Args:
        accelerator: of the run.

    Raises:
        ValueError: FSDP or DeepSpeed was asked for, but is not what runs, or not in a kind that works here.
    """
    state = accelerator.state
    asked = {"FSDP": DistributedType.FSDP, "DEEPSPEED": DistributedType.DEEPSPEED}
    for name, kind in asked.items():
        if os.environ.get(f"ACCELERATE_USE_{name}", "false") == "true" and accelerator.distributed_type != kind:
            raise ValueError(
                f"{name} was asked for, but Accelerate runs {accelerator.distributed_type.value} on this device "
                f"({accelerator.device.type}): the network would not be sharded. {name} needs GPUs; on the CPU launch "
                "without it."
            )
    if accelerator.distributed_type == DistributedType.DEEPSPEED and state.deepspeed_plugin.zero_stage == 3:
        raise ValueError("ZeRO 3 leaves no process the parameters that it averages: set zero_stage: 2, or take FSDP.")


def main_first(accelerator: Accelerator, load: Callable[[], T], command: str, *kinds: type[Exception]) -> T:
    """What `load` returns, on the main process first, which fills the caches; a fault of one ends all.

    Args:
        accelerator: of the run.
        load: called once on each process.
        command: its name behind `ddpm-vlb`, put before the message.
        kinds: exceptions that name what the user can mend, for whose message no traceback is needed.

    Raises:
        SystemExit: of several processes, with the first one's fault; of one, the exception is raised as it is.
    """
    loaded, error = list[T](), None
    for turn in (True, False):
        if accelerator.is_main_process == turn:
            try:
                loaded.append(load())
            except Exception as failure:
                error = failure
        faults = [text for text in gather_object([error and (str(error) or type(error).__name__)]) if text]
        if faults:
            if error is not None and (accelerator.num_processes == 1 or not isinstance(error, kinds)):
                raise error
            end(accelerator, f"ddpm-vlb {command}: {' '.join(faults[0].split())}")
    return loaded[0]


def check_shared(accelerator: Accelerator, folder: Path, seconds: float = 10.0) -> None:
    """Make sure that all machines see one and the same output folder: checkpoints are written together.

    Args:
        accelerator: of the run.
        folder: the output folder.
        seconds: how long a network's file system may take to show a new file.

    Raises:
        SystemExit: on all processes, naming those that do not see it.
    """
    if accelerator.num_processes == 1:
        return
    name = broadcast_object_list([f".shared-{uuid.uuid4().hex}"])[0]
    if accelerator.is_main_process:
        (folder / name).write_text("", encoding="utf-8")
    accelerator.wait_for_everyone()
    until = time.monotonic() + seconds
    while not (seen := (folder / name).exists()) and time.monotonic() < until:
        time.sleep(0.1)
    blind = [rank for rank, sees in enumerate(gather_object([seen])) if not sees]
    if accelerator.is_main_process:
        (folder / name).unlink()
    if blind:
        end(
            accelerator,
            f"--output_dir {folder} is another folder for the processes {blind} than for process 0. Give one on a "
            "file system that all machines share.",
        )
