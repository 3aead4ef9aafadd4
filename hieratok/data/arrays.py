"""Images as one array of pixels, and the `.npz` files in which generated images are exchanged.

Source of the format: the evaluation of Dhariwal & Nichol 2021 (ADM): `arr_0` uint8 `(N, H, W, 3)`, and the classes as
`arr_1` where there are any.
"""

from __future__ import annotations

import os
import random
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import DataError
from ..files import sync
from .frame import Frame, crop_image
from .source import digest, resolve_labels

IMAGES, LABELS = "arr_0", "arr_1"


class ArraySource:
    """The images of an array uint8 `(N, H, W, 3)`; see `ImageSource`. Worker processes share it where they are forked.

    Attributes:
        image_size: their shorter side in pixels.
    """

    licence: str | None = None

    def __init__(
        self,
        images: np.ndarray,
        labels: Sequence[int] | np.ndarray | None = None,
        classes: Sequence[str] | None = None,
        name: str = "an array",
    ) -> None:
        """`classes`: the names of the labels; None is their numbers.

        Raises:
            DataError: not such an array, labels of another length or kind, or a label without a name.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape:
            raise DataError(f"{name}: images must be uint8 (N, H, W, 3), got {images.dtype} {images.shape}")
        labels = np.zeros(len(images), np.int64) if labels is None else np.asarray(labels)
        if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
            raise DataError(
                f"{name}: labels must be {len(images)} integers, one per image, got {labels.dtype} {labels.shape}"
            )
        self.name = name
        self.images = images
        self.image_size = min(images.shape[1:3])
        if classes is None:
            self._labels, self.classes = resolve_labels(labels.tolist())
        elif labels.min() < 0 or labels.max() >= len(classes):
            raise DataError(f"{name}: labels run from {labels.min()} to {labels.max()}, and classes has {len(classes)}")
        else:
            self._labels, self.classes = labels.astype(np.int64), list(classes)
        shape = ",".join(map(str, images.shape))
        self.digest = digest([shape, self._labels.tobytes(), *self.classes, *(image.tobytes() for image in images)])

    def __len__(self) -> int:
        return len(self.images)

    def key(self, index: int) -> str:
        return f"{index:06}"

    def split_key(self, index: int) -> str:
        return self.key(index)

    def label(self, index: int) -> int:
        return int(self._labels[index])

    def pixels(self, index: int, frame: Frame, rng: random.Random | None) -> np.ndarray:
        return crop_image(Image.fromarray(self.images[index]), frame, rng)


def read_npz(path: str | Path) -> ArraySource:
    """The images of an `.npz` file, read into memory.

    Raises:
        DataError: the file is missing or damaged, has no `arr_0`, or holds something else than images and labels.
    """
    arrays = load_arrays(path, (IMAGES, LABELS))
    if IMAGES not in arrays:
        raise DataError(f"{path} holds no array '{IMAGES}', where images are looked for; write_npz writes such a file")
    return ArraySource(arrays[IMAGES], arrays.get(LABELS), name=str(path))


def write_npz(path: str | Path, images: np.ndarray, labels: Sequence[int] | np.ndarray | None = None) -> None:
    """Write images uint8 `(N, H, W, 3)` and their labels as `read_npz` and ADM's evaluator read them.

    Raises:
        DataError: not such an array, or other labels than one integer per image.
    """
    source = ArraySource(images, labels, name=str(path))
    save_arrays(path, {IMAGES: source.images, **({} if labels is None else {LABELS: np.asarray(labels)})})


def load_arrays(path: str | Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Those arrays of an `.npz` file that `names` names; nothing in it is unpickled.

    Raises:
        DataError: the file is missing, damaged or of another kind, or one of the arrays holds Python objects.
    """
    if not zipfile.is_zipfile(path):
        raise DataError(f"{path} is missing, cut off or no .npz file; write it with numpy.savez")
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in names if name in file.files}
    except Exception as error:  # numpy, zipfile and zlib each have their own
        raise DataError(f"{path} cannot be read: {error}; write it anew, with arrays of numbers only") from error


def save_arrays(path: str | Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write an `.npz` file; whoever reads it meets the old one or the new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(unfinished, "wb") as file:  # not through memory: 50,000 images of 256 pixels are 10 GB
            np.savez(file, **arrays)  # type: ignore[arg-type]
        sync(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    sync(path.parent)
