"""Folders of images of any depth, with captions (``x.txt``) and json (``x.json``) beside them.

A folder is listed once, in natural order, and cut into shards by position. A shard holds its names
compressed: a few bytes an image, whatever the driver has to keep.
"""

from __future__ import annotations

import copy
import hashlib
import os
import zlib
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import pyarrow as pa

from curator_embed.errors import SourceError, UsageError
from curator_embed.sources.extras import load_json, load_text, table_of
from curator_embed.sources.path_list import as_text, extension, range_name
from curator_embed.sources.shard import Note, Sample, Shard, StoredSample
from curator_embed.sources.sniff import IMAGE_EXTENSIONS
from curator_embed.storage import files
from curator_embed.storage.files import redact
from curator_embed.storage.objects import ReadPolicy, Unread, read_many

SIDECARS = ("txt", "json")
"""Lower-case extensions of what is read beside an image of the same stem."""


class Entry(NamedTuple):
    """An image below the folder, and the extensions of what lies beside it, as they are written."""

    name: str
    sidecars: tuple[str, ...]

    def beside(self, sidecar: str) -> str:
        """The name of a file beside the image."""
        return f"{os.path.splitext(self.name)[0]}.{sidecar}"


@dataclass(frozen=True)
class ImageFolder:
    """What all shards of a folder share.

    Attributes:
        path: the folder, without a slash at its end.
        dataset: the beginning of the shards' names.
        id_col: the column that holds the paths below it.
        captions: whether there is any caption or json beside the images: then all tables have such columns.
    """

    path: str = field(repr=False)  # URLs and options may hold secrets
    dataset: str
    id_col: str
    captions: bool
    storage_options: dict[str, Any] = field(default_factory=dict, repr=False)
    policy: ReadPolicy = field(default_factory=ReadPolicy)


class FolderShard(Shard):
    """Some images of a folder; ``Sample.key`` is the path below it. Picklable and small."""

    by_position = True

    def __init__(self, folder: ImageFolder, start: int, entries: Collection[Entry], digest: str) -> None:
        self.folder, self.start, self.count, self.digest = folder, start, len(entries), digest
        self.table: str | None = None
        self._packed = _pack(entries)
        self._notes: list[Note] = []

    def __repr__(self) -> str:
        return f"FolderShard({self.name!r}, {redact(self.folder.path)!r})"

    @property
    def name(self) -> str:  # type: ignore[override]
        """``{dataset}_{start}-{end}`` by position in the listing, zero-padded."""
        return range_name(self.folder.dataset, self.start, self.start + self.count)

    def entries(self) -> list[Entry]:
        """The shard's images, in order."""
        return _unpack(self._packed)

    def samples(self, *, id_col: str, extras: bool = False) -> Iterator[Sample]:
        """Yield a sample an image, in order, reading many files at a time.

        Args:
            extras: also read captions and json, into ``extras["txt"]`` and ``extras["json"]``.

        Raises:
            SourceError: not one of the images can be read.
        """
        self._notes = []
        entries = self.entries()
        wanted = [e if extras else Entry(e.name, ()) for e in entries]
        reads = self._read(wanted)
        failures: list[Unread] = []
        unparsed = 0
        for entry in wanted:
            answer = next(reads)
            beside: dict[str, Any] = {}
            for sidecar in entry.sidecars:
                data = next(reads)
                try:
                    beside[sidecar.lower()] = _parsed(sidecar, data)
                except ValueError:
                    unparsed += 1
            key = _key(entry.name)
            if isinstance(answer, Unread):
                failures.append(answer)
                yield Sample(key, None, answer.reason, answer.detail, beside)
            else:
                yield Sample(key, answer, extras=beside)
        if unparsed:
            self._note(f"{unparsed} captions or json files cannot be read and count as null")
        if failures and len(failures) == len(entries):
            raise SourceError(
                redact(self.folder.path),
                f"not one of the {len(failures)} images of {self.name} can be read any more ({failures[0].detail})",
                "Check that the folder is still there, and run again: finished files are kept",
            )
        if failures:
            self._note(f"{len(failures)} images were listed and cannot be read ({failures[0].detail})")

    def keys(self, *, id_col: str) -> list[str]:
        """The paths below the folder, in order; no file is read."""
        return [_key(entry.name) for entry in self.entries()]

    def stored_samples(self, ordinals: Collection[int]) -> Iterator[StoredSample]:
        """The files of some images and what lies beside them, byte for byte.

        Raises:
            SourceError: a file cannot be read.
        """
        wanted = [(n, entry) for n, entry in enumerate(self.entries()) if n in ordinals]
        reads = self._read([entry for _, entry in wanted])
        for ordinal, entry in wanted:
            members: list[tuple[str, bytes]] = []
            for name in (entry.name, *map(entry.beside, entry.sidecars)):
                data = next(reads)
                if isinstance(data, Unread):
                    path = redact(files.join(self.folder.path, name))
                    raise SourceError(path, f"cannot be read ({data.detail})", "Restore it, or leave its row out")
                members.append((extension(name, data), data))
            yield StoredSample(ordinal, tuple(members))

    def table_path(self) -> str | None:
        """Where the metadata parquet of these images lies, or None when there is none yet."""
        return self.table

    def with_table(self, path: str) -> FolderShard:
        """The same images with another metadata parquet."""
        other = copy.copy(self)
        other.table, other._notes = path, []
        return other

    def table_from_extras(self, samples: list[Sample]) -> pa.Table | None:
        """The path, and where the folder has captions or json: ``caption`` and the json's fields.

        A json field that has the id column's name gives way to the path.
        """
        if not self.folder.captions or not samples:
            return None
        id_col = self.folder.id_col
        table, remark = table_of([replace(s, extras=_without_id(s.extras, id_col)) for s in samples], id_col)
        if remark:
            self._note(remark)
        return table

    def image_source(self) -> str:
        """The folder."""
        return self.folder.path

    def own_table(self) -> str:
        """Beside the folder, in one named after it."""
        return f"{self.folder.path}_metadata/{self.name}.parquet"

    def fingerprint(self) -> dict[str, Any]:
        """A digest of the images' names, sizes and times (or etags), as they were when the folder was listed."""
        return {"files": self.digest}

    def row_estimate(self) -> int:
        """The number of images."""
        return self.count

    def notes(self) -> list[Note]:
        """What the last pass over ``samples`` noticed."""
        return list(self._notes)

    def _read(self, entries: Collection[Entry]) -> Iterator[bytes | Unread]:
        names = (name for e in entries for name in (e.name, *map(e.beside, e.sidecars)))
        paths = (files.join(self.folder.path, name) for name in names)
        return read_many(paths, self.folder.storage_options, self.folder.policy)

    def _note(self, message: str) -> None:
        self._notes.append(Note(self.name, redact(self.folder.path), message))


def find_images(
    path: str | os.PathLike[str],
    *,
    images_per_file: int = 1024,
    dataset: str | None = None,
    id_col: str = "path",
    storage_options: files.StorageOptions = None,
    policy: ReadPolicy | None = None,
) -> list[FolderShard]:
    """List a folder and cut it into shards; see ``ImageTextPairDataset.from_folder``."""
    if images_per_file < 1:
        raise UsageError(f"images_per_file={images_per_file}: at least 1")
    folder = os.fspath(path)
    if not files.is_remote(folder):
        folder = os.path.abspath(files.local_path(folder))
    folder = files.normal(folder, storage_options).rstrip("/")
    dataset = dataset or folder.rpartition("/")[2]
    if not dataset or "/" in dataset:
        raise UsageError(f"dataset={dataset!r} begins file names: give a name without '/'")
    if not files.is_folder(folder, storage_options):
        raise UsageError(f"{redact(folder)}: no such folder")
    marks = _listing(folder, storage_options)
    beside: dict[str, list[str]] = defaultdict(list)
    for name in marks:
        stem, _, suffix = name.rpartition(".")
        if suffix.lower() in SIDECARS:
            beside[stem].append(suffix)
    images = [name for name in marks if name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS]
    if not images:
        raise UsageError(
            f"{redact(folder)}: no images there (files with an ending such as .jpg, .png, .webp), nor in its subfolders"
        )
    images.sort(key=files.natural_key)
    entries = [Entry(name, tuple(sorted(beside.get(os.path.splitext(name)[0], ())))) for name in images]
    captions = any(entry.sidecars for entry in entries)
    shared = ImageFolder(folder, dataset, id_col, captions, dict(storage_options or {}), policy or ReadPolicy())
    shards = []
    for start in range(0, len(entries), images_per_file):
        mine = entries[start : start + images_per_file]
        digest = hashlib.blake2b(digest_size=16)
        for name in (entry.name for entry in mine):  # of images alone: a caption changes no embedding
            digest.update(f"{name}\0{marks[name]}\0".encode("utf-8", "surrogateescape"))
        shards.append(FolderShard(shared, start, mine, digest.hexdigest()))
    return shards


def _listing(folder: str, storage_options: files.StorageOptions) -> dict[str, str]:
    """Every visible file below a folder, with what changes when it is replaced."""
    if not files.is_remote(folder):
        marks = {}
        for path in files.list_files(folder, recursive=True):
            try:
                stat = os.stat(path)
                marks[path[len(folder) + 1 :]] = f"{stat.st_size} {stat.st_mtime_ns}"
            except OSError:  # a link to nowhere, or removed this moment: reading it says so
                marks[path[len(folder) + 1 :]] = ""
        return marks
    fs, inner = files.filesystem(folder, storage_options)
    base = inner.rstrip("/") + "/"
    try:
        fs.invalidate_cache(inner)
        found = fs.find(inner, detail=True)
    except Exception as exc:  # every file system has exceptions of its own
        raise files.unreadable(folder, exc) from None
    names = ((path.removeprefix(base), info) for path, info in found.items())
    return {
        name: f"{info.get('size')} {files.etag(info) or files.modified(info)}"
        for name, info in names
        if not any(part.startswith(".") for part in name.split("/"))
    }


def _pack(entries: Collection[Entry]) -> bytes:
    text = "\0".join(f"{entry.name}\0{'.'.join(entry.sidecars)}" for entry in entries)
    return zlib.compress(text.encode("utf-8", "surrogateescape"))


def _unpack(packed: bytes) -> list[Entry]:
    parts = zlib.decompress(packed).decode("utf-8", "surrogateescape").split("\0")
    return [Entry(n, tuple(s.split(".")) if s else ()) for n, s in zip(parts[::2], parts[1::2], strict=True)]


def _key(name: str) -> str:
    return as_text(name.encode("utf-8", "surrogateescape"))


def _parsed(sidecar: str, data: bytes | Unread) -> Any:
    if isinstance(data, Unread):
        raise ValueError(data.detail)
    return load_text(data).rstrip("\r\n") if sidecar.lower() == "txt" else load_json(data)


def _without_id(extras: Any, id_col: str) -> dict[str, Any]:
    value = extras.get("json")
    return {**extras, "json": {k: v for k, v in value.items() if k != id_col}} if isinstance(value, dict) else extras
