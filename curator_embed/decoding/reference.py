"""What a model's authors would show it: timm's own transform on Pillow's own pixels.

Everything else in this folder is measured against this.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from curator_embed.decoding.pillow import DEFAULT_LIMITS, Limits, decode
from curator_embed.decoding.spec import OpaqueTransform, Spec, timm_data_config

if TYPE_CHECKING:
    import torch
    from PIL import Image

Transform = Callable[["Image.Image"], "torch.Tensor"]


def timm_transform(model_or_cfg: Any, image_size: int | tuple[int, int] | None = None) -> Transform:
    """``timm.data.create_transform(**resolve_model_data_config(model))``; arguments as ``spec_from_timm``."""
    from timm.data.transforms_factory import create_transform

    transform: Transform = create_transform(**timm_data_config(model_or_cfg, image_size))
    return transform


def transform_of(spec: Spec) -> Transform:
    """Spell a spec out in torchvision's and timm's own transforms: the reference for OpenAI's preprocessing, and for
    models whose timm config is not at hand."""
    from timm.data.transforms import CenterCropOrPad, ResizeKeepRatio
    from torchvision import transforms

    if isinstance(spec, OpaqueTransform):
        return spec
    method = transforms.InterpolationMode(spec.interpolation)
    steps: list[Any] = []
    if spec.resize == "shortest":
        steps.append(transforms.Resize(spec.size[0], method, spec.max_size))
    elif spec.resize == "squash":
        steps.append(transforms.Resize(spec.size, method))
    elif spec.resize != "none":
        longest = float(spec.resize == "contain")
        steps.append(ResizeKeepRatio(spec.size, longest=longest, interpolation=spec.interpolation))
    steps.append(CenterCropOrPad(list(spec.crop), fill=spec.fill))
    steps += [transforms.ToTensor(), transforms.Normalize(spec.mean, spec.std)]
    transform: Transform = transforms.Compose(steps)
    return transform


def reference(encoded: bytes, transform: Transform, limits: Limits = DEFAULT_LIMITS) -> torch.Tensor:
    """The reference input of one image: float32 (3, H, W).

    ``transform(Image.open(encoded).convert("RGB"))``, except that 16-bit images are scaled, not clipped.

    Raises:
        ImageError: the image does not decode.
    """
    return transform(decode(encoded, limits).rgb.copy())
