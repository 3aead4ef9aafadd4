"""The Inception Score, from the logits of a classifier.

Source: Salimans et al. 2016, "Improved techniques for training GANs": exp of the mean divergence KL(p(y|x) || p(y)),
over splits as ADM's evaluator takes them (Dhariwal & Nichol 2021).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import NonFiniteError, ProtocolError

SPLIT_SIZE = 5000


class InceptionScore(NamedTuple):
    """`mean` over the splits, between 1 and the number of classes; `std`, their deviation (of one split 0); `splits`
    are how many, and `used` how many images they hold."""

    mean: float
    std: float
    splits: int
    used: int


def inception_score(logits: Tensor, split_size: int = SPLIT_SIZE) -> InceptionScore:
    """The score of images with the logits `(N, classes)`, in float64.

    A split is `split_size` images in the order in which they come. Images sorted by class would give every split a few
    classes only, and a low score: the caller shuffles them. The score of fewer images is lower, so a last split that
    is not full is left out (ADM averages it in); where it is the only one, it is the score, of all N images.

    Raises:
        ProtocolError: no images, or a split of none.
        NonFiniteError: a logit is NaN or infinite.
    """
    if logits.dim() != 2 or len(logits) == 0 or split_size < 1:
        raise ProtocolError(
            f"an Inception Score needs logits (N, classes) of 1 image or more and a split_size above 0, got "
            f"{tuple(logits.shape)} and {split_size}"
        )
    if not torch.isfinite(logits).all():
        raise NonFiniteError("the feature network gave NaN or infinite logits; look at the images it was given")
    full = len(logits) // split_size * split_size
    splits = logits[: full or len(logits)].split(split_size)
    scores = torch.tensor([_score(split.double()) for split in splits], dtype=torch.float64)
    return InceptionScore(float(scores.mean()), float(scores.std(correction=0)), len(splits), full or len(logits))


def _score(logits: Tensor) -> float:
    log_given_image = logits.log_softmax(dim=1)
    log_overall = log_given_image.logsumexp(dim=0) - torch.tensor(float(len(logits)), dtype=torch.float64).log()
    divergence = (log_given_image.exp() * (log_given_image - log_overall)).sum(dim=1)
    return float(divergence.mean().exp())
