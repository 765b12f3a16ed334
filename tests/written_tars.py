"""Tars to read: written by Python's own tarfile, which knows nothing of the reader under test."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable
from typing import Any

from PIL import Image

Members = Iterable[tuple[str, bytes]]


def tar_bytes(members: Members, fmt: int = tarfile.PAX_FORMAT) -> bytes:
    """The bytes of a tar with these members."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=fmt) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def image_bytes(seed: int = 0, fmt: str = "JPEG") -> bytes:
    """A small image, a different one for each seed."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (seed % 256, seed // 256 % 256, 99)).save(buffer, fmt)
    return buffer.getvalue()


def as_json(**fields: Any) -> bytes:
    return json.dumps(fields).encode()
