"""``ImageProperties``: what an image is (size, format, orientation) and how it looks (brightness, blur, ...).

Names and definitions follow cleanvision where it has them, so that its thresholds can be used on these columns.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from math import sqrt
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from curator_embed.decoding.image import DecodedImage, once
from curator_embed.decoding.pillow import DecodeOptions, Limits
from curator_embed.errors import UsageError
from curator_embed.steps import ImageStep

_ORIENTATION_TAG = 0x0112
_ANIMATED_FORMATS = frozenset({"GIF", "WEBP", "PNG", "AVIF"})
_LUMA = np.array([241, 691, 68])
"""Weights of red, green and blue in brightness, in thousandths: cleanvision's."""


class ImageProperties(ImageStep):
    """Adds a column a property, computed from the image as it was decoded for the other steps.

    ``docs/columns.md`` defines each property and says what it costs.

    Args:
        names: of ``PROPERTIES``; None for all but the two brightness percentiles, which cost twice what all others do.
        prefix: goes before every column's name. The default keeps clear of the columns ``width`` and ``height`` that
            img2dataset and others write; with ``prefix=""`` the names are the bare ones.
        honour_exif: turn images as their EXIF says before measuring. Steps of one run must agree on this.
        max_image_pixels: images with more are not decoded (``too_large``); None for Pillow's own limit.

    Raises:
        UsageError: an unknown or repeated name.
    """

    column_argument = "prefix"

    def __init__(
        self,
        names: Sequence[str] | None = None,
        *,
        prefix: str = "image_",
        honour_exif: bool = False,
        max_image_pixels: int | None = None,
    ) -> None:
        self.names = _DEFAULT if names is None else _checked_names(names)
        self.prefix, self.honour_exif = prefix, honour_exif
        self.limits = Limits() if max_image_pixels is None else Limits(max_image_pixels, max_image_pixels)

    def columns(self) -> dict[str, pa.DataType]:
        """A column a property, of the type ``PROPERTIES`` gives it."""
        return {self.prefix + name: PROPERTIES[name][0] for name in self.names}

    def decode_options(self) -> DecodeOptions:
        """The limits and the turning that were asked for."""
        return DecodeOptions(self.limits, self.honour_exif)

    def recipe(self) -> dict[str, Any]:
        """What determines the values. A property does not depend on which others are measured, so names are left out:
        columns of a shorter list are up to date in a longer one."""
        return {
            "step": "properties",
            "definitions": 1,
            "honour_exif": self.honour_exif,
            "max_image_pixels": self.limits.max_pixels,
            "software": {"pillow": version("pillow")},
        }

    def measure(self, image: DecodedImage) -> Mapping[str, Any]:
        """The properties of one image.

        Raises:
            ImageError: the pixels cannot be had as RGB.
        """
        view = View(image)
        return {self.prefix + name: PROPERTIES[name][1](view) for name in self.names}

    def __repr__(self) -> str:
        return f"ImageProperties({self.names!r}, prefix={self.prefix!r})"


class View:
    """One image and what several properties need of it, each made once."""

    def __init__(self, image: DecodedImage) -> None:
        self.image = image

    @once
    def counts(self) -> NDArray[np.int64]:
        """How often each level occurs in red, green and blue: (3, 256)."""
        return np.array(self.image.rgb.histogram()).reshape(3, 256)

    @once
    def means(self) -> NDArray[np.float64]:
        """Mean red, green and blue, 0..255."""
        return self.counts @ np.arange(256) / self.pixels

    @once
    def brightness_percentiles(self) -> dict[int, float]:
        """The 5th and 99th percentile of the pixels' brightness, as numpy interpolates them."""
        rgb = np.asarray(self.image.rgb).reshape(-1, 3)
        # A percentile needs the square root of two pixels only, so it is drawn last.
        squares = np.zeros(len(rgb), np.int32)
        for band, weight in enumerate(_LUMA):
            squares += (weight * np.arange(256) ** 2).astype(np.int32)[rgb[:, band]]
        places = {p: (len(rgb) - 1) * p / 100 for p in (5, 99)}
        wanted = sorted({place for at in places.values() for place in (int(at), min(int(at) + 1, len(rgb) - 1))})
        squares.partition(wanted)
        found = {}
        for p, at in places.items():
            low, high = np.sqrt(squares[[int(at), min(int(at) + 1, len(rgb) - 1)]] / 1000) / 255
            found[p] = float(low + (high - low) * (at - int(at)))
        return found

    @property
    def pixels(self) -> int:
        """Width times height."""
        return self.image.original.width * self.image.original.height

    @once
    def stored(self) -> Image.Image:
        """Pillow's image with its header as the file has it; no pixels are decoded for it.

        Turning an image by its EXIF drops the orientation (Pillow turns TIFFs in any case), and asking a GIF for its
        second frame drops its pixels: in these cases another image looks at the header.
        """
        original = self.image.original
        if original.format not in (None, "GIF", "TIFF"):
            return original
        family = "JPEG" if self.image.format == "MPO" else self.image.format
        header: Image.Image = Image.OPEN[family][0](io.BytesIO(self.image.encoded), "")
        return header


def width(view: View) -> int:
    """Pixels across."""
    return view.image.original.width


def height(view: View) -> int:
    """Pixels down."""
    return view.image.original.height


def mode(view: View) -> str:
    """Pillow's mode before the conversion to RGB ("L", "RGB", "RGBA", "P", "CMYK", "I;16", ...)."""
    return str(view.image.original.mode)


def format_(view: View) -> str:
    """Pillow's name of the format by the bytes ("JPEG", "PNG", ..., "MPO" for a JPEG that holds several pictures)."""
    return view.image.format


def file_size(view: View) -> int:
    """Encoded bytes."""
    return len(view.image.encoded)


def aspect_ratio(view: View) -> float:
    """The shorter side over the longer, as in cleanvision: 1 for a square, near 0 for a strip."""
    across, down = view.image.original.size
    return min(across / down, down / across)


def exif_orientation(view: View) -> int | None:
    """1 to 8 as the file has it, whether it was honoured or not; null where the file does not say."""
    try:
        value = view.stored.getexif().get(_ORIENTATION_TAG)
    except Exception:  # damaged EXIF raises nearly everything, and is no reason to lose the image
        return None
    return int(value) if isinstance(value, int) and 1 <= value <= 8 else None


def animated(view: View) -> bool:
    """Whether a GIF, WebP, PNG or AVIF has more than one frame. Pages of a TIFF are no animation."""
    return view.image.format in _ANIMATED_FORMATS and bool(getattr(view.stored, "is_animated", False))


def brightness(view: View) -> float:
    """0..1: sqrt(0.241 R² + 0.691 G² + 0.068 B²) / 255 of the mean colour, as in cleanvision."""
    return sqrt(float(_LUMA @ np.square(view.means)) / 1000) / 255


def brightness_perc_5(view: View) -> float:
    """0..1: 95 % of the pixels are at least so bright. cleanvision calls an image light where this is above 0.95."""
    return view.brightness_percentiles[5]


def brightness_perc_99(view: View) -> float:
    """0..1: 99 % of the pixels are at most so bright. cleanvision calls an image dark where this is below 0.32."""
    return view.brightness_percentiles[99]


def contrast(view: View) -> float:
    """0..0.5: standard deviation of the grey levels over 255 (RMS contrast)."""
    counts, levels = np.array(view.image.grey.histogram()), np.arange(256)
    mean = counts @ levels / view.pixels
    return sqrt(counts @ np.square(levels - mean) / view.pixels) / 255


def blur(view: View) -> float:
    """Variance of the Laplacian of the grey levels, mirrored at the border: low is blurred.

    At full size, and equal to OpenCV's ``cv2.Laplacian(grey, cv2.CV_64F).var()``: thresholds people know (100 or so)
    hold. Sums of whole numbers, so exact.
    """
    grey = np.asarray(view.image.grey)
    total, squares = 0, 0
    # In bands, so that a large image's intermediates stay in the cache.
    rows = max(1, (1 << 18) // grey.shape[1])
    for top in range(0, len(grey), rows):
        around = np.arange(top - 1, min(top + rows, len(grey)) + 1)
        around[0], around[-1] = _mirrored(around[0], len(grey)), _mirrored(around[-1], len(grey))
        band = grey[around].astype(np.int16)
        laplacian = band[:-2] + band[2:] - 4 * band[1:-1]
        laplacian[:, 1:] += band[1:-1, :-1]
        laplacian[:, :-1] += band[1:-1, 1:]
        laplacian[:, 0] += band[1:-1, _mirrored(-1, grey.shape[1])]
        laplacian[:, -1] += band[1:-1, _mirrored(grey.shape[1], grey.shape[1])]
        total += int(laplacian.sum(dtype=np.int64))
        squares += int(np.square(laplacian, dtype=np.int32).sum(dtype=np.int64))
    return (squares * grey.size - total * total) / grey.size**2


def entropy(view: View) -> float:
    """Bits, 0..9.6: Shannon entropy of the levels of all three bands together: Pillow's ``rgb.entropy()``."""
    counts = view.counts[view.counts > 0]
    shares = counts / counts.sum()
    return float(max(0.0, -(shares @ np.log2(shares))))


def mean_red(view: View) -> float:
    """0..255."""
    return float(view.means[0])


def mean_green(view: View) -> float:
    """0..255."""
    return float(view.means[1])


def mean_blue(view: View) -> float:
    """0..255."""
    return float(view.means[2])


def transparency(view: View) -> float:
    """0..1: the share of pixels that are not fully opaque; 0 for images without an alpha channel."""
    original = view.image.original
    if not original.has_transparency_data:
        return 0.0
    opaque = original.convert("RGBA").getchannel("A").histogram()[255]
    return 1 - opaque / view.pixels


PROPERTIES: dict[str, tuple[pa.DataType, Callable[[View], Any]]] = {
    "width": (pa.int32(), width),
    "height": (pa.int32(), height),
    "mode": (pa.string(), mode),
    "format": (pa.string(), format_),
    "file_size": (pa.int64(), file_size),
    "aspect_ratio": (pa.float64(), aspect_ratio),
    "exif_orientation": (pa.int8(), exif_orientation),
    "animated": (pa.bool_(), animated),
    "brightness": (pa.float64(), brightness),
    "brightness_perc_5": (pa.float64(), brightness_perc_5),
    "brightness_perc_99": (pa.float64(), brightness_perc_99),
    "contrast": (pa.float64(), contrast),
    "blur": (pa.float64(), blur),
    "entropy": (pa.float64(), entropy),
    "mean_red": (pa.float64(), mean_red),
    "mean_green": (pa.float64(), mean_green),
    "mean_blue": (pa.float64(), mean_blue),
    "transparency": (pa.float64(), transparency),
}
"""Every property: its column's type and what measures it."""

_DEFAULT = tuple(name for name in PROPERTIES if not name.startswith("brightness_perc"))


def _checked_names(names: Sequence[str]) -> tuple[str, ...]:
    named = (names,) if isinstance(names, str) else tuple(names)
    unknown = [name for name in named if name not in PROPERTIES]
    if unknown or not named:
        what = f"no property is called {unknown[0]!r}" if unknown else "no property was named"
        raise UsageError(f"{what}; there are {', '.join(PROPERTIES)}")
    doubled = [name for name in PROPERTIES if named.count(name) > 1]
    if doubled:
        raise UsageError(f"the property {doubled[0]!r} is named twice")
    return named


def _mirrored(place: int, size: int) -> int:
    """A place one beyond either end, reflected at the outermost pixel."""
    if 0 <= place < size:
        return place
    return min(1, size - 1) if place < 0 else max(0, size - 2)
