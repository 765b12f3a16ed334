"""From what a user names to shards: folders, globs, lists, pairs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from curator_embed.errors import UsageError
from curator_embed.sources.webdataset import expand_braces, find_shards, pair_files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    names = ("10.tar", "2.tar", "2.parquet", "0.parquet", "0_stats.json", "a/2.tar", "a/2.parquet", "a/3.parquet",
             "out/10.parquet", ".tmp/9.tar")  # fmt: skip
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def found(path: object, base: Path) -> list[tuple[str, str | None, str | None]]:
    shards = find_shards(path)  # type: ignore[arg-type]
    relative = [[p and os.path.relpath(p, base) for p in (s.image_source(), s.table_path())] for s in shards]
    return [(s.name, *r) for s, r in zip(shards, relative, strict=True)]  # type: ignore[misc]


TOP = [("0", None, "0.parquet"), ("2", "2.tar", "2.parquet"), ("10", "10.tar", None)]
BELOW = [("a__2", "a/2.tar", "a/2.parquet"), ("a__3", None, "a/3.parquet")]


def test_a_folder_pairs_by_stem_in_natural_order(folder: Path) -> None:
    # out/ holds parquets and no tars: it is somebody's output.
    assert found(folder, folder) == found(str(folder) + "/", folder) == found(f"file://{folder}", folder) == TOP + BELOW


def test_relative_paths(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert found(".", folder) == TOP + BELOW
    assert found("a", folder) == [("2", "a/2.tar", "a/2.parquet"), ("3", None, "a/3.parquet")]
    assert found("2.tar", folder) == [TOP[1]]


def test_globs_lists_and_single_files(folder: Path) -> None:
    assert found(folder / "*.tar", folder) == TOP[1:]
    assert found(folder / "*.parquet", folder) == TOP[:2]
    assert found(folder / "**" / "2.tar", folder) == [TOP[1], BELOW[0]]
    assert found(folder / "[a]", folder) == [("2", "a/2.tar", "a/2.parquet"), ("3", None, "a/3.parquet")]
    assert found(folder / "2.parquet", folder) == [TOP[1]]
    assert found(folder / "{2,10}.tar", folder) == TOP[1:]
    assert found([folder / "10.tar", folder / "2.tar"], folder) == TOP[1:]
    assert found([folder / "2.tar", folder / "a/2.tar"], folder) == [TOP[1], BELOW[0]]
    assert found([folder / "2.tar", folder / "2.tar", folder / "2.parquet"], folder) == [TOP[1]]


def test_names_with_brackets_and_braces_are_taken_as_they_are(tmp_path: Path) -> None:
    for name in ("a[1].tar", "b{1,2}.tar"):
        (tmp_path / name).write_bytes(b"")
        assert [s.name for s in find_shards(tmp_path / name)] == [name[:-4]]


def test_nothing_there_says_what_was_looked_for(folder: Path) -> None:
    for missing in ("none", "7.tar", "none*.tar", "{5..6}.tar", ""):
        path = folder / missing if missing else folder / "empty"
        if not missing:
            path.mkdir()
        with pytest.raises(UsageError, match=str(path).partition("{")[0].replace("*", r"\*")):
            find_shards(path)
    with pytest.raises(UsageError, match="an empty list"):
        find_shards([])
    with pytest.raises(UsageError, match=r"1 of 3 shards do not exist: .*/1\.tar"):
        find_shards([folder / f"{n}.tar" for n in (1, 2, 10)])


def test_wrong_options(folder: Path) -> None:
    with pytest.raises(UsageError, match="key_split"):
        find_shards(folder, key_split="middle")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="use_index_files"):
        find_shards(folder, use_index_files="yes")  # type: ignore[arg-type]


def test_two_shards_of_one_name() -> None:
    with pytest.raises(UsageError, match="would both be named 'a__b'"):
        pair_files(["d/a__b.tar", "d/a/b.tar"], "d")
    with pytest.raises(UsageError, match="one shard twice"):
        pair_files(["d/a.tar", "d/a.TAR"], "d")


def test_braces() -> None:
    assert expand_braces("x{008..011}y") == ["x008y", "x009y", "x010y", "x011y"]
    assert expand_braces("{2..0}") == ["2", "1", "0"]
    assert expand_braces("{a,b}/{1..2}") == ["a/1", "a/2", "b/1", "b/2"]
    assert expand_braces("{x}{}") == ["{x}{}"]
    assert expand_braces("plain") == ["plain"]


def test_real_folder(clip_tars: list[Path]) -> None:
    shards = find_shards(clip_tars[0].parent)
    assert [shard.name for shard in shards] == ["image1", "image2", "image3", "image4"]
    assert sum(len(shard.keys(id_col="key")) for shard in shards) == 11
