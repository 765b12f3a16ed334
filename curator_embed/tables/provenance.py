"""What made a column, and from what: our entry in a parquet file's key-value metadata.

Plain values and their stored form. What follows from them is ``judge.py``'s.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

from curator_embed.steps import Step

FOOTER_KEY = b"curator_embed"
FORMAT = 2
READABLE = (1, 2)
ERROR_COLUMN = "image_error"
ERROR_RECIPE = {"step": "image_error"}
ASSIGNED = {"step": "assigned"}
"""The recipe of columns that came from a user's data frame; with a digest of the values."""

RECORDED_ONLY = frozenset({"software", "exceptions"})
"""Recipe fields that are written down but do not make a column stale (versions, out-of-memory halvings)."""

SETTLED_PER_RUN = frozenset({"threads", "compile"})
"""Recipe fields that a run settles for itself and a resumed run takes over from the finished shards."""


def counted(recipe: Mapping[str, Any], *, without: frozenset[str] = frozenset()) -> dict[str, Any]:
    """The part of a recipe that decides whether a column is up to date."""
    return {k: v for k, v in recipe.items() if k not in RECORDED_ONLY and k not in without}


def canonical_json(value: Any) -> str:
    """JSON whose text depends on the value alone, so that footers compare byte for byte."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


@dataclass(frozen=True)
class Entry:
    """What made one column, and from what.

    Attributes:
        recipe: what made it, as ``Step.recipe`` gives it.
        samples: identifies the samples it was made from (``Shard.fingerprint``); empty for what was made from none.
        pairing: how rows and images were paired (``Shard.pairing``: id column, key rule, index files, image column).
        ids: digest of the ids in the rows' order (``ids_digest``); empty where it was not taken.
        dimension: length of the vectors, of a column of vectors; None for others, and where there is not one vector.
    """

    recipe: dict[str, Any] = field(default_factory=dict)
    samples: dict[str, Any] = field(default_factory=dict)
    pairing: dict[str, Any] = field(default_factory=dict)
    ids: str = ""
    dimension: int | None = None

    @property
    def digest(self) -> str:
        """Identifies what a column holds, for what is made from it: sha256, 32 hexadecimal digits."""
        stored = {**self.to_dict(), "recipe": counted(self.recipe)}
        return hashlib.sha256(canonical_json(stored).encode("utf-8", "surrogatepass")).hexdigest()[:32]

    def to_dict(self) -> dict[str, Any]:
        """The stored form; what does not apply is left out."""
        value: dict[str, Any] = {"recipe": self.recipe, "samples": {**self.samples, **_given(ids=self.ids)}}
        return value | _given(pairing=self.pairing) | ({} if self.dimension is None else {"dimension": self.dimension})

    @classmethod
    def of(cls, value: Mapping[str, Any], id_col: str) -> Entry:
        """From the stored form, that of version 0.1.0 too.

        Args:
            id_col: the file's id column: 0.1.0 wrote down no pairing of its own, but what counts of it can be told.

        Raises:
            TypeError: it is not of this form.
        """
        samples = dict(_checked(value.get("samples", {}), dict))
        ids = _checked(samples.pop("ids", ""), str)
        pairing = value.get("pairing")
        if pairing is None and samples:
            pairing = {"id_col": id_col, **_pairing_of_0_1_0(samples)}
        dimension = value.get("dimension")
        return cls(
            dict(_checked(value.get("recipe", {}), dict)),
            samples,
            dict(_checked(pairing or {}, dict)),
            ids,
            None if dimension is None else _checked(dimension, int),
        )


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value}


def _pairing_of_0_1_0(samples: dict[str, Any]) -> dict[str, Any]:
    """What version 0.1.0 wrote down among the samples, and how they were paired is now; takes it out of them."""
    found: dict[str, Any] = {}
    for name in ("key_split", "index"):
        if name in samples:
            found[name] = samples.pop(name)
    images = samples.get("images")
    if isinstance(images, dict) and "column" in images:
        images = dict(images)
        found["image_col"] = images.pop("column")
        samples["images"] = images
    return found


_NOTHING: dict[str, Any] = {}
"""The empty part of many footers, which nobody changes."""


def _interned(counts: Mapping[str, Any]) -> dict[str, Any]:
    """Counts whose names are the same objects in every shard's."""
    return {sys.intern(k): (_interned(v) if v else _NOTHING) if isinstance(v, dict) else v for k, v in counts.items()}


@dataclass(frozen=True)
class Footer:
    """Our entry in a parquet file's key-value metadata.

    Attributes:
        columns: what made each of our columns.
        counts: ``{"read", "embedded", "failed", "no_image", "reasons"}`` of the file's rows.
        output: how the rows were chosen (``on_error``, ``columns``, ``limit``, ``export``); empty in place.
        id_col: name of the id column.
        table: the table that an output was made from: its ``rows``, size and mtime or etag, ``ids``; empty without one.
        rows: of this file; None where version 0.1.0 wrote it.
        dropped: rows that the output was made without, as ``{"failed", "no_image", "reasons"}``.
    """

    columns: dict[str, Entry] = field(default_factory=dict)
    counts: dict[str, Any] = field(default_factory=dict)
    output: dict[str, Any] = field(default_factory=dict)
    id_col: str = "key"
    table: dict[str, Any] = field(default_factory=dict)
    rows: int | None = None
    dropped: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, schema: pa.Schema) -> Footer:
        """Read it from a schema. An entry that is absent, damaged or of a later version is an empty footer: its
        columns then do not say what made them, and nothing replaces them unasked."""
        raw = (schema.metadata or {}).get(FOOTER_KEY)
        if raw is None:
            return cls()
        try:
            value = json.loads(raw)
            if value["format"] not in READABLE:
                return cls()
            id_col = _checked(value.get("id_col", "key"), str)
            entries = _checked(value["columns"], dict).items()
            output = _checked(value.get("output", {}), dict)
            marks = _checked(value.get("marks", {}), dict)
            found = cls(
                {name: _with_marks(Entry.of(_checked(made, dict), id_col), marks) for name, made in entries},
                _counts(value.get("counts", {})),
                output,
                id_col,
                _checked(value.get("table", {}), dict),
                None if value.get("rows") is None else _checked(value["rows"], int),
                _tally(value.get("dropped", {})),
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return cls()
        return found if value["format"] == FORMAT else _of_0_1_0(found)

    def only_counts(self) -> Footer:
        """The counts without all else, in little memory: a run keeps this of every shard."""
        counts, dropped = (_interned(found) if found else _NOTHING for found in (self.counts, self.dropped))
        return Footer(_NOTHING, counts, _NOTHING, self.id_col, _NOTHING, self.rows, dropped)

    def accounted(self) -> dict[str, Any]:
        """The counts, with the rows that the output was made without."""
        if not self.dropped:
            return self.counts
        reasons = Counter(self.counts.get("reasons", {})) + Counter(self.dropped.get("reasons", {}))
        failed, no_image = self.dropped.get("failed", 0), self.dropped.get("no_image", 0)
        return {
            "read": self.counts.get("read", 0) + failed + no_image,
            "embedded": self.counts.get("embedded", 0),
            "failed": self.counts.get("failed", 0) + failed,
            "no_image": self.counts.get("no_image", 0) + no_image,
            "reasons": dict(sorted(reasons.items())),
        }

    def to_bytes(self) -> bytes:
        """The stored form: canonical JSON, UTF-8."""
        columns = {name: entry.to_dict() for name, entry in self.columns.items()}
        marks = _without_marks(columns)
        value = {
            "format": FORMAT,
            "id_col": self.id_col,
            "columns": columns,
            "counts": self.counts,
            "output": self.output,
            "table": self.table,
            **({} if self.rows is None else {"rows": self.rows}),
            **_given(dropped=self.dropped, marks=marks),
        }
        return canonical_json(value).encode("utf-8", "backslashreplace")


def _without_marks(columns: Mapping[str, dict[str, Any]]) -> dict[str, str]:
    """Take the marks of single images out of stored entries: they are long, and one copy serves all columns.

    Returns:
        Digest of the images -> their marks.
    """
    marked = [made["samples"] for made in columns.values() if {"files", "marks"} <= made["samples"].keys()]
    return {samples["files"]: samples.pop("marks") for samples in marked}


def _with_marks(entry: Entry, marks: Mapping[str, Any]) -> Entry:
    digest = entry.samples.get("files")
    if not isinstance(digest, str) or digest not in marks:
        return entry
    return replace(entry, samples={**entry.samples, "marks": marks[digest]})


def _of_0_1_0(footer: Footer) -> Footer:
    """What version 0.1.0 meant: it counted rows that it dropped, and its digests were of the input's ids."""
    rows = None if footer.output.get("on_error") == "drop" else footer.counts.get("read")
    columns, table = footer.columns, footer.table
    if footer.output:
        ids = next((entry.ids for entry in columns.values() if entry.ids), "")
        if table and ids and "limit" not in footer.output:
            table = {**table, "ids": ids}
        columns = {name: replace(entry, ids="") for name, entry in columns.items()}
    return replace(footer, columns=columns, rows=rows, table=table)


def _checked(value: Any, kind: type) -> Any:
    """A value of this type; what JSON calls true is no number.

    Raises:
        TypeError: it is of another.
    """
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{type(value).__name__} where {kind.__name__} belongs")
    return value


def _counts(value: Any) -> dict[str, Any]:
    found = _tally(value)
    return found | {name: _number(found[name]) for name in ("read", "embedded") if name in found}


def _tally(value: Any) -> dict[str, Any]:
    found = dict(_checked(value, dict))
    for name in ("failed", "no_image"):
        _number(found.get(name, 0))
    for code, count in _checked(found.get("reasons", {}), dict).items():
        _checked(code, str), _number(count)
    return found


def _number(value: Any) -> int:
    if _checked(value, int) < 0:
        raise ValueError(f"{value} rows")
    return int(value)


def recorded_settings(footers: Sequence[Footer], step: Step) -> dict[str, Any] | None:
    """Threads and compile that finished shards of this very step were made with, or None."""
    wanted = counted(step.recipe(), without=SETTLED_PER_RUN)
    for footer in footers:
        for name in step.columns():
            recipe = footer.columns[name].recipe if name in footer.columns else {}
            threads, compiled = recipe.get("threads"), recipe.get("compile")
            sound = isinstance(threads, int | None) and isinstance(compiled, bool | None)
            if sound and counted(recipe, without=SETTLED_PER_RUN) == wanted:
                return {"threads": threads, "compile": compiled}
    return None
