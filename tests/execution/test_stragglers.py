"""Shards that hang on their worker are tried on another one: who is first counts, and who is second does no harm."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from distributed import Client, LocalCluster, get_worker
from distributed.scheduler import KilledWorker

from curator_embed.datasets import ImageTextPairDataset
from curator_embed.execution import driver, messages, shard_run, worker
from curator_embed.execution.group import run_group
from curator_embed.execution.job import Fault, FaultKind, ShardReport
from curator_embed.execution.progress import Progress
from curator_embed.execution.report import RunReport
from curator_embed.execution.shard_run import ShardRun
from curator_embed.execution.worker import TaskReport
from curator_embed.pipeline.pipeline import Pipeline
from curator_embed.steps import BatchModel
from curator_embed.tables.writing import TargetChanged, write_table
from tests.rows import assert_embedded, table_rows, tar_images
from tests.stub import ColourEmbedder
from tests.threads import wait_until


class Hanging(ColourEmbedder):
    """Hangs on the first worker that loads it, until it is let go on."""

    stage: ClassVar[str] = "decode"
    go_on: ClassVar[threading.Event]
    first: ClassVar[list[str]] = []
    hung: ClassVar[list[str]] = []

    def load_model(self, device: str, threads: int | None = None) -> BatchModel:
        Hanging.first.append(get_worker().address)
        self.hangs = get_worker().address == Hanging.first[0]
        return super().load_model(device, threads)

    def prepare(self, image: Any) -> Any:
        if self.hangs and Hanging.stage == "decode":
            Hanging.hang()
        return super().prepare(image)

    @classmethod
    def hang(cls) -> None:
        cls.hung.append("begun")
        assert cls.go_on.wait(60)
        cls.hung.append("ended")


def write(*arguments: Any) -> int:
    if Hanging.stage == "write" and get_worker().address == Hanging.first[0]:
        Hanging.hang()
    return write_table(*arguments)


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hanging]:
    monkeypatch.setattr(driver, "SLOW_AFTER_S", 0.2)
    monkeypatch.setattr(driver, "LOOK_EVERY_S", 0.1)
    monkeypatch.setattr(messages, "CLOSE_WITHIN_S", 0.5)
    monkeypatch.setattr(Hanging, "go_on", threading.Event(), raising=False)
    monkeypatch.setattr(shard_run, "write_table", write)
    Hanging.first.clear()
    Hanging.hung.clear()
    yield Hanging()
    Hanging.go_on.set()


@pytest.mark.parametrize("in_place", [False, True], ids=["new output", "in place"])
@pytest.mark.parametrize(
    ("stage", "size"), [("decode", 1), ("decode", 3), ("write", 1), ("write", 3)],
    ids=["decoding", "decoding, three shards a task", "writing", "writing, three shards a task"],
)  # fmt: skip
def test_a_run_does_not_wait_for_a_worker_that_hangs(
    stage: str,
    size: int,
    in_place: bool,
    hanging: Hanging,
    nobody: LocalCluster,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    groups = lambda sizes, workers: [range(at, at + size) for at in range(0, len(sizes), size)]  # noqa: E731
    monkeypatch.setattr(driver, "group_shards", groups)
    monkeypatch.setattr(Hanging, "stage", stage)
    nobody.scale(3)
    Client.current().wait_for_workers(3)
    folder = Path(shutil.copytree(source, tmp_path / "in"))
    output = folder if in_place else tmp_path / "out"
    dataset = hanging(ImageTextPairDataset.from_webdataset(str(folder)))
    report = dataset.save_metadata(None if in_place else str(output), progress=False)
    assert "begun" in Hanging.hung and "ended" not in Hanging.hung
    assert report.shards == {"done": 12, "skipped": 0, "failed": 0, "left": 0}
    rows, images = table_rows(output), tar_images(folder)
    assert report.read == len(rows) and report.embedded == len(images) == 48
    for key, image in images.items():
        assert_embedded(rows[key], image)
    before = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in output.iterdir() if path.is_file()}
    Hanging.go_on.set()
    wait_until(lambda: all(not worker.state.executing_count for worker in nobody.workers.values()))
    after = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in output.iterdir() if path.is_file()}
    assert after == before, "who was second left everything as it was"


class Task:
    """A future of a finished task, or of one that goes on."""

    def __init__(self, report: TaskReport | None = None, error: Exception | None = None) -> None:
        self.key, self.report, self.error = f"task-{id(self)}", report, error
        self.status = "finished" if error is None else "error"
        self.cancelled = False

    def result(self, timeout: float) -> TaskReport | None:
        return self.report

    def exception(self) -> Exception | None:
        return self.error

    def release(self) -> None:
        pass

    def cancel(self) -> None:
        self.cancelled = True


@pytest.fixture
def made() -> Any:
    """A driver of four shards, without workers."""
    plan: Any = SimpleNamespace(
        shards=[SimpleNamespace(name=f"{n}") for n in range(4)], job=SimpleNamespace(on_error="")
    )
    client: Any = SimpleNamespace(nthreads=dict)
    found: Any = driver.Driver(client, plan, RunReport(), None, threading.Event(), [])
    found.bar = SimpleNamespace(set_postfix=lambda **what: None)
    return found


def hand_out(made: Any, task: Task, *positions: int) -> None:
    made._twice.update(p for flight in made._flights.values() for p in positions if p in flight.positions)
    made._flights[task.key] = driver._Flight(task, positions)  # type: ignore[arg-type]


def told(*shards: int | None) -> TaskReport:
    return TaskReport(
        "tcp://a:1", 1.0, [None if n is None else ShardReport(f"{n}", read=1, embedded=1) for n in shards]
    )


def test_who_is_second_is_called_off_and_not_counted(made: Any) -> None:
    first, second = Task(told(0)), Task(told(0))
    hand_out(made, first, 0)
    hand_out(made, second, 0)
    made._take(second)
    assert first.cancelled and made.messages.wanted_back() == [first.key] and not made._flights
    made._take(first)  # it had finished when it was called off
    assert made.report.read == made.report.shards["done"] == 1


def test_shards_of_a_slow_task_that_others_finished_count_once(made: Any) -> None:
    slow, second = Task(told(0, 1, None)), Task(told(1))
    hand_out(made, slow, 0, 1, 2)
    hand_out(made, second, 1)
    made._take(second)
    assert not slow.cancelled, "two of its shards are nobody else's"
    made._take(slow)
    assert made.report.read == made.report.shards["done"] == 2 and list(made._waiting) == [(2,)]


@pytest.mark.parametrize("dies", ["first", "second"])
def test_a_death_over_a_shard_that_another_task_has_makes_no_suspect(dies: str, made: Any) -> None:
    tasks = {"first": Task(told(3)), "second": Task(told(3))}
    for task in tasks.values():
        hand_out(made, task, 3)
    gone = tasks.pop(dies)
    gone.status, gone.error = "error", KilledWorker(gone.key, SimpleNamespace(address="tcp://a:1"), 0)  # type: ignore[arg-type]
    made._take(gone)
    assert not made._suspects and not made._waiting
    made._take(*tasks.values())
    assert made.report.read == 1 and not made._flights


def test_what_both_tasks_give_back_is_handed_out_once(made: Any) -> None:
    tasks = [Task(told(None)), Task(told(None))]
    for task in tasks:
        hand_out(made, task, 2)
    made._take(tasks[0])
    assert not made._waiting
    made._take(tasks[1])
    assert list(made._waiting) == [(2,)]


def test_what_is_wrong_on_one_machine_does_not_call_off_the_other_try(made: Any) -> None:
    sick = TaskReport("tcp://a:1", 1.0, [ShardReport("2", fault=Fault(FaultKind.UNUSABLE, "2.tar: cannot be read"))])
    first, second = Task(sick), Task(told(2))
    hand_out(made, first, 2)
    hand_out(made, second, 2)
    made._take(first)
    assert not second.cancelled and not made._waiting and not made.report.faults
    made._take(second)
    assert made.report.shards["done"] == 1 and not made.report.faults and not made._flights


def test_what_is_wrong_twice_is_the_shard(made: Any) -> None:
    """The first task hangs on: the shard is not tried for ever beside it."""
    sick = TaskReport("tcp://b:1", 1.0, [ShardReport("2", fault=Fault(FaultKind.UNUSABLE, "2.tar: cannot be read"))])
    first, second, third = Task(told(2)), Task(sick), Task(sick)
    hand_out(made, first, 2)
    for task in (second, third):
        hand_out(made, task, 2)
        made._take(task)
    assert first.cancelled and made.report.shards["failed"] == 1 and not made._flights and not made._waiting


def test_images_of_shards_that_are_tried_twice_leave_no_time_below_nothing() -> None:
    with Progress(10, show=False) as bar:
        bar.update(12)
        assert bar._line(30.0).endswith("00:00 left")


# -- who is second, at the shard itself ----------------------------------------------------------


@pytest.fixture
def pipeline(source: Path, tmp_path: Path) -> Iterator[Pipeline]:
    built = worker.build_pipeline(dataset_of(source).job(str(tmp_path / "out")))
    yield built
    built.close()


def dataset_of(source: Path, version: int = 1) -> ImageTextPairDataset:
    return ColourEmbedder(version=version)(ImageTextPairDataset.from_webdataset(str(source)))


@pytest.mark.parametrize("in_place", [False, True])
def test_what_somebody_else_finished_meanwhile_is_finished(
    in_place: bool, pipeline: Pipeline, source: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(source, tmp_path / "in"))
    table = pq.read_table(folder / "00000.parquet")
    pq.write_table(table.filter(pc.not_equal(table["key"], "000000000")), folder / "00000.parquet")
    dataset = dataset_of(folder)
    job = dataset.job(None if in_place else str(tmp_path / "out"))
    runs = [ShardRun(job, dataset.shards[0], pipeline) for _ in range(2)]
    assert all(run.begin() for run in runs)
    first, second = (run.finish() for run in runs)
    assert first.images_without_row == second.images_without_row == 1 and first.notes == second.notes
    assert not first.skipped and second.skipped
    assert second.counts() == first.counts() and first.embedded == (3 if in_place else 4)


def test_overwriting_a_list_with_missing_images_counts_what_somebody_else_finished(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("gone.jpg\n")
    dataset = ColourEmbedder()(ImageTextPairDataset.from_path_list(tmp_path / "list.txt", root=tmp_path))
    job = dataset.job(str(tmp_path / "out"), overwrite=True)
    pipeline = worker.build_pipeline(job)
    runs = [ShardRun(job, dataset.shards[0], pipeline) for _ in range(2)]
    assert all(run.begin() for run in runs)
    assert [run.finish().reasons for run in runs] == [{"not_found": 1}] * 2
    pipeline.close()


def test_what_somebody_else_made_meanwhile_in_another_way_is_left_as_it_is(
    pipeline: Pipeline, source: Path, tmp_path: Path
) -> None:
    ours, others = (dataset_of(source, version) for version in (1, 2))
    mine, theirs = (ShardRun(data.job(str(tmp_path / "out")), data.shards[0], pipeline) for data in (ours, others))
    assert mine.begin() and theirs.begin()
    theirs.finish()
    before = (tmp_path / "out" / "00000.parquet").read_bytes()
    with pytest.raises(TargetChanged):
        mine.finish()
    assert (tmp_path / "out" / "00000.parquet").read_bytes() == before


def test_a_slow_task_keeps_what_is_through(pipeline: Pipeline, source: Path, tmp_path: Path) -> None:
    dataset = dataset_of(source)
    asked: list[bool] = []

    def giving_back() -> bool:
        asked.append(len(asked) >= 2)
        if asked[-1]:  # both shards are in the pipeline
            wait_until(lambda: pipeline.images == 8)
        return asked[-1]

    job = dataset.job(str(tmp_path / "out"))
    reports = run_group(dataset.shards[:2], job, pipeline, giving_back=giving_back)
    assert [report is not None and report.embedded for report in reports] == [4, 4]
