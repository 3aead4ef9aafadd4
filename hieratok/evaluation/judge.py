"""The evaluator that a training is handed: the settings of the run's `eval` section, applied."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch

from ..data.source import ImageSource
from ..losses.perceptual import LPIPS, LpipsNetwork
from ..models.tokenizer import HieraTok
from . import pairwise
from .features import load_features
from .reconstruction import ReconstructionResult, evaluate_reconstruction

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ..training.tokenizer import TokenizerRun


def prepare(run: TokenizerRun) -> None:
    """Use once what `judge` will need, so that a missing library or file is known before the training and not after it.

    Raises:
        MissingDependencyError, CheckpointError, ConfigError: something is not there.
    """
    black = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    pairwise.psnr(black, black)
    pairwise.ssim(black, black)
    load_features(run.eval.features, run.eval.feature_weights)
    LPIPS(*lpips_of(run))


def lpips_of(run: TokenizerRun) -> tuple[LpipsNetwork, str | None]:
    """The perceptual network of the evaluation and its file: by default those of the loss."""
    network = run.eval.lpips or run.loss.lpips_network
    same = network == run.loss.lpips_network
    return network, run.eval.lpips_weights or (run.loss.lpips_weights if same else None)


def judge(model: HieraTok, images: ImageSource, run: TokenizerRun, accelerator: Accelerator) -> ReconstructionResult:
    """Reconstruction metrics of `model` on `run.eval.num_images` held-out images, spread over the set."""
    lpips, lpips_weights = lpips_of(run)
    result = evaluate_reconstruction(
        model,
        images,
        num_images=min(run.eval.num_images or len(images), len(images)),
        batch_size=run.eval.batch_size,
        features=run.eval.features,
        feature_weights=run.eval.feature_weights,
        lpips=lpips,
        lpips_weights=lpips_weights,
        num_workers=run.data.num_workers,
        seed=run.seed,
        progress=False,
        accelerator=accelerator,
        frame=run.data.frame(int(model.config.image_size)),
        max_bad_fraction=1.0,  # a bad held-out image must not cost a finished training its figures
    )
    if accelerator.is_main_process:
        print(f"\n{result.table()}", file=sys.stderr)
    return result
