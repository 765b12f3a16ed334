"""Work that is no embedding run: files written without a pipeline, each from a value that Dask computes."""

from __future__ import annotations

import gc
import logging
import os
import signal
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import dask
import pytest
from distributed import Client, LocalCluster

from benchmarks.failures import import_everything
from benchmarks.stub import tiny_shards
from curator_embed import get_client
from curator_embed.datasets import ImageTextPairDataset
from curator_embed.execution.driver import Driver
from curator_embed.execution.job import FaultKind
from curator_embed.execution.report import RunReport
from curator_embed.execution.run_plan import make_plan
from tests.execution.writing_work import WriteFiles, Writing
from tests.stub import ColourEmbedder
from tests.threads import meanwhile


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    """Two worker processes, which come back when they are killed."""
    with dask.config.set({"distributed.scheduler.allowed-failures": 0}):
        cluster = LocalCluster(n_workers=2, threads_per_worker=2, processes=True, dashboard_address=":0")
    with cluster, Client(cluster, set_as_default=False) as made:
        made.run(import_everything)
        yield made


def carry_out(client: Client, work: Writing, stop: threading.Event | None = None) -> RunReport:
    report = RunReport()
    Driver(client, work, report, stop or threading.Event()).run(show=False)
    return report


def written(folder: Path) -> dict[int, int]:
    return {int(path.stem): int(path.read_text()) for path in folder.glob("*.txt")}


def test_units_are_given_what_dask_computes_for_them(client: Client, tmp_path: Path) -> None:
    work = Writing(tmp_path, 12, WriteFiles(), client)
    report = carry_out(client, work)
    assert report.shards == {"done": 12, "skipped": 0, "failed": 0, "left": 0} and report.read == 12
    assert written(tmp_path) == {number: number**3 for number in range(12)}
    assert sorted(work.asked) == list(range(12)), "once for each"


def test_what_is_done_is_not_done_again(client: Client, tmp_path: Path) -> None:
    carry_out(client, Writing(tmp_path, 5, WriteFiles(), client))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.txt")}
    report = carry_out(client, Writing(tmp_path, 9, WriteFiles(), client))
    assert report.shards == {"done": 4, "skipped": 5, "failed": 0, "left": 0}
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_unit_that_kills_its_workers_is_set_aside_and_no_other(client: Client, tmp_path: Path) -> None:
    report = carry_out(client, Writing(tmp_path, 20, WriteFiles(kills=frozenset([6])), client))
    assert list(report.faults) == ["00006"] and report.faults["00006"].kind is FaultKind.KILLS_WORKERS
    assert report.faults["00006"].message.startswith(f"{tmp_path}/00006.txt: 3 workers that had nothing but this")
    assert written(tmp_path) == {number: number**3 for number in range(20) if number != 6}
    assert report.shards == {"done": 19, "skipped": 0, "failed": 1, "left": 0}


def test_killed_workers_cost_only_time(client: Client, tmp_path: Path) -> None:
    def kill() -> None:
        os.kill(min(client.run(os.getpid).values()), signal.SIGKILL)

    with meanwhile((lambda: any(tmp_path.glob("*.txt")), kill)):
        report = carry_out(client, Writing(tmp_path, 40, WriteFiles(pause=0.05), client))
    assert report.shards["done"] == 40 and not report.faults and report.workers_lost >= 1
    assert written(tmp_path) == {number: number**3 for number in range(40)}


def test_a_unit_that_fails_or_is_given_nothing_costs_no_other(
    client: Client, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    report = carry_out(client, Writing(tmp_path, 20, WriteFiles(fails=frozenset([4])), client, no_value=13))
    assert set(report.faults) == {"00004", "00013"} and report.shards["done"] == 18
    assert "No space left on device" in report.faults["00004"].message
    assert "ValueError: 13 has no square" in report.faults["00013"].message
    assert str(tmp_path / "00013.txt") in report.faults["00013"].message


def test_a_request_to_stop_finishes_what_has_begun(client: Client, tmp_path: Path) -> None:
    stop = threading.Event()
    with meanwhile((lambda: any(tmp_path.glob("*.txt")), stop.set)):
        report = carry_out(client, Writing(tmp_path, 60, WriteFiles(pause=0.1), client), stop)
    assert report.stopped and report.shards["left"] > 0
    assert report.shards["done"] == len(written(tmp_path)) == 60 - report.shards["left"]
    report = carry_out(client, Writing(tmp_path, 60, WriteFiles(), client))
    assert report.shards["skipped"] + report.shards["done"] == 60 and len(written(tmp_path)) == 60


def test_a_worker_on_another_disk_is_left_out(client: Client, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="must lie on a disk that all machines share"):
        carry_out(client, Writing(tmp_path, 4, WriteFiles(must_see=("/not/on/any/worker",)), client))
    assert not written(tmp_path)


def test_progress_counts_what_the_work_counts(
    client: Client, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("curator_embed.execution.progress.LINE_EVERY_S", 0.0)
    caplog.set_level(logging.DEBUG, "curator_embed")
    carry_out(client, Writing(tmp_path, 8, WriteFiles(), client))
    assert "8 of 8 (100%) files, 0 failed" in caplog.text


def test_a_unit_that_is_done_costs_the_driver_no_memory_to_speak_of(client: Client, tmp_path: Path) -> None:
    """What stays of each, the scheduler's share included, which is in this process; the work's own list aside."""

    def kept(count: int) -> int:
        folder = tmp_path / f"{count}"
        folder.mkdir()
        work, report = Writing(folder, count, WriteFiles()), RunReport()
        work.bytes = 1 << 10  # 64 to a task
        made = Driver(client, work, report, threading.Event())
        before = tracemalloc.get_traced_memory()[0]
        made.run(show=False)
        gc.collect()
        assert report.shards["done"] == count
        return tracemalloc.get_traced_memory()[0] - before

    tracemalloc.start()
    try:
        few, many = kept(500), kept(5_000)
    finally:
        tracemalloc.stop()
    assert (many - few) / 4_500 < 700


def test_a_plan_keeps_little_of_a_finished_shard(tmp_path: Path) -> None:
    source = tiny_shards(tmp_path / "in", 200, samples=1)
    with get_client() as client:
        opened = ColourEmbedder()(ImageTextPairDataset.from_webdataset(str(source)))
        opened.save_metadata(str(tmp_path / "out"), progress=False)
        client.cluster.close()
    dataset = ColourEmbedder()(ImageTextPairDataset.from_webdataset(str(source)))
    job = dataset.job(str(tmp_path / "out"))
    tracemalloc.start()
    try:
        plan = make_plan(dataset.shards, job, cores=1)
        gc.collect()
        kept = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert not plan.todo and kept / 200 < 1_500
