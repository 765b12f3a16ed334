"""What shards, bad images and second models cost: ratios, each from one run.

    python -m benchmarks.scale [--shards 10000]

* resume: a finished dataset of so many shards, all found done.
* per shard: tiny shards on a cluster of local processes with a model that does next to nothing.
* bad images: the data path with 1 % and 10 % of the images damaged, against the clean rate.
* second model: two models in one pass, against decoding plus both forward passes alone.
"""

from __future__ import annotations

import argparse
import random
import resource
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.cpu import data_path
from benchmarks.images import encoded_images, write_shards
from benchmarks.stub import MeanColour, tiny_shards
from curator_embed.datasets import ImageTextPairDataset
from curator_embed.embedders import TimmImageEmbedder
from curator_embed.execution.clients import get_client
from curator_embed.steps import Settings


def shards(count: int, workers: int) -> None:
    """Per shard overhead, driver memory and resume."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = tiny_shards(Path(scratch) / "in", count)
        output = Path(scratch) / "out"
        client = get_client("cpu", n_workers=workers)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        report = MeanColour()(ImageTextPairDataset.from_webdataset(str(folder))).save_metadata(
            str(output), progress=False
        )
        took = time.perf_counter() - start
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        spent = {stage: round(1000 * seconds / count, 2) for stage, seconds in report.time.items()}
        print(
            f"{count} shards of 4 thumbnails on {workers} processes: {took:.1f} s in all; the driver grew by "
            f"{grown:.0f} MB; milliseconds a shard, summed over threads: {spent}"
        )
        label = "per shard overhead (all workers' wall time / shards)"
        print(f"  {label:<58} {1000 * took * workers / count:>6.1f} ms   (to reach: 10)")
        client.close()
        get_client("cpu")
        start = time.perf_counter()
        again = MeanColour()(ImageTextPairDataset.from_webdataset(str(folder))).save_metadata(
            str(output), progress=False
        )
        assert again.shards["skipped"] == count, again
        label = f"resume of a finished dataset of {count} shards"
        print(f"  {label:<58} {time.perf_counter() - start:>6.1f} s    (to reach: 5)")


def bad_images(count: int, rounds: int) -> None:
    """The data path with damaged images, round by round against the clean one."""
    rng = random.Random(1)
    clean = encoded_images(count)
    embedder = TimmImageEmbedder("vit_base_patch32_clip_224.openai", num_threads_per_worker=2, device="cpu")
    embedder = embedder.settled(Settings(threads=2))

    def damaged(share: float) -> list[bytes]:
        kinds = [lambda d: d[: len(d) // 2], lambda d: b"<html>404</html>", lambda d: b"", lambda d: d[:100]]
        return [rng.choice(kinds)(data) if rng.random() < share else data for data in clean]

    with tempfile.TemporaryDirectory() as scratch:
        folders = {s: write_shards(Path(scratch) / str(s), damaged(s)) for s in (0.0, 0.01, 0.10)}
        rates: dict[float, list[float]] = {share: [] for share in folders}
        for _ in range(rounds + 1):
            for share, folder in folders.items():
                start = time.perf_counter()
                done = data_path(folder, embedder, 2)
                rates[share].append(done / (time.perf_counter() - start))
        for share, wanted in ((0.01, 0.95), (0.10, 0.85)):
            ratio = statistics.median(a / b for a, b in zip(rates[share][1:], rates[0.0][1:], strict=True))
            label = f"data path with {share:.0%} bad images / clean"
            print(f"  {label:<58} {ratio:>6.2f}   (to reach: {wanted})")


def second_model(count: int, rounds: int) -> None:
    """Two models in one pass against data path + forward A + forward B measured alone."""
    a = TimmImageEmbedder("tf_efficientnet_lite0", num_threads_per_worker=2, device="cpu", compile=False)
    b = TimmImageEmbedder(
        "vit_tiny_patch16_224", num_threads_per_worker=2, device="cpu", compile=False, image_embedding_column="b"
    )
    a, b = a.settled(Settings(threads=2)), b.settled(Settings(threads=2))
    get_client("cpu")
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_shards(Path(scratch) / "in", encoded_images(count))
        models = [(embedder.load_model("cpu"), torch.zeros((3, 224, 224), dtype=torch.uint8)) for embedder in (a, b)]
        ratios = []
        for number in range(rounds + 1):
            start = time.perf_counter()
            data_path(folder, a, 2)
            for model, blank in models:
                for _ in range(count // model.batch_size):
                    model([blank] * model.batch_size)
            alone = time.perf_counter() - start
            start = time.perf_counter()
            report = b(a(ImageTextPairDataset.from_webdataset(str(folder)))).save_metadata(
                str(Path(scratch) / f"out{number}"), progress=False
            )
            assert report.embedded == count
            ratios.append((time.perf_counter() - start) / alone)
        label = "two models in one pass / data path + forward A + forward B"
        print(f"  {label:<58} {statistics.median(ratios[1:]):>6.2f}   (to reach: 1.05 at most)")


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--images", type=int, default=480)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=["shards", "bad", "second"])
    arguments = parser.parse_args(argv)
    if arguments.only in (None, "shards"):
        shards(arguments.shards, arguments.workers)
    if arguments.only in (None, "bad"):
        bad_images(arguments.images, arguments.rounds)
    if arguments.only in (None, "second"):
        second_model(arguments.images, arguments.rounds)


if __name__ == "__main__":
    main()
