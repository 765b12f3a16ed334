"""Where an output may not lie: in a folder that is searched for the input, or around the input.

Kept apart as pure functions of paths, because every source has the same question: would the next run of the same
command take the output for its input?
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from curator_embed.errors import UsageError
from curator_embed.sources.webdataset import expand_braces
from curator_embed.storage import files
from curator_embed.storage.files import StorageOptions, redact

_ALIASES = {"s3a": "s3", "gcs": "gs", "abfss": "abfs", "az": "abfs"}
"""Other names of a protocol: the same bucket by either."""

_SPECIAL = "*?[{"
_TABLES, _TARS = (".parquet", ".pq"), (".tar",)


@dataclass(frozen=True)
class Input:
    """What a dataset was opened from.

    Attributes:
        path: a file, a folder or a pattern, as it was named.
        finds: what a search of the folder and its subfolders takes for input: "tables" in every one of them, "tars"
            with the tables beside them, or "images" alone. Empty where nothing is searched: a list.
    """

    path: str
    finds: Literal["tables", "tars", "images", ""]


def is_within(inner: str, outer: str) -> bool:
    """Whether one resolved location is another or lies below it.

    Args:
        inner, outer: as ``resolved`` gives them.
    """
    return (inner + "/").startswith(outer.rstrip("/") + "/")


def reaches(pattern: str, folder: str, endings: Sequence[str] = _TABLES) -> bool:
    """Whether a pattern may mean files of these endings in a folder, or a folder around them, which is searched.

    Args:
        pattern: resolved; ``*``, ``**``, ``?``, ``[ab]`` and ``{a,b}`` are special.
        folder: resolved.
    """
    return _reaches(pattern.split("/"), folder.split("/"), tuple(endings))


def _reaches(pattern: Sequence[str], folder: Sequence[str], endings: tuple[str, ...]) -> bool:
    if not pattern:
        return True  # the pattern means the folder, or one around it
    first, rest = pattern[0], pattern[1:]
    if not folder:  # what is left of the pattern means something in the folder: are those such files?
        left = [part for part in pattern if part != "**"]
        if not left:
            return True
        ending = os.path.splitext(left[-1].lower())[1]
        is_any = any(c in (ending or left[-1]) for c in _SPECIAL)
        return len(left) == 1 and (is_any or ending in endings)
    if first == "**":
        return _reaches(rest, folder, endings) or _reaches(pattern, folder[1:], endings)
    matches = first == folder[0] or any(fnmatchcase(folder[0], plain) for plain in expand_braces(first))
    return matches and _reaches(rest, folder[1:], endings)


def resolved(path: str, storage_options: StorageOptions = None) -> str:
    """A location as it can be compared: a local one without links, a URL by its protocol's own name and key.

    Args:
        path: a path, a URL, or a pattern of either; links are followed up to its first special character.
    """
    if files.is_remote(path):
        protocol, _, rest = files.normal(path, storage_options).partition("://")
        return f"{_ALIASES.get(protocol, protocol)}://{rest.rstrip('/')}"
    plain = files.absolute(path)
    fixed = plain if os.path.exists(plain) else _fixed(plain)
    followed = os.path.realpath(fixed) if fixed else ""
    return (followed.rstrip("/") + plain[len(fixed) :]).rstrip("/") or "/"


def check_output(
    output: str,
    inputs: Sequence[Input],
    storage_options: StorageOptions = None,
    *,
    writes: Literal["tables", "tars"] = "tables",
) -> str:
    """Refuse an output that the next run would take for input, or around which the input lies.

    Args:
        output: a folder that need not exist, a path or URL.
        inputs: what the dataset was opened from.
        writes: what the output will hold: parquet files, or tars and parquet files (an export).

    Returns:
        The output as an absolute path, or the URL as it is.

    Raises:
        UsageError: it lies there; the message says where it could lie.
    """
    folder = files.absolute(output)
    there = resolved(folder, storage_options)
    for given in inputs:
        source, shown = resolved(given.path, storage_options), redact(given.path)
        begin = source if _is_plain(source) else _fixed(source)
        if there == begin:
            raise UsageError(
                f"{redact(folder)}: the output is the dataset's own folder. To add columns to the dataset, give no "
                f"output path; for new files, choose {_beside(begin, 'embedded')}"
            )
        if _is_found(there, source, given, writes, storage_options):
            raise UsageError(
                f"{redact(folder)}: the output lies in the dataset's own folder ({shown}), and the next run would take "
                f"it for input. Choose {_beside(begin, there.rpartition('/')[2])}, and move there what an earlier "
                "run has written"
            )
        if is_within(begin, there):
            raise UsageError(
                f"{redact(folder)}: the dataset itself lies in the output folder ({shown}). Choose a folder that holds "
                f"nothing else, such as {redact(f'{there}/embedded')}"
            )
    return folder


def check_state(state: str, folders: Sequence[str], storage_options: StorageOptions = None) -> None:
    """Refuse a place for reports and locks that lies in a folder of parquet files: readers of it would meet them.

    Args:
        folders: that are written to.

    Raises:
        UsageError: it lies there.
    """
    place = resolved(state, storage_options)
    for folder in folders:
        if is_within(place, resolved(folder, storage_options)):
            raise UsageError(
                f"state={redact(state)!r} lies in the folder of the parquet files ({redact(folder)}), whose readers "
                "would meet what is kept there. Choose a folder outside, or leave state= out"
            )


def _is_found(
    output: str, source: str, given: Input, writes: Literal["tables", "tars"], options: StorageOptions
) -> bool:
    """Whether the search of a source would come to what is written to an output."""
    if not _is_plain(source):
        return reaches(source, output, _TABLES if writes == "tables" else _TABLES + _TARS)
    if not given.finds or not is_within(output, source):
        return False
    if writes == "tars" or given.finds == "tables":
        return True
    # Tables count only in folders that hold tars, and beside images not at all.
    return given.finds == "tars" and files.is_folder(output, options) and bool(files.list_files(output, _TARS, options))


def _is_plain(source: str) -> bool:
    """Whether it is no pattern: a local name may hold such characters itself, and a question mark begins a query."""
    if source.startswith(("http://", "https://")):
        return not any(c in source for c in "*{")
    return not any(c in source for c in _SPECIAL) or (not files.is_remote(source) and os.path.exists(source))


def _fixed(pattern: str) -> str:
    """The folder at which a pattern's search begins."""
    first = min((pattern.index(c) for c in _SPECIAL if c in pattern), default=len(pattern))
    return pattern[:first].rpartition("/")[0] if first < len(pattern) else pattern


def _beside(folder: str, name: str) -> str:
    """In words, a folder beside another."""
    parent, _, last = folder.rpartition("/")
    if not last or parent.endswith(":/"):
        return "a place elsewhere" if not last else "another bucket"
    return f"a folder beside it, such as {redact(f'{folder}_{name}')}"
