"""What the pipeline keeps of a walk: states that the scheduler drew, and log-probabilities that weights give again."""

import copy
import dataclasses

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from networks import pipeline, quiet, seeded, spy_on_step, tiny_unet

from ddpm_vlb import DDPMVLBPipeline, DDPMVLBScheduler, SquaredErrors, StoredPath, step_log_prob

STORED = StoredPath((999, 700, 400, 60), "per_pixel", 0.2)


HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def walk(pipe, batch: int = 3, **arguments):
    options = {"num_inference_steps": 4, "output_type": "latent", "generator": seeded()} | arguments
    return pipe(batch, return_trajectory=True, **options)


def made(kind: str) -> DDPMVLBPipeline:
    """A network of one channel with a variance half, used or not, and the scheduler of this kind."""
    pipe = pipeline(variance_type="fixed_large" if kind == "fixed_large" else "learned_range")
    if kind in HALVES:
        pipe.to(HALVES[kind])
    if kind == "stored":
        pixels = torch.rand(1000, 1, 8, 8, generator=seeded(4)) * 0.1 + 0.01
        errors = SquaredErrors(torch.arange(1000), pixels.flatten(1).mean(1), pixels)
        pipe.scheduler.store_few_steps([STORED], errors)
    return pipe


@pytest.mark.parametrize("kind", ["learned_range", "fixed_large", "stored", "eta", *HALVES])
def test_the_ratio_is_one_on_policy(kind):
    """The same weights give what is stored bit for bit, with gradients, from a process of one's own too.

    In half precision the states stay in float32, and the network gets them in its own dtype; of 2 C outputs a fixed
    variance takes the mean half.
    """
    pipe = made(kind)
    steps = walk(pipe, eta=0.6 if kind == "eta" else None).trajectory
    assert steps.states.dtype == steps.outputs.dtype == steps.log_probs.dtype == torch.float32
    reverse = steps.reverse if kind == "eta" else pipe.scheduler.reverse_process(num_inference_steps=4)
    for k in range(3):
        output = pipe.unet(steps.states[:, k].to(pipe.unet.dtype), steps.timesteps[k].expand(3)).sample
        ratio = steps.log_ratio(reverse, output, k).exp()
        assert ratio.requires_grad and torch.equal(ratio, torch.ones(3))
        assert torch.equal(steps.log_prob(reverse, output, k), steps.log_probs[:, k])
        direct = step_log_prob(reverse, output, steps.states[:, k], 3 - k, steps.states[:, k + 1])
        assert torch.equal(direct, steps.log_probs[:, k])


def test_a_flow_s_trajectory_is_its_chain_s():
    """Scored with the network as the chain calls it."""
    pipe = quiet(DDPMVLBPipeline(tiny_unet(out=1), FlowMatchEulerDiscreteScheduler(num_train_timesteps=100)))
    steps = walk(pipe).trajectory
    for k in range(3):
        output = pipe.network(steps.states[:, k], steps.timesteps[k].expand(3))
        assert torch.equal(steps.log_prob(steps.reverse, output, k), steps.log_probs[:, k])


def test_the_states_are_what_the_scheduler_drew(monkeypatch):
    """From the noise to the sample, K + 1 of them, with what the network was told; the last step counts nothing."""
    pipe = pipeline()
    plain = pipe(3, num_inference_steps=4, output_type="latent", generator=seeded()).images
    calls = spy_on_step(pipe, monkeypatch)
    found = walk(pipe)
    steps = found.trajectory
    assert len(steps) == 4 and steps.states.shape == (3, 5, 1, 8, 8)
    assert steps.log_probs.shape == (3, 4) and steps.log_probs.dtype == torch.float32
    assert steps.timesteps.tolist() == [call["timestep"] for call in calls]
    assert torch.equal(steps.outputs, torch.stack([call["output"] for call in calls], dim=1))
    assert all(torch.equal(steps.states[:, k], call["image"]) for k, call in enumerate(calls))
    assert torch.equal(steps.states[:, -1], found.images) and torch.equal(found.images, plain)
    assert not steps.log_probs[:, -1].any() and steps.log_probs[:, :-1].all()


def test_other_weights_have_another_ratio():
    pipe = pipeline()
    steps = walk(pipe).trajectory
    output = tiny_unet(seed=1)(steps.states[:, 1], steps.timesteps[1].expand(3)).sample
    log_ratio = steps.log_ratio(steps.reverse, output, 1)
    assert log_ratio.isfinite().all() and not torch.allclose(log_ratio, torch.zeros(3), atol=1e-3)
    difference = steps.log_prob(steps.reverse, output, 1) - steps.log_probs[:, 1]
    torch.testing.assert_close(log_ratio, difference, rtol=1e-4, atol=1e-4)


def test_under_guidance_it_is_that_of_the_guided_step():
    """The output that is guided as the pipeline does it gives the stored values; the conditional one others."""
    pipe = pipeline(tiny_unet(classes=4))
    steps = walk(pipe, class_labels=[0, 1, 2], guidance_scale=2.5).trajectory
    x_t, told = steps.states[:, 0], steps.timesteps[0].expand(6)
    both = pipe.unet(torch.cat([x_t, x_t]), told, class_labels=torch.tensor([0, 1, 2, 3, 3, 3])).sample
    conditional, unconditional = both.chunk(2)
    mean = torch.lerp(unconditional[:, :1], conditional[:, :1], 2.5)
    guided = torch.cat([mean, conditional[:, 1:]], dim=1)
    assert torch.equal(steps.log_prob(steps.reverse, guided, 0, guidance_scale=2.5), steps.log_probs[:, 0])
    assert not steps.log_ratio(steps.reverse, guided, 0, guidance_scale=2.5).any()
    bare = step_log_prob(steps.reverse, conditional, x_t, steps.t(0), steps.states[:, 1])
    assert not torch.allclose(bare, steps.log_probs[:, 0])
    for score in (steps.log_prob, steps.log_ratio):
        with pytest.raises(ValueError, match="guidance_scale=2.5"):
            score(steps.reverse, conditional, 0)


def test_the_output_is_stock_s_and_more():
    pipe = pipeline()
    found = walk(pipe, batch=1, output_type="pil")
    assert isinstance(found, ImagePipelineOutput) and found[0] is found.images and found[1] is found.trajectory
    images, steps = walk(pipe, batch=1, output_type="pil", return_dict=False)
    assert torch.equal(steps.log_probs, found.trajectory.log_probs) and len(images) == 1
    plain = pipe(1, num_inference_steps=1)
    assert plain.trajectory is None and len(plain.to_tuple()) == 1


def changed(scheduler: DDPMVLBScheduler, **config) -> DDPMVLBScheduler:
    return DDPMVLBScheduler.from_config(scheduler.config, **config)


CHAINS = {
    "more steps": lambda p: p.scheduler.reverse_process(num_inference_steps=5),
    "another spacing": lambda p: p.scheduler.reverse_process(num_inference_steps=4, timestep_spacing="trailing"),
    "the training chain": lambda p: p.scheduler.reverse_process(),
    "another variance": lambda p: changed(p.scheduler, variance_type="learned").reverse_process(num_inference_steps=4),
    "another prediction": lambda p: changed(p.scheduler, prediction_type="sample").reverse_process(
        num_inference_steps=4
    ),
    "other betas": lambda p: changed(p.scheduler, beta_end=0.03).reverse_process(num_inference_steps=4),
    "unclipped": lambda p: changed(p.scheduler, clip_sample=False).reverse_process(num_inference_steps=4),
    "less noise": lambda p: dataclasses.replace(p.scheduler.reverse_process(num_inference_steps=4), eta=0.5),
}


@pytest.fixture(scope="module")
def walked():
    pipe = pipeline()
    steps = walk(pipe).trajectory
    return pipe, steps, pipe.unet(steps.states[:, 0], steps.timesteps[0].expand(3)).sample.detach()


@pytest.mark.parametrize("name", CHAINS)
def test_another_chain_is_refused(walked, name):
    pipe, steps, output = walked
    for score in (steps.log_prob, steps.log_ratio):
        with pytest.raises(ValueError, match="another chain") as error:
            score(CHAINS[name](pipe), output, 0)
        assert "\n" not in str(error.value)


def test_the_same_chain_is_taken_in_any_precision(walked):
    pipe, steps, output = walked
    double = pipe.scheduler.reverse_process(num_inference_steps=4, dtype=torch.float64)
    torch.testing.assert_close(steps.log_prob(double, output, 0), steps.log_probs[:, 0], rtol=1e-4, atol=1e-4)


def test_the_step_that_drew_nothing_is_refused(walked):
    _, steps, output = walked
    for score in (steps.log_prob, steps.log_ratio):
        with pytest.raises(ValueError, match="draws nothing"):
            score(steps.reverse, output, 3)
        for k in (4, -1):
            with pytest.raises(IndexError, match="0 .. 3"):
                score(steps.reverse, output, k)


def swapped() -> DDPMVLBPipeline:
    return quiet(DDPMVLBPipeline(tiny_unet(), DDIMScheduler()))


def writes_at(k: int):
    """A callback that changes one value of one image after step k."""

    def callback(pipe, step, timestep, tensors):
        if step == k:
            tensors["latents"][1, 0, 2, 3] += 0.01

    return callback


REFUSED = {
    "a stock scheduler": (lambda: walk(swapped()), "DDIMScheduler does not tell"),
    "no noise": (lambda: walk(pipeline(), eta=0.0), "`eta` above 0"),
    "a state of the callback's": (
        lambda: walk(pipeline(), callback_on_step_end=lambda *given: {"latents": given[-1]["latents"] * 0.9}),
        "no log-probability",
    ),
    "a state written into": (lambda: walk(pipeline(), callback_on_step_end=writes_at(1)), "write into none"),
    "a sample written into": (lambda: walk(pipeline(), callback_on_step_end=writes_at(3)), "write into none"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_has_no_log_probability_is_refused(what):
    call, message = REFUSED[what]
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_a_callback_may_watch():
    seen = []
    pipe = pipeline()
    found = walk(pipe, callback_on_step_end=lambda *given: seen.append(copy.copy(given[-1]["latents"])))
    assert torch.equal(torch.stack(seen, dim=1), found.trajectory.states[:, 1:])


def test_what_is_kept_stays():
    """A callback that keeps the states and writes into those of steps that are over changes nothing."""
    kept, pipe = [], pipeline()

    def callback(pipe, step, timestep, tensors):
        kept.append(tensors["latents"])
        for old in kept[:-1]:
            old.zero_()

    plain, found = walk(pipe), walk(pipe, callback_on_step_end=callback)
    assert torch.equal(found.trajectory.states, plain.trajectory.states) and not kept[0].any()


def test_a_walk_in_inference_mode_can_be_trained_on():
    pipe, plain = pipeline(), walk(pipeline()).trajectory
    with torch.inference_mode():
        steps = walk(pipe).trajectory
    assert torch.equal(steps.log_probs, plain.log_probs)
    assert not any(own.is_inference() for own in (steps.states, steps.timesteps, steps.outputs, steps.log_probs))
    output = pipe.unet(steps.states[:, 0], steps.timesteps[0].expand(3)).sample
    steps.log_ratio(steps.reverse, output, 0).sum().backward()
    assert any(own.grad.any() for own in pipe.unet.parameters())
