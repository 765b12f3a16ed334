"""How far an engine is from the reference, in grey levels and in embeddings.

Used by ``certify``, so that a run can prove on its own images what the tests prove on ours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import torch

from curator_embed.decoding.cpu import normalise, prepare
from curator_embed.decoding.pillow import DEFAULT_LIMITS, Limits, decode
from curator_embed.decoding.reference import Transform
from curator_embed.decoding.spec import PreprocessSpec, Spec
from curator_embed.errors import ImageError, UsageError

Model = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class ParityReport:
    """The figures of one comparison.

    Attributes:
        images: how many were compared.
        failed: how many could not be decoded or resized, by reason.
        max_difference, mean_difference: between input pixels, in grey levels (0..255).
        share_above_1: of all values, those more than 1 grey level apart.
        min_cosine: between embeddings of the two inputs; None without a model.
        understood: False for a transform that is run by its own code, which differs from nothing.
        versions: of the packages whose arithmetic is compared.
    """

    images: int
    failed: dict[str, int]
    max_difference: float
    mean_difference: float
    share_above_1: float
    min_cosine: float | None
    understood: bool
    interpolation: str | None
    versions: dict[str, str]

    @property
    def holds(self) -> bool:
        """Whether the figures keep the package's promise: bicubic at most 2 levels and above 1 on fewer than 1 in
        100,000 values, bilinear at most 1, nearest none; embeddings at a cosine of at least 0.9999.

        Below 100,000 values the share says nothing: one value above 1 is then allowed.
        """
        allowed = {None: 0, "nearest": 0, "bilinear": 1}.get(self.interpolation, 2)
        cosine = self.min_cosine is None or self.min_cosine >= 0.9999
        return self.images > 0 and self.max_difference <= allowed and self.share_above_1 < 1e-5 and cosine

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "holds": self.holds}

    def __str__(self) -> str:
        """The figures as a person reads them."""
        failed = ", ".join(f"{reason} {count}" for reason, count in self.failed.items())
        how = self.interpolation or "run by its own code"
        lines = [
            f"images         {self.images:,} compared{f', not decoded: {failed}' if failed else ''}",
            f"preprocessing  {how}",
            f"pixels         at most {self.max_difference:g} grey levels apart, {self.mean_difference:.4f} on average, "
            f"above 1 on {self.share_above_1:.2e} of the values",
        ]
        if self.min_cosine is not None:
            lines.append(f"embeddings     cosine at least {self.min_cosine:.6f}")
        lines.append(f"versions       {', '.join(f'{name} {number}' for name, number in self.versions.items())}")
        lines.append("agrees with the model's own preprocessing" if self.holds else "DIFFERS from the model's own")
        return "\n".join(lines)


def compare(
    images: Iterable[bytes],
    spec: Spec,
    reference_transform: Transform,
    model: Model | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> ParityReport:
    """Compare the CPU engine with a reference transform on encoded images.

    Args:
        images: encoded files; those that do not decode are counted and left out.
        reference_transform: RGB ``PIL.Image`` -> float32 (3, H, W), see ``reference.timm_transform``.
        model: float32 (1, 3, H, W) -> (1, dim), in eval mode; called twice per image.

    Raises:
        UsageError: the reference gives another shape than the spec.
    """
    compared, values, total, above, largest = 0, 0, 0.0, 0, 0.0
    cosine: float | None = None
    failed: Counter[str] = Counter()
    for encoded in images:
        try:
            rgb = decode(encoded, limits).rgb
            ours = normalise([prepare(rgb, spec, limits)], spec)[0]
        except ImageError as error:
            failed[str(error.reason)] += 1
            continue
        theirs = reference_transform(rgb.copy())
        if theirs.shape != ours.shape:
            raise UsageError(f"the reference gives {tuple(theirs.shape)}, the spec {tuple(ours.shape)}")
        difference = _grey_levels(ours, theirs, spec)
        compared += 1
        values += difference.numel()
        total += float(difference.sum(dtype=torch.float64))
        above += int((difference > 1).sum())
        largest = max(largest, float(difference.max()))
        if model is not None:
            with torch.inference_mode():
                a, b = (model(image[None]).flatten().double() for image in (ours, theirs))
            similarity = float(torch.nn.functional.cosine_similarity(a, b, dim=0))
            cosine = similarity if cosine is None else min(cosine, similarity)
    understood = isinstance(spec, PreprocessSpec)
    return ParityReport(
        images=compared,
        failed=dict(sorted(failed.items())),
        max_difference=largest,
        mean_difference=total / max(values, 1),
        share_above_1=above / max(values, 1),
        min_cosine=cosine,
        understood=understood,
        interpolation=spec.interpolation if isinstance(spec, PreprocessSpec) else None,
        versions={name: version(name) for name in ("pillow", "torch", "torchvision", "timm")},
    )


def _grey_levels(ours: torch.Tensor, theirs: torch.Tensor, spec: Spec) -> torch.Tensor:
    """Absolute difference in grey levels; rounded, since both inputs come from 8-bit pixels."""
    difference = (ours - theirs).abs()
    if not isinstance(spec, PreprocessSpec):
        return difference * 255
    return (difference * torch.tensor(spec.std).view(3, 1, 1) * 255).round()
