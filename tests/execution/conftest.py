"""A cluster whose workers are threads of this process, and shards for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from distributed import Client, LocalCluster

from tests.shards import write_dataset


@pytest.fixture
def nobody() -> Iterator[LocalCluster]:
    """A cluster without workers, whose client is the default one."""
    options = {"processes": False, "threads_per_worker": 2, "dashboard_address": ":0"}
    with LocalCluster(n_workers=0, **options) as cluster, Client(cluster):
        yield cluster


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, wheel_photos: list[Path]) -> Path:
    return write_dataset(tmp_path_factory.mktemp("source") / "in", wheel_photos, shards=12, samples=4)
