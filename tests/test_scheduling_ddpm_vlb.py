"""DDPMVLBScheduler: stock's place and numbers where stock is right, and the right ones where it is not.

Where both are right they differ by stock's float32 tables. `stock_error_bound` derives how much that can be, and a
float64 computation of the same step (`reference_step`, numpy, from the papers' formulas) says who is closer.
"""

import copy
import inspect
import json
import logging
import pickle
import warnings

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.utils import DummyObject

from ddpm_vlb import DDPMVLBScheduler, make_betas, rescale_betas_zero_snr

# Stock's numpy round trips, none of our business.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

EPS = 2.0**-24
SHAPE = (3, 2, 4, 5)
SCHEDULES = {
    "linear": {},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "short": {"num_train_timesteps": 20, "beta_start": 0.01, "beta_end": 0.3},
    "trained": {"trained_betas": [0.05, 0.02, 0.3, 0.1, 0.4, 0.2], "num_train_timesteps": 6},
}
STOCK_SCHEDULERS = (
    DDPMScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    DEISMultistepScheduler,
    PNDMScheduler,
    LCMScheduler,
)


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


def stock_error_bound(scheduler, output, t: int, s: int, sample, noise) -> np.ndarray:
    """How far float32 tables may put a step, element by element.

    Each alphabar is a product of t + 1 factors 1 - beta with two roundings each (t + 1 times 2 EPS, relative), so that
    1 - alphabar_t and 1 - alphabar_s are off by that over themselves and beta_{t|s} = 1 - alphabar_t / alphabar_s by
    what is left of 2 EPS per step between them, over itself. Every coefficient is a product of at most two of each and
    their roots; the magnitude they multiply is the sum of the terms' absolute values.
    """
    c = coefficients(scheduler, t, s)
    relative = 4 * EPS * (t + 2) * (1 / c["noise_t"] + (1 / c["noise_s"] if s >= 0 else 0))
    relative += 4 * EPS * (t - s + 2) / c["beta"]
    x, o = np.abs(sample.double().numpy()), np.abs(output.double().numpy()[:, : sample.shape[1]])
    inverse = {"epsilon": 1 / np.sqrt(c["abar"])}.get(scheduler.config.prediction_type, 1.0)
    magnitude = c["c0"] * inverse * (x + o) + c["ct"] * x
    if noise is not None:
        magnitude = magnitude + np.sqrt(c["beta"]) * np.abs(noise.double().numpy())
    return (relative + 16 * EPS) * magnitude


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


def chain_positions(scheduler) -> list[tuple[int, int]]:
    """(t, s) at both ends of the chain and in between; s = -1 after the last."""
    steps = [*scheduler.timesteps.tolist(), -1]
    last = len(steps) - 2
    return [
        (steps[i], steps[i + 1])
        for i in sorted({0, 1, last // 2, max(last - 2, 0), max(last - 1, 0), last})
        if i <= last
    ]


@pytest.fixture
def diffusers_log():
    """The messages of warning level and above that diffusers logs."""
    messages: list[str] = []
    handler = logging.Handler(level=logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("diffusers")
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


# --- equality with stock


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_small_log", "fixed_large", "learned_range"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_step_equals_stock(schedule, prediction_type, variance_type):
    """Every step of the whole chain equals stock's within stock's float32 tables, and is closer to float64."""
    check_against_stock(
        SCHEDULES[schedule] | {"prediction_type": prediction_type, "variance_type": variance_type}, None
    )


@pytest.mark.parametrize("num", [2, 5, 7, 50, 333])
@pytest.mark.parametrize("spacing", ["leading", "linspace"])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range"])
def test_respaced_step_equals_stock(variance_type, spacing, num):
    """So does every step of a respaced chain."""
    config = {"variance_type": variance_type, "timestep_spacing": spacing, "beta_schedule": "squaredcos_cap_v2"}
    check_against_stock(config, num)


@pytest.mark.parametrize("num", [2, 5, 10, 50])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range"])
def test_trailing_step_equals_stock_before_the_last(variance_type, num):
    """Under trailing spacing the steps equal stock's but for the last one, at which stock adds noise to x_0."""
    config = {"variance_type": variance_type, "timestep_spacing": "trailing"}
    check_against_stock(config, num, with_last=False)


@pytest.mark.parametrize(
    "options",
    [
        {"clip_sample": False},
        {"clip_sample_range": 0.3},
        {"clip_sample_range": 3.0},
        {"thresholding": True},
        {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.9},
        {"thresholding": True, "sample_max_value": 0.5, "prediction_type": "sample"},
        {"thresholding": True, "sample_max_value": 100.0, "dynamic_thresholding_ratio": 1.0},
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "linspace"},
        {"steps_offset": 1},
    ],
)
def test_options_equal_stock(options):
    """Clipping, thresholding, zero-terminal SNR and offsets do what they do in stock."""
    check_against_stock(SCHEDULES["short"] | options, 6, with_last="steps_offset" not in options)


def check_against_stock(config, num, with_last=True):
    ours, stock = DDPMVLBScheduler(**config), DDPMScheduler(**config)
    if num is not None:
        ours.set_timesteps(num)
        stock.set_timesteps(num)
    assert torch.equal(ours.timesteps, stock.timesteps)
    own_worst, stock_worst = 0.0, 0.0
    for t, s in chain_positions(ours):
        if s == -1 and not with_last:
            continue
        sample, output = randn(t), randn(t + 1)
        if config.get("variance_type") == "learned_range":
            output = torch.cat([output, randn(t + 2).clamp(-1, 1)], dim=1)
        noise = None if s == -1 else torch.randn(SHAPE, generator=seeded(t))
        own = ours.step(output, t, sample, generator=seeded(t))
        other = stock.step(output, torch.tensor(t), sample, generator=seeded(t))
        expected, x_0 = reference_step(ours, output, t, s, sample, noise)
        own_error = np.abs(own.prev_sample.double().numpy() - expected)
        stock_error = np.abs(other.prev_sample.double().numpy() - expected)
        assert (own_error <= own_error_bound(ours, output, t, s, sample, noise)).all(), (t, own_error.max())
        assert (stock_error <= stock_error_bound(ours, output, t, s, sample, noise)).all(), (t, stock_error.max())
        x_0_error = np.abs(own.pred_original_sample.double().numpy() - x_0)
        assert (x_0_error <= x_0_error_bound(ours, output, t, s, sample)).all(), (t, x_0_error.max())
        own_worst, stock_worst = max(own_worst, own_error.mean()), max(stock_worst, stock_error.mean())
    # Half a rounding of numbers of order 1 is no difference in quality.
    assert own_worst <= stock_worst + EPS


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize(
    ("config", "num"),
    [
        (SCHEDULES["short"], None),
        ({"prediction_type": "v_prediction", "timestep_spacing": "linspace"}, 30),
        ({"beta_schedule": "squaredcos_cap_v2", "thresholding": True, "sample_max_value": 2.0}, 50),
        ({}, None),
    ],
)
def test_sampling_loop_equals_stock(config, num, variance_type):
    """A whole loop from the same generator ends where stock's does, and at least as close to float64's end.

    The network is contracting, so that errors do not grow on the way: 1e-3 is far above what stock's tables can do
    (0.5 % of the smallest steps' noise) and far below any difference in the algorithm.
    """
    config = config | {"variance_type": variance_type}
    ours, stock = DDPMVLBScheduler(**config), DDPMScheduler(**config)

    def network(x, t):
        output = torch.tanh(0.5 * x.roll(1, -1)) + 1e-4 * t
        return torch.cat([output, torch.sin(3 * x)], dim=1) if variance_type == "learned_range" else output

    ends = {}
    for name, scheduler in (("ours", ours), ("stock", stock)):
        if num is not None:
            scheduler.set_timesteps(num)
        x, generator = randn(0), seeded(1)
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t), t, x, generator=generator).prev_sample
        ends[name] = x.double().numpy()
    x, generator = randn(0, dtype=torch.float64), seeded(1)
    steps = [*ours.timesteps.tolist(), -1]
    for t, s in zip(steps, steps[1:], strict=False):
        noise = None if s == -1 else torch.randn(SHAPE, generator=generator)
        x = torch.from_numpy(reference_step(ours, network(x, t), t, s, x, noise)[0])
    errors = {name: np.abs(end - x.numpy()) for name, end in ends.items()}
    assert errors["ours"].max() < 1e-3 and errors["stock"].max() < 1e-3
    assert errors["ours"].mean() <= errors["stock"].mean() + EPS


def test_end_of_the_loop_is_float64_s():
    """The last two steps from noised data, as diffusers tests its own, end at float64's sum of 387.9673.

    diffusers expects 387.9466 +- 0.01. Stock's float32 rounds c0 and ct, which nearly add up to 1, apart from each
    other: 1 - alphabar_1 = 2.2e-4 is off by up to 2 EPS, which is 5e-4 of itself.
    """
    ramp = (torch.arange(768) / 768).reshape(3, 8, 8, 4).permute(3, 0, 1, 2)
    sums = {}
    for scheduler in (DDPMVLBScheduler(), DDPMScheduler()):
        generator, steps = seeded(0), scheduler.timesteps[-2:]
        x = scheduler.add_noise(ramp, ramp.flip(0, 1, 2, 3), steps[:1])
        for t in steps:
            x = scheduler.step(x * t / (t + 1), t, x, generator=generator).prev_sample
        sums[type(scheduler)] = float(x.double().abs().sum())
    ours, generator = DDPMVLBScheduler(), seeded(0)
    c, x_0 = coefficients(ours, 1, 0), ramp.double()
    x = np.sqrt(c["abar"]) * x_0 + np.sqrt(c["noise_t"]) * x_0.flip(0, 1, 2, 3)
    x = torch.from_numpy(reference_step(ours, x / 2, 1, 0, x, torch.randn(x.shape, generator=generator))[0])
    exact = float(np.abs(reference_step(ours, 0 * x, 0, -1, x, None)[0]).sum())
    assert exact == pytest.approx(387.9673, abs=1e-4)
    # 768 numbers below 1, each through some ten float32 roundings.
    assert sums[DDPMVLBScheduler] == pytest.approx(exact, abs=768 * 10 * EPS)
    assert sums[DDPMScheduler] == pytest.approx(387.9466, abs=1e-2)


VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned_range", "learned")


@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
@pytest.mark.parametrize(("schedule", "num"), [("linear", None), ("cosine", 50), ("short", 7), ("trained", None)])
def test_get_variance_is_stock_s_diagnostic(schedule, num, variance_type):
    """_get_variance is stock's within its float32 tables and float64's to rounding, 1e-20 at the last step included.

    The bounds are relative for variances and standard deviations, and absolute for their logarithms.
    """
    ours, stock = DDPMVLBScheduler(**SCHEDULES[schedule]), DDPMScheduler(**SCHEDULES[schedule])
    if num is not None:
        ours.set_timesteps(num)
        stock.set_timesteps(num)
    v = torch.linspace(-1, 1, 5)
    for t, s in chain_positions(ours):
        c = coefficients(ours, t, s)
        small = max(c["small"], 1e-20)
        expected = {
            "fixed_small": small,
            "fixed_small_log": np.sqrt(small),
            "fixed_large": c["beta"],
            "fixed_large_log": np.log(c["beta"]),
            "learned": v.double().numpy(),
            "learned_range": (v.double().numpy() + 1) / 2 * np.log(c["beta"] / small) + np.log(small),
        }[variance_type]
        own, other = (
            np.asarray(scheduler._get_variance(torch.tensor(t), predicted_variance=v, variance_type=variance_type))
            for scheduler in (ours, stock)
        )
        assert own.dtype == other.dtype == np.float32
        scale = 1 if variance_type in ("fixed_large_log", "learned_range") else np.abs(expected)
        tables = 4 * EPS * (t + 2) * (1 / c["noise_t"] + (1 / c["noise_s"] if s >= 0 else 0))
        tables += 4 * EPS * (t - s + 2) / c["beta"]
        rounding = 8 * EPS * np.abs(expected)
        # What `coefficients` loses of beta where 1 - abar_t / abar_s cancels.
        assert (np.abs(own - expected) <= rounding + 2.0**-50 * (t + 2) / c["beta"] * scale).all(), t
        assert (np.abs(other - expected) <= rounding + tables * scale).all(), t


@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
def test_get_variance_takes_the_configured_type(variance_type):
    """Without a type it is the configuration's, on a timestep of the chain; the borrowed one is only `step`'s."""
    ours = DDPMVLBScheduler(variance_type=variance_type)
    v = torch.zeros(2)
    own, named = (ours._get_variance(500, v, name) for name in (None, ours.config.variance_type))
    assert torch.equal(own, named)
    assert float(ours._get_variance(0, variance_type="fixed_small")) == pytest.approx(1e-20)
    assert float(ours.reverse_process().forward.posterior_log_variance[0].exp()) > 1e-5


def test_get_variance_refuses():
    """A timestep outside the chain, an unknown type and a learned range without its output are refused by name."""
    ours = DDPMVLBScheduler()
    ours.set_timesteps(10)
    with pytest.raises(ValueError, match="not part of the current chain"):
        ours._get_variance(1)
    with pytest.raises(ValueError, match="`variance_type` must be one of.*'other'"):
        ours._get_variance(0, variance_type="other")
    with pytest.raises(ValueError, match="predicted_variance"):
        ours._get_variance(0, variance_type="learned_range")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("method", ["add_noise", "get_velocity"])
def test_noising_and_velocity_equal_stock(method, schedule):
    """add_noise and get_velocity equal stock's within its float32 1 - alphabar_t, off by 2 (t + 1) EPS of itself."""
    ours, stock = DDPMVLBScheduler(**SCHEDULES[schedule]), DDPMScheduler(**SCHEDULES[schedule])
    abar = float64_alphas_cumprod(ours.config)[1:]
    for t in {0, 1, len(ours) // 2, len(ours) - 1}:
        x_0, noise, t3 = randn(0), randn(1), torch.full((3,), t)
        own, other = getattr(ours, method)(x_0, noise, t3), getattr(stock, method)(x_0, noise, t3)
        a, b = (x_0, noise) if method == "add_noise" else (noise, -x_0)
        expected = np.sqrt(abar[t]) * a.double() + np.sqrt(1 - abar[t]) * b.double()
        magnitude = (a.abs() + b.abs()).double()
        table = 2 * EPS * (t + 1) * (1 + 1 / np.sqrt(1 - abar[t]))
        assert ((own - expected).abs() <= 4 * EPS * magnitude).all()
        assert ((other - expected).abs() <= (table + 4 * EPS) * magnitude).all()


def test_public_tables_are_stock_s():
    """The attributes that training scripts read (betas, alphas, alphas_cumprod, one) are stock's, in float32."""
    ours, stock = DDPMVLBScheduler(), DDPMScheduler()
    for name in ("betas", "alphas", "alphas_cumprod", "one"):
        own, other = getattr(ours, name), getattr(stock, name)
        assert own.dtype == other.dtype == torch.float32
        torch.testing.assert_close(own, other, rtol=2e-4, atol=0)
    # Of its own 1000 factors the float32 product loses up to 1000 * 2 EPS; ours is the rounded float64 product.
    exact = torch.from_numpy(float64_alphas_cumprod(ours.config)[1:])
    torch.testing.assert_close(ours.alphas_cumprod.double(), exact, rtol=EPS, atol=0)


def test_interface_is_stock_s():
    """Constructor defaults, len, order, init_noise_sigma, compatibles and scale_model_input are stock's."""
    ours, stock = DDPMVLBScheduler(), DDPMScheduler()
    own, other = dict(ours.config), dict(stock.config)
    assert {k: own[k] for k in other if not k.startswith("_")} == {
        k: v for k, v in other.items() if not k.startswith("_")
    }
    assert len(ours) == len(stock) == 1000
    assert (ours.order, ours.init_noise_sigma) == (stock.order, stock.init_noise_sigma)
    assert ours._compatibles == stock._compatibles and DDPMScheduler in ours.compatibles
    assert torch.equal(ours.timesteps, stock.timesteps)
    assert ours.num_inference_steps is stock.num_inference_steps is None
    sample = randn(0)
    assert ours.scale_model_input(sample, 5) is sample


@pytest.mark.parametrize(
    "arguments", [None, {"num_inference_steps": 1}, {"num_inference_steps": 7}, {"timesteps": [18, 7, 1, 0]}]
)
def test_previous_timestep_equals_stock(arguments):
    """The timestep after each one of the chain is stock's and a tensor like it, -1 after the last."""
    ours, stock = DDPMVLBScheduler(num_train_timesteps=20), DDPMScheduler(num_train_timesteps=20)
    if arguments is not None:
        ours.set_timesteps(**arguments)
        stock.set_timesteps(**arguments)
    for t in ours.timesteps:
        own, other = ours.previous_timestep(t), stock.previous_timestep(t)
        assert own.item() == ours.previous_timestep(int(t)).item() == other.item() and own.dtype == other.dtype
    with pytest.raises(ValueError, match="not part of the current chain"):
        ours.previous_timestep(20)


# --- stock's defects


def test_fixed_large_log_is_fixed_large():
    """fixed_large_log gives fixed_large's step; in stock it takes the root of a logarithm below 0: NaN."""
    sample, output = randn(0), randn(1)
    results = {
        name: DDPMVLBScheduler(variance_type=name).step(output, 500, sample, generator=seeded(2)).prev_sample
        for name in ("fixed_large_log", "fixed_large")
    }
    assert torch.equal(results["fixed_large_log"], results["fixed_large"])
    stock = DDPMScheduler(variance_type="fixed_large_log").step(output, 500, sample, generator=seeded(2)).prev_sample
    assert stock.isnan().any()


def test_fixed_large_log_is_saved_under_the_name_that_stock_samples_rightly():
    """The saved config says fixed_large, so that stock made from it samples what ours does."""
    ours = DDPMVLBScheduler(variance_type="fixed_large_log")
    assert json.loads(ours.to_json_string())["variance_type"] == "fixed_large"
    assert DDPMScheduler.from_config(ours.config).config.variance_type == "fixed_large"


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range", "learned"])
@pytest.mark.parametrize("num", [None, 5])
def test_batched_timesteps_equal_scalar_ones(variance_type, num):
    """One timestep for each sample gives what the samples get alone, the last step included; stock raises."""
    ours = DDPMVLBScheduler(num_train_timesteps=20, variance_type=variance_type)
    if num is not None:
        ours.set_timesteps(num)
    channels = 4 if ours.config.variance_type.startswith("learned") else 2
    sample, output = randn(0), randn(1, (3, channels, 4, 5))
    timesteps = ours.timesteps[[0, -1, 2]]
    together = ours.step(output, timesteps, sample, generator=[seeded(i) for i in range(3)])
    for i in range(3):
        one = slice(i, i + 1)
        alone = ours.step(output[one], int(timesteps[i]), sample[one], generator=seeded(i))
        for own, single in zip(together.to_tuple(), alone.to_tuple(), strict=True):
            torch.testing.assert_close(own[one], single, rtol=2e-6, atol=2e-6)
    stock = DDPMScheduler(num_train_timesteps=20)
    with pytest.raises((RuntimeError, ValueError, IndexError, TypeError)):
        stock.step(output[:, :2], timesteps, sample)


@pytest.mark.parametrize("name", ["fixed", "learnt_range", "", None])
def test_unknown_variance_type_is_refused(name):
    """An unknown variance type raises with the choices; stock takes it and samples fixed_small without a word."""
    with pytest.raises(ValueError, match="`variance_type` must be one of.*learned_range"):
        DDPMVLBScheduler(variance_type=name)
    DDPMScheduler(variance_type=name)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range"])
def test_trailing_spacing_adds_no_noise_at_the_end(variance_type):
    """The last step of a trailing chain, though its timestep is above 0, returns x_0_hat itself; stock's is noisy."""
    config = {"timestep_spacing": "trailing", "variance_type": variance_type}
    ours, stock = DDPMVLBScheduler(**config), DDPMScheduler(**config)
    ours.set_timesteps(10)
    stock.set_timesteps(10)
    t = int(ours.timesteps[-1])
    assert t == 99
    channels = 4 if variance_type == "learned_range" else 2
    sample, output = randn(0), randn(1, (3, channels, 4, 5))
    first, second = (ours.step(output, t, sample, generator=seeded(seed)) for seed in (1, 2))
    assert torch.equal(first.prev_sample, second.prev_sample)
    torch.testing.assert_close(first.prev_sample, first.pred_original_sample, rtol=1e-6, atol=1e-6)
    if variance_type == "fixed_large":
        noisy = stock.step(output, torch.tensor(t), sample, generator=seeded(1))
        assert float((noisy.prev_sample - noisy.pred_original_sample).abs().max()) > 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_add_noise_in_half_keeps_the_first_steps_noise(dtype):
    """In half precision the noised data is the float32 result rounded once; stock's bfloat16 has no noise at t = 0."""
    ours, stock = DDPMVLBScheduler(), DDPMScheduler()
    x_0, noise, t = randn(0).to(dtype), randn(1).to(dtype), torch.zeros(3, dtype=torch.long)
    own = ours.add_noise(x_0, noise, t)
    assert own.dtype == dtype
    assert torch.equal(own, ours.add_noise(x_0.float(), noise.float(), t).to(dtype))
    assert not torch.equal(own, x_0)
    if dtype == torch.bfloat16:
        assert torch.equal(stock.add_noise(x_0, noise, t), x_0)
    v = ours.get_velocity(x_0, noise, t)
    assert v.dtype == dtype and torch.equal(v, ours.get_velocity(x_0.float(), noise.float(), t).to(dtype))


# --- saving and other classes


CONFIGS = {
    "default": {},
    "cosine": {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 123},
    "trained": {"trained_betas": [0.1, 0.2, 1 / 3], "num_train_timesteps": 3},
    "learned": {"variance_type": "learned", "clip_sample": False, "timestep_spacing": "trailing"},
    "learned_range": {"variance_type": "learned_range", "prediction_type": "v_prediction", "beta_end": 0.03},
    "levels": {"levels": 17},
    "continuous": {"levels": None},
    "zero_snr": {"rescale_betas_zero_snr": True, "prediction_type": "sample"},
    "threshold": {"thresholding": True, "sample_max_value": 2.0, "dynamic_thresholding_ratio": 0.99},
    "offset": {"steps_offset": 1, "variance_type": "fixed_large"},
}


def plain(config) -> dict:
    return {k: v for k, v in config.items() if not k.startswith("_")}


@pytest.mark.parametrize("name", CONFIGS)
def test_save_and_load_is_the_identity(name, tmp_path, diffusers_log):
    """A saved and loaded scheduler has the same config and bit-equal tables, and loading is silent."""
    ours = DDPMVLBScheduler(**CONFIGS[name])
    ours.save_pretrained(tmp_path)
    loaded = DDPMVLBScheduler.from_pretrained(tmp_path)
    assert plain(loaded.config) == plain(ours.config)
    assert torch.equal(loaded.betas, ours.betas) and torch.equal(loaded.alphas_cumprod, ours.alphas_cumprod)
    own, other = ours.reverse_process(dtype=torch.float64), loaded.reverse_process(dtype=torch.float64)
    assert torch.equal(own.forward.betas, other.forward.betas) and own.levels == other.levels
    assert not diffusers_log


@pytest.mark.parametrize(
    "config",
    [
        *({"num_train_timesteps": total} for total in (1, 5, 100)),
        *({"beta_start": start, "beta_end": 20 * start} for start in (0.0001, 0.01)),
        *({"beta_schedule": name} for name in ("squaredcos_cap_v2", "scaled_linear", "sigmoid")),
        *({"variance_type": name} for name in ("fixed_small_log", "fixed_large", "learned", "learned_range")),
        *({"prediction_type": name, "clip_sample": False} for name in ("epsilon", "sample", "v_prediction")),
        *({"thresholding": True, "sample_max_value": value} for value in (1.0, 2.0)),
        {"trained_betas": np.array([0.1, 0.3])},
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    ],
    ids=str,
)
def test_loaded_scheduler_steps_the_same(config, tmp_path):
    """A scheduler from save_config's file steps bit for bit as the saved one, on its whole and on a shorter chain."""
    ours = DDPMVLBScheduler(**config)
    ours.save_config(tmp_path)
    loaded = DDPMVLBScheduler.from_pretrained(tmp_path)
    channels = 4 if ours.config.variance_type.startswith("learned") else 2
    sample, output = randn(0), randn(1, (3, channels, 4, 5))
    for num in (None, min(len(ours), 50)):
        if num is not None:
            ours.set_timesteps(num)
            loaded.set_timesteps(num)
        for t in {0, len(ours.timesteps) // 2, len(ours.timesteps) - 1}:
            own, other = (
                scheduler.step(output, scheduler.timesteps[t], sample, generator=seeded(t)).to_tuple()
                for scheduler in (ours, loaded)
            )
            assert all(torch.equal(a, b) for a, b in zip(own, other, strict=True))


def test_loaded_config_is_the_whole_config(tmp_path):
    """A loaded scheduler left nothing at its default: its config is the saved one without diffusers' list of those."""
    ours = DDPMVLBScheduler()
    ours.save_pretrained(tmp_path)
    saved = dict(ours.config)
    assert saved.pop("_use_default_values")
    assert dict(DDPMVLBScheduler.from_pretrained(tmp_path).config) == saved


def test_config_comes_back_from_every_compatible():
    """Each compatible class takes our config, and gives it back whole: nothing lost, nothing of ours changed."""
    ours = DDPMVLBScheduler(variance_type="fixed_small", beta_schedule="linear", num_train_timesteps=100)
    classes = [c for c in ours.compatibles if not isinstance(c, DummyObject)]
    assert len(classes) > 10
    for scheduler in classes:
        back = DDPMVLBScheduler.from_config(scheduler.from_config(ours.config).config)
        assert {k: v for k, v in back.config.items() if k in ours.config} == dict(ours.config), scheduler
        init = inspect.signature(DDPMVLBScheduler.__init__).parameters
        assert not (set(back.config) - set(ours.config)) & set(init), scheduler


def test_attributes(diffusers_log):
    """Own attributes and methods are got without a word, config values with diffusers' FutureWarning, others not."""
    ours = DDPMVLBScheduler()
    ours.something = 5
    ours.register_to_config(other=6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ours.something == 5 and ours.save_pretrained == ours.save_pretrained and ours.config.other == 6
    with pytest.warns(FutureWarning, match="other"):
        assert ours.other == 6
    with pytest.raises(AttributeError, match="^'DDPMVLBScheduler' object has no attribute 'does_not_exist'$"):
        _ = ours.does_not_exist
    assert not diffusers_log
    # diffusers wants `**kwargs` where, and only where, there are deprecated ones.
    assert ours._deprecated_kwargs == [] and "kwargs" not in inspect.signature(DDPMVLBScheduler.__init__).parameters


@pytest.mark.parametrize("levels", [17, 2, None])
def test_levels_are_written_only_where_they_differ(levels, tmp_path):
    """The JSON of a plain config has stock's keys only; other levels are written and read back."""
    plain_keys = set(json.loads(DDPMVLBScheduler().to_json_string()))
    assert plain_keys == set(json.loads(DDPMScheduler().to_json_string()))
    assert "levels" not in json.loads(DDPMVLBScheduler(levels=256).to_json_string())
    DDPMVLBScheduler(levels=levels).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert written["levels"] == levels and set(written) == plain_keys | {"levels"}
    assert DDPMVLBScheduler.from_pretrained(tmp_path).reverse_process().levels == levels


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ("levels", "continuous")])
@pytest.mark.parametrize("how", ["from_pretrained", "from_config"])
def test_plain_config_loads_in_stock_without_a_word(how, name, tmp_path, diffusers_log):
    """Stock made from our files or our config warns of nothing and has the same values."""
    ours = DDPMVLBScheduler(**CONFIGS[name])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if how == "from_pretrained":
            ours.save_pretrained(tmp_path)
            stock = DDPMScheduler.from_pretrained(tmp_path)
        else:
            stock = DDPMScheduler.from_config(ours.config)
    assert not diffusers_log
    keys = set(plain(DDPMScheduler().config))
    assert {k: v for k, v in plain(stock.config).items() if k in keys} == {
        k: v for k, v in plain(ours.config).items() if k in keys
    }


def test_explicit_default_levels_are_a_plain_config(diffusers_log):
    """`levels=256` written out is the default: stock made from that config warns of nothing either."""
    DDPMScheduler.from_config(DDPMVLBScheduler(levels=256).config)
    assert not diffusers_log


def test_other_levels_are_announced_by_stock(diffusers_log):
    """Stock says that it does not know levels other than the default; so the silence above means something."""
    DDPMScheduler.from_config(DDPMVLBScheduler(levels=17).config)
    assert len(diffusers_log) == 1 and "levels" in diffusers_log[0]


def test_levels_survive_stock(tmp_path):
    """Levels that stock does not know come back from a config that went through it, in memory and on disk."""
    stock = DDPMScheduler.from_config(DDPMVLBScheduler(levels=17).config)
    assert DDPMVLBScheduler.from_config(stock.config).config.levels == 17
    stock.save_pretrained(tmp_path)
    assert DDPMVLBScheduler.from_pretrained(tmp_path).config.levels == 17


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"variance_type": "learned_range", "beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": [0.1, 0.2, 0.3], "num_train_timesteps": 3, "clip_sample_range": 2.0},
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        {"variance_type": "fixed_large", "num_train_timesteps": 77, "thresholding": True, "steps_offset": 1},
    ],
)
def test_from_stock_s_config(config, diffusers_log):
    """Ours made from a stock scheduler's config has every value of it."""
    stock = DDPMScheduler(**config)
    ours = DDPMVLBScheduler.from_config(stock.config)
    assert {k: ours.config[k] for k in plain(stock.config)} == plain(stock.config)
    assert len(ours) == len(stock) and not diffusers_log
    assert torch.equal(ours.betas, DDPMVLBScheduler(**config).betas)


@pytest.mark.parametrize("scheduler", STOCK_SCHEDULERS)
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"num_train_timesteps": 1000, "beta_start": 0.0001, "prediction_type": "epsilon"},
        {"num_train_timesteps": 200, "beta_schedule": "scaled_linear", "prediction_type": "v_prediction"},
        {"trained_betas": [0.1, 0.2, 0.3, 0.35], "num_train_timesteps": 4, "variance_type": "learned_range"},
        {"beta_start": 0.001, "beta_end": 0.03, "prediction_type": "sample", "variance_type": "fixed_large"},
    ],
)
def test_model_defining_values_survive_a_change_of_class(scheduler, config):
    """Every stock class made from our config keeps what the network was trained with, defaults of ours included.

    Stock drops the values that were left at their defaults, and other classes have other defaults (LCM and Heun start
    at 0.00085): their samples would come from another schedule.
    """
    ours = DDPMVLBScheduler(**config)
    other = scheduler.from_config(ours.config)
    for key in ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type", "variance_type"):
        assert other.config[key] == ours.config[key], key
    assert (other.config.trained_betas is None) == (ours.config.trained_betas is None)
    torch.testing.assert_close(other.betas, ours.betas, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(other.alphas_cumprod, ours.alphas_cumprod, rtol=2e-4, atol=1e-8)
    back = DDPMVLBScheduler.from_config(other.config)
    for key in ("num_train_timesteps", "beta_schedule", "prediction_type", "variance_type"):
        assert back.config[key] == ours.config[key], key


def test_trained_betas_set_the_length():
    """The number of trained betas is T whatever `num_train_timesteps` says, in the config too."""
    ours = DDPMVLBScheduler(trained_betas=np.array([0.1, 0.2, 0.3]))
    assert len(ours) == ours.config.num_train_timesteps == 3 and ours.timesteps.tolist() == [2, 1, 0]
    assert json.loads(ours.to_json_string())["trained_betas"] == [0.1, 0.2, 0.3]
    stock = DDPMScheduler.from_config(ours.config)
    assert len(stock) == 3 and stock.timesteps.tolist() == [2, 1, 0]


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_are_independent_and_equal(clone):
    """A deep copy or pickle steps as the original does, and keeps its chain when the original changes it."""
    ours = DDPMVLBScheduler(num_train_timesteps=50, variance_type="learned_range")
    ours.set_timesteps(7)
    sample, output = randn(0), randn(1, (3, 4, 4, 5))
    t = ours.timesteps[:3].clone()
    expected = ours.step(output, t, sample, generator=seeded(0)).prev_sample
    twin = clone(ours)
    ours.set_timesteps(5)
    assert plain(twin.config) == plain(ours.config) and len(twin.timesteps) == 7
    assert torch.equal(twin.step(output, t, sample, generator=seeded(0)).prev_sample, expected)
    assert torch.equal(twin.betas, ours.betas)


# --- set_timesteps


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_set_timesteps_equals_stock(spacing):
    """A number of steps gives stock's timesteps in all three spacings, int64, and is remembered."""
    config = {"num_train_timesteps": 100, "timestep_spacing": spacing}
    ours, stock = DDPMVLBScheduler(**config), DDPMScheduler(**config)
    for num in (1, 2, 5, 10, 25, 100):
        ours.set_timesteps(num, device="cpu")
        stock.set_timesteps(num, device="cpu")
        assert torch.equal(ours.timesteps, stock.timesteps) and ours.timesteps.dtype == torch.int64
        assert ours.num_inference_steps == num and not ours.custom_timesteps


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_custom_timesteps(kind):
    """Timesteps of any container make the chain, and a number of steps afterwards replaces them."""
    ours, stock = DDPMVLBScheduler(), DDPMScheduler()
    ours.set_timesteps(timesteps=kind([999, 500, 20, 3]))
    stock.set_timesteps(timesteps=[999, 500, 20, 3])
    assert torch.equal(ours.timesteps, stock.timesteps)
    assert ours.custom_timesteps and ours.num_inference_steps == 4
    sample, output, noise = randn(0), randn(1), torch.randn(SHAPE, generator=seeded(0))
    own = ours.step(output, 500, sample, generator=seeded(0)).prev_sample.double().numpy()
    expected, _ = reference_step(ours, output, 500, 20, sample, noise)
    assert (np.abs(own - expected) <= own_error_bound(ours, output, 500, 20, sample, noise)).all()
    ours.set_timesteps(10)
    assert not ours.custom_timesteps and ours.timesteps.tolist() == list(range(0, 1000, 100))[::-1]


def test_chain_can_be_changed_back():
    """Setting all T steps after fewer gives the whole chain's steps again, bit for bit."""
    ours = DDPMVLBScheduler(num_train_timesteps=30)
    sample, output, t = randn(0), randn(1), torch.tensor([29, 3, 15])
    whole = ours.step(output, 15, sample, generator=seeded(0)).prev_sample
    batched = ours.step(output, t, sample, generator=seeded(0)).prev_sample
    ours.set_timesteps(timesteps=[29, 15, 3])
    assert not torch.equal(ours.step(output, 15, sample, generator=seeded(0)).prev_sample, whole)
    assert not torch.equal(ours.step(output, t, sample, generator=seeded(0)).prev_sample, batched)
    ours.set_timesteps(30)
    assert torch.equal(ours.step(output, 15, sample, generator=seeded(0)).prev_sample, whole)
    assert torch.equal(ours.step(output, t, sample, generator=seeded(0)).prev_sample, batched)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one"),
        ({"num_inference_steps": 3, "timesteps": [2, 1]}, "exactly one"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": -1}, "num_inference_steps"),
        ({"num_inference_steps": 11}, "num_inference_steps"),
        ({"num_inference_steps": 2.5}, "num_inference_steps"),
        ({"timesteps": []}, "empty"),
        ({"timesteps": [1, 2]}, "descending"),
        ({"timesteps": [5, 5]}, "descending"),
        ({"timesteps": [10, 3]}, "must start before 10"),
        ({"timesteps": [3, -1]}, "must start before 10.*0"),
    ],
)
def test_set_timesteps_refuses(arguments, message):
    """Both, none, numbers outside 1 .. T and timesteps that are no descending chain are refused; the chain stays."""
    ours = DDPMVLBScheduler(num_train_timesteps=10)
    ours.set_timesteps(5)
    before = ours.timesteps.clone()
    with pytest.raises(ValueError, match=message):
        ours.set_timesteps(**arguments)
    assert torch.equal(ours.timesteps, before) and ours.num_inference_steps == 5 and not ours.custom_timesteps


def test_set_timesteps_refuses_fractions():
    """Custom timesteps with a fraction are refused: truncating them would visit other steps than asked for."""
    ours = DDPMVLBScheduler(num_train_timesteps=10)
    with pytest.raises((TypeError, ValueError)):
        ours.set_timesteps(timesteps=[7.5, 2.5])


# --- step


@pytest.mark.parametrize(
    "form", [int, np.int64, torch.tensor, lambda t: torch.tensor([t]), lambda t: torch.tensor(t, dtype=torch.int32)]
)
def test_forms_of_one_timestep(form):
    """An int, a numpy integer, a 0-dim and a one-element tensor are the same timestep for the whole batch."""
    ours = DDPMVLBScheduler()
    sample, output = randn(0), randn(1)
    expected = ours.step(output, 500, sample, generator=seeded(0)).prev_sample
    assert torch.equal(ours.step(output, form(500), sample, generator=seeded(0)).prev_sample, expected)


def test_list_of_generators_equals_single_runs():
    """A generator for each sample gives each the noise that it would get alone."""
    ours = DDPMVLBScheduler()
    sample, output = randn(0), randn(1)
    together = ours.step(output, 700, sample, generator=[seeded(i) for i in range(3)]).prev_sample
    for i in range(3):
        alone = ours.step(output[i : i + 1], 700, sample[i : i + 1], generator=seeded(i)).prev_sample
        assert torch.equal(together[i : i + 1], alone)


def test_return_dict():
    """The output is stock's class, or with return_dict=False the tuple (prev_sample, pred_original_sample)."""
    ours = DDPMVLBScheduler()
    sample, output = randn(0), randn(1)
    result = ours.step(output, 10, sample, generator=seeded(0))
    assert type(result) is DDPMSchedulerOutput
    previous, x_0 = ours.step(output, 10, sample, generator=seeded(0), return_dict=False)
    assert torch.equal(previous, result.prev_sample) and torch.equal(x_0, result.pred_original_sample)


def test_last_step_draws_nothing():
    """The last step leaves the generator as it was, as stock's does at t = 0."""
    ours = DDPMVLBScheduler(num_train_timesteps=10)
    generator = seeded(0)
    ours.step(randn(1), 0, randn(0), generator=generator)
    assert torch.equal(generator.get_state(), seeded(0).get_state())


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_unused_variance_half_is_left_aside(variance_type):
    """A 2C-channel output under a fixed variance steps like its mean half; so one network serves all types."""
    ours = DDPMVLBScheduler(variance_type=variance_type)
    sample, output = randn(0), randn(1, (3, 4, 4, 5))
    for t in (0, 400):
        both = ours.step(output, t, sample, generator=seeded(0)).prev_sample
        assert torch.equal(both, ours.step(output[:, :2], t, sample, generator=seeded(0)).prev_sample)


@pytest.mark.parametrize(("variance_type", "channels"), [("learned_range", 2), ("learned", 2), ("fixed_small", 3)])
def test_wrong_channels_are_refused(variance_type, channels):
    """Another number of output channels than the variance type needs raises with both numbers."""
    ours = DDPMVLBScheduler(variance_type=variance_type)
    with pytest.raises(ValueError, match="output channels"):
        ours.step(randn(1, (3, channels, 4, 5)), 10, randn(0))


@pytest.mark.parametrize(
    ("timestep", "error"),
    [
        (5.0, TypeError),
        (torch.tensor(5.0), TypeError),
        (torch.tensor([4.0, 4.0, 4.0]), TypeError),
        (torch.tensor(True), TypeError),
        (torch.tensor([True, False, True]), TypeError),
        (5, ValueError),
        (10, ValueError),
        (-1, ValueError),
        (torch.tensor(5), ValueError),
        (torch.tensor([4, 5, 4]), ValueError),
        (torch.tensor([4, 10, 4]), ValueError),
        (torch.tensor([4, -1, 4]), ValueError),
        (torch.tensor([4, 6]), ValueError),
        (torch.tensor([[4], [6], [8]]), ValueError),
    ],
)
def test_wrong_timesteps_are_refused(timestep, error):
    """Timesteps that are no integers, not part of the chain (0, 2, 4, 6, 8) or not one for each sample are refused."""
    ours = DDPMVLBScheduler(num_train_timesteps=10)
    ours.set_timesteps(5)
    with pytest.raises(error, match="timestep"):
        ours.step(randn(1), timestep, randn(0))


@pytest.mark.parametrize("method", ["add_noise", "get_velocity"])
def test_noising_refuses_wrong_timesteps(method):
    """Float timesteps and timesteps outside the training chain are refused: -1 would silently be the noisiest."""
    call = getattr(DDPMVLBScheduler(num_train_timesteps=10), method)
    with pytest.raises(TypeError, match="integer"):
        call(randn(0), randn(1), torch.tensor([1.0, 2.0, 3.0]))
    for bad in (-1, 10):
        with pytest.raises(IndexError, match="0 .. 9"):
            call(randn(0), randn(1), torch.tensor([0, bad, 1]))


@pytest.mark.parametrize("method", ["add_noise", "get_velocity"])
def test_noising_does_not_depend_on_the_chain(method):
    """The training process stays whole when fewer steps are sampled; one timestep serves a whole batch."""
    ours = DDPMVLBScheduler(num_train_timesteps=100)
    before = getattr(ours, method)(randn(0), randn(1), torch.tensor([7, 7, 7]))
    ours.set_timesteps(5)
    after = getattr(ours, method)(randn(0), randn(1), torch.tensor([7]))
    assert torch.equal(before, after)


@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 3, 8, 8), (2, 1, 2, 3, 4), (2, 5)])
@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif("not torch.cuda.is_available()"))]
)
def test_shape_and_device_are_kept(device, shape):
    """A step and noised data have the sample's shape and device, wherever the timesteps lie."""
    ours = DDPMVLBScheduler()
    ours.set_timesteps(50, device=device)
    assert ours.timesteps.device.type == device
    sample, output = randn(0, shape).to(device), randn(1, shape).to(device)
    for t in (ours.timesteps[0], ours.timesteps[1].cpu(), int(ours.timesteps[-1])):
        for result in ours.step(output, t, sample, return_dict=False):
            assert result.shape == shape and result.device == sample.device
    for t in (ours.timesteps[5][None], ours.timesteps[5][None].cpu()):
        noised = ours.add_noise(sample, output, t)
        assert noised.shape == shape and noised.device == sample.device


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("batched", [False, True])
def test_dtype_of_the_sample_is_kept(dtype, batched):
    """A step returns the sample's dtype, and in half precision the float32 step's result rounded once."""
    ours = DDPMVLBScheduler()
    sample, output = randn(0).to(dtype), randn(1).to(dtype)
    t = torch.tensor([300, 300, 300]) if batched else 300
    result = ours.step(output, t, sample, generator=seeded(0))
    assert result.prev_sample.dtype == result.pred_original_sample.dtype == dtype
    noise = torch.randn(SHAPE, generator=seeded(0), dtype=dtype)
    expected, _ = reference_step(ours, output, 300, 299, sample, noise)
    error = np.abs(result.prev_sample.double().numpy() - expected)
    rounding = torch.finfo(dtype).eps / 2 * np.abs(expected)
    inner = 1e-13 if dtype == torch.float64 else own_error_bound(ours, output, 300, 299, sample, noise)
    assert (error <= rounding + inner).all()


def test_learned_variance_is_the_output_itself():
    """Under `learned` the variance half is log sigma^2, as DDPM's authors meant it; checked against float64."""
    ours = DDPMVLBScheduler(variance_type="learned")
    sample, log_variance = randn(0), randn(2) - 6
    output = torch.cat([randn(1), log_variance], dim=1)
    noise = torch.randn(SHAPE, generator=seeded(0))
    expected, _ = reference_step(ours, output, 300, 299, sample, noise)
    result = ours.step(output, 300, sample, generator=seeded(0)).prev_sample
    np.testing.assert_allclose(result.double().numpy(), expected, rtol=1e-5, atol=1e-5)


# --- reverse_process


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range", "learned"])
@pytest.mark.parametrize("num", [None, 6])
def test_step_is_a_sample_of_the_reverse_process(variance_type, num):
    """step is p.sample(noise) of the same chain's reverse process, and p.mean at the end: one function for all uses.

    The two round the same float64 tables at different places: a few float32 roundings.
    """
    ours = DDPMVLBScheduler(num_train_timesteps=60, variance_type=variance_type, prediction_type="v_prediction")
    if num is not None:
        ours.set_timesteps(num)
    reverse = ours.reverse_process(timesteps=None if num is None else ours.timesteps.tolist())
    channels = 4 if variance_type.startswith("learned") else 2
    sample, output = randn(0), randn(1, (3, channels, 4, 5))
    for timestep in ours.timesteps.tolist():
        t = int((reverse.forward.timesteps == timestep).nonzero())
        p, x_0 = reverse(output, sample, torch.full((3,), t))
        result = ours.step(output, timestep, sample, generator=seeded(t))
        expected = p.mean if t == 0 else p.sample(torch.randn(SHAPE, generator=seeded(t)))
        torch.testing.assert_close(result.prev_sample, expected, rtol=4e-6, atol=4e-6)
        torch.testing.assert_close(result.pred_original_sample, x_0, rtol=4e-6, atol=4e-6)


def test_reverse_process_has_the_configuration():
    """The reverse process carries every option of the config, in the dtype asked for; the chain set for sampling
    does not shorten it."""
    ours = DDPMVLBScheduler(
        num_train_timesteps=30,
        variance_type="learned_range",
        prediction_type="sample",
        clip_sample=False,
        levels=17,
        thresholding=True,
        dynamic_thresholding_ratio=0.9,
        sample_max_value=3.0,
        clip_sample_range=2.0,
    )
    ours.set_timesteps(5)
    for dtype in (torch.float32, torch.float64):
        reverse = ours.reverse_process("cpu", dtype)
        assert len(reverse.forward) == 30 and reverse.forward.betas.dtype == dtype
        for name in (
            "variance_type",
            "prediction_type",
            "clip_sample",
            "levels",
            "thresholding",
            "dynamic_thresholding_ratio",
            "sample_max_value",
            "clip_sample_range",
        ):
            assert getattr(reverse, name) == ours.config[name]
    assert ours.reverse_process().forward.betas.dtype == torch.float32


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor, np.array])
def test_reverse_process_of_fewer_timesteps(kind):
    """The timesteps in any order and container give the ascending chain with the training marginals there."""
    ours = DDPMVLBScheduler(num_train_timesteps=30)
    forward = ours.reverse_process(timesteps=kind([29, 3, 11]), dtype=torch.float64).forward
    whole = ours.reverse_process(dtype=torch.float64).forward
    assert forward.timesteps.tolist() == [3, 11, 29]
    torch.testing.assert_close(forward.alphas_cumprod, whole.alphas_cumprod[[3, 11, 29]], rtol=1e-13, atol=0)


@pytest.mark.parametrize("timesteps", [[], [3, 3], [30, 1], [-1, 4]])
def test_reverse_process_refuses(timesteps):
    """Repeated timesteps, none, and ones outside the chain are refused; so is half precision."""
    ours = DDPMVLBScheduler(num_train_timesteps=30)
    with pytest.raises(ValueError, match="timesteps"):
        ours.reverse_process(timesteps=timesteps)
    with pytest.raises(ValueError, match="dtype"):
        ours.reverse_process(dtype=torch.float16)


# --- edges


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize("num", [None, 1, 5])
def test_zero_terminal_snr_samples_finitely(prediction_type, num):
    """From pure noise at alphabar_T = 0 the whole loop stays finite, and ends in the clipped range."""
    ours = DDPMVLBScheduler(
        num_train_timesteps=50,
        rescale_betas_zero_snr=True,
        prediction_type=prediction_type,
        timestep_spacing="trailing",
    )
    assert float(ours.alphas_cumprod[-1]) == 0
    if num is not None:
        ours.set_timesteps(num)
    x, generator = randn(0), seeded(1)
    for t in ours.timesteps:
        x = ours.step(torch.tanh(x), t, x, generator=generator).prev_sample
        assert x.isfinite().all()
    assert float(x.abs().max()) <= 1 + 1e-6


def test_zero_terminal_snr_refuses_epsilon():
    """The noise says nothing of x_0 where no signal is left: visits to that step raise, other steps are right."""
    scheduler = DDPMVLBScheduler(rescale_betas_zero_snr=True)
    assert len(scheduler) == len(scheduler.timesteps) == 1000 and int(scheduler.timesteps[0]) == 999
    x = randn(0)
    for visit in (
        lambda: scheduler.reverse_process(),
        lambda: scheduler.reverse_process(timesteps=[0, 999]),
        lambda: scheduler.set_timesteps(1000),
        lambda: scheduler.set_timesteps(timesteps=[999, 0]),
        lambda: scheduler.step(x, 999, x),
    ):
        with pytest.raises(ValueError, match="zero-terminal SNR"):
            visit()
    alphas_cumprod = (1 - rescale_betas_zero_snr(make_betas())).cumprod(0)
    x = x.double()
    for t in (998, 500, 0):
        x_0 = x * (1 - (1 - alphas_cumprod[t]).sqrt()) / alphas_cumprod[t].sqrt()
        ours = scheduler.step(x, t, x, generator=seeded(0)).pred_original_sample
        torch.testing.assert_close(ours, x_0.clamp(-1, 1), rtol=1e-9, atol=1e-9)
    scheduler.set_timesteps(10)  # "leading" stays below the last step
    assert int(scheduler.timesteps[0]) == 900
    assert scheduler.step(x, 900, x, generator=seeded(0)).prev_sample.isfinite().all()
    assert torch.equal(scheduler.add_noise(x, x, torch.tensor([999] * len(x))), x)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range", "learned"])
@pytest.mark.parametrize(("total", "spacing"), [(1, "leading"), (1000, "trailing"), (1000, "leading")])
def test_chain_of_one_step(total, spacing, variance_type):
    """A chain of one step returns x_0_hat without noise: the network's estimate of the data is the sample."""
    ours = DDPMVLBScheduler(num_train_timesteps=total, timestep_spacing=spacing, variance_type=variance_type)
    ours.set_timesteps(1)
    channels = 4 if variance_type.startswith("learned") else 2
    result = ours.step(randn(1, (3, channels, 4, 5)), ours.timesteps[0], randn(0))
    assert result.prev_sample.isfinite().all()
    torch.testing.assert_close(result.prev_sample, result.pred_original_sample, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prediction_type": "eps"}, "prediction_type.*epsilon"),
        ({"beta_schedule": "cosine"}, "beta_schedule.*squaredcos_cap_v2"),
        ({"timestep_spacing": "uniform"}, "timestep_spacing.*trailing"),
        ({"num_train_timesteps": 0}, "num_train_timesteps"),
        ({"beta_start": -1.0}, "beta_start"),
        ({"beta_end": 2}, "beta_end"),
        ({"trained_betas": [0.1, 2.0]}, r"betas\[1\]"),
        ({"levels": 1}, "levels"),
        ({"levels": 2.5}, "levels"),
        ({"clip_sample_range": 0.0}, "clip_sample_range"),
        ({"thresholding": True, "dynamic_thresholding_ratio": 1.5}, "dynamic_thresholding_ratio"),
        ({"thresholding": True, "sample_max_value": 0.0}, "sample_max_value"),
    ],
)
def test_impossible_configurations_are_refused(arguments, message):
    """Unknown names are answered with the choices, impossible numbers by their name, when the scheduler is made."""
    with pytest.raises(ValueError, match=message):
        DDPMVLBScheduler(**arguments)


def test_scheduler_is_not_part_of_diffusers():
    """diffusers has no class of our name, on which the promise about configs between classes rests."""
    assert not hasattr(diffusers, "DDPMVLBScheduler")
