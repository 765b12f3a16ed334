"""What lies where in a tar, found by one pass over its headers.

An own reader of ustar, GNU long names and PAX records (POSIX.1-2001 pax; GNU tar's manual,
"Basic Tar Format"), because three things matter here that the standard library's does not give:
positioned reads, an exact account of damage, and sizes that are never believed before they are checked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from curator_embed.errors import SourceError
from curator_embed.storage.byte_source import ByteSource
from curator_embed.storage.files import redact

BLOCK = 512
MAX_EXTENSION_BYTES = 1 << 20
"""Longest GNU long name or PAX record set that is believed."""

_ZEROS = bytes(BLOCK)
_TRAILER_BLOCKS = 20  # a tar is padded to records of this many blocks, so a second tar begins this soon

_COMPRESSED = (
    (b"\x1f\x8b", "gzip", "gunzip"),
    (b"BZh", "bzip2", "bunzip2"),
    (b"\xfd7zXZ\0", "xz", "unxz"),
    (b"\x28\xb5\x2f\xfd", "zstd", "unzstd"),
)
_KINDS = {
    b"1": "hard link",
    b"2": "symbolic link",
    b"3": "device",
    b"4": "device",
    b"6": "FIFO",
    b"S": "sparse file",
}


class Member(NamedTuple):
    """A regular file in a tar: its name as stored, where its data begins, and how long they should be."""

    name: str
    offset: int
    size: int

    @property
    def end(self) -> int:
        """Where the next header lies: the data's end, rounded up to whole blocks."""
        return self.offset + -(-self.size // BLOCK) * BLOCK


class Header(NamedTuple):
    """One 512-byte header block, decoded."""

    name: str
    size: int
    kind: bytes
    sparse_continues: bool


class BadHeader(ValueError):
    """A block that is no tar header; the message says why."""


class TarScan:
    """Iterates over a tar's regular files in their order. Directories, links, devices and sparse files are passed over.

    A member whose data the file does not hold in full is still yielded (``end`` then lies behind
    ``source.size``), so that its sample can be accounted for.

    Attributes:
        damage: after the pass, what ended it early and at which byte; None when the tar is whole.
            A missing end marker is no damage.
        cut: whether the damage is one that may have cost members (anything but a second tar appended).
        ignored: how many members of other kinds were passed over, by kind (directories not counted).

    Raises:
        SourceError: on iteration: this is no tar at all, or it cannot be read.
    """

    def __init__(self, source: ByteSource) -> None:
        self.source = source
        self.damage: str | None = None
        self.cut = False
        self.ignored: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Member]:
        source, at = self.source, 0
        if source.size == 0:
            raise SourceError(redact(source.path), "not a tar: the file is empty", "Restore it, or remove it")
        name: str | None = None  # given by an extension header for the member that follows
        size: int | None = None
        sparse = False
        while at < source.size:
            block = source.pread(at, BLOCK)
            if _is_zero(block):
                if _is_zero(source.pread(at + BLOCK, BLOCK)):
                    self._look_behind_end(at + 2 * BLOCK)
                    break
                at += BLOCK  # a lone block of zeros: GNU tar goes on, too
                continue
            try:
                header = parse_header(block)
                if header.kind in b"LKxXg":
                    body = self._extension(header, at)
                    if header.kind == b"L":
                        name = decode_name(body.partition(b"\0")[0])
                    elif header.kind in b"xX":
                        records = parse_pax(body)
                        if "path" in records:
                            name = decode_name(records["path"])
                        if "size" in records:
                            size = _decimal(records["size"])
                        sparse = any(key.startswith("GNU.sparse.") for key in records)
                    at += BLOCK + -(-len(body) // BLOCK) * BLOCK
                    continue
            except BadHeader as exc:
                if at == 0:
                    raise self._not_a_tar(block, exc) from None
                self.damage, self.cut = f"{exc} at byte {at} of {source.size}: what follows is not readable", True
                if at + BLOCK > source.size:
                    self.damage = f"cut at byte {source.size}, inside a header"
                return
            member = Member(header.name if name is None else name, at + BLOCK, header.size if size is None else size)
            kind, was_sparse = header.kind, sparse or header.kind == b"S"
            name, size, sparse = None, None, False
            if header.sparse_continues:
                member = member._replace(offset=self._behind_sparse_map(member.offset))
            if was_sparse:
                self.ignored["sparse file"] += 1
            elif kind == b"5" or (kind in b"\x000" and member.name.endswith("/")):
                at = member.offset
                continue
            elif kind in b"12346":
                self.ignored[_KINDS[kind]] += 1
                at = member.offset  # their size field, where it is set, announces no data
                continue
            elif kind in b"\x0007":
                if member.offset + member.size > source.size:
                    self.damage, self.cut = (
                        f"cut at byte {source.size}, inside '{member.name}', "
                        f"which should end at byte {member.offset + member.size}",
                        True,
                    )
                yield member
            at = member.end
        else:
            if name is not None or size is not None:
                self.damage, self.cut = f"cut at byte {source.size}, before the header of '{name or '?'}'", True
            elif at > source.size and self.damage is None:
                self.damage, self.cut = f"cut at byte {source.size}, in the padding behind a member", True

    def _extension(self, header: Header, at: int) -> bytes:
        """The body of a long name or PAX header; one that lies about its length is no header."""
        if header.size > MAX_EXTENSION_BYTES:
            raise BadHeader(f"an extension header of {header.size} bytes")
        body = self.source.pread(at + BLOCK, header.size)
        if len(body) < header.size:
            raise BadHeader("an extension header that is cut")
        return body

    def _behind_sparse_map(self, at: int) -> int:
        """Old GNU sparse files continue their map in further blocks, the last of which says so."""
        while True:
            block = self.source.pread(at, BLOCK)
            at += BLOCK
            if len(block) < BLOCK or not block[504]:
                return at

    def _look_behind_end(self, at: int) -> None:
        """A tar appended with ``cat`` lies behind the end marker, where no tar reader looks."""
        rest = self.source.pread(at, _TRAILER_BLOCKS * BLOCK)
        for start in range(0, len(rest), BLOCK):
            block = rest[start : start + BLOCK]
            if _is_zero(block):
                continue
            try:
                parse_header(block)
            except BadHeader:
                return
            self.damage = (
                f"goes on behind its end marker at byte {at + start} of {self.source.size}, as if tars had been "
                "concatenated: that part is not read (split it, or join tars with 'tar -A')"
            )
            return

    def _not_a_tar(self, block: bytes, why: BadHeader) -> SourceError:
        path = redact(self.source.path)
        for magic, name, tool in _COMPRESSED:
            if block.startswith(magic):
                return SourceError(
                    path,
                    f"is {name}-compressed, which allows no positioned reads",
                    f"Decompress it once ({tool}); encoded images hardly shrink",
                )
        if len(block) < BLOCK:
            return SourceError(
                path, f"not a tar: only {len(block)} bytes, less than one header", "Restore it, or remove it"
            )
        return SourceError(path, f"not a tar: {why} at byte 0", "Check what it is (file, tar -t); restore or remove it")


def parse_header(block: bytes) -> Header:
    """Decode one header block of 512 bytes.

    Raises:
        BadHeader: it is cut, its checksum is wrong, or its fields make no sense.
    """
    if len(block) < BLOCK:
        raise BadHeader(f"a header of {len(block)} instead of {BLOCK} bytes")
    stored = _number(block[148:156], "checksum")
    # The field itself counts as eight spaces. Some old tars summed signed characters.
    plain = sum(block) - sum(block[148:156]) + 256
    if stored != plain and stored != plain - 256 * sum(b > 127 for b in block[:148] + block[156:]):
        raise BadHeader("a header whose checksum is wrong")
    kind = block[156:157]
    size = _number(block[124:136], "size")
    if size < 0:
        raise BadHeader("a header with a negative size")
    name = block[:100].partition(b"\0")[0]
    if block[257:263] == b"ustar\0" and block[345]:  # GNU's own format keeps times there
        name = block[345:500].partition(b"\0")[0] + b"/" + name
    return Header(decode_name(name), size, kind, kind == b"S" and block[482] != 0)


def parse_pax(body: bytes) -> dict[str, bytes]:
    """Decode the records of a PAX header ("27 path=some/long/name.jpg\\n"); the last of a name counts.

    Raises:
        BadHeader: the records do not fit together.
    """
    records: dict[str, bytes] = {}
    at = 0
    while at < len(body) and body[at]:
        space = body.find(b" ", at, at + 20)
        length = _decimal(body[at:space]) if space > at else 0
        record = body[space + 1 : at + length]
        key, equals, value = record.partition(b"=")
        if at + length <= space or at + length > len(body) or not equals or not value.endswith(b"\n"):
            raise BadHeader("a damaged PAX header")
        records[key.decode("utf-8", "replace")] = value[:-1]
        at += length
    return records


def decode_name(raw: bytes) -> str:
    """A member's name as text. Bytes that are no UTF-8 become \\xNN, so that names stay distinct and storable."""
    return raw.decode("utf-8", "backslashreplace")


def _is_zero(block: bytes) -> bool:
    """Whether this is (a part of) an end marker, or nothing at all."""
    return block == _ZEROS[: len(block)]


def _number(field: bytes, what: str) -> int:
    """A numeric field: octal text, or base-256 where its first bit is set (GNU, for large values)."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big") - (1 << 8 * (len(field) - 1)) * (field[0] == 0xFF)
    text = field.partition(b"\0")[0].strip()
    try:
        return int(text, 8) if text else 0
    except ValueError:
        raise BadHeader(f"a header with a damaged {what}") from None


def _decimal(text: bytes) -> int:
    if not text.isdigit() or len(text) > 19:
        raise BadHeader("a damaged PAX header")
    return int(text)
