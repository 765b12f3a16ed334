"""What a run certifies: that its embedders' preprocessing agrees with their models' own, on images of the dataset."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from curator_embed.execution.job import ShardJob
from curator_embed.sources.shard import Shard, first_images
from curator_embed.steps import BatchStep

CERTIFIED_IMAGES = 256
"""Images that are compared."""


def certificates(job: ShardJob, shards: Sequence[Shard]) -> dict[str, Any]:
    """Compare the preprocessing of each embedder with its reference on the dataset's first images.

    Returns:
        the figures of each embedder that has a reference, by its column.
    """
    found: dict[str, Any] = {}
    images = first_images(shards, job.id_col, CERTIFIED_IMAGES)
    for step in job.steps:
        certificate = step.certify(images) if isinstance(step, BatchStep) else None
        if certificate is not None:
            found[next(iter(step.columns()))] = certificate.to_dict()
    return found
