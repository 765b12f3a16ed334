"""The options by which commands reach buckets and servers: those of S3 by name, others as fsspec's JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Annotated, Any

import typer

from curator_embed.errors import UsageError

_S3 = "S3: "


@dataclass(frozen=True)
class StorageOptions:
    """What the options about storage say; see each one's help."""

    in_flight: Annotated[
        int, typer.Option(min=1, help="Path lists and folders: remote images that are read at a time.")
    ] = 256
    region: Annotated[str | None, typer.Option("--region", "--region-name", help=_S3 + "the bucket's region.")] = None
    endpoint: Annotated[str | None, typer.Option(help=_S3 + "URL of a server other than Amazon's.")] = None
    anonymous: Annotated[bool, typer.Option("--anonymous", help=_S3 + "send no credentials (public buckets).")] = False
    timeout: Annotated[
        float, typer.Option(min=0.001, help="Seconds to wait for a remote answer before it is asked for again.")
    ] = 60.0
    retries: Annotated[
        int, typer.Option("--retries", "--retry", min=0, help="Further attempts at a remote read, with growing pauses.")
    ] = 5
    http_proxy: Annotated[str | None, typer.Option(help=_S3 + "URL of the proxy for http endpoints.")] = None
    https_proxy: Annotated[str | None, typer.Option(help=_S3 + "URL of the proxy for https endpoints.")] = None
    no_proxy: Annotated[bool, typer.Option("--no-proxy", help=_S3 + "use no proxy, whatever the environment says.")] = (
        False
    )
    storage_options: Annotated[
        str | None,
        typer.Option(help='Further options for fsspec as JSON, for instance \'{"token": "anon"}\' for gs://.'),
    ] = None

    def storage(self, *places: str | None) -> dict[str, Any]:
        """Options for fsspec.

        Args:
            places: paths and URLs that the command reads and writes.

        Raises:
            UsageError: an option is for S3 and none of the places is, or options contradict each other.
        """
        from curator_embed.storage.s3 import S3Options

        given = self.given("region", "endpoint", "anonymous", "http_proxy", "https_proxy", "no_proxy")
        storage: dict[str, Any] = {}
        if any((place or "").startswith(("s3://", "s3a://")) for place in places):
            options = S3Options(**given, timeout=self.timeout, retries=self.retries, connections=self.in_flight)
            storage.update(options)
        elif given:
            option = f"--{next(iter(given)).replace('_', '-')}"
            raise UsageError(f"{option} is for buckets, and nothing here begins with s3://: not SRC, and no option")
        if self.storage_options is not None:
            try:
                more = json.loads(self.storage_options)
            except ValueError as error:
                raise UsageError(f"--storage-options is no JSON: {error}") from None
            if not isinstance(more, dict):
                raise UsageError("--storage-options must be a JSON object")
            storage |= more
        return storage

    def given(self, *names: str) -> dict[str, Any]:
        """The options among these that differ from their defaults."""
        defaults = {item.name: item.default for item in fields(self)}
        return {name: value for name in names if (value := getattr(self, name)) != defaults[name]}
