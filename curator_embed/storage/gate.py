"""The gate: what a row may open. Data is not an address book.

A row (a line of a list, a path in a parquet's image column, a name in a listing) comes in as text, and a ``Place``
comes out, or an ``Unread`` that says why not. Nothing else in the package makes a place of what a row says, and
``read_many`` opens places only. What the user names (the list, ``root=``, a folder) passes no gate.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, NamedTuple
from urllib.parse import SplitResult, quote, unquote, urlsplit

from curator_embed.errors import Reason, redact, redact_name
from curator_embed.storage.files import is_remote, join, local_path

Links = Literal["inside", "any"]
Urls = Literal["own", "public", "any"]

MAX_PATH = 4096
"""Longest local path in characters. No system opens a longer one, and resolving it takes time with its square."""
MAX_URL = 16384
KEPT_FOLDERS = 8192
"""Folders whose real place is remembered; then they are resolved anew."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)(::|://)")
_SAME = {"s3a": "s3", "gcs": "gs", "abfss": "abfs", "local": "file"}
_WEB = ("http", "https")
_BUCKETS = ("s3", "gs", "az", "abfs")
"""Protocols whose URLs begin with a bucket: the credentials for a list are those for its bucket."""
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # a pipe must not make the reader wait
_WHOLE = ("/", "~/")
"""How paths begin that say where they begin themselves."""
_DOTS = ("", ".", "..")
_STORES = (*_BUCKETS, "ftp", "gdrive", "github", "hdfs", "hf", "memory", "oci", "oss", "sftp", "smb", "ssh", "webhdfs")
"""Protocols of which a user may well say that the images lie there."""


class Source(StrEnum):
    """Whose rows pass a gate."""

    ROOT = "a path list with root="
    LIST = "a path list without root="
    PARQUET = "a parquet file's column of paths"
    FOLDER = "a folder's listing"


class Refusal(StrEnum):
    """What is wrong with a name that is refused."""

    OUTSIDE = "outside"  # an absolute path
    UPWARDS = "upwards"  # ``..``
    LINK = "link"
    WEB = "web"
    STORE = "store"
    NONSENSE = "nonsense"  # a chain, an unknown protocol, a broken URL


_FOLLOW = "If such links may be followed, pass reading=ReadPolicy(links='any')"
_CORRECT = "Correct such rows, or leave them out"
_BY_ROOT = "If it is meant, pass root='{origin}'"
_COPY = "Copy the images below the file's folder, or list their paths in a text file and open it with root='{origin}'"

_REMEDIES: dict[tuple[Source, Refusal], str] = {
    **{(source, Refusal.LINK): _FOLLOW for source in Source},
    (Source.ROOT, Refusal.OUTSIDE): "If it is meant, pass root='/'",
    (Source.LIST, Refusal.OUTSIDE): "If it is meant, pass root='/'",
    (Source.ROOT, Refusal.UPWARDS): "Write such lines as whole paths, and pass root='/'",
    (Source.LIST, Refusal.UPWARDS): "Write such lines as whole paths, and pass root='/'",
    (Source.ROOT, Refusal.WEB): _BY_ROOT,
    (Source.ROOT, Refusal.STORE): _BY_ROOT,
    (Source.LIST, Refusal.STORE): _BY_ROOT,
    (Source.PARQUET, Refusal.WEB): "If URLs may be followed, pass reading=ReadPolicy(urls='public')",
    (Source.PARQUET, Refusal.OUTSIDE): _COPY,
    (Source.PARQUET, Refusal.UPWARDS): _COPY,
    (Source.PARQUET, Refusal.STORE): _COPY,
}


@dataclass(frozen=True, slots=True)
class Unread:
    """The answer for a file that could not be read.

    Attributes:
        remedy: how such rows can be read after all, for people; only where the row was refused.
    """

    reason: Reason
    detail: str
    remedy: str = ""


class Place(NamedTuple):
    """Where a row's image lies, once it may be opened.

    Attributes:
        path: a local path or a URL.
        remote: whether it is a URL.
        base: of a URL: the URL without a slash at its end that the user named and this one begins with. It is opened
            as that one is, with its options and credentials. None: on somebody else's host, and without any.
        below: of a local path: the real folder that a link must not lead out of. None: links may lead anywhere.
    """

    path: str
    remote: bool = False
    base: str | None = None
    below: str | None = None


class Gate:
    """What the rows of one source may open. Cheap to make: one for each pass over a shard.

    Args:
        source: whose rows these are.
        base: where plain names begin: a folder or a URL that the user named.
        links: "inside": local links that lead out of ``base`` are refused. "any": they are followed.
        web: whether rows may name http(s) URLs on any host.
        origin: a bucket or a web server below which rows may name anything by its URL, besides what is below ``base``.
    """

    def __init__(
        self, source: Source, base: str, *, links: Links = "inside", web: bool = False, origin: str | None = None
    ) -> None:
        self.source, self.links, self.web, self.origin = source, links, web, origin
        self.remote = is_remote(base)
        self.base = base.rstrip("/") if self.remote else os.path.abspath(local_path(base))
        self._on_web = self.remote and _protocol(self.base) in _WEB
        self._real = "" if self.remote else os.path.realpath(self.base)
        self._below = self._real if links == "inside" else None
        self._folders: dict[str, str | Unread] = {}

    @classmethod
    def of_root(cls, root: str, links: Links = "inside") -> Gate:
        """For a path list with ``root``: everything lies below it."""
        return cls(Source.ROOT, root, links=links)

    @classmethod
    def of_list(cls, path: str, links: Links = "inside") -> Gate:
        """For a path list without ``root``: what is below the list's folder or in its bucket, and any http(s) URL."""
        return cls(Source.LIST, parent(path), links=links, web=True, origin=_origin(path))

    @classmethod
    def of_parquet(cls, path: str, links: Links = "inside", urls: Urls = "own") -> Gate:
        """For paths in a parquet file: what is below its folder, and http(s) URLs where it lies on the web itself."""
        on_web = is_remote(path) and _protocol(path) in _WEB
        return cls(Source.PARQUET, parent(path), links=links, web=on_web or urls != "own")

    @classmethod
    def of_folder(cls, folder: str, links: Links = "inside") -> Gate:
        """For the names in a folder's listing, which are asked for with ``below``."""
        return cls(Source.FOLDER, folder, links=links)

    # --- through the gate ---------------------------------------------------------------------

    def admit(self, name: str) -> Place | Unread:
        """Where a row's image lies, of which the row says a path below ``base``, an absolute path or a URL."""
        if ":" in name or name.startswith(_WHOLE):
            return self._admit_whole(name)
        return self.below(name)

    def below(self, name: str) -> Place | Unread:
        """As ``admit``, of a name that is a path below ``base``, whatever it looks like."""
        if self.remote:
            return self._below_url(name)
        cut = name.rfind("/") + 1
        last = name[cut:]
        if last in _DOTS:
            cut, last = len(name), ""
        folder = self._folders.get(name[:cut])
        if folder is None:
            if len(self._folders) >= KEPT_FOLDERS:
                self._folders.clear()
            folder = self._folders[name[:cut]] = self._resolve(name[:cut])
        return Place(folder + last, False, None, self._below) if isinstance(folder, str) else folder

    def shown(self, name: str) -> str:
        """Where a name that is no URL is looked for, for people."""
        return redact_name(name if _SCHEME.match(name) else join(self.base, name))

    def _refused(self, what: Refusal, detail: str, origin: str = "/") -> Unread:
        remedy = _REMEDIES.get((self.source, what), _CORRECT)
        return Unread(Reason.REFUSED, detail, redact(remedy.format(origin=_printable(origin))))

    # --- local paths --------------------------------------------------------------------------

    def _resolve(self, folder: str) -> str | Unread:
        """Where a folder below ``base`` or an absolute one really is, with a slash at its end."""
        if len(folder) > MAX_PATH:
            return _impossible()
        whole = os.path.join(self.base, folder)
        try:
            real = os.path.realpath(whole)
        except (OSError, ValueError):  # a NUL, half a surrogate pair
            return _impossible()
        if _within(real, self._real):
            return join(real, "")
        if not _within(os.path.normpath(whole), self.base):
            kind = Refusal.OUTSIDE if folder.startswith("/") else Refusal.UPWARDS
            return self._refused(kind, f"lies outside {self.base}")
        return join(whole, "") if self.links == "any" else led_out(self._real)

    # --- whole paths and URLs -----------------------------------------------------------------

    def _admit_whole(self, name: str) -> Place | Unread:
        found = _SCHEME.match(name)
        if found is None:
            return self._absolute(name) if name.startswith(_WHOLE) else self.below(name)
        protocol, rest = _protocol(name), name[found.end() :]
        if found[2] == "::" and "://" not in name:
            return self.below(name)  # a file may have such a name
        if found[2] == "::" or ("::" in name and protocol not in _WEB):
            return self._refused(Refusal.NONSENSE, "'::' makes a chain of URLs, which no row may name")
        if protocol == "file":
            plain = rest.startswith("/") and (self.source is not Source.ROOT or not self.remote)
            return self._absolute(rest) if plain else self._refused(Refusal.NONSENSE, "no path of a file here")
        if len(name) > MAX_URL:
            return self._refused(Refusal.NONSENSE, f"a URL of {len(name)} characters")
        return self._web_url(protocol, rest) if protocol in _WEB else self._store_url(protocol, rest)

    def _absolute(self, path: str) -> Place | Unread:
        if self.remote and self.source is Source.ROOT:
            return self.below(path.lstrip("/"))  # a slash begins the names of objects as it does paths
        if self.remote or not path.startswith(_WHOLE):
            return self._refused(Refusal.OUTSIDE, f"lies outside {redact(self.base)}")
        return self.below(os.path.expanduser(path))

    def _below_url(self, name: str) -> Place | Unread:
        if len(name) > MAX_URL:
            return _impossible()
        if ".." in name and _leads_up(name):
            return self._refused(Refusal.NONSENSE, f"lies outside {redact(self.base)}")
        if self._on_web:
            name = quote(name, safe="/", errors="surrogateescape")
        elif "::" in name:
            return self._refused(Refusal.NONSENSE, "'::' makes a chain of URLs, which no row may name")
        return Place(f"{self.base}/{name}", remote=True, base=self.base)

    def _web_url(self, protocol: str, rest: str) -> Place | Unread:
        parts = _split(f"{protocol}://{rest}")
        if parts is None:
            return self._refused(Refusal.NONSENSE, "no valid URL")
        path = rest[len(parts.netloc) :].replace("::", "%3A%3A")  # the same to a server, and no chain to fsspec
        for base in (self.base, self.origin or ""):
            own = _split(base) if _protocol(base) in _WEB else None
            if own is None or _host(own) != _host(parts):
                continue
            above = own.path.rstrip("/")
            if path.startswith(f"{above}/") and not _leads_up(_decoded(path[len(above) :])):
                return Place(base + path[len(above) :], remote=True, base=base)
        if self.web:
            return Place(f"{protocol}://{parts.netloc}{path}", remote=True)
        detail = f"a URL on the web, outside {redact(self.base)}"
        return self._refused(Refusal.WEB, detail, f"{protocol}://{parts.netloc}")

    def _store_url(self, protocol: str, rest: str) -> Place | Unread:
        for base in (self.base if self.remote else "", self.origin or ""):
            if base and _protocol(base) == protocol:
                above = base.partition("://")[2].strip("/") + "/"
                inside = rest.lstrip("/").removeprefix(above)
                if inside != rest.lstrip("/") and not _leads_up(inside):
                    return Place(f"{base}/{inside}", remote=True, base=base)
        if protocol not in _STORES:
            return self._refused(Refusal.NONSENSE, f"no row may name a place by '{protocol[:20]}://'")
        detail = f"lies outside {redact(self.base)}"
        host = redact_name(f"{protocol}://{rest}").partition("://")[2].partition("/")[0]
        return self._refused(Refusal.STORE, detail, f"{protocol}://{host}")


@dataclass
class Refusals:
    """What a gate refused in one pass over a shard, to be told in one note.

    Attributes:
        what: "12 ..." of what they are and become.
    """

    what: str = f"rows name what this dataset may not open, and carry '{Reason.REFUSED}'"
    count: int = 0
    first: tuple[str, Unread] | None = None

    def add(self, name: str, answer: Unread) -> None:
        """Count a row's answer if it is a refusal."""
        if answer.reason is Reason.REFUSED:
            self.count += 1
            self.first = self.first or (name, answer)

    def note(self) -> str:
        """How many, the first one, and the remedy."""
        assert self.first is not None
        name, answer = self.first
        shown = _printable(redact_name(name))
        return f"{self.count} {self.what}; the first is '{shown}': {answer.detail}. {answer.remedy}"


def _printable(text: str) -> str:
    """A row's text as a terminal may get it."""
    plain = "".join(c if c.isprintable() else "?" for c in text[:200])
    return plain if len(text) <= 200 else f"{plain}..."


def parent(path: str) -> str:
    """The folder of a file that the user named, without a slash at its end."""
    if not is_remote(path):
        return os.path.dirname(os.path.abspath(local_path(path)))
    plain = path.partition("?")[0] if _protocol(path) in _WEB else path
    return plain.rpartition("/")[0]


def led_out(below: str) -> Unread:
    """The answer for a link that leads out of ``below``."""
    return Unread(Reason.REFUSED, f"a link leads out of {below}", _FOLLOW)


def open_local(place: Place) -> int | Unread:
    """Open a local place for reading: the file descriptor, or why there is none.

    Raises:
        OSError, ValueError: the system does not open it.
    """
    if place.below is None:
        return os.open(place.path, _READ)
    try:
        return os.open(place.path, _READ | os.O_NOFOLLOW)
    except OSError:
        if not os.path.islink(place.path):
            raise
    real = os.path.realpath(place.path)
    return os.open(real, _READ | os.O_NOFOLLOW) if _within(real, place.below) else led_out(place.below)


def _origin(path: str) -> str | None:
    """The bucket or web server of a URL, with the protocol; None of other paths."""
    if not is_remote(path) or "::" in path or _protocol(path) not in (*_WEB, *_BUCKETS):
        return None
    before, mark, rest = path.partition("://")
    return before + mark + re.split("[/?#]", rest, maxsplit=1)[0]


def _protocol(url: str) -> str:
    """The protocol of a URL, its other names made one; empty for a chain's, and where there is none."""
    found = _SCHEME.match(url)
    if found is None or found[2] == "::":
        return ""
    return _SAME.get(found[1].lower(), found[1].lower())


def _split(url: str) -> SplitResult | None:
    """The parts of an http(s) URL; None where it is broken, or where two readers might see two hosts in it."""
    try:
        parts = urlsplit(url)
        if not parts.hostname or parts.port == 0 or re.search(r"[\x00-\x20\x7f\\]", parts.netloc):
            return None
        if "::" in re.sub(r"\[[^\[\]]*\]", "", parts.netloc):  # no part of an address of IPv6
            return None
    except ValueError:  # a port out of range, half an IPv6 address
        return None
    return parts if url.partition("://")[2].startswith(parts.netloc) else None  # else it held tabs or line ends


def _host(parts: SplitResult) -> tuple[str, str, int]:
    return parts.scheme, parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)


def _decoded(path: str) -> str:
    """The path as a server may read it: without query, each %2e a dot and each backslash a slash."""
    return unquote(re.split("[?#]", path, maxsplit=1)[0]).replace("\\", "/")


def _leads_up(name: str) -> bool:
    """Whether ``..`` leads above where a name begins."""
    depth = 0
    for part in name.split("/"):
        depth += -1 if part == ".." else part not in ("", ".")
        if depth < 0:
            return True
    return False


def _within(path: str, folder: str) -> bool:
    return path == folder or folder == "/" or path.startswith(f"{folder}/")


def _impossible() -> Unread:
    return Unread(Reason.NOT_FOUND, "no file can have this name")
