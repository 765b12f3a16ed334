"""Jobs of a batch system that ended while there was work for them: others are submitted in their place.

dask-jobqueue forgets a job that lost its worker and submits none; its own ``adapt`` counts the lost one as planned.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import dask
from dask.utils import parse_timedelta
from distributed.core import Status
from tornado.ioloop import PeriodicCallback

log = logging.getLogger(__name__)

LOOK_EVERY_S = 30.0
"""How often it is looked for jobs without workers; only while there are some, the batch system is asked."""


class LostJobs:
    """Looks after a ``dask_jobqueue`` cluster's jobs, from ``start`` until the cluster is closed.

    A job is lost when its workers are gone and the batch system does not list it any more, twice in a row. Another is
    submitted while the scheduler has tasks, unless the job ended before a worker came: the next would end so as well.

    Args:
        listed: asks the batch system for the numbers of jobs that wait or run; None when it does not answer.
        path: the cluster's file, for messages.
    """

    def __init__(self, cluster: Any, listed: Callable[[], set[str] | None], path: str) -> None:
        self._cluster, self._listed, self._path = cluster, listed, path
        self._came: set[str] = set()  # jobs whose workers have been seen
        self._missing: set[str] = set()  # at the last look
        self._refusal = ""

    def start(self) -> None:
        """Look now and then, on the cluster's own event loop."""
        # Dask closes the job of that name so long after a worker has left: it must not be the new one.
        timeout = parse_timedelta(dask.config.get("distributed.deploy.lost-worker-timeout"))
        look = PeriodicCallback(self.look, 1000 * max(LOOK_EVERY_S, 2 * timeout))
        self._cluster.periodic_callbacks["curator-embed-lost-jobs"] = look
        self._cluster.loop.add_callback(look.start)

    async def look(self) -> None:
        """Submit jobs for those that are lost."""
        cluster = self._cluster
        there = [str(worker.name) for worker in cluster.scheduler.workers.values()]
        # The workers of a job with several are named after it: "job-0", "job-1".
        missing = {name for name in cluster.worker_spec if not any(f"{one}-".startswith(f"{name}-") for one in there)}
        self._came |= cluster.worker_spec.keys() - missing
        before, self._missing = self._missing, missing
        if not (missing & before) or not cluster.scheduler.tasks:
            return
        listed = await asyncio.to_thread(self._listed)
        if listed is None or cluster.status != Status.running:
            return
        lost = [name for name in missing & before & cluster.worker_spec.keys() if self._is_lost(name, listed)]
        for name in lost:
            job = cluster.workers.pop(name, None)
            if job is not None:
                job.status = Status.closed
                if name not in self._came:
                    del cluster.worker_spec[name]
                    log.warning("%s: job %s ended before a worker came; no other is submitted", self._path, job.job_id)
        again = [name for name in lost if name in cluster.worker_spec]
        if again:
            await self._submit(again)

    def _is_lost(self, name: str, listed: set[str]) -> bool:
        """Whether nothing of this name waits or runs; Dask itself lets go of a job when its only worker has left."""
        job = self._cluster.workers.get(name)
        return job is None or str(job.job_id) not in listed

    async def _submit(self, names: list[str]) -> None:
        cluster = self._cluster
        self._came.difference_update(names)
        try:
            await cluster._correct_state()  # what ``scale`` calls: submits whatever of the plan is not there
        except (RuntimeError, ValueError, OSError) as error:
            if str(error) != self._refusal:
                log.warning(
                    "%s: a job in the place of a lost one was not accepted, trying again: %s", self._path, error
                )
            self._refusal = str(error)
        for name in names:
            job = cluster.workers.get(name)
            if job is not None and job.job_id is None:
                del cluster.workers[name]
                job.status = Status.failed  # else closing the cluster waits for it
                self._came.add(name)  # the one before had worked
            elif job is not None:
                log.warning("%s: a job has ended before the run; submitted job %s", self._path, job.job_id)
