"""How an image of any size becomes a square of `image_size` pixels."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

Crop = Literal["center", "random", "squash"]

# A random crop keeps at least this part of the shorter side, so that the subject stays in view.
MIN_CROP = 0.8


@dataclass(frozen=True)
class Frame:
    """What is done to every image of a data set between decoding and the batch.

    `crop`: `center` scales the shorter side to the square and cuts the rest off; `random` cuts a square of 0.8 to 1
    of the shorter side anywhere; `squash` scales both sides. `flip`: mirror half of the training samples.
    `augment` matters to rendered sets only: they vary scale, position, rotation and background. Without a random
    number generator (evaluation) every crop is the centre's and nothing is flipped.
    """

    image_size: int
    crop: Crop = "center"
    flip: bool = False
    augment: bool = True
    background: str = "white"
    max_pixels: int = 64_000_000

    @property
    def decode_side(self) -> int:
        """The shorter side that decoding must deliver for the tightest crop."""
        return int(np.ceil(self.image_size / MIN_CROP)) if self.crop == "random" else self.image_size


def crop_image(image: Image.Image, frame: Frame, rng: random.Random | None) -> np.ndarray:
    """An RGB image as uint8 `(S, S, 3)`; resized by Lanczos with antialiasing."""
    side = frame.image_size
    width, height = image.size
    if frame.crop == "squash":
        box = (0.0, 0.0, float(width), float(height))
    else:
        short = min(width, height)
        if frame.crop == "random" and rng is not None:
            kept = short * rng.uniform(MIN_CROP, 1.0)
            left, top = rng.uniform(0, width - kept), rng.uniform(0, height - kept)
        else:
            kept, left, top = short, (width - short) / 2, (height - short) / 2
        box = (left, top, left + kept, top + kept)
    if box != (0, 0, side, side) or image.size != (side, side):
        image = image.resize((side, side), Image.Resampling.LANCZOS, box=box)
    if frame.flip and rng is not None and rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.array(image)
