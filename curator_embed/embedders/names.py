"""Model names, checked without importing timm or torch, which takes many seconds: by reading timm's sources.

timm registers a model by a decorated function of its name; those are found here as text. Only a name that occurs
nowhere in the sources is refused; whatever is not clear is left to ``catalogue``, which asks timm itself.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from curator_embed.embedders.openai_clip import TOWERS
from curator_embed.errors import UsageError

_REGISTERED = re.compile(r"^@register_model[^\n]*\n(?:@[^\n]*\n)*def (\w+)\(", re.MULTILINE)
_TAGGED = re.compile(r"""['"](\w+\.\w+)['"]\s*:\s*_\w*cfg""")


def check_name(name: str) -> None:
    """Refuse a model that neither timm nor OpenAI has.

    Raises:
        UsageError: there is none of that name; near names are given.
    """
    text = _sources()
    architecture = re.escape(name.partition(".")[0])
    # Defined as a function, or named in quotes: among the tags, or as an older name of another.
    if name in TOWERS or not text or re.search(rf"""(?:\bdef |['"]){architecture}[('".]""", text):
        return
    raise unknown_model(name, [*TOWERS, *_TAGGED.findall(text), *_REGISTERED.findall(text)])


def no_model_matches(pattern: str, known: Sequence[str]) -> UsageError:
    """The error for a glob that matches nothing; the glob that it gives instead matches something.

    Args:
        known: all names that a glob is held against.
    """
    plain = pattern.strip("*")
    if any(plain in name for name in known):
        return UsageError(f"no model matches '{pattern}'; try '*{plain}*'")
    architectures = {name.partition(".")[0] for name in known}
    near = difflib.get_close_matches(plain.partition(".")[0].lower(), architectures, n=1, cutoff=0.5)
    hint = f"try '{near[0]}*'" if near else "'curator-embed models' lists all"
    return UsageError(f"no model matches '{pattern}'; {hint}")


def unknown_model(name: str, known: Sequence[str], otherwise: Sequence[str] = ()) -> UsageError:
    """The error for a name that no model has.

    Args:
        known: names among which similar ones are looked for.
        otherwise: names to give when none is similar.
    """
    lowered = {candidate.lower(): candidate for candidate in known}
    near = [lowered[match] for match in difflib.get_close_matches(name.lower(), lowered, n=4, cutoff=0.5)]
    shown = near or list(otherwise[:4])
    hint = f" Did you mean: {', '.join(shown)}?" if shown else ""
    return UsageError(f"there is no model named '{name}' in timm or among OpenAI's CLIP models.{hint}")


@cache
def _sources() -> str:
    """timm's model definitions as one text; empty where they cannot be read (frozen, zipped, not installed)."""
    found = find_spec("timm")
    places = found.submodule_search_locations if found is not None else None
    try:
        files = sorted(Path(places[0], "models").rglob("*.py")) if places else []
        return "\n".join(file.read_text(encoding="utf-8") for file in files)
    except OSError:
        return ""
