"""Features of images from a vision model of `transformers`, and a small one trained on labels where none is given.

Images are uint8 tensors (N, C, H, W) here, as a file of 256 levels holds them.

Sources: Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words" (the small model); Stein et al. 2023, "Exposing Flaws
of Generative Model Evaluation Metrics" (DINOv2's features for the Frechet distance); Jayasumana et al. 2024,
"Rethinking FID" (CLIP's).
"""

import contextlib
import hashlib
import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    CLIPVisionModelWithProjection,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)
from transformers.utils import logging

from ddpm_vlb.runtime.files import write_json

Labelled = tuple[Tensor, Tensor]  # images and their labels (N,)
CLIP_SIGMA = 10.0  # of CMMD
TRAIN_STEPS, TRAIN_BATCH, ENOUGH = 400, 128, 10_000  # images of the small model: under a minute on one core
MAX_TOKENS = 64
FORMAT = 1  # of the small model; raise it when its architecture or training changes
RECORD = "training.json"


class FeatureModel:
    """A vision model as a function of uint8 images.

    Its features are a CLIP-like model's image embeddings, normalised; else its pooled output; else, also where the
    checkpoint has no weights for its pooler (a classifier's has none), the first token of its last hidden state, or
    the mean of a feature map.

    Args:
        name: a folder or a Hub name.
        device: where it runs.
        cache_dir: where downloads are kept.

    Raises:
        ValueError: it cannot be loaded, is no vision model, or its checkpoint lacks weights.
    """

    def __init__(self, name: str, device: torch.device, cache_dir: str | None = None):
        self.name = name
        try:
            with quiet():
                config = AutoConfig.from_pretrained(name, cache_dir=cache_dir)
                projected = "CLIPVisionModelWithProjection" in (config.architectures or [])
                loader = CLIPVisionModelWithProjection if projected else AutoModel
                model, info = loader.from_pretrained(name, cache_dir=cache_dir, output_loading_info=True)
                self.processor = AutoImageProcessor.from_pretrained(name, cache_dir=cache_dir)
        except Exception as error:  # transformers raises whatever it likes
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"--feature_model {name} cannot be loaded as a vision model: {reason}") from error
        missing = [key for key in info["missing_keys"] if "pooler" not in key]
        if missing or info["mismatched_keys"]:
            raise ValueError(f"--feature_model {name}: its checkpoint lacks weights, such as {missing[:3]}.")
        self.pooled = not info["missing_keys"]
        if not self.pooled:
            model.pooler = None  # it is random, and would be in the fingerprint
        self.model = model.to(device, torch.float32).eval()  # whatever the checkpoint is kept in
        self.embeds = projected or hasattr(model, "get_image_features")
        own = getattr(config, "vision_config", config)
        self.channels = getattr(own, "num_channels", 3)
        self.sigma = CLIP_SIGMA if projected or config.model_type == "clip" else None

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """The features (N, D) of images, in float64 on the CPU.

        Args:
            images: (N, C, H, W) uint8; grey ones are repeated to three channels where the model takes three.

        Raises:
            ValueError: the model takes grey images and these are in colour, or its features are not finite.
        """
        if images.shape[1] > self.channels:
            raise ValueError(f"--feature_model {self.name} takes grey images, but these are in colour.")
        arrays = [image.permute(1, 2, 0).numpy() for image in images]
        # A processor's own reading of grey pictures differs between the versions of transformers.
        pictures = (
            arrays if self.channels == 1 else [PIL.Image.fromarray(a.repeat(3 // a.shape[2], 2)) for a in arrays]
        )
        try:
            pixels = self.processor(images=pictures, return_tensors="pt")["pixel_values"]
            features = self._features(pixels.to(self.model.device, torch.float32))
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"--feature_model {self.name} does not take the images: {reason}") from error
        if features.ndim != 2 or len(features) != len(images) or not bool(features.isfinite().all()):
            raise ValueError(f"--feature_model {self.name} gives no vector of finite numbers for each image.")
        return features.cpu().double()

    def _features(self, pixels: Tensor) -> Tensor:
        if self.embeds:
            if hasattr(self.model, "get_image_features"):
                output = self.model.get_image_features(pixel_values=pixels)
                embeds = output if isinstance(output, Tensor) else output.pooler_output  # transformers 4, 5
            else:
                embeds = self.model(pixels).image_embeds
            return torch.nn.functional.normalize(embeds, dim=1)
        output = self.model(pixels)
        if self.pooled and getattr(output, "pooler_output", None) is not None:
            return output.pooler_output.flatten(1)
        hidden = output.last_hidden_state
        return hidden.mean((2, 3)) if hidden.ndim == 4 else hidden[:, 0]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars of `transformers`, its report on unused weights and its word on torchvision."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def small_model(folder: Path, train: Labelled, test: Labelled) -> dict[str, Any]:
    """Make sure that a folder holds a small ViT trained on labelled images, and return its record.

    Args:
        folder: of the model; one that was trained on the same images is left as it is.
        train: images (N, C, H, W) uint8 and labels (N,), 0 or more.
        test: others, for the accuracy. Of both the first 10,000 are taken.
    """
    train, test = ((images[:ENOUGH], labels[:ENOUGH]) for images, labels in (train, test))
    digest = hashlib.sha256()
    for tensor in train:
        digest.update(f"{tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    asked = {"format": FORMAT, "fingerprint": digest.hexdigest()[:32]}
    path = folder / RECORD
    with contextlib.suppress(OSError, ValueError):
        record = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(record, dict) and asked.items() <= record.items() and (folder / "model.safetensors").is_file():
            return record
    model = _fitted(*train)
    predicted = torch.cat([model(_pixels(batch)).logits.argmax(1) for batch in test[0].split(256)])
    accuracy = float((predicted == test[1]).double().mean())
    path.unlink(missing_ok=True)
    height, width = train[0].shape[2:]
    half = [0.5] * 3
    with quiet():
        model.save_pretrained(folder)
        processor = ViTImageProcessor(size={"height": height, "width": width}, image_mean=half, image_std=half)
        processor.save_pretrained(folder)
    record = {**asked, "num_images": len(train[0]), "num_labels": model.config.num_labels, "test_accuracy": accuracy}
    write_json(record, path)
    return record


def _fitted(images: Tensor, labels: Tensor) -> ViTForImageClassification:
    """A small ViT of these images, always from the same seed: the features are a yardstick."""
    height, width = images.shape[2:]
    divisors = [p for p in range(2, math.gcd(height, width) + 1) if math.gcd(height, width) % p == 0]
    few = [p for p in divisors if height * width <= MAX_TOKENS * p * p]
    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        initializer_range=0.1,  # its default, for wide models, learns slowly here
        image_size=(height, width),
        patch_size=min(few, default=max(divisors, default=1)),
        num_labels=int(labels.max()) + 1,
    )
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(0)
        model = ViTForImageClassification(config).train()
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=TRAIN_STEPS, pct_start=0.1)
        for _ in tqdm(range(TRAIN_STEPS), desc="Training a feature model"):
            chosen = torch.randint(len(images), (min(TRAIN_BATCH, len(images)),))
            logits = model(_pixels(images[chosen])).logits
            torch.nn.functional.cross_entropy(logits, labels[chosen], label_smoothing=0.1).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return model.eval().requires_grad_(False)


def _pixels(images: Tensor) -> Tensor:
    """What the processor makes of images of the model's own size."""
    return (images.float() / 127.5 - 1).expand(-1, 3, -1, -1)
