"""Why a shard's table must not be written as asked, as values; the words for people are made here, once."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class ConflictKind(StrEnum):
    """What stands in the way."""

    FOREIGN_COLUMN = "foreign_column"  # a column of that name does not say what made it
    OTHER_RECIPE = "other_recipe"  # it was made another way
    OTHER_SAMPLES = "other_samples"  # it was made from images that have changed
    OTHER_PAIRING = "other_pairing"  # its rows and images were paired another way
    OTHER_IDS = "other_ids"  # it was made for other ids, or for the same in another order
    IMAGES_GONE = "images_gone"  # it was made from images that are no longer there
    NO_ID_COLUMN = "no_id_column"  # the table has no column of ids, or several
    UNFAITHFUL = "unfaithful"  # the table holds what cannot be written back as it was
    OWN_TABLE = "own_table"  # the output would replace the table that it is made from
    DAMAGED = "damaged"  # a file is there that cannot be read
    STRANGER = "stranger"  # a file is there that is no output
    COLUMNS_ADDED = "columns_added"  # an output of 0.1.0 has had columns added, and no longer says how it was made
    OTHER_OPTIONS = "other_options"  # the output's rows or columns were chosen otherwise
    OTHER_ROWS = "other_rows"  # the output was made from a table of other rows
    LACKS_COLUMNS = "lacks_columns"  # the output is there without the new columns
    CUT_OTHERWISE = "cut_otherwise"  # rows are in the output under another file's name


_NOT_OVERWRITABLE = frozenset(
    {
        ConflictKind.IMAGES_GONE,
        ConflictKind.NO_ID_COLUMN,
        ConflictKind.UNFAITHFUL,
        ConflictKind.OWN_TABLE,
        ConflictKind.CUT_OTHERWISE,
    }
)


@dataclass(frozen=True)
class Conflict:
    """One file that must not be written as asked.

    Attributes:
        kind: what stands in the way.
        path: the file, without passwords and signatures.
        why: what was found there, as the predicate of a sentence about the file or as a sentence.
        remedy: what to do about it, where it is not what the kind says.
    """

    kind: ConflictKind
    path: str
    why: str
    remedy: str = ""

    @property
    def overwritable(self) -> bool:
        """Whether ``overwrite=True`` would replace what is there, and rightly so."""
        return self.kind not in _NOT_OVERWRITABLE

    @property
    def advice(self) -> str:
        """What to do."""
        if self.remedy:
            return self.remedy
        if self.overwritable:
            return "Pass overwrite=True to replace what is in the way, or choose another output path or column name"
        return "Choose another output path"

    def __str__(self) -> str:
        return f"{self.path}: {self.why}"
