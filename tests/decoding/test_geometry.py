"""Plans against the libraries whose arithmetic they restate."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
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
    ours = geometry.resized_size(spec("shortest", (size, size + 1), max_size=limit), height, width)
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
@example(50, 50, 30, 40)  # as much work either way
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


def errors(axis: geometry.Axis, first: int, start: int, stop: int) -> tuple[float, float]:
    """How far Pillow's single precision puts the two ends of a box from where they belong, in source pixels."""
    begin, end = start * axis.scale - first, stop * axis.scale - first
    single = np.float32(begin)
    length = np.float32(np.float32(end) - single)
    return abs(float(single) - begin), abs(float(single) + float(length) - end)


@given(st.integers(1, 40_000), st.integers(1, 40_000), st.integers(1, 600), st.sampled_from([1.0, 2.0, 3.0]))
@example(3, 187, 187, 2.0)  # in double precision, 187 times 3/187 is more than 3
def test_a_box_gives_the_kept_pixels(source: int, resized: int, output: int, support: float) -> None:
    axis = geometry.crop_or_pad(source, resized, output)
    box = geometry.box_of(axis, support)
    assert max(axis.start - 24, 0) <= box.start <= axis.start
    assert axis.stop <= box.stop <= min(axis.stop + 24, resized)
    assert box.first >= 0 and box.last <= source
    # The box lies where the pixels lie that it gives.
    assert box.begin + box.first == pytest.approx(box.start * axis.scale, abs=1e-9)
    assert box.end + box.first == pytest.approx(box.stop * axis.scale, abs=1e-9)
    assert 0 <= box.begin < box.end <= box.last - box.first
    # All the source pixels that take part are there, and one more, in which rounding may go astray.
    reach = support * max(axis.scale, 1) + 1
    assert box.first == 0 or box.begin >= reach - 1e-9
    assert box.last == source or box.last - box.first - box.end >= reach - 1e-9
    worst = max(errors(axis, box.first, box.start, box.stop))
    if worst < geometry._EXACT:  # and no others
        assert box.begin < reach + 1 and box.last - box.first - box.end < reach + 1
    else:  # no other bounds are better
        starts = range(max(axis.start - 24, 0), axis.start + 1)
        stops = range(axis.stop, min(axis.stop + 24, resized) + 1)
        assert worst == min(max(errors(axis, box.first, start, stop)) for start in starts for stop in stops)


@pytest.mark.parametrize("support", [1.0, 2.0, 3.0])
@pytest.mark.parametrize(("before", "behind"), [(0, 0), (24, 1), (23, 24), (1, 23), (25, 3), (3, 25)])
def test_bounds_that_single_precision_holds_are_found_within_the_slack(
    before: int, behind: int, support: float
) -> None:
    """At 50 source pixels per 49, every 49th bound is a whole number, and no other is exact."""
    start, stop = 490 + before, 980 - behind
    axis = geometry.Axis(source=50 * 40, resized=49 * 40, start=start, length=stop - start, before=0, output=0)
    box = geometry.box_of(axis, support)
    found = box.start == start - before and box.stop == stop + behind
    assert found == (before <= 24 and behind <= 24)
    if found:
        reach = support * 50 / 49 + 1
        assert (box.first, box.last) == (math.floor(500 - reach), math.ceil(1000 + reach))
        assert (box.first + box.begin, box.first + box.end) == (500, 1000)


def test_a_box_ends_where_the_source_does() -> None:
    """143 times 385/143 is a little more than 385, in double precision."""
    axis = geometry.Axis(source=385, resized=143, start=71, length=67, before=0, output=67)
    box = geometry.box_of(axis, 2.0)
    assert (box.first, box.last, box.begin, box.end, box.start, box.stop) == (168, 385, 7.0, 217.0, 65, 143)


def test_a_sliver_is_planned_in_full_but_needs_little() -> None:
    todo = geometry.plan(spec("shortest", (256, 256), (224, 224)), 8000, 3)
    assert todo.resized == (682_666, 256)
    box = geometry.box_of(todo.vertical, 2.0)
    assert box.last - box.first < 16
    assert todo.output == (224, 224)


def test_what_is_not_resized_and_what_is_squashed() -> None:
    assert geometry.resized_size(spec("none", (5, 6)), 30, 20) == (30, 20)
    assert geometry.resized_size(spec("squash", (5, 6)), 30, 20) == (5, 6)


def test_a_crop_has_a_height_and_a_width() -> None:
    todo = geometry.plan(spec("none", (1, 1), crop=(5, 9)), 20, 40)
    assert todo.output == (5, 9)
    assert (todo.vertical.length, todo.horizontal.length) == (5, 9)
    assert todo.vertical.unchanged is True and todo.horizontal.unchanged is True
    assert geometry.crop_or_pad(20, 21, 5).unchanged is False


def test_no_side_vanishes() -> None:
    assert geometry.resized_size(spec("contain", (224, 224)), 1, 30_000) == (1, 224)


@pytest.mark.parametrize("major", [12, 13])
def test_older_pillows_order(monkeypatch: pytest.MonkeyPatch, major: int) -> None:
    monkeypatch.setattr(geometry, "_pillow_major", lambda: major)
    assert geometry.vertical_first(400, 100, 50, 50) is (major == 13)
    assert geometry.vertical_first(10_001, 100, 50, 50) is True
    assert geometry.vertical_first(10_000, 100, 50, 50) is (major == 13)
    assert geometry.vertical_first(100, 400, 50, 50) is False
    assert geometry.vertical_first(20_000, 100, 20_000, 300) is False, "columns that stay as they are are not resampled"
