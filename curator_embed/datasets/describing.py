"""What a dataset or an output holds, told from footers alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from curator_embed.errors import UsageError
from curator_embed.execution.output import Location
from curator_embed.execution.provenance import Footer, canonical_json
from curator_embed.sources.files import is_folder, list_files, natural_key


@dataclass
class DatasetDescription:
    """Facts about a folder of shards.

    Attributes:
        tars: tar files.
        tables: parquet files.
        rows: rows of all tables.
        columns: name -> type, of the first table.
        made: column -> ways it was made, each with the number of files.
        counts: rows read, embedded, failed, no_image and the reasons, summed over the files that say.
        problems: files that cannot be read, with why.
    """

    path: str
    tars: int = 0
    tables: int = 0
    rows: int = 0
    columns: dict[str, str] = field(default_factory=dict)
    made: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    counts: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dict(vars(self))

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.tars:,} tars, {self.tables:,} parquet files, {self.rows:,} rows", "columns:"]
        for name, kind in self.columns.items():
            lines.append(f"  {name:<22} {kind}")
            for made in self.made.get(name, []):
                lines.append(f"    made by {_in_words(made['recipe'])} ({made['files']:,} files)")
        if self.counts.get("read"):
            reasons = ", ".join(f"{code} {count:,}" for code, count in self.counts["reasons"].items())
            lines.append(
                f"rows: {self.counts['read']:,} read, {self.counts['embedded']:,} embedded, "
                f"{self.counts['failed']:,} failed{f' ({reasons})' if reasons else ''}, "
                f"{self.counts['no_image']:,} without image"
            )
        lines += [f"problem: {problem}" for problem in self.problems]
        return "\n".join(lines)


def _in_words(recipe: Mapping[str, Any]) -> str:
    parts = [str(recipe.get("model") or recipe.get("step") or "?")]
    for key in ("weights", "batch_shape", "threads", "compile", "dtype", "device"):
        if key in recipe:
            value = recipe[key]
            text = value[:19] + "..." if isinstance(value, str) and len(value) > 22 else canonical_json(value)
            parts.append(f"{key} {text}")
    return ", ".join(parts)


def describe_dataset(path: str, *, storage_options: Mapping[str, Any] | None = None) -> DatasetDescription:
    """Describe a folder of shards, or one parquet file.

    Raises:
        UsageError: there is neither a tar nor a parquet file.
    """
    options = dict(storage_options or {})
    if path.endswith(".parquet"):
        tables, tars = [path], []
    elif not path.endswith(".tar") and not is_folder(path, options):
        raise UsageError(f"{path}: no such folder, and no tar or parquet file")
    else:
        tables = sorted(list_files(path, ".parquet", options), key=natural_key)
        tars = [path] if path.endswith(".tar") else list_files(path, ".tar", options)
    if not tables and not tars:
        raise UsageError(f"{path}: neither tars nor parquet files there")
    found = DatasetDescription(path, tars=len(tars), tables=len(tables))
    recipes: dict[str, Counter[str]] = {}
    sums: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    with ThreadPoolExecutor(8) as pool:
        for schema, rows, problem in pool.map(lambda table: _look(table, options), tables):
            if problem or schema is None:
                found.problems.append(problem)
                continue
            found.rows += rows
            if not found.columns:
                found.columns = {item.name: str(item.type) for item in schema}
            footer = Footer.of(schema)
            for name, made in footer.columns.items():
                recipes.setdefault(name, Counter())[canonical_json(made.get("recipe", {}))] += 1
            sums.update({key: value for key, value in footer.counts.items() if isinstance(value, int)})
            reasons.update(footer.counts.get("reasons", {}))
    found.made = {
        name: [{"recipe": json.loads(text), "files": count} for text, count in counter.most_common()]
        for name, counter in recipes.items()
    }
    found.counts = {key: sums.get(key, 0) for key in ("read", "embedded", "failed", "no_image")}
    found.counts["reasons"] = dict(sorted(reasons.items()))
    return found


def _look(path: str, options: Mapping[str, Any]) -> tuple[pa.Schema | None, int, str]:
    try:
        with Location.of(path, options).open_parquet() as parquet:
            return parquet.schema_arrow, parquet.metadata.num_rows, ""
    except Exception as error:
        return None, 0, str(error) if path in str(error) else f"{path}: {error}"
