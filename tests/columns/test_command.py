"""``--hash`` and ``--properties``, with a model and without."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from curator_embed.cli import main
from tests.rows import table_rows
from tests.shards import write_dataset


@pytest.fixture
def source(tmp_path: Path, wheel_photos: list[Path]) -> Path:
    """One shard of three photographs."""
    return write_dataset(tmp_path / "source", wheel_photos, shards=1, samples=3, missing=0)


def status(*arguments: str) -> int:
    """The command's exit status."""
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return int(stopped.value.code or 0)


@pytest.mark.usefixtures("client")
def test_columns_then_a_model(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status("columns", source, "--hash", "phash", "--hash", "sha256", "--json") == 0
    assert json.loads(capsys.readouterr().out)["read"] == 3
    hashed = table_rows(source)
    assert status("columns", source, "--hash", "ahash") == 0
    said = capsys.readouterr().out.replace(str(source), "")
    assert "measured                3" in said and "embedded" not in said and "model" not in said
    assert all(len(row["phash"]) == 16 and len(row["image_sha256"]) == 64 for row in hashed.values())

    model = ("--model", "test_vit.r160_in1k", "--batch-size", "2", "--quiet")
    out = tmp_path / "out"
    asked = ("--hash", "phash", "--hash", "dhash", "--hash-size", "8", "--properties")
    assert status("embed", source, *model, "--output", out, *asked) == 0
    for key, row in table_rows(out).items():
        assert row["phash"] == hashed[key]["phash"] and len(row["dhash"]) == 16
        assert row["image_width"] == 96 and len(row["image_embedding"]) == 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "nothing to compute: give --hash KIND"),
        (("--hash", "md5"), "no hash is called 'md5'; there are phash"),
        (("--hash", "whash", "--hash-size", "12"), "power of two"),
    ],
)
def test_bad_usage(source: Path, options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert status("columns", source, *options) == 2
    assert message in capsys.readouterr().err
    assert [path.suffix for path in sorted(source.iterdir())] == [".parquet", ".tar"]


def test_columns_added_to_an_output_stay_when_its_first_command_is_given_again(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert status("columns", source, "--output", out, "--hash", "phash") == 0
    assert status("columns", source, "--metadata", out, "--hash", "dhash") == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert status("columns", source, "--output", out, "--hash", "phash") == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
