"""How S3 is reached: region, endpoint, timeouts, retries, proxies, as options of fsspec's s3fs.

Credentials are no part of it: they come from where AWS's tools look for them (the environment,
``~/.aws``, the instance's role).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from curator_embed.errors import UsageError


@dataclass(frozen=True)
class S3Options(Mapping[str, Any]):
    """Options for buckets, to be passed as ``storage_options`` anywhere.

    Attributes:
        region: of the bucket ("eu-central-1"); by default what the environment says.
        endpoint: URL of a server other than Amazon's ("http://localhost:9000").
        anonymous: send no credentials, for public buckets.
        timeout: seconds to wait for a connection, and for each further piece of an answer.
        retries: further attempts after a failed one (server errors, "slow down", broken connections), with growing
            pauses.
        http_proxy: URL of the proxy for http endpoints; by default what ``HTTP_PROXY`` says.
        https_proxy: URL of the proxy for https endpoints; by default what ``HTTPS_PROXY`` says.
        no_proxy: use none, whatever the environment says.
        connections: requests under way at once.

    Raises:
        UsageError: ``no_proxy`` together with a proxy, or a number out of range.
    """

    region: str | None = None
    endpoint: str | None = None
    anonymous: bool = False
    timeout: float = 60.0
    retries: int = 5
    http_proxy: str | None = None
    https_proxy: str | None = None
    no_proxy: bool = False
    connections: int = 256

    def __post_init__(self) -> None:
        if self.no_proxy and (self.http_proxy or self.https_proxy):
            raise UsageError("no_proxy and a proxy contradict each other; give one of them")
        if self.timeout <= 0 or self.retries < 0 or self.connections < 1:
            raise UsageError(
                f"timeout={self.timeout}, retries={self.retries}, connections={self.connections}: the timeout must "
                "be greater than 0, retries 0 or more, connections 1 or more"
            )
        if self.endpoint is not None and not self.endpoint.startswith(("http://", "https://")):
            raise UsageError(f"endpoint={self.endpoint!r}: a URL, beginning with http:// or https://")

    @cached_property
    def _options(self) -> dict[str, Any]:
        config: dict[str, Any] = {
            "connect_timeout": self.timeout,
            "read_timeout": self.timeout,
            "retries": {"max_attempts": self.retries + 1, "mode": "standard"},
            "max_pool_connections": self.connections,
        }
        proxies = {"http": self.http_proxy, "https": self.https_proxy}
        if self.no_proxy or any(proxies.values()):
            config["proxies"] = {name: url for name, url in proxies.items() if url}
        options: dict[str, Any] = {"config_kwargs": config}
        if self.anonymous:
            options["anon"] = True
        if self.region is not None:
            options["client_kwargs"] = {"region_name": self.region}
        if self.endpoint is not None:
            options["endpoint_url"] = self.endpoint
        return options

    def __getitem__(self, name: str) -> Any:
        return self._options[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._options)

    def __len__(self) -> int:
        return len(self._options)
