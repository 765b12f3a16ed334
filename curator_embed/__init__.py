"""curator-embed: turn image datasets of any size into curated ones.

The names below are loaded on first use, so that importing the package (and ``curator-embed --help``) is fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from curator_embed.datasets import ImageTextPairDataset, load_embeddings
    from curator_embed.execution.clients import get_client
    from curator_embed.execution.report import RunReport

_HOMES = {
    "ImageTextPairDataset": "curator_embed.datasets",
    "load_embeddings": "curator_embed.datasets",
    "get_client": "curator_embed.execution.clients",
    "RunReport": "curator_embed.execution.report",
}

__all__ = ["ImageTextPairDataset", "RunReport", "__version__", "get_client", "load_embeddings"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'curator_embed' has no attribute '{name}'")
