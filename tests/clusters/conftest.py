"""The dataset that tests of real clusters embed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.clusters.losing import BAD, SAMPLES, SHARDS
from tests.shards import write_dataset


@pytest.fixture
def source(tmp_path: Path, wheel_photos: list[Path]) -> Path:
    """Twelve shards of seven rows: one image is no image, one row of each has none."""
    return write_dataset(tmp_path / "in", wheel_photos, shards=SHARDS, samples=SAMPLES, bad={BAD: b"<html>404</html>"})
