"""The page of a run, from its folder alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..config import build
from ..data.source import ImageSource, Subset, spread
from ..engine.run_folder import GENERATOR, PIPELINE, RUN, load_tokenizer, run_data
from ..engine.settings import SamplingConfig
from ..errors import CheckpointError
from ..training.tokenizer import pick_images
from .generator_page import describe, write_generator_report
from .page import write_report
from .record import RunRecord, read_run
from .samples import Samples, draw_samples

SHOWN = 6  # held-out images in the gallery


def report(folder: str | Path, output: str | Path | None = None) -> Path:
    """Write `report.html` of a run and give its path.

    A tokenizer's page shows its reconstructions of held-out images, and, where its folder holds the run of a generator
    (`generator/`), what that makes of its latents. A generator's page shows its samples.

    Raises:
        CheckpointError: the folder holds no run, or a tokenizer's that has no whole model yet.
        ConfigError: the recipe of the run is damaged.
        DataError: the run's images are no longer where they were.
        MissingDependencyError: jinja2 or matplotlib is not installed.
    """
    folder = Path(folder)
    record = read_run(folder)
    if record.is_generator:
        return write_generator_report(folder, samples=samples_of(record), output=output)
    data = run_data(folder)
    model = load_tokenizer(folder)
    images = pick_images(one_per_class(data.open("val"), SHOWN), data.frame(int(model.config.image_size)), SHOWN)
    inside = folder / GENERATOR
    generation = None
    if (inside / RUN).is_file():
        generator = read_run(inside, "generator")
        generation = describe(generator, samples_of(generator))
    return write_report(folder, model=model, images=images, generation=generation, output=output)


def samples_of(generator: RunRecord) -> Samples | None:
    """What a generator makes; None while its run holds none.

    Raises:
        CheckpointError: the generator of a finished run is damaged.
    """
    sampling = build(SamplingConfig, generator.config.get("sampling") or {}, "sampling")
    dropped = (generator.config.get("loss") or {}).get("class_dropout", 0)
    if dropped and len(generator.run.get("classes") or ()) > 1:  # else there is nothing to guide away from
        sampling = sampling.for_pictures()
    try:
        return draw_samples(generator.folder, sampling)
    except CheckpointError:
        if (generator.folder / PIPELINE).is_dir():
            raise
        return None


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
