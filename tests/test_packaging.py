"""The lock files, and what the documentation says about the code."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from tests.conftest import REPO

LOCKS = sorted((REPO / "requirements").glob("*.lock"))


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_locks_pin_every_package_with_hashes_and_name_no_index(lock: Path) -> None:
    text = lock.read_text()
    assert "://" not in text and "--index" not in text and "--find-links" not in text
    entries = [entry for entry in re.split(r"\n(?=[a-z0-9])", text) if not entry.startswith("#")]
    assert entries
    for entry in entries:
        first = entry.splitlines()[0]
        assert re.match(r"[a-z0-9._-]+(\[[a-z0-9,_-]+\])?==[^ ]+ ", first), first
        assert "--hash=sha256:" in entry, first


def test_the_lock_holds_what_a_plain_install_and_the_tests_need_and_no_cuda_data_frames() -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    locked = set(re.findall(r"^([a-z0-9._-]+)(?:\[.*\])?==", (REPO / "requirements/dev.lock").read_text(), re.M))
    extras = project["optional-dependencies"]
    asked = project["dependencies"] + [
        name for extra in extras if extra not in ("cuda12", "cuda13", "gcs", "azure") for name in extras[extra]
    ]
    names = {re.split(r"[<>=\[ ]", name)[0].lower().replace("_", "-") for name in asked}
    assert names <= locked, names - locked
    assert not {name for name in locked if name.startswith(("cudf", "dask-cu", "rmm", "cupy"))}


def test_versions_agree() -> None:
    from curator_embed import __version__

    assert tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["version"] == __version__


def test_documentation_builds_without_warnings_and_asks_no_other_host(tmp_path: Path) -> None:
    from mkdocs import config
    from mkdocs.commands.build import build

    with (REPO / "mkdocs.yml").open("rb") as file:
        build(config.load_config(file, site_dir=str(tmp_path / "site"), strict=True))
    pages = list((tmp_path / "site").rglob("*.html"))
    loaded = re.compile(r'<(?:script|img|iframe|link rel="stylesheet")[^>]+(?:src|href)="(?:https?:)?//')
    assert not [page for page in pages if loaded.search(page.read_text(encoding="utf-8"))]
    command = (tmp_path / "site" / "command" / "index.html").read_text(encoding="utf-8")
    assert "Usage: curator-embed embed" in command
    assert "not_an_image" in (tmp_path / "site" / "output" / "index.html").read_text(encoding="utf-8")
