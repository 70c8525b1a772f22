"""The validations of a run so far: which network was best, and whether to go on."""

import itertools
from typing import Any

import torch
from torch import Tensor

from ddpm_vlb import ReverseProcess, Validation, VLBEstimate, VLBScores
from ddpm_vlb.runtime.image_sets import Images

MOST_IMAGES = 64


class Validations:
    """Of the first validation images; kept in checkpoints, so that a resumed run decides as it would have.

    Args:
        images: of the validation split.
        reverse: p.
        calls_per_image: network calls for each image and validation.
        seed: of the run.
        keep_best: keep the weights of the best network.

    Raises:
        ValueError: too few calls for the error of so few images.
    """

    def __init__(self, images: Images, reverse: ReverseProcess, calls_per_image: int, seed: int, keep_best: bool):
        x_0 = torch.stack(images.__getitems__(list(range(min(MOST_IMAGES, len(images))))))
        self.so_far = Validation(x_0, reverse, calls_per_image, seed)
        self.keep_best = keep_best
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

    def exhausted(self, patience: int | None) -> bool:
        """Whether so many validations in a row, the last among them, were surely worse than the best.

        Args:
            patience: how many; None is never.
        """
        history, best = self.so_far.history, self.so_far.best
        if patience is None or best is None:
            return False
        latest = ((own - history[best]).verdict for own in reversed(history.values()))
        return sum(1 for _ in itertools.takewhile(lambda verdict: verdict == "worse", latest)) >= patience

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"so_far": self.so_far.state_dict(), "best_weights": self.best_weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.so_far.load_state_dict(state_dict["so_far"])
        self.best_weights = state_dict["best_weights"]
