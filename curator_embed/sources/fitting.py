"""Which images of a folder belong to which parquet file of an output. Pure: ids and marks in, positions out.

A folder grows and shrinks anywhere, and its files must not move: what a file has a row for stays in that file, under
its name, and images that no file knows are cut into new files behind.
"""

from __future__ import annotations

import base64
import bisect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MARK_BYTES = 6
"""Bytes of one image's mark: enough for a few million marks to be compared with each other."""


@dataclass(frozen=True, slots=True)
class KnownFile:
    """A parquet file that is there, and the images that it answers for.

    Attributes:
        name: its stem.
        start, end: the positions that its name takes, ``end`` not included.
        ids: of its rows.
        marks: of the images that it was made from, ``MARK_BYTES`` each: rows may have been dropped or cut off. Empty
            where it does not say.
    """

    name: str
    start: int
    end: int
    ids: Iterable[str | None]
    marks: bytes = b""


@dataclass(frozen=True, slots=True)
class Cut:
    """Images that should stay together under their name, because there is a table of exactly these.

    Attributes:
        gone: ids of the table's rows whose images are not listed.
    """

    start: int
    end: int
    images: tuple[int, ...]
    gone: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """The images of one file, as positions in the listing, in order.

    Attributes:
        start, end: the positions that its name takes.
        images: none where all that it has rows for are gone.
        file: the name of the file that is there; empty for a new one.
        cut: position of the ``Cut`` that it is; None for none.
    """

    start: int
    end: int
    images: tuple[int, ...]
    file: str = ""
    cut: int | None = None


@dataclass(frozen=True, slots=True)
class Twice:
    """An id that two files have a row for, and how many such ids there are."""

    id: str
    one: str
    other: str
    count: int


@dataclass(frozen=True)
class Fit:
    """How a listing fits the files that are there.

    Attributes:
        pieces: in the order of their positions; every image is in exactly one.
        gone: per file, the ids of rows whose images are not listed.
        twice: the first id that is in two files; then the pieces mean nothing.
        given_up: positions of the cuts that could not be kept.
    """

    pieces: list[Piece]
    gone: dict[str, list[str]] = field(default_factory=dict)
    twice: Twice | None = None
    given_up: list[int] = field(default_factory=list)


def fit(
    keys: Sequence[str], marks: Sequence[bytes], files: Iterable[KnownFile], per_file: int, cuts: Sequence[Cut] = ()
) -> Fit:
    """Give every file the images that are its own, and cut the others into new files.

    An image belongs to a file that has a row of its key, or that was made from it and has none (a row that was
    dropped, or cut off by a limit). New images fill positions that no file has, in order: those of files that were
    removed or never written first, so that a run that was stopped goes on with the names it had, then behind the last.

    Args:
        keys: of the listed images, in order.
        marks: one per image: what changes when it is replaced.
        files: those that are there; read once, one after the other.
        per_file: at most so many images in a new file.
        cuts: cuts to keep where no file stands in the way.
    """
    place: dict[str, int] = {}
    twins: dict[str, list[int]] = {}  # names that differ in bytes that are no text may read the same
    for position, key in enumerate(keys):
        if place.setdefault(key, position) != position:
            twins.setdefault(key, [place[key]]).append(position)

    owner = [-1] * len(keys)
    known: list[KnownFile] = []
    missing: dict[str, int] = {}
    doubled: list[tuple[str, int, int]] = []
    for number, file in enumerate(files):
        known.append(KnownFile(file.name, file.start, file.end, (), file.marks))
        for key in filter(None, file.ids):
            candidates = twins.get(key) or [at for at in (place.get(key),) if at is not None]
            if not candidates:
                if (first := missing.setdefault(key, number)) != number:
                    doubled.append((key, first, number))
                continue
            free = next((at for at in candidates if owner[at] < 0), None)
            if free is not None:
                owner[free] = number
            elif all(owner[at] != number for at in candidates):
                doubled.append((key, owner[candidates[0]], number))
    if doubled:
        key, first, second = doubled[0]
        return Fit([], twice=Twice(key, known[first].name, known[second].name, len(doubled)))

    members = _members(owner, marks, known)
    pieces = [Piece(f.start, f.end, tuple(m), f.name) for f, m in zip(known, members, strict=True)]
    given_up = _keep_cuts(pieces, cuts, owner, missing)
    taken = {position for piece in pieces for position in piece.images}
    rest = [position for position in range(len(keys)) if position not in taken]
    pieces += _cut(rest, _gaps([(piece.start, piece.end) for piece in pieces]), per_file)
    gone: dict[str, list[str]] = {}
    for key, number in missing.items():
        gone.setdefault(known[number].name, []).append(key)
    return Fit(sorted(pieces, key=lambda piece: (piece.start, piece.end)), gone, None, given_up)


def _members(owner: list[int], marks: Sequence[bytes], known: Sequence[KnownFile]) -> list[list[int]]:
    """The images of every file, in order: those with a row, and those that it was made from without one."""
    members: list[list[int]] = [[] for _ in known]
    for position, number in enumerate(owner):
        if number >= 0:
            members[number].append(position)
    # Marks are short. Only those that no row explains are looked for, so that few are compared with many.
    unexplained: dict[bytes, int] = {}
    for number, file in enumerate(known):
        own = [marks[position] for position in members[number]]
        if file.marks and file.marks != b"".join(own):
            for mark in set(split_marks(file.marks)).difference(own):
                unexplained.setdefault(mark, number)
    if unexplained:
        for position, number in enumerate(owner):
            if number < 0 and (made := unexplained.get(marks[position])) is not None:
                owner[position] = made
                members[made].append(position)
    return [sorted(positions) for positions in members]


def _keep_cuts(pieces: list[Piece], cuts: Sequence[Cut], owner: Sequence[int], missing: Mapping[str, int]) -> list[int]:
    """Add the cuts that no file stands in the way of, and note which pieces are cuts; returns those given up."""
    given_up: list[int] = []
    there = {(piece.start, piece.end): number for number, piece in enumerate(pieces)}
    free = list(_gaps(there))
    for number, cut in enumerate(cuts):
        at = there.get((cut.start, cut.end))
        elsewhere = any(missing.get(key, at) != at for key in cut.gone)  # another file has that row
        if at is not None and not elsewhere and pieces[at].images == cut.images:
            piece = pieces[at]
            pieces[at] = Piece(piece.start, piece.end, piece.images, piece.file, number)
        elif at is None and not elsewhere and _is_free(cut, free) and all(owner[place] < 0 for place in cut.images):
            pieces.append(Piece(cut.start, cut.end, cut.images, "", number))
        else:
            given_up.append(number)
    return given_up


def _is_free(cut: Cut, gaps: Sequence[tuple[int, int | None]]) -> bool:
    at = bisect.bisect_right(gaps, cut.start, key=lambda gap: gap[0]) - 1
    return at >= 0 and ((end := gaps[at][1]) is None or cut.end <= end)


def _gaps(taken: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int | None]]:
    """Positions that are free: (first, the one after the last), in order; the last gap has no end."""
    at = 0
    for start, end in sorted(taken):
        if start > at:
            yield at, start
        at = max(at, end)
    yield at, None


def _cut(images: Sequence[int], gaps: Iterable[tuple[int, int | None]], per_file: int) -> Iterator[Piece]:
    """Fill the gaps in order with at most ``per_file`` images a piece.

    Whichever of the pieces are written, cutting what is left again gives the others as they were.
    """
    taken = 0
    for start, end in gaps:
        while taken < len(images) and (end is None or start < end):
            stop = start + per_file if end is None else min(start + per_file, end)
            mine = tuple(images[taken : taken + stop - start])
            yield Piece(start, start + len(mine), mine)
            start, taken = stop, taken + len(mine)


def marks_as_text(marks: bytes) -> str:
    """Marks as a fingerprint holds them."""
    return base64.b64encode(marks).decode()


def recorded_marks(samples: Mapping[str, Any]) -> bytes:
    """The marks in a recorded fingerprint; empty where there are none."""
    try:
        marks = base64.b64decode(samples.get("marks", ""), validate=True)
    except (TypeError, ValueError):
        return b""
    return b"" if len(marks) % MARK_BYTES else marks


def split_marks(marks: bytes) -> list[bytes]:
    """Single marks of many in a row."""
    return [marks[at : at + MARK_BYTES] for at in range(0, len(marks), MARK_BYTES)]
