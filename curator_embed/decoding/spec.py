"""What a model expects of its input, as plain values: the contract between models and engines.

Derived from a timm data config or a torchvision Compose; a transform that is not understood
is kept and run by its own code.
"""

from __future__ import annotations

import functools
import math
import re
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, get_args

from curator_embed.decoding.digest import Digest, digest_of
from curator_embed.errors import UsageError

if TYPE_CHECKING:
    import torch
    from PIL import Image

Resize = Literal["shortest", "squash", "cover", "contain", "none"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
Triple = tuple[float, float, float]

OPENAI_MEAN: Triple = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD: Triple = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, slots=True)
class PreprocessSpec:
    """Resize, centre crop or pad, scale to 0..1, normalise: all that differs from model to model.

    Attributes:
        resize: ``shortest``: the short side becomes ``size[0]``, the long side is floored (torchvision);
            ``squash``: exactly ``size``, aspect ratio lost; ``cover`` and ``contain``: aspect ratio kept, the
            smallest that covers or the largest that fits into ``size`` (timm's ``ResizeKeepRatio``); ``none``.
        size: (height, width) the resize aims at.
        crop: (height, width) of the result, taken from the centre; smaller images are padded.
        interpolation: Pillow's filter.
        mean, std: per channel, for values in 0..1.
        fill: RGB colour (0..255) of the padding.
        max_size: upper bound of the long side, for ``shortest`` only.
    """

    resize: Resize
    size: tuple[int, int]
    crop: tuple[int, int]
    interpolation: Interpolation
    mean: Triple
    std: Triple
    fill: tuple[int, int, int] = (0, 0, 0)
    max_size: int | None = None

    understood = True

    def __post_init__(self) -> None:
        if self.resize not in get_args(Resize) or self.interpolation not in get_args(Interpolation):
            raise UsageError(f"no such resize or interpolation: {self.resize!r}, {self.interpolation!r}")
        if min(*self.size, *self.crop) < 1 or len(self.mean) != 3 or len(self.std) != 3 or 0 in self.std:
            raise UsageError(f"sizes must be positive, mean and std three values, std not zero: {self}")

    @property
    def output(self) -> tuple[int, int]:
        """(height, width) of the model's input."""
        return self.crop

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, for the output's footer."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PreprocessSpec:
        """The inverse of ``to_dict``."""
        known = {field.name for field in fields(cls)}
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known}
        return cls(**plain)


@dataclass(frozen=True, slots=True, eq=False)
class OpaqueTransform:
    """A transform that is run as it is, by its own code, because its effect is not understood.

    Attributes:
        transform: takes an RGB ``PIL.Image`` and returns a float tensor (3, H, W), H and W the same for all images.
        why: the part that was not understood, for the report.
    """

    transform: Callable[[Image.Image], torch.Tensor]
    why: str

    understood = False

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Run the transform: RGB image -> float32 (3, H, W)."""
        import torch

        result = self.transform(image)
        if not isinstance(result, torch.Tensor) or result.ndim != 3:
            raise UsageError(f"the transform returned {type(result).__name__}, not a (channels, height, width) tensor")
        return result.to(torch.float32)

    def to_dict(self) -> dict[str, Any]:
        """What is written instead of values: a description and a digest of code and parameters, the same in
        every process."""
        return {"resize": "opaque", "why": self.why, "description": _described(self.transform), "sha256": self.digest}

    @property
    def digest(self) -> str:
        """sha256 (hex) of the transform's code and state, as far as it can be seen."""
        return self.identity().sha256

    def identity(self) -> Digest:
        """What the transform is, and what of it cannot be seen."""
        return digest_of(self.transform, "transform")


Spec = PreprocessSpec | OpaqueTransform


def openai_spec(size: int) -> PreprocessSpec:
    """OpenAI CLIP's preprocessing for an input of ``size`` x ``size``: bicubic resize to exactly that, centre crop.

    Source: ``clip.clip._transform`` in openai/CLIP. timm's tags of the same weights follow timm's
    ``crop_pct``, which for some of them is not 1.
    """
    return PreprocessSpec("shortest", (size, size), (size, size), "bicubic", OPENAI_MEAN, OPENAI_STD)


def spec_from_timm(model_or_cfg: Any, image_size: int | tuple[int, int] | None = None) -> PreprocessSpec:
    """Derive the spec that ``timm.data.create_transform(**resolve_model_data_config(model))`` stands for.

    Args:
        model_or_cfg: a timm model, a model name, its ``pretrained_cfg`` (object or dict) or a resolved data config.
        image_size: input size in pixels instead of the config's, one number or (height, width); the crop share
            stays.

    Raises:
        UsageError: no such model, or its input is not a three-channel image.
    """
    config = timm_data_config(model_or_cfg, image_size)
    channels, height, width = config["input_size"]
    if channels != 3 or len(config["mean"]) != 3:
        raise UsageError(f"the model takes {channels} channels; only RGB models are supported")
    crop_pct = config["crop_pct"]
    target = math.floor(height / crop_pct), math.floor(width / crop_pct)
    mean, std = _triple(config["mean"]), _triple(config["std"])
    fill: tuple[int, ...] = (0, 0, 0)
    resize: Resize
    if config["crop_mode"] == "squash":
        resize = "squash"
    elif config["crop_mode"] == "border":
        resize, fill = "contain", tuple(round(255 * value) for value in mean)
    else:
        resize = "shortest" if target[0] == target[1] else "cover"
    return PreprocessSpec(
        resize, target, (height, width), config["interpolation"], mean, std, (fill[0], fill[1], fill[2])
    )


def timm_data_config(model_or_cfg: Any, image_size: int | tuple[int, int] | None = None) -> dict[str, Any]:
    """Resolve timm's data config (``input_size``, ``interpolation``, ``mean``, ``std``, ``crop_pct``, ``crop_mode``).

    Arguments and errors as in ``spec_from_timm``.
    """
    from timm.data.config import resolve_data_config, resolve_model_data_config
    from timm.models import get_pretrained_cfg

    args: dict[str, Any] = {}
    if image_size is not None:
        args["input_size"] = (3, *_pair(image_size))
    if isinstance(model_or_cfg, str):
        try:
            model_or_cfg = get_pretrained_cfg(model_or_cfg, allow_unregistered=False)
        except RuntimeError as error:
            raise UsageError(f"timm knows no model named {model_or_cfg!r}: {error}") from error
    if hasattr(model_or_cfg, "to_dict") and not hasattr(model_or_cfg, "forward"):
        model_or_cfg = model_or_cfg.to_dict()
    if isinstance(model_or_cfg, Mapping):
        return dict(resolve_data_config(args, pretrained_cfg=dict(model_or_cfg)))
    return dict(resolve_model_data_config(model_or_cfg, args=args))


def spec_from_transform(transform: Any) -> Spec:
    """Read a torchvision ``Compose`` (or an ``ImageClassification`` preset) that takes PIL images.

    Understood: ``Resize`` or ``ResizeKeepRatio``, ``CenterCrop`` or ``CenterCropOrPad``, conversion to a float tensor
    in 0..1, ``Normalize``, in that order, with conversions to RGB anywhere, as torchvision, timm, OpenAI CLIP and
    open_clip write them. Anything else, or another order, gives an ``OpaqueTransform`` that runs it unchanged.
    """
    try:
        return _read_steps(_flatten(transform))
    except _NotUnderstood as reason:
        return OpaqueTransform(transform, str(reason))


class _NotUnderstood(Exception):
    pass


def _flatten(transform: Any) -> list[Any]:
    import torch
    from torchvision import transforms
    from torchvision.transforms import v2

    if isinstance(transform, transforms.Compose | v2.Compose):
        return [step for part in transform.transforms for step in _flatten(part)]
    if isinstance(transform, torch.nn.Sequential):
        return [step for part in transform for step in _flatten(part)]
    if type(transform).__module__ == "torchvision.transforms._presets" and _is(transform, "ImageClassification"):
        return [
            transforms.Resize(transform.resize_size, transform.interpolation),
            transforms.CenterCrop(transform.crop_size),
            transforms.ToTensor(),
            transforms.Normalize(transform.mean, transform.std),
        ]
    return [transform]


def _read_steps(steps: Sequence[Any]) -> PreprocessSpec:
    """Read the steps in the one order whose result is known, or say which step is in the way."""
    import torch

    left = [step for step in steps if not _keeps_rgb(step)]

    def take(*names: str) -> Any:
        return left.pop(0) if left and _is(left[0], *names) else None

    resize, crop = take("Resize", "ResizeKeepRatio"), take("CenterCrop", "CenterCropOrPad")
    as_tensor = take("ToTensor", "MaybeToTensor")
    if as_tensor is None and take("PILToTensor", "MaybePILToTensor", "ToImage"):
        as_tensor = take("ConvertImageDtype", "ToDtype")
        scaled = getattr(as_tensor, "scale", True)
        if as_tensor is not None and (as_tensor.dtype != torch.float32 or not scaled):
            raise _NotUnderstood(_described(as_tensor))
    if as_tensor is None:
        raise _NotUnderstood(_described(left[0]) if left else "no conversion to a tensor")
    normalise = take("Normalize")
    if left:
        raise _NotUnderstood(_described(left[0]))

    kind, size, interpolation, max_size = _read_resize(resize)
    output = _pair(crop.size) if crop is not None else size
    if output is None or (crop is None and kind != "squash"):
        raise _NotUnderstood("images of different sizes: no CenterCrop and no Resize to (height, width)")
    fill = getattr(crop, "fill", 0)
    fill = (fill,) * 3 if isinstance(fill, int) else tuple(fill)
    if getattr(crop, "padding_mode", "constant") != "constant" or len(fill) != 3:
        raise _NotUnderstood(_described(crop))
    mean, std = (normalise.mean, normalise.std) if normalise else ((0.0,) * 3, (1.0,) * 3)
    return PreprocessSpec(kind, size or output, output, interpolation, _triple(mean), _triple(std), fill, max_size)


def _read_resize(step: Any) -> tuple[Resize, tuple[int, int] | None, Interpolation, int | None]:
    """(resize, size, interpolation, max_size) of a torchvision ``Resize`` or timm ``ResizeKeepRatio``."""
    if step is None:
        return "none", None, "bicubic", None
    interpolation = getattr(step.interpolation, "value", step.interpolation)
    if interpolation not in get_args(Interpolation) or step.size is None:
        raise _NotUnderstood(_described(step))
    size = _pair(step.size)
    if _is(step, "ResizeKeepRatio"):
        if step.longest not in (0, 1) or step.random_scale_prob or step.random_aspect_prob:
            raise _NotUnderstood(_described(step))
        return ("contain" if step.longest else "cover"), size, interpolation, None
    both = not isinstance(step.size, int) and len(step.size) == 2
    return ("squash" if both else "shortest"), size, interpolation, step.max_size


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    numbers = (size,) if isinstance(size, int) else tuple(size)
    return int(numbers[0]), int(numbers[-1])


def _is(step: Any, *names: str) -> bool:
    """Whether ``step`` is a known library's class of that name; subclasses may do something else."""
    kind = type(step)
    return kind.__name__ in names and kind.__module__.partition(".")[0] in ("torchvision", "timm", "open_clip")


def _keeps_rgb(step: Any) -> bool:
    """Whether a step only converts to RGB, which has happened already: told by its name or code, and tried."""
    if _is(step, "RGB"):
        return True
    if _is(step, "MaybeConvertMode"):
        return bool(step.mode == "RGB")
    function = step.lambd if _is(step, "Lambda") and hasattr(step, "lambd") else step
    if not isinstance(function, types.FunctionType):
        return False
    code = function.__code__
    if "rgb" not in code.co_name.lower() and not (code.co_names == ("convert",) and "RGB" in code.co_consts):
        return False
    import numpy as np
    from PIL import Image

    for height, width in ((3, 5), (7, 2), (4, 4)):
        probe = Image.fromarray((np.arange(height * width * 3) * 37 % 256).astype(np.uint8).reshape(height, width, 3))
        try:
            if function(probe.copy()) != probe:
                return False
        except Exception:  # the probe is ours; whatever the function says to it, it is not a plain conversion
            return False
    return True


def _triple(values: Any) -> Triple:
    numbers = [float(value) for value in values]
    if len(numbers) == 1:
        numbers *= 3
    if len(numbers) != 3:
        raise _NotUnderstood(f"{len(numbers)} channels")
    return numbers[0], numbers[1], numbers[2]


def _described(value: Any) -> str:
    """A part of a transform for people, the same in every process: with its parameters where a library prints them."""
    parts = getattr(value, "transforms", None)
    if isinstance(parts, list | tuple):
        return f"{type(value).__name__}({', '.join(map(_described, parts))})"
    if isinstance(value, functools.partial):
        return f"partial({_described(value.func)})"
    if isinstance(value, types.FunctionType | types.MethodType | types.BuiltinFunctionType):
        return value.__qualname__
    kind = type(value)
    if kind.__module__.partition(".")[0] in ("torchvision", "timm", "open_clip"):
        return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))
    return kind.__qualname__
