"""The CPU engine: an RGB image -> the model's input, uint8 until the last moment.

Pillow's resampling is the reference; torch's uint8 kernel computes the same several times faster.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from curator_embed.decoding.geometry import Axis, Plan, plan
from curator_embed.decoding.pillow import DEFAULT_LIMITS, Limits
from curator_embed.decoding.spec import OpaqueTransform, PreprocessSpec, Spec
from curator_embed.errors import ImageError, Reason

_KERNELS = {
    "bilinear": torch.ops.aten._upsample_bilinear2d_aa,
    "bicubic": torch.ops.aten._upsample_bicubic2d_aa,
}
_SUPPORT = {"box": 0.5, "bilinear": 1.0, "hamming": 1.0, "bicubic": 2.0, "lanczos": 3.0}
_WASTE = 4
"""How many times the pixels of the crop torch may compute before Pillow, slower but able to start anywhere, wins."""


def prepare(rgb: Image.Image, spec: Spec, limits: Limits = DEFAULT_LIMITS) -> torch.Tensor:
    """Resize and crop or pad one image.

    Runs on the calling thread alone, whatever ``torch.set_num_threads`` says (the kernel for uint8 images is not
    parallel), and releases the GIL while it computes.

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
        pixels, _owner = _pixels(rgb)
        kept = pixels[0, :, vertical.start : vertical.stop, horizontal.start : horizontal.stop]
        kept = kept.clone(memory_format=torch.preserve_format)
    elif spec.interpolation == "nearest":
        _guard(max(vertical.stop, horizontal.stop), limits)
        kept = _nearest(rgb, todo)
    elif spec.interpolation in _KERNELS and _reach(vertical) * _reach(horizontal) <= (
        _WASTE * vertical.length * horizontal.length
    ):
        _guard(_intermediate(todo, vertical.source, horizontal.source), limits)
        kept = _resample(rgb, todo, _KERNELS[spec.interpolation])
    else:
        kept = _resample_anywhere(rgb, todo, spec.interpolation, limits)
    return kept[:3] if kept.shape[1:] == todo.output else _pad(kept, todo, spec.fill)


def normalise(
    images: Sequence[torch.Tensor],
    spec: Spec,
    *,
    channels_last: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Stack prepared images into the float batch a model takes: divided by 255, minus mean, divided by std.

    The arithmetic is that of torchvision's ``ToTensor`` and ``Normalize``, step by step, so that equal pixels give
    equal bits.

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
    mean, std = torch.tensor(spec.mean), torch.tensor(spec.std)
    if out.is_contiguous():
        mean, std = mean.view(3, 1, 1), std.view(3, 1, 1)
        for row, image in zip(out, images, strict=True):
            row.copy_(image).div_(255).sub_(mean).div_(std)
        return out
    # Channels last: rows of W * 3 values, with mean and std repeated alongside, keep the arithmetic vectorised.
    height, width = shape[2:]
    mean, std = mean.repeat(width), std.repeat(width)
    for row, image in zip(out, images, strict=True):
        row.copy_(image)
        row.permute(1, 2, 0).view(height, width * 3).div_(255).sub_(mean).div_(std)
    return out


def _pixels(rgb: Image.Image) -> tuple[torch.Tensor, Any]:
    """View Pillow's own memory as uint8 (1, 4, H, W), channels last; valid while the second value lives.

    Pillow keeps RGB as four bytes a pixel, which is also what torch's kernel likes best: nothing is copied. Images
    that Pillow keeps in more than one block (above 16 MB) are copied, as (1, 3, H, W).
    """
    try:
        exported = pa.array(rgb)
    except ValueError:
        copied = torch.from_numpy(np.array(rgb))
        return copied.permute(2, 0, 1)[None], copied
    size = rgb.height * rgb.width * 4
    # torch warns about read-only memory, which Arrow's is; only ever read here.
    memory = (ctypes.c_uint8 * size).from_address(exported.buffers()[-1].address)
    pixels = torch.frombuffer(memory, dtype=torch.uint8).view(1, rgb.height, rgb.width, 4)
    return pixels.permute(0, 3, 1, 2), exported


def _reach(axis: Axis) -> int:
    """How many resized pixels torch must compute: it can stop early but not start late.

    A pass whose output is as long as its input is skipped by torch, whatever the scale: then the full length.
    """
    return axis.resized if axis.stop == axis.source else axis.stop


def _intermediate(todo: Plan, rows: int, columns: int) -> int:
    """Pixels after the first of the two passes, over this many source rows and columns."""
    return _reach(todo.vertical) * columns if todo.vertical_first else rows * _reach(todo.horizontal)


def _resample(rgb: Image.Image, todo: Plan, kernel: Any) -> torch.Tensor:
    pixels, _owner = _pixels(rgb)
    vertical, horizontal = todo.vertical, todo.horizontal
    if vertical.unchanged:
        pixels = pixels[:, :, : _reach(vertical)]
    if horizontal.unchanged:
        pixels = pixels[..., : _reach(horizontal)]
    if todo.vertical_first:
        size = [_reach(vertical), pixels.shape[3]]
        pixels = kernel(pixels, size, False, vertical.resized / vertical.source, None)[:, :, vertical.start :]
        size = [pixels.shape[2], _reach(horizontal)]
        pixels = kernel(pixels, size, False, None, horizontal.resized / horizontal.source)
        return pixels[0, :, : vertical.length, horizontal.start : horizontal.stop]
    # One call does both: horizontally first, as Pillow.
    scales = vertical.resized / vertical.source, horizontal.resized / horizontal.source
    pixels = kernel(pixels, [_reach(vertical), _reach(horizontal)], False, *scales)
    return pixels[0, :, vertical.start : vertical.stop, horizontal.start : horizontal.stop]


def _resample_anywhere(rgb: Image.Image, todo: Plan, interpolation: str, limits: Limits) -> torch.Tensor:
    """Resample only what the crop needs, with Pillow: for extreme shapes and for filters torch lacks."""
    vertical, horizontal = todo.vertical, todo.horizontal
    (top, bottom), (left, right) = (axis.window(_SUPPORT[interpolation]) for axis in (vertical, horizontal))
    rows, columns = bottom - top, right - left
    _guard(vertical.length * columns if todo.vertical_first else rows * horizontal.length, limits)
    if (rows, columns) != (rgb.height, rgb.width):
        # Pillow holds a box in single precision: small coordinates keep it exact far out in a long image.
        rgb = rgb.crop((left, top, right, bottom))
    upper, lower = vertical.start * vertical.scale - top, vertical.stop * vertical.scale - top
    west, east = horizontal.start * horizontal.scale - left, horizontal.stop * horizontal.scale - left
    method = Image.Resampling[interpolation.upper()]
    # One pass at a time, because Pillow chooses the order by the size of what it is given.
    for is_vertical in (todo.vertical_first, not todo.vertical_first):
        if is_vertical:
            rgb = rgb.resize((rgb.width, vertical.length), method, (0, upper, rgb.width, min(lower, rgb.height)))
        else:
            rgb = rgb.resize((horizontal.length, rgb.height), method, (west, 0, min(east, rgb.width), rgb.height))
    pixels, _owner = _pixels(rgb)
    return pixels[0].clone(memory_format=torch.preserve_format)


def _nearest(rgb: Image.Image, todo: Plan) -> torch.Tensor:
    pixels, _owner = _pixels(rgb)
    rows, columns = (_nearest_positions(axis) for axis in (todo.vertical, todo.horizontal))
    return pixels[0].permute(1, 2, 0)[rows][:, columns].permute(2, 0, 1)


def _nearest_positions(axis: Axis) -> torch.Tensor:
    """Source positions of the kept pixels. Adds the scale up one by one as Pillow does: a product rounds otherwise."""
    steps = np.full(axis.stop, axis.scale)
    steps[0] /= 2
    positions = np.add.accumulate(steps)[axis.start :].astype(np.int64)
    return torch.from_numpy(np.minimum(positions, axis.source - 1))


def _guard(pixels: int, limits: Limits) -> None:
    if pixels > limits.max_resized_pixels:
        raise ImageError(Reason.TOO_LARGE, f"resizing needs {pixels} pixels, the limit is {limits.max_resized_pixels}")


def _pad(kept: torch.Tensor, todo: Plan, fill: tuple[int, int, int]) -> torch.Tensor:
    vertical, horizontal = todo.vertical, todo.horizontal
    padded = torch.empty((*todo.output, 3), dtype=torch.uint8)
    padded[:] = torch.tensor(fill, dtype=torch.uint8)
    result = padded.permute(2, 0, 1)
    rows = slice(vertical.before, vertical.before + vertical.length)
    columns = slice(horizontal.before, horizontal.before + horizontal.length)
    result[:, rows, columns] = kept[:3]
    return result


__all__ = ["PreprocessSpec", "normalise", "prepare"]
