"""What a set of images is, and the parts that every kind of it shares."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from .decode import decode_image
from .frame import Frame, crop_image

MAX_CLASSES = 1_000_000  # larger integers are somebody's identifiers, and not numbered from 0


class ImageSource(Protocol):
    """A numbered set of labelled images.

    Attributes:
        name: for people: a path or `openmoji`.
        licence: of the pictures, where it is known.
        classes: names of the labels.
        digest: SHA-256 over what the set holds; another digest is another set.
    """

    name: str
    licence: str | None
    classes: list[str]
    digest: str

    def __len__(self) -> int: ...

    def key(self, index: int) -> str:
        """A name for the image that a person can find it by."""

    def split_key(self, index: int) -> str:
        """What decides whether an image is held out; images that look alike share it, so that none of them leaks."""

    def label(self, index: int) -> int:
        """The class, an index into `classes`; 0 where the set has none."""

    def pixels(self, index: int, frame: Frame, rng: random.Random | None) -> np.ndarray:
        """The image as uint8 `(S, S, 3)`; with `rng` as a training sample, varied as `frame` says.

        Raises:
            BadImage: it cannot be read; the message is the reason.
        """


class EncodedSource:
    """Base of the sets whose images are files of some image format."""

    name: str
    licence: str | None = None
    classes: list[str]
    digest: str

    def key(self, index: int) -> str:
        """See `ImageSource.key`."""
        raise NotImplementedError

    def split_key(self, index: int) -> str:
        """See `ImageSource.split_key`: the image's own name."""
        return self.key(index)

    def read(self, index: int) -> bytes:
        """The encoded image."""
        raise NotImplementedError

    def pixels(self, index: int, frame: Frame, rng: random.Random | None) -> np.ndarray:
        """See `ImageSource.pixels`."""
        image = decode_image(self.read(index), frame.decode_side, frame.max_pixels, frame.background)
        return crop_image(image, frame, rng)


class Subset:
    """Some images of a source, under new numbers."""

    def __init__(self, source: ImageSource, indices: Sequence[int] | np.ndarray, part: str) -> None:
        self.source = source
        self.indices = np.asarray(indices, dtype=np.int64)
        self.name = source.name
        self.licence = source.licence
        self.classes = source.classes
        self.digest = digest([source.digest, part, self.indices.tobytes()])

    def __len__(self) -> int:
        return len(self.indices)

    def key(self, index: int) -> str:
        return self.source.key(int(self.indices[index]))

    def split_key(self, index: int) -> str:
        return self.source.split_key(int(self.indices[index]))

    def label(self, index: int) -> int:
        return self.source.label(int(self.indices[index]))

    def pixels(self, index: int, frame: Frame, rng: random.Random | None) -> np.ndarray:
        return self.source.pixels(int(self.indices[index]), frame, rng)


def spread(source: ImageSource, count: int | None) -> ImageSource:
    """`count` images evenly spread over a source, which is often sorted by class; all of them for None or too few."""
    if count is None or count >= len(source):
        return source
    return Subset(source, np.linspace(0, len(source) - 1, count).round().astype(np.int64), f"spread {count}")


class PackedStrings(Sequence[str]):
    """A list of strings in one buffer.

    A million Python strings are copied into every worker as their reference counts change; one buffer is shared.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        encoded = [s.encode("utf-8", "surrogateescape") for s in strings]
        self._ends = np.cumsum([len(e) for e in encoded], dtype=np.int64)
        self._buffer = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        start = self._ends[index - 1] if index else 0
        return self._buffer[start : self._ends[index]].tobytes().decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))


def digest(parts: Iterable[str | bytes | int]) -> str:
    """SHA-256 over a sequence of parts, as hex digits; no two different sequences give the same bytes."""
    hasher = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogateescape")
        hasher.update(len(data).to_bytes(8, "little") + data)
    return hasher.hexdigest()


def resolve_labels(values: Sequence[Any]) -> tuple[np.ndarray, list[str]]:
    """Labels as indices and the names of the classes: sorted names, or `0..max` where the labels are small integers."""
    if all(isinstance(v, (int, np.integer)) and 0 <= v < MAX_CLASSES for v in values):
        labels = np.asarray(values, dtype=np.int64)
        return labels, [str(i) for i in range(int(labels.max()) + 1)] if len(labels) else []
    names = sorted({str(v) for v in values})
    number = {name: i for i, name in enumerate(names)}
    return np.asarray([number[str(v)] for v in values], dtype=np.int64), names
