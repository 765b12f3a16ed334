"""The CPU's decode engine: one image at a time, decoded once, shown to every step that wants it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from curator_embed.decoding.pillow import Limits, decode
from curator_embed.errors import ImageError, UsageError
from curator_embed.execution.pipeline import Prepared
from curator_embed.steps import BatchStep, ImageStep, Step


class CpuEngine:
    """Pillow decodes, steps prepare. Stateless: any number of threads may call it."""

    chunk = 1

    def __init__(self, steps: Sequence[Step]) -> None:
        self.steps = tuple(steps)
        self.limits, self.honour_exif = decode_options(steps)

    def prepare(self, encoded: Sequence[bytes], wanted: Sequence[tuple[int, ...]]) -> list[Prepared]:
        """Decode and prepare; see ``DecodeEngine``."""
        return [self._one(data, positions) for data, positions in zip(encoded, wanted, strict=True)]

    def _one(self, encoded: bytes, positions: tuple[int, ...]) -> Prepared:
        result = Prepared()
        try:
            image = decode(encoded, self.limits, honour_exif=self.honour_exif)
        except ImageError as error:
            result.error = error.reason
            return result
        for position in positions:
            step = self.steps[position]
            try:
                if isinstance(step, BatchStep):
                    result.tensors[position] = step.prepare(image)
                elif isinstance(step, ImageStep):
                    result.values[position] = step.measure(image)
            except ImageError as error:
                result.error = result.error or error.reason
        return result


def decode_options(steps: Sequence[Step]) -> tuple[Limits, bool]:
    """What the steps ask of the one decode they share; steps that disagree are an error."""
    asked: dict[tuple[Any, bool], str] = {}
    for step in steps:
        limits = getattr(step, "limits", None)
        if limits is not None:
            asked.setdefault((limits, bool(getattr(step, "honour_exif", False))), type(step).__name__)
    if len(asked) > 1:
        raise UsageError(
            "all steps of a run share one decode, but they ask for different ones: "
            + "; ".join(f"{name}: {limits}, honour_exif={exif}" for (limits, exif), name in asked.items())
            + ". Give them the same limits and honour_exif, or save one before adding the other"
        )
    for limits, exif in asked:
        return limits, exif
    return Limits(), False
