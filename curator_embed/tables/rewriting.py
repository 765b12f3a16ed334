"""A table with columns added: what stays is copied as it lies, what is new is encoded.

Only rows that leave their row group (dropped rows, ``limit``) or come behind (images without a row) make old columns be
encoded again, and then as they were: the same physical types, codecs and dictionaries, below the same schema.
"""

from __future__ import annotations

import base64
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curator_embed.errors import SourceError
from curator_embed.tables.provenance import FOOTER_KEY
from curator_embed.tables.splicing import Column, Encoded, Layout, NotCopied, Splice
from curator_embed.tables.thrift import Struct

if TYPE_CHECKING:
    from curator_embed.storage.location import Location
    from curator_embed.tables.writing import NewColumn, TablePlan

PIECE_ROWS = 8192
"""Rows of new columns that are computed at a time."""
PIECE_BYTES = 64 << 20
"""Bytes of existing columns that are decoded at a time, where they have to be."""
MOST_ROWS = 1 << 25
"""Rows of a row group up to which a flat column is encoded in one go, with a dictionary and statistics."""

ARROW_KEY = b"ARROW:schema"
LEAVE_OUT = (
    "Pass an output path and the columns to take along, save_metadata(PATH, columns=[...]), or none of them, columns=[]"
)


def encoding_options(schema: pa.Schema) -> dict[str, Any]:
    """How new columns are written. A dictionary or statistics can only cost time on vectors, which do not repeat."""
    flat = [item.name for item in schema if not pa.types.is_nested(item.type)]
    return {"compression": "zstd", "use_dictionary": flat, "write_statistics": flat}


class Rewriting:
    """One shard's new file, from the parquet that it extends.

    Args:
        parquet, raw: the existing file, opened twice: for pyarrow and for its bytes.
        file: the new one.

    Raises:
        SourceError: the file cannot be copied.
    """

    def __init__(self, plan: TablePlan, parquet: pq.ParquetFile, raw: IO[bytes], file: IO[bytes]) -> None:
        assert plan.source is not None
        self.plan, self.parquet, self.source = plan, parquet, plan.source
        with _copying(self.source.path):
            self.layout = Layout.read(raw)
        old = self.layout.columns
        kept = [c for c in old if c.name in plan.columns or plan.selected is None or c.name in plan.selected]
        if why := _uncopied(self.layout, [c for c in kept if c.name not in plan.columns]):
            raise SourceError(self.source.path, why, LEAVE_OUT)
        # A column that is made anew keeps its place; new ones come behind.
        self.columns: list[Column | str] = [c.name if c.name in plan.columns else c for c in kept]
        self.columns += [name for name in plan.columns if name not in {c.name for c in old}]
        self.new = _New(plan.columns)
        self.splice = Splice(file, raw, self.layout)
        self._recoded: _Recoded | None = None

    def write(self) -> int:
        """Write the file; returns the number of its rows."""
        with _copying(self.source.path):
            written = self._rows()
            columns: list[Sequence[Any]] = []
            orders: list[Any] = []
            for column in self.columns:
                if isinstance(column, Column):
                    columns.append(column.elements)
                    orders += [self.splice.order(leaf) for leaf in column.leaves]
                else:
                    columns.append(self.new.column(column).elements)
                    orders += self.new.orders(column)
            entries = {FOOTER_KEY: self.plan.footer.to_bytes(), ARROW_KEY: self._arrow_schema()}
            self.splice.close(columns, orders, entries)
        return written

    def _rows(self) -> int:
        written = start = 0
        for number in range(len(self.layout.row_groups)):
            after = start + self.layout.row_group_rows(number)
            low, high = np.searchsorted(self.plan.keep, [start, after])
            rows = self.plan.keep[low:high]
            if len(rows) == after - start:
                self._row_group(rows, number)
            elif len(rows):
                for places, table in self.recoded.pieces(number, rows - start):
                    self._row_group(places + start, number, table)
            written += len(rows)
            start = after
        if self.plan.appended is not None and len(self.plan.appended_rows):
            self._row_group(self.plan.appended_rows, len(self.layout.row_groups) - 1, self.plan.appended)
            written += len(self.plan.appended_rows)
        return written

    def _row_group(self, rows: np.ndarray, group: int, table: pa.Table | None = None) -> None:
        """Write a row group: of an old one, as it is, or with the columns of ``table`` in place of the old ones."""
        self.new.begin(rows)
        for column in self.columns:
            if not isinstance(column, Column):
                self.new.put(column, self.splice)
            elif table is None:
                for leaf in column.leaves:
                    self.splice.copy(group, leaf)
            else:
                for chunk, data in self.recoded.encoded(table, group, column):
                    self.splice.add(chunk, data)
        leaves: list[int | None] = []
        for column in self.columns:
            leaves += column.leaves if isinstance(column, Column) else [None] * len(self.new.column(column).paths)
        self.splice.end_row_group(len(rows), group if table is None else None, leaves)

    @property
    def recoded(self) -> _Recoded:
        if self._recoded is None:
            old = [column for column in self.columns if isinstance(column, Column)]
            self._recoded = _Recoded(self.source, self.parquet, self.layout, old)
        return self._recoded

    def _arrow_schema(self) -> bytes | None:
        """The file's note of its Arrow types, with the new columns; None where it has none and needs none."""
        noted = next((item[2][1] for item in self.layout.key_values if item[1][1] == ARROW_KEY), None)
        if noted is not None:
            schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(noted)))
        elif self.new.native:
            return None
        else:
            schema = self.parquet.schema_arrow
        if len(schema) != len(self.layout.columns):
            return None
        number = {id(column): position for position, column in enumerate(self.layout.columns)}
        fields = [
            schema.field(number[id(c)]) if isinstance(c, Column) else pa.field(c, self.plan.columns[c].type)
            for c in self.columns
        ]
        # Where there is such a note, pyarrow takes a schema's metadata from it alone.
        metadata = {**(schema.metadata or {}), FOOTER_KEY: self.plan.footer.to_bytes()}
        return base64.b64encode(pa.schema(fields, metadata).serialize())


@contextmanager
def _copying(path: str) -> Iterator[None]:
    """Name the file whose footer cannot be read and written again."""
    try:
        yield
    except NotCopied as error:
        raise SourceError(path, f"its columns cannot be copied: {error}", LEAVE_OUT) from error


def faithful(table: Location, columns: Collection[str] | None = None, *, other_rows: bool = False) -> str:
    """Why a parquet file's columns cannot be written back as they are; empty when they can. ``LEAVE_OUT`` helps.

    Read from its footer, in about 50 microseconds per column and row group.

    Args:
        columns: those that are written back; None for all, as in place.
        other_rows: whether rows are left out or added.
    """
    try:
        with table.open_bytes() as file:
            layout = Layout.read(file)
    except NotCopied as error:
        return f"its columns cannot be copied: {error}"
    chosen = [column for column in layout.columns if columns is None or column.name in columns]
    why = _uncopied(layout, chosen)
    if not why and other_rows:
        with table.open_parquet() as parquet:
            why = uncuttable(parquet, chosen, layout)
    return why


def _uncopied(layout: Layout, columns: Sequence[Column]) -> str:
    for column in columns:
        if why := layout.uncopied([column]):
            return f"column '{column.name}' cannot be copied: {why}"
    if layout.encrypted and len(columns) == len(layout.columns):
        return "its columns cannot be copied: its footer is signed"
    return ""


class _New:
    """The new columns of a row group at a time."""

    def __init__(self, columns: dict[str, NewColumn]) -> None:
        self._columns = columns
        self._schema = pa.schema([pa.field(name, new.type) for name, new in columns.items()])
        self._number = {name: number for number, name in enumerate(columns)}
        self._empty = self._encoded(self._schema.empty_table())
        self._ready: dict[str, tuple[Encoded, int]] = {}
        self._rows = np.empty(0, np.int64)

    def column(self, name: str) -> Column:
        """Its part of the schema."""
        return self._empty.layout.columns[self._number[name]]

    def orders(self, name: str) -> list[Any]:
        """The ColumnOrder of its leaves."""
        orders = self._empty.orders()
        return [orders[leaf] for leaf in self.column(name).leaves]

    @property
    def native(self) -> bool:
        """Whether parquet's own types say what type each column has."""
        return bool(pq.read_schema(pa.BufferReader(self._empty.data)).types == self._schema.types)

    def begin(self, rows: np.ndarray) -> None:
        """Begin a row group: what is small is computed at once."""
        self._rows = rows
        names = [name for name in self._columns if len(rows) <= PIECE_ROWS or not self._in_pieces(name)]
        encoded = self._encoded(pa.table({name: self._values(name, rows) for name in names})) if names else None
        self._ready = {name: (encoded, number) for number, name in enumerate(names) if encoded is not None}

    def _in_pieces(self, name: str) -> bool:
        """Whether a column is written piece by piece: pages of one leaf, none of which is a dictionary."""
        nested = pa.types.is_nested(self._columns[name].type)
        return len(self.column(name).paths) == 1 and (nested or len(self._rows) > MOST_ROWS)

    def put(self, name: str, splice: Splice) -> None:
        """Append a column's chunks."""
        if name in self._ready:
            encoded, number = self._ready[name]
            for chunk, data in encoded.chunks(number):
                splice.add(chunk, data)
            return
        for start in range(0, len(self._rows), PIECE_ROWS):
            rows = self._rows[start : start + PIECE_ROWS]
            table = pa.table({name: self._values(name, rows)})
            ((chunk, data),) = self._encoded(table, use_dictionary=False, write_statistics=False).chunks(0)
            (splice.extend if start else splice.add)(chunk, data)

    def _values(self, name: str, rows: np.ndarray) -> pa.ChunkedArray:
        # In chunks: the offsets of a list column have 32 bits, and a row group may have any number of rows.
        new = self._columns[name]
        starts = range(0, len(rows), PIECE_ROWS)
        return pa.chunked_array([new.values(rows[start : start + PIECE_ROWS]) for start in starts], new.type)

    @staticmethod
    def _encoded(table: pa.Table, **options: Any) -> Encoded:
        return Encoded(table, store_schema=False, **{**encoding_options(table.schema), **options})


class _Recoded:
    """Existing columns encoded once more, so that their chunks fit below the file's own schema.

    Raises:
        SourceError: pyarrow writes a column of such a type in another way.
    """

    def __init__(self, source: Location, parquet: pq.ParquetFile, layout: Layout, columns: Sequence[Column]) -> None:
        self._source, self._parquet, self._layout, self._columns = source, parquet, layout, columns
        self._dated = [column for column in columns if _options(parquet, column).get("use_deprecated_int96_timestamps")]
        if why := uncuttable(parquet, columns, layout):
            raise SourceError(source.path, why, LEAVE_OUT)

    def _index(self, column: Column, table: pa.Table) -> int:
        """Where a column is in a table: names may repeat."""
        before = sum(other.name == column.name and other.first < column.first for other in self._layout.columns)
        return int(table.schema.get_all_field_indices(column.name)[before])

    def pieces(self, group: int, places: np.ndarray) -> Iterator[tuple[np.ndarray, pa.Table]]:
        """Some rows of a row group, about ``PIECE_BYTES`` at a time.

        Args:
            places: their positions within it.
        """
        size = sum(self._layout.decoded_bytes(group, leaf) for column in self._columns for leaf in column.leaves)
        count = self._layout.row_group_rows(group)
        at_a_time = int(max(1, min(count, PIECE_BYTES * count // max(1, size))))
        exact = self._nanoseconds(group, at_a_time) if self._dated else None
        names = [column.name for column in self._columns]
        start = 0
        for batch in self._parquet.iter_batches(at_a_time, [group], columns=names, use_threads=False):
            table = pa.Table.from_batches([batch])
            if exact is not None:
                table = self._with_dates(table, pa.Table.from_batches([next(exact)]))
            low, high = np.searchsorted(places, [start, start + len(table)])
            mine = places[low:high]
            if len(mine):
                yield mine, table if len(mine) == len(table) else table.take(pa.array(mine - start))
            start += len(table)

    def _nanoseconds(self, group: int, at_a_time: int) -> Iterator[pa.RecordBatch]:
        """The INT96 columns once more: ``Location.open_parquet`` reads them as microseconds."""
        with self._source.open_bytes() as file:
            parquet = pq.ParquetFile(file, coerce_int96_timestamp_unit="ns")
            names = [column.name for column in self._dated]
            yield from parquet.iter_batches(at_a_time, [group], columns=names, use_threads=False)

    def _with_dates(self, table: pa.Table, nanoseconds: pa.Table) -> pa.Table:
        """The table with its INT96 columns in a unit that holds all their values."""
        for column in self._dated:
            ours, theirs = self._index(column, table), self._index(column, nanoseconds)
            unit = _unit(table.column(ours), nanoseconds.column(theirs))
            if not unit:
                raise SourceError(
                    self._source.path,
                    f"column '{column.name}' (INT96) has single nanoseconds beside dates outside 1678 to 2262, "
                    "which pyarrow cannot read together",
                    LEAVE_OUT,
                )
            if unit == "ns":
                table = table.set_column(ours, nanoseconds.schema.field(theirs), nanoseconds.column(theirs))
        return table

    def encoded(self, table: pa.Table, group: int, column: Column) -> Iterator[tuple[Struct, pa.Buffer]]:
        """Encode a column of a table, as it is encoded in a row group."""
        part = table.select([self._index(column, table)]).rename_columns(["0"])
        options = _options(self._parquet, column)
        if self._layout.row_groups:
            empty = Encoded(part.schema.empty_table(), **options)
            leaves = [(".".join(map(bytes.decode, path)), leaf)
                      for path, leaf in zip(empty.layout.columns[0].paths, column.leaves, strict=True)]  # fmt: skip
            options["compression"] = {path: self._layout.codec(group, leaf) for path, leaf in leaves}
            options["use_dictionary"] = [path for path, leaf in leaves if self._layout.has_dictionary(group, leaf)]
        return Encoded(part, **options).chunks(0, column.paths)


def uncuttable(parquet: pq.ParquetFile, columns: Sequence[Column], layout: Layout) -> str:
    """Why rows of these columns cannot be left out or appended: the first column that pyarrow writes in another way."""
    for column in columns:
        item = parquet.schema_arrow.field(layout.columns.index(column)).with_name("0")
        leaves = [parquet.schema.column(leaf) for leaf in column.leaves]
        try:
            again = Encoded(pa.schema([item]).empty_table(), **_options(parquet, column))
            schema = pq.ParquetFile(pa.BufferReader(again.data)).schema
            same = [_meaning(leaf) for leaf in leaves] == [_meaning(schema.column(n)) for n in range(len(schema))]
        except (pa.ArrowException, TypeError):  # TypeError: an option that an older pyarrow does not have
            same = False
        if not same:
            return (
                f"column '{column.name}' ({', '.join(dict.fromkeys(map(_type_of, leaves)))}) can be copied, but not "
                "written with other rows"
            )
    return ""


def _type_of(leaf: pq.ColumnSchema) -> str:
    logical = str(leaf.logical_type)
    return leaf.physical_type if logical == "None" else f"{leaf.physical_type} {logical}"


def _options(parquet: pq.ParquetFile, column: Column) -> dict[str, Any]:
    """What pyarrow has to be told, once per writer, to use a column's physical types."""
    options: dict[str, Any] = {"compression": "zstd", "store_schema": False}
    leaves = [parquet.schema.column(leaf) for leaf in column.leaves]
    if any(leaf.physical_type == "INT96" for leaf in leaves):
        options["use_deprecated_int96_timestamps"] = True
    if any(leaf.physical_type in ("INT32", "INT64") and leaf.converted_type == "DECIMAL" for leaf in leaves):
        options["store_decimal_as_integer"] = True
    return options


def _meaning(leaf: pq.ColumnSchema) -> tuple[Any, ...]:
    """What bytes of a leaf stand for. Annotations that say no more than what kind of text it is do not count."""
    logical = str(leaf.logical_type)
    temporal = logical if logical.startswith(("Timestamp", "Time")) else ""
    unit = next((unit for unit in ("milliseconds", "microseconds", "nanoseconds") if unit in temporal), "")
    scale = leaf.scale if leaf.converted_type == "DECIMAL" or logical.startswith("Decimal") else None
    length = leaf.length if leaf.physical_type == "FIXED_LEN_BYTE_ARRAY" else None
    return (leaf.physical_type, length, leaf.max_definition_level, leaf.max_repetition_level, unit, scale)


def _unit(micros: pa.ChunkedArray, nanos: pa.ChunkedArray) -> str:
    """The unit in which timestamps lose nothing: "us", "ns", or "" for neither."""
    exact, near = True, True
    for one, other in zip(_timestamps(micros), _timestamps(nanos), strict=True):
        # Nanoseconds that do not fit have wrapped around, as this product does.
        with np.errstate(over="ignore"):
            exact = exact and bool(np.array_equal(one * np.int64(1000), other))
        near = near and bool(np.array_equal(one, other // 1000))
    return "us" if exact else "ns" if near else ""


def _timestamps(values: pa.ChunkedArray) -> list[np.ndarray]:
    """All timestamps below a column, as int64 with 0 for null."""

    def below(array: pa.Array) -> Iterator[np.ndarray]:
        if pa.types.is_timestamp(array.type):
            yield array.cast(pa.int64()).fill_null(0).to_numpy(zero_copy_only=False)
        elif pa.types.is_struct(array.type):
            for child in array.flatten():
                yield from below(child)
        elif pa.types.is_map(array.type):
            yield from below(array.keys)
            yield from below(array.items)
        elif pa.types.is_nested(array.type):
            yield from below(array.flatten())

    return [found for chunk in values.chunks for found in below(chunk)]
