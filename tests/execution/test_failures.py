"""Workers that die, come, leave, hang behind or cannot do the job, and a scheduler that goes: what a run makes of it.

The scenes are those of benchmarks/failures.py, small; they assert their outcomes themselves.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import dask
import numpy as np
import pytest
from distributed import Client, LocalCluster, get_worker
from distributed.comm import CommClosedError

from benchmarks import failures
from benchmarks.failures import Scene
from curator_embed.datasets import ImageTextPairDataset, saving
from curator_embed.execution import driver, messages, worker, workers
from curator_embed.execution.group import run_group
from curator_embed.execution.output import TargetChanged
from curator_embed.execution.pipeline import Gauge, Pipeline
from curator_embed.execution.report import RunReport, bottleneck
from curator_embed.execution.run import RunStopped
from curator_embed.execution.shard_run import ShardRun
from curator_embed.execution.worker import METRICS, PipelineKeeper
from curator_embed.steps import BatchModel
from tests.command import REPO
from tests.stub import ColourEmbedder, ColourModel
from tests.threads import Pausing, has_begun, meanwhile, save, wait_until


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
    assert failures.killer(scene)["workers it killed"] == 1 + driver.TRIES_ALONE


def test_where_everything_kills_no_shard_is_blamed(scene: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "KILLS_IN_A_ROW", -4)  # 4 in all, with two workers of two threads
    folder = failures.tiny_shards(tmp_path / "in", 8, failures.SAMPLES)
    for number in range(8):
        failures.mark(folder, number)
    with scene.cluster(), pytest.raises(RunStopped, match="workers die whatever they work on") as stopped:
        failures.embed(folder, tmp_path / "out", failures.Troubled(on_mark=str(tmp_path / "killed")))
    assert stopped.value.report.faults == {}
    assert stopped.value.report.shards == {"done": 0, "skipped": 0, "failed": 0, "left": 8}


def test_nobody_waits_for_a_slow_shard(scene: Scene) -> None:
    failures.slow_shard(scene, factor=10)


def test_a_slow_worker_gives_back_what_it_has_not_finished(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "SLOW_AFTER_S", 0.3)
    given_back: list[int] = []
    count = driver.Driver._count

    def counting(self: Any, flight: Any, task: Any) -> None:
        given_back.append(task.shards.count(None))
        count(self, flight, task)

    monkeypatch.setattr(driver.Driver, "_count", counting)
    failures.slow_worker(scene, factor=10)
    assert sum(given_back) > 0


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


# -- workers that come, leave and differ: threads of this process, which come at once -----------


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


class Fussy(ColourEmbedder):
    """Its model cannot take some images: the thumbnails that ``refused`` says."""

    def __init__(self, refused: Callable[[np.ndarray], bool]) -> None:
        super().__init__()
        self.refused = refused

    def settled(self, **settings: Any) -> Fussy:
        return self

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


class Counting(ColourEmbedder):
    """Counts the pipelines that its worker has when its own is made."""

    others: ClassVar[list[int]] = []

    def settled(self, **settings: Any) -> Counting:
        return self

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

    def sees(dask_worker: Any) -> bool:
        return bool(dask_worker.address == first)

    monkeypatch.setattr(saving, "_sees_gpu", sees)
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
    dataset = dataset_of(folder)
    job = dataset.job(None if in_place else str(tmp_path / "out"))
    runs = [ShardRun(job, dataset.shards[0], pipeline) for _ in range(2)]
    assert all(run.begin() for run in runs)
    first, second = (run.finish() for run in runs)
    assert not first.skipped and second.skipped
    assert second.counts() == first.counts() and first.embedded == 4


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


class OnlyOne(ColourEmbedder):
    """Its model can be loaded on one worker, which is ready when all others have failed."""

    good: str = ""
    failed: ClassVar[set[str]] = set()

    def settled(self, **settings: Any) -> OnlyOne:
        return self

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
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def enough(dask_worker: Any) -> None:
        dask_worker.memory_manager.memory_pause_fraction = 1.0

    told = driver.Driver._wait_for_workers

    def telling(self: Any, since: float) -> None:
        told(self, since)
        self.client.run(enough)

    monkeypatch.setattr(driver.Driver, "_wait_for_workers", telling)
    assert save(ColourEmbedder(), source, tmp_path / "out").shards["done"] == 12
    assert "Dask has paused all workers" in caplog.text and "memory_limit" in caplog.text


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


def test_a_worker_answers_while_it_lets_go_of_a_model(nobody: LocalCluster) -> None:
    nobody.scale(1)
    client, still = Client.current(), threading.Event()
    client.wait_for_workers(1)
    pipeline = Closing(still)
    keeper = PipelineKeeper()
    keeper._pipelines["run"] = pipeline  # type: ignore[assignment]
    next(iter(nobody.workers.values()))._curator_embed_pipelines = keeper
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


def driver_of(client: Any, shards: int = 0) -> driver.Driver:
    plan: Any = SimpleNamespace(shards=[SimpleNamespace(name=f"{n}", image_source=lambda: None) for n in range(shards)])
    return driver.Driver(client, plan, RunReport(), None, threading.Event(), [])


def test_a_worker_that_hangs_does_not_keep_the_others_from_being_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "LOOK_EVERY_S", 0.01)
    client = Deaf()
    made = driver_of(client)
    made.stop.set()
    with made.messages.open():
        wait_until(lambda: worker.stop_run in client.told)
    assert client.told[-1] is worker.close_run


def test_shards_that_were_to_blame_do_not_clear_each_other() -> None:
    made, nothing = driver_of(Cluster(), shards=40), SimpleNamespace()
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


# -- figures ------------------------------------------------------------------------------------


def test_a_gauge_weighs_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    gauge = Gauge()
    for moment, level in ((1.0, 4.0), (3.0, 1.0)):
        now[0] = moment
        gauge.move(level, level / 4)
    now[0] = 5.0
    assert gauge.take() == {"seconds": 5.0, "waited": 10.0, "filled": 2.5, "most": 4.0}
    now[0] = 7.0
    assert gauge.take() == {"seconds": 2.0, "waited": 2.0, "filled": 0.5, "most": 1.0}


@pytest.mark.parametrize(
    ("read", "decode", "model", "write", "found"),
    [(0.1, 0.5, 0.9, 0.1, "model"), (0.3, 0.9, 0.5, 0.1, "decode"), (0.6, 0.8, 0.2, 0.3, "read"),
     (0.3, 0.8, 0.2, 0.6, "write"), (0.1, 0.4, 0.0, 0.1, "decode")],
)  # fmt: skip
def test_the_bottleneck_is_where_least_time_is_left(
    read: float, decode: float, model: float, write: float, found: str
) -> None:
    assert bottleneck({"read": read, "decode": decode, "model": model, "write": write}) == found
