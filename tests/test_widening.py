"""A fixed-variance network with a variance half: what it samples, what its bound is, and who gains none."""

import dataclasses

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DConditionModel
from networks import one_block_unet, quiet, sample, tiny_dit, tiny_unet

from ddpm_vlb import DDPMVLBPipeline, DDPMVLBScheduler, StoredPath, vlb_loss, vlb_term, with_learned_range


def stock(variance_type="fixed_small", **config):
    return DDPMScheduler(variance_type=variance_type, **config)


@pytest.mark.parametrize("variance_type, value", [("fixed_small", -1), ("fixed_small_log", -1), ("fixed_large", 1)])
def test_nothing_but_a_constant_half_is_added(variance_type, value):
    """The mean half is the old output, bit for bit, the other one v; the old network and its scheduler stay."""
    old, scheduler = tiny_unet(3, out=3), stock(variance_type)
    before = {name: weight.clone() for name, weight in old.state_dict().items()}
    wide, learned = with_learned_range(old, scheduler)
    x_t, t = torch.randn(2, 3, 8, 8), torch.tensor([0, 999])
    with torch.no_grad():
        mean, variance = wide(x_t, t).sample.chunk(2, dim=1)
        assert torch.equal(mean, old(x_t, t).sample) and torch.equal(variance, torch.full_like(mean, value))
    after = wide.state_dict()
    assert all(torch.equal(before[name], weight[: len(before[name])]) for name, weight in after.items())
    assert {name for name in before if before[name].shape != after[name].shape} == {"conv_out.weight", "conv_out.bias"}
    assert all(torch.equal(before[name], weight) for name, weight in old.state_dict().items())
    assert (wide.config.out_channels, old.config.out_channels) == (6, 3)
    assert (learned.config.variance_type, scheduler.config.variance_type) == ("learned_range", variance_type)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_stock_samples_it_as_it_sampled_the_old_one(tmp_path, variance_type):
    """Saved, and read by stock's DDPMPipeline: the same images of the same seed."""
    old = (
        one_block_unet(3, learned=False),
        stock(variance_type, prediction_type="v_prediction", beta_end=0.03, clip_sample_range=0.9),
    )
    DDPMVLBPipeline(*with_learned_range(*old)).save_pretrained(tmp_path)
    new = quiet(DDPMPipeline.from_pretrained(tmp_path))
    assert type(new.scheduler) is DDPMScheduler and new.scheduler.config.variance_type == "learned_range"
    for steps in (7, 25):
        expected = sample(quiet(DDPMPipeline(*old)), steps=steps, batch_size=2, output_type="np")
        found = sample(new, steps=steps, batch_size=2, output_type="np")
        torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("timesteps", [None, [999, 500, 20, 0], [999, 700, 3]])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_the_bound_is_the_old_one(variance_type, timesteps):
    """Term by term, also of few steps; fixed_large's first step has beta_1 in place of the borrowed betatilde_2."""
    old, scheduler = tiny_unet(out=1), stock(variance_type)
    wide, learned = with_learned_range(old, scheduler)
    before = DDPMVLBScheduler.from_config(scheduler.config).reverse_process(timesteps=timesteps)
    after = learned.reverse_process(timesteps=timesteps)
    if variance_type == "fixed_large":
        before = dataclasses.replace(before, decoder_log_variance=float(before.forward.betas[0].log()))
    t = torch.tensor([0, 1, 2, len(after.forward) - 1])
    diffused = after.forward.diffuse(torch.randint(256, (4, 1, 8, 8)) / 127.5 - 1, t, torch.randn(4, 1, 8, 8))
    with torch.no_grad():
        expected, found = (
            vlb_term(reverse, network(diffused.x_t, reverse.forward.timesteps[t]).sample, diffused)
            for reverse, network in ((before, old), (after, wide))
        )
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_where_the_mean_is_frozen_its_gradient_is_zero():
    """Exactly, in the rows of the last convolution that make it; the variance half's is not."""
    wide, learned = with_learned_range(tiny_unet(2, out=2), stock("fixed_large"))
    reverse = learned.reverse_process()
    x_0, t = torch.randint(256, (4, 2, 8, 8)) / 127.5 - 1, torch.tensor([0, 1, 300, 999])
    diffused = reverse.forward.diffuse(x_0, t, torch.randn_like(x_0))
    vlb_loss(reverse, wide(diffused.x_t, t).sample, diffused, freeze_mean=True).mean().backward()
    for gradient in (wide.conv_out.weight.grad, wide.conv_out.bias.grad):
        assert (gradient[:2] == 0).all() and (gradient[2:] != 0).all()


def test_what_was_found_for_the_old_variance_is_left_out():
    """The stored paths; what else the configuration says stays."""
    scheduler = DDPMVLBScheduler(levels=17, prediction_type="sample")
    scheduler.store_few_steps([StoredPath((999, 0))])
    learned = with_learned_range(tiny_unet(out=1), scheduler)[1]
    assert not learned.optimal_paths and scheduler.optimal_paths
    assert (learned.levels, learned.config.prediction_type) == (17, "sample")


def test_a_network_of_text_gains_one_too():
    """Stable Diffusion's kind has the same last convolution; its mode and precision stay."""
    size = dict(block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, cross_attention_dim=4)
    kinds = dict(down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",))
    old = UNet2DConditionModel(sample_size=4, in_channels=4, out_channels=4, attention_head_dim=2, **size, **kinds)
    wide, _ = with_learned_range(old.train().bfloat16(), stock())
    assert wide.training and {weight.dtype for weight in wide.parameters()} == {torch.bfloat16}
    x_t, text = torch.randn(1, 4, 4, 4).bfloat16(), torch.randn(1, 3, 4).bfloat16()
    output = wide(x_t, torch.tensor([5]), text).sample
    assert output.shape == (1, 8, 4, 4) and (output[:, 4:] == -1).all()


def analytic():
    scheduler = DDPMVLBScheduler()
    scheduler.register_to_config(reverse_variance="analytic")
    return scheduler


def unconfigured():
    module = torch.nn.Module()
    module.conv_out = torch.nn.Conv2d(1, 1, 1)
    return module


REFUSED = [
    (unconfigured, lambda: stock("fixed_small"), "tell `in_channels` in its `config`"),
    (lambda: tiny_unet(), lambda: stock("learned_range"), "fixed `variance_type`, but has 'learned_range'"),
    (lambda: tiny_unet(), lambda: stock("learned"), "fixed `variance_type`, but has 'learned'"),
    (lambda: tiny_unet(out=1), DDIMScheduler, "is a DDIMScheduler.*DDPMScheduler.from_config"),
    (lambda: tiny_unet(out=1), FlowMatchEulerDiscreteScheduler, "is a FlowMatchEulerDiscreteScheduler"),
    (lambda: tiny_unet(out=1), analytic, "`reverse_variance` is 'analytic'"),
    (lambda: tiny_unet(), stock, "1 output channels, as many as it takes, but has 2: a variance half is there"),
    (lambda: tiny_unet(3, out=1), stock, "3 output channels, as many as it takes, but has 1"),
    (tiny_dit, stock, "DiTTransformer2DModel has none"),
]


@pytest.mark.parametrize("network, scheduler, said", REFUSED)
def test_who_gains_none_is_refused(network, scheduler, said):
    """In one line."""
    with pytest.raises(ValueError, match=said) as error:
        with_learned_range(network(), scheduler())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"time_embedding_type": "fourier"}, "divides by t"),
        ({"up_block_types": ["SkipUpBlock2D"]}, "adds those of Skip"),
    ],
)
def test_a_network_that_changes_the_last_output_is_refused(changes, said):
    """Its v would not be a constant, or have no channels to be added to."""
    network = tiny_unet(out=1)
    network.register_to_config(**changes)
    with pytest.raises(ValueError, match=f"UNet2DModel {said}"):
        with_learned_range(network, stock())
