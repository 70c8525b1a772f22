"""Stock's schedulers in our pipeline, and ours in stock's."""

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMParallelScheduler,
    DDIMScheduler,
    DDPMParallelScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DEISMultistepScheduler,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from networks import pipeline, quiet, sample, scheduler, seeded, spy_on_step, tiny_dit, tiny_unet

from ddpm_vlb import DDPMVLBPipeline, DDPMVLBScheduler

# Stock's numpy round trips, none of our business.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

STOCK_SCHEDULERS = (
    DDIMScheduler,
    DDIMParallelScheduler,
    DDPMParallelScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    UniPCMultistepScheduler,
    EulerDiscreteScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    DEISMultistepScheduler,
)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("stock", STOCK_SCHEDULERS)
def test_stock_schedulers_get_the_mean_half(stock, channels, monkeypatch):
    """Every stock scheduler, from our config, samples a 2C-channel network: it is given C channels, 2C where it
    can use them; the scheduler stays what it is."""
    pipe = pipeline(tiny_unet(channels))
    # The DPM-Solvers cut their input to 3 channels themselves where the config says that the variance is learned.
    options = {"variance_type": "fixed_small"} if channels == 4 and "DPMSolver" in stock.__name__ else {}
    pipe.scheduler = stock.from_config(pipe.scheduler.config, **options)
    calls = spy_on_step(pipe, monkeypatch)
    images = sample(pipe, batch_size=2, steps=6)
    assert type(pipe.scheduler) is stock
    assert images.shape == (2, channels, 8, 8) and images.isfinite().all()
    expected = 2 * channels if stock is DDPMParallelScheduler else channels
    assert {call["output"].shape[1] for call in calls} == {expected}


@pytest.mark.parametrize("stock", [DPMSolverMultistepScheduler, DPMSolverSinglestepScheduler])
def test_dpm_solvers_have_three_channels_in_them(stock):
    """The reason for the exception above: stock's DPM-Solvers fail on 4 channels under a learned variance type."""
    solver = stock.from_config(scheduler("learned_range").config)
    solver.set_timesteps(5)
    with pytest.raises(RuntimeError, match="size of tensor"):
        solver.step(torch.zeros(1, 4, 8, 8), solver.timesteps[0], torch.zeros(1, 4, 8, 8))


@pytest.mark.parametrize("stock", [DDIMScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler])
def test_stock_scheduler_samples_like_its_own_loop(stock):
    """With a stock scheduler the images are those of a hand loop over its own API."""
    unet = tiny_unet(3)
    pipe = quiet(DDPMVLBPipeline(unet, stock.from_config(scheduler().config)))
    assert type(pipe.scheduler) is stock
    images = sample(pipe, batch_size=2, steps=6)
    by_hand = stock.from_config(scheduler().config)
    by_hand.set_timesteps(6)
    x = torch.randn(2, 3, 8, 8, generator=seeded()) * by_hand.init_noise_sigma
    with torch.no_grad():
        for t in by_hand.timesteps:
            output = unet(by_hand.scale_model_input(x, t), t).sample[:, :3]
            x = by_hand.step(output, t, x).prev_sample
    torch.testing.assert_close(images, (x / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)


def test_stock_ddpm_scheduler_is_upgraded():
    """A stock DDPMScheduler becomes ours with the same configuration; the caller's object is not touched."""
    stock = DDPMScheduler(variance_type="learned_range", beta_schedule="squaredcos_cap_v2", num_train_timesteps=77)
    pipe = DDPMVLBPipeline(tiny_unet(), stock)
    assert type(pipe.scheduler) is DDPMVLBScheduler and type(stock) is DDPMScheduler
    assert {k: pipe.scheduler.config[k] for k in stock.config if not k.startswith("_")} == {
        k: v for k, v in stock.config.items() if not k.startswith("_")
    }


@pytest.mark.parametrize("variance_type", ["fixed_small", "learned_range"])
def test_our_scheduler_in_stock_s_pipeline(variance_type):
    """DDPMPipeline samples with our scheduler, a 2C-channel network under a fixed variance included, as ours does."""
    unet = tiny_unet(3)
    stock = quiet(DDPMPipeline(unet, scheduler(variance_type)))
    images = sample(stock, batch_size=2)
    ours = sample(pipeline(unet, variance_type=variance_type), batch_size=2)
    torch.testing.assert_close(images, ours, rtol=0, atol=1e-5)


def test_stock_s_pipeline_crashes_on_an_unused_variance_half():
    """The reason to split by channel count: stock's scheduler fails on 2C channels that it has no use for."""
    stock = quiet(DDPMPipeline(tiny_unet(3), DDPMScheduler()))
    with pytest.raises(RuntimeError):
        sample(stock)


def stock_dit_pipeline() -> DiTPipeline:
    """A tiny DiTPipeline; its label for no class is 1000, whatever the network."""
    transformer = tiny_dit(channels=4, classes=1000)
    torch.manual_seed(1)
    vae = AutoencoderKL(latent_channels=4, norm_num_groups=4, block_out_channels=(8,))
    return quiet(DiTPipeline(transformer, vae.eval(), DDIMScheduler(clip_sample=False)))


def test_latents_are_those_of_stock_s_dit_pipeline():
    """With stock's scheduler, labels and guidance, the decoded latents are DiTPipeline's images."""
    stock = stock_dit_pipeline()
    theirs = stock(
        class_labels=[7, 3], guidance_scale=3.0, generator=seeded(), num_inference_steps=5, output_type="np"
    )
    pipe = quiet(DDPMVLBPipeline(stock.transformer, stock.scheduler))
    latents = sample(pipe, steps=5, batch_size=2, class_labels=[7, 3], guidance_scale=3.0, output_type="latent")
    assert latents.shape == (2, 4, 8, 8) and float(latents.abs().max()) > 1  # not clamped to the range of images
    with torch.no_grad():
        images = stock.vae.decode(latents / stock.vae.config.scaling_factor).sample
    images = (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(images, theirs.images, rtol=0, atol=1e-4)
    assert np.abs(images - theirs.images[::-1]).max() > 0.01  # the tolerance tells images apart


def test_a_dit_s_learned_variance_is_used():
    """With our scheduler the variance half, which DiTPipeline throws away, decides the noise of each step."""
    stock = stock_dit_pipeline()
    config = {"variance_type": "learned_range", "clip_sample": False, "levels": None}
    pipe = quiet(DDPMVLBPipeline(stock.transformer, DDPMVLBScheduler.from_config(stock.scheduler.config, **config)))
    steps = []
    step = pipe.scheduler.step
    pipe.scheduler.step = lambda output, *args, **kwargs: steps.append(output) or step(output, *args, **kwargs)
    latents = sample(pipe, class_labels=7, output_type="latent")
    assert {output.shape[1] for output in steps} == {8}
    pipe.scheduler.step = lambda output, *args, **kwargs: step(
        torch.cat([output[:, :4], torch.ones_like(output[:, 4:])], dim=1), *args, **kwargs
    )
    assert float((sample(pipe, class_labels=7, output_type="latent") - latents).abs().max()) > 1e-3


def test_from_pipe():
    """from_pipe turns a stock pipeline into ours, sharing the network, and samples the same."""
    stock = quiet(DDPMPipeline(tiny_unet(3), DDPMScheduler(variance_type="learned_range")))
    pipe = quiet(DDPMVLBPipeline.from_pipe(stock))
    assert type(pipe) is DDPMVLBPipeline and type(pipe.scheduler) is DDPMVLBScheduler and pipe.unet is stock.unet
    assert pipe.scheduler.config.variance_type == "learned_range"
    torch.testing.assert_close(sample(pipe), sample(stock), rtol=0, atol=1e-5)
