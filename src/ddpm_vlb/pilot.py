r"""The pilot run: where the bound of a data set needs its network calls, and what is known of it without any.

1. p_t proportional to the root mean square of L_t less the control variate: g_t = (SNR_{t-1} - SNR_t) / 2 times a
   smooth curve through some 64 steps. On a chain of uneven steps L_t itself jumps; what is left of it without g_t, a
   mean squared error, does not.
2. control variate C_t = s_t (|x_0 - x_0_hat|^2 / m_t - 1) + r_t (|epsilon|^2 - d) / sqrt(2 d), with x_0_hat the linear
   denoiser of a Gaussian model of the data, m_t its mean squared error over the pilot's images, and epsilon on the d
   values that lie inside the outer levels (at an outer level the bin is open, and the noise matters little)
3. E[C_t | x_0] = s_t (E|x_0 - x_0_hat|^2 / m_t - 1) is known in closed form, and so is its sum over t; the estimate of
   sum_t L_t subtracts C_t from every draw and adds that sum back

The slopes s_t and r_t are fitted to the pilot's draws, of which the estimate uses none. Whatever the pilot finds, and
on whatever images, the estimate made with it is unbiased given the pilot; a good one makes it precise.

Sources: Nichol & Dhariwal 2021, eq. 18; Owen 2013, "Monte Carlo theory", sections 8.9 (regression control variates)
and 9.2 (mixtures).
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import Conditioning, Model, check_conditioning, check_data, check_model, check_same_chain
from .evaluation import Loss, digest, image_generator, launch_terms, one_behind, rows_of, values_in_a_call
from .gaussian_model import GaussianModel
from .reverse_process import ReverseProcess

BANDWIDTH = 2.0  # of the smoothing, in knots
MIN_CALLS_FOR_SLOPES = 128  # below, three coefficients for each neighbourhood of steps are mostly noise


class PreparedImages(NamedTuple):
    """What the control variate needs of images: z (B, E), their energies (B, G), 1 for inner values (B, D), else 0."""

    coefficients: Tensor
    energies: Tensor
    inner: Tensor


@dataclass(frozen=True, eq=False)
class ControlVariate:
    """The quantity of equation 2, whose expectation over epsilon, and whose sum over t, are known.

    Args:
        gaussian: the model of the data.
        alphas_cumprod: alphabar_t of the chain, (T,), float64.
        levels: number of levels of the data; None for continuous data.
        scale: m_t, (T,), positive.
        slopes: s_t and r_t in nats for each reverse process, (V, T, 2).
    """

    gaussian: GaussianModel
    alphas_cumprod: Tensor
    levels: int | None
    scale: Tensor
    slopes: Tensor
    group: Tensor = field(init=False, repr=False)
    dims: Tensor = field(init=False, repr=False)
    bias: Tensor = field(init=False, repr=False)
    spread: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        eigenvalues, group, dims = self.gaussian.grouped()
        abar = self.alphas_cumprod[:, None]
        gain = abar.sqrt() * eigenvalues / (abar * eigenvalues + 1 - abar)
        # The factors of z and of e in equation 3 of the Gaussian model, (T, G).
        tables = {"group": group, "dims": dims, "bias": 1 - gain * abar.sqrt(), "spread": gain * (1 - abar).sqrt()}
        for name, table in tables.items():
            object.__setattr__(self, name, table)

    def prepare(self, x_0: Tensor) -> PreparedImages:
        """What `at` and `total` need of images.

        Args:
            x_0: data (B, C, *).
        """
        x_0 = x_0.detach().cpu().double()
        z = self.gaussian.coefficients(x_0 - self.gaussian.mean)
        outer = torch.inf if self.levels is None else 1 - 1 / (self.levels - 1)
        return PreparedImages(z, self._grouped(z.square()), (x_0.abs() < outer).flatten(1).double())

    def _grouped(self, values: Tensor) -> Tensor:
        return values.new_zeros(len(values), len(self.dims)).index_add_(1, self.group, values)

    def total(self, images: PreparedImages) -> Tensor:
        """Sums of E[C_t | x_0] over t > 0, and at t = 0, in nats, (V, B, 2).

        Args:
            images: from `prepare`.
        """
        # E[C_t | x_0] is linear in the energies, so that the sum over t needs no (B, T) table.
        weight = self.slopes[:, :, 0] / self.scale
        constant = weight * (self.spread.square() @ self.dims) - self.slopes[:, :, 0]
        per_group = torch.stack([weight[:, 1:] @ self.bias[1:].square(), weight[:, :1] * self.bias[:1].square()], 2)
        return images.energies @ per_group + torch.stack([constant[:, 1:].sum(1), constant[:, 0]], 1)[:, None]

    def features(self, images: PreparedImages, image: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The two features of equation 2 without their slopes, less what of them is expected, and the expectation.

        Args:
            images: from `prepare`.
            image: the image of each pair, (P,).
            t: its chain index, (P,).
            noise: its epsilon, (P, C, *).

        Returns:
            Features with mean zero given x_0, (P, 2), and E of the first given x_0, (P,).
        """
        noise = noise.detach().cpu().double()
        e = self.gaussian.coefficients(noise)
        z, energies, inner = (own.index_select(0, image) for own in images)
        bias, spread, scale = self.bias[t], self.spread[t], self.scale[t]
        # Weights of each coefficient cost less than sums over each group.
        group = self.group.expand(len(t), -1)
        per_e = spread.gather(1, group).mul_(e)
        per_z = bias.gather(1, group).mul_(z)
        excess = per_z.mul_(-2).add_(per_e).mul_(per_e).sum(1) - spread.square() @ self.dims
        expected = (bias.square() * energies + spread.square() * self.dims).sum(1) / scale - 1
        count = inner.sum(1)
        energy = (inner.mul_(noise.flatten(1)).mul_(noise.flatten(1)).sum(1) - count) / (2 * count.clamp(min=1)).sqrt()
        error = excess / scale
        return torch.stack([error, energy], dim=1), expected

    def at(self, images: PreparedImages, image: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """C_t - E[C_t | x_0] and E[C_t | x_0] of some draws, in nats, each (V, P). Arguments as in `features`."""
        features, expected = self.features(images, image, t, noise)
        slopes = self.slopes[:, t]
        return (features * slopes).sum(2), expected * slopes[:, :, 0]


@dataclass(frozen=True, eq=False)
class Pilot:
    """What an estimate takes from a pilot run.

    Args:
        probabilities: p_t, (T,), positive.
        control: the control variate, or None for none.
        num_calls: network calls that the pilot took.
    """

    probabilities: Tensor
    control: ControlVariate | None = None
    num_calls: int = 0

    @functools.cached_property
    def digest(self) -> int:
        """64 bits that tell the draws made with it, and what they are compared to, from another pilot's."""
        state = self.state_dict()
        state["probabilities"] = state["probabilities"].double() / state["probabilities"].sum(dtype=torch.float64)
        return digest(*(part for name in sorted(state) if name != "num_calls" for part in (name, state[name])))

    def state_dict(self) -> dict[str, Tensor]:
        """Everything as tensors, to be saved."""
        state = {"probabilities": self.probabilities, "num_calls": torch.tensor(self.num_calls)}
        if self.control is not None:
            names = "alphas_cumprod scale slopes".split()
            state |= {name: getattr(self.control, name) for name in names}
            state |= {name: getattr(self.control.gaussian, name) for name in ("mean", "eigenvalues", "basis")}
            state["levels"] = torch.tensor(self.control.levels or 0)
        return state

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> "Pilot":
        """The pilot of a saved state.

        Args:
            state: what `state_dict` returned.
        """
        control = None
        if "slopes" in state:
            gaussian = GaussianModel(state["mean"], state["eigenvalues"], state["basis"])
            levels = int(state["levels"]) or None
            control = ControlVariate(gaussian, state["alphas_cumprod"], levels, state["scale"], state["slopes"])
        return cls(state["probabilities"], control, int(state["num_calls"]))


def fit_pilot(
    model: Model,
    reverse: ReverseProcess,
    x_0: Tensor,
    num_calls: int = 1024,
    seed: int = 0,
    uniform_fraction: float = 0.005,
    control_variate: bool = True,
    conditioning: Conditioning | None = None,
    also: Sequence[ReverseProcess | Loss] = (),
    values_per_call: int | None = None,
) -> Pilot:
    """Run the pilot, best on *other* images than those to be scored (the training set's).

    Args:
        model: the network, as in `evaluate_vlb`.
        reverse: p.
        x_0: pilot images (N, C, *); some 2000 serve the Gaussian model, some 1000 of them the network calls.
        num_calls: network calls to spend, at least 1; a few fewer are spent, so that the steps probed get equal
            shares, but every one of them takes one.
        seed: of the pilot's noise and choice of images.
        uniform_fraction: share of p_t that is uniform, in (0, 1]: it bounds the weight of a step that the pilot
            thought unimportant.
        control_variate: fit one; it needs two different images and 128 calls spent, and is left out with fewer.
        conditioning: as in `evaluate_vlb`, N rows.
        also: further reverse processes of the same chain, or losses, that are to be scored from the same network
            outputs; each gets slopes of its own and an equal share of p_t.
        values_per_call: as in `evaluate_vlb`.

    Raises:
        ValueError: an impossible number, or as `evaluate_vlb`.
        FloatingPointError: as `evaluate_vlb`.

    Source: the module's list.
    """
    check_model(model)
    check_data(x_0, reverse.levels)
    if not 0 < uniform_fraction <= 1:
        raise ValueError(f"`uniform_fraction` must lie in (0, 1], but got {uniform_fraction!r}.")
    if num_calls < 1:
        raise ValueError(f"`num_calls` must be at least 1, but got {num_calls!r}.")
    check_conditioning(conditioning, len(x_0))
    check_same_chain(reverse, also)
    x_0 = x_0.cpu()
    knots, t = probes(len(reverse.forward), num_calls)
    gaps = _log_snr_gaps(reverse)
    generator = image_generator(seed, -1)
    image = torch.randperm(len(x_0), generator=generator)[torch.arange(len(t)) % len(x_0)]
    unit = None
    if control_variate and len(x_0) >= 2 and len(t) >= MIN_CALLS_FOR_SLOPES:
        unit = _unit_control(reverse, x_0)
    features: list[Tensor] = []
    size = values_in_a_call(values_per_call, reverse.forward.betas.device)

    def calls() -> Iterator[Callable[[], Tensor]]:
        for part in torch.arange(len(t)).split(max(1, size // x_0[0].numel())):
            own, step = image[part], t[part]
            noise = torch.randn((len(part), *x_0.shape[1:]), generator=generator)
            pairs = x_0[own], step, noise.to(x_0.dtype), rows_of(conditioning, own), own
            read = launch_terms(model, (reverse, *also), *pairs)
            if unit is not None:
                deviation, expected = unit.features(unit.prepare(x_0[own]), torch.arange(len(own)), step, noise)
                features.append(torch.stack([deviation[:, 0] + expected, deviation[:, 1]], dim=1))
            yield read

    values, control = torch.cat(list(one_behind(calls())), dim=1), None
    if unit is not None:
        regressors = torch.cat(features)
        control = replace(unit, slopes=torch.stack([_fit_slopes(own, regressors, knots, t, gaps) for own in values]))
        values = values - (regressors * control.slopes[:, t]).sum(2)
    return Pilot(shares_by_size(reverse, values, knots, t, uniform_fraction), control, len(t))


def pilot_positions(total: int, dims: int) -> list[int]:
    """Positions of pilot images, spread over the data: up to 2048, fewer where they are large.

    Args:
        total: number of images that there are.
        dims: number of dimensions of one image.
    """
    count = min(total, max_pilot_images(dims))
    return [i * total // count for i in range(count)]


def max_pilot_images(dims: int) -> int:
    """How many images a pilot has use for.

    Args:
        dims: number of dimensions of one image.
    """
    return min(2048, max(64, 2**25 // dims))


def probes(steps: int, num_calls: int) -> tuple[Tensor, Tensor]:
    """The steps to probe, closest near the data, and the step of each call; t = 0, the decoder, has four shares.

    Args:
        steps: T.
        num_calls: how many there may be; each step is probed at least once.
    """
    spaced = torch.logspace(0, math.log10(max(steps - 1, 1)), 63).round().long()
    knots = torch.cat([torch.zeros(1, dtype=torch.int64), spaced]).unique()
    knots = knots[knots < steps]
    shares = torch.ones(len(knots), dtype=torch.int64)
    shares[0] = 4
    each = num_calls // int(shares.sum())
    return knots, knots.repeat_interleave(shares * each if each else torch.ones_like(shares))


def shares_by_size(
    reverse: ReverseProcess, values: Tensor, knots: Tensor, t: Tensor, uniform_fraction: float
) -> Tensor:
    """p_t proportional to the root mean square of what was found at the probed steps, (T,) (equation 1).

    Args:
        reverse: p, whose chain it is.
        values: of each probe, in nats, (V, P); each of the V has an equal share of p_t.
        knots: the steps that were probed, (K,).
        t: the step of each probe, (P,).
        uniform_fraction: share of p_t that is uniform, in (0, 1].
    """
    gaps, steps = _log_snr_gaps(reverse), len(reverse.forward)
    roots = [(_interpolate(_smooth_log_rms(own, knots, t, gaps), knots, steps) + gaps).exp() for own in values]
    share = torch.stack([root / root.sum() for root in roots]).mean(0)
    return (1 - uniform_fraction) * share + uniform_fraction / steps


def _log_snr_gaps(reverse: ReverseProcess) -> Tensor:
    """log g_t, (T,); 0 at t = 0, whose term is the decoder's and is not compared with the others."""
    log_abar = reverse.forward.log_alphas_cumprod.detach().cpu().double()
    earlier, later = log_abar[:-1], log_abar[1:]
    gaps = earlier + torch.log(-torch.expm1(later - earlier))
    gaps = gaps - torch.log(-torch.expm1(earlier)) - torch.log(-torch.expm1(later)) - math.log(2)
    return torch.cat([torch.zeros(1, dtype=torch.float64), gaps])


def _knot_of(knots: Tensor, t: Tensor) -> Tensor:
    return torch.searchsorted(knots, t)


def _kernel(knots: Tensor, t: Tensor, knot: int) -> Tensor:
    """Weights of the calls around a knot; t > 0 learns nothing from t = 0, whose term is the decoder's."""
    weights = torch.exp(-0.5 * ((_knot_of(knots, t) - knot) / BANDWIDTH) ** 2).double()
    return torch.where((t == 0) & (knot > 0), 0.0, weights)


def _smooth_log_rms(values: Tensor, knots: Tensor, t: Tensor, gaps: Tensor) -> Tensor:
    """Log of the root mean square of L_t / g_t at each knot, a local line over the neighbouring knots."""
    index = _knot_of(knots, t)
    count = torch.bincount(index, minlength=len(knots))
    mean_square = torch.zeros(len(knots), dtype=torch.float64).index_add_(0, index, values.square()) / count
    logs = 0.5 * mean_square.clamp(min=1e-24).log() - gaps[knots]
    smooth = logs.clone()
    for knot in range(1, len(knots)):
        offset = torch.arange(len(knots)).double() - knot
        design = torch.stack([torch.ones_like(offset), offset], dim=1)
        smooth[knot] = _weighted_fit(design, logs, _kernel(knots, knots, knot), 1e-9)[0]
    return smooth


def _weighted_fit(design: Tensor, y: Tensor, weights: Tensor, ridge: float) -> Tensor:
    gram = (design * weights[:, None]).T @ design
    gram = gram + ridge * torch.diag(gram.diagonal().clamp(min=1e-12))
    return torch.linalg.solve(gram, (design * weights[:, None]).T @ y)


def _interpolate(at_knots: Tensor, knots: Tensor, steps: int) -> Tensor:
    """Values (T, ...) between the knots' (K, ...), linear in log(t + 1), in which the curves are close to straight."""
    if len(knots) == 1:
        return at_knots.expand(steps, *at_knots.shape[1:])
    position, grid = (knots + 1.0).log().double(), (torch.arange(steps) + 1.0).log().double()
    right = torch.searchsorted(position, grid).clamp(1, len(knots) - 1)
    share = ((grid - position[right - 1]) / (position[right] - position[right - 1])).clamp(0, 1)
    return torch.lerp(at_knots[right - 1], at_knots[right], share.reshape(-1, *[1] * (at_knots.ndim - 1)))


def _unit_control(reverse: ReverseProcess, x_0: Tensor) -> ControlVariate | None:
    """The control variate before its slopes are known; None where the images are (almost) all the same."""
    gaussian = GaussianModel.fit(x_0).shrunk(len(x_0))
    # With (almost) one image alone m_t is (almost) 0, and another image's relative error means nothing.
    if not float(gaussian.eigenvalues.mean()) > 1e-3 * float(x_0.double().square().mean()):
        return None
    abar = reverse.forward.log_alphas_cumprod.detach().cpu().double().exp()
    ones = torch.ones(len(abar), dtype=torch.float64)
    unit = ControlVariate(gaussian, abar, reverse.levels, ones, torch.ones(1, len(abar), 2).double())
    energies = torch.cat([unit.prepare(part).energies for part in x_0.split(64)]).mean(0)
    return replace(unit, scale=unit.bias.square() @ energies + unit.spread.square() @ unit.dims)


def _fit_slopes(values: Tensor, features: Tensor, knots: Tensor, t: Tensor, gaps: Tensor) -> Tensor:
    """s_t and r_t, (T, 2): a regression at each knot of the terms, in units of their size, on the features."""
    size = _smooth_log_rms(values, knots, t, gaps)
    y = values / (size + gaps[knots]).exp()[_knot_of(knots, t)]
    design = torch.cat([features, torch.ones(len(t), 1, dtype=torch.float64)], dim=1)
    fits = [_weighted_fit(design, y, _kernel(knots, t, knot), 1e-2)[:2] for knot in range(len(knots))]
    steps = len(gaps)
    return _interpolate(torch.stack(fits), knots, steps) * (_interpolate(size, knots, steps) + gaps).exp()[:, None]
