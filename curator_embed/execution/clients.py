"""Dask clients: one process, several, one per GPU, a cluster from a YAML file, or somebody else's cluster."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Literal

import dask
from distributed import Client, Worker, WorkerPlugin, default_client
from distributed.worker_memory import WorkerMemoryManager
from tqdm.auto import tqdm

from curator_embed.errors import CuratorEmbedError, UsageError
from curator_embed.execution.clusters import ClusterConfig, read_cluster
from curator_embed.execution.clusters.local import cpu_cluster, cuda_cluster
from curator_embed.execution.clusters.running import RunningConfig

log = logging.getLogger(__name__)

TASKS_PER_WORKER = 2
"""Shards a worker has open at a time: while one is written, the next is read."""
LOOK_EVERY_S = 10.0
"""How often it is looked whether the workers that are waited for can still come."""


def get_client(
    cluster_type: Literal["cpu", "gpu"] = "cpu",
    scheduler_address: str | None = None,
    scheduler_file: str | None = None,
    n_workers: int | None = None,
    threads_per_worker: int = TASKS_PER_WORKER,
    *,
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    **cluster_kwargs: Any,
) -> Client:
    """Start a Dask cluster, or connect to one that runs.

    Closing the client, or the end of the script, ends what was started for it: processes here, jobs in a queue. Where
    there is more than one process, a line on standard error says where the dashboard is.

    Args:
        cluster_type: "cpu", or "gpu" for one worker per GPU through dask-cuda.
        scheduler_address: connect to this scheduler ("tcp://10.0.0.1:8786") instead of starting a cluster.
        scheduler_file: the same, from the JSON file that ``dask scheduler --scheduler-file`` writes.
        n_workers: worker processes. On a CPU the default is one worker within this process, which needs
            no ``if __name__ == "__main__"`` guard; more are processes of their own, which do.
        threads_per_worker: shards a worker works on at a time (2 lets one be written while the next is read).
            Threads for decoding are the embedder's ``num_threads_per_worker``.
        config: a YAML file that names a cluster and its size (see the page on clusters), or a mapping with the same
            keys. Goes with no other argument.
        **cluster_kwargs: handed on to ``distributed.LocalCluster`` or ``dask_cuda.LocalCUDACluster``
            (``rmm_pool_size``, ``protocol``, ``enable_cudf_spill``, ``CUDA_VISIBLE_DEVICES``, ...).

    Returns:
        The client; it is also the default one, which datasets use without being told.

    Raises:
        UsageError: options that contradict each other, or a file that cannot be used.
        MissingExtra: a package that this kind of cluster needs is not installed.
        CuratorEmbedError: "gpu" without a GPU, a scheduler that does not answer, workers that do not come.
    """
    if config is not None:
        given = {
            "cluster_type": cluster_type != "cpu",
            "scheduler_address": scheduler_address is not None,
            "scheduler_file": scheduler_file is not None,
            "n_workers": n_workers is not None,
            "threads_per_worker": threads_per_worker != TASKS_PER_WORKER,
            **dict.fromkeys(cluster_kwargs, True),
        }
        beside = [name for name, there in given.items() if there]
        if beside:
            raise UsageError(f"config= describes the whole cluster; write {', '.join(beside)} into that file instead")
        return start_client(read_cluster(config))
    if cluster_type not in ("cpu", "gpu"):
        raise UsageError(f"cluster_type={cluster_type!r}: choose 'cpu' or 'gpu'")
    if scheduler_address is not None and scheduler_file is not None:
        raise UsageError("give scheduler_address or scheduler_file, not both")
    if scheduler_address is not None or scheduler_file is not None:
        if n_workers is not None or cluster_kwargs:
            extra = ["n_workers"] * (n_workers is not None) + sorted(cluster_kwargs)
            raise UsageError(f"{', '.join(extra)}: these start a new cluster and cannot go with a running scheduler")
        where = scheduler_address or str(scheduler_file)
        return start_client(RunningConfig(scheduler=scheduler_address, scheduler_file=scheduler_file, path=where))
    if n_workers is not None and n_workers < 1:
        raise UsageError(f"n_workers={n_workers}: at least 1")
    if cluster_type == "gpu":
        return _never_paused(_owner(cuda_cluster(n_workers, threads_per_worker, cluster_kwargs), gpu=True))
    return _never_paused(_owner(cpu_cluster(n_workers or 1, threads_per_worker, cluster_kwargs)))


def start_client(config: ClusterConfig) -> Client:
    """Start a cluster, or connect to it, and wait for its first workers.

    Raises:
        UsageError, MissingExtra, CuratorEmbedError: as ``get_client``.
    """
    cluster = config.start()
    try:
        client = _owner(cluster, gpu=config.gpus_per_node > 0)
    except (OSError, TimeoutError, ValueError) as error:
        raise CuratorEmbedError(
            f"no Dask scheduler answers at {cluster} ({error}); is it running, and reachable from this machine?"
        ) from error
    try:
        _wait(client, config)
        _check_packages(client)
        return _never_paused(client) if hasattr(cluster, "close") else client
    except BaseException:
        client.close()
        raise


class OwningClient(Client):
    """A client that takes along, when it is closed, what was started for it: the cluster, settings of Dask's."""

    def __init__(self, address: Any, belongings: ExitStack) -> None:
        self.belongings = belongings
        super().__init__(address)

    def close(self, *args: Any, **kwargs: Any) -> Any:
        """See ``distributed.Client.close``."""
        try:
            return super().close(*args, **kwargs)
        finally:
            self.belongings.close()


def _owner(cluster: Any, *, gpu: bool = False) -> Client:
    """A client of a cluster that was started for it, or of an address, which it does not own."""
    belongings = ExitStack()
    belongings.callback(_close, cluster)
    try:
        if gpu:
            belongings.enter_context(_cudf_frames())
        client = OwningClient(cluster, belongings)
    except BaseException:
        belongings.close()
        raise
    link = client.dashboard_link
    if link and not _in_this_process(client):
        missing = importlib.util.find_spec("bokeh") is None
        tell(f"dashboard: {link}" + " (install 'curator-embed[clusters]' to see it)" * missing)
    return client


def _close(cluster: Any) -> None:
    if hasattr(cluster, "close"):
        cluster.close()


def _in_this_process(client: Client) -> bool:
    return client.scheduler is not None and str(client.scheduler.address).startswith("inproc://")


class NeverPaused(WorkerPlugin):
    """Workers near their memory limit go on, up to where Dask ends them.

    Dask pauses a worker at 80 % of its limit until its results are spilled. Ours hold no results, but models and
    images: nothing would ever come free, and the run would stand still without a word.
    """

    name = "curator-embed-never-paused"

    def setup(self, worker: Worker) -> None:
        """Called on every worker, those that come later, too."""
        if isinstance(worker.memory_manager, WorkerMemoryManager):
            worker.memory_manager.memory_pause_fraction = False


def _never_paused(client: Client) -> Client:
    if not _in_this_process(client):
        client.register_plugin(NeverPaused())
    return client


def tell(line: str) -> None:
    """A line for the person at a terminal or a notebook, beside progress bars and never through one."""
    tqdm.write(line, file=sys.stderr)


@contextmanager
def _cudf_frames() -> Iterator[None]:
    """Data frames are cuDF's where it is installed and this process has a GPU for it."""
    import torch

    if torch.cuda.is_available() and all(importlib.util.find_spec(name) for name in ("cudf", "dask_cudf")):
        with dask.config.set({"dataframe.backend": "cudf"}):
            yield
    else:
        yield


def _wait(client: Client, config: ClusterConfig) -> None:
    """Until the first workers are there."""
    if len(client.nthreads()) >= config.wait_for_workers:
        return
    tell(f"waiting for {config.wait_for_workers} worker{'s' * (config.wait_for_workers > 1)}; "
         f"if none comes, look at {config.where_to_look()}")  # fmt: skip
    until = time.monotonic() + config.wait_seconds
    while True:
        left = until - time.monotonic()
        with suppress(TimeoutError):
            client.wait_for_workers(config.wait_for_workers, timeout=max(0.01, min(left, LOOK_EVERY_S)))
            return
        vain = None if client.nthreads() else config.why_none_can_come(client.cluster)
        if vain is not None:
            raise CuratorEmbedError(
                f"{config.path}: no worker came, and none will: {vain}. Look at {config.where_to_look()}"
            )
        if left <= LOOK_EVERY_S:
            raise CuratorEmbedError(
                f"{config.path}: {len(client.nthreads())} of {config.wait_for_workers} workers (wait_for_workers) came "
                f"in {config.wait_seconds:g} seconds (wait_seconds). Look at {config.where_to_look()}"
            )


def _check_packages(client: Client) -> None:
    """See that the workers have this package, before the first task fails over it."""
    for address, found in client.run(_version, on_error="return").items():
        if isinstance(found, Exception):
            raise CuratorEmbedError(
                f"the worker {address} cannot import curator_embed ({type(found).__name__}: {found}). Install the same "
                "version on all nodes, or name a Python that has it with the key 'python' of the cluster's file"
            )
        if found != _version():
            log.warning("the worker %s has curator-embed %s, this process %s", address, found, _version())


def _version() -> str:
    from curator_embed import __version__

    return __version__


def found_client() -> Client | None:
    """The default client, where there is one."""
    try:
        found: Client = default_client()
    except ValueError:
        return None
    return found


@contextmanager
def some_client() -> Iterator[Client]:
    """The default client where there is one, else one in-process worker for the length of the block."""
    found = found_client()
    if found is not None:
        yield found
        return
    with dask.config.set({"distributed.worker.daemon": False}):
        client = get_client()
    try:
        yield client
    finally:
        client.close()
