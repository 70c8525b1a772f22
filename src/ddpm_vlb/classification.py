r"""Which class an image is of, by the bounds of a class-conditional network: log p(c | x_0), with standard errors.

With L_c the bound of the network that is told the class c, and pi_c the classes' prior probabilities:

1. log p(c | x_0) is taken for log pi_c - L_c less its log sum exp over the classes: what the gaps of these bounds have
   in common cancels, and the rest of them stays in it
2. every draw (t, epsilon) of an image serves all its classes, so that what these have in common cancels too, and
   L_c - L_b is the mean over draws of (L_{c,t} - L_{b,t}) / p_t, for b the likeliest class
3. p_t is proportional to the root mean square of L_t's spread over the classes, which is at other t than L_t
4. successive halving: after each round of equally many draws the likelier half of the classes goes on; a class is
   compared with b on the draws that it had
5. t is where the distribution function of p_t reaches frac(u + m / golden ratio), m = 0, 1, ...: any draws in a row
   are spread evenly. The variance of a round's mean over m draws is that of the differences between neighbours in t,
   sum (e_{i+1} - e_i)^2 / (2 m (m - 1)); for equation 1 by the delta method, e_i its gradient times the differences

The draws depend on the seed and on the image itself: an image has the same posterior in any batch.

Sources: Li et al. 2023, "Your diffusion model is secretly a zero-shot classifier", section 3; Clark & Jaini 2023,
"Text-to-image diffusion models are zero-shot classifiers"; Karnin et al. 2013, "Almost optimal exploration in
multi-armed bandits" (halving); Wolter 2007, "Introduction to variance estimation", section 8.2 (neighbours).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from .checks import Conditioning, Model, check_data, check_model
from .counter_noise import counter_keys, counter_normal
from .devices import send
from .evaluation import digest, launch_terms, one_behind, rows_of, values_in_a_call
from .guidance import classes_of
from .pilot import Pilot, probes, shares_by_size
from .reverse_process import ReverseProcess
from .timestep_samplers import ImportanceTimesteps

Classes = Sequence[int] | Tensor | Conditioning
"""Labels, or the network's further arguments by name, each with one row for each class."""
FEWEST_DRAWS = 2  # in a round, without which there is no standard error
USUAL_DRAWS = 4
CLASSES_IN_A_PROBE = 4  # what a class differs by shows in a few of a thousand, at more images
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True, eq=False)
class ClassPosterior:
    """The posterior over the classes of some images.

    Args:
        log_probabilities: log p(c | x_0), (B, classes), float64; a row's exponentials sum to 1.
        log_probabilities_se: its standard errors from the draws of t and noise, (B, classes), of fewer degrees of
            freedom than the class had draws. Where they are not far below 1 the probabilities are too sure of
            themselves: ask for more calls. The bounds' gaps are not in them.
        draws: how many draws each class had, (B, classes).
        pilot: p_t, and its network calls in `num_calls`, which are once for all images and not among `calls`.
    """

    log_probabilities: Tensor
    log_probabilities_se: Tensor = field(repr=False)
    draws: Tensor = field(repr=False)
    pilot: Pilot = field(repr=False)

    @property
    def calls(self) -> Tensor:
        """Network calls of each image, (B,)."""
        return self.draws.sum(1)


def class_posterior(
    model: Model,
    reverse: ReverseProcess,
    x_0: Tensor,
    classes: Classes,
    calls_per_image: int | None = None,
    prior: Sequence[float] | Tensor | None = None,
    pilot: Pilot | None = None,
    halving: bool = True,
    seed: int = 0,
    guidance_scale: float = 1.0,
    values_per_call: int | None = None,
) -> ClassPosterior:
    """The posterior over classes by the bounds of a class-conditional network.

    Args:
        model: the network, called as model(x_t, timesteps, class_labels=...), or with the arguments of `classes`;
            returns a tensor or an object with `.sample`.
        reverse: p, on the device to score on; decides on clipping and the decoder.
        x_0: images (B, C, *) in [-1, 1] on the levels.
        classes: at least 2 different labels; or a dict of the network's further arguments, each a tensor with one row
            for each class, such as embeddings of captions.
        calls_per_image: network calls that an image may take, never exceeded; None takes 4 draws a round, some 8 calls
            for each class. At least 2 draws a round.
        prior: pi, probabilities of the classes, positive, normalised here; None for equal ones.
        pilot: from `fit_class_pilot`, best of other images; None fits one to these, by some 1000 network calls beside
            `calls_per_image`. The draws are others, so that the estimates are unbiased given it.
        halving: drop the less likely half of the classes after each round; else all have all draws.
        seed: with an image it determines its draws.
        guidance_scale: 1, without guidance: what is scored is the network as it is told each class.
        values_per_call: as in `evaluate_vlb`.

    Raises:
        ValueError: classes that the network does not have, fewer than 2 or the same one twice; too few calls; a prior
            or pilot of another length or type; guidance; data and networks as `evaluate_vlb` refuses them.
        FloatingPointError: NaN or infinity from the network, with the timestep and the image.

    Source: the module's list.
    """
    if guidance_scale != 1:
        raise ValueError(
            f"`guidance_scale` must be 1, but got {guidance_scale!r}: what is scored is the network as it is told "
            "each class, and a guided one is another model. Leave it out."
        )
    if not (pilot is None or isinstance(pilot, Pilot)):
        raise ValueError(
            f"`pilot` must come from `fit_class_pilot`, but got a {type(pilot).__name__}: wrap p_t, `Pilot(tensor)`."
        )
    told = _checked(model, reverse, x_0, classes)
    number = len(next(iter(told.values())))
    rounds = _rounds(number, halving, calls_per_image)
    log_prior = _log_prior(prior, number)
    if pilot is None:
        pilot = fit_class_pilot(model, reverse, x_0, classes, seed=seed, values_per_call=values_per_call)
    sampler = ImportanceTimesteps(pilot.probabilities)
    if sampler.num_timesteps != len(reverse.forward):
        raise ValueError(f"`pilot` must have {len(reverse.forward)} probabilities, not {sampler.num_timesteps}.")
    keys, points = _draws(x_0, seed, sum(count for count, _ in rounds))
    t = sampler.at(points)
    weighted = torch.zeros(len(x_0), number, t.shape[1], dtype=torch.float64)
    draws = torch.zeros(len(x_0), number, dtype=torch.int64)
    alive, done = torch.arange(number).expand(len(x_0), -1), 0
    for count, kept in rounds:
        alive = _likeliest(weighted[:, :, :done].mean(2) - log_prior, alive, kept) if done else alive
        pairs = _pairs(alive, done, count)
        terms = _terms(model, reverse, x_0, told, pairs, keys, t, values_per_call)
        image, which, draw = pairs
        weighted[image, which, draw] = terms / sampler.probabilities[t[image, draw]]
        done += count
        draws.scatter_(1, alive, done)
    log_probabilities, variance = _posterior(weighted, draws, log_prior, points, rounds)
    return ClassPosterior(log_probabilities, variance.sqrt(), draws, pilot)


def fit_class_pilot(
    model: Model,
    reverse: ReverseProcess,
    x_0: Tensor,
    classes: Classes,
    num_calls: int = 1024,
    seed: int = 0,
    uniform_fraction: float = 0.005,
    values_per_call: int | None = None,
) -> Pilot:
    """Where classes differ: p_t for `class_posterior`, best from *other* images than those to be classified.

    Args:
        model: the network, as in `class_posterior`.
        reverse: p.
        x_0: pilot images (N, C, *); their classes need not be known.
        classes: as in `class_posterior`.
        num_calls: network calls to spend, at least those of one probe of each step: 4 classes of an image at some 60
            steps, fewer on a short chain.
        seed: of the pilot's noise and choice of images and classes.
        uniform_fraction: share of p_t that is uniform, in (0, 1].
        values_per_call: as in `evaluate_vlb`.

    Raises:
        ValueError: an impossible number, or as `class_posterior`.
        FloatingPointError: as `class_posterior`.

    Source: the module's list, 3.
    """
    told = _checked(model, reverse, x_0, classes)
    if not 0 < uniform_fraction <= 1:
        raise ValueError(f"`uniform_fraction` must lie in (0, 1], but got {uniform_fraction!r}.")
    number = len(next(iter(told.values())))
    group = min(number, CLASSES_IN_A_PROBE)
    knots, t = probes(len(reverse.forward), num_calls // group)
    if num_calls < group * len(t):
        raise ValueError(f"`num_calls` must be at least {group * len(t)}, but got {num_calls!r}.")
    generator = torch.Generator().manual_seed(digest(f"class pilot/{seed}") % 2**63)
    image = torch.randperm(len(x_0), generator=generator)[torch.arange(len(t)) % len(x_0)]
    which = torch.rand(len(t), number, generator=generator).argsort(1)[:, :group]
    probe = torch.arange(len(t))
    pairs = probe.repeat_interleave(group), which.flatten(), torch.zeros(which.numel(), dtype=torch.int64)
    keys = counter_keys(digest(f"class pilot's noise/{seed}"), probe)[:, None]
    chosen = x_0[image.to(x_0.device)]
    terms = _terms(model, reverse, chosen, told, pairs, keys, t[:, None], values_per_call).reshape(-1, group)
    shares = shares_by_size(reverse, terms.std(1)[None], knots, t, uniform_fraction)
    return Pilot(shares, None, terms.numel())


def _checked(model: Model, reverse: ReverseProcess, x_0: Tensor, classes: Classes) -> dict[str, Tensor]:
    """The network's further arguments, one row for each class."""
    check_model(model)
    check_data(x_0, reverse.levels)
    named = classes if isinstance(classes, Mapping) else {"class_labels": _as_labels(classes)}
    told: dict[str, Any] = dict(named)
    first = next(iter(told.values()), None)
    number = len(first) if isinstance(first, Tensor) and first.ndim else 0
    if number < 2:
        raise ValueError(
            "`classes` must be at least 2 integer labels, or a dict of tensors with a row for each class, but got "
            f"{classes!r:.80}."
        )
    for name, own in told.items():
        if not isinstance(own, Tensor) or own.ndim == 0 or len(own) != number:
            got = f"the shape {tuple(own.shape)}" if isinstance(own, Tensor) else type(own).__name__
            raise ValueError(f"`classes[{name!r}]` must have one row for each of {number} classes, not {got}.")
    seen: dict[int, int] = {}
    for i in range(number):
        first_such = seen.setdefault(digest(*(own[i] for own in told.values())), i)
        if first_such != i:
            raise ValueError(f"`classes` must differ, but number {i} is number {first_such} again: leave one out.")
    labels = _as_labels(told.get("class_labels"))
    if labels is not None:
        _check_labels(model, labels)
        told["class_labels"] = labels
    return told


def _as_labels(rows: Any) -> Tensor | None:
    """Integers in one dimension as an embedding takes them, int64; None for anything else."""
    try:
        labels = torch.as_tensor(rows)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None
    if labels.ndim != 1 or labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
        return None
    return labels.long()


def _check_labels(model: Model, labels: Tensor) -> None:
    """Refuse labels that the network does not have, of which only its configuration tells."""
    config = getattr(getattr(model, "module", model), "config", None)
    if not isinstance(config, Mapping):
        return
    number = classes_of(config)
    if number is None and config.get("class_embed_type") is None and "num_class_embeds" in config:
        raise ValueError("`classes` were given, but this network is unconditional (`num_class_embeds` is None).")
    if number is not None and not 0 <= int(labels.min()) <= int(labels.max()) < number:
        raise ValueError(
            f"`classes` must lie in 0 .. {number - 1}, which this network has, but got {labels.tolist()[:8]}."
        )


def _rounds(number: int, halving: bool, calls_per_image: int | None) -> list[tuple[int, int]]:
    """Draws and classes of each round: equally many draws, and what is left over of the calls in the last."""
    if isinstance(calls_per_image, bool) or not isinstance(calls_per_image, (Integral, NoneType)):
        raise ValueError(f"`calls_per_image` must be an integer, or None, but got {calls_per_image!r:.80}.")
    alive = [number]
    while halving and alive[-1] > 2:
        alive.append(-(-alive[-1] // 2))
    calls = USUAL_DRAWS * sum(alive) if calls_per_image is None else calls_per_image
    count = calls // sum(alive)
    if count < FEWEST_DRAWS:
        raise ValueError(
            f"`calls_per_image` must be at least {FEWEST_DRAWS * sum(alive)} for {number} classes, two draws of each "
            f"in {len(alive)} round(s), but got {calls_per_image!r}."
        )
    left = (calls - count * sum(alive)) // alive[-1]
    return [(count, own) for own in alive[:-1]] + [(count + left, alive[-1])]


def _log_prior(prior: Sequence[float] | Tensor | None, number: int) -> Tensor:
    if prior is None:
        return torch.full((number,), -math.log(number), dtype=torch.float64)
    pi = torch.as_tensor(prior).detach().cpu().double()
    if pi.shape != (number,) or not bool((pi.isfinite() & (pi > 0)).all()):
        raise ValueError(
            f"`prior` must be {number} positive finite numbers, one for each class, but got {prior!r:.80}. Leave a "
            "class that cannot be out of `classes`."
        )
    return (pi / pi.sum()).log()


def _draws(x_0: Tensor, seed: int, number: int) -> tuple[Tensor, Tensor]:
    """Keys of the noise (B, M) and points where to look p_t's distribution function up, (B, M), from the images."""
    own = torch.tensor([digest(image) for image in x_0.cpu()])
    own = counter_keys(digest(f"classes/{seed}"), own)
    keys = torch.stack([counter_keys(m, own) for m in range(number + 1)], dim=1)
    offset = ((keys[:, :1] >> 11) & (2**53 - 1)).double() / 2**53
    return keys[:, 1:], (offset + _GOLDEN * torch.arange(number, dtype=torch.float64)) % 1


def _likeliest(bounds: Tensor, alive: Tensor, kept: int) -> Tensor:
    """The `kept` of the classes that are in (B, n) with the lowest bounds (B, classes)."""
    return alive.gather(1, bounds.gather(1, alive).argsort(dim=1, stable=True)[:, :kept])


def _pairs(alive: Tensor, done: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Image, class and number of the draw of each network call of a round; the classes of a draw stand together."""
    images, classes = alive.shape
    image = torch.arange(images).repeat_interleave(count * classes)
    draw = (done + torch.arange(count)).repeat_interleave(classes).repeat(images)
    return image, alive[:, None].expand(-1, count, -1).flatten(), draw


def _terms(
    model: Model,
    reverse: ReverseProcess,
    x_0: Tensor,
    told: dict[str, Tensor],
    pairs: tuple[Tensor, Tensor, Tensor],
    keys: Tensor,
    t: Tensor,
    values_per_call: int | None,
) -> Tensor:
    """L_t of each pair in nats, (P,): noise from keys (B, M), at t (B, M)."""
    device, shape = reverse.forward.betas.device, x_0.shape[1:]
    chunk = max(1, values_in_a_call(values_per_call, device) // x_0[0].numel())

    def calls() -> Iterator[Callable[[], Tensor]]:
        for image, which, draw in zip(*(own.split(chunk) for own in pairs), strict=True):
            noise = counter_normal(send(keys[image, draw], device), shape).to(x_0.dtype)
            given = x_0[image.to(x_0.device)], t[image, draw], noise, rows_of(told, which), image
            yield launch_terms(model, (reverse,), *given)

    return torch.cat([own[0] for own in one_behind(calls())])


def _posterior(
    weighted: Tensor, draws: Tensor, log_prior: Tensor, points: Tensor, rounds: list[tuple[int, int]]
) -> tuple[Tensor, Tensor]:
    """Equation 1 and its variance, (B, classes), from L_t / p_t (B, classes, M), 0 where a class had no draw."""
    mean = torch.where(draws == draws.amax(1, keepdim=True), weighted.mean(2) - log_prior, torch.inf)
    best = mean.argmin(1)[:, None, None].expand(-1, 1, weighted.shape[2])
    had = torch.arange(weighted.shape[2]) < draws[:, :, None]
    # Equation 2's draws, each over how many there were: they add up to L_c - L_b.
    parts = torch.where(had, weighted - weighted.gather(1, best), 0.0) / draws[:, :, None]
    log_probabilities = (log_prior - parts.sum(2)).log_softmax(1)
    influence = (log_probabilities.exp()[:, :, None] * parts).sum(1, keepdim=True) - parts
    variance, done = torch.zeros_like(log_probabilities), 0
    for count, _ in rounds:
        order = points[:, done : done + count].argsort(1)[:, None] + done
        sorted_by_t = influence.gather(2, order.expand(-1, influence.shape[1], -1))
        variance += sorted_by_t.diff(dim=2).square().sum(2) * count / (2 * (count - 1))
        done += count
    return log_probabilities, variance
