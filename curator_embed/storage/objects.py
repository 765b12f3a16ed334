"""Many small files at once: images that lie one by one on a disk or in a bucket.

Hundreds of remote reads are in flight, a few threads read a local disk, and answers come in the order
asked for. A file that cannot be read is an answer like any other. Only places are opened that a gate let through.
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
import stat
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, get_args

from fsspec import AbstractFileSystem

from curator_embed.errors import MissingExtra, Reason, UsageError
from curator_embed.storage.files import StorageOptions, filesystem, open_web, redact
from curator_embed.storage.gate import Links, Place, Unread, Urls, open_local
from curator_embed.storage.guard import is_not_public, networks
from curator_embed.storage.s3_store import FastBucket, fast_bucket

LOCAL_AHEAD = 4
"""Local reads that are queued for each thread."""

_S3 = ("s3", "s3a")
_ASK_AGAIN = (408, 425, 429)
"""Refusals of a web server that may end by themselves."""
_NOT_PUBLIC = "If that network may be reached, pass reading=ReadPolicy(urls='public', allow=...) with it"


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
        links: whether local links that lead out of the source's root are refused ("inside") or followed ("any").
        urls: what rows may name by http(s). "own": what the source itself is, a list of URLs or files on the web.
            "public": any public address. "any": any address at all.
        allow: networks ("10.1.0.0/16") that count as public with ``urls="public"``.
    """

    in_flight: int = 256
    threads: int = 8
    timeout: float = 60.0
    retries: int = 5
    backoff: float = 0.2
    backoff_max: float = 10.0
    buffered_bytes: int = 256 << 20
    links: Links = "inside"
    urls: Urls = "own"
    allow: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("in_flight", "threads", "timeout"):
            if getattr(self, name) <= 0:
                raise UsageError(f"{name}={getattr(self, name)}: must be greater than 0")
        if self.retries < 0:
            raise UsageError(f"retries={self.retries}: 0 or more")
        if self.links not in get_args(Links) or self.urls not in get_args(Urls):
            raise UsageError(
                f"links='{self.links}', urls='{self.urls}': links is one of {', '.join(get_args(Links))}, and urls one "
                f"of {', '.join(get_args(Urls))}"
            )
        networks(self.allow)

    def pause(self, attempt: int) -> float:
        """Seconds to wait after the ``attempt``-th failure (from 0); random, so that clients do not march in step."""
        longest = min(self.backoff_max, self.backoff * 2.0**attempt)
        return longest * (0.5 + random.random() / 2)


def read_many(
    places: Iterable[Place | Unread], storage_options: StorageOptions = None, policy: ReadPolicy | None = None
) -> Iterator[bytes | Unread]:
    """Read whole files.

    Args:
        places: where they lie; an ``Unread`` among them is its own answer.
        storage_options: for fsspec. They are used below what the user named (``Place.base``), and nowhere else.

    Yields:
        The bytes of each file or why there are none, in the order of ``places``.

    Raises:
        MissingExtra, UsageError: no file system can be opened for what the user named.
    """
    policy = policy or ReadPolicy()
    reader = _Reader(dict(storage_options or {}), policy)
    waiting: deque[Future[bytes | Unread]] = deque()
    left = iter(places)
    try:
        while True:
            while reader.may_begin(len(waiting)) and (place := next(left, None)) is not None:
                waiting.append(reader.begin(place))
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
        self._opened: dict[str, tuple[AbstractFileSystem, str]] = {}
        self._web: AbstractFileSystem | Unread | None = None
        self._buckets: dict[str, FastBucket | None] = {}
        self._lock = threading.Lock()
        self._buffered = 0
        self._ahead = LOCAL_AHEAD * policy.threads

    def may_begin(self, waiting: int) -> bool:
        return waiting == 0 or (waiting < self._ahead and self._buffered < self.policy.buffered_bytes)

    def begin(self, place: Place | Unread) -> Future[bytes | Unread]:
        future: Future[bytes | Unread]
        if isinstance(place, Unread):
            return _answered(place)
        if not place.remote:
            future = self._in_thread(_read_local, place)
        else:
            opened = self._open(place)
            if isinstance(opened, Unread):
                return _answered(opened)
            fs, inner = opened
            if fs.async_impl and not fs.asynchronous:
                self._ahead = max(self._ahead, self.policy.in_flight)
                first = self._shortcut(fs, inner) if set(_S3) & set(fs.protocol) else None
                future = asyncio.run_coroutine_threadsafe(_read_async(fs, inner, self.policy, first), fs.loop)
            else:
                future = self._in_thread(_read_blocking, fs, inner, self.policy)
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

    def _open(self, place: Place) -> tuple[AbstractFileSystem, str] | Unread:
        """The file system of a URL and the path in it. What the row says is never read as a URL that fsspec opens."""
        if place.base is None:
            if self._web is None:
                try:
                    self._web = open_web(self.policy.allow if self.policy.urls == "public" else None)
                except MissingExtra as exc:
                    self._web = Unread(Reason.REFUSED, "a URL on the web", str(exc))
            return self._web if isinstance(self._web, Unread) else (self._web, place.path)
        if place.base not in self._opened:
            is_s3 = place.base.startswith(tuple(f"{protocol}://" for protocol in _S3))
            options = _with_connections(self.options, self.policy.in_flight) if is_s3 else self.options
            self._opened[place.base] = filesystem(place.base, options)
        fs, base = self._opened[place.base]
        inside = place.path[len(place.base) :]
        return fs, base.rstrip("/") + inside if base else inside.lstrip("/")


def _answered(answer: Unread) -> Future[bytes | Unread]:
    future: Future[bytes | Unread] = Future()
    future.set_result(answer)
    return future


def _with_connections(options: dict[str, Any], connections: int) -> dict[str, Any]:
    """botocore keeps ten connections unless told otherwise."""
    return {**options, "config_kwargs": {"max_pool_connections": connections, **options.get("config_kwargs", {})}}


def _read_local(place: Place) -> bytes | Unread:
    try:
        fd = open_local(place)
        if isinstance(fd, Unread):
            return fd
        with open(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):  # a pipe would never answer
                return Unread(Reason.READ_ERROR, "not a regular file")
            return file.read()
    except (OSError, ValueError) as exc:
        return _unread(exc)


async def _read_async(fs: Any, inner: str, policy: ReadPolicy, first: FastBucket | None) -> bytes | Unread:
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
                return _unread(exc)
        await asyncio.sleep(policy.pause(attempt))
    raise AssertionError("unreachable")


def _read_blocking(fs: Any, inner: str, policy: ReadPolicy) -> bytes | Unread:
    for attempt in range(policy.retries + 1):
        try:
            return bytes(fs.cat_file(inner))
        except Exception as exc:
            if _is_final(exc) or attempt == policy.retries:
                return _unread(exc)
        time.sleep(policy.pause(attempt))
    raise AssertionError("unreachable")


def _is_final(exc: Exception) -> bool:
    """Whether asking again cannot help."""
    if isinstance(exc, FileNotFoundError | PermissionError | IsADirectoryError | ValueError | TypeError):
        return True
    return is_not_public(exc) or (_status(exc) in range(400, 500) and _status(exc) not in _ASK_AGAIN)


def _status(exc: Exception) -> int | None:
    """What a web server answered."""
    status = getattr(exc, "status", None)
    return status if isinstance(status, int) else None


def _unread(exc: Exception) -> Unread:
    if is_not_public(exc):
        return Unread(Reason.REFUSED, "its host's address is not public", _NOT_PUBLIC)
    if isinstance(exc, PermissionError) or _status(exc) in (401, 403):
        return Unread(Reason.READ_ERROR, "access denied")
    if isinstance(exc, FileNotFoundError) and "bucket does not exist" in str(exc):  # of which a name may be part
        return Unread(Reason.READ_ERROR, "the bucket does not exist")
    if isinstance(exc, FileNotFoundError | NotADirectoryError) or _status(exc) == 410:
        return Unread(Reason.NOT_FOUND, "does not exist")
    if isinstance(exc, UnicodeError) or (isinstance(exc, ValueError) and "null byte" in str(exc)):
        return Unread(Reason.NOT_FOUND, "no file can have this name")
    if isinstance(exc, OSError) and exc.errno == errno.ENAMETOOLONG:
        return Unread(Reason.NOT_FOUND, "no file can have this name")
    if isinstance(exc, TimeoutError):
        return Unread(Reason.READ_ERROR, "no answer in time")
    return Unread(Reason.READ_ERROR, f"{type(exc).__name__}: {redact(str(exc))}")
