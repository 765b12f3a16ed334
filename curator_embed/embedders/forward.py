"""The model runner: batches of one fixed shape through a model, bit for bit repeatable on a CPU.

Knows nothing of names, weights or datasets; embedders configure it and execution drives it.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import sysconfig
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from curator_embed.decoding.cpu import normalise
from curator_embed.decoding.spec import PreprocessSpec, Spec
from curator_embed.embedders.cuda_graph import CapturedForward
from curator_embed.errors import CuratorEmbedError, UsageError
from curator_embed.steps import BatchModel

Model = Callable[[torch.Tensor], Any]
Pending = Callable[[], np.ndarray]

CPU_BATCH = 16
"""Batch size on a CPU whatever is asked: larger ones are not faster there and make the last, padded one dearer."""

_OUT_OF_MEMORY = re.compile(r"CUDA.{0,20}out of memory|CU(?:BLAS|DNN)_STATUS_\w*ALLOC")

log = logging.getLogger(__name__)


def prefers_channels_last(model: Any) -> bool:
    """Whether convolutions make up the model: any whose windows overlap (a ViT's patches do not).

    A function of the model alone and never of a timing: the layout changes the bits of the result.
    """
    return isinstance(model, torch.nn.Module) and any(
        isinstance(part, torch.nn.Conv2d) and any(k > s for k, s in zip(part.kernel_size, part.stride, strict=True))
        for part in model.modules()
    )


def cpu_compiler_found() -> bool:
    """Whether inductor can build for the CPU: a C++ compiler and Python's headers."""
    compiler = os.environ.get("CXX") or "g++"
    headers = Path(sysconfig.get_paths()["include"], "Python.h")
    return (shutil.which(compiler) or shutil.which("clang++")) is not None and headers.is_file()


@contextmanager
def intra_op_threads(count: int | None) -> Iterator[None]:
    """Run torch with ``count`` threads in this thread; the setting is per calling thread, so it is made per call."""
    before = torch.get_num_threads()
    if count is None or count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True, slots=True)
class ForwardOptions:
    """How a model is run.

    Attributes:
        device: a torch device, ``"cpu"`` or ``"cuda"`` or ``"cuda:1"``.
        batch_size: images per forward pass; the last batch is padded to it.
        spec: says how uint8 images become the model's float input; an opaque transform's are float already.
        threads: of the forward pass on a CPU; None for torch's own number.
        precision: "float32", or the autocast type "bfloat16" or "float16".
        normalize: L2-normalise, in float32.
        dtype: of the result, "float32" or "float16".
        compile: use ``torch.compile``.
        cuda_graphs: record the forward pass once and replay it; on a GPU alone.
    """

    device: str
    batch_size: int
    spec: Spec
    threads: int | None = None
    precision: str = "float32"
    normalize: bool = True
    dtype: str = "float32"
    compile: bool = False
    cuda_graphs: bool = False


class ModelRunner(BatchModel):
    """Runs a model at one batch shape; see ``BatchModel``.

    On CUDA, ``submit`` returns before the batch is through: with one batch in flight, the next one's copies overlap
    with it. Out-of-memory there halves the batch for good. ``exceptions`` tells of that, and of a model that could not
    be compiled or recorded and runs as it is.

    Args:
        model: float32 (n, 3, H, W) on the device -> (n, dim), a tensor or an array. A ``torch.nn.Module`` is moved
            to the device and put into eval mode, in the layout that suits it.
        name: for messages.

    Raises:
        UsageError: CUDA graphs on a CPU.
    """

    def __init__(self, model: Model, options: ForwardOptions, name: str = "the model") -> None:
        self.options, self.name = options, name
        self.batch_size = options.batch_size
        self.device = torch.device(options.device)
        self.overlaps = self.device.type == "cuda"
        if options.cuda_graphs and not self.overlaps:
            raise UsageError(f"{name}: cuda_graphs=True needs a GPU, and the model is on {self.device}; leave it out")
        self._layout = torch.channels_last if prefers_channels_last(model) else torch.contiguous_format
        if isinstance(model, torch.nn.Module):
            model = model.eval().to(self.device).to(memory_format=self._layout)
        self._eager = self._model = model
        self._rows = options.batch_size
        self._exceptions: list[str] = []
        self._lock = threading.Lock()
        self._input: torch.Tensor | None = None
        self._slots: list[_Slot] = []
        self._submitted = 0
        self._constants: tuple[torch.Tensor, torch.Tensor] | None = None
        self._records = options.cuda_graphs
        self._recorded: CapturedForward | None = None
        if options.compile and isinstance(model, torch.nn.Module):
            self._compile(model)

    @property
    def channels_last(self) -> bool:
        """Whether batches are laid out for convolutions."""
        return self._layout is torch.channels_last

    def exceptions(self) -> list[str]:
        """What deviated from the recipe."""
        return list(self._exceptions)

    def __call__(self, images: Sequence[torch.Tensor]) -> np.ndarray:
        """Embed up to ``batch_size`` prepared images.

        Args:
            images: uint8 (3, H, W), or float32 (3, H, W) of an opaque transform; on a CPU or on the device.

        Returns:
            (k, dim) of the options' dtype, rows in the images' order.

        Raises:
            UsageError: the model does not return one vector an image, or images differ in shape.
            CuratorEmbedError: the device has not even the memory for one image.
        """
        return self.submit(images)()

    def submit(self, images: Sequence[torch.Tensor]) -> Pending:
        """Start a batch; the returned call waits for its embeddings. Up to two may be under way, collected in order.

        Arguments, result and errors as ``__call__``.
        """
        if not 0 < len(images) <= self.batch_size:
            raise UsageError(f"a batch holds 1 to {self.batch_size} images, not {len(images)}")
        if any(image.shape != images[0].shape for image in images):
            raise UsageError(f"{self.name}: images of one batch differ in shape; the transform must end in one size")
        with self._lock, torch.inference_mode():
            if self.device.type == "cuda":
                return self._submit_cuda(images)
            result = self._embed(self._fill_input(images)).numpy()[: len(images)].copy()
            return lambda: result

    # --- both devices ---------------------------------------------------------------------------

    def _embed(self, batch: torch.Tensor) -> torch.Tensor:
        """(batch_size, 3, H, W) on the device, uint8 or normalised -> (batch_size, dim); halves if memory is short."""
        while True:
            try:
                parts = [self._embed_rows(part) for part in batch.split(self._rows)]
                return parts[0] if len(parts) == 1 else torch.cat(parts)
            except RuntimeError as error:
                if not _short_of_memory(error):
                    raise
                if self._rows == 1:
                    raise CuratorEmbedError(
                        f"{self.name}: {self.device} has not the memory for one image of {tuple(batch.shape[1:])}. "
                        "Free the device, or choose a smaller model or image_size"
                    ) from error
            # Only here, outside the handler, have the failed pass's tensors been let go of.
            self._recorded = None
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            halved = (self._rows + 1) // 2
            self._tell(f"batch halved from {self._rows} to {halved} after out-of-memory")
            self._rows = halved

    def _embed_rows(self, batch: torch.Tensor) -> torch.Tensor:
        rows = len(batch)
        if rows < self._rows:
            layout = torch.channels_last if _is_channels_last(batch) else torch.contiguous_format
            padding = batch.new_zeros((self._rows - rows, *batch.shape[1:]))
            batch = torch.cat([batch, padding]).contiguous(memory_format=layout)
        if self._records and (self._recorded is None or not self._recorded.fits(batch)):
            self._record(batch)
        return (self._recorded or self._forward)(batch)[:rows]

    def _forward(self, batch: torch.Tensor) -> torch.Tensor:
        """(rows, 3, H, W) of the one shape -> finished (rows, dim)."""
        output = torch.as_tensor(self._run(self._values(batch)))
        if output.ndim != 2 or len(output) != len(batch):
            raise UsageError(
                f"{self.name} returned {tuple(output.shape)} for {len(batch)} images; "
                "it must return one vector an image, (n, dim)"
            )
        return finish(output, normalize=self.options.normalize, dtype=self.options.dtype)

    def _values(self, batch: torch.Tensor) -> torch.Tensor:
        """The arithmetic of ``decoding.cpu.normalise`` on the batch's own device, in float32 and the model's layout."""
        values = batch.to(torch.float32, memory_format=self._layout)
        spec = self.options.spec
        if not isinstance(spec, PreprocessSpec) or batch.dtype != torch.uint8:
            return values
        if self._constants is None:  # once: bringing them to a GPU waits for all that it has to do
            mean, std = (torch.tensor(v, device=batch.device).view(3, 1, 1) for v in (spec.mean, spec.std))
            self._constants = mean, std
        mean, std = self._constants
        return values.div_(255).sub_(mean).div_(std)

    def _run(self, batch: torch.Tensor) -> Any:
        precision = self.options.precision
        mixed = precision != "float32"
        with (
            intra_op_threads(self.options.threads if self.device.type == "cpu" else None),
            torch.autocast(self.device.type, getattr(torch, precision) if mixed else None, enabled=mixed),
        ):
            return self._model(batch)

    def _tell(self, message: str) -> None:
        log.warning("%s: %s", self.name, message)
        self._exceptions.append(message)

    def _compile(self, model: torch.nn.Module) -> None:
        """Compile now and not at the first batch, so that what fails here costs speed and nothing else."""
        # Freezing folds the weights into the kernels' layouts; worth it on a CPU, where it is most of the gain.
        options: Any = {"freezing": True} if self.device.type == "cpu" else None
        self._model = torch.compile(model, dynamic=False, options=options)
        try:
            if not isinstance(self.options.spec, PreprocessSpec):
                raise UsageError("the transform does not say how large its images will be")
            with torch.inference_mode(), self._device_current():
                self._run(self._blank((3, *self.options.spec.output)))
        except Exception as error:  # inductor raises whatever its backends raise
            if _short_of_memory(error):
                return  # the first batch meets it again and halves
            self._model = self._eager
            self._tell(f"not compiled: {_in_short(error)}")

    def _record(self, batch: torch.Tensor) -> None:
        """Record the forward pass as a CUDA graph; a model that cannot be runs as it is from then on."""
        self._recorded = None  # its memory first
        try:
            self._recorded = CapturedForward(self._forward, batch)
        except CuratorEmbedError:
            raise
        except Exception as error:  # a model may do anything
            if _short_of_memory(error):
                raise
            self._records = False
            self._tell(f"not recorded as a CUDA graph: {_in_short(error)}")

    def _blank(self, shape: Sequence[int]) -> torch.Tensor:
        empty = torch.empty((self.batch_size, *shape), device=self.device, memory_format=self._layout)
        return empty.zero_()

    # --- CPU ------------------------------------------------------------------------------------

    def _fill_input(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        """Normalise into the one input buffer, zeros after the last image."""
        if self._input is None or self._input.shape[1:] != images[0].shape:
            self._input = self._blank(images[0].shape)
        normalise(images, self.options.spec, out=self._input)
        self._input[len(images) :].zero_()
        return self._input

    # --- CUDA -----------------------------------------------------------------------------------

    def _device_current(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _submit_cuda(self, images: Sequence[torch.Tensor]) -> Pending:
        with self._device_current():
            if not self._slots or not self._slots[0].suits(images[0]):
                self._slots = [_Slot.make(self, images[0]) for _ in range(2)]
            slot = self._slots[self._submitted % 2]
            self._submitted += 1
            slot.fill(images)
            embedded = self._embed(slot.on_device)
            slot.computed.record()
            result = torch.empty(embedded.shape, dtype=embedded.dtype, pin_memory=True)
            result.copy_(embedded, non_blocking=True)
            done = torch.cuda.Event(blocking=True)  # the waiting thread leaves its core to the decoders
            done.record()

        def collect() -> np.ndarray:
            done.synchronize()
            # A copy: pinned memory is scarce and goes back to its pool.
            return result.numpy()[: len(images)].copy()

        return collect


@dataclass(slots=True)
class _Slot:
    """One of two input buffers on CUDA: while the model reads one, the other is filled."""

    on_device: torch.Tensor
    pinned: torch.Tensor | None
    stream: torch.cuda.Stream
    copied: torch.cuda.Event
    computed: torch.cuda.Event

    @classmethod
    def make(cls, runner: ModelRunner, image: torch.Tensor) -> _Slot:
        """For images like this one: those on the device need no pinned memory to come through."""
        # Channels last in any case: prepared images are stored so, and the plain copy keeps rows together.
        shape = runner.batch_size, *image.shape
        on_device = torch.empty(shape, dtype=image.dtype, device=runner.device, memory_format=torch.channels_last)
        pinned = None
        if not image.is_cuda:
            pinned = torch.empty(shape, dtype=image.dtype, memory_format=torch.channels_last).pin_memory()
        copied, computed = torch.cuda.Event(blocking=True), torch.cuda.Event()
        return cls(on_device, pinned, torch.cuda.Stream(), copied, computed)

    def suits(self, image: torch.Tensor) -> bool:
        """Whether images like this one can be filled in."""
        mine = self.on_device
        return (image.shape, image.dtype) == (mine.shape[1:], mine.dtype) and (image.is_cuda or self.pinned is not None)

    def fill(self, images: Sequence[torch.Tensor]) -> None:
        """Bring images into the buffer, zeros after the last; what the current stream does next finds them there."""
        compute = torch.cuda.current_stream()
        if images[0].is_cuda:  # decoded on the device, and waited for
            # As (H, W, 3), which is how they lie: stacked as (3, H, W), each would be turned over, and back for a model
            # that wants channels last.
            rows = self.on_device.permute(0, 2, 3, 1)
            torch.stack([image.permute(1, 2, 0) for image in images], out=rows[: len(images)])
            rows[len(images) :].zero_()
            return
        assert self.pinned is not None
        self.copied.synchronize()  # the pinned buffer's last copy has left it
        for row, image in zip(self.pinned, images, strict=False):
            row.copy_(image)
        self.pinned[len(images) :].zero_()
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(self.computed)  # the model has read the slot's last batch
            self.on_device.copy_(self.pinned, non_blocking=True)
            self.copied.record()
        compute.wait_event(self.copied)


def _is_channels_last(batch: torch.Tensor) -> bool:
    return batch.is_contiguous(memory_format=torch.channels_last) and not batch.is_contiguous()


def _short_of_memory(error: Exception) -> bool:
    """Whether a device ran out of memory: torch's allocator says so by type, libraries and late kernels in words."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None
    )


def _in_short(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def finish(output: torch.Tensor, *, normalize: bool, dtype: str) -> torch.Tensor:
    """L2-normalise (n, dim) in float32 whatever the model computed in, then cast; a zero vector stays zero."""
    values = output.to(torch.float32)
    if normalize:
        values = torch.nn.functional.normalize(values, dim=-1)
    kind: torch.dtype = getattr(torch, dtype)
    return values.to(kind)
