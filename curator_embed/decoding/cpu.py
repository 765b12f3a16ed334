"""The CPU engine: an RGB image -> the model's input, uint8 until the last moment.

Pillow's resampling is the reference; torch's uint8 kernel computes the same several times faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from curator_embed.decoding.geometry import Axis, Box, Plan, box_of, plan
from curator_embed.decoding.pillow import DEFAULT_LIMITS, Limits
from curator_embed.decoding.spec import OpaqueTransform, Spec
from curator_embed.errors import ImageError, Reason

_KERNELS = {
    "bilinear": torch.ops.aten._upsample_bilinear2d_aa,
    "bicubic": torch.ops.aten._upsample_bicubic2d_aa,
}
_SUPPORT = {"bilinear": 1.0, "bicubic": 2.0, "lanczos": 3.0}
Pixels = np.ndarray[Any, np.dtype[np.uint8]]
"""uint8 (H, W, 4), the fourth byte meaningless, or (H, W, 3)."""

_WASTE = 4
"""How many times the pixels of the crop torch may compute before Pillow, slower but able to start anywhere, wins."""


def prepare(rgb: Image.Image, spec: Spec, limits: Limits = DEFAULT_LIMITS) -> torch.Tensor:
    """Resize and crop or pad one image.

    Runs on the calling thread alone, whatever ``torch.set_num_threads`` says: torch's kernel for 8-bit images is not
    parallel, and copies, which in torch would be, are numpy's. The GIL is released while it computes.

    Args:
        rgb: mode RGB, any size.
        spec: an ``OpaqueTransform`` is run as it is.
        limits: ``max_resized_pixels`` bounds what is computed, which is what the crop needs, not the full resize.

    Returns:
        uint8 (3, H, W); a view into a (H, W, 4) buffer, so not contiguous. Of an opaque transform: float32
        (3, H, W), normalised already.

    Raises:
        ImageError: ``TOO_LARGE``.
    """
    if isinstance(spec, OpaqueTransform):
        return spec(rgb)
    todo = plan(spec, rgb.height, rgb.width)
    vertical, horizontal = todo.vertical, todo.horizontal
    if vertical.unchanged and horizontal.unchanged:
        kept = _pixels(rgb)[vertical.start : vertical.stop, horizontal.start : horizontal.stop].copy()
    elif spec.interpolation == "nearest":
        _guard(max(vertical.stop, horizontal.stop), limits)
        kept = _nearest(_pixels(rgb), todo)
    elif spec.interpolation in _KERNELS and _reach(vertical) * _reach(horizontal) <= (
        _WASTE * vertical.length * horizontal.length
    ):
        _guard(_intermediate(todo), limits)
        kept = _resample(_pixels(rgb), todo, spec.interpolation)
    else:
        kept = _resample_anywhere(rgb, todo, spec.interpolation, limits)
    if kept.shape[:2] != todo.output:
        kept = _pad(kept, todo, spec.fill)
    return torch.from_numpy(kept).permute(2, 0, 1)[:3]


def normalise(
    images: Sequence[torch.Tensor],
    spec: Spec,
    *,
    channels_last: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Stack prepared images into the float batch a model takes: (pixel / 255 - mean) / std.

    Computed as pixel * scale + offset, which is ToTensor and Normalize but for the last bit of a float32 and costs
    half as much.

    Args:
        images: n tensors from ``prepare``.
        channels_last: memory layout of the result; convolutional nets are faster with it. Ignored with ``out``.
        out: float32 (>= n, 3, H, W) to write into, contiguous or channels_last, instead of a new tensor.

    Returns:
        float32 (n, 3, H, W).
    """
    shape = (len(images), *images[0].shape)
    if out is None:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        out = torch.empty(shape, dtype=torch.float32, memory_format=layout)
    out = out[: len(images)]
    if isinstance(spec, OpaqueTransform):
        for row, image in zip(out, images, strict=True):
            row.copy_(image)
        return out
    mean, std = (np.array(values, np.float64) for values in (spec.mean, spec.std))
    scale, offset = (1 / (255 * std)).astype(np.float32), (-mean / std).astype(np.float32)
    # NumPy computes on the calling thread alone. torch would share these small pieces out among its threads, which
    # costs more in waiting than it saves, above all when other threads decode meanwhile.
    if out.is_contiguous():
        for row, image in zip(out.numpy(), images, strict=True):
            for channel, plane in enumerate(row):  # one at a time: it stays in the cache
                plane[...] = image[channel].numpy()
                np.multiply(plane, scale[channel], out=plane)
                np.add(plane, offset[channel], out=plane)
        return out
    scale, offset = np.tile(scale, shape[3]), np.tile(offset, shape[3])
    for row, image in zip(out, images, strict=True):
        pixels = row.permute(1, 2, 0).numpy()
        for channel in range(3):
            pixels[..., channel] = image[channel].numpy()
        lines = pixels.reshape(shape[2], shape[3] * 3)
        np.multiply(lines, scale, out=lines)
        np.add(lines, offset, out=lines)
    return out


def _pixels(rgb: Image.Image) -> Pixels:
    """View Pillow's own memory: uint8 (H, W, 4), read-only, nothing copied.

    Pillow keeps RGB as four bytes a pixel, which is also what torch's kernel likes best. An image that Pillow keeps in
    more than one block (above 16 MB) is copied, as (H, W, 3).
    """
    try:
        exported = pa.array(rgb)
    except ValueError:
        return np.array(rgb)
    return np.frombuffer(exported.buffers()[-1], dtype=np.uint8).reshape(rgb.height, rgb.width, 4)


class _Writable:
    """Says of an array that it may be written: torch warns of read-only memory, though its kernels only read it."""

    def __init__(self, pixels: Pixels) -> None:
        interface = pixels.__array_interface__
        self.pixels, self.__array_interface__ = pixels, {**interface, "data": (interface["data"][0], False)}


def _reach(axis: Axis) -> int:
    """How many resized pixels torch must compute: it can stop early but not start late.

    A pass whose output is as long as its input is skipped by torch, whatever the scale: then the full length.
    """
    return axis.resized if axis.stop == axis.source else axis.stop


def _intermediate(todo: Plan) -> int:
    """Pixels after the first of torch's two passes."""
    vertical, horizontal = todo.vertical, todo.horizontal
    return _reach(vertical) * horizontal.source if todo.vertical_first else vertical.source * _reach(horizontal)


def _resample(pixels: Pixels, todo: Plan, interpolation: str) -> Pixels:
    vertical, horizontal = todo.vertical, todo.horizontal
    rows, columns = _reach(vertical), _reach(horizontal)
    if vertical.unchanged:
        pixels = pixels[:rows]
    if horizontal.unchanged:
        pixels = np.ascontiguousarray(pixels[:, :columns])  # torch would do it on several threads
    second = horizontal if todo.vertical_first else vertical
    if interpolation == "bilinear" and not second.unchanged:
        return _resample_bilinear(pixels, todo)
    kernel, image = _KERNELS[interpolation], _for_torch(pixels)
    upright, across = vertical.resized / vertical.source, horizontal.resized / horizontal.source
    if todo.vertical_first:
        image = kernel(image, [rows, image.shape[3]], False, upright, None)[:, :, vertical.start : vertical.stop]
        if not horizontal.unchanged:
            image = kernel(image, [vertical.length, columns], False, None, across)
        image = image[..., horizontal.start :]
    else:  # one call does both, horizontally first
        image = kernel(image, [rows, columns], False, upright, across)[:, :, vertical.start :, horizontal.start :]
    result: Pixels = image[0].permute(1, 2, 0).numpy()
    return result[: vertical.length, : horizontal.length]


def _resample_bilinear(pixels: Pixels, todo: Plan) -> Pixels:
    """First pass torch's, second pass Pillow's, so that no value is off by more than 1.

    torch's 16-bit weights round 0.3 % of values the other way. Where both passes do, the sum can be off by 2: one value
    in ten million of smooth pictures. An exact second pass of weights above zero cannot add to the first one's.
    """
    kernel, vertical, horizontal = _KERNELS["bilinear"], todo.vertical, todo.horizontal
    if todo.vertical_first:
        box, start, length = _exact_box(horizontal), horizontal.start, horizontal.length
        scale = vertical.resized / vertical.source
        image = kernel(_for_torch(pixels), [_reach(vertical), pixels.shape[1]], False, scale, None)
        image = image[:, :, vertical.start : vertical.stop, box.first : box.last]
    else:
        box, start, length = _exact_box(vertical), vertical.start, vertical.length
        image, scale = _for_torch(pixels[box.first : box.last]), horizontal.resized / horizontal.source
        image = kernel(image, [image.shape[2], _reach(horizontal)], False, None, scale)
        image = image[..., horizontal.start : horizontal.stop]
    first: Pixels = np.ascontiguousarray(image[0].permute(1, 2, 0).numpy())
    mode = "RGBX" if first.shape[2] == 4 else "RGB"
    half_done = Image.frombuffer(mode, first.shape[1::-1], first, "raw", mode, 0, 1)
    result = _pixels(_pillow_pass(half_done, box, not todo.vertical_first, "bilinear"))
    kept = slice(start - box.start, start - box.start + length)
    return (result[:, kept] if todo.vertical_first else result[kept]).copy()


def _exact_box(axis: Axis) -> Box:
    return box_of(axis, _SUPPORT["bilinear"], slack=axis.resized)


def _for_torch(pixels: Pixels) -> torch.Tensor:
    """View (H, W, C) as the (1, C, H, W) that torch's kernels take, channels last."""
    return torch.from_numpy(np.asarray(_Writable(pixels)))[None].permute(0, 3, 1, 2)


def _resample_anywhere(rgb: Image.Image, todo: Plan, interpolation: str, limits: Limits) -> Pixels:
    """Resample only what the crop needs, with Pillow: for extreme shapes and for filters torch lacks."""
    vertical, horizontal = todo.vertical, todo.horizontal
    upright, across = (box_of(axis, _SUPPORT[interpolation]) for axis in (vertical, horizontal))
    if todo.vertical_first:
        _guard((upright.stop - upright.start) * (across.last - across.first), limits)
    else:
        _guard((upright.last - upright.first) * (across.stop - across.start), limits)
    image = rgb.crop((across.first, upright.first, across.last, upright.last))
    # One pass at a time, because Pillow chooses the order by the size of what it is given.
    for is_upright in (todo.vertical_first, not todo.vertical_first):
        image = _pillow_pass(image, upright if is_upright else across, is_upright, interpolation)
    kept = _pixels(image)[vertical.start - upright.start :, horizontal.start - across.start :]
    return kept[: vertical.length, : horizontal.length].copy()


def _pillow_pass(image: Image.Image, box: Box, is_upright: bool, interpolation: str) -> Image.Image:
    """Resample one direction of an image that is cropped to ``box.first`` and ``box.last`` there."""
    method = Image.Resampling[interpolation.upper()]
    length = box.stop - box.start
    if is_upright:
        return image.resize((image.width, length), method, (0, box.begin, image.width, box.end))
    return image.resize((length, image.height), method, (box.begin, 0, box.end, image.height))


def _nearest(pixels: Pixels, todo: Plan) -> Pixels:
    rows, columns = (_nearest_positions(axis) for axis in (todo.vertical, todo.horizontal))
    return pixels.take(rows, axis=0).take(columns, axis=1)


def _nearest_positions(axis: Axis) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Source positions of the kept pixels. Adds the scale up one by one as Pillow does: a product rounds otherwise."""
    steps = np.full(axis.stop, axis.scale)
    steps[0] /= 2
    positions = np.add.accumulate(steps)[axis.start :].astype(np.int64)
    return np.minimum(positions, axis.source - 1)


def _guard(pixels: int, limits: Limits) -> None:
    if pixels > limits.max_resized_pixels:
        raise ImageError(Reason.TOO_LARGE, f"resizing needs {pixels} pixels, the limit is {limits.max_resized_pixels}")


def _pad(kept: Pixels, todo: Plan, fill: tuple[int, int, int]) -> Pixels:
    top, left = todo.vertical.before, todo.horizontal.before
    padded = np.empty((*todo.output, kept.shape[2]), dtype=np.uint8)
    padded[:] = (*fill, 255)[: kept.shape[2]]
    padded[top : top + kept.shape[0], left : left + kept.shape[1]] = kept
    return padded
