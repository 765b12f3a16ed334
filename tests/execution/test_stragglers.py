"""Shards that hang on their worker are tried on another one: who is first counts, and who is second does no harm."""

from __future__ import annotations

import logging
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from distributed import Client, LocalCluster, get_worker
from hypothesis import given
from hypothesis import strategies as st

from curator_embed.datasets import ImageTextPairDataset
from curator_embed.execution import driver, messages, progress, stragglers, work, worker
from curator_embed.execution.flights import Flight, Flights
from curator_embed.execution.group import run_group
from curator_embed.execution.job import Fault, FaultKind, ShardReport
from curator_embed.execution.progress import Progress
from curator_embed.execution.shard_run import ShardRun
from curator_embed.execution.stragglers import Attempt, Slow, Stragglers, Stranded, attempts, idle_threads
from curator_embed.execution.workers import host
from curator_embed.pipeline.pipeline import Pipeline
from curator_embed.steps import BatchModel
from curator_embed.tables import shard_table
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


def write(*arguments: Any, **options: Any) -> int:
    if Hanging.stage == "write" and get_worker().address == Hanging.first[0]:
        Hanging.hang()
    return write_table(*arguments, **options)


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hanging]:
    monkeypatch.setattr(stragglers, "SLOW_AFTER_S", 0.2)
    monkeypatch.setattr(driver, "LOOK_EVERY_S", 0.1)
    monkeypatch.setattr(messages, "CLOSE_WITHIN_S", 0.5)
    monkeypatch.setattr(Hanging, "go_on", threading.Event(), raising=False)
    monkeypatch.setattr(shard_table, "write_table", write)
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
    monkeypatch.setattr(work, "group_shards", groups)
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


# -- whose word counts ---------------------------------------------------------------------------


def told(*shards: int | None) -> list[ShardReport | None]:
    return [None if n is None else ShardReport(f"{n}", read=1, embedded=1) for n in shards]


def under_way(**tasks: tuple[int, ...]) -> Flights:
    book = Flights()
    for key, positions in tasks.items():
        book.begin(key, Flight(positions))
    return book


def landed(book: Flights, key: str) -> Flight:
    flight = book.end(key)
    assert flight is not None
    return flight


SICK = ShardReport("2", fault=Fault(FaultKind.UNUSABLE, "2.tar: cannot be read"))


def test_who_is_second_is_called_off_and_not_counted() -> None:
    book = under_way(first=(0,), second=(0,))
    [(position, report)] = book.take_in(landed(book, "second"), told(0))
    assert position == 0 and report.read == 1
    assert book.needless([0]) == ["first"]
    assert book.take_in(landed(book, "first"), told(0)) == [], "it had finished when it was called off"


def test_shards_of_a_slow_task_that_others_finished_count_once() -> None:
    book = under_way(slow=(0, 1, 2), second=(1,))
    assert len(book.take_in(landed(book, "second"), told(1))) == 1
    assert book.needless([1]) == [], "two of its shards are nobody else's"
    slow = landed(book, "slow")
    assert [position for position, _ in book.take_in(slow, told(0, 1, None))] == [0]
    assert book.unfinished(slow) == [2]


@pytest.mark.parametrize("dies", ["first", "second"])
def test_a_death_over_a_shard_that_another_task_has_makes_no_suspect(dies: str) -> None:
    book = under_way(first=(3,), second=(3,))
    assert book.unfinished(landed(book, dies)) == []
    [other] = book.under_way
    assert len(book.take_in(landed(book, other), told(3))) == 1


def test_what_both_tasks_give_back_is_handed_out_once() -> None:
    book = under_way(first=(2,), second=(2,))
    first = landed(book, "first")
    assert book.take_in(first, told(None)) == [] and book.unfinished(first) == []
    second = landed(book, "second")
    assert book.take_in(second, told(None)) == [] and book.unfinished(second) == [2]


def test_what_is_wrong_on_one_machine_does_not_call_off_the_other_try() -> None:
    book = under_way(first=(2,), second=(2,))
    first = landed(book, "first")
    assert book.take_in(first, [SICK]) == [] and book.needless([2]) == [] and book.unfinished(first) == []
    [(_, report)] = book.take_in(landed(book, "second"), told(2))
    assert report.fault is None


def test_what_is_wrong_twice_is_the_shard() -> None:
    """The first task hangs on: the shard is not tried for ever beside it."""
    book = under_way(first=(2,), second=(2,))
    assert book.take_in(landed(book, "second"), [SICK]) == []
    book.begin("third", Flight((2,)))
    [(_, report)] = book.take_in(landed(book, "third"), [SICK])
    assert report is SICK and book.needless([2]) == ["first"]


def test_a_shard_whose_other_try_killed_its_worker_is_lost_with_the_task_that_hangs() -> None:
    book = under_way(hangs=(1, 2), second=(1,))
    book.fail(landed(book, "second"))
    assert book.undone(["hangs"]) == {2: ["hangs"]}, "not tried beside it again"
    assert book.lost(["hangs"]) == [], "while it has others"
    book.settle(2)
    assert book.lost(["hangs"]) == ["hangs"]
    assert book.unfinished(landed(book, "hangs")) == [1]


def test_a_shard_both_of_whose_tasks_hang_is_tried_a_third_time() -> None:
    book = under_way(first=(1,), second=(1,))
    assert book.undone(["first"]) == {} and book.undone(["first", "second"]) == {1: ["first", "second"]}


@given(st.data())
def test_every_shard_is_waiting_under_way_or_settled(data: st.DataObject) -> None:
    """Whatever comes of tasks, in any order, nothing is lost and nothing counts twice."""
    count = data.draw(st.integers(1, 8))
    book, keys, counted = Flights(), iter(range(10_000)), Counter[int]()
    book.add([(position,) for position in range(count)])
    for _ in range(data.draw(st.integers(0, 40))):
        there = list(book.under_way)
        what = data.draw(st.sampled_from(["begin", *(["end", "die", "again", "twice"] if there else [])]))
        key = data.draw(st.sampled_from(there)) if there else ""
        if what == "begin" and book.waiting:
            book.begin(f"{next(keys)}", Flight(book.waiting.popleft()))
        elif what == "twice":
            for position in book.undone([key]):
                book.begin(f"{next(keys)}", Flight((position,)))
        elif what in ("end", "die", "again"):
            flight = landed(book, key)
            if what == "end":
                found = [data.draw(st.sampled_from([None, SICK, *told(p)])) for p in flight.positions]
                counted.update(position for position, _ in book.take_in(flight, found))
            elif what == "die":
                book.fail(flight)
            book.put_back(flight)
            for needless in book.needless(flight.positions):
                book.end(needless)
        waiting = [position for group in book.waiting for position in group]
        flying = {position for flight in book.under_way.values() for position in flight.positions}
        assert len(waiting) == len(set(waiting)) and flying.isdisjoint(waiting)
        assert max(counted.values(), default=0) <= 1
        assert set(waiting) | flying | counted.keys() == set(range(count)) and counted.keys().isdisjoint(waiting)


# -- who is slow ---------------------------------------------------------------------------------


def stragglers_of(*paces: float) -> Stragglers:
    made = Stragglers()
    for pace in paces:
        made.finished(pace, 1)
    return made


def test_a_task_is_slow_when_it_takes_twice_as_long_while_threads_are_idle() -> None:
    made, task = stragglers_of(10.0), {"a": Flight((1,), began=0.0), "b": Flight((2, 3), began=0.0)}
    assert made.look(100.0, task, idle=1, workers=2, patience=600) == Slow(), "idle only since now"
    assert made.look(120.0, task, idle=1, workers=2, patience=600) == Slow()
    assert made.look(121.0, task, idle=1, workers=2, patience=600) == Slow(stuck=["a"])
    assert made.look(140.0, task, idle=1, workers=2, patience=600) == Slow(stuck=["a"])
    assert made.look(141.0, task, idle=1, workers=2, patience=600) == Slow(ask_back=["b"], stuck=["a"])
    assert made.look(180.0, task, idle=1, workers=2, patience=600) == Slow(ask_back=["b"], stuck=["a"])
    assert made.look(181.0, task, idle=1, workers=2, patience=600) == Slow(ask_back=["b"], stuck=["a", "b"])
    assert made.look(999.0, task, idle=0, workers=2, patience=600) == Slow()
    assert made.look(1000.0, task, idle=1, workers=2, patience=600) == Slow(), "the clock began anew"
    assert made.look(1019.5, task, idle=1, workers=2, patience=600) == Slow()
    assert made.look(9999.0, task, idle=1, workers=2, patience=600) == Slow(ask_back=["b"], stuck=["a", "b"])


def test_where_units_take_no_time_nothing_is_slow_for_two_seconds() -> None:
    made, task = stragglers_of(0.1), {"a": Flight((1,), began=0.0)}
    made.look(0.0, task, idle=1, workers=2, patience=600)
    assert made.look(2.0, task, idle=1, workers=2, patience=600) == Slow()
    assert made.look(2.1, task, idle=1, workers=2, patience=600) == Slow(stuck=["a"])


def test_the_last_200_tasks_say_how_long_a_unit_takes() -> None:
    made, task = Stragglers(), {"a": Flight((1,), began=0.0)}
    for _ in range(101):
        made.finished(500.0, 5)
    for _ in range(100):
        made.finished(20.0, 2)
    made.look(0.0, task, idle=1, workers=2, patience=600)
    usual = (100 + 10) / 2
    assert made.look(2 * usual, task, idle=1, workers=2, patience=600) == Slow()
    assert made.look(2 * usual + 1, task, idle=1, workers=2, patience=600) == Slow(stuck=["a"])


def test_nobody_is_slow_alone_or_as_long_as_nothing_is_finished() -> None:
    task = {"a": Flight((1,))}
    for made, workers in ((stragglers_of(1.0), 1), (Stragglers(), 5)):
        assert made.look(0.0, task, idle=1, workers=workers, patience=0) == Slow()
        assert made.look(1e6, task, idle=1, workers=workers, patience=0) == Slow()


def test_a_trial_hangs_after_ten_times_the_usual_and_no_sooner_than_one_is_patient() -> None:
    made, task = stragglers_of(10.0), {"a": Flight((1,), alone=True)}
    made.look(0.0, task, idle=1, workers=2, patience=600)
    assert made.look(100.0, task, idle=1, workers=2, patience=0) == Slow()
    assert made.look(600.0, task, idle=1, workers=2, patience=600) == Slow()
    assert made.look(601.0, task, idle=1, workers=2, patience=600) == Slow(hopeless=["a"])
    assert made.look(101.0, task, idle=1, workers=2, patience=0) == Slow(hopeless=["a"])


@given(
    st.lists(st.floats(0.01, 100), min_size=1), st.integers(1, 5), st.booleans(),
    st.lists(st.tuples(st.floats(0, 50), st.integers(0, 3)), min_size=1, max_size=30),
)  # fmt: skip
def test_nothing_is_slow_before_its_time_and_once_slow_stays_so(
    paces: list[float], units: int, alone: bool, looks: list[tuple[float, int]]
) -> None:
    made, flight, now, idle_for, before = (
        stragglers_of(*paces),
        Flight(tuple(range(units)), 0.0, None, alone),
        0.0,
        0.0,
        Slow(),
    )
    for passed, idle in looks:
        was_idle = idle_for if before is not None else 0.0
        found = made.look(now, {"a": flight}, idle, workers=2, patience=0)
        if not idle:
            assert found == Slow()
            idle_for = 0.0
        else:
            if found != Slow():
                assert idle_for > max(stragglers.SLOW_AFTER_S, stragglers.SLOW * median(paces[-200:]) * units) - 1e-6
            if was_idle and idle_for:
                assert set(before.stuck) <= set(found.stuck) and set(before.ask_back) <= set(found.ask_back)
        before = found
        now += passed
        idle_for = idle_for + passed if idle else 0.0


PLACES = {"tcp://10.0.0.1:1": ["x"], "tcp://10.0.0.1:2": [], "tcp://10.0.0.2:1": ["y"]}


def test_units_that_hang_are_tried_on_other_machines_and_where_there_is_none_on_other_workers() -> None:
    [found] = attempts({5: ["x"]}, PLACES, PLACES, 3, host)
    assert found == Attempt(5, frozenset({"tcp://10.0.0.1:1"}), frozenset({"tcp://10.0.0.2:1"}))
    alone = {address: keys for address, keys in PLACES.items() if host(address) == "10.0.0.1"}
    [found] = attempts({5: ["x"]}, alone, alone, 3, host)
    assert found.only_on == {"tcp://10.0.0.1:2"}
    assert attempts({5: ["x", "y"]}, PLACES, PLACES, 3, host)[0].only_on == {"tcp://10.0.0.1:2"}
    assert attempts({5: ["nowhere"]}, PLACES, PLACES, 3, host) == []
    assert len(attempts({n: ["x"] for n in range(9)}, PLACES, PLACES, 3, host)) == 3
    assert attempts({5: ["x"], 6: ["x"]}, PLACES, PLACES, -1, host) == []
    only = {"tcp://10.0.0.1:1": ["x"]}
    assert attempts({5: ["x"]}, only, only, 3, host) == [], "nobody else is there"


def test_threads_are_idle_where_a_worker_has_fewer_tasks_than_threads() -> None:
    assert idle_threads(dict.fromkeys(PLACES, 2), PLACES) == 1 + 2 + 1
    assert idle_threads({"a": 2, "b": 2}, {"a": ["1", "2", "3", "4"]}) == 2, "those that wait for one that hangs"


def test_what_a_slow_worker_gave_back_goes_to_others() -> None:
    made = Stragglers()
    made.gave_back([4, 5], "b")
    assert made.quicker((4, 9), ["a", "b", "c"]) == {"a", "c"}
    assert made.quicker((4,), ["a", "b"]) == {"a"}
    assert made.quicker((9,), ["a", "b"]) is None and made.quicker((4,), ["b"]) is None


def test_what_waits_for_paused_workers_alone_is_given_up_in_the_end() -> None:
    stranded, tasks = Stranded(), {
        "trial": Flight((1,), only_on=frozenset("a"), alone=True), "task": Flight((2,), only_on=frozenset("a")),
        "free": Flight((3,)), "other": Flight((4,), only_on=frozenset("ab")),
    }  # fmt: skip
    assert stranded.look(0.0, tasks, {"b"}, 10) == (["trial"], []), "told once"
    assert stranded.look(5.0, tasks, {"b"}, 10) == ([], [])
    assert stranded.look(8.0, tasks, {"b"}, 10) == ([], [])
    assert stranded.look(9.0, tasks, set(), 9) == ([], ["trial"]), "others have nowhere to go"
    assert stranded.look(10.0, tasks, {"b"}, 10) == ([], ["trial", "task"])
    assert stranded.look(11.0, tasks, {"a", "b"}, 10) == ([], [])
    assert stranded.look(12.0, tasks, {"b"}, 10) == (["trial"], []), "it was able to go on, and waits anew"


def test_images_of_shards_that_are_tried_twice_leave_no_time_below_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    caplog.set_level(logging.DEBUG, "curator_embed")
    with Progress(10, show=False) as bar:
        bar.update(12)
    assert caplog.messages[0].endswith(", 00:00 left")


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
    job = replace(dataset.job(str(tmp_path / "out"), overwrite=True), write_unreadable=True)
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
