"""Batches of a source: the endless seeded stream of training, and one ordered pass for evaluation."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from multiprocessing import parent_process
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import DataError
from .bad import BadSample, BadSamples
from .decode import BadImage
from .frame import Frame
from .order import MicroBatches, replacement, sample_seed
from .source import ImageSource

ATTEMPTS = 20  # stand-ins tried for a bad image before giving up


class Batch(NamedTuple):
    """`images` uint8 `(B, 3, S, S)`, `labels` and `indices` int64 `(B,)`, and per sample its key and its seed.

    `bad`: the images that could not be used while this batch was put together.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    keys: list[str]
    seeds: list[int]
    bad: list[BadSample]


@dataclass(frozen=True)
class Sample:
    """One image on its way to a batch."""

    pixels: np.ndarray
    label: int
    index: int
    key: str
    seed: int


class _Samples(Dataset):
    """What the loader's workers do for one (epoch, index)."""

    def __init__(self, source: ImageSource, frame: Frame, seed: int, training: bool) -> None:
        self.source, self.frame, self.seed, self.training = source, frame, seed, training

    def __getitem__(self, position: tuple[int, int]) -> tuple[Sample | None, list[BadSample]]:
        epoch, wanted = position
        bad: list[BadSample] = []
        for attempt in range(ATTEMPTS if self.training else 1):
            index = replacement(len(self.source), wanted, attempt) if attempt else wanted
            seed = sample_seed(self.seed, epoch, index)
            try:
                pixels = self.source.pixels(index, self.frame, random.Random(seed) if self.training else None)
            except BadImage as error:
                bad.append(BadSample(index, self.source.key(index), str(error)))
            else:
                return Sample(pixels, self.source.label(index), index, self.source.key(index), seed), bad
        return None, bad


def _collate(items: list[tuple[Sample | None, list[BadSample]]]) -> Batch:
    samples = [sample for sample, _ in items if sample is not None]
    bad = [entry for _, entries in items for entry in entries]
    side = samples[0].pixels.shape[0] if samples else 0
    pixels = np.stack([s.pixels for s in samples]) if samples else np.empty((0, side, side, 3), np.uint8)
    return Batch(
        torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(),
        torch.tensor([s.label for s in samples], dtype=torch.int64),
        torch.tensor([s.index for s in samples], dtype=torch.int64),
        [s.key for s in samples],
        [s.seed for s in samples],
        bad,
    )


def _prepare_worker(_: int) -> None:
    torch.set_num_threads(1)
    # A signal to the group of processes reaches workers too; the main process decides what it means, and ends them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # macOS lacks it, and cannot tell who sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_on_the_main_process_word, daemon=True).start()


def _end_on_the_main_process_word() -> None:
    """Leave at a SIGTERM of the main process only; were that ignored too, Python would wait for ever at its exit."""
    main = parent_process()
    while main is not None:
        if signal.sigwaitinfo({signal.SIGTERM}).si_pid == main.pid:
            os._exit(0)


def train_loader(
    source: ImageSource,
    frame: Frame,
    *,
    seed: int,
    batch_size: int,
    accumulation: int = 1,
    rank: int = 0,
    world_size: int = 1,
    start: int = 0,
    num_workers: int = 0,
) -> DataLoader[Batch]:
    """This process's micro-batches from position `start` of the stream on, without end.

    What a batch holds depends on (source, frame, seed, position) only. A bad image is replaced by another and
    named in `Batch.bad`.

    Raises:
        DataError: the source is empty.
    """
    if len(source) == 0:
        raise DataError(f"{source.name} holds no images")
    batches = MicroBatches(
        len(source), seed, batch_size, accumulation=accumulation, rank=rank, world_size=world_size, start=start
    )
    return seeded_loader(_Samples(source, frame, seed, training=True), batches, num_workers, _collate)


def eval_loader(
    source: ImageSource,
    image_size: int,
    batch_size: int,
    *,
    frame: Frame | None = None,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    limit: int | None = None,
    start: int = 0,
    seed: int = 0,
    max_bad_fraction: float = 0.01,
) -> Iterator[Batch]:
    """Every image of [start, limit) once, in order; process `rank` takes every `world_size`-th of them.

    Centre-cropped and unvaried, whatever `frame` says of training. A bad image is left out and named in `Batch.bad`.

    Raises:
        DataError: more than `max_bad_fraction` of the images are bad. With several processes none knows the others'
            count; the caller then compares.
    """
    frame = frame or Frame(image_size)
    length = len(source) if limit is None else min(limit, len(source))
    indices = range(start + rank, length, world_size)
    batches = [[(0, i) for i in indices[k : k + batch_size]] for k in range(0, len(indices), batch_size)]
    bad = BadSamples(length, max_bad_fraction if world_size == 1 else 1.0)
    for batch in seeded_loader(_Samples(source, frame, seed, training=False), batches, num_workers, _collate):
        bad.add(batch.bad)
        if len(batch.indices):
            yield batch


def endless(loader: Any) -> Generator[Any, None, None]:
    """The batches of a training loader; closing it ends its workers.

    Raises:
        DataError: a batch without a single usable image.
    """
    iterator = iter(loader)
    try:
        for batch in iterator:
            if not batch.keys:
                last = batch.bad[-1]
                raise DataError(f"not one image of a whole batch could be used, nor any other in its place; the last "
                                f"one is {last.key}: {last.reason}")  # fmt: skip
            yield batch
    finally:
        shutdown = getattr(iterator, "_shutdown_workers", None)
        if shutdown is not None:
            shutdown()


def seeded_loader(samples: Dataset, batches: Any, num_workers: int, collate: Callable[[Any], Any]) -> DataLoader[Any]:
    """A loader whose order is that of `batches`, whatever the number of workers."""
    # More workers than cores only take turns; the sampler's order makes the number immaterial to the result.
    num_workers = min(num_workers, os.cpu_count() or 1)
    return DataLoader(
        samples,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=collate,
        worker_init_fn=_prepare_worker,
        prefetch_factor=4 if num_workers else None,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else each pass takes a number from the global one, and resuming is not exact
    )
