"""Where a job runs: the device and the decode engine, chosen from what the embedders ask for and what the workers have.

Asked once per run, before anything is read or loaded: a device that nobody has is told here.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dask.system import cpu_count
from distributed import Client

from curator_embed.errors import UsageError
from curator_embed.execution.clients import TASKS_PER_WORKER
from curator_embed.execution.job import ShardJob
from curator_embed.execution.workers import ask_workers, cores_per_worker, wait_for_worker
from curator_embed.steps import BatchStep, Decoder, Step

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Workforce:
    """What a plan must know of the workers; they need not be there yet.

    Attributes:
        workers: how many they are.
        cores: CPU cores that each can call its own.
        tasks: tasks that run at a time, on all of them together.
        gpus: asked where a model needs a device: GPUs that each sees, by its name.
    """

    workers: int
    cores: int
    tasks: int
    gpus: Callable[[], Mapping[str, int]]

    @classmethod
    def of(cls, client: Client) -> Workforce:
        """The workers that are there."""
        wait_for_worker(client)
        cores, threads = cores_per_worker(client), client.nthreads()
        return cls(len(threads), cores, sum(threads.values()), lambda: ask_workers(client, _gpus))

    @classmethod
    def here(cls, workers: int = 1) -> Workforce:
        """Workers that this machine would have, none of which is started."""
        cores = max(1, cpu_count() // workers)
        return cls(workers, cores, TASKS_PER_WORKER * workers, lambda: {"this machine": _gpus()})


def place_on_workers(client: Client, job: ShardJob) -> ShardJob:
    """``place`` by what the workers have that are there."""
    wait_for_worker(client)
    return place(job, lambda: ask_workers(client, _gpus))


def place(job: ShardJob, gpus: Callable[[], Mapping[str, int]]) -> ShardJob:
    """Choose device and decode engine from what the workers have, unless the embedders say otherwise.

    Args:
        gpus: asked where a model needs a device: GPUs that each worker sees, by its name.

    Raises:
        UsageError: the embedders ask for different devices or decoders, or for a device that no worker has.
    """
    device = _device(gpus, [step for step in job.steps if isinstance(step, BatchStep)])
    engine = engine_for(device, job.steps)
    steps = tuple(
        step.on_device(device).decoded_by(engine) if isinstance(step, BatchStep) else step for step in job.steps
    )
    return dataclasses.replace(job, steps=steps, device=device, engine=engine)


def _device(gpus: Callable[[], Mapping[str, int]], embedders: Sequence[BatchStep]) -> str:
    if not embedders:
        return "cpu"  # nothing here has a model: torch need not even be imported
    asked = {step.device for step in embedders if step.device is not None}
    if len(asked) > 1:
        raise UsageError(f"the embedders of one run ask for different devices: {sorted(asked)}")
    if asked:
        device = asked.pop()
        if device.partition(":")[0] == "cuda":
            _check_gpu(device, gpus())
        return device
    seen = gpus()
    without = [address for address, found in seen.items() if not found]
    if without and len(without) < len(seen):
        log.warning(
            "%d of %d workers see no GPU (%s, ...): the run is on the CPU. With device='cuda' those that see one "
            "do the work alone",
            len(without),
            len(seen),
            without[0],
        )
    return "cpu" if without else "cuda"


def _check_gpu(device: str, seen: Mapping[str, int]) -> None:
    """See that at least one worker has the GPU that was asked for; the others are left out when their turn comes.

    Args:
        seen: GPUs that each worker sees, by its address.

    Raises:
        UsageError: none has it.
    """
    number, most = int(device.partition(":")[2] or 0), max(seen.values())
    if most > number:
        return
    has = "no worker sees a GPU" if not most else f"no worker sees more than {most} (they are counted from 0)"
    raise UsageError(
        f"device='{device}' was asked for, and {has}. Pass device='{'cuda' if most else 'cpu'}', or ask "
        "'curator-embed doctor' on the workers' machines what is missing"
    )


def engine_for(device: str, steps: Sequence[Step]) -> Decoder:
    """The decoder the embedders ask for; DALI by default where the models have a GPU and DALI is installed.

    Raises:
        UsageError: they ask for different ones.
    """
    asked = {step.decoder for step in steps if isinstance(step, BatchStep)} - {"auto"}
    if len(asked) > 1:
        raise UsageError("the embedders of one run share one decode, but ask for decoder='cpu' and decoder='dali'")
    if asked:
        return "dali" if asked.pop() == "dali" else "cpu"
    if device.startswith("cuda"):
        from importlib.util import find_spec

        if find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None:
            return "dali"
    return "cpu"


def _gpus() -> int:
    """GPUs that this process sees."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0
