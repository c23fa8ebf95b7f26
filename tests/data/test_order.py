"""The order of samples: complete, a pure function, the same from any position."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmpretrain.data.holdout import in_part
from mmpretrain.data.order import Blend, Order

counts = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(lambda c: sum(c) > 0)


def places(order: Order, start: int, stop: int) -> list[tuple[int, int, int]]:
    place = order.locate(np.arange(start, stop))
    return list(zip(place.epoch.tolist(), place.shard.tolist(), place.sample.tolist()))


@settings(max_examples=60, deadline=None)
@given(counts, st.integers(0, 2**40), st.integers(1, 5))
def test_every_sample_once_per_epoch(sizes: list[int], seed: int, window: int) -> None:
    order = Order(sizes, seed, window)
    wanted = {(e, s, i) for e in range(2) for s, n in enumerate(sizes) for i in range(n)}
    found = places(order, 0, 2 * order.total)
    assert len(found) == len(wanted)
    assert set(found) == wanted


@settings(max_examples=60, deadline=None)
@given(counts, st.integers(0, 99), st.integers(1, 5), st.data())
def test_any_slot_is_found_without_the_ones_before(sizes: list[int], seed: int, window: int, data: st.DataObject) -> None:
    whole = places(Order(sizes, seed, window), 0, 3 * sum(sizes))
    start = data.draw(st.integers(0, len(whole) - 1))
    assert places(Order(sizes, seed, window), start, len(whole)) == whole[start:]
    shuffled = np.random.default_rng(seed).permutation(len(whole))
    place = Order(sizes, seed, window).locate(shuffled)
    assert list(zip(place.epoch.tolist(), place.shard.tolist(), place.sample.tolist())) == [whole[i] for i in shuffled]


def test_epochs_and_seeds_differ() -> None:
    order = Order([50, 50], 0, 2)
    first, second = places(order, 0, 100), places(order, 100, 200)
    assert [p[1:] for p in first] != [p[1:] for p in second]
    assert first != places(Order([50, 50], 1, 2), 0, 100)


def test_a_window_holds_few_shards_and_mixes_them() -> None:
    order = Order([100] * 12, 3, window=3)
    shards = np.array([p[1] for p in places(order, 0, 300)])
    assert len(set(shards.tolist())) == 3
    assert (np.diff(shards) != 0).mean() > 0.5


@settings(max_examples=40, deadline=None)
@given(counts, st.integers(0, 99), st.integers(1, 4), st.data())
def test_replacements_come_from_the_slots_window(sizes: list[int], seed: int, window: int, data: st.DataObject) -> None:
    order = Order(sizes, seed, window)
    slot = data.draw(st.integers(0, 2 * order.total - 1))
    shards = set(order.shards_from(slot, windows=1))
    for attempt in range(1, 6):
        shard, sample, epoch = order.replacement(slot, attempt)
        assert shard in shards
        assert 0 <= sample < sizes[shard]
        assert epoch == slot // order.total
        assert (shard, sample, epoch) == Order(sizes, seed, window).replacement(slot, attempt)


def test_no_samples_is_an_error() -> None:
    with pytest.raises(ValueError, match="no samples"):
        Order([0, 0], 0).locate(np.array([0]))


def test_a_million_shards() -> None:
    started = time.perf_counter()
    order = Order(np.full(1_000_000, 1000), 0, 16)
    place = order.locate(np.arange(2_000_000_123, 2_000_004_219))
    assert set(place.epoch.tolist()) == {2}
    assert time.perf_counter() - started < 5


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(0, 99))
def test_blend_keeps_proportions_and_positions(weights: list[int], seed: int) -> None:
    blend = Blend(weights, seed)
    cycles = 3
    component, own = blend.locate(np.arange(cycles * len(blend.cycle)))
    share = np.array(weights) / np.gcd.reduce(weights)
    for c in range(len(weights)):
        mine = own[component == c]
        assert mine.tolist() == list(range(int(share[c]) * cycles))  # each component's own slots, in order, none left out


def test_blend_takes_fractions() -> None:
    assert Blend([0.75, 0.25], 0).quotas.tolist() == [3, 1]
    for weights in ([], [1, 0], [1, -1], [1, 1e-9]):
        with pytest.raises(ValueError, match="weights"):
            Blend(weights, 0)


def test_split_is_stable_and_complete() -> None:
    keys = [f"k{i}" for i in range(4000)]
    held = in_part(keys, 0.1, "holdout")
    assert 0.08 < held.mean() < 0.12
    assert np.array_equal(~held, in_part(keys, 0.1, "train"))
    assert np.array_equal(held[::-1], in_part(keys[::-1], 0.1, "holdout"))
    assert (held <= in_part(keys, 0.2, "holdout")).all()  # a larger holdout contains the smaller
    assert in_part(["k5~2"], 0.1, "holdout")[0] == held[5]
