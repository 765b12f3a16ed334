"""The vocabulary of work: a step adds columns, and this is all that a step may be asked.

Embedders and hashes subclass these; execution runs them and knows nothing else about them. What has a default need not
be overridden. Everything a run asks is here, so that a step that forgets something is told by the type checker and not
treated another way in silence.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import pyarrow as pa

if TYPE_CHECKING:
    import numpy as np
    import torch

    from curator_embed.datasets import ImageTextPairDataset
    from curator_embed.decoding.image import DecodedImage
    from curator_embed.decoding.parity import ParityReport
    from curator_embed.decoding.pillow import DecodeOptions
    from curator_embed.decoding.spec import PreprocessSpec

Decoder = Literal["cpu", "dali"]
"""What decodes the images: Pillow on the CPU, or DALI where the models are."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What a run settles once, so that all its workers, and the runs that resume it, give the same bytes.

    Attributes:
        threads: of the forward pass on a CPU; None where it makes no difference or is not settled.
        compile: whether the model is compiled; None to decide by the number of images.
    """

    threads: int | None = None
    compile: bool | None = None


class Step(ABC):
    """Adds one or more columns to a dataset. Picklable; heavy state is built on the worker.

    A step is an ``ImageStep`` or a ``BatchStep``; a subclass of ``Step`` alone is refused, because nobody would know
    what to show it.
    """

    column_argument: ClassVar[str] = ""
    """The argument by which a caller gives the columns other names, for messages; empty where there is none."""

    num_threads_per_worker: int | None = None
    """Decode threads that a worker should have; a run takes the most that any of its steps asks for, or 4."""

    @abstractmethod
    def columns(self) -> dict[str, pa.DataType]:
        """The columns this step adds, in order."""

    @abstractmethod
    def recipe(self) -> dict[str, Any]:
        """What determines the values, as plain JSON: it goes into the footer and decides about resume.

        Holds no time, no path and no host: the same recipe on the same samples gives the same bytes. A step that cannot
        tell what determines its values adds ``"unrepeatable": {"why": a sentence, "run": what no other run has}``: its
        columns never count as done in another run, and the sentence is shown where that matters.
        """

    def decode_options(self) -> DecodeOptions | None:
        """How images must be decoded for this step; None where any way will do. Steps of one run must agree."""
        return None

    def __call__(self, dataset: ImageTextPairDataset) -> ImageTextPairDataset:
        """Return a new dataset with this step pending.

        Raises:
            UsageError: the dataset cannot take it; see ``ImageTextPairDataset.with_step``.
        """
        return dataset.with_step(self)


class ImageStep(Step):
    """A step that looks at decoded images, one at a time, in a decode thread (hashes, properties)."""

    @abstractmethod
    def measure(self, image: DecodedImage) -> Mapping[str, Any]:
        """Values of this step's columns for one image; a column that is left out is null. Raise ImageError to fail the
        row."""


class BatchStep(Step):
    """A step that needs batches on a device (embedders): ``prepare`` per image, ``load_model`` per worker."""

    device: str | None = None
    """The torch device that the caller asked for ("cpu", "cuda", "cuda:1"); None for a GPU where all workers have one.
    Embedders of one run must agree."""

    decoder: Literal["auto"] | Decoder = "auto"
    """What the caller wants the images decoded with; "auto" for DALI where it runs beside the model on a GPU. Embedders
    of one run must agree."""

    batch_size: int = 64
    """Images per forward pass, at most. A decoder that works in batches takes as many."""

    @property
    def embedding_dim(self) -> int | None:
        """Length of an embedding; None where that is not known before the model has run."""
        return None

    @property
    def reads_own_shards(self) -> bool:
        """Whether ``embed_shard`` is used, in the place of ``prepare`` and ``load_model``."""
        return False

    @abstractmethod
    def prepare(self, image: DecodedImage) -> torch.Tensor:
        """Resize and crop one image to the model's input, uint8 (3, H, W); runs in a decode thread."""

    def pixels(self) -> PreprocessSpec | None:
        """The preprocessing where ``prepare`` does that and nothing else, so that another decoder may do it instead."""
        return None

    def on_device(self, device: str) -> Self:
        """A copy whose recipe is for this torch device ("cpu", "cuda"); itself where that makes no difference."""
        return self

    def decoded_by(self, decoder: Decoder) -> Self:
        """A copy whose recipe names this decoder, where ``decoder`` was "auto"; itself where it makes no difference."""
        return self

    def settled(self, settings: Settings, *, images: int | None = None) -> Self:
        """A copy with what is fixed for a whole run, so that all workers give the same bytes.

        Args:
            settings: a resumed run takes over those of the finished shards.
            images: how many will be embedded, to decide whether compiling repays; None when not known.
        """
        return self

    def eager(self) -> Self:
        """A copy whose model is ready at once, not compiled and not recorded: for a trial on a few images."""
        return self

    @abstractmethod
    def load_model(self, device: str, threads: int | None = None) -> BatchModel:
        """Build the model on this worker; called once per worker and configuration.

        Args:
            threads: of the forward pass on a CPU; what was settled goes before it.
        """

    def embed_shard(self, source: str, device: str, id_col: str) -> Iterable[tuple[Sequence[Any], np.ndarray]]:
        """Read and embed one shard, where ``reads_own_shards``.

        Args:
            source: path or URL of the shard.
            device: the torch device of the run.
            id_col: the dataset's id column.

        Returns:
            batches of (n ids, embeddings (n, dim)).
        """
        raise NotImplementedError(f"{type(self).__name__} has reads_own_shards and no embed_shard")

    def certify(self, images: Sequence[bytes]) -> ParityReport | None:
        """Compare the preprocessing with its reference on encoded images; None where there is no reference."""
        return None


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
