"""The adversarial term: what a discriminator minimises, what the tokenizer minimises, and how the two are weighed.

Paper: Sec. 4 and Table 9 (weight 0.6 in stage 2). The networks are in `discriminators.py`, the step is in
`training/stage2.py`. Logits are `(B, K)`: above 0 for real, below 0 for reconstructed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import suggest
from ..errors import ConfigError
from .augmentation import check_policies

AdversarialLoss = Literal["hinge", "non_saturating"]
Sharing = Literal["per_scale", "shared"]
Update = Literal["simultaneous", "alternate"]


@dataclass(frozen=True)
class AdversarialConfig:
    """The section `loss.adversarial`. Steps are those of the optimizer, counted from 0."""

    weight: float = 0.0  # of the term; 0 leaves it out, with its discriminators; Table 9 has 0.6 in stage 2
    loss: AdversarialLoss = "hinge"  # or non_saturating, StyleGAN2's
    adaptive: bool = True  # times the ratio of gradients at the decoder's last layer; False: `weight` alone
    adaptive_max: float = 1e4  # the ratio's upper bound, taming-transformers'
    scales: list[int] | None = None  # sides of the token maps whose images are judged; None: the finest only
    sharing: Sharing = "per_scale"  # a discriminator for each scale, or one that sees them all at the largest size
    start_step: int = 0  # the tokenizer sees the discriminator from this step on
    discriminator_start_step: int | None = None  # the discriminator learns from this step on; None: start_step
    ramp_steps: int = 0  # the weight rises linearly over so many steps from start_step on
    update: Update = "simultaneous"  # both learn from the same weights; alternate: the discriminator steps first
    lecam: float = 0.0  # weight of LeCam's penalty; 0 leaves it out; MAETok and TiTok have 0.001
    lecam_decay: float = 0.999  # of the averages of logits that it keeps
    r1: float = 0.0  # gamma of the gradient penalty at real images; 0 leaves it out
    r1_every: int = 16  # steps between two penalties, each of which counts so many times: StyleGAN2's lazy schedule
    augment: list[str] = field(default_factory=list)  # of color, translation, cutout; what the discriminator sees
    augment_probability: float = 1.0  # with which each of them changes a sample

    def __post_init__(self) -> None:
        for name, choices in (
            ("loss", ("hinge", "non_saturating")),
            ("sharing", ("per_scale", "shared")),
            ("update", ("simultaneous", "alternate")),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise ConfigError(f"loss.adversarial.{name} is '{value}'{suggest(str(value), choices)}")
        for name in ("weight", "lecam", "r1"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ConfigError(f"loss.adversarial.{name} is {value}; it must be finite and at least 0")
        if not 0 < self.adaptive_max < math.inf:
            raise ConfigError(f"loss.adversarial.adaptive_max is {self.adaptive_max}; it must be finite and above 0")
        if self.scales is not None and (
            not self.scales or min(self.scales) < 1 or len(set(self.scales)) != len(self.scales)
        ):
            raise ConfigError(
                f"loss.adversarial.scales is {self.scales}; give different sides of token maps, or null for the finest"
            )
        for name, least in (("start_step", 0), ("discriminator_start_step", 0), ("ramp_steps", 0), ("r1_every", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"loss.adversarial.{name} is {value}; it must be at least {least}")
        if self.discriminator_start_step is not None and self.discriminator_start_step > self.start_step:
            raise ConfigError(
                f"loss.adversarial.discriminator_start_step is {self.discriminator_start_step}, after start_step "
                f"{self.start_step}: the tokenizer would follow a discriminator that has learned nothing"
            )
        if not 0 <= self.lecam_decay < 1:
            raise ConfigError(f"loss.adversarial.lecam_decay is {self.lecam_decay}; it must lie in [0, 1)")
        if not 0 <= self.augment_probability <= 1:
            raise ConfigError(
                f"loss.adversarial.augment_probability is {self.augment_probability}; it must lie in [0, 1]"
            )
        check_policies(self.augment, "loss.adversarial.augment")

    def weight_at(self, step: int) -> float:
        """The weight in a step, before the adaptive factor: 0 before `start_step`, then k / ramp_steps in its k-th."""
        if step < self.start_step:
            return 0.0
        return self.weight * min(1.0, (step - self.start_step + 1) / max(1, self.ramp_steps))

    def learns_at(self, step: int) -> bool:
        """Whether the discriminator learns in a step."""
        first = self.start_step if self.discriminator_start_step is None else self.discriminator_start_step
        return self.weight > 0 and step >= first


def discriminator_loss(kind: AdversarialLoss, real: Tensor, fake: Tensor) -> Tensor:
    """What a discriminator minimises, a scalar >= 0, of logits `(B, K)` of real and of reconstructed images.

    `hinge`: half of mean relu(1 - real) + mean relu(1 + fake), with the half of taming-transformers (arXiv
    2012.09841); 1 at logits of 0. `non_saturating`: mean softplus(-real) + mean softplus(fake) (arXiv 1406.2661), not
    halved, so that the published strengths of R1 hold; 2 log 2 at logits of 0.
    """
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def generator_loss(kind: AdversarialLoss, fake: Tensor) -> Tensor:
    """What the tokenizer minimises, a scalar, of logits `(B, K)` of reconstructed images.

    `hinge`: -mean (arXiv 1705.02894). `non_saturating`: mean softplus(-fake) (arXiv 1406.2661).
    """
    return -fake.mean() if kind == "hinge" else F.softplus(-fake).mean()


def lecam_penalty(real: Tensor, fake: Tensor, real_average: Tensor, fake_average: Tensor) -> Tensor:
    """mean relu(real - fake_average)^2 + mean relu(real_average - fake)^2, a scalar: logits are kept close together.

    `real`, `fake`: logits `(B, K)`. The averages are scalars, see `LeCamAverages`. It keeps a discriminator of few
    images from growing too sure. The paper's formula has plain squares; its published code cuts them at 0, where a
    logit is on the wrong side of the other's average, and published weights are those of the code.

    Source: Tseng et al. 2021 (LeCam, arXiv 2104.03310), Sec. 3.
    """
    return F.relu(real - fake_average).square().mean() + F.relu(real_average - fake).square().mean()


class LeCamAverages(nn.Module):
    """Moving averages of the mean logits, `real` and `fake`: scalars that begin at 0 and that a checkpoint keeps."""

    real: Tensor
    fake: Tensor

    def __init__(self, decay: float = 0.999) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("real", torch.zeros(()))
        self.register_buffer("fake", torch.zeros(()))

    @torch.no_grad()
    def update(self, real_mean: Tensor, fake_mean: Tensor) -> None:
        """Move towards the means of a step, which the caller averages over processes."""
        self.real.lerp_(real_mean.to(self.real), 1 - self.decay)
        self.fake.lerp_(fake_mean.to(self.fake), 1 - self.decay)


def r1_penalty(logits: Tensor, images: Tensor) -> Tensor:
    """0.5 times the mean over samples of the squared norm of the gradient at real images, a scalar; differentiable.

    `logits` `(B, K)` of `images` `(B, 3, H, W)`, which must require a gradient. Where a discriminator gives several
    logits, the gradient is that of their mean, as in the loss, so that gamma means the same for every K.

    Source: Mescheder et al. 2018 (arXiv 1801.04406), Eq. 9 without gamma.
    """
    (gradient,) = torch.autograd.grad(logits.mean(dim=1).sum(), images, create_graph=True)
    return 0.5 * gradient.square().sum(dim=(1, 2, 3)).mean()


@torch.no_grad()
def accuracy(real: Tensor, fake: Tensor) -> Tensor:
    """The share of logits on their side of 0, a scalar in [0, 1]; real and reconstructed images count the same."""
    return 0.5 * ((real > 0).float().mean() + (fake < 0).float().mean())


def adaptive_weight(
    numerator_loss: Tensor,
    loss: Tensor,
    parameter: Tensor,
    maximum: float,
    eps: float = 1e-4,
    reduce: Callable[[Tensor], Tensor] | None = None,
    scale: float = 1.0,
) -> Tensor:
    """clamp(|d numerator_loss / d p| / (|d loss / d p| + eps), 0, maximum), a scalar without a gradient.

    With it `loss` pulls at the parameter p as hard as `numerator_loss` does. Both losses are scalars whose graphs are
    kept. `reduce` averages a gradient over processes, before its norm is taken: the norm of the mean gradient is what
    counts, and every process must find the same weight. `scale`: fp16's loss scale, under which gradients are taken.

    Source: Esser et al. 2021 (VQGAN, arXiv 2012.09841), Eq. 7; the bounds are those of its code.
    """
    norms = []
    for scalar in (numerator_loss, loss):
        (gradient,) = torch.autograd.grad(scalar * scale, parameter, retain_graph=True)
        gradient = gradient / scale
        norms.append((gradient if reduce is None else reduce(gradient)).norm())
    return (norms[0] / (norms[1] + eps)).clamp(0, maximum).detach()
