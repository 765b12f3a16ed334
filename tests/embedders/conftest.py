"""Real weights and small images for the embedders' tests."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from curator_embed.embedders import efficientnet_lite0_weights


@pytest.fixture(scope="session")
def lite0(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """EfficientNet-Lite0's ImageNet weights as timm names them."""
    return efficientnet_lite0_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="session")
def pictures() -> list[Image.Image]:
    """20 different pictures: more than one batch on a CPU."""
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, (6 + n, 9, 3), np.uint8)).resize((70 + n, 60), Image.Resampling.BICUBIC)
        for n in range(20)
    ]


@pytest.fixture(scope="session")
def encoded(pictures: list[Image.Image]) -> list[bytes]:
    """The pictures as PNG files."""
    files = []
    for picture in pictures:
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        files.append(buffer.getvalue())
    return files
