"""DALI's index files: read, written, believed only when they fit."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curator_embed.errors import SourceError, UsageError
from curator_embed.sources.idx import BadIndex, format_index, parse_index, read_index
from curator_embed.sources.idx import index_tar as index_one
from curator_embed.sources.tar import Member
from curator_embed.sources.webdataset import WebdatasetShard, find_shards, index_tars
from curator_embed.storage.byte_source import open_source
from tests.written_tars import image_bytes

MakeTar = Callable[..., str]
WEBDATASET = [
    (f"{i:04d}.{ext}", image_bytes(i) if ext == "jpg" else b"caption") for i in range(6) for ext in ("jpg", "txt")
]

words = st.text(st.characters(codec="utf-8", exclude_characters="/.\0"), min_size=1, max_size=20).filter(
    lambda text: text.split() == [text]
)
members = st.builds(
    lambda stem, ext, block, size: Member(f"{stem}.{ext}", block * 512, size),
    words,
    words,
    st.integers(1, 10**9),
    st.integers(0, 10**12),
)
samples_strategy = st.lists(st.lists(members, min_size=1, max_size=4), max_size=5)


def age(path: str, seconds: int) -> None:
    stat = os.stat(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + seconds * 10**9))


@given(samples_strategy)
def test_round_trip(samples: list[list[Member]]) -> None:
    parsed = parse_index(format_index(samples))
    assert [[Member(e.name or "", e.offset, e.size) for e in sample] for sample in parsed.samples] == samples
    assert all(e.extension == (e.name or "").partition(".")[2] for sample in parsed.samples for e in sample)


def test_white_space_in_a_name_makes_version_1_1() -> None:
    text = format_index([[Member("a b.jpg", 512, 3), Member("a b.txt", 1536, 0)]])
    assert text == "v1.1 1\njpg 512 3 txt 1536 0\n"
    assert not parse_index(text).named
    with pytest.raises(ValueError, match=r"extension of 'a\.b c'"):
        format_index([[Member("a.b c", 512, 3)]])


def test_extension_is_all_behind_the_first_dot() -> None:
    assert format_index([[Member("x/img.001.JPG", 512, 7)]]) == "v1.2 1\n001.JPG 512 7 x/img.001.JPG\n"


@pytest.mark.parametrize(
    "text", ["", "v1.3 0\n", "v1.2\n", "v1.2 2\njpg 512 3 a.jpg\n", "v1.2 1\njpg 512 3\n", "v1.1 1\njpg x 3\n",
             "v1.1 1\njpg -512 3\n", "v1.2 1\njpg 512 3 a b.jpg\n", "v1.1 ²\n", "\x00\x01\x02"]
)  # fmt: skip
def test_broken_indexes(text: str) -> None:
    with pytest.raises(BadIndex):
        parse_index(text)


@given(st.text(max_size=200))
def test_arbitrary_text_raises_only_bad_index(text: str) -> None:
    for start in ("", "v1.1 1\n", "v1.2 1\n"):
        with suppress(BadIndex):
            parse_index(start + text)


@pytest.mark.parametrize("fmt", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_index_of_a_tar_is_fresh_and_changes_nothing(make_tar: MakeTar, fmt: int) -> None:
    path = make_tar([*WEBDATASET, ("folder/" * 12 + "0123456789" * 2 + ".jpg", image_bytes(9))], fmt=fmt)
    without = list(WebdatasetShard("0", path, use_index=False).samples(id_col="key"))
    assert index_tars(path) == [path.replace(".tar", ".idx")]
    assert index_tars(path) == []  # it has one now
    assert len(index_tars(path, overwrite=True)) == 1
    for use in ("auto", True):
        shard = WebdatasetShard("0", path, use_index=use)
        assert list(shard.samples(id_col="key")) == without
        assert shard.row_estimate() == 7
        assert use is True or shard.notes() == []
    assert not [p for p in Path(path).parent.iterdir() if p.suffix not in (".tar", ".idx")]


def test_a_complete_index_spares_the_headers(make_tar: MakeTar, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_tar(WEBDATASET)
    expected = list(WebdatasetShard("0", path).samples(id_col="key"))
    index_one(path)
    monkeypatch.setattr("curator_embed.sources.tar.TarScan.__iter__", lambda self: iter(()))
    assert list(WebdatasetShard("0", path).samples(id_col="key")) == expected


@pytest.mark.parametrize("version", ["v1.1", "v1.2"])
def test_a_subset_filters_only_when_asked_to(make_tar: MakeTar, version: str) -> None:
    path = make_tar(WEBDATASET)
    index = Path(index_one(path))
    lines = index.read_text().splitlines()
    kept = [lines[5], lines[2]]  # in another order than the tar's: an index filters, it does not sort
    if version == "v1.1":
        kept = [" ".join(w for i, w in enumerate(line.split()) if i % 4 != 3) for line in kept]
    index.write_text("\n".join([f"{version} 2", *kept]) + "\n")
    everything = WebdatasetShard("0", path)
    assert len(list(everything.samples(id_col="key"))) == 6
    filtered = WebdatasetShard("0", path, use_index=True)
    assert [s.key for s in filtered.samples(id_col="key")] == ["0001", "0004"]
    assert "2 samples, 4 members" in filtered.notes()[0].message
    assert filtered.keys(id_col="key") == ["0001", "0004"]
    assert filtered.pairing("key") != everything.pairing("key")
    assert [s.members for s in filtered.stored_samples([1])] == [(("jpg", image_bytes(4)), ("txt", b"caption"))]


@pytest.mark.parametrize("use", ["auto", True])
def test_stale_and_broken_indexes_are_told_and_not_used(make_tar: MakeTar, use: object) -> None:
    path = make_tar(WEBDATASET)
    index = Path(index_one(path))
    good = index.read_text()

    def outcome(text: str | bytes) -> str:
        index.write_bytes(text if isinstance(text, bytes) else text.encode())
        shard = WebdatasetShard("0", path, use_index=use)  # type: ignore[arg-type]
        assert len(list(shard.samples(id_col="key"))) == 6
        assert len(shard.notes()) == 1
        return shard.notes()[0].message

    assert "unknown version" in outcome("rubbish")
    assert "not text" in outcome(b"\xff\xfe\x00")
    assert "lists 5" in outcome(good.rsplit("\n", 2)[0] + "\n")
    assert "does not fit a tar" in outcome(good.replace(" 512 ", " 51200000 "))
    assert "does not fit a tar" in outcome(good.replace(" 512 ", " 513 "))
    assert "is '0000.jpg'" in outcome(good.replace("0000.jpg", "other.jpg"))
    assert "no header" in outcome(good.replace(" 512 ", " 1024 "))
    index.write_text(good)
    age(str(index), -100)
    shard = WebdatasetShard("0", path, use_index=use)  # type: ignore[arg-type]
    assert len(list(shard.samples(id_col="key"))) == 6
    assert "older than its tar" in shard.notes()[0].message
    assert shard.row_estimate() is None


def test_index_of_a_truncated_tar_is_stale(make_tar: MakeTar) -> None:
    path = make_tar(WEBDATASET)
    index_one(path)
    whole = Path(path).read_bytes()
    Path(path).write_bytes(whole[:6000])
    age(path, -100)
    shard = WebdatasetShard("0", path)
    assert len(list(shard.samples(id_col="key"))) == 3
    assert any("does not fit a tar of 6000 bytes" in note.message for note in shard.notes())


def test_index_tars_finishes_the_others_before_it_fails(make_tar: MakeTar, tmp_path: Path) -> None:
    for number in range(3):
        make_tar(WEBDATASET, f"{number}.tar")
    (tmp_path / "1.tar").write_bytes((tmp_path / "1.tar").read_bytes()[:2000])
    with pytest.raises(SourceError, match=r"1\.tar: cut at byte 2000, inside a header"):
        index_tars(tmp_path)
    assert sorted(p.name for p in tmp_path.glob("*.idx")) == ["0.idx", "2.idx"]
    with pytest.raises(UsageError):
        index_tars(tmp_path / "none")


def test_names_no_index_can_express(make_tar: MakeTar) -> None:
    with pytest.raises(SourceError, match="holds white space"):
        index_one(make_tar([("a.some text", b"")]))


def test_nothing_beside_the_tar(make_tar: MakeTar) -> None:
    path = make_tar(WEBDATASET)
    with open_source(path) as source:
        assert read_index(path, source) is None
    assert find_shards(path, use_index_files=True)[0].row_estimate() is None


def test_dali_reads_what_is_written(make_tar: MakeTar) -> None:
    from nvidia.dali import fn, pipeline_def

    path = make_tar([*WEBDATASET, ("folder/with.dots.jpg", image_bytes(9))])
    index = index_one(path)

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def pipeline() -> object:
        return fn.readers.webdataset(paths=[path], index_paths=[index], ext=["jpg;dots.jpg"])

    built = pipeline()
    built.build()
    read = [bytes(built.run()[0].at(0)) for _ in range(7)]
    assert read == [image_bytes(i) for i in (*range(6), 9)]
