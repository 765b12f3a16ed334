"""Photographs and encoders the decoding tests share."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def photo(wheel_photos: list[Path]) -> Image.Image:
    """One colour photograph that is always there."""
    return Image.open(next(path for path in wheel_photos if path.stem == "astronaut")).convert("RGB")


@pytest.fixture(scope="session")
def encode() -> Callable[..., bytes]:
    """Encode a Pillow image: ``encode(image, "PNG", **options)``."""

    def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, format, **options)
        return buffer.getvalue()

    return encoded


@pytest.fixture(scope="session")
def shapes(photo: Image.Image) -> dict[str, Image.Image]:
    """The sizes that go wrong: to be upscaled, tall, wide, tiny, extreme, larger than one of Pillow's blocks."""
    rows = {"upscaled": (150, 100), "tall": (120, 900), "wide": (1200, 200), "tiny": (7, 5), "1x1": (1, 1)}
    rows |= {"3x8000": (3, 8000), "8000x3": (8000, 3), "1x30000": (1, 30000), "large": (2300, 1900)}
    images = {name: photo.resize(size, Image.Resampling.BICUBIC) for name, size in rows.items()}
    noise = np.random.default_rng(0).integers(0, 256, (301, 257, 3), dtype=np.uint8)
    return images | {"noise": Image.fromarray(noise)}
