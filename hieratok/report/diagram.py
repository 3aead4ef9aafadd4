"""The architecture as an inline SVG, drawn from a model's own numbers and, where there is one, a reconstruction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ..models.scales import ScaleLayout
from ..models.tokenizer import powers_of_two
from .gallery import GalleryRow
from .palette import css, scale_colours

WIDTH, HEIGHT = 1080, 330
MIDDLE = 150  # height of the axis that the arrows follow
GAP = 11  # between the scales of a column


def architecture(model: Mapping[str, Any], row: GalleryRow | None = None) -> str:
    """Image, encoder, latents, token maps, decoder, images, left to right, as an `<svg>` string.

    Args:
        model: all fields of HieraTok, as `hieratok.models.presets.model_fields` gives them.
        row: the images to show at both ends; without one they are flat squares.
    """
    size, p, channels = model["image_size"], model["patch_size"], model["latent_channels"]
    grid = size // p
    sides = tuple(model["scales"] or powers_of_two(grid))
    colours = scale_colours(len(sides))
    boxes = _boxes(len(sides))
    parts = [
        _picture(0, MIDDLE - 56, 112, row.original if row else None),
        _caption(56, MIDDLE + 76, "image", f"{size} × {size} px"),
        _arrow(120, 148),
        _block(154, MIDDLE - 46, 122, 92, "Encoder"),
        _text(215, MIDDLE + 8, f"{model['encoder_num_layers']} layers", "soft"),
        _text(215, MIDDLE + 25, f"width {model['encoder_hidden_size']}", "soft"),
        _arrow(284, 314),
        *(_grid(326 + 7 * i, MIDDLE - 37 - 7 * i, 74, grid, "faint", "paper") for i in (2, 1, 0)),
        _caption(370, MIDDLE + 58, "latent", f"{grid} × {grid} × {channels}"),
        _text(370, MIDDLE + 90, "sampled from a", "soft", 11.5),
        _text(370, MIDDLE + 105, "Gaussian posterior", "soft", 11.5),
        _arrow(424, 454),
    ]
    for (y, tile), side, colour in zip(boxes, sides, colours, strict=True):
        parts.append(_grid(528 - tile / 2, y, tile, side, colour, "paper"))
        parts.append(_text(528 + tile / 2 + 8, y + tile / 2 + 4, f"{side} × {side}", colour, 12, "start"))
    parts += [
        _caption(528, HEIGHT - 26, "token maps", f"{ScaleLayout(sides).num_tokens} tokens"),
        _arrow(626, 656),
        _block(664, MIDDLE - 112, 182, 224, "Decoder"),
        _text(755, MIDDLE - 68, f"{model['decoder_num_layers']} layers, width {model['decoder_hidden_size']}", "soft"),
        *_mask(755, MIDDLE + 16, 112, sides, colours, model["attention_pattern"]),
        _text(755, MIDDLE + 96, f"{model['attention_pattern'].replace('_', '-')} attention", "soft", 11.5),
        _arrow(854, 884),
    ]
    for i, ((y, tile), side, colour) in enumerate(zip(boxes, sides, colours, strict=True)):
        parts.append(_picture(976 - tile / 2, y, tile, row.scales[i] if row else None, colour))
        parts.append(_text(976 + tile / 2 + 8, y + tile / 2 + 4, f"{side * p} px", colour, 12, "start"))
    parts.append(_caption(976, HEIGHT - 26, "one image per scale", "one head paints every patch"))
    if model["pixel_head"] != "shared":
        parts[-1] = _caption(976, HEIGHT - 26, "one image per scale", "a head of its own for each")
    label = escape(f"Architecture: image, encoder, latent, token maps of sides {sides}, decoder, one image per scale")
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _boxes(num_scales: int) -> list[tuple[float, float]]:
    """`(y, side)` of each scale's square in a column around the middle, growing from coarse to fine."""
    steps = max(num_scales - 1, 1)
    tiles = [30 + 56 * i / steps for i in range(num_scales)] if num_scales > 1 else [112.0]
    room = 270 - GAP * (num_scales - 1)
    shrink = min(1.0, room / sum(tiles))
    tiles = [tile * shrink for tile in tiles]
    y = MIDDLE - (sum(tiles) + GAP * (num_scales - 1)) / 2
    boxes = []
    for tile in tiles:
        boxes.append((y, tile))
        y += tile + GAP
    return boxes


def _text(x: float, y: float, text: str, colour: str, size: float = 12.5, anchor: str = "middle") -> str:
    style = f"fill:{css(colour)};font-size:{size}px;text-anchor:{anchor}"
    return f'<text x="{x:.1f}" y="{y:.1f}" style="{style}">{escape(text)}</text>'


def _caption(x: float, y: float, name: str, detail: str) -> str:
    title = f'<text x="{x}" y="{y}" style="fill:{css("ink")};font-size:13px;font-weight:600;text-anchor:middle">'
    return f"{title}{escape(name)}</text>" + _text(x, y + 16, detail, "soft", 11.5)


def _arrow(start: float, end: float) -> str:
    line = f"M{start} {MIDDLE}H{end}M{end - 5} {MIDDLE - 4}L{end} {MIDDLE}L{end - 5} {MIDDLE + 4}"
    return f'<path d="{line}" style="fill:none;stroke:{css("faint")};stroke-width:1.2"/>'


def _block(x: float, y: float, width: float, height: float, name: str) -> str:
    style = f"fill:{css('raised')};stroke:{css('rule')}"
    box = f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" style="{style}"/>'
    style = f"fill:{css('ink')};font-size:14px;font-weight:600;text-anchor:middle"
    return box + f'<text x="{x + width / 2}" y="{y + 27}" style="{style}">{name}</text>'


def _grid(x: float, y: float, size: float, cells: int, colour: str, fill: str) -> str:
    """A square of `cells` x `cells`."""
    lines = "".join(f"M{x + size * i / cells:.2f} {y:.2f}v{size:.2f}" for i in range(1, cells))
    lines += "".join(f"M{x:.2f} {y + size * i / cells:.2f}h{size:.2f}" for i in range(1, cells))
    stroke = f"stroke:{css(colour)}"
    square = f'<rect x="{x:.2f}" y="{y:.2f}" width="{size:.2f}" height="{size:.2f}" rx="2"'
    wash = f'{square} style="fill:{css(colour)};fill-opacity:.10;{stroke};stroke-width:1.2"/>'
    paper = f'{square} style="fill:{css(fill)}"/>'
    return paper + wash + (f'<path d="{lines}" style="fill:none;{stroke};stroke-width:.6"/>' if lines else "")


def _picture(x: float, y: float, size: float, uri: str | None, colour: str = "rule") -> str:
    place = f'x="{x:.2f}" y="{y:.2f}" width="{size:.2f}" height="{size:.2f}"'
    if uri is None:
        return f'<rect {place} rx="2" style="fill:{css(colour)};fill-opacity:.35"/>'
    frame = f'<rect {place} style="fill:none;stroke:{css(colour)};stroke-width:1.2"/>'
    return f'<image {place} href="{uri}" style="image-rendering:pixelated"/>{frame}'


def _mask(x: float, y: float, size: float, sides: Sequence[int], colours: Sequence[str], pattern: str) -> list[str]:
    """Which scale (row) sees which (column): a square centred on `(x, y)`, scales drawn equally wide."""
    layout = ScaleLayout(tuple(sides))
    cell = size / len(sides)
    parts = []
    for i, (first, last) in enumerate(layout.key_spans(pattern)):
        for j, (start, end) in enumerate(layout.spans):
            seen = first <= start and end <= last
            style = f"fill:{css(colours[i])}" if seen else f"fill:{css('rule')};fill-opacity:.7"
            place = f'x="{x - size / 2 + cell * j + 1:.2f}" y="{y - size / 2 + cell * i + 1:.2f}"'
            parts.append(f'<rect {place} width="{cell - 2:.2f}" height="{cell - 2:.2f}" rx="2" style="{style}"/>')
    return parts
