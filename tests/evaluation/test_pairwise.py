"""PSNR, SSIM and L1 of uint8 images."""

from __future__ import annotations

import math

import pytest
import torch

from hieratok.evaluation import pairwise


def images(n=3, side=24, seed=0):
    return torch.randint(0, 256, (n, 3, side, side), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def test_psnr_is_ten_log_of_255_squared_over_the_mean_squared_error_of_each_image():
    targets = torch.full((2, 3, 8, 8), 100, dtype=torch.uint8)
    shifted = targets.clone()
    shifted[0] += 10
    shifted[1] -= 1
    expected = [20 * math.log10(255 / 10), 20 * math.log10(255)]
    assert pairwise.psnr(shifted, targets).tolist() == pytest.approx(expected, rel=1e-5)


def test_identical_images_have_100_db_a_structural_similarity_of_1_and_no_difference():
    x = images()
    assert pairwise.psnr(x, x).tolist() == [100.0] * 3
    assert pairwise.ssim(x, x).tolist() == pytest.approx([1.0] * 3)
    assert pairwise.l1(x, x).tolist() == [0.0] * 3


def test_the_similarity_of_an_image_does_not_depend_on_its_batch():
    x, y = images(seed=1), images(seed=2)
    together = pairwise.ssim(x, y)
    assert together.shape == (3,)
    alone = torch.cat([pairwise.ssim(x[i : i + 1], y[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone)


def test_the_similarity_is_left_out_below_the_window_of_11_pixels():
    assert pairwise.ssim(images(side=10), images(side=10)) is None
    assert pairwise.ssim(images(side=11), images(side=11)).shape == (3,)


def test_black_against_white_differs_by_2_in_the_range_of_minus_1_to_1():
    black = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    assert pairwise.l1(black, black + 255).item() == 2.0
    assert pairwise.psnr(black, black + 255).item() == pytest.approx(0, abs=1e-5)


def test_a_mean_keeps_the_digits_of_float64():
    mean = pairwise.Mean()
    mean.update(torch.tensor([2.0**24, 1.0], dtype=torch.float64))
    assert mean.value == (2**24 + 1) / 2


def test_a_mean_of_nothing_is_none():
    mean = pairwise.Mean()
    assert mean.value is None
    mean.update(torch.tensor([1.0, 2.0]))
    mean.update(torch.tensor([6.0]))
    assert mean.value == 3.0
