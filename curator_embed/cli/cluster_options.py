"""The options that say where a command's work is done: in this process, in several, on a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from curator_embed.errors import UsageError

if TYPE_CHECKING:
    from curator_embed.execution.clusters import ClusterConfig


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
