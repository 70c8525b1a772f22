"""Which images are no digits, by four scores: examples/outliers.py at several noise seeds, its codecs and a picture.

python benchmarks/outliers.py --model runs/digits --picture docs/outliers.png

The example's table for each seed of the noise, on the same images. Then the AUROCs' means over the seeds with their
bootstrap errors (1000 resamples of the pairs of a test digit and its outlier), what the corrected bits and the terms
gain on the plain bits, in pairs, and the largest standard deviation between the seeds. Last the AUROCs of the bits
less what each codec takes, though the example chooses its codec by training digits alone.
"""

import argparse
import importlib.util
from pathlib import Path

import torch
from environment import describe
from matplotlib.figure import Figure, SubFigure
from torch import Tensor

EXAMPLE = Path(__file__).parents[1] / "examples" / "outliers.py"
COLOURS = {"bits": "C3", "typicality": "C1", "bits - codec": "C0", "L_t": "C2"}
TOP = {"loc": "outside upper center", "frameon": False}
HARD = "upright bar", "right half erased"
Kinds = dict[str, dict[str, Tensor]]
"""By kind of images and by score."""

spec = importlib.util.spec_from_file_location("example", EXAMPLE)
assert spec is not None and spec.loader is not None
example = importlib.util.module_from_spec(spec)
spec.loader.exec_module(example)


def areas(found: Kinds) -> Kinds:
    """The AUROC of each score, and those of the resampled pairs."""
    usual = found["digits"]
    kinds = [kind for kind in found if kind != "digits"]
    return {kind: {name: example.auroc(usual[name], found[kind][name]) for name in usual} for kind in kinds}


def cell(value: Tensor) -> str:
    """A mean over seeds and its bootstrap error; the seeds share the images, and so the resamples."""
    return f"{value[0]:.3f} +- {value[1:].std():.3f}"


def print_means(seeds: list[Kinds]) -> None:
    """Means over the seeds, gains, and the spread between seeds."""
    scores = list(COLOURS)
    print(f"\n| outliers | {' | '.join(scores)} | gain of bits - codec | gain of L_t | SD between seeds |")
    print("| --- " * (4 + len(scores)) + "|")
    for kind in seeds[0]:
        of_seeds = {name: torch.stack([own[kind][name] for own in seeds]) for name in scores}
        mean = {name: own.mean(0) for name, own in of_seeds.items()}
        gains = [mean[name] - mean["bits"] for name in ("bits - codec", "L_t")]
        between = max(float(own[:, 0].std()) for own in of_seeds.values())
        cells = [*map(cell, mean.values()), *map(cell, gains)]
        print(f"| {kind} | {' | '.join(cells)} | {between:.4f} |")


def print_codecs(found: Kinds, images: dict[str, Tensor]) -> None:
    """AUROCs of the bits less each codec's."""
    kinds = list(images)[1:]
    print(f"\n| less | bits/dim of a digit | {' | '.join(kinds)} |\n{'| --- ' * (2 + len(kinds))}|")
    for codec in example.CODECS:
        coded = {kind: example.coded(own, codec) for kind, own in images.items()}
        less = {kind: found[kind]["bits"] - coded[kind] for kind in images}
        cells = [f"{example.auroc(less['digits'], less[kind], 1)[0]:.3f}" for kind in kinds]
        print(f"| {codec} | {coded['digits'].mean():.2f} | {' | '.join(cells)} |", flush=True)


def draw_histograms(part: SubFigure, found: Kinds) -> None:
    """The hard cases by bits and by corrected bits."""
    labels = {"bits": "bits/dim", "bits - codec": "bits/dim less the codec's"}
    for axes, (name, label) in zip(part.subplots(2, 1), labels.items()):
        shown = {kind: found[kind][name] for kind in ("digits", *HARD)}
        low, high = (float(end(torch.cat(list(shown.values())))) for end in (torch.min, torch.max))
        for colour, (kind, values) in zip(("0.7", "C4", "C5"), shown.items()):
            filled = "stepfilled" if kind == "digits" else "step"
            axes.hist(values.numpy(), 36, range=(low, high), histtype=filled, color=colour, label=kind, linewidth=1.5)
        axes.set(xlabel=label, ylabel="test images")
    part.legend(*axes.get_legend_handles_labels(), ncols=3, fontsize="small", **TOP)


def draw_areas(part: SubFigure, found: Kinds, images: dict[str, Tensor]) -> None:
    """The AUROCs beside a picture of each kind."""
    axes, rows = part.subplots(), areas(found)
    for row, (kind, scores) in enumerate(rows.items()):
        for i, (name, own) in enumerate(scores.items()):
            look = {"fmt": "o", "markersize": 4, "color": COLOURS[name], "label": None if row else name}
            axes.errorbar(float(own[0]), row + 0.16 * (i - 1.5), xerr=float(own[1:].std()), **look)
        picture = axes.inset_axes((-0.1, row - 0.4, 0.08, 0.8), transform=axes.get_yaxis_transform())
        picture.imshow(images[kind][3, 0].numpy(), cmap="gray", vmin=-1, vmax=1)
        picture.set(xticks=[], yticks=[])
    axes.axvline(0.5, color="0.8", zorder=0)
    axes.text(0.505, len(rows) - 0.5, "a coin", color="0.5", fontsize="small")
    axes.set_yticks(range(len(rows)), list(rows))
    axes.tick_params(axis="y", length=0, pad=32)
    axes.invert_yaxis()
    axes.set_xlabel("AUROC against test digits")
    part.legend(*axes.get_legend_handles_labels(), ncols=4, **TOP)


def draw(found: Kinds, images: dict[str, Tensor], path: str) -> None:
    """Both, in a PNG file."""
    figure = Figure((10, 6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[4, 6])
    draw_histograms(left, found)
    draw_areas(right, found, images)
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="runs/digits", help="A folder that `ddpm-vlb train` made.")
    parser.add_argument("--seeds", type=int, default=3, help="Of the noise.")
    parser.add_argument("--num_test", type=int, default=297, help="Test digits.")
    parser.add_argument("--picture", default="outliers.png", help="The file to draw.")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    print(describe(), flush=True)
    found = []
    for seed in range(args.seeds):
        print(f"\n## Noise seed {seed}\n", flush=True)
        found.append(example.main(args.model, args.num_test, seed=seed))
    print("\n## Means over the seeds")
    print_means([areas(own) for own in found])
    test = example.digits()[1][: args.num_test]
    images = {"digits": test, **example.outliers(test)}
    print("\n## Codecs, seed 0")
    print_codecs(found[0], images)
    draw(found[0], images, args.picture)


if __name__ == "__main__":
    main()
