"""What a shard needs, from footers and file sizes alone: whether it is done, what must run, what stands in the way."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from curator_embed.errors import Reason, SourceError, UsageError
from curator_embed.execution.job import ShardJob
from curator_embed.sources.shard import Shard
from curator_embed.storage.files import fingerprint, redact
from curator_embed.storage.location import Location
from curator_embed.tables.provenance import ERROR_COLUMN, Footer, Status, status


@dataclass(frozen=True)
class Survey:
    """What footers alone say about a shard.

    Attributes:
        todo: positions of the steps that must run.
        done: the output is there and is what this run would write.
        conflict: why the output must not be written; empty when nothing stands in the way.
        footer: of the file whose columns are carried over (the output itself when done or in place).
        rows: rows of the finished output, or of the table that will be read; None when not known.
    """

    todo: tuple[int, ...]
    done: bool = False
    conflict: str = ""
    footer: Footer = field(default_factory=Footer)
    rows: int | None = None


@dataclass(frozen=True)
class Look:
    """What lies on disk for one shard, from footers and file sizes: read once, judged as often as needed.

    Attributes:
        fingerprint: of the samples.
        target: schema of the output file, None when there is none.
        target_rows: its rows.
        table, table_rows: the same of the table that a new output starts from; its schema is not read where
            size and mtime (or etag) say that the output was made from it.
        damaged: why the output file cannot be read, where there is one that cannot.
    """

    fingerprint: dict[str, Any]
    target: pa.Schema | None = None
    target_rows: int | None = None
    table: pa.Schema | None = None
    table_rows: int | None = None
    damaged: str = ""


def look(job: ShardJob, shard: Shard) -> Look:
    """Read a shard's footers. A table that cannot be read counts as absent: the run of the shard says why."""
    damaged = ""
    target: tuple[pa.Schema | None, int | None] = (None, None)
    try:
        target = _schema_and_rows(job.target(shard), job)
    except SourceError as error:
        damaged = str(error)
    table: tuple[pa.Schema | None, int | None] = (None, None)
    path = shard.table_path()
    if job.output is not None and path is not None:
        made_from = Footer.of(target[0]).table if target[0] is not None else {}
        if made_from and made_from == {"rows": made_from.get("rows"), **(table_fingerprint(path, job) or {})}:
            # The very table that the output was made from: its rows are known.
            table = None, made_from["rows"]
        else:
            table = _table_of(path, job)
    return Look(shard.fingerprint(), *target, *table, damaged)


def survey(job: ShardJob, shard: Shard, limit: int | None = None, seen: Look | None = None) -> Survey:
    """Decide from footers alone what a shard needs; reads no rows and no images."""
    seen = seen or look(job, shard)
    there = seen.target
    if job.output is None:
        found = _status(there, job, seen)
        conflict = found.conflict or _unusable(there, job, job.target(shard))
        footer = Footer() if there is None else Footer.of(there)
        if there is not None and not conflict and footer.counts.get("read", seen.target_rows) != seen.target_rows:
            # Somebody added or removed rows and kept our footer: all rows are worked on again.
            return Survey(tuple(range(len(job.steps))), False, "", footer, seen.target_rows)
        done = there is not None and not found.todo and not conflict
        return Survey(found.todo, done, conflict, footer, seen.target_rows)

    table = shard.table_path()
    if there is not None:
        footer, options = Footer.of(there), job.output_options(limit)
        found = _status(there, job, seen)
        written_from, now = footer.table.get("rows"), None if table is None else seen.table_rows
        # An output without a table behind it has the rows of its own that a table made since may have, too.
        same_rows = now == (footer.counts.get("read") if written_from is None and table is not None else written_from)
        # A limited run writes whole shards as any run does; only the last one is cut.
        whole = {name: value for name, value in options.items() if name != "limit"}
        finished = footer.output in (options, whole) and not found.todo and not found.conflict and same_rows
        if finished and not (job.overwrite and shard.by_position and _not_found(footer)):
            return Survey((), True, "", footer, seen.target_rows)
    if table is not None and _same_file(job.target(shard), table, job):
        return Survey(
            (), False, "is the dataset's own table; leave the output path out to add columns to it, or choose another"
        )
    if seen.damaged and not job.overwrite:
        return Survey((), False, f"cannot be read and would be replaced ({seen.damaged})")
    if there is not None and not job.overwrite and "limit" not in footer.output:
        if not footer.output and footer.columns:
            why = (
                f"{LACKS_COLUMNS} the note of how its rows were chosen: columns were added to it since, and "
                "overwriting would drop them. To go on, leave the output path out and name that folder as the one of "
                "the tables: "
                f"metadata_path='{redact(str(job.output))}'"
            )
        elif not footer.output:
            why = "the file is already there and is not an output of curator-embed"
        elif found.conflict:
            why = found.conflict
        elif footer.output != options:
            why = f"was written with other options ({footer.output} there, {options} now)"
        elif not same_rows:
            before, after = ("no table" if rows is None else f"a table of {rows} rows" for rows in (written_from, now))
            why = f"was written from {before}, and there is {after} now"
        else:
            why = (
                f"{LACKS_COLUMNS} the new columns. To add them, leave the output path out and name that folder as the "
                f"one of the tables: metadata_path='{redact(str(job.output))}'"
            )
        return Survey((), False, why, footer, seen.target_rows)

    if table is None:
        return Survey(tuple(range(len(job.steps))))
    source, rows = (seen.table, seen.table_rows) if seen.table is not None else _table_of(table, job)
    _check_selected(source, job, table)
    found = _status(source, job, seen)
    in_table = f"{found.conflict}, in the table {redact(table)}" if found.conflict else ""
    conflict = in_table or _unusable(source, job, table)
    # Columns that are already right in the input are copied, not computed again.
    return Survey(found.todo, False, conflict, Footer() if source is None else Footer.of(source), rows)


def _not_found(footer: Footer) -> bool:
    """Whether images were missing that may be there now: a list says where to look, and nobody looked again."""
    return bool({Reason.NOT_FOUND, Reason.READ_ERROR} & set(footer.counts.get("reasons", {})))


def _status(schema: pa.Schema | None, job: ShardJob, seen: Look) -> Status:
    return status(schema, job.steps, seen.fingerprint, overwrite=job.overwrite, recipes=job.recipes)


def _schema_and_rows(path: str, job: ShardJob) -> tuple[pa.Schema | None, int | None]:
    try:
        with Location.of(path, job.storage_options).open_parquet() as parquet:
            return parquet.schema_arrow, parquet.metadata.num_rows
    except FileNotFoundError:
        return None, None


def _table_of(path: str, job: ShardJob) -> tuple[pa.Schema | None, int | None]:
    with suppress(SourceError):
        return _schema_and_rows(path, job)
    return None, None


def table_fingerprint(path: str, job: ShardJob) -> dict[str, Any] | None:
    """Size and mtime, or etag, of a table; None where it cannot be read."""
    with suppress(SourceError):
        return fingerprint(path, job.storage_options)
    return None


def _same_file(one: str, other: str, job: ShardJob) -> bool:
    a, b = (Location.of(path, job.storage_options) for path in (one, other))
    if a.is_local and b.is_local:
        return os.path.realpath(a.path) == os.path.realpath(b.path)
    return type(a.fs) is type(b.fs) and a.path == b.path


LACKS_COLUMNS = "is already there, without"
"""Marks a conflict that overwriting would mend at the cost of the columns that are there."""

TO_PAIR_BY = "to pair rows and images by"
"""Marks a conflict that overwriting cannot mend."""


def _unusable(schema: pa.Schema | None, job: ShardJob, path: str) -> str:
    """Why a table cannot be worked on as asked; empty when it can."""
    if schema is None:
        return ""
    if job.id_col not in schema.names:
        there = ", ".join(schema.names[:12])
        return f"{path}: no column '{job.id_col}' {TO_PAIR_BY}; choose one with id_col= (it has: {there})"
    ours = Footer.of(schema).columns
    if job.steps and not job.overwrite and ERROR_COLUMN in schema.names and ERROR_COLUMN not in ours:
        return f"column '{ERROR_COLUMN}' is already there and does not say what made it"
    return ""


def _check_selected(schema: pa.Schema | None, job: ShardJob, path: str) -> None:
    if schema is None or job.select is None:
        return
    made = {ERROR_COLUMN, *(name for step in job.steps for name in step.columns())}
    missing = [name for name in job.select if name not in schema.names and name not in made]
    if missing:
        raise UsageError(
            f"columns= names {', '.join(missing)}: not in {path}, and made by no step (it has: "
            f"{', '.join(schema.names[:12])})"
        )
