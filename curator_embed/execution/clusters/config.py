"""What every cluster file may say, and how one is read.

Each kind of cluster is a frozen dataclass in a module of its own; its fields are the keys that its file may have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

KINDS = {
    "local": "local.LocalConfig",
    "ssh": "ssh.SshConfig",
    "slurm": "jobqueue.SlurmConfig",
    "pbs": "jobqueue.PbsConfig",
    "lsf": "jobqueue.LsfConfig",
    "kubernetes": "kubernetes.KubernetesConfig",
    "databricks": "databricks.DatabricksConfig",
    "scheduler": "running.RunningConfig",
}
"""Kind -> where its config lies, imported when a file names it: every kind may need a package of its own."""


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """What all kinds of clusters have in common.

    Attributes:
        nodes: machines, jobs or pods.
        gpus_per_node: GPUs of each; every GPU gets one worker. 0 for workers without a GPU.
        workers_per_node: workers on each machine without GPUs.
        threads_per_worker: shards a worker works on at a time (2 lets one be written while the next is read).
        wait_for_workers: a run begins when so many workers have come; the others join it when they do.
        wait_seconds: how long to wait for those.
        options: handed on, as they are, to the class of Dask's that starts the cluster.
        path: the file all this was read from, for messages.
    """

    kind: ClassVar[str]

    nodes: int = 1
    gpus_per_node: int = 0
    workers_per_node: int = 1
    threads_per_worker: int = 2
    wait_for_workers: int = 1
    wait_seconds: float = 600
    options: Mapping[str, Any] = field(default_factory=dict)
    path: str = "<config>"

    def start(self) -> Any:
        """Start it.

        Returns:
            Something ``distributed.Client`` takes: a cluster object, or a scheduler's address.

        Raises:
            UsageError: the file asks for something that cannot be.
            MissingExtra: a package that this kind needs is not installed.
            CuratorEmbedError: it did not start.
        """
        raise NotImplementedError
