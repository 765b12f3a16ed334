"""Dealing out shards: nothing lost, nothing doubled, tiny ones together."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from curator_embed.datasets.export import plan_shards
from curator_embed.execution.planning import MAX_SHARDS, TARGET_BYTES, group_shards


@given(st.lists(st.integers(0, 2 * TARGET_BYTES), max_size=200), st.integers(1, 16))
def test_groups_cover_all_shards_in_order(sizes: list[int], workers: int) -> None:
    groups = group_shards(sizes, workers)
    assert [n for group in groups for n in group] == list(range(len(sizes)))
    for group in groups:
        assert 0 < len(group) <= MAX_SHARDS
        assert len(group) == 1 or sum(sizes[n] or TARGET_BYTES for n in group) <= TARGET_BYTES


def test_ten_thousand_tiny_shards_make_few_tasks() -> None:
    groups = group_shards([100_000] * 10_000, workers=4)
    assert len(groups) < 200
    assert max(map(len, groups)) == MAX_SHARDS


def test_a_large_shard_stays_alone() -> None:
    assert group_shards([TARGET_BYTES * 5, 1, 1], workers=1) == [range(1), range(1, 2), range(2, 3)]


def test_few_shards_are_spread_over_the_workers() -> None:
    assert len(group_shards([1000] * 16, workers=4)) == 16


@given(st.lists(st.integers(0, 50), max_size=30), st.integers(1, 20))
def test_new_shards_hold_every_kept_row_once(kept: list[int], samples_per_shard: int) -> None:
    shards = plan_shards(kept, samples_per_shard)
    covered = [(p.shard, row) for shard in shards for p in shard for row in range(p.start, p.stop)]
    assert covered == [(number, row) for number, count in enumerate(kept) for row in range(count)]
    sizes = [sum(p.stop - p.start for p in shard) for shard in shards]
    assert all(size == samples_per_shard for size in sizes[:-1])
    assert not sizes or 0 < sizes[-1] <= samples_per_shard
