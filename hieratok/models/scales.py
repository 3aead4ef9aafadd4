"""Where each scale lies in the decoder's sequence, and what it may see. Pure geometry: no parameters, no tensors kept.

Paper: Sec. 3.2, Eq. 5 (the sequence), Eq. 6 and 7 (the attention patterns), Table 4 (sets of scales).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

AttentionPattern = Literal["scale_causal", "scale_independent", "full"]
ATTENTION_PATTERNS: tuple[str, ...] = get_args(AttentionPattern)


@dataclass(frozen=True)
class ScaleLayout:
    """The sides of the token maps, coarse to fine, and the slice that each occupies in the sequence of all tokens.

    `ScaleLayout((1, 2, 4, 8, 16))` has 1 + 4 + 16 + 64 + 256 = 341 tokens (Table 7).
    """

    sides: tuple[int, ...]

    @classmethod
    def checked(cls, scales: Sequence[int], grid_side: int) -> ScaleLayout:
        """The layout of `scales` over a latent of `grid_side` x `grid_side` tokens.

        Raises:
            ValueError: not a strictly increasing list of positive sides that ends in `grid_side`.
        """
        sides = tuple(int(side) for side in scales)
        increasing = all(a < b for a, b in zip(sides, sides[1:], strict=False))
        if not sides or sides[0] < 1 or not increasing:
            raise ValueError(f"scales must be increasing positive sides, got {list(scales)}")
        if sides[-1] != grid_side:
            raise ValueError(
                f"scales {list(sides)} must end in the side of the latent: image_size / patch_size = {grid_side}"
            )
        return cls(sides)

    @property
    def num_tokens(self) -> int:
        """Length of the sequence of all scales."""
        return sum(side * side for side in self.sides)

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """`(start, end)` of each scale's tokens in the sequence."""
        spans, start = [], 0
        for side in self.sides:
            spans.append((start, start + side * side))
            start += side * side
        return tuple(spans)

    def up_to(self, max_scale: int | None) -> ScaleLayout:
        """The scales up to and including the one of side `max_scale` (all of them for None).

        Raises:
            ValueError: no scale of that side.
        """
        if max_scale is None:
            return self
        if max_scale not in self.sides:
            raise ValueError(f"max_scale={max_scale} is none of the scales {list(self.sides)}")
        return ScaleLayout(self.sides[: self.sides.index(max_scale) + 1])

    def key_spans(self, pattern: str) -> tuple[tuple[int, int], ...]:
        """For each scale, `(start, end)` of the tokens that its queries attend to."""
        if pattern == "scale_causal":  # Eq. 7: own and all coarser scales
            return tuple((0, end) for _, end in self.spans)
        if pattern == "scale_independent":  # Eq. 6: own scale only
            return self.spans
        if pattern == "full":
            return tuple((0, self.num_tokens) for _ in self.sides)
        raise ValueError(f"attention_pattern '{pattern}' is none of {', '.join(ATTENTION_PATTERNS)}")

    def attention_mask(self, pattern: str, device: torch.device | str = "cpu") -> Tensor:
        """`(N, N)` bool, True where the query of the row may attend to the key of the column."""
        mask = torch.zeros(self.num_tokens, self.num_tokens, dtype=torch.bool, device=device)
        for (start, end), (first, last) in zip(self.spans, self.key_spans(pattern), strict=True):
            mask[start:end, first:last] = True
        return mask

    def split(self, tokens: Tensor) -> list[Tensor]:
        """Token maps `(B, D, s, s)` of a sequence `(B, N, D)`, coarse to fine."""
        parts = tokens.split([side * side for side in self.sides], dim=1)
        return [part.transpose(1, 2).unflatten(2, (s, s)) for part, s in zip(parts, self.sides, strict=True)]

    @staticmethod
    def join(token_maps: Sequence[Tensor]) -> Tensor:
        """The sequence `(B, N, D)` of token maps `(B, D, s, s)` (Eq. 5)."""
        return torch.cat([token_map.flatten(2).transpose(1, 2) for token_map in token_maps], dim=1)
