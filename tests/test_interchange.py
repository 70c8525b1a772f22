"""Stock's schedulers in our place and back: the tables of docs/schedulers.md, row by row, with checked samples.

The network is the exact predictor of Gaussian data: each value of an image has a mean and a deviation of its own.
Every sampler's answer is then known. Without noise of its own it must follow the probability flow, which maps x_T to
m + s / sqrt(abar_T s^2 + 1 - abar_T) (x_T - sqrt(abar_T) m); with noise the samples must have the data's moments. (The
pipelines clamp to [-1, 1], and so is what they are compared with; some 1e-3 of the samples are touched.)
"""

import functools
import inspect
import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import diffusers
import pytest
import torch
from diffusers import ConfigMixin, DDPMPipeline, DDPMScheduler, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from networks import one_block_unet

from ddpm_vlb import DDPMVLBPipeline, DDPMVLBScheduler
from ddpm_vlb.path_configurations import EDM_SCHEDULERS, FLOW_SCHEDULERS, FLOW_SIGMA_SCHEDULERS

PAGE = (Path(__file__).parents[1] / "docs" / "schedulers.md").read_text()
# Steps after which each sampler is right to the tolerances below: those of first order need the most.
STEPS = {
    "DDPMScheduler": 250,
    "DDPMParallelScheduler": 250,
    "UnCLIPScheduler": 200,
    "DDIMScheduler": 1000,
    "DDIMParallelScheduler": 1000,
    "EulerDiscreteScheduler": 1000,
    "EulerAncestralDiscreteScheduler": 1000,
    "HeunDiscreteScheduler": 100,
    "KDPM2DiscreteScheduler": 100,
    "KDPM2AncestralDiscreteScheduler": 200,
    "LMSDiscreteScheduler": 100,
    "PNDMScheduler": 100,
    "DEISMultistepScheduler": 250,
    "DPMSolverMultistepScheduler": 250,
    "DPMSolverSinglestepScheduler": 250,
    "UniPCMultistepScheduler": 250,
    "SASolverScheduler": 250,
    "DPMSolverSDEScheduler": 100,
    "LCMScheduler": 50,
    "TCDScheduler": 50,
}
SLOW = ("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DPMSolverSDEScheduler") + (
    "DDPMParallelScheduler",  # whose steps are the others'
    "DDIMParallelScheduler",
)
NO_NOISE = 0.03  # rms distance from the flow, in deviations of the data; other samples of it are sqrt(2) away
BIAS = 0.08  # of moments, in units of the data's, beside 4 to 5 standard errors: EulerAncestral's 0.05 is the largest
# What adding C to 2 C channels ends in, in a sum or in the network's next call, and a `step` without a generator.
FAILURES = r"size of tensor|broadcast shape|to have \d+ channels|unexpected keyword argument 'generator'"
# Chains and options that must travel; the values differ from every class's defaults.
CHAINS = {
    "defaults": {},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 2e-4, "beta_end": 0.03},
    "short": {"num_train_timesteps": 500, "beta_start": 3e-4, "beta_end": 0.04},
    "squaredcos": {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"},
    "trained_betas": {"trained_betas": [0.001 * (k + 1) for k in range(60)], "num_train_timesteps": 60},
    "zero_snr": {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
}
MODEL_DEFINING = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "variance_type",
    "prediction_type",
    "rescale_betas_zero_snr",
)

# Stock's numpy round trips, by the ten thousand, are none of our business.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")


def table(header: str) -> dict[str, list[str]]:
    """A table of the page, by the first cell of its header: the first cell of each row -> the others."""
    lines = iter(PAGE.splitlines())
    assert any(line.startswith(f"| {header} |") for line in lines), header
    next(lines)
    rows = {}
    for line in lines:
        if not line.startswith("|"):
            break
        first, *others = (cell.strip() for cell in line.strip("|").split("|"))
        assert first not in rows
        rows[first] = others
    return rows


ROWS = {name.strip("`"): cells for name, cells in table("scheduler").items()}
NAMES = [name for name in STEPS if hasattr(diffusers, name)]


def stock_class(name: str):
    return getattr(diffusers, name)


class GaussianDenoiser(ModelMixin, ConfigMixin):
    """The exact answer for Gaussian data, mean half and variance half; between two steps log sigma is interpolated.

    The variance half is v of the true p(x_{t-1} | x_t) on the training chain. It remembers how often it was called.
    """

    ignore_for_config = ["alphas_cumprod"]

    @register_to_config
    def __init__(
        self,
        alphas_cumprod: torch.Tensor,
        in_channels: int = 3,
        out_channels: int = 6,
        sample_size: int = 2,
        prediction_type: str = "epsilon",
    ):
        super().__init__()
        shape = (in_channels, sample_size, sample_size)
        k = torch.arange(math.prod(shape), dtype=torch.float64)
        self.mean = (0.2 * torch.cos(2 * k)).reshape(shape)
        self.std = (0.12 + 0.12 * (0.618 * k % 1)).reshape(shape)
        self.abar = alphas_cumprod.double()
        self.shift = torch.nn.Parameter(torch.zeros(()))  # added to v
        self.calls = 0

    def abar_at(self, t: torch.Tensor) -> torch.Tensor:
        low, weight = t.floor().long(), t.double() % 1
        high = (low + 1).clamp(max=len(self.abar) - 1)
        log_snr = torch.logit(self.abar)
        between = torch.sigmoid(torch.lerp(log_snr[low], log_snr[high], weight))
        return torch.where(weight == 0, self.abar[low], between)

    def variance_half(self, t: torch.Tensor) -> torch.Tensor:
        abar = self.abar[t].reshape(-1, 1, 1, 1)
        previous = torch.cat([torch.ones(1), self.abar])[t].reshape(-1, 1, 1, 1)
        beta = 1 - abar / previous
        posterior = (beta * (1 - previous) / (1 - abar)).clamp(min=1e-20)
        left = self.std**2 * (1 - abar) / (abar * self.std**2 + 1 - abar)  # Var[x_0 | x_t]
        exact = posterior + previous * (beta / (1 - abar)) ** 2 * left
        return 2 * (exact / posterior).log() / (beta / posterior).log() - 1

    def forward(self, sample, timestep, class_labels=None):
        self.calls += 1
        channels = self.config.in_channels
        if sample.shape[1] != channels:  # as a convolution would
            raise RuntimeError(f"expected input to have {channels} channels, but got {sample.shape[1]}")
        t = torch.as_tensor(timestep).reshape(-1)
        abar = self.abar_at(t).reshape(-1, 1, 1, 1)
        gap = sample.double() - abar.sqrt() * self.mean
        total = abar * self.std**2 + 1 - abar
        x_0 = self.mean + abar.sqrt() * self.std**2 / total * gap
        epsilon = (1 - abar).sqrt() / total * gap
        v = abar.sqrt() * epsilon - (1 - abar).sqrt() * x_0
        output = {"epsilon": epsilon, "sample": x_0, "v_prediction": v}[self.config.prediction_type]
        if self.config.out_channels == 2 * channels:
            half = self.variance_half(t.round().long()) + self.shift
            output = torch.cat([output, half.expand_as(output)], dim=1)
        return UNet2DOutput(sample=output.float())

    def flow(self, noise: torch.Tensor) -> torch.Tensor:
        """Where the probability flow takes x_T = `noise`."""
        abar = self.abar[-1]
        return self.mean + self.std / (abar * self.std**2 + 1 - abar).sqrt() * (noise - abar.sqrt() * self.mean)


def our_scheduler(name: str, **config) -> DDPMVLBScheduler:
    """A learned-range chain that the stock class takes: UnCLIP has one schedule, and no fewer steps than the chain."""
    if name == "UnCLIPScheduler":
        config = {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 200} | config
    return DDPMVLBScheduler(**({"variance_type": "learned_range", "clip_sample": False} | config))


def setting(name: str, channels: int = 3, prediction_type: str = "epsilon", out: int | None = None, **config):
    """The exact predictor and the stock scheduler, swapped in."""
    ours = our_scheduler(name, prediction_type=prediction_type, **config)
    alphas_cumprod = ours.reverse_process(dtype=torch.float64).forward.alphas_cumprod
    out_channels = 2 * channels if out is None else out
    net = GaussianDenoiser(
        alphas_cumprod=alphas_cumprod,
        in_channels=channels,
        out_channels=out_channels,
        prediction_type=prediction_type,
    )
    return net, stock_class(name).from_config(ours.config)


def sample(pipe, n: int, steps: int | None) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(0)  # DPMSolverSDE takes no generator
    generator = torch.Generator().manual_seed(0)
    images = pipe(batch_size=n, num_inference_steps=steps, generator=generator, output_type="np").images
    return torch.from_numpy(images).permute(0, 3, 1, 2)  # stock's pipeline before diffusers 0.41 knows no "pt"


def verdict(net: GaussianDenoiser, images: torch.Tensor) -> str:
    """Whether each image is the flow of its noise, all have the right mean, variance and correlations, or neither."""
    if images.shape[1:] != net.mean.shape or not images.isfinite().all():
        return "wrong"
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)).double()
    x = images.double() * 2 - 1
    if float(((x - net.flow(noise).clamp(-1, 1)) / net.std).square().mean().sqrt()) < NO_NOISE:
        return "flow"
    z = ((x - net.mean) / net.std).flatten(1)
    n, dims = z.shape
    off_diagonal = torch.corrcoef(z.T) - torch.eye(dims)
    right = (
        bool((z.mean(0).abs() < 5 / n**0.5 + BIAS).all())
        and bool(((z.var(0) - 1).abs() < 5 * (2 / n) ** 0.5 + BIAS).all())
        and abs(float(z.var(0).mean()) - 1) < 4 * (2 / n / dims) ** 0.5 + BIAS
        and bool((off_diagonal.abs() < 5 / n**0.5).all())
    )
    return "moments" if right else "wrong"


def swapped(net: ModelMixin, scheduler) -> DDPMVLBPipeline:
    """The scheduler put into a pipeline of ours: the constructor would replace a DDPMScheduler."""
    pipe = DDPMVLBPipeline(net, DDPMVLBScheduler(variance_type="learned_range"))
    pipe.scheduler = scheduler
    return pipe


class Ours(NamedTuple):
    verdict: str
    calls: int


@functools.cache
def our_verdict(name: str) -> Ours:
    """What our pipeline samples with a stock scheduler."""
    net, scheduler = setting(name)
    # A sampler without noise needs no statistics: the flow is compared image by image.
    images = sample(swapped(net, scheduler), 64, STEPS[name])
    found, calls = verdict(net, images), net.calls
    if found != "flow":
        net, scheduler = setting(name)
        n = 256 if name == "DPMSolverSDEScheduler" else 1024
        found = verdict(net, sample(swapped(net, scheduler), n, STEPS[name]))
    return Ours(found, calls)


def stock_verdict(name: str, channels: int) -> str:
    """What DDPMPipeline samples with it from a network with 2 C channels."""
    net, scheduler = setting(name, channels)
    try:
        images = sample(DDPMPipeline(net, scheduler), 1024, STEPS[name])
    except (RuntimeError, TypeError) as error:
        assert re.search(FAILURES, str(error))
        return "fails"
    return "right" if verdict(net, images) != "wrong" else "wrong"


def samples_alike(name: str, prediction_type: str) -> bool | None:
    """Whether another prediction type gives the samples of epsilon; None where the scheduler refuses it."""
    reference, scheduler = setting(name)
    steps = 100 if name == "PNDMScheduler" else 200 if name == "UnCLIPScheduler" else 10
    images = sample(DDPMVLBPipeline(reference, scheduler), 8, steps)
    try:
        other = sample(DDPMVLBPipeline(*setting(name, prediction_type=prediction_type)), 8, steps)
    except (ValueError, NotImplementedError) as error:
        assert "prediction" in str(error)
        return None
    # PNDM extrapolates the network's output itself, so that v gives another method of the same order.
    return torch.allclose(images, other, rtol=0, atol=0.01 if name == "PNDMScheduler" else 2e-4)


def uses_variance_half(name: str) -> bool:
    """Whether the samples depend on v."""
    net, scheduler = setting(name)
    steps = 200 if name == "UnCLIPScheduler" else 4
    before = sample(DDPMVLBPipeline(net, scheduler), 8, steps)
    torch.nn.init.constant_(net.shift, 0.5)
    return not torch.equal(
        before, sample(DDPMVLBPipeline(net, type(scheduler).from_config(scheduler.config)), 8, steps)
    )


def chains_taken(name: str) -> dict[str, dict]:
    """The chains of `CHAINS` that the class does not refuse."""
    return {key: CHAINS[key] for key in (("squaredcos",) if name == "UnCLIPScheduler" else CHAINS)}


def comes_back(name: str) -> bool:
    """Whether ours, made from the stock class made from ours, has the same configuration, betas and levels."""
    same = []
    for config in chains_taken(name).values():
        ours = DDPMVLBScheduler(variance_type="learned_range", levels=17, **config)
        back = DDPMVLBScheduler.from_config(stock_class(name).from_config(ours.config).config)
        same += [back.config[key] == value for key, value in ours.config.items() if not key.startswith("_")]
        same += [torch.equal(back.betas, ours.betas), back.reverse_process().levels == 17]
    return all(same)


def notes(name: str) -> set[str]:
    """What is found of a scheduler, in the page's words."""
    found = set()
    ours = our_verdict(name)
    if uses_variance_half(name):
        found.add("uses the variance half")
    if ours.verdict == "moments":
        found.add("draws noise")
    if ours.verdict == "wrong":
        found.add("for distilled networks")
    if ours.calls > 1.5 * STEPS[name]:
        found.add("two calls a step")
    for prediction_type in ("sample", "v_prediction"):
        alike = samples_alike(name, prediction_type)
        assert alike is not False, f"{name} samples {prediction_type} networks wrongly"
        if alike is None:
            found.add(f"no `{prediction_type}`")
    if name == "UnCLIPScheduler":
        found.add("`squaredcos_cap_v2` only")
    elif "rescale_betas_zero_snr" not in inspect.signature(stock_class(name).__init__).parameters:
        found.add("ignores zero SNR")
    if name == "DPMSolverSDEScheduler":
        found.add("needs torchsde")
    return found


# --- the table


def test_every_scheduler_of_stock_is_on_the_page():
    """A class of stock is in the table, with a test for its row, among the paths, or among those left out."""

    def named(cells):
        return set(re.findall(r"`(\w+Scheduler)`", " ".join(cells)))

    out, paths = named(cells[0] for cells in table("left out").values()), named(table("scheduler in the checkpoint"))
    assert set(ROWS) == set(STEPS) and not out & (set(STEPS) | paths)
    assert paths == {*FLOW_SCHEDULERS, *FLOW_SIGMA_SCHEDULERS, *EDM_SCHEDULERS}
    stock = {name for name in dir(diffusers) if name.endswith("Scheduler") and not name.startswith("Flax")}
    assert stock <= out | paths | set(ROWS)
    assert {cls.__name__ for cls in DDPMVLBScheduler().compatibles} - out - paths <= set(ROWS)


@pytest.mark.parametrize("name", NAMES)
def test_back_from_a_saved_file(name, tmp_path):
    """A default instance's file, with all keys and some of them null, is read, from the folder and from its config."""
    fresh = stock_class(name)()
    fresh.save_pretrained(tmp_path)
    for back in (
        DDPMVLBScheduler.from_pretrained(tmp_path),
        DDPMVLBScheduler.from_config(stock_class(name).from_pretrained(tmp_path).config),
    ):
        torch.testing.assert_close(back.alphas_cumprod, fresh.alphas_cumprod, rtol=2e-4, atol=1e-7)
        assert back.config.prediction_type == fresh.config.prediction_type


@pytest.mark.parametrize("name", ["CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"])
def test_shifted_noise_levels_are_refused(name):
    """A configuration whose noise levels are not those of its betas does not become another chain without a word."""
    with pytest.raises(ValueError, match="snr_shift_scale"):
        DDPMVLBScheduler.from_config(getattr(diffusers, name)().config)
    flow = diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    with pytest.raises(ValueError, match="use_flow_sigmas"):
        DDPMVLBScheduler.from_config(flow.config)


def test_a_callback_that_saves_or_swaps(tmp_path):
    """In the middle of a call the scheduler's configuration is whole, and another scheduler is for the next call."""
    pipe = DDPMVLBPipeline(one_block_unet(1), our_scheduler("DPMSolverMultistepScheduler"))
    solver = pipe.scheduler = stock_class("DPMSolverMultistepScheduler").from_config(pipe.scheduler.config)
    other = stock_class("DDIMScheduler").from_config(our_scheduler("DDIMScheduler", variance_type="learned").config)

    def callback(pipe, step, timestep, tensors):
        if step == 1:
            pipe.save_pretrained(tmp_path)
            pipe.scheduler = other
        return tensors

    pipe.set_progress_bar_config(disable=True)
    pipe(num_inference_steps=4, output_type="np", callback_on_step_end=callback)
    saved = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
    assert saved["variance_type"] == solver.config.variance_type == "learned_range"
    assert other.config.variance_type == "learned" and pipe.scheduler is other


def test_those_left_out_do_not_take_the_chain():
    """They have no betas in their configuration, or are no sampler: inverse, inpainting, shifted noise levels."""
    for family, cells in table("left out").items():
        for name in re.findall(r"`(\w+Scheduler)`", cells[0]):
            cls = getattr(diffusers, name, None)
            if type(cls) is not type:  # not in this version, or a stand-in for a package that is not installed
                continue
            parameters = inspect.signature(cls.__init__).parameters
            exempt = family in ("data to noise", "inpainting", "shifted noise levels")
            assert ("beta_start" in parameters) == exempt, name


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in NAMES]
)
def test_row(name):
    """A row says what is found: both stock columns, our pipeline, the way back and the notes."""
    stock, ours, back, note = ROWS[name]
    assert stock == " / ".join(stock_verdict(name, channels) for channels in (1, 3))
    assert ours == ("wrong" if our_verdict(name).verdict == "wrong" else "right")
    assert back == ("same chain" if comes_back(name) else "another chain")
    assert set(filter(None, note.split("; "))) == notes(name)


def test_the_verdict_can_be_negative():
    """Betas of another chain, the variance half taken for the mean, and a wrong scale of x_T are all found wrong."""
    net, _ = setting("HeunDiscreteScheduler")
    default = diffusers.HeunDiscreteScheduler()  # beta_start 0.00085, beta_end 0.012
    assert verdict(net, sample(DDPMVLBPipeline(net, default), 1024, 100)) == "wrong"
    net, ddim = setting("DDIMScheduler")
    forward = net.forward
    net.forward = lambda *args, **kwargs: UNet2DOutput(sample=forward(*args, **kwargs).sample.flip(1))
    assert verdict(net, sample(DDPMVLBPipeline(net, ddim), 1024, 100)) == "wrong"
    net, euler = setting("EulerDiscreteScheduler", out=3)
    assert verdict(net, sample(DDPMPipeline(net, euler), 1024, 100)) == "wrong"
    good = net.flow(torch.randn(1024, 3, 2, 2, generator=torch.Generator().manual_seed(1)).double())
    assert verdict(net, good.clamp(-1, 1) / 2 + 0.5) == "moments"
    assert verdict(net, good.flip(3).clamp(-1, 1) / 2 + 0.5) == "wrong"


def test_stock_s_pipeline_does_not_scale():
    """DDPMPipeline is silently wrong with Euler for every network, one with C channels included; ours is right."""
    net, euler = setting("EulerDiscreteScheduler", out=3)
    images = sample(DDPMPipeline(net, euler), 64, 1000)
    assert images.isfinite().all() and verdict(net, images) == "wrong"
    assert verdict(net, sample(DDPMVLBPipeline(net, euler), 64, 1000)) == "flow"


@pytest.mark.parametrize("name", NAMES)
def test_a_unet_fares_alike(name):
    """A real U-Net fails in stock's pipeline where the exact predictor does, and samples in ours."""
    scheduler = stock_class(name).from_config(our_scheduler(name).config)
    for channels, expected in zip((1, 3), ROWS[name][0].split(" / "), strict=True):
        try:
            sample(DDPMPipeline(one_block_unet(channels), scheduler), 1, 4)
            found = "right"
        except (RuntimeError, TypeError) as error:
            assert re.search(FAILURES, str(error))
            found = "fails"
        assert found == expected
        images = sample(DDPMVLBPipeline(one_block_unet(channels), scheduler), 2, 4)
        assert images.shape == (2, channels, 4, 4) and images.isfinite().all()


@pytest.mark.parametrize(
    "name",
    ["DDIMScheduler", "DDIMParallelScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"]
    + ["DPMSolverMultistepScheduler", "KDPM2AncestralDiscreteScheduler", "LCMScheduler", "TCDScheduler"],
)
def test_one_step_of_stock_is_silently_two_channels(name):
    """The failure for C = 1 comes in the second step: in a single one both halves become an image."""
    assert sample(DDPMPipeline(one_block_unet(1), setting(name, 1)[1]), 2, 1).shape == (2, 2, 4, 4)


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "SASolverScheduler"])
def test_four_channels(name):
    """Stock's DPM-Solvers cut their input to 3 channels under a learned variance: not those in our pipeline."""
    net, scheduler = setting(name, channels=4)
    assert verdict(net, sample(DDPMVLBPipeline(net, scheduler), 1024, STEPS[name])) != "wrong"
    assert scheduler.config.variance_type == "learned_range"


def test_unclip_in_fewer_steps():
    """UnCLIP is told the step that comes next, and samples what our scheduler samples on the same chain."""
    net, unclip = setting("UnCLIPScheduler")
    images = sample(DDPMVLBPipeline(net, unclip), 8, 20)
    pipe = DDPMVLBPipeline(net, our_scheduler("UnCLIPScheduler", timestep_spacing="linspace"))
    torch.testing.assert_close(images, sample(pipe, 8, 20), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "name", ["DPMSolverMultistepScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler", "SASolverScheduler"]
)
def test_as_many_steps_as_the_chain_has(name):
    """With the spacing that is their default the multistep solvers give NaN, which is refused; "trailing" samples."""
    net, scheduler = setting(name, num_train_timesteps=100)
    assert scheduler.config.timestep_spacing == "linspace"
    with pytest.raises(ValueError, match=f"{name}.*num_inference_steps"):
        sample(DDPMVLBPipeline(net, scheduler), 2, None)
    scheduler = type(scheduler).from_config(scheduler.config, timestep_spacing="leading")
    with pytest.raises((IndexError, AssertionError)):
        sample(DDPMVLBPipeline(net, scheduler), 2, None)
    scheduler = type(scheduler).from_config(scheduler.config, timestep_spacing="trailing")
    assert sample(DDPMVLBPipeline(net, scheduler), 2, None).isfinite().all()


# --- what travels


@pytest.mark.parametrize("name", NAMES)
def test_swapping_keeps_the_chain(name):
    """The stock class has the alphabars that DDPMScheduler has from the same values, bit for bit."""
    cls = stock_class(name)
    for key, config in chains_taken(name).items():
        config = {k: v for k, v in config.items() if key != "squaredcos" or k != "prediction_type"}
        ours = DDPMVLBScheduler(variance_type="learned_range", **config)
        swapped = cls.from_config(ours.config)
        expected = DDPMScheduler(**config).alphas_cumprod
        found = swapped.alphas_cumprod
        torch.testing.assert_close(expected, ours.alphas_cumprod, rtol=2e-4, atol=1e-7)
        if key == "zero_snr":
            # Some keep a last alphabar of 2^-24, so that its sigma is finite.
            travels = bool(found[-1] <= 2**-24)
            assert travels == ("ignores zero SNR" not in ROWS[name][3])
            if not travels:
                plain = {k: v for k, v in config.items() if k != "rescale_betas_zero_snr"}
                expected = DDPMScheduler(**plain).alphas_cumprod
            found, expected = found[:-1], expected[:-1]
        assert torch.equal(found, expected), key


def test_unclip_refuses_other_chains():
    """UnCLIP has one schedule, and says so."""
    with pytest.raises(ValueError, match="squaredcos_cap_v2"):
        diffusers.UnCLIPScheduler.from_config(DDPMVLBScheduler().config)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("DDPMScheduler", "DDPMParallelScheduler")])
@pytest.mark.parametrize("schedule", ["sigmoid", "laplace"])
def test_schedules_that_only_ddpm_has(name, schedule):
    """They are refused by name, and travel as trained betas."""
    cls = stock_class(name)
    ours = DDPMVLBScheduler(beta_schedule=schedule, variance_type="learned_range")
    with pytest.raises((NotImplementedError, ValueError)):
        cls.from_config(ours.config)
    if name != "UnCLIPScheduler":
        swapped = cls.from_config(ours.config, trained_betas=ours.betas.tolist())
        torch.testing.assert_close(swapped.alphas_cumprod, ours.alphas_cumprod, rtol=1e-4, atol=1e-7)


def model_defining(scheduler: DDPMVLBScheduler) -> dict:
    return {key: scheduler.config.get(key) for key in MODEL_DEFINING} | {"levels": scheduler.levels}


@pytest.mark.parametrize("name", NAMES)
def test_back_from_a_scheduler_of_the_user(name):
    """From a scheduler that the user built with its class's own defaults we take its betas and prediction type."""
    stock = stock_class(name)()
    ours = DDPMVLBScheduler.from_config(stock.config)
    torch.testing.assert_close(ours.alphas_cumprod, stock.alphas_cumprod, rtol=2e-4, atol=1e-7)
    assert ours.config.prediction_type == stock.config.prediction_type
    assert ours.reverse_process().variance_type in ("fixed_small", "fixed_small_log")  # two names of one
    learned = DDPMVLBScheduler.from_config(stock.config, variance_type="learned_range", beta_end=0.05)
    assert learned.config.variance_type == "learned_range" and learned.config.beta_end == 0.05


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "FlowMatchEulerDiscreteScheduler", "IPNDMScheduler"])
def test_back_from_a_scheduler_without_betas(name):
    """A configuration of another class that names no betas is refused: our defaults would be a chain made up."""
    with pytest.raises(ValueError, match="betas"):
        DDPMVLBScheduler.from_config(getattr(diffusers, name)().config)


# --- saved pipelines


@pytest.mark.parametrize("name", NAMES)
def test_saved_after_a_swap(name, tmp_path):
    """Ours loads the swapped scheduler with its chain, and from it the way back; stock loads the scheduler alone."""
    cls = stock_class(name)
    ours = our_scheduler(name)
    pipe = DDPMVLBPipeline(one_block_unet(1), ours)
    pipe.scheduler = cls.from_config(ours.config)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", name]
    if name == "DDPMScheduler":
        assert type(DiffusionPipeline.from_pretrained(tmp_path)) is DDPMPipeline
    else:
        assert index["_class_name"] == "DDPMVLBPipeline"
        with pytest.raises(AttributeError, match="DDPMVLBPipeline"):
            DiffusionPipeline.from_pretrained(tmp_path)
    alone = cls.from_pretrained(tmp_path, subfolder="scheduler")
    loaded = DDPMVLBPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is (DDPMVLBScheduler if name == "DDPMScheduler" else cls)
    assert torch.equal(alone.alphas_cumprod, pipe.scheduler.alphas_cumprod)
    torch.testing.assert_close(loaded.scheduler.alphas_cumprod, alone.alphas_cumprod, rtol=2e-4, atol=1e-7)
    back = DDPMVLBScheduler.from_config(loaded.scheduler.config)
    assert model_defining(back) == model_defining(ours) and torch.equal(back.betas, ours.betas)
    # On some processors another alignment of the loaded weights rounds sums otherwise.
    torch.testing.assert_close(sample(loaded, 2, 5), sample(pipe, 2, 5), rtol=0, atol=1e-4)


def test_a_saved_swap_fixes_what_was_left_at_defaults(tmp_path):
    """What says how to sample is the stock class's in the file, and comes back with it where ours was a default."""
    heun = diffusers.HeunDiscreteScheduler.from_config(DDPMVLBScheduler().config)
    assert DDPMVLBScheduler.from_config(heun.config).config.clip_sample
    heun.save_pretrained(tmp_path)
    loaded = diffusers.HeunDiscreteScheduler.from_pretrained(tmp_path)
    assert not DDPMVLBScheduler.from_config(loaded.config).config.clip_sample


# --- few steps


def distance_from_the_flow(name: str, calls: int, options: dict[str, bool]) -> float:
    """Rms distance of 64 images from the flow's, in deviations of the data, after so many network calls."""
    net, scheduler = setting(name)
    scheduler = type(scheduler).from_config(scheduler.config, **options)
    steps = {"HeunDiscreteScheduler": calls // 2, "KDPM2DiscreteScheduler": calls // 2, "PNDMScheduler": calls - 9}
    images = sample(DDPMVLBPipeline(net, scheduler), 64, steps.get(name, calls))
    assert calls - 1 <= net.calls <= calls
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)).double()
    return float(((images.double() * 2 - 1 - net.flow(noise).clamp(-1, 1)) / net.std).square().mean().sqrt())


@pytest.mark.parametrize("row", table("network calls"))
def test_few_steps(row):
    """The distances from the exact flow are those of the page, to its two digits and what float32 sums leave alone."""
    name, *options = re.findall(r"`(\w+)`", row)
    for calls, cell in zip((20, 50, 100), table("network calls")[row], strict=True):
        found = distance_from_the_flow(name, calls, dict.fromkeys(options, True))
        assert found == pytest.approx(float(cell), rel=0.05, abs=6e-4), calls


def test_few_steps_are_of_the_samplers_without_noise():
    """Every sampler that follows the flow is in the table of distances, and no other."""
    flow = {name for name in NAMES if "draws noise" not in ROWS[name][3] and ROWS[name][1] == "right"}
    assert {re.findall(r"`(\w+)`", row)[0] for row in table("network calls")} == flow
