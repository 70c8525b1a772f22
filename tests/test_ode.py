"""The density of the probability-flow ODE: the exact one of Gaussian data, of order four, unbiased in its signs.

The network of most tests is exact for data of correlated dimensions (correlated.py).
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from correlated import (
    SHAPE,
    ExactNetwork,
    even_chain,
    log_normal,
    noised,
    normal,
    runge_kutta_weights,
    slopes,
)
from networks import one_block_unet
from pretend_device import PretendDevice, put
from scipy.integrate import solve_ivp
from torch import nn

from ddpm_vlb import ForwardProcess, ReverseProcess, make_betas, ode_log_prob

UNIT = 1 / (4 * math.log(2))


def short(**options) -> ReverseProcess:
    return even_chain(0.3, 20, 5, **options)


def some(number: int = 3, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return normal(number, torch.eye(4).double()).to(dtype)


# --- the density


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_the_density_is_the_data_s(prediction_type):
    """Of the first noised variable of Gaussian data: within 1e-3 bits/dim by 64 calls, within 1e-4 by 128."""
    for steps, tolerance in ((33, 1e-3), (65, 1e-4)):
        reverse = even_chain(0.05, 200, steps, prediction_type=prediction_type)
        covariance = noised(reverse)[0]
        x_1 = normal(50, covariance)
        network = ExactNetwork(reverse)
        bits = (ode_log_prob(network, reverse, x_1, probes=None)[0] - log_normal(x_1, covariance)) * UNIT
        assert float(bits.abs().max()) < tolerance
        assert network.rows == 50 * 2 * (steps - 1)


def test_the_error_is_of_fourth_order():
    """Against the flow's own density, closed form, half the step leaves a sixteenth of the error."""
    errors = []
    for steps in (17, 33, 65):
        reverse = even_chain(0.1, 50, steps)
        first, last = noised(reverse)[0], noised(reverse)[-1]
        x_1 = normal(20, first)
        values, vectors = torch.linalg.eigh(first)  # V_1 and V_T have the same eigenvectors
        scale = (torch.linalg.eigvalsh(last) / values).sqrt()
        x_T = x_1.flatten(1) @ vectors * scale
        exact = log_normal(x_T, torch.eye(4).double()) + scale.log().sum()
        errors.append(float((ode_log_prob(ExactNetwork(reverse), reverse, x_1, probes=None)[0] - exact).mean()))
    assert 14 < errors[0] / errors[1] < 20 and 14 < errors[1] / errors[2] < 18


def test_a_network_s_density_is_scipy_s():
    """A network that is nonlinear in x and u, with a variance half: the integrals of an adaptive solver."""
    reverse = even_chain(0.2, 20, 65, variance_type="learned_range")
    low, high = math.log(0.2), math.log(20)
    generator = np.random.default_rng(0)
    inner, outer = generator.normal(size=(5, 3)), generator.normal(size=(2, 5)) / 3

    def network(x_t, timesteps):
        u = low + (high - low) * timesteps.double() / 64
        hidden = torch.tanh(torch.cat([x_t.flatten(1), u[:, None]], 1) @ torch.from_numpy(inner).T)
        v = (hidden @ torch.from_numpy(outer).T)[..., None]
        return torch.cat([v, 100 * v], dim=1)

    def slope(u, state):
        hidden = np.tanh(inner @ [state[0], state[1], u])
        share = math.sin(math.atan(math.exp(u))) * math.cos(math.atan(math.exp(u)))
        jacobian = outer @ ((1 - hidden**2)[:, None] * inner[:, :2])
        return [*(share * outer @ hidden), share * np.trace(jacobian)]

    x_1 = normal(3, torch.eye(2).double(), shape=(2, 1))
    expected = []
    for start in x_1.flatten(1).numpy():
        end = solve_ivp(slope, (low, high), [*start, 0.0], rtol=1e-9, atol=1e-9).y[:, -1]
        expected.append(-0.5 * (end[0] ** 2 + end[1] ** 2) - math.log(2 * math.pi) + end[2])
    actual = ode_log_prob(network, reverse, x_1, probes=None)[0]
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("steps, low, high", [(5, 1.01, 9), (65, 0.9999, 1.0001)])
def test_too_few_levels_give_no_density(steps, low, high):
    """The density of a mixture integrates to one; by eight calls it does not, and no bound follows from it."""
    reverse = even_chain(0.1, 100, steps)
    forward = reverse.forward

    def network(x_t, timesteps):
        signal = forward.sqrt_alphas_cumprod[timesteps, None, None]
        sigma = forward.sqrt_one_minus_alphas_cumprod[timesteps, None, None]
        variance = 0.01 * signal**2 + sigma**2
        side = torch.tanh(0.5 * signal * x_t / variance) * 0.5  # of modes at -0.5 and 0.5
        x_0 = side + 0.01 * signal / variance * (x_t - signal * side)
        return (signal * x_t - x_0) / sigma

    x_1 = torch.linspace(-4, 4, 801, dtype=torch.float64).reshape(-1, 1, 1)
    total = float(ode_log_prob(network, reverse, x_1, probes=None).exp().sum()) * 0.01
    assert low < total < high


# --- the signs


def test_the_signs_are_unbiased():
    """The mean of 4000 draws is the exact divergence, within 4 standard errors."""
    reverse = even_chain(0.1, 20, 9)
    network, x_1 = ExactNetwork(reverse), some(1)
    exact = ode_log_prob(network, reverse, x_1, probes=None)
    assert exact.shape == (1, 1)
    draws = ode_log_prob(network, reverse, x_1.repeat(2000, 1, 1, 1), torch.Generator().manual_seed(0))
    assert draws.shape == (2, 2000)
    assert abs(float(draws.mean() - exact)) < 4 * float(draws.std()) / 4000**0.5


def test_fresh_signs_are_worth_many_fixed_ones():
    """Drawn at each stage they have the variance of a sum of independent terms, far below one draw's for the walk.

    Var z . F z is twice the sum of F's squared entries off the diagonal. Over 4000 draws 4 errors of an SD are 4.5 %.
    """
    reverse = even_chain(0.05, 200, 33)
    stages, weights = runge_kutta_weights(reverse)
    weighted = weights[:, None, None] * slopes(reverse)[stages]
    off = weighted * (1 - torch.eye(4))
    fresh = float((2 * off.square().sum()).sqrt())
    fixed = float((2 * off.sum(0).square().sum()).sqrt())
    generator = torch.Generator().manual_seed(0)
    draws = ode_log_prob(ExactNetwork(reverse), reverse, some(1).repeat(2000, 1, 1, 1), generator)
    assert float(draws.std()) == pytest.approx(fresh, rel=0.045)
    assert fixed > 4 * fresh


def test_signs_come_from_the_generator():
    """The same seed gives the same estimate, another one another, and they leave the global state alone."""
    reverse = short()
    network, x_1 = ExactNetwork(reverse), some()
    state = torch.get_rng_state()
    first, again, other = (
        ode_log_prob(network, reverse, x_1, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


# --- the network


class Scaled(nn.Module):
    """A module with parameters, told a scale for each image."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1).double()
        self.seen = []

    def forward(self, x_t, timesteps, scale):
        self.seen.append((timesteps.tolist(), scale.tolist()))
        return torch.tanh(self.layer(x_t)) * scale.reshape(-1, 1, 1, 1)


def test_conditioning_reaches_the_network():
    """Each image's row, at every stage, whose timestep is that of the chain after respacing."""
    reverse = even_chain(0.3, 20, 9).respace([0, 2, 4, 6, 8])
    network, x_1, scale = Scaled(), some(), torch.tensor([0.5, 1.0, 2.0]).double()
    together = ode_log_prob(network, reverse, x_1, probes=None, conditioning={"scale": scale})
    assert network.seen == [([t] * 3, scale.tolist()) for t in (0, 2, 2, 4, 4, 6, 6, 8)]
    alone = ode_log_prob(network, reverse, x_1[1:2], probes=None, conditioning={"scale": scale[1:2]})
    torch.testing.assert_close(together[:, 1:2], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_no_parameter_gets_a_gradient(mode):
    """In any mode of the caller, which is as it was afterwards; the result has no graph."""
    network = Scaled()
    with mode():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        x_1, scale = some() + 0, torch.ones(3).double() + 0  # made in the caller's mode
        log_prob = ode_log_prob(network, short(), x_1, conditioning={"scale": scale})
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before
    assert not log_prob.requires_grad
    assert all(parameter.grad is None and parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("options", [{"clip_sample": True}, {"thresholding": True}, {"variance_type": "fixed_large"}])
def test_what_only_p_does_is_nothing_to_the_ode(options):
    """x_0_hat is not clipped, and no variance enters."""
    reverse, x_1 = short(), 3 * some()
    expected = ode_log_prob(ExactNetwork(reverse), reverse, x_1, probes=None)
    assert torch.equal(ode_log_prob(ExactNetwork(reverse), replace(reverse, **options), x_1, probes=None), expected)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 0.3)])
def test_the_network_s_dtype(dtype, tolerance):
    """A network of less than float64 gets x_t in its own; what is summed stays float64 on the CPU."""
    reverse = short()
    network = one_block_unet(learned=False).double()
    x_1 = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    expected = ode_log_prob(network, reverse, x_1, probes=None)
    reverse, network = reverse.to(dtype=torch.float32), network.to(dtype)
    actual = ode_log_prob(network, reverse, x_1.float(), probes=None)
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)
    double = ode_log_prob(network.double(), reverse, x_1.float(), probes=None)
    if dtype == torch.float32:
        torch.testing.assert_close(double, expected, rtol=0, atol=tolerance)


def test_the_device_is_waited_for_once():
    """At the end, for what has come; the signs of a generator of the CPU go there without a wait."""
    reverse = short().to(dtype=torch.float32)
    x_1 = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    network = one_block_unet(learned=False)
    expected = ode_log_prob(network, reverse, x_1, torch.Generator().manual_seed(0))
    with PretendDevice():
        there, there_x_1 = reverse.to(put(x_1).device), put(x_1)
        network = put(network)
    with PretendDevice() as device:
        actual = ode_log_prob(network, there, there_x_1, torch.Generator().manual_seed(0))
    assert [wait.partition(" at ")[0] for wait in device.waits] == ["item", "copy to the CPU"], device.waits
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-4)


# --- what is refused


def uneven() -> ReverseProcess:
    ratios = torch.logspace(-1, 1, 5, dtype=torch.float64)
    ratios[2] *= 1 + 2e-6
    log_abar = -torch.log1p(ratios.square())
    return even_with(-torch.expm1(torch.cat([log_abar[:1], log_abar.diff()])))


def even_with(betas) -> ReverseProcess:
    return ReverseProcess(ForwardProcess.from_betas(betas), "v_prediction", clip_sample=False, levels=None)


CHAINS = {
    "an even number": (lambda: even_chain(0.1, 10, 6), "an odd number of steps, at least 3, but has 6"),
    "one step": (lambda: even_with([0.5]), "but has 1"),
    "uneven": (uneven, "even in log.*differ from the mean by up to 1.7e-06"),
    "linear betas": (lambda: even_with(make_betas("linear", 33)), "even in log"),
    "noise alone": (lambda: even_with([0.1, 0.5, 1.0]), "noise alone.*sigma = 1"),
}


@pytest.mark.parametrize("name", CHAINS)
def test_other_chains_are_refused(name):
    """Before the network is called, with the way to one that is even."""
    make, message = CHAINS[name]
    with pytest.raises(ValueError, match=f"{message}.*`GaussianPath` and `spaced_ratios`"):
        ode_log_prob(lambda x_t, timesteps: pytest.fail("called"), make(), some())


@pytest.mark.parametrize("probes", [0, -1, 1.5, True])
def test_too_few_probes_are_refused(probes):
    """None is the exact divergence's name."""
    with pytest.raises(ValueError, match=r"`probes` must be an integer of at least 1, or None.* but got"):
        ode_log_prob(ExactNetwork(short()), short(), some(), probes=probes)


@pytest.mark.parametrize(
    "x_1, message",
    [
        (torch.zeros(0, *SHAPE), "`x_1` holds no images"),
        (torch.zeros(2, *SHAPE, dtype=torch.int64), "`x_1` must be a floating point tensor"),
        (torch.full((2, *SHAPE), math.nan), "`x_1` holds NaN"),
    ],
)
def test_what_is_no_batch_is_refused(x_1, message):
    """By its own name."""
    with pytest.raises(ValueError, match=message):
        ode_log_prob(ExactNetwork(short()), short(), x_1)


def test_a_network_in_training_mode_is_refused():
    """Its dropout would make each stage another network's."""
    model = nn.Sequential(nn.Dropout(0.1)).train()
    with pytest.raises(ValueError, match="training mode"):
        ode_log_prob(model, short(), some())


def test_rows_of_conditioning_are_counted():
    """One for each image."""
    with pytest.raises(ValueError, match="one row for each of 3 images"):
        ode_log_prob(Scaled(), short(), some(), conditioning={"scale": torch.ones(2)})


@pytest.mark.parametrize("parameters", [False, True])
def test_a_network_without_gradients_is_refused(parameters):
    """Its divergence would be 0, silently."""
    weight = torch.ones(1, dtype=torch.float64, requires_grad=parameters)
    with pytest.raises(ValueError, match="`model` must be differentiable in `x_t`"):
        ode_log_prob(lambda x_t, timesteps: x_t.detach() * weight, short(), some())


@pytest.mark.parametrize(
    "bad, message",
    [
        (lambda x_t: x_t / 0, r"the model's output at chain index t=2 \(timestep 2\), image 1"),
        (lambda x_t: (x_t * 0).abs().sqrt(), r"the divergence at chain index t=2 \(timestep 2\), image 1"),
    ],
)
def test_what_is_not_finite_is_told(bad, message):
    """Of the network or of its derivative, with the timestep and the image."""

    def network(x_t, timesteps):
        rows = [bad(x) if i == 1 and t == 2 else 0.1 * x for i, (x, t) in enumerate(zip(x_t, timesteps.tolist()))]
        return torch.stack(rows)

    with pytest.raises(FloatingPointError, match=message):
        ode_log_prob(network, short(), some())


def test_an_infinite_density_is_told():
    """Values so large that their squares overflow."""
    x_1 = some(dtype=torch.float32) * torch.tensor([1, 1e30, 1]).reshape(3, 1, 1, 1)
    with pytest.raises(FloatingPointError, match="the log density, image 1"):
        ode_log_prob(lambda x_t, timesteps: 0 * x_t, short(), x_1)
