"""Columns without a value, for rows that have nothing but an id.

pyarrow's own (``pa.nulls``) have null below null; where what lies below is required, no parquet can be written of them.
"""

from __future__ import annotations

import pyarrow as pa


def nulls(count: int, kind: pa.DataType) -> pa.Array:
    """An array of ``count`` nulls of any type, in which nothing required is null."""
    return _blank(count, pa.field("", kind))


def _blank(count: int, item: pa.Field) -> pa.Array:
    """Nulls, or anything where the field is required."""
    kind = item.type
    if isinstance(kind, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(kind, _blank(count, item.with_type(kind.storage_type)))
    if pa.types.is_struct(kind):
        validity = pa.array([False] * count, pa.bool_()).buffers()[1] if item.nullable else None
        return pa.Array.from_buffers(kind, count, [validity], children=[_blank(count, below) for below in kind])
    if pa.types.is_fixed_size_list(kind):
        validity = pa.array([False] * count, pa.bool_()).buffers()[1] if item.nullable else None
        below = _blank(count * kind.list_size, kind.value_field)
        return pa.Array.from_buffers(kind, count, [validity], children=[below])
    if item.nullable:
        return pa.nulls(count, kind)
    if pa.types.is_dictionary(kind):
        values = _blank(1, pa.field("", kind.value_type, nullable=False))
        indices = pa.array([0] * count, kind.index_type)
        return pa.DictionaryArray.from_arrays(indices, values, ordered=kind.ordered)
    if pa.types.is_nested(kind):  # an empty list or map
        return pa.array([[]] * count, kind)
    return pa.Array.from_buffers(kind, count, [None, *pa.nulls(count, kind).buffers()[1:]], null_count=0)
