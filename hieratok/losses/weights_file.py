"""Weights of a network from a file that a person was given: read as tensors, and never run."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..errors import CheckpointError


def load_weights(path: str | Path, network: str) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file, or of PyTorch's `.pth` (which may hold nothing but tensors).

    `network`: its name, for the message.

    Raises:
        CheckpointError: there is no such file, or it holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no weights of {network} at {path}; give a .safetensors or .pth file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each format has its own
        raise CheckpointError(f"{path} is no file of tensors that can be read safely: {error}") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise CheckpointError(f"{path} holds something else than named tensors")
    return tensors
