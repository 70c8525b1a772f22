"""The score at the end of a training run: bounded, told beforehand, kept when it is stopped, or left out."""

import functools
import re

import pytest
from training_support import only_train, tiny

from ddpm_vlb import DDPMVLBPipeline, GaussianPath, model_card
from ddpm_vlb.scoring.sweep import run_sweep
from ddpm_vlb.training import scores


@pytest.mark.parametrize(
    "total, asked, calls, count, last",
    [
        (297, None, 20, 297, 296),  # within the bound, all of the digits
        (10_000, None, 20, 819, 9997),  # as many as 16384 calls allow, from the whole split
        (10_000, 5000, 20, 5000, 4999),  # what is asked for, whatever it costs
        (297, 5000, 20, 297, 296),
        (10_000, None, 100_000, 2, 6044),
        (297, 0, 20, 0, None),
    ],
)
def test_how_many_images_are_scored(total, asked, calls, count, last):
    """Different ones in the order of the split."""
    positions = scores.to_score(total, asked, calls)
    assert len(positions) == count == len(set(positions)) and positions == sorted(positions)
    assert positions[-1:] == ([] if last is None else [last])


def test_what_was_scored_is_kept(tmp_path, capsys, monkeypatch):
    """A run that is stopped while it scores goes on from the images that it has, to the same number."""
    options = "--max_train_steps 1 --num_test_images 297 --checkpointing_steps 0"
    whole = tiny(tmp_path / "whole", options)
    answers = iter([False, *[True] * 9])  # asked before each group of images
    stopping = functools.partial(next, answers)
    monkeypatch.setattr(scores, "run_sweep", lambda *args: run_sweep(*args[:-1], stopping))
    assert tiny(tmp_path / "stopped", options) is None
    monkeypatch.undo()
    capsys.readouterr()
    again = tiny(tmp_path / "stopped", f"{options} --resume_from_checkpoint latest")
    assert re.search(r"[1-9]\d* of 297 images are already scored", capsys.readouterr().out)
    assert again["test"] == whole["test"]
    assert not list((tmp_path / "stopped").glob("scores-*"))


def test_the_cost_is_told_before(tmp_path, capsys):
    """How many images, calls and seconds, in the lines before the score."""
    tiny(tmp_path, "--max_train_steps 1")
    said = capsys.readouterr().out
    lines = r"Scoring 8 of 297 test images with 8 network calls each, after a pilot of some 1000: "
    lines += r"about \d+ s; --num_test_images scores fewer, 0 none\."
    assert re.search(lines, said)
    assert said.index("Scoring 8") < said.index("Test bits/dim")


def final(folder, **options):
    """The `FinalScores` of a run that has not been trained, over 8 images."""
    run = only_train(folder, "--max_train_steps 1")
    for name, value in options.items():
        setattr(run.args, name, value)
    return scores.FinalScores(run, run.averaged_network(), range(8))


@pytest.mark.parametrize(
    "share, given, most, calls",
    [(0.0, None, 2**14, 100), (1e9, None, 2**14, 20), (0.0, 12, 2**14, 12), (0.0, None, 8 * 25, 24)],
    ids=["hidden", "seen", "given", "bounded"],
)
def test_noise_that_hides_the_images_is_worth_more_calls(tmp_path, monkeypatch, share, given, most, calls):
    """A second sweep where the noise error is above its share of the image error, but not of calls that are given."""
    monkeypatch.setattr(scores, "MOST_CALLS", most)
    monkeypatch.setattr(scores, "ENOUGH", share)
    assert final(tmp_path, calls_per_image=given).estimate().network_calls_per_image == calls


def test_other_calls_leave_the_parts_of_this_network(tmp_path):
    """What was scored of the same weights with other options stays until the end; another network's parts go."""
    first = final(tmp_path, calls_per_image=8)
    first.store.save_pilot(first.scoring.pilot())
    (tmp_path / "scores-00000000-00000000").mkdir()
    other = scores.FinalScores(first.run, first.scoring.network, range(4))
    assert other.store.folder != first.store.folder
    assert [path.name for path in tmp_path.glob("scores-*")] == [first.store.folder.name]


def test_nothing_is_scored_where_none_is_asked_for(tmp_path, capsys):
    """A pipeline, samples and metrics.json without a score, of which a card can be made."""
    metrics = tiny(tmp_path, "--max_train_steps 1 --num_test_images 0", pictures=True)
    assert "No test images were scored" in capsys.readouterr().out
    assert not {"test", "baselines"} & metrics.keys()
    assert (tmp_path / "samples.png").exists() and not (tmp_path / "vlb_terms.png").exists()
    card = model_card(DDPMVLBPipeline.from_pretrained(tmp_path), "tester/unscored", training=metrics)
    assert card.data.eval_results is None and "tester/unscored" in card.text


def test_a_finished_run_that_is_resumed_keeps_what_was_measured(tmp_path):
    """With no step to train the pipeline is the same one: its stored paths, evaluations and scores stay."""
    first = tiny(tmp_path, "--max_train_steps 1")
    marks = [tmp_path / "few_steps.json", tmp_path / "evaluation" / "metrics.json", tmp_path / "scheduler" / "mine"]
    for mark in marks:
        mark.parent.mkdir(exist_ok=True)
        mark.write_text("{}")
    again = tiny(tmp_path, "--max_train_steps 1 --resume_from_checkpoint latest --num_test_images 0")
    assert all(mark.exists() for mark in marks) and again["test"] == first["test"]


def test_another_scheduler_is_another_pipeline(tmp_path):
    """The same weights under another option of the chain are saved anew when the run is resumed."""
    tiny(tmp_path, "--max_train_steps 1")
    tiny(tmp_path, "--max_train_steps 1 --resume_from_checkpoint latest --timestep_spacing trailing")
    assert DDPMVLBPipeline.from_pretrained(tmp_path).scheduler.config.timestep_spacing == "trailing"


def test_parts_are_of_their_images(tmp_path):
    """As many others, under the same number of calls, have another key."""
    run = only_train(tmp_path, "--max_train_steps 1")
    kept = {scores.FinalScores(run, run.averaged_network(), own).store.key for own in (range(8), range(0, 16, 2))}
    assert len(kept) == 2


@pytest.mark.parametrize("other", ["path", "tf32"])
def test_parts_are_of_their_path_and_precision(tmp_path, other):
    """The same weights read as EDM's, on a chain that looks alike, or multiplied in TF32, score otherwise."""
    run = only_train(tmp_path, "--max_train_steps 1 --path flow")
    network = run.averaged_network()
    first = scores.FinalScores(run, network, range(8)).store.key
    if other == "path":
        run.path = GaussianPath.edm(run.path.ratios)
    else:
        run.args.allow_tf32 = True
    assert scores.FinalScores(run, network, range(8)).store.key != first
