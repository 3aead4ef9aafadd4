"""Training the tokenizer: both stages of the paper (Eq. 3, 4, 8, 9; Table 8).

A step is `train_step`; what stage 2 adds to it is in `stage2.py`; what surrounds it (clock, guards, checkpoints, logs)
is the engine.
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

from ..config import build, merge, to_dict
from ..data.bad import BadSamples
from ..data.decode import BadImage, to_float, to_uint8
from ..data.frame import Frame
from ..data.latents import measure_latents
from ..data.loader import Batch, endless, train_loader
from ..data.opening import DataConfig
from ..data.source import ImageSource
from ..engine.checkpoint import all_steps
from ..engine.log import METRICS, read_metrics, say
from ..engine.loop import Engine, Judgement, data_facts, describe_device, make_accelerator, make_engine, run_facts
from ..engine.pictures import reconstruction_grid, save_picture
from ..engine.run_folder import CHECKPOINTS, MODEL, RUN, load_tokenizer, read_record, run_config, save_model, start
from ..engine.settings import TrainConfig
from ..errors import CheckpointError, ConfigError
from ..losses import TokenizerLoss, TokenizerLossConfig
from ..losses.perceptual import LpipsNetwork
from ..models.autoencoder import state_sha256
from ..models.presets import build_model, model_fields, plain_config
from ..models.tokenizer import HieraTok
from .stage2 import DISCRIMINATOR, Adversary, Aligner, DiscriminatorConfig

PICTURED = 8  # held-out images drawn during training
INHERITED = ("model", "data", "loss", "discriminator", "eval")  # what a run has from the one that it began from


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
class TokenizerTrainConfig(TrainConfig):
    """`freeze=encoder` trains the decoder alone: the latents stay as they are, to the bit, and with them what a
    generator has learned."""

    freeze: Literal["encoder"] | None = None


@dataclass(frozen=True)
class TokenizerRun:
    """Everything that a run depends on: a recipe with its overrides, resolved.

    `model`: a preset's name and changes to it, or the fields of `HieraTok`. `init_from`: a run or a saved model whose
    (EMA) weights the run begins with, and whose model, data, losses and evaluation it has where it says nothing else.
    `output`: the run's folder.
    """

    model: dict[str, Any]
    init_from: str | None = None
    seed: int = 0
    output: str = "runs/tokenizer"
    data: DataConfig = field(default_factory=DataConfig)
    loss: TokenizerLossConfig = field(default_factory=TokenizerLossConfig)
    train: TokenizerTrainConfig = field(default_factory=TokenizerTrainConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    @staticmethod
    def from_mapping(values: Mapping[str, Any]) -> TokenizerRun:
        """From a recipe's mapping.

        Raises:
            ConfigError: an unknown key, a wrong type, or values that do not fit together.
            CheckpointError: there is no model at `init_from`.
        """
        run = build(TokenizerRun, with_beginning(values))
        if run.train.freeze and run.init_from is None:
            raise ConfigError(
                "train.freeze=encoder keeps what another run has learned; name it: init_from=RUN_OR_MODEL"
            )
        if run.train.freeze and run.loss.alignment.weight:
            raise ConfigError(
                "loss.alignment moves the latents, which train.freeze=encoder keeps; set loss.alignment.weight=0"
            )
        if not 0 <= run.seed < 2**32:
            raise ConfigError(f"seed is {run.seed}; it must lie between 0 and {2**32 - 1}")
        model_fields(run.model)
        return run


def with_beginning(values: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe, with the sections of the run that it begins from where it does not say otherwise."""
    path = values.get("init_from")
    if path is None:
        if values.get("model") is None:
            raise ConfigError("give the tokenizer to begin from, init_from=RUN_OR_MODEL, or a model: model.preset=NAME")
        return dict(values)
    if not isinstance(path, str | Path):
        raise ConfigError(f"'init_from' must be the path of a run or of a saved model, got {path!r}")
    folder = Path(path)
    if folder.name == MODEL:
        folder = folder.parent
    elif folder.parent.name == CHECKPOINTS:
        folder = folder.parent.parent
    known = run_config(folder)
    if known is not None and "tokenizer" in known:
        raise ConfigError(f"{path} is of the run of a generator; give that of a tokenizer")
    if known is None:
        if Path(path).is_dir() or values.get("model") is None:
            known = {"model": architecture(load_tokenizer(path))}
        if "source" not in (values.get("data") or {}):
            raise ConfigError(f"{path} does not say what it was trained on; give the images: data.source=PATH")
    inherited = {key: value for key, value in (known or {}).items() if key in INHERITED}
    return merge(inherited, {key: value for key, value in values.items() if value is not None})


def architecture(model: HieraTok) -> dict[str, Any]:
    """The fields of a model, without what was measured of its latents."""
    measured = ("latents_mean", "latents_std", "scaling_factor", "shift_factor")
    return {key: value for key, value in plain_config(model).items() if key not in measured}


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
    before = begin_from(run, model, folder if resume else None)
    record = beginning(run, before, folder, resume)
    if resume and record is not None and before is not None and record["sha256"] != state_sha256(before):
        say(f"{run.init_from} has changed since this run began from it; pictures will not show it")
        before = None
    train_images, val_images = run.data.open_both()
    bad = BadSamples(len(train_images), run.data.max_bad_fraction, folder / "bad_images.jsonl")
    engine = make_engine(run.train, folder, accelerator, model, len(train_images), bad)
    terms = make_terms(run, model, engine)  # it too raises before anything is written
    networks = terms.describe()
    with accelerator.main_process_first():  # the others then find the run that the main process began
        if accelerator.is_main_process:
            facts: dict[str, Any] = {"data": {**data_facts(train_images), "num_val": len(val_images)}}
            facts |= {} if record is None else {"init_from": record}
            facts |= {"terms": networks} if networks else {}
            start(folder, to_dict(run), {**run_facts(run.seed, accelerator), **facts}, resume=resume)
    for name, network in networks.items():
        say(f"{name} term: {network}", main=engine.main)
    if resume:
        engine.restore()
        if terms.adversary is not None:
            terms.adversary.watch.recall(read_metrics(folder / METRICS))
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
    painted_before = None
    if before is not None and engine.main and len(pictured):
        painted_before = reconstruct(before.to(engine.device), pictured, engine)[-1]  # type: ignore[arg-type]
    del before  # a second tokenizer in memory for the whole run would be dear

    def look() -> None:
        if engine.due(run.train.picture_every):
            draw(engine, pictured, painted_before)
        if evaluator is not None and engine.due(run.eval.every) and not engine.finished:
            engine.judge(lambda: evaluator(model, val_images, run, accelerator))

    with engine:
        engine.run(endless(loader), lambda batches: train_step(engine, criterion, terms, batches), look)
        if terms.adversary is not None and engine.step <= run.loss.adversarial.start_step:
            engine.warn(f"the run ended before its tokenizer met the discriminator, at step "
                        f"{run.loss.adversarial.start_step}; give it more time, or a lower "
                        f"loss.adversarial.start_step")  # fmt: skip
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
    if run.train.freeze:
        model.encoder.requires_grad_(False)
    criterion = TokenizerLoss(run.loss, model.config.scales, model.config.image_size)
    return model.to(device), criterion.to(device)  # type: ignore[arg-type]


def begin_from(run: TokenizerRun, model: HieraTok, resumed: Path | None) -> HieraTok | None:
    """Give a model the weights of `run.init_from`; the tokenizer that is there, for comparison.

    A run that is `resumed` has its own weights: it goes on although the one that it began from is gone.

    Raises:
        CheckpointError: there is no model, or it is damaged.
        ConfigError: its weights are of another shape.
    """
    if run.init_from is None:
        return None
    goes_on = resumed is not None and bool(all_steps(resumed / CHECKPOINTS))
    try:
        known = load_tokenizer(run.init_from)
    except CheckpointError:
        if not goes_on:
            raise
        say(f"{run.init_from}, which this run began from, is gone; pictures will not show it")
        return None
    if goes_on:
        return known.requires_grad_(False)
    theirs, ours = known.state_dict(), model.state_dict()
    other = [name for name in sorted({*theirs, *ours})
             if name not in theirs or name not in ours or theirs[name].shape != ours[name].shape]  # fmt: skip
    if other:
        before, now = architecture(known), architecture(model)
        fields = [f"model.{key}: {before[key]!r} there, {now[key]!r} here" for key in now if before[key] != now[key]]
        raise ConfigError(
            f"the weights in {run.init_from} are of another model ({', '.join(other[:3])}):\n  "
            + "\n  ".join(fields) + "\nLeave `model` out of the recipe to take over its own"
        )  # fmt: skip
    model.load_state_dict(theirs)
    return known.requires_grad_(False)


def beginning(run: TokenizerRun, before: HieraTok | None, folder: Path, resume: bool) -> dict[str, Any] | None:
    """What the record of a run says of the weights that it began with; one that goes on has said it."""
    if resume and (folder / RUN).is_file():
        return read_record(folder).get("init_from")
    if before is None:
        return None
    say(f"beginning with the averaged weights of {run.init_from}")
    return {"path": str(run.init_from), "sha256": state_sha256(before)}


@dataclass(frozen=True)
class Terms:
    """What stage 2 adds to the loss; None of what the run leaves out."""

    adversary: Adversary | None = None
    aligner: Aligner | None = None

    def describe(self) -> dict[str, str]:
        """The networks behind the terms, in words; a stand-in's name is part of them."""
        named = {"adversarial": self.adversary, "alignment": self.aligner}
        return {name: term.name for name, term in named.items() if term is not None}


def make_terms(run: TokenizerRun, model: HieraTok, engine: Engine) -> Terms:
    """The networks of stage 2, which learn within the engine.

    Raises:
        ConfigError, CheckpointError, MissingDependencyError: a network that cannot be had, or settings that clash.
    """
    adversarial, alignment = run.loss.adversarial, run.loss.alignment
    return Terms(
        Adversary(adversarial, run.discriminator, model, engine, run.seed) if adversarial.weight else None,
        Aligner(alignment, model, engine) if alignment.weight else None,
    )


def train_step(engine: Engine, criterion: TokenizerLoss, terms: Terms, batches: Iterator[Batch]) -> None:
    """One step of the optimizers, over one or more micro-batches."""
    model, parts = engine.model.train(), engine.config.accumulation
    assert isinstance(model, HieraTok)
    model.encoder.train(model.encoder.moments.weight.requires_grad)  # one that is frozen drops no path
    adversary, aligner = terms.adversary, terms.aligner
    for part in range(parts):
        batch = next(batches)
        images = to_float(batch.images.to(engine.device, non_blocking=True))  # (B, 3, H, W) in [-1, 1]
        # A generator per sample: its noise does not depend on the batch or the process that it falls into.
        generators = [torch.Generator().manual_seed(seed) for seed in batch.seeds]
        with engine.synchronising(last=part == parts - 1):
            with engine.autocast():
                output = engine.forward(images, generator=generators)
                loss = criterion(output, images)
            total, named = loss.total, loss.terms
            if aligner is not None:
                aligned, found = aligner.term(loss.reconstruction, output, images)
                total, named = total + aligned, named | found
            if adversary is not None:
                if adversary.config.update == "alternate":
                    adversary.learn(images, output, batch)
                    engine.change_weights(engine.clip_gradients(DISCRIMINATOR))
                judged, found = adversary.term(loss.reconstruction, output, batch)
                total, named = total + judged, named | found
            engine.backward(total, named, batch)
            if adversary is not None and adversary.config.update == "simultaneous":
                adversary.learn(images, output, batch)
    engine.optimizer_step(engine.clip_gradients())


def pick_images(source: ImageSource, frame: Frame, count: int) -> Tensor:
    """uint8 `(N, 3, S, S)`: up to `count` images spread over a source; bad ones are left out."""
    images = []
    for index in np.linspace(0, len(source) - 1, min(count, len(source))).round().astype(int):
        with contextlib.suppress(BadImage):
            images.append(torch.from_numpy(source.pixels(int(index), frame, None)).permute(2, 0, 1))
    return torch.stack(images) if images else torch.empty(0, 3, frame.image_size, frame.image_size, dtype=torch.uint8)


@torch.no_grad()
def reconstruct(model: HieraTok, images: Tensor, engine: Engine) -> list[Tensor]:
    """uint8 reconstructions of uint8 images `(B, 3, S, S)` at every scale, coarse to fine, in evaluation mode."""
    model.eval()
    with engine.autocast():
        output = model(to_float(images.to(engine.device)), sample_posterior=False)
    return [to_uint8(scale) for scale in output.scales]


def draw(engine: Engine, images: Tensor, before: Tensor | None) -> None:
    """A picture of held-out images and their reconstructions at every scale, by the EMA weights.

    `before`: reconstructions by the tokenizer that the run began from, which stand beside them.
    """
    if not engine.main or len(images) == 0:
        return
    model = engine.model
    assert isinstance(model, HieraTok)
    with engine.averaged():
        scales = reconstruct(model, images, engine)
    grid = reconstruction_grid(images, scales, model.layout.sides, before)
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
