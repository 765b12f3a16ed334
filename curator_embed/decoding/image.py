"""A decoded image as the steps see it: one decode, many readers.

Kept apart from the engines so that hashes and properties need neither torch nor DALI.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from curator_embed.decoding.pillow import to_rgb

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class DecodedImage:
    """One decoded image.

    Attributes:
        encoded: the bytes it was decoded from.
        original: Pillow's image, fully loaded, in the mode it is stored in (first frame).
        format: Pillow's name of the format ("JPEG", "PNG", ...).
    """

    encoded: bytes
    original: Image.Image
    format: str

    @cached_property
    def rgb(self) -> Image.Image:
        """The pixels as RGB: Pillow's ``convert("RGB")``, except that 16-bit images are scaled, not clipped."""
        return to_rgb(self.original)

    @cached_property
    def grey(self) -> Image.Image:
        """``rgb`` in 8-bit grey (ITU-R 601, as Pillow's ``convert("L")``), made once for all hashes and properties."""
        return self.rgb.convert("L")
