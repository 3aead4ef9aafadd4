"""Training the tokenizer: stage 1 of the paper (Eq. 3, 4, 8, 9; Table 8).

A step is `train_step`; what surrounds it (clock, guards, checkpoints, logs) is the engine.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..config import build, to_dict
from ..data.bad import BadSamples
from ..data.decode import BadImage, to_float, to_uint8
from ..data.frame import Frame
from ..data.loader import Batch, eval_loader, train_loader
from ..data.opening import DataConfig
from ..data.source import ImageSource, spread
from ..engine.log import say
from ..engine.loop import Engine, make_accelerator
from ..engine.pictures import reconstruction_grid, save_picture
from ..engine.run_folder import MODEL, start
from ..engine.settings import TrainConfig
from ..errors import ConfigError, DataError
from ..files import sync, write_atomically
from ..losses import TokenizerLoss, TokenizerLossConfig
from ..losses.perceptual import LpipsNetwork
from ..models.presets import build_model, model_fields, plain_config
from ..models.tokenizer import HieraTok

PICTURED = 8  # held-out images drawn during training
MEASURED = 2000  # training images on which the latents' statistics are measured


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


class Judgement(Protocol):
    """What an evaluator finds."""

    @property
    def metrics(self) -> dict[str, float]: ...

    def to_dict(self) -> dict[str, Any]: ...


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
            start(folder, to_dict(run), run_facts(run, accelerator, train_images, val_images), resume=resume)
    bad = BadSamples(len(train_images), run.data.max_bad_fraction, folder / "bad_images.jsonl")
    engine = make_engine(run, folder, accelerator, model, len(train_images), bad)
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
            judge(engine, evaluator, val_images, run)

    with engine:
        if engine.step and not engine.finished:  # what was due at this step may have been cut off
            look()
        with engine.signals, contextlib.closing(endless(loader)) as batches:
            while not engine.finished:
                train_step(engine, criterion, batches)
                engine.end_step()
                look()
        finish(engine, run, train_images, frame)
        if evaluator is not None:
            judge(engine, evaluator, val_images, run, final=True)
    return folder


def make_model(run: TokenizerRun, device: torch.device) -> tuple[HieraTok, TokenizerLoss]:
    """The network and its criterion.

    Raises:
        ConfigError: values do not fit together.
    """
    model = build_model(run.model)
    criterion = TokenizerLoss(run.loss, model.config.scales, model.config.image_size)
    return model.to(device), criterion.to(device)  # type: ignore[arg-type]


def make_engine(
    run: TokenizerRun, folder: Path, accelerator: Accelerator, model: HieraTok, num_images: int, bad: BadSamples
) -> Engine:
    """The engine of a run on `num_images` training images, at step 0."""
    engine = Engine(
        run.train, folder, accelerator, model, make_optimizers(model, run.train),
        total_steps=run.train.total_steps(num_images), model_config=plain_config(model), bad=bad,
    )  # fmt: skip
    if run.train.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if run.train.compile:
        model.compile_repeated_blocks()
    return engine


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


def make_optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW (Table 8); vectors and embeddings do not decay, as in DeiT and MAE.

    `optimizer=muon` gives the matrices inside the transformers' blocks to Muon, with its steps scaled to the size of
    AdamW's, so that one learning rate serves both (Jordan et al. 2024; Liu et al. 2025, arXiv 2502.16982).
    """
    blocks: list[nn.Parameter] = []
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if config.optimizer == "muon" and ".blocks." in name and parameter.ndim == 2:
            blocks.append(parameter)
        elif parameter.ndim >= 2 and not name.endswith(("position", "scale_embedding")):
            matrices.append(parameter)
        else:
            vectors.append(parameter)
    rate, decay = config.learning_rate, config.weight_decay
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    betas = (config.betas[0], config.betas[1])
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=rate, betas=betas, fused=True)]
    if blocks:
        muon = torch.optim.Muon(blocks, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        optimizers.append(muon)
    return optimizers


def endless(loader: Any) -> Generator[Batch, None, None]:
    """The loader's batches; closing it ends its workers.

    Raises:
        DataError: a batch without a single usable image.
    """
    iterator = iter(loader)
    try:
        for batch in iterator:
            if not batch.keys:
                last = batch.bad[-1]
                raise DataError(f"not one image of a whole batch could be used, nor any other in its place; the last "
                                f"one is {last.key}: {last.reason}")  # fmt: skip
            yield batch
    finally:
        shutdown = getattr(iterator, "_shutdown_workers", None)
        if shutdown is not None:
            shutdown()


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


def judge(engine: Engine, evaluator: Evaluator, images: ImageSource, run: TokenizerRun, *, final: bool = False) -> None:
    """Evaluate the EMA weights; log the metrics, and at the end keep them in `eval.json`."""
    with engine.averaged():
        found = evaluator(engine.model, images, run, engine.accelerator)  # type: ignore[arg-type]
    if engine.main and final:
        write_atomically(engine.folder / "eval.json", json.dumps(found.to_dict(), indent=1).encode())
    if engine.main and engine.log is not None:
        engine.log.metrics("eval", engine.step, {**found.metrics, "samples_seen": engine.samples_seen,
                                                 "elapsed": round(engine.elapsed, 3)})  # fmt: skip


def finish(engine: Engine, run: TokenizerRun, images: ImageSource, frame: Frame) -> None:
    """Measure the latents on training images and save the EMA weights with these statistics in `model/`."""
    if engine.main:
        model = engine.model
        assert isinstance(model, HieraTok)
        with engine.averaged():
            mean, std, overall = measure_latents(model, images, frame, run)
            model.register_to_config(latents_mean=mean, latents_std=std, scaling_factor=1 / overall)
            save_model(model, engine.folder / MODEL)
        say(f"model saved in {engine.folder / MODEL}")
    engine.accelerator.wait_for_everyone()


def save_model(model: HieraTok, path: Path) -> None:
    """`save_pretrained` under another name, then renamed: whoever reads `path` meets a whole model or none."""
    unfinished = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    for file in unfinished.iterdir():
        sync(file)
    shutil.rmtree(path, ignore_errors=True)  # checkpoints hold the model until the next line
    unfinished.rename(path)
    sync(path.parent)


@torch.no_grad()
def measure_latents(
    model: HieraTok, images: ImageSource, frame: Frame, run: TokenizerRun
) -> tuple[list[float], list[float], float]:
    """Mean and standard deviation per channel of posterior samples, and the deviation over all channels.

    They are what a generator's latents are normalised by (docs/paper.md).
    """
    model.eval()
    latents = []
    for batch in eval_loader(
        spread(images, MEASURED),
        frame.image_size,
        run.eval.batch_size,
        frame=frame,
        seed=run.seed,
        max_bad_fraction=1.0,
    ):
        posterior = model.encode(to_float(batch.images.to(model.device))).latent_dist
        generators = [torch.Generator().manual_seed(seed) for seed in batch.seeds]
        latents.append(posterior.sample(generators).cpu().double())
    values = torch.cat(latents)
    mean, std = values.mean(dim=(0, 2, 3)), values.std(dim=(0, 2, 3))
    return mean.tolist(), std.tolist(), float(values.std())


def run_facts(
    run: TokenizerRun, accelerator: Accelerator, train_images: ImageSource, val_images: ImageSource
) -> dict[str, Any]:
    """What `run.json` says beside the configuration."""
    return {
        "seed": run.seed,
        "world_size": accelerator.num_processes,
        "device": describe_device(accelerator.device),
        "data": {
            "name": train_images.name,
            "digest": train_images.digest,
            "num_train": len(train_images),
            "num_val": len(val_images),
            "licence": train_images.licence,
        },
    }


def describe_device(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"CPU with {threads} thread{'s' if threads > 1 else ''}"
    return device.type
