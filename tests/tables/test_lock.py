"""One run at a time, and a dead run blocks nobody."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from curator_embed.errors import UsageError
from curator_embed.storage.location import Location
from curator_embed.tables import lock as lock_module
from curator_embed.tables.bookkeeping import Bookkeeping
from curator_embed.tables.lock import LIFETIME_S, OutputLock, OutputLocked

HOLD = """
import sys, time
from curator_embed.tables.lock import OutputLock
from curator_embed.storage.location import Location
from curator_embed.tables.bookkeeping import Bookkeeping
with OutputLock(Bookkeeping.of(Location.of(sys.argv[1]))):
    print("held", flush=True)
    time.sleep(60)
"""


def beside(folder: Path) -> Path:
    return folder.with_name(folder.name + ".curator_embed")


def book(folder: Path) -> Bookkeeping:
    return Bookkeeping.of(Location.of(str(folder)))


def test_the_second_run_is_told_who_holds_the_output(tmp_path: Path) -> None:
    told = pytest.raises(OutputLocked, match=rf"process {os.getpid()} on {socket.gethostname()}")
    with OutputLock(book(tmp_path)), told:
        OutputLock(book(tmp_path)).__enter__()
    with OutputLock(book(tmp_path)):
        pass
    assert not (beside(tmp_path) / "lock.json").exists()


def test_a_killed_run_does_not_block_the_next(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(OutputLocked, match=f"process {holder.pid}"):
        OutputLock(book(tmp_path)).__enter__()
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with OutputLock(book(tmp_path)) as lock:
        assert json.loads((beside(tmp_path) / "lock.json").read_text())["token"] == lock.token


@pytest.mark.parametrize(("age", "blocked"), [(0.0, True), (LIFETIME_S + 1, False)])
def test_a_lock_of_another_machine_expires(tmp_path: Path, age: float, blocked: bool) -> None:
    folder = beside(tmp_path)
    folder.mkdir()
    content = {"token": "x", "host": "elsewhere", "pid": 1, "expires": time.time() + LIFETIME_S - age}
    (folder / "lock.json").write_text(json.dumps(content))
    lock = OutputLock(book(tmp_path))
    if blocked:
        with pytest.raises(OutputLocked, match="elsewhere"):
            lock.__enter__()
    else:
        with lock:
            pass


def test_object_stores_are_locked_too() -> None:
    folder = Location.of("memory://locked")
    with OutputLock(Bookkeeping.of(folder)), pytest.raises(OutputLocked):
        OutputLock(Bookkeeping.of(folder)).__enter__()


def test_a_store_that_takes_no_lock_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Location.of("memory://denied/out")

    def deny(*args: Any, **kwargs: Any) -> None:
        raise PermissionError("Forbidden")

    monkeypatch.setattr(folder.fs, "pipe_file", deny)
    with pytest.raises(UsageError, match=r"^memory:///?denied/out: cannot write there \(PermissionError: Forbidden\)"):
        OutputLock(Bookkeeping.of(folder)).__enter__()


def test_a_renewal_that_fails_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "RENEW_EVERY_S", 0.01)
    lock = OutputLock(book(tmp_path))
    file = beside(tmp_path) / "lock.json"
    read, failures = lock._read, iter([OSError("stale file handle"), RuntimeError("503")])

    def now_and_then(path: str | None = None) -> dict[str, Any] | None:
        if (failure := next(failures, None)) is not None:
            raise failure
        return read(path)

    with lock:
        first = json.loads(file.read_text())["expires"]
        monkeypatch.setattr(lock, "_read", now_and_then)
        deadline = time.monotonic() + 10
        while json.loads(file.read_text())["expires"] == first and time.monotonic() < deadline:
            time.sleep(0.01)
        assert json.loads(file.read_text())["expires"] > first
        assert not lock.lost.is_set()


def test_a_lock_that_cannot_be_renewed_is_lost_once_it_expires(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "RENEW_EVERY_S", 0.01)
    monkeypatch.setattr(lock_module, "LIFETIME_S", 0.05)
    lock = OutputLock(book(tmp_path))

    def fail() -> bool:
        raise OSError("gone")

    monkeypatch.setattr(lock, "_renew_once", fail)
    with lock:
        assert lock.lost.wait(10)


def test_a_process_number_of_another_container_says_nothing(tmp_path: Path) -> None:
    folder = beside(tmp_path)
    content = {"token": "x", "host": socket.gethostname(), "pid": 2**22, "process_started": 0.0}
    for scope, blocked in ((lock_module._pid_scope(), False), ("another boot pid:[1]", True)):
        folder.mkdir(exist_ok=True)
        (folder / "lock.json").write_text(json.dumps({**content, "pid_scope": scope, "expires": time.time() + 60}))
        if blocked:
            with pytest.raises(OutputLocked, match=socket.gethostname()):
                OutputLock(book(tmp_path)).__enter__()
        else:
            with OutputLock(book(tmp_path)):
                pass
