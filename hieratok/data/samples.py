"""Generated images on disk, as a sampling job leaves them.

A folder holds `job.json` (what is sampled, and how), shards `samples-00000.safetensors` (`images` uint8 `(n, 3, S, S)`,
`labels` int64 `(n,)`) and, once all are there, `manifest.json`: the job, `version`, `count`, and `shards` with the
`file`, `sha256` and `count` of each.
"""

from __future__ import annotations

import json
import random
from bisect import bisect_right
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors import SafetensorError, safe_open

from ..errors import DataError
from .frame import Frame, crop_image
from .jobs import JOB, MANIFEST
from .source import digest

VERSION = 1
SHARDS = "samples-*.safetensors"


class ShardedSamples:
    """The images of a finished sampling job; see `ImageSource`. A row is read when it is asked for.

    Attributes:
        manifest: see above.
        protocol: how the images were made, as the job says.
        image_size: their side in pixels.
    """

    licence: str | None = None

    def __init__(self, path: str | Path) -> None:
        """Raises:
        DataError: the job is unfinished, or a file is missing or damaged.
        """
        self.path = Path(path)
        self.name = str(path)
        self.manifest = _read_manifest(self.path)
        try:
            self.protocol: dict[str, Any] = dict(self.manifest["protocol"])
            self.classes = [str(name) for name in self.manifest["classes"]]
            shards = [(str(s["file"]), str(s["sha256"]), int(s["count"])) for s in self.manifest["shards"]]
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{self.path / MANIFEST} lacks something or is damaged ({error!r}); delete it and run the sampling "
                f"command again, finished shards are kept"
            ) from error
        if not shards:
            raise DataError(f"{self.path} holds no samples; run the sampling command with another folder")
        self._files = [file for file, _, _ in shards]
        self._starts = [0]
        self._open: dict[int, Any] = {}
        labels, sides = [], set()
        for number, (file, _, count) in enumerate(shards):
            shape = self._shard(number).get_slice("images").get_shape()
            labels.append(self._shard(number).get_tensor("labels"))
            if shape != [count, 3, shape[-1], shape[-1]] or labels[-1].shape != (count,):
                raise DataError(
                    f"{self.path / file} holds images {tuple(shape)} and labels {labels[-1].shape}, and {MANIFEST} "
                    f"says {count} squares; delete both and run the sampling command again"
                )
            self._starts.append(self._starts[-1] + count)
            sides.add(shape[-1])
        if len(sides) > 1:
            raise DataError(f"{self.path} holds images of {sorted(sides)} px; sample into a new folder")
        self.image_size = int(sides.pop())
        self._labels = np.concatenate(labels)
        self.digest = digest([*self.classes, *(sha256 for _, sha256, _ in shards)])

    def __len__(self) -> int:
        return self._starts[-1]

    def key(self, index: int) -> str:
        number, row = self._place(index)
        return f"{self._files[number]}#{row}"

    def split_key(self, index: int) -> str:
        return self.key(index)

    def label(self, index: int) -> int:
        return int(self._labels[index])

    def pixels(self, index: int, frame: Frame, rng: random.Random | None) -> np.ndarray:
        number, row = self._place(index)
        image = self._shard(number).get_slice("images")[row : row + 1][0]
        return crop_image(Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))), frame, rng)

    def _place(self, index: int) -> tuple[int, int]:
        """The shard of an image and its row there."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect_right(self._starts, index) - 1
        return number, index - self._starts[number]

    def _shard(self, number: int) -> Any:
        if number not in self._open:
            path = self.path / self._files[number]
            try:
                self._open[number] = safe_open(path, framework="np")
            except (OSError, SafetensorError) as error:
                raise DataError(
                    f"{path} cannot be read ({error}); delete it and {MANIFEST}, and run the sampling command again"
                ) from error
        return self._open[number]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # each worker opens its own


def holds_samples(folder: Path) -> bool:
    """Whether a sampling job has worked in a folder, finished or not; other jobs and people have a `job.json` too."""
    if any(folder.glob(SHARDS)):
        return True
    try:
        job = json.loads((folder / JOB).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(job, dict) and {"protocol", "shard_size", "num_classes"} <= job.keys()


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError as error:
        raise DataError(
            f"no {MANIFEST} in {folder}: the sampling is unfinished; run the sampling command again to go on"
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(
            f"{folder / MANIFEST} is damaged ({error}); delete it and run the sampling command again, finished shards "
            f"are kept"
        ) from error
    version = manifest.get("version") if isinstance(manifest, dict) else None
    if version != VERSION:
        raise DataError(f"{folder / MANIFEST} is of version {version}, this package reads {VERSION}; sample again")
    return manifest
