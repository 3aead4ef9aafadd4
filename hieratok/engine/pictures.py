"""Pictures of a run, each one sheet of tiles: reconstructions beside their originals, and generated samples."""

from __future__ import annotations

import io
import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor

from ..errors import DataError
from ..files import write_atomically

GAP = 6
CAPTION = 18
NAMES = 112  # at the left of rows that have names
FONT_SIZE = 12
PAPER = (255, 255, 255)
INK = (60, 60, 67)
LARGEST_ERROR = 64  # of 255: the brightest colour of the error map
LAYOUT = "hieratok samples"  # the text field of a PNG that says how its tiles lie

# Dark to light through purple and orange, so that a larger error is a lighter colour.
ERROR_COLOURS = np.array([[0, 0, 4], [81, 18, 124], [183, 55, 121], [252, 137, 97], [252, 253, 191]], dtype=float)


@dataclass(frozen=True)
class SampleGrid:
    """What a `sample_grid` holds: uint8 tiles `(R, C, S, S, 3)`, and the names of its rows or none."""

    tiles: np.ndarray
    row_names: tuple[str, ...]


def reconstruction_grid(
    originals: Tensor, scales: Sequence[Tensor], sides: Sequence[int], before: Tensor | None = None
) -> Image.Image:
    """A row per image: the original, every scale from coarse to fine, and the error.

    Args:
        originals: uint8 `(B, 3, S, S)`.
        scales: per scale uint8 `(B, 3, s, s)`, coarse to fine; the last is of the originals' size.
        sides: sides of the token maps, for the captions.
        before: uint8 `(B, 3, S, S)`, reconstructions by an earlier tokenizer, shown left of the finest ones.
    """
    captions = ["original", *scale_captions(sides), f"error x{255 // LARGEST_ERROR}"]
    if before is not None:
        captions.insert(-2, "before")
    rows = []
    for index, image in enumerate(originals):
        original = to_array(image)
        pictures = [original, *(to_array(scale[index]) for scale in scales)]
        if before is not None:
            pictures.insert(-1, to_array(before[index]))
        rows.append([*pictures, error_map(original, pictures[-1])])
    return sheet(rows, cell_of(originals.shape[-1]), captions)


def sample_grid(images: Tensor, num_columns: int, row_names: Sequence[str] = ()) -> Image.Image:
    """Generated images, a row per class; `cut_sample_grid` gets them out of its PNG again.

    Args:
        images: uint8 `(R * C, 3, S, S)`, row by row.
        num_columns: C.
        row_names: R names of classes, which stand at the left, or none.

    Raises:
        DataError: the images do not fill whole rows, or there are fewer or more names than rows.
    """
    count, side = len(images), images.shape[-1]
    if num_columns < 1 or count == 0 or count % num_columns:
        raise DataError(f"{count} images do not fill rows of {num_columns}; give num_columns times the rows")
    tiles = [to_array(image) for image in images]
    rows = [tiles[i : i + num_columns] for i in range(0, count, num_columns)]
    picture = sheet(rows, cell_of(side), row_names=row_names)
    picture.info[LAYOUT] = json.dumps({"side": side, "columns": num_columns, "row_names": list(row_names)})
    return picture


def scales_grid(scales: Sequence[Tensor], sides: Sequence[int], row_names: Sequence[str] = ()) -> Image.Image:
    """A row per generated image, a column per scale from coarse to fine, as in Figures 6 to 9 of the paper.

    Args:
        scales: per scale uint8 `(B, 3, s, s)`, coarse to fine.
        sides: sides of the token maps, for the captions.
        row_names: B names, which stand at the left, or none.

    Raises:
        DataError: there are fewer or more names than images.
    """
    rows = [[to_array(image) for image in images] for images in zip(*scales, strict=True)]
    return sheet(rows, cell_of(scales[-1].shape[-1]), scale_captions(sides), row_names)


def sheet(
    rows: Sequence[Sequence[np.ndarray]], cell: int, captions: Sequence[str] = (), row_names: Sequence[str] = ()
) -> Image.Image:
    """Tiles on paper, enlarged without smoothing, with captions over the columns and names at the left of the rows.

    Args:
        rows: per row as many tiles, uint8 `(s, s, 3)` of any size.
        cell: side of every tile on the sheet.
        captions: of the first columns; none leaves no room for them.
        row_names: one per row, shortened to fit, or none.

    Raises:
        DataError: there are fewer or more names than rows.
    """
    if row_names and len(row_names) != len(rows):
        raise DataError(f"row_names has {len(row_names)} names for {len(rows)} rows; give one for each, or none")
    left, top = NAMES if row_names else 0, CAPTION if captions else 0
    size = (left + len(rows[0]) * (cell + GAP) - GAP, top + len(rows) * (cell + GAP) - GAP)
    picture = Image.new("RGB", size, PAPER)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=FONT_SIZE)
    for column, caption in enumerate(captions):
        draw.text((left + column * (cell + GAP), 1), caption, fill=INK, font=font)
    for row, name in enumerate(row_names):
        place = (GAP, top + row * (cell + GAP) + cell // 2)
        draw.text(place, shortened(name, NAMES - 2 * GAP), fill=INK, font=font, anchor="lm")
    for row, tiles in enumerate(rows):
        for column, tile in enumerate(tiles):
            enlarged = Image.fromarray(tile).resize((cell, cell), Image.Resampling.NEAREST)
            picture.paste(enlarged, (left + column * (cell + GAP), top + row * (cell + GAP)))
    return picture


def cell_of(side: int) -> int:
    """Side on a sheet of images of `side` pixels: a whole multiple, near 96 for small ones."""
    return side * max(1, round(96 / side))


def scale_captions(sides: Sequence[int]) -> list[str]:
    return [f"{side} x {side}" for side in sides]


def shortened(text: str, width: int) -> str:
    """Text that is at most `width` pixels wide, with dots for what was left out."""
    # The font that comes with Pillow has no other letters.
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode() or "?"
    font = ImageFont.load_default(size=FONT_SIZE)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1].rstrip()
    return f"{text}..."


def cut_sample_grid(picture: Image.Image | str | Path) -> SampleGrid:
    """The tiles of a `sample_grid` at their own size, from the picture or the PNG that `save_picture` made of it.

    Raises:
        DataError: the picture is no such grid.
    """
    if not isinstance(picture, Image.Image):
        with Image.open(picture) as file:
            file.load()
            return cut_sample_grid(file)
    name = getattr(picture, "filename", "") or "the picture"
    try:
        layout = json.loads(picture.info[LAYOUT])
        side, columns, names = int(layout["side"]), int(layout["columns"]), tuple(map(str, layout["row_names"]))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{name} is no grid of samples; give one that the training of a generator drew") from error
    tiles = cut_sheet(picture, side, columns, left=NAMES if names else 0)
    if tiles is None or len(names) not in (0, len(tiles)):
        raise DataError(f"{name} was changed since it was drawn: its size does not fit {columns} tiles of {side} px")
    return SampleGrid(tiles, names)


def cut_sheet(picture: Image.Image, side: int, columns: int, *, left: int = 0, top: int = 0) -> np.ndarray | None:
    """The tiles `(R, C, S, S, 3)` of a sheet whose images are of `side` S pixels; None where it is laid out otherwise.

    `left` and `top`: what the sheet keeps for names and captions.
    """
    pixels = np.asarray(picture.convert("RGB"))[top:, left:]
    cell = (pixels.shape[1] + GAP) // columns - GAP
    if cell < side or cell % side or (cell + GAP) * columns - GAP != pixels.shape[1]:
        return None
    rows, rest = divmod(pixels.shape[0] + GAP, cell + GAP)
    if rows == 0 or rest:
        return None
    padded = np.pad(pixels, ((0, GAP), (0, GAP), (0, 0)))
    cells = padded.reshape(rows, cell + GAP, columns, cell + GAP, 3).swapaxes(1, 2)
    enlarged = cell // side
    return cells[:, :, :cell:enlarged, :cell:enlarged]


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
    data, text = io.BytesIO(), PngImagePlugin.PngInfo()
    if LAYOUT in image.info:
        text.add_text(LAYOUT, image.info[LAYOUT])
    image.save(data, format="PNG", pnginfo=text)
    write_atomically(path, data.getvalue())
    return path
