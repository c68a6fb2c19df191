"""Shuffling in batches of one group."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from edit_compile.distillation.data.bucket_batches import BucketBatchSampler

sizes = st.lists(st.integers(1, 9), min_size=1, max_size=4)


def groups_of(lengths):
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return [list(range(start, start + length)) for start, length in zip(starts, lengths, strict=True)]


def samples_of(order, number, size):
    group, start = order.batch(number, size)
    return group, [next(order.fallbacks(group, start + row)) for row in range(size)]


@given(sizes, st.integers(1, 7), st.integers(0, 99))
def test_every_sample_is_seen_equally_often_and_batches_are_of_one_group(lengths, size, seed):
    groups, order = groups_of(lengths), BucketBatchSampler(groups_of(lengths), seed)
    seen = Counter()
    for number in range(sum(lengths)):  # a round: `size` passes over the data
        group, samples = samples_of(order, number, size)
        assert set(samples) <= set(groups[group])
        seen.update(samples)
    assert seen == dict.fromkeys(range(sum(lengths)), size)


@given(sizes, st.integers(1, 7), st.lists(st.integers(0, 200), min_size=1, max_size=8))
def test_a_batch_depends_on_its_number_alone(lengths, size, numbers):
    order = BucketBatchSampler(groups_of(lengths), 0)
    for number in numbers:
        assert samples_of(order, number, size) == samples_of(BucketBatchSampler(groups_of(lengths), 0), number, size)


def test_passes_are_shuffled_each_anew_and_by_the_seed():
    def passes(seed):
        order = BucketBatchSampler([range(50)], seed)
        return [[next(order.fallbacks(0, place)) for place in range(50 * n, 50 * n + 50)] for n in range(2)]

    first, second = passes(0)
    assert sorted(first) == sorted(second) == list(range(50))
    assert len({tuple(order) for order in (first, second, range(50), *passes(1))}) == 5


def test_small_groups_are_spread_over_the_round():
    order = BucketBatchSampler([range(60), range(60, 66)], 3)
    ranks = [number for number in range(66) if order.batch(number, 4)[0] == 1]
    assert len(ranks) == 6
    assert all(11 * i - 2 <= rank <= 11 * i + 13 for i, rank in enumerate(ranks))


@given(sizes, st.integers(0, 40))
def test_candidates_are_the_whole_group_once(lengths, place):
    groups, order = groups_of(lengths), BucketBatchSampler(groups_of(lengths), 0)
    for group, own in enumerate(groups):
        assert sorted(order.fallbacks(group, place)) == own
