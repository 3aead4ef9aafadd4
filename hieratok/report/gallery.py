"""Reconstructions at every scale beside their originals, as PNG images inside the page."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data.decode import to_float, to_uint8
from ..engine.pictures import error_map, to_array
from ..errors import DataError
from ..models.tokenizer import HieraTok


@dataclass(frozen=True)
class GalleryRow:
    """One image as data URIs. `scales` are its reconstructions coarse to fine at their own sizes; `psnr` in dB."""

    original: str
    scales: tuple[str, ...]
    error: str
    psnr: float


@dataclass(frozen=True)
class Gallery:
    """`sides`: of the token maps, coarse to fine; `pixels`: sides of the images painted from them."""

    sides: tuple[int, ...]
    pixels: tuple[int, ...]
    rows: tuple[GalleryRow, ...]


def build_gallery(model: HieraTok, images: Sequence[Tensor | np.ndarray] | Tensor) -> Gallery:
    """What the model makes of images at each of its scales, decoded from the posterior's mode.

    Args:
        model: any device and precision; its training mode is left as it was.
        images: uint8 images of the model's size, tensors `(3, S, S)` or arrays `(S, S, 3)`.

    Raises:
        DataError: no images, or of another size or type than the model's.
    """
    batch = _batch(images, model.config.image_size)
    weight = next(model.parameters())
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            inputs = to_float(batch).to(weight.device, weight.dtype)
            decoded = model.decode(model.encode(inputs).latent_dist.mode()).scales
    finally:
        model.train(training)
    scales = [to_uint8(image).cpu() for image in decoded]
    rows = []
    for i, image in enumerate(batch):
        original, pictures = to_array(image), [to_array(scale[i]) for scale in scales]
        difference = (pictures[-1].astype(float) - original) / 255
        rows.append(
            GalleryRow(
                original=png_uri(original),
                scales=tuple(png_uri(picture) for picture in pictures),
                error=png_uri(error_map(original, pictures[-1])),
                psnr=psnr(float(np.square(difference).mean())),
            )
        )
    return Gallery(model.layout.sides, tuple(scale.shape[-1] for scale in scales), tuple(rows))


def _batch(images: Sequence[Tensor | np.ndarray] | Tensor, side: int) -> Tensor:
    """`(B, 3, S, S)` uint8."""
    chw = [torch.from_numpy(np.array(i)).permute(2, 0, 1) if isinstance(i, np.ndarray) else i.cpu() for i in images]
    if not chw:
        raise DataError("the gallery needs at least one image; give images, or leave model and images out")
    for image in chw:
        if image.dtype != torch.uint8 or tuple(image.shape) != (3, side, side):
            raise DataError(
                f"the gallery needs uint8 images of 3 x {side} x {side}, the model's size, "
                f"got {image.dtype} {tuple(image.shape)}; resize them first"
            )
    return torch.stack(chw)


def psnr(mean_square: float) -> float:
    """Of values in [0, 1], in dB; infinite for equal images."""
    return -10 * math.log10(mean_square) if mean_square > 0 else math.inf


def png_uri(pixels: np.ndarray) -> str:
    """A `data:` URI with the PNG of `(H, W, 3)` uint8 pixels."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
