"""Path lists from end to end: runs, resuming, columns added later, export, and processes side by side."""

from __future__ import annotations

import json
import multiprocessing
import os
import tarfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from distributed import Client
from hypothesis import given
from hypothesis import strategies as st

from curator_embed.datasets import ImageTextPairDataset
from curator_embed.errors import UsageError
from curator_embed.execution.report import RunReport
from curator_embed.execution.run import RunStopped
from curator_embed.sources.path_list import cut_otherwise, range_name, range_of, to_fit
from curator_embed.storage.location import Location
from curator_embed.tables.bookkeeping import Bookkeeping
from curator_embed.tables.lock import OutputLock, OutputLocked, parts_overlap
from tests.shards import crops
from tests.stub import ColourEmbedder


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with Client(processes=False, n_workers=1, threads_per_worker=2, dashboard_address=None) as client:
        yield client


@pytest.fixture
def listing(tmp_path: Path, wheel_photos: list[Path]) -> Path:
    """23 lines: 20 crops of photographs in folders, one that is no image, an absent one, an empty line."""
    lines = []
    for number, image in enumerate(crops(wheel_photos[0], 20)):
        path = tmp_path / "images" / f"{number % 3}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
        lines.append(f"laion/{number % 3}/{number}.jpg")
    (tmp_path / "images" / "bad.jpg").write_bytes(b"<html>")
    lines[5:5] = ["laion/bad.jpg", "laion/gone.jpg", ""]
    (tmp_path / "list.txt").write_text("\n".join(lines) + "\n")
    return tmp_path / "list.txt"


def opened(listing: Path, **options: object) -> ImageTextPairDataset:
    return ImageTextPairDataset.from_path_list(
        listing, root=listing.parent / "images", dataset="laion", images_per_file=8, **options
    )


def test_every_line_is_a_row(client: Client, listing: Path, tmp_path: Path) -> None:
    report = ColourEmbedder()(opened(listing)).save_metadata(str(tmp_path / "out"), progress=False)
    assert (report.read, report.embedded, report.failed, report.no_image) == (23, 20, 2, 1)
    assert report.reasons == {"not_an_image": 1, "not_found": 1}
    names = sorted(path.name for path in (tmp_path / "out").glob("*.parquet"))
    assert names == [f"laion_{a:09d}-{b:09d}.parquet" for a, b in ((0, 8), (8, 16), (16, 23))]
    table = pq.read_table(tmp_path / "out" / names[0])
    assert table.column_names == ["path", "image_embedding", "image_error"]
    assert table["path"].to_pylist() == listing.read_text().split("\n")[:8]
    again = ColourEmbedder()(opened(listing)).save_metadata(str(tmp_path / "out"), progress=False)
    assert again.shards["skipped"] == 3 and again.read == 23


def test_a_wrong_root_is_no_output(client: Client, listing: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    wrong = ImageTextPairDataset.from_path_list(listing, root=tmp_path / "elsewhere", dataset="laion")
    with pytest.raises(
        RunStopped, match=r"not one of 22 images could be read or embedded, .*elsewhere/0/0\.jpg.*root="
    ):
        ColourEmbedder()(wrong).save_metadata(str(tmp_path / "out"), progress=False)
    assert not list((tmp_path / "out").glob("*.parquet"))


def test_another_root_is_told_and_the_same_one_is_not(client: Client, listing: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = ColourEmbedder()(opened(listing)).save_metadata(str(out), progress=False)
    assert first.images_below == str(tmp_path / "images") and first.notes == []
    assert ColourEmbedder()(opened(listing)).save_metadata(str(out), progress=False).notes == []
    before = {path.name: path.read_bytes() for path in out.glob("*.parquet")}
    (tmp_path / "images").rename(tmp_path / "moved")
    moved = ImageTextPairDataset.from_path_list(listing, tmp_path / "moved", "laion", images_per_file=8)
    again = ColourEmbedder()(moved).save_metadata(str(out), progress=False)
    assert again.shards["skipped"] == 3
    (note,) = again.notes
    assert f"below {tmp_path / 'images'}, this one below {tmp_path / 'moved'}. Finished files (3) are kept" in note
    # Elsewhere the same bytes: no file tells where its images were mounted.
    ColourEmbedder()(moved).save_metadata(str(tmp_path / "second"), progress=False)
    assert {path.name: path.read_bytes() for path in (tmp_path / "second").glob("*.parquet")} == before


def test_overwriting_looks_again_for_images_that_were_missing(client: Client, listing: Path, tmp_path: Path) -> None:
    out, gone = str(tmp_path / "out"), tmp_path / "images" / "gone.jpg"
    ColourEmbedder()(opened(listing)).save_metadata(out, progress=False)
    gone.write_bytes((tmp_path / "images" / "0" / "0.jpg").read_bytes())
    plain = ColourEmbedder()(opened(listing)).save_metadata(out, progress=False)
    assert plain.shards["skipped"] == 3 and plain.reasons["not_found"] == 1
    again = ColourEmbedder()(opened(listing)).save_metadata(out, progress=False, overwrite=True)
    assert (again.shards["done"], again.shards["skipped"]) == (3, 0)
    assert again.reasons == {"not_an_image": 1} and again.embedded == 21


def test_an_output_stays_done_when_the_list_gets_a_table(client: Client, listing: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    ColourEmbedder()(opened(listing)).save_metadata(out, progress=False)
    ColourEmbedder("second")(opened(listing)).save_metadata(progress=False)
    again = ColourEmbedder()(opened(listing)).save_metadata(out, progress=False)
    assert again.shards["skipped"] == 3
    report = ColourEmbedder()(opened(listing)).save_metadata(str(tmp_path / "new"), progress=False)
    assert report.notes[0] == f"the columns of {listing}_metadata are carried over; columns= chooses others"


def test_how_to_add_columns_to_an_output_is_said(client: Client, listing: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    ColourEmbedder()(opened(listing)).save_metadata(out, progress=False)
    more = ColourEmbedder("second")
    with pytest.raises(UsageError, match=f"without the new columns.*metadata_path=.{out}") as refused:
        more(opened(listing)).save_metadata(out, progress=False)
    assert "overwrite" not in str(refused.value)
    more(opened(listing, metadata_path=out)).save_metadata(progress=False)
    table = pq.read_table(sorted((tmp_path / "out").glob("*.parquet"))[0])
    assert table["second"].to_pylist() == table["image_embedding"].to_pylist()


def test_columns_are_added_later_and_rows_exported(client: Client, listing: Path, tmp_path: Path) -> None:
    ColourEmbedder()(opened(listing)).save_metadata(progress=False)
    folder = listing.parent / "list.txt_metadata"
    assert len(list(folder.glob("*.parquet"))) == 3
    dataset = ColourEmbedder("second")(opened(listing))
    dataset.save_metadata(progress=False)
    table = pq.read_table(sorted(folder.glob("*.parquet"))[0])
    assert table.column_names == ["path", "image_embedding", "image_error", "second"]
    assert table["second"].to_pylist() == table["image_embedding"].to_pylist()

    moved = opened(listing, metadata_path=str(folder))
    moved.metadata["keep"] = moved.metadata["image_error"].isnull()
    report = moved.to_webdataset(
        str(tmp_path / "export"), "keep", samples_per_shard=9, old_id_col="old", progress=False
    )
    assert report.exported == 20
    for path in (tmp_path / "export").glob("*.parquet"):
        lines = pq.read_table(path)["old"].to_pylist()
        with tarfile.open(path.with_suffix(".tar")) as archive:
            stored = [archive.extractfile(member).read() for member in archive]
        assert stored == [(listing.parent / "images" / x.removeprefix("laion/")).read_bytes() for x in lines]


def test_a_list_does_not_take_the_tables_of_the_folder_it_names(client: Client, listing: Path) -> None:
    folder = listing.parent / "images"
    named = listing.with_name("images.txt")
    named.write_text("".join(f"images/{path.relative_to(folder)}\n" for path in sorted(folder.rglob("*.jpg"))))
    ColourEmbedder()(ImageTextPairDataset.from_folder(folder)).save_metadata(progress=False)
    report = ColourEmbedder()(ImageTextPairDataset.from_path_list(named, root=folder)).save_metadata(progress=False)
    assert (report.embedded, report.shards["done"]) == (20, 1)
    (table,) = (pq.read_table(path) for path in (listing.parent / "images.txt_metadata").glob("*.parquet"))
    assert table["path"].to_pylist() == named.read_text().splitlines()


def test_rows_are_never_written_twice_under_other_names(client: Client, listing: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ColourEmbedder()(opened(listing)).save_metadata(str(out), progress=False)
    before = {path.name: path.read_bytes() for path in out.glob("*.parquet")}
    listing.write_text(listing.read_text() + "laion/0/0.jpg\n")
    grown = ColourEmbedder()(opened(listing))
    assert [Path(one.path).name for one in grown.plan(str(out)).conflicts()] == ["laion_000000016-000000023.parquet"]
    with pytest.raises(UsageError, match=r"000000016-000000023\.parquet: already .* start_line=23 ") as refused:
        grown.save_metadata(str(out), progress=False, overwrite=True)
    assert "overwrite" not in str(refused.value)
    assert {path.name: path.read_bytes() for path in out.glob("*.parquet")} == before
    ColourEmbedder()(opened(listing, start_line=23)).save_metadata(str(out), progress=False)
    assert (out / "laion_000000023-000000024.parquet").is_file()
    assert {path.name: path.read_bytes() for path in out.glob("*.parquet")}.items() > before.items()


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "output"])
def test_a_list_that_is_cut_otherwise_is_refused_with_a_way_out(
    client: Client, listing: Path, tmp_path: Path, in_place: bool
) -> None:
    out = None if in_place else str(tmp_path / "out")

    def run(**options: object) -> RunReport:
        options = {"root": tmp_path / "images", "dataset": "laion", "images_per_file": 8, **options}
        dataset = ColourEmbedder()(ImageTextPairDataset.from_path_list(listing, **options))
        return dataset.save_metadata(out, progress=False)

    folder = Path(out or f"{listing}_metadata")
    run()
    with pytest.raises(UsageError, match=r"000-0{8}8\.parquet: already .* \(2 more .* images_per_file=8, as when"):
        run(images_per_file=5)
    assert run(images_per_file=8).shards["skipped"] == 3
    # Some of the files of a longer list, and then another cut.
    listing.write_text(listing.read_text() + "laion/0/0.jpg\n")
    min(folder.glob("*.parquet")).unlink()
    with pytest.raises(UsageError, match=r"16-0{7}23\.parquet: already .* Remove it and run again, or") as refused:
        run()
    Path(str(refused.value).partition(": ")[0]).unlink()
    assert run().read == 24
    assert len({row for path in folder.glob("*.parquet") for row in pq.read_table(path)["path"].to_pylist()}) == 23


def test_new_tables_of_a_list_lie_in_the_folder_that_was_named(client: Client, listing: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ColourEmbedder()(opened(listing, end_line=16)).save_metadata(str(out), progress=False)
    report = ColourEmbedder()(opened(listing, metadata_path=str(out))).save_metadata(progress=False)
    assert (report.shards["skipped"], report.shards["done"], report.notes) == (2, 1, [])
    assert len(list(out.glob("*.parquet"))) == 3 and not Path(f"{listing}_metadata").exists()


@given(st.integers(0, 12), st.integers(1, 9), st.integers(0, 12), st.integers(1, 9), st.integers(1, 30), st.data())
def test_the_way_out_of_another_cut_leads_out(
    start: int, per_file: int, before: int, wide: int, length: int, data: st.DataObject
) -> None:
    def cut(first: int, width: int, end: int) -> list[str]:
        return [range_name("a", at, min(at + width, end)) for at in range(first, end, width)]

    written = cut(before, wide, data.draw(st.integers(before + 1, before + 30)))
    there = [name for name in written if data.draw(st.booleans())]
    own = cut(start, per_file, start + length)
    others = cut_otherwise(there, own)
    if not others:
        return
    said = to_fit(there, own)
    if "start_line=" in said:
        first = int(said.partition("start_line=")[2].split()[0])
        assert start < first < start + length
        assert not cut_otherwise(there, cut(first, per_file, start + length))
        covered = {line for name in own[:-1] + others for line in range(*range_of(name)[1:])}
        assert set(range(start, first)) <= covered, "no line is left out"
    elif "images_per_file=" in said:
        width = int(said.partition("images_per_file=")[2].partition(",")[0])
        assert not cut_otherwise(there, cut(start, width, start + length))
    else:
        assert not cut_otherwise([name for name in there if name not in others], own)


@given(st.lists(st.integers(0, 30), min_size=2, unique=True), st.lists(st.integers(0, 30), min_size=2, unique=True))
def test_ranges_that_share_lines_are_found(one: list[int], other: list[int]) -> None:
    def cut(at: list[int]) -> list[tuple[int, int]]:
        return list(pairwise(sorted(at)))

    own, there = cut(one), cut(other)
    lines = set(range(own[0][0], own[-1][1]))
    expected = [r for r in there if r not in own and lines & set(range(*r))]
    names = [*(range_name("a_1-2", *r) for r in there), range_name("b", *own[0]), "a_1-2", "a_1-2_5-9"]
    assert cut_otherwise(names, [range_name("a_1-2", *r) for r in own]) == [range_name("a_1-2", *r) for r in expected]


def _part(listing: Path, out: str, start: int, end: int | None) -> None:
    os.environ["PYTHONWARNINGS"] = "ignore"
    with Client(processes=False, n_workers=1, threads_per_worker=1, dashboard_address=None):
        dataset = opened(listing, start_line=start, end_line=end)
        ColourEmbedder()(dataset).save_metadata(out, progress=False)


def test_line_ranges_side_by_side_write_what_one_process_does(client: Client, listing: Path, tmp_path: Path) -> None:
    ColourEmbedder()(opened(listing)).save_metadata(str(tmp_path / "one"), progress=False)
    context = multiprocessing.get_context("spawn")
    runs = [context.Process(target=_part, args=(listing, str(tmp_path / "two"), *r)) for r in ((0, 16), (16, None))]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert [run.exitcode for run in runs] == [0, 0]
    one, two = (sorted((tmp_path / name).glob("*.parquet")) for name in ("one", "two"))
    assert [p.name for p in one] == [p.name for p in two]
    assert [p.read_bytes() for p in one] == [p.read_bytes() for p in two]


def test_parts_hold_one_folder_together_unless_they_overlap(tmp_path: Path) -> None:
    for folder in map(Bookkeeping.of, (Location.of(str(tmp_path / "out")), Location.of("memory://parts/out"))):
        with (
            OutputLock(folder, "laion_000-100"),
            OutputLock(folder, "laion_100-200"),
            OutputLock(folder, "coyo_000-100"),
        ):
            for part in ("laion_050-150", "laion_000-100", ""):
                with pytest.raises(OutputLocked):
                    OutputLock(folder, part).__enter__()
        with OutputLock(folder), pytest.raises(OutputLocked):
            OutputLock(folder, "laion_000-100").__enter__()
        with OutputLock(folder, "laion_050-150"):
            pass
    assert parts_overlap("a_0-10", "a_9-12") and not parts_overlap("a_0-10", "a_10-12")


def test_temporaries_of_other_parts_are_left_alone(client: Client, listing: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    other = out / "laion_000000016-000000023.parquet.tmp-1-abcd"
    mine = out / "laion_000000000-000000008.parquet.tmp-1-abcd"
    other.touch(), mine.touch()
    ColourEmbedder()(opened(listing, end_line=16)).save_metadata(str(out), progress=False)
    assert other.exists() and not mine.exists()


def test_secrets_stay_out_of_what_is_written(client: Client, listing: Path, tmp_path: Path) -> None:
    dataset = opened(listing, storage_options={"key": "AKIDHUNTER", "secret": "hunter2"})
    report = ColourEmbedder()(dataset).save_metadata(str(tmp_path / "out"), progress=False)
    written = b"".join(p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert b"hunter2" not in written and b"AKIDHUNTER" not in written
    assert "hunter2" not in json.dumps(report.to_dict()) + repr(dataset) + repr(report)


def test_a_missing_metadata_folder_is_said(listing: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        opened(listing, metadata_path=str(listing.parent / "nowhere"))
