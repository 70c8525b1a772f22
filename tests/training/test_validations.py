"""What a run makes of its validations: the best network is kept, and it ends where they are surely worse."""

from dataclasses import replace

import pytest
import torch
from analytic import PosteriorMean, images, process
from training_support import checkpoint_weights, same_weights, tiny, until_training, weights

from ddpm_vlb.training import scores as training_scores
from ddpm_vlb.training.validations import Validations

OFFSETS = {2: 0.0, 4: -5.0, 6: 50.0, 8: 60.0, 10: 55.0}  # nats, beside which few steps of training are nothing


class Split:
    """Images as a split holds them."""

    def __len__(self):
        return 70

    def __getitems__(self, positions):
        return list(images(70)[positions])


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

    monkeypatch.setattr(training_scores.Scoring, "sweep", sweep)
    monkeypatch.setattr("ddpm_vlb.commands.train.sample", lambda *args: torch.zeros(1, 1, 8, 8))
    options = "--max_train_steps 20 --validation_steps 2 --checkpointing_steps 2 --validation_calls 4 --no-use_ema"
    options += " --patience 2 --keep_best --num_test_images 0 --eval_batch_size 1 --ddpm_num_inference_steps 1"
    for resumed in ("", "--resume_from_checkpoint checkpoint-6", "--resume_from_checkpoint latest"):
        metrics = tiny(tmp_path, f"{options} {resumed}", *few)
        assert metrics["train"]["steps"] == 8 and metrics["train"]["kept_step"] == 4
        assert same_weights(weights(tmp_path), checkpoint_weights(tmp_path, 4))
        said = capsys.readouterr().out
        assert "--patience 2: so many validations" in said and "the network of step 4 is kept" in said


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
