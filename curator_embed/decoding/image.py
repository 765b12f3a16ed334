"""A decoded image as the steps see it: one decode, many readers.

Kept apart from the engines so that hashes and properties need neither torch nor DALI.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

from curator_embed.decoding.pillow import to_rgb

if TYPE_CHECKING:
    from PIL import Image

T = TypeVar("T")


class once(Generic[T]):
    """``functools.cached_property`` without its lock.

    Until Python 3.12 that lock is one for all instances and held while the value is made, so that decode threads
    would convert one image at a time. Two threads that ask the same instance at once both make the value.
    """

    def __init__(self, make: Callable[[Any], T]) -> None:
        self.make, self.__doc__ = make, make.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, instance: None, owner: type) -> once[T]: ...

    @overload
    def __get__(self, instance: object, owner: type) -> T: ...

    def __get__(self, instance: object | None, owner: type) -> once[T] | T:
        if instance is None:
            return self
        value = self.make(instance)
        instance.__dict__[self.name] = value
        return value


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

    @once
    def rgb(self) -> Image.Image:
        """The pixels as RGB: Pillow's ``convert("RGB")``, except that 16-bit images are scaled, not clipped."""
        return to_rgb(self.original)

    @once
    def grey(self) -> Image.Image:
        """``rgb`` in 8-bit grey (ITU-R 601, as Pillow's ``convert("L")``), made once for all hashes and properties."""
        return self.rgb.convert("L")
