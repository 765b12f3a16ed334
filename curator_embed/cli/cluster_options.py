"""The options that say where a command's work is done: in this process, in several, on a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from curator_embed.errors import UsageError

if TYPE_CHECKING:
    from curator_embed.execution.clusters import ClusterConfig
    from curator_embed.execution.placing import Workforce


@dataclass(frozen=True)
class ClusterOptions:
    """What the options about workers say; see each one's help."""

    workers: Annotated[
        int | None,
        typer.Option(
            "--workers", "--num-workers", min=1, help="Worker processes; by default one worker within this process."
        ),
    ] = None
    gpu: Annotated[bool, typer.Option("--gpu", help="Start one worker per GPU (needs dask-cuda).")] = False
    cluster: Annotated[
        Path | None,
        typer.Option(help="YAML file that names a cluster to start: local, ssh, slurm, pbs, lsf, kubernetes, ..."),
    ] = None
    scheduler: Annotated[
        str | None, typer.Option(help="Address of a running Dask scheduler, for instance tcp://10.0.0.1:8786.")
    ] = None
    scheduler_file: Annotated[
        Path | None, typer.Option(help="The same, from the file that 'dask scheduler --scheduler-file' writes.")
    ] = None

    def check(self) -> None:
        """See what can be seen before anything is started: the cluster's file, its packages, GPUs on this machine.

        Raises:
            UsageError: options contradict each other, or ask for something that is not there.
            MissingExtra: a package that such a cluster needs is not installed.
        """
        running = {"--cluster": self.cluster, "--scheduler": self.scheduler, "--scheduler-file": self.scheduler_file}
        given = [option for option, value in running.items() if value is not None]
        given += ["--workers"] * (self.workers is not None) + ["--gpu"] * self.gpu
        if len(given) > 1 and given != ["--workers", "--gpu"]:
            raise UsageError(
                f"{given[0]} and {given[1]} cannot go together: --cluster describes a whole cluster, --scheduler and "
                "--scheduler-file connect to a running one, --workers and --gpu start one on this machine"
            )

        if self.config is not None:
            self.config.check()
        if self.gpu:
            from curator_embed.execution.clusters.local import check_gpus, of_a_call

            check_gpus(self.workers, of_a_call)

    @cached_property
    def config(self) -> ClusterConfig | None:
        """What the cluster's file says; None where the options name no cluster and no scheduler's file.

        Raises:
            UsageError: the file cannot be read or used.
        """
        from curator_embed.execution.clusters import read_cluster

        if self.cluster is not None:
            return read_cluster(self.cluster)
        if self.scheduler_file is not None:
            from curator_embed.execution.clusters.running import RunningConfig

            return RunningConfig(scheduler_file=str(self.scheduler_file), path=str(self.scheduler_file))
        return None

    @property
    def on_this_machine(self) -> bool:
        """Whether the work is done by processes of this machine, so that its devices and packages are what counts."""
        return self.scheduler is None and (self.config is None or self.config.kind == "local")

    def workforce(self, device: str | None) -> tuple[Workforce, str]:
        """Who would do the work, and that in words; nobody is started or asked.

        Args:
            device: that was asked for; a running cluster, which is not asked, is taken to have it.
        """
        from curator_embed.execution.gpus import driver
        from curator_embed.execution.placing import Workforce

        if self.on_this_machine:
            found = driver() if self.gpu and self.workers is None else None
            count = self.config.workers if self.config is not None else self.workers or (found.devices if found else 1)
            here = Workforce.here(count)
            return here, f"{_workers(count)} on this machine, {_cores(here.cores)} each"
        config = self.config
        if config is None or config.kind in ("scheduler", "databricks"):
            here = Workforce.here()
            if device is not None and device.startswith("cuda"):
                here = replace(here, gpus=lambda: {"the cluster": int(device.partition(":")[2] or 0) + 1})
            return here, f"a machine like this one, {_cores(here.cores)}: the cluster's own workers are not asked"
        cores = config.cores_per_worker()
        gpus = {f"a worker of {config.path}": 1 if config.gpus_per_node else 0}
        count, each = config.workers, cores or Workforce.here().cores
        said = f"{_cores(each)} each{'' if cores else ', as this machine has'}"
        there = Workforce(count, each, config.threads_per_worker * count, lambda: gpus)
        return there, f"{_workers(config.workers)} of {config.path}, {said}"

    @contextmanager
    def client(self) -> Iterator[None]:
        """The Dask client asked for, closed with all it started; none where the default serves."""
        from curator_embed.execution.clients import get_client, start_client

        if self.config is not None:
            client = start_client(self.config)
        elif self.scheduler is not None:
            client = get_client(scheduler_address=self.scheduler)
        elif self.gpu:
            client = get_client("gpu", n_workers=self.workers)
        elif self.workers is not None and self.workers > 1:
            client = get_client("cpu", n_workers=self.workers)
        else:
            yield
            return
        try:
            yield
        finally:
            client.close()


def _workers(count: int) -> str:
    return f"{count:,} worker{'' if count == 1 else 's'}"


def _cores(count: int) -> str:
    return f"{count:,} core{'' if count == 1 else 's'}"
