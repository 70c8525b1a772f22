"""The images that lie first on a stack, coded without the network: the others draw their latents from them.

1. by counting: level k of dimension d has the weight 8 n_dk + 1, where n_dk images that the receiver has by then show
   it (Krichevsky & Trofimov's estimate with an eighth for their half: most dimensions show few levels), or
2. deflated, as PNG does it, each level less its left or upper neighbour where that is shorter

whichever is shorter; the topmost symbol says which.

Source: Krichevsky & Trofimov 1981, "The performance of universal encoding".
"""

import zlib
from collections.abc import Iterator

import numpy as np

from .integer_gaussians import TOTAL, Integers
from .rans import Stack

_MOST_LEVELS = 256  # of counts, of which there is a table of dimensions x levels
_LARGEST_TABLE = 2**22
_MOST_LANES = 16
_FILTERS = (None, -1, -2)  # the axis along which neighbours are subtracted


def lanes_for(images: int, values: int, lanes: int | None) -> int:
    """How many images are coded side by side: as asked for, else so few that they cost about a hundredth.

    Args:
        images: number of them.
        values: of all of them.
        lanes: as asked for.
    """
    few = min(images // 64, values // 2**14, _MOST_LANES)
    return max(1, few if lanes is None else min(lanes, images))


def seeds_for(images: int, lanes: int) -> int:
    """How many images lie first: two hold what is borrowed, some five bits for each dimension.

    Args:
        images: number of them.
        lanes: of `lanes_for`.
    """
    return min(images, 2 * lanes)


def rounds(seeds: int, images: int, lanes: int) -> Iterator[range]:
    """The other images, those of a round side by side.

    Args:
        seeds: how many lie first.
        images: number of all.
        lanes: of `lanes_for`.
    """
    return (range(start, min(start + lanes, images)) for start in range(seeds, images, lanes))


def no_counts(dimensions: int, levels: int) -> Integers | None:
    """The counts of no images, (D, L); None for too many levels or dimensions.

    Args:
        dimensions: D.
        levels: L.
    """
    fits = levels <= _MOST_LEVELS and dimensions * levels <= _LARGEST_TABLE
    return np.zeros((dimensions, levels), dtype=np.int64) if fits else None


def count(counts: Integers, k: Integers) -> None:
    """Add images to the counts.

    Args:
        counts: how many images show each level at each dimension, (D, L).
        k: the images' levels, (N, D).
    """
    for image in k:
        counts[np.arange(len(image)), image] += 1


def push_seeds(stack: Stack, k: Integers, levels: int, counts: Integers | None) -> None:
    """Put images at the bottom of a stack.

    Args:
        stack: an empty one.
        k: their levels, (N, C, *).
        levels: L.
        counts: of all that the receiver has by then, (D, L), which these are added to; None for too many levels.
    """
    deflated = _deflated(k, levels)
    rows = [] if counts is None else [_counted(counts, image) for image in k.reshape(len(k), -1)]
    bits = sum(float((np.log2(TOTAL) - np.log2(own)).sum()) for _, own in rows)
    by_count = counts is not None and bits <= 8 * len(deflated)
    if by_count:
        for below, own in reversed(rows):
            stack.push_counts(below, own)
    else:
        _push_bytes(stack, deflated)
        _push_bytes(stack, len(deflated).to_bytes(4, "little"))
    stack.push_counts(np.array([TOTAL // 2 * by_count]), np.array([TOTAL // 2]))


def pop_seeds(stack: Stack, number: int, shape: tuple[int, ...], levels: int, counts: Integers | None) -> Integers:
    """Take the images from the bottom of a stack.

    Args:
        stack: with nothing above them.
        number: of images.
        shape: of one.
        levels: L.
        counts: as of `push_seeds`.

    Raises:
        ValueError: what is there is no image.
    """
    if not stack.pop_counts(np.array([[TOTAL // 2, TOTAL]]))[0]:
        length = int.from_bytes(_pop_bytes(stack, 4), "little")
        values = number * int(np.prod(shape)) * np.dtype(_kind(levels)).itemsize
        if length > values + values // 1000 + 64:
            raise ValueError("`data` is damaged: a stack says that more follows than can.")
        k = _inflated(_pop_bytes(stack, length), (number, *shape), levels)
        if counts is not None:  # as who pushed them did, for the stacks that follow
            count(counts, k.reshape(number, -1))
        return k
    if counts is None:
        raise ValueError("`data` is damaged: so many levels are not counted.")
    images = []
    for _ in range(number):
        images.append(stack.pop_counts(_up_to(counts)))
        count(counts, images[-1][None])
    return np.stack(images).reshape(number, *shape)


def _up_to(counts: Integers) -> Integers:
    """The counts of 2^28 of each level and those below it, (D, L)."""
    weights = np.cumsum(8 * counts + 1, axis=1)
    levels = np.arange(1, counts.shape[1] + 1)
    return weights * (TOTAL - len(levels)) // weights[:, -1:] + levels


def _counted(counts: Integers, image: Integers) -> tuple[Integers, Integers]:
    """What lies below the levels of an image, and their own counts of 2^28; the image is added to the counts."""
    edges = np.pad(_up_to(counts), ((0, 0), (1, 0)))
    every = np.arange(len(image))
    below = edges[every, image]
    own = edges[every, image + 1] - below
    count(counts, image[None])
    return below, own


def _kind(levels: int) -> str:
    return "u1" if levels <= 256 else "<u2"


def _deflated(k: Integers, levels: int) -> bytes:
    """The shortest of the filters' bytes, behind the filter's number."""
    found = []
    for number, axis in enumerate(_FILTERS):
        if axis is None or k.ndim + axis > 1:
            values = k if axis is None else np.diff(k, axis=axis, prepend=0)
            found.append(bytes([number]) + zlib.compress(values.astype(_kind(levels)).tobytes(), 9))
    return min(found, key=len)


def _inflated(data: bytes, shape: tuple[int, ...], levels: int) -> Integers:
    kind = np.dtype(_kind(levels))
    size = int(np.prod(shape)) * kind.itemsize
    try:
        raw = zlib.decompressobj().decompress(data[1:], size + 1)
    except zlib.error as error:
        raise ValueError("`data` is damaged: the first images of a stack cannot be inflated.") from error
    if len(raw) != size or data[0] >= len(_FILTERS) or (data[0] and len(shape) + (_FILTERS[data[0]] or 0) < 2):
        raise ValueError("`data` is damaged: the first images of a stack are not as long as they should be.")
    values, axis = np.frombuffer(raw, kind).reshape(shape), _FILTERS[data[0]]
    values = values if axis is None else np.cumsum(values, axis=axis, dtype=kind)
    if int(values.max(initial=0)) >= levels:
        raise ValueError("`data` is damaged: it holds a level that the data does not have.")
    return values.astype(np.int64)


def _push_bytes(stack: Stack, data: bytes) -> None:
    values = np.frombuffer(data, "u1").astype(np.int64)
    stack.push_counts(values * (TOTAL // 256), np.full(len(values), TOTAL // 256))


def _pop_bytes(stack: Stack, number: int) -> bytes:
    table = np.arange(1, 257) * (TOTAL // 256)
    return stack.pop_counts(np.broadcast_to(table, (number, 256))).astype("u1").tobytes()
