"""Times the forms of scale-aware attention against each other: `python benchmarks/attention.py [--device cuda]`.

Prints milliseconds of forward and forward + backward, and the ratio to the `prefix` form in the same run. `auto` in
`hieratok/models/attention.py` is chosen by this.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor

from hieratok.models.attention import ATTENTION_FORMS
from hieratok.models.scales import ScaleLayout

# (name, scales, batch, heads, head_dim): the paper's decoder and the small presets'
SHAPES = [
    ("paper decoder", (1, 2, 4, 8, 16), 4, 16, 64),
    ("small-64 decoder", (1, 2, 4, 8), 64, 4, 64),
    ("encoder of small-64", (8,), 64, 4, 64),
]


def timed(call, device: str, seconds: float) -> float:
    """Median milliseconds of a call over about `seconds`."""
    samples: list[float] = []
    start = time.perf_counter()
    while len(samples) < 5 or time.perf_counter() - start < seconds:
        if device == "cuda":
            torch.cuda.synchronize()
        before = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        samples.append(1000 * (time.perf_counter() - before))
    return sorted(samples[1:])[len(samples[1:]) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=1.0, help="per measurement")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    for name, sides, batch, heads, head_dim in SHAPES:
        layout = ScaleLayout(sides)
        for pattern in ("scale_causal", "scale_independent", "full"):
            for dtype in (torch.bfloat16, torch.float32):
                print(f"\n{name} {list(sides)} batch {batch}, {pattern}, {str(dtype).removeprefix('torch.')}")
                reference: tuple[float, float] | None = None
                for form, attend in ATTENTION_FORMS.items():
                    shape = (batch, layout.num_tokens, 3, heads, head_dim)
                    qkv = torch.randn(shape, device=args.device, dtype=dtype, requires_grad=True)

                    def forward(qkv: Tensor = qkv, attend=attend, layout=layout, pattern=pattern) -> Tensor:
                        q, k, v = qkv.permute(2, 0, 3, 1, 4)
                        return attend(q, k, v, layout, pattern)

                    def both(forward=forward) -> None:
                        forward().sum().backward()

                    with torch.no_grad():
                        alone = timed(forward, args.device, args.seconds)
                    trained = timed(both, args.device, args.seconds)
                    reference = reference or (alone, trained)
                    ratios = f"{alone / reference[0]:6.2f} {trained / reference[1]:6.2f}"
                    print(f"  {form:8} forward {alone:8.2f} ms, with backward {trained:8.2f} ms, ratios {ratios}")


if __name__ == "__main__":
    main()
