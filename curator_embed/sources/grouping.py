"""How a tar's members make samples: webdataset's naming convention, as pure functions.

Kept apart from reading so that the convention can be tested on lists of names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal, NamedTuple

from curator_embed.sources.sniff import IMAGE_EXTENSIONS
from curator_embed.sources.tar import Member

KeySplit = Literal["first", "last"]

_META = re.compile(r"__[^/]*__($|/)")


def split_name(name: str, at: KeySplit = "first") -> tuple[str, str] | None:
    """Split a member's name into its sample's key and its extension, at a dot of the base name.

    "a/b/001.seg.png" is ("a/b/001", "seg.png") at the first dot, ("a/b/001.seg", "png") at the last.
    Folders belong to the key, a leading "./" does not. A name without a dot is all key.

    Returns:
        None for what belongs to no sample: hidden files (".DS_Store", "._001.jpg") and ``__meta__`` members.
    """
    while name.startswith("./"):
        name = name[2:].lstrip("/")
    folder, slash, base = name.rpartition("/")
    if not base or base.startswith(".") or _META.match(name):
        return None
    stem, _, extension = base.partition(".") if at == "first" or "." not in base else base.rpartition(".")
    return folder + slash + stem, extension


def kind_of(extension: str) -> Literal["image", "json", "txt", "other"]:
    """What an extension claims its member to be; of "seg.png" the last part counts."""
    last = extension.rpartition(".")[2].lower()
    if last in IMAGE_EXTENSIONS:
        return "image"
    return "json" if last == "json" else "txt" if last == "txt" else "other"


class Place(NamedTuple):
    """Where a member belongs: the ``k``-th sample (from 0) of its key, as what (the extension as it is
    written), and whether it is the ``first`` of that sample."""

    key: str
    k: int
    extension: str
    first: bool


class Grouper:
    """Assigns members to samples as they come.

    A member joins the latest sample of its key, unless that has one of this extension already
    (in any case): then it begins the next. Members of a sample need not stand together. Keeps a few dozen bytes
    a key, no members.
    """

    def __init__(self, at: KeySplit = "first") -> None:
        self._at: KeySplit = at
        self._latest: dict[str, tuple[int, tuple[str, ...]]] = {}
        self._shared: dict[tuple[str, ...], tuple[str, ...]] = {}  # most samples have the same few extensions

    def place(self, name: str) -> Place | None:
        """The place of the next member, by its name; None when it belongs to no sample."""
        split = split_name(name, self._at)
        if split is None:
            return None
        key, extension = split
        folded = extension.lower()
        k, present = self._latest.get(key, (-1, (folded,)))
        first = folded in present
        if first:
            k, present = k + 1, ()
        extensions = (*present, folded)
        self._latest[key] = k, self._shared.setdefault(extensions, extensions)
        return Place(key, k, extension, first)


def group_members(members: Iterable[Member], at: KeySplit = "first") -> dict[tuple[str, int], list[Member]]:
    """The members of every sample, under (key, k), in the order in which samples begin."""
    grouper = Grouper(at)
    groups: dict[tuple[str, int], list[Member]] = {}
    for member in members:
        if (place := grouper.place(member.name)) is not None:
            groups.setdefault((place.key, place.k), []).append(member)
    return groups
