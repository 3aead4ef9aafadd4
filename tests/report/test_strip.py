"""Samples over the steps of a training: strips and moving pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from hieratok.engine.pictures import CAPTION, GAP, NAMES, cell_of, reconstruction_grid, sample_grid, save_picture
from hieratok.errors import CheckpointError, ConfigError, DataError
from hieratok.report.strip import over_steps, spread_places, strip

CELL = cell_of(32)


def test_a_strip_has_a_column_per_step_and_a_row_per_class(make_generator_run, shade, tmp_path):
    folder = make_generator_run(pictures=[100, 200, 300, 400, 500])
    path = strip(folder, tmp_path / "out" / "strip.png", rows=3, columns=3)
    with Image.open(path) as picture:
        assert picture.size == (NAMES + 3 * (CELL + GAP) - GAP, CAPTION + 3 * (CELL + GAP) - GAP)
        for row in range(3):
            for column, step in enumerate((100, 300, 500)):
                place = NAMES + column * (CELL + GAP) + CELL // 2, CAPTION + row * (CELL + GAP) + CELL // 2
                assert picture.getpixel(place) == (shade(step, row, 0),) * 3


def test_more_rows_than_classes_take_more_samples_of_each(make_generator_run, shade):
    folder = make_generator_run(pictures=[100, 200])
    found = over_steps(sorted((folder / "pictures").iterdir()), rows=5, columns=6)
    assert found.steps == [100, 200]
    assert found.names == ["animals", "animals", "flags", "flags", "food"]
    assert [int(tiles[0][0, 0, 0]) for tiles in found.tiles] == [shade(100, r, c) for r, c in
                                                                 [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]]  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "count", "places"),
    [
        ((10, 4), 3, [(0, 0), (4, 0), (9, 0)]),
        ((2, 3), 5, [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]),
        ((1, 2), 9, [(0, 0), (0, 1)]),
        ((3, 3), 1, [(2, 0)]),
    ],
)
def test_samples_are_spread_over_the_classes(shape, count, places):
    assert spread_places(*shape, count) == places


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_a_moving_picture_has_a_frame_per_picture(make_generator_run, shade, tmp_path, suffix):
    steps = [100, 200, 300]
    path = strip(make_generator_run(pictures=steps), tmp_path / f"moving{suffix}", rows=2, columns=2)
    with Image.open(path) as picture:
        assert picture.n_frames == len(steps)
        assert picture.info["loop"] == 0
        assert picture.size == (NAMES + 2 * (CELL + GAP) - GAP, CAPTION + 2 * (CELL + GAP) - GAP)
        for frame, step in enumerate(steps):
            picture.seek(frame)
            pixel = picture.convert("RGB").getpixel((NAMES + CELL + GAP + CELL // 2, CAPTION + CELL // 2))
            assert np.abs(np.array(pixel) - shade(step, 0, 1)).max() <= 2  # GIF has 256 colours


def test_a_run_that_went_on_with_another_layout_is_shown_from_there(make_generator_run):
    folder = make_generator_run(pictures=[100, 200])
    other = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    save_picture(sample_grid(other, 2), folder / "pictures" / "step-00000050.png")
    assert over_steps(sorted((folder / "pictures").iterdir()), rows=4, columns=6).steps == [100, 200]


def test_what_cannot_be_drawn_is_refused_with_the_remedy(make_generator_run, tmp_path, images):
    folder = make_generator_run()
    with pytest.raises(DataError, match=r"train\.picture_every"):
        strip(folder, tmp_path / "strip.png")
    with pytest.raises(ConfigError, match=r"\.png, a moving picture in \.gif or \.webp"):
        strip(folder, tmp_path / "strip.mp4")
    with pytest.raises(ConfigError, match="rows is 0"):
        strip(folder, tmp_path / "strip.png", rows=0)
    save_picture(reconstruction_grid(images, [images], [4]), folder / "pictures" / "step-00000001.png")
    with pytest.raises(DataError, match=r"step-00000001\.png is no grid of samples"):
        strip(folder, tmp_path / "strip.png")
    with pytest.raises(CheckpointError, match="run.json"):
        strip(tmp_path, tmp_path / "strip.png")
    assert not list(tmp_path.glob("strip.*"))
