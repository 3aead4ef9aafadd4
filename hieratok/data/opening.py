"""From a word on the command line to a source, and from one source to its training and validation parts."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from ..errors import ConfigError, DataError
from .decode import parse_colour
from .frame import Crop, Frame
from .source import ImageSource, Subset, spread

Split = Literal["train", "val", "all"]


@dataclass(frozen=True)
class DataConfig:
    """The images of a run.

    `source`: `openmoji`, or `openmoji-toneless` without the variants in skin tones; an image folder, Parquet or tar
    files (a file, a folder of them, or a pattern), an `.npz` file of images (`arr_0`, see `data/arrays.py`), or a
    folder of generated images.
    `val_source`: the held-out images; None keeps `val_fraction` of the source apart, chosen by a hash of each image's
    name, so that it stays the same whatever else is in the set.
    """

    source: str = "openmoji"
    val_source: str | None = None
    val_fraction: float = 0.05
    crop: Crop = "center"
    flip: bool = False
    augment: bool = True
    background: str = "white"
    max_pixels: int = 64_000_000
    max_bad_fraction: float = 0.01
    num_workers: int = 1
    max_train_images: int | None = None
    max_val_images: int | None = None

    def __post_init__(self) -> None:
        parse_colour(self.background)
        if not 0 < self.val_fraction < 1:
            raise ConfigError(f"data.val_fraction is {self.val_fraction}; it must lie between 0 and 1")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ConfigError(f"data.max_bad_fraction is {self.max_bad_fraction}; it must lie in [0, 1]")
        if self.num_workers < 0:
            raise ConfigError(f"data.num_workers is {self.num_workers}; 0 decodes in the main process")
        limits = {"max_pixels": self.max_pixels, "max_train_images": self.max_train_images,
                  "max_val_images": self.max_val_images}  # fmt: skip
        for name, value in limits.items():
            if value is not None and value < 1:
                raise ConfigError(f"data.{name} is {value}; it must be above 0")

    def frame(self, image_size: int) -> Frame:
        """How its images become squares of `image_size` pixels."""
        return Frame(image_size, self.crop, self.flip, self.augment, self.background, self.max_pixels)

    def open(self, split: Split) -> ImageSource:
        """The training or the validation part.

        Raises:
            DataError: nothing is there, or it cannot be read.
        """
        if self.val_source is None:
            source = part_of(_open(self.source), split, self.val_fraction)
        else:
            source = _open(self.val_source if split == "val" else self.source)
        return self._limited(source, split)

    def open_both(self) -> tuple[ImageSource, ImageSource]:
        """The training and the validation part; a source that holds both is read once."""
        if self.val_source is not None:
            return self.open("train"), self.open("val")
        source = _open(self.source)
        held = _held_out(source, self.val_fraction)
        train, val = (_part(source, held, split, self.val_fraction) for split in ("train", "val"))
        return self._limited(train, "train"), self._limited(val, "val")

    def _limited(self, source: ImageSource, split: Split) -> ImageSource:
        return spread(source, self.max_val_images if split == "val" else self.max_train_images)


def open_source(spec: str | Path, split: Split = "all", val_fraction: float = 0.05) -> ImageSource:
    """The images that `spec` names (see `DataConfig.source`), or one part of them.

    Raises:
        DataError: nothing is there, it cannot be read, or the part would be empty.
        ConfigError: a fraction outside 0 to 1.
    """
    return part_of(_open(str(spec)), split, val_fraction)


def part_of(source: ImageSource, split: Split, val_fraction: float) -> ImageSource:
    """One part of a source; see `open_source`."""
    if split == "all":
        return source
    if not 0 < val_fraction < 1:
        raise ConfigError(f"data.val_fraction is {val_fraction}; it must lie between 0 and 1")
    return _part(source, _held_out(source, val_fraction), split, val_fraction)


def _part(source: ImageSource, held: np.ndarray, split: Split, val_fraction: float) -> ImageSource:
    """The images that are held out, or the others."""
    chosen = np.flatnonzero(held if split == "val" else ~held)
    if len(chosen) == 0:
        raise DataError(
            f"{source.name} holds {len(source)} images, too few to keep {val_fraction:.0%} of them apart for "
            f"validation; give data.val_source or a larger data.val_fraction"
        )
    return Subset(source, chosen, split)


def _open(spec: str) -> ImageSource:
    if spec in ("openmoji", "openmoji-toneless"):
        from .openmoji import OpenMojiSource

        return OpenMojiSource(skin_tones=spec == "openmoji")
    path = Path(spec).expanduser()
    if path.is_dir():
        files = sorted(entry for entry in path.iterdir() if entry.is_file() and not entry.name.startswith("."))
        for suffix in (".parquet", ".tar"):
            shards = [file for file in files if file.suffix == suffix]
            if shards:
                return _open_shards(shards, spec)
        from .folder import FolderSource
        from .samples import ShardedSamples, holds_samples

        return ShardedSamples(path) if holds_samples(path) else FolderSource(path)
    shards = [path] if path.is_file() else sorted(Path(p) for p in glob.glob(os.path.expanduser(spec)))
    if not shards:
        raise DataError(
            f"no images at '{spec}': it is neither 'openmoji' nor a folder, nor a .parquet, .tar or .npz file, nor a "
            f"pattern of them"
        )
    return _open_shards(shards, spec)


def _open_shards(paths: Sequence[Path], name: str) -> ImageSource:
    suffixes = {path.suffix for path in paths}
    if suffixes == {".parquet"}:
        from .parquet import ParquetSource

        return ParquetSource(paths, name)
    if suffixes == {".tar"}:
        from .tar import TarSource

        return TarSource(paths, name)
    if suffixes == {".npz"} and len(paths) == 1:
        from .arrays import read_npz

        return read_npz(paths[0])
    kinds = ", ".join(sorted(suffix or "none" for suffix in suffixes))
    raise DataError(
        f"'{name}' means files with the suffix {kinds}; give 'openmoji', a folder of images, or .parquet or "
        f"uncompressed .tar files of one kind, or one .npz file"
    )


def _held_out(source: ImageSource, fraction: float) -> np.ndarray:
    """A mask of the validation images: those whose name hashes below the fraction."""
    hashes = [hashlib.blake2b(source.split_key(i).encode("utf-8", "surrogateescape"), digest_size=8).digest()
              for i in range(len(source))]  # fmt: skip
    return np.array([int.from_bytes(h, "little") for h in hashes], dtype=np.float64) < fraction * 2.0**64
