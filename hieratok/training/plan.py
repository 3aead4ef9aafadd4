"""What a run will cost, before it is begun: the dry run."""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from accelerate import Accelerator

from ..config import to_dict
from ..data.bad import BadSamples
from ..data.latents import LatentBatch
from ..data.loader import Batch, endless, train_loader
from ..data.order import Position
from ..engine.loop import Engine, describe_device, make_accelerator, make_engine
from ..engine.settings import TrainConfig
from ..models.cost import cost_table, dit_cost_table
from ..models.presets import plain_config
from .generator import GeneratorRun, open_latents
from .generator import make_model as make_generator
from .generator import train_step as generator_step
from .tokenizer import TokenizerRun, begin_from, make_terms
from .tokenizer import make_model as make_tokenizer
from .tokenizer import train_step as tokenizer_step

S = TypeVar("S", Batch, LatentBatch)

PATIENCE = 20.0  # seconds that one timed step may take; a longer one is timed on fewer images


@dataclass(frozen=True)
class Plan:
    """What `train_tokenizer` or `train_generator` would do; `num_val` is 0 for a generator, which holds none out."""

    run: TokenizerRun | GeneratorRun
    device: str
    num_train: int
    num_val: int
    total_steps: int
    seconds_per_step: float
    timed_images: int
    model: Mapping[str, Any] | None = None  # with what follows from the data filled in; None: `run.model`

    @property
    def steps(self) -> int:
        """That the run takes before its end, by steps or by the clock."""
        limit = self.run.train.max_minutes
        return self.total_steps if limit is None else min(self.total_steps, int(limit * 60 / self.seconds_per_step))

    @property
    def minutes(self) -> float:
        """Of the whole run, evaluation and pictures not counted."""
        by_steps = self.total_steps * self.seconds_per_step / 60
        limit = self.run.train.max_minutes
        return by_steps if limit is None else min(limit, by_steps)

    def describe(self) -> str:
        """For people: the resolved configuration, the cost of the model, and how long it will take."""
        batch = self.run.train.batch_size
        timed = "" if self.timed_images == batch else f", timed on {self.timed_images} images"
        name = str(self.run.model.get("preset", "this model"))
        table = cost_table if isinstance(self.run, TokenizerRun) else dit_cost_table
        held_out = f" and {self.num_val:,} validation" if self.num_val else ""
        return "\n".join([
            yaml.safe_dump(json.loads(json.dumps(to_dict(self.run))), sort_keys=False).rstrip(), "",
            table({name: self.model or self.run.model}), "",
            f"data      {self.num_train:,} training{held_out} images",
            f"device    {self.device}",
            f"speed     {self.seconds_per_step:.3f} s per step of {batch} images, {batch / self.seconds_per_step:.0f} "
            f"images/s{timed} (decoding not counted)",
            f"length    about {self.steps:,} steps ({self.steps * batch / self.num_train:.2f} epochs), "
            f"{duration(self.minutes)}",
            f"output    {self.run.output} (nothing was written)",
        ])  # fmt: skip


def plan(run: TokenizerRun | GeneratorRun) -> Plan:
    """Build everything as the run would, time a few real steps, and write nothing.

    Raises:
        HieratokError: whatever the run would raise at its beginning.
    """
    return plan_tokenizer(run) if isinstance(run, TokenizerRun) else plan_generator(run)


def plan_tokenizer(run: TokenizerRun) -> Plan:
    """See `plan`."""
    accelerator = make_accelerator(run.train, run.seed)
    size = run.train.micro_batch_size(accelerator.num_processes)
    model, criterion = make_tokenizer(run, accelerator.device)
    begin_from(run, model, None)
    train_images, val_images = run.data.open_both()
    frame = run.data.frame(model.config.image_size)
    loader = train_loader(train_images, frame, seed=run.seed, batch_size=size)
    with contextlib.closing(endless(loader)) as batches:
        batch = next(batches)
    with idle_engine(run.train, accelerator, model, len(train_images)) as engine:
        terms = make_terms(run, model, engine)
        engine.step = run.loss.adversarial.start_step + run.loss.adversarial.ramp_steps  # the dear part of the run
        seconds, timed = time_step(engine, batch, lambda parts: tokenizer_step(engine, criterion, terms, parts))
        return Plan(
            run, describe_device(accelerator.device), len(train_images), len(val_images), engine.total_steps,
            seconds * size / timed, timed * run.train.accumulation * accelerator.num_processes,
        )  # fmt: skip


def plan_generator(run: GeneratorRun) -> Plan:
    """See `plan`."""
    accelerator = make_accelerator(run.train, run.seed)
    size = run.train.micro_batch_size(accelerator.num_processes)
    tokenizer, stream = open_latents(run, accelerator.device)
    model, criterion = make_generator(run, stream, tokenizer, accelerator.device)
    with contextlib.closing(stream.batches(Position(run.seed, size))) as batches:
        batch = next(batches)
    with idle_engine(run.train, accelerator, model, len(stream)) as engine:
        seconds, timed = time_step(engine, batch, lambda parts: generator_step(engine, criterion, parts))
        return Plan(
            run, describe_device(accelerator.device), len(stream), 0, engine.total_steps, seconds * size / timed,
            timed * run.train.accumulation * accelerator.num_processes, plain_config(model),
        )  # fmt: skip


@contextlib.contextmanager
def idle_engine(config: TrainConfig, accelerator: Accelerator, model: Any, num_images: int) -> Iterator[Engine]:
    """An engine that keeps nothing; should a step go wrong, its record goes into a folder that is removed."""
    with tempfile.TemporaryDirectory(prefix="hieratok-dry-run-") as unused:
        yield make_engine(config, Path(unused), accelerator, model, num_images, BadSamples(num_images, 1.0))


def time_step(engine: Engine, batch: S, step: Callable[[Iterator[S]], None]) -> tuple[float, int]:
    """(seconds of a step, images per micro-batch it was timed on): the largest part of the batch that patience allows.

    The first step on a size is not counted: it allocates, and chooses kernels.
    """
    size, seconds, timed = min(2, len(batch.keys)), 0.0, 0
    while True:
        for _ in range(2):
            begun = time.perf_counter()
            step(iter([part(batch, size)] * engine.config.accumulation))
            if engine.device.type == "cuda":
                torch.cuda.synchronize(engine.device)
            seconds, timed = time.perf_counter() - begun, size
        largest = int(size * PATIENCE / seconds)
        if size == len(batch.keys) or largest <= size:
            return seconds, timed
        size = min(len(batch.keys), largest)


def part(batch: S, size: int) -> S:
    """The first `size` samples of a batch."""
    fields: dict[str, Any] = {name: value[:size] for name, value in batch._asdict().items() if name != "bad"}
    return type(batch)(**fields, bad=[])  # type: ignore[return-value]


def duration(minutes: float) -> str:
    """`"2 h 05 min"`, `"4 min"`, `"30 s"`."""
    if minutes < 1.5:
        return f"{minutes * 60:.0f} s"
    if minutes < 90:
        return f"{minutes:.0f} min"
    if minutes < 60 * 48:
        return f"{int(minutes // 60)} h {int(minutes % 60):02} min"
    return f"{minutes / 60 / 24:.1f} days"
