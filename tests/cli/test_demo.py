"""The demo: its data as img2dataset would write it, and the run from end to end."""

from __future__ import annotations

import hashlib
import json
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image, UnidentifiedImageError

from curator_embed.cli.demo import run_demo
from curator_embed.cli.demo_data import VARIANTS, build_demo_data


def _digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_data_is_the_same_every_time_and_a_second_call_leaves_it(tmp_path: Path) -> None:
    build_demo_data(tmp_path / "a", photographs=3)
    build_demo_data(tmp_path / "b", photographs=3)
    assert _digests(tmp_path / "a") == _digests(tmp_path / "b")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()}
    build_demo_data(tmp_path / "a", photographs=3)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()}


def test_a_shard_without_its_stats_is_written_again(tmp_path: Path) -> None:
    build_demo_data(tmp_path, photographs=2)
    whole = _digests(tmp_path)
    (tmp_path / "00001_stats.json").unlink()
    (tmp_path / "00001.tar").write_bytes(b"cut off")
    build_demo_data(tmp_path, photographs=2)
    assert _digests(tmp_path) == whole


def test_rows_and_samples_are_those_of_img2dataset(tmp_path: Path) -> None:
    data = build_demo_data(tmp_path, shards=3, photographs=4)
    assert data.rows == 4 * len(VARIANTS) + data.missing + data.broken
    rows, undecodable, in_order = 0, 0, []
    for number in range(3):
        table = pq.read_table(tmp_path / f"{number:05d}.parquet").to_pylist()
        rows += len(table)
        in_order.append([row["key"] for row in table] == sorted(row["key"] for row in table))
        with tarfile.open(tmp_path / f"{number:05d}.tar") as tar:
            members = {member.name: member for member in tar}
            for row in table:
                mine = [name for name in members if name.partition(".")[0] == row["key"]]
                assert len(mine) == (3 if row["status"] == "success" else 0)
                if not mine:
                    assert row["error_message"] and row["sha256"] is None
                    continue
                assert json.load(tar.extractfile(f"{row['key']}.json")) == row  # type: ignore[arg-type]
                image = next(name for name in mine if not name.endswith((".txt", ".json")))
                encoded = tar.extractfile(image).read()  # type: ignore[union-attr]
                assert hashlib.sha256(encoded).hexdigest() == row["sha256"]
                try:
                    with Image.open(tar.extractfile(image)) as opened:  # type: ignore[arg-type]
                        opened.load()
                        assert opened.size == (row["width"], row["height"])
                except (UnidentifiedImageError, OSError):
                    undecodable += 1
    assert rows == data.rows
    assert undecodable == data.broken
    assert not all(in_order), "rows come as downloads finished, not in the tar's order"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


def test_demo_accounts_for_every_row_and_finds_the_variants(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run_demo(demo, photographs=4)
    said = capsys.readouterr().out
    assert (result.run["read"], result.run["failed"], result.run["no_image"]) == (4 * len(VARIANTS) + 4, 2, 2)
    assert result.run["reasons"] == {"not_an_image": 1, "truncated": 1}
    assert result.images == result.run["embedded"] == 4 * len(VARIANTS)
    assert result.own_original >= 0.9 * result.variants
    assert result.same_photograph >= 0.9 * result.images
    assert str(result.picture) in said and "truncated" in said
    with Image.open(result.picture) as sheet:
        assert sheet.height > 4 * 148 and sheet.width > 7 * 148

    again = run_demo(demo, photographs=4, as_json=True)
    assert json.loads(capsys.readouterr().out)["run"]["shards"]["skipped"] == again.run["shards"]["skipped"] == 4
    assert (again.same_photograph, again.own_original) == (result.same_photograph, result.own_original)
