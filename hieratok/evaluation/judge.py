"""The evaluator that a training is handed: the settings of the run's `eval` section, applied."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from ..data.source import ImageSource
from ..models.tokenizer import HieraTok
from .reconstruction import ReconstructionResult, evaluate_reconstruction

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ..training.tokenizer import TokenizerRun


def judge(model: HieraTok, images: ImageSource, run: TokenizerRun, accelerator: Accelerator) -> ReconstructionResult:
    """Reconstruction metrics of `model` on `run.eval.num_images` held-out images, spread over the set."""
    result = evaluate_reconstruction(
        model,
        images,
        num_images=run.eval.num_images,
        batch_size=run.eval.batch_size,
        features=run.eval.features,
        feature_weights=run.eval.feature_weights,
        lpips=run.eval.lpips or run.loss.lpips_network,
        lpips_weights=run.eval.lpips_weights or run.loss.lpips_weights,
        num_workers=run.data.num_workers,
        seed=run.seed,
        progress=False,
        accelerator=accelerator,
        frame=run.data.frame(int(model.config.image_size)),
        max_bad_fraction=run.data.max_bad_fraction,
    )
    if accelerator.is_main_process:
        print(f"\n{result.table()}", file=sys.stderr)
    return result
