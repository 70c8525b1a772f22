"""The validations of a run so far: which network was best, and whether to go on."""

import itertools
from typing import Any

import torch
from torch import Tensor

from ddpm_vlb import ReverseProcess, Validation, VLBEstimate, VLBScores
from ddpm_vlb.runtime.image_sets import Images

MOST_IMAGES = 64
FEWEST_TO_STOP = 8
FALSE_STOPS = 0.05


def spread(total: int, most: int) -> list[int]:
    """Positions of at most so many images, always the same, at random: a stride could meet the same class each time.

    Args:
        total: number of its images.
        most: how many to take.
    """
    order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
    return sorted(order[:most].tolist())


class Validations:
    """Of some validation images; kept in checkpoints, so that a resumed run decides as it would have.

    Args:
        images: of the validation split.
        reverse: p.
        calls_per_image: network calls for each image and validation.
        seed: of the run.
        keep_best: keep the weights of the best network.
        patience: how many validations in a row that are surely worse than the best end the run; None: none do.

    Raises:
        ValueError: too few calls for the error of so few images, or too few images to end a run by.
    """

    def __init__(
        self,
        images: Images,
        reverse: ReverseProcess,
        calls_per_image: int,
        seed: int,
        keep_best: bool,
        patience: int | None = None,
    ):
        self.positions = spread(len(images), MOST_IMAGES)
        if patience is not None and len(images) < FEWEST_TO_STOP:
            raise ValueError(
                f"--patience needs at least {FEWEST_TO_STOP} validation images to tell worse from unlucky, but the "
                f"data has {len(images)}: train without it, or on data with a larger validation split."
            )
        x_0 = torch.stack(images.__getitems__(self.positions))
        try:
            self.so_far = Validation(x_0, reverse, calls_per_image, seed)
        except ValueError as error:
            raise ValueError(str(error).replace("`calls_per_image`", "--validation_calls")) from error
        self.keep_best, self.patience = keep_best, patience
        self.best_weights: dict[str, Tensor] = {}

    def add(self, scores: tuple[VLBScores, ...], step: int, network: torch.nn.Module) -> VLBEstimate:
        """Take in the scores of a step's network.

        Args:
            scores: of all images.
            step: optimizer steps done.
            network: that was scored.
        """
        estimate = self.so_far.add(scores, step)
        if self.keep_best and self.so_far.best == step:
            self.best_weights = {name: value.cpu().clone() for name, value in network.state_dict().items()}
        return estimate

    def exhausted(self) -> bool:
        """Whether the last validations, as many as the patience, were surely worse than the best.

        The best of many is a lucky one. So surely is more than a difference's verdict says: 5 % are divided by the
        square of the number of validations, by all pairs of one that is looked at and one that could be the best.
        """
        history, best = self.so_far.history, self.so_far.best
        if self.patience is None or best is None:
            return False
        unlikely = FALSE_STOPS / len(history) ** 2
        latest = itertools.islice(reversed(history.values()), self.patience)
        gaps = [own - history[best] for own in latest]
        return len(gaps) == self.patience and all(own.bits_per_dim > 0 and own.p_value < unlikely for own in gaps)

    def beside_the_best(self, step: int) -> tuple[str, dict[str, float]]:
        """By how much a validation is worse than the best before it, in words and for the tracker; of the first, none.

        Args:
            step: of a validation.
        """
        history = self.so_far.history
        before = list(itertools.takewhile(lambda own: own != step, history))
        if not before:
            return "", {}
        best = min(before, key=lambda own: history[own].bits_per_dim)
        gap = history[step] - history[best]
        numbers = {"validation_less_best": gap.bits_per_dim, "validation_less_best_se": gap.se}
        return f"; less the best before it, of step {best}: {gap}", numbers

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"so_far": self.so_far.state_dict(), "best_weights": self.best_weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.so_far.load_state_dict(state_dict["so_far"])
        self.best_weights = state_dict["best_weights"]
