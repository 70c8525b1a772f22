"""`ddpm-vlb train --class_conditional`: what the network is told of which images, and what a run leaves behind."""

import argparse
import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DModel
from processes import fresh_accelerate  # noqa: F401
from sklearn.datasets import load_digits
from training_support import only_train, tiny, until_training

from ddpm_vlb import DDPMVLBPipeline, VLBEstimator, model_card
from ddpm_vlb.commands import train
from ddpm_vlb.recipes import train as recipe
from ddpm_vlb.runtime.image_data import from_record
from ddpm_vlb.training import scores as training_scores
from ddpm_vlb.training.networks import build_unet
from ddpm_vlb.training.pictures import real_images

NO_CLASS = 10  # the label after the ten digits


@pytest.fixture(scope="module")
def classes_of():
    """What tells the classes of images x_0 of `few` by their pixels."""
    stored = {image.tobytes(): int(label) for image, label in zip(load_digits().images[:180], load_digits().target)}
    assert len(stored) == 180
    return lambda x_0: [stored[((own + 1) * 8.5).round().double().numpy().tobytes()] for own in x_0[:, 0]]


@pytest.fixture(scope="module")
def base(tmp_path_factory, few):
    """A finished run with label dropout: its folder, its metrics, and what was told in its scores and its samples."""
    folder, scored, drawn = tmp_path_factory.mktemp("base") / "run", [], []
    score, fit_pilot, sample = VLBEstimator.score, training_scores.fit_pilot, DDPMVLBPipeline.__call__

    def note_score(self, x_0, positions, conditioning=None, sweep=0):
        scored.append((x_0, conditioning))
        return score(self, x_0, positions, conditioning, sweep)

    def note_pilot(model, reverse, x_0, conditioning=None, **options):
        scored.append((x_0, conditioning))
        return fit_pilot(model, reverse, x_0, conditioning=conditioning, **options)

    def note_sample(self, count, class_labels=None, **options):
        drawn.append(class_labels.tolist())
        return sample(self, count, class_labels=class_labels, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VLBEstimator, "score", note_score)
        patch.setattr(training_scores, "fit_pilot", note_pilot)
        patch.setattr(DDPMVLBPipeline, "__call__", note_sample)
        options = "--class_conditional --label_dropout 0.3 --max_train_steps 2 --validation_steps 1"
        metrics = tiny(folder, options, *few)
    return SimpleNamespace(folder=folder, metrics=metrics, scored=scored, drawn=drawn)


def test_every_score_is_given_the_images_own_labels(base, classes_of):
    """In validations, in the score of the test images, and in the pilots of both: none of them is dropped."""
    assert sum(len(x_0) for x_0, _ in base.scored) > 8 + 8 + 100
    for x_0, conditioning in base.scored:
        assert conditioning["class_labels"].tolist() == classes_of(x_0)


def test_samples_are_of_all_classes_in_turn(base):
    """In the pictures on the way and in the last one; none is of no class."""
    assert [len(own) for own in base.drawn] == [16, 4]
    assert all(own == [i % 10 for i in range(len(own))] for own in base.drawn)


def test_what_is_saved(base, few, capsys):
    """A pipeline of eleven labels that stock refuses, and the column that evaluation reads; report and card say so."""
    pipeline = DDPMVLBPipeline.from_pretrained(base.folder)
    assert pipeline.num_classes == NO_CLASS + 1 and not pipeline.portable
    record = json.loads((base.folder / "data.json").read_text())
    assert (record["label_column"], record["num_classes"]) == ("label", 10)
    assert from_record(record, str(few[3])).record == record
    card = str(model_card(pipeline, "me/digits", training=base.metrics))
    assert ", given their labels, 8 network calls each" in card and "class_labels=0" in card
    assert "0.3 of the labels was replaced by 10" in card
    train.report(base.metrics, base.folder)
    assert "Test bits/dim, given their labels (8 images" in capsys.readouterr().out


@pytest.fixture(scope="module")
def run(tmp_path_factory, few):
    """A `Run` after two steps of two micro batches, of which it remembers x_0 and what the network was told."""
    told, seen, forward, train_batch = [], [], UNet2DModel.forward, recipe.train_batch

    def note_call(self, sample, timestep, class_labels=None, **options):
        told.extend(class_labels.tolist())
        return forward(self, sample, timestep, class_labels, **options)

    def note_batch(run, x_0, micro_step, drawn):
        seen.append(x_0)
        return train_batch(run, x_0, micro_step, drawn)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UNet2DModel, "forward", note_call)
        patch.setattr(recipe, "train_batch", note_batch)
        options = "--class_conditional --max_train_steps 2 --gradient_accumulation_steps 2"
        made = only_train(tmp_path_factory.mktemp("own"), options, *few)
    made.seen, made.told = torch.cat(seen), told
    return made


def test_the_network_is_told_the_classes_of_its_images(run, classes_of):
    """Each with the image that it stands by, in every micro batch; without label dropout the network has no more."""
    assert run.told == classes_of(run.seen) and len(run.told) == 32 and len(set(run.told)) > 5
    assert run.network_config.num_class_embeds == 10


def test_labels_are_dropped_at_random(run, monkeypatch):
    """A share of them becomes the last label; the others stay, and so do the other draws, alike in a repetition."""
    monkeypatch.setattr(run, "accelerator", SimpleNamespace(device=torch.device("cpu")))
    whole = recipe.draw(run)
    monkeypatch.setattr(run.args, "label_dropout", 0.3)
    monkeypatch.setattr(run, "null_label", NO_CLASS)
    drawn, again = recipe.draw(run), recipe.draw(run)
    dropped = drawn.labels == NO_CLASS
    assert torch.equal(drawn.labels, again.labels)
    assert torch.equal(drawn.labels[~dropped], whole.labels[~dropped]) and (whole.labels < NO_CLASS).all()
    for name in ("t", "weights", "mirrored"):
        assert torch.equal(getattr(drawn, name), getattr(whole, name))
    shares = []
    for step in range(100):
        monkeypatch.setattr(run.progress, "step", step)
        shares.append((recipe.draw(run).labels == NO_CLASS).double().mean())
    assert abs(torch.stack(shares).mean() - 0.3) < 5 * (0.3 * 0.7 / 1600) ** 0.5


@pytest.mark.parametrize(
    "labels, dropout, refused", [(10, 0.0, False), (10, 0.1, True), (12, 0.1, False), (None, 0, True)]
)
def test_a_configuration_needs_labels_enough(tmp_path, labels, dropout, refused):
    """As many as the data has classes, and with label dropout one more; more of them do no harm."""
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    UNet2DModel(
        8, 1, 2, norm_num_groups=4, layers_per_block=1, add_attention=False, num_class_embeds=labels, **blocks
    ).save_config(tmp_path)
    args = argparse.Namespace(
        model_config_name_or_path=str(tmp_path), label_dropout=dropout, variance_type="learned_range"
    )
    data = SimpleNamespace(classes=10, channels=1, size=(8, 8))
    if not refused:
        assert build_unet(args, data).config.num_class_embeds == labels
        return
    with pytest.raises(ValueError, match=f"num_class_embeds {labels}, but .* need at least {10 + (dropout > 0)}"):
        build_unet(args, data)


def test_bad_labels_are_refused_before_a_step(tmp_path, few):
    """In one line, with nothing left in the output folder."""
    with pytest.raises(SystemExit, match="no column 'kind'; it has .*--label_column") as stop:
        until_training(tmp_path / "run", "--class_conditional --label_column kind", *few)
    assert "\n" not in stop.value.code and not (tmp_path / "run").exists()


class Split:
    """Images of one level each, 0.1 of their position, with classes."""

    def __init__(self, labels):
        self.own = labels

    def labels(self):
        return torch.tensor(self.own)

    def __getitem__(self, position):
        return torch.full((1, 2, 2), 2 * position / 10 - 1)


def test_real_images_stand_in_the_same_columns():
    """The first ones of each class; again from its first where it has few, and white where it has none."""
    found = real_images(Split([2, 0, 0, 2, 2]), 8, 4)[:, 0, 0, 0]
    torch.testing.assert_close(found, torch.tensor([0.1, 1.0, 0.0, 1.0, 0.2, 1.0, 0.3, 1.0]))
