"""Two tasks that write one file: a straggler's copy, or what a driver that died has left running."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curator_embed.datasets import ImageTextPairDataset
from curator_embed.datasets.assigned import AssignJob
from curator_embed.datasets.export_shards import ExportJob, MarkJob, NewShard, Piece
from curator_embed.errors import SourceError
from curator_embed.tables import writing
from tests.rows import table_rows, tar_images, tar_members


class Meanwhile:
    """Does something at the n-th time that a file is about to be replaced."""

    def __init__(self, number: int, act: Callable[[], object]) -> None:
        self.left, self.act, self.acted = number, act, False

    def __call__(self, point: str) -> None:
        if point == "output.temporary_written" and not self.acted:
            self.left -= 1
            if not self.left:
                self.acted = True
                self.act()


@pytest.fixture
def unit(source: Path, tmp_path: Path) -> tuple[ExportJob, NewShard, Any]:
    """A job, its new shard of one piece, and the partition that comes with it."""
    table = pq.read_table(source / "00001.parquet")
    pq.write_table(table.append_column("keep", pa.array([True] * len(table))), source / "00001.parquet")
    dataset = ImageTextPairDataset.from_webdataset(str(source / "00001.tar"))
    part, (shard,) = dataset.metadata.compute(), dataset.shards
    marked = MarkJob("key", "keep", (), {}).run_unit(shard, [part]).found
    job = ExportJob(str(tmp_path / "out"), dataset.job(None), "keep", 2, None, "this", ())
    return job, NewShard("00000", (Piece(0, 0, marked.kept),), (shard,), (marked.digest,)), part


@pytest.mark.parametrize("number", [1, 2])
def test_a_new_shard_that_another_task_has_finished_is_done(
    number: int, unit: tuple[ExportJob, NewShard, Any], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the tar takes its place, and between tar and parquet."""
    job, shard, part = unit
    others: list[Any] = []
    meanwhile = Meanwhile(number, lambda: others.append(job.run_unit(shard, [part])))
    monkeypatch.setattr(writing, "failpoint", meanwhile)
    report = job.run_unit(shard, [part])
    (other,) = others
    assert (report.skipped, other.skipped) == (True, False)
    assert report.found.written == other.found.written == len(table_rows(tmp_path / "out"))
    assert job.run_unit(shard, [part]).skipped, "tar and parquet belong together"
    images = tar_images(source)
    assert list(tar_images(tmp_path / "out").values()) == [images[k] for k in sorted(images) if k[:5] == "00001"]


def test_a_tar_that_another_task_has_not_yet_written_the_parquet_of_is_made_again(
    unit: tuple[ExportJob, NewShard, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, shard, part = unit
    tar = tmp_path / "out" / "00000.tar"
    monkeypatch.setattr(writing, "failpoint", Meanwhile(1, lambda: tar.write_bytes(b"another's")))
    report = job.run_unit(shard, [part])
    assert not report.skipped and len(tar_members(tar)) > 0
    assert job.run_unit(shard, [part]).skipped


def test_a_new_shard_that_is_replaced_again_and_again_is_a_fault(
    unit: tuple[ExportJob, NewShard, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, shard, part = unit
    tar, versions = tmp_path / "out" / "00000.tar", iter(range(100))

    def replaced(point: str) -> None:
        if point == "output.temporary_written":
            tar.write_bytes(b"another's" * next(versions))

    monkeypatch.setattr(writing, "failpoint", replaced)
    with pytest.raises(SourceError, match=r"out/00000\.tar: the file was changed by someone else"):
        job.run_unit(shard, [part])
    assert next(versions) == 3


@pytest.mark.parametrize("same", [True, False])
def test_assigned_columns_that_another_task_has_written_are_done(
    same: bool, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = ImageTextPairDataset.from_webdataset(str(source / "00001.tar"))
    part, (shard,) = dataset.metadata[["key", "width"]].compute(), dataset.shards
    part = part.rename(columns={"width": "wide"})
    kinds = pa.schema([("key", pa.string()), ("wide", pa.int32())])
    job, path = AssignJob(dataset.job(None), kinds), source / "00001.parquet"

    def other() -> None:
        if same:
            job.run_unit(shard, [part])
        else:
            pq.write_table(pq.read_table(path).append_column("mine", pa.array(np.arange(len(part)))), path)

    monkeypatch.setattr(writing, "failpoint", Meanwhile(1, other))
    if same:
        assert job.run_unit(shard, [part]).skipped
        assert "wide" in pq.read_schema(path).names
    else:
        with pytest.raises(SourceError, match=r"00001\.parquet: the file was changed by someone else"):
            job.run_unit(shard, [part])
        assert "mine" in pq.read_schema(path).names and "wide" not in pq.read_schema(path).names
