"""The model runner's CUDA side without a GPU: the order of copies, kernels and replays, on simulated streams."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from curator_embed.decoding.spec import PreprocessSpec
from curator_embed.embedders.forward import ForwardOptions, ModelRunner
from curator_embed.errors import UsageError
from tests.simulated_cuda import NOT_WHILE_RECORDING, Event, Race, SimulatedCuda, Stream, simulated_cuda

SPEC = PreprocessSpec("squash", (6, 5), (6, 5), "bilinear", (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
GRAPHS = pytest.mark.parametrize("graphs", [False, True], ids=["launched", "recorded"])
Model = Callable[[torch.Tensor], Any]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimulatedCuda]:
    with simulated_cuda(monkeypatch) as simulated:
        yield simulated


def model(batch: torch.Tensor) -> torch.Tensor:
    """Depends on every pixel of a row, and on no other row."""
    weights = torch.arange(1, 91, dtype=torch.float32).reshape(3, 30)
    return (batch.reshape(len(batch), 3, 30) * weights).sum(dim=2)


def runner(batch_size: int = 4, model: Model = model, **changes: Any) -> ModelRunner:
    return ModelRunner(model, ForwardOptions("cuda", batch_size, SPEC, **{"normalize": False, **changes}))


def on_host(count: int, seed: int) -> list[torch.Tensor]:
    """As Pillow's engine leaves them: views on (H, W, 4)."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(0, 256, (6, 5, 4), dtype=torch.uint8, generator=generator).permute(2, 0, 1)[:3]
        for _ in range(count)
    ]


def expected(images: list[torch.Tensor]) -> np.ndarray:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (SPEC.mean, SPEC.std))
    return model(torch.stack([(image.float() / 255 - mean) / std for image in images])).numpy()


def run(
    embed: ModelRunner,
    sizes: list[int],
    place: Callable[[list[torch.Tensor]], list[torch.Tensor]] = list,
) -> None:
    """As the pipeline does: a batch is handed in before the one before it is collected; the results must be right."""
    before: tuple[Callable[[], np.ndarray], np.ndarray] | None = None
    for number, size in enumerate([*sizes, 0]):
        started = None
        if size:
            images = on_host(size, number)
            right = expected(images)
            started = embed.submit(place(images)), right
        if before is not None:
            np.testing.assert_allclose(before[0](), before[1], rtol=1e-5)
        before = started


def decoded_on(gpu: SimulatedCuda) -> Callable[[list[torch.Tensor]], list[torch.Tensor]]:
    """As the DALI engine leaves them: rows of (N, H, W, 3) on the device, waited for."""

    def place(images: list[torch.Tensor]) -> list[torch.Tensor]:
        batch = gpu.move(torch.stack([image.permute(1, 2, 0) for image in images]))
        return list(batch.permute(0, 3, 1, 2))

    return place


@GRAPHS
def test_two_batches_under_way_never_meet(gpu: SimulatedCuda, graphs: bool) -> None:
    embed = runner(cuda_graphs=graphs)
    run(embed, [4, 4, 3, 1, 4, 2, 4])
    assert embed.exceptions() == []
    assert [graph.replays for graph in gpu.graphs] == ([8] if graphs else []), "one of them to check the recording"


@GRAPHS
def test_images_decoded_on_the_device_stay_there(gpu: SimulatedCuda, graphs: bool) -> None:
    embed = runner(cuda_graphs=graphs)
    run(embed, [4, 3, 4, 1], decoded_on(gpu))
    assert embed.exceptions() == []
    assert all(slot.pinned is None for slot in embed._slots)
    run(embed, [2, 4])
    run(embed, [3], decoded_on(gpu))


def test_submitting_waits_for_nothing_but_the_slot_before(gpu: SimulatedCuda) -> None:
    """What is brought to the device while a batch is computed must not wait for that."""
    embed = runner()
    run(embed, [4, 4])
    first, second = embed.submit(on_host(4, 1)), embed.submit(on_host(4, 2))
    before = gpu.waits
    first()
    third = embed.submit(on_host(4, 3))
    assert gpu.waits == before + 2, "for the first batch, and for the copy out of the pinned buffer it lay in"
    second(), third()
    on_device = decoded_on(gpu)([*on_host(4, 4)])
    before = gpu.waits
    embed.submit(on_device)
    assert gpu.waits == before


@pytest.mark.parametrize("left_out", ["wait_event", "record", "synchronize"])
def test_what_keeps_batches_apart_is_needed(gpu: SimulatedCuda, monkeypatch: pytest.MonkeyPatch, left_out: str) -> None:
    """The simulation sees what is missing."""
    embed = runner()
    run(embed, [4])
    monkeypatch.setattr(Stream if left_out == "wait_event" else Event, left_out, lambda *_: None)
    with pytest.raises(Race):
        run(embed, [4, 4, 4])


class Short:
    """Runs out of memory above a number of rows."""

    def __init__(self, most: int, error: Exception) -> None:
        self.most, self.error, self.rows = most, error, set[int]()

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        if len(batch) > self.most:
            raise self.error
        self.rows.add(len(batch))
        return model(batch)


@GRAPHS
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    ],
    ids=["allocator", "library", "kernel"],
)
def test_short_memory_halves_with_a_batch_under_way(gpu: SimulatedCuda, graphs: bool, error: Exception) -> None:
    short = Short(8, error)
    embed = runner(8, short, cuda_graphs=graphs)
    run(embed, [8, 8])
    first = embed.submit(on_host(8, 0))
    short.most = 3
    if graphs:
        embed._recorded = None  # memory is short where it is recorded anew; a replay allocates nothing
    short.rows.clear()
    second = embed.submit(on_host(5, 1))
    np.testing.assert_allclose(first(), expected(on_host(8, 0)), rtol=1e-5)
    np.testing.assert_allclose(second(), expected(on_host(5, 1)), rtol=1e-5)
    run(embed, [8, 7, 8])
    assert short.rows == {2}
    assert embed.exceptions() == [f"batch halved from {a} to {b} after out-of-memory" for a, b in ((8, 4), (4, 2))]


def test_other_errors_of_the_device_are_not_taken_for_short_memory(gpu: SimulatedCuda) -> None:
    broken = Short(0, RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        runner(4, broken)(on_host(4, 0))


def looks_at_a_value(batch: torch.Tensor) -> torch.Tensor:
    return model(batch) if float(batch.sum()) > -1e9 else batch


def computes_on_the_host(batch: torch.Tensor) -> Any:
    return model(batch.cpu())


@pytest.mark.parametrize(
    ("uncapturable", "why"),
    [
        (looks_at_a_value, NOT_WHILE_RECORDING),
        (computes_on_the_host, "the result is on cpu, not on cuda:0"),
    ],
)
def test_a_model_that_cannot_be_recorded_runs_as_it_is_and_says_so(
    gpu: SimulatedCuda, uncapturable: Model, why: str
) -> None:
    embed = runner(4, uncapturable, cuda_graphs=True)
    run(embed, [4, 2, 4])
    assert embed.exceptions() == [f"not recorded as a CUDA graph: RuntimeError: {why}"]
    assert not gpu.open_pools, "torch's allocator would believe that the recording goes on"
    assert gpu.current is gpu.default


def test_a_recording_that_does_not_show_what_is_computed_is_not_used(gpu: SimulatedCuda) -> None:
    constant = torch.ones(4, 3)

    def elsewhere(batch: torch.Tensor) -> torch.Tensor:
        with gpu.unwatched():  # nothing of it is recorded
            constant.copy_(model(batch))
        return gpu.move(constant)

    embed = runner(4, elsewhere, cuda_graphs=True)
    run(embed, [4])
    assert embed.exceptions() == [
        "not recorded as a CUDA graph: RuntimeError: its replay gives other results than the pass itself"
    ]


def test_a_model_of_the_wrong_shape_is_the_callers_to_mend(gpu: SimulatedCuda) -> None:
    with pytest.raises(UsageError, match="one vector an image"):
        runner(4, lambda batch: batch, cuda_graphs=True)(on_host(4, 0))


def test_cuda_graphs_need_a_gpu() -> None:
    with pytest.raises(UsageError, match="cuda_graphs=True needs a GPU, and the model is on cpu"):
        ModelRunner(model, ForwardOptions("cpu", 4, SPEC, cuda_graphs=True))
