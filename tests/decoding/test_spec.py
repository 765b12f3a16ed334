"""What is read from timm and from torchvision, and what is left to run by its own code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import timm.data
import torch
from PIL import Image
from torchvision import transforms
from torchvision.models import ResNet50_Weights
from torchvision.transforms import v2

from curator_embed.decoding.cpu import normalise, prepare
from curator_embed.decoding.reference import transform_of
from curator_embed.decoding.spec import (
    OPENAI_MEAN,
    OPENAI_STD,
    OpaqueTransform,
    PreprocessSpec,
    openai_spec,
    spec_from_timm,
    spec_from_transform,
    timm_data_config,
)
from curator_embed.errors import UsageError

BICUBIC = transforms.InterpolationMode.BICUBIC
NORMALISE = transforms.Normalize(OPENAI_MEAN, OPENAI_STD)


def test_every_pretrained_timm_tag_is_understood_and_read_back_from_its_own_transform() -> None:
    names = timm.list_pretrained()
    assert len(names) > 1000
    kinds = set()
    for name in names[::7] + [name for name in names if "deepseek" in name or "sapiens" in name]:
        spec = spec_from_timm(name)
        kinds.add(spec.resize)
        again = spec_from_transform(timm.data.create_transform(**timm_data_config(name)))
        # Normalize holds float32 values: compare what they do, not their decimals.
        assert isinstance(again, PreprocessSpec), name
        assert (again.resize, again.size, again.crop, again.interpolation, again.fill) == (
            spec.resize,
            spec.size,
            spec.crop,
            spec.interpolation,
            spec.fill,
        )
        assert torch.equal(torch.tensor([again.mean, again.std]), torch.tensor([spec.mean, spec.std]))
    assert kinds == {"shortest", "squash", "contain"}


def test_models_names_and_configs_give_one_spec() -> None:
    name = "test_vit.r160_in1k"
    model = timm.create_model(name, pretrained=False)
    cfg = timm.get_pretrained_cfg(name)
    specs = {spec_from_timm(given) for given in (name, model, cfg, cfg.to_dict(), timm_data_config(name))}
    assert len(specs) == 1


def test_another_image_size_keeps_the_crop_share() -> None:
    name = "vit_base_patch32_clip_224.openai"
    assert spec_from_timm(name).size == (248, 248)
    assert spec_from_timm(name, image_size=256).size == (284, 284)
    wide = spec_from_timm(name, image_size=(128, 256))
    assert (wide.resize, wide.size, wide.crop) == ("cover", (142, 284), (128, 256))


def test_what_cannot_be_a_model_is_refused() -> None:
    with pytest.raises(UsageError, match="no_such_model"):
        spec_from_timm("no_such_model")
    with pytest.raises(UsageError, match="channels"):
        spec_from_timm({"input_size": (1, 28, 28), "mean": (0.5,), "std": (0.5,)})
    with pytest.raises(UsageError):
        PreprocessSpec("squash", (0, 4), (4, 4), "bicubic", OPENAI_MEAN, OPENAI_STD)


def test_a_spec_survives_json() -> None:
    for spec in (openai_spec(288), spec_from_timm("vit_base_patch16_sapiens2.fb")):
        assert PreprocessSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def rgb(image: Image.Image) -> Image.Image:
    return image.convert("RGB")


UNDERSTOOD: list[tuple[Any, PreprocessSpec]] = [
    (
        transforms.Compose(
            [
                transforms.Resize(224, BICUBIC),
                transforms.CenterCrop(224),
                rgb,
                transforms.ToTensor(),
                NORMALISE,
            ]
        ),
        openai_spec(224),
    ),
    (
        v2.Compose(
            [
                v2.Lambda(lambda image: image.convert("RGB")),
                v2.Resize([224], v2.InterpolationMode.BICUBIC),
                v2.CenterCrop((224, 224)),
                v2.PILToTensor(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(OPENAI_MEAN, OPENAI_STD),
            ]
        ),
        openai_spec(224),
    ),
    (
        transforms.Compose([transforms.Resize((96, 64)), transforms.ToTensor()]),
        PreprocessSpec("squash", (96, 64), (96, 64), "bilinear", (0.0,) * 3, (1.0,) * 3),
    ),
    (
        transforms.Compose(
            [transforms.Resize(80, BICUBIC, max_size=120), transforms.CenterCrop(100), transforms.ToTensor(), NORMALISE]
        ),
        PreprocessSpec("shortest", (80, 80), (100, 100), "bicubic", OPENAI_MEAN, OPENAI_STD, max_size=120),
    ),
    (
        transforms.Compose(
            [transforms.CenterCrop(32), transforms.PILToTensor(), transforms.ConvertImageDtype(torch.float32)]
        ),
        PreprocessSpec("none", (32, 32), (32, 32), "bicubic", (0.0,) * 3, (1.0,) * 3),
    ),
    (
        ResNet50_Weights.IMAGENET1K_V2.transforms(),
        PreprocessSpec("shortest", (232, 232), (224, 224), "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ),
]


@pytest.mark.parametrize(
    ("transform", "expected"), UNDERSTOOD, ids=["clip", "v2", "squash", "max_size", "none", "preset"]
)
def test_compose_is_read_and_means_the_same(transform: Any, expected: PreprocessSpec, photo: Image.Image) -> None:
    spec = spec_from_transform(transform)
    assert spec == expected
    for size in ((200, 300), (90, 61), (512, 512)):
        image = photo.resize(size)
        ours = normalise([prepare(image, spec)], spec)[0]
        scale = torch.tensor(expected.std).view(3, 1, 1) * 255
        difference = ((ours - transform(image)) * scale).abs()
        assert difference.max() < (1.01 if expected.interpolation == "bilinear" else 2.01)


def test_open_clips_transform_is_read() -> None:
    made = open_clip.image_transform(224, is_train=False, mean=OPENAI_MEAN, std=OPENAI_STD)
    assert spec_from_transform(made) == openai_spec(224)


def not_a_conversion_to_rgb(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


@pytest.mark.parametrize(
    "steps",
    [
        [transforms.ToTensor(), transforms.Resize(224), transforms.CenterCrop(224)],  # tensors are resized otherwise
        [transforms.CenterCrop(224), transforms.Resize(224), transforms.ToTensor()],
        [transforms.Resize(224), transforms.ToTensor()],  # sizes differ
        [transforms.Resize((8, 8)), transforms.PILToTensor()],  # 0..255
        [transforms.Resize((8, 8)), not_a_conversion_to_rgb, transforms.ToTensor()],
        [transforms.Resize((8, 8)), transforms.RandomHorizontalFlip(), transforms.ToTensor()],
        [transforms.Resize((8, 8), transforms.InterpolationMode.HAMMING), transforms.ToTensor()],
        [transforms.Grayscale(3), transforms.Resize((8, 8)), transforms.ToTensor()],
        [v2.Resize((8, 8)), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=False)],
    ],
)
def test_anything_else_is_run_by_its_own_code(steps: list[Any]) -> None:
    made = transforms.Compose(steps)
    spec = spec_from_transform(made)
    assert isinstance(spec, OpaqueTransform) and not spec.understood and spec.why
    assert transform_of(spec) is spec
    json.dumps(spec.to_dict())
    assert " at 0x" not in json.dumps(spec.to_dict())


def test_an_opaque_transform_is_run_unchanged(photo: Image.Image) -> None:
    made = transforms.Compose([transforms.Resize((40, 30)), transforms.Grayscale(3), transforms.ToTensor(), NORMALISE])
    spec = spec_from_transform(made)
    assert torch.equal(normalise([prepare(photo, spec)], spec)[0], made(photo))
    with pytest.raises(UsageError, match="tensor"):
        prepare(photo, OpaqueTransform(lambda image: image, "returns an image"))


OWN_TRANSFORMS = """
from torchvision import transforms
from curator_embed.decoding.spec import spec_from_transform

def shift_by_1(bias):
    def shift(x):
        return (lambda y: y + 1)(x) * bias
    return shift

def shift_by_2(bias):
    def shift(x):
        return (lambda y: y + 2)(x) * bias
    return shift

class Own:
    def __init__(self, offset): self.offset = offset
    def __call__(self, x): return x + self.offset

for step in (shift_by_1(1.5), shift_by_2(1.5), shift_by_1(2.5), Own(1.5), Own(2.5)):
    print(spec_from_transform(transforms.Compose([transforms.Resize((8, 8)), transforms.ToTensor(), step])).digest)
"""


def test_an_opaque_digest_follows_code_and_parameters_and_nothing_else(tmp_path: Path) -> None:
    script = tmp_path / "own.py"
    script.write_text(OWN_TRANSFORMS)

    def digests(hash_seed: str) -> list[str]:
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONHASHSEED": hash_seed}
        run = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=True)
        return run.stdout.split()

    first = digests("1")
    assert len(set(first)) == 5
    assert digests("2") == first
