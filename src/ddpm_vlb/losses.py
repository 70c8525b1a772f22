r"""The terms of the variational bound, and the training losses made of them.

1. -log p(x_0) <= L_T + sum_{t=2..T} L_{t-1} + L_0
2. L_T = KL(q(x_T | x_0) || N(0, I))
3. L_{t-1} = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) = sum over dimensions of
   (u + expm1(-u) + (c0 (x_0 - x_0_hat) / betatilde^{1/2})^2 exp(-u)) / 2,  u = log sigma_t^2 / betatilde_t
4. L_0 = -log p(x_0 | x_1), of the bin around each level, or the density for continuous data
5. L_simple = mean (target - o)^2;  L_vlb = T x the sampled term, in bits/dim;  L_hybrid = L_simple + 0.001 L_vlb with
   the mean frozen in the second

With x_0 = a x_t + b target, equation 3's gap is b (target - o) without subtracting two estimates of x_0, which would
cancel at small t. Sources: Ho et al. 2020, eq. 5, 13, 14; Nichol & Dhariwal 2021, eq. 16 and section 3.1; Hang et al.
2023 (min-SNR). All losses are computed in float32 (half is promoted, float64 kept) and return one value per image.
"""

import math
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor

from .bin_mass import log_bin_mass
from .checks import check_trained
from .distributions import DiagonalGaussian, gaussian_kl, promote_half
from .forward_process import Diffused, gather, timesteps_beside
from .reverse_process import ReverseProcess
from .reverse_tables import Coefficients

# Processes whose first batch was looked at: on a GPU a look at each would have to be waited for.
_LOOKED: dict[bool, weakref.WeakSet[ReverseProcess]] = {True: weakref.WeakSet(), False: weakref.WeakSet()}


def nats_to_bits_per_dim(nats: Tensor, dims: int) -> Tensor:
    """Convert nats per image into bits per dimension.

    Args:
        nats: any shape.
        dims: number of dimensions D of one image, C x H x W.
    """
    return nats / (dims * math.log(2))


def vlb_term(reverse: ReverseProcess, model_output: Tensor, diffused: Diffused) -> Tensor:
    """The term of the bound at each image's step: L_{t-1}, or L_0 where t = 0; in nats per image, (B,).

    Clips x_0_hat as `reverse` says (the training losses do not).

    Args:
        reverse: p.
        model_output: the network's output at (x_t, t), (B, C, *) or (B, 2 C, *).
        diffused: x_0, x_t, t and noise, from `forward.diffuse`.

    Raises:
        ValueError: the output has the wrong number of channels for the variance type, or the shapes do not match.

    Source: Ho et al. 2020, eq. 5; equations 3 and 4 above.
    """
    mean_output, variance_output = reverse.split(model_output, diffused.x_t)
    diffused = _promoted(reverse, diffused)
    c = reverse.coefficients(diffused.t, diffused.x_t)
    if reverse.clip_sample or reverse.thresholding:
        error = diffused.x_0 - reverse.predict_x_0(mean_output, diffused.x_t, c)
        return _term(reverse, error, True, variance_output, diffused, c)
    error = reverse.target(diffused) - mean_output
    return _term(reverse, error, False, variance_output, diffused, c)


def prior_kl(reverse: ReverseProcess, x_0: Tensor) -> Tensor:
    """The prior term L_T = KL(q(x_T | x_0) || N(0, I)), in nats per image, (B,). Needs no network.

    Args:
        reverse: p, whose forward process ends in x_T.
        x_0: data (B, C, *).

    Source: Ho et al. 2020, eq. 5.
    """
    t = torch.full(x_0.shape[:1], len(reverse.forward) - 1, device=x_0.device)
    q = reverse.forward.q_marginal(x_0, t)
    prior = DiagonalGaussian(torch.zeros_like(q.mean), torch.zeros_like(q.mean))
    return q.kl(prior).flatten(1).sum(1)


def simple_loss(
    reverse: ReverseProcess, model_output: Tensor, diffused: Diffused, snr_gamma: float | None = None
) -> Tensor:
    """L_simple: the squared error of the mean output, averaged over dimensions, (B,).

    Args:
        reverse: p, which says what the output predicts; its variance is not learned.
        model_output: the network's output at (x_t, t), (B, C, *).
        diffused: x_0, x_t, t and noise, from `forward.diffuse`.
        snr_gamma: gamma of min-SNR weighting, positive (5 is usual); None weights all steps alike.

    Raises:
        ValueError: the variance is learned, which this loss would leave untrained; the output has the wrong number of
            channels; `snr_gamma` is not positive; or the first batch is not scaled to [-1, 1] (looked at once for each
            `reverse`; images on [0, 1] pass, as nothing tells them from bright ones).

    Source: Ho et al. 2020, eq. 14; Hang et al. 2023, section 3.4 (min-SNR).
    """
    if reverse.learns_variance:
        raise ValueError(
            f"`simple_loss` would leave the variance half untrained, which `variance_type={reverse.variance_type!r}` "
            "samples and scores with: use `hybrid_loss`. If something else trains it, give L_simple the mean half "
            "alone: `simple_loss(dataclasses.replace(reverse, variance_type='fixed_small'), output[:, :C], diffused)`."
        )
    mean_output, _ = reverse.split(model_output, diffused.x_t)
    diffused = _promoted(reverse, diffused, decoded=False)
    error = reverse.target(diffused) - mean_output
    return _mean_square(error) * _min_snr_weight(reverse, diffused.t, error, snr_gamma)


def vlb_loss(reverse: ReverseProcess, model_output: Tensor, diffused: Diffused, freeze_mean: bool = False) -> Tensor:
    """L_vlb: T times the sampled term of the bound, in bits/dim, (B,); x_0_hat is not clipped.

    With t uniform over the chain (or importance weights in its place) its expectation is the bound less the prior.

    Args:
        reverse: p.
        model_output: the network's output at (x_t, t), (B, C, *) or (B, 2 C, *).
        diffused: x_0, x_t, t and noise, from `forward.diffuse`.
        freeze_mean: train the variance only, as the second term of L_hybrid does.

    Raises:
        ValueError: the output has the wrong number of channels for the variance type; an optimal variance stands in
            the place of the learned one; or the first batch is not on the levels (looked at once for each `reverse`).

    Source: Nichol & Dhariwal 2021, section 3.3, eq. 18; section 3.1 for the frozen mean.
    """
    _check_trains_its_variance(reverse)
    mean_output, variance_output = reverse.split(model_output, diffused.x_t)
    diffused = _promoted(reverse, diffused)
    error = reverse.target(diffused) - (mean_output.detach() if freeze_mean else mean_output)
    return _scaled_term(reverse, error, variance_output, diffused)


def hybrid_loss(
    reverse: ReverseProcess,
    model_output: Tensor,
    diffused: Diffused,
    vlb_weight: float = 0.001,
    snr_gamma: float | None = None,
) -> Tensor:
    """L_hybrid = L_simple + `vlb_weight` L_vlb, (B,): L_simple trains the mean, L_vlb only the variance.

    Args:
        reverse: p, with a learned variance.
        model_output: the network's output at (x_t, t), (B, 2 C, *).
        diffused: x_0, x_t, t and noise, from `forward.diffuse`.
        vlb_weight: lambda, not negative; the T of L_vlb is already in it.
        snr_gamma: gamma of min-SNR weighting of L_simple, positive; None weights all steps alike.

    Raises:
        ValueError: the variance is not learned, or an optimal one stands in its place (then L_vlb would train
            nothing), or the channels are wrong, or the first batch is not on the levels (looked at once).

    Source: Nichol & Dhariwal 2021, eq. 16.
    """
    if not reverse.learns_variance:
        raise ValueError(
            f"`hybrid_loss` trains the variance, but `variance_type={reverse.variance_type!r}` has none to train. Use "
            "`variance_type='learned_range'` with `out_channels=2 * C`, or `simple_loss`."
        )
    _check_trains_its_variance(reverse)
    mean_output, variance_output = reverse.split(model_output, diffused.x_t)
    diffused = _promoted(reverse, diffused)
    error = reverse.target(diffused) - mean_output
    simple = _mean_square(error) * _min_snr_weight(reverse, diffused.t, error, snr_gamma)
    return simple + vlb_weight * _scaled_term(reverse, error.detach(), variance_output, diffused)


def _check_trains_its_variance(reverse: ReverseProcess) -> None:
    if reverse.learns_variance and reverse.x_0_mse is not None:
        raise ValueError(
            "This process has an optimal variance in place of the learned one, which would not be trained. Train with "
            "`dataclasses.replace(reverse, x_0_mse=None)`."
        )


def _promoted(reverse: ReverseProcess, diffused: Diffused, decoded: bool = True) -> Diffused:
    """In float32 or better, on one device; the first batch of a process is looked at."""
    x_0, x_t, t, noise = diffused
    if not x_0.shape == x_t.shape == noise.shape or t.shape != x_t.shape[:1]:
        raise ValueError(
            "`x_0`, `x_t`, `noise` and `t` of `diffused` must have the shapes (B, C, *), thrice, and (B,), but got "
            f"{tuple(x_0.shape)}, {tuple(x_t.shape)}, {tuple(noise.shape)} and {tuple(t.shape)}."
        )
    if not torch.compiler.is_compiling() and reverse not in _LOOKED[decoded]:
        check_trained(x_0, reverse.levels, decoded)
        _LOOKED[decoded].add(reverse)
    t = timesteps_beside(x_t, t, len(reverse.forward))
    return Diffused(promote_half(x_0), promote_half(x_t), t, promote_half(noise))


def _mean_square(error: Tensor) -> Tensor:
    return error.square().flatten(1).mean(1)


def _min_snr_weight(reverse: ReverseProcess, t: Tensor, like: Tensor, gamma: float | None) -> Tensor | float:
    """min(SNR, gamma) over the SNR weight that each prediction's plain squared error already has on x_0."""
    if gamma is None:
        return 1.0
    if not gamma > 0:
        raise ValueError(f"`snr_gamma` must be positive, or None for no weighting, but got {gamma!r}.")
    snr = (gather(reverse.forward.sqrt_recipm1_alphas_cumprod, t, like) ** -2).flatten()
    implied = {"epsilon": snr, "sample": torch.ones_like(snr), "v_prediction": snr + 1}[reverse.prediction_type]
    return snr.clamp(max=gamma) / implied


def _scaled_term(reverse: ReverseProcess, error: Tensor, variance_output: Tensor | None, diffused: Diffused) -> Tensor:
    """T times the unclipped term, in bits/dim, from the error of the mean output."""
    c = reverse.coefficients(diffused.t, diffused.x_t)
    nats = _term(reverse, error, False, variance_output, diffused, c)
    return nats * (len(reverse.forward) / (diffused.x_0[0].numel() * math.log(2)))


def _term(
    reverse: ReverseProcess,
    error: Tensor,
    of_x_0: bool,
    variance_output: Tensor | None,
    diffused: Diffused,
    c: Coefficients,
) -> Tensor:
    """L_{t-1} or L_0 in nats (equations 3 and 4) from the error of x_0_hat, or of the mean output."""
    if reverse.eta == 0:
        raise ValueError("`eta=0` draws no noise: its steps are points, which have no bound. Score `eta` above 0.")
    scale = c.x_0_to_mean * torch.exp(-0.5 * c.posterior_log_variance)
    scale = scale if of_x_0 else scale * c.output_to_x_0
    kl_of, first = (scale, c.ratio_offset, c.variance_slope), diffused.t == 0
    if torch.compiler.is_compiling() or error.device.type != "cpu":  # finding the rows would be waited for
        at_first = first.to(error.dtype).reshape(scale.shape)
        kl = _kl(error, variance_output, *_without(first, kl_of))
        log_prob = _masked_log_prob(reverse, diffused.x_0, error, of_x_0, variance_output, c, at_first)
        return torch.addcmul(kl, at_first.flatten(), log_prob, value=-1)
    rows = first.nonzero()[:, 0]
    if len(rows) == 0:
        return _kl(error, variance_output, *kl_of)
    if torch.is_grad_enabled():  # where gradients have to be added up again, leaving rows out gains nothing
        kl = _kl(error, variance_output, *_without(first, kl_of))
    else:
        others = first.logical_not().nonzero()[:, 0]
        kl = _kl(*_rows(others, error, variance_output), *(own.index_select(0, others) for own in kl_of))
        kl = kl.new_empty(len(first)).index_copy_(0, others, kl)
    c = reverse.coefficients(0, error)
    gap, variance_rows = _rows(rows, error, variance_output)
    gap = gap if of_x_0 else c.output_to_x_0 * gap
    log_prob = _decoder_log_prob(reverse, diffused.x_0.index_select(0, rows), gap, variance_rows, c)
    return kl.index_put((rows,), -log_prob)


def _without(first: Tensor, kl_of: tuple[Tensor, ...]) -> Iterator[Tensor]:
    """The coefficients of a KL that is 0 in the first step's rows, lest an overflow make its gradient NaN."""
    return (own.masked_fill(first.reshape(-1, *[1] * (own.ndim - 1)), 0) for own in kl_of)


def _rows(rows: Tensor, error: Tensor, variance_output: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Rows of both: `index_select` copies whole rows, where `error[rows]` goes from number to number."""
    if variance_output is None:
        return error.index_select(0, rows), None
    return error.index_select(0, rows), variance_output.index_select(0, rows)


def _kl(error: Tensor, variance_output: Tensor | None, scale: Tensor, offset: Tensor, slope: Tensor) -> Tensor:
    """Equation 3 from the error and the coefficients of its scaled gap and of u, (B,)."""
    ratio = offset if variance_output is None else torch.addcmul(offset, variance_output, slope)
    return gaussian_kl(scale * error, ratio).flatten(1).sum(1)


def _masked_log_prob(
    reverse: ReverseProcess,
    x_0: Tensor,
    error: Tensor,
    of_x_0: bool,
    variance_output: Tensor | None,
    c: Coefficients,
    at_first: Tensor,
) -> Tensor:
    """The decoder where `at_first` is 1; elsewhere that of N(x_0, I), whose gradient by the output is 0."""
    gap = (at_first if of_x_0 else at_first * c.output_to_x_0) * error
    offset, slope = at_first * c.log_variance_offset, at_first * c.variance_slope
    c = c._replace(log_variance_offset=offset, variance_slope=slope)
    return _decoder_log_prob(reverse, x_0, gap, variance_output, c)


def _decoder_log_prob(
    reverse: ReverseProcess, x_0: Tensor, gap: Tensor, variance_output: Tensor | None, c: Coefficients
) -> Tensor:
    """log p(x_0 | x_1) = -L_0; at the first step the mean of p is x_0_hat = x_0 - gap."""
    log_variance = c.log_variance(variance_output)
    if reverse.levels is None:
        log_prob = DiagonalGaussian(x_0 - gap, log_variance).log_prob(x_0)
    else:
        log_prob = log_bin_mass(x_0, gap, log_variance, 1 / (reverse.levels - 1))
    return log_prob.flatten(1).sum(1)
