"""Schedules: the names and formulas are stock's, the digits are float64's."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_ddpm import rescale_zero_terminal_snr
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_vlb import DDPMVLBScheduler, ForwardProcess, beta_start_for_levels, make_betas, rescale_betas_zero_snr

NAMES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace")
LENGTHS = (1, 2, 3, 10, 100, 1000, 4000)


def float64_closed_form(name: str, num: int, start: float, end: float) -> np.ndarray:
    """The formulas of the papers in numpy float64, one expression each."""
    u = np.arange(num) / max(num - 1, 1)
    curve = np.arange(num + 1) / num
    if name == "linear":
        return start + u * (end - start)
    if name == "scaled_linear":
        return (math.sqrt(start) + u * (math.sqrt(end) - math.sqrt(start))) ** 2
    if name == "sigmoid":
        return start + (end - start) / (1 + np.exp(6 - 12 * u))
    if name == "squaredcos_cap_v2":
        abar = np.cos((curve + 0.008) / 1.008 * np.pi / 2) ** 2
    else:
        log_snr = -0.5 * np.copysign(1, 0.5 - curve) * np.log(1 - 2 * np.abs(0.5 - curve) + 1e-6)
        abar = np.sqrt(1 / (1 + np.exp(-log_snr)))
    return np.minimum(1 - abar[1:] / abar[:-1], 0.999)


@pytest.mark.parametrize("num", LENGTHS)
@pytest.mark.parametrize("name", NAMES)
def test_equals_stock_in_its_precision(name, num):
    """Every named schedule is stock's: a few float32 roundings (2^-24 each) apart, far below rtol 1e-5."""
    stock = DDPMScheduler(num_train_timesteps=num, beta_schedule=name).betas
    torch.testing.assert_close(make_betas(name, num), stock.double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("num", LENGTHS)
@pytest.mark.parametrize("name", NAMES)
def test_closed_form_in_float64(name, num):
    """Each beta agrees with its formula to float64; 1 - ratio of two alphabar carries their absolute rounding."""
    betas = make_betas(name, num, 3e-4, 0.05)
    assert betas.dtype == torch.float64 and betas.shape == (num,)
    expected = float64_closed_form(name, num, 3e-4, 0.05)
    np.testing.assert_allclose(betas.numpy(), expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("num", [10, 1000, 4000])
def test_cosine_telescopes_to_its_alpha_bar(num):
    """The product of 1 - beta is the curve f(u)/f(0) of iDDPM eq. 17 at every step before the cap."""

    def f(u):
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = make_betas("squaredcos_cap_v2", num)
    abar = torch.cumprod(1 - betas, 0)[betas < 0.999]
    expected = torch.tensor([f((t + 1) / num) / f(0) for t in range(len(abar))], dtype=torch.float64)
    torch.testing.assert_close(abar, expected, rtol=num * 2e-16, atol=0)
    assert float(betas.max()) <= 0.999


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "sigmoid"])
def test_range_is_respected(name):
    """The schedules between two betas ascend and stay between them; linear and scaled linear reach both."""
    betas = make_betas(name, 50, 0.001, 0.3)
    assert (betas.diff() > 0).all() and betas[0] >= 0.001 * (1 - 1e-15) and betas[-1] <= 0.3 * (1 + 1e-15)
    if name != "sigmoid":
        torch.testing.assert_close(betas[[0, -1]], torch.tensor([0.001, 0.3], dtype=torch.float64))


def test_defaults_are_stock_s():
    """Without arguments the schedule is DDPMScheduler's default one."""
    torch.testing.assert_close(make_betas(), DDPMScheduler().betas.double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", [list, np.asarray, torch.tensor])
def test_trained_betas_of_any_container(kind):
    """A list, an array and a tensor of betas make the same process, and the caller's betas are not changed."""
    betas = [0.1, 0.25, 0.5]
    given_betas = kind(betas)
    forward = ForwardProcess.from_betas(given_betas)
    torch.testing.assert_close(forward.betas, torch.tensor(betas, dtype=torch.float64), rtol=1e-7, atol=0)
    assert [float(b) for b in given_betas] == pytest.approx(betas)


def test_trained_betas_are_not_aliased():
    """A tensor that its owner overwrites later does not change the process made of it."""
    betas = torch.tensor([0.1, 0.2], dtype=torch.float64)
    forward = ForwardProcess.from_betas(betas)
    betas.fill_(0.9)
    assert forward.betas.tolist() == [0.1, 0.2]


@pytest.mark.parametrize("num", [2, 10, 1000])
@pytest.mark.parametrize("name", NAMES)
def test_zero_snr_rescale_equals_stock_s_algorithm_in_float64(name, num):
    """Stock's own function on float64 betas gives the same; roundings of 1 - abar_t/abar_s, 2^-53 each, bound it."""
    betas = make_betas(name, num)
    torch.testing.assert_close(
        rescale_betas_zero_snr(betas), rescale_zero_terminal_snr(betas.clone()), rtol=1e-10, atol=1e-14
    )


@pytest.mark.parametrize("name", NAMES)
def test_zero_snr_rescale_is_stock_s_schedule(name):
    """The float32 scheduler's rescaled betas agree within its rounding.

    Its float32 cumulative product of T = 1000 factors is good to T 2^-24 = 6e-5, relative; sqrt(abar_t) - sqrt(abar_T)
    magnifies that by sqrt(abar_t) / (sqrt(abar_t) - sqrt(abar_T)), and beta is 1 less the ratio of two squares of it.
    """
    stock = DDPMScheduler(beta_schedule=name, rescale_betas_zero_snr=True).betas.double()
    betas = make_betas(name)
    root = torch.cumprod(1 - betas, 0).sqrt()
    magnified = root[:-1] / (root[:-1] - root[-1])
    bound = torch.cat([torch.tensor([1e-6], dtype=torch.float64), 4 * 6e-5 * magnified])
    gap = (rescale_betas_zero_snr(betas) - stock).abs()
    assert (gap <= bound).all()
    assert float(stock[-1]) == 1 == float(rescale_betas_zero_snr(betas)[-1])


@pytest.mark.parametrize("num", [2, 3, 50, 1000])
@pytest.mark.parametrize("name", NAMES)
def test_zero_snr_ends_in_exactly_no_signal(name, num):
    """After the rescale alphabar_T is exactly 0, alphabar_1 is kept, and the rescale is idempotent."""
    betas = make_betas(name, num)
    rescaled = rescale_betas_zero_snr(betas)
    forward = ForwardProcess.from_betas(rescaled)
    assert float(forward.alphas_cumprod[-1]) == 0 and float(forward.sqrt_one_minus_alphas_cumprod[-1]) == 1
    torch.testing.assert_close(rescaled[0], betas[0], rtol=1e-10, atol=1e-15)
    torch.testing.assert_close(rescale_betas_zero_snr(rescaled), rescaled, rtol=1e-10, atol=1e-14)


@settings(deadline=None, max_examples=50, derandomize=True)
@given(st.integers(2, 300), st.floats(0.05, 1.0))
def test_first_noise_level_matches_the_bin_width(levels, bins):
    """sigma_1 of a schedule that starts at beta_start_for_levels is the given share of a bin's width 2/(levels-1)."""
    if bins * 2 / (levels - 1) > 1:
        with pytest.raises(ValueError, match="sigma_in_bins"):
            beta_start_for_levels(levels, bins)
        return
    forward = ForwardProcess.from_betas([beta_start_for_levels(levels, bins, beta_end=1.0)])
    sigma = float(forward.sqrt_one_minus_alphas_cumprod[0])
    assert sigma / (2 / (levels - 1)) == pytest.approx(bins, rel=1e-9)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "sigmoid"])
@pytest.mark.parametrize("num", [1, 20, 1000])
@pytest.mark.parametrize("levels", [*range(2, 18), 256, 65536])
def test_the_recipe_for_few_levels_makes_a_schedule(levels, num, schedule):
    """beta_1 by the levels and the usual beta_T give betas that never fall, of a chain that keeps some signal."""
    betas = make_betas(schedule, num, beta_start_for_levels(levels))
    assert bool((betas.diff() >= 0).all()) and float(betas[-1]) <= 0.02 + 1e-15
    scheduler = DDPMVLBScheduler(num, beta_start_for_levels(levels), beta_schedule=schedule, levels=levels)
    assert float(scheduler.alphas_cumprod[-1]) > 0


def test_first_noise_level_of_the_digits():
    """17 levels at the default 0.4 bins give (0.4 * 2/16)^2 = 0.0025."""
    assert beta_start_for_levels(17) == pytest.approx(0.0025, rel=1e-12)


def test_unknown_schedule_lists_the_choices():
    """An unknown name is answered with every name there is."""
    with pytest.raises(ValueError) as error:
        make_betas("cosine")
    assert "'cosine'" in str(error.value) and all(name in str(error.value) for name in NAMES)


@pytest.mark.parametrize("num", [0, -1, 2.0, True, "10"])
def test_length_must_be_a_positive_integer(num):
    """T below 1, or no integer, is refused by name."""
    with pytest.raises(ValueError, match="num_train_timesteps"):
        make_betas("linear", num)


@pytest.mark.parametrize("name", ["beta_start", "beta_end"])
@pytest.mark.parametrize("value", [0.0, -0.1, 1.5, float("nan"), float("inf")])
def test_beta_range_is_checked(name, value):
    """A beta_start or beta_end outside (0, 1] is refused by its name."""
    with pytest.raises(ValueError, match=f"`{name}`"):
        make_betas("linear", 10, **{name: value})


@pytest.mark.parametrize("value", [0.0, -1e-9, 1.0000001, float("nan"), float("inf")])
@pytest.mark.parametrize("make", [ForwardProcess.from_betas, rescale_betas_zero_snr])
def test_bad_beta_is_named_by_its_place(make, value):
    """Given betas outside (0, 1], NaN included, are refused with the index of the first bad one."""
    with pytest.raises(ValueError, match=r"betas\[1\]"):
        make([0.1, value, 0.2])


@pytest.mark.parametrize("betas", [[], [[0.1, 0.2]], 0.1])
def test_betas_must_be_a_list(betas):
    """Empty, nested and scalar betas are refused."""
    with pytest.raises(ValueError, match="non-empty list"):
        ForwardProcess.from_betas(betas)


def test_no_signal_before_the_end():
    """A beta of 1 works as the last step only."""
    with pytest.raises(ValueError, match=r"Only the last.*betas\[1\]"):
        ForwardProcess.from_betas([0.1, 1.0, 0.2])
    assert float(ForwardProcess.from_betas([0.1, 0.2, 1.0]).alphas_cumprod[-1]) == 0


def test_zero_snr_needs_two_steps():
    """One step cannot both keep alphabar_1 and end in 0."""
    with pytest.raises(ValueError, match="at least 2 steps"):
        rescale_betas_zero_snr([0.1])


@pytest.mark.parametrize(("levels", "bins"), [(1, 0.4), (2.0, 0.4), (True, 0.4), (256, 0.0), (256, -1.0), (3, 1.1)])
def test_first_noise_level_errors(levels, bins):
    """Fewer than two levels, or a sigma_1 outside (0, 1], are refused."""
    with pytest.raises(ValueError, match="must"):
        beta_start_for_levels(levels, bins)


@pytest.mark.parametrize("bins", [float("nan"), float("inf")])
def test_first_noise_level_must_be_finite(bins):
    """NaN and infinite widths are refused like every other impossible number."""
    with pytest.raises(ValueError, match="sigma_in_bins"):
        beta_start_for_levels(256, bins)
