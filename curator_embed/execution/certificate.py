"""What a run certifies: that its embedders' preprocessing agrees with their models' own, on images of the dataset."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from curator_embed.execution.job import ShardJob
from curator_embed.sources.shard import Shard, first_images
from curator_embed.steps import BatchStep, Step

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


def certificate_lines(certificate: Mapping[str, Any]) -> Iterator[str]:
    """The figures as a person reads them, a line per column.

    Args:
        certificate: as ``certificates`` gives it.
    """
    for column, figures in certificate.items():
        if not figures["images"]:
            yield f"{column}: no image could be compared"
            continue
        verdict = "agrees with" if figures["holds"] else "DIFFERS from"
        cosine = "" if figures["min_cosine"] is None else f", cosine at least {figures['min_cosine']:.6f}"
        yield (
            f"{column}: {verdict} the model's own preprocessing on {figures['images']:,} images: at most "
            f"{figures['max_difference']:g} grey levels apart, above 1 on {figures['share_above_1']:.2e} of the "
            f"values{cosine}"
        )


def certificate_notes(certificate: Mapping[str, Any], steps: Sequence[Step]) -> Iterator[str]:
    """What a person must not overlook: columns whose figures do not hold, and those that could not be compared.

    Args:
        steps: of the run that was to be certified.
    """
    for column, figures in certificate.items():
        if not figures["holds"] and figures["images"]:
            yield (
                f"certify: '{column}' does not agree with the model's own preprocessing as promised; see the figures, "
                "and do not mix these embeddings with others of the model"
            )
        elif not figures["holds"]:
            yield f"certify: none of the dataset's first {CERTIFIED_IMAGES} images could be compared for '{column}'"
    for step in steps:
        column = next(iter(step.columns()))
        if isinstance(step, BatchStep) and column not in certificate:
            yield f"certify: '{column}' comes from an embedder that has no preprocessing to be compared with"
