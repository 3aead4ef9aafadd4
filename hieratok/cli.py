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
        description="Train, use and measure a multi-scale ViT image tokenizer.",
        epilog="New here? `hieratok quickstart` trains a small one in about 4 minutes and shows you what it does.",
    )
    parser.add_argument("--version", action="version", version=f"hieratok {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    add_quickstart(commands)
    add_train(commands)
    add_reconstruct(commands)
    add_encode(commands)
    add_evaluate(commands)
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
        commands, "quickstart", run_quickstart, "train a small tokenizer in minutes and open a report of it",
        description="Train the 64-px multi-scale tokenizer for a few minutes, on colour emoji or on your own images,\n"
        "judge it on held-out images, and write everything into one page, report.html.",
    )  # fmt: skip
    parser.add_argument("--data", metavar="DATA", help=f"{DATA_HELP} (default: openmoji)")
    parser.add_argument("--minutes", type=float, help="how long to train (default: 4)")
    parser.add_argument("--output", default="runs/quickstart", metavar="FOLDER", help="default: runs/quickstart")
    parser.add_argument("--seed", type=int, help="default: 0")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run, as it was begun")
    parser.add_argument("--overwrite", action="store_true", help="replace a run that is there")


def run_quickstart(args: argparse.Namespace) -> None:
    from .quickstart import quickstart

    path = quickstart(
        data=args.data, minutes=args.minutes, output=args.output, seed=args.seed, resume=args.resume,
        overwrite=args.overwrite,
    )  # fmt: skip
    print(f"\nOpen {path.resolve().as_uri()} in a browser.")


# train


def add_train(commands: Any) -> None:
    train = commands.add_parser("train", help="train a tokenizer on your images")
    kinds = train.add_subparsers(metavar="WHAT", required=True)
    parser = add_command(
        kinds, "tokenizer", run_train_tokenizer, "train a tokenizer",
        description="Train a tokenizer as a recipe says. `hieratok presets` lists the recipes; a file of your own may\n"
        "extend one. Whatever a recipe says can be changed at the end of the line:\n\n"
        "  hieratok train tokenizer --config small-64 data.source=photos train.max_minutes=30 output=runs/photos",
        epilog="Several processes: torchrun --nproc_per_node N -m hieratok train tokenizer ...",
    )  # fmt: skip
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

    run = TokenizerRun.from_mapping(resolve(args.config, args.overrides, args.resume))
    prepare(run)
    if args.dry_run:
        text = plan(run).describe()
        if is_main_process():
            print(text)
        return
    folder = train_tokenizer(run, resume=args.resume, evaluator=judge)
    if is_main_process():
        print(f"\nrun: {folder}\nreport: hieratok report {folder}\nreconstruct: hieratok reconstruct IMAGES... "
              f"--model {folder}")  # fmt: skip


def resolve(config: str | None, overrides: Sequence[str], resume: bool) -> dict[str, Any]:
    """A recipe's mapping with overrides; on resuming without a recipe, that of the run itself."""
    from pathlib import Path

    from .config import apply_overrides, load_recipe
    from .engine.run_folder import CONFIG

    if config is not None:
        return apply_overrides(load_recipe(config), overrides)
    values = apply_overrides({}, overrides)
    if not resume:
        raise ConfigError("give a recipe: --config NAME or --config FILE.yaml (`hieratok presets` lists the names)")
    path = Path(values.get("output", "runs/tokenizer")) / CONFIG
    if not path.exists():
        raise ConfigError(f"nothing to resume: there is no {path}; name the run's folder with output=FOLDER")
    return apply_overrides(load_recipe(str(path.resolve())), overrides)


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
    parser.add_argument("--model", required=True, metavar="PATH", help=MODEL_HELP)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the shards")
    parser.add_argument("--posterior", choices=("mode", "sample", "moments"), default="mode",
                        help="what is stored of each posterior (default: mode)")  # fmt: skip
    parser.add_argument("--flip", action="store_true", help="store the mirrored images' latents too")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N images")
    parser.add_argument("--shard-size", type=int, default=10_000, metavar="N", help="images per shard (default: 10000)")
    add_batches(parser)


def run_encode(args: argparse.Namespace) -> None:
    from .data.latents import encode
    from .data.opening import open_source
    from .engine.run_folder import load_tokenizer

    manifest = encode(
        load_tokenizer(args.model), open_source(args.data), args.out, batch_size=args.batch_size,
        shard_size=args.shard_size, posterior=args.posterior, flip=args.flip, num_workers=args.num_workers,
        precision=args.precision, seed=args.seed, limit=args.limit, device=device_of(args),
    )  # fmt: skip
    print(f"{manifest['num_images']:,} images in {len(manifest['shards'])} shard(s): {args.out}")


def add_evaluate(commands: Any) -> None:
    evaluate = commands.add_parser("evaluate", help="measure a tokenizer")
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
    accelerator = None
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        import torch
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    result = evaluate_reconstruction(
        model, source, num_images=args.num_images, batch_size=args.batch_size, features=args.features,
        feature_weights=args.feature_weights, lpips=args.lpips, lpips_weights=args.lpips_weights,
        posterior=args.posterior, num_workers=args.num_workers, precision=args.precision, seed=args.seed, frame=frame,
        accelerator=accelerator, device=None if accelerator else device_of(args),
    )  # fmt: skip
    if not is_main_process():
        return
    print(result.table())
    if args.output:
        result.save(args.output)
        print(f"\nstored in {args.output}")


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


# report, cost, presets


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
    from .models.cost import cost_table

    print(cost_table({name: name for name in args.presets}))


def add_presets(commands: Any) -> None:
    add_command(
        commands, "presets", run_presets, "list the recipes that --config takes, and the model presets",
        description="List the recipes that `hieratok train tokenizer --config NAME` takes, with their first lines,\n"
        "and the model presets that recipes, `model.preset=NAME` and `hieratok cost NAME` refer to.",
    )  # fmt: skip


def run_presets(_: argparse.Namespace) -> None:
    from .config import RECIPES, recipe_names
    from .models.presets import PRESETS

    names = recipe_names()
    width = max(map(len, [*names, *PRESETS]))
    print("recipes (hieratok train tokenizer --config NAME):")
    for name in names:
        first = (RECIPES / f"{name}.yaml").read_text().splitlines()[0]
        print(f"  {name:{width}}  {first.removeprefix('#').strip()}")
    print("\nmodel presets (model.preset=NAME, hieratok cost NAME):")
    for name in PRESETS:
        print(f"  {name}")


if __name__ == "__main__":
    sys.exit(main())
