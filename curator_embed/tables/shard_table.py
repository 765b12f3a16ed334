"""``ShardTable``: one shard's parquet, opened, judged and written; the only way to any of the three.

Runs, exports and assigned columns all come here, so that what one of them leaves is what the others expect.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curator_embed.errors import SourceError
from curator_embed.sources.shard import Shard
from curator_embed.storage.files import fingerprint, redact
from curator_embed.storage.location import Location, Token
from curator_embed.tables.conflicts import Conflict, ConflictKind
from curator_embed.tables.judge import Asked, Facts, Judgement, Stored, judge_in_place, judge_output, same_mark
from curator_embed.tables.pairing import ids_as_text, ids_digest
from curator_embed.tables.provenance import ERROR_COLUMN, Footer
from curator_embed.tables.rewriting import LEAVE_OUT, faithful
from curator_embed.tables.writing import TablePlan, TargetChanged, write_table


@dataclass(frozen=True)
class Ids:
    """The ids of a table's rows.

    Attributes:
        type: of the column; None where there is no table.
        text: the text under which each is compared; None for null.
        digest: of these, in their order.
        errors: the column ``image_error``, where it was asked for.
    """

    type: pa.DataType | None
    text: list[str | None]
    digest: str
    errors: pa.ChunkedArray | None = None


NO_IDS = Ids(None, [], "")


class ShardTable:
    """One parquet file as it was when it was opened: its footer, until rows are asked for.

    Attributes:
        url: as it was named.
        location: the file.
        token: what changes when it is replaced; None when there was no file.
        stored: what its footer shows.
    """

    def __init__(self, url: str, location: Location, token: Token | None, stored: Stored) -> None:
        self.url, self.location, self.token, self.stored = url, location, token, stored

    @classmethod
    def open(cls, url: str, storage_options: Mapping[str, Any] | None = None, *, marked: bool = False) -> ShardTable:
        """Read a file's footer. One that is not there has no schema, one that cannot be read says why (``damaged``).

        Args:
            marked: ask for the file's ``mark`` as well, by which an output knows its input again.
        """
        location = Location.of(url, storage_options)
        path, token = redact(url), location.token()
        if token is None:
            return cls(url, location, None, Stored(path))
        try:
            with location.open_parquet() as parquet:
                schema = parquet.schema_arrow
                rows, mark = parquet.metadata.num_rows, _mark(url, storage_options) if marked else None
                stored = Stored(path, schema, rows, Footer.of(schema), mark=mark)
        except FileNotFoundError:
            return cls(url, location, None, Stored(path))
        except SourceError as error:
            stored = Stored(path, damaged=error.problem)
        return cls(url, location, token, stored)

    @property
    def exists(self) -> bool:
        """Whether there is a file that can be read."""
        return self.stored.schema is not None

    @property
    def footer(self) -> Footer:
        """Our entry in it; an empty one where there is none."""
        return self.stored.footer

    @contextmanager
    def reading(self) -> Iterator[pq.ParquetFile]:
        """Open the rows.

        Raises:
            SourceError: the file is not the one whose footer was read.
        """
        with self.location.open_parquet() as parquet:
            if self.location.token() != self.token:
                raise TargetChanged(self.stored.path)
            yield parquet

    def ids(self, id_col: str, *, errors: bool = False) -> Ids:
        """Read the ids of all rows.

        Args:
            errors: read the reason codes as well.

        Raises:
            SourceError: the file cannot be read, has changed, or has no such column.
        """
        with self.reading() as parquet:
            names = parquet.schema_arrow.names
            if names.count(id_col) != 1:
                problem = f"has {names.count(id_col) or 'no'} column{'s'[: names.count(id_col)]} named '{id_col}'"
                raise SourceError(
                    self.stored.path,
                    problem,
                    f"Choose the id column with id_col= (it has: {', '.join(names[:12])})",
                )
            table = parquet.read(columns=[id_col, *([ERROR_COLUMN] if errors else [])], use_threads=False)
        column = table.column(id_col)
        text = ids_as_text(column)
        return Ids(column.type, text, ids_digest(text), table.column(ERROR_COLUMN) if errors else None)

    def null_rows(self, columns: Sequence[str], rows: Sequence[int]) -> set[int]:
        """Those of some rows in which a column is null; only row groups that have such rows are read.

        Args:
            rows: positions, ascending.
        """
        found: set[int] = set()
        with self.reading() as parquet:
            start = 0
            for group in range(parquet.num_row_groups):
                stop = start + parquet.metadata.row_group(group).num_rows
                here = [row for row in rows if start <= row < stop]
                if here and columns:
                    table = parquet.read_row_group(group, columns=list(columns))
                    for column in table.columns:
                        null = np.asarray(column.is_null())
                        found |= {row for row in here if null[row - start]}
                start = stop
        return found

    def counts(self) -> dict[str, Any]:
        """Rows by what became of them: as the footer has it, or counted where it does not say.

        Raises:
            SourceError: the rows cannot be read.
        """
        if self.footer.counts:
            return self.footer.counts
        if self.stored.schema is None:
            return {}
        reasons: dict[str, int] = {}
        rows = self.stored.rows or 0
        if self.stored.schema.names.count(ERROR_COLUMN) == 1:
            with self.reading() as parquet:
                counted = parquet.read(columns=[ERROR_COLUMN]).column(0).drop_null().value_counts()
            reasons = {str(item["values"]): int(item["counts"]) for item in counted.to_pylist()}
        no_image = reasons.pop("no_image", 0)
        failed = sum(reasons.values())
        return {
            "read": rows,
            "embedded": rows - failed - no_image,
            "failed": failed,
            "no_image": no_image,
            "reasons": dict(sorted(reasons.items())),
        }

    def unfaithful(self, columns: Collection[str] | None = None, *, other_rows: bool = False) -> Conflict | None:
        """What stands in the way of writing the file's columns back as they are; None where nothing does.

        Args:
            columns: those that are written back; None for all, as in place.
            other_rows: whether rows are left out or added.
        """
        why = faithful(self.location, columns, other_rows=other_rows) if self.exists else ""
        return Conflict(ConflictKind.UNFAITHFUL, self.stored.path, why, LEAVE_OUT) if why else None

    def write(self, plan: TablePlan, *, from_table: ShardTable | None = None) -> int:
        """Put a new version in this file's place, whole or not at all.

        Args:
            from_table: the table that the rows come from, where that is another file: it must be the one that was read.

        Returns:
            Rows written.

        Raises:
            TargetChanged: this file, or the one the rows come from, is no longer the one that was opened.
        """
        if from_table is not None and from_table.location.token() != from_table.token:
            raise TargetChanged(from_table.stored.path)
        return write_table(
            plan, self.location, self.token, source_token=None if from_table is None else from_table.token
        )

    def same_file(self, other: ShardTable) -> bool:
        """Whether both are one file."""
        if self.location.is_local and other.location.is_local:
            # The inode comes first in a token: most files are told apart without following their paths.
            if self.token is not None and other.token is not None and self.token[0] != other.token[0]:
                return False
            return os.path.realpath(self.location.path) == os.path.realpath(other.location.path)
        return type(self.location.fs) is type(other.location.fs) and self.location.path == other.location.path


def _mark(url: str, storage_options: Mapping[str, Any] | None) -> dict[str, Any] | None:
    with suppress(SourceError):
        return fingerprint(url, storage_options)
    return None


@dataclass(frozen=True)
class Seen:
    """What lies on disk for one shard: read once, judged as often as needed.

    Attributes:
        target: the file that would be written.
        table: the table that a new output starts from; None in place, and where there is none.
        facts: what its columns would be made from.
        own: whether both are one file.
        ids: digest of the table's ids, where it has changed since the output was made from it.
    """

    target: ShardTable
    table: ShardTable | None
    facts: Facts
    own: bool = False
    ids: str = ""

    def judge(self, asked: Asked, ids: str = "") -> Judgement:
        """What the shard needs; reads nothing.

        Args:
            ids: digest of the ids of the rows that would be carried over, where they were read.
        """
        facts = replace(self.facts, ids=ids) if ids else self.facts
        if not asked.output:
            return judge_in_place(self.target.stored, asked, facts)
        table = None if self.table is None else self.table.stored
        return judge_output(self.target.stored, table, asked, facts, own=self.own, ids=self.ids)

    @property
    def carried(self) -> ShardTable | None:
        """The file whose columns are kept: the output that is there, else the table that it starts from."""
        return self.target if self.target.exists else self.table

    def whole(self, storage_options: Mapping[str, Any] | None = None) -> Seen:
        """The same with the footer of the table, where only its mark was looked at."""
        if self.table is None or self.table.exists or self.table.stored.damaged:
            return self
        return replace(self, table=ShardTable.open(self.table.url, storage_options, marked=True))


def facts_of(shard: Shard, id_col: str, uncounted: frozenset[str] = frozenset()) -> Facts:
    """What a shard's columns would be made from, as it is now; reads no rows and no images.

    Args:
        uncounted: recipe fields that do not count for this shard.
    """
    samples = shard.fingerprint()
    return Facts(
        samples,
        shard.pairing(id_col),
        changed=lambda recorded: shard.samples_changed(recorded, samples),
        images=shard.image_source() is not None,
        uncounted=uncounted,
    )


def look(
    shard: Shard,
    target: str,
    *,
    in_place: bool,
    id_col: str,
    storage_options: Mapping[str, Any] | None = None,
    uncounted: frozenset[str] = frozenset(),
) -> Seen:
    """Read a shard's footers. The footer of the table that an output was made from is read only where size and mtime
    (or etag) do not say that it is the same; its ids are read where they say that it is not.

    Args:
        target: where the shard's columns go.
        uncounted: recipe fields that do not count for this shard.
    """
    facts = facts_of(shard, id_col, uncounted)
    there = ShardTable.open(target, storage_options)
    path = shard.table_path()
    if in_place or path is None:
        return Seen(there, None, facts)
    made_from, mark = there.footer.table, _mark(path, storage_options)
    if made_from.get("rows") is not None and mark is not None and same_mark(made_from, mark):
        # The very table that the output was made from: its rows are known.
        location = Location.of(path, storage_options)
        known = Stored(redact(path), rows=made_from["rows"], mark=mark)
        table = ShardTable(path, location, location.token(), known)
        return Seen(there, table, facts, there.same_file(table))
    table = ShardTable.open(path, storage_options, marked=True)
    ids = ""
    if made_from.get("ids") and table.exists and table.stored.rows == made_from.get("rows"):
        with suppress(SourceError):
            ids = table.ids(id_col).digest
    return Seen(there, table, facts, there.same_file(table), ids)
