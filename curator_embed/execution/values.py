"""Values of new columns by row, from what the pipeline collected by sample: computed a slice of rows at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from curator_embed.pipeline.pipeline import OpenShard
from curator_embed.tables.writing import Slice, vectors_to_list_array


def embedded_values(opened: OpenShard, position: int, sample_of_row: np.ndarray, kind: pa.DataType) -> Slice:
    """Vectors of the model of the step at ``position``; null where it has none.

    Args:
        sample_of_row: int64 (rows,): the ordinal of each row's sample, -1 for none.
    """

    def values(rows: np.ndarray) -> pa.Array:
        vectors, present = opened.vectors[position].gather(sample_of_row[rows])
        return vectors_to_list_array(vectors, present, kind.value_type)

    return values


def own_values(
    found: Mapping[str, Sequence[np.ndarray]], keys: Sequence[str], sample_of_row: np.ndarray, kind: pa.DataType
) -> Slice:
    """Vectors of an embedder that reads shards itself, which gives them by id: the k-th of an id to its k-th row.

    Args:
        keys: the id of each sample.
    """
    taken: Counter[str] = Counter()
    by_row: list[np.ndarray | None] = []
    for ordinal in sample_of_row:
        if ordinal < 0:
            by_row.append(None)
            continue
        key = keys[ordinal]
        vectors, k = found.get(key, []), taken[key]
        by_row.append(vectors[k] if k < len(vectors) else None)
        taken[key] += 1
    dtype = kind.value_type.to_pandas_dtype()

    def values(rows: np.ndarray) -> pa.Array:
        present = np.array([by_row[row] is not None for row in rows], dtype=bool)
        some = [np.asarray(by_row[row], dtype) for row in rows if by_row[row] is not None]
        vectors = np.zeros((len(rows), len(some[0]) if some else 0), dtype)
        if some:
            vectors[present] = np.stack(some)
        return vectors_to_list_array(vectors, present, kind.value_type)

    return values


def image_values(opened: OpenShard, position: int, name: str, sample_of_row: np.ndarray, kind: pa.DataType) -> Slice:
    """Column ``name`` of the image step at ``position``; null where it has no value."""
    found = opened.values[position]

    def values(rows: np.ndarray) -> pa.Array:
        cells = (found.get(int(ordinal)) for ordinal in sample_of_row[rows])
        return pa.array([None if cell is None else cell.get(name) for cell in cells], kind)

    return values
