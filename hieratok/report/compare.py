"""Generators side by side: how fast each comes to a gFID, as in Figure 4 of the paper, and what else differs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config import suggest
from ..engine.pictures import cut_sample_grid
from ..engine.run_folder import flatten
from ..errors import ConfigError, DataError, ProtocolError
from ..evaluation.tables import align, label
from ..files import write_atomically
from .gallery import png_uri
from .metrics import DIRECTIONS, LOWER, figure, protocol_sentences, quantity
from .plots import Curve, Span, as_png, as_svg, draw, inline, thousands
from .record import RunRecord, duration, read_run, step_of
from .strip import part_of
from .template import write_page

PLOT_SIZE = (7.2, 3.6)  # inches
COLOURS = ("scale-1", "scale-4", "scale-5", "scale-2", "scale-0", "scale-3")  # of the runs, in their order
GRID = (5, 4)  # rows and columns of a run's last samples
TITLE = "Evaluations over training"

# What differs with the tokenizer, or has no influence on a figure.
FOLLOWS = ("tokenizer", "latents", "image_size", "model.sample_size", "model.in_channels", "model.out_channels",
           "model.latents_mean", "model.latents_std", "protocol.samples", "protocol.samples_digest",
           "protocol.sampling.tokenizer", "protocol.sampling.tokenizer_sha256",
           "protocol.sampling.generator_sha256")  # fmt: skip
IDLE = ("output", "model.attention_backend", "data.source", "data.val_source", "data.num_workers", "train.log_every",
        "train.picture_every", "train.checkpoint_every", "train.keep_checkpoints", "train.tensorboard",
        "sampling.batch_size", "eval.batch_size")  # fmt: skip


@dataclass(frozen=True)
class Reach:
    """The step at which a curve first comes to a value; `at_first`: at its first point or before it."""

    step: float
    at_first: bool = False


@dataclass(frozen=True)
class SpeedUp:
    """Two runs at the worse of their final values.

    Attributes:
        fast, slow: names of the runs.
        target: the value.
        reached: where `fast` and `slow` come to it; None is never.
        ratio: steps of `slow` over steps of `fast`; None where it cannot be told.
        sentence: all this in words.
    """

    fast: str
    slow: str
    target: float
    reached: tuple[Reach | None, Reach | None]
    ratio: float | None
    sentence: str


@dataclass(frozen=True)
class Comparison:
    """What `compare` found and wrote.

    Attributes:
        metric: the key that is compared over training.
        curves: per run the steps of its evaluations and the values of `metric`.
        speed_ups: of the first run with each other one.
        metrics: a header with the runs' names, and a row per metric.
        differences: a header, and a row per recorded field, the tokenizer and what follows from it aside.
        warnings: what a reader must know.
        page, plot: the files that were written.
    """

    metric: str
    curves: dict[str, tuple[np.ndarray, np.ndarray]]
    speed_ups: list[SpeedUp]
    metrics: list[list[str]]
    differences: list[list[str]]
    warnings: list[str]
    page: Path
    plot: Path

    def table(self) -> str:
        """For a terminal."""
        parts = [align(self.metrics), *(speed_up.sentence for speed_up in self.speed_ups)]
        parts += [f"warning: {warning}" for warning in self.warnings]
        if len(self.differences) > 1:
            parts.append(align(self.differences))
        return "\n\n".join(parts)


def compare(runs: Sequence[str | Path], output: str | Path | None = None, metric: str | None = None) -> Comparison:
    """Compare generators' runs over their training, and write a page about it and its plot as PNG and SVG beside it.

    The speed-up (Figure 4 of the paper) is read at the worse of two final values: the steps at which each curve first
    comes to it, interpolated between two evaluations on a straight line in the logarithm of the value.

    Args:
        runs: two or more run folders, of which the first is compared with each other one.
        output: the page; None is `compare.html` in the working directory. The plots are named alike.
        metric: a key of the evaluations, such as `gfid_mini`; None is the gFID that all have.

    Raises:
        CheckpointError: a folder is not that of a generator's run.
        ConfigError: fewer than two runs, or one of them twice.
        DataError: a run has not been evaluated.
        ProtocolError: the runs share no gFID, or not `metric`.
        MissingDependencyError: jinja2 or matplotlib is not installed.
    """
    folders = [Path(run) for run in runs]
    if len({folder.resolve() for folder in folders}) < max(len(folders), 2):
        raise ConfigError(f"a comparison needs two different runs or more, got {', '.join(map(str, folders))}")
    records = dict(zip(names_of(folders), (read_run(folder, "generator") for folder in folders), strict=True))
    metric = common_metric(records, metric)
    curves = {name: curve_of(record, metric) for name, record in records.items()}
    first, *others = curves
    speed_ups = [speed_up(metric, first, other, curves) for other in others]
    rows, differing = metric_rows(records), differences(records)
    warnings = warnings_of(records, metric, differing)
    page = Path(output) if output is not None else Path("compare.html")
    plot = page.with_suffix(".png")
    canvas = draw_comparison(curves, speed_ups if len(others) == 1 else [])
    svg = as_svg(canvas, TITLE)
    write_page(
        page,
        "compare.html.j2",
        metric=label(metric),
        direction=DIRECTIONS[quantity(metric)],
        names=list(records),
        lengths=[run_length(record) for record in records.values()],
        speed_ups=speed_ups,
        svg=inline(svg, TITLE),
        metrics=rows,
        differences=differing,
        warnings=warnings,
        protocols=[" ".join(protocol_sentences(protocol_of(record))) for record in records.values()],
        grids=last_samples(records),
        licences=sorted({licence for record in records.values() if (licence := data_of(record).get("licence"))}),
    )
    write_atomically(plot, as_png(canvas))
    write_atomically(page.with_suffix(".svg"), svg.encode())
    return Comparison(metric, curves, speed_ups, rows, differing, warnings, page, plot)


def names_of(folders: Sequence[Path]) -> list[str]:
    """Names of runs by their folders, with as many folders above as it takes to tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    depth = next(n for n in range(1, 100) if len({part[-n:] for part in parts}) == len(parts))
    return ["/".join(part[-depth:]) for part in parts]


def metrics_of(record: RunRecord) -> dict[str, float]:
    """The final figures of a run, or those of its last evaluation."""
    if record.evaluation:
        return dict(record.evaluation.get("metrics", {}))
    last = record.evaluations[-1] if record.evaluations else {}
    return {key: value for key, value in last.items() if quantity(key) in DIRECTIONS}


def data_of(record: RunRecord) -> dict[str, Any]:
    return record.run.get("data") or {}


def protocol_of(record: RunRecord) -> dict[str, Any]:
    return (record.evaluation or {}).get("protocol") or {}


def common_metric(records: Mapping[str, RunRecord], metric: str | None) -> str:
    """The key to compare.

    Raises:
        DataError, ProtocolError: see `compare`.
    """
    keys = {name: list(metrics_of(record)) for name, record in records.items()}
    for name, found in keys.items():
        if not found:
            raise DataError(f"{name} has not been evaluated; set eval.every, or train it to its end")
    first, *others = keys.values()
    common = [key for key in first if all(key in other for other in others) and DIRECTIONS.get(quantity(key))]
    if metric is None:
        metric = next((key for key in common if quantity(key) == "gfid"), None)
    elif metric not in common and any(metric in found for found in keys.values()):
        metric = None
    elif metric not in common:
        raise ConfigError(f"metric '{metric}'{suggest(metric, common)}")
    if metric is None:
        listed = "\n  ".join(f"{name}: {', '.join(found)}" for name, found in keys.items())
        raise ProtocolError(
            f"these runs were not measured alike:\n  {listed}\n"
            f"A figure of one feature network means nothing beside that of another; evaluate both with the same "
            f"features, or name a metric that all have"
        )
    return metric


def curve_of(record: RunRecord, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values `(n,)` of a run's evaluations; of a run that was evaluated at its end only, that one."""
    points = {line["step"]: line[metric] for line in record.evaluations if is_number(line.get(metric))}
    if not points and record.metrics and is_number(metrics_of(record).get(metric)):
        points = {record.metrics[-1]["step"]: metrics_of(record)[metric]}
    array = np.array(sorted(points.items()), dtype=np.float64).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def first_reach(steps: np.ndarray, values: np.ndarray, target: float, *, rising: bool = False) -> Reach | None:
    """Where a curve first comes to `target`; None is nowhere.

    Between two evaluations the logarithm of the value is taken to change steadily, as it does on an exponential.

    Args:
        steps, values: `(n,)`, in the order of training.
        target: the value.
        rising: it is to come up to `target`, and not down.
    """
    there = np.flatnonzero(values >= target if rising else values <= target)
    if not there.size:
        return None
    i = int(there[0])
    if i == 0:
        return Reach(float(steps[0]), at_first=True)
    ends = np.array([values[i - 1], values[i], target])
    before, after, level = np.log(ends) if (ends > 0).all() else ends
    return Reach(float(steps[i - 1] + (level - before) / (after - before) * (steps[i] - steps[i - 1])))


def speed_up(metric: str, a: str, b: str, curves: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> SpeedUp:
    """Which of two runs is faster, and by how much."""
    rising = DIRECTIONS[quantity(metric)] != LOWER
    finals = [float(curves[name][1][-1]) for name in (a, b) if len(curves[name][1])]
    target = (min if rising else max)(finals, default=math.nan)
    reached = [(first_reach(*curves[name], target, rising=rising), name) for name in (a, b)]
    (quick, fast), (late, slow) = sorted(reached, key=lambda item: item[0].step if item[0] else math.inf)
    ratio, text = None, f"{label(metric)} {figure(target)}: "
    if quick is None:
        text = f"{label(metric)}: not reached by either, for want of a finite value."
    elif late is None:
        text += f"reached by {fast} at step {quick.step:,.0f}, not reached by {slow}."
    elif late.at_first:
        text += (f"{slow} is there at its first evaluation, step {late.step:,.0f}, so that nothing can be told; "
                 f"evaluate earlier and more often (eval.every).")  # fmt: skip
    else:
        ratio = late.step / max(quick.step, 1)
        where = "at its first evaluation or before, step" if quick.at_first else "at step"
        least = "at least " if quick.at_first else ""
        text += (f"{fast} is there {where} {quick.step:,.0f}, {slow} at step {late.step:,.0f}: {least}{ratio:.2f} "
                 f"times as fast.")  # fmt: skip
    return SpeedUp(fast, slow, target, (quick, late), ratio, text)


def draw_comparison(curves: Mapping[str, tuple[np.ndarray, np.ndarray]], speed_ups: Sequence[SpeedUp]) -> Any:
    """The plot of all curves over steps, with the speed-ups that could be told between them."""
    shown = [
        Curve(steps, values, name if len(name) < 26 else f"…{name[-24:]}", COLOURS[i % len(COLOURS)])
        for i, (name, (steps, values)) in enumerate(curves.items())
        if len(steps)
    ]
    span = None
    for found in speed_ups:
        quick, late = found.reached
        if found.ratio is not None and quick is not None and late is not None:
            span = Span(quick.step, late.step, found.target, f"{found.ratio:.2f}×")
    positive = all((curve.y > 0).all() for curve in shown)
    return draw(shown, "training steps", logarithmic=positive, dots=True, size=PLOT_SIZE, span=span)


def metric_rows(records: Mapping[str, RunRecord]) -> list[list[str]]:
    """A header and a row per final figure; a figure that a run does not have is a dash."""
    found = [metrics_of(record) for record in records.values()]
    keys = dict.fromkeys(key for metrics in found for key in metrics)
    rows = [["", *records], *([label(key), *(cell(metrics.get(key)) for metrics in found)] for key in keys)]
    lengths = [record.metrics[-1] if record.metrics else {} for record in records.values()]
    parameters = [record.run.get("parameters") for record in records.values()]
    return [
        *rows,
        ["parameters", *(f"{p / 1e6:.2f}M" if p else "–" for p in parameters)],
        ["steps", *(cell(last.get("step")) for last in lengths)],
        ["latents seen", *(cell(last.get("samples_seen")) for last in lengths)],
        ["time", *(duration(last["elapsed"]) if "elapsed" in last else "–" for last in lengths)],
    ]


def cell(value: Any) -> str:
    return "–" if value is None else figure(value)


def recorded(record: RunRecord) -> dict[str, Any]:
    """All that a run's figures may depend on besides the tokenizer, flat."""
    run = record.run
    last = record.metrics[-1] if record.metrics else {}
    values = {
        **record.config,
        "model": run.get("dit") or record.config["model"],  # its fields, whatever preset they come from
        "images": {key: data_of(record).get(key) for key in ("name", "num_train", "images_digest")},
        "protocol": protocol_of(record),
        "versions": run.get("versions") or {},
        "device": run.get("device"),
        "world_size": run.get("world_size"),
        "trained": {"steps": last.get("step"), "latents": last.get("samples_seen")},
    }
    return {key: value for key, value in flatten(values).items() if not under(key, (*FOLLOWS, *IDLE))}


def under(key: str, names: Sequence[str]) -> bool:
    """Whether a flat key is one of `names` or lies in a section that is."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def differences(records: Mapping[str, RunRecord]) -> list[list[str]]:
    """A header with the runs' names and a row per field that is not the same in all of them."""
    found = [recorded(record) for record in records.values()]
    keys = dict.fromkeys(key for values in found for key in values)
    rows = [[key, *(str(values.get(key, "–")) for values in found)] for key in keys]
    return [["field", *records], *(row for row in rows if len(set(row[1:])) > 1)]


def warnings_of(records: Mapping[str, RunRecord], metric: str, differing: Sequence[Sequence[str]]) -> list[str]:
    """What a reader of a comparison must know."""
    warnings = []
    fields = [row[0] for row in differing[1:]]
    tokenizers = {str((record.run.get("tokenizer") or {}).get("sha256")) for record in records.values()}
    if fields and len(tokenizers) > 1:
        warnings.append(f"Besides the tokenizer these runs differ in {', '.join(fields)}; a comparison of tokenizers "
                        f"changes nothing else.")  # fmt: skip
    elif len(tokenizers) == 1:
        what = ", ".join(fields) or "nothing that is recorded"
        warnings.append(f"These runs have the same tokenizer; they differ in {what}.")
    for name, record in records.items():
        if record.evaluation is None:
            warnings.append(f"{name} is not finished; its last evaluation stands for its final one.")
        if len(curve_of(record, metric)[0]) < 2:
            warnings.append(f"{name} was evaluated once; a curve needs eval.every.")
    for record in records.values():
        for warning in (record.evaluation or {}).get("warnings", []):
            if warning not in warnings:
                warnings.append(warning)
    return warnings


def run_length(record: RunRecord) -> str:
    """The tokenizer and the generator of a run, in a few words."""
    tokenizer = (record.run.get("tokenizer") or {}).get("path")
    name = record.config["model"].get("preset") or "DiT"
    steps = f", {thousands(record.metrics[-1]['step'])} steps" if record.metrics else ""
    return f"{name} on latents of {tokenizer}{steps}" if tokenizer else f"{name}{steps}"


def last_samples(records: Mapping[str, RunRecord]) -> list[dict[str, Any]]:
    """Per run the samples of its last picture: name, step, and rows of a class and data URIs; none unless all have."""
    grids = []
    for name, record in records.items():
        try:
            path = record.pictures[-1]
            shown = part_of(cut_sample_grid(path), *GRID)
        except (IndexError, DataError):
            return []
        images = [[png_uri(tile) for tile in row] for row in shown.tiles]
        names = shown.row_names or [""] * len(images)
        grids.append({"name": name, "step": step_of(path), "rows": list(zip(names, images, strict=True))})
    return grids
