"""Which shard, worker or machine is to blame when workers die and models break."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import dask
import numpy as np
import pytest
from distributed import Client, LocalCluster

from benchmarks import failures
from curator_embed.execution import driver, worker, workers
from curator_embed.execution.report import RunReport
from curator_embed.execution.run import RunStopped
from curator_embed.steps import BatchModel
from tests.stub import ColourEmbedder, ColourModel
from tests.threads import save, wait_until


class Fussy(ColourEmbedder):
    """Its model cannot take some images: the thumbnails that ``refused`` says."""

    def __init__(self, refused: Callable[[np.ndarray], bool]) -> None:
        super().__init__()
        self.refused = refused

    def load_model(self, device: str, threads: int | None = None) -> BatchModel:
        return FussyModel(self.batch_size, self.refused)


class FussyModel(ColourModel):
    """Raises when an image is refused."""

    def __init__(self, batch_size: int, refused: Callable[[np.ndarray], bool]) -> None:
        super().__init__(batch_size)
        self.refused = refused

    def __call__(self, images: Sequence[Any]) -> np.ndarray:
        if any(self.refused(image) for image in images):
            raise ValueError("cannot embed this")
        return super().__call__(images)


def is_marked(thumbnail: np.ndarray) -> bool:
    return bool((thumbnail == failures.MARK).all())


def everything(thumbnail: np.ndarray) -> bool:
    return True


@pytest.mark.parametrize("count", [1, 3])
def test_a_shard_that_breaks_the_model_is_set_aside_and_no_other(
    count: int, nobody: LocalCluster, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "LOOK_EVERY_S", 0.1)
    nobody.scale(count)
    Client.current().wait_for_workers(count)
    folder = Path(shutil.copytree(source, tmp_path / "in"))
    name = failures.mark(folder, 5)
    with pytest.raises(RunStopped, match=r"1 of 12 shards.*00005.*ValueError: cannot embed this") as stopped:
        save(Fussy(is_marked), folder, tmp_path / "out")
    assert list(stopped.value.report.faults) == [name]
    assert stopped.value.report.shards == {"done": 11, "skipped": 0, "failed": 1, "left": 0}
    assert len(list((tmp_path / "out").glob("*.parquet"))) == 11


def test_a_model_that_breaks_on_everything_ends_the_run_with_its_report(
    nobody: LocalCluster, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "LOOK_EVERY_S", 0.1)
    monkeypatch.setattr(driver, "BREAKS_IN_A_ROW", 4)
    nobody.scale(2)
    Client.current().wait_for_workers(2)
    with pytest.raises(RunStopped, match=r"breaks down whatever it works on.*ValueError: cannot embed this") as stopped:
        save(Fussy(everything), source, tmp_path / "out")
    assert stopped.value.report.shards == {"done": 0, "skipped": 0, "failed": 0, "left": 12}


def driver_of(client: Any, shards: int = 0) -> driver.Driver:
    plan: Any = SimpleNamespace(shards=[SimpleNamespace(name=f"{n}", image_source=lambda: None) for n in range(shards)])
    return driver.Driver(client, plan, RunReport(), None, threading.Event(), [])


def test_shards_that_were_to_blame_do_not_clear_each_other() -> None:
    made, nothing = driver_of(SimpleNamespace(), shards=40), SimpleNamespace()
    for position in range(40):
        made._died_alone(driver._Flight(nothing, (position,), frozenset(["tcp://a:1"]), alone=True), driver.TRIES_ALONE)
    assert made.report.shards["failed"] == len(made.report.faults) == 40
    assert not made.report.ended and not made._suspects


@pytest.mark.parametrize("told_by", ["look", "dask"])
@pytest.mark.parametrize("retired", [True, False])
def test_a_worker_that_was_sent_away_was_not_killed(retired: bool, told_by: str, nobody: LocalCluster) -> None:
    nobody.scale(1)
    client = Client.current()
    client.wait_for_workers(1)
    [address] = client.nthreads()
    made = driver_of(client, shards=1)
    made.bar = SimpleNamespace(set_postfix_str=lambda text: None)  # type: ignore[assignment]
    made._look()
    future: Any = SimpleNamespace(cancel=lambda: None)
    flight = driver._Flight(future, (0,), frozenset([address]), alone=True)
    if retired:
        nobody.scale(0)
    else:
        client.sync(gone, nobody.scheduler, address)
    wait_until(lambda: not client.nthreads())
    if told_by == "look":
        made._flights["trial"] = flight
        made._look()
    else:
        made._after_deaths(flight, 1)
    assert list(made._suspects) == [0] and not made._flights
    assert made._deaths[0].total() == (0 if retired else 1)


class Trials:
    """What a driver's trials need to know of workers: one of each machine that is there, and which are paused."""

    absent_since = None
    threads: ClassVar[dict[str, int]] = {}

    def __init__(self, *machines: str) -> None:
        self.threads = {f"tcp://{machine}:1": 2 for machine in machines}
        self.fit = dict(self.threads)
        self.unfit: dict[str, str] = {}
        self.restriction = None

    def look(self, every: float = 0.0) -> bool:
        return True

    def one_a_host(self) -> dict[str, str]:
        return {workers.host(address): address for address in self.fit}

    def retired(self, address: str) -> bool:
        return False

    def let_in_again(self, address: str) -> None:
        self.fit[address] = 2


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, list[tuple[int, str]]]]:
    """A driver with three suspects and three machines, and what it has tried where."""
    made: Any = driver_of(SimpleNamespace(status="running"), shards=3)
    made.workers, tried = Trials("10.0.0.1", "10.0.0.2", "10.0.0.3"), []
    made._suspects.extend(range(3))

    def submit(positions: tuple[int, ...], limit: Any, only_on: frozenset[str], alone: bool) -> None:
        [address] = only_on
        tried.append((positions[0], workers.host(address)))
        future = SimpleNamespace(cancel=lambda: None)
        made._flights[f"trial-{len(tried)}"] = driver._Flight(future, positions, only_on, alone)  # type: ignore[arg-type]

    monkeypatch.setattr(made, "_submit", submit)
    yield made, tried


def test_a_machine_that_kills_everything_is_not_taken_for_a_shard_that_does(trials: Any) -> None:
    made, tried = trials
    while made._suspects or made._flights:
        made._hand_out(None)
        for key, flight in list(made._flights.items()):
            del made._flights[key]
            if flight.positions == (1,) or flight.only_on == {"tcp://10.0.0.2:1"}:
                made._left_alone(flight, 1)
            else:
                made._settled.add(flight.positions[0])
    assert list(made.report.faults) == ["1"], "the one that died everywhere"
    assert sorted(where for shard, where in tried if shard == 1) == ["10.0.0.1", "10.0.0.2", "10.0.0.3"]
    assert len(tried) == len(set(tried)), "nowhere twice"


def test_where_there_is_one_machine_a_shard_is_tried_there_again(trials: Any) -> None:
    made, tried = trials
    made.workers = Trials("10.0.0.1")
    while made._suspects or made._flights:
        made._hand_out(None)
        [(key, flight)] = made._flights.items()
        del made._flights[key]
        made._left_alone(flight, 1)
    assert len(made.report.faults) == 3 and len(tried) == 3 * driver.TRIES_ALONE


def test_a_trial_on_a_paused_worker_is_told_and_ends(
    trials: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made, _ = trials
    made._hand_out(None)
    del made.workers.fit["tcp://10.0.0.2:1"]
    [(key, waits)] = [(key, flight) for key, flight in made._flights.items() if flight.only_on == {"tcp://10.0.0.2:1"}]
    for _ in range(2):
        made._look()
    [told] = caplog.messages
    assert made.plan.shards[waits.positions[0]].name in told and "memory_limit" in told and "10.0.0.2" in told
    assert key in made._flights
    with dask.config.set({workers.WAIT_KEY: "0 s"}):
        made._look()
    assert key not in made._flights and list(made._suspects) == list(waits.positions)
    assert made._deaths[waits.positions[0]] == {"10.0.0.2": 1}


def test_what_only_a_paused_worker_may_do_goes_to_another_in_the_end(trials: Any) -> None:
    made, _ = trials
    made._suspects.clear()
    made._avoid[1] = "tcp://10.0.0.1:1"  # which was slow with it
    made._flights["task"] = driver._Flight(SimpleNamespace(cancel=lambda: None), (1,), frozenset({"tcp://10.0.0.2:1"}))  # type: ignore[arg-type]
    del made.workers.fit["tcp://10.0.0.2:1"]
    for _ in range(2):
        made._look()
    assert "task" in made._flights
    with dask.config.set({workers.WAIT_KEY: "0 s"}):
        made._look()
    assert not made._flights and list(made._waiting) == [(1,)] and not made._deaths[1]


def test_a_worker_that_breaks_on_everything_is_not_taken_for_a_shard_that_does(trials: Any) -> None:
    made, _ = trials

    def broke(flight: Any) -> None:
        [address] = flight.only_on
        made.workers.fit.pop(address, None)
        made._broke_alone(flight.positions[0], worker.WorkerUnfit(address, "node", ValueError("no"), True))

    made._hand_out(None)
    first = made._flights.pop("trial-1")
    broke(first)
    assert not made.report.faults and list(made._suspects) == list(first.positions)
    made._flights.clear()
    made._hand_out(None)
    again = made._flights.pop("trial-4")
    assert again.positions == first.positions and again.only_on != first.only_on
    broke(again)
    assert list(made.report.faults) == [f"{first.positions[0]}"]
    assert len(made.workers.fit) == 3, "both that it broke are let in again"


async def gone(scheduler: Any, address: str) -> None:
    await scheduler.remove_worker(address, stimulus_id="died", close=False)
