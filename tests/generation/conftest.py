"""Small generators that have not learned anything, and one that knows its latents without learning them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from hieratok.generation.loading import make_pipeline
from hieratok.generation.pipeline import HieraTokPipeline
from hieratok.models.autoencoder import Autoencoder
from hieratok.models.dit import DiT

CLASSES = ["ant", "bee", "cat", "dog", "eel"]


@pytest.fixture
def make_dit() -> Callable[..., DiT]:
    """A generator for the latents of the tiny model; its weights are drawn, so that class and time matter."""

    def make(objective: str = "ddpm", model_class: type[DiT] = DiT, **changes: Any) -> DiT:
        torch.manual_seed(0)
        fields = {"sample_size": 4, "in_channels": 4, "out_channels": 8 if objective == "ddpm" else 4,
                  "hidden_size": 16, "num_layers": 1, "num_heads": 2, "num_classes": len(CLASSES),
                  "latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.0, 0.5, 2.0, 1.5]}  # fmt: skip
        model = model_class(**{**fields, **changes})
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
        return model.eval()

    return make


@pytest.fixture
def make_pipe(make_dit, tiny_model) -> Callable[..., HieraTokPipeline]:
    """The same as a pipeline with the tiny tokenizer, or another one."""

    def make(objective: str = "ddpm", tokenizer: Any = None, **changes: Any) -> HieraTokPipeline:
        model = make_dit(objective, **changes)
        return make_pipeline(model, Autoencoder(tokenizer or tiny_model), objective, CLASSES[: model.num_classes])

    return make


@pytest.fixture
def generators() -> Callable[..., list[torch.Generator]]:
    """One per image."""
    return lambda *seeds: [torch.Generator().manual_seed(seed) for seed in seeds]
