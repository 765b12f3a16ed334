"""Export: the samples worth keeping, as new webdataset shards with their encoded bytes untouched.

A first pass reads one boolean column; a pure planner then says which rows make up which new shard,
so that every new shard is written on its own, in parallel.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import math
import os
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from dask.delayed import delayed
from distributed import as_completed

from curator_embed.errors import UsageError
from curator_embed.execution.clients import some_client
from curator_embed.execution.progress import Progress
from curator_embed.execution.run import check_writable
from curator_embed.execution.worker import read_partition
from curator_embed.sources.nesting import check_output
from curator_embed.sources.shard import Shard
from curator_embed.storage.files import exists, fingerprint
from curator_embed.storage.location import Location
from curator_embed.tables.bookkeeping import Bookkeeping
from curator_embed.tables.lock import OutputLock
from curator_embed.tables.pairing import ids_as_text, ids_digest, key_normaliser, normalise_key, pair
from curator_embed.tables.provenance import Footer
from curator_embed.tables.writing import TablePlan, clear_temporaries, replacing, write_table

if TYPE_CHECKING:
    from curator_embed.datasets.image_text_pair import ImageTextPairDataset
    from curator_embed.execution.job import ShardJob


KEY = "key"
"""The id column of what is exported: the new tars' own keys. An id that lives in json members stays there and in its
column, as it was."""


@dataclass(frozen=True)
class Piece:
    """Some kept rows of one input shard: the ``start``-th to the ``stop``-th row that the filter keeps."""

    shard: int
    start: int
    stop: int


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
        names = ("read", "kept", "exported", "no_image", "shards", "skipped", "notes")
        return {name: getattr(self, name) for name in names}

    def __str__(self) -> str:
        return (
            f"{self.exported:,} of {self.read:,} samples exported to {self.shards:,} shards"
            + (f" ({self.skipped:,} were there already)" if self.skipped else "")
            + (f"; {self.no_image:,} rows were kept by the filter but have no image" if self.no_image else "")
        )


@dataclass(frozen=True)
class _Job:
    """What every export task needs to know.

    Attributes:
        made_from: identifies the export; the footers of its shards carry it.
        added: columns that were assigned to the metadata and are in no file.
    """

    path: str
    job: ShardJob
    filter_column: str
    shard_digits: int
    sample_digits: int
    old_id_col: str | None
    made_from: str
    added: tuple[str, ...]


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
    if samples_per_shard < 1:
        raise UsageError(f"samples_per_shard={samples_per_shard}: at least 1")
    if max_shards < 1:
        raise UsageError(f"max_shards={max_shards} is the number of digits in shard names: at least 1")
    if old_id_col == dataset.id_col:
        raise UsageError(f"old_id_col='{old_id_col}' is the id column itself; choose another name for the old ids")
    if dataset.steps:
        raise UsageError("the dataset has pending steps; call save_metadata() first, then export what it saved")
    frame = dataset.metadata
    if filter_column not in frame.columns:
        raise UsageError(
            f"no column '{filter_column}' to filter by; the metadata has: {', '.join(map(str, frame.columns))}"
        )
    if dataset.id_col not in frame.columns:
        raise UsageError(f"the metadata has lost its id column '{dataset.id_col}'")
    path = check_output(path, dataset.inputs, dataset.storage_options, writes="tars")
    folder = Location.of(path, dataset.storage_options)
    added = tuple(dataset.added_columns())
    report = ExportReport()
    with some_client() as client:
        # The filter may be assigned and in no file: evaluate the frame, a partition at a time.
        parts = frame[list(dict.fromkeys([dataset.id_col, filter_column, *added]))].to_delayed()
        marked: list[_Marked] = []
        for start in range(0, len(parts), 256):
            tasks = [delayed(_look)(part, dataset.id_col, filter_column, added) for part in parts[start : start + 256]]
            marked += client.gather(client.compute(tasks))
        report.read = sum(found.rows for found in marked)
        report.kept = sum(found.kept for found in marked)
        plans = plan_shards([found.kept for found in marked], samples_per_shard)
        if len(plans) > 10**max_shards:
            raise UsageError(f"{len(plans)} shards do not fit into {max_shards} digits; raise max_shards")
        job = _Job(
            path.rstrip("/"),
            dataset.job(None),
            filter_column,
            max_shards,
            max(1, math.ceil(math.log10(samples_per_shard))),
            old_id_col,
            _digest(dataset, marked, list(frame.columns), samples_per_shard, max_shards, old_id_col),
            added,
        )
        check_writable(folder)
        with OutputLock(Bookkeeping.of(folder)), Progress(report.kept, progress) as bar:
            _prepare_folder(folder, job, {f"{number:0{max_shards}d}" for number in range(len(plans))}, overwrite)
            waiting = iter(enumerate(plans))

            def hand_out(count: int) -> list[Any]:
                """Give the next new shards to the workers."""
                tasks = []
                for number, pieces in islice(waiting, count):
                    inputs = [(dataset.shards[p.shard], parts[p.shard], p.start, p.stop) for p in pieces]
                    tasks.append(delayed(_export_shard)(number, inputs, job))
                return list(client.compute(tasks))

            running = as_completed(hand_out(max(2, 2 * sum(client.nthreads().values()))))
            try:
                for future in running:
                    exported, missing, skipped, notes = future.result()
                    report.exported += exported
                    report.no_image += missing
                    report.skipped += skipped
                    report.shards += 1
                    report.notes += notes
                    bar.update(exported + missing)
                    running.update(hand_out(1))
            finally:
                for _ in running:  # after an error: nobody writes any more once the lock is given back
                    pass
            clear_temporaries(folder)
    if report.shards:
        report.dataset = type(dataset).from_webdataset(path, id_col=KEY, storage_options=dataset.storage_options)
    return report


@dataclass(frozen=True)
class _Marked:
    """What the filter says of one partition; ``digest`` identifies its ids, kept rows and assigned values."""

    rows: int
    kept: int
    digest: str


def _look(part: Any, id_col: str, filter_column: str, added: Sequence[str]) -> _Marked:
    kept = _kept_rows(part, filter_column)
    digest = hashlib.sha256(ids_digest(_ids(part, id_col)).encode() + kept.tobytes())
    for name in added:
        digest.update(repr(_column(part, name).to_pylist()).encode("utf-8", "surrogateescape"))
    return _Marked(len(part), len(kept), digest.hexdigest())


def _ids(part: Any, id_col: str) -> list[str | None]:
    return ids_as_text(_column(part, id_col))


def _column(part: Any, name: str) -> pa.Array:
    series = part[name]
    if hasattr(series, "to_pandas"):
        series = series.to_pandas()
    array = pa.array(series, from_pandas=True)
    return array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array


def _kept_rows(part: Any, column: str) -> np.ndarray:
    """int64 positions of one partition's rows whose value is true; null is false."""
    array = _column(part, column)
    if pa.types.is_null(array.type):
        return np.empty(0, dtype=np.int64)
    if not (pa.types.is_boolean(array.type) or pa.types.is_integer(array.type)):
        raise UsageError(f"column '{column}' holds {array.type}, not true and false")
    return np.flatnonzero(array.cast(pa.bool_()).fill_null(False).to_numpy(zero_copy_only=False))


def _digest(dataset: ImageTextPairDataset, marked: Sequence[_Marked], *options: Any) -> str:
    """Identifies an export: which rows, from which tars and tables, under which options."""
    sources = []
    for shard in dataset.shards:
        table = shard.table_path()
        # A shard may name a table that a run has yet to write.
        there = table is not None and exists(table, dataset.storage_options)
        rows = sorted(fingerprint(table, dataset.storage_options).items()) if table is not None and there else None
        sources.append((shard.name, sorted(shard.fingerprint().items()), rows))
    said = repr((sources, [found.digest for found in marked], dataset.id_col, options))
    return hashlib.sha256(said.encode()).hexdigest()[:32]


def _prepare_folder(folder: Location, job: _Job, ours: set[str], overwrite: bool) -> None:
    """See that nothing is in the way: the folder is new, holds a former state of this very export, or may be emptied.

    A tar says nothing about its origin, so the folder remembers what was begun in it.
    """
    book = Bookkeeping.of(folder)
    names = _shard_files(folder)
    if names:
        begun = book.read("export.json")
        if not isinstance(begun, dict):
            raise UsageError(
                f"{folder.path} already holds shards that no export has written ({names[0]}); they are left as they "
                "are. Export into a new folder"
            )
        former = begun.get("export")
        if former != job.made_from:
            if not overwrite:
                raise UsageError(
                    f"{folder.path} already holds another export ({names[0]}); export into a new folder, or pass "
                    "overwrite=True to replace it"
                )
            _remove_export(folder, job, names)
            names = _shard_files(folder)
        foreign = [name for name in names if name.rpartition(".")[0] not in ours]
        if foreign:
            raise UsageError(
                f"{folder.path}/{foreign[0]} is not of this export, but already there. Move it away, or export into "
                "a new folder"
            )
    clear_temporaries(folder)
    book.write("export.json", {"export": job.made_from})


def _shard_files(folder: Location) -> list[str]:
    folder.fs.invalidate_cache()
    found = folder.fs.ls(folder.path, detail=False) if folder.fs.exists(folder.path) else []
    names = (path.rstrip("/").rpartition("/")[2] for path in found)
    return sorted(name for name in names if name.endswith((".tar", ".parquet")))


def _remove_export(folder: Location, job: _Job, names: Sequence[str]) -> None:
    """Remove the shards of a former export, and only those."""
    for name in names:
        stem, _, kind = name.rpartition(".")
        if kind != "parquet":
            continue
        path = Location(folder.fs, f"{folder.path.rstrip('/')}/{name}")
        schema = path.schema()
        if schema is not None and "export" in Footer.of(schema).output:
            folder.fs.rm_file(path.path)  # first: a tar alone is unfinished
            if f"{stem}.tar" in names:
                folder.fs.rm_file(f"{folder.path.rstrip('/')}/{stem}.tar")


def _export_shard(
    number: int, inputs: list[tuple[Shard, Any, int, int]], export_job: _Job
) -> tuple[int, int, int, list[str]]:
    """Write one new shard. Returns (samples written, kept rows without image, 1 if it was there, notes).

    Args:
        inputs: (input shard, its part of the frame, first kept row, end of kept rows).
    """
    job, name = export_job.job, f"{number:0{export_job.shard_digits}d}"
    tar = Location.of(f"{export_job.path}/{name}.tar", job.storage_options)
    target = Location.of(f"{export_job.path}/{name}.parquet", job.storage_options)
    tables: list[pa.Table] = []
    samples: list[np.ndarray] = []
    missing, notes = 0, []
    for shard, part, start, stop in inputs:
        rows = _kept_rows(part, export_job.filter_column)[start:stop]
        table = read_partition(shard, job)
        ids = ids_as_text(table.column(job.id_col))
        if _ids(part, job.id_col) != ids:
            raise UsageError(
                f"the metadata of shard {shard.name} no longer has the shard's rows in their order. Mark the rows to "
                "keep in a boolean column instead of dropping or sorting rows"
            )
        for added in export_job.added:
            table = table.append_column(added, _column(part, added))
        numeric = key_normaliser(table.schema.field(job.id_col).type)
        keys = [normalise_key(key, numeric) for key in shard.keys(id_col=job.id_col)]
        sample_of_row = pair(ids, keys).sample_of_row[rows]
        without = int((sample_of_row < 0).sum())
        rows, ordinals = rows[sample_of_row >= 0], sample_of_row[sample_of_row >= 0]
        missing += without
        # Rows in the order of the tar: the n-th row is the n-th sample.
        order = np.argsort(ordinals, kind="stable")
        tables.append(table.take(pa.array(rows[order])))
        samples.append(ordinals[order])
        if without:
            notes.append(f"{shard.name}: {without} kept rows have no image")
    total = sum(map(len, tables))
    there = target.schema()
    if there is not None and Footer.of(there).output.get("export") == export_job.made_from and tar.token() is not None:
        return total, missing, 1, notes
    new_ids = [f"{name}{position:0{export_job.sample_digits}d}" for position in range(total)]
    with _temporary_tar(tar) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        position = 0
        for (shard, *_), ordinals in zip(inputs, samples, strict=True):
            for sample in shard.stored_samples(frozenset(ordinals.tolist())):
                for extension, data in sample.members:
                    member = tarfile.TarInfo(f"{new_ids[position]}.{extension}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
                position += 1
    _write_rows(tables, new_ids, tar, target, export_job)
    return total, missing, 0, notes


def _write_rows(
    tables: Sequence[pa.Table], new_ids: list[str], tar: Location, target: Location, export_job: _Job
) -> None:
    """The new shard's parquet. Columns stay what they were made to be: their images are the same bytes."""
    job = export_job.job
    footers = [Footer.of(table.schema) for table in tables]
    table = pa.concat_tables(tables, promote_options="permissive")
    stored = {**fingerprint(tar.fs.unstrip_protocol(tar.path) if not tar.is_local else tar.path, job.storage_options)}
    columns = {
        name: dataclasses.replace(made, samples=stored, ids=ids_digest(new_ids), pairing={"id_col": KEY})
        for name, made in footers[0].columns.items()
        if name in table.column_names
        and all(name in footer.columns and footer.columns[name].recipe == made.recipe for footer in footers)
    }
    old, keys = table.column(job.id_col), pa.array(new_ids, pa.string())
    if KEY in table.column_names:
        table = table.set_column(table.column_names.index(KEY), KEY, keys)
    else:
        table = table.add_column(0, KEY, keys)
    if export_job.old_id_col is not None:
        if export_job.old_id_col in table.column_names:
            table = table.drop_columns([export_job.old_id_col])
        table = table.append_column(export_job.old_id_col, old)
    plan = TablePlan(
        source=None,
        in_memory=table,
        keep=np.arange(len(table)),
        appended=None,
        appended_rows=np.empty(0, dtype=np.int64),
        columns={},
        footer=Footer(columns, {}, {"export": export_job.made_from}, KEY),
    )
    write_table(plan, target, None, check=False)


@contextmanager
def _temporary_tar(target: Location) -> Iterator[Any]:
    """A local tar takes its name when it is whole; for an object store it is collected on disk and put."""
    if target.is_local:
        os.makedirs(target.parent, exist_ok=True)
        with replacing(target, None, check=False) as file:
            yield file
        return
    with tempfile.NamedTemporaryFile(suffix=".tar") as file:
        yield file
        file.flush()
        target.fs.put_file(file.name, target.path)
