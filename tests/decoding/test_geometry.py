"""Plans against the libraries whose arithmetic they restate."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data.transforms import ResizeKeepRatio
from torchvision.transforms import functional

from curator_embed.decoding import geometry
from curator_embed.decoding.spec import PreprocessSpec

ZERO, ONE = (0.0,) * 3, (1.0,) * 3
sides = st.integers(1, 9000)


def spec(resize: Any, size: tuple[int, int], crop: tuple[int, int] = (7, 7), **more: Any) -> PreprocessSpec:
    return PreprocessSpec(resize, size, crop, "bicubic", ZERO, ONE, **more)


@given(sides, sides, st.integers(1, 1100), st.none() | st.integers(1, 500))
def test_shortest_side_is_torchvisions(height: int, width: int, size: int, beyond: int | None) -> None:
    limit = None if beyond is None else size + beyond
    theirs = functional._compute_resized_output_size((height, width), [size], limit)
    ours = geometry.resized_size(spec("shortest", (size, size), max_size=limit), height, width)
    assert ours == tuple(max(side, 1) for side in theirs)


@given(sides, sides, st.integers(1, 700), st.integers(1, 700), st.booleans())
def test_keep_ratio_is_timms(height: int, width: int, target_height: int, target_width: int, longest: bool) -> None:
    meta = torch.empty(3, height, width, device="meta")
    theirs = ResizeKeepRatio.get_params(meta, (target_height, target_width), float(longest))
    kind = "contain" if longest else "cover"
    ours = geometry.resized_size(spec(kind, (target_height, target_width)), height, width)
    assert ours == tuple(max(side, 1) for side in theirs)


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 60), st.integers(1, 60))
def test_crop_and_pad_are_torchvisions(height: int, width: int, crop_height: int, crop_width: int) -> None:
    numbered = torch.arange(1, height * width + 1).view(1, height, width)
    theirs = functional.center_crop(numbered, [crop_height, crop_width])[0]
    vertical = geometry.crop_or_pad(height, height, crop_height)
    horizontal = geometry.crop_or_pad(width, width, crop_width)
    ours = torch.zeros_like(theirs)
    kept = numbered[0, vertical.start : vertical.stop, horizontal.start : horizontal.stop]
    rows = slice(vertical.before, vertical.before + vertical.length)
    ours[rows, horizontal.before : horizontal.before + horizontal.length] = kept
    assert torch.equal(ours, theirs)


@settings(deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 60), st.integers(1, 60))
def test_the_order_of_passes_is_pillows(height: int, width: int, new_height: int, new_width: int) -> None:
    noise = np.random.default_rng(height * 91 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image, method = Image.fromarray(noise), Image.Resampling.BICUBIC
    if geometry.vertical_first(height, width, new_height, new_width):
        halfway = image.resize((width, new_height), method)
    else:
        halfway = image.resize((new_width, height), method)
    both = image.resize((new_width, new_height), method)
    assert halfway.resize((new_width, new_height), method).tobytes() == both.tobytes()


@given(st.integers(1, 40_000), st.integers(1, 40_000), st.integers(1, 600), st.sampled_from([1.0, 2.0, 3.0]))
def test_a_box_gives_the_kept_pixels(source: int, resized: int, output: int, support: float) -> None:
    axis = geometry.crop_or_pad(source, resized, output)
    box = geometry.box_of(axis, support)
    assert 0 <= box.start <= axis.start and axis.stop <= box.stop <= resized
    assert box.first >= 0 and box.last <= source
    assert 0 <= box.begin < box.end <= box.last - box.first
    # The box lies where the kept pixels lie, to less than single precision gives by itself.
    assert abs(float(np.float32(box.begin)) + box.first - box.start * axis.scale) < 2e-6 * max(axis.scale, 1)
    # All the source pixels of the first and the last kept pixel are there.
    reach = support * max(axis.scale, 1)
    assert box.first <= max((axis.start + 0.5) * axis.scale - reach, 0)
    assert box.last >= min((axis.stop - 0.5) * axis.scale + reach, source)


def test_a_sliver_is_planned_in_full_but_needs_little() -> None:
    todo = geometry.plan(spec("shortest", (256, 256), (224, 224)), 8000, 3)
    assert todo.resized == (682_666, 256)
    box = geometry.box_of(todo.vertical, 2.0)
    assert box.last - box.first < 16
    assert todo.output == (224, 224)


def test_no_side_vanishes() -> None:
    assert geometry.resized_size(spec("contain", (224, 224)), 1, 30_000) == (1, 224)


@pytest.mark.parametrize("major", [12, 13])
def test_older_pillows_order(monkeypatch: pytest.MonkeyPatch, major: int) -> None:
    monkeypatch.setattr(geometry, "_pillow_major", lambda: major)
    assert geometry.vertical_first(400, 100, 50, 50) is (major == 13)
    assert geometry.vertical_first(10_001, 100, 50, 50)
    assert not geometry.vertical_first(100, 400, 50, 50)
