"""Score a Stable-Diffusion-like pipeline on captioned images, and tell a fine-tune of it from it.

    python examples/text_to_image_validation.py --model runwayml/stable-diffusion-v1-5 --images my/captioned
    python examples/text_to_image_validation.py --model my/base --images my/captioned --compare my/tuned
    python examples/text_to_image_validation.py --model my/base --images my/captioned --lora my/lora

IMAGES is a folder with a metadata.jsonl (file_name, text) or the Hub name of a data set of images and captions. It
prints the bound of the latents given their captions, in nats/dim with its two standard errors, and the paired
difference to the other network, on the same latents and with the same draws of t and noise.

*nats/dim of latents* are -log p(z | caption) / D of the density of z, the latents as the U-Net sees them: shifted and
scaled by the VAE's factors. Another scale gives another number, so it compares networks behind one VAE and is no code
length of images. z is drawn from the VAE's posterior with a fixed seed and is not its mean: draws are what such
networks are trained on, and the expectation over them is the part of p(z) in the bound of the images. Every caption is
told, none is dropped, and there is no guidance scale: what guidance samples from has no density.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionPipeline
from diffusers.utils import is_peft_available, is_transformers_available
from torch import Tensor

from ddpm_vlb import DDPMVLBScheduler, Pilot, ReverseProcess, Validation, VLBDifference


def load_pipeline(name: str) -> StableDiffusionPipeline:
    """The pipeline of a folder or Hub name, on the accelerator where there is one."""
    pipe = DiffusionPipeline.from_pretrained(name, safety_checker=None, requires_safety_checker=False)
    check_pipeline(pipe, name)
    if "scaling_factor" in pipe.vae.config.get("_use_default_values", ()):  # as the first ones were published
        taken = f"diffusers' default of {pipe.vae.config.scaling_factor} is taken"
        print(f"{name}: vae/config.json has no `scaling_factor`, and {taken}.", file=sys.stderr)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else pipe


def check_pipeline(pipe: Any, name: str) -> None:
    """Refuse what is not made of a U-Net told captions, a chain of betas and a VAE whose scale is not null."""
    if not isinstance(pipe, StableDiffusionPipeline):
        raise ValueError(
            f"{name} must be a StableDiffusionPipeline, but is a {type(pipe).__name__}: it is called otherwise."
        )
    if "beta_schedule" not in pipe.scheduler.config:
        raise ValueError(f"{name} must have a scheduler of betas, but has a {type(pipe.scheduler).__name__}.")
    factor = pipe.vae.config.get("scaling_factor")
    if not isinstance(pipe.vae, AutoencoderKL) or factor is None:
        raise ValueError(
            f"{name} must have an AutoencoderKL and its `scaling_factor`, not {type(pipe.vae).__name__}, {factor}: "
            "write the one that the U-Net was trained with into vae/config.json."
        )
    if pipe.unet.config.in_channels != pipe.vae.config.latent_channels:
        raise ValueError(
            f"{name} must have a U-Net of the VAE's {pipe.vae.config.latent_channels} channels, but it takes "
            f"{pipe.unet.config.in_channels}: an inpainting network, say, is told more than captions."
        )


def load_captioned(images: str, split: str, image_column: str, caption_column: str, count: int) -> tuple[list, list]:
    """The first images of a folder or data set, and their captions."""
    where = {"path": "imagefolder", "data_dir": images} if Path(images).is_dir() else {"path": images}
    data = datasets.load_dataset(**where, split=split)
    missing = {image_column, caption_column} - set(data.column_names)
    if missing:
        raise ValueError(
            f"{images} must have the columns {image_column!r} and {caption_column!r}, but has {data.column_names}: "
            "name them, --image_column and --caption_column; a folder has captions in its metadata.jsonl."
        )
    rows = data.select(range(min(count, len(data))))
    captions = list(rows[caption_column])
    for i, caption in enumerate(captions):
        if not isinstance(caption, str) or not caption.strip():
            raise ValueError(f"{images} must have a caption for each image, but that of number {i} is {caption!r}.")
    if not captions:
        raise ValueError(f"{images} must have images in its split {split!r}, but has none.")
    return [image.convert("RGB") for image in rows[image_column]], captions


@torch.no_grad()
def encode_images(pipe: StableDiffusionPipeline, images: Sequence[Any], resolution: int | None, seed: int) -> Tensor:
    """Latents (N, C, H, W), one draw for each image, as stock scales them; images are scaled to cover, and cropped."""
    vae, size = pipe.vae, pipe.unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    shape = [resolution or own * pipe.vae_scale_factor for own in (height, width)]
    generator, shift = torch.Generator().manual_seed(seed), vae.config.get("shift_factor") or 0.0
    latents = list[Tensor]()
    for image in images:
        x = pipe.image_processor.preprocess(image, *shape, resize_mode="crop").to(vae.device, vae.dtype)
        drawn = vae.encode(x).latent_dist.sample(generator)
        latents.append((drawn - shift) * vae.config.scaling_factor)
    return torch.cat(latents).float().cpu()


@torch.no_grad()
def encode_captions(pipe: StableDiffusionPipeline, captions: Sequence[str]) -> Tensor:
    """What the pipeline's own text encoder makes of captions, (N, tokens, width), without guidance."""
    parts = [captions[i : i + 32] for i in range(0, len(captions), 32)]
    return torch.cat([pipe.encode_prompt(list(own), pipe.device, 1, False)[0].cpu() for own in parts])


def chain_of(pipe: StableDiffusionPipeline) -> ReverseProcess:
    """The chain that the network was trained on, whatever samples from it; latents have no levels and no bounds."""
    config, unet = pipe.scheduler.config, pipe.unet.config
    learned = "learned" if config.get("variance_type") == "learned" else "learned_range"
    variance = learned if unet.out_channels == 2 * unet.in_channels else "fixed_small"
    options = {"clip_sample": False, "thresholding": False, "variance_type": variance}
    return DDPMVLBScheduler.from_config(config, levels=None, **options).reverse_process(pipe.device)


def check_chain(other: ReverseProcess, base: ReverseProcess, name: str) -> None:
    """Refuse another chain than the base's, for which its pilot and its draws are not made."""
    first, second = ((own.prediction_type, own.forward.log_alphas_cumprod.tolist()) for own in (base, other))
    if first != second:
        what = "the betas and the `prediction_type` of the other to be compared"
        raise ValueError(f"{name} must have {what}, but its scheduler has others: score each by itself.")


def validation_of(
    pipe: StableDiffusionPipeline, images: Sequence[Any], captions: Sequence[str], args: Any
) -> Validation:
    """The validation of a pipeline on its latents, given its captions, by the chain that it was trained on."""
    latents = encode_images(pipe, images, args.resolution, args.seed)
    told = {"encoder_hidden_states": encode_captions(pipe, captions)}
    return Validation(latents, chain_of(pipe), args.calls_per_image, args.seed, told)


def score(
    name: str, pipe: StableDiffusionPipeline, data: tuple[list, list], args: Any, pilot: Pilot | None
) -> Validation:
    """Score a pipeline, with the pilot of an earlier one where the two shall be compared."""
    validation = validation_of(pipe, *data, args)
    validation.pilot = pilot
    found = validation(pipe.unet, name)
    value, noise, choice = (math.log(2) * own for own in (found.bits_per_dim, found.noise_se, found.image_se))
    images = f"{choice:.4f}" if choice > 0 else "n/a"  # where the noise explains all of the images' spread
    errors = f"+- {noise:.4f} (noise) +- {images} (images)"
    calls = f"{len(found.per_image)} images, {args.calls_per_image} network calls each"
    print(f"{name}: {value:.4f} {errors} nats/dim of latents, {calls}")
    return validation


def compare(args: Any) -> VLBDifference | None:
    """Score the pipeline, and the other network where there is one; returns the difference, other less this."""
    data = load_captioned(args.images, args.split, args.image_column, args.caption_column, args.num_images)
    pipe = load_pipeline(args.model)
    base = score(args.model, pipe, data, args, None)
    if args.lora is None and args.compare is None:
        return None
    if args.lora is not None:
        pipe.load_lora_weights(args.lora)
    other = pipe if args.lora is not None else load_pipeline(args.compare)
    check_chain(chain_of(other), base.reverse, args.lora or args.compare)
    tuned = score(args.lora or args.compare, other, data, args, base.pilot)
    # Refused where the other's VAE makes other latents: then there is nothing in common to compare on.
    difference = tuned.history[args.lora or args.compare] - base.history[args.model]
    nats = [math.log(2) * own for own in (difference.bits_per_dim, difference.se)]
    print("difference: {:.4f} +- {:.4f} nats/dim of latents: ".format(*nats) + difference.verdict)
    return difference


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="The pipeline: a folder or a Hub name.")
    parser.add_argument("--images", required=True, help="A folder with metadata.jsonl, or a data set's Hub name.")
    parser.add_argument("--split", default="train", help="Of the data set; keep to images that were not trained on.")
    parser.add_argument("--image_column", default="image")
    parser.add_argument("--caption_column", default="text")
    parser.add_argument("--num_images", type=int, default=64, help="The first so many; default: 64.")
    parser.add_argument("--resolution", type=int, help="Of the images; default: the U-Net's.")
    parser.add_argument("--calls_per_image", type=int, default=8, help="Network calls for each image; default: 8.")
    parser.add_argument("--seed", type=int, default=0, help="Of the latents, t and noise.")
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--compare", help="Another pipeline with the same VAE.")
    other.add_argument("--lora", help="LoRA weights for the pipeline, loaded through peft.")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> VLBDifference | None:
    """Run; whatever is wrong with what it was given is told in one line."""
    args = parse_args(argv)
    if not is_transformers_available():
        raise SystemExit("Captions need transformers: pip install transformers")
    if args.lora is not None and not is_peft_available():
        raise SystemExit("--lora needs peft: pip install peft")
    try:
        return compare(args)
    except (OSError, ValueError) as error:
        raise SystemExit(" ".join(str(error).split())) from error


if __name__ == "__main__":
    main()
