"""The grid of reconstructions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from hieratok.engine.pictures import (
    CAPTION,
    ERROR_COLOURS,
    GAP,
    LARGEST_ERROR,
    PAPER,
    error_map,
    reconstruction_grid,
    save_picture,
)


def plain(colours: list[tuple[int, int, int]], side: int) -> torch.Tensor:
    """uint8 images of one colour each."""
    return torch.tensor(colours, dtype=torch.uint8)[:, :, None, None].expand(-1, -1, side, side)


def centre(sheet: Image.Image, row: int, column: int, cell: int) -> tuple[int, ...]:
    place = column * (cell + GAP) + cell // 2, CAPTION + row * (cell + GAP) + cell // 2
    pixel = sheet.getpixel(place)
    assert isinstance(pixel, tuple)
    return pixel


def test_a_row_is_an_image_and_the_columns_are_original_scales_and_error():
    originals = plain([(200, 10, 10), (10, 10, 200)], 32)
    scales = [plain([(90, 0, 0), (0, 0, 90)], 8), plain([(150, 0, 0), (0, 0, 150)], 16), originals]
    sheet = reconstruction_grid(originals, scales, sides=[1, 2, 4])
    cell = 96  # 32 pixels, three times as large
    assert sheet.size == (5 * (cell + GAP) - GAP, CAPTION + 2 * (cell + GAP) - GAP)
    assert [centre(sheet, 0, c, cell) for c in range(4)] == [(200, 10, 10), (90, 0, 0), (150, 0, 0), (200, 10, 10)]
    assert [centre(sheet, 1, c, cell) for c in range(4)] == [(10, 10, 200), (0, 0, 90), (0, 0, 150), (10, 10, 200)]
    assert centre(sheet, 0, 4, cell) == tuple(ERROR_COLOURS[0])  # the last scale is the original: no error
    assert sheet.getpixel((cell + GAP // 2, CAPTION + cell // 2)) == PAPER


def test_every_column_has_a_caption():
    originals = plain([(0, 0, 0)], 32)
    sheet = np.asarray(reconstruction_grid(originals, [originals], sides=[4]))
    for column in range(3):
        strip = sheet[:CAPTION, column * (96 + GAP) : column * (96 + GAP) + 96]
        assert (strip != PAPER).any()


def test_large_images_are_shown_at_their_own_size():
    originals = plain([(1, 2, 3)], 256)
    assert reconstruction_grid(originals, [originals], sides=[16]).size == (3 * (256 + GAP) - GAP, CAPTION + 256)


def test_the_error_is_dark_for_none_and_brightest_from_the_largest_on():
    black = np.zeros((2, 2, 3), np.uint8)
    assert (error_map(black, black) == ERROR_COLOURS[0]).all()
    assert (error_map(black, black + LARGEST_ERROR) == ERROR_COLOURS[-1]).all()
    assert (error_map(black, black + 255) == ERROR_COLOURS[-1]).all()
    assert (error_map(black, black + LARGEST_ERROR // 2) == ERROR_COLOURS[2]).all()


def test_the_error_has_no_sign_and_does_not_wrap_around():
    dark, light = np.full((1, 1, 3), 3, np.uint8), np.full((1, 1, 3), 250, np.uint8)
    assert (error_map(dark, light) == error_map(light, dark)).all()
    assert (error_map(dark, light) == ERROR_COLOURS[-1]).all()


def test_the_error_grows_lighter_with_the_difference():
    zero = np.zeros((1, 1, 3), np.uint8)
    lightness = [int(error_map(zero, zero + d).astype(int).sum()) for d in range(0, LARGEST_ERROR + 1, 4)]
    assert lightness == sorted(lightness) and lightness[0] < lightness[-1]


def test_a_picture_is_written_in_one_step_into_a_folder_that_need_not_exist(tmp_path, monkeypatch):
    path = tmp_path / "pictures" / "step-00000001.png"
    sheet = reconstruction_grid(plain([(9, 8, 7)], 32), [plain([(9, 8, 7)], 32)], sides=[4])
    assert save_picture(sheet, path) == path
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(image), np.asarray(sheet))
    assert [p.name for p in path.parent.iterdir()] == [path.name]

    def broken(*_: object, **__: object) -> None:
        raise OSError("full")

    monkeypatch.setattr(Image.Image, "save", broken)
    before = path.read_bytes()
    with pytest.raises(OSError, match="full"):
        save_picture(sheet, path)
    assert path.read_bytes() == before
