"""A small embedder that needs no torch, for tests of everything around the model."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import pyarrow as pa

from curator_embed.decoding.image import DecodedImage
from curator_embed.steps import BatchModel, BatchStep, Settings


class ColourModel(BatchModel):
    """Thumbnails as vectors of unit length."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.batches: list[int] = []

    def __call__(self, images: Sequence[Any]) -> np.ndarray:
        self.batches.append(len(images))
        vectors = np.stack(images).astype(np.float32).reshape(len(images), -1) + 1
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


class ColourEmbedder(BatchStep):
    """An 8x8 thumbnail, normalised: 192 numbers that tell photographs apart."""

    embedding_dim = 192

    def __init__(
        self, column: str = "image_embedding", batch_size: int = 4, version: int = 1, device: str | None = None
    ) -> None:
        self.column, self.batch_size, self.version, self.device = column, batch_size, version, device
        self.threads: int | None = None

    def columns(self) -> dict[str, pa.DataType]:
        return {self.column: pa.list_(pa.float32())}

    def recipe(self) -> dict[str, Any]:
        return {
            "step": "colour", "model": f"v{self.version}", "batch_shape": [self.batch_size, 3, 8, 8],
            "threads": self.threads, "compile": False,
        }  # fmt: skip

    def prepare(self, image: DecodedImage) -> Any:
        return np.asarray(image.rgb.resize((8, 8)))

    def settled(self, settings: Settings, *, images: int | None = None) -> Self:
        new = copy.copy(self)
        new.threads = settings.threads
        return new

    def load_model(self, device: str, threads: int | None = None) -> BatchModel:
        return ColourModel(self.batch_size)


class WaitingEmbedder(ColourEmbedder):
    """Loads its model when a file is there: a run that stays in the middle for as long as a test wants."""

    def __init__(self, go: str | os.PathLike[str]) -> None:
        super().__init__()
        self.go = os.fspath(go)

    def load_model(self, device: str, threads: int | None = None) -> BatchModel:
        while not os.path.exists(self.go):
            time.sleep(0.05)
        return super().load_model(device, threads)
