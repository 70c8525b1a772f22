"""Class labels beside the images to train on: how many classes there are, and what is none."""

import json

import datasets
import numpy as np
import PIL.Image
import pytest
import torch

from ddpm_vlb.runtime.class_labels import trained_classes
from ddpm_vlb.runtime.image_data import from_record, load_image_data
from ddpm_vlb.scoring.data import NetworkShape, load_scoring_data


def split(labels, feature=None):
    features = datasets.Features({"kind": feature or datasets.Value("int64")})
    return datasets.Dataset.from_dict({"kind": labels}, features=features)


NAMED = datasets.ClassLabel(names=["a", "b", "c", "d"])


@pytest.mark.parametrize("feature, classes", [(None, 3), (NAMED, 4), (datasets.Value("int8"), 3)])
def test_the_number_of_classes(feature, classes):
    """That of a `ClassLabel`, else the largest label of a training image and 1."""
    train, test = split([0, 2, 1], feature), split([1, 1], feature)
    assert trained_classes(train, {"test": test}, "kind") == classes


def test_booleans_are_two_classes():
    """As in scoring."""
    both = split([True, False], datasets.Value("bool"))
    assert trained_classes(both, {}, "kind") == 2


@pytest.mark.parametrize(
    "train, test, feature, said",
    [
        ([0, None, 1], [0], None, r"Label None of training image number 1 \(column 'kind'\)"),
        ([0, 1], [1, -1], None, r"Label -1 of test image number 1 .*classes 0 \.\. 1\."),
        ([0, -1], [0], NAMED, r"Label -1 of training image number 1 .*classes 0 \.\. 3\."),
        ([0.0, 1.0], [0.0], datasets.Value("float32"), "Label 0.0 of training image number 0"),
        (["cat", "dog"], ["cat"], datasets.Value("string"), "Label 'cat' of training image number 0"),
        ([0, 10**9], [0], None, "Label 1000000000 of training image number 1"),
        ([0, 1], [0, 2], None, r"Label 2 of test image number 1 .*the training images' classes 0 \.\. 1\."),
        ([0, 2], [0, 1], None, "Label 1 of test image number 1 .* is of no training image"),
        ([0, 1], [3], NAMED, "Label 3 of test image number 0 .* is of no training image"),
    ],
)
def test_labels_that_no_network_learns_are_refused(train, test, feature, said):
    """Missing, no integers, no classes, or of no training image: with the label, the image and the column."""
    with pytest.raises(ValueError, match=said) as error:
        trained_classes(split(train, feature), {"test": split(test, feature)}, "kind")
    assert "\n" not in str(error.value)


@pytest.fixture
def labelled(tmp_path):
    """A folder of 20 images to train on and 5 to test, whose `kind` is the level of all their pixels."""
    (tmp_path / "set").mkdir()
    features = datasets.Features({"image": datasets.Image(), "kind": datasets.Value("int64")})
    for name, count in (("train", 20), ("test", 5)):
        kinds = np.arange(count) % 3
        images = [PIL.Image.fromarray(np.full((8, 8), kind, np.uint8)) for kind in kinds]
        data = datasets.Dataset.from_dict({"image": images, "kind": kinds}, features=features)
        data.to_parquet(str(tmp_path / "set" / f"{name}-00000-of-00001.parquet"))
    return {"dataset_name": str(tmp_path / "set"), "cache_dir": str(tmp_path / "cache")}


def test_labels_stay_beside_their_images(labelled):
    """In all three splits, in any order."""
    data = load_image_data(**labelled, label_column="kind")
    assert data.classes == 3
    for images in (data.train, data.validation, data.test):
        positions = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).tolist()
        x_0, told = images.batch(positions)
        assert told["class_labels"].tolist() == images.raw(x_0)[:, 0, 0, 0].tolist()
        assert torch.equal(images.labels()[positions], told["class_labels"])


def test_the_record_finds_the_labels_again(labelled):
    """For training's own reading and for the scoring of what was trained, without an option; not once they changed."""
    data = load_image_data(**labelled, label_column="kind")
    record = json.loads(json.dumps(data.record))
    assert from_record(record, labelled["cache_dir"]).record == data.record
    scored = load_scoring_data(NetworkShape(1, (8, 8), 256, 3), record=record, cache_dir=labelled["cache_dir"])
    assert scored.record["label_column"] == "kind"
    told = [own.labels().tolist() for own in (scored.scored, data.test)]
    assert told[0] == told[1]
    with pytest.raises(ValueError, match="not those that the pipeline was trained beside"):
        from_record({**record, "label_column": None}, labelled["cache_dir"])


def test_without_a_label_column_nothing_is_told(labelled):
    """And the record is that of before there were any."""
    data = load_image_data(**labelled)
    assert data.classes is None and data.train.batch([0])[1] == {}
    assert not {"label_column", "num_classes"} & data.record.keys()


@pytest.mark.parametrize(
    "column, said", [("label", r"no column 'label'; it has \['image', 'kind'\]"), ("image", "both")]
)
def test_a_column_of_no_labels_is_refused(labelled, column, said):
    """One that is not there, and that of the images."""
    with pytest.raises(ValueError, match=said):
        load_image_data(**labelled, label_column=column)
