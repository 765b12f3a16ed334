"""Clusters on this machine: one worker within the process, several processes, or one process a GPU.

``get_client`` without a file uses the same functions.
"""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from curator_embed.errors import CuratorEmbedError, MissingExtra, UsageError
from curator_embed.execution.clusters.config import ClusterConfig


@dataclass(frozen=True, kw_only=True)
class LocalConfig(ClusterConfig):
    """This machine. ``options`` go to ``distributed.LocalCluster``, or to ``dask_cuda.LocalCUDACluster``."""

    kind: ClassVar[str] = "local"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nodes != 1:
            raise self.wrong("nodes", "a local cluster is one machine; use another kind for several")
        self.check_wait()

    def start(self) -> Any:
        """See ``ClusterConfig.start``."""
        if self.gpus_per_node:
            return cuda_cluster(self.gpus_per_node, self.threads_per_worker, self.options)
        return cpu_cluster(self.workers_per_node, self.threads_per_worker, self.options)


def cpu_cluster(n_workers: int, threads_per_worker: int, options: Mapping[str, Any]) -> Any:
    """One worker is a thread pool of this process; several are processes, with a dashboard.

    Args:
        options: of ``distributed.LocalCluster``; ``processes=True`` makes a single worker a process too.

    Raises:
        UsageError: processes are wanted while a script is imported by one of them.
    """
    from distributed import LocalCluster

    in_process = n_workers == 1 and not options.get("processes", False)
    chosen: dict[str, Any] = {"processes": not in_process, "silence_logs": logging.ERROR}
    if in_process:
        # One process has nothing to protect itself from: its memory is the user's own.
        chosen["memory_limit"] = 0
        if "dashboard_address" not in options:
            # Without an address the scheduler would still serve HTTP, on port 8787 of every interface.
            chosen |= {"dashboard_address": None, "scheduler_kwargs": {"dashboard_address": "localhost:0"}}
    else:
        if _imported_by_a_worker():
            raise UsageError(
                "several workers (n_workers=..., workers_per_node:) are processes that import your script again. "
                "Put the script's work under 'if __name__ == \"__main__\":', or use one worker to stay in one process"
            )
        chosen["dashboard_address"] = "localhost:0"
    return LocalCluster(**{**chosen, "n_workers": n_workers, "threads_per_worker": threads_per_worker, **options})


def cuda_cluster(n_workers: int | None, threads_per_worker: int, options: Mapping[str, Any]) -> Any:
    """One worker a GPU.

    Args:
        n_workers: so many GPUs; None for all.
        options: of ``dask_cuda.LocalCUDACluster`` (``rmm_pool_size``, ``protocol``, ``enable_cudf_spill``, ...).

    Raises:
        UsageError: more workers than GPUs, or a script is imported by one of them.
        CuratorEmbedError: this process sees no GPU.
        MissingExtra: dask-cuda is not installed.
    """
    import torch

    if _imported_by_a_worker():
        raise UsageError(
            "cluster_type='gpu': a worker is a process that imports your script again. Put the script's work under "
            "'if __name__ == \"__main__\":'"
        )
    if not torch.cuda.is_available():
        raise CuratorEmbedError(
            "cluster_type='gpu' needs an NVIDIA GPU and its driver, and this process sees none "
            "(torch.cuda.is_available() is False). Use cluster_type='cpu', or run 'curator-embed doctor' to see "
            "what is missing"
        )
    try:
        from dask_cuda import LocalCUDACluster
    except ImportError as error:
        raise MissingExtra("dask-cuda", "cuda13]' or 'curator-embed[cuda12", "One worker a GPU") from error
    named = options.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        there = torch.cuda.device_count()
    else:
        there = len(named.split(",") if isinstance(named, str) else list(named))
    if n_workers is not None and n_workers > there:
        raise UsageError(f"n_workers={n_workers}: every worker has a GPU of its own, and there are {there} of them")
    chosen = {"dashboard_address": "localhost:0", "n_workers": n_workers, "threads_per_worker": threads_per_worker}
    return LocalCUDACluster(**{**chosen, **options})


def _imported_by_a_worker() -> bool:
    """Whether this process is one that multiprocessing starts, still importing the script that started it."""
    return getattr(multiprocessing.current_process(), "_inheriting", False)
