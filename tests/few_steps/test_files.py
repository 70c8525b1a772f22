"""A checkpoint whose stored steps are replaced: the old ones or the new ones, whenever it is killed."""

import os

import pytest
import torch
from scoring_support import T, stock

from ddpm_vlb import DDPMVLBPipeline, SquaredErrors, StoredPath
from ddpm_vlb.few_steps.files import store_in_place


class Killed(BaseException):
    """In place of a signal that nothing survives."""


@pytest.mark.parametrize("at", range(4))
def test_killed_while_it_is_stored(tmp_path, monkeypatch, at):
    """At every rename in the folder: what loads is whole, the old or the new, and a further run completes it."""
    folder = stock(tmp_path / "model")
    pipeline = DDPMVLBPipeline.from_pretrained(folder)
    old, new = {2: StoredPath((T - 1, 5), "per_pixel", 0.5)}, {2: StoredPath((T - 1, 1), "per_pixel", 0.25)}
    pixels = torch.rand(T, 1, 8, 8) + 0.1
    errors = SquaredErrors(torch.arange(T), pixels.double().mean((1, 2, 3)), pixels)
    changed = SquaredErrors(errors.timesteps, errors.mean * 2, errors.per_pixel * 2)
    pipeline.scheduler.store_few_steps(list(old.values()), errors)
    store_in_place(pipeline, folder)
    assert DDPMVLBPipeline.from_pretrained(folder).scheduler.optimal_paths == old
    pipeline.scheduler.store_few_steps(list(new.values()), changed)
    renames, real = [], os.replace

    def rename(source, target):
        if len(renames) == at:
            raise Killed
        renames.append(target)
        real(source, target)

    monkeypatch.setattr(os, "replace", rename)
    if at < 3:
        with pytest.raises(Killed):
            store_in_place(pipeline, folder)
    else:
        store_in_place(pipeline, folder)
    monkeypatch.undo()
    found = DDPMVLBPipeline.from_pretrained(folder).scheduler
    assert found.optimal_paths == (old if at < 3 else new)
    assert torch.equal(found.errors.per_pixel, (errors if at < 3 else changed).per_pixel)
    store_in_place(pipeline, folder)
    assert DDPMVLBPipeline.from_pretrained(folder).scheduler.optimal_paths == new
    kept = {pipeline.scheduler.config.few_steps_file, pipeline.scheduler.errors_file, "scheduler_config.json"}
    assert {file.name for file in (folder / "scheduler").iterdir()} == kept
