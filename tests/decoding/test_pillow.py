"""Every kind of file has one outcome: pixels equal to Pillow's, or a reason."""

from __future__ import annotations

import io
import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from curator_embed.decoding.pillow import Limits, decode, to_rgb
from curator_embed.errors import ImageError, Reason

REPO = Path(__file__).parents[2]
Encode = Callable[..., bytes]


def reason_of(data: bytes, limits: Limits | None = None) -> Reason:
    """The reason, checked to come out the same twice, with a detail that names no address."""
    seen = []
    for _ in range(2):
        with pytest.raises(ImageError) as caught:
            decode(data, limits or Limits())
        seen.append((caught.value.reason, caught.value.detail))
    assert seen[0] == seen[1]
    assert " at 0x" not in seen[0][1]
    return seen[0][0]


def png_header(width: int, height: int) -> bytes:
    """A PNG of any claimed size with hardly any data: a bomb's fuse."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


SVG = b'<?xml version="1.0"?>\n<!-- drawn -->\n<svg xmlns="http://www.w3.org/2000/svg" width="4" height="4"/>'


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", Reason.EMPTY),
        (b"\0", Reason.NOT_AN_IMAGE),
        (bytes(range(256)) * 8, Reason.NOT_AN_IMAGE),
        (b"<!DOCTYPE html><html><body>404</body></html>", Reason.NOT_AN_IMAGE),
        (b"Access denied", Reason.NOT_AN_IMAGE),
        (b"<html><svg></svg></html>", Reason.NOT_AN_IMAGE),
        (SVG, Reason.UNSUPPORTED),
        (b"\xef\xbb\xbf  " + SVG, Reason.UNSUPPORTED),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", Reason.UNSUPPORTED),
        (b"%PDF-1.7\n", Reason.UNSUPPORTED),
        (b"8BPS\0\1" + bytes(40), Reason.UNSUPPORTED),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40), Reason.UNSUPPORTED),
        (b"\xff\x0a" + bytes(40), Reason.UNSUPPORTED),
        (b"\xff\xd8\xff", Reason.TRUNCATED),
        (b"\xff\xd8\xff\xe0", Reason.TRUNCATED),
        (b"\x89PNG\r\n\x1a\n", Reason.TRUNCATED),
        (b"GIF89a", Reason.TRUNCATED),
        (b"RIFF\x00\x01\x00\x00WEBPVP8 ", Reason.TRUNCATED),
        (b"BM" + bytes(60), Reason.UNSUPPORTED),
    ],
)
def test_bytes_that_are_no_readable_image(data: bytes, reason: Reason) -> None:
    assert reason_of(data) is reason


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM"])
def test_cut_anywhere_is_reported_never_half_decoded(photo: Image.Image, encode: Encode, format: str) -> None:
    data = encode(photo.resize((160, 120)), format)
    assert decode(data).original.size == (160, 120)
    for share in (0.1, 0.3, 0.5, 0.8):
        reason = reason_of(data[: int(len(data) * share)])
        if format in ("JPEG", "PNG", "WEBP", "GIF"):  # their containers say where they end
            assert reason is Reason.TRUNCATED, share
        else:
            assert reason in (Reason.TRUNCATED, Reason.CORRUPT), share
    assert reason_of(data[40:]) is Reason.NOT_AN_IMAGE


def test_global_pillow_settings_are_left_alone(
    photo: Image.Image, encode: Encode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    decode(encode(photo, "PNG"), Limits())  # our limit counts, not the process-wide one
    assert Image.MAX_IMAGE_PIXELS == 10
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "AVIF"])
def test_a_flipped_byte_is_decoded_or_corrupt_but_always_the_same(
    photo: Image.Image, encode: Encode, format: str
) -> None:
    data = bytearray(encode(photo.resize((320, 240)), format))
    outcomes = set()
    for share in (0.3, 0.5, 0.7):
        damaged = bytearray(data)
        damaged[int(len(data) * share)] ^= 0x55
        results = []
        for _ in range(2):
            try:
                results.append(decode(bytes(damaged)).rgb.tobytes())
            except ImageError as error:
                results.append((error.reason, error.detail))
                assert error.reason is Reason.CORRUPT
        assert results[0] == results[1]
        outcomes.add(type(results[0]))
    if format == "PNG":  # its checksums leave no doubt
        assert outcomes == {tuple}


def test_bytes_missing_from_the_middle(photo: Image.Image, encode: Encode) -> None:
    data = encode(photo, "PNG")
    assert reason_of(data[: len(data) // 2] + data[len(data) // 2 + 1000 :]) in (Reason.CORRUPT, Reason.TRUNCATED)


def test_a_bomb_is_refused_from_its_header() -> None:
    assert reason_of(png_header(60_000, 60_000)) is Reason.TOO_LARGE
    assert reason_of(png_header(300, 300), Limits(max_pixels=89_999)) is Reason.TOO_LARGE
    assert reason_of(png_header(300, 300), Limits(max_pixels=90_000)) is Reason.CORRUPT


def test_first_frame_of_animations(photo: Image.Image, encode: Encode) -> None:
    first, second = photo.resize((64, 48)), Image.new("RGB", (64, 48), "red")
    for format, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {})):
        data = encode(first, format, save_all=True, append_images=[second], **options)
        assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 2
        expected = Image.open(io.BytesIO(data)).convert("RGB")
        assert decode(data).rgb.tobytes() == expected.tobytes()
        assert np.abs(np.asarray(expected, np.int16) - np.asarray(first, np.int16)).mean() < 20


def test_every_mode_converts_as_pillow_does(photo: Image.Image, encode: Encode) -> None:
    small = photo.resize((90, 70))
    palette = small.convert("P", palette=Image.Palette.ADAPTIVE)
    cases = [
        encode(small.convert("L"), "PNG"),
        encode(small.convert("1"), "PNG"),
        encode(small.convert("LA"), "PNG"),
        encode(small.convert("RGBA"), "WEBP"),
        encode(palette, "PNG"),
        encode(palette, "PNG", transparency=3),
        encode(palette, "PNG", transparency=bytes(range(256))),
        encode(palette, "GIF", transparency=0),
        encode(small.convert("CMYK"), "JPEG"),
        encode(small.convert("CMYK"), "TIFF"),
        encode(small, "AVIF"),
        encode(small, "ICO"),
        encode(small, "QOI"),
        encode(small, "JPEG", progressive=True),
    ]
    for data in cases:
        ours = decode(data)
        theirs = Image.open(io.BytesIO(data))
        assert ours.format == theirs.format
        assert ours.original.mode == theirs.mode
        assert ours.rgb.tobytes() == theirs.convert("RGB").tobytes()


def test_a_mode_without_conversion_is_unsupported() -> None:
    with pytest.raises(ImageError) as caught:
        to_rgb(Image.new("La", (4, 4)))
    assert caught.value.reason is Reason.UNSUPPORTED


def test_sixteen_bits_are_scaled_not_clipped(photo: Image.Image, encode: Encode) -> None:
    grey = np.asarray(photo.convert("L")).astype(np.uint16)
    deep = grey * 257
    for data in (
        encode(Image.fromarray(deep), "PNG"),
        encode(Image.fromarray(deep), "TIFF"),
        b"P5 %d %d 65535\n" % photo.size + deep.astype(">u2").tobytes(),
    ):
        image = decode(data)
        assert image.original.mode.startswith("I")
        assert np.array_equal(np.asarray(image.rgb)[..., 0], grey)
    clipped = Image.open(io.BytesIO(encode(Image.fromarray(deep), "PNG"))).convert("RGB")
    assert np.asarray(clipped).mean() > grey.mean() + 50  # what the exception is for


def test_floats_and_wide_integers_are_scaled() -> None:
    ramp = np.linspace(0, 1, 256, dtype=np.float32)[None]
    expected = np.arange(256, dtype=np.uint8)
    for values in (ramp, ramp * 255, ramp * 4e6 - 1e3, ramp * np.float32(1e38)):
        result = np.asarray(to_rgb(Image.fromarray(values)))[0, :, 0]
        assert np.abs(result.astype(int) - expected).max() <= 1
    wide = (ramp * 2_000_000_000).astype(np.int32)
    assert np.abs(np.asarray(to_rgb(Image.fromarray(wide)))[0, :, 0].astype(int) - expected).max() <= 1
    broken = np.array([[np.nan, 0.0, 1.0]], dtype=np.float32)
    assert np.asarray(to_rgb(Image.fromarray(broken)))[0, :, 0].tolist() == [0, 0, 255]
    assert np.asarray(to_rgb(Image.new("F", (3, 3), 7e9))).max() == 0  # no range to stretch


def test_exif_orientation_is_ignored_unless_asked_for(photo: Image.Image, encode: Encode) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(photo.resize((60, 40)), "JPEG", exif=exif)
    assert decode(data).rgb.size == (60, 40)
    assert decode(data, honour_exif=True).rgb.size == (40, 60)


EXPECTED_FORMATS = {
    "pgm.jpeg": "PPM",  # these four lie about what they are
    "pbm.png": "PPM",
    "pbm.tiff": "PPM",
    "jpeg.tiff": "JPEG",
    "cat-3449999_640_grayscale_12bit.jpg": Reason.UNSUPPORTED,
    "ukbench09268_corrupt.jpg": Reason.NOT_AN_IMAGE,
}
BY_SUFFIX = {".jpg": "JPEG", ".png": "PNG", ".webp": "WEBP", ".bmp": "BMP", ".gif": "GIF", ".tiff": "TIFF"}
BY_SUFFIX |= {".jp2": "JPEG2000", ".pbm": "PPM"}


def test_real_files_of_every_format(format_files: list[Path]) -> None:
    assert len(format_files) == 20
    for path in format_files:
        expected = EXPECTED_FORMATS.get(path.name) or BY_SUFFIX[path.suffix]
        data = path.read_bytes()
        if isinstance(expected, Reason):
            assert reason_of(data) is expected, path.name
        else:
            image = decode(data)
            assert image.format == expected, path.name
            assert image.rgb.tobytes() == Image.open(path).convert("RGB").tobytes(), path.name


def test_decoding_does_not_import_torch() -> None:
    code = "import sys, curator_embed.decoding.pillow, curator_embed.decoding.spec; print(sorted(sys.modules))"
    listed = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True).stdout
    assert "curator_embed.decoding.spec" in listed
    assert not re.search(r"'(torch|timm|dask)'", listed)
