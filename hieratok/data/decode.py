"""From encoded bytes to an upright RGB image, or the reason why not."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image, ImageColor, ImageOps
from torch import Tensor

from ..errors import ConfigError

# What people keep photographs in. Formats that run an interpreter (EPS, PDF) or that nobody trains on stay out.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".avif", ".jp2")
)


class BadImage(Exception):
    """An image that cannot be used; the message is the reason. Loaders catch it, count it and go on."""


def decode_image(data: bytes, min_side: int | None, max_pixels: int, background: str = "white") -> Image.Image:
    """An upright RGB image: EXIF orientation applied, alpha composed over `background`, 16 bits scaled to 8.

    Args:
        data: an encoded image.
        min_side: the side that will be needed; a JPEG is decoded at the smallest of its built-in scales (1, 1/2, 1/4,
            1/8) that is not below it. None decodes in full.
        max_pixels: images whose header claims more are refused before decoding.
        background: a colour name or `#rrggbb`.

    Raises:
        BadImage: not an image, truncated, too large, or of a kind that has no colours to show.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        if width * height > max_pixels:
            raise BadImage(f"{width} x {height} pixels, more than data.max_pixels = {max_pixels}")
        drafted = image.draft("RGB", (min_side, min_side)) if min_side is not None else None
        image.load()
        if drafted is not None:  # the last row and column of a reduced JPEG may stand for a fraction of a pixel
            whole = round(drafted[1][2]), round(drafted[1][3])
            image = image.crop((0, 0, *whole)) if whole != image.size else image
        return to_rgb(upright(image), background)
    except (BadImage, ConfigError):
        raise
    except Image.DecompressionBombError as error:
        raise BadImage(f"more pixels than data.max_pixels = {max_pixels} or Pillow allows: {error}") from error
    except Exception as error:  # decoders raise whatever they like on damaged data
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, Image.UnidentifiedImageError):
            reason = "empty file" if not data else "not an image of a known format"
        raise BadImage(reason) from error


def upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation says; damaged EXIF data says nothing."""
    try:
        return ImageOps.exif_transpose(image) or image
    except Exception:
        return image


def to_rgb(image: Image.Image, background: str) -> Image.Image:
    """RGB with alpha composed over the background.

    Raises:
        BadImage: floating-point pixels, whose range is anybody's guess.
    """
    if image.mode.startswith("I"):
        image = sixteen_to_eight_bits(image)
    elif image.mode == "F":
        raise BadImage("floating-point pixels have no stated range; convert the image to 8 or 16 bits")
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, parse_colour(background)), rgba).convert("RGB")
    return image.convert("RGB")


def sixteen_to_eight_bits(image: Image.Image) -> Image.Image:
    """Modes `I;16*` and `I` to `L` by 65535 / 255 = 257; Pillow's own conversion clips at 255."""
    values = np.asarray(image).astype(np.int64)
    if image.mode == "I" and (values.min() < 0 or values.max() > 65535):
        raise BadImage("32-bit integer pixels beyond 0..65535 have no stated range")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def parse_colour(colour: str) -> tuple[int, int, int]:
    """`(r, g, b)` of a colour name or `#rrggbb`.

    Raises:
        ConfigError: no such colour.
    """
    try:
        return ImageColor.getcolor(colour, "RGB")  # type: ignore[return-value]
    except ValueError as error:
        raise ConfigError(f"data.background '{colour}' is neither a colour's name nor #rrggbb") from error


def to_float(images: Tensor) -> Tensor:
    """uint8 `(B, 3, H, W)` to float32 in [-1, 1]."""
    return images.to(torch.float32).mul_(2 / 255).sub_(1)


def to_uint8(images: Tensor) -> Tensor:
    """Float `(B, 3, H, W)` in about [-1, 1] to uint8: clamped, then rounded to the nearest."""
    return images.float().clamp(-1, 1).add(1).mul_(127.5).round_().to(torch.uint8)
