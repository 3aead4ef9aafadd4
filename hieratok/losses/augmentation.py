"""Differentiable augmentation: what a discriminator sees of real images and of reconstructions alike.

With few images a discriminator learns them by heart. Augmenting what it sees, in training only and by operations that
gradients flow through, leaves it less to remember and the tokenizer unchanged.

Source: Zhao et al. 2020 (DiffAugment, arXiv 2006.10738), whose three policies and strengths these are; the side of the
cutout is that of later image tokenizers (MAETok).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config import suggest
from ..errors import ConfigError

MAX_SHIFT = 1 / 8  # of the side, in each direction
CUTOUT_SIDE = 0.2  # of the image's side


def augment(images: Tensor, policies: Sequence[str], generator: torch.Generator, probability: float = 1.0) -> Tensor:
    """Images `(B, 3, H, W)` about [-1, 1] under each policy in turn; shape, type and device stay.

    A policy changes a sample with `probability`, and each sample draws its own numbers. All of them come from
    `generator`, one on the CPU whatever the device, so that a run that is resumed sees the same. What moves in or is
    cut out is 0, mid grey.

    Raises:
        ConfigError: a policy that is none of `POLICIES`.
    """
    check_policies(policies, "augment")
    for policy in policies:
        applies = torch.rand(len(images), generator=generator) < probability
        images = AUGMENTATIONS[policy](images, applies, generator)
    return images


def check_policies(policies: Sequence[str], where: str) -> None:
    """Raises:
    ConfigError: a policy that is none of `POLICIES`; `where` names the field.
    """
    for i, policy in enumerate(policies):
        if policy not in AUGMENTATIONS:
            raise ConfigError(f"{where}[{i}] is '{policy}'{suggest(str(policy), POLICIES)}")


# Each takes images (B, 3, H, W), a mask (B,) on the CPU of the samples that change, and the generator.


def color(images: Tensor, applies: Tensor, generator: torch.Generator) -> Tensor:
    """Brightness moved by up to 0.5, saturation times 0 to 2, contrast times 0.5 to 1.5, in this order."""
    drawn = torch.rand(3, len(images), 1, 1, 1, generator=generator).to(images)
    brightness, saturation, contrast = drawn[0] - 0.5, 2 * drawn[1], drawn[2] + 0.5
    changed = images + brightness
    grey = changed.mean(dim=1, keepdim=True)
    changed = grey + (changed - grey) * saturation
    mean = changed.mean(dim=(1, 2, 3), keepdim=True)
    changed = mean + (changed - mean) * contrast
    return torch.where(applies.view(-1, 1, 1, 1).to(images.device), changed, images)


def translation(images: Tensor, applies: Tensor, generator: torch.Generator) -> Tensor:
    """Moved by whole pixels, up to an eighth of the side down or up and right or left."""
    shifts = []
    for side in images.shape[-2:]:
        furthest = round(side * MAX_SHIFT)
        shifts.append(torch.randint(-furthest, furthest + 1, (len(images),), generator=generator))
    moves = (torch.stack(shifts, dim=1) * applies[:, None]).tolist()
    # Padding by negative numbers crops. Unlike indexing, it has a backward pass that is cheap and deterministic.
    return torch.stack([F.pad(x, (right, -right, down, -down)) for x, (down, right) in zip(images, moves, strict=True)])


def cutout(images: Tensor, applies: Tensor, generator: torch.Generator) -> Tensor:
    """A square of `CUTOUT_SIDE` set to 0. Its centre is any pixel, so a part of it may lie outside."""
    inside = []
    for side in images.shape[-2:]:
        length = max(1, round(side * CUTOUT_SIDE))
        first = torch.randint(side, (len(images), 1), generator=generator) - length // 2
        pixels = torch.arange(side)
        inside.append((pixels >= first) & (pixels < first + length))
    rows, columns = inside
    hole = rows[:, :, None] & columns[:, None, :] & applies[:, None, None]
    return images.masked_fill(hole[:, None].to(images.device), 0)


AUGMENTATIONS: dict[str, Callable[[Tensor, Tensor, torch.Generator], Tensor]] = {
    "color": color,
    "translation": translation,
    "cutout": cutout,
}
POLICIES = tuple(AUGMENTATIONS)
