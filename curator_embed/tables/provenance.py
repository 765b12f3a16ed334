"""What made a column: the parquet footer, and whether a shard is done.

A run may skip a shard on the strength of its footer alone, so what counts is decided here, once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from curator_embed.steps import Step

FOOTER_KEY = b"curator_embed"
FORMAT = 1
ERROR_COLUMN = "image_error"

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
class Footer:
    """Our entry in a parquet file's key-value metadata.

    Attributes:
        columns: per column ``{"recipe": ..., "samples": ...}``: what made it, and from which samples.
        counts: ``{"read", "embedded", "failed", "no_image", "reasons"}`` of the shard.
        output: how the rows were chosen (``on_error``, ``columns``, ``limit``); empty in place.
        id_col: name of the id column.
        table: the table that an output was made from: its ``rows``, size and mtime or etag; empty in place.
    """

    columns: dict[str, dict[str, Any]] = field(default_factory=dict)
    counts: dict[str, Any] = field(default_factory=dict)
    output: dict[str, Any] = field(default_factory=dict)
    id_col: str = "key"
    table: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, schema: pa.Schema) -> Footer:
        """Read it from a schema; an absent or unreadable entry is an empty footer."""
        raw = (schema.metadata or {}).get(FOOTER_KEY)
        if raw is None:
            return cls()
        try:
            value = json.loads(raw)
            if value.get("format") != FORMAT:
                return cls()
            return cls(
                value["columns"],
                value.get("counts", {}),
                value.get("output", {}),
                value.get("id_col", "key"),
                value.get("table", {}),
            )
        except (ValueError, KeyError, AttributeError):
            return cls()

    def to_bytes(self) -> bytes:
        """The stored form: canonical JSON, UTF-8."""
        value = {
            "format": FORMAT,
            "id_col": self.id_col,
            "columns": self.columns,
            "counts": self.counts,
            "output": self.output,
            "table": self.table,
        }
        return canonical_json(value).encode()


@dataclass(frozen=True)
class Status:
    """What a shard still needs.

    Attributes:
        todo: positions of the steps that must run; empty when the shard is done.
        conflict: why it must not be touched without ``overwrite=True``; empty when nothing stands in the way.
    """

    todo: tuple[int, ...]
    conflict: str = ""


def same_samples(recorded: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> bool:
    """Whether a column was made from the samples that are stored now."""
    return all(recorded.get(key) == value for key, value in fingerprint.items())


def status(
    schema: pa.Schema | None,
    steps: Sequence[Step],
    fingerprint: Mapping[str, Any],
    *,
    overwrite: bool = False,
    recipes: Sequence[Mapping[str, Any]] | None = None,
) -> Status:
    """Decide from a file's schema alone which steps a shard still needs.

    Args:
        schema: of the file that would be changed or copied; None when there is none yet.
        fingerprint: of the shard's samples as they are now.
        overwrite: replace columns that came from elsewhere or from another recipe.
        recipes: ``counted(step.recipe())`` of every step, where it is at hand.
    """
    if schema is None:
        return Status(tuple(range(len(steps))))
    footer = Footer.of(schema)
    todo: list[int] = []
    for position, step in enumerate(steps):
        recipe = counted(step.recipe()) if recipes is None else recipes[position]
        present = [name for name in step.columns() if name in schema.names]
        if not present:
            todo.append(position)
            continue
        for name in present:
            made = footer.columns.get(name)
            if made is None:
                why = f"column '{name}' is already there and does not say what made it"
            elif counted(made.get("recipe", {})) != recipe:
                why = f"column '{name}' was made another way ({_difference(made.get('recipe', {}), recipe)})"
            elif not same_samples(made.get("samples", {}), fingerprint):
                why = f"column '{name}' was made from images that have changed since"
            else:
                continue
            if not overwrite:
                return Status((), why)
            todo.append(position)
            break
        else:
            if len(present) < len(step.columns()):
                todo.append(position)
    return Status(tuple(todo))


def _difference(made: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Name the first fields that differ, shortly: "model: 'a' there, 'b' now"."""
    made = counted(made)
    keys = [key for key in sorted({*made, *wanted}) if made.get(key) != wanted.get(key)]

    def short(value: Any) -> str:
        text = repr(value)
        return text if len(text) <= 60 else text[:57] + "..."

    return "; ".join(f"{key}: {short(made.get(key))} there, {short(wanted.get(key))} now" for key in keys[:3])


def recorded_settings(footers: Sequence[Footer], step: Step) -> dict[str, Any] | None:
    """Threads and compile that finished shards of this very step were made with, or None."""
    wanted = counted(step.recipe(), without=SETTLED_PER_RUN)
    for footer in footers:
        for name in step.columns():
            recipe = footer.columns.get(name, {}).get("recipe", {})
            if counted(recipe, without=SETTLED_PER_RUN) == wanted:
                return {key: recipe.get(key) for key in SETTLED_PER_RUN}
    return None
