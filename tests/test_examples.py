"""Every script in examples/ runs as it stands, in a process of its own, and says what is expected of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPO

SCRIPTS = {
    "custom_embedder.py": ["thumbnail: 56 vectors of 192 values", "grey: 56 vectors of 64 values", "truncated"],
}


def test_every_script_is_run_here() -> None:
    assert {path.name for path in (REPO / "examples").glob("*.py")} == set(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_example_runs(name: str, tmp_path: Path) -> None:
    path = os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, str(REPO / "examples" / name), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for line in SCRIPTS[name]:
        assert line in done.stdout
