"""What the library tells, in the command's words: ``overwrite=True`` of a Python call is ``--overwrite`` here.

Messages are written once, for Python. Which keyword is which option is read off the commands themselves; only what has
another name there stands below.
"""

from __future__ import annotations

import logging
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

RENAMED = {
    "columns": "keep_column",
    "image_embedding_column": "column",
    "metadata_path": "metadata",
    "n_workers": "workers",
}
"""Python's keyword -> the parameter of the command that stands for it."""

PHRASES = {
    "cluster_type='gpu'": "--gpu",
    "cluster_type='cpu'": "the command without --gpu",
    "image_embedding_column=...": "--column NAME, or --model MODEL=NAME",
}

_KEYWORD = re.compile(
    r"""(?<![\w/.=:?&-])                       # not in a path or URL: part/overwrite=True/0.tar
    (?P<name>[a-z][a-z_]*)=
    (?P<value>'[^']*' | "[^"]*" | \.\.\. | \w+(?:[.-]\w+)* | )
    (?![\w/=])""",
    re.VERBOSE,
)

_READING = re.compile(r"reading=ReadPolicy\(([^()]*)\)")
"""Its fields are options of their own."""


def in_options(message: str) -> str:
    """Name the command's options where a message names keywords of Python calls."""
    return _KEYWORD.sub(_as_option, _READING.sub(r"\1", message))


def _as_option(found: re.Match[str]) -> str:
    name, value = found["name"], found["value"]
    if found[0] in PHRASES:
        return PHRASES[found[0]]
    option, is_flag = _options().get(RENAMED.get(name, name), ("", False))
    if not option or (is_flag and value not in ("", "True")):
        return found[0]
    if is_flag or not value:
        return option
    if value[0] in "'\"":
        value = shlex.quote(value[1:-1])
    return f"{option} {value}"


@cache
def _options() -> dict[str, tuple[str, bool]]:
    """Parameter -> (its option, whether that takes no value), of all commands."""
    import typer

    from curator_embed.cli.main import app

    group: Any = typer.main.get_command(app)
    return {
        parameter.name: (parameter.opts[0], bool(getattr(parameter, "is_flag", False)))
        for command in group.commands.values()
        for parameter in command.params
        if parameter.opts[0].startswith("--")
    }


class _Told(logging.Handler):
    """Shows what the library logs as notes on standard error, above a progress bar and not across it."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        mark = "note: " if record.levelno >= logging.WARNING else ""
        tqdm.write(f"{mark}{in_options(self.format(record))}", file=sys.stderr)


@contextmanager
def telling(handler: logging.Handler | None = None) -> Iterator[None]:
    """Within this, what the library logs is shown as notes, or goes to a handler of one's own.

    Progress is logged at INFO where somebody should see it, else at DEBUG.
    """
    handler = handler or _Told(logging.INFO)
    logger = logging.getLogger("curator_embed")
    before = logger.level
    logger.setLevel(min(handler.level, logger.getEffectiveLevel()))
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
