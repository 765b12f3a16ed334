"""What a run needs of a shard: asked of the one judge (``tables/judge.py``) in the run's own terms."""

from __future__ import annotations

from curator_embed.errors import UsageError
from curator_embed.execution.job import ShardJob
from curator_embed.sources.shard import Shard
from curator_embed.storage.files import redact
from curator_embed.tables.conflicts import Conflict
from curator_embed.tables.judge import Asked, Judgement, Wanted
from curator_embed.tables.provenance import ERROR_COLUMN
from curator_embed.tables.shard_table import Seen
from curator_embed.tables.shard_table import look as look_at


def look(job: ShardJob, shard: Shard) -> Seen:
    """Read a shard's footers."""
    return look_at(
        shard,
        job.target(shard),
        in_place=job.output is None,
        id_col=job.id_col,
        storage_options=job.storage_options,
        uncounted=uncounted(shard),
    )


def uncounted(shard: Shard) -> frozenset[str]:
    """Recipe fields that are written down and do not count: machines with other cores may make parts of one list."""
    return frozenset({"threads"}) if shard.part else frozenset()


def wanted(job: ShardJob) -> tuple[Wanted, ...]:
    """What the job's steps would make."""
    every = zip(job.steps, job.recipes, job.dimensions_wanted, strict=True)
    return tuple(Wanted(tuple(step.columns()), recipe, dimension) for step, recipe, dimension in every)


def asked(job: ShardJob, limit: int | None = None, *, overwrite: bool | None = None) -> Asked:
    """A job as the judge wants it."""
    return Asked(
        wanted(job),
        job.id_col,
        job.output_options(limit),
        job.select,
        job.overwrite if overwrite is None else overwrite,
        redact(job.output or ""),
    )


def survey(job: ShardJob, shard: Shard, limit: int | None = None, seen: Seen | None = None) -> tuple[Judgement, Seen]:
    """Decide from footers alone what a shard needs; reads no rows and no images.

    An overwriting run makes everything anew, but not a second time what it has made: a file that is no longer the one
    that was there when it began (``shard.replaces``) is its own.

    Returns:
        The judgement, and what it was made from.

    Raises:
        UsageError: ``columns=`` names a column that is not there.
    """
    seen = seen or look(job, shard)
    if job.overwrite and seen.target.token is not None and seen.target.token != shard.replaces:
        found = _judged(job, shard, seen, asked(job, limit, overwrite=False))
        if found[0].done:
            return found
    return _judged(job, shard, seen, asked(job, limit))


def unfaithful(job: ShardJob, shard: Shard, found: Judgement, seen: Seen, limit: int | None = None) -> Conflict | None:
    """What of the table could not be written back as it is; None where nothing is to be written, or all of it can be.

    Apart from ``survey``: it reads more of the footer than that, about 50 microseconds a column and row group.
    """
    table = seen.target if job.output is None else seen.table
    if found.done or found.conflict is not None or table is None or not table.exists:
        return None
    if job.output is None:
        return table.unfaithful() if found.todo else None
    made = {name for position in found.todo for name in job.steps[position].columns()} | {ERROR_COLUMN}
    names = [] if table.stored.schema is None else table.stored.schema.names
    held = shard.image_columns
    kept = [name for name in names if name not in held] if job.select is None else [job.id_col, *job.select]
    left_out = limit is not None or job.on_error == "drop"
    return table.unfaithful([name for name in kept if name not in made], other_rows=left_out)


def _judged(job: ShardJob, shard: Shard, seen: Seen, what: Asked) -> tuple[Judgement, Seen]:
    found = seen.judge(what)
    if not found.done and found.conflict is None and seen.table is not None:
        whole = seen.whole(job.storage_options)
        if whole is not seen:
            seen, found = whole, whole.judge(what)
        _check_selected(job, seen)
    return found, seen


def _check_selected(job: ShardJob, seen: Seen) -> None:
    if job.select is None or seen.table is None or seen.table.stored.schema is None:
        return
    names = seen.table.stored.schema.names
    made = {ERROR_COLUMN, *(name for step in job.steps for name in step.columns())}
    missing = [name for name in job.select if name not in names and name not in made]
    if missing:
        raise UsageError(
            f"columns= names {', '.join(missing)}: not in {seen.table.stored.path}, and made by no step (it has: "
            f"{', '.join(names[:12])})"
        )
