"""Train the `mini` network that ships in `hieratok/losses/weights`.

    python tools/train_mini.py --train DATA --val DATA --out hieratok/losses/weights --epochs 12

DATA is any source that `hieratok` reads with 200 classes of 64 x 64 images. The result is a 200-class classifier in
half precision with its batch norms folded in, and a card that states its validation accuracy.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from hieratok.data.frame import Frame
from hieratok.data.opening import open_source
from hieratok.files import sha256_of
from hieratok.losses.mini import MiniNet

SIDE, PAD = 64, 6

CARD = """# mini

A convolutional network of {parameters:,} parameters with five stages (16, 32, 64, 128, 192 channels). It was trained
as a 200-class classifier on the 64 x 64 ImageNet subset (100,000 training images) by `tools/train_mini.py`
({epochs} epochs, batch {batch}, seed {seed}), has its batch norms folded into the convolutions and is stored in half
precision.

| what | value |
| --- | --- |
| top-1 accuracy on the {val_count:,} validation images, as shipped | {top1:.2%} |
| top-5 accuracy on the same images | {top5:.2%} |
| size on disk | {size:,} bytes |
| SHA-256 | `{sha}` |

It exists so that training and evaluation work on a machine with no network. Its distances are not those of VGG16 or
Inception, and every figure that it makes carries its name.
"""


def read_images(spec: str) -> tuple[np.ndarray, np.ndarray]:
    """All images `(N, 64, 64, 3)` uint8 and labels `(N,)` of a source."""
    source, frame = open_source(spec), Frame(SIDE)
    images = np.stack([source.pixels(i, frame, None) for i in range(len(source))])
    return images, np.array([source.label(i) for i in range(len(source))])


def augmented(images: np.ndarray, rng: np.random.Generator) -> Tensor:
    """Random shifts and flips of a batch `(B, 64, 64, 3)` as floats `(B, 3, 64, 64)` in [-1, 1]."""
    padded = np.pad(images, ((0, 0), (PAD, PAD), (PAD, PAD), (0, 0)), mode="reflect")
    rows, columns = rng.integers(0, 2 * PAD + 1, (2, len(images)))
    flips = rng.random(len(images)) < 0.5
    out = np.empty_like(images)
    for i, (row, column, flip) in enumerate(zip(rows, columns, flips, strict=True)):
        crop = padded[i, row : row + SIDE, column : column + SIDE]
        out[i] = crop[:, ::-1] if flip else crop
    return as_input(out)


def as_input(images: np.ndarray) -> Tensor:
    batch = torch.from_numpy(images).permute(0, 3, 1, 2).float().div(127.5).sub(1)
    return batch.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def accuracy(network: nn.Module, images: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Top-1 and top-5 accuracy in [0, 1]."""
    network.eval()
    top1 = top5 = 0
    for start in range(0, len(images), 500):
        target = torch.from_numpy(labels[start : start + 500])
        ranks = network(as_input(images[start : start + 500])).topk(5).indices == target[:, None]
        top1 += int(ranks[:, 0].sum())
        top5 += int(ranks.any(dim=1).sum())
    return top1 / len(images), top5 / len(images)


def fold_batch_norms(network: MiniNet) -> MiniNet:
    """The same function without batch norms."""
    plain = MiniNet()
    layers = {name: module for name, module in network.named_modules() if hasattr(module, "norm")}
    for name, layer in layers.items():
        fused = nn.utils.fuse_conv_bn_eval(layer.conv.eval(), layer.norm.eval())
        plain.get_submodule(name).conv.load_state_dict(fused.state_dict())
    plain.classifier.load_state_dict(network.classifier.state_dict())
    return plain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True)
    parser.add_argument("--val", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    images, labels = read_images(args.train)
    val_images, val_labels = read_images(args.val)
    print(f"{len(images)} training and {len(val_images)} validation images", flush=True)

    network = MiniNet(batch_norm=True).to(memory_format=torch.channels_last)
    decayed = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim <= 1]
    optimizer = torch.optim.SGD(
        [{"params": decayed, "weight_decay": 5e-4}, {"params": others, "weight_decay": 0.0}],
        lr=args.lr,
        momentum=0.9,
        nesterov=True,
    )
    steps_per_epoch = len(images) // args.batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=args.lr,
        total_steps=args.epochs * steps_per_epoch,
        pct_start=0.2,
        anneal_strategy="cos",
        cycle_momentum=False,
    )
    for epoch in range(args.epochs):
        network.train()
        order, started, total = rng.permutation(len(images)), time.monotonic(), 0.0
        for step in range(steps_per_epoch):
            chosen = order[step * args.batch : (step + 1) * args.batch]
            with torch.autocast("cpu", torch.bfloat16):
                logits = network(augmented(images[chosen], rng))
            loss = F.cross_entropy(logits.float(), torch.from_numpy(labels[chosen]), label_smoothing=0.1)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
            if step % 50 == 0:
                rate = (step + 1) * args.batch / (time.monotonic() - started)
                print(
                    f"epoch {epoch} step {step}/{steps_per_epoch} loss {loss.item():.3f} {rate:.0f} images/s",
                    flush=True,
                )
        top1, top5 = accuracy(fold_batch_norms(network), val_images, val_labels)
        print(
            f"epoch {epoch}: loss {total / steps_per_epoch:.3f}, top-1 {top1:.2%}, top-5 {top5:.2%}",
            flush=True,
        )
        export(fold_batch_norms(network), val_images, val_labels, args)


def export(network: MiniNet, val_images: np.ndarray, val_labels: np.ndarray, args: argparse.Namespace) -> None:
    """Write the half-precision weights and the card with the accuracy of exactly those weights."""
    args.out.mkdir(parents=True, exist_ok=True)
    half = {name: tensor.half().contiguous() for name, tensor in network.state_dict().items()}
    path = args.out / "mini.safetensors"
    save_file(half, path)
    network.load_state_dict({name: tensor.float() for name, tensor in half.items()})
    top1, top5 = accuracy(network, val_images, val_labels)
    card = CARD.format(
        parameters=sum(p.numel() for p in network.parameters()), epochs=args.epochs, batch=args.batch, seed=args.seed,
        val_count=len(val_images), top1=top1, top5=top5, size=path.stat().st_size, sha=sha256_of(path),
    )  # fmt: skip
    (args.out / "mini_card.md").write_text(card)


if __name__ == "__main__":
    main()
