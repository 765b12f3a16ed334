"""Fixtures shared by all tests: where the real photographs are."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.written_tars import Members, tar_bytes

REPO = Path(__file__).resolve().parents[1]
SHARED_DATA = REPO.parent / "shared" / "data"


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Let tests run where pytest-timeout is absent, as on a bare GPU machine: unknown settings are errors."""
    if not pluginmanager.hasplugin("timeout"):
        parser.addini("timeout", "seconds a test may take; pytest-timeout, which is not here, would see to it")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real material that lies beside a developer's checkout; skips where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"real material not present: {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(scope="session")
def wheel_photos() -> list[Path]:
    """Photographs that scikit-image and scikit-learn carry in their wheels, sorted by name."""
    skimage = pytest.importorskip("skimage")
    sklearn = pytest.importorskip("sklearn")
    names = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "retina.jpg")
    found = [Path(skimage.__file__).parent / "data" / name for name in names]
    found += sorted((Path(sklearn.__file__).parent / "datasets" / "images").glob("*.jpg"))
    return sorted((path for path in found if path.is_file()), key=lambda path: path.name)


@pytest.fixture
def make_tar(tmp_path: Path) -> Callable[..., str]:
    """Write a tar into the test's folder and return its path."""

    def make(members: Members, name: str = "00000.tar", fmt: int = tarfile.PAX_FORMAT) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tar_bytes(members, fmt))
        return str(path)

    return make
