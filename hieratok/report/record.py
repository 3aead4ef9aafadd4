"""What the folder of a run says about its run, and the words that pages make of it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from ..engine import run_folder as layout
from ..engine.log import METRICS, read_metrics
from ..errors import CheckpointError

T = TypeVar("T")


@dataclass(frozen=True)
class RunRecord:
    """What a run folder says about its run."""

    folder: Path
    run: dict[str, Any]
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    evaluation: dict[str, Any] | None
    pictures: list[Path]

    @property
    def train(self) -> list[dict[str, Any]]:
        """The metrics of training, without those of evaluations."""
        return self._lines("train")

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The metrics of evaluations."""
        return self._lines("eval")

    @property
    def is_generator(self) -> bool:
        return self.run.get("kind", "tokenizer") == "generator"

    def _lines(self, kind: str) -> list[dict[str, Any]]:
        return [line for line in self.metrics if line["kind"] == kind]


def read_run(folder: Path, kind: Literal["tokenizer", "generator"] | None = None) -> RunRecord:
    """The record of a run folder.

    Args:
        folder: of a run.
        kind: which kind of run is wanted; None is either.

    Raises:
        CheckpointError: there is no readable `run.json`, no `model` section in it or in `config.yaml`, or it is a run
            of the other kind.
    """
    run = layout.read_record(folder)
    config_file = folder / layout.CONFIG
    config = yaml.safe_load(config_file.read_text()) if config_file.is_file() else run.get("config")
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        raise CheckpointError(f"{folder} names no model: config.yaml needs a `model` section")
    record = RunRecord(
        folder, run, config, read_metrics(folder / METRICS), _evaluation(folder / layout.EVALUATION),
        sorted((folder / layout.PICTURES).glob("step-*.png")),
    )  # fmt: skip
    if kind is not None and record.is_generator != (kind == "generator"):
        raise CheckpointError(f"{folder} is the run of a {run.get('kind', 'tokenizer')}; give that of a {kind}")
    return record


def _evaluation(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def length(record: RunRecord) -> dict[str, str]:
    """How long the run was, on what, in words: `samples`, `time`, `device`; what the record does not say is absent."""
    said = {}
    if record.metrics:
        last = record.metrics[-1]
        if "samples_seen" in last:
            said["samples"] = f"{last['samples_seen']:,}"
        if "elapsed" in last:
            said["time"] = duration(last["elapsed"])
    if record.run.get("device"):
        said["device"] = device(str(record.run["device"]), record.run.get("world_size") or 1)
    return said


def device(name: str, processes: int) -> str:
    """What `describe_device` says, for the middle of a sentence: "one CPU with 2 threads", "8 × NVIDIA H100"."""
    name = {"mps": "Apple GPU"}.get(name, name)
    return f"one {name}" if processes == 1 else f"{processes} × {name}"


def duration(seconds: float) -> str:
    """45 seconds, 4.0 minutes, 2.5 hours."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.1f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def date(iso: str | None) -> str:
    """24 November 2025, 22:48 UTC; text that is no date stays as it is."""
    try:
        moment = datetime.fromisoformat(str(iso))
    except ValueError:
        return str(iso or "")
    return f"{moment.day} {moment:%B %Y, %H:%M} {moment.tzname() or ''}".strip()


def commands(record: RunRecord, templates: Sequence[tuple[str, str]], **words: Any) -> list[tuple[str, str]]:
    """Pairs of purpose and command, with this run's folder for `{run}`, a later end for `{longer}`, and `words`."""
    words |= {"run": run_path(record.folder), "longer": longer(record)}
    return [(purpose, command.format(**words)) for purpose, command in templates]


def longer(record: RunRecord) -> str:
    """The override that moves the run's end to twice its length, and to 30 minutes at least."""
    settings = record.config.get("train") or {}
    for key in ("epochs", "steps"):
        if settings.get(key) and not settings.get("max_minutes"):
            return f"train.{key}={2 * settings[key]}"
    seconds = record.train[-1].get("elapsed", 0) if record.train else 0
    return f"train.max_minutes={max(30, round(2 * seconds / 60))}"


def run_path(folder: Path) -> str:
    """The folder as a command takes it: relative where it lies below the working directory."""
    inside = folder.resolve().is_relative_to(Path.cwd())
    return shlex.quote(str(folder.resolve().relative_to(Path.cwd())) if inside else str(folder))


def step_of(picture: Path) -> int:
    """The training step of `step-00000500.png`."""
    return int(picture.stem.removeprefix("step-"))


def evenly(items: Sequence[T], most: int) -> list[T]:
    """At most `most` items with the first and the last, evenly spaced; the last where only one is wanted."""
    if len(items) <= most:
        return list(items)
    if most == 1:
        return [items[-1]]
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]
