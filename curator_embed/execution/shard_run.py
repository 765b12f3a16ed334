"""One shard's run: read, feed the pipeline, pair by id, write. The place where rows are counted.

``ShardJob`` is what a worker needs to know; ``begin`` reads a shard and feeds the pipeline,
``finish`` waits for the values and writes the file. Between the two, other shards may begin.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from curator_embed.errors import Reason, SourceError, UsageError
from curator_embed.execution.failpoints import failpoint
from curator_embed.execution.output import (
    Location,
    NewColumn,
    TablePlan,
    TargetChanged,
    Token,
    collect_table,
    vectors_to_list_array,
    write_table,
)
from curator_embed.execution.pairing import (
    Pairing,
    ids_as_text,
    ids_digest,
    key_normaliser,
    normalise_key,
    pair,
)
from curator_embed.execution.pipeline import OpenShard, Pipeline
from curator_embed.execution.provenance import ERROR_COLUMN, Footer, Status, counted, same_samples, status
from curator_embed.sources.files import fingerprint, redact
from curator_embed.sources.shard import Note, Sample, Shard
from curator_embed.steps import BatchStep, Step

OnError = Literal["keep", "drop", "raise"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardJob:
    """What a run does to every shard. Picklable, small, the same for all workers.

    Attributes:
        steps: settled steps, in the order their columns are written.
        id_col: the dataset's id column.
        output: folder of a new dataset, or None to add columns in place.
        select: the input's columns a new dataset gets (None: all).
        on_error: what happens to rows without an embedding.
        overwrite: replace columns that came from elsewhere or were made another way.
        engine: which decode engine ("cpu": Pillow; "dali": DALI, on ``device``).
        device: where the models run, as torch names it.
        decode_threads: decode threads a worker.
        model_threads: the forward pass's own threads on a CPU.
        storage_options: for fsspec.
        must_see: files on local disks that a worker must find at these paths, or it is on another disk.
        not_needed: positions of steps whose columns every shard has already; their models are not loaded.
    """

    steps: tuple[Step, ...]
    id_col: str
    output: str | None
    select: tuple[str, ...] | None = None
    on_error: OnError = "keep"
    overwrite: bool = False
    engine: str = "cpu"
    device: str = "cpu"
    decode_threads: int = 4
    model_threads: int | None = None
    storage_options: Mapping[str, Any] = field(default_factory=dict)
    must_see: tuple[str, ...] = ()
    not_needed: frozenset[int] = frozenset()

    @cached_property
    def recipes(self) -> tuple[dict[str, Any], ...]:
        """What counts of the steps' recipes; asking a step costs more than reading a footer."""
        return tuple(counted(step.recipe()) for step in self.steps)

    def target(self, shard: Shard) -> str:
        """Where the shard's parquet goes."""
        if self.output is not None:
            return f"{self.output.rstrip('/')}/{shard.name}.parquet"
        table = shard.table_path()
        if table is not None:
            return table
        own = shard.own_table()
        if own is None:
            raise UsageError(f"shard {shard.name} has no table to add columns to; give an output path")
        return own

    def output_options(self, limit: int | None = None) -> dict[str, Any]:
        """How rows and columns were chosen, for the footer: it tells apart outputs of different runs."""
        if self.output is None:
            return {}
        options: dict[str, Any] = {"on_error": "drop" if self.on_error == "drop" else "keep"}
        if self.select is not None:
            options["columns"] = list(self.select)
        if limit is not None:
            options["limit"] = limit
        return options


@dataclass
class ShardReport:
    """What became of one shard's rows; sums up to the run's report."""

    shard: str
    read: int = 0
    embedded: int = 0
    failed: int = 0
    no_image: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    skipped: bool = False
    images_without_row: int = 0
    notes: list[Note] = field(default_factory=list)
    examples: list[tuple[str, str]] = field(default_factory=list)
    exceptions: list[str] = field(default_factory=list)
    decoders: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    queues: dict[str, dict[str, float]] = field(default_factory=dict)
    fault: str = ""

    @classmethod
    def of_finished(cls, shard: str, footer: Footer) -> ShardReport:
        """The report of a shard that an earlier run finished, from its footer."""
        counts = footer.counts
        report = cls(shard, skipped=True, reasons=dict(counts.get("reasons", {})))
        report.read, report.embedded = counts.get("read", 0), counts.get("embedded", 0)
        report.failed, report.no_image = counts.get("failed", 0), counts.get("no_image", 0)
        return report

    def counts(self) -> dict[str, Any]:
        """The part that is stored in the footer, so that a resumed run can account for this shard."""
        return {
            "read": self.read,
            "embedded": self.embedded,
            "failed": self.failed,
            "no_image": self.no_image,
            "reasons": dict(sorted(self.reasons.items())),
        }


class FailedRows(UsageError):
    """``on_error="raise"`` met rows that failed; the shard was not written."""


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
        if made_from and made_from == {"rows": made_from.get("rows"), **(_stored(path, job) or {})}:
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
        if not footer.output:
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


def _stored(path: str, job: ShardJob) -> dict[str, Any] | None:
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


@dataclass
class _Table:
    """A shard's existing rows, without holding more than their ids."""

    location: Location | None
    token: Token | None
    schema: pa.Schema | None
    id_type: pa.DataType | None
    ids: list[str | None]
    errors: pa.ChunkedArray | None


class ShardRun:
    """One shard between ``begin`` and ``finish``."""

    def __init__(self, job: ShardJob, shard: Shard, pipeline: Pipeline, limit: int | None = None) -> None:
        self.job, self.shard, self.pipeline, self.limit = job, shard, pipeline, limit
        self.report = ShardReport(shard.name)
        self.keys: list[str] = []
        self.source_errors: dict[int, Reason] = {}
        self.has_image: list[bool] = []
        self.kept_samples: list[Sample] = []
        self._stack = ExitStack()
        self.opened: OpenShard | None = None

    # -- begin ---------------------------------------------------------------------------

    def begin(self) -> bool:
        """Read the shard into the pipeline. Returns False when it is already done."""
        self.target = Location.of(self.job.target(self.shard), self.job.storage_options)
        self.target_token = self.target.token()
        if self.job.output is None and self.shard.table_path() is None and self.target_token is not None:
            # A table has come to lie beside the images since the dataset was opened: its rows are the rows.
            self.shard = self.shard.with_table(self.job.target(self.shard))
        found = survey(self.job, self.shard, self.limit)
        if found.conflict:
            raise UsageError(f"{self.job.target(self.shard)}: {found.conflict}")
        if found.done:
            self.report = ShardReport.of_finished(self.shard.name, found.footer)
            return False
        self.todo, self.footer = found.todo, found.footer
        if lacking := self.job.not_needed & set(self.todo):
            columns = ", ".join(name for position in sorted(lacking) for name in self.job.steps[position].columns())
            raise SourceError(
                self.job.target(self.shard), f"has lost {columns} since the run began", "Run again to make it anew"
            )
        failpoint("shard.started")
        self.fingerprint = self.shard.fingerprint()
        self.table = self._read_ids()
        self.numeric = key_normaliser(self.table.id_type)
        self.opened = self._stack.enter_context(
            self.pipeline.shard([p for p in self.todo if not _reads_itself(self.job.steps[p])])
        )
        try:
            self._feed(self.opened)
        except BaseException:
            self.abandon()
            raise
        failpoint("shard.read")
        return True

    def _read_ids(self) -> _Table:
        path = self.shard.table_path()
        if path is None:
            return _Table(None, None, None, None, [], None)
        location = Location.of(path, self.job.storage_options)
        token = location.token()
        with location.open_parquet() as parquet:
            schema = parquet.schema_arrow
            if self.job.id_col not in schema.names:
                raise SourceError(
                    path,
                    f"has no column '{self.job.id_col}'",
                    f"Choose the id column with id_col= (it has: {', '.join(schema.names[:12])})",
                )
            if schema.names.count(self.job.id_col) > 1:
                raise SourceError(
                    path,
                    f"has {schema.names.count(self.job.id_col)} columns named '{self.job.id_col}'",
                    "Rename all but one of them, or choose another id column with id_col=",
                )
            ours = ERROR_COLUMN in schema.names and self._old_codes_hold(Footer.of(schema))
            columns = [self.job.id_col, *([ERROR_COLUMN] if ours else [])]
            table = parquet.read(columns=columns, use_threads=False)
        column = table.column(self.job.id_col)
        errors = table.column(ERROR_COLUMN) if ours else None
        return _Table(location, token, schema, column.type, ids_as_text(column), errors)

    def _old_codes_hold(self, footer: Footer) -> bool:
        """Whether an earlier run's reason codes are still true: of these images, for columns that stay."""
        codes = footer.columns.get(ERROR_COLUMN)
        if codes is None or not same_samples(codes.get("samples", {}), self.fingerprint):
            return False
        made_anew = {name for position in self.todo for name in self.job.steps[position].columns()}
        return bool(footer.columns.keys() - made_anew - {ERROR_COLUMN})

    def _feed(self, opened: OpenShard) -> None:
        """Read every sample once; hand in the images whose values somebody will get."""
        wanted: set[str | None] | None = None
        if self.table.location is not None and (self.job.output is None or self.limit is not None):
            wanted = set(self.table.ids[: self.limit])
        need_extras = self.table.location is None
        needs_images = bool(self.todo) and not all(_reads_itself(self.job.steps[p]) for p in self.todo)
        clock = self.pipeline.clock
        with self.pipeline.feeding():
            samples = self.shard.samples(id_col=self.job.id_col, extras=need_extras)
            while True:
                start = time.perf_counter()
                sample = next(samples, None)
                clock.add("read", time.perf_counter() - start)
                if sample is None:
                    break
                ordinal = len(self.keys)
                if need_extras and self.limit is not None and ordinal >= self.limit:
                    break
                key = normalise_key(sample.key, self.numeric)
                self.keys.append(key)
                self.has_image.append(sample.image is not None or sample.error is not None)
                if need_extras:
                    self.kept_samples.append(Sample(sample.key, None, sample.error, sample.detail, sample.extras))
                if sample.error is not None:
                    self.source_errors[ordinal] = sample.error
                elif sample.image is not None and needs_images and (wanted is None or key in wanted):
                    opened.submit(ordinal, sample.image)
        self.report.notes += self.shard.notes()

    # -- finish --------------------------------------------------------------------------

    def finish(self) -> ShardReport:
        """Wait for the values, pair them with the rows, write the file.

        Raises:
            TargetChanged: the file was replaced meanwhile, and not by who made the same of the same shard.
        """
        assert self.opened is not None
        try:
            own = {p: self._run_own_reader(p) for p in self.todo if _reads_itself(self.job.steps[p])}
            self.opened.wait()
            failpoint("shard.embedded")
            with self.pipeline.clock.timing("write"):
                plan = self._plan(self.opened, own)
                table = self.table
                expected = table.token if self.job.output is None and table.location is not None else self.target_token
                write_table(plan, self.target, expected)
        except TargetChanged:
            # A run whose driver died may have workers that finish what they have, and Dask may run a task twice.
            found = survey(self.job, self.shard, self.limit)
            if not found.done:
                raise
            notes, self.report = self.report.notes, ShardReport.of_finished(self.shard.name, found.footer)
            self.report.notes = notes
        finally:
            self.abandon()
        failpoint("shard.finished")
        return self.report

    def collect(self) -> pa.Table:
        """As ``finish``, but returns the table instead of writing it."""
        assert self.opened is not None
        try:
            own = {p: self._run_own_reader(p) for p in self.todo if _reads_itself(self.job.steps[p])}
            self.opened.wait()
            return collect_table(self._plan(self.opened, own))
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Let go of the pipeline; values that are still on their way are dropped."""
        self._stack.close()

    def _run_own_reader(self, position: int) -> dict[str, list[np.ndarray]]:
        """Embeddings by id from an embedder that reads shards itself (``load_dataset_shard`` overridden)."""
        step: Any = self.job.steps[position]
        source = self.shard.image_source()
        found: dict[str, list[np.ndarray]] = {}
        if source is None:
            return found
        for ids, vectors in step.embed_shard(source, self.job.device, self.job.id_col):
            if len(ids) != len(vectors):
                raise UsageError(
                    f"{type(step).__name__} gave {len(vectors)} embeddings for {len(ids)} ids of {source}; "
                    "load_dataset_shard must yield as many ids as images"
                )
            for sample_id, vector in zip(ids, vectors, strict=True):
                found.setdefault(normalise_key(str(sample_id), self.numeric), []).append(vector)
        return found

    def _plan(self, opened: OpenShard, own: Mapping[int, dict[str, list[np.ndarray]]]) -> TablePlan:
        """Pair values with rows, count, and say what the output table is."""
        table, job = self.table, self.job
        if table.location is None:
            in_memory, row_ids = self._table_from_samples()
            nobody = np.zeros(len(row_ids), dtype=bool)
            pairing = Pairing(np.arange(len(row_ids)), nobody, np.empty(0, np.int64), {})
        else:
            in_memory, row_ids = None, table.ids
            pairing = pair(row_ids, self.keys)
            self._tell_about(pairing, row_ids)
            if self.limit is not None:  # pair all rows, so that repeated ids pair as ever, then cut
                row_ids = row_ids[: self.limit]
                pairing = replace(
                    pairing,
                    sample_of_row=pairing.sample_of_row[: self.limit],
                    ambiguous=pairing.ambiguous[: self.limit],
                )

        # Rows of the table first, then rows for images that no row knows.
        adds_rows = job.output is not None and self.limit is None
        orphans = pairing.orphans if adds_rows else np.empty(0, np.int64)
        self.report.images_without_row = len(pairing.orphans) if self.limit is None else 0
        sample_of_row = np.concatenate([pairing.sample_of_row, orphans])
        ambiguous = np.concatenate([pairing.ambiguous, np.zeros(len(orphans), dtype=bool)])

        errors = self._error_codes(opened, own, sample_of_row, ambiguous)
        if table.errors is not None:  # what an earlier run found holds for the columns it made
            old = table.errors.to_pylist() + [None] * len(orphans)
            errors = [code if code is not None else new for code, new in zip(old, errors, strict=False)]
        self._count(errors, row_ids, sample_of_row)
        self.report.decoders = dict(opened.decoders)
        if job.on_error == "raise" and self.report.failed:
            raise FailedRows(self._failure())
        keep = np.arange(len(sample_of_row))
        if job.on_error == "drop":
            keep = np.flatnonzero(np.array([code is None for code in errors], dtype=bool))
        first, added = keep[keep < len(row_ids)], keep[keep >= len(row_ids)]
        return TablePlan(
            source=table.location,
            in_memory=in_memory,
            keep=first,
            appended=self._rows_for_orphans(sample_of_row[added]) if len(added) else None,
            appended_rows=added,
            columns=self._columns(opened, own, sample_of_row, errors),
            footer=self._footer(row_ids),
            selected=self._selected(table.schema),
        )

    def _failure(self) -> str:
        key, reason = self.report.examples[0]
        where = self.shard.image_source() or self.shard.name
        return (
            f"{where}: {self.report.failed} of {self.report.read} rows failed, the first is '{key}': {reason}. This "
            "shard was not written; use on_error='keep' or on_error='drop' to go on without them"
        )

    def _selected(self, schema: pa.Schema | None) -> list[str] | None:
        if self.job.output is None:
            return None
        if self.job.select is None:
            held = self.shard.image_columns
            return [name for name in schema.names if name not in held] if schema is not None and held else None
        return [self.job.id_col, *self.job.select, *(name for step in self.job.steps for name in step.columns())]

    def _table_from_samples(self) -> tuple[pa.Table, list[str | None]]:
        """A shard without a parquet gets its table from what lies beside the images."""
        table = self.shard.table_from_extras(self.kept_samples)
        if table is None:
            table = pa.table({self.job.id_col: pa.array(self.keys, pa.string())})
        return table, list(self.keys)

    def _rows_for_orphans(self, orphans: np.ndarray) -> pa.Table:
        """Rows for images that no row knows: their id, and nulls."""
        assert self.table.schema is not None
        schema = self.table.schema
        keys = [self.keys[p] for p in orphans]
        columns = []
        for item in schema:
            if item.name == self.job.id_col:
                try:
                    columns.append(pa.array(keys, pa.string()).cast(item.type))
                except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
                    raise SourceError(
                        self.shard.image_source() or self.shard.name,
                        f"holds images whose keys ('{keys[0]}', ...) do not fit the id column's type {item.type}",
                        "Choose the id column that holds the keys, with id_col=",
                    ) from None
            else:
                columns.append(pa.nulls(len(keys), item.type))
        return pa.Table.from_arrays(columns, schema=schema)

    def _tell_about(self, pairing: Pairing, row_ids: Sequence[str | None]) -> None:
        path = self.shard.image_source() or self.shard.name
        if pairing.unequal:
            key, (rows, samples) = next(iter(pairing.unequal.items()))
            self._note(
                path,
                f"{len(pairing.unequal)} ids occur unequally often in table and images ('{key}': {rows} rows, "
                f"{samples} images); their rows carry '{Reason.AMBIGUOUS_ID}'",
            )
        if row_ids and self.keys and (pairing.sample_of_row < 0).all() and not pairing.unequal:
            self._note(
                path,
                f"no image has an id of the table's column '{self.job.id_col}' "
                f"(table: '{row_ids[0]}', images: '{self.keys[0]}'); choose another with id_col=",
            )
        if len(pairing.orphans) and self.limit is None:
            what = "left out: pass an output path to get rows for them" if self.job.output is None else "added as rows"
            self._note(path, f"{len(pairing.orphans)} images have no row in the table, {what}")

    def _note(self, path: str, message: str) -> None:
        self.report.notes.append(Note(self.shard.name, path, message))

    def _error_codes(
        self,
        opened: OpenShard,
        own: Mapping[int, dict[str, list[np.ndarray]]],
        sample_of_row: np.ndarray,
        ambiguous: np.ndarray,
    ) -> list[str | None]:
        """One code a row, None where all went well."""
        codes: list[str | None] = []
        for row, ordinal in enumerate(sample_of_row):
            code: str | None = None
            if ambiguous[row]:
                code = Reason.AMBIGUOUS_ID
            elif ordinal < 0 or not self.has_image[ordinal]:
                code = Reason.NO_IMAGE
            elif ordinal in self.source_errors:
                code = self.source_errors[ordinal]
            elif ordinal in opened.errors:
                code = opened.errors[ordinal]
            elif own and any(not found.get(self.keys[ordinal]) for found in own.values()):
                code = Reason.EMBED_ERROR
            codes.append(None if code is None else str(code))
        return codes

    def _count(self, errors: Sequence[str | None], row_ids: Sequence[str | None], sample_of_row: np.ndarray) -> None:
        report = self.report
        tally = Counter(code for code in errors if code is not None)
        report.read = len(errors)
        report.no_image = tally.pop(Reason.NO_IMAGE, 0)
        report.failed = sum(tally.values())
        report.embedded = report.read - report.no_image - report.failed
        report.reasons = {str(code): count for code, count in sorted(tally.items())}
        for row, code in enumerate(errors):
            if code is not None and code != Reason.NO_IMAGE and len(report.examples) < 5:
                key = row_ids[row] if row < len(row_ids) else self.keys[sample_of_row[row]]
                report.examples.append((str(key), code))

    def _columns(
        self,
        opened: OpenShard,
        own: Mapping[int, dict[str, list[np.ndarray]]],
        sample_of_row: np.ndarray,
        errors: list[str | None],
    ) -> dict[str, NewColumn]:
        columns: dict[str, NewColumn] = {}
        for position in self.todo:
            step = self.job.steps[position]
            for name, kind in step.columns().items():
                if position in own:
                    by_row = self._own_vectors(own[position], sample_of_row)
                    columns[name] = NewColumn(kind, _own_slice(by_row, kind))
                elif isinstance(step, BatchStep):
                    columns[name] = NewColumn(kind, _vector_slice(opened, position, sample_of_row, kind))
                else:
                    columns[name] = NewColumn(kind, _value_slice(opened, position, name, sample_of_row, kind))
        codes = pa.array(errors, pa.string())
        columns[ERROR_COLUMN] = NewColumn(pa.string(), lambda rows: codes.take(pa.array(rows)))
        return columns

    def _own_vectors(self, found: dict[str, list[np.ndarray]], sample_of_row: np.ndarray) -> list[np.ndarray | None]:
        taken: Counter[str] = Counter()
        by_row: list[np.ndarray | None] = []
        for ordinal in sample_of_row:
            if ordinal < 0:
                by_row.append(None)
                continue
            key = self.keys[ordinal]
            vectors, k = found.get(key, []), taken[key]
            by_row.append(vectors[k] if k < len(vectors) else None)
            taken[key] += 1
        return by_row

    def _footer(self, row_ids: Sequence[str | None]) -> Footer:
        samples = {**self.fingerprint, "ids": ids_digest(row_ids)}
        selected = self._selected(self.table.schema)
        columns = {n: made for n, made in self.footer.columns.items() if selected is None or n in selected}
        for position in self.todo:
            step = self.job.steps[position]
            recipe = dict(step.recipe())
            if isinstance(step, BatchStep) and position in self.pipeline.models:
                exceptions = self.pipeline.models[position].exceptions()
                self.report.exceptions += exceptions
                if exceptions:
                    recipe["exceptions"] = list(exceptions)
            for name in step.columns():
                columns[name] = {"recipe": recipe, "samples": samples}
        columns[ERROR_COLUMN] = {"recipe": {"step": "image_error"}, "samples": samples}
        table: dict[str, Any] = {}
        if self.job.output is not None and (path := self.shard.table_path()) is not None:
            table = {"rows": len(self.table.ids), **(_stored(path, self.job) or {})}
        return Footer(columns, self.report.counts(), self.job.output_options(self.limit), self.job.id_col, table)


def _reads_itself(step: Step) -> bool:
    return bool(getattr(step, "reads_own_shards", False))


def _vector_slice(opened: OpenShard, position: int, sample_of_row: np.ndarray, kind: pa.DataType) -> Any:
    def values(rows: np.ndarray) -> pa.Array:
        vectors, present = opened.vectors[position].gather(sample_of_row[rows])
        return vectors_to_list_array(vectors, present, kind.value_type)

    return values


def _own_slice(by_row: list[np.ndarray | None], kind: pa.DataType) -> Any:
    dtype = kind.value_type.to_pandas_dtype()

    def values(rows: np.ndarray) -> pa.Array:
        present = np.array([by_row[row] is not None for row in rows], dtype=bool)
        some = [np.asarray(by_row[row], dtype) for row in rows if by_row[row] is not None]
        vectors = np.zeros((len(rows), len(some[0]) if some else 0), dtype)
        if some:
            vectors[present] = np.stack(some)
        return vectors_to_list_array(vectors, present, kind.value_type)

    return values


def _value_slice(opened: OpenShard, position: int, name: str, sample_of_row: np.ndarray, kind: pa.DataType) -> Any:
    found = opened.values[position]

    def values(rows: np.ndarray) -> pa.Array:
        cells = (found.get(int(ordinal)) for ordinal in sample_of_row[rows])
        return pa.array([None if cell is None else cell.get(name) for cell in cells], kind)

    return values
