"""The report of a tokenizer's training run: one HTML file that needs nothing else."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from ..engine.pictures import CAPTION, LARGEST_ERROR, cut_sheet
from ..models.cost import cost, cost_rows
from ..models.presets import model_fields
from ..models.tokenizer import HieraTok, powers_of_two
from . import palette
from .diagram import architecture
from .gallery import build_gallery, png_uri
from .generator_page import Generation
from .metrics import figure, metric_tables, tiles
from .plots import loss_plots
from .progress import MAX_PICTURES, MAX_ROWS, Progress, heads
from .record import RunRecord, commands, date, evenly, length, read_run, step_of
from .template import write_page

# What a reader may want next. {run} is the run folder, {longer} moves the end, {source} are its images.
COMMANDS = (
    ("Train on from the last checkpoint", "hieratok train tokenizer --resume output={run} {longer}"),
    ("Reconstruct your own pictures at every scale", "hieratok reconstruct photo.jpg --model {run}"),
    ("Turn a set of pictures into latents", "hieratok encode FOLDER --model {run} --out latents"),
    (
        "Train a generator on its latents",
        "hieratok train generator --config dit-small tokenizer={run} data.source={source}",
    ),
    ("Measure it again", "hieratok evaluate reconstruction --model {run}"),
    ("Train on your own pictures", "hieratok quickstart --data FOLDER --output runs/mine"),
)


def write_report(
    run_folder: str | Path,
    *,
    model: HieraTok | None = None,
    images: Sequence[Tensor | np.ndarray] | Tensor | None = None,
    generation: Generation | None = None,
    output: str | Path | None = None,
) -> Path:
    """Write the report of a tokenizer's run and return its path. The same run gives the same bytes.

    Args:
        run_folder: holds `run.json`; `config.yaml`, `metrics.jsonl`, `eval.json` and `pictures/` are shown where
            they exist.
        model: the trained tokenizer; with `images` it fills the gallery.
        images: held-out uint8 images of the model's size, tensors `(3, S, S)` or arrays `(S, S, 3)`; four to six
            make a good page.
        generation: what a generator of the tokenizer's latents makes of them, for a section of its own.
        output: None is `report.html` in the run folder. A reader meets the old file or the new one, never a part.

    Raises:
        CheckpointError: not the folder of a tokenizer's run.
        DataError: images that the model does not take.
        MissingDependencyError: jinja2 or matplotlib is not installed.
    """
    record = read_run(Path(run_folder), "tokenizer")
    gallery = build_gallery(model, images) if model is not None and images is not None else None
    section = record.config["model"]
    fields = model_fields(section)
    name = str(section.get("preset") or "HieraTok")
    grid = fields["image_size"] // fields["patch_size"]
    sides = list(fields["scales"] or powers_of_two(grid))
    evaluation = record.evaluation
    source = (record.config.get("data") or {}).get("source", "openmoji")
    return write_page(
        Path(output) if output is not None else record.folder / "report.html",
        "tokenizer.html.j2",
        name=name,
        model=fields,
        grid=grid,
        sides=sides,
        colours=palette.scale_colours(len(sides)),
        numbers=grid * grid * fields["latent_channels"],
        pixels=fields["image_size"] ** 2 * 3,
        data=record.run.get("data") or {},
        facts={"parameters": f"{figure(cost(section).parameters / 1e6)} million", **length(record)},
        tiles=tiles(evaluation) if evaluation else [],
        gallery=gallery,
        generation=generation,
        error_ceiling=LARGEST_ERROR / 255,
        diagram=architecture(fields, gallery.rows[0] if gallery else None),
        plots=loss_plots(record.train, sides),
        tables=metric_tables(evaluation) if evaluation else None,
        evaluation=evaluation,
        costs=cost_rows({name: section}),
        progress=progress(record, fields["image_size"], len(sides), began="init_from" in record.run),
        commands=commands(record, COMMANDS, source=shlex.quote(str(source))),
        run=record.run,
        stage2=stage2(record.config),
        frozen=(record.config.get("train") or {}).get("freeze") == "encoder",
        started=date(record.run.get("started")),
    )


def stage2(config: Mapping[str, Any]) -> list[str]:
    """What a run learned from beside the reconstruction, by the networks' names."""
    loss, judge = config.get("loss") or {}, config.get("discriminator") or {}
    learned = []
    if (loss.get("adversarial") or {}).get("weight"):
        kind = judge.get("kind", "stylegan")
        learned.append(f"a {kind} discriminator" + (f" ({judge.get('foundation', 'mini')})" if kind == "dino" else ""))
    if (loss.get("alignment") or {}).get("weight"):
        learned.append(f"the features of {(loss['alignment']).get('foundation', 'mini')} (VF loss)")
    return learned


def progress(record: RunRecord, image_size: int, num_scales: int, began: bool) -> Progress | None:
    """Originals and finest reconstructions cut out of `pictures/`, or None where there are none of the run's layout.

    `began`: the run began from another tokenizer, whose reconstructions stand between the two.
    """
    steps: list[int] = []
    strips: list[np.ndarray] = []  # per column (R, S, S, 3)
    for path in evenly(record.pictures, MAX_PICTURES):
        with Image.open(path) as picture:
            cut = cut_sheet(picture, image_size, num_scales + 2 + began, top=CAPTION)
            if cut is None and began and not strips:  # drawn after the earlier tokenizer had gone
                began, cut = False, cut_sheet(picture, image_size, num_scales + 2, top=CAPTION)
        if cut is None:
            continue
        if not strips:
            strips += [cut[:, 0], cut[:, -3]] if began else [cut[:, 0]]
        strips.append(cut[:, -2])
        steps.append(step_of(path))
    if not strips:
        return None
    rows = list(zip(*strips, strict=False))[:MAX_ROWS]
    names = [f"Picture {number}" for number in range(1, len(rows) + 1)]
    first = [("original", ""), ("before", "")] if began else [("original", "")]
    return Progress([*first, *heads(record, steps)], names, [[png_uri(tile) for tile in row] for row in rows])
