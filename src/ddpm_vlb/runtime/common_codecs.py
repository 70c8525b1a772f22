"""What the codecs that anyone has make of the same images: PNG, xz, and JPEG XL where `imagecodecs` is installed."""

import contextlib
import importlib
import io
import lzma
import math

import numpy as np
import PIL.Image


def sizes(k: np.ndarray, levels: int) -> dict[str, int]:
    """Bytes of images by the codec's name.

    Args:
        k: levels (B, C, H, W), B of 1 or more and C 1 or 3.
        levels: how many there are.
    """
    kind = np.uint8 if levels <= 256 else np.uint16
    k = np.moveaxis(k.astype(kind), 1, -1)
    picture = mosaic(k)
    found = {
        "PNG files": sum(map(_png, k)),
        "one PNG of all": _png(picture),
        "xz": len(lzma.compress(k.tobytes(), preset=9 | lzma.PRESET_EXTREME)),
    }
    with contextlib.suppress(ImportError):
        jpegxl_encode = importlib.import_module("imagecodecs").jpegxl_encode
        found["one JPEG XL of all"] = len(jpegxl_encode(picture, lossless=True, effort=9))
    return found


def mosaic(k: np.ndarray) -> np.ndarray:
    """Images side by side in rows, as one that is as square as can be; what is left over is 0.

    Args:
        k: images (B, H, W, C).
    """
    number, height, width, channels = k.shape
    columns = math.isqrt(number - 1) + 1
    rows = -(-number // columns)
    whole = np.zeros((rows * columns, height, width, channels), dtype=k.dtype)
    whole[:number] = k
    grid = whole.reshape(rows, columns, height, width, channels).transpose(0, 2, 1, 3, 4)
    return grid.reshape(rows * height, columns * width, channels)


def _png(k: np.ndarray) -> int:
    file = io.BytesIO()
    PIL.Image.fromarray(np.ascontiguousarray(k[..., 0] if k.shape[-1] == 1 else k)).save(file, "PNG", optimize=True)
    return file.tell()
