"""Where an output may not lie: in a folder that is searched for the input, or around the input.

Kept apart as pure functions of paths, because every source has the same question: would the next run of the same
command take the output for its input?
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from fnmatch import fnmatchcase

from curator_embed.errors import UsageError
from curator_embed.sources.webdataset import expand_braces
from curator_embed.storage import files
from curator_embed.storage.files import StorageOptions, redact

_ALIASES = {"s3a": "s3", "gcs": "gs", "abfss": "abfs", "az": "abfs"}
"""Other names of a protocol: the same bucket by either."""

_SPECIAL = "*?[{"


def is_within(inner: str, outer: str) -> bool:
    """Whether one resolved location is another or lies below it.

    Args:
        inner, outer: as ``resolved`` gives them.
    """
    return (inner + "/").startswith(outer.rstrip("/") + "/")


def reaches(pattern: str, folder: str) -> bool:
    """Whether a search might find parquet files in a folder: it goes through that folder, or through one around it.

    Args:
        pattern: a resolved folder, which is searched with its subfolders, or a pattern (``*``, ``**``, ``?``, ``[ab]``,
            ``{a,b}``) for files and folders.
        folder: resolved.
    """
    return _reaches(pattern.split("/"), folder.split("/"))


def _reaches(pattern: Sequence[str], folder: Sequence[str]) -> bool:
    if not pattern:
        return True  # the pattern means the folder, or one around it
    first, rest = pattern[0], pattern[1:]
    if not folder:  # what is left of the pattern means something in the folder: is that its parquet files?
        left = [part for part in pattern if part != "**"]
        if not left:
            return True
        name = left[-1].lower()
        is_special = any(c in name for c in _SPECIAL)
        return len(left) == 1 and (not name.endswith(".tar") if is_special else name.endswith((".parquet", ".pq")))
    if first == "**":
        return _reaches(rest, folder) or _reaches(pattern, folder[1:])
    matches = first == folder[0] or any(fnmatchcase(folder[0], plain) for plain in expand_braces(first))
    return matches and _reaches(rest, folder[1:])


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


def check_output(output: str, inputs: Sequence[str], storage_options: StorageOptions = None) -> str:
    """Refuse an output in which, or around which, the input lies.

    Args:
        output: a folder that need not exist, a path or URL.
        inputs: what the dataset was opened from: files by name, folders that are searched, patterns.

    Returns:
        The output as an absolute path, or the URL as it is.

    Raises:
        UsageError: the next run would take the output for input, or readers of the output would take the input for it.
    """
    folder = files.absolute(output)
    there = resolved(folder, storage_options)
    for given in inputs:
        source, shown = resolved(given, storage_options), redact(given)
        begin = source if _is_plain(source) else _fixed(source)
        if there == begin:
            raise UsageError(
                f"{redact(folder)}: the output is the dataset's own folder. To add columns to the dataset, give no "
                f"output path; for new files, choose {_beside(begin, 'embedded')}"
            )
        if _is_searched(source, storage_options) and reaches(source, there):
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


def _is_searched(source: str, storage_options: StorageOptions) -> bool:
    return not _is_plain(source) or files.is_folder(source, storage_options)


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
