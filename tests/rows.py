"""Outputs read back for tests: rows by id, and what a row's vector must be, computed from the stored bytes alone."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from tests.stub import ColourEmbedder


def table_rows(folder: Path, id_col: str = "key") -> dict[Any, dict[str, Any]]:
    """All rows of a folder's parquet files by id, in natural order; an id that repeats is a test's mistake."""
    found: dict[Any, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.parquet")):
        for row in pq.read_table(path).to_pylist():
            assert row[id_col] not in found, f"{row[id_col]} is there twice"
            found[row[id_col]] = row
    return found


def tar_members(path: Path) -> dict[str, bytes]:
    """Contents of a tar's members by name, in their order, as Python's own tarfile reads them."""
    with tarfile.open(path) as archive:
        return {item.name: archive.extractfile(item).read() for item in archive if item.isfile()}  # type: ignore[union-attr]


def tar_images(folder: Path) -> dict[str, bytes]:
    """Encoded images of a folder's tars by key (the name up to the first dot)."""
    return {
        name.partition(".")[0]: data
        for path in sorted(folder.glob("*.tar"))
        for name, data in tar_members(path).items()
        if name.partition(".")[2] in ("jpg", "png", "jpeg")
    }


def colour_vector(encoded: bytes) -> np.ndarray:
    """What ``ColourEmbedder`` must give for these bytes, by Pillow alone."""
    with Image.open(io.BytesIO(encoded)) as image:
        pixels = np.asarray(image.convert("RGB").resize((8, 8)))
    return ColourEmbedder().load_model("cpu")([pixels])[0]


def assert_embedded(row: dict[str, Any], encoded: bytes, column: str = "image_embedding") -> None:
    """The row holds the vector of exactly this image, and no reason."""
    assert row["image_error"] is None
    np.testing.assert_array_equal(np.float32(row[column]), colour_vector(encoded))


def assert_failed(row: dict[str, Any], reason: str, column: str = "image_embedding") -> None:
    """The row is there without a vector, and says why."""
    assert row["image_error"] == reason
    assert row[column] is None
