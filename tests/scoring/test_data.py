"""The images that evaluate.py scores: which ones, in what order, as what values; and what it refuses."""

import json
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from scoring_support import write_arrays, write_images, write_splits, x_0_of
from sklearn.datasets import load_digits

from ddpm_vlb.runtime.image_data import load_image_data
from ddpm_vlb.scoring.data import Arrays, NetworkShape, load_scoring_data

GREY = NetworkShape(channels=1, size=(8, 8), levels=256, classes=None)
COLOUR = NetworkShape(channels=3, size=(6, 8), levels=256, classes=None)
CLASSES = NetworkShape(channels=1, size=(8, 8), levels=256, classes=5)
LATENTS = NetworkShape(channels=4, size=(2, 3), levels=None, classes=None)


def same(x_0, expected):
    """Equal but for the rounding of 2 k / (levels - 1) - 1 in float32."""
    return x_0.shape == expected.shape and x_0.dtype == torch.float32 and float((x_0 - expected).abs().max()) < 2e-7


def everything(data, images):
    """All the images of a part."""
    return data.batch(images, list(range(len(images))))[0]


@pytest.fixture
def load(tmp_path):
    """`load_scoring_data` that keeps its files in the test's own folder."""

    def loader(network, folder=None, split="test", **options):
        return load_scoring_data(
            network, split, dataset_name=folder, cache_dir=str(tmp_path / "cache"), **{"record": None, **options}
        )

    return loader


# Which images


def test_the_digits_are_those_of_train(load):
    """Without a name it is scikit-learn's digits of 17 levels, the test images train.py scores, in their order."""
    data, expected = load(GREY), load_image_data()
    assert torch.equal(everything(data, data.scored), torch.cat(list(expected.test.batches(64))))
    assert data.levels == 17 and len(data.scored) == 297 and len(data.other) == 1500
    assert data.record["dataset_name"] is None and data.record["levels"] == 17


def test_the_digits_are_scored_at_the_levels_of_the_checkpoint(load):
    """A checkpoint of another number of levels than stock's 256 keeps its own."""
    data = load(NetworkShape(1, (8, 8), 33, None))
    assert data.levels == 33
    assert everything(data, data.scored).max() == 0  # level 16 of 0 .. 32


def test_a_split_is_scored_in_its_order(tmp_path, load):
    """All images of the split, each once; the pilot's come from another split."""
    folder, levels = write_images(tmp_path / "set", {"train": 12, "test": 7})
    data = load(GREY, folder)
    assert same(everything(data, data.scored), x_0_of(levels["test"]))
    assert same(everything(data, data.other), x_0_of(levels["train"]))
    assert (data.record["split"], data.record["num_images"], data.record["pilot_split"]) == ("test", 7, "train")


def test_any_order_can_be_asked_for(tmp_path, load):
    """Images and labels come by position."""
    labels = {"train": [0, 1], "test": [3, 1, 4, 0, 2]}
    folder, levels = write_images(tmp_path / "set", {"train": 2, "test": 5}, labels=labels)
    data = load(CLASSES, folder)
    x_0, conditioning = data.batch(data.scored, [4, 0, 3])
    assert same(x_0, x_0_of(levels["test"])[[4, 0, 3]])
    assert conditioning.keys() == {"class_labels"}
    assert conditioning["class_labels"].tolist() == [2, 3, 0] and conditioning["class_labels"].dtype == torch.int64


@pytest.mark.parametrize(
    "split, pilot", [("test", "train"), ("train", "validation"), ("validation", "train"), ("extra", "train")]
)
def test_the_pilot_takes_another_split(tmp_path, load, split, pilot):
    """The training split if it can, and never the one that is scored."""
    folder, levels = write_images(tmp_path / "set", {"train": 6, "validation": 4, "test": 5, "extra": 3})
    data = load(GREY, folder, split)
    assert data.record["pilot_split"] == pilot
    assert same(everything(data, data.scored), x_0_of(levels[split]))
    assert same(everything(data, data.other), x_0_of(levels[pilot]))


@pytest.mark.parametrize("count, kept", [(4, 2), (19, 10), (20, 2), (35, 4), (100, 10)])
def test_of_a_single_split_images_are_kept_back(tmp_path, load, count, kept):
    """Every tenth (of few images every second) is the pilot's and not scored; each image is one or the other."""
    folder, levels = write_images(tmp_path / "set", {"test": count})
    data = load(GREY, folder)
    scored, other = everything(data, data.scored), everything(data, data.other)
    assert (len(scored), len(other)) == (count - kept, kept)
    assert data.record["num_images"] == count - kept and data.record["num_pilot_images"] == kept
    assert "kept back" in data.record["pilot_split"]
    whole = x_0_of(levels["test"])
    rows, others = (
        [int(((whole - x_0).abs() < 2e-7).flatten(1).all(1).nonzero()) for x_0 in part] for part in (scored, other)
    )
    assert rows == sorted(rows) and sorted(rows + others) == list(range(count))


@pytest.mark.parametrize("counts", [{"test": 3}, {"train": 1, "test": 2}])
def test_too_few_images_for_a_pilot_are_refused(tmp_path, load, counts):
    """Some must be kept back: of three images too few remain."""
    folder, _ = write_images(tmp_path / "set", counts)
    with pytest.raises(ValueError, match="too few"):
        load(GREY, folder)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_missing_split_is_not_made_up(tmp_path, load, split):
    """Training images are not scored as a "test" split that the data set does not have."""
    folder, _ = write_images(tmp_path / "set", {"train": 60})
    with pytest.raises(ValueError, match=f"no split '{split}'; it has .*'train'.*--split"):
        load(GREY, folder, split)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_splits_that_train_made_are_made_again(tmp_path, load, split):
    """With the record of the training, its own split of a data set of training images only, without overlap."""
    folder, _ = write_images(tmp_path / "set", {"train": 60})
    trained = load_image_data(dataset_name=folder, cache_dir=str(tmp_path / "cache"))
    data = load(GREY, split=split, record=trained.record)
    assert torch.equal(everything(data, data.scored), torch.cat(list(getattr(trained, split).batches(9))))
    assert torch.equal(everything(data, data.other), torch.cat(list(trained.train.batches(9))))


def test_the_record_of_the_training_finds_the_images(tmp_path, load):
    """With the data.json beside a model the images are those that it was trained beside, at its resolution."""
    folder, _ = write_images(tmp_path / "set", {"train": 60}, shape=(12, 10))
    trained = load_image_data(dataset_name=folder, resolution=8, cache_dir=str(tmp_path / "cache"))
    data = load(GREY, record=json.loads(json.dumps(trained.record)))
    assert torch.equal(everything(data, data.scored), torch.cat(list(trained.test.batches(9))))
    assert data.record["dataset_name"] == folder and data.record["resolution"] == 8


def test_a_name_overrides_the_record(tmp_path, load):
    """A model trained on one set may be scored on another."""
    trained = load_image_data()
    folder, levels = write_images(tmp_path / "set", {"train": 5, "test": 4})
    data = load(GREY, folder, record=trained.record)
    assert same(everything(data, data.scored), x_0_of(levels["test"]))


def test_changed_data_is_refused(tmp_path, load):
    """The record of the training knows its test images."""
    folder, _ = write_images(tmp_path / "set", {"train": 60})
    trained = load_image_data(dataset_name=folder, cache_dir=str(tmp_path / "cache"))
    write_images(tmp_path / "set", {"train": 60}, seed=1)
    with pytest.raises(ValueError, match="changed since"):
        load(GREY, record=trained.record)


@pytest.mark.parametrize("limit, expected", [(1, 1), (3, 3), (100, 7)])
def test_only_the_first_images(tmp_path, load, limit, expected):
    """`num_images` scores the first of them, and no more than there are; the pilot's are as many as before."""
    folder, levels = write_images(tmp_path / "set", {"train": 12, "test": 7})
    data = load(GREY, folder, num_images=limit)
    assert same(everything(data, data.scored), x_0_of(levels["test"])[:expected])
    assert data.record["num_images"] == expected and len(data.other) == 12


@pytest.mark.parametrize("kind", ["paths.csv", "paths.jsonl", "paths.parquet", "bytes.parquet", "arrays.parquet"])
def test_what_train_reads_is_scored(tmp_path, load, kind):
    """Image files by path or content, and arrays, in a column of any name."""
    levels = np.random.default_rng(0).integers(0, 256, (12, 8, 8), dtype=np.uint8)
    paths = [str(tmp_path / f"{i}.png") for i in range(12)]
    for path, k in zip(paths, levels):
        PIL.Image.fromarray(k).save(path)
    file = tmp_path / kind
    if kind == "paths.csv":
        file.write_text("\n".join(["picture", *paths]))
    elif kind == "paths.jsonl":
        file.write_text("\n".join(json.dumps({"picture": path}) for path in paths))
    else:
        content = {"paths": paths, "bytes": [Path(path).read_bytes() for path in paths], "arrays": list(levels)}
        feature = {"paths": datasets.Value("string"), "bytes": datasets.Value("binary")}
        feature["arrays"] = datasets.Array2D((8, 8), "uint8")
        own = datasets.Features({"picture": feature[file.stem]})
        datasets.Dataset.from_dict({"picture": content[file.stem]}, features=own).to_parquet(str(file))
    cache = str(tmp_path / "cache")
    trained = load_image_data(dataset_name=str(file), image_column="picture", cache_dir=cache)
    data = load(GREY, record=trained.record)
    assert data.name == f"{file}, images kept back from split 'train'"
    assert torch.equal(everything(data, data.scored), torch.cat(list(trained.test.batches(9))))
    assert torch.equal(everything(data, data.other), torch.cat(list(trained.train.batches(9))))


@pytest.mark.parametrize("mixed", [False, True])
def test_grey_that_was_trained_as_colour_is_scored(tmp_path, load, mixed):
    """Asked for with `channels`, or where only the training split has colour: the record says what was trained."""
    for split, number in (("train", 12), ("test", 6)):
        for i in range(number):
            (tmp_path / "set" / split).mkdir(parents=True, exist_ok=True)
            shape = (8, 8, 3) if mixed and split == "train" else (8, 8)
            k = np.random.default_rng(i).integers(0, 256, shape, dtype=np.uint8)
            PIL.Image.fromarray(k).save(tmp_path / "set" / split / f"{i:02}.png")
    options = {"train_data_dir": str(tmp_path / "set"), "cache_dir": str(tmp_path / "cache")}
    trained = load_image_data(**options, channels=None if mixed else 3)
    data = load(NetworkShape(3, (8, 8), 256, None), record=trained.record)
    assert trained.channels == 3
    assert torch.equal(everything(data, data.scored), torch.cat(list(trained.test.batches(9))))


def test_grey_files_among_colour_are_scored_as_they_are_trained(tmp_path, load):
    """Whatever the first of a split is: a network of colour takes grey as equal channels."""
    for split, number in (("train", 12), ("test", 6)):
        for i in range(number):
            (tmp_path / "set" / split).mkdir(parents=True, exist_ok=True)
            k = np.random.default_rng(i).integers(0, 256, (8, 8) if i % 3 == 0 else (8, 8, 3), dtype=np.uint8)
            PIL.Image.fromarray(k).save(tmp_path / "set" / split / f"{i:02}.png")
    trained = load_image_data(train_data_dir=str(tmp_path / "set"), cache_dir=str(tmp_path / "cache"))
    assert trained.channels == 3
    data = load(NetworkShape(3, (8, 8), 256, None), record=trained.record)
    assert torch.equal(everything(data, data.scored), torch.cat(list(trained.test.batches(9))))


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_in_colour_files_is_scored_by_either_network(tmp_path, load, channels):
    """One of three channels, as earlier versions trained it, and one of one channel, as it is trained now."""
    (tmp_path / "set" / "test").mkdir(parents=True)
    for i in range(6):
        k = np.random.default_rng(i).integers(0, 256, (8, 8, 1), dtype=np.uint8).repeat(3, axis=2)
        PIL.Image.fromarray(k).save(tmp_path / "set" / "test" / f"{i}.png")
    data = load(NetworkShape(channels, (8, 8), 256, None), str(tmp_path / "set"))
    scored = everything(data, data.scored)
    assert scored.shape[1:] == (channels, 8, 8) and torch.equal(scored, scored[:, :1].expand_as(scored))


@pytest.mark.parametrize("options", [{"image_column": "other"}, {"resolution": 4}])
def test_options_beside_a_record_are_refused(tmp_path, load, options):
    """They would have no effect, unless they say what it says."""
    record = load_image_data().record
    (option,) = options
    with pytest.raises(ValueError, match=f"`--{option} .*` has no effect: the model's data.json says"):
        load(GREY, record=record, **options)
    assert load(GREY, record=record, image_column="image").record["dataset_name"] is None


# The record


def record_of(load, network, folder, **options):
    record = load(network, folder, **options).record
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    return record


def test_the_record_is_the_same_for_the_same_data(tmp_path, load):
    """And other images, another split or number of images, other pilot's images make another."""
    folder, levels = write_images(tmp_path / "set", {"train": 12, "test": 12})
    first = record_of(load, GREY, folder)
    assert record_of(load, GREY, folder) == first
    others = [record_of(load, GREY, folder, split="train"), record_of(load, GREY, folder, num_images=11)]
    for split in ("test", "train"):
        changed = {name: own.copy() for name, own in levels.items()}
        changed[split][11, 7, 7] ^= 1
        content = {name: {"image": [PIL.Image.fromarray(k) for k in own]} for name, own in changed.items()}
        others.append(record_of(load, GREY, write_splits(tmp_path / "set", content, image=datasets.Image())))
    for other in others:
        assert other != first


@pytest.mark.parametrize("split", ["test", "train"])
def test_the_record_knows_every_image(tmp_path, load, split):
    """The last of 600 differs in one level: partial results of the other data must not be taken for its own."""
    rng = np.random.default_rng(0)
    levels = {name: rng.integers(0, 17, (600, 1, 2, 2), dtype=np.int64) for name in ("train", "test")}
    network, feature = NetworkShape(1, (2, 2), 17, None), datasets.Array3D((1, 2, 2), "int64")
    first = record_of(load, network, write_arrays(tmp_path / "set", levels, feature=feature))
    levels[split][599, 0, 1, 1] = (levels[split][599, 0, 1, 1] + 1) % 17
    assert record_of(load, network, write_arrays(tmp_path / "set", levels, feature=feature)) != first


@pytest.mark.parametrize("split", ["test", "train"])
def test_the_record_knows_the_labels(tmp_path, load, split):
    """Other labels of the same images give a class-conditional network another score."""
    labels = {"train": [0, 1, 2, 3], "test": [3, 1, 4]}
    counts = {name: len(own) for name, own in labels.items()}
    first = record_of(load, CLASSES, write_images(tmp_path / "set", counts, labels=labels)[0])
    labels[split] = labels[split][::-1]
    assert record_of(load, CLASSES, write_images(tmp_path / "set", counts, labels=labels)[0]) != first


# Images


def test_colour_images_that_are_not_square(tmp_path, load):
    """Channels first, height before width."""
    folder, levels = write_images(tmp_path / "set", {"train": 5, "test": 4}, shape=(6, 8, 3))
    data = load(COLOUR, folder)
    assert same(everything(data, data.scored), x_0_of(levels["test"]))


def test_few_levels(tmp_path, load):
    """A checkpoint of 17 levels takes images whose values are levels 0 .. 16."""
    folder, levels = write_images(tmp_path / "set", {"train": 5, "test": 4}, levels=17)
    data = load(NetworkShape(1, (8, 8), 17, None), folder)
    assert same(everything(data, data.scored), x_0_of(levels["test"], 17)) and data.levels == 17


def test_too_many_levels_are_refused_with_the_fix(tmp_path, load):
    """8-bit images for 17 levels: the message says what was found, what is allowed, and what to do."""
    levels = {name: np.zeros((3, 8, 8), np.uint8) for name in ("train", "test")}
    levels["test"][2, 3, 3] = 200
    content = {name: {"image": [PIL.Image.fromarray(k) for k in own]} for name, own in levels.items()}
    folder = write_splits(tmp_path / "set", content, image=datasets.Image())
    with pytest.raises(ValueError, match=r"level 200, above 16.*requantise"):
        load(NetworkShape(1, (8, 8), 17, None), folder)


def test_images_for_a_continuous_checkpoint(tmp_path, load):
    """Its values are those of the file's 256 levels."""
    folder, levels = write_images(tmp_path / "set", {"train": 5, "test": 4})
    data = load(NetworkShape(1, (8, 8), None, None), folder)
    assert same(everything(data, data.scored), x_0_of(levels["test"])) and data.levels is None


@pytest.mark.parametrize("shape, network", [((8, 8, 3), GREY), ((6, 8), COLOUR)])
def test_another_number_of_channels_is_refused(tmp_path, load, shape, network):
    """Grey for a colour network and the other way round, with both numbers."""
    folder, _ = write_images(tmp_path / "set", {"train": 5, "test": 4}, shape=shape)
    with pytest.raises(ValueError, match=r"(grey|in colour) \(\d channels?\), but the model takes \d channel"):
        load(network, folder)


def test_another_size_is_refused_or_resized(tmp_path, load):
    """With both sizes and the option that resizes."""
    folder, _ = write_images(tmp_path / "set", {"train": 5, "test": 4}, shape=(10, 12))
    with pytest.raises(ValueError, match=r"12 x 10, but the model takes 8 x 8.*--resolution"):
        load(GREY, folder)
    data = load(GREY, folder, resolution=8)
    assert everything(data, data.scored).shape == (4, 1, 8, 8) and data.record["resolution"] == 8
    with pytest.raises(ValueError, match=r"--resolution 9.* 8 x 8"):
        load(GREY, folder, resolution=9)


def test_one_odd_image_is_named(tmp_path, load):
    """By its number in the split."""
    images = [PIL.Image.new("L", (8, 8)) for _ in range(5)] + [PIL.Image.new("L", (8, 9))]
    content = {"train": {"image": images[:2]}, "test": {"image": images}}
    with pytest.raises(ValueError, match="Image number 5 is 8 x 9, but the model takes 8 x 8"):
        load(GREY, write_splits(tmp_path / "set", content, image=datasets.Image()))


# Arrays


def test_arrays_of_integers_are_levels(tmp_path, load):
    """With or without the axis of a single channel."""
    levels = np.random.default_rng(0).integers(0, 17, (6, 8, 8), dtype=np.uint8)
    network = NetworkShape(1, (8, 8), 17, None)
    for i, arrays in enumerate((levels, levels[:, None])):
        data = load(network, write_arrays(tmp_path / f"set{i}", {"train": arrays, "test": arrays[:4]}))
        assert same(everything(data, data.scored), x_0_of(levels[:4], 17))


def test_arrays_in_colour(tmp_path, load):
    """Channels first."""
    levels = np.random.default_rng(0).integers(0, 256, (6, 3, 6, 8), dtype=np.int64)
    data = load(COLOUR, write_arrays(tmp_path / "set", {"train": levels, "test": levels[:4]}))
    assert same(everything(data, data.scored), x_0_of(levels[:4].transpose(0, 2, 3, 1)))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_arrays_of_floats_are_taken_as_they_are(tmp_path, load, dtype):
    """Latents, and images that lie on their levels already."""
    latents = np.random.default_rng(0).standard_normal((6, 4, 2, 3)).astype(dtype)
    data = load(LATENTS, write_arrays(tmp_path / "set", {"train": latents, "test": latents[:4]}))
    x_0 = everything(data, data.scored)
    assert x_0.dtype == torch.float32 and torch.equal(x_0, torch.from_numpy(latents[:4]).float())
    assert data.levels is None and data.record["levels"] is None


def test_arrays_in_another_column(tmp_path, load):
    """`image_column` names them."""
    latents = np.random.default_rng(0).standard_normal((6, 4, 2, 3)).astype(np.float32)
    folder = write_arrays(tmp_path / "set", {"train": latents, "test": latents[:4]}, column="latent")
    data = load(LATENTS, folder, image_column="latent")
    assert len(data.scored) == 4 and data.record["image_column"] == "latent"
    with pytest.raises(ValueError, match=r"no column 'image'; it has \['latent'\]"):
        load(LATENTS, folder)


def test_plain_lists_are_arrays_too(tmp_path, load):
    """As a JSON file holds them."""
    latents = np.random.default_rng(0).standard_normal((6, 4, 2, 3)).astype(np.float32)
    for split in ("train", "test"):
        rows = [json.dumps({"image": array.tolist()}) for array in latents]
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / "set" / f"{split}.json").write_text("\n".join(rows))
    data = load(LATENTS, str(tmp_path / "set"))
    assert torch.equal(everything(data, data.scored), torch.from_numpy(latents))


@pytest.mark.parametrize(
    "shape, feature",
    [
        ((4, 3, 2), datasets.Array3D((4, 3, 2), "float32")),
        ((2, 3, 4), datasets.Array3D((2, 3, 4), "float32")),
        ((2, 3), datasets.Array2D((2, 3), "float32")),
        ((24,), datasets.List(datasets.Value("float32"))),
    ],
)
def test_arrays_of_another_shape_are_refused(tmp_path, load, shape, feature):
    """Channels last, transposed or flat: with both shapes."""
    arrays = np.zeros((4, *shape), np.float32)
    folder = write_arrays(tmp_path / "set", {"train": arrays, "test": arrays}, feature=feature)
    with pytest.raises(ValueError, match=r"shape \(.*but the model takes \(4, 2, 3\), channels first"):
        load(LATENTS, folder)


def test_ragged_arrays_are_refused(tmp_path, load):
    """The odd one is named."""
    nested = datasets.List(datasets.List(datasets.Value("float32")))
    arrays = [[[0.0] * 3] * 2] * 3 + [[[0.0] * 3, [0.0] * 2]]
    folder = write_splits(tmp_path / "set", {s: {"image": arrays} for s in ("train", "test")}, image=nested)
    with pytest.raises(ValueError, match=r"number 3 .*but the model takes \(1, 2, 3\)"):
        load(NetworkShape(1, (2, 3), None, None), folder)


@pytest.mark.parametrize("bad", [-1, 17, 255])
def test_levels_outside_the_range_are_refused(tmp_path, load, bad):
    """With the level and the range."""
    levels = np.zeros((4, 1, 8, 8), np.int64)
    levels[2, 0, 1, 1] = bad
    folder = write_arrays(tmp_path / "set", {"train": levels[:2], "test": levels})
    with pytest.raises(ValueError, match=rf"number 2 .*{bad}.*outside 0 \.\. 16"):
        load(NetworkShape(1, (8, 8), 17, None), folder)


def test_integers_for_a_continuous_checkpoint_are_refused(tmp_path, load):
    """What scale they should have is not known; the message says what to do."""
    levels = np.zeros((4, 4, 2, 3), np.int64)
    with pytest.raises(ValueError, match=r"holds integers, but .*continuous.*--levels"):
        load(LATENTS, write_arrays(tmp_path / "set", {"train": levels, "test": levels}))


def test_arrays_need_a_size(tmp_path, load):
    """A network that takes any size cannot say what the arrays should be."""
    arrays = np.zeros((4, 4, 2, 3), np.float32)
    folder = write_arrays(tmp_path / "set", {"train": arrays, "test": arrays})
    with pytest.raises(ValueError, match="no `sample_size`"):
        load(NetworkShape(4, None, None, None), folder)


def test_raw_values_are_fingerprinted():
    """Of arrays that is what the network sees."""
    data = datasets.Dataset.from_dict({"a": np.zeros((2, 1, 2, 2), np.float32).tolist()})
    images = Arrays(data, "a", (1, 2, 2), None)
    assert images.raw(torch.stack(images.__getitems__([0, 1]))).dtype == np.float32


# Labels


def labelled(tmp_path, labels, feature=None):
    content = {
        split: {"image": [PIL.Image.new("L", (8, 8), i) for i in range(len(own))], "label": own}
        for split, own in labels.items()
    }
    return write_splits(tmp_path / "set", content, image=datasets.Image(), label=feature or datasets.Value("int64"))


def test_class_labels_are_numbers(tmp_path, load):
    """A `ClassLabel` column gives the class's number."""
    feature = datasets.ClassLabel(names=["a", "b", "c"])
    data = load(CLASSES, labelled(tmp_path, {"train": [0, 1], "test": [2, 0, 1]}, feature))
    assert data.batch(data.scored, [0, 1, 2])[1]["class_labels"].tolist() == [2, 0, 1]
    assert data.record["label_column"] == "label"


def test_booleans_are_two_classes(tmp_path, load):
    """As 0 and 1."""
    data = load(CLASSES, labelled(tmp_path, {"train": [True, False], "test": [False, True]}, datasets.Value("bool")))
    labels = data.batch(data.scored, [0, 1])[1]["class_labels"]
    assert labels.tolist() == [0, 1] and labels.dtype == torch.int64


def test_an_unconditional_network_gets_no_labels(tmp_path, load):
    """Though the data has some."""
    data = load(GREY, labelled(tmp_path, {"train": [0, 1], "test": [9, 9, 9]}))
    assert data.batch(data.scored, [0])[1] == {} and data.record["label_column"] is None


@pytest.mark.parametrize("column", ["label", "fine_label"])
def test_a_missing_label_column_is_refused(tmp_path, load, column):
    """With its name, the columns there are, and the option."""
    folder, _ = write_images(tmp_path / "set", {"train": 3, "test": 3})
    with pytest.raises(ValueError, match=rf"no column '{column}'; it has \['image'\].*--label_column"):
        load(CLASSES, folder, label_column=None if column == "label" else column)


@pytest.mark.parametrize("split", ["test", "train"])
@pytest.mark.parametrize("bad", [-1, 5, None])
def test_labels_that_are_no_class_are_refused(tmp_path, load, split, bad):
    """Of the images to score and of the pilot's: with the label and the classes."""
    labels = {"train": [0, 1, 2], "test": [0, 1, 2]}
    labels[split] = [0, bad, 2]
    with pytest.raises(ValueError, match=rf"Label {bad} of image number 1 .*0 \.\. 4"):
        load(CLASSES, labelled(tmp_path, labels))


def test_words_are_no_classes(tmp_path, load):
    """Labels must be integers."""
    folder = labelled(tmp_path, {"train": ["1", "2"], "test": ["1", "cat"]}, datasets.Value("string"))
    with pytest.raises(ValueError, match="Label '1' of image number 0"):
        load(CLASSES, folder)


# Names


def test_an_unknown_split_lists_the_splits(tmp_path, load):
    """The message says what there is to choose from."""
    folder, _ = write_images(tmp_path / "set", {"train": 5, "test": 4})
    with pytest.raises(ValueError, match=r"no split 'dev'; it has \['test', 'train'\]"):
        load(GREY, folder, "dev")


def test_an_unknown_column_lists_the_columns(tmp_path, load):
    """The message says what there is to choose from."""
    folder, _ = write_images(tmp_path / "set", {"train": 5, "test": 4})
    with pytest.raises(ValueError, match=r"no column 'img'; it has \['image'\]"):
        load(GREY, folder, image_column="img")


def test_a_missing_folder_is_named(tmp_path, load):
    """As `datasets` does."""
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load(GREY, str(tmp_path / "nowhere"))


def test_other_splits_than_the_digits_have_are_refused(load):
    """They have the three that train.py makes."""
    assert len(load(GREY, split="validation").scored) == 75
    assert len(load(GREY, split="train").scored) == 1500
    with pytest.raises(ValueError, match="no split 'dev'"):
        load(GREY, split="dev")


def test_the_digits_are_scikit_learn_s(load):
    """Every stored image is scored or a pilot's, with its own levels."""
    data = load(GREY)
    seen = torch.cat([everything(data, part) for part in (data.scored, data.other)])
    stored = sorted(image.astype(np.uint8).tobytes() for image in load_digits().images)
    assert sorted(np.rint((x_0.numpy() + 1) * 8).astype(np.uint8).tobytes() for x_0 in seen) == stored


def test_images_in_a_folder(tmp_path, load):
    """--dataset_name takes a folder of image files, split by its sub-folders."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 3)):
        (tmp_path / "set" / split).mkdir(parents=True)
        for i in range(count):
            array = rng.integers(0, 256, (8, 8), dtype=np.uint8)
            PIL.Image.fromarray(array).save(tmp_path / "set" / split / f"{i}.png")
    data = load(GREY, str(tmp_path / "set"))
    stored = np.stack([np.asarray(PIL.Image.open(path)) for path in sorted(Path(tmp_path, "set", "test").iterdir())])
    assert same(everything(data, data.scored), x_0_of(stored))
