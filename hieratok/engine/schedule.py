"""The learning rate: linear warm-up, then a cosine (Table 8)."""

from __future__ import annotations

import math


def warmup_cosine(progress: float, peak: float, final: float, warmup_ratio: float) -> float:
    """The rate at `progress` in [0, 1] of the run."""
    progress = min(max(progress, 0.0), 1.0)
    if progress < warmup_ratio:
        return peak * progress / warmup_ratio
    cosine = (1 + math.cos(math.pi * (progress - warmup_ratio) / (1 - warmup_ratio))) / 2
    return final + (peak - final) * cosine
