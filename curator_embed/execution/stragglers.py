"""Which tasks are slow, and where else their units can be tried. Pure decisions: no Dask, no clock, no logging."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from curator_embed.execution.flights import Flight

SLOW = 2.0
"""A task that goes on for so many times what others took for as many units, while threads have nothing to do, is slow.
One of several units gives back what it has not finished; what it still has after twice that time, and a unit that is
alone in a slow task, is tried on another worker as well."""
HANGS = 10.0
"""A trial (``Flight.alone``) that goes on for so many times what others took hangs; nobody tries it beside that."""
SLOW_AFTER_S = 2.0
"""No task is slow before there has been a thread with nothing to do for so long."""
PACES = 200
"""So many of the last tasks say how long a unit takes."""


@dataclass(frozen=True)
class Slow:
    """Keys of slow tasks.

    Attributes:
        ask_back: those that should give back what they have not finished.
        stuck: those whose units should be tried elsewhere as well.
        hopeless: trials that hang.
    """

    ask_back: list[str] = field(default_factory=list)
    stuck: list[str] = field(default_factory=list)
    hopeless: list[str] = field(default_factory=list)


class Stragglers:
    """How long units take, and for how long threads have had nothing to do."""

    def __init__(self) -> None:
        self._paces: deque[float] = deque(maxlen=PACES)
        self._idle_since: float | None = None
        self._avoid: dict[int, str] = {}  # unit -> the worker that was too slow for it

    def finished(self, seconds: float, units: int) -> None:
        """A task took so long for so many units."""
        self._paces.append(seconds / units)

    def gave_back(self, positions: Collection[int], worker: str) -> None:
        """A slow task gave these units back."""
        self._avoid.update(dict.fromkeys(positions, worker))

    def quicker(self, positions: Sequence[int], fit: Collection[str]) -> frozenset[str] | None:
        """Workers that were not too slow for the first of these units; None when that leaves out nobody, or all."""
        found = frozenset(fit) - {self._avoid.get(positions[0], "")}
        return found if 0 < len(found) < len(fit) else None

    def look(self, now: float, under_way: Mapping[str, Flight], idle: int, workers: int, patience: float) -> Slow:
        """Find the slow tasks.

        Args:
            now: seconds, on the clock of ``Flight.began``.
            under_way: tasks by their keys.
            idle: threads that have nothing to do.
            workers: how many there are that can do the job.
            patience: seconds for which a trial at least is waited for.
        """
        if idle <= 0:
            self._idle_since = None
            return Slow()
        if self._idle_since is None:
            self._idle_since = now
        if workers < 2 or not self._paces:
            return Slow()
        usual, slow = median(self._paces), Slow()
        for key, flight in under_way.items():
            # While threads have nothing to do, a task that waits does so on a worker that answers nobody: else Dask
            # would have moved it.
            waited, several = now - max(self._idle_since, flight.began), len(flight.positions) > 1
            patient = max(SLOW_AFTER_S, SLOW * usual * len(flight.positions))
            if several and waited > patient:
                slow.ask_back.append(key)
            if not flight.alone and waited > patient * (1 + several):
                slow.stuck.append(key)
            if flight.alone and waited > max(patience, HANGS * usual):
                slow.hopeless.append(key)
        return slow


@dataclass(frozen=True)
class Attempt:
    """A unit that is tried a second time: ``slow_on`` are the workers that have it, ``only_on`` those to try."""

    position: int
    slow_on: frozenset[str]
    only_on: frozenset[str]


def attempts(
    undone: Mapping[int, Collection[str]],
    places: Mapping[str, Collection[str]],
    fit: Collection[str],
    most: int,
    host: Callable[[str], str],
) -> list[Attempt]:
    """Where else to try units of tasks that hang; on another machine if there is one, whose workers hang as well.

    Args:
        undone: unit -> keys of the tasks that have it.
        places: worker -> keys of the tasks that it has.
        fit: workers that can do the job.
        most: threads that have nothing to do.
        host: the machine that an address is on.
    """
    found: list[Attempt] = []
    for position, tasks in undone.items():
        there = frozenset(address for address, keys in places.items() if not set(tasks).isdisjoint(keys))
        hosts = set(map(host, there))
        others = frozenset(a for a in fit if host(a) not in hosts) or frozenset(fit) - there
        if there and others:
            found.append(Attempt(position, there, others))
    return found[: max(0, most)]


def idle_threads(threads: Mapping[str, int], places: Mapping[str, Collection[str]]) -> int:
    """Threads with nothing to do: of a worker that hangs, tasks wait for threads while others have none.

    Args:
        threads: of each worker.
        places: worker -> keys of the tasks that it has, those that wait there, too.
    """
    return sum(max(0, count - len(places.get(address, ()))) for address, count in threads.items())


class Stranded:
    """Tasks that may run only on workers which Dask has paused: those finish what they have and begin nothing."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}

    def look(
        self, now: float, under_way: Mapping[str, Flight], fit: Collection[str], patience: float
    ) -> tuple[list[str], list[str]]:
        """Find them.

        Args:
            now: seconds.
            under_way: tasks by their keys.
            fit: workers that take tasks now.
            patience: seconds that a task waits for its worker.

        Returns:
            Keys of trials that wait since now, and of tasks that have waited long enough; while no worker takes
            tasks, of trials alone, because others have nowhere to go.
        """
        before = self._since
        waiting = [key for key, flight in under_way.items() if flight.only_on and flight.only_on.isdisjoint(fit)]
        self._since = {key: before.get(key, now) for key in waiting}
        new = [key for key in waiting if key not in before and under_way[key].alone]
        over = [
            key for key in waiting if key in before and now - before[key] >= patience and (under_way[key].alone or fit)
        ]
        return new, over
