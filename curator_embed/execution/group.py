"""Several shards, one after another, on one worker's pipeline: the next is read while the last is being embedded.

Faults become reports here: a shard that cannot be used never costs its neighbours.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from curator_embed.errors import StepError
from curator_embed.execution.job import ShardJob, ShardReport, fault_of
from curator_embed.execution.shard_run import ShardRun
from curator_embed.pipeline.pipeline import Pipeline
from curator_embed.sources.shard import Shard

MAX_OPEN_SHARDS = 8
"""Shards of one group that may wait for the model at a time; groups hold small shards only."""
ASK_EVERY_S = 0.2
"""How often a group that waits for its shards looks whether they are wanted back."""


def _no() -> bool:
    return False


def run_group(
    shards: Sequence[Shard],
    job: ShardJob,
    pipeline: Pipeline,
    limit: int | None = None,
    *,
    stopping: Callable[[], bool] = _no,
    giving_back: Callable[[], bool] = _no,
) -> list[ShardReport | None]:
    """Run shards in order. One that cannot be used is reported with its fault; the others go on.

    Args:
        stopping: asked before each shard; once it says yes, those that are begun are finished and no other is.
        giving_back: asked after each shard; once it says yes, those that are through the pipeline are finished, and
            the rest is somebody else's, begun or not.

    Returns:
        As many entries as shards: a report each, None for those that were not worked on. A shard of which not one row
        was embedded is not written and reported as held, with its rows, unless ``job.write_unreadable``.
    """
    reports: list[ShardReport | None] = [None] * len(shards)
    waiting: deque[tuple[int, ShardRun]] = deque()

    def finish() -> None:
        number, run = waiting.popleft()
        with _reporting(number, run, reports, pipeline):
            reports[number] = run.finish()

    for number, shard in enumerate(shards):
        if stopping() or giving_back():
            break
        run = ShardRun(job, shard, pipeline, limit)
        with _reporting(number, run, reports, pipeline):
            if run.begin():
                waiting.append((number, run))
            else:
                reports[number] = run.report
        while waiting and waiting[0][1].opened is not None and waiting[0][1].opened.done():
            finish()
        while len(waiting) > MAX_OPEN_SHARDS:
            finish()
    while waiting:
        opened = waiting[0][1].opened
        assert opened is not None
        while not opened.wait(ASK_EVERY_S) and not giving_back():
            pass
        if opened.done():
            finish()
        else:
            waiting.popleft()[1].abandon()
    done = [report for report in reports if report is not None]
    if done:
        done[-1].seconds, done[-1].queues = pipeline.clock.take(), pipeline.take_queues()
    return reports


@contextmanager
def _reporting(number: int, run: ShardRun, reports: list[ShardReport | None], pipeline: Pipeline) -> Iterator[None]:
    """Turn what is wrong with a shard into its report; what broke the pipeline belongs to no shard, and what a
    step does wrong neither."""
    try:
        yield
    except Exception as error:
        if error is pipeline.fault or isinstance(error, StepError):
            raise
        path = run.shard.image_source() or run.shard.table_path() or run.shard.name
        fault, notes = fault_of(error, path), run.report.notes
        reports[number] = ShardReport(run.shard.name, read=run.report.read, fault=fault, notes=notes)
