"""What happens at the second run: another setting, a changed input, a killed run. Never silently the wrong values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curator_embed.datasets import ImageTextPairDataset
from curator_embed.datasets.describing import describe_dataset
from curator_embed.errors import UsageError
from curator_embed.execution.run import RunStopped
from curator_embed.tables.provenance import FOOTER_KEY, Footer
from tests.rows import assert_embedded, table_rows, tar_images
from tests.shards import crops, write_dataset, write_tar
from tests.stub import ColourEmbedder


def opened(folder: Path, **options: Any) -> ImageTextPairDataset:
    return ImageTextPairDataset.from_webdataset(str(folder), **options)


def save(dataset: ImageTextPairDataset, path: Path | None = None, **options: Any) -> Any:
    return dataset.save_metadata(None if path is None else str(path), progress=False, **options)


def embed(
    folder: Path, path: Path | None = None, column: str = "image_embedding", version: int = 1, **options: Any
) -> Any:
    return save(ColourEmbedder(column, version=version)(opened(folder)), path, **options)


@pytest.fixture
def source(tmp_path: Path, wheel_photos: list[Path]) -> Path:
    return write_dataset(tmp_path / "in", wheel_photos, shards=2, samples=4, missing=1, bad={(0, 1): b"<html>"})


def all_embedded(folder: Path, images: dict[str, bytes], id_col: str = "key") -> None:
    """Every row has the vector of its own image."""
    rows = table_rows(folder, id_col)
    for key, encoded in images.items():
        assert_embedded(rows[key], encoded)


# -- how rows and images are paired --------------------------------------------------------


@pytest.fixture
def two_ids(tmp_path: Path, wheel_photos: list[Path]) -> tuple[Path, dict[str, bytes]]:
    """A tar whose json has another id, and a table with both."""
    folder, images = tmp_path / "ids", crops(wheel_photos[0], 4)
    folder.mkdir()
    members = []
    for number, image in enumerate(images):
        members += [(f"{number}.jpg", image), (f"{number}.json", json.dumps({"uid": f"u{number}"}).encode())]
    write_tar(folder / "0.tar", members)
    keys = [str(number) for number in range(4)]
    # The column "key" is of somebody else's numbering: the same ids, in another order.
    table = pa.table({"key": keys[::-1], "uid": [f"u{number}" for number in range(4)]})
    pq.write_table(table, folder / "0.parquet")
    return folder, {f"u{number}": image for number, image in enumerate(images)}


@pytest.mark.parametrize("in_place", [True, False])
def test_another_id_column_is_not_skipped_as_done(
    two_ids: tuple[Path, dict[str, bytes]], tmp_path: Path, in_place: bool
) -> None:
    folder, images = two_ids
    output = None if in_place else tmp_path / "out"
    save(ColourEmbedder()(opened(folder)), output)
    with pytest.raises(UsageError, match=r"paired another way \(id_col: 'key' there, 'uid' now\).*overwrite=True"):
        save(ColourEmbedder()(opened(folder, id_col="uid")), output)
    report = save(ColourEmbedder()(opened(folder, id_col="uid")), output, overwrite=True)
    assert report.shards["done"] == 1
    all_embedded(output or folder, images, "uid")


def test_another_key_rule_is_not_skipped_as_done(tmp_path: Path, wheel_photos: list[Path]) -> None:
    folder, images = tmp_path / "keys", crops(wheel_photos[0], 2)
    folder.mkdir()
    write_tar(folder / "0.tar", [("a.1.jpg", images[0]), ("a.2.jpg", images[1])])
    pq.write_table(pa.table({"key": ["a", "a.1", "a.2"]}), folder / "0.parquet")
    save(ColourEmbedder()(opened(folder, key_split="first")))
    with pytest.raises(UsageError, match="paired another way"):
        save(ColourEmbedder()(opened(folder, key_split="last")))
    save(ColourEmbedder()(opened(folder, key_split="last")), overwrite=True)
    all_embedded(folder, {"a.1": images[0], "a.2": images[1]})


def test_index_files_on_and_then_off(tmp_path: Path, wheel_photos: list[Path]) -> None:
    from curator_embed.sources.webdataset import index_tars

    folder = write_dataset(tmp_path / "in", wheel_photos, shards=1, samples=4, missing=0)
    [index] = index_tars(str(folder))
    first, *entries = Path(index).read_text().splitlines()
    Path(index).write_text("\n".join([first.rpartition(" ")[0] + " 2", *entries[:2]]) + "\n")
    limited = save(ColourEmbedder()(opened(folder, use_index_files=True)))
    assert limited.embedded == 2
    with pytest.raises(UsageError, match="paired another way"):
        save(ColourEmbedder()(opened(folder)))
    assert save(ColourEmbedder()(opened(folder)), overwrite=True).embedded == 4
    all_embedded(folder, tar_images(folder))


@pytest.mark.parametrize("in_place", [True, False])
def test_another_image_column_is_not_skipped_as_done(tmp_path: Path, wheel_photos: list[Path], in_place: bool) -> None:
    images = crops(wheel_photos[0], 6)
    folder, output = tmp_path / "in", None if in_place else tmp_path / "out"
    folder.mkdir()
    pq.write_table(pa.table({"key": list("abc"), "one": images[:3], "two": images[3:]}), folder / "0.parquet")
    save(ColourEmbedder()(ImageTextPairDataset.from_parquet(folder, image_col="one")), output)
    other = ColourEmbedder()(ImageTextPairDataset.from_parquet(folder, image_col="two"))
    with pytest.raises(UsageError, match=r"image_col: 'one' there, 'two' now"):
        save(other, output)
    save(other, output, overwrite=True)
    all_embedded(output or folder, dict(zip("abc", images[3:], strict=True)))


def test_parts_of_a_list_made_on_machines_with_other_cores_are_finished_together(
    tmp_path: Path, wheel_photos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "photos").mkdir()
    for number, image in enumerate(crops(wheel_photos[0], 6)):
        (tmp_path / "photos" / f"{number}.jpg").write_bytes(image)
    (tmp_path / "list.txt").write_text("".join(f"{number}.jpg\n" for number in range(6)))

    def part(start: int, end: int) -> Any:
        lines = (tmp_path / "list.txt", tmp_path / "photos", None, start, end, 2)
        return save(ColourEmbedder()(ImageTextPairDataset.from_path_list(*lines)), tmp_path / "out")

    for cores, lines in ((2, (0, 2)), (3, (2, 4))):
        monkeypatch.setattr("curator_embed.execution.run.cores_per_worker", lambda client, cores=cores: cores)
        part(*lines)
    report = part(0, 6)
    assert (report.shards["skipped"], report.shards["done"], report.embedded) == (2, 1, 6)
    made = [Footer.of(pq.read_schema(path)).columns["image_embedding"] for path in sorted((tmp_path / "out").iterdir())]
    assert [entry.recipe["threads"] for entry in made] == [2, 3, 2], "written down, and the first one's taken over"


# -- overwriting ---------------------------------------------------------------------------


def swap_ids(path: Path) -> None:
    """Exchange the first two ids, as somebody who edits a table may; all else and our footer stay."""
    table = pq.read_table(path)
    keys = table["key"].to_pylist()
    keys[:2] = keys[1::-1]
    place = table.column_names.index("key")
    pq.write_table(table.set_column(place, table.schema.field("key"), pa.array(keys)), path)


def test_overwriting_pairs_changed_ids_anew(source: Path) -> None:
    images = {k: v for k, v in tar_images(source).items() if v != b"<html>"}
    embed(source)
    swap_ids(source / "00000.parquet")
    report = embed(source, overwrite=True)
    assert report.shards["done"] == 2
    all_embedded(source, images)


def test_changed_ids_are_found_as_soon_as_ids_are_read(source: Path) -> None:
    embed(source)
    swap_ids(source / "00000.parquet")
    second = ColourEmbedder("second")(ColourEmbedder()(opened(source)))
    with pytest.raises(RunStopped, match=r"00000\.parquet: column 'image_embedding' was made for other ids.*overwrite"):
        save(second)
    save(second, overwrite=True)
    all_embedded(source, {k: v for k, v in tar_images(source).items() if v != b"<html>"})


def test_info_finds_permuted_ids_where_it_reads_them(source: Path) -> None:
    embed(source)
    assert describe_dataset(opened(source), "in", "webdataset", verify=True).outdated == {}
    swap_ids(source / "00000.parquet")
    assert describe_dataset(opened(source), "in", "webdataset").outdated == {}, "footers do not show it"
    found = describe_dataset(opened(source), "in", "webdataset", verify=True)
    assert found.outdated["image_embedding"] == [
        {"why": "was made for other ids, or for the same ids in another order", "files": 1}
    ]
    assert "out of date in 1 file: was made for other ids" in str(found)
    write_tar(source / "00001.tar", [("000010000.jpg", tar_images(source)["000010000"])])
    assert "images that have changed since" in str(describe_dataset(opened(source), "in", "webdataset"))


def test_overwriting_looks_again_for_images_in_place(tmp_path: Path, wheel_photos: list[Path]) -> None:
    images = crops(wheel_photos[0], 3)
    (tmp_path / "photos").mkdir()
    for name, image in zip("ab", images, strict=False):
        (tmp_path / "photos" / f"{name}.jpg").write_bytes(image)
    (tmp_path / "list.txt").write_text("a.jpg\nb.jpg\nc.jpg\n")

    def listed() -> ImageTextPairDataset:
        dataset = ImageTextPairDataset.from_path_list(tmp_path / "list.txt", tmp_path / "photos")
        return ColourEmbedder()(dataset)

    assert save(listed()).reasons == {"not_found": 1}
    (tmp_path / "photos" / "c.jpg").write_bytes(images[2])
    assert save(listed()).shards["skipped"] == 1
    assert save(listed(), overwrite=True).embedded == 3


def test_an_output_that_had_columns_added_is_resumed_by_its_first_command(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    embed(source, out)
    save(ColourEmbedder("second")(opened(source, metadata_path=str(out))))
    assert embed(source, out).shards["skipped"] == 2
    (out / "00001.parquet").unlink()
    report = embed(source, out)
    assert (report.shards["skipped"], report.shards["done"]) == (1, 1)
    assert "second" in pq.read_schema(out / "00000.parquet").names


def test_overwriting_an_output_keeps_the_columns_that_were_added_to_it(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    embed(source, out)
    save(ColourEmbedder("second")(opened(source, metadata_path=str(out))))
    before = {key: row["second"] for key, row in table_rows(out).items()}
    embed(source, out, version=2, overwrite=True)
    after = table_rows(out)
    assert {key: row["second"] for key, row in after.items()} == before
    made = Footer.of(pq.read_schema(out / "00000.parquet")).columns
    assert made["image_embedding"].recipe["model"] == "v2" and made["second"].recipe["model"] == "v1"
    again = save(ColourEmbedder("second")(opened(source, metadata_path=str(out))))
    assert again.shards["skipped"] == 2, "still up to date"


def test_a_second_model_goes_into_a_new_folder(source: Path, tmp_path: Path) -> None:
    embed(source)
    report = embed(source, tmp_path / "out", version=2)
    assert report.shards["done"] == 2 and any("of another run" in note for note in report.notes)
    made = Footer.of(pq.read_schema(tmp_path / "out" / "00000.parquet")).columns
    assert made["image_embedding"].recipe["model"] == "v2"


def test_a_column_that_does_not_say_what_made_it_is_not_replaced_in_a_new_folder_either(
    source: Path, tmp_path: Path
) -> None:
    path = source / "00000.parquet"
    table = pq.read_table(path)
    pq.write_table(table.append_column("image_embedding", pa.array(["mine"] * len(table))), path)
    with pytest.raises(UsageError, match="does not say what made it"):
        embed(source, tmp_path / "out")
    assert embed(source, tmp_path / "out", column="other").shards["done"] == 2
    assert table_rows(tmp_path / "out")["000000000"]["image_embedding"] == "mine"


def test_rows_that_were_dropped_do_not_make_a_finished_output_unfinished(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = embed(source, out, on_error="drop")
    assert (report.read, report.embedded, report.failed, report.no_image) == (10, 7, 1, 2)
    more = save(ColourEmbedder("second")(opened(source, metadata_path=str(out))))
    assert (more.read, more.embedded) == (7, 7)
    assert save(ColourEmbedder("second")(opened(source, metadata_path=str(out)))).shards["skipped"] == 2
    again = embed(source, out, on_error="drop")
    assert (again.shards["skipped"], again.read, again.failed, again.no_image) == (2, 10, 1, 2)


# -- inputs that change --------------------------------------------------------------------


class Meddling(ColourEmbedder):
    """While it prepares its first image, somebody replaces the table that the output is made from."""

    def __init__(self, table: Path) -> None:
        super().__init__()
        self.table = table

    def settled(self, settings: Any, *, images: int | None = None) -> Meddling:
        return self

    def prepare(self, image: Any) -> Any:
        if not self.table.with_suffix(".done").exists():
            self.table.with_suffix(".done").touch()
            old = pq.read_table(self.table)
            pq.write_table(old.take(pa.array(range(len(old))[::-1])), self.table)
        return super().prepare(image)


def test_a_table_that_is_replaced_during_the_run_is_no_ground_for_an_output(
    tmp_path: Path, wheel_photos: list[Path]
) -> None:
    folder = write_dataset(tmp_path / "in", wheel_photos, shards=1, samples=4, missing=0)
    with pytest.raises(RunStopped, match=r"in/00000\.parquet: the file was changed by someone else during the run"):
        save(Meddling(folder / "00000.parquet")(opened(folder)), tmp_path / "out")
    assert not (tmp_path / "out" / "00000.parquet").exists()
    assert save(Meddling(folder / "00000.parquet")(opened(folder)), tmp_path / "out").embedded == 4
    all_embedded(tmp_path / "out", tar_images(folder))


def test_a_table_that_has_changed_since_is_told_or_refused(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    embed(source, out)
    path = source / "00000.parquet"
    table = pq.read_table(path)
    place = table.column_names.index("caption")
    pq.write_table(table.set_column(place, "caption", pa.array(["new"] * len(table))), path)
    report = embed(source, out)
    assert report.shards["skipped"] == 2 and any("has changed since" in note for note in report.notes)
    embed(source, out, overwrite=True)
    assert table_rows(out)["000000000"]["caption"] == "new"
    swap_ids(path)
    with pytest.raises(UsageError, match=r"its ids have changed.*overwrite=True"):
        embed(source, out)
    embed(source, out, overwrite=True)
    all_embedded(out, {k: v for k, v in tar_images(source).items() if v != b"<html>"})


def test_tables_alone_are_not_emptied(source: Path, tmp_path: Path) -> None:
    embed(source)
    tars = tmp_path / "tars"
    tars.mkdir()
    before = table_rows(source)
    for tar in source.glob("*.tar"):
        tar.rename(tars / tar.name)
    for options in ({}, {"overwrite": True}, {"column": "second"}, {"column": "second", "overwrite": True}):
        with pytest.raises(UsageError, match=r"there are no images beside it.*metadata_path="):
            embed(source, **options)  # type: ignore[arg-type]
    assert table_rows(source) == before
    again = save(ColourEmbedder("second")(opened(tars, metadata_path=str(source))))
    assert again.embedded == 7, "the way that the message names"


def test_one_shard_whose_tar_is_gone_keeps_its_columns_and_codes(source: Path) -> None:
    embed(source)
    before = table_rows(source)
    (source / "00000.tar").unlink()
    for options in ({}, {"overwrite": True}):
        with pytest.raises(UsageError, match=r"00000\.parquet: has columns made from images that are no longer there"):
            embed(source, column="second", **options)
    assert table_rows(source) == before


# -- odd tables ----------------------------------------------------------------------------


def test_an_image_without_a_row_is_counted_where_a_column_takes_no_nulls(
    tmp_path: Path, wheel_photos: list[Path]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    write_tar(
        folder / "0.tar", [(f"{k}.jpg", image) for k, image in zip("abc", crops(wheel_photos[0], 3), strict=True)]
    )
    schema = pa.schema([pa.field("key", pa.string()), pa.field("label", pa.int32(), nullable=False)])
    pq.write_table(pa.table({"key": ["a", "b"], "label": [1, 2]}, schema=schema), folder / "0.parquet")
    report = embed(folder, tmp_path / "out")
    assert (report.read, report.embedded, report.images_without_row) == (2, 2, 1)
    assert any("'label' takes no nulls" in note for note in report.notes)
    assert not pq.read_schema(tmp_path / "out" / "0.parquet").field("label").nullable
    assert embed(folder, tmp_path / "without", columns=[]).read == 3, "the way that the note names"


@pytest.mark.parametrize("raw", [b'{"format": 2, "columns": []}', b'{"format": 1, "columns": {"a": {"samples": 3}}}'])
def test_a_footer_of_wrong_types_ends_no_run(source: Path, tmp_path: Path, raw: bytes) -> None:
    path = source / "00000.parquet"
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({FOOTER_KEY: raw}), path)
    assert embed(source, tmp_path / "out").shards["done"] == 2
    assert embed(source).shards["done"] == 2


def test_a_key_of_thousands_of_digits_costs_its_row_alone(tmp_path: Path, wheel_photos: list[Path]) -> None:
    folder, images = tmp_path / "in", crops(wheel_photos[0], 2)
    folder.mkdir()
    long = json.dumps({"uid": "9" * 4301}).encode()
    write_tar(
        folder / "0.tar", [("a.jpg", images[0]), ("a.json", long), ("b.jpg", images[1]), ("b.json", b'{"uid": 7}')]
    )
    pq.write_table(pa.table({"uid": pa.array([7, 8], pa.int64())}), folder / "0.parquet")
    report = save(ColourEmbedder()(opened(folder, id_col="uid")))
    assert (report.read, report.embedded, report.no_image, report.images_without_row) == (2, 1, 1, 1)


def test_a_json_field_of_the_new_columns_name_is_not_replaced_unasked(tmp_path: Path, wheel_photos: list[Path]) -> None:
    folder, image = tmp_path / "in", crops(wheel_photos[0], 1)[0]
    folder.mkdir()
    write_tar(folder / "0.tar", [("a.jpg", image), ("a.json", b'{"image_embedding": "mine"}')])
    with pytest.raises(RunStopped, match=r"0\.tar: its json holds a field 'image_embedding'"):
        embed(folder, tmp_path / "out")
    assert embed(folder, tmp_path / "out", column="other").embedded == 1
    assert table_rows(tmp_path / "out")["a"]["image_embedding"] == "mine"
    assert embed(folder, tmp_path / "anew", overwrite=True).embedded == 1


class Growing(ColourEmbedder):
    """Gives longer vectors once a file is there: what a model of one's own may do between two runs."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def settled(self, settings: Any, *, images: int | None = None) -> Growing:
        return self

    def recipe(self) -> dict[str, Any]:
        return {"step": "growing"}

    def prepare(self, image: Any) -> Any:
        return np.asarray(image.rgb.resize((self.size, 8)))


def test_vectors_of_another_length_do_not_join_those_of_finished_shards(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    save(Growing(8)(opened(source)), out)
    assert Footer.of(pq.read_schema(out / "00000.parquet")).columns["image_embedding"].dimension == 192
    (out / "00001.parquet").unlink()
    with pytest.raises(RunStopped, match=r"vectors of \[96\] numbers, and finished shards hold vectors of 192"):
        save(Growing(4)(opened(source)), out)
    save(Growing(4)(opened(source)), out, overwrite=True)
    assert {len(row["image_embedding"]) for row in table_rows(out).values() if row["image_embedding"]} == {96}


# -- what is left beside the output --------------------------------------------------------


def test_a_report_that_cannot_be_kept_is_told(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from curator_embed.tables.bookkeeping import Bookkeeping

    def full(self: Bookkeeping, name: str, content: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Bookkeeping, "write", full)
    report = embed(source, tmp_path / "out")
    assert report.embedded == 7 and any("No space left on device" in note for note in report.notes)


def test_a_path_that_is_no_utf8_ends_in_a_report(tmp_path: Path, wheel_photos: list[Path]) -> None:
    folder = Path(f"{tmp_path}/caf\udce9")
    folder.mkdir()
    write_tar(folder / "0.tar", [("a.jpg", crops(wheel_photos[0], 1)[0])])
    report = embed(folder, Path(f"{tmp_path}/out\udce9"))
    assert report.embedded == 1
    [kept] = Path(f"{tmp_path}/out\udce9.curator_embed").glob("report-*.json")
    assert json.loads(kept.read_bytes())["embedded"] == 1


def test_a_refused_run_leaves_no_folder(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        save(ColourEmbedder()(opened(source)), tmp_path / "a" / "out", columns=["no such column"])
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("reader", ["pandas", "polars", "duckdb", "dask", "datasets", "pyarrow"])
def test_every_reader_takes_the_folder_itself(source: Path, tmp_path: Path, reader: str) -> None:
    out = tmp_path / "out"
    embed(source, out)
    assert sorted(path.name for path in out.iterdir()) == ["00000.parquet", "00001.parquet"]
    if reader == "pandas":
        import pandas as pd

        rows = len(pd.read_parquet(out))
    elif reader == "polars":
        import polars as pl

        rows = pl.scan_parquet(out).select(pl.len()).collect().item()
    elif reader == "duckdb":
        import duckdb

        rows = duckdb.sql(f"select count(*) from read_parquet('{out}')").fetchall()[0][0]
    elif reader == "dask":
        import dask.dataframe as dd

        rows = len(dd.read_parquet(out))
    elif reader == "datasets":
        import datasets

        rows = datasets.load_dataset(str(out), cache_dir=str(tmp_path / "cache"))["train"].num_rows
    else:
        rows = pq.read_table(out).num_rows
    assert rows == 10


# -- what cannot be written back as it was -------------------------------------------------


def test_a_table_that_cannot_be_copied_is_refused_before_anything_is_written_and_the_remedy_works(
    source: Path, tmp_path: Path
) -> None:
    from tests.tables.test_fidelity import elsewhere

    elsewhere(source / "00001.parquet")  # a column whose bytes lie in another file
    before = {p.name: p.read_bytes() for p in source.glob("*.parquet")}
    for options in ({}, {"overwrite": True}):
        with pytest.raises(UsageError, match=r"00001\.parquet: column 'far' cannot be copied.*columns=\["):
            embed(source, **options)  # type: ignore[arg-type]
    assert {p.name: p.read_bytes() for p in source.glob("*.parquet")} == before
    assert embed(source, tmp_path / "out", columns=[]).shards["done"] == 2


# -- what a reviewer found: each wrong without a word before -------------------------------


def test_an_overwriting_run_does_not_take_another_runs_files_for_its_own(
    source: Path, wheel_photos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    embed(source)
    before = table_rows(source)
    for number in range(2):
        members = [(f"{number:05d}{n:04d}.jpg", image) for n, image in enumerate(crops(wheel_photos[2], 4))]
        write_tar(source / f"{number:05d}.tar", members)
    monkeypatch.setattr("curator_embed.tables.overwriting.Overwriting.end", lambda self: None)  # as if it was killed
    embed(source, overwrite=True)
    monkeypatch.undo()
    swap = table_rows(source)
    assert swap != before
    embed(source, column="b")  # touches every file
    assert not list(source.with_name("in.curator_embed").glob("overwriting*.json"))
    assert embed(source, overwrite=True).shards["done"] == 2


def test_an_overwriting_run_that_goes_on_says_so(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embed(source)
    monkeypatch.setattr("curator_embed.tables.overwriting.Overwriting.end", lambda self: None)
    embed(source, overwrite=True)
    monkeypatch.undo()
    report = embed(source, overwrite=True)
    assert any("goes on with the overwriting run of" in note and "2 files" in note for note in report.notes)


class Touching(Meddling):
    """Somebody touches the table, whose rows stay as they are."""

    def prepare(self, image: Any) -> Any:
        if not self.table.with_suffix(".done").exists():
            self.table.with_suffix(".done").touch()
            self.table.touch()
        return ColourEmbedder.prepare(self, image)


def test_overwriting_while_the_input_is_touched_is_no_success(tmp_path: Path, wheel_photos: list[Path]) -> None:
    folder = write_dataset(tmp_path / "in", wheel_photos, shards=1, samples=4, missing=0)
    table = folder / "00000.parquet"
    table.with_suffix(".done").touch()
    save(Touching(table)(opened(folder)), tmp_path / "out")
    table.with_suffix(".done").unlink()
    with pytest.raises(RunStopped, match=r"in/00000\.parquet: the file was changed by someone else"):
        save(Touching(table)(opened(folder)), tmp_path / "out", overwrite=True)
    assert save(Touching(table)(opened(folder)), tmp_path / "out", overwrite=True).shards["done"] == 1


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_whose_images_are_gone_is_not_emptied(source: Path, tmp_path: Path, overwrite: bool) -> None:
    embed(source, tmp_path / "out")
    before = table_rows(tmp_path / "out")
    (source / "00000.tar").unlink()
    with pytest.raises(UsageError, match=r"images that are no longer there.*Restore the images"):
        embed(source, tmp_path / "out", overwrite=overwrite)
    assert table_rows(tmp_path / "out") == before


def test_tables_alone_make_no_output_of_nulls(source: Path, tmp_path: Path) -> None:
    for tar in source.glob("*.tar"):
        tar.unlink()
    with pytest.raises(UsageError, match="there are no images beside it"):
        embed(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("assigned", [False, True])
def test_rows_added_under_our_footer_are_not_healed_by_the_next_column(source: Path, assigned: bool) -> None:
    embed(source)
    path = source / "00000.parquet"
    table = pq.read_table(path)
    more = table.slice(0, 1).set_column(table.column_names.index("key"), "key", pa.array(["stranger"]))
    more = more.set_column(table.column_names.index("image_embedding"), "image_embedding",
                           pa.nulls(1, table.schema.field("image_embedding").type))  # fmt: skip
    pq.write_table(pa.concat_tables([table, more.cast(table.schema)]), path)
    if assigned:
        dataset = opened(source)
        dataset.metadata["half"] = dataset.metadata["width"] // 2
        save(dataset)
        assert embed(source).shards["done"] == 1, "the rows are worked on"
    else:
        save(ColourEmbedder("b")(opened(source)))
        with pytest.raises(UsageError, match=r"other ids.*overwrite=True"):
            embed(source)


def test_codes_go_with_the_columns_that_they_explain(tmp_path: Path, wheel_photos: list[Path]) -> None:
    images = crops(wheel_photos[0], 3)
    (tmp_path / "photos").mkdir()
    for name, image in zip("ab", images, strict=False):
        (tmp_path / "photos" / f"{name}.jpg").write_bytes(image)
    (tmp_path / "list.txt").write_text("a.jpg\nb.jpg\nc.jpg\n")

    def listed(column: str) -> ImageTextPairDataset:
        return ColourEmbedder(column)(ImageTextPairDataset.from_path_list(tmp_path / "list.txt", tmp_path / "photos"))

    save(listed("a"))
    save(listed("b"))
    (tmp_path / "photos" / "c.jpg").write_bytes(images[2])
    half = save(listed("a"), overwrite=True)
    assert half.failed == 1, "b has no value yet"
    whole = save(listed("b"), overwrite=True)
    assert (whole.embedded, whole.failed) == (3, 0)


def test_a_shard_whose_old_codes_cover_all_rows_is_no_unreadable_one(tmp_path: Path, wheel_photos: list[Path]) -> None:
    images = crops(wheel_photos[0], 4)
    (tmp_path / "photos").mkdir()
    for name, image in zip("ab", images, strict=False):
        (tmp_path / "photos" / f"{name}.jpg").write_bytes(image)
    (tmp_path / "list.txt").write_text("a.jpg\nb.jpg\nc.jpg\nd.jpg\n")

    def listed(column: str, start: int = 0) -> ImageTextPairDataset:
        lines = (tmp_path / "list.txt", tmp_path / "photos", None, start, None, 2)
        return ColourEmbedder(column)(ImageTextPairDataset.from_path_list(*lines))

    save(listed("a"))
    for name, image in zip("cd", images[2:], strict=True):
        (tmp_path / "photos" / f"{name}.jpg").write_bytes(image)
    assert save(listed("b", 2)).shards["done"] == 1


class Choosy(ColourEmbedder):
    """Fails on every image but the first."""

    def __init__(self, column: str) -> None:
        super().__init__(column)
        self.seen = 0

    def settled(self, settings: Any, *, images: int | None = None) -> Choosy:
        return self

    def prepare(self, image: Any) -> Any:
        self.seen += 1
        if self.seen > 1:
            raise ValueError("no")
        return super().prepare(image)


def test_a_row_is_not_dropped_for_a_column_that_is_left_out(tmp_path: Path, wheel_photos: list[Path]) -> None:
    folder = write_dataset(tmp_path / "in", wheel_photos, shards=1, samples=3, missing=0)
    assert save(Choosy("picky")(ColourEmbedder("a")(opened(folder)))).failed == 2
    report = save(ColourEmbedder("a")(opened(folder)), tmp_path / "out", columns=[], on_error="drop")
    assert (report.embedded, report.failed) == (3, 0)


def test_a_trial_gives_way_and_later_columns_stay(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    embed(source, out, limit=3)
    trial = ColourEmbedder("later")(opened(source, metadata_path=str(out)))
    first = trial.like([shard for shard in trial.shards if (out / f"{shard.name}.parquet").exists()], trial.steps)
    save(first)
    embed(source, out)
    assert "later" in pq.read_schema(out / "00000.parquet").names


def test_values_of_rows_without_an_id_are_carried_by_position(tmp_path: Path, wheel_photos: list[Path]) -> None:
    folder, images = tmp_path / "in", crops(wheel_photos[0], 2)
    folder.mkdir()
    write_tar(folder / "0.tar", [("a.jpg", images[0]), ("b.jpg", images[1])])
    pq.write_table(pa.table({"key": ["a", None, "b"]}), folder / "0.parquet")
    embed(folder, tmp_path / "out")
    saved = opened(folder, metadata_path=str(tmp_path / "out"))
    saved.metadata["number"] = saved.metadata["key"].isna().astype("int64[pyarrow]")
    save(saved)
    embed(folder, tmp_path / "out", version=2, overwrite=True)
    assert pq.read_table(tmp_path / "out" / "0.parquet")["number"].to_pylist() == [0, 1, 0]


def test_a_table_that_meets_no_image_is_not_filled_with_nulls(tmp_path: Path, wheel_photos: list[Path]) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    write_tar(folder / "0.tar", [(f"{n}.jpg", image) for n, image in enumerate(crops(wheel_photos[0], 3))])
    pq.write_table(pa.table({"key": list("abc"), "uid": list("012")}), folder / "0.parquet")
    before = (folder / "0.parquet").read_bytes()
    with pytest.raises(
        RunStopped, match=r"no image has an id of the table's column 'key'.*choose another with id_col="
    ):
        embed(folder)
    assert (folder / "0.parquet").read_bytes() == before


def test_the_run_that_reads_ids_tells_of_columns_that_were_made_for_others(source: Path) -> None:
    embed(source)
    swap_ids(source / "00000.parquet")
    report = embed(source, column="b")
    assert any("column 'image_embedding' was made for other ids" in note for note in report.notes)
    with pytest.raises(UsageError, match=r"other ids.*overwrite=True"):
        embed(source)
    assert embed(source, overwrite=True).shards["done"] == 2


def test_info_does_not_call_verified_what_does_not_say_what_made_it(source: Path) -> None:
    embed(source)
    path = source / "00000.parquet"
    pq.write_table(pq.read_table(path).replace_schema_metadata(None), path)
    said = str(describe_dataset(opened(source), "in", "webdataset", verify=True))
    assert "not verified: 1 file of 2" in said and "all columns" not in said


def test_files_that_will_lack_columns_of_the_others_are_told(tmp_path: Path, wheel_photos: list[Path]) -> None:
    (tmp_path / "photos").mkdir()
    for number, image in enumerate(crops(wheel_photos[0], 3)):
        (tmp_path / "photos" / f"{number}.jpg").write_bytes(image)

    def folder(column: str) -> Any:
        return save(ColourEmbedder(column)(ImageTextPairDataset.from_folder(tmp_path / "photos")))

    folder("a"), folder("b")
    (tmp_path / "photos" / "9.jpg").write_bytes(crops(wheel_photos[1], 1)[0])
    report = folder("a")
    assert any("finished files also have the columns b" in note for note in report.notes)
    assert folder("b").shards == {"done": 1, "skipped": 1, "failed": 0, "left": 0}


def test_saves_of_assigned_columns_count_the_files_they_write(source: Path) -> None:
    dataset = opened(source)
    dataset.metadata["half"] = dataset.metadata["width"] // 2
    report = save(dataset)
    assert report.shards == {"done": 2, "skipped": 0, "failed": 0, "left": 0}
    other = opened(source)
    other.metadata["half"] = other.metadata["width"] // 3
    with pytest.raises(RunStopped, match=r"none of the 2 shards|2 of 2"):
        save(other)
