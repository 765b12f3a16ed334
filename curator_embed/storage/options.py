"""Which storage options a kind of file system takes. A run has one set of them for all its places: a list on the web,
images in a bucket, an output elsewhere. Each gets its own, and what nobody takes is said at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from typing import Any

from curator_embed.errors import UsageError

StorageOptions = Mapping[str, Any] | None

WEB = ("http", "https")
S3 = ("s3", "s3a")

_FSSPEC = frozenset(
    {
        *("use_listings_cache", "listings_expiry_time", "max_paths", "skip_instance_cache", "asynchronous", "loop"),
        *("batch_size", "protocol"),
    }
)
"""Options that fsspec takes for every file system."""
_FOR_S3 = frozenset({"anon", "client_kwargs", "config_kwargs", "endpoint_url", "key", "secret", "token"})
_FOR_WEB = frozenset({"auth", "client_kwargs", "cookies", "headers"})
"""The usual ones, known without the package that takes them."""


def options_for(protocol: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that places of this protocol get.

    A web server gets none of S3's, and S3 none of a web server's. Of other protocols not all names are known: they get
    everything.

    Raises:
        UsageError: neither takes such an option. It would come up as a fault of the network, long after.
        ImportError: the package for this protocol is not installed.
    """
    if protocol not in (*WEB, *S3):
        return dict(options)
    taken, inner = _taken("s3" if protocol in S3 else "http")
    others, others_inner = (_FOR_WEB, _WEB_CLIENT) if protocol in S3 else (_FOR_S3, _S3_CLIENT)
    found = _chosen(options, taken, others, f"storage_options has '{{}}', which is no option for {protocol}:// paths")
    client = found.get("client_kwargs")
    if isinstance(client, Mapping):
        said = f"client_kwargs in storage_options has '{{}}', which is no option for {protocol}:// paths"
        found["client_kwargs"] = _chosen(client, inner, others_inner, said)
    return found


def for_the_web(options: Mapping[str, Any]) -> bool:
    """Whether storage options hold what a web server is to be sent."""
    names = {*options, *(options.get("client_kwargs") or {})}
    return not names.isdisjoint(_FOR_WEB - {"client_kwargs"})


def _chosen(options: Mapping[str, Any], taken: frozenset[str], others: frozenset[str], said: str) -> dict[str, Any]:
    for name in options:
        if name not in taken | others:
            near = get_close_matches(name, taken, 1)
            more = f"; did you mean '{near[0]}'?" if near else f". They take: {', '.join(sorted(taken))}"
            raise UsageError(said.format(name) + more)
    return {name: value for name, value in options.items() if name in taken}


_S3_CLIENT = frozenset(
    {
        *("region_name", "api_version", "use_ssl", "verify", "endpoint_url", "aws_access_key_id"),
        *("aws_secret_access_key", "aws_session_token", "aws_account_id", "config"),
    }
)
"""What botocore's ``create_client`` takes."""
_WEB_CLIENT = frozenset({"auth", "connector", "cookies", "headers", "timeout", "trust_env"})


@cache
def _taken(kind: str) -> tuple[frozenset[str], frozenset[str]]:
    """Names of all options, and of those in ``client_kwargs``, as the installed packages have them."""
    import inspect

    from fsspec import get_filesystem_class

    def names(function: Any) -> frozenset[str]:
        left_out = {"self", "kwargs", "storage_options", "method", "str_or_url", "service_name"}
        return frozenset(inspect.signature(function).parameters) - left_out

    made = names(get_filesystem_class(kind).__init__) | _FSSPEC
    if kind == "http":
        from aiohttp import ClientSession

        return made | names(ClientSession._request), names(ClientSession.__init__)
    from botocore.session import Session

    return made | names(Session.__init__), names(Session.create_client) | _S3_CLIENT
