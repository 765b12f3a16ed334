"""A real sshd on this machine: workers started through it, one killed in the middle, and what goes wrong on the way."""

from __future__ import annotations

import asyncio
import getpass
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncssh
import psutil
import pytest

from curator_embed import get_client
from curator_embed.datasets import ImageTextPairDataset
from curator_embed.errors import CuratorEmbedError, UsageError
from tests.clusters.gate import wait_until
from tests.clusters.losing import embed_and_kill
from tests.conftest import REPO
from tests.rows import table_rows
from tests.stub import ColourEmbedder

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
UNSHARE = shutil.which("unshare")
CAN_HIDE = UNSHARE is not None and not subprocess.call([UNSHARE, "--mount", "true"], stderr=subprocess.DEVNULL)

pytestmark = [
    pytest.mark.ssh,
    pytest.mark.skipif(SSHD is None, reason="there is no sshd; Debian's openssh-server has one"),
]

CONFIG = """
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host
AuthorizedKeysFile {folder}/user.pub
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
UsePAM no
StrictModes no
PidFile none
"""


@pytest.fixture(scope="module")
def connect_options(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """An sshd with keys of its own, and how to log in there."""
    folder = tmp_path_factory.mktemp("sshd")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name in ("host", "user"):
        key = asyncssh.generate_private_key("ssh-ed25519")
        key.write_private_key(str(folder / name))
        key.write_public_key(str(folder / f"{name}.pub"))
        (folder / name).chmod(0o600)
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {(folder / 'host.pub').read_text()}")
    (folder / "sshd_config").write_text(CONFIG.format(port=port, folder=folder))
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # where sshd keeps its unprivileged half
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen([str(SSHD), "-D", "-e", "-f", str(folder / "sshd_config")], stderr=log)
    try:
        wait_until(lambda: b"listening" in (folder / "log").read_bytes(), f"sshd ({folder}/log)", 20)
        options = {
            "port": port,
            "username": getpass.getuser(),
            "client_keys": [str(folder / "user")],
            "known_hosts": str(folder / "known_hosts"),
            "config": [],
            "agent_path": None,
        }
        try:
            asyncio.run(_log_in(options))
        except asyncssh.PermissionDenied:  # a locked account, a shell that is none
            pytest.skip(f"sshd lets {getpass.getuser()} not in: {(folder / 'log').read_text().splitlines()[-1]}")
        yield options
    finally:
        server.terminate()
        server.wait(10)


async def _log_in(options: dict[str, Any]) -> None:
    async with asyncssh.connect("127.0.0.1", **options) as connection:
        await connection.run("true", check=True)


@pytest.fixture
def config(tmp_path: Path, connect_options: dict[str, Any]) -> dict[str, Any]:
    """Two hosts that are this one; its Python finds this checkout."""
    python = tmp_path / "a python"  # with a blank: it passes through a shell
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{REPO}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return {
        "cluster": "ssh",
        "hosts": ["127.0.0.1", "127.0.0.1"],
        "wait_for_workers": 2,
        "connect_options": connect_options,
        "python": str(python),
        "memory_per_node": "4GiB",
        "options": {"scheduler_options": {"dashboard_address": "127.0.0.1:0"}},
    }


def test_a_worker_is_killed_in_the_middle_and_nothing_is_missing(
    config: dict[str, Any], source: Path, tmp_path: Path
) -> None:
    processes: list[psutil.Process] = []
    with get_client(config=config) as client:
        workers = client.scheduler_info()["workers"].values()
        assert [(worker["nthreads"], worker["memory_limit"]) for worker in workers] == [(2, 4 << 30)] * 2

        def kill(began: dict[int, str]) -> None:
            processes.extend(psutil.Process(number) for number in began)
            nannies = [process.parent() for process in processes]
            assert None not in nannies
            processes.extend(nannies)
            for process in (nannies[0], processes[0]):  # the nanny first: it would start another worker
                process.send_signal(signal.SIGKILL)
            wait_until(lambda: len(client.nthreads()) == 1, "the worker to be gone")

        embed_and_kill(source, tmp_path, kill)
    wait_until(lambda: not any(process.is_running() for process in processes), "the processes to end", 20)


def test_a_python_that_is_not_there_is_named(config: dict[str, Any]) -> None:
    with pytest.raises(CuratorEmbedError, match=r"did not start on 127.0.0.1.*/no/python.*Try: ssh -p .*127"):
        get_client(config={**config, "python": "/no/python"})


def test_a_key_that_is_not_accepted_is_no_traceback(config: dict[str, Any], tmp_path: Path) -> None:
    asyncssh.generate_private_key("ssh-ed25519").write_private_key(str(tmp_path / "stranger"))
    stranger = {**config["connect_options"], "client_keys": [str(tmp_path / "stranger")]}
    with pytest.raises(CuratorEmbedError, match=r"<config>: the cluster did not start.*Permission denied"):
        get_client(config={**config, "connect_options": stranger})


def test_a_worker_without_this_package_is_named(config: dict[str, Any], tmp_path: Path) -> None:
    python = tmp_path / "bare"  # -S would hide Dask as well: only this package is kept from it
    (tmp_path / "hidden" / "curator_embed").mkdir(parents=True)
    (tmp_path / "hidden" / "curator_embed" / "__init__.py").write_text("raise ImportError('not installed here')\n")
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{tmp_path}/hidden" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    with pytest.raises(CuratorEmbedError, match=r"worker tcp://.* cannot import curator_embed .*'python'"):
        get_client(config={**config, "hosts": ["127.0.0.1"], "wait_for_workers": 1, "python": str(python)})


def test_relative_paths_mean_the_folder_of_the_one_who_asks(
    config: dict[str, Any], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SSH's processes begin in the home folder."""
    monkeypatch.chdir(tmp_path)
    with get_client(config={**config, "hosts": ["127.0.0.1"], "wait_for_workers": 1}):
        report = ColourEmbedder()(ImageTextPairDataset.from_webdataset("in")).save_metadata("out", progress=False)
    assert report.embedded == 71
    assert len(table_rows(tmp_path / "out")) == 84


@pytest.mark.slow
@pytest.mark.skipif(not CAN_HIDE, reason="hiding a folder from one process needs 'unshare' and its rights")
def test_a_machine_without_the_disk_writes_nothing_and_is_named(
    config: dict[str, Any], source: Path, tmp_path: Path
) -> None:
    """The second host has the folders, too, but on a disk of its own."""
    alone = tmp_path / "alone"
    python = shlex.quote(config["python"])
    hidden = f'mount -t tmpfs tmpfs "{source}" && exec "{config["python"]}" "$@"'
    alone.write_text(f"#!/bin/sh\nexec unshare --mount sh -c '{hidden}' sh \"$@\"\n")
    alone.chmod(0o755)
    blind = {**config["options"], "remote_python": [python, python, str(alone)]}
    with get_client(config={**config, "options": blind}):
        dataset = ColourEmbedder()(ImageTextPairDataset.from_webdataset(str(source)))
        report = dataset.save_metadata(str(tmp_path / "out"), progress=False)
    assert report.embedded == 71 and report.workers == 2
    assert any("00000.tar is there on the machine that started the run, and not on" in note for note in report.notes)
    only = {**blind, "remote_python": [python, str(alone)]}
    with (
        get_client(config={**config, "hosts": ["127.0.0.1"], "wait_for_workers": 1, "options": only}),
        pytest.raises(UsageError, match=r"00000.tar is there on .*on a disk that all machines share"),
    ):
        dataset.save_metadata(str(tmp_path / "again"), progress=False)
    assert not list((tmp_path / "again").glob("*.parquet"))
