"""Which images and which noise an optimizer step takes: functions of the seed and the step, not of the processes.

The training images are one endless row of shuffled epochs. Step s takes the positions s G .. (s + 1) G - 1 of it,
where G = world size x accumulation x B is the global batch; process r's micro batch m is the part of B positions that
begins at (m x world size + r) B. So the same global batch on any number of processes is the same step, and a resumed
run starts at its step without reading what came before.
"""

import functools
import hashlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ddpm_vlb import counter_keys, counter_normal


def seed_of(*key: int | str) -> int:
    """A seed that depends on the key (seed, step, ...) alone, so that a resumed run repeats its draws."""
    return int.from_bytes(hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest(), "little")


class GlobalBatches(torch.utils.data.Sampler[list[int]]):
    """Batches of one process, as lists of image indices, without end.

    Args:
        num_images: N, at least 1.
        batch_size: B, images of one process and micro batch.
        accumulation: micro batches of a step.
        rank: this process's index among `world_size`.
        world_size: number of processes.
        seed: of the order.
    """

    def __init__(self, num_images: int, batch_size: int, accumulation: int, rank: int, world_size: int, seed: int):
        self.num_images, self.batch_size, self.accumulation = num_images, batch_size, accumulation
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.first_step = 0
        self._order = functools.lru_cache(maxsize=2)(self._shuffled)

    @property
    def global_batch_size(self) -> int:
        """G, images of one optimizer step."""
        return self.batch_size * self.accumulation * self.world_size

    def steps(self, epochs: int) -> int:
        """Optimizer steps that show every image at least so many times."""
        return math.ceil(epochs * self.num_images / self.global_batch_size)

    def rows(self, micro_step: int) -> slice:
        """This process's part of the global batch in a micro step."""
        first = (micro_step * self.world_size + self.rank) * self.batch_size
        return slice(first, first + self.batch_size)

    def in_order(self, gathered: Tensor) -> Tensor:
        """Bring what the processes gathered, (world size, accumulation x B, ...), into the global batch's order."""
        parts = gathered.unflatten(1, (self.accumulation, self.batch_size))
        return parts.transpose(0, 1).flatten(0, 2)

    def images(self, step: int) -> Tensor:
        """The images of a step's global batch (G,), in its order, on all processes alike."""
        position, end, parts = step * self.global_batch_size, (step + 1) * self.global_batch_size, list[Tensor]()
        while position < end:
            epoch, index = divmod(position, self.num_images)
            parts.append(self._order(epoch)[index : index + end - position])
            position += len(parts[-1])
        return torch.cat(parts)

    def __iter__(self) -> Iterator[list[int]]:
        step = self.first_step
        while True:
            for micro_step in range(self.accumulation):
                rows = self.rows(micro_step)
                start = step * self.global_batch_size
                yield [self.image(start + row) for row in range(rows.start, rows.stop)]
            step += 1

    def image(self, position: int) -> int:
        """The image at a position of the endless row."""
        epoch, index = divmod(position, self.num_images)
        return int(self._order(epoch)[index])

    def _shuffled(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed_of(self.seed, "order", epoch))
        return torch.randperm(self.num_images, generator=generator)


class Noise:
    """Standard normal noise of single images, each of which depends on the seed, its step and its row alone.

    Args:
        seed: of the run.
    """

    def __init__(self, seed: int):
        self.seed = seed

    def draw(self, like: Tensor, step: int, rows: slice) -> Tensor:
        """The noise of some rows of a step's global batch.

        Args:
            like: images (B, C, *), whose shape, dtype and device the noise takes.
            step: the optimizer step.
            rows: the images' places in the global batch.
        """
        index = torch.arange(rows.start, rows.stop, device=like.device)
        return counter_normal(counter_keys(seed_of(self.seed, step, "noise"), index), like.shape[1:]).to(like.dtype)
