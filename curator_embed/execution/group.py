"""Several shards, one after another, on one worker's pipeline: the next is read while the last is being embedded.

Faults become reports here: a shard that cannot be used never costs its neighbours.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from curator_embed.errors import CuratorEmbedError, SourceError, UsageError
from curator_embed.execution.job import FailedRows, Fault, FaultKind, ShardJob, ShardReport
from curator_embed.execution.shard_run import ShardRun
from curator_embed.pipeline.pipeline import Pipeline
from curator_embed.sources.shard import Shard

log = logging.getLogger(__name__)

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
        As many entries as shards: a report each, None for those that were not worked on.
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
    """Turn what is wrong with a shard into its report; what broke the pipeline belongs to no shard."""
    try:
        with _naming(run.shard, pipeline):
            yield
    except (SourceError, UsageError) as error:
        if error is pipeline.fault:
            raise
        kind = FaultKind.FAILED_ROWS if isinstance(error, FailedRows) else FaultKind.UNUSABLE
        reports[number] = ShardReport(run.shard.name, fault=Fault(kind, str(error)), notes=run.report.notes)


@contextmanager
def _naming(shard: Shard, pipeline: Pipeline) -> Iterator[None]:
    """Say which shard an unexpected error belongs to."""
    try:
        yield
    except (CuratorEmbedError, KeyboardInterrupt):
        raise
    except Exception as error:
        if error is pipeline.fault:
            raise
        path = shard.image_source() or shard.table_path() or shard.name
        if isinstance(error, OSError):
            raise SourceError(path, f"cannot be read ({error})", "Check that it exists and may be read") from error
        log.warning("%s: unexpected error", path, exc_info=error)
        raise SourceError(
            path,
            f"could not be worked on ({type(error).__name__}: {error})",
            "The log has the details; the other shards are not affected",
        ) from error
