"""A step and its loss, noise and update, what is skipped, and what the tracker is told: the recipe and its parts."""

import math
from types import SimpleNamespace

import pytest
import torch
from processes import fresh_accelerate  # noqa: F401
from training_support import only_train, same_weights, tiny, weights

from ddpm_vlb.commands import train
from ddpm_vlb.recipes import train as recipe
from ddpm_vlb.training.global_batches import GlobalBatches
from ddpm_vlb.training.loop import Shared


def test_every_batch_has_noise_of_its_own(tmp_path, few, monkeypatch):
    """Standard normal, another draw for each step, micro step and process; t is drawn anew as well."""
    drawn = []
    vlb_loss = recipe.vlb_loss

    def record(reverse, model_output, diffused, **options):
        drawn.append(diffused)
        return vlb_loss(reverse, model_output, diffused, **options)

    monkeypatch.setattr(recipe, "vlb_loss", record)
    run = only_train(tmp_path, "--max_train_steps 4 --gradient_accumulation_steps 2 --train_batch_size 32", *few)
    images = next(run.data.train.batches(32))
    run.batches = GlobalBatches(154, 32, 1, 0, 2, 0)
    global_draw = recipe.draw(run)
    for rank in (0, 1):
        run.batches.rank = rank
        recipe.train_batch(run, images, 0, global_draw)
    assert len(drawn) == 10
    noise = torch.stack([diffused.noise.flatten() for diffused in drawn])
    # Independent normal draws correlate by 1/sqrt(n): six of these standard errors are never reached.
    assert (torch.corrcoef(noise) - torch.eye(10)).abs().max() < 6 / noise.shape[1] ** 0.5
    assert abs(noise.mean()) < 5 / noise.numel() ** 0.5
    assert abs(noise.var() - 1) < 5 * (2 / noise.numel()) ** 0.5
    assert len({tuple(diffused.t.tolist()) for diffused in drawn}) == 10


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_step_is_one_update_of_all_its_batches(tmp_path, few, train_batches, accumulation):
    """The learning rate's warm-up and the progress count updates, each made of that many batches."""
    options = "--max_train_steps 5 --learning_rate 1e-3 --lr_scheduler constant_with_warmup --lr_warmup_steps 10"
    run = only_train(tmp_path, options, *few, "--gradient_accumulation_steps", accumulation)
    assert run.progress.step == 5
    expected = [(step, micro_step) for step in range(5) for micro_step in range(accumulation)]
    assert [(step, micro_step) for step, _, micro_step in train_batches] == expected
    assert run.lr_scheduler.get_last_lr() == pytest.approx([5e-4])


@pytest.mark.parametrize("accumulation, steps", [(1, 14), (2, 7)])
def test_epochs(tmp_path, few, train_batches, accumulation, steps):
    """An epoch shows every image once, in an order of its own."""
    options = "--num_epochs 2 --train_batch_size 22 --gradient_accumulation_steps"
    run = only_train(tmp_path, options, accumulation, *few)
    assert run.progress.step == steps and len(train_batches) == 14
    images = [x_0 for _, batch, _ in train_batches for x_0 in batch.flatten(1).tolist()]
    first, second = images[:154], images[154:]
    stored = torch.cat(list(run.data.train.batches(64))).flatten(1).tolist()
    assert sorted(first) == sorted(second) == sorted(stored)
    assert first != second and first != stored


def test_validation_leaves_training_alone(tmp_path, few):
    """Scores and samples on the way change nothing: the same weights come out, bit for bit."""
    for name, steps in (("often", 1), ("never", 100)):
        only_train(tmp_path / name, "--max_train_steps 4 --dropout 0.3 --validation_steps", steps, *few)
    assert same_weights(weights(tmp_path / "often"), weights(tmp_path / "never"))


def test_random_flip_only_mirrors(tmp_path, few):
    """Those images are mirrored left to right that are drawn to be, half of them (to 5 standard errors)."""
    x_0 = torch.randn(6, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    mirrored = torch.tensor([True, False, True, True, False, False])
    flipped = recipe.random_flip(x_0, mirrored)
    assert torch.equal(flipped[mirrored], x_0[mirrored].flip(-1)) and torch.equal(flipped[~mirrored], x_0[~mirrored])
    run = only_train(tmp_path, "--max_train_steps 1 --random_flip --train_batch_size 1000", *few)
    assert abs(recipe.draw(run).mirrored.double().mean() - 0.5) < 5 * 0.5 / 1000**0.5


@pytest.mark.parametrize("weights", [{"simple": 1.0, "vlb": 0.1}, {"vlb": 1.0}, {"simple": 1.0}])
def test_what_the_tracker_is_told(weights):
    """Means under the importance weights, conditional means by quartile of t, and the rates, of all steps since."""
    numbers = torch.Generator().manual_seed(0)
    forward = range(8)
    run = SimpleNamespace(
        term_weights=weights,
        reverse=SimpleNamespace(forward=forward),
        progress=SimpleNamespace(skipped=2, step=0),
    )
    statistics = recipe.Statistics(run)
    t = torch.tensor([[0, 0, 1, 2], [7, 6, 3, 0]])  # none in the third quartile
    draws, values = torch.rand(2, 4, generator=numbers), torch.rand(2, 4, len(weights), generator=numbers).double()
    for i in range(2):
        drawn = recipe.Drawn(t[i], draws[i], t[i] > 9)
        sent = SimpleNamespace(drawn=drawn, step=i + 1, lr=0.5 + i, seconds=2.0, waited=0.5)
        statistics.add(sent, Shared(values[i], 3.0 + i, False))
    told = statistics.take()
    flat, w, v = t.flatten(), draws.flatten().double(), values.reshape(8, -1)
    columns = {f"loss_{name}": v[:, i] for i, name in enumerate(weights)}
    columns["loss"] = sum(weight * columns[f"loss_{name}"] for name, weight in weights.items())
    expected = {name: float((w * column).sum() / 8) for name, column in columns.items()}
    for q, rows in {0: flat <= 1, 1: (flat == 2) | (flat == 3), 3: flat >= 6}.items():
        expected |= {f"{name}_q{q}": float(column[rows].sum() / rows.sum()) for name, column in columns.items()}
    if "vlb" in weights:
        expected["loss_decoder"] = float((w * columns["loss_vlb"])[flat == 0].sum() / 8)
        expected["loss_kl"] = float((w * columns["loss_vlb"])[flat > 0].sum() / 8)
    expected |= {"grad_norm": 4.0, "lr": 1.5, "images_per_second": 2.0, "data_wait_fraction": 0.25, "skipped_steps": 2}
    assert told == pytest.approx(expected)
    assert statistics.values == [] and statistics.seconds == 0


# Steps that are not finite


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, few, capsys):
    """After so many steps in a row, with their t and terms, and without a score."""
    with pytest.raises(SystemExit, match=r"Step 5 is not finite: .* at t=\[\d+.*diverged: 3 in a row.*no checkpoint"):
        tiny(tmp_path, "--max_train_steps 9 --learning_rate 1e20 --lr_warmup_steps 1 --max_skipped_steps 3", *few)
    assert capsys.readouterr().out.count("It is skipped") == 2
    assert not (tmp_path / "metrics.json").exists()


def test_a_loss_that_is_not_finite_is_skipped_with_a_gradient_scaler(tmp_path, few, monkeypatch):
    """Also where the gradient is finite, which alone is what the scaler looks at: weights and average stay."""
    accelerator_of, loss_terms, update = train.make_accelerator, recipe.loss_terms, recipe.update
    moved = []

    def scaled(*args):
        accelerator = accelerator_of(*args)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        # As under fp16, which needs a GPU.
        accelerator.unscale_gradients = lambda: accelerator.scaler.unscale_(accelerator._optimizers[0].optimizer)
        return accelerator

    def broken(run, output, diffused):
        bad = torch.inf if run.progress.step == 2 else 0.0
        return loss_terms(run, output, diffused) + bad

    def watched(run, sent, statistics):
        before = [value.detach().clone() for value in (*run.unet.parameters(), *run.ema.shadow_params)]
        update(run, sent, statistics)
        after = (*run.unet.parameters(), *run.ema.shadow_params)
        assert math.isfinite(sent.read().norm)
        moved.append(any(not torch.equal(a, b) for a, b in zip(before, after)))

    monkeypatch.setattr(train, "make_accelerator", scaled)
    monkeypatch.setattr(recipe, "loss_terms", broken)
    monkeypatch.setattr(recipe, "update", watched)
    run = only_train(tmp_path, "--max_train_steps 5 --lr_scheduler constant", *few)
    assert moved == [True, True, False, True, True] and run.progress.skipped == 1


def test_a_term_of_one_s_own(tmp_path, few, monkeypatch):
    """What a copied recipe may add: it is trained on, logged, and named where it is not finite."""
    loss_terms, loop, logged = recipe.loss_terms, recipe.train, []

    def with_mine(run, output, diffused):
        mine = output.square().flatten(1).mean(1)
        mine = torch.where(torch.tensor(run.progress.step == 1), torch.inf, mine)
        return torch.cat([loss_terms(run, output, diffused), mine[:, None]], dim=1)

    def train_with_mine(run, validate):
        run.term_weights["mine"] = 0.5
        run.accelerator.log = lambda numbers, step: logged.append(numbers)
        return loop(run, validate)

    monkeypatch.setattr(recipe, "loss_terms", with_mine)
    monkeypatch.setattr(recipe, "train", train_with_mine)
    said = []
    monkeypatch.setattr("ddpm_vlb.training.loop.tqdm.write", said.append)
    run = only_train(tmp_path, "--max_train_steps 4", *few)
    assert run.progress.skipped == 1 and "Step 2 is not finite: L_mine at t=" in said[0]
    numbers = logged[-1]
    assert numbers["loss_mine"] > 0 and numbers["loss"] == pytest.approx(
        numbers["loss_vlb"] + 0.5 * numbers["loss_mine"]
    )
