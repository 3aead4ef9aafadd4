"""A network that learns within a run: its optimizers, its schedule, and the average of the one that is kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from . import checkpoint
from .ema import EMA
from .schedule import warmup_cosine

MAIN = "model"  # the network that the run is about; any other only helps to train it


class Schedule(Protocol):
    """The settings of a network's optimizer: those of the `train` section, or of a section of its own."""

    @property
    def learning_rate(self) -> float: ...

    @property
    def final_learning_rate(self) -> float: ...

    @property
    def warmup_ratio(self) -> float: ...

    @property
    def max_grad_norm(self) -> float: ...


class Learner:
    """One of the networks of a run.

    Attributes:
        network: the bare network; `forward` is the one to call where it learns, which synchronises processes.
        began: steps and seconds of the run before its own first step; its schedule spans the rest.
        overflows: steps in a row in which fp16's loss scale was too large for it.
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        optimizers: list[torch.optim.Optimizer],
        schedule: Schedule,
        accelerator: Accelerator,
        ema_decay: float = 0.0,
    ) -> None:
        self.name, self.network, self.optimizers, self.schedule = name, network, optimizers, schedule
        self.names: dict[Tensor, str] = {p: name for name, p in network.named_parameters()}
        self.forward = accelerator.prepare_model(network)
        self.ema = EMA(network, ema_decay) if ema_decay else None
        self.began: tuple[int, float] | None = (0, 0.0) if name == MAIN else None
        self.overflows = 0

    @property
    def has_gradients(self) -> bool:
        """Whether a step would change it."""
        return any(p.grad is not None for p in self.network.parameters())

    def set_rate(self, progress: float, began: float) -> None:
        """The learning rate at a part of the run in [0, 1], of a network that began at such a part."""
        rate = warmup_cosine(
            (progress - began) / max(1 - began, 1e-9),
            self.schedule.learning_rate, self.schedule.final_learning_rate, self.schedule.warmup_ratio,
        )  # fmt: skip
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate

    @property
    def rate(self) -> float:
        return float(self.optimizers[0].param_groups[0]["lr"])

    # What a checkpoint keeps

    @property
    def _prefix(self) -> str:
        """Of its files in a checkpoint, beside that of its weights."""
        return "" if self.name == MAIN else f"{self.name}-"

    def tensors(self) -> dict[str, Mapping[str, Tensor]]:
        """By file of the checkpoint."""
        kept: dict[str, Mapping[str, Tensor]] = {
            self.name: self.network.state_dict(),
            f"{self._prefix}optimizer": checkpoint.optimizer_tensors(self.optimizers, self.names),
        }
        if self.ema is not None:
            kept[f"{self._prefix}ema"] = self.ema.tensors
        return kept

    def restore(self, tensors: checkpoint.Tensors, state: Mapping[str, Any], device: torch.device) -> None:
        """Put back what `tensors` gave, and `began`.

        Raises:
            KeyError, RuntimeError, CheckpointError: the checkpoint is of other networks.
        """
        self.network.load_state_dict(tensors[self.name])
        if self.ema is not None:
            self.ema.load({k: v.to(device) for k, v in tensors[f"{self._prefix}ema"].items()})
        checkpoint.restore_optimizers(self.optimizers, self.names, tensors[f"{self._prefix}optimizer"])
        began = state["began"][self.name]
        self.began = None if began is None else (int(began[0]), float(began[1]))
