"""Files that a crash leaves whole: on the disk when a write returns, replaced in one step."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def write_durably(path: Path, data: bytes) -> None:
    """A new file, on the disk when this returns."""
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file in one step: a reader sees the old one or the new one."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    unfinished.unlink(missing_ok=True)
    write_durably(unfinished, data)
    os.replace(unfinished, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Flush a file, or a folder's entries: a rename is durable only after this."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file as hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
