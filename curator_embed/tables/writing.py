"""Writing one shard's parquet: whole or not at all.

pyarrow writes on every path, CPU or GPU, so that schema, order and footer are always ours. Row
groups are copied one at a time: memory does not grow with the table.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curator_embed.errors import SourceError
from curator_embed.storage.location import Location, Token
from curator_embed.tables.failpoints import failpoint
from curator_embed.tables.provenance import FOOTER_KEY, Footer
from curator_embed.tables.rewriting import PIECE_ROWS, Rewriting, encoding_options

ROW_GROUP_ROWS = PIECE_ROWS
"""Rows a row group holds where there is no input table whose row groups to follow."""


class TargetChanged(SourceError):
    """The file to be replaced is no longer the one that was read."""

    def __init__(self, path: str) -> None:
        super().__init__(
            path, "the file was changed by someone else during the run", "It was left as it is; run again to use it"
        )


@contextmanager
def replacing(target: Location, expected: Token | None, *, check: bool = True) -> Iterator[IO[bytes]]:
    """Open a new version of ``target`` that takes its place when the block ends without an error.

    On a local disk: a temporary name in the same folder that no ``*.parquet`` glob matches, synced,
    then renamed. Mode, owner, group and extended attributes (ACLs among them) stay, as far as whoever runs this may
    set them, and of a link the file it leads to is replaced. On an object store: collected in the system's folder for
    temporary files, put in one piece.

    Args:
        expected: ``target.token()`` when it was read; a file that differs at the end is not replaced.
        check: False where any version may be replaced.
    """
    if target.is_local:
        path = os.path.realpath(target.path)
        temporary = f"{path}.tmp-{os.getpid()}-{secrets.token_hex(4)}"
        try:
            with open(temporary, "wb") as file:
                _be_like(path, file.fileno())
                failpoint("output.temporary_opened")
                yield file
                file.flush()
                os.fsync(file.fileno())
            failpoint("output.temporary_written")
            if check and target.token() != expected:
                raise TargetChanged(target.path)
            os.replace(temporary, path)
        except BaseException as error:
            with suppress(OSError):
                os.unlink(temporary)
            raise _explained(error, target) or error from None
    else:
        try:
            with tempfile.NamedTemporaryFile(prefix="curator-embed-") as collected:
                failpoint("output.temporary_opened")
                yield collected.file
                collected.flush()
                failpoint("output.temporary_written")
                if check and target.token() != expected:
                    raise TargetChanged(target.path)
                target.fs.put_file(collected.name, target.path)
        except OSError as error:
            raise _explained(error, target, tempfile.gettempdir()) or error from None
    failpoint("output.replaced")


def _be_like(path: str, descriptor: int) -> None:
    """Give a new file the owner, group, mode and extended attributes of the one it will replace, where it can be."""
    try:
        there = os.stat(path)
    except OSError:  # there is no file yet
        return
    for owner, group in ((there.st_uid, -1), (-1, there.st_gid)):
        with suppress(OSError):  # only root gives files away, and others only to groups they are in
            os.fchown(descriptor, owner, group)
    with suppress(OSError):  # its disk knows no permissions
        os.fchmod(descriptor, stat.S_IMODE(there.st_mode))
    if sys.platform != "linux":
        return
    with suppress(OSError):
        for name in os.listxattr(path):
            with suppress(OSError):  # one that only the system sets
                os.setxattr(descriptor, name, os.getxattr(path, name))


def _explained(error: BaseException, target: Location, folder: str = "") -> SourceError | None:
    """Turn the operating system's word into a message that names the file and the remedy.

    Args:
        folder: where it was written to, when that is not the file's own.
    """
    if not isinstance(error, OSError):
        return None
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        there = f"the disk of {folder}, where it is collected, is full" if folder else "the disk is full"
        return SourceError(
            target.path,
            f"{there}; nothing of this file was left behind",
            "Free some space and run the same command again: finished shards are kept"
            + (" (TMPDIR names another folder)" if folder else ""),
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and not folder:
        return SourceError(
            target.path, "its folder cannot be written to", "Choose another output path or change the permissions"
        )
    return None


def clear_temporaries(folder: Location, stems: Collection[str] | None = None) -> int:
    """Remove what killed runs left behind in a local output folder; returns how many files.

    Only for who holds the folder's lock and has no tasks under way: a process number in a name says nothing
    where all runs have the same, as in containers.

    Args:
        stems: of these outputs only, where other runs are writing others; None for all.
    """
    if not folder.is_local or not os.path.isdir(folder.path):
        return 0
    removed = 0
    for entry in os.scandir(folder.path):
        name, marker, owner = entry.name.rpartition(".tmp-")
        stem, kind = os.path.splitext(name)
        if not marker or kind not in (".parquet", ".tar") or (stems is not None and stem not in stems):
            continue
        if entry.is_file(follow_symlinks=False) and owner.partition("-")[0].isdigit():
            with suppress(FileNotFoundError):  # a worker whose driver died finishes what it has
                os.unlink(entry.path)
                removed += 1
    return removed


def takes_no_nulls(schema: pa.Schema, id_col: str, written: Collection[str] | None = None) -> str:
    """The first column that must have a value in each row; empty when rows can be added that have an id alone.

    Args:
        written: the columns that are written; None for all.
    """
    others = (item for item in schema if item.name != id_col and (written is None or item.name in written))
    return next((str(item.name) for item in others if not item.nullable or _unreadable_null(item.type)), "")


def _unreadable_null(kind: pa.DataType) -> bool:
    """Whether pyarrow cannot read a null back: of a struct with a list of fixed size in it (still so in 26)."""
    below = [item.type for item in kind] if pa.types.is_struct(kind) else []
    return any(pa.types.is_fixed_size_list(one) or _unreadable_null(one) for one in below)


Slice = Callable[[np.ndarray], pa.Array]
"""Values of a new column for some rows: int64 row positions -> an array of as many values."""


@dataclass(frozen=True)
class NewColumn:
    """A column to be added, computed a row group at a time."""

    type: pa.DataType
    values: Slice


@dataclass(frozen=True)
class TablePlan:
    """The output table of one shard, as a recipe for ``write_table``.

    Attributes:
        source: where the existing columns come from, or None.
        in_memory: the existing columns of a shard that has no parquet of its own.
        keep: int64 positions of the source's rows that are written, in their order.
        appended: the existing columns of rows added behind them, for samples that no row knows, or None.
        appended_rows: int64 positions by which the new columns know those rows.
        columns: the new columns, by row position.
        selected: names of the source's columns to copy; None for all.
    """

    source: Location | None
    in_memory: pa.Table | None
    keep: np.ndarray
    appended: pa.Table | None
    appended_rows: np.ndarray
    columns: dict[str, NewColumn]
    footer: Footer
    selected: list[str] | None = None


def write_table(
    plan: TablePlan,
    target: Location,
    expected: Token | None,
    *,
    check: bool = True,
    source_token: Token | None = None,
) -> int:
    """Write one shard's output atomically. Returns the number of rows.

    Args:
        expected: the version of the target that may be replaced; None for no file.
        check: False where any version may be.
        source_token: the version of the plan's source that must still be there when all is written; None for any.
    """
    if target.is_local:
        try:
            os.makedirs(target.parent, exist_ok=True)
        except OSError as error:
            raise _explained(error, target) or error from None
    with ExitStack() as stack:
        if plan.source is not None:
            parquet, raw = (
                stack.enter_context(plan.source.open_parquet()),
                stack.enter_context(plan.source.open_bytes()),
            )
            written = Rewriting(
                plan, parquet, raw, stack.enter_context(replacing(target, expected, check=check))
            ).write()
            if source_token is not None and plan.source.token() != source_token:
                raise TargetChanged(plan.source.path)
            return written
        schema, tables = stack.enter_context(_output(plan))
        file = stack.enter_context(replacing(target, expected, check=check))
        written = 0
        with pq.ParquetWriter(file, schema, **encoding_options(schema)) as writer:
            for table in tables:
                writer.write_table(table)
                written += table.num_rows
        return written


def collect_table(plan: TablePlan) -> pa.Table:
    """The table that ``write_table`` would write, in memory."""
    with _output(plan) as (schema, tables):
        return pa.Table.from_batches([batch for table in tables for batch in table.to_batches()], schema=schema)


@contextmanager
def _output(plan: TablePlan) -> Iterator[tuple[pa.Schema, Iterator[pa.Table]]]:
    """The output's schema and its rows, a row group at a time."""
    with _pieces(plan) as (schema, pieces):
        kept = [f for f in schema if f.name in plan.columns or plan.selected is None or f.name in plan.selected]
        # A column that is made anew keeps its place; new ones come behind.
        fields = [pa.field(f.name, plan.columns[f.name].type) if f.name in plan.columns else f for f in kept]
        fields += [pa.field(name, new.type) for name, new in plan.columns.items() if name not in schema.names]
        out = pa.schema(fields, metadata={**(schema.metadata or {}), FOOTER_KEY: plan.footer.to_bytes()})

        # Names may repeat: a column is known by its name and by how many of that name come before it.
        before = [sum(earlier.name == item.name for earlier in fields[:number]) for number, item in enumerate(fields)]

        def column(number: int, rows: np.ndarray, table: pa.Table) -> pa.ChunkedArray:
            name, kind = fields[number].name, fields[number].type
            if name not in plan.columns:
                return table.column(table.schema.get_all_field_indices(name)[before[number]])
            # In chunks: the offsets of a list column have 32 bits, and a row group may have any number of rows.
            starts = range(0, len(rows), ROW_GROUP_ROWS)
            chunks = [plan.columns[name].values(rows[start : start + ROW_GROUP_ROWS]) for start in starts]
            return pa.chunked_array(chunks, kind)

        def tables() -> Iterator[pa.Table]:
            for rows, table in pieces:
                yield pa.Table.from_arrays([column(number, rows, table) for number in range(len(fields))], schema=out)

        yield out, tables()


@contextmanager
def _pieces(plan: TablePlan) -> Iterator[tuple[pa.Schema, Iterator[tuple[np.ndarray, pa.Table]]]]:
    """The existing columns, a row group at a time, with the positions of their rows."""

    def kept(start: int, table: pa.Table) -> tuple[np.ndarray, pa.Table] | None:
        low, high = np.searchsorted(plan.keep, [start, start + table.num_rows])
        rows = plan.keep[low:high]
        if len(rows) == 0:
            return None
        return rows, table if len(rows) == table.num_rows else table.take(pa.array(rows - start))

    def behind() -> Iterator[tuple[np.ndarray, pa.Table]]:
        if plan.appended is not None:
            yield plan.appended_rows, plan.appended

    if plan.source is None:
        table = plan.in_memory if plan.in_memory is not None else pa.table({})

        def from_memory() -> Iterator[tuple[np.ndarray, pa.Table]]:
            for start in range(0, table.num_rows, ROW_GROUP_ROWS):
                piece = kept(start, table.slice(start, ROW_GROUP_ROWS))
                if piece is not None:
                    yield piece
            yield from behind()

        yield table.schema, from_memory()
        return
    with plan.source.open_parquet() as parquet:
        names = [n for n in parquet.schema_arrow.names if plan.selected is None or n in plan.selected]

        def from_file() -> Iterator[tuple[np.ndarray, pa.Table]]:
            start = 0
            for group in range(parquet.num_row_groups):
                table = parquet.read_row_group(group, columns=names)
                piece = kept(start, table)
                start += table.num_rows
                if piece is not None:
                    yield piece
            yield from behind()

        yield parquet.schema_arrow, from_file()


def vectors_to_list_array(vectors: np.ndarray, present: np.ndarray, value_type: pa.DataType) -> pa.Array:
    """Build a ``list<float>`` column: row i is ``vectors[i]`` where present, else null.

    Args:
        vectors: (n, dim); rows that are not present are ignored.
        present: bool (n,).
    """
    dim = vectors.shape[1] if vectors.ndim == 2 else 0
    offsets = np.concatenate([[0], np.cumsum(np.where(present, dim, 0))]).astype(np.int32)
    values = pa.array(np.ascontiguousarray(vectors[present]).reshape(-1), type=value_type)
    return pa.ListArray.from_arrays(pa.array(offsets), values, mask=pa.array(~present))
