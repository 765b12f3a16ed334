"""The demo's dataset: real photographs in many variants, packed as img2dataset packs its downloads.

Apart from the demo itself, because tests and tutorials want the data without the run.
"""

from __future__ import annotations

import hashlib
import json
import random
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageEnhance, ImageOps

from curator_embed.errors import MissingExtra

PHOTOGRAPHS = {
    "astronaut": ("skimage", "data/astronaut.png", "an astronaut in an orange suit before a flag"),
    "brick": ("skimage", "data/brick.png", "a brick wall"),
    "camera": ("skimage", "data/camera.png", "a man with a camera on a tripod"),
    "cat": ("skimage", "data/chelsea.png", "a tabby cat looking at the viewer"),
    "cells": ("skimage", "data/ihc.png", "stained tissue under a microscope"),
    "clock": ("skimage", "data/clock_motion.png", "a clock, blurred by motion"),
    "coffee": ("skimage", "data/coffee.png", "a cup of coffee on a wooden table"),
    "coins": ("skimage", "data/coins.png", "old coins in rows"),
    "flower": ("sklearn", "datasets/images/flower.jpg", "an orange flower"),
    "galaxies": ("skimage", "data/hubble_deep_field.jpg", "distant galaxies in a black sky"),
    "grass": ("skimage", "data/grass.png", "grass from above"),
    "gravel": ("skimage", "data/gravel.png", "gravel from above"),
    "moon": ("skimage", "data/moon.png", "the surface of the moon"),
    "motorcycle": ("skimage", "data/motorcycle_left.png", "a motorcycle in a garage"),
    "retina": ("skimage", "data/retina.jpg", "the retina of an eye"),
    "rocket": ("skimage", "data/rocket.jpg", "a rocket on its launch pad"),
    "temple": ("sklearn", "datasets/images/china.jpg", "a temple in China"),
}
"""Name -> (package, file within it, caption): photographs that two packages carry in their wheels."""

LONG_SIDE = 640
SEED = 20240611


def _scaled(factor: float) -> Callable[[Image.Image], Image.Image]:
    return lambda image: image.resize(
        (round(image.width * factor), round(image.height * factor)), Image.Resampling.LANCZOS
    )


def _crop(left: float, top: float, right: float, bottom: float) -> Callable[[Image.Image], Image.Image]:
    """Cut out a box given in parts of width and height."""
    return lambda image: image.crop(
        (
            round(image.width * left),
            round(image.height * top),
            round(image.width * right),
            round(image.height * bottom),
        )
    )


def _same(image: Image.Image) -> Image.Image:
    return image


ORIGINAL = "original"
VARIANTS: dict[str, tuple[Callable[[Image.Image], Image.Image], str, int]] = {
    ORIGINAL: (_same, "jpg", 92),
    "half size": (_scaled(0.5), "jpg", 92),
    "quarter size": (_scaled(0.25), "jpg", 92),
    "enlarged": (_scaled(1.5), "jpg", 85),
    "centre crop": (_crop(0.2, 0.2, 0.8, 0.8), "jpg", 92),
    "top left crop": (_crop(0, 0, 0.75, 0.75), "jpg", 92),
    "bottom right crop": (_crop(0.25, 0.25, 1, 1), "jpg", 92),
    "wide crop": (_crop(0, 0.2, 1, 0.8), "jpg", 92),
    "mirrored": (ImageOps.mirror, "jpg", 92),
    "darker": (lambda image: ImageEnhance.Brightness(image).enhance(0.6), "jpg", 92),
    "JPEG at 10": (_same, "jpg", 10),
    "WebP at 20": (_same, "webp", 20),
    "PNG, small": (_scaled(0.6), "png", 0),
    "grey": (ImageOps.grayscale, "jpg", 85),
}
"""Name -> (what is done to the photograph, extension, quality)."""

_SCHEMA = pa.schema(
    {
        "url": pa.string(),
        "caption": pa.string(),
        "photograph": pa.string(),
        "variant": pa.string(),
        "key": pa.string(),
        "status": pa.string(),
        "error_message": pa.string(),
        "width": pa.int32(),
        "height": pa.int32(),
        "original_width": pa.int32(),
        "original_height": pa.int32(),
        "exif": pa.string(),
        "sha256": pa.string(),
    }
)


@dataclass(frozen=True)
class _Picture:
    """One row: a download that came (``encoded``) or did not."""

    photograph: str
    variant: str
    caption: str
    extension: str = "jpg"
    encoded: bytes | None = None
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class DemoData:
    """What was built: ``rows`` counts them all, ``missing`` those without a sample, ``broken`` the bad images."""

    folder: Path
    shards: int
    rows: int
    photographs: int
    variants: int
    missing: int
    broken: int


def build_demo_data(folder: str | Path, *, shards: int = 4, photographs: int | None = None) -> DemoData:
    """Write a webdataset of photographs and their variants, as img2dataset lays it out: tar, parquet, stats.

    The rows of one photograph are spread over all shards. Two rows are downloads that failed and have no sample,
    two samples are broken: a photograph cut in half, and a web page in place of one. The same packages give the
    same bytes; shards whose stats file is there are left as they are.

    Args:
        folder: made when it is not there.
        shards: tars to spread the rows over.
        photographs: use only the first so many of ``PHOTOGRAPHS``.

    Raises:
        MissingExtra: scikit-image or scikit-learn is not installed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(PHOTOGRAPHS)[:photographs]
    pictures = [picture for name in names for picture in _variants(name)]
    odd = _failures(pictures[0])
    pictures += odd
    shuffled = random.Random(SEED)
    shuffled.shuffle(pictures)
    for number in range(shards):
        _write_shard(folder, number, pictures[number::shards], shuffled)
    return DemoData(
        folder=folder,
        shards=shards,
        rows=len(pictures),
        photographs=len(names),
        variants=len(VARIANTS),
        missing=sum(picture.encoded is None for picture in odd),
        broken=sum(picture.encoded is not None for picture in odd),
    )


def _variants(name: str) -> Iterator[_Picture]:
    package, file, caption = PHOTOGRAPHS[name]
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        distribution = {"skimage": "scikit-image", "sklearn": "scikit-learn"}[package]
        raise MissingExtra(distribution, "demo", "The demo's photographs")
    with Image.open(Path(spec.origin).parent / file) as opened:
        photograph = opened if opened.mode == "L" else opened.convert("RGB")
        photograph.load()
    photograph.thumbnail((LONG_SIDE, LONG_SIDE), Image.Resampling.LANCZOS)
    for variant, (change, extension, quality) in VARIANTS.items():
        changed, buffer = change(photograph), BytesIO()
        changed.save(buffer, format={"jpg": "JPEG", "webp": "WEBP", "png": "PNG"}[extension], quality=quality)
        yield _Picture(name, variant, caption, extension, buffer.getvalue(), changed.size)


def _failures(whole: _Picture) -> list[_Picture]:
    """What every crawl brings home beside its images."""
    assert whole.encoded is not None
    page = b"<!DOCTYPE html><html><body><h1>403 Forbidden</h1></body></html>"
    return [
        _Picture("none", "cut in half", "a download that broke off", "jpg", whole.encoded[: len(whole.encoded) // 2]),
        _Picture("none", "web page", "an error page saved as an image", "jpg", page),
        _Picture("none", "not found", "a link that is dead"),
        _Picture("none", "refused", "a server that says no"),
    ]


def _write_shard(folder: Path, number: int, pictures: list[_Picture], shuffled: random.Random) -> None:
    rows = [_row(f"{number:05d}{index:04d}", picture) for index, picture in enumerate(pictures)]
    # img2dataset writes rows as downloads finish: their order is not the tar's.
    order = shuffled.sample(range(len(rows)), len(rows))
    stats = folder / f"{number:05d}_stats.json"
    if stats.is_file():
        return
    with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
        for row, picture in zip(rows, pictures, strict=True):
            if picture.encoded is None:
                continue
            key = row["key"]
            _add(tar, f"{key}.{picture.extension}", picture.encoded)
            _add(tar, f"{key}.txt", picture.caption.encode())
            _add(tar, f"{key}.json", json.dumps(row, indent=4).encode())
    pq.write_table(pa.Table.from_pylist([rows[i] for i in order], _SCHEMA), folder / f"{number:05d}.parquet")
    successes = sum(row["status"] == "success" for row in rows)
    counts = {"count": len(rows), "successes": successes, "failed_to_download": len(rows) - successes}
    # Written last: it says that the other two are whole.
    stats.write_text(json.dumps(counts, indent=4))


def _row(key: str, picture: _Picture) -> dict[str, str | int | None]:
    width, height = picture.size or (None, None)
    came = picture.encoded is not None
    return {
        "url": f"https://photographs.invalid/{picture.photograph}/{picture.variant.replace(' ', '-')}",
        "caption": picture.caption,
        "photograph": picture.photograph,
        "variant": picture.variant,
        "key": key,
        "status": "success" if came else "failed_to_download",
        "error_message": None if came else "HTTP Error 404: Not Found",
        "width": width,
        "height": height,
        "original_width": width,
        "original_height": height,
        "exif": "{}" if came else None,
        "sha256": None if picture.encoded is None else hashlib.sha256(picture.encoded).hexdigest(),
    }


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # time 0, no owner: the same bytes on every machine
    member.size = len(content)
    tar.addfile(member, BytesIO(content))
