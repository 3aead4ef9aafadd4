"""Signals and non-finite numbers; what a whole training does with them is in tests/training."""

from __future__ import annotations

import json
import os
import signal
import threading

import pytest

from hieratok.engine.guards import SignalGuard, refuse_non_finite
from hieratok.errors import NonFiniteError


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_and_interrupts_nothing(number):
    with SignalGuard() as guard:
        assert guard.received == 0
        os.kill(os.getpid(), number)
        assert guard.received == number


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_handlers_from_before_are_put_back(number):
    before = signal.getsignal(number)
    with SignalGuard():
        assert signal.getsignal(number) != before
    assert signal.getsignal(number) == before


@pytest.mark.parametrize(("first", "second"), [(signal.SIGTERM, signal.SIGTERM), (signal.SIGTERM, signal.SIGINT)])
def test_a_second_signal_exits_at_once_with_its_own_status(monkeypatch, first, second):
    class Exit(BaseException):
        pass

    def leave(status: int) -> None:
        raise Exit(status)

    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(Exit, match=str(128 + second)), SignalGuard():
        os.kill(os.getpid(), first)
        os.kill(os.getpid(), second)


def test_outside_the_main_thread_signals_are_left_to_the_caller():
    before, inside = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with SignalGuard():
            inside.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert inside == [before] and signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(("rank", "name"), [(0, "nonfinite.json"), (3, "nonfinite-3.json")])
def test_the_samples_of_a_step_that_went_wrong_are_written_down(tmp_path, rank, name):
    with pytest.raises(NonFiniteError, match=rf"step 7: loss = nan.*{name}") as caught:
        refuse_non_finite(tmp_path, 7, rank, ["a/1.png", "b/2.png"], {"loss": float("nan"), "gradient norm": 2.0})
    assert "--resume" in str(caught.value)
    assert json.loads((tmp_path / name).read_text()) == {
        "step": 7, "rank": rank, "loss": "nan", "gradient norm": "2.0", "samples": ["a/1.png", "b/2.png"]
    }  # fmt: skip
