"""The file of a compressed set of images: a header, chunks that stand alone, and where they lie.

    header   "DVLB", version 2, length, hashes of network and chain, K, dtype, levels, shape, the environment, CRC
    chunks   images, seeds, nonce, CRC of the pixels, labels, names, and of each stack its states and words, CRC
    index    number of chunks, and of each its length and images; CRC, and the index's length: a byte, or 4 and a 255

Numbers are varints (7 bits a byte, the lowest first) but for hashes and CRCs. All bytes lie under a CRC, which is
looked at first. A chunk is found by the index, and needs no other; those of two files of one header make a third.
"""

import math
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

MAGIC, VERSION = b"DVLB", 2
DTYPES = ("float64", "float32")
HASH = 4
_MOST = 2**31  # of any count: more is damage
_LARGEST = 2**28  # values of an image
_LONGEST_NAME = 4096  # bytes
_TOLD = {"class labels": "labels", "names": "names"}  # of a chunk: all of a file have them, or none


@dataclass(frozen=True)
class Header:
    """What a file was made with.

    Args:
        network: hash of the weights, 4 bytes.
        chain: hash of what the chain's coder is made of, 4 bytes.
        steps: K.
        dtype: of the network, of `DTYPES`.
        levels: of the data.
        shape: of one image, (C, *).
        environment: for information.
    """

    network: bytes
    chain: bytes
    steps: int
    dtype: str
    levels: int
    shape: tuple[int, ...]
    environment: str

    def to_bytes(self) -> bytes:
        """The header as it stands in the file."""
        told = self.environment.encode()[:255]
        numbers = (self.steps, DTYPES.index(self.dtype), self.levels, len(self.shape), *self.shape, len(told))
        body = self.network + self.chain + b"".join(map(varint, numbers)) + told
        return sealed(MAGIC + bytes([VERSION]) + varint(len(body)) + body)

    @classmethod
    def read(cls, data: bytes) -> tuple["Header", int]:
        """The header of a file, and where the chunks begin.

        Args:
            data: the file, or its beginning.

        Raises:
            ValueError: no such file, one of another version, or a damaged one.
        """
        if data[:4] != MAGIC:
            raise ValueError("`data` is no file of `compress`: it does not begin with DVLB.")
        if len(data) > 4 and data[4] != VERSION:
            raise ValueError(f"`data` is of version {data[4]} of the format, but this package reads {VERSION}.")
        whole = Reader(data, 5)
        length = whole.number()
        start = whole.place
        reader = Reader(unsealed(data[: start + length + 4], "header"), start)
        network, chain = reader.take(HASH), reader.take(HASH)
        steps, dtype, levels, ndim = (reader.number() for _ in range(4))
        shape = tuple(reader.number() for _ in range(min(ndim, 16)))
        environment = reader.take(reader.number()).decode(errors="replace")
        if dtype >= len(DTYPES) or not 0 < math.prod(shape) <= _LARGEST:
            raise ValueError("`data` is damaged: its header is of no images.")
        return cls(network, chain, steps, DTYPES[dtype], levels, shape, environment), start + length + 4


@dataclass(frozen=True)
class Chunk:
    """Images that are decoded without any others.

    Args:
        images: number of them.
        seeds: how many of them lie below the others, coded by counts.
        nonce: of the whitening.
        pixels: CRC of the levels.
        labels: class labels, or nothing.
        names: of the images, or nothing.
        stacks: states and words of each.
    """

    images: int
    seeds: int
    nonce: int
    pixels: int
    labels: tuple[int, ...]
    names: tuple[str, ...]
    stacks: tuple[tuple[bytes, bytes], ...]

    def to_bytes(self) -> bytes:
        """The chunk as it stands in the file."""
        labels = _packed(b"".join(map(varint, self.labels)))
        names = _packed("\n".join(self.names).encode("utf-8", "surrogateescape"))
        parts = [varint(own) for own in (self.images, self.seeds, self.nonce)]
        parts += [struct.pack("<I", self.pixels), labels, names, varint(len(self.stacks))]
        for states, words in self.stacks:
            parts += [varint(len(states) // 8), varint(len(words) // 4), states, words]
        return sealed(b"".join(parts))

    @classmethod
    def read(cls, data: bytes) -> "Chunk":
        """The chunk from its bytes.

        Args:
            data: all of it and nothing else.

        Raises:
            ValueError: it is damaged.
        """
        reader = Reader(unsealed(data, "chunk"))
        images, seeds, nonce = (reader.number() for _ in range(3))
        (pixels,) = struct.unpack("<I", reader.take(4))
        labels, names = reader.packed(5 * images), reader.packed(_LONGEST_NAME * images)
        stacks = []
        for _ in range(reader.number()):
            states, words = reader.number(), reader.number()
            stacks.append((reader.take(8 * states), reader.take(4 * words)))
        told = Reader(labels)
        numbers = tuple(told.number() for _ in range(images)) if labels else ()
        split = tuple(names.decode("utf-8", "surrogateescape").split("\n")) if names else ()
        whole = reader.place == len(reader.data) and told.place == len(labels) and len(split) in (0, images)
        if not whole or not 0 < len(stacks) <= seeds <= images:
            raise ValueError("`data` is damaged: a chunk contradicts itself.")
        return cls(images, seeds, nonce, pixels, numbers, split, tuple(stacks))


def index_of(chunks: Iterable[tuple[int, int]]) -> bytes:
    """The end of a file.

    Args:
        chunks: bytes and images of each.
    """
    numbers = [own for chunk in chunks for own in chunk]
    body = sealed(varint(len(numbers) // 2) + b"".join(map(varint, numbers)))
    return body + (bytes([len(body)]) if len(body) < 255 else struct.pack("<IB", len(body), 255))


def read_index(data: bytes, start: int) -> list[tuple[int, int, int]]:
    """Where each chunk begins and ends, and its images.

    Args:
        data: the file.
        start: where the chunks begin.

    Raises:
        ValueError: the end is missing or damaged.
    """
    short = data[-1:] != b"\xff"
    end = len(data) - (1 if short else 5)
    begin = end - int.from_bytes(data[end : end + (1 if short else 4)], "little")
    if begin < start or begin == end:
        raise ValueError("`data` is damaged: it is cut off, its index is missing.")
    reader = Reader(unsealed(data[begin:end], "index"))
    places, place = [], start
    for _ in range(reader.number()):
        size, images = reader.number(), reader.number()
        places.append((place, place + size, images))
        place += size
    if place != begin:
        raise ValueError("`data` is damaged: its chunks are not as long as its index says.")
    return places


@dataclass(frozen=True)
class CompressedFile:
    """A file of `compress`, read without the network.

    Args:
        data: all of it.
        header: what it was made with, with `steps`, `dtype`, `levels`, `shape` and `environment`.
        places: where each chunk begins and ends, and its images.
    """

    data: bytes
    header: Header
    places: tuple[tuple[int, int, int], ...]

    @classmethod
    def read(cls, data: bytes) -> "CompressedFile":
        """Its header and index; the chunks are not looked at.

        Args:
            data: the file.

        Raises:
            ValueError: no such file, one of another version, or one whose header or index is damaged.
        """
        header, start = Header.read(data)
        return cls(data, header, tuple(read_index(data, start)))

    @property
    def images(self) -> int:
        """How many there are."""
        return sum(images for _, _, images in self.places)

    def part(self, index: int) -> bytes:
        """A chunk, as `BitsBackCodec.decode_part` takes it.

        Args:
            index: its number.
        """
        begin, end, _ = self.places[index]
        return self.data[begin:end]

    def chunk(self, index: int) -> Chunk:
        """What a chunk says of its images: `labels`, `names` and `stacks`.

        Args:
            index: its number.

        Raises:
            ValueError: it is damaged.
        """
        chunk = Chunk.read(self.part(index))
        if chunk.images != self.places[index][2]:
            raise ValueError("`data` is damaged: a chunk has other images than the index says.")
        return chunk

    def chunks(self) -> list[Chunk]:
        """What all of them say.

        Raises:
            ValueError: one is damaged, or only some have class labels, or names.
        """
        chunks = [self.chunk(index) for index in range(len(self.places))]
        for what in _TOLD:
            if len({_has(chunk, what) for chunk in chunks}) > 1:
                raise ValueError(f"`data` contradicts itself: some of its chunks are with {what}, others without.")
        return chunks

    def joined(self, other: "CompressedFile") -> bytes:
        """The images of two files as one, which is as long as both: nothing is coded anew, the network is not needed.

        Args:
            other: the file whose images come after this one's; made with the same network, chain and precision, but
                anywhere, and in any lanes.

        Raises:
            ValueError: made with something else, with class labels or names where this file is without or the other
                way round, two images of one name, or either damaged.
        """
        _check_alike(self.header, other.header)
        mine, theirs = self.chunks(), other.chunks()
        for what in _TOLD:
            if mine and theirs and _has(mine[0], what) != _has(theirs[0], what):
                own, came = ("with" if _has(chunks[0], what) else "without" for chunks in (mine, theirs))
                raise ValueError(f"`other` must be {own} {what}, as this file, but is {came}: compress it likewise.")
        twice = {name for chunk in mine for name in chunk.names} & {name for chunk in theirs for name in chunk.names}
        if twice:
            raise ValueError(f"`other` must have names of its own, but has this file's {min(twice)!r}: rename it.")
        return file_of(
            self.header, [(file.part(i), file.places[i][2]) for file in (self, other) for i in range(len(file.places))]
        )


def file_of(header: Header, chunks: Iterable[tuple[bytes, int]]) -> bytes:
    """The whole file.

    Args:
        header: of it.
        chunks: bytes of each, and the number of its images.
    """
    parts = list(chunks)
    index = index_of([(len(data), images) for data, images in parts])
    return b"".join([header.to_bytes(), *[data for data, _ in parts], index])


def _check_alike(header: Header, other: Header) -> None:
    for what in ("network", "chain", "steps", "dtype", "levels", "shape"):
        own, came = getattr(header, what), getattr(other, what)
        if own != came:
            own, came = (told.hex() if isinstance(told, bytes) else told for told in (own, came))
            raise ValueError(f"`other` must have this file's {what}, {own}, but has {came}: compress it likewise.")


def _has(chunk: Chunk, what: str) -> bool:
    return bool(getattr(chunk, _TOLD[what]))


def varint(value: int) -> bytes:
    """A number of 0 or more, 7 bits a byte.

    Args:
        value: the number.
    """
    parts = []
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def sealed(body: bytes) -> bytes:
    """The bytes with their CRC.

    Args:
        body: the bytes.
    """
    return body + struct.pack("<I", zlib.crc32(body))


def unsealed(data: bytes, what: str) -> bytes:
    """The bytes without their CRC.

    Args:
        data: of `sealed`.
        what: they are, for the message.

    Raises:
        ValueError: they are not what was sealed.
    """
    body = data[:-4]
    if len(data) < 4 or struct.pack("<I", zlib.crc32(body)) != data[-4:]:
        raise ValueError(f"`data` is damaged: the CRC of a part ({what}) is not that of its bytes.")
    return body


def _packed(body: bytes) -> bytes:
    """Bytes with their lengths, deflated where that is shorter: the length inflated is 0 where they are not."""
    if not body:
        return varint(0)
    small = zlib.compress(body, 9)
    inflated, own = (len(body), small) if len(small) + 1 < len(body) else (0, body)
    return varint(len(own)) + varint(inflated) + own


@dataclass
class Reader:
    """Numbers and bytes from a place on; what is not there is damage."""

    data: bytes
    place: int = 0

    def take(self, count: int) -> bytes:
        """So many bytes.

        Args:
            count: of them.
        """
        taken = self.data[self.place : self.place + count]
        if len(taken) < count:
            raise ValueError("`data` is damaged: it is cut off.")
        self.place += count
        return taken

    def number(self) -> int:
        """A varint."""
        value = 0
        for digit in range(0, 70, 7):
            (byte,) = self.take(1)
            value |= (byte & 127) << digit
            if byte < 128:
                break
        if value > _MOST:
            raise ValueError("`data` is damaged: it holds an impossible number.")
        return value

    def packed(self, most: int) -> bytes:
        """Bytes of `_packed`.

        Args:
            most: how many there can be.
        """
        length = self.number()
        if not length:
            return b""
        inflated = self.number()
        if max(length, inflated) > most:
            raise ValueError("`data` is damaged: labels or names are longer than they can be.")
        own = self.take(length)
        if not inflated:
            return own
        try:
            body = zlib.decompressobj().decompress(own, inflated + 1)
        except zlib.error as error:
            raise ValueError("`data` is damaged: labels or names cannot be inflated.") from error
        if len(body) != inflated:
            raise ValueError("`data` is damaged: labels or names are not as long as they say.")
        return body
