"""A Dask cluster as the driver's client shows it, without processes and without waiting: each look is a step of it.

Its workers die, break and hang as a test says, and it does with their tasks what Dask's scheduler does.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from distributed.protocol.pickle import loads
from distributed.scheduler import KilledWorker

from curator_embed.execution.job import Fault, FaultKind, ShardReport
from curator_embed.execution.worker import TaskReport, WorkerUnfit

THREADS = 2
MOST_STEPS = 20_000
A_UNIT_TAKES_S = 3.0
FAULT = Fault(FaultKind.UNUSABLE, "cannot be read")


@dataclass(frozen=True)
class Unit:
    """A unit of work that is only a name."""

    name: str


@dataclass
class World:
    """What goes wrong, by the names of units and machines.

    Attributes:
        kills: units that kill the worker they are on.
        breaks: units that break their worker's pipeline.
        unusable: units that come back with a fault.
        bad_machines: those whose workers die whatever they work on.
        breaking_machines: those whose pipelines break whatever they work on.
        hanging: machines whose workers never finish anything.
        retires: how many more workers leave in an orderly way instead of finishing what they have.
        gives_back: how many more tasks of several units give back all but the first.
    """

    kills: frozenset[str] = frozenset()
    breaks: frozenset[str] = frozenset()
    unusable: frozenset[str] = frozenset()
    bad_machines: frozenset[str] = frozenset()
    breaking_machines: frozenset[str] = frozenset()
    hanging: frozenset[str] = frozenset()
    retires: int = 0
    gives_back: int = 0


class SimulatedFuture:
    """A task, and what the client shows of it."""

    def __init__(self, cluster: SimulatedCluster, key: str, units: Sequence[Unit], chance: int, where: Any) -> None:
        self.cluster, self.key, self.units, self.chance = cluster, key, units, chance
        self.where: frozenset[str] | None = None if where is None else frozenset(where)
        self.status, self.deaths = "pending", 0
        self.outcome: Any = None
        self._told: list[Callable[[Any], None]] = []

    def end(self, status: str, outcome: Any = None) -> None:
        self.status, self.outcome = status, outcome
        for tell in self._told:
            tell(self)

    def add_done_callback(self, tell: Callable[[Any], None]) -> None:
        self._told.append(tell)

    def result(self, timeout: float) -> TaskReport:
        assert isinstance(self.outcome, TaskReport)
        return self.outcome

    def exception(self) -> BaseException:
        assert isinstance(self.outcome, BaseException)
        return self.outcome

    def traceback(self) -> None:
        return None

    def done(self) -> bool:
        return self.status != "pending"

    def release(self) -> None:
        self.cluster.forget(self)

    def cancel(self) -> None:
        self.cluster.forget(self)
        self.end("cancelled")


@dataclass
class SimulatedWorker:
    """A worker: the tasks that it has, the first ``THREADS`` of which run."""

    host: str
    tasks: list[SimulatedFuture] = field(default_factory=list)
    paused: bool = False
    broken_at: int | None = None
    built_at: int | None = None


class SimulatedCluster:
    """As much of ``distributed.Client`` as the driver uses.

    Args:
        machines: name (an address such as 10.0.0.1) -> workers on it; each that dies is started again.
        world: what goes wrong.
        seed: of the order in which things happen.
        allowed_failures: as Dask's setting.
    """

    status = "running"
    scheduler = SimpleNamespace(address="tcp://10.0.0.0:1")

    def __init__(
        self, machines: dict[str, int], world: World | None = None, seed: int = 0, allowed_failures: int = 3
    ) -> None:
        self.world, self.random = world or World(), random.Random(seed)
        self.allowed_failures = allowed_failures
        self.workers: dict[str, SimulatedWorker] = {}
        self.nowhere: list[SimulatedFuture] = []  # tasks whose workers are not there
        self.events: dict[str, list[tuple[float, dict[str, Any]]]] = {}
        self.steps = self._keys = self._ports = 0
        self.tried: list[tuple[tuple[str, ...], str]] = []  # names of units, machine: tasks that ended, however
        for host, count in machines.items():
            for _ in range(count):
                self.start(host)

    def start(self, host: str) -> str:
        self._ports += 1
        address = f"tcp://{host}:{self._ports}"
        self.workers[address] = SimulatedWorker(host)
        self.events[address] = [(0.0, {"action": "add-worker"})]
        waiting, self.nowhere = self.nowhere, []
        for task in waiting:
            self._place(task)
        return address

    def monotonic(self) -> float:
        """The time: a second a step."""
        return float(self.steps)

    # -- the client's side -----------------------------------------------------------------

    def submit(
        self, function: Any, units: Any, given: Any, job: Any, run: str, chance: int, *, pure: bool, workers: Any
    ) -> SimulatedFuture:
        self._keys += 1
        task = SimulatedFuture(self, f"task-{self._keys}", loads(zlib.decompress(units)), chance, workers)
        self._place(task)
        return task

    def nthreads(self) -> dict[str, int]:
        self.step()
        return dict.fromkeys(self.workers, THREADS)

    def scheduler_info(self, n_workers: int) -> dict[str, Any]:
        statuses = {address: "paused" if worker.paused else "running" for address, worker in self.workers.items()}
        return {"workers": {address: {"status": status} for address, status in statuses.items()}}

    def processing(self) -> dict[str, tuple[str, ...]]:
        return {address: tuple(task.key for task in worker.tasks) for address, worker in self.workers.items()}

    def get_events(self, address: str) -> list[tuple[float, dict[str, Any]]]:
        return self.events.get(address, [])

    def subscribe_topic(self, topic: str, handler: Any) -> None:
        pass

    def unsubscribe_topic(self, topic: str) -> None:
        pass

    def run(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {}

    # -- the scheduler's side --------------------------------------------------------------

    def forget(self, task: SimulatedFuture) -> None:
        for worker in self.workers.values():
            if task in worker.tasks:
                worker.tasks.remove(task)
        if task in self.nowhere:
            self.nowhere.remove(task)

    def _place(self, task: SimulatedFuture) -> None:
        allowed = [w for a, w in self.workers.items() if (task.where is None or a in task.where) and not w.paused]
        if allowed:
            min(allowed, key=lambda worker: len(worker.tasks)).tasks.append(task)
        else:
            self.nowhere.append(task)

    def _end(self, task: SimulatedFuture, worker: SimulatedWorker, status: str, outcome: Any) -> None:
        worker.tasks.remove(task)
        self.tried.append((tuple(unit.name for unit in task.units), worker.host))
        task.end(status, outcome)

    def step(self) -> None:
        """Something happens on one worker that has something to do."""
        self.steps += 1
        assert self.steps < MOST_STEPS, "the run does not end"
        busy = [
            address
            for address, worker in self.workers.items()
            if worker.tasks and not worker.paused and worker.host not in self.world.hanging
        ]
        if not busy:
            return
        address = self.random.choice(busy)
        worker = self.workers[address]
        running = worker.tasks[:THREADS]
        names = {unit.name for task in running for unit in task.units}
        if self.world.retires:
            self.world.retires -= 1
            self.lose(address, orderly=True)
        elif worker.host in self.world.bad_machines or self.world.kills & names:
            self.lose(address)
        else:
            self._work(address, worker, running, names)

    def lose(self, address: str, orderly: bool = False) -> None:
        """A worker goes; another is started on its machine, and its tasks are given to others or given up."""
        worker = self.workers.pop(address)
        if orderly:
            self.events[address].append((1.0, {"action": "retired"}))
        orphans, worker_tasks = [], list(worker.tasks)
        for task in worker_tasks:
            task.deaths += not orderly
            if task.deaths > self.allowed_failures:
                went: Any = SimpleNamespace(address=address)
                self._end(task, worker, "error", KilledWorker(task.key, went, self.allowed_failures))
            else:
                orphans.append(task)
        self.nowhere += orphans
        self.start(worker.host)

    def _work(self, address: str, worker: SimulatedWorker, running: list[SimulatedFuture], names: set[str]) -> None:
        fresh = [task for task in running if worker.broken_at is None or task.chance > worker.broken_at]
        for task in running:
            if task not in fresh:  # the keeper raises what broke the pipeline
                self._end(task, worker, "error", WorkerUnfit(address, worker.host, ValueError("no"), False))
        if not fresh:
            return
        if worker.built_at is None or worker.broken_at is not None:
            worker.built_at, worker.broken_at = min(task.chance for task in fresh), None
        names = {unit.name for task in fresh for unit in task.units}
        if worker.host in self.world.breaking_machines or self.world.breaks & names:
            worker.broken_at = worker.built_at
            for task in fresh:
                self._end(task, worker, "error", WorkerUnfit(address, worker.host, ValueError("no"), True))
            return
        task = fresh[0]
        reports: list[ShardReport | None] = [
            ShardReport(unit.name, read=1, embedded=1, fault=FAULT if unit.name in self.world.unusable else None)
            for unit in task.units
        ]
        if len(reports) > 1 and self.world.gives_back:
            self.world.gives_back -= 1
            reports[1:] = [None] * (len(reports) - 1)
        self._end(task, worker, "finished", TaskReport(address, A_UNIT_TAKES_S * len(reports), reports))
