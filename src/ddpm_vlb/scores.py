r"""Scores of images, mergeable and savable, and the estimate of a data set's bound that they give.

1. the estimate is the mean over images of L_T + sum_t L_t, each image's part estimated without bias
2. noise standard error: from the variances of the images' estimates given the image. Image standard error: from the
   spread between images, less the part that noise explains. The two are independent; their squares add.
3. the L_t curve: at each step the mean over all draws there; images are the independent units of its error
4. two estimates of the same images are compared image by image: the mean of the differences, their spread over the
   root of the number of images, and Student's t of the two; common draws make the spread small

Sources: Owen 2013, "Monte Carlo theory", chapters 2 and 8.6 (common random numbers); Cochran 1977, "Sampling
techniques", sections 2.11 and 10.4; Student 1908, "The probable error of a mean".
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from .identities import Identity, unpaired
from .students_t import two_sided

SURE = 0.05  # what is less likely between equals is told


@dataclass(frozen=True, eq=False)
class VLBScores:
    """What is known of some images' bounds: mergeable, savable, in nats and float64.

    Of a training loss in `also` the same numbers are its own: `kl` and `decoder` add up to its mean over t.

    Args:
        positions: the images' positions in the data, (N,), int64.
        kl: estimates of sum_{t>0} L_t, (N,).
        decoder: estimates of L_0, (N,).
        prior: L_T, (N,).
        noise_variance: unbiased estimates of the variance of kl + decoder given the image, NaN where unknown, (N,).
        curve: sums by step for the L_t curve, (6, T).
        dims: number of dimensions D of one image.
        calls: network calls for each image.
        images: digests of the images themselves, (N,), int64.
        draws: digests of the seed, of the kind and number of draws, and of the pilot, a row for each sweep, (S, 3).
        chain: a digest of the chain.
        levels: of the data, whose bins the bound is of; 0: a density.
        loss: name of the training loss; "" of the bound.
    """

    positions: Tensor
    kl: Tensor
    decoder: Tensor
    prior: Tensor
    noise_variance: Tensor
    curve: Tensor
    dims: int
    calls: int
    images: Tensor
    draws: Tensor
    chain: int = 0
    levels: int = 0
    loss: str = ""

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def identity(self) -> Identity:
        """What they are compared by."""
        return Identity(*(getattr(self, name) for name in Identity._fields))

    @classmethod
    def merge(cls, parts: Sequence["VLBScores"]) -> "VLBScores":
        """The scores of different images together, in the order of the data.

        Args:
            parts: scores of one sweep, each image in one of them.

        Raises:
            ValueError: no parts, an image in two of them, or parts of different sweeps.
        """
        if not parts:
            raise ValueError("There are no scores to merge: no images were scored.")
        if len({(own.calls, str(own.draws.tolist()), *_kind(own)) for own in parts}) > 1:
            raise ValueError(
                "The scores to merge differ in image size, network calls, chain, levels, loss or draws: they are of "
                "other runs."
            )
        positions = torch.cat([part.positions for part in parts])
        order = positions.argsort()
        if bool((positions[order].diff() == 0).any()):
            raise ValueError("An image is in two of the scores to merge: it would count twice.")
        rows = {
            name: torch.cat([getattr(part, name) for part in parts])[order]
            for name in ("positions", "kl", "decoder", "prior", "noise_variance", "images")
        }
        curve = torch.stack([part.curve for part in parts]).sum(0) if len(parts) > 1 else parts[0].curve
        return replace(parts[0], **rows, curve=curve)  # type: ignore[arg-type]

    @classmethod
    def combine(cls, sweeps: Sequence["VLBScores"]) -> "VLBScores":
        """Several sweeps over the same images as one, each weighted by its network calls.

        The L_t curve is that of the sweep with the most calls.

        Args:
            sweeps: merged scores of independent sweeps over the same images.

        Raises:
            ValueError: no sweeps, or sweeps that scored different images, or other than the same bound or loss.
        """
        if not sweeps:
            raise ValueError("There are no sweeps to combine.")
        same = [(own.positions.tolist(), own.images.tolist()) for own in sweeps]
        if any(own != same[0] for own in same):
            raise ValueError("The sweeps to combine scored different images.")
        if len(set(map(_kind, sweeps))) > 1:
            raise ValueError("The sweeps to combine differ in image size, chain, levels or loss.")
        calls = sum(sweep.calls for sweep in sweeps)
        shares = [sweep.calls / calls for sweep in sweeps]
        kl, decoder = (
            torch.stack([share * getattr(sweep, name) for share, sweep in zip(shares, sweeps)]).sum(0)
            for name in ("kl", "decoder")
        )
        variance = torch.stack([share**2 * sweep.noise_variance for share, sweep in zip(shares, sweeps)]).sum(0)
        largest = max(sweeps, key=lambda sweep: sweep.calls)
        draws = torch.cat([sweep.draws for sweep in sweeps])
        return replace(largest, kl=kl, decoder=decoder, noise_variance=variance, calls=calls, draws=draws)

    def with_second_draw(self, second: "VLBScores") -> "VLBScores":
        """The same scores with the noise variance that a second, independent draw on some of the images shows.

        Args:
            second: the second draw's scores.

        Raises:
            ValueError: it is of images that are not among these, or these are not in order, or not of the same bound
                or loss.
        """
        where = torch.searchsorted(self.positions, second.positions).clamp(max=len(self) - 1)
        if _kind(self) != _kind(second):
            raise ValueError("The second draw differs in image size, chain, levels or loss.")
        if any(not torch.equal(own[where], its) for own, its in zip(self.identity[:2], second.identity[:2])):
            raise ValueError("The second draw is of images that are not among the scored ones (in order of position).")
        gap = (self.kl + self.decoder)[where] - second.kl - second.decoder
        return replace(self, noise_variance=self.noise_variance.index_put((where,), gap.square() / 2))

    def estimate(self) -> "VLBEstimate":
        """The estimate of the data set's bound, in bits/dim, or of its mean training loss."""
        unit = 1.0 if self.loss else 1 / (self.dims * math.log(2))
        per_step = self.curve.shape[1] if self.loss else unit  # a loss's terms are T-ths of it
        kl, decoder, prior = self.kl * unit, self.decoder * unit, self.prior * unit
        per_image = kl + decoder + prior
        noise_se, image_se = standard_errors(per_image, self.noise_variance * unit**2)
        mean, error = _curve(self.curve)
        return VLBEstimate(
            bits_per_dim=float(per_image.mean()),
            noise_se=noise_se,
            image_se=image_se,
            prior=float(prior.mean()),
            kl=float(kl.mean()),
            decoder=float(decoder.mean()),
            per_image=per_image,
            per_image_se=self.noise_variance.sqrt() * unit,
            network_calls_per_image=self.calls,
            term_mean=mean * per_step,
            term_se=error * per_step,
            unit=f"of {self.loss}" if self.loss else "bits/dim",
            identity=self.identity,
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Everything as tensors, to be saved."""
        state = {f.name: getattr(self, f.name) for f in fields(self)}
        name = torch.tensor(list(self.loss.encode()), dtype=torch.uint8)
        return {key: torch.as_tensor(value) for key, value in {**state, "loss": name}.items()}

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor]) -> "VLBScores":
        """The scores of a saved state.

        Args:
            state: what `state_dict` returned.

        Raises:
            ValueError: of an earlier version, which did not save all that a difference asks for.
        """
        missing = [f.name for f in fields(cls) if f.name not in state]
        if missing:
            raise ValueError(
                f"The saved scores must have {missing}, which those of an earlier version lack: score the images anew."
            )
        numbers = {name: int(state[name]) for name in ("dims", "calls", "chain", "levels")}
        return cls(**{**state, **numbers, "loss": bytes(state["loss"].tolist()).decode()})  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class VLBEstimate:
    """An estimate of the bound over a data set, in bits/dim (of density, where the decoder is continuous).

    `first - second` is the `VLBDifference` of two bounds, or of the same loss twice, of the same images; with the same
    draws, which two chains cannot have.

    Args:
        bits_per_dim: the estimate, the mean over images.
        noise_se: its standard error from the draws of t and noise.
        image_se: its standard error from the choice of images, NaN for one image; 0 where the noise explains all of
            the images' spread, which then cannot be seen at this number of calls.
        prior: the part of L_T.
        kl: the part of the L_t, t > 0.
        decoder: the part of L_0.
        per_image: each image's estimate, in the order of the data, (N,).
        per_image_se: its standard error from the draws, (N,), of one degree of freedom less than the image had
            replicates: for an error bar of each image give it ten or more. NaN where the full loop made one draw.
        network_calls_per_image: calls that each image's estimate took.
        term_mean: mean L_t at each chain index, NaN where none was drawn, (T,).
        term_se: its standard error from t, noise and images, NaN where fewer than two images were drawn, (T,).
        also: the estimates of the further reverse processes and losses, in their order.
        unit: "bits/dim", or "of " a loss by name, whose numbers are its own: `bits_per_dim` its mean over t,
            `term_mean` the loss at each t.
        identity: what it is an estimate of, and with which draws.
    """

    bits_per_dim: float
    noise_se: float
    image_se: float
    prior: float
    kl: float
    decoder: float
    per_image: Tensor = field(repr=False)
    per_image_se: Tensor = field(repr=False)
    network_calls_per_image: int
    term_mean: Tensor = field(repr=False)
    term_se: Tensor = field(repr=False)
    also: tuple["VLBEstimate", ...] = ()
    unit: str = "bits/dim"
    identity: Identity | None = field(default=None, repr=False)

    def __str__(self) -> str:
        places = 3 if self.unit == "bits/dim" else _places(self.noise_se)
        value, noise, images = (f"{own:.{places}f}" for own in (self.bits_per_dim, self.noise_se, self.image_se))
        return f"{value} +- {noise} (noise) +- {images} (images) {self.unit}, {self.num_images} images"

    def __sub__(self, other: "VLBEstimate") -> "VLBDifference":
        """This one less another of the same images: negative where this one is the better."""
        if self.identity is None or other.identity is None:
            reason: str | None = "an identity, which one made by hand lacks: take those of `VLBScores.estimate`"
        else:
            reason = unpaired(self.identity, other.identity)
        if reason is not None:
            raise ValueError(f"`first - second` must be of estimates with {reason}.")
        gap = self.per_image - other.per_image
        spread = float(gap.std()) if len(gap) > 1 else math.nan
        return VLBDifference(float(gap.mean()), spread / math.sqrt(len(gap)), gap, self.unit)

    @property
    def num_images(self) -> int:
        """Number of images scored."""
        return len(self.per_image)

    @property
    def nats_per_dim(self) -> float:
        """The estimate of a bound in nats/dim, the unit for the density of continuous data; a loss has none."""
        if self.unit != "bits/dim":
            raise ValueError(
                f"`nats_per_dim` must be of a bound, but this estimate is {self.unit}: its mean is `bits_per_dim`, in "
                "the loss's own unit."
            )
        return self.bits_per_dim * math.log(2)


@dataclass(frozen=True, eq=False)
class VLBDifference:
    """`first - second` of two `VLBEstimate`s of the same images with the same draws: below 0 the first is the better.

    Args:
        bits_per_dim: the mean over images of the first's estimate less the second's.
        se: its standard error, the spread of the images' differences over the root of their number. The noise of the
            draws and the choice of images both move these differences, so that it answers "which is better on images
            like these"; for these very images alone it is too large, never too small. NaN for one image.
        per_image: each image's difference, (N,).
        unit: of the estimates.

    Source: the module's list, 4.
    """

    bits_per_dim: float
    se: float
    per_image: Tensor = field(repr=False)
    unit: str = "bits/dim"

    @property
    def p_value(self) -> float:
        """How likely two equals differ by as much, either way: Student's t, N - 1 degrees; NaN for one image."""
        gap = abs(self.bits_per_dim)
        t = 0.0 if gap == 0 else gap / self.se if self.se else math.inf
        return two_sided(t, len(self.per_image) - 1)

    @property
    def verdict(self) -> str:
        """Of the first: "better" or "worse" where `p_value` is below 0.05, else "cannot be told"."""
        if self.p_value < SURE:
            return "better" if self.bits_per_dim < 0 else "worse"
        return "cannot be told"

    def __str__(self) -> str:
        places = _places(self.se)
        return f"{self.bits_per_dim:+.{places}f} +- {self.se:.{places}f} {self.unit}: {self.verdict}"


def _places(error: float) -> int:
    """Decimal places that show two digits of an error, at least 3."""
    return max(3, 1 - math.floor(math.log10(error))) if 0 < error < math.inf else 3


def _kind(own: VLBScores) -> tuple[object, ...]:
    """What scores of one thing have in common."""
    return own.dims, own.curve.shape, own.chain, own.levels, own.loss


Scores = tuple[VLBScores, ...]
"""Of the same images: one for the estimator's `reverse`, and one for each of `also`."""


def merge_scores(parts: Sequence[Scores]) -> Scores:
    """`VLBScores.merge` for each reverse process.

    Args:
        parts: what `VLBEstimator.score` returned for different images, or `Validation.score` for none.

    Raises:
        ValueError: as `VLBScores.merge`.
    """
    parts = [own for own in parts if own]  # a process that had no image has none
    if not parts:
        raise ValueError("There are no scores to merge: no images were scored.")
    return tuple(VLBScores.merge(own) for own in zip(*parts, strict=True))


def compacted(parts: list[Scores], limit: int = 32) -> list[Scores]:
    """The parts, merged into one where they are more than `limit`: each holds a curve of T steps.

    Args:
        parts: scores of different images.
        limit: how many may stay apart.
    """
    return [merge_scores(parts)] if len(parts) > limit else parts


def estimate_from_scores(scores: Scores, second: Scores = ()) -> VLBEstimate:
    """The estimate of a scorer's merged scores: the first for its `reverse`, the others for `also`.

    Args:
        scores: merged scores, one for each reverse process.
        second: those of the full loop's second draw, if there was one.
    """
    if second:
        scores = tuple(own.with_second_draw(again) for own, again in zip(scores, second))
    first, *others = (own.estimate() for own in scores)
    return replace(first, also=tuple(others))


def standard_errors(per_image: Tensor, noise_variance: Tensor) -> tuple[float, float]:
    """The standard errors of the mean from the draws and from the choice of images (equation 2).

    Args:
        per_image: each image's estimate, (N,).
        noise_variance: unbiased estimates of its variance given the image, NaN where unknown, (N,).
    """
    images, noise = len(per_image), noise_variance.nanmean()
    spread = per_image.var() - noise if images > 1 else torch.tensor(float("nan"))
    return float((noise / images).sqrt()), float((spread.clamp(min=0) / images).sqrt())


def curve_sums(t: Tensor, terms: Tensor, steps: int) -> Tensor:
    """Sums over images of C, S, C^2, C S, S^2 and [C > 0] at each step, C draws of an image there with the sum S.

    Args:
        t: chain indices of each image's draws, (B, N).
        terms: L_t of each draw, (B, N).
        steps: T.
    """
    image = torch.arange(len(t))[:, None].expand_as(t)
    cell, inverse = torch.unique(image * steps + t, return_inverse=True)
    count = torch.bincount(inverse.flatten(), minlength=len(cell)).double()
    total = torch.zeros_like(count).index_add_(0, inverse.flatten(), terms.flatten())
    each = torch.stack([count, total, count.square(), count * total, total.square(), torch.ones_like(count)])
    return torch.zeros(6, steps, dtype=torch.float64).index_add_(1, cell % steps, each)


def _curve(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Mean L_t and its standard error; the draws of one image share x_0, so images are the independent units."""
    count, total, count_2, cross, total_2, images = sums
    mean = total / count
    residual = (total_2 - 2 * mean * cross + mean.square() * count_2).clamp(min=0)  # sum of (S - mean C)^2
    return mean, torch.where(images > 1, (residual * images / (images - 1)).sqrt() / count, torch.nan)
