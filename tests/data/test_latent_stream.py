"""The latents that a generator trains on: the same stream whether they were cached or are encoded as images come."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny

from hieratok.data.frame import Frame
from hieratok.data.latent_stream import CachedLatents, EncodedLatents, latents_of, normalization_of
from hieratok.data.latents import LatentBatch, LatentsDataset, encode
from hieratok.data.opening import open_source
from hieratok.data.order import Position, epoch_order, sample_seed
from hieratok.errors import ConfigError, DataError
from hieratok.models.autoencoder import Autoencoder


@pytest.fixture
def source(image_folder):
    return open_source(image_folder)


@pytest.fixture
def tokenizer(tiny_model):
    return Autoencoder(tiny_model)


@pytest.fixture
def cache(tokenizer, source, tmp_path):
    """A folder of latents in three shards."""

    def make(name: str = "latents", **settings: Any):
        encode(tokenizer, source, tmp_path / name, shard_size=10, progress=False, **settings)
        return tmp_path / name

    return make


def take(stream: Any, count: int, **position: Any) -> list[LatentBatch]:
    batches = stream.batches(Position(**{"seed": 3, "batch_size": 8, **position}))
    found = list(islice(batches, count))
    batches.close()
    return found


def wanted(length: int, count: int, seed: int = 3) -> list[tuple[int, int]]:
    """(epoch, index) of the first samples of the stream: one permutation after another."""
    return [(p // length, int(epoch_order(length, seed, p // length)[p % length])) for p in range(count)]


def both(tokenizer, source, cache, flip: bool) -> list[Any]:
    frame = Frame(32, flip=flip)
    return [CachedLatents(cache(flip=flip), tokenizer), EncodedLatents(source, tokenizer, frame, seed=3)]


# One stream


@pytest.mark.parametrize("flip", [False, True])
def test_cached_latents_and_those_encoded_on_the_way_agree(tokenizer, source, cache, flip):
    cached, encoded = both(tokenizer, source, cache, flip)
    assert len(cached) == len(encoded) == 24
    assert cached.shape == encoded.shape == (4, 4, 4)
    assert cached.classes == encoded.classes == ["a", "b", "c"] and cached.name == encoded.name
    assert cached.images_digest == encoded.images_digest == source.digest
    for one, other in zip(take(cached, 7), take(encoded, 7), strict=True):
        torch.testing.assert_close(one.latents, other.latents, rtol=1e-4, atol=1e-5)
        assert one.latents.shape == (8, 8, 4, 4) and one.latents.dtype == torch.float32
        assert torch.equal(one.labels, other.labels) and one.seeds == other.seeds
        assert len(one.keys) == 8 and one.bad == other.bad == []


@pytest.mark.parametrize("kind", [0, 1], ids=["cached", "encoded"])
def test_the_order_is_that_of_the_stream_of_samples(tokenizer, source, cache, kind):
    stream = both(tokenizer, source, cache, False)[kind]
    batches = take(stream, 7)  # two epochs and a third
    order = wanted(24, 56)
    assert [seed for batch in batches for seed in batch.seeds] == [sample_seed(3, *place) for place in order]
    assert [label for batch in batches for label in batch.labels.tolist()] == [source.label(i) for _, i in order]
    names = [f"image {i} of {stream.path}" if kind == 0 else source.key(i) for _, i in order]
    assert [key for batch in batches for key in batch.keys] == names
    assert sorted(i for _, i in order[24:48]) == list(range(24)) and order[:24] != order[24:48]
    again = take(stream, 3, start=32)
    assert [batch.keys for batch in again] == [batch.keys for batch in batches[4:]]
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(again, batches[4:], strict=True))


@pytest.mark.parametrize("kind", [0, 1], ids=["cached", "encoded"])
def test_two_processes_with_two_micro_batches_take_the_batches_of_one(tokenizer, source, cache, kind):
    stream = both(tokenizer, source, cache, False)[kind]
    whole = take(stream, 5)
    parts = [take(stream, 10, rank=rank, world_size=2, accumulation=2) for rank in (0, 1)]
    assert {len(batch.keys) for part in parts for batch in part} == {2}
    for step, batch in enumerate(whole):
        mine = [parts[rank][2 * step + micro] for micro in (0, 1) for rank in (0, 1)]
        assert [key for part in mine for key in part.keys] == batch.keys
        assert [seed for part in mine for seed in part.seeds] == batch.seeds
        torch.testing.assert_close(torch.cat([part.latents for part in mine]), batch.latents, rtol=1e-4, atol=1e-5)


def test_the_number_of_workers_changes_nothing(tokenizer, cache):
    path = cache()
    alone, helped = (take(CachedLatents(path, tokenizer, num_workers=n), 6) for n in (0, 2))
    for one, other in zip(alone, helped, strict=True):
        assert torch.equal(one.latents, other.latents) and one.seeds == other.seeds and one.keys == other.keys


def test_half_of_the_samples_are_mirrored_where_the_cache_has_both(tokenizer, cache):
    stream = CachedLatents(cache(), tokenizer)
    data, mirrored = LatentsDataset(stream.path), []
    for batch, place in zip(take(stream, 60), np.array(wanted(24, 480)).reshape(60, 8, 2), strict=True):
        for row, (_, index) in zip(batch.latents, place.tolist(), strict=True):
            plain, turned = (torch.equal(row, data.item(index, flipped=flipped)[0]) for flipped in (False, True))
            assert plain != turned
            mirrored.append(turned)
    assert np.mean(mirrored) == pytest.approx(0.5, abs=0.07)  # three standard errors of 480 samples
    by_image = np.zeros(24)
    np.add.at(by_image, [index for _, index in wanted(24, 480)], mirrored)
    assert ((by_image > 0) & (by_image < 20)).all()  # of 20 epochs


def test_without_mirrored_latents_none_is_mirrored(tokenizer, cache):
    stream = CachedLatents(cache(flip=False), tokenizer)
    data = LatentsDataset(stream.path)
    for batch, place in zip(take(stream, 6), np.array(wanted(24, 48)).reshape(6, 8, 2), strict=True):
        assert torch.equal(batch.latents, torch.stack([data.item(i)[0] for _, i in place.tolist()]))


def test_every_epoch_draws_another_sample_of_each_posterior():
    mean, log_variance = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4)
    noise = torch.randn(2, 4, 4, 4)
    found = latents_of(torch.cat([mean, log_variance], dim=1), 4, noise)
    torch.testing.assert_close(found, mean + log_variance.exp().sqrt() * noise)
    assert torch.equal(latents_of(mean, 4, noise), mean)  # no posterior was stored
    seeds = [sample_seed(3, *place) for place in wanted(24, 240)]
    assert len(set(seeds)) == 240  # what the noise of a sample is drawn from; see the training


def test_encoded_on_the_way_every_epoch_sees_other_crops(tokenizer, source):
    stream = EncodedLatents(source, tokenizer, Frame(32, crop="random"), seed=3)
    first, second = (
        {key: row for batch in take(stream, 3, start=start) for key, row in zip(batch.keys, batch.latents, strict=True)}
        for start in (0, 24)
    )
    assert first.keys() == second.keys() and len(first) == 24
    assert not any(torch.allclose(first[key], second[key], atol=1e-3) for key in first)


def test_a_bad_image_is_replaced_and_named_on_the_way(tokenizer, image_folder):
    source = open_source(image_folder)
    (image_folder / source.key(5)).write_bytes(b"not an image")
    batches = take(EncodedLatents(source, tokenizer, Frame(32), seed=3), 3)
    assert [bad.key for batch in batches for bad in batch.bad] == [source.key(5)]
    assert all(len(batch.keys) == len(batch.latents) == 8 and source.key(5) not in batch.keys for batch in batches)


# What is known of it


def test_the_statistics_make_the_latents_standard(tokenizer, source, cache):
    for stream in both(tokenizer, source, cache, False):
        stored = torch.cat([batch.latents for batch in take(stream, 3)])  # the whole set once
        drawn = torch.cat([latents_of(stored, 4, torch.randn(24, 4, 4, 4)) for _ in range(200)]).double()
        mean, std = (torch.tensor(stream.statistics[key]).view(1, 4, 1, 1) for key in ("mean", "std"))
        normal = (drawn - mean) / std
        assert normal.mean(dim=(0, 2, 3)).abs().max() < 0.02
        assert normal.std(dim=(0, 2, 3)) == pytest.approx(torch.ones(4).double(), rel=0.02)
        assert (drawn * stream.statistics["scaling_factor"]).std().item() == pytest.approx(1.0, rel=0.02)


def test_each_channel_is_normalised_by_its_own_or_all_by_the_tokenizers_factor(tokenizer, source, cache):
    stream = CachedLatents(cache(), tokenizer)
    assert normalization_of("channel", stream, tokenizer) == (stream.statistics["mean"], stream.statistics["std"])
    tokenizer.model.register_to_config(scaling_factor=0.25, shift_factor=0.5)
    assert normalization_of("scalar", stream, tokenizer) == ([0.5] * 4, [4.0] * 4)
    tokenizer.model.register_to_config(scaling_factor=None, shift_factor=None)
    mean, std = normalization_of("scalar", stream, tokenizer)
    assert mean == [0.0] * 4 and std == pytest.approx([1 / stream.statistics["scaling_factor"]] * 4)


def test_a_tokenizer_without_a_posterior_has_its_latents_stored(source, tmp_path):
    torch.manual_seed(0)
    tokenizer = Autoencoder(
        AutoencoderTiny(
            encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1), latent_channels=4,
        ).eval(), 32,
    )  # fmt: skip
    manifest = encode(tokenizer, source, tmp_path / "latents", flip=False, progress=False)
    assert manifest["posterior"] == "mode" and manifest["shape"] == [4, 16, 16]
    cached = CachedLatents(tmp_path / "latents", tokenizer)
    encoded = EncodedLatents(source, tokenizer, Frame(32), seed=3)
    assert cached.shape == encoded.shape == (4, 16, 16)
    with pytest.raises(ConfigError, match=r"the shape \(4, 16, 16\), and the tokenizer gives \(4, 8, 8\) for .* 16 px"):
        CachedLatents(tmp_path / "latents", Autoencoder(tokenizer.model, 16))
    (one,), (other,) = take(cached, 1), take(encoded, 1)
    torch.testing.assert_close(one.latents, other.latents, rtol=1e-4, atol=1e-5)
    for key in ("mean", "std", "scaling_factor"):
        assert cached.statistics[key] == pytest.approx(encoded.statistics[key], rel=1e-4)


def test_another_tokenizer_or_other_images_are_another_stream(tokenizer, source, cache, image_folder):
    cached, encoded = both(tokenizer, source, cache, False)
    mirrored = CachedLatents(cache("mirrored", flip=True), tokenizer)
    (image_folder / "a" / "00.jpg").unlink()
    fewer = EncodedLatents(open_source(image_folder), tokenizer, Frame(32), seed=3)
    tokenizer.model.decoder.project.bias.data.add_(1)
    other = EncodedLatents(source, tokenizer, Frame(32), seed=3)
    assert len({stream.digest for stream in (cached, mirrored, encoded, fewer, other)}) == 5


# Refused


def test_the_cache_of_another_tokenizer_is_refused(tokenizer, cache):
    path = cache()
    tokenizer.model.decoder.project.bias.data.add_(1)
    with pytest.raises(ConfigError, match=r"were made by another tokenizer \(HieraTok .*give that one as tokenizer"):
        CachedLatents(path, tokenizer)


def test_an_encoding_that_is_not_there_or_not_finished_is_refused(tokenizer, cache, tmp_path):
    with pytest.raises(DataError, match="encode a data set there first"):
        CachedLatents(tmp_path / "nowhere", tokenizer)
    path = cache()
    (path / "manifest.json").unlink()
    with pytest.raises(DataError, match="unfinished, run it again"):
        CachedLatents(path, tokenizer)
