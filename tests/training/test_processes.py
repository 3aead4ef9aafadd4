"""Several processes train as one does, and what happens to one of them happens to all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hieratok import load_tokenizer
from hieratok.engine import checkpoint
from hieratok.engine.guards import Stopped
from hieratok.engine.log import METRICS, read_metrics
from hieratok.engine.loop import Engine
from hieratok.training.tokenizer import train_tokenizer

# What both processes do, one run after another, in the folders of `values`; what came of each is written down.
SCRIPT = """
import json, math, os, signal, sys
import torch
from hieratok.engine import checkpoint
from hieratok.engine.loop import Engine
from hieratok.errors import HieratokError
from hieratok.losses import TokenizerLoss
from hieratok.training.tokenizer import TokenizerRun, train_tokenizer

torch.set_num_threads(1)
folder, rank = sys.argv[1], int(os.environ["RANK"])
values = json.load(open(f"{folder}/values.json"))
outcomes = {}


def train(name, resume=False):
    try:
        train_tokenizer(TokenizerRun.from_mapping(values[name]), resume=resume)
        outcomes[name] = "done"
    except HieratokError as error:
        outcomes[name] = f"{type(error).__name__}: {error}"
    except SystemExit as error:
        outcomes[name] = f"exit {error.code}"
    json.dump(outcomes, open(f"{folder}/outcomes-{rank}.json", "w"))


train("two")
train("one_then_two", resume=True)
train("bad")
train("uneven")

end_step = Engine.end_step
def stopping(engine):
    if engine.step == 9 and rank == 1:
        engine.signals.received = int(signal.SIGTERM)
    end_step(engine)
Engine.end_step = stopping
train("two_then_one")
Engine.end_step = end_step

forward, calls = TokenizerLoss.forward, iter(range(1, 1000))
def broken(self, output, images):
    found = forward(self, output, images)
    return found._replace(total=found.total * math.nan) if next(calls) == 8 and rank == 1 else found
TokenizerLoss.forward = broken
train("nan")
TokenizerLoss.forward = forward

# Last, because one process leaves: only the first sees that the disk is full.
def full(path, data):
    raise OSError(28, "No space left on device")
checkpoint.write_durably = full
train_tokenizer(TokenizerRun.from_mapping(values["full"]))
"""
STEPS = ("train.steps=20", "train.log_every=1", "train.accumulation=2")


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return {}


@pytest.fixture
def two(results, make_values, make_run, image_folder, tmp_path) -> dict[str, Any]:
    """The folder of all runs and how the two processes ended; made by the first test that asks."""
    if results:
        return results
    overrides = {
        "two": STEPS, "one_then_two": STEPS, "two_then_one": (*STEPS, "train.log_every=4"),
        "nan": (*STEPS, "train.checkpoint_every=3"),
        "bad": (*STEPS, "data.max_bad_fraction=0.5", f"data.source={tmp_path / 'spoiled'}"),
        "uneven": (*STEPS, "train.batch_size=6"), "full": STEPS,
    }  # fmt: skip
    values = {name: make_values(*changes, output=name) for name, changes in overrides.items()}
    (tmp_path / "values.json").write_text(json.dumps(values))
    (tmp_path / "script.py").write_text(SCRIPT)
    for path in image_folder.rglob("*.*"):
        target = tmp_path / "spoiled" / path.relative_to(image_folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes()[: 60 if path.name.startswith("0") else None])

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        own = Engine.end_step

        def stopping(engine: Engine) -> None:
            engine.signals.received = 15 if engine.step == 7 else 0
            own(engine)

        patch.setattr(Engine, "end_step", stopping)
        train_tokenizer(make_run(*STEPS, output="one_then_two"))
    train_tokenizer(make_run(*STEPS, output="one"))

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               str(tmp_path / "script.py"), str(tmp_path)]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        _, stderr = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun then ends the processes that it started
        _, stderr = process.communicate()
        pytest.fail(f"the processes wait for each other:\n{stderr}")
    outcomes = [json.loads((tmp_path / f"outcomes-{rank}.json").read_text()) for rank in (0, 1)]
    results |= {"folder": tmp_path, "outcomes": outcomes, "status": process.returncode, "stderr": stderr,
                "finish": make_run(*overrides["two_then_one"], output="two_then_one")}  # fmt: skip
    return results


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder / METRICS)]


pytestmark = pytest.mark.slow


def test_two_processes_learn_what_one_does(two):
    assert [outcomes["two"] for outcomes in two["outcomes"]] == ["done", "done"], two["stderr"]
    assert json.loads((two["folder"] / "two" / "run.json").read_text())["world_size"] == 2
    found = losses(two["folder"] / "two")
    assert len(found) == 20 and found[-1] < found[0]
    assert found == pytest.approx(losses(two["folder"] / "one"), rel=1e-5)
    load_tokenizer(two["folder"] / "two" / "model")


def test_a_run_begun_by_one_process_is_gone_on_with_by_two(two):
    assert [outcomes["one_then_two"] for outcomes in two["outcomes"]] == ["done", "done"]
    assert losses(two["folder"] / "one_then_two") == pytest.approx(losses(two["folder"] / "one"), rel=1e-5)


def test_a_signal_to_one_process_stops_both_after_the_same_step_and_one_process_can_go_on(two):
    assert [outcomes["two_then_one"] for outcomes in two["outcomes"]] == ["exit 143", "exit 143"]
    folder = two["folder"] / "two_then_one"
    assert checkpoint.all_steps(folder / "checkpoints") == [9]
    train_tokenizer(two["finish"], resume=True)
    each = losses(two["folder"] / "one")
    # The interval of steps 9 to 12 has its first step from two processes, and the others from one.
    assert losses(folder) == pytest.approx([sum(each[i : i + 4]) / 4 for i in range(0, 20, 4)], rel=1e-5)


def test_nan_in_one_process_stops_both_before_the_step(two):
    # The eighth micro-batch is the second of the fourth step.
    assert all(outcomes["nan"].startswith("NonFiniteError: step 4") for outcomes in two["outcomes"])
    folder = two["folder"] / "nan"
    records = [json.loads((folder / name).read_text()) for name in ("nonfinite.json", "nonfinite-1.json")]
    assert [record["rank"] for record in records] == [0, 1]
    assert records[1]["loss"] == "nan" and len(records[1]["samples"]) == 4
    (saved,) = (checkpoint.load(path) for path in (folder / "checkpoints").iterdir())
    assert saved.step == 3
    assert all(torch.isfinite(tensor).all() for part in saved.tensors.values() for tensor in part.values())


def test_bad_images_of_both_processes_are_listed_once(two):
    assert [outcomes["bad"] for outcomes in two["outcomes"]] == ["done", "done"]
    keys = [json.loads(line)["key"] for line in (two["folder"] / "bad" / "bad_images.jsonl").read_text().splitlines()]
    assert len(keys) == len(set(keys)) >= 5
    assert all(Path(key).name.startswith("0") for key in keys)
    assert read_metrics(two["folder"] / "bad" / METRICS)[-1]["bad_images"] == len(keys)


def test_a_batch_that_does_not_divide_among_the_processes_is_refused_by_both(two):
    for outcomes in two["outcomes"]:
        assert "train.batch_size 6 is not divisible by train.accumulation 2 x 2 processes" in outcomes["uneven"]
    assert not (two["folder"] / "uneven").exists()


def test_when_the_first_process_fails_alone_the_other_does_not_wait_for_it(two):  # else there would be no status
    assert two["status"] != 0
    assert "No space left on device" in two["stderr"]
