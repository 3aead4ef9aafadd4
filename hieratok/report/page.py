"""The report of a training run: one HTML file that needs nothing else."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from torch import Tensor

from ..engine import run_folder as layout
from ..engine.log import METRICS, read_metrics
from ..engine.pictures import CAPTION, GAP, LARGEST_ERROR
from ..errors import CheckpointError, MissingDependencyError
from ..files import write_atomically
from ..models.cost import cost, cost_rows
from ..models.presets import model_fields
from ..models.tokenizer import HieraTok, powers_of_two
from . import palette
from .diagram import architecture
from .gallery import Gallery, build_gallery, png_uri
from .metrics import figure, metric_tables, protocol_sentences, tiles
from .plots import loss_plots

MAX_PICTURES = 5
MAX_PICTURE_ROWS = 4

# What a reader may want next. {run} is the run folder, {longer} moves the end.
COMMANDS = (
    ("Train on from the last checkpoint", "hieratok train tokenizer --resume output={run} {longer}"),
    ("Reconstruct your own pictures at every scale", "hieratok reconstruct photo.jpg --model {run}"),
    ("Turn a set of pictures into latents", "hieratok encode FOLDER --model {run} --out latents"),
    ("Measure it again", "hieratok evaluate reconstruction --model {run}"),
    ("Train on your own pictures", "hieratok quickstart --data FOLDER --output runs/mine"),
)


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
        return [line for line in self.metrics if line["kind"] == "train"]


@dataclass(frozen=True)
class Progress:
    """The same held-out images at several steps: `rows` of data URIs under `columns` of (title, detail)."""

    columns: list[tuple[str, str]]
    rows: list[list[str]]


def write_report(
    run_folder: str | Path,
    *,
    model: HieraTok | None = None,
    images: Sequence[Tensor | np.ndarray] | Tensor | None = None,
    output: str | Path | None = None,
) -> Path:
    """Write the report of a run and return its path. The same run gives the same bytes.

    Args:
        run_folder: holds `run.json`; `config.yaml`, `metrics.jsonl`, `eval.json` and `pictures/` are shown where
            they exist.
        model: the trained tokenizer; with `images` it fills the gallery.
        images: held-out uint8 images of the model's size, tensors `(3, S, S)` or arrays `(S, S, 3)`; four to six
            make a good page.
        output: None is `report.html` in the run folder. A reader meets the old file or the new one, never a part.

    Raises:
        CheckpointError: not a run folder.
        DataError: images that the model does not take.
        MissingDependencyError: jinja2 or matplotlib is not installed.
    """
    record = read_run(Path(run_folder))
    gallery = build_gallery(model, images) if model is not None and images is not None else None
    html = render(record, gallery)
    path = Path(output) if output is not None else record.folder / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, html.encode())
    return path


def read_run(folder: Path) -> RunRecord:
    """The record of a run folder.

    Raises:
        CheckpointError: there is no readable `run.json`, or no `model` section in it or in `config.yaml`.
    """
    run = _read_json(folder / layout.RUN)
    if run is None:
        raise CheckpointError(f"{folder} holds no run.json; give the folder that a training wrote")
    config_file = folder / layout.CONFIG
    config = yaml.safe_load(config_file.read_text()) if config_file.is_file() else run.get("config")
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        raise CheckpointError(f"{folder} names no model: config.yaml needs a `model` section")
    return RunRecord(
        folder, run, config, read_metrics(folder / METRICS), _read_json(folder / "eval.json"),
        sorted((folder / "pictures").glob("step-*.png")),
    )  # fmt: skip


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error


def render(record: RunRecord, gallery: Gallery | None) -> str:
    """The page's HTML."""
    try:
        from jinja2 import Environment, PackageLoader
        from markupsafe import Markup
    except ImportError as error:
        raise MissingDependencyError("reports need jinja2: pip install 'hieratok[report]'") from error
    section = record.config["model"]
    model = model_fields(section)
    name = str(section.get("preset") or "HieraTok")
    grid = model["image_size"] // model["patch_size"]
    sides = list(model["scales"] or powers_of_two(grid))
    evaluation = record.evaluation
    plots = [(p.title, p.note, Markup(p.svg)) for p in loss_plots(record.train, sides)]
    environment = Environment(
        loader=PackageLoader("hieratok.report"), autoescape=True, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["figure"] = figure
    return environment.get_template("report.html.j2").render(
        light=palette.LIGHT,
        dark=palette.DARK,
        name=name,
        model=model,
        grid=grid,
        sides=sides,
        colours=palette.scale_colours(len(sides)),
        numbers=grid * grid * model["latent_channels"],
        pixels=model["image_size"] ** 2 * 3,
        data=record.run.get("data") or {},
        facts=facts(record, section),
        tiles=tiles(evaluation) if evaluation else [],
        gallery=gallery,
        error_ceiling=LARGEST_ERROR / 255,
        diagram=Markup(architecture(model, gallery.rows[0] if gallery else None)),
        plots=plots,
        tables=metric_tables(evaluation) if evaluation else None,
        protocol=protocol_sentences(evaluation.get("protocol", {})) if evaluation else [],
        protocol_fields=evaluation.get("protocol", {}) if evaluation else {},
        warnings=evaluation.get("warnings", []) if evaluation else [],
        costs=cost_rows({name: section}),
        progress=progress(record, model["image_size"], len(sides)),
        commands=commands(record),
        run=record.run,
        started=date(record.run.get("started")),
    )


def facts(record: RunRecord, section: Mapping[str, Any]) -> dict[str, str]:
    """Size and length of the run in words; what the record does not say is absent."""
    said = {"parameters": f"{figure(cost(section).parameters / 1e6)} million"}
    if record.metrics:
        last = record.metrics[-1]
        if "samples_seen" in last:
            said["images"] = f"{last['samples_seen']:,}"
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


def commands(record: RunRecord) -> list[tuple[str, str]]:
    """`COMMANDS` with this run's names."""
    words = {"run": run_path(record.folder), "longer": longer(record)}
    return [(purpose, command.format(**words)) for purpose, command in COMMANDS]


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


def evenly(items: Sequence[Path], most: int) -> list[Path]:
    """At most `most` items with the first and the last, evenly spaced."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def progress(record: RunRecord, image_size: int, num_scales: int) -> Progress | None:
    """Originals and finest reconstructions cut out of `pictures/`, or None where there are none of the run's layout."""
    seen = {r["step"]: r.get("samples_seen") for r in record.train}
    columns = [("original", "")]
    strips: list[list[np.ndarray]] = []
    for path in evenly(record.pictures, MAX_PICTURES):
        cut = cut_grid(path, image_size, num_scales + 2)
        if cut is None:
            continue
        if not strips:
            strips.append(cut[0])
        strips.append(cut[-2])
        step = int(path.stem.removeprefix("step-"))
        columns.append((f"step {step:,}", f"{seen[step]:,} images" if seen.get(step) is not None else ""))
    if not strips:
        return None
    rows = min(len(strip) for strip in strips)
    return Progress(columns, [[png_uri(strip[i]) for strip in strips] for i in range(rows)])


def cut_grid(path: Path, image_size: int, num_columns: int) -> list[list[np.ndarray]] | None:
    """The columns of a `reconstruction_grid`, its first few pictures each at `image_size`; None for another layout."""
    with Image.open(path) as file:
        sheet = np.asarray(file.convert("RGB"))
    cell = (sheet.shape[1] + GAP) // num_columns - GAP
    rows = (sheet.shape[0] - CAPTION + GAP) // (cell + GAP)
    if (cell + GAP) * num_columns - GAP != sheet.shape[1] or cell < image_size or cell % image_size:
        return None
    enlarged = cell // image_size
    tops = [CAPTION + row * (cell + GAP) for row in range(min(rows, MAX_PICTURE_ROWS))]
    lefts = [column * (cell + GAP) for column in range(num_columns)]
    return [[sheet[top : top + cell : enlarged, left : left + cell : enlarged] for top in tops] for left in lefts]
