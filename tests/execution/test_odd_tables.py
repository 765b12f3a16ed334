"""Tables that are hard to keep as they are, and shards that are large, through whole runs."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curator_embed.datasets import ImageTextPairDataset
from curator_embed.errors import UsageError
from curator_embed.execution import worker
from curator_embed.execution.group import run_group
from curator_embed.pipeline import vectors
from tests.shards import crops, write_dataset, write_tar
from tests.stub import ColourEmbedder
from tests.tables.test_fidelity import bytes_as_decimals, encrypted, far_dates


def embedded(folder: Path) -> ImageTextPairDataset:
    return ColourEmbedder()(ImageTextPairDataset.from_webdataset(str(folder)))


def save(folder: Path, path: Path | None = None, **options: Any) -> Any:
    return embedded(folder).save_metadata(None if path is None else str(path), progress=False, **options)


def seen(path: Path) -> list[tuple[str, str, str]]:
    """Columns as DuckDB sees them: name, type, values as text."""
    table = duckdb.sql(f"select * from '{path}'")
    values = [duckdb.sql(f"""select "{name}"::varchar from '{path}'""").fetchall() for name in table.columns]
    return [(n, str(t), str(v)) for n, t, v in zip(table.columns, table.types, values, strict=True)]


def with_tar(folder: Path, photo: Path, keys: str = "abcdefg") -> Path:
    folder.mkdir(exist_ok=True)
    images = crops(photo, len(keys))
    write_tar(folder / "0.tar", [(f"{key}.jpg", image) for key, image in zip(keys, images, strict=True)])
    return folder


@pytest.mark.parametrize("new_output", [False, True])
def test_intervals_enums_and_dates_stay_through_a_run(
    new_output: bool, tmp_path: Path, wheel_photos: list[Path]
) -> None:
    folder = with_tar(tmp_path / "in", wheel_photos[0])
    pq.write_table(
        far_dates().set_column(0, "key", pa.array(list("abcdefg"))),
        tmp_path / "dates.parquet",
        use_deprecated_int96_timestamps=True,
    )
    duckdb.sql(
        f"""copy (select key, "when", interval (n) month as span, 'x'::enum('x', 'y') as kind
        from (select *, row_number() over () as n from '{tmp_path / "dates.parquet"}'))
        to '{folder / "0.parquet"}' (compression brotli, row_group_size 2048)"""
    )
    pq.write_table(
        pq.ParquetFile(tmp_path / "dates.parquet", coerce_int96_timestamp_unit="us").read(),
        folder / "1.parquet",
        use_deprecated_int96_timestamps=True,
    )
    shutil.copy(folder / "0.tar", folder / "1.tar")
    before = {name: seen(folder / name) for name in ("0.parquet", "1.parquet")}
    where = tmp_path / "out" if new_output else folder
    report = save(folder, where if new_output else None)
    assert (report.read, report.embedded) == (14, 14)
    for name, columns in before.items():
        assert seen(where / name)[: len(columns)] == columns
        assert [n for n, _, _ in seen(where / name)[len(columns) :]] == ["image_embedding", "image_error"]
    assert pq.read_metadata(where / "0.parquet").row_group(0).column(1).compression == "BROTLI"
    far = pq.ParquetFile(where / "1.parquet", coerce_int96_timestamp_unit="us").read()["when"].to_pylist()
    assert far == far_dates()["when"].to_pylist()


def test_data_frames_hold_dates_far_from_now(tmp_path: Path, wheel_photos: list[Path]) -> None:
    folder = with_tar(tmp_path / "in", wheel_photos[0], "0123456")
    pq.write_table(far_dates(), folder / "0.parquet", use_deprecated_int96_timestamps=True)
    frame = ImageTextPairDataset.from_webdataset(str(folder)).metadata.compute()
    assert list(frame["when"].astype("string"))[:2] == ["0001-01-01 00:00:00", "9999-12-31 23:59:59.999999"]


def test_an_encrypted_column_is_refused_before_any_image_is_read_and_the_remedy_works(
    tmp_path: Path, wheel_photos: list[Path]
) -> None:
    folder = with_tar(tmp_path / "in", wheel_photos[0])
    encrypted(folder / "0.parquet")
    data = (folder / "0.parquet").read_bytes()
    with pytest.raises(UsageError, match=r"column 'secret' cannot be copied: .*save_metadata\(PATH, columns="):
        save(folder)
    assert (folder / "0.parquet").read_bytes() == data
    report = save(folder, tmp_path / "none", columns=[])
    assert report.embedded == 7 and "secret" not in pq.read_schema(tmp_path / "none" / "0.parquet").names


@pytest.mark.parametrize("options", [{"limit": 3}, {"on_error": "drop"}])
def test_other_rows_of_a_column_that_only_can_be_copied_are_refused_and_the_remedy_works(
    options: dict[str, Any], tmp_path: Path, wheel_photos: list[Path]
) -> None:
    folder = with_tar(tmp_path / "in", wheel_photos[0])
    bytes_as_decimals(folder / "0.parquet")
    with pytest.raises(UsageError, match=r"column 'money' \(BYTE_ARRAY Decimal"):
        save(folder, tmp_path / "out", **options)
    assert save(folder, tmp_path / "none", columns=[], **options).embedded == options.get("limit", 7)
    assert save(folder, tmp_path / "all").embedded == 7


def test_images_without_a_row_are_counted_where_rows_cannot_be_added(tmp_path: Path, wheel_photos: list[Path]) -> None:
    folder = with_tar(tmp_path / "in", wheel_photos[0], "abcdefgh")
    bytes_as_decimals(folder / "0.parquet")
    report = save(folder, tmp_path / "out")
    assert (report.read, report.embedded, report.images_without_row) == (7, 7, 1)
    assert any("1 images have no row in the table, left out: column 'money'" in note for note in report.notes)


# -- shards whose embeddings do not fit into memory ----------------------------------------


def run(folder: Path, out: Path, most: int) -> list[Any]:
    dataset = embedded(folder)
    job = dataset.job(str(out))
    pipeline = worker.build_pipeline(job)
    pipeline.memory.most = most
    try:
        return run_group(dataset.shards, job, pipeline)
    finally:
        pipeline.close()


def test_embeddings_that_went_through_a_file_give_the_same_bytes(tmp_path: Path, wheel_photos: list[Path]) -> None:
    folder = write_dataset(tmp_path / "in", wheel_photos, shards=2, samples=9, missing=1, bad={(0, 1): b"<html>"})
    for name, most in (("memory", 1 << 30), ("files", 0)):
        reports = run(folder, tmp_path / name, most)
        assert [report.embedded for report in reports] == [8, 9]
    for path in (tmp_path / "memory").iterdir():
        assert path.read_bytes() == (tmp_path / "files" / path.name).read_bytes()
    assert {path.name for path in (tmp_path / "files").iterdir()} == {"00000.parquet", "00001.parquet"}


def test_a_disk_without_room_for_embeddings_costs_its_shard_alone(
    tmp_path: Path, wheel_photos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_dataset(tmp_path / "in", wheel_photos, shards=3, samples=40, missing=0)
    allocate, calls = vectors._allocate, []

    def full_at_first(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        allocate(*arguments)

    monkeypatch.setattr(vectors, "_allocate", full_at_first)
    first, *others = run(folder, tmp_path / "out", 0)
    assert f"{tmp_path / 'out'}: has no room for more. Free some space and run the same command again" in str(
        first.fault
    )
    assert [report.embedded for report in others] == [40, 40] and not any(report.fault for report in others)
    assert [report.embedded for report in run(folder, tmp_path / "out", 0)] == [40, 40, 40]
    assert all(np.isfinite(v).all() for v in pq.read_table(tmp_path / "out")["image_embedding"].to_pylist())
