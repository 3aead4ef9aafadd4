"""Arrays of images, npz files of them, and folders of generated images as sources."""

from __future__ import annotations

import json
import pickle
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hieratok.data.arrays import ArraySource, read_npz, write_npz
from hieratok.data.frame import Frame
from hieratok.data.loader import eval_loader
from hieratok.data.opening import DataConfig, open_source
from hieratok.data.samples import ShardedSamples
from hieratok.errors import DataError
from hieratok.files import sha256_of

IMAGES = np.random.default_rng(0).integers(0, 256, (7, 16, 16, 3), dtype=np.uint8)
LABELS = np.array([2, 0, 1, 1, 0, 2, 2])


def batch_of(source, side=16, **settings):
    batches = list(eval_loader(source, side, 3, **settings))
    return torch.cat([b.images for b in batches]), torch.cat([b.labels for b in batches]).tolist()


def chw(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2)


@pytest.fixture
def samples(tmp_path):
    """A finished sampling job of 7 images in shards of 3."""
    folder = tmp_path / "samples"
    folder.mkdir()
    job = {"num_images": 7, "num_classes": 3, "classes": ["a", "b", "c"], "shard_size": 3,
           "protocol": {"scheduler": "ddpm", "steps": 250}}  # fmt: skip
    (folder / "job.json").write_text(json.dumps(job))
    shards = []
    for start in range(0, 7, 3):
        path = folder / f"samples-{start // 3:05}.safetensors"
        images = chw(IMAGES)[start : start + 3].contiguous()
        save_file({"images": images, "labels": torch.from_numpy(LABELS)[start : start + 3]}, path)
        shards.append({"file": path.name, "sha256": sha256_of(path), "count": len(images)})
    (folder / "manifest.json").write_text(json.dumps({"version": 1, "count": 7, "shards": shards, **job}))
    return folder


def test_the_images_of_an_array_come_as_they_are_with_their_labels():
    source = ArraySource(IMAGES, LABELS, name="mine")
    images, labels = batch_of(source)
    assert torch.equal(images, chw(IMAGES)) and labels == LABELS.tolist()
    assert (len(source), source.name, source.image_size) == (7, "mine", 16)
    assert source.classes == ["0", "1", "2"]
    assert len({source.key(i) for i in range(7)}) == 7
    assert ArraySource(IMAGES, LABELS, ["x", "y", "z"]).classes == ["x", "y", "z"]
    assert batch_of(ArraySource(IMAGES))[1] == [0] * 7


def test_an_array_of_another_size_is_framed_like_any_image():
    wide = np.zeros((1, 8, 12, 3), np.uint8)
    wide[:, :, 2:10] = 200  # the centre square
    images, _ = batch_of(ArraySource(wide), side=8)
    assert images.shape == (1, 3, 8, 8) and (images == 200).all()
    squashed = ArraySource(wide).pixels(0, Frame(8, crop="squash"), None)
    assert squashed.shape == (8, 8, 3) and squashed[0, 0, 0] < 100


def test_the_digest_is_over_pixels_labels_and_classes():
    other = IMAGES.copy()
    other[3, 2, 1, 0] ^= 1
    swapped = LABELS[::-1]
    sources = [ArraySource(IMAGES, LABELS), ArraySource(other, LABELS), ArraySource(IMAGES), ArraySource(IMAGES[:6]),
               ArraySource(IMAGES, swapped), ArraySource(IMAGES, LABELS, "xyz"),
               ArraySource(IMAGES.reshape(7, 8, 32, 3), LABELS)]  # fmt: skip
    assert len({source.digest for source in sources}) == len(sources)
    assert ArraySource(IMAGES.copy(), LABELS.copy(), name="other").digest == sources[0].digest


@pytest.mark.parametrize(
    "images, labels, classes, message",
    [
        (IMAGES.astype(np.float32), None, None, r"uint8 \(N, H, W, 3\), got float32 \(7, 16, 16, 3\)"),
        (IMAGES.transpose(0, 3, 1, 2), None, None, r"got uint8 \(7, 3, 16, 16\)"),
        (IMAGES[:0], None, None, r"got uint8 \(0, 16, 16, 3\)"),
        (IMAGES, LABELS[:5], None, r"7 integers, one per image, got int64 \(5,\)"),
        (IMAGES, LABELS / 2, None, r"got float64 \(7,\)"),
        (IMAGES, LABELS, ["x", "y"], "labels run from 0 to 2, and classes has 2"),
    ],
)
def test_arrays_that_are_no_images_or_labels_are_refused(images, labels, classes, message):
    with pytest.raises(DataError, match=message):
        ArraySource(images, labels, classes)


@pytest.mark.parametrize("labels", [LABELS, None])
def test_a_written_file_is_read_back_by_us_and_by_numpy(tmp_path, labels):
    path = tmp_path / "new" / "samples.npz"
    write_npz(path, IMAGES, labels)
    source = open_source(path)
    assert isinstance(source, ArraySource) and source.name == str(path)
    assert torch.equal(batch_of(source)[0], chw(IMAGES))
    assert source.digest == ArraySource(IMAGES, labels).digest
    assert [p.name for p in path.parent.iterdir()] == ["samples.npz"]
    with np.load(path) as file:
        assert set(file.files) == ({"arr_0"} if labels is None else {"arr_0", "arr_1"})
        assert np.array_equal(file["arr_0"], IMAGES)


def test_a_file_of_adm_is_one_that_numpy_wrote(tmp_path):
    np.savez(tmp_path / "adm.npz", IMAGES, LABELS.astype(np.int32))
    assert batch_of(read_npz(tmp_path / "adm.npz"))[1] == LABELS.tolist()


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    write_npz(tmp_path / "a.npz", IMAGES)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="No space"):
        write_npz(tmp_path / "a.npz", IMAGES[:2])
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"] and len(read_npz(tmp_path / "a.npz")) == 7


class Malicious:
    def __reduce__(self):
        return (pytest.fail, ("code of the file was run",))


def test_a_file_that_is_no_such_archive_is_refused_by_name(tmp_path):
    path = tmp_path / "bad.npz"
    with pytest.raises(DataError, match="bad.npz is missing, cut off or no .npz file"):
        read_npz(path)
    write_npz(path, IMAGES)
    whole = path.read_bytes()
    for data in (whole[:-30], b"", b"plain text", pickle.dumps([1, 2, 3])):
        path.write_bytes(data)
        with pytest.raises(DataError, match="bad.npz is missing, cut off or no .npz file"):
            read_npz(path)
    path.write_bytes(whole[:2000] + bytes(100) + whole[2100:])  # damaged pixels, which only the checksum knows
    with pytest.raises(DataError, match="bad.npz cannot be read"):
        read_npz(path)


def test_a_file_of_other_arrays_is_refused_and_nothing_in_it_is_run(tmp_path):
    np.savez(tmp_path / "other.npz", images=IMAGES)
    with pytest.raises(DataError, match="holds no array 'arr_0'"):
        read_npz(tmp_path / "other.npz")
    np.savez(tmp_path / "floats.npz", IMAGES / 255)
    with pytest.raises(DataError, match="floats.npz: images must be uint8"):
        read_npz(tmp_path / "floats.npz")
    with zipfile.ZipFile(tmp_path / "pickled.npz", "w") as file, file.open("arr_0.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, {"descr": "|O", "fortran_order": False, "shape": (1,)})
        member.write(pickle.dumps(Malicious(), protocol=2))
    with pytest.raises(DataError, match="allow_pickle=False"):
        read_npz(tmp_path / "pickled.npz")


def test_several_npz_files_are_not_one_set(tmp_path):
    for name in ("a.npz", "b.npz"):
        write_npz(tmp_path / name, IMAGES)
    with pytest.raises(DataError, match=r"or one \.npz file"):
        open_source(str(tmp_path / "*.npz"))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_folder_of_samples_gives_their_pixels_labels_and_protocol(samples, num_workers):
    source = open_source(samples)
    assert isinstance(source, ShardedSamples)
    assert source.protocol == {"scheduler": "ddpm", "steps": 250}
    assert (len(source), source.image_size, source.classes) == (7, 16, ["a", "b", "c"])
    images, labels = batch_of(source, num_workers=num_workers)
    assert torch.equal(images, chw(IMAGES)) and labels == LABELS.tolist()
    assert [source.key(i) for i in (0, 5)] == ["samples-00000.safetensors#0", "samples-00001.safetensors#2"]
    with pytest.raises(IndexError):
        source.key(7)


def test_a_folder_of_samples_can_be_sent_to_another_process(samples):
    source = ShardedSamples(samples)
    source.pixels(0, Frame(16), None)
    again = pickle.loads(pickle.dumps(source))
    assert np.array_equal(again.pixels(4, Frame(16), None), IMAGES[4])
    assert len(DataConfig(source=str(samples), max_train_images=3, val_fraction=0.3).open("train")) == 3


def test_unfinished_samples_are_refused_with_the_way_to_go_on(samples):
    (samples / "manifest.json").unlink()
    with pytest.raises(DataError, match="unfinished; run the sampling command again to go on"):
        open_source(samples)
    for shard in samples.glob("*.safetensors"):
        shard.unlink()
    with pytest.raises(DataError, match="unfinished; run the sampling command again to go on"):
        open_source(samples)


def test_a_folder_of_images_may_hold_a_manifest_of_its_own(image_folder):
    (image_folder / "manifest.json").write_text("[]")
    (image_folder / "job.json").write_text('{"name": "web app"}')
    assert len(open_source(image_folder)) == 24


def changed(folder, **values):
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_damaged_samples_are_refused_with_a_remedy(samples):
    whole = json.loads((samples / "manifest.json").read_text())
    wrong = [{**whole["shards"][0], "count": 2}, *whole["shards"][1:]]
    for values, message in [
        ({"shards": wrong}, r"holds images \(3, 3, 16, 16\) and labels \(3,\), and manifest.json says 2"),
        ({"version": 2}, "of version 2, this package reads 1"),
        ({"shards": []}, "holds no samples"),
        ({"shards": [{"file": "samples-00000.safetensors"}]}, "lacks something or is damaged"),
    ]:
        changed(samples, **{**whole, **values})
        with pytest.raises(DataError, match=message):
            open_source(samples)
    changed(samples, **whole)
    (samples / "samples-00001.safetensors").write_bytes(b"cut off")
    with pytest.raises(DataError, match="samples-00001.safetensors cannot be read .* run the sampling command again"):
        open_source(samples)
    (samples / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="manifest.json is damaged .* finished shards are kept"):
        open_source(samples)
