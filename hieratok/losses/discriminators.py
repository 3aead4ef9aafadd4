"""Networks that tell real images from reconstructed ones.

A discriminator is a module with `logits = D(images)`: images float `(B, 3, S, S)` about [-1, 1], logits `(B, K)`
float32, above 0 for real. `stylegan` gives one logit for an image, `patchgan` one for each patch, `dino` one for each
position of each level of features. Its `name` is its key in `DISCRIMINATORS`.

Paper: Sec. 4 names StyleGAN's discriminator. PatchGAN is the usual one of convolutional tokenizers, frozen features
that of recent ViT tokenizers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from ..config import suggest
from ..errors import ConfigError
from .foundation import Foundation, load_foundation

SLOPE = 0.2  # of every leaky ReLU below 0, in all three published networks
BLUR = (1.0, 3.0, 3.0, 1.0)
CHANNELS_TIMES_SIDE = 16384  # StyleGAN2's configuration E: 256 channels at 64 pixels, 128 at 128
SMALLEST_SIDE = 4  # of StyleGAN's maps
GROUP_SIZE = 4  # of the minibatch standard deviation
GRID_STRIDE = 8  # pixels for each position that a head over features judges


def build_discriminator(
    kind: str,
    image_size: int,
    *,
    width: float = 1.0,
    foundation: str = "mini",
    foundation_weights: str | None = None,
) -> nn.Module:
    """The discriminator of a name in `DISCRIMINATORS` for images of side `image_size`.

    `width`: of its channels, as a part of the published ones. `foundation`, `foundation_weights`: of `dino` only, as
    in `foundation.load_foundation`.

    Raises:
        ConfigError: an unknown name, or a side that this discriminator cannot look at.
        CheckpointError, MissingDependencyError: the foundation's network cannot be had.
    """
    if kind not in DISCRIMINATORS:
        raise ConfigError(f"discriminator.kind is '{kind}'{suggest(kind, DISCRIMINATORS)}")
    return DISCRIMINATORS[kind](image_size, width, foundation, foundation_weights)


class Discriminators(nn.Module):
    """The discriminators of several image sides.

    `per_scale`: one for each side. `shared`: one of the largest side, which smaller images are enlarged to.
    """

    def __init__(
        self,
        sides: list[int],
        kind: str,
        sharing: str = "per_scale",
        width: float = 1.0,
        foundation: str = "mini",
        foundation_weights: str | None = None,
    ) -> None:
        """`sides`: of the images, ascending; the rest as in `build_discriminator`.

        Raises:
            ConfigError: sides that do not ascend, or an unknown way of sharing; see also `build_discriminator`.
        """
        super().__init__()
        if not sides or sorted(set(sides)) != list(sides):
            raise ConfigError(f"a discriminator needs image sides that ascend, not {sides}")
        if sharing not in ("per_scale", "shared"):
            raise ConfigError(f"loss.adversarial.sharing is '{sharing}'{suggest(sharing, ('per_scale', 'shared'))}")
        self.sides, self.sharing = list(sides), sharing
        self.networks = nn.ModuleList(
            build_discriminator(kind, side, width=width, foundation=foundation, foundation_weights=foundation_weights)
            for side in (sides if sharing == "per_scale" else sides[-1:])
        ).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def foundation(self) -> Foundation:
        """The frozen network under the heads of `dino`."""
        return self.networks[0].foundation  # type: ignore[return-value]

    def forward(self, images: list[Tensor]) -> list[Tensor]:
        """Logits `(B, K)` for each of the images `(B, 3, side, side)`, one batch per side, coarse to fine."""
        images = [batch.contiguous(memory_format=torch.channels_last) for batch in images]  # a third faster on a CPU
        if self.sharing == "per_scale":
            return [network(batch) for network, batch in zip(self.networks, images, strict=True)]
        largest = self.sides[-1]
        return [self.networks[0](enlarge(batch, largest)) for _, batch in zip(self.sides, images, strict=True)]


def enlarge(images: Tensor, side: int) -> Tensor:
    """Images `(B, 3, S, S)` as `(B, 3, side, side)`, S <= side, bilinear."""
    if images.shape[-1] == side:
        return images
    return F.interpolate(images, size=(side, side), mode="bilinear", align_corners=False)


class StyleGANDiscriminator(nn.Module):
    """The residual discriminator of StyleGAN2 (arXiv 1912.04958, Fig. 7 and App. B): one logit for an image.

    A 1 x 1 convolution of the colours, residual blocks that halve the side down to 4 x 4, the minibatch standard
    deviation, a convolution and two linear layers.

    Weights begin by He's rule. StyleGAN2 has weights of variance 1 and scales them in every pass, which gives each
    layer a learning rate in proportion to its scale under an Adam of rate 2e-3. Here AdamW runs at the rate of Table 8,
    and its weight decay is meant for weights as they are used.
    """

    name = "stylegan"

    def __init__(self, image_size: int, width: float = 1.0, max_channels: int = 512) -> None:
        """`max_channels`: of the smallest maps, before `width`; width 2 with 256 is configuration F of the paper.

        Raises:
            ConfigError: a side that is no power of two of at least 8.
        """
        super().__init__()
        if image_size < 2 * SMALLEST_SIDE or image_size & (image_size - 1):
            raise ConfigError(
                f"the stylegan discriminator halves images down to 4 x 4 pixels: it needs a side that is a power of "
                f"two of at least 8, not {image_size}; take discriminator.kind=patchgan or dino, or leave this scale "
                f"out of loss.adversarial.scales"
            )

        def channels(side: int) -> int:
            return to_multiple(min(max_channels, CHANNELS_TIMES_SIDE // side) * width)

        sides = [image_size >> i for i in range(int(math.log2(image_size // SMALLEST_SIDE)) + 1)]
        self.from_rgb = he_init(nn.Conv2d(3, channels(image_size), 1))
        self.blocks = nn.Sequential(
            *(DownBlock(channels(side), channels(half)) for side, half in zip(sides, sides[1:], strict=False))
        )
        last = channels(SMALLEST_SIDE)
        self.conv = he_init(nn.Conv2d(last + 1, last, 3, padding=1))
        self.hidden = he_init(nn.Linear(last * SMALLEST_SIDE**2, last))
        self.head = he_init(nn.Linear(last, 1), slope=1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(B, 1)`. Those of a batch depend on one another, in groups of up to four neighbours."""
        x = self.blocks(leaky_relu(self.from_rgb(images)))
        x = torch.cat([x, minibatch_std(x)], dim=1)
        x = leaky_relu(self.conv(x))
        return self.head(leaky_relu(self.hidden(x.flatten(1)))).float()


class DownBlock(nn.Module):
    """Two 3 x 3 convolutions, the second of which halves the side, and a skip; their sum over sqrt 2."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = he_init(nn.Conv2d(in_channels, in_channels, 3, padding=1))
        self.down = he_init(nn.Conv2d(in_channels, out_channels, 3, stride=2))
        self.skip = he_init(nn.Conv2d(in_channels, out_channels, 1, bias=False), slope=1)
        self.blur = Blur()

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, S, S)` to `(B, C', S/2, S/2)`."""
        main = self.blur(leaky_relu(self.conv(x)), padding=2)  # one pixel wider, which the next convolution eats
        main = leaky_relu(self.down(main))
        # A strided 1 x 1 convolution reads every other pixel, so the blur makes no others.
        return (main + self.skip(self.blur(x, padding=1, stride=2))) / math.sqrt(2)


class Blur(nn.Module):
    """The filter [1, 3, 3, 1] in both directions, of sum 1, over zeros outside (arXiv 1904.11486)."""

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        line = torch.tensor(BLUR) / sum(BLUR)
        self.register_buffer("kernel", torch.outer(line, line), persistent=False)

    def forward(self, x: Tensor, padding: int, stride: int = 1) -> Tensor:
        """`(B, C, S, S)` to sides of (S + 2 padding - 4) // stride + 1."""
        channels, dtype = x.shape[1], x.dtype
        if stride > 1 and x.device.type == "cpu":  # in bf16 its backward pass takes six times as long
            x = x.float()
        kernel = self.kernel.to(x.dtype).expand(channels, 1, -1, -1)
        with torch.autocast(x.device.type, enabled=False):
            return F.conv2d(x, kernel, stride=stride, padding=padding, groups=channels).to(dtype)


def minibatch_std(x: Tensor, group_size: int = GROUP_SIZE) -> Tensor:
    """How much samples differ: `(B, 1, h, w)` of maps `(B, C, h, w)`, one number for each group of samples.

    It is the standard deviation over a group, averaged over channels and positions (Karras et al. 2018, arXiv
    1710.10196, Sec. 3). Groups are of the largest size up to `group_size` that divides the batch. They are of
    neighbours, so that real and reconstructed images that are joined into one batch do not mix. A group of one gives
    zeros.
    """
    batch, channels, height, width = x.shape
    size = max(n for n in range(1, min(group_size, batch) + 1) if batch % n == 0)
    if size == 1:
        return x.new_zeros(batch, 1, height, width)
    groups = x.float().view(batch // size, size, channels, height, width)
    variance = groups.var(dim=1, unbiased=False)
    spread = (variance + 1e-8).sqrt().mean(dim=(1, 2, 3))  # a root of 0 would have no gradient
    return spread.repeat_interleave(size).view(batch, 1, 1, 1).expand(-1, -1, height, width).to(x.dtype)


class PatchGANDiscriminator(nn.Module):
    """The convolutional discriminator of pix2pix (arXiv 1611.07004, App. 6.1): a logit for each patch of an image.

    `num_layers` strided 4 x 4 convolutions of 64, 128, 256, 512 channels at most, one more of stride 1, and one to a
    logit. Weights begin as normal numbers of deviation 0.02, as published.

    GroupNorm stands in place of BatchNorm. BatchNorm's statistics would come from real or from reconstructed images,
    whichever a pass holds, and from one process's share of the batch, so that logits depended on the company of an
    image and on the number of processes.
    """

    name = "patchgan"

    def __init__(self, image_size: int, width: float = 1.0, num_layers: int = 3) -> None:
        """Raises:
        ConfigError: a side that is too small for the layers.
        """
        super().__init__()
        side = image_size // 2**num_layers - 2  # of the logits: a strided layer halves, the last two take a pixel each
        if side < 1:
            raise ConfigError(
                f"the patchgan discriminator of {num_layers} strided layers needs images of at least "
                f"{3 * 2**num_layers} pixels, not {image_size}; leave this scale out of loss.adversarial.scales, or "
                f"take loss.adversarial.sharing=shared or discriminator.kind=stylegan"
            )
        widths = [to_multiple(64 * width * min(2**i, 8)) for i in range(num_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(SLOPE)]
        for i in range(1, num_layers + 1):
            stride = 2 if i < num_layers else 1
            layers += [
                nn.Conv2d(widths[i - 1], widths[i], 4, stride=stride, padding=1, bias=False),
                group_norm(widths[i]),
                nn.LeakyReLU(SLOPE),
            ]
        layers.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.layers = nn.Sequential(*layers)
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(B, K)`, row by row of the patches; K = (S / 2^num_layers - 2)^2."""
        return self.layers(images).flatten(1).float()


class FoundationDiscriminator(nn.Module):
    """Small heads over the features of a frozen network: logits for each position of each level.

    Sauer et al. 2023 (StyleGAN-T, arXiv 2301.09515, Sec. 3.2; after Projected GAN, arXiv 2111.01007). The frozen
    network is no parameter of this module: `parameters()` and `state_dict()` hold the heads only, `.to()` moves both,
    and gradients flow through it to the images. Its name, `foundation.name`, belongs to every figure made with it.

    Departures: GroupNorm in place of BatchNorm, for the reasons given at `PatchGANDiscriminator`; kernels of 3 x 3,
    nine positions as in the published kernel of 9 over a row of tokens, but neighbours in both directions.
    """

    name = "dino"
    foundation: Foundation

    def __init__(self, foundation: Foundation, width: float = 1.0, grid_side: int | None = None) -> None:
        """`grid_side`: the side that larger maps of features are averaged down to, after a head's first layer.

        The levels of a ViT are equally large, those of a convolutional network are not. Without it the logits of the
        shallowest level would be three quarters of all. None leaves every map as it is.
        """
        super().__init__()
        object.__setattr__(self, "foundation", foundation.requires_grad_(False).eval())  # past nn.Module's registers
        self.heads = nn.ModuleList(FeatureHead(c, to_multiple(c * width), grid_side) for c in foundation.layer_channels)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> FoundationDiscriminator:
        """What `.to()` and its like call."""
        if recurse:
            self.foundation._apply(fn)
        return super()._apply(fn, recurse)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(B, K)`: level by level, shallow to deep, and row by row in each."""
        maps = self.foundation.layers(images.float())
        return torch.cat([head(features) for head, features in zip(self.heads, maps, strict=True)], dim=1)


class FeatureHead(nn.Module):
    """A logit for each position of a map of features. Its convolutions have spectral norm 1 (arXiv 1802.05957)."""

    def __init__(self, in_channels: int, channels: int, grid_side: int | None) -> None:
        super().__init__()
        self.grid_side = grid_side
        self.project = spectral_norm(nn.Conv2d(in_channels, channels, 1))
        self.project_norm = group_norm(channels)
        self.conv = spectral_norm(nn.Conv2d(channels, channels, 3, padding=1))
        self.conv_norm = group_norm(channels)
        self.head = spectral_norm(nn.Conv2d(channels, 1, 1))

    def forward(self, features: Tensor) -> Tensor:
        """`(B, C, h, w)` to `(B, K)`, K the positions that are left."""
        x = leaky_relu(self.project_norm(self.project(features)))
        factor = x.shape[-1] // self.grid_side if self.grid_side else 1
        if factor > 1:
            x = F.avg_pool2d(x, factor)
        x = (x + leaky_relu(self.conv_norm(self.conv(x)))) / math.sqrt(2)
        return self.head(x).flatten(1).float()


def leaky_relu(x: Tensor) -> Tensor:
    return F.leaky_relu(x, SLOPE)


def to_multiple(channels: float, of: int = 8) -> int:
    """The nearest multiple of `of`, at least one of it: a width that GroupNorm and a GPU's matrix units can share."""
    return max(of, of * round(channels / of))


def group_norm(channels: int) -> nn.GroupNorm:
    """Up to 32 groups of at least 8 channels; `channels` is a multiple of 8."""
    return nn.GroupNorm(math.gcd(32, channels // 8), channels)


def he_init(layer: Any, slope: float = SLOPE) -> Any:
    """The layer, with He's weights for a leaky ReLU behind it (slope 1: none) and biases of 0 (arXiv 1502.01852)."""
    nn.init.kaiming_normal_(layer.weight, a=slope, nonlinearity="leaky_relu")
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def _build_dino(image_size: int, width: float, foundation: str, weights: str | None) -> nn.Module:
    # A network of timm sees images of the mean and deviation that it was trained with, as in StyleGAN-T.
    grid_side = max(1, image_size // GRID_STRIDE)
    network = load_foundation(foundation, weights, image_size=image_size, grid_side=grid_side, normalize="network")
    return FoundationDiscriminator(network, width, grid_side)


# Each takes the image side, the width, and the foundation with its weights.
DISCRIMINATORS: dict[str, Callable[[int, float, str, str | None], nn.Module]] = {
    "stylegan": lambda image_size, width, *_: StyleGANDiscriminator(image_size, width),
    "patchgan": lambda image_size, width, *_: PatchGANDiscriminator(image_size, width),
    "dino": _build_dino,
}
