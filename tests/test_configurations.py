"""The scheduler's configuration: saved, taken from and given to other classes, with what defines the chain."""

import copy
import inspect
import json
import pickle
import warnings

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.utils import DummyObject
from float64_steps import randn, seeded

from ddpm_vlb import DDPMVLBScheduler

# Stock's numpy round trips, none of our business.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
STOCK_SCHEDULERS = (
    DDPMScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    DEISMultistepScheduler,
    PNDMScheduler,
    LCMScheduler,
)


CONFIGS = {
    "default": {},
    "cosine": {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 123},
    "trained": {"trained_betas": [0.1, 0.2, 1 / 3], "num_train_timesteps": 3},
    "learned": {"variance_type": "learned", "clip_sample": False, "timestep_spacing": "trailing"},
    "learned_range": {"variance_type": "learned_range", "prediction_type": "v_prediction", "beta_end": 0.03},
    "levels": {"levels": 17},
    "continuous": {"levels": None},
    "zero_snr": {"rescale_betas_zero_snr": True, "prediction_type": "sample"},
    "threshold": {"thresholding": True, "sample_max_value": 2.0, "dynamic_thresholding_ratio": 0.99},
    "offset": {"steps_offset": 1, "variance_type": "fixed_large"},
}


def plain(config) -> dict:
    """As a file has it."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in config.items() if not k.startswith("_")}


@pytest.mark.parametrize("name", CONFIGS)
def test_save_and_load_is_the_identity(name, tmp_path, diffusers_log):
    """A saved and loaded scheduler has the same config and bit-equal tables, and loading is silent."""
    ours = DDPMVLBScheduler(**CONFIGS[name])
    ours.save_pretrained(tmp_path)
    loaded = DDPMVLBScheduler.from_pretrained(tmp_path)
    assert plain(loaded.config) == plain(ours.config)
    assert torch.equal(loaded.betas, ours.betas) and torch.equal(loaded.alphas_cumprod, ours.alphas_cumprod)
    own, other = ours.reverse_process(dtype=torch.float64), loaded.reverse_process(dtype=torch.float64)
    assert torch.equal(own.forward.betas, other.forward.betas) and own.levels == other.levels
    assert not diffusers_log


@pytest.mark.parametrize(
    "config",
    [
        *({"num_train_timesteps": total} for total in (1, 5, 100)),
        *({"beta_start": start, "beta_end": 20 * start} for start in (0.0001, 0.01)),
        *({"beta_schedule": name} for name in ("squaredcos_cap_v2", "scaled_linear", "sigmoid")),
        *({"variance_type": name} for name in ("fixed_small_log", "fixed_large", "learned", "learned_range")),
        *({"prediction_type": name, "clip_sample": False} for name in ("epsilon", "sample", "v_prediction")),
        *({"thresholding": True, "sample_max_value": value} for value in (1.0, 2.0)),
        {"trained_betas": np.array([0.1, 0.3])},
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    ],
    ids=str,
)
def test_loaded_scheduler_steps_the_same(config, tmp_path):
    """A scheduler from save_config's file steps bit for bit as the saved one, on its whole and on a shorter chain."""
    ours = DDPMVLBScheduler(**config)
    ours.save_config(tmp_path)
    loaded = DDPMVLBScheduler.from_pretrained(tmp_path)
    channels = 4 if ours.config.variance_type.startswith("learned") else 2
    sample, output = randn(0), randn(1, (3, channels, 4, 5))
    for num in (None, min(len(ours), 50)):
        if num is not None:
            ours.set_timesteps(num)
            loaded.set_timesteps(num)
        for t in {0, len(ours.timesteps) // 2, len(ours.timesteps) - 1}:
            own, other = (
                scheduler.step(output, scheduler.timesteps[t], sample, generator=seeded(t)).to_tuple()
                for scheduler in (ours, loaded)
            )
            assert all(torch.equal(a, b) for a, b in zip(own, other, strict=True))


def test_loaded_config_is_the_whole_config(tmp_path):
    """A loaded scheduler left nothing at its default: its config is the saved one without diffusers' list of those."""
    ours = DDPMVLBScheduler()
    ours.save_pretrained(tmp_path)
    saved = dict(ours.config)
    assert saved.pop("_use_default_values")
    assert dict(DDPMVLBScheduler.from_pretrained(tmp_path).config) == saved


def test_config_comes_back_from_every_compatible():
    """Each compatible class takes our config, and gives it back whole: nothing lost, nothing of ours changed."""
    ours = DDPMVLBScheduler(variance_type="fixed_small", beta_schedule="linear", num_train_timesteps=100)
    classes = [c for c in ours.compatibles if not isinstance(c, DummyObject)]
    assert len(classes) > 10
    for scheduler in classes:
        back = DDPMVLBScheduler.from_config(scheduler.from_config(ours.config).config)
        assert {k: v for k, v in back.config.items() if k in ours.config} == dict(ours.config), scheduler
        init = inspect.signature(DDPMVLBScheduler.__init__).parameters
        assert not (set(back.config) - set(ours.config)) & set(init), scheduler


def test_attributes(diffusers_log):
    """Own attributes and methods are got without a word, config values with diffusers' FutureWarning, others not."""
    ours = DDPMVLBScheduler()
    ours.something = 5
    ours.register_to_config(other=6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ours.something == 5 and ours.save_pretrained == ours.save_pretrained and ours.config.other == 6
    with pytest.warns(FutureWarning, match="other"):
        assert ours.other == 6
    with pytest.raises(AttributeError, match="^'DDPMVLBScheduler' object has no attribute 'does_not_exist'$"):
        _ = ours.does_not_exist
    assert not diffusers_log
    # diffusers wants `**kwargs` where, and only where, there are deprecated ones.
    assert ours._deprecated_kwargs == [] and "kwargs" not in inspect.signature(DDPMVLBScheduler.__init__).parameters


@pytest.mark.parametrize("levels", [17, 2, None])
def test_levels_are_written_only_where_they_differ(levels, tmp_path):
    """The JSON of a plain config has stock's keys only; other levels are written and read back."""
    plain_keys = set(json.loads(DDPMVLBScheduler().to_json_string()))
    assert plain_keys == set(json.loads(DDPMScheduler().to_json_string()))
    assert "levels" not in json.loads(DDPMVLBScheduler(levels=256).to_json_string())
    DDPMVLBScheduler(levels=levels).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert written["levels"] == levels and set(written) == plain_keys | {"levels"}
    assert DDPMVLBScheduler.from_pretrained(tmp_path).reverse_process().levels == levels


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ("levels", "continuous")])
@pytest.mark.parametrize("how", ["from_pretrained", "from_config"])
def test_plain_config_loads_in_stock_without_a_word(how, name, tmp_path, diffusers_log):
    """Stock made from our files or our config warns of nothing and has the same values."""
    ours = DDPMVLBScheduler(**CONFIGS[name])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if how == "from_pretrained":
            ours.save_pretrained(tmp_path)
            stock = DDPMScheduler.from_pretrained(tmp_path)
        else:
            stock = DDPMScheduler.from_config(ours.config)
    assert not diffusers_log
    keys = set(plain(DDPMScheduler().config))
    assert {k: v for k, v in plain(stock.config).items() if k in keys} == {
        k: v for k, v in plain(ours.config).items() if k in keys
    }


def test_explicit_default_levels_are_a_plain_config(diffusers_log):
    """`levels=256` written out is the default: stock made from that config warns of nothing either."""
    DDPMScheduler.from_config(DDPMVLBScheduler(levels=256).config)
    assert not diffusers_log


def test_other_levels_are_announced_by_stock(diffusers_log):
    """Stock says that it does not know levels other than the default; so the silence above means something."""
    DDPMScheduler.from_config(DDPMVLBScheduler(levels=17).config)
    assert len(diffusers_log) == 1 and "levels" in diffusers_log[0]


def test_levels_survive_stock(tmp_path):
    """Levels that stock does not know come back from a config that went through it, in memory and on disk."""
    stock = DDPMScheduler.from_config(DDPMVLBScheduler(levels=17).config)
    assert DDPMVLBScheduler.from_config(stock.config).config.levels == 17
    stock.save_pretrained(tmp_path)
    assert DDPMVLBScheduler.from_pretrained(tmp_path).config.levels == 17


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"variance_type": "learned_range", "beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": [0.1, 0.2, 0.3], "num_train_timesteps": 3, "clip_sample_range": 2.0},
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        {"variance_type": "fixed_large", "num_train_timesteps": 77, "thresholding": True, "steps_offset": 1},
    ],
)
def test_from_stock_s_config(config, diffusers_log):
    """Ours made from a stock scheduler's config has every value of it."""
    stock = DDPMScheduler(**config)
    ours = DDPMVLBScheduler.from_config(stock.config)
    assert {k: plain(ours.config)[k] for k in plain(stock.config)} == plain(stock.config)
    assert len(ours) == len(stock) and not diffusers_log
    assert torch.equal(ours.betas, DDPMVLBScheduler(**config).betas)


@pytest.mark.parametrize("scheduler", STOCK_SCHEDULERS)
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"num_train_timesteps": 1000, "beta_start": 0.0001, "prediction_type": "epsilon"},
        {"num_train_timesteps": 200, "beta_schedule": "scaled_linear", "prediction_type": "v_prediction"},
        {"trained_betas": [0.1, 0.2, 0.3, 0.35], "num_train_timesteps": 4, "variance_type": "learned_range"},
        {"beta_start": 0.001, "beta_end": 0.03, "prediction_type": "sample", "variance_type": "fixed_large"},
    ],
)
def test_model_defining_values_survive_a_change_of_class(scheduler, config):
    """Every stock class made from our config keeps what the network was trained with, defaults of ours included.

    Stock drops the values that were left at their defaults, and other classes have other defaults (LCM and Heun start
    at 0.00085): their samples would come from another schedule.
    """
    ours = DDPMVLBScheduler(**config)
    other = scheduler.from_config(ours.config)
    for key in ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type", "variance_type"):
        assert other.config[key] == ours.config[key], key
    assert (other.config.trained_betas is None) == (ours.config.trained_betas is None)
    torch.testing.assert_close(other.betas, ours.betas, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(other.alphas_cumprod, ours.alphas_cumprod, rtol=2e-4, atol=1e-8)
    back = DDPMVLBScheduler.from_config(other.config)
    for key in ("num_train_timesteps", "beta_schedule", "prediction_type", "variance_type"):
        assert back.config[key] == ours.config[key], key


def test_trained_betas_set_the_length():
    """The number of trained betas is T whatever `num_train_timesteps` says, in the config too."""
    ours = DDPMVLBScheduler(trained_betas=np.array([0.1, 0.2, 0.3]))
    assert len(ours) == ours.config.num_train_timesteps == 3 and ours.timesteps.tolist() == [2, 1, 0]
    assert json.loads(ours.to_json_string())["trained_betas"] == [0.1, 0.2, 0.3]
    stock = DDPMScheduler.from_config(ours.config)
    assert len(stock) == 3 and stock.timesteps.tolist() == [2, 1, 0]


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_are_independent_and_equal(clone):
    """A deep copy or pickle steps as the original does, and keeps its chain when the original changes it."""
    ours = DDPMVLBScheduler(num_train_timesteps=50, variance_type="learned_range")
    ours.set_timesteps(7)
    sample, output = randn(0), randn(1, (3, 4, 4, 5))
    t = ours.timesteps[:3].clone()
    expected = ours.step(output, t, sample, generator=seeded(0)).prev_sample
    twin = clone(ours)
    ours.set_timesteps(5)
    assert plain(twin.config) == plain(ours.config) and len(twin.timesteps) == 7
    assert torch.equal(twin.step(output, t, sample, generator=seeded(0)).prev_sample, expected)
    assert torch.equal(twin.betas, ours.betas)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prediction_type": "eps"}, "prediction_type.*epsilon"),
        ({"beta_schedule": "cosine"}, "beta_schedule.*squaredcos_cap_v2"),
        ({"timestep_spacing": "uniform"}, "timestep_spacing.*trailing"),
        ({"num_train_timesteps": 0}, "num_train_timesteps"),
        ({"beta_start": -1.0}, "beta_start"),
        ({"beta_end": 2}, "beta_end"),
        ({"trained_betas": [0.1, 2.0]}, r"betas\[1\]"),
        ({"levels": 1}, "levels"),
        ({"levels": 2.5}, "levels"),
        ({"clip_sample_range": 0.0}, "clip_sample_range"),
        ({"thresholding": True, "dynamic_thresholding_ratio": 1.5}, "dynamic_thresholding_ratio"),
        ({"thresholding": True, "sample_max_value": 0.0}, "sample_max_value"),
    ],
)
def test_impossible_configurations_are_refused(arguments, message):
    """Unknown names are answered with the choices, impossible numbers by their name, when the scheduler is made."""
    with pytest.raises(ValueError, match=message):
        DDPMVLBScheduler(**arguments)


def test_scheduler_is_not_part_of_diffusers():
    """diffusers has no class of our name, on which the promise about configs between classes rests."""
    assert not hasattr(diffusers, "DDPMVLBScheduler")
