"""Webdataset shards: finding them, and reading a tar's samples in one pass.

``find_shards`` turns what a user names (folder, glob, tar, brace list) into shards; ``WebdatasetShard``
reads one. Grouping, tars and indexes have rooms of their own.
"""

from __future__ import annotations

import copy
import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import product, takewhile
from typing import Any, Literal

import pyarrow as pa

from curator_embed.errors import Reason, SourceError, UsageError
from curator_embed.sources.extras import id_text, load_json, load_text, table_of
from curator_embed.sources.grouping import Grouper, KeySplit, Place, kind_of
from curator_embed.sources.idx import (
    BadIndex,
    count_indexed,
    has_fresh_index,
    index_path,
    index_tar,
    is_complete,
    read_index,
)
from curator_embed.sources.shard import Note, Sample, Shard, StoredSample
from curator_embed.sources.sniff import SNIFF_BYTES, sniff
from curator_embed.sources.tar import Member, TarScan
from curator_embed.storage import files
from curator_embed.storage.byte_source import ByteSource, open_source
from curator_embed.storage.files import StorageOptions, redact

UseIndex = Literal["auto"] | bool

MAX_EXTRA_BYTES = 16 << 20
"""Longest caption or json that is read; what is longer counts as unreadable."""


@dataclass(slots=True, eq=False)
class _Open:
    """A sample that is being put together. Holds an image only while its members stand together."""

    key: str
    id: str | None = None  # settled when its first members end
    json_id: str | None = None
    image: bytes | None = None
    found: bool = False  # the image is one by its signature, not only by its extension
    cut: str = ""  # the member that should have held the image and ends early
    given: bool = False
    extras: dict[str, Any] = field(default_factory=dict)
    members: list[tuple[str, Member]] = field(default_factory=list)  # kept only where all of them are asked for


class WebdatasetShard(Shard):
    """A tar, its metadata parquet, or both. Picklable and small.

    Args:
        name: unique within the dataset; the stem of the output file.
        tar: path or URL of the tar; None when only the parquet is there.
        table: path or URL of the metadata parquet; None when only the tar is there.
        id_col: the dataset's id column, which a table made from extras begins with.
        storage_options: passed to fsspec.
        use_index: "auto": a local, fresh and complete index spares reading headers, any other is passed
            over. True: an index is also believed to be a filter when it lists fewer samples than the tar.
            False: indexes are not looked at.
        key_split: at which dot of the base name the key ends. "auto": at the first, as webdataset and DALI
            have it, unless ids of the parquet themselves hold a dot: then at the last.
    """

    def __init__(
        self,
        name: str,
        tar: str | None,
        table: str | None = None,
        *,
        id_col: str = "key",
        storage_options: StorageOptions = None,
        use_index: UseIndex = "auto",
        key_split: Literal["auto"] | KeySplit = "auto",
    ) -> None:
        self.name, self.tar, self.table, self.id_col = name, tar, table, id_col
        self.storage_options = dict(storage_options or {})
        self.use_index: UseIndex = use_index
        self.key_split: Literal["auto"] | KeySplit = key_split
        self._notes: list[Note] = []

    def __repr__(self) -> str:
        where = redact(self.tar or self.table or "")
        return f"WebdatasetShard({self.name!r}, {where!r})"  # never storage_options: they may hold secrets

    # --- the contract -------------------------------------------------------------------------

    def table_path(self) -> str | None:
        """Where the shard's metadata parquet lies, or None when it has none."""
        return self.table

    def with_table(self, path: str) -> WebdatasetShard:
        """The same tar with another metadata parquet."""
        other = copy.copy(self)
        other.table, other._notes = path, []
        return other

    def image_source(self) -> str | None:
        """The tar, or None when only the parquet is there."""
        return self.tar

    def notes(self) -> list[Note]:
        """What the last pass over ``samples`` noticed; complete once that pass has ended."""
        return list(self._notes)

    def fingerprint(self) -> dict[str, Any]:
        """The tar's size and mtime_ns or etag; null without a tar."""
        if self.tar is None:
            return {"size": None, "mtime_ns": None}
        return files.fingerprint(self.tar, self.storage_options)

    def pairing(self, id_col: str) -> dict[str, Any]:
        """The id column, where keys end when that was asked for, and the index where it says which samples count."""
        found: dict[str, Any] = {"id_col": id_col}
        if self.key_split != "auto":
            found["key_split"] = self.key_split
        index = index_path(self.tar) if self.tar is not None and self.use_index is True else None
        if index is not None and files.exists(index, self.storage_options):
            found["index"] = files.fingerprint(index, self.storage_options)
        return found

    def row_estimate(self) -> int | None:
        """Number of samples: from a local index, else rows of the parquet's footer, else None."""
        if self.tar is not None and self.use_index is not False:
            count = count_indexed(self.tar, self.storage_options)
            if count is not None:
                return count
        if self.table is None:
            return None
        import pyarrow.parquet as pq

        try:
            fs, inner = _arrow_filesystem(self.table, self.storage_options)
            return int(pq.read_metadata(inner, filesystem=fs).num_rows)
        except Exception:  # whatever its file system raises
            return None  # an estimate; who reads the table says what is wrong with it

    def table_from_extras(self, samples: list[Sample]) -> pa.Table:
        """Build the metadata table of a tar without parquet: the id, the caption, the fields of the json members.

        The id column is the tar's key when ``id_col`` is "key"; otherwise the json's field of that name (the
        key where it is absent), as integers when all are. ``caption`` comes from the txt member, unless the
        json has one, and is null without either; other columns are what json fields are in Arrow, nested ones
        too. A field whose values have no common type becomes text: strings as they are, all else as JSON.
        """
        table, remark = table_of(samples, self.id_col)
        if remark:
            self.note(remark)
        return table

    def samples(self, *, id_col: str, extras: bool = False) -> Iterator[Sample]:
        """Yield every sample of the tar in one sequential pass; none without a tar.

        The image is the first member whose bytes have an image's signature, failing that the first whose
        extension claims to be one (its bytes are handed on: the decoder says why they are bad). A sample is
        yielded as soon as all that was asked for is known: with its image, or at the end of the members that
        stand together. Samples without an image may get theirs from a member further on, and come last.

        When members of one sample do not stand together, ``extras`` of a sample already yielded grow during
        the pass; they are complete when it has ended.

        Args:
            id_col: "key" makes the tar's key the sample's; else it is the json member's field of that name, as
                text, or the tar's key where there is none.
            extras: also parse json and txt members, into ``extras["json"]`` and ``extras["txt"]``.

        Raises:
            SourceError: not a tar, or it cannot be read (on). A tar that is cut raises nothing: its complete
                samples come, the cut one has ``Reason.TRUNCATED``, and a note tells the byte.
        """
        self._notes = []
        if self.tar is None:
            return
        with open_source(self.tar, self.storage_options) as source:
            reading = _Pass(self, source, id_col, extras=extras)
            for sample in reading.run():
                yield reading.finished(sample)

    def keys(self, *, id_col: str) -> list[str]:
        """``Sample.key`` of every sample, in order, without reading images. Leaves notes like ``samples``."""
        self._notes = []
        if self.tar is None:
            return []
        with open_source(self.tar, self.storage_options) as source:
            reading = _Pass(self, source, id_col, images=False)
            return [reading.finished(sample).key for sample in reading.run()]

    def stored_samples(self, ordinals: Collection[int]) -> Iterator[StoredSample]:
        """All members of some samples, byte for byte, in the order of ``samples`` under the shard's own ``id_col``.

        Reads the tar's headers first, so that members that do not stand together are found, then the members.

        Raises:
            SourceError: the tar cannot be read, or a member of a wanted sample is cut.
        """
        self._notes = []
        if self.tar is None:
            return
        with open_source(self.tar, self.storage_options) as source:
            reading = _Pass(self, source, self.id_col, images=False, members=True)
            wanted: list[tuple[int, _Open]] = []
            for ordinal, sample in enumerate(reading.run()):
                reading.finished(sample)
                if ordinal in ordinals:
                    wanted.append((ordinal, sample))
            for ordinal, sample in wanted:
                yield StoredSample(ordinal, tuple((ext, _whole(source, member)) for ext, member in sample.members))

    # --- for the pass -------------------------------------------------------------------------

    def note(self, message: str) -> None:
        self._notes.append(Note(self.name, redact(self.tar or self.table or ""), message))

    def members(self, source: ByteSource, scan: TarScan) -> Iterable[Member]:
        """The tar's members: from the index where that may be believed, else by scanning."""
        assert self.tar is not None
        # A remote tar is streamed through anyway: looking for its index would cost more than it spares.
        if self.use_index is False or (self.use_index == "auto" and files.is_remote(self.tar)):
            return scan
        try:
            index = read_index(self.tar, source, self.storage_options)
        except (BadIndex, SourceError) as exc:
            self.note(
                f"the index {os.path.basename(index_path(self.tar))} is not used: {exc}. "
                "Write it anew with: curator-embed index-tars"
            )
            return scan
        if index is None:
            return scan
        members = index.members() if index.named else None
        if members is not None and is_complete(members, source):
            return members
        if self.use_index == "auto":
            return scan
        listed = {entry.offset for entry in index.entries()}
        if members is None:
            members = [member for member in scan if member.offset in listed]
        self.note(
            f"only what the index {os.path.basename(index_path(self.tar))} lists is read: "
            f"{len(index.samples)} samples, {len(members)} members"
        )
        return members

    def split_at(self) -> KeySplit:
        """Where keys end in this shard's names: the parquet's ids say what a key is."""
        if self.key_split != "auto":
            return self.key_split
        return "last" if self.table is not None and self._ids_have_dots(self.table) else "first"

    def _ids_have_dots(self, table: str) -> bool:
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        try:
            fs, inner = _arrow_filesystem(table, self.storage_options)
            with pq.ParquetFile(inner, filesystem=fs) as parquet:
                names = parquet.schema_arrow.names
                column = "key" if "key" in names else self.id_col
                if column not in names or not _is_text(parquet.schema_arrow.field(column).type):
                    return False
                for batch in parquet.iter_batches(columns=[column]):
                    ids = batch.column(0).cast(pa.string())
                    if pc.any(pc.match_substring_regex(ids, r"\.[^/]*$")).as_py():
                        return True
        except Exception:  # whatever its file system raises: who reads the table says what is wrong with it
            return False
        return False


class _Pass:
    """One reading of a tar: takes members as they come, gives samples as soon as they are known.

    Args:
        extras: parse captions and json.
        images: read images; without, only as much as tells that they are images. The order is the same.
        members: keep the members of every sample.
    """

    def __init__(
        self,
        shard: WebdatasetShard,
        source: ByteSource,
        id_col: str,
        *,
        extras: bool = False,
        images: bool = True,
        members: bool = False,
    ) -> None:
        self.shard, self.source, self.id_col = shard, source, id_col
        self.extras, self.images, self.members = extras, images, members
        self.parse = extras or id_col != "key"
        self.at_once = not self.parse and not members  # nothing but the image is waited for
        self.scan = TarScan(source)
        self.current: _Open | None = None
        self.open_of: dict[str, _Open] = {}  # by key: samples that later members can add to
        self.waiting: dict[str, list[_Open]] = {}  # by id: samples that have no image yet
        self.counts: Counter[str] = Counter()

    def run(self) -> Iterator[_Open]:
        """Yield every sample once, for ``finished`` to close."""
        grouper = Grouper(self.shard.split_at())
        for member in self.shard.members(self.source, self.scan):
            place = grouper.place(member.name)
            if place is None:
                continue
            if place.first or self.current is None or place.key != self.current.key:
                yield from self._end_of_run()
                if place.first:
                    earlier = self.open_of.get(place.key)
                    if earlier is not None and not earlier.given:
                        yield from self._release(earlier)  # nothing can join it any more
                    self.open_of[place.key] = _Open(place.key)
                self.current = self.open_of.get(place.key)
            self._take(self.current, member, place)
            if self.at_once and self.current is not None and self.current.found and not self.current.given:
                yield from self._give(self.current)
        if self.scan.cut and self.current is not None and self.current.image is None and not self.current.given:
            self.current.cut = self.current.cut or "its image"
        yield from self._end_of_run()
        for samples in list(self.waiting.values()):
            yield from self._release(samples[0])
        self._tell()

    def _take(self, sample: _Open | None, member: Member, place: Place) -> None:
        """Add a member to its sample; None stands for a sample that is given and forgotten."""
        kind = kind_of(place.extension)
        if self.members and sample is not None:
            sample.members.append((place.extension, member))
        if sample is None or sample.given or sample.found:
            if kind in ("image", "other") and sniff(self.source.pread(member.offset, min(member.size, SNIFF_BYTES))):
                self.counts["image"] += 1
        else:
            self._look_for_image(sample, member, kind)
        if kind in ("json", "txt") and sample is not None and self.parse and kind not in sample.extras:
            self._take_extra(sample, member, kind)

    def _look_for_image(self, sample: _Open, member: Member, kind: str) -> None:
        whole = kind == "image" and self.images
        data = self.source.pread(member.offset, member.size if whole else min(member.size, SNIFF_BYTES))
        is_image = sniff(data) is not None
        if member.offset + member.size > self.source.size:
            if kind == "image" or is_image or sample.image is None:
                sample.image, sample.cut = None, member.name
        elif is_image:
            sample.found = True
            whole = whole or not self.images or len(data) == member.size
            sample.image = data if whole else self.source.pread(member.offset, member.size)
        elif kind == "image" and sample.image is None:
            sample.image = data

    def _take_extra(self, sample: _Open, member: Member, kind: str) -> None:
        sample.extras[kind] = None
        if member.size > MAX_EXTRA_BYTES or member.offset + member.size > self.source.size:
            self.counts["unread " + kind] += 1
            return
        data = self.source.pread(member.offset, member.size)
        if kind == "txt":
            sample.extras[kind] = load_text(data)
            return
        try:
            value = sample.extras[kind] = load_json(data)
        except ValueError:
            self.counts["unread json"] += 1
            return
        if self.id_col != "key" and isinstance(value, dict):
            sample.json_id = id_text(value.get(self.id_col))
            if sample.json_id is not None and sample.id not in (None, sample.json_id):
                self.counts["late id"] += 1

    def _end_of_run(self) -> Iterator[_Open]:
        """The members of the current sample stop standing together: give it, or let it wait for an image."""
        sample, self.current = self.current, None
        if sample is None or sample.given:
            return
        if sample.image is not None or sample.cut:
            yield from self._give(sample)
        elif sample.id is None:
            self.waiting.setdefault(self._settle_id(sample), []).append(sample)

    def _give(self, sample: _Open) -> Iterator[_Open]:
        row_id = self._settle_id(sample)
        before = self.waiting.pop(row_id, [])
        if sample in before:
            after = before[before.index(sample) + 1 :]
            before = before[: before.index(sample)]
            if after:
                self.waiting[row_id] = after
        yield from before  # samples of one id pair with its rows in order: none may overtake
        yield sample

    def _release(self, sample: _Open) -> Iterator[_Open]:
        """Give a waiting sample, without an image, and those that wait under the same id."""
        yield from self.waiting.pop(self._settle_id(sample), [])

    def _settle_id(self, sample: _Open) -> str:
        if sample.id is None:
            sample.id = sample.key if sample.json_id is None else sample.json_id
        return sample.id

    def finished(self, sample: _Open) -> Sample:
        """Turn a sample that ``run`` gave into what leaves this room; call it before going on."""
        image, sample.image, sample.given = sample.image, None, True
        if self.at_once and self.open_of.get(sample.key) is sample:
            del self.open_of[sample.key]
        extras = sample.extras if self.extras else {}
        if sample.cut:
            detail = f"the tar ends inside {sample.cut}"
            return Sample(self._settle_id(sample), None, Reason.TRUNCATED, detail, extras)
        return Sample(self._settle_id(sample), image, extras=extras)

    def _tell(self) -> None:
        note, counts = self.shard.note, self.counts
        if self.scan.damage is not None:
            note(self.scan.damage)
        if counts["image"]:
            note(
                f"{counts['image']} further images in samples that have one already are not used. "
                "If their names hold dots that belong to the key, say key_split='last'"
            )
        if counts["unread json"]:
            note(f"{counts['unread json']} json members cannot be read and count as null")
        if counts["unread txt"]:
            note(f"{counts['unread txt']} txt members are cut or too long and count as null")
        if counts["late id"]:
            note(
                f"{counts['late id']} samples have their '{self.id_col}' in a json that does not stand beside the "
                "image; they go by their key. Write the members of a sample together"
            )
        for kind, count in self.scan.ignored.items():
            note(f"{count} x {kind}: not a regular file, ignored")


def _whole(source: ByteSource, member: Member) -> bytes:
    if member.offset + member.size > source.size:
        raise SourceError(redact(source.path), f"ends inside '{member.name}'", "Restore it, or leave that sample out")
    return source.pread(member.offset, member.size)


def _arrow_filesystem(path: str, storage_options: StorageOptions) -> tuple[Any, str]:
    """What pyarrow needs to open a path: (file system or None, path)."""
    return files.filesystem(path, storage_options) if files.is_remote(path) else (None, files.local_path(path))


def index_tars(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    overwrite: bool = False,
    storage_options: StorageOptions = None,
) -> list[str]:
    """Write the DALI index of every tar that ``find_shards`` finds there, unless it has a fresh one.

    Args:
        overwrite: write fresh ones anew, too.

    Returns:
        The paths of the indexes written.

    Raises:
        UsageError: no tars there.
        SourceError: a tar is damaged; it is raised once all the others are indexed.
    """
    tars = [shard.tar for shard in find_shards(path, storage_options=storage_options) if shard.tar is not None]
    if not tars:
        raise UsageError(f"{path}: parquet files, but no *.tar to index")
    written: list[str] = []
    failed: list[SourceError] = []
    for tar in tars:
        try:
            if overwrite or not has_fresh_index(tar, storage_options):
                written.append(index_tar(tar, storage_options))
        except SourceError as exc:
            failed.append(exc)
    if failed:
        raise failed[0]
    return written


# --- finding shards ------------------------------------------------------------------------------

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_SUFFIXES = (".tar", ".parquet")


def find_shards(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    id_col: str = "key",
    storage_options: StorageOptions = None,
    use_index_files: UseIndex = "auto",
    key_split: Literal["auto"] | KeySplit = "auto",
) -> list[WebdatasetShard]:
    """Find the webdataset shards that ``path`` names, in natural order (0, 1, 2, 10).

    A tar and a parquet of one stem in one folder are one shard; either alone is one, too. In subfolders,
    parquets count only where there are tars as well: an output folder inside the dataset is no input. Shards are
    named by their path below the dataset's folder, with "__" for "/" ("train/00000.tar" is "train__00000").

    Args:
        path: a folder (searched with its subfolders), a glob, one tar or parquet, a brace list
            (``{00000..00012}.tar``, ``{a,b}/*.tar``), or several of these; local or any fsspec URL.
        id_col: the dataset's id column.
        storage_options: passed to fsspec.
        use_index_files: see ``WebdatasetShard``.
        key_split: see ``WebdatasetShard``.

    Raises:
        UsageError: nothing there, no shards in it, or two shards of one name; it says what was looked for.
        SourceError: a folder cannot be listed.
    """
    asked = [os.fspath(p) for p in ([path] if isinstance(path, str | os.PathLike) else path)]
    if use_index_files not in (True, False, "auto"):
        raise UsageError(f"use_index_files={use_index_files!r}: say True, False or 'auto'")
    if key_split not in ("auto", "first", "last"):
        raise UsageError(f"key_split={key_split!r}: say 'auto', 'first' or 'last'")
    options = dict(storage_options or {})
    base, found = _resolve([files.absolute(plain) for one in asked for plain in _expanded(one)], options)
    if not found:
        raise UsageError(
            f"{', '.join(map(redact, asked)) or 'an empty list'}: no *.tar and no *.parquet there. Give a folder "
            "of webdataset shards, a glob, a tar, or a list such as {00000..00012}.tar"
        )
    return [
        WebdatasetShard(
            name,
            tar,
            table,
            id_col=id_col,
            storage_options=options,
            use_index=use_index_files,
            key_split=key_split,
        )
        for name, tar, table in pair_files(found, base)
    ]


def pair_files(paths: Iterable[str], base: str) -> list[tuple[str, str | None, str | None]]:
    """Pair tars and parquets by folder and stem: (name, tar, parquet) in natural order of their names.

    Raises:
        UsageError: two shards would have one name.
    """
    pairs: dict[str, dict[str, str]] = defaultdict(dict)
    for path in dict.fromkeys(paths):
        stem, suffix = os.path.splitext(_without_query(path))
        if pairs[stem].setdefault(suffix.lower(), path) != path:
            raise UsageError(f"{redact(path)} and {redact(pairs[stem][suffix.lower()])} are one shard twice")
    shards: dict[str, tuple[str, str | None, str | None]] = {}
    for stem in sorted(pairs, key=files.natural_key):
        name = stem.removeprefix(base).strip("/").replace("/", "__")
        tar, table = (pairs[stem].get(suffix) for suffix in _SUFFIXES)
        if name in shards:
            other = shards[name][1] or shards[name][2] or ""
            raise UsageError(
                f"{redact(tar or table or '')} and {redact(other)} would both be named '{name}'. Rename one"
            )
        shards[name] = name, tar, table
    return list(shards.values())


def expand_braces(pattern: str) -> list[str]:
    """Expand ``{000..012}`` (zeros are kept) and ``{a,b}`` in a path, every combination in order."""
    pieces = _BRACES.split(pattern)
    choices: list[list[str]] = []
    for i, piece in enumerate(pieces):
        if i % 2 == 0:
            choices.append([piece])
        elif span := _RANGE.fullmatch(piece):
            first, last = int(span[1]), int(span[2])
            width = len(span[1]) if span[1].startswith("0") else 0
            step = 1 if first <= last else -1
            choices.append([str(n).zfill(width) for n in range(first, last + step, step)])
        elif "," in piece:
            choices.append(piece.split(","))
        else:
            choices.append(["{" + piece + "}"])
    return ["".join(parts) for parts in product(*choices)]


def _expanded(path: str) -> list[str]:
    return [path] if not files.is_remote(path) and files.exists(path) else expand_braces(path)


def _resolve(asked: Sequence[str], options: dict[str, Any]) -> tuple[str, list[str]]:
    """All tars and parquets that these paths mean, and the folder below which they are named."""
    found: list[str] = []
    named: list[str] = []  # files asked for one by one: they must be there, and their other half may be
    for path in asked:
        if _suffix(path) in _SUFFIXES and not _is_glob(path):
            named.append(files.normal(path, options))
        elif files.is_folder(path, options):
            found += _in_folder(path, options)
        elif _is_glob(path):
            for match in files.glob_files(path, options):
                if _suffix(match) in _SUFFIXES:
                    named.append(match)
                elif files.is_folder(match, options):
                    found += _in_folder(match, options)
        else:
            raise UsageError(f"{redact(path)}: no such folder or shard (a folder, a glob, a *.tar or a brace list)")
    found += _with_other_halves(named, options)
    if len(asked) == 1 and not named and not _is_glob(asked[0]):
        return files.normal(asked[0], options), found
    levels = zip(*(path.split("/")[:-1] for path in found), strict=False)
    return "/".join(level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels)), found


def _in_folder(folder: str, options: dict[str, Any]) -> list[str]:
    """Tars and parquets of a folder and its subfolders; in those, parquets only beside tars."""
    found = files.list_files(folder, _SUFFIXES, options, recursive=True)
    top = files.normal(folder, options).rstrip("/")
    with_tars = {path.rpartition("/")[0] for path in found if _suffix(path) == ".tar"} | {top}
    return [path for path in found if path.rpartition("/")[0] in with_tars]


def _with_other_halves(named: Sequence[str], options: dict[str, Any]) -> list[str]:
    """The files that were named, and the tar or parquet of the same stem where there is one."""
    wanted: dict[str, str] = {}  # file -> the one it was looked up for
    for path in named:
        stem, suffix = os.path.splitext(path)
        halves = [stem + other for other in _SUFFIXES if other != suffix.lower()]
        for candidate in (path, *(halves if _without_query(path) == path else ())):
            wanted.setdefault(candidate, path)
    remote = [path for path in wanted if files.is_remote(path) and not path.startswith(("http://", "https://"))]
    listed = {
        path
        for folder in dict.fromkeys(path.rpartition("/")[0] for path in remote)
        for path in files.list_files(folder, _SUFFIXES, options)
    }
    with ThreadPoolExecutor(16) as pool:  # web servers list nothing: every name is a request of its own
        others = [path for path in wanted if path not in remote]
        answers = pool.map(lambda path: files.exists(path, options), others)
        there = listed | {path for path, yes in zip(others, answers, strict=True) if yes}
    present = [path for path in wanted if path in there]
    shards_there = {wanted[path] for path in present} | set(present)
    missing = [path for path in dict.fromkeys(named) if path not in shards_there]
    if missing:
        raise UsageError(
            f"{len(missing)} of {len(named)} shards do not exist: {', '.join(map(redact, missing[:5]))}"
            + (", ..." if len(missing) > 5 else "")
        )
    return present


def _is_glob(path: str) -> bool:
    if path.startswith(("http://", "https://")):
        return "*" in path  # a question mark begins a query there
    return any(c in path for c in "*?[") and (files.is_remote(path) or not files.exists(path))


def _without_query(path: str) -> str:
    return path.partition("?")[0] if path.startswith(("http://", "https://")) else path


def _suffix(path: str) -> str:
    return os.path.splitext(_without_query(path))[1].lower()


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return any(test(kind) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))
