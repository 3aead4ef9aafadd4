"""From nothing to a trained tokenizer and a page about it, in minutes."""

from __future__ import annotations

import shutil
from pathlib import Path

from .config import load_recipe, merge
from .engine.run_folder import RUN
from .errors import ConfigError
from .evaluation.judge import judge
from .report.run_report import report
from .training.tokenizer import TokenizerRun, train_tokenizer


def quickstart(
    data: str = "openmoji",
    minutes: float = 4.0,
    output: str = "runs/quickstart",
    *,
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
) -> Path:
    """Train the recipe `quickstart-64` for some minutes, judge it on held-out images, and give the report's path.

    Args:
        data: `openmoji`, or images of one's own (see `DataConfig.source`); some are held out.
        minutes: of training; evaluation and the report take half a minute more.
        output: the run's folder.
        seed: of weights, order and noise.
        resume: go on with an interrupted run.
        overwrite: remove the run that is in `output` first; a folder that holds no run is never removed.

    Raises:
        ConfigError: `output` holds a run and neither `resume` nor `overwrite` is set, or something else.
        HieratokError: as `train_tokenizer` does.
    """
    folder = Path(output)
    if minutes <= 0:
        raise ConfigError(f"minutes is {minutes}; it must be above 0")
    if folder.is_dir() and any(folder.iterdir()) and not resume:
        if not (folder / RUN).is_file():
            raise ConfigError(f"{folder} is not empty and holds no run; name another folder with --output")
        if not overwrite:
            raise ConfigError(
                f"{folder} already holds a run; --overwrite replaces it, --resume goes on with it, --output FOLDER "
                f"keeps both"
            )
        shutil.rmtree(folder)
    values = merge(
        load_recipe("quickstart-64"),
        {"seed": seed, "output": output, "data": {"source": data}, "train": {"max_minutes": minutes}},
    )
    train_tokenizer(TokenizerRun.from_mapping(values), resume=resume, evaluator=judge)
    return report(folder)
