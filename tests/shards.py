"""Webdatasets for tests, written with Python's own tarfile and pyarrow."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """Write members in the order given."""
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def crops(photo: Path, count: int, size: int = 96, kind: str = "JPEG") -> list[bytes]:
    """``count`` different encoded crops of one photograph."""
    with Image.open(photo) as opened:
        image = opened.convert("RGB")
    found = []
    for number in range(count):
        left = (number * 37) % max(1, image.width - size)
        top = (number * 53) % max(1, image.height - size)
        buffer = io.BytesIO()
        image.crop((left, top, left + size, top + size)).save(buffer, kind, quality=90)
        found.append(buffer.getvalue())
    return found


def write_dataset(
    folder: Path,
    photos: Sequence[Path],
    *,
    shards: int = 3,
    samples: int = 10,
    bad: Mapping[tuple[int, int], bytes] | None = None,
    missing: int = 1,
    table: bool = True,
) -> Path:
    """What img2dataset leaves behind: tars of the successes, parquets with a row for every URL, out of order.

    Args:
        bad: (shard, sample) -> the bytes its image has instead of a photograph.
        missing: failed downloads a shard: rows with no sample.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        images = crops(photos[shard % len(photos)], samples)
        rows: list[dict[str, Any]] = []
        members: list[tuple[str, bytes]] = []
        for number in range(samples + missing):
            key = f"{shard:05d}{number:04d}"
            row = {"key": key, "caption": f"photo {number}", "status": "success", "width": 96, "url": f"http://x/{key}"}
            if number >= samples:
                row |= {"status": "failed_to_download", "width": None}
            else:
                data = (bad or {}).get((shard, number), images[number])
                beside = {"jpg": data, "txt": str(row["caption"]).encode(), "json": json.dumps(row).encode()}
                members += [(f"{key}.{extension}", content) for extension, content in beside.items()]
            rows.append(row)
        write_tar(folder / f"{shard:05d}.tar", members)
        if table:
            shuffled = rows[1::2] + rows[::2]
            schema = pa.schema([("key", pa.string()), ("caption", pa.string()), ("status", pa.string()),
                                ("width", pa.int32()), ("url", pa.string())])  # fmt: skip
            pq.write_table(pa.Table.from_pylist(shuffled, schema), folder / f"{shard:05d}.parquet")
    return folder
