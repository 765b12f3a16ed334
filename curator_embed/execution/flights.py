"""The driver's book: which units wait, which tasks have which, and which are settled. Knows no Dask and no clock.

A unit may be in two tasks at a time, because one of them hangs; what counts is who is first.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from curator_embed.execution.job import ShardReport


@dataclass(frozen=True)
class Flight:
    """A task that was handed out.

    Attributes:
        positions: of its units.
        began: when it was handed out, in seconds of whatever clock its reader has.
        only_on: addresses it may run on; None for any.
        alone: the trial of a single unit that has its machine to itself.
        chance: how many chances had been given to broken workers by then (``Blame.chance``).
    """

    positions: tuple[int, ...]
    began: float = 0.0
    only_on: frozenset[str] | None = None
    alone: bool = False
    chance: int = 0


class Flights:
    """Units on their way from waiting to settled.

    Attributes:
        waiting: groups of units that no task has.
        under_way: tasks by their keys.
        most: tasks under way at a time, at most.
    """

    def __init__(self) -> None:
        self.waiting: deque[tuple[int, ...]] = deque()
        self.most = 0
        self._under_way: dict[str, Flight] = {}
        self._held: Counter[int] = Counter()  # unit -> tasks under way that have it
        self._settled: set[int] = set()
        self._doubted: set[int] = set()  # units that one task could not use while another had them
        self._failed: set[int] = set()  # units whose one task killed or broke its worker while another had them

    @property
    def under_way(self) -> Mapping[str, Flight]:
        """Tasks by their keys, in the order in which they were handed out."""
        return self._under_way

    def add(self, groups: Iterable[tuple[int, ...]]) -> None:
        """Let groups of units wait, those that were settled before (held ones) as if they had not been."""
        for group in groups:
            self._settled.difference_update(group)
            self.waiting.append(group)

    def begin(self, key: str, flight: Flight) -> None:
        """A task has been handed out."""
        self._failed.difference_update(p for p in flight.positions if not self._held[p])
        self._under_way[key] = flight
        self._held.update(flight.positions)
        self.most = max(self.most, len(self._under_way))

    def end(self, key: str) -> Flight | None:
        """A task is over, or wanted no more; None when it has been before."""
        flight = self._under_way.pop(key, None)
        for position in flight.positions if flight is not None else ():
            self._held[position] -= 1
            if not self._held[position]:
                del self._held[position]
        return flight

    def settle(self, position: int) -> None:
        """Whatever became of a unit: nothing more is done about it."""
        self._settled.add(position)

    def unfinished(self, flight: Flight) -> list[int]:
        """Units of a task that is over which are not settled and which no other task has."""
        return [p for p in flight.positions if p not in self._settled and not self._held[p]]

    def undone(self, stuck: Collection[str]) -> dict[int, list[str]]:
        """Units that only tasks which hang have, with the keys of these; those left out whose other try has failed."""
        found: dict[int, list[str]] = defaultdict(list)
        for key in stuck:
            for position in self._under_way[key].positions if key in self._under_way else ():
                if position not in self._settled and position not in self._failed:
                    found[position].append(key)
        return {position: keys for position, keys in found.items() if len(keys) == self._held[position]}

    def lost(self, stuck: Iterable[str]) -> list[str]:
        """Of tasks that hang, those that have only units whose other try has failed: nothing is hoped of them."""
        left = {key: set(self._under_way[key].positions) - self._settled for key in stuck}
        return [key for key, positions in left.items() if positions and positions <= self._failed]

    def fail(self, flight: Flight) -> None:
        """A task that is over killed or broke its worker: units that are in another task are not tried beside it again,
        and it decides."""
        self._failed.update(p for p in flight.positions if self._held[p])

    def put_back(self, flight: Flight) -> None:
        """Let the units of a task that came to nothing wait again, before all others."""
        if left := self.unfinished(flight):
            self.waiting.appendleft(tuple(left))

    def put_back_apart(self, positions: Iterable[int]) -> None:
        """Let units wait again, one by one, after all others."""
        self.waiting.extend((position,) for position in positions)

    def take_in(self, flight: Flight, reports: Sequence[ShardReport | None]) -> list[tuple[int, ShardReport]]:
        """Settle the units that a task which is over has reports of; returns those reports that count.

        The first word about a unit counts. Only when it is a fault, and another task has the unit, the fault may be
        the machine's: the other try decides, or a third one.
        """
        counted = []
        for position, report in zip(flight.positions, reports, strict=True):
            if report is None or position in self._settled:
                continue
            if report.fault is not None and position not in self._doubted and self._held[position]:
                self._doubted.add(position)
                continue
            self._settled.add(position)
            counted.append((position, report))
        return counted

    def needless(self, positions: Iterable[int]) -> list[str]:
        """Keys of tasks all of whose units are settled, now that these are."""
        if not any(self._held[position] for position in positions):
            return []
        return [key for key, flight in self._under_way.items() if self._settled.issuperset(flight.positions)]
