"""Which images are no digits: bits/dim as a score, where it fails, and two scores that mend it.

    ddpm-vlb train
    python examples/outliers.py [--model runs/digits]

scores test digits and thirteen kinds of images that are none and prints, for each kind, the chance that an outlier
scores above a digit (AUROC: 0.5 is a coin's) with its bootstrap error. Fitted to training digits alone, the scores are

- bits: the bound on -log2 p(x_0), in bits/dim. What is simpler than a digit is cheap to code, however unlike one.
- typicality: how far the bits are from their mean over training digits (Nalisnick et al. 2019).
- bits - codec: less what a lossless codec takes, which knows no digits but what is simple (Serra et al. 2020).
- L_t: the bound's terms at a few steps, each less its mean over training digits and over its standard deviation; the
  mean of the squares (several noise levels in place of their sum: Graham et al. 2023).

The codec is the one with which bits - codec varies least over training digits. What its files begin and end with is
the same for all images and does not matter: what does is whether the rest says more than "small".
"""

import argparse
import io
import lzma
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image
from sklearn.feature_extraction.image import extract_patches_2d
from torch import Tensor

from ddpm_vlb import DDPMVLBPipeline, ReverseProcess, estimate_vlb, fit_pilot, spread_knots, vlb_term

CALLS = 20  # of the network for each image: for the bound, and as many for the terms
LZMA = [{"id": lzma.FILTER_LZMA2, "dict_size": 4096, "lc": 0, "pb": 0}]
ByScore = dict[str, Tensor]
"""What each score gives to images, (B,); the more, the more unusual."""


def digits() -> tuple[Tensor, Tensor]:
    """Those that `ddpm-vlb train` trains and validates on, and its test digits. Your own data go here."""
    images = torch.tensor(load_digits().images[:, None] / 8 - 1, dtype=torch.float32)
    order = np.random.default_rng(0).permutation(len(images))  # as `datasets` splits them
    return images[order[297:]], images[order[:297]]


def on_levels(values: Tensor) -> Tensor:
    """The nearest of the 17 levels in [-1, 1]."""
    return (values.clamp(-1, 1) * 8).round() / 8


def photographs(number: int) -> Tensor:
    """Grey patches of scikit-learn's two photographs."""
    sources = [load_sample_image(name).mean(2) for name in ("china.jpg", "flower.jpg")]
    patches = [extract_patches_2d(own, (8, 8), max_patches=-(-number // 2), random_state=0) for own in sources]
    return on_levels(torch.tensor(np.concatenate(patches)[:number, None] / 127.5 - 1, dtype=torch.float32))


def outliers(images: Tensor) -> dict[str, Tensor]:
    """As many images of each kind as there are digits, number i made of digit i where it is made of one."""
    generator = torch.Generator().manual_seed(0)
    number, order = len(images), torch.rand(len(images), 64, generator=generator).argsort(1)
    level, slopes = (2 * torch.rand(number, k, 1, 1, generator=generator) - 1 for k in (1, 2))
    ramp, column = torch.linspace(-1, 1, 8), torch.randint(1, 6, (number, 1, 1, 1), generator=generator)
    bar = torch.where((torch.arange(8) - column) % 8 < 2, 1.0, -1.0)
    return {
        "upright bar": bar.expand_as(images).clone(),
        "right half erased": torch.where(torch.arange(8) < 4, images, -1),
        "blank": torch.full_like(images, -1),
        "bold, contrast x 1.5": on_levels(1.5 * (images + 1) - 1),
        "mirrored": images.flip(3),
        "shifted by 2": torch.nn.functional.pad(images[..., :-2], (2, 0), value=-1),
        "turned by 90 degrees": images.rot90(1, (2, 3)),
        "noisy, SD one level": on_levels(images + 0.125 * torch.randn(images.shape, generator=generator)),
        "inverted": -images,
        "shuffled pixels": images.flatten(1).gather(1, order).reshape(images.shape),
        "smooth ramps": on_levels(level + slopes[:, :1] * ramp + slopes[:, 1:] * ramp[:, None]),
        "photographs": photographs(number),
        "uniform noise": torch.randint(17, images.shape, generator=generator) / 8 - 1,
    }


def in_file(image: np.ndarray, form: str, **options: int) -> int:
    """Bytes of an image file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, form, **options)
    return len(file.getvalue())


def deflated(image: np.ndarray, strategy: int) -> int:
    """Bytes of a bare DEFLATE stream of the pixels."""
    stream = zlib.compressobj(9, zlib.DEFLATED, -15, 9, strategy)
    return len(stream.compress(image.tobytes()) + stream.flush())


CODECS: dict[str, Callable[[np.ndarray], int]] = {
    "PNG": lambda image: in_file(image, "PNG", optimize=True),
    "WebP": lambda image: in_file(image, "WEBP", lossless=True, quality=100),
    "LZMA": lambda image: len(lzma.compress(image.tobytes(), lzma.FORMAT_RAW, filters=LZMA)),
    "DEFLATE": lambda image: deflated(image, zlib.Z_DEFAULT_STRATEGY),
    "DEFLATE runs": lambda image: deflated(image, zlib.Z_RLE),
    "DEFLATE Huffman": lambda image: deflated(image, zlib.Z_HUFFMAN_ONLY),
}


def coded(x_0: Tensor, codec: str) -> Tensor:
    """A codec's bits/dim of each image, (B,)."""
    pixels = ((x_0 + 1) * 8).round().byte().movedim(1, -1).squeeze(-1).numpy()
    return torch.tensor([8 * CODECS[codec](image) for image in pixels], dtype=torch.float64) / x_0[0].numel()


@torch.no_grad()
def terms_at(model, reverse: ReverseProcess, x_0: Tensor, steps: Tensor, seed: int) -> Tensor:
    """L_t in nats at some steps (B, K), by one network call each; at a step all images have the same noise."""
    noise = torch.randn(len(steps), *x_0.shape[1:], generator=torch.Generator().manual_seed(seed))
    columns = []
    for t, epsilon in zip(steps, noise):
        diffused = reverse.forward.diffuse(x_0, t.expand(len(x_0)), epsilon.expand_as(x_0))
        output = model(diffused.x_t, reverse.forward.timesteps[diffused.t])
        columns.append(vlb_term(reverse, output if isinstance(output, Tensor) else output.sample, diffused))
    return torch.stack(columns, dim=1).double()


class Scores:
    """What each score says against an image, as training images taught it."""

    def __init__(self, model, reverse: ReverseProcess, train: Tensor, seed: int = 0):
        self.model, self.reverse, self.seed = model, reverse, seed
        self.pilot, self.steps = fit_pilot(model, reverse, train), spread_knots(reverse.forward, CALLS)
        bits, terms = self.measure(train)
        self.bits, self.mean, self.sd = bits.mean(), terms.mean(0), terms.std(0)
        self.spreads = {codec: float((bits - coded(train, codec)).std()) for codec in CODECS}
        self.codec = min(self.spreads, key=self.spreads.__getitem__)

    def measure(self, x_0: Tensor) -> tuple[Tensor, Tensor]:
        """Bits/dim (B,) and terms (B, K). Image i of every kind has the same draws: they make no difference."""
        score = estimate_vlb(self.model, self.reverse, x_0.split(64), self.pilot, CALLS, seed=self.seed)
        return score.per_image, terms_at(self.model, self.reverse, x_0, self.steps, self.seed)

    def __call__(self, x_0: Tensor) -> ByScore:
        """All scores of the images."""
        bits, terms = self.measure(x_0)
        return {
            "bits": bits,
            "typicality": (bits - self.bits).abs(),
            "bits - codec": bits - coded(x_0, self.codec),
            "L_t": ((terms - self.mean) / self.sd).square().mean(1),
        }


def auroc(usual: Tensor, unusual: Tensor, resamples: int = 1000) -> Tensor:
    """The AUROC and then those of resampled pairs of a digit and its outlier, (1 + resamples,)."""
    number = len(usual)
    drawn = np.random.default_rng(0).multinomial(number, np.full(number, 1 / number), resamples)
    counts = torch.cat([torch.ones(1, number), torch.from_numpy(drawn)]).double()
    above = (unusual > usual[:, None]).double() + (unusual == usual[:, None]).double() / 2
    return ((counts @ above) * counts).sum(1) / number**2


def load(folder: str) -> DDPMVLBPipeline:
    """The pipeline in a folder, of digits told no labels; any other ends the program in one line."""
    if not Path(folder, "model_index.json").is_file():
        sys.exit(f"--model must hold a trained pipeline, but {folder} has none: run `ddpm-vlb train`, or name yours.")
    pipeline = DDPMVLBPipeline.from_pretrained(folder)
    for what, asked, found in [
        ("no class labels (`num_class_embeds`)", None, pipeline.num_classes),
        ("samples of shape", (1, 8, 8), pipeline.sample_shape),
        ("levels:", 17, pipeline.chain.config.get("levels", 256)),
    ]:
        if found != asked:
            wanted = what if asked is None else f"{what} {asked}"
            sys.exit(f"--model must have {wanted}, as the digits do, but {folder} has {found}: run `ddpm-vlb train`.")
    return pipeline


def main(folder: str = "runs/digits", num_test: int = 297, num_train: int = 512, seed: int = 0) -> dict[str, ByScore]:
    """Score `num_test` test digits and as many outliers of each kind, and print the table."""
    pipeline = load(folder)
    train, test = digits()
    test = test[:num_test]
    scores = Scores(pipeline.network, pipeline.chain.reverse_process(), train[:num_train], seed)
    found = {"digits": scores(test)}
    less = ", ".join(f"{spread:.3f} less {codec}" for codec, spread in scores.spreads.items())
    print(f"SD of bits/dim over training digits: {less}. The codec is {scores.codec}.")
    print(f"Test digits: {found['digits']['bits'].mean():.2f} bits/dim.\n")
    print(f"| outliers | bits/dim | {' | '.join(found['digits'])} |\n{'| --- ' * (2 + len(found['digits']))}|")
    for kind, images in outliers(test).items():
        found[kind] = scores(images)
        areas = [auroc(found["digits"][name], unusual) for name, unusual in found[kind].items()]
        cells = " | ".join(f"{own[0]:.3f} +- {own[1:].std():.3f}" for own in areas)
        print(f"| {kind} | {found[kind]['bits'].mean():.2f} | {cells} |", flush=True)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/digits", help="The pipeline's folder; default: runs/digits.")
    main(parser.parse_args().model)
