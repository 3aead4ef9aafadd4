"""The latents that a generator trains on: read from a cache, or encoded as the images come."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor

from ..errors import ConfigError
from ..models.autoencoder import Autoencoder, sample_moments
from .decode import to_float
from .frame import Frame
from .latents import LatentBatch, LatentsDataset, latent_loader, measure_latents
from .loader import endless, train_loader
from .order import Position
from .source import ImageSource, digest

Normalization = Literal["channel", "scalar"]


class LatentStream(Protocol):
    """A numbered set of latents with their labels.

    Attributes:
        name, licence, images_digest: of the images behind them.
        digest: of everything that the latents depend on.
        classes: names of the labels.
        shape: `(d, h, w)` of one image's latents.
        statistics: `mean` and `std` per channel and `scaling_factor`, see `encode`.
    """

    name: str
    licence: str | None
    images_digest: str
    digest: str
    classes: list[str]
    shape: tuple[int, int, int]
    statistics: dict[str, Any]

    def __len__(self) -> int: ...

    def batches(self, position: Position) -> Generator[LatentBatch, None, None]:
        """Micro-batches without end; closing the generator ends its workers."""


@dataclass
class CachedLatents:
    """The folder that `encode` wrote."""

    path: Path
    tokenizer: Autoencoder
    num_workers: int = 0
    name: str = field(init=False)
    licence: str | None = field(init=False)
    images_digest: str = field(init=False)
    digest: str = field(init=False)
    classes: list[str] = field(init=False)
    shape: tuple[int, int, int] = field(init=False)
    statistics: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        """Raises:
        DataError: no finished encoding there, or a damaged one.
        ConfigError: it was made by another tokenizer, or of images of another size.
        """
        self.data = LatentsDataset(self.path)
        manifest = self.data.manifest
        made_by, given = manifest["model"], self.tokenizer.state_sha256()
        if made_by["sha256"] != given:
            raise ConfigError(
                f"the latents in {self.path} were made by another tokenizer ({made_by.get('class', 'HieraTok')} "
                f"{made_by['sha256'][:8]}) than the one given ({self.tokenizer.name} {given[:8]}); give that one as "
                f"tokenizer, or encode again"
            )
        self.name, self.licence = manifest["source"]["name"], manifest["source"].get("licence")
        self.images_digest = manifest["source"]["digest"]
        self.digest = digest([self.images_digest, given, *(s["sha256"] for s in manifest["shards"])])
        self.classes = manifest["classes"]
        channels, *sides = manifest["shape"]
        self.shape = (channels // 2 if manifest["posterior"] == "moments" else channels, *sides)
        if self.shape != self.tokenizer.latent_shape:
            raise ConfigError(
                f"the latents in {self.path} have the shape {self.shape}, and the tokenizer gives "
                f"{self.tokenizer.latent_shape} for images of {self.tokenizer.image_size} px; give the image_size that "
                f"they were encoded at"
            )
        self.statistics = {key: manifest[key] for key in ("mean", "std", "scaling_factor")}

    def __len__(self) -> int:
        return len(self.data)

    def batches(self, position: Position) -> Generator[LatentBatch, None, None]:
        """See `LatentStream`."""
        return endless(latent_loader(self.data, position, self.num_workers))


@dataclass
class EncodedLatents:
    """Images, encoded batch by batch, so that every epoch sees other crops of them."""

    images: ImageSource
    tokenizer: Autoencoder
    frame: Frame
    seed: int
    num_workers: int = 0

    def __post_init__(self) -> None:
        self.name, self.licence, self.classes = self.images.name, self.images.licence, self.images.classes
        self.images_digest = self.images.digest
        self.digest = digest([self.images_digest, self.tokenizer.state_sha256()])
        self.shape = self.tokenizer.latent_shape
        self.statistics = measure_latents(self.tokenizer, self.images, self.frame, self.seed)

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, position: Position) -> Generator[LatentBatch, None, None]:
        """See `LatentStream`."""
        images = endless(train_loader(self.images, self.frame, **vars(position), num_workers=self.num_workers))
        try:
            for batch in images:
                latents = self.tokenizer.encode(to_float(batch.images.to(self.tokenizer.device)))
                yield LatentBatch(latents, batch.labels, batch.keys, batch.seeds, batch.bad)
        finally:
            images.close()


def normalization_of(
    kind: Normalization, stream: LatentStream, tokenizer: Autoencoder
) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and deviation, d numbers each, by which a generator's latents are normalised.

    `channel`: each channel's own, measured on the stream. `scalar`: the tokenizer's `scaling_factor` and
    `shift_factor`, one for all channels, as pipelines with a single factor expect; where it has none, the stream's.
    """
    if kind == "channel":
        return stream.statistics["mean"], stream.statistics["std"]
    config, channels = tokenizer.model.config, stream.shape[0]
    factor = config.get("scaling_factor") or stream.statistics["scaling_factor"]
    return [float(config.get("shift_factor") or 0.0)] * channels, [1 / float(factor)] * channels


def latents_of(stored: Tensor, channels: int, noise: Tensor) -> Tensor:
    """Latents `(B, d, h, w)` of a batch's: a sample of each posterior `(B, 2d, h, w)`, or what was stored itself."""
    return sample_moments(stored, noise) if stored.shape[1] == 2 * channels else stored
