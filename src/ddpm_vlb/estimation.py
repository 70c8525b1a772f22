r"""Bits/dim of a data set: an unbiased estimate of the mean bound over its images, with standard errors.

1. importance estimate: for each image R replicates of M steps drawn systematically from p_t; a replicate is
   L_T + sum_t E[C_t | x_0] + mean_m (L_{t_m} - C_{t_m}) / p_{t_m}, with the pilot's p_t and control variate C_t.
   t = 0 is drawn like any other step.
2. full loop: L_T + sum_t L_t, every step once; a second draw on some images tells its noise from their spread.

Every image draws from a generator seeded by (seed, its position), so its value depends neither on the batch it travels
in nor on the process that scores it; scores of parts of the data are merged exactly.

Sources: Ho et al. 2020, eq. 5; Nichol & Dhariwal 2021, section 3.3; Owen 2013, "Monte Carlo theory", chapters 8 and 9.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import (
    Batch,
    Conditioning,
    Model,
    Told,
    check_conditioning,
    check_data,
    check_model,
    check_same_chain,
    checked_batches,
)
from .devices import read_later, send
from .evaluation import (
    MIN_DEGREES,
    Loss,
    digest,
    enough_replicates,
    fitting_replicates,
    image_generator,
    launch_terms,
    one_behind,
    rows_of,
    values_in_a_call,
)
from .identities import Identity, image_digests, quantities
from .losses import prior_kl
from .pilot import ControlVariate, Pilot, PreparedImages, fit_pilot, max_pilot_images
from .reverse_process import ReverseProcess
from .scores import (
    Scores,
    VLBEstimate,
    VLBScores,
    compacted,
    curve_sums,
    estimate_from_scores,
    merge_scores,
)
from .timestep_samplers import ImportanceTimesteps, systematic_points

ESTIMATORS = ("importance", "full")
"""Of `VLBEstimator`: by importance sampling of t, or the loop over all steps."""
SECOND_DRAWS = 64
"""Images that the full loop visits twice, for its noise standard error."""


class _Draws(NamedTuple):
    """Chain indices and weights (B, R, M), and each image's generator to draw its noise from."""

    t: Tensor
    weights: Tensor
    generators: list[torch.Generator]


@dataclass(frozen=True, eq=False)
class VLBEstimator:
    """How a data set is scored; `score` scores some of its images, in any order and on any process.

    Args:
        model: the network, called as model(x_t, timesteps, **conditioning); returns a tensor, an object with
            `.sample`, or a tuple that begins with the tensor.
        reverse: p, on the device to score on; decides on clipping and the decoder.
        pilot: p_t and the control variate, from `fit_pilot`; a tensor of p_t, (T,), will do, but where it misjudges
            the terms the standard errors of few images are too small. The full loop needs none.
        calls_per_image: K = R x M network calls for each image, at least 2; the full loop makes T.
        num_replicates: R, at least 2, a divisor of K: the spread between replicates gives the noise standard error.
            None takes the most of at least 16 calls each, but at least 2; `enough_replicates` has the number for few
            images. A prime K has replicates of one call each, whose t cannot be spread: a number with small divisors
            is better.
        seed: with an image's position it determines its draws.
        estimator: "importance" or "full".
        also: further reverse processes of the same chain, scored from the same network outputs (unclipped beside
            clipped, one variance beside another), and training losses, loss(reverse, model_output, diffused) -> (B,),
            whose mean over t is estimated. Give them to `fit_pilot` too.
        values_per_call: (image, t) pairs are stacked up to this many values for each network call; None takes 2^16 on
            the CPU and 2^20 elsewhere.

    Raises:
        ValueError: impossible numbers, an unknown name, no pilot, or processes of another chain in `also`.

    Source: the module's list.
    """

    model: Model
    reverse: ReverseProcess
    pilot: Pilot | Tensor | None = None
    calls_per_image: int = 20
    num_replicates: int | None = None
    seed: int = 0
    estimator: str = "importance"
    also: Sequence[ReverseProcess | Loss] = ()
    values_per_call: int | None = None
    _sampler: ImportanceTimesteps = field(init=False, repr=False)
    _quantities: list[tuple[int, int, str]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.estimator not in ESTIMATORS:
            raise ValueError(f"`estimator` must be one of {list(ESTIMATORS)}, but got {self.estimator!r}.")
        steps, pilot = len(self.reverse.forward), self.pilot
        if self.estimator == "full":
            object.__setattr__(self, "calls_per_image", steps)
        else:
            fitting = fitting_replicates(self.calls_per_image)
            replicates = fitting if self.num_replicates is None else self.num_replicates
            if self.calls_per_image < 2 or replicates < 2 or self.calls_per_image % replicates:
                raise ValueError(
                    "`calls_per_image` must be at least 2 and `num_replicates`, at least 2, divide it, but got "
                    f"{self.calls_per_image!r} and {self.num_replicates!r}."
                )
            object.__setattr__(self, "num_replicates", replicates)
            if pilot is None:
                raise ValueError(
                    "`pilot` must say where to spend the calls: `pilot = fit_pilot(model, reverse, x_0)`, on training "
                    "images. With t drawn evenly the standard error of few images would be far too small."
                )
        pilot = pilot if isinstance(pilot, Pilot) else Pilot(torch.ones(steps) if pilot is None else pilot)
        object.__setattr__(self, "pilot", pilot)
        object.__setattr__(self, "_sampler", ImportanceTimesteps(pilot.probabilities))
        if self._sampler.num_timesteps != steps:
            raise ValueError(f"`pilot` must have {steps} probabilities, not {self._sampler.num_timesteps}.")
        if pilot.control is not None and len(pilot.control.scale) != steps:
            raise ValueError(f"`pilot` has a control variate of {len(pilot.control.scale)} steps, not {steps}.")
        check_same_chain(self.reverse, self.also)
        object.__setattr__(self, "_quantities", quantities(self.reverse, self.also))

    def images_per_unit(self, x_0: Tensor) -> int:
        """The fewest images whose pairs fill network calls to nine tenths or more.

        Args:
            x_0: images (B, C, *).
        """
        pairs = self._pairs_per_call(x_0)

        def filled(images: int) -> bool:
            needed = images * self.calls_per_image
            return needed >= 0.9 * pairs * -(-needed // pairs)

        return next((images for images in range(1, pairs) if filled(images)), pairs)

    def _pairs_per_call(self, x_0: Tensor) -> int:
        size = values_in_a_call(self.values_per_call, self.reverse.forward.betas.device)
        return max(1, size // x_0[0].numel())

    def score(
        self, x_0: Tensor, positions: Sequence[int], conditioning: Conditioning | None = None, sweep: int = 0
    ) -> Scores:
        """Score images: one `VLBScores` for `reverse`, and one for each entry of `also`.

        Args:
            x_0: images (B, C, *) in [-1, 1] on the levels.
            positions: their positions in the data, B integers.
            conditioning: the network's further arguments by name, each a tensor of B rows.
            sweep: number of the pass over the data; passes draw independently.

        Raises:
            ValueError: data outside [-1, 1], off its levels or not finite; a network in training mode; a loss that
                does not give one value for each image.
            FloatingPointError: NaN or infinity from the network, with the timestep and the image.
        """
        check_model(self.model)
        check_data(x_0, self.reverse.levels)
        check_conditioning(conditioning, len(x_0))
        assert isinstance(self.pilot, Pilot)
        where = torch.as_tensor(positions, dtype=torch.int64)
        if where.shape != (len(x_0),) or len(where.unique()) < len(where):
            raise ValueError(f"`positions` must be {len(x_0)} different integers, one for each image of `x_0`.")
        draws = self._draw(where.tolist(), sweep)
        control = self.pilot.control if self.estimator == "importance" else None
        images, known = None, torch.zeros(1, len(x_0), 2, dtype=torch.float64)
        if control is not None:
            images = control, control.prepare(x_0)
            known = control.total(images[1])
        prior = read_later(prior_kl(self.reverse, send(x_0, self.reverse.forward.betas.device)))
        terms, deviation, expected = self._stream(x_0, draws, where, conditioning, images)
        scores, identities = [], self.identities(x_0, positions, sweep)
        for i, process in enumerate((self.reverse, *self.also)):
            loss = not isinstance(process, ReverseProcess)
            own = i if i < len(known) else 0  # a process that the pilot did not know takes its first one's slopes
            share = 0.0 if loss and i >= len(known) else 1.0  # which are no loss's
            centred = terms[i] - share * deviation[own]
            weighted = (centred - share * expected[own]) * draws.weights
            first = draws.t == 0
            kl = torch.where(first, 0.0, weighted).sum(2) + share * known[own, :, :1]
            decoder = torch.where(first, weighted, 0.0).sum(2) + share * known[own, :, 1:]
            replicates = kl.shape[1]
            variance = (kl + decoder).var(1) / replicates if replicates > 1 else torch.full_like(kl[:, 0], torch.nan)
            scores.append(
                VLBScores(
                    kl=kl.mean(1),
                    decoder=decoder.mean(1),
                    prior=torch.zeros_like(known[0, :, 0]) if loss else prior().double(),
                    noise_variance=variance,
                    curve=curve_sums(draws.t.flatten(1), centred.flatten(1), len(self.reverse.forward)),
                    dims=x_0[0].numel(),
                    calls=self.calls_per_image,
                    **identities[i]._asdict(),
                )
            )
        return tuple(scores)

    def identities(self, x_0: Tensor, positions: Sequence[int], sweep: int = 0) -> list[Identity]:
        """What the scores of images are compared by, for `reverse` and for each of `also`; no network is called.

        Args:
            x_0: as in `score`, and so are the others.
            positions: of the images.
            sweep: number of the pass over the data.
        """
        assert isinstance(self.pilot, Pilot)
        sampled = self.estimator == "importance"
        plan = f"{self.estimator}/{self.calls_per_image}/{self.num_replicates if sampled else 1}"
        drawn = digest(f"{self.seed}/{sweep}"), digest(plan), self.pilot.digest if sampled else 0
        where, images = torch.as_tensor(positions, dtype=torch.int64), image_digests(x_0, self.reverse.levels)
        return [Identity(where, images, torch.tensor([drawn]), *own) for own in self._quantities]

    def _draw(self, positions: list[int], sweep: int) -> _Draws:
        generators = [image_generator(self.seed, position, sweep) for position in positions]
        if self.estimator == "full":
            t = torch.arange(self.calls_per_image).expand(len(positions), 1, -1)
            return _Draws(t, torch.ones(t.shape, dtype=torch.float64), generators)
        assert self.num_replicates is not None
        each = self.calls_per_image // self.num_replicates
        points = [systematic_points(each, g) for g in generators for _ in range(self.num_replicates)]
        t = self._sampler.at(torch.stack(points).reshape(len(positions), self.num_replicates, each))
        return _Draws(t, 1 / (each * self._sampler.probabilities[t]), generators)

    def _stream(
        self,
        x_0: Tensor,
        draws: _Draws,
        positions: Tensor,
        conditioning: Conditioning | None,
        known: tuple[ControlVariate, PreparedImages] | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Terms, and of the control variate the deviation and the expectation, in nats, each (V, B, R, M).

        All (image, t) pairs are one stream, chunked by size whatever the image they belong to.
        """
        flat, each = draws.t.flatten(), draws.t[0].numel()
        deviations, expectations = [], []

        def calls() -> Iterator[Callable[[], Tensor]]:
            for part in torch.arange(len(flat)).split(self._pairs_per_call(x_0)):
                image = part // each
                # One draw for each pair: a larger torch.randn is not the smaller ones in a row.
                noise = torch.empty(len(part), *x_0.shape[1:])
                for own, i in zip(noise, image.tolist(), strict=True):
                    own.normal_(generator=draws.generators[i])
                told, t = rows_of(conditioning, image), flat[part]
                pairs = x_0.index_select(0, image.to(x_0.device)), t, noise.to(x_0.dtype)
                read = launch_terms(self.model, (self.reverse, *self.also), *pairs, told, positions[image])
                if known is not None:  # while the device works
                    deviation, expectation = known[0].at(known[1], image, t, noise)
                    deviations.append(deviation)
                    expectations.append(expectation)
                yield read

        terms = list(one_behind(calls()))
        stacked = torch.cat(terms, dim=1).reshape(-1, *draws.t.shape)
        if known is None:
            zero = torch.zeros(1, *draws.t.shape, dtype=torch.float64)
            return stacked, zero, zero
        deviation, expectation = (
            torch.cat(parts, dim=1).reshape(-1, *draws.t.shape) for parts in (deviations, expectations)
        )
        return stacked, deviation, expectation


def estimate_vlb(
    model: Model,
    reverse: ReverseProcess,
    batches: Iterable[Batch],
    pilot: Pilot | Tensor | None = None,
    calls_per_image: int = 20,
    num_replicates: int | None = None,
    seed: int = 0,
    estimator: str = "importance",
    also: Sequence[ReverseProcess | Loss] = (),
    values_per_call: int | None = None,
    on_images: Callable[[int], object] | None = None,
) -> VLBEstimate:
    """Unbiased estimate of the bound over a data set, in bits/dim, with standard errors.

    Args:
        model: as in `VLBEstimator`, and so are the arguments not listed here.
        reverse: p, on the device to score on.
        batches: batches of x_0 (B, C, *) in [-1, 1] on its levels, each image exactly once; or pairs of such a batch
            and a dict of the network's further arguments, `(x_0, {"class_labels": labels})`.
        pilot: as in `VLBEstimator`. None fits one to the first images, at most 2048, by some 1000 network calls with
            draws of their own: given it, every image's estimate is unbiased and the errors hold. One that training
            images gave serves every later estimate, and is more precise where few images are scored.
        calls_per_image: as in `VLBEstimator`.
        num_replicates: as in `VLBEstimator`; None takes more where there are fewer than 20 images.
        seed: as in `VLBEstimator`.
        estimator: as in `VLBEstimator`; "full" visits its first 64 images twice.
        also: as in `VLBEstimator`; their estimates are in the result's `also`.
        values_per_call: as in `VLBEstimator`.
        on_images: called with the number of images just scored, for a progress bar.

    Raises:
        ValueError: no images, or one bare tensor; data outside [-1, 1], off its levels or not finite; as
            `VLBEstimator`.
        FloatingPointError: NaN or infinity from the network, with the timestep and the image.

    Source: the module's list.
    """
    known = torch.ones(len(reverse.forward)) if pilot is None else pilot
    scorer = VLBEstimator(
        model, reverse, known, calls_per_image, num_replicates, seed, estimator, also, values_per_call
    )
    first, images = _first(checked_batches(batches, reverse.levels), estimator == "importance" and pilot is None)
    if estimator == "importance":
        count = sum(len(x_0) for x_0, _ in first)
        fitted = _own_pilot(scorer, first) if pilot is None else pilot
        replicates = num_replicates or enough_replicates(calls_per_image, count)
        scorer = replace(scorer, pilot=fitted, num_replicates=replicates)
    parts: list[Scores] = []
    second: list[Scores] = []
    position = 0
    for x_0, conditioning in _groups(images, scorer):
        positions = range(position, position + len(x_0))
        parts = compacted([*parts, scorer.score(x_0, positions, conditioning)])
        twice = min(len(x_0), SECOND_DRAWS - position) if estimator == "full" else 0
        if twice > 0:
            rows = rows_of(conditioning, torch.arange(twice))
            second.append(scorer.score(x_0[:twice], positions[:twice], rows, sweep=1))
        position += len(x_0)
        if on_images is not None:
            on_images(len(x_0))
    return estimate_from_scores(merge_scores(parts), merge_scores(second) if second else ())


def _first(batches: Iterator[Told], for_pilot: bool) -> tuple[list[Told], Iterator[Told]]:
    """The first batches, with as many images as a pilot has use for or as are not few, and all batches."""
    first: list[Told] = []
    for batch in batches:
        first.append(batch)
        enough = max_pilot_images(batch[0][0].numel()) if for_pilot else MIN_DEGREES
        if sum(len(x_0) for x_0, _ in first) >= enough:
            break
    if not first:
        raise ValueError("`batches` holds no images: there is nothing to score.")
    return first, itertools.chain(first, batches)


def _own_pilot(scorer: VLBEstimator, first: list[Told]) -> Pilot:
    """A pilot of the first images that are to be scored, those of one kind."""
    kind = first[0][0].shape[1:], first[0][1].keys()
    alike = list(itertools.takewhile(lambda own: (own[0].shape[1:], own[1].keys()) == kind, first))
    limit = max_pilot_images(first[0][0][0].numel())
    told = {name: torch.cat([rows[name] for _, rows in alike])[:limit] for name in kind[1]}
    x_0 = torch.cat([x_0 for x_0, _ in alike])[:limit]
    return fit_pilot(
        scorer.model,
        scorer.reverse,
        x_0,
        seed=scorer.seed,
        conditioning=told,
        also=scorer.also,
        values_per_call=scorer.values_per_call,
    )


def _groups(batches: Iterable[Told], scorer: VLBEstimator) -> Iterator[Told]:
    """The images in groups that fill network calls, with their conditioning."""
    for x_0, conditioning in batches:
        for index in torch.arange(len(x_0)).split(scorer.images_per_unit(x_0)):
            yield x_0[index.to(x_0.device)], rows_of(conditioning, index)
