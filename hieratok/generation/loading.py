"""A pipeline from what a person has: a generator's run, finished or not, or a saved pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..config import load_recipe
from ..engine import checkpoint
from ..engine.log import quiet_diffusers
from ..engine.run_folder import (
    CHECKPOINTS,
    CONFIG,
    PIPELINE,
    from_checkpoint,
    load_autoencoder,
    load_tokenizer,
    read_record,
)
from ..errors import CheckpointError, ConfigError, HieratokError
from ..models.autoencoder import Autoencoder
from ..models.dit import DiT
from ..models.tokenizer import HieraTok
from .pipeline import HieraTokPipeline
from .schedulers import SAVED, make_scheduler

MODEL_INDEX = "model_index.json"


def make_pipeline(model: DiT, tokenizer: Autoencoder, objective: str, classes: Sequence[str]) -> HieraTokPipeline:
    """The pipeline of a generator that was trained on a tokenizer's latents for an objective."""
    scheduler = make_scheduler(SAVED[objective], objective, model.learns_variance)
    with quiet_diffusers():
        pipeline = HieraTokPipeline(model, tokenizer.model, scheduler, dict(enumerate(classes)))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_pipeline(path: str | Path, decoder: str | Path | None = None) -> HieraTokPipeline:
    """The pipeline of a saved folder or of a generator's run; of one that is not finished, with the EMA so far.

    `decoder`: a tokenizer to paint with in place of the pipeline's own, one that `train.freeze=encoder` made of it.

    Raises:
        CheckpointError: there is none, or it is damaged; the message names the file.
        ConfigError: the decoder is of a tokenizer with other latents.
    """
    pipeline = _load_pipeline(Path(path))
    return pipeline if decoder is None else repaint(pipeline, load_tokenizer(decoder), str(decoder))


def repaint(pipeline: HieraTokPipeline, tokenizer: HieraTok, name: str) -> HieraTokPipeline:
    """Let a tokenizer with the same encoder, to the bit, paint a pipeline's latents; `name`: for the message.

    Raises:
        ConfigError: its encoder is another.
    """
    known = pipeline.vae.encoder.state_dict() if isinstance(pipeline.vae, HieraTok) else {}
    theirs = tokenizer.encoder.state_dict()
    if known.keys() != theirs.keys() or not all(torch.equal(known[key].cpu(), theirs[key].cpu()) for key in known):
        raise ConfigError(
            f"{name} has another encoder than the tokenizer that this generator learned from, so it paints other "
            f"latents; give one that was trained with init_from and train.freeze=encoder"
        )
    pipeline.register_modules(vae=tokenizer.to(pipeline.device))  # type: ignore[arg-type]
    return pipeline


def _load_pipeline(path: Path) -> HieraTokPipeline:
    if (path / PIPELINE / MODEL_INDEX).is_file():
        path = path / PIPELINE
    if (path / MODEL_INDEX).is_file():
        try:
            with quiet_diffusers():
                pipeline = HieraTokPipeline.from_pretrained(path)
        except HieratokError:
            raise
        except Exception as error:  # diffusers and safetensors raise kinds of their own
            raise CheckpointError(f"the pipeline in {path} is damaged: {error}") from error
        pipeline.set_progress_bar_config(disable=True)
        return pipeline
    if not (path / CONFIG).is_file():
        raise CheckpointError(f"no generator at {path}: give the folder of a generator's run or of a saved pipeline")
    newest, _ = checkpoint.newest_valid(path / CHECKPOINTS)
    config: dict[str, Any] = load_recipe((path / CONFIG).resolve())
    if newest is None or "tokenizer" not in config:
        raise CheckpointError(f"{path} holds no generator yet: neither a pipeline nor a checkpoint of one")
    tokenizer = load_autoencoder(config["tokenizer"], config.get("image_size"))
    objective = config.get("loss", {}).get("objective", "ddpm")
    return make_pipeline(from_checkpoint(newest, DiT, "generator"), tokenizer, objective, read_record(path)["classes"])
