"""The model runner on a real GPU: two batches under way, CUDA graphs beside busy decoders, memory that runs out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from curator_embed.decoding.spec import PreprocessSpec
from curator_embed.embedders import TimmImageEmbedder
from curator_embed.embedders.forward import ForwardOptions, ModelRunner

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:.*random weights")]

SIDE = 64
SPEC = PreprocessSpec("squash", (SIDE, SIDE), (SIDE, SIDE), "bilinear", (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
PLACES = pytest.mark.parametrize("on_device", [False, True], ids=["from the host", "decoded on the device"])


def images(count: int, seed: int = 0, *, on_device: bool = False) -> list[torch.Tensor]:
    """As the engines leave them: views on (H, W, 4) in memory, or rows of (N, H, W, 3) on the device."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, SIDE, SIDE, 4), dtype=torch.uint8, generator=generator)
    if on_device:
        return list(pixels[..., :3].contiguous().cuda().permute(0, 3, 1, 2))
    return [image.permute(2, 0, 1)[:3] for image in pixels]


def network(width: int = 64) -> torch.nn.Module:
    torch.manual_seed(1)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, width, 3, 2), torch.nn.ReLU(), torch.nn.Conv2d(width, width, 3, 2), torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(4 * width, 32),
    )  # fmt: skip


def runner(model: Any = None, batch_size: int = 32, **changes: Any) -> ModelRunner:
    options = ForwardOptions("cuda", batch_size, SPEC, **{"normalize": False, **changes})
    return ModelRunner(network() if model is None else model, options)


def expected(batch: list[torch.Tensor]) -> np.ndarray:
    return ModelRunner(network(), ForwardOptions("cpu", len(batch), SPEC, normalize=False))([i.cpu() for i in batch])


def close(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Convolutions may compute in TF32."""
    np.testing.assert_allclose(ours, theirs, atol=5e-3)


@PLACES
@pytest.mark.parametrize("graphs", [False, True], ids=["launched", "recorded"])
def test_two_batches_under_way_give_what_a_cpu_does(graphs: bool, on_device: bool) -> None:
    embed = runner(cuda_graphs=graphs)
    started: list[tuple[Callable[[], np.ndarray], list[torch.Tensor]]] = []
    for number, size in enumerate([32, 32, 7, 32, 1, 32, 32]):
        batch = images(size, number, on_device=on_device)
        started.append((embed.submit(batch), batch))
        if len(started) == 2:
            collect, earlier = started.pop(0)
            close(collect(), expected(earlier))
    close(started[0][0](), expected(started[0][1]))
    assert embed.exceptions() == []


@contextmanager
def busy_device(threads: int = 3) -> Iterator[None]:
    """Other threads allocate, copy and free on streams of their own, as decoders do."""
    stop, failed = threading.Event(), []

    def work() -> None:
        stream = torch.cuda.Stream()
        held: list[torch.Tensor] = []
        try:
            while not stop.is_set():
                with torch.cuda.stream(stream):
                    made = torch.empty(1 << 22, dtype=torch.uint8).pin_memory().cuda(non_blocking=True)
                    made.record_stream(torch.cuda.default_stream())
                    held.append(torch.empty(len(held) * 1_000_003 % 50_000_000 + 1, dtype=torch.uint8, device="cuda"))
                stream.synchronize()
                del held[:-8]
        except Exception as error:  # told by the assertion below
            failed.append(error)

    pool = [threading.Thread(target=work) for _ in range(threads)]
    for thread in pool:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in pool:
            thread.join()
    assert failed == []


def test_graphs_are_recorded_while_others_use_the_device() -> None:
    with busy_device():
        for _ in range(5):
            embed = runner(cuda_graphs=True)
            close(embed(images(32)), expected(images(32)))
            assert embed.exceptions() == []


@pytest.mark.parametrize(
    ("name", "compiled"),
    [("resnet18.a1_in1k", False), ("vit_tiny_patch16_224", False), ("convnext_atto.d2_in1k", False),
     ("vit_tiny_patch16_224", True)],
)  # fmt: skip
def test_recorded_models_equal_launched_ones(name: str, compiled: bool) -> None:
    made = []
    for graphs in (False, True):
        embedder = TimmImageEmbedder(name, device="cuda", batch_size=16, compile=compiled, cuda_graphs=graphs)
        model = embedder.load_model("cuda")
        if model.exceptions():
            pytest.skip(model.exceptions()[0])  # no compiler here
        batch = [torch.randint(0, 256, (3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
                 for n in range(40)]  # fmt: skip
        made.append(np.concatenate([model(batch[first : first + 16]) for first in range(0, 40, 16)]))
        assert model.exceptions() == []
    assert (made[0] * made[1]).sum(axis=1).min() > 0.9999


class LooksAtAValue(torch.nn.Module):
    """Waits for the device in the middle of its pass."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.inner(batch)
        return result if float(result.sum()) == float(result.sum()) else result * 0


def test_a_model_that_cannot_be_recorded_leaves_the_device_as_it_was() -> None:
    embed = runner(LooksAtAValue(), cuda_graphs=True)
    for _ in range(3):
        close(embed(images(32)), expected(images(32)))
    assert len(embed.exceptions()) == 1 and embed.exceptions()[0].startswith("not recorded as a CUDA graph: ")
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    # The allocator waits with memory that two streams used as long as it believes that something is recorded.
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["active_bytes.all.current"]
    side = torch.cuda.Stream()
    for _ in range(8):
        with torch.cuda.stream(side):
            used = torch.empty(1 << 26, dtype=torch.uint8, device="cuda")
            used.record_stream(torch.cuda.default_stream())
            del used
        torch.cuda.synchronize()
    assert torch.cuda.memory_stats()["active_bytes.all.current"] <= before + (1 << 26)
    works = runner(cuda_graphs=True)
    close(works(images(5)), expected(images(5)))
    assert works.exceptions() == []


@pytest.fixture
def little_memory() -> Iterator[None]:
    """What is in use now and 2 GB more."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + (2 << 30)) / total))
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


class Wasteful(torch.nn.Module):
    """Takes 256 MB an image while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        waste = torch.empty(len(batch), 1 << 28, dtype=torch.uint8, device=batch.device)
        result: torch.Tensor = self.inner(batch) + waste[:, :1].float() * 0
        return result


@PLACES
@pytest.mark.parametrize("graphs", [False, True], ids=["launched", "recorded"])
def test_memory_that_runs_out_halves_the_batch(little_memory: None, graphs: bool, on_device: bool) -> None:
    embed = runner(Wasteful(), cuda_graphs=graphs)
    batches = [images(size, size, on_device=on_device) for size in (32, 5, 32)]
    collects = [embed.submit(batches[0]), embed.submit(batches[1])]
    close(collects[0](), expected(batches[0]))
    close(collects[1](), expected(batches[1]))
    close(embed(batches[2]), expected(batches[2]))
    told = embed.exceptions()
    assert told[0] == "batch halved from 32 to 16 after out-of-memory" and 2 <= len(told) <= 4
