"""Columns that users assign to a dataset's metadata, written into the files that a run has just finished.

A unit is one shard with its partition of the frame. A file that has these very values is left as it is.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dask.dataframe as dd
import numpy as np
import pyarrow as pa
from distributed import Client

from curator_embed.datasets.frames import aligned, without_null
from curator_embed.datasets.partitions import Partitions, PartWork
from curator_embed.errors import SourceError, UsageError
from curator_embed.execution.job import ShardJob, ShardReport
from curator_embed.execution.work import UnitJob
from curator_embed.sources.shard import Shard
from curator_embed.tables.failpoints import failpoint
from curator_embed.tables.pairing import ids_as_text, pair
from curator_embed.tables.provenance import ASSIGNED, Entry, Footer
from curator_embed.tables.shard_table import ShardTable
from curator_embed.tables.taking import Taken
from curator_embed.tables.writing import NewColumn, TablePlan, TargetChanged


def assigned_work(frame: dd.DataFrame, shards: Sequence[Shard], client: Client, job: ShardJob) -> PartWork:
    """The writing of a frame's columns as work for a driver.

    Args:
        frame: the ids and the assigned columns.
        job: whose files get them, as it is carried out.
    """
    return PartWork(shards, AssignJob(job, _as_arrow(frame._meta).schema), Partitions(client, frame))


@dataclass(frozen=True)
class AssignJob(UnitJob):
    """Add the columns of a partition to its shard's file, by id.

    Attributes:
        kinds: the types of the whole frame.
    """

    job: ShardJob
    kinds: pa.Schema

    @property
    def must_see(self) -> tuple[str, ...]:  # type: ignore[override]
        """See ``Job.must_see``."""
        return self.job.must_see

    def run_unit(self, unit: Shard, given: Sequence[Any]) -> ShardReport:
        """Write one file.

        Raises:
            UsageError: a column is there that says otherwise, or cannot be written.
        """
        [part] = given
        failpoint("shard.started")
        table = self._typed(_as_arrow(part), unit)
        target = ShardTable.open(self.job.target(unit), self.job.storage_options)
        if target.stored.schema is None:
            raise SourceError(target.stored.path, "does not exist (any more)", "Run again to make it")
        names = [name for name in table.column_names if name != self.job.id_col]
        made = {name: Entry({**ASSIGNED, "values": _digest(table, self.job.id_col, name)}) for name in names}
        report = ShardReport(unit.name, read=len(table))
        before, there = target.footer.columns, target.stored.schema.names
        if _has_all(target, made):
            report.skipped = True
            return report
        if not self.job.overwrite:
            _refuse(target, [name for name in names if name in there and before.get(name) != made[name]])
        if (conflict := target.unfaithful()) is not None:
            raise UsageError(f"{conflict}. {conflict.advice}")
        try:
            self._write(unit, table, target, made)
        except TargetChanged:
            # Dask may run a task twice, and workers whose driver died finish what they have.
            if not _has_all(ShardTable.open(target.url, self.job.storage_options), made):
                raise
            report.skipped = True
        failpoint("shard.finished")
        return report

    def _write(self, unit: Shard, table: pa.Table, target: ShardTable, made: Mapping[str, Entry]) -> None:
        ids = target.ids(self.job.id_col)
        rows = self._rows_of(ids.text, ids_as_text(table.column(self.job.id_col)), unit)
        columns = {name: NewColumn(table.schema.field(name).type, Taken(table.column(name), rows)) for name in made}
        before = target.footer.columns
        footer = target.footer if before or target.footer.output else Footer(id_col=self.job.id_col)
        footer = dataclasses.replace(
            footer, columns={**before, **made}, rows=target.stored.rows if footer.rows is None else footer.rows
        )
        empty = np.empty(0, dtype=np.int64)
        target.write(TablePlan(target.location, None, np.arange(len(ids.text)), None, empty, columns, footer))

    def _typed(self, table: pa.Table, unit: Shard) -> pa.Table:
        # A column of Python objects has no type before its values are there.
        known = [
            item if pa.types.is_null(self.kinds.field(item.name).type) else self.kinds.field(item.name)
            for item in table.schema
        ]
        return aligned(table, pa.schema([pa.field(item.name, without_null(item.type)) for item in known]), unit.name)

    def _rows_of(self, ids: list[str | None], own: list[str | None], unit: Shard) -> np.ndarray:
        """For each row of the file the frame's row, -1 for none: by position where the ids say so, else by id."""
        common = min(len(ids), len(own))
        if ids[:common] == own[:common] and (len(own) == common or self.job.on_error != "drop"):
            return np.concatenate([np.arange(common), np.full(len(ids) - common, -1)])
        with_id = np.array([row for row, text in enumerate(own) if text is not None], dtype=np.int64)
        found = pair(ids, [text for text in own if text is not None])
        if found.ambiguous.any():
            raise UsageError(
                f"shard {unit.name}: '{next(iter(found.unequal))}' is the id of several rows, of which some were left "
                "out; the run's own columns are saved. Open what was saved and assign the column to that"
            )
        sample = found.sample_of_row
        return np.where(sample < 0, -1, with_id[sample]) if len(with_id) else sample


def _has_all(target: ShardTable, made: Mapping[str, Entry]) -> bool:
    """Whether a file has these very columns."""
    there = target.stored.schema.names if target.stored.schema is not None else []
    return all(name in there and target.footer.columns.get(name) == entry for name, entry in made.items())


def _refuse(target: ShardTable, names: Sequence[str]) -> None:
    for name in names:
        entry = target.footer.columns.get(name)
        what = "is already there and does not say what made it"
        if entry is not None:
            assigned = entry.recipe.get("step") == ASSIGNED["step"]
            what = "is already there, assigned with other values" if assigned else "is already there, made by a step"
        raise UsageError(f"{target.stored.path}: column '{name}' {what}. Pass overwrite=True to replace it")


def _digest(table: pa.Table, id_col: str, name: str) -> str:
    """Identifies the ids of a partition and the values of one of its columns: sha256, 32 hexadecimal digits."""
    digest = hashlib.sha256()
    for column in dict.fromkeys((id_col, name)):
        array = table.column(column).combine_chunks()
        array = array.chunk(0) if isinstance(array, pa.ChunkedArray) and array.num_chunks == 1 else array
        digest.update(str(array.type).encode())
        digest.update(pa.table({"": array}).to_batches()[0].serialize() if len(array) else b"")
    return digest.hexdigest()[:32]


def _as_arrow(part: Any) -> pa.Table:
    if hasattr(part, "to_arrow"):  # cuDF
        table = part.to_arrow(preserve_index=False)
    else:
        table = pa.Table.from_pandas(part, preserve_index=False)
    return table.replace_schema_metadata(None)
