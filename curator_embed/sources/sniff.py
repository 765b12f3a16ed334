"""What kind of image some bytes are, told from their first bytes alone.

Pure and free of decoders: extensions lie, and captions begin with letters that weak signatures
would take for an image ("BMW", "P1 racing"), so every weak signature is checked further.
"""

from __future__ import annotations

import re

SNIFF_BYTES = 4096
"""How many leading bytes ``sniff`` makes use of; an SVG may open with a long prologue."""

# fmt: off
IMAGE_EXTENSIONS = frozenset((
    "jpg", "jpeg", "jpe", "jfif", "png", "apng", "webp", "gif", "bmp", "dib", "tif", "tiff", "svg", "avif", "avifs",
    "heic", "heif", "jp2", "j2k", "j2c", "jpx", "jpf", "jxl", "ppm", "pgm", "pbm", "pnm", "pam", "pfm",
))
# fmt: on
"""Lower-case extensions that claim to be an image."""

_STARTS = (
    (b"\xff\xd8\xff", "jpeg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF87a", "gif"),
    (b"GIF89a", "gif"),
    (b"II*\0", "tiff"),
    (b"MM\0*", "tiff"),
    (b"II+\0\x08\0", "tiff"),  # BigTIFF
    (b"MM\0+\0\x08", "tiff"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "jpeg2000"),
    (b"\xff\x4f\xff\x51", "jpeg2000"),  # the bare codestream
    (b"\0\0\0\x0cJXL \r\n\x87\n", "jxl"),
)
_BMP_HEADER_SIZES = frozenset((12, 16, 40, 52, 56, 64, 108, 124))
_BMP_DEPTHS = frozenset((0, 1, 2, 4, 8, 16, 24, 32))
_AVIF_BRANDS = frozenset((b"avif", b"avis"))
_HEIC_BRANDS = frozenset((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"))

_PNM_GAP = rb"(?:\s|#[^\r\n]*[\r\n])+"
_PNM_SIZE = _PNM_GAP + rb"[1-9]\d{0,9}" + _PNM_GAP + rb"[1-9]\d{0,9}"
_PNM_MAXVAL = _PNM_GAP + rb"[1-9]\d{0,4}"
_PNM = re.compile(
    # Plain rasters are text: only digits may follow, else it is a sentence that happens to begin with "P2 1 2".
    rb"P1" + _PNM_SIZE + rb"\s[\s01]*\Z"
    rb"|P[23]" + _PNM_SIZE + _PNM_MAXVAL + rb"\s[\s\d]*\Z"
    rb"|P4" + _PNM_SIZE + rb"\s"
    rb"|P[56]" + _PNM_SIZE + _PNM_MAXVAL + rb"\s"
    rb"|P7\s+(?:#[^\n]*\n\s*)*(?:WIDTH|HEIGHT|DEPTH|MAXVAL|TUPLTYPE)\s"
    rb"|P[Ff]\s+\d{1,10}\s+\d{1,10}\s+-?\d+(?:\.\d+)?\s"
)
_SVG_ROOT = re.compile(rb"<(?:[\w.-]+:)?svg[\s/>:]")
_SVG_DOCTYPE = re.compile(rb"<!DOCTYPE\s+(?:[\w.-]+:)?svg[\s>\[]", re.IGNORECASE)


def sniff(head: bytes) -> str | None:
    """Name the image format that ``head`` begins, or None when it begins none that is known.

    Args:
        head: the first bytes of a file; more than ``SNIFF_BYTES`` are not looked at.

    Returns:
        "jpeg", "png", "gif", "webp", "bmp", "tiff", "avif", "heic", "jpeg2000", "jxl", "pnm", "svg" or None.
    """
    head = head[:SNIFF_BYTES]
    for start, name in _STARTS:
        if head.startswith(start):
            return name
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    if head[4:8] == b"ftyp":
        return _iso_image(head)
    if head[:2] == b"BM":
        return "bmp" if _is_bmp(head) else None
    if head[:1] == b"P":
        return "pnm" if _PNM.match(head) else None
    return "svg" if _is_svg(head) else None


def _iso_image(head: bytes) -> str | None:
    """AVIF and HEIC share their container with video: only the brands tell."""
    brands = {head[i : i + 4] for i in (8, *range(16, min(int.from_bytes(head[:4], "big"), len(head)), 4))}
    if brands & _AVIF_BRANDS:
        return "avif"
    return "heic" if brands & _HEIC_BRANDS else None


def _is_bmp(head: bytes) -> bool:
    """A BMP's own header must agree with itself: DIB header size, planes, depth, where pixels start."""
    dib = int.from_bytes(head[14:18], "little")
    at = 22 if dib == 12 else 26
    planes, depth = int.from_bytes(head[at : at + 2], "little"), int.from_bytes(head[at + 2 : at + 4], "little")
    pixels_at = int.from_bytes(head[10:14], "little")
    return (
        len(head) >= at + 4
        and dib in _BMP_HEADER_SIZES
        and planes == 1
        and depth in _BMP_DEPTHS
        and (pixels_at == 0 or pixels_at >= 14 + dib)
    )


def _is_svg(head: bytes) -> bool:
    """Whether the root element is <svg>; a web page that contains one is not an image."""
    rest = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    while rest.startswith((b"<?", b"<!--")):
        end = b"?>" if rest.startswith(b"<?") else b"-->"
        _, found, rest = rest.partition(end)
        if not found:
            return False
        rest = rest.lstrip()
    return bool(_SVG_ROOT.match(rest) or _SVG_DOCTYPE.match(rest))
