"""Reconstructions as a picture: a row per image; the original, every scale from coarse to fine, and the error."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..files import write_atomically

GAP = 6
CAPTION = 18
PAPER = (255, 255, 255)
INK = (60, 60, 67)
LARGEST_ERROR = 64  # of 255: the brightest colour of the error map

# Dark to light through purple and orange, so that a larger error is a lighter colour.
ERROR_COLOURS = np.array([[0, 0, 4], [81, 18, 124], [183, 55, 121], [252, 137, 97], [252, 253, 191]], dtype=float)


def reconstruction_grid(originals: Tensor, scales: Sequence[Tensor], sides: Sequence[int]) -> Image.Image:
    """The grid of a batch.

    Args:
        originals: uint8 `(B, 3, S, S)`.
        scales: per scale uint8 `(B, 3, s, s)`, coarse to fine; the last is of the originals' size.
        sides: sides of the token maps, for the captions.
    """
    side = originals.shape[-1]
    cell = side * max(1, round(96 / side))
    captions = ["original", *(f"{s} x {s}" for s in sides), f"error x{255 // LARGEST_ERROR}"]
    columns, rows = len(captions), len(originals)
    size = (columns * (cell + GAP) - GAP, CAPTION + rows * (cell + GAP) - GAP)
    sheet = Image.new("RGB", size, PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for column, caption in enumerate(captions):
        draw.text((column * (cell + GAP), 1), caption, fill=INK, font=font)
    for row in range(rows):
        original = to_array(originals[row])
        pictures = [original, *(to_array(scale[row]) for scale in scales)]
        pictures.append(error_map(original, pictures[-1]))
        for column, picture in enumerate(pictures):
            tile = Image.fromarray(picture).resize((cell, cell), Image.Resampling.NEAREST)
            sheet.paste(tile, (column * (cell + GAP), CAPTION + row * (cell + GAP)))
    return sheet


def error_map(original: np.ndarray, reconstruction: np.ndarray) -> np.ndarray:
    """Mean absolute difference of the channels of two uint8 `(S, S, 3)` images as colours, black for none."""
    difference = np.abs(original.astype(float) - reconstruction.astype(float)).mean(axis=2)
    place = np.clip(difference / LARGEST_ERROR, 0, 1) * (len(ERROR_COLOURS) - 1)
    stops = np.arange(len(ERROR_COLOURS))
    return np.stack([np.interp(place, stops, ERROR_COLOURS[:, c]) for c in range(3)], axis=-1).round().astype(np.uint8)


def to_array(image: Tensor) -> np.ndarray:
    """uint8 `(3, S, S)` to `(S, S, 3)`."""
    return image.cpu().permute(1, 2, 0).contiguous().numpy()


def save_picture(image: Image.Image, path: Path) -> Path:
    """Write a PNG, in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = io.BytesIO()
    image.save(data, format="PNG")
    write_atomically(path, data.getvalue())
    return path
