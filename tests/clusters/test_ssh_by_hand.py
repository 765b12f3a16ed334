"""The command that an SSH cluster which did not start tells to try: the same login, and the same Python."""

from __future__ import annotations

import asyncio
import getpass
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncssh
import pytest

from curator_embed.execution.clusters import read_cluster
from tests.conftest import REPO

pytestmark = pytest.mark.ssh


def by_hand(**keys: Any) -> str:
    config: Any = read_cluster({"cluster": "ssh", "hosts": ["node1"], "python": "/p/python", **keys})
    return str(config.by_hand())


@pytest.mark.parametrize(
    ("keys", "command"),
    [
        ({}, "ssh node1 '/p/python -c '\"'\"'import curator_embed'\"'\"''"),
        ({"connect_options": {"port": 2222, "username": "ada"}}, "ssh -p 2222 ada@node1 "),
        ({"connect_options": {"client_keys": "~/.ssh/a"}}, "ssh -i '~/.ssh/a' node1 "),
        ({"connect_options": {"client_keys": ["a", "b c"]}}, "ssh -i a -i 'b c' node1 "),
        ({"connect_options": {"known_hosts": "/k"}}, "ssh -o UserKnownHostsFile=/k node1 "),
        ({"connect_options": {"known_hosts": None}}, "ssh -o StrictHostKeyChecking=no node1 "),
        ({"gpus_per_node": 2}, "ssh node1 'CUDA_VISIBLE_DEVICES=0,1 /p/python -c "),
    ],
)
def test_it_names_what_the_file_names(keys: dict[str, Any], command: str) -> None:
    assert by_hand(**keys).startswith(command)


@pytest.fixture
def login(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """A server with a key and a port of its own, which does what it is told in a shell; how to log in there."""
    keys = {name: asyncssh.generate_private_key("ssh-ed25519") for name in ("host", "user")}
    for name, key in keys.items():
        key.write_private_key(str(tmp_path / name))
        (tmp_path / name).chmod(0o600)
    keys["user"].write_public_key(str(tmp_path / "user.pub"))

    async def work(process: asyncssh.SSHServerProcess[str]) -> None:
        done = await asyncio.create_subprocess_shell(
            process.command or "true", stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        _, said = await done.communicate()
        process.stderr.write(said.decode())
        process.exit(done.returncode or 0)

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def listen() -> asyncssh.SSHAcceptor:
        return await asyncssh.listen(
            "127.0.0.1", 0, server_host_keys=[keys["host"]], authorized_client_keys=str(tmp_path / "user.pub"),
            process_factory=work,
        )  # fmt: skip

    server = asyncio.run_coroutine_threadsafe(listen(), loop).result(30)
    port = server.get_port()
    (tmp_path / "known_hosts").write_text(f"[127.0.0.1]:{port} {keys['host'].export_public_key().decode()}")
    yield {
        "port": port,
        "username": getpass.getuser(),
        "client_keys": [str(tmp_path / "user")],
        "known_hosts": str(tmp_path / "known_hosts"),
    }
    loop.call_soon_threadsafe(server.close)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


@pytest.mark.skipif(shutil.which("ssh") is None, reason="there is no ssh; Debian's openssh-client has one")
def test_it_tells_whether_a_worker_could_start(login: dict[str, Any], tmp_path: Path) -> None:
    python = tmp_path / "a python"  # with a blank: it passes through two shells
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{REPO}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    keys = {"hosts": ["127.0.0.1"], "connect_options": login}
    for path, status, said in ((python, 0, ""), (tmp_path / "none", 127, "not found")):
        command = by_hand(**keys, python=str(path))
        done = subprocess.run(command, shell=True, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
        assert done.returncode == status and said in done.stderr, done.stderr
