"""Which digit it is, by the bounds of a class-conditional network: accuracy against calls, calibration, bits/dim.

python benchmarks/class_posterior.py --model runs/classes --unconditional runs/digits

Networks that are not there are trained first, by `ddpm-vlb train --class_conditional` and `ddpm-vlb train`. All pilots
are of training images, and their calls, once for the whole data set, are not among those of an image. Without shared
draws each class is scored by `VLBEstimator` with draws of its own, control variate and all; with halving these, too,
have equally many draws a round. Errors are binomial, of the accuracy over the images; `class_posterior` itself is run
with several seeds of its draws, of which the mean, the lowest and the highest accuracy are told.
"""

import argparse
import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from environment import describe
from torch import Tensor

from ddpm_vlb import (
    ClassPosterior,
    DDPMVLBPipeline,
    Pilot,
    ReverseProcess,
    VLBEstimate,
    VLBEstimator,
    class_posterior,
    enough_replicates,
    estimate_vlb,
    fit_class_pilot,
    fit_pilot,
)
from ddpm_vlb.runtime.image_data import load_digits_splits, load_image_data, make_splits

CLASSES, ROUNDS = 10, (10, 5, 3, 2)
OURS = "shared draws, halving (`class_posterior`)"
EDGES = (0.0, 0.9, 0.99, 0.999, 1.0)
Network = Callable[..., object]


def load(folder: Path, options: str) -> tuple[torch.nn.Module, ReverseProcess]:
    """A network and its chain, clipped as it samples, from the folder; trained where it is not there."""
    if not folder.exists():
        command = f"{sys.executable} -m ddpm_vlb.commands.train --cpu {options}"
        subprocess.run([*command.split(), "--output_dir", str(folder)], check=True)
    pipeline = DDPMVLBPipeline.from_pretrained(folder)
    return pipeline.unet.eval(), pipeline.scheduler.reverse_process()


def digits() -> list[tuple[Tensor, Tensor]]:
    """Images and labels to train and to test."""
    data, (train, _, test, _) = load_image_data(), make_splits(load_digits_splits(), "image")
    parts = (data.train, train), (data.test, test)
    return [(torch.cat(list(images.batches(256))), torch.tensor(list(part["label"]))) for images, part in parts]


def apart(
    unet: Network, reverse: ReverseProcess, x_0: Tensor, pilot: Pilot, calls: int, halving: bool
) -> tuple[Tensor, Tensor]:
    """The posterior (B, classes) from bounds estimated with draws of each class's own, and the calls of an image."""
    rounds = ROUNDS if halving else (CLASSES,)
    each = calls // sum(rounds)
    total, alive = torch.zeros(len(x_0), CLASSES, dtype=torch.float64), torch.ones(len(x_0), CLASSES, dtype=torch.bool)
    number = torch.zeros(len(x_0), CLASSES)
    for sweep, kept in enumerate(rounds):
        bounds = torch.where(alive, total / number.clamp(min=1), torch.inf)
        alive = alive & (bounds <= bounds.sort(1).values[:, kept - 1 : kept])
        for label in range(CLASSES):
            rows = alive[:, label].nonzero()[:, 0]
            if len(rows):
                scorer = VLBEstimator(unet, reverse, pilot, each, seed=label)
                told = {"class_labels": torch.full((len(rows),), label)}
                scores = scorer.score(x_0[rows], rows.tolist(), told, sweep)[0]
                total[rows, label] += scores.kl + scores.decoder
                number[rows, label] += 1
    return (-total / number).log_softmax(1), (each * number).sum(1)


def quality(log_probabilities: Tensor, labels: Tensor) -> tuple[float, float, float]:
    """Accuracy and its error in %, and log loss in nats."""
    right = (log_probabilities.argmax(1) == labels).double()
    error = math.sqrt(float(right.mean()) * (1 - float(right.mean())) / len(right))
    loss = -log_probabilities.gather(1, labels[:, None]).mean()
    return 100 * float(right.mean()), 100 * error, float(loss)


def curves(
    unet: Network,
    reverse: ReverseProcess,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    calls: list[int],
    seeds: int,
) -> ClassPosterior:
    """Print accuracy against calls; the posterior of the most calls and the first seed, with halving."""
    (x_0, true), told = test, {"class_labels": train[1]}
    usual = fit_pilot(unet, reverse, train[0], conditioning=told)
    ours = fit_class_pilot(unet, reverse, train[0], range(CLASSES))
    posterior = None

    def shared(pilot: Pilot, halving: bool) -> Callable[[int, int], tuple[Tensor, Tensor]]:
        def at(number: int, seed: int) -> tuple[Tensor, Tensor]:
            nonlocal posterior
            found = class_posterior(unet, reverse, x_0, range(CLASSES), number, None, pilot, halving, seed)
            posterior = found if halving and seed == 0 else posterior
            return found.log_probabilities, found.calls

        return at

    methods = {
        OURS: shared(ours, True),
        "shared draws": shared(ours, False),
        "shared draws, at the p_t of L_t": shared(usual, False),
        "draws of each class's own, halving": lambda n, _: apart(unet, reverse, x_0, usual, n, True),
        "draws of each class's own": lambda n, _: apart(unet, reverse, x_0, usual, n, False),
    }
    print("\n## Accuracy against calls\n")
    print(f"Beside them {ours.num_calls} calls of `fit_class_pilot`, {usual.num_calls} of `fit_pilot`.\n")
    print(
        f"| method | calls/image | accuracy, % | of {seeds} seeds | log loss, nats | CPU s |\n{'| --- ' * 6}|",
        flush=True,
    )
    for name, method in methods.items():
        for number in calls:
            if number // sum(ROUNDS if "halving" in name else [CLASSES]) < 2:
                continue
            started, own = time.process_time(), seeds if name == OURS else 1
            found = [method(number, seed) for seed in range(own)]
            seconds = (time.process_time() - started) / own
            qualities = [quality(log_probabilities, true) for log_probabilities, _ in found]
            accuracy, error, loss = (sum(column) / own for column in zip(*qualities, strict=True))
            accuracies = [each[0] for each in qualities]
            spread = f"{min(accuracies):.1f} to {max(accuracies):.1f}" if own > 1 else ""
            numbers = f"{accuracy:.1f} +- {error:.1f} | {spread} | {loss:.3f} | {seconds:.0f}"
            print(f"| {name} | {int(found[0][1].max())} | {numbers} |", flush=True)
    assert posterior is not None
    return posterior


def calibration(posterior: ClassPosterior, true: Tensor) -> None:
    """Print how often the likeliest class is right, by its probability."""
    confidence, label = posterior.log_probabilities.exp().max(1)
    right, gap = (label == true).double(), 0.0
    print(f"\n## Calibration at {int(posterior.calls.max())} calls\n")
    print("| probability of the likeliest class | images | its mean | right |\n| --- | --- | --- | --- |")
    for low, high in zip(EDGES, EDGES[1:]):
        rows = (confidence > low) & (confidence <= high)
        if bool(rows.any()):
            mean, share, count = float(confidence[rows].mean()), float(right[rows].mean()), int(rows.sum())
            # Agresti and Coull's, which is no 0 where all are right.
            middle = (share * count + 2) / (count + 4)
            error = math.sqrt(middle * (1 - middle) / (count + 4))
            print(f"| {low} to {high} | {count} | {mean:.4f} | {share:.4f} +- {error:.4f} |")
            gap += count * abs(mean - share) / len(true)
    accuracy, error, loss = quality(posterior.log_probabilities, true)
    second = posterior.log_probabilities.argsort(1)[:, -2:-1]
    noise = float(posterior.log_probabilities_se.gather(1, second).median())
    print(
        f"\nExpected calibration error {gap:.4f}, log loss {loss:.3f} nats, accuracy {accuracy:.1f} +- {error:.1f} %."
    )
    print(f"The second class's log probability has a standard error of {noise:.2f} nats (median).", flush=True)


def bits(
    unet: torch.nn.Module,
    reverse: ReverseProcess,
    unconditional: tuple[torch.nn.Module, ReverseProcess],
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    posterior: ClassPosterior,
) -> None:
    """Print bits/dim with and without labels, and each paired difference."""
    pilot = fit_pilot(unet, reverse, train[0], conditioning={"class_labels": train[1]})

    def scored(network: torch.nn.Module, chain: ReverseProcess, labels: Tensor | None) -> VLBEstimate:
        told = {} if labels is None else {"class_labels": labels}
        return estimate_vlb(
            network, chain, [(test[0], told)], pilot, num_replicates=enough_replicates(20, len(test[0]))
        )

    first, dims = scored(unet, reverse, test[1]), test[0][0].numel()
    print("\n## Test bits/dim\n\n| what is told | bits/dim | +- noise | +- images | less the first |")
    print("| --- | --- | --- | --- | --- |")
    print(f"| each image's label | {first.bits_per_dim:.3f} | {first.noise_se:.3f} | {first.image_se:.3f} | |")
    own = posterior.log_probabilities.gather(1, test[1][:, None])[:, 0]
    summed = (math.log(CLASSES) + own) / (dims * math.log(2))
    values = first.per_image + summed
    spread = f"{summed.mean():+.4f} +- {summed.std() / len(summed) ** 0.5:.4f}"
    print(f"| nothing: the classes summed out by the posterior | {values.mean():.3f} | | | {spread} |")
    others = {"nothing: a network trained without labels": (*unconditional, None)}
    if unet.config.num_class_embeds > CLASSES:
        others["the label for no class"] = unet, reverse, torch.full_like(test[1], unet.config.num_class_embeds - 1)
    for name, other in others.items():
        estimate = scored(*other)
        numbers = f"{estimate.bits_per_dim:.3f} | {estimate.noise_se:.3f} | {estimate.image_se:.3f}"
        print(f"| {name} | {numbers} | {str(estimate - first).split(' bits')[0]} |", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("runs/classes"), help="Folder of a class-conditional one.")
    parser.add_argument("--unconditional", type=Path, default=Path("runs/digits"), help="Of one without labels.")
    parser.add_argument("--images", type=int, default=297, help="Test images.")
    parser.add_argument("--calls", type=int, nargs="+", default=[20, 40, 80, 160], help="For each image.")
    parser.add_argument("--seeds", type=int, default=3, help="Of the draws of `class_posterior`.")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    print(describe(), flush=True)
    unet, reverse = load(args.model, "--class_conditional")
    unconditional = load(args.unconditional, "")
    train, (x_0, true) = digits()
    test = x_0[: args.images], true[: args.images]
    print(
        f"\n{len(test[0])} test images of scikit-learn's digits; x_0 clipped, as the checkpoints sample.", flush=True
    )
    posterior = curves(unet, reverse, train, test, args.calls, args.seeds)
    calibration(posterior, test[1])
    bits(unet, reverse, unconditional, train, test, posterior)


if __name__ == "__main__":
    main()
