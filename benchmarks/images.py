"""The files that benchmarks read: real photographs at ImageNet's sizes, as webdataset shards with parquet.

Crops of the photographs in scikit-image's and scikit-learn's wheels, about 470x400 and 110 KB, or a folder
of your own.
"""

from __future__ import annotations

import io
import random
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

NAMES = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "motorcycle_right.png",
         "retina.jpg", "hubble_deep_field.jpg", "ihc.png")  # fmt: skip


def photographs(folder: Path | None = None) -> list[Image.Image]:
    """Photographs to cut from, as RGB images."""
    if folder is not None:
        paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    else:
        try:
            import skimage
            import sklearn
        except ImportError:
            raise SystemExit("scikit-image and scikit-learn bring photographs; without them give --photos") from None

        paths = [Path(skimage.__file__).parent / "data" / name for name in NAMES]
        paths += sorted((Path(sklearn.__file__).parent / "datasets" / "images").glob("*.jpg"))
    found = [Image.open(path).convert("RGB") for path in paths if path.is_file()]
    if not found:
        raise SystemExit(f"no .jpg and no .png below {folder}")
    return found


def encoded_images(count: int, folder: Path | None = None, seed: int = 0) -> list[bytes]:
    """``count`` JPEGs about as large as ImageNet's mean (468x401, 110 KB), each a different crop."""
    rng = random.Random(seed)
    sources = photographs(folder)
    images = []
    for number in range(count):
        source = sources[number % len(sources)]
        width, height = rng.choice([(500, 375), (375, 500), (500, 333), (480, 400), (468, 401)])
        scale = rng.uniform(0.7, 1.0) * min(source.width / width, source.height / height)
        box_w, box_h = width * scale, height * scale
        left, top = rng.uniform(0, source.width - box_w), rng.uniform(0, source.height - box_h)
        crop = source.resize((width, height), Image.Resampling.BICUBIC, box=(left, top, left + box_w, top + box_h))
        buffer = io.BytesIO()
        crop.save(buffer, "JPEG", quality=97, subsampling=rng.choice([0, 2]))
        images.append(buffer.getvalue())
    return images


def write_shards(folder: Path, images: list[bytes], per_shard: int = 500) -> Path:
    """Write images as img2dataset would: ``00000.tar`` and ``00000.parquet``."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard, start in enumerate(range(0, len(images), per_shard)):
        rows = []
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as archive:
            for number, data in enumerate(images[start : start + per_shard]):
                key = f"{shard:05d}{number:04d}"
                for extension, content in (("jpg", data), ("txt", f"photograph {key}".encode())):
                    member = tarfile.TarInfo(f"{key}.{extension}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
                rows.append({"key": key, "caption": f"photograph {key}"})
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{shard:05d}.parquet")
    return folder
