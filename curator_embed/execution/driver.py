"""The driver's loop: hands tasks to the workers that there are, takes in reports, and outlives what workers do.

Workers may come, leave, die and differ while a run goes on. What is decided about that is in ``blame.py`` and
``stragglers.py``, which units are where in ``flights.py``; here it is put to Dask, logged and counted.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import assert_never

from distributed import Client

from curator_embed.execution.blame import Blame, Decision, EndRun, LeaveOut, LetIn, Refusal, SetAside, TryApart
from curator_embed.execution.flights import Flight, Flights
from curator_embed.execution.job import Fault, FaultKind, ShardReport
from curator_embed.execution.messages import Messages
from curator_embed.execution.progress import Progress
from curator_embed.execution.report import RunReport
from curator_embed.execution.stragglers import Stragglers, Stranded, attempts
from curator_embed.execution.tasks import Died, Lost, NotGiven, Outcome, SchedulerGone, Tasks, scheduler_there
from curator_embed.execution.work import Round, Work
from curator_embed.execution.worker import TaskReport, WorkerUnfit, progress_topic
from curator_embed.execution.workers import PAUSED_REMEDY, Workers, host, patience, scheduler_address
from curator_embed.tables.lock import OutputLock

log = logging.getLogger(__name__)

TASKS_UNDER_WAY = 2
"""Tasks handed to Dask for each of the workers' threads: one runs, one waits."""
LOOK_EVERY_S = 1.0
"""How often the driver looks which workers there are."""


class Driver:
    """One run's tasks, from the first to the last.

    Args:
        work: what is to be done.
        report: counted into.
        stop: set when the run is asked to stop.
        locks: of the output; a lost one stops the run.
    """

    def __init__(
        self, client: Client, work: Work, report: RunReport, stop: threading.Event, locks: Sequence[OutputLock] = ()
    ) -> None:
        self.client, self.work, self.report = client, work, report
        self.stop, self.locks = stop, locks
        self.run_id = secrets.token_hex(8)
        self.workers = Workers(client)
        self.tasks = Tasks(client, self.run_id)
        self.messages = Messages(client, self.run_id, self._asked_to_stop)
        self.flights, self.blame, self.stragglers, self.stranded = Flights(), Blame(), Stragglers(), Stranded()
        self._counted = 0  # units of this run that are in the report
        self._told_slow: set[str] = set()  # workers
        self._told_of_absence = False

    def run(self, show: bool) -> None:
        """Carry the work out; ``report`` says what became of it. Errors of the job itself are raised."""
        for finished in self.work.finished():
            self.report.add(finished)
        todo, before = len(self.work.todo), self.report.read
        if not todo:
            return
        self.workers.look()
        with Progress(self.work.total, show, self.work.counts) as self.bar, self._listening(), self.messages.open():
            if not self._work_off():
                self.report.shards["left"] += todo - self._counted
                self.report.stopped = self.report.shards["left"] > 0 and self._asked_to_stop()
            # Workers tell of their images now and then; what they have not told yet is in their reports.
            self.bar.update(self.report.read - before - self.bar.n)

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """For the length of the block, workers' news move the bar; at its end, what they were is reported."""
        topic = progress_topic(self.run_id)
        self.client.subscribe_topic(topic, lambda event: self.bar.update(event[1]["images"]))
        try:
            yield
        finally:
            with suppress(ValueError):  # a client that lost its scheduler has forgotten the topic
                self.client.unsubscribe_topic(topic)
            threads, seen = max(self.workers.threads.values(), default=1), self.workers
            self.report.threads |= {"read": threads, "write": threads, **self.work.threads}
            self.report.workers, self.report.workers_lost = max(1, seen.most), seen.lost
            self.report.worker_seconds = seen.seconds

    # -- the loop --------------------------------------------------------------------------

    def _work_off(self) -> bool:
        """Hand out the work, round by round; whether it came to its end."""
        try:
            for now in self.work.rounds(len(self.workers.threads), self.report):
                if self._stopping() or not self._run_round(now):
                    return False
            return not self.report.ended
        except SchedulerGone as error:
            self.report.ended = error.ending(scheduler_address(self.client))
            return False
        finally:
            self._drop(list(self.flights.under_way))

    def _run_round(self, now: Round) -> bool:
        """Hand out groups of units until all are settled; whether they are."""
        self.flights.add(now.groups)
        while self.flights.waiting or self.flights.under_way or self.blame.suspects:
            self._look(LOOK_EVERY_S)
            if self.report.ended or (self._stopping() and not (self.flights.under_way and self.workers.able)):
                return False
            if not self._stopping():
                self._hand_out(now)
                self._look_after_slow(now)
            if (found := self.tasks.next(LOOK_EVERY_S)) is not None:
                self._take(*found)
        return not self.report.ended

    def _stopping(self) -> bool:
        return (self.work.stop_at_fault and bool(self.report.faults)) or self._asked_to_stop()

    def _asked_to_stop(self) -> bool:
        return self.stop.is_set() or any(lock.lost.is_set() for lock in self.locks)

    def _look(self, every: float = 0.0) -> None:
        """Follow the cluster: who is there now, and which tasks can no longer run where they must."""
        with scheduler_there():
            if self.client.status != "running":
                raise SchedulerGone("the connection broke")
            if not self.workers.look(every):
                return
        there = self.workers.threads.keys()
        for key, flight in list(self.flights.under_way.items()):
            gone = flight.only_on is not None and flight.only_on.isdisjoint(there)
            if gone and not self.tasks.over(key):
                self._drop([key])
                self._nobody_left(flight, deaths=1)
        self._look_after_stranded()
        if not self.workers.fit:
            self._carry_out(self.blame.nobody_fit(there))
        self._look_after_absence()

    def _look_after_stranded(self) -> None:
        wait = patience()
        new, over = self.stranded.look(time.monotonic(), self.flights.under_way, self.workers.fit, wait)
        for key in (*new, *(key for key in over if not self.tasks.over(key))):
            flight = self.flights.under_way[key]
            name, place = self.work.units[flight.positions[0]].name, ", ".join(sorted(flight.only_on or ()))
            if key in new:
                told = "%s is tried alone on %s, which Dask has paused; waiting %.0f s for it to go on (%s)"
                log.warning(told, name, place, wait, PAUSED_REMEDY)
                continue
            self._drop([key])
            if flight.alone:
                self._died_alone(flight, deaths=1)
            else:
                log.warning("%s has waited %.0f s for %s, which Dask has paused", name, wait, place)
                self.flights.put_back(flight)

    def _look_after_absence(self) -> None:
        absence = self.workers.absence()
        if absence is not None and (why := absence.too_long(scheduler_address(self.client))):
            self.report.ended = why
        elif absence is not None:
            if not self._told_of_absence:
                log.warning("%s", absence)
            self.bar.set_postfix_str(absence.so_far())
        self._told_of_absence = absence is not None

    # -- handing out -----------------------------------------------------------------------

    def _hand_out(self, now: Round) -> None:
        """Keep as much under way as the workers that are there can use; what killed workers waits for the end."""
        fit, flights = self.workers.fit, self.flights
        if not fit and self.workers.threads:
            return  # those that are there cannot do this job, or not now
        # Even without workers some tasks wait: they are what makes an adaptive cluster start one.
        while flights.waiting and len(flights.under_way) < max(2, TASKS_UNDER_WAY * sum(fit.values())):
            positions = flights.waiting.popleft()
            self._submit(now, positions, self.stragglers.quicker(positions, fit) or self.workers.restriction)
        if not self.blame.suspects or flights.waiting or not all(f.alone for f in flights.under_way.values()):
            return
        self._look()  # a unit must not be blamed for a worker that was dead before it came
        busy = {host(address) for flight in flights.under_way.values() for address in flight.only_on or ()}
        for position, address in self.blame.trials(self.workers.one_a_host(), busy):
            self._submit(now, (position,), frozenset([address]), alone=True)

    def _look_after_slow(self, now: Round) -> None:
        """While threads have nothing to do: ask slow tasks for what they have, and give it to others."""
        fit = self.workers.fit
        idle = 0 if self.flights.waiting else self.tasks.idle_threads(fit, LOOK_EVERY_S)
        slow = self.stragglers.look(time.monotonic(), self.flights.under_way, idle, len(fit), patience())
        if slow.ask_back:
            self.messages.ask_back(slow.ask_back)
        for key in (*slow.hopeless, *self.flights.lost(slow.stuck)):
            self._give_up(key)
        undone = self.flights.undone(slow.stuck)
        for attempt in attempts(undone, self.tasks.places(), fit, idle, host) if undone else ():
            new = not attempt.slow_on <= self._told_slow
            self._told_slow |= attempt.slow_on
            name, place = self.work.units[attempt.position].name, ", ".join(attempt.slow_on)
            log.log(logging.WARNING if new else logging.INFO, "%s takes long on %s; trying it elsewhere", name, place)
            self._submit(now, (attempt.position,), attempt.only_on)

    def _give_up(self, key: str) -> None:
        """A task hangs, and nobody else can do what it has."""
        flight = self.flights.under_way[key]
        self._drop([key])
        self.messages.ask_back([key])
        if flight.alone:
            self._died_alone(flight, deaths=1)
        else:
            self.blame.suspects.extend(self.flights.unfinished(flight))

    def _submit(
        self, now: Round, positions: tuple[int, ...], only_on: frozenset[str] | None, alone: bool = False
    ) -> None:
        given = [self.work.given(position, only_on) for position in positions]
        key = self.tasks.submit([self.work.units[p] for p in positions], given, now.job, self.blame.chance, only_on)
        self.flights.begin(key, Flight(positions, time.monotonic(), only_on, alone, self.blame.chance))

    def _drop(self, keys: Iterable[str]) -> None:
        """Nobody needs these tasks any more."""
        for key in keys:
            self.flights.end(key)
            self.tasks.drop([key])

    # -- what comes back -------------------------------------------------------------------

    def _take(self, key: str, outcome: Outcome) -> None:
        """Count a task that is over, or see to its not having finished."""
        flight = self.flights.end(key)
        assert flight is not None
        match outcome:
            case TaskReport():
                self._count(flight, outcome)
            case Died(deaths):
                self._died(flight, deaths)
            case WorkerUnfit():
                self._refused(flight, outcome)
            case NotGiven(failed):
                self._carry_out(SetAside(flight.positions[n], FaultKind.UNUSABLE, why) for n, why in failed.items())
                self._again(flight)
            case Lost():
                self._again(flight)

    def _count(self, flight: Flight, task: TaskReport) -> None:
        counted = self.flights.take_in(flight, task.units)
        for position, report in counted:
            if report.held:
                self.report.add_load(report)
                self.work.hold(position, report)
                continue
            # Not done when the run began, done when it came to it: a worker of this run finished it and died.
            self.work.settle(position, report)
            report.skipped = False
            self._add(report)
        self.bar.set_postfix(failed=self.report.failed)
        if counted:
            self.blame.finished()
            self.workers.have_worked()
            self.stragglers.finished(task.seconds, len(counted))
            self._call_off(flight.positions)
        if rest := self.flights.unfinished(flight):  # the task was slow, or the run is to stop
            log.debug("%d shards came back from %s unfinished", len(rest), task.worker)
            self.flights.put_back_apart(rest)
            self.stragglers.gave_back(rest, task.worker)

    def _call_off(self, positions: Sequence[int]) -> None:
        if needless := self.flights.needless(positions):
            self._drop(needless)
            self.messages.ask_back(needless)

    def _add(self, report: ShardReport) -> None:
        self.report.add(report)
        self._counted += 1

    def _again(self, flight: Flight) -> None:
        """Put a task's units where they came from."""
        if not flight.alone:
            self.flights.put_back(flight)
        elif self.flights.unfinished(flight):
            self.blame.untried(flight.positions[0])

    # -- workers that die or cannot do the job ---------------------------------------------

    def _died(self, flight: Flight, deaths: int) -> None:
        """Dask gave a task up because its workers died; it counts every task that was on them, guilty or not."""
        if flight.alone:
            self._nobody_left(flight, deaths)
            return
        self.flights.fail(flight)
        suspects = self.flights.unfinished(flight)
        if suspects and not self.blame.suspects:
            log.warning("workers died; the shards that were on them are tried once more, each alone, at the end")
        self._carry_out(self.blame.died(suspects, self.flights.most))

    def _nobody_left(self, flight: Flight, deaths: int) -> None:
        """The workers that a task was restricted to are gone; was it the task?"""
        with scheduler_there():
            retired = any(map(self.workers.retired, flight.only_on or ()))
        if retired:
            self._again(flight)
        elif flight.alone:
            self._died_alone(flight, deaths)
        elif self.blame.gone(flight.positions):
            self._died(flight, deaths)
        else:
            self._again(flight)

    def _died_alone(self, flight: Flight, deaths: int) -> None:
        self._carry_out(self.blame.died_alone(flight.positions[0], map(host, flight.only_on or ()), deaths))

    def _refused(self, flight: Flight, error: WorkerUnfit) -> None:
        """Leave a worker out that cannot do this job; what none can do is the job's own error."""
        refusal = Refusal(error.address, error.host, f"{type(error.cause).__name__}: {error.cause}", error.had_begun)
        first = error.had_begun and not self.blame.broke_before
        if error.had_begun:
            self.flights.fail(flight)
        left, left_out = self.flights.unfinished(flight), error.address in self.workers.unfit
        decisions = self.blame.refused(refusal, flight, left, self.workers.fit, left_out=left_out)
        if any(isinstance(decision, LeaveOut) for decision in decisions):
            what = "its shards are tried once more" if error.had_begun else "the others went on without it"
            self.report.note(f"{error}; {what}")
            log.warning("%s; %s", error, what, exc_info=error.cause if first else None)
        self._carry_out(decisions)
        if not error.had_begun:
            self._again(flight)
        self._look()
        if self.workers.able or self.report.ended:
            return
        if self.blame.hopeless:
            raise error.cause
        self._carry_out(self.blame.nobody_able(refusal))

    def _carry_out(self, decisions: Iterable[Decision]) -> None:
        for decision in decisions:
            match decision:
                case TryApart(positions):
                    self.flights.put_back_apart(positions)
                case SetAside(position, kind, why):
                    self.flights.settle(position)
                    fault = Fault(kind, f"{self.work.place(position)}: {why}")
                    self._add(ShardReport(self.work.units[position].name, fault=fault))
                    self._call_off([position])
                case LeaveOut(address, why):
                    self.workers.unfit[address] = why
                case LetIn(addresses):
                    self.workers.let_in_again(addresses)
                case EndRun(why):
                    self.report.ended = why
                case _:
                    assert_never(decision)
