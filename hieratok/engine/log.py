"""What a run says: JSON lines always, TensorBoard where it is installed, a progress bar for people."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..files import write_atomically

METRICS = "metrics.jsonl"


class RunLog:
    """Writes the metrics of a run; on a process that is not the main one it does nothing."""

    def __init__(self, folder: Path, *, main: bool, tensorboard: bool, from_step: int) -> None:
        """`from_step`: where the run goes on; lines beyond it belong to a future that was lost, and are removed."""
        self.path = folder / METRICS
        self.main = main
        self.board: Any = None
        self.evaluated: set[int] = set()
        if not main:
            return
        kept = [line for line in read_metrics(self.path) if line["step"] <= from_step]
        self.evaluated = {line["step"] for line in kept if line["kind"] == "eval"}
        write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                tqdm.write("TensorBoard is not installed (pip install 'hieratok[tensorboard]'); metrics go to "
                           f"{self.path} alone", file=sys.stderr)  # fmt: skip
            else:
                self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=from_step + 1)

    def metrics(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Append one line; numbers also go to TensorBoard under `kind/name`.

        An evaluation that is made again because the run goes on from its step is not written again.
        """
        if not self.main or (kind == "eval" and step in self.evaluated):
            return
        with open(self.path, "a") as file:
            file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        if self.board is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self.board.add_scalar(f"{kind}/{name}", value, step)

    def picture(self, step: int, path: Path) -> None:
        """Show a picture that was drawn in TensorBoard too."""
        if self.main and self.board is not None:
            import numpy as np
            from PIL import Image

            with Image.open(path) as image:
                self.board.add_image("reconstructions", np.asarray(image), step, dataformats="HWC")

    def close(self) -> None:
        if self.board is not None:
            self.board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line that was cut off by a crash is left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


class Progress:
    """A bar over the part of the run that is done, with images per second and the time left."""

    def __init__(self, total: float, initial: float, *, shown: bool) -> None:
        """`total` and `initial`: steps, or seconds of a run that the clock ends."""
        interval = 0.5 if sys.stderr.isatty() else 30.0
        layout = "{percentage:3.0f}%|{bar:24}| {desc} [{elapsed}<{remaining}{postfix}]"
        self.bar = tqdm(total=total, initial=initial, disable=not shown, mininterval=interval,
                        bar_format=layout, dynamic_ncols=True, smoothing=0.05)  # fmt: skip

    def update(self, done: float, step: int, values: Mapping[str, str]) -> None:
        """`done`: in the units of `total`."""
        self.bar.set_description_str(f"step {step}", refresh=False)
        self.bar.set_postfix_str(", ".join(f"{name} {value}" for name, value in values.items()), refresh=False)
        self.bar.update(done - self.bar.n)

    def close(self, *, done: bool = False) -> None:
        """`done`: the run has come to its end, wherever the last update was."""
        if done and self.bar.total:
            self.bar.update(self.bar.total - self.bar.n)
        self.bar.close()


@contextmanager
def quiet_diffusers() -> Iterator[None]:
    """Without diffusers' bars, and its remarks about classes that are not its own, which nobody can act on."""
    from diffusers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def say(text: str, *, main: bool = True) -> None:
    """A line for people, above the progress bar."""
    if main:
        tqdm.write(text, file=sys.stderr)
