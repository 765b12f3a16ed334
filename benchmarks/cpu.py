"""How fast a CPU run is, and against what: every rate from one run on the same files, in turn, round by round.

    python -m benchmarks.cpu [--images 1000] [--rounds 3] [--threads 2] [--model NAME]

* decode only: Pillow decodes, nothing else, in as many threads.
* DataLoader: torch's, with timm's transform and as many worker processes.
* data path: ours without a model: read from tars, decode, resize, crop, normalise into batches.
* forward only: the model alone, at its batch shape.
* whole job: ``save_metadata`` from tars to parquet.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.images import encoded_images, write_shards
from curator_embed.datasets import ImageTextPairDataset
from curator_embed.decoding.cpu import normalise
from curator_embed.decoding.reference import timm_transform
from curator_embed.embedders import TimmImageEmbedder
from curator_embed.execution.clients import get_client
from curator_embed.execution.job import ShardJob
from curator_embed.execution.shard_run import ShardRun
from curator_embed.pipeline.engines import CpuEngine
from curator_embed.pipeline.pipeline import Pipeline
from curator_embed.sources.webdataset import find_shards
from curator_embed.steps import BatchModel, Settings, Step


class NormaliseOnly(BatchModel):
    """Stands in for the model: makes the float batch it would be given, and returns nothing of value."""

    def __init__(self, embedder: TimmImageEmbedder, batch_size: int = 16) -> None:
        self.batch_size, self.spec = batch_size, embedder.spec
        self.out = torch.empty((batch_size, 3, *embedder.spec.output))

    def __call__(self, images: Sequence[Any]) -> np.ndarray:
        normalise(images, self.spec, out=self.out)
        return np.ones((len(images), 1), np.float32)


class Encoded(torch.utils.data.Dataset[torch.Tensor]):
    """Encoded images behind timm's transform, as a training script has them."""

    def __init__(self, paths: list[Path], transform: Callable[[Image.Image], torch.Tensor]) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        with Image.open(self.paths[index]) as image:
            return self.transform(image.convert("RGB"))


def timed(work: Callable[[], int]) -> float:
    """Images a second."""
    start = time.perf_counter()
    count = work()
    return count / (time.perf_counter() - start)


def decode_only(images: list[bytes], threads: int) -> int:
    """Pillow's decode to RGB, in threads."""

    def decode(data: bytes) -> None:
        with Image.open(io.BytesIO(data)) as image:
            image.convert("RGB")

    with ThreadPoolExecutor(threads) as pool:
        return sum(1 for _ in pool.map(decode, images))


def data_loader(paths: list[Path], embedder: TimmImageEmbedder, workers: int) -> int:
    """torch's DataLoader with timm's transform."""
    dataset = Encoded(paths, timm_transform(embedder.model_name))
    loader = torch.utils.data.DataLoader(dataset, batch_size=16, num_workers=workers)
    return sum(len(batch) for batch in loader)


def data_path(folder: Path, embedder: TimmImageEmbedder, threads: int) -> int:
    """Our pipeline with a model that does nothing, from tars, without writing."""
    return run_step(folder, embedder, {0: NormaliseOnly(embedder)}, threads)


def run_step(folder: Path, step: Step, models: dict[int, BatchModel], threads: int) -> int:
    """One step through our pipeline, from tars, without writing."""
    job = ShardJob((step,), "key", output="/nonexistent", decode_threads=threads)
    pipeline = Pipeline(CpuEngine(job.steps), models, [] if models else [0], threads=threads)
    count = 0
    try:
        runs = []
        for shard in find_shards(str(folder)):
            run = ShardRun(dataclasses.replace(job, output=str(folder / "none")), shard, pipeline)
            run.begin()
            runs.append(run)
            count += len(run.keys)
        for run in runs:
            assert run.opened is not None
            run.opened.wait()
            run.abandon()
    finally:
        pipeline.close()
    return count


def forward_only(embedder: TimmImageEmbedder, images: int) -> int:
    """The model on blank images, at its own batch shape."""
    model = embedder.load_model("cpu")
    blank = torch.zeros((3, *embedder.spec.output), dtype=torch.uint8)
    batches = max(2, images // model.batch_size)
    for _ in range(batches):
        model([blank] * model.batch_size)
    return batches * model.batch_size


def whole_job(folder: Path, embedder: TimmImageEmbedder) -> tuple[int, dict[str, Any]]:
    """``save_metadata`` to a new folder."""
    with tempfile.TemporaryDirectory() as output:
        dataset = ImageTextPairDataset.from_webdataset(str(folder))
        report = embedder(dataset).save_metadata(output, progress=False)
        return report.embedded, report.to_dict()


def main() -> None:
    """Print the table and, with ``--json``, the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--model", default="tf_efficientnet_lite0")
    parser.add_argument("--model-images", type=int, default=400, help="images for the rows with a model")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--photos", type=Path, help="a folder of photographs to cut from, instead of the wheels' own")
    parser.add_argument("--skip", nargs="*", default=[], choices=["decode", "loader", "path", "forward", "job"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    cores = len(os.sched_getaffinity(0))

    with tempfile.TemporaryDirectory() as scratch:
        images = encoded_images(arguments.images, arguments.photos)
        folder = write_shards(Path(scratch) / "shards", images)
        some = write_shards(Path(scratch) / "some", images[: arguments.model_images])
        files = []
        for number, data in enumerate(images):
            files.append(Path(scratch) / f"{number}.jpg")
            files[-1].write_bytes(data)
        embedder = TimmImageEmbedder(
            arguments.model, num_threads_per_worker=arguments.threads, compile=arguments.compile, device="cpu"
        ).settled(Settings(threads=cores))
        get_client("cpu")
        rows: dict[str, Callable[[], int]] = {
            "decode": lambda: decode_only(images, arguments.threads),
            "loader": lambda: data_loader(files, embedder, arguments.threads),
            "path": lambda: data_path(folder, embedder, arguments.threads),
        }
        rates: dict[str, list[float]] = {name: [] for name in (*rows, "forward", "job")}
        reports: list[dict[str, Any]] = []
        runner = embedder.load_model("cpu")
        blank = torch.zeros((3, *embedder.spec.output), dtype=torch.uint8)

        def forward() -> int:
            batches = max(2, arguments.model_images // runner.batch_size)
            for _ in range(batches):
                runner([blank] * runner.batch_size)
            return batches * runner.batch_size

        def job() -> int:
            count, report = whole_job(some, embedder)
            reports.append(report)
            return count

        rows |= {"forward": forward, "job": job}
        for _ in range(arguments.rounds + 1):
            for name, work in rows.items():
                if name not in arguments.skip:
                    rates[name].append(timed(work))
    medians = {name: statistics.median(values[1:]) for name, values in rates.items() if values}
    size = sum(map(len, images)) / len(images) / 1000
    print(
        f"{len(images)} JPEGs of {size:.0f} KB, {arguments.threads} threads, {cores} cores, {arguments.model}, "
        f"median of {arguments.rounds} rounds after one warm-up"
    )
    for name, rate in medians.items():
        spread = f"{min(rates[name][1:]):.0f}-{max(rates[name][1:]):.0f}"
        print(f"  {name:<10} {rate:>8.1f} images/s   ({spread})")
    ratios = ratios_of(medians, rates)
    for name, (ratio, wanted) in ratios.items():
        print(f"  {name:<58} {ratio:>6.2f}   (to reach: {wanted})")
    if reports:
        print(f"  where the whole job's time went: {reports[-1]['time']}, wall {reports[-1]['wall_seconds']} s")
    if arguments.json:
        found = {"rates": medians, "ratios": {k: v[0] for k, v in ratios.items()}, "reports": reports[-1:]}
        arguments.json.write_text(json.dumps(found, indent=2))


def ratios_of(medians: dict[str, float], rates: dict[str, list[float]]) -> dict[str, tuple[float, float]]:
    """The design's ratios, as medians of the rounds' own ratios: neighbours in time share the machine's mood."""

    def median(formula: Callable[[dict[str, float]], float]) -> float:
        rounds = zip(*(rates[name][1:] for name in medians), strict=True)
        return statistics.median(formula(dict(zip(medians, values, strict=True))) for values in rounds)

    found: dict[str, tuple[float, float]] = {}
    if {"path", "decode"} <= medians.keys():
        found["data path / decode only"] = (median(lambda r: r["path"] / r["decode"]), 0.70)
    if {"path", "loader"} <= medians.keys():
        found["data path / DataLoader"] = (median(lambda r: r["path"] / r["loader"]), 1.8)
    if {"path", "forward", "job"} <= medians.keys():
        found["whole job / (1 / (1/forward + 1/data path))"] = (
            median(lambda r: r["job"] * (1 / r["forward"] + 1 / r["path"])), 0.95,
        )  # fmt: skip
    return found


if __name__ == "__main__":
    main()
