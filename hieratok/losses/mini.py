"""`mini`: a small convolutional classifier that ships inside the package.

It stands in for VGG16 (in LPIPS) and for Inception (in the Frechet distance) on machines without a network. It was
trained as a 200-class classifier on 64 x 64 photographs by `tools/train_mini.py`; `weights/mini_card.md` holds its
accuracy. Its figures are not comparable with those of VGG16 or Inception, hence the name goes with every one of them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import CheckpointError
from ..files import sha256_of
from .weights_file import load_weights

MINI_WEIGHTS = Path(__file__).parent / "weights" / "mini.safetensors"

CHANNELS = (16, 32, 64, 128, 192)
NUM_CLASSES = 200


class ConvLayer(nn.Module):
    """3 x 3 convolution, batch norm while it is trained (folded into the convolution when shipped)."""

    def __init__(self, in_channels: int, out_channels: int, batch_norm: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=not batch_norm)
        self.norm = nn.BatchNorm2d(out_channels) if batch_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class Stage(nn.Module):
    """Halve the side by average pooling (which does not alias, unlike a strided kernel), widen, one residual block."""

    def __init__(self, in_channels: int, out_channels: int, batch_norm: bool) -> None:
        super().__init__()
        self.widen = ConvLayer(in_channels, out_channels, batch_norm)
        self.first = ConvLayer(out_channels, out_channels, batch_norm)
        self.second = ConvLayer(out_channels, out_channels, batch_norm)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.widen(F.avg_pool2d(x, 2)))
        return F.relu(x + self.second(F.relu(self.first(x))))


class MiniNet(nn.Module):
    """Five feature maps at strides 1, 2, 4, 8, 16 and a classifier over the mean of the last."""

    name = "mini"
    min_side = 16  # four halvings must leave a pixel

    def __init__(self, batch_norm: bool = False) -> None:
        super().__init__()
        self.stem = ConvLayer(3, CHANNELS[0], batch_norm)
        self.stages = nn.ModuleList(
            Stage(before, after, batch_norm) for before, after in zip(CHANNELS, CHANNELS[1:], strict=False)
        )
        self.classifier = nn.Linear(CHANNELS[-1], NUM_CLASSES)
        self.sha256 = ""

    def features(self, images: Tensor) -> list[Tensor]:
        """Maps of `(B, 16, H, W)` to `(B, 192, H/16, W/16)` for images `(B, 3, H, W)` in [-1, 1], H and W >= 16."""
        maps = [F.relu(self.stem(images))]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return maps

    def pooled(self, images: Tensor) -> Tensor:
        """The mean of the last map, `(B, 192)`: the features of the Frechet distance."""
        return self.features(images)[-1].mean(dim=(2, 3))

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.pooled(images))


def load_mini(weights: str | Path | None = None) -> MiniNet:
    """The frozen network in evaluation mode, from the package or from a safetensors file.

    Raises:
        CheckpointError: the file is missing or its tensors are not those of this network.
    """
    path = Path(weights) if weights is not None else MINI_WEIGHTS
    network = MiniNet()
    tensors = {name: tensor.float() for name, tensor in load_weights(path, "mini").items()}
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not hold the mini network: {error}") from error
    network.sha256 = sha256_of(path)
    network.requires_grad_(False)
    return network.eval().to(memory_format=torch.channels_last)
