"""Path lists: cutting them into ranges, lines of every kind, and samples from disk."""

from __future__ import annotations

import hashlib
import os
import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curator_embed.errors import Reason, SourceError, UsageError
from curator_embed.sources import path_list
from curator_embed.sources.path_list import PathListShard, find_lines, index_lines
from curator_embed.storage.gate import Gate, Unread
from curator_embed.storage.objects import ReadPolicy, read_many


class Bytes:
    """A ByteSource of bytes in memory."""

    def __init__(self, data: bytes) -> None:
        self.data, self.size = data, len(data)

    def pread(self, offset: int, n: int) -> bytes:
        return self.data[offset : offset + n]


def written(folder: Path, lines: bytes, name: str = "laion.txt") -> Path:
    path = folder / name
    path.write_bytes(lines)
    return path


@settings(max_examples=300, deadline=None)
@given(
    data=st.binary(max_size=60).map(lambda b: bytes(0x0A if c % 3 == 0 else c for c in b)),
    per_range=st.integers(1, 7),
    start=st.integers(0, 12),
    length=st.one_of(st.none(), st.integers(1, 20)),
    chunk=st.integers(1, 9),
)
def test_ranges_are_those_of_a_list_in_memory(data: bytes, per_range: int, start: int, length: int | None, chunk: int):
    end = None if length is None else start + length
    lines = [line + b"\n" for line in data.split(b"\n")]
    lines[-1] = lines[-1][:-1]
    if not lines[-1]:
        lines.pop()
    wanted = []
    stop = len(lines) if end is None else min(end, len(lines))
    for first in range(start, stop, per_range):
        after = min(first + per_range, stop)
        piece = b"".join(lines[first:after])
        offset = len(b"".join(lines[:first]))
        digest = hashlib.blake2b(piece, digest_size=16).hexdigest()
        wanted.append(path_list.LineRange(first, after, offset, offset + len(piece), digest))
    before, path_list.SCAN_BYTES = path_list.SCAN_BYTES, chunk
    try:
        assert index_lines(Bytes(data), per_range, start, end) == wanted  # type: ignore[arg-type]
    finally:
        path_list.SCAN_BYTES = before


def test_lines_of_every_kind(tmp_path: Path) -> None:
    images = tmp_path / "images"
    (images / "a").mkdir(parents=True)
    (images / "a" / "one.jpg").write_bytes(b"one")
    (images / "a b.jpg").write_bytes(b"blank")
    (images / "ünï.jpg").write_bytes(b"unicode")
    Path(os.fsdecode(os.fsencode(images) + b"/\xff.jpg")).write_bytes(b"not utf-8")
    (images / "folder").mkdir()
    os.mkfifo(images / "pipe.jpg")
    lines = (
        b"\xef\xbb\xbflaion/a/one.jpg\r\nlaion/a b.jpg\n\nlaion/\xc3\xbcn\xc3\xaf.jpg\nlaion/\xff.jpg\n"
        b"laion/gone.jpg\nlaion/folder\nlaion/pipe.jpg\nlaion/a\x00b.jpg\n \nlaion/a/one.jpg"
    )
    (shard,) = find_lines(written(tmp_path, lines), root=images, dataset="laion")
    found = list(shard.samples(id_col="path"))
    assert [(s.key, s.image, s.error) for s in found] == [
        ("laion/a/one.jpg", b"one", None),
        ("laion/a b.jpg", b"blank", None),
        ("", None, None),
        ("laion/ünï.jpg", b"unicode", None),
        ("laion/\\xff.jpg", b"not utf-8", None),
        ("laion/gone.jpg", None, Reason.NOT_FOUND),
        ("laion/folder", None, Reason.READ_ERROR),
        ("laion/pipe.jpg", None, Reason.READ_ERROR),
        ("laion/a\x00b.jpg", None, Reason.NOT_FOUND),
        (" ", None, Reason.NOT_FOUND),
        ("laion/a/one.jpg", b"one", None),
    ]
    assert shard.keys(id_col="path") == [s.key for s in found]
    assert shard.row_estimate() == len(found)
    assert shard.name == "laion_000000000-000000011"
    stored = {s.ordinal: s.members for s in shard.stored_samples({0, 2, 4, 5, 10})}
    assert stored == {0: (("jpg", b"one"),), 2: (), 4: (("jpg", b"not utf-8"),), 5: (), 10: (("jpg", b"one"),)}
    with pytest.raises(SourceError, match=r"pipe\.jpg: cannot be read"):
        list(shard.stored_samples({7}))


def test_names_and_ranges(tmp_path: Path) -> None:
    listing = written(tmp_path, b"".join(b"d/%d.jpg\n" % n for n in range(10)))
    names = [shard.name for shard in find_lines(listing, dataset="d", start_line=2, end_line=9, images_per_file=4)]
    assert names == ["d_000000002-000000006", "d_000000006-000000009"]
    assert [s.keys(id_col="path") for s in find_lines(listing, start_line=8)] == [["d/8.jpg", "d/9.jpg"]]
    assert find_lines(listing, end_line=400)[-1].lines.end == 10
    for wrong, message in (
        ({"start_line": 10}, "has no line 10"),
        ({"start_line": 5, "end_line": 5}, "no lines lie between"),
        ({"images_per_file": 0}, "at least 1"),
        ({"dataset": "a/b"}, "without '/'"),
    ):
        with pytest.raises(UsageError, match=message):
            find_lines(listing, **wrong)
    with pytest.raises(UsageError, match="empty"):
        find_lines(written(tmp_path, b"", "empty.txt"))
    with pytest.raises(UsageError, match="no such file"):
        find_lines(tmp_path / "nowhere.txt")


def test_lines_without_a_root_begin_at_the_list(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(b"x")
    (shard,) = find_lines(written(tmp_path, f"x.jpg\n{tmp_path}/x.jpg\nfile://{tmp_path}/x.jpg\n".encode()))
    assert [s.image for s in shard.samples(id_col="path")] == [b"x"] * 3


def test_a_changed_list_is_not_believed(tmp_path: Path) -> None:
    listing = written(tmp_path, b"a.jpg\nb.jpg\n")
    first, second = find_lines(listing, images_per_file=1)
    listing.write_bytes(b"a.jpg\nc.jpg\n")
    assert first.keys(id_col="path") == ["a.jpg"]
    with pytest.raises(SourceError, match="changed since it was opened"):
        second.keys(id_col="path")
    again = find_lines(listing, images_per_file=1)
    assert again[0].fingerprint() == first.fingerprint()
    assert again[1].fingerprint() != second.fingerprint()


def test_a_missing_root_is_an_error_and_missing_images_are_rows(tmp_path: Path) -> None:
    listing = written(tmp_path, b"a.jpg\nb.jpg\n")
    with pytest.raises(UsageError, match="gone: no such folder"):
        find_lines(listing, root=tmp_path / "gone")
    (tmp_path / "going").mkdir()
    (opened,) = find_lines(listing, root=tmp_path / "going")
    (tmp_path / "going").rmdir()
    with pytest.raises(SourceError, match="no such folder"):
        list(opened.samples(id_col="path"))
    (shard,) = find_lines(listing, root=tmp_path)
    assert [s.error for s in shard.samples(id_col="path")] == [Reason.NOT_FOUND] * 2
    assert "not one image is there" in shard.notes()[0].message


def test_shards_are_small_and_keep_secrets(tmp_path: Path) -> None:
    listing = written(tmp_path, b"a.jpg\n" * 5000)
    shards = find_lines(listing, images_per_file=5, storage_options={"secret": "hunter2"})
    assert len(pickle.dumps(shards)) / len(shards) < 300
    assert "hunter2" not in repr(shards[0]) + repr(shards[0].listed) + str(shards[0].fingerprint())
    assert isinstance(pickle.loads(pickle.dumps(shards[0])), PathListShard)


def test_reads_keep_their_order_and_their_bounds(tmp_path: Path) -> None:
    for n in range(40):
        (tmp_path / f"{n}").write_bytes(bytes([n]) * 1000)
    asked: list[int] = []
    gate = Gate.of_root(str(tmp_path))

    def paths():
        for n in range(60):
            asked.append(n)
            yield gate.below(f"{n}")

    reads = read_many(paths(), policy=ReadPolicy(threads=2, buffered_bytes=10_000_000))
    first = next(reads)
    assert first == bytes([0]) * 1000
    assert len(asked) <= 9
    rest = list(reads)
    assert rest[:39] == [bytes([n]) * 1000 for n in range(1, 40)]
    assert all(isinstance(r, Unread) and r.reason == Reason.NOT_FOUND for r in rest[39:])


def test_reads_through_file_systems_of_both_kinds(tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for n in range(20):
        memory.pipe_file(f"/many/{n}.jpg", b"%d" % n)
    gate = Gate.of_root("memory://many")
    answers = list(read_many([gate.below(f"{n}.jpg") for n in range(21)], policy=ReadPolicy(retries=0)))
    assert answers[:20] == [b"%d" % n for n in range(20)]
    assert isinstance(answers[20], Unread)
    with pytest.raises(UsageError):
        list(read_many([Gate.of_root("nosuch://x").below("y")]))
