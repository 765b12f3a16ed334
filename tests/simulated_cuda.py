"""CUDA's streams, events and graphs without a GPU: who may touch which memory when, checked access by access.

Tensors live on the CPU and everything is computed at once, so values are right; what is checked is the order that the
program asked for. Every actor (the host, each stream) has a vector clock; events, waits and synchronising carry clocks
from one to another. Two accesses to one storage, one of them a write, of which neither is known to come first, are a
race. A recorded graph is its list of operations: what it computed while it was recorded is spoilt, as nothing is
computed then on a device, and a replay computes into the same memory again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Clock = dict[object, int]
NOT_WHILE_RECORDING = "operation not permitted when stream is capturing"


class Race(AssertionError):
    """Two accesses that nothing puts in order."""


class Actor:
    """The host or a stream: what it has done, and what it knows others to have done."""

    def __init__(self, name: str) -> None:
        self.name, self.clock = name, Clock()

    def learn(self, clock: Clock) -> None:
        for actor, tick in clock.items():
            self.clock[actor] = max(self.clock.get(actor, 0), tick)

    def act(self) -> int:
        self.clock[self] = self.clock.get(self, 0) + 1
        return self.clock[self]

    def __repr__(self) -> str:
        return self.name


class Stream(Actor):
    """``torch.cuda.Stream``."""

    def __init__(self, gpu: SimulatedCuda, name: str = "") -> None:
        gpu.streams += 1
        super().__init__(name or f"stream {gpu.streams}")
        self.gpu, self.device = gpu, torch.device("cuda", 0)

    def wait_event(self, event: Event) -> None:
        self.learn(event.clock)

    def wait_stream(self, other: Stream) -> None:
        self.learn(other.clock)


class Event:
    """``torch.cuda.Event``."""

    def __init__(self, gpu: SimulatedCuda) -> None:
        self.gpu, self.clock = gpu, Clock()

    def record(self) -> None:
        self.clock = dict(self.gpu.current.clock)

    def synchronize(self) -> None:
        self.gpu.host_waits(self.clock)


class Graph:
    """``torch.cuda.CUDAGraph``."""

    def __init__(self, gpu: SimulatedCuda) -> None:
        self.gpu, self.operations, self.replays = gpu, [], 0
        gpu.graphs.append(self)

    def reset(self) -> None:
        self.operations = []

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, out in self.operations:
            with self.gpu.unwatched():
                again = func(*args, **kwargs)
                if not _aliases(out, (args, kwargs)):
                    for old, new in zip(_tensors(out), _tensors(again), strict=True):
                        old.copy_(new)
            self.gpu.access(func, args, kwargs, out)


class SimulatedCuda(TorchDispatchMode):
    """Stands where ``torch.cuda`` is as long as ``simulated_cuda`` is open.

    Attributes:
        graphs: recorded, or tried to.
        open_pools: of recordings that failed and that nobody closed.
        waits: how often the host waited for the device.
        emptied: how often the allocator was told to give back what it keeps.
        shared: per tensor that was said to be used by another stream, its storage and that stream.
    """

    def __init__(self) -> None:
        super().__init__()
        self.streams = self.waits = self.emptied = 0
        self.shared: list[tuple[int, Stream]] = []
        self.host = Actor("the host")
        self.default = self.current = Stream(self, "the default stream")
        self.graphs: list[Graph] = []
        self.open_pools: set[int] = set()
        self.recording: Graph | None = None
        self._watching = True
        self._kept: list[Any] = []  # storages, so that no address is used twice
        self._on_device: set[int] = set()
        self._accesses: dict[int, list[tuple[Actor, int, bool, str]]] = {}

    @contextmanager
    def unwatched(self) -> Iterator[None]:
        before, self._watching = self._watching, False
        try:
            yield
        finally:
            self._watching = before

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph: Graph, *, pool: int, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local", "other threads use the device meanwhile"
        before, self.current, self.recording = self.current, stream, graph
        self.open_pools.add(pool)
        yield  # as torch's: what fails here leaves the stream current and the pool open
        self.open_pools.discard(pool)
        self.current, self.recording = before, None
        with self.unwatched():
            for _, args, kwargs, out in graph.operations:
                if not _aliases(out, (args, kwargs)):
                    for tensor in _tensors(out):
                        tensor.fill_(float("nan") if tensor.is_floating_point() else 77)

    def pool_handle(self) -> int:
        self.recording = None
        return len(self.graphs)

    def close_pool(self, device: int, pool: int) -> None:
        self.recording = None
        if pool not in self.open_pools:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.open_pools.discard(pool)

    def host_waits(self, clock: Clock) -> None:
        if self.recording is not None:
            raise RuntimeError(NOT_WHILE_RECORDING)
        self.waits += 1
        self.host.learn(clock)

    def empty_cache(self) -> None:
        self.emptied += 1

    def is_on_device(self, tensor: torch.Tensor) -> bool:
        return _storage(tensor) in self._on_device

    def move(self, tensor: torch.Tensor) -> torch.Tensor:
        """Call a tensor's memory the device's."""
        self._kept.append(tensor.untyped_storage())
        self._on_device.add(_storage(tensor))
        return tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self._watching:
            return func(*args, **kwargs)
        looks = func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default)
        if looks and self.is_on_device(args[0]):
            self.host_waits(self.current.clock)
        out = func(*args, **kwargs)
        for tensor in _tensors(out):
            self._kept.append(tensor.untyped_storage())
        used = [tensor for tensor in _tensors((args, kwargs)) if self.is_on_device(tensor)]
        if used and not _is_copy(func):
            for tensor in _tensors(out):
                self.move(tensor)
        if self.recording is None:
            self.access(func, args, kwargs, out)
        elif used:
            self.recording.operations.append((func, args, kwargs, out))
        if _is_copy(func) and used and len(used) == 1 and not (kwargs.get("non_blocking") or args[2:3] == (True,)):
            self.host_waits(self.current.clock)  # a copy between host and device
        return out

    def access(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Check what an operation reads and writes, and note it."""
        written = {
            _storage(tensor)
            for argument, value in [
                *zip(func._schema.arguments, args, strict=False),
                *((argument, kwargs[argument.name]) for argument in func._schema.arguments if argument.name in kwargs),
            ]
            if argument.alias_info is not None and argument.alias_info.is_write
            for tensor in _tensors(value)
        }
        if not written and _aliases(out, (args, kwargs)):
            return  # another view
        read = {_storage(tensor) for tensor in _tensors((args, kwargs))} - written
        written |= {_storage(tensor) for tensor in _tensors(out)} - read
        on_device = any(storage in self._on_device for storage in read | written)
        actor: Actor = self.current if on_device else self.host
        if on_device:
            actor.learn(self.host.clock)  # launched after all that the host has done
        tick = actor.act()
        for storages, writes in ((read, False), (written, True)):
            for storage in storages:
                self.note(storage, actor, tick, writes, str(func))

    def note(self, storage: int, actor: Actor, tick: int, writes: bool, what: str) -> None:
        before = self._accesses.setdefault(storage, [])
        for other, then, wrote, did in before:
            if (writes or wrote) and actor.clock.get(other, 0) < then:
                raise Race(f"{what} of {actor} and {did} of {other} have no order")
        if writes:
            before.clear()
        before.append((actor, tick, writes, what))


class _Functions(TorchFunctionMode):
    """Has tensors made, moved and described as if there were a device."""

    def __init__(self, gpu: SimulatedCuda) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        gpu = self.gpu
        if func == torch.Tensor.is_cuda.__get__:
            return gpu.is_on_device(args[0])
        if func == torch.Tensor.device.__get__:
            return torch.device("cuda", 0) if gpu.is_on_device(args[0]) else torch.device("cpu")
        if func is torch.Tensor.pin_memory:
            return args[0].clone()
        if func is torch.Tensor.cpu and gpu.is_on_device(args[0]):
            gpu.host_waits(gpu.current.clock)
            with gpu.unwatched():
                return args[0].clone()
        if func is torch.Tensor.numpy:
            gpu.note(_storage(args[0]), gpu.host, gpu.host.act(), False, "numpy()")
        kwargs.pop("pin_memory", None)
        device = kwargs.get("device")
        if device is None or torch.device(device).type != "cuda":
            return func(*args, **kwargs)
        made = func(*args, **{**kwargs, "device": "cpu"})
        if func is torch.tensor:  # brought from the host, waiting for all before it
            gpu.host_waits(gpu.current.clock)
        return gpu.move(made)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _storage(tensor: torch.Tensor) -> int:
    with torch._C.DisableTorchFunction():
        return tensor.untyped_storage()._cdata


def _aliases(out: Any, arguments: Any) -> bool:
    """Whether a result is a view of an argument, or one itself."""
    mine = {_storage(tensor) for tensor in _tensors(out)}
    return bool(mine) and mine <= {_storage(tensor) for tensor in _tensors(arguments)}


def _is_copy(func: Any) -> bool:
    return func is torch.ops.aten.copy_.default


@contextmanager
def simulated_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimulatedCuda]:
    """Put the simulation in the place of ``torch.cuda``."""
    gpu = SimulatedCuda()

    @contextmanager
    def device(_: Any) -> Iterator[None]:
        yield

    for name, stand_in in {
        "device": device,
        "stream": gpu.stream,
        "graph": gpu.graph,
        "Stream": lambda: Stream(gpu),
        "Event": lambda blocking=False: Event(gpu),
        "CUDAGraph": lambda: Graph(gpu),
        "graph_pool_handle": gpu.pool_handle,
        "current_stream": lambda device=None: gpu.current,
        "default_stream": lambda device=None: gpu.default,
        "current_device": lambda: 0,
        "empty_cache": gpu.empty_cache,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda tensor, stream: gpu.shared.append((_storage(tensor), stream))
    )
    monkeypatch.setattr(torch.cuda.memory, "_cuda_endAllocateToPool", gpu.close_pool)
    monkeypatch.setattr(torch.cuda.memory, "_cuda_releasePool", lambda device, pool: None)
    with gpu, _Functions(gpu):
        yield gpu
