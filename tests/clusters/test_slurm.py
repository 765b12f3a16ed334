"""A real Slurm on this machine: jobs that embed, a job that is cancelled in the middle, and what stays in the queue."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import pytest
import yaml

from curator_embed import get_client
from curator_embed.errors import CuratorEmbedError
from curator_embed.execution.clusters import lost_jobs
from tests.clusters.gate import wait_until
from tests.clusters.losing import embed_and_kill
from tests.clusters.slurm import Slurm, why_not
from tests.conftest import REPO
from tests.rows import table_rows
from tests.shards import write_dataset

pytestmark = [pytest.mark.slurm, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Two nodes of one core, so that two jobs of one core run at a time."""
    with Slurm(tmp_path_factory.mktemp("slurm"), nodes=2) as started, pytest.MonkeyPatch.context() as patch:
        for name, value in started.environment.items():
            patch.setenv(name, value)
        yield started


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    """Two jobs of one worker each."""
    return {
        "cluster": "slurm",
        "nodes": 2,
        "wait_for_workers": 2,
        "wait_seconds": 60,
        "partition": "main",
        "cores_per_node": 1,
        "memory_per_node": "1GiB",
        "walltime": "00:05:00",
        "interface": "lo",
        "log_directory": str(tmp_path / "logs"),
        "resubmit": False,
        "job_script_prologue": [f"export PYTHONPATH={REPO}", 'echo "on $SLURM_JOB_NODELIST"'],
    }


def test_a_job_is_cancelled_in_the_middle_and_nothing_is_missing(
    slurm: Slurm, config: dict[str, Any], source: Path, tmp_path: Path
) -> None:
    with get_client(config=config) as client:
        jobs = slurm.jobs()
        assert sorted(jobs.values()) == ["RUNNING", "RUNNING"]

        def cancel(began: dict[int, str]) -> None:
            slurm.run("scancel", str(min(jobs)))
            wait_until(lambda: len(client.nthreads()) == 1, "the job's worker to be gone")

        embed_and_kill(source, tmp_path, cancel)
        assert list(slurm.jobs()) == [max(jobs)]
    wait_until(lambda: not slurm.jobs(), "the other job to be cancelled with the client")
    logs = [path.read_text() for path in (tmp_path / "logs").glob("curator-embed-*.out")]
    assert sorted(log.splitlines()[0] for log in logs) == ["on node1", "on node2"]


@pytest.mark.parametrize("workers_per_node", [1, 2])
def test_another_job_is_submitted_for_one_that_is_lost(
    workers_per_node: int, slurm: Slurm, config: dict[str, Any], source: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(lost_jobs, "LOOK_EVERY_S", 2.0)
    workers = 2 * workers_per_node
    keys = {**config, "resubmit": True, "workers_per_node": workers_per_node, "wait_for_workers": workers}
    keys |= {"memory_per_node": "3GiB"}
    with dask.config.set({"distributed.deploy.lost-worker-timeout": "1 s"}), get_client(config=keys) as client:
        jobs = slurm.jobs()

        def cancel(began: dict[int, str]) -> None:
            slurm.run("scancel", str(min(jobs)))
            wait_until(lambda: len(client.nthreads()) == workers_per_node, "the job's workers to be gone")
            wait_until(lambda: len(client.nthreads()) == workers, "those of another job")

        embed_and_kill(source, tmp_path, cancel, workers=workers)
        now = slurm.jobs()
        assert max(jobs) in now and len(now) == 2 and now.keys() != jobs.keys()
        assert f"<config>: a job has ended before the run; submitted job {max(now)}" in caplog.messages
        slurm.run("scancel", str(max(now)))
        wait_until(lambda: len(client.nthreads()) == workers_per_node, "the workers to be gone")
        time.sleep(10)
        assert list(slurm.jobs()) == [max(jobs)], "there is no work for another job"
    wait_until(lambda: not slurm.jobs(), "the jobs to be cancelled with the client")


SCRIPT = (
    "import json, subprocess, sys; from curator_embed import get_client\n"
    "client = get_client(config=json.loads(sys.argv[1]))\n"
    "print(*subprocess.run(['squeue', '--noheader', '--format=%T'], stdout=-1, text=True).stdout.split(), flush=True)\n"
)


@pytest.mark.parametrize("killed", [False, True], ids=["ends", "is killed"])
def test_jobs_do_not_stay_when_their_script(slurm: Slurm, config: dict[str, Any], killed: bool) -> None:
    """One that ends cancels them; without the scheduler of one that was killed they end by themselves."""
    script = subprocess.Popen(
        [sys.executable, "-c", SCRIPT + "sys.stdin.read()", json.dumps(config)],
        env={**os.environ, "PYTHONPATH": str(REPO)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert script.stdout is not None
    assert script.stdout.readline() == "RUNNING RUNNING\n"
    if killed:
        script.kill()
    _, said = script.communicate(timeout=60)
    assert (script.returncode != 0) == killed, said
    assert "dashboard: http://127.0.0.1:" in said
    wait_until(lambda: not slurm.jobs(), "the queue to be empty", 90 if killed else 20)


def test_a_job_that_slurm_refuses_shows_at_once(slurm: Slurm, config: dict[str, Any]) -> None:
    began = time.monotonic()
    with pytest.raises(CuratorEmbedError, match=r"(?s)<config>: a job was not accepted.*invalid partition"):
        get_client(config={**config, "partition": "nowhere"})
    assert time.monotonic() - began < 30
    assert not slurm.jobs()


def test_workers_that_do_not_come_name_the_queue_and_leave_it(
    slurm: Slurm, config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        CuratorEmbedError, match=r"[012] of 3 workers \(wait_for_workers\).*4 seconds.*squeue --me.*logs"
    ):
        get_client(config={**config, "nodes": 3, "wait_for_workers": 3, "wait_seconds": 4})
    assert "waiting for 3 workers; if none comes, look at 'squeue --me'" in capsys.readouterr().err
    wait_until(lambda: not slurm.jobs(), "the queue to be empty", 20)


def test_jobs_that_end_at_once_are_not_waited_for(slurm: Slurm, config: dict[str, Any]) -> None:
    began = time.monotonic()
    with pytest.raises(
        CuratorEmbedError, match=r"all 2 jobs have ended. The end of .*\.err: .*/no/python.*squeue --me"
    ):
        get_client(config={**config, "python": "/no/python", "wait_seconds": 600})
    assert time.monotonic() - began < 60


def test_a_job_with_gpus_is_given_them(slurm: Slurm, config: dict[str, Any], tmp_path: Path) -> None:
    """Slurm hands out two devices that are none; in the place of Python a script writes down what it was given."""
    python, found = tmp_path / "python", tmp_path / "found"
    python.write_text(f'#!/bin/sh\necho "$CUDA_VISIBLE_DEVICES $*" > {found}.part && mv {found}.part {found}\n')
    python.chmod(0o755)
    asked = {**config, "nodes": 1, "gpus_per_node": 2, "python": str(python), "wait_for_workers": 0}
    with get_client(config=asked):
        wait_until(found.exists, "the job to run", 30)
    devices, *command = found.read_text().split()
    assert devices == "0,1"
    assert command[:2] == ["-m", "dask_cuda.cli"]
    options = dict(zip(command[3::2], command[4::2], strict=True))
    assert command[2].startswith("tcp://127.0.0.1:")
    assert (options["--nthreads"], options["--memory-limit"]) == ("2", "512.00MiB"), "two workers share the job"


def test_the_command_takes_the_file(slurm: Slurm, config: dict[str, Any], source: Path, tmp_path: Path) -> None:
    """Relative paths, and traffic that is encrypted and known: other users of a cluster share its network."""
    keys = {**config, "memory_per_node": "3GiB", "options": {"security": True, "shared_temp_directory": str(tmp_path)}}
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(keys))
    command = ["embed", "in", "--model", "test_resnet.r160_in1k", "--compile", "off", "--quiet", "--output", "out"]
    done = subprocess.run(
        [sys.executable, "-m", "curator_embed", *command, "--cluster", "cluster.yaml"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(REPO)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = table_rows(tmp_path / "out")
    assert len(rows) == 84 and sum(row["image_embedding"] is not None for row in rows.values()) == 71
    logs = [path.read_text() for path in (tmp_path / "logs").glob("*.err")]
    assert len(logs) == 2 and all("Registered to: " in log and "tls://127.0.0.1" in log for log in logs)
    wait_until(lambda: not slurm.jobs(), "the queue to be empty")


# -- a whole run in one job ------------------------------------------------------------------


class WholeRun:
    """examples/clusters/run.sbatch with a small model, submitted to both nodes."""

    def __init__(self, slurm: Slurm, folder: Path, photos: list[Path]) -> None:
        self.slurm, self.folder = slurm, folder
        self.source = write_dataset(folder / "in", photos, shards=60, samples=10)
        self.output = folder / "out"

    def submit(self) -> int:
        said = self.slurm.run(
            "sbatch", "--parsable", "--nodes=2", "--cpus-per-task=1", "--mem=3000M", "--time=5",
            f"--chdir={self.folder}", f"--output={self.folder}/log", str(REPO / "examples" / "clusters" / "run.sbatch"),
            "embed", str(self.source), "--model", "test_resnet.r160_in1k", "--compile", "off", "--quiet",
            "--output", str(self.output),
            PYTHON=sys.executable, PYTHONPATH=str(REPO), WORKERS_PER_NODE="1", INTERFACE="lo",
        )  # fmt: skip
        return int(said)

    def in_the_middle(self) -> None:
        wait_until(lambda: len(list(self.output.glob("*.parquet"))) > 5, f"shards to be written: {self.log()}")

    def ended(self, job: int) -> dict[str, str]:
        wait_until(lambda: job not in self.slurm.jobs(), f"the job to end: {self.log()}")
        return dict(re.findall(r"(\w+)=(\S+)", self.slurm.run("scontrol", "show", "job", str(job))))

    def log(self) -> str:
        path = self.folder / "log"
        return path.read_text() if path.exists() else ""

    def assert_complete(self) -> None:
        rows = table_rows(self.output)
        assert len(rows) == 660 and sum(row["image_embedding"] is not None for row in rows.values()) == 600
        assert {row["image_error"] for row in rows.values()} == {None, "no_image"}
        assert not list(self.folder.glob(".curator-embed-*")), "the scheduler's file is tidied away"


@pytest.fixture
def whole_run(slurm: Slurm, tmp_path: Path, wheel_photos: list[Path]) -> WholeRun:
    return WholeRun(slurm, tmp_path, wheel_photos)


def test_a_run_in_one_job_outlives_a_node(slurm: Slurm, whole_run: WholeRun) -> None:
    job = whole_run.submit()
    whole_run.in_the_middle()
    (head,) = re.findall(r"BatchHost=(\w+)", slurm.run("scontrol", "show", "job", str(job)))
    (other,) = {"node1", "node2"} - {head}
    slurm.run("scontrol", "update", f"nodename={other}", "state=down", "reason=test")
    try:
        ended = whole_run.ended(job)
    finally:
        slurm.run("scontrol", "update", f"nodename={other}", "state=resume", check=False)  # or it is back already
        wait_until(lambda: slurm.states() == ["idle", "idle"], "the node to be back")
    assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), whole_run.log()
    whole_run.assert_complete()


def test_a_run_in_one_job_that_is_out_of_time_goes_on_when_it_is_submitted_again(
    slurm: Slurm, whole_run: WholeRun
) -> None:
    job = whole_run.submit()
    whole_run.in_the_middle()
    slurm.run("scancel", "--batch", "--signal=TERM", str(job))  # what --signal=B:TERM@120 does
    ended = whole_run.ended(job)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "3:0"), whole_run.log()
    assert "stopped as asked with" in whole_run.log()
    done = {path.name: path.stat().st_mtime_ns for path in whole_run.output.glob("*.parquet")}
    assert 5 < len(done) < 60
    ended = whole_run.ended(whole_run.submit())
    assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), whole_run.log()
    whole_run.assert_complete()
    assert all((whole_run.output / name).stat().st_mtime_ns == when for name, when in done.items()), "worked on twice"
