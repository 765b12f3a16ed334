"""The tar reader against Python's tarfile, and against damage at every byte."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curator_embed.errors import SourceError
from curator_embed.sources.tar import BLOCK, BadHeader, Member, TarScan, decode_name, parse_header, parse_pax
from curator_embed.storage.byte_source import ByteSource
from tests.written_tars import tar_bytes

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


class InMemory(ByteSource):
    """Bytes as a source; remembers the largest read, which a lying header must not blow up."""

    def __init__(self, data: bytes) -> None:
        self.path, self.size, self.data = "memory.tar", len(data), data

    def _read(self, offset: int, n: int) -> bytes:
        assert offset >= 0
        assert 0 < n <= self.size
        return self.data[offset : offset + n]

    def close(self) -> None:
        pass


def scan(data: bytes) -> tuple[list[tuple[str, bytes]], TarScan]:
    source = InMemory(data)
    tar = TarScan(source)
    return [(m.name, source.pread(m.offset, m.size)) for m in tar], tar


def header(name: str = "a.jpg", size: int = 0, kind: bytes = b"0", size_field: bytes | None = None) -> bytes:
    """A ustar header written by hand, checksum right."""
    block = bytearray(BLOCK)
    block[:100] = name.encode().ljust(100, b"\0")
    block[100:108], block[124:136] = b"0000644\0", size_field or b"%011o\0" % size
    block[156:157], block[257:265] = kind, b"ustar\x0000"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


part = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=60)
names = st.lists(part, min_size=1, max_size=6).map("/".join)
member_lists = st.lists(st.tuples(names, st.binary(max_size=1200)), max_size=6)


@settings(max_examples=200)
@given(member_lists, st.sampled_from(list(FORMATS)))
def test_round_trip(members: list[tuple[str, bytes]], fmt: str) -> None:
    try:
        data = tar_bytes(members, FORMATS[fmt])
    except ValueError:  # ustar cannot hold this name
        assert fmt == "ustar"
        return
    found, tar = scan(data)
    assert found == members
    assert tar.damage is None
    assert not tar.ignored


def test_names_beyond_utf8_stay_distinct_and_storable() -> None:
    assert decode_name("mañana 漢字.jpg".encode()) == "mañana 漢字.jpg"
    raw = [b"\xff.jpg", b"\xfe.jpg"]
    assert [decode_name(r) for r in raw] == ["\\xff.jpg", "\\xfe.jpg"]


def test_base_256_size_and_signed_checksum() -> None:
    data = header(size_field=b"\x80" + bytes(7) + struct.pack(">I", 3)) + b"abc".ljust(BLOCK, b"\0")
    assert scan(data)[0] == [("a.jpg", b"abc")]
    block = bytearray(header("é.jpg"))
    high = sum(b > 127 for b in block)
    block[148:156] = b"%06o\0 " % (int(bytes(block[148:154]), 8) - 256 * high)
    assert high
    assert parse_header(bytes(block)).name == "é.jpg"


@pytest.mark.parametrize("field", [b"\xff" * 12, b"\x80" + b"\xff" * 11, b"77777777777\0"])
def test_lying_sizes_allocate_nothing(field: bytes) -> None:
    good = header("first.jpg", 1) + b"x".ljust(BLOCK, b"\0")
    found, tar = scan(good + header("b.jpg", size_field=field) + bytes(100))
    assert found[0] == ("first.jpg", b"x")
    assert tar.cut
    assert tar.damage is not None
    assert ("inside 'b.jpg'" in tar.damage) or ("negative size at byte 1024" in tar.damage)


@pytest.mark.parametrize("kind", [b"L", b"x"])
def test_lying_extension_headers_allocate_nothing(kind: bytes) -> None:
    good = header("first.jpg", 1) + b"x".ljust(BLOCK, b"\0")
    for size in (1 << 30, 600):
        found, tar = scan(good + header("ext", size, kind) + bytes(BLOCK))
        assert [name for name, _ in found] == ["first.jpg"]
        assert tar.damage is not None
        assert "extension header" in tar.damage
        assert "byte 1024" in tar.damage


@pytest.mark.parametrize("body", [b"x path=a\n", b"5 a\n", b"99 path=abc\n", b"0 path=a\n", b"12 path=ab", b"7 size=x"])
def test_damaged_pax_records(body: bytes) -> None:
    with pytest.raises(BadHeader):
        parse_pax(body)


def test_pax_size_and_path_override() -> None:
    record = b"10 size=3\n19 path=longer.jpg\n"
    assert parse_pax(record) == {"size": b"3", "path": b"longer.jpg"}
    data = header("x", len(record), b"x") + record.ljust(BLOCK, b"\0") + header("s", 0) + b"abc".ljust(BLOCK, b"\0")
    assert scan(data)[0] == [("longer.jpg", b"abc")]


def test_other_kinds_are_passed_over() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:
        kinds = (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)
        for kind in kinds:
            info = tarfile.TarInfo("thing" + kind.decode())
            info.type, info.linkname = kind, "0.jpg"
            archive.addfile(info)
        info = tarfile.TarInfo("0.jpg")
        info.size = 3
        archive.addfile(info, io.BytesIO(b"abc"))
    found, tar = scan(buffer.getvalue())
    assert found == [("0.jpg", b"abc")]
    assert tar.damage is None
    assert tar.ignored == {"symbolic link": 1, "hard link": 1, "device": 2, "FIFO": 1}


def test_gnu_sparse_with_continued_map_is_passed_over() -> None:
    sparse = bytearray(header("hole.bin", 512, b"S"))
    sparse[482] = 1
    sparse[148:156] = b" " * 8
    sparse[148:156] = b"%06o\0 " % sum(sparse)
    more = bytearray(BLOCK)
    more[504] = 1
    data = bytes(sparse) + bytes(more) + bytes(BLOCK) + b"d" * BLOCK + header("0.jpg", 2) + b"ok".ljust(BLOCK, b"\0")
    found, tar = scan(data)
    assert found == [("0.jpg", b"ok")]
    assert tar.ignored == {"sparse file": 1}


def test_pax_sparse_is_passed_over() -> None:
    record = b"22 GNU.sparse.major=1\n"
    data = header("x", len(record), b"x") + record.ljust(BLOCK, b"\0") + header("h.bin", 3) + bytes(BLOCK)
    data += header("0.jpg", 2) + b"ok".ljust(BLOCK, b"\0")
    found, tar = scan(data)
    assert found == [("0.jpg", b"ok")]
    assert tar.ignored == {"sparse file": 1}


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_cut_at_every_interesting_byte(fmt: int) -> None:
    long = "folder/" * 12 + "long-name-of-a-member-" * 3 + ".jpg"
    members = [("0.jpg", b"a" * 700), (long, b"b" * 512), ("2.txt", b""), ("3.jpg", b"c" * 10)]
    whole = tar_bytes(members, fmt)
    ends = {m.name: m.offset + m.size for m in TarScan(InMemory(whole))}
    last_data = max(ends.values())
    for cut in sorted(
        {c + d for c in range(0, len(whole) + 1, BLOCK) for d in (-1, 0, 1, 300)} & set(range(1, 1 << 20))
    ):
        data = whole[:cut]
        if cut < BLOCK:
            with pytest.raises(SourceError, match="less than one header"):
                scan(data)
            continue
        found, tar = scan(data)
        complete = [(name, body) for name, body in found if len(body) == len(dict(members)[name])]
        assert [name for name, _ in complete] == [name for name, _ in members if ends[name] <= cut][: len(complete)]
        assert {name for name, end in ends.items() if end < cut} <= {name for name, _ in complete} | {"2.txt", "3.jpg"}
        if cut >= last_data:
            assert found == members
            assert (tar.damage is None) == (cut >= -(-last_data // BLOCK) * BLOCK), cut
        else:
            cut_members = len(found) - len(complete)
            assert cut_members <= 1
            assert tar.cut == (tar.damage is not None)
            assert cut_members == 0 or tar.cut
            if tar.damage is None:  # cut exactly between two members: no reader can tell
                assert cut % BLOCK == 0
            else:
                assert str(cut) in tar.damage


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_flipped_bytes_raise_nothing_but_source_errors(data: st.DataObject) -> None:
    whole = bytearray(tar_bytes([("0.jpg", b"a" * 700), ("x" * 150 + ".jpg", b"b"), ("2.jpg", b"c" * 5)]))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        found, _ = scan(bytes(whole))
    except SourceError as exc:
        assert "not a tar" in str(exc)
    else:
        assert len(found) <= 4


def test_zero_blocks_and_missing_end_markers() -> None:
    assert scan(bytes(10240))[0] == []
    data = header("0.jpg", 1) + b"a".ljust(BLOCK, b"\0")
    for end in (b"", bytes(BLOCK), bytes(BLOCK + 100), bytes(100), bytes(2 * BLOCK)):
        found, tar = scan(data + end)
        assert found == [("0.jpg", b"a")]
        assert tar.damage is None
    assert [n for n, _ in scan(data + bytes(BLOCK) + data)[0]] == ["0.jpg", "0.jpg"]  # a lone zero block


def test_concatenated_tars_are_noticed() -> None:
    one, two = tar_bytes([("0.jpg", b"a")]), tar_bytes([("1.jpg", b"b")])
    found, tar = scan(one + two)
    assert [name for name, _ in found] == ["0.jpg"]
    assert tar.damage is not None
    assert f"at byte {len(one)}" in tar.damage
    assert not tar.cut


def test_damaged_header_in_the_middle_ends_the_scan_with_its_place() -> None:
    whole = bytearray(tar_bytes([("0.jpg", b"a"), ("1.jpg", b"b")]))
    whole[1024 + 3] ^= 1
    found, tar = scan(bytes(whole))
    assert [name for name, _ in found] == ["0.jpg"]
    assert tar.damage is not None
    assert "checksum is wrong at byte 1024" in tar.damage


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "the file is empty"),
        (b"hello", "only 5 bytes"),
        (b"<html>" * 200, "not a tar"),
        (gzip.compress(tar_bytes([("0.jpg", b"a")])) + bytes(600), "gzip-compressed"),
        (b"\x28\xb5\x2f\xfd" + bytes(600), "zstd-compressed"),
        (b"BZh9" + bytes(600), "bzip2-compressed"),
    ],
)
def test_what_is_no_tar(data: bytes, says: str) -> None:
    with pytest.raises(SourceError, match=says) as caught:
        scan(data)
    assert caught.value.path == "memory.tar"
    assert caught.value.remedy


def test_real_tars(clip_tars: list[Path]) -> None:
    for path in clip_tars:
        with tarfile.open(path) as archive:
            expected = [Member(m.name, m.offset_data, m.size) for m in archive if m.isreg()]
        assert list(TarScan(InMemory(path.read_bytes()))) == expected
