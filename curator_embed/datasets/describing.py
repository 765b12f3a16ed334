"""What a dataset or an output holds, told from footers alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from curator_embed.sources.shard import Shard
from curator_embed.storage.files import redact
from curator_embed.storage.location import Location
from curator_embed.tables.bookkeeping import Bookkeeping
from curator_embed.tables.judge import outdated as outdated_of
from curator_embed.tables.lock import holder
from curator_embed.tables.provenance import Footer, canonical_json
from curator_embed.tables.shard_table import ShardTable, facts_of

if TYPE_CHECKING:
    from curator_embed.datasets.image_text_pair import ImageTextPairDataset

SHOWN_PROBLEMS = 10
"""Files that cannot be read and are named in the text; ``to_dict`` names all."""


@dataclass
class DatasetDescription:
    """Facts about a dataset.

    Attributes:
        path: as it was named, without passwords and signatures.
        kind: "webdataset", "path-list", "folder" or "parquet"; "output" of tables alone that runs have written.
        shards: in all; a run writes a file for each.
        tars: shards whose images lie in a tar of their own.
        images: lines of a list, images of a folder; None where only reading would tell.
        images_below: the root of a path list.
        tables: parquet files that are there; ``tables_in`` is the folder where they are, or would be written to: of
            several the one that holds them all, and ``tables_folders`` is their number.
        bookkeeping: where reports and locks of these folders lie, as far as there are any.
        last_run: when the last of these reports was written, UTC; empty without one.
        held_by: who is writing to one of these folders now; empty when nobody is.
        rows: of these tables.
        columns: name -> type, of the first table.
        made: column -> ways it was made, each with the number of files.
        outdated: column -> why it is out of date, each with the number of files.
        verified: whether ids were read for that.
        unverified: files of which some columns do not say what made them, though they do in other files.
        counts: rows read, embedded, failed, no_image and the reasons, summed over the files that say.
        problems: files that cannot be read, with why.
    """

    path: str
    kind: str
    shards: int
    tars: int
    images: int | None
    images_below: str
    tables: int = 0
    tables_in: str = ""
    tables_folders: int = 1
    bookkeeping: list[str] = field(default_factory=list)
    last_run: str = ""
    held_by: str = ""
    rows: int = 0
    columns: dict[str, str] = field(default_factory=dict)
    made: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    outdated: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    verified: bool = False
    unverified: int = 0
    counts: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dict(vars(self))

    def __str__(self) -> str:
        lines = [self._head(), self._tables()]
        if self.columns:
            lines.append("columns:")
        for name, kind in self.columns.items():
            lines.append(f"  {name:<22} {kind}")
            for made in self.made.get(name, []):
                lines.append(f"    made by {_in_words(made['recipe'])} ({_count(made['files'], 'file')})")
            for stale in self.outdated.get(name, []):
                lines.append(f"    out of date in {_count(stale['files'], 'file')}: {stale['why']}")
        if self.counts.get("read"):
            reasons = ", ".join(f"{code} {count:,}" for code, count in self.counts["reasons"].items())
            lines.append(
                f"rows: {self.counts['read']:,} read, {self.counts['embedded']:,} embedded, "
                f"{self.counts['failed']:,} failed{f' ({reasons})' if reasons else ''}, "
                f"{self.counts['no_image']:,} without image"
            )
        if self.verified and self.unverified:
            lines.append(
                f"not verified: {_count(self.unverified, 'file')} of {self.tables:,} not saying what made them"
            )
        elif self.verified and not self.outdated:
            lines.append("verified: all columns were made for the ids of their rows")
        if self.bookkeeping:
            last = f", last run {self.last_run}" if self.last_run else ""
            others = f" and {len(self.bookkeeping) - 1:,} more" if len(self.bookkeeping) > 1 else ""
            lines.append(f"reports: in {self.bookkeeping[0]}{others}{last}")
        if self.held_by:
            lines.append(f"in use: {self.held_by}")
        lines += [f"problem: {problem}" for problem in self.problems[:SHOWN_PROBLEMS]]
        if (more := len(self.problems) - SHOWN_PROBLEMS) > 0:
            lines.append(f"problem: ... and {more:,} more")
        return "\n".join(lines)

    def _head(self) -> str:
        parts = [self.kind, _count(self.shards, "shard")]
        if self.images is not None:
            parts.append(_count(self.images, "line" if self.kind == "path-list" else "image"))
        elif self.kind in ("webdataset", "output"):
            parts.append(_count(self.tars, "tar") if self.tars else "tables alone")
        if self.images_below:
            parts.append(f"images below {self.images_below}")
        return f"{self.path}: {', '.join(parts)}"

    def _tables(self) -> str:
        where = f"in {self.tables_in}"
        if self.tables_folders > 1:
            where = f"in {self.tables_folders:,} folders below {self.tables_in}"
        if not self.tables:
            return f"tables: none yet {where}"
        missing = f" for {self.shards:,} shards" if self.tables < self.shards else ""
        return f"tables: {_count(self.tables, 'parquet file')}{missing}, {_count(self.rows, 'row')}, {where}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _in_words(recipe: Mapping[str, Any]) -> str:
    parts = [str(recipe.get("model") or recipe.get("step") or "?")]
    for key in ("weights", "batch_shape", "threads", "compile", "cuda_graphs", "dtype", "device"):
        if key in recipe:
            value = recipe[key]
            text = value[:19] + "..." if isinstance(value, str) and len(value) > 22 else canonical_json(value)
            parts.append(f"{key} {text}")
    return ", ".join(parts)


def describe_dataset(
    dataset: ImageTextPairDataset, path: str, kind: str, *, verify: bool = False, state: str | None = None
) -> DatasetDescription:
    """Describe a dataset from its shards' names and its tables' footers; no image is read.

    Args:
        path: as the user named it.
        kind: of its source.
        verify: read the ids of every table as well, and say of which columns they are no longer the ids.
        state: where reports and locks lie, when they do not lie beside the tables.
    """
    shards = dataset.shards
    folders = list(dict.fromkeys(_folder(shard) for shard in shards))
    listed = [shard.row_estimate() for shard in shards if shard.by_position]
    found = DatasetDescription(
        path=redact(path),
        kind=kind,
        shards=len(shards),
        tars=sum((shard.image_source() or "").lower().endswith(".tar") for shard in shards),
        images=sum(count or 0 for count in listed) if listed else None,
        images_below=shards[0].images_below,
        tables_in=redact(_common(folders)),
        tables_folders=len(folders),
        verified=verify,
    )
    tables_alone = kind == "webdataset" and all(shard.image_source() is None for shard in shards)
    outputs = 0
    recipes: dict[str, Counter[str]] = {}
    stale: dict[str, Counter[str]] = {}
    sums: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    tabled = [shard for shard in shards if shard.table_path() is not None]
    with ThreadPoolExecutor(8) as pool:
        for look in pool.map(lambda shard: _look(shard, dataset, verify), tabled):
            if look.problem:
                found.tables += 1
                found.problems.append(look.problem)
            if look.schema is None:
                continue
            found.tables += 1
            found.rows += look.rows
            outputs += bool(look.footer.output)
            if not found.columns:
                found.columns = {item.name: str(item.type) for item in look.schema}
            for name, made in look.footer.columns.items():
                recipes.setdefault(name, Counter())[canonical_json(made.recipe)] += 1
            for name, why in look.outdated.items():
                stale.setdefault(name, Counter())[why] += 1
            counts = look.footer.accounted()
            sums.update({key: value for key, value in counts.items() if isinstance(value, int)})
            reasons.update(counts.get("reasons", {}))
    found.unverified = found.tables - min((sum(files.values()) for files in recipes.values()), default=found.tables)
    found.made = {
        name: [{"recipe": json.loads(text), "files": count} for text, count in counter.most_common()]
        for name, counter in recipes.items()
    }
    found.outdated = {
        name: [{"why": why, "files": count} for why, count in counter.most_common()] for name, counter in stale.items()
    }
    found.counts = {key: sums.get(key, 0) for key in ("read", "embedded", "failed", "no_image")}
    found.counts["reasons"] = dict(sorted(reasons.items()))
    if tables_alone and outputs == found.tables > 0:
        found.kind = "output"
    _describe_bookkeeping(found, folders, state, dataset.storage_options)
    return found


def _folder(shard: Shard) -> str:
    return (shard.table_path() or shard.own_table() or "").rpartition("/")[0]


def _common(folders: Sequence[str]) -> str:
    """The folder that holds all of these."""
    levels = zip(*(folder.split("/") for folder in folders), strict=False)
    return "/".join(level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels))


def _describe_bookkeeping(
    found: DatasetDescription, folders: Sequence[str], state: str | None, options: Mapping[str, Any]
) -> None:
    """Find the reports and locks of these folders; one that cannot be looked at is a problem."""
    for folder in folders:
        try:
            book = Bookkeeping.of(Location.of(folder, options), state, options)
            reports = book.names("report-")
            if reports or book.names(""):
                found.bookkeeping.append(redact(book.place.path))
            last = book.read(reports[-1]) if reports else None
            if isinstance(last, dict):
                found.last_run = max(found.last_run, str(last.get("finished") or ""))
            found.held_by = found.held_by or holder(book)
        except Exception as error:  # every file system has exceptions of its own
            found.problems.append(redact(str(error)))
        if state is not None:
            return  # one place for all of them


@dataclass(frozen=True)
class _Look:
    """What one table's footer shows, and which of its columns are out of date."""

    schema: pa.Schema | None = None
    rows: int = 0
    footer: Footer = field(default_factory=Footer)
    outdated: Mapping[str, str] = field(default_factory=dict)
    problem: str = ""


def _look(shard: Shard, dataset: ImageTextPairDataset, verify: bool) -> _Look:
    """Look at one shard's table; neither schema nor problem where there is no such file."""
    path = shard.table_path() or ""
    try:
        table = ShardTable.open(path, dataset.storage_options)
        if table.stored.schema is None:
            return _Look(problem=f"{table.stored.path}: {table.stored.damaged}" if table.stored.damaged else "")
        stored, outdated = table.stored, {}
        if shard.image_source() is not None and table.footer.columns:
            facts = facts_of(shard, table.footer.id_col)
            for name, entry in table.footer.columns.items():
                if entry.samples and (why := outdated_of(entry, facts)) is not None:
                    outdated[name] = why[1]
        if verify and any(entry.ids for entry in table.footer.columns.values()):
            ids = table.ids(table.footer.id_col).digest
            for name, entry in table.footer.columns.items():
                if entry.ids and entry.ids != ids:
                    outdated.setdefault(name, "was made for other ids, or for the same ids in another order")
        return _Look(stored.schema, stored.rows or 0, stored.footer, outdated)
    except Exception as error:
        return _Look(problem=redact(str(error) if redact(path) in str(error) else f"{path}: {error}"))
