"""Export: the samples worth keeping, as new webdataset shards with their encoded bytes untouched.

A first pass reads one boolean column; a pure planner then says which rows make up which new shard, so that every new
shard is written on its own, by the same driver that carries out every run.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from distributed import Client

from curator_embed.datasets.export_shards import KEY, ExportJob, Marked, MarkJob, NewShard, Piece
from curator_embed.datasets.partitions import Partitions, PartWork, check_partitions, column_of
from curator_embed.datasets.pending import taken_columns
from curator_embed.errors import UsageError
from curator_embed.execution.carry_out import carry_out, check_writable, hold, make_folder, must_see, raise_for
from curator_embed.execution.clients import some_client
from curator_embed.execution.report import RunReport
from curator_embed.execution.workers import wait_for_worker
from curator_embed.sources.nesting import check_output
from curator_embed.storage.files import exists, fingerprint, redact
from curator_embed.storage.location import Location
from curator_embed.tables.bookkeeping import Bookkeeping
from curator_embed.tables.writing import clear_temporaries

if TYPE_CHECKING:
    from curator_embed.datasets.image_text_pair import ImageTextPairDataset

RECORD = "export.json"
"""What was begun in a folder: a tar says nothing about its origin."""


def plan_shards(kept: Sequence[int], samples_per_shard: int) -> list[list[Piece]]:
    """Cut the kept rows of all input shards, in order, into new shards.

    Args:
        kept: rows the filter keeps, per input shard.
        samples_per_shard: rows in each new shard; the last may have fewer.
    """
    shards: list[list[Piece]] = []
    room = 0
    for number, count in enumerate(kept):
        start = 0
        while start < count:
            if room == 0:
                shards.append([])
                room = samples_per_shard
            stop = min(count, start + room)
            shards[-1].append(Piece(number, start, stop))
            room -= stop - start
            start = stop
    return shards


@dataclass
class ExportReport:
    """What an export wrote.

    Attributes:
        read: rows of the input.
        kept: rows the filter kept; ``kept == exported + no_image``.
        exported: samples written.
        no_image: kept rows that have no image, left out of the new shards.
        shards: new shards.
        skipped: of those, how many an earlier run had already written.
        dataset: the new dataset.
    """

    read: int = 0
    kept: int = 0
    exported: int = 0
    no_image: int = 0
    shards: int = 0
    skipped: int = 0
    notes: list[str] = field(default_factory=list)
    dataset: ImageTextPairDataset | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, without the dataset."""
        return {name: value for name, value in vars(self).items() if name != "dataset"}

    def __str__(self) -> str:
        return (
            f"{self.exported:,} of {self.read:,} samples exported to {self.shards:,} shards"
            + (f" ({self.skipped:,} were there already)" if self.skipped else "")
            + (f"; {self.no_image:,} rows were kept by the filter but have no image" if self.no_image else "")
        )


class _ExportWork(PartWork):
    """New shards."""

    units: Sequence[NewShard]

    def needs(self, position: int) -> Sequence[int]:
        """The input shards of its pieces."""
        return [piece.shard for piece in self.units[position].pieces]


def export(
    dataset: ImageTextPairDataset,
    path: str,
    filter_column: str,
    samples_per_shard: int,
    max_shards: int,
    old_id_col: str | None,
    *,
    overwrite: bool,
    progress: bool,
) -> ExportReport:
    """See ``ImageTextPairDataset.to_webdataset``."""
    _check_arguments(dataset, filter_column, samples_per_shard, max_shards, old_id_col)
    frame = dataset.metadata
    path = check_output(path, dataset.inputs, dataset.storage_options, writes="tars").rstrip("/")
    folder = Location.of(path, dataset.storage_options)
    check_writable(folder)
    added = tuple(dataset.added_columns())
    report = ExportReport()
    with ExitStack() as stack:
        client = stack.enter_context(some_client())
        wait_for_worker(client)
        # The filter may be assigned and in no file: the frame is evaluated, a partition at a time.
        parts = Partitions(client, frame[list(dict.fromkeys([dataset.id_col, filter_column, *added]))])
        marking = MarkJob(dataset.id_col, filter_column, added, dataset.storage_options)
        marked = _mark(client, dataset, marking, parts, progress)
        report.read = sum(found.rows for found in marked)
        report.kept = sum(found.kept for found in marked)
        plans = plan_shards([found.kept for found in marked], samples_per_shard)
        if len(plans) > 10**max_shards:
            raise UsageError(f"{len(plans)} shards do not fit into {max_shards} digits; raise max_shards")
        held = stack.enter_context(hold([folder], storage_options=dataset.storage_options))
        names = [f"{number:0{max_shards}d}" for number in range(len(plans))]
        made_from = _digest(dataset, marked, list(frame.columns), samples_per_shard, max_shards, old_id_col)
        _Folder(folder, held.books[0]).prepare(made_from, names, overwrite)
        job = ExportJob(
            path,
            dataset.job(None),
            filter_column,
            max(1, math.ceil(math.log10(samples_per_shard))),
            old_id_col,
            made_from,
            added,
            must_see(dataset.shards[0], held.locks[0]),
        )
        units = [
            NewShard(
                name,
                tuple(pieces),
                tuple(dataset.shards[piece.shard] for piece in pieces),
                tuple(marked[piece.shard].digest for piece in pieces),
            )
            for name, pieces in zip(names, plans, strict=True)
        ]
        work = _ExportWork(units, job, parts, report.kept)
        run = RunReport(output=redact(path))
        carry_out(client, work, run, held, progress)
        clear_temporaries(folder)
        raise_for(run)
        held.books[0].write(RECORD, {"export": made_from, "shards": names, "complete": True})
    for found in work.found.values():
        report.exported += found.written
        report.no_image += found.no_image
        report.skipped += found.skipped
        report.shards += 1
    report.notes = run.notes
    if report.shards:
        report.dataset = type(dataset).from_webdataset(path, id_col=KEY, storage_options=dataset.storage_options)
    return report


def _check_arguments(
    dataset: ImageTextPairDataset, filter_column: str, samples_per_shard: int, max_shards: int, old_id_col: str | None
) -> None:
    if samples_per_shard < 1:
        raise UsageError(f"samples_per_shard={samples_per_shard}: at least 1")
    if max_shards < 1:
        raise UsageError(f"max_shards={max_shards} is the number of digits in shard names: at least 1")
    if dataset.steps:
        raise UsageError("the dataset has pending steps; call save_metadata() first, then export what it saved")
    columns, added = dataset.metadata.columns, dataset.added_columns()
    if filter_column not in columns:
        raise UsageError(f"no column '{filter_column}' to filter by; the metadata has: {', '.join(map(str, columns))}")
    taken = taken_columns(dataset.shards, dataset.id_col) | {KEY: "the new ids"}
    for name in added:
        if name in taken:
            raise UsageError(
                f"the metadata's new column '{name}' has the name of the column that holds {taken[name]}, and would be "
                "lost; assign it under another name"
            )
    if old_id_col in {*taken, *columns}:
        raise UsageError(
            f"old_id_col='{old_id_col}' is the name of another column, which the old ids would replace; choose another "
            "name for them"
        )
    check_partitions(dataset.metadata, len(dataset.shards), dataset.id_col)
    kind = column_of(dataset.metadata._meta, filter_column).type
    if not any(is_so(kind) for is_so in (pa.types.is_boolean, pa.types.is_integer, pa.types.is_null)):
        raise UsageError(f"column '{filter_column}' holds {kind}, not true and false")


def _mark(
    client: Client, dataset: ImageTextPairDataset, job: MarkJob, parts: Partitions, progress: bool
) -> list[Marked]:
    """The rows that the filter keeps, per shard. Writes nothing.

    Raises:
        RunStopped: not all shards could be read.
    """
    work, run = PartWork(dataset.shards, job, parts), RunReport()
    carry_out(client, work, run, None, progress)
    raise_for(run)
    marked: list[Marked] = [work.found[position] for position in range(len(work.units))]
    for shard, found in zip(dataset.shards, marked, strict=True):
        if found.moved:
            raise UsageError(
                f"the metadata of shard {shard.name} no longer has the shard's rows in their order. Mark the rows to "
                "keep in a boolean column instead of dropping or sorting rows"
            )
    return marked


def _digest(dataset: ImageTextPairDataset, marked: Sequence[Marked], *options: Any) -> str:
    """Identifies an export: which rows, from which tars and tables, under which options."""
    sources = []
    for shard in dataset.shards:
        table = shard.table_path()
        # A shard may name a table that a run has yet to write.
        there = table is not None and exists(table, dataset.storage_options)
        rows = sorted(fingerprint(table, dataset.storage_options).items()) if table is not None and there else None
        sources.append((shard.name, sorted(shard.fingerprint().items()), rows))
    said = repr((sources, [found.digest for found in marked], dataset.id_col, options))
    return hashlib.sha256(said.encode("utf-8", "surrogateescape")).hexdigest()[:32]


class _Folder:
    """The folder that an export goes to, and the record of what was begun in it."""

    def __init__(self, folder: Location, book: Bookkeeping) -> None:
        self.folder, self.book = folder, book

    def prepare(self, made_from: str, names: Sequence[str], overwrite: bool) -> None:
        """See that nothing is in the way: the folder is new, holds a former state of this very export, or may be
        emptied of another one. Only what an export has written is ever removed.

        Raises:
            UsageError: shards of another origin, or of another export without ``overwrite``.
        """
        there = self._shard_files()
        begun = self.book.read(RECORD)
        record = begun if isinstance(begun, dict) else {}
        if there and not record:
            raise UsageError(
                f"{self.folder.path} already holds shards that no export has written ({there[0]}); they are left as "
                "they are. Export into a new folder"
            )
        ours = {str(name) for name in record.get("shards", names)}
        foreign = [name for name in there if name.rpartition(".")[0] not in ours]
        if foreign:
            raise UsageError(
                f"{self.folder.path}/{foreign[0]} is not of this export, but already there. Move it away, or export "
                "into a new folder"
            )
        # An overwriting export that was killed goes on; one that is complete begins anew.
        anew = record.get("export") != made_from or (overwrite and record.get("complete", True))
        if there and anew:
            if not overwrite:
                raise UsageError(
                    f"{self.folder.path} already holds another export ({there[0]}); export into a new folder, or pass "
                    "overwrite=True to replace it"
                )
            # Tables first: a tar alone is unfinished.
            for name in sorted(there, key=lambda name: name.endswith(".tar")):
                self.folder.fs.rm_file(f"{self.folder.path.rstrip('/')}/{name}")
        make_folder(self.folder)
        clear_temporaries(self.folder)
        self.book.write(RECORD, {"export": made_from, "shards": list(names), "complete": False})

    def _shard_files(self) -> list[str]:
        fs = self.folder.fs
        fs.invalidate_cache()
        found = fs.ls(self.folder.path, detail=False) if fs.exists(self.folder.path) else []
        names = (path.rstrip("/").rpartition("/")[2] for path in found)
        return sorted(name for name in names if name.endswith((".tar", ".parquet")))
