"""The VF loss: latents, linearly projected, are drawn to the features of a frozen foundation model.

Two terms over the positions of the latent's grid. The marginal cosine pulls the projected latent of a position towards
the feature of that position; the marginal distance matrix pulls the similarities between the positions of an image
towards those of the features. A margin leaves alone what is already near.

Source: Yao et al. 2025 (VA-VAE, arXiv 2501.01423), with the published code's choice of the projected latent
for both terms. The adaptive weight is `adaptive_weight` in `adversarial.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError
from .foundation import Foundation, Normalize, load_foundation

MAX_MARGIN = 2.0  # 1 - cos and a difference of two cosines both lie in [0, 2]
SHORTEST = 1e-6  # of a vector that is scaled to unit length: below it the gradient would grow without bound


@dataclass(frozen=True)
class AlignmentConfig:
    """The section `loss.alignment`. Defaults are those of VA-VAE's 50-epoch recipe, but for `weight`, which is off."""

    weight: float = 0.0  # of the whole term; 0 leaves it out and costs nothing; VA-VAE's is 0.1
    foundation: str = "mini"  # mini, timm:NAME, or a folder in timm's format; VA-VAE's is DINOv2 ViT-L/14
    foundation_weights: str | None = None  # local file; None: the shipped mini, or the hub's
    normalize: Normalize = "half"  # half: images in [-1, 1] as VA-VAE feeds them; network: its own mean and deviation
    cos_weight: float = 1.0  # of the marginal cosine
    distance_weight: float = 1.0  # of the marginal distance matrix
    cos_margin: float = 0.5  # a cosine above 1 - cos_margin costs nothing
    distance_margin: float = 0.25  # a difference of similarities below it costs nothing
    adaptive: bool = True  # weigh by the ratio of gradients at the encoder's last layer; False: `weight` alone
    adaptive_max: float = 1e8  # the ratio's upper bound

    def __post_init__(self) -> None:
        for name in ("weight", "cos_weight", "distance_weight"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ConfigError(f"loss.alignment.{name} is {value}; it must be finite and at least 0")
        for name in ("cos_margin", "distance_margin"):
            value = getattr(self, name)
            if not 0 <= value <= MAX_MARGIN:
                raise ConfigError(f"loss.alignment.{name} is {value}; it must lie in [0, {MAX_MARGIN:g}]")
        if not 0 < self.adaptive_max < math.inf:
            raise ConfigError(f"loss.alignment.adaptive_max is {self.adaptive_max}; it must be finite and above 0")
        if self.normalize not in ("half", "network"):
            raise ConfigError(f"loss.alignment.normalize is '{self.normalize}'; it must be half or network")
        if not self.foundation:
            raise ConfigError("loss.alignment.foundation is empty; give mini, timm:NAME or a folder in timm's format")
        if self.weight and not self.cos_weight and not self.distance_weight:
            raise ConfigError(
                "loss.alignment.cos_weight and loss.alignment.distance_weight are both 0; "
                "loss.alignment.weight=0 leaves the term out"
            )


class AlignmentOutput(NamedTuple):
    """`total`: a scalar, before `weight` and the adaptive factor. `terms`: each part before its weight, detached."""

    total: Tensor
    terms: dict[str, Tensor]


class Alignment(nn.Module):
    """The projection of latents to a foundation model's channels, which is trained, and the loss.

    The state dict and the parameters are the projection alone. The frozen network is moved along, but never saved.

    Attributes:
        projection: 1 x 1 convolution without bias, from the latent's channels to the network's.
        foundation: the frozen network.
    """

    foundation: Foundation

    def __init__(self, config: AlignmentConfig, latent_channels: int, image_size: int, grid_side: int) -> None:
        """`grid_side`: of the latent.

        Raises:
            ConfigError, CheckpointError, MissingDependencyError: see `load_foundation`.
        """
        super().__init__()
        self.config = config
        foundation = load_foundation(
            config.foundation,
            config.foundation_weights,
            image_size=image_size,
            grid_side=grid_side,
            normalize=config.normalize,
        )
        object.__setattr__(self, "foundation", foundation)  # not a submodule, or it would be saved and trained
        self.projection = nn.Conv2d(latent_channels, foundation.channels, 1, bias=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], *arguments: Any, **options: Any) -> Alignment:
        """`to`, `cuda`, `float` and their like reach the frozen network too."""
        self.foundation._apply(fn, *arguments, **options)
        return super()._apply(fn, *arguments, **options)

    def forward(self, latents: Tensor, images: Tensor) -> AlignmentOutput:
        """Of sampled latents `(B, d, h, w)` and their images `(B, 3, S, S)` in [-1, 1], which get no gradient.

        The network follows the ambient autocast; the projection and the loss are float32.
        """
        with torch.no_grad():
            features = resize_features(self.foundation(images), latents.shape[-2:])
        with torch.autocast(latents.device.type, enabled=False):
            projected = self.projection(latents.float())
        cos = marginal_cosine(projected, features, self.config.cos_margin)
        distance = marginal_distance(projected, features, self.config.distance_margin)
        total = self.config.cos_weight * cos + self.config.distance_weight * distance
        return AlignmentOutput(total, {"alignment_cos": cos.detach(), "alignment_distance": distance.detach()})


def marginal_cosine(projected: Tensor, features: Tensor, margin: float) -> Tensor:
    """relu(1 - margin - cos(z_i, f_i)), the mean over positions i and the batch; a scalar in [0, 2], float32.

    `projected`, `features`: `(B, C, h, w)`.
    """
    cos = (_unit(projected) * _unit(features)).sum(dim=1)
    return F.relu(1 - margin - cos).mean()


def marginal_distance(projected: Tensor, features: Tensor, margin: float) -> Tensor:
    """relu(|cos(z_i, z_j) - cos(f_i, f_j)| - margin), the mean over all pairs (i, j) of an image and the batch.

    A scalar in [0, 2], float32. A position's pair with itself is counted, and costs nothing.
    `projected`, `features`: `(B, C, h, w)`; their channels may differ.
    """
    with torch.autocast(projected.device.type, enabled=False):
        return F.relu((_similarities(projected) - _similarities(features)).abs() - margin).mean()


def resize_features(features: Tensor, grid: torch.Size | tuple[int, int]) -> Tensor:
    """Maps `(B, C, h, w)` on a grid of another size: bilinear, antialiased where it shrinks."""
    if features.shape[-2:] == tuple(grid):
        return features
    shrinks = features.shape[-2] > grid[0] or features.shape[-1] > grid[1]
    return F.interpolate(features, size=tuple(grid), mode="bilinear", antialias=shrinks)


def _unit(maps: Tensor) -> Tensor:
    """Float32 maps whose vectors have length 1."""
    return F.normalize(maps.float(), dim=1, eps=SHORTEST)


def _similarities(maps: Tensor) -> Tensor:
    """Cosines of all pairs of positions, `(B, hw, hw)`."""
    vectors = _unit(maps).flatten(2)
    return vectors.transpose(1, 2) @ vectors
