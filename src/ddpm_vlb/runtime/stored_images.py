"""What an image file stores: its levels, its channels and its transparency, which Pillow's mode does not tell.

Pillow cuts colour of 16 bits to 8 and spreads fewer bits over 256 levels without a word. Here an image is integers
0 .. levels - 1 as they lie in the file, or it is refused by name.
"""

import io
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageFile
import PIL.ImageOps

GREY_MODES = ("1", "L", "I", "I;16", "I;16L", "I;16B", "I;16N")
COLOUR_MODES = ("RGB", "RGBX", "P")
ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")
ONE_PICTURE = ("MPO",)  # a photograph with previews of itself
_SIXTEEN = (";16B", ";16L", ";16N", "SGI16")  # Pillow's names of what it cuts in colour; "BGR;16" has 5 bits of each
_BITS, _SAMPLE_FORMAT, _UNSIGNED = 258, 339, 1  # of TIFF


class StoredImage(NamedTuple):
    """An image as it is stored.

    Args:
        k: levels (H, W, C), integers; C is 1, or 3 where the file could hold colour.
        levels: how many levels the file could hold.
    """

    k: np.ndarray
    levels: int

    @property
    def grey(self) -> bool:
        """Whether one channel says all."""
        return self.k.shape[2] == 1 or bool((self.k == self.k[..., :1]).all())

    def at_levels(self, levels: int, name: str) -> np.ndarray:
        """The same values of 0 .. levels - 1: fewer stored levels are spread, where they fall on some of these."""
        if self.levels >= levels:
            return self.k
        factor, rest = divmod(levels - 1, self.levels - 1)
        if rest:
            raise ValueError(
                f"Image {name} has {self.levels} levels, which lie between the {levels} of the data: store all images "
                "with one number of levels."
            )
        return (self.k.astype(np.int32) * factor).astype(np.uint8 if levels <= 256 else np.int32)


def image_name(encoded: dict[str, Any] | None, index: int) -> str:
    """The file, or the position where there is none."""
    return f"{encoded['path']!r}" if encoded and encoded.get("path") else f"number {index}"


def decode_image(encoded: dict[str, Any] | None, index: int) -> StoredImage:
    """Decode one image; what cannot be read, or not as it is stored, is named.

    Args:
        encoded: its "bytes", or the "path" of its file.
        index: its position.

    Raises:
        ValueError: no image, or one that would lose something.
    """
    if encoded is None or (encoded["bytes"] is None and encoded["path"] is None):
        raise ValueError(f"Image number {index} is missing: its row is null.")
    name = image_name(encoded, index)
    try:
        content = encoded["bytes"] if encoded["bytes"] is not None else Path(encoded["path"]).read_bytes()
        opened = PIL.Image.open(io.BytesIO(content))
        frames = 1 if opened.format in ONE_PICTURE else getattr(opened, "n_frames", 1)
        levels = _stored_levels(opened, content)
        opened.load()
        image = PIL.ImageOps.exif_transpose(opened)
    except PIL.UnidentifiedImageError as error:
        raise ValueError(f"Image {name} cannot be read: it is of no kind that Pillow knows.") from error
    except Exception as error:  # Pillow raises whatever a broken file leads to
        raise ValueError(f"Image {name} cannot be read: {type(error).__name__}: {error}") from error
    if frames > 1:
        raise ValueError(f"Image {name} has {frames} frames, of which one would be taken. Store each in its own file.")
    return StoredImage(_levels_of(_opaque(image, name), levels, name), levels)


def _stored_levels(image: PIL.ImageFile.ImageFile, content: bytes) -> int:
    """How many levels the file can hold; called before Pillow forgets how it reads it."""
    codec, arguments = (image.tile[0][0], image.tile[0][3]) if getattr(image, "tile", None) else ("", "")
    raw, *others = arguments if isinstance(arguments, tuple) else (arguments,)
    if codec.startswith("ppm"):
        return others[0] + 1 if others else 2  # a bitmap names no highest level
    if image.format == "TIFF":
        bits = max(image.tag_v2.get(_BITS, (1,)))  # type: ignore[attr-defined]
        signed = any(kind != _UNSIGNED for kind in image.tag_v2.get(_SAMPLE_FORMAT, ()))  # type: ignore[attr-defined]
        if signed:
            raise ValueError("its numbers are signed or floats; shift integers to levels 0 .. N - 1, and store those")
        return 256 if image.mode == "P" else 2**bits
    if image.format in ("JPEG2000", "AVIF"):
        return 2 ** _bits_of_codestream(content)
    if image.mode == "1":
        return 2
    if any(own in f"{raw} {codec}" for own in _SIXTEEN) or image.mode.startswith("I;16"):
        return 2**16
    if image.mode == "L" and raw in ("L;2", "L;4"):
        return 2 ** int(raw[2:])
    return 2**32 if image.mode in ("I", "F") else 256


def _bits_of_codestream(content: bytes) -> int:
    """Bits of a channel, of JPEG 2000 (the SIZ marker) or AVIF (its configuration's flags)."""
    siz, av1 = content.find(b"\xff\x4f\xff\x51"), content.find(b"av1C")
    if siz >= 0:
        count = int.from_bytes(content[siz + 40 : siz + 42], "big")
        bits = max((own & 0x7F) + 1 for own in content[siz + 42 : siz + 42 + 3 * count : 3])
        if bits not in (8, 16):
            raise ValueError(f"its {bits} bits would be read as others: convert it to 8 or 16")
        return bits
    return 8 if av1 < 0 or not content[av1 + 6] & 0x40 else 12


def _opaque(image: PIL.Image.Image, name: str) -> PIL.Image.Image:
    """The image without an alpha that says nothing."""
    hidden = image.info.get("transparency")
    if image.mode in ALPHA_MODES:
        whole = image.convert("LA" if image.mode == "La" else "RGBA")
    elif hidden is None:
        return image
    elif image.mode in ("1", "L", "RGB", "P"):
        whole = image.convert("RGBA")
    elif not bool((np.asarray(image) == hidden).any()):
        return image
    else:
        whole = None
    if whole is None or whole.getchannel("A").getextrema()[0] < 255:  # type: ignore[operator]
        raise ValueError(
            f"Image {name} is transparent in places, where its colours mean nothing: lay it on a background, and "
            "store it without transparency."
        )
    return image if image.mode in ("1", "L") else whole.convert("RGB")


def _levels_of(image: PIL.Image.Image, levels: int, name: str) -> np.ndarray:
    """Integers (H, W, C)."""
    if image.mode not in (*GREY_MODES, *COLOUR_MODES):
        raise ValueError(f"Image {name} has the mode {image.mode}, which is neither grey nor RGB: convert it first.")
    grey = image.mode in GREY_MODES
    if levels > (2**16 if grey else 2**8):
        raise ValueError(
            f"Image {name} has {levels} levels and the mode {image.mode}: of more than 16 bits in grey, or 8 in "
            "colour, only a part would be read. Convert the images first."
        )
    k = np.asarray(image if grey else image.convert("RGB"))
    if k.size == 0:
        raise ValueError(f"Image {name} has no pixels.")
    # What Pillow shows the highest level as.
    highest = 255 if k.dtype == np.uint8 else 65535 if image.mode == "I" else levels - 1
    if highest != levels - 1:
        k = (k * ((levels - 1) / highest)).round()
    return k.astype(np.uint8 if levels <= 256 else np.int32).reshape(*k.shape[:2], -1)
