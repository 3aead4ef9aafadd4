"""A word on the command line names a set; a part of it is kept apart, always the same one."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hieratok.data.folder import FolderSource
from hieratok.data.opening import DataConfig, open_source
from hieratok.data.openmoji import OpenMojiSource
from hieratok.data.parquet import ParquetSource
from hieratok.data.tar import TarSource
from hieratok.errors import ConfigError, DataError

KNOWN_VAL = ["0012.png", "0049.png", "0056.png", "0058.png"]  # of 0000.png to 0059.png: 5 per cent


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    return buffer.getvalue()


def folder(path: Path, count: int, prefix: str = "") -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (path / f"{prefix}{i:04}.png").write_bytes(png())
    return path


@pytest.fixture
def shards(tmp_path) -> Path:
    """Two Parquet files in `parquet`, two tar files in `tar`; three images each."""
    for kind in ("parquet", "tar"):
        (tmp_path / kind).mkdir()
    for k in range(2):
        pq.write_table(pa.table({"image": [png()] * 3}), tmp_path / f"parquet/{k}.parquet")
        with tarfile.open(tmp_path / f"tar/{k}.tar", "w") as file:
            for i in range(3):
                info = tarfile.TarInfo(f"{k}{i}.png")
                info.size = len(png())
                file.addfile(info, io.BytesIO(png()))
        (tmp_path / f"tar/._{k}.tar").write_bytes(b"what macOS leaves")
        (tmp_path / f"parquet/._{k}.parquet").write_bytes(b"what macOS leaves")
    return tmp_path


def keys(source) -> list[str]:
    return [source.key(i) for i in range(len(source))]


def test_openmoji_is_a_word():
    assert isinstance(open_source("openmoji"), OpenMojiSource)


def test_a_folder_of_images(tmp_path):
    source = open_source(folder(tmp_path / "set", 3))
    assert isinstance(source, FolderSource) and len(source) == 3


@pytest.mark.parametrize("kind, cls", [("parquet", ParquetSource), ("tar", TarSource)])
@pytest.mark.parametrize("spec, count", [("{k}", 6), ("{k}/1.{k}", 3), ("{k}/*.{k}", 6), ("{k}/[1]*", 3)])
def test_shards_are_named_by_folder_file_or_pattern(shards, kind, cls, spec, count):
    source = open_source(str(shards / spec.format(k=kind)))
    assert isinstance(source, cls) and len(source) == count
    assert source.name == str(shards / spec.format(k=kind))


def test_the_home_folder_may_be_written_as_a_tilde(shards, monkeypatch):
    monkeypatch.setenv("HOME", str(shards))
    assert len(open_source("~/tar")) == len(open_source("~/parquet/*.parquet")) == 6


def test_where_nothing_is_the_error_names_what_is_accepted(tmp_path):
    with pytest.raises(DataError) as caught:
        open_source(tmp_path / "nothing")
    for word in ("nothing", "openmoji", "folder", ".parquet", ".tar"):
        assert word in str(caught.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no images \(.*\.png.*empty"):
        open_source(tmp_path / "empty")


@pytest.mark.parametrize("spec", ["photo.png", "set.tar.gz", "mixed*"])
def test_files_of_other_kinds_are_refused_with_a_remedy(tmp_path, spec):
    for name in ("photo.png", "set.tar.gz", "mixed.tar", "mixed.parquet"):
        (tmp_path / name).write_bytes(png())
    with pytest.raises(DataError, match=r"folder of images, or \.parquet or uncompressed \.tar files"):
        open_source(str(tmp_path / spec))


def test_the_parts_are_disjoint_and_complete(tmp_path):
    path = folder(tmp_path / "set", 400)
    every, train, held = (keys(open_source(path, split, 0.1)) for split in ("all", "train", "val"))
    assert sorted(train + held) == every and 20 < len(held) < 65
    digests = {open_source(path, split, 0.1).digest for split in ("all", "train", "val")}
    assert len(digests) == 3


def test_the_split_stays_the_same_as_images_come_and_go(tmp_path):
    path = folder(tmp_path / "set", 300)
    before = set(keys(open_source(path, "val", 0.1)))
    folder(path, 100, "a")
    (path / "0007.png").unlink()
    after = set(keys(open_source(path, "val", 0.1)))
    assert {key for key in after if not key.startswith("a")} == before - {"0007.png"}
    assert before < set(keys(open_source(path, "val", 0.3))) | {"0007.png"}


def test_the_split_of_a_folder_is_the_same_for_ever_and_anywhere(tmp_path):
    first, second = (keys(open_source(folder(tmp_path / name, 60), "val")) for name in ("one", "two/three"))
    assert first == second == KNOWN_VAL


def test_a_set_too_small_to_part_is_refused_with_a_remedy(tmp_path):
    path = folder(tmp_path / "set", 2)
    with pytest.raises(DataError, match="holds 2 images, too few to keep 5% .* give data.val_source or a larger"):
        open_source(path, "val")


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_a_fraction_outside_0_to_1_names_the_field(tmp_path, fraction):
    path = folder(tmp_path / "set", 2)
    with pytest.raises(ConfigError, match="data.val_fraction"):
        open_source(path, "train", fraction)


def test_a_configuration_opens_its_parts(tmp_path):
    path, other = folder(tmp_path / "set", 200), folder(tmp_path / "held", 30)
    own = DataConfig(source=str(path), val_fraction=0.2, max_train_images=50, max_val_images=7)
    assert len(own.open("train")) == 50 and len(own.open("val")) == 7
    assert not set(keys(own.open("train"))) & set(keys(own.open("val")))
    apart = DataConfig(source=str(path), val_source=str(other), max_val_images=10)
    assert len(apart.open("train")) == 200 and len(apart.open("val")) == 10
    assert apart.open("val").name == str(other)


def test_a_configuration_says_how_images_are_framed():
    config = DataConfig(crop="squash", flip=True, augment=False, background="black", max_pixels=99)
    frame = config.frame(48)
    assert (frame.image_size, frame.crop, frame.flip) == (48, "squash", True)
    assert (frame.augment, frame.background, frame.max_pixels) == (False, "black", 99)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("background", "wihte"), ("val_fraction", 0.0), ("val_fraction", 1.0), ("max_bad_fraction", -3.0),
        ("num_workers", -1), ("max_pixels", 0), ("max_train_images", 0), ("max_val_images", -1),
    ],
)  # fmt: skip
def test_a_value_that_makes_no_sense_is_named_before_anything_is_read(field, value):
    with pytest.raises(ConfigError, match=f"data.{field}"):
        DataConfig(**{field: value})


def test_both_parts_come_from_one_reading_and_are_those_of_two(image_folder):
    config = DataConfig(source=str(image_folder), val_fraction=0.3, max_train_images=5)
    train, val = config.open_both()
    assert train.source.source is val.source
    assert [part.digest for part in (train, val)] == [config.open("train").digest, config.open("val").digest]
