"""What a generator is trained on: noise and its variance (DDPM), or the velocity of a straight path (rectified flow).

Sources: Ho et al. 2020 (DDPM), Eq. 6, 7, 14; Nichol and Dhariwal 2021 (improved DDPM), Eq. 15 and 16, and the
hybrid loss as vanilla DiT trains it: the mean's error plus the variational bound of one step, through which only the
variance learns; Liu et al. 2022 (rectified flow), with the logit-normal times of Esser et al. 2024 (SD3), Eq. 19.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .tokenizer_loss import LossOutput

Objective = Literal["ddpm", "flow"]

NUM_TIMESTEPS = 1000
BETA_START, BETA_END = 1e-4, 0.02  # linear, as in DDPM and DiT

# `predict(noisy latents (B, d, h, w), times (B,) in [0, 1000], labels (B,))` gives `(B, c, h, w)`.
Predict = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class DiffusionLossConfig:
    """The `loss` section of a generator's recipe.

    `objective`: `ddpm` (the paper's) or `flow`. `class_dropout`: the part of the samples that are trained without
    their class, which guidance needs. `time_mean`, `time_std`: of the normal whose sigmoid is a flow's time.
    """

    objective: Objective = "ddpm"
    class_dropout: float = 0.1
    time_mean: float = 0.0
    time_std: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.class_dropout <= 1:
            raise ConfigError(f"loss.class_dropout is {self.class_dropout}; it must lie in [0, 1]")
        if not 0 < self.time_std < math.inf:
            raise ConfigError(f"loss.time_std is {self.time_std}; it must be above 0 and finite")


class DiffusionLoss(Protocol):
    """A loss of normalised latents `(B, d, h, w)` and labels `(B,)`.

    Everything random about a sample is drawn from its own generator, so it does not depend on the batch around it.
    """

    def __call__(
        self, predict: Predict, latents: Tensor, labels: Tensor, generators: Sequence[torch.Generator]
    ) -> LossOutput: ...


def make_diffusion_loss(config: DiffusionLossConfig, num_classes: int) -> DDPMLoss | FlowLoss:
    """The loss that a recipe names."""
    return OBJECTIVES[config.objective](config, num_classes)


class GaussianDiffusion(nn.Module):
    """The chain's constants, computed in float64, and the distributions that follow from them.

    `t`: int64 `(B,)`, 0 (nearly clean) to T - 1 (noise).
    """

    alphas_cumprod: Tensor
    posterior_mean_start: Tensor
    posterior_mean_noisy: Tensor
    log_variance_min: Tensor
    log_variance_max: Tensor

    def __init__(self) -> None:
        super().__init__()
        betas = torch.linspace(BETA_START, BETA_END, NUM_TIMESTEPS, dtype=torch.float64)
        kept = torch.cumprod(1 - betas, dim=0)
        before = torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])
        variance = betas * (1 - before) / (1 - kept)  # DDPM Eq. 7; 0 at t = 0, where its neighbour's logarithm serves
        tables = {
            "alphas_cumprod": kept,
            "posterior_mean_start": betas * before.sqrt() / (1 - kept),
            "posterior_mean_noisy": (1 - betas).sqrt() * (1 - before) / (1 - kept),
            "log_variance_min": torch.cat([variance[1:2], variance[1:]]).log(),
            "log_variance_max": betas.log(),
        }
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t of x_0 `(B, d, h, w)` (DDPM Eq. 4)."""
        kept = at(self.alphas_cumprod, t, latents)
        return kept.sqrt() * latents + (1 - kept).sqrt() * noise

    def predict_start(self, noisy: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_0 of x_t and its noise: the inverse of `add_noise`."""
        kept = at(self.alphas_cumprod, t, noisy)
        return (noisy - (1 - kept).sqrt() * noise) / kept.sqrt()

    def posterior(self, latents: Tensor, noisy: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(x_{t-1} | x_t, x_0) (DDPM Eq. 6 and 7)."""
        mean = at(self.posterior_mean_start, t, latents) * latents + at(self.posterior_mean_noisy, t, latents) * noisy
        return mean, at(self.log_variance_min, t, latents).expand_as(mean)

    def log_variance(self, fraction: Tensor, t: Tensor) -> Tensor:
        """Of p(x_{t-1} | x_t), from the network's answer, -1 (smallest) to 1 (largest): improved DDPM Eq. 15."""
        low, high = at(self.log_variance_min, t, fraction), at(self.log_variance_max, t, fraction)
        share = (fraction + 1) / 2
        return share * high + (1 - share) * low

    def bound(self, latents: Tensor, noisy: Tensor, noise: Tensor, fraction: Tensor, t: Tensor) -> Tensor:
        """`(B,)` the variational bound of step t in bits per number, given the network's noise and variance."""
        true_mean, true_log_variance = self.posterior(latents, noisy, t)
        mean, _ = self.posterior(self.predict_start(noisy, noise, t), noisy, t)
        log_variance = self.log_variance(fraction, t)
        divergence = gaussian_kl(true_mean, true_log_variance, mean, log_variance)
        likelihood = discretized_log_likelihood(latents, mean, log_variance)
        bits = torch.where((t == 0).view(-1, 1, 1, 1), -likelihood, divergence)
        return bits.mean(dim=(1, 2, 3)) / math.log(2)


class DDPMLoss(nn.Module):
    """Mean squared error of the noise, plus, where the network learns the variance, the bound of the step.

    The mean is cut out of the bound's gradient, so that it learns from the error alone (improved DDPM, Sec. 3.1).
    """

    def __init__(self, config: DiffusionLossConfig, num_classes: int) -> None:
        super().__init__()
        self.class_dropout, self.num_classes = config.class_dropout, num_classes
        self.diffusion = GaussianDiffusion()

    def forward(
        self, predict: Predict, latents: Tensor, labels: Tensor, generators: Sequence[torch.Generator]
    ) -> LossOutput:
        """See `DiffusionLoss`."""
        labels = drop_classes(labels, self.class_dropout, self.num_classes, generators)
        t = (draw(torch.rand, (), generators, latents) * NUM_TIMESTEPS).long()  # (B,)
        noise = draw(torch.randn, latents.shape[1:], generators, latents)
        noisy = self.diffusion.add_noise(latents, noise, t)
        prediction = predict(noisy, t, labels).float()
        channels = latents.shape[1]
        mse = (prediction[:, :channels] - noise).square().mean()
        if prediction.shape[1] == channels:
            return LossOutput(mse, {"mse": mse.detach()})
        fraction = prediction[:, channels:]
        vlb = self.diffusion.bound(latents, noisy, prediction[:, :channels].detach(), fraction, t).mean()
        return LossOutput(mse + vlb, {"mse": mse.detach(), "vlb": vlb.detach()})


class FlowLoss(nn.Module):
    """Mean squared error of the velocity, noise - latents, at x_t = (1 - t) latents + t noise."""

    def __init__(self, config: DiffusionLossConfig, num_classes: int) -> None:
        super().__init__()
        self.config, self.num_classes = config, num_classes

    def forward(
        self, predict: Predict, latents: Tensor, labels: Tensor, generators: Sequence[torch.Generator]
    ) -> LossOutput:
        """See `DiffusionLoss`."""
        labels = drop_classes(labels, self.config.class_dropout, self.num_classes, generators)
        normal = draw(torch.randn, (), generators, latents)
        t = torch.sigmoid(self.config.time_mean + self.config.time_std * normal)  # (B,) in (0, 1)
        noise = draw(torch.randn, latents.shape[1:], generators, latents)
        share = t.view(-1, 1, 1, 1)
        velocity = predict((1 - share) * latents + share * noise, t * NUM_TIMESTEPS, labels).float()
        mse = (velocity - (noise - latents)).square().mean()
        return LossOutput(mse, {"mse": mse.detach()})


OBJECTIVES: dict[str, type[DDPMLoss] | type[FlowLoss]] = {"ddpm": DDPMLoss, "flow": FlowLoss}


def draw(
    distribution: Callable[..., Tensor], shape: Sequence[int], generators: Sequence[torch.Generator], like: Tensor
) -> Tensor:
    """`(B, *shape)` float32 on the device of `like`, each sample's from its own generator."""
    return torch.stack([distribution(tuple(shape), generator=g) for g in generators]).to(like.device)


def drop_classes(labels: Tensor, rate: float, num_classes: int, generators: Sequence[torch.Generator]) -> Tensor:
    """Labels `(B,)`, a part of them replaced by `num_classes`, which means no class."""
    return torch.where(draw(torch.rand, (), generators, labels) < rate, num_classes, labels)


def at(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """The entries `t` `(B,)` of a table, as `(B, 1, 1, 1)` of the type of `like`."""
    return table[t].to(like.dtype).view(-1, 1, 1, 1)


def gaussian_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N1 || N2), number by number, in nats."""
    shift = (mean1 - mean2).square() * torch.exp(-log_variance2)
    return 0.5 * (log_variance2 - log_variance1 - 1 + torch.exp(log_variance1 - log_variance2) + shift)


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """log of the Gaussian's mass in the bin of width 2 / 255 around x; below -1 and above 1 the bins are open.

    The last step's likelihood of 8-bit images (DDPM Eq. 13). On latents it is a convention: DiT keeps it, and so does
    this loss, since it concerns one step of a thousand.
    """
    inverse_std = torch.exp(-0.5 * log_variance)
    above, below = inverse_std * (x - mean + 1 / 255), inverse_std * (x - mean - 1 / 255)
    cdf_above, cdf_below = gaussian_cdf(above), gaussian_cdf(below)
    tiny = 1e-12
    inside = (cdf_above - cdf_below).clamp(min=tiny).log()
    first, last = cdf_above.clamp(min=tiny).log(), (1 - cdf_below).clamp(min=tiny).log()
    return torch.where(x < -0.999, first, torch.where(x > 0.999, last, inside))


def gaussian_cdf(x: Tensor) -> Tensor:
    """Of the standard normal."""
    return 0.5 * (1 + torch.erf(x / math.sqrt(2)))
