"""``ImageTextPairDataset`` from end to end: what is saved, what is skipped, what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import curator_embed
from curator_embed import get_client
from curator_embed.datasets import ImageTextPairDataset
from curator_embed.embedders import ImageEmbedder, TimmImageEmbedder
from curator_embed.errors import CuratorEmbedError, UsageError
from curator_embed.execution.blame import BREAKS_IN_A_ROW
from curator_embed.execution.run import RowsFailed
from curator_embed.steps import BatchModel
from tests.rows import assert_embedded, assert_failed, colour_vector, table_rows, tar_images
from tests.shards import crops, write_dataset, write_tar
from tests.stub import ColourEmbedder

REPO = Path(__file__).resolve().parents[2]
MODEL = "test_resnet.r160_in1k"


def open_dataset(folder: Path | str) -> ImageTextPairDataset:
    return ImageTextPairDataset.from_webdataset(str(folder))


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


def stamps(folder: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in folder.glob("*.parquet")}


# -- saving ----------------------------------------------------------------------------------


def test_in_place_adds_columns_and_changes_nothing_else(source: Path) -> None:
    images, before = tar_images(source), {p.name: pq.read_table(p) for p in source.glob("*.parquet")}
    tars = {p.name: p.read_bytes() for p in source.glob("*.tar")}
    report = ColourEmbedder()(open_dataset(source)).save_metadata(progress=False)
    assert (report.read, report.embedded, report.failed, report.no_image) == (33, 28, 2, 3)
    assert report.reasons == {"empty": 1, "not_an_image": 1}
    assert report.shards == {"done": 3, "skipped": 0, "failed": 0, "left": 0}
    for name, old in before.items():
        new = pq.read_table(source / name)
        assert new.column_names == [*old.column_names, "image_embedding", "image_error"]
        assert new.select(old.column_names).equals(old)
        assert new.schema.field("image_embedding").type == pa.list_(pa.float32())
        assert new.schema.field("image_error").type == pa.string()
    rows = table_rows(source)
    reasons = {"000010002": "empty", "000020000": "not_an_image"}
    for key, row in rows.items():
        if key in reasons or key not in images:
            assert_failed(row, reasons.get(key, "no_image"))
        else:
            assert_embedded(row, images[key])
    assert {p.name: p.read_bytes() for p in source.glob("*.tar")} == tars
    assert not [p for p in source.iterdir() if ".tmp-" in p.name]


def test_to_a_path_leaves_the_input_alone(source: Path, tmp_path: Path) -> None:
    before = contents(source)
    report = ColourEmbedder()(open_dataset(source)).save_metadata(str(tmp_path / "out"), progress=False)
    assert contents(source) == before
    assert report.embedded == 28
    assert pq.read_table(tmp_path / "out" / "00000.parquet").column_names == [
        "key", "caption", "status", "width", "url", "image_embedding", "image_error"
    ]  # fmt: skip


def test_columns_choose_what_a_new_path_gets(source: Path, tmp_path: Path) -> None:
    dataset = ColourEmbedder()(open_dataset(source))
    dataset.save_metadata(str(tmp_path / "out"), columns=["width"], progress=False)
    for path in sorted((tmp_path / "out").glob("*.parquet")):
        assert pq.read_table(path).column_names == ["key", "width", "image_embedding", "image_error"]
    again = ColourEmbedder()(open_dataset(source)).save_metadata(
        str(tmp_path / "out"), columns=["width"], progress=False
    )
    assert again.shards["skipped"] == 3
    with pytest.raises(UsageError, match="other options"):
        ColourEmbedder()(open_dataset(source)).save_metadata(str(tmp_path / "out"), columns=["url"], progress=False)
    with pytest.raises(UsageError, match=r"nosuch.*not in .*00000\.parquet.*caption"):  # before anything is computed
        ColourEmbedder()(open_dataset(source)).save_metadata(
            str(tmp_path / "other"), columns=["nosuch"], progress=False
        )


def test_dropping_rows(source: Path, tmp_path: Path) -> None:
    dataset = ColourEmbedder()(open_dataset(source))
    with pytest.raises(UsageError, match=r"on_error='drop' removes rows.*output path"):
        dataset.save_metadata(on_error="drop", progress=False)
    order = [key for p in sorted(source.glob("*.parquet")) for key in pq.read_table(p)["key"].to_pylist()]
    images = tar_images(source)
    report = dataset.save_metadata(str(tmp_path / "out"), on_error="drop", progress=False)
    assert (report.read, report.embedded, report.failed, report.no_image) == (33, 28, 2, 3)
    rows = table_rows(tmp_path / "out")
    assert list(rows) == [k for k in order if k in images and k not in ("000010002", "000020000")]
    for key, row in rows.items():
        assert_embedded(row, images[key])
    again = ColourEmbedder()(open_dataset(source)).save_metadata(str(tmp_path / "out"), on_error="drop", progress=False)
    assert (again.shards["skipped"], again.read, again.failed) == (3, 33, 2), "accounted for although dropped"


def test_raising_keeps_finished_shards_and_names_the_row(source: Path, tmp_path: Path) -> None:
    dataset = ColourEmbedder()(open_dataset(source))
    with pytest.raises(RowsFailed, match=r"0000[12]\.tar.*rows failed.*'0000(10002': empty|20000': not_an_image)"):
        dataset.save_metadata(str(tmp_path / "out"), on_error="raise", progress=False)
    names = set(stamps(tmp_path / "out"))
    assert names <= {"00000.parquet"}, "no shard with a failed row is written"
    report = ColourEmbedder()(open_dataset(source)).save_metadata(str(tmp_path / "out"), progress=False)
    assert report.shards["skipped"] == len(names)
    assert report.read == 33


def test_rows_without_image_do_not_raise(tmp_path: Path, wheel_photos: list[Path]) -> None:
    """A failed download is no failed image."""
    folder = write_dataset(tmp_path / "in", wheel_photos, shards=1)
    report = ColourEmbedder()(open_dataset(folder)).save_metadata(on_error="raise", progress=False)
    assert (report.embedded, report.no_image) == (10, 1)


def test_a_limit(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="output path"):
        ColourEmbedder()(open_dataset(source)).save_metadata(limit=5, progress=False)
    out = tmp_path / "out"
    report = ColourEmbedder()(open_dataset(source)).save_metadata(str(out), limit=15, progress=False)
    assert report.read == 15
    assert [pq.read_metadata(p).num_rows for p in sorted(out.glob("*.parquet"))] == [11, 4]
    first = pq.read_table(source / "00001.parquet")["key"].to_pylist()[:4]
    assert pq.read_table(out / "00001.parquet")["key"].to_pylist() == first
    whole = ColourEmbedder()(open_dataset(source)).save_metadata(str(out), progress=False)
    assert whole.read == 33
    assert len(table_rows(out)) == 33, "a limited output is completed without overwrite"
    for wrong in (0, -1):
        with pytest.raises(UsageError, match="limit"):
            ColourEmbedder()(open_dataset(source)).save_metadata(str(out), limit=wrong, progress=False)


def test_running_again_does_nothing_twice(source: Path) -> None:
    first = ColourEmbedder()(open_dataset(source)).save_metadata(progress=False)
    there, was = stamps(source), contents(source)
    again = ColourEmbedder()(open_dataset(source)).save_metadata(progress=False)
    assert again.shards == {"done": 0, "skipped": 3, "failed": 0, "left": 0}
    assert (again.read, again.embedded, again.failed, again.no_image, again.reasons) == (
        first.read, first.embedded, first.failed, first.no_image, first.reasons
    )  # fmt: skip
    assert (stamps(source), contents(source)) == (there, was)


def test_only_what_is_missing_is_computed(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ColourEmbedder()(open_dataset(source)).save_metadata(str(out), progress=False)
    whole = contents(out)
    (out / "00001.parquet").unlink()
    (out / "00002.parquet.tmp-999999-ab").write_bytes(b"left behind by a killed run")
    there = stamps(out)
    report = ColourEmbedder()(open_dataset(source)).save_metadata(str(out), progress=False)
    assert report.shards == {"done": 1, "skipped": 2, "failed": 0, "left": 0}
    assert contents(out) == whole, "byte for byte what an undisturbed run writes"
    assert {name: stamp for name, stamp in stamps(out).items() if name in there} == there


def test_changed_images_are_noticed(source: Path, wheel_photos: list[Path]) -> None:
    ColourEmbedder()(open_dataset(source)).save_metadata(progress=False)
    tar = source / "00001.tar"
    os.utime(tar, ns=(tar.stat().st_atime_ns, tar.stat().st_mtime_ns + 10**9))
    with pytest.raises(UsageError, match=r"00001\.parquet.*images that have changed since.*overwrite=True"):
        ColourEmbedder()(open_dataset(source)).save_metadata(progress=False)
    report = ColourEmbedder()(open_dataset(source)).save_metadata(overwrite=True, progress=False)
    assert report.shards == {"done": 3, "skipped": 0, "failed": 0, "left": 0}, "overwriting makes everything anew"


def test_a_column_made_another_way_is_in_the_way(source: Path) -> None:
    ColourEmbedder(version=1)(open_dataset(source)).save_metadata(progress=False)
    was = contents(source)
    with pytest.raises(UsageError, match=r"made another way.*'v1' there, 'v2' now.*2 more files.*Nothing was changed"):
        ColourEmbedder(version=2)(open_dataset(source)).save_metadata(progress=False)
    assert contents(source) == was
    report = ColourEmbedder(version=2)(open_dataset(source)).save_metadata(overwrite=True, progress=False)
    assert report.shards["done"] == 3
    assert pq.read_schema(source / "00000.parquet").names == pq.read_schema(source / "00001.parquet").names
    assert ColourEmbedder(version=2)(open_dataset(source)).save_metadata(progress=False).shards["skipped"] == 3


def test_somebody_elses_column_is_in_the_way(source: Path) -> None:
    path = source / "00002.parquet"
    table = pq.read_table(path)
    pq.write_table(table.append_column("image_embedding", pa.array([[1.0]] * table.num_rows)), path)
    was = contents(source)
    with pytest.raises(UsageError, match=r"00002\.parquet: column 'image_embedding'.*does not say what made it"):
        ColourEmbedder()(open_dataset(source)).save_metadata(progress=False)
    assert contents(source) == was
    assert ColourEmbedder()(open_dataset(source)).save_metadata(overwrite=True, progress=False).embedded == 28


def test_an_output_of_other_files_is_in_the_way(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    pq.write_table(pa.table({"mine": [1]}), out / "00001.parquet")
    with pytest.raises(UsageError, match=r"out/00001\.parquet.*not an output of curator-embed"):
        ColourEmbedder()(open_dataset(source)).save_metadata(str(out), progress=False)
    assert pq.read_table(out / "00001.parquet").column_names == ["mine"]


def test_two_embedders_share_one_pass(source: Path, tmp_path: Path) -> None:
    dataset = ColourEmbedder("second", batch_size=3)(ColourEmbedder("first")(open_dataset(source)))
    report = dataset.save_metadata(str(tmp_path / "out"), progress=False)
    assert (report.read, report.embedded) == (33, 28)
    assert set(report.settings) == {"first", "second"}
    for row in table_rows(tmp_path / "out").values():
        assert row["first"] == row["second"]
        assert (row["first"] is None) == (row["image_error"] is not None)
    with pytest.raises(UsageError, match=r"two steps would write the column 'first'"):
        ColourEmbedder("first")(ColourEmbedder("first")(open_dataset(source)))


def test_a_later_step_in_place_computes_only_itself(source: Path) -> None:
    ColourEmbedder("first")(open_dataset(source)).save_metadata(progress=False)
    old = {p.name: pq.read_table(p) for p in source.glob("*.parquet")}
    both = ColourEmbedder("second")(ColourEmbedder("first")(open_dataset(source)))
    report = both.save_metadata(progress=False)
    assert (report.read, report.embedded, report.failed, report.no_image) == (33, 28, 2, 3)
    for name, table in old.items():
        new = pq.read_table(source / name)
        assert new.column_names == [*table.column_names, "second"]
        assert new.select(table.column_names).equals(table)
    assert ColourEmbedder("first")(open_dataset(source)).save_metadata(progress=False).shards["skipped"] == 3


def test_the_saved_object_reads_from_there(source: Path, tmp_path: Path) -> None:
    dataset = ColourEmbedder()(open_dataset(source))
    report = dataset.save_metadata(str(tmp_path / "out"), progress=False)
    for saved in (dataset, report.dataset):
        assert saved is not None
        assert saved.steps == ()
        frame = saved.metadata.compute()
        assert len(frame) == 33
        assert frame["image_embedding"].notna().sum() == 28
    ColourEmbedder("second")(dataset).save_metadata(progress=False)
    assert "second" in pq.read_schema(tmp_path / "out" / "00000.parquet").names
    assert "second" not in pq.read_schema(source / "00000.parquet").names


def test_datasets_are_immutable(source: Path) -> None:
    dataset = open_dataset(source)
    pending = ColourEmbedder()(dataset)
    assert pending is not dataset
    assert dataset.steps == () and len(pending.steps) == 1
    ColourEmbedder("second")(pending)
    assert len(pending.steps) == 1
    assert list(dataset.metadata.columns) == ["key", "caption", "status", "width", "url"]
    assert "pending: image_embedding" in repr(pending)


def test_the_report_adds_up_and_is_left_beside_the_output(source: Path, tmp_path: Path) -> None:
    report = ColourEmbedder()(open_dataset(source)).save_metadata(str(tmp_path / "out"), progress=False)
    told = report.to_dict()
    assert told["read"] == told["embedded"] + told["failed"] + told["no_image"] == 33
    assert set(told["time"]) == {"read", "decode", "model", "write", "idle"}
    assert all(seconds >= 0 for seconds in told["time"].values())
    assert told["time"]["decode"] > 0 and told["time"]["model"] > 0
    assert told["images_per_second"] == pytest.approx(30 / report.wall_seconds, abs=0.01)
    assert json.loads(report.to_json()) == json.loads(json.dumps(told))
    (left,) = (tmp_path / "out.curator_embed").glob("report-*.json")
    assert json.loads(left.read_text())["embedded"] == 28
    table = str(report)
    assert "28" in table and "not_an_image" in table and "images/s" in table


class Waits(ColourEmbedder):
    """Does not finish its first image before it is told to."""

    begun, go_on = threading.Event(), threading.Event()

    def prepare(self, image: Any) -> Any:
        Waits.begun.set()
        Waits.go_on.wait(30)
        return super().prepare(image)


def test_two_runs_at_once_on_one_output(source: Path, tmp_path: Path) -> None:
    first: list[Any] = []
    out = str(tmp_path / "out")
    pending = Waits()(open_dataset(source))
    thread = threading.Thread(target=lambda: first.append(pending.save_metadata(out, progress=False)))
    thread.start()
    try:
        assert Waits.begun.wait(30)
        with pytest.raises(CuratorEmbedError, match=rf"out.*another run holds.*process {os.getpid()} on ") as caught:
            ColourEmbedder()(open_dataset(source)).save_metadata(out, progress=False)
        assert "Wait for it" in str(caught.value)
    finally:
        Waits.go_on.set()
        thread.join(60)
    assert first[0].embedded == 28


class OutOfOrder(BatchModel):
    """A model that cannot compute anything."""

    batch_size = 4

    def __call__(self, images: Any) -> Any:
        raise RuntimeError("the model is out of order")


class Fails(ColourEmbedder):
    """An embedder with such a model."""

    loaded = 0

    def load_model(self, device: str, threads: int | None = None) -> BatchModel:
        Fails.loaded += 1
        return OutOfOrder()


def test_an_error_in_the_model_ends_the_run(tmp_path: Path, wheel_photos: list[Path]) -> None:
    """Neither hangs nor swallows, and tasks that still wait do not begin anew; the next run goes on."""
    folder = write_dataset(tmp_path / "in", wheel_photos, shards=12, samples=6)
    Fails.loaded = 0
    with pytest.raises(Exception, match="the model is out of order"):
        Fails()(open_dataset(folder)).save_metadata(str(tmp_path / "out"), progress=False)
    report = ColourEmbedder()(open_dataset(folder)).save_metadata(str(tmp_path / "out"), progress=False)
    assert Fails.loaded <= 2 * BREAKS_IN_A_ROW
    assert report.shards["done"] == 12
    assert report.embedded == 72


# -- metadata --------------------------------------------------------------------------------


def test_metadata_keeps_types_and_nulls(source: Path) -> None:
    frame = open_dataset(source).metadata
    assert frame.npartitions == 3
    assert [str(kind) for kind in frame.dtypes] == [
        "string[pyarrow]", "string[pyarrow]", "string[pyarrow]", "int32[pyarrow]", "string[pyarrow]"
    ]  # fmt: skip
    computed = frame.compute()
    assert [str(kind) for kind in computed.dtypes] == [str(kind) for kind in frame.dtypes]
    assert computed["width"].isna().sum() == 3
    assert computed["width"].dropna().unique().tolist() == [96]
    assert list(frame.partitions[1].compute()["key"]) == pq.read_table(source / "00001.parquet")["key"].to_pylist()


def test_pending_columns_are_in_the_metadata(source: Path) -> None:
    was, images = contents(source), tar_images(source)
    frame = ColourEmbedder()(open_dataset(source)).metadata
    assert list(frame.columns)[-2:] == ["image_embedding", "image_error"]
    assert frame["image_error"].compute().value_counts().to_dict() == {"no_image": 3, "empty": 1, "not_an_image": 1}
    (row,) = frame[frame["key"] == "000000003"].compute().to_dict("records")
    np.testing.assert_array_equal(np.float32(row["image_embedding"]), colour_vector(images["000000003"]))
    assert contents(source) == was, "looking writes nothing"


def test_assigned_columns_are_saved(source: Path, tmp_path: Path) -> None:
    dataset = open_dataset(source)
    dataset.metadata["short"] = dataset.metadata["caption"].str.len() < 8
    dataset.metadata["twice"] = dataset.metadata["width"] * 2
    report = ColourEmbedder()(open_dataset(source)).save_metadata(str(tmp_path / "other"), progress=False)
    assert report.read == 33
    dataset.save_metadata(progress=False)
    rows = table_rows(source)
    assert len(rows) == 33
    for row in rows.values():
        assert row["short"] == (len(row["caption"]) < 8)
        assert row["twice"] == (None if row["width"] is None else 192)
    assert {"short", "twice"} <= set(open_dataset(source).metadata.columns)


def test_assigned_columns_go_to_a_new_path_with_pending_ones(source: Path, tmp_path: Path) -> None:
    dataset = ColourEmbedder()(open_dataset(source))
    dataset.metadata["fine"] = dataset.metadata["image_error"].isna()
    was = contents(source)
    report = dataset.save_metadata(str(tmp_path / "out"), progress=False)
    assert contents(source) == was
    rows = table_rows(tmp_path / "out")
    assert {key for key, row in rows.items() if row["fine"]} == {
        key for key, row in rows.items() if row["image_embedding"] is not None
    }
    assert report.dataset is not None
    exported = report.dataset.to_webdataset(str(tmp_path / "exported"), "fine", progress=False)
    assert exported.exported == 28


def test_a_frame_of_other_partitions_is_refused(source: Path) -> None:
    dataset = open_dataset(source)
    with pytest.raises(UsageError, match="1 partitions for 3 shards"):
        dataset.metadata = dataset.metadata.repartition(npartitions=1)


def test_shards_with_different_columns_make_one_frame(source: Path) -> None:
    path = source / "00001.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["url"]).append_column("extra", pa.array([1] * 11)), path)
    frame = open_dataset(source).metadata.compute()
    assert len(frame) == 33
    assert frame["url"].isna().sum() == 11


# -- arrays at once --------------------------------------------------------------------------


def test_load_embeddings(source: Path, tmp_path: Path) -> None:
    ColourEmbedder()(open_dataset(source)).save_metadata(str(tmp_path / "out"), progress=False)
    images = tar_images(source)
    ids, vectors = curator_embed.load_embeddings(str(tmp_path / "out"))
    assert vectors.shape == (28, 192) and vectors.dtype == np.float32
    assert len(ids) == 28
    for key, vector in zip(ids, vectors, strict=True):
        np.testing.assert_array_equal(vector, colour_vector(images[key]))
    ids, vectors = curator_embed.load_embeddings(str(tmp_path / "out"), missing="nan")
    assert vectors.shape == (33, 192)
    assert np.isnan(vectors).all(axis=1).sum() == 5
    ids, vectors = curator_embed.load_embeddings(str(tmp_path / "out" / "00001.parquet"))
    assert vectors.shape == (9, 192)
    with pytest.raises(UsageError, match=r"00000\.parquet: no column 'nosuch'.*image_embedding"):
        curator_embed.load_embeddings(str(tmp_path / "out"), "nosuch")
    with pytest.raises(UsageError, match="not vectors"):
        curator_embed.load_embeddings(str(tmp_path / "out"), "caption")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"empty: no parquet files"):
        curator_embed.load_embeddings(str(tmp_path / "empty"))
    with pytest.raises(CuratorEmbedError, match=r"nowhere.*does not exist"):
        curator_embed.load_embeddings(str(tmp_path / "nowhere"))


def test_load_embeddings_with_other_ids(source: Path, tmp_path: Path) -> None:
    """The id column is the one the files name."""
    dataset = ColourEmbedder()(ImageTextPairDataset.from_webdataset(str(source), id_col="url"))
    dataset.save_metadata(str(tmp_path / "out"), progress=False)
    ids, _ = curator_embed.load_embeddings(str(tmp_path / "out"))
    assert ids[0].startswith("http://x/")


# -- real models -----------------------------------------------------------------------------


def test_a_dataset_and_a_list_of_images_give_the_same(source: Path, tmp_path: Path) -> None:
    embedder = TimmImageEmbedder(MODEL, batch_size=8, compile=False)
    embedder(open_dataset(source)).save_metadata(str(tmp_path / "out"), progress=False)
    rows, images = table_rows(tmp_path / "out"), tar_images(source)
    good = [key for key in images if rows[key]["image_error"] is None]
    assert len(good) == 28
    direct = embedder.embed([images[key] for key in good])
    np.testing.assert_allclose(np.float32([rows[key]["image_embedding"] for key in good]), direct, atol=2e-6)
    assert np.allclose(np.linalg.norm(direct, axis=1), 1, atol=1e-6)


class OwnModel(ImageEmbedder):
    """A custom embedder of the simplest kind: only the model is its own."""

    def load_embedding_model(self, device: str) -> Any:
        return lambda batch: torch.nn.functional.adaptive_avg_pool2d(batch, 4).flatten(1)


class OwnShards(ImageEmbedder):
    """A custom embedder of the other kind: it reads tars by itself, in its own order, and leaves images out."""

    def load_dataset_shard(self, tar_path: str) -> Iterable[tuple[Any, dict[str, Any]]]:
        keys = [key for key in tar_images(Path(tar_path).parent) if key.startswith(Path(tar_path).stem)]
        for start in range(len(keys) - 2, -1, -4):
            part = keys[max(0, start - 3) : start + 1]
            yield torch.tensor([[float(key)] * 3 for key in part]), {"key": part}

    def load_embedding_model(self, device: str) -> Any:
        return lambda batch: batch + torch.tensor([0.0, 1.0, 2.0])


def test_a_custom_model(source: Path, tmp_path: Path) -> None:
    report = OwnModel("mine")(open_dataset(source)).save_metadata(str(tmp_path / "out"), progress=False)
    assert (report.read, report.embedded, report.failed, report.no_image) == (33, 28, 2, 3)
    rows = table_rows(tmp_path / "out")
    assert {len(row["image_embedding"]) for row in rows.values() if row["image_embedding"]} == {48}
    assert_failed(rows["000010002"], "empty")
    again = OwnModel("mine")(open_dataset(source)).save_metadata(str(tmp_path / "out"), progress=False)
    assert again.shards["skipped"] == 3


def test_a_custom_reader(source: Path, tmp_path: Path) -> None:
    embedder = OwnShards("mine", normalize_embeddings=False)
    report = embedder(open_dataset(source)).save_metadata(str(tmp_path / "out"), progress=False)
    assert (report.read, report.embedded, report.no_image) == (33, 27, 3)
    assert report.reasons == {"embed_error": 3}
    rows = table_rows(tmp_path / "out")
    for key, row in rows.items():
        if key.endswith("9"):
            assert_failed(row, "embed_error")
        elif key.endswith("10"):
            assert_failed(row, "no_image")
        else:
            assert row["image_embedding"] == [float(key), float(key) + 1, float(key) + 2]


def test_a_custom_reader_that_leaves_out_one_of_two_images_with_one_id(
    tmp_path: Path, wheel_photos: list[Path]
) -> None:
    class LeavesOut(ImageEmbedder):
        def load_dataset_shard(self, tar_path: str) -> Iterable[tuple[Any, dict[str, Any]]]:
            yield torch.ones(2, 3), {"key": ["a", "b"]}

        def load_embedding_model(self, device: str) -> Any:
            return lambda batch: batch

    names = ["a.jpg", "b.jpg", "a.jpg"]
    write_tar(tmp_path / "0.tar", zip(names, crops(wheel_photos[0], 3), strict=True))
    report = LeavesOut("mine")(open_dataset(tmp_path)).save_metadata(str(tmp_path / "out"), progress=False)
    table = pq.read_table(tmp_path / "out" / "0.parquet")
    assert table["key"].to_pylist() == ["a", "b", "a"]
    assert table["image_error"].to_pylist() == ["embed_error", None, "embed_error"], "every row has one or the other"
    assert [vector is None for vector in table["image_embedding"].to_pylist()] == [True, False, True]
    assert (report.read, report.embedded, report.failed) == (3, 1, 2)


def test_a_custom_reader_beside_another_embedder(source: Path, tmp_path: Path) -> None:
    both = OwnShards("mine", "theirs", normalize_embeddings=False)(ColourEmbedder("ours")(open_dataset(source)))
    both.save_metadata(str(tmp_path / "out"), progress=False)
    rows, images = table_rows(tmp_path / "out"), tar_images(source)
    np.testing.assert_array_equal(np.float32(rows["000000004"]["ours"]), colour_vector(images["000000004"]))
    assert rows["000000004"]["theirs"] == [4.0, 5.0, 6.0]


def test_a_custom_reader_that_miscounts(source: Path, tmp_path: Path) -> None:
    class Miscounts(OwnShards):
        def load_dataset_shard(self, tar_path: str) -> Iterable[tuple[Any, dict[str, Any]]]:
            yield torch.zeros(3, 3), {"key": ["000000000"]}

    with pytest.raises(CuratorEmbedError, match=r"Miscounts.*\(3, 3\) for 1 ids of .*0000\d\.tar"):
        Miscounts("mine")(open_dataset(source)).save_metadata(str(tmp_path / "out"), progress=False)


NEMO = """
from curator_embed import get_client
from curator_embed.datasets import ImageTextPairDataset
from curator_embed.embedders import TimmImageEmbedder

client = get_client(cluster_type="cpu")
dataset = ImageTextPairDataset.from_webdataset(path="{path}", id_col="key")
embedding_model = TimmImageEmbedder(
    "{model}",
    pretrained=False, batch_size=1024, num_threads_per_worker=16, normalize_embeddings=True)
dataset_with_embeddings = embedding_model(dataset)
dataset_with_embeddings.save_metadata()
"""


def run_script(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    script = folder / "script.py"
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    return subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=240, env=environment)


def test_nemo_curators_example_as_a_script(source: Path, tmp_path: Path) -> None:
    """Its documentation's code with only the import path changed: no ``__main__`` guard, nothing else to do."""
    done = run_script(NEMO.format(path=source, model="vit_tiny_patch16_224"), tmp_path)
    assert done.returncode == 0, done.stderr
    rows = table_rows(source)
    assert sum(row["image_embedding"] is not None for row in rows.values()) == 28
    assert {len(row["image_embedding"]) for row in rows.values() if row["image_embedding"]} == {192}
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_nemo_curators_example_with_its_own_model(tmp_path: Path, wheel_photos: list[Path]) -> None:
    folder = write_dataset(tmp_path / "in", wheel_photos, shards=1, samples=4)
    done = run_script(NEMO.format(path=folder, model="vit_large_patch14_clip_quickgelu_224.openai"), tmp_path)
    assert done.returncode == 0, done.stderr
    assert {len(row["image_embedding"]) for row in table_rows(folder).values() if row["image_embedding"]} == {768}


# -- clients ---------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_client_without_a_gpu_says_what_is_missing() -> None:
    with pytest.raises(CuratorEmbedError, match=r"cluster_type='gpu': needs an NVIDIA GPU.*doctor.*leave it out"):
        get_client("gpu")


def test_contradicting_options_of_a_client(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'tpu'"):
        get_client("tpu")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="not both"):
        get_client(scheduler_address="tcp://127.0.0.1:1", scheduler_file="s.json")
    with pytest.raises(UsageError, match="n_workers"):
        get_client(scheduler_address="tcp://127.0.0.1:1", n_workers=2)
    with pytest.raises(UsageError, match=r"nowhere\.json.*no such file"):
        get_client(scheduler_file=str(tmp_path / "nowhere.json"))
    with pytest.raises(UsageError, match="n_workers=0"):
        get_client(n_workers=0)


# -- object stores ---------------------------------------------------------------------------


@pytest.fixture
def memory(source: Path) -> Iterator[str]:
    import fsspec

    store = fsspec.filesystem("memory")
    store.put(str(source), "/datasets/in", recursive=True)
    yield "memory://datasets"
    store.rm("/datasets", recursive=True)


def test_from_and_to_a_store_in_memory(memory: str, source: Path, tmp_path: Path) -> None:
    report = ColourEmbedder()(open_dataset(f"{memory}/in")).save_metadata(f"{memory}/out", progress=False)
    assert (report.read, report.embedded, report.failed, report.no_image) == (33, 28, 2, 3)
    ColourEmbedder()(open_dataset(source)).save_metadata(str(tmp_path / "out"), progress=False)
    ids, vectors = curator_embed.load_embeddings(f"{memory}/out")
    wanted = curator_embed.load_embeddings(str(tmp_path / "out"))
    np.testing.assert_array_equal(ids, wanted[0])
    np.testing.assert_array_equal(vectors, wanted[1])
    again = ColourEmbedder()(open_dataset(f"{memory}/in")).save_metadata(f"{memory}/out", progress=False)
    assert again.shards["skipped"] == 3
    in_place = ColourEmbedder()(open_dataset(f"{memory}/in")).save_metadata(progress=False)
    assert in_place.embedded == 28
    assert ColourEmbedder()(open_dataset(f"{memory}/in")).save_metadata(progress=False).shards["skipped"] == 3


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, Any]]:
    """A local S3 with one bucket: storage options to reach it."""
    from moto import server as server_module

    server = server_module.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    options = {"key": "k", "secret": "s", "client_kwargs": {"endpoint_url": f"http://{host}:{port}"}}
    import s3fs

    s3fs.S3FileSystem(**options).mkdir("bucket")
    yield options
    server.stop()


def test_from_and_to_s3(s3: dict[str, Any], source: Path, tmp_path: Path) -> None:
    import s3fs

    store = s3fs.S3FileSystem(**s3)
    store.put(str(source), "bucket/in", recursive=True)

    def dataset() -> ImageTextPairDataset:
        return ColourEmbedder()(ImageTextPairDataset.from_webdataset("s3://bucket/in", storage_options=s3))

    report = dataset().save_metadata("s3://bucket/out", progress=False)
    assert (report.read, report.embedded, report.failed, report.no_image) == (33, 28, 2, 3)
    assert dataset().save_metadata("s3://bucket/out", progress=False).shards["skipped"] == 3
    assert dataset().save_metadata(progress=False).embedded == 28
    ColourEmbedder()(open_dataset(source)).save_metadata(str(tmp_path / "out"), progress=False)
    wanted = curator_embed.load_embeddings(str(tmp_path / "out"))
    for place in ("out", "in"):
        ids, vectors = curator_embed.load_embeddings(f"s3://bucket/{place}", storage_options=s3)
        np.testing.assert_array_equal(ids, wanted[0])
        np.testing.assert_array_equal(vectors, wanted[1])
    assert isinstance(report.dataset, ImageTextPairDataset)
    assert isinstance(report.dataset.metadata.compute(), pd.DataFrame)
