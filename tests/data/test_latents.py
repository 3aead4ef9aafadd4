"""Latents on disk: what is stored, how it is counted, and how a broken run goes on."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file

from hieratok.data import latents as latents_module
from hieratok.data.latents import LatentsDataset, encode, read_manifest
from hieratok.data.loader import eval_loader
from hieratok.data.opening import open_source
from hieratok.errors import ConfigError, DataError, NonFiniteError
from hieratok.models.autoencoder import state_sha256


@pytest.fixture
def source(image_folder):
    return open_source(image_folder)


def run(model, source, output, **settings):
    return encode(
        model,
        source,
        output,
        **{"shard_size": 10, "batch_size": 4, "progress": False, "posterior": "mode", "flip": False, **settings},
    )


def images_of(source):
    (batch,) = eval_loader(source, 32, 24)
    return batch.images.float() / 127.5 - 1, batch


def test_the_latents_are_those_of_encode_with_labels_and_indices(tiny_model, source, tmp_path):
    manifest = run(tiny_model, source, tmp_path / "out")
    images, batch = images_of(source)
    with torch.no_grad():
        expected = tiny_model.encode(images).latent_dist.mode()
    data = LatentsDataset(tmp_path / "out", verify=True)
    assert len(data) == manifest["count"] == 24 and manifest["shape"] == [4, 4, 4]
    assert [shard["count"] for shard in manifest["shards"]] == [10, 10, 4]
    torch.testing.assert_close(torch.stack([data[i][0] for i in range(24)]), expected, rtol=1e-4, atol=1e-5)
    assert [data[i][1] for i in range(24)] == batch.labels.tolist() == [source.label(i) for i in range(24)]
    assert data.indices.tolist() == list(range(24))
    assert torch.equal(data[-1][0], data[23][0])
    with pytest.raises(IndexError):
        data[24]


def test_a_shard_holds_float32_latents_and_int64_labels_and_indices(tiny_model, source, tmp_path):
    run(tiny_model, source, tmp_path / "out", precision="bf16")
    tensors = load_file(tmp_path / "out" / "latents-00001.safetensors")
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == {
        "latents": (torch.float32, (10, 4, 4, 4)),
        "labels": (torch.int64, (10,)),
        "indices": (torch.int64, (10,)),
    }


def test_mean_deviation_and_scaling_factor_are_those_of_all_latents(tiny_model, source, tmp_path):
    manifest = run(tiny_model, source, tmp_path / "out")
    data = LatentsDataset(tmp_path / "out")
    values = torch.stack([data[i][0] for i in range(24)]).double()
    by_channel = values.transpose(0, 1).flatten(1)
    assert manifest["mean"] == pytest.approx(by_channel.mean(1).tolist(), rel=1e-9)
    assert manifest["std"] == pytest.approx(by_channel.std(1, correction=0).tolist(), rel=1e-9)
    assert manifest["scaling_factor"] == pytest.approx(1 / values.std(correction=0).item(), rel=1e-9)


def test_moments_hold_mean_and_log_variance_and_the_statistics_of_their_samples(tiny_model, source, tmp_path):
    manifest = run(tiny_model, source, tmp_path / "out", posterior="moments")
    with torch.no_grad():
        distribution = tiny_model.encode(images_of(source)[0]).latent_dist
    data = LatentsDataset(tmp_path / "out")
    stored = torch.stack([data[i][0] for i in range(24)])
    torch.testing.assert_close(stored, torch.cat([distribution.mean, distribution.logvar], 1), rtol=1e-4, atol=1e-5)
    drawn = torch.stack([distribution.sample() for _ in range(200)]).movedim(2, 0).flatten(1)
    assert manifest["mean"] == pytest.approx(drawn.mean(1).tolist(), abs=0.02)
    assert manifest["std"] == pytest.approx(drawn.std(1).tolist(), rel=0.02)


def test_samples_depend_on_seed_and_image_and_not_on_batch_or_shard(tiny_model, source, tmp_path):
    settings = [{"seed": 1, "batch_size": 4}, {"seed": 1, "batch_size": 7, "shard_size": 24}, {"seed": 2}]
    for number, setting in enumerate(settings):
        run(tiny_model, source, tmp_path / str(number), posterior="sample", **setting)
    first, second, other = (LatentsDataset(tmp_path / str(number))[20][0] for number in range(3))
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(first, other, atol=0.1)


def test_flip_also_stores_the_latents_of_the_mirrored_images(tiny_model, source, tmp_path):
    run(tiny_model, source, tmp_path / "out", flip=True)
    with torch.no_grad():
        expected = tiny_model.encode(images_of(source)[0].flip(3)).latent_dist.mode()
    data = LatentsDataset(tmp_path / "out")
    torch.testing.assert_close(data.item(13, flipped=True)[0], expected[13], rtol=1e-4, atol=1e-5)
    run(tiny_model, source, tmp_path / "plain", limit=4)
    with pytest.raises(DataError, match="encode with flip=true"):
        LatentsDataset(tmp_path / "plain").item(0, flipped=True)


def test_the_manifest_names_model_source_and_settings(tiny_model, source, tmp_path):
    manifest = run(tiny_model, source, tmp_path / "out", limit=13)
    assert manifest == read_manifest(tmp_path / "out")
    assert manifest["model"]["sha256"] == state_sha256(tiny_model)
    assert manifest["model"]["config"]["scales"] == [1, 2, 4]
    assert manifest["source"] == {"name": source.name, "digest": source.digest, "licence": None}
    assert manifest["classes"] == ["a", "b", "c"]
    assert (manifest["num_images"], manifest["count"], manifest["posterior"]) == (13, 13, "mode")


def test_the_hash_of_a_model_changes_with_any_value(tiny_model):
    before = state_sha256(tiny_model)
    with torch.no_grad():
        tiny_model.decoder.project.bias[0] += 1
    assert state_sha256(tiny_model) != before
    assert state_sha256(tiny_model.to(torch.bfloat16)) != before


def test_an_interrupted_run_goes_on_behind_its_finished_shards_to_the_same_bytes(
    tiny_model, source, tmp_path, monkeypatch
):
    whole = run(tiny_model, source, tmp_path / "whole")
    real, seen = latents_module._encode_batch, []

    def breaks(model, batch, *rest):
        seen.extend(batch.indices.tolist())
        if 17 in seen and len(seen) < 24:
            raise KeyboardInterrupt
        return real(model, batch, *rest)

    monkeypatch.setattr(latents_module, "_encode_batch", breaks)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_model, source, tmp_path / "out")
    with pytest.raises(DataError, match="unfinished, run it again"):
        LatentsDataset(tmp_path / "out")
    (tmp_path / "out" / ".latents-00001.safetensors.99.tmp").write_bytes(b"half a shard")
    seen.clear()

    def watched(model, batch, *rest):
        seen.extend(batch.indices.tolist())
        return real(model, batch, *rest)

    monkeypatch.setattr(latents_module, "_encode_batch", watched)
    assert run(tiny_model, source, tmp_path / "out") == whole
    assert seen == list(range(10, 24))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"job.json", "manifest.json", *(f"latents-0000{i}.safetensors" for i in range(3))}


def test_a_finished_run_is_not_done_again(tiny_model, source, tmp_path, monkeypatch):
    manifest = run(tiny_model, source, tmp_path / "out")
    monkeypatch.setattr(latents_module, "_encode_batch", lambda *_: pytest.fail("encoded again"))
    assert run(tiny_model, source, tmp_path / "out", batch_size=8) == manifest


def test_a_folder_of_something_else_or_of_another_job_is_refused(tiny_model, source, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.jpg").touch()
    with pytest.raises(ConfigError, match="not empty and does not hold an encoding; give a new output folder"):
        run(tiny_model, source, tmp_path / "photos")
    run(tiny_model, source, tmp_path / "out")
    with pytest.raises(ConfigError, match="another posterior, seed; give another output folder"):
        run(tiny_model, source, tmp_path / "out", posterior="sample", seed=1)
    with torch.no_grad():
        tiny_model.encoder.moments.bias += 1
    with pytest.raises(ConfigError, match="another model"):
        run(tiny_model, source, tmp_path / "out")


def test_what_a_broken_run_left_is_removed_and_nothing_else(tiny_model, source, tmp_path):
    theirs, out = tmp_path / "theirs", tmp_path / "out"
    for folder, names in ((theirs, (".x.tmp", ".latents-00000.1.tmp")), (out, (".job.json.1.tmp",))):
        folder.mkdir()
        for name in names:
            (folder / name).touch()
    with pytest.raises(ConfigError, match="not empty"):
        run(tiny_model, source, theirs)
    assert len(list(theirs.iterdir())) == 2
    run(tiny_model, source, out)  # it broke off while it claimed the folder
    for name in (".mine.tmp", ".manifest.json.1.tmp"):
        (out / name).touch()
    with pytest.raises(ConfigError, match="another seed"):
        run(tiny_model, source, out, seed=1)
    assert (out / ".manifest.json.1.tmp").exists()
    run(tiny_model, source, out)
    assert [path.name for path in out.glob(".*")] == [".mine.tmp"]


def test_several_processes_are_refused(tiny_model, source, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="start it without torchrun"):
        run(tiny_model, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_changed_or_missing_shard_is_found(tiny_model, source, tmp_path):
    run(tiny_model, source, tmp_path / "out")
    shard = tmp_path / "out" / "latents-00002.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DataError, match="not what was written"):
        LatentsDataset(tmp_path / "out", verify=True)
    shard.write_bytes(data[:50])
    with pytest.raises(DataError, match="latents-00002.safetensors cannot be read"):
        LatentsDataset(tmp_path / "out")
    shard.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        LatentsDataset(tmp_path / "out")
    with pytest.raises(DataError, match="encode a data set there first"):
        LatentsDataset(tmp_path / "nowhere")
    (tmp_path / "out" / "manifest.json").write_text(json.dumps({"version": 0}))
    with pytest.raises(DataError, match="version 0"):
        LatentsDataset(tmp_path / "out")


def test_a_damaged_shard_of_an_unfinished_run_is_named(tiny_model, source, tmp_path):
    run(tiny_model, source, tmp_path / "out")
    (tmp_path / "out" / "manifest.json").unlink()
    (tmp_path / "out" / "latents-00000.safetensors").write_bytes(b"")
    with pytest.raises(DataError, match="latents-00000.safetensors is damaged .* delete it and run again"):
        run(tiny_model, source, tmp_path / "out")


def test_a_bad_image_is_left_out_and_the_indices_say_so(tiny_model, image_folder, tmp_path):
    source = open_source(image_folder)
    (image_folder / source.key(5)).write_bytes(b"not an image")
    manifest = run(tiny_model, source, tmp_path / "out", max_bad_fraction=0.05)
    assert (manifest["num_images"], manifest["count"]) == (24, 23)
    assert LatentsDataset(tmp_path / "out").indices.tolist() == [i for i in range(24) if i != 5]


def test_too_many_bad_images_over_all_shards_and_runs_stop_the_encoding(tiny_model, image_folder, tmp_path):
    source = open_source(image_folder)
    for index in (5, 12):
        (image_folder / source.key(index)).write_bytes(b"not an image")
    for _ in range(2):
        with pytest.raises(DataError, match="2 of 24 images are bad, more than max_bad_fraction = 0.05 allows"):
            run(tiny_model, source, tmp_path / "out", max_bad_fraction=0.05)
    assert run(tiny_model, source, tmp_path / "out", max_bad_fraction=0.1)["count"] == 22


def test_latents_that_are_not_finite_stop_the_run_and_the_model_keeps_its_mode(tiny_model, source, tmp_path):
    tiny_model.train()
    torch.nn.init.constant_(tiny_model.encoder.moments.bias, float("nan"))
    with pytest.raises(NonFiniteError, match="a latent is NaN"):
        run(tiny_model, source, tmp_path / "out")
    assert tiny_model.training


def test_settings_out_of_their_choices_are_refused(tiny_model, source, tmp_path):
    with pytest.raises(ConfigError, match="posterior 'moment'; did you mean 'moments'"):
        run(tiny_model, source, tmp_path / "out", posterior="moment")
    with pytest.raises(ConfigError, match="precision 'fp16'"):
        run(tiny_model, source, tmp_path / "out", precision="fp16")
    with pytest.raises(ConfigError, match="shard_size must be at least 1"):
        run(tiny_model, source, tmp_path / "out", shard_size=0)
    with pytest.raises(DataError, match="no images to encode"):
        run(tiny_model, source, tmp_path / "out", limit=0)
    assert not (tmp_path / "out").exists()


def test_the_reader_travels_to_workers(tiny_model, source, tmp_path):
    run(tiny_model, source, tmp_path / "out")
    data = LatentsDataset(tmp_path / "out")
    first = data[12]
    copied = pickle.loads(pickle.dumps(data))
    assert torch.equal(copied[12][0], first[0]) and copied[12][1] == first[1]
