"""Clusters whose nodes come from a batch system: Slurm, PBS and LSF, through dask-jobqueue.

Every node is one job. The scheduler runs in this process, so the nodes must be able to reach this machine.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from dask.utils import parse_bytes
from distributed.core import Status

from curator_embed.errors import CuratorEmbedError, MissingExtra, UsageError
from curator_embed.execution.clusters.config import ON_THE_NODE, ClusterConfig
from curator_embed.execution.clusters.lost_jobs import LostJobs

_WALLTIME = re.compile(r"(\d+):([0-5]\d):([0-5]\d)")


@dataclass(frozen=True, kw_only=True)
class JobQueueConfig(ClusterConfig):
    """What the three systems have in common. ``options`` go to dask-jobqueue's cluster class.

    Attributes:
        cores_per_node: CPU cores of each job.
        memory_per_node: memory of each job ("64GiB"), shared by its workers.
        walltime: how long a job may run, "HH:MM:SS".
        queue: queue or partition.
        account: what the time is charged to (LSF: project).
        interface: network interface that scheduler and workers use ("ib0").
        python: the Python of the nodes; the one that runs this by default.
        job_script_prologue: shell lines before the worker starts ("module load cuda").
        local_directory: where workers keep temporary files, a disk of the node's own ("$TMPDIR").
        log_directory: where the jobs' output goes, a folder that this machine sees as well.
        job_extra_directives: further directives, as the system's own documentation writes them. One that asks for
            GPUs replaces ours.
        resubmit: submit another job for one that ended (its time was up, its node died) while there is work.
    """

    cores_per_node: int
    memory_per_node: str
    walltime: str
    queue: str | None = None
    account: str | None = None
    interface: str | None = None
    python: str | None = None
    job_script_prologue: Sequence[str] = field(default=(), metadata=ON_THE_NODE)
    local_directory: str | None = field(default=None, metadata=ON_THE_NODE)
    log_directory: str | None = None
    job_extra_directives: Sequence[str] = ()
    resubmit: bool = True

    cluster_class: ClassVar[str]
    submits_with: ClassVar[str]
    lists_with: ClassVar[str]
    lists_numbers: ClassVar[tuple[str, ...]]
    """A command that prints the numbers of jobs that wait or run."""
    asks_for_gpus: ClassVar[re.Pattern[str]]
    """What a directive looks like that asks for GPUs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_wait()
        if self.cores_per_node < 1:
            raise self.wrong("cores_per_node", f"{self.cores_per_node} is too few; at least 1")
        if _WALLTIME.fullmatch(self.walltime) is None:
            raise self.wrong("walltime", f"'{self.walltime}' is not HH:MM:SS, for instance '12:00:00'")
        self.check_size("memory_per_node")

    def check(self) -> None:
        """See ``ClusterConfig.check``: the system's own program, dask-jobqueue, and the names of its options."""
        if shutil.which(self.submits_with) is None:
            raise UsageError(
                f"{self.path}: there is no '{self.submits_with}' on the PATH. Run this where jobs are submitted: on a "
                "login node, or in a job of your own where jobs may submit jobs"
            )
        self._check_options(self._class())

    def start(self) -> Any:
        """Submit the jobs; see ``ClusterConfig.start``."""
        self.check()
        cluster = self._cluster()
        # As many jobs as nodes, waited for here: a refused one shows at once (scale() would only log it).
        for _ in range(self.nodes):
            cluster.worker_spec.update(cluster.new_worker_spec())
        try:
            cluster.sync(_settle, cluster)
        except BaseException as error:
            for job in cluster.workers.values():
                if job.job_id is None:
                    job.status = Status.failed  # else closing, here and at the end of the script, waits for it
            cluster.close()
            if isinstance(error, RuntimeError | ValueError | OSError):
                raise CuratorEmbedError(f"{self.path}: a job was not accepted. {error}") from error
            raise
        if self.resubmit:
            LostJobs(cluster, self._listed, self.path).start()
        return cluster

    def job_script(self) -> str:
        """The script that is submitted for each node, to look at; nothing is submitted."""
        cluster = self._cluster()
        try:
            return str(cluster.job_script())
        finally:
            cluster.close()

    def cores_per_worker(self) -> int:
        """See ``ClusterConfig.cores_per_worker``."""
        return max(1, self.cores_per_node // (self.gpus_per_node or self.workers_per_node))

    def where_to_look(self) -> str:
        """See ``ClusterConfig.where_to_look``."""
        logs = f"the logs in {self._log_directory()}" if self.log_directory else "the jobs' output files"
        return f"'{self.lists_with}', {logs}, and at whether the nodes can reach this machine (interface, firewall)"

    def why_none_can_come(self, cluster: Any) -> str | None:
        """All jobs have ended: a Python that is not there, a module that does not load, a scheduler out of reach."""
        listed = self._listed()
        numbers = {str(job.job_id) for job in list(cluster.workers.values()) if job.job_id}
        if listed is None or not numbers or numbers & listed:
            return None
        return f"all {len(numbers)} jobs have ended" + self._last_words()

    def _listed(self) -> set[str] | None:
        """Numbers in the batch system's list, of jobs that wait or run among others; None when it does not answer."""
        try:
            listed = subprocess.run(self.lists_numbers, capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired):
            return None
        if listed.returncode != 0 and "No unfinished job" not in listed.stderr:  # LSF's way to say none
            return None  # a busy batch system says nothing about the jobs
        return set(re.findall(r"\d+", listed.stdout))

    def _last_words(self) -> str:
        """The end of the newest log that says anything, of errors (job.err, job.e12) rather than of output."""
        folder = self._log_directory()
        logs = [file for file in os.scandir(folder) if file.is_file() and file.stat().st_size] if folder else []
        if not logs:
            return ""
        newest = max(logs, key=lambda file: (".e" in file.name, file.stat().st_mtime))
        with open(newest.path, "rb") as file:
            file.seek(max(0, newest.stat().st_size - 2000))
            lines = file.read().decode(errors="replace").split("\n")
        return f". The end of {newest.path}: {' | '.join(line.strip() for line in lines if line.strip())[-500:]}"

    def arguments(self) -> dict[str, Any]:
        """What dask-jobqueue is given: its own names, this file's values."""
        processes = self.gpus_per_node or self.workers_per_node
        ours: dict[str, Any] = {
            "job_name": "curator-embed",
            # To dask-jobqueue cores are threads of workers; what the job asks for is said by ``_of_system``.
            "cores": processes * self.threads_per_worker,
            "processes": processes,
            "memory": self.memory_per_node,
            "walltime": self.walltime,
            "queue": self.queue,
            "interface": self.interface,
            "python": self.python,
            "job_script_prologue": list(self.job_script_prologue),
            "local_directory": self.local_directory,
            "log_directory": self._log_directory(),
            "job_extra_directives": list(self.job_extra_directives),
        }
        if self.gpus_per_node:
            ours["worker_command"] = "dask_cuda.cli"  # finds the job's GPUs and starts a worker for each
        return {**ours, **self._of_system(), **self.options}

    def _of_system(self) -> Mapping[str, Any]:
        """Arguments that the batch systems call differently."""
        raise NotImplementedError

    def _gpu_directive(self, directive: str) -> list[str]:
        """The directives with ours for GPUs, unless the file has its own."""
        given = list(self.job_extra_directives)
        if not self.gpus_per_node or any(self.asks_for_gpus.search(one) for one in given):
            return given
        return [directive, *given]

    def _log_directory(self) -> str | None:
        return None if self.log_directory is None else os.path.abspath(os.path.expanduser(self.log_directory))

    def _cluster(self) -> Any:
        kind = self._class()
        self._check_options(kind)
        try:
            return kind(**self.arguments())
        except (TypeError, ValueError) as error:  # a value that it cannot use
            raise self.wrong("options", str(error).splitlines()[0]) from error

    def _class(self) -> Any:
        ctrl_c = signal.getsignal(signal.SIGINT)
        try:
            import dask_jobqueue
        except ImportError as error:
            raise MissingExtra("dask-jobqueue", "clusters", f"A {self.kind} cluster") from error
        if threading.current_thread() is threading.main_thread() and ctrl_c is not None:
            signal.signal(signal.SIGINT, ctrl_c)  # the import has made it end the process, with status 0
        return getattr(dask_jobqueue, self.cluster_class)

    def _check_options(self, kind: Any) -> None:
        jobs = [job.__init__ for job in kind.job_cls.__mro__ if "__init__" in vars(job) and job is not object]
        self.check_names("options", self.options, f"dask_jobqueue.{self.cluster_class}", kind, *jobs)


async def _settle(cluster: Any) -> None:
    await cluster


@dataclass(frozen=True, kw_only=True)
class SlurmConfig(JobQueueConfig):
    """Slurm. ``options`` go to ``dask_jobqueue.SLURMCluster``."""

    kind: ClassVar[str] = "slurm"
    synonyms: ClassVar[Mapping[str, str]] = {"partition": "queue"}
    cluster_class: ClassVar[str] = "SLURMCluster"
    submits_with: ClassVar[str] = "sbatch"
    lists_with: ClassVar[str] = "squeue --me"
    lists_numbers: ClassVar[tuple[str, ...]] = ("squeue", "--me", "--noheader", "--format=%A")
    asks_for_gpus: ClassVar[re.Pattern[str]] = re.compile(r"--gres[= ]gpu|--gpus\b|^-G")

    def _of_system(self) -> Mapping[str, Any]:
        return {
            "account": self.account,
            "job_cpu": self.cores_per_node,
            "job_extra_directives": self._gpu_directive(f"--gpus-per-node={self.gpus_per_node}"),
        }


@dataclass(frozen=True, kw_only=True)
class PbsConfig(JobQueueConfig):
    """PBS Pro and OpenPBS. ``options`` go to ``dask_jobqueue.PBSCluster``; for Torque give ``resource_spec`` there."""

    kind: ClassVar[str] = "pbs"
    cluster_class: ClassVar[str] = "PBSCluster"
    submits_with: ClassVar[str] = "qsub"
    lists_with: ClassVar[str] = "qstat -u $USER"
    lists_numbers: ClassVar[tuple[str, ...]] = ("qstat",)

    def _of_system(self) -> Mapping[str, Any]:
        gpus = f":ngpus={self.gpus_per_node}" if self.gpus_per_node else ""
        memory = math.ceil(parse_bytes(self.memory_per_node) / 2**20)
        return {
            "account": self.account,
            "resource_spec": f"select=1:ncpus={self.cores_per_node}{gpus}:mem={memory}mb",
        }


@dataclass(frozen=True, kw_only=True)
class LsfConfig(JobQueueConfig):
    """IBM Spectrum LSF. ``options`` go to ``dask_jobqueue.LSFCluster``."""

    kind: ClassVar[str] = "lsf"
    synonyms: ClassVar[Mapping[str, str]] = {"project": "account"}
    cluster_class: ClassVar[str] = "LSFCluster"
    submits_with: ClassVar[str] = "bsub"
    lists_with: ClassVar[str] = "bjobs"
    lists_numbers: ClassVar[tuple[str, ...]] = ("bjobs", "-noheader", "-o", "jobid")
    asks_for_gpus: ClassVar[re.Pattern[str]] = re.compile(r"^-gpu\b|ngpus")

    def _of_system(self) -> Mapping[str, Any]:
        return {
            "project": self.account,
            "ncpus": self.cores_per_node,
            "walltime": _hours_and_minutes(self.walltime),
            "job_extra_directives": self._gpu_directive(f'-gpu "num={self.gpus_per_node}"'),
        }


def _hours_and_minutes(walltime: str) -> str:
    """LSF's HH:MM, rounded up."""
    found = _WALLTIME.fullmatch(walltime)
    assert found is not None
    hours, minutes, seconds = (int(part) for part in found.groups())
    hours, minutes = divmod(hours * 60 + minutes + (seconds > 0), 60)
    return f"{hours:02d}:{minutes:02d}"
