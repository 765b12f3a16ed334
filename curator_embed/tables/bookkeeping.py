"""Where a folder of tables keeps what is no table: reports, locks, the record of an export or of an overwriting run.

All of it lies beside the folder DIR, in ``DIR.curator_embed/``, so that below DIR there are only shards and every
reader takes DIR itself. Where nothing can be written beside DIR (a mount, a bucket's root) it lies inside, as
``.curator_embed/``. The one that is there is used by everybody, locks included.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from curator_embed.errors import UsageError
from curator_embed.storage.files import redact
from curator_embed.storage.location import Location

SUFFIX = ".curator_embed"
FORMER = "_curator_embed"
"""Where version 0.1.0 kept these files, inside the folder."""


@dataclass(frozen=True)
class Bookkeeping:
    """The place of one folder's bookkeeping; nothing is made before something is written.

    Attributes:
        folder: the folder of tables.
        place: where its bookkeeping lies, or will lie.
        former: where version 0.1.0 left some; None where it did not.
    """

    folder: Location
    place: Location
    former: Location | None = None
    _made: list[str] = field(default_factory=list, repr=False, compare=False)

    @classmethod
    def of(
        cls, folder: Location, state: str | None = None, storage_options: Mapping[str, Any] | None = None
    ) -> Bookkeeping:
        """Find the place.

        Args:
            folder: of tables; it need not exist.
            state: the place that somebody chose, a path or URL; None for the usual one.

        Raises:
            UsageError: it lies in two places.
        """
        path = folder.path.rstrip("/")
        former: Location | None = Location(folder.fs, f"{path}/{FORMER}")
        assert former is not None
        if not _is_there(former):
            former = None
        if state is not None:
            return cls(folder, Location.of(state, storage_options), former)
        beside, inside = Location(folder.fs, path + SUFFIX), Location(folder.fs, f"{path}/{SUFFIX}")
        has_sibling = bool(path.rpartition("/")[0]) and (folder.is_local or "/" in path.strip("/"))
        there = [place for place in ((beside, inside) if has_sibling else (inside,)) if _is_there(place)]
        if len(there) > 1:
            raise UsageError(
                f"{redact(beside.path)} and {redact(inside.path)} both hold reports and locks of {redact(path)}, and "
                f"only one of them counts. Remove {redact(inside.path)}, once no run is using it"
            )
        if there:
            return cls(folder, there[0], former)
        return cls(folder, beside if has_sibling and _may_make(beside) else inside, former)

    def file(self, name: str) -> Location:
        """One file of the bookkeeping."""
        return Location(self.place.fs, f"{self.place.path.rstrip('/')}/{name}")

    def make(self) -> None:
        """Make the folder, and bring over what version 0.1.0 left inside the folder of tables."""
        if self.place.is_local:
            missing = self.place.path.rstrip("/")
            while missing and not os.path.isdir(missing):
                self._made.append(missing)
                missing = os.path.dirname(missing)
            os.makedirs(self.place.path, exist_ok=True)
        if self.former is None:
            return
        former: list[str] = []
        with suppress(FileNotFoundError):  # another run has moved it
            former = self.former.fs.ls(self.former.path, detail=False)
        for path in former:
            name = path.rstrip("/").rpartition("/")[2]
            with suppress(FileNotFoundError):  # another run is moving them, too
                if self.place.is_local and self.former.is_local:
                    os.replace(path, self.file(name).path)
                else:
                    self.place.fs.pipe_file(self.file(name).path, self.former.fs.cat_file(path))
                    self.former.fs.rm_file(path)
        if self.former.is_local:
            with suppress(OSError):
                os.rmdir(self.former.path)

    def write(self, name: str, content: Any) -> None:
        """Keep JSON under a name, whole or not at all; text that no UTF-8 can hold is escaped.

        Raises:
            OSError, or what the file system raises: it cannot be written.
        """
        data = (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
        file = self.file(name)
        if not file.is_local:
            file.fs.pipe_file(file.path, data)
            return
        os.makedirs(self.place.path, exist_ok=True)
        aside = f"{file.path}.{secrets.token_hex(4)}"
        try:
            with open(aside, "wb") as opened:
                opened.write(data)
            os.replace(aside, file.path)
        except BaseException:
            with suppress(OSError):
                os.unlink(aside)
            raise

    def read(self, name: str) -> Any:
        """What was kept under a name; None where nothing was, or nothing that can be read."""
        for place in (self.place, self.former):
            if place is None:
                continue
            try:
                if not place.is_local:
                    place.fs.invalidate_cache()
                return json.loads(place.fs.cat_file(f"{place.path.rstrip('/')}/{name}"))
            except (FileNotFoundError, NotADirectoryError):
                continue
            except (ValueError, RecursionError):
                return None
        return None

    def remove(self, name: str) -> None:
        """Forget what was kept under a name."""
        for place in (self.place, self.former):
            if place is not None:
                with suppress(FileNotFoundError, NotADirectoryError):
                    place.fs.rm_file(f"{place.path.rstrip('/')}/{name}")

    def names(self, prefix: str) -> list[str]:
        """The names under which something is kept, sorted, as far as they begin so."""
        found: set[str] = set()
        for place in (self.place, self.former):
            if place is None:
                continue
            with suppress(FileNotFoundError, NotADirectoryError):
                if not place.is_local:
                    place.fs.invalidate_cache()
                listed = place.fs.ls(place.path, detail=False)
                found |= {path.rstrip("/").rpartition("/")[2] for path in listed}
        return sorted(name for name in found if name.startswith(prefix))

    def discard_if_empty(self) -> None:
        """Leave no empty folder behind, as after a run that was refused."""
        if self.place.is_local:
            with suppress(OSError):
                for path in dict.fromkeys((self.place.path, *self._made)):
                    os.rmdir(path)


def _is_there(place: Location) -> bool:
    if place.is_local:
        return os.path.isdir(place.path)
    try:
        place.fs.invalidate_cache()
        return bool(place.fs.isdir(place.path))
    except Exception:  # no listing (a web server), no right to list: whoever writes there says what is wrong
        return False


def _may_make(place: Location) -> bool:
    """Whether the folder can be made. An object store tells when it is written to, not before: there it is tried."""
    if place.is_local:
        parent = os.path.dirname(place.path)
        while parent and not os.path.isdir(parent):
            parent = os.path.dirname(parent)  # made together with the folder of tables
        return os.access(parent or "/", os.W_OK | os.X_OK) and _is_writable_disk(parent or "/")
    probe = f"{place.path}/probe-{secrets.token_hex(4)}"
    try:
        place.fs.pipe_file(probe, b"")
    except Exception:  # every file system has exceptions of its own
        return False
    with suppress(Exception):
        place.fs.rm_file(probe)
    return True


def _is_writable_disk(folder: str) -> bool:
    try:
        return not os.statvfs(folder).f_flag & os.ST_RDONLY
    except OSError:
        return True
