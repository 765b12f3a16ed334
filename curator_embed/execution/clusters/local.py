"""Clusters on this machine: one worker within the process, several processes, or one process per GPU.

``get_client`` without a file uses the same functions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar

from curator_embed.errors import CuratorEmbedError, MissingExtra, UsageError
from curator_embed.execution.clusters.config import ClusterConfig
from curator_embed.execution.clusters.main_guard import imported_by_a_worker, unguarded_call
from curator_embed.execution.clusters.signatures import first_unknown
from curator_embed.execution.gpus import why_no_gpu

Blame = Callable[[str, int | None, str], UsageError]
"""(what was asked for, how many of it, what is wrong) -> the error, in the words of the file or the call that asked.
What is asked for is "gpus", "n_workers", "options" as a whole, or the name of one of them."""

_WITHOUT_GPUS = "Run 'curator-embed doctor' to see what is missing, or leave it out: the work is done on the CPU then"

_SIZES = {"n_workers": "gpus_per_node or workers_per_node", "threads_per_worker": "threads_per_worker"}
"""Options of Dask's that the file has keys for."""


@dataclass(frozen=True, kw_only=True)
class LocalConfig(ClusterConfig):
    """This machine. ``options`` go to ``distributed.LocalCluster``, or to ``dask_cuda.LocalCUDACluster``."""

    kind: ClassVar[str] = "local"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nodes != 1:
            raise self.wrong("nodes", "a local cluster is one machine; use another kind for several")
        self.check_wait()

    def check(self) -> None:
        """See ``ClusterConfig.check``: the options' names, and GPUs where workers need them."""
        for name, key in _SIZES.items():
            if name in self.options:
                raise self.wrong(f"options.{name}", f"it has a key of its own; write {key}")
        if self.gpus_per_node:
            check_gpus(self.gpus_per_node, self._blame)
        else:
            check_options(self.options, self._blame)

    def start(self) -> Any:
        """See ``ClusterConfig.start``."""
        self.check()
        if self.gpus_per_node:
            return cuda_cluster(self.gpus_per_node, self.threads_per_worker, self.options, self._blame)
        return cpu_cluster(self.workers_per_node, self.threads_per_worker, self.options, self._blame)

    def _blame(self, what: str, count: int | None, why: str) -> UsageError:
        if what in ("gpus", "n_workers"):
            key = "gpus_per_node" if self.gpus_per_node else "workers_per_node"
            return self.wrong(key, f"{self.gpus_per_node or self.workers_per_node}: {why}")
        return self.wrong("options" if what == "options" else f"options.{what}", why)


def of_a_call(what: str, count: int | None, why: str) -> UsageError:
    """``Blame`` for ``get_client``: its arguments."""
    if what == "options":
        return UsageError(why)
    if what == "gpus":
        what, count = "cluster_type='gpu'", None
    return UsageError(f"{what if count is None else f'{what}={count}'}: {why}")


def check_options(options: Mapping[str, Any], blame: Blame) -> None:
    """See that Dask knows these options of ``LocalCluster``, by its own signatures; starts nothing.

    Raises:
        UsageError: it does not know one; the message names it, and one that is spelled alike.
    """
    if not options:
        return
    from distributed import LocalCluster, Nanny, Scheduler, Worker
    from distributed.core import Server

    # What LocalCluster does not know itself goes to the workers.
    wrong = first_unknown(options, LocalCluster, Nanny, Worker, Server, without=_SIZES)
    if wrong is not None:
        raise blame(wrong[0], None, f"distributed.LocalCluster has no such option{wrong[1]}")
    scheduler = options.get("scheduler_kwargs") or {}
    wrong = first_unknown(scheduler, Scheduler, Server) if isinstance(scheduler, Mapping) else None
    if wrong is not None:
        raise blame(f"scheduler_kwargs.{wrong[0]}", None, f"distributed.Scheduler has no such option{wrong[1]}")


def check_gpus(wanted: int | None, blame: Blame) -> None:
    """See that there are GPUs and the package that gives each a worker, without importing torch.

    Args:
        wanted: so many GPUs; None for one at least.

    Raises:
        UsageError: there are none, or not so many.
        MissingExtra: dask-cuda is not installed.
    """
    why = why_no_gpu(wanted or 1)
    if why:
        raise blame("gpus", wanted, f"{_needs(wanted)}, and {why}. {_WITHOUT_GPUS}")
    if find_spec("dask_cuda") is None:
        raise _no_dask_cuda()


def cpu_cluster(n_workers: int, threads_per_worker: int, options: Mapping[str, Any], blame: Blame = of_a_call) -> Any:
    """One worker is a thread pool of this process; several are processes, with a dashboard.

    Args:
        options: of ``distributed.LocalCluster``; ``processes=True`` makes a single worker a process too.
        blame: makes errors about what was asked for.

    Raises:
        UsageError: Dask does not know an option or cannot use its value, or processes are wanted by a script that they
            would run again.
        CuratorEmbedError: the cluster did not start.
    """
    check_options(options, blame)
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
        _check_main("several workers (n_workers=..., workers_per_node:)", ", or use one worker to stay in one process")
        chosen["dashboard_address"] = "localhost:0"
    arguments = {**chosen, "n_workers": n_workers, "threads_per_worker": threads_per_worker, **options}
    return _started(LocalCluster, arguments, options, blame)


def cuda_cluster(
    n_workers: int | None, threads_per_worker: int, options: Mapping[str, Any], blame: Blame = of_a_call
) -> Any:
    """One worker per GPU.

    Args:
        n_workers: so many GPUs; None for all.
        options: of ``dask_cuda.LocalCUDACluster`` (``rmm_pool_size``, ``protocol``, ``enable_cudf_spill``, ...).
        blame: makes errors about what was asked for.

    Raises:
        UsageError: no GPU, more workers than GPUs, an option that Dask cannot use, or a script that workers would run
            again.
        MissingExtra: dask-cuda is not installed.
        CuratorEmbedError: the cluster did not start.
    """
    import torch

    _check_main("workers with a GPU each", "")
    if not torch.cuda.is_available():
        why = why_no_gpu() or "this process sees none (torch.cuda.is_available() is False)"
        raise blame("gpus", n_workers, f"{_needs(n_workers)}, and {why}. {_WITHOUT_GPUS}")
    try:
        from dask_cuda import LocalCUDACluster
    except ImportError as error:
        raise _no_dask_cuda() from error
    named = options.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        there = torch.cuda.device_count()
    else:
        there = len(named.split(",") if isinstance(named, str) else list(named))
    if n_workers is not None and n_workers > there:
        raise blame("n_workers", n_workers, f"every worker has a GPU of its own, and there are {there} of them")
    chosen = {"dashboard_address": "localhost:0", "n_workers": n_workers, "threads_per_worker": threads_per_worker}
    return _started(LocalCUDACluster, {**chosen, **options}, options, blame)


def _started(kind: Callable[..., Any], arguments: Mapping[str, Any], options: Mapping[str, Any], blame: Blame) -> Any:
    """Start a cluster; what Dask raises about a value is the fault of an option, the rest of the machine."""
    try:
        return kind(**arguments)
    except Exception as error:  # Dask wraps them: "Nanny failed to start." from the error that says why
        chain: list[BaseException] = [error]
        while (cause := chain[-1].__cause__) is not None:
            chain.append(cause)
        about_a_value = next((one for one in chain if isinstance(one, TypeError | ValueError)), None)
        reason = about_a_value or chain[-1]
        said = f"{type(reason).__name__}: {reason}"
        if options and about_a_value is not None:
            raise blame("options", None, f"Dask cannot start a cluster with {_shown(options)} ({said})") from error
        raise CuratorEmbedError(f"the workers did not start ({said})") from error


def _shown(options: Mapping[str, Any]) -> str:
    return ", ".join(options)  # their values may be secrets


def _check_main(what: str, otherwise: str) -> None:
    """Refuse to start processes that would run the calling script again, here and in such a process.

    Raises:
        UsageError: the call is not guarded.
    """
    place = unguarded_call()
    if place is None and not imported_by_a_worker():
        return
    raise UsageError(
        f"{f'{place}: ' if place else ''}{what} are processes that import your script again. Put the script's work "
        f"under 'if __name__ == \"__main__\":'{otherwise}"
    )


def _no_dask_cuda() -> MissingExtra:
    return MissingExtra("dask-cuda", "cuda13]' or 'curator-embed[cuda12", "One worker per GPU")


def _needs(wanted: int | None) -> str:
    return "needs an NVIDIA GPU and its driver" if wanted in (None, 1) else f"needs {wanted} NVIDIA GPUs"
