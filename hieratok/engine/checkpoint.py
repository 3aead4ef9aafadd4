"""Checkpoints that survive being killed at any moment, and hold nothing that could run code.

A checkpoint is a folder `step-00001000` with safetensors files, `state.json` and `manifest.json`, which names every
file with its size and SHA-256. It is written under another name, flushed to disk, renamed, and only then are older
ones removed. Reading checks the manifest; a damaged checkpoint is named and the one before it is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from ..errors import CheckpointError
from ..files import sync, write_durably

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
FOLDER = re.compile(r"step-(\d{8})$")

Tensors = dict[str, dict[str, Tensor]]


class Checkpoint(NamedTuple):
    """`tensors`: by file (`model`, `ema`, `optimizer`, `rng`), then by name. `state`: everything that is no tensor."""

    path: Path
    step: int
    tensors: Tensors
    state: dict[str, Any]


def save(folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Any, keep: int) -> Path:
    """Write checkpoint `step` below `folder`, then remove older ones until `keep` are left.

    Raises:
        CheckpointError: the disk is full or cannot be written; older checkpoints are untouched.
    """
    final = folder / f"step-{step:08d}"
    unfinished = folder / f".step-{step:08d}.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(".step-*.tmp"):
            shutil.rmtree(stale, ignore_errors=True)
        unfinished.mkdir()
        files = {f"{name}.safetensors": save_safetensors(_contiguous(part)) for name, part in tensors.items()}
        files[STATE] = json.dumps(state, indent=1, sort_keys=True).encode()
        listed = {n: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for n, data in files.items()}
        manifest = {"format": FORMAT, "step": step, "files": listed}
        files[MANIFEST] = json.dumps(manifest, indent=1).encode()
        for name, data in files.items():
            write_durably(unfinished / name, data)
        sync(unfinished)
        if final.exists():  # of the same step, so nothing is lost
            shutil.rmtree(final)
        os.rename(unfinished, final)
        sync(folder)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        free = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free
        raise CheckpointError(
            f"checkpoint {final} could not be written ({error.strerror or error}; {free / 1e6:.0f} MB free); "
            f"older checkpoints are untouched. Make room, then go on with --resume"
        ) from error
    # A newer one is damaged, or this would not be its past; it must not count among those that are kept.
    for old in [known for known in all_steps(folder) if known <= step][:-keep]:
        shutil.rmtree(folder / f"step-{old:08d}", ignore_errors=True)
    return final


def all_steps(folder: Path) -> list[int]:
    """The steps of the checkpoints below `folder`, valid or not, ascending."""
    matches = (FOLDER.fullmatch(path.name) for path in folder.glob("step-*"))
    return sorted(int(match[1]) for match in matches if match)


def load(path: Path) -> Checkpoint:
    """Read one checkpoint and verify every byte of it.

    Raises:
        CheckpointError: a file is missing, damaged or unexpected; the message names it.
    """
    manifest = _read_json(path / MANIFEST)
    try:
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"{path} has format {manifest['format']}; this version reads format {FORMAT}")
        step, files = int(manifest["step"]), dict(manifest["files"])
        tensors: Tensors = {}
        state: dict[str, Any] | None = None
        for name, facts in files.items():
            file = path / Path(name).name
            content = _parsed(file, _verified(file, facts))
            if file.name == STATE:
                state = dict(content)
            else:
                tensors[file.stem] = content
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path / MANIFEST} is damaged: {error!r}") from error
    if state is None or "model" not in tensors:
        raise CheckpointError(f"{path} lacks {STATE} or the model")
    if state.get("step", step) != step:
        raise CheckpointError(f"{path / MANIFEST} says step {step}, {STATE} says {state['step']}")
    return Checkpoint(path, step, tensors, state)


def newest_valid(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole, and a warning for each newer one that is not.

    Raises:
        CheckpointError: there are checkpoints, but all are damaged.
    """
    warnings: list[str] = []
    steps = all_steps(folder)
    for step in reversed(steps):
        try:
            return load(folder / f"step-{step:08d}"), warnings
        except CheckpointError as error:
            warnings.append(str(error))
    if steps:
        raise CheckpointError("no checkpoint is whole:\n  " + "\n  ".join(warnings))
    return None, warnings


def optimizer_tensors(optimizers: Sequence[torch.optim.Optimizer], names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """The optimizers' state as `{parameter}:{slot}` tensors; each parameter belongs to one of them."""
    return {
        f"{names[parameter]}:{slot}": value.detach()
        for optimizer in optimizers
        for parameter, slots in optimizer.state.items()
        for slot, value in slots.items()
        if isinstance(value, Tensor)
    }


def restore_optimizers(
    optimizers: Sequence[torch.optim.Optimizer], names: Mapping[Tensor, str], tensors: Mapping[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` gave.

    Raises:
        CheckpointError: the state is of other parameters.
    """
    parameters = {name: parameter for parameter, name in names.items()}
    owner = {p: optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    for optimizer in optimizers:
        optimizer.state.clear()
    for key, value in tensors.items():
        name, _, slot = key.rpartition(":")
        if name not in parameters:
            raise CheckpointError(f"the optimizer's state has '{name}', which this model has not")
        parameter = parameters[name]
        if value.shape == parameter.shape:  # laid out in memory as the parameter is, which fused optimizers rely on
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        place = torch.device("cpu") if slot == "step" and parameter.device.type == "cpu" else parameter.device
        owner[parameter].state[parameter][slot] = value.to(place)


def _contiguous(part: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in part.items()}


def _verified(path: Path, facts: Mapping[str, Any]) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if len(data) != facts["bytes"]:
        raise CheckpointError(f"{path} holds {len(data)} bytes, the manifest says {facts['bytes']}")
    if hashlib.sha256(data).hexdigest() != facts["sha256"]:
        raise CheckpointError(f"{path} does not match the SHA-256 in the manifest")
    return data


def _parsed(path: Path, data: bytes) -> Any:
    """What a file holds; nothing but JSON and safetensors is ever interpreted."""
    try:
        if path.name == STATE:
            return json.loads(data)
        if path.suffix == ".safetensors":
            return load_safetensors(data)
    except Exception as error:  # safetensors raises its own kind
        raise CheckpointError(f"{path} is damaged: {error}") from error
    raise CheckpointError(f"{path} is of a kind that checkpoints do not hold")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
