"""A forward pass recorded once as a CUDA graph and replayed: one launch for each batch instead of one for each kernel.

Kept apart from the runner, which decides when to record: here is only how, and how to leave no trace of a failure.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

WARM_UP = 2
"""Passes before recording: libraries choose their kernels and allocate their workspaces in the first ones."""

_failed: list[torch.cuda.CUDAGraph] = []
"""Graphs whose recording failed, emptied: torch's allocators may go on asking them whether a stream is theirs."""


class CapturedForward:
    """A forward pass of one batch shape, with an input and an output that stay where they are.

    Record and replay it with the model's device current and on one stream, by one thread at a time. Other threads may
    use the device meanwhile, on streams of their own.

    Args:
        forward: the pass: (n, 3, H, W) on the device -> (n, dim) there. It must not wait for the device, nor bring
            anything from there or to it.
        batch: an example on the device: it gives shape, type and layout.

    Raises:
        torch.OutOfMemoryError: too little memory to record.
        RuntimeError: the pass does what cannot be recorded, or what a recording does not show: a part of it that runs
            on the host or on streams of its own happens once and never again.
        Exception: whatever ``forward`` raises.
    """

    def __init__(self, forward: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor) -> None:
        self._input = torch.empty_like(batch).copy_(batch)
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                found = forward(self._input)
        if found.device != batch.device:
            raise RuntimeError(f"the result is on {found.device}, not on {batch.device}")
        current.wait_stream(side)
        self._graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        try:
            # A recording that fails may leave the recording stream current: the outer block makes that good.
            # "thread_local", because the decoders' threads allocate meanwhile and must not break the recording.
            with (
                torch.cuda.stream(current),
                torch.cuda.graph(self._graph, pool=pool, stream=side, capture_error_mode="thread_local"),
            ):
                self._output = forward(self._input)
        except BaseException:
            _failed.append(self._graph)
            _close_pool(pool)
            self._graph.reset()
            raise
        self._check(forward, batch.bitwise_not() if batch.dtype == torch.uint8 else -batch)

    def _check(self, forward: Callable[[torch.Tensor], torch.Tensor], other: torch.Tensor) -> None:
        """Raise if a replay does not make of another batch what the pass itself does."""
        found = self(other).float()  # first: the pass may leave its result where the replay's is
        expected = forward(other).float()
        if not torch.allclose(found, expected, rtol=0.05, atol=0.05 * float(expected.abs().max()), equal_nan=True):
            raise RuntimeError("its replay gives other results than the pass itself")

    def fits(self, batch: torch.Tensor) -> bool:
        """Whether a batch has the shape, type and layout that were recorded."""
        mine = self._input
        return (batch.shape, batch.dtype, batch.stride()) == (mine.shape, mine.dtype, mine.stride())

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        """Run the pass on a batch that fits; the result is the caller's own."""
        self._input.copy_(batch)
        self._graph.replay()
        return self._output.clone()  # the next replay writes where this one did


def _close_pool(pool: tuple[int, int]) -> None:
    """Have torch's allocator forget a recording that failed.

    Where CUDA refuses to end it, torch (2.15) leaves the allocator believing that it goes on, and memory that several
    streams used is never given back from then on.
    """
    memory: Any = torch.cuda.memory
    end = getattr(memory, "_cuda_endAllocateToPool", None) or memory._cuda_endAllocateCurrentStreamToPool  # torch 2.7
    with suppress(RuntimeError):  # raised where torch has cleaned up itself
        end(torch.cuda.current_device(), pool)
        memory._cuda_releasePool(torch.cuda.current_device(), pool)
