"""Shards of which not one image can be embedded: written like any other once something else can be read, else not.

Nothing at all that can be read is no result: the source is wrong, or out of reach, and nothing counts as done.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from curator_embed import get_client
from curator_embed.datasets import ImageTextPairDataset
from curator_embed.execution.report import RunReport
from curator_embed.execution.run import RowsFailed, RunStopped
from tests.rows import assert_embedded, assert_failed, table_rows
from tests.shards import crops, write_dataset
from tests.stub import ColourEmbedder

BROKEN = b"<html>no image</html>"


@pytest.fixture(scope="module", autouse=True)
def client() -> Iterator[Any]:
    with get_client() as started:
        yield started
        started.cluster.close()


def write_list(folder: Path, photo: Path, count: int, broken: int = 0) -> Path:
    """``list.txt`` and its images below ``images/``; the last ``broken`` of them are none."""
    (folder / "images" / "below").mkdir(parents=True)
    images = [*crops(photo, count - broken), *[BROKEN] * broken]
    for number, data in enumerate(images):
        (folder / "images" / "below" / f"{number:03d}.jpg").write_bytes(data)
    (folder / "list.txt").write_text("".join(f"below/{number:03d}.jpg\n" for number in range(count)))
    return folder / "list.txt"


def save_list(path: Path, root: Path | None, output: Path | None, per_file: int = 50, **options: Any) -> RunReport:
    dataset = ImageTextPairDataset.from_path_list(path, root=root, images_per_file=per_file)
    return ColourEmbedder()(dataset).save_metadata(None if output is None else str(output), progress=False, **options)


def save(folder: Path, output: Path | None, **options: Any) -> RunReport:
    dataset = ColourEmbedder()(ImageTextPairDataset.from_webdataset(str(folder)))
    return dataset.save_metadata(None if output is None else str(output), progress=False, **options)


def files(output: Path) -> list[str]:
    return sorted(path.name for path in output.glob("*.parquet"))


@pytest.mark.parametrize("options", [{}, {"on_error": "drop"}, {"limit": 120}, {"on_error": "raise"}], ids=str)
def test_a_forgotten_root_is_no_result_and_the_right_one_works(
    options: dict[str, Any], tmp_path: Path, wheel_photos: list[Path]
) -> None:
    listed, output = write_list(tmp_path, wheel_photos[0], 200), tmp_path / "out"
    with pytest.raises(RunStopped) as stopped:
        save_list(listed, None, output, **options)
    assert not isinstance(stopped.value, RowsFailed)
    told = str(stopped.value)
    assert "nothing of the dataset could be embedded, so nothing was written" in told
    assert "not_found" in told and f"{tmp_path}/below/000.jpg" in told and "Check root=" in told
    assert files(output) == []
    report = stopped.value.report
    assert report.read == report.shards["done"] == 0 and report.shards["left"] == 4 and not report.faults
    assert save_list(listed, tmp_path / "images", output).embedded == 200
    assert len(table_rows(output, "path")) == 200


def test_the_last_shard_of_a_list_is_written_when_its_two_images_are_broken(
    tmp_path: Path, wheel_photos: list[Path]
) -> None:
    listed, output = write_list(tmp_path, wheel_photos[0], 12, broken=2), tmp_path / "out"
    report = save_list(listed, tmp_path / "images", output, per_file=10)
    assert report.shards == {"done": 2, "skipped": 0, "failed": 0, "left": 0}
    assert (report.read, report.embedded, report.failed) == (12, 10, 2)
    rows = table_rows(output, "path")
    assert_failed(rows["below/011.jpg"], "not_an_image")
    again = save_list(listed, tmp_path / "images", output, per_file=10)
    assert again.shards["skipped"] == 2 and again.failed == 2


@pytest.mark.parametrize("in_place", [False, True])
def test_a_tar_whose_images_are_all_broken_is_written_beside_good_ones(
    in_place: bool, tmp_path: Path, wheel_photos: list[Path]
) -> None:
    bad = {(0, number): BROKEN for number in range(4)}  # the first: it is known only later that others can be read
    folder = write_dataset(tmp_path / "in", wheel_photos, shards=3, samples=4, bad=bad)
    output = folder if in_place else tmp_path / "out"
    report = save(folder, None if in_place else output)
    assert report.shards == {"done": 3, "skipped": 0, "failed": 0, "left": 0}
    assert (report.read, report.embedded, report.failed, report.no_image) == (15, 8, 4, 3)
    assert report.reasons == {"not_an_image": 4}
    rows = table_rows(output)
    assert_failed(rows["000000003"], "not_an_image")
    assert_embedded(rows["000010003"], crops(wheel_photos[1], 4)[3])


def test_dropped_rows_may_leave_an_empty_file_beside_good_ones(tmp_path: Path, wheel_photos: list[Path]) -> None:
    bad = {(1, number): BROKEN for number in range(4)}
    folder = write_dataset(tmp_path / "in", wheel_photos, shards=2, samples=4, missing=0, bad=bad)
    report = save(folder, tmp_path / "out", on_error="drop")
    assert report.shards["done"] == 2 and (report.embedded, report.failed) == (4, 4)
    assert len(table_rows(tmp_path / "out")) == 4 and files(tmp_path / "out") == ["00000.parquet", "00001.parquet"]


def test_under_raise_a_shard_that_cannot_be_read_is_told_as_failed_rows_beside_good_ones(
    tmp_path: Path, wheel_photos: list[Path]
) -> None:
    bad = {(0, number): BROKEN for number in range(4)}
    folder = write_dataset(tmp_path / "in", wheel_photos, shards=3, samples=4, bad=bad)
    with pytest.raises(RowsFailed, match=r"00000\.tar: 4 of 5 rows failed, the first is"):
        save(folder, tmp_path / "out", on_error="raise")
    assert files(tmp_path / "out") == ["00001.parquet", "00002.parquet"]


@pytest.mark.parametrize("in_place", [False, True])
def test_a_single_shard_that_is_all_broken_is_not_done(
    in_place: bool, tmp_path: Path, wheel_photos: list[Path]
) -> None:
    bad = {(0, number): BROKEN for number in range(4)}
    folder = write_dataset(tmp_path / "in", wheel_photos, shards=1, samples=4, bad=bad)
    output = None if in_place else tmp_path / "out"
    before = (folder / "00000.parquet").read_bytes()
    for _ in range(2):
        with pytest.raises(RunStopped, match=r"nothing was written.*00000\.tar.*not_an_image") as stopped:
            save(folder, output)
        assert stopped.value.report.shards == {"done": 0, "skipped": 0, "failed": 0, "left": 1}
    assert (folder / "00000.parquet").read_bytes() == before and not (tmp_path / "out" / "00000.parquet").exists()
    good = write_dataset(tmp_path / "good", wheel_photos, shards=1, samples=4)
    shutil.copy(good / "00000.tar", folder / "00000.tar")
    assert save(folder, output).embedded == 4


def test_a_dataset_without_any_image_is_done(tmp_path: Path, wheel_photos: list[Path]) -> None:
    """No row failed: rows without an image are what the table says, and no wrong source."""
    folder = write_dataset(tmp_path / "in", wheel_photos, shards=1, samples=0, missing=3)
    report = save(folder, tmp_path / "out")
    assert report.shards["done"] == 1 and report.no_image == report.read == 3


def test_what_an_earlier_run_embedded_counts(tmp_path: Path, wheel_photos: list[Path]) -> None:
    folder = write_dataset(tmp_path / "in", wheel_photos, shards=2, samples=4, missing=0)
    last = (folder / "00001.tar", folder / "00001.parquet")
    kept = [path.rename(tmp_path / path.name) for path in last]
    assert save(folder, tmp_path / "out").embedded == 4
    broken = write_dataset(
        tmp_path / "b", wheel_photos, shards=2, samples=4, missing=0, bad={(1, n): b"" for n in range(4)}
    )
    for path in kept:
        path.unlink()
        shutil.copy(broken / path.name, folder / path.name)
    report = save(folder, tmp_path / "out")
    assert report.shards == {"done": 1, "skipped": 1, "failed": 0, "left": 0} and report.reasons == {"empty": 4}
    assert len(table_rows(tmp_path / "out")) == 8


def test_with_a_limit_a_broken_shard_takes_its_share_of_the_rows(tmp_path: Path, wheel_photos: list[Path]) -> None:
    """The first rows are the first rows, whatever can be read of them."""
    bad = {(0, number): BROKEN for number in range(4)}
    folder = write_dataset(tmp_path / "in", wheel_photos, shards=4, samples=4, missing=0, bad=bad)
    report = save(folder, tmp_path / "out", limit=10)
    assert (report.read, report.embedded, report.failed) == (10, 6, 4)
    assert files(tmp_path / "out") == ["00000.parquet", "00001.parquet", "00002.parquet"]
    assert report.shards["left"] == 0


def test_with_a_limit_that_ends_among_broken_rows_nothing_is_written(tmp_path: Path, wheel_photos: list[Path]) -> None:
    bad = {(0, number): BROKEN for number in range(4)}
    folder = write_dataset(tmp_path / "in", wheel_photos, shards=2, samples=4, missing=0, bad=bad)
    with pytest.raises(RunStopped, match="nothing was written"):
        save(folder, tmp_path / "out", limit=3)
    assert files(tmp_path / "out") == []
