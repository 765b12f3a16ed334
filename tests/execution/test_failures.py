"""Worker processes that die or hang behind, and a scheduler that goes: what a run makes of it.

The scenes are those of benchmarks/failures.py, small; they assert their outcomes themselves.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dask
import pytest
from distributed import Client, LocalCluster

from benchmarks import failures
from benchmarks.failures import Scene
from curator_embed.execution import blame, messages, stragglers
from curator_embed.execution.run import RunStopped
from curator_embed.execution.worker import METRICS
from tests.command import REPO


class SharedScene(Scene):
    """Runs on one cluster of processes that all scenes share; workers that were killed have come back."""

    local: LocalCluster
    client: Client

    def start(self) -> None:
        with dask.config.set({"distributed.scheduler.allowed-failures": 0}):  # the first death makes suspects
            self.local = LocalCluster(
                n_workers=self.workers, threads_per_worker=2, processes=True, dashboard_address=":0"
            )
        self.client = Client(self.local)

    def close(self) -> None:
        self.client.close()
        self.local.close()

    @contextmanager
    def cluster(self) -> Iterator[Client]:
        try:
            self.client.wait_for_workers(self.workers, timeout=20)
        except TimeoutError:  # nobody starts a worker again that was killed while it was starting
            self.close()
            self.start()
        self.client.run(failures.import_everything)
        yield self.client


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    made = SharedScene(tmp_path_factory.mktemp("failures"), shards=48, workers=2, pause=0.02)
    made.start()
    try:
        made.prepare()
        yield made
    finally:
        made.close()


def test_killed_workers_cost_only_time(scene: Scene) -> None:
    assert failures.kills(scene, every=(0.1, 0.3), at_most=2)["workers killed"] == 2


def test_a_shard_that_kills_its_workers_is_set_aside_and_no_other(scene: Scene) -> None:
    assert failures.killer(scene)["workers it killed"] == 1 + blame.TRIES_ALONE


def test_where_everything_kills_no_shard_is_blamed(scene: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blame, "KILLS_IN_A_ROW", -4)  # 4 in all, with two workers of two threads
    folder = failures.tiny_shards(tmp_path / "in", 8, failures.SAMPLES)
    for number in range(8):
        failures.mark(folder, number)
    with scene.cluster(), pytest.raises(RunStopped, match="workers die whatever they work on") as stopped:
        failures.embed(folder, tmp_path / "out", failures.Troubled(on_mark=str(tmp_path / "killed")))
    assert stopped.value.report.faults == {}
    assert stopped.value.report.shards == {"done": 0, "skipped": 0, "failed": 0, "left": 8}


def test_nobody_waits_for_a_slow_shard(scene: Scene) -> None:
    failures.slow_shard(scene, factor=10)


def test_a_slow_worker_gives_back_what_it_has_not_finished(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(stragglers, "SLOW_AFTER_S", 0.3)
    caplog.set_level(logging.DEBUG, "curator_embed")
    failures.slow_worker(scene, factor=10)
    assert "unfinished" in caplog.text and "came back from tcp://" in caplog.text


def test_the_shards_of_a_worker_that_hangs_are_done_by_others(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "CLOSE_WITHIN_S", 1.0)
    assert failures.hanging(scene)["seconds more than undisturbed"] < 60


def test_a_run_goes_on_where_a_dead_scheduler_left_it(scene: Scene) -> None:
    figures = failures.scheduler(scene)
    assert figures["seconds until the run ended"] < 10
    assert figures["shards finished before / all"] < 1


def test_what_the_dead_runs_workers_still_finish_is_no_fault_of_the_next(scene: Scene) -> None:
    figures = failures.survivors(scene)
    assert figures["shards the next run found open / all"] > 0


def test_every_heartbeat_carries_what_a_worker_does(scene: Any, tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.1):
            found = scene.client.scheduler_info(n_workers=-1)["workers"].values()
            seen.extend(worker["metrics"][METRICS] for worker in found if worker["metrics"].get(METRICS))

    with scene.cluster():
        thread = threading.Thread(target=look)
        thread.start()
        report = failures.embed(scene.folder, tmp_path / "out", failures.Troubled(pause=0.12))
        over.set()
        thread.join()
    assert max(figures["images"] for figures in seen) > 0
    assert max(figures["images_per_second"] for figures in seen) > 0
    assert max(figures["encoded_waiting"] for figures in seen) > 0
    assert max(figures["seconds"]["decode"] for figures in seen) > 0
    assert all(0 <= figures["idle_share"] <= 1 for figures in seen)
    told = report.to_dict()
    assert told["bottleneck"] == report.bottleneck == "decode"
    assert told["stages"]["decode"]["load"] > 0.5 > told["stages"]["model"]["load"]
    assert told["stages"]["decode"]["waiting_images"]["most"] > 4 > told["stages"]["decode"]["waiting_images"]["fill"]
    assert told["stages"]["model"]["idle_share"] > 0.5
    assert "bottleneck     decode (the model waited" in str(report)


@pytest.mark.slow
def test_at_scale() -> None:
    command = [sys.executable, "-m", "benchmarks.failures", "--shards", "2000"]
    subprocess.run(command, cwd=REPO, check=True, timeout=1500)
