"""Parquet files put together from column chunks: some copied byte for byte out of another file, others just encoded.

What is copied is never decoded, so nothing about it can change: values that no Arrow type holds, physical and logical
types, encodings, codecs, statistics, row groups, page indexes, bloom filters. Only the offsets in the footer move.
Format: https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from curator_embed.errors import CuratorEmbedError
from curator_embed.tables.thrift import BINARY, I16, I32, I64, LIST, STRUCT, Struct, read_struct, write_struct

MAGIC = b"PAR1"
COPY_BYTES = 4 << 20

# Field numbers of parquet.thrift.
_SCHEMA, _ROWS, _ROW_GROUPS, _KEY_VALUES, _CREATED_BY, _ORDERS, _ENCRYPTION, _SIGNED_BY = range(2, 10)  # FileMetaData
_PHYSICAL, _NAME, _CHILDREN = 1, 4, 5  # SchemaElement
_CHUNKS, _BYTES, _GROUP_ROWS, _SORTING, _OFFSET, _COMPRESSED, _ORDINAL = 1, 2, 3, 4, 5, 6, 7  # RowGroup
_FILE_PATH, _FILE_OFFSET, _META = 1, 2, 3  # ColumnChunk
_OFFSET_INDEX, _COLUMN_INDEX, _CRYPTO, _ENCRYPTED_META = (4, 5), (6, 7), 8, 9  # (offset, length) each
_ENCODINGS, _PATH, _CODEC, _VALUES, _UNCOMPRESSED_SIZE, _SIZE, _DATA_PAGE = 2, 3, 4, 5, 6, 7, 9  # ColumnMetaData
_INDEX_PAGE, _DICTIONARY_PAGE, _STATISTICS, _PAGE_COUNTS, _BLOOM, _SIZES = 10, 11, 12, 13, (14, 15), 16

_CODECS = ("none", "snappy", "gzip", "zstd", "brotli", "zstd", "zstd", "lz4")
"""pyarrow's names by number; zstd for those that it cannot write (LZO, Hadoop's LZ4)."""


@dataclass(frozen=True)
class Column:
    """A column of the table: the part of the schema's tree below the root that belongs to it.

    Attributes:
        elements: its SchemaElements, itself first.
        first: position of its first leaf among the file's leaves, which is also that of its chunks.
        paths: names from the root down to each of its leaves.
    """

    name: str
    elements: tuple[Struct, ...]
    first: int
    paths: tuple[tuple[bytes, ...], ...]

    @property
    def leaves(self) -> range:
        """Positions of its leaves in the file."""
        return range(self.first, self.first + len(self.paths))


class NotCopied(CuratorEmbedError):
    """A parquet file whose columns cannot be copied; the message says why, the file is to be named by the caller."""


class Layout:
    """A parquet file's footer, whole.

    Attributes:
        meta: the FileMetaData.
        columns: of the table, in order.
        end: where the footer begins: all pages lie before.
        behind: bytes behind each chunk that may belong to it, too.
    """

    def __init__(self, meta: Struct, end: int) -> None:
        self.meta, self.end = meta, end
        elements: list[Struct] = meta[_SCHEMA][1][1]
        columns: list[Column] = []
        position = 1
        for _ in range(elements[0].get(_CHILDREN, (I32, 0))[1]):
            last, paths = _below(elements, position, ())
            first = columns[-1].leaves.stop if columns else 0
            name = elements[position][_NAME][1].decode(errors="replace")
            columns.append(Column(name, tuple(elements[position:last]), first, tuple(paths)))
            position = last
        self.root, self.columns = elements[0], tuple(columns)
        self.row_groups: list[Struct] = meta[_ROW_GROUPS][1][1]
        # parquet-mr before 1.2.9 left the header of the dictionary out of a chunk's size (PARQUET-816).
        writer = re.match(rb"parquet-mr(?: version (\d+)\.(\d+)\.(\d+))?", meta.get(_CREATED_BY, (BINARY, b""))[1])
        self.behind = 100 if writer and tuple(int(part or 0) for part in writer.groups()) < (1, 2, 9) else 0

    @classmethod
    def read(cls, file: IO[bytes]) -> Layout:
        """Read the footer of a parquet file.

        Raises:
            NotCopied: it has none that can be read and written again.
        """
        size = file.seek(0, 2)
        file.seek(max(0, size - 8))
        tail = file.read(8)
        if tail[4:] != MAGIC:
            raise NotCopied("its footer is encrypted" if tail[4:] == b"PARE" else "it does not end as a parquet file")
        end = size - 8 - int.from_bytes(tail[:4], "little")
        if end < len(MAGIC):
            raise NotCopied("its footer is damaged")
        file.seek(end)
        try:
            layout = cls(read_struct(file.read(size - 8 - end))[0], end)
        except (ValueError, KeyError, IndexError, TypeError):
            raise NotCopied("its footer is damaged") from None
        return layout

    def uncopied(self, columns: Iterable[Column]) -> str:
        """Why these columns cannot be copied; empty when they can."""
        leaves = [leaf for column in columns for leaf in column.leaves]
        try:
            for group in range(len(self.row_groups)):
                for leaf in leaves:
                    self.chunk(group, leaf)
        except NotCopied as error:
            return str(error)
        return ""

    @property
    def encrypted(self) -> bool:
        """Whether columns are encrypted, or the footer is signed."""
        return _ENCRYPTION in self.meta

    def chunk(self, group: int, leaf: int) -> Struct:
        """The ColumnChunk of a leaf in a row group.

        Raises:
            NotCopied: its bytes are not in this file, or encrypted.
        """
        chunk: Struct = self.row_groups[group][_CHUNKS][1][1][leaf]
        if _FILE_PATH in chunk:
            raise NotCopied("its columns lie in other files")
        if _META not in chunk or _CRYPTO in chunk or _ENCRYPTED_META in chunk:
            raise NotCopied("it has encrypted columns")
        start, size = _extent(chunk[_META][1])
        if size < 0 or start + size > self.end:
            raise NotCopied("its footer is damaged")
        return chunk

    def codec(self, group: int, leaf: int) -> str:
        """pyarrow's name of the codec of a leaf's chunk."""
        number = self.chunk(group, leaf)[_META][1][_CODEC][1]
        return _CODECS[number] if 0 <= number < len(_CODECS) else "zstd"

    def decoded_bytes(self, group: int, leaf: int) -> int:
        """Bytes of a leaf's pages when they are not compressed."""
        return int(self.chunk(group, leaf)[_META][1][_UNCOMPRESSED_SIZE][1])

    def stored_bytes(self, names: Collection[str]) -> int:
        """Bytes of the columns of these names, as far as the footer tells: of encrypted ones it need not."""
        leaves = [leaf for column in self.columns if column.name in names for leaf in column.leaves]
        chunks = (group[_CHUNKS][1][1][leaf] for group in self.row_groups for leaf in leaves)
        return sum(chunk[_META][1][_SIZE][1] for chunk in chunks if _META in chunk)

    def row_group_rows(self, group: int) -> int:
        """Rows of a row group."""
        return int(self.row_groups[group][_GROUP_ROWS][1])

    def has_dictionary(self, group: int, leaf: int) -> bool:
        """Whether a leaf's chunk begins with a dictionary."""
        return bool(self.chunk(group, leaf)[_META][1].get(_DICTIONARY_PAGE, (I64, 0))[1])

    @property
    def key_values(self) -> list[Struct]:
        """The file's own metadata, in order."""
        return list(self.meta[_KEY_VALUES][1][1]) if _KEY_VALUES in self.meta else []


def _below(elements: Sequence[Struct], position: int, above: tuple[bytes, ...]) -> tuple[int, list[tuple[bytes, ...]]]:
    """Where the tree at ``position`` ends, and the paths of its leaves."""
    element = elements[position]
    path = (*above, element[_NAME][1])
    if _PHYSICAL in element:
        return position + 1, [path]
    paths: list[tuple[bytes, ...]] = []
    after = position + 1
    for _ in range(element.get(_CHILDREN, (I32, 0))[1]):
        after, more = _below(elements, after, path)
        paths += more
    return after, paths


def _extent(meta: Struct) -> tuple[int, int]:
    """Where a chunk's pages begin, and their bytes. Some writers give 0 as the place of what is not there."""
    offsets = (meta.get(number, (I64, 0))[1] for number in (_DATA_PAGE, _DICTIONARY_PAGE))
    return min((offset for offset in offsets if offset > 0), default=len(MAGIC)), meta[_SIZE][1]


class Encoded:
    """Columns that pyarrow has encoded: their chunks, to be put into another file.

    Args:
        options: those of ``pyarrow.parquet.ParquetWriter``.
    """

    def __init__(self, table: pa.Table, **options: Any) -> None:
        sink = pa.BufferOutputStream()
        with pq.ParquetWriter(sink, table.schema, **options) as writer:
            writer.write_table(table, row_group_size=max(1, table.num_rows))
        self.data = sink.getvalue()
        self.rows = table.num_rows
        self.layout = Layout.read(pa.BufferReader(self.data))
        if len(self.layout.row_groups) > 1:
            raise NotCopied(f"{table.num_rows} rows are too many for a row group")

    def chunks(
        self, position: int, paths: Sequence[Sequence[bytes]] | None = None
    ) -> Iterator[tuple[Struct, pa.Buffer]]:
        """Each chunk of the column at ``position`` with its bytes.

        Args:
            paths: of its leaves in the file they will be in, where they differ.
        """
        column = self.layout.columns[position]
        for leaf, path in zip(column.leaves, paths or column.paths, strict=True):
            chunk = self.layout.chunk(0, leaf)
            start, size = _extent(chunk[_META][1])
            chunk = {**chunk, _META: (STRUCT, {**chunk[_META][1], _PATH: (LIST, (BINARY, list(path)))})}
            yield chunk, self.data.slice(start, size)

    def orders(self) -> list[Struct]:
        """The ColumnOrder of each leaf."""
        return list(self.layout.meta[_ORDERS][1][1])


class Splice:
    """A parquet file in the making, written from its beginning to its end.

    Args:
        file: the new file.
        raw: the file that chunks are copied from.
        layout: its footer.
    """

    def __init__(self, file: IO[bytes], raw: IO[bytes], layout: Layout) -> None:
        self._file, self._raw, self._layout = file, raw, layout
        self._position = 0
        self._chunks: list[Struct] = []
        self._groups: list[Struct] = []
        self._copied: list[tuple[Struct, Struct, int]] = []
        self._write(MAGIC)

    def _write(self, data: Any) -> None:
        self._file.write(data)
        self._position += len(data)

    def copy(self, group: int, leaf: int) -> None:
        """Copy a leaf's chunk as it is."""
        chunk = self._layout.chunk(group, leaf)
        start, size = _extent(chunk[_META][1])
        moved = self._place(chunk, self._position - start)
        self._copied.append((moved, chunk, self._position - start))
        self._raw.seek(start)
        size = min(size + self._layout.behind, self._layout.end - start)
        while size:
            data = self._raw.read(min(size, COPY_BYTES))
            if not data:
                raise NotCopied("it ends early")
            self._write(data)
            size -= len(data)

    def add(self, chunk: Struct, data: pa.Buffer) -> None:
        """Append a chunk that has just been encoded."""
        self._place(chunk, self._position - _extent(chunk[_META][1])[0])
        self._write(memoryview(data))

    def extend(self, chunk: Struct, data: pa.Buffer) -> None:
        """Append pages to the chunk before: of the same leaf, and neither of them with a dictionary."""
        into, more = self._chunks[-1][_META][1], chunk[_META][1]
        if _DICTIONARY_PAGE in into or _DICTIONARY_PAGE in more:
            raise NotCopied("a chunk has one dictionary")
        for number in (_VALUES, _UNCOMPRESSED_SIZE, _SIZE):
            into[number] = (I64, into[number][1] + more[number][1])
        known = into[_ENCODINGS][1][1]
        into[_ENCODINGS] = (LIST, (I32, sorted({*known, *more[_ENCODINGS][1][1]})))
        for number in (_STATISTICS, _PAGE_COUNTS, _SIZES):  # told of the first pages only
            into.pop(number, None)
        self._write(memoryview(data))

    def _place(self, chunk: Struct, by: int) -> Struct:
        """Note a chunk whose bytes come next, ``by`` bytes behind where they were. What lies outside is left out."""
        meta = {number: entry for number, entry in chunk[_META][1].items() if number not in _BLOOM}
        for number in (_DATA_PAGE, _INDEX_PAGE, _DICTIONARY_PAGE):
            if meta.get(number, (I64, 0))[1] > 0:
                meta[number] = (I64, meta[number][1] + by)
        outside = (*_OFFSET_INDEX, *_COLUMN_INDEX)
        moved = {number: entry for number, entry in chunk.items() if number not in outside}
        moved |= {_FILE_OFFSET: (I64, 0), _META: (STRUCT, meta)}
        self._chunks.append(moved)
        return moved

    def end_row_group(self, rows: int, like: int | None = None, leaves: Sequence[int | None] = ()) -> None:
        """The chunks since the last call are a row group, one per leaf.

        Args:
            rows: how many it has.
            like: a row group of the copied file, whose other fields it gets.
            leaves: where each leaf lay in that file, None for a new one.
        """
        group: Struct = {} if like is None else dict(self._layout.row_groups[like])
        metas = [chunk[_META][1] for chunk in self._chunks]
        group[_CHUNKS] = (LIST, (STRUCT, self._chunks))
        group[_BYTES] = (I64, sum(meta[_UNCOMPRESSED_SIZE][1] for meta in metas))
        group[_GROUP_ROWS] = (I64, rows)
        group[_OFFSET] = (I64, _extent(metas[0])[0] if metas else 0)
        group[_COMPRESSED] = (I64, sum(meta[_SIZE][1] for meta in metas))
        if len(self._groups) < 1 << 15:
            group[_ORDINAL] = (I16, len(self._groups))
        else:
            group.pop(_ORDINAL, None)
        if _SORTING in group:
            group = _still_sorted(group, leaves)
        self._groups.append(group)
        self._chunks = []

    def close(
        self,
        columns: Sequence[Sequence[Struct]],
        orders: Sequence[Struct | None],
        key_values: Mapping[bytes, bytes | None],
    ) -> None:
        """Write page indexes, bloom filters and the footer.

        Args:
            columns: the SchemaElements of each column.
            orders: the ColumnOrder of each leaf; where one is not known, none is written.
            key_values: entries of the file's own metadata to set, or to take out.
        """
        self._copy_outside()
        meta = {number: entry for number, entry in self._layout.meta.items() if number not in (_ENCRYPTION, _SIGNED_BY)}
        root = {**self._layout.root, _CHILDREN: (I32, len(columns))}
        meta[_SCHEMA] = (LIST, (STRUCT, [root, *(element for column in columns for element in column)]))
        meta[_ROWS] = (I64, sum(group[_GROUP_ROWS][1] for group in self._groups))
        meta[_ROW_GROUPS] = (LIST, (STRUCT, self._groups))
        meta[_KEY_VALUES] = (LIST, (STRUCT, _updated(self._layout.key_values, key_values)))
        meta.pop(_ORDERS, None)
        if None not in orders:
            meta[_ORDERS] = (LIST, (STRUCT, list(orders)))
        footer = write_struct(meta)
        end = len(footer).to_bytes(4, "little") + MAGIC
        pq.read_metadata(pa.BufferReader(MAGIC + footer + end))  # nothing that pyarrow cannot open takes a file's place
        self._write(footer)
        self._write(end)

    def order(self, leaf: int) -> Struct | None:
        """The ColumnOrder of a leaf of the copied file, where it gives one."""
        return self._layout.meta[_ORDERS][1][1][leaf] if _ORDERS in self._layout.meta else None

    def _copy_outside(self) -> None:
        """What belongs to copied chunks and lies elsewhere. It can be done without: what is damaged is left out."""
        for moved, chunk, _ in self._copied:
            if bloom := self._bloom(chunk[_META][1]):
                moved[_META][1].update(self._appended(_BLOOM, bloom))
        for moved, chunk, _ in self._copied:
            if index := self._outside(chunk, _COLUMN_INDEX):
                moved.update(self._appended(_COLUMN_INDEX, index))
        for moved, chunk, by in self._copied:
            index = self._outside(chunk, _OFFSET_INDEX)
            try:
                pages, _ = read_struct(index)
                for page in pages[1][1][1]:
                    page[1] = (I64, page[1][1] + by)
            except (ValueError, KeyError, IndexError):
                for number in _COLUMN_INDEX:  # of no use alone
                    moved.pop(number, None)
                continue
            moved.update(self._appended(_OFFSET_INDEX, write_struct(pages)))

    def _appended(self, where: tuple[int, int], data: bytes) -> Struct:
        entry: Struct = {where[0]: (I64, self._position), where[1]: (I32, len(data))}
        self._write(data)
        return entry

    def _outside(self, entry: Struct, where: tuple[int, int]) -> bytes:
        """The bytes at an (offset, length); none where that is not in the file."""
        start, size = (entry.get(number, (I64, 0))[1] for number in where)
        if start <= 0 or size <= 0 or start + size > self._layout.end:
            return b""
        self._raw.seek(start)
        return self._raw.read(size)

    def _bloom(self, meta: Struct) -> bytes:
        if found := self._outside(meta, _BLOOM):
            return found
        start = meta.get(_BLOOM[0], (I64, 0))[1]
        if start <= 0 or _BLOOM[1] in meta:
            return b""
        self._raw.seek(start)  # older writers give no length: a header says how many bytes come behind it
        head = self._raw.read(64)
        try:
            header, size = read_struct(head)
            return self._outside({14: (I64, start), 15: (I32, size + header[1][1])}, _BLOOM)
        except (ValueError, KeyError):
            return b""


def _still_sorted(group: Struct, leaves: Sequence[int | None]) -> Struct:
    """A row group whose order is told by the leaves' new positions, as far as they are there."""
    element, columns = group[_SORTING][1]
    kept = []
    for column in columns:
        if column[1][1] not in leaves:
            break
        kept.append({**column, 1: (I32, leaves.index(column[1][1]))})
    rest = {number: entry for number, entry in group.items() if number != _SORTING}
    return {**rest, _SORTING: (LIST, (element, kept))} if kept else rest


def _updated(entries: Sequence[Struct], changed: Mapping[bytes, bytes | None]) -> list[Struct]:
    """Key-value metadata with some entries changed in their place, added behind, or left out."""
    left = dict(changed)
    found = []
    for entry in entries:
        key = entry[1][1]
        if key not in changed:
            found.append(entry)
        elif (value := left.pop(key, None)) is not None:
            found.append({1: (BINARY, key), 2: (BINARY, value)})
    return found + [{1: (BINARY, k), 2: (BINARY, v)} for k, v in left.items() if v is not None]
