"""What generated images are compared with: the statistics of a set of real images, computed or from a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..data.arrays import IMAGES, ArraySource, load_arrays, save_arrays
from ..data.frame import Frame
from ..data.opening import open_source
from ..data.source import ImageSource, spread
from ..errors import DataError, ProtocolError
from ..files import sha256_of
from .collect import checked_frame, collect_features
from .features import INCEPTION, UNVERSIONED, FeatureNetwork
from .frechet import Gaussian, frechet_distance
from .protocol import resize_rule

if TYPE_CHECKING:
    from accelerate import Accelerator

MAX_PR_IMAGES = 10_000  # as many as ADM's files hold
UNKNOWN = "of unknown preparation"

# Names of arrays: ADM's, and what this package adds so that a file says what it is.
POOLED, SPATIAL = ("mu", "sigma"), ("mu_s", "sigma_s")
SINGLE = "pooled"
WORDS = ("features", "features_sha256", "source", "source_digest", "resize")
NUMBERS = ("count", "even_count", "image_size", "real_halves")


@dataclass(frozen=True)
class ReferenceStatistics:
    """A set of real images as a feature network sees it.

    Attributes:
        features: the network's name.
        features_sha256: hash of its weights; "unversioned" where it is not known.
        pooled: Gaussian of the pooled features.
        spatial: Gaussian of the spatial features, or None.
        neighbours: `(M, dim)` float32, pooled features of single images for precision and recall, or None.
        source: name of the set, or of the file.
        source_digest: hash over the set; SHA-256 of a file that does not say of which set it is.
        resize: how images were brought to their size.
        count: how many images the Gaussians are of; None where a file does not say.
        even_count: how many of them are at even positions.
        image_size: side of the images in pixels; None where a file does not say.
        real_halves: Frechet distance between the images at even and at odd positions, or None.
    """

    features: str
    features_sha256: str
    pooled: Gaussian
    spatial: Gaussian | None
    neighbours: Tensor | None
    source: str
    source_digest: str
    resize: str = UNKNOWN
    count: int | None = None
    even_count: int | None = None
    image_size: int | None = None
    real_halves: float | None = None

    def check(self, network: FeatureNetwork, image_size: int) -> None:
        """Compare with what is to be evaluated.

        Raises:
            ProtocolError: another network, or images of another size.
        """
        other_weights = UNVERSIONED != self.features_sha256 != network.sha256
        if self.features != network.name or other_weights:
            raise ProtocolError(
                f"the statistics of {self.source} are of features={self.features} ({self.features_sha256[:8]}), and "
                f"the samples' of {network.name} ({network.sha256[:8]}); use that network, or other statistics"
            )
        if self.pooled.dim != network.dim:
            raise ProtocolError(
                f"the statistics of {self.source} have {self.pooled.dim} dimensions, and features={network.name} "
                f"{network.dim}; use statistics of that network"
            )
        if self.image_size not in (None, image_size):
            raise ProtocolError(
                f"the statistics of {self.source} are of images of {self.image_size} px, and the samples have "
                f"{image_size}; use a reference of that size"
            )


def reference_statistics(
    source: ImageSource | str | Path,
    network: FeatureNetwork,
    image_size: int,
    *,
    max_pr_images: int = MAX_PR_IMAGES,
    batch_size: int = 64,
    num_workers: int = 0,
    accelerator: Accelerator | None = None,
    progress: bool = True,
    frame: Frame | None = None,
    max_bad_fraction: float = 0.01,
) -> ReferenceStatistics:
    """The statistics of a set of images, or those in an `.npz` file.

    A file of statistics is one with `mu` and `sigma`: of `write_reference_npz`, or of ADM (Dhariwal & Nichol 2021),
    whose files also hold `mu_s` and `sigma_s`, and as `arr_0` some of the images, for precision and recall. A file that
    does not name its network is taken for one of Inception.

    Args:
        source: images, or what `open_source` opens, or a file of statistics.
        network: see `load_features`.
        image_size: side to which images are brought.
        max_pr_images: of how many images, evenly spread, the features are kept for precision and recall.
        batch_size: images at once, per process.
        num_workers: processes that decode images.
        accelerator: of a run with several processes; each takes every n-th image and all return the same.
        progress: show a bar (on the main process).
        frame: how images are cropped; None is the centre.
        max_bad_fraction: the part of the images that may be bad; they are left out.

    Raises:
        ConfigError: `frame` is of another size.
        DataError: nothing is there, a damaged file, too many bad images.
        HieratokError: another process failed.
        NonFiniteError: a feature is NaN or infinite.
        ProtocolError: a file of another network or image size, images too small for the network, or fewer than 2.
    """
    frame = checked_frame(frame, image_size)
    passing: dict[str, Any] = {
        "title": "reference", "batch_size": batch_size, "num_workers": num_workers, "accelerator": accelerator,
        "progress": progress, "max_bad_fraction": max_bad_fraction,
    }  # fmt: skip
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        if path.suffix == ".npz" and load_arrays(path, POOLED[:1]):
            statistics, images = _read(path)
            statistics.check(network, image_size)
            if statistics.neighbours is None and images is not None:
                seen = collect_features(spread(images, max_pr_images), network, frame, keep=None, **passing)
                statistics = replace(statistics, neighbours=seen.pooled)
            return statistics
        source = open_source(source)
    seen = collect_features(source, network, frame, keep=max_pr_images, **passing)
    even, odd = seen.halves
    whole = seen.gaussian()
    return ReferenceStatistics(
        features=network.name,
        features_sha256=network.sha256,
        pooled=Gaussian(whole.mean, whole.covariance),
        spatial=None if seen.spatial is None else Gaussian(seen.spatial.mean, seen.spatial.covariance),
        neighbours=seen.pooled,
        source=source.name,
        source_digest=source.digest,
        resize=resize_rule(frame),
        count=seen.count,
        even_count=even.count,
        image_size=image_size,
        real_halves=frechet_distance(even, odd) if min(even.count, odd.count) >= 2 else None,
    )


def write_reference_npz(path: str | Path, statistics: ReferenceStatistics) -> None:
    """Write statistics so that `reference_statistics` reads them: ADM's arrays, and beside them whose they are."""
    arrays: dict[str, np.ndarray] = {}
    for names, gaussian in ((POOLED, statistics.pooled), (SPATIAL, statistics.spatial)):
        if gaussian is not None:
            arrays |= dict(zip(names, (gaussian.mean.cpu().numpy(), gaussian.covariance.cpu().numpy()), strict=True))
    if statistics.neighbours is not None:
        arrays[SINGLE] = statistics.neighbours.numpy()
    for name in (*WORDS, *NUMBERS):
        value = getattr(statistics, name)
        if value is not None:
            arrays[name] = np.array(value)
    save_arrays(path, arrays)


def _read(path: Path) -> tuple[ReferenceStatistics, ImageSource | None]:
    """The statistics in a file, and the images in it."""
    arrays = load_arrays(path, (*POOLED, *SPATIAL, SINGLE, IMAGES, *WORDS, *NUMBERS))
    images = ArraySource(arrays[IMAGES], name=str(path)) if IMAGES in arrays else None
    pooled = _gaussian(arrays, POOLED, path)
    if pooled is None:
        raise DataError(f"{path} holds '{POOLED[0]}' and no '{POOLED[1]}'; write it with write_reference_npz")
    neighbours = None
    if SINGLE in arrays:
        neighbours = torch.from_numpy(arrays[SINGLE].astype(np.float32))
        if neighbours.dim() != 2 or neighbours.shape[1] != pooled.dim:
            raise DataError(f"{path}: '{SINGLE}' is {tuple(neighbours.shape)}, not (M, {pooled.dim}); write it anew")
    said: dict[str, Any] = {
        "features": INCEPTION,
        "features_sha256": UNVERSIONED,
        "source": str(path),
        "source_digest": sha256_of(path),
        "image_size": None if images is None else images.image_size,
    }
    if "features" in arrays:  # else others wrote it, and mean something else by these names
        said |= {name: arrays[name].item() for name in (*WORDS, *NUMBERS) if name in arrays}
    return ReferenceStatistics(
        pooled=pooled, spatial=_gaussian(arrays, SPATIAL, path), neighbours=neighbours, **said
    ), images


def _gaussian(arrays: Mapping[str, np.ndarray], names: tuple[str, str], path: Path) -> Gaussian | None:
    if not all(name in arrays for name in names):
        return None
    mean, covariance = (torch.from_numpy(arrays[name].astype(np.float64)) for name in names)
    finite = torch.isfinite(mean).all() and torch.isfinite(covariance).all()
    if not finite or mean.dim() != 1 or covariance.shape != (len(mean), len(mean)):
        raise DataError(
            f"{path}: '{names[0]}' {tuple(mean.shape)} and '{names[1]}' {tuple(covariance.shape)} are no finite mean "
            f"(dim,) and covariance (dim, dim); write it anew"
        )
    return Gaussian(mean, covariance)
