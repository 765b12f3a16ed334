"""Who is to blame when workers die and models break: a unit, a worker, a machine, or the work itself.

Pure decisions, without Dask, clocks or logging: events go in, and what is to be done comes out. Dask counts a death
against every task that was on the worker, guilty or not, and a pipeline that breaks takes all units down that it had.
So a unit is blamed only for what happened while it had its machine to itself.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from curator_embed.execution.flights import Flight
from curator_embed.execution.job import FaultKind

ALLOWED_DEATHS = 3
"""So many times a task may lose all workers it was restricted to before it counts as one that killed its workers, as
with Dask's own count (``distributed.scheduler.allowed-failures``), which begins anew whenever a task is handed out."""
TRIES_ALONE = 3
"""Workers that must die over one unit while it has its machine to itself before it is set aside."""
KILLS_IN_A_ROW = 10
"""After so many killed tasks with no unit finished in between, and as many more as are under way at a time, no unit is
to blame. Units that are set aside after they were tried alone do not count: those are to blame."""
BROKEN = 2
"""A unit that had been begun each time when so many pipelines broke down is tried alone."""
BREAKS_IN_A_ROW = 4
"""After so many broken pipelines with no unit finished in between, the model is to blame."""


@dataclass(frozen=True)
class TryApart:
    """Hand these units out again, each in a task of its own, so that fewer are beside one that breaks the next."""

    positions: tuple[int, ...]


@dataclass(frozen=True)
class SetAside:
    """This unit is to blame: ``why`` says what happened and what to do, without naming it."""

    position: int
    kind: FaultKind
    why: str


@dataclass(frozen=True)
class LeaveOut:
    """Give this worker no more tasks."""

    address: str
    why: str


@dataclass(frozen=True)
class LetIn:
    """Give these workers tasks again: something else was to blame, or nobody else is there."""

    addresses: tuple[str, ...]


@dataclass(frozen=True)
class EndRun:
    """No unit is to blame, and going on would not help."""

    why: str


Decision = TryApart | SetAside | LeaveOut | LetIn | EndRun


@dataclass(frozen=True)
class Refusal:
    """A worker said that it cannot do the job.

    Attributes:
        address, host: of the worker.
        cause: what was raised there, in words.
        had_begun: its pipeline broke down while it worked, so that the units it had may be the reason; else it could
            not be built.
    """

    address: str
    host: str
    cause: str
    had_begun: bool


class Blame:
    """What is known of deaths and breaks.

    Attributes:
        suspects: units to be tried alone when everything else is done.
        chance: how often broken workers were let in again. Tasks carry the number from when they were handed out, so
            that a task from before a worker's new chance does not use it up.
    """

    def __init__(self) -> None:
        self.suspects: deque[int] = deque()
        self.chance = 0
        self._deaths: dict[int, Counter[str]] = {}  # unit -> machine -> workers that died there while it was alone
        self._gone: Counter[int] = Counter()  # unit -> how often all workers that it was restricted to died
        self._kills_in_a_row = 0
        self._breaks: Counter[int] = Counter()  # unit -> pipelines that broke while they had it
        self._breakers: set[int] = set()  # units that broke a pipeline while they had it to themselves
        self._broken: dict[str, set[int]] = {}  # workers that are left out because theirs broke -> what they had
        self._given: dict[str, int] = {}  # worker -> the chance it was let in again with
        self._breaks_in_a_row = 0
        self._worked = False

    def finished(self) -> None:
        """Some worker has finished a unit."""
        self._worked, self._kills_in_a_row, self._breaks_in_a_row = True, 0, 0

    def untried(self, position: int) -> None:
        """A trial came to nothing, and nobody died of it: the unit is tried alone again."""
        self.suspects.appendleft(position)

    # -- deaths ----------------------------------------------------------------------------

    def died(self, positions: Sequence[int], under_way: int) -> list[Decision]:
        """Dask gave a task up because its workers died.

        Args:
            positions: of its units that are not finished and are in no other task.
            under_way: tasks under way at a time, at most.
        """
        self.suspects.extend(positions)
        self._kills_in_a_row += 1
        if self._kills_in_a_row < KILLS_IN_A_ROW + under_way:
            return []
        return [
            EndRun(
                f"workers die whatever they work on: {self._kills_in_a_row} tasks in a row killed every worker that "
                "tried them. Look at the workers' logs; they may need more memory (memory_limit), smaller batches or "
                "fewer decode threads. What was finished is kept; run again to go on from there"
            )
        ]

    def gone(self, positions: Sequence[int]) -> bool:
        """All workers that a task was restricted to died, and Dask has nowhere to try it again.

        Returns:
            Whether that happened to one of these units so often that the task killed them.
        """
        self._gone.update(positions)
        return any(self._gone[position] > ALLOWED_DEATHS for position in positions)

    def died_alone(self, position: int, hosts: Iterable[str], deaths: int) -> list[Decision]:
        """A unit had its machine to itself and workers died: a few times, and it is set aside.

        Args:
            hosts: the machines that the trial was on.
            deaths: workers that died on each.
        """
        counted = self._deaths.setdefault(position, Counter())
        counted.update(dict.fromkeys(hosts, deaths))
        if counted.total() < TRIES_ALONE:
            self.suspects.appendleft(position)
            return []
        why = (
            f"{counted.total()} workers that had nothing but this shard to work on died, left, hung or stayed paused. "
            "Look at the workers' logs (out of memory?); run again to retry it"
        )
        return [SetAside(position, FaultKind.KILLS_WORKERS, why)]

    def trials(self, workers: Mapping[str, str], busy: Collection[str]) -> list[tuple[int, str]]:
        """Which suspects to try now, and where: (unit, address). They are suspects no longer.

        A machine may kill whatever it works on: where a unit's worker died is not asked twice before all others.

        Args:
            workers: one of each machine that is there: machine -> address.
            busy: machines that have a trial already.
        """
        found = []
        for machine, address in workers.items():
            if machine in busy:
                continue
            suspect = next((p for p in self.suspects if self._may_try(p, machine, workers.keys())), None)
            if suspect is not None:
                self.suspects.remove(suspect)
                found.append((suspect, address))
        return found

    def _may_try(self, position: int, machine: str, machines: Collection[str]) -> bool:
        deaths = self._deaths.get(position, Counter())
        return not deaths[machine] or all(deaths[other] for other in machines)

    # -- breaks ----------------------------------------------------------------------------

    def refused(
        self, refusal: Refusal, flight: Flight, left: Sequence[int], fit: Collection[str], *, left_out: bool
    ) -> list[Decision]:
        """A worker cannot do the job: its pipeline could not be built, or broke down with a task's units in it.

        Args:
            flight: the task.
            left: those of its units that are not finished and are in no other task.
            fit: workers that can do the job, as far as is known without this word.
            left_out: the worker is left out already.
        """
        decisions: list[Decision] = []
        # A word from before it was let in again is no news of the worker.
        if not left_out and flight.chance >= self._given.get(refusal.address, 0):
            decisions.append(LeaveOut(refusal.address, refusal.cause))
            fit = set(fit) - {refusal.address}
            if refusal.had_begun:
                self._broken[refusal.address] = set()
                self._breaks_in_a_row += not flight.alone
        if not refusal.had_begun:
            return decisions
        self._broken.setdefault(refusal.address, set()).update(flight.positions)
        if flight.alone:
            return decisions + self._broke_alone(flight.positions[0], refusal, fit)
        self._breaks.update(flight.positions)
        again = tuple(position for position in left if self._breaks[position] < BROKEN)
        self.suspects.extend(position for position in left if position not in again)
        if again:
            decisions.append(TryApart(again))
        if self._breaks_in_a_row >= BREAKS_IN_A_ROW:
            decisions.append(_model_breaks(refusal))
        return decisions

    def _broke_alone(self, position: int, refusal: Refusal, fit: Collection[str]) -> list[Decision]:
        if position not in self._breakers and fit:  # that worker may break on everything: try another
            self._breakers.add(position)
            self.suspects.appendleft(position)
            return []
        why = (
            f"what it holds breaks the model down, also with nothing beside it ({refusal.cause}). Look at its images, "
            "or at the model; run again to retry it"
        )
        broken_by_it = [address for address, had in self._broken.items() if position in had]
        return [SetAside(position, FaultKind.BREAKS_MODEL, why), self._let_in(broken_by_it)]

    def nobody_fit(self, there: Collection[str]) -> list[Decision]:
        """No worker that is there can be given work: those whose pipelines broke may build new ones."""
        broken = [address for address in self._broken if address in there]
        return [self._let_in(broken)] if broken else []

    def _let_in(self, addresses: Sequence[str]) -> LetIn:
        self.chance += 1
        for address in addresses:
            self._broken.pop(address, None)
            self._given[address] = self.chance
        return LetIn(tuple(addresses))

    def nobody_able(self, refusal: Refusal) -> list[Decision]:
        """No worker can do the job, the last one since this word; nothing where it is to be waited for others."""
        return [_model_breaks(refusal)] if self._breaks and not self._worked else []

    @property
    def broke_before(self) -> bool:
        """Some pipeline has broken down in this run."""
        return bool(self._breaks)

    @property
    def hopeless(self) -> bool:
        """Nothing has been done, and nobody's pipeline was ever built and broke."""
        return not self._worked and not self._breaks


def _model_breaks(refusal: Refusal) -> EndRun:
    return EndRun(
        "the model breaks down whatever it works on, on every worker that was tried, the last time on "
        f"{refusal.host} ({refusal.cause}). Look at the model and at the log. What was finished is kept; run again to "
        "go on from there"
    )
