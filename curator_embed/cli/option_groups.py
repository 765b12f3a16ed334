"""Options that several commands share, as one dataclass per group.

A command decorated with ``takes_groups`` names a group as a parameter; on the command line it has the group's options.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

from curator_embed.errors import UsageError


def takes_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Replace every parameter whose annotation is a dataclass by that dataclass's fields."""
    own = inspect.signature(command, eval_str=True)
    annotations: dict[str, Any] = {p.name: p.annotation for p in own.parameters.values()}
    groups: dict[str, Any] = {name: kind for name, kind in annotations.items() if is_dataclass(kind)}
    added = {name: _options(group) for name, group in groups.items()}

    @functools.wraps(command)
    def with_options(**given: Any) -> None:
        _refuse_empty(given)
        for name, options in added.items():
            given[name] = groups[name](**{option.name: given.pop(option.name) for option in options})
        command(**given)

    kept = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own.parameters.values() if p.name not in groups]
    parameters = [*kept, *(option for options in added.values() for option in options)]
    with_options.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    with_options.__annotations__ = {p.name: p.annotation for p in parameters}
    del with_options.__wrapped__
    return with_options


def _refuse_empty(given: Mapping[str, Any]) -> None:
    """An empty text names nothing; as a path it would mean the current folder, in a script with a variable unset."""
    for name, value in given.items():
        texts = value if isinstance(value, list) else [value]
        if any(isinstance(text, str) and not text.strip() for text in texts):
            shown = "SRC" if name == "src" else f"--{name.replace('_', '-')}"
            raise UsageError(f"{shown} is empty; give it a value{'' if name == 'src' else ', or leave it out'}")


def _options(group: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    own_first = sorted(fields(group), key=lambda item: item.name not in vars(group)["__annotations__"])
    return [
        inspect.Parameter(item.name, inspect.Parameter.KEYWORD_ONLY, default=item.default, annotation=hints[item.name])
        for item in own_first
    ]
