"""Encoded bytes -> a Pillow image, or one reason why not.

The only module that lets untrusted bytes into a decoder; knows neither torch nor sources.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps

from curator_embed.errors import ImageError, Reason

if TYPE_CHECKING:
    from curator_embed.decoding.image import DecodedImage

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO", "QOI")
"""Raster formats with a signature of their own. Pillow's other readers are left out on purpose: they run
interpreters (EPS, PDF), guess without a signature (TGA), or have had little scrutiny."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Guards against decompression bombs; pixels are counted as width times height.

    Attributes:
        max_pixels: largest decoded image, read from its header before any pixel is decoded. The default is
            the size at which Pillow itself refuses an image.
        max_resized_pixels: largest image, intermediate ones included, that resizing may compute.
    """

    max_pixels: int = 178_956_970
    max_resized_pixels: int = 178_956_970


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class DecodeOptions:
    """How a run's one decode is done: steps that share it must agree on this.

    Attributes:
        limits: guards against decompression bombs.
        honour_exif: turn images as their EXIF orientation says.
    """

    limits: Limits = DEFAULT_LIMITS
    honour_exif: bool = False


def decode(encoded: bytes, limits: Limits = DEFAULT_LIMITS, *, honour_exif: bool = False) -> DecodedImage:
    """Decode the first frame of an image completely.

    Args:
        encoded: a whole file, as stored.
        limits: checked against the header's size before anything is decoded.
        honour_exif: turn the image as its EXIF orientation says. Off by default, as in timm and torchvision.

    Raises:
        ImageError: with ``EMPTY``, ``NOT_AN_IMAGE``, ``UNSUPPORTED``, ``TRUNCATED``, ``CORRUPT`` or ``TOO_LARGE``.
            The same bytes always give the same reason.
    """
    from curator_embed.decoding.image import DecodedImage

    if not encoded:
        raise ImageError(Reason.EMPTY, "zero bytes")
    factory = _reader_for(encoded)
    stored_as = ""
    try:
        # Image.open would also compare with Pillow's process-wide limit; the factory it calls does not.
        image = factory(io.BytesIO(encoded), "")
        stored_as = image.format or ""
        _check_size(image.size, limits)
        image.decodermaxblock = len(encoded)  # else Pillow hands its decoder 64 KB at a time
        image.load()
        _check_size(image.size, limits)  # an icon's size is only known once it is decoded
        if honour_exif:
            image = ImageOps.exif_transpose(image)
    except ImageError:
        raise
    except Exception as error:  # decoders of untrusted bytes raise nearly everything
        raise _diagnose(error, encoded) from error
    return DecodedImage(encoded=encoded, original=image, format=stored_as)


def to_rgb(image: Image.Image) -> Image.Image:
    """Give the pixels as 8-bit RGB: Pillow's ``convert("RGB")``, except where that would clip.

    - ``I;16`` and its variants: the high byte, as Pillow itself reads 16-bit RGB files.
    - ``I`` (32 bits): the high byte of 16 where all values fit in 16 bits (that is what a PGM with a maximum above
      255 holds); otherwise the image's own range is stretched over 0..255.
    - ``F``: 0..1 becomes 0..255, 0..255 is kept, any other range is stretched over 0..255; not-a-number is black.

    An RGB image is returned as it is, not copied.

    Raises:
        ImageError: ``UNSUPPORTED`` where Pillow knows no conversion (premultiplied grey, for one).
    """
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        return Image.fromarray(_to_8_bits(np.asarray(image, dtype=np.float64), image.mode)).convert("RGB")
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise ImageError(Reason.UNSUPPORTED, f"no conversion from mode {image.mode} to RGB") from error


def _to_8_bits(values: np.ndarray[Any, np.dtype[np.float64]], mode: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    largest = float(np.finfo(np.float32).max)
    values = np.nan_to_num(values, nan=0.0, posinf=largest, neginf=-largest)
    low, high = float(values.min()), float(values.max())
    if mode == "I" and low >= 0 and high <= 65535:
        values = values // 256
    elif mode == "F" and low >= 0 and high <= 1:
        values = np.rint(values * 255)
    elif not (mode == "F" and low >= 0 and high <= 255):
        values = np.rint((values - low) * (255 / (high - low or 1.0)))
    return np.clip(values, 0, 255).astype(np.uint8)


def _check_size(size: tuple[int, int], limits: Limits) -> None:
    if size[0] * size[1] > limits.max_pixels:
        raise ImageError(Reason.TOO_LARGE, f"{size[0]}x{size[1]} pixels, the limit is {limits.max_pixels}")


@cache
def _readers() -> tuple[tuple[Callable[[bytes], bool | str], Callable[..., Any]], ...]:
    """(signature test, reader) for every format of FORMATS that this build of Pillow has."""
    Image.init()
    found = (Image.OPEN[name] for name in FORMATS if name in Image.OPEN)
    return tuple((accept, factory) for factory, accept in found if accept is not None)


def _reader_for(data: bytes) -> Callable[..., Any]:
    known = _unreadable_format(data)
    if known:
        raise ImageError(Reason.UNSUPPORTED, f"{known} is not decoded")
    for accept, factory in _readers():
        verdict = accept(data[:16])
        if isinstance(verdict, str):  # Pillow knows the format but was built without its codec
            raise ImageError(Reason.UNSUPPORTED, verdict)
        if verdict:
            return factory
    raise ImageError(Reason.NOT_AN_IMAGE, _first_impression(data))


_UNREADABLE = (
    (b"%PDF", "PDF"),
    (b"%!PS", "PostScript"),
    (b"8BPS", "Photoshop"),
    (b"gimp xcf", "XCF"),
    (b"DDS ", "DDS"),
    (b"icns", "ICNS"),
    (b"\x76\x2f\x31\x01", "OpenEXR"),
    (b"#?RADIANCE", "Radiance HDR"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\x00\x00\x00\x0cJXL \r\n\x87\n", "JPEG XL"),
    (b"II\xbc\x01", "JPEG XR"),
    (b"FLIF", "FLIF"),
    (b"BPG\xfb", "BPG"),
    (b"\xd7\xcd\xc6\x9a", "WMF"),
    (b"\x01\x00\x00\x00\x6c\x00\x00\x00", "EMF"),
    (b"\x01\xda\x00", "SGI"),
    (b"\x01\xda\x01", "SGI"),
)
_SVG = re.compile(
    rb"(?:\xef\xbb\xbf)?\s*(?:<\?xml[^>]*>\s*|<!--.*?-->\s*|<!DOCTYPE\s+svg[^>]*>\s*)*<svg[\s>]", re.S | re.I
)
_MARKUP = re.compile(rb"(?:\xef\xbb\xbf)?\s*<[!?a-z]", re.I)


def _unreadable_format(data: bytes) -> str | None:
    """Name a real image format that no reader here takes."""
    for signature, name in _UNREADABLE:
        if data.startswith(signature):
            return name
    if data[4:8] == b"ftyp":
        # The major brand may be a generic one (mif1); the compatible brands tell AVIF from HEIC.
        brands = data[8 : min(max(int.from_bytes(data[:4], "big"), 16), 256)]
        return None if b"avif" in brands or b"avis" in brands else "HEIF or another ISO media file"
    if data[128:132] == b"DICM":
        return "DICOM"
    return "SVG" if _SVG.match(data[:4096]) else None


def _first_impression(data: bytes) -> str:
    if _MARKUP.match(data[:256]):
        return "HTML or other markup"
    return f"no image signature: starts with {data[:8].hex(' ')}"


_NOT_SUPPORTED = re.compile(r"cannot handle|unsupported|not (supported|available)|unknown (pixel mode|data org)", re.I)
_ADDRESS = re.compile(r"<[^<>]* at 0x[0-9a-f]+>|0x[0-9a-f]{6,}", re.I)


def _diagnose(error: Exception, data: bytes) -> ImageError:
    """Turn a decoder's exception into a reason that depends on the bytes alone."""
    text = _ADDRESS.sub("the image", str(error)) or type(error).__name__
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning | MemoryError):
        return ImageError(Reason.TOO_LARGE, text)
    if _NOT_SUPPORTED.search(text):
        return ImageError(Reason.UNSUPPORTED, text)
    early = _ends_early(data)
    if early is None:
        early = isinstance(error, EOFError) or "truncat" in text.lower() or "not enough" in text.lower()
    if early:
        return ImageError(Reason.TRUNCATED, text)
    return ImageError(Reason.UNSUPPORTED if _is_rare_jpeg(data) else Reason.CORRUPT, text)


def _ends_early(data: bytes) -> bool | None:
    """Whether the container's own structure runs past the end of the data; None where it does not say.

    Decoders report both missing and damaged data as "truncated" or "broken", depending on where they stop.
    """
    if data.startswith(b"\xff\xd8"):
        scan = _jpeg_scan(data)[0]
        return scan is None or data.rfind(b"\xff\xd9", scan) < 0
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        offset = 8
        while offset + 12 <= len(data):
            length, kind = struct.unpack_from(">I4s", data, offset)
            offset += 12 + length
            if kind == b"IEND":
                return bool(offset > len(data))
        return True
    if data.startswith(b"RIFF"):
        return len(data) < 12 or int.from_bytes(data[4:8], "little") + 8 > len(data)
    if data.startswith(b"GIF8"):
        return not data.rstrip(b"\0").endswith(b";")
    return None


def _jpeg_scan(data: bytes) -> tuple[int | None, tuple[int, int] | None]:
    """Walk a JPEG's segments: (offset of the first scan or None, (frame marker, bits per sample) or None)."""
    offset, frame = 2, None
    while offset + 4 <= len(data) and data[offset] == 0xFF:
        marker = data[offset + 1]
        if marker == 0xFF:  # fill byte
            offset += 1
            continue
        if marker == 0xDA:
            return offset, frame
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and offset + 5 <= len(data):
            frame = marker, data[offset + 4]
        offset += 2 + int.from_bytes(data[offset + 2 : offset + 4], "big")
    # Stopped on a byte that is no marker: damaged there, so whether the end is present is read off the end.
    return (offset if offset + 4 <= len(data) else None), frame


def _is_rare_jpeg(data: bytes) -> bool:
    """Lossless, hierarchical or not 8 bits a sample: real images that not every libjpeg decodes."""
    frame = _jpeg_scan(data)[1] if data.startswith(b"\xff\xd8") else None
    return frame is not None and (frame[0] not in (0xC0, 0xC1, 0xC2, 0xC9, 0xCA) or frame[1] != 8)
