"""The formulas of the bound in plain numpy, in float64, from the papers: an independent oracle for the tests.

Nothing here is shared with the package. Where it can, the oracle takes another road to the same number: cumulative
products instead of sums of logarithms, conditioning by precisions for the posterior of two far steps, the textbook KL
of two means and variances, and 50-digit arithmetic for the decoder. Code indices: t = 0 is the decoder step.

Sources: Ho et al. 2020 (DDPM), eq. 2-14; Nichol & Dhariwal 2021, eq. 15-18; Salimans & Ho 2022, appendix D; Hang et
al. 2023, eq. 8.
"""

from types import SimpleNamespace

import mpmath
import numpy as np


def linear_betas(num, start=1e-4, end=0.02):
    """Evenly spaced betas."""
    return np.array([start + (end - start) * i / max(num - 1, 1) for i in range(num)])


def cosine_betas(num):
    """beta_t = 1 - f(t) / f(t - 1), f(t) = cos^2, at most 0.999 (Nichol & Dhariwal 2021, eq. 17)."""
    f = np.cos((np.arange(num + 1) / num + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - f[1:] / f[:-1], 0.999)


def tables(betas):
    """Everything that depends on the step alone."""
    betas = np.asarray(betas, dtype=np.float64)
    abar = np.cumprod(1 - betas)
    previous = np.concatenate([[1.0], abar[:-1]])
    small = betas * (1 - previous) / (1 - abar)
    # The first step's posterior variance is zero: it borrows the next step's, and a lonely step takes its beta.
    borrowed = np.concatenate([small[1:2] if len(betas) > 1 else betas[:1], small[1:]])
    return SimpleNamespace(
        betas=betas,
        abar=abar,
        posterior_variance=small,
        log_small=np.log(borrowed),
        log_large=np.concatenate([np.log(borrowed[:1]), np.log(betas[1:])]),
        c0=np.sqrt(previous) * betas / (1 - abar),
        ct=np.sqrt(1 - betas) * (1 - previous) / (1 - abar),
    )


def respaced_betas(betas, indices):
    """The betas of the chain that visits only `indices` and has the same marginals there."""
    abar = np.cumprod(1 - np.asarray(betas, dtype=np.float64))[list(indices)]
    return 1 - abar / np.concatenate([[1.0], abar[:-1]])


def at(table, t, x):
    """Entries of a table, shaped to multiply x."""
    return np.asarray(table)[t].reshape(-1, *[1] * (x.ndim - 1))


def diffuse(tab, x_0, t, noise):
    """A sample of q(x_t | x_0)."""
    return np.sqrt(at(tab.abar, t, x_0)) * x_0 + np.sqrt(1 - at(tab.abar, t, x_0)) * noise


def posterior(tab, x_0, x_t, t):
    """Mean and log variance of q(x_{t-1} | x_t, x_0)."""
    mean = at(tab.c0, t, x_0) * x_0 + at(tab.ct, t, x_0) * x_t
    return mean, np.broadcast_to(at(tab.log_small, t, x_0), mean.shape)


def posterior_between(tab, x_0, x_t, t, s):
    """Mean and variance of q(x_s | x_t, x_0), 0 <= s < t: the product of two Gaussians in x_s, by their precisions."""
    abar_s, alpha = at(tab.abar, s, x_0), at(tab.abar, t, x_0) / at(tab.abar, s, x_0)
    from_data, from_later = 1 / (1 - abar_s), alpha / (1 - alpha)
    variance = 1 / (from_data + from_later)
    mean = variance * (from_data * np.sqrt(abar_s) * x_0 + from_later * x_t / np.sqrt(alpha))
    return mean, np.broadcast_to(variance, mean.shape)


def split(output, channels, variance_type):
    """The mean half and the variance half (or None)."""
    if variance_type in ("learned", "learned_range"):
        return output[:, :channels], output[:, channels:]
    return output, None


def predict_x_0(tab, prediction_type, mean_output, x_t, t, clip=None):
    """The estimate of x_0 behind an output that predicts epsilon, x_0 or v; clamped to +- clip."""
    signal, sigma = np.sqrt(at(tab.abar, t, x_t)), np.sqrt(1 - at(tab.abar, t, x_t))
    if prediction_type == "epsilon":
        x_0 = (x_t - sigma * mean_output) / signal
    elif prediction_type == "sample":
        x_0 = mean_output
    else:
        x_0 = signal * x_t - sigma * mean_output
    return x_0 if clip is None else np.clip(x_0, -clip, clip)


def log_variance(tab, variance_type, variance_output, t, x):
    """log sigma_t^2 of p, of x's shape."""
    small, large = at(tab.log_small, t, x), at(np.log(tab.betas), t, x)
    if variance_type == "fixed_small":
        value = small
    elif variance_type == "fixed_large":
        value = at(tab.log_large, t, x)
    elif variance_type == "learned":
        value = variance_output
    else:
        share = (variance_output + 1) / 2
        value = share * large + (1 - share) * small
    return np.broadcast_to(value, x.shape)


def p(tab, prediction_type, variance_type, output, x_t, t, clip=None):
    """Mean and log variance of p(x_{t-1} | x_t), and the estimate of x_0."""
    mean_output, variance_output = split(output, x_t.shape[1], variance_type)
    x_0 = predict_x_0(tab, prediction_type, mean_output, x_t, t, clip)
    mean, _ = posterior(tab, x_0, x_t, t)
    return mean, log_variance(tab, variance_type, variance_output, t, x_t), x_0


def target(tab, prediction_type, x_0, t, noise):
    """What the mean output should be."""
    signal, sigma = np.sqrt(at(tab.abar, t, x_0)), np.sqrt(1 - at(tab.abar, t, x_0))
    return {"epsilon": noise, "sample": x_0, "v_prediction": signal * noise - sigma * x_0}[prediction_type]


def log_bin_mass(x, mean, log_var, levels):
    """Exact log mass of the bin around the level x, at mpmath's precision: real numbers in, one out."""
    half = mpmath.mpf(1) / (levels - 1)
    sigma = mpmath.exp(log_var / 2)
    centre = mpmath.mpf(x) - mean
    low = -mpmath.inf if x < -1 + 1 / (levels - 1) else (centre - half) / sigma
    high = mpmath.inf if x > 1 - 1 / (levels - 1) else (centre + half) / sigma
    if low + high > 0:  # the lighter tail, in which the difference keeps its digits
        low, high = -high, -low
    return mpmath.log((mpmath.erfc(-high / mpmath.sqrt(2)) - mpmath.erfc(-low / mpmath.sqrt(2))) / 2)


def discretized_log_prob(x, mean, log_var, levels):
    """Exact log mass of the bin around each level, per element."""

    def score(*numbers):
        return float(log_bin_mass(*(mpmath.mpf(float(number)) for number in numbers), levels))

    with mpmath.workdps(50):
        return np.vectorize(score, otypes=[np.float64])(x, mean, log_var)


def log_normal(x, mean, log_var):
    """Log density of a Gaussian, per element."""
    return -0.5 * (np.log(2 * np.pi) + log_var + (x - mean) ** 2 / np.exp(log_var))


def kl(mean_1, log_var_1, mean_2, log_var_2):
    """KL of two Gaussians, per element, in nats."""
    ratio = np.exp(log_var_1 - log_var_2)
    return 0.5 * (log_var_2 - log_var_1 - 1 + ratio + (mean_1 - mean_2) ** 2 / np.exp(log_var_2))


def vlb_term(tab, prediction_type, variance_type, output, x_0, x_t, t, clip=None, levels=256):
    """The terms of the bound at each image's step, in nats per image."""
    mean, log_var, _ = p(tab, prediction_type, variance_type, output, x_t, t, clip)
    nats = kl(*posterior(tab, x_0, x_t, t), mean, log_var).reshape(len(t), -1).sum(1)
    for i in np.flatnonzero(t == 0):
        score = log_normal if levels is None else lambda *a: discretized_log_prob(*a, levels)
        nats[i] = -score(x_0[i], mean[i], log_var[i]).sum()
    return nats


def prior_kl(tab, x_0):
    """KL(q(x_T | x_0) || N(0, I)), in nats per image."""
    mean, variance = np.sqrt(tab.abar[-1]) * x_0, 1 - tab.abar[-1]
    return (0.5 * (variance + mean**2 - 1 - np.log(variance))).reshape(len(x_0), -1).sum(1)


def bits_per_dim(nats, x_0):
    """Nats per image into bits per dimension."""
    return nats / x_0[0].size / np.log(2)


def bound(tab, prediction_type, variance_type, model, x_0, noise, timesteps=None, clip=None, levels=256):
    """The whole bound: prior (B,) and terms (B, T) in nats. noise[i] belongs to chain index i."""
    timesteps = np.arange(len(tab.betas)) if timesteps is None else np.asarray(timesteps)
    columns = []
    for i, told in enumerate(timesteps):
        t = np.full(len(x_0), i)
        x_t = diffuse(tab, x_0, t, noise[i])
        output = model(x_t, np.full(len(x_0), told))
        columns.append(vlb_term(tab, prediction_type, variance_type, output, x_0, x_t, t, clip, levels))
    return prior_kl(tab, x_0), np.stack(columns, axis=1)


def min_snr_weight(tab, prediction_type, t, gamma):
    """min(SNR, gamma) on the squared error of x_0, expressed on the squared error of the network's own target."""
    snr = tab.abar[t] / (1 - tab.abar[t])
    # |x_0 - x_0_hat|^2 is |epsilon error|^2 / SNR and |v error|^2 / (SNR + 1).
    divisor = {"epsilon": snr, "sample": np.ones_like(snr), "v_prediction": snr + 1}[prediction_type]
    return np.minimum(snr, gamma) / divisor


def simple_loss(tab, prediction_type, variance_type, output, x_0, t, noise):
    """Mean squared error of the mean output, per image."""
    mean_output, _ = split(output, x_0.shape[1], variance_type)
    return ((target(tab, prediction_type, x_0, t, noise) - mean_output) ** 2).reshape(len(t), -1).mean(1)


def vlb_loss(tab, prediction_type, variance_type, output, x_0, x_t, t, levels=256):
    """T times the unclipped term, in bits/dim."""
    nats = vlb_term(tab, prediction_type, variance_type, output, x_0, x_t, t, None, levels)
    return len(tab.betas) * bits_per_dim(nats, x_0)
