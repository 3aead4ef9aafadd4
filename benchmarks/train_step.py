"""Where a training step's time goes, beside its floor: `python benchmarks/train_step.py --config small-64`.

The floor is the step's multiplications over the rate that this machine reaches on a large bf16 matrix product, both
measured in the same run. A step does about three times the operations of a forward pass.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from hieratok.config import load_recipe
from hieratok.data.decode import to_float
from hieratok.data.loader import train_loader
from hieratok.engine.optimizers import make_optimizers
from hieratok.losses import TokenizerLoss
from hieratok.models.cost import cost
from hieratok.models.presets import build_model
from hieratok.training.tokenizer import TokenizerRun


def seconds_of(call: Callable[[], object], turns: int) -> float:
    """Median of a call, the first one left out."""
    times = []
    for _ in range(turns + 1):
        before = time.perf_counter()
        call()
        times.append(time.perf_counter() - before)
    return sorted(times[1:])[turns // 2]


def matrix_rate() -> float:
    """Operations per second of a 2048 x 2048 product in bf16."""
    a, b = torch.randn(2, 2048, 2048, dtype=torch.bfloat16)
    return 2 * 2048**3 / seconds_of(lambda: a @ b, 9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="small-64")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    run = TokenizerRun.from_mapping({**load_recipe(args.config), "output": "unused"})
    model = build_model(run.model).train()
    criterion = TokenizerLoss(run.loss, model.config.scales, model.config.image_size)
    optimizers = make_optimizers(model, run.train)
    frame = run.data.frame(model.config.image_size)
    batch = next(iter(train_loader(run.data.open("train"), frame, seed=0, batch_size=run.train.batch_size)))
    images = to_float(batch.images)

    def forward():
        with torch.autocast("cpu", torch.bfloat16):
            return model(images)

    def forward_and_loss():
        output = forward()
        with torch.autocast("cpu", torch.bfloat16):
            return criterion(output, images).total

    def gradients():
        forward_and_loss().backward()

    def step():
        gradients()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    floor = 3 * cost(run.model).flops * len(images) / matrix_rate()
    print(f"{args.config}, {len(images)} images, {args.threads} threads; floor {1000 * floor:.0f} ms")
    for name, call in {"forward": forward, "+ loss": forward_and_loss, "+ backward": gradients, "+ step": step}.items():
        seconds = seconds_of(call, args.turns)
        print(
            f"  {name:11} {1000 * seconds:7.0f} ms   {seconds / floor:5.2f} x floor {len(images) / seconds:7.1f} img/s"
        )


if __name__ == "__main__":
    main()
