"""Embedding runs as work for the driver: shards go through their worker's pipeline.

Here is decided what becomes of shards of which not one row was embedded: they are held until it is known whether
anything of the dataset can be read at all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from curator_embed.execution.group import run_group
from curator_embed.execution.job import Fault, FaultKind, ShardJob, ShardReport
from curator_embed.execution.report import RunReport
from curator_embed.execution.work import Job, Round, Task, Work, groups_of
from curator_embed.sources.shard import Shard


@dataclass(frozen=True)
class EmbeddingJob(Job):
    """What ``job`` says is done to every shard; of each at most ``limit`` rows."""

    job: ShardJob
    limit: int | None = None

    @property
    def must_see(self) -> tuple[str, ...]:  # type: ignore[override]
        """See ``Job.must_see``."""
        return self.job.must_see

    def run(self, units: Sequence[Shard], given: Sequence[None], task: Task) -> list[ShardReport | None]:
        """See ``Job.run``."""
        with task.pipeline(self.job) as pipeline:
            if pipeline is None:
                return [None] * len(units)
            return run_group(
                units, self.job, pipeline, self.limit, stopping=task.stopping, giving_back=task.giving_back
            )


class EmbeddingWork(Work):
    """The shards of a dataset.

    Args:
        shards: all of them.
        job: what is done to each.
        todo: positions of those that are not done.
        finished: reports of the others.
        total: images that are left, where known.
        limit: only the first so many rows.
        rows: with a limit: rows of the shards at ``todo``, where known.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        job: ShardJob,
        *,
        todo: Sequence[int],
        finished: Iterable[ShardReport] = (),
        total: int | None = None,
        limit: int | None = None,
        rows: Mapping[int, int | None] | None = None,
    ) -> None:
        self.units: Sequence[Shard] = shards
        self.todo, self.total = todo, total
        self.job, self.limit = job, limit
        self.stop_at_fault = job.on_error == "raise"
        self.threads = {"decode": job.decode_threads}
        self._finished, self._rows = finished, rows or {}
        self._held: dict[int, int | None] = {}  # position -> the limit it was read with
        self._held_rows, self._first_held = 0, (len(shards), "")
        self._limit_now: int | None = None

    def finished(self) -> Iterator[ShardReport]:
        """Reports of finished shards. With ``on_error="raise"`` their failed rows count as this run's would."""
        for report in self._finished:
            if self.stop_at_fault and report.failed:
                report.fault = Fault(
                    FaultKind.FAILED_ROWS,
                    f"{report.shard}: {report.failed} of {report.read} rows failed in the run that finished this "
                    "shard; use on_error='keep' or on_error='drop' to go on without them",
                )
            yield report

    def rounds(self, workers: int, report: RunReport) -> Iterator[Round]:
        """All shards beside each other, or with a limit one after another until it is reached; held ones last."""
        if self.limit is None:
            yield Round(self._groups(self.todo, workers), EmbeddingJob(self.job))
        else:
            yield from self._in_order(self.limit, report)
        if not self._held:
            return
        if not report.embedded:
            report.ended = self._nothing_readable()
            return
        held, self._held = self._held, {}
        job = dataclasses.replace(self.job, write_unreadable=True)
        if self.limit is None:
            yield Round(self._groups(sorted(held), workers), EmbeddingJob(job))
        else:
            for position, limit in held.items():
                yield Round([(position,)], EmbeddingJob(job, limit))

    def _in_order(self, limit: int, report: RunReport) -> Iterator[Round]:
        for position in self.todo:
            left = limit - report.read - self._held_rows
            if left <= 0:
                return
            rows = self._rows.get(position)
            self._limit_now = None if rows is not None and rows <= left else left
            yield Round([(position,)], EmbeddingJob(self.job, self._limit_now))

    def hold(self, position: int, report: ShardReport) -> None:
        """Not one row of this shard was embedded. That is its own images' fault only if others can be read."""
        self._held[position] = self._limit_now
        self._held_rows += report.read
        self._first_held = min(self._first_held, (position, str(report.fault)))

    def place(self, position: int) -> str:
        """Where the shard's images are."""
        return self.units[position].image_source() or self.units[position].name

    def _groups(self, positions: Sequence[int], workers: int) -> list[tuple[int, ...]]:
        sizes = [int(self.units[position].fingerprint().get("size") or 0) for position in positions]
        return groups_of(positions, sizes, workers)

    def _nothing_readable(self) -> str:
        which = "the shard" if len(self._held) == 1 else f"the first of {len(self._held)} shards"
        return (
            "nothing of the dataset could be embedded, so nothing was written: not one image of it could be read or "
            f"used. {which[0].upper()}{which[1:]}: {self._first_held[1]}. Correct that and run again"
        )
