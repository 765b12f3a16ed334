"""Which images DALI may have: their sizes from the header, and no broken one among them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from curator_embed.decoding.header import size_for_dali
from curator_embed.decoding.pillow import decode

Encode = Callable[..., bytes]


@pytest.mark.parametrize(
    ("format", "mode", "options"),
    [
        ("JPEG", "RGB", {"quality": 90}),
        ("JPEG", "RGB", {"progressive": True}),
        ("JPEG", "RGB", {"subsampling": 2, "restart_marker_blocks": 3}),
        ("JPEG", "L", {}),
        ("PNG", "RGB", {}),
        ("PNG", "RGBA", {}),
        ("PNG", "P", {}),
        ("PNG", "1", {}),
        ("WEBP", "RGB", {}),
        ("WEBP", "RGB", {"lossless": True}),
    ],
)
def test_sizes_are_those_that_pillow_decodes(
    photo: Image.Image, encode: Encode, format: str, mode: str, options: dict[str, object]
) -> None:
    for size in ((61, 47), (512, 300), (1, 1)):
        encoded = encode(photo.resize(size).convert(mode), format, **options)
        assert size_for_dali(encoded) == decode(encoded).original.size[::-1]
        assert size_for_dali(encoded + b"trailing bytes") == size[::-1]


@pytest.mark.parametrize(
    ("format", "mode", "options"),
    [
        ("JPEG", "CMYK", {}),
        ("JPEG", "RGB", {"keep_rgb": True}),
        ("PNG", "I;16", {}),
        ("GIF", "P", {}),
        ("AVIF", "RGB", {}),
        ("BMP", "RGB", {}),
        ("TIFF", "RGB", {}),
    ],
)
def test_what_dali_reads_differently_is_pillows(
    photo: Image.Image, encode: Encode, format: str, mode: str, options: dict[str, object]
) -> None:
    picture = photo.convert("L" if mode == "I;16" else mode).convert(mode)
    assert size_for_dali(encode(picture, format, **options)) is None


def test_transparent_webp_is_pillows(photo: Image.Image, encode: Encode) -> None:
    photo = photo.copy()
    photo.putalpha(photo.getchannel("G"))
    for lossless in (False, True):
        assert size_for_dali(encode(photo, "WEBP", lossless=lossless)) is None


def test_animations_are_pillows(photo: Image.Image, encode: Encode) -> None:
    frames = {"save_all": True, "append_images": [photo.rotate(90)]}
    for format in ("PNG", "WEBP"):
        assert size_for_dali(encode(photo, format, **frames)) is None


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_nothing_that_ends_early_is_admitted(photo: Image.Image, encode: Encode, format: str) -> None:
    encoded = encode(photo.resize((120, 90)), format)
    for length in {*range(200), *range(200, len(encoded), 37), len(encoded) - 1}:
        assert size_for_dali(encoded[:length]) is None, length


def test_a_damaged_png_is_pillows(photo: Image.Image, encode: Encode) -> None:
    encoded = encode(photo, "PNG")
    for place in (20, 60, len(encoded) // 2, len(encoded) - 20):
        assert size_for_dali(encoded[:place] + bytes([encoded[place] ^ 1]) + encoded[place + 1 :]) is None


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"optimize": True}])
def test_impossible_huffman_tables_are_pillows(photo: Image.Image, encode: Encode, options: dict[str, object]) -> None:
    """Too many codes of a length, and tables longer than their segment; in the header and between scans."""
    encoded = encode(photo, "JPEG", **options)
    assert size_for_dali(encoded) is not None
    tables = [place for place in range(len(encoded)) if encoded.startswith(b"\xff\xc4", place)]
    for place in (tables[0], tables[-1]):
        for counts in (b"\x03", b"\x00\xff\xff"):
            assert size_for_dali(encoded[: place + 5] + counts + encoded[place + 5 + len(counts) :]) is None


SIGNATURES = [b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\x20\0\0\0WEBPVP8 "]


@given(st.sampled_from(SIGNATURES), st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_arbitrary_bytes_never_raise(start: bytes, tail: bytes) -> None:
    size = size_for_dali(start + tail)
    assert size is None or min(size) > 0


def test_every_file_of_the_collection_has_the_size_pillow_finds(
    format_files: list[Path], clothing: list[Path], wheel_photos: list[Path]
) -> None:
    admitted = 0
    for path in format_files + clothing + wheel_photos:
        encoded = path.read_bytes()
        size = size_for_dali(encoded)
        if size is not None:
            admitted += 1
            assert decode(encoded).original.size[::-1] == size, path.name
    assert admitted == 7 + len(clothing) + len(wheel_photos)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_the_size_where_it_is_honoured(photo: Image.Image, encode: Encode, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    encoded = encode(photo.resize((80, 50)), "JPEG", exif=exif)
    assert size_for_dali(encoded) == (50, 80)
    turned = decode(encoded, honour_exif=True).original
    assert size_for_dali(encoded, honour_exif=True) == (turned.height, turned.width)


def test_orientation_told_by_other_means_is_pillows(photo: Image.Image, encode: Encode) -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/></x:xmpmeta>'
    encoded = encode(photo, "JPEG", xmp=xmp)
    assert size_for_dali(encoded) is not None
    assert size_for_dali(encoded, honour_exif=True) is None
