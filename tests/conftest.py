"""Fixtures shared by all tests: the real photographs, from `tests/data` and from packages that the tests need."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.written_tars import Members, tar_bytes

REPO = Path(__file__).resolve().parents[1]
DATA = REPO / "tests" / "data"


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Let tests run where pytest-timeout is absent, as on a bare GPU machine: unknown settings are errors."""
    if not pluginmanager.hasplugin("timeout"):
        parser.addini("timeout", "seconds a test may take; pytest-timeout, which is not here, would see to it")


@pytest.fixture(scope="session")
def clothing() -> list[Path]:
    """40 photographs, 10 classes of 4; a photograph's folder is its class."""
    return sorted((DATA / "clothing").glob("*/*.jpg"))


@pytest.fixture(scope="session")
def format_files() -> list[Path]:
    """Files of many formats, four of them with an extension that lies and two that no decoder of ours reads."""
    return sorted(path for path in (DATA / "formats").rglob("*") if path.is_file())


@pytest.fixture(scope="session")
def clip_tars() -> list[Path]:
    """Four webdataset tars with 11 samples; some keys, and their photographs, lie in several."""
    return sorted((DATA / "clip_retrieval").glob("*.tar"))


@pytest.fixture(scope="session")
def clip_images(clip_tars: list[Path]) -> dict[str, bytes]:
    """Key -> JPEG of the tars' seven photographs, read with Python's own tarfile."""
    images = {}
    for path in clip_tars:
        with tarfile.open(path) as archive:
            for member in archive:
                file = archive.extractfile(member)
                assert file is not None
                images[Path(member.name).stem] = file.read()
    assert len(images) == 7
    return images


@pytest.fixture(scope="session")
def openai_tensors() -> dict[str, np.ndarray]:
    """Key -> float32 (3, 224, 224): what OpenAI's own preprocessing makes of each of ``clip_images``."""
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    tensors = {}
    for path in sorted((DATA / "clip_retrieval" / "tensors").glob("*.webp")):
        levels = np.asarray(Image.open(path), np.float64) / 255
        tensors[path.stem] = ((levels - mean) / std).transpose(2, 0, 1).astype(np.float32)
    return tensors


@pytest.fixture(scope="session")
def wheel_photos() -> list[Path]:
    """Photographs that scikit-image and scikit-learn carry in their wheels, sorted by name."""
    import skimage
    import sklearn

    names = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "retina.jpg")
    found = [Path(skimage.__file__).parent / "data" / name for name in names]
    found += sorted((Path(sklearn.__file__).parent / "datasets" / "images").glob("*.jpg"))
    return sorted(found, key=lambda path: path.name)


@pytest.fixture
def make_tar(tmp_path: Path) -> Callable[..., str]:
    """Write a tar into the test's folder and return its path."""

    def make(members: Members, name: str = "00000.tar", fmt: int = tarfile.PAX_FORMAT) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tar_bytes(members, fmt))
        return str(path)

    return make
