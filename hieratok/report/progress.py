"""The same pictures at several steps of a training, as a part of a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .record import RunRecord

MAX_PICTURES = 5
MAX_ROWS = 4


@dataclass(frozen=True)
class Progress:
    """`rows` of data URIs, each with a name for those who cannot see it, under `columns` of (title, detail)."""

    columns: list[tuple[str, str]]
    names: list[str]
    rows: list[list[str]]


def heads(record: RunRecord, steps: Sequence[int]) -> list[tuple[str, str]]:
    """Title and detail of a column: the step, and how many images had been seen."""
    seen = {line["step"]: line.get("samples_seen") for line in record.train}
    return [(f"step {step:,}", f"{seen[step]:,} images" if seen.get(step) is not None else "") for step in steps]
