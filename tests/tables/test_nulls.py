"""Nulls of any type, which parquet can hold: nothing required is null below them."""

from __future__ import annotations

from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curator_embed.tables.nulls import nulls
from curator_embed.tables.writing import takes_no_nulls


def seen_by_duckdb(path: Path) -> list[object]:
    return [value for (value,) in duckdb.sql(f"select x from '{path}'").fetchall()]


def required(kind: pa.DataType) -> pa.DataType:
    return pa.struct([pa.field("a", kind, nullable=False)])


FLAT = [
    pa.null(),
    pa.bool_(),
    pa.int8(),
    pa.float16(),
    pa.string(),
    pa.large_binary(),
    pa.binary(3),
    pa.decimal128(9, 2),
]
LISTS = [pa.list_(pa.float32()), pa.list_(pa.float32(), 2), pa.map_(pa.string(), pa.int8())]
KINDS = [*FLAT, *LISTS, pa.timestamp("ns", "UTC"), pa.dictionary(pa.int8(), pa.string()), pa.uuid(), pa.json_()]


def assert_required_has_values(array: pa.Array, item: pa.Field) -> None:
    """Nothing that is required is null, however deep."""
    assert array.type == item.type and (item.nullable or array.null_count == 0)
    if isinstance(array, pa.ExtensionArray):
        assert_required_has_values(array.storage, item.with_type(item.type.storage_type))
    elif pa.types.is_struct(item.type):
        for number, below in enumerate(item.type):
            assert_required_has_values(array.field(number), below)
    elif pa.types.is_fixed_size_list(item.type):
        assert_required_has_values(array.values, item.type.value_field)


class Pair(pa.ExtensionType):
    """A type of somebody's own, with a required value."""

    def __init__(self) -> None:
        super().__init__(required(pa.string()), "tests.pair")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""


PAIR = Pair()  # pyarrow knows the type as long as it is there


@pytest.mark.parametrize("kind", [
    required(required(pa.int8())), required(pa.list_(pa.field("e", pa.int8(), nullable=False), 2)), PAIR,
    required(PAIR), required(pa.dictionary(pa.int8(), pa.string(), ordered=True)),
], ids=str)  # fmt: skip
def test_what_is_required_has_a_value_however_deep(kind: pa.DataType) -> None:
    array = nulls(3, kind)
    array.validate(full=True)
    assert array.null_count == 3
    assert_required_has_values(array, pa.field("x", kind))


def test_a_required_dictionary_has_one_word() -> None:
    assert len(nulls(3, required(pa.dictionary(pa.int8(), pa.string()))).field(0).dictionary) == 1


@pytest.mark.parametrize("kind", KINDS + [required(kind) for kind in KINDS[1:]], ids=str)
def test_nulls_of_each_type_are_written_and_come_back(kind: pa.DataType, tmp_path: Path) -> None:
    array = nulls(3, kind)
    array.validate(full=True)
    assert array.type == kind and array.to_pylist() == [None] * 3
    path = tmp_path / "0.parquet"
    pq.write_table(pa.table({"x": array}), path)
    assert seen_by_duckdb(path) == [None] * 3
    if not takes_no_nulls(pa.schema([("x", kind)]), "key"):
        assert pq.read_table(path)["x"].to_pylist() == [None] * 3


def test_deep_below(tmp_path: Path) -> None:
    kind = required(required(pa.list_(pa.field("e", required(pa.string()), nullable=False), 2)))
    assert nulls(2, kind).to_pylist() == [None, None]
    pq.write_table(pa.table({"x": nulls(2, kind)}), tmp_path / "0.parquet")
    assert seen_by_duckdb(tmp_path / "0.parquet") == [None, None]
