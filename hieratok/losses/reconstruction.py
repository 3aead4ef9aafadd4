"""Pixel losses and the ground truth of each scale.

Paper: Eq. 4 (L1 and MSE), Eq. 8 and 9 (every scale against the image resized to it).
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def resize_images(images: Tensor, side: int) -> Tensor:
    """Images `(B, C, H, W)` averaged down to `(B, C, side, side)`: D_s of Eq. 9.

    Each output pixel is the mean of the area it covers, which does not alias and matches the area pooling of tokens
    and positions.
    """
    return images if images.shape[-1] == side else F.interpolate(images, size=(side, side), mode="area")


def l1(images: Tensor, targets: Tensor) -> Tensor:
    """Mean absolute difference over pixels and batch, a scalar."""
    return F.l1_loss(images, targets)


def mse(images: Tensor, targets: Tensor) -> Tensor:
    """Mean squared difference over pixels and batch, a scalar."""
    return F.mse_loss(images, targets)
