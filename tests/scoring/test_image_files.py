"""Image files by their names, and as PNG files again."""

import io

import numpy as np
import pytest

from ddpm_vlb.runtime.stored_images import decode_image
from ddpm_vlb.scoring.image_files import as_png, check_png, find_images, png_names, read_labels


@pytest.mark.parametrize("channels, levels", [(1, 2), (1, 17), (1, 256), (1, 4096), (1, 65536), (3, 2), (3, 256)])
def test_a_png_holds_the_levels(channels, levels):
    """As they are, the least and the greatest among them; bits are black and white."""
    k = np.random.default_rng(0).integers(0, levels, (channels, 5, 7))
    k[0, 0, :2] = 0, levels - 1
    file = io.BytesIO()
    as_png(k, levels).save(file, "PNG")
    stored = decode_image({"bytes": file.getvalue(), "path": None}, 0)
    assert np.array_equal(stored.k.transpose(2, 0, 1), k) and stored.levels >= levels
    assert (stored.levels == 2) == ((channels, levels) == (1, 2))


@pytest.mark.parametrize("shape, levels", [((3, 8, 8), 257), ((2, 8, 8), 256), ((1, 8), 256), ((1, 8, 8), 2**17)])
def test_what_no_png_holds_is_refused(shape, levels):
    """Colour of more than 8 bits, other channels, signals."""
    with pytest.raises(ValueError, match="are no PNG files"):
        check_png(shape, levels)


def test_names_of_png_files():
    """The suffix is replaced, unless two would be one."""
    assert png_names(["b.jpg", "deep/a.tiff", "no", "a.b.c"]) == ["b.png", "deep/a.png", "no.png", "a.b.png"]
    assert png_names(["a.jpg", "a.png", "a.gif"]) == ["a.jpg.png", "a.png", "a.gif.png"]


@pytest.mark.parametrize("name", ["/etc/a", "../a", "a/../../b", "", "C:\\a", "..\\a", "c:a", ".", "a\0"])
def test_names_that_leave_the_folder_are_refused(name):
    """A file may come from anyone."""
    with pytest.raises(ValueError, match="no name of a file in a folder"):
        png_names(["good.png", name])


@pytest.mark.parametrize("names", [["a", "a"], ["a.jpg", "a.png", "a.jpg.png"]])
def test_names_that_are_the_same_are_refused(names):
    """One would replace the other."""
    with pytest.raises(ValueError, match="Two images would be called"):
        png_names(names)


def test_images_are_found_by_their_suffix(tmp_path):
    """In the order of their names; hidden files are not seen, others are told."""
    for name in ("b.PNG", "a/z.jpg", "a/b.txt", ".hidden.png", ".cache/a.png", "metadata.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = find_images([tmp_path])
    assert found.names == ["a/z.jpg", "b.PNG"] and found.left_out == ["a/b.txt"]
    assert found.paths == [str(tmp_path / name) for name in found.names]


def test_labels_of_either_file(tmp_path):
    """By name, whatever their order; the column may be another."""
    (tmp_path / "metadata.csv").write_text("file_name,kind\nb,1\na,0\n")
    assert read_labels([tmp_path], ["a", "b"], "kind") == [0, 1]
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a", "label": 3}\n')
    assert read_labels([tmp_path], ["a"], "label") == [3]


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"file_name": "b", "label": 3}\n', "has no 'label' of image 'a'"),
        ('{"file_name": "a", "label": "cat"}\n', "labels must be integers"),
        ('{"file_name": "a", "label": 1.5}\n', "labels must be integers"),
        ("{\n", "cannot be read"),
        ("3\n", "no objects"),
    ],
)
def test_labels_that_are_none_are_refused(tmp_path, text, message):
    """With the file's name."""
    (tmp_path / "metadata.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_labels([tmp_path], ["a"], "label")
