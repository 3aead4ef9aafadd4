"""Training a generator: a DiT on the latents of a tokenizer (the paper's testbed; Tables 6 and 11).

A step is `train_step`; what surrounds it (clock, guards, checkpoints, logs) is the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from ..config import build, to_dict
from ..data.bad import BadSamples
from ..data.latent_stream import (
    CachedLatents,
    EncodedLatents,
    LatentStream,
    Normalization,
    latents_of,
    normalization_of,
)
from ..data.latents import LatentBatch
from ..data.opening import DataConfig
from ..data.order import Position
from ..engine.log import say
from ..engine.loop import Engine, Judgement, describe_device, make_accelerator, make_engine, run_facts
from ..engine.pictures import save_picture
from ..engine.run_folder import MODEL, PICTURES, PIPELINE, load_autoencoder, save_model, start
from ..engine.settings import LabelOrder, SamplingConfig, TrainConfig
from ..errors import ConfigError
from ..losses.diffusion import DDPMLoss, DiffusionLossConfig, FlowLoss, draw, make_diffusion_loss
from ..models.autoencoder import Autoencoder
from ..models.dit import DiT
from ..models.presets import build_dit, dit_fields, plain_config


@dataclass(frozen=True)
class GeneratorEvalConfig:
    """How generated images are judged, every so many steps (0: at the end only).

    `reference`: the images that gFID compares with, as `data.source` names images, or an npz of statistics in the
    ADM format; None is the training images.
    """

    every: int = 0
    num_images: int = 5000
    reference: str | None = None
    num_reference: int | None = None  # None: all
    labels: LabelOrder = "random"
    features: Literal["mini", "inception"] = "mini"
    feature_weights: str | None = None  # local file; None: the shipped mini, or the published Inception
    batch_size: int = 64

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ConfigError(f"eval.every is {self.every}; it must be 0 (at the end only) or more")
        for name in ("num_images", "num_reference", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"eval.{name} is {value}; it must be above 0")


@dataclass(frozen=True)
class GeneratorRun:
    """Everything that a run depends on: a recipe with its overrides, resolved.

    `model`: a preset's name and changes to it, or the fields of `DiT`; what follows from the latents is filled in.
    `tokenizer`: a tokenizer's run or saved model, or an autoencoder of diffusers by folder or hub id. `image_size`: of
    an autoencoder that does not say. `latents`: a folder that `hieratok encode` made with it; None encodes the images
    of `data` as they come. A generator holds none of them out. `normalization`: of the latents, by `channel`, or by
    the tokenizer's single `scalar` factor, as diffusers' `DiTPipeline` expects. `output`: the run's folder.
    """

    model: dict[str, Any]
    tokenizer: str
    image_size: int | None = None
    latents: str | None = None
    normalization: Normalization = "channel"
    seed: int = 0
    output: str = "runs/generator"
    data: DataConfig = field(default_factory=DataConfig)
    loss: DiffusionLossConfig = field(default_factory=DiffusionLossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    eval: GeneratorEvalConfig = field(default_factory=GeneratorEvalConfig)

    @staticmethod
    def from_mapping(values: Mapping[str, Any]) -> GeneratorRun:
        """From a recipe's mapping.

        Raises:
            ConfigError: an unknown key, a wrong type, or values that do not fit together.
        """
        if values.get("tokenizer") is None:
            raise ConfigError("give the tokenizer whose latents are to be learned: tokenizer=RUN_FOLDER_OR_MODEL")
        run = build(GeneratorRun, values)
        if not 0 <= run.seed < 2**32:
            raise ConfigError(f"seed is {run.seed}; it must lie between 0 and {2**32 - 1}")
        dit_fields(run.model)
        return run


@dataclass(frozen=True)
class Tools:
    """What a training is handed, so that it depends neither on sampling nor on evaluation; each may be left out.

    `judge`: measures the EMA weights, at intervals and at the end. `paint`: a picture of samples that have the same
    noise every time. `export`: the pipeline of a finished model, to be saved.
    """

    judge: Callable[[DiT, Autoencoder, GeneratorRun, Accelerator], Judgement] | None = None
    paint: Callable[[DiT, Autoencoder, GeneratorRun, list[str]], Image.Image] | None = None
    export: Callable[[DiT, Autoencoder, GeneratorRun, list[str]], Any] | None = None


def train_generator(run: GeneratorRun, *, resume: bool = False, tools: Tools | None = None) -> Path:
    """Train, and give the run's folder: its `pipeline/` loads with `HieraTokPipeline.from_pretrained`.

    Args:
        run: what to train on what.
        resume: go on from the newest whole checkpoint of `run.output`, if there is one.
        tools: see `Tools`; `hieratok.TOOLS` has all of them.

    Raises:
        ConfigError: values do not fit together, the folder holds another run, or the latents are of another tokenizer.
        DataError: no latents or images, or too many bad ones.
        NonFiniteError: a loss or gradient became NaN or infinite; no checkpoint holds it.
        CheckpointError: no tokenizer, no whole checkpoint, or the disk is full.
    """
    folder, tools = Path(run.output), tools or Tools()
    accelerator = make_accelerator(run.train, run.seed)
    run.train.micro_batch_size(accelerator.num_processes)
    tokenizer, stream = open_latents(run, accelerator.device)
    model, criterion = make_model(run, stream, tokenizer, accelerator.device)
    parameters = sum(p.numel() for p in model.parameters())
    with accelerator.main_process_first():  # the others then find the run that the main process began
        if accelerator.is_main_process:
            facts = {
                **run_facts(run.seed, accelerator),
                "kind": "generator",
                "parameters": parameters,
                "dit": plain_config(model),
                "tokenizer": {"class": tokenizer.name, "path": run.tokenizer, "sha256": tokenizer.state_sha256()},
                "classes": stream.classes,
                "data": {"name": stream.name, "digest": stream.digest, "images_digest": stream.images_digest,
                         "num_train": len(stream), "licence": stream.licence},
            }  # fmt: skip
            start(folder, to_dict(run), facts, resume=resume)
    bad = BadSamples(len(stream), run.data.max_bad_fraction, folder / "bad_images.jsonl")
    engine = make_engine(run.train, folder, accelerator, model, len(stream), bad)
    if resume:
        engine.restore()
    position = Position(
        run.seed, run.train.batch_size, run.train.accumulation, accelerator.process_index, accelerator.num_processes,
        engine.samples_seen,
    )  # fmt: skip
    say(f"{parameters / 1e6:.2f}M parameters, {len(stream):,} latents of {stream.name}, {len(stream.classes)} classes, "
        f"{describe_device(accelerator.device)}; everything goes to {folder}", main=engine.main)  # fmt: skip

    def judge(final: bool) -> None:
        if tools.judge is not None:
            evaluate = tools.judge
            engine.judge(lambda: evaluate(model, tokenizer, run, accelerator), final=final)

    def look() -> None:
        if engine.due(run.train.picture_every):
            paint(engine, tools, tokenizer, run, stream.classes)
        if engine.due(run.eval.every) and not engine.finished:
            judge(final=False)

    with engine:
        engine.run(stream.batches(position), lambda batches: train_step(engine, criterion, batches), look)
        if engine.main:
            save(engine, tools, tokenizer, run, stream.classes)
        accelerator.wait_for_everyone()
        judge(final=True)
    return folder


def train_step(engine: Engine, criterion: DDPMLoss | FlowLoss, batches: Iterator[LatentBatch]) -> None:
    """One step of the optimizer, over one or more micro-batches."""
    model, parts = engine.model.train(), engine.config.accumulation
    assert isinstance(model, DiT)
    channels = int(model.config.in_channels)

    def predict(noisy: Tensor, times: Tensor, labels: Tensor) -> Tensor:
        return engine.forward(noisy, times, labels).sample

    for part in range(parts):
        batch = next(batches)
        # A generator per sample: its noise does not depend on the batch or the process that it falls into.
        generators = [torch.Generator().manual_seed(seed) for seed in batch.seeds]
        stored = batch.latents.to(engine.device, non_blocking=True)
        noise = draw(torch.randn, (channels, *stored.shape[2:]), generators, stored)
        latents = model.normalize_latents(latents_of(stored, channels, noise))
        with engine.synchronising(last=part == parts - 1):
            with engine.autocast():
                loss = criterion(predict, latents, batch.labels.to(engine.device), generators)
            engine.backward(loss.total, loss.terms, batch)
    grad_norm = engine.clip_gradients()
    engine.optimizer_step(grad_norm)


def open_latents(run: GeneratorRun, device: torch.device) -> tuple[Autoencoder, LatentStream]:
    """The tokenizer, frozen on a device, and the latents that the run trains on.

    Raises:
        CheckpointError, ConfigError, DataError: as `train_generator` does.
    """
    tokenizer = load_autoencoder(run.tokenizer, run.image_size)
    tokenizer.model.requires_grad_(False).to(device)
    if run.latents is not None:
        return tokenizer, CachedLatents(Path(run.latents), tokenizer, run.data.num_workers)
    frame = run.data.frame(tokenizer.image_size)
    return tokenizer, EncodedLatents(run.data.open("all"), tokenizer, frame, run.seed, run.data.num_workers)


def make_model(
    run: GeneratorRun, stream: LatentStream, tokenizer: Autoencoder, device: torch.device
) -> tuple[DiT, DDPMLoss | FlowLoss]:
    """The network, with what follows from its latents filled in, and its criterion.

    Raises:
        ConfigError: the recipe's `model` contradicts the latents.
    """
    channels, side, _ = stream.shape
    mean, std = normalization_of(run.normalization, stream, tokenizer)
    follows = {
        "sample_size": side,
        "in_channels": channels,
        "num_classes": max(len(stream.classes), 1),
        "latents_mean": list(mean),
        "latents_std": list(std),
    }
    for name, value in follows.items():
        if run.model.get(name) not in (None, value):
            raise ConfigError(f"model.{name} is {run.model[name]}, but the latents have {value}; leave it out")
    if run.loss.objective == "flow":
        if run.model.get("out_channels") not in (None, channels):
            raise ConfigError(f"model.out_channels must be {channels} for loss.objective=flow, which has no variance")
        follows["out_channels"] = channels
    model = build_dit({**run.model, **follows})
    return model.to(device), make_diffusion_loss(run.loss, model.num_classes).to(device)  # type: ignore[arg-type]


def paint(engine: Engine, tools: Tools, tokenizer: Autoencoder, run: GeneratorRun, classes: list[str]) -> None:
    """A picture of samples by the EMA weights."""
    if not engine.main or tools.paint is None:
        return
    with engine.averaged():
        picture = tools.paint(engine.model, tokenizer, run, classes)  # type: ignore[arg-type]
    path = save_picture(picture, engine.folder / PICTURES / f"step-{engine.step:08d}.png")
    assert engine.log is not None
    engine.log.picture(engine.step, path)


def save(engine: Engine, tools: Tools, tokenizer: Autoencoder, run: GeneratorRun, classes: list[str]) -> None:
    """The EMA weights as `pipeline/`, with all that sampling needs; without a tool for that, alone as `model/`."""
    model, folder = engine.model, engine.folder / (MODEL if tools.export is None else PIPELINE)
    assert isinstance(model, DiT)
    with engine.averaged():
        save_model(model if tools.export is None else tools.export(model, tokenizer, run, classes), folder)
    say(f"model saved in {folder}")
