"""The page of a run, from its folder alone."""

from __future__ import annotations

from pathlib import Path

from ..config import build, load_recipe
from ..data.opening import DataConfig
from ..data.source import spread
from ..engine.run_folder import CONFIG, load_tokenizer
from ..errors import ConfigError
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
    if not (folder / CONFIG).is_file():
        raise ConfigError(f"{folder} holds no run: there is no {CONFIG} in it")
    data = build(DataConfig, load_recipe((folder / CONFIG).resolve()).get("data", {}), "data")
    model = load_tokenizer(folder)
    # Neighbours look alike in a sorted set, hence a spread; its ends are left out, where the odd ones lie.
    images = pick_images(spread(data.open("val"), SHOWN + 2), data.frame(int(model.config.image_size)), SHOWN + 2)
    return write_report(folder, model=model, images=images[1:-1], output=output)
