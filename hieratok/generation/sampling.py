"""Sets of samples: any number of images by a generator, each from its own seed, in shards that survive a stop."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save as save_tensors
from torch import Tensor
from tqdm.auto import tqdm

from ..data.jobs import MANIFEST, claim_folder
from ..data.order import sample_seed
from ..data.samples import VERSION
from ..engine.settings import LabelOrder, SamplingConfig
from ..errors import ConfigError
from ..files import sha256_of, write_atomically
from ..models.autoencoder import state_sha256
from .pipeline import HieraTokPipeline
from .schedulers import DEFAULT_STEPS, SCHEDULERS, make_scheduler, objective_of

if TYPE_CHECKING:
    from accelerate import Accelerator


def choose_labels(
    order: LabelOrder, num_images: int, num_classes: int, seed: int, counts: Sequence[int] | None = None
) -> np.ndarray:
    """The class of each image, int64 `(num_images,)`, in a shuffled order (the Inception Score depends on it).

    Args:
        order: "random" draws each from all classes alike, "balanced" has as many of each as of any other (one more or
            less where they do not divide), "data" draws them as often as `counts` has them.
        counts: images per class of a data set, for "data".

    Raises:
        ConfigError: "data" without counts, or counts of other classes.
    """
    rng = np.random.Generator(np.random.Philox(key=sample_seed(seed, 1, num_images)))
    if order == "balanced":
        return rng.permutation(np.arange(num_images) % num_classes)
    if order == "random":
        return rng.integers(num_classes, size=num_images)
    if counts is None or len(counts) != num_classes or sum(counts) == 0:
        raise ConfigError(
            f"labels=data needs reference images in the model's {num_classes} classes, "
            f"got {None if counts is None else len(counts)}; use labels=random or labels=balanced"
        )
    share = np.asarray(counts, dtype=np.float64) / sum(counts)
    return rng.choice(num_classes, size=num_images, p=share)


class Sampler:
    """Images of a pipeline under fixed settings; an image depends on its label and seed alone.

    Attributes:
        protocol: everything that its images depend on beside the model, for records.
    """

    def __init__(self, pipeline: HieraTokPipeline, config: SamplingConfig) -> None:
        """Raises:
        ConfigError: no such scheduler for this model.
        """
        self.pipeline, self.config = pipeline, config
        objective = objective_of(pipeline.scheduler)
        self.scheduler = make_scheduler(config.scheduler, objective, pipeline.transformer.learns_variance)
        name = config.scheduler or next(iter(SCHEDULERS[objective]))
        self.steps = config.num_inference_steps or DEFAULT_STEPS[name]
        self.protocol: dict[str, Any] = {
            "objective": objective,
            "scheduler": name,
            "num_inference_steps": self.steps,
            "guidance_scale": config.guidance_scale,
            "guidance_interval": list(config.guidance_interval),
            "precision": config.precision,
        }

    def __call__(self, labels: Sequence[int], seeds: Sequence[int]) -> Tensor:
        """uint8 `(N, 3, H, W)` on the CPU, of any number of images."""
        return self.scales(labels, seeds)[-1]

    def scales(self, labels: Sequence[int], seeds: Sequence[int]) -> list[Tensor]:
        """The same at every scale, coarse to fine."""
        size, parts = self.config.batch_size, []
        for start in range(0, len(labels), size):
            parts.append(self._batch(labels[start : start + size], seeds[start : start + size]))
        return [torch.cat(scale) for scale in zip(*parts, strict=True)]

    def _batch(self, labels: Sequence[int], seeds: Sequence[int]) -> list[Tensor]:
        before = self.pipeline.scheduler
        self.pipeline.scheduler = self.scheduler
        device = self.pipeline.transformer.device
        try:
            with torch.autocast(device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
                output = self.pipeline(
                    [int(label) for label in labels], self.config.guidance_scale, self.steps,
                    [torch.Generator().manual_seed(int(seed)) for seed in seeds], output_scales=True,
                    guidance_interval=self.config.guidance_interval, output_type="uint8",
                )  # fmt: skip
        finally:
            self.pipeline.scheduler = before
        return [scale.cpu() for scale in output.scales]


def image_seeds(seed: int, indices: Sequence[int] | range) -> list[int]:
    """The seeds of numbered images of a set."""
    return [sample_seed(seed, 0, index) for index in indices]


def sample_set(
    sampler: Sampler,
    output: str | Path,
    num_images: int,
    *,
    labels: LabelOrder = "random",
    counts: Sequence[int] | None = None,
    seed: int = 0,
    shard_size: int = 1000,
    accelerator: Accelerator | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Draw `num_images` images into the folder `output`, and return its manifest; `open_source(output)` reads it.

    Run again after an interruption it goes on behind the last finished shard of each process; run again after the end
    it returns the manifest. The images do not depend on `shard_size` or on the number of processes.

    Args:
        sampler: the pipeline and its settings.
        output: a folder that is new, empty, or an unfinished one of the same job.
        num_images: how many.
        labels, counts: see `choose_labels`.
        seed: of labels and noise.
        shard_size: images per file.
        accelerator: of several processes; they share the shards.
        progress: show a bar (on the main process).

    Raises:
        ConfigError: the folder holds something else, or another job.
        NonFiniteError: the model gives NaN or infinite latents.
    """
    if num_images < 1 or shard_size < 1:
        raise ConfigError(f"num_images {num_images} and shard_size {shard_size} must be above 0")
    output, pipeline = Path(output), sampler.pipeline
    rank, world_size = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    chosen = choose_labels(labels, num_images, pipeline.num_classes, seed, counts)
    job = {
        "version": VERSION,
        "kind": "samples",
        "num_images": num_images,
        "num_classes": pipeline.num_classes,
        "classes": pipeline.class_names,
        "labels_sha256": hashlib.sha256(chosen.tobytes()).hexdigest(),  # with labels=data they follow from the counts
        "shard_size": shard_size,
        "protocol": {
            **sampler.protocol, "labels": labels, "seed": seed, "tokenizer": type(pipeline.vae).__name__,
            "generator_sha256": state_sha256(pipeline.transformer), "tokenizer_sha256": state_sha256(pipeline.vae),
        },
    }  # fmt: skip
    if rank == 0:
        claim_folder(output, job, "a set of samples", ".samples-*.tmp")
    if accelerator:
        accelerator.wait_for_everyone()
    if (output / MANIFEST).is_file():
        return json.loads((output / MANIFEST).read_text())
    numbers = range(-(-num_images // shard_size))
    bar = tqdm(total=num_images, desc="sampling", unit="image", disable=not progress or rank > 0)
    for number in numbers:
        path, start = output / f"samples-{number:05}.safetensors", number * shard_size
        indices = range(start, min(start + shard_size, num_images))
        if number % world_size == rank and not path.is_file():
            parts = []
            size = sampler.config.batch_size
            for begin in range(0, len(indices), size):
                part = indices[begin : begin + size]
                parts.append(sampler(chosen[part.start : part.stop].tolist(), image_seeds(seed, part)))
                bar.update(len(part) * min(world_size, len(numbers) - number))
            tensors = {"images": torch.cat(parts), "labels": torch.from_numpy(chosen[start : indices.stop]).long()}
            write_atomically(path, save_tensors({name: t.contiguous() for name, t in tensors.items()}))
        elif path.is_file():
            bar.update(len(indices))
    bar.close()
    if accelerator:
        accelerator.wait_for_everyone()
    shards = [
        {"file": f"samples-{n:05}.safetensors", "sha256": sha256_of(output / f"samples-{n:05}.safetensors"),
         "count": min(shard_size, num_images - n * shard_size)}
        for n in numbers
    ]  # fmt: skip
    manifest = {**job, "count": num_images, "shards": shards}
    if rank == 0:
        write_atomically(output / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())
    if accelerator:
        accelerator.wait_for_everyone()
    return manifest
