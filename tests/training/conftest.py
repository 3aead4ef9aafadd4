"""Small runs, and what is compared of them."""

from __future__ import annotations

import multiprocessing
import os
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hieratok.config import apply_overrides
from hieratok.engine import checkpoint
from hieratok.engine.log import METRICS, read_metrics
from hieratok.training.tokenizer import TokenizerRun

TIMES = ("elapsed", "images_per_second")  # what differs between two runs that are the same


@pytest.fixture(autouse=True)
def one_thread():
    """Sums in the same order whatever the machine, as comparisons bit by bit need."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_values(tiny_fields, image_folder, tmp_path) -> Callable[..., dict[str, Any]]:
    """The mapping of a tiny recipe, with overrides as on the command line; a folder `output` below the test's own."""

    def make(*overrides: str, output: str = "run") -> dict[str, Any]:
        values: dict[str, Any] = {
            "model": {**tiny_fields, "encoder_drop_path_rate": 0.1, "decoder_drop_path_rate": 0.2},
            "output": str(tmp_path / output),
            "data": {"source": str(image_folder), "val_fraction": 0.2, "num_workers": 0},
            "loss": {"lpips": 0.0},
            "train": {"epochs": None, "steps": 40, "batch_size": 8, "precision": "fp32", "learning_rate": 2e-3,
                      "log_every": 6, "checkpoint_every": 15, "picture_every": 0, "tensorboard": False},
            "eval": {"batch_size": 8},
        }  # fmt: skip
        return apply_overrides(values, overrides)

    return make


@pytest.fixture
def make_run(make_values) -> Callable[..., TokenizerRun]:
    """The same, resolved."""
    return lambda *overrides, output="run": TokenizerRun.from_mapping(make_values(*overrides, output=output))


@pytest.fixture
def content() -> Callable[[Path], dict[str, Any]]:
    """Everything that a run learned and said, without its times: the newest checkpoint and the metrics."""

    def read(folder: str | Path) -> dict[str, Any]:
        saved, warnings = checkpoint.newest_valid(Path(folder) / "checkpoints")
        assert saved is not None and not warnings
        tensors = {f"{part}/{name}": t for part, named in saved.tensors.items() for name, t in named.items()}
        lines = [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(Path(folder) / METRICS)]
        return {"step": saved.step, "tensors": tensors, "metrics": lines}

    return read


@pytest.fixture
def assert_same_runs(content) -> Callable[[Any, Any], None]:
    """Two runs are equal bit for bit: weights, average, optimizer, random state and metrics."""

    def compare(one: str | Path, other: str | Path) -> None:
        a, b = content(one), content(other)
        assert a["step"] == b["step"]
        assert a["tensors"].keys() == b["tensors"].keys()
        different = [name for name, tensor in a["tensors"].items() if not torch.equal(tensor, b["tensors"][name])]
        assert different == []
        assert a["metrics"] == b["metrics"]

    return compare


@pytest.fixture
def in_a_process(tmp_path) -> Iterator[Callable[..., Any]]:
    """Start a script in a process of its own, with names given to it and its stderr in `log`.

    The processes are forked from a server that has imported the library once, so each starts in no time. Those that
    still run at the end of the test are killed.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hieratok.training.tokenizer"])
    processes = []

    def begin(script: str, **names: Any) -> Any:
        path = tmp_path / "script.py"
        path.write_text("import sys, torch\ntorch.set_num_threads(1)\nsys.stderr = open(log, 'a')\n" + script)
        process = context.Process(target=runpy.run_path, args=(str(path),), kwargs={"init_globals": names})
        processes.append(process)
        process.start()
        return process

    yield begin
    for process in processes:
        process.kill()
        process.join()
