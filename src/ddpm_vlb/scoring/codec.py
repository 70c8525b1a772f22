"""The codec of a checkpoint, for `ddpm-vlb compress` and `decompress`."""

import argparse
import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ddpm_vlb import (
    BitsBackCodec,
    CompressedFile,
    DDPMVLBPipeline,
    ReverseProcess,
    VLBEstimate,
    check_scorable,
    estimate_vlb,
)
from ddpm_vlb.runtime.launching import patient_accelerator
from ddpm_vlb.scoring.checkpoint import name_distilled, read_pipeline, settle_chain

STEPS = 20  # where no number is asked for
_BATCH = 256
_NAMES = {"`model`": "--model", "`reverse`": "--model's"}


def codec_device(args: argparse.Namespace) -> torch.device:
    """The device to compute on: Accelerate's, or the CPU where that has no float64."""
    device = patient_accelerator(args).device
    return torch.device("cpu") if device.type == "mps" else device


def codec_pipeline(args: argparse.Namespace, device: torch.device) -> DDPMVLBPipeline:
    """The checkpoint, on the device."""
    pipeline = read_pipeline(args)
    name_distilled(pipeline)
    check_scorable(pipeline, f"--model {args.model}")
    pipeline.unet.to(device).eval()
    return pipeline


def codec_process(
    pipeline: DDPMVLBPipeline, args: argparse.Namespace, levels: int | None, steps: int | None
) -> ReverseProcess:
    """The chain of so many steps, `STEPS` or the whole where it is shorter, on levels of the data.

    Args:
        pipeline: the checkpoint.
        args: with --ratios.
        levels: of the data.
        steps: as asked for.

    Raises:
        ValueError: continuous data, or more steps than there are.
    """
    if levels is None:
        raise ValueError(
            f"--model {args.model} is of continuous data, which no number of bits holds: give its `--levels`, if any."
        )
    settle_chain(pipeline, args, levels)
    steps = min(STEPS, len(pipeline.chain)) if steps is None else steps
    device = pipeline.unet.device
    reverse = pipeline.chain.reverse_process(device, torch.float64, num_inference_steps=steps)
    return dataclasses.replace(reverse, levels=levels)


def make_codec(pipeline: DDPMVLBPipeline, reverse: ReverseProcess, dtype: str) -> BitsBackCodec:
    """The codec of a checkpoint.

    Args:
        pipeline: the checkpoint.
        reverse: of `codec_process`.
        dtype: of the network, by its name.
    """
    network = pipeline.network
    return BitsBackCodec(network.eval(), reverse, getattr(torch, dtype))


def bound_of(
    pipeline: DDPMVLBPipeline, reverse: ReverseProcess, x_0: Tensor, conditioning: dict[str, Tensor]
) -> VLBEstimate:
    """The bound of images on the chain that codes them, all of its steps.

    Args:
        pipeline: the checkpoint.
        reverse: of `codec_process`.
        x_0: the images (B, C, *).
        conditioning: the network's further arguments.
    """

    def batches() -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        for start in range(0, len(x_0), _BATCH):
            rows = slice(start, start + _BATCH)
            yield x_0[rows], {name: own[rows] for name, own in conditioning.items()}

    with tqdm(total=len(x_0), unit="image", desc="The bound") as bar:
        network = pipeline.network.eval()
        single = reverse.to(dtype=torch.float32)
        return estimate_vlb(network, single, batches(), estimator="full", on_images=bar.update)


@contextlib.contextmanager
def coding(what: str, images: int) -> Iterator[Any]:
    """A bar for the codec's `progress`, with the running rate and the time that is left.

    Args:
        what: is done.
        images: number of them, those that are decoded again counted too.
    """
    with tqdm(total=images, unit="image", desc=what) as bar:
        yield lambda number: bar.update(number - bar.n)


def read_compressed(path: Path) -> CompressedFile:
    """A compressed file.

    Args:
        path: of it.

    Raises:
        ValueError: there is none, or as of `CompressedFile.read`.
    """
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file, which `ddpm-vlb compress` would have written.")
    return CompressedFile.read(path.read_bytes())


@contextlib.contextmanager
def named_file(path: Path) -> Iterator[None]:
    """Name a compressed file in the codec's messages, which speak of its arguments."""
    try:
        yield
    except ValueError as error:
        said = str(error)
        for argument, name in {**_NAMES, "`data`": str(path)}.items():
            said = said.replace(argument, name)
        raise ValueError(said) from error
