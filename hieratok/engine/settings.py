"""The `train` and `sampling` sections of a recipe."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from ..errors import ConfigError

Precision = Literal["fp32", "bf16", "fp16"]
Optimizer = Literal["adamw", "muon"]
LabelOrder = Literal["random", "balanced", "data"]


@dataclass(frozen=True)
class OptimizerConfig:
    """How fast a network learns: a warm-up and a cosine over its part of the run. The defaults are Table 8, stage 1."""

    learning_rate: float = 4e-4
    final_learning_rate: float = 4e-6
    warmup_ratio: float = 0.03
    betas: tuple[float, ...] = (0.9, 0.95)
    weight_decay: float = 0.05
    max_grad_norm: float = 1.0  # 0 does not clip

    def check(self, section: str) -> None:
        """Raises:
        ConfigError: a value out of its range; the message names the field in its section.
        """
        if not 0 < self.learning_rate < math.inf:
            raise ConfigError(f"{section}.learning_rate is {self.learning_rate}; it must be above 0 and finite")
        for name in ("final_learning_rate", "weight_decay", "max_grad_norm"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ConfigError(f"{section}.{name} is {value}; it must be 0 or above, and finite")
        if not 0 <= self.warmup_ratio < 1:
            raise ConfigError(f"{section}.warmup_ratio is {self.warmup_ratio}; it must lie in [0, 1)")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"{section}.betas is {list(self.betas)}; AdamW takes two numbers in [0, 1)")


@dataclass(frozen=True)
class TrainConfig(OptimizerConfig):
    """How long, how fast and how often. The defaults are Table 8 of the paper, stage 1.

    The run ends after `epochs` or `steps` (give one), or after `max_minutes` if that comes first; the learning rate
    then follows whichever is nearer to its end.
    """

    epochs: float | None = 100
    steps: int | None = None
    max_minutes: float | None = None
    batch_size: int = 256  # of all processes together
    accumulation: int = 1  # micro-batches per step
    optimizer: Optimizer = "adamw"  # muon, for the matrices of the blocks, learns more from few steps
    ema_decay: float = 0.9999  # 0 keeps no average
    precision: Precision = "bf16"
    gradient_checkpointing: bool = False
    compile: bool = False
    log_every: int = 50
    picture_every: int = 5000  # 0 draws none
    checkpoint_every: int = 5000
    keep_checkpoints: int = 2
    tensorboard: bool = True

    def __post_init__(self) -> None:
        self.check("train")
        for name in ("epochs", "steps", "max_minutes", "batch_size", "accumulation", "log_every", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"train.{name} is {value}; it must be above 0 and finite")
        if self.picture_every < 0:
            raise ConfigError(f"train.picture_every is {self.picture_every}; it must be 0 (none) or above")
        if (self.epochs is None) == (self.steps is None):
            raise ConfigError("give one of train.epochs and train.steps, and set the other to null")
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"train.ema_decay is {self.ema_decay}; it must lie in [0, 1)")
        if self.keep_checkpoints < 2:
            raise ConfigError("train.keep_checkpoints must be at least 2: a write can fail while the last one is used")

    def total_steps(self, num_images: int) -> int:
        """Optimizer steps of the whole run on `num_images` training images."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return max(1, math.ceil(self.epochs * num_images / self.batch_size))

    def micro_batch_size(self, world_size: int) -> int:
        """Samples that one process sees at a time.

        Raises:
            ConfigError: the batch does not divide.
        """
        parts = self.accumulation * world_size
        if self.batch_size % parts:
            raise ConfigError(
                f"train.batch_size {self.batch_size} is not divisible by train.accumulation {self.accumulation} "
                f"x {world_size} processes"
            )
        return self.batch_size // parts


@dataclass(frozen=True)
class SamplingConfig:
    """How a generator draws images.

    `scheduler` and `num_inference_steps`: None is the objective's own (250 steps of DDPM, 50 of flow-matching Euler).
    `guidance_scale`: 1 is none, as figures are usually given; `picture_guidance_scale`: that of pictures, which the
    paper draws with 4.2. `guidance_interval`: the times, 0 (clean) to 1 (noise), between which guidance acts.
    """

    scheduler: str | None = None
    num_inference_steps: int | None = None
    guidance_scale: float = 1.0
    picture_guidance_scale: float = 4.2
    guidance_interval: tuple[float, ...] = (0.0, 1.0)
    precision: Literal["fp32", "bf16"] = "bf16"  # of the networks; latents and steps are fp32
    batch_size: int = 64

    def for_pictures(self) -> SamplingConfig:
        """The same, guided as pictures are."""
        return replace(self, guidance_scale=self.picture_guidance_scale)

    def __post_init__(self) -> None:
        for name in ("num_inference_steps", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"sampling.{name} is {value}; it must be above 0")
        for name in ("guidance_scale", "picture_guidance_scale"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ConfigError(f"sampling.{name} is {value}; it must be 0 or above, and finite")
        interval = self.guidance_interval
        if len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1:
            raise ConfigError(f"sampling.guidance_interval is {list(interval)}; give two ascending times in [0, 1]")
