"""Any image becomes a square, the same one for the same random numbers."""

from __future__ import annotations

import random

import numpy as np
import pytest
from PIL import Image

from hieratok.data.frame import MIN_CROP, Frame, crop_image


def coordinates(width: int, height: int) -> Image.Image:
    """Red tells the column and green the row, each from 0 to 250 across the image."""
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(
        np.stack([x * 250 / (width - 1), y * 250 / (height - 1), 0 * x], -1).round().astype(np.uint8)
    )


def window(pixels: np.ndarray, width: int, height: int) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of the part that is seen, in the image's pixels."""
    red, green = pixels[..., 0].astype(float).mean(0), pixels[..., 1].astype(float).mean(1)
    half_x, half_y = (red[-2] - red[1]) / (len(red) - 3) / 2, (green[-2] - green[1]) / (len(green) - 3) / 2
    x, y = (width - 1) / 250, (height - 1) / 250
    return (
        (red[1] - 3 * half_x) * x, (green[1] - 3 * half_y) * y,
        (red[-2] + 3 * half_x) * x + 1, (green[-2] + 3 * half_y) * y + 1,
    )  # fmt: skip


@pytest.mark.parametrize("width, height", [(400, 200), (200, 400), (300, 299), (1000, 50)])
def test_the_centre_crop_is_centred_and_as_large_as_can_be(width, height):
    pixels = crop_image(coordinates(width, height), Frame(50), None)
    assert pixels.shape == (50, 50, 3) and pixels.dtype == np.uint8
    left, top, right, bottom = window(pixels, width, height)
    short, slack = min(width, height), max(width, height) / 100
    assert left + right == pytest.approx(width, abs=slack) and top + bottom == pytest.approx(height, abs=slack)
    assert right - left == pytest.approx(short, abs=slack + 1) and bottom - top == pytest.approx(short, abs=slack + 1)


def test_squashing_shows_the_whole_image():
    pixels = crop_image(coordinates(400, 100), Frame(50, crop="squash"), None)
    assert window(pixels, 400, 100) == pytest.approx((0, 0, 400, 100), abs=4)


def test_a_random_crop_stays_inside_and_moves():
    frame = Frame(50, crop="random")
    windows = np.array(
        [window(crop_image(coordinates(300, 200), frame, random.Random(i)), 300, 200) for i in range(80)]
    )
    left, top, right, bottom = windows.T
    assert left.min() > -3 and top.min() > -3 and right.max() < 303 and bottom.max() < 203
    sides = right - left
    assert sides.min() > 200 * MIN_CROP - 5 and sides.max() < 205
    assert sides.max() - sides.min() > 20
    assert np.abs(sides - (bottom - top)).max() < 6
    assert left.min() < 15 and right.max() > 285 and top.min() < 5 and top.max() > 15 and bottom.max() > 195


@pytest.mark.parametrize("crop", ["center", "random", "squash"])
def test_the_crop_depends_on_the_random_numbers_alone(crop):
    frame, image = Frame(32, crop=crop, flip=True), coordinates(90, 70)
    first, again = (crop_image(image, frame, random.Random(5)) for _ in range(2))
    assert (first == again).all()


def test_about_half_of_the_training_samples_are_mirrored():
    frame, image = Frame(32, flip=True), coordinates(32, 32)
    plain, mirrored = np.array(image), np.array(image)[:, ::-1]
    flips = 0
    for i in range(400):
        pixels = crop_image(image, frame, random.Random(i))
        flips += (pixels == mirrored).all()
        assert (pixels == mirrored).all() or (pixels == plain).all()
    assert 150 < flips < 250
    assert all((crop_image(image, Frame(32), random.Random(i)) == plain).all() for i in range(20))


def test_without_random_numbers_nothing_is_flipped_or_moved():
    image = coordinates(70, 90)
    expected = crop_image(image, Frame(32), None)
    assert all((crop_image(image, Frame(32, crop="random", flip=True), None) == expected).all() for _ in range(20))


def test_an_image_of_the_right_size_is_untouched():
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert (crop_image(Image.fromarray(noise), Frame(32), None) == noise).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 2), (3, 4)])
@pytest.mark.parametrize("crop", ["center", "random", "squash"])
def test_tiny_and_thin_images_become_squares_too(size, crop):
    image = Image.new("RGB", size, (10, 200, 30))
    for i in range(50):
        pixels = crop_image(image, Frame(16, crop=crop), random.Random(i))
        assert pixels.shape == (16, 16, 3) and (pixels == [10, 200, 30]).all()


def test_a_checkerboard_shrinks_to_grey_not_to_stripes():
    board = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)
    pixels = crop_image(Image.fromarray(board).convert("RGB"), Frame(30), None)
    assert np.abs(pixels.astype(int) - 127).max() < 12


def test_decoding_delivers_enough_pixels_for_the_tightest_crop():
    assert Frame(64).decode_side == 64
    assert Frame(64, crop="random").decode_side * MIN_CROP >= 64
