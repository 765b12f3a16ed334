"""What jobs ask for, by the scripts that Slurm, PBS and LSF are given; and what SSHCluster is told."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from curator_embed import get_client
from curator_embed.errors import CuratorEmbedError, UsageError
from curator_embed.execution.clusters import read_cluster
from curator_embed.execution.clusters.jobqueue import JobQueueConfig
from tests.conftest import REPO
from tests.rows import table_rows
from tests.shards import write_dataset

NODE = {
    "nodes": 2, "cores_per_node": 32, "memory_per_node": "64GiB", "walltime": "12:00:30", "queue": "long",
    "account": "p1", "interface": "lo", "local_directory": "$TMPDIR", "job_script_prologue": ["module load cuda"],
}  # fmt: skip


def script(kind: str, **keys: Any) -> list[str]:
    config: Any = read_cluster({"cluster": kind, **NODE, **keys})
    return [line for line in config.job_script().splitlines() if line]


def worker(lines: list[str]) -> tuple[str, dict[str, str]]:
    """The module that the last line runs, and its options."""
    words = lines[-1].split()
    found = re.fullmatch(r"tcp://127\.0\.0\.1:\d+", words[3])
    assert found and words[:2] == [sys.executable, "-m"], lines[-1]
    options = [word for word in words[4:] if word != "--nanny"]
    return words[2], dict(zip(options[::2], options[1::2], strict=True))


def test_ctrl_c_stays_what_it_is() -> None:
    before = signal.getsignal(signal.SIGINT)
    assert script("slurm")
    assert "dask_jobqueue" in sys.modules and signal.getsignal(signal.SIGINT) is before


HEADERS = {
    "slurm": ["#SBATCH -p long", "#SBATCH -A p1", "#SBATCH -n 1", "#SBATCH --cpus-per-task=32", "#SBATCH --mem=64G",
              "#SBATCH -t 12:00:30", "#SBATCH -J curator-embed"],
    "pbs": ["#PBS -q long", "#PBS -A p1", "#PBS -l select=1:ncpus=32:mem=65536mb", "#PBS -l walltime=12:00:30",
            "#PBS -N curator-embed"],
    "lsf": ["#BSUB -q long", '#BSUB -P "p1"', "#BSUB -n 32", '#BSUB -R "span[hosts=1]"', "#BSUB -W 12:01",
            "#BSUB -J curator-embed"],
}  # fmt: skip
GPUS = {
    "slurm": "#SBATCH --gpus-per-node=4",
    "pbs": "#PBS -l select=1:ncpus=32:ngpus=4:mem=65536mb",
    "lsf": '#BSUB -gpu "num=4"',
}


@pytest.mark.parametrize("kind", HEADERS)
def test_what_a_node_without_gpus_asks_for(kind: str) -> None:
    lines = script(kind, workers_per_node=4)
    assert set(HEADERS[kind]) <= set(lines), lines
    assert lines[-2] == "module load cuda"
    module, options = worker(lines)
    assert module == "distributed.cli.dask_worker"
    assert options["--nworkers"] == "4" and options["--nthreads"] == "2" and options["--memory-limit"] == "16.00GiB"
    assert options["--local-directory"] == "$TMPDIR" and options["--interface"] == "lo"
    assert int(options["--death-timeout"]) <= 60, "workers of a run that died end by themselves"
    assert "gpu" not in " ".join(lines)


@pytest.mark.parametrize("kind", GPUS)
def test_every_gpu_gets_a_worker(kind: str) -> None:
    lines = script(kind, gpus_per_node=4)
    assert GPUS[kind] in lines
    module, options = worker(lines)
    assert module == "dask_cuda.cli", "which starts a worker for each GPU that the job sees"
    assert options["--nthreads"] == "2" and options["--memory-limit"] == "16.00GiB"
    assert "--nworkers" not in options, "dask-cuda does not know it"


@pytest.mark.parametrize("kind", GPUS)
def test_the_cluster_knows_how_many_workers_a_job_brings(kind: str) -> None:
    config: Any = read_cluster({"cluster": kind, **NODE, "gpus_per_node": 4})
    cluster = config._cluster()
    try:
        (spec,) = cluster.new_worker_spec().values()
    finally:
        cluster.close()
    assert spec["group"] == ["-0", "-1", "-2", "-3"]


@pytest.mark.parametrize(
    ("kind", "own"),
    [("slurm", "--gres=gpu:a100:4"), ("slurm", "--gpus=4"), ("slurm", "-G 4"), ("lsf", '-gpu "num=4:mode=shared"')],
)
def test_a_directive_of_ones_own_for_gpus_replaces_ours(kind: str, own: str) -> None:
    lines = script(kind, gpus_per_node=4, job_extra_directives=[own, "-x y"])
    assert [line for line in lines if line.endswith(own)]
    assert GPUS[kind] not in lines
    assert any(line.endswith("-x y") for line in lines)


def test_options_go_straight_on() -> None:
    torque = script("pbs", options={"resource_spec": "nodes=1:ppn=32", "job_name": "mine"})
    assert "#PBS -l nodes=1:ppn=32" in torque and "#PBS -N mine" in torque
    assert not any("select=" in line for line in torque)
    with pytest.raises(UsageError, match=r"<config>: options\.colour: dask_jobqueue.SLURMCluster has no such option"):
        script("slurm", options={"colour": "red"})


def test_logs_lie_where_they_were_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert f"#SBATCH -o {tmp_path}/logs/curator-embed-%J.out" in script("slurm", log_directory="~/logs")
    assert (tmp_path / "logs").is_dir(), "Slurm starts no job whose log has no folder"


@pytest.mark.parametrize(("kind", "command"), [("slurm", "sbatch"), ("pbs", "qsub"), ("lsf", "bsub")])
def test_a_machine_that_cannot_submit(kind: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CuratorEmbedError, match=rf"<config>: there is no '{command}' on the PATH.*login node"):
        get_client(config={"cluster": kind, **NODE})


@pytest.fixture(params=["pbs", "lsf"])
def batch_system(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Path]:
    """Three scripts that answer as PBS and LSF do: the kind, and the folder where jobs are files while they exist."""
    kind, jobs = str(request.param), tmp_path / "jobs"
    jobs.mkdir()
    # $$ is the shell's own number, and the job's. LSF reads the script from its standard input.
    scripts = {
        "pbs": {
            "qsub": f"cp $1 {jobs}/$$; echo $$.server",
            "qdel": f"rm {jobs}/${{1%%.*}}",
            "qstat": f"for job in $(ls {jobs}); do echo $job.server curator-embed ada 0 Q long; done",
        },
        "lsf": {
            "bsub": f'cat > {jobs}/$$; echo "Job <$$> is submitted to queue <long>."',
            "bkill": f"rm {jobs}/$1",
            "bjobs": f'[ -n "$(ls {jobs})" ] && ls {jobs} || {{ echo No unfinished job found >&2; exit 255; }}',
        },
    }[kind]
    for name, body in scripts.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return kind, jobs


def test_jobs_are_submitted_one_a_node_and_taken_back(batch_system: tuple[str, Path]) -> None:
    kind, jobs = batch_system
    with get_client(config={"cluster": kind, **NODE, "wait_for_workers": 0}):
        submitted = list(jobs.iterdir())
        assert len(submitted) == 2
        assert all(set(HEADERS[kind]) <= set(path.read_text().splitlines()) for path in submitted)
    assert not list(jobs.iterdir())


def test_jobs_are_waited_for_as_long_as_one_is_queued(
    batch_system: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, jobs = batch_system
    monkeypatch.setattr("curator_embed.execution.clients.LOOK_EVERY_S", 0.2)
    config = {"cluster": kind, **NODE, "log_directory": str(tmp_path / "logs"), "wait_seconds": 1.5}
    with pytest.raises(CuratorEmbedError, match=r"0 of 1 workers .* came in 1\.5 seconds"):
        get_client(config=config)

    def end_all(config: Any, cluster: Any) -> str | None:
        """The jobs end when they are looked at for the first time."""
        for job in jobs.iterdir():
            (tmp_path / "logs" / f"curator-embed.e{job.name}").write_text("module: command not found\n")
            job.unlink()
        return look(config, cluster)

    look = JobQueueConfig.why_none_can_come
    monkeypatch.setattr(JobQueueConfig, "why_none_can_come", end_all)
    with pytest.raises(
        CuratorEmbedError, match=r"all 2 jobs have ended. The end of .*\.e\d+: module: command not found"
    ):
        get_client(config={**config, "wait_seconds": 600})


def test_what_sshcluster_is_told() -> None:
    said = {"cluster": "ssh", "hosts": ["a", "b"], "gpus_per_node": 2, "python": "/opt/my venv/bin/python",
            "connect_options": {"username": "ada"}, "memory_per_node": "64GiB", "interface": "ib0",
            "local_directory": "/scratch", "options": {"scheduler_options": {"port": 8786}}}  # fmt: skip
    config: Any = read_cluster(said)
    assert config.arguments() == {
        "hosts": ["a", "a", "b"],
        "connect_options": {"username": "ada"},
        "remote_python": "CUDA_VISIBLE_DEVICES=0,1 '/opt/my venv/bin/python'",
        "worker_class": "dask_cuda.CUDAWorker",
        "scheduler_options": {"dashboard_address": ":8787", "interface": "ib0", "port": 8786},
        "worker_options": {"nthreads": 2, "interface": "ib0", "local_directory": "/scratch", "memory_limit": 32 << 30},
    }
    plain: Any = read_cluster({"cluster": "ssh", "hosts": ["a"], "scheduler_host": "login", "workers_per_node": 4})
    told = plain.arguments()
    assert told["hosts"] == ["login", "a"] and told["worker_class"] == "distributed.Nanny"
    assert told["worker_options"] == {"nthreads": 2, "memory_limit": 0.25, "n_workers": 4}


@pytest.mark.slow
def test_a_whole_run_in_one_pbs_job(tmp_path: Path, wheel_photos: list[Path]) -> None:
    """There is no PBS here: its pbsdsh is a script that starts two processes, which get none of this environment."""
    write_dataset(tmp_path / "in", wheel_photos, shards=6, samples=5)
    pbsdsh = tmp_path / "bin" / "pbsdsh"
    pbsdsh.parent.mkdir()
    pbsdsh.write_text('#!/bin/sh\nshift\ncd /\nenv -i "$@" & env -i "$@" & wait\n')
    pbsdsh.chmod(0o755)
    command = f"embed in --model test_resnet.r160_in1k --compile off --quiet --output {tmp_path}/out"
    job = {
        "PBS_O_WORKDIR": str(tmp_path), "PBS_JOBID": "12.server", "ARGUMENTS": command, "PYTHON": sys.executable,
        "PYTHONPATH": str(REPO), "PATH": f"{pbsdsh.parent}:{os.environ['PATH']}", "INTERFACE": "lo",
        "WORKERS_PER_NODE": "1", "MEMORY_PER_WORKER": "3GiB", "DASK_LOGGING__DISTRIBUTED": "info",
    }  # fmt: skip
    script = REPO / "examples" / "clusters" / "run.pbs"
    done = subprocess.run(
        [str(script)], cwd="/", env={**os.environ, **job}, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Register worker addr") == 2
    rows = table_rows(tmp_path / "out")
    assert len(rows) == 36 and sum(row["image_embedding"] is not None for row in rows.values()) == 30
    assert not list(tmp_path.glob(".curator-embed-*"))
