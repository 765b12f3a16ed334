"""Columns that were added to an output after it was made: an overwriting run keeps them, row by row, by id."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from curator_embed.tables.pairing import pair
from curator_embed.tables.provenance import ERROR_COLUMN, Entry
from curator_embed.tables.shard_table import ShardTable
from curator_embed.tables.taking import Taken
from curator_embed.tables.writing import NewColumn


def carried_columns(
    old: ShardTable, id_col: str, known: Collection[str], ids: Sequence[str | None]
) -> tuple[dict[str, NewColumn], dict[str, Entry]]:
    """Columns of an output that neither its input has nor the run makes, as columns of the new version.

    Args:
        old: the version that is about to be replaced.
        known: columns that the input has or the run makes.
        ids: of the new version's rows, by the positions under which new columns know them.

    Returns:
        The columns, and what made those that say so: their digest of ids tells whether it was for these rows. None
        where the old version's rows cannot be told apart by id.
    """
    schema = old.stored.schema
    if schema is None or not old.footer.output or old.footer.id_col != id_col or id_col not in schema.names:
        return {}, {}
    names = [name for name in schema.names if name not in known and name not in (id_col, ERROR_COLUMN)]
    names = [name for name in names if schema.names.count(name) == 1]
    if not names:
        return {}, {}
    before = old.ids(id_col)
    pairing = pair(ids, [text if text is not None else "" for text in before.text])
    rows = pairing.sample_of_row
    with old.reading() as parquet:
        table = parquet.read(columns=names, use_threads=False)
    columns = {name: NewColumn(schema.field(name).type, Taken(table.column(name), rows)) for name in names}
    entries = {name: entry for name in names if (entry := old.footer.columns.get(name)) is not None}
    return columns, entries
