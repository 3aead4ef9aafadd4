"""Images in a folder and its sub-folders; the first level of sub-folders names the classes."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from ..errors import DataError
from .decode import SUFFIXES, BadImage
from .source import EncodedSource, PackedStrings, digest, resolve_labels


class FolderSource(EncodedSource):
    """Image files below `root`, by name; links to folders are not followed, hidden files are left out."""

    def __init__(self, root: str | Path) -> None:
        """Raises:
        DataError: there is no image below `root`.
        """
        self.root = os.fspath(root)
        self.name = self.root
        files = sorted(_walk(self.root, ""))
        if not files:
            raise DataError(f"no images ({', '.join(sorted(SUFFIXES))}) in {self.root} or its sub-folders")
        self._paths = PackedStrings(path for path, _ in files)
        tops = [path.split(os.sep, 1)[0] if os.sep in path else "" for path, _ in files]
        self._labels, self.classes = resolve_labels(tops)
        self.digest = digest(part for path, size in files for part in (path, size))

    def __len__(self) -> int:
        return len(self._paths)

    def key(self, index: int) -> str:
        return self._paths[index]

    def label(self, index: int) -> int:
        return int(self._labels[index])

    def read(self, index: int) -> bytes:
        try:
            with open(os.path.join(self.root, self._paths[index]), "rb") as file:
                return file.read()
        except OSError as error:
            raise BadImage(f"cannot be read: {error.strerror}") from error


def _walk(root: str, below: str) -> Iterator[tuple[str, int]]:
    """(path relative to root, size in bytes) of every image file."""
    try:
        entries = list(os.scandir(os.path.join(root, below)))
    except OSError as error:
        raise DataError(f"folder {os.path.join(root, below)} cannot be listed: {error.strerror}") from error
    for entry in entries:
        path = os.path.join(below, entry.name)
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(root, path)
        elif os.path.splitext(entry.name)[1].lower() in SUFFIXES:
            try:
                status = entry.stat()
            except OSError:  # a dangling or circular link is listed; reading it will say why it is bad
                yield path, -1
            else:
                if stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
                    yield path, status.st_size
