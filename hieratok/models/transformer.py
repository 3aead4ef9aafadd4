"""The pre-norm transformer that both the encoder and the decoder are.

Paper: Sec. 3.1, Table 10 (no biases in attention and MLP, LayerNorm eps 1e-6, drop path in the decoder).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import Attention
from .scales import ScaleLayout


class Mlp(nn.Module):
    """Two linear layers with GELU between (`approximate`: as `nn.GELU` has it)."""

    def __init__(self, hidden_size: int, mlp_ratio: float, bias: bool, approximate: str = "none") -> None:
        super().__init__()
        self.up = nn.Linear(hidden_size, int(hidden_size * mlp_ratio), bias=bias)
        self.act = nn.GELU(approximate)
        self.down = nn.Linear(int(hidden_size * mlp_ratio), hidden_size, bias=bias)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.down(self.act(self.up(tokens)))


class Block(nn.Module):
    """Attention and MLP, each on normalised tokens and added back."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        mlp_bias: bool,
        eps: float,
        backend: str,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=eps)
        self.attention = Attention(hidden_size, num_heads, qkv_bias, backend)
        self.norm2 = nn.LayerNorm(hidden_size, eps=eps)
        self.mlp = Mlp(hidden_size, mlp_ratio, mlp_bias)

    def forward(self, tokens: Tensor, layout: ScaleLayout, pattern: str, keep: tuple[Tensor, Tensor] | None) -> Tensor:
        """`keep`: what each branch of each sample is multiplied by, two tensors `(B, 1, 1)`; None keeps all."""
        if keep is None:
            tokens = tokens + self.attention(self.norm1(tokens), layout, pattern)
            return tokens + self.mlp(self.norm2(tokens))
        tokens = tokens + keep[0] * self.attention(self.norm1(tokens), layout, pattern)
        return tokens + keep[1] * self.mlp(self.norm2(tokens))


class Transformer(nn.Module):
    """`num_layers` blocks and a final norm over tokens `(B, N, D)`."""

    def __init__(
        self,
        num_layers: int,
        hidden_size: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        mlp_bias: bool,
        eps: float,
        drop_path_rate: float,
        backend: str,
    ) -> None:
        super().__init__()
        self.drop_path_rate = drop_path_rate
        self.blocks = nn.ModuleList(
            Block(hidden_size, num_heads, mlp_ratio, qkv_bias, mlp_bias, eps, backend) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(hidden_size, eps=eps)
        self.gradient_checkpointing = False

    def forward(
        self,
        tokens: Tensor,
        layout: ScaleLayout,
        pattern: str,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> Tensor:
        """Tokens `(B, N, D)` of `layout` under an attention pattern; `generator` draws the drop path."""
        keeps = self._draw_keeps(tokens, generator)
        for block, keep in zip(self.blocks, keeps, strict=True):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, layout, pattern, keep, use_reentrant=False)
            else:
                tokens = block(tokens, layout, pattern, keep)
        return self.norm(tokens)

    def _draw_keeps(
        self, tokens: Tensor, generator: torch.Generator | list[torch.Generator] | None
    ) -> list[tuple[Tensor, Tensor] | None]:
        """Drop path (stochastic depth), its rate rising linearly with depth as in timm and DeiT.

        All is drawn before the first block: the blocks stay free of randomness, so gradient checkpointing and
        compilation need no care, and with a generator per sample the draw does not depend on the batch around it.
        """
        layers = len(self.blocks)
        if not self.training or self.drop_path_rate == 0.0:
            return [None] * layers
        batch = len(tokens)
        if isinstance(generator, list):
            drawn = torch.stack([torch.rand(layers, 2, generator=g, device=g.device) for g in generator], dim=2)
        else:
            device = tokens.device if generator is None else generator.device
            drawn = torch.rand(layers, 2, batch, generator=generator, device=device)
        rates = torch.linspace(0, self.drop_path_rate, layers).view(-1, 1, 1).to(drawn)
        keeps = ((drawn >= rates) / (1 - rates)).to(tokens.device)[..., None, None]  # (layers, 2, B, 1, 1)
        return [(attention, mlp) for attention, mlp in keeps]
