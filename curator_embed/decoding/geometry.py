"""Where every output pixel comes from: pure arithmetic, no pixels.

Both engines follow these plans, so that a crop is the same rows and columns everywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from curator_embed.decoding.spec import PreprocessSpec

Size = tuple[int, int]
"""(height, width), as torch counts."""


@dataclass(frozen=True, slots=True)
class Axis:
    """One direction of a resize followed by a crop or pad; all in pixels.

    Attributes:
        source: length before.
        resized: length after the resize, were it carried out in full.
        start: first resized pixel that is kept.
        length: number of resized pixels kept.
        before: padding in front of them.
        output: length of the result, padding included.
    """

    source: int
    resized: int
    start: int
    length: int
    before: int
    output: int

    @property
    def stop(self) -> int:
        """End of the resized pixels that are kept."""
        return self.start + self.length

    @property
    def scale(self) -> float:
        """Source pixels per resized pixel."""
        return self.source / self.resized

    @property
    def unchanged(self) -> bool:
        """Whether there is nothing to resample."""
        return self.source == self.resized


_EXACT = 1e-9
"""Source pixels: what double precision itself leaves between a bound and its single precision."""


@dataclass(frozen=True, slots=True)
class Box:
    """What Pillow is asked for to get an axis' kept pixels, and few others, as the full resize would give them.

    Attributes:
        first, last: source pixels that take part: crop to these first.
        begin, end: the box within them, in fractions of source pixels.
        start, stop: the resized pixels this gives; they contain the axis' own.
    """

    first: int
    last: int
    begin: float
    end: float
    start: int
    stop: int


def box_of(axis: Axis, support: float, slack: int = 24) -> Box:
    """Find the box of an axis for a filter that reaches ``support`` source pixels (at scale 1) to each side.

    Pillow holds a box in single precision, which is off by up to 1e-5 pixels and shows as single grey levels. Hence
    the crop, which keeps coordinates small, and up to ``slack`` more resized pixels on each side, among which the
    bounds are taken that single precision represents best. With ``slack=axis.resized`` those are always exact: at the
    latest the bounds of the whole axis are.
    """
    scale = axis.scale
    starts = np.arange(axis.start, max(axis.start - slack, 0) - 1, -1)
    stops = np.arange(axis.stop, min(axis.stop + slack, axis.resized) + 1)
    reach = support * max(scale, 1.0) + 1
    first = max(math.floor(starts[-1] * scale - reach), 0)
    last = min(math.ceil(stops[-1] * scale + reach), axis.source)
    begins, ends = starts * scale - first, stops * scale - first
    single_begins, single_ends = begins.astype(np.float32), ends.astype(np.float32)
    lengths = (single_ends[None, :] - single_begins[:, None]).astype(np.float64)
    at_begin = np.abs(single_begins - begins)[:, None]
    at_end = np.abs(single_begins[:, None] + lengths - ends[None, :])
    errors = np.maximum(at_begin, at_end)
    i, j = np.unravel_index(np.argmin(np.where(errors < _EXACT, 0, errors)), lengths.shape)
    begin, end = float(begins[i]), float(ends[j])
    if errors[i, j] < _EXACT:  # exact bounds stay so when whole pixels are cut off that take no part
        unused = max(math.floor(begin - reach), 0)
        last = min(math.ceil(first + end + reach), axis.source)
        first, begin, end = first + unused, begin - unused, end - unused
    return Box(first, last, begin, min(end, float(last - first)), int(starts[i]), int(stops[j]))


@dataclass(frozen=True, slots=True)
class Plan:
    """A resize and crop or pad in both directions, and which direction is resampled first."""

    vertical: Axis
    horizontal: Axis
    vertical_first: bool

    @property
    def resized(self) -> Size:
        """(height, width) of the full resize."""
        return self.vertical.resized, self.horizontal.resized

    @property
    def output(self) -> Size:
        """(height, width) of the result."""
        return self.vertical.output, self.horizontal.output


def plan(spec: PreprocessSpec, height: int, width: int) -> Plan:
    """Plan how an image of this size becomes the model's input."""
    resized_height, resized_width = resized_size(spec, height, width)
    return Plan(
        crop_or_pad(height, resized_height, spec.crop[0]),
        crop_or_pad(width, resized_width, spec.crop[1]),
        vertical_first(height, width, resized_height, resized_width),
    )


def resized_size(spec: PreprocessSpec, height: int, width: int) -> Size:
    """(height, width) after the resize, exactly as torchvision and timm compute it.

    ``shortest`` floors the long side (``torchvision.transforms.Resize(int)``), ``cover`` and ``contain`` round both
    (``timm.data.transforms.ResizeKeepRatio`` with ``longest`` 0 and 1). A side that would come out as 0, which
    those refuse, is 1 here.
    """
    if spec.resize == "none":
        return height, width
    if spec.resize == "squash":
        return spec.size
    if spec.resize == "shortest":
        short, long = min(height, width), max(height, width)
        new_short, new_long = spec.size[0], int(spec.size[0] * long / short)
        if spec.max_size is not None and new_long > spec.max_size:
            new_short, new_long = max(int(spec.max_size * new_short / new_long), 1), spec.max_size
        return (new_long, new_short) if width <= height else (new_short, new_long)
    ratios = height / spec.size[0], width / spec.size[1]
    ratio = max(ratios) if spec.resize == "contain" else min(ratios)
    return max(round(height / ratio), 1), max(round(width / ratio), 1)


def crop_or_pad(source: int, resized: int, output: int) -> Axis:
    """Centre ``output`` pixels in ``resized`` ones as torchvision does: half a pixel goes to the even
    neighbour when cropping, and behind when padding."""
    if output > resized:
        return Axis(source, resized, 0, resized, (output - resized) // 2, output)
    return Axis(source, resized, round((resized - output) / 2.0), output, 0, output)


def vertical_first(height: int, width: int, resized_height: int, resized_width: int) -> bool:
    """Whether Pillow resamples columns before rows.

    Each pass rounds to 8 bits, so that the order shows: up to 20 grey levels where one side shrinks and the other
    grows. Pillow 13 goes vertically first where that is estimated to be less work (found by comparing its output with
    single passes, 3,400 random sizes, no exception); before, only very tall images did.
    """
    if resized_height >= height:
        return False
    if _pillow_major() >= 13:
        return height - resized_height > 2 * (width - resized_width)
    return height > 100 * width


@cache
def _pillow_major() -> int:
    import PIL

    return int(PIL.__version__.partition(".")[0])
