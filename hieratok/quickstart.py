"""From nothing to a trained tokenizer, a generator on its latents, and a page about both, in minutes."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

from . import testbed
from .config import load_recipe, merge, to_dict
from .data.latents import encode
from .engine.run_folder import CONFIG, GENERATOR, RUN, load_tokenizer
from .errors import ConfigError, MissingDependencyError
from .evaluation.judge import judge, prepare
from .report.run_report import report
from .training.generator import GeneratorRun, train_generator
from .training.tokenizer import TokenizerRun, train_tokenizer

LATENTS = "latents"  # below the run's folder


def quickstart(
    data: str | None = None,
    minutes: float | None = None,
    output: str = "runs/quickstart",
    *,
    generator_minutes: float | None = None,
    seed: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> Path:
    """Train the recipe `quickstart-64`, then `quickstart-generator` on its latents, and give the report's path.

    Both are judged: the tokenizer on held-out images, the generator against the images that it learned from.

    Args:
        data: `openmoji` (None), or images of one's own (see `DataConfig.source`); the tokenizer holds some out.
        minutes: of the tokenizer's training; None is the recipe's.
        output: the tokenizer's run; the generator's is the folder `generator` in it, its latents are in `latents`.
        generator_minutes: of the generator's training; None is the recipe's, 0 trains none.
        seed: of weights, order and noise; 0 for None.
        resume: go on with the run that is in `output`, with its own data, seed and, unless given, minutes.
        overwrite: remove the run that is in `output` first; a folder that holds no run is never removed.

    Raises:
        ConfigError: `output` holds a run and neither `resume` nor `overwrite` is set, or something else.
        HieratokError: as `train_tokenizer`, `encode` and `train_generator` do.
    """
    folder = Path(output)
    if minutes is not None and minutes <= 0:
        raise ConfigError(f"minutes is {minutes}; it must be above 0")
    if generator_minutes is not None and generator_minutes < 0:
        raise ConfigError(f"generator_minutes is {generator_minutes}; it must be above 0, or 0 for no generator")
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
    if generator_minutes != 0:
        train_on_latents(run, generator_minutes, resume)
    return report(folder)


def train_on_latents(run: TokenizerRun, minutes: float | None, resume: bool) -> Path:
    """Encode the images of a tokenizer's run, and train a generator on the latents; gives the generator's run."""
    folder = Path(run.output)
    if resume and (folder / GENERATOR / CONFIG).is_file():
        values = load_recipe((folder / GENERATOR / CONFIG).resolve())
    else:
        data = {**to_dict(run.data), "num_workers": 0}
        recipe = load_recipe("quickstart-generator")
        if run.data.source == "openmoji":  # the recipe's own is a part of it
            del data["source"]
        values = merge(recipe, {
            "seed": run.seed, "data": data, "tokenizer": str(folder), "latents": str(folder / LATENTS),
            "output": str(folder / GENERATOR),
        })  # fmt: skip
    given = {} if minutes is None else {"train": {"max_minutes": minutes}}
    generator = GeneratorRun.from_mapping(merge(values, given))
    tokenizer = load_tokenizer(folder)
    frame = run.data.frame(int(tokenizer.config.image_size))
    encode(
        tokenizer, generator.data.open("all"), folder / LATENTS, num_workers=run.data.num_workers, precision="bf16",
        seed=run.seed, frame=frame, max_bad_fraction=run.data.max_bad_fraction,
        flip=generator.data.flip,
    )  # fmt: skip
    testbed.prepare(generator)
    return train_generator(generator, resume=resume, tools=testbed.TOOLS)


def require_report_libraries() -> None:
    """Raise a MissingDependencyError before the training rather than after it."""
    missing = [name for name in ("jinja2", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(f"the report needs {' and '.join(missing)}: pip install 'hieratok[report]'")
