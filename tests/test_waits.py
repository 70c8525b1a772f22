"""Sampling never makes the host wait for the device, proven on a pretend one; the values are the CPU's.

A wait that comes back, an `.item()` or a copy that blocks, fails the budget of its path by name.
"""

import copy

import pytest
import torch
from networks import one_block_unet, pipeline
from pretend_device import DEVICE, PretendDevice, PretendGenerator, put, values
from torch._dynamo.testing import CompileCounter

from ddpm_vlb import (
    DDPMVLBScheduler,
    ImportanceTimesteps,
    LossSecondMomentTimesteps,
    LowDiscrepancyTimesteps,
    ReverseProcess,
    UniformTimesteps,
    hybrid_loss,
    simple_loss,
    vlb_loss,
)
from ddpm_vlb.devices import send
from ddpm_vlb.guidance import Guidance

T, B = 40, 4
SHAPE = (B, 3, 4, 4)


def warmed_up() -> LossSecondMomentTimesteps:
    sampler = LossSecondMomentTimesteps(T, history_per_term=1)
    sampler.update(torch.arange(T), 1.0 + torch.arange(T))
    return sampler


SAMPLERS = {
    "uniform": lambda: UniformTimesteps(T),
    "low_discrepancy": lambda: LowDiscrepancyTimesteps(T),
    "importance": lambda: ImportanceTimesteps(1.0 + torch.arange(T)),
    "loss_second_moment": warmed_up,
}


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_sending_waits_only_for_the_way_back():
    """A copy to the device waits for nothing; one to the CPU waits for its values."""
    with PretendDevice() as device:
        there = send(torch.arange(3), DEVICE)
        assert device.waits == []
        assert send(there, "cpu").tolist() == [0, 1, 2] and len(device.waits) == 1


# --- timestep samplers


@pytest.mark.parametrize("name", SAMPLERS)
def test_drawing_steps_waits_for_nothing(name):
    """Steps and weights for the device are the CPU's, and sent there without a wait."""
    sampler = SAMPLERS[name]()
    expected = sampler.sample(B, generator=torch.Generator().manual_seed(1))
    with PretendDevice() as device:
        drawn = sampler.sample(B, device=DEVICE, generator=torch.Generator().manual_seed(1))
        sampler.sample(B, device=DEVICE)
    assert device.waits == []
    for there, here in zip(drawn, expected, strict=True):
        assert torch.equal(values(there), here)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_generator_of_the_device_draws_no_float64(name):
    """MPS has no float64: its generator serves all the same, and decides everything."""
    sampler = SAMPLERS[name]()
    with PretendDevice():
        first, again = (sampler.sample(B, DEVICE, PretendGenerator().manual_seed(2)) for _ in range(2))
    assert torch.equal(values(first[0]), values(again[0]))
    assert 0 <= int(values(first[0]).min()) and int(values(first[0]).max()) < T


def test_losses_and_probabilities_of_the_device():
    """Losses on the device are remembered, and probabilities there taken, without float64 on it."""
    here, there = warmed_up(), warmed_up()
    t, losses = torch.tensor([3, 5, 3]), torch.tensor([2.0, 9.0, 4.0])
    here.update(t, losses)
    with PretendDevice():
        there.update(put(t), put(losses))
        probabilities = ImportanceTimesteps(put(1.0 + torch.arange(T))).probabilities
    assert torch.equal(here.probabilities, there.probabilities)
    assert torch.equal(probabilities, ImportanceTimesteps(1.0 + torch.arange(T)).probabilities)


# --- README's training loop

LOSSES = {simple_loss: "fixed_small", vlb_loss: "learned_range", hybrid_loss: "learned_range"}


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_training_waits_for_nothing_after_the_first_batch(loss):
    """Drawing, noising, the loss and its gradients, with the first step of the chain in each batch.

    The first batch of a process is looked at, once.
    """
    scheduler = DDPMVLBScheduler(T, variance_type=LOSSES[loss])
    timesteps = ImportanceTimesteps(torch.tensor([20.0, *[1.0] * (T - 1)]))
    images = torch.randint(256, SHAPE, generator=torch.Generator().manual_seed(6)) * (2 / 255) - 1
    here = torch.nn.Conv2d(3, 3 if loss is simple_loss else 6, 3, padding=1)
    there = put(copy.deepcopy(here))

    def train(network: torch.nn.Module, images: torch.Tensor, reverse: ReverseProcess, seed: int) -> None:
        torch.manual_seed(seed)
        t, weights = timesteps.sample(B, device=images.device)
        diffused = reverse.forward.diffuse(images, t, torch.randn_like(images))
        (weights * loss(reverse, network(diffused.x_t), diffused)).mean().backward()

    reverse = scheduler.reverse_process()
    for seed in range(3):
        train(here, images, reverse, seed)
    images = put(images)
    with PretendDevice() as device:
        reverse = scheduler.reverse_process(DEVICE)
        assert device.waits == []
        train(there, images, reverse, 0)
        device.waits.clear()
        for seed in (1, 2):
            train(there, images, reverse, seed)
    assert device.waits == []
    for own, expected in zip(there.parameters(), here.parameters(), strict=True):
        torch.testing.assert_close(values(own.grad), expected.grad, rtol=1e-5, atol=1e-7)


# --- a step

KINDS = {
    "int": lambda t: int(t),
    "0-dim on the CPU": lambda t: t,
    "0-dim on the device": put,
    "batched on the CPU": lambda t: t.expand(B),
    "batched on the device": lambda t: put(t.expand(B)),
}


@pytest.mark.parametrize("variance_type", ["learned_range", "fixed_small"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_waits_for_nothing(kind, variance_type):
    """Every kind of timestep, with a generator or without, at the last step too, gives the CPU's sample."""
    scheduler = DDPMVLBScheduler(T, variance_type=variance_type)
    scheduler.set_timesteps(8)
    sample, output = randn(*SHAPE), randn(B, 6 if variance_type == "learned_range" else 3, 4, 4, seed=1)
    there = put(sample), put(output)
    for t in scheduler.timesteps[[0, 5, -1]]:
        expected = scheduler.step(output, t, sample, torch.Generator().manual_seed(3))
        timestep = KINDS[kind](t)
        for generator in (torch.Generator().manual_seed(3), PretendGenerator().manual_seed(3), None):
            with PretendDevice() as device:
                result = scheduler.step(there[1], timestep, there[0], generator)
            assert device.waits == []
            assert torch.equal(values(result.pred_original_sample), expected.pred_original_sample)
            if generator is not None:
                torch.testing.assert_close(values(result.prev_sample), expected.prev_sample, rtol=1e-6, atol=1e-6)


def test_generators_of_the_cpu_for_each_sample_make_no_wait():
    """A list of the CPU's generators draws for the device what it draws for the CPU."""
    scheduler = DDPMVLBScheduler(T)
    scheduler.set_timesteps(8)

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in range(B)]

    expected = scheduler.step(randn(*SHAPE), 20, randn(*SHAPE, seed=1), generators()).prev_sample
    sample, output = put(randn(*SHAPE, seed=1)), put(randn(*SHAPE))
    with PretendDevice() as device:
        result = scheduler.step(output, 20, sample, generators()).prev_sample
    assert device.waits == [] and torch.equal(values(result), expected)


@pytest.mark.parametrize("timestep", [3, -1, T, 10**6, -(10**6)])
@pytest.mark.parametrize("batched", [False, True])
def test_a_wrong_timestep_of_the_device_gives_nan(timestep, batched):
    """It cannot be refused without a wait, so its sample is no number; those of the same batch stay right."""
    scheduler = DDPMVLBScheduler(T)
    scheduler.set_timesteps(8)
    right = int(scheduler.timesteps[2])
    t = torch.tensor([right, timestep, right, right] if batched else timestep)
    sample, output = put(randn(*SHAPE)), put(randn(*SHAPE, seed=1))
    with PretendDevice() as device:
        result = scheduler.step(output, put(t), sample)
    assert device.waits == []
    expected = (t != right).expand(B)
    for x in (result.prev_sample, result.pred_original_sample):
        assert torch.equal(values(x).isnan().flatten(1).all(1), expected)
        assert torch.equal(values(x).isfinite().flatten(1).all(1), ~expected)


@pytest.mark.parametrize("method", ["add_noise", "get_velocity"])
def test_noising_waits_for_nothing(method):
    """With timesteps on the device or left on the CPU, and without float64 there."""
    scheduler, t = DDPMVLBScheduler(T), torch.tensor([0, 5, T - 1, 7])
    expected = getattr(scheduler, method)(randn(*SHAPE), randn(*SHAPE, seed=1), t)
    x_0, noise = put(randn(*SHAPE)), put(randn(*SHAPE, seed=1))
    for timesteps in (put(t), t):
        with PretendDevice() as device:
            noised = getattr(scheduler, method)(x_0, noise, timesteps)
        assert device.waits == [] and torch.equal(values(noised), expected)


# --- the pipeline


@pytest.mark.parametrize("generator", [None, torch.Generator, PretendGenerator], ids=["none", "cpu", "device"])
def test_the_pipeline_waits_for_no_step(generator):
    """As often for four steps as for two: for the list of steps, and for the check of all of them at the end."""
    pipe = pipeline(one_block_unet())
    made = torch.Generator if generator is None else generator
    options = {"output_type": "latent"}
    expected = pipe(2, num_inference_steps=2, generator=torch.Generator().manual_seed(4), **options).images
    put(pipe.unet)
    waits = []
    for steps in (2, 4):
        seeded = None if generator is None else made().manual_seed(4)
        with PretendDevice() as device:
            images = pipe(2, num_inference_steps=steps, generator=seeded, **options).images
        waits.append(device.waits)
        if steps == 2 and generator is not None:
            torch.testing.assert_close(values(images), expected)
    assert len(waits[0]) == len(waits[1]) <= 2, waits


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_labels_are_checked_without_a_wait(scale):
    """Labels of the CPU are looked at there, and sent."""
    with PretendDevice() as device:
        guidance = Guidance.of(3, [0, 1, 0], scale, None, 3, DEVICE)
    assert device.waits == [] and values(guidance.labels).tolist() == [0, 1, 0]


# --- compiled


def test_one_graph_serves_all_steps():
    """A compiled step is one graph, made once, with the eager step's values; it follows a change of the chain."""
    torch.compiler.reset()
    scheduler = DDPMVLBScheduler(T, variance_type="learned_range")
    sample, output = randn(*SHAPE), randn(B, 6, 4, 4, seed=1)
    counter = CompileCounter()
    compiled = torch.compile(
        lambda t: scheduler.step(output, t, sample, return_dict=False), fullgraph=True, backend=counter
    )
    for graphs, steps in ((1, 8), (2, 5)):
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            torch.manual_seed(5)
            expected = scheduler.step(output, t, sample, return_dict=False)
            torch.manual_seed(5)
            for own, eager in zip(compiled(t), expected, strict=True):
                torch.testing.assert_close(own, eager, rtol=1e-6, atol=1e-6)
        assert counter.frame_count == graphs
    assert bool(compiled(torch.tensor(1))[0].isnan().all())  # no step of this chain


def test_a_compiled_step_tells_what_it_drew_from():
    """Its output is the eager one's, distribution and all."""
    torch.compiler.reset()
    scheduler = DDPMVLBScheduler(T, variance_type="learned_range")
    sample, output, t = randn(*SHAPE), randn(B, 6, 4, 4, seed=1), torch.tensor(7)
    expected = scheduler.step(output, t, sample).distribution
    compiled = torch.compile(scheduler.step, fullgraph=True, backend="eager")
    own = compiled(output, t, sample).distribution
    assert torch.equal(own.mean, expected.mean) and torch.equal(own.log_variance, expected.log_variance)


def test_a_step_is_called_once_before_it_is_compiled():
    """Its tables are made by an eager call; without one the error says so."""
    torch.compiler.reset()
    scheduler = DDPMVLBScheduler(T)
    compiled = torch.compile(scheduler.step, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="Call `step` once before"):
        compiled(randn(*SHAPE), torch.tensor(3), randn(*SHAPE))
