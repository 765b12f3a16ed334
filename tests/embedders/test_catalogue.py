"""Names, heads, sizes and dimensions, from configuration and the meta device."""

from __future__ import annotations

import pickle

import pytest
import timm
from timm.models import get_pretrained_cfg

from curator_embed.embedders.catalogue import Blueprint, list_models
from curator_embed.embedders.openai_clip import TOWERS
from curator_embed.errors import UsageError

DIMENSIONS = {
    # classifiers: the head goes
    "tf_efficientnet_lite0": 1280,
    "resnet18.a1_in1k": 512,
    "convnext_tiny.in12k_ft_in1k": 768,
    "vit_base_patch32_clip_224.laion2b_ft_in12k_in1k": 768,
    "swin_tiny_patch4_window7_224.ms_in1k": 768,
    "mobilenetv3_small_050.lamb_in1k": 1024,
    "deit_tiny_distilled_patch16_224.fb_in1k": 192,
    # no head to begin with
    "vit_small_patch14_dinov2.lvd142m": 384,
    "vit_base_patch16_siglip_224.webli": 768,
    "resnet50_clip_gap.openai": 2048,
    # projections stay
    "vit_base_patch32_clip_224.openai": 512,
    "vit_large_patch14_clip_quickgelu_224.openai": 768,
    "resnet50x4_clip.openai": 640,
    "convnext_base.clip_laion2b": 640,
    "eva02_base_patch16_clip_224.merged2b": 512,
    "fastvit_mci0.apple_mclip": 512,
    "vit_base_mci_224.apple_mclip": 512,
    "vitamin_small_224.datacomp1b_clip": 384,
    "vit_pe_core_tiny_patch16_384.fb": 512,
    # OpenAI's own names
    "RN50": 1024,
    "RN50x64": 1024,
    "ViT-B/32": 512,
    "ViT-L/14@336px": 768,
}


@pytest.mark.parametrize("name", DIMENSIONS)
def test_classifiers_lose_their_head_and_projections_stay(name: str) -> None:
    assert Blueprint.of(name).dim == DIMENSIONS[name]


def test_a_width_that_is_kept_is_no_label_set() -> None:
    kept, dropped = set(), set()
    for name in timm.list_models(pretrained=True):
        (kept if Blueprint(name, name).projects else dropped).add((name, get_pretrained_cfg(name).num_classes))
    assert all("clip" in name or "_pe_core_" in name for name, _ in kept)
    assert not any(0 < classes < 1000 for _, classes in dropped)


@pytest.mark.parametrize(("name", "size"), [("ViT-B/32", 224), ("ViT-L/14@336px", 336), ("RN50x4", 288)])
def test_openai_names_resize_to_the_input_and_timm_names_as_timm(name: str, size: int) -> None:
    openai = Blueprint.of(name)
    assert openai.spec().size == openai.spec().crop == (size, size)
    assert "quickgelu" in openai.timm_name or name.startswith("RN")
    assert Blueprint.of("vit_base_patch32_clip_224.openai").spec().size == (248, 248)


def test_every_openai_name_stands_for_a_tower_with_a_projection() -> None:
    assert all(Blueprint.of(name).projects for name in TOWERS)


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("resnet5", "resnet50"),
        ("vit-b/32", "ViT-B/32"),
        ("ViT-B-32", "ViT-B/32"),
        ("vit_base_patch32_clip_224.openay", "vit_base_patch32_clip_224.openai"),
        ("efficentnet_b0", "efficientnet_b0"),
    ],
)
def test_a_wrong_name_is_answered_with_near_ones(wrong: str, meant: str) -> None:
    with pytest.raises(UsageError, match="Did you mean") as caught:
        Blueprint.of(wrong)
    assert meant in str(caught.value)


@pytest.mark.parametrize(
    ("name", "wrong", "near"),
    [
        ("vit_tiny_patch16_224", 225, "224, 240"),  # timm itself would drop a row of pixels silently
        ("resnet50x4_clip.openai", 300, "288, 320"),  # attention pooling over a whole number of strides
        ("efficientformer_l1", 256, "224"),  # built for one size
    ],
)
def test_a_size_that_does_not_fit_names_those_that_do(name: str, wrong: int, near: str) -> None:
    with pytest.raises(UsageError, match=f"do: {near}"):
        Blueprint.of(name, wrong)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18", "RN50", "swin_tiny_patch4_window7_224"])
def test_a_size_that_fits_reaches_model_and_preprocessing(name: str) -> None:
    resized = Blueprint.of(name, 256)
    assert resized.spec().output == (256, 256)
    assert resized.dim == Blueprint.of(name).dim


@pytest.mark.parametrize("size", [0, -224, 224.5, True])
def test_a_size_must_be_a_number_of_pixels(size: float) -> None:
    with pytest.raises(UsageError, match="whole number"):
        Blueprint.of("resnet18", size)  # type: ignore[arg-type]


def test_a_model_without_one_vector_an_image_is_refused() -> None:
    with pytest.raises(UsageError, match="not one vector"):
        _ = Blueprint.of("qwen3_vit_416m_enc.qwen3_vl_235b_a22b").dim


def test_which_models_count_as_convolutional() -> None:
    convolutional = {"resnet18": True, "RN50": True, "ViT-B/32": False, "convnext_atto": True}
    assert {name: Blueprint.of(name).is_convolutional for name in convolutional} == convolutional


def test_a_blueprint_travels_light() -> None:
    blueprint = Blueprint.of("resnet18")
    assert blueprint.meta is blueprint.meta
    assert len(pickle.dumps(blueprint)) < 500
    assert pickle.loads(pickle.dumps(blueprint)) == blueprint


def test_listing_looks_dimensions_up_where_few_match() -> None:
    (row,) = list_models("ViT-B/32")
    assert row.to_dict() == {
        "name": "ViT-B/32", "input_size": "224x224", "dim": 512, "patch_size": 32, "understood": True
    }  # fmt: skip
    rows = {row.name: row for row in list_models("resnet18*")}
    assert rows["resnet18.a1_in1k"].dim == 512
    assert rows["resnet18.a1_in1k"].patch_size is None
    assert list_models("no_such_*") == []


def test_listing_everything_is_quick_and_complete() -> None:
    rows = list_models()
    assert len(rows) == len(TOWERS) + len(timm.list_models(pretrained=True))
    assert {row.dim for row in rows if row.name == "vit_base_patch32_clip_224.openai"} == {512}
