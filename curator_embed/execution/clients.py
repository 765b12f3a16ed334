"""Dask clients: one process, several, one a GPU, or somebody else's cluster."""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import dask
from distributed import Client, LocalCluster, default_client

from curator_embed.errors import CuratorEmbedError, MissingExtra, UsageError

TASKS_PER_WORKER = 2
"""Shards a worker has open at a time: while one is written, the next is read."""


def get_client(
    cluster_type: Literal["cpu", "gpu"] = "cpu",
    scheduler_address: str | None = None,
    scheduler_file: str | None = None,
    n_workers: int | None = None,
    threads_per_worker: int = TASKS_PER_WORKER,
    **cluster_kwargs: Any,
) -> Client:
    """Start a Dask cluster on this machine, or connect to one that runs.

    Args:
        cluster_type: "cpu", or "gpu" for one worker a GPU through dask-cuda.
        scheduler_address: connect to this scheduler ("tcp://10.0.0.1:8786") instead of starting a cluster.
        scheduler_file: the same, from the JSON file that ``dask scheduler --scheduler-file`` writes.
        n_workers: worker processes. On a CPU the default is one worker within this process, which needs
            no ``if __name__ == "__main__"`` guard; more are processes of their own, which do.
        threads_per_worker: shards a worker works on at a time (2 lets one be written while the next is read).
            Threads for decoding are the embedder's ``num_threads_per_worker``.
        **cluster_kwargs: handed on to ``distributed.LocalCluster`` or ``dask_cuda.LocalCUDACluster``
            (``rmm_pool_size``, ``protocol``, ``enable_spilling``, ``CUDA_VISIBLE_DEVICES``, ...).

    Returns:
        The client; it is also the default one, which datasets use without being told.

    Raises:
        UsageError: options that contradict each other.
        MissingExtra: "gpu" without dask-cuda.
        CuratorEmbedError: "gpu" without a GPU, or a scheduler that does not answer.
    """
    if cluster_type not in ("cpu", "gpu"):
        raise UsageError(f"cluster_type={cluster_type!r}: choose 'cpu' or 'gpu'")
    if scheduler_address is not None and scheduler_file is not None:
        raise UsageError("give scheduler_address or scheduler_file, not both")
    if scheduler_address is not None or scheduler_file is not None:
        if n_workers is not None or cluster_kwargs:
            extra = ["n_workers"] * (n_workers is not None) + sorted(cluster_kwargs)
            raise UsageError(f"{', '.join(extra)}: these start a new cluster and cannot go with a running scheduler")
        return _connect(scheduler_address, scheduler_file)
    if n_workers is not None and n_workers < 1:
        raise UsageError(f"n_workers={n_workers}: at least 1")
    if cluster_type == "gpu":
        return Client(_cuda_cluster(n_workers, threads_per_worker, cluster_kwargs))
    return _cpu_client(n_workers, threads_per_worker, cluster_kwargs)


def _cpu_client(n_workers: int | None, threads_per_worker: int, cluster_kwargs: dict[str, Any]) -> Client:
    in_process = n_workers in (None, 1) and not cluster_kwargs.get("processes", False)
    options: dict[str, Any] = {"processes": not in_process, "silence_logs": logging.ERROR}
    if "dashboard_address" not in cluster_kwargs:
        # Without an address the scheduler would still serve HTTP, on port 8787 of every interface.
        options |= {"dashboard_address": None, "scheduler_kwargs": {"dashboard_address": "localhost:0"}}
    if in_process:
        # One process has nothing to protect itself from: its memory is the user's own.
        options["memory_limit"] = 0
    elif getattr(multiprocessing.current_process(), "_inheriting", False):
        raise UsageError(
            "get_client(n_workers=...) starts processes that import your script again. Put the script's work under "
            "'if __name__ == \"__main__\":', or leave n_workers out to stay in one process"
        )
    options |= {"n_workers": n_workers or 1, "threads_per_worker": threads_per_worker} | cluster_kwargs
    return Client(LocalCluster(**options))


def _cuda_cluster(n_workers: int | None, threads_per_worker: int, cluster_kwargs: dict[str, Any]) -> Any:
    import torch

    if not torch.cuda.is_available():
        raise CuratorEmbedError(
            "cluster_type='gpu' needs an NVIDIA GPU and its driver, and this process sees none "
            "(torch.cuda.is_available() is False). Use cluster_type='cpu', or run 'curator-embed doctor' to see "
            "what is missing"
        )
    try:
        from dask_cuda import LocalCUDACluster
    except ImportError as error:
        raise MissingExtra("dask-cuda", "cuda12 or cuda13", "One worker a GPU") from error
    return LocalCUDACluster(n_workers=n_workers, threads_per_worker=threads_per_worker, **cluster_kwargs)


def _connect(address: str | None, file: str | None) -> Client:
    if file is not None and not os.path.exists(file):
        raise UsageError(f"scheduler_file={file}: no such file; start a scheduler with --scheduler-file {file}")
    try:
        return Client(address) if address is not None else Client(scheduler_file=file)
    except (OSError, TimeoutError, ValueError) as error:
        where = address or file
        raise CuratorEmbedError(
            f"no Dask scheduler answers at {where} ({error}); is it running, and reachable from this machine?"
        ) from error


@contextmanager
def some_client() -> Iterator[Client]:
    """The default client where there is one, else one in-process worker for the length of the block."""
    try:
        found = default_client()
    except ValueError:
        found = None
    if found is not None:
        yield found
        return
    with dask.config.set({"distributed.worker.daemon": False}):
        client = get_client()
    cluster = client.cluster
    try:
        yield client
    finally:
        client.close()
        if cluster is not None:
            cluster.close()
