"""Values of new columns by row, from what the pipeline collected by sample: computed a slice of rows at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from curator_embed.errors import StepError
from curator_embed.pipeline.pipeline import OpenShard, sound
from curator_embed.steps import Step
from curator_embed.tables.writing import Slice, vectors_to_list_array


def embedded_values(opened: OpenShard, position: int, sample_of_row: np.ndarray, kind: pa.DataType) -> Slice:
    """Vectors of the model of the step at ``position``; null where it has none.

    Args:
        sample_of_row: int64 (rows,): the ordinal of each row's sample, -1 for none.
    """

    def values(rows: np.ndarray) -> pa.Array:
        vectors, present = opened.vectors[position].gather(sample_of_row[rows])
        return vectors_to_list_array(vectors, present, kind.value_type)

    return values


def own_values(
    found: Mapping[str, Sequence[np.ndarray]], keys: Sequence[str], sample_of_row: np.ndarray, kind: pa.DataType
) -> Slice:
    """Vectors of an embedder that reads shards itself, which gives them by id: the k-th of an id to its k-th row.

    Args:
        keys: the id of each sample.
    """
    taken: Counter[str] = Counter()
    by_row: list[np.ndarray | None] = []
    for ordinal in sample_of_row:
        if ordinal < 0:
            by_row.append(None)
            continue
        key = keys[ordinal]
        vectors, k = found.get(key, []), taken[key]
        by_row.append(vectors[k] if k < len(vectors) else None)
        taken[key] += 1
    dtype = kind.value_type.to_pandas_dtype()

    def values(rows: np.ndarray) -> pa.Array:
        present = np.array([by_row[row] is not None for row in rows], dtype=bool)
        some = [np.asarray(by_row[row], dtype) for row in rows if by_row[row] is not None]
        vectors = np.zeros((len(rows), len(some[0]) if some else 0), dtype)
        if some:
            vectors[present] = np.stack(some)
            present[present] = sound(vectors[present])
        return vectors_to_list_array(vectors, present, kind.value_type)

    return values


def vector_dtype(step: Step) -> Any:
    """The numpy type of an embedder's column."""
    return next(iter(step.columns().values())).value_type.to_pandas_dtype()


def unsound_ordinals(found: Mapping[str, Sequence[np.ndarray]], keys: Sequence[str]) -> list[int]:
    """Samples whose vector, of an embedder that reads shards itself, is zero, infinite or not a number.

    Args:
        keys: the id of each sample.
    """
    bad = {key: [not good for good in sound(np.stack(vectors))] for key, vectors in found.items() if vectors}
    bad = {key: marks for key, marks in bad.items() if any(marks)}
    taken: Counter[str] = Counter()
    ordinals = []
    for ordinal, key in enumerate(keys):
        if key in bad:
            if bad[key][taken[key]]:
                ordinals.append(ordinal)
            taken[key] += 1
    return ordinals


def image_values(
    step: Step, name: str, opened: OpenShard, position: int, sample_of_row: np.ndarray, keys: Sequence[str]
) -> Slice:
    """Column ``name`` of the image step at ``position``; null where it has no value.

    Args:
        keys: the id of each sample, for messages.

    The values raise ``StepError`` where one does not fit the column's type.
    """
    found, kind = opened.values[position], step.columns()[name]

    def values(rows: np.ndarray) -> pa.Array:
        ordinals = sample_of_row[rows].tolist()
        cells = [None if (got := found.get(ordinal)) is None else got.get(name) for ordinal in ordinals]
        try:
            made = pa.array(cells, kind)
            if not (pa.types.is_integer(kind) and any(map(_is_fraction, cells))):
                return made
            why = "it is no whole number"
        except _UNFIT as error:
            why = str(error)
        ordinal, cell = next(pair for pair in zip(ordinals, cells, strict=True) if not _fits(pair[1], kind))
        raise StepError(
            f"{type(step).__name__} gave {shortened(repr(cell))} for column '{name}' of image '{keys[ordinal]}', but "
            f"the column is {kind} ({why}). Correct the value, or the type in columns()"
        )

    return values


_UNFIT = (pa.ArrowException, TypeError, ValueError, OverflowError)
"""What pyarrow raises for a value that a column cannot hold."""


def _fits(value: Any, kind: pa.DataType) -> bool:
    try:
        pa.array([value], kind)
    except _UNFIT:
        return False
    return not (pa.types.is_integer(kind) and _is_fraction(value))


def _is_fraction(value: Any) -> bool:
    """Whether pyarrow would cut something off to make a whole number of it, which it does in silence."""
    return value is not None and type(value) is not int and int(value) != value


def shortened(text: str, length: int = 60) -> str:
    """A text of at most ``length`` characters."""
    return text if len(text) <= length else f"{text[: length - 3]}..."
