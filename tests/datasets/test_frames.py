"""Metadata as a data frame: what its columns are, and what becomes of columns that users assign."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from curator_embed.datasets import ImageTextPairDataset
from tests.stub import ColourEmbedder, ColourModel


def open_dataset(folder: Path, **options: Any) -> ImageTextPairDataset:
    return ImageTextPairDataset.from_webdataset(str(folder), **options)


class FailsOnce(ColourModel):
    """A model that is out of memory the first time."""

    failed = False

    def __call__(self, images: Any) -> Any:
        if not FailsOnce.failed:
            FailsOnce.failed = True
            raise RuntimeError("out of memory")
        return super().__call__(images)


class Transient(ColourEmbedder):
    """An embedder with such a model."""

    def load_model(self, device: str, threads: int | None = None) -> FailsOnce:
        return FailsOnce(self.batch_size)

    def settled(self, **settings: Any) -> Transient:
        return self


def test_an_error_in_the_model_is_not_kept(source: Path) -> None:
    FailsOnce.failed = False
    frame = Transient()(open_dataset(source)).metadata
    with pytest.raises(RuntimeError, match="out of memory"):
        frame.compute()
    assert frame["image_embedding"].compute().notna().sum() == 28
