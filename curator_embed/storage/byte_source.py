"""Large files in pieces: one way to read them at any place, from a disk or from behind any fsspec URL.

Local files are read with positioned reads, never mapped (a mapped file that shrinks kills the process); remote ones in
large blocks, one ahead.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Self

from curator_embed.errors import SourceError, redact
from curator_embed.storage.files import StorageOptions, filesystem, is_remote, local_path, remote_info, unreadable

BLOCK_BYTES = 16 << 20
"""How much of a remote file one request asks for."""


class ByteSource(ABC):
    """A file that can be read anywhere. Used by one thread at a time; close it after use.

    Attributes:
        path: where it lies.
        size: its length in bytes when it was opened.
    """

    path: str
    size: int

    def pread(self, offset: int, n: int) -> bytes:
        """Read ``n`` bytes at ``offset``: fewer only where the file ends, never because of a hiccup.

        Raises:
            SourceError: the bytes cannot be read, or the file has shrunk since it was opened.
        """
        n = min(n, self.size - offset)  # a size found in a damaged header must not be allocated
        return self._read(offset, n) if n > 0 else b""

    @abstractmethod
    def _read(self, offset: int, n: int) -> bytes:
        """Read exactly ``n`` > 0 bytes that lie within the file."""

    @abstractmethod
    def close(self) -> None:
        """Give the file back."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def open_source(path: str, storage_options: StorageOptions = None, *, block_bytes: int = BLOCK_BYTES) -> ByteSource:
    """Open a local path or fsspec URL for positioned reads.

    Raises:
        SourceError: it does not exist, is a folder, or cannot be opened.
    """
    return RemoteFile(path, storage_options, block_bytes) if is_remote(path) else LocalFile(path)


class LocalFile(ByteSource):
    """A file on disk, read with ``pread``."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._fd = -1
        try:
            self._fd = os.open(local_path(path), os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            self.size = os.fstat(self._fd).st_size
            os.pread(self._fd, 1, 0)  # a folder opens, but does not read
        except OSError as exc:
            self.close()
            raise unreadable(path, exc) from exc
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError):
                os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def _read(self, offset: int, n: int) -> bytes:
        try:
            data = os.pread(self._fd, n, offset)
            while len(data) < n:  # a signal, a network disk, or more than 2 GiB at once
                more = os.pread(self._fd, n - len(data), offset + len(data))
                if not more:
                    raise _shrunk(self.path, os.fstat(self._fd).st_size)
                data += more
        except OSError as exc:
            raise unreadable(self.path, exc, offset) from exc
        return data

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class RemoteFile(ByteSource):
    """A file behind an fsspec URL, read in large blocks with one block read ahead.

    Retries are the file system's own business; a block that comes back short is asked for once more.
    A server that does not answer range requests is read as one stream, forwards.

    Holds at most four blocks.
    """

    KEPT_BLOCKS = 2

    def __init__(self, path: str, storage_options: StorageOptions = None, block_bytes: int = BLOCK_BYTES) -> None:
        self.path = path
        info = remote_info(path, storage_options)
        if info.get("type") == "directory":
            raise unreadable(path, IsADirectoryError("is a folder"))
        if info.get("size") is None:
            raise SourceError(redact(path), "the server does not tell its size", "Copy it to a disk or a bucket first")
        self.size = int(info["size"])
        self._fs, self._inner = filesystem(path, storage_options)
        self._block_bytes = block_bytes
        self._kept: OrderedDict[int, bytes] = OrderedDict()
        self._ahead: tuple[int, Future[bytes]] | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._stream: Any = None  # the open stream of a server without range requests
        self._stream_at = 0

    def _read(self, offset: int, n: int) -> bytes:
        first, start = divmod(offset, self._block_bytes)
        last = (offset + n - 1) // self._block_bytes
        if first == last:
            return self._block(first)[start : start + n]
        pieces = [self._block(first)[start:]]
        pieces += [self._block(i) for i in range(first + 1, last)]
        pieces.append(self._block(last)[: offset + n - last * self._block_bytes])
        return b"".join(pieces)

    def _block(self, index: int) -> bytes:
        if (block := self._kept.get(index)) is not None:
            self._kept.move_to_end(index)
            return block
        sequential = index == 0 or index - 1 in self._kept
        if self._ahead is not None and self._ahead[0] == index:
            future = self._ahead[1]
        else:
            future = self._pool.submit(self._fetch, index)
        self._ahead = None
        if sequential and (index + 1) * self._block_bytes < self.size:
            self._ahead = index + 1, self._pool.submit(self._fetch, index + 1)
        block = self._kept[index] = future.result()
        if len(self._kept) > self.KEPT_BLOCKS:
            self._kept.popitem(last=False)
        return block

    def _fetch(self, index: int) -> bytes:
        start = index * self._block_bytes
        wanted = min(self._block_bytes, self.size - start)
        try:
            if self._stream is None:
                for _ in range(2):
                    data: bytes = self._fs.cat_file(self._inner, start=start, end=start + wanted)
                    if len(data) == wanted:
                        return data
                    if len(data) > wanted:
                        break  # the whole file came: this server ignores ranges
                else:
                    raise _shrunk(self.path, start + len(data))
            return self._fetch_from_stream(start, wanted)
        except SourceError:
            raise
        except Exception as exc:
            raise unreadable(self.path, exc, start) from None

    def _fetch_from_stream(self, start: int, wanted: int) -> bytes:
        if self._stream is None or self._stream_at > start:
            self._close_stream()
            self._stream, self._stream_at = self._fs.open(self._inner, "rb", block_size=0), 0
        while self._stream_at < start:
            self._stream_at += len(self._stream_piece(min(1 << 20, start - self._stream_at)))
        pieces: list[bytes] = []
        while (missing := start + wanted - self._stream_at) > 0:
            pieces.append(self._stream_piece(missing))
            self._stream_at += len(pieces[-1])
        return b"".join(pieces)

    def _stream_piece(self, n: int) -> bytes:
        piece: bytes = self._stream.read(n)
        if not piece:
            raise _shrunk(self.path, self._stream_at)
        return piece

    def _close_stream(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._kept.clear()
        self._ahead = None
        self._close_stream()


def _shrunk(path: str, at: int) -> SourceError:
    return SourceError(
        redact(path), f"ends at byte {at}, earlier than when it was opened", "Do not replace files while they are read"
    )


def read_all(path: str, storage_options: StorageOptions = None) -> bytes:
    """Read a small file whole. Raises SourceError."""
    with open_source(path, storage_options) as source:
        return source.pread(0, source.size)
