"""What a feature network sees in a set of images: sums for Gaussians, and the features of single images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..data.frame import Frame
from ..data.loader import Batch, eval_loader
from ..data.source import ImageSource
from ..errors import ConfigError
from .features import FeatureNetwork, check_side
from .frechet import GaussianSums
from .passes import add_up_gaussian, check_evaluated, gather_rows, rank_of, walk

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class SetFeatures:
    """The features of a set, the same in all processes.

    Attributes:
        halves: sums of the pooled features at even and at odd positions.
        spatial: sums of the spatial features, where the network has them.
        pooled: `(M, dim)` float32 on the CPU, of the images that were to be kept, in the order of their positions.
        logits: `(M, classes)` float32 on the CPU, of the same images, where the network has them.
    """

    halves: tuple[GaussianSums, GaussianSums]
    spatial: GaussianSums | None
    pooled: Tensor
    logits: Tensor | None

    @property
    def count(self) -> int:
        """How many images were seen."""
        return sum(half.count for half in self.halves)

    def gaussian(self) -> GaussianSums:
        """The sums of all pooled features."""
        whole = GaussianSums(self.halves[0].dim, self.halves[0].sum.device)
        for half in self.halves:
            whole.merge(half)
        return whole


def checked_frame(frame: Frame | None, image_size: int) -> Frame:
    """The frame of an evaluation at `image_size`; None is the centre crop.

    Raises:
        ConfigError: it is of another size.
    """
    frame = frame or Frame(image_size)
    if frame.image_size != image_size:
        raise ConfigError(f"frame.image_size is {frame.image_size}, and image_size {image_size}")
    return frame


def collect_features(
    source: ImageSource,
    network: FeatureNetwork,
    frame: Frame,
    *,
    keep: int | None,
    title: str,
    batch_size: int,
    num_workers: int,
    max_bad_fraction: float,
    progress: bool,
    accelerator: Accelerator | None,
) -> SetFeatures:
    """Look at every image of a source once.

    Args:
        keep: of how many images, evenly spread, the single features are wanted; None is all.
        title: of the bar.

    Raises:
        ConfigError: a batch size below 1.
        DataError: too many bad images, or no good one.
        HieratokError: another process failed.
        NonFiniteError: a feature is NaN or infinite.
        ProtocolError: images too small for the network.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; it must be above 0")
    check_side(network, frame.image_size)
    # A black image tells the lengths, also to a process that gets no images.
    black = network.everything(torch.zeros(1, 3, frame.image_size, frame.image_size, dtype=torch.uint8))
    device = torch.device("cpu") if black.pooled.device.type == "mps" else black.pooled.device  # no float64 there
    halves = GaussianSums(network.dim, device), GaussianSums(network.dim, device)
    spatial = None if black.spatial is None else GaussianSums(black.spatial.shape[1], device)
    kept = torch.arange(len(source))
    if keep is not None and keep < len(source):
        kept = torch.from_numpy(np.linspace(0, len(source) - 1, keep).round().astype(np.int64))
    positions, pooled = [torch.empty(0, dtype=torch.int64)], [black.pooled[:0].cpu()]
    logits = None if black.logits is None else [black.logits[:0].cpu()]

    def step(batch: Batch) -> None:
        seen = network.everything(batch.images)
        parity = (batch.indices % 2).to(seen.pooled.device)
        for number, half in enumerate(halves):
            half.update(seen.pooled[parity == number])
        if spatial is not None and seen.spatial is not None:
            spatial.update(seen.spatial)
        wanted = torch.isin(batch.indices, kept)
        positions.append(batch.indices[wanted])
        pooled.append(seen.pooled.cpu()[wanted])
        if logits is not None and seen.logits is not None:
            logits.append(seen.logits.cpu()[wanted])

    rank, world_size = rank_of(accelerator)
    batches = eval_loader(
        source, frame.image_size, batch_size, frame=frame, num_workers=num_workers, rank=rank, world_size=world_size,
        max_bad_fraction=max_bad_fraction,
    )  # fmt: skip
    walk(batches, step, total=len(source), title=title, progress=progress, accelerator=accelerator)
    if accelerator is not None and world_size > 1:
        for sums in (*halves, *([spatial] if spatial is not None else [])):
            add_up_gaussian(accelerator, sums)
    check_evaluated(source, sum(half.count for half in halves), max_bad_fraction)
    order = _gathered(positions, accelerator).argsort()
    return SetFeatures(
        halves,
        spatial,
        _gathered(pooled, accelerator)[order],
        None if logits is None else _gathered(logits, accelerator)[order],
    )


def _gathered(parts: list[Tensor], accelerator: Accelerator | None) -> Tensor:
    rows = torch.cat(parts)
    return rows if accelerator is None else gather_rows(accelerator, rows)
