"""``ImageHasher``: perceptual hashes and checksums, a column each.

The imagehash library defines the perceptual ones; here they are computed from one shared greyscale image, bit for bit
the same.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from curator_embed.decoding.pillow import DecodeOptions, Limits
from curator_embed.errors import UsageError
from curator_embed.steps import ImageStep

if TYPE_CHECKING:
    from curator_embed.datasets import ImageTextPairDataset
    from curator_embed.decoding.image import DecodedImage

Bits = NDArray[np.bool_]


class ImageHasher(ImageStep):
    """Adds one string column per kind, named after it: hashes as imagehash writes them, checksums in hexadecimal.

    All kinds see the pixels as RGB (16-bit images scaled to 8 bits) and share one decode with every other step.
    ``docs/columns.md`` says what each kind is good for and what it costs.

    Args:
        kinds: of ``HASH_KINDS``: "phash", "dhash", "ahash", "whash", "colorhash", "crop_resistant", "image_sha256"
            (the encoded bytes; "sha256" for short) and "pixel_sha256" (the RGB bytes row by row, as
            ``rgb.tobytes()`` gives them). img2dataset's own column ``sha256`` is of the download before it was
            re-encoded and stays untouched.
        hash_size: side of phash, dhash, ahash and whash, whose hashes have its square in bits; a power of two for
            whash. colorhash (14 x 3 bits) and crop_resistant (64 bits a segment, commas between) have imagehash's
            fixed sizes.
        honour_exif: turn images as their EXIF says before hashing. Steps of one run must agree on this.
        max_image_pixels: images with more are not decoded (``too_large``); None for Pillow's own limit.
        prefix: goes before every column's name.

    Raises:
        UsageError: an unknown or repeated kind, or a size that a kind cannot have.
    """

    column_argument = "prefix"

    def __init__(
        self,
        kinds: Sequence[str] = ("phash", "dhash"),
        hash_size: int = 8,
        *,
        honour_exif: bool = False,
        max_image_pixels: int | None = None,
        prefix: str = "",
    ) -> None:
        self.kinds = _checked_kinds(kinds)
        if not isinstance(hash_size, int) or hash_size < 2:
            raise UsageError(f"hash_size must be a whole number of at least 2, not {hash_size!r}")
        if "whash" in self.kinds and hash_size & (hash_size - 1):
            raise UsageError(f"whash needs a hash_size that is a power of two, not {hash_size}")
        self.hash_size, self.honour_exif, self.max_image_pixels = hash_size, honour_exif, max_image_pixels
        self.prefix = prefix
        self.limits = Limits() if max_image_pixels is None else Limits(max_image_pixels, max_image_pixels)

    def __call__(self, dataset: ImageTextPairDataset) -> ImageTextPairDataset:
        """Return a new dataset with each kind pending as a step of its own: those already there are not computed."""
        for kind in self.kinds:
            dataset = dataset.with_step(
                ImageHasher(
                    (kind,),
                    self.hash_size,
                    honour_exif=self.honour_exif,
                    max_image_pixels=self.max_image_pixels,
                    prefix=self.prefix,
                )
            )
        return dataset

    def columns(self) -> dict[str, pa.DataType]:
        """A string column a kind."""
        return {self.prefix + kind: pa.string() for kind in self.kinds}

    def decode_options(self) -> DecodeOptions:
        """The limits and the turning that were asked for."""
        return DecodeOptions(self.limits, self.honour_exif)

    def recipe(self) -> dict[str, Any]:
        """What determines the hashes; checksums have no size."""
        sized = any(kind in _SIZED for kind in self.kinds)
        return {
            "step": "hash",
            "kinds": list(self.kinds),
            "hash_size": self.hash_size if sized else None,
            "honour_exif": self.honour_exif,
            "max_image_pixels": self.limits.max_pixels,
            "software": {"imagehash": version("imagehash").partition(".")[0], "pillow": version("pillow")},
        }

    def measure(self, image: DecodedImage) -> Mapping[str, str]:
        """The hashes of one image.

        Raises:
            ImageError: the pixels cannot be had as RGB.
        """
        return {self.prefix + kind: HASH_KINDS[kind](image, self.hash_size) for kind in self.kinds}

    def __repr__(self) -> str:
        return f"ImageHasher({self.kinds!r}, hash_size={self.hash_size})"


def phash(image: DecodedImage, hash_size: int) -> str:
    """Signs of the lowest ``hash_size`` squared frequencies of a cosine transform, against their median."""
    from scipy.fftpack import dct  # type: ignore[import-untyped]

    pixels = _thumbnail(image, 4 * hash_size, 4 * hash_size)
    # Later rows of the first transform cannot reach the low frequencies, so the second leaves them out.
    low = dct(dct(pixels, axis=0)[:hash_size], axis=1)[:, :hash_size]
    ordered = np.sort(low, axis=None)
    middle = len(ordered) // 2
    median = ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
    return _hexadecimal(low > median)


def dhash(image: DecodedImage, hash_size: int) -> str:
    """Whether each pixel of a thumbnail is brighter than its left neighbour."""
    return _difference_hash(image.grey, hash_size)


def ahash(image: DecodedImage, hash_size: int) -> str:
    """Whether each pixel of a thumbnail is brighter than their mean."""
    pixels = _thumbnail(image, hash_size, hash_size)
    return _hexadecimal(pixels > pixels.mean())


def whash(image: DecodedImage, hash_size: int) -> str:
    """imagehash's own code: values that tie with the median but for rounding make any other order of sums differ."""
    import imagehash

    return str(imagehash.whash(image.grey, hash_size=hash_size))


_FAINT, _BRIGHT, _NEITHER, _GREY, _BLACK = range(0, 5 * 256, 256)
_SATURATION = np.full(256, _BRIGHT, np.uint16)
"""Class of a saturation; 170 belongs to no colour bin, yet counts as a colour."""
_SATURATION[: 256 // 3] = _GREY
_SATURATION[256 // 3 : 256 * 2 // 3] = _FAINT
_SATURATION[256 * 2 // 3] = _NEITHER
_HUES = np.searchsorted(np.linspace(0, 255, 7)[1:-1], np.arange(256), side="right")
"""Bin of a hue, six of them."""


def colorhash(image: DecodedImage, hash_size: int = 8) -> str:
    """Shares of black, grey, and six hues faint and bright, 3 bits each, counted in one pass over the pixels."""
    hue, saturation, _ = (np.asarray(band) for band in image.rgb.convert("HSV").split())
    cell = _SATURATION[saturation]
    cell[np.asarray(image.grey) < 256 // 8] = _BLACK
    cell += hue
    counts = np.bincount(cell.ravel(), minlength=_BLACK + 256).reshape(5, 256)
    by_hue = np.stack([np.bincount(_HUES, row, minlength=6) for row in counts[:2]])
    colours = max(1, int(counts[:3].sum()))
    shares = [int(counts[4].sum() / cell.size * 8), int(counts[3].sum() / cell.size * 8)]
    shares += [int(count * 8 / colours) for count in by_hue.ravel()]
    values = np.minimum(np.array(shares, np.uint8), 7)
    # imagehash's bits are not binary digits: bit i says whether what is left of the value at 2**i is above zero.
    bits = [value // 2 ** (2 - i) % 2 ** (3 - i) > 0 for value in values for i in range(3)]
    return _hexadecimal(np.array(bits))


def crop_resistant(image: DecodedImage, hash_size: int = 8) -> str:
    """dhash of every bright and dark region (Steinebach et al., doi:10.1109/ARES.2014.85)."""
    side = 300
    small = image.grey.resize((side, side), Image.Resampling.LANCZOS)
    pixels = np.asarray(small.filter(ImageFilter.GaussianBlur()).filter(ImageFilter.MedianFilter()))
    across, down = image.grey.width / side, image.grey.height / side
    hashes = []
    for rows, columns in _segments(pixels > 128) or [(slice(0, side), slice(0, side))]:
        box = (columns.start * across, rows.start * down, columns.stop * across, rows.stop * down)
        hashes.append(_difference_hash(image.grey.crop(box), 8))
    return ",".join(hashes)


def image_sha256(image: DecodedImage, hash_size: int = 8) -> str:
    """SHA-256 of the encoded bytes."""
    return hashlib.sha256(image.encoded).hexdigest()


def pixel_sha256(image: DecodedImage, hash_size: int = 8) -> str:
    """SHA-256 of the RGB bytes, row by row."""
    return hashlib.sha256(image.rgb.tobytes()).hexdigest()


HASH_KINDS: dict[str, Callable[[DecodedImage, int], str]] = {
    "phash": phash,
    "dhash": dhash,
    "ahash": ahash,
    "whash": whash,
    "colorhash": colorhash,
    "crop_resistant": crop_resistant,
    "image_sha256": image_sha256,
    "pixel_sha256": pixel_sha256,
}
"""Every kind and what computes it: (image, hash_size) -> text."""

_SIZED = frozenset({"phash", "dhash", "ahash", "whash"})


def _checked_kinds(kinds: Sequence[str]) -> tuple[str, ...]:
    named = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    named = tuple("image_sha256" if kind == "sha256" else kind for kind in named)
    unknown = [kind for kind in named if kind not in HASH_KINDS]
    if unknown or not named:
        what = f"no hash is called {unknown[0]!r}" if unknown else "no kind of hash was named"
        raise UsageError(f"{what}; there are {', '.join(HASH_KINDS)}")
    doubled = [kind for kind in HASH_KINDS if named.count(kind) > 1]
    if doubled:
        raise UsageError(f"the hash {doubled[0]!r} is named twice")
    return named


def _thumbnail(image: DecodedImage, width: int, height: int) -> NDArray[np.uint8]:
    return np.asarray(image.grey.resize((width, height), Image.Resampling.LANCZOS))


def _difference_hash(grey: Image.Image, hash_size: int) -> str:
    pixels = np.asarray(grey.resize((hash_size + 1, hash_size), Image.Resampling.LANCZOS))
    return _hexadecimal(pixels[:, 1:] > pixels[:, :-1])


def _hexadecimal(bits: Bits) -> str:
    """Bits in reading order as one number, padded on the left to whole digits, as imagehash writes it."""
    number = int.from_bytes(np.packbits(bits, axis=None).tobytes(), "big") >> (-bits.size % 8)
    return f"{number:0{math.ceil(bits.size / 4)}x}"


def _segments(bright: Bits) -> list[tuple[slice, slice]]:
    """Bounding boxes (rows, columns) of the regions imagehash finds, in its order.

    Regions are 4-connected and have more than 500 pixels; bright ones come first, each sort by its first pixel.
    imagehash stops looking for dark ones once as many pixels as the image has are assigned. It counts the frame of
    pixels around the image as assigned from the start, and never those of single-pixel regions; so does this.
    """
    from scipy import ndimage  # type: ignore[import-untyped]

    found: list[tuple[slice, slice]] = []
    assigned = 2 * sum(bright.shape)
    for region in (bright, ~bright):
        labels, _ = ndimage.label(region)
        sizes = np.bincount(labels.ravel())[1:]
        boxes = ndimage.find_objects(labels)
        for size, box in zip(sizes, boxes, strict=True):
            if region is not bright and assigned >= bright.size:
                break
            assigned += int(size) if size > 1 else 0
            if size > 500:
                found.append(box)
    return found
