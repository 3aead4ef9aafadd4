"""Which optimizer changes which weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .settings import OptimizerConfig, TrainConfig

EMBEDDINGS = ("position", "scale_embedding", "class_embed.weight")


def make_optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW (Table 8) for all that is not frozen; vectors and embeddings do not decay, as in DeiT and MAE.

    `optimizer=muon` gives the matrices inside the transformers' blocks to Muon, with its steps scaled to the size of
    AdamW's, so that one learning rate serves both (Jordan et al. 2024; Liu et al. 2025, arXiv 2502.16982). The
    modulations of a DiT's blocks stay with AdamW: they are half of its matrices, and Muon's products cost as much as
    the forward pass on a CPU.
    """
    blocks: list[nn.Parameter] = []
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if config.optimizer == "muon" and "blocks." in name and "modulation" not in name and parameter.ndim == 2:
            blocks.append(parameter)
        elif parameter.ndim >= 2 and not name.endswith(EMBEDDINGS):
            matrices.append(parameter)
        else:
            vectors.append(parameter)
    rate, decay = config.learning_rate, config.weight_decay
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizers: list[torch.optim.Optimizer] = [adamw(groups, config)]
    if blocks:
        muon = torch.optim.Muon(blocks, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        optimizers.append(muon)
    return optimizers


def adamw(parameters: Any, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW as a section of a recipe says, over parameters, or groups of them with a decay of their own."""
    betas = (config.betas[0], config.betas[1])
    return torch.optim.AdamW(
        parameters, lr=config.learning_rate, betas=betas, weight_decay=config.weight_decay, fused=True
    )
