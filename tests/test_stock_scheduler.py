"""DDPMVLBScheduler in stock's place: its numbers where stock is right, and the right ones where it is not.

Where both are right they differ by stock's float32 tables. `stock_error_bound` derives how much that can be, and a
float64 computation of the same step (`reference_step`, numpy, from the papers' formulas) says who is closer.
"""

import json

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from float64_steps import (
    EPS,
    SHAPE,
    coefficients,
    float64_alphas_cumprod,
    own_error_bound,
    randn,
    reference_step,
    seeded,
    x_0_error_bound,
)

from ddpm_vlb import DDPMVLBScheduler

# Stock's numpy round trips, none of our business.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
SCHEDULES = {
    "linear": {},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "short": {"num_train_timesteps": 20, "beta_start": 0.01, "beta_end": 0.3},
    "trained": {"trained_betas": [0.05, 0.02, 0.3, 0.1, 0.4, 0.2], "num_train_timesteps": 6},
}


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


def chain_positions(scheduler) -> list[tuple[int, int]]:
    """(t, s) at both ends of the chain and in between; s = -1 after the last."""
    steps = [*scheduler.timesteps.tolist(), -1]
    last = len(steps) - 2
    return [
        (steps[i], steps[i + 1])
        for i in sorted({0, 1, last // 2, max(last - 2, 0), max(last - 1, 0), last})
        if i <= last
    ]


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
