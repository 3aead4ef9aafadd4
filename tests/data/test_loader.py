"""Batches depend on the set, the seed and the position only; bad images are replaced, counted and listed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
from itertools import islice

import pytest
import torch

from hieratok.data.bad import BadSample, BadSamples
from hieratok.data.decode import BadImage
from hieratok.data.folder import FolderSource
from hieratok.data.frame import Frame
from hieratok.data.loader import Batch, eval_loader, train_loader
from hieratok.data.source import Subset
from hieratok.errors import DataError

FRAME = Frame(16, crop="random", flip=True)


@pytest.fixture
def source(image_folder):
    return FolderSource(image_folder)


@pytest.fixture
def damaged(image_folder):
    """Images 3 and 10 of 24 are bad."""
    source = FolderSource(image_folder)
    for index, data in ((3, b""), (10, b"no image")):
        (image_folder / source.key(index)).write_bytes(data)
    return source


def take(source, count: int, **settings) -> list[Batch]:
    return list(islice(train_loader(source, FRAME, **{"seed": 1, "batch_size": 8, **settings}), count))


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True)) and a[3:] == b[3:]


def joined(batches: list[Batch]) -> Batch:
    return Batch(
        *(
            torch.cat(part) if isinstance(part[0], torch.Tensor) else sum(part, [])
            for part in zip(*batches, strict=True)
        )
    )  # type: ignore[arg-type]


def test_a_batch_is_what_its_indices_and_seeds_say(source):
    (batch,) = take(source, 1)
    assert batch.images.shape == (8, 3, 16, 16) and batch.images.dtype == torch.uint8
    assert batch.labels.dtype == batch.indices.dtype == torch.int64
    for k, index in enumerate(batch.indices.tolist()):
        expected = source.pixels(index, FRAME, random.Random(batch.seeds[k]))
        assert torch.equal(batch.images[k], torch.from_numpy(expected).permute(2, 0, 1))
        assert batch.keys[k] == source.key(index) and batch.labels[k] == source.label(index)
    assert len(set(batch.seeds)) == 8


def test_batches_are_the_same_for_any_number_of_workers(source):
    for a, b in zip(take(source, 6), take(source, 6, num_workers=2), strict=True):
        assert same(a, b)


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="this system does not tell who sent a signal")
def test_workers_end_at_the_word_of_the_main_process_only(source):
    batches = iter(train_loader(source, FRAME, seed=1, batch_size=8, num_workers=1))
    next(batches)
    (worker,) = batches._workers
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)  # as a scheduler does to all of a job
    worker.join(0.3)
    assert worker.is_alive() and len(next(batches).indices) == 8
    os.kill(worker.pid, signal.SIGTERM)  # as Python does at its exit, and then waits
    worker.join(5)
    assert worker.exitcode == 0


def test_bad_images_are_the_same_for_any_number_of_workers(damaged):
    plain, parallel = take(damaged, 3), take(damaged, 3, num_workers=2)
    assert all(same(a, b) for a, b in zip(plain, parallel, strict=True))
    assert sum(len(b.bad) for b in parallel) >= 2


@pytest.mark.parametrize("world_size, accumulation", [(2, 1), (2, 2), (1, 4)])
def test_ranks_and_accumulation_together_see_the_batch_of_one_process(source, world_size, accumulation):
    whole = take(source, 7)
    parts = [
        take(source, 7 * accumulation, rank=rank, world_size=world_size, accumulation=accumulation)
        for rank in range(world_size)
    ]
    for step in range(7):
        found = [parts[r][step * accumulation + a] for a in range(accumulation) for r in range(world_size)]
        assert same(joined(found), whole[step])


def test_a_start_in_the_middle_gives_the_same_batches(source):
    assert all(same(a, b) for a, b in zip(take(source, 9)[5:], take(source, 4, start=40), strict=True))


def test_an_epoch_may_end_within_a_batch(source):
    batches = take(source, 12, batch_size=10)
    indices = torch.cat([b.indices for b in batches]).tolist()
    assert {len(b.indices) for b in batches} == {10}
    for epoch in range(5):
        assert sorted(indices[24 * epoch : 24 * epoch + 24]) == list(range(24))
    assert len({seed for b in batches for seed in b.seeds}) == 120


def test_a_batch_may_be_larger_than_the_set(source):
    (batch,) = take(Subset(source, [0, 1, 2], "few"), 1, batch_size=7)
    assert sorted(batch.indices.tolist()) in ([0, 0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2, 2])


def test_seeds_of_training_differ(source):
    assert not same(*take(source, 1), *take(source, 1, seed=2))


def test_an_empty_set_is_refused(source):
    with pytest.raises(DataError, match="holds no images"):
        take(Subset(source, [], "none"), 1)


def test_a_bad_image_is_replaced_by_the_same_image_each_time(damaged):
    first, again = take(damaged, 3), take(damaged, 3)
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    bad = [entry for b in first for entry in b.bad]
    assert {entry.index for entry in bad} == {3, 10}
    assert {entry.index: entry.reason for entry in bad} == {3: "empty file", 10: "not an image of a known format"}
    assert {entry.key for entry in bad} == {damaged.key(3), damaged.key(10)}
    indices = torch.cat([b.indices for b in first]).tolist()
    assert len(indices) == 24 and set(indices) == set(range(24)) - {3, 10}


def test_stand_ins_come_with_their_own_label_and_seed(damaged):
    for batch in take(damaged, 3):
        assert batch.labels.tolist() == [damaged.label(i) for i in batch.indices.tolist()]
        assert batch.keys == [damaged.key(i) for i in batch.indices.tolist()]


class AllBad:
    name, licence, classes, digest = "all bad", None, ["0"], "x"

    def __len__(self):
        return 50

    def key(self, index):
        return f"key {index}"

    def label(self, index):
        return 0

    def pixels(self, index, frame, rng):
        raise BadImage("a reason")


def test_a_set_of_bad_images_ends_in_an_error_and_not_in_a_search_without_end():
    (batch,) = take(AllBad(), 1)
    assert batch.images.shape[0] == 0 and len(batch.bad) > 8
    with pytest.raises(DataError, match="of 50 images are bad"):
        BadSamples(50, 0.01).add(batch.bad)
    with pytest.raises(DataError, match="data.max_bad_fraction"):
        list(eval_loader(AllBad(), 16, 8))


def entries(*indices: int) -> list[BadSample]:
    return [BadSample(i, f"folder/{i}\udcff.png", f"reason {i}") for i in indices]


def test_bad_images_are_counted_once_and_listed_with_their_reason(tmp_path):
    path = tmp_path / "bad_images.jsonl"
    bad = BadSamples(100, 0.05, path)
    assert bad.add(entries(1, 2)) == entries(1, 2)
    assert bad.add(entries(2, 1, 7, 7)) == entries(7)
    assert len(bad) == 3
    listed = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(e["index"], e["reason"]) for e in listed] == [(1, "reason 1"), (2, "reason 2"), (7, "reason 7")]


def test_more_bad_images_than_the_allowed_part_stop_the_run_and_name_the_list(tmp_path):
    path = tmp_path / "bad_images.jsonl"
    bad = BadSamples(100, 0.05, path)
    bad.add(entries(1, 2, 3, 4, 5))
    with pytest.raises(DataError, match="6 of 100 images are bad.*max_bad_fraction = 0.05.*bad_images.jsonl"):
        bad.add(entries(6))
    assert len(path.read_text().splitlines()) == 6


def test_without_a_list_the_error_names_the_last_bad_image():
    with pytest.raises(DataError, match="the last one is folder/9.*reason 9"):
        BadSamples(10, 0.1).add(entries(8, 9))


def test_a_run_that_goes_on_knows_the_bad_images_of_before(tmp_path):
    path = tmp_path / "bad_images.jsonl"
    BadSamples(100, 0.05, path).add(entries(1, 2, 3))
    bad = BadSamples(100, 0.05, path)
    assert len(bad) == 3 and bad.seen[2] == entries(2)[0]
    assert bad.add(entries(3, 4)) == entries(4)
    assert len(path.read_text().splitlines()) == 4
    bad.add(entries(5))
    with pytest.raises(DataError, match="6 of 100"):
        BadSamples(100, 0.05, path).add(entries(6))


def test_a_list_whose_last_line_was_cut_is_taken_up(tmp_path):
    path = tmp_path / "bad_images.jsonl"
    BadSamples(100, 0.05, path).add(entries(1, 2))
    path.write_text(path.read_text()[:-15])
    bad = BadSamples(100, 0.05, path)
    assert list(bad.seen) == [1]
    bad.add(entries(2))
    assert list(BadSamples(100, 0.05, path).seen) == [1, 2]


def test_a_cut_list_is_left_as_it_is_until_something_is_added(tmp_path):
    path = tmp_path / "bad_images.jsonl"
    BadSamples(100, 0.05, path).add(entries(1, 2))
    cut = path.read_text()[:-15]
    path.write_text(cut)
    first, second = (BadSamples(100, 0.05, path) for _ in range(2))
    second.add(entries(1))
    assert path.read_text() == cut
    first.add(entries(7))
    assert [json.loads(line)["index"] for line in path.read_text().splitlines()] == [1, 7]


def test_evaluation_takes_each_image_once_in_order(source):
    batches = list(eval_loader(source, 16, 7))
    assert [len(b.indices) for b in batches] == [7, 7, 7, 3]
    whole = joined(batches)
    assert whole.indices.tolist() == list(range(24)) and whole.keys == [source.key(i) for i in range(24)]
    assert whole.labels.tolist() == [source.label(i) for i in range(24)]
    for k in range(24):
        assert (whole.images[k].permute(1, 2, 0).numpy() == source.pixels(k, Frame(16), None)).all()
    assert all(same(a, b) for a, b in zip(batches, eval_loader(source, 16, 7, num_workers=2), strict=True))


def test_evaluation_varies_nothing_whatever_training_does(source):
    plain, framed = (joined(list(eval_loader(source, 16, 8, frame=frame))) for frame in (None, FRAME))
    assert torch.equal(plain.images, framed.images)


def test_evaluation_leaves_bad_images_out_and_names_them(damaged):
    batches = list(eval_loader(damaged, 16, 8, max_bad_fraction=0.1))
    whole = joined(batches)
    assert whole.indices.tolist() == [i for i in range(24) if i not in (3, 10)]
    assert [entry.index for entry in whole.bad] == [3, 10]
    with pytest.raises(DataError, match="1 of 24 images are bad"):
        list(eval_loader(damaged, 16, 8))


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_ranks_part_the_images_among_them(source, world_size):
    parts = [joined(list(eval_loader(source, 16, 4, rank=r, world_size=world_size))) for r in range(world_size)]
    assert sorted(i for part in parts for i in part.indices.tolist()) == list(range(24))
    for rank, part in enumerate(parts):
        assert part.indices.tolist() == list(range(rank, 24, world_size))


def test_of_several_processes_none_judges_its_bad_images_alone(damaged):
    (part,) = eval_loader(damaged, 16, 24, rank=1, world_size=2)
    assert [entry.index for entry in part.bad] == [3]


def test_a_limit_and_a_start_cut_the_pass(source):
    assert joined(list(eval_loader(source, 16, 4, limit=10, start=3))).indices.tolist() == list(range(3, 10))
    assert joined(list(eval_loader(source, 16, 4, limit=99))).indices.tolist() == list(range(24))
    assert list(eval_loader(source, 16, 4, start=24)) == []


def test_a_whole_batch_of_bad_images_is_passed_over(damaged):
    batches = list(eval_loader(Subset(damaged, [3, 10, 0, 1], "some"), 16, 2, max_bad_fraction=0.5))
    assert [b.indices.tolist() for b in batches] == [[2, 3]]
