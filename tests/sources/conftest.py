"""Fixtures of the tests of sources."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from written_tars import Members, tar_bytes


@pytest.fixture
def make_tar(tmp_path: Path) -> Callable[..., str]:
    """Write a tar into the test's folder and return its path."""

    def make(members: Members, name: str = "00000.tar", fmt: int = tarfile.PAX_FORMAT) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tar_bytes(members, fmt))
        return str(path)

    return make
