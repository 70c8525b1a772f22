"""compress, decompress and inspect: what goes in comes out, under its name, and what cannot is refused in a line."""

import json
import re
import shutil

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DDPMPipeline, FlowMatchEulerDiscreteScheduler
from networks import attentive
from processes import reset_accelerate
from scoring_support import network, options_for, ours, stock, write_images

from ddpm_vlb import CompressedFile
from ddpm_vlb.commands import compress, decompress, inspect
from ddpm_vlb.runtime import reporting
from ddpm_vlb.runtime.image_data import load_image_data

STEPS = ("--num_inference_steps", 3)


def run(command, *options):
    """A command in this process, on the CPU."""
    reset_accelerate()
    return command.main([*map(str, options), "--cpu"])


def refusal(command, *options):
    """The line with which it refuses."""
    with pytest.raises(SystemExit) as stop:
        run(command, *options)
    assert "\n" not in stop.value.code
    return stop.value.code


def pixels(folder):
    """The images below a folder by their names."""
    return {path.relative_to(folder).as_posix(): np.asarray(PIL.Image.open(path)) for path in folder.rglob("*.png")}


def same(first, second):
    """Whether all images are alike, and their names."""
    return first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)


def digits(number):
    """The first digits of the test split by the names that they get."""
    images = load_image_data().test
    return {f"{i}.png": images.raw(images[i])[0] for i in range(number)}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Checkpoints: of 17 levels, one with other weights, and one that takes labels."""
    home, other = tmp_path_factory.mktemp("models"), network()
    other.conv_in.bias.data += 1
    return {
        "few": ours(home / "few", network(), levels=17),
        "other": ours(home / "other", other, levels=17),
        "classes": ours(home / "classes", network(1, 1, num_class_embeds=5), levels=17),
        "colour": stock(home / "colour", 3, 6, variance_type="learned_range"),
        "latents": ours(home / "latents", network(), levels=None, clip_sample=False),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five images of 17 levels, two of them in a folder of their own."""
    folder, rng = tmp_path_factory.mktemp("images") / "pictures", np.random.default_rng(0)
    (folder / "deep").mkdir(parents=True)
    for name in ("b", "a", "deep/é", "deep/a", "c.d"):
        PIL.Image.fromarray(rng.integers(0, 17, (8, 8), dtype=np.uint8)).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory, models, folder):
    """A file of three chunks, and what its making returned."""
    out = tmp_path_factory.mktemp("made") / "few.dvlb"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ddpm_vlb.compression._CHUNK_VALUES", 2 * 64)
        numbers = run(compress, folder, out, "--model", models["few"], *STEPS)
    return out, numbers


def test_a_folder_comes_back(models, folder, made, tmp_path):
    """Pixels, names, those of folders in it too, and nothing else; its numbers are those of the file."""
    out, numbers = made
    assert run(decompress, out, tmp_path / "out", "--model", models["few"]) == 5
    assert same(pixels(tmp_path / "out"), pixels(folder))
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and len(list(out.parent.iterdir())) == 1
    assert numbers["bytes"] == out.stat().st_size and numbers["bits_per_dim"] == numbers["bytes"] / 40
    assert 0 < numbers["bound"] < np.inf and numbers["others"]["PNG files"] > numbers["others"]["one PNG of all"] > 0


def test_compressing_again_gives_the_same_file(models, made, tmp_path, monkeypatch):
    """The order is kept, too; files that are named one by one have the order in which they are named."""
    monkeypatch.setattr("ddpm_vlb.compression._CHUNK_VALUES", 2 * 64)
    run(decompress, made[0], tmp_path / "out", "--model", models["few"])
    run(compress, tmp_path / "out", tmp_path / "again.dvlb", "--model", models["few"], *STEPS)
    assert (tmp_path / "again.dvlb").read_bytes() == made[0].read_bytes()
    files = [tmp_path / "out" / name for name in ("c.d.png", "a.png")]
    run(compress, *files, tmp_path / "two.dvlb", "--model", models["few"], *STEPS)
    file = CompressedFile.read((tmp_path / "two.dvlb").read_bytes())
    assert file.chunk(0).names == ("c.d.png", "a.png")


@pytest.mark.parametrize(
    "verify, bar",
    [("--verify", "Compressing and decoding again: 100%.* 6/6 "), ("--no-verify", "Compressing: 100%.* 3/3 ")],
)
def test_the_bar_is_of_all_that_is_done(models, tmp_path, capsys, verify, bar):
    """It says whether it decodes again, which takes as long, and ends where nothing is left; so does decompress's."""
    run(compress, tmp_path / "a.dvlb", "--model", models["few"], *STEPS, "--num_images", 3, verify)
    run(decompress, tmp_path / "a.dvlb", tmp_path / "out", "--model", models["few"])
    said = capsys.readouterr().err
    assert re.search(bar, said) and re.search("Decompressing: 100%.* 3/3 ", said)


def test_the_digits_are_numbered(models, tmp_path):
    """Without images the test split of the digits; the default is 20 steps; the picture shows all but the seeds."""
    out, figures = tmp_path / "digits.dvlb", []
    where = ("--model", models["few"], "--num_images", 5, "--no-verify", "--plot", tmp_path / "bits.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reporting, "save", lambda figure, path: figures.append((figure, path)))
        numbers = run(compress, out, *where)
    points = np.array(figures[0][0].axes[0].collections[0].get_offsets())
    assert figures[0][1] == tmp_path / "bits.png" and len(points) == 3
    assert np.diff(points).mean() == pytest.approx(numbers["from_bound"], rel=1e-6)
    assert points[:, 1].mean() == pytest.approx(numbers["net_bits_per_dim"])
    assert CompressedFile.read(out.read_bytes()).header.steps == 20
    run(decompress, out, tmp_path / "out", "--model", models["few"])
    assert same(pixels(tmp_path / "out"), digits(5))


def test_class_labels_come_back(models, tmp_path):
    """From a folder to a folder; without labels it is refused."""
    folder, labels = tmp_path / "in", {"0.png": 4, "1.png": 0, "2.png": 4, "3.png": 1}
    folder.mkdir()
    for name in labels:
        PIL.Image.fromarray(np.full((8, 8), labels[name], dtype=np.uint8)).save(folder / name)
    where = (folder, tmp_path / "a.dvlb", "--model", models["classes"], *STEPS)
    assert "no labels: give one folder with a metadata.jsonl" in refusal(compress, *where)
    lines = [json.dumps({"file_name": name, "label": label}) + "\n" for name, label in labels.items()]
    (folder / "metadata.jsonl").write_text("".join(lines))
    run(compress, *where)
    run(decompress, tmp_path / "a.dvlb", tmp_path / "out", "--model", models["classes"])
    assert same(pixels(tmp_path / "out"), pixels(folder))
    assert (tmp_path / "out" / "metadata.jsonl").read_text() == (folder / "metadata.jsonl").read_text()


def test_every_image_of_a_single_split(models, tmp_path):
    """Nothing is kept back for a pilot; labels of a data set are read and written."""
    name, levels = write_images(tmp_path / "set", {"train": 5}, levels=17, labels={"train": [3, 1, 4, 1, 0]})
    data = (*options_for(tmp_path, name), "--split", "train")
    run(compress, tmp_path / "a.dvlb", "--model", models["classes"], *data, *STEPS)
    run(decompress, tmp_path / "a.dvlb", tmp_path / "out", "--model", models["classes"])
    assert same(pixels(tmp_path / "out"), {f"{i}.png": own for i, own in enumerate(levels["train"])})
    rows = [json.loads(line) for line in (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()]
    assert [row["label"] for row in rows] == [3, 1, 4, 1, 0]
    (tmp_path / "out" / "metadata.jsonl").write_text(
        '{"file_name": "1.png", "label": 9}\n{"file_name": "x", "label": 2}'
    )
    run(decompress, tmp_path / "a.dvlb", tmp_path / "out", "--model", models["classes"], "--overwrite")
    others = [json.loads(line) for line in (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()]
    assert others == [*rows, {"file_name": "x", "label": 2}]


def test_colour(models, tmp_path):
    """Of a stock checkpoint with learned variances, in 256 levels."""
    k = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    for name, own in zip("ab", k):
        PIL.Image.fromarray(own).save(tmp_path / f"{name}.bmp")
    files = (tmp_path / "a.bmp", tmp_path / "b.bmp")
    run(compress, *files, tmp_path / "c.dvlb", "--model", models["colour"], *STEPS, "--no-verify")
    run(decompress, tmp_path / "c.dvlb", tmp_path / "out", "--model", models["colour"])
    assert same(pixels(tmp_path / "out"), {"a.png": k[0], "b.png": k[1]})


def test_a_folder_of_32_by_32_in_colour(tmp_path):
    """With attention in the network, and a name in another folder."""
    ours(tmp_path / "large", attentive(channels=3, size=32), variance_type="learned_range")
    (tmp_path / "in" / "deep").mkdir(parents=True)
    k = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    for name, own in zip(("b", "a", "deep/a"), k):
        PIL.Image.fromarray(own).save(tmp_path / "in" / f"{name}.png")
    where = ("--model", tmp_path / "large")
    run(compress, tmp_path / "in", tmp_path / "c.dvlb", *where, "--num_inference_steps", 2, "--no-verify")
    assert run(decompress, tmp_path / "c.dvlb", tmp_path / "out", *where) == 3
    assert same(pixels(tmp_path / "out"), pixels(tmp_path / "in"))


def test_a_flow_network(tmp_path):
    """On the chain of its --ratios, which decompressing must be told too."""
    DDPMPipeline(network(), FlowMatchEulerDiscreteScheduler()).save_pretrained(tmp_path / "flow")
    where, ratios = ("--model", tmp_path / "flow"), ("--ratios", 0.05, 50)
    run(compress, tmp_path / "a.dvlb", *where, *ratios, *STEPS, "--num_images", 4, "--levels", 17)
    said = refusal(decompress, tmp_path / "a.dvlb", tmp_path / "out", *where)
    assert "with another network than --model: their weights, or the levels of a path, differ" in said
    assert run(decompress, tmp_path / "a.dvlb", tmp_path / "out", *where, *ratios) == 4
    assert same(pixels(tmp_path / "out"), digits(4))


@pytest.fixture
def damaged(made, tmp_path):
    """A file whose second chunk is not whole."""
    data = bytearray(made[0].read_bytes())
    data[CompressedFile.read(bytes(data)).places[1][0] + 12] ^= 4
    (tmp_path / "damaged.dvlb").write_bytes(data)
    return tmp_path / "damaged.dvlb"


def test_a_damaged_chunk_costs_itself(models, folder, damaged, tmp_path):
    """The others are written, and the error names it and its images."""
    said = refusal(decompress, damaged, tmp_path / "out", "--model", models["few"])
    assert f"{damaged}: chunk 1 of 3 (images number 2 to 3) is lost" in said and "The other 3 images are in" in said
    whole = pixels(folder)
    names = sorted(whole)
    assert same(pixels(tmp_path / "out"), {name: whole[name] for name in (names[0], names[1], names[4])})


def test_what_is_not_decoded_to_itself_is_lost(models, made, tmp_path, monkeypatch):
    """Its images are named; where all are lost no folder is made."""

    def differs(*given):
        raise ValueError("`data` is not decoded to what was encoded")

    monkeypatch.setattr("ddpm_vlb.compression.BitsBackCodec.decode_part", differs)
    said = refusal(decompress, made[0], tmp_path / "out", "--model", models["few"])
    assert "chunk 2 of 3 (images number 4 to 4, deep/é.png to deep/é.png) is lost" in said
    assert not list(tmp_path.iterdir())


def test_inspect(made, damaged, capsys, monkeypatch):
    """Images, bytes, bits/dim and what made it, without a network; a damaged chunk is told, and the others."""
    monkeypatch.setattr("ddpm_vlb.commands.decompress.codec_pipeline", None)
    inspect.main([str(made[0])])
    said = capsys.readouterr().out
    size = made[0].stat().st_size
    assert f"{made[0]}: 5 images of 1 x 8 x 8 in 17 levels, {size} bytes, {size / 40:.3f} bits/dim" in said
    assert "of 3 steps, in float64" in said and f"made with torch {torch.__version__.split('+')[0]} " in said
    assert said.count("lanes 1, with names") == 3 and "chunk 2: images number 4 to 4" in said
    with pytest.raises(SystemExit, match=r"damaged in chunks \[1\] of 3"):
        inspect.main([str(damaged), str(made[0])])
    assert "DAMAGED" in (said := capsys.readouterr().out) and said.count("with names") == 5


@pytest.mark.parametrize(
    "model, message", [("other", "with another network than --model:"), ("colour", "but --model takes")]
)
def test_another_model_is_refused(models, made, tmp_path, model, message):
    """Before anything is written."""
    said = refusal(decompress, made[0], tmp_path / "out", "--model", models[model])
    assert message in said and str(made[0]) in said and not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", [lambda data: data[:-9], lambda data: b"PNG" + data, lambda data: b""])
def test_a_file_that_is_none_is_refused(made, tmp_path, change):
    """By both, before a checkpoint is looked for."""
    (tmp_path / "wrong").write_bytes(change(made[0].read_bytes()))
    for command, more in ((decompress, (tmp_path / "out", "--model", "nowhere")), (inspect, ())):
        reset_accelerate()
        with pytest.raises(SystemExit, match=f"{tmp_path / 'wrong'} is "):
            command.main([str(tmp_path / "wrong"), *map(str, more)])


def test_nothing_is_replaced_unasked(models, made, tmp_path):
    """Neither a file nor images; with --overwrite what else lies there stays, and a file that is no such one too."""
    out = shutil.copy(made[0], tmp_path / "few.dvlb")
    where = ("--model", models["few"])
    assert "is there already: give another name, or --overwrite" in refusal(compress, out, *where)
    (tmp_path / "out").mkdir()
    for name in ("a.png", "mine.txt"):
        (tmp_path / "out" / name).write_text("mine")
    said = refusal(decompress, out, tmp_path / "out", *where)
    assert "a.png is there already" in said and (tmp_path / "out" / "a.png").read_text() == "mine"
    assert run(decompress, out, tmp_path / "out", *where, "--overwrite") == 5
    assert len(pixels(tmp_path / "out")) == 5 and (tmp_path / "out" / "mine.txt").read_text() == "mine"
    said = refusal(compress, tmp_path / "out" / "mine.txt", *where, "--overwrite")
    assert "is no compressed file, and is not replaced" in said


REFUSED = {
    "another size": ("few", lambda home: [image(home, 9)], "is 9 x 9, but the model takes 8 x 8"),
    "too many levels": ("few", lambda home: [image(home, 8, 200)], "has the level 200"),
    "no image": ("few", lambda home: [home / "nothing"], "there is no such file or folder"),
    "an empty folder": ("few", lambda home: [home], "There are no images in"),
    "two of one name": ("few", lambda home: [image(home, 8), image(home, 8)], "Two images are called"),
    "continuous": ("latents", lambda home: [image(home, 8)], "is of continuous data, which no number of bits holds"),
}


def image(home, size, level=0):
    """A file of one level."""
    PIL.Image.fromarray(np.full((size, size), level, dtype=np.uint8)).save(home / "image.png")
    return home / "image.png"


@pytest.mark.parametrize("kind", REFUSED)
def test_images_that_cannot_be_are_refused(models, tmp_path, kind):
    """In a line; no file is made."""
    model, given, message = REFUSED[kind]
    (tmp_path / "in").mkdir()
    said = refusal(compress, *given(tmp_path / "in"), tmp_path / "out.dvlb", "--model", models[model], *STEPS)
    assert message in said and not (tmp_path / "out.dvlb").exists()


def test_options_of_data_sets_have_no_effect_on_files(tmp_path, capsys):
    """And are refused."""
    with pytest.raises(SystemExit):
        run(compress, tmp_path, "out.dvlb", "--model", "nowhere", "--split", "train")
    assert "--split has no effect beside IMAGES" in capsys.readouterr().err


def test_a_file_that_is_not_there_is_named(models, tmp_path):
    """And a folder is none."""
    for name in ("nowhere.dvlb", "."):
        said = refusal(decompress, tmp_path / name, tmp_path / "out", "--model", models["few"])
        assert "there is no such file" in said
        with pytest.raises(SystemExit, match="there is no such file"):
            inspect.main([str(tmp_path / name)])
