"""Embedders: a model, its preprocessing and its weights as one step of a dataset.

Names are loaded on first use; torch and timm take seconds to import.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from curator_embed.embedders.base import ImageEmbedder
    from curator_embed.embedders.catalogue import list_models
    from curator_embed.embedders.lite0 import efficientnet_lite0_weights
    from curator_embed.embedders.timm import TimmImageEmbedder

_HOMES = {
    "ImageEmbedder": "curator_embed.embedders.base",
    "TimmImageEmbedder": "curator_embed.embedders.timm",
    "efficientnet_lite0_weights": "curator_embed.embedders.lite0",
    "list_models": "curator_embed.embedders.catalogue",
}

__all__ = ["ImageEmbedder", "TimmImageEmbedder", "efficientnet_lite0_weights", "list_models"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'curator_embed.embedders' has no attribute '{name}'")
