"""What runs inside a Dask worker: the pipeline it keeps between tasks, and the task itself."""

from __future__ import annotations

import asyncio
import hashlib
import os
import pickle
import socket
import sys
import threading
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from distributed import Worker, get_worker
from distributed.protocol.pickle import dumps, loads

from curator_embed.errors import CuratorEmbedError, StepError, UsageError
from curator_embed.execution.job import ShardJob, ShardReport
from curator_embed.execution.shard_run import ShardRun
from curator_embed.execution.values import vector_dtype
from curator_embed.execution.work import Job
from curator_embed.pipeline.engines import CpuEngine, DaliEngine
from curator_embed.pipeline.pipeline import DecodeEngine, Pipeline, PipelineClosed, StageClock
from curator_embed.sources.shard import Shard
from curator_embed.steps import BatchStep
from curator_embed.storage.location import Location
from curator_embed.tables.provenance import ERROR_COLUMN

METRICS = "curator_embed"
"""Name of a worker's figures among those that it sends with every heartbeat."""
PROGRESS_EVERY_S = 0.5
ORPHANED_AFTER_S = 60.0
"""Models that no task has used for so long make room for those of another run; if need be they are loaded again."""
DISK_WITHIN_S = 1.0
"""A network file system may show a new file this much later."""


def build_pipeline(job: ShardJob, on_images: Callable[[int], None] | None = None) -> Pipeline:
    """Load the models and start the threads for a job on this process's device."""
    models = {
        position: step.load_model(job.device, job.model_threads)
        for position, step in enumerate(job.steps)
        if isinstance(step, BatchStep) and not step.reads_own_shards and position not in job.not_needed
    }
    return Pipeline(
        build_engine(job),
        models,
        [position for position in range(len(job.steps)) if position not in models and position not in job.not_needed],
        threads=job.decode_threads,
        dtypes={position: vector_dtype(job.steps[position]) for position in models},
        on_images=on_images,
    )


def build_engine(job: ShardJob) -> DecodeEngine:
    """The decode engine a job asks for; "dali" runs where the job's models do."""
    if job.engine == "cpu":
        return CpuEngine(job.steps)
    if job.engine == "dali":
        return DaliEngine(job.steps, device=job.device, threads=job.decode_threads)
    raise UsageError(f"there is no decode engine '{job.engine}'; choose 'cpu' or 'dali'")


def check_disks(paths: Sequence[str]) -> None:
    """See that this machine has the disks of the one that started the run.

    Raises:
        UsageError: a file of the run's is not here.
    """
    until = time.monotonic() + DISK_WITHIN_S
    for path in paths:
        while not os.path.exists(path):
            if time.monotonic() > until:
                raise UsageError(
                    f"{path} is there on the machine that started the run, and not on {socket.gethostname()}. Datasets "
                    "and outputs must lie on a disk that all machines share, at one path, or on an object store"
                )
            time.sleep(0.2)


def read_partition(shard: Shard, job: ShardJob) -> pa.Table:
    """One shard's table with the pending columns computed and without images, for data frames; nothing is written.

    Runs in whatever process evaluates the frame, a Dask worker or not.
    """
    with _frames.lease(job) as pipeline:
        run = ShardRun(job, shard, pipeline)
        if run.begin(writes=False):
            table = run.collect()
            unwanted = {*shard.image_columns, *(() if job.steps else (ERROR_COLUMN,))}
            return table.drop_columns([name for name in table.column_names if name in unwanted])
    with Location.of(job.target(shard), job.storage_options).open_parquet() as parquet:
        return parquet.read([name for name in parquet.schema_arrow.names if name not in shard.image_columns])


class FramePipelines:
    """The pipeline behind data frames whose columns are pending: the last job's is kept for the next partition.

    One that an error has broken is not: the next partition gets a new one.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: dict[str, Pipeline] = {}
        self._users: dict[str, int] = {}

    @contextmanager
    def lease(self, job: ShardJob) -> Iterator[Pipeline]:
        """The job's pipeline for the length of the block; pipelines of other jobs go once nobody uses them."""
        key = job_key(job)
        with self._lock:
            if key in self._kept and self._kept[key].fault is not None:
                _close([self._kept.pop(key)])
            if key not in self._kept:
                _close([self._kept.pop(other) for other in list(self._kept) if not self._users.get(other)])
                self._kept[key] = build_pipeline(job)
            self._users[key] = self._users.get(key, 0) + 1
            pipeline = self._kept[key]
        try:
            yield pipeline
        finally:
            with self._lock:
                self._users[key] -= 1


def _close(pipelines: list[Pipeline]) -> None:
    """Close pipelines that nobody else holds, and give the memory they had on a GPU back to the device.

    Allocators keep what is freed for their own library; the next to need it may be another one: cuDF, or DALI.
    """
    if not pipelines:
        return
    while pipelines:
        pipelines.pop().close()
    torch, dali = sys.modules.get("torch"), sys.modules.get("nvidia.dali.backend")
    if torch is not None and torch.cuda.is_initialized():
        with suppress(RuntimeError):  # a device that an error has broken has nothing to give
            torch.cuda.empty_cache()
            if dali is not None:
                dali.ReleaseUnusedMemory()


_frames = FramePipelines()


def job_key(job: ShardJob) -> str:
    """Identifies a job's full configuration: two jobs with one key can share a pipeline."""
    return hashlib.sha256(pickle.dumps(job)).hexdigest()


class PipelineKeeper:
    """The pipelines of one worker, by job. Lives on the worker object, dies with it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pipelines: dict[str, Pipeline] = {}
        self._stopping: set[str] = set()
        self._asked_back: set[str] = set()
        self._users: Counter[str] = Counter()
        self._used: dict[str, float] = {}
        self._on_disks: set[str] = set()  # runs whose disks are here
        self._chances: dict[str, int] = {}  # run -> the chance its pipeline was built on

    @classmethod
    def of(cls, worker: Worker) -> PipelineKeeper:
        """The worker's keeper, made on first use; from then on every heartbeat carries its figures."""
        keeper = worker.__dict__.setdefault("_curator_embed_pipelines", cls())
        assert isinstance(keeper, cls)
        if METRICS not in worker.metrics:  # added by the thread that also reads them
            worker.loop.add_callback(worker.metrics.setdefault, METRICS, Figures(keeper))
        return keeper

    def pipelines(self) -> list[Pipeline]:
        """Those that are there; does not wait for one that is being built."""
        return list(self._pipelines.values())

    def get(self, run: str, job: ShardJob, on_images: Callable[[int], None], chance: int = 0) -> Pipeline | None:
        """The run's pipeline, built by whoever comes first while the others wait; ``put_back`` it.

        Args:
            chance: number of the chances that the driver gave broken workers so far. One that broke is built anew for
                a task with a higher number than it was built for.

        Returns:
            None when the run is to stop or over.

        Raises:
            Exception: it cannot be built, or is broken.
        """
        with self._lock:
            if run in self._stopping:  # here, where it cannot be closed before it is built
                return None
            broken = self._pipelines.get(run)
            if broken is not None and broken.fault is not None:
                if chance <= self._chances[run]:
                    raise broken.fault
                del broken  # so that closing it lets go of its models
                _close([self._pipelines.pop(run)])
            if run not in self._pipelines:
                self._close_orphans()
                self._pipelines[run], self._chances[run] = build_pipeline(job, on_images), chance
            self._users[run] += 1
            return self._pipelines[run]

    def see_disks(self, run: str, paths: Sequence[str]) -> None:
        """``check_disks``, once per run."""
        if run not in self._on_disks:
            check_disks(paths)
            self._on_disks.add(run)

    def put_back(self, run: str) -> None:
        """The task that got the run's pipeline needs it no longer."""
        with self._lock:
            self._users[run] -= 1
            self._used[run] = time.monotonic()

    def _close_orphans(self) -> None:
        """Make room for a new run: nobody else lets go of the models of one whose driver was killed."""
        now = time.monotonic()
        unused = [run for run in self._pipelines if not self._users[run]]
        _close([self._pipelines.pop(run) for run in unused if now - self._used.get(run, now) >= ORPHANED_AFTER_S])

    def stop(self, run: str) -> None:
        """Begin no more shards of this run."""
        self._stopping.add(run)

    def stopping(self, run: str) -> bool:
        """Whether the run was asked to stop, or is over."""
        return run in self._stopping

    def ask_back(self, tasks: Sequence[str]) -> None:
        """Have these tasks give back the shards they have not finished, where they run here."""
        self._asked_back.update(tasks)

    def asked_back(self, task: str) -> bool:
        """Whether this task was asked to."""
        return task in self._asked_back

    def close(self, run: str) -> None:
        """Stop a run's threads and let go of its models; tasks that come after it do nothing."""
        self.stop(run)
        self._on_disks.discard(run)
        with self._lock:
            pipelines = [self._pipelines.pop(run)] if run in self._pipelines else []
            self._chances.pop(run, None)
        _close(pipelines)


class Figures:
    """What a worker's heartbeat tells of its pipelines: Dask calls this some times a minute, and it never waits.

    The scheduler shows it as ``Client.scheduler_info()["workers"][address]["metrics"]["curator_embed"]``.
    """

    def __init__(self, keeper: PipelineKeeper) -> None:
        self._keeper = keeper
        self._then, self._images, self._model_seconds = time.monotonic(), 0, 0.0

    def __call__(self, worker: Worker) -> dict[str, Any]:
        """Totals, what waits now, and rates since the last call; empty while there is no pipeline.

        Returns:
            ``images`` and busy ``seconds`` a stage so far, ``encoded_waiting`` images, ``ready_waiting`` batches,
            ``images_per_second`` and ``idle_share``, the part of the time in which no model ran.
        """
        pipelines = self._keeper.pipelines()
        totals = [pipeline.clock.total() for pipeline in pipelines]
        seconds = {stage: sum(total[stage] for total in totals) for stage in StageClock.STAGES}
        images, now = sum(pipeline.images for pipeline in pipelines), time.monotonic()
        # A run that has ended takes its share of the totals with it.
        passed = max(now - self._then, 1e-9)
        rate = max(0, images - self._images) / passed
        busy = max(0.0, seconds["model"] - self._model_seconds) / passed
        self._then, self._images, self._model_seconds = now, images, seconds["model"]
        if not pipelines:
            return {}
        waiting = [pipeline.waiting() for pipeline in pipelines]
        return {
            "images": images,
            "images_per_second": round(rate, 2),
            "encoded_waiting": sum(found["encoded"] for found in waiting),
            "ready_waiting": round(sum(found["ready"] for found in waiting), 2),
            "idle_share": round(max(0.0, 1 - busy), 3),
            "seconds": {stage: round(total, 3) for stage, total in seconds.items()},
        }


class ProgressReporter:
    """Tells the driver how many images are through, twice a second at most."""

    def __init__(self, worker: Worker, topic: str) -> None:
        self._worker, self._topic = worker, topic
        self._lock = threading.Lock()
        self._count, self._told = 0, time.monotonic()

    def __call__(self, images: int) -> None:
        """Count images that are through."""
        with self._lock:
            self._count += images
            now = time.monotonic()
            if now - self._told < PROGRESS_EVERY_S:
                return
            count, self._count, self._told = self._count, 0, now
        self._worker.log_event(self._topic, {"images": count})


def progress_topic(run: str) -> str:
    """Where a run's workers report progress."""
    return f"curator-embed-{run}"


class WorkerUnfit(CuratorEmbedError):
    """This worker cannot do the run's job: no model could be loaded here, or what was loaded has broken.

    Attributes:
        address, host: of the worker.
        cause: what was raised there.
        had_begun: it broke while it worked, so that the shards it had may be the reason.
    """

    def __init__(self, address: str, host: str, cause: Exception, had_begun: bool) -> None:
        self.address, self.host, self.cause, self.had_begun = address, host, cause, had_begun
        super().__init__(address, host, cause, had_begun)

    def __str__(self) -> str:
        what = "broke down" if self.had_begun else "cannot do this run's work"
        return f"worker {self.address} on {self.host} {what} ({type(self.cause).__name__}: {self.cause})"


def _unfit(worker: Worker, cause: Exception, had_begun: bool) -> WorkerUnfit:
    if not isinstance(cause, CuratorEmbedError) and not getattr(cause, "__notes__", None):
        cause.add_note("".join(traceback.format_exception(cause)))  # a traceback does not travel, a note does
    return WorkerUnfit(worker.address, socket.gethostname(), cause, had_begun)


@dataclass(frozen=True)
class TaskReport:
    """What became of a task.

    Attributes:
        worker: address of the one that ran it.
        seconds: how long it took.
        units: one entry a unit, in order; None for those it did not work on.
    """

    worker: str
    seconds: float
    units: list[ShardReport | None]


class WorkerTask:
    """The task that runs now, as its job sees it (``work.Task``)."""

    def __init__(self, worker: Worker, run: str, chance: int) -> None:
        self._worker, self._run, self._chance = worker, run, chance
        self._key = str(worker.get_current_task())
        self._keeper = PipelineKeeper.of(worker)
        self._told = ProgressReporter(worker, progress_topic(run))

    def stopping(self) -> bool:
        """See ``work.Task``."""
        return self._keeper.stopping(self._run)

    def giving_back(self) -> bool:
        """See ``work.Task``."""
        return self._keeper.asked_back(self._key)

    def tell(self, images: int) -> None:
        """See ``work.Task``."""
        self._told(images)

    def see_disks(self, paths: Sequence[str]) -> None:
        """Prove, once per run, that this worker is on the run's disks.

        Raises:
            WorkerUnfit: it is not.
        """
        try:
            self._keeper.see_disks(self._run, paths)
        except UsageError as error:
            raise _unfit(self._worker, error, had_begun=False) from error

    @contextmanager
    def pipeline(self, job: ShardJob) -> Iterator[Pipeline | None]:
        """See ``work.Task``."""
        try:
            pipeline = self._keeper.get(self._run, job, self._told, self._chance)
        except Exception as error:
            raise _unfit(self._worker, error, had_begun=False) from error
        if pipeline is None:
            yield None
            return
        try:
            yield pipeline
        except Exception as error:
            # What the step itself does wrong is no fault of the worker or of a shard.
            if error is pipeline.fault and not isinstance(error, PipelineClosed | StepError):
                raise _unfit(self._worker, error, had_begun=True) from error
            raise
        finally:
            self._keeper.put_back(self._run)


def pack(value: object) -> bytes:
    """A task's units, or its job, as they travel.

    Scheduler and client keep their last thousand messages for each worker. As bytes these take a tenth of the memory.
    """
    return zlib.compress(dumps(value))


def run_task(units: bytes, given: Sequence[Any], job: bytes, run: str, chance: int = 0) -> TaskReport:
    """The Dask task: do a job to these units on this worker.

    Units that were not begun when the worker was told to stop are left, and those that were not finished when the
    task was asked to give them back.

    Args:
        units: a sequence of ``Unit``, packed.
        given: what comes with each unit (``Work.given``), computed.
        job: a ``Job``, packed.
        run: the run's id.
        chance: how many chances broken workers had been given when the task was handed out.

    Raises:
        WorkerUnfit: this worker can do nothing for the run; another may.
    """
    worker, began = get_worker(), time.monotonic()
    task = WorkerTask(worker, run, chance)
    wanted: Job = loads(zlib.decompress(job))
    task.see_disks(wanted.must_see)
    reports = wanted.run(loads(zlib.decompress(units)), given, task)
    return TaskReport(worker.address, time.monotonic() - began, reports)


def stop_run(run: str, dask_worker: Any = None) -> None:
    """Begin no more shards of a run on this worker (called through ``Client.run``)."""
    PipelineKeeper.of(dask_worker).stop(run)


def ask_back(tasks: Sequence[str], dask_worker: Any = None) -> None:
    """Ask tasks for the shards they have not finished, where they run here (called through ``Client.run``)."""
    PipelineKeeper.of(dask_worker).ask_back(tasks)


async def close_run(run: str, dask_worker: Any = None) -> None:
    """Let go of a run's pipeline on this worker (called through ``Client.run``)."""
    # In a thread: a batch may be under way, or a model still be loaded, and the worker must go on answering.
    await asyncio.to_thread(PipelineKeeper.of(dask_worker).close, run)
