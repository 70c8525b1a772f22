import errno
import json
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pyarrow
import pytest
import torch
from sklearn.datasets import load_digits

from ddpm_vlb import check_data
from ddpm_vlb.runtime.image_data import HUB_HINT, data_name, from_record, load_image_data, named_data
from ddpm_vlb.runtime.image_sets import as_stored

MNIST = Path(__file__).parents[3] / "shared" / "mnist"
EXIF_ORIENTATION, QUARTER_TURN = 0x0112, 6


def random_image(rng, size=(8, 6), mode="L"):
    """A PIL image of (height, width), in any mode, that no other draw repeats."""
    bands = {"L": (), "1": (), "P": (), "LA": (2,), "RGB": (3,), "RGBA": (4,)}[mode]
    image = PIL.Image.fromarray(rng.integers(0, 256, (*size, *bands), dtype=np.uint8))
    return image.convert(mode)


def write_folder(folder, count=20, size=(8, 6), mode="L", seed=0, suffix=".png"):
    """Write random images; returns the folder's name."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        random_image(rng, size, mode).save(folder / f"{i:03d}{suffix}")
    return str(folder)


def write_parquet(folder, counts, size=(8, 8)):
    """Write a data set in the layout of the Hub; returns the folder's name and the levels of each split."""
    rng = np.random.default_rng(0)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    levels = {}
    (folder / "data").mkdir(parents=True)
    for split, count in counts.items():
        images = [random_image(rng, size) for _ in range(count)]
        levels[split] = [np.asarray(image) for image in images]
        data = datasets.Dataset.from_dict({"image": images, "label": list(range(count))}, features=features)
        data.to_parquet(str(folder / "data" / f"{split}-00000-of-00001.parquet"))
    return str(folder), levels


def levels_of(images, number=256):
    """The integer levels (C, H, W) of each image, by a route of its own."""
    return [np.rint((images[i].double().numpy() + 1) / 2 * (number - 1)).astype(np.uint8) for i in range(len(images))]


def contents(arrays):
    """A multiset of arrays."""
    return Counter(np.ascontiguousarray(array).tobytes() for array in arrays)


def sizes(data):
    return len(data.train), len(data.validation), len(data.test)


@pytest.fixture(scope="module")
def digits():
    return load_image_data()


@pytest.fixture
def load(tmp_path):
    """`load_image_data` that keeps its files in the test's own folder."""
    return lambda **options: load_image_data(**options, cache_dir=str(tmp_path / "cache"))


# The digits


def test_digits_have_their_sizes(digits):
    """1425, 75 and 297 images of 1 x 8 x 8 with 17 levels."""
    assert sizes(digits) == (1425, 75, 297)
    assert (digits.size, digits.channels, digits.levels) == ((8, 8), 1, 17)
    assert digits.train[0].shape == (1, 8, 8) and digits.train[0].dtype == torch.float32
    assert digits.record["num_images"] == {"train": 1425, "validation": 75, "test": 297}


def test_digits_are_split_without_overlap(digits):
    """The three splits together are scikit-learn's 1797 images, each exactly once, level by level."""
    splits = [contents(levels_of(part, 17)) for part in (digits.train, digits.validation, digits.test)]
    assert sum(splits, Counter()) == contents(load_digits().images.astype(np.uint8))


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_digits_lie_on_their_grid(digits, split):
    """Every x_0 is -1 + 2 k / 16, and all 17 levels occur."""
    x_0 = torch.cat(list(getattr(digits, split).batches(256)))
    check_data(x_0, 17)
    assert x_0.unique().tolist() == [k / 8 - 1 for k in range(17)]


def test_the_split_depends_on_nothing_but_the_data(digits):
    """Torch's and numpy's global seeds move no image, and are not moved."""
    torch.manual_seed(123)
    np.random.seed(123)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    again = load_image_data()
    for split in ("train", "validation", "test"):
        first, second = (torch.cat(list(getattr(d, split).batches(512))) for d in (digits, again))
        assert torch.equal(first, second)
    assert again.record == digits.record
    assert torch.equal(before[0], torch.get_rng_state()) and np.array_equal(before[1], np.random.get_state()[1])


def test_the_digits_split_is_a_format(digits):
    """The test images are the same ones on every machine and in every release: published bits/dim refer to them."""
    assert digits.record["test_fingerprint"] == "f70fbfbac8b24d73e8adbfd243d1132f"


# The record


def test_digits_come_back_from_their_record(digits):
    """The record survives JSON and gives the same three splits."""
    again = from_record(json.loads(json.dumps(digits.record)))
    assert again.record == digits.record
    for split in ("train", "validation", "test"):
        first, second = (torch.cat(list(getattr(d, split).batches(512))) for d in (digits, again))
        assert torch.equal(first, second)


@pytest.mark.parametrize("counts", [{"train": 40}, {"train": 40, "test": 10}, {"train": 40, "validation": 7}])
def test_parquet_comes_back_from_its_record(tmp_path, load, counts):
    """Made and given splits alike, at the resolution that was asked for."""
    folder, _ = write_parquet(tmp_path / "set", counts)
    data = load(dataset_name=folder, resolution=4)
    again = from_record(json.loads(json.dumps(data.record)), cache_dir=str(tmp_path / "cache"))
    assert again.record == data.record and again.size == (4, 4)
    assert torch.equal(torch.cat(list(again.test.batches(9))), torch.cat(list(data.test.batches(9))))


def test_changed_test_images_are_refused(tmp_path, load):
    """One changed level in one test image is enough."""
    write_folder(tmp_path / "set" / "train")
    test = write_folder(tmp_path / "set" / "test", 5, seed=1)
    data = load(train_data_dir=str(tmp_path / "set"))
    from_record(data.record, cache_dir=str(tmp_path / "cache"))
    levels = np.array(PIL.Image.open(Path(test) / "003.png"))
    levels[2, 3] ^= 1
    PIL.Image.fromarray(levels).save(Path(test) / "003.png")
    with pytest.raises(ValueError, match="changed since"):
        from_record(data.record, cache_dir=str(tmp_path / "cache"))


def test_a_missing_test_image_is_refused(tmp_path, load):
    """The message says how many images there are, and were."""
    write_folder(tmp_path / "set" / "train")
    test = write_folder(tmp_path / "set" / "test", 5, seed=1)
    data = load(train_data_dir=str(tmp_path / "set"))
    (Path(test) / "004.png").unlink()
    with pytest.raises(ValueError, match="'test': 4.*'test': 5"):
        from_record(data.record, cache_dir=str(tmp_path / "cache"))


# Folders of images


@pytest.mark.parametrize("mode, channels", [("L", 1), ("RGB", 3), ("P", 1)], ids=str)
def test_folders_of_every_mode(tmp_path, load, mode, channels):
    """Grey stays grey, colour colour; every image is there once with the levels that PIL gives, on the grid."""
    folder = write_folder(tmp_path / "set", mode=mode)
    data = load(train_data_dir=folder)
    assert (data.size, data.channels, data.levels) == ((8, 6), channels, 256)
    assert sizes(data) == (17, 1, 2)
    seen = sum((contents(levels_of(part)) for part in (data.train, data.validation, data.test)), Counter())
    files = [PIL.Image.open(path).convert("L" if channels == 1 else "RGB") for path in Path(folder).iterdir()]
    stored = [np.asarray(image).reshape(8, 6, channels).transpose(2, 0, 1) for image in files]
    assert seen == contents(stored)
    check_data(torch.cat(list(data.train.batches(5))), 256)


def test_nested_folders(tmp_path, load):
    """Images below sub-folders of any depth are found; other files are no images."""
    write_folder(tmp_path / "set" / "cats", 12)
    write_folder(tmp_path / "set" / "dogs" / "small", 8, seed=1)
    (tmp_path / "set" / "README.txt").write_text("not an image")
    data = load(train_data_dir=str(tmp_path / "set"))
    assert sum(sizes(data)) == 20


def test_split_folders(tmp_path, load):
    """Folders named train, validation and test are the splits."""
    for i, (split, count) in enumerate({"train": 9, "validation": 4, "test": 5}.items()):
        write_folder(tmp_path / "set" / split, count, seed=i)
    data = load(train_data_dir=str(tmp_path / "set"))
    assert sizes(data) == (9, 4, 5)
    assert data.record["test_split"] == "test"


@pytest.mark.parametrize("count, expected", [(4, (2, 1, 1)), (40, (35, 1, 4)), (130, (112, 5, 13))])
def test_made_splits_have_the_right_sizes(tmp_path, load, count, expected):
    """A tenth for the test, a twentieth of the rest for validation, at least one image each; disjoint."""
    data = load(train_data_dir=write_folder(tmp_path / "set", count, size=(4, 4)))
    assert sizes(data) == expected
    assert data.record["test_split"] is None
    seen = sum((contents(levels_of(part)) for part in (data.train, data.validation, data.test)), Counter())
    assert len(seen) == count and set(seen.values()) == {1}


def test_missing_folder_is_named(tmp_path, load):
    """A `train_data_dir` that is not there, or is a file, is refused before `datasets` looks for it."""
    (tmp_path / "file").write_text("")
    for name in ("missing", "file"):
        with pytest.raises(FileNotFoundError, match=rf"`--train_data_dir` '.*{name}' is not a folder"):
            load(train_data_dir=str(tmp_path / name))


def test_empty_folder_is_refused(tmp_path, load):
    """No files, or none that is an image."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty"):
        load(train_data_dir=str(tmp_path / "empty"))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("")
    with pytest.raises(ValueError, match="no data"):
        load(train_data_dir=str(tmp_path / "text"))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_too_few_images_are_refused(tmp_path, load, count):
    """Two to train on, and one each to validate and to test; the message counts them."""
    with pytest.raises(ValueError, match=f"has {count} images in 'train', but needs 4"):
        load(train_data_dir=write_folder(tmp_path / "set", count))


def test_truncated_file_is_named(tmp_path, load):
    """A PNG cut off half-way is named by its path, in whatever split it lies."""
    folder = Path(write_folder(tmp_path / "set", size=(32, 32)))
    whole = (folder / "007.png").read_bytes()
    (folder / "007.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"Image '.*007\.png' cannot be read"):
        data = load(train_data_dir=str(folder))
        for part in (data.train, data.validation, data.test):
            list(part.batches(8))


def test_no_image_at_all_is_named(tmp_path, load):
    """A text file that calls itself an image."""
    folder = Path(write_folder(tmp_path / "set"))
    (folder / "011.png").write_text("not a picture")
    with pytest.raises(ValueError, match=r"Image '.*011\.png' cannot be read"):
        data = load(train_data_dir=str(folder))
        for part in (data.train, data.validation, data.test):
            list(part.batches(8))


def test_unequal_sizes_are_refused_with_the_fix(tmp_path, load):
    """Without --resolution one odd image stops the run, and the message names it, both sizes and the option."""
    write_folder(tmp_path / "set" / "train")
    (tmp_path / "set" / "test").mkdir()
    random_image(np.random.default_rng(9), (5, 7)).save(tmp_path / "set" / "test" / "odd.png")
    with pytest.raises(ValueError, match=r"odd\.png' is 7 x 5, but the first one is 6 x 8\. Pass `--resolution`"):
        load(train_data_dir=str(tmp_path / "set"))


def test_colour_among_grey_is_refused(tmp_path, load):
    """Colour is not thrown away because the first image happens to be grey: those would not be the data's bits."""
    write_folder(tmp_path / "set" / "train")
    write_folder(tmp_path / "set" / "test", 4, mode="RGB")
    with pytest.raises(ValueError, match="colour|channel|mode"):
        load(train_data_dir=str(tmp_path / "set"))


def test_sixteen_bits_are_not_cut_to_eight(tmp_path, load):
    """Grey of 16 bits has 65536 levels; saturating it at 255 would score other data than what is stored."""
    (tmp_path / "set").mkdir()
    rng = np.random.default_rng(0)
    for i in range(12):
        levels = rng.integers(0, 65536, (8, 8)).astype(np.uint16)
        PIL.Image.fromarray(levels).save(tmp_path / "set" / f"{i:02d}.png")
    with pytest.raises(ValueError, match="has 16 bits.*`--levels 65536`"):
        load(train_data_dir=str(tmp_path / "set"))
    data = load(train_data_dir=str(tmp_path / "set"), levels=65536)
    stored = [np.asarray(PIL.Image.open(path)) for path in (tmp_path / "set").iterdir()]
    seen = [part.raw(x_0)[0] for part in (data.train, data.validation, data.test) for x_0 in part]
    assert data.levels == data.record["levels"] == 65536 and seen[0].dtype == np.uint16
    assert contents(seen) == contents(stored)
    check_data(data.train[0][None], 65536)
    assert from_record(data.record, cache_dir=str(tmp_path / "cache")).record == data.record


def test_levels_are_those_that_are_said(tmp_path, load):
    """12 bits in files of 16; a level above is refused by the file's name."""
    (tmp_path / "set").mkdir()
    for i in range(8):
        PIL.Image.fromarray(np.full((4, 4), 4095 - i, np.uint16)).save(tmp_path / "set" / f"{i}.png")
    data = load(train_data_dir=str(tmp_path / "set"), levels=4096)
    assert contents(part.raw(x_0) for part in (data.train, data.validation, data.test) for x_0 in part) == contents(
        np.full((1, 4, 4), 4095 - i, np.uint16) for i in range(8)
    )
    with pytest.raises(ValueError, match=r"\d\.png' has the level 40\d\d, above 254"):
        list(load(train_data_dir=str(tmp_path / "set"), levels=255).train.batches(8))


def test_bilevel_images_have_two_levels_unless_a_record_says_256(tmp_path, load):
    """As they were recorded before, with the same images."""
    folder = write_folder(tmp_path / "set", 12, mode="1")
    data = load(train_data_dir=folder)
    assert (data.levels, data.channels) == (2, 1)
    old = load(train_data_dir=folder, levels=256, channels=3)
    assert old.train[0].shape == (3, 8, 6) and (old.train[0] == data.train[0]).all()
    assert from_record(old.record, cache_dir=str(tmp_path / "cache")).record == old.record


@pytest.mark.parametrize("mode", ["RGB", "P"])
def test_grey_in_colour_files_has_one_channel(tmp_path, load, mode):
    """Unless one of the first images is in colour, or a record says three."""
    (tmp_path / "set").mkdir()
    for i in range(12):
        random_image(np.random.default_rng(i)).convert(mode).save(tmp_path / "set" / f"{i:02d}.png")
    assert load(train_data_dir=str(tmp_path / "set")).channels == 1
    assert load(train_data_dir=str(tmp_path / "set"), channels=3).train[0].shape == (3, 8, 6)
    random_image(np.random.default_rng(20), mode="RGB").save(tmp_path / "set" / "05.png")
    random_image(np.random.default_rng(21), mode="RGB").save(tmp_path / "set" / "07.png")
    random_image(np.random.default_rng(22), mode="RGB").save(tmp_path / "set" / "09.png")
    assert load(train_data_dir=str(tmp_path / "set")).channels == 3


def unlike_the_first(load, folder, **options) -> str:
    """A file of the folder that is not looked at."""
    return load(train_data_dir=str(folder), **options).test.data[0]["image"]["path"]


def test_colour_that_comes_later_is_refused_with_the_option(tmp_path, load):
    """Where all images that were looked at are grey; `channels` says that others are not."""
    folder = Path(write_folder(tmp_path / "set", 12, mode="L"))
    name = unlike_the_first(load, folder)
    random_image(np.random.default_rng(20), mode="RGB").save(name)
    with pytest.raises(ValueError, match=f"Image '{name}' is in colour, .* `--channels 3`"):
        load(train_data_dir=str(folder))
    assert load(train_data_dir=str(folder), channels=3).test[0].shape == (3, 8, 6)


def test_levels_that_come_later_are_refused_with_the_option(tmp_path, load):
    """A dark image of 256 levels among those of 4 would be read as a bright one; `levels` reads both."""
    (tmp_path / "set").mkdir()
    for i in range(12):
        content = np.random.default_rng(i).integers(0, 4, 48).astype(np.uint8).tobytes()
        (tmp_path / "set" / f"{i:02d}.pgm").write_bytes(b"P5 8 6 3\n" + content)
    name = unlike_the_first(load, tmp_path / "set")
    dark = Path(name).read_bytes().removeprefix(b"P5 8 6 3\n")
    Path(name).write_bytes(b"P5 8 6 255\n" + dark)
    with pytest.raises(ValueError, match=f"Image '{name}' can hold 256 levels, but the first .* 4: .* `--levels`"):
        load(train_data_dir=str(tmp_path / "set"))
    data = load(train_data_dir=str(tmp_path / "set"), levels=256)
    assert data.test.raw(data.test[0]).tobytes() == dark and data.train[0].max() == 1


def test_colour_is_resized_whatever_the_levels(tmp_path, load):
    """Pillow resizes no colour of more than 8 bits; each channel is resized by itself."""
    folder = write_folder(tmp_path / "set", 12, mode="RGB")
    small = load(train_data_dir=folder, resolution=4).train[0]
    wide = load(train_data_dir=folder, resolution=4, levels=65536).train[0]
    torch.testing.assert_close(small, wide, rtol=0, atol=2.02 / 255)  # two roundings to a level


def test_a_data_file_has_no_configuration(tmp_path, load):
    """It would be named as the data, which it is not."""
    (tmp_path / "rows.csv").write_text("image\na.png\n")
    with pytest.raises(ValueError, match="`--dataset_config_name` 'own' has no effect: .* is a file"):
        load(dataset_name=str(tmp_path / "rows.csv"), dataset_config_name="own")


def test_images_of_fewer_levels_are_taken_where_they_fall_on_the_data_s(tmp_path, load):
    """Black and white among 256 levels; 17 levels lie between them, and the file is named."""
    folder = Path(write_folder(tmp_path / "set", 12, size=(4, 4)))
    (folder / "005.png").unlink()
    PIL.Image.new("1", (4, 4), 1).save(folder / "005.png")
    data = load(train_data_dir=str(folder))
    white = [x_0 for part in (data.train, data.validation, data.test) for x_0 in part if (x_0 == 1).all()]
    assert data.levels == 256 and len(white) == 1
    (folder / "006.pgm").write_bytes(b"P5 4 4 16\n" + bytes(range(16)))
    with pytest.raises(ValueError, match=r"006\.pgm' has 17 levels, which lie between the 256"):
        data = load(train_data_dir=str(folder))
        for part in (data.train, data.validation, data.test):
            list(part.batches(8))


@pytest.mark.parametrize("dtype, levels", [("uint8", 256), ("uint16", 65536)])
@pytest.mark.parametrize("shape", [(4, 4), (3, 4, 4)])
def test_arrays_have_the_levels_of_their_type(tmp_path, load, dtype, levels, shape):
    """Grey without an axis for it, or channels first."""
    k = np.random.default_rng(0).integers(0, levels, (12, *shape)).astype(dtype)
    kind = {2: datasets.Array2D, 3: datasets.Array3D}[len(shape)](shape, dtype)
    rows = datasets.Dataset.from_dict({"x": list(k)}, features=datasets.Features({"x": kind}))
    rows.to_parquet(str(tmp_path / "a.parquet"))
    data = load(dataset_name=str(tmp_path / "a.parquet"), image_column="x")
    assert (data.levels, data.channels, data.size) == (levels, 3 if len(shape) == 3 else 1, (4, 4))
    seen = [as_stored(x_0, levels) for part in (data.train, data.validation, data.test) for x_0 in part]
    assert contents(seen) == contents(k)
    assert from_record(data.record, cache_dir=str(tmp_path / "cache")).record == data.record


@pytest.mark.parametrize(
    "low, options, message",
    [
        (0, {}, "holds int64, which does not say how many levels: give `--levels`"),
        (-1000, {"levels": 4096}, "levels from -1000 to .*outside 0 .. 4095. Shift the data"),
        (0, {"levels": 100}, "outside 0 .. 99"),
        (0, {"levels": 4096, "resolution": 8}, "`--resolution` resizes images"),
        (0, {"levels": 4096, "channels": 3}, "`--channels 3` contradicts column .image., whose arrays have 1"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path, load, low, options, message):
    """With the fix, as signed CT numbers are."""
    rows = [json.dumps({"image": (np.arange(16).reshape(4, 4) * 200 + low).tolist()}) for _ in range(12)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    with pytest.raises(ValueError, match=message):
        load(dataset_name=str(tmp_path / "a.jsonl"), **options)


def test_floats_off_their_levels_are_refused(tmp_path, load):
    """Every array when it is read, by its number."""
    rows = [json.dumps({"image": np.full((4, 4), 1 - 2 * i / 16).tolist()}) for i in range(12)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    assert load(dataset_name=str(tmp_path / "a.jsonl"), levels=17).levels == 17
    with pytest.raises(ValueError, match="Array number .*must lie on the 16 levels"):
        list(load(dataset_name=str(tmp_path / "a.jsonl"), levels=16).train.batches(8))


def test_a_turned_photograph_is_upright(tmp_path, load):
    """The EXIF orientation is followed, as `datasets` itself does when it decodes."""
    folder = tmp_path / "set"
    folder.mkdir()
    for i in range(6):
        image = random_image(np.random.default_rng(i), (8, 16), "RGB")
        exif = image.getexif()
        exif[EXIF_ORIENTATION] = QUARTER_TURN
        image.save(folder / f"{i}.png", exif=exif)
    data = load(train_data_dir=str(folder))
    stock = datasets.load_dataset("imagefolder", data_dir=str(folder), cache_dir=str(tmp_path / "cache"))["train"]
    expected = contents(np.asarray(row["image"]).transpose(2, 0, 1) for row in stock)
    seen = sum((contents(levels_of(part)) for part in (data.train, data.validation, data.test)), Counter())
    assert data.size == (16, 8)
    assert seen == expected


# Resizing


def test_resolution_cuts_out_the_centre(tmp_path, load):
    """Of three squares side by side (or on top of each other), the middle one is kept without a change."""
    rng = np.random.default_rng(0)
    middle = [rng.integers(0, 256, (8, 8), dtype=np.uint8) for _ in range(6)]
    border = np.full((8, 8), 255, np.uint8)
    (tmp_path / "set").mkdir()
    for i, square in enumerate(middle):
        stacked = np.concatenate([border, square, border], axis=i % 2)
        PIL.Image.fromarray(stacked).save(tmp_path / "set" / f"{i}.png")
    data = load(train_data_dir=str(tmp_path / "set"), resolution=8)
    seen = sum((contents(levels_of(part)) for part in (data.train, data.validation, data.test)), Counter())
    assert data.size == (8, 8) and seen == contents(middle)


@pytest.mark.parametrize("size", [(16, 16), (16, 40), (33, 16), (4, 4), (5, 3)])
def test_resolution_resizes(tmp_path, load, size):
    """Larger, smaller and non-square images all get the size asked for, upright, on the grid of 8-bit levels."""
    (tmp_path / "set").mkdir()
    image = np.zeros(size, np.uint8)
    image[-(size[0] // 2) :] = 255
    for i in range(4):
        PIL.Image.fromarray(image).save(tmp_path / "set" / f"{i}.png")
    x_0 = load(train_data_dir=str(tmp_path / "set"), resolution=8).train[0]
    assert x_0.shape == (1, 8, 8)
    check_data(x_0[None], 256)
    assert (x_0[0, 0] == -1).all() and (x_0[0, -1] == 1).all()
    assert (x_0[0] == x_0[0, :, :1]).all() and (x_0[0].diff(dim=0) >= 0).all()


def test_resolution_takes_images_of_any_size(tmp_path, load):
    """A folder of unequal sizes works once --resolution is given."""
    rng = np.random.default_rng(0)
    (tmp_path / "set").mkdir()
    for i, size in enumerate([(9, 14), (8, 8), (20, 11), (5, 5)]):
        random_image(rng, size, "RGB").save(tmp_path / "set" / f"{i}.png")
    data = load(train_data_dir=str(tmp_path / "set"), resolution=8)
    assert {x_0.shape for part in (data.train, data.validation, data.test) for x_0 in part.batches(1)} == {
        (1, 3, 8, 8)
    }


# Parquet


def test_parquet_uses_its_own_splits(tmp_path, load):
    """Its train, validation and test splits are taken as they are, in their order."""
    folder, levels = write_parquet(tmp_path / "set", {"train": 20, "validation": 6, "test": 8})
    data = load(dataset_name=folder)
    assert (data.size, data.channels, data.levels) == ((8, 8), 1, 256)
    for split in ("train", "validation", "test"):
        assert np.array_equal(np.stack(levels_of(getattr(data, split)))[:, 0], np.stack(levels[split]))


def test_parquet_without_a_test_split_scores_its_validation_split(tmp_path, load):
    """Then the validation images are made from the training images."""
    folder, levels = write_parquet(tmp_path / "set", {"train": 40, "validation": 6})
    data = load(dataset_name=folder)
    assert sizes(data) == (38, 2, 6) and data.record["test_split"] == "validation"
    assert contents(levels_of(data.test)) == contents(levels["validation"])
    assert contents(levels_of(data.train)) + contents(levels_of(data.validation)) == contents(levels["train"])


def test_named_splits(tmp_path, load):
    """--train_split and --test_split take any split, and a training split is never the test split by default."""
    folder, levels = write_parquet(tmp_path / "set", {"train": 20, "test": 30})
    data = load(dataset_name=folder, train_split="test")
    assert data.record["test_split"] is None and sum(sizes(data)) == 30
    data = load(dataset_name=folder, train_split="test", test_split="train")
    assert contents(levels_of(data.test)) == contents(levels["train"])


def test_training_on_the_test_split_is_refused(tmp_path, load):
    """The same split under both names would score images that were trained on."""
    folder, _ = write_parquet(tmp_path / "set", {"train": 20, "test": 30})
    with pytest.raises(ValueError, match="test_split"):
        load(dataset_name=folder, train_split="train", test_split="train")


def test_a_single_parquet_file(tmp_path, load):
    """--dataset_name takes a data file too, as its help says."""
    folder, _ = write_parquet(tmp_path / "set", {"train": 20})
    data = load(dataset_name=str(next(Path(folder).glob("data/*.parquet"))))
    assert sum(sizes(data)) == 20


def test_missing_column_lists_the_columns(tmp_path, load):
    """The message says what there is to choose from."""
    folder, _ = write_parquet(tmp_path / "set", {"train": 20})
    with pytest.raises(ValueError, match=r"no column 'img'; it has \['image', 'label'\]"):
        load(dataset_name=folder, image_column="img")


@pytest.mark.parametrize("option", ["train_split", "test_split"])
def test_unknown_split_lists_the_splits(tmp_path, load, option):
    """The message says what there is to choose from."""
    folder, _ = write_parquet(tmp_path / "set", {"train": 20, "test": 5})
    with pytest.raises(ValueError, match=r"no split 'dev'; it has \['test', 'train'\]"):
        load(dataset_name=folder, **{option: "dev"})


def test_empty_data_set_is_refused(tmp_path, load):
    """Parquet files without a row."""
    folder, _ = write_parquet(tmp_path / "set", {"train": 0})
    with pytest.raises(ValueError, match="no data|empty"):
        load(dataset_name=folder)


# Reading


def test_batches_hold_every_image_once_in_order(digits):
    """Whatever the batch size, the last batch holds the rest."""
    items = torch.stack([digits.test[i] for i in range(297)])
    for batch_size in (1, 64, 297, 1000):
        batches = list(digits.test.batches(batch_size))
        assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
        assert 0 < len(batches[-1]) <= batch_size
        assert torch.equal(torch.cat(batches), items)


@pytest.mark.parametrize("limit, expected", [(1, [1]), (4, [4]), (10, [4, 4, 2]), (12, [4, 4, 4])])
def test_batches_stop_at_the_limit(digits, limit, expected):
    """The first `limit` images, no more read than that."""
    batches = list(digits.test.batches(4, limit))
    assert [len(batch) for batch in batches] == expected
    assert torch.equal(torch.cat(batches), torch.stack([digits.test[i] for i in range(limit)]))


def test_a_limit_above_the_number_of_images_is_none(digits):
    """Nothing is repeated to reach it."""
    assert [len(batch) for batch in digits.validation.batches(50, 10_000)] == [50, 25]


@pytest.mark.skipif(not MNIST.is_dir(), reason=f"no MNIST in {MNIST}")
def test_mnist(load):
    """MNIST in the Hub's layout: 60000 and 10000 grey images of 28 x 28."""
    data = load(dataset_name=str(MNIST))
    assert len(data.train) + len(data.validation) == 60_000
    assert len(data.validation) == 1024 and len(data.test) == 10_000
    assert (data.size, data.channels, data.levels) == ((28, 28), 1, 256)
    x_0 = next(data.test.batches(256))
    check_data(x_0, 256)
    assert x_0.min() == -1 and x_0.max() == 1


@pytest.mark.parametrize(
    "fault, named",
    [
        (FileNotFoundError("Couldn't find\n any data file."), True),
        (pyarrow.ArrowInvalid("no parquet"), True),
        (pyarrow.ArrowNotImplementedError("no such type"), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (ValueError("Image number 3 cannot be read"), False),
    ],
)
def test_only_faults_of_the_data_set_blame_it(fault, named):
    """A full disk is none of the Hub's."""
    with pytest.raises(type(fault) if not named else ValueError) as raised:
        with named_data("some/thing"):
            raise fault
    assert (raised.value is fault) != named
    if named:
        said = " ".join(str(fault).split()).rstrip(".")
        assert str(raised.value) == f"--dataset_name some/thing cannot be loaded: {said}. {HUB_HINT}"


def broken(cause):
    """What `datasets` raises when a file's content stops it."""
    try:
        raise datasets.exceptions.DatasetGenerationError("An error occurred") from cause
    except datasets.exceptions.DatasetGenerationError as error:
        return error


@pytest.mark.parametrize(
    "fault, kind, message",
    [
        (
            broken(UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid")),
            ValueError,
            "train.csv cannot be loaded: Uni",
        ),
        (StopIteration(), ValueError, "train.csv cannot be loaded: StopIteration"),
        (broken(OSError(errno.ENOSPC, "No space left on device")), OSError, "No space left"),
    ],
)
def test_faults_of_datasets_are_told_as_values_or_the_system_s(tmp_path, load, monkeypatch, fault, kind, message):
    """By their cause; a full disk stays one."""

    def load_dataset(*args, **options):
        raise fault

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (tmp_path / "train.csv").write_text("")
    with pytest.raises(kind, match=message) as raised, named_data("train.csv"):
        load(dataset_name=str(tmp_path / "train.csv"))
    assert getattr(raised.value, "errno", None) == (errno.ENOSPC if kind is OSError else None)


@pytest.mark.parametrize(
    "record, name",
    [
        ({"test_split": "test"}, "scikit-learn's digits, split 'test'"),
        ({"dataset_name": "ylecun/mnist", "split": "train"}, "ylecun/mnist, split 'train'"),
        ({"dataset_name": "a/b", "dataset_config_name": "c", "split": "test"}, "a/b (c), split 'test'"),
        (
            {"train_data_dir": "x", "train_split": "train", "test_split": None},
            "the folder x, images kept back from split 'train'",
        ),
    ],
)
def test_data_has_a_name(record, name):
    """Of a training's record and of an evaluation's."""
    assert data_name(record) == name
