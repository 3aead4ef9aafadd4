"""The Frechet distance against scipy's matrix root, and its sums however they are split."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hieratok.errors import NonFiniteError, ProtocolError
from hieratok.evaluation.frechet import Gaussian, GaussianSums, frechet_distance


def sums_of(features, batch_size=64):
    sums = GaussianSums(features.shape[1])
    for batch in features.split(batch_size):
        sums.update(batch)
    return sums


def correlated(n, dim, seed, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator) / dim**0.5
    return torch.randn(n, dim, generator=generator) @ mixing + shift


def by_scipy(a, b):
    from scipy.linalg import sqrtm

    a, b = a.double().numpy(), b.double().numpy()
    c1, c2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = sqrtm(c1 @ c2).real
    return np.square(a.mean(0) - b.mean(0)).sum() + np.trace(c1 + c2 - 2 * root)


@pytest.mark.parametrize("dim, shift", [(3, 0.0), (48, 0.5), (48, 30.0)])
def test_it_equals_the_formula_by_scipys_matrix_root(dim, shift):
    a, b = correlated(400, dim, 0), correlated(300, dim, 1, shift)
    assert frechet_distance(sums_of(a), sums_of(b)) == pytest.approx(by_scipy(a, b), rel=1e-6)


def test_of_diagonal_gaussians_it_is_the_distance_of_means_and_deviations():
    a = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    b = a * torch.tensor([3.0, 2.0]) + torch.tensor([5.0, 0.0])
    variance = 2 / 3
    expected = 25 + variance * ((3 - 1) ** 2 + (2 - 1) ** 2)
    assert frechet_distance(sums_of(a), sums_of(b)) == pytest.approx(expected, rel=1e-12)


def test_the_moments_of_sums_are_as_good_as_the_sums():
    a, b = sums_of(correlated(40, 8, 0)), sums_of(correlated(30, 8, 1))
    moments = Gaussian(b.mean, b.covariance)
    assert frechet_distance(a, moments) == frechet_distance(a, b)
    assert frechet_distance(moments, a) == frechet_distance(b, a)
    with pytest.raises(ProtocolError, match="length 8 and 4 cannot be compared"):
        frechet_distance(moments, sums_of(torch.rand(5, 4)))


def test_it_is_symmetric_and_zero_from_a_set_to_itself_even_with_fewer_vectors_than_dimensions():
    a, b = sums_of(correlated(20, 64, 0)), sums_of(correlated(20, 64, 1))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_37_samples_give_the_same_gaussian_in_batches_of_any_size(batch_size):
    features = correlated(37, 16, 0, shift=2.0)
    whole = sums_of(features, 37)
    parts = sums_of(features, batch_size)
    assert parts.count == 37
    torch.testing.assert_close(parts.mean, whole.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(parts.covariance, torch.cov(features.double().T), rtol=1e-10, atol=1e-12)
    other = sums_of(correlated(50, 16, 1))
    assert frechet_distance(parts, other) == pytest.approx(frechet_distance(whole, other), rel=1e-10)


def test_merged_shares_of_two_processes_are_the_gaussian_of_all():
    features = correlated(37, 16, 0)
    merged = sums_of(features[0::2])
    merged.merge(sums_of(features[1::2]))
    assert merged.count == 37
    torch.testing.assert_close(merged.covariance, sums_of(features).covariance, rtol=1e-10, atol=1e-12)


def test_a_mean_a_thousand_times_the_deviation_leaves_the_covariance_exact():
    features = correlated(1000, 8, 0).double() + 1000
    torch.testing.assert_close(sums_of(features).covariance, torch.cov(features.T), rtol=1e-8, atol=1e-8)


def test_fewer_than_two_vectors_are_refused():
    one = sums_of(torch.ones(1, 4))
    with pytest.raises(ProtocolError, match="at least 2 feature vectors, got 1"):
        frechet_distance(one, sums_of(torch.rand(5, 4)))


def test_features_of_different_networks_are_refused():
    with pytest.raises(ProtocolError, match="4 and 6 cannot be compared"):
        frechet_distance(sums_of(torch.rand(5, 4)), sums_of(torch.rand(5, 6)))
    with pytest.raises(ProtocolError, match=r"must be \(B, 4\)"):
        sums_of(torch.rand(5, 4)).update(torch.rand(5, 6))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_feature_that_is_not_finite_is_refused_and_not_added(value):
    sums = sums_of(torch.rand(5, 4))
    with pytest.raises(NonFiniteError, match="NaN or infinite features"):
        sums.update(torch.tensor([[0.0, value, 0.0, 0.0]]))
    assert sums.count == 5
