"""The driver on simulated clusters, in whatever order things happen: every unit ends done, set aside or left, once."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import dask
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curator_embed.execution import driver, tasks, workers
from curator_embed.execution.driver import Driver
from curator_embed.execution.job import FaultKind
from curator_embed.execution.report import RunReport
from curator_embed.execution.work import Round, Work
from tests.execution.simulated_cluster import SimulatedCluster, Unit, World

A, B, C = "10.0.0.1", "10.0.0.2", "10.0.0.3"


class Names(Work):
    """Units that are names, in tasks of some size."""

    def __init__(self, names: Sequence[str], each: int = 1) -> None:
        self.units = [Unit(name) for name in names]
        self.todo = range(len(names))
        self.threads: dict[str, int] = {}
        self.each = each

    def rounds(self, workers: int, report: RunReport) -> Iterator[Round]:
        groups = [tuple(self.todo[n : n + self.each]) for n in range(0, len(self.todo), self.each)]
        yield Round(groups, None)  # type: ignore[arg-type]


@pytest.fixture(autouse=True, scope="module")
def at_once() -> Iterator[None]:
    """Nothing is waited for: every turn of the driver's loop looks at the cluster, which is a step and a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "LOOK_EVERY_S", 0.0)
        patch.setattr(workers, "STATUS_EVERY_S", 0.0)
        yield


@pytest.fixture
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "curator_embed")


def drive(cluster: SimulatedCluster, names: Sequence[str], each: int = 1) -> RunReport:
    report = RunReport()
    client: Any = cluster
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "time", cluster)
        patch.setattr(workers, "time", cluster)
        patch.setattr(tasks, "time", cluster)
        Driver(client, Names(names, each), report, threading.Event()).run(show=False)
    return report


def names_of(count: int) -> list[str]:
    return [f"{number:02d}" for number in range(count)]


def some(draw: st.DrawFn, of: Sequence[str], most: int) -> frozenset[str]:
    return frozenset(draw(st.lists(st.sampled_from(of), max_size=most)))


machines = st.dictionaries(st.sampled_from([A, B, C]), st.integers(1, 2), min_size=1)
seeds = st.integers(0, 1000)
simulated = settings(max_examples=60, deadline=None, derandomize=True)
"""The same examples on every machine; raise the number to look for more."""


@st.composite
def troubles(draw: st.DrawFn) -> tuple[SimulatedCluster, list[str], int]:
    """Everything but machines that hang: with nothing finished anywhere else, nobody knows that they do."""
    names, there = names_of(draw(st.integers(1, 24))), draw(machines)
    world = World(
        kills=some(draw, names, 3), breaks=some(draw, names, 3), unusable=some(draw, names, 3),
        bad_machines=some(draw, sorted(there), 2), breaking_machines=some(draw, sorted(there), 2),
        retires=draw(st.integers(0, 5)), gives_back=draw(st.integers(0, 3)),
    )  # fmt: skip
    cluster = SimulatedCluster(there, world, draw(seeds), allowed_failures=draw(st.integers(0, 3)))
    return cluster, names, draw(st.integers(1, 5))


@pytest.mark.usefixtures("quiet")
@settings(simulated, max_examples=200)
@given(troubles())
def test_whatever_happens_every_unit_ends_once(trouble: tuple[SimulatedCluster, list[str], int]) -> None:
    cluster, names, each = trouble
    with dask.config.set({workers.WAIT_KEY: "100 s"}):
        report = drive(cluster, names, each)
    assert report.shards["done"] + report.shards["failed"] + report.shards["left"] == len(names)
    assert report.shards["done"] == report.read == report.embedded
    assert len(report.faults) == report.shards["failed"] and set(report.faults) <= set(names)
    assert bool(report.ended) == bool(report.shards["left"]), "what is left has a reason"


@st.composite
def one_bad_unit(draw: st.DrawFn) -> tuple[list[str], str]:
    names = names_of(draw(st.integers(1, 24)))
    return names, draw(st.sampled_from(names))


@pytest.mark.usefixtures("quiet")
@simulated
@given(one_bad_unit(), st.integers(1, 5), machines, st.integers(0, 3), seeds, st.integers(0, 5))
def test_a_unit_that_kills_is_set_aside_and_no_other(
    bad: tuple[list[str], str], each: int, there: dict[str, int], allowed: int, seed: int, retires: int
) -> None:
    names, killer = bad
    world = World(kills=frozenset([killer]), retires=retires)
    report = drive(SimulatedCluster(there, world, seed, allowed), names, each)
    assert {name: fault.kind for name, fault in report.faults.items()} == {killer: FaultKind.KILLS_WORKERS}
    assert report.shards == {"done": len(names) - 1, "skipped": 0, "failed": 1, "left": 0} and not report.ended


@pytest.mark.usefixtures("quiet")
@simulated
@given(one_bad_unit(), st.integers(1, 5), machines, seeds)
def test_a_unit_that_breaks_models_is_set_aside_and_no_other(
    bad: tuple[list[str], str], each: int, there: dict[str, int], seed: int
) -> None:
    names, breaker = bad
    report = drive(SimulatedCluster(there, World(breaks=frozenset([breaker])), seed), names, each)
    assert {name: fault.kind for name, fault in report.faults.items()} == {breaker: FaultKind.BREAKS_MODEL}
    assert report.shards == {"done": len(names) - 1, "skipped": 0, "failed": 1, "left": 0} and not report.ended


@pytest.mark.usefixtures("quiet")
@simulated
@given(st.integers(16, 24), st.integers(1, 2), st.sampled_from([A, B, C]), st.data(), seeds, st.integers(0, 3))
def test_a_machine_that_hangs_costs_no_unit_even_beside_one_that_kills(
    count: int, each: int, machine: str, data: st.DataObject, seed: int, allowed: int
) -> None:
    kills, unusable = some(data.draw, names_of(count), 1), some(data.draw, names_of(count), 2)
    there = {host: data.draw(st.integers(1, 2)) for host in (A, B, C)}
    world = World(kills=kills, unusable=unusable, hanging=frozenset([machine]), gives_back=data.draw(st.integers(0, 3)))
    report = drive(SimulatedCluster(there, world, seed, allowed), names_of(count), each)
    assert set(report.faults) == kills | unusable and not report.ended


@pytest.mark.usefixtures("quiet")
@simulated
@given(st.integers(1, 24), st.integers(1, 5), st.sampled_from(["bad_machines", "breaking_machines"]), seeds)
def test_a_machine_that_is_to_blame_costs_no_unit(count: int, each: int, how: str, seed: int) -> None:
    world = World(**{how: frozenset([B])})  # type: ignore[arg-type]
    report = drive(SimulatedCluster({A: 1, B: 1, C: 1}, world, seed), names_of(count), each)
    assert not report.faults
    assert report.ended or report.shards["done"] == count


@pytest.mark.parametrize("allowed", [0, 3], ids=["told by Dask", "seen by the driver"])
def test_a_worker_that_was_sent_away_was_not_killed(allowed: int) -> None:
    """A unit kills once; its trial loses more workers in an orderly way than it may kill."""
    world = World(kills=frozenset(["00"]))
    cluster = SimulatedCluster({A: 1}, world, allowed_failures=0)
    lose = cluster.lose

    def losing(address: str, orderly: bool = False) -> None:
        cluster.allowed_failures = allowed
        lose(address, orderly)
        if world.kills:
            world.kills, world.retires = frozenset(), 5

    cluster.lose = losing  # type: ignore[method-assign]
    report = drive(cluster, ["00"])
    assert report.shards["done"] == 1 and not report.faults and world.retires == 0


def test_a_shard_whose_workers_die_is_no_endless_loop_while_another_worker_is_left_out() -> None:
    """With a worker left out, tasks are restricted to the others, and Dask counts no deaths of a task anew."""
    world = World(kills=frozenset(["03"]), breaking_machines=frozenset([B]))
    report = drive(SimulatedCluster({A: 1, B: 1}, world), names_of(8))
    assert list(report.faults) == ["03"] and report.shards["done"] == 7


def test_a_trial_on_a_paused_worker_is_told_and_ends(caplog: pytest.LogCaptureFixture) -> None:
    world = World(kills=frozenset(["00"]))
    cluster = SimulatedCluster({A: 1, B: 1}, world, allowed_failures=0)
    submit = cluster.submit

    def submitting(*args: Any, workers: Any, **options: Any) -> Any:
        task = submit(*args, workers=workers, **options)
        if workers is not None and not any(worker.paused for worker in cluster.workers.values()):
            [address] = workers
            cluster.workers[address].paused = True
        return task

    cluster.submit = submitting  # type: ignore[method-assign]
    with dask.config.set({workers.WAIT_KEY: "0 s"}):
        report = drive(cluster, names_of(4))
    told = next(message for message in caplog.messages if "is tried alone" in message)
    assert "00" in told and "memory_limit" in told and "which Dask has paused" in told
    assert "3 workers that had nothing but this shard" in report.faults["00"].message
    assert report.shards["done"] == 3


def test_what_only_a_paused_worker_may_do_goes_to_another_in_the_end(caplog: pytest.LogCaptureFixture) -> None:
    """Units that a slow worker gave back are kept from it, also when the only other one is paused."""
    cluster = SimulatedCluster({A: 1, B: 1}, World(gives_back=1))
    submit = cluster.submit

    def submitting(*args: Any, workers: Any, **options: Any) -> Any:
        task = submit(*args, workers=workers, **options)
        if workers is not None and not any(worker.paused for worker in cluster.workers.values()):
            cluster.workers[workers[0]].paused = True
        return task

    cluster.submit = submitting  # type: ignore[method-assign]
    with dask.config.set({workers.WAIT_KEY: "0 s"}):
        report = drive(cluster, names_of(2), each=2)
    assert report.shards["done"] == 2
    assert "01 has waited 0 s for" in caplog.text and "which Dask has paused" in caplog.text
