"""The Inception Score against its definition, and what the order and the number of images do to it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy

from hieratok.errors import NonFiniteError, ProtocolError
from hieratok.evaluation.inception_score import inception_score


def logits(n, classes=10, seed=0, scale=3.0):
    return scale * torch.randn(n, classes, generator=torch.Generator().manual_seed(seed))


def by_scipy(logits):
    p = softmax(logits.double().numpy(), axis=1)
    return math.exp(np.mean([entropy(row, p.mean(axis=0)) for row in p]))


def test_it_is_exp_of_the_mean_divergence_by_scipy_averaged_over_splits():
    x = logits(300)
    of_splits = [by_scipy(x[start : start + 100]) for start in (0, 100, 200)]
    score = inception_score(x, split_size=100)
    assert (score.splits, score.used) == (3, 300)
    assert score.mean == pytest.approx(np.mean(of_splits), rel=1e-12)
    assert score.std == pytest.approx(np.std(of_splits), rel=1e-9)


def test_images_of_one_certain_class_each_score_the_number_of_classes_and_equal_images_score_1():
    certain = 1000 * torch.eye(7).repeat(4, 1)
    assert inception_score(certain).mean == pytest.approx(7, rel=1e-12)
    assert inception_score(logits(1).repeat(20, 1)).mean == pytest.approx(1, rel=1e-12)


def test_a_logit_added_to_all_classes_changes_nothing():
    x = logits(50)
    assert inception_score(x + 500).mean == pytest.approx(inception_score(x).mean, rel=1e-4)


def test_images_sorted_by_class_score_less_than_shuffled_ones():
    x = 1000 * torch.eye(10).repeat_interleave(20, dim=0)
    shuffled = x[torch.randperm(200, generator=torch.Generator().manual_seed(0))]
    assert inception_score(x, split_size=20).mean == pytest.approx(1)
    assert inception_score(shuffled, split_size=20).mean > 5


def test_a_last_split_that_is_not_full_is_left_out_unless_it_is_the_only_one():
    x = logits(25)
    assert inception_score(x, split_size=10) == inception_score(x[:20], split_size=10)
    assert inception_score(x, split_size=10).used == 20
    alone = inception_score(x, split_size=26)
    assert (alone.splits, alone.used, alone.std) == (1, 25, 0.0)
    assert alone.mean == pytest.approx(by_scipy(x), rel=1e-12)


def test_what_has_no_score_is_refused():
    for bad in (logits(0), torch.zeros(5)):
        with pytest.raises(ProtocolError, match=r"needs logits \(N, classes\)"):
            inception_score(bad)
    with pytest.raises(ProtocolError, match="split_size above 0"):
        inception_score(logits(3), split_size=0)
    with pytest.raises(NonFiniteError, match="NaN or infinite logits"):
        inception_score(torch.tensor([[0.0, float("nan")]]))
