"""Which jobs are taken for lost, and in whose place another is submitted; ``test_slurm.py`` does it with real ones."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from distributed.core import Status

from curator_embed.execution.clusters.lost_jobs import LostJobs


class Queue:
    """A cluster of two jobs with two workers each, and the batch system behind it."""

    def __init__(self) -> None:
        self.status = Status.running
        self.worker_spec: dict[str, Any] = {"job-1": {}, "job-10": {}}
        self.workers: dict[str, Any] = {}
        self.scheduler = SimpleNamespace(workers={}, tasks={"a task": None})
        self.submitted: list[str] = []
        self.refuses = self.answers_not = False
        self.told = 0
        asyncio.run(self._correct_state())
        self.listed = {job.job_id for job in self.workers.values()}

    async def _correct_state(self) -> None:
        for name in self.worker_spec.keys() - self.workers.keys():
            self.workers[name] = SimpleNamespace(job_id=None, status=Status.running)
            if self.refuses:
                raise RuntimeError("over quota")
            self.submitted.append(name)
            self.workers[name].job_id = f"{100 + len(self.submitted)}"

    def numbers(self) -> set[str] | None:
        self.told += 1
        return None if self.answers_not else self.listed

    def come(self, *jobs: str) -> None:
        names = [f"{job}-{number}" for job in jobs for number in range(2)]
        self.scheduler.workers = {f"tcp://10.0.0.1:{n}": SimpleNamespace(name=name) for n, name in enumerate(names)}

    def end(self, name: str) -> str:
        """The job of this name ends; returns its number."""
        number = str(self.workers[name].job_id)
        self.listed = self.listed - {number}
        return number


@pytest.fixture
def queue() -> Queue:
    made = Queue()
    made.submitted.clear()
    made.come("job-1", "job-10")
    return made


def look(lost: LostJobs, times: int = 2) -> None:
    for _ in range(times):
        asyncio.run(lost.look())


def watch(queue: Queue) -> LostJobs:
    return LostJobs(queue, queue.numbers, "slurm.yaml")


def test_another_is_submitted_for_a_job_that_has_ended(queue: Queue, caplog: pytest.LogCaptureFixture) -> None:
    lost = watch(queue)
    look(lost)
    assert queue.told == 0, "nobody is missing, and nobody is asked"
    before = queue.workers["job-10"]
    queue.end("job-1")
    queue.come("job-10")
    look(lost, 1)
    assert not queue.submitted, "a worker that is started again is missing for a moment, too"
    look(lost, 1)
    assert queue.submitted == ["job-1"] and queue.workers["job-10"] is before
    assert caplog.messages == [
        f"slurm.yaml: a job has ended before the run; submitted job {queue.workers['job-1'].job_id}"
    ]
    queue.listed = queue.listed | {queue.workers["job-1"].job_id}
    look(lost, 5)
    assert queue.submitted == ["job-1"], "the new one waits"


@pytest.mark.parametrize("why", ["listed", "no answer", "no work", "closing"])
def test_no_other_is_submitted(why: str, queue: Queue) -> None:
    lost = watch(queue)
    look(lost)
    queue.come("job-10")
    if why != "listed":
        queue.end("job-1")
    queue.answers_not = why == "no answer"
    if why == "no work":
        queue.scheduler.tasks = {}
    if why == "closing":
        queue.status = Status.closing
    look(lost, 4)
    assert not queue.submitted and queue.workers.keys() == {"job-1", "job-10"}


def test_a_job_that_ends_before_a_worker_comes_is_not_submitted_for_ever(
    queue: Queue, caplog: pytest.LogCaptureFixture
) -> None:
    lost = watch(queue)
    look(lost)
    queue.come("job-10")
    queue.end("job-1")
    look(lost)
    queue.end("job-1")  # never listed
    number = queue.workers["job-1"].job_id
    look(lost, 4)
    assert queue.submitted == ["job-1"] and queue.worker_spec.keys() == {"job-10"}
    assert f"job {number} ended before a worker came" in caplog.text


def test_a_job_that_dask_has_let_go_of_is_lost(queue: Queue) -> None:
    lost = watch(queue)
    del queue.workers["job-1"]
    queue.come("job-10")
    look(lost)
    assert queue.submitted == ["job-1"]


def test_what_is_refused_is_tried_again_and_told_once(queue: Queue, caplog: pytest.LogCaptureFixture) -> None:
    lost = watch(queue)
    look(lost)
    queue.come("job-10")
    queue.end("job-1")
    queue.refuses = True
    look(lost, 4)
    assert not queue.submitted and "job-1" not in queue.workers, "closing would wait for it"
    [told] = caplog.messages
    assert "over quota" in told
    queue.refuses = False
    look(lost, 1)
    assert queue.submitted == ["job-1"]
