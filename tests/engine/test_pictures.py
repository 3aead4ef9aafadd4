"""The sheets of reconstructions and of samples."""

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
    NAMES,
    PAPER,
    cut_sample_grid,
    cut_sheet,
    error_map,
    reconstruction_grid,
    sample_grid,
    save_picture,
    scales_grid,
    shortened,
)
from hieratok.errors import DataError


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


def noise(count: int, side: int) -> torch.Tensor:
    """uint8 images of which no two pixels are alike."""
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, 3, side, side), dtype=np.uint8))


@pytest.mark.parametrize("side", [8, 32, 64, 80, 256])
@pytest.mark.parametrize("names", [(), ("cat", "Übergröße " * 9)])
def test_samples_come_out_of_their_grid_as_they_went_in(tmp_path, side, names):
    images = noise(6, side)
    sheet = sample_grid(images, 3, names)
    rows = images.permute(0, 2, 3, 1).reshape(2, 3, side, side, 3).numpy()
    for picture in (sheet, save_picture(sheet, tmp_path / "grid.png"), str(tmp_path / "grid.png")):
        cut = cut_sample_grid(picture)
        np.testing.assert_array_equal(cut.tiles, rows)
        assert cut.row_names == names


def test_samples_stand_row_by_row_beside_their_names():
    images = plain([(i, 2 * i, 3 * i) for i in range(1, 7)], 32)
    sheet = sample_grid(images, 2, ["a", "b", "c"])
    assert sheet.size == (NAMES + 2 * (96 + GAP) - GAP, 3 * (96 + GAP) - GAP)
    for i in range(6):
        place = NAMES + i % 2 * (96 + GAP) + 48, i // 2 * (96 + GAP) + 48
        assert sheet.getpixel(place) == (i + 1, 2 * i + 2, 3 * i + 3)
    names = np.asarray(sheet)[:, :NAMES]
    assert all((names[row * (96 + GAP) : row * (96 + GAP) + 96] != PAPER).any() for row in range(3))
    assert sample_grid(images, 2).width == 2 * (96 + GAP) - GAP  # no room for names that are not there


def test_a_long_name_is_shortened_to_fit():
    assert shortened("cat", 100) == "cat"
    short = shortened("a very long name of a class of images", 100)
    assert short.startswith("a very") and short.endswith("...")
    assert shortened("猫", 100) == "?"  # the font has no such letter
    sheet = sample_grid(plain([(9, 9, 9)], 32), 1, ["name " * 99])
    assert (np.asarray(sheet)[:, NAMES - GAP : NAMES] == PAPER).all()


def test_a_sample_is_shown_at_every_scale_from_coarse_to_fine():
    scales = [plain([(10 * side, row, 0) for row in range(2)], 8 * side) for side in (1, 2, 4)]
    sheet = scales_grid(scales, [1, 2, 4], ["first", "second"])
    tiles = cut_sheet(sheet, 32, 3, left=NAMES, top=CAPTION)
    assert tiles.shape == (2, 3, 32, 32, 3)
    for row in range(2):
        for column, side in enumerate((1, 2, 4)):
            assert (tiles[row, column] == (10 * side, row, 0)).all()
    assert (np.asarray(sheet)[:CAPTION, NAMES:] != PAPER).any()


def test_a_sheet_that_is_laid_out_otherwise_is_not_cut():
    sheet = reconstruction_grid(noise(2, 32), [noise(2, 32)], sides=[4])
    assert cut_sheet(sheet, 32, 3, top=CAPTION).shape == (2, 3, 32, 32, 3)
    assert cut_sheet(sheet, 32, 4, top=CAPTION) is None
    assert cut_sheet(sheet, 64, 3, top=CAPTION) is None
    assert cut_sheet(sheet, 32, 3) is None
    assert cut_sheet(Image.new("RGB", (5, 5)), 32, 1) is None


def test_what_is_no_whole_grid_of_samples_is_refused(tmp_path):
    with pytest.raises(DataError, match="5 images do not fill rows of 2"):
        sample_grid(noise(5, 8), 2)
    with pytest.raises(DataError, match="3 names for 2 rows"):
        sample_grid(noise(4, 8), 2, ["a", "b", "c"])
    path = save_picture(reconstruction_grid(noise(1, 8), [noise(1, 8)], [1]), tmp_path / "other.png")
    with pytest.raises(DataError, match=r"other\.png is no grid of samples"):
        cut_sample_grid(path)
    sheet = sample_grid(noise(4, 8), 2)
    smaller = sheet.resize((50, 50))
    smaller.info.update(sheet.info)
    with pytest.raises(DataError, match="was changed"):
        cut_sample_grid(smaller)
