"""One run at a time holds a dataset's output.

The lock is a small file with an owner and an expiry in the output's bookkeeping. A run that was killed does
not block the next: on the same machine its process is seen to be gone, elsewhere its lock expires.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import threading
import time
from contextlib import suppress
from typing import Any

import psutil

from curator_embed.errors import CuratorEmbedError, UsageError
from curator_embed.storage.files import redact
from curator_embed.tables.bookkeeping import Bookkeeping

LIFETIME_S = 120.0
RENEW_EVERY_S = 20.0


class OutputLocked(CuratorEmbedError):
    """Another run is writing to this output; the message says who and until when."""


class OutputLock:
    """Hold a folder's lock for the length of a ``with`` block, renewing it in the background."""

    def __init__(self, book: Bookkeeping, part: str = "") -> None:
        """
        Args:
            part: ``Shard.part`` of what is written: runs whose parts do not overlap hold one folder together.
        """
        self.book = book
        self.file = book.file(f"lock-{part}.json" if part else "lock.json")
        self.part = part
        self.token = secrets.token_hex(8)
        self.lost = threading.Event()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> OutputLock:
        try:
            return self._take()
        except CuratorEmbedError:
            raise
        except Exception as error:  # every file system has exceptions of its own
            raise UsageError(
                f"{self._folder}: cannot write there ({type(error).__name__}: {redact(str(error))}). Choose another "
                "output path, or check the connection, the credentials and the permissions for it; nothing was computed"
            ) from error

    @property
    def _folder(self) -> str:
        """The locked folder, for people."""
        folder = self.book.folder
        return redact(folder.path if folder.is_local else folder.fs.unstrip_protocol(folder.path))

    def _take(self) -> OutputLock:
        self._refuse_former()
        for _ in range(3):
            if self._create():
                self._refuse_overlap()
                self._thread = threading.Thread(target=self._renew, name="output-lock", daemon=True)
                self._thread.start()
                return self
            owner = self._read()
            if owner is not None and _alive(owner):
                raise _locked(self._folder, owner)
            self._remove(owner)
        raise OutputLocked(f"{self.file.path}: could not be taken; another run is starting on the same output.")

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._give_back()

    def _refuse_former(self) -> None:
        """A run of version 0.1.0 that is still going has its lock where that version kept it."""
        former = self.book.former
        if former is not None and (owner := self._read(f"{former.path}/lock.json")) is not None and _alive(owner):
            raise _locked(self._folder, owner)

    def _refuse_overlap(self) -> None:
        """After taking the own lock: of two runs that begin at once, at least one sees the other."""
        for path in self.file.fs.ls(self.file.parent, detail=False, refresh=True):
            name = path.rpartition("/")[2]
            if not (name.startswith("lock") and name.endswith(".json")) or name == self.file.path.rpartition("/")[2]:
                continue
            other = self._read(path)
            if other is not None and _alive(other) and parts_overlap(self.part, name[5:-5]):
                self._give_back()
                raise _locked(self._folder, other)

    def _give_back(self) -> None:
        owner = self._read()
        if owner is not None and owner.get("token") == self.token:
            with suppress(OSError):
                self.file.fs.rm_file(self.file.path)
            self.book.discard_if_empty()

    def _content(self) -> bytes:
        now = time.time()
        me = psutil.Process()
        content = {
            "token": self.token,
            "host": socket.gethostname(),
            "pid": me.pid,
            "pid_scope": _pid_scope(),
            "process_started": me.create_time(),
            "started": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now)),
            "expires": now + LIFETIME_S,
        }
        return json.dumps(content).encode()

    def _create(self) -> bool:
        """Create the file if nobody has; False when it exists."""
        self.book.make()
        if self.file.is_local:
            # Written aside and linked into place: a reader never sees half a lock, and only one link succeeds.
            aside = f"{self.file.path}.{self.token}"
            try:
                with open(aside, "wb") as file:
                    file.write(self._content())
            except FileNotFoundError:  # a run that gave its lock back has taken the empty folder along
                return False
            try:
                os.link(aside, self.file.path)
            except FileExistsError:
                return False
            finally:
                os.unlink(aside)
            return True
        if self._read() is not None:
            return False
        try:
            self.file.fs.pipe_file(self.file.path, self._content(), mode="create")
        except FileExistsError:
            return False
        except (TypeError, NotImplementedError, ValueError):
            self.file.fs.pipe_file(self.file.path, self._content())
        owner = self._read()
        return owner is not None and owner.get("token") == self.token

    def _read(self, path: str | None = None) -> dict[str, Any] | None:
        try:
            if not self.file.is_local:
                self.file.fs.invalidate_cache()
            value = json.loads(self.file.fs.cat_file(path or self.file.path))
            return value if isinstance(value, dict) else {}
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, RecursionError):
            return {}

    def _remove(self, seen: dict[str, Any] | None) -> None:
        """Remove a dead run's lock, unless another run was faster."""
        current = self._read()
        if current is not None and current == seen:
            with suppress(FileNotFoundError):
                self.file.fs.rm_file(self.file.path)

    def _renew(self) -> None:
        """Renew until the run ends; what goes wrong once is tried again for as long as the lock holds."""
        renewed = time.monotonic()
        while not self._stop.wait(RENEW_EVERY_S):
            try:
                if not self._renew_once():
                    break
                renewed = time.monotonic()
            except Exception:  # every file system has exceptions of its own
                if time.monotonic() - renewed >= LIFETIME_S:
                    break
        else:
            return
        self.lost.set()

    def _renew_once(self) -> bool:
        """Move the expiry; False when the lock is somebody else's by now."""
        owner = self._read()
        if owner is None or owner.get("token") != self.token:
            return False
        content = json.dumps({**owner, "expires": time.time() + LIFETIME_S}).encode()
        if self.file.is_local:
            aside = f"{self.file.path}.{self.token}"
            with open(aside, "wb") as file:
                file.write(content)
            os.replace(aside, self.file.path)
        else:
            self.file.fs.pipe_file(self.file.path, content)
        return True


def holder(book: Bookkeeping) -> str:
    """Who is writing to a folder now, in words; empty when nobody is."""
    for name in book.names("lock"):
        owner = book.read(name)
        if isinstance(owner, dict) and _alive(owner):
            return f"process {owner.get('pid')} on {owner.get('host')}, started {owner.get('started')}"
    return ""


def _locked(folder: str, owner: dict[str, Any]) -> OutputLocked:
    return OutputLocked(
        f"{folder}: another run holds this output: process {owner.get('pid')} on "
        f"{owner.get('host')}, started {owner.get('started')}. Wait for it, or stop it and run again "
        f"(a lock left behind on another machine expires {LIFETIME_S:.0f} s after its last sign of life)."
    )


_PART = re.compile(r"(.*)_(\d+)-(\d+)")


def parts_overlap(one: str, other: str) -> bool:
    """Whether two parts (``Shard.part``) may write the same files; "" is everything."""
    a, b = _PART.fullmatch(one), _PART.fullmatch(other)
    if a is None or b is None:
        return True
    return a[1] == b[1] and int(a[2]) < int(b[3]) and int(b[2]) < int(a[3])


def _pid_scope() -> str | None:
    """Where a process number means the same process: this boot of the machine and this pid namespace (Linux)."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _alive(owner: dict[str, Any]) -> bool:
    """Whether the run that wrote this lock may still be working."""
    if owner.get("expires", 0.0) < time.time():
        return False
    if owner.get("host") != socket.gethostname() or owner.get("pid_scope") != _pid_scope():
        return True
    try:
        process = psutil.Process(int(owner["pid"]))
        # A recycled process number belongs to a younger process.
        same = abs(process.create_time() - float(owner["process_started"])) < 1.0
        return bool(same and process.status() != psutil.STATUS_ZOMBIE)
    except (psutil.Error, KeyError, ValueError):
        return False
