"""A generator's training step beside its floor, and beside diffusers' DiT: `python benchmarks/generator_step.py`.

The floor is the step's multiplications (three times those of a forward pass) over the rate that this machine reaches on
a large bf16 matrix product, measured in the same run. diffusers' `DiTTransformer2DModel` of the same width and depth
has more parameters, since each of its blocks embeds time and class anew; both predict the same shape.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn
from train_step import matrix_rate, seconds_of

from hieratok.engine.optimizers import make_optimizers
from hieratok.engine.settings import TrainConfig
from hieratok.losses.diffusion import DiffusionLossConfig, FlowLoss
from hieratok.models.cost import dit_cost
from hieratok.models.presets import DIT_PRESETS, build_dit

NUM_CLASSES = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="dit-tiny", choices=DIT_PRESETS)
    parser.add_argument("--side", type=int, default=8, help="of the latents")
    parser.add_argument("--patch-size", type=int, default=1)
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args()

    fields = {
        "preset": args.preset, "sample_size": args.side, "in_channels": args.channels, "patch_size": args.patch_size,
        "out_channels": args.channels, "num_classes": NUM_CLASSES,
    }  # fmt: skip
    ours = build_dit(fields)
    size = DIT_PRESETS[args.preset]
    theirs = DiTTransformer2DModel(
        num_attention_heads=size["num_heads"], attention_head_dim=size["hidden_size"] // size["num_heads"],
        in_channels=args.channels, out_channels=args.channels, num_layers=size["num_layers"], sample_size=args.side,
        patch_size=args.patch_size, num_embeds_ada_norm=NUM_CLASSES,
    )  # fmt: skip
    latents = torch.randn(args.batch_size, args.channels, args.side, args.side)
    labels = torch.randint(0, NUM_CLASSES, (args.batch_size,))
    generators = [torch.Generator().manual_seed(i) for i in range(args.batch_size)]
    criterion = FlowLoss(DiffusionLossConfig("flow"), NUM_CLASSES)

    def gradients_of(model: nn.Module, predict: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], None]:
        def call() -> None:
            model.zero_grad(set_to_none=True)
            with torch.autocast("cpu", torch.bfloat16):
                loss = criterion(predict, latents, labels, generators).total
            loss.backward()

        return call

    def optimizers_of(kind: str) -> Callable[[], None]:
        optimizers = make_optimizers(ours, TrainConfig(optimizer=kind))  # type: ignore[arg-type]
        return lambda: [optimizer.step() for optimizer in optimizers]  # type: ignore[return-value,func-returns-value]

    rate = matrix_rate()
    floor = 3 * dit_cost(fields)[1] * args.batch_size / rate
    mine = seconds_of(gradients_of(ours, lambda x, t, y: ours(x, t, y).sample), args.turns)
    other = seconds_of(gradients_of(theirs, lambda x, t, y: theirs(x, t, y).sample), args.turns)
    print(f"{args.preset}, {args.side} x {args.side} x {args.channels}, patch {args.patch_size}, "
          f"batch {args.batch_size}, bf16; {torch.get_num_threads()} threads, {rate / 1e9:.0f} Gop/s")  # fmt: skip
    print(f"floor of forward and backward   {floor:.3f} s")
    print(f"forward and backward            {mine:.3f} s   {mine / floor:.2f} x the floor")
    print(f"the same of diffusers' DiT      {other:.3f} s   {other / mine:.2f} x ours")
    for kind in ("adamw", "muon"):
        seconds = seconds_of(optimizers_of(kind), args.turns)
        print(f"step of {kind:5}                   {seconds:.3f} s   {seconds / mine:.2f} x forward and backward")


if __name__ == "__main__":
    main()
