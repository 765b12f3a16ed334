"""From a dataset to a run and back: what ``save_metadata`` and ``plan`` do."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from curator_embed.datasets.assigned import assigned_work
from curator_embed.datasets.frames import assigned_columns
from curator_embed.errors import UsageError
from curator_embed.execution.clients import found_client
from curator_embed.execution.job import ShardJob
from curator_embed.execution.placing import Workforce, place
from curator_embed.execution.run import execute
from curator_embed.execution.run_plan import RunPlan, fit_to_output, make_plan
from curator_embed.pipeline.engines import agreed_decode
from curator_embed.storage.location import Location

if TYPE_CHECKING:
    from curator_embed.datasets.image_text_pair import ImageTextPairDataset
    from curator_embed.execution.report import RunReport


def save(
    dataset: ImageTextPairDataset, job: ShardJob, *, certify: bool, limit: int | None, progress: bool
) -> RunReport:
    """See ``ImageTextPairDataset.save_metadata``."""
    _check_arguments(dataset, job, limit)
    assigned = assigned_columns(dataset)
    if assigned is not None and limit is not None:
        raise UsageError("limit= cannot go with columns assigned to the metadata; save without one of them")

    then = None if assigned is None else partial(assigned_work, assigned, dataset.shards)
    report, done = execute(dataset.shards, job, limit=limit, progress=progress, certify=certify, then=then)
    saved = dataset.like([shard.with_table(job.target(shard)) for shard in done.shards], ())
    if limit is None:
        dataset.read_from(saved)
    else:  # a trial: the object stays what it was
        written = [s for s in saved.shards if Location.of(job.target(s), job.storage_options).token() is not None]
        saved = dataset.like(written, ())
    report.dataset = saved
    return report


def plan(
    dataset: ImageTextPairDataset,
    path: str | None,
    *,
    limit: int | None,
    overwrite: bool,
    workforce: Workforce | None = None,
) -> RunPlan:
    """See ``ImageTextPairDataset.plan``; starts nothing.

    Args:
        workforce: who would do the work; by default the workers of the default client, else this process.
    """
    job = dataset.job(path, None, "keep", overwrite)
    _check_arguments(dataset, job, limit)
    if workforce is None:
        client = found_client()
        workforce = Workforce.here() if client is None else Workforce.of(client)
    job = place(job, workforce.gpus)
    shards, _ = fit_to_output(dataset.shards, job)
    return make_plan(shards, job, cores=workforce.cores, limit=limit, tasks=workforce.tasks)


def _check_arguments(dataset: ImageTextPairDataset, job: ShardJob, limit: int | None) -> None:
    if job.on_error not in ("keep", "drop", "raise"):
        raise UsageError(f"on_error={job.on_error!r}: choose 'keep', 'drop' or 'raise'")
    if limit is not None and limit < 1:
        raise UsageError(f"limit={limit}: at least 1")
    if job.output is None:
        for given, why in (
            (job.on_error == "drop", "on_error='drop' removes rows"),
            (job.select is not None, "columns= leaves columns out"),
            (limit is not None, "limit= leaves rows out"),
        ):
            if given:
                raise UsageError(f"{why}, and a dataset's own files never lose anything; give an output path as well")
    if not dataset.shards:
        raise UsageError("the dataset has no shards")
    agreed_decode(dataset.steps)  # steps that contradict each other are told here, not by a worker
