"""The order of images is a pure function, and nothing about processes shows in it."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from hieratok.data.order import MicroBatches, epoch_order, replacement, sample_seed

# A run that goes on under a later version must see the same images: these values never change.
KNOWN_ORDER = [0, 7, 8, 6, 9, 5, 1, 3, 2, 4]
KNOWN_SEED = 1279368494785126216


@pytest.mark.parametrize("length", [1, 2, 24, 4009])
@pytest.mark.parametrize("seed", [0, 1, -1, 2**63, 2**64 - 1])
def test_an_epoch_is_a_permutation(length, seed):
    assert sorted(epoch_order(length, seed, 3)) == list(range(length))


def test_the_order_is_a_pure_function_known_for_ever():
    first = epoch_order(1000, 7, 2).copy()
    epoch_order.cache_clear()
    np.random.seed(0)
    assert (epoch_order(1000, 7, 2) == first).all()
    assert epoch_order(10, 0, 0).tolist() == KNOWN_ORDER
    assert sample_seed(0, 0, 0) == KNOWN_SEED


def test_epochs_and_seeds_differ():
    orders = [tuple(epoch_order(100, seed, epoch)) for seed in (0, 1, -1, -2, 2**62, 2**62 + 1) for epoch in range(4)]
    assert len(set(orders)) == 24


def test_seeds_of_samples_do_not_collide():
    seeds = {sample_seed(s, e, i) for s in (0, 1, -5) for e in range(12) for i in range(3000)}
    assert len(seeds) == 3 * 12 * 3000 > 100_000
    assert min(seeds) >= 0 and max(seeds) < 2**63
    ones = np.mean([bin(seed).count("1") for seed in seeds])
    assert ones == pytest.approx(31.5, abs=0.1)


def test_the_parts_of_a_sample_seed_are_not_interchangeable():
    assert (
        len({sample_seed(*parts) for parts in [(1, 2, 3), (1, 3, 2), (2, 1, 3), (3, 2, 1), (2, 3, 1), (3, 1, 2)]}) == 6
    )


@pytest.mark.parametrize("world_size, accumulation", [(1, 1), (2, 1), (1, 3), (2, 3), (4, 3), (12, 1)])
@pytest.mark.parametrize("length", [5, 24, 100])
def test_ranks_and_accumulation_together_make_the_batch_of_one_process(length, world_size, accumulation):
    steps, batch = 7, 12
    expected = list(islice(MicroBatches(length, 3, batch), steps))
    ranks = [
        list(islice(MicroBatches(length, 3, batch, accumulation=accumulation, rank=r, world_size=world_size),
                    steps * accumulation))
        for r in range(world_size)
    ]  # fmt: skip
    for step in range(steps):
        found = [s for a in range(accumulation) for r in range(world_size) for s in ranks[r][step * accumulation + a]]
        assert found == expected[step]


def test_every_image_comes_once_in_each_epoch_without_a_gap():
    stream = [s for batch in islice(MicroBatches(10, 1, 4), 10) for s in batch]
    for epoch in range(4):
        part = stream[epoch * 10 : epoch * 10 + 10]
        assert {e for e, _ in part} == {epoch} and sorted(i for _, i in part) == list(range(10))


@pytest.mark.parametrize("steps", [0, 1, 5, 13])
def test_a_start_later_in_the_stream_equals_skipping(steps):
    for rank in range(2):
        parts = {"accumulation": 2, "rank": rank, "world_size": 2}
        skipped = list(islice(MicroBatches(22, 9, 8, **parts), 2 * steps, 2 * steps + 6))
        assert list(islice(MicroBatches(22, 9, 8, start=8 * steps, **parts), 6)) == skipped


def test_an_order_can_be_walked_twice():
    batches = MicroBatches(10, 0, 4)
    assert list(islice(batches, 5)) == list(islice(batches, 5))


def test_stand_ins_are_within_the_set_and_spread_over_it():
    assert replacement(1, 0, 1) == 0
    assert all(0 <= replacement(7, i, a) < 7 and replacement(7, i, 1) != i for i in range(7) for a in range(1, 20))
    chosen = [[replacement(1000, i, a) for a in range(20)] for i in range(100, 200)]  # a folder of bad images
    stand_ins = [next(i for i in tried if not 100 <= i < 200) for tried in chosen]
    assert len(set(stand_ins)) > 80 and max(stand_ins) > 900 and min(stand_ins) < 100
    assert len({replacement(1000, 5, a) for a in range(20)}) > 15
