"""A network that gives NaN or infinity is named with the timestep; nothing makes an image of it."""

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from networks import pipeline, sample, tiny_unet

from ddpm_vlb import DDPMVLBPipeline, collect_statistics, estimate_vlb, evaluate_vlb, fit_pilot

STOCK = {"ours": None, "DDIM": DDIMScheduler, "Euler": EulerDiscreteScheduler}


def broken(value: float, call: int = 3, rows: slice = slice(None), **options) -> DDPMVLBPipeline:
    """A pipeline whose network gives such a value in some rows of one call, and is a network otherwise."""
    pipe = pipeline(tiny_unet(**options))
    calls = []

    def spoil(module, arguments, output):
        calls.append(arguments)
        if len(calls) == call:
            output.sample[rows, 0, 0, 0] = value

    pipe.unet.register_forward_hook(spoil)
    return pipe


@pytest.mark.parametrize("name", STOCK)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("output_type", ["pil", "latent"])
def test_the_network_and_the_first_timestep_are_named(name, value, output_type):
    """Clipping would make an infinite output harmless, and a NaN black; no solver is blamed."""
    pipe = broken(value)
    if STOCK[name] is not None:
        pipe.scheduler = STOCK[name].from_config(pipe.scheduler.config)
    pipe.scheduler.set_timesteps(5)
    third = pipe.scheduler.timesteps.tolist()[2]
    with pytest.raises(ValueError, match=f"network, a UNet2DModel, at timestep {third}, step 3 of 5") as refusal:
        sample(pipe, steps=5, output_type=output_type)
    assert "num_inference_steps" not in str(refusal.value)


@pytest.mark.parametrize("rows", [slice(0, 1), slice(2, 3)])
def test_guidance_hides_nothing(rows):
    """NaN in the output with a label, or in that without one."""
    pipe = broken(float("nan"), rows=rows, classes=4)
    with pytest.raises(ValueError, match="step 3 of 4"):
        sample(pipe, batch_size=2, class_labels=[0, 1], guidance_scale=2.0)


def test_one_of_several_images():
    """A single bad image is enough, in the last step too."""
    with pytest.raises(ValueError, match="timestep 0, step 4 of 4"):
        sample(broken(float("nan"), call=4, rows=slice(2, 3)), batch_size=3)


@pytest.mark.parametrize("step", [1, 3])
def test_a_callback_s_nan_is_not_the_network_s(step):
    """What came into a step was bad already, or the last of all: the network is not to blame."""

    def spoil(pipe, i, timestep, tensors):
        return {"latents": tensors["latents"] * float("nan")} if i == step else tensors

    with pytest.raises(ValueError, match="DDPMVLBScheduler or a callback gave values that are not finite in 4 steps"):
        sample(pipeline(), callback_on_step_end=spoil)


def test_scores_name_it_too():
    """The bound, its estimate, the pilot and the statistics of few steps: the same network is refused by all."""
    reverse = pipeline(num_train_timesteps=10).scheduler.reverse_process()
    x_0 = torch.zeros(4, 1, 8, 8) + 1 / 255

    def model(x_t, timesteps):
        output = torch.zeros(len(x_t), 2, *x_t.shape[2:])
        output[:, 0, 0, 0] = float("inf")  # clipped away where nobody looks
        return output

    good = fit_pilot(lambda x_t, timesteps: torch.zeros(len(x_t), 2, 8, 8), reverse, x_0, 40)
    for score in (
        lambda: evaluate_vlb(model, reverse, x_0),
        lambda: estimate_vlb(model, reverse, [x_0], good, 10),
        lambda: fit_pilot(model, reverse, x_0, 40),
        lambda: collect_statistics(model, reverse, x_0, torch.arange(10)),
    ):
        with pytest.raises(FloatingPointError, match="NaN or infinity in the model's output at chain index t="):
            score()
