"""A checkpoint and images in one call: what `ddpm-vlb evaluate` scores, in Python.

The number is the estimator's. This module only reads what it is given: a folder or a pipeline, and images as tensors,
arrays, pictures or a data set of `datasets`, which is known by what it has and never imported.
"""

import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor

from .checks import check_data
from .estimation import estimate_vlb
from .path_checkpoints import chain_with
from .path_configurations import DISTILLED_SCHEDULERS
from .pilot import Pilot, fit_pilot, pilot_positions
from .pipeline_ddpm_vlb import DDPMVLBPipeline
from .reverse_process import ReverseProcess
from .scheduling_ddpm_vlb import DDPMVLBScheduler
from .scores import VLBEstimate
from .validation import evaluating

IMAGE_COLUMN, LABEL_COLUMN = "image", "label"
_BATCH = 1024  # images that are looked at, and handed to the estimator, at a time
_LEVELS = {"1": 2, "L": 256, "I;16": 65536, "RGB": 256}  # of Pillow's modes


def score(
    model_or_folder: DiffusionPipeline | str | os.PathLike[str],
    images: Any,
    labels: Any = None,
    calls_per_image: int = 20,
    seed: int = 0,
    num_inference_steps: int | None = None,
    pilot: Any = None,
    guidance_scale: float = 1.0,
) -> VLBEstimate:
    """The bound of images under a checkpoint, of each one and with errors: the number of `ddpm-vlb evaluate`.

    Args:
        model_or_folder: a folder or a Hub name, scored on the accelerator where there is one, or a pipeline, on the
            device where it is: a `DDPMPipeline`, ours, or one of flow matching or EDM. Its scheduler says how many
            levels the data has (256 where it does not say), and whether x_0_hat is clipped.
        images: x_0 (B, C, *) on its levels in [-1, 1], or integers 0 .. levels - 1, as a tensor or an array, which
            for one channel may be (B, *); a list of PIL images; a data set of `datasets` with a column "image" of
            such; or several splits of one, of which "test" is scored.
        labels: of a class-conditional network, B integers from 0; None takes a data set's column "label".
        calls_per_image: network calls for each image, at least 2; with as many as the chain has steps, each is taken
            once. For an error bar of each image to rely on, give it 160.
        seed: of t and noise.
        num_inference_steps: score the chain of so many steps, the stored path where there is one; None: all.
        pilot: from `fit_pilot`, or other images to fit one to, best of training images. None takes those of another
            split where there is one, else those that are scored.
        guidance_scale: only 1: what is scored is the network given the labels. What guidance samples from has no
            bound.

    Returns:
        The estimate, in the order of the images: `per_image`, `per_image_se`. Its `also` has the other clipping of
        x_0_hat. Continuous data (`levels` None) has `nats_per_dim` of density.

    Raises:
        ValueError: a checkpoint that cannot be scored, images that the network does not take, no images, labels
            missing, out of range or without effect, guidance, or as `estimate_vlb`.
        FloatingPointError: NaN or infinity from the network, with the timestep and the image.

    Source: docs/evaluation.md.
    """
    if guidance_scale != 1:
        raise ValueError(
            f"`guidance_scale` must be 1, but is {guidance_scale!r}: the network given its labels is scored, and what "
            "guidance samples from has no bound. Leave it out."
        )
    pipeline = _pipeline_of(model_or_folder)
    reader = _Reader.of(pipeline)
    images, pilot = _splits(images, pilot)
    x_0, told = reader.read("images", images, labels)
    reverse = pipeline.chain.reverse_process(pipeline._execution_device, num_inference_steps=num_inference_steps)
    also, network = _other_clipping(reverse), pipeline.network
    estimator = "full" if calls_per_image >= len(reverse.forward) else "importance"
    with evaluating(network):
        if estimator == "full":  # which needs none
            pilot = None
        elif pilot is not None and not isinstance(pilot, Pilot):
            others = reader.read("pilot", _some(pilot, x_0[0].numel()))
            pilot = fit_pilot(network, reverse, others[0], seed=seed, conditioning=others[1], also=also)
        batches = list(_batches(x_0, told))
        return estimate_vlb(
            network, reverse, batches, pilot, calls_per_image, seed=seed, estimator=estimator, also=also
        )


def check_scorable(pipeline: DDPMVLBPipeline, name: str) -> None:
    """Refuse a network of another kind, a checkpoint that is not whole, and a chain without a bound.

    Args:
        pipeline: ours.
        name: that messages begin with.

    Raises:
        ValueError: such a checkpoint.
    """
    unet = pipeline.unet
    _, *others = inspect.signature(unet.forward).parameters.values()
    needed = {own.name for own in others if own.default is own.empty and own.kind is own.POSITIONAL_OR_KEYWORD}
    called = needed <= {"timestep"} and [own.name for own in others[:1]] == ["timestep"]
    if not called or type(unet.config.get("in_channels")) is not int:
        raise ValueError(f"{name}: its network is a {type(unet).__name__}, none of x_t, t and labels alone.")
    if unet.config.get("class_embed_type") is not None and pipeline.num_classes is None:
        raise ValueError(f"{name}: its network takes embeddings of classes, but labels are numbers here.")
    missing = [key for key, tensor in unet.state_dict().items() if tensor.is_meta]
    if missing:
        raise ValueError(f"{name}: its checkpoint lacks weights, such as {missing[:3]}.")
    if not isinstance(pipeline.chain, DDPMVLBScheduler):
        raise ValueError(
            f"{name} has a {type(pipeline.scheduler).__name__}, whose chain has no variational bound. Replace "
            "it, `DDPMVLBScheduler.from_config(pipeline.scheduler.config)`, and save the pipeline again."
        )


def _pipeline_of(model: Any) -> DDPMVLBPipeline:
    """A pipeline of ours that can be scored; one that was given stays as it is."""
    if isinstance(model, (str, os.PathLike)):
        pipeline, name = _loaded(model), f"`model_or_folder` {model}"
    else:
        pipeline, name = _ours(model), f"`model_or_folder`, a {type(model).__name__},"
    if type(pipeline.scheduler).__name__ in DISTILLED_SCHEDULERS and pipeline.path is None:
        pipeline = DDPMVLBPipeline(pipeline.unet, DDPMVLBScheduler.from_config(pipeline.scheduler.config))
    check_scorable(pipeline, name)
    return pipeline


def _loaded(folder: str | os.PathLike[str]) -> DDPMVLBPipeline:
    try:
        pipeline = DDPMVLBPipeline.from_pretrained(folder)
    except (OSError, ValueError) as error:
        said = " ".join(str(error).split())
        raise ValueError(
            f"`model_or_folder` {folder} is neither a pipeline's folder nor one on the Hub: {said}"
        ) from error
    return pipeline.to(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else pipeline


def _ours(model: Any) -> DDPMVLBPipeline:
    if isinstance(model, DDPMVLBPipeline):
        return model
    network = getattr(model, "unet", None) or getattr(model, "transformer", None)
    if network is None or not hasattr(model, "scheduler"):
        raise ValueError(
            "`model_or_folder` must be a folder, a Hub name or a pipeline of a network and a scheduler, but is a "
            f"{type(model).__name__}. Make it one: `DDPMVLBPipeline(unet, scheduler)`."
        )
    pipeline = DDPMVLBPipeline(network, model.scheduler)
    chain = chain_with(model) if pipeline.path is not None else None
    if chain is not None:
        pipeline.chain = chain
    return pipeline


def _other_clipping(reverse: ReverseProcess) -> list[ReverseProcess]:
    """As evaluate has it: none where continuous data is not clipped, for which clipping to [-1, 1] is nonsense."""
    clips = reverse.clip_sample or reverse.thresholding
    known = clips or reverse.levels is not None
    return [replace(reverse, clip_sample=not clips, thresholding=False)] if known else []


def _splits(images: Any, pilot: Any) -> tuple[Any, Any]:
    """Of several splits the one to score, and another one for the pilot, chosen as evaluate does."""
    if not isinstance(images, Mapping):
        return images, pilot
    if "test" not in images:
        raise ValueError(
            f"`images` must have a split 'test' to be scored, but has {sorted(images)}: pass one split, and "
            "another as `pilot`."
        )
    names = [name for name in ("train", "validation", *images) if name in images and name != "test"]
    other = next((images[name] for name in names if len(images[name]) >= 2), None)
    return images["test"], other if pilot is None else pilot


def _some(images: Any, dims: int) -> Any:
    """Of the pilot's images as many as it takes, spread over them."""
    if isinstance(images, (Mapping, str)) or not hasattr(images, "__len__"):
        raise ValueError(
            f"`pilot` must be a `Pilot`, or images in a form that `images` takes, but is a {type(images).__name__}."
        )
    positions = pilot_positions(len(images), dims)
    if hasattr(images, "select") and not isinstance(images, Tensor):
        return images.select(positions)
    return images[positions] if isinstance(images, (Tensor, np.ndarray)) else [images[i] for i in positions]


def _batches(x_0: Tensor, told: dict[str, Tensor]) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    for start in range(0, len(x_0), _BATCH):
        own = slice(start, start + _BATCH)
        yield x_0[own], {name: rows[own] for name, rows in told.items()}


@dataclass(frozen=True)
class _Reader:
    """Images as a checkpoint takes them: its channels, its shape (C, *) if it has one, levels and classes."""

    channels: int
    shape: tuple[int, ...] | None
    levels: int | None
    classes: int | None

    @classmethod
    def of(cls, pipeline: DDPMVLBPipeline) -> "_Reader":
        levels = pipeline.chain.config.get("levels", 256)
        return cls(pipeline.unet.config.in_channels, pipeline.sample_shape, levels, pipeline.num_classes)

    def read(self, name: str, images: Any, labels: Any = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Images x_0 in float32, and the network's further arguments for them; looked at before any network call."""
        if hasattr(images, "column_names") and hasattr(images, "select"):
            images, labels = self._columns(name, images, labels)
        x_0 = self._x_0(name, images)
        if self.shape is not None and self.channels == 1 and x_0.shape[1:] == self.shape[1:]:
            x_0 = x_0[:, None]
        if len(x_0) == 0:
            raise ValueError(f"`{name}` must hold at least one image, but is empty.")
        fits = x_0.ndim > 2 and x_0.shape[1] == self.channels if self.shape is None else x_0.shape[1:] == self.shape
        if not fits:
            wanted = (self.channels, "*") if self.shape is None else self.shape
            raise ValueError(
                f"`{name}` must have the network's shape (B, {', '.join(map(str, wanted))}), channels first, but have "
                f"{tuple(x_0.shape)}. Bring the data to that shape, as the network was trained."
            )
        for part in x_0.split(_BATCH):
            check_data(part, self.levels)
        return x_0, self._told(name, labels, len(x_0))

    def _columns(self, name: str, data: Any, labels: Any) -> tuple[Any, Any]:
        """The columns of a data set, pictures as pictures and everything else as arrays."""
        wanted = [IMAGE_COLUMN] if self.classes is None or labels is not None else [IMAGE_COLUMN, LABEL_COLUMN]
        for column in wanted:
            if column not in data.column_names:
                raise ValueError(
                    f"`{name}` must have a column {column!r}, but has {data.column_names}: "
                    f"`rename_column(..., {column!r})`."
                )
        pictures = type(data.features[IMAGE_COLUMN]).__name__ == "Image"
        rows = data.select_columns(wanted).with_format(None if pictures else "numpy")[:]
        return rows[IMAGE_COLUMN], rows.get(LABEL_COLUMN, labels)

    def _x_0(self, name: str, images: Any) -> Tensor:
        if isinstance(images, (str, os.PathLike)):
            raise ValueError(
                f"`{name}` must be images, but is the path {os.fspath(images)!r}. Read a folder of pictures with "
                f"`datasets.load_dataset('imagefolder', data_dir={os.fspath(images)!r}, split='train')`."
            )
        if isinstance(images, Sequence):
            if len(images) and all(isinstance(own, PIL.Image.Image) for own in images):
                return self._of_pictures(name, images)
        elif not isinstance(images, (Tensor, np.ndarray)):
            raise ValueError(
                f"`{name}` must be a tensor, an array, a list of PIL images or a data set with all its rows, but is a "
                f"{type(images).__name__}."
            )
        try:
            x = torch.as_tensor(images if isinstance(images, Tensor) else np.asarray(images)).detach()
        except (TypeError, ValueError) as error:
            raise ValueError(f"`{name}` must be images of one shape and kind, in numbers, but: {error}") from error
        return x.float() if x.is_floating_point() or x.numel() == 0 else self._of_levels(name, x.float())

    def _of_levels(self, name: str, k: Tensor) -> Tensor:
        """x_0 of levels, which float32 holds exactly as far as there are any."""
        if self.levels is None:
            raise ValueError(
                f"`{name}` must be floats, but are integers: the checkpoint is of continuous data (`levels` is None)."
            )
        if k.min() < 0 or k.max() >= self.levels:
            raise ValueError(
                f"`{name}` must lie in the checkpoint's levels 0 .. {self.levels - 1}, but go from {k.min():.0f} to "
                f"{k.max():.0f}. Requantise them; if the levels are more, say so: "
                "`DDPMVLBScheduler.from_config(pipeline.scheduler.config, levels=...)`."
            )
        return k * (2 / (self.levels - 1)) - 1

    def _of_pictures(self, name: str, pictures: Sequence[PIL.Image.Image]) -> Tensor:
        found = [self._picture(f"`{name}` number {i}", picture) for i, picture in enumerate(pictures)]
        sizes = {tuple(own.shape[1:]) for own in found}
        if len(sizes) > 1:
            raise ValueError(f"`{name}` must be of one size, but there are {sorted(sizes)}: crop or resize them.")
        k = torch.stack(found)
        # A continuous checkpoint takes the levels of a picture as they are.
        return replace(self, levels=256)._of_levels(name, k) if self.levels is None else self._of_levels(name, k)

    def _picture(self, name: str, picture: PIL.Image.Image) -> Tensor:
        """Levels (C, H, W) as Pillow holds them; fewer levels than the data's are spread over them."""
        if picture.mode not in _LEVELS:
            raise ValueError(f"{name} must have a mode of {list(_LEVELS)}, but has {picture.mode}: `convert` it.")
        k = torch.from_numpy(np.array(picture)).float()
        k = k[None] if k.ndim == 2 else k.permute(2, 0, 1)
        if self.channels == 1 and bool((k == k[:1]).all()):
            k = k[:1]
        if len(k) != self.channels:
            raise ValueError(
                f"{name} must have the network's {self.channels} channel(s), but has {len(k)}: `convert` it to RGB or "
                "L."
            )
        stored, levels = _LEVELS[picture.mode], self.levels or 256
        if stored < levels and (levels - 1) % (stored - 1):
            raise ValueError(f"{name} must have {levels} levels, but has {stored}, which lie between them.")
        return k * ((levels - 1) // (stored - 1)) if stored < levels else k

    def _told(self, name: str, labels: Any, count: int) -> dict[str, Tensor]:
        """The labels as the network takes them."""
        if self.classes is None:
            if labels is not None:
                raise ValueError("`labels` has no effect: the network is unconditional. Leave it out.")
            return {}
        if labels is None:
            raise ValueError(
                f"`{name}` must come with labels 0 .. {self.classes - 1} of the class-conditional network, but has "
                f"none: {'pass `labels`' if name == 'images' else 'give a `Pilot`'}, or a data set with both columns."
            )
        own = np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels)
        whole = np.issubdtype(own.dtype, np.integer) and own.shape == (count,)
        if not whole or own.min() < 0 or own.max() >= self.classes:
            raise ValueError(
                f"`labels` must be {count} integers of the network's classes 0 .. {self.classes - 1}, one for each "
                f"image, but got {str(own.tolist()):.60}."
            )
        return {"class_labels": torch.from_numpy(own.astype(np.int64))}
