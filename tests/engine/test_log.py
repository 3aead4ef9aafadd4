"""The metrics of a run, before and after it was interrupted."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from hieratok.engine.log import METRICS, RunLog, read_metrics


def open_log(folder: Path, from_step: int = 0, *, main: bool = True, tensorboard: bool = False) -> RunLog:
    return RunLog(folder, main=main, tensorboard=tensorboard, from_step=from_step)


def write(folder: Path, *lines: tuple[str, int]) -> None:
    log = open_log(folder)
    for kind, step in lines:
        log.metrics(kind, step, {"loss": step / 10})
    log.close()


def steps(folder: Path) -> list[tuple[str, int]]:
    return [(line["kind"], line["step"]) for line in read_metrics(folder / METRICS)]


def test_a_line_is_one_json_object_with_its_kind_and_step(tmp_path):
    log = open_log(tmp_path)
    log.metrics("train", 50, {"loss": 0.25, "l1/8": 0.125})
    assert [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()] == [
        {"kind": "train", "step": 50, "loss": 0.25, "l1/8": 0.125}
    ]


def test_lines_beyond_the_step_that_a_run_goes_on_from_are_removed(tmp_path):
    write(tmp_path, ("train", 10), ("train", 20), ("train", 30), ("eval", 30))
    open_log(tmp_path, from_step=20)
    assert steps(tmp_path) == [("train", 10), ("train", 20)]


def test_an_evaluation_made_again_where_the_run_goes_on_is_written_once(tmp_path):
    write(tmp_path, ("train", 10), ("eval", 10), ("train", 20), ("eval", 20), ("eval", 30))
    log = open_log(tmp_path, from_step=20)
    for step in (20, 30):
        log.metrics("eval", step, {"psnr": 9.0})
    assert steps(tmp_path) == [("train", 10), ("eval", 10), ("train", 20), ("eval", 20), ("eval", 30)]
    assert read_metrics(tmp_path / METRICS)[-1]["psnr"] == 9.0


@pytest.mark.parametrize("kept", [1, 12, 34])
def test_a_last_line_that_was_cut_off_is_left_out_and_does_not_spoil_the_next(tmp_path, kept):
    write(tmp_path, ("train", 10), ("train", 20))
    path = tmp_path / METRICS
    path.write_text(path.read_text() + json.dumps({"kind": "train", "step": 30, "loss": 3.0})[:kept])
    assert steps(tmp_path) == [("train", 10), ("train", 20)]
    open_log(tmp_path, from_step=20).metrics("train", 30, {"loss": 1.0})
    assert steps(tmp_path) == [("train", 10), ("train", 20), ("train", 30)]


def test_a_crash_while_lines_are_removed_does_not_lose_the_others(tmp_path, monkeypatch):
    write(tmp_path, ("train", 10), ("train", 20))

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("os.replace", crash)
        open_log(tmp_path, from_step=10)
    assert steps(tmp_path) == [("train", 10), ("train", 20)]


def test_no_metrics_yet_are_no_lines(tmp_path):
    assert read_metrics(tmp_path / METRICS) == []


def test_a_process_that_is_not_the_main_one_writes_nothing(tmp_path):
    log = open_log(tmp_path, main=False, tensorboard=True)
    log.metrics("train", 1, {"loss": 1.0})
    log.picture(1, tmp_path / "none.png")
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_gets_the_numbers_under_kind_and_name(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = open_log(tmp_path, tensorboard=True)
    log.metrics("train", 5, {"loss": 0.5, "note": "no number"})
    log.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["train/loss"]
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(5, 0.5)]


def test_without_tensorboard_the_file_is_written_all_the_same_and_the_remedy_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.delattr(torch.utils, "tensorboard", raising=False)
    open_log(tmp_path, tensorboard=True).metrics("train", 1, {"loss": math.pi})
    assert "pip install 'hieratok[tensorboard]'" in capsys.readouterr().err
    assert read_metrics(tmp_path / METRICS) == [{"kind": "train", "step": 1, "loss": math.pi}]
