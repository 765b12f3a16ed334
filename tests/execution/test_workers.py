"""Workers that come, leave, pause and differ while a run goes on, as threads of this process, which come at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import dask
import numpy as np
import pytest
from distributed import Client, LocalCluster, get_worker
from distributed.comm import CommClosedError

from curator_embed.execution import driver, messages, placing, worker, workers
from curator_embed.execution.run import RunStopped
from curator_embed.execution.worker import METRICS, PipelineKeeper
from curator_embed.steps import BatchModel
from tests.stub import ColourEmbedder, ColourModel
from tests.threads import Pausing, has_begun, meanwhile, save, wait_until


class Together(Pausing):
    """Its model is ready when three workers are about to load it."""

    def load_model(self, device: str, threads: int | None = None) -> BatchModel:
        found = super().load_model(device, threads)
        wait_until(lambda: len(Pausing.ran_on) == 3)
        return found


def test_a_run_waits_for_its_first_worker_and_takes_in_those_that_join(
    nobody: LocalCluster,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(workers, "TELL_AFTER_S", 0.1)
    monkeypatch.setattr(driver, "LOOK_EVERY_S", 0.1)
    Pausing.ran_on.clear()
    told = "waiting for the first worker of the Dask cluster at inproc://"
    with meanwhile(
        (lambda: told in caplog.text, lambda: nobody.scale(1)),
        (lambda: bool(Pausing.ran_on), lambda: nobody.scale(3)),
    ):
        report = save(Together(), source, tmp_path / "out")
    assert report.shards["done"] == 12 and report.workers == len(Pausing.ran_on) == 3


def test_a_run_outlives_its_last_worker(
    nobody: LocalCluster,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(driver, "LOOK_EVERY_S", 0.1)
    nobody.scale(1)
    with meanwhile(
        (has_begun(tmp_path / "out"), lambda: nobody.scale(0)),
        (lambda: "no worker is left" in caplog.text, lambda: nobody.scale(1)),
    ):
        report = save(Pausing(), source, tmp_path / "out")
    assert report.shards == {"done": 12, "skipped": 0, "failed": 0, "left": 0}
    assert report.workers_lost >= 1


def test_a_run_whose_workers_do_not_come_back_ends_with_a_remedy(
    nobody: LocalCluster, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "LOOK_EVERY_S", 0.1)
    nobody.scale(1)
    wait, output = {workers.WAIT_KEY: "500ms"}, tmp_path / "out"
    with (
        meanwhile((has_begun(output), lambda: nobody.scale(0))),
        dask.config.set(wait),
        pytest.raises(RunStopped, match=workers.WAIT_KEY) as stopped,
    ):
        save(Pausing(), source, output)
    report = stopped.value.report
    assert report.shards["left"] > 0
    assert report.shards["done"] + report.shards["left"] == 12
    assert report.to_dict()["ended"] == str(stopped.value)


class NoModelOnOne(Pausing):
    """Its model can be loaded on all workers but the first."""

    bad: str = ""

    def load_model(self, device: str, threads: int | None = None) -> BatchModel:
        if get_worker().address in self.bad:
            raise RuntimeError("no GPU here")
        return super().load_model(device, threads)


class Breaking(ColourModel):
    """Breaks down at its second batch."""

    def __call__(self, images: Sequence[Any]) -> np.ndarray:
        if self.batches:
            raise RuntimeError("the GPU fell off the bus")
        return super().__call__(images)


class BreaksOnOne(Pausing):
    """Its model breaks down on the first worker."""

    bad: str = ""

    def load_model(self, device: str, threads: int | None = None) -> BatchModel:
        whole = super().load_model(device, threads)
        return Breaking(whole.batch_size) if get_worker().address in self.bad else whole


@pytest.mark.parametrize("step", [NoModelOnOne(), BreaksOnOne()], ids=["cannot load", "breaks down"])
def test_a_worker_that_cannot_do_the_job_is_left_out(
    step: Any, nobody: LocalCluster, source: Path, tmp_path: Path
) -> None:
    nobody.scale(2)
    Client.current().wait_for_workers(2)
    step.bad = min(Client.current().nthreads())
    report = save(step, source, tmp_path / "out")
    assert report.shards["done"] == 12 and report.read == report.embedded + report.no_image
    assert any(step.bad in note and "RuntimeError" in note for note in report.notes)


def test_a_model_that_no_worker_can_load_is_the_jobs_own_error(
    nobody: LocalCluster, source: Path, tmp_path: Path
) -> None:
    nobody.scale(2)
    Client.current().wait_for_workers(2)
    step = NoModelOnOne()
    step.bad = " ".join(Client.current().nthreads())
    with pytest.raises(RuntimeError, match="no GPU here") as error:
        save(step, source, tmp_path / "out")
    assert "load_model" in "".join(error.value.__notes__)


class Counting(ColourEmbedder):
    """Counts the pipelines that its worker has when its own is made."""

    others: ClassVar[list[int]] = []

    def load_model(self, device: str, threads: int | None = None) -> BatchModel:
        Counting.others.append(len(PipelineKeeper.of(get_worker()).pipelines()))
        return super().load_model(device, threads)


def test_models_of_a_run_whose_driver_died_make_room(
    nobody: LocalCluster, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nobody.scale(1)
    monkeypatch.setattr(messages, "close_run", lambda run: None)  # as if it had been killed
    for number, seconds in enumerate((60.0, 60.0, 0.0)):
        monkeypatch.setattr(worker, "ORPHANED_AFTER_S", seconds)
        save(Counting(), source, tmp_path / f"out{number}")
    assert Counting.others == [0, 1, 0]


def test_a_cluster_where_not_all_see_a_gpu_works_on_the_cpu_and_says_so(
    nobody: LocalCluster,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    nobody.scale(2)
    Client.current().wait_for_workers(2)
    first = min(Client.current().nthreads())

    def gpus(dask_worker: Any) -> int:
        return int(dask_worker.address == first)

    monkeypatch.setattr(placing, "_gpus", gpus)
    save(ColourEmbedder(), source, tmp_path / "out")
    assert "1 of 2 workers see no GPU" in caplog.text


def test_a_keeper_answers_heartbeats_when_nothing_runs(nobody: LocalCluster) -> None:
    nobody.scale(1)
    Client.current().wait_for_workers(1)

    def keep(dask_worker: Any) -> None:
        PipelineKeeper.of(dask_worker)

    def ask(dask_worker: Any) -> Any:
        return dask_worker.metrics[METRICS](dask_worker)

    Client.current().run(keep)
    assert list(Client.current().run(ask).values()) == [{}]


def no_library() -> None:
    raise OSError("libcudart.so.12: cannot open shared object file")


def test_what_a_question_raises_on_all_workers_is_raised(nobody: LocalCluster) -> None:
    nobody.scale(2)
    Client.current().wait_for_workers(2)
    with pytest.raises(OSError, match=r"libcudart\.so"):
        workers.ask_workers(Client.current(), no_library)


class Asked:
    """What ``ask_workers`` asks a client: the first worker gives an error, the next an answer."""

    def __init__(self, error: OSError, there: list[str]) -> None:
        self.answers: list[dict[str, Any]] = [{"old": error}, {"new": 4}]
        self.there = there

    def nthreads(self) -> dict[str, int]:
        return dict.fromkeys(self.there, 1)

    def run(self, question: Any, on_error: str) -> dict[str, Any]:
        return self.answers.pop(0)


@pytest.mark.parametrize(
    ("error", "there"), [(CommClosedError("going"), ["old", "new"]), (OSError("cannot connect"), ["new"])]
)
def test_others_are_asked_when_a_worker_goes_before_it_answers(error: OSError, there: list[str]) -> None:
    assert workers.ask_workers(Asked(error, there), int) == {"new": 4}  # type: ignore[arg-type]


class Cluster:
    """What ``Workers`` asks a client, with answers from a list."""

    def __init__(self, *answers: dict[str, int]) -> None:
        self.answers = list(answers)

    def nthreads(self) -> dict[str, int]:
        return self.answers.pop(0)

    def scheduler_info(self, n_workers: int) -> dict[str, Any]:
        return {"workers": {}}


def test_workers_are_counted_as_they_come_and_go() -> None:
    a, b, c = "tcp://10.0.0.1:1", "tcp://10.0.0.1:2", "tcp://10.0.0.2:1"
    seen = workers.Workers(Cluster({a: 2}, {a: 2, b: 2, c: 4}, {b: 2}, {b: 2, c: 4}, {}))  # type: ignore[arg-type]
    assert seen.look() and not seen.look(every=60)
    assert seen.restriction is None and seen.absent_since is None
    seen.look()
    seen.unfit[c] = "no GPU"
    assert seen.restriction == {a, b} and seen.fit == {a: 2, b: 2}
    assert seen.one_a_host() == {"10.0.0.1": a}
    seen.look()
    assert seen.restriction is None, "the one that is not fit has left"
    assert (seen.most, seen.lost) == (3, 2)
    seen.look()
    assert seen.fit == {b: 2, c: 4}, "it came back as another process"
    seen.look()
    assert seen.absent_since is not None and seen.lost == 4


async def lose(scheduler: Any, address: str) -> None:
    await scheduler.remove_worker(address, stimulus_id="died", close=False)


@pytest.mark.parametrize("sent_away", [True, False])
def test_a_worker_that_was_sent_away_is_told_from_one_that_died(sent_away: bool, nobody: LocalCluster) -> None:
    nobody.scale(1)
    client = Client.current()
    client.wait_for_workers(1)
    [address] = client.nthreads()
    if sent_away:
        nobody.scale(0)
    else:
        client.sync(lose, nobody.scheduler, address)
    wait_until(lambda: not client.nthreads())
    assert workers.Workers(client).retired(address) == sent_away


class OnlyOne(ColourEmbedder):
    """Its model can be loaded on one worker, which is ready when all others have failed."""

    good: str = ""
    failed: ClassVar[set[str]] = set()

    def load_model(self, device: str, threads: int | None = None) -> BatchModel:
        if get_worker().address != self.good:
            OnlyOne.failed.add(get_worker().address)
            raise RuntimeError("no GPU here")
        wait_until(lambda: len(OnlyOne.failed) == 3)
        return super().load_model(device, threads)


def test_a_run_goes_on_with_the_one_worker_that_can_do_it(nobody: LocalCluster, source: Path, tmp_path: Path) -> None:
    nobody.scale(4)
    Client.current().wait_for_workers(4)
    step = OnlyOne()
    step.good = max(Client.current().nthreads())
    OnlyOne.failed.clear()
    report = save(step, source, tmp_path / "out")
    assert report.shards["done"] == 12 and len(report.notes) == 3


@pytest.fixture
def paused(nobody: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalCluster]:
    """A cluster whose workers Dask pauses as soon as they look at their memory."""
    monkeypatch.setattr(driver, "LOOK_EVERY_S", 0.1)
    monkeypatch.setattr(workers, "STATUS_EVERY_S", 0.1)
    with dask.config.set({"distributed.worker.memory.pause": 1e-6, "distributed.worker.memory.spill": False}):
        nobody.scale(2)
        client = Client.current()
        client.wait_for_workers(2)
        about = lambda: client.scheduler_info(n_workers=-1)["workers"].values()  # noqa: E731
        wait_until(lambda: all(worker["status"] == "paused" for worker in about()))
        yield nobody


def test_a_run_on_paused_workers_ends_with_a_remedy(paused: LocalCluster, source: Path, tmp_path: Path) -> None:
    wait = {workers.WAIT_KEY: "500ms"}
    with dask.config.set(wait), pytest.raises(RunStopped, match=r"distributed\.worker\.memory\.pause") as stopped:
        save(ColourEmbedder(), source, tmp_path / "out")
    assert stopped.value.report.shards == {"done": 0, "skipped": 0, "failed": 0, "left": 12}


def test_a_run_goes_on_when_its_workers_do(
    paused: LocalCluster,
    source: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def enough(dask_worker: Any) -> None:
        dask_worker.memory_manager.memory_pause_fraction = 1.0

    with meanwhile((lambda: "Dask has paused all workers" in caplog.text, lambda: Client.current().run(enough))):
        report = save(ColourEmbedder(), source, tmp_path / "out")
    assert report.shards["done"] == 12
    assert "Dask has paused all workers" in caplog.text and "memory_limit" in caplog.text


class Closing:
    """A pipeline that counts those of its kind that are open."""

    fault = None
    images = 0

    def __init__(self, still: threading.Event | None = None) -> None:
        self.open, self.still = True, still

    def close(self) -> None:
        assert self.still is None or self.still.wait(30)
        self.open = False


def test_no_pipeline_is_built_for_a_run_that_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    building, go_on = threading.Event(), threading.Event()
    built: list[Closing] = []

    def build(job: Any, on_images: Any) -> Closing:
        building.set()
        assert go_on.wait(30)
        built.append(Closing())
        return built[-1]

    monkeypatch.setattr(worker, "build_pipeline", build)
    keeper, found = PipelineKeeper(), []
    job: Any = SimpleNamespace(must_see=())
    tasks = [threading.Thread(target=lambda: found.append(keeper.get("run", job, print))) for _ in range(3)]
    closing = threading.Thread(target=keeper.close, args=("run",))
    tasks[0].start()
    assert building.wait(30)
    for thread in (*tasks[1:], closing):
        thread.start()
    wait_until(lambda: keeper.stopping("run"))
    go_on.set()
    for thread in (*tasks, closing):
        thread.join(30)
    assert len(found) == 3 and not keeper.pipelines()
    assert not any(pipeline.open for pipeline in built)


def test_a_worker_answers_while_it_lets_go_of_a_model(nobody: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    nobody.scale(1)
    client, still = Client.current(), threading.Event()
    client.wait_for_workers(1)
    pipeline = Closing(still)
    monkeypatch.setattr(worker, "build_pipeline", lambda job, on_images: pipeline)
    keeper, job = PipelineKeeper.of(next(iter(nobody.workers.values()))), SimpleNamespace(must_see=())
    keeper.get("run", job, print)  # type: ignore[arg-type]
    closing = threading.Thread(target=client.run, args=(worker.close_run, "run"))
    closing.start()
    wait_until(lambda: keeper.stopping("run"))
    assert list(client.run(int, callback_timeout=10).values()) == [0]
    assert pipeline.open
    still.set()
    closing.join(30)
    assert not pipeline.open


class Deaf:
    """A client whose first message finds no answer in time, and whose second an error."""

    status = "running"

    def __init__(self) -> None:
        self.told: list[Callable[..., Any]] = []
        self.errors: list[Exception] = [TimeoutError(), TypeError("no answer as it should be")]

    def run(self, message: Callable[..., Any], content: Any, on_error: str, callback_timeout: float) -> None:
        assert 0 < callback_timeout < 60
        if self.errors:
            raise self.errors.pop()
        self.told.append(message)


def test_a_worker_that_hangs_does_not_keep_the_others_from_being_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "LOOK_EVERY_S", 0.01)
    client = Deaf()
    with messages.Messages(client, "run", lambda: True).open():  # type: ignore[arg-type]
        wait_until(lambda: worker.stop_run in client.told)
    assert client.told[-1] is worker.close_run
