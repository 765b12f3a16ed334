"""What an embedder is beside its arguments: the code of its class and its transform, as recipes hold them."""

from __future__ import annotations

import hashlib
import inspect
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from curator_embed.decoding.digest import digest_around, digest_of_classes
from curator_embed.decoding.spec import OpaqueTransform, Spec


@dataclass(frozen=True)
class Identity:
    """Parts of a recipe.

    Attributes:
        code: digest of classes that are not this package's; None where there are none.
        preprocessing: the spec or a digest of the transform; None where the embedder reads shards itself.
        unrepeatable: set where something cannot be told: ``why``, and ``run``, which no other run has, so that what
            this one makes never counts as done in another.
    """

    code: str | None
    preprocessing: dict[str, Any] | None
    unrepeatable: dict[str, str] | None

    @classmethod
    def of(cls, own: Mapping[type, str], transform: Spec | None) -> Identity:
        """Look at what is there now.

        Args:
            own: the classes whose code counts, the last derived one first, each with its source, where that is known.
            transform: None where the embedder does not use one.
        """
        unseen = transform.identity().unseen if isinstance(transform, OpaqueTransform) else ()
        unrepeatable = None
        if unseen:
            why = (
                f"what its values are made with cannot be told: {', '.join(unseen)} has no state that can be read, so "
                "they never count as done in another run. Give the transform an attribute digest, a text that you "
                "change whenever the transform changes, or pass a PreprocessSpec"
            )
            unrepeatable = {"why": why, "run": secrets.token_hex(8)}
        return cls(_code(own), None if transform is None else transform.to_dict(), unrepeatable)


def source_of(kind: type) -> str:
    """The source of a class; empty where there is none, as for one that was typed into an interactive interpreter."""
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError, SyntaxError):
        return ""


def _code(own: Mapping[type, str]) -> str | None:
    if not own:
        return None
    declared = getattr(next(iter(own)), "digest", None)
    if isinstance(declared, str):
        return declared
    if not all(own.values()):
        return digest_of_classes(own)
    return hashlib.sha256(("".join(own.values()) + (digest_around(own) or "")).encode()).hexdigest()
