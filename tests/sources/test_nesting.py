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
from curator_embed.sources.nesting import Input, check_output, is_within, reaches, resolved
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
        ("/ds/*.parquet", "/ds", True),
        ("/ds/a.parquet", "/ds", True),
        ("/ds/a.txt", "/ds", False),
        ("/ds/*.parquet", "/ds/out", False),
        ("/ds/*.parq*", "/ds", True),
        ("/ds/*.tar", "/ds", False),
        ("/ds/*", "/ds/out", True),
        ("/ds/*/*.parquet", "/ds/out", True),
        ("/ds/*/*.parquet", "/ds", False),
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
def test_what_a_pattern_comes_to(pattern: str, folder: str, found: bool) -> None:
    assert reaches(pattern, folder) is found


def test_an_export_writes_tars_too() -> None:
    assert not reaches("/ds/*/*.tar", "/ds/out") and reaches("/ds/*/*.tar", "/ds/out", (".parquet", ".tar"))


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
    assert check_output(output, [Input(path, "tars") for path in inputs]) == output


@pytest.mark.parametrize(
    ("output", "given", "words"),
    [
        ("memory://ds", "memory://ds/*.parquet", "the dataset's own folder. .* such as memory:///ds_embedded"),
        ("memory://ds/out", "memory://ds/**", "take it for input. Choose a folder beside it, such as memory:///ds_out"),
        ("/x", "/x/lists/list.txt", "the dataset itself lies in the output folder .*such as /x/embedded"),
        ("/x", "/x/[ab]/*.tar", "the dataset's own folder"),
        ("s3://bucket/out", "s3://bucket/**", "Choose another bucket"),
    ],
)
def test_what_is_refused(output: str, given: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        check_output(output, [Input(given, "tars")])


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


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["wds", "folder", "parquet", "numbered"])
@pytest.mark.parametrize("place", [".", "out", "deep/er", "train"])
def test_a_second_run_never_meets_the_first_ones_output(
    sources: dict[str, tuple[Any, Path]], kind: str, place: str
) -> None:
    """Refused where it would, with nothing changed; else the second run finds all as the first one left it."""
    opened, folder = sources[kind]
    if kind == "wds":
        (folder / "train").mkdir()
        shutil.copy(folder / "00000.tar", folder / "train" / "00000.tar")
    before, rows = contents(folder), ImageHasher(["sha256"])(opened()).save_metadata(f"{folder}_all", progress=False)
    try:
        ImageHasher(["phash"])(opened()).save_metadata(str(folder / place), overwrite=True, progress=False)
    except UsageError as refused:
        assert "the dataset's own folder" in str(refused)
        assert contents(folder) == before and not (folder / "out").exists() and not (folder / "deep").exists()
        taken = True
    else:
        again = ImageHasher(["phash"])(opened()).save_metadata(str(folder / place), progress=False)
        assert (again.read, again.shards["done"], again.shards["failed"]) == (rows.read, 0, 0)
        taken = False
    assert taken is (place == "." or "parquet" in kind or kind == "numbered" or (kind == "wds" and place == "train"))


@pytest.mark.parametrize("kind", ["parquet", "numbered"])
def test_what_an_earlier_version_left_is_moved_as_the_message_says(
    sources: dict[str, tuple[Any, Path]], kind: str
) -> None:
    opened, folder = sources[kind]
    ImageHasher(["phash"])(opened()).save_metadata(str(folder.parent / "left"), progress=False)
    inside = folder / "out"
    with pytest.raises(UsageError, match=f"such as {folder}_out, and move there"):
        ImageHasher(["phash"])(opened()).save_metadata(str(inside), progress=False)
    shutil.move(folder.parent / "left", inside)  # as an earlier version had written it
    shutil.move(inside, f"{folder}_out")
    again = ImageHasher(["phash"])(opened()).save_metadata(f"{folder}_out", progress=False)
    assert (again.read, again.shards["skipped"], again.shards["done"]) == (3, 1, 0)


def test_an_empty_output_is_refused_in_python_too(
    sources: dict[str, tuple[Any, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for save in (
        lambda: ImageHasher(["phash"])(sources["wds"][0]()).save_metadata("", progress=False),
        lambda: ImageHasher(["phash"])(sources["wds"][0]()).plan(" "),
        lambda: ImageTextPairDataset.from_webdataset(str(sources["wds"][1]), metadata_path=""),
        lambda: ImageTextPairDataset.from_webdataset(""),
    ):
        with pytest.raises(UsageError, match="it is empty"):
            save()
    assert not list((tmp_path / "here").iterdir())


def test_an_export_into_the_dataset_is_refused(sources: dict[str, tuple[Any, Path]]) -> None:
    """The next run would find its tars."""
    dataset = sources["wds"][0]()
    dataset.metadata["keep"] = dataset.metadata["key"] != ""
    with pytest.raises(UsageError, match="the dataset's own folder"):
        dataset.to_webdataset(str(sources["wds"][1] / "kept"), "keep", progress=False)
    assert dataset.to_webdataset(f"{sources['wds'][1]}_kept", "keep", progress=False).exported == 3
