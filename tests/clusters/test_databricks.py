"""What a Databricks driver node has is a scheduler on port 8786 of SPARK_LOCAL_IP: a local one is as real."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from distributed import LocalCluster

from curator_embed import get_client
from curator_embed.datasets import ImageTextPairDataset
from curator_embed.errors import CuratorEmbedError, MissingExtra, UsageError
from curator_embed.execution.clusters import read_cluster
from tests.clusters.kubernetes_api import NETWORK
from tests.shards import write_dataset
from tests.stub import ColourEmbedder

DRIVER = f"{NETWORK}.251.1"  # port 8786 of an address of its own


@pytest.fixture
def databricks_driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The environment of a driver node, and what its init script starts."""
    monkeypatch.setenv("SPARK_LOCAL_IP", DRIVER)
    monkeypatch.delenv("MASTER", raising=False)
    with LocalCluster(
        n_workers=2, threads_per_worker=2, processes=False, host=DRIVER, scheduler_port=8786,
        dashboard_address=f"{DRIVER}:8087", protocol="tcp://",
    ):  # fmt: skip
        yield


def config(folder: Path, text: str = "cluster: databricks\n") -> Path:
    path = folder / "databricks.yaml"
    path.write_text(text)
    return path


@pytest.mark.usefixtures("databricks_driver")
def test_a_dataset_is_embedded_by_the_workers_that_the_init_script_started(
    tmp_path: Path, wheel_photos: list[Path]
) -> None:
    data = write_dataset(tmp_path / "data", wheel_photos, shards=2, samples=4)
    with get_client(config=config(tmp_path, "cluster: databricks\nwait_for_workers: 2\n")) as client:
        assert client.scheduler_info()["address"] == f"tcp://{DRIVER}:8786"
        report = ColourEmbedder()(ImageTextPairDataset.from_webdataset(str(data), id_col="key")).save_metadata()
    assert report.to_dict()["embedded"] == 8


@pytest.mark.usefixtures("databricks_driver")
def test_closing_the_client_leaves_the_databricks_cluster_running(tmp_path: Path) -> None:
    for _ in range(2):
        with get_client(config=config(tmp_path)) as client:
            assert client.submit(sum, (1, 2)).result(timeout=30) == 3


def test_outside_of_databricks_the_error_says_where_it_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPARK_LOCAL_IP", raising=False)
    path = config(tmp_path)
    with pytest.raises(UsageError, match="SPARK_LOCAL_IP") as raised:
        read_cluster(path).start()
    assert str(path) in str(raised.value)


def test_a_single_node_cluster_is_sent_to_the_local_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARK_LOCAL_IP", DRIVER)
    monkeypatch.setenv("MASTER", "local[8]")
    with pytest.raises(UsageError, match="cluster: local"):
        read_cluster(config(tmp_path)).start()


def test_a_driver_without_the_init_script_is_told_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import dask

    nobody = f"{NETWORK}.251.2"
    monkeypatch.setenv("SPARK_LOCAL_IP", nobody)
    monkeypatch.delenv("MASTER", raising=False)
    with (
        dask.config.set({"distributed.comm.timeouts.connect": "1s"}),
        pytest.raises(CuratorEmbedError, match=f"{nobody}:8786.*init script"),
    ):
        read_cluster(config(tmp_path)).start()


def test_without_the_package_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARK_LOCAL_IP", DRIVER)
    monkeypatch.setitem(sys.modules, "dask_databricks", None)
    with pytest.raises(MissingExtra, match=r"curator-embed\[databricks\]"):
        read_cluster(config(tmp_path)).start()


@pytest.mark.parametrize("line", ["nodes: 4", "workers_per_node: 2", "threads_per_worker: 4", "options: {loop: 1}"])
def test_what_the_databricks_cluster_itself_decides_is_refused(tmp_path: Path, line: str) -> None:
    path = config(tmp_path, f"cluster: databricks\n{line}\n")
    with pytest.raises(UsageError, match=f"{line.split(':')[0]}: it has no effect here"):
        read_cluster(path)
