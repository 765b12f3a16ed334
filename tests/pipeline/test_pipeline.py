"""The engine room: batches across shards, back-pressure, faults, and no image left behind."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Sequence

import numpy as np
import pytest

from curator_embed.errors import Reason
from curator_embed.execution.worker import _close
from curator_embed.pipeline.pipeline import OpenShard, Pipeline, PipelineClosed, Prepared
from curator_embed.steps import BatchModel


class NumberModel(BatchModel):
    """Turns the number in an image into a vector; remembers its batches."""

    def __init__(self, batch_size: int, delay: float = 0.0) -> None:
        self.batch_size, self.delay, self.batches = batch_size, delay, []

    def __call__(self, images: Sequence[int]) -> np.ndarray:
        time.sleep(self.delay)
        self.batches.append(len(images))
        return np.array([[number, -number - 1] for number in images], np.float32)


class NumberEngine:
    """Images are numbers in decimal; an empty one is bad; "boom" is a bug."""

    def __init__(self, chunk: int = 1) -> None:
        self.chunk, self.sizes, self.under_way, self.most = chunk, [], 0, 0
        self.lock = threading.Lock()

    def prepare(self, encoded: Sequence[bytes], wanted: Sequence[tuple[int, ...]]) -> list[Prepared]:
        self.sizes.append(len(encoded))
        results = []
        for data, positions in zip(encoded, wanted, strict=True):
            if data == b"boom":
                raise RuntimeError("a bug in a decoder")
            if not data:
                results.append(Prepared(error=Reason.EMPTY))
            else:
                results.append(
                    Prepared(
                        tensors={p: int(data) for p in positions if p < 10},
                        values={p: {"digits": len(data)} for p in positions if p >= 10},
                    )
                )
        return results


def feed(pipeline: Pipeline, numbers: Sequence[bytes], wanted: Sequence[int] = (0,)) -> OpenShard:
    with pipeline.shard(wanted) as opened:
        with pipeline.feeding():
            for ordinal, number in enumerate(numbers):
                opened.submit(ordinal, number)
        opened.wait()
    return opened


@pytest.mark.parametrize("chunk", [1, 3, 8])
@pytest.mark.parametrize("threads", [1, 4])
def test_every_image_comes_out_where_it_belongs(chunk: int, threads: int) -> None:
    model = NumberModel(batch_size=4)
    pipeline = Pipeline(NumberEngine(chunk), {0: model}, threads=threads)
    numbers = [b"" if n % 7 == 3 else str(n).encode() for n in range(150)]
    opened = feed(pipeline, numbers)
    vectors, present = opened.vectors[0].gather(np.arange(-1, 150))
    pipeline.close()
    assert opened.errors == {n: Reason.EMPTY for n in range(150) if n % 7 == 3}
    assert present.tolist() == [False] + [n % 7 != 3 for n in range(150)]
    assert all(vectors[n + 1].tolist() == [n, -n - 1] for n in range(150) if n % 7 != 3)
    assert sum(1 for size in model.batches if size < 4) <= 1, "only the last batch is partial"


def test_batches_are_filled_across_shards() -> None:
    model = NumberModel(batch_size=8)
    pipeline = Pipeline(NumberEngine(), {0: model}, threads=2)
    with pipeline.shard([0]) as first, pipeline.shard([0]) as second:
        with pipeline.feeding():
            for ordinal in range(5):
                first.submit(ordinal, b"1")
            for ordinal in range(11):
                second.submit(ordinal, b"2")
        first.wait()
        second.wait()
    pipeline.close()
    assert model.batches == [8, 8]


def test_a_slow_model_stops_the_reader() -> None:
    model = NumberModel(batch_size=2, delay=0.05)
    pipeline = Pipeline(NumberEngine(), {0: model}, threads=2, max_ready_batches=2)
    submitted = []
    with pipeline.shard([0]) as opened:

        def read() -> None:
            with pipeline.feeding():
                for ordinal in range(400):
                    opened.submit(ordinal, b"1")
                    submitted.append(ordinal)

        reader = threading.Thread(target=read)
        reader.start()
        time.sleep(0.2)
        assert len(submitted) < 150, "queues are bounded"
        model.delay = 0
        reader.join()
        opened.wait()
    pipeline.close()


def test_large_images_are_bounded_by_bytes_and_still_pass() -> None:
    pipeline = Pipeline(NumberEngine(chunk=8), {0: NumberModel(4)}, threads=1, max_queued_bytes=100)
    opened = feed(pipeline, [b"0" * 60 + b"7"] * 20)
    pipeline.close()
    assert opened.vectors[0].gather(np.arange(20))[0][:, 0].tolist() == [7] * 20


def test_steps_see_only_the_shards_that_want_them() -> None:
    a, b = NumberModel(4), NumberModel(3)
    pipeline = Pipeline(NumberEngine(), {0: a, 1: b}, [10], threads=2)
    both = feed(pipeline, [b"5"] * 6, [0, 1, 10])
    only = feed(pipeline, [b"55"] * 6, [10])
    pipeline.close()
    assert sum(a.batches) == sum(b.batches) == 6
    assert both.values[10][5] == {"digits": 1} and only.values[10][5] == {"digits": 2}
    assert both.vectors[1].gather(np.arange(6))[1].all() and not only.vectors[1].gather(np.arange(6))[1].any()


@pytest.mark.parametrize("chunk", [1, 4])
def test_a_bug_in_a_stage_reaches_every_shard_that_waits(chunk: int) -> None:
    pipeline = Pipeline(NumberEngine(chunk), {0: NumberModel(4)}, threads=2)
    with pytest.raises(RuntimeError, match="a bug in a decoder"):
        feed(pipeline, [b"1", b"boom", b"2"])
    with pytest.raises(RuntimeError, match="a bug in a decoder"):
        feed(pipeline, [b"1"])
    pipeline.close()


def test_an_abandoned_shard_leaves_nothing_in_the_queues() -> None:
    model = NumberModel(batch_size=4)
    pipeline = Pipeline(NumberEngine(), {0: model}, threads=1)
    with pytest.raises(OSError), pipeline.shard([0]) as opened, pipeline.feeding():
        for ordinal in range(3):
            opened.submit(ordinal, b"1")
        raise OSError
    after = feed(pipeline, [b"9"] * 4)
    pipeline.close()
    assert after.vectors[0].gather(np.arange(4))[0][:, 0].tolist() == [9] * 4


def test_closing_tells_the_shards_that_wait() -> None:
    pipeline = Pipeline(NumberEngine(), {0: NumberModel(batch_size=4, delay=0.3)}, threads=1)
    with pipeline.shard([0]) as opened:
        for ordinal in range(9):
            opened.submit(ordinal, b"1")
        threading.Timer(0.1, pipeline.close).start()
        with pytest.raises(PipelineClosed):
            opened.wait()


def test_a_closed_pipeline_lets_go_of_its_models() -> None:
    """At once, so that the memory they had on a GPU can be given back."""
    model = NumberModel(2)
    kept = weakref.ref(model)
    pipelines = [Pipeline(NumberEngine(), {0: model}, threads=2)]
    with pipelines[0].shard((0,)) as opened:
        with pipelines[0].feeding():
            opened.submit(0, b"7")
        opened.wait()
    del model, opened
    gc.disable()
    try:
        _close(pipelines)
        assert kept() is None
    finally:
        gc.enable()
