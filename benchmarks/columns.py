"""What columns cost beside a decode: every figure a ratio of things measured in turn, round by round.

    python -m benchmarks.columns [--images 400] [--rounds 5] [--photos FOLDER]

* hashes: phash + dhash against Pillow's own greyscale conversion and Lanczos resizes, which they cannot do without.
* beside the data path: phash + dhash + image_sha256 + width and height on decoded images against reading, decoding
  and preprocessing without a model, with all cores.
* threads: hashing decoded images with one thread and with two, and a whole run of reading, decoding and hashing;
  beside what Pillow's resizes alone gain.
* each kind and property alone, in decodes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from benchmarks.images import encoded_images, write_shards
from curator_embed.columns import HASH_KINDS, PROPERTIES, ImageHasher, ImageProperties
from curator_embed.decoding.image import DecodedImage
from curator_embed.decoding.pillow import decode
from curator_embed.steps import ImageStep

LANCZOS = Image.Resampling.LANCZOS
SLOW = {"whash": 5, "colorhash": 5, "crop_resistant": 20}
"""One image in so many is enough for these."""

Measured = list[DecodedImage]


def fresh(images: Measured) -> Measured:
    """The same decoded images with nothing cached."""
    return [DecodedImage(image.encoded, image.original, image.format) for image in images]


def pillow_floor(images: Measured, threads: int = 1) -> None:
    """Greyscale once, then the two thumbnails of phash and dhash."""

    def one(image: DecodedImage) -> None:
        grey = image.original.convert("L")
        grey.resize((32, 32), LANCZOS)
        grey.resize((9, 8), LANCZOS)

    each(one, images, threads)


def each(work: Callable[[DecodedImage], None], images: Measured, threads: int) -> None:
    """Call ``work`` on every image; each thread has its share, so that nothing but the work is measured."""

    def share(number: int) -> None:
        for image in images[number::threads]:
            work(image)

    if threads == 1:
        share(0)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(share, range(threads)))


def measure(images: Measured, *steps: ImageStep, threads: int = 1) -> None:
    """All steps on all images, as the decode threads of a run call them."""

    def one(image: DecodedImage) -> None:
        for step in steps:
            step.measure(image)

    each(one, fresh(images), threads)


def in_turn(
    rows: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each row, round by round, after one warm-up round."""
    found: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(rounds + 1):
        for name, work in rows.items():
            start = clock()
            work()
            found[name].append(clock() - start)
    return {name: times[1:] for name, times in found.items()}


def ratio(times: dict[str, list[float]], above: str, below: str) -> float:
    """Median of the rounds' own ratios: neighbours in time share the machine's mood."""
    return statistics.median(a / b for a, b in zip(times[above], times[below], strict=True))


def main() -> None:
    """Print the ratios and, with ``--json``, store them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--photos", type=Path, help="a folder of photographs to cut from, instead of the wheels' own")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    from benchmarks.cpu import data_path, run_step
    from curator_embed.embedders import TimmImageEmbedder

    cores = len(os.sched_getaffinity(0))
    encoded = encoded_images(arguments.images, arguments.photos)
    images = [decode(data) for data in encoded]
    hasher, size = ImageHasher(("phash", "dhash")), ImageProperties(("width", "height"))
    checksum = ImageHasher("image_sha256")
    embedder = TimmImageEmbedder("tf_efficientnet_lite0", num_threads_per_worker=cores, device="cpu")
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_shards(Path(scratch) / "shards", encoded)
        # What one thread does is counted in its own processor time, which neighbours on the machine do not lengthen.
        alone = in_turn(
            {"floor": lambda: pillow_floor(images), "hashes": lambda: measure(images, hasher)},
            arguments.rounds,
            time.process_time,
        )
        times = in_turn(
            {
                "floor": lambda: pillow_floor(images),
                "floor, two threads": lambda: pillow_floor(images, threads=2),
                "hashes": lambda: measure(images, hasher),
                "hashes, two threads": lambda: measure(images, hasher, threads=2),
                "columns": lambda: measure(images, hasher, checksum, size, threads=cores),
                "path": lambda: data_path(folder, embedder, cores),
                "run": lambda: run_step(folder, hasher, {}, 1),
                "run, two threads": lambda: run_step(folder, hasher, {}, 2),
            },
            arguments.rounds,
        )
    beside = f"phash + dhash + sha256 + size / data path, {cores} threads"
    found: dict[str, tuple[float, str]] = {
        "phash + dhash / Pillow's greyscale + two resizes": (ratio(alone, "hashes", "floor"), "at most 1.15"),
        beside: (ratio(times, "columns", "path"), "at most 0.75"),
        "hashing, two threads over one": (ratio(times, "hashes", "hashes, two threads"), "at least 1.8"),
        "a run of hashing (read, decode, hash), the same": (ratio(times, "run", "run, two threads"), "at least 1.8"),
        "the same for Pillow's resizes alone": (ratio(times, "floor", "floor, two threads"), "what the machine gives"),
    }
    print(
        f"{len(images)} JPEGs of {sum(map(len, encoded)) / len(encoded) / 1000:.0f} KB, {cores} cores, "
        f"median of {arguments.rounds} rounds after one warm-up"
    )
    for name, (value, wanted) in found.items():
        print(f"  {name:<58} {value:>6.2f}   (to reach: {wanted})")

    print("  alone, in decodes of the same images:")
    in_decodes: dict[str, float] = {}
    steps: dict[str, tuple[ImageStep, int]] = {k: (ImageHasher(k), SLOW.get(k, 2)) for k in HASH_KINDS}
    steps["properties"] = ImageProperties(), 2
    percentiles = [name for name in PROPERTIES if name not in ImageProperties().names]
    steps["brightness percentiles"] = ImageProperties(percentiles), 2
    for name, (step, every) in steps.items():
        some = images[::every]
        pair = in_turn(
            {
                "decode": lambda some=some: [decode(image.encoded) for image in some],
                "alone": lambda some=some, step=step: measure(some, step),
            },
            max(1, arguments.rounds // 2),
            time.process_time,
        )
        in_decodes[name] = ratio(pair, "alone", "decode")
        print(f"    {name:<56} {in_decodes[name]:>6.2f}")
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"ratios": {k: v[0] for k, v in found.items()}, "in_decodes": in_decodes}, indent=2)
        )


if __name__ == "__main__":
    main()
