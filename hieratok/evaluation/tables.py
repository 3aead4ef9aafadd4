"""How figures are named, printed and kept."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import write_atomically

# A key that another one begins with stands behind that one.
LABELS = {
    "rfid": "rFID", "gfid": "gFID", "sfid": "sFID", "inception_score_std": "IS deviation", "inception_score": "IS",
    "precision": "precision", "recall": "recall", "real_halves": "real halves", "psnr": "PSNR", "ssim": "SSIM",
    "lpips": "LPIPS", "l1": "L1",
}  # fmt: skip


def label(key: str) -> str:
    """The printed name of a metric's key: `rfid_mini` is "rFID (mini)", and so is every other network named."""
    for known, name in LABELS.items():
        if key == known:
            return name
        if key.startswith(f"{known}_"):
            return f"{name} ({key.removeprefix(f'{known}_')})"
    return key


def number(value: float | None) -> str:
    """Three or four digits behind the point; None is `-`."""
    if value is None:
        return "-"
    return f"{value:.3f}" if abs(value) >= 1 else f"{value:.4f}"


def align(rows: list[list[str]]) -> str:
    """Columns of equal width, the first to the left and numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for first, *rest in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def save_json(path: str | Path, values: Mapping[str, Any]) -> None:
    """Write a result; whoever reads the file meets the old one or the new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(values, indent=2) + "\n").encode())
