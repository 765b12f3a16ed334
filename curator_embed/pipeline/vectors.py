"""Embeddings of a shard between model and writer: in memory, and past a bound in files that nobody sees.

Memory is shared by all shards that a worker has open. What does not fit lies in a memory-mapped scratch file beside the
output, which has no name any more once it is open: of a process that is killed nothing stays.
"""

from __future__ import annotations

import errno
import mmap
import os
import secrets
import tempfile
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from curator_embed.errors import SourceError

VECTOR_BYTES = 512 << 20
"""Bytes of embeddings that a worker process keeps in memory, over all its open shards."""
SEGMENT_BYTES = 64 << 20
"""Bytes by which a scratch file grows, at least, and that are mapped of it at a time, about."""
MAPPED_AROUND = 64 << 10
"""Bytes that Linux maps when one of them is read."""


class VectorMemory:
    """A bound that several shards share.

    Args:
        most: bytes.
    """

    def __init__(self, most: int = VECTOR_BYTES) -> None:
        self.most, self.used = most, 0
        self._lock = threading.Lock()

    def add(self, size: int) -> None:
        """Count memory that is used from now on, or with a minus no more."""
        with self._lock:
            self.used += size

    def has_room(self) -> bool:
        """Whether more may be used."""
        return self.used < self.most


@dataclass(slots=True)
class _Chunk:
    vectors: np.ndarray
    present: np.ndarray
    count: int
    scratch: bool


class Vectors:
    """Embeddings of one shard by ordinal: as much memory as they need, no copy when they grow.

    Args:
        memory: what they may use of it before they go to a file; None for all there is.
        scratch: path of the output, in whose folder that file lies; None for the system's folder for temporary files.
    """

    CHUNK = 4096
    COUNTED = 16
    """Vectors after which memory is counted: shards of a few rows do not use a whole chunk's."""

    def __init__(self, memory: VectorMemory | None = None, scratch: str | None = None) -> None:
        self._memory, self._beside = memory, scratch
        self._chunks: dict[int, _Chunk] = {}
        self._scratch: _Scratch | None = None
        self._lock = threading.Lock()
        self._counted = 0
        self._closed = False
        self.dim = 0
        self.dtype: np.dtype[Any] = np.dtype(np.float32)

    def put(self, ordinal: int, vector: np.ndarray) -> None:
        """Store one vector (dim,).

        Raises:
            SourceError: there is neither memory nor disk left for it.
        """
        number, place = divmod(ordinal, self.CHUNK)
        with self._lock:
            if self._closed:
                return
            chunk = self._chunks.get(number)
            if chunk is None:
                chunk = self._chunks[number] = self._new_chunk(vector)
            chunk.vectors[place] = vector
            chunk.present[place] = True
            chunk.count += 1
            if chunk.scratch:
                if chunk.count == self.CHUNK and self._scratch is not None:
                    self._scratch.let_go()
            elif self._memory is not None and (chunk.count - 1) % self.COUNTED == 0:
                self._counted += self.COUNTED * vector.nbytes
                self._memory.add(self.COUNTED * vector.nbytes)

    def _new_chunk(self, vector: np.ndarray) -> _Chunk:
        self.dim, self.dtype = vector.shape[0], vector.dtype
        present = np.zeros(self.CHUNK, dtype=bool)
        if self._memory is None or self._memory.has_room():
            return _Chunk(np.empty((self.CHUNK, self.dim), self.dtype), present, 0, False)
        if self._scratch is None:
            self._scratch = _Scratch(self._beside)
        flat = self._scratch.take(self.CHUNK * vector.nbytes).view(self.dtype)
        return _Chunk(flat.reshape(self.CHUNK, self.dim), present, 0, True)

    def gather(self, ordinals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n,) ordinals, -1 for none -> vectors (n, dim) and present (n,) bool."""
        vectors = np.zeros((len(ordinals), self.dim), self.dtype)
        present = np.zeros(len(ordinals), dtype=bool)
        if len(ordinals) == 0:
            return vectors, present
        numbers = ordinals // self.CHUNK
        order = np.argsort(numbers, kind="stable")
        found, starts = np.unique(numbers[order], return_index=True)
        mapped = 0
        for number, rows in zip(found.tolist(), np.split(order, starts[1:]), strict=True):
            chunk = self._chunks.get(number)
            if chunk is None:
                continue
            places = ordinals[rows] - number * self.CHUNK
            vectors[rows], present[rows] = chunk.vectors[places], chunk.present[places]
            mapped += min(chunk.vectors.nbytes, len(rows) * MAPPED_AROUND) if chunk.scratch else 0
            if mapped > SEGMENT_BYTES and self._scratch is not None:
                self._scratch.let_go()
                mapped = 0
        if mapped and self._scratch is not None:
            self._scratch.let_go()
        return vectors, present

    def close(self) -> None:
        """Take no more, and count as no memory any more: what is there can be read until this object goes."""
        with self._lock:
            self._closed = True
            if self._memory is not None:
                self._memory.add(-self._counted)
                self._counted = 0


class _Scratch:
    """A nameless file that grows, mapped into memory.

    Raises:
        SourceError: no such file can be made, or grow.
    """

    def __init__(self, beside: str | None) -> None:
        self._file, self._named = -1, ""
        self._segments: list[tuple[mmap.mmap, np.ndarray]] = []
        self._size = self._taken = 0
        failed: OSError | None = None
        # Some mounted buckets cannot map files: the system's own folder can.
        for path in [*([] if beside is None else [os.path.realpath(beside)]), _temporary()]:
            self.folder = os.path.dirname(path)
            try:
                self._open(f"{path}.tmp-{os.getpid()}-{secrets.token_hex(4)}.vectors")
                self._grow(mmap.ALLOCATIONGRANULARITY)
                self._segments, self._taken = [], 0
                return
            except OSError as error:
                self._close()
                failed = error
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    break
        assert failed is not None
        raise self._explained(failed) from failed

    def _open(self, path: str) -> None:
        os.makedirs(self.folder, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o600)
        self._size, self._named = 0, path
        with suppress(OSError):  # where open files keep their names, it goes later
            os.unlink(path)
            self._named = ""

    def _close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            if self._named:
                with suppress(OSError):
                    os.unlink(self._named)

    def __del__(self) -> None:
        self._close()

    def take(self, size: int) -> np.ndarray:
        """The next ``size`` bytes."""
        if not self._segments or self._taken + size > len(self._segments[-1][1]):
            try:
                self._grow(size * -(-SEGMENT_BYTES // size))
            except OSError as error:
                raise self._explained(error) from error
        self._taken += size
        return self._segments[-1][1][self._taken - size : self._taken]

    def _grow(self, size: int) -> None:
        size = -(-size // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        _allocate(self._file, self._size, size)
        mapped = mmap.mmap(self._file, size, offset=self._size)
        self._segments.append((mapped, np.frombuffer(mapped, np.uint8)))
        self._size, self._taken = self._size + size, 0

    def let_go(self) -> None:
        """Count as no memory of this process: written pages are the file's, and come back when they are read."""
        for mapped, _ in self._segments:
            with suppress(OSError, ValueError, AttributeError):  # a system that has no such advice
                mapped.madvise(mmap.MADV_DONTNEED)

    def _explained(self, error: OSError) -> SourceError:
        held = f"holds {self._size >> 20} MB of a large shard's embeddings and "
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return SourceError(
            self.folder,
            f"{held if self._size else ''}{'has no room for more' if full else f'takes no scratch file ({error})'}",
            "Free some space and run the same command again: finished shards are kept"
            if full
            else "Set TMPDIR to a folder on a local disk and run again",
        )


def _temporary() -> str:
    return os.path.join(tempfile.gettempdir(), "curator-embed")


def _allocate(file: int, start: int, size: int) -> None:
    """Make room on the disk: a page that is written to and has none ends the process.

    Raises:
        OSError: there is not enough.
    """
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file, start, size)
            return
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
    block = bytes(1 << 20)
    for position in range(start, start + size, len(block)):
        if os.pwrite(file, block[: start + size - position], position) == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
