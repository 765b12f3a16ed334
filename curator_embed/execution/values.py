"""Values of new columns by row, from what the pipeline collected by sample: computed a slice of rows at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from curator_embed.errors import StepError
from curator_embed.pipeline.pipeline import OpenShard, sound
from curator_embed.pipeline.vectors import Vectors
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


class OwnVectors:
    """Embeddings of an embedder that reads shards itself, which gives them by id: the k-th of an id is that of its k-th
    sample.

    Args:
        vectors: where they are kept, in the order in which they come.

    Attributes:
        places: of each id's embeddings among them.
        lengths: of the embeddings, as many as there are different ones.
    """

    def __init__(self, vectors: Vectors) -> None:
        self.vectors = vectors
        self.places: dict[str, list[int]] = {}
        self.lengths: set[int] = set()
        self._unsound: set[int] = set()
        self._count = 0
        self._place = np.empty(0, np.int64)

    def add(self, ids: Iterable[str], vectors: np.ndarray) -> None:
        """Take in embeddings (n, dim) of n ids."""
        self.lengths.add(vectors.shape[1])
        if len(self.lengths) > 1:  # what cannot be a column: the writer says so
            return
        for text, vector, good in zip(ids, vectors, sound(vectors), strict=True):
            if good:
                self.vectors.put(self._count, vector)
            else:
                self._unsound.add(self._count)
            self.places.setdefault(text, []).append(self._count)
            self._count += 1

    def pair(self, keys: Sequence[str]) -> list[int]:
        """Give each sample its embedding; returns samples whose embedding is zero, infinite or not a number.

        An id that came fewer times than there are samples of it is left out: which of them it means is not guessed.

        Args:
            keys: the id of each sample.
        """
        there = Counter(keys)
        self.places = {key: places for key, places in self.places.items() if len(places) >= there[key]}
        taken: Counter[str] = Counter()
        self._place = np.full(len(keys), -1, np.int64)
        for ordinal, key in enumerate(keys):
            if (places := self.places.get(key)) is not None:
                self._place[ordinal] = places[taken[key]]
                taken[key] += 1
        return [ordinal for ordinal, place in enumerate(self._place.tolist()) if place in self._unsound]

    def values(self, sample_of_row: np.ndarray, kind: pa.DataType) -> Slice:
        """The column's values by row; null where a row has none."""
        place_of_row = np.append(self._place, -1)[sample_of_row]  # -1, for no sample, is the last

        def values(rows: np.ndarray) -> pa.Array:
            vectors, present = self.vectors.gather(place_of_row[rows])
            return vectors_to_list_array(vectors, present, kind.value_type)

        return values


def vector_dtype(step: Step) -> Any:
    """The numpy type of an embedder's column."""
    return next(iter(step.columns().values())).value_type.to_pandas_dtype()


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
