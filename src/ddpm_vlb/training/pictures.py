"""The pictures of a run: samples, of all classes in turn where there are some, beside real images; the terms L_t."""

import math
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor

from ddpm_vlb import VLBEstimate
from ddpm_vlb.runtime.image_sets import Images
from ddpm_vlb.runtime.reporting import plot_samples, plot_vlb_terms
from ddpm_vlb.scoring.sweep import Stopped
from ddpm_vlb.training.run import Run

SNAPSHOT_STEPS = 100


def drawn_steps(run: Run) -> int:
    """Steps of the pictures on the way."""
    return min(SNAPSHOT_STEPS, run.args.ddpm_num_inference_steps)


def sample(run: Run, network: UNet2DModel, num_images: int, steps: int) -> Tensor:
    """Images (N, C, H, W) in [0, 1], the same for the same seed, of all classes in turn.

    Args:
        run: the run.
        network: which is called.
        num_images: N.
        steps: of the chain.

    Raises:
        Stopped: the run was asked to stop.
    """

    def look(pipeline: Any, i: int, t: int, tensors: dict[str, Any]) -> dict[str, Any]:
        if run.stop.asked():
            raise Stopped
        return tensors

    generator = torch.Generator().manual_seed(run.args.seed)
    classes = run.data.classes
    images: Any = run.pipeline(network)(
        num_images,
        class_labels=None if classes is None else torch.arange(num_images) % classes,
        generator=generator,
        num_inference_steps=steps,
        output_type="pt",
        return_dict=False,
        callback_on_step_end=look,
    )
    return images[0].cpu()


def real_images(images: Images, count: int, classes: int | None) -> Tensor:
    """The first images (N, C, H, W) of a split, in [0, 1]; of all classes in turn as `sample` has them.

    Args:
        images: of the split.
        count: N, at most; of classes exactly, where one of few images has them again, and one of none is white.
        classes: their number; None for a network without.
    """
    if classes is None:
        return next(images.batches(count)) / 2 + 0.5
    own: dict[int, list[int]] = {}
    for position, label in enumerate(images.labels().tolist()):
        own.setdefault(label, []).append(position)
    found = torch.ones(count, *images[0].shape)
    for i in range(count):
        positions = own.get(i % classes)
        if positions is not None:
            found[i] = images[positions[i // classes % len(positions)]] / 2 + 0.5
    return found


def pictures(run: Run, estimate: VLBEstimate | None, generated: Tensor, images: Images, folder: Path) -> None:
    """Draw samples.png, with as many real images, and vlb_terms.png of what was scored.

    Args:
        run: the run.
        estimate: of the bound; None where nothing was scored.
        generated: images of `sample`.
        images: the split that the real ones are of.
        folder: to write to.
    """
    classes, count = run.data.classes, len(generated)
    real = real_images(images, count, classes)
    # A column for each class, unless that makes less than half a square's rows.
    columns = classes if classes is not None and classes <= 2 * math.isqrt(count) else None
    plot_samples(generated[: len(real)], real, folder / "samples.png", columns)
    if estimate is not None:
        plot_vlb_terms(estimate, folder / "vlb_terms.png")
