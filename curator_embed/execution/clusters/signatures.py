"""Which keywords a callable takes, so that an option that Dask does not know is told before anything starts."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def keywords(*targets: Callable[..., Any]) -> set[str]:
    """The named parameters of all these callables together; ``*args`` and ``**kwargs`` name none."""
    return {
        name
        for target in targets
        for name, parameter in inspect.signature(target).parameters.items()
        if parameter.kind in _NAMED
    }


def first_unknown(
    given: Mapping[str, Any], *targets: Callable[..., Any], without: Collection[str] = ()
) -> tuple[str, str] | None:
    """The first name that none of these callables takes, and " (did you mean '...'?)" or nothing; None: all are known.

    Args:
        targets: the callable that is given the options, and those that it hands the rest of them on to.
        without: names that these callables take, and that are not the caller's to give.
    """
    known = keywords(*targets) - set(without)
    for name in given:
        if name not in known:
            return name, nearest(name, known)
    return None


def nearest(word: Any, known: Iterable[str]) -> str:
    """ " (did you mean '...'?)", empty where nothing is spelled alike."""
    close = difflib.get_close_matches(str(word), list(known), 1)
    return f" (did you mean '{close[0]}'?)" if close else ""
