"""A path's network is a v-prediction of the VP chain: stock's inputs, times and estimates, and one bound for all."""

import math

import numpy as np
import pytest
import torch
from diffusers import (
    CosineDPMSolverMultistepScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    SASolverScheduler,
    SCMScheduler,
    UniPCMultistepScheduler,
)
from networks import tiny_unet
from path_networks import KINDS, RATIOS, rewritten
from torch._dynamo.testing import CompileCounter

from ddpm_vlb import DDPMVLBScheduler, GaussianPath, evaluate_vlb, spaced_ratios

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
# Stock's numpy round trips, none of our business.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

STOCK = {
    "flow": FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flow-heun": FlowMatchHeunDiscreteScheduler(shift=3.0),
    "flow-lcm": FlowMatchLCMScheduler(),
    "unipc": UniPCMultistepScheduler(**FLOW),
    "dpm": DPMSolverMultistepScheduler(**FLOW),
    "dpm-single": DPMSolverSinglestepScheduler(**FLOW),
    "deis": DEISMultistepScheduler(**FLOW),
    "sa": SASolverScheduler(**FLOW),
    "edm": EDMEulerScheduler(sigma_data=0.7),
    "edm-v": EDMEulerScheduler(prediction_type="v_prediction", sigma_schedule="exponential"),
    "edm-dpm": EDMDPMSolverMultistepScheduler(),
    "cosine": CosineDPMSolverMultistepScheduler(),
    "euler-v": EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"),
}
# These truncate the time that the network is told.
TRUNCATED = ("unipc", "dpm", "dpm-single", "deis", "sa")
SHAPE = (1, 4, 4)


def noise(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Recorder:
    """A network that remembers what it saw and was told."""

    def __call__(self, x, t):
        self.x, self.t = x, t
        return (x * 1.3).sin() + 0.1 * x


def ratio(name: str, sigma: torch.Tensor) -> torch.Tensor:
    return sigma / (1 - sigma) if name.startswith("flow") or name in TRUNCATED else sigma


def denoised(name, scheduler, output, x, sigma):
    """The estimate of the data that stock makes of a network's output."""
    if name.startswith("edm") or name == "cosine":
        return scheduler.precondition_outputs(x, output, sigma)
    scheduler._step_index = None
    if name == "euler-v" or name == "flow-lcm":
        step = scheduler.step(output, scheduler.timesteps[4], x)
        return step.pred_original_sample if name == "euler-v" else x - sigma * output
    if name in TRUNCATED:
        scheduler._step_index = 4
        estimate = scheduler.convert_model_output(output, sample=x)
        return (x - sigma * estimate) / (1 - sigma) if name == "deis" else estimate  # DEIS tells the noise
    # Their step is x + (next sigma - sigma) o: with 0 for the next one it is the estimate.
    scheduler.sigmas = scheduler.sigmas.clone()
    scheduler.sigmas[5 if name == "flow" else 4 + 1] = 0
    return x + (0 - sigma) * output


@pytest.mark.parametrize("name", STOCK)
def test_the_network_sees_and_means_what_stock_says(name):
    scheduler = type(STOCK[name]).from_config(STOCK[name].config)
    scheduler.set_timesteps(10)
    sigma, time = scheduler.sigmas[4].double(), scheduler.timesteps[4]
    path = GaussianPath.from_config(scheduler, ratio(name, sigma)[None])
    reverse = path.reverse_process()
    model, x = Recorder(), noise(3) * float(path.signal) + noise(3, 1) * float(path.sigma)
    x_vp = x / (path.signal.square() + path.sigma.square()).sqrt()
    v = path.network(model)(x_vp, torch.zeros(3, dtype=torch.int64))

    scheduler._step_index = 4
    seen = scheduler.scale_model_input(x, time) if hasattr(scheduler, "scale_model_input") else x
    torch.testing.assert_close(model.x, seen, rtol=1e-6, atol=1e-6)
    assert torch.allclose(model.t, time.double(), rtol=1e-6, atol=1.0 if name in TRUNCATED else 1e-5)
    assert model.t.shape == (3,) and model.t.dtype == torch.float64
    x_0 = reverse(v, x_vp, torch.zeros(3, dtype=torch.int64)).x_0
    torch.testing.assert_close(
        x_0, denoised(name, scheduler, model(x * path.scale, 0), x, sigma), rtol=2e-6, atol=2e-6
    )


@pytest.mark.parametrize("name", STOCK)
def test_without_ratios_the_grid_is_stock_s(name):
    path = GaussianPath.from_config(STOCK[name])
    scheduler = type(STOCK[name]).from_config(STOCK[name].config)
    if name in TRUNCATED:  # their sigmas before `set_timesteps` are those of betas
        scheduler.set_timesteps(1000)
    sigmas = scheduler.sigmas.double()
    sigmas = sigmas[sigmas > 0].unique()  # some say the last one twice
    torch.testing.assert_close(path.sigma[: len(sigmas)], sigmas, rtol=2e-6, atol=2e-6)
    assert len(path) == len(sigmas)


@pytest.mark.parametrize("kind", KINDS)
def test_one_network_has_one_bound_on_every_path(kind):
    x_0, eps = noise(2).clamp(-1, 1), noise(18, 3).reshape(9, 2, *SHAPE)
    terms = []
    for own in ("epsilon", kind):
        path, model = rewritten(own)
        terms.append(evaluate_vlb(path.network(model), path.reverse_process(), x_0, eps).terms)
    torch.testing.assert_close(terms[1], terms[0], rtol=1e-11, atol=1e-11)


def test_the_bound_is_that_of_the_ratios():
    """Each term of a fixed variance is 1/2 (SNR_s - SNR_t) |x_0 - x_0_hat|^2, whatever the path."""
    path, model = rewritten("flow")
    x_0, eps = noise(2).clamp(-1, 1), noise(18, 3).reshape(9, 2, *SHAPE)
    terms = evaluate_vlb(path.network(model), path.reverse_process(), x_0, eps).terms
    sigma = path.sigma
    for t in range(1, 9):
        x = (1 - sigma[t]) * x_0 + sigma[t] * eps[t]
        error = (x - sigma[t] * model(x, 1000 * sigma[t].expand(2)) - x_0).square().flatten(1).sum(1)
        gap = ((1 - sigma[t - 1]) / sigma[t - 1]) ** 2 - ((1 - sigma[t]) / sigma[t]) ** 2
        torch.testing.assert_close(terms[:, t], 0.5 * gap * error, rtol=1e-11, atol=1e-11)


def test_a_fixed_variance_takes_the_first_ratio_for_the_decoder():
    path = GaussianPath.flow(RATIOS / (1 + RATIOS))
    x = noise(1)
    for variance in ("fixed_small", "fixed_large"):
        p, _ = path.reverse_process(17, variance_type=variance)(x, x, 0)
        torch.testing.assert_close(p.log_variance, torch.full_like(x, 2 * math.log(0.05)))
    own, _ = path.reverse_process(17, decoder_log_variance=-3.0)(x, x, 0)
    assert float(own.log_variance[0, 0, 0, 0]) == pytest.approx(-3.0)
    learned = path.reverse_process(17, variance_type="learned_range")
    assert learned.decoder_log_variance is None


def test_a_respaced_chain_keeps_that_decoder():
    reverse = GaussianPath.edm(RATIOS).reverse_process().respace([3, 5, 8])
    p, _ = reverse(noise(1), noise(1), 0)
    torch.testing.assert_close(p.log_variance, torch.full_like(p.mean, 2 * math.log(RATIOS[3])))
    assert reverse.forward.timesteps.tolist() == [3, 5, 8]


def test_only_levels_are_clipped_unless_asked():
    path = GaussianPath.edm(RATIOS)
    assert path.reverse_process(17).clip_sample and not path.reverse_process().clip_sample
    assert path.reverse_process(clip_sample=True).clip_sample


def test_a_module_stays_one():
    unet, path = tiny_unet(out=1), GaussianPath.flow(RATIOS / (1 + RATIOS))
    network = path.network(unet)
    assert set(network.state_dict()) == {f"model.{key}" for key in unet.state_dict()}
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([1, 5])
    low = network(x, t)
    high = network.double()(x.double(), t)
    assert high.dtype == torch.float64 and torch.allclose(high.float(), low, atol=1e-4)
    told = (1000 * path.sigma[t]).tolist()
    direct = unet(x.double() * (path.signal**2 + path.sigma**2).sqrt()[t].reshape(-1, 1, 1, 1), torch.tensor(told))
    expected = (1 - 2 * path.sigma[t]).reshape(-1, 1, 1, 1) * x.double()
    expected = expected + (path.signal**2 + path.sigma**2).sqrt()[t].reshape(-1, 1, 1, 1) * direct.sample
    torch.testing.assert_close(high, expected, rtol=1e-6, atol=1e-6)


def test_a_variance_half_and_conditioning_pass_through():
    path = GaussianPath.flow(RATIOS / (1 + RATIOS))

    def model(x, t, labels):
        return torch.cat([x, labels.reshape(-1, 1, 1, 1).expand_as(x).to(x)], dim=1)

    labels = torch.tensor([4, 7])
    output = path.network(model)(noise(2), torch.tensor([0, 3]), labels=labels)
    assert output.shape == (2, 2, 4, 4) and torch.equal(output[:, 1, 0, 0], labels.double())


def test_one_index_serves_a_batch():
    path, model = rewritten("edm")
    x, network = noise(2), path.network(model)
    expected = network(x, torch.tensor([4, 4]))
    for t in (4, torch.tensor(4), torch.tensor([4])):
        assert torch.equal(network(x, t), expected)


def test_half_precision_is_told_and_shown_its_own():
    path, model = GaussianPath.flow(RATIOS / (1 + RATIOS)), Recorder()
    v = path.network(model)(noise(2).bfloat16(), torch.tensor([0, 3]))
    assert model.x.dtype == model.t.dtype == torch.bfloat16 and v.dtype == torch.float32


def test_a_flow_s_last_level_may_be_noise_alone():
    path = GaussianPath.flow([0.1, 0.5, 1.0])
    reverse = path.reverse_process()
    x = noise(2)
    v = path.network(lambda x, t: x * 0.5)(x, torch.tensor([2, 2]))
    torch.testing.assert_close(reverse(v, x, torch.tensor([2, 2])).x_0, 0.5 * x)
    assert float(reverse.forward.alphas_cumprod[-1]) == 0


def test_ddpm_between_the_steps_is_told_stock_s_fractional_times():
    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(7)
    sigmas = scheduler.sigmas[1:-1].flip(0).double() * 1.003
    path = GaussianPath.ddpm(scheduler.alphas_cumprod, sigmas)
    levels = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt().numpy()
    expected = [float(scheduler._sigma_to_t(sigma.numpy(), np.log(levels))) for sigma in sigmas]
    assert path.timesteps.tolist() == pytest.approx(expected, abs=1e-3)


def test_ddpm_at_the_steps_is_the_chain_itself():
    scheduler = DDPMVLBScheduler()
    forward = scheduler.reverse_process(dtype=torch.float64).forward
    r = forward.sqrt_recipm1_alphas_cumprod
    path = GaussianPath.ddpm(forward.alphas_cumprod, r)
    assert torch.allclose(path.timesteps, torch.arange(1000.0, dtype=torch.float64), atol=1e-6)
    torch.testing.assert_close(path.reverse_process().forward.betas, forward.betas, rtol=1e-9, atol=1e-13)


def test_ddpm_takes_a_table_of_float32_for_what_it_is():
    """The chain's own ratios lie within those of stock's rounded alphas_cumprod; a step off does not."""
    stock, r = DDPMScheduler().alphas_cumprod, DDPMVLBScheduler().reverse_process(dtype=torch.float64).forward
    r = r.sqrt_recipm1_alphas_cumprod
    told = GaussianPath.ddpm(stock, r).timesteps
    assert float((told - torch.arange(1000)).abs().max()) < 0.02
    GaussianPath.ddpm(stock, ((1 - stock) / stock).sqrt())  # in its own precision
    for off in (r[:1] * 0.998, r[-1:] * 1.002):
        with pytest.raises(ValueError, match="knows no other noise"):
            GaussianPath.ddpm(stock, off)


def test_a_network_that_was_never_called_compiles_into_one_graph():
    """Its tables are no part of the trace; they are kept where they were prepared."""
    path = GaussianPath.flow([0.1, 0.5, 0.9])
    cold, prepared = (path.network(lambda x, t: x * t.reshape(-1, 1)) for _ in range(2))
    assert prepared.prepare("cpu") is prepared
    counter, x = CompileCounter(), torch.ones(2, 3)
    for network in (cold, prepared):
        called = torch.compile(network, backend=counter, fullgraph=True)
        for t in ([0, 1], [2, 0]):
            torch.testing.assert_close(called(x, torch.tensor(t)), path.network(network.model)(x, torch.tensor(t)))
    assert counter.frame_count == 2
    assert not cold._tables and list(prepared._tables) == [(torch.device("cpu"), torch.float32)]


@pytest.mark.parametrize("steps", [1, 2, 33])
def test_spaced_ratios_are_even_in_log_snr(steps):
    ratios = spaced_ratios(None, 100.0, steps, levels=17)
    assert len(ratios) == steps and float(ratios[-1]) == pytest.approx(100)
    if steps > 1:
        assert float(ratios[0]) == pytest.approx(0.4 * 2 / 16)
        gaps = ratios.log().diff()
        assert torch.allclose(gaps, gaps[0], rtol=1e-10)


def test_stored_sigmas_walk_the_path_in_stock():
    path = GaussianPath.from_config(STOCK["flow"], RATIOS)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=path.sigmas([0, 3, 8], shift=3.0))
    torch.testing.assert_close(scheduler.sigmas[:-1].double().flip(0), path.sigma[[0, 3, 8]], rtol=1e-6, atol=1e-6)


RISING = [0.1, 0.5]
REFUSED = {
    "an unknown class": (lambda: GaussianPath.from_config(SCMScheduler()), "is not known"),
    "discrete tokens": (lambda: GaussianPath.from_config({"_class_name": "VQDiffusionScheduler"}), "is not known"),
    "consistency": (
        lambda: GaussianPath.from_config({"_class_name": "CMStochasticIterativeScheduler"}),
        "is not known",
    ),
    "betas": (lambda: GaussianPath.from_config(DDPMScheduler()), "DDPMVLBScheduler.from_config"),
    "no class": (lambda: GaussianPath.from_config({"shift": 1.0}), "_class_name"),
    "no config": (lambda: GaussianPath.from_config(3), "must be a scheduler"),
    "dynamic shifting": (
        lambda: GaussianPath.from_config(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)),
        "spaced_ratios",
    ),
    "inverted": (lambda: GaussianPath.from_config(FlowMatchEulerDiscreteScheduler(invert_sigmas=True)), "invert_sig"),
    "not a flow": (
        lambda: GaussianPath.from_config(UniPCMultistepScheduler(use_flow_sigmas=True)),
        "flow_prediction",
    ),
    "flow above 1": (lambda: GaussianPath.flow([0.5, 1.5]), r"\(0, 1\]"),
    "flow at 0": (lambda: GaussianPath.flow([0.0, 0.5]), r"\(0, 1\]"),
    "falling": (lambda: GaussianPath.flow([0.5, 0.1]), "must rise"),
    "equal": (lambda: GaussianPath.edm([0.5, 0.5]), "must rise"),
    "infinite": (lambda: GaussianPath.edm([0.5, math.inf]), r"\(0, inf\)"),
    "no levels": (lambda: GaussianPath.flow([]), "1 to"),
    "no numbers": (lambda: GaussianPath.flow(["a"]), "cannot be read"),
    "a kind": (lambda: GaussianPath.edm(RISING, prediction_type="sample"), "prediction_type"),
    "sigma_data": (lambda: GaussianPath.edm(RISING, 0.0), "sigma_data"),
    "outside the chain": (lambda: GaussianPath.ddpm([0.9, 0.1], [0.01, 1.0]), "knows no other noise"),
    "a rising alphabar": (lambda: GaussianPath.ddpm([0.1, 0.9], [1.0]), "must fall"),
    "tokens": (
        lambda: GaussianPath.edm(RISING).network(lambda x, t: x)(noise(2), torch.zeros(2, 4, dtype=torch.int64)),
        "token",
    ),
    "too few channels": (
        lambda: GaussianPath.edm(RISING).network(lambda x, t: x[:, :1])(noise(2).expand(2, 3, 4, 4), 0),
        "variance half",
    ),
    "a shift of EDM": (lambda: GaussianPath.edm(RISING).sigmas([0], shift=3.0), "flow matching alone"),
    "a shift of 0": (lambda: GaussianPath.flow(RISING).sigmas([0], shift=0.0), "positive"),
    "low and no levels": (lambda: spaced_ratios(None, 1.0, 3), "levels"),
    "low above high": (lambda: spaced_ratios(2.0, 1.0, 3), "must rise"),
    "no steps": (lambda: spaced_ratios(0.1, 1.0, 0), "steps"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refusals_say_what_to_do(what):
    call, message = REFUSED[what]
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_an_index_outside_the_chain_is_refused():
    path = GaussianPath.flow(RISING)
    with pytest.raises(IndexError, match="0 .. 1"):
        path.sigmas([2])
    with pytest.raises(IndexError, match="0 .. 1"):
        path.network(lambda x, t: x)(noise(1), torch.tensor([-1]))


def test_the_network_s_mode_is_the_path_s():
    """Whenever it changes, on either side; a function has none."""
    path, unet = GaussianPath.flow([0.1, 0.5]), tiny_unet(out=1).train()
    network = path.network(unet)
    assert network.training
    unet.eval()
    assert not network.training
    assert network.train() is network and unet.training
    assert not path.network(lambda x, t: x).train().training
