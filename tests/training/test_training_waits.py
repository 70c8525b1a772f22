"""A training step launches its work without a wait for the device, which is a pretended one here."""

import dataclasses
import importlib
from types import SimpleNamespace

import pytest
import torch
from pretend_device import DEVICE, PretendDevice, put, values
from processes import fresh_accelerate  # noqa: F401
from reliability_support import check_same
from torch._dynamo.testing import CompileCounter
from training_support import only_train, tiny

from ddpm_vlb.commands import train
from ddpm_vlb.recipes import train as recipe
from ddpm_vlb.training.average import build_average
from ddpm_vlb.training.loop import Statistics, batches
from ddpm_vlb.training.paths import chain_network

BAD = 2  # the step that is not finite


def noise_of(like, step, rows):
    """The same noise on every device."""
    noise = torch.randn(like.shape, generator=torch.Generator().manual_seed(step * 1000 + rows.start))
    return noise.to(like.device, non_blocking=True)


def terms_of(loss_terms):
    """The recipe's terms, but for the bad step's."""
    return lambda run, *args: loss_terms(run, *args) + (torch.inf if run.progress.step + 1 == BAD else 0.0)


def moved(run, monkeypatch):
    """The run, its network, optimizer and average on the pretend device."""
    optimizers = importlib.import_module("torch.optim.optimizer")
    monkeypatch.setattr(optimizers, "_get_fused_kernels_supported_devices", lambda: [DEVICE.type])
    monkeypatch.setattr(run.accelerator.state, "device", DEVICE)
    tables = {name: value for name, value in vars(run.reverse.forward).items() if isinstance(value, torch.Tensor)}
    on_device = {name: put(value) for name, value in tables.items() if value.dtype != torch.float64}
    forward = dataclasses.replace(run.reverse.forward, **on_device)
    run.reverse, run.of_the_mean = (
        dataclasses.replace(own, forward=forward) for own in (run.reverse, run.of_the_mean)
    )
    run.simple_weights = put(run.simple_weights)
    put(run.unet)
    run.optimizer.param_groups[0]["params"] = list(run.unet.parameters())
    run.ema = build_average(run.args, run.unet, run.accelerator)
    return run


def trained(run, steps):
    """Take steps; returns the skipped ones that the host knows of after each."""
    statistics, source, known = Statistics(run), batches(run), []
    for _ in range(steps):
        recipe.step(run, source, statistics)
        known.append(run.progress.skipped)
    recipe.settle(run, statistics)
    return known


@pytest.mark.parametrize(
    "objective", ["simple", "hybrid", "vlb --class_conditional --label_dropout 0.5", "hybrid --path flow"]
)
def test_a_step_waits_for_nothing(tmp_path, few, monkeypatch, objective):
    """Nor does one that is not finite: the device skips it, the host hears of it one step later; all as on the CPU."""
    monkeypatch.setattr(recipe, "loss_terms", terms_of(recipe.loss_terms))
    runs = []
    monkeypatch.setattr(train, "train_and_finish", lambda run, loop: runs.append(run))
    options = f"--logger none --objective {objective} --lr_warmup_steps 100"
    for name in ("cpu", "device"):
        tiny(tmp_path / name, options, *few)
        runs[-1].noise = SimpleNamespace(draw=noise_of)
    expected, found = runs
    trained(expected, 3)
    with PretendDevice() as device:
        moved(found, monkeypatch)
        known = trained(found, 1)  # the first batch is looked at
        device.waits.clear()
        known += trained(found, 2)
        waits = list(device.waits)
    assert waits == []
    assert known == [0, 0, 1]
    for own, other in [
        (found.unet.parameters(), expected.unet.parameters()),
        (found.ema.shadow_params, expected.ema.shadow_params),
    ]:
        pairs = [(values(a.detach()), b.detach()) for a, b in zip(own, other, strict=True)]
        assert max(float((a - b).norm() / b.norm()) for a, b in pairs) < 1e-5
    assert found.ema.optimization_step == expected.ema.optimization_step == 2


def test_reading_late_changes_nothing(tmp_path, few, monkeypatch):
    """A run that must know of each step at once, for its checkpoint, ends as one that reads one step late."""
    monkeypatch.setattr(recipe, "loss_terms", terms_of(recipe.loss_terms))
    for every in (1, 5):
        only_train(tmp_path / str(every), f"--max_train_steps 5 --checkpointing_steps {every} --logger none", *few)
    check_same(tmp_path / "1" / "checkpoint-5", tmp_path / "5" / "checkpoint-5")


@pytest.mark.slow
@pytest.mark.parametrize(
    "objective", ["simple", "hybrid", "vlb", "vlb --class_conditional --path edm", "hybrid --path flow"]
)
def test_the_loss_is_compiled_with_the_network(tmp_path, few, monkeypatch, objective):
    """Under --compile both are one graph, the same for every step, in a run that has called nothing before."""
    run = only_train(tmp_path, f"--max_train_steps 1 --objective {objective} --logger none", *few)
    counter = CompileCounter()
    monkeypatch.setattr("ddpm_vlb.training.loop._compile", lambda f: torch.compile(f, backend=counter, fullgraph=True))
    images = next(run.data.train.batches(8))
    drawn = recipe.draw(run)
    if run.path is not None:
        run.network = chain_network(run.path, run.unet, run.accelerator.device)
        assert run.network._tables  # which a graph would not keep
    run.args.compile = True
    found = recipe.train_batch(run, images, 0, drawn)
    run.args.compile = False
    torch.testing.assert_close(found, recipe.train_batch(run, images, 0, drawn))
    run.args.compile = True
    run.progress.step += 1
    recipe.train_batch(run, images, 0, recipe.draw(run))
    assert counter.frame_count == 1
