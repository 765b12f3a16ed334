"""A kind of work without a pipeline, for tests: each unit writes a file of its own from a value that it is given.

A module of its own because worker processes import it.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distributed import Client, Future

from curator_embed.execution.job import ShardReport
from curator_embed.execution.report import RunReport
from curator_embed.execution.work import Round, UnitJob, Work, groups_of


@dataclass(frozen=True)
class NewFile:
    """A file to be written: its number is its content, times what it is given."""

    folder: str
    number: int

    @property
    def name(self) -> str:
        return f"{self.number:05d}"

    @property
    def path(self) -> Path:
        return Path(self.folder) / f"{self.name}.txt"


@dataclass(frozen=True)
class WriteFiles(UnitJob):
    """Writes the files. ``kills`` and ``fails`` are numbers of those that kill their worker or raise."""

    pause: float = 0.0
    kills: frozenset[int] = frozenset()
    fails: frozenset[int] = frozenset()
    must_see: tuple[str, ...] = ()

    def run_unit(self, unit: NewFile, given: int | None) -> ShardReport:
        if unit.path.exists():
            return ShardReport(unit.name, read=1, embedded=1, skipped=True)
        if unit.number in self.kills:
            with open(f"{unit.folder}/killed", "a") as file:
                file.write(f"{os.getpid()}\n")
            time.sleep(0.3)  # so that the nanny knows that the process has started
            os.kill(os.getpid(), signal.SIGKILL)
        if unit.number in self.fails:
            raise OSError(28, "No space left on device", str(unit.path))
        time.sleep(self.pause)
        temporary = unit.path.with_suffix(f".{os.getpid()}")
        temporary.write_text(f"{unit.number * (given or 0)}")
        temporary.replace(unit.path)
        return ShardReport(unit.name, read=1, embedded=1)


def square(number: int, fails: bool) -> int:
    """What file ``number`` is given."""
    if fails:
        raise ValueError(f"{number} has no square")
    return number * number


class Writing(Work):
    """``count`` files, in tasks of four at most."""

    counts, bytes = "files", 16 << 20

    def __init__(
        self, folder: Path, count: int, job: WriteFiles, client: Client | None = None, no_value: int = -1
    ) -> None:
        self.units: Sequence[NewFile] = [NewFile(str(folder), number) for number in range(count)]
        self.todo = [n for n, unit in enumerate(self.units) if not unit.path.exists()]
        self.total, self.threads, self.job, self.client = len(self.todo), {}, job, client
        self.no_value = no_value
        self.asked: list[int] = []

    def finished(self) -> Iterator[ShardReport]:
        for unit in self.units:
            if unit.path.exists():
                yield ShardReport(unit.name, read=1, embedded=1, skipped=True)

    def rounds(self, workers: int, report: RunReport) -> Iterator[Round]:
        yield Round(groups_of(self.todo, [self.bytes] * len(self.todo), workers), self.job)

    def given(self, position: int, only_on: Collection[str] | None) -> Future[Any] | None:
        if self.client is None:
            return None
        self.asked.append(position)
        where = None if only_on is None else list(only_on)
        return self.client.submit(square, position, position == self.no_value, pure=False, workers=where)

    def place(self, position: int) -> str:
        return str(self.units[position].path)
