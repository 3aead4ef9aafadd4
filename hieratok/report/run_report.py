"""The page of a run, from its folder alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..data.source import ImageSource, Subset, spread
from ..engine.run_folder import load_tokenizer, run_data
from ..training.tokenizer import pick_images
from .page import write_report

SHOWN = 6  # held-out images in the gallery


def report(folder: str | Path, output: str | Path | None = None) -> Path:
    """Write `report.html` of a run, with its model's reconstructions of held-out images; gives its path.

    Raises:
        ConfigError: the folder holds no run.
        CheckpointError: it holds no whole model yet.
        DataError: the run's images are no longer where they were.
    """
    folder = Path(folder)
    data = run_data(folder)
    model = load_tokenizer(folder)
    images = pick_images(one_per_class(data.open("val"), SHOWN), data.frame(int(model.config.image_size)), SHOWN)
    return write_report(folder, model=model, images=images, output=output)


def one_per_class(source: ImageSource, count: int) -> ImageSource:
    """`count` images of as many classes as there are: the middle one of each, then others spread over the set."""
    members: dict[int, list[int]] = {}
    for index in range(len(source)):
        members.setdefault(source.label(index), []).append(index)
    middles = [indices[len(indices) // 2] for _, indices in sorted(members.items())]
    if len(middles) < count:
        others = np.linspace(0, len(source) - 1, count + 2).round().astype(int)[1:-1].tolist()
        middles = list(dict.fromkeys([*middles, *others]))[:count]
    return spread(Subset(source, middles, "one per class"), count)
