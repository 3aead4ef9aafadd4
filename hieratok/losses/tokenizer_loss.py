"""The sum that the tokenizer is trained on, and the name of each of its terms.

Paper: Eq. 3 and 4, Eq. 8 and 9, weights of Table 9.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .adversarial import AdversarialConfig
from .alignment import AlignmentConfig
from .perceptual import LPIPS, LpipsNetwork
from .reconstruction import l1, mse, resize_images

# Below these sides a perceptual network sees too little to compare: its deepest maps are a pixel or two.
LPIPS_MIN_SIDE = {"mini": 32, "vgg16": 64}


@dataclass(frozen=True)
class TokenizerLossConfig:
    """Weights of Table 9. A weight of 0 leaves the term out and costs nothing.

    `adversarial` and `alignment`: the terms of stage 2, which `training/stage2.py` adds.
    """

    l1: float = 1.0
    mse: float = 0.4
    lpips: float = 1.0
    kl: float = 1e-6  # of the KL summed over a sample's latent and averaged over the batch
    lpips_network: LpipsNetwork = "mini"
    lpips_weights: str | None = None  # local file; None: the shipped mini, or torchvision's vgg16
    lpips_min_size: int | None = None  # smallest image side with a perceptual term; None: 32 for mini, 64 for vgg16
    scale_weights: list[float] | None = None  # one per scale, coarse to fine; None: 1 for every scale
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)


class Reconstruction(Protocol):
    """What the loss looks at: the images of all scales, coarse to fine, and the posterior."""

    scales: tuple[Tensor, ...]
    posterior: Posterior


class Posterior(Protocol):
    """A distribution over latents that knows its divergence from the standard normal."""

    def kl(self) -> Tensor:
        """`(B,)`, summed over the latent."""


class LossOutput(NamedTuple):
    """`total`: the weighted sum, a scalar. `terms`: each term before its weight, by name, detached.

    `l1`, `mse` and `lpips` are sums over the scales (with the scales' weights), `l1/8` is that of the scale of side 8.
    `reconstruction`: of a tokenizer, the total without the KL, against which stage 2 weighs its terms.
    """

    total: Tensor
    terms: dict[str, Tensor]
    reconstruction: Tensor | None = None


class TokenizerLoss(nn.Module):
    """Compares every scale with the image resized to it, and the posterior with the standard normal."""

    def __init__(self, config: TokenizerLossConfig, scales: list[int], image_size: int) -> None:
        """`scales`: sides of the token maps, coarse to fine, as in the model's config.

        Raises:
            ConfigError: a list of scale weights of the wrong length.
        """
        super().__init__()
        self.config = config
        self.scales = list(scales)
        self.scale_weights = config.scale_weights or [1.0] * len(scales)
        if len(self.scale_weights) != len(scales):
            raise ConfigError(
                f"loss.scale_weights has {len(self.scale_weights)} numbers for the {len(scales)} scales {self.scales}"
            )
        self.lpips = LPIPS(config.lpips_network, config.lpips_weights) if config.lpips else None
        self.lpips_min_side = config.lpips_min_size or LPIPS_MIN_SIDE[config.lpips_network]
        if self.lpips is not None and not self.lpips.min_side <= self.lpips_min_side <= image_size:
            raise ConfigError(
                f"loss.lpips_min_size {self.lpips_min_side} must lie between {self.lpips.min_side}, the smallest side "
                f"that {self.lpips.name} can look at, and image_size {image_size}; loss.lpips=0 leaves the term out"
            )

    def forward(self, output: Reconstruction, images: Tensor) -> LossOutput:
        """The loss of a reconstruction of images `(B, 3, H, W)` in [-1, 1]."""
        terms: dict[str, Tensor] = {}
        total = images.new_zeros((), dtype=torch.float32)
        weights = {"l1": self.config.l1, "mse": self.config.mse, "lpips": self.config.lpips}
        for side, scale_weight, image in zip(self.scales, self.scale_weights, output.scales, strict=True):
            target = resize_images(images, image.shape[-1])
            for name, value in self._compare(image.float(), target).items():
                total = total + weights[name] * scale_weight * value
                terms[f"{name}/{side}"] = value.detach()
                terms[name] = terms.get(name, 0.0) + scale_weight * value.detach()
        kl = output.posterior.kl().float().mean()
        terms["kl"] = kl.detach()
        return LossOutput(total + self.config.kl * kl, terms, total)

    def _compare(self, image: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The unweighted terms of one scale."""
        compared = {}
        if self.config.l1:
            compared["l1"] = l1(image, target)
        if self.config.mse:
            compared["mse"] = mse(image, target)
        if self.lpips is not None and image.shape[-1] >= self.lpips_min_side:
            compared["lpips"] = self.lpips(image, target).mean()
        return compared
