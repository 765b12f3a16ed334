"""What an overwriting run still has to make anew: kept while it goes on, so that a killed one goes on where it stopped.

A finished shard's footer cannot tell a file that such a run has made from one that was there before and is just like
it. The record names the versions of the files that were there when the run began. When it is through, the record goes,
and the next one that is asked for begins anew.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from typing import Any

from curator_embed.storage.location import Token
from curator_embed.tables.bookkeeping import Bookkeeping
from curator_embed.tables.lock import parts_overlap
from curator_embed.tables.provenance import canonical_json

_PREFIX = "overwriting"


def forget(book: Bookkeeping, part: str, but: str = "") -> None:
    """Remove the records of runs that wrote the same files: what another run writes is not their work.

    Args:
        part: ``Shard.part`` of what is about to be written.
        but: the name of the record that the run itself keeps.
    """
    for name in book.names(_PREFIX):
        other = name.removeprefix(f"{_PREFIX}-").removesuffix(".json") if name.startswith(f"{_PREFIX}-") else ""
        if name != but and parts_overlap(part, other):
            book.remove(name)


class Overwriting:
    """The record of one overwriting run.

    Attributes:
        versions: of every file that is still to be made anew, by shard.
        made: files that a run which was stopped has made anew already.
        begun: when that run began, UTC; empty where there was none.
    """

    def __init__(self, book: Bookkeeping, part: str, asked: Any) -> None:
        """
        Args:
            part: ``Shard.part`` of what is written: parts of a list are overwritten side by side.
            asked: what the run makes, as plain JSON: a record of another one is no record.
        """
        self._book, self._part, self._name = book, part, f"{_PREFIX}-{part}.json" if part else f"{_PREFIX}.json"
        self.made = 0
        self.begun = ""
        self._asked = hashlib.sha256(canonical_json(asked).encode("utf-8", "backslashreplace")).hexdigest()[:32]
        self.versions: dict[str, Token] = {}

    def begin(self, there: Mapping[str, Token | None]) -> Overwriting:
        """Find out what is left to be made anew.

        Args:
            there: the version of each shard's file now; None where there is none.
        """
        now = {name: tuple(token) for name, token in there.items() if token is not None}
        kept = self._book.read(self._name)
        if isinstance(kept, dict) and kept.get("asked") == self._asked and isinstance(kept.get("versions"), dict):
            before = {str(name): tuple(version) for name, version in kept["versions"].items() if version}
            # What has changed since was made by that run; what it did not know of, too.
            left = {name: token for name, token in now.items() if before.get(name) == token}
            now, self.made, self.begun = left, len(now) - len(left), str(kept.get("begun", ""))
        self.versions = now
        return self

    def keep(self) -> None:
        """Write the record down, before the first file is replaced."""
        forget(self._book, self._part, but=self._name)
        begun = self.begun or time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        self._book.write(self._name, {"asked": self._asked, "begun": begun, "versions": self.versions})

    def end(self) -> None:
        """All is made anew."""
        self._book.remove(self._name)
