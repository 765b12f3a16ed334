"""A faster way to read whole small objects from S3: obstore, at a tenth of the CPU time that s3fs takes for each.

Only a shortcut: whatever does not come this way at once (an error, an option that obstore does not know, obstore not
being installed) is read through fsspec, which has the retries and the last word on errors.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from obstore.store import ClientConfig, S3Store

GIVE_UP_AFTER = 8
"""Failures before the first success that show the shortcut to lead nowhere: another region, a special set-up."""

_CREDENTIALS_FOR = timedelta(minutes=5)
_UNDERSTOOD = {"endpoint_url", "anon", "key", "secret", "token", "client_kwargs", "config_kwargs"}
_UNDERSTOOD_CLIENT = {"region_name", "endpoint_url"}
_UNDERSTOOD_CONFIG = {"connect_timeout", "read_timeout", "retries", "max_pool_connections", "proxies"}
_MEANS_THE_SAME = re.compile(
    r"AWS_(ACCESS_KEY_ID|SECRET_ACCESS_KEY|SESSION_TOKEN|SECURITY_TOKEN|REGION|DEFAULT_REGION|PROFILE|DEFAULT_PROFILE"
    r"|CONFIG_FILE|SHARED_CREDENTIALS_FILE|EC2_METADATA_\w+|METADATA_SERVICE_\w+|ROLE_\w+|WEB_IDENTITY_TOKEN_FILE"
    r"|CONTAINER_\w+|EXECUTION_ENV|RETRY_MODE|MAX_ATTEMPTS|DEFAULT_OUTPUT|PAGER|SDK_\w+|STS_\w+|DATA_PATH|CA_BUNDLE|LAMBDA_\w+)"
)
"""Variables of the environment that are answered here as botocore would, or that reading an object does not depend on.
obstore reads many more, some of which botocore does not know or understands otherwise."""


class FastBucket:
    """One bucket; once it has shown to be of no use, it is not ``useful`` any more."""

    def __init__(self, store: S3Store) -> None:
        self._store = store
        self._succeeded, self._failures = False, 0

    @property
    def useful(self) -> bool:
        """Whether to ask at all."""
        return self._succeeded or self._failures < GIVE_UP_AFTER

    def count_failure(self) -> None:
        """This way did not give an object that may well be there."""
        self._failures += 1

    async def read(self, key: str) -> bytes | None:
        """A whole object; None when it must be read another way."""
        from obstore.exceptions import NotFoundError

        if not reads_as_written(key):
            return None
        try:
            data = bytes(await (await self._store.get_async(key)).bytes_async())
        except NotFoundError:  # the object, or the bucket
            return None
        except Exception:  # what is wrong, and whether to try again, is for the other way to find out
            self.count_failure()
            return None
        self._succeeded = True
        return data


def reads_as_written(key: str) -> bool:
    """Whether obstore asks for just this key: it drops a slash at the beginning, and refuses empty and dot segments."""
    return not {"", ".", ".."} & set(key.split("/"))


def fast_bucket(bucket: str, options: Mapping[str, Any]) -> FastBucket | None:
    """The bucket, reached as these options of s3fs say; None where obstore cannot do just that.

    Made once for a bucket and its options: connections are kept.
    """
    if any(name.startswith("AWS_") and not _MEANS_THE_SAME.fullmatch(name) for name in os.environ):
        return None
    try:
        text = json.dumps(dict(options), sort_keys=True)
    except TypeError:  # options that are no plain values: a session, a class
        return None
    try:
        return _made(bucket, text, os.getpid())
    except Exception:  # whatever obstore or botocore make of the options, s3fs will say better
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
    bundle = os.environ.get("AWS_CA_BUNDLE")
    if bundle and not http["allow_http"]:
        http["root_certificate"] = Path(bundle).read_bytes()
    if endpoint:
        asked |= {"endpoint": endpoint, "virtual_hosted_style_request": False}
    # One attempt: what fails is tried again through fsspec.
    return FastBucket(S3Store(bucket, client_options=http, retry_config={"max_retries": 0}, **asked))


def _asked_of_aws(given: Mapping[str, Any], client: Mapping[str, Any]) -> dict[str, Any] | None:
    """Region and credentials as botocore, and so s3fs, finds them; None where it finds something else as well."""
    from botocore.credentials import Credentials
    from botocore.session import Session

    session = Session()
    profile = session.get_scoped_config()
    if {"endpoint_url", "services", "s3", "use_fips_endpoint", "use_dualstack_endpoint", "ca_bundle"} & set(profile):
        return None
    region = client.get("region_name") or session.get_config_variable("region") or "us-east-1"
    if given.get("anon"):
        return {"region": region, "skip_signature": True}
    if given.get("key") and given.get("secret"):
        credentials: Any = Credentials(given["key"], given["secret"], given.get("token"))
    else:
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

    # Through a provider in any case: beside plain keys obstore would take a token that the environment has.
    return {"region": region, "credential_provider": current}
