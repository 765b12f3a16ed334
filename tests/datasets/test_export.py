"""Export: the kept samples as new shards, their bytes untouched, their rows beside them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curator_embed.datasets import ImageTextPairDataset
from curator_embed.datasets.export import plan_shards
from curator_embed.datasets.export_shards import Piece
from curator_embed.errors import CuratorEmbedError, UsageError
from tests.rows import assert_embedded, table_rows, tar_images, tar_members
from tests.shards import crops, write_dataset, write_tar
from tests.stub import ColourEmbedder

Keep = dict[str, bool | None]


def mark(folder: Path, keep: Keep | None = None, column: str = "keep") -> Keep:
    """Add a boolean column to a dataset's parquets: by default every third row out, some null."""
    chosen: Keep = {}
    for path in sorted(folder.glob("*.parquet")):
        table = pq.read_table(path)
        keys = table["key"].to_pylist()
        default = {key: (True, False, None, True)[int(key[-4:]) % 4] for key in keys}
        here = {key: (default if keep is None else keep).get(key, False) for key in keys}
        chosen |= here
        pq.write_table(table.append_column(column, pa.array([here[key] for key in keys], pa.bool_())), path)
    return chosen


def export(folder: Path, out: Path, column: str = "keep", **options: Any) -> Any:
    dataset = ImageTextPairDataset.from_webdataset(str(folder))
    return dataset.to_webdataset(str(out), column, progress=False, **options)


def test_the_plan_cuts_kept_rows_in_order() -> None:
    assert plan_shards([3, 0, 5], 4) == [[Piece(0, 0, 3), Piece(2, 0, 1)], [Piece(2, 1, 5)]]
    assert plan_shards([0, 0], 4) == []
    assert plan_shards([9], 3) == [[Piece(0, 0, 3)], [Piece(0, 3, 6)], [Piece(0, 6, 9)]]


def test_kept_samples_byte_for_byte(source: Path, tmp_path: Path) -> None:
    chosen = mark(source)
    stored = {p.name: tar_members(p) for p in sorted(source.glob("*.tar"))}
    before = {p.name: p.read_bytes() for p in source.iterdir()}
    report = export(source, tmp_path / "out", samples_per_shard=4, old_id_col="old_key")

    kept = [key for key, keep in sorted(chosen.items()) if keep]
    with_image = [key for key in kept if key in tar_images(source)]
    assert (report.read, report.kept) == (33, len(kept))
    assert (report.exported, report.no_image) == (len(with_image), len(kept) - len(with_image))
    tars = sorted((tmp_path / "out").glob("*.tar"))
    assert [p.name for p in tars] == [f"{n:05d}.tar" for n in range(report.shards)]
    assert [p.name for p in sorted((tmp_path / "out").glob("*.parquet"))] == [f"{p.stem}.parquet" for p in tars]
    rows = table_rows(tmp_path / "out")
    old_ids = []
    for tar in tars:
        members = tar_members(tar)
        table = pq.read_table(tar.with_suffix(".parquet"))
        keys = list(dict.fromkeys(name.partition(".")[0] for name in members))
        assert table["key"].to_pylist() == keys == [f"{tar.stem}{n}" for n in range(len(keys))], "n-th row, n-th sample"
        assert len(keys) <= 4
        for key, row in zip(keys, table.to_pylist(), strict=True):
            old = row["old_key"]
            old_ids.append(old)
            original = stored[f"{old[:5]}.tar"]
            for extension in ("jpg", "txt", "json"):
                assert members[f"{key}.{extension}"] == original[f"{old}.{extension}"]
            assert row["caption"].encode() == members[f"{key}.txt"]
    assert sorted(old_ids) == with_image
    assert [old[:5] for old in old_ids] == [key[:5] for key in with_image], "the shards' order"
    assert len(rows) == report.exported
    assert {p.name: p.read_bytes() for p in source.iterdir() if p.is_file()} == before


def test_null_counts_as_false_and_old_ids_only_on_request(source: Path, tmp_path: Path) -> None:
    mark(source, {"000000001": True, "000010003": True, "000010004": None})
    report = export(source, tmp_path / "out")
    assert (report.kept, report.exported, report.shards) == (2, 2, 1)
    table = pq.read_table(tmp_path / "out" / "00000.parquet")
    assert table["key"].to_pylist() == ["000000000", "000000001"]
    assert table.column_names == ["key", "caption", "status", "width", "url", "keep"]


def test_shards_with_nothing_left(source: Path, tmp_path: Path) -> None:
    mark(source, {"000020005": True})
    report = export(source, tmp_path / "out")
    assert (report.exported, report.shards) == (1, 1)
    assert tar_images(tmp_path / "out") == {"000000000": tar_images(source)["000020005"]}


def test_nothing_left_at_all(source: Path, tmp_path: Path) -> None:
    mark(source, {})
    report = export(source, tmp_path / "out")
    assert (report.read, report.kept, report.shards, report.dataset) == (33, 0, 0, None)
    assert not list((tmp_path / "out").glob("*.*"))


def test_digits_of_shard_names(source: Path, tmp_path: Path) -> None:
    mark(source, dict.fromkeys(tar_images(source), True))
    assert export(source, tmp_path / "two", samples_per_shard=16, max_shards=2).shards == 2
    assert sorted(p.name for p in (tmp_path / "two").glob("*.tar")) == ["00.tar", "01.tar"]
    assert pq.read_table(tmp_path / "two" / "01.parquet")["key"][0].as_py() == "0100"
    with pytest.raises(UsageError, match="15 shards do not fit into 1 digits; raise max_shards"):
        export(source, tmp_path / "one", samples_per_shard=2, max_shards=1)
    assert not (tmp_path / "one").exists()
    for wrong in ({"samples_per_shard": 0}, {"max_shards": 0}):
        with pytest.raises(UsageError):
            export(source, tmp_path / "wrong", **wrong)


@pytest.mark.parametrize("name", ["key", "caption", "image_error", "keep"])
def test_old_ids_replace_no_column(name: str, source: Path, tmp_path: Path) -> None:
    mark(source, dict.fromkeys(tar_images(source), True))
    with pytest.raises(UsageError, match=f"old_id_col='{name}' is the name of another column"):
        export(source, tmp_path / "out", old_id_col=name)
    assert not (tmp_path / "out").exists()


def test_old_ids_do_not_take_the_place_of_the_new_ones(tmp_path: Path, wheel_photos: list[Path]) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    members = [("a.jpg", crops(wheel_photos[0], 1)[0]), ("a.json", b'{"uid": 7}')]
    write_tar(folder / "00000.tar", members)
    pq.write_table(pa.table({"uid": [7], "keep": [True]}), folder / "00000.parquet")
    dataset = ImageTextPairDataset.from_webdataset(str(folder), id_col="uid")
    with pytest.raises(UsageError, match="old_id_col='key' is the name of another column"):
        dataset.to_webdataset(str(tmp_path / "out"), "keep", old_id_col="key", progress=False)
    dataset.to_webdataset(str(tmp_path / "out"), "keep", old_id_col="old", progress=False)
    (row,) = pq.read_table(tmp_path / "out" / "00000.parquet").to_pylist()
    assert (row["old"], row["uid"], row["key"]) == (7, 7, "000000000")


def test_rows_without_image_are_counted_and_named(source: Path, tmp_path: Path) -> None:
    mark(source, {"000000010": True, "000000002": True, "000020010": True})
    report = export(source, tmp_path / "out")
    assert (report.kept, report.exported, report.no_image) == (3, 1, 2)
    assert any("00000" in note and "no image" in note for note in report.notes)
    assert "2 rows" in str(report)


def test_bad_images_are_exported_as_they_are(source: Path, tmp_path: Path) -> None:
    """The filter decides, not the decoder."""
    mark(source, {"000010002": True, "000020000": True})
    assert export(source, tmp_path / "out").exported == 2
    assert tar_images(tmp_path / "out") == {"000000000": b"", "000000001": b"<html></html>"}


def test_an_assigned_column_filters(source: Path, tmp_path: Path) -> None:
    dataset = ImageTextPairDataset.from_webdataset(str(source))
    frame = dataset.metadata
    dataset.metadata["wanted"] = frame["key"].str.endswith("3")
    report = dataset.to_webdataset(str(tmp_path / "out"), "wanted", progress=False)
    images = tar_images(source)
    assert list(tar_images(tmp_path / "out").values()) == [images[k] for k in sorted(images) if k.endswith("3")]
    assert report.exported == 3


def test_embeddings_travel_and_count_as_done(source: Path, tmp_path: Path) -> None:
    dataset = ColourEmbedder()(ImageTextPairDataset.from_webdataset(str(source)))
    saved = dataset.save_metadata(str(tmp_path / "embedded"), progress=False).dataset
    assert saved is not None
    saved.metadata["fine"] = saved.metadata["image_error"].isna()
    exported = saved.to_webdataset(str(tmp_path / "out"), "fine", samples_per_shard=7, progress=False)
    assert exported.exported == 28
    rows, images = table_rows(tmp_path / "out"), tar_images(tmp_path / "out")
    assert list(rows) == list(images)
    for key, data in images.items():
        assert_embedded(rows[key], data)
    stamps = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.parquet")}
    again = ColourEmbedder()(exported.dataset).save_metadata(progress=False)
    assert again.shards == {"done": 0, "skipped": 4, "failed": 0, "left": 0}
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.parquet")} == stamps


def test_an_export_that_was_interrupted_goes_on(source: Path, tmp_path: Path) -> None:
    """Kills at named points are in tests/execution/test_kills.py; here is what a power cut may leave."""
    mark(source)
    whole = export(source, tmp_path / "whole", samples_per_shard=4)
    out = tmp_path / "out"
    export(source, out, samples_per_shard=4)
    # Half a tar whose parquet was never written, a table whose tar is gone, and what a killed process leaves behind.
    (out / "00002.tar").write_bytes(b"half")
    (out / "00002.parquet").unlink()
    (out / "00003.tar").unlink()
    (out / "00002.tar.tmp-999999-abcd").write_bytes(b"quarter")
    there = {p.name: p.stat().st_mtime_ns for p in out.glob("*.parquet") if p.name != "00003.parquet"}
    report = export(source, out, samples_per_shard=4)
    assert report.skipped == len(there) == report.shards - 2
    assert (report.exported, report.no_image, report.kept) == (whole.exported, whole.no_image, whole.kept)
    assert {n: (out / n).stat().st_mtime_ns for n in there} == there
    for path in sorted((tmp_path / "whole").glob("*.tar")):
        assert (out / path.name).read_bytes() == path.read_bytes()
    assert table_rows(out) == table_rows(tmp_path / "whole")
    assert not [p.name for p in out.iterdir() if ".tmp-" in p.name]


def test_columns_added_to_an_export_survive_its_second_run(source: Path, tmp_path: Path) -> None:
    mark(source)
    exported = export(source, tmp_path / "out", samples_per_shard=10).dataset
    ColourEmbedder("later")(exported).save_metadata(progress=False)
    before = table_rows(tmp_path / "out")
    again = export(source, tmp_path / "out", samples_per_shard=10)
    assert again.skipped == again.shards
    assert table_rows(tmp_path / "out") == before and "later" in next(iter(before.values()))


def test_overwriting_an_export_makes_all_of_it_anew(source: Path, tmp_path: Path) -> None:
    mark(source)
    export(source, tmp_path / "out", samples_per_shard=10)
    stamps = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    report = export(source, tmp_path / "out", samples_per_shard=10, overwrite=True)
    assert report.skipped == 0
    assert all(p.stat().st_mtime_ns != stamps[p.name] for p in (tmp_path / "out").iterdir())


def test_an_export_of_fewer_shards_leaves_none_of_the_former_behind(source: Path, tmp_path: Path) -> None:
    mark(source)
    first = export(source, tmp_path / "out", samples_per_shard=3)
    (tmp_path / "out" / "00004.parquet").unlink()  # as a kill between a tar and its table leaves it
    second = export(source, tmp_path / "out", samples_per_shard=100, overwrite=True)
    assert second.shards == 1 < first.shards
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["00000.parquet", "00000.tar"]


def test_columns_that_are_out_of_date_stay_so(source: Path, tmp_path: Path) -> None:
    ColourEmbedder()(ImageTextPairDataset.from_webdataset(str(source))).save_metadata(progress=False)
    mark(source)
    tar = source / "00001.tar"
    os.utime(tar, ns=(tar.stat().st_atime_ns, tar.stat().st_mtime_ns + 10**9))
    exported = export(source, tmp_path / "out", samples_per_shard=100).dataset
    with pytest.raises(UsageError, match="images that have changed since"):
        ColourEmbedder()(exported).save_metadata(progress=False)


def test_an_export_counts_its_rows(source: Path, tmp_path: Path) -> None:
    ColourEmbedder()(ImageTextPairDataset.from_webdataset(str(source))).save_metadata(progress=False)
    mark(source, dict.fromkeys(table_rows(source), True), column="all")
    exported = export(source, tmp_path / "out", column="all").dataset
    again = ColourEmbedder()(exported).save_metadata(progress=False)
    assert again.shards["skipped"] > 0
    assert (again.read, again.embedded, again.failed) == (30, 28, 2)


def test_a_sample_without_an_image_is_no_exported_one(tmp_path: Path, wheel_photos: list[Path]) -> None:
    folder, images = tmp_path / "in", crops(wheel_photos[0], 2)
    folder.mkdir()
    write_tar(folder / "0.tar", [("a.jpg", images[0]), ("b.json", b'{"caption": "none"}'), ("c.jpg", images[1])])
    pq.write_table(pa.table({"key": list("abc"), "keep": [True] * 3}), folder / "0.parquet")
    report = export(folder, tmp_path / "out")
    assert (report.kept, report.exported, report.no_image) == (3, 2, 1)
    assert list(tar_members(tmp_path / "out" / "00000.tar")) == ["000000000.jpg", "000000001.jpg"]
    assert len(table_rows(tmp_path / "out")) == 2


def test_another_export_is_not_overwritten_unasked(source: Path, tmp_path: Path) -> None:
    mark(source)
    export(source, tmp_path / "out", samples_per_shard=10)
    mark(source, dict.fromkeys(tar_images(source), True), column="all")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir() if p.is_file()}
    for options in ({"samples_per_shard": 10}, {"samples_per_shard": 100}):
        with pytest.raises(UsageError, match=r"already holds another export.*overwrite=True"):
            export(source, tmp_path / "out", column="all", **options)
        assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir() if p.is_file()} == before
    report = export(source, tmp_path / "out", column="all", samples_per_shard=100, overwrite=True)
    assert report.exported == 30
    assert len(table_rows(tmp_path / "out")) == 30, "nothing of the former export is mixed in"


def test_new_vectors_in_the_source_are_another_export(source: Path, tmp_path: Path) -> None:
    """The rows and the tars are the same: only the tables tell."""
    mark(source)
    ColourEmbedder(version=1)(ImageTextPairDataset.from_webdataset(str(source))).save_metadata(progress=False)
    report = export(source, tmp_path / "out")
    assert export(source, tmp_path / "out").skipped == report.shards
    again = ColourEmbedder(version=2)(ImageTextPairDataset.from_webdataset(str(source)))
    again.save_metadata(overwrite=True, progress=False)
    with pytest.raises(UsageError, match=r"already holds another export.*overwrite=True"):
        export(source, tmp_path / "out")
    assert export(source, tmp_path / "out", overwrite=True).skipped == 0
    footer = json.loads(pq.read_schema(tmp_path / "out" / "00000.parquet").metadata[b"curator_embed"])
    assert footer["columns"]["image_embedding"]["recipe"]["model"] == "v2"


def test_other_values_in_an_assigned_column_are_another_export(source: Path, tmp_path: Path) -> None:
    mark(source)

    def assigned(factor: int, **options: Any) -> Any:
        dataset = ImageTextPairDataset.from_webdataset(str(source))
        dataset.metadata["area"] = dataset.metadata["width"] * factor
        return dataset.to_webdataset(str(tmp_path / "out"), "keep", progress=False, **options)

    report = assigned(2)
    assert assigned(2).skipped == report.shards
    with pytest.raises(UsageError, match="already holds another export"):
        assigned(3)
    assert assigned(3, overwrite=True).skipped == 0
    assert {row["area"] for row in table_rows(tmp_path / "out").values()} == {288}


def test_a_filter_that_is_none(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no column 'kep'.*caption"):
        export(source, tmp_path / "out", column="kep")
    with pytest.raises(UsageError, match=r"'caption' holds .*string"):
        export(source, tmp_path / "out", column="caption")
    pending = ColourEmbedder()(ImageTextPairDataset.from_webdataset(str(source)))
    with pytest.raises(UsageError, match="pending"):
        pending.to_webdataset(str(tmp_path / "out"), "caption", progress=False)


def test_a_folder_that_cannot_be_written(source: Path, tmp_path: Path) -> None:
    mark(source)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CuratorEmbedError, match="cannot write there"):
        export(source, tmp_path / "file" / "out")


def test_tars_alone_and_tables_with_other_columns(tmp_path: Path, wheel_photos: list[Path]) -> None:
    """Shards need not have the same columns; one made from json and txt exports like any other."""
    folder = write_dataset(tmp_path / "in", wheel_photos, shards=2, missing=0)
    path = folder / "00001.parquet"
    table = pq.read_table(path)
    pq.write_table(table.append_column("score", pa.array(range(table.num_rows), pa.int64())), path)
    (folder / "00000.parquet").unlink()
    dataset = ImageTextPairDataset.from_webdataset(str(folder))
    dataset.metadata["keep"] = dataset.metadata["caption"] == "photo 4"
    report = dataset.to_webdataset(str(tmp_path / "out"), "keep", progress=False)
    assert report.exported == 2
    images = tar_images(folder)
    assert list(tar_images(tmp_path / "out").values()) == [images["000000004"], images["000010004"]]
    rows = table_rows(tmp_path / "out")
    assert [row["keep"] for row in rows.values()] == [True, True], "the column that was filtered by comes along"
    assert [row["score"] for row in rows.values()][:1] == [None]
    assert "image_error" not in rows["000000000"]


def test_members_that_do_not_stand_together(tmp_path: Path, wheel_photos: list[Path]) -> None:
    """All images first, all captions behind: every new sample still has its own, and a second image too."""
    images = crops(wheel_photos[0], 4)
    folder = tmp_path / "in"
    folder.mkdir()
    keys = [f"{n:09d}" for n in range(4)]
    members = [(f"{k}.jpg", d) for k, d in zip(keys, images, strict=True)]
    members += [(f"{k}.txt", f"words of {k}".encode()) for k in keys]
    write_tar(folder / "00000.tar", [*members, (f"{keys[2]}.mask.png", images[0])])
    pq.write_table(pa.table({"key": keys[::-1], "keep": [True, True, False, True]}), folder / "00000.parquet")
    export(folder, tmp_path / "out")
    found = tar_members(tmp_path / "out" / "00000.tar")
    assert found == {
        "000000000.jpg": images[0], "000000000.txt": b"words of 000000000",
        "000000001.jpg": images[2], "000000001.txt": b"words of 000000002", "000000001.mask.png": images[0],
        "000000002.jpg": images[3], "000000002.txt": b"words of 000000003",
    } or list(found.values())  # fmt: skip
    report = ColourEmbedder()(ImageTextPairDataset.from_webdataset(str(tmp_path / "out"))).save_metadata(progress=False)
    assert (report.embedded, report.failed, report.no_image) == (3, 0, 0)
    rows = table_rows(tmp_path / "out")
    for key, data in zip(sorted(rows), (images[0], images[2], images[3]), strict=True):
        assert_embedded(rows[key], data)


def test_an_id_column_from_the_json(tmp_path: Path, wheel_photos: list[Path]) -> None:
    """The json members are copied as they are, ids in them included: the exported dataset still pairs."""
    images = crops(wheel_photos[0], 6)
    folder = tmp_path / "in"
    folder.mkdir()
    members: list[tuple[str, bytes]] = []
    for number, data in enumerate(images):
        members += [(f"s{number}.jpg", data), (f"s{number}.json", json.dumps({"uid": 1000 - number}).encode())]
    write_tar(folder / "00000.tar", members)
    pq.write_table(pa.table({"uid": [995, 1000, 998, 999, 996, 997], "keep": [True] * 5 + [False]}),
                   folder / "00000.parquet")  # fmt: skip
    dataset = ImageTextPairDataset.from_webdataset(str(folder), id_col="uid")
    report = dataset.to_webdataset(str(tmp_path / "out"), "keep", old_id_col="old", progress=False)
    assert (report.exported, report.no_image) == (5, 0)
    assert tar_images(tmp_path / "out") == {
        f"00000{n:04d}": d for n, d in enumerate([*images[:3], images[4], images[5]])
    }
    embedded = ColourEmbedder()(report.dataset).save_metadata(progress=False)
    assert (embedded.embedded, embedded.no_image, embedded.images_without_row) == (5, 0, 0)
    table = pq.read_table(tmp_path / "out" / "00000.parquet").to_pylist()
    assert [row["old"] for row in table] == [1000, 999, 998, 996, 995]
    for row, data in zip(table, [*images[:3], *images[4:]], strict=True):
        assert_embedded(row, data)


def test_ids_that_repeat(tmp_path: Path, wheel_photos: list[Path]) -> None:
    a1, a2, b = crops(wheel_photos[0], 3)
    folder = tmp_path / "in"
    folder.mkdir()
    write_tar(folder / "0.tar", [("a.jpg", a1), ("b.jpg", b), ("a.jpg", a2)])
    table = pa.table({"key": ["b", "a", "a"], "n": [0, 1, 2], "keep": [True, False, True]})
    pq.write_table(table, folder / "0.parquet")
    export(folder, tmp_path / "out")
    table = pq.read_table(tmp_path / "out" / "00000.parquet")
    assert list(tar_images(tmp_path / "out").values()) == [b, a2]
    assert table["n"].to_pylist() == [0, 2]


def test_from_and_to_an_object_store(source: Path) -> None:
    import fsspec

    mark(source)
    memory = fsspec.filesystem("memory")
    memory.put(str(source), "/export/in", recursive=True)
    try:
        dataset = ImageTextPairDataset.from_webdataset("memory://export/in")
        report = dataset.to_webdataset("memory://export/out", "keep", samples_per_shard=10, progress=False)
        local = source.parent / "local"
        here = export(source, local, samples_per_shard=10)
        assert report.exported == here.exported
        for path in sorted(local.glob("*.tar")):
            assert memory.cat_file(f"/export/out/{path.name}") == path.read_bytes()
        again = dataset.to_webdataset("memory://export/out", "keep", samples_per_shard=10, progress=False)
        assert again.skipped == again.shards == report.shards
    finally:
        memory.rm("/export", recursive=True)


def test_rows_dropped_from_the_frame_shift_nothing(source: Path, tmp_path: Path) -> None:
    """Rows are marked, not dropped: a frame that has lost rows is refused, not paired by position."""
    mark(source)
    dataset = ImageTextPairDataset.from_webdataset(str(source))
    dataset.metadata = dataset.metadata[dataset.metadata["caption"] != "photo 0"]
    with pytest.raises(UsageError, match=r"Mark the rows to keep in a boolean column"):
        dataset.to_webdataset(str(tmp_path / "out"), "keep", progress=False)
    assert not list((tmp_path / "out").glob("*.*"))


def test_files_of_other_origin_are_never_touched(source: Path, tmp_path: Path) -> None:
    """Not the dataset itself, not somebody's tars of the same names, not even when asked to overwrite."""
    mark(source)
    others = tmp_path / "others"
    others.mkdir()
    write_tar(others / "00000.tar", [("a.txt", b"mine")])
    for folder, why in ((source, "the dataset's own folder"), (others, r"no export has written.*new folder")):
        before = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
        for overwrite in (False, True):
            with pytest.raises(UsageError, match=why):
                export(source, folder, overwrite=overwrite)
            assert {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before
    out = tmp_path / "out"
    export(source, out)
    write_tar(out / "00007.tar", [("a.txt", b"mine")])
    with pytest.raises(UsageError, match=r"00007\.tar is not of this export"):
        export(source, out, samples_per_shard=3, overwrite=True)
    assert tar_members(out / "00007.tar") == {"a.txt": b"mine"}


def test_columns_made_in_two_ways_lose_their_provenance(source: Path, tmp_path: Path) -> None:
    """One new shard of two old ones whose columns differ in origin must not claim one origin for both."""
    for number, version in ((0, 1), (1, 2)):
        one = ImageTextPairDataset.from_webdataset([str(source / f"{number:05d}.tar")])
        ColourEmbedder(version=version)(one).save_metadata(progress=False)
    for kind in ("tar", "parquet"):
        (source / f"00002.{kind}").unlink()
    mark(source)
    exported = export(source, tmp_path / "out").dataset
    with pytest.raises(UsageError, match="does not say what made it"):
        ColourEmbedder()(exported).save_metadata(progress=False)


def test_a_filter_that_differs_each_time_is_refused_and_saved_it_is_exported(source: Path, tmp_path: Path) -> None:
    dataset = ImageTextPairDataset.from_webdataset(str(source))
    frame = dataset.metadata
    dataset.metadata["some"] = frame.map_partitions(
        lambda part: pd.Series(np.random.default_rng().random(len(part)) < 0.5, part.index), meta=("some", "bool")
    )
    remedy = r"shard 0000\d: the filter 'some' gives other rows each .* save it as a column first \(save_metadata\)"
    with pytest.raises(CuratorEmbedError, match=remedy):
        dataset.to_webdataset(str(tmp_path / "out"), "some", progress=False)
    assert not list((tmp_path / "out").glob("*.tar"))
    dataset.save_metadata(progress=False)
    dataset.to_webdataset(str(tmp_path / "other"), "some", progress=False)
    rows, images = table_rows(source), tar_images(source)
    assert list(tar_images(tmp_path / "other").values()) == [images[key] for key in sorted(images) if rows[key]["some"]]


def test_other_columns_that_differ_each_time_are_refused(source: Path, tmp_path: Path) -> None:
    mark(source)
    dataset = ImageTextPairDataset.from_webdataset(str(source))
    dataset.metadata["noise"] = dataset.metadata["width"].map_partitions(
        lambda part: pd.Series(np.random.default_rng().random(len(part)), part.index), meta=("noise", "float64")
    )
    with pytest.raises(CuratorEmbedError, match=r"an assigned column \(noise\) other values; save them as columns"):
        dataset.to_webdataset(str(tmp_path / "out"), "keep", progress=False)
    dataset.save_metadata(progress=False)
    dataset.to_webdataset(str(tmp_path / "other"), "keep", progress=False)
    assert all(row["noise"] is not None for row in table_rows(tmp_path / "other").values())


def test_what_does_not_count_of_a_recipe_does_not_count_in_an_export(source: Path, tmp_path: Path) -> None:
    for number in range(2):
        one = ImageTextPairDataset.from_webdataset([str(source / f"{number:05d}.tar")])
        Recorded(f"1.{number}")(one).save_metadata(progress=False)
    for kind in ("tar", "parquet"):
        (source / f"00002.{kind}").unlink()
    mark(source)
    exported = export(source, tmp_path / "out").dataset
    assert Recorded("1.2")(exported).save_metadata(progress=False).shards["skipped"] == 1


class Recorded(ColourEmbedder):
    """Writes down which software it ran on."""

    def __init__(self, software: str) -> None:
        super().__init__()
        self.software = software

    def recipe(self) -> dict[str, Any]:
        return {**super().recipe(), "software": {"colours": self.software}}


@pytest.mark.parametrize("name", ["key", "image_error"])
def test_assigned_columns_that_an_export_would_lose_are_refused(
    name: str, tmp_path: Path, wheel_photos: list[Path]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    write_tar(folder / "00000.tar", [("a.jpg", crops(wheel_photos[0], 1)[0]), ("a.json", b'{"uid": 7}')])
    pq.write_table(pa.table({"uid": [7], "keep": [True]}), folder / "00000.parquet")

    def exported(column: str) -> Any:
        dataset = ImageTextPairDataset.from_webdataset(str(folder), id_col="uid")
        dataset.metadata[column] = dataset.metadata["uid"] + 1
        return dataset.to_webdataset(str(tmp_path / "out"), "keep", progress=False)

    with pytest.raises(UsageError, match=f"new column '{name}' has the name of .* assign it under another name"):
        exported(name)
    assert not (tmp_path / "out").exists()
    exported("next")
    assert table_rows(tmp_path / "out")["000000000"]["next"] == 8


def test_a_column_that_was_saved_before_and_is_assigned_again_is_exported_once(source: Path, tmp_path: Path) -> None:
    mark(source)
    for out in ("first", "second"):
        dataset = ImageTextPairDataset.from_webdataset(str(source))
        dataset.metadata["twice"] = dataset.metadata["width"] * 2
        dataset.to_webdataset(str(tmp_path / out), "keep", progress=False)
        dataset.save_metadata(progress=False)
    assert table_rows(tmp_path / "second") == table_rows(tmp_path / "first")


def test_images_that_are_missing_or_refused_are_no_exported_ones(tmp_path: Path, wheel_photos: list[Path]) -> None:
    images = tmp_path / "images"
    images.mkdir()
    data = crops(wheel_photos[0], 2)
    (images / "a.jpg").write_bytes(data[0])
    (images / "b.jpg").write_bytes(data[1])
    (tmp_path / "elsewhere.jpg").write_bytes(data[1])
    (images / "link.jpg").symlink_to(tmp_path / "elsewhere.jpg")
    lines = ["a.jpg", "gone.jpg", "link.jpg", "../elsewhere.jpg", "b.jpg"]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    dataset = ImageTextPairDataset.from_path_list(str(tmp_path / "list.txt"), root=str(images))
    dataset.metadata["keep"] = ~dataset.metadata["path"].isna()
    report = dataset.to_webdataset(str(tmp_path / "out"), "keep", progress=False)
    assert (report.kept, report.exported, report.no_image) == (5, 2, 3)
    again = dataset.to_webdataset(str(tmp_path / "out"), "keep", progress=False)
    assert (again.skipped, again.kept, again.exported, again.no_image) == (1, 5, 2, 3)
    assert [row["path"] for row in table_rows(tmp_path / "out").values()] == ["a.jpg", "b.jpg"]
    assert list(tar_images(tmp_path / "out").values()) == data


def test_shards_of_which_nothing_was_embedded_take_no_provenance_from_the_others(
    tmp_path: Path, wheel_photos: list[Path]
) -> None:
    """Such a shard's footer knows no length of vectors."""
    folder = write_dataset(tmp_path / "in", wheel_photos, shards=2, samples=2, bad={(0, 0): b"", (0, 1): b""})
    ColourEmbedder()(ImageTextPairDataset.from_webdataset(str(folder))).save_metadata(progress=False)
    mark(folder, dict.fromkeys(table_rows(folder), True))
    exported = export(folder, tmp_path / "out").dataset
    footer = json.loads(pq.read_schema(tmp_path / "out" / "00000.parquet").metadata[b"curator_embed"])
    assert footer["columns"]["image_embedding"]["dimension"] == 192
    assert ColourEmbedder()(exported).save_metadata(progress=False).shards["skipped"] == 1
