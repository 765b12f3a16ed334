"""Where an output may lie: beside the input, never in what is searched for it, and never around it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from curator_embed.columns import ImageHasher
from curator_embed.datasets import ImageTextPairDataset
from curator_embed.errors import UsageError
from curator_embed.sources.nesting import check_output, is_within, reaches, resolved
from tests.shards import crops, write_dataset


@pytest.mark.parametrize(
    ("inner", "outer", "within"),
    [
        ("/a/b", "/a", True),
        ("/a", "/a", True),
        ("/ab", "/a", False),
        ("/a", "/a/b", False),
        ("/a", "/", True),
        ("s3://bucket/a/b", "s3://bucket/a", True),
        ("s3://bucket/ab", "s3://bucket/a", False),
        ("s3://bucket/a", "s3://bucket", True),
        ("s3://bucket2", "s3://bucket", False),
        ("s3://a/b", "gs://a", False),
        ("/a/b", "s3://a", False),
    ],
)
def test_what_lies_below_what(inner: str, outer: str, within: bool) -> None:
    assert is_within(inner, outer) is within


@pytest.mark.parametrize(
    ("pattern", "folder", "found"),
    [
        ("/ds", "/ds", True),
        ("/ds", "/ds/out", True),
        ("/ds", "/ds_out", False),
        ("/ds/out", "/ds", False),  # the other way round: see below
        ("/ds/a.parquet", "/ds", True),
        ("/ds/*/*.parquet", "/ds", False),
        ("/ds/*.parquet", "/ds", True),
        ("/ds/*.parquet", "/ds/out", False),
        ("/ds/*.tar", "/ds", False),  # a pattern for tars finds no parquet
        ("/ds/*", "/ds/out", True),
        ("/ds/*/*.parquet", "/ds/out", True),
        ("/ds/*/*.parquet", "/ds/out/deeper", False),
        ("/ds/**/*.parquet", "/ds/out/deeper", True),
        ("/ds/**", "/ds/out", True),
        ("/ds/{train,val}", "/ds/out", False),
        ("/ds/{train,val}", "/ds/val/out", True),
        ("/ds/{00000..00012}.tar", "/ds/out", False),
        ("/ds/part-[0-9]", "/ds/part-3", True),
        ("s3://bucket/ds/*", "s3://bucket/ds/out", True),
        ("s3://bucket/ds/*.tar", "s3://bucket/ds/out", False),
    ],
)
def test_what_a_search_comes_to(pattern: str, folder: str, found: bool) -> None:
    assert reaches(pattern, folder) is found


def test_locations_are_compared_without_links_and_aliases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    os.symlink(tmp_path / "real", tmp_path / "link")
    monkeypatch.chdir(tmp_path)
    real = os.path.realpath(tmp_path / "real")
    for same in (f"{tmp_path}/link", f"file://{tmp_path}/link/", "link", "./link/../real", f"{tmp_path}/real/"):
        assert resolved(same) == real, same
    assert resolved("link/*.tar") == f"{real}/*.tar"
    assert resolved("link/new/out") == f"{real}/new/out"
    assert resolved("memory://a/b/") == "memory:///a/b"
    assert resolved("s3a://bucket/a/") == resolved("s3://bucket/a") == "s3://bucket/a"


def test_an_empty_path_is_none() -> None:
    for empty in ("", " ", "\n"):
        with pytest.raises(UsageError, match="it is empty"):
            check_output(empty, ())


@pytest.mark.parametrize(
    ("output", "inputs"),
    [
        ("memory://ds/out", ("memory://other",)),
        ("memory://ds_out", ("memory://ds/*.parquet",)),
        ("/x/out", ("memory://x",)),
        ("/x/out", ("/x/{00000..00004}.tar",)),
        ("/x/out", ("/x/*.tar", "/x/list.txt")),
    ],
)
def test_what_is_allowed(output: str, inputs: tuple[str, ...]) -> None:
    assert check_output(output, inputs) == output


@pytest.mark.parametrize(
    ("output", "inputs", "words"),
    [
        ("memory://ds", ("memory://ds/*.parquet",), "the dataset's own folder. .* such as memory:///ds_embedded"),
        (
            "memory://ds/out",
            ("memory://ds/**",),
            "take it for input. Choose a folder beside it, such as memory:///ds_out",
        ),
        ("/x", ("/x/lists/list.txt",), "the dataset itself lies in the output folder .*such as /x/embedded"),
        ("/x", ("/x/[ab]/*.tar",), "the dataset's own folder"),
        ("s3://bucket/out", ("s3://bucket/**",), "Choose another bucket"),
    ],
)
def test_what_is_refused(output: str, inputs: tuple[str, ...], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        check_output(output, inputs)


@pytest.fixture
def sources(tmp_path: Path, wheel_photos: list[Path]) -> dict[str, tuple[Any, Path]]:
    """Kind -> how it is opened, and the folder that is searched."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    write_dataset(tmp_path / "wds", wheel_photos, shards=1, samples=3, missing=0)
    images = crops(wheel_photos[0], 3, size=48)
    for folder in ("folder", "parquet", "numbered"):
        (tmp_path / folder).mkdir()
    for number, image in enumerate(images):
        (tmp_path / "folder" / f"{number}.jpg").write_bytes(image)
    pq.write_table(pa.table({"key": ["a", "b", "c"], "image": images}), tmp_path / "parquet" / "0.parquet")
    pq.write_table(pa.table({"image": images}), tmp_path / "numbered" / "0.parquet")
    kinds: dict[str, Any] = {
        "wds": ImageTextPairDataset.from_webdataset,
        "folder": ImageTextPairDataset.from_folder,
        "parquet": ImageTextPairDataset.from_parquet,
        "numbered": ImageTextPairDataset.from_parquet,
    }
    return {name: (lambda opened=opened, name=name: opened(str(tmp_path / name)), tmp_path / name)
            for name, opened in kinds.items()}  # fmt: skip


@pytest.mark.parametrize("kind", ["wds", "folder", "parquet", "numbered"])
def test_a_second_run_never_meets_the_first_ones_output(sources: dict[str, tuple[Any, Path]], kind: str) -> None:
    """Refused where it would, and done where the message says; what an earlier version left can be moved there."""
    opened, folder = sources[kind]
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for wrong in (folder, folder / "out", folder / "deep" / "er"):
        with pytest.raises(UsageError, match="the dataset's own folder"):
            ImageHasher(["phash"])(opened()).save_metadata(str(wrong), overwrite=True, progress=False)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert not (folder / "out").exists() and not (folder / "deep").exists()
    beside = Path(f"{folder}_out")
    assert ImageHasher(["phash"])(opened()).save_metadata(str(beside), progress=False).shards["done"] == 1
    shutil.move(beside, folder / "out")  # as if an earlier version had allowed it
    shutil.move(folder / "out", beside)
    again = ImageHasher(["phash"])(opened()).save_metadata(str(beside), progress=False)
    assert (again.read, again.shards["skipped"], again.shards["done"]) == (3, 1, 0)
    with pytest.raises(UsageError, match="it is empty"):
        ImageHasher(["phash"])(opened()).save_metadata("", progress=False)


def test_an_export_into_the_dataset_is_refused(sources: dict[str, tuple[Any, Path]]) -> None:
    """The next run would find its tars."""
    dataset = sources["wds"][0]()
    dataset.metadata["keep"] = dataset.metadata["key"] != ""
    with pytest.raises(UsageError, match="the dataset's own folder"):
        dataset.to_webdataset(str(sources["wds"][1] / "kept"), "keep", progress=False)
    assert dataset.to_webdataset(f"{sources['wds'][1]}_kept", "keep", progress=False).exported == 3
