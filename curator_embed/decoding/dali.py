"""DALI decodes and resizes a batch at a time, on a GPU or with CPU operators, along the plans of ``geometry``.

One decode feeds one output a model. Images that DALI cannot have are left to the caller: nothing here knows Pillow.
"""

from __future__ import annotations

import logging
import queue
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from curator_embed.decoding.geometry import Axis, Plan, Size, plan
from curator_embed.decoding.header import size_for_dali
from curator_embed.decoding.pillow import DEFAULT_LIMITS, Limits
from curator_embed.decoding.spec import PreprocessSpec
from curator_embed.errors import CuratorEmbedError, MissingExtra

MAX_PIXELS = 1 << 26
"""Largest image, decoded or resized, that DALI is given; beyond it one picture would weigh as much as a batch."""

MIN_SIDE = 64
"""Shortest side, before or after resizing, that DALI is given. At the border it repeats the outermost pixels where
Pillow leaves them out, and the smaller a picture, the more of it is border: 5 pixels differ by up to 0.9 grey levels
in the mean, and a strip of 30 gives embeddings at a cosine of 0.9998."""

FILTERS = {"bilinear": "INTERP_LINEAR", "bicubic": "INTERP_CUBIC", "lanczos": "INTERP_LANCZOS3"}
"""DALI's names. Nearest is missing: it falls on other pixels than Pillow's where a position lies between two."""

HALVES_UP = 1 / 1024
"""Added before rounding after a bilinear pass. Pillow rounds halves up and DALI to even; at simple ratios, 512 to 256
pixels for one, an eighth of all values are halves, and the mean difference would be 0.12 grey levels."""

PIXELS_A_RUN = 1 << 28
"""Decoded pixels of one DALI run, so that a batch of large photographs does not take the model's memory (768 MB)."""

_REFUSED = re.compile(r"operator \W?nvidia\.dali\.fn\.decoders\.image|nvImageCodec failure")
"""Found in what DALI raises for an image; what comes from other operators is the device's or this module's fault."""

_SHORT_OF_MEMORY = re.compile(r"[Cc]an't allocate|[Cc]ould not allocate|allocation failed|out of memory|bad_alloc")
_DEVICES_FAULT = re.compile(
    rf"{_SHORT_OF_MEMORY.pattern}|CUDA (?:runtime|[Dd]river) API error|nvImageCodec failure: '#(?:1|5|7|1[0156]|21)'"
)
"""Found in what the decoder raises when the image is not to blame. Of nvImageCodec's numbers: not initialised,
allocator, architecture, a library that is missing, the same of its extensions, a failed call of CUDA's."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pass:
    """One direction of a resize: the other is left as it is. Pairs are (vertical, horizontal).

    Attributes:
        size: of the result.
        start, end: the region of the input it shows, in fractional pixels.
    """

    size: tuple[int, int]
    start: tuple[float, float]
    end: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Admitted:
    """An image that DALI is given.

    Attributes:
        encoded: the whole file.
        size: (height, width) that its header says, turned where EXIF is honoured.
        plans: one a spec.
    """

    encoded: bytes
    size: Size
    plans: tuple[Plan, ...]


def passes(todo: Plan) -> tuple[Pass, Pass]:
    """The two one-directional resizes of a plan, in Pillow's order.

    Each rounds and clips to 8 bits as Pillow's do: at once, DALI would keep fractions in between, which shows as up
    to 14 grey levels beside sharp edges (mean 0.15 instead of 0.003).
    """
    vertical, horizontal = todo.vertical, todo.horizontal
    if todo.vertical_first:
        return _pass(_kept(vertical), _whole(horizontal.source)), _pass(_whole(vertical.length), _kept(horizontal))
    return _pass(_whole(vertical.source), _kept(horizontal)), _pass(_kept(vertical), _whole(horizontal.length))


Stretch = tuple[int, float, float]
"""Pixels of the result, and the first and last edge of what they show."""


def _kept(axis: Axis) -> Stretch:
    return axis.length, axis.start * axis.scale, axis.stop * axis.scale


def _whole(length: int) -> Stretch:
    return length, 0.0, float(length)


def _pass(vertical: Stretch, horizontal: Stretch) -> Pass:
    return Pass((vertical[0], horizontal[0]), (vertical[1], horizontal[1]), (vertical[2], horizontal[2]))


def waves(images: Sequence[Admitted], most_images: int, most_pixels: int = PIXELS_A_RUN) -> Iterator[slice]:
    """Cut a sequence into runs of at most so many images and decoded pixels (a single image may have more)."""
    first, pixels = 0, 0
    for position, image in enumerate(images):
        area = image.size[0] * image.size[1]
        if position > first and (position - first == most_images or pixels + area > most_pixels):
            yield slice(first, position)
            first, pixels = position, 0
        pixels += area
    if first < len(images):
        yield slice(first, len(images))


class DaliDecoder:
    """Several DALI pipelines ("lanes") of one graph; any number of threads may call it.

    While one lane waits for its results, another decodes.

    Args:
        specs: one output each, with an interpolation among ``FILTERS``.
        device: "cpu", "cuda" or "cuda:1".
        batch_size: images a run, at most.
        threads: CPU threads of each lane.
        lanes: runs under way at a time.
        honour_exif: turn images as their EXIF says.
        limits: images beyond them are not admitted.
        hw_decoder_load: share of JPEGs for the GPU's JPEG engines, where it has any. Below 1, which images they get
            depends on the batch, and two decoders need not give the same bits.
        fancy_upsampling: interpolate chroma on a GPU, as libjpeg does.

    Raises:
        MissingExtra: DALI is not installed.
        CuratorEmbedError: it does not start on the device.
    """

    def __init__(
        self,
        specs: Sequence[PreprocessSpec],
        *,
        device: str,
        batch_size: int,
        threads: int,
        lanes: int = 2,
        honour_exif: bool = False,
        limits: Limits = DEFAULT_LIMITS,
        hw_decoder_load: float = 1.0,
        fancy_upsampling: bool = True,
    ) -> None:
        self.specs, self.device, self.batch_size = tuple(specs), torch.device(device), batch_size
        self.honour_exif, self.limits = honour_exif, limits
        graph = _Graph(self.specs, self.device, batch_size, threads, honour_exif, hw_decoder_load, fancy_upsampling)
        self._lanes: queue.Queue[_Lane] = queue.Queue()
        try:
            for _ in range(lanes):
                self._lanes.put(_Lane(graph))
            self._stream = _copy_stream(self.device)
        except RuntimeError as error:
            raise CuratorEmbedError(
                f"DALI does not start on the device '{device}': {str(error).strip()}. Without DALI goes decoder='cpu'; "
                "'curator-embed doctor' says what is missing"
            ) from error

    def admit(self, encoded: bytes) -> Admitted | None:
        """Plan an image from its header; None where Pillow shall decode it, or say what is wrong with it."""
        size = size_for_dali(encoded, honour_exif=self.honour_exif)
        if size is None or size[0] * size[1] > min(self.limits.max_pixels, MAX_PIXELS):
            return None
        plans = tuple(plan(spec, *size) for spec in self.specs)
        most = min(self.limits.max_resized_pixels, MAX_PIXELS)
        for todo in plans:
            (shortest, height), (other, width) = _extent(todo.vertical), _extent(todo.horizontal)
            if min(shortest, other) < MIN_SIDE or height * width > most:
                return None
        return Admitted(encoded, size, plans)

    def decode(self, images: Sequence[Admitted]) -> list[tuple[torch.Tensor, ...] | None]:
        """Decode and resize.

        Returns:
            per image one tensor a spec, uint8 (3, H, W) on the device, views on a batch (N, H, W, 3); None for an image
            that DALI refuses, or decodes to another size than its header says.
        """
        found: list[tuple[torch.Tensor, ...] | None] = []
        for wave in waves(images, self.batch_size):
            with self._lane() as lane:
                found += lane.decode(images[wave])
        return found

    def to_device(self, image: torch.Tensor) -> torch.Tensor:
        """Bring an image that was prepared elsewhere to where this decoder's are."""
        if self._stream is None:
            return image
        with _copying(self._stream):
            return _shared_with_models(image.to(self.device))

    @contextmanager
    def _lane(self) -> Iterator[_Lane]:
        lane = self._lanes.get()
        try:
            yield lane
        finally:
            self._lanes.put(lane)


def _extent(axis: Axis) -> Size:
    """Shorter and longer of an axis' lengths before and after resizing."""
    return min(axis.source, axis.resized), max(axis.source, axis.resized)


@dataclass(frozen=True, slots=True)
class _Graph:
    """Builds pipelines; two sources a pass and spec carry the geometry, sample by sample."""

    specs: tuple[PreprocessSpec, ...]
    device: torch.device
    batch_size: int
    threads: int
    honour_exif: bool
    hw_decoder_load: float
    fancy_upsampling: bool

    def build(self) -> Any:
        device_id = None
        if self.device.type == "cuda":
            device_id = torch.cuda.current_device() if self.device.index is None else self.device.index
        pipe = self.describe(device_id)
        pipe.build()
        return pipe

    def describe(self, device_id: int | None) -> Any:
        """The pipeline, not built yet: that alone needs the device."""
        dali, fn = _dali()
        types, on_gpu = dali.types, self.device.type == "cuda"
        # One run at a time is fed and fetched, so nothing is prefetched: other lanes fill the gap.
        pipe = dali.Pipeline(
            batch_size=self.batch_size, num_threads=self.threads, device_id=device_id, prefetch_queue_depth=1
        )

        def source(name: str, dtype: Any = types.FLOAT) -> Any:
            return fn.external_source(name=name, dtype=dtype, ndim=1, batch=True)

        with pipe:
            encoded = source("encoded", types.UINT8)
            for_gpu = {"hw_decoder_load": self.hw_decoder_load, "jpeg_fancy_upsampling": self.fancy_upsampling}
            decoded = fn.decoders.image(
                encoded,
                device="mixed" if on_gpu else "cpu",
                output_type=types.RGB,
                adjust_orientation=self.honour_exif,
                # Not bound to cores: the threads of all lanes, and of all workers of a machine, would share a few.
                **({**for_gpu, "affine": False} if on_gpu else {}),
            )
            outputs = [decoded.shape()]
            for number, spec in enumerate(self.specs):
                image = decoded
                halves_up = spec.interpolation == "bilinear"
                for turn in range(2):
                    image = fn.resize(
                        image,
                        size=source(f"{number}.{turn}.size"),
                        roi_start=source(f"{number}.{turn}.start"),
                        roi_end=source(f"{number}.{turn}.end"),
                        interp_type=getattr(types, FILTERS[spec.interpolation]),
                        antialias=True,
                        dtype=types.FLOAT if halves_up else types.UINT8,
                    )
                    if halves_up:
                        image = fn.cast(image + HALVES_UP, dtype=types.UINT8)
                outputs.append(
                    fn.slice(
                        image,
                        start=source(f"{number}.anchor", types.INT32),
                        shape=list(spec.output),
                        axes=(0, 1),
                        out_of_bounds_policy="pad",
                        fill_values=[float(value) for value in spec.fill],
                    )
                )
            pipe.set_outputs(*outputs)
        return pipe

    def feed(self, pipe: Any, images: Sequence[Admitted]) -> None:
        pipe.feed_input("encoded", [np.frombuffer(image.encoded, np.uint8) for image in images])
        for number in range(len(self.specs)):
            both = [passes(image.plans[number]) for image in images]
            for turn in range(2):
                for name in ("size", "start", "end"):
                    values = np.array([getattr(pair[turn], name) for pair in both], np.float32)
                    pipe.feed_input(f"{number}.{turn}.{name}", values)
            before = [(-p.vertical.before, -p.horizontal.before) for p in (image.plans[number] for image in images)]
            pipe.feed_input(f"{number}.anchor", np.array(before, np.int32))


class _Lane:
    """One DALI pipeline, used by one thread at a time."""

    def __init__(self, graph: _Graph) -> None:
        self._graph = graph
        self._pipe = graph.build()
        self._stream = _copy_stream(graph.device)

    def decode(self, images: Sequence[Admitted]) -> list[tuple[torch.Tensor, ...] | None]:
        """One run; see ``DaliDecoder.decode``."""
        found = self._bisect(images)
        if len(images) > 1 and not any(found):
            # More likely the pipeline's fault than that of all of them.
            log.warning("DALI refused all %d images of a batch; its pipeline is built anew", len(images))
            self._pipe = self._graph.build()
            found = self._bisect(images)
        return found

    def _bisect(self, images: Sequence[Admitted]) -> list[tuple[torch.Tensor, ...] | None]:
        """DALI raises for a whole batch and does not say for which image: halve until it is alone.

        Decoding the rest by other means would be quicker now and then, but what a row holds must not depend on who its
        neighbours were.
        """
        try:
            return self._run_with_room(images)
        except RuntimeError as error:
            if len(images) == 1:
                if not _refused(error):
                    raise  # not the image's fault, and Pillow doing all the work would hide it
                return [None]
        half = len(images) // 2
        return self._bisect(images[:half]) + self._bisect(images[half:])

    def _run_with_room(self, images: Sequence[Admitted]) -> list[tuple[torch.Tensor, ...] | None]:
        """``_run``, a second time where the device was full: DALI cannot have what torch's allocator only keeps."""
        try:
            return self._run(images)
        except RuntimeError as error:
            if self._stream is None or _SHORT_OF_MEMORY.search(_cause(error)) is None:
                raise
        torch.cuda.empty_cache()
        return self._run(images)

    def _run(self, images: Sequence[Admitted]) -> list[tuple[torch.Tensor, ...] | None]:
        self._graph.feed(self._pipe, images)
        shapes, *outputs = self._pipe.run()
        if self._stream is None:
            batches = [torch.from_numpy(np.array(output.as_array())) for output in outputs]
        else:
            with _copying(self._stream):
                batches = [_to_torch(output, self._graph.device) for output in outputs]
        batches = [batch.permute(0, 3, 1, 2) for batch in batches]
        sizes = shapes.as_cpu().as_array()[:, :2]
        return [
            tuple(batch[row] for batch in batches) if tuple(sizes[row]) == image.size else None
            for row, image in enumerate(images)
        ]


def _refused(error: RuntimeError) -> bool:
    """Whether DALI says of a single image that it does not decode."""
    return _REFUSED.search(str(error)) is not None and _DEVICES_FAULT.search(_cause(error)) is None


def _cause(error: RuntimeError) -> str:
    """What DALI met, without where in whose program: a path may say anything."""
    return str(error).rpartition("encountered:")[2]


def _to_torch(output: Any, device: torch.device) -> torch.Tensor:
    """Copy a DALI output on a GPU, whose memory its pipeline will use again, into a tensor (N, H, W, C) of its own."""
    from nvidia.dali.plugin.pytorch import feed_ndarray  # type: ignore[attr-defined]

    dense = output.as_tensor()
    batch = torch.empty(dense.shape(), dtype=torch.uint8, device=device)
    feed_ndarray(dense, batch, cuda_stream=torch.cuda.current_stream())
    return _shared_with_models(batch)


def _copy_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A CUDA stream for copies that do not queue behind the model; None on a CPU.

    Kept, not made for each copy: torch's allocator keeps freed memory for the stream it was allocated on.
    """
    if device.type == "cpu":
        return None
    with torch.cuda.device(device):
        return torch.cuda.Stream()


@contextmanager
def _copying(stream: torch.cuda.Stream) -> Iterator[None]:
    """Make a stream and its device current; what was copied is there when the block ends."""
    with torch.cuda.device(stream.device), torch.cuda.stream(stream):
        yield
        done = torch.cuda.Event(blocking=True)  # the waiting thread leaves its core to others
        done.record()
        done.synchronize()


def _shared_with_models(tensor: torch.Tensor) -> torch.Tensor:
    """Tell torch's allocator that models read this memory on the default stream: it must not be used again before."""
    tensor.record_stream(torch.cuda.default_stream(tensor.device))
    return tensor


def _dali() -> tuple[Any, Any]:
    try:
        import nvidia.dali as dali
        from nvidia.dali import fn
    except ImportError as error:
        raise MissingExtra("nvidia-dali", "cuda13]' or 'curator-embed[cuda12", "decoding with DALI") from error
    return dali, fn
