"""Columns that were added to an output after it was made: a new version of it keeps them, row by row, by id."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np

from curator_embed.tables.judge import made_from_images
from curator_embed.tables.pairing import pair
from curator_embed.tables.provenance import ERROR_COLUMN, Entry
from curator_embed.tables.shard_table import ShardTable
from curator_embed.tables.taking import Taken
from curator_embed.tables.writing import NewColumn


@dataclass(frozen=True)
class Carried:
    """What is carried over.

    Attributes:
        columns: the columns, as columns of the new version.
        entries: what made those that say so; their digests of ids tell whether it was for these rows.
        codes: per row of the new version, why a carried column that was made from images has no value.
        lost: rows of the old version that the new one does not have, with their values in these columns.
    """

    columns: dict[str, NewColumn] = field(default_factory=dict)
    entries: dict[str, Entry] = field(default_factory=dict)
    codes: Sequence[str | None] = ()
    lost: int = 0


def carried_columns(old: ShardTable, id_col: str, known: Collection[str], ids: Sequence[str | None]) -> Carried:
    """Columns of an output that neither its input has nor the run makes.

    Args:
        old: the version that is about to be replaced.
        known: columns that the input has or the run makes.
        ids: of the new version's rows, by the positions under which new columns know them.
    """
    schema, footer = old.stored.schema, old.footer
    if schema is None or not (footer.output or footer.columns) or footer.id_col != id_col:
        return Carried()
    names = [name for name in schema.names if name not in known and name not in (id_col, ERROR_COLUMN)]
    names = [name for name in names if schema.names.count(name) == 1]
    if not names or schema.names.count(id_col) != 1:
        return Carried()
    before = old.ids(id_col, errors=schema.names.count(ERROR_COLUMN) == 1)
    rows = _rows_of(before.text, ids)
    with old.reading() as parquet:
        table = parquet.read(columns=names, use_threads=False)
    columns = {name: NewColumn(schema.field(name).type, Taken(table.column(name), rows)) for name in names}
    entries = {name: entry for name in names if (entry := footer.columns.get(name)) is not None}
    codes: list[str | None] = []
    imaged = [name for name, entry in entries.items() if made_from_images(entry)]
    if before.errors is not None and imaged:
        empty = np.zeros(len(table), dtype=bool)
        for name in imaged:
            empty |= np.asarray(table.column(name).is_null())
        said = before.errors.to_pylist()
        codes = [said[row] if row >= 0 and empty[row] else None for row in rows.tolist()]
    return Carried(columns, entries, codes, len(before.text) - int((rows >= 0).sum()))


def _rows_of(before: list[str | None], ids: Sequence[str | None]) -> np.ndarray:
    """int64: for each row of the new version the old one's, -1 for none; by position where the ids are the same."""
    common = min(len(before), len(ids))
    if before[:common] == list(ids[:common]) and (common == len(before) or common == len(ids)):
        return np.concatenate([np.arange(common), np.full(len(ids) - common, -1)]).astype(np.int64)
    with_id = np.array([row for row, text in enumerate(before) if text is not None], dtype=np.int64)
    found = pair(ids, [text for text in before if text is not None]).sample_of_row
    return np.where(found < 0, -1, with_id[found]) if len(with_id) else found
