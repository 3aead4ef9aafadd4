"""Precision and recall against brute force, and known answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from hieratok.errors import NonFiniteError, ProtocolError
from hieratok.evaluation.precision_recall import precision_recall


def cloud(n, dim, seed, shift=0.0, scale=1.0):
    return scale * torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)) + shift


def by_brute_force(real, fake, k=3):
    real, fake = real.double().numpy(), fake.double().numpy()
    radii = [np.sort(cdist(x, x), axis=1)[:, k] for x in (real, fake)]  # column 0 is the vector itself
    between = cdist(real, fake)
    precision = (between <= radii[0][:, None]).any(axis=0).mean()
    recall = (between <= radii[1]).any(axis=1).mean()
    return float(precision), float(recall)


@pytest.mark.parametrize("dim, shift, scale", [(2, 0.5, 1.0), (16, 0.3, 0.8), (64, 100.0, 1.0)])
def test_they_are_those_of_all_distances_by_scipy(dim, shift, scale):
    offset = shift if shift == 100 else 0.0  # long vectors close together: small differences of large sums
    real, fake = cloud(150, dim, 0, offset), cloud(110, dim, 1, shift, scale)
    expected = by_brute_force(real, fake)
    assert 0 < expected[0] < 1 and 0 < expected[1] < 1
    assert precision_recall(real, fake) == expected
    assert precision_recall(real, fake, neighbours=1) == by_brute_force(real, fake, 1) != expected


@pytest.mark.parametrize("block_size", [1, 7, 64, 150])
def test_they_do_not_depend_on_the_size_of_the_blocks(block_size):
    real, fake = cloud(90, 8, 0), cloud(150, 8, 1, 0.4)
    assert precision_recall(real, fake, block_size=block_size) == precision_recall(real, fake)


def test_a_set_against_itself_has_both_at_1_even_with_doubles():
    x = cloud(40, 512, 0, 30.0)
    assert precision_recall(x, x.flip(0)) == (1.0, 1.0)
    doubled = x.repeat(6, 1)  # every ball has the radius 0
    assert precision_recall(doubled, x.repeat(5, 1), block_size=17) == (1.0, 1.0)


def test_sets_far_apart_have_both_at_0():
    assert precision_recall(cloud(20, 4, 0), cloud(20, 4, 1, 1000.0)) == (0.0, 0.0)


def test_samples_of_one_mode_of_two_are_precise_and_miss_the_other():
    modes = torch.cat([cloud(200, 2, 0), cloud(200, 2, 1, 1000.0)])
    precision, recall = precision_recall(modes, cloud(300, 2, 2, scale=0.8))
    assert precision > 0.95 and 0.4 < recall <= 0.5


def test_exchanging_the_sets_exchanges_the_figures():
    a, b = cloud(60, 4, 0), cloud(50, 4, 1, 0.7)
    assert precision_recall(a, b) == precision_recall(b, a)[::-1]


def test_a_point_on_the_surface_of_a_ball_is_in_it():
    real = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    fake = torch.tensor([[6.0], [7.0], [8.0], [9.0]])  # 6 is at the distance 3 of 3, whose third neighbour is 0
    assert precision_recall(real, fake) == (0.25, 0.25)


def test_what_has_no_such_figures_is_refused():
    with pytest.raises(ProtocolError, match="3 neighbours need more images than that .* 3 real and 9 generated"):
        precision_recall(cloud(3, 2, 0), cloud(9, 2, 0))
    with pytest.raises(ProtocolError, match="cannot be compared; use one network"):
        precision_recall(cloud(9, 2, 0), cloud(9, 3, 0))
    with pytest.raises(ProtocolError, match="at least 1 neighbour"):
        precision_recall(cloud(9, 2, 0), cloud(9, 2, 0), neighbours=0)
    with pytest.raises(NonFiniteError, match="NaN or infinite features"):
        precision_recall(cloud(9, 2, 0), torch.full((9, 2), float("inf")))
