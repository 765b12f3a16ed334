"""Photographs and oddly shaped images, decoded."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from curator_embed import get_client
from curator_embed.decoding.image import DecodedImage
from curator_embed.decoding.pillow import decode
from curator_embed.errors import ImageError


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    """One in-process Dask worker for a module's runs."""
    with get_client() as started:
        yield started
        started.cluster.close()


@pytest.fixture(scope="session")
def photos(wheel_photos: list[Path]) -> dict[str, DecodedImage]:
    """The wheels' photographs by file name."""
    return {path.name: decode(path.read_bytes()) for path in wheel_photos}


@pytest.fixture(scope="session")
def shapes(photos: dict[str, DecodedImage]) -> dict[str, DecodedImage]:
    """What photographs are not: tiny, thin, flat, grey, transparent, in other modes."""
    cat = photos["chelsea.png"].rgb.resize((128, 96))
    mask = Image.linear_gradient("L").resize(cat.size)
    found = {
        "1x1": Image.new("RGB", (1, 1), (200, 20, 90)),
        "1x1 black": Image.new("L", (1, 1)),
        "2x3": cat.resize((2, 3)),
        "thin": cat.resize((3, 2000)),
        "flat": cat.resize((3000, 2)),
        "white": Image.new("RGB", (40, 30), "white"),
        "grey": cat.convert("L"),
        "one bit": cat.convert("1"),
        "palette": cat.quantize(16),
        "cmyk": cat.convert("CMYK"),
        "alpha": Image.merge("RGBA", (*cat.split(), mask)),
        "grey alpha": Image.merge("LA", (cat.convert("L"), mask)),
        "16 bit": Image.fromarray(np.asarray(cat.convert("L")).astype(np.uint16) * 257),
        "hues": Image.merge("HSV", (mask, mask.rotate(180), mask.rotate(90))).convert("RGB"),
    }
    decoded = {}
    for name, image in found.items():
        buffer = io.BytesIO()
        image.save(buffer, "TIFF" if image.mode == "CMYK" else "PNG")
        decoded[name] = decode(buffer.getvalue())
        assert decoded[name].original.mode == image.mode
    return decoded


@pytest.fixture(scope="session")
def many_photos(clothing: list[Path], format_files: list[Path]) -> dict[str, DecodedImage]:
    """Clothing and files of every format by name; those that do not decode are left out."""
    found = {}
    for path in clothing + format_files:
        try:
            image = decode(path.read_bytes())
            image.rgb  # noqa: B018  Pillow opens some modes that it cannot convert
        except ImageError:
            continue
        found[path.name] = image
    assert len(found) == len(clothing) + len(format_files) - 2
    return found
