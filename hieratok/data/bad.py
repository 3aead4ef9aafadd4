"""Bad images: counted, listed with their reason, and too many of them stop the run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from ..errors import DataError


@dataclass(frozen=True)
class BadSample:
    """An image that could not be used."""

    index: int
    key: str
    reason: str


class BadSamples:
    """The distinct bad images of a run, listed in `bad_images.jsonl` where a path is given."""

    def __init__(self, length: int, max_fraction: float, path: Path | None = None) -> None:
        self.allowed = math.floor(length * max_fraction)
        self.length, self.max_fraction, self.path = length, max_fraction, path
        self.seen: dict[int, BadSample] = {}
        self._torn = ""
        if path is not None and path.exists():
            whole, _, self._torn = path.read_text().rpartition("\n")  # torn where the machine stopped while writing
            for line in whole.splitlines():
                sample = BadSample(**json.loads(line))
                self.seen[sample.index] = sample

    def __len__(self) -> int:
        return len(self.seen)

    def add(self, samples: Iterable[BadSample], *, write: bool = True) -> list[BadSample]:
        """Record those not seen before, and return them; of several processes only one may `write` the list.

        Raises:
            DataError: more than the allowed part of the set is bad.
        """
        new = []
        for sample in samples:
            if sample.index not in self.seen:
                self.seen[sample.index] = sample
                new.append(sample)
        if new and write and self.path is not None:
            with open(self.path, "a") as file:
                if self._torn:
                    file.truncate(self.path.stat().st_size - len(self._torn.encode()))
                    self._torn = ""
                file.writelines(json.dumps(asdict(sample)) + "\n" for sample in new)
        if len(self.seen) > self.allowed:
            last = next(reversed(self.seen.values()))
            listed = f"they are listed in {self.path}" if self.path else f"the last one is {last.key}: {last.reason}"
            raise too_many(len(self.seen), self.length, self.max_fraction, f"; {listed}")
        return new


def too_many(bad: int, length: int, max_fraction: float, remark: str = "") -> DataError:
    """The error of more bad images than allowed."""
    return DataError(
        f"{bad} of {length} images are bad, more than data.max_bad_fraction = {max_fraction:g} allows{remark}. "
        f"Repair or remove them, or allow more"
    )
