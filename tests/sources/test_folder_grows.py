"""Folders that grow, shrink and change between runs: rows stay in their files, and only new images are decoded."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from distributed import Client

from curator_embed.datasets import ImageTextPairDataset
from curator_embed.datasets.describing import describe_dataset
from curator_embed.decoding.image import DecodedImage
from curator_embed.errors import SourceError, UsageError
from curator_embed.execution.report import RunReport
from tests.rows import assert_embedded, assert_failed, table_rows
from tests.shards import crops
from tests.stub import ColourEmbedder

DECODED: list[str] = []
"""An entry for every image that was decoded and prepared, in this process."""


class Counting(ColourEmbedder):
    """Notes every image that it prepares."""

    def prepare(self, image: DecodedImage) -> Any:
        DECODED.append(self.column)
        return super().prepare(image)


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with Client(processes=False, n_workers=1, threads_per_worker=2, dashboard_address=None) as client:
        yield client


@pytest.fixture(scope="module")
def pictures(wheel_photos: list[Path]) -> list[bytes]:
    return crops(wheel_photos[0], 24)


@pytest.fixture
def photos(tmp_path: Path, pictures: list[bytes]) -> Path:
    """Nine images in folders of their own, and one that is none."""
    return fill(tmp_path / "photos", {f"{n % 3}/{n}.jpg": pictures[n] for n in range(9)} | {"1/bad.png": b"no image"})


def fill(folder: Path, contents: dict[str, bytes]) -> Path:
    for name, data in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def opened(photos: Path, images_per_file: int = 4, **options: Any) -> ImageTextPairDataset:
    return ImageTextPairDataset.from_folder(photos, images_per_file, **options)


def run(photos: Path, output: Path | None, images_per_file: int = 4, **options: Any) -> tuple[RunReport, int]:
    """A run of a freshly opened folder, and how many images it decoded."""
    DECODED.clear()
    dataset = Counting()(opened(photos, images_per_file))
    report = dataset.save_metadata(None if output is None else str(output), progress=False, **options)
    return report, len(DECODED)


def files(folder: Path) -> dict[str, bytes]:
    """Files by the positions in their names: ``0-4`` for ``photos_000000000-000000004.parquet``."""
    found = {}
    for path in sorted(folder.glob("*.parquet")):
        _, start, end = re.split("[_-]", path.stem)
        found[f"{int(start)}-{int(end)}"] = path.read_bytes()
    return found


def assert_rows(folder: Path, photos: Path, gone: set[str] = frozenset()) -> None:
    """Every image of the folder has one row with its own vector; other rows are only of those that are gone."""
    rows = table_rows(folder, "path")
    images = {
        path.relative_to(photos).as_posix(): path for path in photos.rglob("*") if path.suffix in (".jpg", ".png")
    }
    assert rows.keys() == images.keys() | gone
    for name, path in images.items():
        if name.endswith("bad.png"):
            assert_failed(rows[name], "not_an_image")
        else:
            assert_embedded(rows[name], path.read_bytes())


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "output"])
def test_what_is_there_stays_and_only_new_images_are_decoded(
    client: Client, photos: Path, pictures: list[bytes], tmp_path: Path, in_place: bool
) -> None:
    output = None if in_place else tmp_path / "out"
    folder = output or tmp_path / "photos_metadata"
    report, decoded = run(photos, output)
    assert (decoded, report.read, report.embedded, report.failed) == (9, 10, 9, 1)
    first = files(folder)
    assert first.keys() == {"0-4", "4-8", "8-10"}

    # One that sorts first, and one in a folder that sorts between others.
    fill(photos, {"!.jpg": pictures[9], "1/1/0.jpg": pictures[10]})
    report, decoded = run(photos, output)
    assert (decoded, report.read, report.embedded, report.notes) == (2, 12, 11, [])
    assert report.shards == {"done": 1, "skipped": 3, "failed": 0, "left": 0}
    assert files(folder) == first | {"10-12": files(folder)["10-12"]}
    assert_rows(folder, photos)
    assert run(photos, output)[1] == 0

    # One is deleted, one is moved: the first is told, the second is another image.
    (photos / "2/5.jpg").unlink()
    (photos / "0/3.jpg").rename(photos / "2/moved.jpg")
    before = files(folder)
    report, decoded = run(photos, output)
    assert (decoded, report.read, report.embedded, report.failed) == (1, 13, 12, 1)
    assert report.notes == [f"{folder}: 2 rows are of images that are gone ('0/3.jpg', ...); finished files keep them"]
    assert files(folder) == before | {"12-13": files(folder)["12-13"]}
    assert_rows(folder, photos, {"0/3.jpg", "2/5.jpg"})

    # A second growth, with another number of images in a file.
    fill(photos, {f"new/{n}.jpg": pictures[n] for n in (11, 12, 13)})
    before = files(folder)
    report, decoded = run(photos, output, 2)
    assert (decoded, files(folder).keys() - before.keys()) == (3, {"13-15", "15-16"})
    assert {name: data for name, data in files(folder).items() if name in before} == before
    assert_rows(folder, photos, {"0/3.jpg", "2/5.jpg"})
    assert [shard.name for shard in report.dataset.shards] == [path.stem for path in sorted(folder.glob("*.parquet"))]


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "output"])
def test_a_replaced_image_is_counted_and_overwriting_makes_it_anew(
    client: Client, photos: Path, pictures: list[bytes], tmp_path: Path, in_place: bool
) -> None:
    output = None if in_place else tmp_path / "out"
    folder = output or tmp_path / "photos_metadata"
    run(photos, output)
    before = files(folder)
    fill(photos, {"!.jpg": pictures[9], "0/6.jpg": pictures[14], "1/1.jpg": pictures[15]})
    with pytest.raises(UsageError, match=r"_0{9}-0{8}4\.parquet: .* changed since \(2 of 4, '0/6.jpg' is the first\)"):
        run(photos, output)
    assert files(folder) == before
    if in_place:
        report, _ = run(photos, output, overwrite=True)
        assert files(folder).keys() == {*before, "10-11"}
    else:
        min(folder.glob("*.parquet")).unlink()
        report, decoded = run(photos, output)
        assert decoded == 5 and files(folder).items() > {k: v for k, v in before.items() if k != "0-4"}.items()
    assert report.embedded == 10
    assert_rows(folder, photos)


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "output"])
def test_a_file_whose_images_are_all_gone_keeps_its_rows_until_it_is_made_anew(
    client: Client, photos: Path, tmp_path: Path, in_place: bool
) -> None:
    output = None if in_place else tmp_path / "out"
    folder = output or tmp_path / "photos_metadata"
    run(photos, output)
    gone = {"0/0.jpg", "0/3.jpg", "0/6.jpg", "1/1.jpg"}
    for name in gone:
        (photos / name).unlink()
    report, decoded = run(photos, output)
    assert (decoded, report.read, report.shards["skipped"]) == (0, 10, 3)
    assert report.notes == [f"{folder}: 4 rows are of images that are gone ('0/0.jpg', ...); finished files keep them"]
    assert_rows(folder, photos, gone)
    exported = opened(photos, metadata_path=str(folder))
    exported.metadata["keep"] = exported.metadata["image_error"].isnull()
    told = exported.to_webdataset(str(tmp_path / "export"), "keep", progress=False)
    assert (told.exported, told.no_image) == (5, 4)
    report, _ = run(photos, output, overwrite=True)
    assert (report.embedded, report.failed) == (5, 1)
    rows = table_rows(folder, "path")
    assert rows.keys() >= {"2/2.jpg", "1/bad.png"}
    # In place no row is ever removed; a new file is made from the images that there are.
    assert all(rows[name]["image_error"] == "no_image" for name in gone) if in_place else not gone & rows.keys()
    assert run(photos, output)[0].shards["skipped"] == 3


def test_a_last_file_of_images_that_cannot_be_read_is_finished(client: Client, photos: Path, tmp_path: Path) -> None:
    for name in ("z/1.jpg", "z/2.jpg"):
        (photos / name).parent.mkdir(exist_ok=True)
        (photos / name).symlink_to("nowhere")
    report, decoded = run(photos, tmp_path / "out", 10)
    assert (decoded, report.reasons) == (9, {"not_an_image": 1, "not_found": 2})
    assert run(photos, tmp_path / "out", 10)[0].shards["skipped"] == 2


def test_columns_that_are_added_later_follow_the_files(
    client: Client, photos: Path, pictures: list[bytes], tmp_path: Path
) -> None:
    run(photos, None)
    (photos / "0/0.jpg").unlink()
    fill(photos, {"!.jpg": pictures[9]})
    DECODED.clear()
    report = Counting("second")(Counting()(opened(photos))).save_metadata(progress=False)
    assert sorted(DECODED) == ["image_embedding", *["second"] * 9]
    assert (report.read, report.embedded, report.failed, report.no_image) == (11, 9, 1, 1)
    rows = table_rows(tmp_path / "photos_metadata", "path")
    assert rows["0/0.jpg"]["image_embedding"] is not None and rows["0/0.jpg"]["second"] is None
    for name in ("!.jpg", "2/8.jpg"):
        assert_embedded(rows[name], (photos / name).read_bytes())
        assert_embedded(rows[name], (photos / name).read_bytes(), "second")
    # The embeddings are of all images that are there; nothing is out of date.
    assert run(photos, None)[0].shards["skipped"] == 4


def test_plans_descriptions_and_frames_see_the_files(
    client: Client, photos: Path, pictures: list[bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run(photos, None), run(photos, out)
    fill(photos, {"!.jpg": pictures[9]})
    (photos / "0/0.jpg").unlink()
    plan = Counting()(opened(photos)).plan(str(out))
    assert (len(plan.shards), plan.todo, plan.rows, plan.conflicts()) == (4, [3], 1, [])
    dataset = opened(photos)
    told = describe_dataset(dataset, str(photos), "folder")
    assert (told.shards, told.tables, told.rows, told.images) == (4, 3, 10, 10)
    frame = Counting()(dataset).metadata.compute()
    assert sorted(frame["path"]) == sorted(
        {"0/0.jpg", *(path.relative_to(photos).as_posix() for path in photos.rglob("*.*"))}
    )


def test_a_trial_gives_way_to_the_whole(client: Client, photos: Path, pictures: list[bytes], tmp_path: Path) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    report, decoded = run(photos, out, limit=6)
    assert (decoded, files(out).keys()) == (6, {"0-4", "4-8"})
    run(photos, out), run(photos, whole)
    assert files(out) == files(whole)
    # A trial on a folder that has grown works on what its files have first.
    fill(photos, {"!.jpg": pictures[9]})
    report, decoded = run(photos, out, limit=6)
    assert (decoded, report.shards["skipped"]) == (0, 3)
    run(photos, out)
    assert_rows(out, photos)


def test_images_whose_rows_were_dropped_are_not_tried_again(
    client: Client, photos: Path, pictures: list[bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run(photos, out, on_error="drop")
    fill(photos, {"!.jpg": pictures[9]})
    report, decoded = run(photos, out, on_error="drop")
    assert (decoded, report.shards["skipped"]) == (1, 3)
    assert files(out).keys() == {"0-4", "4-8", "8-10", "10-11"}
    # Repaired, it is an image that nobody has looked at.
    fill(photos, {"1/bad.png": pictures[16]})
    report, decoded = run(photos, out, on_error="drop")
    assert decoded == 1 and "1/bad.png" in table_rows(out, "path")


def test_tables_are_carried_along_where_they_hold_the_same_images(
    client: Client, photos: Path, pictures: list[bytes], tmp_path: Path
) -> None:
    fill(photos, {"0/0.txt": b"first"})
    run(photos, None)
    fill(photos, {"!.jpg": pictures[9]})
    run(photos, None)
    # A new output is cut as the tables are, and copies their columns.
    out = tmp_path / "out"
    report, decoded = run(photos, out)
    assert decoded == 0 and files(out).keys() == {"0-4", "4-8", "8-10", "10-11"}
    assert table_rows(out, "path")["0/0.jpg"]["caption"] == "first"
    # An output that is cut otherwise keeps its files.
    shutil.rmtree(tmp_path / "photos_metadata")
    other = tmp_path / "other"
    run(photos, other, 3)
    run(photos, None, 6)
    before = files(other)
    fill(photos, {"!!.jpg": pictures[10]})
    report, decoded = run(photos, other)
    assert decoded == 1 and files(other) == before | {"11-12": files(other)["11-12"]}
    tables = tmp_path / "photos_metadata"
    told = f"the columns of 2 files in {tables} are not carried over: the files of {other} hold other images"
    assert told in report.notes
    assert_rows(other, photos)


def test_assigned_columns_need_the_files_that_they_were_made_for(
    client: Client, photos: Path, pictures: list[bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run(photos, out)
    fill(photos, {"!.jpg": pictures[9]})
    run(photos, out)
    dataset = Counting()(opened(photos))  # no tables of its own: cut by position
    dataset.metadata["length"] = dataset.metadata["path"].str.len()
    before = files(out)
    with pytest.raises(UsageError, match=rf"hold other images than the partitions.*metadata_path='{out}'"):
        dataset.save_metadata(str(out), progress=False)
    assert files(out) == before
    dataset = opened(photos, metadata_path=str(out))
    dataset.metadata["length"] = dataset.metadata["path"].str.len()
    dataset.save_metadata(progress=False)
    assert all(row["length"] == len(name) for name, row in table_rows(out, "path").items())


def test_new_tables_lie_in_the_folder_that_was_named(
    client: Client, photos: Path, pictures: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    run(photos, out)
    fill(photos, {"!.jpg": pictures[9]})
    monkeypatch.chdir(tmp_path)
    report = Counting()(opened(photos, metadata_path="out")).save_metadata(progress=False)
    assert report.embedded == 10 and not (tmp_path / "photos_metadata").exists()
    assert_rows(out, photos)


# -- what version 0.1.0 left behind --------------------------------------------------------


def as_0_1_0(folder: Path) -> None:
    """Take out of footers what that version did not write."""
    for path in folder.glob("*.parquet"):
        table = pq.read_table(path)
        footer = json.loads(table.schema.metadata[b"curator_embed"])
        footer |= {"format": 1, "marks": {}}
        metadata = {**table.schema.metadata, b"curator_embed": json.dumps(footer).encode()}
        pq.write_table(table.replace_schema_metadata(metadata), path)


def test_files_of_0_1_0_hold_while_their_images_are_the_same(
    client: Client, photos: Path, pictures: list[bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run(photos, out)
    as_0_1_0(out)
    fill(photos, {"!.jpg": pictures[9]})
    report, decoded = run(photos, out)
    assert (decoded, report.shards["skipped"]) == (1, 3)
    (photos / "0/0.jpg").unlink()
    with pytest.raises(UsageError, match=r"changed since \(some of them, or some are gone: it was not noted which\)"):
        run(photos, out)
    run(photos, out, overwrite=True)
    assert_rows(out, photos)


@pytest.mark.parametrize("removed", [0, 1])
def test_rows_that_are_there_twice_are_refused_until_one_file_is_removed(
    client: Client, photos: Path, pictures: list[bytes], tmp_path: Path, removed: int
) -> None:
    out, shifted = tmp_path / "out", tmp_path / "shifted"
    run(photos, out)
    fill(photos, {"!.jpg": pictures[9]})
    run(photos, shifted)
    for path in shifted.glob("*.parquet"):  # as overwriting did it: all but the last file are replaced
        shutil.copy(path, out)
    assert sorted(files(out)) == ["0-4", "4-8", "8-10", "8-11"]
    before = files(out)
    with pytest.raises(UsageError, match=r"both have a row for '2/5\.jpg' and 1 more\. .*Remove one") as refused:
        run(photos, out, overwrite=True)
    assert files(out) == before
    named = re.findall(r"(\S+\.parquet)", str(refused.value))
    assert len(named) == 2
    Path(named[removed]).unlink()
    run(photos, out)
    assert_rows(out, photos)


# -- files that stand in the way -----------------------------------------------------------


def test_files_of_another_dataset_are_refused(client: Client, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(photos, out)
    renamed = photos.rename(tmp_path / "pictures")
    before = files(out)
    with pytest.raises(UsageError, match=r"photos_0\S+ is not a file of the dataset 'pictures'.*dataset='photos'"):
        run(renamed, out)
    assert files(out) == before
    DECODED.clear()
    report = Counting()(opened(renamed, dataset="photos")).save_metadata(str(out), progress=False)
    assert (report.shards["skipped"], DECODED) == (3, [])
    pq.write_table(pa.table({"n": [1]}), out / "notes.parquet")
    with pytest.raises(UsageError, match=r"notes\.parquet: is not a file of the dataset .* Move it away") as refused:
        Counting()(opened(renamed, dataset="photos")).save_metadata(str(out), progress=False)
    assert "dataset=" not in str(refused.value)
    (out / "notes.parquet").rename(tmp_path / "notes.parquet")
    Counting()(opened(renamed, dataset="photos")).save_metadata(str(out), progress=False)


def test_a_file_whose_ids_cannot_be_read_is_named(client: Client, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(photos, out)
    first = min(out.glob("*.parquet"))
    for damage in (b"no parquet", None):
        if damage is None:
            pq.write_table(pa.table({"name": ["a"]}), first)
        else:
            first.write_bytes(damage)
        (photos / "0/0.jpg").rename(tmp_path / "0.jpg")  # three are left that no file knows: another name
        with pytest.raises(UsageError, match=rf"{first.name}: .*nobody knows which images.* remove it and run again"):
            run(photos, out)
        first.unlink()
        assert run(photos, out)[1] == 3
        assert_rows(out, photos)
        (tmp_path / "0.jpg").rename(photos / "0/0.jpg")
        shutil.rmtree(out)
        run(photos, out)


def test_a_folder_that_vanishes_is_no_folder_of_missing_images(photos: Path, tmp_path: Path) -> None:
    (shard,) = opened(photos, 20).shards
    photos.rename(tmp_path / "away")
    with pytest.raises(SourceError, match="photos: is no longer there"):
        list(shard.samples(id_col="path"))
