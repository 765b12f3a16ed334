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
def photos(clothing: list[Path]) -> list[bytes]:
    """Encoded photographs."""
    return [path.read_bytes() for path in clothing]
