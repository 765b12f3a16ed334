"""What a driver is given to carry out: units of work, and a job that a worker does to each of them.

Apart from the driver, so that a kind of work (an embedding run, an export) says what it is and nothing of how workers
are looked after.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from distributed import Future

from curator_embed.errors import StepError
from curator_embed.execution.job import ShardJob, ShardReport, fault_of
from curator_embed.execution.planning import group_shards
from curator_embed.execution.report import RunReport
from curator_embed.pipeline.pipeline import Pipeline


class Unit(Protocol):
    """The smallest thing that is done or not done: a shard to embed, or a new shard to write. Picklable and small."""

    @property
    def name(self) -> str:
        """Unique within the work; for people, too."""


class Task(Protocol):
    """What a job may ask of the task that it runs in."""

    def stopping(self) -> bool:
        """Whether the run was asked to stop: what has begun is finished, nothing else is begun."""

    def giving_back(self) -> bool:
        """Whether others wait for this task's units: those that are not finished are theirs."""

    def tell(self, images: int) -> None:
        """Count images that are through, for the progress bar."""

    def pipeline(self, job: ShardJob) -> AbstractContextManager[Pipeline | None]:
        """The run's pipeline on this worker; None when the run is over.

        Raises:
            WorkerUnfit: it cannot be built here, or broke down in the block.
        """


class Job(ABC):
    """What is done to units, in a worker. Picklable, small, the same for all workers.

    Attributes:
        must_see: files on local disks that a worker must find at these paths, or it is on another disk.
    """

    must_see: tuple[str, ...] = ()

    @abstractmethod
    def run(self, units: Sequence[Any], given: Sequence[Any], task: Task) -> list[ShardReport | None]:
        """Do it to some units, one after another or overlapped.

        A unit may be handed out again after its worker died, and twice at a time when a worker hangs: it is finished
        by one atomic step (a rename), and who comes second finds it done.

        Args:
            given: what ``Work.given`` promised for each unit, computed.

        Returns:
            As many entries as units: what became of each, None for those that were given back or not begun. What is
            wrong with a unit is its report's ``fault``; an exception ends the run.
        """


class UnitJob(Job):
    """A job that needs no pipeline and takes one unit after another."""

    @abstractmethod
    def run_unit(self, unit: Any, given: Any) -> ShardReport:
        """Do it to one unit. What it raises is this unit's fault, and the others go on (but see StepError)."""

    def run(self, units: Sequence[Any], given: Sequence[Any], task: Task) -> list[ShardReport | None]:
        """See ``Job.run``."""
        reports: list[ShardReport | None] = [None] * len(units)
        for number, unit in enumerate(units):
            if task.stopping() or task.giving_back():
                break
            try:
                report = self.run_unit(unit, given[number])
            except StepError:
                raise
            except Exception as error:
                report = ShardReport(unit.name, fault=fault_of(error, unit.name))
            task.tell(report.read)
            reports[number] = report
        return reports


@dataclass(frozen=True)
class Round:
    """Units that are handed out beside each other; the next round begins when they are through.

    Attributes:
        groups: positions of the units of each task.
        job: what is done to them.
    """

    groups: Sequence[tuple[int, ...]]
    job: Job


class Work(ABC):
    """Units in order, and what is done to them. Lives in the driver's process and never travels.

    What it keeps of a unit is all that the driver's process keeps of it, beside a number.

    Attributes:
        units: all of them, finished ones included; a position is an index into them.
        todo: positions of those that are not finished.
        total: images (or rows) that are left to be worked on, for the progress bar; None where not known.
        counts: what ``total`` counts, for the log.
        stop_at_fault: a unit that cannot be used ends the run.
        threads: threads of a worker's stages beside those that run tasks, for the report.
    """

    units: Sequence[Unit]
    todo: Sequence[int]
    total: int | None = None
    counts: str = "images"
    stop_at_fault: bool = False
    threads: dict[str, int]

    def finished(self) -> Iterable[ShardReport]:
        """Reports of the units that were finished before; asked for once."""
        return ()

    @abstractmethod
    def rounds(self, workers: int, report: RunReport) -> Iterator[Round]:
        """What to hand out. Asked for the next round when the last one is through; not again once the run is to stop.

        Args:
            workers: how many there are when the run begins.
            report: the account so far, as it grows. Setting ``ended`` says why no further round can help.
        """

    def settle(self, position: int, report: ShardReport) -> None:
        """A unit is done or set aside: the place to keep what its report found."""
        return

    def hold(self, position: int, report: ShardReport) -> None:
        """A unit came back held (``ShardReport.held``): nothing was written, and a later round decides."""
        raise NotImplementedError(f"{type(self).__name__} has no units that are held")

    def given(self, position: int, only_on: Collection[str] | None) -> Future[Any] | None:
        """What has to be computed before this unit is begun; its value comes with the unit. Asked for at every try.

        Args:
            only_on: the workers that this try may use: what kills its worker is to kill these, and not others.
        """
        return None

    def place(self, position: int) -> str:
        """What to name in messages about a unit: a path where it has one."""
        return self.units[position].name


def groups_of(positions: Sequence[int], sizes: Sequence[int], workers: int) -> list[tuple[int, ...]]:
    """Tasks of neighbouring units, see ``group_shards``; ``sizes`` are those of ``positions``, in bytes."""
    return [tuple(positions[n] for n in group) for group in group_shards(sizes, workers)]
