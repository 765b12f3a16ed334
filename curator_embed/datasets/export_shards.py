"""What a worker does for an export: say which rows of a shard are kept, and write one new shard.

A new shard is its tar, and then its parquet, whose footer says which export it is of and from which tar: only both
together are done.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from curator_embed.datasets.partitions import column_of, ids_of
from curator_embed.errors import UsageError
from curator_embed.execution.failing import tally
from curator_embed.execution.job import ShardJob, ShardReport
from curator_embed.execution.work import UnitJob
from curator_embed.execution.worker import read_partition
from curator_embed.sources.grouping import kind_of
from curator_embed.sources.shard import Note, Shard, StoredSample
from curator_embed.sources.sniff import sniff
from curator_embed.storage.files import fingerprint, redact
from curator_embed.storage.location import Location, Token
from curator_embed.tables.failpoints import failpoint
from curator_embed.tables.judge import outdated
from curator_embed.tables.pairing import ids_as_text, ids_digest, key_normaliser, normalise_key, pair
from curator_embed.tables.provenance import ASSIGNED, ERROR_COLUMN, Entry, Footer, counted
from curator_embed.tables.shard_table import ShardTable, facts_of
from curator_embed.tables.writing import TablePlan, TargetChanged, replacing

ATTEMPTS = 3
"""So often a new shard is begun whose files another task replaces meanwhile; two tasks need three at most."""
KEY = "key"
"""The id column of what is exported: the new tars' own keys. An id that lives in json members stays there and in its
column, as it was."""


@dataclass(frozen=True)
class Marked:
    """What the filter says of one partition.

    Attributes:
        rows, kept: how many it has, and how many of them are kept.
        digest: identifies its ids, kept rows and assigned values.
        moved: its ids are not those of the shard's table in their order.
    """

    rows: int
    kept: int
    digest: str
    moved: bool = False


@dataclass(frozen=True)
class MarkJob(UnitJob):
    """Count the rows that a filter keeps. Units are shards, and their partitions come with them."""

    id_col: str
    filter_column: str
    added: tuple[str, ...]
    storage_options: Mapping[str, Any]

    def run_unit(self, unit: Shard, given: Any) -> ShardReport:
        """The report's ``found`` is a ``Marked``."""
        [part] = given
        kept = kept_rows(part, self.filter_column)
        ids = ids_digest(ids_of(part, self.id_col))
        path = unit.table_path()
        table = None if path is None else ShardTable.open(path, self.storage_options)
        moved = table is not None and table.exists and table.ids(self.id_col).digest != ids
        digest = digest_of(ids, kept, part, self.added)
        return ShardReport(unit.name, read=len(part), found=Marked(len(part), len(kept), digest, moved))


def digest_of(ids: str, kept: np.ndarray, part: Any, added: Sequence[str]) -> str:
    """Identifies what an export takes from a partition: its ids, kept rows and assigned values; sha256, hexadecimal.

    Args:
        ids: ``ids_digest`` of its ids.
        kept: from ``kept_rows``.
    """
    digest = hashlib.sha256(ids.encode() + kept.tobytes())
    for name in added:
        digest.update(repr(column_of(part, name).to_pylist()).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def kept_rows(part: Any, column: str) -> np.ndarray:
    """int64 positions of one partition's rows whose value is true; null is false.

    Raises:
        UsageError: the column holds something else.
    """
    array = column_of(part, column)
    if pa.types.is_null(array.type):
        return np.empty(0, dtype=np.int64)
    if not (pa.types.is_boolean(array.type) or pa.types.is_integer(array.type)):
        raise UsageError(f"column '{column}' holds {array.type}, not true and false")
    if pa.types.is_integer(array.type) and len(other := set(array.unique().to_pylist()) - {0, 1, None}):
        raise UsageError(f"column '{column}' holds {min(other)}, not true and false, nor 1 and 0")
    return np.flatnonzero(array.cast(pa.bool_()).fill_null(False).to_numpy(zero_copy_only=False))


@dataclass(frozen=True)
class Piece:
    """Some kept rows of one input shard: the ``start``-th to the ``stop``-th row that the filter keeps."""

    shard: int
    start: int
    stop: int


@dataclass(frozen=True)
class NewShard:
    """One shard to be written.

    Attributes:
        name: the stem of its two files, and the beginning of its ids.
        pieces: the rows it gets.
        shards: the input shard of each piece.
        digests: ``Marked.digest`` of each of these shards: what the pieces were planned for.
    """

    name: str
    pieces: tuple[Piece, ...]
    shards: tuple[Shard, ...]
    digests: tuple[str, ...]


@dataclass(frozen=True)
class Exported:
    """What became of a new shard's rows: written, or without an image and left out."""

    written: int
    no_image: int
    skipped: bool = False


@dataclass(frozen=True)
class ExportJob(UnitJob):
    """Write new shards.

    Attributes:
        path: the folder they go to.
        job: how the input is read.
        sample_digits: digits of a sample's number in its id.
        old_id_col: the column that keeps the previous ids; None for none.
        made_from: identifies the export; the footers of its shards carry it.
        added: columns that were assigned to the metadata and are in no file.
    """

    path: str
    job: ShardJob
    filter_column: str
    sample_digits: int
    old_id_col: str | None
    made_from: str
    added: tuple[str, ...]
    must_see: tuple[str, ...] = ()

    def run_unit(self, unit: NewShard, given: Sequence[Any]) -> ShardReport:
        """The report's ``found`` is an ``Exported``.

        Raises:
            UsageError: the frame no longer has the shard's rows, or not those that were planned for.
            TargetChanged: others have replaced the new shard's files again and again.
        """
        # Dask may run a task twice, and workers whose driver died finish what they have: look what they have left.
        for _ in range(ATTEMPTS):
            if (report := self._finish(unit, given)) is not None:
                return report
        raise TargetChanged(redact(f"{self.path}/{unit.name}.tar"))

    def _finish(self, unit: NewShard, given: Sequence[Any]) -> ShardReport | None:
        """One attempt; None where another task has replaced the files meanwhile."""
        options = self.job.storage_options
        tar_url = f"{self.path}/{unit.name}.tar"
        tar, target = Location.of(tar_url, options), ShardTable.open(f"{self.path}/{unit.name}.parquet", options)
        made, token = target.footer.output, tar.token()
        ours = made.get("export") == self.made_from and token is not None
        if ours and made.get("tar") == fingerprint(tar_url, options):
            return _report(unit.name, Exported(target.stored.rows or 0, int(made.get("no_image", 0)), skipped=True), [])
        failpoint("shard.started")
        inputs = zip(unit.pieces, unit.shards, unit.digests, given, strict=True)
        chosen = [self._choose(*one) for one in inputs]
        try:
            written = self._write_tar(unit, chosen, tar, token)
            failpoint("shard.embedded")
            no_image = sum(piece.stop - piece.start for piece in unit.pieces) - written
            self._write_rows(unit, chosen, written, no_image, fingerprint(tar_url, options), target)
        except TargetChanged:
            return None
        failpoint("shard.finished")
        notes = [
            Note(rows.shard.name, rows.shard.name, f"{left} kept rows have no image")
            for rows, piece in zip(chosen, unit.pieces, strict=True)
            if (left := piece.stop - piece.start - len(rows.exported))
        ]
        return _report(unit.name, Exported(written, no_image), notes)

    def _write_tar(self, unit: NewShard, chosen: Sequence[_Rows], tar: Location, token: Token | None) -> int:
        """The new shard's tar, with the samples that have an image; returns how many."""
        written = 0
        if tar.is_local:
            os.makedirs(tar.parent, exist_ok=True)
        with replacing(tar, token) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
            for rows in chosen:
                for sample in rows.shard.stored_samples(frozenset(rows.ordinals.tolist())):
                    if not _has_image(sample):
                        continue
                    rows.exported.append(sample.ordinal)
                    for extension, data in sample.members:
                        member = tarfile.TarInfo(f"{self._id(unit, written)}.{extension}")
                        member.size = len(data)
                        archive.addfile(member, io.BytesIO(data))
                    written += 1
        return written

    def _id(self, unit: NewShard, number: int) -> str:
        return f"{unit.name}{number:0{self.sample_digits}d}"

    def _choose(self, piece: Piece, shard: Shard, digest: str, part: Any) -> _Rows:
        """The kept rows of a piece that have a sample, in the order of the samples."""
        kept = kept_rows(part, self.filter_column)
        table = read_partition(shard, self.job)
        ids = ids_as_text(table.column(self.job.id_col))
        if ids_of(part, self.job.id_col) != ids:
            raise UsageError(
                f"the metadata of shard {shard.name} no longer has the shard's rows in their order. Mark the rows to "
                "keep in a boolean column instead of dropping or sorting rows"
            )
        if digest_of(ids_digest(ids), kept, part, self.added) != digest:
            raise UsageError(f"shard {shard.name}: {self._unstable()}")
        rows = kept[piece.start : piece.stop]
        entries = Footer.of(table.schema).columns
        # What an earlier save has assigned is in some files already.
        table = table.drop_columns([name for name in self.added if name in table.column_names])
        for added in self.added:
            table = table.append_column(added, column_of(part, added))
        numeric = key_normaliser(table.schema.field(self.job.id_col).type)
        keys = [normalise_key(key, numeric) for key in shard.keys(id_col=self.job.id_col)]
        sample_of_row = pair(ids, keys).sample_of_row[rows]
        rows, ordinals = rows[sample_of_row >= 0], sample_of_row[sample_of_row >= 0]
        # Rows in the order of the tar: the n-th row is the n-th sample.
        order = np.argsort(ordinals, kind="stable")
        facts = dataclasses.replace(facts_of(shard, self.job.id_col), ids=ids_digest(ids))
        stale = {name for name, entry in entries.items() if entry.samples and outdated(entry, facts) is not None}
        return _Rows(shard, table.take(pa.array(rows[order])), ordinals[order], entries, stale)

    def _unstable(self) -> str:
        """What a frame that is not the same each time is told."""
        others = [name for name in self.added if name != self.filter_column]
        if not others:
            return (
                f"the filter '{self.filter_column}' gives other rows each time it is computed; save it as a column "
                "first (save_metadata), then export"
            )
        return (
            f"the filter '{self.filter_column}' gives other rows each time it is computed, or an assigned column "
            f"({', '.join(others)}) other values; save them as columns first (save_metadata), then export"
        )

    def _write_rows(
        self,
        unit: NewShard,
        chosen: Sequence[_Rows],
        written: int,
        no_image: int,
        tar: Mapping[str, Any],
        target: ShardTable,
    ) -> None:
        """The new shard's parquet. Columns stay what they were made to be: their images are the same bytes."""
        tables = [rows.table.filter(pa.array(np.isin(rows.ordinals, rows.exported))) for rows in chosen]
        new_ids = [self._id(unit, number) for number in range(written)]
        table = pa.concat_tables(tables, promote_options="permissive")
        entries = self._entries(chosen, table.column_names, dict(tar), ids_digest(new_ids))
        old, keys = table.column(self.job.id_col), pa.array(new_ids, pa.string())
        if KEY in table.column_names:
            table = table.set_column(table.column_names.index(KEY), KEY, keys)
        else:
            table = table.add_column(0, KEY, keys)
        if self.old_id_col is not None:
            table = table.append_column(self.old_id_col, old)
        counts = tally(table.column(ERROR_COLUMN).to_pylist()) if ERROR_COLUMN in table.column_names else {}
        output = {"export": self.made_from, "tar": dict(tar), "no_image": no_image}
        target.write(
            TablePlan(
                source=None,
                in_memory=table,
                keep=np.arange(len(table)),
                appended=None,
                appended_rows=np.empty(0, dtype=np.int64),
                columns={},
                footer=Footer(entries, counts, output, KEY, {}, len(table)),
            )
        )

    def _entries(
        self, chosen: Sequence[_Rows], names: Sequence[str], tar: dict[str, Any], ids: str
    ) -> dict[str, Entry]:
        """What made the new shard's columns: as before, from the new tar. A column that was out of date stays so, and
        one that was made in two ways says neither."""
        entries = {name: Entry(ASSIGNED) for name in self.added}
        for name, entry in chosen[0].entries.items():
            made = [rows.entries.get(name) for rows in chosen]
            recipes = [None if one is None else counted(one.recipe) for one in made]
            dimensions = {one.dimension for one in made if one is not None} - {None}
            if (
                name in entries
                or name not in names
                or any(recipe != recipes[0] for recipe in recipes)
                or len(dimensions) > 1
            ):
                continue
            entry = dataclasses.replace(entry, dimension=next(iter(dimensions), None))
            out_of_date = next((rows.entries[name] for rows in chosen if name in rows.stale), None)
            if out_of_date is not None:
                entries[name] = dataclasses.replace(out_of_date, ids="")
            elif entry.samples:
                entries[name] = dataclasses.replace(entry, samples=tar, pairing={"id_col": KEY}, ids=ids)
            else:
                entries[name] = entry
        return entries


@dataclass
class _Rows:
    """The rows of one piece that have a sample: ``ordinals`` of the samples, ascending, and those that were written."""

    shard: Shard
    table: pa.Table
    ordinals: np.ndarray
    entries: dict[str, Entry]
    stale: set[str]
    exported: list[int] = field(default_factory=list)


def _report(name: str, found: Exported, notes: list[Note]) -> ShardReport:
    report = ShardReport(name, read=found.written + found.no_image, embedded=found.written, no_image=found.no_image)
    report.found, report.notes, report.skipped = found, notes, found.skipped
    return report


def _has_image(sample: StoredSample) -> bool:
    """Whether a sample holds an image, good or bad: by its bytes, or by what its extension claims."""
    return any(kind_of(extension) == "image" or sniff(data) is not None for extension, data in sample.members)
