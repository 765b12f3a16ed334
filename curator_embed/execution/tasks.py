"""Tasks as Dask has them: submitted, dropped, and what came of each as a plain value.

Apart from the driver so that what Dask raises, and when, is known in one place.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from distributed import Client, Future
from distributed.scheduler import KilledWorker, NoValidWorkerError

from curator_embed.execution.stragglers import idle_threads
from curator_embed.execution.work import Job, Unit
from curator_embed.execution.worker import TaskReport, WorkerUnfit, pack, run_task

RESULT_WITHIN_S = 60.0
"""A finished task's reports are fetched from its worker in this time, or the worker has died with them."""


class SchedulerGone(Exception):
    """The scheduler has dropped this run's tasks: it died, was restarted, or cannot be reached."""

    def ending(self, cluster: str) -> str:
        """Why the run ends.

        Args:
            cluster: the scheduler's address.
        """
        return (
            f"lost the Dask scheduler at {cluster} ({self}). What was finished is kept: start the cluster again and "
            "run the same again to go on from there"
        )


@dataclass(frozen=True)
class Died:
    """Dask gave the task up because so many of its workers died; it counts every task that was on them."""

    deaths: int


@dataclass(frozen=True)
class Lost:
    """Nothing is known of the task, and nobody is to blame: finished units will be found done."""


@dataclass(frozen=True)
class NotGiven:
    """Some units lack what they were to be given: index of the unit -> why that could not be computed."""

    why: Mapping[int, str]


Outcome = TaskReport | Died | Lost | NotGiven | WorkerUnfit


@dataclass(frozen=True)
class _Ticket:
    future: Future[TaskReport]
    given: Sequence[Future[Any] | None]


class Tasks:
    """The tasks of one run.

    Args:
        run_id: the run.
    """

    def __init__(self, client: Client, run_id: str) -> None:
        self._client, self._run_id = client, run_id
        self._tickets: dict[str, _Ticket] = {}
        self._asked, self._idle = 0.0, 0
        self._packed: tuple[Job | None, bytes] = (None, b"")  # the last job
        self._finished: queue.SimpleQueue[Future[TaskReport]] = queue.SimpleQueue()

    def submit(
        self,
        units: Sequence[Unit],
        given: Sequence[Future[Any] | None],
        job: Job,
        chance: int,
        only_on: Collection[str] | None,
    ) -> str:
        """Hand out a task; returns its key.

        Args:
            given: what comes with each unit.
            only_on: addresses of the workers that it may run on; None for any.

        Raises:
            SchedulerGone: there is nobody to take it.
        """
        where = None if only_on is None else list(only_on)
        try:
            future = self._client.submit(
                run_task,
                pack(list(units)),
                list(given),
                self._pack(job),
                self._run_id,
                chance,
                pure=False,
                workers=where,
            )
        except RuntimeError as error:  # a closed client
            raise SchedulerGone(str(error)) from None
        self._tickets[str(future.key)] = _Ticket(future, given)
        future.add_done_callback(self._finished.put)
        return str(future.key)

    def _pack(self, job: Job) -> bytes:
        if job is not self._packed[0]:
            self._packed = job, pack(job)
        return self._packed[1]

    def drop(self, keys: Iterable[str]) -> None:
        """Nobody needs these any more. Dask lets those that run go on to their end; nothing is heard of them."""
        for key in keys:
            if (ticket := self._tickets.pop(key, None)) is not None:  # the one whose error ends the run is out already
                ticket.future.cancel()

    def over(self, key: str) -> bool:
        """Whether this task needs no doing: ``next`` is going to tell of it, or it was dropped."""
        return key not in self._tickets or self._tickets[key].future.done()

    def next(self, timeout: float) -> tuple[str, Outcome] | None:
        """The key of a task that is over, and what came of it; None when there is none within ``timeout`` seconds.

        Raises:
            SchedulerGone: the scheduler does not know the task any more.
            BaseException: what the job raised, with a worker's traceback.
        """
        with suppress(queue.Empty):
            future = self._finished.get(timeout=timeout)
            if str(future.key) not in self._tickets:
                return None  # dropped
            if future.status == "cancelled":
                raise SchedulerGone("it went away or was restarted")
            ticket = self._tickets.pop(str(future.key))
            try:
                return str(future.key), _outcome(ticket)
            finally:
                future.release()
        return None

    def idle_threads(self, threads: Mapping[str, int], every: float) -> int:
        """Threads with nothing to do, of these workers; asks the scheduler at most once in ``every`` seconds."""
        idle = sum(threads.values()) - len(self._tickets)
        if idle > 0:
            return idle
        if time.monotonic() - self._asked >= every:
            self._asked, self._idle = time.monotonic(), idle_threads(threads, self.places())
        return self._idle

    def places(self) -> Mapping[str, Collection[str]]:
        """Keys of the tasks of every worker, those that wait there, too."""
        with scheduler_there():
            places: Mapping[str, Collection[str]] = self._client.processing()
        return places


def _outcome(ticket: _Ticket) -> Outcome:
    future = ticket.future
    if future.status != "error":
        try:
            return future.result(timeout=RESULT_WITHIN_S)
        except (CancelledError, OSError):  # the worker, or the scheduler, died with the reports
            return Lost()
    error = future.exception()
    if isinstance(error, KilledWorker):
        return Died(error.allowed_failures + 1)
    if isinstance(error, WorkerUnfit):
        return error
    if isinstance(error, NoValidWorkerError):  # the scheduler's patience is set to less than ours
        return Lost()
    failed = {n: given for n, given in enumerate(ticket.given) if given is not None and given.status == "error"}
    if failed:
        return NotGiven({number: _not_given(given.exception()) for number, given in failed.items()})
    assert error is not None
    raise error.with_traceback(future.traceback())


def _not_given(error: BaseException | None) -> str:
    return f"what it is made from could not be computed ({type(error).__name__}: {error}). Run again to retry it"


@contextmanager
def scheduler_there() -> Iterator[None]:
    """A question that nobody answers ends the run in its own way."""
    try:
        yield
    except OSError as error:
        raise SchedulerGone(str(error)) from None
