r"""Validation that decides: one estimate of the bound after another, as a network is trained, made to be compared.

1. the images, the seed and the pilot stay, and so do all draws of t and noise: what two networks' estimates differ by
   is the networks, but for a noise that is common to both and cancels
2. the difference's standard error is that of the images' differences (`VLBDifference`)
3. the best so far is the lowest estimate, with common draws the one that no other is better than by the paired mean;
   *surely* better is another thing: its difference is too large, beside its error, for two equals

Sources: Owen 2013, "Monte Carlo theory", section 8.6 (common random numbers); the estimator's own.
"""

import contextlib
import itertools
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .checks import Conditioning, Model, check_conditioning, check_data
from .estimation import VLBEstimator
from .evaluation import Loss, enough_replicates, rows_of
from .identities import settings, unpaired
from .pilot import Pilot, fit_pilot, pilot_positions
from .reverse_process import ReverseProcess
from .scores import Scores, VLBEstimate, VLBScores, compacted, estimate_from_scores, merge_scores

Label = int | str


class Validation:
    """The bound of some images under the network of the moment, in numbers that can be subtracted.

    Call it with the network, at any time and from anywhere: `validation(unet, step)` is a `VLBEstimate`, and
    `validation.history[step] - validation.history[earlier]` says better, worse or cannot be told. A module is scored
    in evaluation mode and left in the mode that it was found in; nothing is drawn from global generators.

    The pilot is fitted to the first network, and serves those that come of it: it makes an estimate precise, never
    right or wrong. Another network, chain or data needs another: make a new `Validation`, whose estimates cannot be
    compared with those of the old one.

    Args:
        images: x_0 (N, C, *) in [-1, 1] on the levels, the same at every call.
        reverse: p, on the device to score on.
        calls_per_image: network calls for each image and validation, at least 2.
        seed: with an image's position it determines its draws.
        conditioning: the network's further arguments by name, each a tensor of N rows.
        pilot: from `fit_pilot`, best of training images, or a tensor of p_t; None fits one at the first call, to these
            images.
        term: a training loss, loss(reverse, model_output, diffused) -> (B,), such as `simple_loss`: the estimates are
            then of its mean over all t, and so is what they decide; their `also` has the bound, of the same calls.

    Raises:
        ValueError: images off their levels, conditioning of another number, or too few calls for their errors.

    Source: the module's list.
    """

    def __init__(
        self,
        images: Tensor,
        reverse: ReverseProcess,
        calls_per_image: int = 8,
        seed: int = 0,
        conditioning: Conditioning | None = None,
        pilot: Pilot | Tensor | None = None,
        term: Loss | None = None,
    ):
        check_data(images, reverse.levels)
        check_conditioning(conditioning, len(images))
        self.images, self.reverse, self.conditioning = images, reverse, conditioning
        self.calls_per_image, self.seed, self.term = calls_per_image, seed, term
        self.pilot = pilot
        self.num_replicates = enough_replicates(calls_per_image, len(images))
        self.history: dict[Label, VLBEstimate] = {}
        self._scores: dict[Label, Scores] = {}

    @property
    def pilot(self) -> Pilot | None:
        """What all estimates draw by; of a tensor of p_t, one is made."""
        return self._pilot

    @pilot.setter
    def pilot(self, pilot: Pilot | Tensor | None) -> None:
        self._pilot = Pilot(pilot) if isinstance(pilot, Tensor) else pilot

    def __len__(self) -> int:
        return len(self.images)

    def __call__(self, model: Model, label: Label | None = None) -> VLBEstimate:
        """Score a network and keep the estimate: `add(score(model), label)`.

        Args:
            model: as in `score`.
            label: as in `add`.

        Raises:
            ValueError, FloatingPointError: as both.
        """
        return self.add(self.score(model), label)

    def fit(self, model: Model) -> Pilot:
        """A pilot of these images, by some 1000 network calls; the first call keeps one by itself.

        Args:
            model: as in `score`.

        Raises:
            ValueError, FloatingPointError: as `fit_pilot`.
        """
        chosen = torch.tensor(pilot_positions(len(self), self.images[0].numel()))
        x_0, told = self.images[chosen.to(self.images.device)], rows_of(self.conditioning, chosen)
        with evaluating(model):
            return fit_pilot(model, self.reverse, x_0, seed=self.seed, conditioning=told, also=self._also)

    def score(self, model: Model, positions: Sequence[int] | None = None) -> Scores:
        """Score some of the images, as one of several processes does; fits the pilot where there is none.

        Args:
            model: the network, called as model(x_t, timesteps, **conditioning); returns a tensor, an object with
                `.sample`, or a tuple that begins with the tensor.
            positions: of the images; None for all. Of none, where there are more processes than images, nothing comes,
                which `merge_scores` takes.

        Raises:
            ValueError: as `VLBEstimator`.
            FloatingPointError: NaN or infinity from the network, with the timestep and the image.
        """
        if self.pilot is None:
            self.pilot = self.fit(model)
        scorer = self._scorer(model)
        chosen = torch.tensor(list(range(len(self)) if positions is None else positions), dtype=torch.int64)
        if len(chosen) == 0:
            return ()
        parts = list[Scores]()
        with evaluating(model):
            for own in chosen.split(scorer.images_per_unit(self.images)):
                x_0, told = self.images[own.to(self.images.device)], rows_of(self.conditioning, own)
                parts = compacted([*parts, scorer.score(x_0, own.tolist(), told)])
        return merge_scores(parts)

    def add(self, scores: Scores, label: Label | None = None) -> VLBEstimate:
        """Keep the scores of all images as the newest estimate.

        Args:
            scores: of `score`, merged.
            label: its name in `history`, such as the step, in the place of an earlier one of that name; None takes
                the first free number from that of the estimates.

        Raises:
            ValueError: scores of some images only, or of another validation.
        """
        count = len(scores[0]) if scores else 0
        if count != len(self):
            raise ValueError(
                f"`scores` must be of all {len(self)} images, but are of {count}: merge those of all processes, "
                "`merge_scores`."
            )
        self._check("scores", [scores])
        estimate = self._estimate(scores)
        label = getattr(label, "item", lambda: label)()  # numpy's is no plain number to a saved state
        if label is None:
            label = next(number for number in itertools.count(len(self.history)) if number not in self.history)
        for kept in (self.history, self._scores):  # whose order is that of time
            kept.pop(label, None)
        self.history[label], self._scores[label] = estimate, scores
        return estimate

    @property
    def best(self) -> Label | None:
        """The label of the lowest estimate so far, the earliest of equals; None before the first."""
        return min(self.history, key=lambda label: self.history[label].bits_per_dim, default=None)

    def state_dict(self) -> dict[str, Any]:
        """The pilot and the history, in tensors, and what they are of, in words; to be saved."""
        history = {label: [own.state_dict() for own in scores] for label, scores in self._scores.items()}
        pilot = {} if self.pilot is None else self.pilot.state_dict()
        return {"pilot": pilot, "history": history, "settings": settings(self.reverse, self.conditioning)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with a saved pilot and history.

        Args:
            state_dict: what `state_dict` returned, of the same images, conditioning, reverse process, seed, calls and
                term.

        Raises:
            ValueError: the state of another validation, whose estimates could not be compared, or of an earlier
                version.
        """
        pilot, history = state_dict["pilot"], state_dict["history"]
        scores = {label: tuple(map(VLBScores.from_state_dict, own)) for label, own in history.items()}
        before, self.pilot = self.pilot, Pilot.from_state_dict(pilot) if pilot else None
        try:
            self._check("state_dict", scores.values())
            if scores:
                self._check_settings(state_dict.get("settings"))
        except ValueError:
            self.pilot = before
            raise
        self._scores = scores
        self.history = {label: self._estimate(own) for label, own in scores.items()}

    def _scorer(self, model: Model) -> VLBEstimator:
        return VLBEstimator(
            model, self.reverse, self.pilot, self.calls_per_image, self.num_replicates, self.seed, also=self._also
        )

    def _check(self, name: str, history: Collection[Scores]) -> None:
        """Refuse scores that are not what `score` would give of another network."""
        if not history:
            return
        own = self._scorer(nn.Identity()).identities(self.images, range(len(self)))  # no network is called
        for scores in history:
            losses = [[each.loss for each in several if each.loss] for several in (scores, own)]
            if losses[0] != losses[1]:
                reason: str | None = f"the same `term`, but theirs are {losses[0] or None} and {losses[1] or None}"
            elif scores[0].chain != own[0].chain:
                reason = "the same chain, but theirs differ"
            else:
                reason = next(filter(None, (unpaired(a.identity, b) for a, b in zip(scores, own))), None)
            if reason is not None:
                raise ValueError(f"`{name}` must be of a validation with {reason}; or make another `Validation`.")

    def _check_settings(self, theirs: dict[str, str] | None) -> None:
        """Refuse a history that a change of them would enter as a change of the network."""
        if theirs is None:
            raise ValueError(
                "`state_dict` must say how its validation was made, but is of an earlier version, which did not: make "
                "another `Validation`."
            )
        mine = settings(self.reverse, self.conditioning)
        for name in sorted(mine.keys() | theirs.keys()):
            its, own = theirs.get(name), mine.get(name)
            if its != own:
                raise ValueError(
                    f"`state_dict` must be of a validation with the same `{name}`, but theirs are {its} and {own}; or "
                    "make another `Validation`."
                )

    @property
    def _also(self) -> tuple[Loss, ...]:
        return () if self.term is None else (self.term,)

    def _estimate(self, scores: Scores) -> VLBEstimate:
        """With the loss first, where there is one."""
        return estimate_from_scores(scores if self.term is None else scores[::-1])


@contextlib.contextmanager
def evaluating(model: Model) -> Iterator[None]:
    """A module in evaluation mode for a while; each of its layers goes back to its own mode.

    Args:
        model: a module; a function has no mode.
    """
    modes = {layer: layer.training for layer in model.modules()} if isinstance(model, nn.Module) else {}
    if isinstance(model, nn.Module) and any(modes.values()):
        model.eval()
    try:
        yield
    finally:
        for layer, training in modes.items():  # a layer before its own, which its `train` moves too
            if layer.training != training:
                layer.train(training)  # which may do more than note it, as LoRA's that merge
        for layer, training in modes.items():
            layer.training = training  # of one that two layers have
