"""Which image comes when: a pure function of (seed, epoch), and the position in it one integer.

The stream of samples is epoch 0's permutation, then epoch 1's, and so on without a gap. A run's position is the
number of samples it has taken from the stream, whatever the number of processes, workers or micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

MASK = (1 << 64) - 1


@lru_cache(maxsize=2)
def epoch_order(length: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of `range(length)` in an epoch."""
    key = np.array([seed & MASK, epoch], dtype=np.uint64)  # a list with a large seed would become floats
    return np.random.Generator(np.random.Philox(key=key)).permutation(length)


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """The seed of everything random about one sample in one epoch: 63 well-mixed bits."""
    state = 0
    for part in (seed, epoch, index):
        state = _mix((state + (part & MASK) + 0x9E3779B97F4A7C15) & MASK)
    return state >> 1


def _mix(x: int) -> int:
    """The finaliser of SplitMix64: every bit of the input changes every bit of the output."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def replacement(length: int, index: int, attempt: int) -> int:
    """The image that stands in for a bad one: spread over the set, so that a bad folder has no single stand-in."""
    return (index + attempt * (1 + sample_seed(length, attempt, index) % max(length - 1, 1))) % length


@dataclass(frozen=True)
class Position:
    """Which part of the stream of samples a process reads; see `MicroBatches`."""

    seed: int
    batch_size: int
    accumulation: int = 1
    rank: int = 0
    world_size: int = 1
    start: int = 0


class MicroBatches:
    """The samples of one process: lists of (epoch, index), one list per micro-batch, without end.

    A step takes `batch_size` samples from the stream; they are cut into `accumulation` micro-batches, and each of
    these into one part per process.
    """

    def __init__(
        self,
        length: int,
        seed: int,
        batch_size: int,
        *,
        accumulation: int = 1,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
    ) -> None:
        """`start`: the samples already taken, a multiple of `batch_size`."""
        self.length, self.seed, self.start = length, seed, start
        self.micro_batch = batch_size // (accumulation * world_size)
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        position = self.start + self.rank * self.micro_batch
        while True:
            yield [self.sample(position + i) for i in range(self.micro_batch)]
            position += self.world_size * self.micro_batch

    def sample(self, position: int) -> tuple[int, int]:
        """(epoch, index) at a position of the stream."""
        epoch, offset = divmod(position, self.length)
        return epoch, int(epoch_order(self.length, self.seed, epoch)[offset])
