"""The paper's testbed put together: a generator that is seen and judged while it learns, sampled and measured after."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from .config import load_recipe
from .data.arrays import write_npz
from .data.frame import Frame
from .data.latents import LatentsDataset
from .data.opening import DataConfig, open_source
from .data.source import ImageSource, spread
from .engine.pictures import sample_grid, save_picture, scales_grid, to_array
from .engine.run_folder import CONFIG
from .engine.settings import LabelOrder, SamplingConfig
from .errors import ConfigError
from .evaluation.features import load_features
from .evaluation.generation import GenerationResult, evaluate_generation
from .evaluation.reference import ReferenceStatistics, reference_statistics
from .files import write_atomically
from .generation.loading import load_pipeline, make_pipeline
from .generation.pipeline import HieraTokPipeline
from .generation.sampling import Sampler, image_seeds, sample_set
from .generation.schedulers import make_scheduler
from .models.autoencoder import Autoencoder, state_sha256
from .models.dit import DiT
from .training.generator import GeneratorEvalConfig, GeneratorRun, Tools

PICTURED_CLASSES, PICTURED_EACH = 8, 6
SAMPLES = "samples"  # below a run's folder, while they are judged


# While it learns


def export(model: DiT, tokenizer: Autoencoder, run: GeneratorRun, classes: Sequence[str]) -> HieraTokPipeline:
    """The pipeline of a generator in training or trained."""
    return make_pipeline(model.eval(), tokenizer, run.loss.objective, classes)


def paint(model: DiT, tokenizer: Autoencoder, run: GeneratorRun, classes: Sequence[str]) -> Image.Image:
    """A grid of samples, a row per class, with the same noise each time; at most 8 classes, spread over all."""
    sampler = Sampler(export(model, tokenizer, run, classes), run.sampling.for_pictures())
    shown = some_classes(model.num_classes)
    labels = [label for label in shown for _ in range(PICTURED_EACH)]
    images = sampler(labels, image_seeds(run.seed, range(len(labels))))
    return sample_grid(images, PICTURED_EACH, [sampler.pipeline.class_names[label] for label in shown])


def judge(model: DiT, tokenizer: Autoencoder, run: GeneratorRun, accelerator: Accelerator) -> GenerationResult:
    """The figures of `run.eval.num_images` samples; those of an evaluation that was cut off are drawn to the end."""
    pipeline = export(model, tokenizer, run, [])
    folder = Path(run.output) / SAMPLES
    mine = folder / state_sha256(model)[:16]
    if accelerator.is_main_process and folder.is_dir():
        for other in set(folder.iterdir()) - {mine}:
            shutil.rmtree(other)
    counts = class_counts(run) if run.eval.labels == "data" else None
    sample_set(
        Sampler(pipeline, run.sampling), mine, run.eval.num_images, labels=run.eval.labels, counts=counts,
        seed=run.seed, accelerator=accelerator, progress=False,
    )  # fmt: skip
    result = evaluate_generation(
        open_source(mine), reference_of(run, tokenizer.image_size, accelerator), image_size=tokenizer.image_size,
        features=run.eval.features, feature_weights=run.eval.feature_weights, batch_size=run.eval.batch_size,
        seed=run.seed, accelerator=accelerator, progress=False,
    )  # fmt: skip
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(folder)
        print(f"\n{result.table()}", file=sys.stderr)
    return result


def prepare(run: GeneratorRun) -> None:
    """Try once what `judge` will need, so that what is missing is known before the training and not after it.

    Raises:
        HieratokError: something is not there, or the reference is not of the images that were encoded.
    """
    load_features(run.eval.features, run.eval.feature_weights)
    make_scheduler(run.sampling.scheduler, run.loss.objective, learns_variance=True)
    if run.eval.reference is not None:
        return
    images = run.data.open("all")
    if run.latents is not None:
        made_of = LatentsDataset(run.latents).manifest["source"]
        if made_of["digest"] != images.digest:
            raise ConfigError(
                f"the latents in {run.latents} are of {made_of['name']}, and data.source is {images.name}, another set "
                f"of images; give the encoded images as data.source, or what gFID is to compare with as eval.reference"
            )


TOOLS = Tools(judge=judge, paint=paint, export=export)


def some_classes(num_classes: int, most: int = PICTURED_CLASSES) -> list[int]:
    """At most so many classes, spread over all."""
    return sorted(set(np.linspace(0, num_classes - 1, most).round().astype(int).tolist()))


def class_counts(run: GeneratorRun) -> list[int]:
    """Images per class of a run's training set."""
    if run.latents is not None:
        latents = LatentsDataset(run.latents)
        labels, classes = latents.labels.tolist(), latents.manifest["classes"]
    else:
        images = run.data.open("all")
        labels, classes = [images.label(index) for index in range(len(images))], images.classes
    return np.bincount(labels, minlength=max(len(classes), 1)).tolist()


def reference_of(run: GeneratorRun, image_size: int, accelerator: Accelerator | None) -> ReferenceStatistics:
    """What the samples of a run are compared with; computed once in a process."""
    return _reference(run.data, run.eval, image_size, accelerator)


@lru_cache(maxsize=1)
def _reference(
    data: DataConfig, config: GeneratorEvalConfig, image_size: int, accelerator: Accelerator | None
) -> ReferenceStatistics:
    device = accelerator.device if accelerator is not None else "cpu"
    network = load_features(config.features, config.feature_weights, device)
    return reference_statistics(
        real_images(data, config), network, image_size, batch_size=config.batch_size, num_workers=data.num_workers,
        accelerator=accelerator, progress=False, frame=data.frame(image_size), max_bad_fraction=1.0,
    )  # fmt: skip


def real_images(data: DataConfig, config: GeneratorEvalConfig) -> ImageSource | str:
    """What samples are to be compared with: images, or the path of an npz, which may hold statistics."""
    if config.reference is None:
        return spread(data.open("all"), config.num_reference)
    named = images_or_file(config.reference)
    return named if isinstance(named, str) else spread(named, config.num_reference)


def images_or_file(reference: str) -> ImageSource | str:
    """The images that a reference names, opened; an npz stays a path, since it may hold statistics instead."""
    return reference if reference.endswith(".npz") else open_source(reference)


# After it has learned


def sample(
    model: HieraTokPipeline | str | Path,
    output: str | Path = "samples.png",
    *,
    classes: Sequence[int | str] = (),
    per_class: int = 6,
    scales: bool = False,
    sampling: SamplingConfig | None = None,
    seed: int = 0,
    separate: str | Path | None = None,
    decoder: str | Path | None = None,
    device: str | None = None,
) -> Path:
    """Draw a grid of generated images, a row per class, or with `scales` a row per image and a column per scale.

    Beside the picture, `NAME.json` records seeds, classes and settings, from which the same images come again.

    Args:
        model: a pipeline, or a path that `load_pipeline` takes.
        output: the picture, a PNG.
        classes: numbers or names; none are 8 spread over all.
        per_class: images of each.
        scales: show every scale (Figures 6 to 9 of the paper).
        sampling: scheduler, steps and guidance (its `guidance_scale`); None is the run's own for pictures.
        seed: the images' seeds follow from it.
        separate: a folder that also gets every image as a file of its own.
        decoder: a tokenizer to paint with, of the same encoder; see `load_pipeline`.
        device: where to compute; None is where the model is.

    Raises:
        ConfigError: no such class, a scheduler that does not go with the model, or a decoder of other latents.
        CheckpointError: there is no generator at the path.
    """
    pipeline = load_pipeline(model, decoder) if isinstance(model, (str, Path)) else model
    if device is not None:
        pipeline.to(torch.device(device))
    if per_class < 1:
        raise ConfigError(f"per_class is {per_class}; it must be above 0")
    if sampling is None:
        run = run_of(Path(model)) if isinstance(model, (str, Path)) else None
        sampling = (run.sampling if run is not None else SamplingConfig()).for_pictures()
    sampler = Sampler(pipeline, sampling)
    chosen = pipeline.class_ids(classes) if classes else some_classes(pipeline.num_classes)
    labels = [label for label in chosen for _ in range(per_class)]
    seeds = image_seeds(seed, range(len(labels)))
    painted = sampler.scales(labels, seeds)
    names = [pipeline.class_names[label] for label in labels]
    if scales:
        picture = scales_grid(painted, pipeline.sides, names)
    else:
        picture = sample_grid(painted[-1], per_class, names[::per_class])
    path = save_picture(picture, Path(output))
    record: dict[str, Any] = {
        "model": str(model) if isinstance(model, (str, Path)) else type(model).__name__,
        "generator_sha256": state_sha256(pipeline.transformer),
        **({} if decoder is None else {"decoder": str(decoder)}),
        "sampling": {**sampler.protocol, "seed": seed},
        "images": [{"class": label, "name": name, "seed": image_seed}
                   for label, name, image_seed in zip(labels, names, seeds, strict=True)],
    }  # fmt: skip
    write_atomically(path.with_suffix(".json"), (json.dumps(record, indent=1) + "\n").encode())
    if separate is not None:
        for number, image in enumerate(painted[-1]):
            file = Path(separate) / f"{number:05}-class-{labels[number]}.png"
            save_picture(Image.fromarray(to_array(image)), file)
    return path


def evaluate_model(
    model: str | Path,
    samples: str | Path,
    num_images: int,
    *,
    reference: str | None = None,
    labels: LabelOrder = "random",
    sampling: SamplingConfig | None = None,
    features: str = "mini",
    feature_weights: str | Path | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    seed: int = 0,
    accelerator: Accelerator | None = None,
    device: str | None = None,
) -> GenerationResult:
    """Draw samples of a generator into the folder `samples`, or finish those that are there, and measure them.

    Args:
        model: a path that `load_pipeline` takes.
        samples: the folder; an interrupted job goes on in it.
        num_images: how many.
        reference: images as `open_source` takes them, or an npz of statistics; None is what the run of `model` was
            trained on.
        labels: see `choose_labels`.
        sampling: scheduler, steps and guidance; None is what the run of `model` says, or the defaults.
        features, feature_weights, batch_size, num_workers: see `evaluate_generation`.
        seed: of labels and noise.
        accelerator: of a run with several processes.
        device: where to compute; None is the accelerator's, or the CPU.

    Raises:
        HieratokError: as `load_pipeline`, `sample_set` and `evaluate_generation` do.
    """
    run = run_of(Path(model))
    if reference is not None:
        real = images_or_file(reference)
    elif run is not None:
        real = real_images(run.data, run.eval)
    else:
        raise ConfigError(f"{model} is not a generator's run, so it names no images; give a reference")
    draw_set(
        model, samples, num_images, labels=labels, sampling=sampling, seed=seed, accelerator=accelerator, device=device
    )
    drawn: Any = open_source(samples)
    return evaluate_generation(
        drawn, real, image_size=drawn.image_size, features=features,
        feature_weights=feature_weights, batch_size=batch_size, num_workers=num_workers, seed=seed,
        accelerator=accelerator, device=None if accelerator else device,
        frame=run.data.frame(drawn.image_size) if run is not None else None,
    )  # fmt: skip


def evaluate_samples(
    samples: str | Path, reference: str, *, image_size: int | None = None, **settings: Any
) -> GenerationResult:
    """Measure images that are there; `image_size` None is the size of the first. See `evaluate_generation`.

    Raises:
        HieratokError: as `evaluate_generation` does.
    """
    drawn: Any = open_source(samples)
    if image_size is None:
        image_size = getattr(drawn, "image_size", None)
    if image_size is None:
        raise ConfigError(f"{samples} does not say the size of its images; give --image-size")
    return evaluate_generation(drawn, reference, image_size=image_size, **settings)


def draw_set(
    model: str | Path,
    output: str | Path,
    num_images: int,
    *,
    labels: LabelOrder = "random",
    sampling: SamplingConfig | None = None,
    seed: int = 0,
    npz: str | Path | None = None,
    decoder: str | Path | None = None,
    accelerator: Accelerator | None = None,
    device: str | None = None,
) -> None:
    """`sample_set` of a generator's run or saved pipeline; `npz` also gets the images in ADM's format.

    `decoder`: a tokenizer to paint with, of the same encoder; see `load_pipeline`.

    Raises:
        HieratokError: as `load_pipeline` and `sample_set` do.
    """
    run = run_of(Path(model))
    pipeline = load_pipeline(model, decoder)
    pipeline.to(accelerator.device if accelerator is not None else torch.device(device or "cpu"))
    counts = class_counts(run) if labels == "data" and run is not None else None
    sampler = Sampler(pipeline, sampling or (run.sampling if run is not None else SamplingConfig()))
    sample_set(sampler, output, num_images, labels=labels, counts=counts, seed=seed, accelerator=accelerator)
    if npz is not None and (accelerator is None or accelerator.is_main_process):
        drawn: Any = open_source(output)
        frame = Frame(drawn.image_size)
        pixels = np.stack([drawn.pixels(index, frame, None) for index in range(len(drawn))])
        write_npz(npz, pixels, np.array([drawn.label(index) for index in range(len(drawn))]))


def run_of(folder: Path) -> GeneratorRun | None:
    """What a generator's run was asked to do; None where the folder is not that of a run."""
    config = folder / CONFIG
    return GeneratorRun.from_mapping(load_recipe(config.resolve())) if config.is_file() else None
