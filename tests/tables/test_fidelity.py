"""In place, what the input held comes back as it was: types, units, encodings, codecs, row groups, metadata, values.

Inputs are written by pyarrow, DuckDB, pandas and polars; the schema, every chunk's bytes and metadata, and what these
tools read are compared before and after.
"""

from __future__ import annotations

import datetime
import decimal
import io
import json
import uuid
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from curator_embed.errors import SourceError
from curator_embed.storage.location import Location
from curator_embed.tables import rewriting
from curator_embed.tables.nulls import nulls
from curator_embed.tables.provenance import FOOTER_KEY, Footer
from curator_embed.tables.rewriting import LEAVE_OUT, faithful
from curator_embed.tables.splicing import Layout
from curator_embed.tables.thrift import BINARY, I32, LIST, STRUCT, read_struct, write_struct
from curator_embed.tables.writing import (
    NewColumn,
    TablePlan,
    collect_table,
    takes_no_nulls,
    vectors_to_list_array,
    write_table,
)

NOBODY = np.empty(0, dtype=np.int64)
ROWS = 7
UNITS = ("s", "ms", "us", "ns")
RECORD = pa.struct([pa.field("a", pa.int32(), nullable=False), pa.field("b", pa.list_(pa.string()))])
DEEP = pa.list_(pa.struct([("m", pa.map_(pa.int32(), pa.list_(pa.float64())))]))


def vectors(rows: np.ndarray) -> pa.Array:
    """Of row n: [n, n], null for every third."""
    both = np.stack([rows, rows], axis=1).astype(np.float32)
    return vectors_to_list_array(both, rows % 3 != 0, pa.float32())


NEW = {
    "embedding": NewColumn(pa.list_(pa.float32()), vectors),
    "code": NewColumn(pa.string(), lambda rows: pa.array([None if n % 3 else f"bad {n}" for n in rows], pa.string())),
}


MADE = Footer(counts={"read": ROWS})


def add_columns(path: Path, target: Path | None = None, **changed: Any) -> Path:
    """Write NEW into a file, in place or as a new output."""
    source = Location.of(str(path))
    written = Location.of(str(target or path))
    rows = np.arange(sum(group["rows"] for group in chunks(path)))
    plan = {"keep": rows, "appended": None, "appended_rows": NOBODY, "columns": NEW, **changed}
    write_table(TablePlan(source=source, in_memory=None, footer=MADE, **plan), written, written.token())
    return target or path


# -- inputs --------------------------------------------------------------------------------


def everything(*, required: bool = False) -> pa.Table:
    """A column of nearly every Arrow type that parquet can hold."""
    when = datetime.datetime(2021, 3, 4, 5, 6, 7, 89, tzinfo=datetime.UTC)
    some: dict[str, tuple[pa.DataType, Any]] = {
        "key": (pa.string(), "k"),
        "flag": (pa.bool_(), True),
        **{f"i{n}": (getattr(pa, f"int{n}")(), 2 ** (n - 1) - 1) for n in (8, 16, 32, 64)},
        **{f"u{n}": (getattr(pa, f"uint{n}")(), 2**n - 1) for n in (8, 16, 32, 64)},
        "half": (pa.float16(), np.float16(1.5)),
        "single": (pa.float32(), 0.1),
        "double": (pa.float64(), float("nan")),
        "text": (pa.string(), "grüße"),
        "long_text": (pa.large_string(), "x" * 70),
        "bytes": (pa.binary(), b"\x00\xff"),
        "long_bytes": (pa.large_binary(), b"\x01"),
        "fixed": (pa.binary(5), b"12345"),
        "day": (pa.date32(), when.date()),
        "day64": (pa.date64(), when.date()),
        "time_s": (pa.time32("s"), datetime.time(1, 2, 3)),
        "time_ms": (pa.time32("ms"), datetime.time(1, 2, 3)),
        "time_us": (pa.time64("us"), datetime.time(1, 2, 3, 4)),
        "time_ns": (pa.time64("ns"), datetime.time(1, 2, 3, 4)),
        **{f"ts_{unit}": (pa.timestamp(unit), when.replace(tzinfo=None, microsecond=0)) for unit in UNITS},
        "ts_utc": (pa.timestamp("us", "UTC"), when),
        "ts_zone": (pa.timestamp("ns", "Europe/Berlin"), when),
        "span": (pa.duration("ms"), datetime.timedelta(seconds=5)),
        "small_decimal": (pa.decimal128(5, 2), decimal.Decimal("123.45")),
        "decimal": (pa.decimal128(30, 10), decimal.Decimal("1.5")),
        "big_decimal": (pa.decimal256(60, 3), decimal.Decimal("-2.125")),
        "kind": (pa.dictionary(pa.int8(), pa.string()), "a"),
        "numbers": (pa.list_(pa.int16()), [1, None, 3]),
        "many": (pa.large_list(pa.float32()), [0.5]),
        "box": (pa.list_(pa.float32(), 2), [1.0, 2.0]),
        "record": (RECORD, {"a": 1, "b": ["x"]}),
        "pairs": (pa.map_(pa.string(), pa.int64()), [("one", 1), ("two", None)]),
        "deep": (DEEP, [{"m": [(1, [0.5])]}, None]),
        "uuid": (pa.uuid(), uuid.UUID(int=7).bytes),
        "json": (pa.json_(), '{"a": 1}'),
    }  # fmt: skip
    fields, arrays = [], []
    for name, (kind, value) in some.items():
        values = [value if required or n % 3 != 1 or name == "key" else None for n in range(ROWS)]
        storage = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
        array = pa.array(values, storage)
        arrays.append(pa.ExtensionArray.from_storage(kind, array) if storage is not kind else array)
        fields.append(pa.field(name, kind, nullable=not required, metadata={b"about": name.encode()}))
    if not required:
        fields.append(pa.field("nothing", pa.null()))
        arrays.append(pa.nulls(ROWS))
    return pa.Table.from_arrays(arrays, schema=pa.schema(fields, {b"mine": b"kept", b"other": b"\xc3\xbc"}))


def far_dates(values: list[Any] | None = None) -> pa.Table:
    dates = [datetime.datetime(1, 1, 1), datetime.datetime(9999, 12, 31, 23, 59, 59, 999999), None]
    dates += [datetime.datetime(2020, 2, 29, 1)] * (ROWS - 3)
    return pa.table(
        {
            "key": [str(n) for n in range(ROWS)],
            "when": pa.array(values or dates, pa.timestamp("us")),
            "inside": pa.array([[{"at": date}] for date in dates], pa.list_(pa.struct([("at", pa.timestamp("us"))]))),
        }
    )


def by_pyarrow(**options: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        pq.write_table(everything(), path, **{"row_group_size": 3, **options})

    return write


def without(*names: str, **options: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        pq.write_table(everything().drop_columns(list(names)), path, **{"row_group_size": 3, **options})

    return write


def required_columns(path: Path) -> None:
    pq.write_table(everything(required=True), path, row_group_size=3)


def int96(path: Path) -> None:
    pq.write_table(far_dates(), path, use_deprecated_int96_timestamps=True, row_group_size=3)


def int96_beside_int64(path: Path) -> None:
    int96(path)
    stamps = pa.array(range(ROWS), pa.timestamp("ms", "UTC"))
    add_columns(path, columns={"stamp": NewColumn(stamps.type, lambda rows: stamps.take(pa.array(rows)))})
    assert [leaf.physical_type for leaf in leaves(path)].count("INT96") == 2


def codecs(path: Path) -> None:
    names = ["key", "text", "numbers.list.element", "i32", "double"]
    every = dict(zip(names, ["gzip", "brotli", "zstd", "lz4", "snappy"], strict=True))
    pq.write_table(everything(), path, compression=every, use_dictionary=["text"], row_group_size=4)


def encodings(path: Path) -> None:
    table = everything().select(["key", "text", "i64", "double", "single"])
    chosen = {"key": "DELTA_BYTE_ARRAY", "text": "DELTA_LENGTH_BYTE_ARRAY", "i64": "DELTA_BINARY_PACKED"}
    chosen |= {"double": "BYTE_STREAM_SPLIT", "single": "PLAIN"}
    pq.write_table(table, path, use_dictionary=False, column_encoding=chosen, row_group_size=3)


def indexed(path: Path) -> None:
    options = {
        "write_page_index": True,
        "sorting_columns": [pq.SortingColumn(0), pq.SortingColumn(3, descending=True)],
        "write_page_checksum": True,
        "data_page_size": 1,
        "write_batch_size": 1,
    }
    pq.write_table(everything(), path, row_group_size=4, **options)


def iceberg_ids(path: Path) -> None:
    schema = pa.schema([pa.field(n, t, metadata={b"PARQUET:field_id": b"%d" % i}) for i, (n, t) in
                        enumerate([("key", pa.string()), ("n", pa.int64())], start=40)])  # fmt: skip
    pq.write_table(pa.table({"key": list("abcdefg"), "n": range(ROWS)}, schema), path)


def annotated(converted: int, logical: int | None = None) -> Callable[[Path], None]:
    """Texts that are marked as what pyarrow does not write: ENUM, BSON."""

    def write(path: Path) -> None:
        sink = io.BytesIO()
        pq.write_table(pa.table({"key": list("abcdefg"), "what": [b"x"] * ROWS}), sink, row_group_size=3)
        layout = Layout.read(sink)
        element = layout.columns[1].elements[0]
        element[6] = (I32, converted)
        if logical is not None:
            element[10] = (STRUCT, {logical: (STRUCT, {})})
        footer = write_struct(layout.meta)
        path.write_bytes(sink.getvalue()[: layout.end] + footer + len(footer).to_bytes(4, "little") + b"PAR1")

    return write


def two_level_lists(path: Path) -> None:
    """As Hive and old Avro writers wrote them: the repeated field is the element."""
    sink = io.BytesIO()
    numbers = pa.array([[n, n + 1] for n in range(ROWS)], pa.list_(pa.field("element", pa.int32(), nullable=False)))
    pq.write_table(pa.table({"key": list("abcdefg"), "numbers": numbers}), sink, store_schema=False)
    layout = Layout.read(sink)
    outer, _, leaf = layout.columns[1].elements
    leaf |= {3: (I32, 2), 4: (BINARY, b"array")}
    layout.meta[2] = (LIST, (STRUCT, [layout.root, layout.columns[0].elements[0], outer, leaf]))
    for group in layout.row_groups:
        group[1][1][1][1][3][1][3] = (LIST, (BINARY, [b"numbers", b"array"]))
    footer = write_struct(layout.meta)
    path.write_bytes(sink.getvalue()[: layout.end] + footer + len(footer).to_bytes(4, "little") + b"PAR1")


def by_duckdb(path: Path) -> None:
    duckdb.sql(
        f"""copy (select 'k' || i as key, interval (i) month + interval 3 day as span, 'x'::enum('x', 'y') as e,
        uuid() as u, (i + 0.5)::decimal(9, 2) as d, (i + 0.5)::decimal(18, 2) as dd, (i + 0.5)::decimal(38, 2) as ddd,
        i::hugeint as h, {{'a': i, 'b': [i]}} as s, map {{'k': i}} as m, [[i, null], null] as l, '{{}}'::json as j,
        time '01:02:03' as t, timestamptz '2020-01-01 00:00:00+00' as tz, timestamp '0001-01-01' as early,
        '101'::bit as b, i::uinteger as ui, i::utinyint as ut, 'x'::blob as bl, date '2020-01-01' as day,
        if(i = 3, null, 0.5::float) as f from range({ROWS}) r(i)) to '{path}' (row_group_size 2048, compression gzip)"""
    )


def by_pandas(path: Path) -> None:
    index = pd.Index(range(5, 5 + ROWS), name="number")
    frame = pd.DataFrame({"key": list("abcdefg"), "size": pd.Categorical(list("aabbcca"))}, index)
    frame["when"] = pd.date_range("2020-01-01", periods=ROWS, tz="Asia/Tokyo")
    frame["whole"] = pd.array([1, None, 3, 4, 5, 6, 7], dtype="Int32")
    frame.to_parquet(path, row_group_size=4)


def by_polars(path: Path) -> None:
    frame = pl.DataFrame({"key": list("abcdefg"), "n": range(ROWS)}).with_columns(
        pl.Series("cat", list("xxyyzzx"), pl.Categorical),
        pl.Series("enum", list("xxyyzzx"), pl.Enum(["x", "y", "z"])),
        pl.Series("box", [[1, 2]] * ROWS, pl.Array(pl.Int16, 2)),
        pl.Series("money", ["1.25"] * ROWS).cast(pl.Decimal(20, 4)),
        pl.Series("lists", [[None, "a"], None, *[[]] * 5]),
        pl.Series("time", [datetime.time(3)] * ROWS),
        pl.Series("span", [datetime.timedelta(3)] * ROWS),
        pl.struct("n", "key").alias("both"),
    )
    frame.write_parquet(path, row_group_size=3)


def names_with_dots(path: Path) -> None:
    names = ["key", "a.b", "a", "a.", "ünï", "A"]
    columns = [pa.array(list("abcdefg")), *[pa.array(range(n, n + ROWS)) for n in range(5)]]
    columns[2] = pa.array([{"b": n} for n in range(ROWS)])
    pq.write_table(pa.table(columns, names), path, row_group_size=3)


INPUTS: dict[str, Callable[[Path], None]] = {
    "pyarrow": by_pyarrow(),
    **{f"pyarrow {codec}": by_pyarrow(compression=codec) for codec in ("none", "gzip", "brotli", "lz4", "zstd")},
    "pyarrow, old format": without("ts_ns", "ts_zone", version="1.0"),
    "pyarrow, format 2.4": by_pyarrow(version="2.4"),
    "pyarrow, data pages of version 2": by_pyarrow(data_page_version="2.0"),
    "pyarrow without its own schema": without("nothing", store_schema=False),
    "pyarrow, names of lists as in Arrow": by_pyarrow(use_compliant_nested_type=False),
    "pyarrow, decimals as integers": by_pyarrow(store_decimal_as_integer=True),
    "pyarrow without dictionaries or statistics": by_pyarrow(use_dictionary=False, write_statistics=False),
    "pyarrow, all of one row group": by_pyarrow(row_group_size=99),
    "pyarrow without rows": lambda path: pq.write_table(everything().slice(0, 0), path),
    "pyarrow, required columns": required_columns,
    "a codec for each column": codecs,
    "an encoding for each column": encodings,
    "page indexes, order, checksums": indexed,
    "field ids": iceberg_ids,
    "ENUM": annotated(4, 4),
    "BSON": annotated(20),
    "lists of two levels": two_level_lists,
    "names with dots": names_with_dots,
    "INT96": int96,
    "INT96 beside INT64": int96_beside_int64,
    "DuckDB": by_duckdb,
    "pandas": by_pandas,
    "polars": by_polars,
}


# -- what is compared ----------------------------------------------------------------------


def leaves(path: Path) -> list[pq.ColumnSchema]:
    schema = pq.ParquetFile(path).schema
    return [schema.column(number) for number in range(len(schema))]


def path_kinds(path: Path) -> set[str]:
    return {str(leaf.converted_type) for leaf in leaves(path)}


def schema_text(path: Path) -> list[str]:
    """The schema's tree as parquet has it, a line each."""
    return str(pq.ParquetFile(path).schema).splitlines()[2:-1]


def chunks(path: Path) -> list[dict[str, Any]]:
    """Per row group its rows, and per chunk its bytes and all that the footer says but where it lies."""
    data, found = path.read_bytes(), []
    meta = pq.read_metadata(path)
    for number in range(meta.num_row_groups):
        group = meta.row_group(number)
        columns = []
        for leaf in range(group.num_columns):
            column = group.column(leaf)
            told = {k: v for k, v in column.to_dict().items() if not k.endswith(("_offset", "_length"))}
            told["indexes"] = (column.has_offset_index, column.has_column_index)
            told["statistics"] = str(column.statistics).splitlines()[1:]  # without the object's address
            starts = [n for n in (column.dictionary_page_offset, column.data_page_offset) if n]
            start = min(starts, default=4)
            columns.append((told, data[start : start + column.total_compressed_size]))
        found.append({"rows": group.num_rows, "columns": columns, "sorted": group.to_dict().get("sorting_columns")})
    return found


def arrow_schema(path: Path) -> pa.Schema:
    schema = pq.read_schema(path)
    return schema.with_metadata({k: v for k, v in (schema.metadata or {}).items() if k != FOOTER_KEY})


def values(path: Path, **options: Any) -> dict[str, str]:
    table = pq.ParquetFile(path, **options).read()
    return {name: repr(column.to_pylist()) for name, column in zip(table.column_names, table.columns, strict=True)}


def seen_by_duckdb(path: Path, without: Collection[str] = ()) -> list[tuple[str, str, list[str | None]]]:
    """Name, type and values, as text, of each column; the error where it cannot read the file."""
    try:
        columns = duckdb.sql(f"select * from '{path}'")
    except duckdb.IOException as error:
        return [("", str(error), [])]
    found = []
    for name, kind in zip(columns.columns, columns.types, strict=True):
        if name not in without:
            rows = duckdb.sql(f"""select "{name}"::varchar from '{path}'""").fetchall()
            found.append((name, str(kind), [value for (value,) in rows]))
    return found


def kept_as_they_were(before: Path, after: Path) -> None:
    """All of one file is in the other, and NEW behind it."""
    old, new = schema_text(before), schema_text(after)
    assert new[: len(old)] == old
    count = len(leaves(before))
    assert len(leaves(after)) == count + len(NEW)
    for ours, theirs in zip(chunks(before), chunks(after), strict=True):
        assert (theirs["rows"], theirs["sorted"]) == (ours["rows"], ours["sorted"])
        for one, other in zip(ours["columns"], theirs["columns"][:count], strict=True):
            assert one == other
    was, now = pq.read_metadata(before), pq.read_metadata(after)
    assert (now.created_by, now.format_version, now.num_rows) == (was.created_by, was.format_version, was.num_rows)
    hidden = {b"ARROW:schema", FOOTER_KEY}
    assert {k: v for k, v in now.metadata.items() if k not in hidden} == {
        k: v for k, v in (was.metadata or {}).items() if k not in hidden
    }
    assert (b"ARROW:schema" in now.metadata) == (b"ARROW:schema" in (was.metadata or {}))
    assert Footer.of(pq.read_schema(after)) == MADE
    old_schema, new_schema = arrow_schema(before), arrow_schema(after)
    assert new_schema.metadata == old_schema.metadata
    for one, other in zip(old_schema, list(new_schema)[: len(old_schema)], strict=True):
        assert one.equals(other, check_metadata=True)
    assert {item.name: item.type for item in list(new_schema)[len(old_schema) :]} == {n: c.type for n, c in NEW.items()}


def read_as_they_were(before: Path, after: Path) -> None:
    """pyarrow, DuckDB and polars read the same from both files, and NEW."""
    for unit in ("us", "ns"):
        ours, theirs = (values(path, coerce_int96_timestamp_unit=unit) for path in (before, after))
        assert {name: theirs[name] for name in ours} == ours
    added = pq.read_table(after, columns=list(NEW))
    rows = np.arange(len(added))
    assert added.to_pydict() == {name: column.values(rows).to_pylist() for name, column in NEW.items()}
    assert seen_by_duckdb(after, NEW) == seen_by_duckdb(before)
    if "BSON" not in path_kinds(before):  # which DuckDB does not read
        seen = duckdb.sql(f"select embedding, code from '{after}'").fetchall()
        assert seen == [tuple(row.values()) for row in added.to_pylist()]
    try:
        old = pl.read_parquet(before)
    except BaseException as error:  # polars panics at some types
        if isinstance(error, KeyboardInterrupt):
            raise
        return
    new = pl.read_parquet(after)
    assert new.select(old.columns).equals(old) and new.schema == {**old.schema, **new.select(list(NEW)).schema}
    assert new.select(list(NEW)).rows() == [tuple(row.values()) for row in added.to_pylist()]


@pytest.mark.parametrize("name", INPUTS)
def test_in_place_all_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    before, after = tmp_path / "before.parquet", tmp_path / "after.parquet"
    INPUTS[name](before)
    after.write_bytes(before.read_bytes())
    assert faithful(Location.of(str(after))) == ""
    add_columns(after)
    kept_as_they_were(before, after)
    read_as_they_were(before, after)
    # A second time, with columns made anew that keep their place.
    once = after.read_bytes()
    add_columns(after)
    assert after.read_bytes() == once
    kept_as_they_were(before, after)


FEW = np.array([0, 2, 3, 6])


@pytest.mark.parametrize("name", INPUTS)
def test_a_new_output_with_fewer_rows_has_them_in_the_same_types(name: str, tmp_path: Path) -> None:
    before, after = tmp_path / "before.parquet", tmp_path / "after.parquet"
    INPUTS[name](before)
    count = sum(group["rows"] for group in chunks(before))
    add_columns(before, after, keep=np.array([row for row in FEW if row < count], dtype=np.int64))
    old = schema_text(before)
    assert schema_text(after)[: len(old)] == old
    wanted = [(n, t, [v[row] for row in FEW if row < len(v)]) for n, t, v in seen_by_duckdb(before)]
    assert seen_by_duckdb(after, NEW) == wanted


@pytest.mark.parametrize("name", [name for name in INPUTS if name not in ("pyarrow, required columns", "DuckDB")])
def test_rows_behind_the_others_have_nulls_in_the_same_types(name: str, tmp_path: Path) -> None:
    """Images without a row, in a new output."""
    before, after = tmp_path / "before.parquet", tmp_path / "after.parquet"
    INPUTS[name](before)
    with Location.of(str(before)).open_parquet() as parquet:
        schema = parquet.schema_arrow
    assert not takes_no_nulls(schema, "key")
    ids = pa.array(["new", "newer"])
    blank = [nulls(2, item.type) if item.name != "key" else ids.cast(item.type) for item in schema]
    count = sum(group["rows"] for group in chunks(before))
    appended = {"appended": pa.Table.from_arrays(blank, schema=schema), "appended_rows": np.arange(count, count + 2)}
    add_columns(before, after, keep=np.arange(count), **appended)
    old = schema_text(before)
    assert schema_text(after)[: len(old)] == old
    ours = {column: (kind, found) for column, kind, found in seen_by_duckdb(before)}
    for column, kind, found in seen_by_duckdb(after, NEW):
        assert (kind, found[: len(found) - 2]) == (ours[column][0], ours[column][1])
        assert found[len(found) - 2 :] == (["new", "newer"] if column == "key" else [None, None][: len(found)])
    assert (
        pq.read_table(after, columns=["code"])["code"].to_pylist()[count:]
        == NEW["code"].values(np.arange(count, count + 2)).to_pylist()
    )


def test_rows_cannot_be_added_to_required_columns_alone() -> None:
    schema = pa.schema([pa.field("key", pa.string(), nullable=False), ("text", pa.string())])
    assert takes_no_nulls(schema, "key") == ""
    assert takes_no_nulls(schema, "text") == "key"
    assert takes_no_nulls(schema, "text", ["text"]) == ""
    inside = pa.struct([pa.field("a", pa.int8(), nullable=False)])
    assert takes_no_nulls(pa.schema([("key", pa.string()), ("record", inside)]), "key") == ""


# -- INT96 ---------------------------------------------------------------------------------


def test_dates_far_from_now_stay_what_they_are_wherever_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "0.parquet"
    int96(path)
    location = Location.of(str(path))
    wanted = far_dates()["when"].to_pylist()
    with location.open_parquet() as parquet:
        assert parquet.read()["when"].to_pylist() == wanted
    table = collect_table(TablePlan(location, None, np.arange(ROWS), None, NOBODY, NEW, Footer()))
    assert table["when"].to_pylist() == wanted
    few = add_columns(path, tmp_path / "1.parquet", keep=FEW)
    assert pq.ParquetFile(few, coerce_int96_timestamp_unit="us").read()["when"].to_pylist() == [wanted[n] for n in FEW]


def single_nanoseconds(path: Path) -> None:
    table = far_dates().set_column(1, "when", pa.array(range(1, ROWS + 1), pa.timestamp("ns"))).drop_columns(["inside"])
    pq.write_table(table, path, use_deprecated_int96_timestamps=True, compression="none", use_dictionary=False)


def test_single_nanoseconds_stay_too(tmp_path: Path) -> None:
    path = tmp_path / "0.parquet"
    single_nanoseconds(path)
    few = pq.read_table(add_columns(path, tmp_path / "1.parquet", keep=FEW))
    assert few["when"].cast(pa.int64()).to_pylist() == [1, 3, 4, 7]


def test_where_both_cannot_be_read_together_fewer_rows_are_refused_and_the_remedy_works(tmp_path: Path) -> None:
    path, target = tmp_path / "0.parquet", tmp_path / "1.parquet"
    single_nanoseconds(path)
    data, day = path.read_bytes(), (2440588).to_bytes(4, "little")  # 1970-01-01 as a Julian day
    value = (3).to_bytes(8, "little") + day
    assert data.count(value) == 1
    path.write_bytes(data.replace(value, (3).to_bytes(8, "little") + (5373484).to_bytes(4, "little")))
    with pytest.raises(SourceError, match=r"0\.parquet: column 'when' \(INT96\) .*save_metadata\(PATH, columns="):
        add_columns(path, target, keep=FEW)
    assert not target.exists()
    add_columns(path, target, keep=FEW, selected=["key"])
    assert pq.read_table(target).column_names == ["key", *NEW]
    whole = add_columns(path, target)  # copied, not read
    assert chunks(whole)[0]["columns"][:2] == chunks(path)[0]["columns"]


# -- what cannot be copied, or not with other rows -----------------------------------------


def bytes_as_decimals(path: Path) -> None:
    """Decimals as bytes of any length, as older writers have them: pyarrow writes fixed lengths."""
    sink = io.BytesIO()
    numbers = [n.to_bytes(2, "big") for n in range(ROWS)]
    pq.write_table(pa.table({"key": list("abcdefg"), "money": numbers}), sink, store_schema=False)
    layout = Layout.read(sink)
    layout.columns[1].elements[0].update({6: (I32, 5), 7: (I32, 2), 8: (I32, 4)})
    path.write_bytes(with_footer(sink.getvalue(), layout))


def test_other_rows_of_a_type_that_pyarrow_does_not_write_are_refused_and_the_remedy_works(tmp_path: Path) -> None:
    path, target = tmp_path / "0.parquet", tmp_path / "1.parquet"
    bytes_as_decimals(path)
    assert pq.read_table(path)["money"].to_pylist()[3] == decimal.Decimal("0.03")
    with pytest.raises(SourceError, match=r"0\.parquet: column 'money' \(BYTE_ARRAY Decimal.*columns=\["):
        add_columns(path, target, keep=FEW)
    assert "money" in faithful(Location.of(str(path)), other_rows=True)
    assert not target.exists()
    add_columns(path, target, keep=FEW, selected=["key"])
    assert pq.read_table(target)["key"].to_pylist() == ["a", "c", "d", "g"]
    before = tmp_path / "before.parquet"
    before.write_bytes(path.read_bytes())
    kept_as_they_were(before, add_columns(path))  # in place there are no other rows


def encrypted(path: Path) -> None:
    """The column "secret" encrypted, the footer signed and to be read by everybody."""
    import pyarrow.parquet.encryption as pe

    class Kms(pe.KmsClient):  # type: ignore[misc]
        def wrap_key(self, key: bytes, name: str) -> bytes:
            return key

        def unwrap_key(self, key: bytes, name: str) -> bytes:
            return key

    table = pa.table({"key": list("abcdefg"), "secret": range(ROWS)})
    options = pe.EncryptionConfiguration(footer_key="f", column_keys={"c": ["secret"]}, plaintext_footer=True)
    crypto = pe.CryptoFactory(lambda _: Kms())
    keys = crypto.file_encryption_properties(pe.KmsConnectionConfig(), options)
    with pq.ParquetWriter(path, table.schema, encryption_properties=keys) as writer:
        writer.write_table(table)


def elsewhere(path: Path) -> None:
    """A footer like that of a summary file: the pages of "far" lie in another file."""
    sink = io.BytesIO()
    pq.write_table(pa.table({"key": list("abcdefg"), "far": range(ROWS)}), sink)
    layout = Layout.read(sink)
    layout.chunk(0, 1)[1] = (BINARY, b"other.parquet")
    path.write_bytes(with_footer(sink.getvalue(), layout))


def with_footer(data: bytes, layout: Layout) -> bytes:
    footer = write_struct(layout.meta)
    return data[: layout.end] + footer + len(footer).to_bytes(4, "little") + b"PAR1"


@pytest.mark.parametrize(("write", "column"), [(encrypted, "secret"), (elsewhere, "far")])
def test_what_cannot_be_copied_is_refused_and_the_remedy_works(
    write: Callable[[Path], None], column: str, tmp_path: Path
) -> None:
    path, target = tmp_path / "0.parquet", tmp_path / "1.parquet"
    write(path)
    data = path.read_bytes()
    why = faithful(Location.of(str(path)))
    assert why.startswith(f"column '{column}' cannot be copied: ")
    assert "save_metadata(PATH, columns=[" in LEAVE_OUT
    source = Location.of(str(path))
    for place in (path, target):
        plan = TablePlan(source, None, np.arange(ROWS), None, NOBODY, NEW, Footer())
        with pytest.raises(SourceError, match=rf"0\.parquet: column '{column}' cannot be copied"):
            write_table(plan, Location.of(str(place)), Location.of(str(place)).token())
    assert path.read_bytes() == data and not target.exists()
    assert faithful(source, ["key"]) == faithful(source, ["key"], other_rows=True) == ""
    plan = TablePlan(source, None, np.arange(ROWS), None, NOBODY, NEW, Footer(), ["key"])
    write_table(plan, Location.of(str(target)), None)
    assert pq.read_table(target)["key"].to_pylist() == list("abcdefg")


@pytest.mark.parametrize("damage", ["length", "magic", "bytes", "short"])
def test_a_damaged_footer_is_named(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "0.parquet"
    int96(path)
    data = bytearray(path.read_bytes())
    if damage == "length":
        data[-8:-4] = b"\xff\xff\xff\x7f"
    elif damage == "magic":
        data[-4:] = b"PARE"
    elif damage == "bytes":
        data[-40:-8] = b"\xff" * 32
    path.write_bytes(b"PAR1" if damage == "short" else data)
    assert "cannot be copied" in faithful(Location.of(str(path)))


# -- page indexes, bloom filters, order ----------------------------------------------------


def test_page_indexes_point_at_the_pages_where_they_are_now(tmp_path: Path) -> None:
    path = tmp_path / "0.parquet"
    indexed(path)

    def pages() -> list[list[int]]:
        data = path.read_bytes()
        layout, found = Layout.read(io.BytesIO(data)), []
        for group in range(len(layout.row_groups)):
            for leaf in range(count):
                chunk = layout.chunk(group, leaf)
                index, _ = read_struct(data, chunk[4][1])
                places = [page[1][1] for page in index[1][1][1]]
                assert chunk[3][1][9][1] == places[0], "the first data page"
                found.append([data[place : place + 16] for place in places])
        return found

    count = len(leaves(path))
    before = pages()
    assert max(map(len, before)) > 1
    add_columns(path)
    assert pages() == before


def blooming(path: Path) -> None:
    table = pa.table({"key": [f"k{n}" for n in range(ROWS)], "n": range(ROWS)})
    pq.write_table(table, path, row_group_size=3, bloom_filter_options={"key": True, "n": True})


def test_bloom_filters_stay_of_use(tmp_path: Path) -> None:
    path, old = tmp_path / "0.parquet", tmp_path / "1.parquet"
    blooming(path)
    data = path.read_bytes()
    layout = Layout.read(io.BytesIO(data))
    for group in range(len(layout.row_groups)):
        for leaf in range(2):
            layout.chunk(group, leaf)[3][1].pop(15)  # as older writers: without the length
    old.write_bytes(with_footer(data, layout))

    def excluded(path: Path) -> list[list[bool]]:
        names = [f"k{n}" for n in range(ROWS)] + ["absent", "another"]
        probe = "select bloom_filter_excludes from parquet_bloom_probe('{}', 'key', '{}')"
        return [[row[0] for row in duckdb.sql(probe.format(path, name)).fetchall()] for name in names]

    wanted = excluded(path)
    assert wanted[-1] == [True, True, True] and wanted[0][0] is False
    for one in (path, old):
        assert excluded(add_columns(one)) == wanted


def test_the_order_of_rows_is_told_by_the_columns_that_are_there(tmp_path: Path) -> None:
    path, target = tmp_path / "0.parquet", tmp_path / "1.parquet"
    table = pa.table({"key": list("aabbccd"), "record": [{"a": 1, "b": 2}] * ROWS, "n": range(ROWS)})
    pq.write_table(table, path, sorting_columns=[pq.SortingColumn(0), pq.SortingColumn(3)])

    def order(path: Path) -> list[int]:
        told = pq.read_metadata(path).row_group(0).sorting_columns
        return [column.column_index for column in told]

    rows = {"keep": np.arange(ROWS)}
    record = {"columns": {"record": NEW["code"]}}
    assert order(add_columns(path, target, **rows, **record)) == [0, 2]
    assert order(add_columns(path, target, **rows, selected=["n"])) == []
    assert order(add_columns(path, target, **rows, selected=["key"])) == [0]
    assert pq.read_table(add_columns(path, target, **rows, **record)).column_names == ["key", "record", "n"]


# -- row groups of any size ----------------------------------------------------------------


@pytest.mark.parametrize("most", [1 << 25, 10])
def test_a_large_row_group_stays_one_and_is_written_piece_by_piece(
    most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rewriting, "MOST_ROWS", most)
    count = 3 * rewriting.PIECE_ROWS + 11
    path = tmp_path / "0.parquet"
    pq.write_table(pa.table({"key": [str(n) for n in range(count)]}), path)
    texts, pair = pa.list_(pa.string()), pa.struct([("a", pa.int64()), ("b", pa.string())])
    named = {"letters": NewColumn(texts, lambda rows: pa.array([[f"l{n}", None] for n in rows], texts))}
    both = {"pair": NewColumn(pair, lambda rows: pa.array([{"a": int(n), "b": None} for n in rows], pair))}
    columns = NEW | named | both
    add_columns(path, columns=columns)
    assert pq.read_metadata(path).num_row_groups == 1
    table, rows = pq.read_table(path), np.arange(count)
    for name, column in columns.items():
        assert table[name].combine_chunks().equals(column.values(rows).cast(table[name].type)), name
    seen = duckdb.sql(f"select sum(embedding[1]), count(embedding) from '{path}'").fetchall()
    assert seen == [(float(rows[rows % 3 != 0].sum()), int((rows % 3 != 0).sum()))]
    assert pl.read_parquet(path)["letters"].list.first().to_list() == [f"l{n}" for n in rows]
    assert pc.sum(table["pair"].combine_chunks().field("a")).as_py() == int(rows.sum())


def test_rows_that_are_left_out_are_read_a_piece_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewriting, "PIECE_BYTES", 1000)
    path, target = tmp_path / "0.parquet", tmp_path / "1.parquet"
    pq.write_table(pa.table({"key": [f"{n:04d}" for n in range(1000)], "blob": [b"x" * 50] * 1000}), path,
                   use_dictionary=False, row_group_size=600)  # fmt: skip
    keep = np.flatnonzero(np.arange(1000) % 7 > 1)
    add_columns(path, target, keep=keep)
    table = pq.read_table(target)
    assert table["key"].to_pylist() == [f"{n:04d}" for n in keep]
    assert table["embedding"].to_pylist() == NEW["embedding"].values(keep).to_pylist()
    assert pq.read_metadata(target).num_row_groups > 10


def test_types_that_only_arrow_knows_are_noted_where_the_input_has_no_such_note(tmp_path: Path) -> None:
    path = tmp_path / "0.parquet"
    by_duckdb(path)
    spans = pa.array([datetime.timedelta(seconds=n) for n in range(ROWS)], pa.duration("s"))
    kinds = pa.array(list("aabbccd")).dictionary_encode()
    columns = {
        "wait": NewColumn(spans.type, lambda rows: spans.take(pa.array(rows))),
        "class": NewColumn(kinds.type, lambda rows: kinds.take(pa.array(rows))),
    }
    before = seen_by_duckdb(path)
    add_columns(path, columns=columns)
    schema = pq.read_schema(path)
    assert schema.field("wait").type == spans.type and schema.field("class").type == kinds.type
    assert pq.read_table(path, columns=["wait"])["wait"].to_pylist() == spans.to_pylist()
    assert seen_by_duckdb(path, columns) == before


def test_pandas_finds_its_index_again(tmp_path: Path) -> None:
    path, target = tmp_path / "0.parquet", tmp_path / "1.parquet"
    frame = pd.DataFrame({"key": list("abcdefg"), "n": range(ROWS)}, index=pd.Index(list("tuvwxyz"), name="letter"))
    frame.to_parquet(path)
    add_columns(path, target, selected=["key", "letter"])
    add_columns(path)
    pd.testing.assert_frame_equal(pd.read_parquet(path)[["key", "n"]], frame)
    pd.testing.assert_frame_equal(pd.read_parquet(target)[["key"]], frame[["key"]])
    assert json.loads(pq.read_schema(path).metadata[b"pandas"]) == json.loads(
        pq.read_schema(target).metadata[b"pandas"]
    )
