"""Values for other rows: chunk by chunk, as pyarrow would give them at once."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curator_embed.tables.taking import Taken

KINDS = [pa.int64(), pa.string(), pa.list_(pa.float32()), pa.list_(pa.int8(), 2), pa.struct([("a", pa.string())])]


def column(kind: pa.DataType, sizes: list[int]) -> pa.ChunkedArray:
    def value(n: int) -> object:
        if n % 5 == 4:
            return None
        if pa.types.is_fixed_size_list(kind):
            return [n, -n]
        if pa.types.is_list(kind):
            return [float(n)] * (n % 3)
        return {"a": str(n)} if pa.types.is_struct(kind) else n if pa.types.is_integer(kind) else str(n)

    ends = np.cumsum([0, *sizes])
    chunks = [pa.array([value(int(n)) for n in range(a, b)], kind) for a, b in pairwise(ends)]
    return pa.chunked_array(chunks, kind)


@given(st.data())
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_same_values_as_at_once(kind: pa.DataType, data: st.DataObject) -> None:
    whole = column(kind, data.draw(st.lists(st.integers(0, 6), max_size=5)))
    rows = np.array(data.draw(st.lists(st.integers(-1, len(whole) - 1), max_size=12)), dtype=np.int64)
    positions = np.array(data.draw(st.permutations(range(len(rows)))), dtype=np.int64)
    values = whole.to_pylist()
    taken = Taken(whole, rows)(positions)
    assert taken.type == kind
    assert taken.to_pylist() == [None if row < 0 else values[row] for row in rows[positions]]


def test_dictionaries_that_differ_from_chunk_to_chunk() -> None:
    chunks = [pa.array(["a", "b"]).dictionary_encode(), pa.array(["c", "a"]).dictionary_encode()]
    taken = Taken(pa.chunked_array(chunks), np.array([3, 2, 0, -1, 1]))(np.arange(5))
    assert taken.to_pylist() == ["a", "c", "a", None, "b"]


def test_lists_with_more_values_than_offsets_can_count() -> None:
    """Together they are too many for one array; every list here is the same memory."""
    size = 2**30
    numbers = pa.array(np.zeros(size, np.int8))
    chunk = pa.ListArray.from_arrays(pa.array([0, 1, size - 1, size], pa.int32()), numbers)
    together = pa.chunked_array([chunk] * 3)
    with pytest.raises(pa.ArrowInvalid, match="overflow"):
        together.combine_chunks()
    taken = Taken(together, np.array([8, 3, 0, -1]))(np.arange(4))
    assert taken.to_pylist() == [[0], [0], [0], None]
