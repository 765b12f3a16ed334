"""A step that is nearly no work, and shards that hold next to nothing: what is left is the run's own cost.

Apart from the other benchmarks because worker processes import it: without torch they start in two seconds.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from benchmarks.images import encoded_images, write_shards
from curator_embed.decoding.image import DecodedImage
from curator_embed.steps import BatchModel, BatchStep


class MeanColour(BatchStep):
    """Three numbers an image: as little work as an embedder can do."""

    embedding_dim = 3
    device = "cpu"  # so that nobody imports torch to look for a GPU

    def __init__(self, column: str = "mean_colour") -> None:
        self.column = column

    def columns(self) -> dict[str, pa.DataType]:
        """One column of three numbers."""
        return {self.column: pa.list_(pa.float32())}

    def recipe(self) -> dict[str, Any]:
        """Nothing varies."""
        return {"step": "mean_colour"}

    def prepare(self, image: DecodedImage) -> Any:
        """One pixel."""
        return np.asarray(image.rgb.resize((1, 1)))

    def load_model(self, device: str, threads: int | None = None) -> BatchModel:
        """The identity."""
        return _Identity()


class _Identity(BatchModel):
    batch_size = 64

    def __call__(self, images: Sequence[Any]) -> np.ndarray:
        return np.stack(images).reshape(len(images), 3).astype(np.float32)


def tiny_shards(folder: Path, count: int, samples: int = 4) -> Path:
    """``count`` shards of a few thumbnails; written once and copied."""
    thumbnails = []
    for data in encoded_images(samples):
        buffer = io.BytesIO()
        Image.open(io.BytesIO(data)).resize((32, 32)).save(buffer, "JPEG")
        thumbnails.append(buffer.getvalue())
    first = write_shards(folder, thumbnails, per_shard=samples)
    for number in range(1, count):
        for suffix in ("tar", "parquet"):
            shutil.copyfile(first / f"00000.{suffix}", folder / f"{number:05d}.{suffix}")
    return folder
