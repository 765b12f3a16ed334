"""Metadata tables of sources whose images have none beside them: found again after a run wrote them."""

from __future__ import annotations

from collections.abc import Sequence

from curator_embed.errors import SourceError
from curator_embed.sources import files
from curator_embed.sources.files import StorageOptions
from curator_embed.sources.shard import Shard


def with_found_tables(
    shards: Sequence[Shard], folder: str | None = None, storage_options: StorageOptions = None
) -> list[Shard]:
    """Give each shard the parquet of its name where there is one.

    Args:
        folder: where to look; by default where a run without an output path puts them.

    Raises:
        SourceError: a ``folder`` was named and cannot be listed.
    """
    if not shards:
        return []
    own = None if folder is not None else shards[0].own_table()
    place = folder if folder is not None else own.rpartition("/")[0] if own is not None else None
    if place is None or (folder is None and not files.is_folder(place, storage_options)):
        return list(shards)
    if folder is not None and not files.is_folder(folder, storage_options):
        raise SourceError(files.redact(folder), "no such folder", "Say where the metadata parquet files lie")
    found = {path.rpartition("/")[2]: path for path in files.list_files(place, ".parquet", storage_options)}
    return [shard.with_table(found[name]) if (name := f"{shard.name}.parquet") in found else shard for shard in shards]
