"""One shard's run: read, feed the pipeline, pair by id, write. The place where rows are counted.

``begin`` reads a shard and feeds the pipeline, ``finish`` waits for the values and writes the file. Between the two,
other shards may begin.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from curator_embed.errors import Reason, SourceError, UsageError, redact_name
from curator_embed.execution.carrying import Carried, carried_columns
from curator_embed.execution.failing import error_codes, merged, tally
from curator_embed.execution.job import FailedRows, NothingReadable, ShardJob, ShardReport
from curator_embed.execution.survey import survey, unfaithful, wanted
from curator_embed.execution.values import OwnVectors, embedded_values, image_values, vector_dtype
from curator_embed.pipeline.pipeline import OpenShard, Pipeline
from curator_embed.pipeline.vectors import Vectors
from curator_embed.sources.shard import Note, Sample, Shard
from curator_embed.steps import BatchStep, Step
from curator_embed.storage.files import redact
from curator_embed.storage.location import Location
from curator_embed.tables.failpoints import failpoint
from curator_embed.tables.judge import judge_columns, made_from_images, outdated
from curator_embed.tables.nulls import nulls
from curator_embed.tables.pairing import (
    Pairing,
    ids_digest,
    key_normaliser,
    normalise_key,
    pair,
)
from curator_embed.tables.provenance import ERROR_COLUMN, ERROR_RECIPE, Entry, Footer
from curator_embed.tables.shard_table import NO_IDS, Ids, ShardTable
from curator_embed.tables.writing import NewColumn, TablePlan, TargetChanged, collect_table, takes_no_nulls

log = logging.getLogger(__name__)


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
        self.paired_nothing = ""  # what to say where there are images and rows, and not one of them meets
        self.embedded_here = 0  # rows with a value in every column that this run makes

    # -- begin ---------------------------------------------------------------------------

    def begin(self, *, writes: bool = True) -> bool:
        """Read the shard into the pipeline. Returns False when it is already done.

        Args:
            writes: whether a file will be written, beside which scratch files may lie.

        Raises:
            UsageError, SourceError: something stands in the way, or a file cannot be used.
        """
        job = self.job
        if job.output is None and self.shard.table_path() is None:
            target = Location.of(job.target(self.shard), job.storage_options)
            if target.token() is not None:
                # A table has come to lie beside the images since the dataset was opened: its rows are the rows.
                self.shard = self.shard.with_table(job.target(self.shard))
        found, seen = survey(job, self.shard, self.limit)
        if found.conflict is not None:
            raise UsageError(f"{found.conflict}. {found.conflict.advice}")
        if (conflict := unfaithful(job, self.shard, found, seen, self.limit)) is not None:
            raise UsageError(f"{conflict}. {conflict.advice}")
        self.target, self.facts = seen.target, seen.facts
        if found.done:
            self.report = self._of_finished(found.footer)
            if not found.footer.counts:  # made by somebody who does not count
                self.report.take(self.target.counts())
            self._notes(found.notes)
            return False
        self.todo, self.footer = found.todo, found.footer
        if lacking := job.not_needed & set(self.todo):
            columns = ", ".join(name for position in sorted(lacking) for name in job.steps[position].columns())
            problem = f"has lost {columns} since the run began"
            raise SourceError(self.target.stored.path, problem, "Run again to make it anew")
        failpoint("shard.started")
        self.table = self._table(seen.table)
        self.ids = self._read_ids()
        self.numeric = key_normaliser(self.ids.type)
        place = self.target.location
        self.scratch = place.path if writes and place.is_local else None
        piped = [p for p in self.todo if not _reads_itself(job.steps[p])]
        self.opened = self._stack.enter_context(self.pipeline.shard(piped, self.scratch))
        try:
            self._feed(self.opened)
        except BaseException:
            self.abandon()
            raise
        failpoint("shard.read")
        return True

    def _table(self, seen: ShardTable | None) -> ShardTable | None:
        """The table whose rows are the rows; None where there is none yet."""
        path = self.shard.table_path()
        if path is None:
            return None
        table = self.target if self.job.output is None else seen
        if table is None or not table.exists:
            table = ShardTable.open(path, self.job.storage_options, marked=True)
        if table.stored.damaged:
            raise SourceError(table.stored.path, table.stored.damaged, "Restore it or remove it, then run again")
        if not table.exists:
            raise SourceError(table.stored.path, "does not exist (any more)", "Restore it, or leave it out")
        return table

    def _read_ids(self) -> Ids:
        """Read the ids, and see that the columns that are kept were made for these, in this order."""
        if self.table is None:
            return NO_IDS
        names = self.table.footer.columns
        ids = self.table.ids(self.job.id_col, errors=ERROR_COLUMN in names)
        facts = replace(self.facts, ids=ids.digest)
        kept = [p for p in range(len(self.job.steps)) if p not in self.todo]
        status = judge_columns(self._names(), names, [wanted(self.job)[p] for p in kept], facts)
        if status.kind is not None and not self.job.overwrite:
            raise UsageError(
                f"{self.table.stored.path}: {status.why}. Pass overwrite=True to make it anew; nothing was changed"
            )
        self.facts = facts
        made_anew = {name for position in self.todo for name in self.job.steps[position].columns()}
        for name, entry in names.items():
            found = outdated(entry, facts) if name not in made_anew and name != ERROR_COLUMN and entry.samples else None
            if found is not None:
                self._note(self.table.stored.path, f"column '{name}' {found[1]}; overwrite=True makes it anew")
        return ids if self._old_codes_hold() else replace(ids, errors=None)

    def _names(self) -> list[str]:
        assert self.table is not None and self.table.stored.schema is not None
        return list(self.table.stored.schema.names)

    def _old_codes_hold(self) -> bool:
        """Whether an earlier run's reason codes are still true: of these images and ids, for columns that stay."""
        assert self.table is not None
        entries = self.table.footer.columns
        codes = entries.get(ERROR_COLUMN)
        if codes is None or outdated(codes, self.facts) is not None:
            return False
        made_anew = {name for position in self.todo for name in self.job.steps[position].columns()}
        return bool(entries.keys() - made_anew - {ERROR_COLUMN})

    def _old_codes(self, new: Sequence[str | None]) -> list[str | None]:
        """An earlier run's reason codes, as far as they explain a column that is kept: one code serves all columns, and
        what failed for a column that is made anew, or left out, has nothing to say any more.

        Args:
            new: this run's codes; where they name a reason, the old one need not be looked into.
        """
        if self.ids.errors is None or self.table is None:
            return []
        old: list[str | None] = self.ids.errors.to_pylist()
        made_anew = {name for position in self.todo for name in self.job.steps[position].columns()}
        selected = self._selected(self._schema())
        entries = self.table.footer.columns
        imaged = [name for name, entry in entries.items() if name != ERROR_COLUMN and made_from_images(entry)]
        kept = [name for name in imaged if name not in made_anew and (selected is None or name in selected)]
        open_rows = [row for row, code in enumerate(old[: len(new)]) if code is not None and new[row] is None]
        if len(kept) == len(imaged) or not open_rows:
            return old
        empty = self.table.null_rows(kept, open_rows)
        for row in open_rows:
            if row not in empty:
                old[row] = None
        return old

    def _feed(self, opened: OpenShard) -> None:
        """Read every sample once; hand in the images whose values somebody will get."""
        wanted: set[str | None] | None = None
        if self.table is not None and (self.job.output is None or self.limit is not None):
            wanted = set(self.ids.text[: self.limit])
        need_extras = self.table is None
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
            NothingReadable: rows failed, and none was embedded.
            FailedRows: rows failed, under ``on_error="raise"``.
        """
        assert self.opened is not None
        try:
            own = {p: self._run_own_reader(p, self.opened) for p in self.todo if _reads_itself(self.job.steps[p])}
            self.opened.wait()
            failpoint("shard.embedded")
            with self.pipeline.clock.timing("write"):
                plan = self._plan(self.opened, own)
                self._refuse_failures()
                table = None if self.job.output is None else self.table
                self.target.write(plan, from_table=table)
        except TargetChanged:
            if self.target.location.token() == self.target.token:
                raise  # it is the input that was changed
            # A run whose driver died may have workers that finish what they have, and Dask may run a task twice.
            # Overwriting makes everything anew; this file was made just now.
            found, _ = survey(replace(self.job, overwrite=False), self.shard, self.limit)
            if not found.done:
                raise
            mine, self.report = self.report, self._of_finished(found.footer)
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

    def _of_finished(self, footer: Footer) -> ShardReport:
        return ShardReport.of_finished(self.shard.name, footer, with_dropped=self.job.output is not None)

    def _run_own_reader(self, position: int, opened: OpenShard) -> OwnVectors:
        """Embeddings by id from an embedder that reads shards itself (``load_dataset_shard`` overridden)."""
        step = self.job.steps[position]
        source = self.shard.image_source()
        found = OwnVectors(Vectors(self.pipeline.memory, self.scratch))
        self._stack.callback(found.vectors.close)
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
            found.add([normalise_key(str(sample_id), self.numeric) for sample_id in ids], vectors)
        for ordinal in found.pair(self.keys):
            opened.errors.setdefault(ordinal, Reason.BAD_VECTOR)
        return found

    def _plan(self, opened: OpenShard, own: Mapping[int, OwnVectors]) -> TablePlan:
        """Pair values with rows, count, and say what the output table is."""
        table, job = self.table, self.job
        if table is None:
            in_memory, row_ids = self._table_from_samples()
            nobody = np.zeros(len(row_ids), dtype=bool)
            pairing = Pairing(np.arange(len(row_ids)), nobody, np.empty(0, np.int64), {})
        else:
            in_memory, row_ids = None, self.ids.text
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
        orphans = pairing.orphans if len(pairing.orphans) and self._adds_rows() else np.empty(0, np.int64)
        self.report.images_without_row = len(pairing.orphans) if self.limit is None else 0
        sample_of_row = np.concatenate([pairing.sample_of_row, orphans])
        ambiguous = np.concatenate([pairing.ambiguous, np.zeros(len(orphans), dtype=bool)])
        all_ids = [*row_ids, *(self.keys[ordinal] for ordinal in orphans)]

        given = [found.places.keys() for found in own.values()]
        failed = (self.source_errors, opened.errors)
        errors = error_codes(sample_of_row, ambiguous, self.has_image, failed, given, self.keys)
        self.embedded_here = tally(errors)["embedded"]
        columns = self._columns(opened, own, sample_of_row)
        carried = Carried()
        if job.output is not None and self.target.exists:
            schema = in_memory.schema if in_memory is not None else self._schema()
            carried = carried_columns(self.target, job.id_col, {*columns, *schema.names, ERROR_COLUMN}, all_ids)
            if carried.lost:
                gone = f"{carried.lost} rows of the version before are gone, and with them their values in"
                self._note(self.target.stored.path, f"{gone} {', '.join(carried.columns)}")
        errors = merged(merged(self._old_codes(errors), errors), carried.codes)
        self._count(errors, all_ids)
        self.report.decoders = dict(opened.decoders)
        keep = np.arange(len(sample_of_row))
        dropped: dict[str, Any] = {}
        if job.on_error == "drop":
            failed_row = np.array([code is not None for code in errors], dtype=bool)
            keep = np.flatnonzero(~failed_row)
            left_out = tally([code for code in errors if code is not None])
            dropped = {name: left_out[name] for name in ("failed", "no_image", "reasons")} if left_out["read"] else {}
        first, added = keep[keep < len(row_ids)], keep[keep >= len(row_ids)]
        codes = pa.array(errors, pa.string())
        columns[ERROR_COLUMN] = NewColumn(pa.string(), lambda rows: codes.take(pa.array(rows)))
        columns |= carried.columns
        entries = dict(carried.entries) | self._entries(opened, own, [all_ids[row] for row in keep])
        return TablePlan(
            source=None if table is None else table.location,
            in_memory=in_memory,
            keep=first,
            appended=self._rows_for_orphans(sample_of_row[added]) if len(added) else None,
            appended_rows=added,
            columns=columns,
            footer=self._footer(entries, len(keep), dropped),
            selected=self._selected(None if table is None else self._schema()),
        )

    def _schema(self) -> pa.Schema:
        assert self.table is not None and self.table.stored.schema is not None
        return self.table.stored.schema

    def _adds_rows(self) -> bool:
        """Whether images that no row knows get rows of their own, with values in every column of the run."""
        if self.job.output is None or self.limit is not None or self.table is None or self._copies():
            return False
        return not self._takes_no_rows()

    def _takes_no_rows(self) -> str:
        """Why the table cannot have rows with an id alone; empty when it can."""
        assert self.table is not None
        selected = self._selected(self._schema())
        if column := takes_no_nulls(self._schema(), self.job.id_col, selected):
            return f"the table's column '{column}' takes no nulls; name the others with columns="
        conflict = self.table.unfaithful(selected, other_rows=True)
        return "" if conflict is None else conflict.why

    def _copies(self) -> bool:
        """Whether a column of the run comes from the table: it has values for the table's own rows alone."""
        return len(self.todo) < len(self.job.steps)

    def _refuse_failures(self) -> None:
        report = self.report
        if self.todo and self.paired_nothing and not self.embedded_here and not self.job.write_unreadable:
            raise NothingReadable(f"{redact(self.shard.image_source() or self.shard.name)}: {self.paired_nothing}")
        if not report.failed:
            return
        key, reason = report.examples[0]
        where = redact(self.shard.image_source() or self.shard.name)
        if self.todo and not self.embedded_here and not self.job.write_unreadable:
            raise NothingReadable(
                f"{where}: not one of {report.failed} images could be read or embedded, the first is "
                f"'{key}': {reason}{''.join(f'. {note.message}' for note in self.shard.notes())}"
            )
        if self.job.on_error == "raise":
            raise FailedRows(
                f"{where}: {report.failed} of {report.read} rows failed, the first is '{key}': {reason}. This "
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
        made = {ERROR_COLUMN, *(name for position in self.todo for name in self.job.steps[position].columns())}
        if (taken := sorted(made & set(table.column_names))) and not self.job.overwrite:
            raise UsageError(
                f"{redact(self.shard.image_source() or self.shard.name)}: its json holds a field '{taken[0]}', which "
                "would give way to the new column. Pass overwrite=True to let it, or choose another column name"
            )
        return table, list(self.keys)

    def _rows_for_orphans(self, orphans: np.ndarray) -> pa.Table:
        """Rows for images that no row knows: their id, and nulls."""
        schema = self._schema()
        keys = [self.keys[p] for p in orphans]
        columns = []
        for item in schema:
            if item.name == self.job.id_col:
                try:
                    columns.append(pa.array(keys, pa.string()).cast(item.type))
                except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
                    raise SourceError(
                        self.shard.image_source() or self.shard.name,
                        f"holds images whose keys ('{redact_name(keys[0])}', ...) do not fit the ids, which are "
                        f"{item.type}",
                        "Choose the id column that holds the keys, with id_col=",
                    ) from None
            else:
                columns.append(nulls(len(keys), item.type))
        return pa.Table.from_arrays(columns, schema=schema)

    def _tell_about(self, pairing: Pairing, row_ids: Sequence[str | None]) -> None:
        path = redact(self.shard.image_source() or self.shard.name)
        if pairing.unequal:
            key, (rows, samples) = next(iter(pairing.unequal.items()))
            self._note(
                path,
                f"{len(pairing.unequal)} ids occur a different number of times in the table and in the images "
                f"('{redact_name(key)}': {rows} rows, {samples} images); their rows carry '{Reason.AMBIGUOUS_ID}'",
            )
        if row_ids and self.keys and (pairing.sample_of_row < 0).all() and not pairing.unequal:
            self.paired_nothing = (
                f"no image has an id of the table's column '{self.job.id_col}' (table: "
                f"'{redact_name(str(row_ids[0]))}', images: '{redact_name(self.keys[0])}'); "
                "choose another with id_col="
            )
            self._note(path, f"{self.paired_nothing} and overwrite=True")
        if len(pairing.orphans) and self.limit is None:
            what = "added as rows"
            if self.job.output is None:
                what = "left out: pass an output path and overwrite=True to get rows for them"
            elif self._copies():
                what = "left out, as columns are copied that have no value for them: pass overwrite=True to get rows"
            elif why := self._takes_no_rows():
                what = f"left out: {why}"
            self._note(path, f"{len(pairing.orphans)} images have no row in the table, {what}")

    def _note(self, path: str, message: str) -> None:
        self.report.notes.append(Note(self.shard.name, path, message))

    def _notes(self, messages: Sequence[str]) -> None:
        for message in messages:
            path, _, text = message.partition(": ")
            self._note(path, text)

    def _count(self, errors: Sequence[str | None], ids: Sequence[str | None]) -> None:
        self.report.take(tally(errors))
        for row, code in enumerate(errors):
            if len(self.report.examples) == 5:
                break
            if code is not None and code != Reason.NO_IMAGE:
                self.report.examples.append((redact_name(str(ids[row])), code))

    def _columns(
        self,
        opened: OpenShard,
        own: Mapping[int, OwnVectors],
        sample_of_row: np.ndarray,
    ) -> dict[str, NewColumn]:
        columns: dict[str, NewColumn] = {}
        for position in self.todo:
            step = self.job.steps[position]
            for name, kind in step.columns().items():
                if position in own:
                    columns[name] = NewColumn(kind, own[position].values(sample_of_row, kind))
                elif isinstance(step, BatchStep):
                    columns[name] = NewColumn(kind, embedded_values(opened, position, sample_of_row, kind))
                else:
                    values = image_values(step, name, opened, position, sample_of_row, self.keys)
                    columns[name] = NewColumn(kind, values)
        return columns

    def _entries(self, opened: OpenShard, own: Mapping[int, OwnVectors], ids: Sequence[str | None]) -> dict[str, Entry]:
        """What made each column of the new file.

        Args:
            ids: of the file's rows.
        """
        digest = ids_digest(ids)
        selected = self._selected(None if self.table is None else self._schema())
        entries = {
            # Columns that are copied were made for the rows of their table; whose rows these are is known now.
            name: replace(entry, ids=digest) if entry.ids == self.ids.digest else entry
            for name, entry in self.footer.columns.items()
            if selected is None or name in selected
        }
        samples, pairing = dict(self.facts.samples), dict(self.facts.pairing)
        for position in self.todo:
            step = self.job.steps[position]
            recipe = dict(step.recipe())
            if isinstance(step, BatchStep) and position in self.pipeline.models:
                exceptions = self.pipeline.models[position].exceptions()
                self.report.exceptions += exceptions
                if exceptions:
                    recipe["exceptions"] = list(exceptions)
            for name in step.columns():
                dimension = self._dimension(name, position, opened, own)
                entries[name] = Entry(recipe, samples, pairing, digest, dimension)
        entries[ERROR_COLUMN] = Entry(ERROR_RECIPE, samples, pairing, digest)
        return entries

    def _dimension(self, name: str, position: int, opened: OpenShard, own: Mapping[int, OwnVectors]) -> int | None:
        """Length of a step's vectors in this shard; None without any.

        Raises:
            UsageError: finished shards have vectors of another length.
        """
        if not isinstance(self.job.steps[position], BatchStep):
            return None
        if position in own:
            lengths = own[position].lengths
        else:
            lengths = {opened.vectors[position].dim} - {0}
        before = self.job.dimensions.get(name)
        if len(lengths) > 1 or (lengths and before not in (None, *lengths)):
            raise UsageError(
                f"{self.target.stored.path}: column '{name}' would hold vectors of {sorted(lengths)} numbers"
                + (f", and finished shards hold vectors of {before}" if before is not None else "")
                + ". A column's vectors have one length: choose another column name, or pass overwrite=True to make "
                "all shards anew"
            )
        return next(iter(lengths), None)

    def _footer(self, entries: dict[str, Entry], rows: int, dropped: Mapping[str, Any]) -> Footer:
        counts = self.report.counts()
        if dropped:
            counts["read"] -= dropped["failed"] + dropped["no_image"]
            counts |= {"failed": 0, "no_image": 0, "reasons": {}}
        if self.job.output is None:  # an output stays one: its first command still finds it done
            made = self.footer
            return Footer(entries, counts, made.output, self.job.id_col, made.table, rows, made.dropped)
        table: dict[str, Any] = {}
        if self.table is not None:
            table = {"rows": len(self.ids.text), **(self.table.stored.mark or {}), "ids": self.ids.digest}
        options = self.job.output_options(self.limit)
        return Footer(entries, counts, options, self.job.id_col, table, rows, dict(dropped))


def _reads_itself(step: Step) -> bool:
    return isinstance(step, BatchStep) and step.reads_own_shards
