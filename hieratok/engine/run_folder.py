"""The folder of a run: what it was asked to do, and the models in it."""

from __future__ import annotations

import json
import platform
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol, TypeVar

import yaml
from torch import nn

from ..config import build, load_recipe
from ..data.opening import DataConfig
from ..errors import CheckpointError, ConfigError, HieratokError
from ..files import sync, write_atomically
from ..models.autoencoder import Autoencoder
from ..models.tokenizer import HieraTok
from . import checkpoint

M = TypeVar("M", bound=nn.Module)

RUN, CONFIG, MODEL, CHECKPOINTS = "run.json", "config.yaml", "model", "checkpoints"
EVALUATION, PICTURES, PIPELINE = "eval.json", "pictures", "pipeline"  # the last in a generator's run only
GENERATOR = "generator"  # the run of a generator on a tokenizer's latents, within the tokenizer's own

# Changing one of these makes another run; all else may change when a run goes on.
FIXED = (
    "model",
    "init_from",
    "discriminator.kind",
    "discriminator.width",
    "discriminator.foundation",
    "tokenizer",
    "image_size",
    "latents",
    "normalization",
    "data",
    "seed",
    "loss",
    "train.batch_size",
    "train.accumulation",
    "train.optimizer",
    "train.freeze",
)
FREE = ("data.num_workers", "data.max_bad_fraction", "data.max_val_images")


class Saveable(Protocol):
    """A model or pipeline of diffusers' kind."""

    def save_pretrained(self, path: Path) -> Any: ...


def start(folder: Path, config: Mapping[str, Any], facts: Mapping[str, Any], *, resume: bool) -> None:
    """Write `run.json` and `config.yaml`, or on `resume` check that the run that is there is the same.

    Raises:
        ConfigError: the folder holds a run and `resume` is off, or the run differs in what must not change.
    """
    record = folder / RUN
    program = Path(sys.argv[0]).name
    values = {
        "config": config,
        "command": shlex.join(["hieratok" if program == "__main__.py" else program, *sys.argv[1:]]),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        **facts,
    }
    if record.exists():
        if not resume:
            raise ConfigError(
                f"{folder} already holds a run; go on with it by --resume, or name another folder with output=FOLDER"
            )
        known = read_record(folder)
        refuse_changes(known["config"], config, known["data"], facts["data"], folder)
        values |= {"started": known["started"], "command": known["command"], "resumed": values["started"]}
    folder.mkdir(parents=True, exist_ok=True)
    # run.json comes last: where it is, the recipe to resume from is too.
    write_atomically(folder / CONFIG, yaml.safe_dump(dict(config), sort_keys=False).encode())
    write_atomically(record, json.dumps(values, indent=1).encode())


def refuse_changes(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    data: Mapping[str, Any],
    data_now: Mapping[str, Any],
    folder: Path,
) -> None:
    """Raise a ConfigError that lists what differs between a run and its resumption, in what must not differ."""
    old, new = flatten(before), flatten(now)
    changed = [
        f"{key}: {old.get(key)!r} before, {new.get(key)!r} now"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key) and key not in FREE and key.startswith(FIXED)
    ]
    if not changed and data["digest"] != data_now["digest"]:
        changed = [f"the images of {data_now['name']}: {data['num_train']} before, {data_now['num_train']} now"]
    if changed:
        listed = "\n  ".join(changed)
        raise ConfigError(
            f"the run in {folder} cannot go on with these changes:\n  {listed}\n"
            f"Take them back, or start a new run with output=FOLDER"
        )


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` to `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def versions() -> dict[str, str]:
    """Of Python and of the libraries that a result depends on."""
    found = {"python": platform.python_version()}
    for name in ("hieratok", "torch", "diffusers", "accelerate", "pillow"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def read_record(folder: Path) -> dict[str, Any]:
    """What `run.json` says.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = folder / RUN
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no {RUN}; give the folder that a training wrote")
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def run_config(folder: str | Path) -> dict[str, Any] | None:
    """The recipe of a run, or None where the folder is no run's."""
    path = Path(folder) / CONFIG
    return load_recipe(path.resolve()) if path.is_file() else None


def run_data(folder: str | Path) -> DataConfig:
    """The `data` section of a run.

    Raises:
        ConfigError: the folder is not that of a run.
    """
    known = run_config(folder)
    if known is None:
        raise ConfigError(f"{folder} is not the folder of a run (there is no {CONFIG} in it); name the images yourself")
    return build(DataConfig, known.get("data", {}), "data")


def load_autoencoder(path: str | Path, image_size: int | None = None) -> Autoencoder:
    """Any tokenizer, in evaluation mode: what `load_tokenizer` takes, or an autoencoder of diffusers.

    Args:
        path: a folder, or the id of an autoencoder on the hub, of which safetensors are downloaded.
        image_size: side of the images in pixels; None is what the model's config says.

    Raises:
        CheckpointError: there is no model, or it is damaged.
        ConfigError: an autoencoder of unknown image size, or no autoencoder.
    """
    folder = Path(path)
    config = folder / "config.json"
    if folder.is_dir() and (not config.is_file() or _class_name(config) in (None, HieraTok.__name__)):
        return Autoencoder(load_tokenizer(folder), image_size)
    import diffusers

    try:
        name = HieraTok.load_config(str(path))["_class_name"]  # any model's; AutoModel forgets the file's name at times
        model_class = HieraTok if name == HieraTok.__name__ else getattr(diffusers, name)
        model, info = model_class.from_pretrained(str(path), use_safetensors=True, output_loading_info=True)
    except Exception as error:  # of diffusers, safetensors, the hub and the network
        raise CheckpointError(
            f"no autoencoder could be loaded from '{path}': give the folder of a tokenizer's run or of a saved model, "
            f"or the hub id of an autoencoder of diffusers ({error})"
        ) from error
    if info["missing_keys"]:  # diffusers warns, and draws them at random
        raise CheckpointError(f"weights are missing in {path}: {', '.join(sorted(info['missing_keys'])[:5])}")
    return Autoencoder(model.eval(), image_size)


def _class_name(config: Path) -> str | None:
    try:
        return json.loads(config.read_text()).get("_class_name")
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{config} is damaged: {error}") from error


def load_tokenizer(path: str | Path) -> HieraTok:
    """The model of a `save_pretrained` folder, of a run's folder, or of a checkpoint; in evaluation mode.

    Of a run that is not finished it is the EMA of the newest whole checkpoint.

    Raises:
        CheckpointError: there is no model, or it is damaged; the message names the file.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"no model at {path}: give the folder of a run, of a checkpoint or of a saved model")
    if (path / MODEL / "config.json").exists():
        path = path / MODEL
    if (path / "config.json").exists():
        try:
            return HieraTok.from_pretrained(path).eval()
        except HieratokError:
            raise
        except Exception as error:  # diffusers and safetensors raise kinds of their own
            raise CheckpointError(f"the model in {path} is damaged: {error}") from error
    if (path / checkpoint.MANIFEST).exists():
        return from_checkpoint(checkpoint.load(path), HieraTok, "tokenizer")
    newest, _ = checkpoint.newest_valid(path / CHECKPOINTS)
    if newest is None:
        raise CheckpointError(f"{path} holds neither a saved model (config.json) nor a run's checkpoints")
    return from_checkpoint(newest, HieraTok, "tokenizer")


def save_model(model: Saveable, path: Path) -> None:
    """`save_pretrained` under another name, then renamed: whoever reads `path` meets a whole model or none."""
    unfinished = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    for file in unfinished.rglob("*"):
        sync(file)
    shutil.rmtree(path, ignore_errors=True)  # checkpoints hold the model until the next line
    unfinished.rename(path)
    sync(path.parent)


def from_checkpoint(saved: checkpoint.Checkpoint, model_class: Callable[..., M], kind: str) -> M:
    """The model of a checkpoint with its averaged weights, where it has them; `kind` is what a message calls it.

    Raises:
        CheckpointError: it is of something else.
    """
    try:
        model = model_class(**saved.state["model"])
        model.load_state_dict(saved.tensors["model"])
        if "ema" in saved.tensors:
            model.load_state_dict(saved.tensors["ema"], strict=False)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{saved.path} does not hold a {kind}: {error}") from error
    return model.eval()
