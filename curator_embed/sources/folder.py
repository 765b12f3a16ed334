"""Folders of images of any depth, with captions (``x.txt``) and json (``x.json``) beside them.

A folder is listed once, in natural order, and cut into shards by position. Where files of an earlier run are there,
images stay in the files that have their rows (``FolderShard.fitted``). A shard holds its names compressed: a few bytes
per image, whatever the driver has to keep.
"""

from __future__ import annotations

import copy
import hashlib
import os
import zlib
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import numpy as np
import pyarrow as pa

from curator_embed.errors import Reason, SourceError, UsageError
from curator_embed.sources.extras import load_json, load_text, table_of
from curator_embed.sources.fitting import MARK_BYTES, Cut, KnownFile, fit, marks_as_text, recorded_marks, split_marks
from curator_embed.sources.path_list import GIVE_UP_AFTER, as_text, extension, range_name
from curator_embed.sources.shard import Fitted, Note, Sample, Shard, StoredSample
from curator_embed.sources.sniff import IMAGE_EXTENSIONS
from curator_embed.storage import files
from curator_embed.storage.files import natural_key, redact
from curator_embed.storage.gate import Gate, Refusals, Unread
from curator_embed.storage.objects import ReadPolicy, read_many

SIDECARS = ("txt", "json")
"""Lower-case extensions of what is read beside an image of the same stem."""


class Entry(NamedTuple):
    """An image below the folder.

    Attributes:
        name: its path below the folder.
        sidecars: the extensions of what lies beside it, as they are written.
        state: what changes when it is replaced: size and time, or etag.
    """

    name: str
    sidecars: tuple[str, ...]
    state: str = ""

    @property
    def mark(self) -> bytes:
        """Name and state in a few bytes."""
        return hashlib.blake2b(self.identity, digest_size=MARK_BYTES).digest()

    @property
    def identity(self) -> bytes:
        """Name and state."""
        return f"{self.name}\0{self.state}\0".encode("utf-8", "surrogateescape")

    def beside(self, sidecar: str) -> str:
        """The name of a file beside the image."""
        return f"{os.path.splitext(self.name)[0]}.{sidecar}"


_NOBODY = Entry("", ())


@dataclass(frozen=True)
class ImageFolder:
    """What all shards of a folder share.

    Attributes:
        path: the folder, without a slash at its end.
        dataset: the beginning of the shards' names.
        id_col: the column that holds the paths below it.
        captions: whether there is any caption or json beside the images: then all tables have such columns.
        images: how many there are.
        images_per_file: how many a new shard gets at most.
    """

    path: str = field(repr=False)  # URLs and options may hold secrets
    dataset: str
    id_col: str
    captions: bool
    images: int
    images_per_file: int
    storage_options: dict[str, Any] = field(default_factory=dict, repr=False)
    policy: ReadPolicy = field(default_factory=ReadPolicy)


class FolderShard(Shard):
    """Some images of a folder; ``Sample.key`` is the path below it. Picklable and small."""

    by_position = True
    grows = True

    def __init__(
        self, folder: ImageFolder, start: int, end: int, entries: Sequence[Entry], positions: Sequence[int]
    ) -> None:
        """
        Args:
            start, end: what the name says. There may be fewer images: some are gone, or their rows were dropped.
            positions: of the images in the listing that all shards of the folder come from.
        """
        self.folder, self.start, self.end, self.count = folder, start, end, len(entries)
        self.table: str | None = None
        self.gone: tuple[str, ...] = ()  # ids of the table's rows whose images are not there
        self._packed = _pack(entries)
        self._steps = zlib.compress(np.diff(np.asarray(positions, np.int64), prepend=0).tobytes())
        self._fingerprint: dict[str, str] = {}
        self._notes: list[Note] = []

    def __repr__(self) -> str:
        return f"FolderShard({self.name!r}, {redact(self.folder.path)!r})"

    @property
    def name(self) -> str:  # type: ignore[override]
        """``{dataset}_{start}-{end}``, zero-padded: positions in the listing when the images were first seen."""
        return range_name(self.folder.dataset, self.start, self.end)

    def entries(self) -> list[Entry]:
        """The shard's images, in order."""
        return _unpack(self._packed)

    def positions(self) -> np.ndarray:
        """Their positions in the listing that all shards of the folder come from, int64, as long as ``entries``."""
        return np.frombuffer(zlib.decompress(self._steps), np.int64).cumsum()

    def samples(self, *, id_col: str, extras: bool = False) -> Iterator[Sample]:
        """Yield a sample an image, in order, reading many files at a time.

        Args:
            extras: also read captions and json, into ``extras["txt"]`` and ``extras["json"]``.

        Raises:
            SourceError: the folder is gone, or none of its first images can be read for reasons that are not their
                own (the bucket, the network, the permissions).
        """
        self._notes = []
        entries = self.entries()
        wanted = [e if extras else Entry(e.name, ()) for e in entries]
        reads = self._read(wanted)
        failures: list[Unread] = []
        refusals, beside_refused = Refusals(), Refusals("captions or json files may not be opened, and count as null")
        good = unparsed = 0
        for entry in wanted:
            answer = next(reads)
            beside: dict[str, Any] = {}
            for sidecar in entry.sidecars:
                data = next(reads)
                if isinstance(data, Unread) and data.reason is Reason.REFUSED:
                    beside_refused.add(entry.beside(sidecar), data)
                    continue
                try:
                    beside[sidecar.lower()] = _parsed(sidecar, data)
                except ValueError:
                    unparsed += 1
            key = _key(entry.name)
            if isinstance(answer, Unread):
                failures.append(answer)
                refusals.add(entry.name, answer)
                if not good and len(failures) == GIVE_UP_AFTER:
                    self._refuse_unreachable(failures)
                yield Sample(key, None, answer.reason, answer.detail, beside)
            else:
                good += 1
                yield Sample(key, answer, extras=beside)
        if failures and not good:
            self._refuse_vanished()
        if unparsed:
            self._note(f"{unparsed} captions or json files cannot be read and count as null")
        for refused in (refusals, beside_refused):
            if refused.count:
                self._note(refused.note())
        failures = [failure for failure in failures if failure.reason is not Reason.REFUSED]
        if failures:
            self._note(f"{len(failures)} images were listed and cannot be read ({failures[0].detail})")

    def keys(self, *, id_col: str) -> list[str]:
        """The paths below the folder, in order; no file is read."""
        return [_key(entry.name) for entry in self.entries()]

    def stored_samples(self, ordinals: Collection[int]) -> Iterator[StoredSample]:
        """The files of some images and what lies beside them, byte for byte; without what is refused.

        Raises:
            SourceError: a file cannot be read.
        """
        wanted = [(n, entry) for n, entry in enumerate(self.entries()) if n in ordinals]
        reads = self._read([entry for _, entry in wanted])
        for ordinal, entry in wanted:
            members: list[tuple[str, bytes]] = []
            for name in (entry.name, *map(entry.beside, entry.sidecars)):
                data = next(reads)
                if isinstance(data, Unread) and data.reason is Reason.REFUSED:
                    continue
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
        """Beside the folder, in one named after it; where tables were named, there."""
        return f"{self.named_tables or f'{self.folder.path}_metadata'}/{self.name}.parquet"

    @classmethod
    def fitted(cls, shards: Sequence[Shard], files: Iterable[KnownFile], *, tables: bool) -> Fitted:
        """The images of all shards, each in the file that has its row; see ``fitting.fit``.

        Shards of a part of the folder stay as they are: what is not among them is not gone.
        """
        mine = cast("Sequence[FolderShard]", shards)
        first = mine[0]
        if sum(shard.count for shard in mine) != first.folder.images:
            return Fitted(list(shards))
        entries: list[Entry] = [_NOBODY] * first.folder.images
        for shard in mine:
            for position, entry in zip(shard.positions(), shard.entries(), strict=True):
                entries[position] = entry
        tabled = [shard for shard in mine if tables and shard.table is not None]
        cuts = [Cut(shard.start, shard.end, tuple(shard.positions().tolist()), shard.gone) for shard in tabled]
        keys, marks = [_key(entry.name) for entry in entries], [entry.mark for entry in entries]
        found = fit(keys, marks, files, first.folder.images_per_file, cuts)
        fitted: list[Shard] = []
        for piece in found.pieces:
            shard = FolderShard(
                first.folder, piece.start, piece.end, [entries[at] for at in piece.images], piece.images
            )
            shard.named_tables = first.named_tables
            if piece.cut is not None:
                shard.table, shard.gone = tabled[piece.cut].table, tabled[piece.cut].gone
            elif not tables:
                shard.gone = tuple(found.gone.get(piece.file, ()))
            fitted.append(shard)
        return Fitted(fitted, found.gone, found.twice, [tabled[number].table or "" for number in found.given_up])

    def fingerprint(self) -> dict[str, Any]:
        """A digest of the images' names, sizes and times (or etags) as they were listed, and a mark for each."""
        if not self._fingerprint:
            entries = self.entries()
            digest = hashlib.blake2b(digest_size=16)
            for entry in entries:  # of images alone: a caption changes no embedding
                digest.update(entry.identity)
            marks = b"".join(entry.mark for entry in entries)
            self._fingerprint = {"files": digest.hexdigest(), "marks": marks_as_text(marks)}
        return dict(self._fingerprint)

    def samples_changed(self, recorded: Mapping[str, Any], now: Mapping[str, Any]) -> str:
        """Nothing has changed while every image that is there is one of those recorded: others may be gone."""
        if not self.count or recorded.get("files") == now["files"]:
            return ""
        made_from = recorded_marks(recorded)
        if not made_from:  # version 0.1.0 kept the digest alone
            return "some of them, or some are gone: it was not noted which"
        known = set(split_marks(made_from))
        changed = [entry for entry in self.entries() if entry.mark not in known]
        if not changed:
            return ""
        return f"{len(changed):,} of {self.count:,}, '{_key(changed[0].name)}' is the first"

    def row_estimate(self) -> int:
        """The number of images."""
        return self.count

    def notes(self) -> list[Note]:
        """What the last pass over ``samples`` noticed."""
        return list(self._notes)

    def _read(self, entries: Collection[Entry]) -> Iterator[bytes | Unread]:
        names = (name for e in entries for name in (e.name, *map(e.beside, e.sidecars)))
        gate = Gate.of_folder(self.folder.path, self.folder.policy.links)
        return read_many(map(gate.below, names), self.folder.storage_options, self.folder.policy)

    def _refuse_vanished(self) -> None:
        """A folder that is gone has no images of which each is missing for a reason of its own."""
        path = self.folder.path
        if not files.is_remote(path) and not os.path.isdir(path):
            raise SourceError(path, "is no longer there", "Restore it and run again: finished files are kept")

    def _refuse_unreachable(self, failures: Sequence[Unread]) -> None:
        """Where a store answers nothing, trying every image with all its retries would take hours."""
        self._refuse_vanished()
        if all(failure.reason == Reason.READ_ERROR for failure in failures):
            raise SourceError(
                redact(self.folder.path),
                f"not one of the first {len(failures)} images of {self.name} can be read ({failures[0].detail})",
                "Check the permissions and the connection, and run again: finished files are kept",
            )

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
    states = _listing(folder, storage_options)
    beside: dict[str, list[str]] = defaultdict(list)
    for name in states:
        stem, _, suffix = name.rpartition(".")
        if suffix.lower() in SIDECARS:
            beside[stem].append(suffix)
    images = [name for name in states if name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS]
    if not images:
        raise UsageError(
            f"{redact(folder)}: no images there (files with an ending such as .jpg, .png, .webp), nor in its subfolders"
        )
    images.sort(key=natural_key)
    entries = [Entry(name, tuple(sorted(beside.get(os.path.splitext(name)[0], ()))), states[name]) for name in images]
    shared = ImageFolder(
        folder,
        dataset,
        id_col,
        any(entry.sidecars for entry in entries),
        len(entries),
        images_per_file,
        dict(storage_options or {}),
        policy or ReadPolicy(),
    )
    shards = []
    for start in range(0, len(entries), images_per_file):
        mine = entries[start : start + images_per_file]
        shards.append(FolderShard(shared, start, start + len(mine), mine, range(start, start + len(mine))))
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


def _pack(entries: Sequence[Entry]) -> bytes:
    names = (f"{entry.name}\0{'.'.join(entry.sidecars)}" for entry in entries)
    # Names beside names and states beside states: that is smaller than one after the other.
    text = "\0".join([*names, *(entry.state for entry in entries)])
    return zlib.compress(text.encode("utf-8", "surrogateescape"))


def _unpack(packed: bytes) -> list[Entry]:
    text = zlib.decompress(packed).decode("utf-8", "surrogateescape")
    parts = text.split("\0") if text else []
    count = len(parts) // 3
    named = zip(parts[: 2 * count : 2], parts[1 : 2 * count : 2], parts[2 * count :], strict=True)
    return [Entry(name, tuple(beside.split(".")) if beside else (), state) for name, beside, state in named]


def _key(name: str) -> str:
    return as_text(name.encode("utf-8", "surrogateescape"))


def _parsed(sidecar: str, data: bytes | Unread) -> Any:
    if isinstance(data, Unread):
        raise ValueError(data.detail)
    return load_text(data).rstrip("\r\n") if sidecar.lower() == "txt" else load_json(data)


def _without_id(extras: Any, id_col: str) -> dict[str, Any]:
    value = extras.get("json")
    return {**extras, "json": {k: v for k, v in value.items() if k != id_col}} if isinstance(value, dict) else extras
