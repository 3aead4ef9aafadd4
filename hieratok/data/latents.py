"""A data set as latents on disk: encoded once, read by generators and analyses.

A folder holds `job.json` (what is encoded, and how), shards `latents-00000.safetensors` (`latents` float32
`(N, 2d, h, w)`, mean and log-variance as the tokenizer gives them, `latents_flipped` those of the mirrored images,
`labels` and `indices` int64 `(N,)`) and, once all are there, `manifest.json`.
"""

from __future__ import annotations

import bisect
import json
import math
import os
import random
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from diffusers.models.modeling_utils import ModelMixin
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ..config import suggest
from ..errors import ConfigError, DataError, NonFiniteError
from ..files import sha256_of, write_atomically
from ..models.autoencoder import Autoencoder, as_autoencoder, sample_moments
from ..models.presets import plain_config
from .bad import BadSample
from .decode import to_float
from .frame import Frame
from .jobs import JOB, MANIFEST, claim_folder
from .loader import Batch, eval_loader, seeded_loader
from .order import MicroBatches, Position, sample_seed
from .source import ImageSource, spread

LatentPosterior = Literal["mode", "sample", "moments"]

VERSION = 1
MEASURED = 2000  # images whose latents give statistics that hold for the set
UNFINISHED = ".latents-*.tmp"  # what a broken run leaves of a shard


def encode(
    model: Autoencoder | ModelMixin,
    source: ImageSource,
    output: str | Path,
    *,
    batch_size: int = 64,
    shard_size: int = 10_000,
    posterior: LatentPosterior = "moments",
    flip: bool = True,
    num_workers: int = 0,
    device: torch.device | str | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
    seed: int = 0,
    limit: int | None = None,
    progress: bool = True,
    frame: Frame | None = None,
    max_bad_fraction: float = 0.01,
) -> dict[str, Any]:
    """Encode a source into the folder `output`, and return its manifest.

    Run again after an interruption it goes on behind the last finished shard; run again after the end it returns the
    manifest. Bad images are left out; `indices` say which image a latent is of.

    Args:
        model: the tokenizer, HieraTok or an autoencoder of diffusers; it comes back in the mode (training or
            evaluation) in which it came.
        source: the images.
        output: a folder that is new, empty, or an unfinished one of the same job.
        batch_size: images at once.
        shard_size: images per file.
        posterior: "moments", mean and log-variance of the posterior as `(N, 2d, h, w)`, from which every epoch can
            draw its own sample; or "mode", or one "sample" (noise by `seed` and image), `(N, d, h, w)`. A tokenizer
            without a posterior has its latents stored, as "mode".
        flip: also store `latents_flipped`, those of the mirrored images.
        num_workers: processes that decode images.
        device: None is where the model is. The model is moved there.
        precision: of the model: "fp32", or "bf16" by autocast; latents are stored in float32.
        seed: of the samples.
        limit: encode the first so many images only.
        progress: show a bar.
        frame: how images are cropped to the model's size; None is the centre.
        max_bad_fraction: the part of the images that may be bad.

    Returns:
        The manifest: what was encoded, by what model, `shards` with their SHA-256, and `mean` and `std` per channel
        and `scaling_factor` (1 over the deviation of all values), over all stored latents (of "moments": over the
        samples they describe).

    Raises:
        ConfigError: the folder holds something else, a setting is none of its choices, or several processes were
            started for it.
        DataError: no images, too many bad ones, or a damaged shard.
        NonFiniteError: a latent is NaN or infinite.
    """
    if posterior not in get_args(LatentPosterior):
        raise ConfigError(f"posterior '{posterior}'{suggest(str(posterior), get_args(LatentPosterior))}")
    if precision not in ("fp32", "bf16"):
        raise ConfigError(f"precision '{precision}'{suggest(str(precision), ('fp32', 'bf16'))}")
    if shard_size < 1:
        raise ConfigError(f"shard_size must be at least 1, got {shard_size}")
    tokenizer = as_autoencoder(model)
    frame = frame or Frame(tokenizer.image_size)
    if frame.image_size != tokenizer.image_size:
        raise ConfigError(f"frame.image_size is {frame.image_size}, the model's {tokenizer.image_size}")
    if tokenizer.deterministic:
        posterior = "mode"
    total = len(source) if limit is None else min(limit, len(source))
    if total < 1:
        raise DataError(f"{source.name} holds no images to encode (limit={limit})")
    output = Path(output)
    job = {
        "version": VERSION,
        "model": {
            "class": tokenizer.name,
            "config": plain_config(tokenizer.model),
            "sha256": tokenizer.state_sha256(),
        },
        "source": {"name": source.name, "digest": source.digest, "licence": source.licence},
        "classes": list(source.classes),
        "crop": frame.crop,
        "background": frame.background,
        "num_images": total,
        "shard_size": shard_size,
        "posterior": posterior,
        "flip": flip,
        "seed": seed,
        "precision": precision,
    }
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("encode works as one process; start it without torchrun or accelerate launch")
    claim_folder(output, job, "an encoding", UNFINISHED)
    if (output / MANIFEST).is_file():
        return read_manifest(output)

    device = torch.device(device) if device is not None else tokenizer.device
    was_training = tokenizer.model.training
    tokenizer.model.to(device).eval()
    shards: list[dict[str, Any]] = []
    statistics = _Statistics(posterior)
    bad, reason = 0, ""
    bar = tqdm(total=total, desc="encoding", unit="image", disable=not progress)
    try:
        for number, start in enumerate(range(0, total, shard_size)):
            path, end = output / f"latents-{number:05}.safetensors", min(start + shard_size, total)
            if path.is_file():
                bar.update(end - start)
            else:
                batches = eval_loader(
                    source, frame.image_size, batch_size, frame=frame, num_workers=num_workers, start=start,
                    limit=end, seed=seed, max_bad_fraction=1.0,  # counted below, over all shards and runs
                )  # fmt: skip
                rows = []
                for batch in batches:
                    for sample in batch.bad:
                        reason = f"; the last one is {sample.key}: {sample.reason}"
                    rows.append(_encode_batch(tokenizer, batch, posterior, flip, precision, device))
                    bar.update(len(batch.indices))
                _write_shard(path, rows)
            # Read back what is on the disk, so that new and resumed shards are counted in one way.
            shards.append({"file": path.name, "sha256": sha256_of(path), "count": statistics.update(path)})
            bad += end - start - shards[-1]["count"]
            if bad > total * max_bad_fraction:
                raise DataError(
                    f"{bad} of {total} images are bad, more than max_bad_fraction = {max_bad_fraction:g} allows"
                    f"{reason}. Repair or remove them, or allow more"
                )
    finally:
        bar.close()
        tokenizer.model.train(was_training)
    manifest = {**job, "count": sum(s["count"] for s in shards), "shards": shards, **statistics.result()}
    write_atomically(output / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())
    return manifest


class LatentsDataset(Dataset):
    """The latents of a folder that `encode` finished: item i is `(latents (d, h, w) float32, label)`.

    Attributes:
        manifest: see `encode`.
        labels, indices: int64 `(len(self),)`; which class, and which image of the source.
    """

    def __init__(self, path: str | Path, verify: bool = False) -> None:
        """`verify`: compare every file with its SHA-256 first.

        Raises:
            DataError: no finished encoding there, or a file is missing or damaged.
        """
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        if verify:
            self.verify()
        self._starts = [0]
        labels, indices = [], []
        for shard in self.manifest["shards"]:
            with _open_shard(self.path / shard["file"]) as file:
                labels.append(file.get_tensor("labels"))
                indices.append(file.get_tensor("indices"))
            self._starts.append(self._starts[-1] + len(labels[-1]))
        self.labels, self.indices = torch.cat(labels), torch.cat(indices)
        self._open: dict[int, Any] = {}

    def verify(self) -> None:
        """Compare every file with its SHA-256.

        Raises:
            DataError: a file is missing or damaged.
        """
        for shard in self.manifest["shards"]:
            file = self.path / shard["file"]
            if not file.is_file() or sha256_of(file) != shard["sha256"]:
                raise DataError(
                    f"{file} is missing or not what was written; delete it and {MANIFEST}, and encode again"
                )

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.item(index)

    def item(self, index: int, flipped: bool = False) -> tuple[Tensor, int]:
        """`(latents, label)`, of the mirrored image if asked for.

        Raises:
            IndexError: no such item.
            DataError: the encoding has no mirrored images.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        if flipped and not self.manifest["flip"]:
            raise DataError(f"{self.path} has no latents of mirrored images; encode with flip=true")
        index %= len(self)
        number = bisect.bisect_right(self._starts, index) - 1
        if number not in self._open:
            self._open[number] = _open_shard(self.path / self.manifest["shards"][number]["file"])
        row = index - self._starts[number]
        stored = self._open[number].get_slice("latents_flipped" if flipped else "latents")
        return stored[row : row + 1][0], int(self.labels[index])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # each worker opens its own


class LatentBatch(NamedTuple):
    """What a generator trains on: `latents` float32 `(B, 2d, h, w)`, mean and log-variance, or `(B, d, h, w)`, and
    `labels`, `keys`, `seeds` and `bad` as a `Batch` of images has them."""

    latents: Tensor
    labels: Tensor
    keys: list[str]
    seeds: list[int]
    bad: list[BadSample]


class _LatentSamples(Dataset):
    """What the loader does for the (epoch, index) pairs of a batch; half of the latents are of mirrored images."""

    def __init__(self, latents: LatentsDataset, seed: int) -> None:
        self.latents, self.seed = latents, seed

    def __getitems__(self, positions: list[tuple[int, int]]) -> LatentBatch:
        seeds = [sample_seed(self.seed, epoch, index) for epoch, index in positions]
        both = bool(self.latents.manifest["flip"])
        items = [
            self.latents.item(index, flipped=both and random.Random(seed).random() < 0.5)
            for (_, index), seed in zip(positions, seeds, strict=True)
        ]
        return LatentBatch(
            torch.stack([latents for latents, _ in items]),
            torch.tensor([label for _, label in items], dtype=torch.int64),
            [f"image {int(self.latents.indices[index])} of {self.latents.path}" for _, index in positions],
            seeds,
            [],
        )


def _as_it_is(batch: LatentBatch) -> LatentBatch:
    return batch


def latent_loader(latents: LatentsDataset, position: Position, num_workers: int = 0) -> DataLoader[LatentBatch]:
    """This process's micro-batches from a position of the stream on, without end, as `train_loader` has them."""
    batches = MicroBatches(len(latents), **vars(position))
    return seeded_loader(_LatentSamples(latents, position.seed), batches, num_workers, _as_it_is)


def read_manifest(path: str | Path) -> dict[str, Any]:
    """The manifest of a finished encoding.

    Raises:
        DataError: there is none, or it is of another version.
    """
    file = Path(path) / MANIFEST
    if not file.is_file():
        unfinished = (Path(path) / JOB).is_file()
        remedy = "the encoding is unfinished, run it again to go on" if unfinished else "encode a data set there first"
        raise DataError(f"no {MANIFEST} in {path}: {remedy}")
    try:
        manifest = json.loads(file.read_text())
    except ValueError as error:
        raise DataError(f"{file} is damaged ({error}); delete it and encode again, finished shards are kept") from error
    if manifest.get("version") != VERSION:
        raise DataError(f"{file} is of version {manifest.get('version')}, this package reads {VERSION}; encode again")
    return manifest


@torch.no_grad()
def _encode_batch(
    model: Autoencoder, batch: Batch, posterior: str, flip: bool, precision: str, device: torch.device
) -> dict[str, Tensor]:
    images = to_float(batch.images.to(device))
    rows = {"labels": batch.labels, "indices": batch.indices}
    views = {"latents": images, "latents_flipped": images.flip(3)} if flip else {"latents": images}
    generators = [torch.Generator().manual_seed(seed) for seed in batch.seeds]
    for name, pixels in views.items():
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            latents = model.encode(pixels)
        if posterior == "mode":
            latents = model.mode(latents)
        elif posterior == "sample":
            noise = torch.stack([torch.randn(model.latent_shape, generator=g) for g in generators])
            latents = sample_moments(latents, noise.to(device))
        latents = latents.cpu()
        if not torch.isfinite(latents).all():
            raise NonFiniteError(
                f"a latent is NaN or infinite, in a batch with {batch.keys[0]}; use precision=fp32 or another model"
            )
        rows[name] = latents
    return rows


@torch.no_grad()
def measure_latents(
    model: Autoencoder | ModelMixin, images: ImageSource, frame: Frame, seed: int, batch_size: int = 64
) -> dict[str, Any]:
    """`mean`, `std` and `scaling_factor`, as a manifest has them, of up to 2,000 images spread over a set.

    They are what a generator's latents are normalised by (docs/paper.md).
    """
    tokenizer = as_autoencoder(model)
    statistics = _Statistics("mode" if tokenizer.deterministic else "moments")
    for batch in eval_loader(
        spread(images, MEASURED), frame.image_size, batch_size, frame=frame, seed=seed, max_bad_fraction=1.0
    ):
        statistics.add(tokenizer.encode(to_float(batch.images.to(tokenizer.device))).double().cpu())
    return statistics.result()


class _Statistics:
    """Per-channel sums in float64 over the shards of a job."""

    def __init__(self, posterior: str) -> None:
        self.posterior = posterior
        self.shape: tuple[int, ...] = ()
        self.values = 0
        self.sum = self.squares = torch.zeros((), dtype=torch.float64)

    def update(self, path: Path) -> int:
        """Add a shard; returns how many images it holds."""
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path} is damaged ({error}); delete it and run again") from error
        for name in ("latents", "latents_flipped"):
            if name in tensors:
                self.add(tensors[name].double())
        return len(tensors["labels"])

    def add(self, latents: Tensor) -> None:
        """Add latents, or moments, of a batch, in float64."""
        self.shape = tuple(latents.shape[1:])
        variance: Tensor | float = 0.0
        if self.posterior == "moments":
            latents, logvar = latents.chunk(2, dim=1)
            variance = logvar.exp()
        self.values += latents.numel() // latents.shape[1]
        self.sum = self.sum + latents.sum(dim=(0, 2, 3))
        self.squares = self.squares + (latents.square() + variance).sum(dim=(0, 2, 3))

    def result(self) -> dict[str, Any]:
        mean, square = self.sum / self.values, self.squares / self.values
        std = (square - mean.square()).clamp(min=0).sqrt()
        global_std = math.sqrt(max(float(square.mean() - mean.mean().square()), 0.0))
        return {
            "shape": list(self.shape),
            "mean": mean.tolist(),
            "std": std.tolist(),
            "scaling_factor": 1 / global_std if global_std else 1.0,
        }


def _write_shard(path: Path, rows: list[dict[str, Tensor]]) -> None:
    if not rows:
        raise DataError(f"every image that belongs into {path.name} is bad; repair them or use a larger shard_size")
    tensors = {name: torch.cat([row[name] for row in rows]).contiguous() for name in rows[0]}
    write_atomically(path, save_tensors(tensors))


def _open_shard(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} cannot be read ({error}); delete it and {MANIFEST}, and encode again") from error
