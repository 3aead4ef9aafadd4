"""From nothing to a trained tokenizer and a page about it, in minutes."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

from .config import load_recipe, merge
from .engine.run_folder import CONFIG, RUN
from .errors import ConfigError, MissingDependencyError
from .evaluation.judge import judge, prepare
from .report.run_report import report
from .training.tokenizer import TokenizerRun, train_tokenizer


def quickstart(
    data: str | None = None,
    minutes: float | None = None,
    output: str = "runs/quickstart",
    *,
    seed: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> Path:
    """Train the recipe `quickstart-64` for some minutes, judge it on held-out images, and give the report's path.

    Args:
        data: `openmoji` (None), or images of one's own (see `DataConfig.source`); some are held out.
        minutes: of training, 4 for None; evaluation and the report take half a minute more.
        output: the run's folder.
        seed: of weights, order and noise; 0 for None.
        resume: go on with the run that is in `output`, with its own data, seed and, unless given, minutes.
        overwrite: remove the run that is in `output` first; a folder that holds no run is never removed.

    Raises:
        ConfigError: `output` holds a run and neither `resume` nor `overwrite` is set, or something else.
        HieratokError: as `train_tokenizer` does.
    """
    folder = Path(output)
    if minutes is not None and minutes <= 0:
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
    known = folder / CONFIG
    values = load_recipe(known.resolve() if resume and known.is_file() else "quickstart-64")
    given: dict[str, Any] = {"output": output}
    given |= {} if seed is None else {"seed": seed}
    given |= {} if data is None else {"data": {"source": data}}
    given |= {} if minutes is None else {"train": {"max_minutes": minutes}}
    run = TokenizerRun.from_mapping(merge(values, given))
    require_report_libraries()
    prepare(run)
    train_tokenizer(run, resume=resume, evaluator=judge)
    return report(folder)


def require_report_libraries() -> None:
    """Raise a MissingDependencyError before the training rather than after it."""
    missing = [name for name in ("jinja2", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(f"the report needs {' and '.join(missing)}: pip install 'hieratok[report]'")
