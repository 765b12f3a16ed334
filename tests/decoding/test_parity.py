"""Promise 2: what the model sees is what timm's own transform shows it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from curator_embed.decoding.cpu import normalise, prepare
from curator_embed.decoding.parity import compare
from curator_embed.decoding.pillow import decode
from curator_embed.decoding.reference import reference, timm_transform, transform_of
from curator_embed.decoding.spec import PreprocessSpec, openai_spec, spec_from_timm, spec_from_transform
from curator_embed.errors import UsageError

FAMILIES = [
    "resnet50.a1_in1k",
    "vit_base_patch32_clip_224.openai",
    "vit_large_patch14_clip_quickgelu_224.openai",
    "resnet50x4_clip.openai",
    "tf_efficientnet_lite0.in1k",
    "convnext_tiny.fb_in22k_ft_in1k_384",  # squash
    "coat_lite_medium_384.in1k",  # squash
    "swinv2_tiny_window8_256.ms_in1k",
    "vit_base_patch14_dinov2.lvd142m",
    "vit_base_patch16_siglip_224.webli",  # squash
    "eva02_base_patch14_224.mim_in22k",
    "mobilenetv3_large_100.ra_in1k",
    "cspdarknet53.ra_in1k",  # bilinear
    "dla34.in1k",  # bilinear
    "mixer_b16_224.goog_in21k_ft_in1k",
    "vit_base_patch16_sapiens2.fb",  # squash, bilinear, 1024x768
    "vit_small_patch16_lingbot.robbyant",  # squash, bilinear
    "deepseek_vit_412m.deepseek_v4_1_flash",  # longest side + pad
]
SMALL = [
    ("test_resnet.r160_in1k", None),
    ("test_vit.r160_in1k", None),
    ("test_efficientnet.r160_in1k", None),
    ("test_convnext.r160_in1k", None),
    ("test_nfnet.r160_in1k", None),
    ("test_byobnet.r160_in1k", None),
    ("repvit_m0_9.dist_300e_in1k", None),
    ("mobilenetv3_small_050.lamb_in1k", None),
    ("lcnet_050.ra2_in1k", None),
    ("tinynet_e.in1k", None),
    ("mobilevit_xxs.cvnets_in1k", None),
    ("ghostnet_100.in1k", None),
    ("regnetx_002.pycls_in1k", None),
    ("efficientvit_b0.r224_in1k", None),
    ("test_vit2.r160_in1k", "squash"),
    ("test_resnet.r160_in1k", "border"),
]
"""Small networks of different families; two of them with the crop modes whose own models are large."""


@pytest.fixture(scope="module")
def photographs(clothing: list[Path], wheel_photos: list[Path]) -> list[bytes]:
    """JPEGs from telephones, and photographs that were never compressed with loss; 20 in all."""
    uncompressed = [path for path in wheel_photos if path.suffix == ".png" and path.stat().st_size < 1_000_000]
    return [path.read_bytes() for path in clothing[::2] + uncompressed]


@pytest.fixture(scope="module")
def odd_shapes(shapes: dict[str, Image.Image], encode: Callable[..., bytes]) -> list[bytes]:
    """Those whose full resize the reference can compute."""
    return [encode(shapes[name], "PNG") for name in ("upscaled", "tall", "wide", "tiny", "1x1")]


@pytest.mark.parametrize("name", FAMILIES)
def test_pixels_of_real_photographs(name: str, photographs: list[bytes]) -> None:
    report = compare(photographs, spec_from_timm(name), timm_transform(name))
    assert report.images == len(photographs) and not report.failed
    assert report.holds, report


@pytest.mark.parametrize("name", FAMILIES)
def test_pixels_of_odd_shapes_and_of_photographs_in_wheels(
    name: str, odd_shapes: list[bytes], wheel_photos: list[Path]
) -> None:
    spec, transform = spec_from_timm(name), timm_transform(name)
    small = [path.read_bytes() for path in wheel_photos if path.stat().st_size < 500_000]
    report = compare(odd_shapes + small, spec, transform)
    assert report.images == len(odd_shapes) + len(small)
    assert report.max_difference <= (1 if spec.interpolation == "bilinear" else 2), report


@pytest.mark.parametrize(("name", "crop_mode"), SMALL)
def test_embeddings(name: str, crop_mode: str | None, odd_shapes: list[bytes], wheel_photos: list[Path]) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=0).eval()
    config = model.pretrained_cfg | ({"crop_mode": crop_mode} if crop_mode else {})
    images = odd_shapes + [path.read_bytes() for path in wheel_photos if path.stat().st_size < 500_000]
    report = compare(images, spec_from_timm(config), timm_transform(config), model)
    assert report.min_cosine is not None and report.min_cosine >= 0.9999, report


def test_openais_tensors_are_reproduced(clip_images: dict[str, bytes], openai_tensors: dict[str, np.ndarray]) -> None:
    assert clip_images.keys() == openai_tensors.keys()
    spec = openai_spec(224)
    scale = torch.tensor(spec.std).view(3, 1, 1) * 255
    for name, expected in openai_tensors.items():
        data = clip_images[name]
        ours = normalise([prepare(decode(data).rgb, spec)], spec)[0]
        difference = ((ours - torch.from_numpy(expected)) * scale).abs().round()
        assert difference.max() <= 2, name
        assert (difference > 1).float().mean() < 1e-5, name
        assert torch.allclose(reference(data, transform_of(spec)), torch.from_numpy(expected), atol=1e-5)


def test_a_report_shows_what_is_wrong(photo: Image.Image, encode: Callable[..., bytes]) -> None:
    data = encode(photo, "PNG")
    right, name = spec_from_timm("resnet50.a1_in1k"), "resnet50.a1_in1k"
    wrong = PreprocessSpec("shortest", (240, 240), right.crop, right.interpolation, right.mean, right.std)
    report = compare([data, b"", data[:900]], wrong, timm_transform(name), model=lambda batch: batch.mean((2, 3)))
    assert (report.images, report.failed) == (1, {"empty": 1, "truncated": 1})
    assert not report.holds and report.max_difference > 20 and report.share_above_1 > 0.1
    assert report.min_cosine is not None and report.min_cosine < 1
    assert json.loads(json.dumps(report.to_dict()))["versions"]["pillow"]
    assert not compare([], right, timm_transform(name)).holds
    with pytest.raises(UsageError, match="reference gives"):
        compare([data], openai_spec(64), timm_transform(name))


def test_sixteen_bit_images_are_compared_scaled(photo: Image.Image, encode: Callable[..., bytes]) -> None:
    deep = Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257)
    report = compare([encode(deep, "PNG")], openai_spec(224), transform_of(openai_spec(224)))
    assert report.holds and report.images == 1


def test_an_opaque_transform_differs_from_nothing(photo: Image.Image, encode: Callable[..., bytes]) -> None:
    from torchvision import transforms

    made = transforms.Compose([transforms.Resize((8, 8)), transforms.Grayscale(3), transforms.ToTensor()])
    report = compare([encode(photo, "PNG")], spec_from_transform(made), made)
    assert report.holds and not report.understood and report.max_difference == 0
