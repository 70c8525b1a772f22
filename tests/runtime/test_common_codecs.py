"""What other codecs make of the same images."""

import sys
import types

import numpy as np
import pytest

from ddpm_vlb.runtime.common_codecs import mosaic, sizes


@pytest.mark.parametrize("number, rows, columns", [(1, 1, 1), (4, 2, 2), (5, 2, 3), (7, 3, 3)])
def test_a_mosaic_shows_every_image_once(number, rows, columns):
    """In rows, as square as can be."""
    k = np.arange(1, number * 2 * 3 * 3 + 1).reshape(number, 2, 3, 3)
    picture = mosaic(k)
    assert picture.shape == (rows * 2, columns * 3, 3)
    for i, own in enumerate(k):
        row, column = divmod(i, columns)
        assert np.array_equal(picture[2 * row : 2 * row + 2, 3 * column : 3 * column + 3], own)
    assert picture.sum() == k.sum()


@pytest.mark.parametrize("channels, levels", [(1, 17), (3, 256), (1, 65536)])
def test_noise_takes_its_bits(channels, levels, monkeypatch):
    """No codec is below the entropy, and none is far above it; without `imagecodecs` there is no JPEG XL."""
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    k = np.random.default_rng(0).integers(0, levels, (40, channels, 16, 16))
    entropy = k.size * np.log2(levels) / 8
    found = sizes(k, levels)
    assert list(found) == ["PNG files", "one PNG of all", "xz"]
    assert all(0.999 * entropy < size < 2 * entropy for size in found.values())


def test_jpeg_xl_where_there_is_one(monkeypatch):
    """It gets the picture of all, and is told to lose nothing."""
    seen = []
    module = types.ModuleType("imagecodecs")
    module.jpegxl_encode = lambda picture, **options: seen.append((picture.shape, options)) or b"12345"
    monkeypatch.setitem(sys.modules, "imagecodecs", module)
    assert sizes(np.zeros((4, 1, 8, 8)), 17)["one JPEG XL of all"] == 5
    assert seen == [((16, 16, 1), {"lossless": True, "effort": 9})]
