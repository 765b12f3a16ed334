"""The vocabulary of work: a step adds columns.

Embedders and hashes subclass these; execution runs them and knows nothing else about them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

if TYPE_CHECKING:
    import torch

    from curator_embed.datasets import ImageTextPairDataset
    from curator_embed.decoding.image import DecodedImage
    from curator_embed.decoding.spec import PreprocessSpec


class Step(ABC):
    """Adds one or more columns to a dataset. Picklable; heavy state is built on the worker."""

    @abstractmethod
    def columns(self) -> dict[str, pa.DataType]:
        """The columns this step adds, in order."""

    @abstractmethod
    def recipe(self) -> dict[str, Any]:
        """What determines the values, as plain JSON: it goes into the footer and decides about resume.

        Holds no time, no path and no host: the same recipe on the same samples gives the same bytes.
        """

    def __call__(self, dataset: ImageTextPairDataset) -> ImageTextPairDataset:
        """Return a new dataset with this step pending."""
        return dataset.with_step(self)


class ImageStep(Step):
    """A step that looks at decoded images, one at a time, in a decode thread (hashes, properties)."""

    @abstractmethod
    def measure(self, image: DecodedImage) -> Mapping[str, Any]:
        """Values of this step's columns for one image. Raise ImageError to fail the row."""


class BatchStep(Step):
    """A step that needs batches on a device (embedders): ``prepare`` per image, ``load_model`` per worker."""

    @abstractmethod
    def prepare(self, image: DecodedImage) -> torch.Tensor:
        """Resize and crop one image to the model's input, uint8 (3, H, W); runs in a decode thread."""

    def pixels(self) -> PreprocessSpec | None:
        """The preprocessing where ``prepare`` does that and nothing else, so that another decoder may do it instead."""
        return None

    @abstractmethod
    def settled(self, *, threads: int, compile: bool | None = None, images: int | None = None) -> BatchStep:
        """A copy whose threads and compile are fixed for a whole run, so that all workers give the same bytes.

        Args:
            threads: of the forward pass on a CPU.
            compile: take over this choice (a resumed run); None to decide now.
            images: how many will be embedded, to decide whether compiling repays; None when not known.
        """

    @abstractmethod
    def on_device(self, device: str) -> BatchStep:
        """A copy whose recipe is for this torch device ("cpu", "cuda")."""

    @abstractmethod
    def load_model(self, device: str, threads: int | None = None) -> BatchModel:
        """Build the model on this worker; called once per worker and configuration."""


class BatchModel(ABC):
    """A loaded model that takes fixed-shape batches."""

    batch_size: int
    """The one batch size at which the forward pass runs; the last batch is padded to it."""

    overlaps: bool = False
    """Whether ``submit`` returns before the batch is through; two batches may then be under way."""

    @abstractmethod
    def __call__(self, images: Sequence[torch.Tensor]) -> Any:
        """(k <= batch_size) uint8 (3, H, W) tensors -> numpy float32/float16 (k, dim)."""

    def submit(self, images: Sequence[torch.Tensor]) -> Callable[[], Any]:
        """Start a batch; the returned call gives what ``__call__`` would."""
        result = self(images)
        return lambda: result

    def exceptions(self) -> list[str]:
        """What deviated from the recipe, for the report ("batch halved to 8 after out-of-memory")."""
        return []
