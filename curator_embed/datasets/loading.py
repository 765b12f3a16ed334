"""Embeddings as one array, for who wants no data frame."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from curator_embed.errors import UsageError
from curator_embed.storage.files import list_files, natural_key
from curator_embed.storage.location import Location
from curator_embed.tables.provenance import Footer


def load_embeddings(
    path: str,
    column: str = "image_embedding",
    *,
    id_col: str | None = None,
    missing: Literal["drop", "nan"] = "drop",
    storage_options: Mapping[str, Any] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Read a column of vectors and the ids of its rows.

    Args:
        path: a parquet file or a folder of them (any fsspec URL), read in natural order (0, 1, 2, 10).
        column: the column of vectors.
        id_col: the id column; by default the one the files name in their footer, else "key".
        missing: rows without a vector are dropped, or become rows of NaN.

    Returns:
        ids (n,) as an object or integer array, and vectors (n, dim) in the stored dtype (float32 as a rule).

    Raises:
        UsageError: no parquet files, no such column, or vectors of several lengths.
    """
    options = dict(storage_options or {})
    single = path.endswith(".parquet")
    files = [path] if single else sorted(list_files(path, ".parquet", options), key=natural_key)
    if not files:
        raise UsageError(f"{path}: no parquet files there")
    ids: list[np.ndarray] = []
    vectors: list[np.ndarray] = []
    for file in files:
        try:
            opened = Location.of(file, options).open_parquet()
            with opened as parquet:
                names = parquet.schema_arrow.names
                key = id_col or Footer.of(parquet.schema_arrow).id_col
                for wanted in (column, key):
                    if wanted not in names:
                        raise UsageError(f"{file}: no column '{wanted}' (it has: {', '.join(names[:20])})")
                table = parquet.read(columns=[key, column])
        except FileNotFoundError as error:
            raise UsageError(f"{file}: no such file") from error
        lists = table.column(column).combine_chunks()
        if isinstance(lists, pa.ChunkedArray):
            lists = lists.chunk(0) if lists.num_chunks else pa.array([], table.schema.field(column).type)
        here, present = _as_matrix(lists, file, column)
        found = table.column(key)
        # Arrow would give integers beside a null as floats, which lose digits.
        keys = np.array(found.to_pylist(), dtype=object) if found.null_count else found.to_numpy()
        if missing == "drop":
            here, keys = here[present], keys[present]
        else:
            here[~present] = np.nan
        if len(keys):
            ids.append(keys)
            vectors.append(here)
    dims = {v.shape[1] for v in vectors if v.shape[1]}
    if len(dims) > 1:
        raise UsageError(f"{path}: vectors of several lengths in column '{column}': {sorted(dims)}")
    dim = dims.pop() if dims else 0
    vectors = [v if v.shape[1] == dim else np.full((len(v), dim), np.nan, np.float32) for v in vectors]
    if not vectors:
        return np.empty(0, dtype=object), np.empty((0, dim), dtype=np.float32)
    return np.concatenate(ids), np.concatenate(vectors)


def _as_matrix(lists: pa.Array, file: str, column: str) -> tuple[np.ndarray, np.ndarray]:
    """A list or fixed-size-list column -> (n, dim) and which rows are present."""
    if not (
        pa.types.is_list(lists.type) or pa.types.is_large_list(lists.type) or pa.types.is_fixed_size_list(lists.type)
    ):
        raise UsageError(f"{file}: column '{column}' holds {lists.type}, not vectors")
    present = np.asarray(lists.is_valid())
    flat = lists.drop_null().flatten().to_numpy(zero_copy_only=False)
    count = int(present.sum())
    dim, rest = divmod(len(flat), count) if count else (0, 0)
    lengths = np.unique(np.asarray(lists.drop_null().value_lengths())) if count else np.empty(0)
    if rest or len(lengths) > 1:
        raise UsageError(f"{file}: vectors of several lengths in column '{column}'")
    matrix = np.zeros((len(lists), dim), dtype=flat.dtype if count else np.float32)
    matrix[present] = flat.reshape(count, dim)
    return matrix, present
