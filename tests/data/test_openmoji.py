"""Emoji: single pictures, whole, in the middle, and on one side of the split with all that look like them."""

from __future__ import annotations

import pickle
import random

import numpy as np
import pytest
from PIL import Image, ImageDraw

from hieratok.data.decode import BadImage
from hieratok.data.frame import Frame
from hieratok.data.opening import open_source
from hieratok.data.openmoji import OpenMojiSource, _font, codes, toneless

SIDE = 64
GREY = Frame(SIDE, background="#808080")


@pytest.fixture(scope="module")
def emoji() -> OpenMojiSource:
    return OpenMojiSource()


@pytest.fixture(scope="module")
def number(emoji) -> dict[str, int]:
    return {emoji.key(i).split()[0]: i for i in range(len(emoji))}


def ink(emoji, index: int, frame: Frame = GREY) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of all that is not background."""
    pixels = emoji.pixels(index, frame, None)
    marked = (pixels != 128).any(-1)
    columns, rows = np.flatnonzero(marked.any(0)), np.flatnonzero(marked.any(1))
    assert len(columns), emoji.key(index)
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


def test_there_are_about_4000_in_98_classes(emoji):
    assert 3900 < len(emoji) < 4300
    assert len(emoji.classes) == 98 and {emoji.label(i) for i in range(len(emoji))} == set(range(98))
    assert "CC BY-SA 4.0" in emoji.licence


def test_without_skin_tones_half_are_left_and_every_class_is(emoji):
    toneless_ones = open_source("openmoji-toneless")
    names = {toneless_ones.key(i).split()[0] for i in range(len(toneless_ones))}
    assert 1900 < len(names) == len(toneless_ones) < 2100
    assert names < {emoji.key(i).split()[0] for i in range(len(emoji))}
    assert not any(tone in name for name in names for tone in ("1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"))
    assert toneless_ones.classes == emoji.classes and toneless_ones.digest != emoji.digest
    assert {toneless_ones.label(i) for i in range(len(toneless_ones))} == set(range(98))


@pytest.mark.parametrize(
    "name, subgroup",
    [
        ("1F600", "face-smiling"), ("1F469-1F3FD-200D-1F680", "person-role"), ("1F42C", "animal-marine"),
        ("1F355", "food-prepared"), ("1F680", "transport-air"), ("26BD", "sport"), ("1F4A1", "light-video"),
        ("0023-FE0F-20E3", "keycap"), ("1F1E9-1F1EA", "country-flag"), ("1F3F4-200D-2620-FE0F", "flag"),
    ],
)  # fmt: skip
def test_classes_are_the_subgroups_of_unicode(emoji, number, name, subgroup):
    assert emoji.classes[emoji.label(number[name])] == subgroup


def test_names_are_unique_and_keys_show_the_emoji(emoji, number):
    assert len(number) == len(emoji)
    assert emoji.key(number["1F1E9-1F1EA"]) == "1F1E9-1F1EA \U0001f1e9\U0001f1ea"
    assert codes("1F1E9-1F1EA") == [0x1F1E9, 0x1F1EA]
    assert toneless("1F469-1F3FD-200D-2764-FE0F") == "1F469-200D-2764"


def test_it_goes_to_other_processes_unchanged(emoji):
    copy = pickle.loads(pickle.dumps(emoji))
    assert copy.digest == emoji.digest and (copy.pixels(9, GREY, None) == emoji.pixels(9, GREY, None)).all()


def test_every_sequence_is_drawn_as_one_picture(emoji, number):
    """Where the font does not join a sequence, its parts stand side by side, and it is as wide as two."""
    sequences = [i for name, i in number.items() if "-" in name]
    assert len(sequences) > 2500
    font = _font(emoji.font, 64)
    single = font.getlength("\U0001f600")
    lengths = {emoji.key(i): font.getlength(emoji.text(i)) for i in sequences}
    assert {key: length for key, length in lengths.items() if length > 1.1 * single} == {}


@pytest.mark.parametrize(
    "name",
    [
        "1F1E9-1F1EA", "1F3F3-FE0F-200D-1F308", "1F3F4-E0067-E0062-E0065-E006E-E0067-E007F",  # flags
        "1F469-200D-1F680", "1F468-200D-1F469-200D-1F467-200D-1F466", "1F43B-200D-2744-FE0F",  # joined
        "1F44D-1F3FF", "1F469-1F3FD-200D-1F52C", "1F469-1F3FD-200D-1F91D-200D-1F468-1F3FF",  # skin tones
        "0035-FE0F-20E3",  # keycap
    ],
)  # fmt: skip
def test_a_sequence_is_not_its_first_part(emoji, number, name):
    whole = number[name]
    left, top, right, bottom = ink(emoji, whole)
    assert right - left > 0.35 * SIDE and bottom - top > 0.35 * SIDE
    assert np.unique(emoji.pixels(whole, GREY, None).reshape(-1, 3), axis=0).shape[0] > 8
    first = name.split("-")[0]
    if first in number:
        assert (emoji.pixels(whole, GREY, None) != emoji.pixels(number[first], GREY, None)).mean() > 0.02


def test_skin_tones_differ_in_colour_and_not_in_shape(emoji, number):
    tones = [number[f"1F44D{tone}"] for tone in ("", "-1F3FB", "-1F3FC", "-1F3FD", "-1F3FE", "-1F3FF")]
    pictures = [emoji.pixels(i, GREY, None).astype(int) for i in tones]
    boxes = np.array([ink(emoji, i) for i in tones])
    assert (boxes.max(0) - boxes.min(0)).max() <= 1
    for i, a in enumerate(pictures):
        for b in pictures[:i]:
            assert np.abs(a - b).mean() > 2


@pytest.mark.parametrize("side", [32, 64])
def test_in_evaluation_every_emoji_is_whole_and_in_the_middle(emoji, side):
    for i in range(0, len(emoji), 40):
        left, top, right, bottom = ink(emoji, i, Frame(side, background="#808080"))
        assert left > 0 and top > 0 and right < side and bottom < side, emoji.key(i)
        assert abs(left + right - side) <= 1 and abs(top + bottom - side) <= 1, emoji.key(i)
        assert 0.3 * side < max(right - left, bottom - top) <= 0.95 * side, emoji.key(i)


@pytest.mark.parametrize(
    "name", ["1F312", "1F9D1", "1F3B5", "1F614", "1F43D", "1F004", "1F1EF-1F1F5", "1F933", "1F441"]
)
def test_no_edge_is_cut_off(emoji, number, name):
    """Against the same emoji drawn eight times as large: the ink of its edge rows and columns is there."""
    small = emoji._draw(emoji.text(number[name]), SIDE, 1.0)
    large = emoji._draw(emoji.text(number[name]), 8 * SIDE, 1.0)
    box, large_box = np.array(small.getbbox()), np.array(large.getbbox()) / 8
    width, height = box[2] - box[0], box[3] - box[1]
    assert abs(width - (large_box[2] - large_box[0])) <= 2 and abs(height - (large_box[3] - large_box[1])) <= 2
    reduced = large.crop(large.getbbox()).resize((width, height), reducing_gap=None)
    a, b = (np.array(image)[..., 3].astype(int) for image in (small.crop(small.getbbox()), reduced))
    for edge in (np.s_[0], np.s_[-1], np.s_[:, 0], np.s_[:, -1]):
        assert a[edge].mean() < b[edge].mean() + 90, edge


@pytest.mark.parametrize(
    "name, size",
    [("1F425", 57), ("1F697", 57), ("1F685", 28), ("1F685", 60), ("1F5FB", 20), ("1F1E6-1F1EC", 56), ("1F9D1", 110)],
)
def test_the_ink_is_that_of_the_emoji_within_a_text(emoji, number, name, size):
    """On its own, Pillow cuts a row off some of these; with a tall neighbour, whichever it is, it does not."""
    text = emoji.text(number[name])
    found, box = emoji._ink(text, size)
    beside = Image.new("RGBA", (4 * size, 3 * size))
    ImageDraw.Draw(beside).text((size // 2,) * 2, text + "\u2614", font=_font(emoji.font, size), embedded_color=True)
    beside = beside.crop((0, 0, size // 2 + int(1.29 * size), 3 * size))
    expected, drawn = np.array(beside.crop(beside.getbbox())), np.array(found.crop(box))
    assert drawn.shape == expected.shape and (drawn == expected).all()


def test_what_the_font_cannot_draw_is_bad(emoji):
    with pytest.raises(BadImage, match="draws nothing"):
        emoji._draw(" ", SIDE, 1.0)


def test_evaluation_never_varies(emoji):
    frame = Frame(SIDE, flip=True)
    for i in (5, 1000, 3000):
        assert (emoji.pixels(i, frame, None) == emoji.pixels(i, frame, None)).all()
        assert tuple(emoji.pixels(i, frame, None)[0, 0]) == (255, 255, 255)


def test_training_varies_with_the_random_numbers_alone(emoji):
    frame = Frame(SIDE, flip=True)
    pictures = [emoji.pixels(1000, frame, random.Random(seed)) for seed in range(30)]
    assert len({p.tobytes() for p in pictures}) == 30
    assert all((emoji.pixels(1000, frame, random.Random(s)) == p).all() for s, p in enumerate(pictures))
    corners = [tuple(p[0, 0]) for p in pictures]
    assert 4 < corners.count((255, 255, 255)) < 22
    assert {p.shape for p in pictures} == {(SIDE, SIDE, 3)} and pictures[0].dtype == np.uint8


def test_training_scales_shifts_and_turns(emoji, number):
    pictures = [emoji.pixels(number["1F1EF-1F1F5"], Frame(SIDE), random.Random(seed)) for seed in range(40)]
    dark = [(p < 60).all(-1) for p in pictures if (p[0, 0] == 255).all()]  # the flag's outline on white
    lines = [d.sum(1).max() for d in dark]
    assert min(lines) < 20 and max(lines) > 30  # as it is turned, its edge leaves the row
    centres = np.array([np.argwhere(d).mean(0) for d in dark])
    assert (np.ptp(centres, axis=0) > 6).all() and (np.abs(centres - SIDE / 2) < 0.2 * SIDE).all()
    assert max(d.sum() for d in dark) > 1.3 * min(d.sum() for d in dark)


def test_training_shows_most_of_every_emoji(emoji):
    """Scale, shift and rotation leave the emoji in view: its middle is never mere background."""
    for i in range(0, len(emoji), 200):
        for seed in range(3):
            pixels = emoji.pixels(i, Frame(SIDE, background="#808080"), random.Random(seed))
            assert np.unique(pixels.reshape(-1, 3), axis=0).shape[0] > 4, emoji.key(i)


def test_without_augmentation_training_only_mirrors(emoji, number):
    hand = number["1F449"]
    plain = emoji.pixels(hand, GREY, None)
    frame = Frame(SIDE, flip=True, augment=False, background="#808080")
    seen = {emoji.pixels(hand, frame, random.Random(seed)).tobytes() for seed in range(20)}
    assert len(seen) == 2 and plain.tobytes() in seen
    assert (emoji.pixels(hand, Frame(SIDE, augment=False, background="#808080"), random.Random(0)) == plain).all()


def names_of(split: str) -> list[str]:
    source = open_source("openmoji", split)
    return [source.key(i).split()[0] for i in range(len(source))]


def test_training_and_validation_share_no_emoji_in_any_skin_tone(emoji):
    train, held = names_of("train"), names_of("val")
    assert len(train) + len(held) == len(emoji) and 0.03 < len(held) / len(emoji) < 0.08
    assert not {toneless(name) for name in train} & {toneless(name) for name in held}


def test_the_split_is_the_same_for_ever():
    train, held = set(names_of("train")), set(names_of("val"))
    assert {"1F192", "1F3EE", "1F4CA", "1F926", "1F926-1F3FE"} <= held
    assert {"1F52D", "1F933", "1F933-1F3FC", "1F9D1-200D-1F33E", "0023-FE0F-20E3"} <= train
