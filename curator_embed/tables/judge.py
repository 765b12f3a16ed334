"""Whether a shard is done, what it still needs, and what stands in the way. Pure functions of footers.

A run may skip a shard on the strength of its footer alone, so what counts is decided here, once.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

from curator_embed.tables.conflicts import Conflict, ConflictKind
from curator_embed.tables.provenance import ERROR_COLUMN, Entry, Footer, counted


@dataclass(frozen=True)
class Wanted:
    """What a step would make of a shard.

    Attributes:
        columns: their names.
        recipe: what counts of the step's recipe.
        dimension: length of its vectors, where that is known.
    """

    columns: tuple[str, ...]
    recipe: Mapping[str, Any]
    dimension: int | None = None


@dataclass(frozen=True)
class Facts:
    """What columns would be made from, as it is now.

    Attributes:
        samples: fingerprint of the shard's samples.
        pairing: how rows and images would be paired.
        ids: digest of the table's ids; empty where they were not read.
        changed: why the samples are not those of a recorded fingerprint, asked of the source; "" where they are.
        images: whether there are images at all.
        uncounted: recipe fields that do not count for this shard.
    """

    samples: Mapping[str, Any]
    pairing: Mapping[str, Any]
    ids: str = ""
    changed: Any = None
    images: bool = True
    uncounted: frozenset[str] = frozenset()

    def samples_changed(self, recorded: Mapping[str, Any]) -> str:
        """Why a column that was made from ``recorded`` is not of the samples of now; "" where it is."""
        if self.changed is not None:
            return str(self.changed(recorded))
        return "" if recorded == self.samples else "the images have changed since"


@dataclass(frozen=True)
class Judgement:
    """What is to be done about a shard.

    Attributes:
        todo: positions of the steps that must run.
        done: the file is there and is what this run would write.
        conflict: why it must not be written; None when nothing stands in the way.
        footer: of the file whose columns are carried over (the output itself when done or in place).
        rows: rows of the finished output, or of the table that will be read; None when not known.
        notes: what a person should know of a shard that is done.
    """

    todo: tuple[int, ...]
    done: bool = False
    conflict: Conflict | None = None
    footer: Footer = field(default_factory=Footer)
    rows: int | None = None
    notes: tuple[str, ...] = ()


def stale(entry: Entry | None, wanted: Wanted, facts: Facts) -> tuple[ConflictKind, str] | None:
    """Why a column that is there is not what a step would make; None when it is.

    Args:
        entry: what made the column; None where it does not say.
    """
    if entry is None:
        return ConflictKind.FOREIGN_COLUMN, "is already there and does not say what made it"
    made, now = (counted(recipe, without=facts.uncounted) for recipe in (entry.recipe, wanted.recipe))
    if made != now:
        return ConflictKind.OTHER_RECIPE, f"was made another way ({_difference(made, now)})"
    if None not in (entry.dimension, wanted.dimension) and entry.dimension != wanted.dimension:
        why = f"was made another way (dimension: {entry.dimension} there, {wanted.dimension} now)"
        return ConflictKind.OTHER_RECIPE, why
    return outdated(entry, facts)


def outdated(entry: Entry, facts: Facts) -> tuple[ConflictKind, str] | None:
    """Why what a column was made from is no longer what it would be made from; None when it is."""
    if not facts.images and made_from_images(entry):
        return ConflictKind.IMAGES_GONE, "was made from images that are no longer there"
    if why := facts.samples_changed(entry.samples):
        return ConflictKind.OTHER_SAMPLES, f"was made from images that have changed since ({why})"
    if entry.pairing != facts.pairing:
        how = _difference(entry.pairing, facts.pairing)
        return ConflictKind.OTHER_PAIRING, f"was made with rows and images paired another way ({how})"
    if facts.ids and entry.ids and entry.ids != facts.ids:
        return ConflictKind.OTHER_IDS, "was made for other ids, or for the same ids in another order"
    return None


def made_from_images(entry: Entry) -> bool:
    """Whether there were images when the column was made; a shard without any has samples of no size."""
    return bool(entry.samples) and entry.samples.get("size", 0) is not None


@dataclass(frozen=True)
class Status:
    """What a table's columns still need.

    Attributes:
        todo: positions of the steps that must run.
        column, kind, why: the first column that is in the way, what kind of conflict it is, and why; kind None when
            there is none.
        replaced: columns of ours that will be made anew because they are out of date or made another way.
    """

    todo: tuple[int, ...]
    column: str = ""
    kind: ConflictKind | None = None
    why: str = ""
    replaced: tuple[str, ...] = ()


def judge_columns(
    names: Collection[str],
    entries: Mapping[str, Entry],
    wanted: Sequence[Wanted],
    facts: Facts,
    *,
    overwrite: bool = False,
    replace_ours: bool = False,
) -> Status:
    """Which steps must run over a table, and which of its columns stand in the way.

    Args:
        names: of the table's columns.
        entries: what made those that say so.
        overwrite: everything is made anew, whatever is there.
        replace_ours: a column that says what made it is no obstacle: the input keeps it, a new file gets its own.
    """
    todo: list[int] = []
    replaced: list[str] = []
    if not facts.ids and (errors := entries.get(ERROR_COLUMN)) is not None:
        facts = replace(facts, ids=errors.ids)  # the last run read them
    for position, step in enumerate(wanted):
        present = [name for name in step.columns if name in names]
        if overwrite or len(present) < len(step.columns):
            todo.append(position)
        for name in present:
            found = stale(entries.get(name), step, facts)
            if found is None or overwrite:
                continue
            kind, why = found
            if not replace_ours or kind is ConflictKind.FOREIGN_COLUMN:
                return Status((), name, kind, f"column '{name}' {why}")
            replaced.append(name)
            if position not in todo:
                todo.append(position)
    return Status(tuple(todo), replaced=tuple(replaced))


def _difference(made: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Name the first fields that differ, shortly: "model: 'a' there, 'b' now"."""
    if isinstance(unrepeatable := wanted.get("unrepeatable"), Mapping):
        return str(unrepeatable.get("why"))
    keys = [key for key in sorted({*made, *wanted}) if made.get(key) != wanted.get(key)]

    def short(value: Any) -> str:
        text = repr(value)
        return text if len(text) <= 60 else text[:57] + "..."

    return "; ".join(f"{key}: {short(made.get(key))} there, {short(wanted.get(key))} now" for key in keys[:3])


# -- whole shards --------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """A parquet file as its footer shows it; without a schema there is none, or none that is needed.

    Attributes:
        path: without passwords and signatures.
        schema: its columns.
        rows: how many it has; may be known without the schema.
        footer: our entry in it.
        damaged: why it cannot be read, where there is one that cannot.
        mark: what changes when it is replaced (size and mtime, or etag); None where that is not known.
    """

    path: str
    schema: pa.Schema | None = None
    rows: int | None = None
    footer: Footer = field(default_factory=Footer)
    damaged: str = ""
    mark: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Asked:
    """What a run asks of a shard's table.

    Attributes:
        wanted: an entry a step.
        id_col: the dataset's id column.
        options: how rows and columns are chosen, as the footer has it; empty in place.
        select: the input's columns a new output gets; None for all.
        overwrite: make everything anew.
        output: the output's folder, for advice; empty in place.
    """

    wanted: tuple[Wanted, ...]
    id_col: str
    options: Mapping[str, Any] = field(default_factory=dict)
    select: tuple[str, ...] | None = None
    overwrite: bool = False
    output: str = ""


def judge_in_place(there: Stored, asked: Asked, facts: Facts) -> Judgement:
    """A shard whose own table gets the columns."""
    every = tuple(range(len(asked.wanted)))
    if there.schema is None:  # there is none, or one that cannot be read: the shard's run says why
        return Judgement(every)
    footer = there.footer

    def refused(kind: ConflictKind, why: str, remedy: str = "") -> Judgement:
        return Judgement((), False, Conflict(kind, there.path, why, remedy), footer, there.rows)

    if unusable := _ids_unusable(there.schema, asked.id_col):
        return refused(ConflictKind.NO_ID_COLUMN, unusable, _CHOOSE_IDS)
    status = judge_columns(there.schema.names, footer.columns, asked.wanted, facts, overwrite=asked.overwrite)
    if status.kind is None and footer.rows is not None and footer.rows != there.rows:
        # Somebody added or removed rows and kept our footer: all rows are worked on again.
        status = Status(every)
    gone = not facts.images and any(map(made_from_images, footer.columns.values()))
    if gone and (status.todo or status.kind is ConflictKind.IMAGES_GONE):
        why = "has columns made from images that are no longer there; new ones would have no value in any row"
        return refused(ConflictKind.IMAGES_GONE, why, _RESTORE_IMAGES)
    if status.kind is not None:
        return refused(status.kind, status.why)
    if asked.wanted and not asked.overwrite and _foreign_errors(there.schema, footer):
        return refused(ConflictKind.FOREIGN_COLUMN, f"column '{ERROR_COLUMN}' {_DOES_NOT_SAY}", _ERRORS_ANEW)
    return Judgement(status.todo, not status.todo, None, footer, there.rows)


def judge_output(
    there: Stored, table: Stored | None, asked: Asked, facts: Facts, *, own: bool = False, ids: str = ""
) -> Judgement:
    """A shard whose rows and columns go into a new file.

    Args:
        there: the new file, which may be there.
        table: the table it is made from; None without one.
        own: whether these two are one file.
        ids: digest of the table's ids, where it was taken because the table has changed since.
    """
    if own:
        why = "is the dataset's own table"
        return Judgement((), conflict=Conflict(ConflictKind.OWN_TABLE, there.path, why, _OWN_TABLE))
    made = {name for step in asked.wanted for name in step.columns}
    files = [there] if table is None else [there, table]
    if not facts.images and any(
        made_from_images(entry) for file in files for name, entry in file.footer.columns.items() if name in made
    ):
        why = "has columns made from images that are no longer there; they would have no value in any row"
        return Judgement((), conflict=Conflict(ConflictKind.IMAGES_GONE, there.path, why, _RESTORE_IMAGES))
    if there.schema is not None and not asked.overwrite:
        found = _judge_existing(there, table, asked, facts, ids)
        if found is not None:
            return found
    if there.damaged and not asked.overwrite:
        why = f"cannot be read and would be replaced ({there.damaged})"
        return Judgement((), conflict=Conflict(ConflictKind.DAMAGED, there.path, why))
    if table is None or table.schema is None:
        return Judgement(tuple(range(len(asked.wanted))), rows=None if table is None else table.rows)
    if unusable := _ids_unusable(table.schema, asked.id_col):
        return Judgement((), conflict=Conflict(ConflictKind.NO_ID_COLUMN, table.path, unusable, _CHOOSE_IDS))
    # Columns that are already right in the input are copied, not computed again.
    footer = table.footer
    status = judge_columns(
        table.schema.names, footer.columns, asked.wanted, facts, overwrite=asked.overwrite, replace_ours=True
    )
    conflict: Conflict | None = None
    if status.kind is not None:
        conflict = Conflict(status.kind, there.path, f"{status.why}, in the table {table.path}")
    elif asked.wanted and not asked.overwrite and _foreign_errors(table.schema, footer):
        why = f"column '{ERROR_COLUMN}' {_DOES_NOT_SAY}"
        conflict = Conflict(ConflictKind.FOREIGN_COLUMN, table.path, why, _ERRORS_ANEW)
    notes = [
        f"{table.path}: its column '{name}' is of another run; the new file has its own" for name in status.replaced
    ]
    return Judgement(() if conflict else status.todo, False, conflict, footer, table.rows, tuple(notes))


def _judge_existing(there: Stored, table: Stored | None, asked: Asked, facts: Facts, ids: str) -> Judgement | None:
    """An output that is there and is not to be made anew; None where it may be replaced all the same."""
    assert there.schema is not None
    footer = there.footer
    status = judge_columns(there.schema.names, footer.columns, asked.wanted, facts)
    # A limited run writes whole shards as any run does; only the last one is cut.
    whole = {name: value for name, value in asked.options.items() if name != "limit"}
    rows, why_rows, notes = _rows_changed(there, table, ids)
    if footer.output in (asked.options, whole) and not status.todo and status.kind is None and not rows:
        return Judgement((), True, None, footer, there.rows, notes)
    if "limit" in footer.output:
        return None  # the trial gives way to the whole

    def refused(kind: ConflictKind, why: str, remedy: str = "") -> Judgement:
        return Judgement((), False, Conflict(kind, there.path, why, remedy), footer, there.rows)

    if not footer.output and footer.columns:
        return refused(ConflictKind.COLUMNS_ADDED, _COLUMNS_ADDED, _as_tables(asked.output))
    if not footer.output:
        return refused(ConflictKind.STRANGER, "the file is already there and is not an output of curator-embed")
    if status.kind is not None:
        return refused(status.kind, status.why)
    if footer.output not in (asked.options, whole):
        why = f"was written with other options ({footer.output} there, {dict(asked.options)} now)"
        return refused(ConflictKind.OTHER_OPTIONS, why)
    if rows:
        return refused(ConflictKind.OTHER_ROWS, why_rows)
    return refused(ConflictKind.LACKS_COLUMNS, "is already there, without the new columns", _as_tables(asked.output))


def _rows_changed(there: Stored, table: Stored | None, ids: str) -> tuple[bool, str, tuple[str, ...]]:
    """Whether an output was made from other rows than its table has now, with why, and what else to tell."""
    made_from = there.footer.table
    written, now = made_from.get("rows"), None if table is None else table.rows
    if written is None and table is not None:
        # An output without a table behind it has the rows of its own that a table made since may have, too.
        written = there.footer.counts.get("read")
    if written != now:
        before, after = ("no table" if rows is None else f"a table of {rows} rows" for rows in (written, now))
        return True, f"was written from {before}, and there is {after} now", ()
    if table is None or table.mark is None or not made_from or same_mark(made_from, table.mark):
        return False, "", ()
    if not ids or not made_from.get("ids"):
        return False, "", (_TABLE_CHANGED.format(path=table.path, rows="whether its ids are the same cannot be told"),)
    if ids != made_from["ids"]:
        return True, f"was written from other rows than {table.path} has now: its ids have changed", ()
    return False, "", (_TABLE_CHANGED.format(path=table.path, rows="its ids are the same"),)


def same_mark(recorded: Mapping[str, Any], mark: Mapping[str, Any]) -> bool:
    """Whether a file is the one that a footer speaks of, by size and mtime or etag."""
    return all(recorded.get(name) == value for name, value in mark.items())


def _ids_unusable(schema: pa.Schema, id_col: str) -> str:
    count = schema.names.count(id_col)
    if count == 1:
        return ""
    there = ", ".join(schema.names[:12])
    what = f"no column '{id_col}'" if not count else f"has {count} columns named '{id_col}'"
    return f"{what} to pair rows and images by (it has: {there})"


def _foreign_errors(schema: pa.Schema, footer: Footer) -> bool:
    return ERROR_COLUMN in schema.names and ERROR_COLUMN not in footer.columns


def _as_tables(output: str) -> str:
    return (
        "To add columns to it, leave the output path out and name that folder as the one of the tables: "
        f"metadata_path='{output}'"
    )


_DOES_NOT_SAY = "is already there and does not say what made it"
_ERRORS_ANEW = "Pass overwrite=True to replace it; every run that looks at images writes this column"
_CHOOSE_IDS = "Choose the id column with id_col="
_RESTORE_IMAGES = "Restore the images, or leave this shard out"
_OWN_TABLE = "Leave the output path out to add columns to it, or choose another"
_COLUMNS_ADDED = (
    "is already there, without the note of how its rows were chosen: version 0.1.0 added columns to it since, and "
    "overwriting would drop them"
)
_TABLE_CHANGED = (
    "{path} has changed since the output was made from it: {rows}, and other columns that were copied are as they "
    "were; overwrite=True copies them anew"
)
