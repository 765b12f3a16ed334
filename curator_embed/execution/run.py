"""A run from plan to report: what is left to do, whether it can be done, and what is kept of it.

Reads footers and sizes only; the shards themselves are the workers' (``driver.py`` hands them out).
"""

from __future__ import annotations

import dataclasses
import errno
import os
import secrets
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from tqdm.auto import tqdm

from curator_embed.errors import CuratorEmbedError, SourceError, UsageError
from curator_embed.execution.certificate import certificate_notes, certificates
from curator_embed.execution.clients import some_client
from curator_embed.execution.driver import Driver
from curator_embed.execution.embedding import EmbeddingWork
from curator_embed.execution.job import FaultKind, ShardJob, ShardReport
from curator_embed.execution.placing import place_on_workers
from curator_embed.execution.report import RunReport
from curator_embed.execution.survey import look, survey
from curator_embed.execution.workers import cores_per_worker
from curator_embed.sources.path_list import cut_otherwise, to_fit
from curator_embed.sources.shard import Shard
from curator_embed.steps import BatchStep, Settings, Step
from curator_embed.storage.files import fingerprint, is_folder, is_remote, list_files, local_path, redact
from curator_embed.storage.location import Location, Token
from curator_embed.tables.bookkeeping import Bookkeeping
from curator_embed.tables.conflicts import Conflict, ConflictKind
from curator_embed.tables.judge import Judgement
from curator_embed.tables.known_files import fit_to_folder
from curator_embed.tables.lock import OutputLock
from curator_embed.tables.overwriting import Overwriting
from curator_embed.tables.provenance import SETTLED_PER_RUN, counted, recorded_settings
from curator_embed.tables.shard_table import Seen, ShardTable
from curator_embed.tables.writing import clear_temporaries

_REPORT = "report-"

SURVEY_THREADS = {"local": 2, "remote": 16}
"""Threads that read footers: from a local disk more than two only wait for each other."""


_TWICE = "already contains some of this run's rows: the list or images_per_file has changed"


class RunStopped(CuratorEmbedError):
    """The run could not go on to its end; what was finished is kept.

    Attributes:
        summary: what happened, without what ``report`` tells already.
        report: the account so far.
    """

    def __init__(self, summary: str, report: RunReport, example: str = "") -> None:
        self.summary, self.report = summary, report
        super().__init__(f"{summary}. {example}" if example else summary)


class RowsFailed(RunStopped):
    """``on_error="raise"`` and some rows failed."""


@dataclass
class RunPlan:
    """What a run would do, from footers and file sizes alone.

    Attributes:
        job: with threads and compile settled.
        shards: in order; ``surveys`` belong to them.
        rows: rows that are left to be worked on, where known; ``rows_known`` says whether all are.
        bytes_to_write: estimate of what the output takes, None when rows are not known.
        bytes_free: on the output's disk; None where that has no meaning (object stores).
        overlapping: files in the output that hold rows of these shards under other names.
        versions: of every shard's file as it is now, by shard; None where there is none.
    """

    job: ShardJob
    shards: list[Shard]
    surveys: list[Judgement]
    rows: int = 0
    rows_known: bool = True
    bytes_to_write: int | None = None
    bytes_free: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    overlapping: list[Conflict] = field(default_factory=list)
    versions: dict[str, Token | None] = field(default_factory=dict)

    @property
    def todo(self) -> list[int]:
        """Positions of the shards that are not done."""
        return [position for position, found in enumerate(self.surveys) if not found.done]

    def finished(self, position: int) -> ShardReport:
        """The report of a shard that is done, from its footer; rows are counted where it does not say."""
        shard, found = self.shards[position], self.surveys[position]
        report = ShardReport.of_finished(shard.name, found.footer, with_dropped=self.job.output is not None)
        if not found.footer.counts:
            report.take(ShardTable.open(self.job.target(shard), self.job.storage_options).counts())
        return report

    def conflicts(self) -> list[Conflict]:
        """Rows that would be there twice, and every shard that must not be written as asked."""
        return self.overlapping + [found.conflict for found in self.surveys if found.conflict is not None]

    def notes(self) -> list[str]:
        """What a person should know of shards that are done."""
        return [note for found in self.surveys for note in found.notes]


def make_plan(
    shards: Sequence[Shard],
    job: ShardJob,
    *,
    cores: int,
    limit: int | None = None,
    tasks: int = 1,
    overwriting: Overwriting | None = None,
) -> RunPlan:
    """Read all footers, settle threads and compile, and estimate the work.

    Args:
        cores: CPU cores a worker has, for the forward pass.
        limit: only so many rows are wanted.
        tasks: tasks that run at a time, on all workers together.
        overwriting: what an overwriting run that was stopped has left; None where that does not matter.
    """
    unsettled = job
    where = "remote" if any(is_remote(job.target(shard)) for shard in shards[:1]) else "local"
    with ThreadPoolExecutor(SURVEY_THREADS[where]) as pool:
        looks = list(pool.map(lambda shard: look(unsettled, shard), shards))
        known = [_first(*(table.stored.rows for table in (seen.target, seen.table) if table)) for seen in looks]
        unknown = [position for position, rows in enumerate(known) if rows is None]
        for position, rows in zip(unknown, pool.map(lambda p: shards[p].row_estimate(), unknown), strict=True):
            known[position] = rows
    _refuse_without_images(job, looks)
    images = None if any(rows is None for rows in known) else sum(rows or 0 for rows in known)
    if limit is not None:
        images = limit if images is None else min(images, limit)
    footers = [seen.carried.footer for seen in looks if seen.carried is not None]
    steps = tuple(_settle(step, footers, cores, images) for step in job.steps)
    job = dataclasses.replace(job, steps=steps)
    versions = {shard.name: seen.target.token for shard, seen in zip(shards, looks, strict=True)}
    if overwriting is not None:
        left = overwriting.begin(versions).versions
        shards = [shard.replacing(left.get(shard.name)) for shard in shards]
    surveys = [survey(job, shard, limit, seen)[0] for shard, seen in zip(shards, looks, strict=True)]
    needed = {position for found in surveys for position in found.todo}
    not_needed = frozenset(range(len(steps))) - needed
    job = dataclasses.replace(job, not_needed=not_needed, dimensions=_dimensions(job, surveys))
    plan = RunPlan(job, list(shards), surveys, versions=versions)
    open_rows = [known[position] for position in plan.todo]
    plan.rows = sum(rows or 0 for rows in open_rows)
    plan.rows_known = None not in open_rows
    if limit is not None:
        plan.rows = min(plan.rows, limit)
    plan.bytes_to_write = _bytes_to_write(plan, tasks) if plan.rows_known else None
    plan.bytes_free = _bytes_free(job, plan.shards)
    plan.settings = {name: _settings(step) for step in steps for name in step.columns()}
    plan.overlapping = _overlapping(job, plan.shards)
    return plan


def _refuse_without_images(job: ShardJob, looks: Sequence[Seen]) -> None:
    """Tables alone have nothing to be embedded: filling columns with nulls would pass for an answer."""
    if job.output is None and job.steps and looks and not any(seen.facts.images for seen in looks):
        first = looks[0].target.stored.path
        column = next(iter(job.steps[0].columns()))
        raise UsageError(
            f"{first}: there are no images beside it, nor beside any other table of this dataset, so '{column}' would "
            "have no value in any row. Open the dataset where its images are, with metadata_path= for these tables"
        )


def _dimensions(job: ShardJob, surveys: Sequence[Judgement]) -> dict[str, int]:
    """Lengths of the vectors that finished shards have, by column."""
    names = [name for step in job.steps for name in step.columns()]
    found: dict[str, int] = {}
    for one in surveys:
        for name in names if one.done else ():
            entry = one.footer.columns.get(name)
            if entry is not None and entry.dimension is not None:
                found.setdefault(name, entry.dimension)
    return found


def _overlapping(job: ShardJob, shards: Sequence[Shard]) -> list[Conflict]:
    """Files in the output folder that hold the same rows cut in another way; readers of the folder would see both."""
    if not shards or not shards[0].by_position or shards[0].grows:
        return []
    folder = job.target(shards[0]).rpartition("/")[0]
    if not is_folder(folder, job.storage_options):
        return []
    found = list_files(folder, ".parquet", job.storage_options)
    stems = [path.rpartition("/")[2].removesuffix(".parquet") for path in found]
    own = [shard.name for shard in shards]
    return [
        Conflict(
            ConflictKind.CUT_OTHERWISE,
            f"{redact(folder)}/{stem}.parquet",
            _TWICE,
            f"{to_fit(stems, own)}, or choose another output path",
        )
        for stem in cut_otherwise(stems, own)
    ]


def fit_to_output(shards: Sequence[Shard], job: ShardJob) -> tuple[list[Shard], list[str]]:
    """A dataset that grows, cut as the files have it that are in the folder it is written to; and what to tell.

    Raises:
        UsageError: two files have a row for the same image, or a file stands in the way.
    """
    folder = job.target(shards[0]).rpartition("/")[0]
    own = job.output is None
    return fit_to_folder(shards, folder, id_col=job.id_col, storage_options=job.storage_options, own=own)


def _check_partitions(before: Sequence[Shard], now: Sequence[Shard], job: ShardJob) -> None:
    """Raises UsageError where values that were computed shard by shard would meet other shards."""
    if [shard.name for shard in before] == [shard.name for shard in now] and all(
        one is other or one.keys(id_col=job.id_col) == other.keys(id_col=job.id_col)
        for one, other in zip(before, now, strict=True)
    ):
        return
    folder = redact(job.target(now[0]).rpartition("/")[0])
    raise UsageError(
        f"{folder}: its files hold other images than the partitions of the metadata that columns were assigned to. "
        f"Nothing was changed. Open the dataset with metadata_path='{folder}' and assign the columns to that, or "
        "choose another output path"
    )


def _first(*values: int | None) -> int | None:
    return next((value for value in values if value is not None), None)


def _settle(step: Step, footers: Sequence[Any], cores: int, images: int | None) -> Step:
    """Fix threads and compile for a whole run; a resumed run takes over what finished shards used."""
    if not isinstance(step, BatchStep) or step.reads_own_shards:
        return step
    recorded = recorded_settings(footers, step) or {}
    threads, compiled = recorded.get("threads"), recorded.get("compile")
    settings = Settings(threads=int(threads or cores), compile=None if compiled is None else bool(compiled))
    return step.settled(settings=settings, images=images)


def _settings(step: Step) -> dict[str, Any]:
    recipe = step.recipe()
    return {key: recipe[key] for key in ("model", "device", "batch_shape", "threads", "compile") if key in recipe}


def _bytes_to_write(plan: RunPlan, tasks: int) -> int:
    """Embeddings hardly compress: rows x dim x item size, and the columns that are copied."""
    per_row = 0
    for step in plan.job.steps:
        dim = step.embedding_dim if isinstance(step, BatchStep) else None
        for kind in step.columns().values():
            per_row += (dim or 0) * kind.value_type.bit_width // 8 if pa.types.is_list(kind) else 16
    total = plan.rows * per_row
    todo = [(shard, table) for p in plan.todo if (table := (shard := plan.shards[p]).table_path()) is not None]
    sizes = [int(fingerprint(table, plan.job.storage_options).get("size") or 0) for _, table in todo]
    if plan.job.output is None:
        # Only of the files that are being replaced both versions exist, for a moment.
        return total + sum(sorted(sizes)[-max(1, tasks) :])
    return total + int(sum(sizes) * _copied_share(todo, plan.job))


def _copied_share(tables: Sequence[tuple[Shard, str]], job: ShardJob) -> float:
    """How much of the tables a new output copies, by the first that can be read: they are much alike."""
    for shard, path in tables:
        if job.select is None and not shard.image_columns:
            return 1.0
        try:
            with Location.of(path, job.storage_options).open_parquet() as parquet:
                schema, found = parquet.schema_arrow, parquet.metadata
        except (SourceError, FileNotFoundError):
            continue
        wanted = set(schema.names) - set(shard.image_columns) if job.select is None else {job.id_col, *job.select}
        copied = total = 0
        for group in range(found.num_row_groups):
            for number in range(found.num_columns):
                column = found.row_group(group).column(number)
                path_in = column.path_in_schema
                total += column.total_compressed_size
                if any(path_in == name or path_in.startswith(f"{name}.") for name in wanted):
                    copied += column.total_compressed_size
        return copied / total if total else 1.0
    return 1.0


def _bytes_free(job: ShardJob, shards: Sequence[Shard]) -> int | None:
    if not shards:
        return None
    folder = Location.of(job.output or job.target(shards[0]), job.storage_options)
    if not folder.is_local:
        return None
    path = folder.path
    while path and not os.path.isdir(path):
        path = os.path.dirname(path)
    return shutil.disk_usage(path or "/").free


def check_plan(plan: RunPlan) -> None:
    """Refuse what cannot end well, before anything is computed.

    Raises:
        UsageError: files in the way, or too little disk.
    """
    conflicts = plan.conflicts()
    if conflicts:
        first = conflicts[0]
        alike = sum(other.kind is first.kind for other in conflicts) - 1
        more = f" ({alike} more {'file' if alike == 1 else 'files'} like it)" if alike else ""
        raise UsageError(f"{first}{more}. Nothing was changed. {first.advice}")
    if plan.bytes_to_write and plan.bytes_free is not None and plan.bytes_to_write > plan.bytes_free:
        raise UsageError(
            f"the output needs about {_gigabytes(plan.bytes_to_write)} and its disk has "
            f"{_gigabytes(plan.bytes_free)} free. Free some space or choose another output path"
        )


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.2f} GB"


def execute(
    shards: Sequence[Shard],
    job: ShardJob,
    *,
    limit: int | None = None,
    progress: bool = True,
    certify: bool = False,
    afterwards: Callable[[ShardJob], None] | None = None,
    as_cut: bool = False,
) -> tuple[RunReport, RunPlan]:
    """Carry a job out on the current Dask client, or on one in-process worker.

    Args:
        limit: only the first so many rows.
        progress: show a progress bar.
        certify: compare the embedders' preprocessing with their models' own first; the report keeps the figures.
        afterwards: what else is done to the finished output while nobody else may write it.
        as_cut: the shards must stay cut as they are: values were computed for each.

    Returns:
        The report, and the plan, whose shards are those that were worked on.

    Raises:
        UsageError: the job cannot be carried out as asked; nothing was changed.
        OutputLocked: another run holds the output.
        RowsFailed: ``on_error="raise"`` and rows failed.
        RunStopped: some shards could not be used, or the run was asked to stop; the rest is finished.
    """
    targets = _target_folders(job, shards)
    for target in targets:
        check_writable(target)
    books = [Bookkeeping.of(target, job.state, job.storage_options) for target in targets]
    part = shards[0].part
    own = {shard.name for shard in shards} if part else None
    with ExitStack() as stack:
        locks = [stack.enter_context(OutputLock(book, part)) for book in books]
        client = stack.enter_context(some_client())
        job = dataclasses.replace(place_on_workers(client, job), must_see=_must_see(shards[0], locks[0]))
        tasks = sum(client.nthreads().values())
        given = shards
        shards, told = fit_to_output(given, job)
        if as_cut:
            _check_partitions(given, shards, job)
        overwriting = Overwriting(books[0], part, _asked(job, limit)) if job.overwrite else None
        plan = make_plan(shards, job, cores=cores_per_worker(client), limit=limit, tasks=tasks, overwriting=overwriting)
        check_plan(plan)
        for target in targets:
            make_folder(target)
            clear_temporaries(target, own)
        if overwriting is not None:
            overwriting.keep()
        notes = [*told, *_carried_over(job, shards), *_read_elsewhere(plan, books[0]), *plan.notes()]
        certificate = certificates(plan.job, shards) if certify else {}
        if certify:
            notes += certificate_notes(certificate, plan.job.steps)
        report = RunReport(settings=plan.settings, certificate=certificate)
        for note in notes:
            report.note(note)
        report.images_below = shards[0].images_below
        report.output = redact(job.output or job.target(shards[0]).rpartition("/")[0])
        started = time.perf_counter()
        with _stop_requests() as stop:
            Driver(client, _work(plan, limit), report, stop, locks).run(progress)
        report.wall_seconds = time.perf_counter() - started
        lost = next((lock for lock in locks if lock.lost.is_set()), None)
        if lost is not None and report.shards["left"]:
            report.stopped = False
            report.ended = (
                f"{lost.file.path}: the lock is no longer this run's: it could not be renewed, or another run took it. "
                "Shards that were finished are kept; see that no other run writes there and run again"
            )
        if lost is None:  # else they may be the next run's
            for target in targets:
                clear_temporaries(target, own)  # of workers that died meanwhile
            if overwriting is not None and not (report.faults or report.stopped or report.ended):
                overwriting.end()
        _keep(report, books[0])
        _raise_for(report)
        if afterwards is not None:
            afterwards(plan.job)
    return report, plan


def _work(plan: RunPlan, limit: int | None) -> EmbeddingWork:
    """The plan's open shards as work for a driver."""
    done = [position for position, found in enumerate(plan.surveys) if found.done]
    return EmbeddingWork(
        plan.shards,
        plan.job,
        todo=plan.todo,
        finished=map(plan.finished, done),
        total=plan.rows if plan.rows_known else None,
        limit=limit,
        rows={} if limit is None else {position: plan.surveys[position].rows for position in plan.todo},
    )


def _asked(job: ShardJob, limit: int | None) -> dict[str, Any]:
    """What an overwriting run makes: one that makes something else begins anew."""
    made = {
        name: counted(recipe, without=SETTLED_PER_RUN)
        for step, recipe in zip(job.steps, job.recipes, strict=True)
        for name in step.columns()
    }
    return {"columns": made, "id_col": job.id_col, "options": job.output_options(limit), "output": job.output or ""}


def _must_see(shard: Shard, lock: OutputLock) -> tuple[str, ...]:
    """Files by which a worker proves that it is on the same disks: the first shard, and the lock of the output."""
    first = shard.image_source()
    proofs = [] if first is None or is_remote(first) else [local_path(first)]
    proofs += [lock.file.path] if lock.file.is_local else []
    return tuple(path for path in proofs if os.path.exists(path))


def _carried_over(job: ShardJob, shards: Sequence[Shard]) -> list[str]:
    """Tables that lie beside the images by default bring their columns along: say so where nobody may expect it."""
    table = shards[0].table_path()
    if job.output is None or job.select is not None or table is None or not shards[0].by_position:
        return []
    if table != shards[0].own_table() or shards[0].named_tables is not None:
        return []
    return [f"the columns of {redact(table.rpartition('/')[0])} are carried over; columns= chooses others"]


def _read_elsewhere(plan: RunPlan, book: Bookkeeping) -> list[str]:
    """Say so when finished files were made of images below another root: the same ones mounted elsewhere, or others.

    The last report tells, and no footer: outputs of one list are to compare byte for byte wherever it is mounted.
    """
    place, done = plan.shards[0].images_below, len(plan.shards) - len(plan.todo)
    if not place or not done:
        return []
    kept = book.names(_REPORT)
    last = book.read(kept[-1]) if kept else None
    before = last.get("images_below") if isinstance(last, dict) else None
    if not before or before == place:
        return []
    return [
        f"the last run read its images below {before}, this one below {place}. Finished files ({done}) are kept, "
        "because only lines are compared; if these are other images, pass overwrite=True"
    ]


def _output_folder(job: ShardJob, shard: Shard) -> Location:
    """Where a shard's parquet goes; of a link in place: where the file itself lies."""
    if job.output is not None:
        return Location.of(job.output, job.storage_options)
    target = Location.of(job.target(shard), job.storage_options)
    if target.is_local:
        target = Location(target.fs, os.path.realpath(target.path))
    return Location(target.fs, target.parent)


def _target_folders(job: ShardJob, shards: Sequence[Shard]) -> list[Location]:
    """Every folder that is written to, in an order that all runs share."""
    written = shards if job.output is None else shards[:1]
    folders = {(folder := _output_folder(job, shard)).path: folder for shard in written}
    return [folders[path] for path in sorted(folders)]


def check_writable(folder: Location) -> None:
    """See that files can be made in a local folder, or the folder itself; leaves nothing behind.

    Raises:
        UsageError: they cannot.
    """
    if not folder.is_local:
        return
    there = folder.path
    while there and not os.path.lexists(there):
        there = os.path.dirname(there)
    try:
        if not os.path.isdir(there):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), there)
        probe = f"{there.rstrip('/')}/.curator_embed.{secrets.token_hex(4)}"
        with open(probe, "wb"):
            pass
        os.unlink(probe)
    except OSError as error:
        raise _unwritable(folder, error) from error


def make_folder(folder: Location) -> None:
    """Make a local folder.

    Raises:
        UsageError: it cannot be made.
    """
    if folder.is_local:
        try:
            os.makedirs(folder.path, exist_ok=True)
        except OSError as error:
            raise _unwritable(folder, error) from error


def _unwritable(folder: Location, error: OSError) -> UsageError:
    return UsageError(
        f"{folder.path}: cannot write there ({error.strerror}). Choose another output path or change the permissions; "
        "nothing was computed"
    )


def _keep(report: RunReport, book: Bookkeeping) -> None:
    """Leave the report beside the output; times and dates live here and not in the parquet files.

    The output is finished by then: a report that cannot be kept is told, and is no reason to call it failed.
    """
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    name = f"{_REPORT}{stamp}-{secrets.token_hex(2)}.json"
    try:
        book.write(name, {"finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **report.to_dict()})
    except Exception as error:  # every file system has exceptions of its own
        report.note(
            f"{redact(book.file(name).path)}: the report could not be kept there ({type(error).__name__}: "
            f"{redact(str(error))}); the output is not affected"
        )


def _raise_for(report: RunReport) -> None:
    faults = sorted(report.faults.items())
    rows = [fault for _, fault in faults if fault.kind is FaultKind.FAILED_ROWS]
    if rows:
        raise RowsFailed("rows failed, under on_error='raise'", report, rows[0].message)
    if report.stopped:
        raise RunStopped(
            f"stopped as asked with {report.shards['left']} shards left; run the same again to go on from there", report
        )
    if report.ended:
        raise RunStopped(report.ended, report)
    if faults:
        shard, fault = faults[0]
        count, total = len(faults), sum(report.shards.values())
        which = f"{count} of {total} shards could not be worked on; the others are finished"
        if count == total:
            which = (
                "the shard could not be worked on" if total == 1 else f"none of the {total} shards could be worked on"
            )
        raise RunStopped(which, report, f"{shard}: {fault}")


@contextmanager
def _stop_requests() -> Iterator[threading.Event]:
    """Ctrl-C and SIGTERM ask once for an orderly end; a second Ctrl-C interrupts."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, frame: Any) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()
        tqdm.write("stopping: shards in flight are being finished (press Ctrl-C again to drop them)", file=sys.stderr)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
