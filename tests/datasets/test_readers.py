"""The output, nulls included, reads the same in everything people read parquet with."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from curator_embed import load_embeddings
from curator_embed.datasets import ImageTextPairDataset
from curator_embed.tables.provenance import FOOTER_KEY
from tests.rows import colour_vector, tar_images
from tests.shards import write_dataset
from tests.stub import ColourEmbedder

Row = tuple[str, list[float] | None, str | None]

COLUMNS = ["key", "image_embedding", "image_error"]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory, wheel_photos: list[Path]) -> Path:
    """Three files; the first row, the last row and some between have no embedding, one file has none at all."""
    folder = tmp_path_factory.mktemp("readers")
    bad = {(1, 1): b"", (1, 9): b"<html></html>"} | {(2, n): b"" for n in range(4)}
    write_dataset(folder / "in", wheel_photos, shards=2, samples=10, bad=bad)
    write_dataset(folder / "more", wheel_photos, shards=3, samples=4, bad=bad)
    for kind in ("tar", "parquet"):
        (folder / "more" / f"00002.{kind}").rename(folder / "in" / f"00002.{kind}")
    dataset = ColourEmbedder()(ImageTextPairDataset.from_webdataset(str(folder / "in")))
    report = dataset.save_metadata(str(folder / "out"), progress=False)
    assert (report.read, report.embedded, report.failed, report.no_image) == (27, 18, 6, 3)
    return folder / "out"


@pytest.fixture(scope="module")
def truth(output: Path) -> list[Row]:
    """Every row, from the stored tables and images alone."""
    source = output.parent / "in"
    images = tar_images(source)
    found: list[Row] = []
    for path in sorted(source.glob("*.parquet")):
        for key in pq.read_table(path)["key"].to_pylist():
            data = images.get(key)
            if data is None:
                found.append((key, None, "no_image"))
            elif not data.startswith(b"\xff\xd8"):
                found.append((key, None, "not_an_image" if data else "empty"))
            else:
                found.append((key, colour_vector(data).tolist(), None))
    return found


def with_pyarrow(folder: Path) -> list[Row]:
    return [tuple(row.values()) for row in pq.read_table(folder, columns=COLUMNS).to_pylist()]  # type: ignore[misc]


def from_pandas(frame: Any) -> list[Row]:
    assert frame["image_error"].isna().sum() == frame["image_embedding"].notna().sum()
    return [
        (str(key), None if vector is None else [float(x) for x in vector], None if not isinstance(why, str) else why)
        for key, vector, why in zip(frame["key"], frame["image_embedding"], frame["image_error"], strict=True)
    ]


def with_pandas(folder: Path) -> list[Row]:
    import pandas as pd

    return from_pandas(pd.read_parquet(folder, columns=COLUMNS))


def with_dask(folder: Path) -> list[Row]:
    import dask.dataframe as dd

    frame = dd.read_parquet(folder, columns=COLUMNS)
    assert frame.npartitions == 3
    return from_pandas(frame.compute(scheduler="sync"))


def with_polars(folder: Path) -> list[Row]:
    import polars

    frame = polars.read_parquet(folder / "*.parquet", columns=COLUMNS)
    assert frame.schema["image_embedding"] == polars.List(polars.Float32)
    return frame.rows()  # type: ignore[no-any-return]


def with_duckdb(folder: Path) -> list[Row]:
    import duckdb

    question = f"SELECT {', '.join(COLUMNS)} FROM read_parquet('{folder}/*.parquet') ORDER BY filename, file_row_number"
    return duckdb.sql(question).fetchall()  # type: ignore[no-any-return]


def with_datasets(folder: Path) -> list[Row]:
    import datasets

    files = [str(path) for path in sorted(folder.glob("*.parquet"))]
    loaded = datasets.Dataset.from_parquet(files, columns=COLUMNS, cache_dir=str(folder.parent / "cache"))
    return [tuple(row[name] for name in COLUMNS) for row in loaded]  # type: ignore[misc]


def with_pyarrow_14(folder: Path) -> list[Row]:
    python = os.environ.get("PYARROW14_PYTHON", "")
    if not Path(python).is_file():
        pytest.skip("no interpreter with pyarrow 14: `make test` makes one and names it in PYARROW14_PYTHON")
    code = """
import json, sys
import pyarrow, pyarrow.parquet as pq
assert pyarrow.__version__.startswith("14."), pyarrow.__version__
columns = sys.argv[2:]
print(json.dumps([list(row.values()) for row in pq.read_table(sys.argv[1], columns=columns).to_pylist()]))
"""
    done = subprocess.run([python, "-c", code, str(folder), *COLUMNS], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [tuple(row) for row in json.loads(done.stdout)]  # type: ignore[misc]


@pytest.mark.parametrize(
    "read",
    [with_pyarrow, with_pyarrow_14, with_pandas, with_polars, with_duckdb, with_dask, with_datasets],
    ids=lambda read: read.__name__.removeprefix("with_"),
)
def test_same_ids_vectors_and_nulls(read: Callable[[Path], list[Row]], output: Path, truth: list[Row]) -> None:
    rows = read(output)
    assert [row[0] for row in rows] == [row[0] for row in truth]
    assert [row[2] for row in rows] == [row[2] for row in truth]
    for (_, got, _), (_, wanted, _) in zip(rows, truth, strict=True):
        assert (got is None) == (wanted is None)
        if wanted is not None:
            np.testing.assert_array_equal(np.float32(got), np.float32(wanted))


def test_arrays_without_any_reader(output: Path, truth: list[Row]) -> None:
    ids, vectors = load_embeddings(str(output))
    wanted = [(key, vector) for key, vector, _ in truth if vector is not None]
    assert ids.tolist() == [key for key, _ in wanted]
    np.testing.assert_array_equal(vectors, np.float32([vector for _, vector in wanted]))


def test_the_footer_says_how_it_was_made(output: Path) -> None:
    """Readable by anyone who reads parquet metadata: JSON under one key, without times, hosts or paths."""
    (raw,) = {pq.read_schema(path).metadata[FOOTER_KEY] for path in [output / "00000.parquet"]}
    said = json.loads(raw)
    made = said["columns"]["image_embedding"]
    assert made["recipe"]["model"] == "v1"
    assert set(made["samples"]) >= {"size", "mtime_ns", "ids"}
    assert said["counts"] == {"read": 11, "embedded": 10, "failed": 0, "no_image": 1, "reasons": {}}
    assert str(output.parent) not in raw.decode()
