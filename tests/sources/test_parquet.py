"""Parquet files with images: the formats of img2dataset and Hugging Face, in place and to a new path."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from distributed import Client

from curator_embed.datasets import ImageTextPairDataset
from curator_embed.errors import Reason, SourceError, UsageError
from curator_embed.sources.parquet import find_parquets, image_column
from curator_embed.tables.provenance import Footer
from tests.shards import crops
from tests.stub import ColourEmbedder


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with Client(processes=False, n_workers=1, threads_per_worker=2, dashboard_address=None) as client:
        yield client


def img2dataset(folder: Path, photos: list[Path], files: int = 2, rows: int = 9) -> Path:
    """What img2dataset's parquet output holds: failed downloads are rows with a null image."""
    folder.mkdir(parents=True)
    for number in range(files):
        images: list[bytes | None] = list(crops(photos[number], rows))
        images[2], images[4] = None, b"<html>"
        keys = [f"{number:05d}{row:04d}" for row in range(rows)]
        table = pa.table({"url": ["u"] * rows, "key": keys, "caption": [f"c{k}" for k in keys], "jpg": images})
        pq.write_table(table, folder / f"{number:05d}.parquet", row_group_size=4)
    return folder


def hugging_face(path: Path, rows: list[dict[str, Any]], **more: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    metadata = {"huggingface": '{"info": {"features": {"image": {"_type": "Image"}}}}'}
    table = pa.table({"image": pa.array(rows, kind), **more}).replace_schema_metadata(metadata)
    pq.write_table(table, path, row_group_size=3)
    return path


def test_in_place_adds_columns_and_changes_nothing_else(
    client: Client, tmp_path: Path, wheel_photos: list[Path]
) -> None:
    folder = img2dataset(tmp_path / "data", wheel_photos)
    before = [pq.read_table(path) for path in sorted(folder.glob("*.parquet"))]
    report = ColourEmbedder()(ImageTextPairDataset.from_parquet(folder)).save_metadata(progress=False)
    assert (report.read, report.embedded, report.failed, report.no_image) == (18, 14, 2, 2)
    after = [pq.read_table(path) for path in sorted(folder.glob("*.parquet"))]
    for old, new in zip(before, after, strict=True):
        assert new.column_names == [*old.column_names, "image_embedding", "image_error"]
        assert new.select(old.column_names).equals(old)
    # The files have changed, their images have not: nothing is computed again, and a second column is added.
    again = ColourEmbedder()(ImageTextPairDataset.from_parquet(folder)).save_metadata(progress=False)
    assert again.shards["skipped"] == 2
    more = ColourEmbedder("second")(ImageTextPairDataset.from_parquet(folder)).save_metadata(progress=False)
    assert more.shards["skipped"] == 0
    table = pq.read_table(folder / "00000.parquet")
    assert table["second"].equals(table["image_embedding"])
    both = Footer.of(table.schema).columns
    assert both["second"].samples == both["image_embedding"].samples


def test_a_new_path_gets_no_images_unless_asked(client: Client, tmp_path: Path, wheel_photos: list[Path]) -> None:
    folder = img2dataset(tmp_path / "data", wheel_photos)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    dataset = ImageTextPairDataset.from_parquet(folder)
    assert "jpg" not in dataset.metadata.columns
    ColourEmbedder()(dataset).save_metadata(str(tmp_path / "out"), progress=False)
    table = pq.read_table(tmp_path / "out" / "00001.parquet")
    assert table.column_names == ["url", "key", "caption", "image_embedding", "image_error"]
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    with_images = ColourEmbedder()(ImageTextPairDataset.from_parquet(folder))
    with_images.save_metadata(str(tmp_path / "images"), columns=["jpg"], progress=False)
    assert pq.read_table(tmp_path / "images" / "00001.parquet").column_names[:2] == ["key", "jpg"]
    # Another image under the same id is another sample.
    rows = pq.read_table(folder / "00000.parquet")
    pq.write_table(rows.set_column(3, "jpg", pa.array(rows["jpg"].to_pylist()[::-1])), folder / "00000.parquet")
    with pytest.raises(UsageError, match="images that have changed"):
        changed = ColourEmbedder()(ImageTextPairDataset.from_parquet(folder))
        changed.save_metadata(str(tmp_path / "out"), progress=False)


def test_hugging_face_images_without_ids(client: Client, tmp_path: Path, wheel_photos: list[Path]) -> None:
    images = crops(wheel_photos[0], 5)
    (tmp_path / "hf" / "files").mkdir(parents=True)
    (tmp_path / "hf" / "files" / "4.jpg").write_bytes(images[4])
    rows = [{"bytes": image, "path": f"{n}.jpg"} for n, image in enumerate(images[:4])]
    rows += [{"bytes": None, "path": "files/4.jpg"}, {"bytes": None, "path": "files/gone.jpg"}]
    rows += [{"bytes": None, "path": None}, None]  # type: ignore[list-item]
    path = hugging_face(tmp_path / "hf" / "train-00000-of-00001.parquet", rows, label=list(range(8)))
    (shard,) = find_parquets(path)
    samples = list(shard.samples(id_col="key"))
    assert [s.image for s in samples] == [*images, None, None, None]
    assert [s.error for s in samples] == [None] * 5 + [Reason.NOT_FOUND, None, None]
    assert shard.keys(id_col="key") == [s.key for s in samples]
    assert samples[7].key == "train-00000-of-00001_00000007"
    assert {s.ordinal: s.members for s in shard.stored_samples({1, 4, 6})} == {
        1: (("jpg", images[1]),), 4: (("jpg", images[4]),), 6: ()
    }  # fmt: skip

    before = path.read_bytes()
    dataset = ImageTextPairDataset.from_parquet(tmp_path / "hf")
    assert list(dataset.metadata.columns) == ["key", "label"]
    report = ColourEmbedder()(dataset).save_metadata(progress=False)
    assert (report.read, report.embedded, report.failed, report.no_image) == (8, 5, 1, 2)
    assert path.read_bytes() == before
    table = pq.read_table(tmp_path / "hf_metadata" / "train-00000-of-00001.parquet")
    assert table.column_names == ["key", "label", "image_embedding", "image_error"]
    assert table["label"].to_pylist() == list(range(8))
    again = ColourEmbedder()(ImageTextPairDataset.from_parquet(tmp_path / "hf")).save_metadata(progress=False)
    assert again.shards["skipped"] == 1


def test_a_file_that_came_later_has_its_rows_in_the_folder_that_was_named(
    client: Client, tmp_path: Path, wheel_photos: list[Path]
) -> None:
    images = [{"bytes": image, "path": None} for image in crops(wheel_photos[0], 3)]
    hugging_face(tmp_path / "hf" / "a.parquet", images)
    out = tmp_path / "out"
    ColourEmbedder()(ImageTextPairDataset.from_parquet(tmp_path / "hf")).save_metadata(str(out), progress=False)
    hugging_face(tmp_path / "hf" / "b.parquet", images[:1])
    grown = ImageTextPairDataset.from_parquet(tmp_path / "hf", metadata_path=str(out))
    report = ColourEmbedder()(grown).save_metadata(progress=False)
    assert (report.shards["done"], report.shards["skipped"]) == (1, 1)
    assert sorted(path.name for path in out.glob("*.parquet")) == ["a.parquet", "b.parquet"]
    assert not (tmp_path / "hf_metadata").exists()


def test_export_takes_the_bytes_as_they_are(client: Client, tmp_path: Path, wheel_photos: list[Path]) -> None:
    folder = img2dataset(tmp_path / "data", wheel_photos)
    dataset = ImageTextPairDataset.from_parquet(folder)
    dataset.metadata["keep"] = dataset.metadata["key"].str.endswith(("1", "3", "6"))
    exported = dataset.to_webdataset(str(tmp_path / "export"), "keep", progress=False)
    assert exported.exported == 6
    wanted = [r for p in sorted(folder.glob("*.parquet")) for r in pq.read_table(p)["jpg"].to_pylist()]
    found = [s.image for shard in exported.dataset.shards for s in shard.samples(id_col="key")]
    assert found == [wanted[n] for n in (1, 3, 6, 10, 12, 15)]
    assert not any("jpg" in pq.read_schema(p).names for p in (tmp_path / "export").glob("*.parquet"))


@pytest.mark.parametrize(
    ("ids", "kind", "keys"),
    [
        ([5, None, 7], pa.int32(), ["5", "7"]),
        ([5.0, float("nan"), None], pa.float64(), ["5"]),
        ([b"a", b"b", None], pa.binary(), ["a", "b"]),
        (["x", "x", "y"], pa.dictionary(pa.int8(), pa.string()), ["x", "x", "y"]),
    ],
)
def test_ids_of_any_type(
    client: Client, tmp_path: Path, wheel_photos: list[Path], ids: list[Any], kind: pa.DataType, keys: list[str]
) -> None:
    images = crops(wheel_photos[0], 3)
    pq.write_table(pa.table({"uid": pa.array(ids, kind), "image": images}), tmp_path / "x.parquet")
    (shard,) = find_parquets(tmp_path / "x.parquet", id_col="uid", image_col="image")
    assert [s.key for s in shard.samples(id_col="uid")] == keys == shard.keys(id_col="uid")
    dataset = ColourEmbedder()(ImageTextPairDataset.from_parquet(tmp_path / "x.parquet", "uid", "image"))
    report = dataset.save_metadata(str(tmp_path / "out"), progress=False)
    assert (report.read, report.embedded, report.no_image) == (3, len(keys), 3 - len(keys))
    if len(keys) < 3:
        assert "have no value in 'uid'" in str([note.message for note in shard.notes()])
        with_id = [n for n, value in enumerate(ids) if value is not None and value == value]
        assert {s.ordinal: s.members[0][1] for s in shard.stored_samples(range(9))} == {
            ordinal: images[row] for ordinal, row in enumerate(with_id)
        }


def test_rows_are_streamed(tmp_path: Path) -> None:
    """A row group of 100 MB is never held, only the page (here 6 MB) and the batches under way."""
    image = np.random.default_rng(0).bytes(100_000)
    table = pa.table({"key": [str(n) for n in range(1000)], "image": [image] * 1000})
    path = tmp_path / "big.parquet"
    pq.write_table(table, path, row_group_size=1000, use_dictionary=False, compression="none", write_batch_size=64)
    del table
    (shard,) = find_parquets(path)
    before = pa.total_allocated_bytes()
    samples = shard.samples(id_col="key")
    most = 0
    for sample in samples:
        assert sample.image == image
        most = max(most, pa.total_allocated_bytes() - before)
    assert most < 40_000_000


def test_which_column_holds_the_images() -> None:
    def schema(**columns: pa.DataType) -> pa.Schema:
        return pa.schema(list(columns.items()))

    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    assert image_column(schema(key=pa.string(), photo=pa.large_binary()), None, "x") == "photo"
    assert image_column(schema(sha=pa.binary(), image=image), None, "x") == "image"
    assert image_column(schema(sha=pa.binary(), image=image), "sha", "x") == "sha"
    with pytest.raises(UsageError, match=r"\['a', 'b'\]. Choose one with image_col="):
        image_column(schema(a=pa.binary(), b=pa.binary()), None, "x")
    with pytest.raises(UsageError, match="no column holds bytes"):
        image_column(schema(a=pa.string()), None, "x")
    with pytest.raises(UsageError, match="holds string, no image bytes"):
        image_column(schema(a=pa.string()), "a", "x")


def test_what_cannot_be_opened_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no \*\.parquet there"):
        find_parquets(tmp_path)
    (tmp_path / "x.parquet").write_bytes(b"PAR1 it is not")
    with pytest.raises(SourceError, match=r"x\.parquet: not a readable parquet file"):
        find_parquets(tmp_path)
    pq.write_table(pa.table({"image": [b""]}), tmp_path / "x.parquet")
    with pytest.raises(UsageError, match="no column 'uid'"):
        find_parquets(tmp_path, id_col="uid")
    with pytest.raises(SourceError, match="does not exist"):
        find_parquets(tmp_path / "gone.parquet")


def test_names_come_from_the_folder(tmp_path: Path) -> None:
    for name in ("b/10.parquet", "b/2.parquet", "a.parquet"):
        hugging_face(tmp_path / name, [])
    assert [s.name for s in find_parquets(tmp_path)] == ["a", "b__2", "b__10"]
    assert [s.name for s in find_parquets(f"{tmp_path}/b/*.parquet")] == ["2", "10"]
    assert [s.name for s in find_parquets(f"{tmp_path}/b/{{2,10}}.parquet")] == ["2", "10"]


def test_hugging_face_reads_back_what_got_columns_in_place(
    client: Client, tmp_path: Path, wheel_photos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    images = [{"bytes": image, "path": None} for image in crops(wheel_photos[0], 3)]
    written = datasets.Dataset.from_dict({"key": list("abc"), "image": images}).cast_column("image", datasets.Image())
    (tmp_path / "hf").mkdir()
    written.to_parquet(str(tmp_path / "hf" / "0.parquet"))
    ColourEmbedder()(ImageTextPairDataset.from_parquet(tmp_path / "hf")).save_metadata(progress=False)
    files = str(tmp_path / "hf" / "0.parquet")
    back = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert list(back.features) == ["key", "image", "image_embedding", "image_error"]
    assert back[0]["image"].size == (96, 96)
    assert len(back[0]["image_embedding"]) == 192
