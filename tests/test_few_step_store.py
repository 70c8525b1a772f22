"""The files with what is stored for few steps, beside a configuration that names them; older ones, and damage."""

import json
import logging

import pytest
import torch
from diffusers import DDPMScheduler

from ddpm_vlb import DDPMVLBScheduler, SquaredErrors, StoredPath

T = 20
PATHS = [StoredPath((19, 8, 2), "network", 0.7), StoredPath((19, 12, 6, 1, 0), "per_pixel", -0.2)]


def scheduler(**options) -> DDPMVLBScheduler:
    """A scheduler of a short chain."""
    return DDPMVLBScheduler(T, 0.01, 0.3, variance_type="learned_range", **options)


def stored() -> DDPMVLBScheduler:
    """One with paths and errors."""
    own, pixels = scheduler(), torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)) + 0.1
    own.store_few_steps(PATHS, SquaredErrors(torch.tensor([0, 19]), pixels.double().mean((1, 2, 3)), pixels))
    return own


def old_file(folder) -> DDPMVLBScheduler:
    """A folder as it was saved when paths and errors stood in the configuration itself."""
    own = stored()
    own.save_pretrained(folder)
    config = json.loads((folder / "scheduler_config.json").read_text())
    name = config.pop("few_steps_file")
    config |= json.loads((folder / name).read_text())
    (folder / name).unlink()
    (folder / "scheduler_config.json").write_text(json.dumps(config))
    return own


def test_an_older_file_still_loads(tmp_path):
    """With its entries in the configuration; saved again, it has the new form, and is the same."""
    own = old_file(tmp_path / "old")
    for folder in (tmp_path / "old", tmp_path / "new"):
        loaded = DDPMVLBScheduler.from_pretrained(folder)
        assert loaded.optimal_paths == own.optimal_paths
        assert loaded.config.few_steps_file == own.config.few_steps_file
        assert torch.equal(loaded.errors.per_pixel, own.errors.per_pixel)
        loaded.save_pretrained(tmp_path / "new")
    assert not {"optimal_paths", "x_0_mse"} & set(json.loads((tmp_path / "new/scheduler_config.json").read_text()))


def test_stock_reads_it_almost_without_a_word(tmp_path, caplog):
    """What stock does not know is a name, not a hundred numbers."""
    stored().save_pretrained(tmp_path)
    logging.getLogger("diffusers").propagate = True
    with caplog.at_level(logging.WARNING):
        DDPMScheduler.from_pretrained(tmp_path)
    said = {record.getMessage() for record in caplog.records}
    assert len(said) == 1 and "few_steps_file" in min(said) and len(min(said)) < 300


def test_what_lies_in_a_file_is_unknown_without_it(tmp_path):
    """From a configuration alone, stock's too, paths are not taken for absent: a call for K steps must say which."""
    stored().save_pretrained(tmp_path)
    alone = DDPMVLBScheduler.from_config(DDPMScheduler.from_pretrained(tmp_path).config)
    for options in ({}, {"timestep_spacing": "optimal"}):
        with pytest.raises(ValueError, match=r"unknown here: they lie in few_steps-\w+\.json.*from_pretrained"):
            alone.set_timesteps(3, **options)
    alone.set_timesteps(3, timestep_spacing="leading")
    alone.set_timesteps(T)  # all of them are no stored path
    alone.set_timesteps(timesteps=[19, 8, 2])
    spaced = DDPMVLBScheduler.from_config(alone.config, timestep_spacing="trailing")
    spaced.set_timesteps(3)  # as usual in diffusers: these are the steps that are meant
    alone.store_few_steps(PATHS[:1])  # new ones in place of the unknown
    alone.set_timesteps(3)
    assert alone.timesteps.tolist() == [19, 8, 2]


@pytest.mark.parametrize("damage", ["missing", "other", "cut", "keys", "large"])
def test_a_file_of_paths_that_does_not_fit(damage, tmp_path, caplog):
    """Missing it is said and its paths are unknown; damaged, or another under its name, it is refused."""
    own = stored()
    own.save_pretrained(tmp_path)
    file = tmp_path / own.config.few_steps_file
    content = file.read_text()
    damaged = {"other": content.replace("0.7", "0.8"), "cut": content[:-9], "keys": "{}", "large": " " * 8_000_001}
    if damage == "missing":
        file.unlink()
        logging.getLogger("diffusers").propagate = True
        loaded = DDPMVLBScheduler.from_pretrained(tmp_path)
        assert f"{file.name} is missing" in caplog.text
        with pytest.raises(ValueError, match="unknown here"):
            loaded.set_timesteps(3)
        return
    file.write_text(damaged[damage])
    with pytest.raises(ValueError, match="its name is not that of its content|must be JSON|at most 8000000 bytes"):
        DDPMVLBScheduler.from_pretrained(tmp_path)


def test_stored_paths_are_not_taken_to_another_chain(tmp_path):
    """Values in place of the saved ones, of what the paths were found for; others may be given."""
    stored().save_pretrained(tmp_path)
    for other in ({"prediction_type": "sample"}, {"beta_end": 0.1}):
        with pytest.raises(ValueError, match="were found for the saved chain"):
            DDPMVLBScheduler.from_pretrained(tmp_path, **other)
    assert DDPMVLBScheduler.from_pretrained(tmp_path, clip_sample=False).optimal_paths


@pytest.mark.parametrize("name", ["../../few_steps-0123456789ab.json", "few_steps.json", 3])
def test_a_configuration_names_no_other_file(name):
    """The name becomes a path: it is one of ours or refused."""
    with pytest.raises(ValueError, match=r"`few_steps_file` must be named few_steps-\*.json"):
        scheduler(few_steps_file=name)
