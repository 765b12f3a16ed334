"""Folders of images: listing, captions, runs, and what happens when files change."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow.parquet as pq
import pytest
from distributed import Client

from curator_embed.datasets import ImageTextPairDataset
from curator_embed.errors import Reason, SourceError, UsageError
from curator_embed.sources.folder import find_images
from tests.rows import assert_embedded, table_rows
from tests.shards import crops
from tests.stub import ColourEmbedder


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with Client(processes=False, n_workers=1, threads_per_worker=2, dashboard_address=None) as client:
        yield client


def fill(folder: Path, contents: dict[str, bytes]) -> Path:
    for name, data in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def test_what_is_found_and_in_which_order(tmp_path: Path) -> None:
    folder = fill(
        tmp_path / "photos",
        {
            "10.JPG": b"ten", "2.png": b"two", "2.txt": b"a caption\n", "2.json": b'{"license": "CC0", "path": 7}',
            "a/b.c/x.y.webp": b"deep", "a/b.c/x.y.txt": "ünï".encode(), "a/x.txt": b"of no image", "notes.md": b"-",
            ".hidden.jpg": b"-", ".git/y.jpg": b"-", "noend": b"-",
        },
    )  # fmt: skip
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff.gif")).write_bytes(b"bytes")
    first, second = find_images(folder, images_per_file=3)
    assert (first.name, second.name) == ("photos_000000000-000000003", "photos_000000003-000000004")
    samples = [s for shard in (first, second) for s in shard.samples(id_col="path", extras=True)]
    assert {s.key: s.image for s in samples} == {
        "2.png": b"two", "10.JPG": b"ten", "a/b.c/x.y.webp": b"deep", "\\xff.gif": b"bytes"
    }  # fmt: skip
    assert [s.key for s in samples if not s.key.startswith("\\")] == ["2.png", "10.JPG", "a/b.c/x.y.webp"]
    table = first.table_from_extras(list(first.samples(id_col="path", extras=True)))
    assert table is not None and table.column_names == ["path", "caption", "license"]
    assert table.slice(0, 1).to_pylist() == [{"path": "2.png", "caption": "a caption", "license": "CC0"}]
    assert first.keys(id_col="path") == [s.key for s in samples[:3]]
    (stored,) = first.stored_samples({0})
    assert stored.members == (("png", b"two"), ("json", b'{"license": "CC0", "path": 7}'), ("txt", b"a caption\n"))
    assert [s.extras for s in first.samples(id_col="path")] == [{}, {}, {}]


def test_broken_captions_cost_no_row(tmp_path: Path) -> None:
    folder = fill(tmp_path / "p", {"a.jpg": b"a", "a.json": b"{not json", "b.jpg": b"b", "b.txt": b"\xff"})
    (shard,) = find_images(folder)
    table = shard.table_from_extras(list(shard.samples(id_col="path", extras=True)))
    assert table is not None and table["caption"].to_pylist() == [None, "\ufffd"]
    assert "1 captions or json files cannot be read" in shard.notes()[0].message


def test_files_that_go_or_change(tmp_path: Path) -> None:
    folder = fill(tmp_path / "p", {"a.jpg": b"a", "b.jpg": b"b"})
    (shard,) = find_images(folder)
    (folder / "a.jpg").unlink()
    assert [s.error for s in shard.samples(id_col="path")] == [Reason.NOT_FOUND, None]
    with pytest.raises(SourceError, match=r"a\.jpg: cannot be read"):
        list(shard.stored_samples({0, 1}))
    (folder / "b.jpg").unlink()
    assert [s.error for s in shard.samples(id_col="path")] == [Reason.NOT_FOUND, Reason.NOT_FOUND]
    fill(folder, {"a.jpg": b"A", "b.jpg": b"b"})
    os.utime(folder / "b.jpg", ns=(1, 1))
    assert find_images(folder)[0].fingerprint() != shard.fingerprint()
    assert find_images(folder)[0].fingerprint() == find_images(folder)[0].fingerprint()


def test_captions_are_no_images(tmp_path: Path) -> None:
    folder = fill(tmp_path / "photos", {"a.jpg": b"one", "b.jpg": b"two"})
    (before,) = find_images(folder)
    fill(folder, {"a.txt": b"a caption that came later"})
    (after,) = find_images(folder)
    assert after.fingerprint() == before.fingerprint()
    fill(folder, {"b.jpg": b"another"})
    assert find_images(folder)[0].fingerprint() != before.fingerprint()


def test_what_cannot_be_opened_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        find_images(tmp_path / "gone")
    with pytest.raises(UsageError, match="no images there"):
        find_images(tmp_path)
    with pytest.raises(UsageError, match="at least 1"):
        find_images(tmp_path, images_per_file=0)


def test_shards_stay_small(tmp_path: Path) -> None:
    folder = fill(tmp_path / "p", {f"class_{n % 10}/image_{n:06d}.jpg": b"" for n in range(2000)})
    assert len(pickle.dumps(find_images(folder))) / 2000 < 12


def test_folders_behind_a_url() -> None:
    fs = fsspec.filesystem("memory")
    for name, data in {"a/1.jpg": b"1", "a/1.txt": b"one", "2.png": b"2", ".x/3.png": b"3"}.items():
        fs.pipe_file(f"/photos/{name}", data)
    (shard,) = find_images("memory://photos")
    assert {s.key: (s.image, dict(s.extras)) for s in shard.samples(id_col="path", extras=True)} == {
        "2.png": (b"2", {}),
        "a/1.jpg": (b"1", {"txt": "one"}),
    }


def test_a_folder_is_embedded_resumed_and_exported(client: Client, tmp_path: Path, wheel_photos: list[Path]) -> None:
    contents = {f"{n % 2}/{n}.jpg": image for n, image in enumerate(crops(wheel_photos[1], 7))}
    folder = fill(tmp_path / "photos", {**contents, "0/0.txt": b"first", "1/bad.png": b"no image"})
    report = ColourEmbedder()(ImageTextPairDataset.from_folder(folder, 5)).save_metadata(progress=False)
    assert (report.read, report.embedded, report.failed) == (8, 7, 1)
    files = sorted((tmp_path / "photos_metadata").glob("*.parquet"))
    assert [f.name for f in files] == ["photos_000000000-000000005.parquet", "photos_000000005-000000008.parquet"]
    tables = [pq.read_table(f) for f in files]
    assert tables[0].schema.names == tables[1].schema.names == ["path", "caption", "image_embedding", "image_error"]
    assert tables[0]["caption"].to_pylist()[0] == "first"

    again = ImageTextPairDataset.from_folder(folder, 5)
    assert ColourEmbedder()(again).save_metadata(progress=False).shards["skipped"] == 2
    again.metadata["keep"] = again.metadata["image_error"].isnull()
    exported = again.to_webdataset(str(tmp_path / "export"), "keep", progress=False)
    assert exported.exported == 7
    images = {s.image for shard in exported.dataset.shards for s in shard.samples(id_col="key")}
    assert images == set(contents.values())


def test_images_that_changed_get_columns_of_their_own_in_a_new_output(
    client: Client, tmp_path: Path, wheel_photos: list[Path]
) -> None:
    images = crops(wheel_photos[1], 4)
    folder = fill(tmp_path / "photos", {f"{n}.jpg": image for n, image in enumerate(images[:3])})
    ColourEmbedder()(ImageTextPairDataset.from_folder(folder)).save_metadata(progress=False)
    fill(folder, {"0.jpg": images[3]})
    report = ColourEmbedder()(ImageTextPairDataset.from_folder(folder)).save_metadata(
        str(tmp_path / "new"), progress=False
    )
    assert (report.embedded, report.shards["done"]) == (3, 1)
    assert any("its column 'image_embedding' is of another run" in note for note in report.notes)
    assert_embedded(table_rows(tmp_path / "new", "path")["0.jpg"], images[3])
    with pytest.raises(UsageError, match=r"have changed since \(1 of 3, '0\.jpg' is the first\)"):
        ColourEmbedder()(ImageTextPairDataset.from_folder(folder)).save_metadata(progress=False)
