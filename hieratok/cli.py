"""The command line: words to calls. Every command has a Python function of the same name behind it.

Libraries are imported inside the commands, so that `--help` is instant.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from . import __version__
from .errors import ConfigError, HieratokError

DATA_HELP = "'openmoji', a folder of images, or .parquet or .tar files (a file, a folder of them, or a 'pattern')"
MODEL_HELP = "the folder of a run, of one of its checkpoints, or of a saved model"
TOKENIZER_HELP = MODEL_HELP + ", or an autoencoder of diffusers by folder or hub id"
GENERATOR_HELP = "the folder of a generator's run, or of a saved pipeline"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status: 0, 2 for an error that the message explains, 128 + signal when stopped."""
    tune_process()
    parsed = parse(arguments)
    try:
        parsed.run(parsed)
    except HieratokError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as in `hieratok presets | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; `key=value` may stand anywhere behind `train tokenizer`, also on both sides of an option."""
    parser = make_parser()
    parsed, rest = parser.parse_known_args(arguments)
    if rest and not (hasattr(parsed, "overrides") and all("=" in word and word[0] != "-" for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        parsed.overrides += rest
    return parsed


def is_main_process() -> bool:
    """Of those that torchrun started; a process alone is."""
    return int(os.environ.get("RANK", "0")) == 0


def tune_process() -> None:
    """Settings of the process that make training on a CPU faster; they must precede the import of torch."""
    # Threads that spin long for their next work take the cores from the data workers; those that sleep at once are
    # slow to wake. On 2 cores, 10000 costs 4% while nothing else runs, and is twice as fast as the default beside
    # another busy process.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # glibc gives large blocks back to the system at once, and every step pays for fresh pages: a tenth of its time.
    if sys.platform == "linux":
        mmap_threshold, trim_threshold, keep = -3, -1, 2**31 - 1
        with contextlib.suppress(OSError, AttributeError):  # another C library
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(mmap_threshold, keep)
            mallopt(trim_threshold, keep)


def make_parser() -> argparse.ArgumentParser:
    """Commands and options; each command's function is its `run`."""
    parser = argparse.ArgumentParser(
        prog="hieratok",
        description="Train, use and measure a multi-scale ViT image tokenizer, and generators on its latents.",
        epilog="New here? `hieratok quickstart` trains a small one of each in minutes and shows you what they do.",
    )
    parser.add_argument("--version", action="version", version=f"hieratok {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    add_quickstart(commands)
    add_train(commands)
    add_reconstruct(commands)
    add_encode(commands)
    add_sample(commands)
    add_evaluate(commands)
    add_compare(commands)
    add_report(commands)
    add_cost(commands)
    add_presets(commands)
    return parser


def add_command(commands: Any, name: str, run: Callable[[argparse.Namespace], None], help: str, **kwargs: Any) -> Any:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser(name, help=help, description=kwargs.pop("description", help),
                                 formatter_class=formatter, **kwargs)  # fmt: skip
    parser.set_defaults(run=run)
    return parser


# quickstart


def add_quickstart(commands: Any) -> None:
    parser = add_command(
        commands, "quickstart", run_quickstart, "train a small tokenizer and a generator in minutes; a report of both",
        description="Train a 64-px multi-scale tokenizer for a few minutes, on colour emoji or on your own images,\n"
        "then a generator on its latents, judge both, and write everything into one page, report.html.",
    )  # fmt: skip
    parser.add_argument("--data", metavar="DATA", help=f"{DATA_HELP} (default: openmoji)")
    parser.add_argument("--minutes", type=float, help="how long to train the tokenizer (default: 3)")
    parser.add_argument("--generator-minutes", type=float, metavar="MINUTES",
                        help="how long to train the generator; 0 trains none (default: 4)")  # fmt: skip
    parser.add_argument("--output", default="runs/quickstart", metavar="FOLDER", help="default: runs/quickstart")
    parser.add_argument("--seed", type=int, help="default: 0")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run, as it was begun")
    parser.add_argument("--overwrite", action="store_true", help="replace a run that is there")


def run_quickstart(args: argparse.Namespace) -> None:
    from .quickstart import quickstart

    path = quickstart(
        data=args.data, minutes=args.minutes, output=args.output, generator_minutes=args.generator_minutes,
        seed=args.seed, resume=args.resume, overwrite=args.overwrite,
    )  # fmt: skip
    print(f"\nOpen {path.resolve().as_uri()} in a browser.")


# train


def add_train(commands: Any) -> None:
    train = commands.add_parser("train", help="train a tokenizer on your images, or a generator on its latents")
    kinds = train.add_subparsers(metavar="WHAT", required=True)
    parser = add_command(
        kinds, "tokenizer", run_train_tokenizer, "train a tokenizer",
        description="Train a tokenizer as a recipe says. `hieratok presets` lists the recipes; a file of your own may\n"
        "extend one. Whatever a recipe says can be changed at the end of the line:\n\n"
        "  hieratok train tokenizer --config small-64 data.source=photos train.max_minutes=30 output=runs/photos",
        epilog="Several processes: torchrun --nproc_per_node N -m hieratok train tokenizer ...",
    )  # fmt: skip
    add_recipe(parser)
    parser = add_command(
        kinds, "generator", run_train_generator, "train a generator (DiT) on the latents of a tokenizer",
        description="Train a class-conditional DiT on the latents of a tokenizer, as a recipe says: from a folder\n"
        "that `hieratok encode` made, or encoding images as they come:\n\n"
        "  hieratok train generator --config dit-small tokenizer=runs/photos latents=latents data.source=photos",
        epilog="Several processes: torchrun --nproc_per_node N -m hieratok train generator ...",
    )  # fmt: skip
    add_recipe(parser)


def add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="NAME_OR_FILE", help="a recipe's name or a YAML file; with --resume it may "
                        "be left out, and the run's own is used")  # fmt: skip
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. train.learning_rate=1e-4")
    parser.add_argument("--resume", action="store_true", help="go on from the newest whole checkpoint in output")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved recipe, the model's cost and how "
                        "long it will take; write nothing")  # fmt: skip


def run_train_tokenizer(args: argparse.Namespace) -> None:
    from .evaluation.judge import judge, prepare
    from .training.plan import plan
    from .training.tokenizer import TokenizerRun, train_tokenizer

    run = TokenizerRun.from_mapping(resolve(args, "tokenizer"))
    prepare(run)
    if args.dry_run:
        show(plan(run).describe())
        return
    folder = train_tokenizer(run, resume=args.resume, evaluator=judge)
    if is_main_process():
        print(f"\nrun: {folder}\nreport: hieratok report {folder}\nreconstruct: hieratok reconstruct IMAGES... "
              f"--model {folder}")  # fmt: skip


def run_train_generator(args: argparse.Namespace) -> None:
    from .testbed import TOOLS, prepare
    from .training.generator import GeneratorRun, train_generator
    from .training.plan import plan

    run = GeneratorRun.from_mapping(resolve(args, "generator"))
    prepare(run)
    if args.dry_run:
        show(plan(run).describe())
        return
    folder = train_generator(run, resume=args.resume, tools=TOOLS)
    show(f"\nrun: {folder}\nreport: hieratok report {folder}\nsample: hieratok sample {folder}")


def show(text: str) -> None:
    """Print, on one process only."""
    if is_main_process():
        print(text)


def resolve(args: argparse.Namespace, kind: str) -> dict[str, Any]:
    """A recipe's mapping with overrides; on resuming without a recipe, that of the run itself.

    Raises:
        ConfigError: no recipe, nothing to resume, or a recipe of another kind than `kind`.
    """
    from pathlib import Path

    from .config import apply_overrides, load_recipe, recipe_kind
    from .engine.run_folder import CONFIG

    if args.config is not None:
        recipe = args.config
    else:
        values = apply_overrides({}, args.overrides)
        if not args.resume:
            raise ConfigError("give a recipe: --config NAME or --config FILE.yaml (`hieratok presets` lists the names)")
        path = Path(values.get("output", f"runs/{kind}")) / CONFIG
        if not path.exists():
            raise ConfigError(f"nothing to resume: there is no {path}; name the run's folder with output=FOLDER")
        recipe = str(path.resolve())
    found = recipe_kind(recipe)
    if found != kind:
        raise ConfigError(f"{recipe} is the recipe of a {found}; use it with hieratok train {found}")
    return apply_overrides(load_recipe(recipe), args.overrides)


# reconstruct, encode, evaluate


def add_reconstruct(commands: Any) -> None:
    parser = add_command(
        commands, "reconstruct", run_reconstruct, "draw images beside their reconstruction at every scale",
        description="Draw images beside their reconstruction at every scale and a map of the error.",
    )  # fmt: skip
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument("--model", required=True, metavar="PATH", help=MODEL_HELP)
    parser.add_argument("--output", default="reconstructions.png", metavar="FILE", help="default: reconstructions.png")
    parser.add_argument(
        "--separate", metavar="FOLDER", help="also write every reconstruction as a file of its own here"
    )
    add_device(parser)


def run_reconstruct(args: argparse.Namespace) -> None:
    from .report.reconstruct import reconstruct

    path, psnr = reconstruct(args.images, args.model, args.output, separate=args.separate, device=device_of(args))
    for name, value in psnr.items():
        print(f"{value:6.2f} dB  {name}")
    print(f"drawn in {path}")


def add_encode(commands: Any) -> None:
    parser = add_command(
        commands, "encode", run_encode, "turn a set of images into latents on disk",
        description="Encode a set of images into safetensors shards with a manifest and per-channel statistics, for a\n"
        "generator to learn from. Run it again to finish an interrupted job.",
    )  # fmt: skip
    parser.add_argument("data", metavar="DATA", help=DATA_HELP)
    parser.add_argument("--model", required=True, metavar="PATH", help=TOKENIZER_HELP)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the shards")
    parser.add_argument("--image-size", type=int, metavar="N", help="of an autoencoder whose config does not say")
    parser.add_argument("--posterior", choices=("moments", "mode", "sample"), default="moments",
                        help="what is stored of each posterior; of its moments, mean and log-variance, every epoch "
                        "draws another sample (default: moments)")  # fmt: skip
    parser.add_argument("--flip", action=argparse.BooleanOptionalAction, default=True,
                        help="store the mirrored images' latents too (default: yes)")  # fmt: skip
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N images")
    parser.add_argument("--shard-size", type=int, default=10_000, metavar="N", help="images per shard (default: 10000)")
    add_batches(parser)


def run_encode(args: argparse.Namespace) -> None:
    from .data.latents import encode
    from .data.opening import open_source
    from .engine.run_folder import load_autoencoder

    manifest = encode(
        load_autoencoder(args.model, args.image_size), open_source(args.data), args.out, batch_size=args.batch_size,
        shard_size=args.shard_size, posterior=args.posterior, flip=args.flip, num_workers=args.num_workers,
        precision=args.precision, seed=args.seed, limit=args.limit, device=device_of(args),
    )  # fmt: skip
    print(f"{manifest['num_images']:,} images in {len(manifest['shards'])} shard(s): {args.out}")


# sample


def add_sample(commands: Any) -> None:
    parser = add_command(
        commands, "sample", run_sample, "generate images, class by class, at every scale if you like",
        description="Draw a grid of generated images, a row per class, and beside it a record of seeds and settings.\n"
        "With --scales every image is shown at every scale. With --num-images a set of images is written instead,\n"
        "which an evaluation reads and an interrupted job goes on with. With --strip the pictures that a run painted\n"
        "while it learned become one strip, or a .gif or .webp.",
        epilog="Several processes (--num-images): torchrun --nproc_per_node N -m hieratok sample ...",
    )  # fmt: skip
    parser.add_argument("model", metavar="GENERATOR", help=GENERATOR_HELP)
    parser.add_argument("--classes", nargs="+", default=[], metavar="CLASS", help="numbers or names (default: 8 spread "
                        "over all)")  # fmt: skip
    parser.add_argument("--per-class", type=int, default=6, metavar="N", help="images of each class (default: 6)")
    parser.add_argument("--scales", action="store_true", help="a row per image, a column per scale")
    parser.add_argument("--output", metavar="FILE", help="the picture (default: samples.png), or with --num-images the "
                        "folder (default: samples)")  # fmt: skip
    parser.add_argument("--separate", metavar="FOLDER", help="also write every image as a file of its own here")
    parser.add_argument("--num-images", type=int, metavar="N", help="write a set of N images into the folder --output")
    parser.add_argument("--npz", metavar="FILE", help="with --num-images, also write them as ADM's npz of samples")
    parser.add_argument("--decoder", metavar="TOKENIZER", help="paint with the decoder of a tokenizer that was trained "
                        "with train.freeze=encoder from the generator's own")  # fmt: skip
    parser.add_argument("--strip", action="store_true", help="the run's own pictures across training, as one picture")
    add_sampling(parser)
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    add_device(parser)


def add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--scheduler", help="ddpm, ddim or dpm++; of a flow model euler or dpm++ (default: the run's)")
    parser.add_argument("--steps", type=int, metavar="N", help="denoising steps (default: the run's)")
    parser.add_argument("--guidance", type=float, metavar="SCALE", help="1 is none (default: the run's)")
    parser.add_argument("--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"),
                        help="times, 0 (clean) to 1 (noise), between which guidance acts")  # fmt: skip
    parser.add_argument("--labels", choices=("random", "balanced", "data"), default="random",
                        help="of a set: any class, each as often as any other, or as often as in the training data "
                        "(default: random)")  # fmt: skip
    parser.add_argument("--sampling-precision", choices=("bf16", "fp32"), help="of the networks (default: the run's)")


def sampling_of(args: argparse.Namespace, pictures: bool = False) -> Any:
    """The run's sampling settings, of figures or of pictures, with what the command line says otherwise."""
    from dataclasses import replace
    from pathlib import Path

    from .engine.settings import SamplingConfig
    from .testbed import run_of

    run = run_of(Path(args.model))
    known = run.sampling if run is not None else SamplingConfig()
    if pictures:
        known = known.for_pictures()
    if args.scheduler is not None and args.steps is None:
        known = replace(known, num_inference_steps=None)  # the steps of another scheduler would mean nothing
    said = {
        "scheduler": args.scheduler, "num_inference_steps": args.steps, "guidance_scale": args.guidance,
        "guidance_interval": tuple(args.guidance_interval) if args.guidance_interval else None,
        "precision": args.sampling_precision,
    }  # fmt: skip
    return replace(known, **{key: value for key, value in said.items() if value is not None})


def run_sample(args: argparse.Namespace) -> None:
    if args.strip:
        from .report.strip import strip

        print(f"drawn in {strip(args.model, args.output or 'strip.png')}")
        return
    if args.num_images is None:
        from .testbed import sample

        path = sample(
            args.model, args.output or "samples.png", classes=args.classes, per_class=args.per_class,
            scales=args.scales, sampling=sampling_of(args, pictures=True), seed=args.seed, separate=args.separate,
            decoder=args.decoder, device=device_of(args),
        )  # fmt: skip
        print(f"drawn in {path}, seeds and settings in {path.with_suffix('.json')}")
        return
    from .testbed import draw_set

    folder = args.output or "samples"
    accelerator = accelerator_of_several()
    draw_set(
        args.model, folder, args.num_images, labels=args.labels, sampling=sampling_of(args), seed=args.seed,
        npz=args.npz, decoder=args.decoder, accelerator=accelerator, device=None if accelerator else device_of(args),
    )  # fmt: skip
    show(f"{args.num_images:,} images in {folder}" + (f" and {args.npz}" if args.npz else ""))


# evaluate


def add_evaluate(commands: Any) -> None:
    evaluate = commands.add_parser("evaluate", help="measure a tokenizer or a generator")
    kinds = evaluate.add_subparsers(metavar="WHAT", required=True)
    parser = add_command(
        kinds, "reconstruction", run_evaluate_reconstruction, "rFID, PSNR, SSIM and LPIPS of reconstructions",
        description="Reconstruct a set of images and compare: rFID, PSNR, SSIM, LPIPS and L1, at every scale. The\n"
        "protocol that the figures depend on is printed and stored with them.",
        epilog="Several processes: torchrun --nproc_per_node N -m hieratok evaluate reconstruction ...",
    )  # fmt: skip
    parser.add_argument("data", nargs="?", metavar="DATA", help=f"{DATA_HELP}; without it, the images that the run of "
                        "--model held out")  # fmt: skip
    parser.add_argument("--model", required=True, metavar="PATH", help=MODEL_HELP)
    parser.add_argument("--split", choices=("all", "train", "val"), default="all",
                        help="the part of DATA, as training divides it by itself (default: all)")  # fmt: skip
    parser.add_argument("--num-images", type=int, metavar="N", help="N images spread over the set (default: all)")
    parser.add_argument("--features", default="mini", help="network of the Frechet distance: 'mini', which ships with "
                        "the package, or 'inception', the published one (default: mini)")  # fmt: skip
    parser.add_argument("--feature-weights", metavar="FILE", help="a local file of its weights, instead of a download")
    parser.add_argument("--lpips", choices=("mini", "vgg16"), default="mini", help="default: mini")
    parser.add_argument("--lpips-weights", metavar="FILE", help="a local file of its weights, instead of a download")
    parser.add_argument("--posterior", choices=("mode", "sample"), default="mode", help="default: mode")
    parser.add_argument("--output", metavar="FILE", help="write the result as JSON")
    add_batches(parser)
    parser = add_command(
        kinds, "generation", run_evaluate_generation, "gFID, sFID, Inception Score, precision and recall of samples",
        description="Draw samples of a generator (--model), or take those that are there (--samples: a set that\n"
        "`hieratok sample` drew, a folder of images, or an npz), and compare them with real images. The protocol that\n"
        "the figures depend on is printed and stored with them. Interrupted sampling goes on where it stopped.",
        epilog="Several processes: torchrun --nproc_per_node N -m hieratok evaluate generation ...",
    )  # fmt: skip
    parser.add_argument("--model", metavar="GENERATOR", help=GENERATOR_HELP)
    parser.add_argument("--samples", metavar="PATH", help="generated images; with --model, the folder to draw them "
                        "into (default: GENERATOR-samples)")  # fmt: skip
    parser.add_argument("--reference", metavar="DATA", help="real images, as DATA elsewhere, or an npz of statistics "
                        "in ADM's format (default: what the run of --model was trained on)")  # fmt: skip
    parser.add_argument("--num-images", type=int, default=50_000, metavar="N", help="samples to draw (default: 50000)")
    parser.add_argument("--image-size", type=int, metavar="N", help="of the comparison (default: the samples')")
    parser.add_argument("--features", default="mini", help="network of all figures: 'mini', which ships with the "
                        "package, or 'inception', the published one (default: mini)")  # fmt: skip
    parser.add_argument("--feature-weights", metavar="FILE", help="a local file of its weights, instead of a download")
    parser.add_argument("--output", metavar="FILE", help="write the result as JSON")
    add_sampling(parser)
    parser.add_argument("--seed", type=int, default=0, help="of labels, noise and splits (default: 0)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="default: 64")
    parser.add_argument("--num-workers", type=int, default=1, metavar="N", help="processes that decode (default: 1)")
    add_device(parser)


def run_evaluate_reconstruction(args: argparse.Namespace) -> None:
    from .data.opening import open_source
    from .engine.run_folder import load_tokenizer, run_data
    from .evaluation.reconstruction import evaluate_reconstruction

    model = load_tokenizer(args.model)
    frame = None
    if args.data is not None:
        source = open_source(args.data, args.split)
    else:
        data = run_data(args.model)
        source, frame = data.open("val"), data.frame(int(model.config.image_size))
    accelerator = accelerator_of_several()
    result = evaluate_reconstruction(
        model, source, num_images=args.num_images, batch_size=args.batch_size, features=args.features,
        feature_weights=args.feature_weights, lpips=args.lpips, lpips_weights=args.lpips_weights,
        posterior=args.posterior, num_workers=args.num_workers, precision=args.precision, seed=args.seed, frame=frame,
        accelerator=accelerator, device=None if accelerator else device_of(args),
    )  # fmt: skip
    tell(result, args.output)


def tell(result: Any, output: str | None) -> None:
    """Print a result and store it, on one process only."""
    if not is_main_process():
        return
    print(result.table())
    if output:
        result.save(output)
        print(f"\nstored in {output}")


def accelerator_of_several() -> Any:
    """For a command that torchrun started as several processes; None where it is alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    import torch
    from accelerate import Accelerator

    return Accelerator(cpu=not torch.accelerator.is_available())


def run_evaluate_generation(args: argparse.Namespace) -> None:
    accelerator = accelerator_of_several()
    device = None if accelerator else device_of(args)
    shared = {
        "features": args.features, "feature_weights": args.feature_weights, "batch_size": args.batch_size,
        "num_workers": args.num_workers, "seed": args.seed, "accelerator": accelerator, "device": device,
    }  # fmt: skip
    if args.model is not None:
        from .testbed import evaluate_model

        folder = args.samples or f"{args.model.rstrip('/')}-samples"
        result = evaluate_model(
            args.model, folder, args.num_images, reference=args.reference, labels=args.labels,
            sampling=sampling_of(args), **shared,
        )  # fmt: skip
    else:
        from .testbed import evaluate_samples

        if args.samples is None or args.reference is None:
            raise ConfigError("give --model GENERATOR, or --samples IMAGES and the --reference to compare them with")
        result = evaluate_samples(args.samples, args.reference, image_size=args.image_size, **shared)
    tell(result, args.output)


def add_batches(parser: argparse.ArgumentParser) -> None:
    add_device(parser)
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="default: 64")
    parser.add_argument("--num-workers", type=int, default=1, metavar="N", help="processes that decode (default: 1)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="default: fp32")
    parser.add_argument("--seed", type=int, default=0, help="of posterior samples (default: 0)")


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps ... (default: the GPU, where there is one)")


def device_of(args: argparse.Namespace) -> str:
    """The device that was asked for, or the best there is.

    Raises:
        ConfigError: no such device on this machine.
    """
    import torch

    best = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    name = args.device or str(best or "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--device {name} cannot be used: {reason}") from error
    return name


# compare, report, cost, presets


def add_compare(commands: Any) -> None:
    parser = add_command(
        commands, "compare", run_compare, "gFID against training step of several generators, and the speed-up",
        description="Put generators' runs side by side: gFID against training step in one plot, the speed-up at equal\n"
        "gFID (Figure 4 of the paper), all final figures, and every setting in which the runs differ.",
    )  # fmt: skip
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of generators' runs")
    parser.add_argument("--output", metavar="FILE", default="compare.html", help="the page (default: compare.html)")
    parser.add_argument("--metric", help="what is plotted (default: the gFID that all have)")


def run_compare(args: argparse.Namespace) -> None:
    from .report.compare import compare

    comparison = compare(args.runs, args.output, args.metric)
    print(comparison.table())
    print(f"\nwritten: {args.output}")


def add_report(commands: Any) -> None:
    parser = add_command(commands, "report", run_report, "write the page of a run, report.html")
    parser.add_argument("folder", metavar="RUN", help="the folder of a run")
    parser.add_argument("--output", metavar="FILE", help="default: report.html in the run's folder")


def run_report(args: argparse.Namespace) -> None:
    from .report.run_report import report

    print(f"written: {report(args.folder, args.output).resolve().as_uri()}")


def add_cost(commands: Any) -> None:
    parser = add_command(
        commands, "cost", run_cost, "parameters, operations and tokens of presets, beside the paper's",
        description="Parameters, floating-point operations per image (encoder and decoder forwards; a multiplication\n"
        "and an addition are two) and tokens, beside Table 7 of the paper.",
    )  # fmt: skip
    parser.add_argument("presets", nargs="+", metavar="PRESET", help="names (`hieratok presets` lists them)")


def run_cost(args: argparse.Namespace) -> None:
    from .models.cost import cost_table, dit_cost_table
    from .models.presets import DIT_PRESETS

    generators = {name: name for name in args.presets if name in DIT_PRESETS}
    tokenizers = {name: name for name in args.presets if name not in DIT_PRESETS}
    tables = [*([cost_table(tokenizers)] if tokenizers else []), *([dit_cost_table(generators)] if generators else [])]
    print("\n\n".join(tables))


def add_presets(commands: Any) -> None:
    add_command(
        commands, "presets", run_presets, "list the recipes that --config takes, and the model presets",
        description="List the recipes that `hieratok train ... --config NAME` takes, with their first lines,\n"
        "and the model presets that recipes, `model.preset=NAME` and `hieratok cost NAME` refer to.",
    )  # fmt: skip


def run_presets(_: argparse.Namespace) -> None:
    from .config import RECIPES, recipe_kind, recipe_names
    from .models.presets import DIT_PRESETS, PRESETS

    names = recipe_names()
    width = max(map(len, [*names, *PRESETS]))
    for kind, presets in {"tokenizer": PRESETS, "generator": DIT_PRESETS}.items():
        print(f"recipes (hieratok train {kind} --config NAME):")
        for name in names:
            if recipe_kind(name) == kind:
                first = (RECIPES / f"{name}.yaml").read_text().splitlines()[0]
                print(f"  {name:{width}}  {first.removeprefix('#').strip()}")
        print(f"\nmodel presets of {kind}s (model.preset=NAME, hieratok cost NAME):")
        print("  " + "\n  ".join(presets) + "\n")


if __name__ == "__main__":
    sys.exit(main())
