"""Embeddings that come by id: the k-th of an id belongs to its k-th sample, wherever they are kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from curator_embed.execution.values import OwnVectors
from curator_embed.pipeline.vectors import VectorMemory, Vectors

KIND = pa.list_(pa.float32())


def vectors(*firsts: float) -> np.ndarray:
    return np.array([[first, 1.0] if first else [0.0, 0.0] for first in firsts], np.float32)


@pytest.mark.parametrize("most", [None, 0])
def test_each_sample_gets_its_own(most: int | None, tmp_path: Path) -> None:
    memory = None if most is None else VectorMemory(most)
    own = OwnVectors(Vectors(memory, str(tmp_path / "0.parquet")))
    own.add(["b", "a", "a"], vectors(2, 1, 11))
    own.add(["few", "stranger", "bad", "nan"], vectors(5, 6, 0, np.nan))
    keys = ["a", "nan", "few", "a", "none", "b", "few", "bad"]
    assert own.pair(keys) == [1, 7], "zero and not a number"
    assert own.places.keys() == {"a", "b", "stranger", "bad", "nan"}, "of few there are two samples"
    assert own.lengths == {2}
    sample_of_row = np.array([5, -1, 3, 0, 1, 2, 4, 6, 7])
    values = own.values(sample_of_row, KIND)
    assert values(np.arange(9)).to_pylist() == [[2, 1], None, [11, 1], [1, 1], None, None, None, None, None]
    assert values(np.array([3])).to_pylist() == [[1, 1]]


def test_nothing_given_is_null() -> None:
    own = OwnVectors(Vectors())
    assert own.pair(["a"]) == [] and own.lengths == set()
    assert own.values(np.array([0, -1]), KIND)(np.arange(2)).to_pylist() == [None, None]


def test_embeddings_of_several_lengths_are_told() -> None:
    own = OwnVectors(Vectors())
    own.add(["a"], np.ones((1, 2), np.float32))
    own.add(["b"], np.ones((1, 3), np.float32))
    assert own.lengths == {2, 3}
