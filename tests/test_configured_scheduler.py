"""A configuration changed after the scheduler was made: what follows from it follows, or the change is refused."""

import copy
import pickle

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.configuration_utils import FrozenDict

from ddpm_vlb import DDPMVLBScheduler, SquaredErrors, StoredPath

# Timestep and change; as diffusers' scripts for fine-tuning and its conversion scripts make them.
CHANGES = [
    (100, {"prediction_type": "v_prediction"}),
    (100, {"prediction_type": "sample"}),
    (900, {"clip_sample": False}),
    (900, {"clip_sample_range": 0.5}),
    (500, {"variance_type": "fixed_large"}),
    (500, {"thresholding": True, "sample_max_value": 1.5}),
    (500, {"beta_schedule": "squaredcos_cap_v2"}),
    (500, {"beta_end": 0.05, "beta_start": 0.001}),
    (500, {"trained_betas": [0.01] * 1000}),
    (500, {"trained_betas": np.linspace(0.001, 0.02, 1000)}),
    (500, {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}),
    (800, {"timestep_spacing": "trailing"}),
]
each_change = pytest.mark.parametrize(("timestep", "change"), CHANGES, ids=lambda own: str(own))


def by_call(scheduler, change: dict) -> None:
    """As training scripts do it."""
    scheduler.register_to_config(**change)


def by_assignment(scheduler, change: dict) -> None:
    """As diffusers' pipelines do it to an outdated configuration."""
    scheduler._internal_dict = FrozenDict({**scheduler.config, **change})


each_way = pytest.mark.parametrize("change_it", [by_call, by_assignment])


def a_step(scheduler, timestep: int) -> torch.Tensor:
    """x_{t-1} of a fixed input."""
    x, output = torch.linspace(-2, 2, 64).reshape(1, 1, 8, 8), torch.linspace(1, -1, 64).reshape(1, 1, 8, 8)
    scheduler.set_timesteps(10)
    timestep = min(scheduler.timesteps.tolist(), key=lambda own: abs(own - timestep))
    return scheduler.step(output, timestep, x, generator=torch.Generator().manual_seed(0)).prev_sample


@each_way
@each_change
def test_a_change_is_that_of_a_new_scheduler(timestep, change, change_it, tmp_path):
    """Step, p, the public tables and what is saved are those of a scheduler made with the values."""
    scheduler, new = DDPMVLBScheduler(), DDPMVLBScheduler(**change)
    a_step(scheduler, timestep)  # whatever is kept of it
    change_it(scheduler, change)
    assert torch.equal(a_step(scheduler, timestep), a_step(new, timestep))
    mine, its = scheduler.reverse_process(), new.reverse_process()
    for name in ("prediction_type", "variance_type", "clip_sample", "clip_sample_range", "thresholding"):
        assert getattr(mine, name) == getattr(its, name)
    for name in ("betas", "alphas", "alphas_cumprod"):
        assert torch.equal(getattr(scheduler, name), getattr(new, name))
    scheduler.save_pretrained(tmp_path)
    for cls in (DDPMVLBScheduler, DDPMScheduler):
        assert torch.equal(a_step(cls.from_pretrained(tmp_path), timestep), a_step(cls(**change), timestep))
    other = DDPMVLBScheduler.from_config(DDPMScheduler.from_config(scheduler.config).config)
    assert torch.equal(a_step(other, timestep), a_step(new, timestep))


@pytest.mark.parametrize(
    "change", [{"prediction_type": "eps"}, {"clip_sample": 1}, {"beta_end": 2.0}, {"levels": 1}, {"optimal_paths": []}]
)
def test_a_bad_change_changes_nothing(change):
    """A value that the constructor refuses, or that `store_few_steps` sets, leaves all as it was."""
    scheduler = DDPMVLBScheduler()
    before, config = a_step(scheduler, 500), dict(scheduler.config)
    with pytest.raises(ValueError, match=next(iter(change))):
        scheduler.register_to_config(**change)
    assert dict(scheduler.config) == config and torch.equal(a_step(scheduler, 500), before)


def test_chosen_steps_stay_chosen():
    """As in stock; where a shorter chain has them no more, all of its steps are visited."""
    scheduler = DDPMVLBScheduler()
    scheduler.set_timesteps(timesteps=[90, 40, 3], eta=0.5)
    scheduler.register_to_config(clip_sample=False)
    assert scheduler.timesteps.tolist() == [90, 40, 3] and scheduler._walk.process.eta == 0.5
    assert scheduler._walk.process.forward.timesteps.tolist() == [3, 40, 90]
    scheduler.register_to_config(num_train_timesteps=50)
    assert scheduler.timesteps.tolist() == list(range(50))[::-1] and scheduler.num_inference_steps is None


def test_what_is_stored_is_of_its_chain():
    """Paths and variances were found for one network and chain: a change of these is refused, of others it is not."""
    scheduler = DDPMVLBScheduler(num_train_timesteps=20)
    errors = SquaredErrors(torch.tensor([0, 19]), torch.tensor([0.1, 0.5], dtype=torch.float64))
    scheduler.store_few_steps([StoredPath((19, 3))], errors)
    for change in ({"prediction_type": "sample"}, {"beta_end": 0.1}, {"num_train_timesteps": 30}):
        with pytest.raises(ValueError, match=r"found for another chain.*store_few_steps\(\)"):
            scheduler.register_to_config(**change)
    scheduler.register_to_config(clip_sample=False)
    scheduler.set_timesteps(2)
    assert scheduler.timesteps.tolist() == [19, 3] and not scheduler._walk.process.clip_sample


@pytest.mark.parametrize("name", ["betas", "alphas", "alphas_cumprod"])
def test_tables_are_moved_but_not_changed(name):
    """Trainers move `alphas_cumprod`, which works; put another schedule there, which would change nothing: refused."""
    scheduler = DDPMVLBScheduler()
    own = getattr(scheduler, name)
    for moved in (own.clone(), own.double(), own.half()):
        setattr(scheduler, name, moved)
        assert getattr(scheduler, name) is moved
    for other in (own * 0.99, own[:10], own.tolist(), None):
        with pytest.raises(AttributeError, match=f"`{name}` follows from the configuration.*trained_betas"):
            setattr(scheduler, name, other)
    scheduler.variance_type = "fixed_large"  # a value of the configuration, under stock's second name
    assert scheduler.config.variance_type == scheduler.reverse_process().variance_type == "fixed_large"


@pytest.mark.parametrize("again", [copy.deepcopy, lambda own: pickle.loads(pickle.dumps(own))])
def test_copies_follow_their_own_configuration(again):
    """A copy keeps its steps, and a change of one leaves the other."""
    scheduler = DDPMVLBScheduler()
    scheduler.set_timesteps(10)
    other = again(scheduler)
    other.register_to_config(prediction_type="sample")
    assert other.timesteps.tolist() == scheduler.timesteps.tolist()
    assert scheduler.reverse_process().prediction_type == "epsilon"
    assert other.reverse_process().prediction_type == "sample"


NUMPY = {
    "num_train_timesteps": np.int64(20),
    "beta_start": np.float32(1e-3),
    "beta_end": np.float64(0.1),
    "clip_sample": np.bool_(False),
    "clip_sample_range": np.float32(2.0),
    "steps_offset": np.int32(1),
    "levels": np.int64(17),
    "trained_betas": np.linspace(0.01, 0.1, 1000).astype("float32"),
}


@pytest.mark.parametrize("name", NUMPY)
def test_numbers_of_numpy_are_numbers(name, tmp_path):
    """They mean what Python's do, and are saved as those."""
    value = NUMPY[name]
    plain = value.tolist()
    scheduler, expected = DDPMVLBScheduler(**{name: value}), DDPMVLBScheduler(**{name: plain})
    assert scheduler.to_json_string() == expected.to_json_string()
    assert type(scheduler.config[name]) is (tuple if isinstance(plain, list) else type(plain))


MODES = {
    "inference": lambda: torch.inference_mode(),
    "no grad": lambda: torch.no_grad(),
    "default device": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("mode", MODES)
def test_what_is_kept_outlives_the_mode_it_was_made_in(mode):
    """A scheduler made, and steps chosen and made, under a mode of torch: gradients through a later step are there."""
    x = torch.linspace(-1, 1, 16).reshape(1, 1, 4, 4)
    expected = DDPMVLBScheduler(clip_sample=False)
    expected.set_timesteps(10)
    with MODES[mode]():
        scheduler = DDPMVLBScheduler(clip_sample=False)
        scheduler.set_timesteps(10, device="cpu")
        reverse = scheduler.reverse_process()
        scheduler.step(x, 800, x)
        scheduler.add_noise(x, x, torch.tensor([3], device="cpu"))
    results = []
    for own in (scheduler, expected):
        output = x.clone().requires_grad_()
        own.step(output, 0, x).prev_sample.sum().backward()
        results.append(output.grad)
    assert torch.equal(*results) and bool((results[0] != 0).any())
    for table in (scheduler.betas, scheduler.alphas_cumprod, scheduler.one):
        assert table.device.type == "cpu" and not table.is_inference()
    output = x.clone().requires_grad_()
    reverse(output, x, 5).p.mean.sum().backward()
    assert output.grad is not None
    assert torch.equal(scheduler.add_noise(x, x, torch.tensor([3])), expected.add_noise(x, x, torch.tensor([3])))


@pytest.mark.parametrize("images, noises, times", [(1, 1, 3), (3, 3, 1), (1, 3, 3), (3, 1, 1), (3, 3, 0)], ids=str)
@pytest.mark.parametrize("method", ["add_noise", "get_velocity"])
def test_shapes_are_broadcast_as_in_stock(method, images, noises, times):
    """One image to many timesteps, many images to one timestep, also without a dimension of its own."""
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.rand(count, 1, 2, 2, generator=generator) for count in (images, noises))
    t = torch.tensor([1, 500, 999])[:times] if times else torch.tensor(500)
    mine, stock = (getattr(cls(), method)(x, noise, t) for cls in (DDPMVLBScheduler, DDPMScheduler))
    assert mine.shape == stock.shape
    # Stock's sqrt(1 - abar_1), in float32, is wrong by up to 6e-8 / (2 x 0.0145) = 2e-6.
    torch.testing.assert_close(mine, stock, rtol=1e-5, atol=4e-6)


@pytest.mark.parametrize("name", ["betas", "alphas_cumprod"])
def test_a_table_that_is_written_into_is_noticed(name):
    """It would be shown, and nothing else: the next step says so."""
    scheduler = DDPMVLBScheduler()
    getattr(scheduler, name)[5] = 0.5
    with pytest.raises(ValueError, match=f"`{name}` was written into"):
        a_step(scheduler, 500)


def test_assigned_timesteps_are_walked():
    """As in stock, which looks for the next one among them: the chain is that of `set_timesteps(timesteps=...)`."""
    mine, stock, chosen = DDPMVLBScheduler(), DDPMScheduler(), DDPMVLBScheduler()
    for scheduler in (mine, stock):
        scheduler.set_timesteps(100)
        scheduler.timesteps = scheduler.timesteps[::10]
    chosen.set_timesteps(timesteps=mine.timesteps.tolist())
    t = int(mine.timesteps[3])
    assert int(mine.previous_timestep(t)) == int(stock.previous_timestep(t)) == int(mine.timesteps[4])
    x, output = torch.linspace(-2, 2, 64).reshape(1, 1, 8, 8), torch.linspace(1, -1, 64).reshape(1, 1, 8, 8)
    mine, chosen = (own.step(output, t, x, torch.Generator().manual_seed(0)).prev_sample for own in (mine, chosen))
    assert torch.equal(mine, chosen)


def test_timesteps_that_are_written_into_are_refused():
    """They would be shown, and nothing else."""
    scheduler = DDPMVLBScheduler()
    scheduler.set_timesteps(10)
    scheduler.timesteps[3] = 650
    with pytest.raises(ValueError, match=r"`timesteps` was written into.*set_timesteps\(timesteps=steps\)"):
        scheduler.step(torch.zeros(1, 1, 2, 2), 900, torch.zeros(1, 1, 2, 2))


def test_trained_betas_cannot_be_written_into():
    """The configuration holds them as a value, saved as the list that stock saves."""
    scheduler = DDPMVLBScheduler(trained_betas=[0.1, 0.2])
    with pytest.raises(TypeError):
        scheduler.config.trained_betas[-1] = 0.3
    stock = DDPMScheduler.from_config(scheduler.config)
    assert stock.betas.tolist() == scheduler.betas.tolist()
    assert '"trained_betas": [\n    0.1,\n    0.2\n  ]' in scheduler.to_json_string()


def test_a_value_beside_trained_betas_has_no_effect():
    """The betas say all; the same value again is none."""
    scheduler = DDPMVLBScheduler(trained_betas=[0.1, 0.2])
    scheduler.register_to_config(beta_end=0.02)
    with pytest.raises(ValueError, match="`beta_end` has no effect beside `trained_betas`"):
        scheduler.register_to_config(beta_end=0.5)
    scheduler.register_to_config(**dict(scheduler.config) | {"clip_sample": False})
    assert not scheduler.reverse_process().clip_sample


def test_integers_have_no_velocity():
    """uint8 would wrap around."""
    image = torch.ones(1, 1, 2, 2, dtype=torch.uint8)
    with pytest.raises(TypeError, match="floating point"):
        DDPMVLBScheduler().get_velocity(image, image.float(), torch.tensor([3]))
