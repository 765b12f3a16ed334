"""The driver's side: what is locked, what is asked for on the disk, and what an earlier run left to tell."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curator_embed import get_client
from curator_embed.datasets import ImageTextPairDataset
from curator_embed.errors import CuratorEmbedError, UsageError
from curator_embed.execution import carry_out, placing, run_plan
from curator_embed.execution.run import RowsFailed, RunStopped
from curator_embed.storage.location import Location
from curator_embed.tables.bookkeeping import Bookkeeping
from curator_embed.tables.lock import OutputLock, OutputLocked
from tests.shards import crops, write_dataset
from tests.stub import ColourEmbedder


@pytest.fixture(scope="module", autouse=True)
def client() -> Iterator[Any]:
    with get_client() as started:
        yield started
        started.cluster.close()


def opened(*patterns: Path) -> ImageTextPairDataset:
    dataset = ImageTextPairDataset.from_webdataset(str(patterns[0]))
    shards = [shard for p in patterns for shard in ImageTextPairDataset.from_webdataset(str(p)).shards]
    return ColourEmbedder()(dataset.like(shards, dataset.steps))


def test_in_place_only_files_being_replaced_are_there_twice(tmp_path: Path, wheel_photos: list[Path]) -> None:
    folder = write_dataset(tmp_path / "in", wheel_photos, shards=4, samples=2)
    sizes = sorted(p.stat().st_size for p in folder.glob("*.parquet"))
    dataset = opened(folder)
    new = 12 * (192 * 4 + 16 * 0)
    for tasks in (1, 2, 4):
        plan = run_plan.make_plan(dataset.shards, dataset.job(None), cores=1, tasks=tasks)
        assert plan.bytes_to_write == new + sum(sizes[-tasks:])


def test_image_columns_that_are_not_copied_need_no_disk(tmp_path: Path, wheel_photos: list[Path]) -> None:
    images = crops(wheel_photos[0], 20)
    pq.write_table(pa.table({"key": [f"{n:03d}" for n in range(20)], "image": images}), tmp_path / "0.parquet")
    dataset = ColourEmbedder()(ImageTextPairDataset.from_parquet(str(tmp_path / "0.parquet")))
    size = (tmp_path / "0.parquet").stat().st_size
    plan = run_plan.make_plan(dataset.shards, dataset.job(str(tmp_path / "out")), cores=1)
    assert plan.bytes_to_write is not None
    assert 0 < plan.bytes_to_write - 20 * 192 * 4 < size / 10
    plan = run_plan.make_plan(dataset.shards, dataset.job(str(tmp_path / "out"), ["image"]), cores=1)
    assert plan.bytes_to_write is not None and plan.bytes_to_write - 20 * 192 * 4 > size * 0.9


def test_raise_tells_of_rows_that_failed_in_the_run_that_finished(tmp_path: Path, wheel_photos: list[Path]) -> None:
    folder = write_dataset(tmp_path / "in", wheel_photos, shards=2, samples=2, bad={(0, 1): b""})
    opened(folder).save_metadata(progress=False)
    with pytest.raises(RowsFailed, match=r"00000: 1 of 3 rows failed in the run that finished this shard"):
        opened(folder).save_metadata(on_error="raise", progress=False)
    assert opened(folder).save_metadata(progress=False).failed == 1


def test_every_folder_that_is_written_to_is_locked_and_cleared(tmp_path: Path, wheel_photos: list[Path]) -> None:
    one = write_dataset(tmp_path / "a", wheel_photos, shards=1, samples=2)
    two = write_dataset(tmp_path / "b", wheel_photos, shards=2, samples=2)
    (two / "00000.tar").unlink(), (two / "00000.parquet").unlink()
    left = two / "00001.parquet.tmp-999999-abcd"
    left.write_bytes(b"half")
    dataset = opened(one, two)
    with OutputLock(Bookkeeping.of(Location.of(str(two)))), pytest.raises(OutputLocked, match=str(two)):
        dataset.save_metadata(progress=False)
    dataset.save_metadata(progress=False)
    assert not left.exists()


def test_a_run_that_lost_its_lock_removes_no_temporaries(
    tmp_path: Path, wheel_photos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_dataset(tmp_path / "in", wheel_photos, shards=1, samples=2)
    theirs = folder / "00000.parquet.tmp-999999-abcd"

    def lose(driver: Any, show: bool) -> None:
        driver.locks[0].lost.set()
        driver.report.shards["left"] += 1
        theirs.write_bytes(b"the next run's")

    monkeypatch.setattr(carry_out.Driver, "run", lose)
    with pytest.raises(RunStopped, match=r"lock\.json: the lock is no longer this run's"):
        opened(folder).save_metadata(progress=False)
    assert theirs.exists()


def test_a_refused_run_leaves_nothing_behind(tmp_path: Path, wheel_photos: list[Path]) -> None:
    folder = write_dataset(tmp_path / "in", wheel_photos, shards=1, samples=2)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "00000.parquet").write_bytes(b"somebody's")
    with pytest.raises(UsageError):
        opened(folder).save_metadata(str(tmp_path / "out"), progress=False)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["00000.parquet"]


def test_assigned_columns_are_written_under_the_lock(tmp_path: Path, wheel_photos: list[Path]) -> None:
    folder = write_dataset(tmp_path / "in", wheel_photos, shards=1, samples=2)
    dataset = ImageTextPairDataset.from_webdataset(str(folder))
    lock = tmp_path / "in.curator_embed" / "lock.json"
    held = dataset.metadata["width"].map_partitions(lambda part: part.notna() & lock.exists(), meta=("held", "boolean"))
    dataset.metadata["held"] = held
    dataset.save_metadata(progress=False)
    assert pq.read_table(folder / "00000.parquet")["held"].to_pylist().count(True) == 2


def test_a_cluster_without_workers_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    class Never:
        def result(self, timeout: float) -> None:
            raise TimeoutError

        def release(self) -> None:
            pass

    scheduler, cluster = SimpleNamespace(address="tcp://10.0.0.1:8786"), SimpleNamespace(plan={0, 1, 2})
    empty: Any = SimpleNamespace(nthreads=dict, submit=lambda *a, **k: Never(), scheduler=scheduler, cluster=cluster)
    with pytest.raises(CuratorEmbedError, match=r"tcp://10.0.0.1:8786 has no worker"):
        placing.place_on_workers(empty, None)  # type: ignore[arg-type]
