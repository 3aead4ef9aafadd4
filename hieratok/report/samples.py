"""What a generator makes, class by class and scale by scale, as PNG images inside the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..engine.pictures import to_array
from ..engine.settings import SamplingConfig
from ..errors import DataError
from ..generation.loading import load_pipeline
from ..generation.sampling import Sampler
from .gallery import png_uri
from .record import evenly

SHOWN = 8
SHOWN_OF_ONE_SCALE = 12


@dataclass(frozen=True)
class Sample:
    """One generated image as data URIs, coarse to fine at their own sizes, with the name of its class."""

    name: str
    scales: tuple[str, ...]


@dataclass(frozen=True)
class Samples:
    """`sides`: of the token maps, coarse to fine; `pixels`: sides of their images; `how`: a sentence, or empty."""

    sides: tuple[int, ...]
    pixels: tuple[int, ...]
    rows: tuple[Sample, ...]
    how: str


def build_samples(scales: Sequence[Tensor], sides: Sequence[int], names: Sequence[str], how: str = "") -> Samples:
    """Samples for a page.

    Args:
        scales: per scale uint8 `(B, 3, s, s)`, coarse to fine.
        sides: sides of the token maps.
        names: B names of classes.
        how: a sentence on how they were drawn.

    Raises:
        DataError: there is not one scale for each side and one name for each image.
    """
    if len(scales) != len(sides) or any(len(images) != len(names) for images in scales):
        shapes = ", ".join(str(tuple(images.shape)) for images in scales)
        raise DataError(f"samples need an image of every scale for each of {len(sides)} sides and {len(names)} names, "
                        f"got {shapes}")  # fmt: skip
    rows = [
        Sample(name, tuple(png_uri(to_array(image)) for image in images))
        for name, *images in zip(names, *scales, strict=True)
    ]
    return Samples(tuple(sides), tuple(images.shape[-1] for images in scales), tuple(rows), how)


def draw_samples(generator: str | Path, sampling: SamplingConfig) -> Samples:
    """What a generator makes of some of its classes; the same generator makes the same.

    Args:
        generator: a run or a saved pipeline, see `load_pipeline`.
        sampling: scheduler, steps and guidance.

    Raises:
        CheckpointError: there is no whole generator.
        ConfigError: a scheduler that does not go with it.
    """
    pipeline = load_pipeline(generator)
    if torch.accelerator.is_available():
        pipeline.to(torch.accelerator.current_accelerator())
    labels = spread_classes(pipeline.num_classes, SHOWN if len(pipeline.sides) > 1 else SHOWN_OF_ONE_SCALE)
    sampler = Sampler(pipeline, sampling)
    scale = sampling.guidance_scale
    guidance = "without guidance" if scale == 1 else f"with guidance {scale:g}"
    how = f"Drawn by {sampler.protocol['scheduler']} in {sampler.steps} steps, {guidance}."
    made = sampler.scales(labels, range(len(labels)))
    return build_samples(made, pipeline.sides, [pipeline.class_names[label] for label in labels], how)


def spread_classes(num_classes: int, count: int) -> list[int]:
    """`count` labels in order: each class as often as another, or once, evenly chosen, of more classes than that."""
    chosen = evenly(range(num_classes), count)
    return sorted((chosen * -(-count // len(chosen)))[:count])
