"""The Frechet distance between two sets of features, from sums that can be added up in any order.

Source: Heusel et al. 2017, "GANs trained by a two time-scale update rule", Eq. 6:
|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import NonFiniteError, ProtocolError

FEW_IMAGES = 2048  # below this, a Frechet distance is mostly the bias of its small samples


@dataclass(frozen=True)
class Gaussian:
    """A `mean` `(dim,)` and a `covariance` `(dim, dim)`, float64, as a file of statistics has them."""

    mean: Tensor
    covariance: Tensor

    @property
    def dim(self) -> int:
        """Length of a feature vector."""
        return len(self.mean)


class GaussianSums:
    """Count, sum and sum of outer products of feature vectors, in float64.

    They are plain sums, so batches, shards and processes add up to the same Gaussian. Float64 holds the covariance to
    1e-10 even where a feature's mean is a thousand times its deviation, so nothing is shifted.

    Attributes:
        count: how many vectors were seen.
        sum: `(dim,)`.
        outer: `(dim, dim)`, the sum of x x^T.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        """`device`: where the sums live; it must know float64, as Apple's GPUs do not."""
        self.count = 0
        self.sum = torch.zeros(dim, dtype=torch.float64, device=device)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    @property
    def dim(self) -> int:
        """Length of a feature vector."""
        return len(self.sum)

    def update(self, features: Tensor) -> None:
        """Add features `(B, dim)`; B may be 0.

        Raises:
            ProtocolError: features of another length.
            NonFiniteError: a feature is NaN or infinite.
        """
        if features.dim() != 2 or features.shape[1] != self.dim:
            raise ProtocolError(f"features must be (B, {self.dim}), got {tuple(features.shape)}")
        if not torch.isfinite(features).all():
            raise NonFiniteError("the feature network gave NaN or infinite features; look at the images it was given")
        features = features.detach().to(self.sum.device).double()
        self.count += len(features)
        self.sum += features.sum(dim=0)
        self.outer += features.T @ features

    def merge(self, other: GaussianSums) -> None:
        """Add what `other` has seen.

        Raises:
            ProtocolError: features of another length.
        """
        _check_same_dim(self, other)
        self.count += other.count
        self.sum += other.sum.to(self.sum.device)
        self.outer += other.outer.to(self.outer.device)

    @property
    def mean(self) -> Tensor:
        """`(dim,)` float64.

        Raises:
            ProtocolError: fewer than 2 vectors.
        """
        self._check_count()
        return self.sum / self.count

    @property
    def covariance(self) -> Tensor:
        """`(dim, dim)` float64, unbiased (divided by count - 1).

        Raises:
            ProtocolError: fewer than 2 vectors.
        """
        mean = self.mean
        return (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)

    def _check_count(self) -> None:
        if self.count < 2:
            raise ProtocolError(f"a Gaussian needs at least 2 feature vectors, got {self.count}; give more images")


def frechet_distance(a: GaussianSums | Gaussian, b: GaussianSums | Gaussian) -> float:
    """The Frechet distance between two Gaussians, >= 0, in float64.

    The trace of (C1 C2)^(1/2) is taken through the symmetric root of C1, which needs eigenvalues of symmetric matrices
    only: no complex numbers appear, and covariances of fewer vectors than dimensions are no trouble.

    Raises:
        ProtocolError: fewer than 2 vectors on a side, or features of different lengths.
    """
    _check_same_dim(a, b)
    mean = a.mean
    difference = mean - b.mean.to(mean.device)
    cov1, cov2 = a.covariance, b.covariance.to(mean.device)
    root = _symmetric_root(cov1)
    product = root @ cov2 @ root
    eigenvalues = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0)
    trace = cov1.trace() + cov2.trace() - 2 * eigenvalues.sqrt().sum()
    return max(0.0, float(difference.dot(difference) + trace))


def small_sample_warnings(count: int, dims: Mapping[str, int]) -> list[str]:
    """What to know of Frechet distances of `count` images by features of the lengths `dims`, given by name."""
    warnings = []
    if count < FEW_IMAGES:
        warnings.append(
            f"Frechet distances of {count:,} images are biased upwards; compare them at the same N only, and use "
            f"{FEW_IMAGES:,} images or more"
        )
    for name, dim in dims.items():
        if count <= dim:
            warnings.append(
                f"{count:,} images do not fill the {dim:,} dimensions of {name}: the covariances are singular"
            )
    return warnings


def _symmetric_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def _check_same_dim(a: GaussianSums | Gaussian, b: GaussianSums | Gaussian) -> None:
    if a.dim != b.dim:
        raise ProtocolError(f"features of length {a.dim} and {b.dim} cannot be compared; use one feature network")
