"""How shards are dealt out to workers. Pure functions of sizes and counts."""

from __future__ import annotations

from collections.abc import Sequence

TARGET_BYTES = 64 << 20
MAX_SHARDS = 64


def group_shards(
    sizes: Sequence[int], workers: int, *, target_bytes: int = TARGET_BYTES, max_shards: int = MAX_SHARDS
) -> list[range]:
    """Join neighbouring shards into tasks of about ``target_bytes``, so that tiny ones cost no task each.

    A shard as large as the target stays alone. There are at least four tasks a worker where there
    are shards enough, so that nobody waits long for the last one.

    Args:
        sizes: bytes of each shard, 0 where not known (counts as a whole task).
        workers: how many will share the work.
    """
    at_most = max(1, min(max_shards, len(sizes) // max(1, 4 * workers)))
    groups: list[range] = []
    start, collected = 0, 0
    for position, size in enumerate(sizes):
        weight = size or target_bytes
        if position > start and (collected + weight > target_bytes or position - start >= at_most):
            groups.append(range(start, position))
            start, collected = position, 0
        collected += weight
    if start < len(sizes):
        groups.append(range(start, len(sizes)))
    return groups
