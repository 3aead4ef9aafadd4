"""An exponential moving average of the weights: what is evaluated and exported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """Averaged copies of a model's parameters.

    The decay rises as (1 + step) / (10 + step) to its value, so that the average of a short run is not its beginning.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.tensors: dict[str, Tensor] = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move towards the weights after optimizer step `step` (the first is 1)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        parameters = [p.detach() for _, p in model.named_parameters()]
        torch._foreach_lerp_(list(self.tensors.values()), parameters, 1 - decay)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The model holds the average inside the block, and its own weights after it, whatever happens."""
        parameters = dict(model.named_parameters())
        own = {name: p.detach().clone() for name, p in parameters.items()}
        try:
            _copy(self.tensors, parameters)
            yield
        finally:
            _copy(own, parameters)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over a saved average."""
        _copy(tensors, self.tensors)


@torch.no_grad()
def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    for name, tensor in target.items():
        tensor.copy_(source[name])
