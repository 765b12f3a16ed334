"""OpenAI's names of its CLIP models, and the timm towers that hold the same weights.

Apart from ``catalogue`` because the names promise more than an architecture: OpenAI's weights, its preprocessing
(resize to the input size itself) and the projected output. Source: ``clip.available_models()`` in openai/CLIP.
"""

from __future__ import annotations

TOWERS = {
    "RN50": "resnet50_clip.openai",
    "RN101": "resnet101_clip.openai",
    "RN50x4": "resnet50x4_clip.openai",
    "RN50x16": "resnet50x16_clip.openai",
    "RN50x64": "resnet50x64_clip.openai",
    # OpenAI trained its ViTs with QuickGELU; timm's tags without it approximate them.
    "ViT-B/32": "vit_base_patch32_clip_quickgelu_224.openai",
    "ViT-B/16": "vit_base_patch16_clip_quickgelu_224.openai",
    "ViT-L/14": "vit_large_patch14_clip_quickgelu_224.openai",
    "ViT-L/14@336px": "vit_large_patch14_clip_quickgelu_336.openai",
}
"""OpenAI name -> timm name."""
