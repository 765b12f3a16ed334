"""Images as a caller has them: paths or URLs, encoded bytes, PIL images. Datasets never come this way."""

from __future__ import annotations

from os import PathLike, fspath

from PIL import Image, ImageOps

from curator_embed.decoding.image import DecodedImage
from curator_embed.decoding.pillow import DecodeOptions, decode
from curator_embed.errors import ImageError, Reason, UsageError

Picture = str | PathLike[str] | bytes | Image.Image


def decoded(picture: Picture, options: DecodeOptions) -> DecodedImage:
    """Read and decode one image.

    Raises:
        ImageError: it cannot be read or decoded.
        UsageError: it is of another type.
    """
    if isinstance(picture, Image.Image):
        return _loaded(picture, honour_exif=options.honour_exif)
    encoded = picture if isinstance(picture, bytes) else _read(picture)
    return decode(encoded, options.limits, honour_exif=options.honour_exif)


def _loaded(image: Image.Image, *, honour_exif: bool) -> DecodedImage:
    try:
        image.load()
    except Exception as error:  # a lazily opened image meets its decoder only here
        raise ImageError(Reason.CORRUPT, f"{type(error).__name__}: {error}") from error
    turned = ImageOps.exif_transpose(image) if honour_exif else image
    return DecodedImage(encoded=b"", original=turned, format=image.format or "")


def _read(path: str | PathLike[str]) -> bytes:
    if not isinstance(path, str | PathLike):
        raise UsageError(f"embed takes paths, bytes or PIL images, not {type(path).__name__}")
    import fsspec

    try:
        with fsspec.open(fspath(path), "rb") as file:
            data: bytes = file.read()
    except OSError as error:
        raise ImageError(Reason.READ_ERROR, str(error)) from error
    return data
