"""A run from plan to report: embed what is left to do, and keep what became of it.

The shards themselves are the workers' (``driver.py`` hands them out).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from distributed import Client

from curator_embed.execution.carry_out import (
    REPORT,
    RowsFailed,
    RunStopped,
    carry_out,
    hold,
    keep_report,
    must_see,
    raise_for,
)
from curator_embed.execution.certificate import certificate_notes, certificates
from curator_embed.execution.clients import some_client
from curator_embed.execution.embedding import EmbeddingWork
from curator_embed.execution.job import ShardJob
from curator_embed.execution.placing import place_on_workers
from curator_embed.execution.report import RunReport
from curator_embed.execution.run_plan import RunPlan, check_partitions, check_plan, fit_to_output, make_plan
from curator_embed.execution.work import Work
from curator_embed.execution.workers import cores_per_worker
from curator_embed.sources.shard import Shard
from curator_embed.storage.files import redact
from curator_embed.storage.location import Location
from curator_embed.tables.bookkeeping import Bookkeeping
from curator_embed.tables.overwriting import Overwriting, forget
from curator_embed.tables.provenance import SETTLED_PER_RUN, counted

__all__ = ["RowsFailed", "RunStopped", "execute"]


def execute(
    shards: Sequence[Shard],
    job: ShardJob,
    *,
    limit: int | None = None,
    progress: bool = True,
    certify: bool = False,
    then: Callable[[Client, ShardJob], Work] | None = None,
) -> tuple[RunReport, RunPlan]:
    """Carry a job out on the current Dask client, or on one in-process worker.

    Args:
        limit: only the first so many rows.
        progress: show a progress bar.
        certify: compare the embedders' preprocessing with their models' own first; the report keeps the figures.
        then: makes what else is done to the finished output, while nobody else may write it, from the client and the
            job as it is carried out. Its units belong to these very shards, which must then stay cut as they are.

    Returns:
        The report, and the plan, whose shards are those that were worked on.

    Raises:
        UsageError: the job cannot be carried out as asked; nothing was changed.
        OutputLocked: another run holds the output.
        RowsFailed: ``on_error="raise"`` and rows failed.
        RunStopped: some shards could not be used, or the run was asked to stop; the rest is finished.
    """
    part = shards[0].part
    own = {shard.name for shard in shards} if part else None
    with ExitStack() as stack:
        folders = _target_folders(job, shards)
        held = stack.enter_context(
            hold(folders, part=part, state=job.state, stems=own, storage_options=job.storage_options)
        )
        client = stack.enter_context(some_client())
        job = dataclasses.replace(place_on_workers(client, job), must_see=must_see(shards[0], held.locks[0]))
        tasks = sum(client.nthreads().values())
        given = shards
        shards, told = fit_to_output(given, job)
        afterwards = None
        if then is not None:
            check_partitions(given, shards, job)
            afterwards = then(client, job)
        overwriting = Overwriting(held.books[0], part, _asked(job, limit)) if job.overwrite else None
        plan = make_plan(shards, job, cores=cores_per_worker(client), limit=limit, tasks=tasks, overwriting=overwriting)
        check_plan(plan)
        held.make()
        if overwriting is not None:
            overwriting.keep()
        elif plan.todo or then is not None:
            forget(held.books[0], part)
        notes = [*told, *_carried_over(job, shards), *_read_elsewhere(plan, held.books[0]), *plan.notes()]
        if overwriting is not None and overwriting.made:
            notes.append(
                f"goes on with the overwriting run of {overwriting.begun}: {overwriting.made} files that it made anew "
                "are kept"
            )
        certificate = certificates(plan.job, shards) if certify else {}
        report = RunReport(settings=plan.settings, certificate=certificate)
        for note in (*notes, *(certificate_notes(certificate, plan.job.steps) if certify else ())):
            report.note(note)
        report.images_below = shards[0].images_below
        report.output = redact(job.output or job.target(shards[0]).rpartition("/")[0])
        carry_out(client, _work(plan, limit), report, held, progress)
        if afterwards is not None and report.whole:
            after = RunReport()
            carry_out(client, afterwards, after, held, progress)
            report.follow(after)
        if overwriting is not None and report.whole:
            overwriting.end()
        keep_report(report, held.books[0])
        raise_for(report)
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
    kept = book.names(REPORT)
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
