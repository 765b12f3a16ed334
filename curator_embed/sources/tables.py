"""Metadata tables of sources whose images have none beside them: found again after a run wrote them."""

from __future__ import annotations

from collections.abc import Sequence

from curator_embed.errors import UsageError
from curator_embed.sources.shard import Shard
from curator_embed.storage import files
from curator_embed.storage.files import StorageOptions


def with_found_tables(
    shards: Sequence[Shard], folder: str | None = None, storage_options: StorageOptions = None
) -> list[Shard]:
    """Give each shard the parquet of its name where there is one; others know where theirs will lie.

    Args:
        folder: where to look; by default where a run without an output path puts them.

    Raises:
        UsageError: a ``folder`` was named, and there is none.
        SourceError: it cannot be listed.
    """
    if not shards:
        return []
    shards = in_named_folder(shards, folder, storage_options)
    place = (shards[0].own_table() or "").rpartition("/")[0]
    if not place or not files.is_folder(place, storage_options):
        return list(shards)
    found = {path.rpartition("/")[2]: path for path in files.list_files(place, ".parquet", storage_options)}
    return [shard.with_table(found[name]) if (name := f"{shard.name}.parquet") in found else shard for shard in shards]


def in_named_folder(
    shards: Sequence[Shard], folder: str | None, storage_options: StorageOptions = None
) -> Sequence[Shard]:
    """Shards whose tables lie in this folder, those that are still to be written too; None: where they lie by default.

    Raises:
        UsageError: there is no such folder.
    """
    if folder is None:
        return shards
    check_tables_folder(folder, storage_options)
    named = files.absolute(folder).rstrip("/")  # workers may run in other folders
    return [shard.with_tables_in(named) for shard in shards]


def check_tables_folder(folder: str, storage_options: StorageOptions = None) -> None:
    """Raises UsageError where there is no such folder."""
    if not files.is_folder(folder, storage_options):
        raise UsageError(f"{files.redact(folder)}: no such folder. Say with metadata_path= where the parquet files lie")
