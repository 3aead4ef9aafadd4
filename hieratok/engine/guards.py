"""What stands between a fault and the weights: non-finite numbers, and signals to stop."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from ..errors import NonFiniteError
from ..files import write_atomically

NON_FINITE = "nonfinite.json"


class Stopped(SystemExit):
    """The run was asked to stop by a signal; its exit status is the shell's convention, 128 + signal."""


class SignalGuard:
    """Notes SIGTERM and SIGINT, so that the step under way can be finished and kept; a second one exits at once."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> SignalGuard:
        try:
            for number in self.SIGNALS:
                self._before[number] = signal.signal(number, self._note)
        except ValueError:  # not the main thread: signals are the caller's business
            pass
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.received:
            os._exit(128 + number)
        self.received = number


def refuse_non_finite(folder: Path, step: int, rank: int, keys: Sequence[str], facts: dict[str, Any]) -> None:
    """Write down what was being trained on, and stop. Called on every process, before the optimizer's step.

    Raises:
        NonFiniteError: always.
    """
    path = folder / (NON_FINITE if rank == 0 else f"nonfinite-{rank}.json")
    record = {"step": step, "rank": rank, **{k: repr(v) for k, v in facts.items()}, "samples": list(keys)}
    write_atomically(path, json.dumps(record, indent=1).encode())
    raise NonFiniteError(
        f"step {step}: {', '.join(f'{k} = {v}' for k, v in facts.items())}. The weights were not changed; the samples "
        f"of this step are listed in {path}. Look at them, lower train.learning_rate, or use train.precision=fp32; "
        f"then go on with --resume"
    )
