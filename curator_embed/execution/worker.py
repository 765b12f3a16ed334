"""What runs inside a Dask worker: the pipeline it keeps between tasks, and the task itself."""

from __future__ import annotations

import hashlib
import pickle
import socket
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
from distributed import Worker, get_worker

from curator_embed.errors import CuratorEmbedError, UsageError
from curator_embed.execution.engines import CpuEngine, DaliEngine
from curator_embed.execution.output import Location
from curator_embed.execution.pipeline import DecodeEngine, Pipeline, PipelineClosed
from curator_embed.execution.provenance import ERROR_COLUMN
from curator_embed.execution.shard_run import ShardJob, ShardReport, ShardRun, run_group
from curator_embed.sources.shard import Shard
from curator_embed.steps import BatchStep

PROGRESS_EVERY_S = 0.5


def build_pipeline(job: ShardJob, on_images: Callable[[int], None] | None = None) -> Pipeline:
    """Load the models and start the threads for a job on this process's device."""
    models = {
        position: step.load_model(job.device, job.model_threads)
        for position, step in enumerate(job.steps)
        if isinstance(step, BatchStep) and not getattr(step, "reads_own_shards", False)
    }
    return Pipeline(
        build_engine(job),
        models,
        [position for position in range(len(job.steps)) if position not in models],
        threads=job.decode_threads,
        on_images=on_images,
    )


def build_engine(job: ShardJob) -> DecodeEngine:
    """The decode engine a job asks for; "dali" runs where the job's models do."""
    if job.engine == "cpu":
        return CpuEngine(job.steps)
    if job.engine == "dali":
        return DaliEngine(job.steps, device=job.device, threads=job.decode_threads)
    raise UsageError(f"there is no decode engine '{job.engine}'; choose 'cpu' or 'dali'")


def read_partition(shard: Shard, job: ShardJob) -> pa.Table:
    """One shard's table with the pending columns computed and without images, for data frames; nothing is written.

    Runs in whatever process evaluates the frame, a Dask worker or not.
    """
    with _frames.lease(job) as pipeline:
        run = ShardRun(job, shard, pipeline)
        if run.begin():
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
                self._kept.pop(key).close()
            if key not in self._kept:
                for other in [k for k in self._kept if not self._users.get(k)]:
                    self._kept.pop(other).close()
                self._kept[key] = build_pipeline(job)
            self._users[key] = self._users.get(key, 0) + 1
            pipeline = self._kept[key]
        try:
            yield pipeline
        finally:
            with self._lock:
                self._users[key] -= 1


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
        self._shared: Counter[str] = Counter()

    @classmethod
    def of(cls, worker: Worker) -> PipelineKeeper:
        """The worker's keeper, made on first use."""
        keeper = worker.__dict__.setdefault("_curator_embed_pipelines", cls())
        assert isinstance(keeper, cls)
        return keeper

    def get(self, run: str, job: ShardJob, on_images: Callable[[int], None]) -> Pipeline:
        """The run's pipeline, built by whoever comes first while the others wait."""
        with self._lock:
            if run not in self._pipelines:
                self._pipelines[run] = build_pipeline(job, on_images)
            return self._pipelines[run]

    def stop(self, run: str) -> None:
        """Begin no more shards of this run."""
        self._stopping.add(run)

    def stopping(self, run: str) -> bool:
        """Whether the run was asked to stop, or is over."""
        return run in self._stopping

    def share(self, run: str) -> None:
        """Ask the run's tasks to give back the shards they have not begun."""
        self._shared[run] += 1

    def times_shared(self, run: str) -> int:
        """How often they were asked to."""
        return self._shared[run]

    def close(self, run: str) -> None:
        """Stop a run's threads and let go of its models; tasks that come after it do nothing."""
        self.stop(run)
        with self._lock:
            pipeline = self._pipelines.pop(run, None)
        if pipeline is not None:
            pipeline.close()


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
    if not isinstance(cause, CuratorEmbedError):
        cause.add_note("".join(traceback.format_exception(cause)))  # a traceback does not travel, a note does
    return WorkerUnfit(worker.address, socket.gethostname(), cause, had_begun)


def run_task(shards: Sequence[Shard], job: ShardJob, run: str, limit: int | None = None) -> list[ShardReport]:
    """The Dask task: run these shards on this worker's pipeline.

    Returns:
        A report each of the first so many shards: those that were begun before the worker was told to stop or to
        give back what it has not begun.

    Raises:
        WorkerUnfit: this worker can do nothing for the run; another may.
    """
    worker = get_worker()
    keeper = PipelineKeeper.of(worker)
    if keeper.stopping(run):
        return []
    try:
        pipeline = keeper.get(run, job, ProgressReporter(worker, progress_topic(run)))
    except Exception as error:
        raise _unfit(worker, error, had_begun=False) from error
    begun, shared = 0, keeper.times_shared(run)

    def stopping() -> bool:
        nonlocal begun
        begun += 1
        return keeper.stopping(run) or (begun > 1 and keeper.times_shared(run) != shared)

    try:
        return run_group(shards, job, pipeline, limit, stopping=stopping)
    except Exception as error:
        if error is pipeline.fault and not isinstance(error, PipelineClosed):
            raise _unfit(worker, error, had_begun=True) from error
        raise


def stop_run(run: str, dask_worker: Any = None) -> None:
    """Begin no more shards of a run on this worker (called through ``Client.run``)."""
    PipelineKeeper.of(dask_worker).stop(run)


def share_run(run: str, dask_worker: Any = None) -> None:
    """Ask for the shards back that this worker's tasks have not begun (called through ``Client.run``)."""
    PipelineKeeper.of(dask_worker).share(run)


def close_run(run: str, dask_worker: Any = None) -> None:
    """Let go of a run's pipeline on this worker (called through ``Client.run``)."""
    PipelineKeeper.of(dask_worker).close(run)
