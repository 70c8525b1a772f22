"""What a run makes of its validations: the best network is kept, and it ends where they are surely worse."""

from dataclasses import replace

import pytest
import torch
from analytic import PosteriorMean, images, process
from training_support import checkpoint_weights, same_weights, tiny, until_training, weights

from ddpm_vlb.recipes import train as recipe
from ddpm_vlb.training import scores as training_scores
from ddpm_vlb.training.validations import Validations, spread

OFFSETS = {2: 0.0, 4: -5.0, 6: 50.0, 8: 60.0, 10: 55.0}  # nats, beside which few steps of training are nothing


class Split:
    """Images as a split holds them."""

    def __init__(self, count=70):
        self.count = count

    def __len__(self):
        return self.count

    def __getitems__(self, positions):
        return list(images(self.count)[positions])


def validated(*factors, keep_best=False, patience=None) -> Validations:
    """Of networks that are wrong by these factors, at steps 1, 2, ..."""
    made = Validations(Split(), process(), 8, 0, keep_best, patience)
    for step, factor in enumerate(factors, 1):
        network = torch.nn.Linear(1, 1)
        torch.nn.init.constant_(network.weight, factor)
        made.add(made.so_far.score(PosteriorMean(process().forward, factor)), step, network)
    return made


@pytest.mark.parametrize(
    "factors, in_a_row",
    [((), 0), ((0.5,), 0), ((0.9, 0.5), 1), ((0.9, 0.5, 0.6), 2), ((0.9, 0.5, 0.9, 0.6), 1), ((0.5, 0.6, 0.9), 0)],
)
def test_patience_counts_what_is_surely_worse(factors, in_a_row):
    """The last validations that are told from the best; one that is not begins the count anew."""
    made = validated(*factors)
    assert len(made.so_far) == 64
    for made.patience in (None, 1, 2, 3):
        assert made.exhausted() == (made.patience is not None and in_a_row >= made.patience)


def test_equal_networks_seldom_end_a_run():
    """40 validations of equals on 64 images, 100 times over: by the first that looks worse, some 5 % of the runs.

    Twice the standard error would end nearly all, and 30 % with a patience of 3, whose ends are among those of 1: the
    best of many is a lucky one. Three binomial errors are 6.5 %.
    """
    made, generator = validated(0.5, patience=1), torch.Generator().manual_seed(0)
    own, stops = made.so_far.history[1], 0
    for _ in range(100):
        made.so_far.history = history = {}
        for step, rows in enumerate(torch.randn(40, 64, generator=generator, dtype=torch.float64)):
            history[step] = replace(own, per_image=rows, bits_per_dim=float(rows.mean()))
            if made.exhausted():
                stops += 1
                break
    assert 0 < stops <= 11


@pytest.mark.parametrize("count", [8, 64])
def test_an_overfit_ends_a_run(count):
    """One that adds half a paired standard error a validation, after 20: in 15 of 15 runs, before it adds 20."""
    made, generator = validated(0.5, patience=3), torch.Generator().manual_seed(0)
    own, ends = made.so_far.history[1], []
    for _ in range(15):
        made.so_far.history = history = {}
        for step, rows in enumerate(torch.randn(60, count, generator=generator, dtype=torch.float64)):
            rows = rows + abs(step - 20) * 0.5 * (2 / count) ** 0.5
            history[step] = replace(own, per_image=rows, bits_per_dim=float(rows.mean()))
            if made.exhausted():
                ends.append(step)
                break
    assert len(ends) == 15 and min(ends) > 22


@pytest.mark.parametrize("order", ["sorted", "in turn"])
def test_the_images_are_spread_over_the_split(order):
    """Whichever way 10 classes lie in 640 images: of each as many as by chance, 2 to 14 of 64 within 3.3 errors."""
    positions = torch.tensor(spread(640, 64))
    classes = positions // 64 if order == "sorted" else positions % 10
    counts = classes.bincount(minlength=10).tolist()
    assert sum(counts) == len(positions.unique()) == 64 and 2 <= min(counts) <= max(counts) <= 14


def test_the_images_of_a_validation_are_those():
    """In the order of the split, the same each time."""
    made = Validations(Split(200), process(), 8, 0, False)
    assert made.positions == sorted(made.positions) == spread(200, 64) and spread(5, 64) == list(range(5))
    assert torch.equal(made.so_far.images, images(200)[made.positions])


@pytest.mark.parametrize(
    "count, options, said",
    [
        (7, {"patience": 3}, "--patience needs at least 8 validation images .* has 7"),
        (1, {"calls_per_image": 4}, "--validation_calls 4 is too few .* 1 image"),
    ],
    ids=["patience", "calls"],
)
def test_too_few_images_are_refused(count, options, said):
    """In one line, by the options' own names."""
    with pytest.raises(ValueError, match=f"^{said}") as refusal:
        Validations(Split(count), process(), **{"calls_per_image": 8, "seed": 0, "keep_best": False, **options})
    assert "\n" not in str(refusal.value) and "calls_per_image" not in str(refusal.value)


def test_a_validation_is_told_beside_the_best_before_it():
    """In words and numbers: the paired difference; the first has none beside it."""
    made = validated(0.5, 0.9, 0.7, 0.95)
    history = made.so_far.history
    assert made.beside_the_best(1) == ("", {})
    for step, best in ((2, 1), (3, 2), (4, 2)):
        said, numbers = made.beside_the_best(step)
        gap = history[step] - history[best]
        assert said == f"; less the best before it, of step {best}: {gap}"
        assert numbers == {"validation_less_best": gap.bits_per_dim, "validation_less_best_se": gap.se}


def test_the_best_weights_are_kept():
    """With the state, and only where they are asked for."""
    made = validated(0.5, 0.9, 0.7, keep_best=True)
    assert made.best_weights["weight"] == pytest.approx(0.9) and validated(0.5).best_weights == {}
    again = Validations(Split(), process(), 8, 0, True)
    again.load_state_dict(made.state_dict())
    assert again.so_far.best == 2 and torch.equal(again.best_weights["weight"], made.best_weights["weight"])


def test_a_run_keeps_the_best_and_ends_early(tmp_path, few, monkeypatch, capsys):
    """After two validations that are surely worse; resumed, it decides the same, and once more when it has ended."""
    own = training_scores.Scoring.sweep

    def sweep(self, *args, **options):
        offset = OFFSETS[self.run.progress.step]
        return tuple(replace(part, kl=part.kl + offset) for part in own(self, *args, **options))

    snapshots = []

    def sample(run, *args):
        snapshots.append(run.record()["train"])
        return torch.zeros(1, 1, 8, 8)

    monkeypatch.setattr(training_scores.Scoring, "sweep", sweep)
    monkeypatch.setattr("ddpm_vlb.commands.train.sample", sample)
    options = "--max_train_steps 20 --validation_steps 2 --checkpointing_steps 2 --validation_calls 4 --no-use_ema"
    options += " --patience 2 --keep_best --num_test_images 0 --eval_batch_size 1 --ddpm_num_inference_steps 1"
    for resumed in ("", "--resume_from_checkpoint checkpoint-6", "--resume_from_checkpoint latest"):
        metrics = tiny(tmp_path, f"{options} {resumed}", *few)
        assert metrics["train"]["steps"] == 8 and metrics["train"]["kept_step"] == 4
        assert same_weights(weights(tmp_path), checkpoint_weights(tmp_path, 4))
        said = capsys.readouterr().out
        assert "--patience 2: so many validations" in said and "the network of step 4 is kept" in said
    assert snapshots and not any("kept_step" in own for own in snapshots)  # whose networks are those of their steps


def test_the_average_of_the_best_is_kept(tmp_path, few, monkeypatch):
    """With EMA, and where a step was skipped: the very network that was validated."""
    validated_networks, own, add = {}, training_scores.Scoring.sweep, Validations.add

    def sweep(self, *args, **options):
        offset = OFFSETS[self.run.progress.step]
        return tuple(replace(part, kl=part.kl + offset) for part in own(self, *args, **options))

    def kept(self, scores, step, network):
        validated_networks[step] = {name: value.clone() for name, value in network.state_dict().items()}
        return add(self, scores, step, network)

    def loss_terms(run, output, diffused, made=recipe.loss_terms):
        return made(run, output, diffused) * (float("nan") if run.progress.step == 3 else 1)  # of the fourth step

    monkeypatch.setattr(training_scores.Scoring, "sweep", sweep)
    monkeypatch.setattr(Validations, "add", kept)
    monkeypatch.setattr(recipe, "loss_terms", loss_terms)
    monkeypatch.setattr("ddpm_vlb.commands.train.sample", lambda *args: torch.zeros(1, 1, 8, 8))
    options = "--max_train_steps 6 --validation_steps 2 --validation_calls 4 --keep_best --num_test_images 0"
    metrics = tiny(tmp_path, f"{options} --ema_power 0.1", *few)["train"]
    assert (metrics["kept_step"], metrics["skipped_steps"], list(validated_networks)) == (4, 1, [2, 4, 6])
    assert same_weights(weights(tmp_path), validated_networks[4])
    assert not same_weights(validated_networks[4], validated_networks[6])


def test_the_last_network_competes(tmp_path, few, monkeypatch):
    """It is validated for that, and kept where it is the best."""
    monkeypatch.setattr("ddpm_vlb.commands.train.sample", lambda *args: torch.zeros(1, 1, 8, 8))
    options = "--max_train_steps 3 --validation_steps 1 --validation_calls 4 --keep_best --num_test_images 0"
    metrics = tiny(tmp_path, f"{options} --no-use_ema --lr_scheduler constant --lr_warmup_steps 0", *few)
    assert metrics["train"]["kept_step"] == metrics["train"]["steps"] == 3
    assert same_weights(weights(tmp_path), checkpoint_weights(tmp_path, 3))


@pytest.mark.parametrize("option", ["--validation_calls 6", "--keep_best"])
def test_what_validations_share_is_fixed(few_base, few, option):
    """A run goes on with what its validations can be compared by."""
    with pytest.raises(SystemExit, match=option.split()[0]):
        until_training(few_base[0], f"--max_train_steps 3 {option} --resume_from_checkpoint latest", *few)
