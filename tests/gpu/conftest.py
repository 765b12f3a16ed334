"""Everything here needs a CUDA device and skips, saying so, where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

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
    """Encoded photographs: the shared collection where it is, else those in wheels."""
    from tests.conftest import SHARED_DATA

    found = sorted((SHARED_DATA / "photos" / "clothing").rglob("*.jpg"))[::3]
    return [path.read_bytes() for path in found or request.getfixturevalue("wheel_photos")]
