"""Files on disk, in a memory file system and behind a web server, with and without range requests."""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random
from typing import Any

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curator_embed.errors import MissingExtra, Reason, SourceError, UsageError
from curator_embed.sources.webdataset import find_shards, index_tars
from curator_embed.storage.byte_source import open_source, read_all
from curator_embed.storage.files import (
    exists,
    filesystem,
    fingerprint,
    is_folder,
    is_remote,
    join,
    list_files,
    natural_key,
    redact,
    write_whole,
)
from tests.written_tars import image_bytes, tar_bytes


class Server:
    """A web server on loopback with files in memory and bad habits that can be switched on."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.ranges = True
        self.short: set[int] = set()  # numbers of requests that get one byte less than they asked for
        self.broken_from: int | None = None  # offsets from here on answer with status 500
        self.asked: list[tuple[str, str]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, body: bool) -> None:
                wanted = self.headers.get("Range", "")
                path = self.path.partition("?")[0]
                if body:
                    server.asked.append((path, wanted))
                data, status = server.files.get(path), 200
                extra: dict[str, str] = {}
                if data is None:
                    data, status = b"", 404
                elif server.ranges:
                    extra = {"Accept-Ranges": "bytes", "ETag": f'"{len(data)}"'}
                    if wanted:
                        first, _, last = wanted.removeprefix("bytes=").partition("-")
                        start, stop = int(first), min(int(last or len(data)), len(data) - 1)
                        if server.broken_from is not None and start >= server.broken_from:
                            data, status = b"", 500
                        else:
                            extra["Content-Range"] = f"bytes {start}-{stop}/{len(data)}"
                            data, status = data[start : stop + 1], 206
                            if len(server.asked) in server.short:
                                data = data[:-1]
                self.send_response(status)
                for name, value in {**extra, "Content-Length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if body:
                    self.wfile.write(data)

            def log_message(self, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.http.shutdown()
    running.http.server_close()


@pytest.fixture
def bucket() -> Iterator[str]:
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]
    yield "memory://bucket"
    fs.store.clear()


TAR = tar_bytes([(f"{i}.jpg", image_bytes(i) * 30) for i in range(20)])


# --- names ---------------------------------------------------------------------------------------


def test_natural_order() -> None:
    names = ["10.tar", "2.tar", "0.tar", "a/1.tar", "1.tar", "01.tar", "x10y2", "x10y10", "x9"]
    assert sorted(names, key=natural_key) == [
        "0.tar", "01.tar", "1.tar", "2.tar", "10.tar", "a/1.tar", "x9", "x10y2", "x10y10",
    ]  # fmt: skip


@given(st.lists(st.text(max_size=8), max_size=6), st.randoms())
def test_natural_order_is_total(names: list[str], random: Random) -> None:
    shuffled = list(names)
    random.shuffle(shuffled)
    assert sorted(names, key=natural_key) == sorted(shuffled, key=natural_key)


def test_remote_and_join() -> None:
    assert [is_remote(p) for p in ("s3://b/x", "simplecache::s3://b", "/a/b", "file:///a", "~/x")] == [
        True, True, False, False, False,
    ]  # fmt: skip
    assert [join("/a/", "b"), join("s3://b", "c", "d"), join("/", "a")] == ["/a/b", "s3://b/c/d", "/a"]


def test_nothing_secret_is_shown() -> None:
    text = "https://me:pw@host/a.tar?X-Amz-Signature=abc failed, see s3://KEY:SECRET@bucket/x and https://h/b?token=t"
    assert redact(text) == "https://host/a.tar failed, see s3://bucket/x and https://h/b"
    assert redact("http://u:p@ss@h/x@y, s3://a/b@c") == "http://h/x@y, s3://a/b@c"


# --- local ---------------------------------------------------------------------------------------


def test_local_reads(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"0123456789")
    with open_source(f"file://{path}") as source:
        assert source.size == 10
        reads = [source.pread(0, 3), source.pread(8, 100), source.pread(10, 1), source.pread(99, 1), source.pread(2, 0)]
        assert reads == [b"012", b"89", b"", b"", b""]
        assert source.pread(5, -(1 << 70)) == b""
        assert source.pread(5, 1 << 70) == b"56789"


def test_local_errors_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SourceError, match=r"nothing\.tar: does not exist"):
        open_source(str(tmp_path / "nothing.tar"))
    with pytest.raises(SourceError, match="does not exist"):
        fingerprint(str(tmp_path / "nothing.tar"))
    with pytest.raises(SourceError, match="does not exist"):
        list_files(str(tmp_path / "nothing"))
    path = tmp_path / "x.tar"
    path.write_bytes(TAR)

    def failing(fd: int, n: int, offset: int) -> bytes:
        raise OSError(5, "Input/output error")

    with open_source(str(path)) as source:
        monkeypatch.setattr(os, "pread", failing)
        with pytest.raises(SourceError, match=r"x\.tar: cannot be read \(OSError: .*\) at byte 512"):
            source.pread(512, 10)


def test_listing(tmp_path: Path) -> None:
    for name in ("10.tar", "2.TAR", "2.parquet", ".hidden.tar", "sub/1.tar", ".tmp/0.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert list_files(str(tmp_path), ".tar") == [f"{tmp_path}/2.TAR", f"{tmp_path}/10.tar"]
    found = list_files(str(tmp_path), (".tar", ".parquet"), recursive=True)
    assert found == [f"{tmp_path}/{n}" for n in ("2.TAR", "2.parquet", "10.tar", "sub/1.tar")]
    assert len(list_files(str(tmp_path))) == 3


def test_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "x.idx"
    write_whole(str(path), b"one")
    write_whole(str(path), b"two")
    assert path.read_bytes() == read_all(str(path)) == b"two"
    with pytest.raises(SourceError, match="cannot be written"):
        write_whole(str(tmp_path / "missing" / "x.idx"), b"three")
    (tmp_path / "folder").mkdir()
    with pytest.raises(SourceError, match="cannot be written"):
        write_whole(str(tmp_path / "folder"), b"four")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "x.idx"]


# --- remote --------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 220), st.integers(0, 220)), max_size=12), st.integers(1, 64))
def test_blocks_give_what_the_file_holds(reads: list[tuple[int, int]], block: int) -> None:
    data = bytes(range(200))
    fsspec.filesystem("memory").pipe_file("/blocks", data)
    with open_source("memory://blocks", block_bytes=block) as source:
        for offset, n in reads:
            assert source.pread(offset, n) == data[offset : offset + n]


def test_sequential_reading_asks_for_each_block_once(server: Server) -> None:
    server.files["/x"] = bytes(100_000)
    with open_source(f"{server.url}/x", block_bytes=10_000) as source:
        for at in range(0, 100_000, 700):
            source.pread(at, 700)
    asked = [wanted for _, wanted in server.asked if wanted]
    assert asked == [f"bytes={at}-{at + 9_999}" for at in range(0, 100_000, 10_000)]


def test_random_reading_reads_nothing_ahead(server: Server) -> None:
    server.files["/x"] = bytes(100_000)
    with open_source(f"{server.url}/x", block_bytes=10_000) as source:
        for at in (50_000, 20_000, 80_000):
            source.pread(at, 10)
    assert len([wanted for _, wanted in server.asked if wanted]) == 3


def test_a_short_answer_is_asked_for_again(server: Server) -> None:
    server.files["/x"] = os.urandom(5_000)
    server.short = {2}
    with open_source(f"{server.url}/x", block_bytes=1_000) as source:
        assert source.pread(0, 5_000) == server.files["/x"]
    server.short = set(range(100))
    with open_source(f"{server.url}/x") as source, pytest.raises(SourceError, match="ends at byte 4999"):
        source.pread(0, 10)


def test_a_server_without_ranges_is_read_as_a_stream(server: Server) -> None:
    server.ranges = False
    server.files["/0.tar"] = TAR
    (shard,) = find_shards(f"{server.url}/0.tar")
    samples = list(shard.samples(id_col="key"))
    assert [sample.image for sample in samples] == [image_bytes(i) * 30 for i in range(20)]
    with open_source(f"{server.url}/0.tar", block_bytes=4096) as source:
        server.asked.clear()
        assert b"".join(source.pread(at, 1000) for at in range(0, len(TAR), 1000)) == TAR
        assert source.pread(100, 50) == TAR[100:150]
    assert len(server.asked) == 3  # one that shows it, one stream, and one for the way back


def test_a_failure_in_the_middle_names_url_and_offset(server: Server) -> None:
    server.files["/0.tar"] = tar_bytes([(f"{i}.jpg", bytes([i]) * 9_000_000) for i in range(4)])
    server.broken_from = 16 << 20
    (shard,) = find_shards(f"{server.url}/0.tar?signature=secret")
    with pytest.raises(SourceError) as caught:
        list(shard.samples(id_col="key"))
    assert f"at byte {16 << 20}" in str(caught.value)
    assert f"{server.url}/0.tar: cannot be read" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_web_shards(server: Server) -> None:
    for number in range(3):
        server.files[f"/d/{number:02d}.tar"] = TAR
    server.files["/d/01.parquet"] = b"?"
    shards = find_shards(server.url + "/d/{00..02}.tar")
    assert [(s.name, s.table_path()) for s in shards] == [
        ("00", None),
        ("01", f"{server.url}/d/01.parquet"),
        ("02", None),
    ]
    assert shards[0].fingerprint() == {"size": len(TAR), "etag": str(len(TAR))}
    with pytest.raises(UsageError, match=r"1 of 4 shards do not exist: .*/d/03\.tar"):
        find_shards(server.url + "/d/{00..03}.tar")


def test_truncated_remote_tar(bucket: str) -> None:
    fsspec.filesystem("memory").pipe_file("/bucket/0.tar", TAR[: len(TAR) // 2])
    (shard,) = find_shards(bucket)
    samples = list(shard.samples(id_col="key"))
    assert samples[-1].error is Reason.TRUNCATED
    assert all(sample.image == image_bytes(i) * 30 for i, sample in enumerate(samples[:-1]))
    assert f"cut at byte {len(TAR) // 2}" in shard.notes()[0].message


def test_bucket(bucket: str) -> None:
    fs = fsspec.filesystem("memory")
    for name in ("10.tar", "9.tar", "9.parquet", "sub/0.tar", "sub/.tmp/1.tar"):
        fs.pipe_file(f"/bucket/{name}", TAR)
    shards = find_shards(bucket)
    assert [(s.name, s.image_source()) for s in shards] == [
        ("9", "memory:///bucket/9.tar"),
        ("10", "memory:///bucket/10.tar"),
        ("sub__0", "memory:///bucket/sub/0.tar"),
    ]
    assert shards[0].table_path() == "memory:///bucket/9.parquet"
    assert [s.key for s in shards[2].samples(id_col="key")] == [str(i) for i in range(20)]
    assert [s.name for s in find_shards(f"{bucket}/*.tar")] == ["9", "10"]
    assert [s.name for s in find_shards(f"{bucket}/{{9..10}}.tar")] == ["9", "10"]
    assert (exists(f"{bucket}/9.tar"), exists(f"{bucket}/8.tar"), is_folder(bucket)) == (True, False, True)
    before = fingerprint(f"{bucket}/9.tar")
    fs.pipe_file("/bucket/9.tar", TAR + bytes(512))
    assert fingerprint(f"{bucket}/9.tar") != before
    assert index_tars(f"{bucket}/10.tar") == ["memory:///bucket/10.idx"]
    (indexed,) = find_shards(f"{bucket}/10.tar", use_index_files=True)
    assert len(list(indexed.samples(id_col="key"))) == 20
    for looked_for in (f"{bucket}/none", f"{bucket}/none*", f"{bucket}/7.tar"):
        with pytest.raises(UsageError, match=looked_for.removeprefix("memory://").replace("*", r"\*")):
            find_shards(looked_for)


def test_a_deleted_object(bucket: str) -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/bucket/0.tar", TAR)
    (shard,) = find_shards(bucket)
    fs.rm("/bucket/0.tar")
    with pytest.raises(SourceError, match=r"0\.tar: does not exist \(any more\)"):
        list(shard.samples(id_col="key"))


def test_storage_options_reach_the_file_system() -> None:
    seen: list[dict[str, Any]] = []

    class Picky(fsspec.get_filesystem_class("memory")):  # type: ignore[misc]
        protocol = "picky"
        cachable = False

        def __init__(self, **options: Any) -> None:
            seen.append(options)
            super().__init__()

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return str(super()._strip_protocol(path.removeprefix("picky://")))

    fsspec.register_implementation("picky", Picky, clobber=True)
    fsspec.filesystem("memory").pipe_file("/p/0.tar", TAR)
    try:
        (shard,) = find_shards("picky://p", storage_options={"anon": True})
        assert len(list(shard.samples(id_col="key"))) == 20
        shard.fingerprint()
    finally:
        fsspec.filesystem("memory").store.clear()
    assert seen
    assert all(options == {"anon": True} for options in seen)


def test_missing_packages_and_unknown_protocols(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="rubbish"):
        find_shards("rubbish://x/0.tar")
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    with pytest.raises(MissingExtra, match=r"curator-embed\[gcs\]") as missing:
        open_source("gs://bucket/0.tar")
    assert str(pickle.loads(pickle.dumps(missing.value))) == str(missing.value)  # as it comes from a worker


def test_a_place_where_nobody_answers_is_named() -> None:
    with pytest.raises(UsageError, match=r"ftp://127\.0\.0\.1:9/photos: cannot be opened: "):
        filesystem("ftp://127.0.0.1:9/photos")
