"""What SRC is: seen from its ending, or for a folder from what lies in it; where that does not tell, what was found."""

from __future__ import annotations

import logging
import os
from collections import Counter
from enum import StrEnum
from typing import Any

from curator_embed.errors import CuratorEmbedError, UsageError


class SourceKind(StrEnum):
    """What SRC is."""

    auto = "auto"
    webdataset = "webdataset"
    path_list = "path-list"
    folder = "folder"
    parquet = "parquet"


LIST_ENDINGS = (".txt", ".lst", ".list")
PARQUET_ENDINGS = (".parquet", ".pq")

_NEEDED = (
    "A webdataset is a folder of *.tar; a folder of images holds files such as .jpg, .png or .webp; *.parquet files "
    "hold images in a column of bytes. For a path list, pass the list file, not its folder"
)
_SHOWN = 4

log = logging.getLogger(__name__)


def detect(src: str, storage_options: dict[str, Any], *, outputs: bool = False) -> SourceKind:
    """See what a source is.

    Args:
        outputs: folders of tables that a run wrote, which have no images, serve as well.

    Raises:
        UsageError: nothing is there, nothing that can be worked on, or more than one kind; it says what was found.
        SourceError: a folder cannot be listed.
    """
    from curator_embed.sources.sniff import IMAGE_EXTENSIONS
    from curator_embed.storage import files

    if not files.is_remote(src) and files.is_folder(src):
        return _kind_of_folder(src, storage_options, outputs)
    ending = os.path.splitext(src)[1].lower()
    if ending in LIST_ENDINGS:
        return SourceKind.path_list
    if ending in PARQUET_ENDINGS:
        return SourceKind.parquet if _holds_images(src, storage_options) else SourceKind.webdataset
    shown = files.redact(src)
    if ending[1:] in IMAGE_EXTENSIONS:
        raise UsageError(f"{shown}: images are given by their folder, or by a list of their paths")
    if ending == ".tar" or any(c in src for c in "*?[{"):
        return SourceKind.webdataset
    if files.is_folder(src, storage_options):
        return _kind_of_folder(src, storage_options, outputs)
    if files.exists(src, storage_options):
        raise UsageError(f"{shown}: its ending does not say what it is; say --source path-list for a list")
    raise UsageError(f"{shown}: no such file or folder")


def _kind_of_folder(src: str, storage_options: dict[str, Any], outputs: bool) -> SourceKind:
    from curator_embed.sources.sniff import IMAGE_EXTENSIONS
    from curator_embed.storage import files

    found = files.list_files(src, "", storage_options, recursive=True)
    endings = Counter(os.path.splitext(path)[1].lower() for path in found)
    images = sum(count for ending, count in endings.items() if ending[1:] in IMAGE_EXTENSIONS)
    if endings[".tar"]:
        if images:
            log.warning(
                "%s: what is in its tars is read (%d), and not the image files beside them (%d); --source folder reads "
                "those",
                *(files.redact(src), endings[".tar"], images),
            )
        return SourceKind.webdataset
    parquets = [path for path in found if path.lower().endswith(PARQUET_ENDINGS)]
    with_images = bool(parquets) and _holds_images(parquets[0], storage_options)
    if images and with_images:
        raise UsageError(
            f"{files.redact(src)}: {images} image files are there, and parquet files that hold images. Say which are "
            "meant: --source folder or --source parquet"
        )
    if images:  # tables beside images are no tables of shards: an output, say, that lies in the folder
        return SourceKind.folder
    if with_images:
        return SourceKind.parquet
    if parquets:
        if not outputs and _is_output(parquets[0], storage_options):
            raise UsageError(
                f"{files.redact(src)}: an output of this command, and the images are not in it. To add columns to it, "
                "give as SRC what it was made from, and this folder with --metadata"
            )
        return SourceKind.webdataset
    there = f"no images there, but {_in_words(endings)}" if found else "the folder is empty"
    raise UsageError(f"{files.redact(src)}: {there}. {_NEEDED}")


def _in_words(endings: Counter[str]) -> str:
    """``3 .txt, 1 .csv, 2 others``."""
    most = endings.most_common()
    parts = [f"{count:,} {ending or 'without an ending'}" for ending, count in most[:_SHOWN]]
    if rest := sum(count for _, count in most[_SHOWN:]):
        parts.append(f"{rest:,} others")
    return ", ".join(parts)


def _is_output(path: str, storage_options: dict[str, Any]) -> bool:
    """Whether a run wrote this file into a folder of its own."""
    from curator_embed.sources.parquet import open_parquet
    from curator_embed.tables.provenance import Footer

    try:
        with open_parquet(path, storage_options) as parquet:
            return bool(Footer.of(parquet.schema_arrow).output)
    except CuratorEmbedError:
        return False


def _holds_images(path: str, storage_options: dict[str, Any]) -> bool:
    """Whether a parquet file (of a glob or brace range: the first) has a column of bytes, and no tar beside it."""
    from curator_embed.sources.parquet import find_parquets
    from curator_embed.storage import files

    try:
        first = find_parquets(path, storage_options=storage_options)[0].path
    except CuratorEmbedError:
        return False
    return not files.exists(f"{os.path.splitext(first)[0]}.tar", storage_options)
