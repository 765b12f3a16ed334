"""Path lists whose images a web server has: names that URLs must quote, missing files, and a server that fails."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from curator_embed.errors import Reason
from curator_embed.sources.path_list import find_lines
from curator_embed.storage.objects import ReadPolicy
from tests.faulty_proxy import FaultyProxy

NAMES = ("plain.jpg", "a b.jpg", "a%20b.jpg", "50%.jpg", "x?y=1.jpg", "x#y.jpg", "ünï/日本.jpg", "plus+.jpg")


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    for name in NAMES:
        path = tmp_path / "www" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    running = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "www")))
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    running.server_close()
    thread.join()


def test_names_that_urls_must_quote(server: str, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("".join(f"web/{name}\n" for name in (*NAMES, "bucket/gone.jpg")))
    (shard,) = find_lines(tmp_path / "list.txt", root=server, dataset="web")
    found = list(shard.samples(id_col="path"))
    assert [s.image for s in found] == [*(name.encode() for name in NAMES), None]
    assert found[-1].error == Reason.NOT_FOUND
    assert [s.key for s in found[:-1]] == [f"web/{name}" for name in NAMES]


def test_lines_that_are_urls_are_taken_as_they_are(server: str, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(f"{server}/plain.jpg?signed=1\n{server}/a%20b.jpg\n")
    (shard,) = find_lines(tmp_path / "list.txt")
    assert [s.image for s in shard.samples(id_col="path")] == [b"plain.jpg", b"a b.jpg"]


@pytest.mark.parametrize("fault", ["503", "stall", "cut"])
def test_a_failing_server_is_asked_again(server: str, tmp_path: Path, fault: str) -> None:
    (tmp_path / "list.txt").write_text("plain.jpg\n" * 30)
    policy = ReadPolicy(timeout=0.5, retries=5, backoff=0.01)
    with FaultyProxy(server, lambda n, method, path: fault if n % 4 == 0 else "", stall=1.0) as proxy:  # type: ignore[arg-type,return-value]
        (shard,) = find_lines(tmp_path / "list.txt", root=proxy.url, policy=policy)
        assert [s.image for s in shard.samples(id_col="path")] == [b"plain.jpg"] * 30
        assert proxy.faults >= 7


def test_a_refusal_is_not_asked_again(server: str, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("plain.jpg\n" * 3)
    with FaultyProxy(server, lambda n, method, path: "403") as proxy:  # type: ignore[arg-type,return-value]
        (shard,) = find_lines(tmp_path / "list.txt", root=proxy.url, policy=ReadPolicy(retries=5, backoff=30.0))
        assert [(s.error, s.detail) for s in shard.samples(id_col="path")] == [(Reason.READ_ERROR, "access denied")] * 3
        assert proxy.faults == 3


def test_passwords_in_urls_are_not_shown(server: str, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("gone.jpg\n")
    (shard,) = find_lines(tmp_path / "list.txt", root=server.replace("://", "://me:hunter2@"))
    assert [s.error for s in shard.samples(id_col="path")] == [Reason.NOT_FOUND]
    assert "hunter2" not in str(shard.notes()) + repr(shard) + repr(shard.listed) + str(shard.fingerprint())
