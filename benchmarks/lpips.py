"""Times LPIPS forward and backward with our fused distance against autograd's: `python benchmarks/lpips.py`.

Both run in turns in one process; what counts is the ratio.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor

from hieratok.losses.perceptual import LPIPS, inverse_norm


def by_autograd(lpips: LPIPS, images: Tensor, targets: Tensor) -> Tensor:
    """The formula as written, each step differentiated by autograd."""
    with torch.no_grad():
        target_maps = lpips.network.features(targets)
    distance = torch.zeros(len(images))
    for i, (a, b) in enumerate(zip(lpips.network.features(images), target_maps, strict=True)):
        a, b = a.float(), b.float()
        unit_a = a * torch.rsqrt(a.square().sum(dim=1, keepdim=True) + 1e-8)
        difference = (unit_a - b * inverse_norm(b)).square() * getattr(lpips, f"head{i}")
        distance = distance + difference.sum(dim=1).mean(dim=(1, 2))
    return distance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    torch.manual_seed(0)
    lpips = LPIPS("mini")
    targets = torch.rand(args.batch, 3, args.side, args.side) * 2 - 1
    images = (targets + 0.1 * torch.randn_like(targets)).requires_grad_()
    forms = {"fused": lpips, "autograd": lambda a, b: by_autograd(lpips, a, b)}
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(args.turns + 1):
        for name, form in forms.items():
            before = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16):
                loss = form(images, targets).mean()
            loss.backward()
            times[name].append(time.perf_counter() - before)
    medians = {name: sorted(values[1:])[len(values[1:]) // 2] for name, values in times.items()}
    print(f"LPIPS (mini), {args.batch} images of {args.side} px, bf16, {args.threads} threads, forward + backward")
    for name, seconds in medians.items():
        print(f"  {name:9} {1000 * seconds:7.1f} ms   {seconds / medians['fused']:.2f}x")


if __name__ == "__main__":
    main()
