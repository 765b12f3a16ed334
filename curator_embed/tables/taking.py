"""Values of one table's column for the rows of another.

pyarrow's own ``take`` puts all chunks of a list column together first, each time it is called; put together, the lists
of a large table have more values than their offsets can count.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa


class Taken:
    """A column's values for other rows: a ``Slice`` of the writer's.

    Args:
        column: the values.
        rows: int64, for each row of the other table the row of the column, -1 for none.
    """

    def __init__(self, column: pa.ChunkedArray, rows: np.ndarray) -> None:
        self._chunks = [chunk for chunk in column.chunks if len(chunk)]
        self._ends = np.cumsum([len(chunk) for chunk in self._chunks], dtype=np.int64)
        self._type, self._rows = column.type, rows

    def __call__(self, positions: np.ndarray) -> pa.Array:
        rows = self._rows[positions]
        if not self._chunks or not len(rows):
            return pa.nulls(len(rows), self._type)
        numbers = np.searchsorted(self._ends, rows, side="right")  # of rows without a value, the first chunk
        order = np.argsort(numbers, kind="stable")
        found, starts = np.unique(numbers[order], return_index=True)
        parts = []
        for number, mine in zip(found.tolist(), np.split(order, starts[1:]), strict=True):
            chunk = self._chunks[number]
            places = np.where(rows[mine] < 0, -1, rows[mine] - (self._ends[number] - len(chunk)))
            parts.append(chunk.take(pa.array(places, mask=places < 0)))
        if len(parts) == 1:
            return parts[0]
        back = np.empty(len(rows), np.int64)
        back[order] = np.arange(len(rows))
        return pa.concat_arrays(parts).take(pa.array(back))
