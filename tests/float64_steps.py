"""Steps of a scheduler, computed in float64 from the papers' formulas, and how far float32 may be from them."""

import numpy as np
import torch

from ddpm_vlb import make_betas, rescale_betas_zero_snr

EPS = 2.0**-24
SHAPE = (3, 2, 4, 5)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(seed: int, shape=SHAPE, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


def float64_alphas_cumprod(config) -> np.ndarray:
    """alphabar with alphabar_0 = 1 in front, so that index t + 1 is code t and index 0 the data."""
    if config.trained_betas is not None:
        betas = torch.tensor(config.trained_betas, dtype=torch.float64)
    else:
        betas = make_betas(config.beta_schedule, config.num_train_timesteps, config.beta_start, config.beta_end)
    if config.rescale_betas_zero_snr:
        betas = rescale_betas_zero_snr(betas)
    return np.concatenate([[1.0], np.cumprod(1 - betas.numpy())])


def coefficients(scheduler, t: int, s: int) -> dict[str, float]:
    """Everything about the step t -> s (s = -1 is the data) in float64."""
    abar = float64_alphas_cumprod(scheduler.config)
    abar_t, abar_s = abar[t + 1], abar[s + 1]
    beta = 1 - abar_t / abar_s
    return {
        "abar": abar_t,
        "beta": beta,
        "c0": np.sqrt(abar_s) * beta / (1 - abar_t),
        "ct": np.sqrt(abar_t / abar_s) * (1 - abar_s) / (1 - abar_t),
        "small": beta * (1 - abar_s) / (1 - abar_t),
        "noise_t": 1 - abar_t,
        "noise_s": 1 - abar_s,
    }


def reference_step(scheduler, output, t: int, s: int, sample, noise) -> tuple[np.ndarray, np.ndarray]:
    """(x_s, x_0_hat) of ancestral sampling in float64; `noise` None at the last step."""
    config, c = scheduler.config, coefficients(scheduler, t, s)
    x, o = sample.double().numpy(), output.double().numpy()
    channels = x.shape[1]
    o, variance_output = o[:, :channels], o[:, channels:]
    if config.prediction_type == "epsilon":
        x_0 = (x - np.sqrt(c["noise_t"]) * o) / np.sqrt(c["abar"])
    elif config.prediction_type == "sample":
        x_0 = o
    else:
        x_0 = np.sqrt(c["abar"]) * x - np.sqrt(c["noise_t"]) * o
    if config.thresholding:
        flat = np.abs(x_0).reshape(len(x_0), -1)
        limit = np.quantile(flat, config.dynamic_thresholding_ratio, axis=1).clip(1, config.sample_max_value)
        limit = limit.reshape(-1, 1, 1, 1)
        x_0 = np.clip(x_0, -limit, limit) / limit
    elif config.clip_sample:
        x_0 = np.clip(x_0, -config.clip_sample_range, config.clip_sample_range)
    mean = c["c0"] * x_0 + c["ct"] * x
    if noise is None:
        return mean, x_0
    if config.variance_type.startswith("fixed_large"):
        variance = c["beta"]
    elif config.variance_type == "learned_range":
        v = (variance_output + 1) / 2
        variance = np.exp(v * np.log(c["beta"]) + (1 - v) * np.log(c["small"]))
    elif config.variance_type == "learned":
        variance = np.exp(variance_output)
    else:
        variance = c["small"]
    return mean + np.sqrt(variance) * noise.double().numpy(), x_0


def x_0_error_bound(scheduler, output, t: int, s: int, sample) -> np.ndarray:
    """16 float32 roundings of the two terms that x_0_hat is made of; the quantile of thresholding is one of them."""
    epsilon = scheduler.config.prediction_type == "epsilon"
    inverse = 1 / np.sqrt(coefficients(scheduler, t, s)["abar"]) if epsilon else 1.0
    terms = np.abs(sample.double().numpy()) + np.abs(output.double().numpy()[:, : sample.shape[1]])
    if scheduler.config.thresholding:
        terms = terms.max(axis=(1, 2, 3), keepdims=True) + 0 * terms
    return 16 * EPS * inverse * terms


def own_error_bound(scheduler, output, t: int, s: int, sample, noise) -> np.ndarray:
    """32 float32 roundings of the terms' magnitude: the tables behind it are rounded only once."""
    c = coefficients(scheduler, t, s)
    bound = 2 * c["c0"] * x_0_error_bound(scheduler, output, t, s, sample)
    bound = bound + 32 * EPS * c["ct"] * np.abs(sample.double().numpy())
    if noise is not None:
        bound = bound + 32 * EPS * np.sqrt(c["beta"]) * np.abs(noise.double().numpy())
    return bound
