"""Metrics of an image against its reconstruction, one value per image, on the uint8 images that would be saved."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import MissingDependencyError

MAX_PSNR = 100.0
SSIM_WINDOW = 11


def psnr(images: Tensor, targets: Tensor) -> Tensor:
    """`(B,)` peak signal-to-noise ratio in dB of uint8 images `(B, 3, H, W)`, data range 255.

    Each image has its own, and they are averaged, as is the habit of the field (the PSNR of the mean error over all
    images is lower). Identical images would have an infinite one; they are given 100 dB.
    """
    values = _torchmetrics().peak_signal_noise_ratio(
        images.float(), targets.float(), data_range=255.0, reduction="none", dim=(1, 2, 3)
    )
    return values.clamp(max=MAX_PSNR)


def ssim(images: Tensor, targets: Tensor) -> Tensor | None:
    """`(B,)` structural similarity of uint8 images `(B, 3, H, W)`, data range 255, Gaussian window of 11 x 11 pixels.

    None for images smaller than the window. Source: Wang et al. 2004, as in torchmetrics.
    """
    if min(images.shape[-2:]) < SSIM_WINDOW:
        return None
    values = _torchmetrics().structural_similarity_index_measure(
        images.float(), targets.float(), data_range=255.0, reduction="none"
    )
    return values.reshape(len(images))


def l1(images: Tensor, targets: Tensor) -> Tensor:
    """`(B,)` mean absolute difference of uint8 images `(B, 3, H, W)`, in units of the [-1, 1] range (0 to 2)."""
    return (images.float() - targets.float()).abs().mean(dim=(1, 2, 3)) / 127.5


class Mean:
    """A running mean in float64, whose sums can be added up over processes.

    Attributes:
        sums: `(2,)` float64, the total and the count.
    """

    def __init__(self) -> None:
        self.sums = torch.zeros(2, dtype=torch.float64)

    def update(self, values: Tensor) -> None:
        """Add values of any shape."""
        self.sums += torch.tensor([float(values.double().sum()), values.numel()], dtype=torch.float64)

    @property
    def value(self) -> float | None:
        """The mean, None before any value."""
        total, count = self.sums.tolist()
        return total / count if count else None


def _torchmetrics():  # type: ignore[no-untyped-def]
    try:
        from torchmetrics.functional import image
    except ImportError as error:
        raise MissingDependencyError("PSNR and SSIM need torchmetrics: pip install 'hieratok[eval]'") from error
    return image
