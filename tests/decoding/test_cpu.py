"""The CPU engine on shapes that go wrong, and what it promises besides pixels."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from curator_embed.decoding.cpu import normalise, prepare
from curator_embed.decoding.geometry import resized_size
from curator_embed.decoding.pillow import Limits
from curator_embed.decoding.reference import transform_of
from curator_embed.decoding.spec import PreprocessSpec, openai_spec, spec_from_timm
from curator_embed.errors import ImageError, Reason

ZERO, ONE = (0.0,) * 3, (1.0,) * 3
ALLOWED = {"nearest": 0, "lanczos": 1, "bilinear": 1, "bicubic": 2}
FULL_RESIZE_PIXELS = 50_000_000
"""The reference resizes in full: beyond this it is not asked."""


def grey_levels(image: Image.Image, spec: PreprocessSpec) -> torch.Tensor:
    ours, theirs = prepare(image, spec).int(), transform_of(spec)(image)
    theirs = (theirs * torch.tensor(spec.std).view(3, 1, 1) + torch.tensor(spec.mean).view(3, 1, 1)) * 255
    return (ours - theirs.round()).abs()


SPECS = [
    openai_spec(224),
    PreprocessSpec("shortest", (256, 256), (224, 224), "bilinear", ZERO, ONE),
    PreprocessSpec("shortest", (40, 40), (64, 48), "bicubic", ZERO, ONE),
    PreprocessSpec("squash", (96, 160), (96, 160), "bicubic", ZERO, ONE),
    PreprocessSpec("contain", (180, 180), (180, 180), "bicubic", ZERO, ONE, fill=(12, 100, 200)),
    PreprocessSpec("contain", (200, 90), (180, 80), "bilinear", ZERO, ONE),
    PreprocessSpec("cover", (120, 200), (110, 190), "lanczos", ZERO, ONE),
    PreprocessSpec("shortest", (70, 70), (64, 64), "nearest", ZERO, ONE),
    PreprocessSpec("none", (90, 90), (90, 90), "bicubic", ZERO, ONE),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.resize}-{spec.interpolation}-{spec.crop[0]}")
def test_every_shape_is_within_the_promise(spec: PreprocessSpec, shapes: dict[str, Image.Image]) -> None:
    for name, image in shapes.items():
        height, width = resized_size(spec, image.height, image.width)
        refused = spec.resize in ("contain", "cover") and min(height, width) == 1  # as a side of 0
        if refused or height * width > FULL_RESIZE_PIXELS:
            assert prepare(image, spec).shape == (3, *spec.crop)
            continue
        assert grey_levels(image, spec).max() <= ALLOWED[spec.interpolation], name


def test_a_sliver_equals_its_full_resize() -> None:
    """3x8000, as a part of the full resize that is small enough to compute."""
    rows = np.random.default_rng(1).integers(0, 256, (8000, 3, 3), dtype=np.uint8)
    image = Image.fromarray(rows)
    for interpolation in ("bicubic", "bilinear", "nearest"):
        spec = PreprocessSpec("shortest", (60, 60), (56, 56), interpolation, ZERO, ONE)  # type: ignore[arg-type]
        assert grey_levels(image, spec).max() <= ALLOWED[interpolation]


sides = st.integers(1, 140)


@settings(deadline=None, max_examples=300)
@given(
    st.data(),
    st.sampled_from(["shortest", "squash", "cover", "contain", "none"]),
    st.sampled_from(sorted(ALLOWED)),
    st.tuples(sides, sides),
    st.tuples(sides, sides),
    st.tuples(sides, sides),
)
def test_any_geometry_is_within_the_promise(
    data: st.DataObject, resize: Any, interpolation: Any, size: Any, crop: Any, image_size: Any
) -> None:
    if data.draw(st.booleans()):  # lengths that coincide with the image's are where passes get skipped
        crop = (min(image_size[1], 140), crop[1])
    spec = PreprocessSpec(resize, size, crop, interpolation, ZERO, ONE, fill=(1, 2, 3))
    seed = data.draw(st.integers(0, 9))
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize(image_size, Image.Resampling.BICUBIC)
    try:
        difference = grey_levels(image, spec)
    except ValueError as error:  # a side of 0, which the reference refuses
        assert "must be > 0" in str(error)
        assert prepare(image, spec).shape == (3, *crop)
    else:
        assert difference.max() <= ALLOWED[interpolation]


def test_a_bilinear_value_that_both_passes_would_round_up() -> None:
    coarse = np.random.default_rng(3).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((107, 119), Image.Resampling.BICUBIC)
    spec = PreprocessSpec("squash", (69, 62), (69, 61), "bilinear", ZERO, ONE)
    assert grey_levels(image, spec).max() == 1


def test_bilinear_white_noise_whose_crop_is_deep() -> None:
    spec = PreprocessSpec("squash", (214, 214), (131, 131), "bilinear", ZERO, ONE)
    for seed in range(40):
        noise = np.random.default_rng(seed).integers(0, 256, (224, 224, 3), dtype=np.uint8)
        assert grey_levels(Image.fromarray(noise), spec).max() <= 1


def test_normalising_is_torchvisions_but_for_the_last_bit(photo: Image.Image) -> None:
    spec = spec_from_timm("vit_base_patch32_clip_224.openai")
    exact = PreprocessSpec("none", spec.crop, spec.crop, "bicubic", spec.mean, spec.std)
    sizes = ((224, 224), (300, 260), (224, 500))
    images = [prepare(photo.resize(size), exact) for size in sizes]
    images.append(prepare(photo, spec))  # a view into a larger buffer
    expected = torch.stack([transform_of(exact)(photo.resize(size)) for size in sizes])

    def check(result: torch.Tensor) -> None:
        assert result.dtype == torch.float32 and result.shape == (4, 3, 224, 224)
        assert torch.allclose(result[:3], expected, rtol=0, atol=1e-6)
        levels = (result[3] * torch.tensor(spec.std).view(3, 1, 1) + torch.tensor(spec.mean).view(3, 1, 1)) * 255
        assert torch.equal(levels.round().byte(), images[3])

    check(normalise(images, exact))
    last = normalise(images, exact, channels_last=True)
    check(last)
    assert last.is_contiguous(memory_format=torch.channels_last)
    for layout in (torch.contiguous_format, torch.channels_last):
        out = torch.full((6, 3, 224, 224), 7.0).contiguous(memory_format=layout)
        result = normalise(images, exact, out=out)
        check(result)
        assert result.data_ptr() == out.data_ptr() and (out[4:] == 7).all()


def test_the_result_owns_its_memory_and_the_image_is_untouched(photo: Image.Image) -> None:
    for spec in SPECS:
        image = photo.resize((90, 90))
        before = image.tobytes()
        result = prepare(image, spec)
        kept = result.clone()
        result += 0  # writable
        assert image.tobytes() == before
        del image
        _ = [Image.new("RGB", (90, 90), "red") for _ in range(20)]  # would reuse freed memory
        assert torch.equal(result, kept)
        assert result.dtype == torch.uint8 and result.shape == (3, *spec.crop)


def test_the_limit_covers_what_is_resized(photo: Image.Image) -> None:
    for interpolation in ("bicubic", "lanczos", "nearest"):
        spec = PreprocessSpec("shortest", (256, 256), (224, 224), interpolation, ZERO, ONE)  # type: ignore[arg-type]
        with pytest.raises(ImageError) as caught:
            prepare(photo, spec, Limits(max_resized_pixels=100))
        assert caught.value.reason is Reason.TOO_LARGE
    sliver = photo.resize((3, 8000))
    prepare(sliver, openai_spec(224), Limits(max_resized_pixels=100_000))  # not its full resize of 100 million


def test_it_stays_on_its_thread_and_gives_the_same_from_many(shapes: dict[str, Image.Image]) -> None:
    spec = openai_spec(224)
    images = [shapes["noise"], shapes["tall"], shapes["wide"], shapes["upscaled"]]
    expected = [prepare(image, spec).numpy().tobytes() for image in images]
    wrong: list[int] = []
    threads: list[int] = []

    def work() -> None:
        for _ in range(10):
            results = [prepare(image, spec).numpy().tobytes() for image in images]  # comparing in torch uses threads
            wrong.extend(i for i, result in enumerate(results) if result != expected[i])
        threads.append(psutil.Process().num_threads())

    def idle() -> None:
        time.sleep(0.2)
        threads.append(psutil.Process().num_threads())

    def peak(target: Any) -> int:
        workers = [threading.Thread(target=target) for _ in range(3)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return max(threads)

    without = peak(idle)
    threads.clear()
    assert peak(work) <= without
    assert not wrong
