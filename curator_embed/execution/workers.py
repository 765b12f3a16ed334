"""Who is there to work: a cluster's workers as they come, leave and differ while a run goes on.

Questions are put to workers here; what they are given to do is the driver's business.
"""

from __future__ import annotations

import logging
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import dask
from dask.system import cpu_count
from dask.utils import parse_timedelta
from distributed import Client
from distributed.comm.addressing import get_address_host
from distributed.comm.core import CommClosedError

from curator_embed.errors import CuratorEmbedError

log = logging.getLogger(__name__)

WAIT_KEY = "curator-embed.no-workers-timeout"
"""Key of Dask's configuration: how long a run without workers waits for one ("30 minutes")."""
WAIT_DEFAULT = "10 minutes"
TELL_AFTER_S = 5.0
"""A wait that is longer than this is told."""

STATUS_EVERY_S = 5.0
"""How often it is asked which workers are paused; the answer holds more than that of every worker."""

PAUSED_REMEDY = (
    "give the workers more memory (memory_limit), use a smaller batch or fewer decode threads, or change Dask's "
    "setting distributed.worker.memory.pause"
)

Answer = TypeVar("Answer")


def patience() -> float:
    """Seconds that a run without workers waits for one."""
    return float(parse_timedelta(dask.config.get(WAIT_KEY, default=WAIT_DEFAULT)))


def scheduler_address(client: Client) -> str:
    """Where the cluster's scheduler listens, for messages."""
    scheduler = getattr(client, "scheduler", None)
    return str(getattr(scheduler, "address", "unknown address"))


def wait_for_worker(client: Client) -> None:
    """Return once there is a worker; a task is what makes an adaptive cluster start its first one.

    Raises:
        CuratorEmbedError: none came within ``patience()``.
    """
    if client.nthreads():
        return
    first, limit = client.submit(int, pure=False), patience()
    try:
        first.result(timeout=min(TELL_AFTER_S, limit))
        return
    except TimeoutError:
        asked = len(getattr(client.cluster, "plan", ()))
        log.warning(
            "waiting for the first worker of the Dask cluster at %s%s, %.0f s at most",
            scheduler_address(client),
            f" ({asked} asked for)" if asked else "",
            limit,
        )
        try:
            first.result(timeout=max(0.0, limit - TELL_AFTER_S))
        except TimeoutError:
            raise CuratorEmbedError(
                f"the Dask cluster at {scheduler_address(client)} has no worker, and none came within {limit:.0f} s. "
                f"Start workers, then run again, or wait longer with Dask's setting {WAIT_KEY}"
            ) from None
    finally:
        first.release()


def ask_workers(client: Client, question: Callable[[], Answer]) -> dict[str, Answer]:
    """Every worker's answer by its address; workers that die meanwhile give none, and at least one answers.

    Raises:
        BaseException: what the question raised, when no worker has an answer.
    """
    while True:
        wait_for_worker(client)
        answers = client.run(question, on_error="return")
        found = {address: answer for address, answer in answers.items() if not isinstance(answer, BaseException)}
        if found:
            return found
        there = client.nthreads()
        for address, error in answers.items():
            if address in there and not isinstance(error, CommClosedError):  # else the worker has gone, or is going
                raise error


def cores_per_worker(client: Client) -> int:
    """CPU cores that each worker can call its own, the fewest of all: a machine's cores over its workers."""
    found = ask_workers(client, _host_and_cores)
    workers = Counter(host for host, _ in found.values())
    return max(1, min(cores // workers[host] for host, cores in found.values()))


def _host_and_cores() -> tuple[str, int]:
    # Dask's count knows the CPU limit of a container, which the affinity of a process does not show.
    return socket.gethostname(), cpu_count()


@dataclass(frozen=True)
class Absence:
    """Nobody can be given work.

    Attributes:
        what: why not.
        go_on: what a worker would have to do.
        remedy: what a person can do.
        waited: seconds since it began.
    """

    what: str
    go_on: str
    remedy: str
    waited: float

    def __str__(self) -> str:
        return f"{self.what}; waiting {patience():.0f} s for one to {self.go_on} ({self.remedy})"

    def so_far(self) -> str:
        """For a progress bar."""
        return f"{self.what}, waiting {self.waited:.0f} of {patience():.0f} s"

    def too_long(self, cluster: str) -> str:
        """Why the run ends, when it has been waited long enough; empty before that.

        Args:
            cluster: its address.
        """
        if self.waited < patience():
            return ""
        return (
            f"{self.what} (cluster at {cluster}), and none was there to {self.go_on} within {patience():.0f} s. What "
            f"was finished is kept: {self.remedy}, and run the same again to go on from there, or wait longer with "
            f"Dask's setting {WAIT_KEY}"
        )


class Workers:
    """The workers of a run: looked at now and then, some of them not fit for its job.

    Attributes:
        threads: Dask threads of each worker that is there, by address.
        unfit: address -> why that worker, which is there, cannot do this run's job.
        paused: those that take no tasks, because Dask found their memory nearly full.
        most: workers at a time, at most.
        lost: how many have left.
        absent_since: when the last one that is fit left or was paused, on the monotonic clock; None while there are
            some.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._looked = 0.0
        self._asked: float | None = None
        self._seconds = 0.0
        self.threads: dict[str, int] = {}
        self.unfit: dict[str, str] = {}
        self.paused: frozenset[str] = frozenset()
        self.most = self.lost = 0
        self.absent_since: float | None = None

    def look(self, every: float = 0.0) -> bool:
        """See who is there, at most once in ``every`` seconds; False when it is not time yet."""
        now = time.monotonic()
        if now - self._looked < every:
            return False
        self._seconds = self.seconds
        self._looked = now
        found = self._client.nthreads()
        self.lost += len(self.threads.keys() - found.keys())
        self.threads = dict(found)
        # One that left and came back is another process.
        self.unfit = {address: why for address, why in self.unfit.items() if address in found}
        self.most = max(self.most, len(found))
        if self._asked is None or now - self._asked >= STATUS_EVERY_S:
            self._asked = now
            about = self._client.scheduler_info(n_workers=-1)["workers"]
            self.paused = frozenset(address for address, worker in about.items() if worker.get("status") == "paused")
        self.absent_since = None if self.fit else (self.absent_since or now)
        return True

    def let_in_again(self, addresses: Iterable[str]) -> None:
        """Those that were not fit may be now."""
        for address in addresses:
            self.unfit.pop(address, None)
        if self.fit:
            self.absent_since = None

    def absence(self) -> Absence | None:
        """Why nobody can be given work; None while somebody can."""
        if self.absent_since is None:
            return None
        waited = time.monotonic() - self.absent_since
        if self.able:
            what, remedy = "Dask has paused all workers, their memory is nearly full", PAUSED_REMEDY
            return Absence(what, "go on", remedy, waited)
        return Absence("no worker is left for this job", "come", "start workers", waited)

    def have_worked(self) -> None:
        """Something came back: if nobody can be given work, then only from now on."""
        if self.absent_since is not None:
            self.absent_since = time.monotonic()

    def retired(self, address: str) -> bool:
        """Whether a worker that has left did so in an orderly way (scaled down, its time was up); one that was killed
        had no time to say so.
        """
        orderly = False
        for _, event in self._client.get_events(address) or ():
            if event.get("action") == "add-worker":  # before that, another process had the address
                orderly = False
            orderly = orderly or (
                event.get("action") in ("closing-worker", "retired")
                or event.get("status") in ("closing", "closing_gracefully")
                or bool(event.get("expected"))
            )
        return orderly

    @property
    def seconds(self) -> float:
        """Time that workers were there, summed over them."""
        return self._seconds + len(self.threads) * (time.monotonic() - self._looked)

    @property
    def fit(self) -> dict[str, int]:
        """Threads of those that can do the job and take tasks now."""
        return {address: count for address, count in self.able.items() if address not in self.paused}

    @property
    def able(self) -> dict[str, int]:
        """Threads of those that can do the job, paused or not."""
        return {address: count for address, count in self.threads.items() if address not in self.unfit}

    @property
    def restriction(self) -> frozenset[str] | None:
        """Who may be given tasks where not everybody may; None where everybody may."""
        return frozenset(self.able) if self.unfit else None

    def one_a_host(self) -> dict[str, str]:
        """Of every machine, one worker that is fit: host -> address."""
        return {host(address): address for address in sorted(self.fit, reverse=True)}


def host(address: str) -> str:
    """The machine that a worker's address is on."""
    return str(get_address_host(address))
