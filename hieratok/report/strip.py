"""The same samples over training, as in Figure 1 of the paper: a strip of steps, or a moving picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..engine.pictures import SampleGrid, cell_of, cut_sample_grid, save_picture, sheet
from ..engine.run_folder import PICTURES
from ..errors import ConfigError, DataError
from ..files import write_atomically
from .record import evenly, read_run, step_of

FRAME, LAST_FRAME = 400, 2000  # milliseconds
ANIMATIONS: dict[str, dict[str, Any]] = {".gif": {"format": "GIF"}, ".webp": {"format": "WEBP", "lossless": True}}


@dataclass(frozen=True)
class Strip:
    """`tiles`: per sample, per step uint8 `(S, S, 3)`; `names`: of the samples' classes, "" where they have none."""

    steps: list[int]
    names: list[str]
    tiles: list[list[np.ndarray]]


def strip(run_folder: str | Path, output: str | Path, *, rows: int = 4, columns: int = 6) -> Path:
    """Draw how a generator's samples changed over its training, from the `pictures/` of its run; gives `output`.

    Args:
        run_folder: of a generator; its pictures show the same noise and classes at every step.
        output: `.png` is a strip with a column per step; `.gif` and `.webp` move, with a frame per picture.
        rows: samples of the strip, of as many classes as there are; of a moving picture, classes.
        columns: steps of the strip, evenly chosen; of a moving picture, samples of each class.

    Raises:
        CheckpointError: the folder is not that of a generator's run.
        ConfigError: another kind of output, or rows or columns below 1.
        DataError: the run drew no pictures of samples.
    """
    output = Path(output)
    for name, value in {"rows": rows, "columns": columns}.items():
        if value < 1:
            raise ConfigError(f"{name} is {value}; it must be above 0")
    if output.suffix not in (".png", *ANIMATIONS):
        raise ConfigError(f"output is {output}; a strip ends in .png, a moving picture in .gif or .webp")
    pictures = read_run(Path(run_folder), "generator").pictures
    if not pictures:
        raise DataError(f"{run_folder} has no {PICTURES}/step-*.png; train with train.picture_every above 0")
    if output.suffix in ANIMATIONS:
        return animate(pictures, output, rows, columns)
    found = over_steps(pictures, rows, columns)
    cell = cell_of(len(found.tiles[0][0]))
    captions = [f"step {step:,}" for step in found.steps]
    return save_picture(sheet(found.tiles, cell, captions, found.names if any(found.names) else ()), output)


def over_steps(pictures: Sequence[Path], rows: int, columns: int) -> Strip:
    """At most `rows` samples, of as many classes as there are, at `columns` of the steps, evenly chosen.

    Raises:
        DataError: a picture is no grid of samples.
    """
    grids = cut_alike(evenly(pictures, columns))
    last = grids[-1][1]
    places = spread_places(len(last.tiles), last.tiles.shape[1], rows)
    return Strip(
        [step_of(path) for path, _ in grids],
        [last.row_names[row] if last.row_names else "" for row, _ in places],
        [[grid.tiles[row, column] for _, grid in grids] for row, column in places],
    )


def cut_alike(pictures: Sequence[Path]) -> list[tuple[Path, SampleGrid]]:
    """The tiles of pictures that are laid out like the last one.

    A run that went on with other settings may have drawn others before, whose samples cannot be followed.
    """
    grids = [(path, cut_sample_grid(path)) for path in pictures]
    last = grids[-1][1]
    alike = (last.tiles.shape, last.row_names)
    return [(path, grid) for path, grid in grids if (grid.tiles.shape, grid.row_names) == alike]


def spread_places(num_rows: int, num_columns: int, count: int) -> list[tuple[int, int]]:
    """At most `count` places `(row, column)` of a grid: one of each of evenly chosen rows, then more of each."""
    chosen = evenly(range(num_rows), count)
    return sorted([(row, column) for column in range(num_columns) for row in chosen][:count])


def part_of(grid: SampleGrid, rows: int, columns: int) -> SampleGrid:
    """At most `rows` of a grid's rows, evenly chosen, and its first `columns`."""
    chosen = evenly(range(len(grid.tiles)), rows)
    names = tuple(grid.row_names[row] for row in chosen) if grid.row_names else ()
    return SampleGrid(grid.tiles[chosen, :columns], names)


def animate(pictures: Sequence[Path], output: Path, rows: int, columns: int) -> Path:
    """A frame per picture: at most `rows` classes with `columns` samples each, under the step."""
    frames = []
    for path, grid in cut_alike(pictures):
        shown = part_of(grid, rows, columns)
        tiles = [list(row) for row in shown.tiles]
        frames.append(sheet(tiles, cell_of(shown.tiles.shape[2]), [f"step {step_of(path):,}"], shown.row_names))
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, moving(frames, output.suffix))
    return output


def moving(frames: Sequence[Image.Image], suffix: str) -> bytes:
    """Frames of one size as a file that plays for ever and rests on the last one."""
    data = io.BytesIO()
    durations = [*[FRAME] * (len(frames) - 1), LAST_FRAME]
    frames[0].save(
        data, save_all=True, append_images=frames[1:], duration=durations, loop=0, **ANIMATIONS[suffix]
    )  # fmt: skip
    return data.getvalue()
