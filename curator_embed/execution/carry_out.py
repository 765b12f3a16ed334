"""Carrying work out: who holds the output meanwhile, how the run is stopped, and what is kept of it.

The same for every kind of work: embedding runs, exports, assigned columns.
"""

from __future__ import annotations

import errno
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from distributed import Client
from tqdm.auto import tqdm

from curator_embed.errors import CuratorEmbedError, UsageError
from curator_embed.execution.driver import Driver
from curator_embed.execution.job import FaultKind
from curator_embed.execution.report import RunReport
from curator_embed.execution.work import Work
from curator_embed.sources.nesting import check_state
from curator_embed.sources.shard import Shard
from curator_embed.storage.files import is_remote, local_path, redact
from curator_embed.storage.location import Location
from curator_embed.tables.bookkeeping import Bookkeeping
from curator_embed.tables.lock import OutputLock
from curator_embed.tables.writing import clear_temporaries

REPORT = "report-"
"""What the names of kept reports begin with."""


class RunStopped(CuratorEmbedError):
    """The run could not go on to its end; what was finished is kept.

    Attributes:
        summary: what happened, without what ``report`` tells already.
        report: the account so far.
    """

    def __init__(self, summary: str, report: RunReport, example: str = "") -> None:
        self.summary, self.report = summary, report
        super().__init__(f"{summary}. {example}" if example else summary)


class RowsFailed(RunStopped):
    """``on_error="raise"`` and some rows failed."""


@dataclass(frozen=True)
class Held:
    """The folders that a run writes to, while nobody else may.

    Attributes:
        folders: in an order that all runs share.
        books: the bookkeeping of each, or the one place that was chosen for all.
        locks: of each of these.
        stems: the outputs that are this run's; None for all of a folder.
    """

    folders: Sequence[Location]
    books: Sequence[Bookkeeping]
    locks: Sequence[OutputLock]
    stems: Collection[str] | None = None

    def make(self) -> None:
        """Make the folders, and clear them of what killed runs left behind."""
        for folder in self.folders:
            make_folder(folder)
        self.clear()

    def clear(self) -> None:
        """Remove temporaries, of workers that have died."""
        for folder in self.folders:
            clear_temporaries(folder, self.stems)


@contextmanager
def hold(
    folders: Sequence[Location],
    *,
    part: str = "",
    state: str | None = None,
    stems: Collection[str] | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Iterator[Held]:
    """Hold the locks of some folders for the length of the block; makes none of them.

    Args:
        part: ``Shard.part`` of what is written.
        state: where bookkeeping lies, as the user chose.
        stems: the outputs that are this run's, where other runs may write others.

    Raises:
        UsageError: a folder cannot be written to.
        OutputLocked: another run holds one.
    """
    for folder in folders:
        check_writable(folder)
    if state is not None:
        check_state(state, [f.path if f.is_local else f.fs.unstrip_protocol(f.path) for f in folders], storage_options)
        check_writable(Location.of(state, storage_options))
    places = [Bookkeeping.of(folder, state, storage_options) for folder in folders]
    books = list({book.place.path: book for book in places}.values())  # a chosen place is one for several folders
    with ExitStack() as stack:
        yield Held(folders, books, [stack.enter_context(OutputLock(book, part)) for book in books], stems)


def carry_out(client: Client, work: Work, report: RunReport, held: Held | None, progress: bool) -> None:
    """Carry work out; ``report`` says what became of it, and ``raise_for`` whether all of it was done.

    Args:
        held: what it writes to; None for work that writes nothing.
    """
    started = time.perf_counter()
    locks = () if held is None else held.locks
    with _stop_requests() as stop:
        Driver(client, work, report, stop, locks).run(progress)
    report.wall_seconds += time.perf_counter() - started
    lost = next((lock for lock in locks if lock.lost.is_set()), None)
    if lost is not None and report.shards["left"]:
        report.stopped = False
        report.ended = (
            f"{lost.file.path}: the lock is no longer this run's: it could not be renewed, or another run took it. "
            "Shards that were finished are kept; see that no other run writes there and run again"
        )
    if held is not None and lost is None:  # else they may be the next run's
        held.clear()


def must_see(shard: Shard, lock: OutputLock) -> tuple[str, ...]:
    """Files by which a worker proves that it is on the same disks: the first shard, and the lock of the output."""
    first = shard.image_source()
    proofs = [] if first is None or is_remote(first) else [local_path(first)]
    proofs += [lock.file.path] if lock.file.is_local else []
    return tuple(path for path in proofs if os.path.exists(path))


def check_writable(folder: Location) -> None:
    """See that files can be made in a local folder, or the folder itself; leaves nothing behind.

    Raises:
        UsageError: they cannot.
    """
    if not folder.is_local:
        return
    there = folder.path
    while there and not os.path.lexists(there):
        there = os.path.dirname(there)
    try:
        if not os.path.isdir(there):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), there)
        probe = f"{there.rstrip('/')}/.curator_embed.{secrets.token_hex(4)}"
        with open(probe, "wb"):
            pass
        os.unlink(probe)
    except OSError as error:
        raise _unwritable(folder, error) from error


def make_folder(folder: Location) -> None:
    """Make a local folder.

    Raises:
        UsageError: it cannot be made.
    """
    if folder.is_local:
        try:
            os.makedirs(folder.path, exist_ok=True)
        except OSError as error:
            raise _unwritable(folder, error) from error


def _unwritable(folder: Location, error: OSError) -> UsageError:
    return UsageError(
        f"{folder.path}: cannot write there ({error.strerror}). Choose another output path or change the permissions; "
        "nothing was computed"
    )


def keep_report(report: RunReport, book: Bookkeeping) -> None:
    """Leave the report beside the output; times and dates live here and not in the parquet files.

    The output is finished by then: a report that cannot be kept is told, and is no reason to call it failed.
    """
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    name = f"{REPORT}{stamp}-{secrets.token_hex(2)}.json"
    try:
        book.write(name, {"finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **report.to_dict()})
    except Exception as error:  # every file system has exceptions of its own
        report.note(
            f"{redact(book.file(name).path)}: the report could not be kept there ({type(error).__name__}: "
            f"{redact(str(error))}); the output is not affected"
        )


def raise_for(report: RunReport) -> None:
    """See that all was done.

    Raises:
        RowsFailed: ``on_error="raise"`` and rows failed.
        RunStopped: some of it was not done.
    """
    faults = sorted(report.faults.items())
    rows = [fault for _, fault in faults if fault.kind is FaultKind.FAILED_ROWS]
    if rows:
        raise RowsFailed("rows failed, under on_error='raise'", report, rows[0].message)
    if report.stopped:
        raise RunStopped(
            f"stopped as asked with {report.shards['left']} shards left; run the same again to go on from there", report
        )
    if report.ended:
        raise RunStopped(report.ended, report)
    if faults:
        shard, fault = faults[0]
        count, total = len(faults), sum(report.shards.values())
        which = f"{count} of {total} shards could not be worked on; the others are finished"
        if count == total:
            which = (
                "the shard could not be worked on" if total == 1 else f"none of the {total} shards could be worked on"
            )
        raise RunStopped(which, report, f"{shard}: {fault}")


@contextmanager
def _stop_requests() -> Iterator[threading.Event]:
    """Ctrl-C and SIGTERM ask once for an orderly end; a second Ctrl-C interrupts."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, frame: Any) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()
        tqdm.write("stopping: shards in flight are being finished (press Ctrl-C again to drop them)", file=sys.stderr)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
