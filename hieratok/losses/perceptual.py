"""LPIPS: a distance between images in the feature space of a frozen network.

`vgg16` is the published metric: VGG16 features and the authors' linear heads. `mini` is the same formula over the
network that ships with the package (`mini.py`), with one weight for all channels, chosen so that the distance is the
mean of 1 - cosine over positions and layers and lies in [0, 1], the range of the published one in practice.

Source: Zhang et al. 2018, "The unreasonable effectiveness of deep features as a perceptual metric". The heads in
`weights/lpips_vgg16_heads.safetensors` are version 0.1 of that paper's authors (BSD-2-Clause,
(c) 2018 Richard Zhang, Phillip Isola, Alexei A. Efros, Eli Shechtman, Oliver Wang).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError, MissingDependencyError
from ..files import sha256_of
from .mini import MiniNet, load_mini
from .weights_file import load_weights

LpipsNetwork = Literal["mini", "vgg16"]

HEADS = Path(__file__).parent / "weights" / "lpips_vgg16_heads.safetensors"

# Layers of torchvision's vgg16().features up to relu5_3; a number is a convolution's width, "M" a max pooling.
VGG16_LAYOUT = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512)
CACHED_NUMBERS = 1 << 17  # float32 numbers of one map that are worked on at a time, half a megabyte
MINI_HEAD = 0.1  # |a - b|^2 = 2 (1 - cos) for unit vectors, and there are five layers
VGG16_TAPS = (3, 8, 15, 22, 29)  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3


class Vgg16(nn.Module):
    """The convolutions of VGG16 under torchvision's names, so that its weight file loads without torchvision."""

    name = "vgg16"
    min_side = 16  # four poolings must leave a pixel
    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in VGG16_LAYOUT:
            if isinstance(width, int):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            else:
                layers.append(nn.MaxPool2d(2))
        self.layers = nn.Sequential(*layers)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1), persistent=False)
        self.sha256 = ""

    def features(self, images: Tensor) -> list[Tensor]:
        """Five maps, `(B, 64, H, W)` to `(B, 512, H/16, W/16)`, of images `(B, 3, H, W)` in [-1, 1]."""
        x = (images - self.shift) / self.scale
        maps = []
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i in VGG16_TAPS:
                maps.append(x)
        return maps


def load_vgg16(weights: str | Path | None = None) -> Vgg16:
    """VGG16's convolutions from a local file (`.safetensors`, or torchvision's `.pth`), or downloaded by torchvision.

    Raises:
        CheckpointError: the file is missing or does not hold VGG16.
        MissingDependencyError: no file was given and torchvision is not installed.
    """
    network = Vgg16()
    if weights is None:
        try:
            from torchvision.models import VGG16_Weights  # type: ignore[import-untyped]
        except ImportError as error:
            raise MissingDependencyError(
                "LPIPS with vgg16 and no local weights needs torchvision: pip install 'hieratok[eval]', "
                "or set loss.lpips_weights to a file with torchvision's VGG16 weights"
            ) from error
        tensors = VGG16_Weights.IMAGENET1K_V1.get_state_dict(progress=True, check_hash=True, weights_only=True)
    else:
        tensors = load_weights(weights, "VGG16")
    prefix = "features."
    kept = {f"layers.{k.removeprefix(prefix)}": v for k, v in tensors.items() if k.startswith(prefix)}
    try:
        network.load_state_dict(kept)
    except RuntimeError as error:
        raise CheckpointError(f"{weights} does not hold the convolutions of torchvision's VGG16: {error}") from error
    network.sha256 = sha256_of(Path(weights)) if weights else _sha256_of_tensors(kept)
    return network.requires_grad_(False).eval()


def _sha256_of_tensors(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].numpy().tobytes())
    return digest.hexdigest()


FeatureNetwork = MiniNet | Vgg16


class LPIPS(nn.Module):
    """Distance of two batches of images; frozen.

    Attributes:
        name: the network's name, which goes with every figure made by it.
        sha256: of the network's weights.
        min_side: the smallest image side that it can look at.
    """

    def __init__(self, network: LpipsNetwork = "mini", weights: str | Path | None = None) -> None:
        """`weights`: a local file of the network; None is the shipped one (`mini`) or torchvision's (`vgg16`)."""
        super().__init__()
        if network not in NETWORKS:
            raise ConfigError(f"lpips network '{network}' is none of {', '.join(NETWORKS)}")
        self.network: FeatureNetwork = NETWORKS[network](weights)
        self.name: str = self.network.name
        self.sha256: str = self.network.sha256
        self.min_side: int = self.network.min_side
        heads = load_file(HEADS) if network == "vgg16" else {f"head{i}": torch.tensor([MINI_HEAD]) for i in range(5)}
        for name, weights_of_channels in heads.items():
            self.register_buffer(name, weights_of_channels.view(1, -1, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> LPIPS:
        """Stays in evaluation mode: the network is frozen."""
        return super().train(False)

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """`(B,)` distances >= 0 between two batches `(B, 3, H, W)` in [-1, 1]; gradients flow to `images` only.

        The convolutions follow the ambient autocast; what is compared is float32.
        """
        with torch.no_grad():
            target_maps = self.network.features(targets)
        distance = images.new_zeros(len(images), dtype=torch.float32)
        for i, (a, b) in enumerate(zip(self.network.features(images), target_maps, strict=True)):
            distance = distance + UnitDistance.apply(a, b, getattr(self, f"head{i}"))
        return distance


class UnitDistance(torch.autograd.Function):
    """Mean over positions of the weighted squared difference of two maps whose vectors are scaled to unit length.

    The gradient is found in the forward pass, a few samples at a time: the dozen intermediate maps then stay in the
    processor's cache, and LPIPS takes half the time on a CPU that it takes by autograd (`benchmarks/lpips.py`).
    """

    @staticmethod
    def forward(ctx: Any, maps: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """`(B,)` float32 of maps and targets `(B, C, h, w)`, weights `(1, C or 1, 1, 1)`; no gradient to targets."""
        positions = maps.shape[2] * maps.shape[3]
        at_once = max(1, CACHED_NUMBERS // maps[0].numel()) if maps.device.type == "cpu" else len(maps)
        # Before fp16's loss scale is applied, most gradients are too small for fp16.
        kept_in = torch.float32 if maps.dtype == torch.float16 else maps.dtype
        gradient = torch.empty_like(maps, dtype=kept_in) if ctx.needs_input_grad[0] else None
        distances = []
        for start in range(0, len(maps), at_once):
            a, b = maps[start : start + at_once].float(), targets[start : start + at_once].float()
            inverse_length = inverse_norm(a)
            a = a * inverse_length
            difference = a - b * inverse_norm(b)  # not fused, so that equal images are at distance 0
            weighted = difference * weights
            distances.append(difference.mul_(weighted).sum(dim=(1, 2, 3)) / positions)
            if gradient is not None:  # of a unit vector: what lies along the vector cancels
                along = (a * weighted).sum(dim=1, keepdim=True)
                part = weighted.addcmul_(a, along, value=-1).mul_(inverse_length.mul_(2 / positions))
                gradient[start : start + at_once] = part
        ctx.save_for_backward(gradient)
        ctx.dtype = maps.dtype
        return torch.cat(distances)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream[0].view(-1, 1, 1, 1).to(gradient.dtype)).to(ctx.dtype), None, None


def inverse_norm(maps: Tensor, eps: float = 1e-8) -> Tensor:
    """One over the length of the vector at every position, `(B, 1, h, w)`."""
    return maps.square().sum(dim=1, keepdim=True).add_(eps).rsqrt_()


NETWORKS: dict[str, Callable[[str | Path | None], FeatureNetwork]] = {"mini": load_mini, "vgg16": load_vgg16}
