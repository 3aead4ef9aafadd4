"""What a run will cost, before it is begun: the dry run."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from ..config import to_dict
from ..data.bad import BadSamples
from ..data.loader import Batch, train_loader
from ..engine.loop import Engine, make_accelerator
from ..losses import TokenizerLoss
from ..models.cost import cost_table
from .tokenizer import TokenizerRun, describe_device, endless, make_engine, make_model, train_step

PATIENCE = 20.0  # seconds that one timed step may take; a longer one is timed on fewer images


@dataclass(frozen=True)
class Plan:
    """What `train_tokenizer` would do."""

    run: TokenizerRun
    device: str
    num_train: int
    num_val: int
    total_steps: int
    seconds_per_step: float
    timed_images: int

    @property
    def minutes(self) -> float:
        """Of the whole run, evaluation and pictures not counted."""
        by_steps = self.total_steps * self.seconds_per_step / 60
        limit = self.run.train.max_minutes
        return by_steps if limit is None else min(limit, by_steps)

    def describe(self) -> str:
        """For people: the resolved configuration, the cost of the model, and how long it will take."""
        batch = self.run.train.batch_size
        steps = min(self.total_steps, int(self.minutes * 60 / self.seconds_per_step))
        timed = "" if self.timed_images == batch else f", timed on {self.timed_images} images"
        name = str(self.run.model.get("preset", "this model"))
        return "\n".join([
            yaml.safe_dump(json.loads(json.dumps(to_dict(self.run))), sort_keys=False).rstrip(), "",
            cost_table({name: self.run.model}), "",
            f"data      {self.num_train:,} training and {self.num_val:,} validation images",
            f"device    {self.device}",
            f"speed     {self.seconds_per_step:.3f} s per step of {batch} images, {batch / self.seconds_per_step:.0f} "
            f"images/s{timed} (decoding not counted)",
            f"length    about {steps:,} steps ({steps * batch / self.num_train:.2f} epochs), {duration(self.minutes)}",
            f"output    {self.run.output} (nothing was written)",
        ])  # fmt: skip


def plan(run: TokenizerRun) -> Plan:
    """Build everything as the run would, time a few real steps, and write nothing.

    Raises:
        ConfigError, DataError: whatever the run would raise at its beginning.
    """
    accelerator = make_accelerator(run.train, run.seed)
    unused = Path(tempfile.mkdtemp(prefix="hieratok-dry-run-"))  # should a step go wrong, its record goes there
    size = run.train.micro_batch_size(accelerator.num_processes)
    model, criterion = make_model(run, accelerator.device)
    train_images, val_images = run.data.open_both()
    engine = make_engine(run, unused, accelerator, model, len(train_images), BadSamples(len(train_images), 1.0))
    frame = run.data.frame(model.config.image_size)
    loader = train_loader(train_images, frame, seed=run.seed, batch_size=size)
    with contextlib.closing(endless(loader)) as batches:
        batch = next(batches)
    seconds, timed = time_step(engine, criterion, batch)
    shutil.rmtree(unused, ignore_errors=True)
    return Plan(
        run, describe_device(accelerator.device), len(train_images), len(val_images), engine.total_steps,
        seconds * size / timed, timed * run.train.accumulation * accelerator.num_processes,
    )  # fmt: skip


def time_step(engine: Engine, criterion: TokenizerLoss, batch: Batch) -> tuple[float, int]:
    """(seconds of a step, images per micro-batch it was timed on): the largest part of the batch that patience allows.

    The first step on a size is not counted: it allocates, and chooses kernels.
    """
    size, seconds, timed = min(2, len(batch.keys)), 0.0, 0
    while True:
        for _ in range(2):
            begun = time.perf_counter()
            train_step(engine, criterion, iter([part(batch, size)] * engine.config.accumulation))
            if engine.device.type == "cuda":
                torch.cuda.synchronize(engine.device)
            seconds, timed = time.perf_counter() - begun, size
        largest = int(size * PATIENCE / seconds)
        if size == len(batch.keys) or largest <= size:
            return seconds, timed
        size = min(len(batch.keys), largest)


def part(batch: Batch, size: int) -> Batch:
    """The first `size` samples of a batch."""
    fields: dict[str, Any] = {name: value[:size] for name, value in batch._asdict().items() if name != "bad"}
    return Batch(**fields, bad=[])


def duration(minutes: float) -> str:
    """`"2 h 05 min"`, `"4 min"`, `"30 s"`."""
    if minutes < 1.5:
        return f"{minutes * 60:.0f} s"
    if minutes < 90:
        return f"{minutes:.0f} min"
    if minutes < 60 * 48:
        return f"{int(minutes // 60)} h {int(minutes % 60):02} min"
    return f"{minutes / 60 / 24:.1f} days"
