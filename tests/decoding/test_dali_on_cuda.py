"""What becomes of DALI's results on a GPU, on simulated streams: copied out before DALI uses their memory again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import nvidia.dali.plugin.pytorch as dali_for_torch
import pytest
import torch

from curator_embed.decoding.dali import Admitted, _Graph, _Lane
from curator_embed.decoding.geometry import plan
from curator_embed.decoding.spec import PreprocessSpec
from tests.simulated_cuda import Event, Race, SimulatedCuda, Stream, simulated_cuda

SIDE = 8
SPEC = PreprocessSpec("squash", (SIDE, SIDE), (SIDE, SIDE), "bicubic", (0.5,) * 3, (0.5,) * 3)
IMAGES = [Admitted(bytes([value]), (SIDE, SIDE), (plan(SPEC, SIDE, SIDE),)) for value in range(4)]


class OnDevice:
    """DALI's ``TensorListGPU`` and ``TensorGPU``, as far as they are used."""

    def __init__(self, pixels: torch.Tensor) -> None:
        self.pixels = pixels

    def as_tensor(self) -> OnDevice:
        return self

    def shape(self) -> list[int]:
        return list(self.pixels.shape)


class Shapes:
    def __init__(self, count: int) -> None:
        self.count = count

    def as_cpu(self) -> Shapes:
        return self

    def as_array(self) -> np.ndarray:
        return np.array([[SIDE, SIDE, 3]] * self.count)


class Pipe:
    """A DALI pipeline: computes on a stream of its own, into the same memory each time, and waits for that."""

    def __init__(self, gpu: SimulatedCuda) -> None:
        self.gpu, self.stream = gpu, Stream(gpu, "DALI's stream")
        self.memory = gpu.move(torch.zeros(4, SIDE, SIDE, 3, dtype=torch.uint8))
        self.encoded: list[np.ndarray] = []
        self.errors: list[RuntimeError] = []

    def feed_input(self, name: str, data: Any) -> None:
        if name == "encoded":
            self.encoded = data

    def run(self) -> tuple[Shapes, OnDevice]:
        if self.errors:
            raise self.errors.pop()
        with self.gpu.stream(self.stream):
            for row, data in zip(self.memory, self.encoded, strict=False):
                row.fill_(int(data[0]))
        self.gpu.host_waits(self.stream.clock)
        return Shapes(len(self.encoded)), OnDevice(self.memory[: len(self.encoded)])


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimulatedCuda]:
    with simulated_cuda(monkeypatch) as simulated:

        def copied(found: OnDevice, into: torch.Tensor, cuda_stream: Stream) -> None:
            with simulated.stream(cuda_stream):
                into.copy_(found.pixels, non_blocking=True)

        monkeypatch.setattr(dali_for_torch, "feed_ndarray", copied)
        monkeypatch.setattr(_Graph, "build", lambda graph: Pipe(simulated))
        yield simulated


def lane() -> _Lane:
    return _Lane(_Graph((SPEC,), torch.device("cuda"), 4, 1, False, 1.0, True))


def use(made: list[tuple[torch.Tensor, ...] | None]) -> list[int]:
    """As a model does: on the default stream, without waiting for anything."""
    return torch.stack([tensors[0] for tensors in made if tensors is not None]).amax(dim=(1, 2, 3)).tolist()


def test_results_are_there_and_stay_while_dali_goes_on(gpu: SimulatedCuda) -> None:
    decoder = lane()
    first = decoder.decode(IMAGES)
    second = decoder.decode(IMAGES[2:])
    assert use(first) == [0, 1, 2, 3]
    assert use(second) == [2, 3]
    assert all(tensors is not None and tensors[0].is_cuda and tensors[0].shape == (3, SIDE, SIDE) for tensors in first)
    assert [stream for _, stream in gpu.shared] == [gpu.default] * 2, "the allocator knows who reads them"
    assert len({storage for storage, _ in gpu.shared}) == 2


def test_waiting_for_the_copy_is_needed(gpu: SimulatedCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulation sees where it is missing."""
    monkeypatch.setattr(Event, "synchronize", lambda event: None)
    with pytest.raises(Race):
        use(lane().decode(IMAGES))


def short_of_memory() -> RuntimeError:
    return RuntimeError(
        "Error in GPU operator `nvidia.dali.fn.resize`\n\nencountered:\n\nCan't allocate 9 bytes on device 0."
    )


def test_a_full_device_is_tried_again_after_torch_has_given_back_what_it_keeps(gpu: SimulatedCuda) -> None:
    decoder = lane()
    decoder._pipe.errors = [short_of_memory()]
    assert use(decoder.decode(IMAGES)) == [0, 1, 2, 3]
    assert gpu.emptied == 1


def test_a_device_that_stays_full_is_no_images_fault(gpu: SimulatedCuda) -> None:
    decoder = lane()
    decoder._pipe.errors = [short_of_memory() for _ in range(99)]
    with pytest.raises(RuntimeError, match="Can't allocate"):
        decoder.decode(IMAGES)
