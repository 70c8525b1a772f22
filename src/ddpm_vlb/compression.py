"""Images as bytes, as many as the bound says, and back, level by level.

`compress` needs the network once for each step and image, and so does `decompress`; a file says which network and
chain, and every part of it has its CRC. See bits_back for how, seed_images for what is drawn from first, and
compressed_files for the format.
"""

import math
import platform
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .bits_back import ChainCoder, supply, whitening
from .checks import Conditioning, Model, check_conditioning, check_data, check_model
from .compressed_files import HASH, Chunk, CompressedFile, Header, file_of
from .exact_networks import exact_network, exact_process, fingerprint
from .integer_gaussians import Integers
from .rans import Stack, stack_for
from .reverse_process import ReverseProcess
from .seed_images import count, lanes_for, no_counts, pop_seeds, push_seeds, rounds, seeds_for

# A sum taken in another order must not round to another integer.
_MARGIN = 1e-9
_TRIES = 64
_MOST_LEVELS = 65536
_CHUNK_VALUES = 2**20  # of 20 steps, fewer of more: some come near a boundary, and a chunk is then made anew
Progress = Callable[[int], object]
NetBits = Callable[[int, float], object]


class Decompressed(NamedTuple):
    """Images of a file: x_0 (B, C, *), their class labels (B,) and names, where the file has them."""

    x_0: Tensor
    class_labels: Tensor | None
    names: tuple[str, ...]


class BitsBackCodec:
    """Compresses and decompresses images with a network and its chain.

    Args:
        model: the network, called as model(x_t, timesteps, **conditioning); a module is copied in float64, a function
            must compute in it.
        reverse: p, of the K steps that are taken for each image.
        dtype: torch.float64, or torch.float32 for files that only this machine with these settings will read.

    Raises:
        ValueError: continuous data, a chain that draws nothing, or a network in training mode.
    """

    def __init__(self, model: Model, reverse: ReverseProcess, dtype: torch.dtype = torch.float64):
        check_model(model)
        if dtype not in (torch.float64, torch.float32):
            raise ValueError(f"`dtype` must be torch.float64 or torch.float32, but got {dtype}.")
        if reverse.levels is None:
            raise ValueError("`reverse` is of continuous data, which no number of bits can hold: give it `levels`.")
        if reverse.levels > _MOST_LEVELS:
            raise ValueError(f"`reverse` must have at most {_MOST_LEVELS} levels, but has {reverse.levels}.")
        if reverse.eta == 0:
            raise ValueError("`reverse` draws nothing (`eta=0`), and has no bound: take a chain with noise.")
        self.network = fingerprint(model)[:HASH]
        self.dtype = dtype
        self.coder = ChainCoder(exact_network(model, dtype), exact_process(reverse), dtype)
        if max(self.coder.grids.bins(t).high for t in range(len(self.coder.grids))) > _MOST_LEVELS:
            raise ValueError(
                "`reverse` begins with less noise than the codec's grids can tell: take a larger first beta or ratio."
            )

    def header(self, shape: Sequence[int]) -> Header:
        """What a file for images of a shape says of this codec.

        Args:
            shape: of one image, (C, *).
        """
        return Header(
            self.network,
            self.coder.digest(shape)[:HASH],
            len(self.coder.grids),
            str(self.dtype).removeprefix("torch."),
            self.coder.reverse.levels or 0,
            tuple(shape),
            f"{torch.__version__.split('+')[0]} {platform.machine()}",
        )

    def compress(
        self,
        x_0: Tensor,
        conditioning: Conditioning | None = None,
        names: Sequence[str] | None = None,
        lanes: int | None = None,
        verify: bool = True,
        progress: Progress | None = None,
        bits: NetBits | None = None,
    ) -> bytes:
        """Images as the bytes of a file.

        Args:
            x_0: images (B, C, *) on their levels.
            conditioning: `{"class_labels": labels}` for a class-conditional network; they are stored.
            names: of the images, stored in their order.
            lanes: how many images the network takes at once; more are faster and take some bytes more.
            verify: decode what was encoded, in batches of another shape, before it is given out.
            progress: called with the number of images done; `verify` counts each once more, as it is decoded.
            bits: called with the number of each image but the seeds, and its net bits; again if a chunk is made anew.

        Raises:
            ValueError: images off their levels, other conditioning than class labels, names that do not fit, or images
                that this machine does not decode to themselves.
        """
        k, labels = self.levels_of(x_0), _labels(conditioning, len(x_0))
        bad = [name for name, times in Counter(names or ()).items() if times > 1 or not name or "\n" in name]
        if names is not None and (bad or len(names) != len(k)):
            told = f"{bad[0]!r} among them" if bad else len(names)
            raise ValueError(f"`names` must be a line for each of {len(k)} images, all different, but got {told}.")
        size = max(1, _CHUNK_VALUES * 20 // (max(20, len(self.coder.grids)) * max(1, math.prod(k.shape[1:]))))
        chunks = []
        for start in range(0, len(k), size):
            own = slice(start, start + size)
            given = None if labels is None else labels[own], tuple(names[own]) if names else ()
            chunk = self.encode(k[own], *given, lanes, verify, _from(start * (1 + verify), progress), _of(start, bits))
            chunks.append((chunk.to_bytes(), chunk.images))
        return file_of(self.header(k.shape[1:]), chunks)

    def decompress(self, data: bytes, progress: Progress | None = None) -> Decompressed:
        """The images of a file.

        Args:
            data: of `compress`.
            progress: called with the number of images done.

        Raises:
            ValueError: damaged or cut off, of another network, chain or format, or not decoded to what it says.
        """
        file = CompressedFile.read(data)
        self.check(file.header)
        shape, chunks, done = file.header.shape, file.chunks(), 0
        k = [np.zeros((0, *shape), dtype=np.int64)]
        for chunk in chunks:
            k.append(self.decode(chunk, shape, _from(done, progress)))
            done += chunk.images
        labels = [label for chunk in chunks for label in chunk.labels]
        return self._as_images(np.concatenate(k), labels, tuple(name for chunk in chunks for name in chunk.names))

    def decode_part(self, data: bytes, shape: Sequence[int], progress: Progress | None = None) -> Decompressed:
        """The images of one chunk of a file.

        Args:
            data: the chunk.
            shape: of one image, as the header says.
            progress: called with the number of images done.

        Raises:
            ValueError: as of `decompress`.
        """
        chunk = Chunk.read(data)
        return self._as_images(self.decode(chunk, shape, progress), chunk.labels, chunk.names)

    def _as_images(self, k: Integers, labels: Sequence[int], names: tuple[str, ...]) -> Decompressed:
        x_0 = torch.from_numpy(k).float() * (2 / ((self.coder.reverse.levels or 2) - 1)) - 1
        return Decompressed(x_0, torch.tensor(labels) if labels else None, names)

    def check(self, header: Header) -> None:
        """Refuse a file that another codec made.

        Args:
            header: of the file.

        Raises:
            ValueError: another network, chain or precision.
        """
        own = self.header(header.shape)
        if header.dtype != own.dtype:
            raise ValueError(f"`data` was made in {header.dtype}, but this codec works in {own.dtype}: set `dtype`.")
        if (header.steps, header.levels) != (own.steps, own.levels):
            raise ValueError(
                f"`data` was made with another chain, of {header.steps} steps and {header.levels} levels, than "
                f"`reverse`, of {own.steps} and {own.levels}."
            )
        if header.network != own.network:
            raise ValueError(
                "`data` was made with another network than `model`: their weights, or the levels of a path, differ."
            )
        if header.chain != own.chain:
            raise ValueError(
                f"`data` was made with another chain than `reverse`, of as many steps ({own.steps}): other timesteps "
                "(another stored path?), betas, variances or clipping."
            )

    def encode(
        self,
        k: Integers,
        labels: Integers | None = None,
        names: tuple[str, ...] = (),
        lanes: int | None = None,
        verify: bool = True,
        progress: Progress | None = None,
        bits: NetBits | None = None,
    ) -> Chunk:
        """A chunk of images, again with another whitening where a number came too near to being rounded otherwise.

        Args:
            k: levels (B, C, *).
            labels: class labels (B,).
            names: as of `compress`.
            lanes: likewise.
            verify: likewise.
            progress: likewise.
            bits: likewise.

        Raises:
            ValueError: as of `compress`.
        """
        if len(k) > 1 and k.size > _CHUNK_VALUES:
            raise ValueError(f"`k` must have at most {_CHUNK_VALUES} values in a chunk, but has {k.size}: split it.")
        for nonce in range(_TRIES):
            self.coder.margin = 0.5
            stacks = self._encoded(k, labels, lanes_for(len(k), k.size, lanes), nonce, _from(0, progress), bits)
            told = () if labels is None else tuple(labels.tolist())
            parts = tuple(stack.parts() for stack in stacks)
            chunk = Chunk(len(k), seeds_for(len(k), len(stacks)), nonce, _crc(k), told, names, parts)
            if not self._near():
                break
        else:
            raise ValueError(f"`model` comes too near to being rounded otherwise in {_TRIES} tries: take fewer steps.")
        chunk = Chunk.read(chunk.to_bytes())
        if verify:
            self._verify(chunk, k, _from(len(k), progress))
        return chunk

    def _verify(self, chunk: Chunk, k: Integers, progress: Progress) -> None:
        try:
            same = np.array_equal(self.decode(chunk, k.shape[1:], progress, beside=1), k)
        except ValueError:
            same = False
        if not same:
            raise ValueError(
                "`x_0` is not decoded to itself: `model` gives other values in another batch. Nothing was written."
            )

    def _near(self) -> bool:
        return self.coder.margin < _MARGIN and self.dtype == torch.float64

    def _encoded(
        self, k: Integers, labels: Integers | None, lanes: int, nonce: int, progress: Progress, bits: NetBits | None
    ) -> list[Stack]:
        seeds, size = seeds_for(len(k), lanes), math.prod(k.shape[1:])
        stacks = [stack_for(size, supply(lane)) for lane in range(lanes)]
        levels = self.coder.reverse.levels or 0
        counts = no_counts(size, levels)
        if counts is not None:
            count(counts, k[seeds:].reshape(-1, size))
        for lane, stack in enumerate(stacks):
            push_seeds(stack, k[:seeds][lane::lanes], levels, counts)
        progress(seeds)
        for own in rounds(seeds, len(k), lanes):
            whites = whitening(nonce, own, k.shape[1:])
            before = [] if bits is None else [stack.bits() for stack in stacks]
            self.coder.encode(stacks[: len(own)], k[own], self._told(labels, own), whites)
            if bits is not None:
                for image, stack, height in zip(own, stacks, before):
                    bits(image, stack.bits() - height)
            progress(own.stop)
            if self._near():
                break
        return stacks

    def decode(
        self, chunk: Chunk, shape: Sequence[int], progress: Progress | None = None, beside: int = 0
    ) -> Integers:
        """The levels of a chunk's images, (B, C, *).

        Args:
            chunk: the chunk.
            shape: of one image.
            progress: called with the number of images done.
            beside: so many more images in each of the network's calls, for another batch shape.

        Raises:
            ValueError: other images come out than went in, or the network does not take what the file says.
        """
        try:
            return self._decoded(chunk, shape, _from(0, progress), beside)
        except torch.OutOfMemoryError:  # which is a RuntimeError
            raise
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            said = " ".join(str(error).split())
            if said.startswith("`"):
                raise
            raise ValueError(f"`data` is damaged, or of another network: {said}") from error

    def _decoded(self, chunk: Chunk, shape: Sequence[int], progress: Progress, beside: int) -> Integers:
        size, levels, lanes = math.prod(shape), self.coder.reverse.levels or 0, len(chunk.stacks)
        if not lanes or size * chunk.images > max(_CHUNK_VALUES, size):
            raise ValueError("`data` is damaged: a chunk is of more images than it can hold.")
        stacks = [stack_for(size, supply(i), *parts) for i, parts in enumerate(chunk.stacks)]
        for stack in stacks:
            stack.lends = False
        k = np.zeros((chunk.images, *shape), dtype=np.int64)
        labels = np.array(chunk.labels) if chunk.labels else None
        for own in reversed(list(rounds(chunk.seeds, chunk.images, lanes))):
            whites = whitening(chunk.nonce, own, shape)
            k[own] = self.coder.decode(stacks[: len(own)], shape, self._told(labels, own), whites, beside)
            progress(chunk.images - own.start)
        counts = no_counts(size, levels)
        if counts is not None:
            count(counts, k[chunk.seeds :].reshape(-1, size))
        for lane, stack in enumerate(stacks):
            number = len(range(lane, chunk.seeds, lanes))
            k[: chunk.seeds][lane::lanes] = pop_seeds(stack, number, tuple(shape), levels, counts)
        progress(chunk.images)
        if _crc(k) != chunk.pixels or not all(stack.is_as_supplied() for stack in stacks):
            raise ValueError(
                "`data` is not decoded to what was encoded: the network's values differ here from where it was made."
            )
        return k

    def _told(self, labels: Integers | None, own: range) -> dict[str, Tensor]:
        device = self.coder.reverse.forward.timesteps.device
        return {} if labels is None else {"class_labels": torch.from_numpy(labels[own]).to(device)}

    def levels_of(self, x_0: Tensor) -> Integers:
        """The levels 0 .. levels - 1 of images.

        Args:
            x_0: images (B, C, *).

        Raises:
            ValueError: off their levels.
        """
        levels = self.coder.reverse.levels or 0
        if len(x_0):
            check_data(x_0, levels)
        return ((x_0.double() + 1) * ((levels - 1) / 2)).round().long().cpu().numpy()


def compress(model: Model, reverse: ReverseProcess, x_0: Tensor, conditioning: Conditioning | None = None) -> bytes:
    """Compress images without loss, to about as many bits as the bound on K steps says.

    Args:
        model: the network, called as model(x_t, timesteps, **conditioning).
        reverse: p, of K steps.
        x_0: images (B, C, *) on their levels.
        conditioning: `{"class_labels": labels}`, which are stored.

    Raises:
        ValueError: as of `BitsBackCodec` and its `compress`.

    Source: Townsend et al. 2019; Kingma et al. 2019 (Bit-Swap).
    """
    return BitsBackCodec(model, reverse).compress(x_0, conditioning)


def decompress(model: Model, reverse: ReverseProcess, data: bytes) -> Tensor:
    """The images of `compress`: the same levels, as float32 `k * (2 / (levels - 1)) - 1`.

    Args:
        model: of `compress`.
        reverse: of `compress`.
        data: its bytes.

    Raises:
        ValueError: as of `BitsBackCodec.decompress`.
    """
    return BitsBackCodec(model, reverse).decompress(data).x_0


def _labels(conditioning: Conditioning | None, images: int) -> Integers | None:
    check_conditioning(conditioning, images)
    if not conditioning:
        return None
    if set(conditioning) != {"class_labels"} or conditioning["class_labels"].is_floating_point():
        raise ValueError(
            f"`conditioning` can be stored where it is class labels, integers, but got {sorted(conditioning)}."
        )
    labels = conditioning["class_labels"].cpu().long().numpy()
    if labels.ndim != 1 or (images and not 0 <= labels.min() <= labels.max() < 2**31):
        raise ValueError(f"`class_labels` must be one integer of 0 .. 2^31 - 1 for each of {images} images.")
    return labels


def _from(done: int, progress: Progress | None) -> Progress:
    """The progress of a part, after so many images of others, whether it is asked for or not."""
    return lambda number: None if progress is None else progress(done + number)


def _of(done: int, bits: NetBits | None) -> NetBits | None:
    """What is told of a part, after so many images of others."""
    return None if bits is None else lambda image, own: bits(done + image, own)


def _crc(k: Integers) -> int:
    return zlib.crc32(k.astype("<u4").tobytes())
