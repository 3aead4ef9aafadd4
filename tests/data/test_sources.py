"""Folders, Parquet files and tar shards are the same kind of thing: numbered, labelled images."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hieratok.data.decode import BadImage
from hieratok.data.folder import FolderSource
from hieratok.data.frame import Frame
from hieratok.data.parquet import ParquetSource
from hieratok.data.source import PackedStrings, Subset, digest, resolve_labels, spread
from hieratok.data.tar import TarSource
from hieratok.errors import DataError

FRAME = Frame(16)


def png(i: int, side: int = 16) -> bytes:
    """An image of one colour, by which it can be told from all others."""
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), colour(i)).save(buffer, "PNG")
    return buffer.getvalue()


def colour(i: int) -> tuple[int, int, int]:
    return (i * 7 % 256, i * 3 % 256, 200)


def shown(source, index: int) -> tuple[int, ...]:
    return tuple(int(v) for v in source.pixels(index, FRAME, None)[5, 5])


def shows(source, numbers) -> bool:
    return [shown(source, k) for k in range(len(source))] == [colour(i) for i in numbers]


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


class TestFolder:
    def test_the_first_level_of_sub_folders_names_the_classes(self, tmp_path):
        for i, path in enumerate(["cats/1.png", "cats/old/2.png", "dogs/1.PNG", "top.png"]):
            write(tmp_path / path, png(i))
        write(tmp_path / "dogs/notes.txt", b"no image")
        source = FolderSource(tmp_path)
        keys = [source.key(i) for i in range(len(source))]
        assert keys == ["cats/1.png", "cats/old/2.png", "dogs/1.PNG", "top.png"]
        assert [source.classes[source.label(i)] for i in range(4)] == ["cats", "cats", "dogs", ""]
        assert shows(source, range(4))

    def test_hidden_files_and_folders_are_left_out(self, tmp_path):
        for path in ["a.png", "._a.png", ".cache/b.png", ".c.png"]:
            write(tmp_path / path, png(1))
        assert len(FolderSource(tmp_path)) == 1

    def test_circles_of_links_and_pipes_are_survived(self, tmp_path):
        write(tmp_path / "real/a.png", png(1))
        (tmp_path / "real/circle").symlink_to(tmp_path)
        (tmp_path / "real/itself.png").symlink_to(tmp_path / "real/itself.png")
        (tmp_path / "real/nowhere.png").symlink_to(tmp_path / "nothing.png")
        (tmp_path / "real/link.png").symlink_to(tmp_path / "real/a.png")
        (tmp_path / "real/folder.png").symlink_to(tmp_path / "real")
        os.mkfifo(tmp_path / "pipe.png")
        source = FolderSource(tmp_path)
        keys = [source.key(i) for i in range(len(source))]
        assert keys == [f"real/{name}.png" for name in ("a", "itself", "link", "nowhere")]
        assert shown(source, 2) == colour(1)
        for index, reason in ((1, "symbolic links"), (3, "No such file")):
            with pytest.raises(BadImage, match=reason):
                source.pixels(index, FRAME, None)

    def test_odd_names_are_names_too(self, tmp_path):
        names = [b"na\xefve.png", "日本 語.png".encode(), b"new\nline.png", b"caf\xc3\xa9 .jpg.png", b"#%20.png"]
        folder = os.path.join(os.fsencode(tmp_path), b"cl\xe4ss")
        os.mkdir(folder)
        for i, name in enumerate(names):
            with open(os.path.join(folder, name), "wb") as file:
                file.write(png(i))
        source = pickle.loads(pickle.dumps(FolderSource(tmp_path)))
        assert len(source) == len(names)
        found = {os.fsencode(source.key(i)): shown(source, i) for i in range(len(source))}
        assert found == {b"cl\xe4ss/" + name: colour(i) for i, name in enumerate(names)}

    def test_the_digest_tells_names_and_sizes(self, tmp_path):
        file = write(tmp_path / "a.png", png(1))
        write(tmp_path / "b.png", png(2))
        first = FolderSource(tmp_path).digest
        assert FolderSource(tmp_path).digest == first
        file.write_bytes(png(1) + b"\0")
        longer = FolderSource(tmp_path).digest
        file.write_bytes(png(1))
        file.rename(tmp_path / "c.png")
        assert len({first, longer, FolderSource(tmp_path).digest}) == 3

    def test_a_vanished_file_is_a_bad_image(self, tmp_path):
        file = write(tmp_path / "a.png", png(1))
        source = FolderSource(tmp_path)
        file.unlink()
        with pytest.raises(BadImage, match="No such file"):
            source.pixels(0, FRAME, None)

    def test_a_folder_without_images_says_what_it_looked_for(self, tmp_path):
        write(tmp_path / "a.txt", b"x")
        with pytest.raises(DataError, match=r"no images \(.*\.jpg.*\.png"):
            FolderSource(tmp_path)


STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def parquet(path: Path, images: list, kind=None, *, metadata=None, rows: int = 4, **columns) -> Path:
    arrays = {"image": pa.array(images, kind or pa.binary()), **{k: pa.array(v) for k, v in columns.items()}}
    table = pa.table(arrays)
    if metadata:
        table = table.replace_schema_metadata({"huggingface": json.dumps(metadata)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=rows)
    return path


class TestParquet:
    @pytest.mark.parametrize("in_memory", [1 << 30, 0])
    @pytest.mark.parametrize("struct", [False, True])
    def test_several_files_are_one_set(self, tmp_path, monkeypatch, struct, in_memory):
        monkeypatch.setenv("HIERATOK_CACHE", str(tmp_path / "cache"))
        wrap = (lambda d: {"bytes": d, "path": "x.png"}) if struct else (lambda d: d)
        paths = [
            parquet(tmp_path / f"{k}.parquet", [wrap(png(10 * k + i) + bytes(999)) for i in range(10)],
                    STRUCT if struct else None, label=[k] * 10)
            for k in range(3)
        ]  # fmt: skip
        source = ParquetSource(paths[::-1], "set", in_memory)
        for one in (source, pickle.loads(pickle.dumps(source))):
            assert len(one) == 30 and shows(one, range(30))
            assert [one.label(i) for i in range(30)] == [i // 10 for i in range(30)]
            assert one.key(0) == "0.parquet#0" and one.key(29) == "2.parquet#9"
        assert (tmp_path / "cache").exists() == (in_memory == 0)
        assert in_memory or len(pickle.dumps(source)) < 10_000

    def test_the_mapped_cache_gives_the_same_bytes_and_is_written_once(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HIERATOK_CACHE", str(tmp_path / "cache"))
        paths = [parquet(tmp_path / "a.parquet", [png(i) for i in range(9)])]
        held, mapped = ParquetSource(paths, "set"), ParquetSource(paths, "set", 0)
        assert [held.read(i) for i in range(9)] == [mapped.read(i) for i in range(9)] == [png(i) for i in range(9)]
        assert held.digest == mapped.digest
        (cache,) = (tmp_path / "cache").iterdir()
        written = cache.stat().st_mtime_ns
        assert shows(ParquetSource(paths, "set", 0), range(9))
        assert [p.stat().st_mtime_ns for p in (tmp_path / "cache").iterdir()] == [written]

    @pytest.mark.parametrize("kept", [0, 700, -1])
    def test_a_torn_cache_is_written_anew(self, tmp_path, monkeypatch, kept):
        monkeypatch.setenv("HIERATOK_CACHE", str(tmp_path / "cache"))
        paths = [parquet(tmp_path / "a.parquet", [png(i) for i in range(9)])]
        ParquetSource(paths, "set", 0)
        (cache,) = (tmp_path / "cache").iterdir()
        cache.write_bytes(cache.read_bytes()[:kept])
        assert shows(ParquetSource(paths, "set", 0), range(9))

    def test_the_cache_of_another_set_of_the_same_names_and_sizes_is_not_taken(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HIERATOK_CACHE", str(tmp_path / "cache"))
        first = parquet(tmp_path / "first/a.parquet", [b"aaaa" * 9])
        second = parquet(tmp_path / "second/a.parquet", [b"bbbb" * 9])
        assert first.stat().st_size == second.stat().st_size
        assert [ParquetSource([p], "set", 0).read(0)[:1] for p in (first, second)] == [b"a", b"b"]
        parquet(first, [b"cccc" * 9])
        assert ParquetSource([first], "set", 0).read(0)[:1] == b"c"

    def test_a_cache_folder_that_cannot_be_made_is_a_data_error(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HIERATOK_CACHE", str(write(tmp_path / "file", b"") / "cache"))
        with pytest.raises(DataError, match="set cannot be read: NotADirectoryError"):
            ParquetSource([parquet(tmp_path / "a.parquet", [png(1)])], "set", 0)

    @pytest.mark.parametrize(
        "labels, expected, classes",
        [
            ([2, 0, 2], [2, 0, 2], ["0", "1", "2"]),
            (["dog", "cat", "dog"], [1, 0, 1], ["cat", "dog"]),
            ([-1, 3, 3], [0, 1, 1], ["-1", "3"]),
            ([2_000_000, 5, 5], [0, 1, 1], ["2000000", "5"]),
            ([None, "a", "a"], [0, 1, 1], ["None", "a"]),
        ],
    )
    def test_labels_may_be_numbers_or_names(self, tmp_path, labels, expected, classes):
        source = ParquetSource([parquet(tmp_path / "a.parquet", [png(i) for i in range(3)], label=labels)], "set")
        assert [source.label(i) for i in range(3)] == expected and source.classes == classes

    def test_hugging_face_names_of_classes_are_taken(self, tmp_path):
        features = {"label": {"names": ["zebra", "ant"], "_type": "ClassLabel"}, "image": {"_type": "Image"}}
        images = [{"bytes": png(i), "path": None} for i in range(3)]
        path = parquet(
            tmp_path / "a.parquet", images, STRUCT, metadata={"info": {"features": features}}, label=[1, 0, 1]
        )
        source = ParquetSource([path], "set")
        assert source.classes == ["zebra", "ant"] and [source.label(i) for i in range(3)] == [1, 0, 1]

    def test_names_that_do_not_cover_the_labels_are_not_taken(self, tmp_path):
        features = {"label": {"names": ["zebra", "ant"], "_type": "ClassLabel"}}
        path = parquet(tmp_path / "a.parquet", [png(0)] * 2, metadata={"info": {"features": features}}, label=[-1, -1])
        source = ParquetSource([path], "set")
        assert source.classes == ["-1"] and source.label(0) == 0

    def test_without_labels_there_is_one_class(self, tmp_path):
        source = ParquetSource([parquet(tmp_path / "a.parquet", [png(0)] * 2)], "set")
        assert source.classes == ["0"] and [source.label(0), source.label(1)] == [0, 0]

    @pytest.mark.parametrize("in_memory", [1 << 30, 0])
    @pytest.mark.parametrize("struct", [False, True])
    def test_a_row_without_bytes_is_a_bad_image(self, tmp_path, monkeypatch, struct, in_memory):
        monkeypatch.setenv("HIERATOK_CACHE", str(tmp_path / "cache"))
        images = (
            [{"bytes": png(0), "path": None}, None, {"bytes": None, "path": "elsewhere.png"}]
            if struct
            else [png(0), None, None]
        )
        source = ParquetSource([parquet(tmp_path / "a.parquet", images, STRUCT if struct else None)], "set", in_memory)
        assert len(source) == 3 and shown(source, 0) == colour(0)
        for i in (1, 2):
            with pytest.raises(BadImage, match="holds no image bytes"):
                source.pixels(i, FRAME, None)

    @pytest.mark.parametrize("damage", ["cut", "text", "empty", "pages"])
    @pytest.mark.parametrize("in_memory", [1 << 30, 0])
    def test_a_damaged_file_is_a_data_error(self, tmp_path, monkeypatch, damage, in_memory):
        monkeypatch.setenv("HIERATOK_CACHE", str(tmp_path / "cache"))
        path = parquet(tmp_path / "a.parquet", [os.urandom(900) for _ in range(20)])
        data = bytearray(path.read_bytes())
        if damage == "pages":
            data[4:400] = bytes(396)
        path.write_bytes({"cut": data[:-50], "text": b"Not Found", "empty": b"", "pages": data}[damage])
        with pytest.raises(DataError, match="set"):
            ParquetSource([path], "set", in_memory)
        assert not list(tmp_path.glob("cache/*.arrow"))

    def test_files_that_do_not_match_are_a_data_error(self, tmp_path):
        first = parquet(tmp_path / "a.parquet", [png(0)])
        pq.write_table(pa.table({"picture": [png(1)]}), tmp_path / "b.parquet")
        with pytest.raises(DataError, match="set"):
            ParquetSource([first, tmp_path / "b.parquet"], "set")

    def test_a_file_without_images_names_its_columns_and_those_looked_for(self, tmp_path):
        pq.write_table(pa.table({"caption": ["x"], "url": ["y"]}), tmp_path / "a.parquet")
        with pytest.raises(DataError, match="columns caption, url; images are looked for in image, img"):
            ParquetSource([tmp_path / "a.parquet"], "set")
        pq.write_table(pa.table({"image": ["a path, not bytes"]}), tmp_path / "b.parquet")
        with pytest.raises(DataError, match="holds string, where encoded bytes are expected"):
            ParquetSource([tmp_path / "b.parquet"], "set")

    def test_a_file_without_rows_is_a_data_error(self, tmp_path):
        with pytest.raises(DataError, match="holds no rows"):
            ParquetSource([parquet(tmp_path / "a.parquet", [], label=pa.array([], pa.int64()))], "set")


class Canary:
    """Unpickling it would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def tar(path: Path, members: list[tuple[str, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


class TestTar:
    def test_the_layout_of_webdataset(self, tmp_path):
        members = [
            ("000.cls", b"3"), ("000.png", png(0)), ("000.json", b'{"label": 1}'),
            ("001.png", png(1)), ("001.json", json.dumps({"label": 1, "caption": "x"}).encode()), ("001.cls", b"2\n"),
            ("sub/000.seg.png", png(2)), ("sub/000.json", b'{"cls": 4}'),
            ("003.png", png(3)), ("003.json", b"{broken"),
            ("readme.md", b"no image"),
        ]  # fmt: skip
        source = TarSource([tar(tmp_path / "a.tar", members)], "set")
        assert shows(source, range(4))
        assert [source.label(i) for i in range(4)] == [3, 2, 4, 0]
        assert source.key(2) == "a.tar/sub/000.seg.png"

    def test_several_shards_are_one_set_read_in_any_order(self, tmp_path):
        shards = [tar(tmp_path / f"{k}.tar", [(f"{k}{i}.png", png(10 * k + i)) for i in range(10)]) for k in range(3)]
        source = TarSource(shards[::-1], "set")
        for one in (source, pickle.loads(pickle.dumps(source))):
            order = np.random.default_rng(0).permutation(30)
            assert [shown(one, int(i)) for i in order] == [colour(int(i)) for i in order]

    def test_text_labels_are_sorted_names(self, tmp_path):
        members = [
            m
            for i, name in enumerate(["dog", "cat", "dog"])
            for m in ((f"{i}.png", png(i)), (f"{i}.txt", name.encode()))
        ]
        source = TarSource([tar(tmp_path / "a.tar", members)], "set")
        assert source.classes == ["cat", "dog"] and [source.label(i) for i in range(3)] == [1, 0, 1]

    @pytest.mark.parametrize("text", ["²", "-1", "tabby cat", "9" * 30])
    def test_a_class_that_is_no_plain_number_is_a_name(self, tmp_path, text):
        source = TarSource([tar(tmp_path / "a.tar", [("0.png", png(0)), ("0.cls", text.encode())])], "set")
        assert source.classes == [text]

    def test_hidden_members_folders_and_links_are_left_out(self, tmp_path):
        path = tar(tmp_path / "a.tar", [("x/._0.png", b"\0\5\x16\7"), ("x/0.png", png(0)), (".hidden.png", b"x")])
        with tarfile.open(path, "a") as file:
            for name, kind in (("folder.png", tarfile.DIRTYPE), ("link.png", tarfile.SYMTYPE)):
                info = tarfile.TarInfo(name)
                info.type, info.linkname = kind, "/etc/passwd"
                file.addfile(info)
        assert shows(TarSource([path], "set"), [0])

    def test_long_names_are_read(self, tmp_path):
        name = "folder/" * 40 + "ü.png"
        source = TarSource([tar(tmp_path / "a.tar", [(name, png(5)), ("b.png", png(6))])], "set")
        assert source.key(0) == f"a.tar/{name}" and shows(source, [5, 6])

    @pytest.mark.parametrize("mode", ["w:gz", "w:xz"])
    def test_a_compressed_shard_is_refused_with_a_remedy(self, tmp_path, mode):
        path = tar(tmp_path / "a.tar", [("0.png", png(0))], mode)
        with pytest.raises(DataError, match=r"a\.tar is not a complete, uncompressed tar file.*uncompress it"):
            TarSource([path], "set")

    @pytest.mark.parametrize("cut", [100, 512 + 40, 1024 + 300, 2048 + 512 + 20])
    def test_a_truncated_shard_is_refused(self, tmp_path, cut):
        path = tar(tmp_path / "a.tar", [(f"{i}.png", os.urandom(1000)) for i in range(3)])
        path.write_bytes(path.read_bytes()[:cut])
        with pytest.raises(DataError, match="not a complete"):
            TarSource([path], "set")

    def test_a_damaged_header_does_not_hide_the_rest(self, tmp_path):
        path = tar(tmp_path / "a.tar", [(f"{i}.png", png(i)) for i in range(3)])
        data = bytearray(path.read_bytes())
        place = data.index(b"1.png")
        data[place : place + 9] = b"scrambled"
        path.write_bytes(data)
        with pytest.raises(DataError, match=f"damaged at byte {place}"):
            TarSource([path], "set")

    @pytest.mark.parametrize("data", [b"", b"Not Found", bytes(range(256)) * 9])
    def test_what_is_no_tar_file_is_refused(self, tmp_path, data):
        with pytest.raises(DataError, match="not a complete"):
            TarSource([write(tmp_path / "a.tar", data)], "set")

    def test_a_shard_that_shrinks_later_gives_bad_images(self, tmp_path):
        path = tar(tmp_path / "a.tar", [(f"{i}.png", png(i)) for i in range(3)])
        source = TarSource([path], "set")
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(BadImage):
            source.pixels(2, FRAME, None)

    def test_nothing_in_a_shard_is_ever_run(self, tmp_path):
        trap = pickle.dumps(Canary(tmp_path / "sprung"))
        members = [("0.png", png(0))] + [
            (f"0.{kind}", trap) for kind in ("pkl", "pyd", "pth", "pickle", "npy", "cls", "json", "txt")
        ]
        members += [("1.jpg", trap), ("1.pkl", trap)]
        source = TarSource([tar(tmp_path / "a.tar", members)], "set")
        assert shown(source, 0) == colour(0)
        with pytest.raises(BadImage):
            source.pixels(1, FRAME, None)
        assert not (tmp_path / "sprung").exists()
        pickle.loads(trap)
        assert (tmp_path / "sprung").exists()

    def test_a_copy_does_not_share_open_files(self, tmp_path):
        source = TarSource([tar(tmp_path / "a.tar", [("0.png", png(0))])], "set")
        source.read(0)
        assert source._files and not pickle.loads(pickle.dumps(source))._files

    @pytest.mark.parametrize("code", [errno.EMFILE, errno.EIO])
    def test_a_failure_of_the_system_is_no_bad_image(self, tmp_path, monkeypatch, code):
        source = TarSource([tar(tmp_path / "a.tar", [("0.png", png(0))])], "set")

        def fails(*_):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "open" if code == errno.EMFILE else "pread", fails)
        with pytest.raises(DataError, match=r"a\.tar cannot be read"):
            source.pixels(0, FRAME, None)

    def test_a_shard_without_images_is_refused(self, tmp_path):
        with pytest.raises(DataError, match="holds no images"):
            TarSource([tar(tmp_path / "a.tar", [("0.txt", b"x")])], "set")


class TestParts:
    @pytest.fixture
    def source(self, tmp_path):
        for i in range(20):
            write(tmp_path / f"set/{'ab'[i % 2]}/{i:02}.png", png(i))
        return FolderSource(tmp_path / "set")

    def test_a_subset_renumbers(self, source):
        part = pickle.loads(pickle.dumps(Subset(source, [7, 3, 12], "some")))
        assert len(part) == 3 and part.classes == source.classes and part.name == source.name
        for new, old in enumerate([7, 3, 12]):
            assert part.split_key(new) == part.key(new) == source.key(old) and part.label(new) == source.label(old)
            assert shown(part, new) == shown(source, old)

    def test_the_digest_of_a_subset_tells_what_is_in_it(self, source):
        digests = {Subset(source, indices, part).digest for indices in ([1, 2], [2, 1], [1, 3]) for part in ("a", "b")}
        assert len(digests | {source.digest}) == 7
        assert Subset(source, [1, 2], "a").digest == Subset(source, np.array([1, 2], np.int32), "a").digest

    def test_spreading_takes_evenly_from_the_first_to_the_last(self, source):
        part = spread(source, 5)
        assert [part.key(i) for i in range(5)] == [source.key(i) for i in (0, 5, 10, 14, 19)]
        assert {part.label(i) for i in range(5)} == {0, 1}
        assert spread(source, None) is source and spread(source, 20) is source and spread(source, 99) is source


def test_packed_strings_are_a_list_of_strings():
    strings = ["", "a", "日本", "x\udcff", "", "end"]
    packed = pickle.loads(pickle.dumps(PackedStrings(strings)))
    assert list(packed) == strings and packed[-1] == "end" and packed[1:4] == strings[1:4]
    for index in (6, -7):
        with pytest.raises(IndexError):
            packed[index]


def test_no_two_sequences_have_the_same_digest():
    assert len({digest(p) for p in (["ab"], ["a", "b"], ["a", "", "b"], [], [""], ["b", "a"])}) == 6
    assert digest([12, "x", b"y"]) == digest(["12", b"x", "y"])


def test_no_labels_are_no_classes():
    labels, classes = resolve_labels([])
    assert len(labels) == 0 and classes == []


def test_many_shards_need_few_open_files(tmp_path):
    import io
    import os
    import tarfile

    from PIL import Image

    from hieratok.data import tar

    data = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(data, "PNG")
    for i in range(tar.OPEN_SHARDS + 6):
        with tarfile.open(tmp_path / f"{i:03}.tar", "w") as archive:
            member = tarfile.TarInfo("a.png")
            member.size = len(data.getvalue())
            archive.addfile(member, io.BytesIO(data.getvalue()))
    source = tar.TarSource(sorted(tmp_path.glob("*.tar")), "shards")
    before = len(os.listdir("/proc/self/fd"))
    for index in [*range(len(source)), 0, 1]:
        assert source.read(index) == data.getvalue()
    assert len(os.listdir("/proc/self/fd")) - before <= tar.OPEN_SHARDS


def test_a_shard_that_is_gone_is_no_bad_image(tmp_path):
    import io
    import tarfile

    from hieratok.data.tar import TarSource

    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        member = tarfile.TarInfo("a.png")
        member.size = 3
        archive.addfile(member, io.BytesIO(b"png"))
    source = TarSource([tmp_path / "a.tar"], "a")
    (tmp_path / "a.tar").unlink()
    with pytest.raises(DataError, match="a.tar cannot be read"):
        source.read(0)
