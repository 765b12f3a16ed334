"""Datasets on the Hugging Face hub, through a stand-in with huggingface_hub's file system interface."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from distributed import Client
from fsspec.spec import AbstractFileSystem

from curator_embed.datasets import ImageTextPairDataset
from curator_embed.errors import UsageError
from tests.shards import crops, write_dataset
from tests.stub import ColourEmbedder


class StandIn(AbstractFileSystem):
    """What HfFileSystem tells and takes: no etag but a ``blob_id``, no time, paths without a leading slash."""

    protocol = "hf"
    root_marker = ""
    stored: dict[str, bytes] = {}  # noqa: RUF012
    tokens: list[Any] = []  # noqa: RUF012

    def __init__(self, *args: Any, endpoint: str | None = None, token: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tokens.append(token)

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        path = self._strip_protocol(path)
        if path in self.stored:
            data = self.stored[path]
            blob = f"{hash(data):x}"
            return {"name": path, "size": len(data), "type": "file", "blob_id": blob, "lfs": None, "last_commit": None}
        if any(name.startswith(f"{path}/") for name in self.stored):
            return {"name": path, "size": 0, "type": "directory", "tree_id": None, "last_commit": None}
        raise FileNotFoundError(path)

    def ls(self, path: str, detail: bool = True, refresh: bool = False, **kwargs: Any) -> list[Any]:
        path = self._strip_protocol(path).rstrip("/")
        self.info(path)
        below = {
            f"{path}/" + name[len(path) + 1 :].split("/")[0] for name in self.stored if name.startswith(f"{path}/")
        }
        return [self.info(name) if detail else name for name in sorted(below or {path})]

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> io.BytesIO:
        assert mode == "rb"
        self.info(path)
        return io.BytesIO(self.stored[path])

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        path = self._strip_protocol(path)
        self.info(path)
        return self.stored[path][start:end]


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with Client(processes=False, n_workers=1, threads_per_worker=2, dashboard_address=None) as client:
        yield client


@pytest.fixture
def hub(tmp_path: Path, wheel_photos: list[Path]) -> Iterator[dict[str, bytes]]:
    images = crops(wheel_photos[0], 6)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    repo = "datasets/someone/photos"
    for split, part in (("train", images[:4]), ("test", images[4:])):
        rows = pa.array([{"bytes": image, "path": f"{n}.jpg"} for n, image in enumerate(part)], kind)
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"image": rows, "label": range(len(part))}), sink)
        StandIn.stored[f"{repo}/data/{split}-00000-of-00001.parquet"] = sink.getvalue().to_pybytes()
    for number, image in enumerate(images):
        StandIn.stored[f"{repo}/raw/{number}.jpg"] = image
    StandIn.stored[f"{repo}/README.md"] = b"# photos"
    for path in write_dataset(tmp_path / "wds", wheel_photos, shards=1, samples=4).iterdir():
        StandIn.stored[f"datasets/someone/tars/{path.name}"] = path.read_bytes()
    real = fsspec.get_filesystem_class("hf")
    fsspec.register_implementation("hf", StandIn, clobber=True)
    yield StandIn.stored
    fsspec.register_implementation("hf", real, clobber=True)
    StandIn.stored.clear()
    StandIn.tokens.clear()


def test_the_stand_in_has_the_interface_of_the_real_one() -> None:
    real = huggingface_hub.HfFileSystem
    assert (real.root_marker, real.protocol) == (StandIn.root_marker, StandIn.protocol)
    for name in ("info", "ls", "cat_file", "_open"):
        assert callable(getattr(real, name))


def test_parquet_of_a_dataset_by_name(client: Client, hub: dict[str, bytes], tmp_path: Path) -> None:
    def dataset() -> ImageTextPairDataset:
        return ImageTextPairDataset.from_parquet(
            "hf://datasets/someone/photos", storage_options={"token": "hf_hunter2"}
        )

    report = ColourEmbedder()(dataset()).save_metadata(str(tmp_path / "out"), progress=False)
    assert (report.read, report.embedded) == (6, 6)
    names = sorted(path.name for path in (tmp_path / "out").glob("*.parquet"))
    assert names == ["data__test-00000-of-00001.parquet", "data__train-00000-of-00001.parquet"]
    assert pq.read_table(tmp_path / "out" / names[1])["label"].to_pylist() == [0, 1, 2, 3]
    assert ColourEmbedder()(dataset()).save_metadata(str(tmp_path / "out"), progress=False).shards["skipped"] == 2
    assert "hf_hunter2" in StandIn.tokens
    assert not any(b"hf_hunter2" in path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())

    # The hub tells content by git's id: a changed file is seen although it has neither etag nor time.
    path = "datasets/someone/photos/data/test-00000-of-00001.parquet"
    table = pq.read_table(io.BytesIO(hub[path]))
    sink = pa.BufferOutputStream()
    pq.write_table(table.take([1, 0]), sink)
    hub[path] = sink.getvalue().to_pybytes()
    with pytest.raises(UsageError, match="images that have changed"):
        ColourEmbedder()(dataset()).save_metadata(str(tmp_path / "out"), progress=False)


def test_globs_folders_lists_and_tars(client: Client, hub: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("".join(f"photos/{n}.jpg\n" for n in range(7)))
    root = "hf://datasets/someone/photos"
    for name, dataset, embedded in (
        ("glob", ImageTextPairDataset.from_parquet(f"{root}/data/train-*.parquet"), 4),
        ("folder", ImageTextPairDataset.from_folder(f"{root}/raw"), 6),
        ("list", ImageTextPairDataset.from_path_list(tmp_path / "list.txt", f"{root}/raw", "photos"), 6),
        ("tars", ImageTextPairDataset.from_webdataset("hf://datasets/someone/tars"), 4),
    ):
        report = ColourEmbedder()(dataset).save_metadata(str(tmp_path / name), progress=False)
        assert report.embedded == embedded, name


def test_a_dataset_that_is_not_there(hub: dict[str, bytes]) -> None:
    with pytest.raises(UsageError, match=r"hf://datasets/nobody/nothing: no \*\.parquet there"):
        ImageTextPairDataset.from_parquet("hf://datasets/nobody/nothing")


@pytest.mark.parametrize("with_ids", [True, False])
def test_names_of_classes_stay(client: Client, tmp_path: Path, wheel_photos: list[Path], with_ids: bool) -> None:
    """What ``datasets`` wrote, it reads with the same features, and the new columns as what they are."""
    import datasets

    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    rows: dict[str, Any] = {
        "image": [{"bytes": image, "path": None} for image in crops(wheel_photos[0], 3, size=32)],
        "label": [0, 1, 0],
    }
    if with_ids:
        features, rows = {"key": datasets.Value("string"), **features}, {"key": list("abc"), **rows}
    (tmp_path / "data").mkdir()
    written = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    written.to_parquet(str(tmp_path / "data" / "0.parquet"))

    ColourEmbedder()(ImageTextPairDataset.from_parquet(tmp_path / "data")).save_metadata(
        str(tmp_path / "out"), progress=False
    )
    read = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "out" / "0.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert read.column_names == ["key", "label", "image_embedding", "image_error"]
    assert read.features["label"] == features["label"]
    assert read.features["label"].int2str(read["label"][:]) == ["cat", "dog", "cat"]
    assert read.features["image_embedding"] == datasets.List(datasets.Value("float32"))

    if with_ids:  # in place the images stay as well
        ColourEmbedder()(ImageTextPairDataset.from_parquet(tmp_path / "data")).save_metadata(progress=False)
        read = datasets.load_dataset(
            "parquet", data_files=str(tmp_path / "data" / "0.parquet"), split="train", cache_dir=str(tmp_path / "cache")
        )
        assert {name: read.features[name] for name in features} == features
        assert read[0]["image"].size == (32, 32) and len(read[0]["image_embedding"]) > 0
