"""The Accelerator of a training run, and what must hold before it starts."""

import argparse
import datetime
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    gather_object,
)

from ddpm_vlb.runtime.stopping import end

T = TypeVar("T")


def check_output_dir(folder: Path) -> None:
    """Make sure that the output folder can be written, before hours are spent; it is not made yet.

    Args:
        folder: of --output_dir.

    Raises:
        OSError: it cannot.
    """
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        probe = there / f".write_test-{uuid.uuid4().hex}"
        probe.write_text("", encoding="utf-8")
        probe.unlink()
    except OSError as error:
        raise OSError(f"--output_dir {folder} cannot be written: {error}") from error


def prepare_output_dir(folder: Path) -> None:
    """Make the output folder, which can be written.

    Args:
        folder: of --output_dir.

    Raises:
        OSError: it cannot.
    """
    check_output_dir(folder)
    folder.mkdir(parents=True, exist_ok=True)


def refuse_to_replace(folder: Path, overwrite: bool, others: str) -> None:
    """Refuse a folder whose finished pipeline would be replaced without a word.

    Args:
        folder: of --output_dir.
        overwrite: --overwrite_output_dir was given.
        others: what else can be done.

    Raises:
        ValueError: it holds one.
    """
    if not overwrite and (folder / "model_index.json").exists():
        raise ValueError(
            f"--output_dir {folder} holds a finished pipeline (model_index.json): give {others}, or "
            "--overwrite_output_dir to replace it and all that was measured of it."
        )


def make_accelerator(args: argparse.Namespace, folder: Path) -> Accelerator:
    """Accelerate as the options and `accelerate launch` say.

    Args:
        args: the run's options.
        folder: the output folder.

    Raises:
        ValueError, ImportError: what was asked for cannot be had here, or needs DeepSpeed or a tracker.
    """
    if _told("ACCELERATE_USE_FSDP") and os.environ.get("FSDP_VERSION", "1") != "2":
        # Before Accelerate's own settings of FSDP 1, which fail without a GPU.
        raise ValueError(
            "FSDP 1 flattens the parameters, which the average needs one by one: set fsdp_version: 2 (Accelerate 1.6)."
        )
    if args.logger not in ("none", *map(str, get_available_trackers())):  # Accelerate would run without one
        raise ImportError(
            f"--logger {args.logger} needs a package that is not installed: `pip install {args.logger}`, or choose "
            "another --logger, none say."
        )
    accelerator = Accelerator(
        cpu=args.cpu,
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=None if args.logger == "none" else args.logger,
        project_config=ProjectConfiguration(str(folder), logging_dir=str(folder / args.logging_dir)),
        dynamo_backend="inductor" if args.compile else None,
        step_scheduler_with_optimizer=False,  # else it steps once for each process
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=datetime.timedelta(seconds=args.ddp_timeout)),
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),  # else each gradient is copied there and back
        ],
    )
    check_precision(accelerator)
    check_sharding(accelerator)
    check_asked(accelerator, args)
    tune(accelerator.device, args.allow_tf32)
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
    accelerator = Accelerator(cpu=args.cpu, mixed_precision=precision, kwargs_handlers=[patience])
    if "mixed_precision" in vars(args):
        check_precision(accelerator)
    check_asked(accelerator, args)
    return accelerator


def tune(device: torch.device, allow_tf32: bool) -> None:
    """Let an NVIDIA GPU choose its convolutions by trial, as all batches have one shape, and use TF32 if it may.

    Args:
        device: of the run.
        allow_tf32: of --allow_tf32.

    Raises:
        ValueError: TF32 on another device.
    """
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high" if allow_tf32 else "highest")
    elif allow_tf32:
        raise ValueError(f"--allow_tf32 needs an NVIDIA GPU, but the device is {device}: drop it.")


def check_precision(accelerator: Accelerator) -> None:
    """Refuse a precision that the device does not compute in, which Accelerate leaves out without a word.

    Args:
        accelerator: of the run.

    Raises:
        ValueError: it is fp16, on a CPU.
    """
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError(
            "--mixed_precision fp16 (or ACCELERATE_MIXED_PRECISION) needs a GPU: on the CPU choose bf16 or no."
        )


def check_asked(accelerator: Accelerator, args: argparse.Namespace) -> None:
    """Refuse an Accelerator that is not what the options say: its environment and config files may say otherwise.

    Args:
        accelerator: of the run.
        args: its options; those that a command does not have are not looked at.

    Raises:
        ValueError: a contradiction.
    """
    asked = vars(args)
    if "mixed_precision" in asked:
        _check_precision(accelerator.mixed_precision, args.mixed_precision)
    if args.cpu and accelerator.device.type != "cpu":
        raise ValueError(f"--cpu was asked for, but Accelerate runs on {accelerator.device}: start a new process.")
    steps = accelerator.gradient_accumulation_steps
    _agree("gradient_accumulation_steps", asked, steps, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
    if "compile" in asked:
        _check_compilation(args.compile)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        _check_deepspeed(accelerator.state.deepspeed_plugin.deepspeed_config, asked)


def _check_precision(runs: str, asked: str | None) -> None:
    """Of the option, or of Accelerate's environment where it is not given."""
    told = asked or os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    source = f"--mixed_precision {told}" if asked else f"ACCELERATE_MIXED_PRECISION={told}"
    if runs != told or told == "fp8":
        raise ValueError(f"{source}, but Accelerate computes in {runs}: give both the same, no, fp16 or bf16.")


def _check_compilation(asked: bool) -> None:
    """Accelerate compiles on a word of its environment alone, and takes no other backend beside the option."""
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() not in (("no", "inductor") if asked else ("no",)):
        option, fix = ("--compile", "drop one") if asked else ("no --compile", "unset it, or pass --compile")
        raise ValueError(
            f"ACCELERATE_DYNAMO_BACKEND={backend} in the environment, but {option} among the options: {fix}."
        )


def _check_deepspeed(config: dict[str, Any], asked: dict[str, Any]) -> None:
    """What its config file, or `accelerate launch`, says of the same."""
    names = {
        "train_batch_size": "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps": "gradient_accumulation_steps",
        "max_grad_norm": "gradient_clipping",
    }
    for option, name in names.items():
        _agree(option, asked, config.get(name, "auto"), f"DeepSpeed's {name}")


def _agree(option: str, asked: dict[str, Any], found: Any, source: str) -> None:
    if option in asked and found not in ("auto", asked[option]):
        raise ValueError(f"--{option} {asked[option]}, but {source} says {found}: give both the same value.")


def _told(name: str) -> bool:
    """Whether a switch of Accelerate's environment is on, as Accelerate reads it."""
    return os.environ.get(name, "false").lower() == "true"


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
        if _told(f"ACCELERATE_USE_{name}") and accelerator.distributed_type != kind:
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
