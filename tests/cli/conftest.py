"""Running the command: in this process for what it does, in one of its own for signals and start-up time."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from curator_embed.cli import main
from tests.shards import write_dataset

REPO = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-c", "from curator_embed.cli import main; main()"]


@dataclass(frozen=True)
class Ran:
    """One run of the command."""

    status: int
    out: str
    err: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run the command with these arguments, in this process."""

    def call(*arguments: object) -> Ran:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        code = ended.value.code
        captured = capsys.readouterr()
        return Ran(code if isinstance(code, int) else int(code is not None), captured.out, captured.err)

    return call


def start(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    """The command as a process of its own."""
    return subprocess.Popen(
        [*COMMAND, *(str(argument) for argument in arguments)],
        cwd=REPO,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def source(tmp_path: Path, wheel_photos: list[Path]) -> Path:
    """Two shards of six photographs, seven rows each: one download failed, one image is bad."""
    return write_dataset(tmp_path / "source", wheel_photos, shards=2, samples=6, bad={(1, 2): b"<html></html>"})
