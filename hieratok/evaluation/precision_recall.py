"""Precision and recall of generated images: how many lie among the real ones, and how many real ones among them.

Source: Kynkaanniemi et al. 2019, "Improved precision and recall metric for assessing generative models", Eq. 1 and 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import NonFiniteError, ProtocolError

NEIGHBOURS = 3
BLOCK_SIZE = 4096  # 128 MiB of distances at once

# Float32 features cannot tell vectors apart that are nearer than this, squared and relative to their norms; without it
# the rounding of the sums below would part an image from its double.
SAME = 1e-13


def precision_recall(
    real: Tensor, fake: Tensor, neighbours: int = NEIGHBOURS, block_size: int = BLOCK_SIZE
) -> tuple[float, float]:
    """`(precision, recall)` of generated images by their features.

    Around every vector of a set lies a ball that reaches to its `neighbours`-th nearest other vector of that set.
    Precision is the part of `fake` that lies in a ball of `real` (on its surface counts, as in ADM's evaluator), recall
    the part of `real` that lies in a ball of `fake`. Both depend on the sizes of the sets.

    Args:
        real: features `(N, dim)`.
        fake: features `(M, dim)` on the same device, which must know float64: distances of long vectors are small
            differences of large sums.
        neighbours: at least 1.
        block_size: distances are taken in blocks of so many rows and columns; of no effect on the result.

    Raises:
        ProtocolError: features of different lengths, or no more images than neighbours.
        NonFiniteError: a feature is NaN or infinite.
    """
    if real.dim() != 2 or fake.dim() != 2 or real.shape[1] != fake.shape[1]:
        raise ProtocolError(f"features {tuple(real.shape)} and {tuple(fake.shape)} cannot be compared; use one network")
    if neighbours < 1 or min(len(real), len(fake)) <= neighbours:
        raise ProtocolError(
            f"precision and recall with {neighbours} neighbours need more images than that and at least 1 neighbour, "
            f"got {len(real)} real and {len(fake)} generated ones"
        )
    if not (torch.isfinite(real).all() and torch.isfinite(fake).all()):
        raise NonFiniteError("the feature network gave NaN or infinite features; look at the images it was given")
    real_radii, fake_radii = (_radii(features, neighbours, block_size) for features in (real, fake))
    real_found = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    fake_found = torch.zeros(len(fake), dtype=torch.bool, device=real.device)
    for rows in _blocks(len(real), block_size):
        for columns in _blocks(len(fake), block_size):
            distances = _squared_distances(real[rows], fake[columns])
            real_found[rows] |= (distances <= fake_radii[columns]).any(dim=1)
            fake_found[columns] |= (distances <= real_radii[rows, None]).any(dim=0)
    return float(fake_found.double().mean()), float(real_found.double().mean())


def _radii(features: Tensor, neighbours: int, block_size: int) -> Tensor:
    """`(N,)` squared distances to the `neighbours`-th nearest other vector; the nearest of all is the vector itself."""
    radii = []
    for rows in _blocks(len(features), block_size):
        nearest = torch.empty(len(features[rows]), 0, dtype=torch.float64, device=features.device)
        for columns in _blocks(len(features), block_size):
            nearest = torch.cat([nearest, _squared_distances(features[rows], features[columns])], dim=1)
            nearest = nearest.topk(min(neighbours + 1, nearest.shape[1]), dim=1, largest=False).values
        radii.append(nearest.amax(dim=1))
    return torch.cat(radii)


def _blocks(length: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, length, size)]


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """`(N, M)` float64."""
    a, b = a.double(), b.double()
    norms = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1)
    distances = norms - 2 * (a @ b.T)
    return distances.where(distances > SAME * norms, 0)
