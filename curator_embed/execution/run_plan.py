"""What a run would do: shards that are left, what stands in the way, bytes to write; from footers and sizes only."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from curator_embed.errors import UsageError
from curator_embed.execution.job import ShardJob, ShardReport
from curator_embed.execution.survey import look, survey, unfaithful
from curator_embed.sources.path_list import cut_otherwise, to_fit
from curator_embed.sources.shard import Shard
from curator_embed.steps import BatchStep, Settings, Step
from curator_embed.storage.files import fingerprint, is_folder, is_remote, list_files, redact
from curator_embed.storage.location import Location, Token
from curator_embed.tables.conflicts import Conflict, ConflictKind
from curator_embed.tables.judge import Judgement
from curator_embed.tables.known_files import fit_to_folder
from curator_embed.tables.overwriting import Overwriting
from curator_embed.tables.provenance import ERROR_COLUMN, recorded_settings
from curator_embed.tables.shard_table import Seen, ShardTable
from curator_embed.tables.splicing import Layout, NotCopied

SURVEY_THREADS = {"local": 2, "remote": 16}
"""Threads that read footers: from a local disk more than two only wait for each other."""


_TWICE = "already contains some of this run's rows: the list or images_per_file has changed"


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
        also: columns of ours that finished files have and this run does not make.
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
    also: list[str] = field(default_factory=list)

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
        notes = [note for found in self.surveys for note in found.notes]
        new = [position for position in self.todo if self.versions.get(self.shards[position].name) is None]
        if self.also and new and len(new) < len(self.shards):
            notes.append(
                f"finished files also have the columns {', '.join(self.also)}, and the {len(new)} that are written now "
                "will not: make these columns in a further run, or some readers cannot read the files together"
            )
        return notes


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
    judged = [survey(job, shard, limit, seen) for shard, seen in zip(shards, looks, strict=True)]
    surveys = _refuse_unfaithful(job, shards, judged, limit)
    made = {ERROR_COLUMN, *(name for step in steps for name in step.columns())}
    also = sorted({name for found in surveys if found.done for name in found.footer.columns} - made)
    needed = {position for found in surveys for position in found.todo}
    if needed and not any(seen.facts.images for seen in looks):
        raise _without_images(job, looks)
    not_needed = frozenset(range(len(steps))) - needed
    job = dataclasses.replace(job, not_needed=not_needed, dimensions=_dimensions(job, surveys))
    surveys = [dataclasses.replace(found, footer=found.footer.only_counts()) for found in surveys]
    plan = RunPlan(job, list(shards), surveys, versions=versions, also=also)
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


def _refuse_unfaithful(
    job: ShardJob, shards: Sequence[Shard], judged: Sequence[tuple[Judgement, Seen]], limit: int | None
) -> list[Judgement]:
    """The judgements, with a conflict where a table could not be written back as it is.

    One of each kind of table is looked at, because the tables of a dataset are much alike; workers look at every one.
    """
    kinds: dict[tuple[str, ...], Conflict | None] = {}
    found: list[Judgement] = []
    for shard, (judgement, seen) in zip(shards, judged, strict=True):
        table = seen.target if job.output is None else seen.table
        schema = None if table is None or judgement.done else table.stored.schema
        if schema is not None:
            kind = tuple(schema.names)
            if kind not in kinds:
                kinds[kind] = unfaithful(job, shard, judgement, seen, limit)
            if (conflict := kinds[kind]) is not None and judgement.conflict is None:
                judgement = dataclasses.replace(judgement, todo=(), conflict=conflict)
        found.append(judgement)
    return found


def _refuse_without_images(job: ShardJob, looks: Sequence[Seen]) -> None:
    """Tables alone have nothing to be embedded: filling columns with nulls would pass for an answer."""
    if job.output is None and job.steps and looks and not any(seen.facts.images for seen in looks):
        raise _without_images(job, looks)


def _without_images(job: ShardJob, looks: Sequence[Seen]) -> UsageError:
    first = looks[0].table or looks[0].target
    column = next(iter(job.steps[0].columns()))
    return UsageError(
        f"{first.stored.path}: there are no images beside it, nor beside any other table of this dataset, so "
        f"'{column}' would have no value in any row. Open the dataset where its images are, with metadata_path= for "
        "these tables"
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


def check_partitions(before: Sequence[Shard], now: Sequence[Shard], job: ShardJob) -> None:
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
    if not isinstance(step, BatchStep):
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
            with Location.of(path, job.storage_options).open_bytes() as file:
                layout = Layout.read(file)
        except (NotCopied, OSError):
            continue
        names = {column.name for column in layout.columns}
        wanted = names - set(shard.image_columns) if job.select is None else {job.id_col, *job.select}
        copied, total = layout.stored_bytes(wanted), layout.stored_bytes(names)
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
    _refuse(plan.conflicts())
    if plan.bytes_to_write and plan.bytes_free is not None and plan.bytes_to_write > plan.bytes_free:
        raise UsageError(
            f"the output needs about {_gigabytes(plan.bytes_to_write)} and its disk has "
            f"{_gigabytes(plan.bytes_free)} free. Free some space or choose another output path"
        )


def check_shown(plan: RunPlan) -> None:
    """Refuse stored columns that a data frame would show as those of the pending steps.

    Raises:
        UsageError: a column is there that the steps did not make, or tables and images do not belong together.
    """
    _refuse([conflict for conflict in plan.conflicts() if conflict.kind not in _ONLY_WRITING], _SAVE_FIRST)


_ONLY_WRITING = frozenset({ConflictKind.UNFAITHFUL, ConflictKind.CUT_OTHERWISE})
"""Conflicts of tables whose rows can be shown all the same."""

_SAVE_FIRST = "Call save_metadata(overwrite=True) first to replace what is there, or choose another column name"


def _refuse(conflicts: Sequence[Conflict], instead: str = "") -> None:
    """Raise a UsageError that tells of the first of these, if there is one.

    Args:
        instead: what to do where the advice would be to overwrite.
    """
    if not conflicts:
        return
    first = conflicts[0]
    alike = sum(other.kind is first.kind for other in conflicts) - 1
    more = f" ({alike} more {'file' if alike == 1 else 'files'} like it)" if alike else ""
    advice = instead if instead and first.overwritable and not first.remedy else first.advice
    raise UsageError(f"{first}{more}. Nothing was changed. {advice}")


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.2f} GB"
