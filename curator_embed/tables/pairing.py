"""Which sample belongs to which row. Pure functions: ids in, positions out.

Rows and samples meet by id, never by position: img2dataset's tables have a row for every URL in
completion order, its tars only the successes.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from curator_embed.sources.tar import decode_name

Id = str | None

MOST_DIGITS = 320
"""No number in a column of numbers has more, and Python refuses to read numbers of more than 4,300."""

_ESCAPED = re.compile("[\udc80-\udcff]")


@dataclass(frozen=True)
class Pairing:
    """How the rows of a table and the samples of a shard meet.

    Attributes:
        sample_of_row: int64 (rows,): the position of the row's sample, or -1.
        ambiguous: bool (rows,): the id occurs in both, but not equally often; nothing is guessed.
        orphans: int64: positions of samples whose id is in no row, in their order.
        unequal: id -> (times in the table, times among the samples), for the report.
    """

    sample_of_row: np.ndarray
    ambiguous: np.ndarray
    orphans: np.ndarray
    unequal: dict[str, tuple[int, int]]


def ids_as_text(column: pa.Array | pa.ChunkedArray) -> list[Id]:
    """Bring ids of any type to the text under which they are compared.

    Integers lose nothing; floats that hold whole numbers (a pandas column of integers with nulls)
    read as integers; bytes are decoded as tar keys are. Null stays None and pairs with nothing.
    """
    kind = column.type
    if pa.types.is_dictionary(kind):
        column, kind = column.cast(kind.value_type), kind.value_type
    if pa.types.is_floating(kind):
        return [None if v is None or v != v else str(int(v)) if v.is_integer() else repr(v) for v in column.to_pylist()]
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind):
        return [None if v is None else decode_name(v) for v in column.to_pylist()]
    return [None if v is None else str(v) for v in column.to_pylist()]


def key_normaliser(kind: pa.DataType | None) -> bool:
    """Whether keys must be read as numbers to meet ids of this type ("00042" is 42 in an integer column)."""
    if kind is not None and pa.types.is_dictionary(kind):
        kind = kind.value_type
    return kind is not None and (pa.types.is_integer(kind) or pa.types.is_floating(kind))


def normalise_key(key: str, numeric: bool) -> str:
    """The text under which a sample's key is compared with the ids of a column."""
    if numeric and len(key) <= MOST_DIGITS and key.isascii() and key.removeprefix("-").isdigit():
        return str(int(key))
    # A source that escapes bytes that are no UTF-8 the way Python does means the same bytes.
    return key if key.isascii() else _ESCAPED.sub(lambda found: f"\\x{ord(found[0]) - 0xDC00:02x}", key)


def pair(row_ids: Sequence[Id], sample_keys: Sequence[str]) -> Pairing:
    """Pair rows and samples by id; the k-th row of an id with its k-th sample.

    Args:
        row_ids: one per row, as ``ids_as_text`` gives them.
        sample_keys: one per sample, as ``normalise_key`` gives them.
    """
    by_key: dict[str, list[int]] = defaultdict(list)
    for position, key in enumerate(sample_keys):
        by_key[key].append(position)
    rows_of: dict[str, list[int]] = defaultdict(list)
    for row, row_id in enumerate(row_ids):
        if row_id is not None:
            rows_of[row_id].append(row)

    sample_of_row = np.full(len(row_ids), -1, dtype=np.int64)
    ambiguous = np.zeros(len(row_ids), dtype=bool)
    unequal: dict[str, tuple[int, int]] = {}
    for row_id, rows in rows_of.items():
        samples = by_key.get(row_id)
        if samples is None:
            continue
        if len(samples) == len(rows):
            sample_of_row[rows] = samples
        else:
            ambiguous[rows] = True
            unequal[row_id] = (len(rows), len(samples))
    orphans = np.array([p for p, key in enumerate(sample_keys) if key not in rows_of], dtype=np.int64)
    return Pairing(sample_of_row, ambiguous, orphans, unequal)


def ids_digest(row_ids: Sequence[Id]) -> str:
    """A short fingerprint of the ids in their order (sha256, 32 hexadecimal digits)."""
    digest = hashlib.sha256()
    for row_id in row_ids:
        encoded = b"\x00" if row_id is None else b"\x01" + row_id.encode("utf-8", "surrogateescape")
        digest.update(len(encoded).to_bytes(4, "little") + encoded)
    return digest.hexdigest()[:32]
