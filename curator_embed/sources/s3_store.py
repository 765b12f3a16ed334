"""A faster way to read whole small objects from S3: obstore, at a tenth of the CPU time that s3fs takes for each.

Only a shortcut: whatever does not come this way at once (an error, an option that obstore does not know, obstore not
being installed) is read through fsspec, which has the retries and the last word on errors.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from obstore.store import ClientConfig, S3Store

GIVE_UP_AFTER = 8
"""Failures before the first success that show the shortcut to lead nowhere: another region, a special set-up."""

_CREDENTIALS_FOR = timedelta(minutes=5)
_UNDERSTOOD = {"endpoint_url", "anon", "key", "secret", "token", "client_kwargs", "config_kwargs"}
_UNDERSTOOD_CLIENT = {"region_name", "endpoint_url"}
_UNDERSTOOD_CONFIG = {"connect_timeout", "read_timeout", "retries", "max_pool_connections", "proxies"}


class FastBucket:
    """One bucket; once it has shown to be of no use, it is not ``useful`` any more."""

    def __init__(self, store: S3Store) -> None:
        self._store = store
        self._succeeded, self._failures = False, 0

    @property
    def useful(self) -> bool:
        """Whether to ask at all."""
        return self._succeeded or self._failures < GIVE_UP_AFTER

    async def read(self, key: str) -> bytes | None:
        """A whole object; None when it must be read another way.

        Raises:
            PermissionError: the server refuses to give it.
        """
        from obstore.exceptions import NotFoundError, PermissionDeniedError

        try:
            data = bytes(await (await self._store.get_async(key)).bytes_async())
        except PermissionDeniedError as error:
            raise PermissionError("access denied") from error
        except NotFoundError:  # the object, or the bucket
            return None
        except Exception:  # what is wrong, and whether to try again, is for the other way to find out
            self._failures += 1
            return None
        self._succeeded = True
        return data


def fast_bucket(bucket: str, options: Mapping[str, Any]) -> FastBucket | None:
    """The bucket, reached as these options of s3fs say; None where obstore cannot do just that.

    Made once for a bucket and its options: connections are kept.
    """
    try:
        return _made(bucket, json.dumps(dict(options), sort_keys=True), os.getpid())
    except TypeError:  # options that are no plain values: a session, a class
        return None


_making = threading.Lock()


def _made(bucket: str, options: str, process: int) -> FastBucket | None:
    with _making:
        return _make(bucket, options, process)


@lru_cache(maxsize=32)
def _make(bucket: str, options: str, process: int) -> FastBucket | None:
    try:
        from obstore.store import S3Store
    except ImportError:
        return None
    given = json.loads(options)
    client, config = given.get("client_kwargs") or {}, given.get("config_kwargs") or {}
    if set(given) - _UNDERSTOOD or set(client) - _UNDERSTOOD_CLIENT or set(config) - _UNDERSTOOD_CONFIG:
        return None
    asked = _asked_of_aws(given, client)
    if asked is None:
        return None
    endpoint = given.get("endpoint_url") or client.get("endpoint_url")
    http: ClientConfig = {"allow_http": str(endpoint).startswith("http://")}
    if config.get("connect_timeout"):
        http["connect_timeout"] = timedelta(seconds=float(config["connect_timeout"]))
    if config.get("read_timeout"):
        http["timeout"] = timedelta(seconds=float(config["read_timeout"]))
    if "proxies" in config:
        proxy = config["proxies"].get("http" if http["allow_http"] else "https")
        if proxy is None and any(name.lower().endswith("_proxy") for name in os.environ):
            return None  # obstore would use the environment's
        if proxy:
            http["proxy_url"] = proxy
    if endpoint:
        asked |= {"endpoint": endpoint, "virtual_hosted_style_request": False}
    # One attempt: what fails is tried again through fsspec.
    return FastBucket(S3Store(bucket, client_options=http, retry_config={"max_retries": 0}, **asked))


def _asked_of_aws(given: Mapping[str, Any], client: Mapping[str, Any]) -> dict[str, Any] | None:
    """Region and credentials as botocore, and so s3fs, finds them; None where it finds something else as well."""
    from botocore.exceptions import BotoCoreError
    from botocore.session import Session

    session = Session()
    try:
        profile = session.get_scoped_config()
    except BotoCoreError:
        return None
    if {"endpoint_url", "services", "s3"} & set(profile):
        return None
    region = client.get("region_name") or session.get_config_variable("region")
    asked: dict[str, Any] = {"region": region} if region else {}
    if given.get("anon"):
        return {**asked, "skip_signature": True}
    if given.get("key") and given.get("secret"):
        secrets = {"access_key_id": given["key"], "secret_access_key": given["secret"]}
        return {**asked, **secrets, **({"token": given["token"]} if given.get("token") else {})}
    credentials = session.get_credentials()
    if credentials is None:
        return None

    def current() -> dict[str, Any]:
        frozen = credentials.get_frozen_credentials()  # renews them when it is time
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(UTC) + _CREDENTIALS_FOR,
        }

    return {**asked, "credential_provider": current}
