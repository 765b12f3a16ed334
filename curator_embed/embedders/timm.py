"""``TimmImageEmbedder``: a timm model or one of OpenAI's CLIP towers, by name."""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING, Any, Literal

import torch

from curator_embed.decoding.reference import Transform, timm_transform
from curator_embed.embedders.base import ImageEmbedder
from curator_embed.embedders.catalogue import Blueprint
from curator_embed.embedders.forward import cpu_compiler_found
from curator_embed.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from curator_embed.datasets import ImageTextPairDataset

COMPILE_REPAYS_AFTER = 10_000
"""Images. EfficientNet-Lite0 takes 24 s to compile on two cores and then saves 6.5 ms an image: even at 3,700;
larger nets take longer and save more. More than twice that, because a run's images are spread over its workers."""


class TimmImageEmbedder(ImageEmbedder):
    """Embeds with a timm model: features, not class scores; a CLIP tower's projection stays.

    Args:
        model_name: timm's ("convnext_tiny.in12k_ft_in1k"), meaning timm's preprocessing, or OpenAI's ("ViT-B/32"),
            meaning OpenAI's. ``curator-embed models`` lists both.
        pretrained: download the weights from the hub that timm uses.
        weights: a safetensors file or a torch state dict, used instead of a download. With neither, weights are random
            (and the same in every process): good for trying things out, not for finding similar images.
        image_size: height and width of the input in pixels, where it shall differ from the model's own.

    The other arguments are ``ImageEmbedder``'s; ``transform=None`` means the model's own preprocessing.

    Raises:
        UsageError: no such model (near names are given), an image size that does not fit (sizes that do are given), no
            such weights file, or an argument that makes no sense.
    """

    def __init__(
        self,
        model_name: str,
        pretrained: bool = False,
        batch_size: int = 256,
        num_threads_per_worker: int = 4,
        image_embedding_column: str = "image_embedding",
        normalize_embeddings: bool = True,
        classifiers: Iterable[Callable[[ImageTextPairDataset], ImageTextPairDataset]] = (),
        autocast: bool = True,
        use_index_files: bool = False,
        *,
        weights: str | os.PathLike[str] | None = None,
        image_size: int | None = None,
        dtype: str = "float32",
        compile: Literal["auto"] | bool = "auto",
        device: str | None = None,
        transform: Any = None,
        honour_exif: bool = False,
        max_image_pixels: int | None = None,
        decoder: Literal["auto", "cpu", "dali"] = "auto",
        cuda_graphs: bool = False,
    ) -> None:
        self.blueprint = Blueprint.of(model_name, image_size)
        self._follows_name = transform is None
        super().__init__(
            model_name,
            image_embedding_column,
            batch_size=batch_size,
            num_threads_per_worker=num_threads_per_worker,
            normalize_embeddings=normalize_embeddings,
            classifiers=classifiers,
            autocast=autocast,
            dtype=dtype,
            transform=self.blueprint.spec() if transform is None else transform,
            device=device,
            compile=compile,
            use_index_files=use_index_files,
            honour_exif=honour_exif,
            max_image_pixels=max_image_pixels,
            decoder=decoder,
            cuda_graphs=cuda_graphs,
        )
        self.pretrained, self.image_size = pretrained, image_size
        # Absolute: workers may have another working directory.
        self.weights = None if weights is None else os.path.abspath(weights)
        if weights is not None and not os.path.isfile(weights):
            raise UsageError(f"weights={os.fspath(weights)!r}: no such file")
        if weights is None and pretrained and self._builds_blueprint:
            self.blueprint.check_pretrained()
        if weights is None and not pretrained:
            warnings.warn(
                f"{model_name} has random weights: pass pretrained=True or weights=PATH for useful embeddings",
                stacklevel=2,
            )

    def load_embedding_model(self, device: str) -> torch.nn.Module:
        """Build the model with its weights, in eval mode; errors as ``Blueprint.build``."""
        return self.blueprint.build(pretrained=self.pretrained, weights=self.weights).to(device)

    @property
    def embedding_dim(self) -> int | None:
        """Length of an embedding; found without weights or arithmetic."""
        return self.blueprint.dim if self._builds_blueprint else super().embedding_dim

    def compile_repays(self, images: int | None) -> bool:
        """Whether compiling saves more than it costs over so many images (None: not known).

        Only on a CPU with a compiler, and only for convolutional nets: they gain up to 1.9 times, ViTs 1.03.
        """
        if images is None or images < COMPILE_REPAYS_AFTER or not (self._is_cpu and self._builds_blueprint):
            return False
        return self.blueprint.is_convolutional and cpu_compiler_found()

    def recipe(self) -> dict[str, Any]:
        """See ``ImageEmbedder.recipe``; ``architecture`` is the timm model behind the name."""
        return {**super().recipe(), "architecture": self.blueprint.timm_name}

    @property
    def _builds_blueprint(self) -> bool:
        """Whether the model is the name's own: a subclass may build another."""
        return type(self).load_embedding_model is TimmImageEmbedder.load_embedding_model

    def _reference(self) -> Transform:
        if self._follows_name and not self.blueprint.is_openai:
            return timm_transform(self.blueprint.config, self.image_size)
        return super()._reference()
