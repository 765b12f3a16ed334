"""Fixtures of the command's tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from curator_embed.cli import main
from tests.command import Ran
from tests.shards import write_dataset


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


@pytest.fixture
def source(tmp_path: Path, wheel_photos: list[Path]) -> Path:
    """Two shards of six photographs, seven rows each: one download failed, one image is bad."""
    return write_dataset(tmp_path / "source", wheel_photos, shards=2, samples=6, bad={(1, 2): b"<html></html>"})
