"""Path lists: a text file with one image path a line, cut into shards by line numbers.

The list is read once to learn where each shard's lines begin, and never held: a shard knows its byte
range and a digest of it, whatever the length of the list.
"""

from __future__ import annotations

import copy
import hashlib
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from curator_embed.errors import Reason, SourceError, UsageError
from curator_embed.sources.shard import Note, Sample, Shard, StoredSample
from curator_embed.sources.sniff import sniff
from curator_embed.storage import files
from curator_embed.storage.byte_source import ByteSource, open_source
from curator_embed.storage.files import redact
from curator_embed.storage.gate import Gate, Place, Refusals, Unread, parent
from curator_embed.storage.objects import ReadPolicy, read_many
from curator_embed.storage.options import for_the_web

LINE_DIGITS = 9
"""Digits of line numbers in file names: they must not depend on how long the list is, or is going to be."""

SCAN_BYTES = 8 << 20

GIVE_UP_AFTER = 32
"""Images that are tried before a store that answers none of them counts as out of reach."""

_BOM = b"\xef\xbb\xbf"
_RANGE = re.compile(rf"(.*)_(\d{{{LINE_DIGITS},}})-(\d{{{LINE_DIGITS},}})", re.DOTALL)


@dataclass(frozen=True, slots=True)
class LineRange:
    """Consecutive lines of a list.

    Attributes:
        start: number of the first line, counted from 0.
        end: number of the line after the last.
        offset: where the first line begins, in bytes.
        stop: where the last one ends.
        digest: of these bytes, 32 hexadecimal digits.
    """

    start: int
    end: int
    offset: int
    stop: int
    digest: str


def index_lines(source: ByteSource, lines_per_range: int, start: int = 0, end: int | None = None) -> list[LineRange]:
    """Cut a list into ranges of ``lines_per_range`` lines, reading it once and holding none of it.

    A last line without a line end counts; what follows the last line end does not when it is empty.

    Args:
        start: the first line wanted, counted from 0.
        end: the line after the last one wanted; None, or more than there are, for all of them. The
            list is not read any further than that.

    Returns:
        The ranges in order; none when the list has no line ``start``.
    """
    ranges: list[LineRange] = []
    cut = start  # the line whose beginning is looked for
    begin: tuple[int, int] | None = (0, 0) if start == 0 else None  # line and offset of the range that is open
    digest = hashlib.blake2b(digest_size=16)
    if begin is not None:
        cut = _next_cut(0, lines_per_range, end)
    ended = at = 0  # lines that have ended before offset ``at``
    last = b""

    def close(line: int, offset: int) -> None:
        assert begin is not None
        ranges.append(LineRange(begin[0], line, begin[1], offset, digest.hexdigest()))

    while at < source.size:
        chunk = source.pread(at, SCAN_BYTES)
        newlines = np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == 0x0A)
        taken = 0
        while cut - ended <= len(newlines):
            upto = int(newlines[cut - ended - 1]) + 1
            if begin is not None:
                digest.update(memoryview(chunk)[taken:upto])
                close(cut, at + upto)
                digest = hashlib.blake2b(digest_size=16)
            if cut == end or at + upto == source.size:
                return ranges
            begin, taken = (cut, at + upto), upto
            cut = _next_cut(cut, lines_per_range, end)
        if begin is not None:
            digest.update(memoryview(chunk)[taken:])
        ended += len(newlines)
        at += len(chunk)
        last = chunk[-1:]
    if begin is not None and source.size:
        close(ended + (last != b"\n"), source.size)
    return ranges


def _next_cut(line: int, lines_per_range: int, end: int | None) -> int:
    return line + lines_per_range if end is None else min(line + lines_per_range, end)


@dataclass(frozen=True)
class PathList:
    """A list and how its lines become paths. Shared by all shards of the list.

    Attributes:
        path: the list, a local path or any fsspec URL.
        dataset: the first component of every line, which is no part of the real path, and the beginning of
            the shards' names.
        root: what all images lie below: a folder, or a bucket with or without a prefix. None: they lie below the
            list's own folder, in its own bucket, or are http(s) URLs.
        storage_options: for fsspec; below the root or, without one, for the list's own host only.
        policy: how images are read.
        part: the lines that were asked for, as ``Shard.part`` has it.
    """

    path: str = field(repr=False)  # URLs and options may hold secrets
    dataset: str
    root: str | None = field(default=None, repr=False)
    storage_options: dict[str, Any] = field(default_factory=dict, repr=False)
    policy: ReadPolicy = field(default_factory=ReadPolicy)
    part: str = ""

    def gate(self) -> Gate:
        """What the lines may open."""
        if self.root is not None:
            return Gate.of_root(self.root, self.policy.links)
        return Gate.of_list(self.path, self.policy.links)

    def named(self, line: bytes) -> str:
        """What a line names, without the dataset's name."""
        text = line.decode("utf-8", "surrogateescape")
        if not text.startswith(f"{self.dataset}/"):
            return text
        text = text[len(self.dataset) + 1 :]
        return text if self.root is None else text.lstrip("/")

    def places(self, lines: Iterable[bytes], gate: Gate) -> Iterator[Place | Unread]:
        """Where the image of each line lies, or why it may not be opened."""
        return map(gate.admit, map(self.named, lines))


class PathListShard(Shard):
    """Some lines of a path list; ``Sample.key`` is the line as it stands there. Picklable and small.

    A line that is not UTF-8 keeps its bytes to find the file; as a key, those that are none read ``\\xff``.
    An empty line is a row without an image.
    """

    by_position = True

    def __init__(self, listed: PathList, lines: LineRange, table: str | None = None) -> None:
        self.listed, self.lines, self.table = listed, lines, table
        self._notes: list[Note] = []

    def __repr__(self) -> str:
        return f"PathListShard({self.name!r}, {redact(self.listed.path)!r})"

    @property
    def name(self) -> str:  # type: ignore[override]
        """``{dataset}_{start}-{end}``, line numbers zero-padded."""
        return range_name(self.listed.dataset, self.lines.start, self.lines.end)

    @property
    def part(self) -> str:  # type: ignore[override]
        """The lines that were asked for when the list was opened."""
        return self.listed.part

    @property
    def images_below(self) -> str:  # type: ignore[override]
        """The root, or the list's folder."""
        return redact(self.listed.root or parent(self.listed.path))

    def samples(self, *, id_col: str, extras: bool = False) -> Iterator[Sample]:
        """Yield a sample a line, in order, reading many images at a time.

        Raises:
            SourceError: the list has changed since it was opened, or none of the first images can be read for
                reasons that are not their own (the bucket, the network, the permissions).
        """
        self._notes = []
        lines = self._lines()
        root = self.listed.root
        if root is not None and not files.is_remote(root) and not os.path.isdir(files.local_path(root)):
            raise SourceError(root, "no such folder", "Say with root= where the images of the list lie")
        gate = self.listed.gate()
        reads = self._read(filter(None, lines), gate)
        failures: list[Unread] = []
        refusals = Refusals()
        good = 0
        for line in lines:
            key = as_text(line)
            if not line:
                yield Sample(key, None)
                continue
            answer = next(reads)
            if isinstance(answer, Unread):
                failures.append(answer)
                refusals.add(key, answer)
                if not good and len(failures) == GIVE_UP_AFTER:
                    self._refuse_unreachable(failures)
                yield Sample(key, None, answer.reason, answer.detail)
            else:
                good += 1
                yield Sample(key, answer)
        self._tell(good, failures, refusals, lines)

    def keys(self, *, id_col: str) -> list[str]:
        """The lines, in order; no image is read."""
        return [as_text(line) for line in self._lines()]

    def stored_samples(self, ordinals: Collection[int]) -> Iterator[StoredSample]:
        """The files of some lines, byte for byte; a line whose file is not there, or is refused, has no members.

        Raises:
            SourceError: a file is there and cannot be read.
        """
        wanted = [(n, line) for n, line in enumerate(self._lines()) if n in ordinals]
        gate = self.listed.gate()
        reads = self._read((line for _, line in wanted if line), gate)
        for ordinal, line in wanted:
            answer = next(reads) if line else Unread(Reason.NO_IMAGE, "")
            if isinstance(answer, bytes):
                yield StoredSample(ordinal, ((extension(as_text(line), answer), answer),))
            elif answer.reason in (Reason.NOT_FOUND, Reason.NO_IMAGE, Reason.REFUSED):
                yield StoredSample(ordinal, ())
            else:
                path = gate.shown(self.listed.named(line))
                raise SourceError(path, f"cannot be read ({answer.detail})", "Restore it, or leave its row out")

    def table_path(self) -> str | None:
        """Where the metadata parquet of these lines lies, or None when there is none yet."""
        return self.table

    def with_table(self, path: str) -> PathListShard:
        """The same lines with another metadata parquet."""
        other = copy.copy(self)
        other.table, other._notes = path, []
        return other

    def image_source(self) -> str:
        """The list, with the lines."""
        return f"{redact(self.listed.path)}, lines {self.lines.start}-{self.lines.end}"

    def own_table(self) -> str:
        """Beside the list, in a folder named after it, ending and all: ``photos.txt`` often names the images of
        ``photos/``, whose own tables lie in ``photos_metadata``. Where tables were named, there."""
        return f"{self.named_tables or f'{self.listed.path}_metadata'}/{self.name}.parquet"

    def fingerprint(self) -> dict[str, Any]:
        """A digest of the lines. Not of the images: looking at each would cost as much as reading them."""
        return {"lines": self.lines.digest}

    def row_estimate(self) -> int:
        """The number of lines."""
        return self.lines.end - self.lines.start

    def notes(self) -> list[Note]:
        """What the last pass over ``samples`` noticed."""
        return list(self._notes)

    def _read(self, lines: Iterable[bytes], gate: Gate) -> Iterator[bytes | Unread]:
        return read_many(self.listed.places(lines, gate), self.listed.storage_options, self.listed.policy)

    def _looked_for(self, lines: list[bytes]) -> str:
        """Where the first image was looked for."""
        return self.listed.gate().shown(self.listed.named(next(filter(None, lines))))

    def _lines(self) -> list[bytes]:
        lines = self.lines
        with open_source(self.listed.path, self.listed.storage_options, block_bytes=1 << 20) as source:
            data = source.pread(lines.offset, lines.stop - lines.offset)
        if hashlib.blake2b(data, digest_size=16).hexdigest() != lines.digest:
            raise SourceError(
                redact(self.listed.path),
                f"has changed since it was opened (lines {lines.start} to {lines.end})",
                "Open it again; shards whose lines are the same will be skipped",
            )
        found = data.removesuffix(b"\n").split(b"\n")
        if lines.offset == 0:
            found[0] = found[0].removeprefix(_BOM)
        return [line.removesuffix(b"\r") for line in found]

    def _refuse_unreachable(self, failures: list[Unread]) -> None:
        """A shard is not done when the whole store was out of reach."""
        if all(failure.reason == Reason.READ_ERROR for failure in failures):
            raise SourceError(
                redact(self.listed.root or self.listed.path),
                f"not one of the first {len(failures)} images of lines {self.lines.start} to {self.lines.end} can be "
                f"read ({failures[0].detail})",
                "Check root=, the permissions and the connection, and run again: finished files are kept",
            )

    def _tell(self, good: int, failures: list[Unread], refusals: Refusals, lines: list[bytes]) -> None:
        if refusals.count:
            self._note(refusals.note())
        asked = good + len(failures)
        missing = sum(failure.reason == Reason.NOT_FOUND for failure in failures)
        unreachable = [failure for failure in failures if failure.reason == Reason.READ_ERROR]
        if failures and len(unreachable) == len(failures) and not good:
            self._note(f"not one image can be read ({unreachable[0].detail}). Check the connection and the permissions")
        elif failures and not good and not refusals.count:
            first = self._looked_for(lines)
            self._note(f"not one image is there; the first was looked for at {first}. Check root= and dataset=")
        elif missing > good:
            self._note(
                f"{missing} of {asked} images are not there. If root= or dataset= was wrong, correct it and run again "
                "with overwrite=True"
            )
        elif unreachable:
            self._note(f"{len(unreachable)} images cannot be read ({unreachable[0].detail})")
        self._tell_of_options(lines)

    def _tell_of_options(self, lines: list[bytes]) -> None:
        listed = self.listed
        if listed.root is not None or files.is_remote(listed.path) or not for_the_web(listed.storage_options):
            return
        for line in lines:
            if line.startswith((b"http://", b"https://")):
                host = redact("/".join(as_text(line).split("/")[:3]))
                self._note(
                    "headers and credentials in storage_options go to no host that only lines name. If they are for "
                    f"{host}, pass root='{host}'"
                )
                return

    def _note(self, message: str) -> None:
        self._notes.append(Note(self.name, redact(self.listed.path), message))


def range_of(name: str) -> tuple[str, int, int] | None:
    """Dataset, start and end of a name that ``range_name`` made; None of any other."""
    found = _RANGE.fullmatch(name)
    if found is None:
        return None
    dataset, start, end = found[1], int(found[2]), int(found[3])
    return (dataset, start, end) if range_name(dataset, start, end) == name else None


def range_name(dataset: str, start: int, end: int) -> str:
    """``{dataset}_{start}-{end}``, with zeros so that names sort as lines do."""
    return f"{dataset}_{start:0{LINE_DIGITS}d}-{end:0{LINE_DIGITS}d}"


def cut_otherwise(found: Iterable[str], own: Sequence[str]) -> list[str]:
    """Of names by range, those that hold rows of ``own`` cut in another way, sorted.

    Args:
        own: names of neighbouring ranges of one list, in order.
    """
    (dataset, first, _), (_, _, last) = _ranges(own)[0], _ranges(own)[-1]
    others = _ranges(set(found).difference(own))
    return sorted(range_name(*r) for r in others if r[0] == dataset and r[1] < last and first < r[2])


def to_fit(found: Collection[str], own: Sequence[str]) -> str:
    """What to do about ranges that are cut otherwise, as a sentence.

    Args:
        found: names of all files that are there.
        own: names of neighbouring ranges of one list, in order; ``cut_otherwise(found, own)`` has some.
    """
    there = _ranges(cut_otherwise(found, own))
    mine = _ranges(own)
    (_, first, _), (_, _, last) = mine[0], mine[-1]
    if len(there) == 1:
        _, begin, end = there[0]
        before = [name for name, (_, start, _) in zip(own, mine, strict=True) if start < begin]
        # The list ended in this file, which would now hold more lines: all that came before it is there.
        if any(start == begin and end < stop for _, start, stop in mine) and set(before) <= set(found):
            return f"If lines were added behind line {end}, pass start_line={end} to work on these alone"
    width = max(end - begin for _, begin, end in there)
    # All files that are there were cut so, those among them that would be cut so now as well.
    same = [*there, *_ranges(set(own) & set(found))]
    if all((begin - first) % width == 0 and end == min(begin + width, last) for _, begin, end in same):
        return f"Pass images_per_file={width}, as when they were written"
    return f"Remove {'it' if len(there) == 1 else 'these files'} and run again"


def _ranges(names: Iterable[str]) -> list[tuple[str, int, int]]:
    return [found for name in names if (found := range_of(name)) is not None]


def as_text(line: bytes) -> str:
    """A line as a string column can hold it."""
    return line.decode("utf-8", "backslashreplace")


def extension(name: str, data: bytes) -> str:
    """The extension of a file name without its dot, or one for what the bytes are when the name has no plain one.

    A name may be a URL: its query, which may be signed, is no extension.
    """
    suffix = os.path.splitext(name)[1][1:].lower()
    if suffix.isascii() and suffix.isalnum() and len(suffix) <= 8:
        return suffix
    kind = sniff(data) or "bin"
    return {"jpeg": "jpg", "jpeg2000": "jp2", "pnm": "ppm"}.get(kind, kind)


def find_lines(
    path: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    dataset: str | None = None,
    start_line: int = 0,
    end_line: int | None = None,
    images_per_file: int = 1024,
    storage_options: files.StorageOptions = None,
    policy: ReadPolicy | None = None,
) -> list[PathListShard]:
    """Open a path list; see ``ImageTextPairDataset.from_path_list``."""
    listing = os.fspath(path)
    if start_line < 0 or (end_line is not None and end_line <= start_line):
        raise UsageError(f"start_line={start_line}, end_line={end_line}: no lines lie between them (counted from 0)")
    if images_per_file < 1:
        raise UsageError(f"images_per_file={images_per_file}: at least 1")
    if dataset is None:
        dataset = os.path.splitext(os.path.basename(listing.rstrip("/")))[0]
    if not dataset or "/" in dataset:
        raise UsageError(f"dataset={dataset!r} begins file names and lines: give a name without '/'")
    if not files.is_remote(listing):
        listing = os.path.abspath(files.local_path(listing))  # workers may run in other folders
    if not files.exists(listing, storage_options):
        raise UsageError(f"{redact(listing)}: no such file")
    if root is not None and not files.is_remote(os.fspath(root)):
        root = os.path.abspath(files.local_path(os.fspath(root)))
        if not os.path.isdir(root):
            raise UsageError(f"{root}: no such folder. Say with root= where the images of the list lie")
    elif root is not None:
        files.filesystem(os.fspath(root), storage_options)  # what it lacks is said now, and not row by row
    with open_source(listing, storage_options) as source:
        ranges = index_lines(source, images_per_file, start_line, end_line)
    if not ranges:
        problem = "the list is empty" if start_line == 0 else f"the list has no line {start_line} (counted from 0)"
        raise UsageError(f"{redact(listing)}: {problem}")
    listed = PathList(
        listing,
        dataset,
        None if root is None else os.fspath(root),
        dict(storage_options or {}),
        policy or ReadPolicy(),
        range_name(dataset, ranges[0].start, ranges[-1].end),
    )
    return [PathListShard(listed, lines) for lines in ranges]
