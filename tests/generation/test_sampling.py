"""Sets of samples: every image from its own seed, whatever the shards, the batches, the stops and the processes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hieratok.data.frame import Frame
from hieratok.data.opening import open_source
from hieratok.engine.settings import SamplingConfig
from hieratok.errors import ConfigError, DataError
from hieratok.files import sha256_of
from hieratok.generation.sampling import Sampler, choose_labels, image_seeds, sample_set


def config(**changes: Any) -> SamplingConfig:
    return SamplingConfig(
        **{"scheduler": "ddim", "num_inference_steps": 2, "precision": "fp32", "batch_size": 3, **changes}
    )


class Broken(Sampler):
    """Stops in the middle, as if by Ctrl-C, after so many calls."""

    calls = 3

    def __call__(self, labels: Sequence[int], seeds: Sequence[int]) -> torch.Tensor:
        self.calls -= 1
        if self.calls < 0:
            raise KeyboardInterrupt
        return super().__call__(labels, seeds)


@pytest.fixture
def pipe(make_pipe):
    return make_pipe()


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def images(folder: Path) -> np.ndarray:
    source = open_source(folder)
    return np.stack([source.pixels(i, Frame(32), None) for i in range(len(source))]).astype(int)


def labels(folder: Path) -> list[int]:
    source = open_source(folder)
    return [source.label(i) for i in range(len(source))]


# Labels


def test_balanced_labels_have_as_many_of_each_class_as_of_any_other():
    chosen = choose_labels("balanced", 1000, 10, seed=0)
    assert np.bincount(chosen).tolist() == [100] * 10
    assert sorted(np.bincount(choose_labels("balanced", 23, 5, seed=0)).tolist()) == [4, 4, 5, 5, 5]


def test_random_labels_are_of_all_classes_alike():
    counts = np.bincount(choose_labels("random", 10_000, 10, seed=0))
    assert len(counts) == 10 and abs(counts - 1000).max() < 150 and len(set(counts.tolist())) > 1


def test_labels_of_the_data_are_as_frequent_as_there():
    counts = [600, 0, 300, 100]
    found = np.bincount(choose_labels("data", 10_000, 4, seed=0, counts=counts), minlength=4)
    assert found[1] == 0
    np.testing.assert_allclose(found / 10, counts, atol=20)


@pytest.mark.parametrize("order", ["balanced", "random", "data"])
def test_labels_are_shuffled_and_follow_from_the_seed(order):
    first, again, other = (choose_labels(order, 200, 4, seed, counts=[1] * 4) for seed in (0, 0, 1))
    assert first.dtype == np.int64 and first.shape == (200,)
    assert (first == again).all() and (first != other).any()
    assert (np.diff(first) < 0).sum() > 40 and not (first[4:] == first[:-4]).all()


@pytest.mark.parametrize("counts", [None, [1, 2], [0, 0, 0]])
def test_labels_of_the_data_need_its_counts(counts):
    with pytest.raises(ConfigError, match="labels=data needs reference images in the model's 3 classes"):
        choose_labels("data", 10, 3, seed=0, counts=counts)


# The sampler


def test_an_image_depends_on_its_label_and_seed_alone(pipe):
    seeds = image_seeds(0, range(5))
    assert len(set(seeds)) == 5 and image_seeds(0, [3]) == seeds[3:4] and image_seeds(1, [3]) != seeds[3:4]
    together = Sampler(pipe, config())([0, 1, 2, 3, 4], seeds)
    assert together.dtype == torch.uint8 and together.shape == (5, 3, 32, 32)
    alone = Sampler(pipe, config(batch_size=1))([3], seeds[3:4])
    assert (together[3].int() - alone[0].int()).abs().max() <= 1
    assert (together[3].int() - Sampler(pipe, config())([3], seeds[:1])[0].int()).abs().max() > 3


def test_the_sampler_gives_every_scale_and_leaves_the_pipeline_as_it_was(pipe):
    before = pipe.scheduler
    sampler = Sampler(pipe, config(scheduler="ddpm"))
    scales = sampler.scales([0, 1, 2, 3], image_seeds(0, range(4)))
    assert [tuple(scale.shape) for scale in scales] == [(4, 3, side, side) for side in (8, 16, 32)]
    assert torch.equal(scales[-1], sampler([0, 1, 2, 3], image_seeds(0, range(4))))
    assert pipe.scheduler is before


@pytest.mark.parametrize(("objective", "name", "steps"), [("ddpm", "ddpm", 250), ("flow", "euler", 50)])
def test_the_protocol_records_what_the_images_depend_on(make_pipe, objective, name, steps):
    sampler = Sampler(make_pipe(objective), SamplingConfig(guidance_scale=1.5, guidance_interval=(0.1, 0.9)))
    assert sampler.protocol == {
        "objective": objective, "scheduler": name, "num_inference_steps": steps, "guidance_scale": 1.5,
        "guidance_interval": [0.1, 0.9], "precision": "bf16",
    }  # fmt: skip
    with pytest.raises(ConfigError, match="does not go with"):
        Sampler(make_pipe(objective), SamplingConfig(scheduler="ddim" if objective == "flow" else "euler"))


def test_half_precision_gives_nearly_the_same_images(pipe):
    seeds = image_seeds(0, range(3))
    full, half = (Sampler(pipe, config(precision=p))([0, 1, 2], seeds).float() for p in ("fp32", "bf16"))
    assert 0 < (full - half).abs().mean() < 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_inference_steps": 0}, "sampling.num_inference_steps is 0"),
        ({"batch_size": 0}, "sampling.batch_size is 0"),
        ({"guidance_scale": -1.0}, "sampling.guidance_scale is -1.0"),
        ({"guidance_interval": (0.9, 0.1)}, "two ascending times"),
        ({"guidance_interval": (0.0, 1.5)}, "two ascending times"),
    ],
)
def test_settings_out_of_their_ranges_are_refused_by_name(changes, message):
    with pytest.raises(ConfigError, match=message):
        config(**changes)


# Sets


def test_a_set_holds_the_images_that_the_sampler_draws_and_reads_as_a_source(pipe, tmp_path):
    manifest = sample_set(Sampler(pipe, config()), tmp_path / "set", 10, labels="balanced", seed=7, shard_size=4)
    assert [shard["count"] for shard in manifest["shards"]] == [4, 4, 2] and manifest["count"] == 10
    assert manifest == json.loads((tmp_path / "set" / "manifest.json").read_text())
    for shard in manifest["shards"]:
        assert sha256_of(tmp_path / "set" / shard["file"]) == shard["sha256"]
    chosen = choose_labels("balanced", 10, 5, seed=7)
    assert labels(tmp_path / "set") == chosen.tolist() and np.bincount(chosen).tolist() == [2] * 5
    drawn = Sampler(pipe, config())(chosen.tolist(), image_seeds(7, range(10)))
    assert abs(images(tmp_path / "set") - drawn.permute(0, 2, 3, 1).numpy().astype(int)).max() <= 1
    source = open_source(tmp_path / "set")
    assert source.classes == ["ant", "bee", "cat", "dog", "eel"]
    tensors = load_file(tmp_path / "set" / "samples-00002.safetensors")
    assert tensors["images"].dtype == torch.uint8 and tensors["labels"].dtype == torch.int64


def test_a_set_that_was_interrupted_and_gone_on_with_is_that_of_one_go_byte_for_byte(pipe, tmp_path):
    whole = sample_set(Sampler(pipe, config()), tmp_path / "whole", 12, shard_size=5)
    with pytest.raises(KeyboardInterrupt):
        sample_set(Broken(pipe, config()), tmp_path / "set", 12, shard_size=5)
    assert {path.name for path in (tmp_path / "set").iterdir()} == {"job.json", "samples-00000.safetensors"}
    with pytest.raises(DataError, match="unfinished"):
        open_source(tmp_path / "set")
    (tmp_path / "set" / ".samples-00001.safetensors.12.tmp").write_bytes(b"half a shard")
    rest = Broken(pipe, config())
    rest.calls = 3  # two batches of the second shard and one of the third; not one of the first
    assert sample_set(rest, tmp_path / "set", 12, shard_size=5) == whole
    assert files(tmp_path / "set") == files(tmp_path / "whole")


def test_a_finished_set_is_not_drawn_again(pipe, tmp_path):
    manifest = sample_set(Sampler(pipe, config()), tmp_path / "set", 3)
    nothing = Broken(pipe, config())
    nothing.calls = 0
    assert sample_set(nothing, tmp_path / "set", 3) == manifest


def test_images_depend_neither_on_shards_nor_on_batches(pipe, tmp_path):
    sample_set(Sampler(pipe, config(batch_size=3)), tmp_path / "one", 9, shard_size=9)
    sample_set(Sampler(pipe, config(batch_size=4)), tmp_path / "two", 9, shard_size=2)
    assert labels(tmp_path / "one") == labels(tmp_path / "two")
    assert abs(images(tmp_path / "one") - images(tmp_path / "two")).max() <= 1


def test_another_seed_is_another_set(pipe, tmp_path):
    for seed in (0, 1):
        sample_set(Sampler(pipe, config()), tmp_path / str(seed), 4, seed=seed)
    assert abs(images(tmp_path / "0") - images(tmp_path / "1")).max() > 3


@pytest.mark.parametrize(
    ("settings", "changes", "difference"),
    [
        ({}, {"num_inference_steps": 3}, "protocol"),
        ({}, {"guidance_scale": 2.0}, "protocol"),
        ({"seed": 1}, {}, "protocol"),
        ({"labels": "balanced"}, {}, "protocol"),
        ({"num_images": 5}, {}, "num_images"),
        ({"shard_size": 2}, {}, "shard_size"),
    ],
)
def test_a_folder_of_another_set_is_refused(pipe, tmp_path, settings, changes, difference):
    sample_set(Sampler(pipe, config()), tmp_path / "set", 4)
    before = files(tmp_path / "set")
    with pytest.raises(
        ConfigError, match=f"holds a set of samples with another [a-z0-9_, ]*{difference}[a-z0-9_, ]*; give"
    ):
        sample_set(Sampler(pipe, config(**changes)), tmp_path / "set", **{"num_images": 4, **settings})
    assert files(tmp_path / "set") == before


def test_a_folder_of_a_set_with_other_labels_is_refused(pipe, tmp_path):
    for counts, place in (
        ([5, 5, 5, 5, 5], nullcontext()),
        ([9, 1, 0, 0, 0], pytest.raises(ConfigError, match="labels")),
    ):
        with place:
            sample_set(Sampler(pipe, config()), tmp_path / "set", 8, labels="data", counts=counts)


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_a_folder_of_another_models_set_is_refused(pipe, tmp_path, part):
    sample_set(Sampler(pipe, config()), tmp_path / "set", 4)
    next(getattr(pipe, part).parameters()).data.add_(1)
    with pytest.raises(ConfigError, match="another protocol"):
        sample_set(Sampler(pipe, config()), tmp_path / "set", 4)


def test_a_folder_of_something_else_is_refused_and_left_alone(pipe, tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"a photo")
    with pytest.raises(ConfigError, match="not empty and does not hold a set of samples"):
        sample_set(Sampler(pipe, config()), tmp_path, 4)
    assert files(tmp_path) == {"photo.jpg": b"a photo"}
    for wrong in ({"num_images": 0}, {"num_images": 4, "shard_size": 0}):
        with pytest.raises(ConfigError, match="must be above 0"):
            sample_set(Sampler(pipe, config()), tmp_path / "new", **wrong)
    assert not (tmp_path / "new").exists()


PROCESSES = """
from accelerate import Accelerator
from hieratok.engine.settings import SamplingConfig
from hieratok.generation.loading import load_pipeline
from hieratok.generation.sampling import Sampler, sample_set

accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
sampler = Sampler(load_pipeline(f"{folder}/pipeline"), SamplingConfig("ddim", 2, precision="fp32", batch_size=3))
manifest = sample_set(sampler, f"{folder}/two", 11, shard_size=4, accelerator=accelerator)
assert sample_set(sampler, f"{folder}/two", 11, shard_size=4, accelerator=accelerator) == manifest
"""


@pytest.mark.slow
def test_two_processes_draw_the_set_of_one(pipe, tmp_path, in_two_processes):
    pipe.save_pretrained(tmp_path / "pipeline")
    one = sample_set(Sampler(pipe, config()), tmp_path / "one", 11, shard_size=4)
    in_two_processes(PROCESSES, folder=str(tmp_path))
    two = json.loads((tmp_path / "two" / "manifest.json").read_text())
    assert {**two, "shards": []} == {**one, "shards": []}
    assert labels(tmp_path / "two") == labels(tmp_path / "one")
    assert abs(images(tmp_path / "two") - images(tmp_path / "one")).max() <= 1
