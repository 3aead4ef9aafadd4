"""From the full token map to one map per scale.

Paper: Sec. 3.2 (two strategies), App. E (three kernels per scale in the manner of ViTDet's simple feature pyramid).
The paper does not say what the three kernels are; `docs/paper.md` gives the reason for the choice made here.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map `(B, D, h, w)`."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvBranch(nn.Module):
    """Three convolutions from a grid of `grid_side` straight to one of `side`.

    A 2 x 2 convolution halves the grid, a depthwise one does the rest of the reduction in one step, a 3 x 3 mixes
    neighbours; each has a norm, GELU between. Where `side` does not divide the grid by an even number (12 of 16), the
    map is area-resized first and the kernels keep its size.
    """

    def __init__(self, hidden_size: int, grid_side: int, side: int, eps: float) -> None:
        super().__init__()
        self.side = side
        reduction, remainder = divmod(grid_side, side)
        self.halves = remainder == 0 and reduction % 2 == 0
        rest = reduction // 2 if self.halves else 1
        self.reduce = nn.Conv2d(hidden_size, hidden_size, 2, stride=2 if self.halves else 1)
        self.norm1 = ChannelNorm(hidden_size, eps=eps)
        self.pool = nn.Conv2d(hidden_size, hidden_size, rest, stride=rest, groups=hidden_size)
        self.norm2 = ChannelNorm(hidden_size, eps=eps)
        self.mix = nn.Conv2d(hidden_size, hidden_size, 3, padding=1)
        self.norm3 = ChannelNorm(hidden_size, eps=eps)

    def forward(self, token_map: Tensor) -> Tensor:
        """`(B, D, grid_side, grid_side)` to `(B, D, side, side)`."""
        if not self.halves:
            token_map = F.pad(F.adaptive_avg_pool2d(token_map, self.side), (0, 1, 0, 1))
        token_map = F.gelu(self.norm1(self.reduce(token_map)))
        token_map = F.gelu(self.norm2(self._pooled(token_map)))
        return self.norm3(self.mix(token_map))

    def _pooled(self, token_map: Tensor) -> Tensor:
        """The depthwise convolution, whose windows do not overlap: on a CPU one product and one sum.

        The general kernel takes up to forty times as long there, most of it backwards.
        """
        if token_map.device.type != "cpu":
            return self.pool(token_map)
        rest = self.pool.stride[0]
        windows = token_map.unflatten(3, (-1, rest)).unflatten(2, (-1, rest))  # (B, D, s, r, s, r)
        weight, bias = self.pool.weight, self.pool.bias
        assert bias is not None
        return (windows * weight.view(1, -1, 1, rest, 1, rest)).sum(dim=(3, 5)) + bias.view(1, -1, 1, 1)


class ConvDownsampler(nn.Module):
    """A branch of three convolutions for each coarse scale; the full-resolution map is passed through."""

    def __init__(self, hidden_size: int, scales: Sequence[int], eps: float) -> None:
        super().__init__()
        *coarse, grid_side = scales
        self.branches = nn.ModuleList(ConvBranch(hidden_size, grid_side, side, eps) for side in coarse)

    def forward(self, token_map: Tensor, num_scales: int) -> list[Tensor]:
        """The first `num_scales` maps `(B, D, s, s)` of `(B, D, h, w)`, coarse to fine."""
        maps = [branch(token_map) for branch in self.branches[:num_scales]]  # type: ignore[index,operator]
        return maps if num_scales <= len(self.branches) else [*maps, token_map]


class InterpolationDownsampler(nn.Module):
    """Area pooling of the full map to each scale; no parameters."""

    def __init__(self, hidden_size: int, scales: Sequence[int], eps: float) -> None:
        super().__init__()
        self.scales = tuple(scales)

    def forward(self, token_map: Tensor, num_scales: int) -> list[Tensor]:
        """The first `num_scales` maps `(B, D, s, s)` of `(B, D, h, w)`, coarse to fine."""
        return [F.adaptive_avg_pool2d(token_map, side) for side in self.scales[:num_scales]]


DOWNSAMPLERS: dict[str, type[ConvDownsampler] | type[InterpolationDownsampler]] = {
    "conv": ConvDownsampler,
    "interpolation": InterpolationDownsampler,
}
