"""``ImageEmbedder``: what every embedder is, and all that a custom one need not write.

Choosing and building models lies elsewhere; here is how a model becomes a step of a dataset.
"""

from __future__ import annotations

import copy
import inspect
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from itertools import islice
from os import PathLike, fspath
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeVar

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from curator_embed.decoding import cpu
from curator_embed.decoding.image import DecodedImage
from curator_embed.decoding.pillow import DecodeOptions, Limits, decode
from curator_embed.decoding.reference import Transform, transform_of
from curator_embed.decoding.spec import OpaqueTransform, PreprocessSpec, Spec, spec_from_transform
from curator_embed.embedders.forward import CPU_BATCH, ForwardOptions, Model, ModelRunner, finish
from curator_embed.embedders.identity import Identity, source_of
from curator_embed.embedders.pictures import Picture, decoded
from curator_embed.embedders.weights import state_dict_sha256
from curator_embed.errors import CuratorEmbedError, ImageError, UsageError
from curator_embed.steps import BatchStep, Decoder, Settings

if TYPE_CHECKING:
    from curator_embed.datasets import ImageTextPairDataset
    from curator_embed.decoding.parity import ParityReport

T = TypeVar("T")

IMAGENET = PreprocessSpec("shortest", (256, 256), (224, 224), "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""The preprocessing of an embedder that names none: bicubic to 256, centre crop 224, ImageNet's mean and std."""

log = logging.getLogger(__name__)

DECODERS = ("auto", "cpu", "dali")
DTYPES = {"float32": pa.float32(), "float16": pa.float16()}


class ImageEmbedder(BatchStep):
    """Adds a column of embeddings. Subclass it for a model of your own.

    Override one or both of ``load_embedding_model``, which says what the model is, and ``load_dataset_shard``, which
    takes over reading, decoding and preprocessing. Without the latter, images come from wherever the dataset keeps
    them, decoded and preprocessed as ``transform`` says, and the model gets float32 batches of one shape.

    Args:
        model_name: goes into the output's footer. Where ``load_embedding_model`` is not overridden, a timm or OpenAI
            name, whose pretrained weights are used.
        image_embedding_column: name of the new column.
        batch_size: images per forward pass on a GPU, at most (halved when memory is short). On a CPU 16 or fewer.
        num_threads_per_worker: threads that decode and preprocess.
        normalize_embeddings: L2-normalise, in float32.
        classifiers: column steps to run on the embeddings, as if applied to the dataset afterwards.
        autocast: bfloat16 in the forward pass on a GPU. A CPU computes in float32 in any case.
        dtype: of the column, "float32" or "float16"; some readers cannot read float16.
        transform: a ``PreprocessSpec``, a torchvision ``Compose``, or any callable from an RGB PIL image to a
            (3, H, W) tensor; None for ImageNet's at 224 pixels.
        device: "cpu", "cuda", "cuda:1", ...; None for a GPU where there is one.
        compile: use ``torch.compile``; "auto" where the run is long enough to repay it.
        cuda_graphs: on a GPU, record the forward pass once and replay it, which spares launching its kernels one by
            one: of use with small models and small batches. A model that cannot be recorded runs as it is, and the
            report says so. Takes the memory of one more forward pass.
        use_index_files: read ``.idx`` files beside tars in ``load_dataset_shard``.
        honour_exif: turn images as their EXIF says. timm does not, and neither does this by default.
        max_image_pixels: images with more are not decoded (``too_large``); None for Pillow's own limit.
        decoder: "cpu" for Pillow, "dali" for DALI (on a CPU too, for comparison: it is slower there); "auto" for DALI
            where the model runs on a GPU and DALI is installed.

    Raises:
        UsageError: an argument does not make sense; the message says which.
    """

    column_argument = "image_embedding_column"
    _source: ClassVar[str | None] = None
    """The class's source as it was when the class was made: the file may have been edited since."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # Workers' threads make classes as well, of pickles that bring the source; Python 3.11 cannot look for it there
        # while another thread does.
        cls._source = source_of(cls) if threading.current_thread() is threading.main_thread() else None

    def __init__(
        self,
        model_name: str = "custom",
        image_embedding_column: str = "image_embedding",
        *,
        batch_size: int = 256,
        num_threads_per_worker: int = 4,
        normalize_embeddings: bool = True,
        classifiers: Iterable[Callable[[ImageTextPairDataset], ImageTextPairDataset]] = (),
        autocast: bool = True,
        dtype: str = "float32",
        transform: Any = None,
        device: str | None = None,
        compile: Literal["auto"] | bool = "auto",
        use_index_files: bool = False,
        honour_exif: bool = False,
        max_image_pixels: int | None = None,
        decoder: Literal["auto", "cpu", "dali"] = "auto",
        cuda_graphs: bool = False,
    ) -> None:
        for name, number in (("batch_size", batch_size), ("num_threads_per_worker", num_threads_per_worker)):
            if not isinstance(number, int) or number < 1:
                raise UsageError(f"{name} must be a positive whole number, not {number!r}")
        if dtype not in DTYPES:
            raise UsageError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
        if compile not in ("auto", True, False):
            raise UsageError(f"compile must be 'auto', True or False, not {compile!r}")
        if decoder not in DECODERS:
            raise UsageError(f"decoder must be one of {', '.join(DECODERS)}, not {decoder!r}")
        if device is not None:
            try:
                torch.device(device)
            except RuntimeError as error:
                raise UsageError(f"device={device!r} is not a torch device; use 'cpu', 'cuda' or 'cuda:0'") from error
        if cuda_graphs and self.reads_own_shards:
            raise UsageError("cuda_graphs=True cannot go with load_dataset_shard: its batches have no one shape")
        self.model_name, self.image_embedding_column = model_name, image_embedding_column
        self.batch_size, self.num_threads_per_worker = batch_size, num_threads_per_worker
        self.normalize_embeddings, self.autocast, self.dtype = normalize_embeddings, autocast, dtype
        self.classifiers = tuple(classifiers)
        self.spec: Spec = _spec_of(transform)
        self.device, self.compile, self.use_index_files = device, compile, use_index_files
        self.honour_exif, self.decoder, self.cuda_graphs = honour_exif, decoder, cuda_graphs
        if device is not None:
            self._check_device(device)
        self.limits = Limits() if max_image_pixels is None else Limits(max_image_pixels, max_image_pixels)
        self._threads: int | None = None
        self._identity: Identity | None = None
        # Shared by the copies that ``settled`` and ``on_device`` make; models do not travel to other processes.
        self._memory: dict[str, Any] = {}
        self._models: dict[Any, Any] = {}

    # --- what a custom embedder overrides -----------------------------------------------------------

    def load_dataset_shard(self, tar_path: str) -> Iterable[tuple[Any, dict[str, Any]]]:
        """Yield one webdataset tar in batches ready for the model.

        Args:
            tar_path: path or URL.

        Yields:
            (batch, metadata): a batch that ``load_embedding_model``'s model takes, here float32 (n, 3, H, W) on the
            CPU, and lists of n values, at least the ids: ``{"key": [...]}``. Images that do not decode are left out.
        """
        from curator_embed.sources.webdataset import WebdatasetShard

        shard = WebdatasetShard(
            PurePosixPath(tar_path).stem, tar_path, use_index="auto" if self.use_index_files else False
        )
        with ThreadPoolExecutor(self.num_threads_per_worker) as pool:
            samples = shard.samples(id_col="key")
            while chunk := list(islice(samples, self._rows(self._target_device))):
                prepared = list(pool.map(self._prepare_or_none, (sample.image for sample in chunk)))
                kept = [(s.key, image) for s, image in zip(chunk, prepared, strict=True) if image is not None]
                if kept:
                    batch = cpu.normalise([image for _, image in kept], self.spec)
                    yield batch, {"key": [key for key, _ in kept]}

    def load_embedding_model(self, device: str) -> Model:
        """Give the model: a callable that takes a batch on ``device`` and returns (n, dim), a tensor or an array.

        A ``torch.nn.Module`` is put into eval mode and into the memory layout that suits it. The default builds the
        timm or OpenAI model that ``model_name`` names, with pretrained weights.
        """
        from curator_embed.embedders.catalogue import Blueprint

        return Blueprint.of(self.model_name).build(pretrained=True).to(device)

    # --- a step of a dataset ------------------------------------------------------------------------

    def __call__(self, dataset: ImageTextPairDataset) -> ImageTextPairDataset:
        """Return a new dataset with this embedder, and then its classifiers, pending."""
        dataset = super().__call__(dataset)
        for classifier in self.classifiers:
            dataset = classifier(dataset)
        return dataset

    @property
    def reads_own_shards(self) -> bool:
        """Whether ``load_dataset_shard`` is overridden, so that execution must use ``embed_shard``."""
        return type(self).load_dataset_shard is not ImageEmbedder.load_dataset_shard

    @property
    def embedding_dim(self) -> int | None:
        """Length of an embedding, found by running the model on a blank image, once; None where the size of its
        images is not known before they are read."""
        if isinstance(self.spec, OpaqueTransform) or self.reads_own_shards:
            return None
        if "dim" not in self._memory:
            blank, asking = torch.zeros(3, *self.spec.output, dtype=torch.uint8), self
            if not self._is_cpu:  # the process that asks plans a run; its GPU belongs to a worker
                asking = copy.copy(self)
                asking.device, asking.batch_size = "cpu", 1
            self._memory["dim"] = asking._runner_here()([blank]).shape[1]
        return int(self._memory["dim"])

    def columns(self) -> dict[str, pa.DataType]:
        """One column of plain lists: fixed-size lists with a null in the column are unreadable for many readers."""
        return {self.image_embedding_column: pa.list_(DTYPES[self.dtype])}

    def recipe(self) -> dict[str, Any]:
        """What determines the values, as plain JSON; ``software`` is recorded only and does not make a column stale.

        ``threads`` and ``compile`` are null until ``settled``. The weights' hash is computed on the first call and
        travels with the embedder from then on. An embedder of your own is identified by its source code as well, and by
        what that uses of your modules; if it takes parameters that change the values, override this and add them.
        """
        device = self._target_device
        output = list(self.spec.output) if isinstance(self.spec, PreprocessSpec) else [None, None]
        identity = self._identity or self._identify()
        return {
            "step": "embed",
            "class": type(self).__name__,
            **({"code": identity.code} if identity.code else {}),
            "model": self.model_name,
            "weights": self.weights_sha256(),
            "preprocessing": identity.preprocessing,
            "honour_exif": self.honour_exif,
            "max_image_pixels": self.limits.max_pixels,
            "batch_shape": None if self.reads_own_shards else [self._rows(device), 3, *output],
            "device": torch.device(device).type,
            "decoder": self.decoder,
            "threads": self._threads,
            "compile": self.compile if isinstance(self.compile, bool) else None,
            # Only where it is so: recipes from before the option stay what they were.
            **({"cuda_graphs": True} if self.cuda_graphs else {}),
            "precision": self._precision(device),
            "normalize": self.normalize_embeddings,
            "dtype": self.dtype,
            **({"unrepeatable": identity.unrepeatable} if identity.unrepeatable else {}),
            "software": {name: version(name) for name in ("torch", "timm", "pillow")},
        }

    def weights_sha256(self) -> str | None:
        """Identify the weights by their contents; None for a model that is no ``torch.nn.Module``."""
        if "weights" not in self._memory:
            model = self.load_embedding_model("cpu")
            self._memory["weights"] = (
                state_dict_sha256(model.state_dict()) if isinstance(model, torch.nn.Module) else None
            )
        found: str | None = self._memory["weights"]
        return found

    def decode_options(self) -> DecodeOptions:
        """The limits and the turning that were asked for."""
        return DecodeOptions(self.limits, self.honour_exif)

    def settled(self, settings: Settings, *, images: int | None = None) -> Self:
        """A copy whose threads and compile are fixed for a whole run; see ``BatchStep.settled``."""
        fixed = copy.copy(self)
        fixed._identity = self._identify()  # workers have it from here: what runs may change its own state
        if fixed._identity.unrepeatable:
            log.warning("%s: %s", self._title, fixed._identity.unrepeatable["why"])
        if self.reads_own_shards:
            return fixed
        compile = settings.compile
        if compile is None:
            compile = self.compile_repays(images) if self.compile == "auto" else bool(self.compile)
        # On a GPU the count says nothing about the result; one constant keeps recipes equal between machines.
        fixed._threads, fixed.compile = (settings.threads if self._is_cpu else None), compile
        return fixed

    def decoded_by(self, decoder: Decoder) -> Self:
        """A copy that names this decoder, where none was chosen: DALI's pixels differ a little from Pillow's."""
        if self.decoder != "auto":
            return self
        named = copy.copy(self)
        named.decoder = decoder
        return named

    def eager(self) -> Self:
        """A copy that neither compiles nor records its model."""
        plain = copy.copy(self)
        plain.compile = plain.cuda_graphs = False
        return plain

    def on_device(self, device: str) -> Self:
        """A copy for this device.

        Raises:
            UsageError: CUDA graphs are wanted, and it is no GPU.
        """
        self._check_device(device)
        moved = copy.copy(self)
        moved.device = device
        return moved

    def compile_repays(self, images: int | None) -> bool:
        """Whether compiling saves more than it costs over so many images (None: not known). Not known of custom
        models, so no."""
        return False

    def prepare(self, image: DecodedImage) -> torch.Tensor:
        """Resize and crop one image: uint8 (3, H, W), or what an opaque transform makes. Runs on one thread."""
        return cpu.prepare(image.rgb, self.spec, self.limits)

    def pixels(self) -> PreprocessSpec | None:
        """The spec, of an embedder whose images no method of its own must see."""
        if self.reads_own_shards or type(self).prepare is not ImageEmbedder.prepare:
            return None
        return self.spec if isinstance(self.spec, PreprocessSpec) else None

    def load_model(self, device: str, threads: int | None = None) -> ModelRunner:
        """Build the model for this device.

        Args:
            threads: of the forward pass on a CPU; what was settled goes before it.

        Raises:
            CuratorEmbedError: the weights differ from those of the process that planned the run.
        """
        model = self.load_embedding_model(device)
        expected = self._memory.get("weights")
        if expected and isinstance(model, torch.nn.Module) and state_dict_sha256(model.state_dict()) != expected:
            raise CuratorEmbedError(
                f"{self._title}: the weights loaded here are not those the run was planned with. See that every "
                "machine has the same file and the same versions of torch and timm, and that load_embedding_model "
                "gives the same weights each time (seed what is random)"
            )
        options = ForwardOptions(
            device=device,
            batch_size=self._rows(device),
            spec=self.spec,
            threads=self._threads or threads,
            precision=self._precision(device),
            normalize=self.normalize_embeddings,
            dtype=self.dtype,
            compile=self.compile is True,
            cuda_graphs=self.cuda_graphs,
        )
        return ModelRunner(model, options, self._title)

    def embed_shard(self, source: str, device: str, id_col: str = "key") -> Iterator[tuple[list[Any], np.ndarray]]:
        """Embed one shard through ``load_dataset_shard``, batch by batch.

        Args:
            source: the tar's path or URL.
            id_col: the metadata's list that holds the ids; ``"key"`` where it is absent.

        Yields:
            (ids, embeddings (n, dim) of the embedder's dtype).

        Raises:
            UsageError: a batch lacks ids, or ids, images and embeddings differ in number.
        """
        model = self._own_model(device)
        for batch, metadata in self.load_dataset_shard(source):
            ids = metadata.get(id_col, metadata.get("key")) if isinstance(metadata, dict) else None
            if ids is None:
                raise UsageError(
                    f"{self._title}.load_dataset_shard must yield (batch, {{'{id_col}': [ids], ...}}); "
                    f"for {source} it gave {type(metadata).__name__} without '{id_col}'"
                )
            on_device = batch.to(device) if isinstance(batch, torch.Tensor) else batch
            precision = self._precision(device)
            with (
                torch.inference_mode(),
                torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=precision != "float32"),
            ):
                output = torch.as_tensor(model(on_device))
            if output.ndim != 2 or len(output) != len(ids):
                raise UsageError(
                    f"{self._title} gave embeddings of shape {tuple(output.shape)} for {len(ids)} ids of {source}; "
                    "they must be (n, dim), one for each id"
                )
            with torch.inference_mode():
                finished = finish(output, normalize=self.normalize_embeddings, dtype=self.dtype)
            yield list(ids), finished.cpu().numpy()

    # --- without a dataset --------------------------------------------------------------------------

    def embed(self, images: Iterable[Picture]) -> np.ndarray:
        """Embed images at once, without a dataset or a cluster. The model stays loaded.

        Args:
            images: paths or URLs, encoded bytes, or PIL images, in any mixture.

        Returns:
            float32 (n, dim), rows in the images' order.

        Raises:
            ImageError: one cannot be read or decoded; the message says which.
            UsageError: one is of another type.
        """
        if isinstance(images, str | bytes | PathLike | Image.Image):
            raise UsageError("embed takes a list of images; for one image write embed([image])[0]")
        runner, found = self._runner_here(), []
        numbered = iter(enumerate(images))
        with ThreadPoolExecutor(self.num_threads_per_worker) as pool:
            while chunk := list(islice(numbered, runner.batch_size)):
                found.append(runner(list(pool.map(lambda item: self._picture(*item), chunk))))
        if not found:
            return np.empty((0, self.embedding_dim or 0), np.float32)
        return np.concatenate(found).astype(np.float32, copy=False)

    def certify(self, images: Sequence[bytes]) -> ParityReport:
        """Compare this preprocessing with its reference on encoded images, in grey levels and in embeddings."""
        from curator_embed.decoding.parity import compare

        model = self._own_model("cpu")
        with torch.inference_mode():
            return compare(
                images, self.spec, self._reference(), lambda batch: torch.as_tensor(model(batch)), self.limits
            )

    # --- inside -------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_models": {}}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.model_name!r}, {self.image_embedding_column!r})"

    @property
    def _title(self) -> str:
        return f"{type(self).__name__}({self.model_name!r})"

    @property
    def _target_device(self) -> str:
        return self.device or ("cuda" if torch.cuda.is_available() else "cpu")

    def _check_device(self, device: str) -> None:
        if self.cuda_graphs and torch.device(device).type != "cuda":
            raise UsageError(f"cuda_graphs=True needs a GPU, and this run is on the device '{device}'; leave it out")

    @property
    def _is_cpu(self) -> bool:
        return torch.device(self._target_device).type == "cpu"

    def _rows(self, device: str) -> int:
        return min(self.batch_size, CPU_BATCH) if torch.device(device).type == "cpu" else self.batch_size

    def _precision(self, device: str) -> str:
        return "bfloat16" if self.autocast and torch.device(device).type == "cuda" else "float32"

    def _reference(self) -> Transform:
        return transform_of(self.spec)

    def _runner_here(self) -> ModelRunner:
        """The runner of ``embed``, neither compiled nor recorded: it is for a few images."""
        device = self._target_device
        asked, seen = torch.device(device), torch.cuda.device_count() if torch.cuda.is_available() else 0
        if asked.type == "cuda" and (asked.index or 0) >= seen:
            raise UsageError(f"device='{device}' was asked for, and this process sees {seen} GPUs. Pass device='cpu'")
        key = device, self.batch_size, self._threads, self.dtype, self.normalize_embeddings, self.autocast
        if key not in self._models:
            self._models[key] = self.eager().load_model(device)
        runner: ModelRunner = self._models[key]
        return runner

    def _own_model(self, device: str) -> Model:
        """The bare model, kept between shards."""
        key = "bare", device
        if key not in self._models:
            model = self.load_embedding_model(device)
            self._models[key] = model.eval() if isinstance(model, torch.nn.Module) else model
        kept: Model = self._models[key]
        return kept

    def _prepare_or_none(self, encoded: bytes | None) -> torch.Tensor | None:
        try:
            return self.prepare(decode(encoded or b"", self.limits, honour_exif=self.honour_exif))
        except ImageError:
            return None

    def _picture(self, number: int, item: Picture) -> torch.Tensor:
        name = f"images[{number}]" + (f" ({fspath(item)})" if isinstance(item, str | PathLike) else "")
        try:
            return self.prepare(decoded(item, self.decode_options()))
        except ImageError as error:
            raise ImageError(error.reason, f"{name}: {error.detail}" if error.detail else name) from error

    def _identify(self) -> Identity:
        """What the embedder's own code and transform are now; both can change between two runs of one process."""
        transform = None if self.reads_own_shards else self.spec
        package = __name__.partition(".")[0]
        kinds = [kind for kind in type(self).__mro__ if issubclass(kind, ImageEmbedder)]
        own = {
            kind: source_of(kind) if kind._source is None else kind._source
            for kind in kinds
            if kind.__module__.partition(".")[0] != package
        }
        return Identity.of(own, transform)

    def digest_state(self) -> dict[str, Any]:
        """Attributes that a subclass has added: what a transform that is a method of its embedder may depend on."""
        return {name: value for name, value in vars(self).items() if name not in _OWN_ATTRIBUTES}


_OWN_ATTRIBUTES = frozenset(inspect.signature(ImageEmbedder.__init__).parameters) | frozenset(
    ("spec", "limits", "_threads", "_identity", "_memory", "_models")
)


def _spec_of(transform: Any) -> Spec:
    if transform is None:
        return IMAGENET
    if isinstance(transform, PreprocessSpec | OpaqueTransform):
        return transform
    if not callable(transform):
        raise UsageError(
            f"transform must be a PreprocessSpec, a torchvision Compose or another callable, not {transform!r}"
        )
    return spec_from_transform(transform)
