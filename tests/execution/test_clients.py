"""What ``get_client`` starts, says and ends: clusters from a file, running schedulers, dashboards, data frames."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dask
import psutil
import pytest
from distributed import Client, LocalCluster, get_worker

from curator_embed import get_client
from curator_embed.errors import CuratorEmbedError, UsageError
from curator_embed.execution import clients
from curator_embed.execution.clusters.local import cuda_cluster
from tests.conftest import REPO


@pytest.fixture(scope="module")
def somebodys() -> Iterator[LocalCluster]:
    """A cluster that is not ours, with two workers."""
    with LocalCluster(
        n_workers=2, threads_per_worker=1, processes=False, protocol="tcp", dashboard_address="127.0.0.1:0"
    ) as cluster:
        yield cluster


def test_a_local_cluster_from_a_file_ends_with_its_client(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("cluster: local\nworkers_per_node: 2\nwait_for_workers: 2\nthreads_per_worker: 3\n")
    with get_client(config=path) as client:
        assert list(client.nthreads().values()) == [3, 3]
        workers = [psutil.Process(number) for number in client.run(os.getpid).values()]
        assert psutil.Process() not in workers
        said = capsys.readouterr().err
        assert f"dashboard: {client.dashboard_link}\n" == said
        with urllib.request.urlopen(client.dashboard_link) as page:
            assert b"Dask" in page.read()
        cluster = client.cluster
    assert cluster.status.name == "closed"
    psutil.wait_procs(workers, timeout=10)
    assert not any(worker.is_running() for worker in workers)


def test_the_default_client_is_quiet_and_ends_what_it_started(capsys: pytest.CaptureFixture[str]) -> None:
    with get_client() as client:
        assert client.run(os.getpid) == {address: os.getpid() for address in client.nthreads()}
        cluster = client.cluster
    assert cluster.status.name == "closed"
    assert capsys.readouterr().err == ""


def test_processes_end_with_the_script() -> None:
    """No ``close`` and no ``with``."""
    script = (
        "import json, os\nfrom curator_embed import get_client\n"
        "if __name__ == '__main__':\n"
        "    client = get_client('cpu', n_workers=2)\n"
        "    print(json.dumps(list(client.run(os.getpid).values())))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    numbers = json.loads(done.stdout)
    assert len(numbers) == 2 and not any(psutil.pid_exists(number) for number in numbers)
    assert "dashboard: http://127.0.0.1:" in done.stderr and "Traceback" not in done.stderr


def fill(limit: int) -> tuple[float, set[str]]:
    """Take 87 % of a worker's limit for a second: how much of it was taken, and the worker's states meanwhile."""
    process = psutil.Process()
    held = bytearray(int(0.87 * limit) - process.memory_info().rss)
    held[::4096] = b"x" * len(held[::4096])
    states = set()
    for _ in range(10):
        time.sleep(0.1)  # Dask looks every 0.1 s
        states.add(get_worker().status.name)
    return process.memory_info().rss / limit, states


def test_a_worker_that_needs_most_of_its_memory_is_not_stopped() -> None:
    """Dask would pause it at 80 %, and nothing that it holds could ever be spilled."""
    with get_client("cpu", n_workers=2, memory_limit="1GiB") as client:
        client.cluster.scale(3)
        client.wait_for_workers(3, timeout=30)
        for address in client.nthreads():
            taken, states = client.submit(fill, 2**30, workers=[address], pure=False).result(timeout=30)
            assert 0.82 < taken < 0.92 and states == {"running"}


def test_without_bokeh_the_link_says_what_it_needs(
    somebodys: LocalCluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bokeh" else found(name, *rest)
    )
    with get_client(scheduler_address=somebodys.scheduler_address):
        assert "/status (install 'curator-embed[clusters]' to see it)\n" in capsys.readouterr().err


def test_a_running_scheduler_is_not_ours_to_end(
    somebodys: LocalCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "scheduler.json"
    file.write_text(json.dumps({"address": somebodys.scheduler_address}))
    for given in (
        {"scheduler_address": somebodys.scheduler_address},
        {"scheduler_file": str(file)},
        {"config": {"scheduler": somebodys.scheduler_address, "wait_for_workers": 2}},
        {"config": {"scheduler_file": str(file)}},
    ):
        with get_client(**given) as client:  # type: ignore[arg-type]
            assert len(client.nthreads()) == 2
            assert "dashboard: http://" in capsys.readouterr().err
        assert somebodys.status.name == "running"


def test_a_scheduler_that_is_not_there_or_has_no_workers(tmp_path: Path) -> None:
    with (
        dask.config.set({"distributed.comm.timeouts.connect": "1s"}),
        pytest.raises(CuratorEmbedError, match=r"no Dask scheduler answers at tcp://127\.0\.0\.1:1 "),
    ):
        get_client(config={"scheduler": "tcp://127.0.0.1:1"})
    with (
        LocalCluster(n_workers=0, processes=False, protocol="tcp", dashboard_address=None) as empty,
        pytest.raises(CuratorEmbedError, match=r"0 of 1 workers .* came in 0\.5 seconds .*dask worker tcp://"),
    ):
        get_client(config={"scheduler": empty.scheduler_address, "wait_seconds": 0.5})
    file = tmp_path / "scheduler.json"
    file.write_text("[]")
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(CuratorEmbedError, match=r"scheduler\.json: not a file of a Dask scheduler"),
    ):
        patch.setattr("curator_embed.execution.clusters.running.HALF_WRITTEN_S", 0.2)
        get_client(scheduler_file=str(file))


@pytest.mark.parametrize(
    ("given", "named"),
    [({"cluster_type": "gpu"}, "cluster_type"), ({"n_workers": 2}, "n_workers"),
     ({"scheduler_address": "tcp://a:1", "threads_per_worker": 1}, "scheduler_address, threads_per_worker"),
     ({"scheduler_file": "f"}, "scheduler_file"), ({"rmm_pool_size": "1GB"}, "rmm_pool_size")],
)  # fmt: skip
def test_a_file_describes_the_whole_cluster(given: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=rf"config= describes the whole cluster; write {named} into that file"):
        get_client(config={"cluster": "local"}, **given)


@pytest.mark.parametrize(("gpu", "installed", "backend"), [(True, True, "cudf"), (True, False, "pandas"),
                                                           (False, True, "pandas")])  # fmt: skip
def test_frames_are_cudfs_with_a_gpu_and_cudf_and_only_so_long(
    somebodys: LocalCluster, gpu: bool, installed: bool, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The setting that ``metadata`` reads; the frames themselves are tested where there is a GPU."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    if installed:
        for name in ("cudf", "dask_cudf"):
            (tmp_path / f"{name}.py").touch()
        monkeypatch.syspath_prepend(str(tmp_path))
    elif "cudf" in sys.modules:
        pytest.skip("cuDF is installed here")

    def found() -> str:
        return str(dask.config.get("dataframe.backend", "pandas"))

    before = found()
    with clients._owner(somebodys.scheduler_address, gpu=True):
        assert found() == backend
    assert found() == before
    with clients._owner(somebodys.scheduler_address):
        assert found() == before


def test_a_client_is_the_default_one_until_it_is_closed() -> None:
    with get_client() as client:
        assert Client.current() is client
        with clients.some_client() as found:
            assert found is client
    with clients.some_client() as fresh:
        assert fresh is not client
        cluster = fresh.cluster
    assert cluster.status.name == "closed"


class _LocalCUDACluster:
    """Stands where dask-cuda's class is: keeps what it is given."""

    def __init__(self, **options: Any) -> None:
        self.options = options


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setitem(sys.modules, "dask_cuda", SimpleNamespace(LocalCUDACluster=_LocalCUDACluster))


def test_options_of_dask_cuda_pass_through(two_gpus: None) -> None:
    given = {"rmm_pool_size": "1GB", "protocol": "tcp", "enable_cudf_spill": True, "CUDA_VISIBLE_DEVICES": "1"}
    cluster = cuda_cluster(1, 3, given)
    assert cluster.options == {
        **given, "n_workers": 1, "threads_per_worker": 3, "dashboard_address": "localhost:0"
    }  # fmt: skip
    assert cuda_cluster(None, 2, {"dashboard_address": ":8787"}).options["dashboard_address"] == ":8787"


@pytest.mark.parametrize(("options", "there"), [({}, 2), ({"CUDA_VISIBLE_DEVICES": "0"}, 1),
                                                ({"CUDA_VISIBLE_DEVICES": [0, 1]}, 2)])  # fmt: skip
def test_every_worker_needs_a_gpu_of_its_own(two_gpus: None, options: dict[str, Any], there: int) -> None:
    with pytest.raises(UsageError, match=rf"n_workers=3: .* there are {there} of them"):
        cuda_cluster(3, 2, options)


def test_a_script_without_a_guard_is_told_of_it_on_gpus_too(two_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that imports the script meets the call again."""
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    with pytest.raises(UsageError, match="if __name__ == "):
        cuda_cluster(None, 2, {})


UNGUARDED = """
from curator_embed import get_client

def work():
    with get_client(n_workers=2) as client:
        print(len(client.nthreads()))

{call}
"""


@pytest.mark.parametrize(
    ("call", "line"),
    [
        ("work()", 8),
        ("if True:\n    work()", 9),
        ("if __name__ == '__main__':\n    print()\nwork()", 10),
        ("if __name__ == '__main__':\n    work()", None),
    ],
)
def test_a_script_without_a_guard_starts_no_process_and_is_told_its_line(
    tmp_path: Path, call: str, line: int | None
) -> None:
    script = tmp_path / "script.py"
    script.write_text(UNGUARDED.format(call=call))
    done = subprocess.run(
        [sys.executable, script], env={**os.environ, "PYTHONPATH": str(REPO)}, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    if line is None:
        assert (done.returncode, done.stdout.strip()) == (0, "2"), done.stderr
    else:
        assert done.stdout.strip() == "" and done.stderr.count("Traceback") == 1
        last = done.stderr.splitlines()[-1]
        assert f"script.py, line {line}: several workers" in last and "under 'if __name__ == \"__main__\":'" in last


def test_options_that_dask_does_not_know_are_named_before_it_is_asked() -> None:
    with pytest.raises(
        UsageError, match=r"^memory_limti: distributed.LocalCluster has no such option .*'memory_limit'"
    ):
        get_client(n_workers=2, memory_limti="1GB")
    with pytest.raises(UsageError, match=r"cannot start a cluster with memory_limit \(ValueError: .*plenty"):
        get_client(n_workers=2, memory_limit="plenty")
    with get_client(death_timeout="9s", scheduler_kwargs={"dashboard_address": None, "transition_counter_max": 9999}):
        pass  # of the worker's, and of the scheduler's own


def test_a_gpu_that_is_not_there_is_told_in_the_words_of_who_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match=r"^cluster_type='gpu': needs an NVIDIA GPU"):
        get_client("gpu")
    with pytest.raises(UsageError, match=r"^<config>: gpus_per_node: 2: needs 2 NVIDIA GPUs") as told:
        get_client(config={"cluster": "local", "gpus_per_node": 2})
    assert "cluster_type" not in str(told.value)
