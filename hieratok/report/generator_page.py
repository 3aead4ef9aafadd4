"""The report of a generator's training run, and the part of it that its tokenizer's report shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..models.presets import dit_fields
from .gallery import png_uri
from .metrics import Tile, figure, set_rows, tiles
from .plots import generation_plots
from .progress import MAX_PICTURES, MAX_ROWS, Progress, heads
from .record import RunRecord, commands, date, length, read_run
from .samples import Samples
from .strip import over_steps
from .template import write_page

# What a reader may want next. {run} is the run folder, {longer} moves the end, {count} samples were measured.
COMMANDS = (
    ("Draw samples", "hieratok sample {run}"),
    ("Show its samples over training as a moving picture", "hieratok sample {run} --strip --output strip.gif"),
    ("Train on from the last checkpoint", "hieratok train generator --resume output={run} {longer}"),
    ("Measure it again", "hieratok evaluate generation --model {run} --num-images {count}"),
    ("Compare it with the generator of another tokenizer", "hieratok compare {run} OTHER_RUN"),
)
FEW = 2000  # samples, for a run that was not measured
OBJECTIVES = {"ddpm": "to predict the noise of a diffusion (DDPM)", "flow": "by flow matching"}


@dataclass(frozen=True)
class Generation:
    """What pages say about a generator; what its run does not record is empty.

    Attributes:
        name: of its preset.
        model: all fields of DiT.
        parameters: "33.0 million".
        facts: how long it was trained, see `record.length`.
        objective: what it was trained for, in words.
        classes: how many there are.
        tiles: its headline figures.
        evaluation: `eval.json`.
        samples: what it makes.
        progress: what it made during training.
    """

    name: str
    model: Mapping[str, Any]
    parameters: str
    facts: Mapping[str, str]
    objective: str
    classes: int
    tiles: list[Tile]
    evaluation: dict[str, Any] | None
    samples: Samples | None
    progress: Progress | None


def write_generator_report(
    run_folder: str | Path, *, samples: Samples | None = None, output: str | Path | None = None
) -> Path:
    """Write the report of a generator's run and return its path. The same run gives the same bytes.

    Args:
        run_folder: holds `run.json`; `config.yaml`, `metrics.jsonl`, `eval.json` and `pictures/` are shown where
            they exist.
        samples: what the generator makes, see `draw_samples`.
        output: None is `report.html` in the run folder. A reader meets the old file or the new one, never a part.

    Raises:
        CheckpointError: not the folder of a generator's run.
        MissingDependencyError: jinja2 or matplotlib is not installed.
    """
    record = read_run(Path(run_folder), "generator")
    evaluation = record.evaluation
    protocol = (evaluation or {}).get("protocol") or {}
    return write_page(
        Path(output) if output is not None else record.folder / "report.html",
        "generator.html.j2",
        generation=describe(record, samples),
        plots=generation_plots(record.train, record.evaluations),
        set_rows=set_rows(evaluation) if evaluation else [],
        commands=commands(record, COMMANDS, count=protocol.get("num_samples", FEW)),
        run=record.run,
        started=date(record.run.get("started")),
    )


def describe(record: RunRecord, samples: Samples | None) -> Generation:
    """What a page says about the generator of a run."""
    section, parameters = record.config["model"], record.run.get("parameters")
    objective = str((record.config.get("loss") or {}).get("objective") or "")
    return Generation(
        name=str(section.get("preset") or "DiT"),
        model=record.run.get("dit") or dit_fields(section),
        parameters=f"{figure(parameters / 1e6)} million" if parameters else "",
        facts=length(record),
        objective=OBJECTIVES.get(objective, objective),
        classes=len(record.run.get("classes") or ()),
        tiles=tiles(record.evaluation) if record.evaluation else [],
        evaluation=record.evaluation,
        samples=samples,
        progress=sample_progress(record),
    )


def sample_progress(record: RunRecord) -> Progress | None:
    """Samples cut out of `pictures/`, or None where there are none."""
    if not record.pictures:
        return None
    try:
        strip = over_steps(record.pictures, MAX_ROWS, MAX_PICTURES)
    except DataError:  # pictures of another layout say nothing here
        return None
    names = [name or f"Sample {number}" for number, name in enumerate(strip.names, 1)]
    return Progress(heads(record, strip.steps), names, [[png_uri(tile) for tile in row] for row in strip.tiles])
