"""What lies beside an image (captions, json), made into values, ids and a table.

All of it is untrusted: whatever a scraped json holds, a row comes out, never an exception.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from curator_embed.sources.shard import Sample

MAX_NESTING = 32
"""Deepest json that is read; what is deeper counts as unreadable."""
MAX_COLUMNS = 1000
"""Most json fields that become columns of one shard's table."""


def load_text(data: bytes) -> str:
    """Decode a caption: UTF-8 with or without a byte order mark; bytes that are none become U+FFFD."""
    return data.decode("utf-8-sig", "replace")


def load_json(data: bytes) -> Any:
    """Parse a json member.

    Raises:
        ValueError: it does not parse, or is nested deeper than ``MAX_NESTING``.
    """
    try:
        value = json.loads(load_text(data))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if _is_deeper(value, MAX_NESTING):
        raise ValueError("nested too deeply")
    return value


def id_text(value: Any) -> str | None:
    """An id as the text under which it is compared; None when there is none.

    Integers keep every digit, and whole floats read as integers, as pandas writes integers beside nulls.
    """
    if value is None:
        return None
    if isinstance(value, str):
        return _storable(value)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return _json_text(value) if isinstance(value, dict | list) else str(value)


def table_of(samples: Sequence[Sample], id_col: str) -> tuple[pa.Table, str | None]:
    """Build a table from samples read with their extras; see ``WebdatasetShard.table_from_extras``.

    Returns:
        One row a sample, in their order, and a remark when not all of it fitted in.
    """
    objects = [_storable_fields(sample.extras.get("json")) for sample in samples]
    names = dict.fromkeys(name for fields in objects for name in fields if name not in (id_col, "caption"))
    left_out = len(names) - MAX_COLUMNS
    captions = [
        fields.get("caption", _as_caption(sample.extras.get("txt")))
        for fields, sample in zip(objects, samples, strict=True)
    ]
    columns: dict[str, pa.Array] = {id_col: _id_column(samples, objects, id_col)}
    if id_col != "caption":
        columns["caption"] = pa.array([c if c is None else _text(c) for c in captions], pa.string())
    for name in list(names)[:MAX_COLUMNS]:
        columns[name] = _column([fields.get(name) for fields in objects])
    remark = f"{left_out} of {len(names)} json fields are left out of the table" if left_out > 0 else None
    return pa.table(columns), remark


def _id_column(samples: Sequence[Sample], objects: Sequence[dict[str, Any]], id_col: str) -> pa.Array:
    if id_col != "key":
        values = [fields.get(id_col) for fields in objects]
        if all(isinstance(value, int) and not isinstance(value, bool) for value in values):
            try:
                return pa.array(values, pa.int64())
            except (pa.ArrowException, OverflowError):
                pass
    return pa.array([sample.key for sample in samples], pa.string())


def _column(values: list[Any]) -> pa.Array:
    """Values in the type that Arrow finds for them, or as text where it finds none that can be stored."""
    try:
        array = pa.array(values)
        if not _has_empty_struct(array.type):
            return array
    except (pa.ArrowException, OverflowError, UnicodeError, TypeError, ValueError):
        pass
    return pa.array([value if value is None else _text(value) for value in values], pa.string())


def _has_empty_struct(kind: pa.DataType) -> bool:
    """Parquet cannot store a struct without fields."""
    if pa.types.is_struct(kind):
        return kind.num_fields == 0 or any(_has_empty_struct(f.type) for f in kind)
    return pa.types.is_list(kind) and _has_empty_struct(kind.value_type)


def _storable_fields(value: Any) -> dict[str, Any]:
    return {_storable(name): v for name, v in value.items()} if isinstance(value, dict) else {}


def _as_caption(text: Any) -> str | None:
    return text if isinstance(text, str) else None


def _text(value: Any) -> str:
    return _storable(value) if isinstance(value, str) else _json_text(value)


def _json_text(value: Any) -> str:
    return json.dumps(value)


def _storable(text: str) -> str:
    """A json string may hold half a surrogate pair, which no UTF-8 column can."""
    return text.encode("utf-8", "replace").decode()


def _is_deeper(value: Any, levels: int) -> bool:
    if isinstance(value, dict):
        return levels == 0 or any(_is_deeper(v, levels - 1) for v in value.values())
    return isinstance(value, list) and (levels == 0 or any(_is_deeper(v, levels - 1) for v in value))
