"""One shard's run: read, feed the pipeline, pair by id, write. The place where rows are counted.

``begin`` reads a shard and feeds the pipeline, ``finish`` waits for the values and writes the file. Between the two,
other shards may begin.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from curator_embed.errors import Reason, SourceError, UsageError
from curator_embed.execution.job import FailedRows, ShardJob, ShardReport
from curator_embed.execution.survey import survey, table_fingerprint
from curator_embed.execution.values import embedded_values, image_values, own_values, unsound_ordinals, vector_dtype
from curator_embed.pipeline.pipeline import OpenShard, Pipeline
from curator_embed.sources.shard import Note, Sample, Shard
from curator_embed.steps import BatchStep, Step
from curator_embed.storage.location import Location, Token
from curator_embed.tables.failpoints import failpoint
from curator_embed.tables.pairing import (
    Pairing,
    ids_as_text,
    ids_digest,
    key_normaliser,
    normalise_key,
    pair,
)
from curator_embed.tables.provenance import ERROR_COLUMN, Footer, same_samples
from curator_embed.tables.writing import NewColumn, TablePlan, TargetChanged, collect_table, write_table

log = logging.getLogger(__name__)


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
            own = {p: self._run_own_reader(p, self.opened) for p in self.todo if _reads_itself(self.job.steps[p])}
            self.opened.wait()
            failpoint("shard.embedded")
            with self.pipeline.clock.timing("write"):
                plan = self._plan(self.opened, own)
                table = self.table
                expected = table.token if self.job.output is None and table.location is not None else self.target_token
                write_table(plan, self.target, expected)
        except TargetChanged:
            # A run whose driver died may have workers that finish what they have, and Dask may run a task twice.
            # Overwriting looks again for images that an earlier run did not find; this file was made just now.
            found = survey(replace(self.job, overwrite=False), self.shard, self.limit)
            if not found.done:
                raise
            mine, self.report = self.report, ShardReport.of_finished(self.shard.name, found.footer)
            self.report.notes, self.report.examples = mine.notes, mine.examples
            self.report.images_without_row = mine.images_without_row  # in no footer
        finally:
            self.abandon()
        failpoint("shard.finished")
        return self.report

    def collect(self) -> pa.Table:
        """As ``finish``, but returns the table instead of writing it."""
        assert self.opened is not None
        try:
            own = {p: self._run_own_reader(p, self.opened) for p in self.todo if _reads_itself(self.job.steps[p])}
            self.opened.wait()
            return collect_table(self._plan(self.opened, own))
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Let go of the pipeline; values that are still on their way are dropped."""
        self._stack.close()

    def _run_own_reader(self, position: int, opened: OpenShard) -> dict[str, list[np.ndarray]]:
        """Embeddings by id from an embedder that reads shards itself (``load_dataset_shard`` overridden).

        An id that it gives fewer times than there are samples of it is left out: which of them it means is not guessed.
        """
        step = self.job.steps[position]
        source = self.shard.image_source()
        found: dict[str, list[np.ndarray]] = {}
        if source is None or not isinstance(step, BatchStep):
            return found
        for ids, vectors in step.embed_shard(source, self.job.device, self.job.id_col):
            if len(ids) != len(vectors):
                raise UsageError(
                    f"{type(step).__name__} gave {len(vectors)} embeddings for {len(ids)} ids of {source}; "
                    "load_dataset_shard must yield as many ids as images"
                )
            with np.errstate(over="ignore"):  # what float16 cannot hold becomes infinite, and that is seen
                vectors = np.asarray(vectors, vector_dtype(step))
            for sample_id, vector in zip(ids, vectors, strict=True):
                found.setdefault(normalise_key(str(sample_id), self.numeric), []).append(vector)
        there = Counter(self.keys)
        found = {key: vectors for key, vectors in found.items() if len(vectors) >= there[key]}
        for ordinal in unsound_ordinals(found, self.keys):
            opened.errors.setdefault(ordinal, Reason.BAD_VECTOR)
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
                    columns[name] = NewColumn(kind, own_values(own[position], self.keys, sample_of_row, kind))
                elif isinstance(step, BatchStep):
                    columns[name] = NewColumn(kind, embedded_values(opened, position, sample_of_row, kind))
                else:
                    columns[name] = NewColumn(
                        kind, image_values(step, name, opened, position, sample_of_row, self.keys)
                    )
        codes = pa.array(errors, pa.string())
        columns[ERROR_COLUMN] = NewColumn(pa.string(), lambda rows: codes.take(pa.array(rows)))
        return columns

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
            table = {"rows": len(self.table.ids), **(table_fingerprint(path, self.job) or {})}
        return Footer(columns, self.report.counts(), self.job.output_options(self.limit), self.job.id_col, table)


def _reads_itself(step: Step) -> bool:
    return isinstance(step, BatchStep) and step.reads_own_shards
