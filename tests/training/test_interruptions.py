"""Real signals to real processes: what is asked to stop keeps its work, what is killed goes on where it was."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hieratok.engine import checkpoint
from hieratok.engine.log import METRICS, read_metrics
from hieratok.training.tokenizer import train_tokenizer

TRAIN = """
from hieratok.training.tokenizer import TokenizerRun, train_tokenizer
train_tokenizer(TokenizerRun.from_mapping(values), resume=resume)
"""
# After the first signal this process never comes to the end of its step.
STUCK = """
import time
from hieratok.engine.loop import Engine
own = Engine.end_step
def end_step(engine):
    while engine.signals.received:
        time.sleep(0.01)
    own(engine)
Engine.end_step = end_step
"""


def wait_for(condition: Callable[[], Any], process: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.is_alive(), f"ended early with {process.exitcode}"
        assert time.monotonic() < end, "took too long"
        time.sleep(0.01)


def is_under_way(folder: Path) -> Callable[[], bool]:
    return lambda: len(read_metrics(folder / METRICS)) >= 3


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_process_asked_to_stop_keeps_the_step_it_is_at(
    make_values, make_run, in_a_process, assert_same_runs, tmp_path, number, status
):
    settings = ("train.steps=40", "train.log_every=1", "train.checkpoint_every=1000", "data.num_workers=1")
    folder = tmp_path / "run"
    process = in_a_process(TRAIN, values=make_values(*settings), resume=False, log=str(tmp_path / "log"))
    wait_for(is_under_way(folder), process)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == status
    (step,) = checkpoint.all_steps(folder / "checkpoints")
    assert 3 <= step < 40
    assert read_metrics(folder / METRICS)[-1]["step"] == step
    assert f"stopped by a signal after step {step}; go on with --resume" in (tmp_path / "log").read_text()
    train_tokenizer(make_run(*settings), resume=True)
    assert_same_runs(train_tokenizer(make_run(*settings, output="clean")), folder)


def test_a_second_signal_ends_it_at_once(make_values, in_a_process, tmp_path):
    values = make_values("train.steps=10000", "train.log_every=1", "data.num_workers=1")
    process = in_a_process(STUCK + TRAIN, values=values, resume=False, log=str(tmp_path / "log"))
    wait_for(is_under_way(tmp_path / "run"), process)
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(0.3)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGTERM)
    process.join(10)
    assert process.exitcode == 143


def test_a_run_killed_again_and_again_ends_as_if_it_had_not_been(
    make_values, make_run, in_a_process, assert_same_runs, tmp_path
):
    settings = ("train.steps=40", "train.log_every=3", "train.checkpoint_every=2", "data.num_workers=1")
    folder, chance = tmp_path / "run", random.Random(0)
    killed: list[int] = []
    for attempt in range(10):
        process = in_a_process(TRAIN, values=make_values(*settings), resume=attempt > 0, log=str(tmp_path / "log"))
        if len(killed) < 5:
            # Some step beyond the one it goes on from, and some moment of it: a checkpoint is never far away.
            steps = checkpoint.all_steps(folder / "checkpoints")
            goal = (steps[-1] if steps else 0) + chance.randint(2, 5)
            reached = lambda goal=goal: (checkpoint.all_steps(folder / "checkpoints") or [0])[-1] >= goal  # noqa: E731
            wait_for(reached, process)
            time.sleep(chance.uniform(0, 0.05))
            process.kill()
        process.join(60)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL, (tmp_path / "log").read_text()
        killed.append(checkpoint.all_steps(folder / "checkpoints")[-1])
    assert len(killed) == 5 and killed == sorted(killed) and killed[-1] < 40
    assert_same_runs(train_tokenizer(make_run(*settings, output="clean")), folder)
    assert not list((folder / "checkpoints").glob(".*"))
