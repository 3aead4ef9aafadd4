"""DiT: the diffusion transformer of the paper's testbed, in its vanilla form with adaLN-Zero.

    noisy latents, time, class -> patches -> blocks modulated by (time + class) -> noise (and its variance) or velocity

Shapes: B batch, d latent channels, h w the latent grid, N tokens = (h / p)(w / p), D hidden size, p the patch size.

Source: Peebles and Xie 2023, "Scalable diffusion models with transformers"; sizes of Table 6 of the paper.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import Attention
from .latent_statistics import LatentStatistics
from .loading import SafeLoading
from .scales import ScaleLayout
from .tokenizer import in_weight_precision
from .transformer import Mlp

FREQUENCIES = 256  # values that a time becomes before it is embedded
MAX_PERIOD = 10_000


class TimeEmbedding(nn.Module):
    """Times `(B,)` in [0, 1000] to `(B, D)`: sines and cosines, then two layers."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.up = nn.Linear(FREQUENCIES, hidden_size)
        self.act = nn.SiLU()
        self.down = nn.Linear(hidden_size, hidden_size)

    def forward(self, timestep: Tensor) -> Tensor:
        half = FREQUENCIES // 2
        rates = torch.exp(-math.log(MAX_PERIOD) * torch.arange(half, device=timestep.device) / half)
        angles = timestep.float()[:, None] * rates  # (B, 128)
        waves = torch.cat([angles.cos(), angles.sin()], dim=1)
        return self.down(self.act(self.up(waves.to(self.up.weight.dtype))))


def modulate(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Tokens `(B, N, D)` scaled and shifted per sample by `(B, D)`."""
    return tokens * (1 + scale[:, None]) + shift[:, None]


class DiTBlock(nn.Module):
    """Attention and MLP whose norms and residual branches are modulated by the condition (adaLN-Zero)."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, backend: str) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.attention = Attention(hidden_size, num_heads, True, backend)
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(hidden_size, mlp_ratio, True, approximate="tanh")
        self.act = nn.SiLU()
        self.modulation = nn.Linear(hidden_size, 6 * hidden_size)

    def forward(self, tokens: Tensor, condition: Tensor, layout: ScaleLayout) -> Tensor:
        """Tokens `(B, N, D)` under a condition `(B, D)`."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(self.act(condition)).chunk(6, dim=1)
        attended = self.attention(modulate(self.norm1(tokens), shift1, scale1), layout, "full")
        tokens = tokens + gate1[:, None] * attended
        return tokens + gate2[:, None] * self.mlp(modulate(self.norm2(tokens), shift2, scale2))


class DiT(SafeLoading, LatentStatistics, ModelMixin, ConfigMixin):  # type: ignore[misc]
    """A class-conditional diffusion transformer over latents `(B, d, h, w)`.

    It answers to the calls of diffusers' `DiTPipeline`; `HieraTokPipeline` also knows its classes and statistics.

    Args:
        sample_size: side h = w of the latents.
        patch_size: side p of a patch of latents; at f16 latents it is 1.
        in_channels: channels d of the latents.
        out_channels: 2d predicts the noise and its variance (None, vanilla DiT); d a velocity or the noise alone.
        hidden_size, num_layers, num_heads, mlp_ratio: of the transformer; the defaults are XL.
        num_classes: of the labels; the label `num_classes`, or any above it, means no class.
        attention_backend: `auto`, `prefix`, `mask` or `matmul`; the same result at another speed.
        latents_mean, latents_std: d numbers each: what latents are normalised by before noise is added.

    Raises:
        ValueError: the numbers do not fit together; the message names them.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["DiTBlock"]  # type: ignore[assignment]
    _repeated_blocks = ["DiTBlock"]  # type: ignore[assignment]

    if TYPE_CHECKING:
        config: Any  # a FrozenDict whose keys are attributes

    @register_to_config
    def __init__(
        self,
        sample_size: int = 16,
        patch_size: int = 1,
        in_channels: int = 16,
        out_channels: int | None = None,
        hidden_size: int = 1152,
        num_layers: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        attention_backend: str = "auto",
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if sample_size % patch_size:
            raise ValueError(f"sample_size {sample_size} is not divisible by patch_size {patch_size}")
        if hidden_size % 4:
            raise ValueError(f"hidden_size {hidden_size} is not divisible by 4, which the positions need")
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}; a set without classes has one")
        out_channels = out_channels or 2 * in_channels
        if out_channels not in (in_channels, 2 * in_channels):
            raise ValueError(
                f"out_channels {out_channels} is neither in_channels {in_channels} nor twice as many (with variance)"
            )
        self.register_to_config(out_channels=out_channels)
        side = sample_size // patch_size
        self.layout = ScaleLayout((side,))
        self.patch_embed = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)
        self.register_buffer("position", sinusoidal_positions(side, hidden_size), persistent=False)
        self.time_embed = TimeEmbedding(hidden_size)
        self.class_embed = nn.Embedding(num_classes + 1, hidden_size)
        self.blocks = nn.ModuleList(
            DiTBlock(hidden_size, num_heads, mlp_ratio, attention_backend) for _ in range(num_layers)
        )
        self.act = nn.SiLU()
        self.norm = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(hidden_size, 2 * hidden_size)
        self.to_latents = nn.Linear(hidden_size, patch_size**2 * out_channels)
        self.gradient_checkpointing = False
        self._initialize()

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        for weight in (self.class_embed.weight, self.time_embed.up.weight, self.time_embed.down.weight):
            nn.init.normal_(weight, std=0.02)
        # "Zero": every block begins as the identity, and the network's answer as 0.
        for name, parameter in self.named_parameters():
            if name.endswith(("modulation.weight", "to_latents.weight")):
                nn.init.zeros_(parameter)

    @property
    def num_classes(self) -> int:
        return int(self.config.num_classes)

    @property
    def learns_variance(self) -> bool:
        """Whether the second half of the output channels says where the variance lies between its bounds."""
        return bool(self.config.out_channels == 2 * self.config.in_channels)

    def forward(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool = True) -> Any:
        """The prediction `.sample` `(B, out_channels, h, w)`, in the precision of the weights.

        Args:
            hidden_states: noisy normalised latents `(B, d, h, w)`.
            timestep: `(B,)`, 0 (clean) to 1000 (noise).
            class_labels: `(B,)` int64; `num_classes` or more is no class.
        """
        tokens = self.patch_embed(hidden_states).flatten(2).transpose(1, 2) + self.position  # (B, N, D)
        labels = class_labels.clamp(max=self.num_classes)
        condition = self.time_embed(timestep) + self.class_embed(labels)  # (B, D)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, condition, self.layout, use_reentrant=False)  # type: ignore[assignment]
            else:
                tokens = block(tokens, condition, self.layout)
        shift, scale = self.modulation(self.act(condition)).chunk(2, dim=1)
        patches = in_weight_precision(self.to_latents, modulate(self.norm(tokens), shift, scale))  # (B, N, p * p * c)
        sample = self.unpatchify(patches)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def unpatchify(self, patches: Tensor) -> Tensor:
        """`(B, N, p * p * c)` to `(B, c, h, w)`."""
        side, p = self.layout.sides[-1], self.config.patch_size
        grid = patches.unflatten(1, (side, side)).unflatten(3, (p, p, -1))  # (B, s, s, p, p, c)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), -1, side * p, side * p)


def sinusoidal_positions(side: int, hidden_size: int) -> Tensor:
    """Fixed positions `(1, side * side, D)`: half of the channels tell the column, half the row, as in MAE and DiT."""
    rates = MAX_PERIOD ** -(torch.arange(hidden_size // 4, dtype=torch.float64) / (hidden_size // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * rates
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, D / 2)
    columns = waves[None, :].expand(side, -1, -1)
    rows = waves[:, None].expand(-1, side, -1)
    return torch.cat([columns, rows], dim=2).reshape(1, side * side, hidden_size).float()


# Saved pipelines name a class by its module; the package's own name outlives any move of this file.
DiT.__module__ = "hieratok"
