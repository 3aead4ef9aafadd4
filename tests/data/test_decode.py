"""Encoded bytes become upright RGB, or say why not; nothing else ever comes out."""

from __future__ import annotations

import io
import struct
import time
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hieratok.data.decode import BadImage, decode_image, parse_colour, to_float, to_uint8
from hieratok.errors import ConfigError

MAX = 1_000_000


def encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decode(data: bytes, background: str = "white") -> np.ndarray:
    image = decode_image(data, None, MAX, background)
    assert image.mode == "RGB"
    return np.array(image).astype(int)


def smooth(width: int = 48, height: int = 40) -> np.ndarray:
    """A soft colourful picture that differs from all of its rotations and mirrors."""
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    return (255 * np.stack([x, y, (x + 2 * y) / 3], -1)).astype(np.uint8)


def png(width: int, height: int, depth: int, colour: int, rows: bytes, extra: bytes = b"") -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


# How a camera held in each of the eight ways stores the upright picture.
STORED = {
    1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud,
    5: lambda a: a.transpose(1, 0, 2), 6: np.rot90, 7: lambda a: np.rot90(a.transpose(1, 0, 2), 2),
    8: lambda a: np.rot90(a, -1),
}  # fmt: skip


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_every_exif_orientation_gives_the_same_upright_picture(orientation, kind):
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](smooth())))
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = decode(encode(stored, kind, exif=exif, **({"quality": 95} if kind == "JPEG" else {})))
    assert found.shape == (40, 48, 3)
    assert np.abs(found - smooth()).max() <= (12 if kind == "JPEG" else 0)


def test_a_reduced_jpeg_is_turned_upright_too():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(Image.fromarray(np.ascontiguousarray(np.rot90(smooth(201, 101)))), "JPEG", exif=exif, quality=95)
    image = decode_image(data, 25, MAX)
    assert image.size == (50, 25)
    assert np.abs(np.array(image).astype(int)[2, 48] - smooth(50, 25)[2, 48]).max() < 8


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_data_turns_nothing():
    data = encode(Image.fromarray(smooth()), "JPEG", exif=b"Exif\x00\x00MM\x00*\x00\x00\xff\xff\x01\x12garbage")
    assert decode(data).shape == (40, 48, 3)


@pytest.mark.parametrize("background, rgb", [("white", (255, 255, 255)), ("#102030", (16, 32, 48))])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PNG transparent colour", "WEBP"])
def test_alpha_is_composed_over_the_background(mode, background, rgb):
    colour = np.array([200, 200, 200] if mode == "LA" else [200, 100, 0])
    alpha = {"RGBA": 128, "LA": 64, "WEBP": 128}.get(mode, 0)
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[...] = [*colour, 255]
    rgba[:4, :, 3] = alpha
    image = Image.fromarray(rgba)
    if mode == "LA":
        data = encode(image.convert("LA"), "PNG")
    elif mode == "P":
        paletted = Image.new("P", (8, 8), 1)
        paletted.putpalette([0, 0, 0, *(int(c) for c in colour)])
        paletted.paste(0, (0, 0, 8, 4))
        data = encode(paletted, "PNG", transparency=0)
    elif mode == "PNG transparent colour":
        rgb_pixels = rgba[..., :3].copy()
        rgb_pixels[:4] = [1, 2, 3]
        data = encode(Image.fromarray(rgb_pixels), "PNG", transparency=(1, 2, 3))
    elif mode == "WEBP":
        data = encode(image, "WEBP", lossless=True)
    else:
        data = encode(image, "PNG")
    found = decode(data, background)
    expected = (colour * alpha + np.array(rgb) * (255 - alpha)) / 255
    assert np.abs(found[0, 0] - expected).max() <= 1
    assert (found[7, 7] == colour).all()


def test_an_unknown_background_is_no_bad_image():
    buffer = io.BytesIO()
    Image.new("RGBA", (4, 4)).save(buffer, "PNG")
    with pytest.raises(ConfigError, match="data.background 'wihte'"):
        decode(buffer.getvalue(), "wihte")


def test_an_unknown_background_names_the_field():
    with pytest.raises(ConfigError, match="data.background 'purpel'"):
        parse_colour("purpel")


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_of_grey_are_scaled_not_clipped(kind):
    values = np.array([[0, 257, 300 * 100, 128 * 257, 65535]], np.uint16)
    found = decode(encode(Image.fromarray(values), kind))
    assert found[0, :, 0].tolist() == [0, 1, 117, 128, 255]
    assert (found == found[..., :1]).all()


def test_sixteen_bits_of_colour_are_scaled():
    row = b"\0" + struct.pack(">6H", 65535, 257, 0, 128 * 257, 20 * 257, 65535)
    assert decode(png(2, 1, 16, 2, row)).tolist() == [[[255, 1, 0], [128, 20, 255]]]


def test_a_cmyk_jpeg_looks_like_the_rgb_original():
    data = encode(Image.fromarray(smooth()).convert("CMYK"), "JPEG", quality=95)
    assert Image.open(io.BytesIO(data)).mode == "CMYK"
    assert np.abs(decode(data) - smooth()).mean() < 4


@pytest.mark.parametrize("mode", ["L", "1"])
def test_grey_and_black_and_white_become_three_equal_channels(mode):
    image = Image.fromarray(smooth()).convert(mode)
    found = decode(encode(image, "PNG"))
    assert (found == np.array(image.convert("L"))[..., None]).all()


def test_floating_point_pixels_are_refused_with_a_remedy():
    with pytest.raises(BadImage, match="convert the image to 8 or 16 bits"):
        decode(encode(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"))


@pytest.mark.parametrize("width, height", [(1001, 1000), (60_000, 60_000), (2**31 - 1, 2**31 - 1)])
def test_a_header_that_claims_too_many_pixels_is_refused_before_decoding(width, height):
    data = png(width, height, 8, 2, b"")
    begin = time.perf_counter()
    with pytest.raises(BadImage, match=f"max_pixels = {MAX}"):
        decode_image(data, None, MAX)
    assert time.perf_counter() - begin < 0.2


def test_as_many_pixels_as_allowed_are_decoded():
    data = encode(Image.new("RGB", (100, 10)), "PNG")
    assert decode_image(data, None, 1000).size == (100, 10)
    with pytest.raises(BadImage, match="100 x 10 pixels"):
        decode_image(data, None, 999)


NOISE = np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)
JPEG = encode(Image.fromarray(NOISE), "JPEG")
PNG = encode(Image.fromarray(NOISE), "PNG")


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "empty file"),
        (b"Not Found", "not an image"),
        (bytes(range(256)), "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (JPEG[: len(JPEG) // 2], "truncated"),
        (PNG[: len(PNG) // 2], "truncated"),
        (JPEG[:4], "not an image|truncated"),
        (PNG[:20], "not an image|Truncated"),
    ],
)
def test_what_is_not_a_whole_image_is_bad_and_says_why(data, reason):
    with pytest.raises(BadImage, match=reason) as caught:
        decode(data)
    assert len(str(caught.value)) > 5 and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_an_animation_gives_its_first_frame(kind):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    data = encode(
        frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
    )
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert (decode(data) == [255, 0, 0]).all()


@pytest.mark.parametrize("size", [(640, 480), (333, 1000), (130, 127), (64, 64), (40, 300), (129, 65)])
@pytest.mark.parametrize("side", [16, 64, 65])
def test_a_jpeg_decoded_small_has_no_fewer_pixels_than_asked_for_and_looks_the_same(size, side):
    data = encode(Image.fromarray(smooth(*size)), "JPEG", quality=95)
    full, small = decode_image(data, None, MAX), decode_image(data, side, MAX)
    assert full.size == size
    assert min(small.size) >= min(side, *size)
    assert min(small.size) <= 2 * side or min(small.size) == round(min(size) / 8)
    both = [np.array(image.resize((16, 16), Image.Resampling.LANCZOS)).astype(int) for image in (full, small)]
    assert np.abs(both[0] - both[1]).mean() < 2


def test_a_large_jpeg_is_not_decoded_in_full():
    data = encode(Image.fromarray(smooth(640, 640)), "JPEG")
    assert decode_image(data, 80, MAX).size == (80, 80)


def only_bad_image_or_rgb(data: bytes) -> None:
    try:
        image = decode_image(data, 16, MAX)
    except BadImage as error:
        assert str(error)
    else:
        assert image.mode == "RGB" and image.width * image.height > 0


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.binary(max_size=300), st.sampled_from([b"", JPEG[:20], PNG[:16], b"GIF89a", b"RIFF\x40\0\0\0WEBPVP8 ", b"II*\0"])
)
def test_random_bytes_only_ever_are_bad_or_an_image(body, head):
    only_bad_image_or_rgb(head + body)


@settings(max_examples=250, deadline=None, derandomize=True)
@given(
    st.sampled_from([JPEG, PNG]),
    st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), min_size=1, max_size=8),
    st.integers(0, 4000),
)
def test_mutated_images_only_ever_are_bad_or_an_image(data, changes, cut):
    mutated = bytearray(data)
    for place, value in changes:
        mutated[place % len(data)] = value
    only_bad_image_or_rgb(bytes(mutated))
    only_bad_image_or_rgb(bytes(mutated[: cut % len(data)]))


def test_all_256_values_survive_the_way_to_floats_and_back():
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(1, 3, 1, 1)
    floats = to_float(values)
    assert floats.dtype == torch.float32 and floats.min() == -1 and floats.max() == 1
    assert torch.equal(to_uint8(floats), values)
    assert torch.equal(to_uint8(floats.to(torch.float16)), values)


def test_floats_beyond_the_range_are_clamped_and_rounded_to_the_nearest():
    assert to_uint8(torch.tensor([-3.0, 3.0, 0.9 / 127.5 - 1, 0.4 / 127.5 - 1])).tolist() == [0, 255, 1, 0]
