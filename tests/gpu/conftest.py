"""Everything here needs a CUDA device and skips, saying so, where there is none."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark this folder's tests, and skip them without a device."""
    import torch

    missing = None if torch.cuda.is_available() else "torch sees no CUDA device"
    for item in items:
        if HERE in Path(item.path).parents:
            item.add_marker("gpu")
            if missing:
                item.add_marker(pytest.mark.skip(reason=missing))


@pytest.fixture(scope="session")
def photos(request: pytest.FixtureRequest) -> list[bytes]:
    """Encoded photographs: the shared collection where it is, else those in wheels, else something like them."""
    from tests.conftest import SHARED_DATA

    found = sorted((SHARED_DATA / "photos" / "clothing").rglob("*.jpg"))[::3]
    if not found and all(importlib.util.find_spec(name) for name in ("skimage", "sklearn")):
        found = request.getfixturevalue("wheel_photos")
    return [path.read_bytes() for path in found] or [painted(number) for number in range(48)]


def painted(number: int) -> bytes:
    """A JPEG with detail at every scale, as photographs have, for machines that bring none."""
    rng = np.random.default_rng(number)
    size = (400, 533) if number % 2 else (500, 375)
    pixels = np.zeros((size[1], size[0], 3))
    for cells in (2, 5, 12, 30, 80):
        patch = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        pixels += np.asarray(patch.resize(size, Image.Resampling.BICUBIC), np.float64) / cells**0.5
    low, high = pixels.min(), pixels.max()
    buffer = io.BytesIO()
    Image.fromarray(((pixels - low) / (high - low) * 255).astype(np.uint8)).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()
