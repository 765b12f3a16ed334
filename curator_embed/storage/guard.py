"""Web clients that keep to themselves: connections to public addresses only, credentials to one origin only.

The guard sits where a socket is made, behind names, literals, redirects and every spelling of an address: whatever led
there, no connection is opened to an address that is not public. A proxy would go round it, so there is none.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Awaitable, Callable, Iterable
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import TYPE_CHECKING, Any

from curator_embed.errors import CuratorEmbedError, UsageError

if TYPE_CHECKING:
    from aiohttp import ClientRequest, ClientResponse, ClientSession, TCPConnector

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
Client = Callable[..., Awaitable["ClientSession"]]

_NOT_PUBLIC_4 = tuple(
    IPv4Network(text)
    for text in (
        "0.0.0.0/8",  # this host
        "10.0.0.0/8",
        "100.64.0.0/10",  # behind a provider's address translation
        "127.0.0.0/8",
        "169.254.0.0/16",  # link-local; clouds answer there with credentials
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",  # documentation, as 198.51.100.0 and 203.0.113.0
        "192.88.99.0/24",  # relays to 6to4, given up
        "192.168.0.0/16",
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/3",  # multicast and reserved
    )
)
_PUBLIC_6 = IPv6Network("2000::/3")
"""The only part of IPv6 given out so far. Addresses that carry one of IPv4 (mapped, NAT64) lie outside."""
_NOT_PUBLIC_6 = tuple(
    IPv6Network(text)
    for text in (
        "2001::/23",  # protocols, Teredo among them, which carries addresses of IPv4
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4: carries addresses of IPv4
        "3fff::/20",  # documentation
    )
)

_GOES_ANYWHERE = frozenset(
    {
        "accept",
        "accept-encoding",
        "connection",
        "content-length",
        "content-type",
        "host",
        "if-range",
        "range",
        "transfer-encoding",
        "user-agent",
    }
)
"""Headers that tell nothing about who asks. All others stay with the origin that they were meant for."""


class NotPublic(CuratorEmbedError, OSError):
    """A connection to an address that is not public was asked for, and not opened."""


def is_public(address: str | Address) -> bool:
    """Whether an address belongs to a host on the public internet, by IANA's registries of special addresses.

    What is not plainly such an address is not public: loopback, private and link-local networks, multicast, reserved
    and documentation blocks, and all addresses of IPv6 in which one of IPv4 is wrapped.

    Args:
        address: an address, or its text as ``ipaddress`` reads it; any other text is not public.
    """
    try:
        found = ip_address(address)
    except ValueError:
        return False
    if isinstance(found, IPv4Address):
        return not any(found in network for network in _NOT_PUBLIC_4)
    found = IPv6Address(int(found))  # without a scope
    return found in _PUBLIC_6 and not any(found in network for network in _NOT_PUBLIC_6)


def networks(texts: Iterable[str]) -> tuple[Network, ...]:
    """Networks from their texts ("10.1.0.0/16", "fd00::/8", "127.0.0.1").

    Raises:
        UsageError: one is none.
    """
    found: list[Network] = []
    for text in texts:
        try:
            found.append(ip_network(text))
        except ValueError as error:
            raise UsageError(f"'{text}' is no network ({error}); give one as 10.1.0.0/16") from None
    return tuple(found)


def public_socket_factory(allow: Iterable[str] = ()) -> Callable[[tuple[Any, ...]], socket.socket]:
    """What aiohttp's ``TCPConnector(socket_factory=)`` takes: a socket for an address that is public, else an error.

    Args:
        allow: networks that are let through all the same, such as those of an intranet.

    Returns:
        A function of one entry of ``socket.getaddrinfo``'s list. It raises NotPublic.
    """
    allowed = networks(allow)

    def make(info: tuple[Any, ...]) -> socket.socket:
        family, kind, protocol, _, where = info
        if family not in (socket.AF_INET, socket.AF_INET6) or not _may_connect(str(where[0]), allowed):
            raise NotPublic(errno.EACCES, "the address is not public")  # the same for all: aiohttp joins what differs
        return socket.socket(family=family, type=kind, proto=protocol)

    return make


def _may_connect(text: str, allowed: tuple[Network, ...]) -> bool:
    if is_public(text):
        return True
    try:
        address = ip_address(text.partition("%")[0])
    except ValueError:
        return False
    return any(address in network for network in allowed)


def public_connector(allow: Iterable[str] = (), **options: Any) -> TCPConnector:
    """A connector of aiohttp that connects to public addresses only, however often a request is redirected.

    Args:
        allow: see ``public_socket_factory``.
        options: of ``aiohttp.TCPConnector``.
    """
    from aiohttp import TCPConnector

    return TCPConnector(socket_factory=public_socket_factory(allow), **options)


async def public_session(allow: Iterable[str] = (), **options: Any) -> ClientSession:
    """A session of aiohttp that connects to public addresses only, and through no proxy.

    Args:
        allow: see ``public_socket_factory``.
        options: of ``aiohttp.ClientSession``.

    Raises:
        UsageError: an option would go round the guard.
    """
    from aiohttp import ClientSession

    for name in ("connector", "proxy", "trust_env"):
        if options.pop(name, None):
            raise UsageError(f"{name} would go round the guard that lets connections to public addresses only through")
    return ClientSession(connector=public_connector(allow), trust_env=False, **options)


@lru_cache(maxsize=64)  # the same function again, so that fsspec finds the file system that it made with it
def public_client(allow: tuple[str, ...] = ()) -> Client:
    """``public_session`` as fsspec's ``HTTPFileSystem(get_client=)`` takes it."""

    async def get_client(**options: Any) -> ClientSession:
        return await public_session(allow, **options)

    return get_client


@lru_cache(maxsize=64)
def client_of_origin(origin: str) -> Client:
    """For ``HTTPFileSystem(get_client=)``: sessions whose headers, cookies and credentials go to one origin only.

    aiohttp follows redirects anywhere. It takes Authorization and Cookie off a request that changes its origin, and
    puts the session's ``auth`` on again; other headers that hold secrets (``X-Api-Key``) it keeps.

    Args:
        origin: scheme, host and port ("https://host", "http://host:8000").
    """

    async def get_client(**options: Any) -> ClientSession:
        from aiohttp import ClientSession
        from yarl import URL

        own = URL(origin).origin()

        async def only_there(
            request: ClientRequest, send: Callable[[ClientRequest], Awaitable[ClientResponse]]
        ) -> ClientResponse:
            if request.url.origin() != own:
                for name in [name for name in request.headers if name.lower() not in _GOES_ANYWHERE]:
                    request.headers.popall(name, None)
            return await send(request)

        return ClientSession(**{**options, "middlewares": (*options.get("middlewares", ()), only_there)})

    return get_client


def is_not_public(error: BaseException) -> bool:
    """Whether an error of aiohttp's says that the guard let no connection through."""
    seen: BaseException | None = error
    for _ in range(8):
        if seen is None:
            return False
        if isinstance(seen, NotPublic):
            return True
        seen = seen.__cause__ or getattr(seen, "os_error", None)
    return False
