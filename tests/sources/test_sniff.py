"""Formats are told by what the bytes are."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from curator_embed.sources.sniff import SNIFF_BYTES, sniff


@pytest.mark.parametrize(
    ("pillow", "name"),
    [
        ("JPEG", "jpeg"),
        ("PNG", "png"),
        ("GIF", "gif"),
        ("WEBP", "webp"),
        ("BMP", "bmp"),
        ("TIFF", "tiff"),
        ("JPEG2000", "jpeg2000"),
        ("PPM", "pnm"),
        ("AVIF", "avif"),
    ],
)
def test_what_pillow_writes(pillow: str, name: str) -> None:
    for mode in ("RGB", "L", "1"):
        buffer = io.BytesIO()
        try:
            Image.new(mode, (5, 3)).save(buffer, pillow)
        except (OSError, ValueError):  # this format has no such mode
            assert mode != "RGB"
            continue
        assert sniff(buffer.getvalue()) == name
        assert sniff(buffer.getvalue()[:SNIFF_BYTES]) == name


@pytest.mark.parametrize(
    "text",
    [
        b"BMW X5 parked before a house, front view, red, beautiful evening light",
        b"BM",
        b"P1 racing team at the circuit",
        b"P2 10 20 30 people in a row",
        b"P3 200 300 255 is what the caption says",
        b"P6 engine",
        b"II",
        b"GIF of a cat",
        b"RIFF music",
        b"<html><body><svg></svg></body></html>",
        b"<!DOCTYPE html><svg/>",
        b"<?xml version='1.0'?><rss/>",
        b"<!-- svg",
        b"{}",
        b"",
        b"\x00\x00\x00\x18ftypisom\x00\x00\x00\x00mp42",
        b"RIFF\x00\x00\x00\x00WAVE",
    ],
)
def test_what_is_no_image(text: bytes) -> None:
    assert sniff(text) is None


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (b"P1\n# bits\n3 2\n0 1 0\n1 0 1\n", "pnm"),
        (b"P2 2 1 255\n0 255\n", "pnm"),
        (b"P5\n#c\n4 4\n255\n\x80\xff", "pnm"),
        (b"P4\n8 1\n\xff", "pnm"),
        (b"P7\nWIDTH 4\nHEIGHT 4\n", "pnm"),
        (b"\xef\xbb\xbf  <?xml version='1.0'?>\n<!-- made by hand -->\n<svg xmlns='x'>", "svg"),
        (b"<!DOCTYPE svg PUBLIC '-//W3C//DTD SVG 1.1//EN' 'x' [ <!ENTITY a 'b'> ]><svg/>", "svg"),
        (b"<svg:svg xmlns:svg='x'/>", "svg"),
        (b"\x00\x00\x00\x1cftypmif1\x00\x00\x00\x00mif1avifmiaf", "avif"),
        (b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic", "heic"),
        (b"MM\x00*\x00\x00\x00\x08", "tiff"),
        (b"\xff\x4f\xff\x51\x00\x2f", "jpeg2000"),
    ],
)
def test_heads_written_by_hand(head: bytes, name: str) -> None:
    assert sniff(head) == name


def test_real_files_whose_extension_may_lie(format_files: list[Path]) -> None:
    kinds = {".jpg": "jpeg", ".jp2": "jpeg2000", ".png": "png", ".bmp": "bmp", ".gif": "gif", ".webp": "webp",
             ".pbm": "pnm", ".tiff": "tiff"}  # fmt: skip
    lying = {"jpeg.tiff": "jpeg", "pbm.png": "pnm", "pbm.tiff": "pnm", "pgm.jpeg": "pnm"}
    for file in format_files:
        expected = None if file.stem.endswith("corrupt") else lying.get(file.name) or kinds[file.suffix]
        assert sniff(file.read_bytes()) == expected, file
    assert lying.keys() < {file.name for file in format_files}


@given(st.text())
def test_no_caption_is_taken_for_an_image(text: str) -> None:
    assert sniff(text.encode()) is None or text.lstrip("\ufeff \t\r\n").startswith(("P", "<", "II", "MM", "GIF8"))


@given(st.binary(max_size=200), st.sampled_from([b"BM", b"P5", b"P7", b"\0\0\0\x20ftyp", b"<", b"<?xml", b"RIFF"]))
def test_arbitrary_bytes_raise_nothing(rest: bytes, start: bytes) -> None:
    assert sniff(start + rest) in (None, "bmp", "pnm", "avif", "heic", "svg", "webp")
