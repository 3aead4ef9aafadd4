"""What each term of stage 2 adds to a training step: `python benchmarks/stage2_step.py --model small-64`.

Whole steps of the engine, optimizers included, by turns in one run; a step of stage 1 is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from dataclasses import replace

import torch

from hieratok.config import apply_overrides, load_recipe
from hieratok.data.loader import train_loader
from hieratok.engine.loop import make_accelerator
from hieratok.training.plan import idle_engine
from hieratok.training.tokenizer import TokenizerRun, make_model, make_terms, train_step

GAN = "loss.adversarial.weight=0.6"
FIXED = "loss.adversarial.adaptive=false"
VF = "loss.alignment.weight=0.1"
VARIANTS: dict[str, tuple[str, ...]] = {
    "stage 1": (),
    "stylegan": (GAN, "discriminator.kind=stylegan"),
    "stylegan, fixed weight": (GAN, "discriminator.kind=stylegan", FIXED),
    "stylegan, R1": (GAN, "discriminator.kind=stylegan", "loss.adversarial.r1=1"),
    "stylegan, augmented": (GAN, "loss.adversarial.augment=[color,translation,cutout]"),
    "patchgan": (GAN, "discriminator.kind=patchgan"),
    "dino (mini)": (GAN, "discriminator.kind=dino"),
    "VF (mini)": (VF,),
    "VF (mini), fixed weight": (VF, "loss.alignment.adaptive=false"),
    "stylegan and VF (mini)": (GAN, VF),
    "decoder only": (),
    "decoder only, stylegan": (GAN,),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="small-64", help="a recipe of the first stage")
    parser.add_argument("--width", type=float, default=0.25, help="of the discriminators")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--turns", type=int, default=17, help="of each variant; R1 is in one step of 16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    base = [f"discriminator.width={args.width}", f"train.batch_size={args.batch_size}", "output=unused"]
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    with contextlib.ExitStack() as stack:
        steps = {}
        for name, overrides in VARIANTS.items():
            run = TokenizerRun.from_mapping(apply_overrides(load_recipe(args.model), [*base, *overrides]))
            if name.startswith("decoder only"):  # of an encoder that was not trained, which costs the same
                run = replace(run, train=replace(run.train, freeze="encoder"))
            accelerator = make_accelerator(run.train, run.seed)
            model, criterion = make_model(run, accelerator.device)
            engine = stack.enter_context(idle_engine(run.train, accelerator, model, 1000))
            terms = make_terms(run, model, engine)
            steps[name] = (engine, criterion, terms)
        frame = run.data.frame(int(model.config.image_size))
        batch = next(iter(train_loader(run.data.open("train"), frame, seed=0, batch_size=args.batch_size)))
        for turn in range(args.turns + 1):
            for name, (engine, criterion, terms) in steps.items():
                before = time.perf_counter()
                train_step(engine, criterion, terms, iter([batch]))
                if turn:  # the first one allocates
                    times[name].append(time.perf_counter() - before)
    plain = sum(times["stage 1"]) / args.turns
    print(f"{args.model}, {args.batch_size} images, discriminators of width {args.width:g}, {args.threads} threads")
    for name, seconds in times.items():
        mean = sum(seconds) / len(seconds)
        print(f"  {name:26} {1000 * mean:7.0f} ms   {mean / plain:5.2f} x a step of stage 1")


if __name__ == "__main__":
    main()
