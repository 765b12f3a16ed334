"""Columns that are measured on each image beside the embeddings: hashes and properties.

Names are loaded on first use, so that the command starts fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from curator_embed.columns.hashes import HASH_KINDS, ImageHasher
    from curator_embed.columns.properties import PROPERTIES, ImageProperties

_HOMES = {
    "HASH_KINDS": "curator_embed.columns.hashes",
    "ImageHasher": "curator_embed.columns.hashes",
    "PROPERTIES": "curator_embed.columns.properties",
    "ImageProperties": "curator_embed.columns.properties",
}

__all__ = ["HASH_KINDS", "PROPERTIES", "ImageHasher", "ImageProperties"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'curator_embed.columns' has no attribute '{name}'")
