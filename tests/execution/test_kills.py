"""Promise 3 under ``kill -9``: whatever happens, the finished output is what an undisturbed run writes."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from curator_embed.tables.failpoints import NAMES
from tests.shards import crops, write_dataset
from tests.zygote import Zygote

SHARDS = 5


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    started = Zygote()
    yield started
    started.close()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, wheel_photos: list[Path]) -> Path:
    bad = {(1, 2): b"", (2, 0): b"<html></html>"}
    return write_dataset(tmp_path_factory.mktemp("kills") / "source", wheel_photos, shards=SHARDS, bad=bad)


@pytest.fixture(scope="module")
def undisturbed(zygote: Zygote, source: Path) -> dict[str, bytes]:
    output = source.parent / "undisturbed"
    assert zygote.run(source=str(source), output=str(output)) == 0
    return contents(output)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of an output but the reports, which hold times."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


def finished(folder: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in folder.glob("*.parquet")}


@pytest.mark.parametrize("moment", ["1", "3"])
@pytest.mark.parametrize("point", NAMES)
def test_killed_at_a_named_point(
    point: str, moment: str, zygote: Zygote, source: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    environment = {"CURATOR_EMBED_FAILPOINT": f"{point}:{moment}"}
    assert zygote.run(source=str(source), output=str(output), environment=environment) == -9
    before = finished(output)
    assert len(before) < SHARDS or point == "shard.finished"
    assert zygote.run(source=str(source), output=str(output)) == 0
    assert contents(output) == undisturbed
    after = finished(output)
    assert {name: after[name] for name in before} == before, "finished shards are not computed again"


@pytest.mark.parametrize("point", ["shard.read", "output.temporary_written", "output.replaced"])
def test_killed_while_adding_in_place(point: str, zygote: Zygote, source: Path, tmp_path: Path) -> None:
    there = [shutil.copytree(source, tmp_path / name) for name in ("whole", "killed")]
    for folder in there:  # mtimes are part of the footer
        shutil.copystat(source, folder)
    assert zygote.run(source=str(there[0]), output=None) == 0
    environment = {"CURATOR_EMBED_FAILPOINT": f"{point}:2"}
    assert zygote.run(source=str(there[1]), output=None, environment=environment) == -9
    assert zygote.run(source=str(there[1]), output=None) == 0
    assert contents(there[1]) == contents(there[0])


@pytest.mark.parametrize("point", ["shard.read", "output.temporary_written", "output.replaced"])
def test_an_overwriting_run_that_was_killed_goes_on_and_a_whole_one_begins_anew(
    point: str, zygote: Zygote, source: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    output, options = tmp_path / "out", {"overwrite": True}
    assert zygote.run(source=str(source), output=str(output)) == 0
    first = finished(output)
    environment = {"CURATOR_EMBED_FAILPOINT": f"{point}:3"}
    assert zygote.run(source=str(source), output=str(output), options=options, environment=environment) == -9
    made = {name: time for name, time in finished(output).items() if time != first[name]}
    assert 0 < len(made) < SHARDS
    assert zygote.run(source=str(source), output=str(output), options=options) == 0
    second = finished(output)
    assert {name: second[name] for name in made} == made, "what it had made anew is not made again"
    assert all(second[name] != first[name] for name in first)
    assert contents(output) == undisturbed
    assert zygote.run(source=str(source), output=str(output), options=options) == 0
    assert all(time != second[name] for name, time in finished(output).items()), "asked for again: all of it"


@pytest.mark.parametrize("point", ["shard.read", "output.replaced"])
def test_killed_while_a_folder_grows(point: str, zygote: Zygote, wheel_photos: list[Path], tmp_path: Path) -> None:
    images, folder = crops(wheel_photos[0], 20), tmp_path / "photos"
    folder.mkdir()
    for number in range(7):
        (folder / f"{number}.jpg").write_bytes(images[number])
    outputs = [tmp_path / name for name in ("whole", "killed")]
    for output in outputs:
        assert zygote.run(source=str(folder), output=str(output), images_per_file=3) == 0
    before = finished(outputs[1])
    for number in range(7, 20):  # they sort before all that are there
        (folder / f"!{number}.jpg").write_bytes(images[number])
    assert zygote.run(source=str(folder), output=str(outputs[0]), images_per_file=3) == 0
    environment = {"CURATOR_EMBED_FAILPOINT": f"{point}:3"}
    assert zygote.run(source=str(folder), output=str(outputs[1]), images_per_file=3, environment=environment) == -9
    killed = finished(outputs[1])
    assert len(before) < len(killed) < len(before) + 5
    assert zygote.run(source=str(folder), output=str(outputs[1]), images_per_file=3) == 0
    assert contents(outputs[1]) == contents(outputs[0])
    after = finished(outputs[1])
    assert {name: after[name] for name in killed} == killed, "finished files are not written again"
    paths = [path for file in sorted(outputs[1].glob("*.parquet")) for path in pq.read_table(file)["path"].to_pylist()]
    assert sorted(paths) == sorted(path.name for path in folder.iterdir())


EXPORT_POINTS = [name for name in NAMES if name != "shard.read"]


@pytest.fixture(scope="module")
def exported(zygote: Zygote, source: Path) -> Path:
    """What an undisturbed export writes."""
    output = source.parent / "exported"
    assert zygote.run(kind="export", source=str(source), output=str(output)) == 0
    return output


def same_but_for_times(one: Path, other: Path) -> None:
    """Tars are equal; footers say when each tar was written, rows do not."""
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in other.iterdir())
    for path in one.glob("*.tar"):
        assert path.read_bytes() == (other / path.name).read_bytes()
    for path in one.glob("*.parquet"):
        assert pq.read_table(path).equals(pq.read_table(other / path.name))


@pytest.mark.parametrize("point", EXPORT_POINTS)
def test_an_export_that_was_killed_goes_on(
    point: str, zygote: Zygote, source: Path, exported: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    job = {"kind": "export", "source": str(source), "output": str(output)}
    assert zygote.run(**job, environment={"CURATOR_EMBED_FAILPOINT": f"{point}:4"}) == -9
    before = {path: path.stat().st_mtime_ns for path in output.glob("*.parquet")}
    assert len(before) < len(list(exported.glob("*.parquet")))
    assert zygote.run(**job) == 0
    same_but_for_times(exported, output)
    assert {path: path.stat().st_mtime_ns for path in before} == before, "finished shards are not written again"


@pytest.mark.parametrize("point", ["shard.started", "output.temporary_written", "output.replaced", "shard.finished"])
def test_assigned_columns_go_on_after_a_kill(point: str, zygote: Zygote, source: Path, tmp_path: Path) -> None:
    there = [shutil.copytree(source, tmp_path / name) for name in ("whole", "killed")]
    assert zygote.run(kind="assign", source=str(there[0]), output=None) == 0
    environment = {"CURATOR_EMBED_FAILPOINT": f"{point}:3"}
    assert zygote.run(kind="assign", source=str(there[1]), output=None, environment=environment) == -9
    before = {p: p.stat().st_mtime_ns for p in there[1].glob("*.parquet") if "half" in pq.read_schema(p).names}
    assert 0 < len(before) < SHARDS or point == "shard.started"
    assert zygote.run(kind="assign", source=str(there[1]), output=None) == 0
    assert contents(there[1]) == contents(there[0])
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_killed_worker_costs_only_time(zygote: Zygote, source: Path, tmp_path: Path) -> None:
    # Two workers share the cores, so forward passes get fewer threads than alone: compare with two workers.
    assert zygote.run(source=str(source), output=str(tmp_path / "whole"), workers=2) == 0
    died = tmp_path / "died"
    environment = {"CURATOR_EMBED_FAILPOINT": f"output.temporary_written:2:{died}"}
    output = tmp_path / "out"
    assert zygote.run(source=str(source), output=str(output), workers=2, environment=environment) == 0
    assert died.exists()
    assert contents(output) == contents(tmp_path / "whole")


@pytest.mark.slow
def test_killed_at_random_moments(zygote: Zygote, source: Path, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    chosen = random.Random(7)
    survived = 0
    start = time.monotonic()
    assert zygote.run(source=str(source), output=str(tmp_path / "whole")) == 0
    whole = time.monotonic() - start
    for number in range(50):
        output = tmp_path / f"out-{number}"
        status = zygote.run(source=str(source), output=str(output), kill_after=chosen.uniform(0.05, whole))
        survived += status == 0
        before = finished(output) if output.exists() else {}
        assert zygote.run(source=str(source), output=str(output)) == 0
        assert contents(output) == undisturbed
        after = finished(output)
        assert {name: after[name] for name in before} == before
    assert survived < 40, "most runs were to be killed"
