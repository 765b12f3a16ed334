"""One in-process Dask worker a test module; what datasets start by themselves is tested in tests/cli."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from curator_embed import get_client
from tests.shards import write_dataset


@pytest.fixture(scope="module", autouse=True)
def client() -> Iterator[Any]:
    """The default client of the module's tests."""
    with get_client() as started:
        yield started
        started.cluster.close()


@pytest.fixture
def source(tmp_path: Path, wheel_photos: list[Path]) -> Path:
    """Three shards of ten photographs, eleven rows each: one download failed, two images are bad."""
    bad = {(1, 2): b"", (2, 0): b"<html></html>"}
    return write_dataset(tmp_path / "source", wheel_photos, bad=bad)
