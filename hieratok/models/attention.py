"""Self-attention over the sequence of all scales, in the three patterns of Table 3 and the forms that compute them.

Every form gives the same result; they differ in speed. `prefix` runs one mask-free scaled-dot-product attention per
scale over the keys it may see, so that flash kernels stay eligible. `mask` runs one call with a boolean mask.
`matmul` writes softmax(q k^T) v out, which beats the flash kernels' backward in bf16 on a CPU by up to five times
where sequences are short. `auto` takes what `benchmarks/attention.py` measured to be the fastest.

Paper: Eq. 6 and 7.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .scales import ScaleLayout

# Up to here the CPU's written-out products beat its flash kernel in training (benchmarks/attention.py).
MATMUL_TOKENS = 128


def _mask(layout: ScaleLayout, pattern: str, device: torch.device) -> Tensor | None:
    # None where nothing is hidden: a mask of ones would cost the fast kernels.
    if pattern == "full" or len(layout.sides) == 1:
        return None
    return layout.attention_mask(pattern, device)


def attend_by_mask(q: Tensor, k: Tensor, v: Tensor, layout: ScaleLayout, pattern: str) -> Tensor:
    """One masked call over `(B, heads, N, head_dim)`; computes the hidden products too, but launches once."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=_mask(layout, pattern, q.device))


def attend_by_prefix(q: Tensor, k: Tensor, v: Tensor, layout: ScaleLayout, pattern: str) -> Tensor:
    """One mask-free call per scale over `(B, heads, N, head_dim)`, each with the keys that scale may see."""
    if pattern == "full" or len(layout.sides) == 1:
        return F.scaled_dot_product_attention(q, k, v)
    parts = []
    for (start, end), (first, last) in zip(layout.spans, layout.key_spans(pattern), strict=True):
        keys, values = k[:, :, first:last], v[:, :, first:last]
        parts.append(F.scaled_dot_product_attention(q[:, :, start:end], keys, values))
    return torch.cat(parts, dim=2)


def attend_by_matmul(q: Tensor, k: Tensor, v: Tensor, layout: ScaleLayout, pattern: str) -> Tensor:
    """softmax(q k^T) v over `(B, heads, N, head_dim)` as two products, the softmax in float32."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, heads, N, N)
    mask = _mask(layout, pattern, q.device)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype) @ v


ATTENTION_FORMS: dict[str, Callable[[Tensor, Tensor, Tensor, ScaleLayout, str], Tensor]] = {
    "prefix": attend_by_prefix,
    "mask": attend_by_mask,
    "matmul": attend_by_matmul,
}
ATTENTION_BACKENDS = ("auto", *ATTENTION_FORMS)


def fastest_form(q: Tensor) -> str:
    """What `auto` means for queries `(B, heads, N, head_dim)` on their device."""
    trains_on_cpu = q.device.type == "cpu" and q.requires_grad
    if trains_on_cpu and q.dtype == torch.bfloat16 and q.shape[2] <= MATMUL_TOKENS:
        return "matmul"
    return "mask" if trains_on_cpu else "prefix"


class Attention(nn.Module):
    """Multi-head self-attention without positions of its own."""

    def __init__(self, hidden_size: int, num_heads: int, qkv_bias: bool, backend: str) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size {hidden_size} is not divisible by num_heads {num_heads}")
        if backend not in ATTENTION_BACKENDS:
            raise ValueError(f"attention_backend '{backend}' is none of {', '.join(ATTENTION_BACKENDS)}")
        self.num_heads = num_heads
        self.backend = backend
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=qkv_bias)
        self.out = nn.Linear(hidden_size, hidden_size, bias=qkv_bias)

    def forward(self, tokens: Tensor, layout: ScaleLayout, pattern: str) -> Tensor:
        q, k, v = (
            self.qkv(tokens).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        )  # (B, heads, N, head_dim)
        form = fastest_form(q) if self.backend == "auto" else self.backend
        attended = ATTENTION_FORMS[form](q, k, v, layout, pattern)
        return self.out(attended.transpose(1, 2).flatten(2))  # (B, N, D)
