"""DDPMVLBScheduler: the steps that it visits, a step of each, and the reverse process behind them."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from float64_steps import SHAPE, own_error_bound, randn, reference_step, seeded

from ddpm_vlb import DDPMVLBScheduler, make_betas, rescale_betas_zero_snr, step_log_prob

# Stock's numpy round trips, none of our business.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


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
    """The output is of stock's class, fields and all, or with return_dict=False the tuple of the two."""
    ours = DDPMVLBScheduler()
    sample, output = randn(0), randn(1)
    result = ours.step(output, 10, sample, generator=seeded(0))
    assert isinstance(result, DDPMSchedulerOutput) and list(result) == list(DDPMSchedulerOutput(sample, sample))
    previous, x_0 = ours.step(output, 10, sample, generator=seeded(0), return_dict=False)
    assert torch.equal(previous, result.prev_sample) and torch.equal(x_0, result.pred_original_sample)


def test_the_output_is_filled_as_diffusers_fills_it():
    """`step` passes over diffusers' slow way to fill its outputs: keys and attributes must be the same."""
    result = DDPMVLBScheduler().step(randn(1), 10, randn(0))
    by_diffusers = type(result)(result.prev_sample, result.pred_original_sample)
    assert [*map(id, result.values())] == [*map(id, by_diffusers.values())] and list(result) == list(by_diffusers)
    ours, theirs = ({name: id(value) for name, value in vars(own).items()} for own in (result, by_diffusers))
    assert ours.pop("_step") and ours == theirs


AT_ONE_STEP = {"int": int, "0-dim": torch.tensor, "batched": lambda t: torch.full((3,), t)}


@pytest.mark.parametrize("variance_type", ["learned_range", "fixed_small"])
@pytest.mark.parametrize("kind", AT_ONE_STEP)
def test_the_output_tells_what_it_was_drawn_from(kind, variance_type):
    """mean + sigma noise is the sample, in float32; its log-probability is bit for bit that of `step_log_prob`."""
    ours = DDPMVLBScheduler(100, variance_type=variance_type)
    ours.set_timesteps(5)
    sample, output = randn(0), randn(1, (3, 4, 4, 5))
    result = ours.step(output, AT_ONE_STEP[kind](60), sample, generator=seeded(2))
    p, noise = result.distribution, torch.randn(SHAPE, generator=seeded(2))
    assert p.mean.dtype == p.log_variance.dtype == torch.float32
    torch.testing.assert_close(p.sample(noise), result.prev_sample, rtol=1e-6, atol=1e-6)
    reverse = ours.reverse_process(num_inference_steps=5)
    scored = step_log_prob(
        reverse, output if reverse.learns_variance else output[:, :2], sample, 3, result.prev_sample
    )
    assert torch.equal(p.log_prob(result.prev_sample).flatten(1).sum(1), scored)


@pytest.mark.parametrize("kind", AT_ONE_STEP)
def test_there_is_no_distribution_where_nothing_is_drawn(kind):
    """At the chain's last step, and with eta = 0 at any."""
    ours = DDPMVLBScheduler(100)
    ours.set_timesteps(timesteps=[80, 40, 7])
    assert ours.step(randn(1), AT_ONE_STEP[kind](7), randn(0)).distribution is None
    assert ours.step(randn(1), AT_ONE_STEP[kind](40), randn(0)).distribution is not None
    ours.set_timesteps(timesteps=[80, 40, 7], eta=0.0)
    assert ours.step(randn(1), AT_ONE_STEP[kind](40), randn(0)).distribution is None


def test_samples_that_draw_and_do_not_have_no_one_distribution():
    result = DDPMVLBScheduler(100).step(randn(1), torch.tensor([50, 0, 3]), randn(0))
    with pytest.raises(ValueError, match=r"samples \[1\] are at the chain's last step"):
        result.distribution  # noqa: B018


def test_a_changed_chain_leaves_what_was_drawn():
    """The output is that of the chain it was drawn on, copied or not."""
    ours = DDPMVLBScheduler(100)
    ours.set_timesteps(10)
    result = ours.step(randn(1), 50, randn(0))
    mean = result.distribution.mean
    ours.set_timesteps(2)
    for kept in (result, copy.deepcopy(result)):
        assert torch.equal(kept.distribution.mean, mean)


@pytest.mark.parametrize("which", range(3))
def test_what_was_drawn_from_is_not_told_of_tensors_written_into(which):
    """Nor by a copy of the same tensors, or made since; a deep copy made before has tensors of its own."""
    ours = DDPMVLBScheduler(100, variance_type="learned_range")
    given = randn(1, (3, 4, 4, 5)).mul_(0.5), torch.full((3,), 60), randn(0)
    result, unasked = ours.step(*given), ours.step(*given)
    mean = result.distribution.mean
    early, shallow = copy.deepcopy(result), copy.copy(result)
    assert torch.equal(shallow.distribution.mean, mean)
    given[which][0] -= 1
    for late in (result, shallow, copy.copy(unasked), copy.deepcopy(unasked)):
        with pytest.raises(ValueError, match="written into|copied") as error:
            late.distribution  # noqa: B018
        assert "\n" not in str(error.value)
    assert torch.equal(early.distribution.mean, mean)


@pytest.mark.parametrize("inside", [True, False])
def test_inference_tensors_tell_what_was_drawn_from(inside):
    """They do not count what is written into them; nor does it matter in which mode one steps and asks."""
    ours = DDPMVLBScheduler(100)
    expected = ours.step(randn(1), 40, randn(0)).distribution
    with torch.inference_mode():
        given = randn(1), torch.tensor(40), randn(0)
        result = ours.step(*given) if inside else None
    result = result or ours.step(*given)
    output, sample = randn(1), randn(0)
    ordinary = ours.step(output, 40, sample)
    with torch.inference_mode():
        within = ours.step(output, 40, sample)
        assert torch.equal(ordinary.distribution.mean, expected.mean)
    for told in (result, within):
        assert torch.equal(told.distribution.mean, expected.mean)


def test_an_output_made_by_hand_has_no_distribution():
    """It is an output all the same, of `dataclasses.replace` or of tensors."""
    ours = DDPMVLBScheduler(100)
    result = ours.step(randn(1), 40, randn(0))
    replaced = dataclasses.replace(result, prev_sample=randn(2))
    assert torch.equal(replaced.prev_sample, randn(2)) and list(replaced) == list(result)
    for output in (replaced, type(result)(randn(0)), copy.deepcopy(replaced)):
        with pytest.raises(ValueError, match="made by hand") as error:
            output.distribution  # noqa: B018
        assert "\n" not in str(error.value)


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


@pytest.mark.parametrize("variance_type", ["fixed_small", "learned", "learned_range"])
@pytest.mark.parametrize("index", [0, 7])
def test_a_step_has_the_gradients_of_a_sample(variance_type, index):
    """A step writes into its own memory only: autograd goes through it, and the tables stay as they were."""
    ours = DDPMVLBScheduler(num_train_timesteps=20, variance_type=variance_type, clip_sample_range=0.5)
    p, inputs = (
        ours.reverse_process(),
        [randn(0), torch.cat([randn(1)] * (1 + variance_type.startswith("learned")), 1)],
    )

    def gradients(step):
        sample, output = (x.clone().requires_grad_() for x in inputs)
        return torch.autograd.grad(step(sample, output).square().sum(), (sample, output))

    def sampled(sample, output):
        own = p(output, sample, index).p
        return own.sample(torch.randn(SHAPE, generator=seeded(2))) if index else own.mean

    for _ in range(2):
        actual = gradients(lambda x, o: ours.step(o, index, x, generator=seeded(2)).prev_sample)
        torch.testing.assert_close(actual, gradients(sampled), rtol=1e-6, atol=1e-6)


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
