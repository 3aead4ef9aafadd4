"""Images in tar shards, in the layout of WebDataset: files that share a name up to the first dot are one sample.

A shard is read through once to learn where its members lie; after that every image is one read at an offset, in any
order. Labels come from `.cls` (a number) or `.txt`/`.json` members; nothing is unpickled.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from .decode import SUFFIXES, BadImage
from .source import EncodedSource, PackedStrings, digest, resolve_labels

OPEN_SHARDS = 64  # at a time, per process; a system allows about a thousand files


class TarSource(EncodedSource):
    """The image members of one or several uncompressed tar files, in their order."""

    def __init__(self, paths: Sequence[Path], name: str) -> None:
        """Raises:
        DataError: a shard is damaged or compressed, or none holds images.
        """
        self.name = name
        self.paths = sorted(paths)
        keys: list[str] = []
        places: list[tuple[int, int, int]] = []  # shard, offset, size
        labels: list[Any] = []
        for shard, path in enumerate(self.paths):
            for key, offset, size, label in _index(path):
                keys.append(key)
                places.append((shard, offset, size))
                labels.append(label)
        if not keys:
            raise DataError(f"{name} holds no images ({', '.join(sorted(SUFFIXES))})")
        self._keys = PackedStrings(keys)
        self._places = np.asarray(places, dtype=np.int64)
        self._labels, self.classes = resolve_labels([0 if label is None else label for label in labels])
        self.digest = digest(p for key, place in zip(keys, places, strict=True) for p in (key, *place))
        self._files: dict[int, int] = {}  # shard to descriptor; the one used last comes last

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}  # a copy closes what it opened, and nothing else

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, index: int) -> str:
        return f"{self.paths[self._places[index, 0]].name}/{self._keys[index]}"

    def label(self, index: int) -> int:
        return int(self._labels[index])

    def read(self, index: int) -> bytes:
        shard, offset, size = (int(v) for v in self._places[index])
        try:
            descriptor = self._files.pop(shard) if shard in self._files else os.open(self.paths[shard], os.O_RDONLY)
            self._files[shard] = descriptor
            if len(self._files) > OPEN_SHARDS:
                os.close(self._files.pop(next(iter(self._files))))
            data = os.pread(descriptor, size, offset)
        except OSError as error:  # of the disk or the system, not of one image
            raise DataError(f"shard {self.paths[shard]} cannot be read: {error.strerror}") from error
        if len(data) < size:
            raise BadImage("the shard ends within the image")
        return data


def _index(path: Path) -> list[tuple[str, int, int, Any]]:
    """(key, offset, size, label or None) of every image in a shard."""
    images: list[tuple[str, int, int]] = []
    labels: dict[str, Any] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, base = member.name.rpartition("/")
                if base.startswith("."):  # macOS packs a hidden `._name.jpg` beside each file
                    continue
                stem, _, extension = base.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                suffix = "." + extension.rsplit(".", 1)[-1].lower()
                if suffix in SUFFIXES:
                    images.append((member.name, member.offset_data, member.size))
                elif suffix in (".cls", ".txt", ".json") and member.size < 65536:
                    file = tar.extractfile(member)
                    label = _label(suffix, file.read() if file else b"")
                    if label is not None and (suffix == ".cls" or key not in labels):
                        labels[key] = label
            # tarfile takes a damaged header for the end of the archive, whose sign is zeros.
            if tar.fileobj is not None:
                tar.fileobj.seek(tar.offset)
                if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
                    raise tarfile.ReadError(f"damaged at byte {tar.offset}")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(
            f"{path} is not a complete, uncompressed tar file: {error}. "
            f"Fetch it anew, or uncompress it (gunzip, unzstd)"
        ) from error
    found = []
    for name, offset, size in images:
        folder, _, base = name.rpartition("/")
        stem = base.partition(".")[0]
        found.append((name, offset, size, labels.get(f"{folder}/{stem}" if folder else stem)))
    return found


def _label(suffix: str, data: bytes) -> Any:
    """A number from `.cls`, the text of `.txt`, the `label`, `cls` or `class` of `.json`; None where there is none."""
    text = data.decode("utf-8", "replace").strip()
    if suffix == ".json":
        try:
            values = json.loads(text)
        except ValueError:
            return None
        return (
            next((values[k] for k in ("label", "cls", "class") if k in values), None)
            if isinstance(values, dict)
            else None
        )
    return int(text) if suffix == ".cls" and text.isascii() and text.isdigit() else text or None
