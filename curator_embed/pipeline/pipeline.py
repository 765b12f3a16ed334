"""The worker's engine room: decode threads and a model thread that outlive single shards.

Shards feed encoded images in and collect column values; batches are filled across shard borders,
so the model never waits for a shard to be written, and a small shard does not waste half a batch.
All queues are bounded: a fast reader waits for a slow model.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from curator_embed.errors import CuratorEmbedError, Reason, SourceError, StepError
from curator_embed.pipeline.vectors import VECTOR_BYTES, VectorMemory, Vectors
from curator_embed.steps import BatchModel


@dataclass(slots=True)
class Prepared:
    """What decoding made of one image.

    Attributes:
        tensors: per batch step (by position) its uint8 (3, H, W) input.
        values: per image step (by position) its column values.
        error: why the image failed, or None. Steps that succeeded keep their values.
        decoder: what decoded it for the embedders ("pillow", "dali"); None when nothing did.
    """

    tensors: dict[int, Any] = field(default_factory=dict)
    values: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    error: Reason | None = None
    decoder: str | None = None


class PipelineClosed(CuratorEmbedError):
    """The run has ended while a shard was still on its way."""


class DecodeEngine(Protocol):
    """Turns encoded images into what the steps need. Called from several threads at once."""

    chunk: int
    """Images taken at a time: 1 on a CPU, a batch on a GPU."""

    def prepare(self, encoded: Sequence[bytes], wanted: Sequence[tuple[int, ...]]) -> list[Prepared]:
        """One result an image, in order. Bad images are results, not exceptions.

        Args:
            wanted: per image, the positions of the steps that want to see it.
        """
        ...


class OpenShard:
    """One shard's images on their way through the pipeline, and the values that have come out."""

    def __init__(self, pipeline: Pipeline, wanted: tuple[int, ...], scratch: str | None = None) -> None:
        self._pipeline, self.wanted = pipeline, wanted
        self._lock = threading.Condition()
        self._outstanding = 0
        self._fault: BaseException | None = None
        self.errors: dict[int, Reason] = {}
        self.decoders: Counter[str] = Counter()
        self.values: dict[int, dict[int, Mapping[str, Any]]] = {p: {} for p in pipeline.image_steps}
        self.vectors: dict[int, Vectors] = {p: Vectors(pipeline.memory, scratch) for p in pipeline.batch_steps}

    def submit(self, ordinal: int, encoded: bytes) -> None:
        """Hand in one encoded image; blocks while the queues are full. Raises what has failed meanwhile."""
        with self._lock:
            if self._fault is not None:
                raise self._fault
            self._outstanding += 1
        self._pipeline._enqueue(_Item(self, ordinal, encoded))

    def under_way(self) -> bool:
        """Whether images are in the pipeline, wanted or not."""
        with self._lock:
            return self._outstanding > 0

    def done(self) -> bool:
        """Whether everything handed in has come out."""
        with self._lock:
            return self._outstanding == 0 or self._fault is not None

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until everything handed in has come out; raises what broke the pipeline, if anything did.

        Returns:
            Whether it has; False when ``seconds`` were too few.
        """
        with self._lock:
            done = self._lock.wait_for(lambda: self._outstanding == 0 or self._fault is not None, seconds)
            if self._fault is not None:
                raise self._fault
            return done

    def _put(self, position: int, ordinal: int, vector: np.ndarray) -> None:
        """Store a vector; where there is no place for it, the shard fails, and no other."""
        if self._fault is None:
            try:
                self.vectors[position].put(ordinal, vector)
            except SourceError as fault:
                self._fail(fault)

    def _finish(self, count: int = 1) -> None:
        with self._lock:
            self._outstanding -= count
            if self._outstanding == 0:
                self._lock.notify_all()

    def _fail(self, fault: BaseException) -> None:
        with self._lock:
            self._fault = fault
            self._lock.notify_all()


def sound(vectors: np.ndarray) -> list[bool]:
    """(n, dim) float embeddings -> whether each is finite and not zero: without a direction nothing can be compared."""
    # Without their signs floats order as their bits do, zero first, then what is finite, infinity, NaN: one pass over
    # integers, which for float16 is ten times as fast as asking.
    bits, size = np.dtype(f"u{vectors.dtype.itemsize}"), 8 * vectors.dtype.itemsize
    infinity = np.array(np.inf, vectors.dtype).view(bits)
    largest = (np.ascontiguousarray(vectors).view(bits) & bits.type(2 ** (size - 1) - 1)).max(axis=1, initial=0)
    found: list[bool] = ((largest > 0) & (largest < infinity)).tolist()
    return found


@dataclass(slots=True)
class _Item:
    shard: OpenShard
    ordinal: int
    encoded: bytes


@dataclass(slots=True)
class _UnderWay:
    """A batch the model has been given."""

    position: int
    entries: Sequence[tuple[OpenShard, int, Any, Any]]
    collect: Callable[[], np.ndarray]


class StageClock:
    """Seconds each stage was busy, summed over its threads; cheap enough for every image."""

    STAGES = ("read", "decode", "model", "write", "idle")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds = dict.fromkeys(self.STAGES, 0.0)
        self._taken = dict(self._seconds)

    def add(self, stage: str, seconds: float) -> None:
        """Count ``seconds`` of work in ``stage``."""
        with self._lock:
            self._seconds[stage] += seconds

    @contextmanager
    def timing(self, stage: str) -> Iterator[None]:
        """Count the time spent in the block."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - start)

    def total(self) -> dict[str, float]:
        """What has been counted so far."""
        with self._lock:
            return dict(self._seconds)

    def take(self) -> dict[str, float]:
        """What has been counted since the last call."""
        with self._lock:
            before, self._taken = self._taken, dict(self._seconds)
            return {stage: seconds - before[stage] for stage, seconds in self._taken.items()}


class Gauge:
    """How much waits in a queue, over time. Not locked: whoever moves it holds the queue's lock.

    Attributes:
        level: what waits now.
        fill: how much of the room that takes, 0 to 1.
    """

    __slots__ = ("_began", "_filled", "_most", "_since", "_waited", "fill", "level")

    def __init__(self) -> None:
        self.level = self.fill = 0.0
        self._since = self._began = time.perf_counter()
        self._waited = self._filled = self._most = 0.0

    def move(self, level: float, fill: float) -> None:
        """Note that from now on so much waits."""
        now = time.perf_counter()
        passed = now - self._since
        self._waited += self.level * passed
        self._filled += self.fill * passed
        self._since, self.level, self.fill = now, level, fill
        if level > self._most:
            self._most = level

    def take(self) -> dict[str, float]:
        """Since the last call: ``seconds`` passed, ``waited`` and ``filled`` (integrals over them), ``most``."""
        self.move(self.level, self.fill)
        taken = {
            "seconds": self._since - self._began,
            "waited": self._waited,
            "filled": self._filled,
            "most": self._most,
        }
        self._began, self._most = self._since, self.level
        self._waited = self._filled = 0.0
        return taken


class Pipeline:
    """Decode threads and one model thread, shared by all shards a worker has open.

    Args:
        engine: decodes and prepares.
        models: per batch step position, its loaded model.
        image_steps: positions of the steps whose values the engine computes itself.
        threads: decode threads.
        max_queued_bytes: encoded bytes waiting to be decoded, at most.
        max_ready_batches: batches of prepared images waiting for the model, at most.
        max_vector_bytes: embeddings of open shards that are kept in memory, at most; more goes to scratch files.
        dtypes: per batch step position, the float type of its column (float32), to which vectors are converted.

    Attributes:
        memory: what open shards use of ``max_vector_bytes``.
        clock: seconds a stage.
        images: through so far, good or bad.
    """

    def __init__(
        self,
        engine: DecodeEngine,
        models: Mapping[int, BatchModel],
        image_steps: Sequence[int] = (),
        *,
        threads: int,
        max_queued_bytes: int = 128 << 20,
        max_ready_batches: int = 4,
        max_vector_bytes: int = VECTOR_BYTES,
        dtypes: Mapping[int, Any] | None = None,
        on_images: Callable[[int], None] | None = None,
    ) -> None:
        self.engine, self.models = engine, dict(models)
        self.batch_steps, self.image_steps = tuple(models), tuple(image_steps)
        self.clock = StageClock()
        self.images = 0
        self.memory = VectorMemory(max_vector_bytes)
        self._dtypes = dict(dtypes or {})
        self._gauges = {"encoded": Gauge(), "ready": Gauge()}
        self._on_images = on_images
        self._max_bytes, self._max_items = max_queued_bytes, max(64, 4 * threads, 4 * engine.chunk)
        self._max_ready = {p: max_ready_batches * m.batch_size for p, m in self.models.items()}
        # One lock, a condition for each kind of waiter: an image wakes only who can use it.
        self._lock = threading.Lock()
        self._to_decode = threading.Condition(self._lock)
        self._room = threading.Condition(self._lock)
        self._to_embed = threading.Condition(self._lock)
        self._items: deque[_Item] = deque()
        self._bytes = 0
        self._decoding = 0
        self._feeding = 0
        self._blocked = 0
        self._ready: dict[int, deque[tuple[OpenShard, int, Any, Any]]] = {p: deque() for p in self.models}
        self._closed = False
        self._fault: BaseException | None = None
        self._open: set[OpenShard] = set()
        self._threads = [
            threading.Thread(target=self._guarded, args=(self._decode_loop,), name=f"decode-{n}", daemon=True)
            for n in range(threads)
        ]
        if self.models:
            self._threads.append(
                threading.Thread(target=self._guarded, args=(self._model_loop,), name="model", daemon=True)
            )
        for thread in self._threads:
            thread.start()

    @property
    def fault(self) -> BaseException | None:
        """What broke the pipeline for all its shards; None while it works."""
        return self._fault

    def waiting(self) -> dict[str, float]:
        """What waits now: ``encoded`` images for a decoder, ``ready`` batches for the model."""
        return {queue: gauge.level for queue, gauge in self._gauges.items()}

    def take_queues(self) -> dict[str, dict[str, float]]:
        """How full the queues were since the last call; see ``Gauge.take``."""
        with self._lock:
            return {queue: gauge.take() for queue, gauge in self._gauges.items()}

    def _encoded_moved(self) -> None:
        count = len(self._items)
        self._gauges["encoded"].move(count, max(count / self._max_items, min(1.0, self._bytes / self._max_bytes)))

    def _ready_moved(self) -> None:
        fill = level = 0.0
        for position, entries in self._ready.items():
            level += len(entries) / self.models[position].batch_size
            fill = max(fill, len(entries) / self._max_ready[position])
        self._gauges["ready"].move(level, min(1.0, fill))

    # -- the shards' side ------------------------------------------------------------------

    @contextmanager
    def feeding(self) -> Iterator[None]:
        """While any block is open, more images may come and a partial batch waits for them."""
        with self._lock:
            self._feeding += 1
        try:
            yield
        finally:
            with self._lock:
                self._feeding -= 1
                self._to_decode.notify_all()
                self._to_embed.notify_all()

    @contextmanager
    def shard(self, wanted: Sequence[int], scratch: str | None = None) -> Iterator[OpenShard]:
        """Open a shard for the steps at these positions; what breaks the pipeline meanwhile breaks its ``wait``.

        Args:
            scratch: path of its output, beside which embeddings lie that do not fit into memory; None for the system's
                folder for temporary files.
        """
        opened = OpenShard(self, tuple(wanted), scratch)
        with self._lock:
            if self._fault is not None:
                raise self._fault
            self._open.add(opened)
        try:
            yield opened
        finally:
            for vectors in opened.vectors.values():
                vectors.close()
            with self._lock:
                self._open.discard(opened)
                if opened.under_way():
                    # What an abandoned shard left in the queues must not be computed.
                    self._items = deque(item for item in self._items if item.shard is not opened)
                    self._bytes = sum(len(item.encoded) for item in self._items)
                    for position, queue in self._ready.items():
                        self._ready[position] = deque(entry for entry in queue if entry[0] is not opened)
                    self._encoded_moved()
                    self._ready_moved()
                    self._wake_everybody()

    def close(self) -> None:
        """Stop the threads; anything still queued is dropped, and shards that still wait for it are told."""
        with self._lock:
            self._closed = True
            self._fault = self._fault or PipelineClosed("the run has ended before this shard was through")
            for shard in self._open:
                shard._fail(self._fault)
            self._wake_everybody()
        for thread in self._threads:
            thread.join()

    def _wake_everybody(self) -> None:
        for condition in (self._to_decode, self._room, self._to_embed):
            condition.notify_all()

    def _enqueue(self, item: _Item) -> None:
        def room() -> bool:
            if self._closed or self._fault is not None or not self._items:
                return True
            return self._bytes + len(item.encoded) <= self._max_bytes and len(self._items) < self._max_items

        with self._lock:
            if not room():
                self._blocked += 1
                self._to_decode.notify_all()
                self._room.wait_for(room)
                self._blocked -= 1
            if self._fault is not None:
                raise self._fault
            self._items.append(item)
            self._bytes += len(item.encoded)
            self._encoded_moved()
            if len(self._items) >= self.engine.chunk:
                self._to_decode.notify()

    def _half_empty(self) -> bool:
        """Whether a reader that waits should go on: late enough that it wakes for many images, not for each."""
        return len(self._items) <= self._max_items // 2 and self._bytes <= self._max_bytes // 2

    # -- decode threads --------------------------------------------------------------------

    def _decode_loop(self) -> None:
        chunk = self.engine.chunk
        while True:
            with self._lock:
                self._to_decode.wait_for(lambda: self._closed or (self._items and self._drained() and self._whole()))
                if self._closed:
                    return
                taken = [self._items.popleft() for _ in range(min(chunk, len(self._items)))]
                self._bytes -= sum(len(item.encoded) for item in taken)
                self._encoded_moved()
                self._decoding += len(taken)
                if self._blocked and self._half_empty():
                    self._room.notify_all()
            start = time.perf_counter()
            results = self.engine.prepare([item.encoded for item in taken], [item.shard.wanted for item in taken])
            self.clock.add("decode", time.perf_counter() - start)
            self._hand_on(taken, results)

    def _whole(self) -> bool:
        """Whether to take what is there: a full chunk, or all there will be for now."""
        return len(self._items) >= self.engine.chunk or self._feeding == 0 or self._blocked > 0

    def _drained(self) -> bool:
        """Whether the models can take more: none has its queue full, what is being decoded counted in."""
        return all(len(queue) + self._decoding <= self._max_ready[p] for p, queue in self._ready.items())

    def _hand_on(self, taken: Sequence[_Item], results: Sequence[Prepared]) -> None:
        finished = 0
        with self._lock:
            for item, result in zip(taken, results, strict=True):
                if result.error is not None:
                    item.shard.errors[item.ordinal] = result.error
                if result.decoder is not None:
                    item.shard.decoders[result.decoder] += 1
                for position, values in result.values.items():
                    item.shard.values[position][item.ordinal] = values
                if result.tensors:
                    waiting = [len(result.tensors)]
                    for position, tensor in result.tensors.items():
                        self._ready[position].append((item.shard, item.ordinal, tensor, waiting))
                else:
                    item.shard._finish()
                    finished += 1
            self._decoding -= len(taken)
            self.images += finished
            self._ready_moved()
            if self.models and self._next_batch() is not None:
                self._to_embed.notify()
        if finished and self._on_images is not None:
            self._on_images(finished)

    # -- the model thread ------------------------------------------------------------------

    def _model_loop(self) -> None:
        """Run batches; of a model that overlaps, one stays under way while the next is handed in."""
        under_way: _UnderWay | None = None
        while True:
            start = time.perf_counter()
            with self._lock:
                if under_way is None:
                    self._to_embed.wait_for(lambda: self._closed or self._next_batch() is not None)
                if self._closed:
                    return
                position = self._next_batch()
                batch: list[tuple[OpenShard, int, Any, Any]] = []
                if position is not None:
                    queue, model = self._ready[position], self.models[position]
                    batch = [queue.popleft() for _ in range(min(model.batch_size, len(queue)))]
                    self._ready_moved()
                    busy_upstream = self._feeding > 0 or self._decoding > 0
                    self._to_decode.notify_all()
            began = time.perf_counter()
            started: _UnderWay | None = None
            if position is not None:
                if busy_upstream or len(batch) == model.batch_size:
                    self.clock.add("idle", began - start)
                started = _UnderWay(position, batch, model.submit([entry[2] for entry in batch]))
            if under_way is not None:
                self._deliver(under_way)
                under_way = None
            if started is not None and model.overlaps:
                under_way = started
            elif started is not None:
                self._deliver(started)
            self.clock.add("model", time.perf_counter() - began)

    def _deliver(self, batch: _UnderWay) -> None:
        """Wait for a batch's embeddings and give them to their shards."""
        vectors = batch.collect()
        if np.ndim(vectors) != 2 or len(vectors) != len(batch.entries):
            raise StepError(
                f"the model of step {batch.position} gave embeddings of shape {np.shape(vectors)} for "
                f"{len(batch.entries)} images; it must give (n, dim), one vector per image"
            )
        with np.errstate(over="ignore"):  # what float16 cannot hold becomes infinite, and that is seen
            vectors = np.asarray(vectors, self._dtypes.get(batch.position, np.float32))
        finished = 0
        good = sound(vectors)
        for (shard, ordinal, _, waiting), vector, is_good in zip(batch.entries, vectors, good, strict=True):
            if is_good:
                shard._put(batch.position, ordinal, vector)
            else:
                shard.errors.setdefault(ordinal, Reason.BAD_VECTOR)
            waiting[0] -= 1
            if waiting[0] == 0:
                shard._finish()
                finished += 1
        with self._lock:
            self.images += finished
        if finished and self._on_images is not None:
            self._on_images(finished)

    def _next_batch(self) -> int | None:
        """The step whose batch should run now: a full one, or a partial one when nothing more is coming."""
        fullest = max(self._ready, key=lambda p: len(self._ready[p]) / self.models[p].batch_size)
        waiting = len(self._ready[fullest])
        if waiting >= self.models[fullest].batch_size:
            return fullest
        if waiting and not self._items and self._decoding == 0 and self._feeding == 0:
            return fullest
        return None

    def _guarded(self, loop: Any) -> None:
        try:
            loop()
        except BaseException as fault:
            with self._lock:
                self._fault = fault
                for shard in self._open:
                    shard._fail(fault)
                self._wake_everybody()
