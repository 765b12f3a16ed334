"""Many small files at once: images that lie one by one on a disk or in a bucket.

Hundreds of remote reads are in flight, a few threads read a local disk, and answers come in the order
asked for. A file that cannot be read is an answer like any other.
"""

from __future__ import annotations

import asyncio
import os
import random
import stat
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from fsspec import AbstractFileSystem, get_filesystem_class

from curator_embed.errors import Reason, UsageError
from curator_embed.storage.files import StorageOptions, filesystem, is_remote, local_path, redact
from curator_embed.storage.s3_store import FastBucket, fast_bucket

LOCAL_AHEAD = 4
"""Local reads that are queued for each thread."""

_S3 = ("s3", "s3a")


@dataclass(frozen=True)
class ReadPolicy:
    """How many small files are read at a time, and what is done about those that fail.

    Attributes:
        in_flight: remote reads under way at once.
        threads: threads that read a local disk, or a file system that has no asynchronous reads.
        timeout: seconds after which one attempt at a remote read counts as failed.
        retries: further attempts after the first; a missing file and a refusal are not tried again.
        backoff: seconds before the first retry; doubles with each, up to ``backoff_max``, with some chance added.
        backoff_max: longest pause in seconds.
        buffered_bytes: once so many bytes wait to be taken, no further read is begun.
    """

    in_flight: int = 256
    threads: int = 8
    timeout: float = 60.0
    retries: int = 5
    backoff: float = 0.2
    backoff_max: float = 10.0
    buffered_bytes: int = 256 << 20

    def __post_init__(self) -> None:
        for name in ("in_flight", "threads", "timeout"):
            if getattr(self, name) <= 0:
                raise UsageError(f"{name}={getattr(self, name)}: must be greater than 0")
        if self.retries < 0:
            raise UsageError(f"retries={self.retries}: 0 or more")

    def pause(self, attempt: int) -> float:
        """Seconds to wait after the ``attempt``-th failure (from 0); random, so that clients do not march in step."""
        longest = min(self.backoff_max, self.backoff * 2.0**attempt)
        return longest * (0.5 + random.random() / 2)


@dataclass(frozen=True, slots=True)
class Unread:
    """The answer for a file that could not be read."""

    reason: Reason
    detail: str


def read_many(
    paths: Iterable[str], storage_options: StorageOptions = None, policy: ReadPolicy | None = None
) -> Iterator[bytes | Unread]:
    """Read whole files, local paths and fsspec URLs alike.

    Yields:
        The bytes of each file or why there are none, in the order of ``paths``.

    Raises:
        MissingExtra, UsageError: no file system can be opened for such a path.
    """
    policy = policy or ReadPolicy()
    reader = _Reader(dict(storage_options or {}), policy)
    waiting: deque[Future[bytes | Unread]] = deque()
    left = iter(paths)
    try:
        while True:
            while reader.may_begin(len(waiting)) and (path := next(left, None)) is not None:
                waiting.append(reader.begin(path))
            if not waiting:
                return
            yield reader.take(waiting.popleft())
    finally:
        for future in waiting:
            future.cancel()
        reader.close()


class _Reader:
    """Begins reads; knows how much of what was read has not been taken yet."""

    def __init__(self, options: dict[str, Any], policy: ReadPolicy) -> None:
        self.options, self.policy = options, policy
        self._pool: ThreadPoolExecutor | None = None
        self._opened: dict[tuple[str, str], AbstractFileSystem] = {}
        self._buckets: dict[str, FastBucket | None] = {}
        self._lock = threading.Lock()
        self._buffered = 0
        self._ahead = LOCAL_AHEAD * policy.threads

    def may_begin(self, waiting: int) -> bool:
        return waiting == 0 or (waiting < self._ahead and self._buffered < self.policy.buffered_bytes)

    def begin(self, path: str) -> Future[bytes | Unread]:
        future: Future[bytes | Unread]
        if not is_remote(path):
            future = self._in_thread(_read_local, path)
        else:
            fs, inner = self._open(path)
            if fs.async_impl and not fs.asynchronous:
                self._ahead = max(self._ahead, self.policy.in_flight)
                first = self._shortcut(fs, inner) if set(_S3) & set(fs.protocol) else None
                future = asyncio.run_coroutine_threadsafe(_read_async(fs, inner, path, self.policy, first), fs.loop)
            else:
                future = self._in_thread(_read_blocking, fs, inner, path, self.policy)
        future.add_done_callback(self._count)
        return future

    def take(self, future: Future[bytes | Unread]) -> bytes | Unread:
        answer = future.result()
        if isinstance(answer, bytes):
            with self._lock:
                self._buffered -= len(answer)
        return answer

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _count(self, future: Future[bytes | Unread]) -> None:
        if not future.cancelled() and future.exception() is None and isinstance(answer := future.result(), bytes):
            with self._lock:
                self._buffered += len(answer)

    def _in_thread(self, read: Any, *arguments: Any) -> Future[bytes | Unread]:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.policy.threads, thread_name_prefix="read-files")
        return self._pool.submit(read, *arguments)

    def _shortcut(self, fs: AbstractFileSystem, inner: str) -> FastBucket | None:
        bucket = inner.partition("/")[0]
        if bucket not in self._buckets:
            self._buckets[bucket] = fast_bucket(bucket, fs.storage_options)  # fsspec's own configuration included
        found = self._buckets[bucket]
        return found if found is not None and found.useful else None

    def _open(self, path: str) -> tuple[AbstractFileSystem, str]:
        """The file system of a URL. Making one anew for every image would cost more than many a read."""
        if "::" in path:
            return filesystem(path, self.options)
        protocol = path.partition("://")[0]
        try:
            host = repr(get_filesystem_class(protocol)._get_kwargs_from_urls(path))
        except (ImportError, ValueError):
            return filesystem(path, self.options)  # which says what is missing
        if (protocol, host) not in self._opened:
            options = _with_connections(self.options, self.policy.in_flight) if protocol in _S3 else self.options
            self._opened[protocol, host] = filesystem(path, options)[0]
        fs = self._opened[protocol, host]
        return fs, str(fs._strip_protocol(path))


def _with_connections(options: dict[str, Any], connections: int) -> dict[str, Any]:
    """botocore keeps ten connections unless told otherwise."""
    return {**options, "config_kwargs": {"max_pool_connections": connections, **options.get("config_kwargs", {})}}


def _read_local(path: str) -> bytes | Unread:
    try:
        fd = os.open(local_path(path), os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0))
        with open(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):  # a pipe would never answer
                return Unread(Reason.READ_ERROR, "not a regular file")
            return file.read()
    except (OSError, ValueError) as exc:
        return _unread(path, exc)


async def _read_async(fs: Any, inner: str, path: str, policy: ReadPolicy, first: FastBucket | None) -> bytes | Unread:
    if first is not None:
        try:
            found = await asyncio.wait_for(first.read(inner.partition("/")[2]), policy.timeout)
            if found is not None:
                return found
        except TimeoutError:
            first.count_failure()
    # s3fs asks for an object's size first, unless told that it will not be read in pieces.
    whole = {"max_concurrency": 1} if set(_S3) & set(fs.protocol) else {}
    for attempt in range(policy.retries + 1):
        try:
            data: bytes = await asyncio.wait_for(fs._cat_file(inner, **whole), policy.timeout)
            return data
        except Exception as exc:  # every file system has exceptions of its own
            if _is_final(exc) or attempt == policy.retries:
                return _unread(path, exc)
        await asyncio.sleep(policy.pause(attempt))
    raise AssertionError("unreachable")


def _read_blocking(fs: Any, inner: str, path: str, policy: ReadPolicy) -> bytes | Unread:
    for attempt in range(policy.retries + 1):
        try:
            return bytes(fs.cat_file(inner))
        except Exception as exc:
            if _is_final(exc) or attempt == policy.retries:
                return _unread(path, exc)
        time.sleep(policy.pause(attempt))
    raise AssertionError("unreachable")


def _is_final(exc: Exception) -> bool:
    """Whether asking again cannot help."""
    return isinstance(exc, FileNotFoundError | PermissionError | IsADirectoryError | ValueError | TypeError)


def _unread(path: str, exc: Exception) -> Unread:
    if isinstance(exc, PermissionError):
        return Unread(Reason.READ_ERROR, "access denied")
    if isinstance(exc, FileNotFoundError) and "bucket does not exist" in str(exc):  # of which a name may be part
        return Unread(Reason.READ_ERROR, "the bucket does not exist")
    if isinstance(exc, FileNotFoundError | NotADirectoryError):
        return Unread(Reason.NOT_FOUND, "does not exist")
    if isinstance(exc, UnicodeError) or (isinstance(exc, ValueError) and "\0" in path):
        return Unread(Reason.NOT_FOUND, "no file can have this name")
    if isinstance(exc, TimeoutError):
        return Unread(Reason.READ_ERROR, "no answer in time")
    return Unread(Reason.READ_ERROR, f"{type(exc).__name__}: {redact(str(exc))}")
