"""The driver's loop: hands tasks to the workers that there are, takes in reports, and outlives what workers do.

Workers may come, leave, die and differ while a run goes on. A shard that kills its workers is told from those that
were merely beside it by trying it alone.
"""

from __future__ import annotations

import logging
import queue
import secrets
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING

from distributed import Client, Future
from distributed.scheduler import KilledWorker, NoValidWorkerError

from curator_embed.execution.job import Fault, FaultKind, ShardReport
from curator_embed.execution.messages import Messages
from curator_embed.execution.planning import group_shards
from curator_embed.execution.progress import Progress
from curator_embed.execution.report import RunReport
from curator_embed.execution.worker import TaskReport, WorkerUnfit, progress_topic, run_task
from curator_embed.execution.workers import WAIT_KEY, Workers, host, patience, scheduler_address
from curator_embed.tables.lock import OutputLock

if TYPE_CHECKING:
    from curator_embed.execution.run import RunPlan

log = logging.getLogger(__name__)

TASKS_UNDER_WAY = 2
"""Tasks handed to Dask for each of the workers' threads: one runs, one waits."""
LOOK_EVERY_S = 1.0
"""How often the driver looks which workers there are."""
SLOW = 2.0
"""A task that goes on for so many times what others took for as many shards, while threads have nothing to do, is slow.
One of several shards gives back what it has not finished; what it still has after twice that time, and a shard that is
alone in a slow task, is tried on another worker as well."""
SLOW_AFTER_S = 2.0
"""No task is slow before there has been a thread with nothing to do for so long."""
RESULT_WITHIN_S = 60.0
"""A finished task's reports are fetched from its worker in this time, or the worker has died with them."""
TRIES_ALONE = 3
"""Workers that must die over one shard while it has its machine to itself before it is set aside."""
KILLS_IN_A_ROW = 10
"""After so many killed tasks with no shard finished in between, and as many more as are under way at a time, no shard
is to blame. Shards that are set aside after they were tried alone do not count: those are to blame."""
BROKEN = 2
"""A shard that had been begun each time when so many pipelines broke down is tried alone."""
BREAKS_IN_A_ROW = 4
"""After so many broken pipelines with no shard finished in between, the model is to blame."""


PAUSED_REMEDY = (
    "give the workers more memory (memory_limit), use a smaller batch or fewer decode threads, or change Dask's "
    "setting distributed.worker.memory.pause"
)


class SchedulerGone(Exception):
    """The scheduler has dropped this run's tasks: it died, was restarted, or cannot be reached."""


@dataclass(frozen=True)
class _Flight:
    """A task that Dask has been given.

    Attributes:
        only_on: addresses it may run on; None for any.
        alone: the trial of a single shard that has its machine to itself.
        chance: how many chances had been given to broken workers when it was handed out.
        began: when it was handed out, on the monotonic clock.
    """

    future: Future[TaskReport]
    positions: tuple[int, ...]
    only_on: frozenset[str] | None = None
    alone: bool = False
    chance: int = 0
    began: float = field(default_factory=time.monotonic)


class Driver:
    """One run's tasks, from the first to the last.

    Args:
        plan: what is to be done; its open shards are worked off.
        report: counted into.
        limit: only the first so many rows.
        stop: set when the run is asked to stop.
        locks: of the output; a lost one stops the run.
    """

    def __init__(
        self,
        client: Client,
        plan: RunPlan,
        report: RunReport,
        limit: int | None,
        stop: threading.Event,
        locks: Sequence[OutputLock],
    ) -> None:
        self.client, self.plan, self.report, self.limit = client, plan, report, limit
        self.stop, self.locks = stop, locks
        self.run_id = secrets.token_hex(8)
        self.workers = Workers(client)
        self.messages = Messages(client, self.run_id, self._asked_to_stop)
        self._waiting: deque[tuple[int, ...]] = deque()
        self._flights: dict[str, _Flight] = {}
        self._finished: queue.SimpleQueue[Future[TaskReport]] = queue.SimpleQueue()
        self._suspects: deque[int] = deque()  # shards of tasks that killed or broke their workers, to be tried alone
        self._deaths: defaultdict[int, Counter[str]] = defaultdict(Counter)  # by host, while trying this shard alone
        self._on_paused: dict[str, float] = {}  # since when the only workers of a task have been paused
        self._kills_in_a_row = self._most_under_way = 0
        self._breaks: Counter[int] = Counter()  # pipelines that broke while they had this shard
        self._breakers: set[int] = set()  # shards that broke a pipeline while they had it to themselves
        self._broken: dict[str, set[int]] = {}  # workers that are left out because theirs did -> what they had
        self._chance = 0  # how often broken workers were let in again
        self._given: dict[str, int] = {}  # worker -> the chance it was let in again with
        self._breaks_in_a_row = 0
        self._worked = False  # some worker has finished a task
        self._paces: deque[float] = deque(maxlen=200)  # seconds a shard of the last tasks
        self._settled: set[int] = set()  # shards that are counted, whatever became of them
        self._twice: set[int] = set()  # shards that were handed out a second time while the first had them
        self._doubted: set[int] = set()  # shards that one task could not use while another had them
        self._told_slow: set[str] = set()  # workers
        self._idle, self._asked_idle = 0, 0.0  # threads with nothing to do, and when it was asked
        self._idle_since: float | None = None  # since when there are threads with nothing to do
        self._told_of_absence = False
        self._avoid: dict[int, str] = {}  # shard -> the worker that was too slow for it

    def run(self, show: bool) -> None:
        """Work off the plan's open shards."""
        for position, found in enumerate(self.plan.surveys):
            if found.done:
                self._add(self.plan.finished(position))
        finished_before = self.report.read
        todo = self.plan.todo
        if not todo:
            return
        if self._stopping():
            self._leave(len(todo))
            return
        self.workers.look()
        total = self.plan.rows if self.plan.rows_known else None
        topic = progress_topic(self.run_id)
        with Progress(total, show) as bar:
            self.bar = bar
            self.client.subscribe_topic(topic, lambda event: bar.update(event[1]["images"]))
            try:
                with self.messages.open():
                    if self.limit is None:
                        sizes = [int(self.plan.shards[p].fingerprint().get("size") or 0) for p in todo]
                        groups = group_shards(sizes, len(self.workers.threads))
                        self._work_off([tuple(todo[n] for n in group) for group in groups])
                    else:
                        self._one_by_one(todo, self.limit)
                    # Workers tell of their images now and then; what they have not told yet is in their reports.
                    bar.update(self.report.read - finished_before - bar.n)
            finally:
                with suppress(ValueError):  # a client that lost its scheduler has forgotten the topic
                    self.client.unsubscribe_topic(topic)
                threads = max(self.workers.threads.values(), default=1)
                self.report.threads |= {"read": threads, "write": threads, "decode": self.plan.job.decode_threads}
                self.report.workers = max(1, self.workers.most)
                self.report.workers_lost = self.workers.lost
                self.report.worker_seconds = self.workers.seconds

    # -- the loop --------------------------------------------------------------------------

    def _one_by_one(self, todo: Sequence[int], limit: int) -> None:
        """With a limit, shards are worked in order until it is reached."""
        left = limit - self.report.read
        for number, position in enumerate(todo):
            if left <= 0:
                break
            if self._stopping() or self.report.ended:
                self._leave(len(todo) - number)
                break
            rows = self.plan.surveys[position].rows
            before = self.report.read
            self._work_off([(position,)], None if rows is not None and rows <= left else left)
            left -= self.report.read - before

    def _work_off(self, groups: Sequence[tuple[int, ...]], limit: int | None = None) -> None:
        """Hand out groups of shards until all are done, set aside, or the run cannot go on."""
        self._waiting.extend(groups)
        try:
            while self._waiting or self._flights or self._suspects:
                self._look(LOOK_EVERY_S)
                if self.report.ended or (self._stopping() and not (self._flights and self.workers.able)):
                    break
                if not self._stopping():
                    self._hand_out(limit)
                    self._look_after_slow(limit)
                with suppress(queue.Empty):
                    self._take(self._finished.get(timeout=LOOK_EVERY_S))
        except SchedulerGone as error:
            self.report.ended = (
                f"lost the Dask scheduler at {scheduler_address(self.client)} ({error}). What was finished is kept: "
                "start the cluster again and run the same again to go on from there"
            )
        finally:
            begun = (flight.positions for flight in self._flights.values())
            left = {position for positions in (*self._waiting, *begun, self._suspects) for position in positions}
            self._leave(len(left - self._settled))
            for flight in self._flights.values():
                flight.future.cancel()
            for emptied in (self._waiting, self._flights, self._suspects):
                emptied.clear()

    def _look(self, every: float = 0.0) -> None:
        """Follow the cluster: who is there now, and which tasks can no longer run where they must."""
        try:
            if self.client.status != "running":
                raise SchedulerGone("the connection broke")
            if not self.workers.look(every):
                return
        except OSError as error:
            raise SchedulerGone(str(error)) from None
        there = self.workers.threads.keys()
        for key, flight in list(self._flights.items()):
            if flight.only_on is not None and not flight.only_on & there:
                del self._flights[key]
                flight.future.cancel()
                if flight.alone:
                    self._left_alone(flight, 1)
                else:
                    self._again(flight)
        self._watch_paused()
        if not self.workers.fit and (broken := self._broken.keys() & there):
            self._let_in_again(broken)
        if self.workers.absent_since is not None:
            self._wait_for_workers(self.workers.absent_since)
        else:
            self._told_of_absence = False

    def _watch_paused(self) -> None:
        """A paused worker finishes what it has begun and begins nothing: what waits for it alone is not left there."""
        fit, now, since = self.workers.fit.keys(), time.monotonic(), self._on_paused
        paused = [key for key, flight in self._flights.items() if flight.only_on and fit.isdisjoint(flight.only_on)]
        self._on_paused = {key: since.get(key, now) for key in paused}
        for key in paused:
            flight, waited = self._flights[key], now - since.get(key, now)
            name, where = self.plan.shards[flight.positions[0]].name, ", ".join(sorted(flight.only_on or ()))
            if flight.alone and key not in since:
                log.warning(
                    "%s is tried alone on %s, which Dask has paused; waiting %.0f s for it to go on (%s)",
                    name,
                    where,
                    patience(),
                    PAUSED_REMEDY,
                )
            elif key in since and waited >= patience() and (flight.alone or fit):
                del self._flights[key]
                flight.future.cancel()
                if flight.alone:
                    self._died_alone(flight, 1)
                else:
                    log.warning("%s has waited %.0f s for %s, which Dask has paused", name, waited, where)
                    self._again(flight)

    def _wait_for_workers(self, since: float) -> None:
        waited = time.monotonic() - since
        what, go_on, remedy = "no worker is left for this job", "come", "start workers"
        if self.workers.able:
            what, go_on, remedy = "Dask has paused all workers, their memory is nearly full", "go on", PAUSED_REMEDY
        if waited >= patience():
            self.report.ended = (
                f"{what} (cluster at {scheduler_address(self.client)}), and none was there to {go_on} within "
                f"{patience():.0f} s. What was finished is kept: {remedy}, and run the same again to go on from there, "
                f"or wait longer with Dask's setting {WAIT_KEY}"
            )
            return
        if not self._told_of_absence:
            self._told_of_absence = True
            log.warning("%s; waiting %.0f s for one to %s (%s)", what, patience(), go_on, remedy)
        self.bar.set_postfix_str(f"{what}, waiting {waited:.0f} of {patience():.0f} s")

    def _hand_out(self, limit: int | None) -> None:
        """Keep as much under way as the workers that are there can use; what killed workers waits for the end."""
        fit, restriction = self.workers.fit, self.workers.restriction
        if not fit and self.workers.threads:
            return  # those that are there cannot do this job, or not now
        # Even without workers some tasks wait: they are what makes an adaptive cluster start one.
        while self._waiting and len(self._flights) < max(2, TASKS_UNDER_WAY * sum(fit.values())):
            positions = self._waiting.popleft()
            quicker = frozenset(fit) - {self._avoid.get(positions[0], "")}
            self._submit(positions, limit, quicker if 0 < len(quicker) < len(fit) else restriction)
        if not self._suspects or self._waiting or not all(flight.alone for flight in self._flights.values()):
            return
        self._look()  # a shard must not be blamed for a worker that was dead before it came
        busy = {host(address) for flight in self._flights.values() for address in flight.only_on or ()}
        hosts = self.workers.one_a_host()
        for free, address in hosts.items():
            # A machine may kill whatever it works on: where a shard's worker died is not asked twice before all others.
            suspect = next(
                (p for p in self._suspects if not self._deaths[p][free] or hosts.keys() <= self._deaths[p].keys()), None
            )
            if suspect is not None and free not in busy:
                self._suspects.remove(suspect)
                self._submit((suspect,), limit, frozenset([address]), alone=True)

    def _look_after_slow(self, limit: int | None) -> None:
        """While threads have nothing to do: ask slow tasks for what they have, and give it to others."""
        now = time.monotonic()
        idle = 0 if self._waiting else self._idle_threads()
        if idle <= 0:
            self._idle_since = None
            return
        self._idle_since = self._idle_since or now
        if len(self.workers.fit) < 2 or not self._paces:
            return
        usual, slow, stuck = median(self._paces), [], []
        for key, flight in self._flights.items():
            # While threads have nothing to do, a task that waits does so on a worker that answers nobody: else Dask
            # would have moved it.
            waited, several = now - max(self._idle_since, flight.began), len(flight.positions) > 1
            patient = max(SLOW_AFTER_S, SLOW * usual * len(flight.positions))
            if several and waited > patient:
                slow.append(key)
            if not flight.alone and waited > patient * (1 + several):
                stuck.append(key)
        if slow:
            self.messages.ask_back(slow)
        if stuck:
            self._try_elsewhere(stuck, idle, limit)

    def _idle_threads(self) -> int:
        """Threads with nothing to do: of a worker that hangs, tasks wait for threads while others have none."""
        fit = self.workers.fit
        if len(self._flights) < sum(fit.values()):
            return sum(fit.values()) - len(self._flights)
        if time.monotonic() - self._asked_idle >= LOOK_EVERY_S:
            self._asked_idle, places = time.monotonic(), self._places()
            self._idle = sum(max(0, count - len(places.get(address, ()))) for address, count in fit.items())
        return self._idle

    def _places(self) -> Mapping[str, Sequence[str]]:
        """The tasks of every worker, those that wait there, too."""
        try:
            places: Mapping[str, Sequence[str]] = self.client.processing()
        except OSError as error:
            raise SchedulerGone(str(error)) from None
        return places

    def _try_elsewhere(self, tasks: Sequence[str], most: int, limit: int | None) -> None:
        """Hand out shards of tasks that hang a second time, to other workers; who is first with a shard wins.

        Both make the same file, and who is second finds that out when it writes (``ShardRun.finish``).
        """
        held = Counter(position for flight in self._flights.values() for position in flight.positions)
        undone = {
            key: [p for p in self._flights[key].positions if held[p] == 1 and p not in self._settled] for key in tasks
        }
        if not any(undone.values()):
            return
        places, fit = self._places(), self.workers.fit.keys()
        for key, positions in undone.items():
            there = {address for address, keys in places.items() if key in keys}
            hosts = set(map(host, there))
            others = {a for a in fit if host(a) not in hosts} or fit - there  # a machine's other workers hang with it
            if not there or not others:
                continue
            for position in positions[: max(0, most)]:
                new = not there <= self._told_slow
                self._told_slow |= there
                name, place = self.plan.shards[position].name, ", ".join(there)
                log.log(
                    logging.WARNING if new else logging.INFO, "%s takes long on %s; trying it elsewhere", name, place
                )
                self._twice.add(position)
                self._submit((position,), limit, frozenset(others))
                most -= 1

    def _submit(
        self, positions: tuple[int, ...], limit: int | None, only_on: frozenset[str] | None, alone: bool = False
    ) -> None:
        shards = [self.plan.shards[p] for p in positions]
        where = sorted(only_on) if only_on is not None else None
        try:
            future = self.client.submit(
                run_task, shards, self.plan.job, self.run_id, limit, self._chance, pure=False, workers=where
            )
        except RuntimeError as error:  # a closed client
            self._waiting.append(positions)
            raise SchedulerGone(str(error)) from None
        self._flights[str(future.key)] = _Flight(future, positions, only_on, alone, self._chance)
        self._most_under_way = max(self._most_under_way, len(self._flights))
        future.add_done_callback(self._finished.put)

    def _leave(self, shards: int) -> None:
        """Count shards that were not begun."""
        self.report.shards["left"] += shards
        self.report.stopped = self.report.shards["left"] > 0 and self._asked_to_stop()

    def _stopping(self) -> bool:
        raising = self.plan.job.on_error == "raise" and bool(self.report.faults)
        return raising or self._asked_to_stop()

    def _asked_to_stop(self) -> bool:
        return self.stop.is_set() or any(lock.lost.is_set() for lock in self.locks)

    # -- what comes back -------------------------------------------------------------------

    def _take(self, future: Future[TaskReport]) -> None:
        """Count a finished task, or find out why it did not finish."""
        flight = self._flights.get(str(future.key))
        if flight is None:
            return  # cancelled by us
        if future.status == "cancelled":
            raise SchedulerGone("it went away or was restarted")
        del self._flights[str(future.key)]
        if future.status == "error":
            error = future.exception()
            if isinstance(error, KilledWorker):
                self._after_deaths(flight, error.allowed_failures + 1)
            elif isinstance(error, WorkerUnfit):
                self._after_refusal(flight, error)
            elif isinstance(error, NoValidWorkerError):  # the scheduler's patience is set to less than ours
                self._again(flight)
            else:
                assert error is not None
                raise error.with_traceback(future.traceback())
            return
        try:
            task = future.result(timeout=RESULT_WITHIN_S)
        except (CancelledError, OSError):
            # The worker, or the scheduler, died with the reports; finished shards are found done.
            self._again(flight)
        else:
            self._count(flight, task)
        finally:
            future.release()

    def _count(self, flight: _Flight, task: TaskReport) -> None:
        done = 0
        for position, report in zip(flight.positions, task.shards, strict=True):
            if report is None or position in self._settled:
                continue
            if report.fault and position not in self._doubted and self._is_elsewhere(position):
                self._doubted.add(position)  # it may be the machine's fault: the other try decides, or a third one
                continue
            # Not done when the run began, done when it came to it: a worker of this run finished it and died.
            report.skipped = False
            self._add(report)
            self._settled.add(position)
            done += 1
        if done:
            self._worked, self._kills_in_a_row, self._breaks_in_a_row = True, 0, 0
            self.workers.have_worked()
            self._paces.append(task.seconds / done)
            self._call_off(flight.positions)
        rest = self._only_here(flight)
        if rest and self._stopping():
            self._leave(len(rest))
        elif rest:  # the task was slow: one by one, to others
            self._waiting.extend((position,) for position in rest)
            self._avoid.update(dict.fromkeys(rest, task.worker))
        self.bar.set_postfix(failed=self.report.failed)

    def _call_off(self, positions: Sequence[int]) -> None:
        """Nobody needs the other tasks that have only shards of these, all of which are finished."""
        if self._twice.isdisjoint(positions):
            return
        for key, flight in list(self._flights.items()):
            if self._settled.issuperset(flight.positions):
                del self._flights[key]
                flight.future.cancel()
                self.messages.ask_back([key])  # Dask lets it run to its end

    def _only_here(self, flight: _Flight) -> list[int]:
        """Shards of a task that is over which are not finished and which no other task has."""
        return [
            position
            for position in flight.positions
            if position not in self._settled and not self._is_elsewhere(position)
        ]

    def _is_elsewhere(self, position: int) -> bool:
        """Whether a task that is under way has this shard."""
        return position in self._twice and any(position in flight.positions for flight in self._flights.values())

    def _add(self, shard: ShardReport) -> None:
        """Count a shard. With ``on_error="raise"`` the failed rows of an earlier run count as this one's would."""
        if self.plan.job.on_error == "raise" and shard.skipped and shard.failed:
            shard.fault = Fault(
                FaultKind.FAILED_ROWS,
                f"{shard.shard}: {shard.failed} of {shard.read} rows failed in the run that finished this shard; use "
                "on_error='keep' or on_error='drop' to go on without them",
            )
        self.report.add(shard)

    def _again(self, flight: _Flight) -> None:
        """Put a task's shards where they came from."""
        if flight.alone:
            self._suspects.appendleft(flight.positions[0])
        elif left := self._only_here(flight):
            self._waiting.appendleft(tuple(left))

    # -- workers that die or cannot do the job ---------------------------------------------

    def _after_deaths(self, flight: _Flight, deaths: int) -> None:
        """Dask gave a task up because its workers died; it counts every task that was on them, guilty or not."""
        if flight.alone:
            self._left_alone(flight, deaths)
            return
        suspects = self._only_here(flight)
        if suspects and not self._suspects:
            log.warning("workers died; the shards that were on them are tried once more, each alone, at the end")
        self._suspects.extend(suspects)
        self._count_kill()

    def _left_alone(self, flight: _Flight, deaths: int) -> None:
        """The worker went while a shard had its machine to itself; was it the shard?"""
        try:
            retired = any(map(self.workers.retired, flight.only_on or ()))
        except OSError as error:
            raise SchedulerGone(str(error)) from None
        if retired:
            self._again(flight)
        else:
            self._died_alone(flight, deaths)

    def _died_alone(self, flight: _Flight, deaths: int) -> None:
        """A shard had its machine to itself and the worker died: a few times, and it is set aside."""
        [position] = flight.positions
        self._deaths[position].update({host(address): deaths for address in flight.only_on or ()})
        if self._deaths[position].total() < TRIES_ALONE:
            self._suspects.appendleft(position)
            return
        self._set_aside(
            position,
            FaultKind.KILLS_WORKERS,
            f"{self._deaths[position].total()} workers that had nothing but this shard to work on died, left or stayed "
            "paused. Look at the workers' logs (out of memory?); run again to retry it",
        )

    def _set_aside(self, position: int, kind: FaultKind, why: str) -> None:
        shard = self.plan.shards[position]
        self._settled.add(position)
        self.report.add(ShardReport(shard.name, fault=Fault(kind, f"{shard.image_source() or shard.name}: {why}")))

    def _count_kill(self) -> None:
        self._kills_in_a_row += 1
        if self._kills_in_a_row >= KILLS_IN_A_ROW + self._most_under_way:
            self.report.ended = (
                f"workers die whatever they work on: {self._kills_in_a_row} tasks in a row killed every worker that "
                "tried them. Look at the workers' logs; they may need more memory (memory_limit), smaller batches or "
                "fewer decode threads. What was finished is kept; run again to go on from there"
            )

    def _after_refusal(self, flight: _Flight, error: WorkerUnfit) -> None:
        """Leave a worker out that cannot do this job; what none can do is the job's own error."""
        # A word from before it was let in again is no news of the worker.
        if error.address not in self.workers.unfit and flight.chance >= self._given.get(error.address, 0):
            self.workers.unfit[error.address] = str(error.cause)
            if error.had_begun:
                self._broken[error.address] = set()
                self._breaks_in_a_row += not flight.alone
            what = "its shards are tried once more" if error.had_begun else "the others went on without it"
            self.report.note(f"{error}; {what}")
            log.warning("%s; %s", error, what, exc_info=error.cause if error.had_begun and not self._breaks else None)
        if not error.had_begun:
            self._again(flight)
        elif flight.alone:
            self._broke_alone(flight.positions[0], error)
        else:
            self._after_break(flight, error)
        self._look()
        if self.workers.able or self.report.ended:
            return
        if self._breaks and not self._worked:
            self.report.ended = self._model_breaks(error)
        elif not self._worked:
            raise error.cause

    def _after_break(self, flight: _Flight, error: WorkerUnfit) -> None:
        """A pipeline broke down: the worker may be to blame, the model, or any shard that was in it."""
        self._broken.setdefault(error.address, set()).update(flight.positions)
        self._breaks.update(flight.positions)
        for position in self._only_here(flight):
            if self._breaks[position] < BROKEN:
                self._waiting.append((position,))  # by itself, so that fewer are beside it if it breaks the next one
            else:
                self._suspects.append(position)
        if self._breaks_in_a_row >= BREAKS_IN_A_ROW:
            self.report.ended = self._model_breaks(error)

    def _broke_alone(self, position: int, error: WorkerUnfit) -> None:
        """A shard had its machine to itself and the pipeline broke down, as others had before."""
        self._broken.setdefault(error.address, set()).add(position)
        if position not in self._breakers and self.workers.fit:  # that worker may break on everything: try another
            self._breakers.add(position)
            self._suspects.appendleft(position)
            return
        self._set_aside(
            position,
            FaultKind.BREAKS_MODEL,
            f"what it holds breaks the model down, also with nothing beside it ({_text(error.cause)}). Look at its "
            "images, or at the model; run again to retry it",
        )
        self._let_in_again([address for address, had in self._broken.items() if position in had])

    def _let_in_again(self, addresses: Iterable[str]) -> None:
        """Workers whose pipelines broke may build new ones: something else was to blame, or nobody else is there."""
        self._chance += 1
        for address in addresses:
            self._broken.pop(address, None)
            self._given[address] = self._chance
            self.workers.let_in_again(address)

    def _model_breaks(self, error: WorkerUnfit) -> str:
        return (
            "the model breaks down whatever it works on, on every worker that was tried, the last time on "
            f"{error.host} ({_text(error.cause)}). Look at the model and at the log. What was finished is kept; run "
            "again to go on from there"
        )


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
