"""Which shard, worker or machine is to blame when workers die and models break."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import Client, LocalCluster
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import failures
from curator_embed.execution import driver
from curator_embed.execution.blame import (
    ALLOWED_DEATHS,
    BREAKS_IN_A_ROW,
    KILLS_IN_A_ROW,
    TRIES_ALONE,
    Blame,
    EndRun,
    LeaveOut,
    LetIn,
    Refusal,
    SetAside,
    TryApart,
)
from curator_embed.execution.flights import Flight
from curator_embed.execution.job import FaultKind
from curator_embed.execution.run import RunStopped
from curator_embed.steps import BatchModel
from tests.stub import ColourEmbedder, ColourModel
from tests.threads import save


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
    nobody.scale(2)
    Client.current().wait_for_workers(2)
    with pytest.raises(RunStopped, match=r"breaks down whatever it works on.*ValueError: cannot embed this") as stopped:
        save(Fussy(everything), source, tmp_path / "out")
    assert stopped.value.report.shards == {"done": 0, "skipped": 0, "failed": 0, "left": 12}


# -- the state machine ---------------------------------------------------------------------------

A, B, C = "10.0.0.1", "10.0.0.2", "10.0.0.3"


def of(*machines: str) -> dict[str, str]:
    """One worker of each machine."""
    return {machine: f"tcp://{machine}:1" for machine in machines}


def test_shards_that_were_to_blame_do_not_clear_each_other() -> None:
    judge = Blame()
    for position in range(40):
        [decision] = judge.died_alone(position, [A], TRIES_ALONE)
        assert isinstance(decision, SetAside) and decision.position == position
        assert decision.kind is FaultKind.KILLS_WORKERS
    assert not judge.suspects


def test_where_everything_kills_the_run_ends_and_no_shard_is_blamed() -> None:
    judge = Blame()
    for number in range(KILLS_IN_A_ROW + 4 - 1):
        assert judge.died([number], under_way=4) == []
    [decision] = judge.died([99], under_way=4)
    assert isinstance(decision, EndRun) and "workers die whatever they work on: 14 tasks" in decision.why


def test_a_finished_shard_between_two_deaths_clears_the_workers() -> None:
    judge = Blame()
    for number in range(100):
        assert judge.died([number], under_way=4) == []
        judge.finished()


def tried(judge: Blame, *machines: str, dies: Callable[[int, str], bool]) -> tuple[list[tuple[int, str]], set[int]]:
    """Try suspects alone until there are none; where they were tried, and which were set aside."""
    trials: list[tuple[int, str]] = []
    aside: set[int] = set()
    where = {address: machine for machine, address in of(*machines).items()}
    while judge.suspects:
        for position, address in judge.trials(of(*machines), busy=()):
            trials.append((position, where[address]))
            if dies(position, where[address]):
                aside |= {
                    d.position for d in judge.died_alone(position, [where[address]], 1) if isinstance(d, SetAside)
                }
    return trials, aside


def test_a_machine_that_kills_everything_is_not_taken_for_a_shard_that_does() -> None:
    judge = Blame()
    judge.died([0, 1, 2], under_way=1)
    trials, aside = tried(judge, A, B, C, dies=lambda position, machine: position == 1 or machine == B)
    assert aside == {1}, "the one that died everywhere"
    assert sorted(machine for position, machine in trials if position == 1) == [A, B, C]
    assert len(trials) == len(set(trials)), "nowhere twice"


def test_where_there_is_one_machine_a_shard_is_tried_there_again() -> None:
    judge = Blame()
    judge.died([0, 1, 2], under_way=1)
    trials, aside = tried(judge, A, dies=lambda position, machine: True)
    assert aside == {0, 1, 2} and len(trials) == 3 * TRIES_ALONE


@given(st.sets(st.integers(0, 9)), st.sets(st.sampled_from([A, B, C]), max_size=2))
def test_only_shards_that_kill_are_set_aside_while_one_machine_is_sound(killers: set[int], bad: set[str]) -> None:
    judge = Blame()
    judge.died(range(10), under_way=1)
    trials, aside = tried(judge, A, B, C, dies=lambda position, machine: position in killers or machine in bad)
    assert aside == killers
    assert len(trials) <= 10 * TRIES_ALONE


def test_a_machine_that_has_a_trial_gets_no_second_one() -> None:
    judge = Blame()
    judge.died([0, 1, 2], under_way=1)
    assert judge.trials(of(A, B), busy={A}) == [(0, f"tcp://{B}:1")]
    assert list(judge.suspects) == [1, 2]
    judge.untried(0)
    assert list(judge.suspects) == [0, 1, 2], "nothing was learnt of it: it is the next"


def test_tasks_that_lose_all_workers_they_may_use_kill_them_in_the_end() -> None:
    judge = Blame()
    assert [judge.gone([3, 4]) for _ in range(ALLOWED_DEATHS + 1)] == [False] * ALLOWED_DEATHS + [True]
    assert judge.gone([4, 5]) and not judge.gone([5])


def broke(
    judge: Blame, address: str, *positions: int, alone: bool = False, fit: Sequence[str] = (), chance: int | None = None
) -> Any:
    refusal = Refusal(address, "node", "ValueError: no", had_begun=True)
    flight = Flight(positions, alone=alone, chance=judge.chance if chance is None else chance)
    return judge.refused(refusal, flight, positions, [address, *fit], left_out=False)


def test_a_shard_is_suspect_when_it_was_in_two_pipelines_that_broke() -> None:
    judge = Blame()
    assert broke(judge, "a", 1, 2, 3) == [LeaveOut("a", "ValueError: no"), TryApart((1, 2, 3))]
    assert broke(judge, "b", 2, 4) == [LeaveOut("b", "ValueError: no"), TryApart((4,))]
    assert list(judge.suspects) == [2]


def test_a_worker_that_breaks_on_everything_is_not_taken_for_a_shard_that_does() -> None:
    judge = Blame()
    assert broke(judge, "b", 7, alone=True, fit=["a", "c"]) == [LeaveOut("b", "ValueError: no")]
    assert list(judge.suspects) == [7], "tried on another worker"
    judge.suspects.clear()
    out, aside, let_in = broke(judge, "a", 7, alone=True, fit=["c"])
    assert out == LeaveOut("a", "ValueError: no")
    assert aside.position == 7 and aside.kind is FaultKind.BREAKS_MODEL and "ValueError: no" in aside.why
    assert let_in == LetIn(("b", "a")), "both that it broke are let in again"


def test_a_shard_that_breaks_the_only_worker_is_set_aside_at_once() -> None:
    judge = Blame()
    kinds = [type(decision) for decision in broke(judge, "a", 7, alone=True)]
    assert kinds == [LeaveOut, SetAside, LetIn]


def test_a_word_from_before_its_new_chance_is_no_news_of_a_worker() -> None:
    judge = Blame()
    broke(judge, "a", 1)
    assert judge.nobody_fit(["a", "b"]) == [LetIn(("a",))] and judge.chance == 1
    late = broke(judge, "a", 2, chance=0)
    assert late == [TryApart((2,))], "the worker stays in"
    assert LeaveOut("a", "ValueError: no") in broke(judge, "a", 3, chance=1)


def test_workers_whose_pipelines_broke_are_let_in_when_nobody_else_is_there() -> None:
    judge = Blame()
    broke(judge, "a", 1)
    broke(judge, "gone", 2)
    assert judge.nobody_fit(["a"]) == [LetIn(("a",))]
    assert judge.nobody_fit(["a"]) == [], "it has its chance"


def test_four_breaks_in_a_row_are_the_models() -> None:
    judge = Blame()
    for number in range(BREAKS_IN_A_ROW - 1):
        assert not any(isinstance(decision, EndRun) for decision in broke(judge, f"{number}", number))
    *_, end = broke(judge, "last", 9)
    assert isinstance(end, EndRun) and "ValueError: no" in end.why and "node" in end.why


def test_what_no_worker_can_load_is_the_jobs_own_error() -> None:
    judge = Blame()
    refusal = Refusal("a", "node", "RuntimeError: no GPU", had_begun=False)
    found = judge.refused(refusal, Flight((1,)), [1], ["a"], left_out=False)
    assert found == [LeaveOut("a", "RuntimeError: no GPU")]
    assert judge.hopeless and judge.nobody_able(refusal) == []
    judge.finished()
    assert not judge.hopeless and judge.nobody_able(refusal) == [], "others may come"


def test_a_model_that_broke_and_cannot_be_loaded_again_is_said_to_break() -> None:
    judge = Blame()
    broke(judge, "a", 1)
    [end] = judge.nobody_able(Refusal("a", "node", "RuntimeError: no GPU", had_begun=False))
    assert isinstance(end, EndRun) and "breaks down whatever it works on" in end.why and not judge.hopeless


def test_a_finished_shard_begins_both_counts_anew() -> None:
    judge = Blame()
    for _ in range(2):
        for number in range(KILLS_IN_A_ROW + 4 - 1):
            assert judge.died([number], under_way=4) == []
        judge.finished()
    for number in range(KILLS_IN_A_ROW + 4 - 1):
        assert judge.died([number], under_way=4) == []
    assert judge.died([99], under_way=4) != []

    judge = Blame()
    for begin in (0, 10):
        for number in range(BREAKS_IN_A_ROW - 1):
            broke(judge, f"{begin + number}", begin + number)
        judge.finished()
    for number in range(BREAKS_IN_A_ROW - 1):
        assert not any(isinstance(decision, EndRun) for decision in broke(judge, f"{20 + number}", 20 + number))
    assert any(isinstance(decision, EndRun) for decision in broke(judge, "last", 99))


def test_a_worker_that_is_left_out_already_is_not_left_out_twice() -> None:
    judge = Blame()
    refusal = Refusal("a", "node", "ValueError: no", had_begun=True)
    assert judge.refused(refusal, Flight((1,)), [1], ["a", "b"], left_out=True) == [TryApart((1,))]


def test_a_worker_whose_pipeline_cannot_be_built_is_not_let_in_for_those_that_broke() -> None:
    judge = Blame()
    judge.refused(
        Refusal("a", "node", "RuntimeError: no GPU", had_begun=False), Flight((1,)), [1], ["a"], left_out=False
    )
    assert judge.nobody_fit(["a"]) == [] and judge.broke_before is False
    broke(judge, "b", 1)
    assert judge.nobody_fit(["a", "b"]) == [LetIn(("b",))] and judge.broke_before is True


def test_nothing_is_tried_apart_where_all_are_suspect() -> None:
    judge = Blame()
    broke(judge, "a", 1, 2)
    assert broke(judge, "b", 1, 2) == [LeaveOut("b", "ValueError: no")]
    assert list(judge.suspects) == [1, 2]


def test_only_workers_that_a_shard_broke_are_let_in_when_it_is_set_aside() -> None:
    judge = Blame()
    broke(judge, "x", 9)
    broke(judge, "b", 7, alone=True, fit=["a", "c"])
    *_, let_in = broke(judge, "a", 7, alone=True, fit=["c"])
    assert let_in == LetIn(("b", "a"))


def test_a_model_that_has_worked_is_waited_for() -> None:
    judge = Blame()
    broke(judge, "a", 1)
    judge.finished()
    assert judge.nobody_able(Refusal("a", "node", "RuntimeError: no GPU", had_begun=False)) == []
