"""Stage 2: what discriminators and a foundation model add to a tokenizer's step (Sec. 4; Tables 8 and 9).

The terms themselves are in `losses/adversarial.py` and `losses/alignment.py`. Both are weighed against the
reconstruction by the norms of their gradients at a last layer: the decoder's for the adversarial term (VQGAN, arXiv
2012.09841, Eq. 7), the encoder's for the alignment (VA-VAE, arXiv 2501.01423).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..data.loader import Batch
from ..data.order import sample_seed
from ..engine.learner import Learner
from ..engine.loop import Engine
from ..engine.optimizers import adamw
from ..engine.settings import OptimizerConfig
from ..errors import ConfigError
from ..losses.adversarial import (
    AdversarialConfig,
    LeCamAverages,
    accuracy,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    lecam_penalty,
    r1_penalty,
)
from ..losses.alignment import Alignment, AlignmentConfig
from ..losses.augmentation import augment
from ..losses.discriminators import Discriminators
from ..losses.foundation import Foundation
from ..losses.reconstruction import resize_images
from ..models.tokenizer import HieraTok, HieraTokOutput

Kind = Literal["stylegan", "patchgan", "dino"]
DISCRIMINATOR, ALIGNMENT = "discriminator", "alignment"  # the learners' names in logs and checkpoints


@dataclass(frozen=True)
class DiscriminatorConfig(OptimizerConfig):
    """The network that judges reconstructions, and how it learns: AdamW by Table 8, stage 2."""

    kind: Kind = "stylegan"
    width: float = 1.0  # of its channels, as a part of the published ones
    foundation: str = "mini"  # of dino: the frozen network, `mini`, `timm:NAME` or a folder
    foundation_weights: str | None = None  # local file; None: the shipped ones, or the hub's
    learning_rate: float = 2e-4
    final_learning_rate: float = 2e-6
    warmup_ratio: float = 0.01
    weight_decay: float = 1e-4

    def __post_init__(self) -> None:
        self.check("discriminator")
        if not self.width > 0:
            raise ConfigError(f"discriminator.width is {self.width}; it must be above 0")


class Judges(nn.Module):
    """The discriminators of a run and, per scale, what LeCam remembers of their logits."""

    def __init__(self, discriminators: Discriminators, lecam: list[LeCamAverages]) -> None:
        super().__init__()
        self.discriminators, self.lecam = discriminators, nn.ModuleList(lecam)

    def forward(self, real: list[Tensor], fake: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Logits `(B, K)` of real and of reconstructed images, per judged scale."""
        return self.discriminators(real), self.discriminators(fake)


class Adversary:
    """The adversarial term of a step, on the scales that are judged, and the discriminators' own step."""

    def __init__(
        self, config: AdversarialConfig, settings: DiscriminatorConfig, model: HieraTok, engine: Engine, seed: int
    ) -> None:
        """Raises:
        ConfigError: scales that the model has not, or settings that do not fit together.
        """
        sides, patch_size = model.layout.sides, int(model.config.patch_size)
        self.scales = sorted(config.scales or [sides[-1]])
        if unknown := [side for side in self.scales if side not in sides]:
            raise ConfigError(f"loss.adversarial.scales has {unknown}; the model's scales are {list(sides)}")
        if config.update == "alternate" and engine.config.accumulation > 1:
            raise ConfigError(
                "loss.adversarial.update=alternate takes the discriminator's step before the tokenizer's gradients, "
                "which train.accumulation spreads over several batches; use update=simultaneous, or accumulation=1"
            )
        if config.start_step >= engine.total_steps:
            raise ConfigError(
                f"loss.adversarial.start_step is {config.start_step}, and the run has {engine.total_steps} steps: its "
                f"tokenizer would never meet the discriminator"
            )
        self.config, self.engine, self.seed = config, engine, seed
        self.places = [list(sides).index(side) for side in self.scales]
        self.last_layer = model.decoder.last_layer(self.places[-1])
        network = Judges(
            Discriminators(
                [side * patch_size for side in self.scales], settings.kind, config.sharing, settings.width,
                settings.foundation, settings.foundation_weights,
            ),
            # A step updates them once per micro-batch.
            [LeCamAverages(config.lecam_decay ** (1 / engine.config.accumulation)) for _ in self.scales]
            if config.lecam else [],
        ).to(engine.device)  # fmt: skip
        self.name = f"{settings.kind} discriminator"
        if settings.kind == "dino":
            self.name += f" on the features of {named(network.discriminators.foundation)}"
        optimizer = adamw(network.parameters(), settings)
        self.network = network
        self.learner = engine.add(Learner(DISCRIMINATOR, network, [optimizer], settings, engine.accelerator))
        self.watch = Watch(self.learner, engine)
        engine.observers.append(self.watch)

    def learn(self, images: Tensor, output: HieraTokOutput, batch: Batch) -> None:
        """Add the discriminators' gradients of a micro-batch: images `(B, 3, H, W)` in [-1, 1] are real."""
        config, step = self.config, self.engine.step
        if not config.learns_at(step):
            return
        self.network.train()
        penalised = config.r1 > 0 and step % config.r1_every == 0
        real = [resize_images(images, output.scales[place].shape[-1]) for place in self.places]
        real = [image.detach().requires_grad_(penalised) for image in self.augmented(real, batch, "real")]
        fake = self.augmented([output.scales[place].detach().float() for place in self.places], batch, "fake")
        # R1 differentiates twice, which the fast kernels of attention cannot.
        kernels = sdpa_kernel(SDPBackend.MATH) if penalised else contextlib.nullcontext()
        with self.engine.autocast(), kernels:
            real_logits, fake_logits = self.learner.forward(real, fake)
        pairs = list(zip(real_logits, fake_logits, strict=True))
        terms = {
            **self.over_scales("discriminator", [discriminator_loss(config.loss, *pair) for pair in pairs]),
            **self.over_scales("logits_real", [logits.mean() for logits in real_logits]),
            **self.over_scales("logits_fake", [logits.mean() for logits in fake_logits]),
            **self.over_scales("accuracy", [accuracy(*pair) for pair in pairs]),
        }
        total = terms["discriminator"]
        if len(self.network.lecam):
            memory: list[tuple[tuple[Tensor, Tensor], Any]] = list(zip(pairs, self.network.lecam, strict=True))
            penalty = torch.stack([lecam_penalty(*pair, average.real, average.fake) for pair, average in memory]).mean()
            for (on_real, on_fake), average in memory:
                average.update(*(self.engine.mean(logits.detach().mean()) for logits in (on_real, on_fake)))
            total, terms["lecam"] = total + config.lecam * penalty, penalty
        if penalised:
            penalty = torch.stack([r1_penalty(*pair) for pair in zip(real_logits, real, strict=True)]).mean()
            # It counts for the steps that leave it out too (StyleGAN2, App. B).
            total, terms["r1"] = total + config.r1 * config.r1_every * penalty, penalty
        self.engine.backward(total, detached(terms), batch, name="discriminator_total")

    def term(self, reconstruction: Tensor, output: HieraTokOutput, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """What the tokenizer minimises of a micro-batch, and its parts for the logs.

        `reconstruction`: the loss that it is weighed against.
        """
        config = self.config
        share = config.weight_at(self.engine.step)
        if not share:
            return reconstruction.new_zeros(()), {}
        painted = [output.scales[place].float() for place in self.places]
        seen = [image.detach().requires_grad_() for image in painted]
        with frozen(self.network), self.engine.autocast():
            logits = self.network.discriminators(self.augmented(seen, batch, "judged"))
        terms = self.over_scales("adversarial", [generator_loss(config.loss, one) for one in logits])
        # Back through the discriminator once, for the adaptive weight and for the step.
        scale = self.engine.scaler.get_scale()
        at_images = torch.autograd.grad(terms["adversarial"] * scale, seen)
        loss = torch.stack([(image * pull / scale).sum() for image, pull in zip(painted, at_images, strict=True)]).sum()
        loss = loss - loss.detach() + terms["adversarial"].detach()
        weight = reconstruction.new_tensor(share)
        if config.adaptive:
            weight = weight * adaptive_weight(
                reconstruction, loss, self.last_layer, config.adaptive_max, reduce=self.engine.mean, scale=scale
            )
        return weight * loss, {**detached(terms), "adversarial_weight": weight}

    def over_scales(self, name: str, values: Sequence[Tensor]) -> dict[str, Tensor]:
        """The mean of a scalar over the judged scales, and where there are several, that of each."""
        named = {name: torch.stack(list(values)).mean()}
        if len(values) > 1:
            named |= {f"{name}/{side}": value for side, value in zip(self.scales, values, strict=True)}
        return named

    def augmented(self, images: Sequence[Tensor], batch: Batch, use: str) -> list[Tensor]:
        """The images of each scale, augmented if the run says so; what is drawn depends on the batch and the use."""
        if not self.config.augment:
            return list(images)
        uses = ("real", "fake", "judged")
        drawn = torch.Generator().manual_seed(sample_seed(self.seed, uses.index(use), batch.seeds[0]))
        probability = self.config.augment_probability
        return [augment(image, self.config.augment, drawn, probability) for image in images]


class Aligner:
    """The alignment term of a step; its projection learns by the tokenizer's own settings."""

    def __init__(self, config: AlignmentConfig, model: HieraTok, engine: Engine) -> None:
        size, patch_size = int(model.config.image_size), int(model.config.patch_size)
        self.config, self.engine = config, engine
        self.network = Alignment(config, int(model.config.latent_channels), size, size // patch_size).to(engine.device)
        train = engine.config
        optimizer = adamw([{"params": list(self.network.parameters()), "weight_decay": 0.0}], train)
        self.name = f"VF loss against {named(self.network.foundation)}"
        self.learner = engine.add(Learner(ALIGNMENT, self.network, [optimizer], train, engine.accelerator))
        self.last_layer = model.encoder.moments.weight

    def term(self, reconstruction: Tensor, output: HieraTokOutput, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What the tokenizer minimises, and its parts for the logs; see `Adversary.term`."""
        with self.engine.autocast():
            found = self.learner.forward(output.latents, images)
        weight = reconstruction.new_tensor(self.config.weight)
        if self.config.adaptive:
            weight = weight * adaptive_weight(
                reconstruction, found.total, self.last_layer, self.config.adaptive_max,
                reduce=self.engine.mean, scale=self.engine.scaler.get_scale(),
            )  # fmt: skip
        terms = {"alignment": found.total.detach(), **found.terms, "alignment_weight": weight}
        return weight * found.total, terms


def named(foundation: Foundation) -> str:
    """A frozen network in words: its name and its weights' hash."""
    return f"{foundation.name} ({foundation.sha256[:8]})"


class Watch:
    """Says when a discriminator has won, or tells nothing apart; once each in a run, when it has lasted."""

    LASTING = 5  # logged means in a row
    WON = 0.97  # accuracy
    BLIND = 0.03  # of accuracy around one half, with logits that hardly differ

    def __init__(self, learner: Learner, engine: Engine) -> None:
        self.learner, self.engine = learner, engine
        self.lasted = {"won": 0, "collapsed": 0}

    def recall(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Look at what a run that goes on had logged before."""
        for line in lines:
            if line["kind"] == "train":
                self.look(line)

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        """Look at what was logged of a step, and warn."""
        for state in self.look(values):
            self.engine.warn(f"{self.said(state, values)} (docs/stage2.md)")

    def look(self, values: Mapping[str, float]) -> list[str]:
        """The states that have lasted long enough with these values."""
        if "accuracy" not in values:
            return []
        apart = abs(values["logits_real"] - values["logits_fake"])
        states = {
            "won": values["accuracy"] >= self.WON,
            "collapsed": abs(values["accuracy"] - 0.5) <= self.BLIND and apart < self.BLIND,
        }
        reached = []
        for state, holds in states.items():
            if self.lasted[state] < self.LASTING:  # what has been said stays said
                self.lasted[state] = self.lasted[state] + 1 if holds else 0
                reached += [state] * (self.lasted[state] == self.LASTING)
        return reached

    def said(self, state: str, values: Mapping[str, float]) -> str:
        """The warning, with what can be done."""
        if state == "won":
            return (
                f"the discriminator has won: it is right about {values['accuracy']:.1%} of what it sees, and its "
                f"gradients teach little. Lower discriminator.learning_rate, or set loss.adversarial.augment=[color,"
                f"translation,cutout], loss.adversarial.lecam=0.001 or loss.adversarial.r1=1"
            )
        return (
            f"the discriminator tells nothing apart: it is right about {values['accuracy']:.1%}, logits "
            f"{values['logits_real']:+.3f} of real images and {values['logits_fake']:+.3f} of reconstructions. Raise "
            f"discriminator.learning_rate, lower loss.adversarial.weight, or take another discriminator.kind"
        )


def detached(terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """For the logs."""
    return {name: value.detach() for name, value in terms.items()}


@contextlib.contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Gradients flow through the network and not into it."""
    learned = [p for p in network.parameters() if p.requires_grad]
    for parameter in learned:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)
