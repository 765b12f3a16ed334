"""A Slurm in a folder: munged, slurmctld and a slurmd for each node as plain processes, without systemd.

What is needed is Debian's ``slurm-wlm`` and ``munge``, and root, because slurmd starts jobs as their owners.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scancel", "squeue", "sinfo")

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1
ReturnToService=2
MpiDefault=none
KillWait=2
GresTypes=gpu
SlurmdParameters=config_overrides
PartitionName=main Nodes=ALL Default=YES MaxTime=01:00:00 State=UP
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=1 RealMemory=4000 Gres=gpu:2\n"


def why_not() -> str | None:
    """What is missing for a Slurm of our own."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if missing:
        return f"Slurm is not installed ({', '.join(missing)}); 'make test-slurm' installs it"
    return None if os.geteuid() == 0 else "Slurm's daemons need root; 'sudo make test-slurm'"


class Slurm:
    """Starts it, stops it. Its nodes are this machine, with one core and two GPUs each, as far as Slurm knows.

    Attributes:
        environment: what its commands need.
    """

    def __init__(self, folder: Path, nodes: int) -> None:
        self.folder = folder
        self.nodes = [f"node{number}" for number in range(1, nodes + 1)]
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Slurm:
        for name in ("munge", "state"):
            (self.folder / name).mkdir(mode=0o755)
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        host = socket.gethostname().partition(".")[0]
        nodes = "".join(NODE.format(name=name, host=host, port=_port()) for name in self.nodes)
        text = CONFIG.format(folder=self.folder, host=host, controller=_port())
        (self.folder / "slurm.conf").write_text(text.replace("PartitionName", f"{nodes}PartitionName"))
        # GPUs that are none: Slurm hands out these devices by number and never opens them.
        (self.folder / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")
        munge = {name: self.folder / "munge" / name for name in ("socket", "pid-file", "log-file", "seed-file")}
        places = [f"--{name}={path}" for name, path in munge.items()]
        self._start("munged", "--foreground", "--force", f"--key-file={key}", *places)
        _until(munge["socket"].exists, "munged's socket", munge["log-file"])
        self._start("slurmctld", "-D", "-i")
        for name in self.nodes:
            self._start("slurmd", "-D", "-N", name)
        _until(lambda: self.states() == ["idle"] * len(self.nodes), "idle nodes", self.folder / "slurmctld.log")
        return self

    def __exit__(self, *exc: object) -> None:
        self.run("scancel", "--state=PENDING", "--state=RUNNING", "--user=root", check=False)
        with suppress(AssertionError):  # of daemons that answer no more; the others end their jobs first
            _until(lambda: not self.jobs(), "end of the jobs", self.folder / "slurmctld.log")
        for process in reversed(self._processes):
            process.terminate()
        for process in reversed(self._processes):
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def run(self, *command: str, check: bool = True, **environment: str) -> str:
        """A Slurm command's output."""
        done = subprocess.run(
            command, env={**os.environ, **self.environment, **environment}, capture_output=True, text=True, timeout=60
        )
        assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout + done.stderr

    def states(self) -> list[str]:
        """Of the nodes, as sinfo has them; nothing before the controller answers."""
        return self.run("sinfo", "--Node", "--noheader", "--format=%t", check=False).split()

    def jobs(self) -> Mapping[int, str]:
        """State of every job that is not over, by number."""
        found = re.findall(r"^(\d+) (\S+)$", self.run("squeue", "--noheader", "--format=%A %T"), re.M)
        return {int(number): state for number, state in found}

    def _start(self, *command: str) -> None:
        with (self.folder / f"{command[0]}.out").open("ab") as output:
            self._processes.append(
                subprocess.Popen(
                    command, env={**os.environ, **self.environment}, stdout=output, stderr=subprocess.STDOUT
                )
            )


def _port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _until(there: Callable[[], bool], what: str, log: Path, seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < until, f"no {what}:\n{log.read_text() if log.exists() else log}"
        time.sleep(0.2)
