"""Training the tokenizer: stage 1 of the paper (Eq. 3, 4, 8, 9; Table 8).

A step is `train_step`; what surrounds it (clock, guards, checkpoints, logs) is the engine.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from ..config import build, to_dict
from ..data.bad import BadSamples
from ..data.decode import BadImage, to_float, to_uint8
from ..data.frame import Frame
from ..data.latents import measure_latents
from ..data.loader import Batch, endless, train_loader
from ..data.opening import DataConfig
from ..data.source import ImageSource
from ..engine.log import say
from ..engine.loop import Engine, Judgement, data_facts, describe_device, make_accelerator, make_engine, run_facts
from ..engine.pictures import reconstruction_grid, save_picture
from ..engine.run_folder import MODEL, save_model, start
from ..engine.settings import TrainConfig
from ..errors import ConfigError
from ..losses import TokenizerLoss, TokenizerLossConfig
from ..losses.perceptual import LpipsNetwork
from ..models.presets import build_model, model_fields
from ..models.tokenizer import HieraTok

PICTURED = 8  # held-out images drawn during training


@dataclass(frozen=True)
class EvalConfig:
    """How the held-out images are judged, every so many steps (0: at the end only)."""

    every: int = 0
    num_images: int | None = 5000
    features: Literal["mini", "inception"] = "mini"
    feature_weights: str | None = None  # local file; None: the shipped mini, or the published Inception
    lpips: LpipsNetwork | None = None  # mini or vgg16; None: the network of the loss
    lpips_weights: str | None = None
    batch_size: int = 64

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ConfigError(f"eval.every is {self.every}; it must be 0 (at the end only) or more")
        for name, value in {"num_images": self.num_images, "batch_size": self.batch_size}.items():
            if value is not None and value < 1:
                raise ConfigError(f"eval.{name} is {value}; it must be above 0")


@dataclass(frozen=True)
class TokenizerRun:
    """Everything that a run depends on: a recipe with its overrides, resolved.

    `model`: a preset's name and changes to it, or the fields of `HieraTok`. `output`: the run's folder.
    """

    model: dict[str, Any]
    seed: int = 0
    output: str = "runs/tokenizer"
    data: DataConfig = field(default_factory=DataConfig)
    loss: TokenizerLossConfig = field(default_factory=TokenizerLossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    @staticmethod
    def from_mapping(values: Mapping[str, Any]) -> TokenizerRun:
        """From a recipe's mapping.

        Raises:
            ConfigError: an unknown key, a wrong type, or values that do not fit together.
        """
        run = build(TokenizerRun, values)
        if not 0 <= run.seed < 2**32:
            raise ConfigError(f"seed is {run.seed}; it must lie between 0 and {2**32 - 1}")
        model_fields(run.model)
        return run


# Judges a model on held-out images; given by the caller, so that training does not depend on evaluation.
Evaluator = Callable[[HieraTok, ImageSource, TokenizerRun, Accelerator], Judgement]


def train_tokenizer(run: TokenizerRun, *, resume: bool = False, evaluator: Evaluator | None = None) -> Path:
    """Train, and give the run's folder: its `model/` loads with `HieraTok.from_pretrained`.

    Args:
        run: what to train on what.
        resume: go on from the newest whole checkpoint of `run.output`, if there is one.
        evaluator: judges the EMA weights on the validation images, at intervals and at the end (`eval.json`).

    Raises:
        ConfigError: values do not fit together, or the folder holds another run.
        DataError: no images, or too many bad ones.
        NonFiniteError: a loss or gradient became NaN or infinite; no checkpoint holds it.
        CheckpointError: no checkpoint is whole, or the disk is full.
    """
    folder = Path(run.output)
    accelerator = make_accelerator(run.train, run.seed)
    run.train.micro_batch_size(accelerator.num_processes)
    model, criterion = make_model(run, accelerator.device)  # raises before anything is written
    train_images, val_images = run.data.open_both()
    with accelerator.main_process_first():  # the others then find the run that the main process began
        if accelerator.is_main_process:
            facts = {"data": {**data_facts(train_images), "num_val": len(val_images)}}
            start(folder, to_dict(run), {**run_facts(run.seed, accelerator), **facts}, resume=resume)
    bad = BadSamples(len(train_images), run.data.max_bad_fraction, folder / "bad_images.jsonl")
    engine = make_engine(run.train, folder, accelerator, model, len(train_images), bad)
    if resume:
        engine.restore()
    frame = run.data.frame(model.config.image_size)
    loader = train_loader(
        train_images, frame, seed=run.seed, batch_size=run.train.batch_size, accumulation=run.train.accumulation,
        rank=accelerator.process_index, world_size=accelerator.num_processes, start=engine.samples_seen,
        num_workers=run.data.num_workers,
    )  # fmt: skip
    parameters = sum(p.numel() for p in model.parameters())
    say(f"{parameters / 1e6:.2f}M parameters, {len(train_images):,} training and {len(val_images):,} validation images "
        f"of {train_images.name}, {describe_device(accelerator.device)}; everything goes to {folder}",
        main=engine.main)  # fmt: skip
    pictured = pick_images(val_images, frame, PICTURED)

    def look() -> None:
        if engine.due(run.train.picture_every):
            draw(engine, pictured)
        if evaluator is not None and engine.due(run.eval.every) and not engine.finished:
            engine.judge(lambda: evaluator(model, val_images, run, accelerator))

    with engine:
        engine.run(endless(loader), lambda batches: train_step(engine, criterion, batches), look)
        finish(engine, run, train_images, frame)
        if evaluator is not None:
            engine.judge(lambda: evaluator(model, val_images, run, accelerator), final=True)
    return folder


def make_model(run: TokenizerRun, device: torch.device) -> tuple[HieraTok, TokenizerLoss]:
    """The network and its criterion.

    Raises:
        ConfigError: values do not fit together.
    """
    model = build_model(run.model)
    criterion = TokenizerLoss(run.loss, model.config.scales, model.config.image_size)
    return model.to(device), criterion.to(device)  # type: ignore[arg-type]


def train_step(engine: Engine, criterion: TokenizerLoss, batches: Iterator[Batch]) -> None:
    """One step of the optimizer, over one or more micro-batches."""
    engine.model.train()
    parts = engine.config.accumulation
    for part in range(parts):
        batch = next(batches)
        images = to_float(batch.images.to(engine.device, non_blocking=True))  # (B, 3, H, W) in [-1, 1]
        # A generator per sample: its noise does not depend on the batch or the process that it falls into.
        generators = [torch.Generator().manual_seed(seed) for seed in batch.seeds]
        with engine.synchronising(last=part == parts - 1):
            with engine.autocast():
                output = engine.forward(images, generator=generators)
                loss = criterion(output, images)
            engine.backward(loss.total, loss.terms, batch)
    grad_norm = engine.clip_gradients()
    engine.optimizer_step(grad_norm)


def pick_images(source: ImageSource, frame: Frame, count: int) -> Tensor:
    """uint8 `(N, 3, S, S)`: up to `count` images spread over a source; bad ones are left out."""
    images = []
    for index in np.linspace(0, len(source) - 1, min(count, len(source))).round().astype(int):
        with contextlib.suppress(BadImage):
            images.append(torch.from_numpy(source.pixels(int(index), frame, None)).permute(2, 0, 1))
    return torch.stack(images) if images else torch.empty(0, 3, frame.image_size, frame.image_size, dtype=torch.uint8)


def draw(engine: Engine, images: Tensor) -> None:
    """A picture of held-out images and their reconstructions at every scale, by the EMA weights."""
    if not engine.main or len(images) == 0:
        return
    engine.model.eval()
    with engine.averaged(), torch.no_grad(), engine.autocast():
        output = engine.model(to_float(images.to(engine.device)), sample_posterior=False)
    scales = [to_uint8(scale) for scale in output.scales]
    grid = reconstruction_grid(images, scales, engine.model.config.scales)  # type: ignore[union-attr,arg-type]
    path = save_picture(grid, engine.folder / "pictures" / f"step-{engine.step:08d}.png")
    assert engine.log is not None
    engine.log.picture(engine.step, path)


def finish(engine: Engine, run: TokenizerRun, images: ImageSource, frame: Frame) -> None:
    """Measure the latents on training images and save the EMA weights with these statistics in `model/`."""
    if engine.main:
        model = engine.model
        assert isinstance(model, HieraTok)
        with engine.averaged():
            model.eval()
            found = measure_latents(model, images, frame, run.seed, run.eval.batch_size)
            model.register_to_config(
                latents_mean=found["mean"], latents_std=found["std"], scaling_factor=found["scaling_factor"]
            )
            save_model(model, engine.folder / MODEL)
        say(f"model saved in {engine.folder / MODEL}")
    engine.accelerator.wait_for_everyone()
