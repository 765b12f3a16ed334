"""DALI's index files (``00000.idx`` beside ``00000.tar``): what they say, and whether to believe them.

Format (as DALI's wds2idx writes it): a line ``v1.2 N``, then a line a sample with ``ext offset size name``
for each of its members; v1.1 has no names. ``offset`` is the data's. ``ext`` is everything after the
first dot of the base name.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from curator_embed.errors import SourceError
from curator_embed.sources.grouping import group_members, split_name
from curator_embed.sources.tar import BLOCK, BadHeader, Member, TarScan, parse_header
from curator_embed.storage.byte_source import ByteSource, open_source, read_all
from curator_embed.storage.files import (
    StorageOptions,
    exists,
    is_remote,
    local_path,
    modified,
    redact,
    remote_info,
    write_whole,
)

_CHECKED_HEADERS = 16
_ZEROS = bytes(BLOCK)


class Entry(NamedTuple):
    """One member of a sample in an index; ``name`` is None in version 1.1."""

    extension: str
    offset: int
    size: int
    name: str | None


@dataclass(frozen=True)
class Index:
    """A parsed index: one list of entries a sample, in the file's order."""

    samples: tuple[tuple[Entry, ...], ...]

    @property
    def named(self) -> bool:
        """Whether every entry has its member's name (version 1.2)."""
        return all(entry.name is not None for entry in self.entries())

    def entries(self) -> list[Entry]:
        """All entries, in the order in which they lie in the tar, each once."""
        return sorted({entry.offset: entry for sample in self.samples for entry in sample}.values(), key=_offset)

    def members(self) -> list[Member]:
        """All entries of a named index as tar members, in tar order."""
        return [Member(entry.name or "", entry.offset, entry.size) for entry in self.entries()]


class BadIndex(ValueError):
    """The index is broken or does not fit its tar; the message says why."""


def index_path(tar_path: str) -> str:
    """Where the index of a tar lies: beside it, with the suffix ``.idx``."""
    return os.path.splitext(tar_path)[0] + ".idx"


def parse_index(text: str) -> Index:
    """Parse the text of an ``.idx`` file, version 1.1 or 1.2.

    Raises:
        BadIndex: it is neither, or it is cut or damaged.
    """
    lines = text.split("\n")
    version, _, count = lines[0].strip().partition(" ")
    width = {"v1.1": 3, "v1.2": 4}.get(version)
    if width is None:
        raise BadIndex(f"unknown version '{lines[0][:20]}'")
    samples = []
    for number, line in enumerate(lines[1:], start=2):
        words = line.split()
        if not words:
            continue
        if len(words) % width or not all(
            word.isascii() and word.isdigit() and len(word) < 20 for column in (1, 2) for word in words[column::width]
        ):
            raise BadIndex(f"line {number} is damaged")
        names: Sequence[str | None] = words[3::4] if width == 4 else [None] * (len(words) // 3)
        offsets, sizes = map(int, words[1::width]), map(int, words[2::width])
        samples.append(tuple(map(Entry, words[::width], offsets, sizes, names)))
    if not count.strip().isdecimal() or int(count) != len(samples):
        raise BadIndex(f"announces '{count.strip()[:20]}' samples and lists {len(samples)}")
    return Index(tuple(samples))


def format_index(samples: Iterable[Iterable[Member]]) -> str:
    """Write samples as the text of an ``.idx`` file: version 1.2, or 1.1 where a name holds white space.

    Members without an extension have no place in an index and are left out.

    Raises:
        ValueError: an extension holds white space, which neither version can express; it names the member.
    """
    rows: list[list[tuple[str, Member]]] = []
    named = True
    for sample in samples:
        row = []
        for member in sample:
            split = split_name(member.name)
            if split is None or not split[1]:
                continue
            extension = member.name.rpartition("/")[2].partition(".")[2]  # as written: DALI minds the case
            if not _is_word(extension):
                raise ValueError(f"the extension of '{member.name}' holds white space")
            named = named and _is_word(member.name)
            row.append((extension, member))
        if row:
            rows.append(row)
    lines = [f"v1.{2 if named else 1} {len(rows)}"]
    for row in rows:
        lines.append(" ".join(f"{e} {m.offset} {m.size}" + (f" {m.name}" if named else "") for e, m in row))
    return "\n".join(lines) + "\n"


def index_tar(tar_path: str, storage_options: StorageOptions = None) -> str:
    """Write the DALI index of a tar beside it, in one piece.

    Returns:
        The path of the index.

    Raises:
        SourceError: the tar is damaged, holds a name that no index can express, or the place is not writable.
    """
    with open_source(tar_path, storage_options) as source:
        scan = TarScan(source)
        samples = group_members(scan)
    if scan.damage is not None:
        raise SourceError(redact(tar_path), scan.damage, "Restore the tar; an index would hide the damage")
    try:
        text = format_index(samples.values())
    except ValueError as exc:
        raise SourceError(redact(tar_path), str(exc), "Rename that member, or work without an index") from exc
    write_whole(index_path(tar_path), text.encode(), storage_options)
    return index_path(tar_path)


def read_index(tar_path: str, source: ByteSource, storage_options: StorageOptions = None) -> Index | None:
    """Read the index beside a tar, if there is one, and check that it belongs to the tar as it is now.

    Checked are: the index is not older than the tar; no member reaches behind the tar's end; a sample of
    offsets is preceded by the header of that very member (name and size).

    Args:
        source: the opened tar.

    Raises:
        BadIndex: it is broken or stale; the message says which and why.
        SourceError: it cannot be read.
    """
    path = index_path(tar_path)
    if not exists(path, storage_options):
        return None
    if _is_older(path, tar_path, storage_options):
        raise BadIndex("older than its tar")
    try:
        index = parse_index(read_all(path, storage_options).decode())
    except UnicodeDecodeError:
        raise BadIndex("not text") from None
    entries = index.entries()
    for entry in entries:
        if entry.offset % BLOCK or entry.offset < BLOCK or entry.offset + entry.size > source.size:
            raise BadIndex(f"offset {entry.offset} (size {entry.size}) does not fit a tar of {source.size} bytes")
    step = max(1, -(-len(entries) // _CHECKED_HEADERS))
    for entry in {*entries[::step], *entries[-1:]}:
        _check_header(entry, source)
    return index


def has_fresh_index(tar_path: str, storage_options: StorageOptions = None) -> bool:
    """Whether an index that belongs to the tar as it is now lies beside it. Raises SourceError."""
    with open_source(tar_path, storage_options) as source:
        try:
            return read_index(tar_path, source, storage_options) is not None
        except BadIndex:
            return False


def is_complete(members: Sequence[Member], source: ByteSource) -> bool:
    """Whether members prove by their places alone that the tar holds nothing else.

    True only if each header directly follows the data before it and the end of the tar the last data.
    Extension headers (long names) break the proof, not the index.

    Args:
        members: sorted by offset.
    """
    end = 0
    for member in members:
        if member.offset != end + BLOCK:
            return False
        end = member.end
    return source.pread(end, 2 * BLOCK) in (_ZEROS + _ZEROS, _ZEROS, b"")


def count_indexed(tar_path: str, storage_options: StorageOptions = None) -> int | None:
    """How many samples the index beside a local tar announces; None when there is none, or it is old or remote."""
    if is_remote(tar_path) or _is_older(index_path(tar_path), tar_path, storage_options):
        return None
    try:
        with open(local_path(index_path(tar_path)), "rb") as file:
            version, _, count = file.readline(64).partition(b" ")
    except OSError:
        return None
    return int(count) if version in (b"v1.1", b"v1.2") and count.strip().isdigit() else None


def _check_header(entry: Entry, source: ByteSource) -> None:
    try:
        header = parse_header(source.pread(entry.offset - BLOCK, BLOCK))
    except BadHeader:
        raise BadIndex(f"no header of a member lies before offset {entry.offset}") from None
    # Extension headers carry what a plain header cannot: long and non-ASCII names, sizes of 8 GiB and more.
    plain = entry.name is not None and entry.name.isascii() and len(entry.name) < 100
    if (plain and header.name != entry.name) or (entry.size < 8 << 30 and header.size != entry.size):
        raise BadIndex(f"the member at offset {entry.offset} is '{header.name}' of {header.size} bytes")


def _is_older(path: str, tar_path: str, storage_options: StorageOptions) -> bool:
    """Whether an index was written before its tar; unknown times count as no, a missing index as yes."""
    if not is_remote(tar_path):
        try:
            return os.stat(local_path(path)).st_mtime_ns < os.stat(local_path(tar_path)).st_mtime_ns
        except FileNotFoundError:
            return True
    times: list[Any] = [modified(remote_info(p, storage_options)) for p in (path, tar_path)]
    try:
        return bool(times[0] < times[1])
    except TypeError:
        return False


def _offset(entry: Entry) -> int:
    return entry.offset


def _is_word(text: str) -> bool:
    return text.split() == [text]
