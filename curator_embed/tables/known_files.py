"""The files of an output folder, and which images they answer for: how a source that grows is cut into shards there.

Reads id columns and footers; what follows from them is ``sources/fitting.py``'s.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from curator_embed.errors import SourceError, UsageError
from curator_embed.sources.fitting import KnownFile, Twice, recorded_marks
from curator_embed.sources.path_list import range_of
from curator_embed.sources.shard import Fitted, Shard
from curator_embed.sources.tables import in_named_folder
from curator_embed.storage.files import is_folder, list_files, redact
from curator_embed.storage.location import Location
from curator_embed.tables.pairing import ids_as_text
from curator_embed.tables.provenance import Footer

READERS = 16
"""Threads that read ids."""
AT_A_TIME = 64
"""Files whose ids are held at a time."""


@dataclass
class FolderOfFiles:
    """The parquet files of a folder that belong to a dataset, by their names. Read once.

    Attributes:
        path: of the folder.
        dataset: the beginning of its files' names.
        id_col: the column of ids.
        names: stems of these files.
        strangers: names of other parquet files.
        unread: name -> why the ids of a file are not known; filled by ``files``.
    """

    path: str
    dataset: str
    id_col: str
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    names: set[str] = field(default_factory=set)
    strangers: list[str] = field(default_factory=list)
    unread: dict[str, str] = field(default_factory=dict)

    def files(self) -> Iterator[KnownFile]:
        """Every file that can be read, with what it answers for; a few at a time."""
        own: list[tuple[str, int, int]] = []
        for path in list_files(self.path, ".parquet", self.storage_options):
            file = path.rpartition("/")[2]
            name = file.removesuffix(".parquet")
            if (named := range_of(name)) is not None and named[0] == self.dataset:
                own.append((name, *named[1:]))
            else:
                self.strangers.append(file)
        self.names = {name for name, _, _ in own}
        with ThreadPoolExecutor(READERS) as pool:
            for start in range(0, len(own), AT_A_TIME):  # ids are let go as they are taken in
                yield from filter(None, pool.map(self._read, own[start : start + AT_A_TIME]))

    def file(self, name: str) -> str:
        """Path of one of the files."""
        return f"{self.path}/{name}.parquet"

    def _read(self, named: tuple[str, int, int]) -> KnownFile | None:
        name = named[0]
        try:
            with Location.of(self.file(name), self.storage_options).open_parquet() as parquet:
                schema = parquet.schema_arrow
                footer = Footer.of(schema)
                # Of a file that was made with another id column: whatever becomes of it, it holds these rows.
                column = next((c for c in (self.id_col, footer.id_col) if schema.names.count(c) == 1), None)
                if column is None:
                    self.unread[name] = f"no column '{self.id_col}' (it has: {', '.join(schema.names[:12])})"
                    return None
                ids = ids_as_text(parquet.read(columns=[column], use_threads=False).column(column))
        except FileNotFoundError:
            return None
        except SourceError as error:
            self.unread[name] = error.problem
            return None
        recorded = (recorded_marks(made.samples) for made in footer.columns.values())
        return KnownFile(*named, ids, max(recorded, key=len, default=b""))


def fit_to_folder(
    shards: Sequence[Shard],
    path: str,
    *,
    id_col: str,
    storage_options: Mapping[str, Any] | None = None,
    own: bool,
    strict: bool = True,
) -> tuple[list[Shard], list[str]]:
    """Cut a dataset that grows as the parquet files of a folder have it; others stay as they are.

    Args:
        shards: the whole dataset.
        path: of the folder; it need not exist.
        own: these files are the shards' own tables, and not an output that is made from them.
        strict: the folder is going to be written to: refuse what would leave rows in it twice.

    Returns:
        The shards, and what a person should know.

    Raises:
        UsageError: two files have a row for the same image, or a file stands in the way.
        SourceError: the folder cannot be listed.
    """
    if not shards or not shards[0].grows or not is_folder(path, storage_options):
        return list(shards), []
    named = range_of(shards[0].name)
    assert named is not None
    folder = FolderOfFiles(path.rstrip("/"), named[0], id_col, dict(storage_options or {}))
    fitted = shards[0].fitted(shards, folder.files(), tables=not own)
    if fitted.twice is not None:
        raise UsageError(_told_twice(folder, fitted.twice))
    if strict:
        _refuse(folder, {shard.name for shard in fitted.shards})
    found = fitted.shards
    if own:
        found = [shard.with_tables_in(folder.path) for shard in found]
        found = [shard.with_table(folder.file(shard.name)) if shard.name in folder.names else shard for shard in found]
    return found, _notes(folder, fitted)


def fit_to_own_tables(
    shards: Sequence[Shard], folder: str | None, id_col: str, storage_options: Mapping[str, Any] | None = None
) -> list[Shard]:
    """Cut a dataset that grows as its tables have it, where there are any; each file's shard has it as its table.

    Args:
        folder: of the tables; by default where a run without an output path puts them.

    Raises:
        UsageError: a ``folder`` was named, and there is none; two files have a row for the same image.
        SourceError: it cannot be listed.
    """
    shards = in_named_folder(shards, folder, storage_options)
    place = (shards[0].own_table() or "").rpartition("/")[0]
    return fit_to_folder(shards, place, id_col=id_col, storage_options=storage_options, own=True, strict=False)[0]


def _refuse(folder: FolderOfFiles, names: Collection[str]) -> None:
    """Raises UsageError for files that would be neither replaced nor understood."""
    lost = next((name for name in folder.unread if name not in names), None)
    if lost is not None:
        raise UsageError(
            f"{redact(folder.file(lost))}: {folder.unread[lost]}, so that nobody knows which images it has rows for. "
            "Nothing was changed. Restore it, or remove it and run again: images that are then in no file are worked "
            "on anew"
        )
    if folder.strangers:
        first, more = folder.strangers[0], len(folder.strangers) - 1
        alike = f" ({more} more files like it)" if more else ""
        other = range_of(first.removesuffix(".parquet"))
        renamed = f". If it belongs to these images, pass dataset='{other[0]}'" if other is not None else ""
        raise UsageError(
            f"{redact(folder.path)}/{first}: is not a file of the dataset '{folder.dataset}', and who reads the folder "
            f"would get its rows as well{alike}. Nothing was changed. Move it away, or choose another output path"
            f"{renamed}"
        )


def _told_twice(folder: FolderOfFiles, twice: Twice) -> str:
    more = f" and {twice.count - 1} more" if twice.count > 1 else ""
    return (
        f"{redact(folder.file(twice.one))} and {redact(folder.file(twice.other))} both have a row for '{twice.id}'"
        f"{more}. Nothing was changed. Remove one of the two files and run again: images that are then in no file are "
        "worked on anew"
    )


def _notes(folder: FolderOfFiles, fitted: Fitted) -> list[str]:
    notes = []
    if fitted.gone:
        count = sum(map(len, fitted.gone.values()))
        first = next(iter(fitted.gone.values()))[0]
        rows = "1 row is of an image that is" if count == 1 else f"{count:,} rows are of images that are"
        notes.append(
            f"{redact(folder.path)}: {rows} gone ('{first}'{', ...' if count > 1 else ''}); finished files keep them"
        )
    if fitted.given_up:
        tables = fitted.given_up[0].rpartition("/")[0]
        notes.append(
            f"the columns of {len(fitted.given_up)} files in {redact(tables)} are not carried over: the files of "
            f"{redact(folder.path)} hold other images"
        )
    return notes
