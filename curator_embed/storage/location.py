"""One file on a disk or an object store: where it is, whether it has changed, and its parquet footer."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from curator_embed.errors import SourceError
from curator_embed.storage.files import filesystem

Token = tuple[Any, ...]


@dataclass(frozen=True)
class Location:
    """A file on a local disk or an object store: file system and path within it."""

    fs: AbstractFileSystem
    path: str

    @classmethod
    def of(cls, url: str, storage_options: Mapping[str, Any] | None = None) -> Location:
        """Resolve a path or any fsspec URL.

        Raises:
            MissingExtra, UsageError: no file system can be opened for such a path.
        """
        return cls(*filesystem(url, storage_options))

    @property
    def is_local(self) -> bool:
        """Whether plain files and renames can be used."""
        return isinstance(self.fs, LocalFileSystem)

    @property
    def parent(self) -> str:
        """The folder the file lies in."""
        return self.path.rpartition("/")[0] or "/"

    def token(self) -> Token | None:
        """What changes when the file is replaced: inode, size and mtime, or size and etag. None: no file."""
        if self.is_local:
            try:
                found = os.stat(self.path)
            except FileNotFoundError:
                return None
            return (found.st_ino, found.st_size, found.st_mtime_ns)
        self.fs.invalidate_cache(self.parent)
        try:
            info = self.fs.info(self.path)
        except FileNotFoundError:
            return None
        return (info.get("size"), str(info.get("ETag") or info.get("etag") or info.get("LastModified") or ""))

    @contextmanager
    def open_parquet(self) -> Iterator[pq.ParquetFile]:
        """Open for reading; a file that is no parquet is an error that names it."""
        with ExitStack() as stack:
            with _naming(self.path):
                parquet = _NamedParquet(stack.enter_context(self.open_bytes()), self.path)
                _ = parquet.schema_arrow  # of a schema that Arrow has no types for, this is where it says so
            yield parquet  # what goes wrong outside, while the file is open, is not the file's fault

    @contextmanager
    def open_bytes(self) -> Iterator[IO[bytes]]:
        """Open for reading."""
        with open(self.path, "rb") if self.is_local else self.fs.open(self.path, "rb") as file:
            yield file

    def schema(self) -> pa.Schema | None:
        """The Arrow schema with its metadata, from the footer alone; None when there is no file."""
        try:
            with self.open_parquet() as parquet:
                return parquet.schema_arrow
        except FileNotFoundError:
            return None


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """Name the file that pyarrow could not read: of a damaged footer it raises a plain OSError."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise SourceError(
            path, f"not a readable parquet file ({error})", "Restore it or remove it, then run again"
        ) from error


class _NamedParquet(pq.ParquetFile):
    """A parquet file whose damaged pages are errors that name it."""

    def __init__(self, file: IO[bytes], path: str) -> None:
        # INT96 holds dates that do not fit into 64 bits of nanoseconds: they would become others.
        super().__init__(file, coerce_int96_timestamp_unit="us")
        self._named = path

    def read(self, *args: Any, **kwargs: Any) -> pa.Table:
        with _naming(self._named):
            return super().read(*args, **kwargs)

    def read_row_group(self, *args: Any, **kwargs: Any) -> pa.Table:
        with _naming(self._named):
            return super().read_row_group(*args, **kwargs)
