"""The guard at the socket: which addresses are public, and that no spelling, name or redirect gets past it."""

from __future__ import annotations

import asyncio
import errno
import socket
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

import fsspec
import pytest
from aiohttp import ClientConnectorError, ClientError, ClientSession
from aiohttp.abc import AbstractResolver
from hypothesis import example, given
from hypothesis import strategies as st

from curator_embed.errors import Reason, UsageError
from curator_embed.storage.gate import Place, Unread
from curator_embed.storage.guard import (
    NotPublic,
    is_not_public,
    is_public,
    public_client,
    public_connector,
    public_session,
    public_socket_factory,
)
from curator_embed.storage.objects import ReadPolicy, read_many
from tests.web import Web

LOOPBACK = ("127.0.0.0/8",)

NOT_PUBLIC = (
    "127.0.0.1", "127.255.255.254", "0.0.0.0", "0.1.2.3", "10.0.0.1", "100.64.0.1", "100.127.255.255",
    "169.254.0.1",
    "169.254.169.254",  # where clouds tell machines their credentials; 100.100.100.200 and 192.0.0.192 are others
    "100.100.100.200", "192.0.0.192", "172.16.0.1", "172.31.255.255", "192.0.0.8", "192.0.2.1", "192.88.99.1",
    "192.168.1.1", "198.18.0.1", "198.19.255.255", "198.51.100.7", "203.0.113.9", "224.0.0.1", "239.255.255.255",
    "240.0.0.1", "255.255.255.255",
    "::", "::1", "::7f00:1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "::ffff:0:127.0.0.1", "64:ff9b::7f00:1",
    "64:ff9b::808:808", "64:ff9b:1::1", "100::1", "2001::1", "2001:0:7f00:1::", "2001:10::1", "2001:20::1",
    "2001:db8::1", "2002:7f00:1::", "2002:808:808::1", "3fff::1", "5f00::1", "fc00::1", "fd00:ec2::254",
    "fe80::1", "fe80::1%lo", "fec0::1", "ff02::1", "4000::1", "1::",
    "", "localhost", "127.1", "0x7f000001", "2130706433", "127.0.0.1 ", "8.8.8.8/32",
)  # fmt: skip
PUBLIC = (
    "1.1.1.1", "8.8.8.8", "9.255.255.255", "11.0.0.1", "100.63.255.255", "100.128.0.1", "126.255.255.255", "128.0.0.1",
    "172.15.255.255", "172.32.0.1", "192.0.1.1", "192.167.255.255", "198.17.255.255", "198.20.0.1", "223.255.255.255",
    "2001:4860:4860::8888", "2606:4700::1111", "2a00:1450::1", "2001:200::1", "2003::1",
)  # fmt: skip


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_special_addresses_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", PUBLIC)
def test_ordinary_addresses_are_public(address: str) -> None:
    assert is_public(address)


@given(st.ip_addresses(v=4))
@example(IPv4Address("224.0.0.1"))
def test_what_is_public_is_so_to_python_too(address: IPv4Address) -> None:
    """Python's word is not enough, and what it calls private is never public here."""
    if is_public(address):
        assert address.is_global and not address.is_multicast and not address.is_reserved
    mapped = IPv6Address(f"::ffff:{address}")
    six_to_four = IPv6Address((0x2002 << 112) | (int(address) << 80))
    behind_nat = IPv6Address(int(IPv6Address("64:ff9b::")) | int(address))
    assert not any(map(is_public, (mapped, six_to_four, behind_nat)))


@given(st.one_of(st.ip_addresses(v=6), st.ip_addresses(network="2000::/3")))
def test_what_is_public_of_ipv6(address: IPv6Address) -> None:
    if is_public(address):
        assert address.is_global and not address.is_multicast and address.ipv4_mapped is None
        assert address.sixtofour is None and address.teredo is None and int(address) >> 125 == 1


@given(st.one_of(st.ip_addresses(), st.text(max_size=20)))
def test_a_text_says_what_the_address_does(value: Any) -> None:
    try:
        expected = is_public(ip_address(str(value)))
    except ValueError:
        expected = False
    assert is_public(str(value)) == expected


@given(st.ip_addresses())
def test_the_socket_factory_asks_for_nothing_else(address: IPv4Address | IPv6Address) -> None:
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    info = (family, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (str(address), 80))
    if is_public(address):
        public_socket_factory()(info).close()
    else:
        with pytest.raises(NotPublic):
            public_socket_factory()(info)
        public_socket_factory([str(address)])(info).close()


def test_only_the_internets_own_families() -> None:
    with pytest.raises(NotPublic):
        public_socket_factory(["0.0.0.0/0"])((socket.AF_UNIX, socket.SOCK_STREAM, 0, "", ("/run/docker.sock",)))
    with pytest.raises(UsageError, match=r"'10\.0\.0\.1/8' is no network"):
        public_socket_factory(["10.0.0.1/8"])


SPELLINGS = (
    "http://127.0.0.1:{port}/x", "http://localhost:{port}/x", "http://[::ffff:127.0.0.1]:{port}/x",
    "http://[::ffff:7f00:1]:{port}/x", "http://0.0.0.0:{port}/x", "http://0:{port}/x", "http://[::]:{port}/x",
    "http://127.1:{port}/x", "http://0x7f000001:{port}/x", "http://2130706433:{port}/x", "http://017700000001:{port}/x",
    "http://[::1]:{port}/x", "http://localhost.:{port}/x", "http://me:pw@127.0.0.1:{port}/x",
    "http://①②⑦.0.0.1:{port}/x", "http://127。0。0。1:{port}/x",
)  # fmt: skip


async def get(url: str, allow: tuple[str, ...] = (), **options: Any) -> bytes:
    async with await public_session(allow, **options) as session, session.get(url) as answer:
        return await answer.read()


@pytest.mark.parametrize("url", SPELLINGS)
def test_no_spelling_of_this_machine_gets_through(url: str) -> None:
    with Web({"/x": b"x"}) as web:
        with pytest.raises((OSError, ValueError)):  # aiohttp's errors of connections and of URLs are those
            asyncio.run(get(url.format(port=web.port)))
        assert web.asked == []


def test_an_error_of_the_guard_is_told_from_others() -> None:
    with Web({"/x": b"x"}) as web:
        with pytest.raises(ClientConnectorError) as refused:
            asyncio.run(get(f"{web.url}/x"))
        assert is_not_public(refused.value)
    with pytest.raises(ClientConnectorError) as away:
        asyncio.run(get(f"{web.url}/x", LOOPBACK))
    assert not is_not_public(away.value) and away.value.errno == errno.ECONNREFUSED


def test_redirects_meet_the_guard_again() -> None:
    with Web({"/x": b"x", "/y": b"y"}) as web:
        other = f"http://localhost:{web.port}"
        web.moved |= {
            "/a": "/b",
            "/b": f"http://[::ffff:127.0.0.1]:{web.port}/x",
            "/c": f"{other}/y",
            "/d": "file:///etc/passwd",
        }
        with pytest.raises(OSError):
            asyncio.run(get(f"{web.url}/a", LOOPBACK))
        assert [path for path, _ in web.asked] == ["/a", "/b"]
        assert asyncio.run(get(f"{web.url}/c", LOOPBACK)) == b"y"
        with pytest.raises(ClientError):
            asyncio.run(get(f"{web.url}/d", LOOPBACK))


def test_a_name_that_leads_here_on_the_second_look_meets_the_guard() -> None:
    """What a name resolves to is looked at where the socket is made: a resolver may say what it likes."""

    class Liar(AbstractResolver):
        async def resolve(self, host: str, port: int = 0, family: Any = socket.AF_INET) -> Any:
            return [
                {"hostname": host, "host": "127.0.0.1", "port": port, "family": socket.AF_INET, "proto": 0, "flags": 0}
            ]

        async def close(self) -> None:
            pass

    async def ask(url: str) -> bytes:
        async with ClientSession(connector=public_connector(resolver=Liar())) as session, session.get(url) as answer:
            return await answer.read()

    with Web({"/x": b"x"}) as web:
        with pytest.raises(OSError):
            asyncio.run(ask(f"http://public.example:{web.port}/x"))
        assert web.asked == []


def test_there_is_no_way_round_by_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    with Web({"/x": b"x"}) as web, Web({"http://secret.internal/x": b"secret"}) as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
        assert asyncio.run(get(f"{web.url}/x", LOOPBACK)) == b"x"
        assert proxy.asked == []
        for option in ({"proxy": proxy.url}, {"trust_env": True}, {"connector": object()}):
            with pytest.raises(UsageError, match="would go round the guard"):
                asyncio.run(get(f"{web.url}/x", LOOPBACK, **option))
        assert proxy.asked == []


def test_fsspec_reads_through_the_guard() -> None:
    with Web({"/x": b"x"}) as web:
        guarded = fsspec.filesystem("http", get_client=public_client())
        with pytest.raises(OSError):
            guarded.cat_file(f"{web.url}/x")
        assert web.asked == []
        allowed = fsspec.filesystem("http", get_client=public_client(LOOPBACK))
        assert allowed.cat_file(f"{web.url}/x") == b"x"
        assert fsspec.filesystem("http", get_client=public_client(LOOPBACK)) is allowed


def test_rows_that_the_guard_stops_are_refused_at_once() -> None:
    policy = ReadPolicy(urls="public", retries=5, backoff=30.0)
    with Web({"/x": b"x"}) as web:
        places = [Place(f"{web.url}/x", remote=True), Place(f"http://[::ffff:127.0.0.1]:{web.port}/x", remote=True)]
        answers = list(read_many(places, policy=policy))
        assert [a.reason for a in answers if isinstance(a, Unread)] == [Reason.REFUSED] * 2
        assert web.asked == []
        assert "allow=" in answers[0].remedy  # type: ignore[union-attr]
        allowed = ReadPolicy(urls="public", allow=LOOPBACK)
        assert list(read_many(places[:1], policy=allowed)) == [b"x"]
    for wrong, message in (
        ({"allow": ("x",)}, "no network"),
        ({"urls": "all"}, "urls one of"),
        ({"links": ""}, "links is"),
    ):
        with pytest.raises(UsageError, match=message):
            ReadPolicy(**wrong)  # type: ignore[arg-type]
