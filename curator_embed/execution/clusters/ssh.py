"""A cluster of machines that this one reaches with SSH, through Dask's SSHCluster."""

from __future__ import annotations

import importlib.util
import logging
import shlex
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

from dask.utils import parse_bytes

from curator_embed.errors import CuratorEmbedError, MissingExtra
from curator_embed.execution.clusters.config import ClusterConfig


@dataclass(frozen=True, kw_only=True)
class SshConfig(ClusterConfig):
    """Machines by name. ``options`` go to ``distributed.SSHCluster``.

    Attributes:
        hosts: the machines that work; ``nodes`` is their number and need not be given.
        scheduler_host: where the scheduler runs; the first of ``hosts`` by default, which works as well.
        connect_options: how to connect, as ``asyncssh.connect`` takes it (``username``, ``port``, ``client_keys``,
            ``known_hosts``). ~/.ssh/config is read in any case.
        python: the Python of the hosts; the path of the one that runs this by default.
        memory_per_node: memory that the workers of a host share ("64GiB"); all of it by default.
        interface: network interface that scheduler and workers use ("eth1").
        local_directory: where workers keep temporary files, a disk of the host's own.
    """

    kind: ClassVar[str] = "ssh"
    synonyms: ClassVar[Mapping[str, str]] = {"remote_python": "python"}

    nodes: int = 0
    hosts: Sequence[str]
    scheduler_host: str | None = None
    connect_options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    python: str | None = None
    memory_per_node: str | None = None
    interface: str | None = None
    local_directory: str | None = None

    def __post_init__(self) -> None:
        if not self.hosts:
            raise self.wrong("hosts", "is empty; name at least one machine")
        if self.nodes not in (0, len(self.hosts)):
            raise self.wrong("nodes", f"{self.nodes}, but 'hosts' names {len(self.hosts)} machines; leave 'nodes' out")
        object.__setattr__(self, "nodes", len(self.hosts))
        super().__post_init__()
        self.check_wait()
        if self.memory_per_node is not None:
            self.check_size("memory_per_node")

    def check(self) -> None:
        """See ``ClusterConfig.check``."""
        if importlib.util.find_spec("asyncssh") is None:
            raise MissingExtra("asyncssh", "clusters", "A cluster over SSH")
        if self.connect_options:
            import asyncssh

            known = (asyncssh.connect, asyncssh.SSHClientConnectionOptions.prepare)
            self.check_names("connect_options", self.connect_options, "asyncssh.connect", *known)
        if not self.options:
            return
        from distributed import Nanny, Scheduler, SSHCluster, Worker
        from distributed.core import Server
        from distributed.deploy.spec import SpecCluster

        self.check_names("options", self.options, "distributed.SSHCluster", SSHCluster, SpecCluster)
        for key, kinds in (("scheduler_options", (Scheduler, Server)), ("worker_options", (Nanny, Worker, Server))):
            given = self.options.get(key, {})
            if not isinstance(given, Mapping):
                raise self.wrong(f"options.{key}", f"must be a mapping ('name: value' lines, indented), not {given!r}")
            if key == "scheduler_options" or not self.gpus_per_node:  # dask-cuda's workers take options of their own
                self.check_names(f"options.{key}", given, f"distributed.{kinds[0].__name__}", *kinds)

    def start(self) -> Any:
        """Start scheduler and workers on the hosts; see ``ClusterConfig.start``."""
        self.check()
        from distributed import SSHCluster

        with _last_lines() as lines:
            try:
                return SSHCluster(**self.arguments())
            except Exception as error:  # asyncssh's, the system's, or what the remote Python did not say
                said = f" It said: {' | '.join(lines)}" if lines else ""
                raise CuratorEmbedError(
                    f"{self.path}: the cluster did not start on {', '.join(self.hosts)}: "
                    f"{type(error).__name__}: {error}.{said} Try: {self.by_hand()}"
                ) from error

    def arguments(self) -> dict[str, Any]:
        """What SSHCluster is given: its own names, this file's values."""
        scheduler: dict[str, Any] = {"dashboard_address": ":8787"}
        worker: dict[str, Any] = {"nthreads": self.threads_per_worker}
        if self.interface is not None:
            scheduler["interface"] = worker["interface"] = self.interface
        if self.local_directory is not None:
            worker["local_directory"] = self.local_directory
        each = self.gpus_per_node or self.workers_per_node
        # Dask's own default is a share by threads, of which a worker of ours has few.
        worker["memory_limit"] = 1 / each if self.memory_per_node is None else parse_bytes(self.memory_per_node) // each
        if not self.gpus_per_node:
            worker["n_workers"] = self.workers_per_node
        ours: dict[str, Any] = {
            "hosts": [self.scheduler_host or self.hosts[0], *self.hosts],
            "connect_options": dict(self.connect_options),
            "remote_python": self._python(),
            "worker_class": "dask_cuda.CUDAWorker" if self.gpus_per_node else "distributed.Nanny",
        }
        options = dict(self.options)
        ours["scheduler_options"] = {**scheduler, **options.pop("scheduler_options", {})}
        ours["worker_options"] = {**worker, **options.pop("worker_options", {})}
        return {**ours, **options}

    def by_hand(self) -> str:
        """The command by which a person finds out whether a worker could start: the same host, port, user and key."""
        options: list[str] = []
        if "port" in self.connect_options:
            options += ["-p", str(self.connect_options["port"])]
        keys = self.connect_options.get("client_keys") or ()
        for key in [keys] if isinstance(keys, str) else keys:
            options += ["-i", str(key)]
        known = self.connect_options.get("known_hosts", ())
        if known is None:  # asyncssh's way to trust any host
            options += ["-o", "StrictHostKeyChecking=no"]
        elif isinstance(known, str):
            options += ["-o", f"UserKnownHostsFile={known}"]
        user = self.connect_options.get("username")
        host = f"{user}@{self.hosts[0]}" if user else self.hosts[0]
        command = f"{self._python()} -c 'import curator_embed'"
        return shlex.join(["ssh", *options, host, command])

    def _python(self) -> str:
        """The remote Python for a shell, told which GPUs are its own: it runs behind ``env``."""
        devices = ",".join(str(number) for number in range(self.gpus_per_node))
        visible = f"CUDA_VISIBLE_DEVICES={devices} " if devices else ""
        return visible + shlex.quote(self.python or sys.executable)


@contextmanager
def _last_lines() -> Iterator[deque[str]]:
    """What the remote processes wrote last, while they start: SSHCluster only logs it."""
    lines: deque[str] = deque(maxlen=5)

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger, collector = logging.getLogger("distributed.deploy.ssh"), Collector()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(collector)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield lines
    finally:
        logger.removeHandler(collector)
        logger.setLevel(level)
        logger.propagate = propagate
