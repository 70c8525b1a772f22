"""What image files store is what is scored: levels, channels and transparency, whatever Pillow's mode says."""

import io
import struct
import zlib

import numpy as np
import PIL.Image
import pytest

from ddpm_vlb.runtime.stored_images import decode_image

GREY, COLOUR, GREY_ALPHA, COLOUR_ALPHA = 0, 2, 4, 6  # of a PNG's header


def decoded(content, path=None):
    """The image of a file's content."""
    return decode_image({"bytes": content, "path": path}, 7)


def file(array, kind="PNG", mode=None, **options):
    """The content of a file of this kind."""
    image, content = PIL.Image.fromarray(array), io.BytesIO()
    (image if mode is None else image.convert(mode)).save(content, kind, **options)
    return content.getvalue()


def drawn(high=256, shape=(6, 8), dtype=np.uint8):
    return np.random.default_rng(0).integers(0, high, shape).astype(dtype)


def png(bits, colour, rows):
    """A PNG by hand, of rows of bytes."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, channels = len(rows), {GREY: 1, COLOUR: 3, GREY_ALPHA: 2, COLOUR_ALPHA: 4}[colour]
    header = struct.pack(">IIBBBBB", 8 * len(rows[0]) // (bits * channels), height, bits, colour, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "kind, options", [("PNG", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("PPM", {}), ("JPEG2000", {})]
)
def test_grey_of_16_bits_is_whole(kind, options):
    """All 65536 levels, of every kind that holds them."""
    k = drawn(65536, dtype=np.uint16)
    stored = decoded(file(k, kind, **options))
    assert stored.levels == 65536 and np.array_equal(stored.k[..., 0], k)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_grey_of_few_bits_has_few_levels(bits):
    """Not the 256 over which Pillow spreads them."""
    k = drawn(2**bits, (4, 8))
    packed = np.packbits(np.unpackbits(k[..., None], axis=2)[..., -bits:].reshape(4, -1), axis=1)
    stored = decoded(png(bits, GREY, [row.tobytes() for row in packed]))
    assert stored.levels == 2**bits and np.array_equal(stored.k[..., 0], k)


@pytest.mark.parametrize("highest", [1, 16, 255, 4095])
def test_a_pgm_says_its_highest_level(highest):
    """`maxval`, one below the number of levels."""
    k = drawn(highest + 1, dtype=np.uint8 if highest < 256 else ">u2")
    stored = decoded(f"P5 8 6 {highest}\n".encode() + k.tobytes())
    assert stored.levels == highest + 1 and np.array_equal(stored.k[..., 0], k)


@pytest.mark.parametrize(
    "content",
    [
        png(16, COLOUR, [bytes(8 * 6)] * 4),
        file(drawn(shape=(6, 8, 3)), "PPM").replace(b"255", b"65535") + bytes(6 * 8 * 3),
    ],
    ids=["PNG", "PPM"],
)
def test_colour_of_16_bits_is_refused(content):
    """Pillow would cut it to 8 without a word."""
    with pytest.raises(ValueError, match=r"Image 'a\.x' has 65536 levels and the mode RGB"):
        decoded(content, "a.x")


@pytest.mark.parametrize("mode", ["I", "F"])
def test_numbers_of_32_bits_are_refused(mode):
    """They are no levels; signed ones have to be shifted."""
    with pytest.raises(ValueError, match="signed or floats; shift"):
        decoded(file(drawn(), "TIFF", mode))


@pytest.mark.parametrize("mode, channels", [("LA", 2), ("RGBA", 4)])
def test_transparency_is_refused_and_its_absence_dropped(mode, channels):
    """What lies behind a transparent pixel is no data; an alpha that is opaque everywhere says nothing."""
    k = drawn(shape=(6, 8, channels))
    k[..., -1] = 255
    stored = decoded(file(k))
    assert np.array_equal(stored.k[..., : channels - 1], k[..., :-1]) and stored.grey == (mode == "LA")
    k[3, 4, -1] = 254
    with pytest.raises(ValueError, match=r"Image 'b\.png' is transparent in places"):
        decoded(file(k), "b.png")


@pytest.mark.parametrize("mode, dtype", [("L", np.uint8), ("RGB", np.uint8), ("P", np.uint8), (None, np.uint16)])
def test_a_transparent_colour_counts_where_it_occurs(mode, dtype):
    """As PNG stores it without an alpha channel."""
    k = np.full((6, 8), 9, dtype)
    k[2, 2] = 3
    for level, refused in ((3, True), (200, False)):
        content = file(k, "PNG", mode, transparency=(level,) * 3 if mode == "RGB" else level)
        if refused:
            with pytest.raises(ValueError, match="transparent"):
                decoded(content)
        else:
            assert (decoded(content).k[..., 0] == k).all()


@pytest.mark.parametrize("kind, mode", [("PNG", "RGB"), ("PNG", "P"), ("GIF", "P"), ("WEBP", "RGB")])
def test_grey_in_a_colour_mode_is_grey(kind, mode):
    """Three equal channels say no more than one."""
    k = drawn()
    stored = decoded(file(k, kind, mode, **({"lossless": True} if kind == "WEBP" else {})))
    assert stored.grey and stored.k.shape == (6, 8, 3) and np.array_equal(stored.k[..., 0], k)


@pytest.mark.parametrize("kind, mode", [("JPEG", "CMYK"), ("TIFF", "CMYK"), ("TIFF", "LAB")])
def test_other_colours_are_refused(kind, mode):
    """A conversion would score other numbers than those that are stored."""
    content = io.BytesIO()
    PIL.Image.new(mode, (8, 8)).save(content, kind)
    with pytest.raises(ValueError, match=f"has the mode {mode}, which is neither grey nor RGB"):
        decoded(content.getvalue())


@pytest.mark.parametrize("kind", ["GIF", "PNG", "TIFF", "WEBP"])
def test_an_animation_is_refused(kind):
    """One of its frames would be taken, and the others would vanish."""
    frames = [PIL.Image.fromarray(own) for own in drawn(shape=(3, 6, 8))]
    content = io.BytesIO()
    frames[0].save(content, kind, save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match="has 3 frames"):
        decoded(content.getvalue())


@pytest.mark.parametrize(
    "content",
    [b"", b"no picture", file(drawn())[:60], file(drawn(), exif=b"\x00\x08\x00\x02\x01\x12\x00\x03garbage")],
    ids=["empty", "text", "truncated", "EXIF"],
)
def test_what_cannot_be_read_is_named(content):
    """Whatever class of exception Pillow chooses."""
    with pytest.raises(ValueError, match=r"Image 'c\.png' cannot be read: "):
        decoded(content, "c.png")


@pytest.mark.parametrize("encoded", [None, {"bytes": None, "path": None}])
def test_a_null_row_is_named(encoded):
    """By its number."""
    with pytest.raises(ValueError, match="number 7 is missing"):
        decode_image(encoded, 7)
